"""Compiles the Triton kernels of the GPU benchmark ahead of it, in several processes: `python -m bench.ahead`.

Each takes a step of some optimizers on few elements, since kernels depend on dtypes and storage, not on sizes. What
they compile lies where TRITON_CACHE_DIR says, for whoever measures later.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from reporting.machine import ROOT

from .candidates import Candidate, plan
from .harness import Case, Workload, synchronize

_FEW = Case("few", ((33,),), "1 x 33")


def kernels() -> list[tuple[torch.dtype, Candidate]]:
    """The Triton candidates of the benchmark, each with each of its dtypes once."""
    found = {}
    for _, dtype, candidates in plan("cuda", quick=True):
        found |= {(dtype, c.optimizer): (dtype, c) for c in candidates if c.backend == "triton"}
    return list(found.values())


def compile_part(part: int, of: int, device: str, deadline: float) -> tuple[int, int]:
    """Steps of every ``of``-th candidate: how many were taken, and how many there was no time for."""
    done = left = 0
    for dtype, candidate in kernels()[part::of]:
        if time.monotonic() > deadline:
            left += 1
            continue
        work = Workload(_FEW, dtype, device)
        candidate.make(work)()
        synchronize(work.device)
        done += 1
    return done, left


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: where Triton interprets")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60, help="begin none after these")
    parser.add_argument("--part", type=int, help="of the processes, the one that this is")
    options = parser.parse_args(arguments)
    if options.part is not None:
        done, left = compile_part(options.part, options.processes, options.device, time.monotonic() + options.seconds)
        print(done, left)
        return 0
    own = ["--device", options.device, "--processes", str(options.processes), "--seconds", str(options.seconds)]
    command = [sys.executable, "-m", "bench.ahead", *own, "--part"]
    children = [
        subprocess.Popen([*command, str(part)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for part in range(options.processes)
    ]
    told = [child.communicate()[0].split()[-2:] for child in children]
    failed = sum(child.returncode != 0 for child in children)
    done, left = (sum(int(pair[i]) for pair in told if len(pair) == 2) for i in (0, 1))
    print(f"{done} kernels' steps taken by {options.processes} processes, {left} left out, {failed} processes failed")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
