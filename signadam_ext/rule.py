"""What a rule is to the Python side: its name, its state, and the scalars its kernels take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Group = Mapping[str, Any]
Scalars = dict[str, float]

#: How a gated rule obtains its threshold; the names of ``signadam_ext._C.Statistics``.
#: NONE: a scalar. GATHER: last step's deviation, this step's is summed in the same pass. ONLY: this step's, in a
#: launch of its own before the update.
STATISTICS = ("NONE", "GATHER", "ONLY")


@dataclass(frozen=True)
class Rule:
    """One update rule, under the name its functor, its Triton twin and its reference function share.

    Attributes:
        name: name of the rule on every backend.
        moments: state tensors, fp32, of the parameter's shape, in the order of the kernels' ``m`` and ``v``.
        scalars: the rule's own scalars for a parameter group at step ``t``, as unrounded doubles.
        uses_step: whether ``scalars`` depends on ``t``.
        statistics: one of :data:`STATISTICS`.
    """

    name: str
    moments: tuple[str, ...]
    scalars: Callable[[Group, int], Scalars]
    uses_step: bool = False
    statistics: str = "NONE"

    def row(self, group: Group, t: int) -> Scalars:
        """All scalars of a group at step ``t``: those every rule takes, and the rule's own."""
        return {**common_scalars(group), **self.scalars(group, t)}


def common_scalars(group: Group) -> Scalars:
    """Learning rate, direction and weight decay. Without decay ``decay`` is 1, which changes no bit of a parameter."""
    lr = float(group["lr"])
    weight_decay = float(group["weight_decay"])
    decoupled = group["decoupled_weight_decay"]
    return {
        "lr": lr,
        "weight_decay": weight_decay,
        "decay": 1 - lr * weight_decay if decoupled and weight_decay != 0 else 1.0,
        "coupled": float(weight_decay != 0 and not decoupled),
        "maximize": float(bool(group["maximize"])),
    }


def power(base: float, exponent: int) -> float:
    """``base ** exponent`` by repeated squaring in double: the same bits on every platform, unlike libm's ``pow``."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result
