"""The parity tests in processes of their own: every instruction set of this processor, and Triton interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import signadam_ext._C as _C

HERE = Path(__file__).parent


def run(profile: str, **environment: str) -> None:
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-qx",
            "-m",
            "not gpu",
            f"--hypothesis-profile={profile}",
            HERE / "test_parity.py",
        ],
        env={**os.environ, **environment},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert "passed" in result.stdout


# Compiled from one text, of which test_parity.py runs the best.
@pytest.mark.thorough
@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512"])
def test_instruction_sets(capability: str) -> None:
    if capability == _C.cpu_capability():
        pytest.skip(f"{capability} is what test_parity.py runs here")
    probe = subprocess.run(
        [sys.executable, "-c", "import signadam_ext._C as C; print(C.cpu_capability())"],
        env={**os.environ, "SIGNADAM_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    if probe.returncode != 0:
        pytest.skip(probe.stderr.strip().splitlines()[-1])
    assert probe.stdout.strip() == capability
    run("medium", SIGNADAM_CPU_CAPABILITY=capability)


def test_triton_interpreted(nightly: bool) -> None:
    pytest.importorskip("triton")
    run("short" if nightly else "few", SIGNADAM_TEST_BACKEND="triton", TRITON_INTERPRET="1")
