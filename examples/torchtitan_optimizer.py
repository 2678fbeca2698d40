"""torchtitan 0.3 with an optimizer of this package: a config. Its parts run on CPU processes, too.

torchrun --nproc-per-node 8 -m torchtitan.train --module examples.torchtitan_optimizer --config llama3_debugmodel
torchrun --nproc-per-node 2 examples/torchtitan_optimizer.py

The first is torchtitan's own trainer, which needs a GPU. The second trains a small Llama of torchtitan's on CPU
processes with torchtitan's FSDP2, containers and checkpoints, and goes on where its last checkpoint ends.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer
from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
from torchtitan.distributed.utils import clip_grad_norm_
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
from torchtitan.models.llama3 import config_registry, model_registry
from torchtitan.tools.utils import set_default_dtype
from torchtitan.trainer import Trainer

from signadam_ext.integrations.torchtitan import config_of

# The recipe

#: Momentum in 2 bits, and bf16 parameters that are rounded stochastically.
STORAGE = {"state_dtype": "int2", "param_storage": "stochastic"}


def llama3_debugmodel() -> Trainer.Config:
    """torchtitan's config of this name, with bf16 parameters and that optimizer."""
    config = config_registry.llama3_debugmodel()
    config.training.dtype = "bfloat16"
    config.optimizer = config_of("SignAdamPP", lr=1e-3, **STORAGE)
    return config


# The same without a trainer


def small_llama() -> torch.nn.Module:
    """Two layers of the debug model, with bf16 parameters sharded over all processes."""
    config = model_registry("debugmodel").model
    config.layers = config.layers[:2]
    for _, _, layer, name in list(config.traverse(FlexAttention.Config)):
        setattr(layer, name, ScaledDotProductAttention.Config())
    with torch.device("meta"), set_default_dtype(torch.bfloat16):
        model = config.build()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    apply_fsdp_to_decoder(model, mesh, torch.bfloat16, torch.float32, pp_enabled=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no weighted sum
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    return model.train()


def batch(step: int, length: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's sequences of one step and what follows each token: counting, from random numbers."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    tokens = (torch.randint(64, (8, 1), generator=generator) + torch.arange(length + 1)) % 64
    return tokens[:, :-1], tokens[:, 1:]


class Training:
    """What torchtitan's trainer does with an optimizer, on the CPU.

    Args:
        optimizer: torchtitan's config of it.
        out: the folder of the checkpoints, the last of which is loaded.
        steps: of the whole training, which the learning rate follows.
        interval: steps between checkpoints.
    """

    def __init__(self, optimizer: OptimizersContainer.Config, out: str, steps: int, interval: int = 10) -> None:
        torch.manual_seed(1)
        self.step = 0
        self.model = small_llama()
        self.loss = CrossEntropyLoss.Config().build()
        self.optimizers = optimizer.build(model_parts=[self.model])
        self.schedulers = LRSchedulersContainer.Config(warmup_steps=2).build(
            optimizers=self.optimizers, training_steps=steps
        )
        saving = {"enable": True, "interval": interval, "keep_latest_k": 0, "last_save_model_only": False}
        self.checkpointer = CheckpointManager.Config(folder=out, **saving).build(
            dataloader=None,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.schedulers,
            states={"train_state": self},
            sd_adapter=None,
        )
        self.checkpointer.load()

    def run(self, end: int) -> None:
        """Trains up to this step, and saves there."""
        while self.step < end:
            self.step += 1
            inputs, labels = batch(self.step)
            self.optimizers.zero_grad()
            loss, _ = self.loss(self.model(inputs), labels, torch.tensor(labels.numel() * dist.get_world_size()))
            loss.backward()
            clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizers.step()
            self.schedulers.step()
            self.checkpointer.save(self.step, last_step=self.step == end)
            loss = loss.detach()
            dist.all_reduce(loss)
            if dist.get_rank() == 0:
                print(f"step {self.step}: loss {loss:.4f}", flush=True)

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.step = state_dict["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of the whole training, which the learning rate follows")
    parser.add_argument("--stop-at", type=int, help="an earlier step; the same command without this goes on from there")
    parser.add_argument("--out", default="runs/torchtitan", help="folder of the checkpoints")
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    try:
        optimizer = config_of("SignAdamPP", lr=3e-3, **STORAGE)
        Training(optimizer, arguments.out, arguments.steps).run(arguments.stop_at or arguments.steps)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
