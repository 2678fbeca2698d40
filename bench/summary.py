"""Writes the pages of committed results, and the figures of the README and of docs/results.md, and nothing by hand:

python -m bench.summary [--check]
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import median

from reporting import machine, present
from reporting.pages import replaced
from signadam_ext.core.renamed import value_today

RESULTS = Path(__file__).resolve().parent / "results"
EXAMPLES = RESULTS.parent.parent / "examples" / "results"
EXPERIMENTS = RESULTS.parent.parent / "experiments" / "results"
ROOT = RESULTS.parent.parent


def _cell(row: present.Row | None) -> str:
    if row is None:
        return ""
    adamw = f"{present.number(row['to_adamw']['median'])}x"
    # Beside a stream of a few hundred KB a step over many small tensors is bound by calls, not by bytes.
    return adamw if row["elements"] < 1_000_000 else f"{adamw} ({row['gb_per_s']:.0f} of {row['stream_gb_per_s']:.0f})"


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
        lines.append([f"`{optimizer}`" if backend == "cpu" else f"`{optimizer}` ({backend})", *map(_cell, found)])
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
            f"Whole training steps of the example, where the optimizer is a small part:\n\n{present.whole_steps(rows)}"
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


def instructions(folder: Path = RESULTS / "instructions") -> str:
    """Instructions of the few-bit forms, which bound them where memory does not."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        counts = [
            f"{row['per_16_elements']:.0f} for {row['state']} ({row['share_random_bits']:.0%} of them random bits)"
            for row in report["rows"]
            if row["weights"] == "stochastic" and row["state"] != "fp32"
        ]
        parts.append(
            "Few-bit steps are bound by arithmetic as much as by memory. AVX2 instructions for 16 elements with "
            f"stochastic bf16 weights, by callgrind: {', '.join(counts)} ([all]({_link(path)}))."
        )
    return "\n\n".join(parts) or f"Instructions per element: {present.NOT_MEASURED}."


def _resident(row: present.Row) -> float:
    return float(sum(row["per_parameter"][part] for part in ("weights", "state", "gradients")))


def large_model(log: Path = EXAMPLES / "train_7b_in_18gb.jsonl") -> str:
    """The run of the 7-billion-parameter example, from its log."""
    if not log.exists():
        return f"The run: {present.NOT_MEASURED}."
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    start, steps = lines[0], {line["step"]: line for line in lines if "step" in line}
    losses = [steps[step]["loss"] for step in sorted(steps)]
    seconds = median(line["seconds"] for line in steps.values())
    peak = max(line["peak_bytes"] for line in steps.values())
    machine, tokens = start["machine"], start["options"]["tokens"]
    parts = [
        f"{start['parameters']:,} parameters on {machine['cpu']}, {machine['cores']} cores, {machine['ram_gib']} GiB, "
        f"module of commit {present.built_at(start)}, {start['date'][:10]}: {len(losses)} steps of {tokens} bytes of "
        f"text, {seconds:.0f} s each (median), loss {sum(losses[:5]) / 5:.2f} over the first five steps and "
        f"{sum(losses[-5:]) / 5:.2f} over the last five, peak memory {peak / 1e9:.2f} GB "
        f"([log](../examples/results/{log.name}))."
    ]
    if log.with_suffix(".png").exists():
        parts.append(f"![loss and memory](../examples/results/{log.stem}.png)")
    return "\n\n".join(parts)


def convergence(folder: Path = EXPERIMENTS / "convergence") -> str:
    """Final losses of every method, with paired differences, from the collected runs."""
    path = folder / "gpt.json"
    if not path.exists():
        return f"Comparison of storage forms in training: {present.NOT_MEASURED}."
    report = json.loads(path.read_text())
    lines = []
    for method in report["methods"].values():
        if "loss" not in method:
            continue
        loss = method["loss"]
        spread = f" ± {loss['sd']:.3f}" if loss["seeds"] > 1 else ""
        lines.append(
            [
                method["label"],
                f"{method['state_bytes_per_parameter']:.2f}",
                f"{method['lr']:g}",
                str(loss["seeds"]),
                f"{loss['mean']:.3f}{spread}",
                *(_difference(loss.get(f"minus_{other}")) for other in ("adamw", "sign_adam_pp")),
            ]
        )
    header = ["", "state B/param", "lr", "seeds", "validation loss", "minus AdamW", "minus SignAdamPP in fp32"]
    problem, environment = report["problem"], report["environments"][-1]
    tokens = problem["batch_size"] * problem["model"]["block_size"]
    shown = f"{environment['machine']['cpu']}, torch {environment['versions']['torch']}"
    finished = f"{report['finished_runs']} of {report['expected_runs']} planned runs are done"
    parts = [
        f"{report['title']}: {problem['steps']} steps of {tokens} bytes, the learning rate of each method searched on "
        f"the same grid ({shown}; {finished}). Differences are paired by seed, with 95 % confidence intervals. Rows "
        "named by two dtypes are SignAdamPP with that state and those weights. A short run of a small model: it says "
        f"nothing of long training. [All figures]({_link(folder)}/gpt.md).",
        present.markdown(header, lines),
    ]
    for picture in ("gpt-differences.png", "gpt-rates.png"):
        if (folder / picture).exists():
            parts.append(f"![{picture}]({_link(folder)}/{picture})")
    return "\n\n".join(parts)


def _difference(found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    interval = f" ({found['low']:+.3f} .. {found['high']:+.3f})" if "low" in found else ""
    return f"{found['mean']:+.3f}{interval}"


def _link(path: Path) -> str:
    """As docs/results.md names it."""
    return f"../{path.relative_to(ROOT).as_posix()}"


# The README


@cache
def _only(folder: Path) -> present.Report:
    """The one report of a folder that was made without a GPU."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    (report,) = [report for report in reports if not report["machine"]["gpu"]]
    return report


def _bytes(optimizer: str, state: str, weights: str = "", gradients: str = "all", source: str = "ours") -> present.Row:
    """Measured bytes per parameter of a configuration with bf16 parameters, on the model of many tensors."""
    wanted = {"optimizer": optimizer, "state": state, "weights": weights, "gradients": gradients, "source": source}
    wanted |= {"param": "bf16", "model": "gpt"}
    rows = [row for row in _only(RESULTS / "memory")["rows"] if "per_parameter" in row]
    own: present.Row = next(row for row in rows if all(row[key] == value for key, value in wanted.items()))
    return own["per_parameter"]


MIXED = ("AdamW", "fp32 masters and moments", "", "all", "torch")
FEW_BITS = ("SignAdamPP", "int2", "stochastic")


def _speed(optimizer: str, shapes: str, dtype: str) -> present.Row:
    row = present.find(_only(RESULTS), optimizer=optimizer, backend="cpu", shapes=shapes, dtype=dtype)
    assert row is not None, (optimizer, shapes, dtype)
    return row


def _example() -> tuple[dict[str, present.Row], str]:
    """The example's runs, and what they are."""
    found = json.loads((EXAMPLES / "train_gpt.json").read_text())
    runs: dict[str, present.Row] = found["runs"]
    parameters = runs["SignAdamPP"]["state_bytes"] / runs["SignAdamPP"]["state_bytes_per_parameter"]
    return runs, f"GPT of {parameters / 1e6:.1f}M, {found['config']['steps']} steps, one seed"


def glance() -> str:
    """What a visitor compares first: both methods, like with like."""
    gpt = json.loads((EXPERIMENTS / "convergence" / "gpt.json").read_text())
    losses = {name: gpt["methods"][name]["loss"] for name in ("sign_adam_pp_int2_stochastic", "adamw")}
    ours, theirs = _bytes(*FEW_BITS), _bytes(*MIXED)
    example, title = _example()
    step = _speed("SignAdamPP", "GPT-2 small", "float32")["to_adamw"]["median"]
    whole = {row["optimizer"]: row["seconds"]["median"] for row in _only(RESULTS)["whole_steps"]}
    steps = gpt["problem"]["steps"]
    lines = [
        [
            "bytes per parameter between steps: bf16 weights, 2-bit momentum; bf16 weights, fp32 masters and moments",
            *(f"{x['resident']:.2f}" for x in (ours, theirs)),
        ],
        ["the same with all gradients, in bf16", *(f"{x['resident'] + x['gradients']:.2f}" for x in (ours, theirs))],
        ["optimizer step of GPT-2 small, all in fp32: speed", f"{step:.2f}x", "1x (torch, fused)"],
        [
            "whole training step of the example, all in fp32",
            *(present.duration(whole[name]) for name in ("SignAdamPP", "AdamW fused")),
        ],
        [
            f"validation loss, GPT of {gpt['parameters'] / 1e6:.1f}M, {steps} steps, {losses['adamw']['seeds']} seeds: "
            "2-bit momentum and bf16 weights; all in fp32",
            *(f"{losses[name]['mean']:.3f}" for name in ("sign_adam_pp_int2_stochastic", "adamw")),
        ],
        [
            f"validation loss, the example's {title}, all in fp32",
            *(f"{example[name]['val_loss']:.3f}" for name in ("SignAdamPP", "AdamW")),
        ],
    ]
    return present.markdown(["", "SignAdamPP", "AdamW"], lines)


def quality() -> str:
    """Five comparisons: those that were won, and those that were lost."""
    lines = []
    for name, what in (("gpt", "validation loss"), ("digits", "validation loss")):
        report = json.loads((EXPERIMENTS / "convergence" / f"{name}.json").read_text())
        methods = [report["methods"][key] for key in ("adamw", "sign_adam_pp", "sign_adam_pp_int2_stochastic")]
        title = report["title"].split(" on ")[0].removeprefix("A byte-level ").removeprefix("A ")
        steps, seeds = report["problem"]["steps"], methods[0]["loss"]["seeds"]
        losses = [f"{method['loss']['mean']:.3f}" for method in methods]
        lines.append([f"{title}, {steps} steps, {seeds} seeds: {what}", *losses])
    example, title = _example()
    lines.append(
        [
            f"{title}: validation loss",
            *(f"{example[name]['val_loss']:.3f}" for name in ("AdamW", "SignAdamPP")),
            "-",
        ]
    )
    ablation = json.loads((EXPERIMENTS / "ablation.json").read_text())
    for name, title in (("lstm", "LSTM"), ("gpt", "GPT")):
        problem, methods = ablation["problems"][name], ablation["by_problem"][name]["methods"]
        pair = [methods[key] for key in ("adam", "sign_nogate_momentum")]
        losses = [f"{method['last_loss']['mean']:.3f}" for method in pair]
        size = f"{title} of {problem['parameters'] / 1000:.0f}k"
        lines.append([f"{size}, {problem['steps']} steps, {pair[0]['seeds']} seeds: test loss", *losses, "-"])
    return present.markdown(["lower is better", "Adam(W)", "SignAdamPP", "2-bit momentum, bf16"], lines)


def memory_short() -> str:
    """Bytes per parameter of what one would choose between, with bf16 parameters."""
    rows = {
        "AdamW, fp32 masters and moments": MIXED,
        "AdamW, 8-bit (torchao)": ("AdamW8bit", "8-bit, stochastic", "", "all", "torchao"),
        "AdamW, 8-bit (bitsandbytes)": ("AdamW8bit", "8-bit", "", "all", "bitsandbytes"),
        "SignAdamPP, 8-bit momentum, exact fp32 weights (`split16`)": ("SignAdamPP", "int8", "split16"),
        "SignAdamPP, 2-bit momentum": FEW_BITS,
        "the same, gradients released in backward": (*FEW_BITS, "released"),
    }
    lines = []
    for label, wanted in rows.items():
        own = _bytes(*wanted)
        lines.append([label, *(f"{own[part]:.2f}" for part in ("weights", "state", "gradients", "peak"))])
    table = present.markdown(["bytes per parameter", "weights", "state", "gradients", "peak of a step"], lines)
    return (
        f"{table}\n\nMeasured on {_bytes_model()}; the objects of each tensor, a few hundredths here, vanish on larger "
        f"models, and the peak is of the process. {_large_model_short()}"
    )


def _bytes_model() -> str:
    """The model of `_bytes`."""
    row = next(row for row in _only(RESULTS / "memory")["rows"] if row.get("model") == "gpt")
    return f"{row['elements'] / 1e6:.1f}M parameters in {row['tensors']} tensors"


def _large_model_short(log: Path = EXAMPLES / "train_7b_in_18gb.jsonl") -> str:
    """The same in a sentence."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    peak = max(line["peak_bytes"] for line in lines if "step" in line)
    machine = lines[0]["machine"]
    return (
        f"A [GPT of {lines[0]['parameters'] / 1e9:.1f} billion parameters](docs/results.md#7-billion-parameters) took "
        f"its steps within {peak / 1e9:.1f} GB, on {machine['cores']} cores and without a GPU."
    )


def speed_short() -> str:
    """Six optimizers on three models, all cells measured, with the stream's bandwidth beside."""
    columns = (("1 x 50000000", "float32"), ("GPT-2 small", "float32"), ("GPT-2 small", "bfloat16"))
    names = ("SignAdamPP", "SignAdamPP adaptive_delayed", "SignAdam", "SignAdam analytic", "Signum", "SignSGD")
    lines = [[f"`{name}`", *(_cell(_speed(name, shapes, dtype)) for shapes, dtype in columns)] for name in names]
    report = _only(RESULTS)
    machine = report["machine"]
    whole = {row["optimizer"]: row["seconds"]["median"] for row in report["whole_steps"]}
    note = (
        f"Speed of a step against torch's fused AdamW on fp32 parameters; {machine['cpu']}, {machine['cores']} cores "
        f"(module of commit {present.built_at(report)}, {report['date'][:10]}). In brackets GB/s of the step and of "
        "the in-place stream `a.add_(b)` in the same rounds, which a step of several arrays can pass. Part of the gain "
        "in bf16 is that of smaller weights."
    )
    after = (
        f"A whole training step of the example takes {present.duration(whole['SignAdamPP'])} with `SignAdamPP` and "
        f"{present.duration(whole['AdamW fused'])} with AdamW: memory, not speed, is the reason to use this "
        "package. [All figures](docs/results.md#speed)."
    )
    header = ["", *(f"{shapes}, {present.HALF[dtype]}" for shapes, dtype in columns)]
    return f"{note}\n\n{present.markdown(header, lines)}\n\n{after}"


#: What stands between the markers of each name, by page.
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"glance": glance, "quality": quality, "memory": memory_short, "speed": speed_short},
    "docs/results.md": {
        "bench": block,
        "instructions": instructions,
        "memory": memory,
        "7b": large_model,
        "convergence": convergence,
    },
}


def pages() -> dict[Path, str]:
    """Every page that is made from the committed results, as it should be."""
    found = {}
    for page, blocks in PAGES.items():
        text = (ROOT / page).read_text()
        for name, make in blocks.items():
            text = replaced(text, name, make())
        found[ROOT / page] = text
    for path in sorted(RESULTS.glob("*.json")):
        report = json.loads(path.read_text())
        drawn = path.with_suffix(".png")
        found[path.with_suffix(".md")] = present.page(report, drawn.name if drawn.exists() else None)
    return found


def require_commits() -> None:
    """Raises `machine.NotCommitted` for results of a module that this repository cannot give back."""
    for path in RESULTS.rglob("*.json"):
        machine.require_commits([present.built_at(json.loads(path.read_text()))])
    with (EXAMPLES / "train_7b_in_18gb.jsonl").open() as log:
        machine.require_commits([present.built_at(json.loads(log.readline()))])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail when a page is stale")
    options = parser.parse_args(arguments)
    require_commits()
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    if not options.check:
        for path, text in pages().items():
            path.write_text(text)
    elif stale:
        print(f"{', '.join(path.relative_to(ROOT).as_posix() for path in stale)}: stale; run python -m bench.summary")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
