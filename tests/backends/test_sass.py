"""The machine code of the built module: wide streaming accesses, no spills, no contraction. Needs no GPU.

The quick run reads the instructions of the last architecture alone; which kernels there are it asks of all.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cache

import pytest
from support.launches import ANY_RULE_KERNELS
from support.toolchain import (
    PTX_ARITHMETIC,
    AnyKernelName,
    Instruction,
    any_kernel_name,
    exact_ptx,
    fixed_kernels,
    instruction,
    listing,
    ptx,
    resources,
    rules,
)

from reporting.machine_code import STORAGES, BeginKernelName, KernelName, VoteKernelName, kernel_label
from signadam_ext import _C

BUILT = _C.build_info()
pytestmark = pytest.mark.skipif(BUILT["cuda"] is None, reason="the module was built without CUDA")
ARCHITECTURES = [name for name in BUILT["cuda_architectures"].split("+") if name.startswith("sm_")]
VIRTUAL = [name for name in BUILT["cuda_architectures"].split("+") if name.startswith("compute_")]

RULES = rules()
#: (rule, statistics, storage) of every kernel.
KERNELS = [
    (rule, threshold_pass, storage)
    for storage in STORAGES
    for rule, threshold_pass in [
        *((name, "none") for name in RULES),
        ("sign_adam_pp", "same_pass"),
        ("sign_adam_pp", "pass_before"),
    ]
    if not (storage == "plain" and RULES[rule].aux)
    and not (storage == "with_statistics" and threshold_pass == "pass_before")
]
#: The kernels for fixed forms.
FIXED = fixed_kernels()
WIDE_FORMAT = _C.FORMATS["fp32"][0]
FORMATS = [_C.FORMATS[name][0] for name in ("fp32", "bf16", "fp16")]
MEMORIES = [memory.value for memory in _C.VoteMemory.__members__.values()]
USES = [use.value for use in _C.VoteUse.__members__.values()]
STOCHASTIC = _C.VoteUse.STEP_STOCHASTIC.value
WIDTHS = (2, 4, 8, 16)
#: The passes of a vote; a sum is counted in every width, a majority in the first. fp32 is not rounded.
CASTS = [VoteKernelName("cast", own) for own in itertools.product(MEMORIES, (0, 1), FORMATS)]
COUNTS = [VoteKernelName("count", own) for own in ((2, 1), *((bits, 0) for bits in WIDTHS))]
READS = [
    VoteKernelName("read", own)
    for own in itertools.product(USES, FORMATS, WIDTHS)
    if own[:2] != (STOCHASTIC, WIDE_FORMAT)
]
VOTE_KERNELS = [*CASTS, *COUNTS, *READS]
#: Those of a step that begins on the device.
NORM, BEGIN = BEGIN_KERNELS = (BeginKernelName("norm"), BeginKernelName("begin"))
each_vote = pytest.mark.parametrize(
    "name", VOTE_KERNELS, ids=["-".join([name.vote_pass, *map(str, name.arguments)]) for name in VOTE_KERNELS]
)
each_architecture = pytest.mark.parametrize(
    "architecture",
    [*(pytest.param(name, marks=pytest.mark.thorough) for name in ARCHITECTURES[:-1]), *ARCHITECTURES[-1:]],
)
each_kernel = pytest.mark.parametrize(
    ("rule", "threshold_pass", "storage"), KERNELS, ids=["-".join(kernel) for kernel in KERNELS]
)


@dataclass
class Kernel:
    registers: int = 0
    stack: int = 0
    local: int = 0
    code: list[Instruction] = field(default_factory=list)

    def of(self, pattern: str) -> list[Instruction]:
        """Instructions of this kind, whatever their modifiers."""
        return [x for x in self.code if re.match(pattern + r"(\.|$)", x.operation)]

    def wide(self) -> dict[str, int]:
        """How many streaming accesses of 8 and of 16 bytes there are."""
        found = Counter(x.operation for x in self.code)
        return {f"{name}.E.EF.{bits}": found[f"{name}.E.EF.{bits}"] for name in ("LDG", "STG") for bits in (64, 128)}


@cache
def kernels_without_code() -> dict[str, dict[AnyKernelName, Kernel]]:
    """Kernels of each architecture with machine code in the module, and what they use."""
    found: dict[str, dict[AnyKernelName, Kernel]] = defaultdict(lambda: defaultdict(Kernel))
    architecture, kernel = "", None
    for line in listing("--dump-resource-usage", _C.__file__).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture, kernel = match[1], None
            found[architecture]  # an image without kernels counts as well
        elif match := re.match(r"\s*Function (\S+):", line):
            kernel = found[architecture][any_kernel_name(match[1])]
        elif kernel is not None and (used := resources(line)):
            kernel.registers, kernel.stack, kernel.local = used
    return found


@cache
def kernels(architecture: str) -> dict[AnyKernelName, Kernel]:
    """The same of one architecture, with their instructions."""
    found, kernel = kernels_without_code()[architecture], None
    for line in listing("-arch", architecture, "-sass", _C.__file__).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            assert match[1] == architecture
            kernel = None
        elif match := re.match(r"\s*Function : (\S+)", line):
            kernel = found[any_kernel_name(match[1])]
        elif kernel is not None and (found_here := instruction(line)):
            kernel.code.append(found_here)
    return found


def kernel_of(architecture: str, rule: str, threshold_pass: str, storage: str) -> Kernel:
    return kernels(architecture)[KernelName(RULES[rule].struct, threshold_pass, storage)]


def test_architectures_and_kernels(thorough: bool) -> None:
    """What the build says it holds, and nothing else: no stub for another architecture, no kernel left out."""
    assert ARCHITECTURES
    general = {KernelName(RULES[rule].struct, threshold_pass, storage) for rule, threshold_pass, storage in KERNELS}
    assert len(general) == len(KERNELS)
    assert len(set(FIXED)) == len(FIXED) <= 80
    expected = {*general, *FIXED, *ANY_RULE_KERNELS, *VOTE_KERNELS, *BEGIN_KERNELS}
    assert set(RULES) == set(_C.RULES)
    assert set(kernels_without_code()) == set(ARCHITECTURES)
    for architecture, found in kernels_without_code().items():
        assert set(found) == expected, architecture
    for architecture in ARCHITECTURES if thorough else ARCHITECTURES[-1:]:
        assert all(len(kernel.code) > 100 for kernel in kernels(architecture).values()), architecture
    assert set(ptx(_C.__file__)) == set(VIRTUAL)
    for architecture, entries in ptx(_C.__file__).items():
        assert set(entries) == expected, architecture


@each_architecture
@each_kernel
def test_wide_streaming_accesses(architecture: str, rule: str, threshold_pass: str, storage: str) -> None:
    kernel = kernel_of(architecture, rule, threshold_pass, storage)
    updates = threshold_pass != "pass_before"
    moments = RULES[rule].moments if updates else 0
    reads = moments + (updates and RULES[rule].reads_variance)
    wide = {name: [x for x in kernel.of(name) if x.operation.endswith(".128")] for name in ("LDG", "STG")}
    # A piece of 8 elements is 32 bytes of each fp32 operand: two accesses, of which the first serves 16-bit ones.
    assert len(wide["LDG"]) >= 2 * (2 + reads)
    assert len(wide["STG"]) >= 2 * (1 + moments) if updates else not wide["STG"]
    if storage != "plain":
        # 8 bytes of the first moment's codes; of split8 as many beside the parameter, of a master four times that.
        halves = {name: [x for x in kernel.of(name) if x.operation.endswith(".EF.64")] for name in ("LDG", "STG")}
        assert len(halves["LDG"]) >= 4 + min(moments, 1)
        assert len(halves["STG"]) >= 4 + min(moments, 1) if updates else not halves["STG"]
    # Each element is used once: evict first. What is not said to be streamed is the table and the statistics.
    streamed = [x for name in ("LDG", "STG") for x in wide[name]]
    assert all(".EF." in x.operation for x in streamed)
    if updates and threshold_pass == "none" and storage != "with_statistics":
        assert all(".EF" in x.operation for x in kernel.of("STG"))


@each_architecture
@each_kernel
def test_no_spills(architecture: str, rule: str, threshold_pass: str, storage: str) -> None:
    kernel = kernel_of(architecture, rule, threshold_pass, storage)
    # Two blocks of 256 threads on a multiprocessor, or one: see blocks_at_once.
    alone = storage == "any" and RULES[rule].moments > 1 and threshold_pass != "pass_before"
    alone = alone or threshold_pass == "same_pass" or storage == "with_statistics" or rule == "ada_bound"
    assert 0 < kernel.registers <= (255 if alone else 128)
    assert kernel.stack == kernel.local == 0
    assert not kernel.of("LDL") and not kernel.of("STL")


@each_architecture
@each_kernel
def test_only_exponents_take_neighbours(architecture: str, rule: str, threshold_pass: str, storage: str) -> None:
    """Four threads find the largest magnitude of their block in two exchanges, without a word of shared memory."""
    scaled = storage != "plain" and RULES[rule].has_blocks
    exchanges = kernel_of(architecture, rule, threshold_pass, storage).of("SHFL")
    assert len(exchanges) == (2 if scaled else 0)


@each_architecture
@each_kernel
def test_no_contraction(architecture: str, rule: str, threshold_pass: str, storage: str) -> None:
    """Multiplications and additions are instructions of their own.

    Correctly rounded division and root are made of FFMA, so rules that have one are not looked at here: their PTX is.
    The statistics end with division and root in double, made of DFMA and, to look at a divisor's exponent, an FFMA that
    multiplies by zero.
    """
    kernel = kernel_of(architecture, rule, threshold_pass, storage)
    fused = kernel.of("FFMA2?")
    assert kernel.of("FADD2?") and kernel.of("FMUL2?")
    if threshold_pass != "none":
        assert all(x.operands[1] == "RZ" for x in fused), fused
        at = [i for i, x in enumerate(kernel.code) if x.operation.startswith("ATOM")]
        assert len(at) == 1
        # Before the count of arrivals gradients are summed; after it come division and root.
        sums, end = Kernel(code=kernel.code[: at[0]]), Kernel(code=kernel.code[at[0] :])
        assert len(sums.of("DMUL")) >= 8 and len(sums.of("DADD")) >= 16
        assert not sums.of("DFMA")
        assert len(end.of("DMUL")) >= 3  # mean * mean, b1 * a, (1 - b1) * std
    elif RULES[rule].divides:
        assert fused and kernel.of("MUFU")
    else:
        assert not fused and not kernel.of("DFMA") and not kernel.of("MUFU")


@pytest.mark.parametrize("architecture", VIRTUAL)
@each_kernel
def test_ptx_rounds_every_operation(architecture: str, rule: str, threshold_pass: str, storage: str) -> None:
    """In PTX division and root are instructions, so here no kernel may contain a fused or an approximate one."""
    entry = ptx(_C.__file__)[architecture][KernelName(RULES[rule].struct, threshold_pass, storage)]
    arithmetic = set(PTX_ARITHMETIC.findall(entry))
    assert arithmetic <= exact_ptx("f32") | exact_ptx("f64")
    assert {"add.rn.f32", "mul.rn.f32"} <= arithmetic
    assert ("div.rn.f32" in arithmetic) == (RULES[rule].divides and threshold_pass != "pass_before")
    assert ({"div.rn.f64", "sqrt.rn.f64"} <= arithmetic) == (threshold_pass != "none")
    assert not re.search(r"\.(approx|ftz|full)\b", entry)


#: Streamed accesses of 16 bytes and of 8 for eight elements of a tensor in a format or of a parameter's low bits.
SIXTEEN = {"fp32": 2, "bf16": 1, "fp16": 1}
EIGHT = {"int8": 1, "block8": 1, "split8": 1, "split16": 2, "master": 4}


@each_architecture
@pytest.mark.parametrize("name", FIXED, ids=map(kernel_label, FIXED))
def test_kernels_for_fixed_forms(architecture: str, name: KernelName) -> None:
    """Nothing spills or is contracted, and whole pieces move by the widest accesses there are.

    Blocks on a multiprocessor, of 256 threads each: four without a moment, three with one, otherwise two.
    """
    kernel, forms = kernels(architecture)[name], name.forms
    rule = next(rule for rule in RULES.values() if rule.struct == name.functor)
    assert forms is not None
    updates_alone = name.threshold_pass == "none" and name.storage != "with_statistics"
    most = {0: 64, 1: 80}.get(rule.moments, 128) if updates_alone else 128
    assert 0 < kernel.registers <= most and kernel.stack == kernel.local == 0
    assert not kernel.of("LDL") and not kernel.of("STL")
    assert len(kernel.of("SHFL")) == (6 if forms.exp_avg == "block8" else 0)
    updates = name.threshold_pass != "pass_before"
    written = [forms.param, *(forms.exp_avg, forms.exp_avg_sq)[: rule.moments], forms.param_storage] if updates else []
    wide = kernel.wide()
    for operation, tensors in (("LDG", [forms.grad, *written]), ("STG", written)):
        for bits, per_piece in ((128, SIXTEEN), (64, EIGHT)):
            least = sum(per_piece.get(tensor, 0) for tensor in tensors)
            # Chunks that are full and aligned, those but for the gradient, and all others have code of their own.
            apart = per_piece.get(forms.grad, 0) if operation == "LDG" else 0
            found = wide[f"{operation}.E.EF.{bits}"]
            assert found >= 3 * least - apart if least else found == 0, (operation, bits, found, least)
    fused = kernel.of("FFMA2?")
    assert kernel.of("FADD2?") and kernel.of("FMUL2?")
    if name.threshold_pass == "none" and not rule.divides:
        assert not fused and not kernel.of("DFMA") and not kernel.of("MUFU")
    elif not rule.divides:
        assert all(x.operands[1] == "RZ" for x in fused), fused


@pytest.mark.parametrize("architecture", VIRTUAL)
@pytest.mark.parametrize("name", FIXED, ids=map(kernel_label, FIXED))
def test_ptx_of_kernels_for_fixed_forms(architecture: str, name: KernelName) -> None:
    entry = ptx(_C.__file__)[architecture][name]
    rule = next(rule for rule in RULES.values() if rule.struct == name.functor)
    arithmetic = set(PTX_ARITHMETIC.findall(entry))
    assert arithmetic <= exact_ptx("f32") | exact_ptx("f64")
    assert {"add.rn.f32", "mul.rn.f32"} <= arithmetic
    assert ("div.rn.f32" in arithmetic) == (rule.divides and name.threshold_pass != "pass_before")
    assert not re.search(r"\.(approx|ftz|full)\b", entry)


@each_architecture
@pytest.mark.parametrize("name", ANY_RULE_KERNELS, ids=["-".join(name[1:3]) for name in ANY_RULE_KERNELS])
def test_kernels_for_any_rule(architecture: str, name: KernelName) -> None:
    """One block, whose registers hold a piece of every operand; nothing spills."""
    kernel = kernels(architecture)[name]
    assert 0 < kernel.registers <= 255 and kernel.stack == kernel.local == 0
    assert not kernel.of("LDL") and not kernel.of("STL")
    assert bool(kernel.wide()["STG.E.EF.128"]) == (name.threshold_pass == "same_pass")


@pytest.mark.parametrize("architecture", VIRTUAL)
@pytest.mark.parametrize("name", ANY_RULE_KERNELS, ids=["-".join(name[1:3]) for name in ANY_RULE_KERNELS])
def test_ptx_of_kernels_for_any_rule(architecture: str, name: KernelName) -> None:
    entry = ptx(_C.__file__)[architecture][name]
    assert set(PTX_ARITHMETIC.findall(entry)) <= exact_ptx("f32") | exact_ptx("f64")
    assert not re.search(r"\.(approx|ftz|full)\b", entry)


@each_architecture
@each_vote
def test_votes(architecture: str, name: VoteKernelName) -> None:
    kernel = kernels(architecture)[name]
    # Five blocks of 256 threads on a multiprocessor.
    assert 0 < kernel.registers <= 48 and kernel.stack == kernel.local == 0
    assert not kernel.of("LDL") and not kernel.of("STL")
    # Nothing is contracted; division, with which only reading ends, is made of FFMA.
    fused = kernel.of("FFMA2?")
    if name.vote_pass == "read":
        assert fused and kernel.of("MUFU")
    else:
        assert not fused and not kernel.of("MUFU")
    assert not kernel.of("DFMA")
    # Four neighbours are an access of 16 bytes in fp32, of 8 in a 16-bit format.
    # The compiler may have made several paths, each with its own.
    wide, least = kernel.wide(), least_accesses(name)
    assert all(wide[access] >= count if count else wide[access] == 0 for access, count in least.items()), wide


def least_accesses(name: VoteKernelName) -> dict[str, int]:
    """How many wide accesses a vote's kernel has of its tensors."""
    loads: list[int] = []
    stores: list[int] = []
    if name.vote_pass == "cast":
        memory, residual, number = name.arguments
        kept = [16] * ((memory > 0) + residual)
        loads, stores = [16 if number == WIDE_FORMAT else 8, *kept], kept
    elif name.vote_pass == "read":
        use, number, _ = name.arguments
        stores = [16 if number == WIDE_FORMAT else 8]
        loads = stores if use != _C.VoteUse.WRITE.value else []
    return {
        f"{operation}.E.EF.{8 * size}": own.count(size)
        for operation, own in (("LDG", loads), ("STG", stores))
        for size in (8, 16)
    }


@pytest.mark.parametrize("architecture", VIRTUAL)
@each_vote
def test_ptx_of_votes_rounds_every_operation(architecture: str, name: VoteKernelName) -> None:
    entry = ptx(_C.__file__)[architecture][name]
    arithmetic = set(PTX_ARITHMETIC.findall(entry))
    assert arithmetic <= exact_ptx("f32")
    assert ("div.rn.f32" in arithmetic) == (name.vote_pass == "read")
    if name.vote_pass == "cast":
        multiplies = any(name.arguments[:2])  # by a momentum or a residual
    else:
        multiplies = name.vote_pass == "read" and name.arguments[0] != _C.VoteUse.WRITE.value
    assert ("mul.rn.f32" in arithmetic) == multiplies
    assert not re.search(r"\.(approx|ftz|full)\b", entry)


@each_architecture
@pytest.mark.parametrize("name", BEGIN_KERNELS, ids=["norm", "begin"])
def test_kernels_that_begin_a_step(architecture: str, name: BeginKernelName) -> None:
    kernel = kernels(architecture)[name]
    # Four blocks of the norm fit a multiprocessor; the other one's registers of programs lie in shared memory.
    assert 0 < kernel.registers <= (64 if name == NORM else 96) and kernel.stack == kernel.local == 0
    assert not kernel.of("LDL") and not kernel.of("STL")
    wide = kernel.wide()
    assert not wide["STG.E.EF.128"] and not wide["STG.E.EF.64"]
    fused = kernel.of("FFMA2?")
    if name == NORM:
        # Pieces in flight: two accesses of each in fp32, one in a 16-bit format, of full chunks and of others.
        assert wide["LDG.E.EF.128"] == 2 * 4 * (2 + 1 + 1)
        assert len(kernel.of("DMUL")) == 2 * 4 * 8 * 3
        assert not fused and not kernel.of("DFMA") and not kernel.of("MUFU")
    else:
        # Of division and root; the FFMA looks at a divisor's exponent.
        assert kernel.of("DFMA") and kernel.of("MUFU") and all(x.operands[1] == "RZ" for x in fused)


@pytest.mark.parametrize("architecture", VIRTUAL)
def test_ptx_of_kernels_that_begin_a_step(architecture: str) -> None:
    entries = ptx(_C.__file__)[architecture]
    assert set(PTX_ARITHMETIC.findall(entries[NORM])) == {"add.rn.f64", "mul.rn.f64"}
    assert set(PTX_ARITHMETIC.findall(entries[BEGIN])) == exact_ptx("f64")
    assert not any(re.search(r"\.(approx|ftz|full)\b", entries[name]) for name in BEGIN_KERNELS)
