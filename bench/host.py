"""What a step costs beside the memory it moves, by number of tensors: `python -m bench.host --device cuda`.

Of each backend the first step (which loads or compiles kernels and makes the plan), the host's time of a call that
does not wait for the device, the kernels' time as the profiler has it, and the bytes of step data that a launch takes
along, in the kernel's parameters or by a copy. Tensors of 64 elements, so that hardly anything else is in it.
"""

import argparse
import json
import time
from collections.abc import Sequence
from statistics import median
from typing import Any, TypedDict

import torch

import signadam_ext
from signadam_ext.core.native import compiled as _C

from .harness import Case, Spread, Step, Workload, many_small, spread, synchronize, wall_clock

COUNTS = (1, 148, 1000, 3000)
QUICK_COUNTS = (1, 20)


class Row(TypedDict):
    """One backend with one number of tensors. Times in seconds."""

    backend: str
    tensors: int
    first_seconds: float  # with the wait for the device
    host_seconds: Spread
    kernel_seconds: float | None  # all kernels of a step; None where the profiler sees no device
    step_bytes: int | None  # of the data that a step sends to the device
    in_parameters: bool | None  # whether they travel in the kernel's parameters


def kernel_seconds(step: Step, rounds: int) -> float | None:
    """The median over some steps of the time that their kernels run, copies apart."""
    if not torch.cuda.is_available():
        return None
    from torch.profiler import ProfilerActivity, profile

    totals = []
    for _ in range(rounds):
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            step()
            torch.cuda.synchronize()
        found = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [event for event in found if not event.name.startswith(("Memcpy", "Memset"))]
        if kernels:
            totals.append(sum(event.time_range.elapsed_us() for event in kernels) / 1e6)
    return median(totals) if totals else None


def step_data(optimizer: Any, backend: str) -> tuple[int | None, bool | None]:
    """Bytes of step data of the optimizer's only launch, and whether they fit the kernel's parameters."""
    ((bucket, _),) = optimizer.runtime.plan.launches
    if backend == "triton":
        from signadam_ext.backends.triton import step_bytes

        return step_bytes(len(bucket.table), 1), False
    if backend == "cuda":
        size = bucket.table.cuda_step_bytes(scalar_sets=1)
        return size, size <= _C.cuda_inline_capacity()
    return None, None


def measure(backend: str, case: Case, device: str, rounds: int) -> Row:
    work = Workload(case, torch.float32, device)
    optimizer = signadam_ext.SignAdamPP(work.params, backend=backend)
    synchronize(work.device)
    begin = time.perf_counter()
    optimizer.step()
    synchronize(work.device)
    first = time.perf_counter() - begin
    times = []
    for _ in range(rounds):
        synchronize(work.device)
        times.append(wall_clock(optimizer.step))
    synchronize(work.device)
    size, fits = step_data(optimizer, backend)
    return {
        "backend": backend,
        "tensors": len(case.shapes),
        "first_seconds": first,
        "host_seconds": spread(times),
        "kernel_seconds": kernel_seconds(optimizer.step, min(rounds, 10)),
        "step_bytes": size,
        "in_parameters": fits,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for backend in ("cuda", "triton") if options.device == "cuda" else ("cpu",):
        for count in QUICK_COUNTS if options.quick else COUNTS:
            rows.append(measure(backend, many_small(count), options.device, 5 if options.quick else 100))
    print(json.dumps({"host": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
