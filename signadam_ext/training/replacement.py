"""One optimizer for another in a program that is there: groups, schedulers and hyperparameters go over."""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..core import options
from ..optimizers import Adam, AdamW, Lion, SignAdam, SignAdamPP, Signum
from ..optimizers.base import SignOptimizer

#: What the searched learning rate of a method is of AdamW's with betas of 0.9 and 0.95, to one digit: medians over the
#: problems of docs/results.md that each was searched on (150 and 1,200 steps of a GPT, digits).
SHARES: dict[type, float] = {Adam: 1.0, AdamW: 1.0, SignAdamPP: 0.6, Signum: 0.2, Lion: 0.2, SignAdam: 0.2}
#: torch's that take AdamW's learning rates.
_AS_ADAMW = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)
#: Keys of a group that are learning rates: its own, and those that schedulers keep there.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", *options.LARGEST_RATES)
_TORCH = frozenset(options.TORCH_OPTIONS)


def from_optimizer(
    old: Optimizer, cls: type[SignOptimizer] = SignAdamPP, *, log: Callable[[str], object] = print, **changes: Any
) -> SignOptimizer:
    """An optimizer of this package in place of another: the same groups, translated, and under the same schedulers.

    Learning rates are multiplied by a rule of thumb, the median of what the searches of docs/results.md found beside
    AdamW: 0.6 for :class:`SignAdamPP` (from 0.2 to 1.7 by problem), 0.2 for :class:`Signum`, :class:`Lion` and
    :class:`SignAdam`. It is where a search begins, no result. Weight decay stays as it was; it was the same for all
    methods in those runs. The first of ``betas`` stays the momentum's where the method has one beta. State is not
    translated, but for torch's ``AdamW`` to ours: moments begin at zero, at the rates that schedulers have reached.

    Args:
        old: any optimizer of ``torch.optim``'s interface. It keeps its groups, and should not be used any more.
        cls: the class of the new one.
        log: is given a summary, line by line, of what has changed.
        changes: hyperparameters of the new one, for all groups, instead of what the old ones would become; with ``lr``
            learning rates keep their proportions, and that of the first group becomes this.

    Returns:
        The new optimizer. Every scheduler of torch that held the old one holds it now, its base rates translated.

    Example:
        >>> import torch
        >>> from signadam_ext import SignAdamPP, from_optimizer
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> optimizer = from_optimizer(optimizer, SignAdamPP, log=lambda line: None, state_dtype="int2")
        >>> f"{optimizer.param_groups[0]['lr']:.4f}"
        '0.0006'

    Raises:
        TypeError: ``old`` is no optimizer, or ``cls`` none of this package's.
        ValueError: no rule of thumb leads from one to the other, and ``changes`` have no ``lr``; or hyperparameters
            that ``cls`` does not take. Nothing has changed then.
    """
    if not isinstance(old, Optimizer):
        raise TypeError(f"old is a {type(old).__name__}: must be an optimizer")
    if not (isinstance(cls, type) and issubclass(cls, SignOptimizer)):
        raise TypeError(f"cls={cls!r}: must be an optimizer class of signadam_ext")
    share = _share(old, cls, changes)
    own = {name for name in (*cls.HYPERPARAMETERS, *options.DEFAULTS, *options.LARGEST_RATES) if name != "seed"}
    groups, lines = [], []
    for index, group in enumerate(old.param_groups):
        translated = _translated(group, own, share, changes, type(old), cls)
        groups.append(translated)
        told = [f"{name} {group[name]} -> {value}" for name, value in sorted(_changed(group, translated).items())]
        left = sorted(set(group) - set(translated) - _TORCH - {"params", "param_names", *own})
        without = f"; without {', '.join(left)}" if left else ""
        lines.append(f"group {index}: {', '.join(told) or 'as it was'}{without}")
    asked = getattr(old, "_asked", old.defaults)
    kept = {name: True for name in ("fused", "capturable") if asked.get(name)}
    new: SignOptimizer = cast(Any, cls)(groups, **kept)
    is_alike = type(old) is cls or (isinstance(old, torch.optim.AdamW | torch.optim.Adam) and cls in (Adam, AdamW))
    takes_state = is_alike and len(old.state) > 0
    if takes_state:
        hyperparameters = [dict(group) for group in new.param_groups]
        new.load_state_dict(old.state_dict())
        for group, own_values in zip(new.param_groups, hyperparameters, strict=True):
            group.update(own_values)
    schedulers = _schedulers_of(old)
    for scheduler in schedulers:
        _attach(scheduler, new, share)
    if schedulers:
        _tell_schedulers(new)
    log(f"{type(old).__name__} -> {cls.__name__}: learning rates times {share:g}, a rule of thumb")
    for line in lines:
        log(line)
    state = "state taken over" if takes_state else "state begins anew"
    log(f"{state}; schedulers: {', '.join(type(scheduler).__name__ for scheduler in schedulers) or 'none'}")
    return new


def _share(old: Optimizer, cls: type, changes: Mapping[str, Any]) -> float:
    """What learning rates are multiplied by."""
    if "lr" in changes:
        return float(changes["lr"]) / float(old.param_groups[0].get("initial_lr", old.param_groups[0]["lr"]))
    known = SHARES.get(type(old), SHARES[AdamW] if isinstance(old, _AS_ADAMW) else None)
    wanted = SHARES.get(cls)
    if type(old) is cls:
        return 1.0
    if known is None or wanted is None:
        raise ValueError(
            f"no rule of thumb leads from the learning rates of {type(old).__name__} to those of {cls.__name__}: pass "
            "lr="
        )
    return wanted / known


def _translated(
    group: Mapping[str, Any], own: set[str], share: float, changes: Mapping[str, Any], old: type, cls: type
) -> dict[str, Any]:
    """A group of the new optimizer, as its constructor takes it."""
    found = {name: value for name, value in group.items() if name in own or name in ("params", "param_names")}
    # torch's Adam with weight_decay adds it to the gradient; what the group says itself comes first.
    if "decoupled_weight_decay" not in group:
        found["decoupled_weight_decay"] = old is not torch.optim.Adam
    found.update((name, float(group[name]) * share) for name in _RATES if name in group)
    if "betas" in found and "betas" in own:
        found["betas"] = tuple(found["betas"])[: _betas_of(cls)]
    elif "momentum" in group and "betas" in own and _betas_of(cls) == 1 and 0 < group["momentum"] < 1:
        found["betas"] = (group["momentum"],)
    if "betas" in found and len(found["betas"]) < _betas_of(cls):
        del found["betas"]
    found.update((name, value) for name, value in changes.items() if name != "lr")
    return found


def _betas_of(cls: type) -> int:
    """How many betas the class takes."""
    named = inspect.signature(cls).parameters
    return 2 if "betas" in named else 1 if "beta" in named else 0


def _changed(group: Mapping[str, Any], translated: Mapping[str, Any]) -> dict[str, Any]:
    """What the new group has otherwise than the old one."""
    common = (group.keys() & translated.keys()) - {"params"}
    return {name: translated[name] for name in common if group[name] != translated[name]}


def _schedulers_of(optimizer: Optimizer) -> list[Any]:
    """Schedulers of torch that hold it. An optimizer does not know them."""
    kinds = (LRScheduler, ReduceLROnPlateau)
    # By their types: a proxy of something that is gone raises where it is asked for its class.
    found = [each for each in gc.get_objects() if issubclass(type(each), kinds)]
    return [scheduler for scheduler in found if vars(scheduler).get("optimizer") is optimizer]


def _attach(scheduler: Any, optimizer: SignOptimizer, share: float) -> None:
    """Makes a scheduler one of this optimizer's."""
    scheduler.optimizer = optimizer
    for name in ("base_lrs", "_last_lr", "min_lrs", "max_lrs"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, [rate * share for rate in getattr(scheduler, name)])
    if hasattr(scheduler, "eta_min"):
        scheduler.eta_min *= share


def _tell_schedulers(optimizer: SignOptimizer) -> None:
    """Lets schedulers know of steps, as they make an optimizer do that they are given at first."""
    step = optimizer.step
    if hasattr(step, "_wrapped_by_lr_sched"):
        return

    @functools.wraps(step)
    def told(*args: Any, **kwargs: Any) -> Any:
        optimizer._opt_called = True  # type: ignore[attr-defined]
        return step(*args, **kwargs)

    told.__dict__["_wrapped_by_lr_sched"] = True
    optimizer.step = told  # type: ignore[method-assign]
