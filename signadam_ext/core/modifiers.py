"""What acts on any rule's step: how weight decay acts and how large it is, and a learning rate for each tensor.

Rules know nothing of it. The decay is a scalar of the group, and whether it is cautious a flag, by which kernels call
the rule at ``p = 0`` and add its step. A tensor's learning rate is the group's times a factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import checks
from .symbols import at_least, is_nonzero, number

Group = Mapping[str, Any]

#: How weight decay acts: before the step, as ``p *= decay``; in the gradient, as ``g += weight_decay * p``; or before
#: the step where the step does not lead away from 0 [CW].
WEIGHT_DECAY_KINDS = ("decoupled", "coupled", "cautious")
#: What is taken from 1 to make ``decay``.
WEIGHT_DECAY_SCALES: dict[str, Callable[[Any, Any, Group], Any]] = {
    "lr": lambda lr, weight_decay, group: lr * weight_decay,
    "corrected": lambda lr, weight_decay, group: lr * lr / at_least(number(group["largest_lr"]), _TINY) * weight_decay,
    # A learning rate of 0 moves nothing: torch.distributed.checkpoint makes state by a step with it.
    "independent": lambda lr, weight_decay, group: weight_decay * is_nonzero(lr),
    "fully_decoupled": lambda lr, weight_decay, group: weight_decay * lr / at_least(number(group["base_lr"]), _TINY),
}
_TINY = 2.0**-1000  # so that a learning rate of 0, which was never larger, decays by 0

#: The modifiers of a group that asks for none.
DEFAULTS: dict[str, Any] = {"weight_decay_kind": None, "weight_decay_scale": "lr", "lr_scale": 1.0, "caution": None}
#: Steps only where they go against the gradient [CO], larger in exchange: by the share of this step, or of the last.
CAUTIONS = ("exact", "delayed")


def weight_decay_kind(group: Group) -> str:
    """One of :data:`WEIGHT_DECAY_KINDS`: what ``weight_decay_kind`` says, otherwise ``decoupled_weight_decay``."""
    kind: str | None = group.get("weight_decay_kind")
    return kind or ("decoupled" if group["decoupled_weight_decay"] else "coupled")


#: Of most steps.
_NO_DECAY = {"weight_decay": 0.0, "decay": 1.0, "shrinking": 0.0, "coupled": 0.0, "cautious_decay": 0.0}


def decay_scalars(group: Group) -> Mapping[str, Any]:
    """The scalars of weight decay. Without any, ``decay`` is 1, which changes no bit of a parameter."""
    weight_decay = group["weight_decay"]
    if type(weight_decay) is float and weight_decay == 0:
        return _NO_DECAY
    lr, weight_decay = number(group["lr"]), number(weight_decay)
    kind = weight_decay_kind(group)
    taken = WEIGHT_DECAY_SCALES[group.get("weight_decay_scale", "lr")](lr, weight_decay, group)
    return {
        "weight_decay": weight_decay,
        "decay": 1.0 if kind == "coupled" else 1 - taken,
        "shrinking": 0.0 if kind == "coupled" else taken,
        "coupled": is_nonzero(weight_decay) if kind == "coupled" else 0.0,
        "cautious_decay": is_nonzero(weight_decay) if kind == "cautious" else 0.0,
    }


def scale_of(group: Group) -> str | None:
    """Which number of a tensor's multiplies its steps: one of :data:`CAUTIONS`, "rms", or None."""
    caution: str | None = group.get("caution")
    if caution is not None:
        return caution
    scale = group.get("lr_scale")
    return "rms" if isinstance(scale, str) and scale == "rms" else None


def check(group: Group, rule: Any) -> None:
    """Raises on modifiers that make no sense together. Each by itself has been checked.

    Args:
        group: hyperparameters by name.
        rule: the group's, a :class:`signadam_ext.core.rule.Rule`, as it is without modifiers.

    Raises:
        ValueError: a scale of a decay that has none, or that wants what is not known; caution or a scale where the rule
            has no step of its own, or a number of each tensor's already.
    """
    _check_scale(group, rule)
    kind, scale = weight_decay_kind(group), group["weight_decay_scale"]
    if scale != "lr" and kind == "coupled":
        raise ValueError(
            f"weight_decay_scale={scale!r} with coupled weight decay, which is part of the gradient and has no scale: "
            "take weight_decay_kind='decoupled' or 'cautious'"
        )
    if scale == "fully_decoupled" and not _is_tensor(group["base_lr"]) and group["base_lr"] == 0:
        raise ValueError(
            "weight_decay_scale='fully_decoupled' of a group whose lr began at 0: set its base_lr to the learning rate "
            "that stands for 1"
        )
    if scale == "corrected" and _is_tensor(group["lr"]):
        raise ValueError(
            "weight_decay_scale='corrected' with an lr on a device, where nobody sees whether it is the largest so "
            "far: keep lr on the host, or take 'fully_decoupled'"
        )
    if kind == "cautious" and rule.reads_param:
        raise ValueError(
            "weight_decay_kind='cautious' with a rule whose step depends on the parameter: take 'decoupled'"
        )


def _check_scale(group: Group, rule: Any) -> None:
    if (scale := scale_of(group)) is None:
        return
    shown = f"caution={scale!r}" if scale in CAUTIONS else f"lr_scale={scale!r}"
    if group["caution"] is not None and group["lr_scale"] == "rms":
        raise ValueError(f"{shown} with lr_scale='rms': a tensor has one such number: take one of them")
    if scale in CAUTIONS and rule.follows_gradient:
        raise ValueError(f"{shown} with a rule whose step has the gradient's sign: it cannot disagree with it")
    if rule.threshold_pass != "NONE" or rule.confidence is not None:
        if rule.update_scale == "norm":
            other = "max_norm: take max_norm=None"
        else:
            whose = "a function for confidence" if rule.confidence is not None else "a threshold of each tensor's own"
            other = f"{whose}: take confidence='fixed'"
        raise ValueError(f"{shown} with {other}")
    if rule.reads_param:
        raise ValueError(f"{shown} with a rule whose step depends on the parameter")


def _is_tensor(value: Any) -> bool:
    return not isinstance(value, (int, float))


def lr_scale(name: str, value: Any) -> Any:
    """ "shape", "rms", a function of a parameter's name and shape, or a number, which no step multiplies with.

    timm keeps a number of each group under this name, and its schedulers multiply the learning rate with it.

    Raises:
        ValueError: something else.
    """
    value = checks.plain(value)
    if value is None:  # as groups had it before
        return 1.0
    if callable(value) and not isinstance(value, type):
        return value
    if isinstance(value, (int, float)):
        return checks.number(name, value, 0.0)
    if not isinstance(value, str):
        raise ValueError(
            f"{name}={checks.shown(value)}: must be 'shape', 'rms', a function of a name and a shape, or a number"
        )
    return checks.one_of(name, value, (*LR_SCALES, "rms"))


def constructed_lr_scale(value: Any) -> Any:
    """The ``lr_scale`` of a constructor, with 1 for None.

    Raises:
        ValueError: a number other than 1, which would do nothing.
    """
    value = 1.0 if value is None else checks.plain(value)
    if isinstance(value, (int, float)) and value != 1:
        raise ValueError(
            f"lr_scale={value!r}: a number is an entry of a group, which schedulers like timm's multiply lr with; for "
            "all groups, multiply lr itself"
        )
    return value


def check_group_scale(group: Group, defaults: Group) -> None:
    """Raises on a number that a group would have in the place of the optimizer's ``lr_scale``.

    Args:
        group: that is added, as it was given.
        defaults: the optimizer's.

    Raises:
        ValueError: a number other than 1, which no step multiplies with, where steps have a scale.
    """
    scale, others = checks.plain(group.get("lr_scale", 1.0)), defaults["lr_scale"]
    if isinstance(scale, (int, float)) and scale != 1 and not isinstance(others, (int, float)):
        raise ValueError(
            f"lr_scale={scale!r} in a group, where lr_scale={others!r} is the optimizer's: a number in a group is left "
            f"to schedulers, as timm's layer decay has it, and would take the place of {others!r}; multiply the "
            "group's lr instead"
        )


def scale_in_steps(group: Group) -> Any:
    """What steps have of the ``lr_scale`` of a group that has been read: None for a number."""
    scale = group["lr_scale"]
    return None if isinstance(scale, (int, float)) else scale


#: Factors of the learning rate by a parameter's shape.
LR_SCALES: dict[str, Callable[[Sequence[int]], float]] = {
    "shape": lambda shape: 2.0 / (shape[0] + math.prod(shape[1:])) if len(shape) > 1 and 0 not in shape else 1.0,
}


def lr_factor(scale: Any, label: str, name: str | None, shape: Sequence[int]) -> float:
    """What a parameter's learning rate is multiplied by.

    Args:
        scale: a group's ``lr_scale``.
        label: what errors call the parameter.
        name: the parameter's, or None where the optimizer was not told.
        shape: of the whole parameter.

    Raises:
        TypeError, ValueError: a function that returns no finite number of at least 0.
    """
    if scale is None or scale == "rms":  # which kernels make
        return 1.0
    if isinstance(scale, str):
        return LR_SCALES[scale](shape)
    try:
        found = scale(name, tuple(shape))
    except (AttributeError, KeyError, TypeError) as error:
        if name is not None:
            raise
        raise TypeError(
            f"lr_scale of {label} raises {type(error).__name__} ({error}) of the name None and the shape "
            f"{tuple(shape)}: parameters have names where the optimizer is made of model.named_parameters()"
        ) from error
    return float(checks.number(f"lr_scale of {label}", found, 0.0))


def with_factor(group: Group, factor: float) -> Group:
    """The group as its rule sees it for a parameter: its learning rate times a factor, which decay does not see."""
    return group if factor == 1.0 else {**group, "lr_factor": factor}
