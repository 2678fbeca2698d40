"""The pictures: of the search, differences to AdamW by rung and losses by learning rate; of the proof, differences."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from experiments import common
from reporting.runs import Run

MARKERS = ("o", "s", "D", "^")
COLORS = {
    "adamw": "black",
    "sign_adam_pp": "tab:red",
    "signum": "tab:purple",
    "signum_nesterov": "orchid",
    "lion": "tab:green",
    "adam_s": "tab:blue",
    "bcos": "tab:cyan",
    "lion_k_huber": "tab:olive",
    "lion_k_threshold": "yellowgreen",
    "ano": "gray",
    "laprop": "darkgray",
}


def draw(content: Run, path: Path) -> None:
    """Writes the picture of what was collected."""
    labels = _labels(content)
    height = max(4.0, 1.5 + 0.3 * len(labels))
    figure, (left, right) = common.pyplot().subplots(1, 2, figsize=(13, height), layout="constrained")
    _differences(left, content, labels)
    _rates(right, content)
    figure.suptitle(
        f"Stage 1, a search: {content['finished_runs']} of about {content['expected_runs']} runs "
        "(the seeds that choose are the seeds that are shown)"
    )
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial.png")
    figure.savefig(partial, dpi=110, metadata={"Software": None})
    os.replace(partial, path)
    common.pyplot().close(figure)


def draw_proof(content: Run, path: Path) -> None:
    """Every difference to AdamW of every part, seed by seed, with its interval."""
    rows = [
        (part["title"], entry)
        for part in content["parts"].values()
        for entry in part["contenders"].values()
        if "minus_adamw" in entry
    ]
    figure, axes = common.pyplot().subplots(figsize=(10, max(3.0, 1.5 + 0.35 * len(rows))), layout="constrained")
    axes.axvline(0, color="black", linewidth=1.2)
    axes.axvline(content["margin"], color="black", linewidth=0.8, linestyle="--")
    for row, (_, entry) in enumerate(rows):
        values, found = entry["minus_adamw_by_seed"].values(), entry["minus_adamw"]
        axes.plot(list(values), [row] * len(values), "o", color="C0", alpha=0.35, markersize=4)
        if found["low"] is not None:
            axes.plot([found["low"], found["high"]], [row, row], color="C0", linewidth=1.5)
        axes.plot([found["mean"]], [row], "D", color="C0", markersize=5)
    axes.set_yticks(range(len(rows)), [f"{title}: {entry['label']}" for title, entry in rows])
    axes.invert_yaxis()
    axes.set(
        title=f"Stage 2: {content['finished_runs']} of about {content['expected_runs']} runs",
        xlabel="last validation loss minus AdamW's, nats\n"
        "a rule whose whole interval lies left of the dashed line matches",
    )
    _save(figure, path)


def _labels(content: Run) -> dict[str, str]:
    """Candidates with a difference, those of later rungs first, the better ones first."""
    found: dict[str, str] = {}
    for rung in reversed(content["rungs"].values()):
        entries = [(key, entry) for key, entry in rung["candidates"].items() if "minus_adamw" in entry]
        for key, entry in sorted(entries, key=lambda item: item[1]["minus_adamw"]["mean"]):
            found.setdefault(key, entry["label"] + ("" if entry["competes"] else " (two moments)"))
    return found


def _differences(axes: Any, content: Run, labels: dict[str, str]) -> None:
    """Of both seeds, by rung."""
    axes.axvline(0, color="black", linewidth=1.2)
    for i, rung in enumerate(content["rungs"].values()):
        shown = False
        for row, key in enumerate(labels):
            values = rung["candidates"].get(key, {}).get("minus_adamw_by_seed", {}).values()
            if not values:
                continue
            color, y = f"C{i}", row + 0.18 * (i - 1)
            axes.plot([min(values), max(values)], [y, y], color=color, linewidth=1.5)
            label = None if shown else f"{rung['steps']:,} steps"
            axes.plot(list(values), [y] * len(values), MARKERS[i], color=color, markersize=5, label=label)
            shown = True
    axes.set_yticks(range(len(labels)), labels.values())
    axes.invert_yaxis()
    axes.set(title="Minus AdamW, seed by seed", xlabel="difference of the last validation loss, nats; below 0: better")
    if labels:
        axes.legend()


def _rates(axes: Any, content: Run) -> None:
    """The rules as they are, in the first rung."""
    rung = next(iter(content["rungs"].values()))
    rates: set[float] = set()
    lowest: list[float] = []
    for entry in rung["candidates"].values():
        points = sorted((float(lr), loss) for lr, loss in entry["search"].items() if loss is not None)
        points = [(lr, loss) for lr, loss in points if math.isfinite(loss)]
        if entry["changes"] or not points:
            continue
        style = "o-" if entry["competes"] else "o--"
        axes.plot(*zip(*points, strict=True), style, color=COLORS[entry["rule"]], markersize=4, label=entry["label"])
        rates.update(lr for lr, _ in points)
        lowest.append(min(loss for _, loss in points))
    axes.set(xscale="log", xlabel="learning rate", ylabel="last validation loss, nats")
    axes.set_title(f"Rules as they are, {rung['steps']:,} steps; dashed: two moments")
    axes.set_xticks(sorted(rates), [f"{lr:g}" for lr in sorted(rates)], rotation=60)
    axes.minorticks_off()
    if lowest:
        # What is far from the best leaves the picture, so that the best can be told apart.
        axes.set_ylim(min(lowest) - 0.05, max(lowest) + 0.3)
        axes.legend(fontsize=8)
