"""The search for each method's learning rate, and the plan of all runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.convergence.methods import BY_KEY, Method
from experiments.convergence.training import PROBLEMS, Job, Problem, quick
from reporting import runs
from reporting.runs import Run, Store

#: Every rate that may be tried: 1, 2, 3 and 6 times powers of ten.
RATES = tuple(float(f"{digit}e{power}") for power in range(-7, 2) for digit in (1, 2, 3, 6))
SEARCH_SEED = 1000  # enters no result


def neighbours(lr: float) -> tuple[float, ...]:
    """The rates next to one, below and above it; fewer at the edges of all that may be tried."""
    i = RATES.index(lr)
    return (*RATES[max(i - 1, 0) : i], *RATES[i + 1 : i + 2])


def climb(
    first: Sequence[float], loss: Callable[[float], float | None]
) -> tuple[list[float], dict[float, float], float | None]:
    """From the first rates on to the neighbours of the best one, until both of them have been tried.

    Args:
        first: where the search begins.
        loss: of a rate; None of one that was not tried yet.

    Returns:
        The rates that are asked for so far; the losses of those that were tried; and the best rate, None while another
        is missing, and for good when it would be at the edge of all rates.
    """
    rates = list(first)
    further: Sequence[float] = first
    while further:
        losses = {lr: found for lr in rates if (found := loss(lr)) is not None}
        if len(losses) < len(rates):
            return rates, losses, None
        best = min(sorted(losses), key=losses.__getitem__)
        if best in (RATES[0], RATES[-1]):
            return rates, losses, None
        further = [lr for lr in neighbours(best) if lr not in losses]
        if not further:
            return rates, losses, best
        rates += further
    return rates, {}, None


@dataclass(frozen=True)
class Search:
    jobs: list[Job]  # known so far
    losses: dict[float, float]  # final validation losses by rate, of those that were run
    best: float | None  # None while a job is missing, and for good when it would be at the edge of all rates


@dataclass(frozen=True)
class Plan:
    ready: list[Job]  # in the order in which to run them
    waiting: int  # whose rate is still being searched; those searches may grow beside


class Comparison:
    """The runs of one or more problems in one folder: which there are, and which are missing."""

    def __init__(self, folder: Path, problems: Sequence[str], small: bool = False) -> None:
        self.stores = {
            name: Store(folder, quick(problem) if small else problem)
            for name, problem in PROBLEMS.items()
            if name in problems or any(PROBLEMS[chosen].after == name for chosen in problems)
        }
        self.chosen = tuple(name for name in self.stores if name in problems)
        for store in self.stores.values():
            store.folder.mkdir(parents=True, exist_ok=True)

    def problem(self, name: str) -> Problem:
        return self.stores[name].problem

    def get(self, job: Job) -> Run | None:
        return self.stores[job.problem.name].get(job)

    def first_rates(self, problem: Problem, method: Method) -> tuple[float, ...] | None:
        """Where the search begins; None if another search decides it and is not finished."""
        if problem.after is not None:
            best = self.best(self.problem(problem.after), method)
        elif method.begins_at is not None:
            best = self.best(problem, BY_KEY[method.begins_at])
        else:
            return problem.first_rates
        if best is None:
            return None
        return tuple(sorted((best, *neighbours(best))))

    def search(self, problem: Problem, method: Method) -> Search:
        """Begun at the first rates, as `climb` goes on."""
        store = self.stores[problem.name]

        def job(lr: float) -> Job:
            return Job(problem, method, lr, SEARCH_SEED)

        rates, losses, best = climb(self.first_rates(problem, method) or (), lambda lr: store.final(job(lr)))
        return Search([job(lr) for lr in rates], losses, best)

    def best(self, problem: Problem, method: Method) -> float | None:
        """The method's learning rate on the problem, once it is found."""
        return self.search(problem, method).best

    def finals(self, problem: Problem, method: Method, metric: int = 0) -> dict[int, float]:
        """Final validation losses (or errors) by seed, infinite for a run that diverged; of those that were run."""
        lr = self.best(problem, method)
        if lr is None:
            return {}
        store, jobs = self.stores[problem.name], (Job(problem, method, lr, seed) for seed in range(problem.seeds))
        return {job.seed: loss for job in jobs if (loss := store.final(job, metric)) is not None}

    def plan(self, problem: Problem) -> Plan:
        """All runs of a problem: searches, then one seed of every method after the other."""
        searches = {method.key: self.search(problem, method) for method in problem.methods}
        ready = [job for search in searches.values() for job in search.jobs]
        waiting = 0
        for seed in range(problem.seeds):
            for method in problem.methods:
                lr = searches[method.key].best
                if lr is None:
                    waiting += 1
                else:
                    ready.append(Job(problem, method, lr, seed))
        return Plan(ready, waiting)

    def ready(self) -> Iterator[tuple[Store[Problem], Job]]:
        """What can be run now: of the chosen problems, and the searches of others where theirs begin."""
        for name in self.chosen:
            problem = self.problem(name)
            if problem.after is not None and problem.after not in self.chosen:
                before = self.problem(problem.after)
                for method in problem.methods:
                    first = method if method.begins_at is None else BY_KEY[method.begins_at]
                    for job in (*self.search(before, first).jobs, *self.search(before, method).jobs):
                        yield self.stores[before.name], job
            for job in self.plan(problem).ready:
                yield self.stores[name], job

    def pack(self, archive: Path) -> None:
        """Keep every finished run of the plans in one file."""
        stores = self.stores.values()
        jobs = [(store, job) for store in stores for job in self.plan(store.problem).ready]
        paths = [store.folder / f"{job.name}.json" for store, job in jobs if store.get(job) is not None]
        runs.pack(next(iter(stores)).folder.parent, paths, archive)

    def progress(self) -> tuple[int, int]:
        """Runs done, and all that are known of."""
        plans = [self.plan(self.problem(name)) for name in self.chosen]
        done = sum(self.get(job) is not None for plan in plans for job in plan.ready)
        return done, sum(len(plan.ready) + plan.waiting for plan in plans)

    def listing(self) -> str:
        """Each problem's runs and hours: what is known now, and what a search usually comes to where it is not."""
        lines = []
        for name in self.chosen:
            problem = self.problem(name)
            plan = self.plan(problem)
            done = sum(self.get(job) is not None for job in plan.ready)
            searched = [self.search(problem, method) for method in problem.methods]
            open_ones = [search for search in searched if search.best is None]
            # A search from two rates takes five runs as a rule, one around a rate found before takes three or four.
            more = sum(max(0, 4 - len(search.jobs)) for search in open_ones)
            total = len(plan.ready) + plan.waiting + more
            hours = problem.seconds / 3600
            lines.append(
                f"{name}: {len(problem.methods)} methods, {problem.seeds} seeds each; about {total} runs, "
                f"{total * hours:.1f} hours on one core; {done} done, about {(total - done) * hours:.1f} hours left; "
                f"{len(searched) - len(open_ones)} of {len(searched)} learning rates found"
            )
        return "\n".join(lines)


def finite(values: dict[int, float]) -> list[float]:
    return [value for value in values.values() if math.isfinite(value)]
