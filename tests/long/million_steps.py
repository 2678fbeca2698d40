"""A million steps of three optimizers: memory that does not grow, and the same bits on every backend.

    python tests/long/million_steps.py --folder runs/steps --results tests/results/million_steps.json

Each optimizer trains with every instruction set of the CPU kernels, a process each, and for fewer steps with the
reference. Gradients depend on the weights, so a bit that differs once differs for good; digests of weights and state
are compared at powers of ten. Memory and objects of the process are noted after 10^4 steps and every tenth of the way
on. What is done is in the folder, and the next call does the rest; a folder that is empty begins with what the results
hold. Every run names the commit of its module.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]

CAPABILITIES = ("portable", "avx2", "avx512")
#: Steps after which everything that is made once has been made.
SETTLED = 10_000
#: Gradients before the weights' share: so many, in turns.
GRADIENTS = 61


def made(name: str, backend: str) -> tuple[list[Any], Any]:
    """Parameters and optimizer of a training."""
    import torch
    from torch.nn import Parameter

    import signadam_ext

    generator = torch.Generator().manual_seed(1)

    def params(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Parameter]:
        return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]

    fp32, bf16 = torch.float32, torch.bfloat16
    groups: list[dict[str, Any]]
    if name == "SignAdamPP":
        cls, options = signadam_ext.SignAdamPP, {"confidence": "adaptive", "beta": 0.9, "alpha": 0.5}
        groups = [
            {"params": params(fp32, (37, 5), (64,))},
            {"params": params(bf16, (33, 7)), "state_dtype": "int8", "param_storage": "stochastic"},
            {"params": params(bf16, (129,)), "state_dtype": "int4", "param_storage": "split8", "weight_decay": 0.01},
        ]
    elif name == "AdamW":
        cls, options = signadam_ext.AdamW, {"betas": (0.9, 0.999), "weight_decay": 0.01}
        groups = [
            {"params": params(fp32, (37, 5), (64,))},
            {"params": params(bf16, (33, 7)), "state_dtype": "int8", "param_storage": "master"},
        ]
    else:
        cls, options = signadam_ext.Lion, {"betas": (0.9, 0.99)}
        groups = [
            {"params": params(fp32, (37, 5), (64,))},
            {"params": params(bf16, (33, 7)), "state_dtype": "bf16", "param_storage": "split16", "maximize": True},
        ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer: Any = cls(groups, lr=1e-3, seed=7, backend=backend, **options)
    return [p for group in groups for p in group["params"]], optimizer


TRAININGS = ("SignAdamPP", "AdamW", "Lion")


def digest(params: list[Any], optimizer: Any) -> str:
    """Of the bits of weights and state."""
    import torch

    found = hashlib.sha256()
    for param in params:
        held = [(name, x) for name, x in sorted(optimizer.state[param].items()) if isinstance(x, torch.Tensor)]
        for name, value in (("param", param), *held):
            found.update(name.encode())
            found.update(value.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def resident() -> int:
    """Bytes of memory of this process, after what is no longer used has been given back."""
    import ctypes

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def marks(steps: int) -> Iterator[int]:
    """Where digests are taken."""
    mark = 10
    while mark < steps:
        yield mark
        mark *= 10
    yield steps


def train(name: str, backend: str, steps: int, out: Path) -> None:
    """One training, written down when it is over."""
    import torch

    from signadam_ext.core.native import compiled

    torch.set_num_threads(1)
    params, optimizer = made(name, backend)
    generator = torch.Generator().manual_seed(2)
    bank = [[torch.randn(p.shape, generator=generator).to(p.dtype) for p in params] for _ in range(GRADIENTS)]
    for param in params:
        param.grad = torch.zeros_like(param)
    digests: dict[str, str] = {}
    memory: list[dict[str, int]] = []
    wanted = set(marks(steps))
    every = max(steps // 10, SETTLED)
    began = time.perf_counter()

    def write(step: int) -> None:
        seconds = round(time.perf_counter() - began, 1)
        said = {"module": compiled.build_info()["commit"], "capability": compiled.cpu_capability(), "seconds": seconds}
        whole = {**said, "steps": step, "digests": digests, "memory": memory}
        out.write_text(json.dumps(whole, indent=1) + "\n")

    with torch.no_grad():
        for step in range(1, steps + 1):
            for param, noise in zip(params, bank[step % GRADIENTS], strict=True):
                torch.add(noise, param, alpha=0.1, out=param.grad)
            optimizer.step()
            if step in wanted:
                digests[str(step)] = digest(params, optimizer)
            if step == SETTLED or step % every == 0:
                held = resident()
                counts = {"objects": len(gc.get_objects()), "blocks": sys.getallocatedblocks()}
                memory.append({"step": step, "resident": held, **counts})
            if step in wanted or step % every == 0:
                write(step)


def supported(capability: str) -> bool:
    command = [sys.executable, "-c", "import signadam_ext._C as C; print(C.cpu_capability())"]
    environment = {**os.environ, "SIGNADAM_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0


def steps_of(out: Path) -> int:
    """How far a training has come."""
    return json.loads(out.read_text())["steps"] if out.exists() else 0


def grown(run: dict[str, Any]) -> dict[str, int]:
    """How much memory and objects a process has at its end beside what it had when it had settled."""
    first, last = run["memory"][0], run["memory"][-1]
    return {name: last[name] - first[name] for name in ("resident", "objects", "blocks")}


def faults(runs: dict[str, dict[str, Any]]) -> list[str]:
    """What should not be in the results."""
    found = []
    for name in {key.split(" ")[0] for key in runs}:
        digests: dict[str, set[str]] = {}
        for key, run in runs.items():
            if key.split(" ")[0] == name:
                for step, value in run["digests"].items():
                    digests.setdefault(step, set()).add(value)
        found += [f"{name}: other bits after {step} steps" for step, values in digests.items() if len(values) > 1]
    for key, run in runs.items():
        more = grown(run) if len(run["memory"]) > 1 else {}
        if more and (more["resident"] > 1 << 20 or more["objects"] > 20 or more["blocks"] > 1000):
            found.append(f"{key}: {more} more than after {SETTLED} steps")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--reference-steps", type=int, default=100_000)
    parser.add_argument("--trainings", nargs="*", default=TRAININGS, choices=TRAININGS)
    parser.add_argument("--folder", type=Path, required=True, help="where what is done is kept")
    parser.add_argument("--results", type=Path, help="write the whole there, with commit, versions and machine")
    parser.add_argument("--as-is", action="store_true", help="train no further; write what there is")
    parser.add_argument("--one", nargs=2, metavar=("TRAINING", "BACKEND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, backend = options.one
        train(name, backend, options.steps, options.folder)
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.results and options.results.exists():
        for key, run in json.loads(options.results.read_text())["runs"].items():
            out = options.folder / f"{key}.json"
            if not out.exists():
                out.write_text(json.dumps(run, indent=1) + "\n")
    runs: dict[str, dict[str, Any]] = {}
    ways = [("cpu", each, options.steps) for each in CAPABILITIES if supported(each)]
    for backend, capability, steps in (*ways, ("reference", "", options.reference_steps)):
        for name in options.trainings:
            key = f"{name} {capability or backend} {steps}"
            out = options.folder / f"{key}.json"
            if not options.as_is and steps_of(out) < steps:
                command = [
                    sys.executable,
                    __file__,
                    "--one",
                    name,
                    backend,
                    "--steps",
                    str(steps),
                    "--folder",
                    str(out),
                ]
                environment = {**os.environ, **({"SIGNADAM_CPU_CAPABILITY": capability} if capability else {})}
                subprocess.run(command, env=environment, check=True)
            if not out.exists():
                continue
            runs[key] = run = json.loads(out.read_text())
            print(key, f"{run['steps']} steps in {run['seconds']} s", grown(run) if run["memory"] else "", flush=True)
    found = faults(runs)
    print("\n".join(found) or f"{len(runs)} runs: the same bits, and no growth")
    if options.results:
        from reporting.machine import facts

        options.results.write_text(json.dumps({**facts(), "faults": found, "runs": runs}, indent=1) + "\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
