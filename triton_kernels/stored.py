"""Parameters and moments in every storage form, by rows of a chunk.

``WIDE`` everywhere: the operand lies on a 16-byte boundary and the chunk is full.
"""

import triton
import triton.language as tl

from .formats import (
    BF16,
    BLOCK8,
    FP32,
    INT2,
    INT4,
    INT8,
    MASTER,
    SPLIT8,
    SPLIT16,
    STOCHASTIC,
    block_code,
    block_exponent,
    finite_order,
    from_block_code,
    from_master,
    join,
    narrow,
    narrow_stochastic,
    power_of_two,
    split8,
    split16,
    stochastic_integer,
    widen,
)
from .threshold import LANES

# Codes lie in storage that is padded to runs of this many; those of block8 share an exponent.
RUN = tl.constexpr(32)
RUNS = tl.constexpr(LANES.value // 32)  # in a row

# How what is read once is loaded: as `ld.cs` where Triton can say so, from 3.8 on, or else first to be evicted.
KNOWS_STREAMED_LOADS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
LOAD_CACHE_MODIFIER = tl.constexpr(".cs" if KNOWS_STREAMED_LOADS else "")
LOAD_EVICTION_POLICY = tl.constexpr("" if KNOWS_STREAMED_LOADS else "evict_first")


@triton.jit
def pointer_to(address, begin, TYPE: tl.constexpr, WIDE: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE)) + begin
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def operand(address, begin, FORMAT: tl.constexpr, WIDE: tl.constexpr):
    """Where a chunk's elements lie; 16-bit formats as their bits, packed codes as bytes."""
    if FORMAT == FP32:
        return pointer_to(address, begin, tl.float32, WIDE)
    elif (FORMAT == INT8) | (FORMAT == BLOCK8):
        return pointer_to(address, begin, tl.int8, WIDE)
    elif FORMAT == INT4:
        return pointer_to(address, begin // 2, tl.uint8, WIDE)
    elif FORMAT == INT2:
        return pointer_to(address, begin // 4, tl.uint8, WIDE)
    else:
        return pointer_to(address, begin, tl.uint16, WIDE)


@triton.jit
def residual_operand(address, begin, PARAM_STORAGE: tl.constexpr, WIDE: tl.constexpr):
    """Where the residual of a chunk of the parameter lies."""
    if PARAM_STORAGE == MASTER:
        return pointer_to(address, begin, tl.float32, WIDE)
    elif PARAM_STORAGE == SPLIT16:
        return pointer_to(address, begin, tl.int16, WIDE)
    else:
        return pointer_to(address, begin, tl.int8, WIDE)


@triton.jit
def load(pointer, index, count, WIDE: tl.constexpr):
    if WIDE:
        return tl.load(pointer + index, cache_modifier=LOAD_CACHE_MODIFIER, eviction_policy=LOAD_EVICTION_POLICY)
    else:
        return tl.load(pointer + index, mask=index < count, other=0)


@triton.jit
def store(pointer, index, x, count, WIDE: tl.constexpr):
    if WIDE:
        tl.store(pointer + index, x, cache_modifier=".cs")
    else:
        tl.store(pointer + index, x, mask=index < count)


@triton.jit
def load_param(param, residual, index, count, PARAM: tl.constexpr, PARAM_STORAGE: tl.constexpr, WIDE: tl.constexpr):
    high = load(param, index, count, WIDE)
    if PARAM_STORAGE == MASTER:
        return from_master(high, load(residual, index, count, WIDE), PARAM)
    elif PARAM_STORAGE == SPLIT16:
        return join(high, load(residual, index, count, WIDE).to(tl.int32))
    elif PARAM_STORAGE == SPLIT8:
        return join(high, load(residual, index, count, WIDE).to(tl.int32) * 256)
    else:
        return widen(high, PARAM)


@triton.jit
def store_param(
    param, residual, index, p, r, count, PARAM: tl.constexpr, PARAM_STORAGE: tl.constexpr, WIDE: tl.constexpr
):
    """``r``: the elements' random bits, of the stochastic and the split8 form."""
    if PARAM_STORAGE == STOCHASTIC:
        store(param, index, narrow_stochastic(p, r, PARAM), count, WIDE)
    elif PARAM_STORAGE == SPLIT16:
        high, rest = split16(p)
        store(param, index, high, count, WIDE)
        store(residual, index, rest, count, WIDE)
    elif PARAM_STORAGE == SPLIT8:
        high, rest = split8(p, r >> 8)
        store(param, index, high, count, WIDE)
        store(residual, index, rest, count, WIDE)
    else:
        store(param, index, narrow(p, PARAM), count, WIDE)
        if PARAM_STORAGE == MASTER:
            store(residual, index, p, count, WIDE)


@triton.jit
def load_moment(moment, exponents, row, count, FORMAT: tl.constexpr, WIDE: tl.constexpr):
    """A row of a moment; codes of a bounded one in units of 1 / L."""
    PER_BYTE: tl.constexpr = 4 if FORMAT == INT2 else 2 if FORMAT == INT4 else 1
    index = tl.arange(0, LANES // PER_BYTE) + row * (LANES // PER_BYTE)
    x = load(moment, index, (count + PER_BYTE - 1) // PER_BYTE, WIDE)
    if FORMAT == INT8:
        return x.to(tl.float32)
    elif FORMAT == BLOCK8:
        e = load(exponents, tl.arange(0, RUNS) + row * RUNS, (count + RUN - 1) // RUN, WIDE).to(tl.int32)
        q = tl.reshape(x.to(tl.int32), [RUNS, RUN])
        return tl.reshape(from_block_code(q, power_of_two(e)[:, None]), [LANES])
    elif PER_BYTE > 1:
        # Each code is moved to the top of a word, and brought down with its sign.
        BITS: tl.constexpr = 8 // PER_BYTE
        up = 32 - BITS - BITS * tl.arange(0, PER_BYTE)
        q = (x.to(tl.int32)[:, None] << up[None, :]) >> (32 - BITS)
        return tl.reshape(q, [LANES]).to(tl.float32)
    else:
        return widen(x, FORMAT)


@triton.jit
def store_moment(moment, exponents, row, x, r, count, FORMAT: tl.constexpr, WIDE: tl.constexpr):
    """``r``: the moment's random bits, unless it is fp32. Beyond ``count``, the last byte's codes are zero like their
    gradients."""
    PER_BYTE: tl.constexpr = 4 if FORMAT == INT2 else 2 if FORMAT == INT4 else 1
    index = tl.arange(0, LANES // PER_BYTE) + row * (LANES // PER_BYTE)
    if FORMAT == FP32:
        store(moment, index, x, count, WIDE)
    elif FORMAT == BF16:
        store(moment, index, narrow_stochastic(x, r, BF16), count, WIDE)
    elif FORMAT == INT8:
        store(moment, index, stochastic_integer(x, r).to(tl.int8), count, WIDE)
    elif FORMAT == BLOCK8:
        runs = tl.reshape(x, [RUNS, RUN])
        e = block_exponent(tl.max(finite_order(runs), axis=1))
        q = block_code(runs, power_of_two(-e)[:, None], tl.reshape(r, [RUNS, RUN]))
        store(moment, index, tl.reshape(q.to(tl.int8), [LANES]), count, WIDE)
        store(exponents, tl.arange(0, RUNS) + row * RUNS, e.to(tl.int8), (count + RUN - 1) // RUN, WIDE)
    else:
        BITS: tl.constexpr = 8 // PER_BYTE
        q = stochastic_integer(x, r) & ((1 << BITS) - 1)
        up = BITS * tl.arange(0, PER_BYTE)
        packed = tl.sum(tl.reshape(q, [LANES // PER_BYTE, PER_BYTE]) << up[None, :], axis=1)
        store(moment, index, packed.to(tl.uint8), (count + PER_BYTE - 1) // PER_BYTE, WIDE)
