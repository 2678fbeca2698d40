"""The command line, and the plan."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import experiments.recipe
from experiments import common
from experiments.convergence.training import Job, train
from experiments.recipe.candidates import ADAMW, Candidate
from experiments.recipe.halving import DESIGN, Design, Halving, agrees, quick, steps_of
from experiments.recipe.summary import collect
from reporting import machine, runs
from reporting.files import rounded, write
from reporting.runs import Run

RUNS = machine.ROOT / "experiments" / "out" / "recipe"
RESULTS = common.RESULTS / "recipe"


def plan(design: Design, steps: int = 40) -> Run:
    """The design, and what it will cost by a timed run of so many steps, which is not kept."""
    rule = next(rule for rule in design.rules if rule.key == ADAMW)
    problem = replace(design.rungs[0], spec=design.rungs[0].spec | {"steps": steps})
    with common.one_thread():
        start = time.process_time()
        run = train(Job(problem, Candidate(rule).method, rule.lr, design.seeds[0]))
        whole = time.process_time() - start
    each = run["seconds"] / steps
    expected = design.expected()
    return {
        "design": json.loads(json.dumps(design.describe())),
        "timed": {"steps": steps, "seconds_per_step": each, "seconds_beside": whole - run["seconds"]},
        "expected": {
            "runs": dict(zip(design.describe()["rungs"], expected, strict=True)),
            "steps": steps_of(design, expected),
            "minutes": (steps_of(design, expected) * each + sum(expected) * (whole - run["seconds"])) / 60,
        },
        **machine.facts(),
    }


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _worker(folder: Path, small: bool) -> None:
    halving = Halving(folder, quick() if small else DESIGN)
    sys.exit(min(runs.work(halving.ready, train), 100))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=experiments.recipe.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", action="store_true", help="write the plan, with the cost by a timed run, and stop")
    args = runs.parsed(parser, arguments, RUNS, RESULTS)
    design = quick() if args.quick else DESIGN
    kept = args.results.resolve() == RESULTS
    if kept and not args.collect:
        machine.require_commits([runs.environment()["commit"]])
    path, archive = args.results / "plan.json", args.results / "runs.tar.gz"
    if not args.quick:
        runs.unpack(archive, args.runs)
    halving = Halving(args.runs, design)
    done, total = halving.progress()
    if args.plan or args.quick:
        if done and not args.quick:
            parser.error("there are runs already: a plan is written before the first one")
        args.results.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(rounded(plan(design, 4 if args.quick else 40)), indent=1) + "\n")
    planned = _read(path)
    if planned is None:
        parser.error("there is no plan: write it first, with --plan")
    if not agrees(planned, design):
        parser.error(f"{path.name} says something else than this program, and was there first")
    print(
        f"{done} of about {total} runs are done, {halving.minutes():.1f} of {design.minutes:g} minutes spent; "
        f"the plan expects {planned['expected']['minutes']:.0f}",
        flush=True,
    )
    if args.list or args.plan:
        return 0
    failed = 0
    if not args.collect:
        failed = runs.supervise(
            _worker, (args.runs, args.quick), args.workers, halving.progress, 0.5 if args.quick else 3
        )
    if kept:
        stored = [store.folder / f"{job.name}.json" for store, job in halving.known() if store.get(job) is not None]
        runs.pack(args.runs, stored, archive)  # which refuses runs of unknown code, before anything else is written
    shown = machine.command("experiments.recipe", ["--quick"] if args.quick else [])
    collect(halving, planned, args.results, shown)
    return 1 if failed else 0
