"""The launches of support/launches.py: complete, of kernels that exist, with the parameters that those declare.

Where SIGNADAM_EMULATOR names a folder with a package ``sass`` whose module ``sass.emulator`` executes the machine code
of sm_90 (``Memory``, ``constant_bank``, ``kernels``, ``load``, ``run_block``), every launch is executed as well, and
leaves the bits that the CPU backend leaves.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support import sm_90
from support.launches import (
    ANY_RULE,
    ANY_RULE_KERNELS,
    CASES,
    FUNCTORS,
    Case,
    CudaLaunch,
    Given,
    Region,
    Step,
    TritonLaunch,
    bits,
    compile_launches,
)
from support.toolchain import TRITON_TENSORS, cuda_launch_library, fixed_kernels, listing, ptx, symbols

from reporting.machine_code import STORAGES, THRESHOLD_PASSES, Forms, KernelName, kernel_name
from signadam_ext import _C
from signadam_ext.core.formats import PARAM_STORAGES
from signadam_ext.core.rule import rule_of

TARGET = "sm_90"
BUILT = _C.build_info()
with_cuda = pytest.mark.skipif(BUILT["cuda"] is None, reason="the module was built without CUDA")
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_backend = pytest.mark.parametrize("backend", [pytest.param("cuda", marks=pytest.mark.thorough), "triton"])


@pytest.fixture(scope="module")
def library(built_once: Callable[..., Path]) -> ctypes.CDLL:
    return cuda_launch_library(built_once)  # with every kernel, which only the thorough profile compiles


def launches_of(step: Step, backend: str, request: pytest.FixtureRequest) -> list[CudaLaunch] | list[TritonLaunch]:
    if backend == "cuda":
        return step.cuda(request.getfixturevalue("library"))
    pytest.importorskip("triton")
    return step.triton()


def updated(case: Case, step: Step) -> set[str]:
    """Names of what the kernels of a step write."""
    rule = rule_of(case.optimizer, step.optimizer.param_groups[0])
    beside = {"param_low", "master_param", rule.threshold_state} & step.tensors().keys()
    return {"param", *rule.moments, *beside, *(["chunk_statistics"] if case.observes else [])}


@each_case
@each_backend
def test_nothing_is_written(case: Case, backend: str, request: pytest.FixtureRequest) -> None:
    """The step is counted, and its launches are there, but no tensor has changed that the kernels write."""
    step = Step(case)
    before = {name: bits(tensor) for name, tensor in step.tensors().items()}
    assert launches_of(step, backend, request)
    after = step.tensors()
    assert before.keys() == after.keys() == step.expected().keys()
    assert [name for name in before if not torch.equal(before[name], bits(after[name]))] == ["step"]
    assert after["step"].item() == step.expected()["step"].item() == 3
    assert set(step.unequal()) == updated(case, step)


@pytest.mark.thorough
@each_case
def test_unequal_finds_each_tensor(case: Case, library: ctypes.CDLL) -> None:
    """A step that has updated all tensors but one is told by the name of that one."""
    step = Step(case)
    assert step.cuda(library)
    names = set(step.unequal())
    ours, theirs = step.tensors(), step.expected()
    left = {name: ours[name].detach().clone() for name in names & ours.keys()}
    others = names - ours.keys()
    with torch.no_grad():
        for name in left:
            ours[name].copy_(theirs[name])
        assert set(step.unequal()) == others
        for name, value in left.items():
            ours[name].copy_(value)
            assert set(step.unequal()) == {name} | others
            ours[name].copy_(theirs[name])
        # A single bit of the last element.
        for name in left:
            ours[name].view(-1).view(torch.uint8)[-1] ^= 1
            assert set(step.unequal()) == {name} | others
            ours[name].view(-1).view(torch.uint8)[-1] ^= 1


@each_case
@each_backend
def test_regions(case: Case, backend: str, request: pytest.FixtureRequest) -> None:
    """Regions do not overlap; what is written lies in one, and so do the gradient and its variance."""
    step = Step(case)
    launches_of(step, backend, request)
    ordered = sorted(step.regions, key=lambda region: region.address)
    assert len({region.name for region in ordered}) == len(ordered)
    for region, following in pairwise(ordered):
        assert region.address + region.size <= following.address
    reads = [step.param.grad]
    if case.hyperparameters.get("variance") == "minibatch":
        reads.append(step.param.grad_variance)
    written = [step.tensors()[name] for name in updated(case, step) - {"chunk_statistics"}]
    places = {(region.address, region.size): region for region in step.regions}
    for tensor in (*reads, *written):
        region = places[tensor.data_ptr(), tensor.numel() * tensor.element_size()]
        assert region.streamed == (tensor.dim() > 0)
    assert ("chunk_statistics" in {region.name for region in ordered}) == case.observes


def all_cuda(library: ctypes.CDLL) -> Iterator[CudaLaunch]:
    for case in CASES.values():
        yield from Step(case).cuda(library)


def all_triton() -> Iterator[TritonLaunch]:
    for case in CASES.values():
        yield from Step(case).triton()


@pytest.mark.thorough
def test_cuda_launches(library: ctypes.CDLL) -> None:
    """One block of 256 threads for the one chunk; every rule, every pass and every storage comes up."""
    launches = list(all_cuda(library))
    for launch in launches:
        assert (launch.grid, launch.threads, launch.dynamic_shared) == (1, 256, 0)
        sums = launch.kernel.functor in ("SignAdamPP", ANY_RULE) or launch.kernel.is_scaled
        assert sums or launch.kernel.threshold_pass == "none"
    kernels = {launch.kernel for launch in launches}
    assert {kernel.functor for kernel in kernels} == {rule.struct for rule in FUNCTORS.values()} | {ANY_RULE}
    assert {kernel for kernel in kernels if kernel.functor == ANY_RULE} == set(ANY_RULE_KERNELS)
    gated = {kernel[1:3] for kernel in kernels if kernel.functor == "SignAdamPP" and not kernel.is_scaled}
    every = {(threshold_pass, storage) for threshold_pass in THRESHOLD_PASSES for storage in STORAGES}
    assert gated == every - {("pass_before", "with_statistics")}


@pytest.mark.thorough
def test_two_launches_where_the_threshold_comes_first(library: ctypes.CDLL) -> None:
    """The exact form sums the gradient first, with the storage of the table even where statistics are asked for."""
    for name, storage in {
        "sign_adam_pp-adaptive-fp32": ("plain", "plain"),
        "sign_adam_pp-adaptive-bf16-split16-int4": ("any", "any"),
        "sign_adam_pp-adaptive-fp32-observed": ("plain", "with_statistics"),
    }.items():
        made = [launch.kernel[:3] for launch in Step(CASES[name]).cuda(library)]
        passes = ("pass_before", "none")
        assert made == [("SignAdamPP", *each) for each in zip(passes, storage, strict=True)]


@pytest.mark.thorough
def test_kernels_for_any_rule_are_taken(library: ctypes.CDLL) -> None:
    """Where steps are scaled, unless these forms have a kernel; of a corrected gradient only the norm, which is a
    threshold to the rule's own kernel."""
    for name, made in {
        "sign_sgd-gated-fp32-rms": [(ANY_RULE, "same_pass", "any")],
        "adam-fp32-exact": [(ANY_RULE, "pass_before", "any"), (ANY_RULE, "same_pass", "any")],
        "signum-bf16-delayed-stochastic-int8-observed": [(ANY_RULE, "same_pass", "with_statistics")],
        "mars_adamw-clipped-bf16-stochastic-int8-observed": [
            (ANY_RULE, "pass_before", "any"),
            ("MARSAdamW", "none", "with_statistics"),
        ],
    }.items():
        assert [launch.kernel[:3] for launch in Step(CASES[name]).cuda(library)] == made


@pytest.mark.thorough
def test_kernels_for_fixed_forms_are_taken(library: ctypes.CDLL) -> None:
    """A table whose tensors are alike gets the kernel for their forms where csrc/cuda/instances.h has it, otherwise
    the general one; the sums of a gradient do not ask for the moments."""
    plain, packed = ("fp32", "fp32", "fp32", "fp32", "nearest"), ("bf16", "bf16", "int8", "fp32", "stochastic")
    for name, forms in {
        "sign_adam_pp-fp32": [plain],
        "sign_adam_pp-bf16-stochastic-int8": [packed],
        "sign_adam_pp-adaptive-fp32": [plain, plain],
        "sign_adam_pp-adaptive-bf16-split16-int4": [None, ("bf16", "bf16", "int4", "fp32", "split16")],
        "msvag-fp32": [None],
    }.items():
        assert [launch.kernel.forms for launch in Step(CASES[name]).cuda(library)] == forms
    for name, kernel in {
        "lion-fp32-delayed": KernelName("Lion", "same_pass", "plain", Forms(*plain), True),
        "signum-fp32-rms": KernelName("Signum", "same_pass", "plain", Forms(*plain), True),
        "signum-bf16-delayed-stochastic-bf16": KernelName(
            "Signum", "same_pass", "any", Forms("bf16", "bf16", "bf16", "fp32", "stochastic"), True
        ),
    }.items():
        assert [launch.kernel for launch in Step(CASES[name]).cuda(library)] == [kernel]
    # Of another dtype of the gradient there is none.
    other = dataclasses.replace(CASES["lion-fp32-delayed"], given=(Given(grad_dtype=torch.bfloat16),))
    assert [launch.kernel for launch in Step(other).cuda(library)] == [KernelName(ANY_RULE, "same_pass", "any")]
    listed = set(fixed_kernels())
    assert all(launch.kernel in listed for launch in all_cuda(library) if launch.kernel.forms is not None)


def test_names_of_passes_are_the_modules() -> None:
    members = sorted(_C.ThresholdPass.__members__.items(), key=lambda member: member[1].value)
    assert [(name.lower(), member.value) for name, member in members] == [
        (name, number) for number, name in enumerate(THRESHOLD_PASSES)
    ]


@pytest.mark.thorough
def test_symbols_are_read(library: ctypes.CDLL) -> None:
    """A compiler for the host gives kernels names as nvcc does: every launched kernel is found among them."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm to list the symbols of a library")
    listed = subprocess.run([nm, library._name], capture_output=True, text=True, check=True).stdout
    found = {name for line in listed.splitlines() if (name := kernel_name(line)) is not None}
    assert {kernel.functor for kernel in found} == {rule.struct for rule in FUNCTORS.values()} | {ANY_RULE}
    assert {launch.kernel for launch in all_cuda(library)} <= found
    assert kernel_name("_ZN8signadam4cuda6launchENS_9RuleIndexENS_13ThresholdPassENS_7StorageE") is None


@pytest.mark.thorough
@with_cuda
def test_kernels_are_in_the_module(library: ctypes.CDLL) -> None:
    kernels = {launch.kernel for launch in all_cuda(library)}
    found = symbols(_C.__file__)
    assert set(found) == {name for name in BUILT["cuda_architectures"].split("+") if name.startswith("sm_")}
    for architecture, own in found.items():
        assert kernels <= own.keys(), architecture
        assert len(set(own.values())) == len(own)


@pytest.mark.thorough
@with_cuda
def test_parameters_are_as_many_bytes_as_kernels_declare(library: ctypes.CDLL) -> None:
    kernels = _C.RULES.index("sign_sgd"), _C.ThresholdPass.NONE, _C.Scaling.NONE
    if _C.Table(scalars_by_step=False).cuda_inline_capacity(*kernels, False) != library.capacity():
        pytest.skip("the module was built with CUDA before 12.1, whose kernels take fewer bytes of parameters")
    for launch in all_cuda(library):
        for architecture, entries in ptx(_C.__file__).items():
            head = entries[launch.kernel].partition(")")[0]
            declared = re.findall(r"\.param \.align 16 \.b8 \w+\[(\d+)\]", head)
            assert declared == [str(len(launch.parameters))], architecture
            assert head.count(".param") == 1


def test_triton_signature() -> None:
    """The backend gives the kernel every constant, and in order the tensors of ahead-of-time compilation."""
    pytest.importorskip("triton")
    from signadam_ext.backends.triton import launch_options
    from signadam_ext.triton_kernels.update import update

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets, so that its kernels have no signature")
    types = {torch.int64: "*i64", torch.int32: "*i32", torch.float64: "*fp64"}
    constants = [parameter.name for parameter in update.params if parameter.is_constexpr]
    assert [*TRITON_TENSORS, *constants] == [parameter.name for parameter in update.params]
    seen = []
    for launch in all_triton():
        assert launch.grid == 1
        assert [types[tensor.dtype] for tensor in launch.arguments] == list(TRITON_TENSORS.values())
        assert launch.constants.keys() == set(constants)
        assert launch.options == launch_options(launch.constants, nvidia=torch.version.hip is None)
        seen.append(launch.constants)
    assert {own["RULE"] for own in seen} == set(_C.RULES)
    assert {own["PARAM_STORAGE"] for own in seen} == set(PARAM_STORAGES.values())
    moments = {own[name] for own in seen for name in ("EXP_AVG", "EXP_AVG_SQ", "AUX")}
    every = {number for number, _ in _C.FORMATS.values()}
    assert moments == every - {_C.FORMATS["fp16"][0]}
    assert {own["PARAM"] for own in seen} == {_C.FORMATS[name][0] for name in ("fp32", "bf16", "fp16")}
    assert {own["THRESHOLD_PASS"] for own in seen} == {each.value for each in _C.ThresholdPass.__members__.values()}


def test_compiled_kernel_declares_the_parameters(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (launch,) = Step(CASES["sign_sgd-fp32"]).triton()
    (compiled,) = compile_launches([launch, launch], TARGET, tmp_path).values()
    assert compiled.threads == 32 * launch.options["num_warps"]
    assert f"Function {compiled.symbol}:" in listing("--dump-resource-usage", str(compiled.cubin))
    declared = re.search(
        rf"\.nv\.info\.{compiled.symbol}\n.*?EIATTR_CBANK_PARAM_SIZE\s+Format:\s*\w+\s+Value:\s*(0x[0-9a-f]+)",
        listing("--dump-elf", str(compiled.cubin)),
        re.DOTALL,
    )
    parameters = compiled.parameters(launch)
    assert declared is not None and int(declared[1], 16) == len(parameters)
    assert parameters[: 8 * len(TRITON_TENSORS)] == b"".join(
        tensor.data_ptr().to_bytes(8, "little") for tensor in launch.arguments
    )
    assert not any(parameters[8 * len(TRITON_TENSORS) :])


@pytest.fixture(scope="module")
def emulator() -> Iterator[Any]:
    folder = os.environ.get("SIGNADAM_EMULATOR")
    if folder is None:
        pytest.skip("no emulator of sm_90: SIGNADAM_EMULATOR names the folder of a package sass that has one")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        found = importlib.import_module("sass.emulator")
        sm_90.teach(found)
        if TARGET in BUILT["cuda_architectures"].split("+"):
            sm_90.teach_switches(found, listing("-arch", TARGET, "-elf", _C.__file__))
        yield found


@pytest.fixture(scope="module")
def compiled(emulator: Any, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The Triton kernels of the cases that are to be executed, by what they depend on: compiled in one process."""
    items = [item for item in request.session.items if getattr(item, "originalname", "") == "test_emulated_triton"]
    launches = [launch for item in items for launch in Step(item.callspec.params["case"]).triton()]
    return compile_launches(launches, TARGET, tmp_path_factory.mktemp("triton"))


def execute(
    emulator: Any,
    code: Path,
    symbol: str,
    parameters: bytes,
    regions: list[Region],
    *,
    grid: int,
    threads: int,
    dynamic_shared: int,
) -> None:
    """Executes a launch, block by block; an access outside of the regions and the parameters is a fault."""
    memory = emulator.Memory()
    for region in regions:
        memory.register(region.name, region.address, region.size, streamed=region.streamed)
    bank, own = emulator.constant_bank(TARGET, parameters)
    memory.register("parameters", ctypes.addressof(own), len(own))
    kernel = emulator.load(code, symbol, TARGET)
    for block in range(grid):
        emulator.run_block(kernel, bank, memory, block=block, threads=threads, dynamic_shared=dynamic_shared)


@pytest.mark.thorough
@pytest.mark.slow
@each_case
def test_emulated_cuda(case: Case, emulator: Any, library: ctypes.CDLL) -> None:
    if TARGET not in BUILT["cuda_architectures"].split("+"):
        pytest.skip(f"the module was built without machine code for {TARGET}")
    step = Step(case)
    for launch in step.cuda(library):
        symbol = symbols(_C.__file__)[TARGET][launch.kernel]
        size = {"grid": launch.grid, "threads": launch.threads, "dynamic_shared": launch.dynamic_shared}
        execute(emulator, Path(_C.__file__), symbol, launch.parameters, step.regions, **size)
    assert step.unequal() == []


@pytest.mark.slow
@each_case
def test_emulated_triton(case: Case, emulator: Any, compiled: Any) -> None:
    pytest.importorskip("triton")
    step = Step(case)
    for launch in step.triton():
        code = compiled[launch.kernel]
        assert list(emulator.kernels(code.cubin, TARGET)) == [code.symbol]
        size = {"grid": launch.grid, "threads": code.threads, "dynamic_shared": code.dynamic_shared}
        execute(emulator, code.cubin, code.symbol, code.parameters(launch), step.regions, **size)
    assert step.unequal() == []
