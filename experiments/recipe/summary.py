"""What came of stage 1 so far: JSON, a page, a picture."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from experiments import common
from experiments.convergence.search import RATES
from experiments.convergence.training import Job
from experiments.recipe import figures, stage
from experiments.recipe.candidates import ADAMW, Candidate
from experiments.recipe.halving import Halving
from experiments.recipe.stage import publish
from reporting import machine
from reporting.present import between, markdown
from reporting.runs import Run, interval

NAME, PLAN = "stage1", "plan.json"


def describe(halving: Halving, candidate: Candidate, at: int, reference: Candidate) -> Run | None:
    """All numbers of a candidate in a rung; None until all its runs are there."""
    found = halving.outcome(candidate, at)
    if found is None:
        return None
    entry: Run = {
        "label": candidate.label,
        "rule": candidate.rule.key,
        "changes": [change.key for change in candidate.changes],
        "optimizer": candidate.rule.optimizer,
        "options": candidate.options,
        "moments": candidate.rule.moments,
        "competes": candidate.rule.competes,
        "lr": found.lr,
        "search": {f"{lr:g}": loss for lr, loss in sorted(found.search.items())},
        "losses": {str(seed): loss for seed, loss in found.losses.items()},
        "mean": found.mean,
    }
    if found.lr is None:
        return entry
    store, seeds = halving.stores[at], list(found.losses)
    of = [run for seed in seeds if (run := store.get(Job(store.problem, candidate.method, found.lr, seed))) is not None]
    entry["state_bytes_per_parameter"] = of[0]["state_bytes"] / of[0]["parameters"]
    if all(run["finished"] for run in of):
        entry["train"] = [statistics.fmean(losses) for losses in zip(*(run["train"] for run in of), strict=True)]
    theirs = halving.outcome(reference, at)
    if candidate != reference and theirs is not None and theirs.lr is not None:
        differences = {seed: found.losses[seed] - theirs.losses[seed] for seed in seeds}
        if all(map(math.isfinite, differences.values())):
            entry["minus_adamw"] = interval(list(differences.values()))
            entry["minus_adamw_by_seed"] = {str(seed): value for seed, value in differences.items()}
    return entry


def summarize(halving: Halving) -> dict[str, Run]:
    """By rung: who is in it, and what came of those that are finished."""
    reference = next(candidate for candidate in halving.rules() if candidate.rule.key == ADAMW)
    rungs = {}
    for at, problem in enumerate(halving.design.rungs):
        entrants = halving.entrants(at)
        rows = {}
        for candidate in entrants or ():
            entry = describe(halving, candidate, at, reference)
            if entry is not None:
                rows[candidate.key] = entry
        rungs[problem.name] = {
            "steps": problem.steps,
            "entrants": None if entrants is None else [candidate.key for candidate in entrants],
            "changes_known": at > 0 or halving.changes() is not None,
            "finished": halving.finished(at),
            "candidates": rows,
        }
    return rungs


def collect(halving: Halving, plan: Run, folder: Path, command: str) -> None:
    """One JSON, one page and one picture from the runs so far."""
    runs = halving.runs()
    problems = {}
    for problem in halving.design.rungs:
        of = [run for (rung, _), run in runs.items() if rung == problem.name]
        problems[problem.name] = {
            "steps": problem.steps,
            "runs": len(of),
            "core_minutes": sum(run["seconds"] for run in of) / 60,
            "parameters": of[0]["parameters"] if of else None,
            "made": sorted({(run["environment"]["commit"] or "unknown", run["date"][:10]) for run in of}),
        }
    done, total = halving.progress()
    content: Run = {
        "name": NAME,
        "command": command,
        **machine.facts(),
        "plan": {key: plan[key] for key in ("design", "timed", "expected", "date")},
        "left_out": [rule.label for rule in halving.design.rules if rule.made_by is None],
        "finished_runs": done,
        "expected_runs": total,
        "core_minutes": halving.minutes(),
        "problems": problems,
        "rungs": summarize(halving),
    }
    publish(content, folder, page, figures.draw)


# The page


def page(content: Run) -> str:
    """What was collected, as Markdown."""
    design = content["plan"]["design"]
    problem, promotion = design["problem"], design["promotion"]
    first, *others = (str(seed) for seed in design["seeds"])
    parts = ["# Which rule of one moment ends where AdamW ends? Stage 1, the search\n", _state(content)]
    later = ", ".join(f"{count} to the {_ordinal(i + 1)}" for i, count in enumerate(promotion["candidates_that_go_on"]))
    parts.append(
        f"A byte-level GPT of {_parameters(content)} parameters, batches of {problem['batch_size']} x "
        f"{problem['model']['block_size']} bytes of the standard library's sources. For all: weight decay "
        f"{problem['weight_decay']:g}, gradients clipped to a global norm of {problem['clip']:g}, a tenth of warm-up "
        f"and a cosine to {problem['last_factor']:g} of the learning rate. The schedule is scaled to each rung's "
        "length: a run that was cut off would be judged at a learning rate at which nobody stops. AdamW is torch's, "
        "betas 0.9 and 0.95.\n\n"
        f"Of the best {promotion['rules_whose_changes_are_tried']} rules as they are, changes are tried one at a time. "
        f"By rung, the best candidates go on ({later}; at most {promotion['of_one_rule_at_most']} of one rule), and to "
        "the second also all changes together that helped alone, of the best "
        f"{promotion['rules_whose_changes_are_combined']} rules. Rules of two moments are companions of comparison: "
        "they take no place and do not go on.\n\n"
        f"Learning rates are {design['rates']}, for each candidate in each rung, with seed {first}; seed "
        f"{' and '.join(others)} runs at the best rate alone, so only its loss is free of that choice. Differences are "
        "paired by seed; in brackets is their 95 % interval by Student's t, which of two seeds is wide, and is not "
        "corrected for their number. The candidates at the head of a table were chosen by these same seeds, so they "
        "look better than they are: this stage says what to try with fresh ones, and proves nothing.\n"
    )
    for i, (name, rung) in enumerate(content["rungs"].items()):
        parts.append(f"## {_ordinal(i).capitalize()} rung, {rung['steps']:,} steps\n")
        parts.append(_rung(content, name, rung, others[-1]))
    parts.append(f"![differences to AdamW, and learning rates]({NAME}.png)\n")
    parts.append(
        f"{content['machine']['cpu']}, torch {content['versions']['torch']}, module of commit "
        f"{', '.join(sorted(common.modules(content)))}: `{content['command']}`; the plan is [plan.json](plan.json), of "
        f"{content['plan']['date'][:10]}. The runs are in runs.tar.gz, from which the program goes on. The machine was "
        "shared while they ran: their times measure no speed.\n"
    )
    return "\n".join(parts)


def _state(content: Run) -> str:
    """How far the stage has come, and what it found of the farthest rung with results."""
    unfinished = [f"{rung['steps']:,}" for rung in content["rungs"].values() if not rung["finished"]]
    budget = content["plan"]["design"]["budget_minutes"]
    lines = [
        f"**This is stage 1 of two, a search, and it is {'finished' if not unfinished else 'not finished'}.** "
        f"{content['finished_runs']} of about {content['expected_runs']} runs are there, {content['core_minutes']:.1f} "
        f"of at most {budget:g} minutes of one core."
    ]
    if unfinished:
        lines.append(f"Rungs with runs to come: {', '.join(unfinished)} steps.")
    if content["left_out"]:
        lines.append(f"Not in the module of these runs: {', '.join(content['left_out'])}.")
    lines.append("What it finds is for stage 2 to prove: fresh seeds, few bits, a larger model, another text.")
    for rung in reversed(content["rungs"].values()):
        found = [entry for entry in _ranked(rung) if entry["competes"] and "minus_adamw" in entry]
        if found:
            best = found[0]
            of = "of all its candidates" if rung["finished"] else "of those finished so far"
            lines.append(
                f"At {rung['steps']:,} steps the lowest loss of a rule of one moment, {of}, is that of "
                f"{best['label']}: {between(best['minus_adamw'], form='+.4f')} against AdamW."
            )
            break
    return " ".join(lines) + "\n"


def _ranked(rung: Run) -> list[Run]:
    """Candidates by their losses; those that found none at the end."""
    entries = list(rung["candidates"].values())
    return sorted(entries, key=lambda entry: math.inf if entry["mean"] is None else entry["mean"])


def _rung(content: Run, name: str, rung: Run, other_seed: str) -> str:
    if rung["entrants"] is None:
        return "Who is in it is not known before the rung above is finished.\n"
    waiting = len(rung["entrants"]) - len(rung["candidates"])
    runs = content["problems"][name]["runs"]
    says = f"{runs} runs; {len(rung['candidates'])} of {len(rung['entrants'])} candidates are finished"
    if waiting:
        says += f", {waiting} to come"
    if not rung["changes_known"]:
        says += "; changes are added when all rules of one moment are finished"
    if not rung["candidates"]:
        return says + ".\n"
    header = ["", "moments", "lr", "last validation loss", "minus AdamW", f"seed {other_seed} alone", "state B"]
    rows = []
    for entry in _ranked(rung):
        by_seed = entry.get("minus_adamw_by_seed", {})
        rows.append(
            [
                entry["label"],
                f"{entry['moments']}",
                "-" if entry["lr"] is None else f"{entry['lr']:g}",
                "diverged" if entry["mean"] is None else f"{entry['mean']:.4f}",
                between(entry.get("minus_adamw"), form="+.4f"),
                f"{by_seed[other_seed]:+.4f}" if other_seed in by_seed else "-",
                f"{entry.get('state_bytes_per_parameter', math.nan):.2f}",
            ]
        )
    rates = [f"{lr:g}" for lr in RATES if any(f"{lr:g}" in entry["search"] for entry in rung["candidates"].values())]
    searched = [[entry["label"], *(_searched(entry, lr) for lr in rates)] for entry in _ranked(rung)]
    spread = _spread(rung)
    parts = [f"{says}.", ""]
    if spread is not None:
        parts += [
            f"The two seeds' differences to AdamW lie {spread:.4f} apart in the median over the candidates: smaller "
            "differences of means say nothing here.",
            "",
        ]
    parts += [
        markdown(header, rows),
        "",
        "Losses of the search by learning rate:",
        "",
        markdown(["", *rates], searched),
    ]
    return "\n".join(parts) + "\n"


def _spread(rung: Run) -> float | None:
    """How far apart seeds are in their differences, in the median over candidates."""
    apart = [
        max(values) - min(values)
        for entry in rung["candidates"].values()
        if len(values := list(entry.get("minus_adamw_by_seed", {}).values())) > 1
    ]
    return statistics.median(apart) if apart else None


def _searched(entry: Run, lr: str) -> str:
    if lr not in entry["search"]:
        return ""
    loss = entry["search"][lr]
    text = f"{loss:.4f}" if loss is not None and math.isfinite(loss) else "diverged"
    return f"**{text}**" if entry["lr"] is not None and float(lr) == entry["lr"] else text


def _parameters(content: Run) -> str:
    found = [problem["parameters"] for problem in content["problems"].values() if problem["parameters"]]
    return f"{found[0] / 1e6:.2f}M" if found else "few"


def _ordinal(i: int) -> str:
    return ("first", "second", "third", "fourth")[i]


def page_of(results: Path) -> Path:
    return stage.page_of(results, NAME)


def read(results: Path) -> Run | None:
    return stage.read(results, NAME)
