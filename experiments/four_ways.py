"""The sign and the variance adaptation, apart and together, on real trainings: [BH], Sec. 6.

Four methods are the combinations of two parts: M-SGD (neither), M-SSD (the sign), M-SVAG (variance adaptation), Adam
(both). beta = 0.9; Adam has (0.9, 0.999). Problems: experiments/training.py. As in [BH], Sec. A.2: the step size is
constant, and on the LSTM a tenth from 125/200 of the steps on; the best step size is the one with the best test
accuracy within the fixed number of steps; 10 seeds with it.

Measured, with the measure set down before the runs:

- Do the methods cluster by the sign? The distance of two methods is the mean over training of the absolute difference
  between their seed-averaged curves (of the log of the training loss; of the test error). Four methods fall into two
  pairs in three ways: by sign {Adam, M-SSD} {M-SGD, M-SVAG}, by variance adaptation {Adam, M-SVAG} {M-SSD, M-SGD}, or
  crosswise {Adam, M-SGD} {M-SSD, M-SVAG}. A way's gap is the mean of its four distances across the pairs minus the mean
  of its two distances within. They cluster by sign if the 95 % bootstrap interval of that gap (4000 draws of the seeds,
  the same seeds for all methods) is above 0 and this gap is the largest of the three in at least 95 % of the draws.
- "Variance adaptation never hurts": Adam minus M-SSD and M-SVAG minus M-SGD, paired by seed, in the last training
  loss (its log), the best test error and the last test loss. It hurts where an interval lies above 0.
- "The use of the sign depends on the problem": M-SSD minus M-SGD and Adam minus M-SVAG likewise.

The plan: per problem 4 methods x (9 to 15 step sizes x 2 or 3 seeds + 10 seeds), about 170 runs of 1.0 s on
"four_ways_digits", 125 of 1.6 s on each text: 10 minutes on one core. Cut to fit that: a CNN on 8 x 8 digits and an
LSTM of 64 units over 400 steps stand for the paper's four problems, and a small GPT is new.

python -m experiments.four_ways --workers 2     run what is missing, then collect
python -m experiments.four_ways --collect       JSON and picture from the runs so far
python -m experiments.four_ways --quick         everything once in small: a test of this program
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from experiments import common, training
from experiments.training import DIGITS, GPT_TEXT, LSTM_TEXT, Method, Plan, Problem, Store, Study, rate
from reporting.present import between, markdown, plus_minus
from reporting.runs import Run, band

DROP = ((125 / 200, 0.1),)
DRAWS = 4000


def _problem(base: Problem, **changes: Any) -> Problem:
    """With two more points in its grid, one at either end."""
    first = tuple(rate(training.index_of(lr) - 1) for lr in base.first_rates)
    return replace(base, name=f"four_ways_{base.name}", points=9, first_rates=first, **changes)


PROBLEMS = (
    _problem(DIGITS, search_seeds=3),
    _problem(LSTM_TEXT, schedule=DROP),
    _problem(GPT_TEXT),
)
METHODS = (
    Method("m_sgd", "M-SGD", "MSGD", {"beta": 0.9}, signed=False),
    Method("adam", "Adam", "Adam"),
    Method("m_ssd", "M-SSD", "Signum", {"beta": 0.9}),
    Method("m_svag", "M-SVAG", "MSVAG", {"beta": 0.9}, signed=False),
)
TITLES = {f"four_ways_{name}": text for name, text in (("digits", "digits"), ("lstm", "the LSTM"), ("gpt", "the GPT"))}
KEYS = tuple(method.key for method in METHODS)
PAIRS = tuple(itertools.combinations(range(len(KEYS)), 2))
COLORS = {"m_sgd": "#08519c", "m_svag": "#4aa3df", "m_ssd": "#a50f15", "adam": "#f58a42"}

#: The three ways of making two pairs of four.
PAIRINGS = {
    "by sign": (("adam", "m_ssd"), ("m_sgd", "m_svag")),
    "by variance adaptation": (("adam", "m_svag"), ("m_sgd", "m_ssd")),
    "crosswise": (("adam", "m_sgd"), ("m_ssd", "m_svag")),
}
CONTRASTS = {
    "Adam minus M-SSD": ("adam", "m_ssd"),
    "M-SVAG minus M-SGD": ("m_svag", "m_sgd"),
    "M-SSD minus M-SGD": ("m_ssd", "m_sgd"),
    "Adam minus M-SVAG": ("adam", "m_svag"),
}
ADAPTATION, SIGN = tuple(CONTRASTS)[:2], tuple(CONTRASTS)[2:]


def plan(stores: Sequence[Store]) -> Plan:
    return training.plan(stores, METHODS)


# The measure


def distances(means: Tensor) -> Tensor:
    """Of every two of four curves (..., 4, points): the mean absolute difference, (..., 6), in the order of `PAIRS`."""
    return torch.stack([(means[..., a, :] - means[..., b, :]).abs().mean(-1) for a, b in PAIRS], -1)


def gaps(between: Tensor) -> Tensor:
    """Of every way to make two pairs: the mean distance across them minus the mean distance within, (..., 3)."""
    result = []
    for pairs in PAIRINGS.values():
        within = [PAIRS.index(tuple(sorted(map(KEYS.index, pair)))) for pair in pairs]
        across = [i for i in range(len(PAIRS)) if i not in within]
        result.append(between[..., across].mean(-1) - between[..., within].mean(-1))
    return torch.stack(result, -1)


def clusters(curves: Tensor, draws: int = DRAWS) -> Run:
    """Of curves (methods as in `KEYS`, seeds, points): the gaps with their bootstrap intervals over seeds."""
    curves = curves.double()
    found = gaps(distances(curves.mean(1))).tolist()
    seeds = curves.shape[1]
    chosen = torch.randint(seeds, (draws, seeds), generator=torch.Generator().manual_seed(0))
    weights = torch.nn.functional.one_hot(chosen, seeds).double().mean(1)
    drawn = gaps(distances(torch.einsum("ds,msp->dmp", weights, curves)))
    low, high = drawn.quantile(torch.tensor([0.025, 0.975]).double(), dim=0).tolist()
    largest = torch.nn.functional.one_hot(drawn.argmax(-1), len(PAIRINGS)).double().mean(0).tolist()
    result: Run = {
        "distances": {
            f"{KEYS[a]}, {KEYS[b]}": distance
            for (a, b), distance in zip(PAIRS, distances(curves.mean(1)).tolist(), strict=True)
        },
        "gaps": {
            way: {"mean": found[i], "low": low[i], "high": high[i], "largest_in": largest[i]}
            for i, way in enumerate(PAIRINGS)
        },
    }
    by_sign = result["gaps"]["by sign"]
    result["by_sign"] = by_sign["low"] > 0 and by_sign["largest_in"] >= 0.95
    result["nearest"] = max(PAIRINGS, key=lambda way: result["gaps"][way]["mean"])
    return result


def collect(stores: Sequence[Store]) -> Run:
    result: Run = {}
    for store in stores:
        got = {method.key: training.finished(store, method) for method in METHODS}
        entry: Run = {
            "methods": {
                method.key: described
                for method in METHODS
                if (described := training.describe(store, method, curves=True)) is not None
            }
        }
        runs = {key: value[1] for key, value in got.items() if value is not None}
        seeds = sorted(
            set.intersection(*(set(by_seed) for by_seed in runs.values())) if len(runs) == len(METHODS) else ()
        )
        if seeds and all(runs[key][seed]["finished"] for key in runs for seed in seeds):
            curves = {
                "log_train": lambda run: [math.log(max(loss, 1e-12)) for loss in run["train"]],
                "test_error": lambda run: [error for _, _, error in run["validation"]],
            }
            entry["clusters"] = {
                what: clusters(torch.tensor([[curve(runs[key][seed]) for seed in seeds] for key in KEYS]))
                for what, curve in curves.items()
            }
        entry["contrasts"] = {
            name: {
                metric: training.judged(
                    training.difference(
                        training.values_of(runs[ours], metric), training.values_of(runs[theirs], metric)
                    )
                )
                for metric in training.METRICS
            }
            for name, (ours, theirs) in CONTRASTS.items()
            if ours in runs and theirs in runs
        }
        result[store.problem.name] = entry
    return {"draws": DRAWS, "by_problem": result}


# The page

CURVES = {"log_train": "log training loss", "test_error": "test error"}


def section(result: Run) -> str:
    first = next(iter(result["problems"].values()))
    return "\n\n".join(
        [
            "## Sign and variance adaptation on real trainings",
            "[BH], Sec. 6: M-SGD, Adam, M-SSD (Signum) and M-SVAG, each at the best, by test error, of at least "
            f"{first['points']} step sizes, {first['seeds']} seeds. The measure of clusters was set down before the "
            "runs: of each way to make two pairs of the four methods, its gap is the mean distance of their "
            "seed-averaged curves across the pairs minus that within. In brackets 95 % intervals: of gaps by "
            "bootstrap over seeds, of differences by Student's t, paired by seed.",
            "![losses, errors and gaps](results/four_ways.png)",
            common.judged(_claims(result)),
            _gaps(result),
            _contrasts(result),
            _table(result),
            _rates(result),
            "Nothing is said beyond these three small problems and short trainings. The intervals are not corrected "
            "for their number: of 18 about one lies off 0 by chance. They cover the seeds, not the choice of a step "
            "size.",
            training.cost(result),
        ]
    )


def _sides(result: Run, names: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Below 0, above 0 and open: of these contrasts on each problem, the metrics whose interval lies there."""
    sides: dict[str, dict[str, list[str]]] = {"lower": {}, "higher": {}, "open": {}}
    for problem, entry in result["by_problem"].items():
        for name in names:
            for metric, value in entry["contrasts"].get(name, {}).items():
                side = sides["open" if value is None else value["verdict"]]
                where = f"{name} on {TITLES[problem]}"
                side.setdefault(where, []).append(METRIC_NAMES[metric])
    return sides


def _size(side: dict[str, list[str]]) -> int:
    return sum(map(len, side.values()))


def _list(side: dict[str, list[str]]) -> str:
    whole = len(METRIC_NAMES)
    return "; ".join(
        f"{where} ({'all three measures' if len(metrics) == whole else ', '.join(metrics)})"
        for where, metrics in side.items()
    )


def _claims(result: Run) -> list[list[str]]:
    found = {
        f"{TITLES[problem]}, {CURVES[what]}": one
        for problem, entry in result["by_problem"].items()
        for what, one in entry.get("clusters", {}).items()
    }
    clustered = [name for name, one in found.items() if one["by_sign"]]
    others = [f"{name} (nearest {one['nearest']})" for name, one in found.items() if not one["by_sign"]]
    adaptation, sign = _sides(result, ADAPTATION), _sides(result, SIGN)
    total = sum(map(_size, adaptation.values()))
    return [
        [
            "the methods cluster into sign-based and not, but for a character LSTM",
            "the gap by sign is above 0, and the largest of the three in 95 % of draws",
            f"in {len(clustered)} of {len(found)} sets of curves: {'; '.join(clustered) or 'none'}"
            + (f". Not in: {'; '.join(others)}" if others else ""),
            "yes" if all("LSTM" in name for name in others) else "in part" if clustered else "**no**",
        ],
        [
            "variance adaptation never hurts its base method",
            "no interval of (adapted minus base) above 0",
            f"above 0 in {_size(adaptation['higher'])} of {total}: {_list(adaptation['higher']) or 'none'}",
            "**no**" if adaptation["higher"] else "yes",
        ],
        [
            "... and often helps it",
            "intervals below 0",
            f"below 0 in {_size(adaptation['lower'])} of {total}: {_list(adaptation['lower']) or 'none'}",
            "yes" if adaptation["lower"] else "**no**",
        ],
        [
            "the use of the sign depends on the problem",
            "intervals of (with sign minus without) on both sides of 0",
            f"below 0 in {_size(sign['lower'])} of {total}: {_list(sign['lower']) or 'none'}. "
            f"Above 0 in {_size(sign['higher'])}: {_list(sign['higher']) or 'none'}",
            "yes" if sign["lower"] and sign["higher"] else "**no**",
        ],
    ]


METRIC_NAMES = {"best_error": "best test error", "log_train": "log training loss", "last_loss": "last test loss"}


def _gaps(result: Run) -> str:
    rows = [
        [
            f"{TITLES[problem]}, {CURVES[what]}",
            *(
                f"{between(gap, 1 if what == 'log_train' else 100)}, {gap['largest_in']:.0%}"
                for gap in one["gaps"].values()
            ),
        ]
        for problem, entry in result["by_problem"].items()
        for what, one in entry.get("clusters", {}).items()
    ]
    return markdown(["gap (nats or points of %), largest in so many draws", *PAIRINGS], rows)


def _contrasts(result: Run) -> str:
    rows = [
        [
            name,
            TITLES[problem],
            between(entry["contrasts"][name]["log_train"]),
            between(entry["contrasts"][name]["last_loss"], form="+.3f"),
            between(entry["contrasts"][name]["best_error"], 100),
        ]
        for name in CONTRASTS
        for problem, entry in result["by_problem"].items()
        if name in entry["contrasts"]
    ]
    return markdown(["below 0 the first is better", "", "log training loss", "last test loss", "test error, %"], rows)


def _table(result: Run) -> str:
    rows = [
        [
            TITLES[problem],
            method["label"],
            f"{method['lr']:g}",
            plus_minus(method["log_train"]),
            plus_minus(method["last_loss"], digits=3),
            plus_minus(method["best_error"], 100),
            str(method["diverged"]),
        ]
        for problem, entry in result["by_problem"].items()
        for method in entry["methods"].values()
    ]
    header = ["", "", "step size", "log training loss", "last test loss", "best test error, %", "diverged seeds"]
    return markdown(header, rows)


def _rates(result: Run) -> str:
    """The best step sizes beside the paper's order."""
    rows = []
    for problem, entry in result["by_problem"].items():
        if len(entry["methods"]) == len(METHODS):
            lr = {key: method["lr"] for key, method in entry["methods"].items()}
            order = lr["m_ssd"] < lr["adam"] < lr["m_sgd"] <= lr["m_svag"]
            rows.append(f"{TITLES[problem]} {'yes' if order else 'no'}")
    return f"[BH]'s best step sizes are in the order M-SSD < Adam < M-SGD <= M-SVAG. Here: {'; '.join(rows)}."


# The picture


def draw(result: Run, plt: Any) -> Any:
    names = list(result["by_problem"])
    figure, grid = plt.subplots(
        len(names), 4, figsize=(19, 4.2 * len(names)), layout="constrained", squeeze=False, width_ratios=(1, 1, 1, 0.9)
    )
    for row, name in zip(grid, names, strict=True):
        entry, settings = result["by_problem"][name], result["problems"][name]
        for axes, what, label in zip(
            row,
            ("train", "test_loss", "test_error"),
            ("training loss, nats", "test loss, nats", "test error, %"),
            strict=False,
        ):
            for key, method in entry["methods"].items():
                lines = [[value * (100 if what == "test_error" else 1) for value in c] for c in method["curves"][what]]
                if lines:
                    steps = [(i + 1) * settings["steps_between_evaluations"] for i in range(len(lines[0]))]
                    shown = f"{method['label']}, {method['lr']:g}"
                    band(axes, steps, lines, color=COLORS[key], label=shown)
            axes.set(xlabel="step", title=label)
            axes.set_yscale("log")
        row[0].set_ylabel(settings["title"])
        row[0].legend(frameon=False, fontsize=9)
        _draw_gaps(row[3], entry.get("clusters", {}))
    figure.suptitle("Sign and variance adaptation: means of 10 seeds at the best step size, 95 % intervals")
    return figure


def _draw_gaps(axes: Any, found: Run) -> None:
    axes.axhline(0, color="black", linewidth=1)
    for shift, (what, color) in enumerate((("log_train", "black"), ("test_error", "tab:gray"))):
        if what not in found:
            continue
        gaps_found = found[what]["gaps"]
        # Errors and logs have other units: both in units of the largest gap.
        unit = max(abs(gap["mean"]) for gap in gaps_found.values()) or 1.0
        for x, gap in enumerate(gaps_found.values()):
            at = x + 0.2 * shift - 0.1
            axes.plot([at, at], [gap["low"] / unit, gap["high"] / unit], color=color, linewidth=2)
            axes.plot(at, gap["mean"] / unit, "o", color=color, label=what.replace("_", " ") if x == 0 else None)
    axes.set_xticks(range(len(PAIRINGS)), [way.replace(" adaptation", "\nadaptation") for way in PAIRINGS])
    axes.set_title("distance across minus within (scaled)")
    axes.legend(frameon=False, fontsize=9)


STUDY = Study("four_ways", PROBLEMS, plan, collect, draw)

if __name__ == "__main__":
    sys.exit(training.main("four_ways", __doc__))
