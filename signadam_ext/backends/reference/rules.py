"""Every rule once more, in pure PyTorch: what the kernels must equal bit for bit.

Written for exactness, not for speed: fp32 tensors, one rounding per operation, in the order of the rules' definition.
So there is no ``add(alpha=)``, ``addcmul`` or ``lerp``, which fuse; scalars meet tensors as fp32 tensors on the same
device, since CUDA divides by a Python number by way of its reciprocal.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...core.native import compiled as _C
from ...core.rule import Scalars

CHUNK_ROWS, CHUNK_LANES = 8, 2048

#: How far from the root mean square of the gradient a steered threshold may be, either way.
THRESHOLD_RANGE = 2.0**20

Moments = tuple[Tensor, ...]
#: (scalars as fp32 tensors, threshold, p, g, moments) -> (p, moments), all fp32. A rule that reads the variance of the
#: gradient gets it behind the moments.
Update = Callable[[dict[str, Tensor], Tensor, Tensor, Tensor, Moments], tuple[Tensor, Moments]]


def sign(x: Tensor) -> Tensor:
    """``(x > 0) - (x < 0)``: zeros of both signs and NaN give 0."""
    return (x > 0).float() - (x < 0).float()


def gated_sign(g: Tensor, alpha: Tensor) -> Tensor:
    """The confidence gate [SA, Alg. 3]: ``sign(g)`` where ``|g| > alpha``, else 0."""
    return (g > alpha).float() - (g < -alpha).float()


def square_root(x: Tensor) -> Tensor:
    """Correctly rounded, which ``torch.sqrt`` of fp32 on the CPU is not; an ulp of double does not reach the result."""
    return x.double().sqrt().float()


def double_root(x: Tensor) -> Tensor:
    """Correctly rounded root of a 0-dim float64 tensor; ``torch.sqrt`` on the CPU is off by an ulp now and then."""
    return torch.full_like(x, math.sqrt(x.item())) if x.device.type == "cpu" else x.sqrt()


def sign_sgd(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    return p - s["lr"] * gated_sign(g, alpha), ()


def signum(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    (m,) = moments
    m = s["beta1"] * m + s["one_minus_beta1"] * g
    return p - s["lr"] * sign(m), (m,)


def sign_adam(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    m, v = moments
    c = sign(g)
    m = s["beta1"] * m + s["one_minus_beta1"] * c
    v = s["beta2"] * v + s["one_minus_beta2"] * c * c
    return p - s["lr"] * m / (square_root(v) + s["eps"]), (m, v)


def sign_adam_analytic(
    s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments
) -> tuple[Tensor, Moments]:
    (m,) = moments
    m = s["beta1"] * m + s["one_minus_beta1"] * sign(g)
    return p - s["lr"] * m / s["denominator"], (m,)


def sign_adam_pp(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    (m,) = moments
    m = s["beta1"] * m + s["one_minus_beta1"] * gated_sign(g, alpha)
    return p - s["lr"] * m, (m,)


def msgd(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    (m,) = moments
    m = s["beta1"] * m + s["one_minus_beta1"] * g
    return p - s["lr"] * m, (m,)


def estimate(s: dict[str, Tensor], g: Tensor, moments: Moments) -> tuple[Tensor, Tensor, Moments]:
    """The bias-corrected mean of the gradient, its variance, and the moments they come from [BH, Eq. 9 to 11]."""
    m, v = moments
    m = s["beta1"] * m + s["one_minus_beta1"] * g
    v = s["beta1"] * v + s["one_minus_beta1"] * g * g
    mean, square = m / s["bias_correction"], v / s["bias_correction"]
    excess = square - mean * mean
    excess = torch.where(excess > 0, excess, 0.0)
    variance = torch.where(s["one_minus_rho"] == 0, 0.0, excess / s["one_minus_rho"])
    return mean, variance, (m, v)


def zero_where_zero(denominator: Tensor, x: Tensor) -> Tensor:
    return torch.where(denominator == 0, 0.0, x)


def at_least(x: Tensor, low: Tensor) -> Tensor:
    """NaN stays NaN."""
    return torch.where(x < low, low, x)


def clamped(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.where(x > high, high, at_least(x, low))


def svag(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    mean, variance, moments = estimate(s, g, moments)
    square = mean * mean
    denominator = square + variance
    return p - zero_where_zero(denominator, s["lr"] * (square / denominator) * g), moments


def msvag(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    mean, variance, moments = estimate(s, g, moments)
    square = mean * mean
    denominator = square + s["rho"] * variance
    return p - zero_where_zero(denominator, s["lr"] * (square / denominator) * mean), moments


def adam_star(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    mean, variance, moments = estimate(s, g, moments)
    denominator = square_root(mean * mean + s["rho"] * variance)
    return p - zero_where_zero(denominator, s["lr"] * mean / denominator), moments


def adam_star_plain(
    s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments
) -> tuple[Tensor, Moments]:
    mean, variance, moments = estimate(s, g, moments)
    denominator = square_root(mean * mean + variance)
    return p - zero_where_zero(denominator, s["lr"] * sign(g) * mean.abs() / denominator), moments


def msvag_minibatch(
    s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments
) -> tuple[Tensor, Moments]:
    m, v, given = moments
    m = s["beta1"] * m + g
    v = s["beta2"] * v + given
    square = m * m
    denominator = square + v
    return p - zero_where_zero(denominator, s["lr"] * (square / denominator) * m), (m, v)


def adam_star_minibatch(
    s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments
) -> tuple[Tensor, Moments]:
    m, v, given = moments
    m = s["beta1"] * m + g
    v = s["beta2"] * v + given
    denominator = square_root(m * m + v)
    return p - zero_where_zero(denominator, s["lr"] * m / denominator), (m, v)


def adam(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    m, v = moments
    m = s["beta1"] * m + s["one_minus_beta1"] * g
    v = s["beta2"] * v + s["one_minus_beta2"] * g * g
    return p - s["lr"] * m / (square_root(v) / s["bias_correction"] + s["eps"]), (m, v)


def adam_amsgrad(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    m, v, x = moments
    m = s["beta1"] * m + s["one_minus_beta1"] * g
    v = s["beta2"] * v + s["one_minus_beta2"] * g * g
    x = torch.maximum(x, v)
    return p - s["lr"] * m / (square_root(x) / s["bias_correction"] + s["eps"]), (m, v, x)


def lion(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    (m,) = moments
    u = s["beta1"] * m + s["one_minus_beta1"] * g
    return p - s["lr"] * sign(u), (s["beta2"] * m + s["one_minus_beta2"] * g,)


def adam_s(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    (m,) = moments
    square = s["beta2"] * m * m + s["one_minus_beta2"] * g * g
    m = s["beta1"] * m + s["one_minus_beta1"] * g
    return p - s["lr"] * m / (square_root(square) + s["eps"]), (m,)


def bcos(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    (m,) = moments
    ahead = g + s["beta1"] * m
    square = s["beta2"] * m * m + s["one_minus_beta2"] * ahead * ahead
    m = s["beta1"] * m + s["one_minus_beta1"] * g
    return p - s["lr"] * m / (square_root(square) + s["eps"]), (m,)


def lion_k(s: dict[str, Tensor], g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    """The blend of momentum and gradient of which the step is made, and the momentum afterwards."""
    (m,) = moments
    u = s["beta1"] * m + s["one_minus_beta1"] * g
    return u, (s["beta2"] * m + s["one_minus_beta2"] * g,)


def lion_threshold(
    s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments
) -> tuple[Tensor, Moments]:
    u, moments = lion_k(s, g, moments)
    return p - s["lr"] * gated_sign(u, s["eps"]), moments


def lion_huber(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    u, moments = lion_k(s, g, moments)
    return p - s["lr"] * torch.where(u.abs() < s["eps"], u / s["eps"], sign(u)), moments


def lion_softsign(
    s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments
) -> tuple[Tensor, Moments]:
    u, moments = lion_k(s, g, moments)
    denominator = s["eps"] + u.abs()
    return p - zero_where_zero(denominator, s["lr"] * (u / denominator)), moments


def ano(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    m, v = moments
    square = g * g
    m = s["beta1"] * m + s["one_minus_beta1"] * g
    v = s["beta2"] * v + s["one_minus_beta2"] * sign(square - v) * square
    return p - s["lr"] * g.abs() / square_root(v + s["eps"]) * sign(m), (m, v)


def grams(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    m, v = moments
    m = s["beta1"] * m + s["one_minus_beta1"] * g
    v = s["beta2"] * v + s["one_minus_beta2"] * g * g
    return p - s["lr"] * m.abs() / (square_root(v) + s["eps"]) * sign(g), (m, v)


def ada_momentum(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    m, v = moments
    m = s["beta1"] * m + s["one_minus_beta1"] * g
    v = s["beta2"] * v + s["one_minus_beta2"] * m * m + s["eps"]
    return p - s["lr"] * m / square_root(v), (m, v)


def laprop(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    m, v = moments
    v = s["beta2"] * v + s["one_minus_beta2"] * g * g
    m = s["beta1"] * m + s["one_minus_beta1"] * (g / (square_root(v) + s["eps"]))
    p = p - s["lr"] * m
    return p, (torch.where((m <= s["upper"]) & (m >= -s["upper"]), m, 0.0), v)


def adopt(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    m, v = moments
    normalized = clamped(g / at_least(square_root(v), s["eps"]), -s["upper"], s["upper"])
    m = s["beta1"] * m + s["one_minus_beta1"] * torch.where(s["upper"] > 0, normalized, 0.0)
    return p - s["lr"] * m, (m, s["beta2"] * v + s["one_minus_beta2"] * g * g)


def bounded_rate(s: dict[str, Tensor], v: Tensor) -> Tensor:
    """Adam's learning rate of each entry, cut off at two bounds."""
    return clamped(s["lr"] / (square_root(v) + s["eps"]), s["lower"], s["upper"])


def ada_bound(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    m, v = moments
    m = s["beta1"] * m + s["one_minus_beta1"] * g
    v = s["beta2"] * v + s["one_minus_beta2"] * g * g
    return p - bounded_rate(s, v) * m, (m, v)


def ams_bound(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    m, v, x = moments
    m = s["beta1"] * m + s["one_minus_beta1"] * g
    v = s["beta2"] * v + s["one_minus_beta2"] * g * g
    x = torch.maximum(x, v)
    return p - bounded_rate(s, x) * m, (m, v, x)


def ademamix(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    m, v, x = moments
    m = s["beta1"] * m + s["one_minus_beta1"] * g
    v = s["beta2"] * v + s["one_minus_beta2"] * g * g
    x = s["beta3"] * x + s["one_minus_beta3"] * g
    denominator = square_root(v) / s["bias_correction"] + s["eps"]
    return p - (s["lr"] * m + s["mix"] * x) / denominator, (m, v, x)


def move_both(s: dict[str, Tensor], step: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The point of gradients and the point that steps move, after a step of Schedule-Free."""
    step = step + s["shrinking"] * y
    return y + (s["averaging"] * (z - y) - s["one_minus_beta1"] * step), z - step


def schedule_free_adamw(
    s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments
) -> tuple[Tensor, Moments]:
    z, v = moments
    v = s["beta2"] * v + s["one_minus_beta2"] * g * g
    p, z = move_both(s, s["lr"] * g / (square_root(v) + s["eps"]), p, z)
    return p, (z, v)


def schedule_free_sign(
    s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments
) -> tuple[Tensor, Moments]:
    (z,) = moments
    p, z = move_both(s, s["lr"] * gated_sign(g, alpha), p, z)
    return p, (z,)


def corrected(s: dict[str, Tensor], g: Tensor, x: Tensor) -> Tensor:
    """The gradient as MARS has it."""
    return g + s["correction"] * (g - x)


def mars_adamw(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    m, v, x = moments
    c = corrected(s, g, x) * torch.where(alpha > 1, torch.ones_like(alpha) / alpha, torch.ones_like(alpha))
    m = s["beta1"] * m + s["one_minus_beta1"] * c
    v = s["beta2"] * v + s["one_minus_beta2"] * c * c
    return p - s["lr"] * m / (square_root(v) + s["eps"]), (m, v, g)


def focus(s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    average, m = moments
    m = s["beta1"] * m + s["one_minus_beta1"] * g
    average = torch.where(s["averaging"] == 1, p, average + s["averaging"] * (p - average))
    return p - (s["lr"] * sign(m) + s["mix"] * sign(p - average) + s["shrinking"] * average), (average, m)


def as_fp32(value: float, device: torch.device) -> Tensor:
    """A scalar as it meets tensors: 0-dim fp32, rounded as IEEE has it, to infinity beyond the largest number."""
    # torch.full raises where its dtype does not reach. Rounded on the host: not every device has doubles.
    return torch.full((), ctypes.c_float(value).value, dtype=torch.float32, device=device)


def effective_gradient(scalars: Scalars, p: Tensor, g: Tensor) -> Tensor:
    """The gradient as rules, gates and statistics see it."""
    if scalars["gradient_scale"] != 1.0:
        g = g * as_fp32(scalars["gradient_scale"], p.device)
    if scalars["coupled"]:
        g = g + as_fp32(scalars["weight_decay"], p.device) * p
    return g


def times_sign_of(x: Tensor, y: Tensor) -> Tensor:
    """``x`` with its sign changed where ``y`` has a sign, that of -0 included."""
    return (x.view(torch.int32) ^ (y.view(torch.int32) & torch.iinfo(torch.int32).min)).view(torch.float32)


def update(
    rule: Update,
    threshold_pass: str,
    scalars: Scalars,
    p: Tensor,
    g: Tensor,
    moments: Moments,
    threshold_state: Tensor | None,
    confident: Tensor | None = None,
    update_scale: str | None = None,
) -> tuple[Tensor, Moments, Tensor, Tensor | None]:
    """One step of one tensor: the new ``p`` and moments, the threshold in force, and what the next one is made of.

    Args:
        rule: one of the functions above.
        threshold_pass: ``"NONE"``, ``"SAME_PASS"`` or ``"PASS_BEFORE"``, as in :class:`signadam_ext.core.rule.Rule`.
        scalars: unrounded doubles; each is rounded to fp32 once.
        p: parameter, flat, fp32.
        g: effective gradient, flat, fp32, in the same memory order.
        moments: flat, fp32.
        threshold_state: 0-dim float64, what the threshold is made of, or None.
        confident: what takes the gradient's place in the rule, or None.
        update_scale: what the threshold is instead, as in :class:`signadam_ext.core.rule.Rule`, or None.
    """
    s = {name: as_fp32(value, p.device) for name, value in scalars.items()}
    if update_scale == "norm":
        assert threshold_state is not None
        if threshold_pass == "PASS_BEFORE":
            sums = step_sums(p, p, g, scalars, moments)
            threshold_state = moved_by_sums(threshold_state, *sums, g.numel(), scalars)
        seen_alpha, alpha = as_fp32(0.0, p.device), (scalars["alpha"] * threshold_state).float()
        p, moments = _applied(rule, scalars, s, alpha, p, g, moments)
        return p, moments, seen_alpha, threshold_state
    if update_scale is not None:
        assert threshold_state is not None
        return _scaled(rule, threshold_pass, scalars, s, p, g, moments, threshold_state)
    if threshold_pass == "PASS_BEFORE" and threshold_state is not None:
        threshold_state = next_threshold_state(threshold_state, g, as_fp32(0.0, p.device), scalars)
    alpha = s.get("alpha", as_fp32(0.0, p.device))
    if threshold_state is not None:
        alpha = (scalars["alpha"] * threshold_state).float()
    seen = g if confident is None else confident
    p, moments = _applied(rule, scalars, s, alpha, p, seen, moments)
    if threshold_pass == "SAME_PASS" and threshold_state is not None:
        threshold_state = next_threshold_state(threshold_state, g, alpha, scalars)
    return p, moments, alpha, threshold_state


def agreement(step: Tensor, g: Tensor) -> Tensor:
    """Whether a step goes against the gradient, as it should. Against a NaN none does, whatever its sign bit."""
    return (times_sign_of(step, g) < 0) & ((g < 0) | (g > 0))


def _applied(
    rule: Update, scalars: Scalars, s: dict[str, Tensor], alpha: Tensor, p: Tensor, g: Tensor, moments: Moments
) -> tuple[Tensor, Moments]:
    """Decoupled decay and the rule."""
    if not scalars["cautious_decay"]:
        return rule(s, alpha, p * s["decay"], g, moments)
    step, moments = rule(s, alpha, _unmoved(p), g, moments)
    return _decayed(scalars, s, p, step) + step, moments


def _unmoved(p: Tensor) -> Tensor:
    """What a rule moves by its step alone: -0, to which a number is added, and of which one is subtracted, exactly."""
    return torch.full_like(p, -0.0)


def _decayed(scalars: Scalars, s: dict[str, Tensor], p: Tensor, step: Tensor) -> Tensor:
    """``p`` after decoupled decay, which is cautious where the step leads away from 0."""
    decayed = p * s["decay"]
    return torch.where(times_sign_of(step, p) <= 0, decayed, p) if scalars["cautious_decay"] else decayed


def _scaled(
    rule: Update,
    threshold_pass: str,
    scalars: Scalars,
    s: dict[str, Tensor],
    p: Tensor,
    g: Tensor,
    moments: Moments,
    state: Tensor,
) -> tuple[Tensor, Moments, Tensor, Tensor]:
    """:func:`update` with a step that is multiplied by a number of the tensor's."""
    step, moments = rule(s, s["alpha"], _unmoved(p), g, moments)
    after = state
    if threshold_pass != "NONE":
        after = moved_by_sums(state, *step_sums(p, step, g, scalars), g.numel(), scalars)
    scale = _scale(after if threshold_pass == "PASS_BEFORE" else state, scalars).float()
    if scalars["caution"]:
        step = torch.where(agreement(step, g) | step.isnan(), step, 0.0)
    step = step * scale
    return _decayed(scalars, s, p, step) + step, moments, s["alpha"], after


def step_sums(p: Tensor, step: Tensor, g: Tensor, scalars: Scalars, moments: Moments = ()) -> tuple[Tensor, Tensor]:
    """What moves the number of a tensor's: entries of the step that agree, squares of ``p``, or of the corrected
    gradient."""
    zero = torch.zeros((), dtype=torch.float64, device=p.device)
    if scalars["clips"]:
        c = corrected({"correction": as_fp32(scalars["correction"], p.device)}, g, moments[2])
        return zero, ordered_sum(c.double().square())
    if scalars["caution"]:
        return ordered_sum(agreement(step, g).double()), zero
    return zero, ordered_sum(p.double().square())


def _scale(state: Tensor, scalars: Scalars) -> Tensor:
    """What steps are multiplied by, of the share of entries that agree [CO] or the parameter's root mean square."""
    size = torch.clamp(state, min=_C.LEAST_SCALE)
    if scalars["caution"]:
        return torch.where(state == 0, torch.ones_like(state), torch.ones_like(state) / size)
    return size


def passes(g: Tensor, alpha: Tensor) -> Tensor:
    """The entries that the gate lets through."""
    return (g > alpha) | (g < -alpha)


def next_threshold_state(a: Tensor, g: Tensor, alpha: Tensor, scalars: Scalars) -> Tensor:
    """What the next threshold is made of, after gradient ``g``, in double, additions in the shared order."""
    flat = g.double()
    first = ordered_sum(passes(g, alpha).double() if scalars["steers"] else flat)
    return moved_by_sums(a, first, ordered_sum(flat * flat), g.numel(), scalars)


def moved_by_sums(a: Tensor, first: Tensor, second: Tensor, numel: int, scalars: Scalars) -> Tensor:
    """The same, of sums over a gradient of ``numel`` entries: itself, or the entries that pass, and its squares."""
    if scalars["clips"]:
        following = next_norm
    elif scalars["scales"]:
        following = next_scale
    else:
        following = next_threshold if scalars["steers"] else next_deviation
    return moved(following, a, first, second, numel, scalars)


def moved(
    following: Callable[..., Tensor], a: Tensor, first: Tensor, second: Tensor, numel: int, scalars: Scalars
) -> Tensor:
    """What one of the functions below makes of ``a`` and sums over ``numel`` entries; ``a`` if these are not finite."""
    n = torch.full_like(a, numel)  # CUDA divides by a number by way of its reciprocal
    found = following(a, first, second, n, scalars)
    return torch.where(torch.isfinite(first) & torch.isfinite(second), found, a)


def next_norm(a: Tensor, first: Tensor, second: Tensor, n: Tensor, scalars: Scalars) -> Tensor:
    """The norm of a corrected gradient."""
    return double_root(second)


def next_scale(a: Tensor, first: Tensor, second: Tensor, n: Tensor, scalars: Scalars) -> Tensor:
    """The share of entries that agree, which tells nothing if it is 0; or the parameter's root mean square."""
    return torch.where(first == 0, a, first / n) if scalars["caution"] else double_root(second / n)


def next_deviation(a: Tensor, first: Tensor, second: Tensor, n: Tensor, scalars: Scalars) -> Tensor:
    """The running standard deviation [SA, Sec. 6.3]."""
    mean = first / n
    variance = second / n - mean * mean
    deviation = double_root(torch.where(variance > 0, variance, 0.0))
    return scalars["confidence_beta"] * a + scalars["one_minus_confidence_beta"] * deviation


def next_threshold(a: Tensor, first: Tensor, second: Tensor, n: Tensor, scalars: Scalars) -> Tensor:
    """The threshold after ``first`` of ``n`` entries have passed it."""
    size = double_root(second / n)
    moved = a * exponential(scalars["gain"] * (first / n - scalars["target"]))
    moved = torch.minimum(torch.maximum(moved, size * THRESHOLD_RANGE**-1), size * THRESHOLD_RANGE)
    return torch.where(second == 0, a, torch.where(a == 0, size * scalars["quantile"], moved))


def exponential(x: Tensor) -> Tensor:
    """``e ** x`` for ``|x| <= 1``: its series, since the libraries' exponentials differ in their last bits."""
    total = torch.ones_like(x)
    for k in range(18, 0, -1):
        total = 1.0 + x * total / torch.full_like(x, k)
    return total


def ordered_sum(x: Tensor) -> Tensor:
    """Sum of a 1-dim float64 tensor in the order every backend shares.

    Chunks of 8 rows of 2048 lanes, padded with zeros; lanes add their rows in order, then are halved; the chunk sums go
    through the same until one is left.
    """
    while True:
        x = torch.nn.functional.pad(x, (0, -x.numel() % (CHUNK_ROWS * CHUNK_LANES)))
        rows = x.view(-1, CHUNK_ROWS, CHUNK_LANES).unbind(1)
        lanes = rows[0]
        for row in rows[1:]:
            lanes = lanes + row
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        x = lanes[:, 0]
        if x.numel() == 1:
            return x[0]
