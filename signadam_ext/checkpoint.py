"""State as checkpoints hold it: portable, whatever the backend, the storage form and the layout in memory.

A moment is a tensor of the parameter's shape: fp32, bf16, or int8 codes with their kind and levels said beside it. A
packed moment has the same keys in memory, where the tensor is a buffer of bytes.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import checks, storage
from .random_bits import MOMENT_BITS, random_bits
from .storage import BF16, BLOCK8, FORMS, FP32, Form

#: What may lie beside a parameter, by its name in the state.
BESIDE_DTYPES = {
    name: tuple(dtype for other, dtype in storage.BESIDE.values() if other == name)
    for name, _ in storage.BESIDE.values()
}

#: Added to the step whose random bits a conversion uses: those of the step itself have decided what is converted.
CONVERSION = 1 << 32


@dataclass(frozen=True)
class Layout:
    """How one parameter's state is to be stored.

    Attributes:
        label: what errors call the parameter.
        param: the parameter.
        moments: form of each moment, by name.
        weights: form of the parameter, as :func:`storage.effective_weights` gives it.
        gate: name of what the threshold is made of, or None.
    """

    label: str
    param: Tensor
    moments: Mapping[str, Form]
    weights: str
    gate: str | None


@functools.cache  # one string for all parameters
def kind_key(name: str) -> str:
    return f"{name}_kind"


@functools.cache
def levels_key(name: str) -> str:
    return f"{name}_levels"


def said_beside(name: str, form: Form) -> dict[str, Any]:
    """What the state holds beside a moment, so that it can be read without its optimizer."""
    said: dict[str, Any] = {}
    if form.packed:
        said[kind_key(name)] = form.kind
    if form.levels is not None:
        said[levels_key(name)] = form.levels
    return said


def export(layout: Layout, state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state as a checkpoint holds it."""
    return {name: export_entry(layout, state, name) for name in state}


def export_entry(layout: Layout, state: Mapping[str, Any], name: str) -> Any:
    """One entry of it. A packed moment becomes a tensor of the parameter's shape, one byte or two for each element."""
    form = layout.moments.get(name)
    if form is None or not form.packed:
        return state[name]
    numel = layout.param.numel()
    if form is BLOCK8:
        return _shaped(storage.decode(form, state[name], numel).bfloat16(), layout.param)
    return _shaped(storage.codes_of(form, state[name], numel), layout.param)


def check(layout: Layout, saved: Mapping[str, Any]) -> None:
    """Raises unless a checkpoint's state fits the parameter.

    Raises:
        TypeError, ValueError: another shape or dtype, an unknown kind, codes beyond their levels, values that no
            bounded momentum has.
    """
    label, param = layout.label, layout.param
    for name, form in layout.moments.items():
        if name in saved:
            _check_moment(f"state {name!r} of {label}", name, form, saved, param)
    for name, dtypes in BESIDE_DTYPES.items():
        if name in saved:
            checks.state_tensor(f"state {name!r} of {label}", saved[name], param.shape, dtypes)
    if layout.gate is not None and layout.gate in saved:
        checks.gate(label, layout.gate, saved[layout.gate])
        checks.gate_value(label, layout.gate, saved[layout.gate])
    checks.step_count(label, saved.get("step", 0))


def _check_moment(label: str, name: str, form: Form, saved: Mapping[str, Any], param: Tensor) -> None:
    kind = saved.get(kind_key(name))
    if kind is None:
        checks.state_tensor(label, saved[name], param.shape, (torch.float32, torch.bfloat16))
        value = saved[name]
        # A momentum of signs exceeds 1 by rounding errors at the most.
        if form.levels is not None and value.numel() and not bool((value.abs().amax() <= 1.0001).item()):
            raise ValueError(f"{label} has entries beyond 1 or NaN: no momentum of signs has, and codes cannot hold it")
        return
    source = FORMS[checks.one_of(f"{kind_key(name)} of {label}", kind, FORMS)]
    if form is BLOCK8 and source.levels is not None:
        raise ValueError(f"{label} is {kind}, codes of a bounded momentum: must be fp32, bf16 or {BLOCK8.kind}")
    if source is BLOCK8:
        checks.state_tensor(label, saved[name], param.shape, (torch.bfloat16,))
        if bool(saved[name].isinf().any()):
            raise ValueError(f"{label} has infinite entries: its exponents are corrupted")
        return
    if not source.packed:
        raise ValueError(f"{kind_key(name)} of {label} is {kind!r}: that kind is said by the dtype alone")
    checks.state_tensor(label, saved[name], param.shape, (torch.int8,))
    levels = saved.get(levels_key(name), source.levels)
    if levels != source.levels:
        raise ValueError(f"{levels_key(name)} of {label} is {levels!r}: must be {source.levels} for {kind}")
    if saved[name].numel():
        low, high = saved[name].aminmax()
        if low < -levels or high > levels:
            raise ValueError(f"{label} has codes from {low} to {high}: must be from {-levels} to {levels}")


def adopt(layout: Layout, saved: Mapping[str, Any], seed: int, number: int) -> tuple[dict[str, Any], list[str]]:
    """A checkpoint's state as this optimizer keeps it, on the parameter's device, and what changed its precision.

    A moment of the same kind keeps its bits. Another kind is converted, where fewer bits are left by stochastic
    rounding, so that the expectation stays.
    """
    param, changes = layout.param, []
    adopted: dict[str, Any] = {}
    ours = {f(name) for name in layout.moments for f in (str, kind_key, levels_key)} | {"param_low", "master_param"}
    for name, value in saved.items():
        if name in ours:
            continue
        if isinstance(value, Tensor):
            value = value.detach().to("cpu" if name == "step" else param.device, copy=True)
        adopted[name] = value
    t = int(float(saved.get("step", 0)))
    for (name, form), own_bits in zip(layout.moments.items(), MOMENT_BITS, strict=False):
        if name not in saved:
            continue
        value = saved[name].detach().to(param.device)
        kind = saved.get(kind_key(name))
        source = FORMS[kind] if kind is not None else BF16 if value.dtype == torch.bfloat16 else FP32
        flat = _flat(value, param)
        if source is form and not form.packed:
            adopted[name] = _shaped(flat, param)
        elif source is form and form.levels is not None:
            adopted[name] = storage.pack(form, flat)
        else:
            m = flat.float() if source.levels is None else flat.float() / torch.tensor(float(source.levels))
            if form.levels is not None:
                m = m.clamp(-1.0, 1.0) * form.levels
            r = own_bits(random_bits(seed, number, t + CONVERSION, 0, param.numel(), param.device))
            stored = storage.encode(form, m, r)
            adopted[name] = stored if form.packed else _shaped(stored, param)
            exact = source is form and torch.equal(
                storage.decode(form, stored, param.numel()).nan_to_num(), flat.float().nan_to_num()
            )
            if not exact:
                changes.append(f"{name}: {source.kind} to {form.kind}")
        adopted.update(said_beside(name, form))
    changes += _adopt_weights(layout, saved, adopted)
    return adopted, changes


def _adopt_weights(layout: Layout, saved: Mapping[str, Any], adopted: dict[str, Any]) -> list[str]:
    """What lies beside the parameter, converted between the split forms and a master copy."""
    param, weights = layout.param, layout.weights
    low, master = saved.get("param_low"), saved.get("master_param")
    found = low if master is None else master
    if found is None:
        return []
    was = "master" if low is None else "split16" if low.dtype == torch.int16 else "split8"
    flat = _flat(found.detach().to(param.device), param)
    if weights == was or weights == "master":
        # Low bits become a master copy at the first step: the parameter may not have been loaded yet.
        adopted["param_low" if was != "master" else "master_param"] = _shaped(flat, param)
        return []
    change = f"weights: {was} to {weights}"
    if weights not in storage.BESIDE:
        return [change]
    if was == "split8":
        adopted["param_low"] = _shaped(flat.to(torch.int16) * 256, param)
        return []
    if was == "split16":
        adopted["param_low"] = _shaped((flat.int() + 128 >> 8).clamp(-128, 127).to(torch.int8), param)
        return [change]
    high = torch.empty(flat.shape, dtype=torch.bfloat16, device=flat.device)
    beside = torch.empty(flat.shape, dtype=storage.BESIDE[weights][1], device=flat.device)
    half = torch.full(flat.shape, 1 << 15, device=flat.device)  # to nearest, where 8 bits are cut off
    storage.store_param(weights, flat, half, high, beside)
    adopted["param_low"] = _shaped(beside, param)
    return [change] if weights == "split8" else []


def _flat(value: Tensor, param: Tensor) -> Tensor:
    """The elements of a tensor of the parameter's shape, in the parameter's memory order."""
    like = torch.empty_like(param, device="meta")
    return storage.flat(value if checks.same_strides(value, like.stride()) else storage.restrided(value, param))


def _shaped(flat: Tensor, param: Tensor) -> Tensor:
    """The reverse, as a tensor of its own."""
    like = torch.empty_like(param, device="meta")
    shaped = torch.empty_strided(param.shape, like.stride(), dtype=flat.dtype, device=flat.device)
    storage.flat(shaped).copy_(flat)
    return shaped


_HEAD = "optimizer"


@contextlib.contextmanager
def writer(path: str | os.PathLike[str]) -> Iterator[zipfile.ZipFile]:
    """A zip file that takes its name when it is complete, so that an interrupted write leaves the old file."""
    path = os.fspath(path)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=os.path.basename(path) + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                yield archive
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_head(archive: zipfile.ZipFile, head: dict[str, Any]) -> None:
    with archive.open(_HEAD, "w") as member:
        torch.save(head, member)


def read_head(archive: zipfile.ZipFile) -> dict[str, Any]:
    return _read(archive, _HEAD)


def write_entries(archive: zipfile.ZipFile, number: int, entries: Iterable[tuple[str, Any]]) -> None:
    """One member of the file for each entry of a parameter's state."""
    for name, value in entries:
        with archive.open(f"state/{number}/{name}", "w", force_zip64=True) as member:
            torch.save(value, member)


def read_entries(archive: zipfile.ZipFile, number: int) -> dict[str, Any]:
    """A parameter's entries, read from a file one tensor at a time."""
    prefix = f"state/{number}/"
    names = [name for name in archive.namelist() if name.startswith(prefix)]
    return {name.removeprefix(prefix): _read(archive, name) for name in names}


def _read(archive: zipfile.ZipFile, name: str) -> Any:
    with archive.open(name) as member:
        return torch.load(io.BytesIO(member.read()), map_location="cpu", weights_only=True)
