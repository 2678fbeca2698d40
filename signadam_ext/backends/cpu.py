"""The C++ kernels: all tensors of a bucket in one call, on ``torch.get_num_threads()`` threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._extension import load

if TYPE_CHECKING:
    from ..plan import Bucket
    from . import Launch, Row

_C = load()


class CpuBackend:
    name = "cpu"
    splits_formats = False

    def unusable(self, device: torch.device | None) -> str | None:
        return None if device is None or device.type == "cpu" else "it serves CPU tensors only"

    def prepare(self, bucket: Bucket, grad: Callable[[int], Tensor]) -> Launch:
        rule = _C.RULES.index(bucket.rule.name)
        statistics = getattr(_C.Statistics, bucket.rule.statistics)
        table = bucket.table
        observed = 0 if bucket.observed is None else bucket.observed.data_ptr()

        def launch(rows: Sequence[Row]) -> None:
            table.run_cpu(rule, statistics, rows, torch.get_num_threads(), observed)

        return launch
