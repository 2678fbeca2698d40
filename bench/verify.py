"""A wrong kernel gets no timing: our backends against the reference on the CPU, bit for bit, over awkward shapes.

`python -m bench.verify --backend cuda` is also what compute-sanitizer watches.
"""

import argparse
import functools
import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from .candidates import field, later, ours, stored
from .harness import Case, Workload

# one element, one short of a vector, one past a chunk, several dimensions, many at once
_CASE = Case("verify", ((1,), (7,), (64, 65), (16385,), (3, 5, 7), *((33,),) * 40), "odd lengths")


def _off_alignment(tensor: Tensor) -> Tensor:
    """The same values, starting one element into their storage."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:]


def after_steps(optimizer: str, backend: str, dtype: torch.dtype, steps: int = 3) -> list[Tensor]:
    """Parameters after some steps from the same start on every backend; the last one is off every alignment."""
    device = "cuda" if backend in ("cuda", "triton") else "cpu"
    work = Workload(_CASE, dtype, "cpu")
    start = [(p.detach().to(device), p.grad.to(device)) for p in work.params if p.grad is not None]
    p, g = start[2]
    start.append((_off_alignment(p), _off_alignment(g)))
    work.params = [torch.nn.Parameter(p) for p, _ in start]
    for parameter, (_, grad) in zip(work.params, start, strict=True):
        parameter.grad = grad
    (candidate,) = [one for make in (ours, field, later, stored) for one in make(backend, optimizer)]
    step = candidate.make(work)
    for _ in range(steps):
        step()
    return [p.detach().cpu() for p in work.params]


@functools.cache
def expected(optimizer: str, dtype: torch.dtype) -> list[Tensor]:
    return after_steps(optimizer, "reference", dtype)


@functools.cache
def verify(optimizer: str, backend: str, dtype: torch.dtype) -> None:
    """Raises AssertionError where one of our optimizers differs from the reference."""
    for got, want in zip(after_steps(optimizer, backend, dtype), expected(optimizer, dtype), strict=True):
        wrong = int((got != want).sum())
        what = f"{optimizer} on {backend}, {dtype}, shape {tuple(want.shape)}"
        assert not wrong, f"{what}: {wrong} of {want.numel()} values differ from the reference"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("cpu", "cuda", "triton"), default="cpu")
    parser.add_argument("--few", action="store_true", help="each optimizer with one dtype, in turn")
    parser.add_argument("--only", action="append", metavar="OPTIMIZER", help="this one, by its label; repeatable")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin none after these")
    options = parser.parse_args(arguments)
    backend, dtypes = options.backend, (torch.float32, torch.bfloat16, torch.float16)
    candidates = [*ours(backend), *field(backend), *stored(backend)]
    if unknown := {*(options.only or ())} - {candidate.optimizer for candidate in candidates}:
        parser.error(f"no optimizer {', '.join(sorted(unknown))}")
    deadline, equal, left = time.monotonic() + options.seconds, 0, 0
    for number, candidate in enumerate(candidates):
        if options.only and candidate.optimizer not in options.only:
            continue
        for dtype in dtypes[number % 3 :][:1] if options.few else dtypes:
            if time.monotonic() > deadline:
                left += 1
                continue
            verify(candidate.optimizer, backend, dtype)
            equal += 1
            print(f"{candidate.optimizer} {backend} {dtype}: equal", flush=True)
    print(f"{equal} equal to the reference" + f", {left} left out after {options.seconds:.0f} s" * (left > 0))


if __name__ == "__main__":
    main()
