"""Instructions an element that a GPU has executed, beside those predicted: `python -m bench.executed`.

Nsight Compute counts them, in a step of each case of bench/results/instructions over some hundred full chunks. Where
there is no ``ncu``, or where it may not read the counters, that is said, and nothing is measured.
"""

import argparse
import csv
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from reporting.machine import ROOT
from signadam_ext.core.native import compiled as _C

from .committed import RESULTS

CHUNKS = 512
WARP = 32
METRICS = {
    "smsp__inst_executed.sum": "instructions",
    "dram__bytes.sum": "bytes",
    "gpu__time_duration.sum": "nanoseconds",
}


def predicted(backend: str) -> list[dict[str, Any]]:
    """The committed rows, one a launch; none where no figures are committed."""
    path = RESULTS / "instructions" / f"{backend}-sm_90.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["executed"] if path.exists() else []
    return rows


def take_steps(backend: str) -> None:
    """The second step of each predicted case, between the marks that the profiler starts and stops at."""
    sys.path.insert(0, str(ROOT / "tests"))
    launches = importlib.import_module("support.launches")
    elements = CHUNKS * _C.CHUNK_SIZE
    for name in dict.fromkeys(row["case"] for row in predicted(backend)):
        case = launches.CASES[name]
        param = torch.nn.Parameter(torch.randn(elements, device="cuda").to(case.dtype))
        param.grad = torch.randn(elements, device="cuda").to(case.dtype)
        param.grad_variance = torch.rand(elements, device="cuda")  # type: ignore[attr-defined]
        optimizer = case.optimizer([param], backend=backend, **case.hyperparameters)
        if case.observes:
            optimizer.observe()
        optimizer.step()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        optimizer.step()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def launches_of(text: str) -> list[dict[str, float]]:
    """What ``ncu --csv --print-units base`` says of each launch, in order."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(lines[begin:]):
        if (name := METRICS.get(row["Metric Name"])) is not None:
            found.setdefault(row["ID"], {})[name] = float(row["Metric Value"].replace(",", ""))
    return list(found.values())


def beside(rows: Sequence[dict[str, Any]], measured: Sequence[dict[str, float]], elements: int) -> list[dict[str, Any]]:
    """Predicted and executed instructions an element, bytes an element, and the time of each launch."""
    return [
        {
            "case": row["case"],
            "kernel": row["kernel"],
            "predicted": row["instructions"],
            "executed": round(own["instructions"] * WARP / elements, 1),
            "bytes": round(own["bytes"] / elements, 2),
            "seconds": own["nanoseconds"] / 1e9,
        }
        for row, own in zip(rows, measured, strict=True)
    ]


def count(backend: str, ncu: str, seconds: float) -> list[dict[str, Any]] | str:
    """Rows, or why there are none."""
    rows = predicted(backend)
    if not rows:
        return "no predicted figures are committed"
    # Other kernels of a step, as copies of its data, are torch's.
    command = [
        ncu,
        "--csv",
        "--print-units",
        "base",
        "--profile-from-start",
        "off",
        "--kernel-name",
        "regex:^(kernel|update)",
    ]
    command += ["--kernel-name", "regex:^(kernel|update)", "--metrics", ",".join(METRICS)]
    steps = [sys.executable, "-m", "bench.executed", "--steps", backend]
    try:
        done = subprocess.run([*command, *steps], cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"ncu took more than {seconds:.0f} s"
    measured = launches_of(done.stdout)
    if len(measured) != len(rows):
        said = [line for line in (done.stdout + done.stderr).splitlines() if "ERR" in line or "Error" in line]
        return f"ncu tells of {len(measured)} launches of {len(rows)}: {said[-1] if said else done.returncode}"
    return beside(rows, measured, CHUNKS * _C.CHUNK_SIZE)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", choices=("cuda", "triton"), help="take the steps that ncu watches")
    parser.add_argument("--seconds", type=float, default=40, help="of each backend")
    parser.add_argument("--ncu", default=shutil.which("ncu"), help="Nsight Compute, where it is not on PATH")
    options = parser.parse_args(arguments)
    if options.steps:
        take_steps(options.steps)
        return 0
    found: dict[str, Any] = {}
    for backend in ("cuda", "triton"):
        rows = count(backend, options.ncu, options.seconds) if options.ncu else "no ncu"
        found[backend] = {"not_measured": rows} if isinstance(rows, str) else {"rows": rows}
    print(json.dumps({"executed": found}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
