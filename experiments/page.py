"""Writes the sections of experiments/README.md from the results, and nothing by hand:

python -m experiments.page [--check]

Each experiment has a block between two comments and a function `section` that makes its text of its JSON. One without
results keeps the block it has.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from reporting.files import write
from reporting.pages import replaced

from . import common

EXPERIMENTS = ("stochastic_qp", "variance_factors", "wilson", "four_ways", "ablation", "lemma")
README = Path(__file__).resolve().parent / "README.md"
MARKERS = ("<!-- {} -->", "<!-- /{} -->")


def written(text: str, results: Path = common.RESULTS) -> str:
    """The README's text with the section of every experiment that has results."""
    for name in EXPERIMENTS:
        result = common.load(name, results)
        if result is not None:
            section: str = import_module(f"experiments.{name}").section(result)
            text = replaced(text, name, section, MARKERS)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--check", action="store_true", help="change nothing, fail when the README is stale")
    options = parser.parse_args(arguments)
    text = options.readme.read_text()
    new = written(text, options.results)
    if options.check and new != text:
        print(f"{options.readme.name} is stale: run python -m experiments.page")
        return 1
    if not options.check:
        write(options.readme, new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
