"""Checks of values that a user hands in. Each error names the argument, its value, and what would be right."""

from __future__ import annotations

import difflib
import math
import reprlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def one_of(name: str, value: Any, allowed: Iterable[str]) -> str:
    """``value``, if it is one of ``allowed``.

    Raises:
        ValueError: otherwise, with the nearest allowed value.
    """
    allowed = list(allowed)
    if isinstance(value, str) and value in allowed:
        return value
    near = difflib.get_close_matches(value.lower(), allowed, n=1, cutoff=0.5) if isinstance(value, str) else ()
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name}={shown(value)}: must be one of {', '.join(map(repr, allowed))}{hint}")


#: Elements of a tensor that an error shows. Of a larger one torch may convert every element to show a few.
MOST_SHOWN = 16


class _Shown(reprlib.Repr):
    """A ``repr`` that ends soon, whatever lies in the value: lists that share lists unfold to any length."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxtuple = self.maxlist = self.maxdict = self.maxset = self.maxfrozenset = self.maxdeque = 8
        self.maxstring = self.maxlong = self.maxother = 200

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, Tensor):
            return repr(x) if x.numel() <= MOST_SHOWN else f"a tensor of shape {tuple(x.shape)}, {x.dtype}"
        known = next((kind for kind in (dict, list, tuple) if isinstance(x, kind)), None)
        if known is not None and type(x) is not known:  # as an OrderedDict is, whose name is shown too
            return f"{type(x).__name__}({super().repr1(known(x), level)})"
        return super().repr1(x, level)


_REPR = _Shown()


def class_name(x: object) -> str:
    """With its module, as several have optimizers of one name."""
    return f"{type(x).__module__}.{type(x).__qualname__}"


def shown(value: Any) -> str:
    """``value`` as errors show it: a tensor of many elements by its shape, and of nested values the outermost."""
    return _REPR.repr(value)


def number(
    name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = True
) -> float:
    """``value`` as a Python number, if it is a finite one in ``[low, high)``.

    Args:
        name: of the argument.
        value: a number, NumPy's included, or a CPU tensor of one element.
        low, high: the bounds.
        open_low, open_high: whether the bounds themselves are outside.

    Raises:
        TypeError: no number.
        ValueError: outside the bounds, not finite, or a tensor that would have to be waited for.
    """
    found = plain(value)
    if isinstance(found, Tensor):
        found = _item(name, found)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise TypeError(f"{name}={shown(value)}: must be a number, not {type(value).__name__}")
    above = found > low if open_low else found >= low
    below = found < high if open_high else found <= high
    if not (above and below and -sys.float_info.max <= found <= sys.float_info.max):
        brackets = "(" if open_low else "[", ")" if open_high else "]"
        least = "" if low == -math.inf else f" and {'above' if open_low else 'at least'} {low:g}"
        bounds = f"in {brackets[0]}{low:g}, {high:g}{brackets[1]}" if math.isfinite(high) else f"finite{least}"
        raise ValueError(f"{name}={shown(found)}: must be {bounds}")
    return found


def plain(value: Any) -> Any:
    """A NumPy scalar as a Python number, so that it computes and is saved as one; anything else as it is."""
    numpy = sys.modules.get("numpy")  # who has a NumPy scalar has imported it
    if numpy is None or not isinstance(value, (numpy.generic, numpy.ndarray)) or value.ndim > 0:
        return value
    if isinstance(value, numpy.ndarray):
        value = value[()]
    return float(value) if isinstance(value, numpy.floating) else value.item()


def _item(name: str, value: Tensor) -> Any:
    """The number in a tensor. Anything but a number is left to the caller."""
    if value.numel() != 1 or value.dtype == torch.bool or value.is_complex():
        raise ValueError(f"{name}={shown(value)}: a tensor {name} must hold one number")
    if value.device.type != "cpu":
        raise ValueError(
            f"{name} is a tensor on {value.device}: reading it would synchronize every step; keep it on the CPU, where "
            "schedulers update it all the same"
        )
    try:
        return value.item()
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{name} is a {type(value).__name__}, which gives no number") from error


def learning_rate(name: str, value: Any, slack: float = 0.0) -> float:
    """A learning rate of at least ``-slack``; a tensor must be able to hold what schedulers write into it."""
    if isinstance(value, Tensor) and not (value.numel() == 1 and value.is_floating_point()):
        raise ValueError(f"{name}={shown(value)}: a tensor {name} must hold one floating-point number")
    found = number(name, value, -math.inf)
    return found if found >= -slack else number(name, found, 0.0)


def max_grad_norm(name: str, value: Any) -> float | None:
    """None, or a norm above 0, which may be infinite."""
    value = plain(value)
    if value is None or (isinstance(value, float) and value == math.inf):
        return value
    try:
        return float(number(name, value, 0.0, open_low=True))
    except ValueError:
        raise ValueError(f"{name}={shown(value)}: must be above 0, or None where nothing is to be clipped") from None


def look_up(name: str, value: Any, table: Mapping[str, T]) -> T:
    """``table[value]``.

    Raises:
        ValueError: no such entry, with the nearest there is.
    """
    try:
        return table[value]
    except (KeyError, TypeError):
        one_of(name, value, table)
        raise


def flag(name: str, value: Any) -> bool:
    """``value``, if it is True or False, NumPy's included."""
    found = plain(value)
    if not isinstance(found, bool):
        raise TypeError(f"{name}={shown(value)}: must be True or False")
    return found


#: Options of torch.optim that choose between its implementations, and why one that asks for something cannot be had.
TORCH_OPTIONS = {
    "foreach": None,
    "fused": None,
    "differentiable": "the update is not recorded by autograd",
    "capturable": None,
}


def torch_option(name: str, value: Any) -> bool:
    """Whether an option of :data:`TORCH_OPTIONS` is asked for.

    Raises:
        ValueError: it cannot be had, or is no flag.
    """
    why = TORCH_OPTIONS[name]
    if value is None or value is False or (value is True and why is None):
        return bool(value)
    allowed = "None, False or True" if why is None else f"None or False; {why}"
    raise ValueError(f"{name}={shown(value)}: must be {allowed}")


def seed(name: str, value: Any) -> int:
    """``value`` as a Python integer, if it is one in [0, 2^64): a number, NumPy's included, or a tensor of one."""
    found = plain(value)
    if isinstance(found, Tensor):
        found = _item(name, found)
    if isinstance(found, bool) or not isinstance(found, int):
        raise TypeError(f"{name}={shown(value)}: must be an integer, not {type(value).__name__}")
    if not 0 <= found < 1 << 64:
        raise ValueError(f"{name}={shown(found)}: must be in [0, 2^64)")
    return found


#: The most steps that a count can hold exactly, as float64.
MOST_STEPS = 1 << 53


def steps_taken(label: str, value: Any) -> int:
    """A number of steps taken, as a Python integer.

    Args:
        label: what errors call the parameter.
        value: a number, or a tensor of one element.

    Raises:
        TypeError: something else.
        ValueError: a count that no training reaches: negative, fractional, 2^53 and above, not finite.
    """
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else plain(value)
    said = f"state 'step' of {label} is {shown(value)}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{said}: must be the number of steps taken")
    if not 0 <= value < MOST_STEPS or value != int(value):
        raise ValueError(f"{said}: must be the number of steps taken, a whole number in [0, 2^53)")
    return int(value)


def whole_number(label: str, value: Any) -> int:
    """``value`` as a Python integer, where a checkpoint may have made a tensor or a NumPy scalar of one.

    Raises:
        TypeError: something else.
    """
    found = value.item() if isinstance(value, Tensor) and value.numel() == 1 else plain(value)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or found != found or found != found // 1:
        raise TypeError(f"{label} is {shown(value)}: must be a whole number")
    return int(found)
