"""The passes of a vote, one launch each: see csrc/core/vote.h for the arithmetic and how codes lie in words.

A program of casting and reading takes a chunk of 8 rows of 2048 entries, one of counting a few words of every worker.
"""

import triton
import triton.language as tl

from signadam_ext.core.native import compiled as _C

from .formats import FP32, INTERPRETED, bits_of, narrow, narrow_stochastic, widen
from .random import random_halves
from .rules import divided, gated_sign
from .stored import load, operand, store
from .threshold import CHUNK, LANES, ROWS

# Random bits are drawn by chunks of a step.
assert CHUNK.value == _C.VOTE_CHUNK

#: Columns of the table of tensors, one int64 each, as VoteEntry has them.
COLUMNS = ("values", "momentum", "residual", "numel", "first_word", "first_chunk")
COLUMN_COUNT = tl.constexpr(len(COLUMNS))
VALUES_AT = tl.constexpr(COLUMNS.index("values"))
MOMENTUM_AT = tl.constexpr(COLUMNS.index("momentum"))
RESIDUAL_AT = tl.constexpr(COLUMNS.index("residual"))
NUMEL_AT = tl.constexpr(COLUMNS.index("numel"))
FIRST_WORD_AT = tl.constexpr(COLUMNS.index("first_word"))
FIRST_CHUNK_AT = tl.constexpr(COLUMNS.index("first_chunk"))

SCALARS = _C.VOTE_SCALARS
SCALAR_COUNT = tl.constexpr(len(SCALARS))
THRESHOLD = tl.constexpr(SCALARS.index("threshold"))
SCALE = tl.constexpr(SCALARS.index("scale"))
BETA1 = tl.constexpr(SCALARS.index("beta1"))
ONE_MINUS_BETA1 = tl.constexpr(SCALARS.index("one_minus_beta1"))
BETA2 = tl.constexpr(SCALARS.index("beta2"))
ONE_MINUS_BETA2 = tl.constexpr(SCALARS.index("one_minus_beta2"))
LR = tl.constexpr(SCALARS.index("lr"))
DECAY = tl.constexpr(SCALARS.index("decay"))

VoteMemory, VoteUse = _C.VoteMemory, _C.VoteUse
NONE = tl.constexpr(VoteMemory.NONE.value)
GATED_SIGNS = tl.constexpr(VoteMemory.GATED_SIGNS.value)
WRITE = tl.constexpr(VoteUse.WRITE.value)
STEP_STOCHASTIC = tl.constexpr(VoteUse.STEP_STOCHASTIC.value)

CODES_PER_WORD = tl.constexpr(_C.CODES_PER_WORD)
#: Words that a program of counting takes.
COUNTED_WORDS = tl.constexpr(256)


@triton.jit
def is_finite(x):
    return (bits_of(x) & 0x7F800000) != 0x7F800000


@triton.jit
def code_at(field, BITS: tl.constexpr, place):
    """The code at ``place`` of an int32: moved to its top, and brought down with its sign."""
    return (field << (32 - BITS - BITS * place)) >> (32 - BITS)


@triton.jit
def cast_rows(
    entry,
    s,
    bytes_of_codes,
    begin,
    count,
    FORMAT: tl.constexpr,
    MEMORY: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    ABSTAINS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The rows of one chunk. ``WIDE``: it is full, and every tensor of it lies on a 16-byte boundary."""
    values = operand(tl.load(entry + VALUES_AT), begin, FORMAT, WIDE)
    momentum = operand(tl.load(entry + MOMENTUM_AT), begin, FP32, WIDE)
    residual = operand(tl.load(entry + RESIDUAL_AT), begin, FP32, WIDE)
    threshold = tl.load(s + THRESHOLD)
    beta1, one_minus_beta1 = tl.load(s + BETA1), tl.load(s + ONE_MINUS_BETA1)
    beta2, one_minus_beta2 = tl.load(s + BETA2), tl.load(s + ONE_MINUS_BETA2)
    scale = tl.load(s + SCALE)
    lanes = tl.arange(0, LANES)
    # Codes behind the last entry, up to the end of its word, are 0.
    byte_count = (count + CODES_PER_WORD - 1) // CODES_PER_WORD * 4
    for row in range(ROWS if WIDE else (count + LANES - 1) // LANES):
        index = row * LANES + lanes
        g = widen(load(values, index, count, WIDE), FORMAT)
        if MAXIMIZE:
            g = g * -1.0
        u = g
        if MEMORY != NONE:
            m = load(momentum, index, count, WIDE)
            x = gated_sign(g, threshold) if MEMORY == GATED_SIGNS else g
            u = beta1 * m + one_minus_beta1 * x
            kept = beta2 * m + one_minus_beta2 * x
        if RESIDUAL:
            r = load(residual, index, count, WIDE)
            u = u + r
        finite = is_finite(g) & is_finite(u)
        c = gated_sign(u, 0.0 if MEMORY == GATED_SIGNS else threshold)
        if MEMORY != NONE:
            store(momentum, index, tl.where(finite, kept, m), count, WIDE)
        if RESIDUAL:
            store(residual, index, tl.where(finite, u - scale * c, r), count, WIDE)
        code = tl.where(finite, c.to(tl.int32), 0 if ABSTAINS else -2) & 3
        if not WIDE:
            code = tl.where(index < count, code, 0)
        up = 2 * tl.arange(0, 4)
        packed = tl.sum(tl.reshape(code, [LANES // 4, 4]) << up[None, :], axis=1).to(tl.uint8)
        at = row * (LANES // 4) + tl.arange(0, LANES // 4)
        if WIDE:
            tl.store(bytes_of_codes + at, packed)
        else:
            tl.store(bytes_of_codes + at, packed, mask=at < byte_count)


@triton.jit
def cast_votes(
    entries,
    entry_of_chunk,
    scalars,
    codes,
    FORMAT: tl.constexpr,
    MEMORY: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    ABSTAINS: tl.constexpr,
):
    """Votes of all tensors; one program a chunk.

    Args:
        entries: int64 ``[tensors, COLUMN_COUNT]``, see ``COLUMNS``.
        entry_of_chunk: int32.
        scalars: float32 ``[tensors, SCALAR_COUNT]``.
        codes: the bytes of the words.
        FORMAT: of the values.
        MEMORY: a VoteMemory.
        RESIDUAL, MAXIMIZE, ABSTAINS: see Casting.
    """
    chunk = tl.program_id(0)
    tensor = tl.load(entry_of_chunk + chunk)
    entry = entries + tensor * COLUMN_COUNT
    begin = (chunk - tl.load(entry + FIRST_CHUNK_AT)) * CHUNK
    count = tl.minimum(tl.load(entry + NUMEL_AT) - begin, CHUNK).to(tl.int32)
    addresses = tl.load(entry + VALUES_AT) | tl.load(entry + MOMENTUM_AT) | tl.load(entry + RESIDUAL_AT)
    # Words lie on their own boundaries, and so do the codes of a chunk.
    bytes_of_codes = tl.multiple_of(codes + (tl.load(entry + FIRST_WORD_AT) * 4 + begin // 4), 4)
    wide = (count == CHUNK) & (addresses % 16 == 0)
    # Compiled twice, of which a chunk takes one.
    for WIDE in tl.static_range(2):
        if wide == (WIDE == 1):
            cast_rows(
                entry, scalars + tensor * SCALAR_COUNT, bytes_of_codes, begin, count,
                FORMAT, MEMORY, RESIDUAL, MAXIMIZE, ABSTAINS, WIDE == 1,
            )  # fmt: skip


@triton.jit
def count_votes(codes, workers, words, result, BITS: tl.constexpr, MAJORITY: tl.constexpr):
    """The majority or the sum of the workers' votes; one program takes ``COUNTED_WORDS``.

    Args:
        codes: int32 ``[workers, words]``.
        workers: int32.
        words: int64.
        result: int32 ``[words * BITS / 2]``.
        BITS: of an entry of the result, 2 for a majority.
    """
    IN_WORD: tl.constexpr = 32 // BITS
    PARTS: tl.constexpr = CODES_PER_WORD // IN_WORD
    index = tl.program_id(0).to(tl.int64) * COUNTED_WORDS + tl.arange(0, COUNTED_WORDS)
    place = tl.arange(0, CODES_PER_WORD)
    total = tl.zeros([COUNTED_WORDS, CODES_PER_WORD], tl.int32)
    spoiled = tl.zeros([COUNTED_WORDS, CODES_PER_WORD], tl.int32)
    at = codes + index
    for _ in range(workers):
        own = tl.load(at, mask=index < words, other=0)
        code = code_at(own[:, None], 2, place[None, :])
        total += code
        spoiled |= (code == -2).to(tl.int32)
        at += words
    if MAJORITY:
        total = (total > 0).to(tl.int32) - (total < 0).to(tl.int32)
    code = tl.where(spoiled != 0, -(1 << (BITS - 1)), total)
    field = (code & ((1 << BITS) - 1)) << (BITS * (place % IN_WORD))[None, :]
    packed = tl.sum(tl.reshape(field, [COUNTED_WORDS, PARTS, IN_WORD]), axis=2)
    if INTERPRETED:  # that of Triton 3.2 adds in int64, calls it int32, and would store 8 bytes
        packed = packed.to(tl.int64).to(tl.int32)
    to = index[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
    tl.store(result + to, packed, mask=index[:, None] < words)


@triton.jit
def load_codes(fields, row, count, BITS: tl.constexpr, WIDE: tl.constexpr):
    """A row of codes of a result, int32. ``fields``: bytes, of 16 bits an entry pairs of them."""
    PER_BYTE: tl.constexpr = 8 // BITS if BITS < 8 else 1
    index = tl.arange(0, LANES // PER_BYTE) + row * (LANES // PER_BYTE)
    x = load(fields, index, (count + PER_BYTE - 1) // PER_BYTE, WIDE).to(tl.int32)
    if PER_BYTE > 1:
        x = tl.reshape(code_at(x[:, None], BITS, tl.arange(0, PER_BYTE)[None, :]), [LANES])
    return x


@triton.jit
def read_rows(
    entry,
    s,
    h0,
    h1,
    fields,
    divisor,
    begin,
    count,
    FORMAT: tl.constexpr,
    USE: tl.constexpr,
    BITS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The rows of one chunk; ``WIDE`` as of :func:`cast_rows`."""
    values = operand(tl.load(entry + VALUES_AT), begin, FORMAT, WIDE)
    lr, decay = tl.load(s + LR), tl.load(s + DECAY)
    lanes = tl.arange(0, LANES)
    for row in range(ROWS if WIDE else (count + LANES - 1) // LANES):
        index = row * LANES + lanes
        code = load_codes(fields, row, count, BITS, WIDE)
        x = tl.where(code == -(1 << (BITS - 1)), float("nan"), divided(code.to(tl.float32), divisor))
        if USE != WRITE:
            p = widen(load(values, index, count, WIDE), FORMAT)
            # Where nothing is known, the parameter stays.
            x = tl.where(x == x, p * decay - lr * x, p)
        if (USE == STEP_STOCHASTIC) & (FORMAT != FP32):
            store(values, index, narrow_stochastic(x, random_halves(h0, h1, begin, row, True), FORMAT), count, WIDE)
        else:
            store(values, index, narrow(x, FORMAT), count, WIDE)


@triton.jit
def read_votes(
    entries,
    entry_of_chunk,
    scalars,
    rng_keys,
    result,
    divisor,
    FORMAT: tl.constexpr,
    USE: tl.constexpr,
    BITS: tl.constexpr,
):
    """What came back, to all tensors; one program a chunk.

    Args:
        entries, entry_of_chunk, scalars, FORMAT: as of :func:`cast_votes`.
        rng_keys: int32 ``[tensors, 2]``; unused where none are drawn.
        result: the bytes of its words; of 16 bits an entry int16.
        divisor: float32.
        USE: a VoteUse.
        BITS: of an entry of the result.
    """
    chunk = tl.program_id(0)
    tensor = tl.load(entry_of_chunk + chunk)
    entry = entries + tensor * COLUMN_COUNT
    begin = (chunk - tl.load(entry + FIRST_CHUNK_AT)) * CHUNK
    count = tl.minimum(tl.load(entry + NUMEL_AT) - begin, CHUNK).to(tl.int32)
    h0 = tl.full((), 0, tl.uint32)
    h1 = h0
    if (USE == STEP_STOCHASTIC) & (FORMAT != FP32):
        h0 = tl.load(rng_keys + 2 * tensor).to(tl.uint32, bitcast=True)
        h1 = tl.load(rng_keys + 2 * tensor + 1).to(tl.uint32, bitcast=True)
    # Elements of `result` in a word of 16 codes.
    PER_WORD: tl.constexpr = 2 * BITS if BITS < 16 else 16
    first = (tl.load(entry + FIRST_WORD_AT) + begin // CODES_PER_WORD) * PER_WORD
    fields = tl.multiple_of(result + first, 4)
    wide = (count == CHUNK) & (tl.load(entry + VALUES_AT) % 16 == 0)
    for WIDE in tl.static_range(2):
        if wide == (WIDE == 1):
            read_rows(
                entry, scalars + tensor * SCALAR_COUNT, h0, h1, fields, divisor, begin, count,
                FORMAT, USE, BITS, WIDE == 1,
            )  # fmt: skip
