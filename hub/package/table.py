"""What a launch reads, in Python alone: the table of its tensors, and the data of one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .core.formats import DTYPE_FORMATS, PARAM_STORAGES, Format
from .core.native import compiled as _C
from .core.random_bits import tensor_keys
from .core.rule import Rule
from .launch import launch_options


@dataclass(frozen=True)
class Entry:
    """One parameter and its state.

    Attributes:
        param, grad: dense, of the same shape and strides.
        moments: as ``forms`` say, in the order of the rule's.
        residual: what lies beside the parameter, or None.
        threshold_state: 0-dim float64 on the parameter's device, or None.
        scalars: by name, as doubles.
        seed, param_id, step: what the random bits of this step are made of.
    """

    param: Tensor
    grad: Tensor
    moments: tuple[Tensor, ...]
    residual: Tensor | None
    threshold_state: Tensor | None
    scalars: Mapping[str, float]
    seed: int
    param_id: int
    step: int


@dataclass(frozen=True)
class Kind:
    """What a kernel is compiled for: tensors of one launch have it in common."""

    rule: Rule
    device: torch.device
    dtype: torch.dtype
    grad_dtype: torch.dtype
    forms: tuple[Format, ...]
    param_storage: str


def addresses(entries: Sequence[Entry]) -> tuple[int, ...]:
    """Of all that a launch writes."""
    tensors = (x for e in entries for x in (e.param, *e.moments, e.residual, e.threshold_state))
    return tuple(0 if x is None else x.data_ptr() for x in tensors)


class Table:
    """The tensors of one launch, on their device. It serves until one of :func:`addresses` changes."""

    def __init__(self, kind: Kind, entries: Sequence[Entry]) -> None:
        from .triton_kernels.update import COLUMNS

        rows, chunks = [], []
        for i, entry in enumerate(entries):
            residual = 0 if entry.residual is None else entry.residual.data_ptr()
            moments = [x.data_ptr() for x in entry.moments] + [0] * (3 - len(entry.moments))
            row = dict.fromkeys(COLUMNS, 0) | {
                "param": entry.param.data_ptr(),
                "residual": residual,
                **dict(zip(("exp_avg", "exp_avg_sq", "aux"), moments, strict=True)),
                "threshold_state": 0 if entry.threshold_state is None else entry.threshold_state.data_ptr(),
                "numel": entry.param.numel(),
                "first_chunk": len(chunks),
                "aligned": int(all(x % 16 == 0 for x in (entry.param.data_ptr(), residual, *moments))),
            }
            rows.append([row[name] for name in COLUMNS])
            chunks += [i] * -(-entry.param.numel() // _C.CHUNK_SIZE)
        gathers = kind.rule.threshold_pass != "NONE"
        device = kind.device
        self.kind, self.chunks = kind, len(chunks)
        self.addresses = addresses(entries)
        self._entries = torch.tensor(rows, dtype=torch.int64).to(device)
        self._tensor_of_chunk = torch.tensor(chunks, dtype=torch.int32).to(device)
        self._sums = torch.empty(2 * len(chunks) if gathers else 1, dtype=torch.float64, device=device)
        self._arrivals = torch.zeros(len(entries) if gathers else 1, dtype=torch.int32, device=device)
        self._launches = _launches(kind)

    def step(self, entries: Sequence[Entry]) -> None:
        """Starts the kernels of a step of the entries that this table was made of."""
        from .triton_kernels.update import update

        if self.chunks == 0:
            return
        # Tensors of one group mostly have their scalars in common.
        sets: dict[tuple[float, ...], int] = {}
        scalars = [tuple(e.scalars.get(name, 0.0) for name in _C.SCALARS) for e in entries]
        indices = [sets.setdefault(each, len(sets)) for each in scalars]
        keys = [_signed(key) for e in entries for key in tensor_keys(e.seed, e.param_id, e.step)]
        grads = [e.grad.data_ptr() if e.grad.numel() else 0 for e in entries]
        device = self.kind.device
        arguments = (
            self._entries,
            self._tensor_of_chunk,
            torch.tensor(grads, dtype=torch.int64).to(device),
            torch.tensor(keys, dtype=torch.int32).to(device),
            torch.tensor(indices, dtype=torch.int32).to(device),
            torch.tensor(list(sets), dtype=torch.float64).to(device),
            self._sums,
            self._arrivals,
            self._sums,
        )
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for constants in self._launches:
                update[(self.chunks,)](*arguments, **constants)


def _signed(word: int) -> int:
    """A word of 32 bits as the int32 with the same bits."""
    return word - (1 << 32) if word >> 31 else word


def _launches(kind: Kind) -> list[dict[str, Any]]:
    """The constants of each launch of a step: a threshold of the step's own gradients takes one before the update."""
    from .triton_kernels import rules

    moments = [form.number for form in kind.forms] + [DTYPE_FORMATS[torch.float32]] * 3
    constants: dict[str, Any] = {
        "RULE": getattr(rules, kind.rule.name),
        "MOMENTS": len(kind.rule.moments),
        "PARAM": DTYPE_FORMATS[kind.dtype],
        "GRAD": DTYPE_FORMATS[kind.grad_dtype],
        "EXP_AVG": moments[0],
        "EXP_AVG_SQ": moments[1],
        "AUX": moments[2],
        "READS_VARIANCE": False,
        "PARAM_STORAGE": PARAM_STORAGES[kind.param_storage],
        "CONFIDENCE": None,
        "OBSERVES": False,
        "RUNS": False,
        "SCALE": None,
    }
    own = kind.rule.threshold_pass
    launches = []
    for name in ("PASS_BEFORE", "NONE") if own == "PASS_BEFORE" else (own,):
        of_pass = {**constants, "THRESHOLD_PASS": getattr(_C.ThresholdPass, name).value}
        launches.append(of_pass | launch_options(of_pass, nvidia=torch.version.hip is None))
    return launches
