"""The tables of docs/scaling.md, docs/offload.md and docs/voting.md.

Memory by `signadam_ext.memory`, bytes on the wire by formula.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.comm import formulas
from bench.committed import RESULTS
from reporting import present
from signadam_ext import memory
from signadam_ext.memory import Estimate

#: Parameters of models that people know, by name.
MODELS = {"1B": 10**9, "7B": 7 * 10**9, "70B": 70 * 10**9}
GPUS = (1, 8, 64)
#: Of all parameters, those of the largest tensor, which is what released gradients need at once.
LARGEST_SHARE = 1 / 50

ROWS: dict[str, Callable[[int], Estimate]] = {
    "AdamW, bf16 parameters with fp32 copies and moments": lambda n: memory.adamw([(n,)], "bf16", mixed=True),
    "`AdamW`, bf16 parameters and moments, stochastic": lambda n: memory.estimate(
        [(n,)], "AdamW", param_dtype="bf16", param_storage="stochastic", state_dtype="bf16"
    ),
    "`SignAdamPP`, bf16 parameters, 2-bit momentum": lambda n: memory.estimate(
        [(n,)], "SignAdamPP", param_dtype="bf16", param_storage="stochastic", state_dtype="int2"
    ),
    "the same, gradients released in backward": lambda n: memory.estimate(
        [(n,)],
        "SignAdamPP",
        param_dtype="bf16",
        param_storage="stochastic",
        state_dtype="int2",
        gradients="released",
        largest=int(n * LARGEST_SHARE),
    ),
}


def sharded_memory() -> str:
    """GB on each GPU, everything divided evenly, by model and number of GPUs."""
    header = ["GB on each GPU", *(f"{name}, {gpus} GPU{'s' * (gpus > 1)}" for name in MODELS for gpus in GPUS)]
    lines = [
        [name, *(_gigabytes(make(numel).total / gpus) for numel in MODELS.values() for gpus in GPUS)]
        for name, make in ROWS.items()
    ]
    return present.markdown(header, lines)


#: What is offloaded in docs/offload.md, of bf16 parameters.
OFFLOADED: dict[str, tuple[str, dict[str, Any]]] = {
    "`AdamW`, fp32 moments and master copies": ("AdamW", {"param_storage": "master"}),
    "`AdamW`, 8-bit and bf16 moments, `split16`": (
        "AdamW",
        {"state_dtype": ("int8", "bf16"), "param_storage": "split16"},
    ),
    "`Lion`, 8-bit momentum, `split8`": ("Lion", {"state_dtype": "int8", "param_storage": "split8"}),
    "`SignAdamPP`, 2-bit momentum, `split8`": ("SignAdamPP", {"state_dtype": "int2", "param_storage": "split8"}),
    "`SignAdamPP`, 2-bit momentum, stochastic": ("SignAdamPP", {"state_dtype": "int2", "param_storage": "stochastic"}),
}


def offloaded_memory() -> str:
    """Bytes for each parameter on the GPU and on the host, by optimizer."""
    header = ["", "state", "GPU, not offloaded", "GPU, offloaded", "GPU, `release=True`", "host"]
    lines = []
    for name, (optimizer, options) in OFFLOADED.items():
        found = memory.estimate([(1 << 20,)], optimizer, param_dtype="bf16", **options)
        # The host has a copy of the weights and room for all gradients: what the GPU has where nothing is offloaded.
        counts = (found.state, found.total, found.weights + found.gradients, found.weights, found.total)
        lines.append([name, *(f"{found.each(nbytes):.2f}" for nbytes in counts)])
    return present.markdown(header, lines)


def _gigabytes(nbytes: float) -> str:
    value = nbytes / 1e9
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


#: Hooks of which docs/voting.md tells.
WIRE = ("allreduce", "bf16", "mean", "majority")


def wire() -> str:
    """GB that each worker sends in a step, by model and number of workers."""
    workers = (2, 8, 64, 1024)
    header = ["GB sent by each worker in a step", *(f"{name}, {n} workers" for name in ("1B", "7B") for n in workers)]
    lines = [
        [
            formulas.HOOKS[hook],
            *(_gigabytes(sum(formulas.payload(hook, [(MODELS[name],)], n))) for name in ("1B", "7B") for n in workers),
        ]
        for hook in WIRE
    ]
    return present.markdown(header, lines)


def host_time(folder: Path = RESULTS / "sharded_step") -> str:
    """What DTensors add to the host's part of a step."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        ratios = [
            f"{row['to_plain']['median']:.2f} ({row['to_plain']['low']:.2f} to {row['to_plain']['high']:.2f}) with "
            f"{row['tensors']} tensors of {row['size']}"
            for row in report["rows"]
        ]
        parts.append(
            "Reading DTensors takes the host longer than reading plain tensors, which shows where they are small. A "
            f"step under FSDP2 on one process, over the same step on plain tensors: {', '.join(ratios)} (median and "
            f"quartiles of ratios; {report['optimizer']}; {report['machine']['cpu']}, torch "
            f"{report['versions']['torch']}, module of commit {present.built_at(report)})."
        )
    return "\n\n".join(parts) or f"Host time of a step on DTensors: {present.NOT_MEASURED}."
