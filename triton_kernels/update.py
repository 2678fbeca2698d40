"""One launch over all tensors of a bucket: a program takes one chunk of 8 rows of 2048 elements."""

import triton
import triton.language as tl

from .dtypes import FP32, narrow, pointer_to, widen
from .rules import ALPHA, DECAY, SCALAR_COUNT, effective_gradient, scalar
from .statistics import CHUNK, LANES, ROWS, finish, halve

# Columns of the table of tensors, one int64 each.
COLUMNS = ("param", "exp_avg", "exp_avg_sq", "exp_avg_std", "numel", "first_chunk", "aligned", "unused")
COLUMN_COUNT = tl.constexpr(8)

# As signadam_ext._C.Statistics.
NONE = tl.constexpr(0)
GATHER = tl.constexpr(1)
ONLY = tl.constexpr(2)


@triton.jit
def operand(address, begin, FORMAT: tl.constexpr, WIDE: tl.constexpr):
    pointer = pointer_to(address, FORMAT) + begin
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load(pointer, index, count, FORMAT: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        x = tl.load(pointer + index, cache_modifier=".cs")
    else:
        x = tl.load(pointer + index, mask=index < count, other=0)
    return widen(x, FORMAT)


@triton.jit
def store(pointer, index, x, count, FORMAT: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        tl.store(pointer + index, narrow(x, FORMAT), cache_modifier=".cs")
    else:
        tl.store(pointer + index, narrow(x, FORMAT), mask=index < count)


@triton.jit
def run_rows(
    entry,
    grad,
    begin,
    count,
    s,
    alpha,
    RULE: tl.constexpr,
    MOMENTS: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATISTICS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The rows of one chunk. ``WIDE``: every operand lies on a 16-byte boundary and the chunk is full."""
    param = operand(tl.load(entry), begin, PARAM, WIDE)
    g_from = operand(grad, begin, GRAD, WIDE)
    exp_avg = operand(tl.load(entry + 1), begin, FP32, WIDE)
    exp_avg_sq = operand(tl.load(entry + 2), begin, FP32, WIDE)
    first = tl.zeros([LANES], tl.float64)
    second = tl.zeros([LANES], tl.float64)
    lanes = tl.arange(0, LANES)
    decay = scalar(s, DECAY)
    for row in range(ROWS):
        index = row * LANES + lanes
        g = load(g_from, index, count, GRAD, WIDE)
        p = load(param, index, count, PARAM, WIDE)
        m = p
        v = p
        if MOMENTS > 0:
            m = load(exp_avg, index, count, FP32, WIDE)
        if MOMENTS > 1:
            v = load(exp_avg_sq, index, count, FP32, WIDE)
        g = effective_gradient(s, p, g)
        if STATISTICS != NONE:
            # Padding is +0 whatever the parameter beside it.
            x = tl.where(index < count, g, 0.0).to(tl.float64)
            first += x
            second += x * x
        if STATISTICS != ONLY:
            p, m, v = RULE(s, alpha, p * decay, g, m, v)
            store(param, index, p, count, PARAM, WIDE)
            if MOMENTS > 0:
                store(exp_avg, index, m, count, FP32, WIDE)
            if MOMENTS > 1:
                store(exp_avg_sq, index, v, count, FP32, WIDE)
    return first, second


@triton.jit
def update(
    entries,
    tensor_of_chunk,
    grads,
    rows,
    scalars,
    sums,
    arrivals,
    RULE: tl.constexpr,
    MOMENTS: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """All chunks of a table.

    Args:
        entries: int64 ``[tensors, 8]``, see ``COLUMNS``.
        tensor_of_chunk: int32, the tensor of each chunk; one program a chunk.
        grads: int64, address of each tensor's gradient, 0 where it takes no part.
        rows: int32, each tensor's row of ``scalars``.
        scalars: float64 ``[rows, SCALAR_COUNT]``.
        sums: float64, S1 and S2 of each chunk; unused without statistics.
        arrivals: int32, finished chunks of each tensor, zero between launches; unused without statistics.
        RULE: a function of rules.py; MOMENTS: how many it has; PARAM, GRAD: formats; STATISTICS: NONE, GATHER or ONLY.
    """
    chunk = tl.program_id(0)
    tensor = tl.load(tensor_of_chunk + chunk)
    grad = tl.load(grads + tensor)
    if grad != 0:
        entry = entries + tensor * COLUMN_COUNT
        s = scalars + tl.load(rows + tensor) * SCALAR_COUNT
        numel = tl.load(entry + 4)
        begin = (chunk - tl.load(entry + 5)).to(tl.int64) * CHUNK
        count = tl.minimum(numel - begin, CHUNK).to(tl.int32)
        deviation = tl.load(entry + 3)
        alpha = scalar(s, ALPHA)
        if STATISTICS != ONLY:
            if deviation != 0:
                alpha = (tl.load(s + ALPHA) * tl.load(deviation.to(tl.pointer_type(tl.float64)))).to(tl.float32)
        first = tl.zeros([LANES], tl.float64)
        second = tl.zeros([LANES], tl.float64)
        if (count == CHUNK) & (tl.load(entry + 6) != 0) & (grad % 16 == 0):
            first, second = run_rows(
                entry, grad, begin, count, s, alpha, RULE, MOMENTS, PARAM, GRAD, STATISTICS, WIDE=True
            )
        else:
            first, second = run_rows(
                entry, grad, begin, count, s, alpha, RULE, MOMENTS, PARAM, GRAD, STATISTICS, WIDE=False
            )
        if STATISTICS != NONE:
            tl.store(sums + 2 * chunk, halve(first))
            tl.store(sums + 2 * chunk + 1, halve(second))
            # Every thread's reads of the threshold and the sums above come before the count.
            tl.debug_barrier()
            chunks = ((numel + CHUNK - 1) // CHUNK).to(tl.int32)
            arrived = tl.atomic_add(arrivals + tensor, 1, sem="acq_rel", scope="gpu")
            if arrived == chunks - 1:
                tl.store(arrivals + tensor, 0)
                own = sums + 2 * tl.load(entry + 5)
                finish(own, chunks.to(tl.int64), numel, deviation.to(tl.pointer_type(tl.float64)), s)
