"""The blocks of docs/integrations.md, which its tests run and read."""

from __future__ import annotations

import re

from support.toolchain import ROOT

from reporting.commands import blocks

PAGE = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")


def block_of(heading: str, language: str) -> str:
    """The one block in that language of the section of that heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (found,) = (block.lines for block in blocks(section) if block.language == language)
    return found


def versions_of_the_table() -> list[str]:
    """The second column of the page's table."""
    return re.findall(r"^\| \[[^|]*\| ([^|]*) \|", PAGE, re.MULTILINE)
