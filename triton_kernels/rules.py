"""Every update rule's twin: fp32 tensors ``p, g, m, v, x``, and ``s``, of :func:`scalars_at`.

As in csrc/core/rules.h: each operation rounds once, in the order written. ``tl.div_rn`` and ``tl.sqrt_rn``, because
``/`` and ``tl.sqrt`` compile to approximations; ``g * -1.0``, because ``-g`` compiles to ``0 - g`` and loses the sign
of zero.
"""

import triton
import triton.language as tl

from signadam_ext.core.native import compiled as _C

SCALARS = _C.SCALARS

LR = tl.constexpr(SCALARS.index("lr"))
WEIGHT_DECAY = tl.constexpr(SCALARS.index("weight_decay"))
DECAY = tl.constexpr(SCALARS.index("decay"))
COUPLED = tl.constexpr(SCALARS.index("coupled"))
CAUTIOUS_DECAY = tl.constexpr(SCALARS.index("cautious_decay"))
CAUTION = tl.constexpr(SCALARS.index("caution"))
SCALES = tl.constexpr(SCALARS.index("scales"))
GRADIENT_SCALE = tl.constexpr(SCALARS.index("gradient_scale"))
ALPHA = tl.constexpr(SCALARS.index("alpha"))
BETA1 = tl.constexpr(SCALARS.index("beta1"))
ONE_MINUS_BETA1 = tl.constexpr(SCALARS.index("one_minus_beta1"))
BETA2 = tl.constexpr(SCALARS.index("beta2"))
ONE_MINUS_BETA2 = tl.constexpr(SCALARS.index("one_minus_beta2"))
BETA3 = tl.constexpr(SCALARS.index("beta3"))
ONE_MINUS_BETA3 = tl.constexpr(SCALARS.index("one_minus_beta3"))
MIX = tl.constexpr(SCALARS.index("mix"))
EPS = tl.constexpr(SCALARS.index("eps"))
DENOMINATOR = tl.constexpr(SCALARS.index("denominator"))
BIAS_CORRECTION = tl.constexpr(SCALARS.index("bias_correction"))
RHO = tl.constexpr(SCALARS.index("rho"))
ONE_MINUS_RHO = tl.constexpr(SCALARS.index("one_minus_rho"))
LOWER = tl.constexpr(SCALARS.index("lower"))
UPPER = tl.constexpr(SCALARS.index("upper"))
AVERAGING = tl.constexpr(SCALARS.index("averaging"))
SHRINKING = tl.constexpr(SCALARS.index("shrinking"))
CORRECTION = tl.constexpr(SCALARS.index("correction"))
CLIPS = tl.constexpr(SCALARS.index("clips"))
CONFIDENCE_BETA = tl.constexpr(SCALARS.index("confidence_beta"))
ONE_MINUS_CONFIDENCE_BETA = tl.constexpr(SCALARS.index("one_minus_confidence_beta"))
STEERS = tl.constexpr(SCALARS.index("steers"))
TARGET = tl.constexpr(SCALARS.index("target"))
GAIN = tl.constexpr(SCALARS.index("gain"))
QUANTILE = tl.constexpr(SCALARS.index("quantile"))
SCALAR_COUNT = tl.constexpr(len(SCALARS))


# Triton 3.2 hands no tuple to a function: it reads scalars in every row instead.
KNOWS_TUPLES = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3))


@triton.jit
def scalars_at(address):
    """A group's scalars from its row: each rounded to fp32 once, where it meets a tensor, and before any loop.

    No compiler may move a load out of a loop that stores. Those that a kernel does not use are left out by it.
    """
    if KNOWS_TUPLES:
        s = (tl.load(address).to(tl.float32),)
        for i in tl.static_range(1, SCALAR_COUNT):
            s += (tl.load(address + i).to(tl.float32),)
        return s
    else:
        return address


@triton.jit
def scalar(s, INDEX: tl.constexpr):
    """One of what :func:`scalars_at` has made."""
    if KNOWS_TUPLES:
        return s[INDEX]
    else:
        return tl.load(s + INDEX).to(tl.float32)


@triton.jit
def sign(x):
    return tl.where(x > 0.0, 1.0, 0.0) - tl.where(x < 0.0, 1.0, 0.0)


@triton.jit
def passes(g, alpha):
    """Whether the gate lets an entry through."""
    return (g > alpha) | (g < -alpha)


@triton.jit
def gated_sign(g, alpha):
    return tl.where(g > alpha, 1.0, 0.0) - tl.where(g < -alpha, 1.0, 0.0)


@triton.jit
def divided(x, divisor):
    """Division by a scalar, rounded once."""
    return tl.div_rn(x, tl.full(x.shape, 0.0, tl.float32) + divisor)


@triton.jit
def at_least(x, low):
    """NaN stays NaN."""
    return tl.where(x < low, low, x)


@triton.jit
def clamped(x, low, high):
    return tl.where(x > high, high, at_least(x, low))


@triton.jit
def zero_where_zero(denominator, x):
    """``x``, or 0 where the denominator is 0: a parameter of whose gradient nothing is known stays."""
    return tl.where(denominator == 0.0, 0.0, x)


@triton.jit
def effective_gradient(s, p, g):
    # One jump over both: by themselves each would be executed, switched off by a predicate, for every element.
    if (scalar(s, GRADIENT_SCALE) != 1.0) | (scalar(s, COUPLED) != 0.0):
        g = g * scalar(s, GRADIENT_SCALE)
        if scalar(s, COUPLED) != 0.0:
            g = g + scalar(s, WEIGHT_DECAY) * p
    return g


@triton.jit
def times_sign_of(x, y):
    """``x`` with its sign changed where ``y`` has a sign, that of -0 included."""
    changed = x.to(tl.int32, bitcast=True) ^ (y.to(tl.int32, bitcast=True) & -2147483648)
    return changed.to(tl.float32, bitcast=True)


@triton.jit
def cautiously_decayed(s, p, step):
    """Decoupled decay where a step does not move p away from 0."""
    return tl.where(times_sign_of(step, p) <= 0.0, p * scalar(s, DECAY), p)


@triton.jit
def apply(s, alpha, p, g, m, v, x, RULE: tl.constexpr):
    """Decoupled decay and the rule, given the effective gradient."""
    if scalar(s, CAUTIOUS_DECAY) != 0.0:
        # Rules read p only to move it, so at -0 they leave the step.
        step, m, v, x = RULE(s, alpha, tl.full(p.shape, -0.0, tl.float32), g, m, v, x)
        p = cautiously_decayed(s, p, step) + step
    else:
        p, m, v, x = RULE(s, alpha, p * scalar(s, DECAY), g, m, v, x)
    return p, m, v, x


@triton.jit
def agreement(step, g):
    """Whether a step goes against the gradient, as it should. Against a NaN none does, whatever its sign bit."""
    return (times_sign_of(step, g) < 0.0) & ((g < 0.0) | (g > 0.0))


@triton.jit
def apply_scaled(s, scale, p, step, g, CAUTIOUS: tl.constexpr):
    """Decoupled decay and a rule's step, multiplied by ``scale``, and if CAUTIOUS only where it goes against ``g``."""
    if CAUTIOUS:
        step = tl.where(agreement(step, g) | (step != step), step, 0.0)
    step = step * scale
    decayed = p * scalar(s, DECAY)
    if scalar(s, CAUTIOUS_DECAY) != 0.0:
        decayed = cautiously_decayed(s, p, step)
    return decayed + step


@triton.jit
def sign_sgd(s, alpha, p, g, m, v, x):
    p = p - scalar(s, LR) * gated_sign(g, alpha)
    return p, m, v, x


@triton.jit
def signum(s, alpha, p, g, m, v, x):
    m = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * g
    p = p - scalar(s, LR) * sign(m)
    return p, m, v, x


@triton.jit
def sign_adam(s, alpha, p, g, m, v, x):
    c = sign(g)
    m = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * c
    v = scalar(s, BETA2) * v + scalar(s, ONE_MINUS_BETA2) * c * c
    p = p - tl.div_rn(scalar(s, LR) * m, tl.sqrt_rn(v) + scalar(s, EPS))
    return p, m, v, x


@triton.jit
def sign_adam_analytic(s, alpha, p, g, m, v, x):
    m = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * sign(g)
    p = p - divided(scalar(s, LR) * m, scalar(s, DENOMINATOR))
    return p, m, v, x


@triton.jit
def sign_adam_pp(s, alpha, p, g, m, v, x):
    m = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * gated_sign(g, alpha)
    p = p - scalar(s, LR) * m
    return p, m, v, x


@triton.jit
def msgd(s, alpha, p, g, m, v, x):
    m = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * g
    p = p - scalar(s, LR) * m
    return p, m, v, x


@triton.jit
def estimate(s, g, m, v):
    """Bias-corrected mean and variance of the gradient, and the moments they come from."""
    m = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * g
    v = scalar(s, BETA1) * v + scalar(s, ONE_MINUS_BETA1) * g * g
    mean = divided(m, scalar(s, BIAS_CORRECTION))
    excess = divided(v, scalar(s, BIAS_CORRECTION)) - mean * mean
    excess = tl.where(excess > 0.0, excess, 0.0)
    left = scalar(s, ONE_MINUS_RHO)
    variance = tl.where(left == 0.0, 0.0, divided(excess, left))
    return mean, variance, m, v


@triton.jit
def svag(s, alpha, p, g, m, v, x):
    mean, variance, m, v = estimate(s, g, m, v)
    square = mean * mean
    denominator = square + variance
    p = p - zero_where_zero(denominator, scalar(s, LR) * tl.div_rn(square, denominator) * g)
    return p, m, v, x


@triton.jit
def msvag(s, alpha, p, g, m, v, x):
    mean, variance, m, v = estimate(s, g, m, v)
    square = mean * mean
    denominator = square + scalar(s, RHO) * variance
    p = p - zero_where_zero(denominator, scalar(s, LR) * tl.div_rn(square, denominator) * mean)
    return p, m, v, x


@triton.jit
def adam_star(s, alpha, p, g, m, v, x):
    mean, variance, m, v = estimate(s, g, m, v)
    denominator = tl.sqrt_rn(mean * mean + scalar(s, RHO) * variance)
    p = p - zero_where_zero(denominator, tl.div_rn(scalar(s, LR) * mean, denominator))
    return p, m, v, x


@triton.jit
def adam_star_plain(s, alpha, p, g, m, v, x):
    mean, variance, m, v = estimate(s, g, m, v)
    denominator = tl.sqrt_rn(mean * mean + variance)
    p = p - zero_where_zero(denominator, tl.div_rn(scalar(s, LR) * sign(g) * tl.abs(mean), denominator))
    return p, m, v, x


@triton.jit
def msvag_minibatch(s, alpha, p, g, m, v, x):
    m = scalar(s, BETA1) * m + g
    v = scalar(s, BETA2) * v + x
    square = m * m
    denominator = square + v
    p = p - zero_where_zero(denominator, scalar(s, LR) * tl.div_rn(square, denominator) * m)
    return p, m, v, x


@triton.jit
def adam_star_minibatch(s, alpha, p, g, m, v, x):
    m = scalar(s, BETA1) * m + g
    v = scalar(s, BETA2) * v + x
    denominator = tl.sqrt_rn(m * m + v)
    p = p - zero_where_zero(denominator, tl.div_rn(scalar(s, LR) * m, denominator))
    return p, m, v, x


@triton.jit
def adam(s, alpha, p, g, m, v, x):
    m = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * g
    v = scalar(s, BETA2) * v + scalar(s, ONE_MINUS_BETA2) * g * g
    root = divided(tl.sqrt_rn(v), scalar(s, BIAS_CORRECTION))
    p = p - tl.div_rn(scalar(s, LR) * m, root + scalar(s, EPS))
    return p, m, v, x


@triton.jit
def adam_amsgrad(s, alpha, p, g, m, v, x):
    m = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * g
    v = scalar(s, BETA2) * v + scalar(s, ONE_MINUS_BETA2) * g * g
    x = tl.where(v > x, v, tl.where(v == v, x, v))
    root = divided(tl.sqrt_rn(x), scalar(s, BIAS_CORRECTION))
    p = p - tl.div_rn(scalar(s, LR) * m, root + scalar(s, EPS))
    return p, m, v, x


@triton.jit
def lion(s, alpha, p, g, m, v, x):
    u = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * g
    p = p - scalar(s, LR) * sign(u)
    m = scalar(s, BETA2) * m + scalar(s, ONE_MINUS_BETA2) * g
    return p, m, v, x


@triton.jit
def adam_s(s, alpha, p, g, m, v, x):
    square = scalar(s, BETA2) * m * m + scalar(s, ONE_MINUS_BETA2) * g * g
    m = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * g
    p = p - tl.div_rn(scalar(s, LR) * m, tl.sqrt_rn(square) + scalar(s, EPS))
    return p, m, v, x


@triton.jit
def bcos(s, alpha, p, g, m, v, x):
    ahead = g + scalar(s, BETA1) * m
    square = scalar(s, BETA2) * m * m + scalar(s, ONE_MINUS_BETA2) * ahead * ahead
    m = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * g
    p = p - tl.div_rn(scalar(s, LR) * m, tl.sqrt_rn(square) + scalar(s, EPS))
    return p, m, v, x


@triton.jit
def lion_threshold(s, alpha, p, g, m, v, x):
    u = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * g
    p = p - scalar(s, LR) * gated_sign(u, scalar(s, EPS))
    m = scalar(s, BETA2) * m + scalar(s, ONE_MINUS_BETA2) * g
    return p, m, v, x


@triton.jit
def lion_huber(s, alpha, p, g, m, v, x):
    u = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * g
    eps = scalar(s, EPS)
    p = p - scalar(s, LR) * tl.where(tl.abs(u) < eps, divided(u, eps), sign(u))
    m = scalar(s, BETA2) * m + scalar(s, ONE_MINUS_BETA2) * g
    return p, m, v, x


@triton.jit
def lion_softsign(s, alpha, p, g, m, v, x):
    u = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * g
    denominator = scalar(s, EPS) + tl.abs(u)
    p = p - zero_where_zero(denominator, scalar(s, LR) * tl.div_rn(u, denominator))
    m = scalar(s, BETA2) * m + scalar(s, ONE_MINUS_BETA2) * g
    return p, m, v, x


@triton.jit
def ano(s, alpha, p, g, m, v, x):
    square = g * g
    m = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * g
    v = scalar(s, BETA2) * v + scalar(s, ONE_MINUS_BETA2) * sign(square - v) * square
    p = p - tl.div_rn(scalar(s, LR) * tl.abs(g), tl.sqrt_rn(v + scalar(s, EPS))) * sign(m)
    return p, m, v, x


@triton.jit
def grams(s, alpha, p, g, m, v, x):
    m = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * g
    v = scalar(s, BETA2) * v + scalar(s, ONE_MINUS_BETA2) * g * g
    p = p - tl.div_rn(scalar(s, LR) * tl.abs(m), tl.sqrt_rn(v) + scalar(s, EPS)) * sign(g)
    return p, m, v, x


@triton.jit
def ada_momentum(s, alpha, p, g, m, v, x):
    m = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * g
    v = scalar(s, BETA2) * v + scalar(s, ONE_MINUS_BETA2) * m * m + scalar(s, EPS)
    p = p - tl.div_rn(scalar(s, LR) * m, tl.sqrt_rn(v))
    return p, m, v, x


@triton.jit
def laprop(s, alpha, p, g, m, v, x):
    v = scalar(s, BETA2) * v + scalar(s, ONE_MINUS_BETA2) * g * g
    normalized = tl.div_rn(g, tl.sqrt_rn(v) + scalar(s, EPS))
    m = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * normalized
    p = p - scalar(s, LR) * m
    m = tl.where((m <= scalar(s, UPPER)) & (m >= -scalar(s, UPPER)), m, 0.0)
    return p, m, v, x


@triton.jit
def adopt(s, alpha, p, g, m, v, x):
    upper = scalar(s, UPPER)
    normalized = clamped(tl.div_rn(g, at_least(tl.sqrt_rn(v), scalar(s, EPS))), -upper, upper)
    m = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * tl.where(upper > 0.0, normalized, 0.0)
    v = scalar(s, BETA2) * v + scalar(s, ONE_MINUS_BETA2) * g * g
    p = p - scalar(s, LR) * m
    return p, m, v, x


@triton.jit
def bounded_rate(s, v):
    rate = tl.full(v.shape, 0.0, tl.float32) + scalar(s, LR)
    return clamped(tl.div_rn(rate, tl.sqrt_rn(v) + scalar(s, EPS)), scalar(s, LOWER), scalar(s, UPPER))


@triton.jit
def ada_bound(s, alpha, p, g, m, v, x):
    m = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * g
    v = scalar(s, BETA2) * v + scalar(s, ONE_MINUS_BETA2) * g * g
    p = p - bounded_rate(s, v) * m
    return p, m, v, x


@triton.jit
def ams_bound(s, alpha, p, g, m, v, x):
    m = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * g
    v = scalar(s, BETA2) * v + scalar(s, ONE_MINUS_BETA2) * g * g
    x = tl.where(v > x, v, tl.where(v == v, x, v))
    p = p - bounded_rate(s, x) * m
    return p, m, v, x


@triton.jit
def ademamix(s, alpha, p, g, m, v, x):
    m = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * g
    v = scalar(s, BETA2) * v + scalar(s, ONE_MINUS_BETA2) * g * g
    x = scalar(s, BETA3) * x + scalar(s, ONE_MINUS_BETA3) * g
    root = divided(tl.sqrt_rn(v), scalar(s, BIAS_CORRECTION))
    p = p - tl.div_rn(scalar(s, LR) * m + scalar(s, MIX) * x, root + scalar(s, EPS))
    return p, m, v, x


@triton.jit
def move_both(s, step, y, z):
    step = step + scalar(s, SHRINKING) * y
    y = y + (scalar(s, AVERAGING) * (z - y) - scalar(s, ONE_MINUS_BETA1) * step)
    return y, z - step


@triton.jit
def schedule_free_adamw(s, alpha, p, g, m, v, x):
    v = scalar(s, BETA2) * v + scalar(s, ONE_MINUS_BETA2) * g * g
    p, m = move_both(s, tl.div_rn(scalar(s, LR) * g, tl.sqrt_rn(v) + scalar(s, EPS)), p, m)
    return p, m, v, x


@triton.jit
def schedule_free_sign(s, alpha, p, g, m, v, x):
    p, m = move_both(s, scalar(s, LR) * gated_sign(g, alpha), p, m)
    return p, m, v, x


@triton.jit
def corrected(s, g, x):
    """The gradient as MARS has it."""
    return g + scalar(s, CORRECTION) * (g - x)


@triton.jit
def mars_adamw(s, alpha, p, g, m, v, x):
    longer = tl.full(g.shape, 0.0, tl.float32) + alpha
    one = tl.full(g.shape, 1.0, tl.float32)
    c = corrected(s, g, x) * tl.where(longer > 1.0, tl.div_rn(one, longer), one)
    m = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * c
    v = scalar(s, BETA2) * v + scalar(s, ONE_MINUS_BETA2) * c * c
    p = p - tl.div_rn(scalar(s, LR) * m, tl.sqrt_rn(v) + scalar(s, EPS))
    return p, m, v, g


@triton.jit
def focus(s, alpha, p, g, m, v, x):
    v = scalar(s, BETA1) * v + scalar(s, ONE_MINUS_BETA1) * g
    m = tl.where(scalar(s, AVERAGING) == 1.0, p, m + scalar(s, AVERAGING) * (p - m))
    step = scalar(s, LR) * sign(v) + scalar(s, MIX) * sign(p - m) + scalar(s, SHRINKING) * m
    return p - step, m, v, x
