"""The launches that a step of an optimizer makes on a GPU, made without one, for whoever executes machine code.

:class:`Step` takes a step of one optimizer with one tensor of one full, aligned chunk on the CPU, but for its launches:
those it hands out, and what executes them must leave what the CPU backend leaves. What a launch consists of is asked of
the package itself: of the backends, which prepare it; of csrc/cuda/step.cu, compiled for the host, which makes the
parameters of a kernel; and of the compiled module, which writes tables and step data.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from support.paper_formulas import TABLE
from support.toolchain import TRITON_TENSORS, compile_triton, rules
from torch import Tensor

import signadam_ext
from reporting.machine_code import STORAGES, THRESHOLD_PASSES, KernelName, forms_of
from signadam_ext import _C, backends
from signadam_ext.backends import Bucket, ScalarSet
from signadam_ext.backends import cuda as cuda_backend

#: Elements of one block; of a case all there are.
ELEMENTS: int = _C.CHUNK_SIZE
#: Steps of the CPU backend before the one whose launches are made.
STEPS_BEFORE = 2
FUNCTORS = rules()


@dataclass(frozen=True)
class Case:
    """A kind of step."""

    name: str
    optimizer: type
    hyperparameters: dict[str, Any]
    dtype: torch.dtype = torch.float32
    observes: bool = False


def _cases() -> Iterator[Case]:
    rows = {row.id: row for row in TABLE}
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

    def case(row: str, dtype: torch.dtype = torch.float32, observes: bool = False, **hyperparameters: Any) -> Case:
        words = [row, short[dtype], *(str(value) for value in hyperparameters.values()), *["observed"] * observes]
        own = {**rows[row].hyperparameters, "lr": 0.01, "weight_decay": 0.1, **hyperparameters}
        return Case("-".join(words), rows[row].optimizer, own, dtype, observes)

    fp32, bf16, fp16 = short
    # Every rule, and every way to come by a threshold.
    for row in rows:
        yield case(row)
    steered = {"confidence": "sparsity", "target": 0.25, "gain": 0.5, "lr": 0.01}
    yield Case("sign_adam_pp-sparsity-fp32", signadam_ext.SignAdamPP, steered)
    coupled = {"alpha": 0.25, "weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": True}
    yield Case("sign_adam_pp-coupled-fp32", signadam_ext.SignAdamPP, coupled)
    # 16-bit parameters, rounded to nearest.
    for row, dtype in (("sign_adam_pp", bf16), ("sign_sgd", bf16), ("adam", bf16), ("lion", fp16)):
        yield case(row, dtype)
    # Every storage form of the parameter and of a moment.
    for state_dtype in ("bf16", "int8", "int4", "int2"):
        yield case("sign_adam_pp", bf16, param_storage="stochastic", state_dtype=state_dtype)
    yield case("sign_adam_pp", fp32, state_dtype="int8")
    yield case("sign_sgd", bf16, param_storage="stochastic")
    yield case("sign_sgd-gated", fp16, param_storage="stochastic")
    # The momentum of these has no bound: int8 comes with an exponent for every 32 elements.
    yield case("signum", bf16, param_storage="stochastic", state_dtype="int8")
    yield case("lion", bf16, param_storage="split8", state_dtype="int8")
    yield case("adam", fp32, state_dtype="int8")
    yield case("msgd", bf16, param_storage="split16", state_dtype="fp32")
    yield case("sign_adam", bf16, param_storage="split8", state_dtype="int4")
    yield case("adam", bf16, param_storage="stochastic", state_dtype="bf16")
    yield case("adam_amsgrad", bf16, param_storage="master", state_dtype="bf16")
    yield case("svag", fp16, param_storage="master", state_dtype="bf16")
    yield case("msvag_minibatch", bf16, param_storage="split16", state_dtype="bf16")
    yield case("sign_adam_pp-adaptive", bf16, param_storage="split16", state_dtype="int4")
    yield case("sign_adam_pp-delayed", bf16, param_storage="stochastic", state_dtype="int2")
    # With statistics().
    for row in ("sign_adam_pp", "sign_adam_pp-adaptive", "sign_sgd-gated", "msvag_minibatch"):
        yield case(row, observes=True)
    yield case("sign_adam_pp-delayed", bf16, observes=True, param_storage="stochastic", state_dtype="int8")
    yield case("signum", bf16, observes=True, param_storage="master", state_dtype="int8")


CASES = {case.name: case for case in _cases()}


@dataclass(frozen=True)
class Region:
    """Memory that the kernels of a step may touch.

    Attributes:
        streamed: whether each element is used once, as parameters, gradients and state are; tables are not.
    """

    name: str
    address: int
    size: int
    streamed: bool


@dataclass(frozen=True)
class CudaLaunch:
    """One launch of a kernel of csrc/cuda/kernel.h.

    Attributes:
        kernel: which of them; ``support.toolchain.symbols`` has its mangled name in a built module.
        grid, threads: blocks, and threads of a block, in one dimension.
        dynamic_shared: bytes of shared memory beyond what the kernel declares.
        parameters: its one parameter: a header, which leads to the table, and the step's data.
        keep: what the addresses in it lead to.
    """

    kernel: KernelName
    grid: int
    threads: int
    dynamic_shared: int
    parameters: bytes
    keep: tuple[Any, ...]


@dataclass(frozen=True)
class TritonLaunch:
    """One launch of triton_kernels.update.

    Attributes:
        constants: of the kernel, the rule by its name.
        options: what the kernel is compiled with, beside them.
        grid: programs, in one dimension.
        arguments: the tensors that it gets, in order.
    """

    constants: dict[str, Any]
    options: dict[str, Any]
    grid: int
    arguments: tuple[Tensor, ...]

    @property
    def kernel(self) -> str:
        """What machine code depends on: launches of one kernel have the same."""
        return json.dumps(self.constants)


@dataclass(frozen=True)
class Compiled:
    """Machine code of a Triton kernel, and what a launch of it must know."""

    cubin: Path
    symbol: str
    threads: int
    dynamic_shared: int
    parameter_count: int

    def parameters(self, launch: TritonLaunch) -> bytes:
        """The kernel's parameters: the addresses of the tensors, then null for scratch memory that it does not use."""
        addresses = [tensor.data_ptr() for tensor in launch.arguments]
        unused = self.parameter_count - len(addresses)
        return struct.pack(f"<{self.parameter_count}Q", *addresses, *[0] * unused)


def compile_launches(launches: Sequence[TritonLaunch], target: str, folder: Path) -> dict[str, Compiled]:
    """Machine code of their kernels for NVIDIA's ``target`` ("sm_90"), by ``TritonLaunch.kernel``."""
    kernels = list(dict.fromkeys(launch.kernel for launch in launches))
    made = compile_triton([(target, json.loads(kernel)) for kernel in kernels], folder)
    found = {}
    for kernel, path in zip(kernels, made, strict=True):
        told = json.loads(path.with_suffix(".json").read_text())
        symbol, threads = told["name"], 32 * told["num_warps"]
        declared = re.findall(rf"\.param \.[^\n]*\b{symbol}_param_\d+", path.with_suffix(".ptx").read_text())
        found[kernel] = Compiled(path.with_suffix(".cubin"), symbol, threads, told["shared"], len(declared))
    return found


def aligned(count: int, dtype: torch.dtype) -> Tensor:
    """Uninitialized, on a 16-byte boundary, so that every access can be wide."""
    room = torch.empty(count + 16, dtype=dtype)
    skipped = -room.data_ptr() % 16 // room.element_size()
    return room[skipped : skipped + count]


def bits(tensor: Tensor) -> Tensor:
    """A copy of the bytes of a tensor, uint8."""
    return tensor.detach().clone().view(-1).view(torch.uint8)


@dataclass(eq=False)
class _Recorder:
    """The backend of a step that is recorded: it prepares as another does."""

    prepare_as: Callable[[Bucket, Callable[[int], Tensor]], Callable[[Sequence[ScalarSet]], None]]
    bucket: Bucket | None = None
    regions: list[Region] = field(default_factory=list)
    name: str = "recorder"
    splits_formats: bool = True

    def unusable(self, device: torch.device | None) -> None:
        """It serves every device."""

    def prepare(self, bucket: Bucket, grad: Callable[[int], Tensor]) -> Callable[[Sequence[ScalarSet]], None]:
        assert self.bucket is None
        self.bucket = bucket
        launch = self.prepare_as(bucket, grad)

        def take_notes(scalar_sets: Sequence[ScalarSet]) -> None:
            # An entry has tensors during a step alone.
            (entry,) = bucket.entries
            streamed = {"param": entry.dense_param, "grad": grad(entry.index), "residual": entry.residual}
            streamed |= dict(zip(("exp_avg", "exp_avg_sq", "aux"), entry.operands(), strict=True))
            self.add(streamed, streamed=True)
            self.add({"threshold_state": entry.threshold_state, "chunk_statistics": bucket.chunk_statistics})
            launch(scalar_sets)

        return take_notes

    def add(self, tensors: dict[str, Tensor | None], streamed: bool = False) -> None:
        """Adds the memory of tensors to what may be touched, but not of those that share it with an earlier one."""
        for name, tensor in tensors.items():
            if tensor is not None and tensor.numel() > 0:
                size = tensor.numel() * tensor.element_size()
                if all(tensor.data_ptr() != region.address for region in self.regions):
                    self.regions.append(Region(name, tensor.data_ptr(), size, streamed))


class Step:
    """The third step of a case on pseudo-random data, but for its launches.

    :meth:`cuda` or :meth:`triton` takes it, once. Then the launches are executed, in order, by whoever can, and
    :meth:`unequal` compares with the same step of the CPU backend.

    Attributes:
        regions: all memory that the launches may touch, once they are made.
    """

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)

        def values(dtype: torch.dtype) -> Tensor:
            drawn = torch.randn(ELEMENTS, generator=generator)
            drawn[::101] = 0.0
            return aligned(ELEMENTS, dtype).copy_(drawn)

        self.regions: list[Region] = []
        self._bucket: Bucket | None = None
        initial = values(case.dtype)
        params = [torch.nn.Parameter(aligned(ELEMENTS, case.dtype).copy_(initial)) for _ in range(2)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* momentum with beta")
            optimizers = [case.optimizer([param], backend="cpu", **case.hyperparameters) for param in params]
        for optimizer in optimizers if case.observes else ():
            optimizer.observe()
        for step in range(STEPS_BEFORE + 1):
            gradient, variance = values(case.dtype), values(torch.float32).square_()
            for param in params:
                param.grad = aligned(ELEMENTS, case.dtype).copy_(gradient)
                param.grad_variance = aligned(ELEMENTS, torch.float32).copy_(variance)
            for optimizer in optimizers[: 1 if step == STEPS_BEFORE else 2]:
                optimizer.step()
        self._expected_param, self.param = params
        self._expected_optimizer, self.optimizer = optimizers

    def tensors(self) -> dict[str, Tensor]:
        """The parameter and the tensors of its state, by name."""
        return _tensors(self.param, self.optimizer)

    def expected(self) -> dict[str, Tensor]:
        """What the CPU backend has made of them, by name."""
        return _tensors(self._expected_param, self._expected_optimizer)

    def unequal(self) -> list[str]:
        """Names of those that are not, byte for byte, as the CPU backend has left them.

        "chunk_statistics" are sums of doubles in an order of the kernel's own, and may be off by 1e-12 of their value.
        """
        ours, theirs = self.tensors(), self.expected()
        assert ours.keys() == theirs.keys()
        found = [name for name in ours if not torch.equal(bits(ours[name]), bits(theirs[name]))]
        assert self._bucket is not None
        if self._bucket.chunk_statistics is not None:
            ((bucket, _),) = self._expected_optimizer.runtime.plan.launches
            if not torch.allclose(self._bucket.chunk_statistics, bucket.chunk_statistics, rtol=1e-12, atol=0):
                found.append("chunk_statistics")
        return found

    def _take(self, recorder: _Recorder) -> None:
        assert self._bucket is None, "the step has been taken"
        with mock.patch.object(backends, "choose", lambda *_: recorder):
            # Another name than before, so that the optimizer chooses anew.
            self.optimizer.param_groups[0]["backend"] = "auto"
            self.optimizer.step()
        self.regions, self._bucket = recorder.regions, recorder.bucket

    def cuda(self, library: ctypes.CDLL) -> list[CudaLaunch]:
        """What the CUDA backend launches.

        Args:
            library: ``support.toolchain.cuda_launch_library``.

        Raises:
            RuntimeError: csrc/cuda/step.cu has no kernel for the step, or its data does not fit the parameters.
        """
        launches: list[CudaLaunch] = []
        kept: list[Tensor] = []
        recorder = _Recorder(lambda bucket, grad: cuda_backend.CudaBackend().prepare(bucket, grad))

        def launch_cuda(
            table: Any,
            rule: int,
            threshold_pass: Any,
            scalar_sets: Sequence[ScalarSet],
            *,
            device_step: int,
            device: int,
            stream: int,
            **addresses: int,
        ) -> None:
            assert device_step == 0
            named = {tensor.data_ptr(): tensor for tensor in kept}
            recorder.add({name: named.get(address) for name, address in addresses.items()})
            launches.extend(_cuda_launches(library, table, rule, threshold_pass, scalar_sets, addresses, tuple(kept)))

        class OnNoDevice:
            """In place of ``StreamLaunch``."""

            def __init__(self, device: Any, resident: Any, observes: bool, size: Any, write: Any, start: Any) -> None:
                kept.extend(resident.tensors)
                self._start = start

            def __call__(self, scalar_sets: Sequence[ScalarSet]) -> None:
                self._start(scalar_sets, None, SimpleNamespace(device_index=0, cuda_stream=0))

        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.object(cuda_backend, "StreamLaunch", OnNoDevice))
            patches.enter_context(mock.patch.object(_C.Table, "launch_cuda", launch_cuda, create=True))
            # A module that was built without CUDA lacks these.
            for name, result in (("cuda_inline_capacity", 0), ("write_cuda_step", None)):
                own = getattr(_C.Table, name, lambda *_, result=result: result)
                patches.enter_context(mock.patch.object(_C.Table, name, own, create=True))
            self._take(recorder)
        return launches

    def triton(self) -> list[TritonLaunch]:
        """What the Triton backend launches on NVIDIA's GPUs."""
        from signadam_ext.backends.triton import TritonBackend
        from signadam_ext.triton_kernels import update as kernels

        launches: list[TritonLaunch] = []
        recorder = _Recorder(lambda bucket, grad: TritonBackend().prepare(bucket, grad))
        names = kernels.update.arg_names

        class Notes:
            """In place of the kernel."""

            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                def run(*arguments: Tensor, **given: Any) -> None:
                    constants = {name: value for name, value in given.items() if name in names}
                    constants["RULE"] = constants["RULE"].__name__
                    options = {name: value for name, value in given.items() if name not in names}
                    recorder.add(dict(zip(TRITON_TENSORS, arguments, strict=True)))
                    (programs,) = grid
                    launches.append(TritonLaunch(constants, options, programs, arguments))

                return run

        with mock.patch.object(kernels, "update", Notes()):
            self._take(recorder)
        return launches


def _tensors(param: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = {name: value for name, value in optimizer.state[param].items() if isinstance(value, Tensor)}
    return {"param": param, **state}


def _cuda_launches(
    library: ctypes.CDLL,
    table: Any,
    rule: int,
    threshold_pass: Any,
    scalar_sets: Sequence[ScalarSet],
    addresses: dict[str, int],
    keep: tuple[Tensor, ...],
) -> Iterator[CudaLaunch]:
    """What csrc/cuda/step.cu hands to the runtime, given what the backend hands to the module."""
    *offsets, size = _C.step_layout(tensors=len(table), scalar_sets=len(scalar_sets))
    step = ctypes.create_string_buffer(size)
    table.write_step(scalars=scalar_sets, address=ctypes.addressof(step))
    message = ctypes.create_string_buffer(200)
    library.begin(1, 0, 0, 0)
    failed = library.launch_table(
        *(rule, threshold_pass.value, ctypes.c_int64(len(table)), ctypes.c_int64(table.chunks)),
        *(ctypes.c_void_p(addresses["device_table"]), ctypes.c_int64(len(table.device_bytes()))),
        *(step, (ctypes.c_int64 * 4)(*offsets), ctypes.c_int64(len(scalar_sets))),
        *(ctypes.c_void_p(addresses[name]) for name in ("sums", "arrivals", "chunk_statistics")),
        *(message, ctypes.c_int64(len(message))),
    )
    if failed:
        raise RuntimeError(message.value.decode())
    own = b""
    if _C.build_info()["cuda"] is not None:
        room = ctypes.create_string_buffer(table.cuda_step_bytes(scalar_sets=len(scalar_sets)))
        table.write_cuda_step(scalars=scalar_sets, address=ctypes.addressof(room))
        own = room.raw
    functors = [FUNCTORS[name].struct for name in _C.RULES]
    for index in range(library.launches()):
        facts = (ctypes.c_int64 * 13)()
        assert library.launched_kernel(index, facts) == 0
        functor, which, storage, grid, threads, dynamic_shared, parameter_bytes, is_fixed, *numbers = facts
        forms = forms_of(tuple(numbers)) if is_fixed else None
        kernel = KernelName(functors[functor], THRESHOLD_PASSES[which], STORAGES[storage], forms)
        parameters = ctypes.string_at(library.launched_parameters(index), parameter_bytes)
        assert parameters[library.step_at() :].startswith(own), "the module writes other step data"
        yield CudaLaunch(kernel, grid, threads, dynamic_shared, parameters, keep)
