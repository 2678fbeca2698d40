"""The CUDA kernels: one launch per step and combination of dtypes and storage forms, over a table on the device."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.native import compiled as _C
from .device import StreamGuarded, StreamLaunch, to_device

if TYPE_CHECKING:
    from .base import Launch, ScalarSet
    from .bucket import Bucket


#: By what a rule's ``update_scale`` is.
SCALINGS = {
    None: _C.Scaling.NONE,
    "norm": _C.Scaling.NORM,
    "caution": _C.Scaling.STEPS,
    "rms": _C.Scaling.STEPS,
}


def _kernels(bucket: Bucket) -> tuple[int, Any, Any]:
    """What says which kernels take the step of a bucket: its rule, threshold pass and scaling."""
    rule = bucket.rule
    return _C.RULES.index(rule.name), getattr(_C.ThresholdPass, rule.threshold_pass), SCALINGS[rule.update_scale]


class CudaBackend:
    name = "cuda"
    # Most combinations that people use have a kernel of their own, in half the instructions of the general one.
    splits_formats = True

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
        kernels = _kernels(bucket)
        table, device = bucket.table, bucket.device
        if table.chunks == 0:
            return lambda scalar_sets: None
        resident = to_device(torch.frombuffer(bytearray(table.device_bytes()), dtype=torch.uint8), device)
        gathers = bucket.rule.threshold_pass != "NONE"
        # S1 and S2 of each chunk, and a count of finished chunks per tensor that the kernel leaves at zero.
        sums = torch.empty(2 * table.chunks if gathers else 0, dtype=torch.float64, device=device)
        arrivals = torch.zeros(len(table) if gathers else 0, dtype=torch.int32, device=device)
        chunk_statistics = 0 if bucket.chunk_statistics is None else bucket.chunk_statistics.data_ptr()
        capacity = table.cuda_inline_capacity(*kernels, bucket.chunk_statistics is not None)

        def copied(scalar_sets: int) -> int:
            size: int = table.cuda_step_bytes(scalar_sets)
            return size if size > capacity else 0

        def start(scalar_sets: Sequence[ScalarSet], step: Tensor | None, stream: torch.cuda.Stream | None) -> None:
            assert stream is not None
            table.launch_cuda(
                *kernels,
                scalar_sets,
                device_table=resident.data_ptr(),
                sums=sums.data_ptr(),
                arrivals=arrivals.data_ptr(),
                chunk_statistics=chunk_statistics,
                device_step=0 if step is None else step.data_ptr(),
                device=stream.device_index,
                stream=stream.cuda_stream,
            )

        made = StreamGuarded(device, resident, sums, arrivals, *bucket.observations())
        return StreamLaunch(device, made, bucket.chunk_statistics is not None, copied, table.write_cuda_step, start)

    def device_step(self, bucket: Bucket) -> DeviceStep:
        return DeviceStep(bucket)


class DeviceStep:
    """The kernels of a bucket whose step begins on the device, each on the stream that is current there.

    Attributes:
        buffers: what they use beside their arguments and what belongs to the user.
    """

    def __init__(self, bucket: Bucket) -> None:
        device, table = bucket.device, bucket.table
        self._table, self._bucket = table, bucket
        self._kernels_of_step = _kernels(bucket)
        self._resident = to_device(torch.frombuffer(bytearray(table.device_bytes()), dtype=torch.uint8), device)
        self._step = torch.zeros(table.cuda_device_step_bytes(), dtype=torch.uint8, device=device)
        # S1 and S2 of each chunk, and a count of finished chunks per tensor that kernels leave at zero.
        self._sums = torch.empty(2 * table.chunks, dtype=torch.float64, device=device)
        self._arrivals = torch.zeros(len(table), dtype=torch.int32, device=device)
        self.buffers = (self._resident, self._step, self._sums, self._arrivals)

    def norm(self, grads: Tensor, totals: Tensor, places: Tensor) -> None:
        """Leaves the sum of squares of each gradient in ``totals``.

        Args:
            grads: int64, address of each tensor's gradient, 0 where there is none.
            totals: float64.
            places: int32, where each tensor's is.
        """
        if self._table.chunks > 0:
            self._table.launch_cuda_norm(
                device_table=self._resident.data_ptr(),
                grads=grads.data_ptr(),
                sums=self._sums.data_ptr(),
                arrivals=self._arrivals.data_ptr(),
                totals=totals.data_ptr(),
                places=places.data_ptr(),
                **self._stream(),
            )

    def begin(
        self, entries: Tensor, operations: Tensor, results: Tensor, values: Tensor, control: Tensor, grads: Tensor
    ) -> None:
        """Begins the step of each tensor, as csrc/cuda/device_step.h says."""
        self._table.launch_cuda_begin(
            entries=entries.data_ptr(),
            programs=operations.data_ptr(),
            results=results.data_ptr(),
            values=values.data_ptr(),
            control=control.data_ptr(),
            grads=grads.data_ptr(),
            step=self._step.data_ptr(),
            program_length=operations.shape[1],
            row_length=values.shape[1],
            **self._stream(),
        )

    def update(self) -> None:
        """Takes the step that has begun."""
        if self._table.chunks == 0:
            return
        gathered = self._bucket.chunk_statistics
        self._table.launch_cuda(
            *self._kernels_of_step,
            None,
            device_table=self._resident.data_ptr(),
            sums=self._sums.data_ptr(),
            arrivals=self._arrivals.data_ptr(),
            chunk_statistics=0 if gathered is None else gathered.data_ptr(),
            device_step=self._step.data_ptr(),
            **self._stream(),
        )

    def _stream(self) -> dict[str, int]:
        stream = torch.cuda.current_stream(self._bucket.device)
        return {"device": stream.device_index, "stream": stream.cuda_stream}


@functools.cache
def _device_reason(index: int) -> str | None:
    architectures = _C.build_info()["cuda_architectures"]
    major, minor = torch.cuda.get_device_capability(index)
    if driver_compiles(architectures, major, minor):
        warnings.warn(
            f"signadam_ext was built for {architectures}, without machine code for sm_{major}{minor} (cuda:{index}): "
            "unless the driver has kept it from an earlier run, it compiles all kernels now, which takes minutes; "
            f"build with SIGNADAM_CUDA_ARCHS={major}{minor}",
            stacklevel=2,
        )
    return _C.cuda_unusable_reason(index) or None


def driver_compiles(architectures: str, major: int, minor: int) -> bool:
    """Whether a module built for ``architectures`` ("sm_80+sm_90+compute_90") has only PTX for a device.

    Machine code serves devices of the same major and of no smaller minor capability, PTX all later ones.
    """
    built = [
        (kind, *divmod(int(number), 10)) for kind, _, number in (x.partition("_") for x in architectures.split("+"))
    ]
    has_code = any(kind == "sm" and own == major and least <= minor for kind, own, least in built)
    return not has_code and any(kind == "compute" and tuple(rest) <= (major, minor) for kind, *rest in built)
