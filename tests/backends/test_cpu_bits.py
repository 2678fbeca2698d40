"""The CPU kernels leave the same bytes on every processor: every rule and form, compiled for aarch64 and emulated.

Needs a cross compiler and an emulator (Debian: g++-aarch64-linux-gnu, qemu-user); skipped without. That the kernels of
this processor's own instruction sets agree is shown by ``test_parity_processes.py``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.toolchain import ARITHMETIC, HOST, ROOT, WARNINGS, compiler

#: As setup.py compiles the kernels: -O3 makes vectors of their loops.
FLAGS = ("-std=c++17", "-O3", *ARITHMETIC, *WARNINGS, "-DSIGNADAM_TABLE=portable_kernels")
SOURCES = (HOST / "cpu_bits.cpp", ROOT / "csrc" / "cpu" / "kernels_portable.cpp")


def tool(*names: str) -> str:
    """The first of these that is installed, or a skip."""
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip(f"{names[0]} is not installed")
    return found


def printed(command: list[str]) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_aarch64_leaves_the_bytes_of_this_processor(tmp_path: Path) -> None:
    cross, emulator = tool("aarch64-linux-gnu-g++"), tool("qemu-aarch64", "qemu-aarch64-static")
    here, there = tmp_path / "here", tmp_path / "there"
    for command, target in ((compiler(), here), (cross, there)):
        linked = ("-static",) if command == cross else ()
        printed([command, *FLAGS, *linked, *map(str, SOURCES), "-o", str(target)])
    expected, found = printed([str(here)]), printed([emulator, str(there)])
    assert len(expected) > 1000 and len(set(expected)) == len(expected)
    assert [pair for pair in zip(expected, found, strict=True) if pair[0] != pair[1]] == []
    # NEON: what the compiler could not make vectors of would be as right, and slow.
    code = printed([tool("aarch64-linux-gnu-objdump"), "-d", "--no-show-raw-insn", str(there)])
    vectors = [line for line in code if re.search(r"\sf(?:mul|add|sub)\s+v\d+\.4s", line)]
    scalars = [line for line in code if re.search(r"\sf(?:mul|add|sub)\s+s\d+,", line)]
    assert len(vectors) > 1000, f"{len(vectors)} operations on vectors, {len(scalars)} on one element"
