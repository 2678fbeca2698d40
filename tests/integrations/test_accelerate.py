"""Accelerate: prepared, clipped, accumulated, saved and loaded, released."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import CLIP, OPTIONS, batch, copies, loss_of, network, same, trained

from signadam_ext import AdamW, SignAdamPP

accelerate = pytest.importorskip("accelerate")


@pytest.mark.parametrize("cls", [SignAdamPP, AdamW])
def test_a_prepared_optimizer(cls: type, tmp_path: Path) -> None:
    options = {**OPTIONS, "state_dtype": "int2" if cls is SignAdamPP else "bf16"}
    accelerate.state.AcceleratorState._reset_state(True)
    own = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    plain = network()
    made = cls(plain.parameters(), **options)
    model, optimizer, schedule = own.prepare(plain, made, torch.optim.lr_scheduler.ConstantLR(made, 1.0))

    def train(begin: int, end: int) -> None:
        for number in range(begin, end):
            with own.accumulate(model):
                own.backward(loss_of(model, batch(number)))
                if own.sync_gradients:
                    own.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    train(0, 4)
    own.save_state(str(tmp_path))
    train(4, 8)
    undisturbed = copies(model.parameters())
    assert same(undisturbed, trained(cls, 4, accumulated=2, **options))
    own.load_state(str(tmp_path))
    assert not same(model.parameters(), undisturbed)
    train(4, 8)
    assert same(model.parameters(), undisturbed)
    model, optimizer, schedule = own.free_memory(model, optimizer, schedule)
    assert optimizer is None
