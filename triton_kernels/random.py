"""Counter-based random bits, as in csrc/core/random.h: a function of seed, tensor, step and element."""

import triton
import triton.language as tl

from .threshold import CHUNK, LANES


@triton.jit
def mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def random_word(k0, k1, pair):
    """One word serves two elements: its low half the even one, its high half the odd one."""
    x = pair ^ k0
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x = (x ^ k1) * 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def has_whole_words(first_element):
    """Whether no word of the chunk that begins there serves another, and all of them have the same keys."""
    return (first_element % 2 == 0) & (first_element >> 33 == (first_element + CHUNK - 1) >> 33)


@triton.jit
def random_halves(h0, h1, first_element, row, WIDE: tl.constexpr):
    """The 16 random bits of each element of a row.

    Args:
        h0, h1: uint32, the keys of the tensor at this step before the element's high bits have entered.
        first_element: int64, index of the chunk's first element in the unsharded tensor.
        row: of the chunk.
        WIDE: see :func:`has_whole_words`.
    """
    high = (first_element >> 33).to(tl.uint32)
    k0, k1 = mix(h0 ^ high), mix(h1 ^ high)
    begin = (first_element >> 1).to(tl.uint32)
    pair = begin + (tl.arange(0, LANES // 2) + row * (LANES // 2)).to(tl.uint32)
    if WIDE:
        word = random_word(k0, k1, pair)
        return tl.interleave(word & 0xFFFF, word >> 16)
    else:
        # Where the low bits of a pair's index have wrapped around, its high bits are the next.
        next_k0, next_k1 = mix(h0 ^ (high + 1)), mix(h1 ^ (high + 1))
        odd = (first_element & 1).to(tl.uint32)
        after = pair + odd
        word = random_word(tl.where(pair < begin, next_k0, k0), tl.where(pair < begin, next_k1, k1), pair)
        next_word = random_word(tl.where(after < begin, next_k0, k0), tl.where(after < begin, next_k1, k1), after)
        return tl.interleave((word >> (16 * odd)) & 0xFFFF, (next_word >> (16 - 16 * odd)) & 0xFFFF)


@triton.jit
def place_of(first, lanes, run, stride, count, outer_stride):
    """Where a row of elements of a part lies in the whole tensor, from the part's first on: ShardIndex in Python.

    Args:
        first: int64, index in the part of the row's first element.
        lanes: int32, the elements after it.
        run, stride, count, outer_stride: int64. Runs and counts are below 2^30, so that elements divide 32-bit numbers.
    """
    number = first // run
    within = (first % run).to(tl.int32) + lanes
    runs = within // run.to(tl.int32)
    within = within % run.to(tl.int32)
    place = (number + runs) * stride
    if count != 0:
        of_count = (number % count).to(tl.int32) + runs
        outer = number // count + of_count // count.to(tl.int32)
        place = outer * outer_stride + (of_count % count.to(tl.int32)) * stride
    return place + within


@triton.jit
def random_halves_at(h0, h1, place):
    """The 16 random bits of elements anywhere.

    Args:
        h0, h1: uint32, as of :func:`random_halves`.
        place: int64, indices in the unsharded tensor.
    """
    high = (place >> 33).to(tl.uint32)
    word = random_word(mix(h0 ^ high), mix(h1 ^ high), (place >> 1).to(tl.uint32))
    return (word >> (16 * (place & 1).to(tl.uint32))) & 0xFFFF


@triton.jit
def bits_for_m(r):
    return ((r << 8) | (r >> 8)) & 0xFFFF


@triton.jit
def bits_for_v(r):
    return bits_for_m(r) ^ 0xFFFF


@triton.jit
def bits_for_aux(r):
    return r ^ 0xFFFF
