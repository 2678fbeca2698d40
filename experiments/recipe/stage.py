"""What both stages share: runs that a plan names, within a budget."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from experiments.convergence.training import Job, Problem
from reporting.files import compact_json, rounded, write
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


# What is collected


def publish(content: Run, folder: Path, page: Callable[[Run], str], draw: Callable[[Run, Path], None]) -> None:
    """Writes what was collected as JSON, a page and a picture, by the name in it."""
    name = content["name"]
    folder.mkdir(parents=True, exist_ok=True)
    text = compact_json(rounded(content, 6))
    write(folder / f"{name}.json", text)
    # Page and picture show what the file says.
    content = json.loads(text)
    write(folder / f"{name}.md", page(content))
    draw(content, folder / f"{name}.png")
    print(f"{content['finished_runs']} of about {content['expected_runs']} runs are in {folder.name}/{name}.*")


def page_of(results: Path, name: str) -> Path:
    """Where a stage's page is, of all experiments' results."""
    return results / "recipe" / f"{name}.md"


def read(results: Path, name: str) -> Run | None:
    """What was collected, if anything was."""
    path = page_of(results, name).with_suffix(".json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
