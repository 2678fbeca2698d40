"""All backends equal bit for bit: random runs against the reference.

Which backend a process can test depends on how it was started, so this file reads ``SIGNADAM_TEST_BACKEND`` (a backend
that takes CPU tensors: ``cpu`` by default, or ``triton`` with ``TRITON_INTERPRET=1``); test_parity_processes.py runs it
again with other instruction sets and with Triton's interpreter.
"""

from __future__ import annotations

import os

import pytest
from cases import RunCase, assert_parity, run_cases
from hypothesis import given, settings
from table import TABLE, Row

BACKEND = os.environ.get("SIGNADAM_TEST_BACKEND", "cpu")
# Triton's interpreter takes seconds for a large tensor.
LARGE = BACKEND != "triton"


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)
def test_parity(row: Row) -> None:
    @given(case=run_cases([row], large=LARGE))
    def check(case: RunCase) -> None:
        assert_parity(case, BACKEND, "cpu")

    check()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)
def test_parity_on_gpu(row: Row, backend: str) -> None:
    # Triton compiles anew for each combination of dtypes: some, so that the whole stays within minutes.
    @settings(max_examples=300 if backend == "cuda" else 60)
    @given(case=run_cases([row]))
    def check(case: RunCase) -> None:
        assert_parity(case, backend, "cuda")

    check()
