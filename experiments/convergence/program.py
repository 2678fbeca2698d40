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
    add = parser.add_argument
    add("--problem", choices=tuple(PROBLEMS), action="append", help="only this one (default: all)")
    add("--workers", type=int, default=1, metavar="N", help="processes of one thread each (default: 1)")
    add("--runs", type=Path, help="where finished runs are kept (default: experiments/out/convergence)")
    add("--results", type=Path, help="where --collect writes (default: experiments/results/convergence)")
    add("--list", action="store_true", help="say how many runs there are and how long they take")
    add("--collect", action="store_true", help="only collect what is finished")
    add("--quick", action="store_true", help="everything in small, in experiments/out/convergence-quick")
    args = parser.parse_args(arguments)
    small = RUNS.with_name("convergence-quick")
    args.runs = args.runs or (small if args.quick else RUNS)
    args.results = args.results or (small if args.quick else RESULTS)
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
