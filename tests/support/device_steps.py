"""Steps that the device begins, without one: the arrays of a bucket, and the launches of csrc/cuda/device_step.cu."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from support.launches import CudaLaunch, Step, aligned, cuda_launches
from support.ptx import Memory
from support.ptx.steps import program
from torch import Tensor

from reporting.machine_code import BeginKernelName
from signadam_ext import _C
from signadam_ext.backends import Bucket, ScalarSet
from signadam_ext.core.hyperparameters import checked
from signadam_ext.core.program import pack_operations, pack_rows, program_of
from signadam_ext.core.rule import rule_of

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
        library.device_step_sizes(*self._table(), sizes)
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

    def _table(self) -> tuple[Any, ...]:
        table = self.bucket.table
        return (
            *(ctypes.c_int64(len(table)), ctypes.c_int64(table.chunks)),
            *(ctypes.c_void_p(self.table.data_ptr()), ctypes.c_int64(self.table.numel())),
        )

    def _launched(self, launch: Any, tensors: Sequence[Tensor], *numbers: int) -> list[BeginLaunch]:
        message = ctypes.create_string_buffer(200)
        self.library.begin(1, 0, 0, 0)
        addresses = (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
        failed = launch(*self._table(), *addresses, *numbers, message, ctypes.c_int64(len(message)))
        assert not failed, message.value
        found = []
        self.library.launched_parameters.restype = ctypes.c_void_p
        for index in range(self.library.launches()):
            facts = (ctypes.c_int64 * 4)()
            assert self.library.launched_begin(index, facts) == 0
            kernel, grid, threads, size = facts
            parameters = ctypes.string_at(self.library.launched_parameters(index), size)
            found.append(BeginLaunch(KERNELS[kernel], grid, threads, parameters))
        return found

    def norm(self) -> list[BeginLaunch]:
        own = (self.grads, self.square_sums, self.square_arrivals, self.totals, self.places)
        return self._launched(self.library.launch_table_norm, own)

    def begin(self) -> list[BeginLaunch]:
        own = (self.entries, self.operations, self.results, self.values, self.control, self.grads, self.step)
        return self._launched(self.library.launch_table_begin, own, self.operations.shape[1], self.values.shape[1])

    def update(self, scalar_sets: Sequence[ScalarSet] | None = None) -> list[CudaLaunch]:
        """On what ``begin`` has left, or on the data of a step that the host has begun."""
        rule = self.bucket.rule
        addresses = {name: getattr(self, name).data_ptr() for name in ("sums", "arrivals")}
        addresses |= {"device_table": self.table.data_ptr(), "chunk_statistics": 0}
        threshold_pass = getattr(_C.ThresholdPass, rule.threshold_pass)
        own = (self.library, self.bucket.table, _C.RULES.index(rule.name), threshold_pass, scalar_sets, addresses, ())
        return list(cuda_launches(*own, device_step=self.step.data_ptr() if scalar_sets is None else 0))


def execute(launches: Sequence[BeginLaunch | CudaLaunch], texts: Mapping[Any, str], memory: Memory, **how: Any) -> None:
    """Runs launches in order, given the PTX of each kernel by its name."""
    for launch in launches:
        program(texts[launch.kernel], launch.threads).run(launch.grid, launch.parameters, memory, **how)
