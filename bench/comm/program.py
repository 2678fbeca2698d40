"""The command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import bench.comm
from bench.committed import ROOT
from reporting import machine, runs

RUNS = ROOT / "bench" / "out" / "comm"
RESULTS = ROOT / "bench" / "results" / "comm"


def _worker(folder: Path, small: bool) -> None:
    from bench.comm.plan import Comparison
    from bench.comm.training import train

    sys.exit(min(runs.work(Comparison(folder, small).ready, train), 100))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=bench.comm.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--wire", action="store_true", help="only bytes and times")
    add("--convergence", action="store_true", help="only trainings")
    add("--plot", action="store_true", help="only draw, from the JSON in --results")
    args = runs.parsed(parser, arguments, RUNS, RESULTS)
    both = not (args.wire or args.convergence)

    from bench.comm import collect, figures
    from bench.comm.plan import Comparison

    if args.plot:
        figures.draw(args.results)
        return 0
    archive = RESULTS / "runs.tar.gz"
    if not args.quick:
        runs.unpack(archive, args.runs)
    comparison = Comparison(args.runs, args.quick)
    print(comparison.listing(), flush=True)
    if args.list:
        return 0
    kept = args.results.resolve() == RESULTS
    if kept:
        machine.require_commits([runs.environment()["commit"]])
    args.results.mkdir(parents=True, exist_ok=True)
    if (both or args.wire) and not args.collect:
        from bench.comm import wire

        collect.wire(wire.measure(args.quick), sys.argv[1:] if arguments is None else arguments, args.results)
    failed = 0
    if both or args.convergence or args.collect:
        if not args.collect:
            failed = runs.supervise(
                _worker, (args.runs, args.quick), args.workers, comparison.progress, 0.5 if args.quick else 3
            )
        if kept:
            comparison.pack(archive)
        collect.convergence(comparison, args.results)
    figures.draw(args.results)
    return 1 if failed else 0
