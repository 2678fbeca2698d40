"""Storage formats <-> fp32. Interpreted, bf16 by integer operations: the interpreter's own conversions truncate."""

import triton
import triton.language as tl

from signadam_ext.core.native import compiled as _C

FORMATS, PARAM_STORAGES = _C.FORMATS, _C.PARAM_STORAGES

FP32 = tl.constexpr(FORMATS["fp32"][0])
BF16 = tl.constexpr(FORMATS["bf16"][0])
FP16 = tl.constexpr(FORMATS["fp16"][0])
INT8 = tl.constexpr(FORMATS["int8"][0])
INT4 = tl.constexpr(FORMATS["int4"][0])
INT2 = tl.constexpr(FORMATS["int2"][0])
BLOCK8 = tl.constexpr(FORMATS["block8"][0])

NEAREST = tl.constexpr(PARAM_STORAGES["nearest"])
STOCHASTIC = tl.constexpr(PARAM_STORAGES["stochastic"])
SPLIT16 = tl.constexpr(PARAM_STORAGES["split16"])
SPLIT8 = tl.constexpr(PARAM_STORAGES["split8"])
MASTER = tl.constexpr(PARAM_STORAGES["master"])

NAN_CODE = tl.constexpr(-128)


@triton.jit
def bits_of(x):
    return x.to(tl.uint32, bitcast=True)


INTERPRETED = tl.constexpr(not isinstance(bits_of, triton.JITFunction))


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def is_nan(bits):
    return (bits & 0x7FFFFFFF) > 0x7F800000


@triton.jit
def widen(x, FORMAT: tl.constexpr):
    """16-bit formats from their bits."""
    if FORMAT == BF16:
        if INTERPRETED:
            return float_of(x.to(tl.uint32) << 16)
        else:
            return x.to(tl.bfloat16, bitcast=True).to(tl.float32)
    elif FORMAT == FP16:
        return x.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return x


@triton.jit
def narrow(x, FORMAT: tl.constexpr):
    """To nearest even."""
    if FORMAT == BF16:
        if INTERPRETED:
            bits = bits_of(x)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return tl.where(is_nan(bits), 0x7FC0, rounded).to(tl.uint16)
        else:
            return x.to(tl.bfloat16).to(tl.uint16, bitcast=True)
    elif FORMAT == FP16:
        return x.to(tl.float16).to(tl.uint16, bitcast=True)
    else:
        return x


@triton.jit
def narrow_stochastic(x, r, FORMAT: tl.constexpr):
    """Up with the probability that is the fraction cut off. ``r`` is uniform in 16 bits.

    A NaN must be the result of arithmetic, or come from FORMAT: then its upper half is one too.
    """
    bits = bits_of(x)
    if FORMAT == BF16:
        return (tl.where(x == x, bits + r, bits) >> 16).to(tl.uint16)
    else:
        # In units of the result's own last place; overflow gives infinity only above 65520.
        magnitude = bits & 0x7FFFFFFF
        normal = (magnitude - (112 << 23) + (r >> 3)) >> 13
        # Below 2^-14 the last place is 2^-24: in units of 2^-40 this fits an integer.
        is_small = magnitude < 0x38800000
        small = tl.where(is_small, float_of(magnitude) * 1099511627776.0, 0.0)
        subnormal = (small.to(tl.int32).to(tl.uint32) + r) >> 16
        large = tl.where(is_nan(bits), 0x7E00, 0x7C00)
        rounded = tl.where(is_small, subnormal, normal)
        finite = tl.where((magnitude <= 0x477FF000) & (rounded >= 0x7C00), 0x7BFF, rounded)
        return (((bits >> 16) & 0x8000) | tl.where(magnitude >= 0x47800000, large, finite)).to(tl.uint16)


@triton.jit
def stochastic_integer(x, r):
    """The integer next to x, up with the probability of the fraction; |x| at most 127 or a rounding more."""
    return ((x * 65536.0).to(tl.int32) + r.to(tl.int32)) >> 16


@triton.jit
def split16(x):
    """A bf16 parameter and what fp32 has beyond it. Rounds half up: a tie to even would need 0x8000, which does not
    fit."""
    bits = bits_of(x)
    high = (bits + 0x8000) >> 16
    remainder = tl.where(x != x, 0, bits - (high << 16))
    return tl.where(x != x, 0x7FC0, high).to(tl.uint16), remainder.to(tl.int16)


@triton.jit
def split8(x, r):
    """Splits the 24 bits to which x is rounded stochastically by 8 random bits."""
    bits = bits_of(x)
    kept = (bits + r) >> 8
    high = (kept + 0x80) >> 8
    remainder = tl.where(x != x, 0, kept - (high << 8))
    return tl.where(x != x, 0x7FC0, high).to(tl.uint16), remainder.to(tl.int8)


@triton.jit
def join(high, remainder):
    """``remainder``, int32, in units of fp32's last place. A parameter set from outside may leave low bits behind that
    make a NaN of a zero or an infinity: the parameter wins."""
    bits = (high.to(tl.uint32) << 16) + remainder.to(tl.uint32, bitcast=True)
    return tl.where(is_nan(bits), widen(high, BF16), float_of(bits))


@triton.jit
def from_master(param, master, FORMAT: tl.constexpr):
    """A master copy counts only while the parameter is what it rounds to: a parameter set from outside wins."""
    return tl.where(narrow(master, FORMAT) == param, master, widen(param, FORMAT))


@triton.jit
def power_of_two(e):
    return float_of((e + 127) << 23)


@triton.jit
def finite_order(x):
    """A uint32 that grows with |x|, from 2^24 on; less where x is not finite: without its sign, it has wrapped."""
    return (bits_of(x) << 1) + 0x1000000


@triton.jit
def block_exponent(largest):
    """The smallest e in [-126, 120] with 127 * 2^e at least the largest finite magnitude of the block.

    Args:
        largest: :func:`finite_order` of it.
    """
    magnitude = (tl.maximum(largest, 0x1000000) - 0x1000000) >> 1
    e = ((magnitude.to(tl.int32, bitcast=True) + 0x1FFFF) >> 23) - 133
    return tl.minimum(tl.maximum(e, -126), 120)


@triton.jit
def block_code(x, inverse, r):
    """``inverse``: 2^-e. Infinities saturate."""
    scaled = tl.minimum(tl.maximum(x * inverse, -127.0), 127.0)
    return tl.where(x == x, stochastic_integer(scaled, r), NAN_CODE)


@triton.jit
def from_block_code(q, scale):
    return tl.where(q == NAN_CODE, float("nan"), q.to(tl.float32) * scale)
