"""Steps that the device begins, without one: the arrays of a bucket, and the launches of csrc/cuda/device_step.cu."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from support.launches import CudaLaunch, Step, aligned, cuda_launches
from support.ptx import Memory
from support.ptx.steps import program
from torch import Tensor

from reporting.machine_code import BeginKernelName
from signadam_ext import _C
from signadam_ext.backends import Bucket, ScalarSet
from signadam_ext.backends import cuda as cuda_backend
from signadam_ext.core.hyperparameters import checked
from signadam_ext.core.program import pack_operations, pack_rows, program_of
from signadam_ext.core.rule import rule_of
from signadam_ext.engine.device_steps import DeviceSteps

#: In the order of ``device_step_kernels`` of csrc/cuda/device_step.h.
KERNELS = (BeginKernelName("norm"), BeginKernelName("begin"))


@dataclass(frozen=True)
class BeginLaunch:
    """One launch of a kernel that begins a step."""

    kernel: BeginKernelName
    grid: int
    threads: int
    parameters: bytes


def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    return aligned(count, dtype).zero_().view(shape)


def filled(x: Tensor) -> Tensor:
    return zeros(*x.shape, dtype=x.dtype).copy_(x)


class DeviceBegun:
    """A bucket on a device, which are this process and its memory: what is there once, and what a step brings.

    Attributes:
        grads: addresses of the gradients, int64, 0: takes no part.
        values: rows of the groups.
        control: what gradients are multiplied by, and whether the step is skipped.
        step: the step's data, as ``begin`` leaves it.
        drawing: tensors that draw random bits, all or none.
        scalars_size: bytes of the scalars of one tensor.
        totals: the sums of squares, in the opposite order of the tensors.
    """

    def __init__(self, library: ctypes.CDLL, bucket: Bucket, step: Step) -> None:
        self.library, self.bucket, self.source = library, bucket, step
        optimizer = step.optimizer
        self.params = [param for group in optimizer.param_groups for param in group["params"]]
        self.params = [self.params[entry.index] for entry in bucket.entries]
        self.counts = [optimizer.state[param]["step"] for param in self.params]
        table = bucket.table
        own = table.device_bytes()
        self.table = aligned(len(own), torch.uint8).copy_(torch.frombuffer(bytearray(own), dtype=torch.uint8))
        tensors = len(table)
        groups = self.groups()
        self.programs = [program_of(rule_of(type(optimizer), group), group) for group in groups]
        kinds = list(dict.fromkeys(self.programs))
        self.operations, self.results = map(filled, pack_operations(kinds))
        self.values = filled(pack_rows(self.programs, groups))
        signed = [entry.seed - (entry.seed >> 63 << 64) for entry in bucket.entries]
        rows = [
            (count.data_ptr(), seed, entry.param_id, kinds.index(self.programs[entry.group]), entry.group)
            for count, seed, entry in zip(self.counts, signed, bucket.entries, strict=True)
        ]
        self.entries = filled(torch.tensor(rows, dtype=torch.int64))
        self.control = filled(torch.tensor([1.0, 0.0], dtype=torch.float64))
        self.grads = zeros(tensors, dtype=torch.int64)
        self.point_at_gradients()
        sizes = (ctypes.c_int64 * 3)()
        library.device_step_sizes(*_table(table, self.table.data_ptr()), sizes)
        self.drawing, self.scalars_size, size = sizes
        self.step = zeros(size, dtype=torch.uint8).fill_(0xA5)
        self.totals = zeros(tensors, dtype=torch.float64)
        self.places = filled(torch.arange(tensors - 1, -1, -1, dtype=torch.int32))
        self.square_sums = zeros(table.chunks, dtype=torch.float64)
        self.square_arrivals = zeros(tensors, dtype=torch.int32)
        gathers = bucket.rule.threshold_pass != "NONE"
        self.sums = zeros(2 * table.chunks if gathers else 0, dtype=torch.float64)
        self.arrivals = zeros(tensors if gathers else 0, dtype=torch.int32)

    def groups(self) -> list[dict[str, Any]]:
        return [checked(type(self.source.optimizer), group) for group in self.source.optimizer.param_groups]

    def point_at_gradients(self) -> None:
        # Of a gradient without elements torch says 0; the reader gives it an address, which nobody follows.
        addresses = [0 if param.grad is None else param.grad.data_ptr() or 1 for param in self.params]
        self.grads.copy_(torch.tensor(addresses, dtype=torch.int64))

    def fill_values(self) -> None:
        """What the host hands in at each step."""
        self.values.copy_(pack_rows(self.programs, self.groups()))

    def memory(self) -> Memory:
        """All that the launches may touch."""
        memory = Memory()

        def add(tensors: Mapping[str, Tensor | None], **facts: Any) -> None:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.numel() > 0:
                    size = tensor.numel() * tensor.element_size()
                    memory.register(name, tensor.data_ptr(), size, grain=tensor.element_size(), **facts)

        read = ("table", "operations", "results", "values", "entries", "control", "grads", "places")
        add({name: getattr(self, name) for name in read}, writable=False)
        add({name: getattr(self, name) for name in ("totals", "square_arrivals", "arrivals")})
        add({name: getattr(self, name) for name in ("square_sums", "sums")}, defined=False)
        # Keys are read of tensors without a gradient as well, and not used.
        keys = len(self.params) * (self.scalars_size + 8)
        indices = keys + self.drawing * 8
        add({"step": self.step[:keys], "scalar indices of step": self.step[indices:]}, defined=False)
        add({"keys of step": self.step[keys:indices]})
        state = self.source.optimizer.state
        for index, param in enumerate(self.params):
            if self.grads[index] == 0:
                continue
            add({f"{index}.grad": param.grad}, writable=False, streamed=True)
            own = {name: x for name, x in state[param].items() if isinstance(x, Tensor)}
            add({f"{index}.param": param.detach(), **{f"{index}.{name}": x for name, x in own.items()}})
        return memory

    def norm(self) -> list[BeginLaunch]:
        own = {"sums": self.square_sums, "arrivals": self.square_arrivals, "totals": self.totals, "places": self.places}
        own |= {"device_table": self.table, "grads": self.grads}
        addresses = {name: tensor.data_ptr() for name, tensor in own.items()}
        return norm_launches(self.library, self.bucket.table, **addresses)

    def begin(self) -> list[BeginLaunch]:
        own = {name: getattr(self, name) for name in ("entries", "results", "values", "control", "grads", "step")}
        addresses = {name: tensor.data_ptr() for name, tensor in own.items()}
        lengths = {"program_length": self.operations.shape[1], "row_length": self.values.shape[1]}
        addresses["programs"] = self.operations.data_ptr()
        return begin_launches(self.library, self.bucket.table, self.table.data_ptr(), **addresses, **lengths)

    def update(self, scalar_sets: Sequence[ScalarSet] | None = None) -> list[CudaLaunch]:
        """On what ``begin`` has left, or on the data of a step that the host has begun."""
        rule = self.bucket.rule
        addresses = {name: getattr(self, name).data_ptr() for name in ("sums", "arrivals")}
        addresses |= {"device_table": self.table.data_ptr(), "chunk_statistics": 0}
        kernels = (
            _C.RULES.index(rule.name),
            getattr(_C.ThresholdPass, rule.threshold_pass),
            cuda_backend.SCALINGS[rule.update_scale],
        )
        own = (self.library, self.bucket.table, kernels, scalar_sets, addresses, ())
        return list(cuda_launches(*own, device_step=self.step.data_ptr() if scalar_sets is None else 0))


def _table(table: Any, address: int) -> tuple[Any, ...]:
    return (
        *(ctypes.c_int64(len(table)), ctypes.c_int64(table.chunks)),
        *(ctypes.c_void_p(address), ctypes.c_int64(len(table.device_bytes()))),
    )


def _launched(library: ctypes.CDLL, launch: Any, *arguments: Any) -> list[BeginLaunch]:
    message = ctypes.create_string_buffer(200)
    library.begin(1, 0, 0, 0)
    assert not launch(*arguments, message, ctypes.c_int64(len(message))), message.value
    found = []
    for index in range(library.launches()):
        facts = (ctypes.c_int64 * 4)()
        assert library.launched_begin(index, facts) == 0
        kernel, grid, threads, size = facts
        parameters = ctypes.string_at(library.launched_parameters(index), size)
        found.append(BeginLaunch(KERNELS[kernel], grid, threads, parameters))
    return found


def norm_launches(library: ctypes.CDLL, table: Any, *, device_table: int, **addresses: int) -> list[BeginLaunch]:
    """What ``Table.launch_cuda_norm`` hands to the runtime."""
    own = (ctypes.c_void_p(addresses[name]) for name in ("grads", "sums", "arrivals", "totals", "places"))
    return _launched(library, library.launch_table_norm, *_table(table, device_table), *own)


def begin_launches(
    library: ctypes.CDLL, table: Any, device_table: int, *, program_length: int, row_length: int, **addresses: int
) -> list[BeginLaunch]:
    """What ``Table.launch_cuda_begin`` hands to the runtime; ``device_table`` tells who draws random bits."""
    names = ("entries", "programs", "results", "values", "control", "grads", "step")
    own = (*(ctypes.c_void_p(addresses[name]) for name in names), program_length, row_length)
    return _launched(library, library.launch_table_begin, *_table(table, device_table), *own)


def execute(launches: Sequence[BeginLaunch | CudaLaunch], texts: Mapping[Any, str], memory: Memory, **how: Any) -> None:
    """Runs launches in order, given the PTX of each kernel by its name."""
    for launch in launches:
        program(texts[launch.kernel], launch.threads).run(launch.grid, launch.parameters, memory, **how)


@contextlib.contextmanager
def emulated_cuda(
    library: ctypes.CDLL, texts: Mapping[Any, str], optimizer: torch.optim.Optimizer
) -> Iterator[list[str]]:
    """Steps of an optimizer whose backend is "cuda" begin and run on tensors of the CPU: its launches are executed.

    Yields:
        Names of the launched kernels, in order.
    """
    launched: list[str] = []

    made: list[DeviceSteps] = []
    make = DeviceSteps.__init__

    def note(steps: DeviceSteps, *arguments: Any) -> None:
        make(steps, *arguments)
        made.append(steps)

    def memory() -> Memory:
        steps = made[-1]
        tensors = [tensor for guard in steps._guards for tensor in guard.tensors]
        for own in steps.buckets:
            tensors += own._guard.tensors
            for entry in own.bucket.entries:  # which have their state at the first step, when nobody else has it
                tensors += [
                    x for x in (*entry.moments, entry.residual, entry.threshold_state, entry.step) if x is not None
                ]
        for group in optimizer.param_groups:
            for param in group["params"]:
                tensors += [param.detach(), *([] if param.grad is None else [param.grad])]
                tensors += [x for x in optimizer.state.get(param, {}).values() if isinstance(x, Tensor)]
        found = Memory()
        for address, tensor in {tensor.data_ptr(): tensor for tensor in tensors if tensor.numel() > 0}.items():
            size = tensor.numel() * tensor.element_size()
            found.register(f"memory at {address}", address, size, grain=tensor.element_size())
        return found

    def run(launches: Sequence[BeginLaunch | CudaLaunch]) -> None:
        launched.extend(getattr(launch.kernel, "part", "update") for launch in launches)
        execute(launches, texts, memory())

    def norm(table: Any, *, device: int, stream: int, **addresses: int) -> None:
        run(norm_launches(library, table, **addresses))

    def begin(table: Any, *, device: int, stream: int, **own: int) -> None:
        host = ctypes.create_string_buffer(table.device_bytes())
        run(begin_launches(library, table, ctypes.addressof(host), **own))

    def update(
        table: Any,
        rule: int,
        threshold_pass: Any,
        scaling: Any,
        scalar_sets: None,
        *,
        device_step: int,
        device: int,
        stream: int,
        **addresses: int,
    ) -> None:
        own = (library, table, (rule, threshold_pass, scaling), scalar_sets, addresses, ())
        run(list(cuda_launches(*own, device_step=device_step)))

    with contextlib.ExitStack() as patches:
        backend = cuda_backend.CudaBackend
        patches.enter_context(mock.patch.object(backend, "unusable", lambda self, device: None))
        patches.enter_context(
            mock.patch.object(cuda_backend.DeviceStep, "_stream", lambda self: {"device": 0, "stream": 0})
        )
        patches.enter_context(mock.patch.object(DeviceSteps, "__init__", note))
        for name, own in (("launch_cuda_norm", norm), ("launch_cuda_begin", begin), ("launch_cuda", update)):
            patches.enter_context(mock.patch.object(_C.Table, name, own))
        yield launched
