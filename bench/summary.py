"""Writes the figures of the README from the committed results, and nothing by hand:

python -m bench.summary --readme README.md [--check]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from . import present

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
RESULTS = Path(__file__).resolve().parent / "results"


def _cell(row: present.Row | None) -> str:
    if row is None:
        return present.NOT_MEASURED
    adamw = f"{present.number(row['to_fused_adamw']['median'])}x"
    # Beside a stream of a few hundred KB a step over many small tensors is bound by calls, not by bytes.
    return adamw if row["elements"] < 1_000_000 else f"{adamw} ({present.number(row['to_stream']['median'])})"


def _overview(report: present.Report, device: str) -> str:
    """Our optimizers on one device: speed against fused AdamW and, in brackets, against the stream."""
    rows = [row for row in present.measured(report) if row["device"] == device]
    groups = present.workloads(rows)
    columns = [(shapes, dtype) for _, shapes, dtype in groups]
    ours = dict.fromkeys(
        (row["optimizer"], row["backend"]) for row in rows if row["backend"] in ("cpu", "cuda", "triton")
    )
    lines = []
    for optimizer, backend in ours:
        found = [
            present.find(report, optimizer=optimizer, backend=backend, shapes=shapes, dtype=dtype, device=device)
            for shapes, dtype in columns
        ]
        lines.append([f"`{optimizer}`" if backend == "cpu" else f"`{optimizer}` ({backend})", *map(_cell, found)])
    return present.markdown(["", *(f"{shapes}, {present.HALF[dtype]}" for shapes, dtype in columns)], lines)


def _section(report: present.Report, folder: str) -> str:
    machine, versions = report["machine"], report["versions"]
    gpu = machine["gpu"]
    title = gpu["name"] if gpu else f"{machine['cpu']}, {machine['cores']} cores"
    driver = f", driver {gpu['driver']}" if gpu else ""
    parts = [
        f"**{title}** (torch {versions['torch']}{driver}, commit {report['commit'][:12]}, {report['date'][:10]})",
        "Speed against torch's fused AdamW; in brackets bytes per second against the in-place stream `a.add_(b)`.\n"
        "Medians over interleaved rounds."
        f" Spreads, baselines and versions: [{report['name']}]({folder}/{report['name']}.md).",
        _overview(report, "cuda" if gpu else "cpu"),
    ]
    if not gpu and (aims := present.aims(report)):
        parts.append(aims)
    if (RESULTS / f"{report['name']}.png").exists():
        parts.append(f"![{report['name']}: speed by workload]({folder}/{report['name']}.png)")
    return "\n\n".join(parts)


def block(results: Path = RESULTS, folder: str = "bench/results") -> str:
    """The README's text between the markers; links go to `folder`."""
    reports = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    cpu = [report for report in reports if not report["machine"]["gpu"]]
    gpu = [report for report in reports if report["machine"]["gpu"]]
    parts = [_section(report, folder) for report in cpu] or [f"CPU: {present.NOT_MEASURED}."]
    parts += [_section(report, folder) for report in gpu] or [f"GPU: {present.NOT_MEASURED}."]
    return "\n\n".join(parts)


def replaced(text: str, block: str) -> str:
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the README has no lines {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{block}\n{END}{tail}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--check", action="store_true", help="change nothing, fail when the README is stale")
    options = parser.parse_args(arguments)
    text = options.readme.read_text()
    new = replaced(text, block())
    if options.check and new != text:
        print(f"{options.readme} is stale: run python -m bench.summary --readme {options.readme}")
        return 1
    if not options.check:
        options.readme.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
