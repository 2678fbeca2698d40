"""The page that compares with other packages is that of the committed results."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from reporting.pages import replaced

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("other_packages", ROOT / "tests" / "other_packages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def test_the_page_says_what_the_results_say(program: ModuleType) -> None:
    if not program.RESULTS.exists():
        pytest.skip("the source distribution has no results")
    found = json.loads(program.RESULTS.read_text())
    page = program.PAGE.read_text("utf-8")
    assert replaced(page, "compared", program.table(found)) == page
    assert program.faults(found) == []
    said = [(row.ours, row.package, row.differs) for row in program.ROWS]
    assert [(row["ours"], row["package"], row["differs"]) for row in found["rows"]] == said
    assert found["packages"] == program.PACKAGES


def test_a_row_that_is_not_as_it_says(program: ModuleType) -> None:
    row = {"ours": "A", "theirs": "B", "package": "c", "ours_apart": 1e-7, "differs": ""}
    found = {"rows": [row, {**row, "ours_apart": 1e-3}, {**row, "differs": "so"}]}
    assert program.faults({"rows": found["rows"][:1]}) == []
    assert program.faults(copy.deepcopy(found)) == ["A and B of c: 1.0e-03 apart", "A and B of c: 1.0e-07 apart"]


@pytest.mark.nightly
def test_what_the_packages_compute(program: ModuleType) -> None:
    """Installed anew, from PyPI."""
    assert program.faults(program.results()) == []
