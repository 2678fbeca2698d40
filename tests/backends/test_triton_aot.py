"""The Triton kernels compiled ahead of time for NVIDIA and AMD: no approximation, no contraction, wide accesses.

Every kernel that the backend can launch in fp32, and every storage form in one kernel or another, for one target of
each maker, most of them for the others; some mixtures of dtypes, with a rule of one moment and one of two. The quick
run compiles one of those that share code.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from support.toolchain import (
    PTX_ARITHMETIC,
    Instruction,
    compile_triton,
    exact_ptx,
    instruction,
    listing,
    resources,
    rules,
)

from reporting.machine_code import THRESHOLD_PASSES
from signadam_ext.core.native import compiled as _C

pytest.importorskip("triton")

#: By name, the numbers of formats and the bits of an element.
FORMATS: dict[str, tuple[int, int]] = _C.FORMATS
#: With the bits of what lies beside an element of the parameter.
PARAM_STORAGES = {"nearest": 0, "stochastic": 0, "split16": 16, "split8": 8, "master": 32}
RULES = rules()
NVIDIA = ("sm_80", "sm_90", "sm_100")
AMD = "gfx942"


class Job(NamedTuple):
    target: str
    rule: str
    threshold_pass: str = "none"
    param: str = "fp32"
    grad: str = "fp32"
    exp_avg: str = "fp32"
    exp_avg_sq: str = "fp32"
    param_storage: str = "nearest"
    observes: str = "without_statistics"
    runs: str = "one_run"
    scale: str = ""

    @property
    def kernel(self) -> str:
        return "update"

    @property
    def divides(self) -> bool:
        """Whether it runs a rule that divides. A gradient alone is summed before, but for caution the rule's step."""
        return RULES[self.rule].divides and (self.threshold_pass != "pass_before" or self.scale == "caution")

    def constants(self) -> dict[str, object]:
        return {
            "RULE": self.rule,
            "MOMENTS": RULES[self.rule].moments,
            "PARAM": FORMATS[self.param][0],
            "GRAD": FORMATS[self.grad][0],
            "EXP_AVG": FORMATS[self.exp_avg][0],
            "EXP_AVG_SQ": FORMATS[self.exp_avg_sq][0],
            "AUX": FORMATS[self.exp_avg_sq if RULES[self.rule].moments > 2 else "fp32"][0],
            "READS_VARIANCE": RULES[self.rule].reads_variance,
            "PARAM_STORAGE": list(PARAM_STORAGES).index(self.param_storage),
            "THRESHOLD_PASS": THRESHOLD_PASSES.index(self.threshold_pass),
            "CONFIDENCE": None,
            "OBSERVES": self.observes == "with_statistics",
            "RUNS": self.runs == "several_runs",
            "SCALE": self.scale or None,
        }


class StepJob(NamedTuple):
    """A kernel of a step that begins on the device."""

    target: str
    kernel: str
    grad: str = ""

    def constants(self) -> dict[str, object]:
        return {"GRAD": FORMATS[self.grad][0]} if self.grad else {}


AnyJob = Job | StepJob


#: Only the gated rule has statistics, as in csrc/cuda/step.cu.
KERNELS = [*((rule, "none") for rule in RULES), ("sign_adam_pp", "same_pass"), ("sign_adam_pp", "pass_before")]
MIXTURES = [
    ("sign_adam_pp", "none", "bf16", "bf16"),
    ("sign_adam_pp", "none", "fp16", "fp16"),
    ("sign_adam_pp", "same_pass", "fp32", "bf16"),
    ("sign_adam_pp", "pass_before", "bf16", "fp32"),
    ("sign_adam", "none", "bf16", "fp32"),
    ("sign_adam", "none", "fp32", "fp16"),
    ("sign_adam", "none", "bf16", "bf16", "int8", "bf16", "split8", "without_statistics", "several_runs"),
]
STORED = [
    ("sign_adam_pp", "none", "bf16", "bf16", "int2", "fp32", "stochastic"),
    ("sign_adam_pp", "same_pass", "bf16", "fp32", "int4", "fp32", "split16"),
    ("sign_adam", "none", "bf16", "bf16", "int8", "bf16", "split8"),
    ("signum", "none", "bf16", "bf16", "block8", "fp32", "master"),
    ("sign_sgd", "none", "fp16", "fp16", "fp32", "fp32", "stochastic"),
    ("adam_amsgrad", "none", "bf16", "bf16", "bf16", "bf16", "stochastic"),
    ("sign_adam_pp", "same_pass", "fp32", "fp32", "fp32", "fp32", "nearest", "with_statistics"),
    ("msvag_minibatch", "none", "bf16", "fp32", "fp32", "fp32", "nearest", "with_statistics"),
    ("sign_adam_pp", "none", "bf16", "bf16", "int2", "fp32", "stochastic", "without_statistics", "several_runs"),
]
#: Steps that are multiplied by a number of the tensor's, and gradients.
SCALED = [
    Job("sm_90", "adam", "pass_before", scale="caution"),
    Job("sm_90", "adam", "none", scale="caution"),
    Job("sm_90", "lion", "same_pass", "bf16", "bf16", "block8", param_storage="stochastic", scale="caution"),
    Job("sm_90", "signum", "same_pass", observes="with_statistics", scale="rms"),
    Job("sm_90", "sign_adam_pp", "same_pass", "bf16", "bf16", "int2", param_storage="stochastic", scale="rms"),
    Job("sm_90", "mars_adamw", "pass_before", scale="norm"),
    Job("sm_90", "mars_adamw", "none", scale="norm"),
]
#: Rules of the same operations as others: compiled in the nightly run, for one architecture of NVIDIA's and AMD's.
LIKE_OTHERS = (
    *("msgd", "svag", "adam_star_plain", "adam_star_minibatch", "adam", "lion", "adam_s", "bcos"),
    *("lion_threshold", "lion_huber", "lion_softsign", "ano", "grams", "ada_momentum"),
    *("laprop", "adopt", "ada_bound", "ams_bound", "ademamix"),
    *("schedule_free_adamw", "schedule_free_sign", "focus", "mars_adamw"),
)
NVIDIA_JOBS = [
    Job(target, *kernel)
    for target in NVIDIA
    for kernel in (*KERNELS, *STORED)
    if target == "sm_90" or kernel[0] not in LIKE_OTHERS
]
NVIDIA_JOBS += [*(Job("sm_90", *mixture) for mixture in MIXTURES), *SCALED]
AMD_JOBS = [Job(AMD, *kernel) for kernel in (*KERNELS, *STORED, *MIXTURES)]
AMD_JOBS += [job._replace(target=AMD) for job in SCALED]
STEP_JOBS = [
    *(StepJob("sm_90", *kernel) for kernel in (("begin",), ("norm", "fp32"), ("norm", "bf16"), ("norm", "fp16"))),
    *(StepJob(target, *kernel) for target in ("sm_80", AMD) for kernel in (("begin",), ("norm", "bf16"))),
]
#: What the quick run compiles: no moment and up to two, each form of storage, each pass, every target.
SOME = {
    *(Job("sm_90", *kernel) for kernel in (("sign_adam",), ("sign_adam_pp", "pass_before"))),
    *(Job("sm_90", *stored) for stored in (STORED[0], STORED[1], STORED[3], STORED[-2], STORED[-1])),
    *(Job("sm_80", "sign_sgd"), Job("sm_100", "sign_adam_pp"), SCALED[2]),
    *(Job(AMD, *kernel) for kernel in (("sign_adam",), STORED[1], STORED[3])),
    *(StepJob(target, *kernel) for target in ("sm_90", AMD) for kernel in (("begin",), ("norm", "bf16"))),
}
assert {*NVIDIA_JOBS, *AMD_JOBS, *STEP_JOBS} >= SOME


def is_nightly(job: AnyJob) -> bool:
    return isinstance(job, Job) and job.rule in LIKE_OTHERS and job not in SOME and not job.scale


def each(jobs: Sequence[AnyJob]) -> pytest.MarkDecorator:
    def marks(job: AnyJob) -> tuple[pytest.MarkDecorator, ...]:
        rest = (pytest.mark.thorough, pytest.mark.nightly) if is_nightly(job) else (pytest.mark.thorough,)
        return () if job in SOME else rest

    return pytest.mark.parametrize("job", [pytest.param(x, id="-".join(filter(None, x)), marks=marks(x)) for x in jobs])


def compiled(built_once: Callable[..., Path], name: str, jobs: Sequence[AnyJob]) -> dict[AnyJob, Path]:
    """Each job's output without its suffix."""
    asked = [(job.target, job.constants(), job.kernel) for job in jobs]
    folder = built_once(name, lambda folder: compile_triton(asked, folder))
    return {job: folder / str(number) for number, job in enumerate(jobs)}


def wanted(jobs: Sequence[Job], thorough: bool, nightly: bool) -> list[AnyJob]:
    """Those that are looked at, with the kernels of the same maker that begin a step."""
    is_amd = jobs[0].target == AMD
    every = [*jobs, *(job for job in STEP_JOBS if (job.target == AMD) == is_amd)]
    return [job for job in every if job in SOME or (thorough and (nightly or not is_nightly(job)))]


@pytest.fixture(scope="module")
def nvidia(built_once: Callable[..., Path], thorough: bool, nightly: bool) -> dict[AnyJob, Path]:
    return compiled(built_once, "triton-nvidia", wanted(NVIDIA_JOBS, thorough, nightly))


@pytest.fixture(scope="module")
def amd(built_once: Callable[..., Path], thorough: bool, nightly: bool) -> dict[AnyJob, Path]:
    return compiled(built_once, "triton-amd", wanted(AMD_JOBS, thorough, nightly))


def accesses(job: Job, lanes: int) -> tuple[Counter[int], Counter[int]]:
    """Loads and stores of a row's thread with so many lanes, by bytes: at least these."""
    moments = (job.exp_avg, job.exp_avg_sq, job.exp_avg_sq)[: RULES[job.rule].moments]
    bits = {name: bits for name, (_, bits) in FORMATS.items()}
    updated = [bits[job.param], PARAM_STORAGES[job.param_storage]]
    stores = [] if job.threshold_pass == "pass_before" else [*updated, *(bits[moment] for moment in moments)]
    given = [bits["fp32"]] if RULES[job.rule].reads_variance else []
    loads = [bits[job.grad], *(stores or updated), *given]
    return tuple(Counter(size for width in found for size in pieces(width * lanes // 8)) for found in (loads, stores))


def pieces(size: int) -> list[int]:
    return [16] * (size // 16) if size > 16 else [size] * (size > 0)


@each(NVIDIA_JOBS)
def test_ptx(nvidia: dict[AnyJob, Path], job: Job) -> None:
    code = nvidia[job].with_suffix(".ptx").read_text()
    arithmetic = set(PTX_ARITHMETIC.findall(code))
    pairs = exact_ptx("f32x2")  # on sm_100
    assert arithmetic <= exact_ptx("f32") | exact_ptx("f64") | pairs
    assert {"add.rn.f32", "mul.rn.f32"} <= arithmetic | {name.removesuffix("x2") for name in arithmetic & pairs}
    divides = job.divides
    assert ("div.rn.f32" in arithmetic) == divides
    assert ("sqrt.rn.f32" in arithmetic) == (divides and RULES[job.rule].roots)
    assert ("sqrt.rn.f64" in arithmetic) == (job.threshold_pass != "none" and job.scale != "caution")
    divides_sums = job.threshold_pass != "none" and job.scale != "norm"
    assert ("div.rn.f64" in arithmetic) == (divides_sums or job.scale == "caution")
    assert not re.search(r"\.(approx|ftz|full)\b", code)

    # A thread has 8 of 2048 lanes: two accesses of 16 bytes for fp32, one for a 16-bit format, and so on down. Evict
    # first: each element is used once.
    loads, stores = accesses(job, lanes=8)
    for size, name in {16: "v4.b32", 8: "v2.b32", 4: "b32", 2: "b16"}.items():
        assert len(re.findall(rf"\bld\.global\.cs\.{name}\b", code)) >= loads[size]
        assert len(re.findall(rf"\bst\.global\.cs\.{name}\b", code)) >= stores[size]
    assert bool(stores) == ("st.global.cs" in code)


@each(NVIDIA_JOBS)
def test_cubin(nvidia: dict[AnyJob, Path], job: Job) -> None:
    cubin = str(nvidia[job].with_suffix(".cubin"))
    used = [found for line in listing("--dump-resource-usage", cubin).splitlines() if (found := resources(line))]
    assert len(used) == 1
    registers, stack, local = used[0]
    # ptxas may put a few words aside that are used outside of the wide path: a block's addresses and counts.
    aside = 128 if job.runs == "several_runs" else 16
    # Where sums are taken in the same pass, or of three moments, one loop for both kinds of decay takes more registers
    # than two blocks have, or puts more aside.
    crowded = (job.threshold_pass == "same_pass" or RULES[job.rule].moments > 2) and not job.scale
    aside = 176 if crowded else aside
    assert registers <= (255 if job.observes == "with_statistics" else 192 if crowded else 128)
    assert stack <= aside and local == 0
    code = [found for line in listing("-sass", cubin).splitlines() if (found := instruction(line))]
    wide_loops = [body for body in loops(code) if any(x.operation == "LDG.E.EF.128" for x in body)]
    assert wide_loops
    for body in wide_loops:
        # Nothing spilled; and a row loads tensors, no scalars, which are doubles, and nothing of a table.
        assert not [x for x in body if x.operation.startswith("F2F.F32.F64")]
        assert len([x for x in body if x.operation.startswith(("LDL", "STL"))]) <= (2 if crowded else 0)
        assert not [x for x in body if x.operation.startswith("LDG") and ".EF" not in x.operation]
    # The statistics' division and root in double have an FFMA that multiplies by zero, see test_sass.py.
    fused = [x for x in code if x.operation.startswith("FFMA")]
    if job.divides:
        assert fused
    else:
        assert all(x.operands[1] == "RZ" for x in fused) and (not fused or job.threshold_pass != "none"), fused


def loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The instructions between each jump backwards and its target."""
    found = []
    for x in code:
        if re.match(r"BRA\b", x.operation) and re.fullmatch(r"0x[0-9a-f]+", x.operands[-1]):
            target = int(x.operands[-1], 16)
            if target < x.address:
                found.append([y for y in code if target <= y.address <= x.address])
    return found


def count(operation: str, code: str) -> int:
    return len(re.findall(rf"\b{operation}(?:_e\d\d)?\b", code))


def keeps_subnormals_and_registers(code: str) -> bool:
    """Whether subnormals stay in machine code of AMD's, and nothing is spilled."""
    lines = (
        r"\.amdhsa_float_denorm_mode_32 3$",
        r"\.amdhsa_float_denorm_mode_16_64 3$",
        r"\.private_segment_fixed_size: 0$",
        r"\.vgpr_spill_count: 0$",
    )
    return all(re.search(line, code, re.MULTILINE) for line in lines)


@each(AMD_JOBS)
def test_amdgcn(amd: dict[AnyJob, Path], job: Job) -> None:
    code = amd[job].with_suffix(".amdgcn").read_text()
    fused = r"\bv_(?:pk_)?(?:fma|fmac|mad|mac|fmaak|fmamk|fma_mix\w*)_f(?:16|32)\w*"
    if job.runs == "several_runs":
        assert "v_cvt_f32_u32" in code  # integers are divided by reciprocals; test_ptx looks at the arithmetic
    elif job.divides:
        # Correctly rounded division ends with a fixup; it and the root are made of fused operations.
        assert "v_div_fixup_f32" in code
        assert count(r"v_div_fixup_f32", code) == count(r"v_rcp_f32", code)
        # A root by the hardware is off by an ulp; what corrects it leaves out zero and infinity.
        assert count(r"v_cmp_class_f32", code) >= count(r"v_sqrt_f32", code)
        assert (count(r"v_sqrt_f32", code) > 0) == RULES[job.rule].roots
    else:
        assert not re.search(fused, code)
        assert not re.search(r"\bv_(rcp|rsq|sqrt|div_\w+)_f32", code)
    if job.threshold_pass != "none":
        # Gradients are summed before the count of arrivals; after it come division and root, made of fused operations.
        sums, end = code.split("global_atomic_add", 1)
        if job.scale != "caution":  # which counts, and divides before
            assert "v_mul_f64" in sums and not re.search(r"\bv_fma(c)?_f64", sums)
        assert ("v_div_fixup_f64" in end) == (job.scale != "norm")
    assert keeps_subnormals_and_registers(code)
    # 8 warps of 64: a thread has 4 lanes, one access of 16 bytes for fp32, of 8 for a 16-bit format, and so on down.
    loads, stores = accesses(job, lanes=4)
    for size, name in {16: "dwordx4", 8: "dwordx2", 4: "dword", 2: "u?short", 1: "u?byte"}.items():
        assert len(re.findall(rf"\b(?:buffer|global)_load_{name} .*\bnt\b", code)) >= loads[size]
        assert len(re.findall(rf"\b(?:buffer|global)_store_{name} .*\bnt\b", code)) >= stores[size]


@each([job for job in STEP_JOBS if job.target != AMD])
def test_step_on_nvidia(nvidia: dict[AnyJob, Path], job: StepJob) -> None:
    code = nvidia[job].with_suffix(".ptx").read_text()
    arithmetic = set(PTX_ARITHMETIC.findall(code))
    assert not re.search(r"\.(approx|ftz|full)\b", code)
    used = listing("--dump-resource-usage", str(nvidia[job].with_suffix(".cubin")))
    ((registers, stack, local),) = [found for line in used.splitlines() if (found := resources(line))]
    assert stack == local == 0
    if job.kernel == "begin":
        assert arithmetic | {"rcp.rn.f64"} == exact_ptx("f64")  # quotients are written as such
        assert registers <= 96
        return
    assert arithmetic == {"add.rn.f64", "mul.rn.f64"}
    # Four blocks on a multiprocessor, three on sm_80; as wide as the update reads, see test_ptx.
    # Programs of scalars have a logarithm, and run one block a tensor.
    assert registers <= (96 if job.kernel == "begin" else 80 if job.target == "sm_80" else 64)
    accesses_of_row = pieces(FORMATS[job.grad][1])
    assert accesses_of_row[0] == 16
    assert len(re.findall(r"\bld\.global\.cs\.v4\.b32\b", code)) >= len(accesses_of_row)
    assert "st.global.cs" not in code


@each([job for job in STEP_JOBS if job.target == AMD])
def test_step_on_amd(amd: dict[AnyJob, Path], job: StepJob) -> None:
    code = amd[job].with_suffix(".amdgcn").read_text()
    assert keeps_subnormals_and_registers(code)
    fused = count(r"v_fma(?:c)?_f64", code)
    if job.kernel == "norm":
        assert count("v_mul_f64", code) > 0 and fused == 0
    else:
        # Of divisions, which end with a fixup, and the root.
        assert count("v_div_fixup_f64", code) == count("v_rcp_f64", code) > 0
        assert count("v_rsq_f64", code) == 1 and fused > 0
