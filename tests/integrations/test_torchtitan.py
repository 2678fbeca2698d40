"""torchtitan's containers of optimizers and of schedules, with classes of this package; the rest: tests/distributed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny import OPTIONS, batch, copies, loss_of, network, same
from torch import nn

from signadam_ext import SignAdamPP

pytest.importorskip("torchtitan", reason="torchtitan is not installed")
for needed in ("tyro", "docstring_parser", "spmd_types"):
    pytest.importorskip(needed, reason=f"{needed}, which torchtitan imports, is not installed")


def built(model: nn.Module) -> tuple[Any, Any]:
    from torchtitan.components.optimizer import LRSchedulersContainer

    from signadam_ext.integrations.torchtitan import config_of

    optimizers = config_of("SignAdamPP", **OPTIONS).build(model_parts=[model])
    return optimizers, LRSchedulersContainer.Config(warmup_steps=2).build(optimizers=optimizers, training_steps=8)


def train(model: nn.Module, optimizers: Any, schedulers: Any, begin: int, end: int) -> None:
    for number in range(begin, end):
        loss_of(model, batch(number)).backward()
        optimizers.step()
        schedulers.step()
        optimizers.zero_grad()


def test_a_container_trains_and_goes_on() -> None:
    model, plain = network(), network()
    optimizers, schedulers = built(model)
    (own,) = optimizers
    assert type(own) is SignAdamPP and own.param_groups[0]["state_dtype"] == "int2"
    rates = schedulers.schedulers[0].lr_lambdas[0]
    optimizer = SignAdamPP(plain.parameters(), **OPTIONS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
    train(plain, optimizer, schedule, 0, 6)

    train(model, optimizers, schedulers, 0, 3)
    weights, saved, scheduled = copies(model.parameters()), optimizers.state_dict(), schedulers.state_dict()
    assert saved["state.0.weight.exp_avg"].shape == (16, 8)
    saved = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in saved.items()}
    train(model, optimizers, schedulers, 3, 6)
    assert same(model.parameters(), plain.parameters()) and not same(weights, plain.parameters())

    other = network()
    with torch.no_grad():
        for param, value in zip(other.parameters(), weights, strict=True):
            param.copy_(value)
    optimizers, schedulers = built(other)
    optimizers.load_state_dict(saved)
    schedulers.load_state_dict(scheduled)
    train(other, optimizers, schedulers, 3, 6)
    assert same(other.parameters(), plain.parameters())


def test_torchtitans_own_names_stay_its_own() -> None:
    from signadam_ext.integrations.torchtitan import SignOptimizersContainer, config_of

    (own,) = config_of("AdamW", 1e-3).build(model_parts=[network()])
    assert type(own) is torch.optim.AdamW
    with pytest.raises(NotImplementedError, match="SignAdamP "):
        SignOptimizersContainer._resolve_optimizer_factory("SignAdamP")
