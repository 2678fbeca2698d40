"""Hugging Face's Trainer: the optimizer as an instance, and by ``optimizer_cls_and_kwargs``; resumed bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import copies, same
from torch import Tensor, nn

from signadam_ext import ScheduleFreeAdamW, SignAdamPP

transformers = pytest.importorskip("transformers")

OPTIONS: dict[str, Any] = {"lr": 1e-2, "state_dtype": "int2", "param_storage": "stochastic"}
STEPS = 8


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.ids = torch.randint(0, 64, (64, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def language_model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config).bfloat16()


def trainer_of(how: str, folder: Path) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_steps=STEPS // 2,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        max_grad_norm=1.0,
    )
    model = language_model()
    if how == "class":
        own: dict[str, Any] = {"optimizer_cls_and_kwargs": (SignAdamPP, OPTIONS)}
    else:
        optimizer = SignAdamPP(model.parameters(), **OPTIONS)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        own = {"optimizers": (optimizer, schedule)}
    return transformers.Trainer(model, arguments, train_dataset=Tokens(), **own)


@pytest.mark.parametrize("how", ["class", "instance"])
def test_a_resumed_training_ends_where_an_undisturbed_one_ends(how: str, tmp_path: Path) -> None:
    first = trainer_of(how, tmp_path)
    before = copies(first.model.parameters())
    first.train()
    undisturbed = copies(first.model.parameters())
    assert not any(torch.equal(one, other) for one, other in zip(before, undisturbed, strict=True))
    optimizer = first.optimizer.optimizer if hasattr(first.optimizer, "optimizer") else first.optimizer
    assert isinstance(optimizer, SignAdamPP)
    # Weight decay goes to matrices alone where the Trainer makes the groups.
    assert len(optimizer.param_groups) == (2 if how == "class" else 1)
    assert {int(own["step"]) for own in optimizer.state.values()} == {STEPS}
    second = trainer_of(how, tmp_path)
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert same(second.model.parameters(), undisturbed)


def test_what_the_trainer_reads_of_its_arguments(tmp_path: Path) -> None:
    """Its weight decay, and no learning rate; its wrapper hides what torch.optim has not, but the two modes."""
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        lr_scheduler_type="constant",
        learning_rate=0.123,
        weight_decay=0.05,
    )
    options = {"weight_decay": 0.3, "max_grad_norm": 1.0}
    trainer = transformers.Trainer(
        language_model(), arguments, train_dataset=Tokens(), optimizer_cls_and_kwargs=(ScheduleFreeAdamW, options)
    )
    trainer.train()
    groups = trainer.optimizer.param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.0025, 0.05), (0.0025, 0.0)]
    assert not hasattr(trainer.optimizer, "last_grad_norm") and trainer.optimizer.optimizer.last_grad_norm > 0
    assert all(group["train_mode"] for group in groups)  # without an evaluation, weights are the point y
    trainer.optimizer.eval()
    assert not any(group["train_mode"] for group in groups)
