"""The section of docs/results.md about communication. Reads plain JSON: needs neither torch nor the package."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.comm import formulas
from bench.comm.formulas import HOOKS
from bench.committed import RESULTS
from reporting import present
from reporting.present import markdown

FOLDER = RESULTS / "comm"
#: Of a model that knows nothing: all bytes are alike to it.
UNIFORM = math.log(256)
#: Bits that a majority may send for each parameter each way.
AIM = 2.1

Report = dict[str, Any]


def block(folder: Path = FOLDER, link: str = "../bench/results/comm") -> str:
    """What is measured so far."""
    parts = []
    if (folder / "wire.json").exists():
        report = json.loads((folder / "wire.json").read_text())
        parts += [_bytes(report, link), _times(report, link), _large()]
    if (folder / "convergence.json").exists():
        parts.append(_training(json.loads((folder / "convergence.json").read_text()), link))
    return "\n\n".join(parts) or f"Communication: {present.NOT_MEASURED}."


def bits(row: Report) -> tuple[float, float]:
    """Bits for each parameter that a worker sends, there and back, the mean over workers."""
    total = 8 * fmean(row["bytes"]) / row["parameters"]
    there = total / 2 if row["bytes_there"] is None else 8 * fmean(row["bytes_there"]) / row["parameters"]
    return there, total - there


def _where(report: Report) -> str:
    machine = report["machine"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, torch {report['versions']['torch']}, module of commit "
        f"{present.built_at(report)}"
    )


def _way(there: float, back: float) -> str:
    return f"{present.number(there)} + {present.number(back)}"


def _bytes(report: Report, link: str) -> str:
    rows = {(row["hook"], row["workers"]): row for row in report["wire"]}
    workers = sorted({n for _, n in rows})
    lines = []
    for hook, label in HOOKS.items():
        cells = []
        for n in workers:
            row = rows.get((hook, n))
            if row is None:
                cells.append("")
                continue
            own = (8 * x / row["parameters"] for x in formulas.payload(hook, row["shapes"], n))
            cells.append(f"{_way(*bits(row))} ({_way(*own)})")
        lines.append([label, *cells])
    most = max(max(bits(row)) for row in report["wire"] if row["hook"] == "majority")
    verdict = "reached" if most <= AIM else "not reached"
    counted = (
        "on the interface of each worker, in a network namespace of its own, with packets of Ethernet's size, headers "
        "and acknowledgements included"
        if report["namespaces"]
        else "on the loopback interface that all share, divided by their number"
    )
    refused = report["failed"].get("bf16_compress_hook")
    bf16 = f" On gloo DDP refuses torch's `bf16_compress_hook` (`{refused}`): a hook that does the same stands for it."
    any_row = report["wire"][0]
    text = (
        "Bits for each parameter that a worker sends in a step, there + back; in brackets by formula, without "
        f"headers. A GPT of {any_row['parameters'] / 1e6:.2f}M parameters under DDP on gloo, its gradients in one "
        f"bucket; bytes counted {counted}, of {any_row['steps']} steps less those of none; {_where(report)}, "
        f"{report['date'][:10]}.\n"
        "There is the all-to-all of a vote, measured by itself; of other hooks, half of the sum. With n workers all "
        f"but 1/n of a buffer leaves a worker, each way.{bf16 if refused else ''}"
    )
    header = ["bits per parameter", *(f"{n} workers" for n in workers)]
    aim = (
        f"Aim for a majority, with {', '.join(map(str, workers))} workers: at most {AIM} bits each way. Measured: at "
        f"most {most:.2f}, {verdict}. A mean comes back in 4 bits (to 7 workers), 8 (to 127) or 16. PowerSGD sends "
        "less: its factors are of rank 1, and each worker keeps an error as large as its gradients."
    )
    others = {hook: why for hook, why in report["failed"].items() if hook != "bf16_compress_hook"}
    failed = "".join(f"\n\nWithout a result: {HOOKS[hook]} ({why})." for hook, why in others.items())
    return f"### Bytes\n\n{text}\n\n{markdown(header, lines)}\n\n{aim}{failed}\n\n![bytes and times]({link}/wire.png)"


def _times(report: Report, link: str) -> str:
    rows = {(row["hook"], row["workers"], row["gbit"]): row for row in report["times"]}
    if not rows:
        return f"### Time of a step\n\n{present.NOT_MEASURED}."
    columns = sorted({(n, gbit) for _, n, gbit in rows}, key=lambda column: (column[0], column[1] or math.inf))
    lines = [
        [
            label,
            *(present.duration(rows[(hook, *column)]["seconds"]["median"]) for column in columns),
        ]
        for hook, label in HOOKS.items()
        if all((hook, *column) in rows for column in columns)
    ]
    header = ["", *(f"{n} workers, {f'{gbit:g} Gbit/s' if gbit else 'no limit'}" for n, gbit in columns)]
    size = report["times"][0]["parameters"]
    text = (
        f"Forward, backward and communication of a GPT of {size / 1e6:.1f}M parameters on 16 bytes of text, medians of "
        f"{report['settings']['time_steps']} steps. `tc tbf` limits what each worker sends; all share "
        f"{report['machine']['cores']} cores, and other programs ran too (a load of {report['load']:.1f} at the "
        "start), so that times say how hooks compare, and little more. Without a limit the processor is one: a faster "
        "link, "
        f"of 100 Gbit/s, changes nothing here. {_reached(report)}"
    )
    return f"### Time of a step, measured\n\n{text}\n\n{markdown(header, lines)}"


def _reached(report: Report, hook: str = "allreduce", gbit: float = 1) -> str:
    """What passed a limited link, by how much longer a hook took than without a limit."""
    found: dict[int, dict[float | None, Report]] = {}
    for row in report["times"]:
        if row["hook"] == hook:
            found.setdefault(row["workers"], {})[row["gbit"]] = row
    passed = []
    for n, rows in found.items():
        if gbit in rows and None in rows:
            longer = rows[gbit]["seconds"]["median"] - rows[None]["seconds"]["median"]
            sent = 8 * sum(formulas.payload(hook, rows[gbit]["shapes"], n))
            if longer > 0:
                passed.append(f"{sent / longer / 1e9:.2f} with {n} workers")
    if not passed:
        return ""
    return (
        f"Less passed than a limit allows: at {gbit:g} Gbit/s {HOOKS[hook]} took so much longer than without one that "
        "it "
        f"sent at {' and '.join(passed)}."
    )


def _large() -> str:
    parts = []
    for name, shapes in formulas.LARGE.items():
        lines = []
        for n in formulas.LARGE_WORKERS:
            sent = {hook: sum(formulas.payload(hook, shapes, n)) for hook in HOOKS}
            lines.append([f"{n:,} workers: sent", *(_size(sent[hook]) for hook in HOOKS)])
            for gbit in formulas.GBITS:
                times = (
                    formulas.seconds(sent[hook], formulas.rounds(hook, n), gbit, formulas.LATENCY) for hook in HOOKS
                )
                lines.append([f"{n:,} workers, {gbit} Gbit/s", *map(present.duration, times)])
        count = formulas.elements(shapes) / 1e9
        parts.append(f"{name}, a GPT of {count:.2f} billion parameters:\n\n{markdown(['', *HOOKS.values()], lines)}")
    return (
        "### Bytes and time of a step, by formula\n\n"
        "A model, nothing of it measured. What a worker sends in a step is the payload above without headers; its time "
        f"is that by the rate of the link, and {formulas.LATENCY * 1e6:.0f} us for each of n - 1 messages in each half "
        "of a collective, one after the other (all-reduce and all-gather on a ring, all-to-all likewise). Every link "
        "has the same rate, both ways at once; nothing overlaps with backward, and casting, counting, adding and "
        "PowerSGD's products take no time. All gradients in one bucket.\n\n" + "\n\n".join(parts)
    )


def _size(sent: float) -> str:
    return f"{sent / 1e9:.3g} GB" if sent >= 1e9 else f"{sent / 1e6:.3g} MB"


def _loss(entry: Report) -> str:
    if entry["loss"] is None:
        return "diverged"
    if entry["loss"]["mean"] > UNIFORM:
        return f"fails ({min(entry['by_seed']):,.0f} .. {max(entry['by_seed']):,.0f})"
    return present.plus_minus(entry["loss"], digits=3)


def _training(report: Report, link: str) -> str:
    spec = report["problem"]
    lines = [
        [
            entry["label"],
            f"{entry['lr']:g}",
            _loss(entry),
            present.between(entry.get("minus_adamw"), form="+.3f") if key != "adamw" else "-",
        ]
        for key, entry in report["methods"].items()
    ]
    text = (
        f"{report['workers']} workers, simulated in one process with the kernels of the package: the example's GPT of "
        f'the preset "tiny" ({report["parameters"]:,} parameters), {spec["steps"]:,} steps, batches of '
        f"{spec['batch_size']} x {spec['model']['block_size']} bytes for each worker, weight decay "
        f"{spec['weight_decay']:g}, no clipping, a tenth of linear warm-up, then a cosine to 0. Each row has "
        "a rate of its own, searched with a seed that enters no "
        "result among 1, 2, 3 and 6 times powers of ten until both neighbours of the best were tried. "
        f"{spec['seeds']} seeds, the same for all rows; ± is half of the 95 % confidence interval (Student's t), in "
        f"brackets that of differences paired by seed. {_where(report)}; {report['finished_runs']} of "
        f"{report['expected_runs']} planned runs, {report['core_hours']:.1f} core-hours. Momentum is 0.9 where there "
        "is one: of each worker before the vote, or after it in `SignAdamPP` and `MSGD`. Without one after it, "
        "`SignSGD` steps by the vote itself."
    )
    table = markdown(["", "lr", "validation loss", "minus AdamW"], lines)
    parts = [f"### Training on votes\n\n{text}\n\n{table}\n\n![losses]({link}/convergence.png)"]
    if report["attacks"]:
        parts.append(_attacks(report))
    return "\n\n".join(parts)


def _attacks(report: Report) -> str:
    cells: dict[tuple[str, float], dict[int, str]] = {}
    for entry in report["attacks"].values():
        votes = entry["method"].startswith("majority")
        factors = [entry["factor"]] if entry["adversaries"] or votes else [-1.0, -10.0]
        for factor in factors:
            cells.setdefault((entry["label"], factor), {})[entry["adversaries"]] = _loss(entry)
    lines = []
    for (label, factor), row in cells.items():
        sends = "the opposite" if factor == -1 else f"{-factor:g} times the opposite"
        lines.append([label, sends, *(row.get(k, "") for k in (0, 1, 2))])
    n = report["workers_attacked"]
    text = (
        f"{n} workers, of which none, 1 or 2 send the opposite of what their gradients say: a vote for the other sign "
        "or, where gradients are averaged, minus their gradient, also 10 times as large. (A vote reads the sign, so "
        "that a factor is nothing to it; adversaries' momenta are of their negated gradients.) Rates are those found "
        f"for {report['workers']} honest workers. A run fails that ends above {UNIFORM:.2f}, the loss of a model that "
        "knows nothing; in brackets its losses over seeds."
    )
    header = ["final validation loss", "an adversary sends", "none", f"1 of {n}", f"2 of {n}"]
    return f"### With adversaries\n\n{text}\n\n{markdown(header, lines)}"
