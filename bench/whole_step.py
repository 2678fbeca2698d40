"""Whole training steps of the example's GPT: forward, backward and the optimizer's step, beside that step alone.

The models take turns, one step each in every round: what a user waits for is the whole.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TypedDict

import torch

import signadam_ext
from reporting import machine

from .harness import Spread, spread, wall_clock

sys.path.insert(0, str(machine.ROOT / "examples"))
from gpt import GPT
from train_gpt import PRESETS, windows


class Row(TypedDict):
    """One optimizer. Times in seconds."""

    optimizer: str
    parameters: int
    tokens: int  # of one step
    seconds: Spread  # of the whole training step
    optimizer_seconds: Spread  # of the optimizer's step, within


def optimizers() -> dict[str, Callable[[torch.nn.Module], torch.optim.Optimizer]]:
    return {
        "AdamW fused": lambda model: torch.optim.AdamW(model.parameters(), fused=True),
        "SignAdamPP": lambda model: signadam_ext.SignAdamPP(model.parameters()),
        "Signum": lambda model: signadam_ext.Signum(model.parameters()),
    }


def measure(preset: str = "small", rounds: int = 60) -> list[Row]:
    """All optimizers, interleaved."""
    config = PRESETS[preset]
    data = torch.randint(256, (100_000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    starts = torch.arange(config.batch_size) * 1000
    batch = windows(data, starts, config.model.block_size)
    runs = []
    for name, make in optimizers().items():
        torch.manual_seed(0)
        model = GPT(config.model)
        runs.append((name, model, make(model)))
    whole: dict[str, list[float]] = {name: [] for name, *_ in runs}
    own: dict[str, list[float]] = {name: [] for name, *_ in runs}
    for i in range(rounds + 3):
        for name, model, optimizer in runs:
            before = wall_clock(lambda m=model, o=optimizer: (o.zero_grad(), m(*batch).backward()))
            step = wall_clock(optimizer.step)
            if i >= 3:  # the first ones allocate
                whole[name].append(before + step)
                own[name].append(step)
        runs.append(runs.pop(0))
    tokens = batch[0].numel()
    return [
        {
            "optimizer": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens": tokens,
            "seconds": spread(whole[name]),
            "optimizer_seconds": spread(own[name]),
        }
        for name, model, _ in sorted(runs, key=lambda run: list(whole).index(run[0]))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run")
    quick = parser.parse_args().quick
    print(json.dumps({"whole_steps": measure("tiny", rounds=3) if quick else measure()}))


if __name__ == "__main__":
    main()
