"""One optimizer for another in a program that is there: groups, schedulers and hyperparameters go over."""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..core import checks, hyperparameters, options
from ..core.renamed import NAMES
from ..optimizers import (
    FOCUS,
    MSVAG,
    SVAG,
    AdaBound,
    Adam,
    AdaMomentum,
    AdamStar,
    AdamW,
    Ano,
    Anolog,
    Lion,
    LionK,
    ScheduleFreeAdamW,
    ScheduleFreeSign,
    SignAdam,
    SignAdamPP,
    SignSGD,
    Signum,
)
from ..optimizers.base import SignOptimizer
from ..optimizers.schedule_free import ScheduleFree

#: What the searched learning rate of a method is of AdamW's with betas of 0.9 and 0.95, to one digit: medians over the
#: problems of docs/results.md that each was searched on (150 and 1,200 steps of a GPT, digits).
SHARES: dict[type, float] = {Adam: 1.0, AdamW: 1.0, SignAdamPP: 0.6, Signum: 0.2, Lion: 0.2, SignAdam: 0.2}
#: torch's that take AdamW's learning rates.
_AS_ADAMW = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)
#: torch's whose groups do not say that ``weight_decay`` is added to the gradient. Those of AdamW say what it does
#: wherever AdamW is an Adam.
_COUPLED = (
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.SGD,
    torch.optim.ASGD,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
)
#: Keys of a group that are learning rates: its own, and those that schedulers keep there.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr", *options.LARGEST_RATES)
_TORCH = frozenset(options.TORCH_OPTIONS)

#: Of any optimizer. A number under ``lr_scale`` is one that schedulers like timm's multiply with.
_OF_ANY = frozenset(("weight_decay", "decoupled_weight_decay", "maximize", "lr_scale"))
#: Of those with Adam's moments: what is added to a root, and whether the largest second moment so far is taken.
_OF_MOMENTS = frozenset(("eps", "amsgrad"))
#: Classes that add ``eps`` under the root, to the second moment itself.
_EPS_UNDER_THE_ROOT = (AdaMomentum, Ano, Anolog)
#: What the second beta decays where it is not the second moment: a momentum, the average of the weights.
_SECOND_BETAS: tuple[tuple[type, ...], ...] = ((Lion, LionK), (FOCUS,))
#: Classes with an absolute threshold ``alpha``, in units of the gradient: SignAdamPP while its confidence is fixed.
_GATED = (SignSGD, ScheduleFreeSign, SignAdamPP)
#: What belongs to one kind of SignAdamPP's confidence.
_OF_CONFIDENCE = frozenset(("alpha", "target", "gain"))
#: Hyperparameters that mean the same in several classes. AMSBound is an AdaBound.
_FAMILIES: tuple[tuple[tuple[type, ...], frozenset[str]], ...] = (
    ((SVAG, MSVAG, AdamStar), frozenset(("bias_correct_variance",))),
    ((MSVAG, AdamStar), frozenset(("variance",))),
    ((ScheduleFreeAdamW, ScheduleFreeSign), frozenset(("warmup_steps", "r", "weight_lr_power"))),
    ((AdaBound,), frozenset(("final_lr", "gamma"))),
    ((Ano, Anolog), frozenset(("eps",))),
)


def from_optimizer(
    old: Optimizer, cls: type[SignOptimizer] = SignAdamPP, *, log: Callable[[str], object] = print, **changes: Any
) -> SignOptimizer:
    """An optimizer of this package in place of another: the same groups, translated, and under the same schedulers.

    Learning rates are multiplied by a rule of thumb, the median of what the searches of docs/results.md found beside
    AdamW: 0.6 for :class:`SignAdamPP` (from 0.2 to 1.7 by problem), 0.2 for :class:`Signum`, :class:`Lion` and
    :class:`SignAdam`. It is where a search begins, no result. Between other classes there is none, and ``lr`` must be
    given.

    Weight decay stays as it was, in size and in kind; it was the same for all methods in those runs. Of the other
    hyperparameters those go over that mean the same in both: ``eps``, ``betas`` as far as each decays the same thing,
    ``momentum`` as the ``beta`` of a method that has one, what all classes of this package share, and an absolute
    threshold between :class:`SignSGD`, :class:`ScheduleFreeSign` and :class:`SignAdamPP`. The rest begins as ``cls``
    has it, and ``log`` says what was left out. What else stands in a group, a scheduler's numbers or a name, stays.

    State goes over to the same class, bit for bit, and from torch's ``Adam`` and ``AdamW`` to ours; otherwise moments
    begin at zero, at the rates that schedulers have reached. A Schedule-Free optimizer's parameters are where it left
    them: call its ``eval()`` first to go on from the average.

    Args:
        old: any optimizer of ``torch.optim``'s interface. It keeps its groups, and should not be used any more.
        cls: the class of the new one.
        log: is given a summary, line by line, of what has changed.
        changes: arguments of the new one's constructor, for all groups, instead of what the old ones would become; with
            ``lr`` learning rates keep their proportions, and that of the first group becomes this, under a scheduler
            its ``initial_lr``. Also ``base_lr`` and ``largest_lr``, entries of groups that ``weight_decay_scale``
            reads: they are what a scheduler began with, its ``initial_lr``, unless given.

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
        TypeError: ``old`` is no optimizer, ``cls`` none of this package's, or ``changes`` name what ``cls`` does not
            take.
        ValueError: no rule of thumb leads from one to the other, and ``changes`` have no ``lr``; an ``lr`` for rates
            that are 0; or hyperparameters that ``cls`` does not take. Nothing has changed then.
    """
    if not isinstance(old, Optimizer):
        raise TypeError(f"old is a {type(old).__name__}: must be an optimizer")
    if not (isinstance(cls, type) and issubclass(cls, SignOptimizer)):
        raise TypeError(f"cls={checks.shown(cls)}: must be an optimizer class of signadam_ext")
    asked = getattr(old, "_asked", old.defaults)
    kept = {name: True for name in ("fused", "capturable") if asked.get(name)}
    share = _share(old, cls, changes, {**kept, **changes}.get("capturable") is True)
    rates = {name: changes[name] for name in options.LARGEST_RATES if name in changes}
    arguments = {name: value for name, value in changes.items() if name not in rates}
    # What a group does not say is then the constructor's, so that changes reach all groups.
    groups = [{**_translated(old, group, share, cls, changes), **rates} for group in old.param_groups]
    arguments = {**_constructors(_translated(old, old.defaults, share, cls, changes), cls), **kept, **arguments}
    known = [{*group, *map(_name_in_groups, changes)} for group in groups]
    new: SignOptimizer = cast(Any, cls)(groups, **arguments)
    takes_state = len(old.state) > 0 and _is_same(type(old), cls)
    if takes_state:
        new.load_state_dict(_state_for(old, new))
    schedulers = _schedulers_of(old)
    for scheduler in schedulers:
        _attach(scheduler, new, share)
    if schedulers:
        _tell_schedulers(new)
    log(f"{type(old).__name__} -> {cls.__name__}: learning rates {share.said}")
    for index, (before, after, names) in enumerate(zip(old.param_groups, new.param_groups, known, strict=True)):
        log(f"group {index}: {_told(before, after, names)}")
    state = "state taken over" if takes_state else "state begins anew"
    log(f"{state}; schedulers: {', '.join(type(scheduler).__name__ for scheduler in schedulers) or 'none'}")
    return new


@dataclass(frozen=True)
class _Share:
    """What learning rates become: ``old`` exactly ``new``, and all others in proportion."""

    old: float
    new: float
    why: str = ""
    on_device: bool = False

    @property
    def said(self) -> str:
        return f"times {self.new / self.old:g}, {self.why}" if self.why else "as they were"

    def of(self, rate: Any) -> Any:
        """A learning rate, or what a scheduler keeps of one, as it becomes. Tensors stay tensors where they may."""
        if isinstance(rate, Tensor) and (self.on_device or rate.device.type == "cpu"):
            return rate.detach().clone() * (self.new / self.old)
        rate = float(rate)
        return self.new if rate == self.old else rate * (self.new / self.old)


def _share(old: Optimizer, cls: type, changes: Mapping[str, Any], on_device: bool) -> _Share:
    """What learning rates become.

    Raises:
        TypeError, ValueError: nothing says it, or ``lr`` is none, or for a rate of 0.
    """
    if "lr" in changes:
        first = old.param_groups[0]
        name = "initial_lr" if "initial_lr" in first else "lr"
        rate, wanted = float(first[name]), float(checks.learning_rate("lr", changes["lr"]))
        if rate == 0:
            raise ValueError(
                f"lr={changes['lr']!r} where the {name} of the first group is 0, so that no other is in proportion to "
                "it: set its 'initial_lr' to the learning rate that becomes this one"
            )
        return _Share(rate, wanted, "as lr= says", on_device)
    if _is_same(type(old), cls):
        return _Share(1.0, 1.0, on_device=on_device)
    before = SHARES.get(type(old), SHARES[AdamW] if isinstance(old, _AS_ADAMW) else None)
    after = SHARES.get(cls)
    if before is None or after is None:
        raise ValueError(
            f"no rule of thumb leads from the learning rates of {type(old).__name__} to those of {cls.__name__}: pass "
            "lr="
        )
    return _Share(before, after, "" if before == after else "a rule of thumb", on_device)


def _is_same(old: type, cls: type[SignOptimizer]) -> bool:
    """Whether both are one method: with the same state, and the same hyperparameters."""
    if issubclass(old, SignOptimizer):
        return old.RULE is cls.RULE and old.HYPERPARAMETERS is cls.HYPERPARAMETERS
    return issubclass(old, (torch.optim.Adam, torch.optim.AdamW)) and issubclass(cls, Adam)


def _translated(
    old: Optimizer, group: Mapping[str, Any], share: _Share, cls: type[SignOptimizer], changes: Mapping[str, Any]
) -> dict[str, Any]:
    """What goes over of a group, or of the defaults: without what ``changes`` say."""
    takes = hyperparameters.of_groups(cls)
    said = set(map(_name_in_groups, changes))
    found = {name: group[name] for name in _going_over(old, group, cls, changes) & takes.keys() & group.keys()}
    if "decoupled_weight_decay" not in group:
        found["decoupled_weight_decay"] = not isinstance(old, _COUPLED)
    found.setdefault("weight_decay", 0.0)  # of one that has none
    if (betas := _betas(old, group, cls)) is not None:
        found["betas"] = betas
    if (threshold := _threshold(old, group, cls, changes)) is not None:
        found["alpha"] = threshold
    found = {name: value for name, value in found.items() if name not in said}
    if group is not old.defaults:
        others = group.keys() - old.defaults.keys() - takes.keys() - NAMES.keys() - _TORCH - {"beta", "betas", "method"}
        found.update((name, group[name]) for name in others)
        if not isinstance(old, SignOptimizer) and "initial_lr" in group:
            found.update(dict.fromkeys(options.LARGEST_RATES, group["initial_lr"]))
    return {
        **{name: share.of(value) if name in _RATES else value for name, value in found.items()},
        **({"lr": share.of(group["lr"])} if "lr" in group else {}),
    }


def _going_over(
    old: Optimizer, group: Mapping[str, Any], cls: type[SignOptimizer], changes: Mapping[str, Any]
) -> set[str]:
    """Hyperparameters that mean the same in both, and so go over by their names; betas and thresholds have rules."""
    if isinstance(old, SignOptimizer):
        if _is_same(type(old), cls):
            found = set(hyperparameters.of_groups(cls)) - {"lr", "betas"}
            confidence = group.get("confidence")
            return found if changes.get("confidence", confidence) == confidence else found - _OF_CONFIDENCE
        found = {*options.COMMON, *options.LARGEST_RATES}
        for classes, names in _FAMILIES:
            if isinstance(old, classes) and issubclass(cls, classes):
                found |= names
        has_moments = not isinstance(old, _EPS_UNDER_THE_ROOT)
    else:
        found, has_moments = set(_OF_ANY), "betas" in group
    return found | (_OF_MOMENTS if has_moments and not issubclass(cls, _EPS_UNDER_THE_ROOT) else set())


def _betas(old: Optimizer, group: Mapping[str, Any], cls: type[SignOptimizer]) -> tuple[Any, ...] | None:
    """The betas of the new group: the old ones as far as they mean the same, and then what the class begins with."""
    check = cls.HYPERPARAMETERS.get("betas")
    if not isinstance(check, hyperparameters.Betas):
        return None
    count = len(check.names)
    betas, momentum = tuple(group.get("betas", ())), group.get("momentum")
    if not betas and count == 1 and isinstance(momentum, float) and 0 < momentum < 1:
        betas = (momentum,)
    if not _second_betas_agree(old, cls):
        betas = betas[:1]
    if len(betas) >= count or not betas:
        return betas[:count] or None
    named = inspect.signature(cls).parameters
    return (*betas, *named["betas"].default[len(betas) :]) if "betas" in named else None


def _second_betas_agree(old: Optimizer, cls: type) -> bool:
    """Whether they decay the same thing. Of classes from elsewhere it is taken for granted."""
    if not isinstance(old, (SignOptimizer, *_AS_ADAMW)):
        return True
    return all(isinstance(old, classes) == issubclass(cls, classes) for classes in _SECOND_BETAS)


def _threshold(old: Optimizer, group: Mapping[str, Any], cls: type, changes: Mapping[str, Any]) -> float | None:
    """The absolute threshold of one gated class for another, or None where it is none of both's."""
    if _is_same(type(old), cls) or not (isinstance(old, _GATED) and issubclass(cls, _GATED)):
        return None
    if group.get("confidence", "fixed") != "fixed" or changes.get("confidence", "fixed") != "fixed":
        return None
    return 0.0 if group["alpha"] is None else group["alpha"]


def _name_in_groups(name: str) -> str:
    """What groups call an argument of a constructor."""
    return "betas" if name == "beta" else NAMES.get(name, name)


def _constructors(defaults: Mapping[str, Any], cls: type[SignOptimizer]) -> dict[str, Any]:
    """Arguments of the constructor that make these the defaults, which groups that are added later take."""
    found = dict(defaults)
    if "betas" in found and len(found["betas"]) == 1:
        (found["beta"],) = found.pop("betas")
    if isinstance(found.get("lr_scale"), (int, float)):  # an entry of groups alone
        del found["lr_scale"]
    if not found.get("lr"):  # which stands for one that groups are told
        found.pop("lr", None)
    named = inspect.signature(cls).parameters
    return {name: value for name, value in found.items() if name in named}


def _state_for(old: Optimizer, new: SignOptimizer) -> dict[str, Any]:
    """The state of ``old`` under the groups of ``new``, whose hyperparameters have been translated."""
    saved, groups = old.state_dict(), new.state_dict()["param_groups"]
    numbers = {
        id(param): number
        for group, packed in zip(old.param_groups, saved["param_groups"], strict=True)
        for param, number in zip(group["params"], packed["params"], strict=True)
    }
    for group, own in zip(groups, new.param_groups, strict=True):
        group["params"] = [numbers[id(param)] for param in own["params"]]
    return {"state": saved["state"], "param_groups": groups}


def _told(before: Mapping[str, Any], after: Mapping[str, Any], names: set[str]) -> str:
    """What has become of a group, in words; ``names`` are those that went over or were given."""
    common = (before.keys() & names & after.keys()) - {"params"}
    told = [f"{name} {before[name]} -> {after[name]}" for name in common if before[name] != after[name]]
    left = before.keys() - names - _TORCH - {"method"}
    if "momentum" in left and "betas" not in before and after.get("betas") == (before["momentum"],):
        told.append(f"momentum {before['momentum']} -> betas {after['betas']}")
        left -= {"momentum"}
    told.sort()
    return f"{', '.join(told) or 'as it was'}{'; without ' + ', '.join(sorted(left)) if left else ''}"


def _schedulers_of(optimizer: Optimizer) -> list[Any]:
    """Schedulers of torch that hold it. An optimizer does not know them."""
    # By their types: a proxy of something that is gone raises where it is asked for its class.
    there = gc.get_objects()
    kinds = {kind for kind in set(map(type, there)) if issubclass(kind, (LRScheduler, ReduceLROnPlateau))}
    found = [each for each in there if type(each) in kinds] if kinds else []
    return [scheduler for scheduler in found if vars(scheduler).get("optimizer") is optimizer]


def _attach(scheduler: Any, optimizer: SignOptimizer, share: _Share) -> None:
    """Makes a scheduler one of this optimizer's."""
    scheduler.optimizer = optimizer
    for name in ("base_lrs", "_last_lr", "min_lrs", "max_lrs"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, [share.of(rate) for rate in getattr(scheduler, name)])
    for name in ("eta_min", "default_min_lr"):
        if getattr(scheduler, name, None) is not None:
            setattr(scheduler, name, share.of(getattr(scheduler, name)))
    if isinstance(optimizer, ScheduleFree) and getattr(scheduler, "cycle_momentum", False):
        scheduler.cycle_momentum = False  # whose first beta must stay as it is
    if hasattr(scheduler, "use_beta1"):  # whether the momentum that it cycles is the first of betas
        scheduler.use_beta1 = "betas" in optimizer.defaults


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
