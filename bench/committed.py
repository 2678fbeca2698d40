"""The committed results: where they lie, and how pages find a figure in them."""

import json
from functools import cache
from pathlib import Path

from reporting import present

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
EXAMPLES = ROOT / "examples" / "results"
EXPERIMENTS = ROOT / "experiments" / "results"
CONVERGENCE = EXPERIMENTS / "convergence"
#: The problems of `experiments.convergence`, in the order in which pages show them.
TRAININGS = ("gpt", "gpt_long", "digits")
LARGE_MODEL = EXAMPLES / "train_7b_in_18gb.jsonl"


@cache
def without_gpu(folder: Path) -> present.Report:
    """The one report of a folder that was made without a GPU."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    (report,) = [report for report in reports if not report["machine"]["gpu"]]
    return report


@cache
def training(name: str) -> present.Report:
    """What `experiments.convergence` collected on a problem."""
    report: present.Report = json.loads((CONVERGENCE / f"{name}.json").read_text())
    return report


@cache
def large_model_log() -> tuple[present.Report, list[present.Row]]:
    """The run of the 7-billion-parameter example: what it began with, and its steps."""
    start, *lines = (json.loads(line) for line in LARGE_MODEL.read_text().splitlines())
    return start, sorted((line for line in lines if "step" in line), key=lambda line: line["step"])


def cell(row: present.Row | None) -> str:
    """Speed of a step against AdamW, and in brackets its bytes and the stream's."""
    if row is None:
        return ""
    adamw = f"{present.number(row['to_adamw']['median'])}x"
    # Beside a stream of a few hundred KB a step over many small tensors is bound by calls, not by bytes.
    return adamw if row["elements"] < 1_000_000 else f"{adamw} ({row['gb_per_s']:.0f} of {row['stream_gb_per_s']:.0f})"
