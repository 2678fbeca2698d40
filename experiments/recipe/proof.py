"""Stage 2, the proof: what stage 1 found against AdamW, with fresh seeds, in few bits, on a larger model, another text.

Every part is planned with its seeds and steps before the first run; which candidates enter, and at which learning
rates, are those of stage 1's last rung. The best of them, by its mean over the fresh seeds, enters the parts after.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from experiments.convergence.methods import Method
from experiments.convergence.search import RATES
from experiments.convergence.training import Job, Problem
from experiments.recipe.candidates import Candidate
from experiments.recipe.halving import DESIGN as STAGE_1
from experiments.recipe.halving import Halving, rung
from experiments.recipe.stage import Stage
from reporting.problems import digest
from reporting.runs import Run, Store

FRESH, BITS, LARGER, TEXT = "fresh", "bits", "larger", "text"


@dataclass(frozen=True)
class Contender:
    """A candidate at the rate that stage 1 found, in fp32 or with its state in another form and weights in bf16."""

    candidate: Candidate
    lr: float
    form: str | None = None  # the state_dtype beside weights that are rounded stochastically

    @property
    def key(self) -> str:
        return self.method.key

    @property
    def label(self) -> str:
        return self.method.label

    @cached_property
    def exists(self) -> bool:
        """Whether its optimizer takes its form: few bits need a moment that is bounded."""
        param = torch.zeros(1, dtype=torch.bfloat16 if self.method.bf16 else torch.float32)
        try:
            self.method.optimizer([param], lr=self.lr, **self.method.options)  # type: ignore[call-arg]
        except ValueError:
            return False
        return True

    @cached_property
    def method(self) -> Method:
        """As `experiments.convergence` trains it."""
        method = self.candidate.method
        if self.form is None:
            return method
        options = method.options | {"state_dtype": self.form, "param_storage": "stochastic"}
        return replace(
            method, key=f"{method.key}@{self.form}", label=f"{method.label}, {self.form}", options=options, bf16=True
        )


@dataclass(frozen=True)
class Part:
    """One comparison: what is trained, and with which seeds."""

    title: str
    problem: Problem
    seeds: tuple[int, ...]
    #: So many rates below that of stage 1 are tried too, by a seed of stage 1, which enters no result.
    lower_rates: int = 0

    @property
    def name(self) -> str:
        return self.problem.name


def _part(name: str, title: str, seeds: int, problem: Problem, lower_rates: int = 0, **spec: Any) -> Part:
    data = spec.pop("data", problem.data)
    made = replace(problem, name=name, title=title, data=data, spec=problem.spec | spec)
    return Part(title, made, tuple(range(2000, 2000 + seeds)), lower_rates)


_MODEL = {"n_layer": 3, "n_head": 4, "n_embd": 256, "block_size": 128}
PARTS = {
    part.name: part
    for part in (
        _part(FRESH, "Fresh seeds", 10, rung(2000, 4)),
        _part(BITS, "Few bits", 5, rung(2000, 4)),
        _part(TEXT, "Another text", 3, rung(2000, 4), data="manuals"),
        _part(LARGER, "A model four times as large", 3, rung(1000, 2), lower_rates=1, model=_MODEL),
    )
}


@dataclass(frozen=True)
class Design:
    """All that is decided before the first run but for what stage 1 found."""

    contenders: tuple[Contender, ...]  # AdamW first
    parts: dict[str, Part] = field(default_factory=lambda: PARTS)
    forms: tuple[str, ...] = ("bf16", "int8", "int4", "int2")
    margin: float = 0.01  # nats: who ends within it of AdamW, by the whole of its interval, matches it
    search_seed: int = STAGE_1.seeds[0]
    minutes: float = 300

    def describe(self) -> Run:
        return {
            "contenders": {each.key: {"lr": each.lr, "options": each.candidate.options} for each in self.contenders},
            "parts": {
                name: {
                    "problem": {**part.problem.spec, "data_sha256": digest(part.problem.data)},
                    "seeds": part.seeds,
                    "lower_rates": part.lower_rates,
                }
                for name, part in self.parts.items()
            },
            "forms": self.forms,
            "search_seed": self.search_seed,
            "margin": self.margin,
            "intervals": f"paired by seed, 95 % for all {len(self.contenders) - 1} contenders together (Bonferroni)",
            "the_best": f"by its mean over the seeds of {FRESH}: enters {BITS} and {TEXT}",
            "budget_minutes": self.minutes,
        }

    def expected(self) -> dict[str, tuple[Problem, int]]:
        counts = {BITS: len(self.forms), TEXT: 2}
        return {
            name: (
                part.problem,
                counts.get(name, len(self.contenders))
                * (len(part.seeds) + (part.lower_rates and part.lower_rates + 1)),
            )
            for name, part in self.parts.items()
        }

    @property
    def confidence(self) -> float:
        """Of one interval, so that all contenders' hold together with 95 %."""
        return 1 - 0.05 / max(1, len(self.contenders) - 1)


def design_after(halving: Halving, count: int = 3) -> Design | None:
    """What stage 1 leaves to prove; None until it is over."""
    found = halving.best(count)
    return None if found is None else Design(tuple(Contender(candidate, lr) for candidate, lr in found))


def quick(design: Design) -> Design:
    """The same in small."""
    tiny = {
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16},
        "batch_size": 2,
        "validation_windows": 4,
        "steps": 2,
    }
    parts = {}
    for name, part in design.parts.items():
        # The second text is a package that is not everywhere.
        problem = replace(part.problem, spec=part.problem.spec | tiny, evaluations=1, average=1, data="text")
        parts[name] = replace(part, problem=problem, seeds=part.seeds[:2])
    return replace(design, parts=parts, forms=design.forms[:2])


class Proof(Stage):
    """Stage 2."""

    def __init__(self, folder: Path, design: Design) -> None:
        self.design: Design = design
        self.stores = {name: Store(folder, part.problem) for name, part in design.parts.items()}
        for store in self.stores.values():
            store.folder.mkdir(parents=True, exist_ok=True)

    @property
    def reference(self) -> Contender:
        return self.design.contenders[0]

    def best(self) -> Contender | None:
        """The one with the lowest mean over the fresh seeds; None until all of them are there."""
        means = [(self.mean(FRESH, each), each) for each in self.design.contenders[1:]]
        known = [(mean, each) for mean, each in means if mean is not None]
        return min(known, key=lambda item: item[0])[1] if known and len(known) == len(means) else None

    def contenders(self, part: str) -> list[Contender]:
        """Of a part, as far as they are known."""
        if part in (FRESH, LARGER):
            return list(self.design.contenders)
        best = self.best()
        if best is None:
            return []
        return [self.reference, best] if part == TEXT else [each for each in self.formed(best) if each.exists]

    def formed(self, contender: Contender) -> list[Contender]:
        """The contender in every form, also in those that its optimizer refuses."""
        return [replace(contender, form=form) for form in self.design.forms]

    def search(self, part: str, contender: Contender) -> tuple[dict[float, float | None], float | None]:
        """The rates that are tried, with their losses so far, and the best once it is known."""
        lower = self.design.parts[part].lower_rates
        if not lower:
            return {}, contender.lr
        at = RATES.index(contender.lr)
        tried: dict[float, float | None] = {
            lr: self.stores[part].final(self._job(part, contender, lr, self.design.search_seed))
            for lr in RATES[at - lower : at + 1]
        }
        losses = {lr: loss for lr, loss in tried.items() if loss is not None}
        return tried, min(losses, key=losses.__getitem__) if len(losses) == len(tried) else None

    def _job(self, part: str, contender: Contender, lr: float, seed: int) -> Job:
        return Job(self.stores[part].problem, contender.method, lr, seed)

    def finals(self, part: str, contender: Contender) -> list[Job]:
        """Those of the seeds; none while the rate is not known."""
        lr = self.search(part, contender)[1]
        return [] if lr is None else [self._job(part, contender, lr, seed) for seed in self.design.parts[part].seeds]

    def losses(self, part: str, contender: Contender) -> dict[int, float]:
        """The last validation losses by seed, of what was run."""
        store = self.stores[part]
        found = {job.seed: store.final(job) for job in self.finals(part, contender)}
        return {seed: loss for seed, loss in found.items() if loss is not None}

    def mean(self, part: str, contender: Contender) -> float | None:
        """Over all seeds; None until they are there."""
        losses = self.losses(part, contender)
        return statistics.fmean(losses.values()) if len(losses) == len(self.design.parts[part].seeds) else None

    def minus(self, part: str, ours: Contender, theirs: Contender, of: str | None = None) -> dict[int, float]:
        """Differences of what both have run, by seed; theirs may be those of another part."""
        left, right = self.losses(part, ours), self.losses(of or part, theirs)
        both = {seed: left[seed] - right[seed] for seed in left if seed in right}
        return both if all(map(math.isfinite, both.values())) else {}

    # Which runs

    def known(self) -> Iterator[tuple[Store[Problem], Job]]:
        for name, part in self.design.parts.items():
            store, contenders = self.stores[name], self.contenders(name)
            for contender in contenders:
                for lr in self.search(name, contender)[0]:
                    yield store, self._job(name, contender, lr, self.design.search_seed)
            finals = [job for contender in contenders for job in self.finals(name, contender)]
            # Seed by seed: what is there at any time is a smaller but whole comparison.
            for seed in part.seeds:
                yield from ((store, job) for job in finals if job.seed == seed)

    def progress(self) -> tuple[int, int]:
        known = list(self.known())
        total = 0
        for name, (_, expected) in self.design.expected().items():
            sure = sum(store is self.stores[name] for store, _ in known)
            total += sure if self._settled(name) else max(sure, expected)
        return sum(store.get(job) is not None for store, job in known), total

    def _settled(self, part: str) -> bool:
        """Whether all runs of a part are known."""
        contenders = self.contenders(part)
        return bool(contenders) and all(self.finals(part, each) for each in contenders)

    def over(self) -> bool:
        done, total = self.progress()
        return done == total and all(map(self._settled, self.design.parts))
