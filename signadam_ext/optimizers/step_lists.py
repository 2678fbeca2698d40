"""The functional forms' common part: one step over lists of tensors, with no optimizer behind them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import checks, memory_order, tensors
from ..core.hyperparameters import check_beta_names, checked
from ..core.options import DEFAULTS, LARGEST_RATES
from ..core.rule import Rule, rule_of
from ..engine.participants import Item
from ..engine.plan import Plan
from ..state.schema import Fitted
from .base import SignOptimizer

#: Moments in fp32 and parameters rounded to nearest: what few bits need beside them is the optimizers' affair.
#: So is what looks at all gradients before.
STORAGE = {"state_dtype": "fp32", "param_storage": "nearest", "seed": 0, "max_grad_norm": None}
#: And what depends on the learning rates of other steps, or on a parameter's name.
RATES = {"weight_decay_scale": "lr", "lr_scale": 1.0, "caution": None}
COMMON = {
    name: DEFAULTS[name]
    for name in ("weight_decay", "decoupled_weight_decay", "weight_decay_kind", "maximize", "backend")
}


@torch.no_grad()
def step_lists(
    optimizer: type[SignOptimizer],
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    moments: Mapping[str, Sequence[Tensor]],
    kept: Mapping[str, Any] | None = None,
    /,
    *,
    threshold_states: Sequence[Tensor] | None = None,
    state_steps: Sequence[Tensor] | None = None,
    grad_variances: Sequence[Tensor | None] | None = None,
    **hyperparameters: Any,
) -> None:
    """One step of ``optimizer``'s rule, in place on ``params`` and the state lists.

    Args:
        optimizer: the class whose rule and checks apply.
        params: parameters, fp32, bf16 or fp16.
        grads: their gradients; a parameter whose gradient is None is left alone.
        moments: by name, fp32 tensors of the parameters' shapes and strides.
        kept: what an optimizer's group keeps beside the hyperparameters, where a rule reads it; None as if left out.
        threshold_states: 0-dim float64 on the parameters' devices, for a threshold that is not fixed.
        state_steps: 0-dim float64 or fp32 on the CPU, steps taken so far; counted up. fp32 holds up to 2^24 of them.
        grad_variances: the variances of the gradients, for rules that read them.
        hyperparameters: the group's, each by name.

    Raises:
        TypeError, ValueError: lists of unequal length, wrong tensors or hyperparameters; nothing has been written then.
    """
    group = _group(optimizer, params, hyperparameters, kept or {})
    rule = rule_of(optimizer, group)
    lists: dict[str, Sequence[Any]] = {"grads": grads, **{f"{name}s": moments[name] for name in rule.moments}}
    if rule.threshold_state is not None:
        lists[f"{rule.threshold_state}s"] = threshold_states or ()
    if rule.uses_step or state_steps is not None:
        lists["state_steps"] = state_steps or ()
    if rule.reads_variance:
        lists["grad_variances"] = grad_variances or ()
    for name, values in lists.items():
        if len(values) != len(params):
            raise ValueError(
                f"{name} has {len(values)} entries: must have one for each of the {len(params)} parameters"
            )
    # A parameter without a gradient may have been offloaded: nobody looks at it.
    items = [_item(rule, group, i, params[i], lists) for i, grad in enumerate(grads) if grad is not None]
    plan = Plan(items, [grad for grad in grads if grad is not None])
    plan.read([group], None)
    plan.run([group])


def _group(
    optimizer: type[SignOptimizer], params: Sequence[Tensor], given: Mapping[str, Any], kept: Mapping[str, Any]
) -> dict[str, Any]:
    """The parameter group that these hyperparameters make, checked.

    Raises:
        TypeError, ValueError: a hyperparameter that the rule has not, or that makes no sense.
    """
    hyperparameters = dict(given)
    for name in checks.TORCH_OPTIONS:
        checks.torch_option(name, hyperparameters.pop(name, None))
    check_beta_names(optimizer, hyperparameters)
    if "beta" in hyperparameters:
        hyperparameters["betas"] = (hyperparameters.pop("beta"),)
    for name in hyperparameters:
        if name in STORAGE or name in RATES:
            raise TypeError(
                f"{name} is an optimizer's alone: give it to {optimizer.__name__}, or to functional.FunctionalOptimizer"
            )
        if name not in COMMON and name not in optimizer.HYPERPARAMETERS:
            known = (*COMMON, *optimizer.HYPERPARAMETERS)
            near = difflib.get_close_matches(name, known, n=1)
            raise TypeError(f"unknown hyperparameter {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    rates = {**RATES, **dict.fromkeys(LARGEST_RATES, hyperparameters.get("lr"))}
    rates.update((name, value) for name, value in kept.items() if value is not None)
    return checked(optimizer, {**COMMON, **STORAGE, **rates, **hyperparameters, "params": list(params)})


def _item(rule: Rule, group: dict[str, Any], i: int, param: Tensor, lists: Mapping[str, Sequence[Any]]) -> Item:
    """A parameter with its entries of the lists, as a plan takes it.

    Raises:
        TypeError, ValueError: a tensor that cannot be updated in place.
    """
    label = f"params[{i}]"
    tensors.strided(label, param)
    moments = tuple(lists[f"{name}s"][i] for name in rule.moments)
    for name, moment in zip(rule.moments, moments, strict=True):
        _check_layout(label, name, moment, param)
    threshold_state = step = None
    if rule.threshold_state is not None:
        name = f"{rule.threshold_state}s"
        threshold_state = lists[name][i]
        _check_scalar(f"{name}[{i}]", threshold_state, torch.float64, param.device)
    if "state_steps" in lists:
        step = lists["state_steps"][i]
        _check_step(f"state_steps[{i}]", step)
    fitted = Fitted(moments, None, threshold_state, step, {}, ())
    return Item(
        label,
        param,
        0,
        rule,
        group["backend"],
        has_state=False,
        fit=lambda: fitted,
        forms=rule.forms(group),
        variance=lists["grad_variances"][i] if "grad_variances" in lists else None,
    )


def _refuse_negative(label: str, value: Tensor) -> None:
    if value.is_neg():
        raise TypeError(f"{label} is the negative of what its memory holds (is_neg()): use a .resolve_neg() of it")


def _check_scalar(label: str, value: Any, dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(value, Tensor) or value.dtype != dtype or value.dim() > 0 or value.device != device:
        raise TypeError(
            f"{label} is {checks.shown(value)}: must be a 0-dim {str(dtype).removeprefix('torch.')} tensor on {device}"
        )
    _refuse_negative(label, value)
    tensors.allocated(label, value)


def _check_step(label: str, value: Any) -> None:
    """Raises unless ``value`` can be counted up in place."""
    dtype = value.dtype if isinstance(value, Tensor) and value.dtype == torch.float32 else torch.float64
    _check_scalar(label, value, dtype, torch.device("cpu"))
    if value.dtype == torch.float32 and value.item() >= 1 << 24:
        raise ValueError(f"{label} is {value.item():.0f}: fp32 counts to 2^24 only; use a float64 tensor")
    checks.steps_taken(label, value)


def _check_layout(label: str, name: str, moment: Tensor, param: Tensor) -> None:
    tensors.moment(label, name, moment, param)
    _refuse_negative(f"{name} of {label}", moment)
    strides = memory_order.strides_of(param)
    if not memory_order.same_strides(moment, strides):
        raise ValueError(
            f"{name} of {label} has strides {moment.stride()}: must be {strides}, the parameter's memory order"
        )
