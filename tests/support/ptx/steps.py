"""Steps of :mod:`support.launches`, executed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from support.launches import Compiled, CudaLaunch, Step, TritonLaunch

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
        code = compiled[launch.kernel]
        text = code.cubin.with_suffix(".ptx").read_text()
        made = program(text, code.threads, code.dynamic_shared)
        made.run(launch.grid, code.parameters(launch), memory, counts=counts, **how)
