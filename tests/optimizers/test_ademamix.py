"""AdEMAMix: its schedules, and what it is without its slow momentum."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from signadam_ext import AdamW, AdEMAMix
from signadam_ext.core.rule import rule_of

STORAGE = [
    {},
    {"state_dtype": ("bf16", "bf16")},
    {"state_dtype": "int8", "param_storage": "stochastic"},
]


def parameter(size: int = 300, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype))


def gradient(seed: int, size: int = 300) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("storage", STORAGE, ids=["fp32", "bf16", "int8"])
def test_without_the_slow_momentum_it_is_adamw(storage: dict[str, Any], backend: str) -> None:
    """Bit for bit, in parameters and both moments, in any storage form."""
    dtype = torch.bfloat16 if "param_storage" in storage else torch.float32
    ours, theirs = parameter(dtype=dtype), parameter(dtype=dtype)
    own = dict(storage)
    if isinstance(own.get("state_dtype"), tuple):
        own["state_dtype"] = (*own["state_dtype"], "bf16")
    common: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "backend": backend}
    mix = AdEMAMix([ours], alpha=0.0, t_beta3=7, **common, **own)
    adam = AdamW([theirs], **common, **storage)
    for seed in range(12):
        ours.grad = theirs.grad = gradient(seed).to(dtype)
        mix.step()
        adam.step()
        assert torch.equal(ours, theirs)
    for name, value in adam.state[theirs].items():
        kept = mix.state[ours][name]
        assert torch.equal(kept, value) if isinstance(value, Tensor) else kept == value, name


def scalars(t: int, **hyperparameters: Any) -> dict[str, float]:
    group = AdEMAMix([torch.zeros(1)], lr=1.0, **hyperparameters).param_groups[0]
    return rule_of(AdEMAMix, group).scalar_set(group, t)


def authors_beta3(t: int, fast: float, slow: float, warmup: float) -> float:
    """As their code has it, with the library's functions."""
    if t >= warmup:
        return slow

    def f(beta: float) -> float:
        return math.log(0.5) / math.log(beta + 1e-8) - 1

    share = t / warmup
    return math.pow(0.5, 1 / ((1 - share) * f(fast) + share * f(slow) + 1))


@pytest.mark.parametrize("betas", [(0.9, 0.999, 0.9999), (0.0, 0.9, 0.999), (0.99, 0.9, 0.5), (0.9, 0.5, 0.99999)])
@pytest.mark.parametrize("warmup", [1, 7, 1000, 256_000])
def test_the_slow_decay_is_the_authors(betas: tuple[float, float, float], warmup: int) -> None:
    """Its first step, its last, the one after, and between."""
    for t in {1, 2, warmup // 2, warmup - 1, warmup, warmup + 1, 10 * warmup, 2**50} - {0}:
        found = scalars(t, betas=betas, t_beta3=warmup)
        expected = authors_beta3(t, betas[0], betas[2], warmup)
        assert abs(found["beta3"] - expected) <= 1e-12 * expected
        assert found["one_minus_beta3"] == 1 - found["beta3"]
        if t >= warmup:
            assert found["beta3"] == betas[2]


def test_alpha_grows_in_a_line_and_stays() -> None:
    for t in (1, 5, 99, 100, 101, 2**50):
        assert scalars(t, alpha=5.0, t_alpha=100)["mix"] == 5.0 * min(t / 100, 1.0)
    assert scalars(1, alpha=5.0)["mix"] == 5.0 and scalars(1)["beta3"] == 0.9999


def test_a_half_life_that_is_none() -> None:
    for betas in ((0.9, 0.999, 1 - 1e-9), (1 - 1e-9, 0.999, 0.9999)):
        AdEMAMix([torch.zeros(1)], betas=betas)
        with pytest.raises(ValueError, match="with t_beta3: must be less than 1 - 1e-08, or it has no half-life"):
            AdEMAMix([torch.zeros(1)], betas=betas, t_beta3=100)
    for name in ("t_alpha", "t_beta3"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            AdEMAMix([torch.zeros(1)], **{name: 0})


def test_the_slow_momentum_is_an_average_without_a_correction() -> None:
    param = torch.nn.Parameter(torch.zeros(4))
    optimizer = AdEMAMix([param], betas=(0.9, 0.999, 0.75))
    param.grad = torch.tensor([1.0, -2.0, 0.5, 0.0])
    for t in range(1, 6):
        optimizer.step()
        assert torch.allclose(optimizer.state[param]["exp_avg_slow"], (1 - 0.75**t) * param.grad, rtol=1e-6)


def test_a_slow_momentum_of_bf16_does_not_stand_still() -> None:
    """On average it is the exact one, where a step changes it by a hundredth of its last place."""
    size, steps = 20_000, 50
    param = torch.nn.Parameter(torch.zeros(size))
    optimizer = AdEMAMix([param], lr=0.0, state_dtype=("fp32", "fp32", "bf16"))
    param.grad = torch.full((size,), -1.0)
    optimizer.step()
    slow = optimizer.state[param]["exp_avg_slow"]
    assert slow.dtype == torch.bfloat16
    slow.fill_(1.0)
    for _ in range(steps):
        optimizer.step()
    exact = 1 - 2 * (1 - 0.9999**steps)
    deviation = 2.0**-8 * math.sqrt(steps * 0.05) / math.sqrt(size)
    assert abs(slow.double().mean().item() - exact) < 5 * deviation < 0.1 * (1 - exact)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_gradients_reach_the_parameter(bad: float) -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = AdEMAMix([param])
    param.grad = torch.tensor([1.0, bad, -1.0])
    optimizer.step()
    assert param.isnan().tolist() == [False, True, False]
