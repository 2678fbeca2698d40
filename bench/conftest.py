"""Collects what the benchmark tests measure and, at the end, prints the table and writes JSON, PNG and page."""

from pathlib import Path
from typing import Any

import pytest
import torch

from reporting import machine, present
from reporting.files import rounded

from . import whole_step
from .candidates import REFERENCES, plan
from .harness import PASSES, Candidate, Case, Row, Samples, Trial, Workload, row

#: By workload and candidate, in the order of the plan.
_SAMPLES = pytest.StashKey[dict[tuple[Case, torch.dtype, str, Candidate], Samples]]()
_WHOLE = pytest.StashKey[list[whole_step.Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("signadam_ext benchmarks")
    group.addoption("--quick", action="store_true", help="tiny sizes on one thread: does it run, not how fast")
    group.addoption("--bench-out", type=Path, default=Path(__file__).parent / "out", help="folder for JSON and PNG")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SAMPLES] = {}
    config.stash[_WHOLE] = []
    if config.getoption("quick"):
        torch.set_num_threads(1)  # two that spin for each other crawl on a shared machine


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per workload, turn and candidate: candidates take turns. A workload is made once for all of them."""
    if "candidate" not in metafunc.fixturenames:
        return
    arguments, names = [], []
    quick = metafunc.config.getoption("quick")
    for case, dtype, candidates in plan("cpu", quick):
        for turn in range(1 if quick else PASSES):
            for candidate in candidates:
                arguments.append(((case, dtype), turn, candidate))
                words = (
                    case.name,
                    str(dtype).removeprefix("torch."),
                    candidate.optimizer,
                    candidate.backend,
                    str(turn),
                )
                names.append("-".join(words).replace(", ", "_").replace(" ", "_"))
    metafunc.parametrize(("workload", "turn", "candidate"), arguments, ids=names, indirect=["workload"], scope="module")


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
    return Trial(workload, candidate, REFERENCES)


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    """What one turn may take."""
    return 0.05 if request.config.getoption("quick") else 0.4


@pytest.fixture
def samples(request: pytest.FixtureRequest, workload: Workload, candidate: Candidate) -> Samples:
    key = (workload.case, workload.dtype, workload.device.type, candidate)
    return request.config.stash[_SAMPLES].setdefault(key, Samples())


@pytest.fixture
def whole_steps(request: pytest.FixtureRequest) -> list[whole_step.Row]:
    return request.config.stash[_WHOLE]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = config.stash[_SAMPLES]
    rows: list[Row] = [row(*key, samples) for key, samples in found.items() if samples.own]
    if not rows:
        return
    command = machine.command("pytest", list(config.invocation_params.args))
    report = {**machine.facts(), "command": command, "rows": rows, "whole_steps": config.stash[_WHOLE]}
    report["name"] = machine.slug(report["machine"] | {"gpu": None})
    out: Path = config.getoption("bench_out")
    out.mkdir(parents=True, exist_ok=True)
    present.write(rounded(report, 6), out)
    terminalreporter.section("ratios within a round: median (quartiles)")
    terminalreporter.write_line(present.tables(report, level="\n"))
    terminalreporter.write_line(f"\n{present.disturbance(report)}")
    if aims := present.aims(report):
        terminalreporter.write_line(f"\n{aims}")
    terminalreporter.write_line(f"\nwritten: {out / report['name']}.json, .md, .png")
