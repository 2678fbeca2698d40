"""The squares of each gradient added up, in one launch over all tensors of a bucket: a program takes one chunk.

The sum is S2 of csrc/core/threshold.h of the gradient as it is, neither scaled nor decayed.
"""

import triton
import triton.language as tl

from .formats import widen
from .stored import load, operand
from .threshold import CHUNK, LANES, ROWS, add_up, halve
from .update import COLUMN_COUNT, FIRST_CHUNK_AT, NUMEL_AT


@triton.jit
def add_rows(grad, begin, count, GRAD: tl.constexpr, WIDE: tl.constexpr):
    """Squares of one chunk, added row by row. ``WIDE``: it is full, and the gradient lies on a 16-byte boundary."""
    at = operand(grad, begin, GRAD, WIDE)
    lanes = tl.arange(0, LANES)
    squares = tl.zeros([LANES], tl.float64)
    for row in range(ROWS if WIDE else (count + LANES - 1) // LANES):
        g = widen(load(at, row * LANES + lanes, count, WIDE), GRAD).to(tl.float64)
        squares += g * g
    return squares


# These may be parts of arrays that several buckets share: one kernel serves all of them.
@triton.jit(do_not_specialize_on_alignment=["grads", "totals", "places"])
def norm(entries, tensor_of_chunk, grads, sums, arrivals, totals, places, GRAD: tl.constexpr):
    """The sum of squares of each tensor that has a gradient; nothing is written of others.

    Args:
        entries, tensor_of_chunk, grads: as of :func:`update.update`.
        sums: float64, of each chunk.
        arrivals: int32, finished chunks of each tensor, zero between launches.
        totals: float64, where the sums of tensors go.
        places: int32, index in ``totals`` of each tensor.
        GRAD: format of the gradients.
    """
    chunk = tl.program_id(0)
    tensor = tl.load(tensor_of_chunk + chunk)
    grad = tl.load(grads + tensor)
    if grad != 0:
        entry = entries + tensor * COLUMN_COUNT
        numel = tl.load(entry + NUMEL_AT)
        first_chunk = tl.load(entry + FIRST_CHUNK_AT)
        begin = (chunk - first_chunk).to(tl.int64) * CHUNK
        count = tl.minimum(numel - begin, CHUNK).to(tl.int32)
        wide = (count == CHUNK) & (grad % 16 == 0)
        # Compiled twice, of which a chunk takes one.
        squares = tl.zeros([LANES], tl.float64)
        for WIDE in tl.static_range(2):
            if wide == (WIDE == 1):
                squares = add_rows(grad, begin, count, GRAD, WIDE == 1)
        tl.store(sums + chunk, halve(squares))
        # The sum above comes before the count.
        tl.debug_barrier()
        chunks = ((numel + CHUNK - 1) // CHUNK).to(tl.int32)
        arrived = tl.atomic_add(arrivals + tensor, 1, sem="acq_rel", scope="gpu")
        if arrived == chunks - 1:
            tl.store(arrivals + tensor, 0)
            own = sums + first_chunk
            add_up(own, chunks.to(tl.int64), False)
            tl.store(totals + tl.load(places + tensor), tl.load(own, cache_modifier=".cg"))
