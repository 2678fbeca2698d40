"""The C++ kernels: all tensors of a bucket in one call, on ``torch.get_num_threads()`` threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.native import compiled as _C
from .base import HostLaunch

if TYPE_CHECKING:
    from .base import ScalarSet
    from .bucket import Bucket


class CpuBackend:
    name = "cpu"
    splits_formats = False

    def unusable(self, device: torch.device | None) -> str | None:
        return None if device is None or device.type == "cpu" else "it serves CPU tensors only"

    def prepare(self, bucket: Bucket, grad: Callable[[int], Tensor]) -> CpuBucketLaunch:
        return CpuBucketLaunch(bucket)


class CpuBucketLaunch(HostLaunch):
    """The launch of a bucket, as one operation of a commit."""

    def __init__(self, bucket: Bucket) -> None:
        self._rule = _C.RULES.index(bucket.rule.name)
        self._threshold_pass = getattr(_C.ThresholdPass, bucket.rule.threshold_pass)
        self._bucket = bucket
        self._chunk_statistics = 0 if bucket.chunk_statistics is None else bucket.chunk_statistics.data_ptr()

    def operations(self, scalar_sets: Sequence[ScalarSet]) -> list[Any]:
        threads = torch.get_num_threads()
        launch = self._bucket.table.cpu_launch(
            self._rule, self._threshold_pass, scalar_sets, threads, self._chunk_statistics
        )
        non_dense = self._bucket.present_non_dense()
        if not non_dense:
            return [launch]
        # Around each launch by itself: a parameter may share memory with one of an earlier launch.
        dense_param, params = [entry.dense_param for entry in non_dense], [entry.param.data for entry in non_dense]
        return [(torch._foreach_copy_, dense_param, params), launch, (torch._foreach_copy_, params, dense_param)]
