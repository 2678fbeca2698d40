"""What each part of signADAM++ contributes: the ablation that [SA] lacks, beside its Tables 2 and 3.

Eight methods are all the combinations of three parts: the sign (or the gradient's own magnitude), the gate
`|g| > 5e-4` (or none), momentum 0.9 (or none). Two of them are the method's two forms: the paper's, with all three,
and the released code's, which never applies its momentum. Then the threshold over decades; [SA]'s adaptive threshold,
`alpha` times a running deviation (Sec. 6.3); a threshold steered so that a given share of the entries passes; and
Signum, SignAdam and Adam. Of the adaptive threshold two forms more: the one that uses the last step's deviation, which
reads the gradient once, and signADAM++-AW, its best in Table 3, which is the adaptive threshold with decoupled weight
decay, beside AdamW and beside the same without a threshold. Their decay is 0.1, as in experiments/convergence.

Problems: experiments/training.py. The step size falls to a tenth at 1/2 and to a hundredth at 5/6 of the steps, as
[SA]'s does at epochs 150 and 250 of 300. Reported for each method: steps until the test error reaches a tolerance
(Table 2), the best test error (Table 3), the last losses. A part's effect is a difference paired by seed between two
methods that differ in this part alone, each at its own step size; "main effect" is its average over the four pairs.
The threshold "chosen" of a family is the one with the best score in the search, whose seeds enter no result.

The plan: 34 methods x (7 to 13 step sizes by 2 seeds, and 10 seeds), about 830 runs of 1.1 s on "digits", as many of
2.0 s and 2.5 s on the texts: 75 minutes on one core. Cut to fit that: small models and few steps, two seeds in a
search, no weight decay but in signADAM++-AW and what it is compared with ([SA] has 5e-4: over these few steps it moves
a weight by less than a thousandth), the gate without sign and the released form at 5e-4 only. A search on the texts was
to have one seed; as Signum's result on the LSTM differed by up to 6 points between seeds, every search was given two
(Signum's step size stayed what it was).

python -m experiments.ablation --workers 2      run what is missing, then collect
python -m experiments.ablation --collect        JSON and picture from the runs so far
python -m experiments.ablation --quick          everything once in small: a test of this program
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from experiments import common, training
from experiments.training import DIGITS, GPT_TEXT, LSTM_TEXT, Method, Plan, Store, Study
from reporting.present import between, markdown, plus_minus
from reporting.runs import Run, interval

CODE_ALPHA = 5e-4  # the released code's threshold
SCHEDULE = ((1 / 2, 0.1), (5 / 6, 0.01))
PROBLEMS = tuple(replace(problem, schedule=SCHEDULE) for problem in (DIGITS, LSTM_TEXT, GPT_TEXT))

PARTS = ("sign", "gate", "momentum")


def _cell(sign: bool, gate: bool, momentum: bool) -> Method:
    """One of the eight combinations."""
    key = "_".join(part if there else f"no{part}" for part, there in zip(PARTS, (sign, gate, momentum), strict=True))
    label = f"{'sign' if sign else 'magnitude'}, {'gate' if gate else 'no gate'}, {'' if momentum else 'no '}momentum"
    known = {(True, True, True): "signADAM++", (True, True, False): "its code", (True, False, False): "SIGN-SGD"}
    if (sign, gate, momentum) in known:
        label += f" ({known[sign, gate, momentum]})"
    alpha = CODE_ALPHA if gate else 0.0
    if sign and momentum:
        return Method(key, label, "SignAdamPP", {"alpha": alpha}, measured=True)
    if sign:
        return Method(key, label, "SignSGD", {"alpha": alpha}, measured=gate)
    beta = 0.9 if momentum else 0.0
    if gate:
        return Method(key, label, "GatedMomentum", {"beta": beta, "alpha": alpha}, signed=False)
    return Method(key, label, "MSGD", {"beta": beta}, signed=False)


CELLS = {
    (sign, gate, momentum): _cell(sign, gate, momentum)
    for sign in (True, False)
    for gate in (True, False)
    for momentum in (True, False)
}
PAPER, RELEASED, UNGATED = CELLS[True, True, True], CELLS[True, True, False], CELLS[True, False, True]
FIXED = {
    0.0: UNGATED,
    CODE_ALPHA: PAPER,
    **{
        alpha: Method(f"fixed{alpha:g}", f"fixed threshold {alpha:g}", "SignAdamPP", {"alpha": alpha}, measured=True)
        for alpha in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    },
}
DECAY = {"weight_decay": 0.1}  # decoupled, as is the package's default


def _following(key: str, label: str, confidence: str = "adaptive", **options: Any) -> dict[float, Method]:
    """Thresholds that follow the gradient, by their number of deviations."""
    return {
        alpha: Method(
            f"{key}{alpha:g}",
            f"{label}, {alpha:g} deviations",
            "SignAdamPP",
            {"confidence": confidence, "alpha": alpha, **options},
            measured=True,
        )
        for alpha in (0.25, 0.5, 1.0, 2.0)
    }


ADAPTIVE = _following("adaptive", "adaptive threshold")
DELAYED = _following("delayed", "adaptive threshold of the last step", "adaptive_delayed")
DECAYED = _following("aw", "signADAM++-AW", **DECAY)
STEERED = {
    target: Method(
        f"sparsity{target:g}",
        f"threshold steered to pass {100 * target:g} %",
        "SignAdamPP",
        {"confidence": "sparsity", "target": target},
        measured=True,
    )
    for target in (0.3, 0.1, 0.03)
}
SIGNUM = Method("signum", "Signum", "Signum", {"beta": 0.9})
SIGN_ADAM = Method("sign_adam", "SignAdam", "SignAdam", measured=True)
ADAM = Method("adam", "Adam", "Adam")
ADAMW = Method("adamw", "AdamW", "AdamW", DECAY)
UNGATED_DECAYED = Method(
    "ungated_aw", "sign, no gate, momentum, decoupled decay", "SignAdamPP", {"alpha": 0.0, **DECAY}
)
BASELINES = (SIGNUM, SIGN_ADAM, ADAM, ADAMW, UNGATED_DECAYED)
FAMILIES = {"fixed": FIXED, "adaptive": ADAPTIVE, "delayed": DELAYED, "sparsity": STEERED, "decayed": DECAYED}
METHODS = tuple(
    {
        method.key: method
        for methods in (CELLS.values(), BASELINES, *(family.values() for family in FAMILIES.values()))
        for method in methods
    }.values()
)


def rivals(family: str) -> tuple[Method, Method]:
    """What a family of thresholds is compared with: the same without a threshold, and Adam, both with its decay."""
    return (UNGATED_DECAYED, ADAMW) if family == "decayed" else (UNGATED, ADAM)


def plan(stores: Sequence[Store]) -> Plan:
    return training.plan(stores, METHODS)


# What came of it


def effects(store: Store) -> Run:
    """Of each part, with minus without: in its four pairs and on average over them, by metric; below 0 it helps."""
    results: Run = {}
    for metric in training.METRICS:
        values = {}
        for cell, method in CELLS.items():
            got = training.finished(store, method)
            if got is not None:
                values[cell] = training.values_of(got[1], metric)
        if len(values) < len(CELLS):
            continue
        for i, part in enumerate(PARTS):
            pairs = {}
            by_seed: list[dict[int, float]] = []
            for cell in CELLS:
                if not cell[i]:
                    continue
                without = (*cell[:i], False, *cell[i + 1 :])
                others = ", ".join(text for j, text in enumerate(training_words(cell)) if j != i)
                pairs[others] = training.difference(values[cell], values[without])
                by_seed.append({seed: values[cell][seed] - values[without][seed] for seed in values[cell]})
            seeds = set.intersection(*map(set, by_seed))
            means = [sum(pair[seed] for pair in by_seed) / len(by_seed) for seed in sorted(seeds)]
            main = interval(means) if means and all(map(math.isfinite, means)) else None
            results.setdefault(part, {})[metric] = {"main": main, **pairs}
    return results


def training_words(cell: tuple[bool, bool, bool]) -> list[str]:
    sign, gate, momentum = cell
    return ["sign" if sign else "magnitude", "gate" if gate else "no gate", "momentum" if momentum else "no momentum"]


def chosen(store: Store, family: str) -> float | None:
    """The threshold with the best score in the search; None while one is missing."""
    scores = {}
    for value, method in FAMILIES[family].items():
        if method.made_by is None:
            return None
        found = training.search(store, method)
        if found.best is None:
            return None
        scores[value] = found.scores[found.best]
    return min(scores, key=lambda value: scores[value])


def comparisons(store: Store) -> Run:
    """Pairs of methods, paired by seed: the first minus the second."""
    pairs = {
        "paper_minus_released": (PAPER, RELEASED),
        "paper_minus_adam": (PAPER, ADAM),
        "paper_minus_signum": (PAPER, SIGNUM),
        "paper_minus_sign_sgd": (PAPER, CELLS[True, False, False]),
        "paper_minus_sign_adam": (PAPER, SIGN_ADAM),
        "ungated_minus_adam": (UNGATED, ADAM),
        "sign_adam_minus_signum": (SIGN_ADAM, SIGNUM),
        "sign_adam_minus_adam": (SIGN_ADAM, ADAM),
    }
    best = {family: value for family in FAMILIES if (value := chosen(store, family)) is not None}
    for family, value in best.items():
        for name, rival in zip(("ungated", "adam"), rivals(family), strict=True):
            pairs[f"{family}_minus_{name}"] = (FAMILIES[family][value], rival)
    if "adaptive" in best:
        pairs["delayed_minus_adaptive"] = (DELAYED[best["adaptive"]], ADAPTIVE[best["adaptive"]])
    if {"adaptive", "decayed"} <= best.keys():
        pairs["decayed_minus_adaptive"] = (DECAYED[best["decayed"]], ADAPTIVE[best["adaptive"]])
    result: Run = {}
    for key, (ours, theirs) in pairs.items():
        left, right = training.finished(store, ours), training.finished(store, theirs)
        if left is None or right is None:
            continue
        entry: Run = {"first": ours.key, "second": theirs.key}
        for metric in training.METRICS:
            first, second = (training.values_of(side[1], metric) for side in (left, right))
            entry[metric] = training.judged(training.difference(first, second))
        result[key] = entry
    return result


def collect(stores: Sequence[Store]) -> Run:
    result: Run = {}
    for store in stores:
        described = {method.key: training.describe(store, method) for method in METHODS}
        gated = {}
        for method in METHODS:
            got = training.finished(store, method)
            if got is not None and method.measured and method is not SIGN_ADAM:
                gated[method.key] = [share_gated(run) for run in got[1].values()]
        result[store.problem.name] = {
            "methods": {key: entry for key, entry in described.items() if entry is not None},
            "effects": effects(store),
            "chosen": {family: chosen(store, family) for family in FAMILIES},
            "comparisons": comparisons(store),
            "gated": {key: interval(values) for key, values in gated.items()},
        }
    return {"by_problem": result}


def share_gated(run: Run) -> float:
    """The share of all entries of all steps that the gate dropped."""
    total = sum(run["sizes"].values())
    shares = (run["sizes"][name] * sum(run["gated"][name]) / len(run["gated"][name]) for name in run["sizes"])
    return float(sum(shares) / total)


# The page


def section(result: Run) -> str:
    first = next(iter(result["problems"].values()))
    tolerances = ", ".join(
        f"{settings['title']} {100 * settings['tolerance']:g} %" for settings in result["problems"].values()
    )
    return "\n\n".join(
        [
            "## signADAM++ taken apart",
            f"The ablation that [SA] lacks: sign, gate (|g| > {CODE_ALPHA:g}) and momentum (0.9), each there or not, "
            f"then the kinds and sizes of the threshold; every method at the best of at least {first['points']} step "
            f"sizes, {first['seeds']} seeds, [SA]'s schedule. Only signADAM++-AW and what it is compared with have "
            "weight decay, 0.1 and decoupled, where [SA] has 5e-4 for all. Differences are paired by seed, in brackets "
            "95 % intervals; below 0 the first is better.",
            "![errors, effects of the parts, thresholds](results/ablation.png)",
            common.judged(_claims(result)),
            _in_short(result),
            "What each part does, averaged over the four pairs that differ in it alone (with minus without):",
            _effects(result),
            "Single pairs:",
            _comparisons(result),
            f"As [SA]'s Tables 2 and 3. Steps: the median over seeds until the test error is within the tolerance "
            f'({tolerances}), with the interval from the order statistics (at least 95 %); "-" where fewer than half '
            "of the seeds got there.",
            _table(result),
            "The effects at a fixed threshold are those of 5e-4 on these models: their gradients' size decides what "
            "it drops, and the third column of pictures shows it. Nothing is said beyond these three small problems "
            "and short trainings; the intervals are not corrected for their number, and cover the seeds, not the "
            "choice of a step size.",
            training.cost(result),
        ]
    )


def _titles(result: Run) -> dict[str, str]:
    return {name: settings["title"] for name, settings in result["problems"].items()}


def _over_problems(result: Run, pair: str, metric: str) -> tuple[str, list[str]]:
    """A comparison on every problem, as text, and its verdicts."""
    texts, verdicts = [], []
    scale = 100 if metric == "best_error" else 1
    for name, entry in result["by_problem"].items():
        value = entry["comparisons"].get(pair, {}).get(metric)
        if value is not None:
            texts.append(f"{_titles(result)[name]} {between(value, scale)}")
            verdicts.append(value["verdict"])
    return "; ".join(texts) or NOT_RUN, verdicts


#: In place of a verdict.
NOT_RUN = "not run yet"


def count_of(verdicts: Sequence[str], wanted: str) -> str:
    """Whether all, some or none of the verdicts are the wanted one."""
    hits = sum(verdict == wanted for verdict in verdicts)
    if not verdicts:
        return NOT_RUN
    return "yes" if hits == len(verdicts) else f"on {hits} of {len(verdicts)}" if hits else "**no**"


def _claims(result: Run) -> list[list[str]]:
    rows = []
    for other, pair in (
        ("Adam", "paper_minus_adam"),
        ("Signum", "paper_minus_signum"),
        ("SIGN-SGD", "paper_minus_sign_sgd"),
        ("signADAM", "paper_minus_sign_adam"),
    ):
        text, verdicts = _over_problems(result, pair, "log_train")
        rows.append(
            [
                f"signADAM++ ends with a lower training loss than {other}",
                "log training loss, threshold 5e-4, below 0",
                text,
                count_of(verdicts, "lower"),
            ]
        )
    text, verdicts = _over_problems(result, "adaptive_minus_adam", "log_train")
    rows.append(
        [
            "with the adaptive threshold it ends with a lower training loss than Adam",
            "log training loss, deviations chosen in the search: below 0",
            text,
            count_of(verdicts, "lower"),
        ]
    )
    text, verdicts = _over_problems(result, "sign_adam_minus_signum", "best_error")
    rows.append(["signADAM behaves like Signum", "best test error, points: 0 inside", text, count_of(verdicts, "open")])
    text, verdicts = _over_problems(result, "adaptive_minus_adam", "best_error")
    rows.append(
        [
            "with the adaptive threshold it ends with a lower test error than Adam (Table 3: with decoupled decay)",
            "best test error, points, deviations chosen in the search: below 0",
            text,
            count_of(verdicts, "lower"),
        ]
    )
    text, verdicts = _over_problems(result, "decayed_minus_adam", "best_error")
    rows.append(
        [
            "signADAM++-AW ends with a lower test error than AdamW (Table 3)",
            "best test error, points, decay 0.1, deviations chosen in the search: below 0",
            text,
            count_of(verdicts, "lower"),
        ]
    )
    rows.append(_speed(result))
    for family, words in (
        ("fixed", "a fixed threshold against none"),
        ("adaptive", "an adaptive threshold against none"),
        ("delayed", "the last step's adaptive threshold against none"),
        ("sparsity", "a steered threshold against none"),
        ("decayed", "an adaptive threshold against none, both with decoupled decay"),
    ):
        text, verdicts = _over_problems(result, f"{family}_minus_ungated", "best_error")
        chosen_values = ", ".join(
            f"{value:g}"
            for entry in result["by_problem"].values()
            if (value := entry["chosen"].get(family)) is not None
        )
        rows.append(
            [
                f"confidence helps: {words}",
                f"best test error, points, chosen in the search ({chosen_values or NOT_RUN}): below 0",
                text,
                count_of(verdicts, "lower"),
            ]
        )
    text, verdicts = _over_problems(result, "delayed_minus_adaptive", "best_error")
    rows.append(
        [
            "the last step's threshold does what this step's does",
            "best test error, points, as many deviations: 0 inside",
            text,
            count_of(verdicts, "open"),
        ]
    )
    text, verdicts = _over_problems(result, "paper_minus_released", "best_error")
    rows.append(
        [
            "the momentum that the released code leaves out helps",
            "best test error, points: below 0",
            text,
            count_of(verdicts, "lower"),
        ]
    )
    return [row for row in rows if row[-1] != NOT_RUN]


def _in_short(result: Run) -> str:
    """On how many problems each part helps and hurts, by its main effect on the test error."""
    parts = []
    for part in PARTS:
        verdicts = [
            training.verdict(entry["effects"].get(part, {}).get("best_error", {}).get("main"))
            for entry in result["by_problem"].values()
        ]
        parts.append(f"the {part} helps on {verdicts.count('lower')} and hurts on {verdicts.count('higher')}")
    searched = [
        entry["search_runs"] for problem in result["by_problem"].values() for entry in problem["methods"].values()
    ]
    return (
        f"In short, by the main effect on the best test error on {len(result['by_problem'])} problems: "
        f"{', '.join(parts)}. A search took {min(searched)} to {max(searched)} runs, most for a best at an edge."
    )


def _speed(result: Run) -> list[str]:
    """[SA], Table 2: signADAM++ against Adam in steps until the tolerance, paired by seed."""
    texts, faster = [], []
    for name, entry in result["by_problem"].items():
        both = [entry["methods"].get(key, {}).get("to_tolerance") for key in (PAPER.key, ADAM.key)]
        if all(both):
            left, right = both
            texts.append(f"{_titles(result)[name]} {_steps(left)} against {_steps(right)}")
            known = left["high"] is not None and right["low"] is not None
            faster.append("lower" if known and left["high"] < right["low"] else "open")
    return [
        "signADAM++ reaches the tolerance sooner than Adam (Table 2: on 4 of 7 networks, as soon on one)",
        "steps, median with its interval: intervals apart",
        "; ".join(texts) or NOT_RUN,
        count_of(faster, "lower"),
    ]


def _steps(found: Run) -> str:
    if found["median"] is None:
        return f"- ({found['reached']} of {found['n']})"
    high = "-" if found["high"] is None else f"{found['high']:g}"
    return f"{found['median']:g} ({training.number(found['low'])} .. {high})"


def _effects(result: Run) -> str:
    names = {"best_error": "best test error, points", "log_train": "log training loss", "last_loss": "last test loss"}
    rows = []
    for part in PARTS:
        for metric, words in names.items():
            row = [f"{part}: {words}"]
            for entry in result["by_problem"].values():
                value = entry["effects"].get(part, {}).get(metric, {}).get("main")
                row.append(between(value, 100 if metric == "best_error" else 1))
            rows.append(row)
    return markdown(["main effect", *_titles(result).values()], rows)


def _comparisons(result: Run) -> str:
    labels = {method.key: method.label for method in METHODS}
    rows = []
    for name, entry in result["by_problem"].items():
        # Two names stand for one pair where "no threshold" was chosen.
        pairs = {(found["first"], found["second"]): found for found in entry["comparisons"].values()}
        for (first, second), found in pairs.items():
            if first == second:
                continue
            rows.append(
                [
                    f"{labels[first]} - {labels[second]}",
                    _titles(result)[name],
                    between(found["best_error"], 100),
                    between(found["log_train"]),
                    between(found["last_loss"], form="+.3f"),
                ]
            )
    return markdown(["", "", "best test error, points", "log training loss", "last test loss"], rows)


def _table(result: Run) -> str:
    rows = []
    for method in METHODS:
        if not any(method.key in entry["methods"] for entry in result["by_problem"].values()):
            continue
        row = [method.label]
        for entry in result["by_problem"].values():
            found = entry["methods"].get(method.key)
            if found is None:
                row += ["", "", ""]
            else:
                row += [
                    f"{found['lr']:g}",
                    _steps(found["to_tolerance"]),
                    plus_minus(found["best_error"], 100),
                ]
        rows.append(row)
    header = [""]
    for title in _titles(result).values():
        header += [f"{title}: step size", "steps", "best test error, %"]
    return markdown(header, rows)


# The picture


def draw(result: Run, plt: Any) -> Any:
    """Left: the best test error of all methods. Middle: effects of the parts. Right: error over the threshold."""
    names = list(result["by_problem"])
    figure, grid = plt.subplots(
        len(names), 3, figsize=(16, 5.2 * len(names)), layout="constrained", squeeze=False, width_ratios=(1.2, 1, 1)
    )
    colors = {
        "cells": "tab:blue",
        "fixed": "tab:orange",
        "adaptive": "tab:green",
        "delayed": "tab:olive",
        "sparsity": "tab:red",
        "decayed": "tab:brown",
    }
    for row, name in zip(grid, names, strict=True):
        data = result["by_problem"][name]
        title = result["problems"][name]["title"]
        _draw_errors(row[0], data["methods"], colors)
        row[0].set(title=f"{title}: best test error", xlabel="%")
        _draw_effects(row[1], data["effects"])
        row[1].set(title="a part's effect on the best test error", xlabel="points of %; below 0 it helps")
        _draw_thresholds(row[2], data, colors)
        row[2].set(title="over the share that the gate drops", xlabel="share dropped in all of training", ylabel="%")
    figure.suptitle("signADAM++ taken apart: means of 10 seeds, 95 % intervals")
    return figure


def _family(key: str) -> str:
    for family, methods in FAMILIES.items():
        if key in {method.key for method in methods.values()} - {PAPER.key, UNGATED.key}:
            return family
    return "cells" if key in {method.key for method in CELLS.values()} else "baselines"


def _reach(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis that leave out what is far from all others."""
    ordered = sorted(values)
    low, quarter, most = ordered[0], ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]
    high = min(ordered[-1], most + 3 * (most - quarter) + 0.2)
    return low - 0.1 * (high - low), high + 0.1 * (high - low)


def _draw_errors(axes: Any, methods: Run, colors: dict[str, str]) -> None:
    shown = [(key, entry) for key, entry in methods.items() if entry["best_error"].get("mean") is not None]
    for y, (key, entry) in enumerate(shown):
        values = entry["best_error"]
        color = colors.get(_family(key), "black")
        axes.plot(100 * values["mean"], y, "o", color=color, markersize=5)
        if values["low"] is not None:
            axes.plot([100 * values["low"], 100 * values["high"]], [y, y], color=color, linewidth=2)
    if shown:
        axes.set_xlim(_reach([100 * entry["best_error"]["mean"] for _, entry in shown]))
    for y, (_, entry) in enumerate(shown):
        if 100 * entry["best_error"]["mean"] > axes.get_xlim()[1]:
            text = f"{100 * entry['best_error']['mean']:.1f} ->"
            axes.annotate(text, (axes.get_xlim()[1], y), ha="right", va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [entry["label"] for _, entry in shown], fontsize=8)
    axes.invert_yaxis()


def _draw_effects(axes: Any, effects: Run) -> None:
    labels: list[str] = []
    axes.axvline(0, color="black", linewidth=1)
    for part, color in zip(PARTS, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        for others, values in effects.get(part, {}).get("best_error", {}).items():
            y = len(labels)
            labels.append(f"{part}: {'main effect' if others == 'main' else others}")
            if values is None:
                continue
            width = 3.5 if others == "main" else 1.5
            axes.plot(100 * values["mean"], y, "o", color=color, markersize=5)
            if values["low"] is not None:
                axes.plot([100 * values["low"], 100 * values["high"]], [y, y], color=color, linewidth=width)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()


def _draw_thresholds(axes: Any, data: Run, colors: dict[str, str]) -> None:
    for family, methods in FAMILIES.items():
        points = []
        for value, method in sorted(methods.items()):
            entry = data["methods"].get(method.key)
            if entry is None or entry["best_error"].get("mean") is None:
                continue
            if method.key in data["gated"]:
                points.append((data["gated"][method.key]["mean"], entry["best_error"], value))
        points.sort(key=lambda point: point[0])
        xs = [x for x, _, _ in points]
        axes.plot(xs, [100 * error["mean"] for _, error, _ in points], "o-", color=colors[family], label=family)
        for x, error, value in points:
            if error["low"] is not None:
                axes.plot([x, x], [100 * error["low"], 100 * error["high"]], color=colors[family], linewidth=1.5)
            axes.annotate(
                f"{value:g}",
                (x, 100 * error["mean"]),
                fontsize=7,
                xytext=(3, 3),
                textcoords="offset points",
                clip_on=True,
            )
    errors = [entry["best_error"]["mean"] for entry in data["methods"].values() if entry["best_error"].get("mean")]
    if errors:
        axes.set_ylim(_reach([100 * error for error in errors]))
    adam = data["methods"].get(ADAM.key)
    if adam is not None and adam["best_error"].get("mean") is not None:
        axes.axhline(100 * adam["best_error"]["mean"], color="black", linestyle="--", linewidth=1, label="Adam")
    axes.legend(frameon=False)


STUDY = Study("ablation", PROBLEMS, plan, collect, draw)

if __name__ == "__main__":
    sys.exit(training.main("ablation", __doc__))
