"""The emulator of tests/support/ptx: numbers as PTX defines them, control flow, and what no launch may do."""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from support.ptx import SCHEDULES, Counts, Fault, Memory, Program, Unknown

NAN32, NAN64 = 0x7FFFFFFF, 0x7FFFFFFFFFFFFFFF
THREADS = 64
HEAD = """
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .u64 k_param_1,
	.param .u32 k_param_2
)
.maxntid 64
{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<19>;
	.reg .f32 %f<9>;
	.reg .b64 %rd<9>;
	.reg .f64 %fd<9>;
"""
#: The addresses of a thread's 8 bytes in both tensors.
PLACES = """
	ld.param.u64 %rd1, [k_param_0];
	ld.param.u64 %rd2, [k_param_1];
	mov.u32 %r1, %tid.x;
	mov.u32 %r2, %ctaid.x;
	mad.lo.s32 %r3, %r2, 64, %r1;
	mul.wide.u32 %rd3, %r3, 8;
	add.s64 %rd1, %rd1, %rd3;
	add.s64 %rd2, %rd2, %rd3;
"""


def _aligned(count: int) -> np.ndarray:
    """Zeros from a border between sectors on."""
    room = np.zeros(count + 4, np.uint64)
    skipped = -room.ctypes.data % 32 // 8
    return room[skipped : skipped + count]


class Tensors:
    """Two of 8 bytes for each thread: one that is only read, and one that is written."""

    def __init__(self, *words: Any, blocks: int = 1) -> None:
        self.input, self.output = (_aligned(THREADS * blocks) for _ in range(2))
        self.input[: len(words)] = np.array([int(word) % 2**64 for word in words], np.uint64)
        self.output[:] = 0x1111111111111111
        self.memory = Memory()
        self.memory.register("input", self.input.ctypes.data, self.input.nbytes, writable=False, streamed=True)
        self.memory.register("output", self.output.ctypes.data, self.output.nbytes, streamed=True)
        self.blocks = blocks

    def run(self, body: str, number: int = 0, shared: int = 0, **how: Any) -> np.ndarray:
        program = Program(HEAD + body + "\n\tret;\n}\n", THREADS, shared)
        parameters = struct.pack("<QQI", self.input.ctypes.data, self.output.ctypes.data, number)
        program.run(self.blocks, parameters, self.memory, **how)
        return self.output


def bits32(x: float) -> int:
    return int(np.float32(x).view(np.uint32))


def bits64(x: float) -> int:
    return int(np.float64(x).view(np.uint64))


def apply(instruction: str, *words: int, size: int = 32) -> list[int]:
    """An instruction on each word: of ``%f1`` (``%fd1``, or ``%r4``, ``%rd4``) it makes the second of the kind."""
    load = {32: "ld.global.b32 %r4, [%rd1];\nmov.b32 %f1, %r4;", 64: "ld.global.b64 %rd4, [%rd1];\nmov.b64 %fd1, %rd4;"}
    found = Tensors(*words).run(PLACES + load[size] + instruction)
    return [int(word) for word in found[: len(words)]]


def f32(operation: str) -> str:
    return f"{operation}\nmov.b32 %r5, %f2;\ncvt.u64.u32 %rd5, %r5;\nst.global.b64 [%rd2], %rd5;"


def f64(operation: str) -> str:
    return f"{operation}\nmov.b64 %rd5, %fd2;\nst.global.b64 [%rd2], %rd5;"


def u32(operation: str) -> str:
    return f"{operation}\ncvt.u64.u32 %rd5, %r5;\nst.global.b64 [%rd2], %rd5;"


def u64(operation: str) -> str:
    return f"{operation}\nst.global.b64 [%rd2], %rd5;"


def immediate(x: float) -> str:
    return f"0f{bits32(x):08X}"


@pytest.mark.parametrize(
    ("operation", "operand", "expected"),
    [
        # Rounded to nearest even, subnormals kept.
        (f"add.rn.f32 %f2, %f1, {immediate(2.0**-24)};", 1.0, 1.0),
        (f"add.rn.f32 %f2, %f1, {immediate(2.0**-24)};", 1 + 2.0**-23, 1 + 2.0**-22),
        (f"mul.rn.f32 %f2, %f1, {immediate(0.5)};", 2.0**-148, 2.0**-149),
        (f"mul.rn.f32 %f2, %f1, {immediate(0.5)};", 2.0**-149, 0.0),
        (f"add.rz.f32 %f2, %f1, {immediate(2.0**-24)};", 1 + 2.0**-23, 1 + 2.0**-23),
        (f"sub.rz.f32 %f2, %f1, {immediate(2.0**-60)};", 1.0, 1 - 2.0**-24),
        (f"mul.rz.f32 %f2, %f1, {immediate(3e38)};", 3e38, float(np.finfo(np.float32).max)),
        (f"div.rn.f32 %f2, %f1, {immediate(3.0)};", 1.0, float(np.float32(1) / np.float32(3))),
        ("sqrt.rn.f32 %f2, %f1;", 2.0, float(np.sqrt(np.float32(2)))),
        ("rcp.rn.f32 %f2, %f1;", 3.0, float(np.float32(1) / np.float32(3))),
        # Extremes: a number where there is one; +0 is larger than -0.
        (f"max.f32 %f2, %f1, {immediate(-0.0)};", 0.0, 0.0),
        (f"min.f32 %f2, %f1, {immediate(0.0)};", -0.0, -0.0),
        (f"min.f32 %f2, %f1, {immediate(-0.0)};", 0.0, -0.0),
        (f"max.f32 %f2, %f1, {immediate(3.0)};", np.nan, 3.0),
        ("neg.f32 %f2, %f1;", 0.0, -0.0),
        ("abs.f32 %f2, %f1;", -0.0, 0.0),
        ("cvt.rzi.f32.f32 %f2, %f1;", -2.7, -2.0),
        ("cvt.rni.f32.f32 %f2, %f1;", 2.5, 2.0),
        ("cvt.sat.f32.f32 %f2, %f1;", np.nan, 0.0),
        ("cvt.sat.f32.f32 %f2, %f1;", 7.0, 1.0),
    ],
)
def test_fp32(operation: str, operand: float, expected: float) -> None:
    assert apply(f32(operation), bits32(operand)) == [bits32(expected)]


@pytest.mark.parametrize(
    "operation",
    [
        "add.rn.f32 %f2, %f1, %f1;",
        f"sub.rn.f32 %f2, %f1, {immediate(1.0)};",
        "max.f32 %f2, %f1, %f1;",
        f"max.NaN.f32 %f2, {immediate(1.0)}, %f1;",
        "sqrt.rn.f32 %f2, %f1;",
    ],
)
def test_nan_is_canonical(operation: str) -> None:
    """Whatever NaN goes in, and where there was none."""
    assert apply(f32(operation), 0xFFC00001, 0x7F800001) == [NAN32] * 2


def test_nan_of_infinities() -> None:
    assert apply(f32(f"sub.rn.f32 %f2, %f1, {immediate(np.inf)};"), bits32(np.inf)) == [NAN32]
    assert apply(f64("sub.rn.f64 %fd2, %fd1, %fd1;"), bits64(np.inf), size=64) == [NAN64]


def test_fma_rounds_once() -> None:
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(THREADS).astype(np.float32) for _ in range(3))
    c[: THREADS // 2] = -(a * b)[: THREADS // 2]
    for x, y, z in zip(a, b, c, strict=True):
        body = f"fma.rn.f32 %f2, %f1, {immediate(float(y))}, {immediate(float(z))};"
        (found,) = apply(f32(body), bits32(float(x)))
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        result = Fraction(float(np.uint32(found).view(np.float32)))
        neighbours = [Fraction(float(np.nextafter(np.float32(float(result)), np.float32(s)))) for s in (-9, 9)]
        assert all(abs(result - exact) <= abs(other - exact) for other in neighbours)


@pytest.mark.parametrize(
    ("instruction", "word", "expected"),
    [
        # Saturating conversions; what is no number becomes 0.
        (u32("cvt.rzi.s32.f32 %r5, %f1;"), bits32(-3e9), 0x80000000),
        (u32("cvt.rzi.s32.f32 %r5, %f1;"), bits32(3e9), 0x7FFFFFFF),
        (u32("cvt.rzi.s32.f32 %r5, %f1;"), bits32(-1.9), 0xFFFFFFFF),
        (u32("cvt.rzi.s32.f32 %r5, %f1;"), 0x7FC00000, 0),
        (u32("cvt.rzi.u32.f32 %r5, %f1;"), bits32(-1.0), 0),
        (u32("cvt.rni.s32.f32 %r5, %f1;"), bits32(-2.5), 0xFFFFFFFE),
        (f32("cvt.rn.f32.s32 %f2, %r4;"), 0xFFFFFFFF, bits32(-1.0)),
        (f32("cvt.rn.f32.u32 %f2, %r4;"), 0xFFFFFFFF, bits32(2.0**32)),
        # Of parts of a register.
        (u32("cvt.u16.u32 %rs1, %r4;\ncvt.s32.s8 %r5, %rs1;"), 0x1FF80, 0xFFFFFF80),
        (u32("cvt.u16.u32 %rs1, %r4;\ncvt.u32.u8 %r5, %rs1;"), 0x1FF80, 0x80),
        (f32("cvt.u16.u32 %rs1, %r4;\ncvt.f32.bf16 %f2, %rs1;"), 0xC0E0, bits32(-7.0)),
        (f32("cvt.u16.u32 %rs1, %r4;\ncvt.f64.bf16 %fd1, %rs1;\ncvt.rn.f32.f64 %f2, %fd1;"), 0xC0E0, bits32(-7.0)),
        (u64("cvt.s64.s32 %rd5, %r4;"), 0x80000000, 0xFFFFFFFF80000000),
        (u64("mul.wide.s32 %rd5, %r4, -2;"), 3, 2**64 - 6),
        # 16 bits.
        (u32("cvt.rn.f16.f32 %rs1, %f1;\ncvt.u32.u16 %r5, %rs1;"), bits32(65520.0), 0x7C00),
        (u32("cvt.rn.f16.f32 %rs1, %f1;\ncvt.u32.u16 %r5, %rs1;"), 0xFFC00000, 0x7FFF),
        (u32("cvt.rn.f16.f32 %rs1, %f1;\ncvt.u32.u16 %r5, %rs1;"), bits32(2.0**-25), 0),
        (f32("cvt.u16.u32 %rs1, %r4;\ncvt.f32.f16 %f2, %rs1;"), 0x0001, bits32(2.0**-24)),
        (u32("cvt.rn.bf16.f32 %rs1, %f1;\ncvt.u32.u16 %r5, %rs1;"), 0x3F808000, 0x3F80),
        (u32("cvt.rn.bf16.f32 %rs1, %f1;\ncvt.u32.u16 %r5, %rs1;"), 0x3F818000, 0x3F82),
        (u32("cvt.rn.bf16.f32 %rs1, %f1;\ncvt.u32.u16 %r5, %rs1;"), 0xFFC00000, 0x7FFF),
        (u32(f"cvt.rn.bf16x2.f32 %r5, %f1, {immediate(1.0)};"), bits32(2.0), 0x40003F80),
        # Integers.
        (u32("shl.b32 %r5, %r4, 32;"), 5, 0),
        (u32("mov.u32 %r6, 40;\nshr.s32 %r5, %r4, %r6;"), 0x80000000, 0xFFFFFFFF),
        (u32("shf.l.wrap.b32 %r5, %r4, 1, 4;"), 0xF0000000, 0x1F),
        (u32("shf.r.wrap.b32 %r5, %r4, 1, 36;"), 0xF0, 0x1000000F),
        (u32("bfe.u32 %r5, %r4, 4, 8;"), 0xABCDE, 0xCD),
        (u32("bfe.s32 %r5, %r4, 4, 8;"), 0xABCDE, 0xFFFFFFCD),
        (u32("bfe.s32 %r5, %r4, 28, 8;"), 0x80000000, 0xFFFFFFF8),
        (u32("bfi.b32 %r5, %r4, 0, 8, 4;"), 0xFF, 0xF00),
        (u32("prmt.b32 %r5, %r4, 0, 0x3210;"), 0x04030201, 0x04030201),
        (u32("prmt.b32 %r5, %r4, 0xAABBCCDD, 0x40B6;"), 0x84030281, 0xDD81FFBB),
        (u32("lop3.b32 %r5, %r4, 12, 10, 0xE8;"), 6, 14),
        (u32("mul.hi.u32 %r5, %r4, 16;"), 0xF0000000, 0xF),
        (u32("mul.lo.s32 %r5, %r4, 2146121005;"), 3, 3 * 2146121005 % 2**32),
        (u32("popc.b32 %r5, %r4;"), 0xF0F0, 8),
        (u32("clz.b32 %r5, %r4;"), 0x10000, 15),
        (u32("brev.b32 %r5, %r4;"), 1, 0x80000000),
        (u32("div.s32 %r5, %r4, 2;"), 2**32 - 7, 2**32 - 3),
        (u32("rem.s32 %r5, %r4, 2;"), 2**32 - 7, 2**32 - 1),
        (u32("min.s32 %r5, %r4, 1;"), 0xFFFFFFFF, 0xFFFFFFFF),
        (u32("min.u32 %r5, %r4, 1;"), 0xFFFFFFFF, 1),
        (u32("mov.b32 {%rs1, %rs2}, %r4;\nmov.b32 %r5, {%rs2, %rs1};"), 0x12345678, 0x56781234),
    ],
)
def test_conversions_and_integers(instruction: str, word: int, expected: int) -> None:
    assert apply(instruction, word) == [expected]


@pytest.mark.parametrize(
    ("comparison", "holds"),
    [
        ("eq", (True, False, False)),
        ("ne", (False, True, False)),
        ("equ", (True, False, True)),
        ("neu", (False, True, True)),
        ("lt", (False, False, False)),
        ("ge", (True, True, False)),
        ("leu", (True, False, True)),
        ("ltu", (False, False, True)),
        ("num", (True, True, False)),
        ("nan", (False, False, True)),
    ],
)
def test_comparisons(comparison: str, holds: tuple[bool, ...]) -> None:
    body = f"setp.{comparison}.f32 %p1, %f1, {immediate(1.0)};\nselp.u32 %r5, 1, 0, %p1;"
    assert apply(u32(body), bits32(1.0), bits32(2.0), 0x7FC00000) == [int(each) for each in holds]


def test_predicate_of_a_conjunction() -> None:
    body = "setp.gt.u32 %p1, %r4, 1;\nsetp.lt.and.u32 %p2|%p3, %r4, 5, %p1;\n"
    body += "selp.u32 %r5, 1, 0, %p2;\n@%p3 add.s32 %r5, %r5, 2;"
    assert apply(u32(body), 1, 3, 7) == [0, 1, 2]


def test_threads_part_and_meet() -> None:
    """A loop of as many rounds as the thread's number, in both of two branches, and what follows once."""
    body = """
	setp.lt.u32 %p1, %r1, 10;
	mov.u32 %r5, 0;
	mov.u32 %r6, 0;
	@%p1 bra $L_small;
$L_large:
	add.s32 %r5, %r5, 2;
	add.s32 %r6, %r6, 1;
	setp.lt.u32 %p2, %r6, %r1;
	@%p2 bra $L_large;
	bra.uni $L_end;
$L_small:
	add.s32 %r5, %r5, 3;
	add.s32 %r6, %r6, 1;
	setp.le.u32 %p2, %r6, %r1;
	@%p2 bra $L_small;
$L_end:
	bar.sync 0;
	@!%p1 add.s32 %r5, %r5, 100;
"""
    found = Tensors().run(PLACES + body + u32(""))
    assert found.tolist() == [3 * (i + 1) if i < 10 else 2 * i + 100 for i in range(THREADS)]


def test_shuffles() -> None:
    body = """
	mov.u32 %r4, %tid.x;
	shfl.sync.bfly.b32 %r5|%p1, %r4, 3, 31, -1;
	shfl.sync.down.b32 %r6|%p2, %r4, 30, 31, -1;
	shfl.sync.idx.b32 %r7, %r4, 5, 31, -1;
	@!%p2 mov.u32 %r6, 77;
	mul.lo.s32 %r6, %r6, 100;
	mul.lo.s32 %r7, %r7, 10000;
	add.s32 %r5, %r5, %r6;
	add.s32 %r5, %r5, %r7;
"""
    found = Tensors().run(PLACES + body + u32(""))
    expected = [(i ^ 3) + 100 * (i + 30 if i % 32 < 2 else 77) + 10000 * (5 + i // 32 * 32) for i in range(THREADS)]
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("add.s32", sum(range(32)) + 32 * 2**31),
        ("add.u32", sum(range(32)) + 32 * 2**31),
        ("min.s32", 2**31),
        ("min.u32", 2**31),
        ("max.s32", 2**31 + 31),
        ("and.b32", 2**31),
        ("or.b32", 2**31 + 31),
        ("xor.b32", 0),
    ],
)
def test_reductions(way: str, expected: int) -> None:
    """Of the lanes' numbers, beside the sign."""
    body = f"and.b32 %r4, %r1, 31;\nor.b32 %r4, %r4, 0x80000000;\nredux.sync.{way} %r5, %r4, -1;\n"
    assert Tensors().run(PLACES + body + u32("")).tolist() == [expected % 2**32] * THREADS


SWITCH = """
	and.b32 %r4, %r1, 3;
$L_targets: .branchtargets
		$L_0,
		$L_1,
		$L_2;
	mov.u32 %r5, 9;
	setp.eq.u32 %p1, %r4, 3;
	{skip}
	brx.idx %r4, $L_targets;
$L_0:
	mov.u32 %r5, 10;
	bra.uni $L_end;
$L_1:
	mov.u32 %r5, 11;
$L_2:
	add.s32 %r5, %r5, 1;
$L_end:
"""


def test_switch() -> None:
    found = Tensors().run(PLACES + SWITCH.format(skip="@%p1 bra $L_end;") + u32(""))
    assert found.tolist() == [(10, 12, 10, 9)[i % 4] for i in range(THREADS)]


def test_matrices() -> None:
    """What is stored comes back transposed."""
    body = """
	.shared .align 16 .b8 room[2048];
	mov.u32 %r4, room;
	mul.lo.s32 %r5, %r1, 16;
	add.s32 %r4, %r4, %r5;
	mul.lo.s32 %r6, %r1, 65538;
	add.s32 %r6, %r6, 65536;
	stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r4], {%r6, %r6, %r6, %r6};
	bar.sync 0;
	ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r5, %r7, %r8, %r9}, [%r4];
"""
    found = Tensors().run(PLACES + body + u32(""))
    # Element (i, j) of a warp's matrix is 2 * (4 * i + j // 2 + 32 * warp) / 2 words of two, here its number and warp.
    for warp in range(2):
        lanes = np.arange(32) + 32 * warp
        words = (lanes * 65538 + 65536).astype(np.uint32)
        matrix = words.view(np.uint16).reshape(8, 8)
        expected = np.ascontiguousarray(matrix.T).view(np.uint32).reshape(-1)
        assert np.array_equal(found[lanes], expected)


ATOMIC = PLACES + "ld.param.u64 %rd6, [k_param_1];\natom.global.add.u32 %r5, [%rd6], 2;\n"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_atomics_of_all_blocks(schedule: str) -> None:
    tensors = Tensors(blocks=5)
    tensors.output[0] = 7
    assert tensors.run(ATOMIC, schedule=schedule, seed=3)[0] == 7 + 2 * 5 * THREADS


def test_barrier_with_a_predicate() -> None:
    body = "setp.eq.u32 %p1, %r1, 63;\nbar.red.or.pred %p2, 0, %p1;\nbar.red.and.pred %p3, 0, %p1;\n"
    found = Tensors().run(PLACES + body + u32("selp.u32 %r5, 1, 0, %p2;\n@%p3 mov.u32 %r5, 5;"))
    assert set(found.tolist()) == {1}


def test_counts() -> None:
    counts = Counts()
    Tensors(blocks=2).run(PLACES + "ld.global.v2.u32 {%r4, %r5}, [%rd1];" + u32(""), counts=counts)
    assert counts.instructions == {0: 12, 1: 12}
    accesses = {key: (own.requests, own.sectors, own.needed) for key, own in counts.accesses.items()}
    assert accesses == {("input", "read"): (4, 32, 32), ("output", "write"): (4, 32, 32)}


@pytest.mark.parametrize(("stride", "turns"), [(4, 1), (8, 2), (128, 32)])
def test_bank_conflicts(stride: int, turns: int) -> None:
    counts = Counts()
    body = f".shared .align 4 .b8 room[8192];\nmul.lo.s32 %r4, %r1, {stride};\nst.shared.u32 [%r4], %r1;"
    Tensors().run(PLACES + body, counts=counts)
    assert counts.bank_turns == [2 * turns, 2]


SHARED = (
    PLACES
    + """
	.shared .align 8 .b8 room[512];
	mul.lo.s32 %r4, %r1, 8;
	mov.u32 %r5, room;
	add.s32 %r6, %r5, %r4;
	xor.b32 %r7, %r4, 8;
	add.s32 %r7, %r7, %r5;
"""
)
FLAG = """
	ld.param.u64 %rd6, [k_param_1];
	setp.ne.u32 %p1, %r1, 0;
	@%p1 bra $L_wait;
	st.global.u64 [%rd2], %rd3;
	{first}
	atom.global{order}.add.u32 %r8, [%rd6+8], 1;
	{second}
$L_wait:
	setp.eq.u32 %p2, %r8, 2;
	setp.eq.u32 %p3, %r1, 0;
	and.pred %p2, %p2, %p3;
	bar.red.or.pred %p3, 0, %p2;
	@!%p3 bra $L_all;
	ld.global.u64 %rd7, [%rd6+512];
	ld.global.u64 %rd8, [%rd6+1024];
$L_all:
"""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (PLACES + "ld.global.u64 %rd5, [%rd1+8];", "thread 63: line .*: 8 bytes at 0x.* lie in no region"),
        (PLACES + "st.global.u64 [%rd2+-8], %rd3;", "thread 0: line .* lie in no region"),
        (PLACES + "ld.global.u64 %rd5, [%rd1+4];", "misaligned for 8 bytes"),
        (PLACES + "ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%rd1];", "misaligned for 16 bytes"),
        (PLACES + "st.global.u32 [%rd1], %r1;", "input is written, which is only read"),
        (PLACES + "ld.param.u64 %rd6, [k_param_1];\nst.global.u32 [%rd6], %r1;", "others write another value at once"),
        (PLACES + "st.global.u64 [%rd2], %rd3;\nld.global.nc.u64 %rd4, [%rd2];", "read as if it never were"),
        (SHARED + "ld.shared.u64 %rd5, [%r6];", "shared memory is read where nothing has written it"),
        (SHARED + "st.shared.u64 [%r6+8], %rd3;", "byte 519 of 512 bytes of shared memory"),
        (SHARED + "st.shared.u64 [%r6+4], %rd3;", "misaligned for 8 bytes of shared memory"),
        (SHARED + "st.shared.u64 [%r6], %rd3;\nld.shared.u64 %rd5, [%r7];", "a race at byte .* of shared memory"),
        (
            SHARED + "st.shared.u64 [%r6], %rd3;\nbar.sync 0;\nld.shared.u64 %rd5, [%r7];\nst.shared.u64 [%r6], %rd5;",
            "a race at byte .* while .* reads it",
        ),
        (
            SHARED + "st.shared.u64 [%r6], %rd3;\nshfl.sync.bfly.b32 %r8, %r1, 1, 31, -1;\nld.shared.u64 %rd5, [%r7];",
            "a race at byte .* while .* writes it",
        ),
        (PLACES + "setp.lt.u32 %p1, %r1, 3;\n@%p1 bra $L_b;\nbar.sync 0;\n$L_b:", "others wait at a barrier"),
        (
            PLACES + "setp.lt.u32 %p1, %r1, 3;\n@%p1 bra $L_b;\nbar.sync 0;\nbra $L_c;\n$L_b:\nbar.sync 0;\n$L_c:",
            "threads wait at different ones",
        ),
        (
            PLACES + "setp.lt.u32 %p1, %r1, 3;\n@%p1 shfl.sync.bfly.b32 %r8, %r1, 1, 31, -1;",
            "executed by threads 0x7 of a warp, but for 0xffffffff",
        ),
        (PLACES + "setp.lt.u32 %p1, %r1, 3;\n@%p1 shfl.sync.bfly.b32 %r8, %r1, 1, 31, 7;", "does not take part"),
        (PLACES + "$L_ever:\nbra $L_ever;", "does not end"),
        (PLACES + SWITCH.format(skip=""), "line .*: brx.idx"),
        (FLAG.format(first="", order="", second="membar.gl;"), "a race at byte 512 of output"),
        (FLAG.format(first="membar.gl;", order="", second=""), "a race at byte 512 of output"),
        (FLAG.format(first="", order=".gpu.acquire", second=""), "a race at byte 512 of output"),
    ],
)
def test_faults(body: str, message: str) -> None:
    blocks = 3 if "k_param_1" in body and "atom" in body else 1
    tensors = Tensors(blocks=blocks)
    tensors.output[1] = 0
    body = PLACES + body if "atom" in body else body
    with pytest.raises(Fault, match=message):
        tensors.run(body)


@pytest.mark.parametrize(
    "body",
    [
        SHARED + "st.shared.u64 [%r6], %rd3;\nbar.sync 0;\nld.shared.u64 %rd5, [%r7];",
        SHARED + "st.shared.u64 [%r6], %rd3;\nbar.warp.sync -1;\nld.shared.u64 %rd5, [%r7];",
        # What is shuffled depends on what was read.
        SHARED
        + "st.shared.u64 [%r6], %rd3;\nbar.sync 0;\nld.shared.u64 %rd5, [%r7];\n"
        + "shfl.sync.bfly.b32 %r8, %r1, 1, 31, -1;\nst.shared.u64 [%r6], %rd5;",
        PLACES + FLAG.format(first="membar.gl;", order="", second="membar.gl;"),
        PLACES + FLAG.format(first="fence.acq_rel.gpu;", order=".gpu.relaxed", second="fence.acq_rel.gpu;"),
        PLACES + FLAG.format(first="", order=".gpu.acq_rel", second=""),
    ],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_ordered_is_no_race(body: str, schedule: str) -> None:
    tensors = Tensors(blocks=3)
    tensors.output[1] = 0
    tensors.run(body, schedule=schedule)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("tex.2d.v4.f32.f32 {%f1, %f2, %f3, %f4}, [%rd1, {%f1, %f2}];", "unknown opcode tex"),
        ("add.rn.ftz.f32 %f2, %f1, %f1;", "unknown modifier .ftz"),
        ("div.full.f32 %f2, %f1, %f1;", "an approximate division"),
        ("sqrt.approx.f32 %f2, %f1;", "none of rn"),
        ("add.sat.s32 %r5, %r4, 1;", "unknown modifier .sat"),
        ("add.rn.bf16 %rs1, %rs2, %rs2;", "arithmetic of bf16"),
        ("add.s32 %r99, %r4, 1;", "no such register: %r99"),
        ("ld.global.u32 %r5, [nowhere];", "no such symbol: nowhere"),
        ("bra $L_nowhere;", "no such label"),
        (".callprototype ();", "callprototype"),
        ("atom.global.add.f32 %f2, [%rd1], %f1;", "an atomic operation on f32"),
        ("bar.sync 0, 32;", "a barrier of a part of the block"),
    ],
)
def test_what_is_unknown_is_an_error_with_its_line(statement: str, message: str) -> None:
    line = 1 + (HEAD + "mov.b32 %f1, 0f00000000;").count("\n") + 1
    with pytest.raises(Unknown, match=rf"line {line}: .*{message}|line {line}: {message}"):
        Tensors().run(f"mov.b32 %f1, 0f00000000;mov.u32 %r4, 0;mov.u64 %rd1, 0;mov.u16 %rs2, 0;\n{statement}\n")
