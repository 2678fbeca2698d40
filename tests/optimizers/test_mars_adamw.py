"""MARS with AdamW: the copy of the last gradient, and a norm of whole tensors."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support.strategies import same_bits
from torch import Tensor
from torch.nn import Parameter

import signadam_ext
from signadam_ext import AdamW, MARSAdamW
from signadam_ext.functional import mars_adamw

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])


def gradients(steps: int, shape: tuple[int, ...], scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * scale for _ in range(steps)]


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> Parameter:
    return Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(dtype))


def take(optimizer: Any, param: Tensor, given: list[Tensor]) -> None:
    for g in given:
        param.grad = g.to(param.dtype)
        optimizer.step()


def transcribed(p: Tensor, given: list[Tensor], max_norm: float | None, wd: float = 0.1) -> Tensor:
    """The authors' code in float64, with a copy of the last gradient."""
    b1, b2, gamma, lr = 0.95, 0.99, 0.025, 3e-3
    p = p.double()
    m, v, last = (torch.zeros_like(p) for _ in range(3))
    for t, g in enumerate(map(Tensor.double, given), 1):
        c = (g - last) * (gamma * (b1 / (1.0 - b1))) + g
        norm = c.norm()
        if max_norm is not None and norm > max_norm:
            c = c / (norm / max_norm)
        m = b1 * m + (1 - b1) * c
        v = b2 * v + (1 - b2) * c * c
        denominator = v.sqrt() / math.sqrt(1 - b2**t) + 1e-8
        p = p - lr * (wd * p + m / (denominator * (1 - b1**t)))
        last = g
    return p


@BACKENDS
@pytest.mark.parametrize("max_norm", [None, 1.0, 50.0])
def test_the_authors_equations(backend: str, max_norm: float | None) -> None:
    """Over 50 steps within fp32 rounding; 50 clips some steps and not others. Of more than one chunk."""
    param = parameter(130, 130)
    given = gradients(50, (130, 130), 0.25)
    optimizer = MARSAdamW([param], weight_decay=0.1, max_norm=max_norm, backend=backend)
    expected = transcribed(param.detach(), given, max_norm)
    clipped = set()
    for g in given:
        take(optimizer, param, [g])
        if max_norm is not None:
            clipped.add(bool(optimizer.state[param]["corrected_norm"] > max_norm))
    assert torch.allclose(param.double(), expected, rtol=0, atol=5e-6)
    assert clipped == {None: set(), 1.0: {True}, 50.0: {True, False}}[max_norm]


@BACKENDS
def test_the_norm_is_the_tensors(backend: str) -> None:
    """Of the corrected gradient, in double: at first (1 + gamma b1 / (1 - b1)) g, afterwards with the difference."""
    param = parameter(127, 131)
    given = gradients(2, (127, 131))
    optimizer = MARSAdamW([param], betas=(0.75, 0.99), gamma=0.5, backend=backend)
    take(optimizer, param, given[:1])
    state = optimizer.state[param]
    corrected = given[0] + 1.5 * given[0]
    assert state["corrected_norm"].item() == pytest.approx(corrected.double().norm().item(), rel=1e-12)
    take(optimizer, param, given[1:])
    corrected = given[1] + 1.5 * (given[1] - given[0])
    assert state["corrected_norm"].item() == pytest.approx(corrected.double().norm().item(), rel=1e-12)


def test_a_gradient_within_the_norm_is_as_it_is() -> None:
    """Up to the norm itself not a bit changes; 0 is no norm to be above."""
    for scale in (0.0, 1.0):
        params = [Parameter(torch.zeros(4)) for _ in range(2)]
        g = torch.tensor([0.5, 0.5, -0.5, 0.5]) * scale
        for param, max_norm in zip(params, (1.0, None), strict=True):
            take(MARSAdamW([param], gamma=0.0, max_norm=max_norm), param, [g, g])
        assert same_bits(*params)


def test_without_gamma_it_is_adamw() -> None:
    """But for roundings: Adam divides its root by the bias correction."""
    ours, adam = parameter(512), parameter(512)
    given = gradients(20, (512,))
    betas = {"betas": (0.9, 0.95), "lr": 1e-3, "weight_decay": 0.1}
    take(MARSAdamW([ours], gamma=0.0, max_norm=None, **betas), ours, given)
    take(AdamW([adam], **betas), adam, given)
    assert torch.allclose(ours, adam, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_the_last_gradient_is_a_copy(max_norm: float | None) -> None:
    """zero_grad(set_to_none=False), a gradient written over in place, and released gradients change nothing of it."""
    given = gradients(6, (3, 5))
    results = []
    for how in ("new", "zeroed", "in place", "released"):
        model = torch.nn.Linear(5, 3, bias=False)
        with torch.no_grad():
            model.weight.copy_(parameter(3, 5))
        optimizer = MARSAdamW(model.parameters(), max_norm=max_norm)
        if how == "released":
            signadam_ext.release_gradients(model, optimizer)
        for g in given:
            if how == "released":
                (model.weight * g).sum().backward()
                continue
            if how == "in place" and model.weight.grad is not None:
                model.weight.grad.copy_(g)
            else:
                model.weight.grad = g.clone()
            optimizer.step()
            optimizer.zero_grad(set_to_none=how != "zeroed")
            if how == "zeroed":
                assert not model.weight.grad.any()
            assert torch.equal(optimizer.state[model.weight]["last_grad"], g)
        results.append(model.weight.detach().clone())
    assert all(same_bits(results[0], other) for other in results[1:])


@BACKENDS
def test_nan_and_infinities(backend: str) -> None:
    """They stay with their entries for as long as moments remember, and the norm of the step before counts."""
    param = Parameter(torch.zeros(3))
    optimizer = MARSAdamW([param], max_norm=1.0, backend=backend)
    take(optimizer, param, [torch.full((3,), 2.0)])
    norm = optimizer.state[param]["corrected_norm"].item()
    take(optimizer, param, [torch.tensor([1.0, math.nan, math.inf])])
    assert param.isnan().tolist() == [False, True, True]
    assert optimizer.state[param]["corrected_norm"].item() == norm
    take(optimizer, param, [torch.ones(3)])
    assert param.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_resumes(state_dtype: str, max_norm: float | None) -> None:
    """With the last gradient, in every form of storage."""
    param = parameter(65, 33, dtype=torch.bfloat16)
    given = gradients(10, (65, 33))
    own = {"max_norm": max_norm, "state_dtype": state_dtype, "param_storage": "stochastic"}
    optimizer = MARSAdamW([param], **own)
    take(optimizer, param, given[:5])
    resumed = Parameter(param.detach().clone())
    other = MARSAdamW([resumed], lr=1.0, **own)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take(optimizer, param, given[5:])
    take(other, resumed, given[5:])
    assert same_bits(param, resumed)


def test_a_state_without_the_last_gradient() -> None:
    """Is refused, AdamW's for one, and nothing of it is taken."""
    param = parameter(3)
    optimizer, adamw = MARSAdamW([param]), AdamW([param])
    take(adamw, param, gradients(1, (3,)))
    take(optimizer, param, gradients(1, (3,)))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0].pop("last_grad")
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="state 'last_grad' of parameter 0 of group 0 is missing"):
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="is of the method Adam: must be of MARSAdamW"):
        optimizer.load_state_dict(adamw.state_dict())
    assert all(torch.equal(x, before["state"][0][name]) for name, x in optimizer.state_dict()["state"][0].items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gamma": -1.0}, "gamma=-1.0"),
        ({"gamma": math.nan}, "gamma=nan"),
        ({"max_norm": 0.0}, "max_norm=0.0"),
        ({"max_norm": math.inf}, "max_norm=inf"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\]=1.0"),
        ({"caution": "exact"}, "caution='exact' with max_norm: take max_norm=None"),
        ({"lr_scale": "rms"}, "lr_scale='rms' with max_norm: take max_norm=None"),
        ({"state_dtype": ("fp32", "fp32")}, "must be one dtype, or 3"),
    ],
)
def test_bad_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MARSAdamW([parameter(3)], **given)


def test_lists_have_the_bits_of_the_class() -> None:
    own, p = parameter(33), parameter(33).detach()
    optimizer = MARSAdamW([own], max_norm=1.0, weight_decay=0.1)
    m, v, x = (torch.zeros(33) for _ in range(3))
    norm, step = torch.zeros((), dtype=torch.float64), torch.tensor(0.0)
    for g in gradients(4, (33,)):
        take(optimizer, own, [g])
        mars_adamw([p], [g], [m], [v], [x], [step], lr=3e-3, weight_decay=0.1, corrected_norms=[norm])
        assert same_bits(p, own.detach()) and torch.equal(norm, optimizer.state[own]["corrected_norm"])
    with pytest.raises(ValueError, match="corrected_norms has 0 entries"):
        mars_adamw([p], [g], [m], [v], [x], [step], lr=3e-3)


def test_groups_may_differ_in_clipping() -> None:
    """As for tensors of one dimension, which the authors update by AdamW."""
    matrix, vector = parameter(6, 7), parameter(7)
    plain = {"gamma": 0.0, "max_norm": None, "betas": (0.9, 0.95)}
    optimizer = MARSAdamW([{"params": [matrix]}, {"params": [vector], **plain}])
    for param in (matrix, vector):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert "corrected_norm" in optimizer.state[matrix] and "corrected_norm" not in optimizer.state[vector]
