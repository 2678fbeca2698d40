"""Steps that the device begins: the PTX of csrc/cuda/device_step.cu, executed, against what the host makes.

Sums of squares against the CPU's, the step's data against that of a step which the host begins, and whole steps, the
same launches replayed as a CUDA graph would, against eager steps of the CPU backend.
"""

from __future__ import annotations

import ctypes
import math
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.device_steps import KERNELS, DeviceBegun, emulated_cuda, execute
from support.launches import CASES, Case, Given, Step, aligned, same_bits
from support.ptx import SCHEDULES, Counts, Fault
from support.toolchain import cuda_launch_library, ptx

import signadam_ext
from signadam_ext import _C
from signadam_ext.core.random_bits import tensor_keys

pytestmark = [
    pytest.mark.skipif(_C.build_info()["cuda"] is None, reason="the module was built without CUDA"),
    pytest.mark.thorough,
]
NORM, BEGIN = KERNELS
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def library(built_once: Callable[..., Path]) -> ctypes.CDLL:
    return cuda_launch_library(built_once)


@pytest.fixture(scope="module")
def texts() -> dict[Any, str]:
    """PTX of the module's kernels by name."""
    (own,) = ptx(_C.__file__).values()
    return dict(own)


def begun(library: ctypes.CDLL, case: Case) -> tuple[Step, DeviceBegun]:
    step = Step(case)
    (bucket,) = step.begun_by_device()
    return step, DeviceBegun(library, bucket, step)


# The norm.

#: Gradients of every dtype, misaligned by themselves or not, of no element to three chunks, and one that is absent.
NORMED = (
    Given(),
    Given(0),
    Given(2, grad_offset=3),
    Given(7, offset=1, dtype=BF16, grad_offset=5),
    Given(16384, grad_offset=1),
    Given(2049, absent=True),
    Given(2050, dtype=FP16, offset=2),
    Given(16384, dtype=BF16),
    Given(16385, dtype=BF16, grad_offset=7),
    Given(33, dtype=FP16, grad_dtype=FP32, grad_offset=2),
    Given(40000, dtype=FP16, grad_offset=1),
    Given(16391, specials=True, grad_offset=2),
)
SQUARED = Case("norm", signadam_ext.SignSGD, {"lr": 0.1}, given=NORMED)


def squares(step: DeviceBegun) -> torch.Tensor:
    """What the CPU makes, where the kernel leaves it."""
    addresses = [0] * len(step.params)
    for entry, address in zip(step.bucket.entries, step.grads.tolist(), strict=True):
        addresses[entry.index] = address
    step.bucket.table.begin(addresses)
    found = torch.tensor(step.bucket.table.squares(threads=1), dtype=torch.float64)
    return found.flip(0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_norm(library: ctypes.CDLL, texts: dict[Any, str], schedule: str) -> None:
    _, step = begun(library, SQUARED)
    expected = squares(step)
    assert expected.isnan().any() and (expected == 0).sum() == 2
    (launch,) = step.norm()
    assert (launch.kernel, launch.grid, launch.threads) == (NORM, step.bucket.table.chunks, 256)
    for _ in range(2):  # counts of finished chunks are zero again
        step.totals.zero_()
        execute([launch], texts, step.memory(), schedule=schedule, seed=len(schedule))
        assert same_bits(step.totals, expected)
        assert not step.square_arrivals.any()


def test_norm_touches_no_absent_gradient(library: ctypes.CDLL, texts: dict[Any, str]) -> None:
    _, step = begun(library, SQUARED)
    step.grads.zero_()
    step.totals.fill_(7.0)
    execute(step.norm(), texts, step.memory())
    assert step.totals.eq(7.0).all()


@pytest.mark.parametrize(("dtype", "sectors"), [(FP32, 2.0), (BF16, 1.0), (FP16, 1.0)], ids=["fp32", "bf16", "fp16"])
def test_norm_reads_once(library: ctypes.CDLL, texts: dict[Any, str], dtype: torch.dtype, sectors: float) -> None:
    """Of a full, aligned chunk, as wide as the update reads it: see ``SECTORS`` of test_ptx.py."""
    _, step = begun(library, replace(SQUARED, given=(Given(),), dtype=dtype))
    counts = Counts()
    execute(step.norm(), texts, step.memory(), counts=counts)
    access = counts.accesses["0.grad", "read"]
    assert access.sectors == sectors * access.needed
    # A warp's eight rows of a chunk, each element in one of the requests.
    assert access.needed * 32 == 16384 * torch.empty((), dtype=dtype).element_size()


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (r"(?:membar\.gl|fence\.acq_rel\.gpu);", "a race at byte .* of square_sums"),
        (r"bar\.sync\s+\S+;", "a race at byte .* of shared memory"),
    ],
    ids=["fence", "barrier"],
)
def test_norm_that_does_not_wait_is_found(
    library: ctypes.CDLL, texts: dict[Any, str], pattern: str, found: str
) -> None:
    _, step = begun(library, replace(SQUARED, given=(Given(16385),)))
    with pytest.raises(Fault, match=found):
        execute(step.norm(), {NORM: re.sub(pattern, "", texts[NORM])}, step.memory())


# The step's data.

SOME = (Given(), Given(33, absent=True), Given(7, group=1), Given(1, group=2), Given(0), *[Given(3)] * 40)
GROUPS: tuple[dict[str, Any], ...] = (
    {},
    {"lr": 0.003, "decoupled_weight_decay": False, "seed": 2**64 - 3},
    {"lr": 0.1, "weight_decay": 0.0, "maximize": True, "decoupled_weight_decay": True},
)
COUNTS = (0, 5, 2**31, 2**32 + 7, 2**53 - 2)
#: Every rule with its ways to come by a threshold, and few bits of a bounded moment.
BEGUN = [name for name in CASES if name.endswith("-fp32") and "coupled" not in name]
BEGUN += ["sign_adam_pp-bf16-stochastic-int2", "sign_adam-bf16-split8-int4", "svag-fp16-master-bf16"]


def parts(step: DeviceBegun, data: bytes, sets: int) -> tuple[list[bytes], ...]:
    """Of a step's data: scalars, addresses of gradients, keys of random bits, indices of scalars."""
    tensors, found = len(step.params), []
    at = 0
    for size, count in ((step.scalars_size, sets), (8, tensors), (8, step.drawing), (4, tensors)):
        found.append([data[at + size * i : at + size * (i + 1)] for i in range(count)])
        at += size * count
    assert at == len(data)
    return tuple(found)


def by_host(step: DeviceBegun, factor: float, library: ctypes.CDLL) -> tuple[list[bytes], ...]:
    """The data of the step that the host begins."""
    table, rule = step.bucket.table, step.bucket.rule
    addresses = [0] * len(step.params)
    for entry, address in zip(step.bucket.entries, step.grads.tolist(), strict=True):
        addresses[entry.index] = address
    none = dict.fromkeys(_C.SCALARS, 0.0)
    groups = step.groups()
    sets = [tuple({**none, **rule.scalar_set(groups[g], t, factor)}.values()) for g, t in table.begin(addresses)]
    # It travels in the parameters of the update.
    data = step.update(sets)[0].parameters[library.step_at() :]
    size = len(sets) * step.scalars_size + len(addresses) * 12 + step.drawing * 8
    return parts(step, data[:size], len(sets))


@pytest.mark.parametrize("name", BEGUN)
def test_begin(library: ctypes.CDLL, texts: dict[Any, str], name: str) -> None:
    _, step = begun(library, replace(CASES[name], given=SOME, groups=GROUPS))
    before = [COUNTS[i % len(COUNTS)] for i in range(len(step.counts))]
    for count, value in zip(step.counts, before, strict=True):
        count.fill_(value)
    factor = 0.37
    step.control[0] = factor
    scalars, grads, keys, indices = by_host(step, factor, library)
    assert step.step.numel() == step.bucket.table.cuda_device_step_bytes()
    (launch,) = step.begin()
    assert (launch.kernel, launch.grid, launch.threads) == (BEGIN, 2, 32)
    execute([launch], texts, step.memory())
    found = parts(step, step.step.numpy().tobytes(), len(step.params))
    assert found[1] == grads == [struct.pack("<q", address) for address in step.grads.tolist()]
    for i, entry in enumerate(step.bucket.entries):
        if step.grads[i] == 0:
            assert step.counts[i] == before[i]
            continue
        assert step.counts[i] == before[i] + 1
        assert found[0][i] == scalars[struct.unpack("<I", indices[i])[0]], i
        assert found[3][i] == struct.pack("<I", i)
        if step.drawing:
            own = struct.pack("<II", *tensor_keys(entry.seed, entry.param_id, before[i] + 1))
            assert found[2][i] == keys[i] == own


def test_a_step_that_is_skipped(library: ctypes.CDLL, texts: dict[Any, str]) -> None:
    _, step = begun(library, replace(CASES["adam-fp32"], given=SOME, groups=GROUPS))
    step.control[1] = 1.0
    before = [count.clone() for count in step.counts]
    memory = step.memory()
    execute(step.begin(), texts, memory)
    assert step.counts == before
    _, grads, *_ = parts(step, step.step.numpy().tobytes(), len(step.params))
    assert set(grads) == {bytes(8)}
    # Nothing else of the step's data is there, and the update reads nothing else.
    execute(step.update(), texts, memory)


# Whole steps.

#: Gradients in fp32, which clipping scales as the kernels do.
CLIPPED = (
    Given(grad_dtype=FP32),
    Given(0, grad_dtype=FP32),
    Given(7, offset=1, grad_offset=1, grad_dtype=FP32),
    Given(33, grad_offset=2, absent=True, grad_dtype=FP32),
    Given(16385, offset=3, grad_offset=1, group=1, grad_dtype=FP32),
)
WHOLE = (
    "sign_adam_pp-fp32",
    "sign_adam_pp-adaptive-fp32",
    "sign_adam_pp-sparsity-fp32",
    "adam-bf16-stochastic-bf16",
    "sign_adam-bf16-split8-int4",
    "lion-bf16-split8-int8",
    "svag-fp16-master-bf16",
    "signum-bf16-exact-stochastic-int8",
    "adam_amsgrad-bf16-rms-master-bf16",
    "mars_adamw-clipped-fp32",
)


@pytest.mark.parametrize("name", WHOLE)
def test_replayed_steps(library: ctypes.CDLL, texts: dict[Any, str], name: str) -> None:
    """Launches are made once and replayed: with other gradients, learning rates and factors, and once skipped."""
    groups: tuple[dict[str, Any], ...] = ({}, {"lr": 0.003, "maximize": True})
    step, own = begun(library, replace(CASES[name], given=CLIPPED, groups=groups))
    norm, launches, memory = own.norm(), [*own.begin(), *own.update()], own.memory()

    def replay(factor: float, skipped: bool = False) -> None:
        own.fill_values()
        own.control.copy_(torch.tensor([factor, float(skipped)], dtype=torch.float64))
        execute(launches, texts, memory, schedule="interleaved", seed=len(name))

    # The first was taken on the CPU with these gradients as they are.
    replay(1.0)
    assert step.unequal() == []
    generator = torch.Generator().manual_seed(3)
    for lr in (0.02, 0.0007):
        for optimizer in step.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr"]
        for param in step.params:
            if param.grad is not None:
                param.grad.copy_(torch.randn(param.grad.shape, generator=generator))
        replay(0.5, skipped=True)
        assert step.unequal() == []
        own.totals.zero_()
        execute(norm, texts, memory)
        factor = 1.5 / math.sqrt(_C.ordered_sum(own.totals.tolist()))
        assert 0 < factor < 0.1
        grads = [None if param.grad is None else param.grad * torch.tensor(factor).float() for param in step.params]
        step.expected_step(grads)
        replay(factor)
        assert step.unequal() == []
    assert not own.arrivals.any() and not own.square_arrivals.any()


def test_steps_of_an_optimizer(library: ctypes.CDLL, texts: dict[Any, str]) -> None:
    """Its plan, and the backend's launches, from ``step()`` on: clipped, with a schedule, once skipped."""
    case = {"lr": 0.01, "state_dtype": "int8", "param_storage": "stochastic", "alpha": 1e-3, "max_grad_norm": 0.5}
    generator = torch.Generator().manual_seed(5)
    pairs = []
    for size in (16_400, 7, 0, 33):
        value = torch.randn(size, generator=generator).bfloat16()
        pairs.append([aligned(size, BF16).copy_(value).requires_grad_() for _ in range(2)])
    ours, theirs = (
        signadam_ext.SignAdamPP([{"params": own[:2]}, {"params": own[2:], "maximize": True}], **case, **where)
        for own, where in zip(
            zip(*pairs, strict=True), ({"backend": "cuda", "capturable": True}, {"backend": "cpu"}), strict=True
        )
    )
    with emulated_cuda(library, texts, ours) as launched:
        for step in range(4):
            for index, pair in enumerate(pairs):
                grad = torch.randn(pair[0].shape, generator=generator).bfloat16()
                if step == 2 and index == 0:
                    grad[16_390] = torch.inf
                for param in pair:
                    param.grad = None if (step, index) == (0, 3) else grad.clone()
            for optimizer in (ours, theirs):
                optimizer.param_groups[0]["lr"] *= 0.5
                optimizer.step()
            assert all(same_bits(own.detach(), other.detach()) for own, other in pairs)
            for own, other in pairs:
                states = ours.state[own], theirs.state[other]
                assert states[0].keys() == states[1].keys()
                assert all(
                    same_bits(states[0][name], states[1][name]) for name in ("exp_avg", "step") if name in states[0]
                )
    assert launched == ["norm", "begin", "update"] * 4
    assert int(ours.skipped_steps) == int(theirs.skipped_steps) == 1
    assert ours.state[pairs[0][0]]["step"] == 3


def test_update_reads_nothing_that_was_not_begun(library: ctypes.CDLL, texts: dict[Any, str]) -> None:
    _, step = begun(library, replace(CASES["adam-fp32"], given=(Given(7),)))
    with pytest.raises(Fault, match="step"):
        execute(step.update(), texts, step.memory())
