"""The Triton kernels of votes compiled ahead of time for NVIDIA and AMD: no contraction, no approximation, no spills.

Every kernel that the backend can launch, for one target; for the others some of each pass, which the quick run compiles
alone.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.toolchain import (
    PTX_ARITHMETIC,
    TRITON_VOTE_ARGUMENTS,
    compile_triton,
    exact_ptx,
    instruction,
    listing,
    resources,
)

from signadam_ext.backends.votes import Casting
from signadam_ext.backends.votes.table import WIDTHS
from signadam_ext.backends.votes.triton import casting_constants, reading_constants
from signadam_ext.core.native import compiled as _C

pytest.importorskip("triton")

NVIDIA = ("sm_80", "sm_90", "sm_100")
AMD = "gfx942"
FORMATS = {name: _C.FORMATS[name][0] for name in ("fp32", "bf16", "fp16")}


class Job(NamedTuple):
    target: str
    kernel: str
    #: Of casting the format, memory and residual; of counting the width and whether it is a majority; of reading the
    #: format, the use and the width.
    given: tuple[Any, ...]

    def constants(self) -> dict[str, Any]:
        if self.kernel == "cast_votes":
            name, memory, residual = self.given
            turned = memory == "GATED_SIGNS"  # and otherwise neither of both
            return casting_constants(FORMATS[name], Casting(memory, residual, maximize=turned, abstains=turned))
        if self.kernel == "count_votes":
            return dict(zip(("BITS", "MAJORITY"), self.given, strict=True))
        name, use, bits = self.given
        return reading_constants(FORMATS[name], use, bits)

    def __str__(self) -> str:
        return "-".join((self.target, self.kernel, *map(str, self.given)))

    @property
    def multiplies(self) -> bool:
        if self.kernel == "cast_votes":
            return self.given[1] != "NONE" or self.given[2]
        return self.kernel == "read_votes" and self.given[1] != "WRITE"


KERNELS = [
    *(("cast_votes", own) for own in itertools.product(FORMATS, ("NONE", "GRADIENTS", "GATED_SIGNS"), (False, True))),
    *(("count_votes", own) for own in ((2, True), *((bits, False) for bits in WIDTHS))),
    *(
        ("read_votes", own)
        for own in itertools.product(FORMATS, ("WRITE", "STEP", "STEP_STOCHASTIC"), WIDTHS)
        if own[:2] != ("fp32", "STEP_STOCHASTIC")
    ),
]
SOME = [  # in an order that all processes of a test run share
    Job("sm_90", "cast_votes", ("bf16", "GATED_SIGNS", True)),
    Job("sm_100", "cast_votes", ("bf16", "GRADIENTS", True)),
    Job(AMD, "cast_votes", ("fp32", "GRADIENTS", True)),
    Job("sm_90", "count_votes", (8, False)),
    Job("sm_80", "count_votes", (2, True)),
    Job("sm_90", "read_votes", ("fp32", "STEP", 16)),
    Job("sm_80", "read_votes", ("bf16", "STEP_STOCHASTIC", 2)),
    Job(AMD, "read_votes", ("fp16", "STEP_STOCHASTIC", 4)),
]
JOBS = [*(Job("sm_90", *kernel) for kernel in KERNELS), *(job for job in SOME if job.target != "sm_90")]
assert set(JOBS) >= set(SOME)


def each(jobs: Sequence[Job]) -> pytest.MarkDecorator:
    rest = pytest.mark.thorough
    return pytest.mark.parametrize(
        "job", [pytest.param(job, id=str(job), marks=() if job in SOME else rest) for job in jobs]
    )


@pytest.fixture(scope="module")
def compiled(built_once: Callable[..., Path], thorough: bool) -> dict[Job, Path]:
    """Each job's output without its suffix."""
    jobs = [job for job in JOBS if thorough or job in SOME]
    asked = [(job.target, job.constants(), job.kernel) for job in jobs]
    folder = built_once("triton-votes", lambda folder: compile_triton(asked, folder))
    return {job: folder / str(number) for number, job in enumerate(jobs)}


def test_signatures() -> None:
    from signadam_ext.triton_kernels import vote

    for job in JOBS:
        kernel = getattr(vote, job.kernel)
        assert [*TRITON_VOTE_ARGUMENTS[job.kernel], *job.constants()] == kernel.arg_names


@each([job for job in JOBS if job.target != AMD])
def test_ptx(compiled: dict[Job, Path], job: Job) -> None:
    code = compiled[job].with_suffix(".ptx").read_text()
    arithmetic = set(PTX_ARITHMETIC.findall(code))
    assert arithmetic <= exact_ptx("f32") | exact_ptx("f32x2")  # the latter on sm_100
    assert ("div.rn.f32" in arithmetic) == (job.kernel == "read_votes")
    # A sign of a gradient is turned by a multiplication.
    turns = job.kernel == "cast_votes" and job.given[1] == "GATED_SIGNS"
    assert any(name.startswith("mul.rn.f32") for name in arithmetic) == (job.multiplies or turns)
    assert not re.search(r"\.(approx|ftz|full)\b", code)
    # A thread has 8 of 2048 lanes: two accesses of 16 bytes for fp32, one for a 16-bit format.
    if job.kernel != "count_votes":
        loads, stores = accesses(job)
        assert len(re.findall(r"\bld\.global\.cs\.v4\.b32\b", code)) >= loads
        assert len(re.findall(r"\bst\.global\.cs\.v4\.b32\b", code)) >= stores


def accesses(job: Job) -> tuple[int, int]:
    """Loads and stores of 16 bytes of a row's thread, of tensors."""
    of_values = 2 if job.given[0] == "fp32" else 1
    if job.kernel == "cast_votes":
        kept = 2 * (job.given[1] != "NONE") + 2 * job.given[2]
        return of_values + kept, kept
    return of_values * (job.given[1] != "WRITE"), of_values


@each([job for job in JOBS if job.target != AMD])
def test_cubin(compiled: dict[Job, Path], job: Job) -> None:
    cubin = str(compiled[job].with_suffix(".cubin"))
    used = [found for line in listing("--dump-resource-usage", cubin).splitlines() if (found := resources(line))]
    assert len(used) == 1
    registers, stack, local = used[0]
    assert registers <= 128 and stack == local == 0
    code = [found for line in listing("-sass", cubin).splitlines() if (found := instruction(line))]
    assert code and not [x for x in code if x.operation.startswith(("LDL", "STL"))]
    fused = [x for x in code if x.operation.startswith("FFMA")]
    assert bool(fused) == (job.kernel == "read_votes")


@each([job for job in JOBS if job.target == AMD])
def test_amdgcn(compiled: dict[Job, Path], job: Job) -> None:
    code = compiled[job].with_suffix(".amdgcn").read_text()
    fused = r"\bv_(?:pk_)?(?:fma|fmac|mad|mac|fmaak|fmamk|fma_mix\w*)_f(?:16|32)\w*"
    if job.kernel == "read_votes":
        # Correctly rounded division ends with a fixup; it is made of fused operations.
        divisions = len(re.findall(r"\bv_div_fixup_f32", code))
        assert divisions > 0 and divisions == len(re.findall(r"\bv_rcp_f32", code))
    else:
        assert not re.search(fused, code)
        assert not re.search(r"\bv_(rcp|rsq|sqrt|div_\w+)_f32", code)
    # Subnormals stay, nothing is spilled.
    assert re.search(r"\.amdhsa_float_denorm_mode_32 3$", code, re.MULTILINE)
    assert re.search(r"\.private_segment_fixed_size: 0$", code, re.MULTILINE)
    assert re.search(r"\.vgpr_spill_count: 0$", code, re.MULTILINE)
