"""What came of the runs: a summary by method, as JSON and as a page."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

from experiments.convergence import figures
from experiments.convergence.methods import ADAMW, BY_KEY, PLUS, REFERENCES, Method, same_in_fp32
from experiments.convergence.search import RATES, SEARCH_SEED, Comparison, finite
from experiments.convergence.training import Job, Problem
from reporting.files import compact_json, rounded, write
from reporting.present import between, markdown, plus_minus
from reporting.problems import Images, digest
from reporting.runs import Run, half_width, interval


def difference(comparison: Comparison, problem: Problem, method: Method, other: str, metric: int = 0) -> Run | None:
    """Of final validation losses, paired by seed; None unless both have all seeds, or when a run diverged."""
    ours = comparison.finals(problem, method, metric)
    theirs = comparison.finals(problem, BY_KEY[other], metric)
    if len(ours) < problem.seeds or len(theirs) < problem.seeds:
        return None
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours)]
    return interval(differences) if all(map(math.isfinite, differences)) else None


def summarize(comparison: Comparison, problem: Problem) -> dict[str, Run]:
    """By method with all its seeds: its rate and the search for it, its final losses, its differences."""
    metrics = {"loss": 0} | ({"error": 1} if problem.task is Images else {})
    summary = {}
    for method in problem.methods:
        found = comparison.search(problem, method)
        values = comparison.finals(problem, method)
        if found.best is None or len(values) < problem.seeds:
            continue
        jobs = [Job(problem, method, found.best, seed) for seed in values]
        runs = [run for job in jobs if (run := comparison.get(job)) is not None]
        entry: Run = {
            "label": method.label,
            "optimizer": method.optimizer.__name__,
            "options": method.options,
            "weights": "bf16" if method.bf16 else "fp32",
            "lr": found.best,
            "search": {f"{lr:g}": loss for lr, loss in sorted(found.losses.items())},
            "state_bytes_per_parameter": runs[0]["state_bytes"] / runs[0]["parameters"],
            "seconds_per_step": statistics.median(run["seconds"] for run in runs) / problem.steps,
            "diverged": sum(not run["finished"] for run in runs),
        }
        for metric, i in metrics.items():
            by_seed = comparison.finals(problem, method, i)
            losses = finite(by_seed)
            entry[metric] = {
                "seeds": len(by_seed),
                "mean": statistics.fmean(losses) if len(losses) == len(by_seed) else None,
                "half_width": half_width(losses) if len(losses) == len(by_seed) else None,
                "by_seed": {str(seed): loss for seed, loss in by_seed.items()},
            }
            # The last for a form at another beta, which would otherwise be compared with two things changed.
            for other in dict.fromkeys((*REFERENCES, same_in_fp32(method.options.get("beta", 0.9)))):
                if other in {m.key for m in problem.methods} - {method.key}:
                    entry[metric][f"minus_{other}"] = difference(comparison, problem, method, other, i)
        summary[method.key] = entry
    return summary


def page(name: str, content: Run) -> str:
    """What was collected, as Markdown."""
    spec, summary = content["problem"], content["methods"]
    clip = f", gradients clipped to a global norm of {spec['clip']:g}" if spec["clip"] else ""
    commits = ", ".join(sorted({where["commit"][:12] for where in content["environments"]}))
    parts = [f"# {content['title']}\n"]
    parts.append(
        f"{spec['steps']} steps of batch size {spec['batch_size']}, decoupled weight decay {spec['weight_decay']:g}"
        f"{clip}; {content['finished_runs']} of {content['expected_runs']} planned runs, "
        f"{content['training_hours']:.2f} hours of training on one thread, module of commit {commits}.\n\n"
        "**±** is half of the 95 % confidence interval of the mean over seeds (Student's t), and so are the intervals "
        "in brackets, of differences paired by seed. All rows have the same seeds, so means subtract. Intervals are "
        f"not corrected for their number: {sum(_comparisons(entry) for entry in summary.values())} differences stand "
        "below, and of true zeros one in twenty would be shown as different. Below 0 is better than the reference. "
        "Rows named by two dtypes are SignAdamPP with that state and those weights.\n"
    )
    for metric, what in (("loss", "final validation loss"), ("error", "final validation error")):
        rows = [
            [
                entry["label"],
                f"{entry['lr']:g}",
                plus_minus(entry[metric], digits=4),
                *(between(entry[metric].get(f"minus_{other}"), form="+.4f") for other in REFERENCES),
                f"{entry['state_bytes_per_parameter']:.2f}",
            ]
            for entry in summary.values()
            if metric in entry
        ]
        if rows:
            header = ["", "lr", what, f"minus {BY_KEY[ADAMW].label}", f"minus {BY_KEY[PLUS].label} in fp32", "state B"]
            parts.append(f"## {what.capitalize()}, {spec['seeds']} seeds\n\n{markdown(header, rows)}\n")
    betas = [
        [entry["label"], between(entry["loss"][f"minus_{reference}"], form="+.4f")]
        for key, entry in summary.items()
        if BY_KEY[key].stored
        and (reference := same_in_fp32(BY_KEY[key].options["beta"])) != PLUS
        and f"minus_{reference}" in entry["loss"]
    ]
    if betas:
        table = markdown(["", "minus fp32 with the same beta"], betas)
        parts.append(f"## Two bits at a larger beta\n\n{table}\n")
    rates = [f"{lr:g}" for lr in RATES if any(f"{lr:g}" in entry["search"] for entry in summary.values())]
    searched = [
        [entry["label"], *(_searched(entry, lr) for lr in rates)] for entry in summary.values() if "search" in entry
    ]
    parts.append(
        f"## Search for the learning rate (seed {SEARCH_SEED}, which enters no result)\n\nRates are 1, 2, 3 and 6 "
        "times powers of ten. Each search goes on until both neighbours of its best rate were tried.\n\n"
        f"{markdown(['', *rates], searched)}\n"
    )
    for picture, alt in figures.PICTURES.items():
        parts.append(f"![{alt}]({name}-{picture}.png)\n")
    return "\n".join(parts)


def _comparisons(entry: Run) -> int:
    return sum(
        found is not None
        for metric in ("loss", "error")
        for key, found in entry.get(metric, {}).items()
        if key.startswith("minus_")
    )


def _searched(entry: Run, lr: str) -> str:
    if lr not in entry["search"]:
        return ""
    loss = entry["search"][lr]
    text = f"{loss:.4f}" if loss is not None and math.isfinite(loss) else "diverged"
    return f"**{text}**" if float(lr) == entry["lr"] else text


def collect(comparison: Comparison, problem: Problem, folder: Path) -> None:
    """One JSON, one page and the figures from the runs so far."""
    plan = comparison.plan(problem)
    runs = {job.name: run for job in plan.ready if (run := comparison.get(job)) is not None}
    summary = summarize(comparison, problem)
    if not summary:
        print(f"{problem.name}: no finished comparison yet")
        return
    environments: list[Run] = []
    compact: dict[str, Run] = {}
    for name, run in runs.items():
        where = run["environment"]
        if where not in environments:
            environments.append(where)
        kept = {key: run[key] for key in ("train", "validation", "finished", "seconds", "date")}
        config = {key: run["config"][key] for key in ("method", "lr", "seed")}
        compact[name] = {**config, **kept, "environment": environments.index(where)}
    content = {
        "title": problem.title,
        "problem": {
            **problem.spec,
            "seeds": problem.seeds,
            "train_losses_averaged_over": problem.average,
        },
        "data_sha256": digest(problem.data),
        "search_seed": SEARCH_SEED,
        "parameters": next(iter(runs.values()))["parameters"],
        "expected_runs": len(plan.ready) + plan.waiting,
        "finished_runs": len(runs),
        "training_hours": sum(run["seconds"] for run in runs.values()) / 3600,
        "environments": environments,
        "methods": summary,
        "runs": compact,
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = compact_json(rounded(content))
    write(folder / f"{problem.name}.json", text)
    write(folder / f"{problem.name}.md", page(problem.name, json.loads(text)))
    figures.draw(comparison, problem, summary, folder)
    print(f"{problem.name}: {len(runs)} of {content['expected_runs']} runs are in {folder.name}/{problem.name}.*")
