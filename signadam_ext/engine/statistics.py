"""What a step does to the gradient and the momentum, as ``optimizer.statistics()`` tells it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends import StreamedLaunch
from ..core.native import compiled as _C

if TYPE_CHECKING:
    from ..backends.bucket import Bucket, Entry
    from .plan import Plan


@dataclass(frozen=True)
class TensorStatistics:
    """What a step did, over one parameter or all.

    The gradient is the effective one: negated with ``maximize``, with coupled weight decay.

    Attributes:
        name: of a named parameter; otherwise as errors name it; or "all".
        numel: number of entries.
        passed: share of the entries with ``|g| > threshold``; without a gate, of those that are not 0.
        norm_ratio: norm of the gradient's entries that passed, over the norm of all [SA, Fig. 3]; NaN where that is 0.
        mean_momentum: mean of ``|m|``, unrounded; NaN for a rule without momentum.
        flipped: share of the entries whose momentum changed its sign, from above 0 to below or the other way; NaN for
            a rule without momentum.
        threshold: in force at the step, in units of the gradient; NaN over tensors that had different ones.
    """

    name: str
    numel: int
    passed: float
    norm_ratio: float
    mean_momentum: float
    flipped: float
    threshold: float


@dataclass(frozen=True)
class Statistics:
    """What the last step did: over all parameters that took part, and for each of them."""

    all: TensorStatistics
    tensors: tuple[TensorStatistics, ...]


@dataclass
class _Sums:
    numel: int
    passed: float
    squares: float
    passed_squares: float
    flips: float
    magnitude: float
    thresholds: set[float]

    def statistics(self, name: str) -> TensorStatistics:
        return TensorStatistics(
            name,
            self.numel,
            passed=_ratio(self.passed, self.numel),
            norm_ratio=math.sqrt(_ratio(self.passed_squares, self.squares)),
            mean_momentum=_ratio(self.magnitude, self.numel),
            flipped=_ratio(self.flips, self.numel),
            threshold=next(iter(self.thresholds)) if len(self.thresholds) == 1 else math.nan,
        )


def collect(plans: Iterable[Plan]) -> Statistics:
    """What the last steps of these plans have left. Waits for the devices, on whichever stream a step has run."""
    found: list[tuple[int, str, _Sums]] = []
    for plan in plans:
        for bucket, launch in plan.launches:
            if bucket.chunk_statistics is None:
                continue
            if isinstance(launch, StreamedLaunch):
                launch.wait()
            elif bucket.device.type == "cuda":
                torch.cuda.synchronize(bucket.device)
            rows = bucket.chunk_statistics.cpu()
            begin = 0
            for entry, present in zip(bucket.entries, bucket.table.grads(), strict=True):
                numel = entry.numel
                end = begin + -(-numel // _C.CHUNK_SIZE)
                if present and numel > 0:
                    sums = _sums(rows[begin:end], numel, _unit(bucket, entry), _has_momentum(bucket, entry))
                    found.append((entry.param_id, plan.names[entry.index], sums))
                begin = end
    found.sort(key=lambda item: item[0])
    every = [sums for _, _, sums in found]
    return Statistics(_total(every).statistics("all"), tuple(sums.statistics(label) for _, label, sums in found))


def _has_momentum(bucket: Bucket, entry: Entry) -> bool:
    """Whether the first moment is an average of gradients, and no weights."""
    return bool(entry.forms) and bucket.rule.starts_as_param is None


def _unit(bucket: Bucket, entry: Entry) -> float:
    """What kernels see of a momentum of 1."""
    levels = entry.forms[0].levels if entry.forms else None
    return 1.0 if levels is None or bucket.rule.bound is None else levels / bucket.rule.bound


def _sums(rows: Tensor, numel: int, unit: float, has_momentum: bool) -> _Sums:
    passed, squares, passed_squares, flips, magnitude = torch.sum(rows[:, :5], dim=0).tolist()
    if not has_momentum:
        flips = magnitude = math.nan
    return _Sums(numel, passed, squares, passed_squares, flips, magnitude / unit, {rows[0, 5].item()})


def _total(every: list[_Sums]) -> _Sums:
    total = _Sums(0, 0.0, 0.0, 0.0, 0.0, 0.0, set())
    for sums in every:
        total.numel += sums.numel
        total.passed += sums.passed
        total.squares += sums.squares
        total.passed_squares += sums.passed_squares
        total.flips += sums.flips
        total.magnitude += sums.magnitude
        total.thresholds |= sums.thresholds
    return total


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole != 0 else math.nan
