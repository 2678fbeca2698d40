"""The pictures of a comparison: losses, differences, learning rates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.convergence.methods import ADAMW, BY_KEY, FEW_BITS, PLUS, REFERENCES, same_in_fp32
from experiments.convergence.search import SEARCH_SEED, Comparison
from experiments.convergence.training import Job, Problem
from reporting.runs import Run, band

#: Their names, and what a page says where one cannot be seen.
PICTURES = {"curves": "losses", "differences": "paired differences", "rates": "learning rates"}
#: Of SignAdamPP.
BETAS = (0.9, 0.95)
COLORS = {
    ADAMW: "black",
    "adamw_beta2_0.999": "darkgray",
    "lion": "tab:green",
    PLUS: "tab:red",
    "signum": "tab:purple",
    "sign_adam": "tab:orange",
    "sign_adam_pp_adaptive0.5": "tab:brown",
    "sign_adam_pp_beta0.95": "salmon",
    FEW_BITS: "tab:blue",
    "sign_adam_pp_int4_stochastic": "tab:cyan",
    "sign_adam_pp_int8_stochastic": "tab:olive",
    "sign_adam_pp_fp32_stochastic": "firebrick",
    "sign_adam_pp_int2_nearest": "tab:gray",
    "sign_adam_pp_int2_nearest_fp32_weights": "navy",
    "sign_adam_pp_int2_split8": "mediumorchid",
    "sign_adam_pp_int2_split16": "goldenrod",
    "sign_adam_pp_int2_stochastic_beta0.95": "cornflowerblue",
}
CURVES = (
    (
        "Rules, in fp32",
        ADAMW,
        [ADAMW, "adamw_beta2_0.999", "lion", PLUS, "signum", "sign_adam", "sign_adam_pp_adaptive0.5"],
    ),
    (
        "Forms of storage of SignAdamPP",
        PLUS,
        [
            PLUS,
            FEW_BITS,
            "sign_adam_pp_int4_stochastic",
            "sign_adam_pp_int8_stochastic",
            "sign_adam_pp_int2_nearest",
            "sign_adam_pp_int2_split8",
            "sign_adam_pp_int2_split16",
        ],
    ),
)


def smooth(losses: Sequence[float], width: int) -> list[float]:
    """Means over `width` neighbours."""
    return [statistics.fmean(losses[i : i + width]) for i in range(len(losses) - width + 1)]


def curves(comparison: Comparison, problem: Problem, key: str) -> dict[int, list[float]]:
    """Training losses by seed, smoothed."""
    method = BY_KEY[key]
    if method not in problem.methods or (lr := comparison.best(problem, method)) is None:
        return {}
    jobs = [Job(problem, method, lr, seed) for seed in range(problem.seeds)]
    runs = {job.seed: run for job in jobs if (run := comparison.get(job)) is not None and run["finished"]}
    width = max(1, problem.steps // problem.average // 15) if problem.average <= 10 else 1
    return {seed: smooth(run["train"], width) for seed, run in runs.items()}


def draw(comparison: Comparison, problem: Problem, summary: dict[str, Run], folder: Path) -> None:
    """Write all pictures into a folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})
    drawn = (
        draw_curves(plt, comparison, problem, summary),
        draw_differences(plt, problem, summary),
        draw_rates(plt, problem, summary),
    )
    for name, figure in zip(PICTURES, drawn, strict=True):
        figure.savefig(folder / f"{problem.name}-{name}.png", dpi=130)
        plt.close(figure)


def draw_curves(plt: Any, comparison: Comparison, problem: Problem, summary: dict[str, Run]) -> Any:
    """Training losses, and below them their differences to a reference, seed by seed."""
    figure, grid = plt.subplots(2, 2, figsize=(12, 8), layout="constrained", sharex=True)
    for (title, reference, keys), (upper, lower) in zip(CURVES, grid.T, strict=True):
        base = curves(comparison, problem, reference)
        lowest: list[float] = []
        spread: list[float] = []
        for key in keys:
            lines = curves(comparison, problem, key)
            if key not in summary or not lines:
                continue
            length = len(next(iter(lines.values())))
            missing = problem.steps // problem.average - length
            steps = [(i + 1 + missing / 2) * problem.average for i in range(length)]
            values = list(lines.values())
            style = {"color": COLORS[key], "zorder": 3 if key == reference else 2}
            band(upper, steps, values, label=summary[key]["label"], **style)
            lowest += [min(line) for line in values]
            shared = [[a - b for a, b in zip(lines[s], base[s], strict=True)] for s in lines if s in base]
            if key == reference:
                lower.axhline(0, color=COLORS[key], linewidth=1.6)
            elif shared:
                band(lower, steps, shared, **style)
                settled = [statistics.fmean(c) for c in zip(*shared, strict=True)][length // 3 :]
                spread += [min(settled), max(settled)]
        if not lowest:
            continue
        if not problem.logarithmic:
            at = max(line[len(line) // 8] for line in base.values()) if base else max(lowest)
            upper.set_ylim(min(lowest) - 0.1, at + 0.1)
        else:
            upper.set_yscale("log")
        if spread:
            # The first steps differ by much more than the last ones, which matter.
            size = max(max(map(abs, spread)), 1e-3)
            lower.set_ylim(
                -1.3 * size if min(spread) < 0 else -0.4 * size, 1.3 * size if max(spread) > 0 else 0.4 * size
            )
        upper.set_title(title)
        upper.set_ylabel("training loss, nats" if upper is grid[0, 0] else "")
        lower.set_ylabel(f"minus {summary[reference]['label']}" if reference in summary else "")
        lower.set_xlabel("step")
        upper.legend(frameon=False, fontsize=9)
    figure.suptitle(f"{problem.title}\nmeans over {problem.seeds} seeds; bands: their 95 % confidence intervals")
    return figure


def draw_differences(plt: Any, problem: Problem, summary: dict[str, Run]) -> Any:
    """Every method's final validation loss against the two references."""
    keys = list(summary)
    figure, both = plt.subplots(1, 2, figsize=(12, 1.4 + 0.32 * len(keys)), layout="constrained", sharey=True)
    for axes, reference in zip(both, REFERENCES, strict=True):
        axes.axvline(0, color=COLORS[reference], linewidth=1.2)
        reach: list[float] = []
        for row, key in enumerate(keys):
            found = summary[key]["loss"].get(f"minus_{reference}")
            if found is None:
                continue
            color = "tab:blue" if BY_KEY[key].stored else "tab:red"
            if found["low"] is not None:
                axes.plot([found["low"], found["high"]], [row, row], color=color, linewidth=2, solid_capstyle="butt")
            axes.plot(found["mean"], row, "o", color=color, markersize=5)
            reach.append(found["mean"])
        axes.set_title(f"minus {summary[reference]['label']}, fp32" if reference in summary else "")
        axes.set_xlabel("difference of the final validation loss, nats; below 0 is better")
        if reach:
            # A wide interval that says little would otherwise squeeze all the others.
            size = max(max(*reach, 0) - min(*reach, 0), 1e-3)
            low, high = axes.get_xlim()
            axes.set_xlim(max(low, min(*reach, 0) - size), min(high, max(*reach, 0) + size))
    both[0].set_yticks(range(len(keys)), [summary[key]["label"] for key in keys])
    both[0].invert_yaxis()
    figure.suptitle(f"{problem.title}\npaired over {problem.seeds} seeds, with 95 % confidence intervals")
    return figure


def draw_rates(plt: Any, problem: Problem, summary: dict[str, Run]) -> Any:
    """The searches for a learning rate, of rules and of forms, and the losses by beta where there are several."""
    compared = any(same_in_fp32(beta) in summary for beta in BETAS[1:])
    panels = 3 if compared else 2
    figure, (rules, forms, *rest) = plt.subplots(1, panels, figsize=(5 * panels, 5), layout="constrained")
    for axes, stored in ((rules, False), (forms, True)):
        lowest, starts = [], []
        rates: set[float] = set()
        for key, entry in summary.items():
            points = sorted((float(lr), loss) for lr, loss in entry["search"].items() if math.isfinite(loss))
            if points and (BY_KEY[key].stored == stored or key == PLUS):
                axes.plot(*zip(*points, strict=True), "o-", color=COLORS[key], markersize=4, label=entry["label"])
                rates.update(lr for lr, _ in points)
                lowest.append(min(loss for _, loss in points))
                starts.append(max(loss for _, loss in points))
        axes.set(xscale="log", xlabel="learning rate")
        axes.set_xticks(sorted(rates), [f"{lr:g}" for lr in sorted(rates)], rotation=60)
        axes.minorticks_off()
        if lowest:
            if problem.logarithmic:
                axes.set_yscale("log")
            else:
                # What is far from the best leaves the picture, so that the best can be told apart.
                axes.set_ylim(min(lowest) - 0.05, min(max(starts), min(lowest) + 1) + 0.05)
            axes.legend(frameon=False, fontsize=8)
    rules.set(title=f"Rules in fp32, seed {SEARCH_SEED}", ylabel="final validation loss, nats")
    forms.set_title(f"Forms of storage, seed {SEARCH_SEED}")
    for axes in rest:
        _draw_betas(axes, summary)
    figure.suptitle(problem.title)
    return figure


def _draw_betas(axes: Any, summary: dict[str, Run]) -> None:
    """The losses by beta, in fp32 and in 2 bits."""
    for few, label, color in ((False, "fp32", "tab:red"), (True, "int2, bf16 stochastic", "tab:blue")):
        pairs: list[tuple[float, float]] = []
        for beta in BETAS:
            key = (FEW_BITS + (f"_beta{beta:g}" if beta != 0.9 else "")) if few else same_in_fp32(beta)
            for value in summary[key]["loss"]["by_seed"].values() if key in summary else ():
                if value is not None and math.isfinite(value):
                    pairs.append((-math.log10(1 - beta), value))
        if pairs:
            axes.plot(*zip(*pairs, strict=True), "o", color=color, markersize=4, alpha=0.5)
            xs = sorted({x for x, _ in pairs})
            means = [statistics.fmean(y for x, y in pairs if x == at) for at in xs]
            axes.plot(xs, means, "-", color=color, label=label)
    axes.set_xticks([-math.log10(1 - beta) for beta in BETAS], [f"{beta:g}" for beta in BETAS])
    axes.set(title="SignAdamPP by beta, each at its best rate", xlabel="beta")
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)
