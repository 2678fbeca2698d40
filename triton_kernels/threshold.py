"""What moves a threshold: sums over a gradient, in the order of additions that all backends share."""

import triton
import triton.language as tl

from signadam_ext.core.native import compiled as _C

from .rules import CONFIDENCE_BETA, GAIN, ONE_MINUS_CONFIDENCE_BETA, QUANTILE, STEERS, TARGET

LANES = tl.constexpr(_C.LANES)
ROWS = tl.constexpr(_C.ROWS)
CHUNK = tl.constexpr(_C.CHUNK_SIZE)
LEAST_SCALE = tl.constexpr(_C.LEAST_SCALE)


@triton.jit
def halve(x):
    """``x[:h] + x[h:]`` for h = 1024, 512, ..., 1."""
    for level in tl.static_range(11):
        x = tl.sum(tl.reshape(x, [2, 1024 >> level]), axis=0)
    return tl.sum(x, axis=0)


@triton.jit
def is_finite(x):
    return x - x == 0.0


@triton.jit
def exponential(x):
    """e^x for |x| <= 1: its series, since the libraries' exponentials differ in their last bits."""
    total = x * 0.0 + 1.0
    for i in tl.static_range(18):
        total = 1.0 + x * total / (total * 0.0 + (18.0 - i))
    return total


@triton.jit
def add_up(sums, count, PAIRS: tl.constexpr):
    """Chunk sums at ``sums`` go through the chunk procedure until one is left there, or where they are pairs, one."""
    WIDTH: tl.constexpr = 2 if PAIRS else 1
    lanes = tl.arange(0, LANES)
    while count > 1:
        following = (count + CHUNK - 1) // CHUNK
        k = count * 0
        while k < following:
            first = tl.zeros([LANES], tl.float64)
            second = tl.zeros([LANES], tl.float64)
            for row in range(ROWS):
                index = k * CHUNK + row * LANES + lanes
                first += tl.load(sums + WIDTH * index, mask=index < count, other=0.0, cache_modifier=".cg")
                if PAIRS:
                    second += tl.load(sums + WIDTH * index + 1, mask=index < count, other=0.0, cache_modifier=".cg")
            first_sum, second_sum = halve(first), halve(second)
            tl.debug_barrier()
            tl.store(sums + WIDTH * k, first_sum)
            if PAIRS:
                tl.store(sums + WIDTH * k + 1, second_sum)
            tl.debug_barrier()
            k += 1
        count = following


@triton.jit
def update_scale(state, CAUTIOUS: tl.constexpr):
    """What steps are multiplied by, of the share of entries that agree or the parameter's root mean square."""
    size = tl.where(state < LEAST_SCALE, LEAST_SCALE, state)
    if CAUTIOUS:
        size = tl.where(state == 0.0, 1.0, 1.0 / size)
    return size.to(tl.float32)


@triton.jit
def finish(sums, count, numel, a, threshold_state, s, SCALE: tl.constexpr):
    """The sum of the chunk sums at ``sums`` moves the gate from ``a``.

    Args:
        threshold_state: address of the gate.
        s: address of the group's scalars.
        SCALE: as of ``update``.
    """
    add_up(sums, count, True)
    first_sum = tl.load(sums, cache_modifier=".cg")
    second_sum = tl.load(sums + 1, cache_modifier=".cg")
    if is_finite(first_sum) and is_finite(second_sum):
        n = numel.to(tl.float64)
        if SCALE is not None:
            if SCALE == "caution":
                # No share at all, as where the learning rate is 0, tells nothing.
                tl.store(threshold_state, tl.where(first_sum == 0.0, a, first_sum / n))
            else:
                tl.store(threshold_state, tl.sqrt(second_sum / n))
        elif tl.load(s + STEERS) != 0.0:
            if second_sum != 0.0:
                size = tl.sqrt(second_sum / n)
                moved = a * exponential(tl.load(s + GAIN) * (first_sum / n - tl.load(s + TARGET)))
                low, high = size * 9.5367431640625e-07, size * 1048576.0  # 2^-20 and 2^20
                moved = tl.where(moved < low, low, tl.where(moved > high, high, moved))
                tl.store(threshold_state, tl.where(a == 0.0, size * tl.load(s + QUANTILE), moved))
        else:
            mean = first_sum / n
            variance = second_sum / n - mean * mean
            deviation = tl.sqrt(tl.where(variance > 0.0, variance, 0.0))
            tl.store(
                threshold_state, tl.load(s + CONFIDENCE_BETA) * a + tl.load(s + ONE_MINUS_CONFIDENCE_BETA) * deviation
            )
