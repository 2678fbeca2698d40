"""Writes the pages of committed results, and the figures of the README and of docs/results.md, and nothing by hand:

python -m bench.summary [--check]
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from bench import predicted, readme, scaling
from bench.comm import pages as comm
from bench.committed import (
    CONVERGENCE,
    EXAMPLES,
    LARGE_MODEL,
    RESULTS,
    ROOT,
    TRAININGS,
    cell,
    large_model_log,
    training,
    without_gpu,
)
from experiments.convergence.figures import PICTURES
from experiments.convergence.methods import REFERENCES
from experiments.convergence.summary import page as convergence_page
from reporting import machine, present
from reporting.files import write
from reporting.pages import replaced
from signadam_ext.core.renamed import value_today


def _overview(report: present.Report, device: str) -> str:
    """Our optimizers on one device: speed against AdamW and, in brackets, bytes against the stream's."""
    rows = [row for row in present.measured(report) if row["device"] == device]
    groups = present.workloads(rows)
    columns = [(shapes, dtype) for _, shapes, dtype in groups]
    ours = dict.fromkeys(
        (row["optimizer"], row["backend"]) for row in rows if row["backend"] in ("cpu", "cuda", "triton")
    )
    lines = []
    for optimizer, backend in ours:
        found = [
            present.find(report, optimizer=optimizer, backend=backend, shapes=shapes, dtype=dtype, device=device)
            for shapes, dtype in columns
        ]
        lines.append([f"`{optimizer}`" if backend == "cpu" else f"`{optimizer}` ({backend})", *map(cell, found)])
    return present.markdown(["", *(f"{shapes}, {present.HALF[dtype]}" for shapes, dtype in columns)], lines)


def _section(report: present.Report, folder: str) -> str:
    machine, versions = report["machine"], report["versions"]
    gpu = machine["gpu"]
    title = gpu["name"] if gpu else f"{machine['cpu']}, {machine['cores']} cores"
    driver = f", driver {gpu['driver']}" if gpu else ""
    parts = [
        f"**{title}** (torch {versions['torch']}{driver}, module of commit {present.built_at(report)}, "
        f"{report['date'][:10]})",
        "Speed against torch's fused AdamW on fp32 parameters; in brackets GB/s of the step and of the in-place stream "
        "`a.add_(b)` in the same rounds.\nMedians over interleaved rounds."
        f" Quartiles, baselines and versions: [{report['name']}]({folder}/{report['name']}.md).",
        _overview(report, "cuda" if gpu else "cpu"),
    ]
    if rows := report.get("whole_steps"):
        parts.append(
            "Whole training steps of the example, without clipping, where the optimizer is a small part:\n\n"
            f"{present.whole_steps(rows)}"
        )
    if not gpu and (aims := present.aims(report)):
        parts.append(aims)
    if (RESULTS / f"{report['name']}.png").exists():
        parts.append(f"![{report['name']}: speed by workload]({folder}/{report['name']}.png)")
    return "\n\n".join(parts)


def block(results: Path = RESULTS, folder: str = "../bench/results") -> str:
    """Speed of every optimizer; links go to `folder`."""
    reports = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    cpu = [report for report in reports if not report["machine"]["gpu"]]
    gpu = [report for report in reports if report["machine"]["gpu"]]
    parts = [_section(report, folder) for report in cpu] or [f"CPU: {present.NOT_MEASURED}."]
    parts += [_section(report, folder) for report in gpu] or [f"GPU: {present.NOT_MEASURED}."]
    return "\n\n".join(parts)


def memory(folder: Path = RESULTS / "memory") -> str:
    """Measured bytes per parameter of each configuration, and what is live beside 16-bit weights."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        measured = [row for row in report["rows"] if "per_parameter" in row]
        lines = []
        for row in sorted(measured, key=lambda row: -_resident(row)):
            storage = value_today("param_storage", row["weights"], warns=False)  # of results before it was renamed
            own, source = row["per_parameter"], f" ({row['source']})" if row["source"] != "ours" else ""
            form = ", ".join(
                filter(None, (*(row["options"].get(x) for x in ("second_moment", "confidence")), row["state"], storage))
            )
            lines.append(
                [
                    f"{row['optimizer']}{source}{', ' if form else ''}{form}{', one tensor' * (row['tensors'] == 1)}",
                    row["param"],
                    row["gradients"],
                    *(f"{own[part]:.2f}" for part in ("weights", "state", "gradients")),
                    f"{_resident(row):.2f}",
                    f"{own['peak']:.2f}" if own.get("peak") else present.NOT_MEASURED,
                ]
            )
        beside = [
            f"{found['native']['per_parameter']:.4f} with {found['tensors']} tensor{'s' * (found['tensors'] > 1)}"
            for found in report["headline"]
            if found["gradients"] == "all"
        ]
        shown = f"{report['machine']['cpu']}, module of commit {present.built_at(report)}, {report['date'][:10]}"
        header = [
            "bytes per parameter",
            "parameters",
            "gradients",
            "weights",
            "state",
            "gradients",
            "sum",
            "peak of a step",
        ]
        parts.append(
            f"Measured ({shown}). Live beside the bf16 weights with 2-bit momentum and no gradients, tables and other "
            f"native allocations included, at 16M parameters: {', '.join(beside)}."
        )
        if path.with_suffix(".png").exists():
            parts.append(f"![bytes per parameter]({_link(path.with_suffix('.png'))})")
        parts.append(
            f"<details><summary>All configurations</summary>\n\n{present.markdown(header, lines)}\n\n</details>"
        )
    return "\n\n".join(parts) or f"Bytes per parameter: {present.NOT_MEASURED}."


def rules(folder: Path = RESULTS / "rules") -> str:
    """Every rule over one large fp32 tensor, in bytes per second against the stream."""
    report = without_gpu(folder)
    rows = [row for row in report["rows"] if row["backend"] == "cpu"]
    lines = [
        [f"`{row['optimizer']}`", "{median:.2f} ({low:.2f} .. {high:.2f})".format(**row["to_stream"])]
        for row in sorted(rows, key=lambda row: -float(row["to_stream"]["median"]))
    ]
    return (
        f"Every rule over one fp32 tensor of {rows[0]['elements']:,} elements: bytes per second of a step, each input "
        "read and each output written once, against those of the in-place stream in the same rounds, with quartiles; "
        f"{report['machine']['cpu']}, {report['machine']['cores']} cores, module of commit "
        f"{present.built_at(report)}, {report['date'][:10]}. [All figures]({_link(folder)}/{report['name']}.md).\n\n"
        f"<details><summary>All rules</summary>\n\n{present.markdown(['', 'of the stream'], lines)}\n\n</details>"
    )


def instructions(folder: Path = RESULTS / "instructions") -> str:
    """Instructions of the few-bit forms, which bound them where memory does not."""
    parts = []
    for path in sorted(folder.glob("cpu-*.json")):
        report = json.loads(path.read_text())
        counts = [
            f"{row['per_16_elements']:.0f} for {row['state']} ({row['share_random_bits']:.0%} of them random bits)"
            for row in report["rows"]
            if row["weights"] == "stochastic" and row["state"] != "fp32"
        ]
        parts.append(
            "Few-bit steps are bound by arithmetic as much as by memory. AVX2 instructions for 16 elements with "
            f"stochastic bf16 weights, by callgrind: {', '.join(counts)}. An fp32 step takes "
            f"{report['fp32_per_16_elements']:.0f}, with statistics {report['fp32_observed_per_16_elements']:.0f} "
            f"([all]({_link(path)})). A whole step of SignAdamPP on fp32 tensors of 64 elements, Python included, "
            f"takes {' and '.join(_whole_step(row) for row in report['steps'])}."
        )
    return "\n\n".join(parts) or f"Instructions per element: {present.NOT_MEASURED}."


def _whole_step(row: present.Row) -> str:
    if row["tensors"] == 1:
        return f"{row['per_step']:,} instructions where there is one"
    return f"{row['per_step']:,}, {row['per_step'] / row['tensors']:,.0f} for each, where there are {row['tensors']:,}"


def _resident(row: present.Row) -> float:
    return float(sum(row["per_parameter"][part] for part in ("weights", "state", "gradients")))


def large_model() -> str:
    """The run of the 7-billion-parameter example, from its log."""
    start, steps = large_model_log()
    losses = [line["loss"] for line in steps]
    seconds = median(line["seconds"] for line in steps)
    peak = max(line["peak_bytes"] for line in steps)
    machine, tokens = start["machine"], start["options"]["tokens"]
    parts = [
        f"{start['parameters']:,} parameters on {machine['cpu']}, {machine['cores']} cores, {machine['ram_gib']} GiB, "
        f"module of commit {present.built_at(start)}, {start['date'][:10]}: {len(losses)} steps of {tokens} bytes of "
        f"text, {seconds:.0f} s each (median), loss {sum(losses[:5]) / 5:.2f} over the first five steps and "
        f"{sum(losses[-5:]) / 5:.2f} over the last five, peak memory {peak / 1e9:.2f} GB "
        f"([log]({_link(LARGE_MODEL)})).",
        f"![loss and memory]({_link(LARGE_MODEL.with_suffix('.png'))})",
    ]
    return "\n\n".join(parts)


def example(folder: Path = EXAMPLES) -> str:
    """The run of the example that trains a GPT: its table and its picture."""
    report = json.loads((folder / "train_gpt.json").read_text())
    config, runs = report["config"], report["runs"]
    (first, *_) = runs.values()
    parameters = first["state_bytes"] / first["state_bytes_per_parameter"]
    lines = [
        [
            name,
            f"{run['lr']:g}",
            f"{run['val_loss']:.3f}",
            f"{run['bits_per_byte']:.3f}",
            f"{run['state_bytes_per_parameter']:.2f}",
        ]
        for name, run in runs.items()
    ]
    header = ["", "lr", "validation loss", "bits per byte", "state B/param"]
    return (
        f"A GPT of {parameters / 1e6:.2f}M parameters, {config['steps']} steps, seed {config['seed']}; torch "
        f"{report['versions']['torch']}, module of commit {present.built_at(report)}.\n\n"
        f"{present.markdown(header, lines)}\n\n![losses]({_link(folder / 'train_gpt.png')})"
    )


def convergence() -> str:
    """Final losses of every method, with paired differences, from the collected runs."""
    parts = [
        "± is half of the 95 % confidence interval of the mean over seeds (Student's t); in brackets stand the "
        "intervals of differences paired by seed. All rows of a table have the same seeds. Each row has a rate of its "
        "own, searched on 1, 2, 3 and 6 times powers of ten with a seed that enters no result, until both neighbours "
        "of the best had been tried. Rows named by two dtypes are SignAdamPP with that state and those weights. The "
        "intervals are not corrected for their number."
    ]
    for name in TRAININGS:
        report = training(name)
        spec, where = report["problem"], report["environments"]
        commits = sorted({each["commit"][:12] for each in where})
        lines = [
            [
                method["label"],
                f"{method['state_bytes_per_parameter']:.2f}",
                f"{method['lr']:g}",
                present.plus_minus(method["loss"], digits=3),
                *(present.between(method["loss"].get(f"minus_{other}"), form="+.3f") for other in REFERENCES),
            ]
            for method in report["methods"].values()
        ]
        header = ["", "state B/param", "lr", "validation loss", "minus AdamW", "minus SignAdamPP in fp32"]
        clip = f", gradients clipped to a norm of {spec['clip']:g}" if spec["clip"] else ""
        parts += [
            f"### {report['title']}",
            f"{spec['seeds']} seeds, batches of {spec['batch_size']}, weight decay {spec['weight_decay']:g}{clip}; "
            f"{where[-1]['machine']['cpu']}, torch {where[-1]['versions']['torch']}, module of commit "
            f"{', '.join(commits)}; {report['finished_runs']} of {report['expected_runs']} planned runs, "
            f"{report['training_hours']:.1f} core-hours. [All figures]({_link(CONVERGENCE)}/{name}.md).",
            present.markdown(header, lines),
            *(f"![{alt}: {name}]({_link(CONVERGENCE)}/{name}-{picture}.png)" for picture, alt in PICTURES.items()),
        ]
    return "\n\n".join(parts)


def _link(path: Path) -> str:
    """As docs/results.md names it."""
    return f"../{path.relative_to(ROOT).as_posix()}"


#: What stands between the markers of each name, by page.
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "glance": readme.glance,
        "quality": readme.quality,
        "recipe": readme.recipe,
        "memory": readme.memory,
        "speed": readme.speed,
    },
    "docs/results.md": {
        "bench": block,
        "rules": rules,
        "instructions": instructions,
        "predicted": predicted.table,
        "cuda_aims": predicted.aims,
        "memory": memory,
        "7b": large_model,
        "convergence": convergence,
        "comm": comm.block,
        "example": example,
    },
    "docs/scaling.md": {"sharded_memory": scaling.sharded_memory, "host_time": scaling.host_time},
    "docs/offload.md": {"offloaded_memory": scaling.offloaded_memory},
    "docs/voting.md": {"wire": scaling.wire},
}


def pages() -> dict[Path, str]:
    """Every page that is made from the committed results, as it should be."""
    found = {}
    for page, blocks in PAGES.items():
        text = (ROOT / page).read_text()
        for name, make in blocks.items():
            text = replaced(text, name, make())
        found[ROOT / page] = text
    for path in (*sorted(RESULTS.glob("*.json")), *sorted(RESULTS.glob("rules/*.json"))):
        report = json.loads(path.read_text())
        drawn = path.with_suffix(".png")
        found[path.with_suffix(".md")] = present.page(report, drawn.name if drawn.exists() else None)
    for name in TRAININGS:
        found[CONVERGENCE / f"{name}.md"] = convergence_page(name, training(name))
    return found


def require_commits() -> None:
    """Raises `machine.NotCommitted` for results of a module that this repository cannot give back."""
    for path in RESULTS.rglob("*.json"):
        report = json.loads(path.read_text())
        rows = report.get("executed", [])
        machine.require_commits({present.built_at(report), *(row["commit"] for row in rows if "commit" in row)})
    for name in TRAININGS:
        machine.require_commits(where["commit"] for where in training(name)["environments"])
    one_run = json.loads((EXAMPLES / "train_gpt.json").read_text())
    machine.require_commits([present.built_at(one_run), present.built_at(large_model_log()[0])])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail when a page is stale")
    options = parser.parse_args(arguments)
    require_commits()
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    if not options.check:
        for path, text in pages().items():
            write(path, text)
    elif stale:
        print(f"{', '.join(path.relative_to(ROOT).as_posix() for path in stale)}: stale; run python -m bench.summary")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
