"""The CUDA kernels: one launch per step over a table that stays on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._extension import load
from .device import PinnedRing, Resident, refuse_capture, to_device

if TYPE_CHECKING:
    from ..plan import Bucket
    from . import Launch, Row

_C = load()


class CudaBackend:
    name = "cuda"
    splits_formats = False

    def unusable(self, device: torch.device | None) -> str | None:
        if not hasattr(_C, "cuda_unusable_reason"):
            return (
                "the module was built without CUDA (no nvcc, or SIGNADAM_CUDA=0); build it again with SIGNADAM_CUDA=1"
            )
        if torch.version.hip is not None:
            return "this torch is built for ROCm"
        if device is None:
            return None
        if device.type != "cuda":
            return "it serves CUDA tensors only"
        return _device_reason(torch.cuda.current_device() if device.index is None else device.index)

    def prepare(self, bucket: Bucket, grad: Callable[[int], Tensor]) -> Launch:
        rule = _C.RULES.index(bucket.rule.name)
        statistics = getattr(_C.Statistics, bucket.rule.statistics)
        table, device = bucket.table, bucket.device
        if table.chunks == 0:
            return lambda rows: None
        resident = to_device(torch.frombuffer(bytearray(table.device_bytes()), dtype=torch.uint8), device)
        gathers = bucket.rule.statistics != "NONE"
        # S1 and S2 of each chunk, and a count of finished chunks per tensor that the kernel leaves at zero.
        sums = torch.empty(2 * table.chunks if gathers else 0, dtype=torch.float64, device=device)
        arrivals = torch.zeros(len(table) if gathers else 0, dtype=torch.int32, device=device)
        made = Resident(device, resident, sums, arrivals, *bucket.observations())
        observed = 0 if bucket.observed is None else bucket.observed.data_ptr()
        ring = PinnedRing(device)
        capacity = _C.cuda_inline_capacity()

        def launch(rows: Sequence[Row]) -> None:
            refuse_capture(device)
            size = table.cuda_step_bytes(len(rows))
            stream = torch.cuda.current_stream(device)
            made.use_on(stream)
            with ring.slot(size if size > capacity else 0, stream) as (host, step):
                table.launch_cuda(
                    rule,
                    statistics,
                    rows,
                    device_table=resident.data_ptr(),
                    sums=sums.data_ptr(),
                    arrivals=arrivals.data_ptr(),
                    observed=observed,
                    pinned=host.data_ptr(),
                    device_step=step.data_ptr(),
                    device=stream.device_index,
                    stream=stream.cuda_stream,
                )

        return launch


@functools.cache
def _device_reason(index: int) -> str | None:
    return _C.cuda_unusable_reason(index) or None
