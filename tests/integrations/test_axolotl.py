"""axolotl's plugin manager and the part of its trainers that makes optimizers, on a tiny network."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.recipes import block_of
from support.tiny import batch, copies, loss_of, network, same
from torch import Tensor, nn

from signadam_ext import SignAdamPP

yaml = pytest.importorskip("yaml")
pytest.importorskip("axolotl", reason="axolotl is not installed")
pytest.importorskip("addict", reason="addict, which axolotl imports, is not installed")
pytest.importorskip("transformers")
pytest.importorskip("peft")

STEPS = 4


@pytest.fixture
def manager() -> Iterator[Any]:
    from axolotl.integrations.base import PluginManager

    found = PluginManager.get_instance()
    yield found
    found.plugins.clear()


def configured(manager: Any) -> Any:
    """The config of the page, with its plugins registered, as axolotl's command line does it."""
    from axolotl.utils.dict import DictDefault

    config = DictDefault(yaml.safe_load(block_of("axolotl", "yaml")))
    for name in config.plugins:
        manager.register(name)
    manager.cfg = config
    return config


class Scored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": loss_of(self.layers, x)}


class Examples(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": batch(index)[0]}


def trainer_of(config: Any, folder: Path) -> Any:
    import transformers

    # By its file: the package around it imports datasets, and nothing here needs those.
    root = importlib.metadata.distribution("axolotl").locate_file("axolotl/core/trainers/mixins/optimizer.py")
    spec = importlib.util.spec_from_file_location("optimizer_of_axolotl", str(root))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    @dataclass
    class Arguments(transformers.TrainingArguments):
        loraplus_lr_ratio: float | None = None
        embedding_lr_scale: float | None = None
        embedding_lr: float | None = None
        lr_groups: list[Any] | None = None

    arguments = Arguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )
    return module.OptimizerMixin(Scored(), arguments, train_dataset=Examples())


def test_the_config_of_the_page_trains(manager: Any, tmp_path: Path) -> None:
    config = configured(manager)
    trainer = trainer_of(config, tmp_path)
    manager.post_trainer_create(config, trainer)
    before = copies(trainer.model.parameters())
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert type(optimizer) is SignAdamPP
    # Weight decay goes to matrices alone: the groups are the trainer's.
    groups = [(group["lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
    assert groups == [(config.learning_rate, config.weight_decay, 2), (config.learning_rate, 0.0, 2)]
    assert all(group["state_dtype"] == config.signadam.state_dtype == "int2" for group in optimizer.param_groups)
    assert {int(own["step"]) for own in optimizer.state.values()} == {STEPS}
    assert not any(torch.equal(one, other) for one, other in zip(before, trainer.model.parameters(), strict=True))


def test_the_hook_makes_what_the_trainer_makes(manager: Any, tmp_path: Path) -> None:
    config = configured(manager)
    trainer = trainer_of(config, tmp_path)
    ours = manager.create_optimizer(trainer)
    manager.post_trainer_create(config, trainer)
    theirs = trainer.create_optimizer()
    assert ours is not theirs and type(ours) is type(theirs) is SignAdamPP
    for one, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert {**one, "params": None} == {**other, "params": None}
        assert same(one["params"], other["params"])


def test_the_options_pass_axolotls_validation(manager: Any) -> None:
    from axolotl.integrations.config import merge_input_args

    config = configured(manager)
    merged, _ = merge_input_args()
    field = merged.model_fields["signadam"]
    assert field.annotation == dict[str, Any] | None
    from signadam_ext.integrations.axolotl import SignAdamArguments

    assert SignAdamArguments(signadam=config.signadam.to_dict()).model_dump() == {"signadam": config.signadam.to_dict()}


def test_another_name_is_refused(manager: Any, tmp_path: Path) -> None:
    config = configured(manager)
    config.signadam.name = "SignAdamP"
    with pytest.raises(ValueError, match=r"SignAdamP'.*SignAdamPP"):
        manager.post_trainer_create(config, trainer_of(config, tmp_path))
