"""One launch over all tensors of a bucket: a program takes one chunk of 8 rows of 2048 elements."""

import triton
import triton.language as tl

from signadam_ext.core.native import compiled as _C

from .formats import FP32, SPLIT8, STOCHASTIC, widen
from .random import bits_for_aux, bits_for_m, bits_for_v, has_whole_words, place_of, random_halves, random_halves_at
from .rules import (
    ALPHA,
    SCALAR_COUNT,
    STEERS,
    agreement,
    apply,
    apply_scaled,
    corrected,
    effective_gradient,
    passes,
    scalar,
    scalars_at,
)
from .stored import RUN, load, load_moment, load_param, operand, pointer_to, residual_operand, store_moment, store_param
from .threshold import CHUNK, LANES, ROWS, finish, halve, update_scale

# Columns of the table of tensors, one int64 each, as in csrc/core/table.h. ``aligned``: all but the gradient lie on
# 16-byte boundaries.
COLUMNS = (
    "param",
    "residual",
    "exp_avg",
    "exp_avg_sq",
    "aux",
    "threshold_state",
    "numel",
    "shard_offset",
    "shard_run",
    "shard_stride",
    "shard_count",
    "shard_outer_stride",
    "first_chunk",
    "aligned",
)
COLUMN_COUNT = tl.constexpr(len(COLUMNS))
PARAM_AT = tl.constexpr(COLUMNS.index("param"))
RESIDUAL_AT = tl.constexpr(COLUMNS.index("residual"))
EXP_AVG_AT = tl.constexpr(COLUMNS.index("exp_avg"))
EXP_AVG_SQ_AT = tl.constexpr(COLUMNS.index("exp_avg_sq"))
AUX_AT = tl.constexpr(COLUMNS.index("aux"))
THRESHOLD_STATE_AT = tl.constexpr(COLUMNS.index("threshold_state"))
NUMEL_AT = tl.constexpr(COLUMNS.index("numel"))
SHARD_OFFSET_AT = tl.constexpr(COLUMNS.index("shard_offset"))
SHARD_RUN_AT = tl.constexpr(COLUMNS.index("shard_run"))
SHARD_STRIDE_AT = tl.constexpr(COLUMNS.index("shard_stride"))
SHARD_COUNT_AT = tl.constexpr(COLUMNS.index("shard_count"))
SHARD_OUTER_STRIDE_AT = tl.constexpr(COLUMNS.index("shard_outer_stride"))
FIRST_CHUNK_AT = tl.constexpr(COLUMNS.index("first_chunk"))
ALIGNED_AT = tl.constexpr(COLUMNS.index("aligned"))

ThresholdPass = _C.ThresholdPass
NONE = tl.constexpr(ThresholdPass.NONE.value)
SAME_PASS = tl.constexpr(ThresholdPass.SAME_PASS.value)
PASS_BEFORE = tl.constexpr(ThresholdPass.PASS_BEFORE.value)


@triton.jit
def run_rows(
    entry,
    grad,
    rng_keys,
    numel,
    shard_offset,
    begin,
    count,
    s,
    alpha,
    scale,
    chunk_statistics,
    RULE: tl.constexpr,
    MOMENTS: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    AUX: tl.constexpr,
    READS_VARIANCE: tl.constexpr,
    PARAM_STORAGE: tl.constexpr,
    DRAWS: tl.constexpr,
    THRESHOLD_PASS: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    OBSERVES: tl.constexpr,
    RUNS: tl.constexpr,
    SCALE: tl.constexpr,
    STEERS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The rows of one chunk. ``STEERS``: what passes is counted, in place of a sum. ``WIDE``: every operand lies on a
    16-byte boundary, the chunk is full, and, where random bits are drawn, it has whole words."""
    param = operand(tl.load(entry + PARAM_AT), begin, PARAM, WIDE)
    residual = residual_operand(tl.load(entry + RESIDUAL_AT), begin, PARAM_STORAGE, WIDE)
    g_from = operand(grad, begin, GRAD, WIDE)
    exp_avg_at = tl.load(entry + EXP_AVG_AT)
    exp_avg = operand(exp_avg_at, begin, EXP_AVG, WIDE)
    exp_avg_sq = operand(tl.load(entry + EXP_AVG_SQ_AT), begin, EXP_AVG_SQ, WIDE)
    aux = operand(tl.load(entry + AUX_AT), begin, AUX, WIDE)
    # Those of block8 follow the codes.
    codes = (numel + RUN - 1) // RUN * RUN
    exponents = pointer_to(exp_avg_at + codes, begin // RUN, tl.int8, WIDE)
    h0 = tl.load(rng_keys).to(tl.uint32, bitcast=True)
    h1 = tl.load(rng_keys + 1).to(tl.uint32, bitcast=True)
    first = tl.zeros([LANES], tl.float64)
    second = tl.zeros([LANES], tl.float64)
    lanes = tl.arange(0, LANES)
    if RUNS:
        run, stride = tl.load(entry + SHARD_RUN_AT), tl.load(entry + SHARD_STRIDE_AT)
        run_count, outer_stride = tl.load(entry + SHARD_COUNT_AT), tl.load(entry + SHARD_OUTER_STRIDE_AT)
    if OBSERVES:
        passed = tl.zeros([LANES], tl.int32)
        squares = tl.zeros([LANES], tl.float64)
        passed_squares = tl.zeros([LANES], tl.float64)
        flips = tl.zeros([LANES], tl.int32)
        magnitude = tl.zeros([LANES], tl.float64)
    # Rows beyond the end would add +0 to lanes that are never -0.
    row_count = ROWS if WIDE else (count + LANES - 1) // LANES
    for row in range(row_count):
        index = row * LANES + lanes
        g = widen(load(g_from, index, count, WIDE), GRAD)
        p = load_param(param, residual, index, count, PARAM, PARAM_STORAGE, WIDE)
        m = p
        v = p
        x = p
        if MOMENTS > 0:
            m = load_moment(exp_avg, exponents, row, count, EXP_AVG, WIDE)
        if MOMENTS > 1:
            v = load_moment(exp_avg_sq, exponents, row, count, EXP_AVG_SQ, WIDE)
        if (MOMENTS > 2) | READS_VARIANCE:
            x = load_moment(aux, exponents, row, count, AUX, WIDE)
        g = effective_gradient(s, p, g)
        if SCALE == "norm":
            if THRESHOLD_PASS == PASS_BEFORE:
                wide_c = tl.where(index < count, corrected(s, g, x), 0.0).to(tl.float64)
                second += wide_c * wide_c
        elif SCALE is not None:
            before_p = p
            p, before_m = tl.full(p.shape, -0.0, tl.float32), m
            p, m, v, x = RULE(s, alpha, p, g, m, v, x)
            step = p
            p = before_p
            if THRESHOLD_PASS != NONE:
                if SCALE == "caution":
                    first += ((index < count) & agreement(step, g)).to(tl.float64)
                else:
                    wide_p = tl.where(index < count, p, 0.0).to(tl.float64)
                    second += wide_p * wide_p
        elif THRESHOLD_PASS != NONE:
            # Padding is +0 whatever the parameter beside it.
            inside = tl.where(index < count, g, 0.0)
            wide_g = inside.to(tl.float64)
            first += passes(inside, alpha).to(tl.float64) if STEERS else wide_g
            second += wide_g * wide_g
        if THRESHOLD_PASS != PASS_BEFORE:
            if OBSERVES:
                inside = tl.where(index < count, g, 0.0)
                square = inside.to(tl.float64) * inside.to(tl.float64)
                through = passes(inside, alpha)
                before = m if (SCALE is None) | (SCALE == "norm") else before_m
                passed += through.to(tl.int32)
                squares += square
                passed_squares += tl.where(through, square, 0.0)
            if CONFIDENCE is not None:
                g = CONFIDENCE(g, alpha)
            if SCALE is None:
                p, m, v, x = apply(s, alpha, p, g, m, v, x, RULE)
            elif SCALE == "norm":
                p, m, v, x = apply(s, scale, p, g, m, v, x, RULE)
            else:
                p = apply_scaled(s, scale, p, step, g, SCALE == "caution")
            if OBSERVES:
                if MOMENTS > 0:
                    after = tl.where(index < count, m, 0.0)
                    flips += (((before > 0.0) & (after < 0.0)) | ((before < 0.0) & (after > 0.0))).to(tl.int32)
                    magnitude += tl.abs(after).to(tl.float64)
            r = lanes
            if DRAWS:
                if RUNS:
                    place = place_of(begin + row * LANES, lanes, run, stride, run_count, outer_stride)
                    r = random_halves_at(h0, h1, shard_offset + place)
                else:
                    r = random_halves(h0, h1, shard_offset + begin, row, WIDE)
            store_param(param, residual, index, p, r, count, PARAM, PARAM_STORAGE, WIDE)
            if MOMENTS > 0:
                store_moment(exp_avg, exponents, row, m, bits_for_m(r), count, EXP_AVG, WIDE)
            if MOMENTS > 1:
                store_moment(exp_avg_sq, exponents, row, v, bits_for_v(r), count, EXP_AVG_SQ, WIDE)
            if MOMENTS > 2:
                store_moment(aux, exponents, row, x, bits_for_aux(r), count, AUX, WIDE)
    if OBSERVES:
        tl.store(chunk_statistics, tl.sum(passed.to(tl.float64), axis=0))
        tl.store(chunk_statistics + 1, tl.sum(squares, axis=0))
        tl.store(chunk_statistics + 2, tl.sum(passed_squares, axis=0))
        tl.store(chunk_statistics + 3, tl.sum(flips.to(tl.float64), axis=0))
        tl.store(chunk_statistics + 4, tl.sum(magnitude, axis=0))
        tl.store(chunk_statistics + 5, alpha.to(tl.float64))
    return first, second


@triton.jit
def update(
    entries,
    tensor_of_chunk,
    grads,
    rng_keys,
    scalar_indices,
    scalars,
    sums,
    arrivals,
    chunk_statistics,
    RULE: tl.constexpr,
    MOMENTS: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    AUX: tl.constexpr,
    READS_VARIANCE: tl.constexpr,
    PARAM_STORAGE: tl.constexpr,
    THRESHOLD_PASS: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    OBSERVES: tl.constexpr,
    RUNS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """All chunks of a table.

    Args:
        entries: int64 ``[tensors, COLUMN_COUNT]``, see ``COLUMNS``.
        tensor_of_chunk: int32, the tensor of each chunk; one program a chunk.
        grads: int64, address of each tensor's gradient, 0 where it takes no part.
        rng_keys: int32 ``[tensors, 2]``, the keys of each tensor's random bits at this step; unused where none are
            drawn.
        scalar_indices: int32, each tensor's set of ``scalars``.
        scalars: float64 ``[sets, SCALAR_COUNT]``.
        sums: float64, S1 and S2 of each chunk; unused without statistics.
        chunk_statistics: float64 ``[chunks, 6]``, as in csrc/core/table.h; unused unless OBSERVES.
        arrivals: int32, finished chunks of each tensor, zero between launches; unused without statistics.
        RULE: a function of rules.py; MOMENTS: how many it has.
        PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, AUX: formats, FP32 for what the rule lacks; PARAM_STORAGE: see formats.py.
        READS_VARIANCE: whether the auxiliary operand is the variance of the gradient, which is only read.
        THRESHOLD_PASS: NONE, SAME_PASS or PASS_BEFORE.
        CONFIDENCE: a function of the gradient and the threshold that takes the gradient's place, or None.
        OBSERVES: whether what optimizer.statistics() tells is gathered.
        RUNS: whether tensors are parts whose elements lie in several runs in the whole.
        SCALE: what the threshold is instead, a number that steps are multiplied by: "caution" or "rms"; or "norm", that
            of the corrected gradient over the largest allowed; or None.
    """
    chunk = tl.program_id(0)
    tensor = tl.load(tensor_of_chunk + chunk)
    grad = tl.load(grads + tensor)
    if grad != 0:
        entry = entries + tensor * COLUMN_COUNT
        scalar_set = scalars + tl.load(scalar_indices + tensor) * SCALAR_COUNT
        s = scalars_at(scalar_set)
        numel = tl.load(entry + NUMEL_AT)
        begin = (chunk - tl.load(entry + FIRST_CHUNK_AT)).to(tl.int64) * CHUNK
        count = tl.minimum(numel - begin, CHUNK).to(tl.int32)
        threshold_state = tl.load(entry + THRESHOLD_STATE_AT)
        # Read once, before anyone may replace it.
        deviation = tl.full((), 0.0, tl.float64)
        if threshold_state != 0:
            deviation = tl.load(threshold_state.to(tl.pointer_type(tl.float64)))
        alpha = scalar(s, ALPHA)
        scale = alpha
        if SCALE == "norm":
            alpha = alpha * 0.0
            if threshold_state != 0:
                scale = (tl.load(scalar_set + ALPHA) * deviation).to(tl.float32)
        elif SCALE is not None:
            scale = update_scale(deviation, SCALE == "caution")
        elif THRESHOLD_PASS == PASS_BEFORE:
            alpha = alpha * 0.0
        elif threshold_state != 0:
            alpha = (tl.load(scalar_set + ALPHA) * deviation).to(tl.float32)
        shard_offset = tl.load(entry + SHARD_OFFSET_AT)
        first = tl.zeros([LANES], tl.float64)
        second = tl.zeros([LANES], tl.float64)
        wide = (count == CHUNK) & (tl.load(entry + ALIGNED_AT) != 0) & (grad % 16 == 0)
        DRAWS: tl.constexpr = (
            (PARAM_STORAGE == STOCHASTIC)
            | (PARAM_STORAGE == SPLIT8)
            | (EXP_AVG != FP32)
            | (EXP_AVG_SQ != FP32)
            | (AUX != FP32)
        )
        if DRAWS & (THRESHOLD_PASS != PASS_BEFORE) & (not RUNS):
            wide = wide & has_whole_words(shard_offset + begin)
        # Compiled twice, or four times where gradients are summed; a chunk takes one of them.
        STEERABLE: tl.constexpr = (THRESHOLD_PASS != NONE) & (SCALE is None)
        for VARIANT in tl.static_range(4 if STEERABLE else 2):
            steers = scalar(s, STEERS) != 0.0 if STEERABLE else False
            if (wide == (VARIANT % 2 == 1)) & (steers == (VARIANT >= 2)):
                first, second = run_rows(
                    entry, grad, rng_keys + 2 * tensor, numel, shard_offset, begin, count, s, alpha, scale,
                    chunk_statistics + 6 * chunk,
                    RULE, MOMENTS, PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, AUX, READS_VARIANCE,
                    PARAM_STORAGE, DRAWS, THRESHOLD_PASS, CONFIDENCE, OBSERVES, RUNS, SCALE,
                    VARIANT >= 2, VARIANT % 2 == 1,
                )  # fmt: skip
        if THRESHOLD_PASS != NONE:
            tl.store(sums + 2 * chunk, halve(first))
            tl.store(sums + 2 * chunk + 1, halve(second))
            # Every thread's reads of the threshold and the sums above come before the count.
            tl.debug_barrier()
            chunks = ((numel + CHUNK - 1) // CHUNK).to(tl.int32)
            arrived = tl.atomic_add(arrivals + tensor, 1, sem="acq_rel", scope="gpu")
            if arrived == chunks - 1:
                tl.store(arrivals + tensor, 0)
                own = sums + 2 * tl.load(entry + FIRST_CHUNK_AT)
                at = threshold_state.to(tl.pointer_type(tl.float64))
                finish(own, chunks.to(tl.int64), numel, deviation, at, scalar_set, SCALE)


@triton.jit
def probe(at, alpha, result, CONFIDENCE: tl.constexpr):
    """A confidence function at ``LANES`` gradients."""
    index = tl.arange(0, LANES)
    g = tl.load(at + index)
    c = CONFIDENCE(g, tl.load(alpha))
    tl.static_assert(c.dtype == g.dtype, "must return float32")
    tl.static_assert(c.shape == g.shape, "must return a block of the gradient's shape")
    tl.store(result + index, c)
