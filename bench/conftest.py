"""Collects the rows of the benchmark tests and, at the end, prints their table and writes JSON and PNG."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from reporting import machine, present

from .candidates import plan, references
from .harness import Candidate, Row, Trial, Workload

_ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("signadam_ext benchmarks")
    group.addoption("--quick", action="store_true", help="tiny sizes on one thread: does it run, not how fast")
    group.addoption("--bench-out", type=Path, default=Path(__file__).parent / "out", help="folder for JSON and PNG")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []
    if config.getoption("quick"):
        torch.set_num_threads(1)  # two that spin for each other crawl on a shared machine


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per candidate and workload; the workload is made once for all its candidates."""
    if "candidate" not in metafunc.fixturenames:
        return
    arguments, names = [], []
    for case, dtype, candidates in plan("cpu", metafunc.config.getoption("quick")):
        for candidate in candidates:
            arguments.append(((case, dtype), candidate))
            words = (case.name, str(dtype).removeprefix("torch."), candidate.optimizer, candidate.backend)
            names.append("-".join(words).replace(", ", "_").replace(" ", "_"))
    metafunc.parametrize(("workload", "candidate"), arguments, ids=names, indirect=["workload"], scope="module")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the order of the plan; pytest's own grouping by fixture turns it round."""

    def place(item: pytest.Item) -> int:
        callspec = getattr(item, "callspec", None)
        return callspec.indices.get("candidate", -1) if callspec else -1

    items.sort(key=place)


@pytest.fixture(scope="module")
def workload(request: pytest.FixtureRequest) -> Workload:
    case, dtype = request.param
    return Workload(case, dtype, "cpu")


@pytest.fixture
def trial(workload: Workload, candidate: Candidate) -> Trial:
    return Trial(workload, candidate, references(workload.dtype))


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    """What one trial may take."""
    return 0.05 if request.config.getoption("quick") else 1.3


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> list[Row]:
    return request.config.stash[_ROWS]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.stash[_ROWS]:
        return
    command = machine.command("pytest", list(config.invocation_params.args))
    report = {**machine.facts(), "command": command, "rows": config.stash[_ROWS]}
    report["name"] = machine.slug(report["machine"] | {"gpu": None})
    out: Path = config.getoption("bench_out")
    out.mkdir(parents=True, exist_ok=True)
    stem = out / report["name"]
    stem.with_suffix(".json").write_text(json.dumps(machine.rounded(report), indent=1) + "\n")
    present.picture(report, stem.with_suffix(".png"))
    terminalreporter.section("ratios within a round, median (min .. max)")
    terminalreporter.write_line(present.tables(report, level="\n"))
    terminalreporter.write_line(f"\n{present.disturbance(report)}")
    if aims := present.aims(report):
        terminalreporter.write_line(f"\n{aims}")
    terminalreporter.write_line(f"\nwritten: {stem}.json, {stem}.png")
