"""The passes of a vote on every backend, bit for bit against whole-tensor operations of torch."""

import itertools

import pytest
import torch

from signadam_ext.backends import votes
from signadam_ext.backends.votes import Casting, VoteTable
from signadam_ext.backends.votes.table import WIDTHS
from signadam_ext.core.random_bits import tensor_keys

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: One word, parts of words, several blocks and chunks of the CPU, nothing.
SIZES = (1, 15, 16, 17, 0, 1024, 5000, 16384, 40003)
SCALARS = {
    "threshold": 0.3,
    "scale": 0.7,
    "beta1": 0.9,
    "one_minus_beta1": 1 - 0.9,
    "beta2": 0.99,
    "one_minus_beta2": 1 - 0.99,
    "lr": 0.013,
    "decay": 0.9987,
}
BACKENDS = ("cpu",)


def tensors(seed, dtype, special=True):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for numel in SIZES:
        x = torch.randn(numel, generator=generator)
        if special and numel > 20:
            x[3], x[4], x[5], x[6], x[7] = float("nan"), float("inf"), float("-inf"), 0.0, -0.0
            x[8], x[9] = 0.3, -0.3  # on the threshold, which does not pass
        made.append(x.to(dtype))
    return made


def same(a, b):
    """Whether two tensors have the same bits; NaN is NaN."""
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    return bool(((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all())


def table_of(values, casting, seed=11):
    memories = [tensors(seed + k, torch.float32, special=False) for k in range(2)]
    for memory in memories:
        memory[-1][17] = float("inf")
    momenta = memories[0] if casting.memory != "NONE" else None
    residuals = memories[1] if casting.residual else None
    return VoteTable(values, momenta, residuals)


def rows(count):
    return votes.scalars_of([{**SCALARS, "threshold": SCALARS["threshold"] * (i + 1)} for i in range(count)], CPU)


CPU = torch.device("cpu")
CASTINGS = [
    Casting(memory, residual, maximize, abstains)
    for memory, residual in itertools.product(("NONE", "GRADIENTS", "GATED_SIGNS"), (False, True))
    for maximize, abstains in ((False, False), (True, True))
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("casting", CASTINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_votes_are_cast_as_the_reference_casts_them(backend, casting, dtype):
    found = []
    for name in ("reference", backend):
        table = table_of(tensors(1, dtype), casting)
        codes = torch.full((table.words,), -1, dtype=torch.int32)
        votes.get(name).cast(table, rows(len(SIZES)), casting, codes)
        found.append([codes, *(table.momenta or ()), *(table.residuals or ())])
    assert torch.equal(found[0][0], found[1][0])
    assert all(same(a, b) for a, b in zip(found[0][1:], found[1][1:], strict=True))


def ballots(workers, words, seed=5):
    generator = torch.Generator().manual_seed(seed)
    # Spoiled entries are rare, so that counts are seen beside them.
    code = torch.randint(-1, 2, (workers, words, 16), generator=generator)
    code[torch.rand(code.shape, generator=generator) < 0.02] = -2
    return code, ((code & 3) << (2 * torch.arange(16))).sum(-1).to(torch.int32)


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
@pytest.mark.parametrize("bits", (*WIDTHS, "majority"))
@pytest.mark.parametrize("workers", (1, 2, 7, 100))
def test_votes_are_counted(backend, bits, workers):
    majority, width = bits == "majority", 2 if bits == "majority" else bits
    if not majority and votes.width_for(workers) > width:
        pytest.skip("sums do not fit")
    code, words = ballots(workers, 1500)
    result = torch.full((1500 * width // 2,), -1, dtype=torch.int32)
    votes.get(backend).count(words, width, majority, result)
    expected = code.sum(0).sign() if majority else code.sum(0)
    expected[(code == -2).any(0)] = -(1 << (width - 1))
    fields = (result.to(torch.int64)[:, None] >> (width * torch.arange(32 // width))) & ((1 << width) - 1)
    signed = torch.where(fields >= 1 << (width - 1), fields - (1 << width), fields)
    assert torch.equal(signed.flatten(), expected.flatten())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use", ("WRITE", "STEP", "STEP_STOCHASTIC"))
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_read_as_the_reference_reads_them(backend, use, bits, dtype):
    divisor = {2: 1, 4: 7, 8: 100, 16: 300}[bits]
    generator = torch.Generator().manual_seed(3)
    keys = torch.tensor([tensor_keys(7, i, 3) for i in range(len(SIZES))]).to(torch.int32)
    found = []
    for name in ("reference", backend):
        table = VoteTable(tensors(2, dtype))
        low, high = -(1 << (bits - 1)), 1 << (bits - 1)
        code = torch.randint(low, high, (table.words, 16), generator=generator.manual_seed(4)) & ((1 << bits) - 1)
        shifts = bits * torch.arange(32 // bits)
        result = (code.view(-1, 32 // bits) << shifts).sum(-1).to(torch.int32)
        votes.get(name).read(table, rows(len(SIZES)), keys, use, bits, divisor, result)
        found.append(table.values)
    assert all(same(a, b) for a, b in zip(*found, strict=True))
