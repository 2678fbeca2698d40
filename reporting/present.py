"""A report as a table, a picture and a page. Reads plain JSON: needs neither torch nor the package."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from reporting import files

Report = dict[str, Any]
Row = dict[str, Any]

NOT_MEASURED = "not measured yet"
HALF = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class Aim(NamedTuple):
    """What an optimizer is to reach on two CPU cores."""

    optimizer: str
    dtype: str
    shapes: str
    metric: str
    floor: float
    aim: float
    text: str


_LARGE, _SMALL = "1 x 50000000", "1000 x 64"
_INT8, _INT2 = "SignAdamPP int8 stochastic", "SignAdamPP int2 stochastic"
_BLOCK_INT8 = "Signum int8 stochastic"
# Whose aims are bytes/s against the stream: of 16-bit parameters, and of thresholds and statistics in either width.
_HALF = {
    "SignAdamPP": 0.95,
    "SignSGD": 0.9,
    "SignAdamPP bf16 stochastic": 0.95,
    _INT8: 0.9,
    "SignAdamPP int4 stochastic": 0.8,
    _INT2: 0.8,
    _BLOCK_INT8: 0.7,
}
_GATHERING = {
    "SignAdamPP adaptive": 0.85,
    "SignAdamPP adaptive_delayed": 0.85,
    "SignAdamPP sparsity": 0.85,
    "SignAdamPP, with statistics()": 0.8,
}
_OTHERS = (
    "SignAdam",
    "Signum",
    "SignSGD",
    "MSGD",
    "SVAG",
    "MSVAG",
    "MSVAG minibatch",
    "AdamStar",
    "AdamStar without momentum",
    "AdamStar minibatch",
    "AdamW",
    "AdamW amsgrad",
    "Lion",
)
AIMS = (
    Aim("SignAdamPP", "float32", _LARGE, "to_stream", 0.95, 0.97, "fp32, 50M elements, bytes/s against the stream"),
    Aim("SignAdamPP", "float32", _LARGE, "to_adamw", 1.4, 1.5, "fp32, 50M elements, speed against AdamW"),
    Aim("SignAdamPP", "float32", _SMALL, "to_adamw", 15, 20, "fp32, 1000 tensors of 64, against AdamW"),
    Aim(_INT8, "bfloat16", _LARGE, "to_adamw", 2.0, 2.5, "bf16, int8 momentum, 50M, against AdamW"),
    Aim(_INT2, "bfloat16", _LARGE, "to_adamw", 1.8, 2.3, "bf16, int2 momentum, 50M, against AdamW"),
    Aim(_BLOCK_INT8, "bfloat16", _LARGE, "to_adamw", 2.0, 2.0, "bf16, Signum with int8 momentum, 50M, against AdamW"),
    *(Aim(name, "float32", _LARGE, "to_stream", 0.93, 0.93, f"{name}, bytes/s against the stream") for name in _OTHERS),
    *(
        Aim(name, dtype, _LARGE, "to_stream", aim, aim, f"{name}, {HALF[dtype]}, bytes/s against the stream")
        for dtype, aims in (("bfloat16", _HALF), ("float32", _GATHERING))
        for name, aim in aims.items()
    ),
    Aim("AdamW", "float32", _LARGE, "to_adamw", 1.0, 1.0, "our AdamW, speed against torch's"),
    Aim("Lion", "float32", _LARGE, "to_adamw", 1.4, 1.4, "Lion, speed against AdamW"),
)


def verdict(spread: dict[str, float], floor: float, aim: float) -> str:
    """What the interval between the quartiles allows one to say."""
    if spread["low"] >= aim:
        return "aim"
    if spread["high"] < floor:
        return "no"
    if spread["low"] >= floor:
        return "floor" if spread["high"] < aim else "floor; aim open"
    return "open"


def built_at(report: Report) -> str:
    """The compiled module's commit: the code that was measured."""
    build = report["versions"]["signadam_ext"]
    return str(build["commit"]) if isinstance(build, dict) else "unknown"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table that also reads well as plain text: first column to the left, the others to the right."""
    cells = [list(header), *map(list, lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]

    def join(line: Sequence[str]) -> str:
        padded = (
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(map(join, [cells[0], rule, *cells[1:]]))


def duration(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.2f} us"


def ratio(spread: dict[str, float]) -> str:
    """The median with its quartiles."""
    return f"{number(spread['median'])} ({number(spread['low'])} .. {number(spread['high'])})"


def number(x: float) -> str:
    return f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:.0f}"


def between(interval: Row | None, scale: float = 1.0, form: str = "+.2f") -> str:
    """A mean with its interval: "-0.31 (-0.40 .. -0.22)"."""
    if interval is None or interval.get("mean") is None:
        return "-"
    if interval["low"] is None:
        return format(interval["mean"] * scale, form)
    mean, low, high = (format(interval[key] * scale, form) for key in ("mean", "low", "high"))
    return f"{mean} ({low} .. {high})"


def plus_minus(interval: Row, scale: float = 1.0, digits: int = 2) -> str:
    """A mean and half its interval, which is given as such or by its ends: "3.1 ± 0.2"."""
    mean = interval.get("mean")
    if mean is None:
        return "diverged"
    half = interval.get("half_width")
    if half is None and interval.get("high") is not None:
        half = interval["high"] - mean
    return f"{mean * scale:.{digits}f}" + (f" ± {half * scale:.{digits}f}" if half is not None else "")


def measured(report: Report) -> list[Row]:
    return [row for row in report["rows"] if "seconds" in row]


def workloads(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by device, shapes and dtype, in the order of measurement."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["device"], row["shapes"], row["dtype"]), []).append(row)
    return groups


def table(rows: Sequence[Row]) -> str:
    """One workload. Ratios are medians over rounds, with their quartiles."""
    host = any("host_seconds" in row for row in rows)
    header = ["optimizer", "backend", "B/param", "step", "GB/s", "stream's", "x stream", "x AdamW, fp32"]
    lines = []
    for row in rows:
        line = [
            row["optimizer"],
            row["backend"],
            f"{row['bytes_per_parameter']:g}",
            duration(row["seconds"]["median"]),
            number(row["gb_per_s"]),
            number(row["stream_gb_per_s"]),
            ratio(row["to_stream"]),
            ratio(row["to_adamw"]),
        ]
        if host:
            line.append(duration(row["host_seconds"]["median"]) if "host_seconds" in row else NOT_MEASURED)
        lines.append(line)
    return markdown([*header, *["host cost"] * host], lines)


def whole_steps(rows: Sequence[Row]) -> str:
    """Whole training steps, and what of them is the optimizer's."""
    base = next(row for row in rows if row["optimizer"] == "AdamW fused")
    lines = [
        [
            row["optimizer"],
            duration(row["seconds"]["median"]),
            duration(row["optimizer_seconds"]["median"]),
            f"{row['optimizer_seconds']['median'] / row['seconds']['median']:.1%}",
            f"{base['seconds']['median'] / row['seconds']['median']:.2f}",
        ]
        for row in rows
    ]
    return markdown(["fp32", "training step", "optimizer's part", "share", "x AdamW"], lines)


def tables(report: Report, level: str = "###") -> str:
    parts = []
    for (device, shapes, dtype), rows in workloads(measured(report)).items():
        first = rows[0]
        size = f"{first['tensors']} tensors, {first['elements'] / 1e6:.3g}M elements, {HALF[dtype]}, {device}"
        parts.append(f"{level} {shapes} ({size})\n\n{table(rows)}")
    return "\n\n".join(parts) or NOT_MEASURED


def find(report: Report, **wanted: str) -> Row | None:
    rows = measured(report)
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)


def aims(report: Report) -> str:
    """The project's aims beside what was measured; empty on a machine they do not speak of."""
    if report["machine"]["cores"] != 2:
        return ""
    lines = []
    for aim in AIMS:
        row = find(report, optimizer=aim.optimizer, backend="cpu", dtype=aim.dtype, shapes=aim.shapes)
        got = row[aim.metric] if row else None
        reached = verdict(got, aim.floor, aim.aim) if got else "-"
        lines.append([aim.text, f"{aim.floor:g}", f"{aim.aim:g}", ratio(got) if got else NOT_MEASURED, reached])
    table = markdown(["two CPU cores; SignAdamPP unless named", "floor", "aim", "measured", "reached"], lines)
    return (
        'Aims that were set beforehand. "aim" and "floor": the lower quartile reaches it. "no": the upper one is below '
        f'the floor. "open": the quartiles lie on both sides.\n\n{table}'
    )


def _machine(report: Report) -> str:
    machine, versions = report["machine"], report["versions"]
    gpu = machine["gpu"]
    lines = [f"- CPU: {machine['cpu']}, {machine['cores']} cores, {machine['ram_gib']} GiB"]
    if gpu:
        lines.append(f"- GPU: {gpu['name']}, {gpu['memory_gib']} GiB, driver {gpu['driver']}")
    shown = (f"{name} {value}" for name, value in versions.items() if isinstance(value, str | int))
    lines.append(f"- Versions: {', '.join(shown)}")
    if isinstance(build := versions["signadam_ext"], dict):
        cuda = f"CUDA {build['cuda']} for {build['cuda_architectures']}" if build["cuda"] else "no CUDA"
        about = (build["compiler"], cuda, f"CPU kernels {build['cpu_capability']}")
        lines.append(f"- Built: signadam_ext {build['version']}, {', '.join(about)}")
    lines.append(f"- Module of commit {built_at(report)}, {report['date']}")
    return "\n".join([*lines, f"- `{report['command']}`"])


def disturbance(report: Report) -> str:
    """How much of the machine other programs had, and whether the figures can be trusted."""
    shares = [row["other_programs"] for row in measured(report) if row.get("other_programs") is not None]
    if not shares:
        return f"CPU time taken by other programs: {NOT_MEASURED}."
    middle, most = median(shares), max(shares)
    once = max(row.get("other_programs_most") or 0.0 for row in measured(report))
    text = (
        f"CPU time taken by other programs: {middle:.0%} in the median of all measurements, {most:.0%} in the most "
        f"disturbed one, {once:.0%} in a single pass at most."
    )
    return text if most < 0.1 else f"{text} **The machine was not quiet: do not publish these figures.**"


def _in_flight(found: dict[str, Any] | None) -> str:
    if not found or "kernels" not in found:
        return f"{NOT_MEASURED}: {found['not_measured'] if found else 'the stage did not finish'}"
    header = ["kernel", "registers", "shared B", "local B", "resident warps", "B/thread", "KiB/SM", "MiB/GPU"]
    lines = [
        [
            f"`{k['kernel']}`",
            str(k["registers"]),
            str(k["shared_bytes"]),
            str(k["local_bytes"]),
            f"{k['resident_warps']} of {k['max_warps']}",
            f"{'' if k['all_paths'] else 'at least '}{k['bytes_per_thread']}",
            f"{k['bytes_per_multiprocessor'] / 1024:.0f}",
            f"{k['bytes_per_device'] / 2**20:.1f}" if k["bytes_per_device"] else "no GPU",
        ]
        for k in found["kernels"]
    ]
    source = f"From the machine code ({found['arch']}): resident warps x 32 x bytes under way per thread."
    return f"{source}\n\n{markdown(header, lines)}"


def _host(rows: Sequence[Row]) -> str:
    """What a step costs beside the memory that it moves."""
    lines = [
        [
            row["backend"],
            str(row["tensors"]),
            duration(row["first_seconds"]),
            f"{duration(row['host_seconds']['median'])} "
            f"({duration(row['host_seconds']['low'])} to {duration(row['host_seconds']['high'])})",
            "" if row["kernel_seconds"] is None else duration(row["kernel_seconds"]),
            "" if row["step_bytes"] is None else f"{row['step_bytes']:,}",
            {True: "in the kernel's parameters", False: "by a copy", None: ""}[row["in_parameters"]],
        ]
        for row in rows
    ]
    header = ["backend", "tensors", "first step", "host", "kernels", "bytes of step data", "which travel"]
    return (
        "Steps of SignAdamPP over tensors of 64 elements: the first with all that is loaded, compiled and planned (the "
        "first row of a backend has most of it); the host's time of a call that waits for no device (median, "
        f"quartiles); the kernels' own time by the profiler.\n\n{markdown(header, lines)}"
    )


def _executed(found: dict[str, Row]) -> str:
    """Predicted beside executed instructions, by backend."""
    parts = []
    for backend, told in found.items():
        if "rows" not in told:
            parts.append(f"{backend}: {NOT_MEASURED}, {told['not_measured']}.")
            continue
        lines = [
            [
                f"`{row['case']}`",
                row["kernel"],
                f"{row['predicted']:.1f}",
                f"{row['executed']:.1f}",
                f"{row['bytes']:.2f}",
                duration(row["seconds"]),
            ]
            for row in told["rows"]
        ]
        header = ["step", "kernel", "predicted", "executed", "bytes of DRAM", "took"]
        parts.append(f"{backend}, an element:\n\n{markdown(header, lines)}")
    return "\n\n".join(parts)


def page(report: Report, picture: str | None = None) -> str:
    parts = [f"# Benchmark: {report['name']}", _machine(report)]
    if stages := report.get("stages"):
        lines = [[s["name"], s["status"], f"{s['seconds']:.0f} s", s["detail"]] for s in stages]
        parts.append("## Stages\n\n" + markdown(["stage", "outcome", "took", "detail"], lines))
    if text := aims(report):
        parts.append(f"## Aims\n\n{text}")
    parts.append(
        "## Throughput\n\nEvery round runs the candidate beside the in-place stream `a.add_(b)` (fp32, 12 bytes per"
        " element) and torch's fused AdamW on fp32 parameters\nof the same shapes; the candidates of a workload take"
        " turns in several passes. Ratios are medians over rounds with their quartiles; above 1 is faster.\nAgainst the"
        " stream they compare bytes per second; it is a yardstick and no limit, which steps of several arrays can pass."
        " AdamW fused also runs as a\ncandidate on fp32 parameters: how far it is from 1.00 says how closely to read"
        " the others."
    )
    parts.append(disturbance(report))
    if picture:
        parts.append(f"![speed by workload]({picture})")
    parts.append(tables(report))
    if rows := report.get("whole_steps"):
        first = rows[0]
        about = f"the example's GPT, {first['parameters'] / 1e6:.2g}M parameters, {first['tokens']} tokens a step"
        parts.append(f"## Whole training steps\n\nOf {about}; optimizers take turns.\n\n{whole_steps(rows)}")
    if failed := [row for row in report["rows"] if "seconds" not in row]:
        lines = [
            [
                f"{row['optimizer']} ({row['backend']}, {row['case']}, {HALF[row['dtype']]}, {row['device']})",
                " ".join((row.get("error") or f"left out: {row['left_out']}").split()).replace("|", "/"),
            ]
            for row in failed
        ]
        parts.append("## Without a result\n\n" + markdown(["candidate", "why"], lines))
    if rows := report.get("host"):
        parts.append(f"## Host time, kernels and first steps\n\n{_host(rows)}")
    if executed := report.get("executed"):
        parts.append(f"## Instructions, predicted and executed\n\n{_executed(executed)}")
    if "in_flight" in report:
        parts.append("## Bytes in flight\n\n" + _in_flight(report["in_flight"]))
    return "\n\n".join(parts) + "\n"


def write(report: Report, out: Path) -> None:
    """NAME.json, .md and .png; JSON first: a failing picture loses only itself."""
    path = out / f"{report['name']}.json"
    text = json.dumps(report, indent=1)
    # One row a line: a hundred rows stay readable, and so do their changes.
    text = re.sub(r"\n {3,}", " ", text).replace("\n  }", " }")
    files.write(path, text + "\n")
    drawn: str | None = f"{report['name']}.png"
    try:
        if not picture(report, out / f"{report['name']}.png"):
            drawn = None
    except Exception as error:
        print(f"no picture: {type(error).__name__}: {error}", flush=True)
        drawn = None
    files.write(out / f"{report['name']}.md", page(report, drawn))


_COLORS = {
    "cpu": "#2563eb",
    "cuda": "#2563eb",
    "triton": "#7c3aed",
    "reference": "#93c5fd",
    "torch": "#9ca3af",
}


def picture(report: Report, path: Path) -> bool:
    """One line of panels per fp32 workload of the GPU, or of the CPU where there is none. False without results."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in measured(report) if row["dtype"] == "float32"]
    device = "cuda" if any(row["device"] == "cuda" for row in rows) else "cpu"
    groups = list(workloads(row for row in rows if row["device"] == device).values())
    if not groups:
        return False
    heights = [0.24 * len(group) + 1.2 for group in groups]
    figure, grid = plt.subplots(
        len(groups), 2, figsize=(13, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for (left, right), group in zip(grid, groups, strict=True):
        # A stream over as few bytes as many small tensors hold says nothing about a step that is bound by calls.
        if group[0]["elements"] < 1_000_000:
            _bars(left, group, "seconds", "milliseconds per step", scale=1e3)
        else:
            _bars(left, group, "to_stream", "bytes/s relative to the stream a.add_(b)")
            left.axvline(1, color="black", linewidth=0.8)
        _bars(right, group, "to_adamw", "speed relative to torch's fused AdamW", log=True)
        right.set_yticklabels([])
        left.set_title(f"{group[0]['shapes']}, fp32", loc="left", fontweight="bold")
    gpu = report["machine"]["gpu"]
    name = gpu["name"] if device == "cuda" else f"{report['machine']['cpu']}, {report['machine']['cores']} cores"
    figure.suptitle(f"{name}, torch {report['versions']['torch']} (median over rounds, whiskers between quartiles)")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _bars(axis: Any, rows: Sequence[Row], key: str, label: str, scale: float = 1.0, log: bool = False) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    shown = list(enumerate(rows))
    base = 1.0 if log else 0.0
    medians = [row[key]["median"] * scale for _, row in shown]
    if log:
        axis.set_xscale("log")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlim(min(*medians, 1.0) / 1.3, max(*medians, 1.0) * 1.6)
    else:
        axis.set_xlim(0, max(medians) * 1.3)  # one interrupted round must not squeeze the rest
    for (y, row), middle in zip(shown, medians, strict=True):
        axis.barh(y, middle - base, left=base, color=_COLORS[row["backend"]], height=0.7)
        whisker = [row[key]["low"] * scale, row[key]["high"] * scale]
        axis.plot(whisker, [y, y], color="black", linewidth=0.8, alpha=0.6)
        axis.text(1.01, y, number(middle), transform=axis.get_yaxis_transform(), va="center", fontsize=8)
    names = [row["optimizer"] + ("" if row["backend"] == "torch" else f" [{row['backend']}]") for row in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel(label)
    axis.spines[["top", "right"]].set_visible(False)
