"""The commands of the README, for CI to run as they are printed: ``python -m reporting.commands main | bash -e``.

A block of commands names its use in the line before it, ``<!-- commands: main -->``, or says why CI does not run it,
``<!-- commands: not run, ... -->``.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NamedTuple

README = Path(__file__).resolve().parents[1] / "README.md"
#: Blocks that a new environment can be set up with, each in one of its own.
USES = ("main", "tests")

_BLOCK = re.compile(
    r"^(?:<!-- commands: (?P<use>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<lines>.*?)^```$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    use: str | None
    language: str
    lines: str


def blocks(text: str) -> list[Block]:
    """All code blocks of a page, in order."""
    return [Block(*found.group("use", "language", "lines")) for found in _BLOCK.finditer(text)]


def commands(text: str, use: str) -> str:
    """The lines of all blocks of that use, as a script.

    Raises:
        SystemExit: the page has none.
    """
    found = [block.lines for block in blocks(text) if block.use == use]
    if not found:
        raise SystemExit(f"the README has no block of commands marked {use!r}")
    return "".join(found)


def left_out(text: str) -> list[Block]:
    """The blocks of commands that CI does not run."""
    return [block for block in blocks(text) if block.language == "sh" and block.use not in USES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("use", choices=(*USES, "left-out"), help="left-out: those that are not run, with the reasons")
    options = parser.parse_args()
    if options.use == "left-out":
        for page in (README, *sorted((README.parent / "docs").glob("*.md"))):
            for block in left_out(page.read_text(encoding="utf-8")):
                print(f"{page.name}, {block.use or 'for a reader to run'}: {block.lines}", end="")
    else:
        print(commands(README.read_text(encoding="utf-8"), options.use), end="")


if __name__ == "__main__":
    main()
