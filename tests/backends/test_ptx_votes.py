"""The PTX of the kernels in csrc/cuda/vote.cu, executed by the emulator of tests/support/ptx, against the CPU kernels.

Every kernel of the module, on tensors of odd sizes at odd places, with special values.
"""

from __future__ import annotations

import itertools
import struct
from typing import Any

import pytest
import torch
from support.launches import SPECIALS, aligned, same_bits
from support.ptx import SCHEDULES, Memory
from support.ptx.steps import program
from support.toolchain import ptx
from torch import Tensor

from reporting.machine_code import VoteKernelName
from signadam_ext import _C
from signadam_ext.backends import votes
from signadam_ext.backends.votes import Casting, VoteTable
from signadam_ext.backends.votes.table import WIDTHS
from signadam_ext.core.random_bits import tensor_keys

pytestmark = [
    pytest.mark.skipif(_C.build_info()["cuda"] is None, reason="the module was built without CUDA"),
    pytest.mark.thorough,
]
THREADS = 256
DTYPES = {
    _C.FORMATS[name][0]: dtype
    for name, dtype in zip(("fp32", "bf16", "fp16"), (torch.float32, torch.bfloat16, torch.float16), strict=True)
}
#: Elements, and how many lie before them from an aligned address on: of values, of momenta and of residuals.
SIZES = ((1, 0, 0, 0), (17, 3, 1, 2), (0, 0, 0, 0), (16384, 0, 0, 0), (5000, 2, 4, 2), (16399, 4, 4, 4))
MEMORIES = {memory.value: name for name, memory in _C.VoteMemory.__members__.items()}
USES = {use.value: name for name, use in _C.VoteUse.__members__.items()}
STOCHASTIC = _C.VoteUse.STEP_STOCHASTIC.value
CASTS = [VoteKernelName("cast", own) for own in itertools.product(MEMORIES, (0, 1), DTYPES)]
COUNTS = [VoteKernelName("count", own) for own in ((2, 1), *((bits, 0) for bits in WIDTHS))]
READS = [
    VoteKernelName("read", own)
    for own in itertools.product(USES, DTYPES, WIDTHS)
    if own[:2] != (STOCHASTIC, _C.FORMATS["fp32"][0])
]
GIVEN = {"threshold": 0.3, "scale": 0.7, "beta1": 0.9, "one_minus_beta1": 1 - 0.9, "beta2": 0.99}
GIVEN |= {"one_minus_beta2": 1 - 0.99, "lr": 0.013, "decay": 0.9987}


def test_kernels_are_all() -> None:
    (own,) = ptx(_C.__file__).values()
    assert {kernel for kernel in own if isinstance(kernel, VoteKernelName)} == {*CASTS, *COUNTS, *READS}


def run(
    kernel: VoteKernelName, blocks: int, parameters: bytes, written: dict[str, Tensor], read: dict[str, Tensor]
) -> None:
    """Launches a kernel that may write some tensors and only read others."""
    memory = Memory()
    for tensors, writable in ((written, True), (read, False)):
        for name, tensor in tensors.items():
            size, grain = tensor.numel() * tensor.element_size(), tensor.element_size()
            memory.register(name, tensor.data_ptr(), size, writable=writable, grain=grain)
    (own,) = ptx(_C.__file__).values()
    schedule = SCHEDULES[sum(kernel.arguments) % len(SCHEDULES)]
    program(own[kernel], THREADS).run(blocks, parameters, memory, schedule)


def made(seed: int, dtype: torch.dtype, operand: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size, *offsets in SIZES:
        x = torch.randn(size, generator=generator)
        if size > 20:
            x[3 : 3 + len(SPECIALS)] = torch.tensor(SPECIALS)
            x[20] = GIVEN["threshold"]  # which does not pass
        found.append(aligned(size, dtype, offsets[operand]).copy_(x))
    return found


def scalars() -> Tensor:
    return votes.scalars_of([{**GIVEN, "scale": 0.1 * i} for i in range(len(SIZES))], torch.device("cpu")).contiguous()


def table_bytes(table: VoteTable, rows: Tensor) -> bytes:
    """VoteTable of csrc/core/vote.h."""
    return struct.pack(
        "<QQqQ", table.entries.data_ptr(), table.entry_of_chunk.data_ptr(), table.chunks, rows.data_ptr()
    )


def named(**lists: list[Tensor] | None) -> dict[str, Tensor]:
    return {f"{name} {i}": own for name, each in lists.items() for i, own in enumerate(each or ()) if own.numel()}


def ids(kernels: list[VoteKernelName]) -> list[str]:
    return ["-".join(map(str, kernel.arguments)) for kernel in kernels]


@pytest.mark.parametrize("kernel", CASTS, ids=ids(CASTS))
def test_cast(kernel: VoteKernelName) -> None:
    memory, residual, number = kernel.arguments
    casting = Casting(MEMORIES[memory], bool(residual), maximize=bool(number % 2), abstains=bool(residual))
    results = []
    for executed in (False, True):
        values = made(1, DTYPES[number], 0)
        momenta = made(2, torch.float32, 1) if casting.memory != "NONE" else None
        residuals = made(3, torch.float32, 2) if residual else None
        table, rows = VoteTable(values, momenta, residuals), scalars()
        codes = torch.full((table.words,), -1, dtype=torch.int32)
        if executed:
            spoiled = 0 if casting.abstains else -2
            options = struct.pack("<B??xi", memory, casting.residual, casting.maximize, spoiled)
            parameters = table_bytes(table, rows) + options + struct.pack("<Q", codes.data_ptr())
            tables: dict[str, Any] = {"entries": table.entries, "entry_of_chunk": table.entry_of_chunk}
            read = {**named(values=values), **tables, "scalars": rows}
            run(kernel, table.chunks, parameters, {"codes": codes, **named(momenta=momenta, residuals=residuals)}, read)
        else:
            votes.get("cpu").cast(table, rows, casting, codes)
        results.append([codes, *(momenta or ()), *(residuals or ())])
    assert all(same_bits(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("kernel", COUNTS, ids=ids(COUNTS))
@pytest.mark.parametrize("workers", (1, 7))
def test_count(kernel: VoteKernelName, workers: int) -> None:
    bits, majority = kernel.arguments
    workers = 1 if bits == 2 and not majority else workers
    words = 700
    generator = torch.Generator().manual_seed(5)
    code = torch.randint(-1, 2, (workers, words, 16), generator=generator)
    code[torch.rand(code.shape, generator=generator) < 0.02] = -2
    codes = ((code & 3) << (2 * torch.arange(16))).sum(-1).to(torch.int32).contiguous()
    expected, result = (torch.full((words * bits // 2,), -1, dtype=torch.int32) for _ in range(2))
    votes.get("cpu").count(codes, bits, bool(majority), expected)
    parameters = struct.pack("<QqqQ", codes.data_ptr(), workers, words, result.data_ptr())
    run(kernel, -(-words // THREADS), parameters, {"result": result}, {"codes": codes})
    assert torch.equal(result, expected)


@pytest.mark.parametrize("kernel", READS, ids=ids(READS))
def test_read(kernel: VoteKernelName) -> None:
    use, number, bits = kernel.arguments
    divisor = {2: 1, 4: 7, 8: 100, 16: 300}[bits]
    keys = torch.tensor([tensor_keys(7, i, 3) for i in range(len(SIZES))]).to(torch.int32)
    drawn = keys if use == STOCHASTIC else None
    results = []
    for executed in (False, True):
        values = made(2, DTYPES[number], 0)
        table, rows = VoteTable(values), scalars()
        generator = torch.Generator().manual_seed(4)
        code = torch.randint(0, 1 << bits, (table.words * bits // 2, 32 // bits), generator=generator)
        result = (code << (bits * torch.arange(32 // bits))).sum(-1).to(torch.int32)
        if executed:
            key = 0 if drawn is None else drawn.data_ptr()
            parameters = table_bytes(table, rows) + struct.pack("<Qf4xQ", key, divisor, result.data_ptr())
            read = {"entries": table.entries, "entry_of_chunk": table.entry_of_chunk, "scalars": rows, "result": result}
            run(
                kernel,
                table.chunks,
                parameters,
                named(values=values),
                read if drawn is None else {**read, "keys": drawn},
            )
        else:
            votes.get("cpu").read(table, rows, drawn, USES[use], bits, divisor, result)
        results.append(values)
    assert all(same_bits(ours, theirs) for ours, theirs in zip(*results, strict=True))
