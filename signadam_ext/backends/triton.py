"""The Triton kernels: one launch per step and combination of dtypes and storage forms. Also the road to AMD."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from ..core.formats import DTYPE_FORMATS, PARAM_STORAGES
from ..core.native import compiled as _C
from .confidence import Confidence, check_result, name_of
from .device import StreamGuarded, StreamLaunch, is_current, to_device

if TYPE_CHECKING:
    from .base import Launch, ScalarSet
    from .bucket import Bucket, Entry


#: How the kernels of a step that begins on the device are compiled.
STEP_OPTIONS: dict[str, dict[str, Any]] = {
    "norm": {"num_warps": 8, "enable_fp_fusion": False},
    "begin": {"num_warps": 1, "enable_fp_fusion": False},
}


def launch_options(constants: dict[str, Any], nvidia: bool) -> dict[str, Any]:
    """How a kernel with these constants is compiled."""
    options: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}
    # What ptxas takes by itself would leave some one block for each multiprocessor, and others two where three fit.
    if nvidia:
        registers = _registers(constants)
        if registers is not None:
            options["maxnreg"] = registers
    return options


def _registers(constants: dict[str, Any]) -> int | None:
    """At most so many of each thread, where ptxas would take more, and nothing is spilled if it may not."""
    threshold_pass = constants["THRESHOLD_PASS"]
    is_large = threshold_pass == _C.ThresholdPass.SAME_PASS.value or constants["MOMENTS"] > 1
    if constants["OBSERVES"]:
        return None if is_large else 128
    if not any(constants[name] for name in ("EXP_AVG", "EXP_AVG_SQ", "AUX", "PARAM_STORAGE")):
        return None
    has_residual = constants["PARAM_STORAGE"] > PARAM_STORAGES["stochastic"]
    return 128 if is_large or has_residual or constants["RUNS"] else 80


def interpreter_fault() -> str | None:
    """Why Triton's interpreter would fail beside this NumPy, where it would.

    Below 3.7 it makes the bound of a loop an ``int`` of an array with one element, as the array itself, which NumPy
    refuses since 2.4 (triton-lang/triton#9171). What Triton compiles is not concerned.
    """
    import numpy
    import triton

    if TorchVersion(triton.__version__) >= "3.7" or TorchVersion(numpy.__version__) < "2.4":
        return None
    return (
        f"the interpreter of Triton {triton.__version__} fails with NumPy {numpy.__version__}: take NumPy below 2.4, "
        "or Triton 3.7 or newer"
    )


class TritonBackend:
    name = "triton"
    splits_formats = True

    def unusable(self, device: torch.device | None) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; pip install 'signadam_ext[triton]'"
        if device is None or device.type == "cuda":
            return None
        if device.type != "cpu":
            return "it serves CUDA and ROCm tensors only"
        from triton import JITFunction

        from ..triton_kernels.update import update

        if not isinstance(update, JITFunction):
            return interpreter_fault()
        return "Triton takes CPU tensors only when TRITON_INTERPRET=1 was set before the import"

    def prepare(self, bucket: Bucket, grad: Callable[[int], Tensor]) -> Launch:
        if bucket.table.chunks == 0:
            return lambda scalar_sets: None
        if bucket.rule.confidence is not None:
            _probe(bucket.rule.confidence, bucket.device)
        kernels = _Kernels(bucket)
        return StreamLaunch(
            bucket.device,
            StreamGuarded(bucket.device, *kernels.buffers, *bucket.observations()),
            bucket.chunk_statistics is not None,
            lambda scalar_sets: step_bytes(len(bucket.table), scalar_sets),
            bucket.table.write_step,
            kernels.start,
        )

    def device_step(self, bucket: Bucket) -> DeviceStep:
        if bucket.rule.confidence is not None:
            _probe(bucket.rule.confidence, bucket.device)
        return DeviceStep(bucket)


class _Kernels:
    """The kernels of a bucket: one, or where the threshold is this step's, one before it.

    Attributes:
        buffers: tables and scratch on the device.
    """

    def __init__(self, bucket: Bucket) -> None:
        device, table = bucket.device, bucket.table
        gathers = bucket.rule.threshold_pass != "NONE"
        entries = to_device(_table(bucket.entries), device)
        tensor_of_chunk = to_device(torch.frombuffer(bytearray(table.chunk_bytes()), dtype=torch.int32), device)
        sums = torch.empty(2 * table.chunks if gathers else 1, dtype=torch.float64, device=device)
        arrivals = torch.zeros(len(table) if gathers else 1, dtype=torch.int32, device=device)
        self.buffers = (entries, tensor_of_chunk, sums, arrivals)
        self._chunk_statistics = sums if bucket.chunk_statistics is None else bucket.chunk_statistics
        self._table = table
        self._launches = _launches(bucket)

    def start(self, scalar_sets: Sequence[ScalarSet], step: Tensor | None, stream: torch.cuda.Stream | None) -> None:
        """Starts the kernels; ``step`` is what :meth:`Table.write_step` wrote, on the device."""
        assert step is not None
        self.start_on(step_data(step, len(self._table), len(scalar_sets)))

    def start_on(self, step: Sequence[Tensor]) -> None:
        """Starts the kernels, given :func:`step_data`."""
        from ..triton_kernels.update import update

        entries, tensor_of_chunk, sums, arrivals = self.buffers
        arguments = (entries, tensor_of_chunk, *step, sums, arrivals, self._chunk_statistics)
        for constants in self._launches:
            update[(self._table.chunks,)](*arguments, **constants)


class DeviceStep:
    """The kernels of a bucket whose step begins on the device, each on the stream that is current there.

    Attributes:
        buffers: what they use beside their arguments and what belongs to the user.
    """

    def __init__(self, bucket: Bucket) -> None:
        device, table = bucket.device, bucket.table
        self._device = device
        self._tensors, self._chunks = len(table), table.chunks
        self._grad_format = DTYPE_FORMATS[bucket.entries[0].grad_dtype]
        self._kernels = _Kernels(bucket) if table.chunks > 0 else None
        step = torch.zeros(step_bytes(self._tensors, self._tensors), dtype=torch.uint8, device=device)
        self._step = step_data(step, self._tensors, self._tensors)
        # Each tensor has its own scalars.
        torch.arange(self._tensors, dtype=torch.int32, device=device, out=self._step[2][: self._tensors])
        sums = torch.empty(table.chunks, dtype=torch.float64, device=device)
        arrivals = torch.zeros(self._tensors, dtype=torch.int32, device=device)
        self._sums, self._arrivals = sums, arrivals
        self.buffers = (step, sums, arrivals, *(self._kernels.buffers if self._kernels is not None else ()))

    def norm(self, grads: Tensor, totals: Tensor, places: Tensor) -> None:
        """Starts :func:`triton_kernels.norm.norm`, whose arguments these are."""
        from ..triton_kernels.norm import norm

        if self._kernels is None:
            return
        entries, tensor_of_chunk = self._kernels.buffers[:2]
        with is_current(self._device):
            norm[(self._chunks,)](
                entries,
                tensor_of_chunk,
                grads,
                self._sums,
                self._arrivals,
                totals,
                places,
                GRAD=self._grad_format,
                **STEP_OPTIONS["norm"],
            )

    def begin(
        self, entries: Tensor, operations: Tensor, results: Tensor, values: Tensor, control: Tensor, grads: Tensor
    ) -> None:
        """Starts :func:`triton_kernels.begin.begin`, whose arguments these are."""
        from ..triton_kernels.begin import begin

        out_grads, out_rng_keys, _, out_scalars = self._step
        with is_current(self._device):
            begin[(self._tensors,)](
                entries,
                operations,
                results,
                values,
                control,
                grads,
                out_grads,
                out_rng_keys,
                out_scalars,
                operations.shape[1],
                values.shape[1],
                **STEP_OPTIONS["begin"],
            )

    def update(self) -> None:
        """Starts the kernels of the step that has begun."""
        if self._kernels is not None:
            with is_current(self._device):
                self._kernels.start_on(self._step)


def step_data(step: Tensor, tensors: int, scalar_sets: int) -> tuple[Tensor, ...]:
    """What a step sends to the device, as the kernels take it: addresses of gradients, keys of random bits, indices of
    sets of scalars, and these.

    Every one of them lies on a 16-byte boundary, at each step: Triton would compile another kernel otherwise.
    """
    grads_at, rng_keys_at, scalar_indices_at, scalars_at, size = _C.step_layout(tensors, scalar_sets)
    return (
        step[grads_at:rng_keys_at].view(torch.int64),
        step[rng_keys_at:scalar_indices_at].view(torch.int32),
        step[scalar_indices_at:scalars_at].view(torch.int32),
        step[scalars_at:size].view(torch.float64),
    )


def _launches(bucket: Bucket) -> list[dict[str, Any]]:
    """The constants of each launch of a step, and how it is compiled."""
    from ..triton_kernels import rules

    sample = bucket.entries[0]  # all are stored alike
    moments = [form.number for form in sample.forms] + [DTYPE_FORMATS[torch.float32]] * 3
    constants: dict[str, Any] = {
        "RULE": getattr(rules, bucket.rule.name),
        "MOMENTS": len(bucket.rule.moments),
        "PARAM": DTYPE_FORMATS[sample.dense_param.dtype],
        "GRAD": DTYPE_FORMATS[sample.grad_dtype],
        "EXP_AVG": moments[0],
        "EXP_AVG_SQ": moments[1],
        "AUX": moments[2],
        "READS_VARIANCE": bucket.rule.reads_variance,
        "PARAM_STORAGE": PARAM_STORAGES[sample.param_storage],
        "CONFIDENCE": bucket.rule.confidence,
        "RUNS": sample.shard.run > 0,
        "SCALE": bucket.rule.update_scale,
    }
    before, none = _C.ThresholdPass.PASS_BEFORE, _C.ThresholdPass.NONE
    own: _C.ThresholdPass = getattr(_C.ThresholdPass, bucket.rule.threshold_pass)
    launches = []
    for threshold_pass in (before, none) if own == before else (own,):
        observes = bucket.chunk_statistics is not None and threshold_pass != before
        of_pass = {**constants, "THRESHOLD_PASS": threshold_pass.value, "OBSERVES": observes}
        launches.append(of_pass | launch_options(of_pass, nvidia=torch.version.hip is None))
    return launches


def step_bytes(tensors: int, scalar_sets: int) -> int:
    """Bytes of the data that one step sends to the device."""
    size: int = _C.step_layout(tensors, scalar_sets)[-1]
    return size


def _probe(confidence: Confidence, device: torch.device) -> None:
    """Raises where a confidence function does not compile, or makes NaN of a number."""
    from ..triton_kernels.threshold import LANES
    from ..triton_kernels.update import probe

    half = LANES.value // 2
    sizes = torch.logspace(-45, 38, half - 1, dtype=torch.float64, device="cpu").float()
    at = torch.cat([torch.zeros(2, dtype=torch.float32, device="cpu"), sizes, -sizes]).to(device)
    for alpha in (0.0, 0.5):
        result = torch.empty_like(at)
        try:
            with is_current(device):
                probe[(1,)](
                    at,
                    torch.full((1,), alpha, dtype=torch.float32, device=device),
                    result,
                    confidence,
                    enable_fp_fusion=False,
                )
        except Exception as error:
            raise ValueError(
                f"confidence={name_of(confidence)} does not compile: must be a function of a block of gradients and "
                "the threshold, both float32, that returns a block of the same shape"
            ) from error
        check_result(confidence, at, result)


def _table(entries: Sequence[Entry]) -> Tensor:
    """The table of triton_kernels.update, one row of int64 a tensor."""
    from ..triton_kernels.update import COLUMNS

    rows, first_chunk = [], 0
    for entry in entries:
        operands = [0 if x is None else x.data_ptr() for x in entry.operands()]
        residual = 0 if entry.residual is None else entry.residual.data_ptr()
        numel = entry.dense_param.numel()
        row = {
            "param": entry.dense_param.data_ptr(),
            "residual": residual,
            "exp_avg": operands[0],
            "exp_avg_sq": operands[1],
            "aux": operands[2],
            "threshold_state": 0 if entry.threshold_state is None else entry.threshold_state.data_ptr(),
            "numel": numel,
            "shard_offset": entry.shard.offset,
            "shard_run": entry.shard.run,
            "shard_stride": entry.shard.stride,
            "shard_count": entry.shard.count,
            "shard_outer_stride": entry.shard.outer_stride,
            "first_chunk": first_chunk,
            "aligned": all(address % 16 == 0 for address in (entry.dense_param.data_ptr(), residual, *operands)),
        }
        rows.append([int(row[name]) for name in COLUMNS])
        first_chunk += -(-numel // _C.CHUNK_SIZE)
    return torch.tensor(rows, dtype=torch.int64, device="cpu")
