"""The optimizers against the papers: formulas in float64 within a derived bound, and the properties they state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.paper_formulas import TABLE, Bounded, Row

from signadam_ext import SignAdam, SignAdamPP, SignSGD, Signum
from signadam_ext.core.symbols import power

STEPS = 40


def parameter(*shape: int, seed: int = 0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def variances(param: torch.Tensor, steps: int = STEPS) -> list[torch.Tensor]:
    """Of the gradients, for the rules that are given them."""
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(param.shape, generator=generator) for _ in range(steps)]


def zeros(param: torch.Tensor) -> dict[str, Bounded]:
    """Every moment there is, before the first step."""
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_avg_slow", "momentum_buffer", "exp_avg_var")
    return {name: Bounded.exact(np.zeros(param.shape)) for name in names}


def gradients(param: torch.Tensor, steps: int = STEPS, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(param.shape, generator=generator) for _ in range(steps)]


@pytest.mark.parametrize("decay", [(0.0, True), (0.125, True)], ids=["no-decay", "decoupled"])
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)
def test_formula(row: Row, maximize: bool, decay: tuple[float, bool]) -> None:
    """Parameters and moments stay within the rounding error that their own formula accumulates."""
    weight_decay, decoupled = decay
    param = parameter(37, 5)
    h: dict[str, Any] = {"lr": 1e-2, **row.hyperparameters}
    optimizer = row.optimizer(
        [param], maximize=maximize, weight_decay=weight_decay, decoupled_weight_decay=decoupled, **h
    )
    p = Bounded.exact(param.detach().numpy())
    state = zeros(param)
    for t, (g, variance) in enumerate(zip(gradients(param), variances(param), strict=True), start=1):
        param.grad, param.grad_variance, h["grad_variance"] = g, variance, Bounded.exact(variance.numpy())
        optimizer.step()
        if weight_decay and (row.moves_at_first or t > 1):
            p = p * Bounded.scalar(1 - h["lr"] * weight_decay)
        p = row.formula(p, Bounded.exact((-g if maximize else g).numpy()), state, t, h)
        measured = {"p": param.detach(), **{k: v for k, v in optimizer.state[param].items() if k in state}}
        for name, tensor in measured.items():
            expected = p if name == "p" else state[name]
            distance = np.abs(tensor.double().numpy() - expected.value)
            assert (distance <= expected.error).all(), f"{name} strays at step {t}: {(distance / expected.error).max()}"
    # The bound must mean something: far below a single step, and no sign left open.
    assert p.error.max() < 0.01 * h["lr"]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)
def test_bound_has_teeth(row: Row) -> None:
    """The bound above does not forgive a learning rate that is wrong by one part in a thousand."""
    param = parameter(37, 5)
    optimizer = row.optimizer([param], lr=1e-2, weight_decay=0.0, **row.hyperparameters)
    p = Bounded.exact(param.detach().numpy())
    state = zeros(param)
    h = {"lr": 1e-2 * 1.001, **row.hyperparameters}
    for t, (g, variance) in enumerate(zip(gradients(param), variances(param), strict=True), start=1):
        param.grad, param.grad_variance, h["grad_variance"] = g, variance, Bounded.exact(variance.numpy())
        optimizer.step()
        p = row.formula(p, Bounded.exact(g.numpy()), state, t, h)
    assert (np.abs(param.detach().double().numpy() - p.value) > p.error).mean() > 0.5


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)
def test_coupled_decay_is_part_of_the_gradient(row: Row) -> None:
    """Coupled decay equals no decay on gradients to which ``wd * p`` was added: the gate sees it too."""
    coupled, plain = parameter(100), parameter(100)
    a = row.optimizer([coupled], lr=1e-2, weight_decay=0.25, decoupled_weight_decay=False, **row.hyperparameters)
    b = row.optimizer([plain], lr=1e-2, weight_decay=0.0, **row.hyperparameters)
    for g, variance in zip(gradients(coupled), variances(coupled), strict=True):
        coupled.grad, coupled.grad_variance = g, variance
        plain.grad, plain.grad_variance = g + 0.25 * plain.detach(), variance
        a.step()
        b.step()
        assert torch.equal(coupled, plain)


@pytest.mark.parametrize("make", [SignAdam, SignAdamPP], ids=["sign_adam", "sign_adam_pp"])
def test_lemma_1(make: type) -> None:
    """[SA] Lemma 1: |m| <= 1, even under a gradient that never changes sign, at any beta."""
    for beta in (0.0, 0.5, 0.9, 0.999, 1 - 2**-20):
        param = parameter(64)
        optimizer = make([param], **({"betas": (beta, 0.999)} if make is SignAdam else {"beta": beta}))
        param.grad = torch.where(torch.arange(64) % 2 == 0, 1e30, -1e-30)
        for _ in range(300):
            optimizer.step()
            assert optimizer.state[param]["exp_avg"].abs().max() <= 1


@pytest.mark.parametrize("make", [SignSGD, SignAdamPP], ids=["sign_sgd", "sign_adam_pp"])
def test_gate_drops_equality(make: type) -> None:
    """An entry at exactly the threshold is dropped, the next fp32 beyond it passes, on both sides."""
    alpha = 0.5
    beyond = float(np.nextafter(np.float32(alpha), np.float32(1)))
    param = torch.nn.Parameter(torch.zeros(6))
    param.grad = torch.tensor([alpha, -alpha, beyond, -beyond, 0.0, torch.nan])
    make([param], lr=1.0, alpha=alpha, **({} if make is SignSGD else {"beta": 0.0})).step()
    assert param.tolist() == [0.0, 0.0, -1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)
def test_zero_gradient_moves_nothing(row: Row) -> None:
    """sign(0) = sign(-0) = 0: unlike in several packages, a zero gradient does not move a weight."""
    param = parameter(10)
    before = param.detach().clone()
    param.grad, param.grad_variance = torch.zeros(10) * torch.tensor([1.0, -1.0] * 5), torch.zeros(10)
    row.optimizer([param], lr=1.0, weight_decay=0.0, **row.hyperparameters).step()
    assert torch.equal(param, before)


def test_analytic_second_moment_equals_exact() -> None:
    """[SA] Sec. 4: without zero gradients the exact v is 1 - beta2^t. Both stay within their bounds of one formula."""
    exact, analytic = parameter(50), parameter(50)
    a = SignAdam([exact], lr=1e-2)
    b = SignAdam([analytic], lr=1e-2, second_moment="analytic")
    for t, g in enumerate(gradients(exact), start=1):
        exact.grad = analytic.grad = g
        a.step()
        b.step()
        v = a.state[exact]["exp_avg_sq"].double()
        # Each step rounds two products and a sum of numbers at most v.
        assert ((v - (1 - 0.999**t)).abs() <= t * 3 * 2.0**-24 * v).all()
        assert torch.equal(a.state[exact]["exp_avg"], b.state[analytic]["exp_avg"])
    assert "exp_avg_sq" not in b.state[analytic]


def test_sign_adam_pp_without_memory_is_sign_sgd() -> None:
    plain, plus = parameter(1000), parameter(1000)
    a, b = SignSGD([plain], lr=1e-2), SignAdamPP([plus], lr=1e-2, beta=0.0, alpha=0.0)
    for g in gradients(plain):
        plain.grad = plus.grad = g
        a.step()
        b.step()
        assert torch.equal(plain, plus)


def test_signum_against_torch() -> None:
    """torch's own SGD with momentum and dampening 1 - (1 - beta) keeps the same m; its sign is the step."""
    param, shadow = parameter(500), parameter(500)
    optimizer = Signum([param], lr=2.0**-7, beta=0.75)
    expected = param.detach().clone()
    momentum = torch.zeros(500)
    for g in gradients(shadow):
        param.grad = g
        optimizer.step()
        # beta = 0.75 and 1 - beta are exact in fp32, and so torch's two products and sum round as ours do.
        momentum = momentum * 0.75 + g * 0.25
        expected = expected - torch.sign(momentum) * 2.0**-7
        assert torch.equal(optimizer.state[param]["exp_avg"], momentum)
        assert torch.equal(param, expected)


def test_first_step_of_released_code() -> None:
    """The authors' repository moves by the gated sign: SignSGD with alpha = 5e-4 is what it computes."""
    param = parameter(100)
    expected = param.detach().clone()
    optimizer = SignSGD([param], lr=2.0**-10, alpha=5e-4)
    for g in gradients(param):
        g = g * 1e-3
        param.grad = g
        optimizer.step()
        expected = expected - 2.0**-10 * torch.where(g.abs() > 5e-4, g.sign(), 0.0)
        assert torch.equal(param, expected)


def test_step_sizes_without_bias_correction() -> None:
    """signADAM's first steps under a constant sign, as its docstring gives them: the closed form, in units of lr."""
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = SignAdam([param], lr=1.0)
    param.grad = torch.ones(1)
    sizes = []
    for t in range(1, 101):
        before = param.item()
        optimizer.step()
        sizes.append(before - param.item())
        assert sizes[-1] == pytest.approx((1 - 0.9**t) / np.sqrt(1 - 0.999**t), rel=1e-4)
    assert [round(sizes[t - 1], 1) for t in (1, 2, 5, 10, 12, 100)] == [3.2, 4.2, 5.8, 6.5, 6.6, 3.2]
    assert max(sizes) == sizes[11]


def test_power_is_repeated_squaring() -> None:
    assert [power(0.9, n) for n in (0, 1, 2, 3)] == [1.0, 0.9, 0.9 * 0.9, 0.9 * (0.9 * 0.9)]
    assert power(0.999, 10**6) == pytest.approx(0.999**10**6, rel=1e-12)


def test_deviation_is_the_population_deviation() -> None:
    """a_1 = (1 - b) std(g), dividing by n; a gradient that is not finite leaves a as it is."""
    param = parameter(40_000)
    optimizer = SignAdamPP([param], confidence="adaptive", confidence_beta=0.75)
    (g,) = gradients(param, 1)
    param.grad = g
    optimizer.step()
    a = optimizer.state[param]["exp_avg_std"].item()
    assert a == pytest.approx(0.25 * np.std(g.double().numpy()), rel=1e-13)
    param.grad = torch.full_like(g, torch.inf)
    optimizer.step()
    assert optimizer.state[param]["exp_avg_std"].item() == a
