"""A wrong kernel gets no timing: our backends against the reference, bit for bit, over awkward shapes.

`python -m bench.verify --backend cuda` is also what compute-sanitizer watches.
"""

import argparse
from collections.abc import Sequence

import torch

from .candidates import ours
from .harness import Candidate, Case, Workload

# one element, one short of a vector, one past a chunk, many dimensions, many at once
_CASE = Case("verify", ((1,), (7,), (64, 65), (16385,), (3, 5, 7), *((33,),) * 40), "odd lengths")


class _Verified(Workload):
    """The workload of `_CASE`, and a parameter that starts one element into its storage, off every alignment."""

    def __init__(self, dtype: torch.dtype, device: str):
        super().__init__(_CASE, dtype, device)
        generator = torch.Generator(device).manual_seed(1)
        p, g = (torch.randn(4098, dtype=dtype, device=device, generator=generator) for _ in range(2))
        self.params.append(torch.nn.Parameter(p[1:]))
        self.params[-1].grad = g[1:]


def after_steps(candidate: Candidate, dtype: torch.dtype, device: str, steps: int = 3) -> list[torch.Tensor]:
    work = _Verified(dtype, device)
    step = candidate.make(work)
    for _ in range(steps):
        step()
    return work.params


def verify(candidate: Candidate, dtype: torch.dtype, device: str) -> None:
    """Raises AssertionError where `candidate`, one of ours, differs from the reference backend."""
    (reference,) = ours("reference", candidate.optimizer)
    expected = after_steps(reference, dtype, device)
    for got, want in zip(after_steps(candidate, dtype, device), expected, strict=True):
        wrong = int((got != want).sum())
        what = f"{candidate.optimizer} on {candidate.backend}, {dtype}, shape {tuple(want.shape)}"
        assert not wrong, f"{what}: {wrong} of {want.numel()} values differ from the reference"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("cpu", "cuda", "triton"), default="cpu")
    backend = parser.parse_args(arguments).backend
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for candidate in ours(backend):
            verify(candidate, dtype, "cpu" if backend == "cpu" else "cuda")
            print(f"{candidate.optimizer} {backend} {dtype}: equal", flush=True)


if __name__ == "__main__":
    main()
