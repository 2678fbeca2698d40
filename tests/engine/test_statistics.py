"""optimizer.statistics(): what it tells, on every backend, and that looking changes nothing."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from dataclasses import astuple, fields
from pathlib import Path

import pytest
import torch
from support.optimizer_contract import assert_same, copies, gradient, make, parameters
from support.paper_formulas import TABLE, Row
from torch import nn
from torch.nn import Parameter

from signadam_ext import SignAdamPP, SignSGD, Signum, release_gradients
from signadam_ext.engine.statistics import TensorStatistics

BACKEND = os.environ.get("SIGNADAM_TEST_BACKEND", "cpu")
SHAPES = ((130, 127), (3,), (), (17000,))


def step(optimizer: torch.optim.Optimizer, params: list[Parameter], number: int) -> None:
    for i, param in enumerate(params):
        param.grad = gradient(param, number, i)
        param.grad_variance = gradient(param, number, i).float().square()
    optimizer.step()


def near(a: TensorStatistics, b: TensorStatistics) -> bool:
    """Counts are exact; sums of doubles are in the backends' own orders."""
    exact = a.passed == b.passed and a.name == b.name and a.numel == b.numel
    others = zip(astuple(a)[3:], astuple(b)[3:], strict=True)
    return exact and all(math.isclose(x, y, rel_tol=1e-12) or (math.isnan(x) and math.isnan(y)) for x, y in others)


@pytest.mark.parametrize("stored", [False, True], ids=["fp32", "stored"])
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)
def test_equals_the_reference_and_changes_nothing(row: Row, stored: bool) -> None:
    options = (
        {"param_storage": "stochastic", "state_dtype": row.state_dtypes[-1]} if stored and row.state_dtypes else {}
    )
    shapes = SHAPES[: 3 if BACKEND == "triton" else 4]
    params = parameters(*shapes, dtype=torch.bfloat16 if stored else torch.float32)
    chunk_statistics, reference, plain = copies(params), copies(params), copies(params)
    a, b, c = (
        make(row, own, backend, weight_decay=0.125, **options)
        for own, backend in ((chunk_statistics, BACKEND), (reference, "reference"), (plain, BACKEND))
    )
    a.observe()
    b.observe()
    for number in range(3):
        for optimizer, own in ((a, chunk_statistics), (b, reference), (c, plain)):
            step(optimizer, own, number)
        found, expected = a.statistics(), b.statistics()
        assert near(found.all, expected.all), (found.all, expected.all)
        assert all(near(x, y) for x, y in zip(found.tensors, expected.tensors, strict=True))
    assert_same(a, c)
    assert_same(a, b)


@pytest.mark.thorough
def test_other_backend() -> None:
    """The same in a process that interprets Triton's kernels."""
    if BACKEND != "cpu":
        pytest.skip("this is that process")
    pytest.importorskip("triton")
    some = "sign_sgd-gated or sign_adam_pp or msvag_minibatch or amsgrad"
    command = [sys.executable, "-m", "pytest", "-qx", __file__, "-k", f"equals_the_reference and ({some})"]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "SIGNADAM_TEST_BACKEND": "triton"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


def test_by_hand() -> None:
    weight, bias = Parameter(torch.zeros(4)), Parameter(torch.zeros(2))
    optimizer = SignAdamPP([("weight", weight), ("bias", bias)], lr=1.0, beta=0.5, alpha=1.0)
    optimizer.observe()
    weight.grad, bias.grad = torch.tensor([3.0, -4.0, 1.0, 0.0]), torch.tensor([0.5, -2.0])
    optimizer.step()
    found = optimizer.statistics()
    assert [tensor.name for tensor in found.tensors] == ["weight", "bias"]
    first, second = found.tensors
    assert (first.numel, first.passed, first.flipped, first.threshold) == (4, 0.5, 0.0, 1.0)
    assert first.norm_ratio == pytest.approx(5 / math.sqrt(26), rel=1e-15)
    assert first.mean_momentum == 0.25  # two of four at 1/2
    assert (second.passed, second.mean_momentum) == (0.5, 0.25)
    assert (found.all.numel, found.all.passed, found.all.threshold) == (6, 0.5, 1.0)
    assert found.all.norm_ratio == pytest.approx(math.sqrt((25 + 4) / (26 + 4.25)), rel=1e-15)
    # One entry turns: from 1/2 to 1/4 - 1/2; one that was 0 does not.
    weight.grad, bias.grad = torch.tensor([-3.0, -4.0, 2.0, 0.0]), None
    optimizer.step()
    found = optimizer.statistics()
    assert [tensor.name for tensor in found.tensors] == ["weight"]
    assert found.tensors[0].flipped == 0.25 and found.all.numel == 4


def test_thresholds_that_differ() -> None:
    params = [Parameter(torch.zeros(100)) for _ in range(2)]
    optimizer = SignAdamPP(params, confidence="sparsity", target=0.5)
    optimizer.observe()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for scale, param in zip((1.0, 100.0), params, strict=True):
            param.grad = torch.randn(100, generator=generator) * scale
        before = [optimizer.state[param].get("threshold", torch.zeros(())).item() for param in params]
        optimizer.step()
    found = optimizer.statistics()
    assert [tensor.threshold for tensor in found.tensors] == [torch.tensor(x).float().item() for x in before]
    assert math.isnan(found.all.threshold)


def test_momentum_that_is_not_there() -> None:
    param = Parameter(torch.zeros(3))
    optimizer = SignSGD([param])
    optimizer.observe()
    param.grad = torch.zeros(3)
    optimizer.step()
    found = optimizer.statistics().all
    assert found.passed == 0.0 and all(map(math.isnan, (found.norm_ratio, found.mean_momentum, found.flipped)))


def test_codes_are_told_in_units_of_the_momentum() -> None:
    param = Parameter(torch.zeros(64))
    optimizer = SignAdamPP([param], beta=0.5, state_dtype="int8")
    optimizer.observe()
    param.grad = torch.ones(64)
    optimizer.step()
    assert optimizer.statistics().all.mean_momentum == pytest.approx(0.5, rel=1e-7)


def test_errors() -> None:
    param = Parameter(torch.zeros(3))
    optimizer = Signum([param])
    with pytest.raises(RuntimeError, match=r"call optimizer.observe\(\)"):
        optimizer.statistics()
    optimizer.observe()
    with pytest.raises(RuntimeError, match="no step has been taken"):
        optimizer.statistics()
    param.grad = torch.ones(3)
    optimizer.step()
    optimizer.observe(False)
    with pytest.raises(RuntimeError, match=r"call optimizer.observe\(\)"):
        optimizer.statistics()
    with pytest.raises(TypeError, match="enabled='yes'"):
        optimizer.observe("yes")  # type: ignore[arg-type]


def test_nothing_enters_a_checkpoint() -> None:
    param = Parameter(torch.zeros(3))
    a, b = Signum([param]), Signum([Parameter(torch.zeros(3))])
    a.observe()
    param.grad = torch.ones(3)
    a.step()
    saved = a.state_dict()
    assert saved["param_groups"] == b.state_dict()["param_groups"]
    assert set(saved["state"][0]) == {"step", "exp_avg"}
    assert not copy.deepcopy(a).runtime.observes


def test_released_gradients() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2))
    twin = copy.deepcopy(model)
    released, ordinary = (SignAdamPP(m.named_parameters(), alpha=1e-3) for m in (model, twin))
    released.observe()
    ordinary.observe()
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    release = release_gradients(model, released)
    model(x).square().sum().backward()
    found = released.statistics()
    release.remove()
    twin(x).square().sum().backward()
    ordinary.step()
    expected = ordinary.statistics()
    assert near(found.all, expected.all)
    assert all(near(a, b) for a, b in zip(found.tensors, expected.tensors, strict=True))


def test_only_the_last_step_counts() -> None:
    """Of released gradients: what took part in the last backward, each parameter once, also after the release."""
    layers = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    optimizer = SignAdamPP(layers.named_parameters())
    optimizer.observe()
    release = release_gradients(layers, optimizer)
    x = torch.ones(3, 2)
    (layers[0](x).sum() + layers[1](x).sum()).backward()
    assert [tensor.name for tensor in optimizer.statistics().tensors] == ["0.weight", "1.weight"]
    layers[0](x).sum().backward()
    assert [tensor.name for tensor in optimizer.statistics().tensors] == ["0.weight"]
    release.remove()
    layers[1](x).sum().backward()
    optimizer.step()
    assert [tensor.name for tensor in optimizer.statistics().tensors] == ["1.weight"]


def test_failed_step_tells_nothing() -> None:
    param = Parameter(torch.zeros(3))
    optimizer = SignAdamPP([param], confidence=lambda g, alpha: g.sqrt())
    optimizer.observe()
    param.grad = -torch.ones(3)
    with pytest.raises(ValueError, match="returned NaN"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="no step has been taken"):
        optimizer.statistics()


def test_long_names_are_whole() -> None:
    """Errors shorten them. Two that differ in the middle are two."""
    names = ["l" * 150 + middle + "l" * 150 for middle in "AB"]
    params = [Parameter(torch.zeros(3)) for _ in names]
    optimizer = SignAdamPP(list(zip(names, params, strict=True)))
    optimizer.observe()
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    assert [tensor.name for tensor in optimizer.statistics().tensors] == names


def test_is_documented() -> None:
    assert all(field.name in TensorStatistics.__doc__ for field in fields(TensorStatistics))  # type: ignore[operator]
