"""One row for each rule: how it is made, and what the papers say it computes.

The formulas are written from the papers, in real arithmetic, and share nothing with the package. They run on
:class:`Bounded` numbers, which carry a bound on how far fp32 arithmetic may have strayed from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import signadam_ext

UNIT = 2.0**-24  # relative error of one fp32 rounding
TINY = 2.0**-149  # absolute error of one fp32 rounding among the subnormals


@dataclass
class Bounded:
    """A float64 array and a bound on the distance of the fp32 computation that follows the same formula.

    Standard running error analysis: an operation passes on the errors of its operands and adds one rounding of its
    result. The float64 arithmetic's own error, 2^29 times smaller, is covered by the factor in ``rounded``.
    """

    value: np.ndarray
    error: np.ndarray

    @staticmethod
    def exact(value: Any) -> Bounded:
        value = np.asarray(value, dtype=np.float64)
        return Bounded(value, np.zeros_like(value))

    @staticmethod
    def scalar(value: float) -> Bounded:
        """A double that is rounded to fp32 where it meets a tensor."""
        return Bounded.rounded(np.float64(value), np.float64(0.0))

    @staticmethod
    def rounded(value: np.ndarray, error: np.ndarray) -> Bounded:
        return Bounded(value, 1.0000001 * (error + UNIT * (np.abs(value) + error) + TINY))

    def __add__(self, other: Bounded) -> Bounded:
        return Bounded.rounded(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Bounded) -> Bounded:
        return Bounded.rounded(self.value - other.value, self.error + other.error)

    def __mul__(self, other: Bounded) -> Bounded:
        error = np.abs(self.value) * other.error + np.abs(other.value) * self.error + self.error * other.error
        return Bounded.rounded(self.value * other.value, error)

    def __truediv__(self, other: Bounded) -> Bounded:
        quotient = self.value / other.value
        nearest = np.abs(other.value) - other.error
        assert (nearest > 0).all(), "a divisor that fp32 cannot tell from zero"
        return Bounded.rounded(quotient, (self.error + np.abs(quotient) * other.error) / nearest)

    def sqrt(self) -> Bounded:
        root = np.sqrt(self.value)
        # |sqrt(x) - sqrt(y)| <= min(sqrt(|x - y|), |x - y| / sqrt(x))
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.fmin(np.sqrt(self.error), self.error / root)
        return Bounded.rounded(root, error)

    def sign(self) -> Bounded:
        """Exact where the sign is certain; where it is not, wrong by 2 at the most."""
        certain = (np.abs(self.value) > self.error) | (self.error == 0)
        return Bounded(np.sign(self.value), np.where(certain, 0.0, 2.0))


def gate(g: Bounded, alpha: float) -> Bounded:
    """[SA] Sec. 4: the sign of those entries whose magnitude exceeds alpha. ``g`` and ``alpha`` are exact here."""
    return Bounded.exact(np.where(np.abs(g.value) > alpha, np.sign(g.value), 0.0))


STATE_DTYPES = ("fp32", "bf16", "int8", "int4", "int2")

State = dict[str, Bounded]
#: (p, g, state, t, hyperparameters) -> p; updates the state.
Formula = Callable[[Bounded, Bounded, State, int, dict[str, Any]], Bounded]


def sign_sgd(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """[BW] Alg. 1, with the gate."""
    return p - Bounded.scalar(h["lr"]) * gate(g, h["alpha"])


def signum(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """[BW] Alg. 2; [BH] Alg. 2."""
    beta = h["beta"]
    state["exp_avg"] = Bounded.scalar(beta) * state["exp_avg"] + Bounded.scalar(1 - beta) * g
    return p - Bounded.scalar(h["lr"]) * state["exp_avg"].sign()


def sign_adam(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """[SA] Alg. 2."""
    b1, b2 = h["betas"]
    s = Bounded.exact(np.sign(g.value))
    state["exp_avg"] = Bounded.scalar(b1) * state["exp_avg"] + Bounded.scalar(1 - b1) * s
    state["exp_avg_sq"] = Bounded.scalar(b2) * state["exp_avg_sq"] + Bounded.scalar(1 - b2) * s * s
    root = state["exp_avg_sq"].sqrt() + Bounded.scalar(h["eps"])
    return p - Bounded.scalar(h["lr"]) * state["exp_avg"] / root


def sign_adam_analytic(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """[SA] Sec. 4, with the exponent that its Alg. 2 implies."""
    b1, b2 = h["betas"]
    state["exp_avg"] = Bounded.scalar(b1) * state["exp_avg"] + Bounded.scalar(1 - b1) * Bounded.exact(np.sign(g.value))
    root = Bounded.scalar(math.sqrt(1 - b2**t) + h["eps"])
    return p - Bounded.scalar(h["lr"]) * state["exp_avg"] / root


def sign_adam_pp(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """[SA] Alg. 3 and Sec. 6.3. The deviation's own error is far below the gate's margin."""
    alpha = h["alpha"]
    if h.get("confidence", "fixed") != "fixed":
        before = state.setdefault("a", Bounded.exact(0.0)).value
        after = h["confidence_beta"] * before + (1 - h["confidence_beta"]) * np.std(g.value)
        state["a"] = Bounded.exact(after)
        alpha *= after if h["confidence"] == "adaptive" else before
        # fp32 and float64 must agree on every comparison for the formula to be followed at all.
        assert np.abs(np.abs(g.value) - alpha).min() > 1e-6 * alpha
    beta = h["beta"]
    state["exp_avg"] = Bounded.scalar(beta) * state["exp_avg"] + Bounded.scalar(1 - beta) * gate(g, alpha)
    return p - Bounded.scalar(h["lr"]) * state["exp_avg"]


@dataclass(frozen=True)
class Row:
    """A rule under test: the class, the hyperparameters of its own, the formula."""

    id: str
    optimizer: type
    hyperparameters: dict[str, Any]
    formula: Formula

    @property
    def state_dtypes(self) -> tuple[str, ...]:
        """What the rule's moments can be stored as."""
        if self.optimizer is signadam_ext.SignSGD:
            return ()
        return ("fp32", "bf16", "int8") if self.optimizer is signadam_ext.Signum else STATE_DTYPES


ADAPTIVE = {"alpha": 0.5, "beta": 0.9, "confidence_beta": 0.8}

TABLE = [
    Row("sign_sgd", signadam_ext.SignSGD, {"alpha": 0.0}, sign_sgd),
    Row("sign_sgd-gated", signadam_ext.SignSGD, {"alpha": 0.25}, sign_sgd),
    Row("signum", signadam_ext.Signum, {"beta": 0.9}, signum),
    Row("sign_adam", signadam_ext.SignAdam, {"betas": (0.9, 0.99), "eps": 1e-8}, sign_adam),
    Row(
        "sign_adam_analytic",
        signadam_ext.SignAdam,
        {"betas": (0.9, 0.99), "eps": 1e-8, "second_moment": "analytic"},
        sign_adam_analytic,
    ),
    Row("sign_adam_pp", signadam_ext.SignAdamPP, {"alpha": 0.25, "beta": 0.9}, sign_adam_pp),
    Row("sign_adam_pp-adaptive", signadam_ext.SignAdamPP, {"confidence": "adaptive", **ADAPTIVE}, sign_adam_pp),
    Row("sign_adam_pp-delayed", signadam_ext.SignAdamPP, {"confidence": "adaptive_delayed", **ADAPTIVE}, sign_adam_pp),
]
