"""LaProp: the bound on its momentum, and the codes that rest on it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import signadam_ext
from signadam_ext import LaProp
from signadam_ext.core import formats
from signadam_ext.core.rule import rule_of
from signadam_ext.optimizers.laprop import BOUND, LARGEST_BETA2

LEVELS = {"int8": 127, "int4": 7, "int2": 1}

#: Halfway between the bound in real numbers and BOUND.
LARGEST_NORMALIZED = (1 + 2.0**-21) / math.sqrt(1 - LARGEST_BETA2)


def momentum(optimizer: LaProp, param: Tensor) -> Tensor:
    """As fp32, whatever it is stored in."""
    saved = optimizer.state_dict()["state"][0]
    levels = saved.get("exp_avg_levels")
    return saved["exp_avg"].float() * (1 if levels is None else BOUND / levels)


def growing(factor: float) -> Iterator[Tensor]:
    """Gradients that outgrow all before them, so that each normalized one is close to its bound; both signs, and of a
    size that neither overflows nor underflows when squared. Zeros come first, until no bias is left to correct."""
    yield from [torch.zeros(4)] * 80
    g = 1e-17
    while g < 1e17:
        yield torch.tensor([g, -g, g * (1 + 1e-6), 0.0])
        g *= factor


@pytest.mark.filterwarnings("ignore:int. momentum with beta")
@pytest.mark.parametrize("beta2", [0.0, 0.1, 0.5, 0.9, 0.949, 0.95])
@pytest.mark.parametrize("beta1", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("state_dtype", ["fp32", *LEVELS])
def test_momentum_stays_within_its_bound(state_dtype: str, beta1: float, beta2: float) -> None:
    """However gradients grow; and without momentum they reach it, but for what the growth leaves."""
    for factor in (10.0, 1e3, 1e8):
        param = torch.nn.Parameter(torch.zeros(4))
        optimizer = LaProp([param], betas=(beta1, beta2), eps=1e-30, state_dtype=state_dtype)
        largest = 0.0
        for param.grad in growing(factor):
            optimizer.step()
            m = momentum(optimizer, param)
            assert m.abs().max() <= BOUND and m[0] * m[1] <= 0 and m[3] == 0
            largest = max(largest, m.abs().max().item())
    if beta1 == 0 and state_dtype == "fp32":
        assert largest > 0.99 / math.sqrt(1 - beta2)


def test_normalized_gradients_never_exceed_the_bound() -> None:
    """In fp32, with the scalars and the order of the rule, for many betas and for gradients of every binade: the few
    roundings of ``v`` can lift a normalized gradient above ``1 / sqrt(1 - beta2)``, but half as far as BOUND is."""
    generator = torch.Generator().manual_seed(0)
    beta2 = torch.cat(
        [
            torch.rand(200_000, generator=generator, dtype=torch.float64) * LARGEST_BETA2,
            torch.full((50_000,), LARGEST_BETA2, dtype=torch.float64),
        ]
    )
    exponents = torch.randint(-60, 60, beta2.shape, generator=generator)
    g = torch.ldexp(1 + torch.rand(beta2.shape, generator=generator), exponents)
    v = (1 - beta2).float() * g * g
    n = g / v.double().sqrt().float()
    assert (n.double() > 1 / (1 - beta2).sqrt()).any(), "the test has teeth"
    assert (n.double() <= (1 + 2.0**-21) / (1 - beta2).sqrt()).all()
    assert (n.double() <= LARGEST_NORMALIZED).all()


@pytest.mark.parametrize("levels", LEVELS.values())
def test_no_code_leaves_its_levels(levels: int) -> None:
    """From the largest code, with the largest normalized gradient, at many betas: rounded, it is within ``upper``,
    which lets it pass, and the conversion cuts off what is beyond L."""
    drawn = torch.rand(200_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for beta1 in (drawn, 1 - 2.0**-20 * drawn):
        c = ((1 - beta1) * (levels / BOUND)).float()
        top = beta1.float() * float(levels) + c * torch.tensor(LARGEST_NORMALIZED)
        upper = torch.tensor(levels + 2.0**-17)
        assert upper.double() == levels + 2.0**-17 and (top <= upper).all()
        for m in (top, upper[None]):
            r = torch.full(m.shape, 65535)
            assert formats.stochastic_integer(m, r).max() <= levels
            assert formats.stochastic_integer(-m, torch.zeros_like(r)).min() >= -levels


def test_forms_follow_from_the_group() -> None:
    def forms(beta2: float, state_dtype: str) -> list[str]:
        group = LaProp([torch.zeros(1)], betas=(0.9, beta2), state_dtype=state_dtype).param_groups[0]
        return [form.kind for form in rule_of(LaProp, group).forms(group)]

    for name in LEVELS:
        assert forms(LARGEST_BETA2, name) == [name, "bf16"]
    assert forms(0.951, "int8") == ["int8_block32", "bf16"]
    for name in ("int4", "int2"):
        with pytest.raises(
            ValueError,
            match=rf"'{name}': this momentum has a bound only where betas\[1\] is at most 0.95, on the host, so it",
        ):
            forms(0.951, name)


def test_codes_stay_what_they_are_when_betas_change() -> None:
    """Within the range of codes; beyond it, the state is refused and not misread."""
    param = torch.nn.Parameter(torch.zeros(64))
    optimizer = LaProp([param], betas=(0.9, 0.95), state_dtype="int8")
    param.grad = torch.randn(64, generator=torch.Generator().manual_seed(2))
    for _ in range(3):
        optimizer.step()
    before = momentum(optimizer, param)
    optimizer.param_groups[0]["betas"] = (1 - 2.0**-30, 0.5)  # nothing enters the momentum
    optimizer.step()
    assert (momentum(optimizer, param) - before).abs().max() <= BOUND / 127
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    before = param.detach().clone()
    with pytest.raises(ValueError, match="is int8: must be int8_block32; make an optimizer of that form"):
        optimizer.step()
    assert torch.equal(param, before)


def test_codes_are_right_on_average() -> None:
    """The momentum in codes has the expectation of the exact one, in the units of a gradient."""
    size = 200_000
    g = torch.tensor([0.3, -2.0, 0.0, 1.0]).repeat(size // 4)
    exact, coded = (torch.nn.Parameter(torch.zeros(size)) for _ in range(2))
    optimizers = [
        LaProp([exact], lr=0.1, betas=(0.9, 0.9)),
        LaProp([coded], lr=0.1, betas=(0.9, 0.9), state_dtype=("int4", "fp32")),
    ]
    for scale in (1.0, 0.5, -0.25):
        exact.grad = coded.grad = g * scale
        for optimizer in optimizers:
            optimizer.step()
    m, q = (momentum(o, p).view(-1, 4).mean(0) for o, p in zip(optimizers, (exact, coded), strict=True))
    spread = BOUND / 7 / math.sqrt(size / 4)  # of a mean of codes, at most
    assert (m - q).abs().max() < 5 * spread and m.abs().max() > 20 * spread
    assert (exact.view(-1, 4).mean(0) - coded.view(-1, 4).mean(0)).abs().max() < 5 * spread


@pytest.mark.parametrize("source, target", [("fp32", "int8"), ("int8", "int4"), ("int4", "fp32"), ("int8", "bf16")])
def test_forms_convert_in_units_of_the_gradient(source: str, target: str) -> None:
    param = torch.nn.Parameter(torch.zeros(1000))
    optimizer = LaProp([param], betas=(0.5, 0.9), state_dtype=source)
    param.grad = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    optimizer.step()
    other = LaProp([param], betas=(0.5, 0.9), state_dtype=target)
    with pytest.warns(UserWarning, match=f"exp_avg: {source} to {target}"):
        other.load_state_dict(optimizer.state_dict())
    m, converted = momentum(optimizer, param), momentum(other, param)
    assert (m - converted).abs().max() <= {"bf16": 2.0**-7, "fp32": 1e-6, **{k: BOUND / v for k, v in LEVELS.items()}}[
        target
    ]


def test_statistics_are_in_units_of_the_gradient() -> None:
    means = []
    for state_dtype in ("fp32", ("int8", "fp32")):
        param = torch.nn.Parameter(torch.zeros(10_000))
        optimizer = LaProp([param], betas=(0.9, 0.9), state_dtype=state_dtype)
        optimizer.observe()
        param.grad = torch.randn(10_000, generator=torch.Generator().manual_seed(4))
        optimizer.step()
        means.append(optimizer.statistics().all.mean_momentum)
    assert means[1] == pytest.approx(means[0], rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
def test_bad_gradients_reach_the_parameter(state_dtype: str, bad: float) -> None:
    """They are as loud as with Adam; the momentum stays a number, which codes can hold."""
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = LaProp([param], betas=(0.9, 0.9), state_dtype=state_dtype)
    param.grad = torch.tensor([1.0, bad, -1.0])
    optimizer.step()
    assert param.isnan().tolist() == [False, True, False]
    m = momentum(optimizer, param)
    assert m[1] == 0 and not m.isnan().any()
    param.grad = torch.ones(3)
    optimizer.step()
    assert param.isnan().tolist() == [False, True, False] or bad != bad


def test_momentum_of_constant_gradients_is_a_sign_descent() -> None:
    """With one gradient for ever, each normalized gradient is its sign, and each step is lr, bias-corrected."""
    param = torch.nn.Parameter(torch.zeros(3, dtype=torch.float32))
    optimizer = signadam_ext.LaProp([param], lr=0.125, betas=(0.9, 0.99), eps=0.0)
    param.grad = torch.tensor([3.0, -1e-3, 7e4])
    for t in range(1, 30):
        optimizer.step()
        expected = -0.125 * t * param.grad.sign()
        assert torch.allclose(param, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("state_dtype", LEVELS)
def test_codes_of_whole_groups(state_dtype: str) -> None:
    """Kernels that keep codes as 2^16 times themselves bound those: no code is lost, and bits are the reference's."""
    results = []
    for backend in ("cpu", "reference"):
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(torch.randn(300, generator=generator).bfloat16())
        storage = {"state_dtype": state_dtype, "param_storage": "stochastic"}
        optimizer = LaProp([param], lr=0.01, betas=(0.9, 0.95), backend=backend, **storage)
        for _ in range(4):
            param.grad = torch.randn(300, generator=generator).bfloat16()
            optimizer.step()
        results.append((param.detach(), optimizer.state_dict()["state"][0]["exp_avg"]))
    assert all(map(torch.equal, *results))
    assert (results[0][1] != 0).float().mean() > 0.05


def test_betas_of_numpy_choose_the_form_of_codes_as_others_do() -> None:
    """np.float32 is no Python float: a group that holds one was taken for one whose betas nobody knows."""
    numpy = pytest.importorskip("numpy")
    param = torch.nn.Parameter(torch.ones(5))
    optimizer = LaProp([param], betas=(0.9, 0.95), state_dtype="int4")
    param.grad = torch.ones(5)
    optimizer.step()
    optimizer.param_groups[0]["betas"] = (numpy.float32(0.5), numpy.float32(0.875))
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer.state[param]["step"] == 3
