"""What the experiments share: their command line, their files, intervals, claims, and the look of their pictures.

An experiment is a module with `run(quick) -> dict`, `draw(result, plt) -> Figure`, `section(result) -> str`, and with

    if __name__ == "__main__":
        raise SystemExit(common.main("name", __doc__, run, draw))

`main` writes what `run` returned, together with the machine's facts, as DIR/name.json and the figure as DIR/name.png.
`experiments.page` makes the README of the sections.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from reporting import machine
from reporting.files import rounded, write
from reporting.present import built_at
from reporting.runs import interval

RESULTS = Path(__file__).resolve().parent / "results"
OUT = RESULTS.with_name("out")  # what --quick writes: never over a full run

Result = dict[str, Any]

#: One colour for each method wherever it appears. Methods that take a sign are warm, the others cold; the
#: variance-adapted form of a method is the lighter one.
COLORS = {
    "SGD": "#08519c",
    "M-SGD": "#08519c",
    "SVAG": "#4aa3df",
    "M-SVAG": "#4aa3df",
    "SSD": "#a50f15",
    "M-SSD": "#a50f15",
    "ASSD": "#f58a42",
    "Adam": "#f58a42",
    "Adam*": "#d6a800",
}


# Numbers


def bands(values: Tensor, confidence: float = 0.95) -> dict[str, list[float]]:
    """`interval` for each column of (seeds, points): lists of means and of both ends."""
    columns = [interval(column, confidence) for column in values.double().T.tolist()]
    return {end: [column[end] for column in columns] for end in ("mean", "low", "high")}


# Claims


@dataclass(frozen=True)
class Claim:
    """A statement of a paper and how to say what came of it: `found` is a format string over the claim's JSON."""

    key: str
    source: str
    text: str
    found: str


def claims_table(claims: Iterable[Claim], results: Result) -> str:
    """One row for each claim: what the paper says, by what it is judged, what was found, whether it came out."""
    rows = []
    for claim in claims:
        values = results[claim.key]
        verdict = "yes" if values["holds"] else "**no**"
        if not values["holds"] and any(values.get("holds_at", {}).values()):
            verdict = "**in part**: " + ", ".join(name for name, held in values["holds_at"].items() if held)
        found = claim.found.format(**values)
        rows.append((f"{claim.text} ({claim.source})", values["criterion"], found, verdict))
    return judged(rows)


def judged(rows: Iterable[Sequence[str]]) -> str:
    """A table of what a paper says, by what it is judged, what was found and whether it came out."""
    lines = ["| claim | judged by | found | came out |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def modules(result: Result) -> set[str]:
    """The commits of the modules that made a result, or of those that made the runs it is collected from."""
    problems = result.get("problems", {}).values()
    return {commit for problem in problems for commit, _ in problem["made"]} or {built_at(result)}


def provenance(result: Result) -> str:
    """Where and with what a result was made, in one line."""
    versions = f"torch {result['versions']['torch']}, module of commit {built_at(result)}"
    made = f"{versions}, {result['date'][:10]}, {result['seconds']:.0f} s"
    return f"{result['machine']['cpu']}, {made}: `{result['command']}`"


# Pictures


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(
        {
            "axes.grid": True,
            "grid.alpha": 0.25,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "font.size": 10,
        }
    )
    return plt


def band(axes: Any, x: Sequence[float], values: dict[str, list[float]], **style: Any) -> Any:
    """A line through the means, with its interval as a band."""
    axes.fill_between(x, values["low"], values["high"], color=style["color"], alpha=0.2, linewidth=0)
    return axes.plot(x, values["mean"], **{"linewidth": 1.6, **style})[0]


# Command line


def progress(total: int, what: str) -> Any:
    """A progress bar that does not flood a log file."""
    return tqdm(total=total, desc=what, mininterval=0.1 if sys.stderr.isatty() else 30)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order, however many cores there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load(name: str, folder: Path = RESULTS) -> Result | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def save(name: str, result: Result, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f"{name}.json", json.dumps(rounded(result), separators=(",", ":")) + "\n")


def main(
    name: str,
    description: str | None,
    run: Callable[[bool], Result],
    draw: Callable[[Result, Any], Any],
    arguments: Sequence[str] | None = None,
) -> int:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="in small, a test of this program: a few seconds")
    parser.add_argument("--results", type=Path, help=f"folder to write to (default: {RESULTS.name}, or out if --quick)")
    parser.add_argument("--plot", action="store_true", help="only draw again what is in the results")
    options = parser.parse_args(arguments)
    folder = options.results or (OUT if options.quick else RESULTS)
    if not options.plot:
        if folder.resolve() == RESULTS:
            machine.require_commits([built_at(machine.facts())])
        with one_thread():
            start = time.perf_counter()
            result = run(options.quick)
            seconds = time.perf_counter() - start
            shown = machine.command(f"experiments.{name}", ["--quick"] if options.quick else [])
            header = {"name": name, "command": shown, "quick": options.quick, "seconds": seconds}
            save(name, {**header, **machine.facts(), **result}, folder)
    # The picture shows what the file says.
    stored = load(name, folder)
    if stored is None:
        parser.error(f"{folder} has no {name}.json")
    plt = pyplot()
    figure = draw(stored, plt)
    figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    for key, values in stored.get("claims", {}).items():
        print(f"{'yes' if values['holds'] else 'NO ':3} {key}")
    return 0
