"""Every update rule's twin: fp32 tensors ``p, g, m, v``, and ``s``, the address of the group's row of scalars.

As in csrc/rules.h: each operation rounds once, in the order written. ``tl.div_rn`` and ``tl.sqrt_rn``, because ``/``
and ``tl.sqrt`` compile to approximations; ``g * -1.0``, because ``-g`` compiles to ``0 - g`` and loses the sign of
zero.
"""

import triton
import triton.language as tl
from signadam_ext._C import SCALARS

LR = tl.constexpr(SCALARS.index("lr"))
WEIGHT_DECAY = tl.constexpr(SCALARS.index("weight_decay"))
DECAY = tl.constexpr(SCALARS.index("decay"))
COUPLED = tl.constexpr(SCALARS.index("coupled"))
MAXIMIZE = tl.constexpr(SCALARS.index("maximize"))
ALPHA = tl.constexpr(SCALARS.index("alpha"))
BETA1 = tl.constexpr(SCALARS.index("beta1"))
ONE_MINUS_BETA1 = tl.constexpr(SCALARS.index("one_minus_beta1"))
BETA2 = tl.constexpr(SCALARS.index("beta2"))
ONE_MINUS_BETA2 = tl.constexpr(SCALARS.index("one_minus_beta2"))
EPS = tl.constexpr(SCALARS.index("eps"))
DENOMINATOR = tl.constexpr(SCALARS.index("denominator"))
CONFIDENCE_BETA = tl.constexpr(SCALARS.index("confidence_beta"))
ONE_MINUS_CONFIDENCE_BETA = tl.constexpr(SCALARS.index("one_minus_confidence_beta"))
SCALAR_COUNT = tl.constexpr(len(SCALARS))


@triton.jit
def scalar(s, INDEX: tl.constexpr):
    """A scalar where it meets a tensor: rounded to fp32 once."""
    return tl.load(s + INDEX).to(tl.float32)


@triton.jit
def sign(x):
    return tl.where(x > 0.0, 1.0, 0.0) - tl.where(x < 0.0, 1.0, 0.0)


@triton.jit
def gated_sign(g, alpha):
    return tl.where(g > alpha, 1.0, 0.0) - tl.where(g < -alpha, 1.0, 0.0)


@triton.jit
def effective_gradient(s, p, g):
    if tl.load(s + MAXIMIZE) != 0.0:
        g = g * -1.0
    if tl.load(s + COUPLED) != 0.0:
        g = g + scalar(s, WEIGHT_DECAY) * p
    return g


@triton.jit
def sign_sgd(s, alpha, p, g, m, v):
    p = p - scalar(s, LR) * gated_sign(g, alpha)
    return p, m, v


@triton.jit
def signum(s, alpha, p, g, m, v):
    m = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * g
    p = p - scalar(s, LR) * sign(m)
    return p, m, v


@triton.jit
def sign_adam(s, alpha, p, g, m, v):
    c = sign(g)
    m = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * c
    v = scalar(s, BETA2) * v + scalar(s, ONE_MINUS_BETA2) * c * c
    p = p - tl.div_rn(scalar(s, LR) * m, tl.sqrt_rn(v) + scalar(s, EPS))
    return p, m, v


@triton.jit
def sign_adam_analytic(s, alpha, p, g, m, v):
    m = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * sign(g)
    numerator = scalar(s, LR) * m
    p = p - tl.div_rn(numerator, tl.full(numerator.shape, 0.0, tl.float32) + scalar(s, DENOMINATOR))
    return p, m, v


@triton.jit
def sign_adam_pp(s, alpha, p, g, m, v):
    m = scalar(s, BETA1) * m + scalar(s, ONE_MINUS_BETA1) * gated_sign(g, alpha)
    p = p - scalar(s, LR) * m
    return p, m, v
