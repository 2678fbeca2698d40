"""From groups to a step: what a plan is made of, when one still holds, and how it is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..core.dynamo import untraced
from ..core.formats import outside_inference_mode
from ..core.hyperparameters import of_group
from ..core.modifiers import lr_factor, scale_in_steps
from ..core.rule import method_of, rule_of
from ..engine.decision import Conditions
from ..engine.participants import Item
from ..engine.plan import Kept, Plan
from ..state.checkpoint import Layout
from ..state.schema import Fitted, entry_names, fit
from . import ranks
from .groups import GroupedOptimizer, given_name, label, layout_of, max_grad_norm_of
from .simulated import is_simulation, simulate

#: Why a parameter by itself cannot be stepped.
NO_NORM = (
    "max_grad_norm while gradients are released: their norm is known when the last of them is complete, and by then "
    "the others are applied and gone; set it to None, or do not release gradients"
)
#: How often a step is planned where another thread gives or drops gradients meanwhile.
PLANNING_ATTEMPTS = 3


@untraced
def step_all(optimizer: GroupedOptimizer) -> None:
    """Takes the step of every parameter with a gradient."""
    runtime = optimizer.runtime
    runtime.lock.refuse_nested()
    enabled = torch.is_grad_enabled()
    try:
        with runtime.lock.held:
            groups = _read_groups(optimizer)
            keys, max_norm = _settings(optimizer, groups)
            conditions = _conditions(optimizer, groups, max_norm)
            runtime.begins_on_device |= conditions is not None
            key = [runtime.begins_on_device, *keys]
            plan = runtime.plan
            if plan is None or key != runtime.plan_key or not plan.read(optimizer.param_groups, optimizer.state):
                # The old one lets go of what it has read before the new one takes it.
                runtime.plan = None
                if is_simulation(groups):
                    simulate(optimizer, groups)
                    return
                plan = make_plan(optimizer, groups)
            kept = _kept(optimizer, groups)
            decision = plan.run(groups, runtime.lock, conditions, kept)
            runtime.plan, runtime.plan_key = plan, key
            runtime.last_grad_norm = decision.norm
            if plan.device_steps is not None:
                runtime.skips_there = plan.device_steps.counting_on(runtime.skips_there)
                if conditions is not None and conditions.max_norm is not None:
                    runtime.last_grad_norm = plan.device_steps.norm
            if decision.skips:
                runtime.skipped_steps += 1
                for own, entries in kept:  # as where the device skips, and the host does not know
                    own["largest_lr"] = entries.get("largest_lr", own["largest_lr"])
                if plan.is_first:
                    runtime.plan = None
            else:
                runtime.round += 1
                plan.round = runtime.round
    except BaseException:
        # A signal handler may have raised just before the plan lets go of what it has read.
        if runtime.plan is not None and runtime.plan.owns:
            runtime.plan = None
        raise
    finally:
        # Where a signal handler raises as torch.no_grad is left, gradients would stay disabled.
        torch._C._set_grad_enabled(enabled)


def step_parameter(optimizer: GroupedOptimizer, param: Tensor) -> bool:
    """Takes the step of one parameter, as if no other had a gradient; False where no group has it.

    The caller holds the lock.
    """
    runtime = optimizer.runtime
    if parameter_of_id(optimizer, id(param)) is not param:
        return False
    index, i = runtime.places[id(param)]
    group = read_group(optimizer, index)
    if group["max_grad_norm"] is not None:
        raise RuntimeError(NO_NORM)
    param_id = i + sum(len(other["params"]) for other in optimizer.param_groups[:index])
    key = (_plan_key(optimizer, group), param_id)
    # To its plan the parameter is the only one of the only group, so that reading takes no look at the others.
    alone = [{**group, "params": [param]}]
    own = optimizer.state.get(param)
    plan, plan_key = runtime.plans_alone.get(id(param), (None, None))
    try:
        if plan is None or key != plan_key or not plan.read(alone, {} if own is None else {param: own}):
            runtime.plans_alone.pop(id(param), None)
            if is_simulation(alone):
                simulate(optimizer, alone)
                return True
            item = make_item(optimizer, label(group, index, i), param, group, 0, param_id, given_name(group, i))
            plan = _plan_of(optimizer, [item], alone)
        kept = [(optimizer.param_groups[index], group["after_step"])] if "after_step" in group else []
        plan.run(alone, runtime.lock, kept=kept)
    except BaseException:
        if plan is not None and plan.owns:  # as above
            runtime.plans_alone.pop(id(param), None)
        raise
    runtime.plans_alone[id(param)] = plan, key
    plan.round = runtime.round
    return True


def parameter_of_id(optimizer: GroupedOptimizer, key: int) -> Tensor | None:
    """The parameter of that id, if a group has it."""
    groups, places = optimizer.param_groups, optimizer.runtime.places
    for attempt in range(2):
        index, i = places.get(key, (0, -1))
        params = groups[index]["params"] if index < len(groups) else ()
        if 0 <= i < len(params) and id(params[i]) == key:
            return cast(Tensor, params[i])
        if attempt == 0:  # parameters may have moved
            places = optimizer.runtime.places = {
                id(param): (index, i) for index, group in enumerate(groups) for i, param in enumerate(group["params"])
            }
    return None


def _read_groups(optimizer: GroupedOptimizer) -> list[dict[str, Any]]:
    """The groups with the hyperparameters that hold for this step, checked, as Python numbers."""
    return [read_group(optimizer, index) for index in range(len(optimizer.param_groups))]


def read_group(optimizer: GroupedOptimizer, index: int) -> dict[str, Any]:
    """The same of one group.

    What the group is to keep of the step once that is taken is in its ``after_step``, where there is such a thing; a
    learning rate that is the largest so far, where decay is scaled by it.
    """
    own = optimizer.param_groups[index]
    group = optimizer.runtime.hyperparameters.read(index, own, optimizer.defaults)
    kept = {}
    if group["weight_decay_scale"] == "corrected" and group["lr"] > group["largest_lr"]:
        kept = {"largest_lr": group["lr"]}
        group = {**group, **kept}
    if optimizer.FOLLOWS_STEPS:
        with of_group(index):
            group = optimizer.of_this_step(group)
    return {**group, "after_step": {**group.get("after_step", {}), **kept}} if kept else group


def _kept(optimizer: GroupedOptimizer, groups: Sequence[dict[str, Any]]) -> list[Kept]:
    """What the optimizer's groups are to keep of the step that these were read for."""
    kept = []
    for own, group in zip(optimizer.param_groups, groups, strict=True):
        if "after_step" in group:
            kept.append((own, group["after_step"]))
    return kept


def refuse_sums(optimizer: GroupedOptimizer, how: str) -> None:
    """Raises where groups keep sums over the steps taken, and steps are not those of ``step()``.

    Raises:
        ValueError: says what takes the steps.
    """
    if any(rule_of(type(optimizer), group).keeps_sums for group in optimizer.param_groups):
        raise ValueError(
            f"{how} does not serve {method_of(type(optimizer))}: its groups keep sums over the steps that step() takes"
        )


def _settings(optimizer: GroupedOptimizer, groups: Sequence[dict[str, Any]]) -> tuple[Any, float | None]:
    """What a plan depends on, group by group, and the largest norm of all gradients.

    Raises:
        ValueError: groups do not agree on the norm.
    """
    runtime = optimizer.runtime
    stamp, keys, max_norm = runtime.settings
    now = runtime.hyperparameters.version, len(groups)
    if stamp != now:
        keys, max_norm = [_plan_key(optimizer, group) for group in groups], max_grad_norm_of(groups)
        runtime.settings = now, keys, max_norm
    return keys, max_norm


def _conditions(
    optimizer: GroupedOptimizer, groups: Sequence[dict[str, Any]], max_norm: float | None
) -> Conditions | None:
    """Under which the step is taken.

    Raises:
        RuntimeError: a loss that was scaled, for a rule that reads a variance, which was not scaled back.
    """
    own = vars(optimizer)
    scale, found_inf = own.get("grad_scale"), own.get("found_inf")
    if max_norm is None and scale is None and found_inf is None:
        return None
    if scale is not None and any(rule_of(type(optimizer), group).reads_variance for group in groups):
        raise RuntimeError(
            "grad_scale with a rule that reads param.grad_variance: the variance would have to be scaled back as well; "
            "unscale the gradients before the step"
        )
    return Conditions(max_norm, scale, found_inf)


def _plan_key(optimizer: GroupedOptimizer, group: dict[str, Any]) -> tuple[Any, ...]:
    """Values of a group that need a new plan when they change."""
    rule = rule_of(type(optimizer), group)
    return (
        rule,
        group["backend"],
        group.get("state_dtype"),
        group["param_storage"],
        group["seed"],
        scale_in_steps(group),
        group["max_grad_norm"] is not None,
    )


def make_plan(optimizer: GroupedOptimizer, groups: Sequence[dict[str, Any]]) -> Plan:
    """A plan for all parameters of these groups, as the optimizer's were read for this step.

    Raises:
        ValueError: one is listed twice, which no constructor lets through.
    """
    items: list[Item] = []
    listed: dict[int, str] = {}
    for index, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            name = label(group, index, i)
            if (other := listed.setdefault(id(param), name)) is not name:
                raise ValueError(f"{name} is {other} as well: list each parameter once")
            items.append(make_item(optimizer, name, param, group, index, len(items), given_name(group, i)))
    return _plan_of(optimizer, items, groups)


def _plan_of(optimizer: GroupedOptimizer, items: list[Item], groups: Sequence[dict[str, Any]]) -> Plan:
    """A plan that has read its first gradients."""
    runtime = optimizer.runtime
    if not runtime.has_compared:
        ranks.compare(optimizer, _read_groups(optimizer))
        runtime.has_compared = True
    # State outlives this step, so it must not be made of inference tensors.
    for _ in range(PLANNING_ATTEMPTS):
        with outside_inference_mode(), torch.no_grad():
            plan = Plan(items, state=optimizer.state, observes=runtime.observes, on_device=runtime.begins_on_device)
        if plan.read(groups, optimizer.state):
            runtime.coded.update(
                (id(items[entry.index].key), (entry.param.shape, tuple(x.data_ptr() for x in entry.moments)))
                for entry in plan.entries
                if any(form.packed for form in entry.forms)
            )
            return plan
    raise RuntimeError("gradients changed while the step was being planned; is another thread running backward?")


def make_item(
    optimizer: GroupedOptimizer,
    shown: str,
    param: Tensor,
    group: dict[str, Any],
    index: int,
    param_id: int,
    name: str | None = None,
) -> Item:
    """A parameter of this group as a plan takes it.

    Args:
        optimizer: whose it is.
        shown: what errors call it.
        param: itself.
        group: its group, as a step has read it.
        index: the group's.
        param_id: its number among all.
        name: its own, where the optimizer was told it.
    """
    layout = layout_of(optimizer, shown, param, group)
    own, scale = optimizer.state.get(param), scale_in_steps(group)
    return Item(
        shown,
        layout.param,
        index,
        rule_of(type(optimizer), group),
        group["backend"],
        has_state=bool(own),
        fit=lambda: _fitted(optimizer, layout, {} if own is None else own, group["seed"], param_id),
        forms=tuple(layout.moments.values()),
        name=name,
        own_state=own,
        state_names=entry_names(layout),
        param_storage=group["param_storage"],
        seed=group["seed"],
        param_id=param_id,
        shard=layout.shard,
        owner=layout.owner,
        sharding=layout.sharding,
        lr_factor=1.0 if scale is None else lr_factor(scale, shown, name, param.shape),
        scales_by_shape=scale is not None and scale != "rms",
        is_clipped=group["max_grad_norm"] is not None,
        # torch.distributed.checkpoint makes the state that it reads into by a step with a learning rate of 0.
        at_rest=not own and not isinstance(group["lr"], Tensor) and group["lr"] == 0,
    )


def _fitted(optimizer: GroupedOptimizer, layout: Layout, own: Mapping[str, Any], seed: int, param_id: int) -> Fitted:
    fitted = fit(layout, own, seed, param_id)
    shape, addresses = optimizer.runtime.coded.get(id(layout.key), (layout.param.shape, ()))
    if shape != layout.param.shape:
        for (name, form), moment in zip(layout.moments.items(), fitted.moments, strict=True):
            # What has just been made may lie where an old one was.
            if form.packed and moment is own.get(name) and moment.data_ptr() in addresses:
                raise ValueError(
                    f"state {name!r} of {layout.label} holds {form.kind} codes for the shape {tuple(shape)}, which "
                    f"the parameter had at the last step: it has {tuple(layout.param.shape)} now"
                )
    return fitted
