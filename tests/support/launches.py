"""The launches that a step of an optimizer makes on a GPU, made without one, for whoever executes machine code.

:class:`Step` takes a step of one optimizer on the CPU, of one tensor of one full, aligned chunk unless its case says
otherwise, but for its launches: those it hands out, and what executes them must leave what the CPU backend leaves. What
a launch consists of is asked of the package itself: of the backends, which prepare it; of csrc/cuda, compiled
for the host, which makes the parameters of a kernel; and of the compiled module, which writes tables and step data.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
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
#: In the place of a rule, of the kernels for any.
ANY_RULE = "AnyRule"
ANY_RULE_KERNELS = (
    KernelName(ANY_RULE, "pass_before", "any"),
    KernelName(ANY_RULE, "same_pass", "any"),
    KernelName(ANY_RULE, "same_pass", "with_statistics"),
)


@dataclass(frozen=True)
class Given:
    """A parameter of a case.

    Attributes:
        size: elements.
        offset, grad_offset: elements between a 16-byte boundary and its first, or the first of its gradient.
        dtype, grad_dtype: None: as the case has it.
        group: index of its group.
        absent: whether it has no gradient at the step that is launched.
        specials: whether infinities, NaN, subnormals and zeros of both signs are among its values.
    """

    size: int = ELEMENTS
    offset: int = 0
    grad_offset: int = 0
    dtype: torch.dtype | None = None
    grad_dtype: torch.dtype | None = None
    group: int = 0
    absent: bool = False
    specials: bool = False


@dataclass(frozen=True)
class Case:
    """A kind of step.

    Attributes:
        given: its parameters.
        groups: what each parameter group has in place of the hyperparameters.
        on_device: whether the step's data lies in memory of the device, as much of it does, not in the parameters of
            the CUDA kernels. Triton's always does.
    """

    name: str
    optimizer: type
    hyperparameters: dict[str, Any]
    dtype: torch.dtype = torch.float32
    observes: bool = False
    given: tuple[Given, ...] = (Given(),)
    groups: tuple[dict[str, Any], ...] = ({},)
    on_device: bool = False


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
        if not rows[row].like:
            yield case(row)
    steered = {"confidence": "sparsity", "target": 0.25, "gain": 0.5, "lr": 0.01}
    yield Case("sign_adam_pp-sparsity-fp32", signadam_ext.SignAdamPP, steered)
    coupled = {"alpha": 0.25, "weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": True}
    yield Case("sign_adam_pp-coupled-fp32", signadam_ext.SignAdamPP, coupled)
    for row in ("sign_sgd-gated", "sign_adam_pp", "adam", "lion"):
        yield case(row, fp32, weight_decay_kind="cautious")
    yield case("sign_adam_pp", bf16, weight_decay_kind="cautious", param_storage="stochastic", state_dtype="int2")
    yield case("signum", bf16, weight_decay_kind="cautious", param_storage="stochastic", state_dtype="int8")
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
    # That of LaProp has one for small betas.
    yield case("laprop", bf16, param_storage="master", state_dtype="int8")
    yield case("laprop-bounded", bf16, param_storage="stochastic", state_dtype="int8")
    yield case("adopt", bf16, param_storage="stochastic", state_dtype="int8")
    yield case("ademamix", bf16, param_storage="stochastic", state_dtype="int8")
    yield case("sign_adam", bf16, param_storage="split8", state_dtype="int4")
    yield case("adam", bf16, param_storage="stochastic", state_dtype="bf16")
    yield case("adam_amsgrad", bf16, param_storage="master", state_dtype="bf16")
    yield case("svag", fp16, param_storage="master", state_dtype="bf16")
    yield case("msvag_minibatch", bf16, param_storage="split16", state_dtype="bf16")
    yield case("sign_adam_pp-adaptive", bf16, param_storage="split16", state_dtype="int4")
    yield case("sign_adam_pp-delayed", bf16, param_storage="stochastic", state_dtype="int2")
    # Steps that are scaled by a number of each tensor's.
    for row, how in (
        ("lion", {"caution": "delayed"}),
        ("signum", {"caution": "delayed"}),
        ("signum", {"lr_scale": "rms"}),
        ("adam", {"caution": "delayed"}),
        ("adam", {"caution": "exact"}),
        ("sign_sgd-gated", {"lr_scale": "rms"}),
    ):
        yield case(row, **how)
    yield case("signum", bf16, caution="delayed", param_storage="stochastic", state_dtype="bf16")
    yield case("signum", bf16, caution="exact", param_storage="stochastic", state_dtype="int8")
    yield case("sign_adam_pp", bf16, caution="delayed", param_storage="split8", state_dtype="int2")
    yield case("adam_amsgrad", bf16, lr_scale="rms", param_storage="master", state_dtype="bf16")
    yield case("signum", bf16, observes=True, caution="delayed", param_storage="stochastic", state_dtype="int8")
    yield case("mars_adamw-clipped", bf16, observes=True, param_storage="stochastic", state_dtype="int8")
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
        grain: bytes of an element.
        writable: whether kernels may write it.
        defined: whether they may read it before they have written it.
    """

    name: str
    address: int
    size: int
    streamed: bool
    grain: int
    writable: bool
    defined: bool


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
    """One launch of triton_kernels.

    Attributes:
        constants: of the kernel, the rule by its name.
        options: what the kernel is compiled with, beside them.
        grid: programs, in one dimension.
        arguments: the tensors that it gets, in order, and after them numbers of 32 bits.
        name: of the kernel.
    """

    constants: dict[str, Any]
    options: dict[str, Any]
    grid: int
    arguments: tuple[Tensor | int, ...]
    name: str = "update"

    @property
    def kernel(self) -> str:
        """What machine code depends on: launches of one kernel have the same."""
        return json.dumps([self.constants, self.name])


@dataclass(frozen=True)
class Compiled:
    """Machine code of a Triton kernel, and what a launch of it must know."""

    cubin: Path
    symbol: str
    threads: int
    dynamic_shared: int
    parameter_count: int

    def parameters(self, launch: TritonLaunch) -> bytes:
        """The kernel's parameters: addresses of tensors, and numbers, then null for scratch memory that is not used."""
        own = [x.data_ptr() if isinstance(x, Tensor) else x for x in launch.arguments]
        types = "".join("Q" if isinstance(x, Tensor) else "i" for x in launch.arguments)
        unused = self.parameter_count - len(own)
        return struct.pack(f"@{types}{unused}Q", *own, *[0] * unused)


def noted(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Tensor | int, ...], given: dict[str, Any]
) -> TritonLaunch:
    """The launch of a kernel, with what it is given by name."""
    constants = {name: value for name, value in given.items() if name in kernel.arg_names}
    if "RULE" in constants:
        constants["RULE"] = constants["RULE"].__name__
    options = {name: value for name, value in given.items() if name not in kernel.arg_names}
    (programs,) = grid
    return TritonLaunch(constants, options, programs, arguments, kernel.fn.__name__)


def compile_launches(launches: Sequence[TritonLaunch], target: str, folder: Path) -> dict[str, Compiled]:
    """Machine code of their kernels for NVIDIA's ``target`` ("sm_90"), by ``TritonLaunch.kernel``."""
    kernels = list(dict.fromkeys(launch.kernel for launch in launches))
    made = compile_triton([(target, *json.loads(kernel)) for kernel in kernels], folder)
    found = {}
    for kernel, path in zip(kernels, made, strict=True):
        told = json.loads(path.with_suffix(".json").read_text())
        symbol, threads = told["name"], 32 * told["num_warps"]
        declared = re.findall(rf"\.param \.[^\n]*\b{symbol}_param_\d+", path.with_suffix(".ptx").read_text())
        found[kernel] = Compiled(path.with_suffix(".cubin"), symbol, threads, told["shared"], len(declared))
    return found


def aligned(count: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """Uninitialized, so many elements after a 16-byte boundary: at 0 every access can be wide."""
    room = torch.empty(count + offset + 16, dtype=dtype)
    skipped = -room.data_ptr() % 16 // room.element_size() + offset
    return room[skipped : skipped + count]


def bits(tensor: Tensor) -> Tensor:
    """A copy of the bytes of a tensor, uint8."""
    return tensor.detach().clone().view(-1).view(torch.uint8)


def same_bits(ours: Tensor, theirs: Tensor, nan: Tensor | None = None) -> bool:
    """Whether two tensors have the same bytes, NaN aside: which of its many forms it has is nobody's business.

    Args:
        nan: where they are parts of something that is not a number, whose bits say nothing.
    """
    if ours.is_floating_point():
        nan = ours.isnan() & theirs.isnan()
    if nan is None or not nan.any():
        return torch.equal(bits(ours), bits(theirs))
    return torch.equal(bits(ours.detach()[~nan]), bits(theirs.detach()[~nan]))


#: Zeros of both signs, subnormals, what overflows in 16 bits or in sums, infinities, NaN.
SPECIALS = (0.0, -0.0, 1e-45, -1e-45, 1e-40, 6e-8, -6e-8, 3.4e38, -65504.0, torch.inf, -torch.inf, torch.nan)


@dataclass(eq=False)
class _Recorder:
    """The backend of a step that is recorded: it prepares as another does."""

    prepare_as: Callable[[Bucket, Callable[[int], Tensor]], Callable[[Sequence[ScalarSet]], None]]
    splits_formats: bool
    buckets: list[Bucket] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    launching: int = 0
    arrivals: list[Tensor] = field(default_factory=list)
    name: str = "recorder"

    def unusable(self, device: torch.device | None) -> None:
        """It serves every device."""

    def prepare(self, bucket: Bucket, grad: Callable[[int], Tensor]) -> Callable[[Sequence[ScalarSet]], None]:
        self.buckets.append(bucket)
        launch = self.prepare_as(bucket, grad)

        def take_notes(scalar_sets: Sequence[ScalarSet]) -> None:
            # An entry has tensors during a step alone, and of those without a gradient nothing may be touched.
            for entry, is_present in zip(bucket.entries, bucket.table.grads(), strict=True):
                if not is_present:
                    continue
                own = f"{entry.index}." if entry.index else ""
                self.add({f"{own}grad": grad(entry.index)}, streamed=True, writable=False)
                self.add({f"{own}param": entry.dense_param, f"{own}residual": entry.residual}, streamed=True)
                *moments, aux = entry.operands()
                self.add({f"{own}exp_avg": moments[0], f"{own}exp_avg_sq": moments[1]}, streamed=True)
                self.add({f"{own}aux": aux}, streamed=True, writable=not bucket.rule.reads_variance)
                self.add({f"{own}threshold_state": entry.threshold_state})
            self.launching = self.buckets.index(bucket)
            self.add({f"chunk_statistics{self.numbers()}": bucket.chunk_statistics})
            launch(scalar_sets)

        return take_notes

    def numbers(self) -> str:
        """What tells the tables of one bucket's launches from those of another's: nothing for the first."""
        return str(self.launching or "")

    def add(
        self,
        tensors: dict[str, Tensor | None],
        streamed: bool = False,
        writable: bool = True,
        defined: bool = True,
    ) -> None:
        """Adds the memory of tensors to what may be touched, but not of those that share it with an earlier one."""
        for name, tensor in tensors.items():
            if tensor is not None and tensor.numel() > 0:
                if name.startswith("arrivals"):
                    self.arrivals.append(tensor)
                size = tensor.numel() * tensor.element_size()
                if all(tensor.data_ptr() != region.address for region in self.regions):
                    facts = (streamed, tensor.element_size(), writable, defined)
                    self.regions.append(Region(name, tensor.data_ptr(), size, *facts))


class Step:
    """The third step of a case on pseudo-random data, but for its launches.

    :meth:`cuda` or :meth:`triton` takes it, once. Then the launches are executed, in order, by whoever can, and
    :meth:`unequal` compares with the same step of the CPU backend.

    Attributes:
        optimizers: that of the CPU backend, and ours.
        params: the parameters; ``param`` is the first of them.
        regions: all memory that the launches may touch, once they are made.
    """

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)

        def values(given: Given) -> Tensor:
            drawn = torch.randn(given.size, generator=generator)
            drawn[::101] = 0.0
            if given.specials and given.size:
                where = torch.randperm(given.size, generator=generator)[: 1 + given.size // 4]
                which = torch.randint(len(SPECIALS), where.shape, generator=generator)
                drawn[where] = torch.tensor(SPECIALS)[which]
            return drawn

        def pair(given: Given) -> list[torch.nn.Parameter]:
            dtype = given.dtype or case.dtype
            initial = values(given)
            params = [torch.nn.Parameter(aligned(given.size, dtype, given.offset).copy_(initial)) for _ in range(2)]
            if (given.grad_dtype or dtype) != dtype:
                for param in params:
                    param.grad_dtype = given.grad_dtype
            return params

        self.case = case
        self.regions: list[Region] = []
        self._buckets: list[Bucket] | None = None
        self._arrivals: list[Tensor] = []
        pairs = [pair(given) for given in case.given]
        optimizers = []
        for own in zip(*pairs, strict=True):
            groups: list[dict[str, Any]] = [
                {"params": [p for p, given in zip(own, case.given, strict=True) if given.group == number], **group}
                for number, group in enumerate(case.groups)
            ]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".* momentum with beta")
                optimizers.append(case.optimizer(groups, backend="cpu", **case.hyperparameters))
        for optimizer in optimizers if case.observes else ():
            optimizer.observe()
        for step in range(STEPS_BEFORE + 1):
            is_last = step == STEPS_BEFORE
            for given, params in zip(case.given, pairs, strict=True):
                gradient, variance = values(given), values(given).square_()
                dtype = given.grad_dtype or params[0].dtype
                for param in params:
                    is_absent = is_last and given.absent
                    own_gradient = aligned(given.size, dtype, given.grad_offset).copy_(gradient)
                    param.grad = None if is_absent else own_gradient
                    param.grad_variance = aligned(given.size, torch.float32).copy_(variance)
            for optimizer in optimizers[: 1 if is_last else 2]:
                optimizer.step()
        self._expected_params, self.params = ([own[i] for own in pairs] for i in range(2))
        self.param = self.params[0]
        self.optimizers = self._expected_optimizer, self.optimizer = tuple(optimizers)

    def tensors(self) -> dict[str, Tensor]:
        """The parameters and the tensors of their state, by name; of all but the first with a number before it."""
        return _tensors(self.params, self.optimizer)

    def expected(self) -> dict[str, Tensor]:
        """What the CPU backend has made of them, by name."""
        return _tensors(self._expected_params, self._expected_optimizer)

    def unequal(self) -> list[str]:
        """Names of those that are not, bit for bit, as the CPU backend has left them; "arrivals" where a count is left.

        "chunk_statistics" are sums of doubles in an order of the kernel's own, and may be off by 1e-12 of their value.
        """
        ours, theirs = self.tensors(), self.expected()
        assert ours.keys() == theirs.keys()
        found = []
        for name in ours:
            # The low bits of a parameter that is not a number say nothing.
            params = [each[name.replace("param_low", "param")] for each in (ours, theirs)]
            is_low = name.endswith("param_low") and params[0].shape == ours[name].shape
            nan = params[0].isnan() & params[1].isnan() if is_low else None
            if not same_bits(ours[name], theirs[name], nan):
                found.append(name)
        assert self._buckets is not None
        found += ["arrivals"] * any(bool(counts.any()) for counts in self._arrivals)
        if self.case.observes:
            expected = [bucket for bucket, _ in self._expected_optimizer.runtime.plan.launches]
            by_entry = [_statistics_of(buckets) for buckets in (self._buckets, expected)]
            assert by_entry[0].keys() == by_entry[1].keys()
            # An optimizer numbers parameters group by group.
            given = sorted(self.case.given, key=lambda given: given.group)
            for index, rows in by_entry[0].items():
                # Of those without a gradient they are what they were before.
                if not given[index].absent and not torch.allclose(
                    rows, by_entry[1][index], rtol=1e-12, atol=0, equal_nan=True
                ):
                    found.append(f"{index}.chunk_statistics" if index else "chunk_statistics")
        return found

    def begun_by_device(self) -> list[Bucket]:
        """The buckets of the steps before, where neither the optimizer nor a backend takes the step."""
        self._buckets = [bucket for bucket, _ in self.optimizer.runtime.plan.launches]
        return self._buckets

    def expected_step(self, grads: Sequence[Tensor | None]) -> None:
        """Another step of the CPU backend, with these gradients in the place of the parameters' own."""
        for param, grad in zip(self._expected_params, grads, strict=True):
            param.grad = grad
        self._expected_optimizer.step()

    def _take(self, recorder: _Recorder) -> None:
        assert self._buckets is None, "the step has been taken"
        with mock.patch.object(backends, "choose", lambda *_: recorder):
            # Another name than before, so that the optimizer chooses anew.
            for group in self.optimizer.param_groups:
                group["backend"] = "auto"
            self.optimizer.step()
        self.regions, self._buckets, self._arrivals = recorder.regions, recorder.buckets, recorder.arrivals

    def cuda(self, library: ctypes.CDLL) -> list[CudaLaunch]:
        """What the CUDA backend launches.

        Args:
            library: ``support.toolchain.cuda_launch_library``.

        Raises:
            RuntimeError: csrc/cuda/step.cu has no kernel for the step, or its data does not fit the parameters.
        """
        launches: list[CudaLaunch] = []
        kept: list[Tensor] = []
        backend = cuda_backend.CudaBackend()
        recorder = _Recorder(backend.prepare, backend.splits_formats)
        on_device = self.case.on_device

        def launch_cuda(
            table: Any,
            rule: int,
            threshold_pass: Any,
            scaling: Any,
            scalar_sets: Sequence[ScalarSet],
            *,
            device_step: int,
            device: int,
            stream: int,
            **addresses: int,
        ) -> None:
            assert device_step == 0
            named = {tensor.data_ptr(): tensor for tensor in kept}
            # What several launches have, each has its own of.
            number = recorder.numbers()
            for name, address in addresses.items():
                facts = {"writable": name != "device_table", "defined": name != "sums"}
                recorder.add({f"{name}{number}": named.get(address)}, **facts)
            kernels = rule, threshold_pass, scaling
            made = list(cuda_launches(library, table, kernels, scalar_sets, addresses, tuple(kept)))
            if on_device:
                made = [_with_step_on_device(library, launch) for launch in made]
                for launch in made:
                    recorder.add({f"step{len(launches)}": launch.keep[-1]}, writable=False)
            launches.extend(made)

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
        backend = TritonBackend()
        recorder = _Recorder(backend.prepare, backend.splits_formats)
        kernel = kernels.update

        class Notes:
            """In place of the kernel."""

            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                def run(*arguments: Tensor, **given: Any) -> None:
                    number = recorder.numbers()
                    for name, tensor in zip(TRITON_TENSORS, arguments, strict=True):
                        is_written = name in ("sums", "arrivals", "chunk_statistics")
                        facts = {"writable": is_written, "defined": name != "sums"}
                        recorder.add({f"{name}{number}": tensor}, **facts)
                    launches.append(noted(kernel, grid, arguments, given))

                return run

        with mock.patch.object(kernels, "update", Notes()):
            self._take(recorder)
        return launches


def _tensors(params: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {}
    for index, param in enumerate(params):
        own = f"{index}." if index else ""
        found[f"{own}param"] = param
        state = optimizer.state[param].items()
        found |= {f"{own}{name}": value for name, value in state if isinstance(value, Tensor)}
    return found


def _statistics_of(buckets: Sequence[Bucket]) -> dict[int, Tensor]:
    """The rows of each parameter's chunks, by its index."""
    found = {}
    for bucket in buckets:
        assert bucket.chunk_statistics is not None
        at = 0
        for entry in bucket.entries:
            chunks = -(-entry.numel // ELEMENTS)
            found[entry.index] = bucket.chunk_statistics[at : at + chunks]
            at += chunks
    return found


def _with_step_on_device(library: ctypes.CDLL, launch: CudaLaunch) -> CudaLaunch:
    """The launch as it is where the step's data does not fit the kernel's parameters."""
    own = launch.parameters[library.step_at() :]
    step = aligned(len(own), torch.uint8)
    step.copy_(torch.frombuffer(bytearray(own), dtype=torch.uint8))
    # Where the header has the address is asked of one that has an unlikely one.
    unlikely, message = 0x1122334455667788, ctypes.create_string_buffer(200)
    library.begin(1, 0, 0, 0)
    nothing, room = ctypes.c_void_p(None), ctypes.c_int64(len(message))
    assert library.launch_step(nothing, ctypes.c_int64(16), ctypes.c_void_p(unlikely), 0, message, room) == 0
    header = ctypes.string_at(library.launched_parameters(0), library.step_at())
    at = header.index(struct.pack("<Q", unlikely))
    address = struct.pack("<Q", step.data_ptr())
    parameters = launch.parameters[:at] + address + launch.parameters[at + 8 : library.step_at()] + b"\xa5" * len(own)
    return dataclasses.replace(launch, parameters=parameters, keep=(*launch.keep, step))


def cuda_launches(
    library: ctypes.CDLL,
    table: Any,
    kernels: tuple[int, Any, Any],
    scalar_sets: Sequence[ScalarSet] | None,
    addresses: dict[str, int],
    keep: tuple[Tensor, ...],
    device_step: int = 0,
) -> Iterator[CudaLaunch]:
    """What csrc/cuda/step.cu hands to the runtime, given what the backend hands to the module.

    Args:
        kernels: the rule's index, its threshold pass and scaling.
    """
    rule, threshold_pass, scaling = kernels
    count = len(table) if scalar_sets is None else len(scalar_sets)
    *offsets, size = _C.step_layout(tensors=len(table), scalar_sets=count)
    step = ctypes.create_string_buffer(size)
    if scalar_sets is not None:
        table.write_step(scalars=scalar_sets, address=ctypes.addressof(step))
    message = ctypes.create_string_buffer(200)
    library.begin(1, 0, 0, 0)
    failed = library.launch_table(
        *(rule, threshold_pass.value, scaling.value, ctypes.c_int64(len(table)), ctypes.c_int64(table.chunks)),
        *(ctypes.c_void_p(addresses["device_table"]), ctypes.c_int64(len(table.device_bytes()))),
        *(step, (ctypes.c_int64 * 4)(*offsets), ctypes.c_int64(count)),
        *(ctypes.c_void_p(addresses[name]) for name in ("sums", "arrivals", "chunk_statistics")),
        *(ctypes.c_void_p(device_step), message, ctypes.c_int64(len(message))),
    )
    if failed:
        raise RuntimeError(message.value.decode())
    own = b""
    if scalar_sets is not None and _C.build_info()["cuda"] is not None:
        room = ctypes.create_string_buffer(table.cuda_step_bytes(scalar_sets=len(scalar_sets)))
        table.write_cuda_step(scalars=scalar_sets, address=ctypes.addressof(room))
        own = room.raw
    functors = [*(FUNCTORS[name].struct for name in _C.RULES), ANY_RULE]
    for index in range(library.launches()):
        facts = (ctypes.c_int64 * 14)()
        assert library.launched_kernel(index, facts) == 0
        functor, which, storage, grid, threads, dynamic_shared, parameter_bytes, is_fixed, is_scaled, *numbers = facts
        forms = forms_of(tuple(numbers)) if is_fixed else None
        kernel = KernelName(functors[functor], THRESHOLD_PASSES[which], STORAGES[storage], forms, bool(is_scaled))
        parameters = ctypes.string_at(library.launched_parameters(index), parameter_bytes)
        assert parameters[library.step_at() :].startswith(own), "the module writes other step data"
        yield CudaLaunch(kernel, grid, threads, dynamic_shared, parameters, keep)
