"""What [SA] says of signADAM++'s inside, seen in real trainings: Lemma 1 and Figures 5 and 3.

Problems and schedule: those of experiments/ablation.py, whose runs these are where both need the same.

- Lemma 1: |m| <= 1. The largest |m| of every step of every run, for SignAdamPP with each kind of threshold and for
  SignAdam; 10 seeds each, and the runs of all step sizes that were tried in a search.
- Figure 5: the share of a layer's gradient entries that the gate drops "rises from 0.6 towards 1" over training. For
  every layer, averaged over the steps between two evaluations, with thresholds from 1e-5 to 1e-2 and, beside them, the
  adaptive threshold. It rises if the last such average minus the first, paired by seed, lies above 0 with its 95 %
  interval. An entry that is exactly 0 (a dead unit; the embedding of a byte that does not occur) is dropped by any
  gate: the share of those is given too.
- Figure 3: the remaining ratio ||gated g|| / ||g|| against the threshold falls faster for samples that the model gets
  right than for those it gets wrong. g is the gradient of one sample held out (an image; the last byte of a window),
  over all weights. Three looks at each run, after 1/12, 5/12 and all of training ("digits") or 1/20, 7/20 and all of it
  (texts). The statement is put twice: with the threshold in units of the gradient, as in the paper, and in units of the
  sample's own root mean square, which takes away that a sample the model gets right has a smaller gradient altogether.
  The number for it: the threshold at which the mean ratio has fallen to one half, right against wrong, as the log10 of
  their quotient, paired by seed. Below 0, the right ones fall faster.

The plan: beside the ablation's runs, 10 runs of about 6 s on each problem with these looks, at the rate that the
ablation's search found: 3 minutes on one core. Cut to fit that: a text's samples are 128 bytes.

python -m experiments.lemma --workers 2         run what is missing, then collect
python -m experiments.lemma --collect           JSON and picture from the runs so far
python -m experiments.lemma --quick             everything once in small: a test of this program
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from experiments import ablation, common, training
from experiments.ablation import ADAPTIVE, FIXED, PAPER, SIGN_ADAM
from experiments.training import Job, Method, Plan, Problem, Store, Study
from reporting.present import between, markdown, plus_minus
from reporting.runs import Run, band, interval

SHOWN = (FIXED[1e-5], FIXED[1e-4], PAPER, FIXED[1e-3], FIXED[1e-2], ADAPTIVE[0.5])
BOUNDED = (*SHOWN, FIXED[0.0], *(method for method in ADAPTIVE.values() if method not in SHOWN), SIGN_ADAM)


def label(method: Method) -> str:
    """By its threshold alone: here all else is the same."""
    names = {PAPER.key: f"fixed threshold {ablation.CODE_ALPHA:g}", FIXED[0.0].key: "no threshold"}
    return names.get(method.key, method.label)


#: Thresholds of Figure 3: three in each power of ten.
ABSOLUTE = tuple(10 ** (i / 3) for i in range(-24, 4))
RELATIVE = tuple(10 ** (i / 6) for i in range(-12, 13))


def look(task: Any) -> Run:
    """The mean remaining ratio of samples right and wrong, by threshold, and their mean norm."""
    params = list(task.model.parameters())
    sums = {kind: torch.zeros(2, max(len(ABSOLUTE), len(RELATIVE))).double() for kind in ("right", "wrong")}
    norms: dict[str, list[float]] = {"right": [], "wrong": []}
    for loss, right in task.samples():
        g = torch.cat([part.flatten() for part in torch.autograd.grad(loss, params)]).abs()
        norm = g.norm()
        if not norm > 0:
            continue
        kind = "right" if right else "wrong"
        norms[kind].append(norm.item())
        # Of the entries in order, the norm of those above a threshold is a difference of cumulative sums.
        ordered = g.double().sort().values
        below = torch.cat((torch.zeros(1).double(), ordered.square().cumsum(0)))
        for row, thresholds in enumerate((ABSOLUTE, [value * norm / math.sqrt(len(g)) for value in RELATIVE])):
            at = torch.searchsorted(ordered, torch.tensor([float(value) for value in thresholds]).double(), right=True)
            ratio = (1 - below[at] / below[-1]).clamp(min=0).sqrt()
            sums[kind][row, : len(ratio)] += ratio
    result: Run = {}
    for kind, total in sums.items():
        count = len(norms[kind])
        if count:
            result[kind] = {
                "samples": count,
                "log10_norm": statistics.fmean(map(math.log10, norms[kind])),
                "absolute": (total[0, : len(ABSOLUTE)] / count).tolist(),
                "relative": (total[1, : len(RELATIVE)] / count).tolist(),
            }
    return result


def half_at(thresholds: Sequence[float], ratios: Sequence[float]) -> float | None:
    """log10 of the threshold at which the ratio passes one half, between two points on a line; None if it does not."""
    points = list(zip(map(math.log10, thresholds), ratios, strict=True))
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y0 >= 0.5 > y1:
            return x0 + (x1 - x0) * (y0 - 0.5) / (y0 - y1)
    return None


def _with_looks(problem: Problem) -> Problem:
    return replace(problem, name=f"{problem.name}_looks", probe=look)


PROBLEMS = tuple(found for problem in ablation.PROBLEMS for found in (problem, _with_looks(problem)))


def _halves(stores: Sequence[Store]) -> list[tuple[Store, Store]]:
    """The stores of the ablation, each with that of its looks."""
    return list(zip(stores[0::2], stores[1::2], strict=True))


def _looks(store: Store, looked: Store) -> list[Job]:
    lr = training.search(store, PAPER).best
    return [] if lr is None else training.finals(looked, PAPER, lr)


def plan(stores: Sequence[Store]) -> Plan:
    found = training.plan(stores[0::2], BOUNDED)
    looks = [(looked, job) for store, looked in _halves(stores) for job in _looks(store, looked)]
    missing = sum(looked.problem.seeds for store, looked in _halves(stores) if not _looks(store, looked))
    return Plan(found.ready + looks, found.waiting + missing)


# What came of it


def largest(store: Store) -> Run:
    """Of each method: the largest |m| of all its runs, searches too, and how many steps that were."""
    result: Run = {}
    for method in BOUNDED:
        jobs = training.search(store, method).jobs
        got = training.finished(store, method)
        if got is not None:
            jobs = jobs + training.finals(store, method, got[0])
        runs = [run for job in jobs if (run := store.get(job)) is not None]
        if runs:
            result[method.key] = {
                "label": label(method),
                # Six digits would round a number just above 1 down to it.
                "max_m_minus_1": max(max(run["max_m"]) for run in runs) - 1.0,
                "runs": len(runs),
                "steps": sum(run["validation"][-1][0] for run in runs if run["validation"]),
            }
    return result


def sparsity(store: Store) -> Run:
    """Of each method and layer: mean shares over training, and the rise from first to last, paired by seed."""
    result: Run = {}
    for method in SHOWN:
        got = training.finished(store, method)
        if got is None:
            continue
        runs = [run for run in got[1].values() if run["finished"]]
        if not runs:
            continue
        layers = {}
        for name in [*runs[0]["sizes"], "all"]:
            shares, zeros = ([_share(run, what, name) for run in runs] for what in ("gated", "zero"))
            layers[name] = {
                "first": interval([share[0] for share in shares]),
                "last": interval([share[-1] for share in shares]),
                "rise": training.judged(interval([share[-1] - share[0] for share in shares])),
                "mean": [statistics.fmean(column) for column in zip(*shares, strict=True)],
                "zero_first": statistics.fmean(zero[0] for zero in zeros),
                "zero_last": statistics.fmean(zero[-1] for zero in zeros),
            }
            if name == "all":
                layers[name]["by_seed"] = shares
        result[method.key] = {"label": label(method), "lr": got[0], "layers": layers}
    return result


def _share(run: Run, what: str, name: str) -> list[float]:
    """The share over training of one layer, or of all entries."""
    if name != "all":
        return list(run[what][name])
    total = sum(run["sizes"].values())
    columns = zip(*([share * run["sizes"][layer] for share in run[what][layer]] for layer in run["sizes"]), strict=True)
    return [sum(column) / total for column in columns]


def ratios(looked: Store, jobs: Sequence[Job]) -> list[Run]:
    """Of each look: the mean ratios, right and wrong, and the shift between where each has fallen to one half."""
    runs = [run for job in jobs if (run := looked.get(job)) is not None and run["finished"]]
    if not runs:
        return []
    results = []
    for at, step in enumerate(looked.problem.probed):
        looks = [run["probes"][at] for run in runs]
        both = [one for one in looks if "right" in one and "wrong" in one]
        entry: Run = {
            "step": step,
            "seeds": len(both),
            "without_wrong": sum("wrong" not in one for one in looks),
        }
        if both:
            entry["samples"] = {k: statistics.fmean(one[k]["samples"] for one in both) for k in ("right", "wrong")}
            entry["log10_norm_right_minus_wrong"] = training.judged(
                interval([one["right"]["log10_norm"] - one["wrong"]["log10_norm"] for one in both])
            )
        for unit, thresholds in (("absolute", ABSOLUTE), ("relative", RELATIVE)):
            shifts = []
            for one in both:
                right, wrong = (half_at(thresholds, one[kind][unit]) for kind in ("right", "wrong"))
                if right is not None and wrong is not None:
                    shifts.append(right - wrong)
            entry[unit] = {
                "curves": {kind: [one[kind][unit] for one in both] for kind in ("right", "wrong")},
                "half_at_right_minus_wrong": training.judged(interval(shifts)) if shifts else None,
            }
        results.append(entry)
    return results


def collect(stores: Sequence[Store]) -> Run:
    by_problem = {}
    for store, looked in _halves(stores):
        by_problem[store.problem.name] = {
            "largest": largest(store),
            "sparsity": sparsity(store),
            "ratios": ratios(looked, _looks(store, looked)),
        }
    return {"thresholds": {"absolute": ABSOLUTE, "relative": RELATIVE}, "by_problem": by_problem}


# The page


def section(result: Run) -> str:
    first = next(iter(result["problems"].values()))
    return "\n\n".join(
        [
            "## Inside signADAM++: Lemma 1, and Figures 5 and 3 of [SA]",
            f"Real trainings, {first['seeds']} seeds, at the step sizes that the ablation found. In brackets 95 % "
            "intervals (Student's t), differences paired by seed.",
            "![shares dropped, and remaining ratios](results/lemma.png)",
            common.judged(_claims(result)),
            "The share of all gradient entries that the gate drops, averaged over the first and the last interval "
            "between "
            'evaluations; "zero": the share that is exactly 0 in the last one, which any gate drops.',
            _shares(result),
            "Samples the model gets right against those it gets wrong: log10 of the quotient of the thresholds at "
            "which half of the gradient's norm remains, and of the gradient norms themselves.",
            _ratios(result),
            "The samples are held out, so that wrong ones remain; [SA] does not say which it took. Nothing is said "
            "beyond these three small problems.",
            training.cost(result),
        ]
    )


def _claims(result: Run) -> list[list[str]]:
    titles = {name: settings["title"] for name, settings in result["problems"].items()}
    largest_of = [found for entry in result["by_problem"].values() for found in entry["largest"].values()]
    rows = []
    if largest_of:
        most = max(found["max_m_minus_1"] for found in largest_of)
        rows.append(
            [
                "\\|m\\| <= 1 (Lemma 1)",
                "the largest \\|m\\| of any step",
                f"1 {'+' if most > 0 else '-'} {abs(most):.2g} in {sum(found['runs'] for found in largest_of)} runs, "
                f"{sum(found['steps'] for found in largest_of)} steps",
                "yes" if most <= 0 else "**no**",
            ]
        )
    texts, rises, ends = [], [], {}
    for name, entry in result["by_problem"].items():
        layers = entry["sparsity"].get(PAPER.key, {}).get("layers", {})
        if layers:
            whole = layers["all"]
            count = sum(layer["rise"]["verdict"] == "higher" for key, layer in layers.items() if key != "all")
            texts.append(
                f"{titles[name]} {whole['first']['mean']:.2f} to {whole['last']['mean']:.2f}, rise "
                f"{between(whole['rise'])}, in {count} of {len(layers) - 1} tensors"
            )
            rises.append(whole["rise"]["verdict"])
            ends[titles[name]] = whole["last"]["low"]
    rows.append(
        [
            "the share that the gate drops rises in training (Figure 5: from 0.6)",
            "threshold 5e-4, last minus first above 0",
            "; ".join(texts),
            ablation.count_of(rises, "higher"),
        ]
    )
    near = ["near" if low is not None and low >= 0.95 else "not" for low in ends.values()]
    rows.append(
        [
            "... and comes near 1 (Figure 5)",
            "threshold 5e-4, the last share's interval above 0.95",
            "; ".join(f"{name} from {training.number(low)}" for name, low in ends.items()),
            ablation.count_of(near, "near"),
        ]
    )
    for unit, words in (("absolute", "in units of the gradient"), ("relative", "in units of the sample's own size")):
        verdicts = []
        for entry in result["by_problem"].values():
            for seen in entry["ratios"]:
                value = seen[unit]["half_at_right_minus_wrong"]
                if value is not None:
                    verdicts.append(value["verdict"])
        rows.append(
            [
                f"with a growing threshold, {words}, the gradients of right samples vanish before those of wrong ones"
                + (" (Figure 3)" if unit == "absolute" else ""),
                "three looks on each problem: right against wrong below 0",
                f"below 0 in {verdicts.count('lower')}, above in {verdicts.count('higher')}, open in "
                f"{verdicts.count('open')}",
                ablation.count_of(verdicts, "lower"),
            ]
        )
    return rows


def _shares(result: Run) -> str:
    rows = []
    for name, entry in result["by_problem"].items():
        for found in entry["sparsity"].values():
            whole = found["layers"]["all"]
            rows.append(
                [
                    result["problems"][name]["title"],
                    found["label"],
                    plus_minus(whole["first"], digits=3),
                    plus_minus(whole["last"], digits=3),
                    between(whole["rise"], form="+.3f"),
                    f"{whole['zero_last']:.3f}",
                ]
            )
    return markdown(["", "", "first", "last", "rise", "zero"], rows)


def _ratios(result: Run) -> str:
    rows = []
    for name, entry in result["by_problem"].items():
        for seen in entry["ratios"]:
            samples = seen.get("samples", {"right": 0, "wrong": 0})
            rows.append(
                [
                    result["problems"][name]["title"],
                    f"{seen['step']}",
                    f"{samples['right']:.0f} / {samples['wrong']:.0f}",
                    between(seen["absolute"]["half_at_right_minus_wrong"]),
                    between(seen["relative"]["half_at_right_minus_wrong"], form="+.3f"),
                    between(seen.get("log10_norm_right_minus_wrong")),
                ]
            )
    header = [
        "",
        "step",
        "right / wrong",
        "threshold in units of g",
        "of the sample's own size",
        "norm of the gradient",
    ]
    return markdown(header, rows)


# The picture


def draw(result: Run, plt: Any) -> Any:
    names = list(result["by_problem"])
    figure, grid = plt.subplots(len(names), 4, figsize=(19, 4.2 * len(names)), layout="constrained", squeeze=False)
    for row, name in zip(grid, names, strict=True):
        entry, settings = result["by_problem"][name], result["problems"][name]
        every = settings["steps_between_evaluations"]
        row[0].set_ylabel(settings["title"])
        colors = plt.cm.viridis([i / len(SHOWN) for i in range(len(SHOWN))])
        for color, values in zip(colors, entry["sparsity"].values(), strict=False):
            lines = values["layers"]["all"]["by_seed"]
            steps = [(i + 1) * every for i in range(len(lines[0]))]
            band(row[0], steps, lines, color=color, label=values["label"])
        row[0].set(title="share dropped by the gate, all layers", xlabel="step", ylim=(-0.02, 1.02))
        if entry["sparsity"]:
            row[0].legend(frameon=False, fontsize=8)
        layers = entry["sparsity"].get(PAPER.key, {}).get("layers", {})
        weights = [name for name in layers if name != "all" and not name.endswith("bias")]
        colors = plt.cm.turbo([i / max(1, len(weights) - 1) for i in range(len(weights))])
        for color, layer in zip(colors, weights, strict=True):
            mean = layers[layer]["mean"]
            row[1].plot([(i + 1) * every for i in range(len(mean))], mean, color=color, linewidth=1.4, label=layer)
        row[1].set(title=f"by layer, {label(PAPER)}", xlabel="step", ylim=(-0.02, 1.02))
        if weights:
            many = len(weights) > 8
            row[1].legend(frameon=False, fontsize=6 if many else 8, ncols=2 if many else 1, loc="upper left")
            row[1].set_ylim(-0.02, 1.4)
        for axes, unit in zip(row[2:], ("absolute", "relative"), strict=True):
            thresholds = result["thresholds"][unit]
            for look, style in zip(entry["ratios"], (":", "--", "-"), strict=False):
                for kind, color in (("right", "tab:blue"), ("wrong", "tab:red")):
                    lines = look[unit]["curves"][kind]
                    if lines:
                        shown = f"{kind}, step {look['step']}"
                        band(axes, thresholds, lines, color=color, linestyle=style, label=shown)
            axes.set_xscale("log")
            units = "of the gradient" if unit == "absolute" else "of the sample's root mean square"
            axes.set(title="remaining ratio of the norm", xlabel=f"threshold, in units {units}", ylim=(-0.02, 1.02))
            if axes.lines:
                axes.legend(frameon=False, fontsize=8)
    figure.suptitle("Inside signADAM++: means of 10 seeds, 95 % intervals")
    return figure


STUDY = Study("lemma", PROBLEMS, plan, collect, draw)

if __name__ == "__main__":
    sys.exit(training.main("lemma", __doc__))
