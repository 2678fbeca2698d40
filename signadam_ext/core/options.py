"""What every optimizer takes beside its own hyperparameters: names and defaults, in one place."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, TypeAlias, TypedDict

import torch

from . import checks
from .renamed import NAMES, names_today

StateDtype: TypeAlias = "str | torch.dtype | tuple[str | torch.dtype, ...]"


class TorchOptions(TypedDict, total=False):
    """What code written for torch.optim passes: taken as long as it asks for nothing."""

    foreach: bool | None
    fused: bool | None
    differentiable: bool | None
    capturable: bool | None


#: The backends that ``backend=`` may name, beside "auto".
BACKENDS = ("reference", "cpu", "cuda", "triton")

#: What every optimizer takes beside its own hyperparameters, ``state_dtype`` where it has moments, and the defaults.
DEFAULTS: dict[str, Any] = {
    "weight_decay": 0.0,
    "decoupled_weight_decay": True,
    "maximize": False,
    "max_grad_norm": None,
    "state_dtype": "fp32",
    "param_storage": "nearest",
    "seed": 0,
    "backend": "auto",
}
COMMON = frozenset(DEFAULTS)
TORCH_OPTIONS: dict[str, Any] = dict.fromkeys(checks.TORCH_OPTIONS)


def completed(name: str, given: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor with those beside its own, by today's names.

    Raises:
        TypeError: a name that no argument has, or has had; or one given under both names.
    """
    for key in others:
        if key not in TORCH_OPTIONS and key not in NAMES:
            near = difflib.get_close_matches(key, (*given, *TORCH_OPTIONS), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{name}() got an unexpected keyword argument {key!r}{hint}")
    renamed = {NAMES[old] for old in others if old in NAMES}
    # A default stands in nobody's way.
    explicit = {key: value for key, value in given.items() if key not in renamed or value != DEFAULTS[key]}
    return names_today({**TORCH_OPTIONS, **explicit, **others})


def signature(init: Any) -> inspect.Signature:
    """The signature of a class with this constructor, with ``**others`` spelled out."""
    found = inspect.signature(init)
    own = list(found.parameters.values())[1:]
    if own and own[-1].kind is inspect.Parameter.VAR_KEYWORD:
        own[-1:] = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation="bool | None")
            for name in TORCH_OPTIONS
        ]
    return found.replace(parameters=own)
