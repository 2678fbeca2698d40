"""The page's table of tested versions of torch is that of the committed results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from reporting.pages import replaced

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("torch_versions", ROOT / "tests" / "torch_versions.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_says_what_the_results_say(program: ModuleType) -> None:
    if not program.RESULTS.exists():
        pytest.skip("the source distribution has no results")
    results = json.loads(program.RESULTS.read_text())
    page = program.PAGE.read_text("utf-8")
    assert replaced(page, "torch", program.table(results)) == page
    assert len(results["runs"]) >= 3
    assert all(run["failures"] == [] for run in results["runs"])


def test_outcomes_are_counted(program: ModuleType, tmp_path: Path) -> None:
    xml = tmp_path / "junit.xml"
    xml.write_text(
        "<testsuites><testsuite><testcase classname='a' name='passes'/>"
        "<testcase classname='a' name='fails'><failure message='no'/></testcase>"
        "<testcase classname='a' name='breaks'><error message='no'/></testcase>"
        f"<testcase classname='a' name='waits'><skipped type='pytest.skip' message='{tmp_path}/x'/></testcase>"
        "<testcase classname='a' name='known'><skipped type='pytest.xfail' message='so'/></testcase>"
        "</testsuite></testsuites>"
    )
    assert program.counted(xml, tmp_path) == {
        "outcomes": {"passed": 1, "failed": 2, "skipped": 1, "expected to fail": 1},
        "failures": ["a.fails", "a.breaks"],
        "skips": {"/x": 1},
    }
