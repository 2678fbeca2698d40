"""AdamS, BCOS and what is made of Lion: the size of steps, identities between rules, and what is not finite."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from signadam_ext import BCOS, AdamS, Lion, LionK, MARSLion, SignSGD, Signum
from signadam_ext.functional import adam_s

INF, NAN = math.inf, math.nan
KAPPAS = ("threshold", "huber", "softsign")


def gradients(count: int, steps: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, generator=generator) for _ in range(steps)]


def trained(cls: type, grads: list[torch.Tensor], **hyperparameters: Any) -> torch.optim.Optimizer:
    """After a step on each gradient, of a parameter that was 0; without weight decay."""
    param = Parameter(torch.zeros_like(grads[0]))
    optimizer = cls([param], weight_decay=0.0, **hyperparameters)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return optimizer


def parameter_of(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    return optimizer.param_groups[0]["params"][0].detach()


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.0, 0.5), (0.5, 0.0)], ids=str)
def test_first_step_of_adam_s(betas: tuple[float, float]) -> None:
    """(1 - b1) / sqrt(1 - b2) times lr, whatever the gradient: there is no bias correction."""
    size = (1 - betas[0]) / math.sqrt(1 - betas[1])
    (g,) = gradients(100, 1)
    p = parameter_of(trained(AdamS, [g], lr=0.25, betas=betas, eps=0.0))
    assert np.allclose(p.double(), -0.25 * size * g.sign().double(), rtol=1e-6, atol=0)


def test_steps_of_adam_s_are_bounded() -> None:
    """By Cauchy and Schwarz; the worst gradient is that of equality, b2 (1 - b1) / (b1 (1 - b2)) times the momentum."""
    b1, b2 = 0.9, 0.95
    bound = math.sqrt(b1**2 / b2 + (1 - b1) ** 2 / (1 - b2))
    assert round(bound, 2) == 1.03
    g = torch.cat([torch.tensor([1.0]), *gradients(1000, 1)])
    optimizer = trained(AdamS, [g], lr=1.0, betas=(b1, b2), eps=0.0)
    param = optimizer.param_groups[0]["params"][0]
    worst = b2 * (1 - b1) / (b1 * (1 - b2)) * optimizer.state[param]["exp_avg"][:1]
    param.grad = torch.cat([worst, *gradients(1000, 1, seed=1)])
    before = param.detach().clone()
    optimizer.step()
    steps = (param.detach() - before).abs().double()
    assert steps[0].item() == pytest.approx(bound, rel=1e-6) and steps.max() <= bound * (1 + 1e-6)


@pytest.mark.parametrize("simple", [False, True])
def test_bcos_begins_with_the_gradient(simple: bool) -> None:
    """The first momentum is the first gradient, the step lr, exactly where lr is a power of two; and so it stays."""
    (g,) = gradients(1000, 1)
    optimizer = trained(BCOS, [g], lr=0.25, eps=0.0, simple=simple)
    (param,) = optimizer.param_groups[0]["params"]
    assert torch.equal(optimizer.state[param]["exp_avg"], g)
    assert torch.equal(param.detach(), -0.25 * g.sign())
    # Under the same gradient again, v is its square and m itself.
    for _ in range(5):
        param.grad = g.clone()
        optimizer.step()
    assert np.allclose(param.detach(), -1.5 * g.sign(), rtol=1e-5, atol=0)


def test_simple_bcos_is_adam_s_from_its_first_momentum_on() -> None:
    """With b2 = 1 - (1 - b)^2, bit for bit where doubles hold that exactly."""
    first, *later = gradients(300, 8)
    for beta in (0.5, 0.75, 1 - 2**-5):
        optimizer = trained(BCOS, [first, *later], lr=0.01, beta=beta, simple=True)
        p = parameter_of(trained(BCOS, [first], lr=0.01, beta=beta, simple=True)).clone()
        m = first.clone()
        for g in later:
            adam_s([p], [g], [m], lr=0.01, betas=(beta, 1 - (1 - beta) ** 2), eps=1e-6)
        (param,) = optimizer.param_groups[0]["params"]
        assert torch.equal(param, p) and torch.equal(optimizer.state[param]["exp_avg"], m)


def test_bcos_takes_no_root_of_less_than_zero() -> None:
    """Where squares underflow, the second moment as printed comes out negative, and the parameter would be NaN."""
    beta = 0.05  # only small ones give the product enough weight
    grid = torch.linspace(0.5, 1.5, 141)
    first, second = 3.1e-22 * grid.repeat_interleave(141), -2.8e-23 * grid.repeat(141)
    b = np.float32(beta)
    m, g = first.numpy(), second.numpy()
    rest = np.float32((1 - beta) ** 2)
    printed = np.float32(3 * beta**2 - 2 * beta**3) * m * m + rest * g * g + np.float32(2) * b * rest * m * g
    assert (printed < 0).any()
    p = parameter_of(trained(BCOS, [first, second], lr=0.01, beta=beta))
    assert p.isfinite().all()


@pytest.mark.parametrize("kappa", KAPPAS)
def test_lion_k_without_a_bend_is_lion(kappa: str) -> None:
    """Bit for bit; what is not finite goes its own way through softsign."""
    grads = gradients(1000, 6)
    specials = [0.0, -0.0, 1e-45, -1e-40, 3e38, *([] if kappa == "softsign" else [INF, -INF, NAN])]
    for grad in grads[::2]:
        grad[: len(specials)] = torch.tensor(specials)
    a = trained(LionK, grads, lr=0.01, kappa=kappa, epsilon=0.0)
    b = trained(Lion, grads, lr=0.01)
    for found, expected in zip(
        (parameter_of(a), *a.state[a.param_groups[0]["params"][0]].values()),
        (parameter_of(b), *b.state[b.param_groups[0]["params"][0]].values()),
        strict=True,
    ):
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


def test_slopes() -> None:
    """Of u = g, at the bend and to both sides of it, exactly."""
    below = float(np.nextafter(np.float32(0.5), np.float32(0)))
    u = torch.tensor([0.0, 0.125, -0.25, below, 0.5, -0.5, 1.5, -3.5])
    slopes = {
        "threshold": [0, 0, 0, 0, 0, 0, 1, -1],
        "huber": [0, 0.25, -0.5, 2 * below, 1, -1, 1, -1],
        "softsign": [0, 0.2, -1 / 3, below / (0.5 + below), 0.5, -0.5, 0.75, -0.875],
    }
    for kappa, slope in slopes.items():
        p = parameter_of(trained(LionK, [u], lr=1.0, betas=(0.0, 0.0), kappa=kappa, epsilon=0.5))
        # fp32 rounds the sum in the denominator, and the quotient.
        assert np.allclose(p, -torch.tensor(slope, dtype=torch.float64), rtol=2 * 2.0**-24, atol=0), kappa


def test_mars_lion_is_lion() -> None:
    """MARS's momentum is Lion's blend, in float64; and so the parameters are those of MARS's own equations."""
    grads = gradients(500, 40)
    for beta, gamma in ((0.95, 0.025), (0.99, 1 / 11), (0.9, 1.0), (0.0, 0.5)):
        lion = mars = last = np.zeros(500)
        p = np.zeros(500)
        for g in (grad.double().numpy() for grad in grads):
            u = beta * (1 - gamma) * lion + (1 - beta * (1 - gamma)) * g
            lion = beta * lion + (1 - beta) * g
            mars = beta * mars + (1 - beta) * (g + gamma * beta / (1 - beta) * (g - last))
            last = g
            assert np.allclose(mars, u, rtol=0, atol=1e-13)
            assert np.abs(mars).min() > 1e-6  # so that fp32 sees its sign
            p -= 0.25 * np.sign(mars)
        assert np.array_equal(parameter_of(trained(MARSLion, grads, lr=0.25, beta=beta, gamma=gamma)).numpy(), p)


def test_mars_lion_without_correction_is_signum() -> None:
    grads = gradients(300, 10)
    a = trained(MARSLion, grads, lr=0.01, beta=0.95, gamma=0.0)
    b = trained(Signum, grads, lr=0.01, beta=0.95)
    assert torch.equal(parameter_of(a), parameter_of(b))


def test_signum_looks_ahead() -> None:
    """As NVIDIA's code has it, with bias correction; without momentum it is the sign of the gradient."""
    grads = gradients(500, 40)
    for beta in (0.9, 0.99):
        m, p, plain = np.zeros(500), np.zeros(500), np.zeros(500)
        for t, g in enumerate((grad.double().numpy() for grad in grads), start=1):
            m = beta * m + (1 - beta) * g
            u = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
            assert min(np.abs(u).min(), np.abs(m).min()) > 1e-6
            p, plain = p - 0.25 * np.sign(u), plain - 0.25 * np.sign(m)
        found = parameter_of(trained(Signum, grads, lr=0.25, beta=beta, nesterov=True))
        assert np.array_equal(found.numpy(), p) and not np.array_equal(p, plain)
        assert np.array_equal(parameter_of(trained(Signum, grads, lr=0.25, beta=beta)).numpy(), plain)
    without = parameter_of(trained(Signum, grads, lr=0.25, beta=0.0, nesterov=True))
    assert torch.equal(without, parameter_of(trained(SignSGD, grads, lr=0.25)))


def test_signum_takes_checkpoints_and_pickles_from_before_it_looked_ahead() -> None:
    (g,) = gradients(5, 1)
    old, new = trained(Signum, [g]), trained(Signum, [g])
    saved = old.state_dict()
    del saved["param_groups"][0]["nesterov"]
    new.load_state_dict(saved)
    assert new.param_groups[0]["nesterov"] is False
    kept = old.__getstate__()
    for hyperparameters in (kept["defaults"], *kept["param_groups"]):
        del hyperparameters["nesterov"]
    again = pickle.loads(pickle.dumps(old))
    assert again.param_groups[0]["nesterov"] is False
    parameter_of(again).grad = g
    again.step()


def test_not_finite() -> None:
    """A NaN stays in m; it reaches the parameter where the rule divides by what it is in."""
    g = torch.tensor([NAN, INF, 1.0])
    moves = {}
    for cls, own in ((AdamS, {}), (BCOS, {}), *((LionK, {"kappa": kappa}) for kappa in KAPPAS)):
        optimizer = trained(cls, [g, torch.ones(3)], lr=0.25, **own)
        m = optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"]
        assert m.isnan().tolist() == [True, False, False] and m.isinf().tolist() == [False, True, False]
        moves[own.get("kappa", cls.__name__)] = parameter_of(optimizer)
    assert moves["threshold"].tolist() == moves["huber"].tolist() == [0.0, -0.5, -0.5]
    for name in ("AdamS", "BCOS", "softsign"):
        assert moves[name].isnan().tolist() == [True, True, False], name


@pytest.mark.parametrize(
    ("cls", "given", "said"),
    [
        (LionK, {"kappa": "hubr"}, "kappa='hubr': must be one of"),
        (LionK, {"epsilon": -1e-3}, "epsilon"),
        (LionK, {"beta": 0.9}, "this rule has two"),
        (BCOS, {"betas": (0.9, 0.95)}, "this rule has one"),
        (BCOS, {"simple": 1}, "simple"),
        (BCOS, {"eps": -1.0}, "eps"),
        (MARSLion, {"gamma": 1.5}, r"gamma=1.5: must be in \[0, 1\]"),
        (Signum, {"nesterov": 1}, "nesterov"),
        (AdamS, {"betas": (0.9, 1.0)}, r"betas\[1\]"),
        (AdamS, {"state_dtype": "int4"}, "this momentum has no bound"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(cls: type, given: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        cls([Parameter(torch.zeros(3))], **given)
