"""What torchtune 0.6.1's single-device recipes do with an optimizer.

It does not import beside today's torchao. This repeats ``torchtune/config/_instantiate.py``,
``torchtune/training/memory.py`` and the loop of ``recipes/full_finetune_single_device.py``, as far as optimizers go.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

VERSION = "0.6.1"


def instantiate(config: dict[str, Any], *args: Any) -> Any:
    module, _, name = config["_component_"].rpartition(".")
    component = getattr(importlib.import_module(module), name)
    return component(*args, **{key: value for key, value in config.items() if key != "_component_"})


class OptimizerInBackwardWrapper:
    def __init__(self, optim_map: dict[str, Optimizer]) -> None:
        self.optim_map = optim_map

    def state_dict(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self.optim_map.items()}

    def load_state_dict(self, optim_ckpt_map: dict[str, Any]) -> None:
        assert optim_ckpt_map.keys() == self.optim_map.keys()
        for name, saved in optim_ckpt_map.items():
            self.optim_map[name].load_state_dict(saved)

    def get_optim_key(self, key: str) -> Any:
        return next(iter(self.optim_map.values())).param_groups[0][key]

    def set_lr_scheduler(self, lr_scheduler: LRScheduler) -> None:
        original_step = lr_scheduler.step

        def custom_step(epoch: int | None = None) -> None:
            original_step() if epoch is None else original_step(epoch)
            new_lr = lr_scheduler.get_last_lr()[0]
            for optimizer in self.optim_map.values():
                for group in optimizer.param_groups:
                    group["lr"] = new_lr

        lr_scheduler.step = custom_step  # type: ignore[method-assign]


def register_optim_in_bwd_hooks(model: nn.Module, optim_dict: dict[nn.Parameter, Optimizer]) -> None:
    def optim_step(param: nn.Parameter) -> None:
        optim_dict[param].step()
        optim_dict[param].zero_grad()

    for param in model.parameters():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(optim_step)
