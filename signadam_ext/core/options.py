"""What every optimizer takes beside its own hyperparameters: names and defaults, in one place."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias, TypedDict

import torch

from . import checks, modifiers
from .renamed import NAMES, names_today

LrScale: TypeAlias = "str | float | Callable[[str | None, tuple[int, ...]], float]"
StateDtype: TypeAlias = "str | torch.dtype | tuple[str | torch.dtype, ...]"


class OtherOptions(TypedDict, total=False):
    """What every class takes beside what it names: modifiers of its step, and what code written for torch.optim passes,
    which is taken as long as it asks for nothing."""

    weight_decay_kind: str | None
    weight_decay_scale: str
    lr_scale: LrScale
    caution: str | None
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
    **modifiers.DEFAULTS,
    "maximize": False,
    "max_grad_norm": None,
    "state_dtype": "fp32",
    "param_storage": "nearest",
    "seed": 0,
    "backend": "auto",
}
COMMON = frozenset(DEFAULTS)
#: What a group keeps of its learning rate: as it was when the group was added, and the largest so far.
LARGEST_RATES = ("base_lr", "largest_lr")
TORCH_OPTIONS: dict[str, Any] = dict.fromkeys(checks.TORCH_OPTIONS)
#: What no class names, by its default and its type.
OTHERS: dict[str, Any] = {**modifiers.DEFAULTS, **TORCH_OPTIONS}
#: What other optimizers call an argument, and what it may be here.
_GUESSES = {
    "momentum": ("beta", "betas"),
    "beta1": ("beta", "betas"),
    "threshold": ("alpha", "epsilon"),
}
_ANNOTATIONS = {
    **dict.fromkeys(("weight_decay_kind", "caution"), "str | None"),
    "weight_decay_scale": "str",
    "lr_scale": "LrScale",
}


def has_one_beta(arguments: Mapping[str, Any]) -> bool:
    """Whether a constructor has put its ``beta`` among these, as the only one of ``betas``."""
    betas = arguments.get("betas")  # of a constructor that takes them, not checked yet
    return isinstance(betas, (tuple, list)) and len(betas) == 1


def completed(
    name: str, given: Mapping[str, Any], others: Mapping[str, Any], kept: Collection[str] = ()
) -> dict[str, Any]:
    """The arguments of a constructor with those beside its own, by today's names.

    Args:
        name: the class's.
        given: the constructor's own, and what its groups keep beside them.
        others: those beside them.
        kept: names among ``given`` that are no arguments.

    Raises:
        TypeError: a name that no argument has, or has had; or one given under both names.
        ValueError: an ``lr_scale`` that is a number other than 1.
    """
    for key in others:
        if key not in OTHERS and key not in NAMES:
            betas = "beta" if has_one_beta(given) else "betas"
            names = [betas if own == "betas" else own for own in (*given, *OTHERS) if own not in kept]
            guessed = [own for own in _GUESSES.get(key, ()) if own in names]
            near = guessed or difflib.get_close_matches(key, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{name}() got an unexpected keyword argument {key!r}{hint}")
    if "lr_scale" in others:
        others = {**others, "lr_scale": modifiers.constructed_lr_scale(others["lr_scale"])}
    renamed = {NAMES[old] for old in others if old in NAMES}
    # A default stands in nobody's way.
    explicit = {key: value for key, value in given.items() if key not in renamed or value != DEFAULTS[key]}
    return names_today({**OTHERS, **explicit, **others})


def signature(init: Any) -> inspect.Signature:
    """The signature of a class with this constructor, with ``**others`` spelled out."""
    found = inspect.signature(init)
    own = list(found.parameters.values())[1:]
    if own and own[-1].kind is inspect.Parameter.VAR_KEYWORD:
        own[-1:] = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=_ANNOTATIONS.get(name, "bool | None"),
            )
            for name, default in OTHERS.items()
        ]
    return found.replace(parameters=own)
