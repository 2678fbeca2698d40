"""Host time of a step on DTensors beside the same step on plain tensors: where tensors are small it is all there is.

python -m bench.sharded_step --out bench/results/sharded_step/cpu-amd-epyc.json

Two models of the same shapes, one under FSDP2 on a mesh of one process, take turns. Each turn is a real backward, which
makes new gradients, and then the step, which is timed; both models live in one process, so that neither finds its
objects in the caches.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bench.harness import spread, wall_clock
from reporting import machine
from reporting.files import write
from signadam_ext import SignAdamPP

#: Tensors, elements of each, and rounds.
CASES = ((1000, 64, 100), (148, 64, 300), (148, 4096, 300))
WARMUP = 3


class Products(torch.nn.Module):
    """Parameters of one size, each of which a backward gives a gradient."""

    def __init__(self, tensors: int, size: int):
        super().__init__()
        self.factors = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(size)) for _ in range(tensors)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([(factor * x).sum() for factor in self.factors]).sum()


def measure(tensors: int, size: int, rounds: int) -> dict[str, Any]:
    x = torch.randn(size)
    models = {"plain": Products(tensors, size), "sharded": Products(tensors, size)}
    fully_shard(models["sharded"], mesh=init_device_mesh("cpu", (1,)))
    optimizers = {kind: SignAdamPP(model.parameters(), lr=1e-3) for kind, model in models.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in models}
    for turn in range(WARMUP + rounds):
        for kind in sorted(models, reverse=turn % 2 == 1):
            optimizers[kind].zero_grad()
            models[kind](x).backward()
            elapsed = wall_clock(optimizers[kind].step)
            if turn >= WARMUP:
                seconds[kind].append(elapsed)
    return {
        "tensors": tensors,
        "size": size,
        "rounds": rounds,
        **{f"{kind}_seconds": spread(times) for kind, times in seconds.items()},
        "to_plain": spread([a / b for a, b in zip(seconds["sharded"], seconds["plain"], strict=True)]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="a few rounds of one small case")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # what is measured runs on one thread, and a second one that is woken hides it
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        rows = [measure(*case) for case in ([(5, 8, 4)] if options.quick else CASES)]
    finally:
        dist.destroy_process_group()
    for row in rows:
        print(row, flush=True)
    report = {
        **machine.facts(),
        "command": machine.command("bench.sharded_step", ["--out", str(options.out)]),
        "optimizer": "SignAdamPP, fp32, one thread",
        "rows": rows,
    }
    write(options.out, json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
