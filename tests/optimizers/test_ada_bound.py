"""AdaBound and AMSBound: the bounds, and the learning rate to which they are in proportion."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from signadam_ext import AdaBound, Adam, AMSBound
from signadam_ext.functional import ada_bound, ams_bound

EACH = pytest.mark.parametrize("method", [AdaBound, AMSBound])
BETA1 = 0.9


def gradient(seed: int, size: int = 512) -> Tensor:
    """Of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator) * 10 ** (8 * torch.rand(size, generator=generator) - 6)


def bounds(final: float, gamma: float, t: int) -> tuple[float, float]:
    return final * (1 - 1 / (gamma * t + 1)), final * (1 + 1 / (gamma * t))


@EACH
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_each_step_lies_between_its_bounds(method: type, backend: str) -> None:
    """In proportion to the momentum, in fp32 from a parameter of 0; both bounds are reached, and there is room between
    them."""
    param = torch.nn.Parameter(torch.zeros(512))
    optimizer = method([param], lr=1e-2, final_lr=0.05, gamma=0.25, backend=backend)
    reached = set()
    for t in range(1, 30):
        with torch.no_grad():
            param.zero_()
        param.grad = gradient(t)
        optimizer.step()
        lower, upper = (torch.tensor(x, dtype=torch.float32) for x in bounds(0.05, 0.25, t))
        m = optimizer.state[param]["exp_avg"]
        size, least, most = param.abs(), lower * m.abs(), upper * m.abs()
        assert (size >= least).all() and (size <= most).all() and (param * m <= 0).all()
        reached |= {name for name, found in (("least", size == least), ("most", size == most)) if found.any()}
        reached |= {"between"} if ((size > least) & (size < most)).any() else set()
    assert reached == {"least", "most", "between"}


def test_without_bounds_it_is_adam() -> None:
    """Bounds that are far away change nothing but roundings: Adam divides its root by the bias correction."""
    ours, adam = (torch.nn.Parameter(torch.zeros(512)) for _ in range(2))
    # The lower bound is nearly 0, the upper one nearly infinite.
    optimizers = [AdaBound([ours], lr=1e-3, gamma=1e-12, eps=1e-30), Adam([adam], lr=1e-3, eps=1e-30)]
    for t in range(1, 20):
        ours.grad = adam.grad = gradient(t)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(ours, adam, rtol=1e-5, atol=1e-8)


def test_in_the_end_it_is_sgd_with_momentum() -> None:
    """After many steps both bounds are ``final_lr``."""
    param = torch.nn.Parameter(torch.zeros(512))
    optimizer = AdaBound([param], lr=1e-3, final_lr=0.25)
    param.grad = gradient(1)
    optimizer.step()
    optimizer.state[param]["step"].fill_(2.0**50)
    with torch.no_grad():
        param.zero_()
    optimizer.step()
    assert torch.equal(param, -0.25 * optimizer.state[param]["exp_avg"])


@EACH
def test_bounds_follow_a_schedule(method: type) -> None:
    """A rate of a tenth has steps of a tenth: bounds are in proportion to ``lr / base_lr``, in a loaded state too, and
    in a group that is added later."""
    params = [torch.nn.Parameter(torch.zeros(512)) for _ in range(4)]
    whole, tenth, loaded, added = params
    optimizers = [method([p], lr=lr, final_lr=0.05) for p, lr in zip(params, (1e-2, 1e-2, 3e-5, 7e-4), strict=True)]
    optimizers[1].param_groups[0]["lr"] = 1e-3
    optimizers[2].load_state_dict(optimizers[1].state_dict())
    assert optimizers[2].param_groups[0]["base_lr"] == 1e-2
    optimizers[3] = method([torch.nn.Parameter(torch.zeros(1))], lr=7e-4, final_lr=0.05)
    optimizers[3].add_param_group({"params": [added], "lr": 1e-2})
    optimizers[3].param_groups[1]["lr"] = 1e-3
    for param in params:
        param.grad = gradient(1)
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(loaded, tenth) and torch.equal(added, tenth)
    assert torch.allclose(tenth, whole / 10, rtol=1e-6, atol=0)


@EACH
def test_the_functions_bounds_follow_a_schedule(method: type) -> None:
    param, ours = torch.nn.Parameter(torch.zeros(512)), torch.zeros(512)
    optimizer = method([param], lr=1e-2, final_lr=0.05)
    optimizer.param_groups[0]["lr"] = 1e-3
    param.grad = gradient(1)
    optimizer.step()
    function, moments = (ada_bound, 2) if method is AdaBound else (ams_bound, 3)
    state = [*([torch.zeros(512)] for _ in range(moments)), [torch.tensor(0.0)]]
    for base_lr in (-1.0, "1e-2"):
        with pytest.raises((TypeError, ValueError), match="base_lr"):
            function([ours], [gradient(1)], *state, lr=1e-3, final_lr=0.05, base_lr=base_lr)
    assert not ours.any()
    function([ours], [gradient(1)], *state, lr=1e-3, final_lr=0.05, base_lr=1e-2)
    assert torch.equal(ours, param)


@EACH
def test_a_rate_that_began_at_zero(method: type) -> None:
    """Its bounds follow no schedule, until the group is told what it begins with. A rate of 0 moves nothing."""
    params = [torch.nn.Parameter(torch.zeros(512)) for _ in range(3)]
    optimizers = [method([param], lr=lr) for param, lr in zip(params, (0.0, 0.0, 1e-2), strict=True)]
    for param in params:
        param.grad = gradient(1)
    optimizers[0].step()
    assert not params[0].any()
    optimizers[0].state.clear()
    optimizers[1].param_groups[0]["base_lr"] = 1e-2
    for optimizer, lr in zip(optimizers, (1e-3, 1e-3, 1e-3), strict=True):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    unscheduled = torch.nn.Parameter(torch.zeros(512))
    unscheduled.grad = gradient(1)
    method([unscheduled], lr=1e-3).step()
    assert torch.equal(params[0], unscheduled) and torch.equal(params[1], params[2])
    assert not torch.equal(params[0], params[1])


@EACH
def test_nan_reaches_the_parameter(method: type) -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = method([param])
    param.grad = torch.tensor([1.0, math.nan, -1.0])
    optimizer.step()
    assert param.isnan().tolist() == [False, True, False]


def test_the_largest_second_moment_is_kept() -> None:
    """After a large gradient, AdaBound's rate recovers and AMSBound's does not."""
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizers = [
        method([param], betas=(0.0, 0.5), gamma=1e-9)
        for method, param in zip((AdaBound, AMSBound), params, strict=True)
    ]
    for g in (100.0, *([1.0] * 30)):
        before = [param.item() for param in params]
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = torch.tensor([g])
            optimizer.step()
    moved = [b - param.item() for b, param in zip(before, params, strict=True)]
    assert moved[0] == pytest.approx(1e-3, rel=1e-3) and moved[1] == pytest.approx(1e-3 / 100 * math.sqrt(2), rel=1e-3)
