"""Times every candidate on every workload of one device: `python -m bench.throughput --rows rows.jsonl`.

Each result is appended as one JSON line at once, so a killed run loses only what it had not measured.
"""

import argparse
import gc
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .candidates import plan, references
from .harness import Candidate, Clock, Trial, Workload, clock_for
from .verify import verify


def measure(device: str, seconds: float, quick: bool = False) -> Iterator[dict[str, Any]]:
    """Yields rows; for a candidate without one, its names and why (`error` or `left_out`)."""
    deadline = time.monotonic() + seconds
    clock = clock_for(device)
    per_trial = 0.05 if quick else 0.25 if device == "cuda" else 1.3
    for case, dtype, candidates in plan(device, quick):
        work = Workload(case, dtype, device) if time.monotonic() < deadline else None
        for candidate in candidates:
            names = {
                "case": case.name,
                "dtype": str(dtype).removeprefix("torch."),
                "device": device,
                "optimizer": candidate.optimizer,
                "backend": candidate.backend,
            }
            if work is None or time.monotonic() > deadline:
                yield names | {"left_out": f"the time limit of {seconds:.0f} s"}
                continue
            try:
                yield _row(work, candidate, clock, per_trial)
            except Exception as error:
                yield names | {"error": f"{type(error).__name__}: {error}"}
            gc.collect()  # its state goes before the next one's comes
        del work


def _row(work: Workload, candidate: Candidate, clock: Clock, seconds: float) -> dict[str, Any]:
    if candidate.backend not in ("torch", "reference"):
        verify(candidate.optimizer, candidate.backend, work.dtype)
    trial = Trial(work, candidate, references(work.dtype), clock)
    row: dict[str, Any] = dict(trial.run(seconds))
    if work.device.type == "cuda" and work.case.name == "many_small":
        row["host_seconds"] = trial.host_cost()
    return row


def _outcome(row: dict[str, Any]) -> str:
    return f"{row['to_stream']['median']:.3f} x stream, {row['to_fused_adamw']['median']:.2f} x AdamW fused"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=200, help="start none after these")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    if options.quick:
        torch.set_num_threads(1)  # two that spin for each other crawl on a shared machine
    failed = False
    with options.rows.open("a") as file:
        for row in measure(options.device, options.seconds, options.quick):
            failed |= "error" in row
            print(json.dumps(row), file=file, flush=True)
            names = [row[key] for key in ("case", "dtype", "optimizer", "backend")]
            print(*names, row.get("error") or row.get("left_out") or _outcome(row), sep=" | ", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
