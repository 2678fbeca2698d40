"""What came of stage 2 so far: JSON, a page, a picture."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from experiments import common
from experiments.convergence.training import Job
from experiments.recipe import figures, stage
from experiments.recipe.proof import BITS, FRESH, LARGER, TEXT, Contender, Part, Proof
from experiments.recipe.stage import publish
from reporting import machine
from reporting.present import between, markdown
from reporting.runs import Run, interval

NAME, PLAN = "stage2", "proof_plan.json"


def _entry(proof: Proof, part: str, contender: Contender) -> Run:
    """All numbers of a contender in a part, of the runs that are there."""
    tried, lr = proof.search(part, contender)
    losses = proof.losses(part, contender)
    entry: Run = {
        "label": contender.label,
        "options": contender.method.options,
        "competes": contender.candidate.rule.competes,
        "lr": lr,
        "search": {f"{rate:g}": loss for rate, loss in tried.items()},
        "losses": {str(seed): loss for seed, loss in losses.items()},
        "mean": statistics.fmean(losses.values()) if losses else None,
    }
    if lr is None or not losses:
        return entry
    store = proof.stores[part]
    run = store.get(Job(store.problem, contender.method, lr, next(iter(losses))))
    assert run is not None
    entry["state_bytes_per_parameter"] = run["state_bytes"] / run["parameters"]
    against = {"adamw": (proof.reference, FRESH if part == BITS else part)}
    if contender.form is not None:
        against["fp32"] = (Contender(contender.candidate, contender.lr), FRESH)
    for name, (other, of) in against.items():
        differences = proof.minus(part, contender, other, of) if contender != other else {}
        if differences:
            confidence = proof.design.confidence if part in (FRESH, LARGER) else 0.95
            entry[f"minus_{name}"] = interval(list(differences.values()), confidence)
            entry[f"minus_{name}_by_seed"] = {str(seed): value for seed, value in differences.items()}
    return entry


def collect(proof: Proof, plan: Run, folder: Path, command: str) -> None:
    """One JSON, one page and one picture from the runs so far."""
    runs, best = proof.runs(), proof.best()
    parts = {}
    for name, part in proof.design.parts.items():
        of = [run for (other, _), run in runs.items() if other == name]
        refused = [each.form for each in proof.formed(best) if not each.exists] if best and name == BITS else []
        parts[name] = {
            "title": part.title,
            "steps": part.problem.steps,
            "text": part.problem.data,
            "seeds": len(part.seeds),
            "finished": bool(of) and _finished(proof, part),
            "runs": len(of),
            "core_minutes": sum(run["seconds"] for run in of) / 60,
            "parameters": of[0]["parameters"] if of else None,
            "made": sorted({(run["environment"]["commit"] or "unknown", run["date"][:10]) for run in of}),
            "refused_forms": refused,
            "contenders": {each.key: _entry(proof, name, each) for each in proof.contenders(name)},
        }
    done, total = proof.progress()
    content: Run = {
        "name": NAME,
        "command": command,
        **machine.facts(),
        "plan": {key: plan[key] for key in ("design", "timed", "expected", "date")},
        "confidence": proof.design.confidence,
        "margin": proof.design.margin,
        "finished_runs": done,
        "expected_runs": total,
        "core_minutes": proof.minutes(),
        "best": None if best is None else best.key,
        "problems": {name: {"made": part["made"]} for name, part in parts.items()},
        "parts": parts,
    }
    publish(content, folder, page, figures.draw_proof)


def _finished(proof: Proof, part: Part) -> bool:
    return all(proof.mean(part.name, each) is not None for each in proof.contenders(part.name))


# The page


def page(content: Run) -> str:
    """What was collected, as Markdown."""
    margin, contenders = content["margin"], len(content["plan"]["design"]["contenders"]) - 1
    parts = ["# Which rule of one moment ends where AdamW ends? Stage 2, the proof\n", _state(content)]
    parts.append(
        "The candidates are the best of [stage 1](stage1.md), each at the learning rate that it found there, and the "
        "seeds are others. Differences to AdamW are paired by seed. In brackets are intervals by Student's t: 95 % "
        f"for all {contenders} contenders together (each {100 * content['confidence']:.1f} %) where all of them are "
        f"compared, 95 % each in the other parts. Before the first run it was said that a rule matches AdamW if the "
        f"whole interval lies below +{margin:g} nats, and that the best is the one with the lowest mean over the fresh "
        "seeds.\n"
    )
    for name, part in content["parts"].items():
        parts.append(f"## {part['title']}\n")
        parts.append(_part(content, name, part))
    parts.append(f"![differences to AdamW]({NAME}.png)\n")
    parts.append(
        f"{content['machine']['cpu']}, torch {content['versions']['torch']}, module of commit "
        f"{', '.join(sorted(common.modules(content)))}: `{content['command']}`; the plan is [{PLAN}]({PLAN}), of "
        f"{content['plan']['date'][:10]}. The runs are in runs.tar.gz. The machine was shared while they ran: their "
        "times measure no speed.\n"
    )
    return "\n".join(parts)


def _state(content: Run) -> str:
    lines = [
        f"{content['finished_runs']} of about {content['expected_runs']} runs are there, "
        f"{content['core_minutes']:.1f} of at most {content['plan']['design']['budget_minutes']:g} minutes of one core."
    ]
    fresh = content["parts"][FRESH]
    if fresh["finished"]:
        ours = [entry for entry in fresh["contenders"].values() if "minus_adamw" in entry]
        matching = [entry["label"] for entry in ours if _matches(entry["minus_adamw"], content["margin"])]
        if matching:
            lines.append(f"**With fresh seeds {_listed(matching)} matched AdamW.**")
        elif ours:
            nearest = min(ours, key=lambda entry: float(entry["minus_adamw"]["mean"]))
            gap = between(nearest["minus_adamw"], form="+.4f")
            lines.append(f"**Nothing matched AdamW: the smallest gap is that of {nearest['label']}, {gap} nats.**")
        else:
            lines.append("**Every contender diverged.**")
    missing = [part["title"].lower() for part in content["parts"].values() if not part["finished"]]
    if missing:
        lines.append(f"Not finished: {_listed(missing)}.")
    return " ".join(lines) + "\n"


def _matches(difference: Run, margin: float) -> bool:
    return difference["high"] is not None and float(difference["high"]) < margin


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _part(content: Run, name: str, part: Run) -> str:
    if not part["contenders"]:
        return "Who is in it is not known before the fresh seeds are finished.\n"
    of = {
        FRESH: "The problem of stage 1's last rung.",
        BITS: "The best rule with its moment in few bits, beside weights in bf16 that are rounded stochastically. "
        "Differences are to runs of the part above with the same seeds, whose state and weights are fp32.",
        TEXT: "The best rule and AdamW at the learning rates of stage 1, on the pages of Debian's package manpages-dev "
        "in place of Python's standard library.",
        LARGER: "Learning rates are those of stage 1 or the next below, whichever ends lower with a seed of stage 1.",
    }[name]
    size = f"{part['parameters'] / 1e6:.2f}M parameters, " if part["parameters"] else ""
    says = [f"{of} {size}{part['steps']:,} steps, {part['seeds']} seeds, {part['runs']} runs so far."]
    if part["refused_forms"]:
        says.append(f"Refused, as its moment has no bound: {', '.join(part['refused_forms'])}.")
    lowest = [each["label"] for each in part["contenders"].values() if is_lowest(each)]
    if lowest:
        says.append(f"At the lowest rate that was tried, so that one below may be better: {_listed(lowest)}.")
    header = ["", "lr", "seeds", "last validation loss", "minus AdamW", "state B"]
    if name == BITS:
        header.insert(5, "minus fp32")
    rows = []
    for entry in sorted(
        part["contenders"].values(), key=lambda each: math.inf if each["mean"] is None else each["mean"]
    ):
        row = [
            entry["label"],
            "-" if entry["lr"] is None else f"{entry['lr']:g}",
            f"{len(entry['losses'])}",
            "-" if entry["mean"] is None else f"{entry['mean']:.4f}",
            between(entry.get("minus_adamw"), form="+.4f"),
            f"{entry.get('state_bytes_per_parameter', math.nan):.2f}",
        ]
        if name == BITS:
            row.insert(5, between(entry.get("minus_fp32"), form="+.4f"))
        rows.append(row)
    return f"{' '.join(says)}\n\n{markdown(header, rows)}\n"


def is_lowest(entry: Run) -> bool:
    """Whether its rate was searched, and the lowest was the best."""
    return bool(entry["search"]) and entry["lr"] == min(map(float, entry["search"]))


def page_of(results: Path) -> Path:
    return stage.page_of(results, NAME)


def read(results: Path) -> Run | None:
    return stage.read(results, NAME)
