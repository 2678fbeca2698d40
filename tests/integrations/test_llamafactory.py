"""LLaMA-Factory's v1 trainer with the optimizer of its config: the loop of ``BaseTrainer.fit`` on a tiny network."""

from __future__ import annotations

import pytest
from support.llamafactory import LABELS, trainer_of
from support.recipes import block_of
from support.tiny import CLIP, batch, loss_of, network, same
from torch import nn

from signadam_ext import SignAdamPP

yaml = pytest.importorskip("yaml")
pytest.importorskip("llamafactory", reason="llamafactory is not installed")
pytest.importorskip("torchdata", reason="torchdata, which llamafactory imports, is not installed")


@pytest.fixture(autouse=True)
def registered() -> None:
    import signadam_ext.integrations.llamafactory  # noqa: F401


def test_the_config_of_the_page_trains() -> None:
    config = yaml.safe_load(block_of("LLaMA-Factory", "yaml"))["optim_config"]
    options = {name: value for name, value in config.items() if name != "name"}
    model = network()
    trainer = trainer_of(dict(config), model, 4)
    trainer.fit()
    assert type(trainer.optimizer) is SignAdamPP and trainer.optimizer.param_groups[0]["state_dtype"] == "int2"
    twin = network()
    optimizer = SignAdamPP(twin.parameters(), **options)
    for step in range(4):
        # Over the number of labels, as the trainer has it.
        (loss_of(twin, batch(step)) * LABELS / (LABELS + 1e-6)).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    assert same(model.parameters(), twin.parameters()) and not same(model.parameters(), network().parameters())


def test_only_what_is_trained_and_only_what_there_is() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    trainer = trainer_of({"name": "Lion", "lr": 1e-3}, model, 1)
    assert len(trainer.optimizer.param_groups[0]["params"]) == 3
    trainer.fit()
    assert same([model[0].weight], [before])
    with pytest.raises(ValueError, match="SignAdamP is not registered"):
        trainer_of({"name": "SignAdamP", "lr": 1e-3}, model, 1)
