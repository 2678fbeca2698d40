"""LLaMA-Factory's v1 trainer on a tiny network: the optimizer of its config, its schedule and its loop."""

from __future__ import annotations

from typing import Any

import torch
from support.tiny import CLIP, batch, loss_of
from torch import Tensor, nn

LABELS = 4


class Batches(list[Any]):
    """Micro-batches of each step; the trainer counts the labels in them."""

    def set_epoch(self, epoch: int) -> None:
        pass


def trainer_of(config: dict[str, Any], model: nn.Module, steps: int) -> Any:
    from llamafactory.v1.config import TrainingArguments
    from llamafactory.v1.core import base_trainer

    class Trainer(base_trainer.BaseTrainer):
        """Without a tokenizer, sharding and checkpoints: the optimizer, its schedule and the loop are the library's."""

        def __init__(self) -> None:
            self.args = TrainingArguments(optim_config=config, max_grad_norm=CLIP)
            self.model = model
            self.train_batch_generator = Batches(
                [{"x": batch(step), "labels": torch.zeros(LABELS)}] for step in range(steps)
            )
            self.global_step, self.num_training_steps = 0, steps
            self.dp_size, self._resume_epoch, self._deepspeed_engine = 1, 0, None
            self._init_optimizer()
            self._init_lr_scheduler()
            self.callback_handler = base_trainer.CallbackHandler([], trainer=self)
            self.state = base_trainer.TrainerState(num_training_steps=steps, global_step=0, epoch=0)

        def compute_loss(self, batch: dict[str, Tensor]) -> Tensor:
            return loss_of(self.model, batch["x"])

    return Trainer()
