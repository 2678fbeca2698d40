"""Dissecting Adam: its identities and limits, the mini-batch form, and what happens where nothing is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paper_formulas import Bounded, adam
from torch.nn import Parameter

from signadam_ext import MSGD, MSVAG, SVAG, Adam, AdamStar, AdamW, Lion
from signadam_ext.optimizers.variance_adaptation import variance_share

UNIT = 2.0**-24


def gradients(*shape: int, steps: int, seed: int = 0, mean: float = 0.3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) + mean for _ in range(steps)]


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999])
def test_variance_share_is_that_of_the_average(beta: float) -> None:
    """[BH] Eq. 10: the sum of the squared weights of a bias-corrected average; 1 at t = 1, (1-b)/(1+b) in the limit."""
    for t in (1, 2, 3, 10, 100):
        weights = (1 - beta) * beta ** np.arange(t) / (1 - beta**t)
        assert variance_share(beta, t) == pytest.approx((weights**2).sum(), rel=1e-9)
    assert variance_share(beta, 1) == 1.0
    assert variance_share(beta, 100_000) == pytest.approx((1 - beta) / (1 + beta), rel=1e-9)


def test_estimate_of_the_variance_is_unbiased() -> None:
    """[BH] Sec. 4.1: (v - m^2) / (1 - rho) has the variance of the gradient as its expectation; the draft's has not."""
    beta, steps, count = 0.9, 12, 200_000
    m = v = np.zeros(count)
    draws = np.random.default_rng(0).standard_normal((steps, count)) * 2.0 + 5.0
    for g in draws:
        m, v = beta * m + (1 - beta) * g, beta * v + (1 - beta) * g * g
    left = 1 - beta**steps
    raw = v / left - (m / left) ** 2
    corrected = raw / (1 - variance_share(beta, steps))
    error = corrected.std() / math.sqrt(count)
    assert abs(corrected.mean() - 4.0) < 5 * error
    assert raw.mean() < 4.0 - 50 * error


def test_adam_is_sign_times_variance_factor() -> None:
    """[BH] Eq. 6: without eps, Adam moves by lr sign(m) (1 + (v - m^2) / m^2)^(-1/2)."""
    param = Parameter(torch.zeros(1000, dtype=torch.float32))
    optimizer = Adam([param], lr=0.25, betas=(0.7, 0.95), eps=0.0)
    m = v = np.zeros(1000)
    for t, g in enumerate(gradients(1000, steps=20), start=1):
        before = param.detach().double().numpy().copy()
        param.grad = g
        optimizer.step()
        m = 0.7 * m + (1 - 0.7) * g.double().numpy()
        v = 0.95 * v + (1 - 0.95) * g.double().numpy() ** 2
        mean, square = m / (1 - 0.7**t), v / (1 - 0.95**t)
        with np.errstate(invalid="ignore"):
            factor = (1 + (square - mean**2) / mean**2) ** -0.5
        step = param.detach().double().numpy() - before
        # Rounding: of the step itself by a dozen operations, of p and of a mean that nearly cancels.
        slack = UNIT * (16 * 0.25 * factor + 2 * np.abs(before) + 16 * 0.25 / np.sqrt(square))
        assert (np.abs(step + 0.25 * np.sign(mean) * factor) <= slack).all()


@pytest.mark.parametrize("bias_correct_variance", [True, False])
@pytest.mark.parametrize("make", [SVAG, MSVAG])
def test_factors_are_shares(make: type, bias_correct_variance: bool) -> None:
    """No entry moves further than the method that it adapts, nor the other way."""
    param = Parameter(torch.zeros(3000))
    optimizer = make([param], lr=1.0, beta=0.8, bias_correct_variance=bias_correct_variance)
    m = torch.zeros(3000, dtype=torch.float64)
    for t, g in enumerate(gradients(3000, steps=30), start=1):
        before = param.detach().clone()
        param.grad = g
        optimizer.step()
        m = 0.8 * m + 0.2 * g.double()
        full = g.double() if make is SVAG else m / (1 - 0.8**t)
        step = (before - param.detach()).double()
        assert (step * full >= -1e-6).all()
        assert (step.abs() <= full.abs() * (1 + 1e-5) + 1e-5).all()


@pytest.mark.parametrize("momentum", [True, False])
def test_adam_star_moves_by_lr_at_most(momentum: bool) -> None:
    param = Parameter(torch.zeros(3000))
    optimizer = AdamStar([param], lr=1.0, momentum=momentum)
    for g in gradients(3000, steps=30):
        before = param.detach().clone()
        param.grad = g
        optimizer.step()
        assert (param.detach() - before).abs().max() <= 1 + 1e-5


def test_first_steps() -> None:
    """At t = 1 there is no variance: M-SVAG takes a gradient step, ADAM* a sign step, SVAG a gradient step."""
    g = torch.tensor([3.0, -0.5, 1e-3])
    for make, options, expected in (
        (MSVAG, {}, -g),
        (SVAG, {}, -g),
        (AdamStar, {}, -g.sign()),
        (AdamStar, {"momentum": False}, -g.sign()),
    ):
        param = Parameter(torch.zeros(3))
        param.grad = g
        make([param], lr=1.0, beta=0.5, **options).step()
        # With beta = 1/2 the corrected moments are exactly the gradient and its square.
        assert torch.allclose(param.detach(), expected, rtol=4 * UNIT, atol=0), make


def test_without_memory_there_is_no_variance() -> None:
    for t in range(1, 4):
        assert variance_share(0.0, t) == 1.0
    param, plain = Parameter(torch.zeros(50)), Parameter(torch.zeros(50))
    a, b = MSVAG([param], lr=0.5, beta=0.0), MSGD([plain], lr=0.5, beta=0.0)
    for g in gradients(50, steps=5):
        param.grad = plain.grad = g
        a.step()
        b.step()
        assert torch.equal(param, plain)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (SVAG, {}),
        (MSVAG, {}),
        (AdamStar, {}),
        (AdamStar, {"momentum": False}),
        (MSVAG, {"variance": "minibatch"}),
        (AdamStar, {"variance": "minibatch"}),
    ],
    ids=str,
)
def test_where_the_denominator_is_zero_nothing_moves(make: type, options: dict[str, Any], backend: str) -> None:
    """A gradient of 1e-30, whose square underflows, must not throw a weight to infinity; NaN must reach it."""
    param = Parameter(torch.ones(5))
    optimizer = make([param], lr=1.0, backend=backend, **options)
    param.grad = torch.tensor([1e-30, -1e-30, 0.0, torch.nan, 1.0])
    param.grad_variance = torch.zeros(5)
    optimizer.step()
    assert param[:3].tolist() == [1.0, 1.0, 1.0]
    assert param[3].isnan()
    assert param[4] == 0.0


def test_released_code_clips_and_caps() -> None:
    """The authors' code caps rho at 0.9999 instead of taking s = 0 at t = 1: there its factor is below 1, ours is 1.

    Later both agree, where the estimate is not negative; their clipping to [0, 1] then does nothing.
    """
    rng = np.random.default_rng(1)
    param = Parameter(torch.zeros(400))
    optimizer = MSVAG([param], lr=1.0, beta=0.9)
    m = v = np.zeros(400)
    for t in range(1, 15):
        g = rng.standard_normal(400)
        before = param.detach().double().numpy().copy()
        param.grad = torch.from_numpy(g).float()
        optimizer.step()
        g = param.grad.double().numpy()
        m, v = 0.9 * m + 0.1 * g, 0.9 * v + 0.1 * g * g
        mean, square = m / (1 - 0.9**t), v / (1 - 0.9**t)
        rho = min(variance_share(0.9, t), 0.9999)
        s = (square - mean**2) / (1 - rho)
        with np.errstate(invalid="ignore"):
            theirs = np.clip(mean**2 / (mean**2 + rho * s), 0, 1)
        step = before - param.detach().double().numpy()
        if t == 1:
            assert np.allclose(step, mean, rtol=1e-5)  # theirs divides a rounding error by 1e-4
        else:
            assert np.allclose(step, theirs * mean, rtol=1e-3, atol=1e-5)


def test_minibatch_form_sums() -> None:
    """[BH0] Alg. 3: the momentum sums gradients, and S their variances with the squared decay."""
    param = Parameter(torch.zeros(3))
    optimizer = MSVAG([param], lr=0.5, beta=0.5, variance="minibatch")
    param.grad, param.grad_variance = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1.0, 0.0, 4.0])
    optimizer.step()
    assert torch.equal(optimizer.state[param]["exp_avg_var"], torch.tensor([1.0, 0.0, 4.0]))
    assert torch.equal(param.detach(), torch.tensor([-0.25, -1.0, 0.0]))
    optimizer.step()
    assert torch.equal(optimizer.state[param]["momentum_buffer"], torch.tensor([1.5, 3.0, 0.0]))
    assert torch.equal(optimizer.state[param]["exp_avg_var"], torch.tensor([1.25, 0.0, 5.0]))


class TestGradVariance:
    """``param.grad_variance``, wherever it lies."""

    def make(self, *shapes: tuple[int, ...]) -> tuple[list[Parameter], MSVAG]:
        params = [Parameter(torch.zeros(shape)) for shape in shapes]
        return params, MSVAG(params, lr=1.0, beta=0.5, variance="minibatch")

    def test_missing(self) -> None:
        (a, b), optimizer = self.make((2,), (2,))
        a.grad, b.grad, a.grad_variance = torch.ones(2), torch.ones(2), torch.ones(2)
        with pytest.raises(ValueError, match=r"parameter 1 of group 0 has a gradient and no grad_variance.*per_sample"):
            optimizer.step()
        assert not a.any() and not optimizer.state

    def test_missing_later(self) -> None:
        (a, b), optimizer = self.make((2,), (2,))
        for p in (a, b):
            p.grad, p.grad_variance = torch.ones(2), torch.ones(2)
        optimizer.step()
        before = a.detach().clone()
        del b.grad_variance
        with pytest.raises(ValueError, match="no grad_variance"):
            optimizer.step()
        assert torch.equal(a, before)

    @pytest.mark.parametrize(
        "wrong", [torch.ones(3), torch.ones(2, dtype=torch.int64), 1.0, torch.ones(2, device="meta")], ids=str
    )
    def test_wrong(self, wrong: Any) -> None:
        (a,), optimizer = self.make((2,))
        a.grad, a.grad_variance = torch.ones(2), wrong
        with pytest.raises((TypeError, ValueError), match="grad_variance of parameter 0"):
            optimizer.step()

    def test_absent_gradient_needs_none(self) -> None:
        (a, b), optimizer = self.make((2,), (2,))
        a.grad, a.grad_variance = torch.ones(2), torch.ones(2)
        optimizer.step()
        assert not b.any()
        b.grad, b.grad_variance = torch.ones(2), torch.zeros(2)
        optimizer.step()
        assert torch.equal(b.detach(), torch.tensor([-1.0, -1.0]))

    def test_any_tensor_at_any_address(self) -> None:
        """New ones each step, other dtypes and strides: the same results as one that is filled in place."""
        results = []
        for kind in ("in place", "new", "bf16", "transposed", "data"):
            param = Parameter(torch.zeros(4, 6))
            optimizer = MSVAG([param], lr=1.0, beta=0.5, variance="minibatch")
            own = torch.zeros(4, 6)
            for step in range(4):
                generator = torch.Generator().manual_seed(step)
                g, value = torch.randn(4, 6, generator=generator), torch.randint(0, 9, (4, 6), generator=generator)
                param.grad = g
                if kind == "new":
                    param.grad_variance = value.float()
                elif kind == "bf16":
                    param.grad_variance = value.bfloat16()
                elif kind == "transposed":
                    param.grad_variance = value.float().t().contiguous().t()
                elif kind == "data":
                    own.data = value.float()
                    param.grad_variance = own
                else:
                    param.grad_variance = own.copy_(value)
                given = param.grad_variance.clone()
                optimizer.step()
                assert torch.equal(param.grad_variance, given)  # only read
            results.append(param.detach())
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_the_two_forms_share_no_moment() -> None:
    """Their momenta are in other units: whoever changes the form in training begins anew, and the old one stays."""
    param = Parameter(torch.zeros(2))
    optimizer = MSVAG([param], lr=1.0, beta=0.5)
    param.grad, param.grad_variance = torch.ones(2), torch.zeros(2)
    optimizer.step()
    optimizer.param_groups[0]["variance"] = "minibatch"
    optimizer.step()
    assert torch.equal(optimizer.state[param]["momentum_buffer"], torch.ones(2))
    assert torch.equal(optimizer.state[param]["exp_avg"], torch.full((2,), 0.5))


def test_wrapper_of_a_variance_is_refused() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    param = Parameter(torch.zeros(4))
    optimizer = MSVAG([param], variance="minibatch")
    param.grad = torch.ones(4)
    for odd in (TwoTensor(torch.ones(4), torch.ones(4)), torch.ones(4).to_sparse()):
        param.grad_variance = odd
        with pytest.raises(TypeError, match="grad_variance of parameter 0 of group 0"):
            optimizer.step()


def test_minibatch_without_momentum_is_refused() -> None:
    param = Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="momentum=False with variance='minibatch'"):
        AdamStar([param], momentum=False, variance="minibatch")
    optimizer = AdamStar([param], variance="minibatch")
    optimizer.param_groups[0]["momentum"] = False
    param.grad = torch.ones(1)
    with pytest.raises(ValueError, match="momentum=False with variance='minibatch'"):
        optimizer.step()


# The baselines


@settings(max_examples=60)
@given(
    beta1=st.sampled_from((0.0, 0.5, 0.9)),
    beta2=st.sampled_from((0.0, 0.9, 0.999)),
    eps=st.sampled_from((1e-8, 1e-3)),
    weight_decay=st.sampled_from((0.0, 0.1)),
    amsgrad=st.booleans(),
    maximize=st.booleans(),
    decoupled=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_adam_equals_torch(
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool,
    seed: int,
) -> None:
    """torch.optim in float64 follows the formula, and fp32 strays from it by no more than its roundings add up to."""
    start = torch.randn(200, generator=torch.Generator().manual_seed(seed))
    ours, theirs = Parameter(start.clone()), Parameter(start.double())
    options: dict[str, Any] = {"lr": 0.01, "betas": (beta1, beta2), "eps": eps, "amsgrad": amsgrad}
    more = {"weight_decay": weight_decay, "maximize": maximize}
    optimizer = (AdamW if decoupled else Adam)([ours], **options, **more)
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)([theirs], **options, **more)
    p = Bounded.exact(start.numpy())
    state = {name: Bounded.exact(np.zeros(200)) for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
    for t, g in enumerate(gradients(200, steps=10, seed=seed), start=1):
        ours.grad, theirs.grad = g, g.double()
        optimizer.step()
        reference.step()
        effective = Bounded.exact((-g if maximize else g).numpy())
        if weight_decay and decoupled:
            p = p * Bounded.scalar(1 - 0.01 * weight_decay)
        elif weight_decay:
            effective = effective + Bounded.scalar(weight_decay) * p
        p = adam(p, effective, state, t, options)
        assert np.allclose(theirs.detach().numpy(), p.value, rtol=1e-10, atol=1e-12)
        assert (np.abs(ours.detach().double().numpy() - p.value) <= p.error).all()
    # The bound must mean something: the parameter's own roundings, and a small share of a step.
    assert np.median(p.error) < 1e-3 * 0.01


def test_defaults_are_torchs() -> None:
    for ours, theirs in ((Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)):
        a, b = ours([Parameter(torch.zeros(1))]).defaults, theirs([Parameter(torch.zeros(1))]).defaults
        for name in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"):
            assert a[name] == b[name], name
    assert AdamW([Parameter(torch.zeros(1))]).defaults["decoupled_weight_decay"] is True
    assert Adam([Parameter(torch.zeros(1))]).defaults["decoupled_weight_decay"] is False


@pytest.mark.parametrize("amsgrad", [False, True])
def test_checkpoints_of_torch_go_on(amsgrad: bool) -> None:
    """A training begun with torch's AdamW, or with its Adam, goes on with ours, the decay decoupled."""
    for before in (torch.optim.AdamW, torch.optim.Adam):
        theirs = Parameter(torch.randn(50, generator=torch.Generator().manual_seed(0)))
        old = before([theirs], lr=0.01, weight_decay=0.1, amsgrad=amsgrad)
        steps = gradients(50, steps=8)
        for g in steps[:4]:
            theirs.grad = g
            old.step()
        ours, expected = Parameter(theirs.detach().clone()), Parameter(theirs.detach().clone())
        new, torchs = AdamW([ours]), torch.optim.AdamW([expected])
        new.load_state_dict(old.state_dict())
        torchs.load_state_dict(old.state_dict())
        assert new.param_groups[0]["decoupled_weight_decay"] is True
        for g in steps[4:]:
            ours.grad = expected.grad = g
            new.step()
            torchs.step()
        assert torch.allclose(ours, expected, rtol=0, atol=16 * UNIT * 4)


@pytest.mark.parametrize("state_dtype", ["int8", ("fp32", "int4", "fp32"), "int2"])
def test_amsgrad_refuses_few_bits(state_dtype: Any) -> None:
    with pytest.raises(ValueError, match="max_exp_avg_sq: a largest value cannot be kept in few bits"):
        AdamW([Parameter(torch.zeros(3))], amsgrad=True, state_dtype=state_dtype)


def test_lion_decay_acts_on_bf16() -> None:
    """A decay of 1e-3 that is rounded by itself is none in bf16; rounded once with the step it acts, on average."""
    param = Parameter(torch.full((20_000,), 2.0, dtype=torch.bfloat16))
    optimizer = Lion([param], lr=1e-3, weight_decay=1.0, param_storage="stochastic")
    for _ in range(10):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    decayed = 2.0 * (1 - 1e-3) ** 10
    # A bf16 below 2 is rounded in steps of 2^-7: the mean of 20000 is right to five deviations.
    assert abs(param.float().mean().item() - decayed) < 5 * 2.0**-7 / 2 * math.sqrt(10 / 20_000)
    # What another way to write it would do.
    assert torch.equal(param.detach().clone().mul_(1 - 1e-3), param.detach())


def test_lion_zero_gradient_stays() -> None:
    param = Parameter(torch.ones(4))
    param.grad = torch.tensor([0.0, -0.0, torch.nan, 1.0])
    Lion([param], lr=0.5).step()
    assert param.tolist() == [1.0, 1.0, 1.0, 0.5]
