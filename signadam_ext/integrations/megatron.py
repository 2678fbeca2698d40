"""Megatron-LM: an optimizer of this package as one of its emerging optimizers, before it reads its arguments.

::

    from signadam_ext import SignAdamPP
    from signadam_ext.integrations import megatron

    name = megatron.register(SignAdamPP, state_dtype="bf16")  # for OptimizerConfig(optimizer=name, ...)
    pretrain(..., extra_args_provider=megatron.add_arguments)  # for --optimizer sign_adam_pp

It gets all parameters, embeddings and vectors too.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

from ..optimizers import SignAdamPP
from ..optimizers.base import SignOptimizer
from . import library_of

with library_of("megatron"):
    from emerging_optimizers import registry
    from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS as _ENTRIES
    from megatron.core.optimizer.emerging_optimizers import EmergingOptimizerEntry
    from torch.distributed.checkpoint.state_dict import _init_optim_state

#: The classes that :func:`register` has been given, by name.
_REGISTERED: dict[str, type[SignOptimizer]] = {}


def register(cls: type[SignOptimizer] = SignAdamPP, name: str | None = None, **options: Any) -> str:
    """Makes a class known to emerging_optimizers and to Megatron, for all parameters, embeddings and vectors too.

    Args:
        cls: the class.
        name: what Megatron's ``optimizer`` is to be, by default the class's name in small letters: "sign_adam_pp".
        options: what the class takes beside ``lr`` and ``weight_decay``, which are Megatron's.

    Returns:
        The name.

    Raises:
        ValueError: another optimizer has the name.
    """
    name = name or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
    if _REGISTERED.get(name) is not cls:
        if name in _ENTRIES or name in ("adam", "sgd"):
            raise ValueError(f"name={name!r}: Megatron has another optimizer of this name")
        registry.register_optimizer(name)(cls)
        _REGISTERED[name] = cls
    _ENTRIES[name] = EmergingOptimizerEntry(
        optimizer_cls=cls,
        init_state_fn=lambda optimizer, config=None: _init_optim_state(optimizer),
        config_to_kwargs=lambda config, *_: {"lr": config.lr, "weight_decay": config.weight_decay, **options},
        default_param_overrides={},
    )
    return name


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """An ``extra_args_provider`` by which ``--optimizer`` takes the names that :func:`register` has returned."""
    for action in parser._actions:
        if action.dest == "optimizer":
            action.choices = [*(action.choices or ()), *sorted(_REGISTERED)]
    return parser
