"""Profiles of the property tests, what the quick one leaves out, what is made once, and skips that say why."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest
import torch
from hypothesis import HealthCheck, settings
from support.ranks import Ranks

# A fixed seed: the suite is the same every time. `--hypothesis-profile=long` draws afresh, for minutes.
COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
#: With these, what is marked `thorough` is skipped: the suite as it is asked for without a word, and its processes.
QUICK = ("quick", "few")
settings.register_profile("quick", max_examples=20, derandomize=True, **COMMON)
settings.register_profile("few", max_examples=3, derandomize=True, **COMMON)
settings.register_profile("thorough", max_examples=176, derandomize=True, **COMMON)
settings.register_profile("medium", max_examples=88, derandomize=True, **COMMON)
settings.register_profile("report", max_examples=20, derandomize=True, **COMMON)
settings.register_profile("short", max_examples=16, derandomize=True, **COMMON)
settings.register_profile("long", max_examples=20_000, derandomize=False, **COMMON)
settings.load_profile("quick")


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "actions of tests/test_fuzz.py: 200, of the thorough profile 2000, 10^6 for a night"
    parser.addoption("--fuzz-actions", type=int, default=None, help=text)
    parser.addoption("--fuzz-seed", type=int, default=7, help="its seed")
    parser.addoption("--nightly", action="store_true", help="also what takes minutes: see .ci/nightly")
    parser.addoption("--site", default=None, help="folder of the built documentation, for tests/docs")


def is_thorough(config: pytest.Config) -> bool:
    """Whether nothing is left out: with every profile but the default one and that of its processes."""
    return (config.getoption("--hypothesis-profile") or QUICK[0]) not in QUICK


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--nightly"):
        skip = pytest.mark.skip(reason="takes long: run with --nightly")
        for item in items:
            if item.get_closest_marker("nightly") is not None:
                item.add_marker(skip)
    if not is_thorough(config):
        skip = pytest.mark.skip(reason="thorough: run with --hypothesis-profile=thorough")
        for item in items:
            if item.get_closest_marker("thorough") is not None:
                item.add_marker(skip)
    if torch.cuda.is_available():
        return
    reason = "no CUDA device: torch " + (f"{torch.__version__} sees none" if torch.version.cuda else "is a CPU build")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def thorough(request: pytest.FixtureRequest) -> bool:
    return is_thorough(request.config)


@pytest.fixture(scope="session")
def nightly(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--nightly"))


class Maker(Protocol):
    """Fills a folder that is there and empty."""

    def __call__(self, folder: Path, /) -> object: ...


class BuiltOnce(Protocol):
    """The folder of that name, filled once in a run of the tests, by whichever worker asks first."""

    def __call__(self, name: str, make: Maker) -> Path: ...


@pytest.fixture(scope="session")
def built_once(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BuiltOnce:
    base = tmp_path_factory.getbasetemp()
    # Not by the environment, which processes that tests start inherit from a worker.
    shared = base.parent if hasattr(request.config, "workerinput") else base

    def folder_of(name: str, make: Maker) -> Path:
        folder, done = shared / f"built-{name}", shared / f"built-{name}.done"
        with open(shared / f"built-{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            if not done.exists():
                # What a failed attempt left.
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Ranks]]:
    """``ranks(4).run(function, ...)`` runs a function on four ranks, started by the first test that asks and kept."""
    folder = tmp_path_factory.mktemp("ranks")
    made: dict[int, Ranks] = {}
    yield lambda count: made.setdefault(count, Ranks(count, folder))
    for each in made.values():
        each.stop()
