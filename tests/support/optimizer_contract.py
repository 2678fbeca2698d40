"""What the tests of an optimizer's manners share: each kind of optimizer, small trainings, equality of bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from support.paper_formulas import OF_A_KIND, TABLE, Row
from support.strategies import same_bits
from torch import Tensor
from torch.nn import Parameter

from signadam_ext.optimizers.base import SignOptimizer

ROWS = {row.id: row for row in TABLE if row.id in OF_A_KIND}

each_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
each_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])

#: Values of another hyperparameter than the table's, for rules that have it.
OTHER_VALUES = {
    "lr": (0.03,),
    "weight_decay": (0.2,),
    "maximize": (True,),
    "alpha": (0.7,),
    "beta": (0.4,),
    "betas": ((0.4, 0.8),),
    "eps": (0.1,),
    "confidence_beta": (0.3,),
    "confidence": ("fixed", "adaptive", "adaptive_delayed"),
    "second_moment": ("exact", "analytic"),
    "bias_correct_variance": (False,),
    "amsgrad": (False,),
    "variance": ("ema", "minibatch"),
}


def hyperparameters(row: Row) -> dict[str, Any]:
    """Of the optimizers these tests make; the table's values where it has them."""
    defaults = {"SignAdamPP": {"confidence": "fixed"}, "SignAdam": {"second_moment": "exact"}}
    common = {"lr": 0.1, "weight_decay": 0.0, "maximize": False}
    return {**common, **defaults.get(row.optimizer.__name__, {}), **row.hyperparameters}


def variations(row: Row) -> list[dict[str, Any]]:
    """Hyperparameters to override, one at a time, and weight decay of the other kind."""
    own = hyperparameters(row)
    found = [{name: value} for name in own for value in OTHER_VALUES[name] if value != own[name]]
    return [*found, {"weight_decay": 0.2, "decoupled_weight_decay": False}]


def make(row: Row, params: Any, backend: str = "cpu", **overrides: Any) -> SignOptimizer:
    return row.optimizer(params, **{**hyperparameters(row), "backend": backend, **overrides})


def parameters(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes or ((5, 7), (3,), ())]
    return copies(values)


def copies(params: Iterable[Tensor]) -> list[Parameter]:
    """Parameters with these values, and variances of their gradients for the rules that read them."""
    return with_variances(Parameter(param.detach().clone()) for param in params)


def with_variances(params: Iterable[Parameter]) -> list[Parameter]:
    """The parameters, with a ``grad_variance`` each."""
    given = list(params)
    for param in given:
        param.grad_variance = torch.full_like(param, 0.5, dtype=torch.float32, requires_grad=False)
    return given


def gradient(like: Tensor, step: int, index: int = 0) -> Tensor:
    """A gradient whose sums are exact in double, so that statistics do not depend on the order of its elements."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    return torch.randn(like.shape, generator=generator).mul_(64).round_().div_(64).to(like.dtype)


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def train(optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Takes the numbered steps with gradients that depend on the number and the parameter's index alone."""
    for step in steps:
        for index, param in enumerate(params_of(optimizer)):
            param.grad = gradient(param, step, index)
            param.grad_variance = gradient(param, step, index).float().square_()
        optimizer.step()


def assert_same(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Parameters and state have the same bits."""
    for i, (p, q) in enumerate(zip(params_of(a), params_of(b), strict=True)):
        assert same_bits(p, q), f"parameter {i} differs"
        state, other = a.state.get(p, {}), b.state.get(q, {})
        assert state.keys() == other.keys()
        for name, value in state.items():
            same = same_bits(value, other[name]) if isinstance(value, Tensor) else value == other[name]
            assert same, f"{name} of parameter {i} differs"


def snapshot(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Copies of all that a step changes."""
    return [
        (param.detach().clone(), {name: value.clone() for name, value in optimizer.state.get(param, {}).items()})
        for param in params_of(optimizer)
    ]


def assert_unchanged(optimizer: torch.optim.Optimizer, before: list[Any]) -> None:
    for (param, state), (now, now_state) in zip(before, snapshot(optimizer), strict=True):
        assert same_bits(param, now)
        assert state.keys() == now_state.keys()
        assert all(same_bits(state[name], now_state[name]) for name in state)
