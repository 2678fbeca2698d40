"""What every optimizer takes beside its own hyperparameters: names, defaults and documentation, in one place."""

from __future__ import annotations

import difflib
import inspect
import re
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

# Where a docstring of a class has {params}, {common} or the like in a line of its own, this is put in its place.
DOCUMENTATION = {
    "params": """
        params: parameters, named parameters, or groups; fp32, bf16 or fp16, any shape.
""",
    "beta": """
        beta: decay of the momentum, in [0, 1). Groups keep it as ``betas=(beta,)``, where schedulers find it.
""",
    "bounded_state": """
        state_dtype: how the momentum is stored: "fp32", "bf16" (rounded stochastically), or as "int8", "int4" or
            "int2" codes q that stand for q / 127, q / 7 or q. Since abs(m) <= 1 they need no scale; rounding is
            stochastic, so the stored momentum is right on average, and its variance grows: see the README for what
            beta allows. ``torch.bfloat16`` and the like are the same. A tuple gives each moment its own; with codes for
            m alone, v is bf16.
""",
    "unbounded_state": """
        state_dtype: how the momentum is stored: "fp32", "bf16" (rounded stochastically), or "int8": codes with one
            power of two for each 32 elements in memory order, rounded stochastically. The power goes down to 2^-126,
            so however small a block is, it is right on average; nothing is flushed to zero as with 16-bit scales.
            Infinities saturate at 127 times the power, NaN stays NaN. This is the one form whose bits depend on where
            a tensor's memory begins. ``torch.int8`` and the like are the same. A tuple gives each moment its own; with
            "int8" for m, others are bf16.
""",
    "common": """
        weight_decay: at least 0.
        decoupled_weight_decay: ``p *= 1 - lr * weight_decay`` before the update (True), or
            ``g += weight_decay * p`` before everything else (False).
        maximize: ascend instead of descend.
        param_storage: how a bf16 or fp16 parameter keeps what its dtype cannot hold. "nearest": rounded to nearest, so
            that steps below half its last place are lost. "stochastic": rounded up or down at random, right on average.
            "split16", "split8" (bf16 only): the low 16 bits of fp32, which makes it exact fp32 training in 4 bytes,
            or the next 8 and the rest stochastically, are kept beside it. "master": an fp32 copy is. An fp32
            parameter is its own master under "stochastic" and "master". A parameter that is set from outside wins over
            a master copy; low bits stay as they were, and are added to it.
        seed: of the random bits, in [0, 2^64). They are a function of seed, parameter, step and element, so they are
            the same on every backend and in a resumed run; no global generator is touched.
        backend: "auto", "cpu", "cuda", "triton" or "reference".
        foreach, fused, differentiable, capturable: accepted for torch.optim's sake where they ask for nothing: None or
            False, and ``foreach=True`` or ``fused=True``; the update is always fused.

    Any number may be NumPy's, or a CPU tensor of one element, which is read at every step. Groups are checked at every
    step as here, but for a learning rate that a scheduler's rounding left just below 0.

    Raises:
        TypeError, ValueError: a hyperparameter outside its range, or a parameter of another dtype or layout.
        RuntimeError: a backend that this installation cannot use.
""",
    "common_state": """
    ``step``; with split weights ``param_low``, with master weights ``master_param``. A moment in codes is a packed
    buffer, with the numbers ``..._kind``, ``..._order`` (of the dimensions in memory) and, if it is scale-free,
    ``..._levels`` beside it.
""",
}


def documented(text: str) -> str:
    """A docstring with its placeholders, each in a line of its own, filled."""
    for name, part in DOCUMENTATION.items():
        text = re.sub(rf"^ *\{{{name}\}}\n", part[1:].replace("\\", r"\\"), text, flags=re.MULTILINE)
    return text


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
