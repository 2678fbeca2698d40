"""What a parameter group holds, and what follows from it: names in errors, layouts of state, what few bits cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

from ..core import checks, hyperparameters, options, shards
from ..core.formats import effective_param_storage
from ..core.renamed import warn_user
from ..core.rule import Group, HasRule, rule_of
from ..engine.runtime import Runtime
from ..state.checkpoint import Layout


class GroupedOptimizer(hyperparameters.Declaring, HasRule, Protocol):
    """An optimizer of this package, as far as steps and checkpoints need it."""

    param_groups: list[dict[str, Any]]
    state: Any
    defaults: dict[str, Any]
    runtime: Runtime
    FOLLOWS_STEPS: ClassVar[bool]

    def adapt_loaded_group(self, group: dict[str, Any], saved: Mapping[str, Any]) -> None: ...
    def of_this_step(self, group: dict[str, Any]) -> dict[str, Any]: ...
    def __setstate__(self, state: dict[str, Any]) -> None: ...


def given_name(group: Group, index: int) -> str | None:
    """The name of a group's parameter, where the optimizer was told it."""
    names = group.get("param_names")
    # Parameters may have been appended without a name.
    return names[index] if isinstance(names, (list, tuple)) and index < len(names) else None


def label(group: Group, group_index: int, index: int) -> str:
    """What errors call a parameter."""
    name = given_name(group, index)
    return f"parameter {index} of group {group_index}" if name is None else f"parameter {checks.shown(name)}"


def max_grad_norm_of(groups: Sequence[Group]) -> float | None:
    """The largest norm of all gradients.

    Raises:
        ValueError: groups do not agree on it.
    """
    norms = {group["max_grad_norm"]: None for group in groups}
    if len(norms) > 1:
        raise ValueError(
            f"max_grad_norm is {' and '.join(map(str, norms))} in groups of one optimizer: must be the same in all, "
            "since it bounds the norm of all gradients together"
        )
    return next(iter(norms), None)


def complete(group: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Gives a group of an earlier version, or of another optimizer, the hyperparameters that it lacks."""
    hyperparameters.fold(group, options.has_one_beta(defaults), warns=False)
    for name in options.LARGEST_RATES:
        if "initial_lr" in group:  # a scheduler's
            group.setdefault(name, group["initial_lr"])
    if group.get("lr_scale", 1.0) is None:  # as it was before schedulers had a number there
        group["lr_scale"] = 1.0
    for name, value in defaults.items():
        if name != "differentiable":  # which torch adds to the defaults, and to them alone
            group.setdefault(name, value)


def keep_first_of_each(group: dict[str, Any]) -> None:
    """Removes repeated parameters, which torch warns about, from a group, with their names."""
    first: dict[int, int] = {}
    for i, param in enumerate(group["params"]):
        first.setdefault(id(param), i)
    for name in ("params", "param_names"):
        if name in group:
            group[name] = [group[name][i] for i in first.values()]


def layout_of(optimizer: GroupedOptimizer, name: str, param: Tensor, group: Group) -> Layout:
    """How the state of a parameter of this group is stored; ``name`` is what errors call it.

    Raises:
        TypeError: a DTensor that ranks do not have in parts.
    """
    rule = rule_of(type(optimizer), group)
    try:
        sharding = shards.sharding_of(name, param)
    except TypeError:
        # One that never gets a gradient may be of any kind.
        if param.requires_grad:
            raise
        sharding = None
    driver = optimizer.runtime.driver
    local = shards.local(param) if driver is None else driver.updated(param)
    return Layout(
        name,
        local,
        dict(zip(rule.moments, rule.forms(group), strict=True)),
        effective_param_storage(group["param_storage"], param.dtype),
        rule.threshold_state,
        bound=rule.bound,
        codes_bound=rule.codes_bound if rule.bound is None else rule.bound,
        uses_step=rule.uses_step,
        starts_as_param=rule.starts_as_param,
        has_modes=rule.keeps_sums,
        owner=None if local is param else param,
        sharding=sharding,
    )


def layouts_of(optimizer: GroupedOptimizer) -> list[tuple[int, Layout]]:
    """(number in a state dict, layout) of each parameter."""
    layouts: list[tuple[int, Layout]] = []
    for index, group in enumerate(optimizer.param_groups):
        hyperparameters.fold(group, options.has_one_beta(optimizer.defaults))
        for i, param in enumerate(group["params"]):
            layouts.append((len(layouts), layout_of(optimizer, label(group, index, i), param, group)))
    return layouts


def warn_of_variance(optimizer: GroupedOptimizer, group: Group) -> None:
    """Warns once if a group's beta exceeds the limit of its few-bit momentum: the variance that rounding adds grows."""
    rule = rule_of(type(optimizer), group)
    form = rule.forms(group)[0] if rule.moments else None
    limit = None if form is None else form.largest_beta
    if limit is not None and group["betas"][0] > limit and not optimizer.runtime.has_warned:
        assert form is not None
        warn_user(
            f"{form.kind} momentum with beta = {group['betas'][0]}: the longer a momentum remembers, the more "
            f"variance rounding adds to it; beyond {limit} take more bits, or a smaller beta"
        )
        optimizer.runtime.has_warned = True


def posing_as(optimizer: GroupedOptimizer, **attributes: Any) -> GroupedOptimizer:
    """An object that a step takes for the optimizer, with other groups or state; all else it has in common."""
    twin: GroupedOptimizer = object.__new__(type(optimizer))
    vars(twin).update({**vars(optimizer), **attributes})
    return twin
