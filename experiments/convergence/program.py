"""The command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import experiments.convergence
from experiments.convergence.search import Comparison
from experiments.convergence.summary import collect
from experiments.convergence.training import PROBLEMS, train
from reporting import machine, runs

RUNS = machine.ROOT / "experiments" / "out" / "convergence"
RESULTS = machine.ROOT / "experiments" / "results" / "convergence"


def _worker(folder: Path, problems: Sequence[str], small: bool) -> None:
    comparison = Comparison(folder, problems, small)
    sys.exit(min(runs.work(comparison.ready, train), 100))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=experiments.convergence.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problem", choices=tuple(PROBLEMS), action="append", help="only this one (default: all)")
    args = runs.parsed(parser, arguments, RUNS, RESULTS)
    args.problem = args.problem or list(PROBLEMS)
    if "digits" in args.problem:
        try:
            import sklearn  # noqa: F401
        except ImportError:
            print("digits needs scikit-learn: left out")
            args.problem = [name for name in args.problem if name != "digits"]
    archive = RESULTS / "runs.tar.gz"
    if not args.quick:
        runs.unpack(archive, args.runs)
    comparison = Comparison(args.runs, args.problem, args.quick)
    print(comparison.listing(), flush=True)
    if args.list:
        return 0
    kept = args.results.resolve() == RESULTS
    failed = 0
    if not args.collect:
        if kept:
            machine.require_commits([runs.environment()["commit"]])
        failed = runs.supervise(
            _worker, (args.runs, args.problem, args.quick), args.workers, comparison.progress, 0.5 if args.quick else 3
        )
    if kept:
        comparison.pack(archive)  # which refuses runs of unknown code, before anything else is written
    for name in comparison.chosen:
        collect(comparison, comparison.problem(name), args.results)
    return 1 if failed else 0
