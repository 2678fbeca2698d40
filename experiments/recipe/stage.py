"""What both stages share: runs that a plan names, within a budget."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

from experiments.convergence.training import Job, Problem
from reporting.runs import Run, Store


class Planned(Protocol):
    """A design: all that is decided before the first run of its stage."""

    @property
    def minutes(self) -> float:
        """The budget, of one core."""
        ...

    def describe(self) -> Run:
        """As JSON, which the plan holds and the program compares."""
        ...

    def expected(self) -> dict[str, tuple[Problem, int]]:
        """How many runs each of its problems comes to, by the problem's name."""
        ...


class Stage(ABC):
    """The runs of a design in one folder: what came of them, and which are missing."""

    design: Planned

    @abstractmethod
    def known(self) -> Iterator[tuple[Store[Problem], Job]]:
        """All runs that are known to be needed, in the order in which to run them."""

    @abstractmethod
    def progress(self) -> tuple[int, int]:
        """Runs done, and how many they will be."""

    @abstractmethod
    def over(self) -> bool:
        """Whether every run is there, and no other can come."""

    def ready(self) -> Iterator[tuple[Store[Problem], Job]]:
        """What can be run now, unless the budget is spent."""
        if self.minutes() < self.design.minutes:
            yield from self.known()

    def runs(self) -> dict[tuple[str, str], Run]:
        """The finished ones of those that are needed, by problem and name."""
        found = ((store.problem.name, job.name, store.get(job)) for store, job in self.known())
        return {(problem, name): run for problem, name, run in found if run is not None}

    def minutes(self) -> float:
        """Of one core, that the runs took."""
        return sum(run["seconds"] for run in self.runs().values()) / 60


def agrees(plan: dict[str, Any], design: Planned) -> bool:
    """Whether a plan says what this program would do."""
    return bool(plan["design"] == json.loads(json.dumps(design.describe())))
