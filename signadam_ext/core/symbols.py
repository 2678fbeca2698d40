"""Arithmetic of the rules' formulas of scalars, on numbers, and on symbols, which record it.

A rule's formulas (:attr:`signadam_ext.core.rule.Rule.scalars`) are written once. On numbers they make the scalars of a
step; on symbols the program from which a device makes them (:mod:`signadam_ext.core.program`). So they use the
operators ``+ - * /`` and the functions of this module, all of which have the same bits in doubles everywhere, and they
do not branch on the value of a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias


class Recorder(Protocol):
    """What notes down the operations on its symbols."""

    def record(self, operation: str, *operands: Symbol | float) -> Symbol: ...
    def made_by_host(self, function: Callable[[float], float], operand: Symbol) -> Symbol: ...


class Symbol:
    """A number of a program that is being recorded: an entry of its ``recorder``, by its index.

    Raises:
        TypeError: where a formula compares or converts it, which a program cannot.
    """

    __slots__ = ("index", "recorder")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, recorder: Recorder, index: int) -> None:
        self.recorder = recorder
        self.index = index

    def __add__(self, other: Operand) -> Symbol:
        return self.recorder.record("add", self, other)

    def __radd__(self, other: Operand) -> Symbol:
        return self.recorder.record("add", other, self)

    def __sub__(self, other: Operand) -> Symbol:
        return self.recorder.record("subtract", self, other)

    def __rsub__(self, other: Operand) -> Symbol:
        return self.recorder.record("subtract", other, self)

    def __mul__(self, other: Operand) -> Symbol:
        return self.recorder.record("multiply", self, other)

    def __rmul__(self, other: Operand) -> Symbol:
        return self.recorder.record("multiply", other, self)

    def __truediv__(self, other: Operand) -> Symbol:
        return self.recorder.record("divide", self, other)

    def __rtruediv__(self, other: Operand) -> Symbol:
        return self.recorder.record("divide", other, self)

    def __neg__(self) -> Symbol:
        return self.recorder.record("negate", self)

    def __bool__(self) -> bool:
        raise TypeError("a formula of scalars must not branch on the value of a hyperparameter")

    def __eq__(self, other: object) -> bool:
        raise TypeError("a formula of scalars must not compare a hyperparameter: use is_nonzero or at_least")


Operand: TypeAlias = "float | Symbol"


def number(x: Any) -> Any:
    """``float(x)``, or a symbol as it is."""
    return x if type(x) is float or isinstance(x, Symbol) else float(x)


def power(base: Any, exponent: Any) -> Any:
    """``base ** exponent`` by repeated squaring in double: the same bits on every platform, unlike libm's ``pow``.

    The exponent is a whole number, at least 0.
    """
    if isinstance(exponent, Symbol):
        return exponent.recorder.record("power", base, exponent)
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def square_root(x: Any) -> Any:
    """The root, correctly rounded."""
    return x.recorder.record("square_root", x) if isinstance(x, Symbol) else math.sqrt(x)


def at_least(x: Any, low: float) -> Any:
    """``x``, or ``low`` where that is larger."""
    return x.recorder.record("at_least", x, low) if isinstance(x, Symbol) else max(x, low)


def logarithm(x: Any) -> Any:
    """The natural logarithm of a number that is at least 1, by operations that have the same bits everywhere.

    Halvings, which are exact, bring it below 2; then the series of the inverse hyperbolic tangent of
    ``(x - 1) / (x + 1)``, which is below a third. The error is below 3 units in the last place.
    """
    if isinstance(x, Symbol):
        return x.recorder.record("logarithm", x)
    x, halvings = float(x), 0.0
    while x >= 2.0 and halvings < 1024.0:
        x, halvings = x * 0.5, halvings + 1.0
    z = (x - 1.0) / (x + 1.0)
    square, series = z * z, 0.0
    for k in range(35, 0, -2):
        series = 1.0 / k + square * series
    return halvings * 0.6931471805599453 + 2.0 * z * series


def exponential(x: Any) -> Any:
    """``e ** x`` for ``|x| <= 32``, by operations that have the same bits everywhere.

    Of a 32nd of it by its series, then by squaring. The error is below 1e-13 of the result.
    """
    found = _series(x * 2.0**-5)
    for _ in range(5):
        found = found * found
    return found


def _series(x: Any) -> Any:
    """``e ** x`` for ``|x| <= 1``, as csrc/core/threshold.h has it."""
    if isinstance(x, Symbol):
        return x.recorder.record("exponential", x)
    total = 1.0
    for k in range(18, 0, -1):
        total = 1.0 + x * total / k
    return total


def is_nonzero(x: Any) -> Any:
    """1.0 or 0.0."""
    return x.recorder.record("is_nonzero", x) if isinstance(x, Symbol) else float(x != 0)


def made_by_host(function: Callable[[float], float], x: Any) -> Any:
    """``function(x)`` of a hyperparameter itself, where it takes more than a program has: the host hands it in."""
    return x.recorder.made_by_host(function, x) if isinstance(x, Symbol) else function(x)
