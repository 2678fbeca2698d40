"""Tests of Triton kernels that Triton interprets, in a process of their own: one that has imported Triton compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

#: Whether this is such a process.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(file: str, *arguments: str) -> None:
    """Runs a file's tests, but for those that need a GPU, where Triton interprets.

    Skips in that process itself, and where Triton is not installed or its interpreter fails.

    Args:
        file: of the test that calls.
        arguments: more of pytest's.
    """
    if INTERPRETED:
        pytest.skip("this is the process that interprets")
    pytest.importorskip("triton")
    from signadam_ext.backends.triton import interpreter_fault

    if (fault := interpreter_fault()) is not None:
        pytest.skip(fault)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-qx", "-m", "not gpu", *arguments, file],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
