"""What is run and what goes on: rungs of more and more steps for fewer and fewer candidates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.convergence.search import RATES, climb
from experiments.convergence.training import Job, Problem
from experiments.recipe.candidates import ADAMW, RULES, Candidate, Rule, together
from experiments.recipe.stage import Stage
from reporting.problems import Text, digest
from reporting.runs import Run, Store


def rung(steps: int, evaluations: int = 1) -> Problem:
    """The problem of one rung. The schedule is scaled to its length."""
    return Problem(
        f"{steps}_steps",
        f"{steps:,} steps",
        Text,
        "text",
        {
            "model": {"n_layer": 3, "n_head": 4, "n_embd": 128, "block_size": 128},
            "batch_size": 8,
            "steps": steps,
            "validation_windows": 256,
            "weight_decay": 0.1,
            "clip": 1.0,
            "last_factor": 0.1,
        },
        evaluations=evaluations,
        seconds=math.nan,  # the plan says
        seeds=2,
        average=steps // 100,
    )


@dataclass(frozen=True)
class Design:
    """All that is decided before the first run."""

    rules: tuple[Rule, ...]
    rungs: tuple[Problem, ...]
    changed: int  # of so many rules, the best as they are, each change is tried alone
    combined: int  # for so many rules, changes that helped alone go on together
    kept: tuple[int, ...]  # so many candidates go on to each rung after the first, those combined not counted
    per_rule: int  # of them
    minutes: float  # the budget, of one core
    seeds: tuple[int, ...] = (1000, 1001)  # the first searches for rates; later stages have other seeds

    def describe(self) -> Run:
        spec = {key: value for key, value in self.rungs[0].spec.items() if key != "steps"}
        return {
            "candidates": {
                rule.key: {
                    "optimizer": f"{'torch.optim' if rule.key == ADAMW else 'signadam_ext'}.{rule.optimizer}",
                    "options": rule.options,
                    "moments": rule.moments,
                    "competes": rule.competes,
                    "first_rate": rule.lr,
                    "changes": {change.key: change.options for change in rule.changes},
                }
                for rule in self.rules
            },
            "rates": "1, 2, 3 and 6 times powers of ten, until both neighbours of the best were tried",
            "problem": {**spec, "data_sha256": digest(self.rungs[0].data)},
            "rungs": {problem.name: problem.steps for problem in self.rungs},
            "seeds": self.seeds,
            "promotion": {
                "by": "the mean over seeds of the last validation loss, each at the candidate's best rate",
                "always": ADAMW,
                "rules_whose_changes_are_tried": self.changed,
                "rules_whose_changes_are_combined": self.combined,
                "candidates_that_go_on": self.kept,
                "of_one_rule_at_most": self.per_rule,
            },
            "budget_minutes": self.minutes,
        }

    def expected(self) -> dict[str, tuple[Problem, int]]:
        """Four rates are usual for a search, and the other seeds at the best."""
        each = 4 + len(self.seeds) - 1
        tried = max(len(rule.changes) for rule in self.rules)
        first = len(self.rules) + self.changed * tried
        later = [1 + kept + (self.combined if i == 0 else 0) for i, kept in enumerate(self.kept)]
        counts = (each * count for count in (first, *later))
        return {problem.name: (problem, count) for problem, count in zip(self.rungs, counts, strict=True)}


DESIGN = Design(
    RULES, (rung(300), rung(700), rung(2000, 4)), changed=4, combined=2, kept=(5, 3), per_rule=2, minutes=160
)


def quick(design: Design = DESIGN) -> Design:
    """The same in small: every rung and every kind of step, of fewer rules."""
    tiny = {
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16},
        "batch_size": 2,
        "validation_windows": 4,
    }
    rules = tuple(
        replace(rule, lr=0.1, changes=rule.changes[:3])
        for rule in design.rules
        if rule.key in (ADAMW, "sign_adam_pp", "bcos", "ano")
    )
    rungs = tuple(
        replace(problem, name=f"{steps}_steps", title=f"{steps} steps", spec=problem.spec | tiny | {"steps": steps})
        for steps, problem in zip((2, 4, 6), design.rungs, strict=True)
    )
    small = tuple(replace(problem, average=1, evaluations=1) for problem in rungs)
    return replace(design, rules=rules, rungs=small, changed=1, combined=1, kept=(2, 1))


@dataclass(frozen=True)
class Outcome:
    """What a candidate came to in a rung."""

    lr: float | None  # None when the search left the grid
    search: dict[float, float]  # losses of the first seed by rate
    losses: dict[int, float]  # by seed, at the best rate

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses.values()) if self.lr is not None else math.inf


class Halving(Stage):
    """Stage 1, and who goes on."""

    def __init__(self, folder: Path, design: Design) -> None:
        self.design: Design = design
        self.stores = [Store(folder, problem) for problem in design.rungs]
        for store in self.stores:
            store.folder.mkdir(parents=True, exist_ok=True)

    def jobs(self, candidate: Candidate, at: int) -> list[Job]:
        """Those known so far: the search, and then the other seeds at the best rate."""
        store, (first, *others) = self.stores[at], self.design.seeds
        begin = self.first_rate(candidate, at)
        if begin is None:
            return []

        def job(lr: float, seed: int = first) -> Job:
            return Job(store.problem, candidate.method, lr, seed)

        rates, _, best = climb((begin,), lambda lr: store.final(job(lr)))
        return [job(lr) for lr in rates] + [job(best, seed) for seed in others if best is not None]

    def search(self, candidate: Candidate, at: int) -> tuple[dict[float, float], float | None]:
        """Losses of the first seed by rate so far, and the best rate once it is known."""
        begin = self.first_rate(candidate, at)
        if begin is None:
            return {}, None
        store, first = self.stores[at], self.design.seeds[0]
        _, losses, best = climb((begin,), lambda lr: store.final(Job(store.problem, candidate.method, lr, first)))
        return losses, best

    def outcome(self, candidate: Candidate, at: int) -> Outcome | None:
        """None until all its runs are there."""
        jobs, store = self.jobs(candidate, at), self.stores[at]
        if not jobs or any(store.get(job) is None for job in jobs):
            return None
        losses, best = self.search(candidate, at)
        by_seed = {job.seed: store.final(job) for job in jobs if job.lr == best}
        return Outcome(best, losses, {seed: loss for seed, loss in sorted(by_seed.items()) if loss is not None})

    def first_rate(self, candidate: Candidate, at: int) -> float | None:
        """Where the search begins: None while the search that says it is not finished, or when it found nothing.

        A rule as it is begins at its own first rate, with a change at the best without; later each begins at what it
        had in the rung before, or changes together at the best of the one that asks for other rates than the rule.
        """
        if at == 0 and not candidate.changes:
            return candidate.rule.lr
        if at == 0:
            before = self.search(Candidate(candidate.rule), 0)[1]
            steps = sum(change.steps for change in candidate.changes)
            return None if before is None else RATES[min(RATES.index(before) + steps, len(RATES) - 1)]
        if at == 1 and len(candidate.changes) > 1:
            leading = max(candidate.changes, key=lambda change: change.steps)
            return self.search(Candidate(candidate.rule, (leading,)), 0)[1]
        return self.search(candidate, at - 1)[1]

    # Who is in each rung

    def rules(self) -> list[Candidate]:
        """The rules as they are, of those that this build has."""
        return [Candidate(rule) for rule in self.design.rules if rule.made_by is not None]

    def changes(self) -> list[Candidate] | None:
        """Each change alone of the best rules; None until these are known."""
        best = self._best(filter(_competes, self.rules()), 0)
        if best is None:
            return None
        rules = [candidate.rule for candidate in best[: self.design.changed]]
        return [Candidate(rule, (change,)) for rule in rules for change in rule.changes]

    def together(self) -> list[Candidate] | None:
        """Of the best rules with or without a change, all changes that lowered the loss of every seed; of two."""
        candidates = self._first_rung()
        best = None if candidates is None else self._best(candidates, 0)
        if best is None:
            return None
        found = []
        rules = {candidate.rule.key: candidate.rule for candidate in best}  # in their order
        for rule in list(rules.values())[: self.design.combined]:
            plain = self.outcome(Candidate(rule), 0)
            helped = [
                candidate.changes[0]
                for candidate in best
                if candidate.rule == rule and candidate.changes and _lower(self.outcome(candidate, 0), plain)
            ]
            candidate = together(rule, helped)
            if len(candidate.changes) > 1:
                found.append(candidate)
        return found

    def entrants(self, at: int) -> list[Candidate] | None:
        """Of a rung, in the order in which they are run; None until it is known who they are."""
        if at == 0:
            return [*self.rules(), *(self.changes() or ())]
        candidates = self._first_rung() if at == 1 else self.entrants(at - 1)
        best = None if candidates is None else self._best(filter(_competes, candidates), at - 1)
        if best is None:
            return None
        kept: list[Candidate] = []
        for candidate in best:
            of_rule = sum(other.rule == candidate.rule for other in kept)
            if of_rule < self.design.per_rule and len(kept) < self.design.kept[at - 1]:
                kept.append(candidate)
        reference = [candidate for candidate in self.rules() if candidate.rule.key == ADAMW]
        return [*reference, *kept, *((self.together() or ()) if at == 1 else ())]

    def _first_rung(self) -> list[Candidate] | None:
        """Those of the first rung that can go on; None until the changes are known."""
        changes = self.changes()
        return None if changes is None else [*filter(_competes, self.rules()), *changes]

    def _best(self, candidates: Iterable[Candidate], at: int) -> list[Candidate] | None:
        """In the order of their losses, without those that have none; None until all are finished."""
        ranked: list[tuple[float, Candidate]] = []
        for candidate in candidates:
            found = self.outcome(candidate, at)
            if found is None and self.first_rate(candidate, at) is None:
                continue  # what its search begins at is finished, and found nothing
            if found is None:
                return None
            if math.isfinite(found.mean):
                ranked.append((found.mean, candidate))
        return [candidate for _, candidate in sorted(ranked, key=lambda item: item[0])]

    # Which runs

    def known(self) -> Iterator[tuple[Store[Problem], Job]]:
        for at, store in enumerate(self.stores):
            for candidate in self.entrants(at) or ():
                for job in self.jobs(candidate, at):
                    yield store, job

    def progress(self) -> tuple[int, int]:
        """Of rungs that are not known yet, what was expected."""
        known = list(self.known())
        total = 0
        for at, (store, (_, expected)) in enumerate(zip(self.stores, self.design.expected().values(), strict=True)):
            sure = sum(other is store for other, _ in known)
            total += sure if self.finished(at) else max(sure, expected)
        return sum(store.get(job) is not None for store, job in known), total

    def finished(self, at: int) -> bool:
        """Whether every candidate of a rung has its outcome, and no other can come."""
        entrants = self.entrants(at)
        if entrants is None or (at == 0 and self.changes() is None):
            return False
        return all(self.outcome(candidate, at) is not None for candidate in entrants)

    def over(self) -> bool:
        return all(self.finished(at) for at in range(len(self.stores)))

    def best(self, count: int) -> list[tuple[Candidate, float]] | None:
        """AdamW and the best of the last rung, each with its rate there; None until it is finished."""
        last = len(self.stores) - 1
        candidates = self.entrants(last) if self.over() else None
        ranked = None if candidates is None else self._best(filter(_competes, candidates), last)
        if candidates is None or ranked is None:
            return None
        reference = [candidate for candidate in candidates if candidate.rule.key == ADAMW]
        chosen = [*reference, *ranked[:count]]
        return [(candidate, lr) for candidate in chosen if (lr := self.search(candidate, last)[1]) is not None]


def _competes(candidate: Candidate) -> bool:
    return candidate.rule.competes


def _lower(ours: Outcome | None, theirs: Outcome | None) -> bool:
    if ours is None or theirs is None:
        return False
    return all(ours.losses.get(seed, math.inf) < loss for seed, loss in theirs.losses.items())
