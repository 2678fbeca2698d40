"""A recipe's loop as torchtune writes it, by its interface: the optimizer by its dotted path, and also in backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import torchtune_interface as torchtune
from support.recipes import block_of
from support.tiny import batch, copies, loss_of, network, same
from torch import Tensor

from signadam_ext import SignAdamPP

yaml = pytest.importorskip("yaml")
STEPS = 6


class Recipe:
    """The parts of ``FullFinetuneRecipeSingleDevice`` that know of optimizers."""

    def __init__(self, config: dict[str, Any], saved: dict[str, Any] | None = None, done: int = 0) -> None:
        self.in_backward, self.done = config["optimizer_in_bwd"], done
        self.model = network()
        if saved is not None:
            self.model.load_state_dict(saved["model"])
        if self.in_backward:
            by_param = {param: torchtune.instantiate(config["optimizer"], [param]) for param in self.model.parameters()}
            torchtune.register_optim_in_bwd_hooks(self.model, by_param)
            self.optimizers: Any = torchtune.OptimizerInBackwardWrapper(
                {name: by_param[param] for name, param in self.model.named_parameters()}
            )
            first = next(iter(by_param.values()))
        else:
            self.optimizers = first = torchtune.instantiate(config["optimizer"], self.model.parameters())
        if saved is not None:
            self.optimizers.load_state_dict(saved["optimizer"])
        self.schedule = torch.optim.lr_scheduler.LambdaLR(first, rate, last_epoch=done - 1)
        if self.in_backward:
            self.optimizers.set_lr_scheduler(self.schedule)

    def train(self, end: int) -> list[Tensor]:
        for number in range(self.done, end):
            loss_of(self.model, batch(number)).backward()
            if not self.in_backward:
                self.optimizers.step()
                self.optimizers.zero_grad(set_to_none=True)
            self.schedule.step()
        self.done = end
        return copies(self.model.parameters())

    def save(self, file: Path) -> None:
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizers.state_dict()}, file)


def rate(step: int) -> float:
    """From 1: before the schedule's first step, torchtune's wrapper tells it to the first optimizer alone."""
    return 1 - step / (2 * STEPS)


def config_of(in_backward: bool) -> dict[str, Any]:
    config = yaml.safe_load(block_of("torchtune", "yaml"))
    assert config["optimizer_in_bwd"] is True
    return {**config, "optimizer_in_bwd": in_backward}


@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in_backward"])
def test_the_config_of_the_page_trains_and_goes_on(in_backward: bool, tmp_path: Path) -> None:
    config = config_of(in_backward)
    recipe = Recipe(config)
    half = recipe.train(STEPS // 2)
    recipe.save(tmp_path / "half.pt")
    undisturbed = recipe.train(STEPS)
    assert not same(half, undisturbed)
    saved = torch.load(tmp_path / "half.pt", weights_only=True)
    assert same(Recipe(config, saved, STEPS // 2).train(STEPS), undisturbed)


@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in_backward"])
def test_the_bits_of_a_plain_loop(in_backward: bool) -> None:
    config = config_of(in_backward)
    # Each of several optimizers numbers its one parameter, so that only a state without random bits compares.
    if in_backward:
        config["optimizer"] = {**config["optimizer"], "state_dtype": "fp32"}
    recipe = Recipe(config)
    found = recipe.train(STEPS)
    model = network()
    optimizer = SignAdamPP(model.parameters(), lr=6e-4, state_dtype=config["optimizer"]["state_dtype"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for number in range(STEPS):
        loss_of(model, batch(number)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert same(found, model.parameters()) and not same(found, network().parameters())
    if in_backward:
        assert recipe.optimizers.get_optim_key("lr") == optimizer.param_groups[0]["lr"]
        assert type(next(iter(recipe.optimizers.optim_map.values()))) is SignAdamPP
