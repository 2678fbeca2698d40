"""Writes the sections of experiments/README.md from the results, and nothing by hand:

python -m experiments.page [--check]

Each experiment has a block between two comments and a function `section` that makes its text of its JSON. One without
results keeps the block it has. The recipe, which is of no paper, has a page of its own beside its results.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path

from reporting import machine
from reporting.files import write
from reporting.pages import replaced
from reporting.present import markdown

from . import common
from .recipe import proof_summary, summary

EXPERIMENTS = ("stochastic_qp", "variance_factors", "theorems", "wilson", "four_ways", "ablation", "lemma")
RECIPE = (summary, proof_summary)
README = Path(__file__).resolve().parent / "README.md"
MARKERS = ("<!-- {} -->", "<!-- /{} -->")


def written(text: str, results: Path = common.RESULTS) -> str:
    """The README's text with the section of every experiment that has results, and the table of their claims."""
    sections = []
    for name in EXPERIMENTS:
        result = common.load(name, results)
        if result is not None:
            section: str = import_module(f"experiments.{name}").section(result)
            sections.append(section)
            text = replaced(text, name, section, MARKERS)
    return replaced(text, "claims", tally(sections), MARKERS) if sections else text


def require_commits(results: Path = common.RESULTS) -> None:
    """Raises `NotCommitted` for results of a module that this repository cannot give back."""
    for name in EXPERIMENTS:
        result = common.load(name, results)
        if result is not None:
            machine.require_commits(common.modules(result))
    for recipe in RECIPE:
        if (stage := recipe.read(results)) is not None:
            machine.require_commits(common.modules(stage))


def pages(readme: Path, results: Path) -> dict[Path, str]:
    """Everything that is written from results, as it should be."""
    found = {readme: written(readme.read_text(), results)}
    for recipe in RECIPE:
        if (stage := recipe.read(results)) is not None:
            found[recipe.page_of(results)] = recipe.page(stage)
    return found


def tally(sections: Iterable[str]) -> str:
    """How many claims of each section came out, as its own table says."""
    lines = []
    for section in sections:
        title = section.splitlines()[0].removeprefix("## ")
        verdicts = [line.rstrip(" |").rpartition("|")[2].strip(" *") for line in _claims(section)]
        yes, no = verdicts.count("yes"), verdicts.count("no")
        counts = (len(verdicts), yes, len(verdicts) - yes - no, no)
        lines.append([f"[{title}](#{_anchor(title)})", *map(str, counts)])
    return markdown(["", "claims", "came out", "in part", "did not"], lines)


def _claims(section: str) -> Iterator[str]:
    """The rows of the tables that begin with a claim."""
    inside = False
    for line in section.splitlines():
        inside = line.startswith("| claim |") or (inside and line.startswith("|"))
        if inside and not line.startswith(("| claim |", "|---")):
            yield line


def _anchor(title: str) -> str:
    """As GitHub and MyST name a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--check", action="store_true", help="change nothing, fail when a page is stale")
    options = parser.parse_args(arguments)
    require_commits(options.results)
    found = pages(options.readme, options.results)
    stale = [path.name for path, text in found.items() if not path.exists() or path.read_text() != text]
    if options.check and stale:
        print(f"{', '.join(stale)}: stale; run python -m experiments.page")
        return 1
    if not options.check:
        for path, text in found.items():
            write(path, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
