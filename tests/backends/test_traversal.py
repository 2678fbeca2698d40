"""The traversal of csrc/block/block.h on the host: every element exactly once, nothing else, and no races.

The programs are in tests/host; they compile without the package, under sanitizers that abort at the first finding. With
one rule of those that share code: every rule takes minutes, in the nightly run.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.toolchain import ADDRESS, ADDRESS_QUICK, QUICK, build, build_traced

# -O1: the sanitizers' checks survive and it runs five times as fast as at -O0.
THREAD = ("-O1", "-g1", "-fsanitize=thread", "-pthread")


def run(*command: str) -> str:
    # A preloaded allocator or another's options would change what the sanitizers see.
    unwanted = ("LD_PRELOAD", "ASAN_OPTIONS", "UBSAN_OPTIONS", "TSAN_OPTIONS")
    clean = {name: value for name, value in os.environ.items() if name not in unwanted}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=clean)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def traversal(built_once: Callable[..., Path], thorough: bool, nightly: bool) -> Path:
    flags = (*(ADDRESS if thorough else ADDRESS_QUICK), *(() if nightly else QUICK))
    return built_once("traversal", lambda folder: build("traversal.cpp", folder / "program", *flags)) / "program"


@pytest.mark.parametrize(
    "part",
    [
        "arithmetic",  # pieces tile each chunk, whole ones on 16-byte boundaries, lanes have one owner
        "huge",  # the same for tensors beyond 2^31 elements, by addresses alone
        "counts",  # thousands of tensors: every element written once, guards untouched, sums complete
        "rules",  # every rule and kind of statistics as by a plain loop over the elements
        "stored",  # every storage form: the same bytes in any order of blocks and threads
        "step statistics",  # what optimizer.statistics() tells as by a plain loop, and the same update
        "levels",  # chunk sums through more than one level
    ],
)
def test_traversal(traversal: Path, part: str) -> None:
    assert run(str(traversal), part)


def test_accesses(tmp_path: Path, nightly: bool) -> None:
    """Every byte is read and written as often as it must be, by one thread: codes, low bits and masters included."""
    program = build_traced("traversal.cpp", tmp_path / "traced", *(() if nightly else QUICK))
    assert "each by one thread" in run(str(program), "accesses")


@pytest.fixture(scope="module")
def overrun(built_once: Callable[..., Path]) -> Path:
    return built_once("overrun", lambda folder: build("overrun.cpp", folder / "program", *ADDRESS)) / "program"


@pytest.mark.parametrize("memory", ["param", "codes"])
def test_sanitizers_are_awake(overrun: Path, memory: str) -> None:
    """The same flags find an overrun by one element: a silent sanitizer would make the tests above worth little."""
    done = subprocess.run([str(overrun), memory], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_no_races(tmp_path: Path) -> None:
    assert "no races" in run(str(build("races.cpp", tmp_path / "races", *THREAD)))
