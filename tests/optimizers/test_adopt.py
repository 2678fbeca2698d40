"""ADOPT: its first step, which makes state alone, and its limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from signadam_ext import ADOPT


def parameter(size: int = 64) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(0)))


def gradient(seed: int, size: int = 64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "decay",
    [
        {"weight_decay": 0.3},
        {"weight_decay": 0.3, "weight_decay_kind": "cautious"},
        {"weight_decay": 0.3, "weight_decay_scale": "independent"},
    ],
    ids=["decoupled", "cautious", "independent"],
)
def test_the_first_step_moves_nothing(decay: dict[str, Any], backend: str, clip: bool) -> None:
    """Not a bit, whatever the gradient; only the second moment is made, and counted as a step."""
    param = parameter()
    with torch.no_grad():
        # Cautious decay adds a step of 0, in which a parameter of -0 loses its sign.
        param[:4] = torch.tensor([0.0, -0.0 if "weight_decay_kind" not in decay else 0.0, math.inf, 1e-40])
    before = param.detach().clone()
    optimizer = ADOPT([param], lr=0.5, clip=clip, backend=backend, **decay)
    param.grad = gradient(1)
    param.grad[10:15] = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0])
    optimizer.step()
    assert torch.equal(param.view(torch.int32), before.view(torch.int32))
    state = optimizer.state[param]
    assert not state["exp_avg"].any() and state["step"] == 1
    square = param.grad * param.grad
    assert torch.equal(state["exp_avg_sq"].nan_to_num(-1), square.nan_to_num(-1))


def test_coupled_decay_is_in_the_first_second_moment() -> None:
    param = parameter()
    optimizer = ADOPT([param], weight_decay=0.25, decoupled_weight_decay=False)
    param.grad = gradient(1)
    optimizer.step()
    g = param.grad + 0.25 * param.detach()
    assert torch.equal(optimizer.state[param]["exp_avg_sq"], g * g)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_limits_are_fourth_roots(backend: str) -> None:
    """Of the number of steps before: 1 at the second, and a gradient that has grown without end reaches them."""
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = ADOPT([param], lr=1.0, betas=(0.0, 0.5), backend=backend)
    for t in range(1, 12):
        before = param.detach().clone()
        param.grad = torch.tensor([30.0, -30.0]).mul(30.0 ** (t - 1))
        optimizer.step()
        limit = torch.tensor(math.sqrt(math.sqrt(t - 1)), dtype=torch.float32)
        assert torch.equal(param, before - torch.stack([limit, -limit]))


def test_no_limit_without_clipping() -> None:
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = ADOPT([param], lr=1.0, betas=(0.0, 0.5), clip=False)
    for g in (1.0, 1e20):
        param.grad = torch.tensor([g])
        optimizer.step()
    assert param.item() == -torch.tensor(1e20).item()


def test_a_gradient_is_normalized_by_those_before() -> None:
    """The second moment of this step is the next one's."""
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = ADOPT([param], lr=1.0, betas=(0.0, 0.75), clip=False)
    moved = []
    for g in (2.0, 6.0, 1.0):
        before = param.item()
        param.grad = torch.tensor([g])
        optimizer.step()
        moved.append(before - param.item())
    assert moved == [0.0, 3.0, pytest.approx(1 / math.sqrt(0.75 * 4 + 0.25 * 36), rel=1e-6)]


def test_eps_is_a_least_root() -> None:
    """And not an addition: where the root is larger it changes no bit."""
    params = [parameter(), parameter()]
    optimizers = [ADOPT([params[0]], eps=1e-30), ADOPT([params[1]], eps=1e-3)]
    for seed in range(4):
        g = gradient(seed)
        g = torch.where(g.abs() < 0.01, 0.1, g)
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = g
            optimizer.step()
    assert torch.equal(*params)
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = ADOPT([param], lr=1.0, betas=(0.0, 0.9), eps=0.25)
    for g in (0.0, 0.125):
        param.grad = torch.tensor([g])
        optimizer.step()
    assert param.item() == -0.5


@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
def test_no_eps_and_no_gradient(state_dtype: str) -> None:
    """An entry without a gradient stays, and one whose gradient is the first that is not 0 moves by the limit."""
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = ADOPT([param], lr=1.0, betas=(0.0, 0.9), eps=0.0, state_dtype=(state_dtype, "fp32"))
    for g in (torch.zeros(2), torch.tensor([0.0, 1e-3])):
        param.grad = g
        optimizer.step()
    assert param.tolist() == [0.0, -1.0]


@pytest.mark.parametrize("bad, becomes_nan", [(math.nan, True), (math.inf, False)])
def test_bad_gradients_later(bad: float, becomes_nan: bool) -> None:
    """NaN is as loud as with Adam; an infinity is clipped, and its entry has no step from then on."""
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = ADOPT([param], lr=1.0)
    for g in (torch.ones(2), torch.tensor([bad, 1.0])):
        param.grad = g
        optimizer.step()
    assert param.isnan().tolist() == [becomes_nan, False]


def test_a_step_count_that_is_resumed_is_no_first_step() -> None:
    param = parameter()
    optimizer = ADOPT([param], lr=0.1)
    param.grad = gradient(1)
    optimizer.step()
    other = ADOPT([param], lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    before = param.detach().clone()
    other.step()
    assert not torch.equal(param, before)
