"""The benchmark of communication: its formulas, its simulated votes, a quick run, and its page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")

from bench.comm import formulas, pages
from bench.comm.methods import BY_KEY, Attack
from bench.comm.training import Workers
from bench.committed import ROOT
from signadam_ext.backends.votes import width_for
from signadam_ext.backends.votes.table import CODES_PER_WORD

SHAPES = [(40, 16), (33,), (1, 1, 7), ()]


@pytest.mark.parametrize("workers", [2, 4, 8, 64, 1024])
def test_formulas_speak_of_the_same_vote_as_the_package(workers: int) -> None:
    assert formulas.CODES_PER_WORD == CODES_PER_WORD
    assert formulas.bits_of_result("majority", workers) == 2
    assert formulas.bits_of_result("mean", workers) == width_for(workers)
    # 40 + 3 + 1 + 1 words of 32 bits.
    part = -(-45 // workers)
    assert formulas.payload("majority", SHAPES, workers) == (4 * part * (workers - 1),) * 2
    assert formulas.payload("mean", SHAPES, workers)[1] == 2 * width_for(workers) * part * (workers - 1)
    entries = 40 * 16 + 33 + 7 + 1
    assert sum(formulas.payload("allreduce", SHAPES, workers)) == pytest.approx(8 * entries * (workers - 1) / workers)
    assert sum(formulas.payload("bf16", SHAPES, workers)) == pytest.approx(4 * entries * (workers - 1) / workers)
    # Both factors of the matrix, and the rest as it is: no factor is shorter than a row of 7.
    assert sum(formulas.payload("powersgd", SHAPES, workers)) == pytest.approx(
        8 * (40 + 16 + 33 + 7 + 1) * (workers - 1) / workers
    )


def test_a_large_vote_is_2_bits_each_way() -> None:
    for shapes in formulas.LARGE.values():
        there, back = formulas.payload("majority", shapes, 1024)
        assert 1.99 < 8 * there / formulas.elements(shapes) < 2.001 and there == back
    assert formulas.seconds(125e6, 4, 1, 1e-3) == pytest.approx(1.004)


@pytest.mark.parametrize("key", ["sign_adam_pp", "majority", "majority_momentum", "mean_vote"])
def test_simulated_workers_exchange_what_the_definition_says(key: str) -> None:
    torch.manual_seed(0)
    method = BY_KEY[key]
    params = [nn.Parameter(torch.randn(shape)) for shape in ((3, 7), (33,), ())]
    workers = Workers(params, 5, method, Attack(2, -3))
    momenta = torch.zeros(5, 55)
    for _ in range(3):
        gradients = torch.randn(5, 55)
        for worker, own in enumerate(gradients):
            parts = own.split([p.numel() for p in params])
            loss = sum((p * part.view_as(p)).sum() for p, part in zip(params, parts, strict=True))
            assert isinstance(loss, torch.Tensor)
            workers.compute(worker, loss)
        workers.exchange()
        gradients[:2] *= -3
        beta = torch.tensor(method.momentum)
        momenta = beta * momenta + torch.tensor(1 - method.momentum) * gradients
        counted = momenta.sign().sum(0)
        expected = {"mean": gradients.mean(0), "majority": counted.sign(), "mean vote": counted / 5}[method.exchange]
        found = torch.cat([p.grad.flatten() for p in params if p.grad is not None])
        assert torch.equal(found, expected)


def _committed(name: str) -> dict[str, list[dict[str, object]]]:
    path = pages.FOLDER / name
    if not path.exists():
        pytest.skip("the source distribution holds no results")
    found: dict[str, list[dict[str, object]]] = json.loads(path.read_text())
    return found


def test_measured_bytes_are_those_of_the_formula_and_of_headers() -> None:
    """Beside both there are gloo's own messages, and acknowledgements whose options vary."""
    report = _committed("wire.json")
    assert report["namespaces"] and {row["workers"] for row in report["wire"]} == {2, 4, 8}
    assert {row["hook"] for row in report["wire"]} == set(formulas.HOOKS)
    for row in report["wire"]:
        hook, workers = row["hook"], row["workers"]
        payload = sum(formulas.payload(hook, row["shapes"], workers))  # type: ignore[arg-type]
        measured, packets = fmean(row["bytes"]), fmean(row["packets"])  # type: ignore[arg-type]
        without_headers = measured - formulas.HEADERS * packets
        spare = 1000 * formulas.rounds(hook, workers) + 0.002 * payload  # type: ignore[arg-type]
        assert payload <= without_headers <= payload + spare, (hook, workers)
        if hook == "majority":
            assert max(pages.bits(row)) <= pages.AIM


def test_votes_stand_where_the_mean_fails() -> None:
    report = _committed("convergence.json")
    attacks: dict[str, dict[str, list[float]]] = report["attacks"]  # type: ignore[assignment]
    for adversaries in (1, 2):
        assert min(attacks[f"sign_adam_pp.{adversaries}adversariesx10"]["by_seed"]) > pages.UNIFORM
        for key in ("majority", "majority_momentum"):
            assert max(attacks[f"{key}.{adversaries}adversariesx1"]["by_seed"]) < pages.UNIFORM / 2


@pytest.mark.thorough
def test_quick_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.comm", "--quick", "--runs", str(tmp_path), "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in ("wire", "convergence"):
        assert (tmp_path / f"{name}.json").exists() and (tmp_path / f"{name}.png").exists()
    wire = json.loads((tmp_path / "wire.json").read_text())
    assert {row["hook"] for row in wire["wire"]} == set(formulas.HOOKS)
    text = pages.block(tmp_path)
    assert "### Bytes" in text and "### Training on votes" in text and "### With adversaries" in text
