"""What is predicted for GPUs, from machine code alone, until a GPU has measured it."""

import json
from pathlib import Path

from bench.committed import RESULTS
from reporting import present

INSTRUCTIONS = RESULTS / "instructions"
#: By which counts must differ to say that a backend is ahead: less is within what clocks and caches make of it.
AHEAD = 1.1


def _steps(path: Path) -> dict[str, list[present.Row]]:
    """The launches of a step of each case."""
    steps: dict[str, list[present.Row]] = {}
    if path.exists():
        for row in json.loads(path.read_text())["executed"]:
            steps.setdefault(row["case"], []).append(row)
    return steps


def _total(launches: list[present.Row]) -> float:
    return float(sum(row["instructions"] for row in launches))


def _told(launches: list[present.Row] | None) -> str:
    if launches is None:
        return ""
    return " + ".join(f"{row['instructions']:.1f} ({row['registers']}, {row['blocks']})" for row in launches)


def _fewer(cuda: list[present.Row] | None, triton: list[present.Row] | None) -> str:
    if cuda is None or triton is None:
        return ""
    if _total(cuda) > AHEAD * _total(triton):
        return "triton"
    return "cuda" if _total(triton) > AHEAD * _total(cuda) else "either"


def table(folder: Path = INSTRUCTIONS) -> str:
    """Executed instructions of both backends' kernels, and which a GPU may find faster."""
    cuda, triton = (_steps(folder / f"{backend}-sm_90.json") for backend in ("cuda", "triton"))
    if not triton:
        return f"Instructions of the GPU kernels: {present.NOT_MEASURED}."
    lines = [
        [f"`{case}`", _told(cuda.get(case)), _told(launches), _fewer(cuda.get(case), launches)]
        for case, launches in triton.items()
    ]
    header = ["step", "cuda", "triton", "fewer"]
    return (
        "Predicted, not measured on a GPU: instructions an element on the main path, from the machine code for sm_90, "
        "executed by an emulator (in brackets registers of a thread and blocks a multiprocessor; the parameters and "
        "the state that it leaves are those of the CPU backend). Where one backend has at least "
        f'{AHEAD - 1:.0%} fewer it is named. `backend="auto"` prefers `cuda`, and `triton` for scaled steps '
        f"(caution), until a GPU has confirmed that another is faster.\n\n{present.markdown(header, lines)}"
    )


#: Instructions an element that the CUDA kernels were to come down to, set beforehand: of a case's first launch.
AIMS = {
    "sign_adam_pp-fp32": 18,
    "sign_adam_pp-bf16": 27,
    "sign_sgd-bf16": 22,
    "adam-fp32": 50,
    "sign_adam-fp32": 48,
    "sign_adam_pp-bf16-stochastic-bf16": 44,
    "sign_adam_pp-bf16-stochastic-int8": 45,
    "sign_adam_pp-bf16-stochastic-int4": 46,
    "sign_adam_pp-bf16-stochastic-int2": 46,
    "sign_sgd-bf16-stochastic": 30,
    "signum-bf16-stochastic-int8": 66,
    "adam-bf16-stochastic-bf16": 86,
    "sign_adam_pp-delayed-fp32": 45,
    "sign_adam_pp-adaptive-fp32": 28,
    "sign_adam_pp-fp32-observed": 48,
}


def aims(folder: Path = INSTRUCTIONS) -> str:
    """The aims of the CUDA kernels beside what the committed figures say."""
    path = folder / "cuda-sm_90.json"
    if not path.exists():
        return f"Aims of the CUDA kernels: {present.NOT_MEASURED}."
    steps, report = _steps(path), json.loads(path.read_text())
    lines = []
    commits = {steps[case][0].get("commit", present.built_at(report)) for case in AIMS}
    for case, aim in AIMS.items():
        first = steps[case][0]
        reached = "yes" if first["instructions"] <= aim else "no"
        lines.append([f"`{case}`", str(aim), f"{first['instructions']:.1f}", str(first["blocks"]), reached])
    header = ["instructions an element, cuda", "aim", "executed", "blocks", "reached"]
    return (
        "Aims of the CUDA kernels that were set beforehand; of a case of two launches, the first. Module of commit "
        f"{', '.join(sorted(commits))}.\n\n{present.markdown(header, lines)}"
    )
