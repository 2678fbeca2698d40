"""LLaMA-Factory's v1 trainers: once this module is imported, a config may name the optimizers of this package.

::

    optim_config:
      name: SignAdamPP
      lr: 6.0e-4
      state_dtype: int2
      param_storage: stochastic

The learning rate stands there too: an optimizer is handed nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from . import CLASSES, library_of

with library_of("llamafactory"):
    from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin


def _maker(cls: Any) -> Callable[[nn.Module, Mapping[str, Any]], Optimizer]:
    def make(model: nn.Module, config: Mapping[str, Any]) -> Optimizer:
        options = {name: value for name, value in config.items() if name != "name"}
        return cls([param for param in model.parameters() if param.requires_grad], **options)

    return make


for _name, _cls in CLASSES.items():
    OptimizerPlugin(_name).register()(_maker(_cls))
