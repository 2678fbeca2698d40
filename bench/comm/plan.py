"""The search for each method's learning rate, and the plan of all runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.comm.methods import ATTACKS, BY_KEY, METHODS, WORKERS_ATTACKED, Attack, Method
from bench.comm.training import PROBLEM, Job, Problem, quick
from experiments.convergence.search import RATES, SEARCH_SEED, neighbours
from reporting import runs
from reporting.runs import Run, Store

FIRST_RATES = (2e-3, 3e-3, 6e-3)


@dataclass(frozen=True)
class Search:
    jobs: list[Job]
    losses: dict[float, float]  # final validation losses by rate
    best: float | None


class Comparison:
    """All runs, in one folder: which there are, and which are missing."""

    def __init__(self, folder: Path, small: bool = False) -> None:
        self.problem: Problem = quick(PROBLEM) if small else PROBLEM
        self.store = Store(folder, self.problem)
        self.store.folder.mkdir(parents=True, exist_ok=True)

    def search(self, method: Method) -> Search:
        """From the first rates on to the neighbours of the best one, until both of them have been tried."""
        jobs: list[Job] = []
        losses: dict[float, float] = {}
        further = list(FIRST_RATES)
        while further:
            jobs += [Job(self.problem, method, lr, SEARCH_SEED) for lr in further]
            losses = {job.lr: loss for job in jobs if (loss := self.store.final(job)) is not None}
            if len(losses) < len(jobs):
                return Search(jobs, losses, None)
            best = min(sorted(losses), key=losses.__getitem__)
            if best in (RATES[0], RATES[-1]):
                return Search(jobs, losses, None)
            further = [lr for lr in neighbours(best) if lr not in losses]
        return Search(jobs, losses, min(sorted(losses), key=losses.__getitem__))

    def honest(self, method: Method, lr: float) -> list[Job]:
        """Four workers, every seed."""
        return [Job(self.problem, method, lr, seed) for seed in range(self.problem.seeds)]

    def attacked(self, method: Method, lr: float, attack: Attack) -> list[Job]:
        """Five workers, at the rate that was found for four honest ones."""
        seeds = range(self.problem.seeds)
        return [Job(self.problem, method, lr, seed, WORKERS_ATTACKED, attack) for seed in seeds]

    def jobs(self) -> tuple[list[Job], int]:
        """Those that are known, in the order in which to run them, and how many wait for a rate."""
        searches = {method.key: self.search(method) for method in METHODS}
        found = [job for search in searches.values() for job in search.jobs]
        later: list[Job] = []
        waiting = 0
        for key, search in searches.items():
            attacks = ATTACKS.get(key, ())
            if search.best is None:
                waiting += self.problem.seeds * (1 + len(attacks))
                continue
            found += self.honest(BY_KEY[key], search.best)
            for attack in attacks:
                later += self.attacked(BY_KEY[key], search.best, attack)
        return sorted([*found], key=lambda job: job.seed != SEARCH_SEED) + later, waiting

    def ready(self) -> Iterator[tuple[Store[Problem], Job]]:
        for job in self.jobs()[0]:
            yield self.store, job

    def progress(self) -> tuple[int, int]:
        """Runs done, and all that are known of."""
        jobs, waiting = self.jobs()
        return sum(self.store.get(job) is not None for job in jobs), len(jobs) + waiting

    def finals(self, jobs: list[Job]) -> list[float] | None:
        """Final validation losses; None unless all are there. Infinite for a run that diverged."""
        found = [self.store.final(job) for job in jobs]
        return None if any(loss is None for loss in found) else [math.inf if x is None else x for x in found]

    def listing(self) -> str:
        done, known = self.progress()
        taken = [run["seconds"] for _, job in self.ready() if (run := self.store.get(job)) is not None]
        each = sum(taken) / len(taken) if taken else self.problem.seconds
        return f"trainings: {done} of {known} runs done, about {each * (known - done) / 3600:.2f} core-hours left"

    def pack(self, archive: Path) -> None:
        """Keep every finished run of the plan in one file."""
        paths = [self.store.folder / f"{job.name}.json" for _, job in self.ready() if self.store.get(job) is not None]
        runs.pack(self.store.folder.parent, paths, archive)

    def get(self, job: Job) -> Run | None:
        return self.store.get(job)
