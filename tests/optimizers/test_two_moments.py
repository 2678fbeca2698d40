"""Ano, Anolog, Grams and AdaMomentum: sizes and directions of steps, the equations of their packages, bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from signadam_ext import Adam, AdaMomentum, Ano, Anolog, Grams
from signadam_ext.core.rule import rule_of

Array = np.ndarray[Any, Any]


def gradients(count: int, steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, generator=generator) for _ in range(steps)]


def trained(cls: type, grads: list[torch.Tensor], **hyperparameters: Any) -> tuple[Parameter, dict[str, torch.Tensor]]:
    """A parameter that was 0 after a step on each gradient, and its state."""
    param = Parameter(torch.zeros_like(grads[0]))
    optimizer = cls([param], **hyperparameters)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach(), optimizer.state[param]


def ano(beta1: Callable[[int], float], beta2: float, eps: float) -> Callable[[Array, dict[str, Array], int], Array]:
    """The step by lr = 1 as ano-optimizer 1.0.0 writes it."""

    def step(g: Array, state: dict[str, Array], t: int) -> Array:
        b1 = beta1(t)
        state["m"] = b1 * state["m"] + (1 - b1) * g
        state["v"] = beta2 * state["v"] - (1 - beta2) * np.sign(state["v"] - g**2) * g**2
        return 1 / np.sqrt(state["v"] / (1 - beta2**t) + eps) * np.abs(g) * np.sign(state["m"])

    return step


def grams(g: Array, state: dict[str, Array], t: int) -> Array:
    """The same of grams-pytorch 0.0.2."""
    state["m"] = 0.9 * state["m"] + (1 - 0.9) * g
    state["v"] = 0.999 * state["v"] + (1 - 0.999) * g**2
    size = math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
    return size * np.sign(g) * np.abs(state["m"] / (np.sqrt(state["v"]) + 1e-6))


@pytest.mark.parametrize(
    ("cls", "step"),
    [
        (Ano, ano(lambda t: 0.92, 0.99, 1e-8)),
        (Anolog, ano(lambda t: 1 - 1 / math.log(t + 2), 0.999, 1e-8)),
        (Grams, grams),
    ],
    ids=["Ano", "Anolog", "Grams"],
)
def test_authors_equations(cls: type, step: Callable[[Array, dict[str, Array], int], Array]) -> None:
    """With the defaults, in float64 and in the authors' order; Anolog with the paper's schedule."""
    grads = gradients(500, 30)
    state = {"m": np.zeros(500), "v": np.zeros(500)}
    p = np.zeros(500)
    for t, g in enumerate(grads, start=1):
        p -= 0.01 * step(g.double().numpy(), state, t)
    found, moments = trained(cls, grads, lr=0.01)
    assert np.allclose(found, p, rtol=1e-4, atol=1e-6)
    assert np.allclose(moments["exp_avg_sq"], state["v"], rtol=1e-4, atol=1e-9)


def test_first_steps() -> None:
    """By lr where biases are corrected; by 1 / (1 - b1) times as much where the second moment is the momentum's."""
    (g,) = gradients(500, 1)
    sizes = {Ano: 0.25, Anolog: 0.25, Grams: 0.25, AdaMomentum: 2.5}
    for cls, size in sizes.items():
        p, _ = trained(cls, [g], lr=0.25, eps=0.0)
        assert np.allclose(p, -size * g.sign(), rtol=1e-5, atol=0), cls


@pytest.mark.parametrize("cls", [Ano, Anolog, Grams])
def test_no_gradient_no_step(cls: type) -> None:
    """The gradient has part in the step itself: where it is 0, of either sign, momentum moves nothing."""
    grads = gradients(100, 5)
    before, _ = trained(cls, grads, lr=0.1)
    zeros = torch.zeros(100) * torch.tensor([1.0, -1.0] * 50)
    after, state = trained(cls, [*grads, zeros], lr=0.1)
    assert torch.equal(before, after) and (state["exp_avg"] != 0).all()


def test_grams_is_adam_where_momentum_and_gradient_agree() -> None:
    grads = [grad.abs() for grad in gradients(200, 20)]
    p, _ = trained(Grams, grads, lr=0.01, eps=0.0)
    expected, _ = trained(Adam, grads, lr=0.01, eps=0.0)
    assert np.allclose(p, expected, rtol=1e-5, atol=0)


def test_second_moment_of_ano_is_never_negative() -> None:
    """At the smallest beta, which would allow 0: also where the squares underflow, grow and shrink at once."""
    generator = torch.Generator().manual_seed(1)
    for beta2 in (0.5, 0.5 + 2**-24, 0.6):
        grads = [10.0 ** (44 * torch.rand(2000, generator=generator) - 25) for _ in range(20)]
        grads += [grad * 0.999 for grad in grads[-1:]] * 5
        p, state = trained(Ano, grads, lr=0.01, betas=(0.9, beta2))
        assert (state["exp_avg_sq"] >= 0).all() and p.isfinite().all()


def test_anolog_needs_no_first_beta() -> None:
    """1 - 1 / log(t + 2): never negative, where the codes of its author have -0.44 at first."""
    optimizer = Anolog([Parameter(torch.zeros(1))])
    (group,) = optimizer.param_groups
    scalars = rule_of(Anolog, group).scalars
    shown = {t: scalars(group, t) for t in (1, 2, 100, 10**5, 2**53)}
    assert [round(s["beta1"], 2) for s in shown.values()] == [0.09, 0.28, 0.78, 0.91, 0.97]
    for t, s in shown.items():
        assert s["one_minus_beta1"] == pytest.approx(1 / math.log(t + 2), rel=1e-13)
    assert round(1 - 1 / math.log(2), 2) == -0.44


def test_eps_of_ada_momentum_accumulates() -> None:
    _, state = trained(AdaMomentum, [torch.zeros(3)] * 10, lr=0.01, betas=(0.9, 0.99), eps=1e-4)
    assert np.allclose(state["exp_avg_sq"], 1e-4 * (1 - 0.99**10) / (1 - 0.99), rtol=1e-6, atol=0)


@pytest.mark.parametrize("cls", [Ano, Anolog, Grams, AdaMomentum])
def test_not_finite(cls: type) -> None:
    """As in Adam: it reaches its own parameter, and no other."""
    p, state = trained(cls, [torch.tensor([math.nan, math.inf, 1.0]), torch.ones(3)], lr=0.25)
    assert p.isnan().tolist() == [True, True, False]
    assert state["exp_avg"].isnan().tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("cls", "given", "said"),
    [
        (Ano, {"betas": (0.9, 0.49)}, r"betas\[1\]=0.49: must be in \[0.5, 1\)"),
        (Ano, {"betas": (1.0, 0.9)}, r"betas\[0\]=1.0: must be in \[0, 1\)"),
        (Anolog, {"beta2": 0.4}, r"beta2=0.4: must be in \[0.5, 1\)"),
        (Anolog, {"betas": (0.9, 0.99)}, "betas"),
        (Grams, {"eps": -1.0}, "eps"),
        (AdaMomentum, {"beta": 0.9}, "this rule has two"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(cls: type, given: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        cls([Parameter(torch.zeros(3))], **given)
