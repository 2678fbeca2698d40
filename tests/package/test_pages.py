"""Snippets of the documentation's pages run as they are printed, where no other test runs them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
SNIPPETS = [
    pytest.param(snippet, id=f"{page}-{number}")
    for page in ("checkpoints", "gradient_release", "memory", "modifiers", "offload", "optimizers")
    for number, snippet in enumerate(
        re.findall(r"^```python\n(.*?)^```$", (DOCS / f"{page}.md").read_text(), re.M | re.S)
    )
    if snippet.startswith("import ")  # and is whole
]


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) == 7


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_runs(snippet: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(snippet, "snippet", "exec"), {})
    printed = capsys.readouterr().out
    assert ("MiB" in printed) == ("display_snapshot" in snippet)
