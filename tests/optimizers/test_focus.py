"""FOCUS: the pull to the average of the weights, its first step, what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from signadam_ext import FOCUS, Signum
from signadam_ext.functional import FunctionalOptimizer, focus

BACKENDS = ["cpu", "reference"]


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(dtype))


def gradients(count: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def take(optimizer: torch.optim.Optimizer, param: torch.nn.Parameter, given: list[torch.Tensor]) -> None:
    for g in given:
        param.grad = g.clone()
        optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_step_is_that_of_signum(backend: str) -> None:
    """The average is the weight itself then, so that nothing pulls: no rounding error has a sign."""
    param = parameter(1000)
    begun = param.detach().clone()
    optimizer = FOCUS([param], lr=0.5, gamma=0.25, backend=backend)
    (g,) = gradients(1, 1000)
    take(optimizer, param, [g])
    assert torch.equal(optimizer.state[param]["param_avg"], begun)
    assert torch.equal(param.detach(), begun - 0.5 * g.sign())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta2", [0.0, 0.999])
def test_at_first_the_average_is_the_weight(backend: str, beta2: float) -> None:
    """To the last bit, whatever it was before: a step that a device skipped has left one of other weights."""
    param = parameter(1000)
    begun = param.detach().clone()
    (g,) = gradients(1, 1000)
    average, m, step = torch.full((1000,), 3.0), torch.zeros(1000), torch.tensor(0.0)
    options = {"lr": 0.5, "betas": (0.9, beta2), "gamma": 0.25, "backend": backend}
    focus([param.detach()], [g], [average], [m], [step], **options)
    assert torch.equal(average, begun)
    assert torch.equal(param.detach(), begun - 0.5 * g.sign())
    if beta2 == 0.0:  # then it is at every step
        before = param.detach().clone()
        focus([param.detach()], [g], [average], [m], [step], **options)
        assert torch.equal(average, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pulls_towards_the_average(backend: str) -> None:
    """Where the momentum is 0 only the pull is left: by lr * gamma, and 0 where the weight is its average."""
    param = torch.nn.Parameter(torch.tensor([1.0, 1.0, 0.0, 1.0]))
    optimizer = FOCUS([param], lr=0.5, betas=(0.0, 0.5), gamma=0.25, backend=backend)
    take(optimizer, param, [torch.tensor([1.0, -1.0, 0.0, 0.0])])
    assert param.tolist() == [0.5, 1.5, 0.0, 1.0]
    take(optimizer, param, [torch.zeros(4)])
    # A third of the weight before the first step, two of the one after it.
    average = torch.tensor([1.0, 1.0, 0.0, 1.0]) + torch.tensor(2 / 3) * torch.tensor([-0.5, 0.5, 0.0, 0.0])
    assert torch.equal(optimizer.state[param]["param_avg"], average)
    assert param.tolist() == [0.625, 1.375, 0.0, 1.0]


def test_decay_goes_along_the_average() -> None:
    """And it takes lr * weight_decay of the average, not of the weight."""
    param = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = FOCUS([param], lr=0.5, betas=(0.0, 0.5), gamma=0.0, weight_decay=0.25)
    take(optimizer, param, [torch.tensor([0.0])])
    assert param.item() == 2.0 - 0.125 * 2.0
    take(optimizer, param, [torch.tensor([0.0])])
    average = torch.tensor(2.0) + torch.tensor(2 / 3) * (torch.tensor(1.75) - 2.0)
    assert param.item() == (1.75 - 0.125 * average).item()


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"weight_decay": 0.1, "decoupled_weight_decay": False}])
def test_without_a_pull_it_is_signum(options: dict[str, Any]) -> None:
    ours, theirs = parameter(130, 7), parameter(130, 7)
    given = gradients(4, 130, 7)
    take(FOCUS([ours], lr=0.01, betas=(0.9, 0.99), gamma=0.0, **options), ours, given)
    take(Signum([theirs], lr=0.01, beta=0.9, **options), theirs, given)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_observed_steps_have_the_same_bits(dtype: torch.dtype) -> None:
    """Whole chunks too: of a rule with two moments that divides by nothing, the second was once forgotten there."""
    watched, plain = (parameter(20000, dtype=dtype) for _ in range(2))
    a, b = FOCUS([watched], weight_decay=0.1), FOCUS([plain], weight_decay=0.1, backend="reference")
    a.observe()
    given = gradients(3, 20000)
    take(a, watched, [g.to(dtype) for g in given])
    take(b, plain, [g.to(dtype) for g in given])
    assert torch.equal(watched, plain)
    for name, found in a.state[watched].items():
        assert torch.equal(found, b.state[plain][name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dtype": "int8"}, "state_dtype='int8' of exp_avg"),
        ({"state_dtype": ("bf16", "bf16")}, "state_dtype='bf16' of param_avg"),
        ({"gamma": -0.1}, "gamma"),
        ({"weight_decay_kind": "cautious", "weight_decay": 0.1}, "cautious"),
        ({"caution": "exact"}, "depends on the parameter"),
        ({"lr_scale": "rms"}, "depends on the parameter"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FOCUS([parameter(3)], **options)


def test_resumes_and_has_no_modes() -> None:
    param = parameter(33)
    optimizer = FOCUS([param], weight_decay=0.1, state_dtype="bf16")
    given = gradients(4, 33)
    take(optimizer, param, given[:2])
    resumed = torch.nn.Parameter(param.detach().clone())
    other = FOCUS([resumed], lr=1.0, state_dtype="bf16")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take(optimizer, param, given[2:])
    take(other, resumed, given[2:])
    assert torch.equal(param, resumed)
    assert not hasattr(optimizer, "eval")


def test_functions() -> None:
    param = parameter(5)
    p, begun = param.detach().clone(), param.detach().clone()
    given = gradients(3, 5)
    averages, momenta, steps = [p.clone()], [torch.zeros(5)], [torch.tensor(0.0)]
    for g in given:
        focus([p], [g], averages, momenta, steps, lr=0.01, gamma=0.5)
    take(FOCUS([param], gamma=0.5), param, given)
    assert torch.equal(param, p)
    whole = FunctionalOptimizer(FOCUS, gamma=0.5)
    params = {"p": begun}
    state = whole.init(params)
    for g in given:
        params, state = whole.step(params, {"p": g}, state)
    assert torch.equal(params["p"], p)


def test_against_the_sum_that_the_authors_keep() -> None:
    """Their average is a sum over 1 - b2^t: the same weights but for rounding, after a first step without a pull."""
    param = parameter(500)
    theirs = param.detach().double()
    optimizer = FOCUS([param], lr=0.01, betas=(0.9, 0.97), gamma=0.35, weight_decay=0.1)
    m, total = torch.zeros(500).double(), torch.zeros(500).double()
    for t, g in enumerate(gradients(20, 500), start=1):
        take(optimizer, param, [g])
        m = 0.9 * m + (1 - 0.9) * g.double()
        total = 0.97 * total + (1 - 0.97) * theirs
        average = total / (1 - 0.97**t)
        pull = 0.35 * torch.sign(theirs - average) if t > 1 else 0.0
        theirs = theirs - 0.01 * (torch.sign(m) + pull) - 0.01 * 0.1 * average
    # A pull whose sign the rounding of fp32 decides differs by twice lr * gamma.
    near = (param.detach().double() - theirs).abs() < 1e-5
    assert near.double().mean() > 0.99
