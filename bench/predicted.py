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
        f'{AHEAD - 1:.0%} fewer it is named. `backend="auto"` prefers `cuda` for every form, until a GPU has '
        f"confirmed that another is faster.\n\n{present.markdown(header, lines)}"
    )
