"""All backends equal bit for bit: random runs against the reference.

Which backend a process can test depends on how it was started, so this file reads ``SIGNADAM_TEST_BACKEND`` (a backend
that takes CPU tensors: ``cpu`` by default, or ``triton`` with ``TRITON_INTERPRET=1``); test_parity_processes.py runs it
again with other instruction sets and with Triton's interpreter.
"""

from __future__ import annotations

import os

import pytest
import torch
from cases import DTYPES, LARGE_SIZES, SIZES, RunCase, TensorCase, assert_parity, run_cases
from hypothesis import given, settings
from table import OF_A_KIND, TABLE, Row

BACKEND = os.environ.get("SIGNADAM_TEST_BACKEND", "cpu")
# Triton's interpreter takes seconds for a large tensor.
LARGE = BACKEND != "triton"


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)
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
    return RunCase(row, seed=0, steps=2, tensors=tuple(tensors), groups=({"weight_decay": 0.1},))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)
def test_every_size(row: Row, dtype: torch.dtype) -> None:
    sizes = SIZES + LARGE_SIZES if LARGE else SIZES[::2]
    assert_parity(every_size(row, dtype, sizes), BACKEND, "cpu")


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
