"""The pictures, from the JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.comm import formulas
from bench.comm.formulas import HOOKS

_COLORS = ("#9ca3af", "#6b7280", "#b45309", "#2563eb", "#7c3aed", "#059669")


def draw(folder: Path) -> None:
    """wire.png and convergence.png, of what is there."""
    import matplotlib

    matplotlib.use("Agg")
    for name, picture in (("wire", _wire), ("convergence", _convergence)):
        if (folder / f"{name}.json").exists():
            picture(json.loads((folder / f"{name}.json").read_text()), folder / f"{name}.png")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)


def _wire(report: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    timed = sorted({row["workers"] for row in report["times"]})[-1:]
    figure, axes = plt.subplots(
        1, 1 + len(timed), figsize=(6.5 * (1 + len(timed)), 4.2), squeeze=False, layout="constrained"
    )
    left = axes[0][0]
    workers = sorted({row["workers"] for row in report["wire"]})
    width = 0.8 / len(workers)
    shades = dict(zip(workers, ("#93c5fd", "#2563eb", "#1e3a8a"), strict=False))
    for i, hook in enumerate(HOOKS):
        for j, n in enumerate(workers):
            for row in (row for row in report["wire"] if (row["hook"], row["workers"]) == (hook, n)):
                at = i + (j - (len(workers) - 1) / 2) * width
                value = 8 * fmean(row["bytes"]) / row["parameters"]
                left.bar(at, value, width * 0.92, color=shades[n], label=f"{n} workers" if hook == "majority" else None)
                formula = 8 * sum(formulas.payload(hook, row["shapes"], n)) / row["parameters"]
                left.plot([at - width / 2, at + width / 2], [formula] * 2, color="black", linewidth=1.2)
                left.text(at, value * 1.08, f"{value:.3g}", ha="center", fontsize=7)
    left.set_yscale("log")
    left.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    left.yaxis.set_minor_formatter(NullFormatter())
    left.set_ylim(top=150)
    left.set_ylabel("bits per parameter that a worker sends a step")
    left.set_title("there and back, measured; line: formula, without headers", loc="left", fontsize=9)
    left.legend(frameon=False, fontsize=8)
    for axis, n in zip(axes[0][1:], timed, strict=True):
        rates = sorted({row["gbit"] for row in report["times"]}, key=lambda rate: rate or math.inf)
        width = 0.8 / len(rates)
        for j, rate in enumerate(rates):
            for i, hook in enumerate(HOOKS):
                for row in report["times"]:
                    if (row["hook"], row["workers"], row["gbit"]) == (hook, n, rate):
                        own = row["seconds"]
                        at = i + (j - (len(rates) - 1) / 2) * width
                        label = (f"{rate:g} Gbit/s" if rate else "no limit") if hook == "majority" else None
                        color = ("#fca5a5", "#dc2626", "#7f1d1d")[j % 3]
                        axis.bar(at, own["median"] * 1e3, width * 0.92, color=color, label=label)
                        axis.plot([at, at], [own["low"] * 1e3, own["high"] * 1e3], color="black", linewidth=0.8)
        axis.set_ylabel("milliseconds a step")
        axis.set_title(f"{n} workers on {report['machine']['cores']} cores, links shaped", loc="left", fontsize=9)
        axis.legend(frameon=False, fontsize=8)
    for axis in axes[0]:
        axis.set_xticks(range(len(HOOKS)), [label.replace(", ", ",\n") for label in HOOKS.values()], fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _convergence(report: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot as plt

    from bench.comm.methods import BY_KEY
    from reporting.runs import band

    figure, axes = plt.subplot_mosaic(
        [["left", "fails"], ["left", "right"]], figsize=(13, 5.2), height_ratios=(1, 2.2), layout="constrained"
    )
    left, fails, right = axes["left"], axes["fails"], axes["right"]
    every = report["problem"]["averaged"]
    for (key, entry), color in zip(report["methods"].items(), _COLORS, strict=False):
        steps = [every * (i + 1) for i in range(len(entry["train"][0]))]
        style = {
            "color": color,
            "label": entry["label"],
            "linestyle": "-" if BY_KEY[key].votes else "--",
        }
        band(left, steps, entry["train"], **style)
    lowest = min(min(map(min, entry["train"])) for entry in report["methods"].values())
    left.set_ylim(lowest - 0.05, lowest + 1.2)
    left.set_title(f"{report['workers']} honest workers", loc="left", fontsize=10)
    colors = dict(
        zip(("sign_adam_pp", "majority", "majority_momentum"), ("#6b7280", "#b45309", "#7c3aed"), strict=True)
    )
    for entry in report["attacks"].values():
        if entry["adversaries"] == 0 or any(len(line) < len(entry["train"][0]) for line in entry["train"]):
            continue
        steps = [every * (i + 1) for i in range(len(entry["train"][0]))]
        tenfold = entry["factor"] == -10
        label = f"{entry['label']}: {entry['adversaries']} of {report['workers_attacked']}" + ", x 10" * tenfold
        color = "#b91c1c" if tenfold else colors[entry["method"]]
        line = ("-", "--")[entry["adversaries"] - 1]
        band(fails if tenfold else right, steps, entry["train"], linestyle=line, label=label, color=color)
    # Both halves of one axis: thousands above, what learns below.
    fails.set_yscale("log")
    fails.axhline(math.log(256), color="black", linewidth=0.8)
    fails.text(
        0.99, math.log(256) * 1.2, "knows nothing", ha="right", fontsize=8, transform=fails.get_yaxis_transform()
    )
    fails.set_ylim(bottom=4)
    fails.set_title(f"adversaries among {report['workers_attacked']} workers", loc="left", fontsize=10)
    fails.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.15))
    fails.spines[["top", "right"]].set_visible(False)
    right.set_ylim(1.75, 3.6)
    for axis in (left, right):
        axis.set_xlabel("step")
        axis.set_ylabel("training loss, mean (95 % interval)")
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
