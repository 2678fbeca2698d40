"""What the compilers emit, executed: the PTX of the kernels in csrc/cuda and triton_kernels leaves the CPU's bits.

By the emulator of tests/support/ptx, which also sees to it that no access leaves its tensor or is misaligned, that
nothing races, and that no shared memory is read that was not written. Each kernel runs once on full and on small
chunks; ``--nightly`` runs every form on many more, with blocks in any order and interleaved, and every Triton kernel.
"""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launches import ANY_RULE, ANY_RULE_KERNELS, CASES, FUNCTORS, Case, Compiled, Given, Step, compile_launches
from support.paper_formulas import TABLE, Row
from support.ptx import SCHEDULES, Counts, Fault
from support.ptx.steps import program, run_cuda, run_triton
from support.toolchain import cuda_launch_library, fixed_kernels, ptx

from reporting.machine_code import STORAGES, BeginKernelName, KernelName, kernel_label
from signadam_ext import _C
from signadam_ext.core.rule import rule_of

BUILT = _C.build_info()
with_cuda = pytest.mark.skipif(BUILT["cuda"] is None, reason="the module was built without CUDA")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

#: Every kernel of csrc/cuda: those for any form, and those of csrc/cuda/instances.h.
KERNELS = [
    KernelName(rule.struct, threshold_pass, storage)
    for storage in STORAGES
    for rule, threshold_pass in [
        *((rule, "none") for rule in FUNCTORS.values()),
        *((FUNCTORS["sign_adam_pp"], threshold_pass) for threshold_pass in ("same_pass", "pass_before")),
    ]
    if not (storage == "plain" and rule.aux) and not (storage == "with_statistics" and threshold_pass == "pass_before")
] + [*fixed_kernels(), *ANY_RULE_KERNELS]
ROWS = {row.id: row for row in TABLE}
#: The rows of the gated rule that lead to each way to come by a threshold.
BY_PASS = {"same_pass": "sign_adam_pp-delayed", "pass_before": "sign_adam_pp-adaptive"}
#: What every kernel is run on: a full chunk whose accesses are all wide; chunks that are not full, and none; with
#: parameter and gradient misaligned together and apart; without a gradient; with special values; in two groups.
SMALL = (
    Given(),
    Given(0),
    Given(1),
    Given(7, offset=1, grad_offset=1, specials=True),
    Given(33, grad_offset=2, absent=True),
    Given(2049, offset=3, grad_offset=1, specials=True, group=1),
)
#: What the nightly run adds: several chunks, of which the last is short, and each of the misalignments with all of it.
LARGE = (
    Given(16385, group=1),
    Given(40000, specials=True),
    Given(16384, grad_offset=1),
    Given(16384, offset=1, grad_offset=1, specials=True),
    Given(33, offset=5, group=1),
    Given(7, absent=True),
    Given(1, offset=7),
    Given(0, group=1),
    Given(16391, offset=2, grad_offset=3, group=2),
)
GROUPS: tuple[dict[str, Any], ...] = ({}, {"lr": 0.003}, {"lr": 0.1, "weight_decay": 0.0, "maximize": True})
#: Cases that launch the kernels for any rule.
BY_ANY_RULE = dict(
    zip(
        ANY_RULE_KERNELS,
        ("adam-fp32-exact", "sign_sgd-gated-fp32-rms", "signum-bf16-delayed-stochastic-int8-observed"),
        strict=True,
    )
)

DTYPES = {"fp32": FP32, "bf16": BF16, "fp16": FP16}


def case_of(kernel: KernelName, given: tuple[Given, ...] = (Given(),)) -> Case:
    """A step that launches a kernel: of one for any form by gradients of another dtype, which no other serves."""
    if kernel.functor == ANY_RULE:
        return replace(CASES[BY_ANY_RULE[kernel]], given=given)
    (name,) = (name for name, rule in FUNCTORS.items() if rule.struct == kernel.functor)
    codes = kernel.forms is not None and kernel.forms.exp_avg in ("int8", "int4", "int2")
    bounded = f"{name}-bounded" if codes and f"{name}-bounded" in ROWS else name
    row = ROWS[bounded if kernel.is_scaled else BY_PASS.get(kernel.threshold_pass, bounded)]
    own: dict[str, Any] = {**row.hyperparameters, "lr": 0.01, "weight_decay": 0.1}
    if kernel.is_scaled:
        own["caution"] = "delayed"
    observes = kernel.storage == "with_statistics"
    if kernel.forms is not None:
        dtype = DTYPES[kernel.forms.param]
        own["param_storage"] = kernel.forms.param_storage
        if row.state_dtypes:
            own["state_dtype"] = kernel.forms.exp_avg.replace("block8", "int8")
        return Case(kernel_label(kernel), row.optimizer, own, dtype, observes, given)
    dtype, grad_dtype = FP32, BF16
    if kernel.storage == "any":
        dtype, grad_dtype = BF16, FP32
        own["param_storage"] = "stochastic"
        if row.state_dtypes:
            own["state_dtype"] = "int8" if "int8" in row.state_dtypes else "bf16"
    given = tuple(replace(each, grad_dtype=grad_dtype) for each in given)
    return Case("-".join(kernel[:3]), row.optimizer, own, dtype, observes, given)


@pytest.fixture(scope="module")
def library(built_once: Callable[..., Path]) -> ctypes.CDLL:
    return cuda_launch_library(built_once)


@pytest.fixture(scope="module")
def texts() -> dict[Any, str]:
    """PTX of the module's kernels by name."""
    (own,) = ptx(_C.__file__).values()
    return dict(own)


@with_cuda
@pytest.mark.thorough
def test_kernels_are_all(texts: dict[Any, str]) -> None:
    assert {kernel for kernel in texts if isinstance(kernel, KernelName)} == set(KERNELS)


@with_cuda
@pytest.mark.thorough
def test_every_instruction_is_known(texts: dict[Any, str]) -> None:
    """Of all kernels and all their basic blocks, whether executed or not; of votes too."""
    for kernel, text in texts.items():
        program(text, 32 if kernel == BeginKernelName("begin") else 256).check()


def each(kernels: list[KernelName]) -> pytest.MarkDecorator:
    ids = ["-".join([kernel_label(kernel), *kernel[1:3]]) for kernel in kernels]
    return pytest.mark.parametrize("kernel", kernels, ids=ids)


#: Sectors of 32 bytes that the accesses of a warp to a full, aligned chunk touch, over those that they need: by bytes
#: of an element, or by what lies beside a parameter. A piece of 8 fp32 is read and written in two accesses of
#: 16 bytes, so that those of a warp have every other half of a sector.
SECTORS: dict[int | str, float] = {4: 2.0, 2: 1.0, 1: 1.0, "split8": 1.0, "split16": 2.0, "master": 4.0}
#: Turns that the accesses of a block to banks of shared memory take, over those without conflicts.
BANKS = {
    ("none", False): (0, 0),
    ("none", True): (708, 387),
    ("same_pass", False): (1296, 644),
    ("same_pass", True): (2004, 1031),
    ("pass_before", False): (1296, 644),
}


def scaled(row: Row) -> Iterator[Case]:
    """Steps of a rule that are scaled, as far as its optimizer lets them be."""
    own = {**row.hyperparameters, "lr": 0.01, "weight_decay": 0.1}
    for how in ({"caution": "exact"}, {"caution": "delayed"}, {"lr_scale": "rms"}):
        case = Case(f"{row.id}-{next(iter(how.values()))}", row.optimizer, {**own, **how}, given=SMALL)
        try:
            row.optimizer([torch.nn.Parameter(torch.zeros(1))], backend="cpu", **case.hyperparameters)
        except ValueError:
            continue
        yield case


SCALED = [case for row in TABLE if not row.like for case in scaled(row)]
#: Rows whose optimizers refuse all of it: a number of each tensor's own, or steps that depend on the parameter.
UNSCALED = {
    *("sign_adam_pp-adaptive", "sign_adam_pp-delayed", "mars_adamw-clipped"),
    *("schedule_free_adamw", "schedule_free_sign", "focus"),
}
#: And those whose steps have the gradient's sign, which refuse caution.
UNCAUTIOUS = {"sign_sgd", "sign_sgd-gated", "svag", "adam_star_plain", "grams"}


def test_scaled_steps_are_refused_where_they_are_said_to_be() -> None:
    expected = {
        f"{row.id}-{how}"
        for row in TABLE
        for how in ("exact", "delayed", "rms")
        if not row.like and row.id not in UNSCALED and (how == "rms" or row.id not in UNCAUTIOUS)
    }
    assert {case.name for case in SCALED} == expected


@with_cuda
@pytest.mark.thorough
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=() if i % 12 == 0 else pytest.mark.nightly)
        for i, case in enumerate(SCALED)
    ],
)
def test_scaled_steps(case: Case, library: ctypes.CDLL, texts: dict[Any, str]) -> None:
    """One kernel has the arithmetic of every rule; a few have one of their own for steps of one launch."""
    step = Step(case)
    launches = step.cuda(library)
    struct = FUNCTORS[rule_of(case.optimizer, step.optimizer.param_groups[0]).name].struct
    own = [kernel for kernel in fixed_kernels() if kernel[:3] == (struct, "same_pass", "plain") and kernel.is_scaled]
    if own and case.hyperparameters.get("caution") != "exact":
        assert [launch.kernel for launch in launches] == own
    else:
        assert {launch.kernel.functor for launch in launches} == {ANY_RULE}
    run_cuda(step, launches, texts, schedule="interleaved", seed=len(case.name))
    assert step.unequal() == []


@with_cuda
@pytest.mark.thorough
@each(KERNELS)
def test_cuda(kernel: KernelName, library: ctypes.CDLL, texts: dict[Any, str]) -> None:
    case = replace(case_of(kernel, SMALL), groups=GROUPS[:2], on_device=KERNELS.index(kernel) % 2 == 1)
    step = Step(case)
    launches = step.cuda(library)
    assert kernel in {launch.kernel for launch in launches}
    counts = Counts()
    run_cuda(step, launches, texts, counts, schedule="interleaved", seed=KERNELS.index(kernel))
    assert step.unequal() == []
    # The first parameter is the full, aligned chunk.
    sizes = {region.name: region.grain for region in step.regions}
    coalescing = {
        (name, way): access.sectors / access.needed
        for (name, way), access in counts.accesses.items()
        if not name[0].isdigit()
    }
    assert coalescing == {
        (name, way): SECTORS[case.hyperparameters["param_storage"] if name == "residual" else sizes[name]]
        for name, way in coalescing
    }


@with_cuda
@pytest.mark.thorough
@each([kernel for kernel in KERNELS if kernel.is_scaled])
def test_steps_in_proportion_to_the_parameter(kernel: KernelName, library: ctypes.CDLL, texts: dict[Any, str]) -> None:
    """The other thing that kernels of scaled steps do."""
    case = case_of(kernel, SMALL)
    step = Step(replace(case, hyperparameters={**case.hyperparameters, "caution": None, "lr_scale": "rms"}))
    launches = step.cuda(library)
    assert [launch.kernel for launch in launches] == [kernel]
    run_cuda(step, launches, texts, schedule="interleaved", seed=KERNELS.index(kernel))
    assert step.unequal() == []


@with_cuda
@pytest.mark.thorough
@each([kernel for kernel in KERNELS if kernel.functor == "SignAdamPP" or kernel.is_scaled])
def test_bank_conflicts(kernel: KernelName, library: ctypes.CDLL, texts: dict[Any, str]) -> None:
    step = Step(case_of(kernel))
    counts = Counts()
    # Of a step of two passes only the first has shared memory.
    run_cuda(step, step.cuda(library), texts, counts)
    assert tuple(counts.bank_turns) == BANKS[kernel.threshold_pass, kernel.storage == "with_statistics"]


#: Mixes of dtypes beside the cases that others take too.
MIXED = tuple(
    Given(size, offset=offset, dtype=dtype, grad_dtype=grad_dtype, specials=True)
    for (dtype, grad_dtype), (size, offset) in zip(
        itertools.product((FP32, BF16, FP16), repeat=2),
        itertools.cycle(((2049, 0), (33, 1), (16385, 0), (7, 2))),
        strict=False,
    )
)


def forms() -> Iterator[tuple[Case, str]]:
    """Every case, and an order of blocks: on the large tensors with the step's data here and there, and on every mix of
    dtypes. Where blocks wait for each other's sums in every order."""
    for number, case in enumerate(CASES.values()):
        large = replace(case, given=SMALL[1:] + LARGE, groups=GROUPS)
        yield replace(large, name=f"{case.name}-large"), "interleaved"
        yield replace(large, name=f"{case.name}-on_device", on_device=True), SCHEDULES[number % 3]
        if not case.hyperparameters.get("param_storage", "").startswith("split"):
            yield replace(case, name=f"{case.name}-mixed", given=MIXED), SCHEDULES[number % 4]
        if case.hyperparameters.get("confidence", "fixed") != "fixed":
            for schedule in SCHEDULES[:3]:
                yield replace(large, name=f"{case.name}-large"), schedule


each_form = pytest.mark.parametrize(
    ("case", "schedule"),
    [pytest.param(case, schedule, id=f"{case.name}-{schedule.replace(' ', '_')}") for case, schedule in forms()],
)


@with_cuda
@pytest.mark.nightly
@each_form
def test_cuda_forms(case: Case, schedule: str, library: ctypes.CDLL, texts: dict[Any, str]) -> None:
    step = Step(case)
    run_cuda(step, step.cuda(library), texts, schedule=schedule, seed=len(case.name))
    assert step.unequal() == []


# Triton.

#: One of each that differ by more than arithmetic: plain, packed, block-scaled, a residual beside, statistics, both
#: ways to come by a threshold.
SOME_TRITON = (
    "sign_adam_pp-adaptive-fp32",
    "sign_adam_pp-bf16-stochastic-int2",
    "sign_adam_pp-delayed-bf16-stochastic-int8-observed",
    "lion-bf16-split8-int8",
    "msvag_minibatch-bf16-split16-bf16",
)


def triton_sectors(size: int, smallest: int, way: str) -> float:
    """As ``SECTORS``: a thread has as many elements side by side as fill 16 bytes, of the smallest but at most 8; so
    fp32 beside something smaller is read in two accesses. What is written is exchanged between threads before."""
    return 2.0 if way == "read" and size == 4 > smallest else 1.0


def triton_launches(name: str) -> list[Any]:
    return Step(CASES[name]).triton()


@pytest.fixture(scope="module")
def compiled(built_once: Callable[..., Path], nightly: bool) -> dict[str, Compiled]:
    """The Triton kernels that are executed, compiled at once."""
    pytest.importorskip("triton")
    launches = [launch for name in (CASES if nightly else SOME_TRITON) for launch in triton_launches(name)]
    folder = built_once("triton-ptx-every" if nightly else "triton-ptx", lambda folder: None)
    return compile_launches(launches, "sm_90", folder)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name in SOME_TRITON else pytest.mark.nightly)
        for name, case in CASES.items()
    ],
)
def test_triton(case: Case, compiled: dict[str, Compiled]) -> None:
    step = Step(replace(case, given=(*SMALL, Given(16385, group=1)), groups=GROUPS[:2]))
    launches = step.triton()
    counts = Counts()
    run_triton(step, launches, compiled, counts, schedule="interleaved")
    assert step.unequal() == []
    own = {region.name: region.grain for region in step.regions if region.streamed and not region.name[0].isdigit()}
    for (name, way), access in counts.accesses.items():
        if name in own:
            assert access.sectors == triton_sectors(own[name], min(own.values()), way) * access.needed, (name, way)


# What a broken kernel looks like.


def edits(pattern: str, replacement: str) -> Callable[[str], Iterator[str]]:
    """All texts that one replacement makes, the first of them first."""

    def make(text: str) -> Iterator[str]:
        for found in re.finditer(pattern, text, re.MULTILINE):
            yield text[: found.start()] + found.expand(replacement) + text[found.end() :]

    return make


UNEQUAL = "differs from the CPU backend"
PLAIN, STORED = KernelName("SignAdamPP", "none", "plain"), KernelName("SignAdamPP", "none", "any")
GATHERING = KernelName("SignAdamPP", "same_pass", "plain")
#: By name the kernel, the edit, and what is found.
MUTATIONS: dict[str, tuple[KernelName, Callable[[str], Iterator[str]], str]] = {
    "a wrong lane in a shuffle": (
        KernelName("Signum", "none", "any"),
        edits(r"^(shfl\.sync\.bfly\.b32\s+[^,]+,[^,]+, )[^,]+,", r"\g<1>4,"),
        UNEQUAL,
    ),
    "a missing barrier": (GATHERING, edits(r"^bar\.(?:warp\.)?sync\s+\S+;", ""), "a race at byte .* of shared memory"),
    "a missing fence": (GATHERING, edits(r"^membar\.gl;|^fence\.acq_rel\.gpu;", ""), "a race at byte .* of sums"),
    "a store left out in shared memory": (
        GATHERING,
        edits(r"^st\.shared\..*;", ""),
        "shared memory is read where nothing has written it",
    ),
    "a tail without its guard": (
        PLAIN,
        edits(r"^@!?%p\d+ bra \$L\w+;(?=\n+(?:[^\n@$]*\n+){0,4}st\.global)", ""),
        "lie in no region",
    ),
    "an offset that is not padded": (
        PLAIN,
        edits(r"^(ld\.global\.cs\.v4\.u32 .*\[%rd\d+)(?:\+16)?\];", r"\1+12];"),
        "is misaligned for 16 bytes",
    ),
    "another rounding": (PLAIN, edits(r"^(add|sub)\.rn\.f32", r"\1.rz.f32"), UNEQUAL),
    "a dropped store": (PLAIN, edits(r"^st\.global\.cs\..*;", ""), UNEQUAL),
    "operands of a subtraction swapped": (
        PLAIN,
        edits(r"^(sub\.rn\.f32 %f\d+), (%f\d+), (%f\d+);", r"\1, \3, \2;"),
        UNEQUAL,
    ),
    "another number in the hash": (STORED, edits(r"^(mul\.lo\.s32 .*, )2146121005;", r"\g<1>2146121007;"), UNEQUAL),
    "the table read one entry further": (
        PLAIN,
        edits(r"^(ld\.global\.u32 %r\d+, \[%rd\d+)\];", r"\1+4];"),
        "lie in no region",
    ),
}
#: Edits of one kind that are tried: the first ones may lie on paths that the step does not take.
TRIES = 64


def outcome(step: Step, run: Callable[[], None]) -> str:
    """What is wrong, or nothing."""
    try:
        run()
    except Fault as fault:
        return str(fault)
    return UNEQUAL if step.unequal() else ""


@with_cuda
@pytest.mark.thorough
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_found(name: str, library: ctypes.CDLL, texts: dict[Any, str]) -> None:
    """One of the first edits of each kind is."""
    kernel, edit, expected = MUTATIONS[name]
    case = case_of(kernel, (Given(), Given(33, offset=1, grad_offset=1), Given(16385)))
    seen = set()
    for text in itertools.islice(edit(texts[kernel]), TRIES):
        step = Step(case)
        launches = step.cuda(library)

        def run(step: Step = step, launches: Any = launches, text: str = text) -> None:
            run_cuda(step, launches, {**texts, kernel: text})

        found = outcome(step, run)
        if re.search(expected, found):
            return
        seen.add(found)
    raise AssertionError(seen or "no edit of this kind")


@pytest.mark.thorough
def test_relaxed_atomic_of_triton_is_found(compiled: dict[str, Compiled], tmp_path: Path) -> None:
    case = CASES["sign_adam_pp-adaptive-fp32"]
    step = Step(replace(case, given=(Given(16385),)))
    launches = step.triton()
    relaxed = {}
    for kernel in {launch.kernel for launch in launches}:
        path = tmp_path / f"{len(relaxed)}.cubin"
        text = compiled[kernel].cubin.with_suffix(".ptx").read_text()
        path.with_suffix(".ptx").write_text(text.replace("acq_rel", "relaxed"))
        relaxed[kernel] = replace(compiled[kernel], cubin=path)
    assert "a race at byte" in outcome(step, lambda: run_triton(step, launches, relaxed))
