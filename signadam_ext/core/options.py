"""What every optimizer takes beside its own hyperparameters: names and defaults, in one place."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

from .renamed import names_today


class CommonButDecay(TypedDict, total=False):
    """Keyword arguments of :class:`Common` that no optimizer takes by position."""

    decoupled_weight_decay: bool
    maximize: bool
    state_dtype: str | torch.dtype | tuple[str | torch.dtype, ...]
    param_storage: str
    seed: int
    backend: str
    foreach: bool | None
    fused: bool | None
    differentiable: bool | None
    capturable: bool | None


class Common(CommonButDecay, total=False):
    """Keyword arguments that all optimizers share; ``state_dtype`` only those that have moments."""

    weight_decay: float | Tensor


#: The backends that ``backend=`` may name, beside "auto".
BACKENDS = ("reference", "cpu", "cuda", "triton")

DEFAULTS: dict[str, Any] = {
    "weight_decay": 0.0,
    "decoupled_weight_decay": True,
    "maximize": False,
    "state_dtype": "fp32",
    "param_storage": "nearest",
    "seed": 0,
    "backend": "auto",
    "foreach": None,
    "fused": None,
    "differentiable": None,
    "capturable": None,
}
#: Of an optimizer that has ``weight_decay`` among its own arguments.
BUT_DECAY = {name: value for name, value in DEFAULTS.items() if name != "weight_decay"}
WITHOUT_MOMENTS = {name: value for name, value in DEFAULTS.items() if name != "state_dtype"}


def completed(name: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` on top of ``defaults``, by today's names.

    Raises:
        TypeError: a name that ``defaults`` does not have.
    """
    given = names_today(given)
    for key in given:
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{name}() got an unexpected keyword argument {key!r}{hint}")
    return {**defaults, **given}


def signature(init: Any, defaults: Mapping[str, Any]) -> inspect.Signature:
    """The signature of a class with this constructor, with ``**common`` spelled out by name and default."""
    found = inspect.signature(init)
    own = list(found.parameters.values())[1:]
    if own and own[-1].name == "common":
        own[-1:] = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Common.__annotations__[name].__forward_arg__,
            )
            for name, default in defaults.items()
            if name not in found.parameters
        ]
    return found.replace(parameters=own)
