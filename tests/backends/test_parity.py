"""All backends equal bit for bit: random runs against the reference.

Which backend a process can test depends on how it was started, so this file reads ``SIGNADAM_TEST_BACKEND`` (a backend
that takes CPU tensors: ``cpu`` by default, or ``triton`` with ``TRITON_INTERPRET=1``); test_parity_processes.py runs it
again with other instruction sets and with Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from support.paper_formulas import OF_A_KIND, TABLE, Row, sign_adam_pp
from support.strategies import DTYPES, LARGE_SIZES, SIZES, RunCase, TensorCase, assert_parity, run_cases

import signadam_ext

BACKEND = os.environ.get("SIGNADAM_TEST_BACKEND", "cpu")
# Triton's interpreter takes seconds for a large tensor.
LARGE = BACKEND != "triton"
#: Of a process of test_parity_processes.py the quick run takes part.
WHOLE = LARGE and "SIGNADAM_CPU_CAPABILITY" not in os.environ


def some(rows: list[Row], taken: Callable[[int, Row], bool]) -> list[Any]:
    """Parameters; in a process of its own the quick run has those that are taken, and kernels are tested once."""
    left = () if WHOLE else pytest.mark.thorough
    rows = rows if WHOLE else [row for row in rows if not row.like]
    return [pytest.param(row, id=row.id, marks=() if taken(i, row) else left) for i, row in enumerate(rows)]


@pytest.mark.parametrize("row", some(TABLE, lambda i, row: row.id in OF_A_KIND))
def test_parity(row: Row) -> None:
    @settings(max_examples=settings.default.max_examples // (1 if row.id in OF_A_KIND else 3))
    @given(case=run_cases([row], large=LARGE))
    def check(case: RunCase) -> None:
        assert_parity(case, BACKEND, "cpu")

    check()


def every_size(row: Row, dtype: torch.dtype, sizes: tuple[int, ...]) -> RunCase:
    """One run over every border of the kernels, whatever hypothesis draws."""
    tensors = [
        TensorCase(size, "offset", dtype, dtype, "same", offset=0, scale=1.0, specials=True, group=0) for size in sizes
    ]
    kind = "cautious" if dtype == torch.bfloat16 else "decoupled"
    group = {"weight_decay": 0.1, "weight_decay_kind": kind}
    return RunCase(row, seed=0, steps=2, tensors=tuple(tensors), groups=(group,))


@pytest.mark.parametrize("dtype", [*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.thorough)], ids=str)
@pytest.mark.parametrize("row", some(TABLE, lambda i, row: row.id in OF_A_KIND[:6:2]))
def test_every_size(row: Row, dtype: torch.dtype) -> None:
    sizes = SIZES + LARGE_SIZES if LARGE else SIZES[::2]
    assert_parity(every_size(row, dtype, sizes), BACKEND, "cpu")


#: Finite numbers that fp32 cannot hold, or whose scalars it cannot.
BEYOND_FP32 = (
    {"lr": 1e300},
    {"lr": 1e-300},
    {"lr": 1e-42},
    {"lr": 3.4028235677973366e38},  # rounds to infinity, a hair less does not
    {"lr": 3.4028235677973362e38},
    {"weight_decay": 1e300},
    {"weight_decay": 1e300, "decoupled_weight_decay": False},
    {"weight_decay": 1e-300, "decoupled_weight_decay": False},
    {"weight_decay": 1e300, "weight_decay_kind": "cautious"},
    {"lr": 1e308, "weight_decay": 1e308},
    {"alpha": 1e300},
    {"alpha": 1e-300},
    {"eps": 1e300},
    {"eps": 1e-300},
    {"epsilon": 1e300},
    {"epsilon": 1e-300},
    {"lr": 1e308, "beta": 1 - 2**-53},
    {"lr": 1e308, "betas": (1 - 2**-53, 1 - 2**-53)},
    {"beta": 5e-324},
    {"betas": (1e-300, 5e-324)},
    {"beta2": 1 - 2**-53},
    {"gamma": 1e-300},
    {"confidence_beta": 1 - 2**-53},
)
STEERED = {"confidence": "sparsity", "beta": 0.9}
EXTREME = [
    *TABLE,
    Row("sign_adam_pp-hardly any", signadam_ext.SignAdamPP, {**STEERED, "target": 5e-324}, sign_adam_pp),
    Row(
        "sign_adam_pp-nearly all",
        signadam_ext.SignAdamPP,
        {**STEERED, "target": 1 - 2**-53, "gain": 1e-300},
        sign_adam_pp,
    ),
]


def beyond_fp32(row: Row, dtypes: tuple[torch.dtype, ...]) -> RunCase:
    """A group for each extreme that the row's optimizer has."""
    known = {"lr", "weight_decay", "decoupled_weight_decay", "weight_decay_kind", *row.hyperparameters}
    slow = row.hyperparameters.get("betas", ())[2:]
    groups = [{}, *(group for group in BEYOND_FP32 if group.keys() <= known)]
    if row.optimizer is signadam_ext.Ano:  # whose second beta is at least 0.5
        groups.remove({"betas": (1e-300, 5e-324)})
    if slow:  # whose schedule takes no beta so near to 1
        groups = [
            {**group, "betas": (*group["betas"], *slow), "t_beta3": None} if "betas" in group else group
            for group in groups
        ]
    tensors = [
        TensorCase(33, "contiguous", dtype, dtype, "same", offset=0, scale=1.0, specials=True, group=group)
        for group in range(len(groups))
        for dtype in dtypes
    ]
    return RunCase(row, seed=0, steps=2, tensors=tuple(tensors), groups=tuple(groups))


@pytest.mark.parametrize("row", some(EXTREME if LARGE else EXTREME[::2], lambda i, row: i % 3 == 2))
def test_beyond_fp32(row: Row) -> None:
    """Every backend rounds a scalar as IEEE has it: to infinity, to a subnormal, to 0."""
    dtypes = (torch.float32, torch.bfloat16) if LARGE else (torch.float32,)
    assert_parity(beyond_fp32(row, dtypes), BACKEND, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("row", EXTREME, ids=lambda row: row.id)
def test_beyond_fp32_on_gpu(row: Row, backend: str) -> None:
    assert_parity(beyond_fp32(row, (torch.float32,)), backend, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)
def test_parity_on_gpu(row: Row, backend: str) -> None:
    # Triton compiles anew for each combination of dtypes: some, so that the whole stays within minutes.
    examples = settings.default.max_examples

    @settings(max_examples=2 * examples if backend == "cuda" else examples // 3)
    @given(case=run_cases([row]))
    def check(case: RunCase) -> None:
        assert_parity(case, backend, "cuda")

    check()
