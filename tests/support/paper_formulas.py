"""One row for each rule: how it is made, and what the papers say it computes.

The formulas are written from the papers, in real arithmetic, and share nothing with the package. They run on
:class:`Bounded` numbers, which carry a bound on how far fp32 arithmetic may have strayed from them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import signadam_ext
from signadam_ext.core.formats import BOUNDED, UNBOUNDED

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

    def positive(self) -> Bounded:
        """The larger of it and 0."""
        return Bounded(np.maximum(self.value, 0.0), self.error)

    def where(self, condition: np.ndarray, other: Bounded) -> Bounded:
        return Bounded(np.where(condition, self.value, other.value), np.where(condition, self.error, other.error))

    def largest(self, other: Bounded) -> Bounded:
        """Of the two. Which one fp32 takes does not matter where either is within its error of the other."""
        return Bounded(np.maximum(self.value, other.value), np.maximum(self.error, other.error))

    def sign(self) -> Bounded:
        """Exact where the sign is certain; where it is not, wrong by 2 at the most."""
        certain = (np.abs(self.value) > self.error) | (self.error == 0)
        return Bounded(np.sign(self.value), np.where(certain, 0.0, 2.0))

    def magnitude(self) -> Bounded:
        return Bounded(np.abs(self.value), self.error)


def gated_sign(g: Bounded, alpha: float) -> Bounded:
    """[SA] Sec. 4: the sign of those entries whose magnitude exceeds alpha. ``g`` and ``alpha`` are exact here."""
    return Bounded.exact(np.where(np.abs(g.value) > alpha, np.sign(g.value), 0.0))


State = dict[str, Bounded]
#: (p, g, state, t, hyperparameters) -> p; updates the state.
Formula = Callable[[Bounded, Bounded, State, int, dict[str, Any]], Bounded]


def sign_sgd(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """[BW] Alg. 1, with the gate."""
    return p - Bounded.scalar(h["lr"]) * gated_sign(g, h["alpha"])


def signum(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """[BW] Alg. 2; [BH] Alg. 2."""
    beta = h["beta"]
    state["exp_avg"] = Bounded.scalar(beta) * state["exp_avg"] + Bounded.scalar(1 - beta) * g
    return p - Bounded.scalar(h["lr"]) * state["exp_avg"].sign()


def signum_nesterov(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """NVIDIA's Emerging-Optimizers. It is computed as a blend of the old momentum and the gradient."""
    b, m = h["beta"], state["exp_avg"]
    state["exp_avg"] = new = Bounded.scalar(b) * m + Bounded.scalar(1 - b) * g
    ahead, now = b / (1 - b ** (t + 1)), (1 - b) / (1 - b**t)
    u = Bounded.scalar(ahead * b) * m + Bounded.scalar(ahead * (1 - b) + now) * g
    assert np.allclose(u.value, ahead * new.value + now * g.value, rtol=1e-9, atol=0)
    return p - Bounded.scalar(h["lr"]) * u.sign()


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
    state["exp_avg"] = Bounded.scalar(beta) * state["exp_avg"] + Bounded.scalar(1 - beta) * gated_sign(g, alpha)
    return p - Bounded.scalar(h["lr"]) * state["exp_avg"]


def msgd(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """[BH] Sec. 6, without bias correction."""
    beta = h["beta"]
    state["exp_avg"] = Bounded.scalar(beta) * state["exp_avg"] + Bounded.scalar(1 - beta) * g
    return p - Bounded.scalar(h["lr"]) * state["exp_avg"]


def mean_and_variance(g: Bounded, state: State, t: int, h: dict[str, Any]) -> tuple[Bounded, Bounded, float]:
    """[BH] Eq. 9 to 11: bias-corrected mean, estimated variance, and rho."""
    b = h["beta"]
    for name, x in (("exp_avg", Bounded.exact(1.0)), ("exp_avg_sq", g)):
        state[name] = Bounded.scalar(b) * state[name] + Bounded.scalar(1 - b) * g * x
    m, v = (state[name] / Bounded.scalar(1 - b**t) for name in ("exp_avg", "exp_avg_sq"))
    rho = (1 - b) * (1 + b**t) / ((1 + b) * (1 - b**t))
    variance = (v - m * m).positive()
    if h.get("bias_correct_variance", True):
        variance = variance / Bounded.scalar(1 - rho) if t > 1 and b > 0 else Bounded.exact(np.zeros(g.value.shape))
    return m, variance, rho


def svag(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """[BH] Alg. 3."""
    m, variance, _ = mean_and_variance(g, state, t, h)
    return p - Bounded.scalar(h["lr"]) * (m * m / (m * m + variance)) * g


def msvag(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """[BH] Alg. 1."""
    m, variance, rho = mean_and_variance(g, state, t, h)
    return p - Bounded.scalar(h["lr"]) * (m * m / (m * m + Bounded.scalar(rho) * variance)) * m


def adam_star(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """[BH] Alg. 4."""
    m, variance, rho = mean_and_variance(g, state, t, h)
    return p - Bounded.scalar(h["lr"]) * m / (m * m + Bounded.scalar(rho) * variance).sqrt()


def adam_star_plain(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """[BH] App. C.3."""
    m, variance, _ = mean_and_variance(g, state, t, h)
    size = Bounded(np.abs(m.value), m.error)
    return p - Bounded.scalar(h["lr"]) * Bounded.exact(np.sign(g.value)) * size / (m * m + variance).sqrt()


def sums_of_minibatch(g: Bounded, state: State, h: dict[str, Any]) -> tuple[Bounded, Bounded]:
    """[BH0] Alg. 3 and 5: momentum and the sum of variances."""
    mu = h["beta"]
    state["momentum_buffer"] = Bounded.scalar(mu) * state["momentum_buffer"] + g
    state["exp_avg_var"] = Bounded.scalar(mu * mu) * state["exp_avg_var"] + h["grad_variance"]
    return state["momentum_buffer"], state["exp_avg_var"]


def msvag_minibatch(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """[BH0] Alg. 3."""
    m, variance = sums_of_minibatch(g, state, h)
    return p - Bounded.scalar(h["lr"]) * (m * m / (m * m + variance)) * m


def adam_star_minibatch(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """[BH0] Alg. 5."""
    m, variance = sums_of_minibatch(g, state, h)
    return p - Bounded.scalar(h["lr"]) * m / (m * m + variance).sqrt()


def adam(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """[KB] Alg. 1; with amsgrad Reddi et al., Alg. 2, bias-corrected as torch does."""
    b1, b2 = h["betas"]
    state["exp_avg"] = Bounded.scalar(b1) * state["exp_avg"] + Bounded.scalar(1 - b1) * g
    state["exp_avg_sq"] = v = Bounded.scalar(b2) * state["exp_avg_sq"] + Bounded.scalar(1 - b2) * g * g
    if h.get("amsgrad"):
        state["max_exp_avg_sq"] = v = state["max_exp_avg_sq"].largest(v)
    root = v.sqrt() / Bounded.scalar(math.sqrt(1 - b2**t)) + Bounded.scalar(h["eps"])
    return p - Bounded.scalar(h["lr"] / (1 - b1**t)) * state["exp_avg"] / root


def lion(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """[LI] Alg. 2."""
    b1, b2 = h["betas"]
    u = Bounded.scalar(b1) * state["exp_avg"] + Bounded.scalar(1 - b1) * g
    state["exp_avg"] = Bounded.scalar(b2) * state["exp_avg"] + Bounded.scalar(1 - b2) * g
    return p - Bounded.scalar(h["lr"]) * u.sign()


def adam_s(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """Zhang, Wang and Chen, arXiv 2505.16363: v of the old momentum."""
    b1, b2 = h["betas"]
    m = state["exp_avg"]
    v = Bounded.scalar(b2) * m * m + Bounded.scalar(1 - b2) * g * g
    state["exp_avg"] = m = Bounded.scalar(b1) * m + Bounded.scalar(1 - b1) * g
    return p - Bounded.scalar(h["lr"]) * m / (v.sqrt() + Bounded.scalar(h["eps"]))


def bcos(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """Jiang and Xiao, arXiv 2507.08963. The momentum begins as the first gradient."""
    b = h["beta"]
    m = g if t == 1 else state["exp_avg"]
    if h["simple"]:
        weight, rest = (0.0, 1.0) if t == 1 else (1 - (1 - b) ** 2, (1 - b) ** 2)
        v = Bounded.scalar(weight) * m * m + Bounded.scalar(rest) * g * g
    elif t == 1:
        v = g * g
    else:
        # What is computed is a sum of squares, equal to what is printed.
        printed = (
            (3 * b**2 - 2 * b**3) * m.value**2 + (1 - b) ** 2 * g.value**2 + 2 * b * (1 - b) ** 2 * m.value * g.value
        )
        ahead = g + Bounded.scalar(b) * m
        v = Bounded.scalar(b**2 * (2 - b**2)) * m * m + Bounded.scalar((1 - b) ** 2) * ahead * ahead
        assert np.allclose(v.value, printed, rtol=1e-12, atol=0)
    state["exp_avg"] = m = g if t == 1 else Bounded.scalar(b) * m + Bounded.scalar(1 - b) * g
    return p - Bounded.scalar(h["lr"]) * m / (v.sqrt() + Bounded.scalar(h["eps"]))


def lion_k(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """Chen et al., arXiv 2310.05898, with three functions K."""
    b1, b2 = h["betas"]
    u = Bounded.scalar(b1) * state["exp_avg"] + Bounded.scalar(1 - b1) * g
    state["exp_avg"] = Bounded.scalar(b2) * state["exp_avg"] + Bounded.scalar(1 - b2) * g
    size, bend = u.magnitude(), Bounded.scalar(h["epsilon"])
    # No entry is so near the bend that fp32 might take it for one of the other side.
    assert (np.abs(size.value - bend.value) > size.error + bend.error).all()
    inside = size.value < bend.value
    if h["kappa"] == "threshold":
        slope = Bounded.exact(np.where(inside, 0.0, np.sign(u.value)))
    elif h["kappa"] == "huber":
        slope = (u / bend).where(inside, u.sign())
    else:
        slope = u / (bend + size)
    return p - Bounded.scalar(h["lr"]) * slope


def mars_lion(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """Yuan et al., arXiv 2411.10438, as Lion with other betas; test_one_moment.py has its equations."""
    return lion(p, g, state, t, {**h, "betas": (h["beta"] * (1 - h["gamma"]), h["beta"])})


def ano(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """Kegreisz, arXiv 2508.18258, eps under the root; Anolog where one beta is given."""
    b1, b2 = h["betas"] if "betas" in h else (1 - 1 / math.log(t + 2), h["beta2"])
    m, v, square = state["exp_avg"], state["exp_avg_sq"], g * g
    state["exp_avg"] = m = Bounded.scalar(b1) * m + Bounded.scalar(1 - b1) * g
    state["exp_avg_sq"] = v = Bounded.scalar(b2) * v + Bounded.scalar(1 - b2) * (square - v).sign() * square
    # The bias correction of v, moved into the learning rate and eps.
    size = Bounded.scalar(h["lr"] * math.sqrt(1 - b2**t)) * g.magnitude()
    return p - size / (v + Bounded.scalar(h["eps"] * (1 - b2**t))).sqrt() * m.sign()


def grams(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """Cao, Li and Song, arXiv 2412.17107, eps as in their code."""
    b1, b2 = h["betas"]
    state["exp_avg"] = m = Bounded.scalar(b1) * state["exp_avg"] + Bounded.scalar(1 - b1) * g
    state["exp_avg_sq"] = v = Bounded.scalar(b2) * state["exp_avg_sq"] + Bounded.scalar(1 - b2) * g * g
    lr = Bounded.scalar(h["lr"] * math.sqrt(1 - b2**t) / (1 - b1**t))
    return p - lr * m.magnitude() / (v.sqrt() + Bounded.scalar(h["eps"])) * g.sign()


def ada_momentum(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """Wang et al., arXiv 2106.11514."""
    b1, b2 = h["betas"]
    state["exp_avg"] = m = Bounded.scalar(b1) * state["exp_avg"] + Bounded.scalar(1 - b1) * g
    v = Bounded.scalar(b2) * state["exp_avg_sq"] + Bounded.scalar(1 - b2) * m * m + Bounded.scalar(h["eps"])
    state["exp_avg_sq"] = v
    return p - Bounded.scalar(h["lr"] * math.sqrt(1 - b2**t) / (1 - b1**t)) * m / v.sqrt()


def laprop(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """[LP] Alg. 1."""
    b1, b2 = h["betas"]
    state["exp_avg_sq"] = v = Bounded.scalar(b2) * state["exp_avg_sq"] + Bounded.scalar(1 - b2) * g * g
    normalized = g / ((v / Bounded.scalar(1 - b2**t)).sqrt() + Bounded.scalar(h["eps"]))
    state["exp_avg"] = Bounded.scalar(b1) * state["exp_avg"] + Bounded.scalar(1 - b1) * normalized
    return p - Bounded.scalar(h["lr"] / (1 - b1**t)) * state["exp_avg"]


def adopt(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """[AD] Alg. 2, with the clipping that its authors recommend."""
    b1, b2 = h["betas"]
    v, limit = state["exp_avg_sq"], (t - 1) ** 0.25 if h["clip"] else np.inf
    if t == 1:
        state["exp_avg_sq"] = g * g
        return p
    n = g / v.sqrt().largest(Bounded.scalar(h["eps"]))
    # Which of the two fp32 takes does not matter where they are within an error of each other.
    n = n.where(np.abs(n.value) < limit, Bounded(np.clip(n.value, -limit, limit), n.error + UNIT * limit))
    state["exp_avg"] = Bounded.scalar(b1) * state["exp_avg"] + Bounded.scalar(1 - b1) * n
    state["exp_avg_sq"] = Bounded.scalar(b2) * v + Bounded.scalar(1 - b2) * g * g
    return p - Bounded.scalar(h["lr"]) * state["exp_avg"]


def ada_bound(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any], *, largest: bool = False) -> Bounded:
    """[LX] Alg. 2, bias-corrected as in the authors' code, and not divided by the root of t."""
    b1, b2 = h["betas"]
    state["exp_avg"] = Bounded.scalar(b1) * state["exp_avg"] + Bounded.scalar(1 - b1) * g
    state["exp_avg_sq"] = v = Bounded.scalar(b2) * state["exp_avg_sq"] + Bounded.scalar(1 - b2) * g * g
    if largest:
        state["max_exp_avg_sq"] = v = state["max_exp_avg_sq"].largest(v)
    rate = Bounded.scalar(h["lr"] * math.sqrt(1 - b2**t) / (1 - b1**t)) / (v.sqrt() + Bounded.scalar(h["eps"]))
    lower, upper = (
        Bounded.scalar(h["final_lr"] * (1 + sign / (h["gamma"] * t + nought))) for sign, nought in ((-1, 1), (1, 0))
    )
    # A bound that fp32 crosses and real arithmetic does not, or the reverse, is within the error of the rate.
    rate = rate.where(rate.value > lower.value, Bounded(lower.value, lower.error + rate.error))
    rate = rate.where(rate.value < upper.value, Bounded(upper.value, upper.error + rate.error))
    return p - rate * state["exp_avg"]


ams_bound = functools.partial(ada_bound, largest=True)


def ademamix(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """[PA] Alg. 1, with its schedules of alpha and beta3."""
    b1, b2, b3 = h["betas"]
    alpha = h["alpha"] * min(1.0, t / h["t_alpha"]) if h["t_alpha"] else h["alpha"]
    if h["t_beta3"] and t < h["t_beta3"]:
        half_lives = [math.log(0.5) / math.log(b + 1e-8) - 1 for b in (b1, b3)]
        share = t / h["t_beta3"]
        b3 = 0.5 ** (1 / ((1 - share) * half_lives[0] + share * half_lives[1] + 1))
    for name, b, x in (
        ("exp_avg", b1, Bounded.exact(1.0)),
        ("exp_avg_sq", b2, g),
        ("exp_avg_slow", b3, Bounded.exact(1.0)),
    ):
        state[name] = Bounded.scalar(b) * state[name] + Bounded.scalar(1 - b) * g * x
    root = state["exp_avg_sq"].sqrt() / Bounded.scalar(math.sqrt(1 - b2**t)) + Bounded.scalar(h["eps"])
    fast = Bounded.scalar(h["lr"] / (1 - b1**t)) * state["exp_avg"]
    return p - (fast + Bounded.scalar(h["lr"] * alpha) * state["exp_avg_slow"]) / root


def averaging(t: int, h: dict[str, Any]) -> tuple[float, float]:
    """[SF] Alg. 1 as its authors weigh: the learning rate with its warm-up, and the weight of z in x."""
    warmup = h.get("warmup_steps", 0)
    rates = [h["lr"] * (min(1.0, s / warmup) if warmup else 1.0) for s in range(1, t + 1)]
    weights = [s ** h.get("r", 0.0) * rate ** h.get("weight_lr_power", 2.0) for s, rate in enumerate(rates, 1)]
    return rates[-1], weights[-1] / sum(weights)


def schedule_free(
    p: Bounded, step: Bounded, beta: float, lr: float, c: float, state: State, h: dict[str, Any]
) -> Bounded:
    """[SF] Alg. 1 without x, which is kept beside it as a check. ``step`` comes times the learning rate."""
    first = "x" not in state
    z, x = (p, p.value) if first else (state["z"], state["x"].value)
    step = step + Bounded.scalar(lr * h.get("weight_decay", 0.0)) * p
    state["z"] = z - step
    state["x"] = Bounded.exact((1 - c) * x + c * state["z"].value)
    between = Bounded.rounded(z.value - p.value, np.float64(0.0))
    move = Bounded.scalar(c) * between - Bounded.scalar(1 - beta * (1 - c)) * step
    # What p and z have strayed by is averaged as they are.
    y = Bounded.rounded(p.value + move.value, (1 - c) * p.error + c * z.error + move.error)
    assert np.allclose(y.value, (1 - beta) * state["z"].value + beta * state["x"].value, rtol=1e-9, atol=1e-12)
    return y


def schedule_free_adamw(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """[SF] Alg. 1 with Adam's second moment."""
    b1, b2 = h["betas"]
    lr, c = averaging(t, h)
    state["exp_avg_sq"] = v = Bounded.scalar(b2) * state["exp_avg_sq"] + Bounded.scalar(1 - b2) * g * g
    correction = math.sqrt(1 - b2**t)
    step = Bounded.scalar(lr * correction) * g / (v.sqrt() + Bounded.scalar(h["eps"] * correction))
    return schedule_free(p, step, b1, lr, c, state, h)


def schedule_free_sign(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """[SF] Alg. 1 with the gated sign."""
    lr, c = averaging(t, h)
    return schedule_free(p, Bounded.scalar(lr) * gated_sign(g, h["alpha"]), h["beta"], lr, c, state, h)


def focus(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """[FO] Alg. 1, whose average is a sum over 1 - b2^t here. The pull of the first step is 0, not its rounding."""
    b1, b2 = h["betas"]
    state["exp_avg"] = m = Bounded.scalar(b1) * state["exp_avg"] + Bounded.scalar(1 - b1) * g
    first = "sum" not in state
    last = p if first else state["param_avg"]
    weighed = b2 * (np.float64(0.0) if first else state["sum"].value) + (1 - b2) * p.value
    state["sum"] = Bounded.exact(weighed)
    average = last + Bounded.scalar((1 - b2) / (1 - b2**t)) * (p - last)
    # What weights have strayed by is averaged as they are.
    assert np.allclose(weighed / (1 - b2**t), average.value, rtol=1e-9, atol=1e-12)
    state["param_avg"] = average
    pull = Bounded.exact(np.zeros_like(p.value)) if first else (p - average).sign()
    step = Bounded.scalar(h["lr"]) * m.sign() + Bounded.scalar(h["lr"] * h["gamma"]) * pull
    return p - (step + Bounded.scalar(h["lr"] * h.get("weight_decay", 0.0)) * average)


def mars_adamw(p: Bounded, g: Bounded, state: State, t: int, h: dict[str, Any]) -> Bounded:
    """[MA] Alg. 2, with clipping where ``max_norm`` says so."""
    b1, b2 = h["betas"]
    c = g + Bounded.scalar(h["gamma"] * b1 / (1 - b1)) * (g - state["last_grad"])
    if h["max_norm"] is not None:
        norm, error = np.linalg.norm(c.value), np.linalg.norm(c.error)
        longer = Bounded.rounded(np.float64(norm / h["max_norm"]), np.float64(error / h["max_norm"]))
        assert abs(longer.value - 1) > longer.error
        c = c * (Bounded.exact(1.0) / longer) if longer.value > 1 else c
    state["exp_avg"] = m = Bounded.scalar(b1) * state["exp_avg"] + Bounded.scalar(1 - b1) * c
    state["exp_avg_sq"] = v = Bounded.scalar(b2) * state["exp_avg_sq"] + Bounded.scalar(1 - b2) * c * c
    state["last_grad"] = g
    correction = math.sqrt(1 - b2**t)
    lr = Bounded.scalar(h["lr"] * correction / (1 - b1**t))
    return p - lr * m / (v.sqrt() + Bounded.scalar(h["eps"] * correction))


@dataclass(frozen=True)
class Row:
    """A rule under test: the class, the hyperparameters of its own, the formula.

    Attributes:
        like: the row whose kernels serve it, with other scalars: what tests of kernels alone leave out.
    """

    id: str
    optimizer: type
    hyperparameters: dict[str, Any]
    formula: Formula
    moves_at_first: bool = True  # and decays; otherwise the first step only makes state
    largest_beta2: float = 1.0  # up to which its momentum has a bound that codes can use
    like: str = ""

    @property
    def state_dtypes(self) -> tuple[str, ...]:
        """What the rule's moments can be stored as."""
        if self.optimizer in (signadam_ext.SignSGD, signadam_ext.ScheduleFreeSign):
            return ()
        if self.hyperparameters.get("amsgrad") or self.optimizer in (
            signadam_ext.AMSBound,
            signadam_ext.ScheduleFreeAdamW,
            signadam_ext.FOCUS,
        ):
            return ("fp32", "bf16")
        bounded = self.optimizer in (signadam_ext.SignAdam, signadam_ext.SignAdamPP) or self.largest_beta2 < 1
        return tuple(BOUNDED if bounded else UNBOUNDED)

    @property
    def reads_param(self) -> bool:
        """Whether its step depends on the parameter, and weight decay is part of it."""
        return self.optimizer in (signadam_ext.ScheduleFreeAdamW, signadam_ext.ScheduleFreeSign, signadam_ext.FOCUS)

    @property
    def reads_variance(self) -> bool:
        """Whether it takes ``param.grad_variance``."""
        return self.hyperparameters.get("variance") == "minibatch"


ADAPTIVE = {"alpha": 0.5, "beta": 0.9, "confidence_beta": 0.8}

BOUNDS = {"betas": (0.9, 0.99), "final_lr": 0.1, "eps": 1e-8}

TABLE = [
    Row("sign_sgd", signadam_ext.SignSGD, {"alpha": 0.0}, sign_sgd),
    Row("sign_sgd-gated", signadam_ext.SignSGD, {"alpha": 0.25}, sign_sgd),
    Row("signum", signadam_ext.Signum, {"beta": 0.9}, signum),
    Row("signum-nesterov", signadam_ext.Signum, {"beta": 0.9, "nesterov": True}, signum_nesterov, like="lion"),
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
    Row("msgd", signadam_ext.MSGD, {"beta": 0.9}, msgd),
    Row("svag", signadam_ext.SVAG, {"beta": 0.9}, svag),
    Row("msvag", signadam_ext.MSVAG, {"beta": 0.9}, msvag),
    Row("msvag-draft", signadam_ext.MSVAG, {"beta": 0.9, "bias_correct_variance": False}, msvag),
    Row("adam_star", signadam_ext.AdamStar, {"beta": 0.9}, adam_star),
    Row("adam_star_plain", signadam_ext.AdamStar, {"beta": 0.9, "momentum": False}, adam_star_plain),
    Row("msvag_minibatch", signadam_ext.MSVAG, {"beta": 0.9, "variance": "minibatch"}, msvag_minibatch),
    Row("adam_star_minibatch", signadam_ext.AdamStar, {"beta": 0.9, "variance": "minibatch"}, adam_star_minibatch),
    Row("adam", signadam_ext.Adam, {"betas": (0.9, 0.99), "eps": 1e-8}, adam),
    Row("adam_amsgrad", signadam_ext.AdamW, {"betas": (0.9, 0.99), "eps": 1e-8, "amsgrad": True}, adam),
    Row("lion", signadam_ext.Lion, {"betas": (0.9, 0.99)}, lion),
    Row("adam_s", signadam_ext.AdamS, {"betas": (0.9, 0.95), "eps": 1e-8}, adam_s),
    Row("bcos", signadam_ext.BCOS, {"beta": 0.9, "eps": 1e-6, "simple": False}, bcos),
    Row("bcos-simple", signadam_ext.BCOS, {"beta": 0.9, "eps": 1e-6, "simple": True}, bcos, like="adam_s"),
    *(
        Row(f"lion_{kappa}", signadam_ext.LionK, {"betas": (0.9, 0.99), "kappa": kappa, "epsilon": 0.125}, lion_k)
        for kappa in ("threshold", "huber", "softsign")
    ),
    Row("mars_lion", signadam_ext.MARSLion, {"beta": 0.95, "gamma": 0.025}, mars_lion, like="lion"),
    Row("ano", signadam_ext.Ano, {"betas": (0.92, 0.99), "eps": 1e-8}, ano),
    Row("anolog", signadam_ext.Anolog, {"beta2": 0.99, "eps": 1e-8}, ano, like="ano"),
    Row("grams", signadam_ext.Grams, {"betas": (0.9, 0.99), "eps": 1e-6}, grams),
    Row("ada_momentum", signadam_ext.AdaMomentum, {"betas": (0.9, 0.99), "eps": 1e-8}, ada_momentum),
    Row("laprop", signadam_ext.LaProp, {"betas": (0.9, 0.999), "eps": 1e-8}, laprop),
    Row("laprop-bounded", signadam_ext.LaProp, {"betas": (0.9, 0.95), "eps": 1e-8}, laprop, largest_beta2=0.95),
    Row("adopt", signadam_ext.ADOPT, {"betas": (0.9, 0.99), "eps": 1e-6, "clip": True}, adopt, False),
    Row("adopt-unclipped", signadam_ext.ADOPT, {"betas": (0.9, 0.99), "eps": 1e-6, "clip": False}, adopt, False),
    Row("ada_bound", signadam_ext.AdaBound, {"gamma": 0.01, **BOUNDS}, ada_bound),
    Row("ams_bound", signadam_ext.AMSBound, {"gamma": 0.01, **BOUNDS}, ams_bound),
    Row(
        "ademamix",
        signadam_ext.AdEMAMix,
        {"betas": (0.9, 0.99, 0.999), "alpha": 2.0, "eps": 1e-8, "t_alpha": 30, "t_beta3": 20},
        ademamix,
    ),
    Row(
        "schedule_free_adamw",
        signadam_ext.ScheduleFreeAdamW,
        {"betas": (0.9, 0.99), "eps": 1e-8, "warmup_steps": 7, "r": 0.5, "weight_lr_power": 2.0},
        schedule_free_adamw,
    ),
    Row("schedule_free_sign", signadam_ext.ScheduleFreeSign, {"beta": 0.9, "alpha": 0.25}, schedule_free_sign),
    # Such that no sign of its pull is left open.
    Row("focus", signadam_ext.FOCUS, {"betas": (0.9, 0.97), "gamma": 0.35}, focus),
    Row(
        "mars_adamw",
        signadam_ext.MARSAdamW,
        {"betas": (0.9, 0.99), "gamma": 0.025, "eps": 1e-8, "max_norm": None},
        mars_adamw,
    ),
    Row(
        "mars_adamw-clipped",
        signadam_ext.MARSAdamW,
        {"betas": (0.9, 0.99), "gamma": 0.025, "eps": 1e-8, "max_norm": 2.0},
        mars_adamw,
    ),
]

#: One of each kind: what others have in state and hyperparameters, one of these has as well.
OF_A_KIND = (
    "sign_sgd-gated",
    "signum",
    "sign_adam",
    "sign_adam_analytic",
    "sign_adam_pp",
    "sign_adam_pp-adaptive",
    "sign_adam_pp-delayed",
    "msvag",
    "msvag_minibatch",
    "adam_amsgrad",
)
