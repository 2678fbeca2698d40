"""State dicts and state files of an optimizer: what they hold, what is checked in one, and how it is put in place."""

from __future__ import annotations

import contextlib
import copy
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import checks, hyperparameters
from ..core.formats import outside_inference_mode
from ..core.renamed import names_today, warn_user
from ..core.rule import method_of
from ..core.tensors import is_lack_of_memory
from ..state.archive import members_of, opened, read_entries, read_head, write_entry, write_head, writer
from ..state.checkpoint import Layout, adopt, check, export, realized, written_entry
from ..state.pickles import check_repeated
from ..state.schema import fit
from .groups import GroupedOptimizer, complete, label, layout_of, layouts_of, max_grad_norm_of, warn_of_variance

#: Group entries that stay the constructor's when a checkpoint is loaded.
CONSTRUCTORS = ("backend", "state_dtype", "param_storage")

#: Methods whose groups did not say it in versions before 0.2. Torch's Adam and AdamW never do.
WITHOUT_METHOD = frozenset(
    ("Adam", "AdamStar", "Lion", "MSGD", "MSVAG", "SVAG", "SignAdam", "SignAdamPP", "SignSGD", "Signum")
)
#: Names of hyperparameters by which a checkpoint of another method is recognised: those that only torch.optim uses, and
#: the HYPERPARAMETERS of every subclass of SignOptimizer.
DISTINCTIVE = {
    *("beta", "momentum", "dampening", "nesterov", "amsgrad", "eps", "alpha", "centered", "rho", "etas", "step_sizes"),
    *("lambd", "t0", "momentum_decay", "lr_decay", "initial_accumulator_value", "beta2_decay", "d", "max_iter"),
    *("max_eval", "tolerance_grad", "tolerance_change", "history_size", "line_search_fn", "ns_coefficients"),
    *("ns_steps", "adjust_lr_fn"),
}


def exported(optimizer: GroupedOptimizer) -> dict[str, Any]:
    """What ``state_dict()`` returns."""
    with optimizer.runtime.between_steps():
        numbers, seeds = _numbers(optimizer), _seeds(optimizer.param_groups)
        state = {
            numbers[id(key)] if isinstance(key, Tensor) else key: entries for key, entries in optimizer.state.items()
        }
        for number, layout in layouts_of(optimizer):
            if number in state:
                state[number] = export(layout, state[number])
            elif layout.sharding is not None and layout.key.requires_grad:
                # torch.distributed.checkpoint reads what every parameter has, and so looks for what every one had.
                state[number] = export(layout, fit(layout, {}, seeds[number], number).changes)
        return {"state": state, "param_groups": _exported_groups(optimizer, numbers)}


def save(optimizer: GroupedOptimizer, path: str | os.PathLike[str]) -> None:
    """Writes what :func:`exported` returns to a file, one tensor at a time."""
    with optimizer.runtime.between_steps():
        layouts = layouts_of(optimizer)
        _refuse_sharded(layouts)
        groups = _exported_groups(optimizer, _numbers(optimizer))
        state = optimizer.state
        kept = [(number, layout, state[layout.key]) for number, layout in layouts if state.get(layout.key)]
        others = {key: value for key, value in state.items() if not isinstance(key, Tensor)}
        with writer(path) as archive:
            members = members_of((number, entries) for number, _, entries in kept)
            write_head(archive, {"param_groups": groups, "others": others}, members)
            by_number = {number: (layout, entries) for number, layout, entries in kept}
            for member in members:
                layout, entries = by_number[member.number]
                write_entry(archive, member, written_entry(layout, entries, member.name))


def load(optimizer: GroupedOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Takes a state dict as a whole, or raises and has taken nothing of it."""
    saved = state_dict["state"]
    if not isinstance(saved, Mapping):
        raise TypeError(f"'state' of the checkpoint is a {type(saved).__name__}: must be a dict")
    check_repeated("the checkpoint", dict(state_dict))
    with _depth_refused():
        groups, numbered = _checked_groups(optimizer, state_dict["param_groups"])
        numbers = {number for number, _ in numbered}
        others = {key: value for key, value in saved.items() if key not in numbers}
        _put_in_place(optimizer, groups, numbered, saved.get, others)


def load_file(optimizer: GroupedOptimizer, path: str | os.PathLike[str]) -> None:
    """Takes what :func:`save` wrote, one tensor at a time, as :func:`load` would."""
    with opened(path) as archive, _depth_refused():
        head, members = read_head(archive)
        groups, numbered = _checked_groups(optimizer, head["param_groups"])
        _refuse_sharded(numbered)
        _put_in_place(
            optimizer,
            groups,
            numbered,
            lambda number: read_entries(archive, members.get(number, ())),
            head.get("others", {}),
        )


@contextlib.contextmanager
def _depth_refused() -> Iterator[None]:
    """Refuses what cannot be copied or shown for its depth.

    Raises:
        ValueError: instead of RecursionError.
    """
    try:
        yield
    except RecursionError as error:
        raise ValueError("the checkpoint holds containers too deep in one another") from error


def _refuse_sharded(layouts: Sequence[tuple[Any, Layout]]) -> None:
    """Raises where a file of one process would hold parts of parameters.

    Raises:
        TypeError: a DTensor among them.
    """
    for _, layout in layouts:
        if layout.sharding is not None:
            raise TypeError(
                f"{layout.label} is a DTensor, of which each rank has a part, and a state file is one process's: use "
                "torch.distributed.checkpoint with get_optimizer_state_dict() and set_optimizer_state_dict()"
            )


def _seeds(groups: Sequence[Mapping[str, Any]]) -> list[int]:
    """The seed of each parameter, in order."""
    return [group["seed"] for group in groups for _ in group["params"]]


# Out


def _numbers(optimizer: GroupedOptimizer) -> dict[int, int]:
    """The number under which a checkpoint lists each parameter, by its id."""
    numbers: dict[int, int] = {}
    for number, param in enumerate(param for group in optimizer.param_groups for param in group["params"]):
        numbers.setdefault(id(param), number)
    return numbers


def _exported_groups(optimizer: GroupedOptimizer, numbers: Mapping[int, int]) -> list[dict[str, Any]]:
    """Groups as a checkpoint holds them: with their method, plain numbers, and names of functions."""
    return [
        {
            **{name: _portable(value) for name, value in hyperparameters.kept(group).items()},
            "params": [numbers[id(param)] for param in group["params"]],
            "method": method_of(type(optimizer)),
        }
        for group in optimizer.param_groups
    ]


def _portable(value: Any) -> Any:
    """A group's entry as a checkpoint holds it: a function by its qualified name."""
    if callable(value) and not isinstance(value, Tensor):
        named = value if hasattr(value, "__qualname__") else type(value)
        return f"{named.__module__}.{named.__qualname__}"
    return value


# In


def _checked_groups(
    optimizer: GroupedOptimizer, saved_groups: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[tuple[Any, Layout]]]:
    """A checkpoint's groups as this optimizer is to have them, and (number there, layout) of each parameter.

    Raises:
        TypeError, ValueError: other numbers of groups or parameters, another method's groups, hyperparameters that
            make no sense.
    """
    if len(saved_groups) != len(optimizer.param_groups):
        raise ValueError(
            f"the checkpoint has a different number of parameter groups, {len(saved_groups)}: must have "
            f"{len(optimizer.param_groups)}"
        )
    groups, numbered = [], []
    for index, (saved, own) in enumerate(zip(saved_groups, optimizer.param_groups, strict=True)):
        if not isinstance(saved, Mapping) or "params" not in saved:
            raise ValueError(f"group {index} of the checkpoint has no 'params': must be as state_dict() gives it")
        if len(saved["params"]) != len(own["params"]):
            raise ValueError(
                f"group {index} of the checkpoint has {len(saved['params'])} parameters, which does not match the "
                f"size of the optimizer's, {len(own['params'])}"
            )
        group = _checked_group(optimizer, index, saved, own)
        groups.append(group)
        for i, (number, param) in enumerate(zip(saved["params"], own["params"], strict=True)):
            numbered.append((number, layout_of(optimizer, label(own, index, i), param, group)))
    norm = "max_grad_norm"
    max_grad_norm_of([{norm: checks.max_grad_norm(norm, group[norm])} for group in groups])  # or no step could be taken
    return groups, numbered


def _checked_group(
    optimizer: GroupedOptimizer, index: int, saved: Mapping[str, Any], own: dict[str, Any]
) -> dict[str, Any]:
    """A checkpoint's group as this optimizer is to have it, with the parameters of its own."""
    _check_method(optimizer, index, saved)
    saved = names_today(saved, warns=False)
    kept = _constructors_of(own)
    group = {
        name: value if callable(value) else _own_value(f"{name} of group {index} of the checkpoint", value)
        for name, value in saved.items()
        if name not in ("params", "method", *kept)
    }
    group.update(kept)
    complete(group, optimizer.defaults)
    if "param_names" in own:
        group.setdefault("param_names", own["param_names"])
    optimizer.adapt_loaded_group(group, saved)
    for name in (*optimizer.HYPERPARAMETERS, "lr_scale"):
        if _is_function_name(saved.get(name)) and name not in kept:
            raise ValueError(
                f"{name}={saved[name]!r} of group {index} of the checkpoint is a function, which no checkpoint "
                f"holds: construct the optimizer with {name}= that function, and then load"
            )
    for name, value in kept.items():
        if callable(value) and name in saved and not _names(saved[name], value):
            warn_user(
                f"{name} of group {index} of the checkpoint was {checks.shown(_portable(saved[name]))}: it is "
                f"{_portable(value)} here, and stays so"
            )
    with hyperparameters.of_group(index, "of the checkpoint"):
        if "beta" in group:  # which the first step would refuse
            hyperparameters.check_beta_names(type(optimizer), group, folded=True)
        lr, on_device = group["lr"], optimizer.runtime.hyperparameters.on_device
        if not (on_device and hyperparameters.stays_on_device("lr", lr)):
            lr = max(hyperparameters.learning_rate(lr, group, optimizer.defaults), 0.0)
        hyperparameters.checked(type(optimizer), {**group, "lr": lr}, on_device)
    group["params"] = own["params"]
    return group


def _own_value(label: str, value: Any) -> Any:
    """A copy of a group's entry.

    Raises:
        TypeError: one that torch cannot copy, a sparse tensor for example.
    """
    try:
        return copy.deepcopy(value)
    except RuntimeError as error:
        if isinstance(error, RecursionError) or is_lack_of_memory(error):
            raise
        raise TypeError(f"{label} is or holds what cannot be copied: {error}") from error


def _check_method(optimizer: GroupedOptimizer, index: int, saved: Mapping[str, Any]) -> None:
    """Raises where a group of a checkpoint is of another method."""
    ours, method = method_of(type(optimizer)), saved.get("method")
    if method is not None:
        if method != ours:
            theirs = method if isinstance(method, str) else checks.shown(method)
            own = type(optimizer).__name__
            raise ValueError(
                f"group {index} of the checkpoint is of the method {theirs}: must be of {ours}"
                f"{'' if own == ours else f', as {own} is'}. from_optimizer makes {own} of an optimizer of another "
                "method: its groups go over, its state begins anew"
            )
        return
    known = {*optimizer.defaults, *optimizer.HYPERPARAMETERS, "beta"}
    foreign = sorted(name for name in saved if name in DISTINCTIVE and name not in known)
    if foreign:
        raise ValueError(
            f"group {index} of the checkpoint has the hyperparameter {foreign[0]!r}, which {ours} has not: it is "
            "of another method, and from_optimizer puts one in the place of another"
        )
    # Torch's optimizers have "foreach" in their groups, and of those with betas alone its Adams have "amsgrad".
    is_other = "foreach" in saved and "amsgrad" in optimizer.HYPERPARAMETERS and "amsgrad" not in saved
    if ours not in WITHOUT_METHOD or is_other:
        raise ValueError(
            f"group {index} of the checkpoint does not say that it is of the method {ours}, and has nothing that only "
            f"{ours} has; if it is, add 'method': {ours!r} to it"
        )


def _constructors_of(group: dict[str, Any]) -> dict[str, Any]:
    """What no checkpoint changes. Functions are among it, which a checkpoint cannot hold."""
    return {name: value for name, value in group.items() if name in CONSTRUCTORS or callable(value)}


def _is_function_name(value: Any) -> bool:
    """Whether this stands for a function in a checkpoint. No name of a choice has a dot in it."""
    return isinstance(value, str) and "." in value


def _names(saved: Any, function: Any) -> bool:
    """Whether this stands for the function in a checkpoint. The program that is run calls its module __main__."""
    theirs, ours = _portable(saved), _portable(function)
    if not isinstance(theirs, str):
        return False
    programs = [name.removeprefix("__main__") for name in (theirs, ours) if name.startswith("__main__.")]
    return theirs == ours or any(f".{theirs}".endswith(name) and f".{ours}".endswith(name) for name in programs)


def _is_empty(saved: Any) -> bool:
    """Whether a checkpoint has no state of a parameter. A flattened one gives an empty dict for each entry."""
    return isinstance(saved, Mapping) and all(isinstance(value, dict) and not value for value in saved.values())


def _put_in_place(
    optimizer: GroupedOptimizer,
    groups: list[dict[str, Any]],
    numbered: list[tuple[Any, Layout]],
    entries: Callable[[Any], Mapping[str, Any] | None],
    others: Mapping[Any, Any],
) -> None:
    """Makes the state that a checkpoint holds, warns of what changes, and then takes it and the groups at once.

    Args:
        optimizer: that takes them.
        groups: the new ones.
        numbered: (number in the checkpoint, layout) of each parameter.
        entries: a parameter's state by its number in the checkpoint, or nothing.
        others: state of no parameter.
    """
    state, changes = _adopted(groups, numbered, entries, others)
    if changes:
        warn_user(  # which raises where warnings are errors
            "the loaded state has been converted to this optimizer's storage forms (" + "; ".join(changes) + "): "
            "training goes on, but not bit for bit as it would have"
        )
    for group in groups:
        warn_of_variance(optimizer, group)
    runtime = optimizer.runtime
    runtime.lock.refuse_nested()
    with runtime.lock.held:
        # The optimizer may be a trainer's wrapper: what it wraps takes the state, and then the wrapper's own copies of
        # the attributes are renewed.
        owner: Any = runtime.owner() or optimizer
        owner.__setstate__({"state": state, "param_groups": groups})
        if owner is not optimizer:
            attributes = vars(optimizer)
            attributes.update({name: vars(owner)[name] for name in ("state", "param_groups") if name in attributes})


def _adopted(
    groups: list[dict[str, Any]],
    numbered: list[tuple[Any, Layout]],
    entries: Callable[[Any], Mapping[str, Any] | None],
    others: Mapping[Any, Any],
) -> tuple[defaultdict[Any, Any], list[str]]:
    """The state of all parameters as it is to be kept, and what changes on the way."""
    changes: dict[str, None] = {}
    state: defaultdict[Any, Any] = defaultdict(dict, others)
    seeds = _seeds(groups)
    enabled = torch.is_grad_enabled()
    try:
        # State outlives this call, so it must not be made of inference tensors.
        with outside_inference_mode(), torch.no_grad():
            for param_id, (number, layout) in enumerate(numbered):
                found = entries(number)
                if found is None or _is_empty(found):
                    continue
                saved = realized(layout, found)
                check(layout, saved)
                state[layout.key], changed = adopt(layout, saved, seeds[param_id], param_id)
                changes.update(dict.fromkeys(changed))
    finally:
        # As in a step.
        torch._C._set_grad_enabled(enabled)
    return state, list(changes)
