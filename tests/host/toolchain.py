"""Compiles the host programs beside this file with the C++ compiler that builds the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
#: As setup.py compiles the arithmetic: one rounding per operation.
ARITHMETIC = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
WARNINGS = ("-Wall", "-Wextra", "-Werror")


def compiler() -> str:
    """The C++ compiler, or a skip that says there is none."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no C++ compiler: {name} is not on PATH")
    return found


def build(source: str, target: Path, *flags: str) -> Path:
    """Compiles ``tests/host/<source>`` to ``target``; a failure to compile is a failure of the test."""
    command = [compiler(), "-std=c++17", *ARITHMETIC, *WARNINGS, *flags, str(HERE / source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return target
