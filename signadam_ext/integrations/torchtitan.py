"""torchtitan: its container of optimizers, which knows those of this package by name, for a config's ``optimizer``.

::

    config.optimizer = config_of("SignAdamPP", lr=1e-3, state_dtype="int2", param_storage="stochastic")
    config.training.dtype = "bfloat16"  # of the parameters

fp32 parameters are updated as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from . import CLASSES, library_of

with library_of("torchtitan"):
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

    _torchtitans: Callable[[str], Callable[..., Optimizer]] = OptimizersContainer._resolve_optimizer_factory


class SignOptimizersContainer(OptimizersContainer):
    """torchtitan's container, in which ``optimizer_name`` may also be a class of this package.

    torchtitan's own names stay its own: ``Adam`` and ``AdamW`` are torch's.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        try:
            return _torchtitans(name)
        except NotImplementedError:
            if name not in CLASSES:
                raise
            return CLASSES[name]


def config_of(name: str, lr: float, **options: Any) -> SignOptimizersContainer.Config:
    """One optimizer for all parameters, in place of torchtitan's ``default_adamw(lr)``.

    Args:
        name: of a class of this package, or of torchtitan's.
        lr: the learning rate, which torchtitan's schedules multiply.
        options: what else the class takes.
    """
    group = ParamGroupConfig(pattern=".*", optimizer_name=name, optimizer_kwargs={"lr": lr, **options})
    return SignOptimizersContainer.Config(param_groups=[group])
