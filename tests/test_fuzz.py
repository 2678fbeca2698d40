"""The fuzzer as part of the suite: a short run with a fixed seed; ``--fuzz-actions`` asks for a longer one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZER = Path(__file__).with_name("fuzzer.py")


def test_random_actions_find_no_fault(request: pytest.FixtureRequest, tmp_path: Path, thorough: bool) -> None:
    """In a process of its own: the fuzzer raises signals, and what it looks for may crash."""
    actions, seed = request.config.getoption("--fuzz-actions"), request.config.getoption("--fuzz-seed")
    actions = actions or (2000 if thorough else 200)
    out, trace = tmp_path / "fuzz.json", tmp_path / "trace"
    command = [sys.executable, str(FUZZER), f"--actions={actions}", f"--seed={seed}", "--stop"]
    command += [f"--json={out}", f"--trace={trace}"]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONFAULTHANDLER": "1"})
    said = f"{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}\nlast: {trace.read_text().strip() if trace.exists() else ''}"
    assert ran.returncode == 0, said
    result = json.loads(out.read_text())
    assert result["faults"] == []
    assert result["actions"] >= actions
    if actions >= 2000:
        assert len(result["actions_by_kind"]) >= 170  # nearly all there are: none is skipped for good
