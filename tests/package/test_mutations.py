"""The faults that the fuzzer must find can still be put in: each text stands once in the file that it names."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzzer_mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_edit_has_its_place(mutation: Mutation) -> None:
    for file, before, after in mutation.edits:
        assert before != after
        assert (ROOT / file).read_text().count(before) == 1, (file, before)
