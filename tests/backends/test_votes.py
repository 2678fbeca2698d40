"""The passes of a vote on every backend, bit for bit against whole-tensor operations of torch.

The CUDA kernels run on the host, thread by thread, and on a GPU; the Triton kernels interpreted, in a process of their
own, and on a GPU. The quick run interprets some of the cases.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.interpreted import INTERPRETED, run_interpreted
from support.toolchain import HOST, build
from torch import Tensor

from signadam_ext.backends import votes
from signadam_ext.backends.votes import Casting, VoteKernels, VoteTable
from signadam_ext.backends.votes.table import SCALARS, WIDTHS
from signadam_ext.core.native import compiled as _C
from signadam_ext.core.random_bits import tensor_keys

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Elements of a tensor, and how many lie between an aligned address and its value, momentum and residual: one word,
#: parts of words, several blocks and chunks, nothing; chunks that take the wide path, and some that one operand bars.
SIZES = (
    *((1, 0, 0, 0), (15, 1, 0, 0), (16, 0, 0, 0), (17, 3, 1, 2), (0, 0, 0, 0), (1024, 0, 0, 0), (5000, 2, 2, 2)),
    *((16384, 0, 0, 0), (16384, 1, 0, 3), (16384, 0, 1, 0), (40003, 0, 0, 0), (16399, 4, 4, 4), (32770, 5, 7, 6)),
)
GIVEN = {
    "threshold": 0.3,
    "scale": 0.7,
    "beta1": 0.9,
    "one_minus_beta1": 1 - 0.9,
    "beta2": 0.99,
    "one_minus_beta2": 1 - 0.99,
    "lr": 0.013,
    "decay": 0.9987,
}
#: Elements before and behind a tensor that no kernel may touch.
GUARD = 64
#: Words before those of each tensor, which are not its; and behind the last.
GAP = 3
CPU = torch.device("cpu")


def test_interpreted(thorough: bool) -> None:
    run_interpreted(__file__, f"--hypothesis-profile={'thorough' if thorough else 'quick'}")


class HostTable(ctypes.Structure):
    """VoteTable of csrc/core/vote.h."""

    _fields_ = (
        ("entries", ctypes.c_void_p),
        ("entry_of_chunk", ctypes.c_void_p),
        ("chunks", ctypes.c_int64),
        ("scalars", ctypes.c_void_p),
    )


@dataclass
class CudaOnHost:
    """Votes by the text of csrc/cuda/vote.cu, block by block and thread by thread."""

    library: ctypes.CDLL
    order: int = 0  # of blocks and threads: forward, reversed, shuffled

    def _table(self, table: VoteTable, scalars: Tensor) -> HostTable:
        assert len(scalars) == len(table.values)
        return HostTable(
            table.entries.data_ptr(), table.entry_of_chunk.data_ptr(), table.chunks, scalars.contiguous().data_ptr()
        )

    def _order(self) -> tuple[int, ctypes.c_uint32]:
        self.order += 1
        return self.order % 3, ctypes.c_uint32(self.order)

    def cast(self, table: VoteTable, scalars: Tensor, casting: Casting, codes: Tensor) -> None:
        blocks = self.library.host_cast_votes(
            ctypes.byref(self._table(table, scalars)),
            getattr(_C.VoteMemory, casting.memory).value,
            *(casting.residual, casting.maximize, 0 if casting.abstains else -2, table.format),
            *(ctypes.c_void_p(codes.data_ptr()), *self._order()),
        )
        assert blocks == table.chunks

    def count(self, codes: Tensor, bits: int, majority: bool, result: Tensor) -> None:
        workers, words = codes.shape
        blocks = self.library.host_count_votes(
            *(ctypes.c_void_p(codes.data_ptr()), ctypes.c_int64(workers), ctypes.c_int64(words), bits, majority),
            *(ctypes.c_void_p(result.data_ptr()), *self._order()),
        )
        assert blocks == -(-words // 256)

    def read(
        self, table: VoteTable, scalars: Tensor, keys: Tensor | None, use: str, bits: int, divisor: int, result: Tensor
    ) -> None:
        blocks = self.library.host_read_votes(
            ctypes.byref(self._table(table, scalars)),
            ctypes.c_void_p(0 if keys is None else keys.data_ptr()),
            *(getattr(_C.VoteUse, use).value, table.format, bits, ctypes.c_float(divisor)),
            *(ctypes.c_void_p(result.data_ptr()), *self._order()),
        )
        assert blocks == table.chunks


@dataclass(frozen=True)
class Backend:
    kernels: VoteKernels
    device: torch.device


GPU = [pytest.param((name, "cuda"), marks=pytest.mark.gpu) for name in ("cuda", "triton")]
HERE = [("triton", "cpu")] if INTERPRETED else [("cpu", "cpu"), ("cuda_on_host", "cpu"), *GPU]


@pytest.fixture(params=HERE, ids=lambda param: "-on-".join(param))
def backend(request: pytest.FixtureRequest, built_once: Callable[..., Path]) -> Backend:
    name, device = request.param
    if name != "cuda_on_host":
        return Backend(votes.get(name), torch.device(device))
    flags = ("-O1", "-shared", "-fPIC", "-fsanitize=undefined", "-fno-sanitize-recover=all", "-Wno-unused-function")
    flags += (f"-I{HOST / 'fake_cuda'}",)
    folder = built_once("cuda_votes", lambda folder: build("cuda_votes.cpp", folder / "library.so", *flags))
    library = ctypes.CDLL(str(folder / "library.so"))
    for launch in (library.host_cast_votes, library.host_count_votes, library.host_read_votes):
        launch.restype = ctypes.c_int64
    return Backend(CudaOnHost(library), CPU)


REFERENCE = Backend(votes.get("reference"), CPU)


def cases(of: Sequence[object], *quick: object) -> list[object]:
    """The cases of a parametrization, of which the quick run interprets these alone."""
    rest = pytest.mark.thorough
    return [case if not INTERPRETED or case in quick else pytest.param(case, marks=rest) for case in of]


def placed(x: Tensor, offset: int, device: torch.device) -> Tensor:
    """``x`` in memory of its own, so many elements from an aligned address, with a guard on both sides."""
    memory = torch.full((GUARD + offset + x.numel() + GUARD,), 77, dtype=x.dtype, device=device)
    assert memory.data_ptr() % 16 == 0
    view = memory[GUARD + offset :][: x.numel()]
    view.copy_(x)
    return view


def memory_of(view: Tensor) -> Tensor:
    """All of the memory that a tensor was placed in."""
    size = view.untyped_storage().nbytes() // view.element_size()
    return view.as_strided((size,), (1,), 0).cpu()


def tensors(seed: int, dtype: torch.dtype, operand: int, device: torch.device, special: bool = True) -> list[Tensor]:
    """Tensors of ``SIZES``, placed as it says of the operand: 0 the values, 1 the momentum, 2 the residual."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for numel, *offsets in SIZES:
        x = torch.randn(numel, generator=generator)
        if special and numel > 20:
            x[3], x[4], x[5], x[6], x[7] = float("nan"), float("inf"), float("-inf"), 0.0, -0.0
            x[8], x[9] = 0.3, -0.3  # on the threshold, which does not pass
        made.append(placed(x.to(dtype), offsets[operand], device))
    return made


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits; NaN is NaN."""
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    return bool(((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all())


def all_same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(same(memory_of(x), memory_of(y)) for x, y in zip(a, b, strict=True))


def table_of(dtype: torch.dtype, casting: Casting, device: torch.device) -> VoteTable:
    memories = [tensors(10 + operand, torch.float32, operand, device, special=False) for operand in (1, 2)]
    for memory in memories:
        memory[-1][17] = float("inf")
    momenta = memories[0] if casting.memory != "NONE" else None
    residuals = memories[1] if casting.residual else None
    return VoteTable(tensors(1, dtype, 0, device), momenta, residuals, first_words())


def rows(device: torch.device) -> Tensor:
    """Each tensor with a threshold of its own, the first with the one that some values lie on."""
    return votes.scalars_of(
        [{**GIVEN, "threshold": GIVEN["threshold"] * (i + 1) / (len(SIZES) - 2)} for i in range(len(SIZES))], device
    )


def first_words() -> list[int]:
    """Where the words of each tensor begin: in another order than the tensors, with gaps between them."""
    at, found = 0, {}
    for i in reversed(range(len(SIZES))):
        found[i] = at + GAP
        at = found[i] + votes.words_of(SIZES[i][0])
    return [found[i] for i in range(len(SIZES))]


CASTINGS = [
    Casting(memory, residual, maximize, abstains)
    for memory, residual in itertools.product(("NONE", "GRADIENTS", "GATED_SIGNS"), (False, True))
    for maximize, abstains in ((False, False), (True, True))
]


@pytest.mark.parametrize("casting", cases(CASTINGS, CASTINGS[0], CASTINGS[6], CASTINGS[-1]), ids=str)
@pytest.mark.parametrize("dtype", cases(DTYPES, torch.bfloat16), ids=str)
def test_votes_are_cast_as_the_reference_casts_them(backend: Backend, casting: Casting, dtype: torch.dtype) -> None:
    found = []
    for own in (REFERENCE, backend):
        table = table_of(dtype, casting, own.device)
        # Whatever was there before, the words of a table are all written, and no other one.
        codes = torch.full((table.words + GAP,), -1, dtype=torch.int32, device=own.device)
        own.kernels.cast(table, rows(own.device), casting, codes)
        found.append((codes.cpu(), table))
    (expected, before), (codes, table) = found
    assert torch.equal(codes, expected)
    assert all_same(table.values, before.values)
    assert all_same(table.momenta or (), before.momenta or ())
    assert all_same(table.residuals or (), before.residuals or ())


def ballots(workers: int, count: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Spoiled entries are rare, so that counts are seen beside them.
    code = torch.randint(-1, 2, (workers, count, 16), generator=generator)
    code[torch.rand(code.shape, generator=generator) < 0.02] = -2
    code[:, -1] = torch.tensor([-1, 1] * 8)  # and some are unanimous
    return code, ((code & 3) << (2 * torch.arange(16))).sum(-1).to(torch.int32)


@pytest.mark.parametrize("bits", (*WIDTHS, "majority"))
@pytest.mark.parametrize("workers", cases((1, 2, 7, 100, 300), 1, 7))
def test_votes_are_counted(backend: Backend, bits: int | str, workers: int) -> None:
    majority, width = bits == "majority", 2 if isinstance(bits, str) else bits
    if not majority and votes.width_for(workers) > width:
        pytest.skip("sums do not fit")
    code, own = ballots(workers, 1500)
    expected = code.sum(0).sign() if majority else code.sum(0)
    expected[(code == -2).any(0)] = -(1 << (width - 1))
    for kernels, device in ((REFERENCE.kernels, CPU), (backend.kernels, backend.device)):
        memory = torch.full(((1500 + 2) * width // 2,), -1, dtype=torch.int32, device=device)
        result = memory[width // 2 : -width // 2]
        kernels.count(own.to(device), width, majority, result)
        fields = (memory.cpu().to(torch.int64)[:, None] >> (width * torch.arange(32 // width))) & ((1 << width) - 1)
        signed = torch.where(fields >= 1 << (width - 1), fields - (1 << width), fields).flatten()
        assert torch.equal(signed[16:-16], expected.flatten())
        assert (signed[:16] == -1).all() and (signed[-16:] == -1).all()


def results(bits: int, table: VoteTable) -> Tensor:
    """Words of every code of so many bits."""
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    generator = torch.Generator().manual_seed(4)
    code = torch.randint(low, high, (table.words, 16), generator=generator) & ((1 << bits) - 1)
    shifts = bits * torch.arange(32 // bits)
    return (code.view(-1, 32 // bits) << shifts).sum(-1).to(torch.int32)


@pytest.mark.parametrize("use", ("WRITE", "STEP", "STEP_STOCHASTIC"))
@pytest.mark.parametrize("bits", cases(WIDTHS, 2, 16))
@pytest.mark.parametrize("dtype", cases(DTYPES, torch.bfloat16), ids=str)
def test_results_are_read_as_the_reference_reads_them(
    backend: Backend, use: str, bits: int, dtype: torch.dtype
) -> None:
    divisor = {2: 1, 4: 7, 8: 100, 16: 300}[bits]
    keys = torch.tensor([tensor_keys(7, i, 3) for i in range(len(SIZES))]).to(torch.int32)
    found = []
    for own in (REFERENCE, backend):
        table = VoteTable(tensors(2, dtype, 0, own.device), first_words=first_words())
        drawn = keys.to(own.device) if use == "STEP_STOCHASTIC" else None
        result = results(bits, table).to(own.device)
        own.kernels.read(table, rows(own.device), drawn, use, bits, divisor, result)
        assert torch.equal(result.cpu(), results(bits, table))
        found.append(table.values)
    assert all_same(*found)


def at_the_end(x: Tensor) -> Tensor:
    """``x`` where its last byte is followed by memory that ends the process when it is touched."""
    size = -(-max(x.nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    begin = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(begin + size), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    there = torch.frombuffer(memory, dtype=x.dtype, offset=size - x.nbytes, count=x.numel())
    return there.copy_(x)


@pytest.mark.skipif(sys.platform != "linux", reason="pages are protected by Linux's mprotect")
@pytest.mark.parametrize("numel", (5, 1021, 16384 + 16))
def test_nothing_behind_the_last_entry_is_touched(backend: Backend, numel: int) -> None:
    if backend.device.type != "cpu":
        pytest.skip("memory of a device has no end that tests could set")
    generator = torch.Generator().manual_seed(numel)
    g, m, r = torch.randn(3, numel, generator=generator).unbind()
    one_row = votes.scalars_of([GIVEN], CPU)
    found = []
    for kernels, place in ((REFERENCE.kernels, torch.clone), (backend.kernels, at_the_end)):
        table = VoteTable([place(g.bfloat16())], [place(m)], [place(r)])
        codes = place(torch.full((table.words,), -1, dtype=torch.int32))
        kernels.cast(table, one_row, Casting("GRADIENTS", residual=True), codes)
        result = place(torch.full((2 * table.words,), -1, dtype=torch.int32))
        kernels.count(place(codes.repeat(3)).view(3, -1), 4, False, result)
        kernels.read(table, one_row, None, "STEP", 4, 3, result)
        found.append((codes, result, *table.values))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_nothing_is_launched_for_nothing(backend: Backend) -> None:
    table = VoteTable([torch.empty(0, device=backend.device)])
    nothing = torch.empty(0, dtype=torch.int32, device=backend.device)
    one_row = votes.scalars_of([{}], backend.device)
    backend.kernels.cast(table, one_row, Casting(), nothing)
    backend.kernels.count(nothing.view(2, 0), 4, False, nothing)
    backend.kernels.read(table, one_row, None, "WRITE", 4, 2, nothing)


def test_columns_and_scalars_have_one_order() -> None:
    """The rows that Python writes are those that csrc/core/vote.h and the Triton kernels read."""
    text = (Path(__file__).resolve().parents[2] / "csrc" / "core" / "vote.h").read_text()
    fields = text.split("struct VoteEntry {")[1].split("int64_t ")[1].split(";")[0].split(", ")
    pytest.importorskip("triton")
    from signadam_ext.triton_kernels.vote import COLUMNS

    assert list(COLUMNS) == fields
    assert set(GIVEN) == set(SCALARS)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("cuda", "triton"))
def test_a_table_serves_several_streams(name: str) -> None:
    """Made on one stream and used on another, which waits for it; dropped while the other still has it to read."""
    kernels, device = votes.get(name), torch.device("cuda")
    reference = VoteTable(tensors(1, torch.bfloat16, 0, CPU))
    expected = torch.empty(reference.words, dtype=torch.int32)
    REFERENCE.kernels.cast(reference, rows(CPU), Casting(), expected)
    made, used = torch.cuda.Stream(), torch.cuda.Stream()
    scalars, values = rows(device), tensors(1, torch.bfloat16, 0, device)
    codes = torch.empty(reference.words, dtype=torch.int32, device=device)
    torch.cuda.synchronize()
    table = VoteTable(values)
    with torch.cuda.stream(made):
        torch.cuda._sleep(20_000_000)
        assert table.chunks > 0
    with torch.cuda.stream(used):
        torch.cuda._sleep(20_000_000)
        kernels.cast(table, scalars, Casting(), codes)
    del table
    with torch.cuda.stream(made):
        written_over = [torch.full((1 << 16,), -1, dtype=torch.int64, device=device) for _ in range(8)]
    torch.cuda.synchronize()
    assert len(written_over) == 8 and torch.equal(codes.cpu(), expected)
