"""What ranks run in the tests of Accelerate with FSDP2, beside the same training in plain torch."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from support.tiny import CLIP, batch, copies, loss_of, network
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import signadam_ext

ACCUMULATED = 2


def whole(model: nn.Module) -> list[Tensor]:
    params: list[Any] = list(model.parameters())
    assert all(isinstance(param, DTensor) for param in params)
    return copies(param.full_tensor() for param in params)


def number_of(index: int) -> int:
    """The batch that this rank takes."""
    return index * dist.get_world_size() + dist.get_rank()


def sums_by_adding(model: nn.Module) -> None:
    """gloo has no weighted sum."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def plain(name: str, options: dict[str, Any], steps: int) -> list[Tensor]:
    """FSDP2 as torch has it."""
    model = network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    model = fully_shard(model)
    sums_by_adding(model)
    optimizer = getattr(signadam_ext, name)(model.parameters(), **options)
    for index in range(steps * ACCUMULATED):
        is_last = (index + 1) % ACCUMULATED == 0
        model.set_requires_gradient_sync(is_last)
        (loss_of(model, batch(number_of(index))) / ACCUMULATED).backward()
        if is_last:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return whole(model)


def prepared(name: str, options: dict[str, Any], folder: str) -> dict[str, list[Tensor]]:
    """Accelerate's: trained for 2 steps, saved, trained for 2 more, and those again from what was saved."""
    import accelerate

    # Accelerate shards for devices only, and asks by what it has found for what it starts: processes with a CPU each
    # are told as processes with a device each.
    accelerate.state.AcceleratorState._reset_state(True)
    os.environ.update(LOCAL_WORLD_SIZE=str(dist.get_world_size()), OMP_NUM_THREADS="1")
    accelerate.PartialState(cpu=True)
    accelerate.PartialState._shared_state["distributed_type"] = accelerate.DistributedType.MULTI_GPU
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Linear"],
        state_dict_type="SHARDED_STATE_DICT",
        reshard_after_forward=True,
    )
    own = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED, fsdp_plugin=plugin)
    model = network()
    optimizer = getattr(signadam_ext, name)(model.parameters(), **options)
    model, optimizer = own.prepare(model, optimizer)
    sums_by_adding(model)

    def train(begin: int, end: int) -> list[Tensor]:
        for index in range(begin * ACCUMULATED, end * ACCUMULATED):
            with own.accumulate(model):
                own.backward(loss_of(model, batch(number_of(index))))
                if own.sync_gradients:
                    own.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
        return whole(model)

    found = {"saved": train(0, 2)}
    own.save_state(folder)
    found["undisturbed"] = train(2, 4)
    own.load_state(folder)
    found["loaded"] = whole(model)
    found["resumed"] = train(2, 4)
    return found
