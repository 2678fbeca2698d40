"""Times every candidate on every workload of one device: `python -m bench.throughput --rows rows.jsonl`.

The results of a workload are appended as JSON lines at once, so a killed run loses only the workload it was at.
"""

import argparse
import gc
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .candidates import REFERENCES, plan
from .harness import PASSES, Samples, Spread, Trial, Workload, clock_for, row
from .verify import verify


def measure(device: str, seconds: float, quick: bool = False, passes: int = PASSES) -> Iterator[dict[str, Any]]:
    """Yields rows; for a candidate without one, its names and why (`error` or `left_out`).

    A workload's rows come together: its candidates take turns. One that the time limit cuts short keeps the passes that
    it had.
    """
    deadline = time.monotonic() + seconds
    clock = clock_for(device)
    per_turn = 0.02 if quick else 0.07 if device == "cuda" else 0.35
    for case, dtype, candidates in plan(device, quick):
        work = Workload(case, dtype, device) if time.monotonic() < deadline else None
        samples = [Samples() for _ in candidates]
        missing: dict[int, dict[str, str]] = {}
        host: dict[int, Spread] = {}
        for turn in range(1 if quick else passes):
            for i, candidate in enumerate(candidates):
                if i in missing:
                    continue
                if work is None or time.monotonic() > deadline:
                    if turn == 0:
                        missing[i] = {"left_out": f"the time limit of {seconds:.0f} s"}
                    continue
                try:
                    if turn == 0 and candidate.backend not in ("torch", "reference"):
                        verify(candidate.optimizer, candidate.backend, work.dtype)
                    trial = Trial(work, candidate, REFERENCES, clock)
                    trial.run(per_turn, samples[i])
                    if turn == 0 and device == "cuda" and case.name == "many_small":
                        host[i] = trial.host_cost()
                except Exception as error:
                    missing[i] = {"error": f"{type(error).__name__}: {error}"}
                trial = None
                gc.collect()  # its state goes before the next one's comes
        for i, candidate in enumerate(candidates):
            if i in missing:
                yield {
                    "case": case.name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "device": device,
                    "optimizer": candidate.optimizer,
                    "backend": candidate.backend,
                    **missing[i],
                }
            else:
                found: dict[str, Any] = dict(row(case, dtype, device, candidate, samples[i], clock))
                yield found | ({"host_seconds": host[i]} if i in host else {})
        del work


def _outcome(found: dict[str, Any]) -> str:
    return f"{found['to_stream']['median']:.3f} x stream, {found['to_adamw']['median']:.2f} x AdamW"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=200, help="start none after these")
    parser.add_argument("--passes", type=int, default=PASSES, help="turns of each candidate (default: %(default)s)")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    if options.quick:
        torch.set_num_threads(1)  # two that spin for each other crawl on a shared machine
    failed = False
    with options.rows.open("a") as file:
        for found in measure(options.device, options.seconds, options.quick, options.passes):
            failed |= "error" in found
            print(json.dumps(found), file=file, flush=True)
            names = [found[key] for key in ("case", "dtype", "optimizer", "backend")]
            print(*names, found.get("error") or found.get("left_out") or _outcome(found), sep=" | ", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
