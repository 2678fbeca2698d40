"""Lightning's Trainer, which passes a closure, and its Fabric: automatic and manual, clipped, in 16 bits, resumed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import CLIP, OPTIONS, batch, copies, loss_of, network, same, trained
from torch import Tensor

from signadam_ext import ScheduleFreeAdamW, SignAdamPP

lightning = pytest.importorskip("lightning")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)

BATCHES = 4


def module_of(manual: bool) -> Any:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()
            self.automatic_optimization = not manual

        def training_step(self, x: Tensor, index: int) -> Tensor:
            loss = loss_of(self.network, x)
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, CLIP, "norm")
                optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = SignAdamPP(self.network.parameters(), **OPTIONS)
            return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)]

    return Module()


def trainer_of(**options: Any) -> Any:
    """One that says and keeps nothing."""
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def batches() -> Any:
    return torch.utils.data.DataLoader([batch(number) for number in range(BATCHES)], batch_size=None)


def fitted(manual: bool, epochs: int, precision: str = "32-true", **options: Any) -> tuple[Any, Any]:
    own = {} if manual else {"gradient_clip_val": CLIP}
    trainer = trainer_of(max_epochs=epochs, precision=precision, **own)
    module = module_of(manual)
    trainer.fit(module, batches(), **options)
    return trainer, module


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_a_training_of_lightning(manual: bool, tmp_path: Path) -> None:
    trainer, module = fitted(manual, 1)
    assert same(module.network.parameters(), trained(SignAdamPP, BATCHES))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    _, undisturbed = fitted(manual, 2)
    _, resumed = fitted(manual, 2, ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert same(resumed.network.parameters(), undisturbed.network.parameters())
    assert not same(resumed.network.parameters(), module.network.parameters())


def test_mixed_precision_of_lightning() -> None:
    before = copies(network().parameters())
    _, module = fitted(False, 1, "bf16-mixed")
    assert all(param.dtype == torch.float32 for param in module.network.parameters())
    assert not any(torch.equal(one, other) for one, other in zip(before, module.network.parameters(), strict=True))


def test_fabric(tmp_path: Path) -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    plain = network()
    model, optimizer = fabric.setup(plain, SignAdamPP(plain.parameters(), **OPTIONS))
    state = {"model": model, "optimizer": optimizer}

    def train(begin: int, end: int) -> None:
        for number in range(begin, end):
            fabric.backward(loss_of(model, batch(number)))
            fabric.clip_gradients(model, optimizer, max_norm=CLIP)
            optimizer.step()
            optimizer.zero_grad()

    train(0, 3)
    fabric.save(tmp_path / "one.ckpt", state)
    train(3, 6)
    undisturbed = copies(model.parameters())
    assert same(undisturbed, trained(SignAdamPP, 6))
    fabric.load(tmp_path / "one.ckpt", state)
    train(3, 6)
    assert same(model.parameters(), undisturbed)
    # Fabric's wrapper shows all that the optimizer has.
    optimizer.observe()
    train(6, 7)
    assert optimizer.statistics().all.numel == sum(param.numel() for param in plain.parameters())


def test_a_schedule_free_optimizer_validates_at_its_average_by_two_hooks() -> None:
    """As docs/integrations.md says: the average of a plain loop, after each epoch."""
    validated: list[list[Tensor]] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, x: Tensor, index: int) -> Tensor:
            return loss_of(self.network, x)

        def on_validation_epoch_start(self) -> None:
            self.optimizers().optimizer.eval()

        def validation_step(self, x: Tensor, index: int) -> None:
            validated.append(copies(self.network.parameters()))

        def on_validation_epoch_end(self) -> None:
            self.optimizers().optimizer.train()

        def configure_optimizers(self) -> Any:
            return ScheduleFreeAdamW(self.network.parameters(), lr=0.1)

    trainer = trainer_of(max_epochs=2, num_sanity_val_steps=0, limit_val_batches=1)
    trainer.fit(Module(), batches(), batches())

    plain = network()
    optimizer = ScheduleFreeAdamW(plain.parameters(), lr=0.1)
    for average in validated:
        for number in range(BATCHES):
            optimizer.zero_grad()
            loss_of(plain, batch(number)).backward()
            optimizer.step()
        optimizer.eval()
        assert same(average, plain.parameters())
        optimizer.train()
        assert not same(average, plain.parameters())
    assert len(validated) == 2
