"""Whether a step is taken, and how many times gradients count in it: clipping by their norm, and a scaled loss.

Nothing of it is written into a gradient: the factor is one more scalar of the kernels that update.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends.bucket import Bucket
from ..backends.reference import rules
from ..backends.reference.backend import ReferenceLaunch
from ..core.memory_order import flat
from ..core.native import compiled as _C
from ..core.shards import Sharding
from .agreement import added_up, sharers_of

if TYPE_CHECKING:
    from .. import backends

#: Added to a norm before something is divided by it, as in ``torch.nn.utils.clip_grad_norm_``.
CLIP_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Conditions:
    """Under which a step is to be taken.

    Attributes:
        max_norm: the largest norm of all gradients, or None.
        scale: what the loss was multiplied with, a number or a tensor of one, or None.
        found_inf: a tensor of one, not 0 where a gradient is known not to be finite, or None.
    """

    max_norm: float | None = None
    scale: Any = None
    found_inf: Any = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of it.

    Attributes:
        skips: whether the step is left out.
        factor: how many times each gradient counts.
        norm: of all gradients of the unscaled loss, before clipping; None where nobody asked.
    """

    skips: bool = False
    factor: float = 1.0
    norm: float | None = None


def decide(
    conditions: Conditions,
    launches: Sequence[tuple[Bucket, backends.Launch]],
    grad: Callable[[int], Tensor],
    params: int,
    shardings: Mapping[int, Sharding],
) -> Decision:
    """Decides on a step whose tables have begun it, before anything is written.

    Args:
        conditions: under which it is taken.
        launches: the buckets that take part, with what updates them.
        grad: gives the tensor of a gradient, by the number of its parameter.
        params: how many parameters there are.
        shardings: how DTensors are sharded, by their numbers. Ranks that share some decide together.
    """
    skips = conditions.found_inf is not None and bool(conditions.found_inf)
    factor = 1.0 if conditions.scale is None else _reciprocal(float(conditions.scale))
    if conditions.max_norm is None:
        return Decision(skips or not _is_finite_in_fp32(factor), factor)
    squares = [0.0] * params
    for bucket, launch in launches:
        for entry, square in zip(bucket.entries, _squares(bucket, launch, grad), strict=True):
            squares[entry.index] = square
    _add_up(squares, shardings)
    norm = math.sqrt(_C.ordered_sum(squares)) * factor
    factor *= clipping(norm, conditions.max_norm)
    return Decision(skips or not (math.isfinite(norm) and _is_finite_in_fp32(factor)), factor, norm)


def _reciprocal(scale: float) -> float:
    """As a device divides: of a scale that has backed off to 0 it is infinite."""
    return 1.0 / scale if scale != 0 else math.copysign(math.inf, scale)


def _is_finite_in_fp32(factor: float) -> bool:
    """Whether kernels can multiply by it. Otherwise each gradient would be infinite or NaN, as a skipped step's are."""
    return math.isfinite(ctypes.c_float(factor).value)


def clipping(norm: float, max_norm: float) -> float:
    """What gradients are multiplied with, so that their norm is at most ``max_norm``."""
    return min(1.0, max_norm / (norm + CLIP_EPS))


def _squares(bucket: Bucket, launch: backends.Launch, grad: Callable[[int], Tensor]) -> list[float]:
    """The sum of squares of each entry's gradient in double; 0 where there is none."""
    if bucket.device.type == "cpu" and not isinstance(launch, ReferenceLaunch):
        found: list[float] = bucket.table.squares(torch.get_num_threads())
        return found
    none = torch.zeros((), dtype=torch.float64, device=bucket.device)
    return torch.stack(
        [
            rules.ordered_sum(flat(grad(entry.index)).double().square()) if present and entry.numel else none
            for entry, present in zip(bucket.entries, bucket.table.grads(), strict=True)
        ]
    ).tolist()


def _add_up(squares: list[float], shardings: Mapping[int, Sharding]) -> None:
    """Makes the sums of sharded gradients those over the whole ones; every rank comes here with the same parameters."""
    for group, indices in sharers_of(shardings).items():
        own = torch.tensor([squares[index] for index in indices], dtype=torch.float64, device="cpu")
        for index, whole in zip(indices, added_up(own, group).tolist(), strict=True):
            squares[index] = whole
