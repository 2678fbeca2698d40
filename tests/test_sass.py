"""The machine code of the built module: wide streaming accesses, no spills, no contraction. Needs no GPU."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache

import pytest
from host.toolchain import PTX_ARITHMETIC, Instruction, exact_ptx, instruction, listing, resources, rules

from signadam_ext import _C

BUILT = _C.build_info()
pytestmark = pytest.mark.skipif(BUILT["cuda"] is None, reason="the module was built without CUDA")
ARCHITECTURES = [name for name in BUILT["cuda_architectures"].split("+") if name.startswith("sm_")]
VIRTUAL = [name for name in BUILT["cuda_architectures"].split("+") if name.startswith("compute_")]
STATISTICS = ("none", "gather", "only")


RULES = rules()
#: (rule, statistics) of every kernel in csrc/cuda/step.cu.
KERNELS = [*((name, "none") for name in RULES), ("sign_adam_pp", "gather"), ("sign_adam_pp", "only")]
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
each_kernel = pytest.mark.parametrize(("rule", "statistics"), KERNELS, ids=["-".join(kernel) for kernel in KERNELS])


@dataclass
class Kernel:
    registers: int = 0
    stack: int = 0
    local: int = 0
    code: list[Instruction] = field(default_factory=list)

    def of(self, pattern: str) -> list[Instruction]:
        """Instructions of this kind, whatever their modifiers."""
        return [x for x in self.code if re.match(pattern + r"(\.|$)", x.operation)]


def kernel_name(mangled: str) -> tuple[str, str] | None:
    match = re.search(r"6kernelINS_\d+(\w+?)ELNS_10StatisticsE(\d)E", mangled)
    return None if match is None else (match[1], STATISTICS[int(match[2])])


@cache
def module() -> dict[str, dict[tuple[str, str], Kernel]]:
    """Kernels of each architecture with machine code in the module, by (functor, statistics)."""
    found: dict[str, dict[tuple[str, str], Kernel]] = defaultdict(lambda: defaultdict(Kernel))
    architecture, kernel = "", None
    for line in listing("--dump-resource-usage", _C.__file__).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture, kernel = match[1], None
            found[architecture]  # an image without kernels counts as well
        elif match := re.match(r"\s*Function (\S+):", line):
            name = kernel_name(match[1])
            assert name is not None, match[1]
            kernel = found[architecture][name]
        elif kernel is not None and (used := resources(line)):
            kernel.registers, kernel.stack, kernel.local = used
    for line in listing("-sass", _C.__file__).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture, kernel = match[1], None
        elif match := re.match(r"\s*Function : (\S+)", line):
            name = kernel_name(match[1])
            assert name is not None, match[1]
            kernel = found[architecture][name]
        elif kernel is not None and (found_here := instruction(line)):
            kernel.code.append(found_here)
    return found


@cache
def ptx() -> dict[str, dict[tuple[str, str], str]]:
    """PTX of each kernel, by virtual architecture; what ptxas makes machine code of, at build time or in the driver."""
    found: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
    for image in listing("-ptx", _C.__file__).split("Fatbin ptx code:")[1:]:
        architecture = re.search(r"^arch = sm_(\w+)", image, re.MULTILINE)
        assert architecture is not None
        for entry in re.split(r"^\.(?:visible |weak )?entry ", image, flags=re.MULTILINE)[1:]:
            name = kernel_name(entry)
            assert name is not None, entry[:200]
            found[f"compute_{architecture[1]}"][name] = entry
    return found


def kernel_of(architecture: str, rule: str, statistics: str) -> Kernel:
    return module()[architecture][RULES[rule].struct, statistics]


def test_architectures_and_kernels() -> None:
    """What the build says it holds, and nothing else: no stub for another architecture, no kernel left out."""
    assert ARCHITECTURES
    expected = {(RULES[rule].struct, statistics) for rule, statistics in KERNELS}
    assert set(RULES) == set(_C.RULES)
    assert set(module()) == set(ARCHITECTURES)
    for architecture, kernels in module().items():
        assert set(kernels) == expected, architecture
        assert all(len(kernel.code) > 100 for kernel in kernels.values()), architecture
    assert set(ptx()) == set(VIRTUAL)
    for architecture, entries in ptx().items():
        assert set(entries) == expected, architecture


@each_architecture
@each_kernel
def test_wide_streaming_accesses(architecture: str, rule: str, statistics: str) -> None:
    kernel = kernel_of(architecture, rule, statistics)
    updates = statistics != "only"
    moments = RULES[rule].moments if updates else 0
    loads = [x.operation for x in kernel.of("LDG") if x.operation.endswith(".128")]
    stores = [x.operation for x in kernel.of("STG") if x.operation.endswith(".128")]
    # A piece of 8 elements is 32 bytes of each fp32 operand: two accesses.
    assert len(loads) >= 2 * (2 + moments)
    assert len(stores) >= 2 * (1 + moments) if updates else not stores
    # Each element is used once: evict first.
    assert all(".EF." in operation for operation in loads + stores)


@each_architecture
@each_kernel
def test_no_spills(architecture: str, rule: str, statistics: str) -> None:
    kernel = kernel_of(architecture, rule, statistics)
    assert 0 < kernel.registers <= 128  # two blocks of 256 threads on a multiprocessor
    assert (kernel.stack, kernel.local) == (0, 0)
    assert not kernel.of("LDL") and not kernel.of("STL")


@each_architecture
@each_kernel
def test_no_contraction(architecture: str, rule: str, statistics: str) -> None:
    """Multiplications and additions are instructions of their own.

    Correctly rounded division and root are made of FFMA, so rules that have one are not looked at here: their PTX is.
    The statistics end with division and root in double, made of DFMA and, to look at a divisor's exponent, an FFMA that
    multiplies by zero.
    """
    kernel = kernel_of(architecture, rule, statistics)
    fused = kernel.of("FFMA2?")
    assert kernel.of("FADD2?") and kernel.of("FMUL2?")
    if statistics != "none":
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
def test_ptx_rounds_every_operation(architecture: str, rule: str, statistics: str) -> None:
    """In PTX division and root are instructions, so here no kernel may contain a fused or an approximate one."""
    entry = ptx()[architecture][RULES[rule].struct, statistics]
    arithmetic = set(PTX_ARITHMETIC.findall(entry))
    assert arithmetic <= exact_ptx("f32") | exact_ptx("f64")
    assert {"add.rn.f32", "mul.rn.f32"} <= arithmetic
    assert ("div.rn.f32" in arithmetic) == (RULES[rule].divides and statistics != "only")
    assert ({"div.rn.f64", "sqrt.rn.f64"} <= arithmetic) == (statistics != "none")
    assert not re.search(r"\.(approx|ftz|full)\b", entry)
