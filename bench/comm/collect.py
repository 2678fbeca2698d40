"""What was measured, as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.comm.methods import ADAMW, ATTACKS, BY_KEY, METHODS, WORKERS_ATTACKED
from bench.comm.plan import Comparison
from bench.comm.training import Job
from experiments.convergence.search import SEARCH_SEED
from reporting import machine
from reporting.files import compact_json, rounded, write
from reporting.runs import Run, interval

WIRE, CONVERGENCE = "wire.json", "convergence.json"


def wire(report: Run, arguments: Sequence[str], folder: Path) -> None:
    """Bytes and times, with a line for each row."""
    rows = {key: report.pop(key) for key in ("wire", "times")}
    head = {**report, "command": machine.command("bench.comm", list(arguments))}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in rounded(head, 6).items()]
    for key, found in rounded(rows, 6).items():
        lines.append(f' "{key}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in found) + "\n ]")
    write(folder / WIRE, "{\n" + ",\n".join(lines) + "\n}\n")


def convergence(comparison: Comparison, folder: Path) -> None:
    """Losses of every method that has all its seeds, and of every attack that has."""
    methods: dict[str, Run] = {}
    attacks: dict[str, Run] = {}
    environments: list[Run] = []
    finished = 0
    seconds = 0.0
    for _, job in comparison.ready():
        if (run := comparison.get(job)) is not None:
            finished += 1
            seconds += run["seconds"]
            if run["environment"] not in environments:
                environments.append(run["environment"])
    if not environments:
        print("trainings: none is finished yet")
        return
    for method in METHODS:
        search = comparison.search(method)
        if search.best is None:
            continue
        jobs = comparison.honest(method, search.best)
        if (found := _entry(comparison, jobs)) is not None:
            methods[method.key] = {
                "label": method.label,
                "exchange": method.exchange,
                "worker_momentum": method.momentum,
                "optimizer": method.optimizer.__name__,
                "lr": search.best,
                "search": {f"{lr:g}": loss for lr, loss in sorted(search.losses.items())},
                **found,
            }
            if ADAMW in methods:
                pairs = zip(found["by_seed"], methods[ADAMW]["by_seed"], strict=True)
                methods[method.key]["minus_adamw"] = _interval([a - b for a, b in pairs])
        for attack in ATTACKS.get(method.key, ()):
            jobs = comparison.attacked(method, search.best, attack)
            if (found := _entry(comparison, jobs)) is not None:
                attacks[f"{method.key}.{attack.name}"] = {
                    "method": method.key,
                    "label": BY_KEY[method.key].label,
                    "adversaries": attack.adversaries,
                    "factor": attack.factor,
                    "lr": search.best,
                    **found,
                }
    where = environments[-1]
    content = {
        "machine": where["machine"],
        "versions": {
            **where["versions"],
            "signadam_ext": {"version": where["versions"]["signadam_ext"], "commit": where["commit"]},
        },
        "commits": sorted({str(each["commit"]) for each in environments}),
        "problem": {
            **comparison.problem.spec,
            "seeds": comparison.problem.seeds,
            "averaged": comparison.problem.average,
        },
        "parameters": _parameters(comparison),
        "workers": 4,
        "workers_attacked": WORKERS_ATTACKED,
        "search_seed": SEARCH_SEED,
        "expected_runs": comparison.progress()[1],
        "finished_runs": finished,
        "core_hours": seconds / 3600,
        "methods": methods,
        "attacks": attacks,
    }
    write(folder / CONVERGENCE, compact_json(rounded(content)))
    print(f"trainings: {finished} of {content['expected_runs']} are in {folder.name}/{CONVERGENCE}")


def _parameters(comparison: Comparison) -> int:
    return next(int(run["parameters"]) for _, job in comparison.ready() if (run := comparison.get(job)) is not None)


def _interval(values: Sequence[float]) -> Run | None:
    return interval(values) if all(map(math.isfinite, values)) else None


def _entry(comparison: Comparison, jobs: list[Job]) -> dict[str, Any] | None:
    """Losses by seed and their interval; None unless all runs are there."""
    values = comparison.finals(jobs)
    if values is None:
        return None
    runs = [run for job in jobs if (run := comparison.get(job)) is not None]
    return {
        "loss": _interval(values),
        "by_seed": values,
        "train": [run["train"] for run in runs],
        "validation": [run["validation"] for run in runs],
    }
