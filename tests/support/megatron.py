"""Megatron's interface for emerging optimizers: what a rank runs where the packages are, and what stands in for them.

The stand-in repeats ``megatron/core/optimizer/emerging_optimizers.py`` of megatron-core 0.19.2 and
``emerging_optimizers/registry.py`` of emerging-optimizers 0.3.0, as far as the plugin goes.
"""

from __future__ import annotations

import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import typing_extensions
from support.tiny import batch, copies, loss_of, network, same
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import signadam_ext.integrations
from signadam_ext import SignAdamPP

STEPS = 4
LR, WEIGHT_DECAY = 1e-2, 0.1

# The stand-in


def stand_in() -> dict[str, ModuleType]:
    """Modules by name."""
    classes: dict[str, type] = {}
    entries: dict[str, Any] = {}

    def register_optimizer(name: str) -> Callable[[type], type]:
        def decorator(cls: type) -> type:
            if name.lower() in classes:
                raise ValueError(f"Optimizer {name} already registered.")
            classes[name.lower()] = cls
            return cls

        return decorator

    @dataclass
    class EmergingOptimizerEntry:
        optimizer_cls: type
        init_state_fn: Callable[..., Any]
        config_to_kwargs: Callable[..., Any] | None = None
        default_param_overrides: dict[Any, Any] = field(default_factory=lambda: {"nonlinear": {"optimizer": "adam"}})

    def _create_emerging_optimizer(
        config: Any, param_groups: Any, eopt_name: str, model_chunks: Any, pg_collection: Any
    ) -> tuple[Any, Any]:
        entry = entries[eopt_name]
        kwargs = entry.config_to_kwargs(config, model_chunks, pg_collection)
        return entry.optimizer_cls(param_groups, **kwargs), entry.init_state_fn

    entries["muon"] = EmergingOptimizerEntry(torch.optim.SGD, lambda optimizer, config=None: None)
    contents: dict[str, dict[str, Any]] = {
        "emerging_optimizers": {},
        "emerging_optimizers.registry": {
            "register_optimizer": register_optimizer,
            "get_optimizer_cls": lambda name: classes[name.lower()],
        },
        "megatron": {},
        "megatron.core": {},
        "megatron.core.optimizer": {},
        "megatron.core.optimizer.emerging_optimizers": {
            "_EMERGING_OPTIMIZERS": entries,
            "EmergingOptimizerEntry": EmergingOptimizerEntry,
            "_create_emerging_optimizer": _create_emerging_optimizer,
        },
    }
    made = {name: ModuleType(name) for name in contents}
    for name, module in made.items():
        module.__dict__.update(contents[name], __path__=[])
    made["emerging_optimizers"].__dict__["registry"] = made["emerging_optimizers.registry"]
    return made


def put_in_place(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The stand-in's modules, as long as a test lasts, and a plugin that has not been imported."""
    made = stand_in()
    for name in [name for name in sys.modules if name.split(".")[0] in ("megatron", "emerging_optimizers")]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    plugin = "signadam_ext.integrations.megatron"
    # Noted, so that whatever is imported under this name is gone afterwards.
    monkeypatch.setitem(sys.modules, plugin, ModuleType(plugin))
    monkeypatch.delattr(signadam_ext.integrations, "megatron", raising=False)
    del sys.modules[plugin]
    return made


# The packages


class _OnCpu(TorchFunctionMode):
    """Megatron's optimizers make their scalars on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def _built(options: dict[str, Any]) -> tuple[nn.Module, Any, Any]:
    """A network, Megatron's optimizer for it, and its schedule."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from signadam_ext.integrations import megatron

    name = megatron.register(SignAdamPP, **options)
    model = network()
    model.ddp_config = SimpleNamespace(use_distributed_optimizer=False, use_megatron_fsdp=False)
    config = OptimizerConfig(optimizer=name, lr=LR, min_lr=0.0, weight_decay=WEIGHT_DECAY, clip_grad=0.0)
    with _OnCpu():
        optimizer = get_megatron_optimizer(config, [model])
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=LR,
        min_lr=0.0,
        lr_warmup_steps=2,
        lr_decay_steps=2 * STEPS,
        lr_decay_style="cosine",
        start_wd=WEIGHT_DECAY,
        end_wd=WEIGHT_DECAY,
        wd_incr_steps=2 * STEPS,
        wd_incr_style="constant",
    )
    return model, optimizer, schedule


def _train(model: nn.Module, optimizer: Any, schedule: Any, begin: int, end: int) -> list[tuple[float, ...]]:
    """The learning rates and weight decays of each step."""
    used = []
    for number in range(begin, end):
        loss_of(model, batch(number)).backward()
        for param in model.parameters():
            param.main_grad, param.grad = param.grad, None  # as Megatron's data parallelism has it
        used.append(tuple(group[name] for group in optimizer.param_groups for name in ("lr", "weight_decay")))
        with _OnCpu():
            optimizer.step()
        schedule.step(1)
        optimizer.zero_grad()
    return used


def _tensors(state: dict[Any, Any]) -> dict[Any, Any]:
    """The tensors in a sharded state, those of each parameter and what all have in common."""
    return {
        key: {name: sharded.data.clone() for name, sharded in own.items()} if isinstance(own, dict) else own.clone()
        for key, own in state.items()
    }


def trained(options: dict[str, Any]) -> dict[str, Any]:
    """What Megatron's optimizer, its schedule and its sharded state make of a training that stops and goes on."""
    if not hasattr(typing, "override"):  # before Python 3.12: the one name for which emerging-optimizers asks for it
        typing.__dict__["override"] = typing_extensions.override
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()

    def sharded(model: nn.Module) -> dict[str, Any]:
        return {
            name: ShardedTensor.from_rank_offsets(name, param, replica_id=0) for name, param in model.named_parameters()
        }

    model, optimizer, schedule = _built(options)
    used = _train(model, optimizer, schedule, 0, STEPS)
    weights = copies(model.parameters())
    try:
        with _OnCpu():
            saved = optimizer.sharded_state_dict(sharded(model))
    except Exception as error:
        return {"weights": weights, "used": used, "error": f"{type(error).__name__}: {error}"}
    # What a checkpoint of Megatron's would hold.
    saved["state"] = _tensors(saved["state"])
    for group in saved["param_groups"]:
        group["params"] = group["params"].unwrap()
    scheduled = schedule.state_dict()
    used += _train(model, optimizer, schedule, STEPS, 2 * STEPS)

    other, resumed, schedule = _built(options)
    with torch.no_grad():
        for param, value in zip(other.parameters(), weights, strict=True):
            param.copy_(value)
    with _OnCpu():
        asked = resumed.sharded_state_dict(sharded(other), is_loading=True)
    for key, own in _tensors(asked["state"]).items():
        if isinstance(own, dict):
            assert {name: each.shape for name, each in own.items()} == {
                name: each.shape for name, each in saved["state"][key].items()
            }
    resumed.load_state_dict(saved)
    schedule.load_state_dict(scheduled)
    _train(other, resumed, schedule, STEPS, 2 * STEPS)
    return {
        "weights": copies(model.parameters()),
        "used": used,
        "resumed": copies(other.parameters()),
        "unchanged": same(weights, model.parameters()),
    }


def plain(used: list[tuple[float, ...]], options: dict[str, Any]) -> list[Tensor]:
    """The same steps without Megatron."""
    model = network()
    groups = [[param for param in model.parameters() if (param.dim() > 1) == is_matrix] for is_matrix in (True, False)]
    optimizer = SignAdamPP([{"params": group} for group in groups], **options)
    for number, numbers in enumerate(used):
        for group, lr, decay in zip(optimizer.param_groups, numbers[::2], numbers[1::2], strict=True):
            group["lr"], group["weight_decay"] = lr, decay
        loss_of(model, batch(number)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return copies(model.parameters())
