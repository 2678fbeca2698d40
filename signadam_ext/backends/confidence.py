"""Confidence functions of the user's own [SA, Alg. 1]: which backend can run one, and what it must return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Confidence = Callable[..., Any]


def is_triton(function: Confidence) -> bool:
    """Whether ``function`` is a ``@triton.jit`` function, compiled or interpreted."""
    return type(function).__module__.partition(".")[0] == "triton"


def name_of(function: Confidence) -> str:
    return str(getattr(function, "__name__", None) or type(function).__name__)


def backend_for(function: Confidence, wanted: str) -> str:
    """The backend that runs ``function``: Triton's own on "triton", others on the reference, also for "cpu".

    Raises:
        ValueError: a backend that cannot run it.
    """
    runs = "triton" if is_triton(function) else "reference"
    allowed = ("auto", "triton") if is_triton(function) else ("auto", "cpu", "reference")
    if wanted not in allowed:
        kind = "a @triton.jit function" if is_triton(function) else "a Python function"
        raise ValueError(
            f"backend={wanted!r} cannot run confidence={name_of(function)}, {kind}: use backend="
            + " or ".join(map(repr, allowed))
        )
    return runs


def check_result(function: Confidence, g: Tensor, c: Any) -> None:
    """Raises unless ``c`` can be what ``function`` made of the gradient ``g``.

    Raises:
        TypeError: not a float32 tensor on the gradient's device.
        ValueError: another shape, or NaN where the gradient is a number.
    """
    label = f"confidence={name_of(function)}"
    if not isinstance(c, Tensor) or c.dtype != torch.float32 or c.device != g.device:
        found = f"{c.dtype} on {c.device}" if isinstance(c, Tensor) else type(c).__name__
        raise TypeError(f"{label} returned {found}: must return a float32 tensor on {g.device}")
    if c.shape != g.shape:
        raise ValueError(f"{label} returned shape {tuple(c.shape)} for a gradient of shape {tuple(g.shape)}")
    wrong = c.isnan() & ~g.isnan()
    if bool(wrong.any()):
        raise ValueError(f"{label} returned NaN for a gradient entry of {g[wrong][0].item()!r}")
