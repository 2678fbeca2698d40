"""Many small runs, each one JSON file: what a comparison of trainings needs whatever it compares.

A finished run is one file, named by what distinguishes it and written whole or not at all; what is there with the very
configuration is not run again. So a program may be killed, stopped and started at will, also several times at once, and
loses only the runs in progress.
"""

from __future__ import annotations

import argparse
import fcntl
import gzip
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from tqdm import tqdm

from reporting import machine
from reporting.files import write

Run = dict[str, Any]


def parsed(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, folder: Path, results: Path
) -> argparse.Namespace:
    """A command line with what every comparison of runs takes beside its own.

    Args:
        parser: with the program's own arguments.
        arguments: None for those of the process.
        folder: where finished runs are kept, and beside it, as ``...-quick``, those of ``--quick`` and its results.
        results: where results go otherwise.
    """
    small = folder.with_name(f"{folder.name}-quick")
    shown = {path: os.path.relpath(path, machine.ROOT) for path in (folder, small, results)}
    add = parser.add_argument
    add("--workers", type=int, default=1, metavar="N", help="processes of one thread each (default: 1)")
    add("--runs", type=Path, help=f"where finished runs are kept (default: {shown[folder]})")
    add("--results", type=Path, help=f"where results go (default: {shown[results]})")
    add("--list", action="store_true", help="say how many runs are done and how many are to come, and stop")
    add("--collect", action="store_true", help="only collect what is finished")
    add("--quick", action="store_true", help=f"everything in small, in {shown[small]}: a test, not a result")
    args = parser.parse_args(arguments)
    args.runs = args.runs or (small if args.quick else folder)
    args.results = args.results or (small if args.quick else results)
    return args


class Named(Protocol):
    @property
    def name(self) -> str: ...


class Job(Named, Protocol):
    @property
    def config(self) -> Run:
        """All that decides the bits of the run, as JSON takes it."""
        ...


P = TypeVar("P", bound=Named)
J = TypeVar("J", bound=Job)


@cache
def environment() -> Run:
    """Where a run was made: the commit is that of the compiled module."""
    facts = machine.facts()
    build = facts["versions"].pop("signadam_ext")
    known = isinstance(build, dict)
    return {
        "machine": facts["machine"],
        "versions": facts["versions"] | {"signadam_ext": build["version"] if known else build},
        "cpu_kernels": build["cpu_capability"] if known else None,
        "commit": build["commit"] if known else None,
    }


class Store(Generic[P]):
    """The finished runs of one problem, in one folder."""

    def __init__(self, folder: Path, problem: P) -> None:
        self.folder, self.problem = folder / problem.name, problem
        self._known: dict[str, Run] = {}

    def get(self, job: Job) -> Run | None:
        """The run, if it was made with this very configuration."""
        if job.name not in self._known:
            try:
                run = json.loads((self.folder / f"{job.name}.json").read_text(encoding="utf-8"))
            except FileNotFoundError:
                return None
            if run["config"] != json.loads(json.dumps(job.config)):
                return None
            self._known[job.name] = run
        return self._known[job.name]

    def put(self, job: Job, run: Run) -> None:
        content = {"name": job.name, "config": job.config, **run, "environment": environment(), "date": _now()}
        write(self.folder / f"{job.name}.json", json.dumps(content) + "\n")

    @contextmanager
    def claim(self, job: Job) -> Iterator[bool]:
        """True to one process at a time. The kernel gives the claim back when that process ends, however it ends."""
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / job.name, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def final(self, job: Job, metric: int = 0) -> float | None:
        """The last validation loss (or error); infinite if the run diverged; None if it is not there."""
        run = self.get(job)
        if run is None:
            return None
        return float(run["validation"][-1][1 + metric]) if run["finished"] else math.inf


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def work(ready: Callable[[], Iterable[tuple[Store[Any], J]]], train: Callable[[J], Run]) -> int:
    """Run what of `ready()` is missing and not under way elsewhere, until nothing is left; how many runs failed."""
    torch.set_num_threads(1)
    failed: set[tuple[str, str]] = set()
    while True:
        todo = [
            (store, job)
            for store, job in ready()
            if (store.problem.name, job.name) not in failed and store.get(job) is None
        ]
        if not todo:
            return len(failed)
        for store, job in todo:
            with store.claim(job) as mine:
                if not mine or store.get(job) is not None:
                    continue
                try:
                    store.put(job, train(job))
                except Exception:
                    traceback.print_exc()
                    failed.add((store.problem.name, job.name))
                break
        else:
            time.sleep(1)  # what is left depends on runs under way elsewhere


def supervise(
    worker: Callable[..., None],
    arguments: Sequence[Any],
    workers: int,
    progress: Callable[[], tuple[int, int]],
    every: float = 3.0,
) -> int:
    """Start so many processes of `worker(*arguments)` and show `progress()`, (done, all); how many runs failed.

    A worker exits with the number of its failed runs.
    """
    # For the workers: a run's bits and time must not depend on how many cores are idle.
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=worker, args=arguments, daemon=True) for _ in range(workers)]
    # Daemons end with this process when it exits, and a signal's default action is no exit.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for process in started:
        process.start()
    with tqdm(desc="runs", smoothing=0.05, mininterval=0.1 if sys.stderr.isatty() else 60) as bar:
        alive = True
        while alive:
            alive = any(process.is_alive() for process in started)
            done, bar.total = progress()
            if bar.n == 0 and done and bar.initial == 0:
                bar.initial = done  # of an earlier start: these say nothing of the speed
                bar.n = done
            bar.update(done - bar.n)
            if alive:
                time.sleep(every)
    failed = sum(process.exitcode or 0 for process in started)
    if failed:
        print(f"{failed} runs failed; see above")
    return failed


def pack(folder: Path, paths: Sequence[Path], archive: Path) -> None:
    """Keep finished runs in one file, named from `folder` on; the same bytes for the same runs.

    Raises `machine.NotCommitted` when one was made by a module that no commit holds.
    """
    paths = sorted(paths)
    archive.parent.mkdir(parents=True, exist_ok=True)
    machine.require_commits(json.loads(path.read_text(encoding="utf-8"))["environment"]["commit"] for path in paths)
    partial = archive.with_suffix(f".{os.getpid()}.partial")
    with (
        open(partial, "wb") as file,
        gzip.GzipFile("", "wb", mtime=0, fileobj=file) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for path in paths:
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
            entry.size = path.stat().st_size
            with open(path, "rb") as content:
                tar.addfile(entry, content)
    os.replace(partial, archive)


def unpack(archive: Path, folder: Path) -> None:
    """Put the kept runs where they are looked for; what is there already stays as it is."""
    if not archive.exists():
        return
    with tarfile.open(archive) as tar:
        for entry in tar:
            target = folder / entry.name
            if not target.exists() and (content := tar.extractfile(entry)) is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                write(target, content.read().decode())


@cache
def student_t(degrees: int, confidence: float = 0.95) -> float:
    """The two-sided quantile of Student's t: the t with P(|T| <= t) = confidence."""
    from scipy import stats

    return float(stats.t.ppf((1 + confidence) / 2, degrees))


def half_width(values: Sequence[float], confidence: float = 0.95) -> float | None:
    """Half of the confidence interval of the values' mean (Student's t); None of fewer than two."""
    if len(values) < 2:
        return None
    return student_t(len(values) - 1, confidence) * statistics.stdev(values) / math.sqrt(len(values))


def interval(values: Sequence[float], confidence: float = 0.95) -> Run:
    """The mean with its confidence interval (Student's t); of differences paired by seed, for one."""
    mean, half = statistics.fmean(values), half_width(values, confidence)
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"n": len(values), "mean": mean, "low": low, "high": high}


def band(axes: Any, steps: Sequence[float], lines: Sequence[Sequence[float]], **style: Any) -> None:
    """The mean over seeds, and around it its 95 % confidence interval."""
    columns = list(zip(*lines, strict=True))
    middle = [statistics.fmean(column) for column in columns]
    axes.plot(steps, middle, linewidth=1.6, **style)
    halves = [half_width(column) for column in columns]
    low = [m - h for m, h in zip(middle, halves, strict=True) if h is not None]
    high = [m + h for m, h in zip(middle, halves, strict=True) if h is not None]
    if low:
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
