"""What was measured, where and with what: `python -m reporting.machine` prints it as JSON."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# What programs write from measurements: a change there is no change of what is measured.
WRITTEN = (
    "bench/results",
    "experiments/results",
    "tests/results",
    "README.md",
    "docs/results.md",
    "experiments/README.md",
)


def _output(*command: str) -> str | None:
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        if match := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return match[1].strip()
    return platform.processor() or platform.machine()


def _gpu() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "driver": driver.splitlines()[0] if driver else "unknown",
    }


def _build() -> Any:
    """What the compiled module says of itself, or why it cannot."""
    try:
        from signadam_ext.core.native import compiled as _C

        return {**_C.build_info(), "cpu_capability": _C.cpu_capability()}
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def commit() -> str:
    """The commit, marked when files other than results and READMEs differ from it."""
    sha = _output("git", "rev-parse", "HEAD")
    if sha is None:
        return os.environ.get("SIGNADAM_COMMIT", "unknown")
    changed = _output("git", "status", "--porcelain", "--", ".", *(f":!{path}" for path in WRITTEN))
    return sha + ("+changes" if changed else "")


class NotCommitted(RuntimeError):
    """A result was made by code that no commit of this repository holds."""


def require_commits(commits: Iterable[str | None]) -> None:
    """Raises `NotCommitted` for a commit that is unknown, is marked as changed, or is not one of this repository's.

    A clone without the history knows of few commits, and is not asked.
    """
    shallow = _output("git", "rev-parse", "--is-shallow-repository") != "false"
    for sha in sorted({commit or "unknown" for commit in commits}):
        known = shallow or _output("git", "cat-file", "-e", f"{sha}^{{commit}}") is not None
        if sha == "unknown" or sha.endswith("+changes") or not known:
            raise NotCommitted(
                f"a result was made by {sha}, which git cannot give back. Commit first, build the module from a clean "
                "tree, and measure again."
            )


def facts() -> dict[str, Any]:
    import torch

    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "gpu": _gpu(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
            "triton": _version("triton"),
            "signadam_ext": _build(),
        },
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def command(module: str, arguments: list[str]) -> str:
    """The command line to repeat a run, with folders outside the repository named by their last part only."""
    shown = (Path(argument).name if argument.startswith("/") else argument for argument in arguments)
    return shlex.join(["python", "-m", module, *shown])


def slug(machine: dict[str, Any]) -> str:
    """A file name for the machine: `cpu-amd-epyc`, `gpu-nvidia-h200`."""
    kind, name = ("gpu", machine["gpu"]["name"]) if machine["gpu"] else ("cpu", machine["cpu"])
    name = re.sub(r"\((r|tm)\)|\b(cpu|processor)\b|@.*|\d+-core", " ", name.lower())
    return f"{kind}-" + re.sub(r"[^a-z0-9]+", "-", name).strip("-")


if __name__ == "__main__":
    print(json.dumps(facts()))
