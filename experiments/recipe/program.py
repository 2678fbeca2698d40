"""The command line, and the plans."""

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
from experiments.convergence.training import Job, Problem, train
from experiments.recipe import halving, proof_summary, summary
from experiments.recipe import proof as proofs
from experiments.recipe.candidates import ADAMW, Candidate
from experiments.recipe.halving import DESIGN, Halving
from experiments.recipe.proof import Proof, design_after
from experiments.recipe.stage import Planned, agrees
from reporting import machine, runs
from reporting.files import rounded, write
from reporting.runs import Run

RUNS = machine.ROOT / "experiments" / "out" / "recipe"
RESULTS = common.RESULTS / "recipe"


def timed(problem: Problem, contender: Candidate, lr: float, steps: int) -> tuple[float, float]:
    """Seconds of a step, and of what a run needs beside its steps, by a run that is not kept."""
    spec = problem.spec | {"steps": steps}
    with common.one_thread():
        start = time.process_time()
        run = train(Job(replace(problem, spec=spec, average=1, evaluations=1), contender.method, lr, 0))
        whole = time.process_time() - start
    return run["seconds"] / steps, whole - run["seconds"]


def plan(design: Planned, steps: int = 40) -> Run:
    """The design, and what it will cost by AdamW's timed runs of so many steps, one of each size of a model."""
    rule = next(rule for rule in DESIGN.rules if rule.key == ADAMW)
    costs: dict[str, tuple[float, float]] = {}
    seconds, expected = 0.0, design.expected()
    for problem, count in expected.values():
        size = json.dumps(problem.spec["model"])
        if size not in costs:
            costs[size] = timed(problem, Candidate(rule), rule.lr, steps)
        each, beside = costs[size]
        seconds += count * (problem.steps * each + beside)
    return {
        "design": json.loads(json.dumps(design.describe())),
        "timed": {"steps": steps, "seconds_per_step": [each for each, _ in costs.values()]},
        "expected": {
            "runs": {name: count for name, (_, count) in expected.items()},
            "steps": sum(count * problem.steps for problem, count in expected.values()),
            "minutes": seconds / 60,
        },
        **machine.facts(),
    }


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def search(folder: Path, small: bool) -> Halving:
    return Halving(folder, halving.quick() if small else DESIGN)


def proof(folder: Path, small: bool) -> Proof | None:
    """Stage 2; None before stage 1 is over."""
    design = design_after(search(folder, small))
    if design is None:
        return None
    return Proof(folder, proofs.quick(design) if small else design)


def _worker(folder: Path, small: bool, second: bool) -> None:
    stage = proof(folder, small) if second else search(folder, small)
    sys.exit(0 if stage is None else min(runs.work(stage.ready, train), 100))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=experiments.recipe.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--plan", action="store_true", help="write the plan of the stage to come, with its cost by timed runs, and stop"
    )
    args = runs.parsed(parser, arguments, RUNS, RESULTS)
    kept = args.results.resolve() == RESULTS
    if kept and not args.collect:
        machine.require_commits([runs.environment()["commit"]])
    archive = args.results / "runs.tar.gz"
    if not args.quick:
        runs.unpack(archive, args.runs)
    failed, stages = 0, []
    for second, page in enumerate((summary, proof_summary)):
        stage = proof(args.runs, args.quick) if second else search(args.runs, args.quick)
        if stage is None:
            break  # stage 1 has not come to its end
        path = args.results / page.PLAN
        (done, total), last = stage.progress(), bool(second) or not stage.over()
        if args.quick or (args.plan and last):
            if done and not args.quick:
                parser.error("there are runs already: a plan is written before the first one")
            args.results.mkdir(parents=True, exist_ok=True)
            write(path, json.dumps(rounded(plan(stage.design, 4 if args.quick else 40)), indent=1) + "\n")
        planned = _read(path)
        if planned is None and second:
            print(f"stage 2 waits for its plan, {page.PLAN}: write it with --plan", flush=True)
            break  # what stage 1 has found is collected all the same
        if planned is None:
            parser.error(f"there is no {page.PLAN}: write it first, with --plan")
        if not agrees(planned, stage.design):
            parser.error(f"{path.name} says something else than this program, and was there first")
        print(
            f"stage {second + 1}: {done} of about {total} runs are done, {stage.minutes():.1f} of "
            f"{stage.design.minutes:g} minutes spent; the plan expects {planned['expected']['minutes']:.0f}",
            flush=True,
        )
        if args.list or args.plan:
            continue
        if not args.collect and not stage.over():
            every = 0.5 if args.quick else 3
            failed += runs.supervise(
                _worker, (args.runs, args.quick, bool(second)), args.workers, stage.progress, every
            )
        stages.append((stage, page, planned))
    if kept and stages:
        known = [pair for stage, _, _ in stages for pair in stage.known()]
        stored = [store.folder / f"{job.name}.json" for store, job in known if store.get(job) is not None]
        runs.pack(args.runs, stored, archive)  # which refuses runs of unknown code, before anything else is written
    shown = machine.command("experiments.recipe", ["--quick"] if args.quick else [])
    for stage, page, planned in stages:
        page.collect(stage, planned, args.results, shown)
    return 1 if failed else 0
