"""Steps of :mod:`support.launches`, executed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from support.launches import Compiled, CudaLaunch, Step, TritonLaunch, noted
from torch import Tensor

from .machine import Counts, Program
from .memory import Memory

#: By text and launch bounds: what is translated once serves all launches.
_programs: dict[tuple[str, int, int], Program] = {}


def program(text: str, threads: int, dynamic_shared: int = 0) -> Program:
    """The program of a kernel's text, the same one each time."""
    key = (text, threads, dynamic_shared)
    if key not in _programs:
        _programs[key] = Program(text, threads, dynamic_shared)
    return _programs[key]


def memory_of(step: Step) -> Memory:
    """All that the launches of a step may touch."""
    memory = Memory()
    for region in step.regions:
        facts: dict[str, Any] = {"writable": region.writable, "defined": region.defined, "streamed": region.streamed}
        memory.register(region.name, region.address, region.size, grain=region.grain, **facts)
    return memory


def run_cuda(
    step: Step, launches: Sequence[CudaLaunch], texts: Mapping[Any, str], counts: Counts | None = None, **how: Any
) -> None:
    """Executes launches of csrc/cuda, given the PTX of each kernel by its name."""
    memory = memory_of(step)
    for launch in launches:
        made = program(texts[launch.kernel], launch.threads, launch.dynamic_shared)
        made.run(launch.grid, launch.parameters, memory, counts=counts, **how)


def run_triton(
    step: Step,
    launches: Sequence[TritonLaunch],
    compiled: Mapping[str, Compiled],
    counts: Counts | None = None,
    **how: Any,
) -> None:
    """Executes launches of triton_kernels.update, given their machine code by ``TritonLaunch.kernel``."""
    memory = memory_of(step)
    for launch in launches:
        _run(launch, compiled[launch.kernel], memory, counts=counts, **how)


def _run(launch: TritonLaunch, code: Compiled, memory: Memory, **how: Any) -> None:
    text = code.cubin.with_suffix(".ptx").read_text()
    made = program(text, code.threads, code.dynamic_shared)
    made.run(launch.grid, code.parameters(launch), memory, **how)


#: What the kernels of triton_kernels write of their arguments.
WRITTEN = ("sums", "arrivals", "chunk_statistics", "totals", "out_grads", "out_rng_keys", "out_scalars")


class Emulated:
    """Stands in for a Triton kernel: a launch of it executes its PTX.

    Args:
        kernel: what it stands for.
        arguments: the names of what a launch gets beside constants and options, in order.
        compiled: machine code by ``TritonLaunch.kernel``.
        reached: by name what addresses in the arguments lead to, and whether this kernel may write it.
    """

    def __init__(
        self,
        kernel: Any,
        arguments: Sequence[str],
        compiled: Mapping[str, Compiled],
        reached: Callable[[], Mapping[str, tuple[Tensor, bool]]],
    ) -> None:
        self._kernel, self._arguments = kernel, arguments
        self._compiled, self._reached = compiled, reached

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: Tensor | int, **given: Any) -> None:
            launch = noted(self._kernel, grid, arguments, given)
            memory, seen = Memory(), set()
            own = {
                name: (tensor, name in WRITTEN)
                for name, tensor in zip(self._arguments, arguments, strict=True)
                if isinstance(tensor, Tensor)
            }
            for name, (tensor, writable) in (*own.items(), *self._reached().items()):
                # What a kernel has no use for is any of the others.
                if tensor.data_ptr() not in seen:
                    seen.add(tensor.data_ptr())
                    size, grain = tensor.numel() * tensor.element_size(), tensor.element_size()
                    facts: dict[str, Any] = {"writable": writable, "defined": name != "sums", "grain": grain}
                    memory.register(name, tensor.data_ptr(), size, **facts)
            _run(launch, self._compiled[launch.kernel], memory)

        return run
