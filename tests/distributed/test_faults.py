"""Workers that are killed, or that never come: what torchrun and a time-out make of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import sharded
from support.strategies import same_bits

SCRIPT = Path(sharded.__file__).with_name("elastic.py")


def run(folder: Path, killed_at: int) -> dict:
    folder.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    result = subprocess.run(
        [*torchrun, str(SCRIPT), str(folder), str(killed_at)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return torch.load(folder / "final.pt")


@pytest.mark.thorough
def test_a_killed_worker_continues_from_the_last_checkpoint_bit_for_bit(tmp_path):
    undisturbed, continued = run(tmp_path / "whole", -1), run(tmp_path / "killed", 5)
    assert (undisturbed["began"], continued["began"]) == (0, 4)
    assert (tmp_path / "killed" / "killed").exists()
    for a, b in zip(undisturbed["weights"], continued["weights"], strict=True):
        assert same_bits(a, b)


def test_a_worker_that_does_not_come_is_a_timeout(ranks):
    """Where a step communicates, it ends with the group's time-out, and has written nothing."""
    came, stayed_away = ranks(2).run(sharded.step_without_rank_1, 3.0)
    assert re.search(r"[Tt]imed out|timeout", came), came
    assert stayed_away == "stayed away"
