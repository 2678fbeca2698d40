"""State as checkpoints hold it: portable, whatever the backend, the storage form and the layout in memory.

A moment is a tensor of the parameter's shape: fp32, bf16, or int8 codes with the numbers of their kind and levels
beside it. A packed moment has the same keys in memory, where the tensor is a buffer of bytes, uint8, in the memory
order that its ``..._order`` says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..core import checks, formats, memory_order, shards, tensors
from ..core.formats import BF16, BLOCK8, FORMATS, FORMATS_BY_NUMBER, FP32, Format
from ..core.random_bits import MOMENT_BITS, shard_bits
from ..core.shard_index import WHOLE, ShardIndex
from ..core.shards import Sharding

#: What may lie beside a parameter, by its name in the state.
RESIDUAL_DTYPES = {
    name: tuple(dtype for other, dtype in formats.RESIDUALS.values() if other == name)
    for name, _ in formats.RESIDUALS.values()
}

#: Of the number of steps in the state: a 0-dim tensor on the CPU.
STEP_DTYPE = torch.float64

#: Moments of all methods, torch.optim's among them where nothing else tells that an optimizer has made a state.
MOMENTS = (
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "exp_avg_slow",
    "param_avg",
    "momentum_buffer",
    "exp_avg_var",
    "z",
    "last_grad",
)

#: A parameter's own elements, while it holds those of evaluation.
TRAINED = "y"

#: What no momentum of signs exceeds.
SIGNS = 1.0

#: Added to the step whose random bits a conversion uses: those of the step itself have decided what is converted.
CONVERSION = 1 << 32


@dataclass(frozen=True)
class Layout:
    """How one parameter's state is to be stored.

    Attributes:
        label: what errors call the parameter.
        param: the parameter, its part on this rank, or its copy on the host.
        moments: form of each moment, by name.
        param_storage: how the parameter is stored, as :func:`formats.effective_param_storage` gives it.
        threshold_state: name of what the threshold is made of, or None.
        bound: what no entry of the first moment exceeds, or None.
        codes_bound: what codes of the first moment in a checkpoint stand for at their largest, or None.
        uses_step: whether the rule computes with the number of steps.
        starts_as_param: name of the moment that is a copy of the parameter at first, or None.
        has_modes: whether evaluation puts an average in the parameter's place, and state keeps its own elements.
        owner: the parameter as the optimizer has it, where ``param`` is another tensor, or None.
        sharding: how it is spread over ranks, or None.
    """

    label: str
    param: Tensor
    moments: Mapping[str, Format]
    param_storage: str
    threshold_state: str | None
    bound: float | None = None
    codes_bound: float | None = None
    uses_step: bool = False
    starts_as_param: str | None = None
    has_modes: bool = False
    owner: Tensor | None = None
    sharding: Sharding | None = None

    @property
    def key(self) -> Tensor:
        """The parameter as the optimizer has it."""
        return self.param if self.owner is None else self.owner

    @property
    def shard(self) -> ShardIndex:
        """Where the elements of ``param`` lie in the whole parameter."""
        return WHOLE if self.sharding is None else self.sharding.index


@functools.cache  # one string for all parameters
def kind_key(name: str) -> str:
    return f"{name}_kind"


@functools.cache
def levels_key(name: str) -> str:
    return f"{name}_levels"


@functools.cache
def order_key(name: str) -> str:
    return f"{name}_order"


#: Keys of what is said beside a moment.
TAGS = (kind_key, levels_key, order_key)

#: What an optimizer keeps in a parameter's state. Other entries are a user's.
OPTIMIZERS_OWN = frozenset(
    ("step", *RESIDUAL_DTYPES, *MOMENTS, *(key(moment) for key in TAGS for moment in MOMENTS)),
)


def moment_tags(name: str, form: Format, param: Tensor) -> dict[str, int]:
    """What the state holds beside a moment, so that it can be read without its optimizer."""
    said: dict[str, int] = {}
    if form.packed:
        said[kind_key(name)] = form.number
    if form.levels is not None:
        said[levels_key(name)] = form.levels
    if form.packed:
        said[order_key(name)] = memory_order.order_of(param.shape, memory_order.strides_of(param))
    return said


def stated_format(label: str, name: str, state: Mapping[str, Any]) -> Format | None:
    """The form that ``..._kind`` says of a moment, a number or in older checkpoints a string; None where none is said.

    Raises:
        TypeError, ValueError: no packed form.
    """
    kind = state.get(kind_key(name))
    if kind is None:
        return None
    shown = f"{kind_key(name)} of {label}"
    if isinstance(kind, str):
        form = FORMATS[checks.one_of(shown, kind, FORMATS)]
    else:
        found = FORMATS_BY_NUMBER.get(checks.whole_number(shown, kind))
        if found is None:
            known = ", ".join(f"{form.number} ({form.kind})" for form in FORMATS.values() if form.packed)
            raise ValueError(f"{shown} is {checks.shown(kind)}: must be one of {known}")
        form = found
    if not form.packed:
        raise ValueError(f"{shown} is {checks.shown(kind)}: that kind is said by the dtype alone")
    return form


def stated_order(label: str, name: str, state: Mapping[str, Any], param: Tensor) -> int:
    """The memory order in which a packed moment's codes lie; the parameter's own where none is said.

    Raises:
        TypeError, ValueError: no order of the parameter's dimensions.
    """
    order = state.get(order_key(name))
    if order is None:
        return memory_order.order_of(param.shape, memory_order.strides_of(param))
    shown = f"{order_key(name)} of {label}"
    found = checks.whole_number(shown, order)
    try:
        memory_order.strides_in_order(param.shape, found)
    except ValueError as error:
        raise ValueError(f"{shown} is {found}, but {error}") from None
    return found


def is_packed(form: Format, value: Any) -> bool:
    """Whether a moment of a packed form is as in memory, and not as checkpoints hold it."""
    return form.packed and isinstance(value, Tensor) and value.dtype == torch.uint8


def real(label: str, value: Any) -> Any:
    """A tensor whose numbers are in memory: ``value``, or a copy of one that says how to compute them.

    Raises:
        TypeError, ValueError: a tensor that has no memory of its own, or less than it says.
    """
    if not isinstance(value, Tensor):
        return value
    if value.layout == torch.strided and value._is_zerotensor():
        return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    tensors.strided(label, value)
    return copied(value) if value.is_neg() else value


def copied(value: Tensor) -> Tensor:
    """A dense copy with memory of its own and the dimensions in the same order."""
    strides = memory_order.strides_of(value)
    return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device).copy_(value)


def realized(layout: Layout, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A checkpoint's state, in which tensors have their numbers in memory."""
    if not isinstance(saved, Mapping):
        raise TypeError(f"the state of {layout.label} is a {type(saved).__name__}: must be a dict")
    return {
        name: real(f"state {name!r} of {layout.label}", part_of(layout, name, value)) for name, value in saved.items()
    }


def part_of(layout: Layout, name: str, value: Any) -> Any:
    """This rank's part of an entry that a checkpoint has whole, or as a DTensor; anything else as it is.

    Raises:
        ValueError: a tensor of another shape than the parameter's, or over another mesh.
    """
    sharding = layout.sharding
    if sharding is None or not isinstance(value, Tensor) or not _is_spread(layout, name):
        return value
    return shards.aligned(f"state {name!r} of {layout.label}", value, sharding)


def _is_spread(layout: Layout, name: str) -> bool:
    """Whether an entry is a tensor of the parameter's shape, in a checkpoint, and so is sharded as it is."""
    return name in layout.moments or name in RESIDUAL_DTYPES or (layout.has_modes and name == TRAINED)


def export(layout: Layout, state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state as a checkpoint holds it; of a sharded one with DTensors of the whole parameter's shape.

    Raises:
        TypeError, ValueError: a packed moment of a parameter that has another size now, an offloaded one for example.
    """
    exported = {name: export_entry(layout, state, name) for name in state}
    if layout.sharding is not None:
        for name, value in exported.items():
            if isinstance(value, Tensor) and _is_spread(layout, name) and not shards.is_sharded(value):
                exported[name] = layout.sharding.whole(value)
    return exported


def export_entry(layout: Layout, state: Mapping[str, Any], name: str) -> Any:
    """One entry of it. A packed moment becomes a tensor of the parameter's shape, one byte or two for each element."""
    value = state[name]
    if name in layout.moments:
        # As the state says itself: its group may have been changed since.
        form = stated_format(layout.label, name, state) or layout.moments[name]
        if is_packed(form, value):
            return _exported(layout, name, form, state)
    for moment in layout.moments:
        if name == kind_key(moment) and value is not None:
            said = stated_format(layout.label, moment, state)
            return said and said.number
    return checks.plain(value)


def written_entry(layout: Layout, state: Mapping[str, Any], name: str) -> Any:
    """One entry as a file holds it, which must have the numbers themselves.

    Raises:
        TypeError, ValueError: as :func:`export_entry`, and for a tensor of the optimizer's own without its memory.
    """
    value = export_entry(layout, state, name)
    if (
        isinstance(value, Tensor)
        and type(value) not in (Tensor, torch.nn.Parameter)
        and tensors.memory_fault(value) is None
    ):
        value = value.as_subclass(Tensor)  # the numbers of a subclass whose memory is its own
    return (
        real(f"state {name!r} of {layout.label}", value)
        if name in OPTIMIZERS_OWN or name == layout.threshold_state
        else value
    )


def _exported(layout: Layout, name: str, form: Format, state: Mapping[str, Any]) -> Tensor:
    """A packed moment as a tensor of the parameter's shape and memory order: int8 codes, or bf16 values of blocks."""
    param, label = layout.param, f"state {name!r} of {layout.label}"
    stored = state[name]
    stored = real(label, stored).contiguous()
    numel = param.numel()
    if stored.shape != (form.nbytes(numel),) or _padding(form, stored, numel):
        raise ValueError(
            f"{label} holds {form.kind} codes of another number of elements than the parameter's {numel}: a parameter "
            "that has been offloaded or resized needs its elements back before its state can be saved"
        )
    order = stated_order(label, name, state, param)
    strides = memory_order.strides_of(param)
    values = formats.codes_of(form, stored, numel) if form is not BLOCK8 else _block_values(stored, numel)
    return memory_order.reordered(values, param.shape, order, strides)


def _block_values(stored: Tensor, numel: int) -> Tensor:
    """Values of blocks as bf16, without rounding: a code has seven bits, and bf16 eight."""
    return formats.decode(BLOCK8, stored, numel).bfloat16()


def _padding(form: Format, stored: Tensor, numel: int) -> bool:
    """Whether there are codes where only zeros can be, behind the last element."""
    padded = -(-numel // formats.RUN) * formats.RUN
    last = max(0, padded - formats.RUN)
    runs = stored[last * form.bits // 8 : padded * form.bits // 8]
    return numel != padded and bool(formats.codes_of(form, runs, padded - last)[numel - last :].any())


def check(layout: Layout, saved: Mapping[str, Any]) -> None:
    """Raises unless a checkpoint's state fits the parameter.

    Raises:
        TypeError, ValueError: a missing moment or number of steps, another shape or dtype, an unknown kind, codes
            beyond their levels, values that no bounded momentum has, low bits and a master copy at once, an impossible
            number of steps.
    """
    label, param = layout.label, layout.param
    needed = (*layout.moments, *(("step",) if layout.uses_step else ()))
    for name in needed:
        if name not in saved and not OPTIMIZERS_OWN.isdisjoint(saved):
            raise ValueError(f"state {name!r} of {label} is missing: the checkpoint holds {_listed(saved)}")
    for i, (name, form) in enumerate(layout.moments.items()):
        if name in saved:
            bounds = (layout.bound, layout.codes_bound) if i == 0 else (None, None)
            _check_moment(f"state {name!r} of {label}", name, form, saved, param, *bounds)
    for name, dtypes in RESIDUAL_DTYPES.items():
        if name in saved:
            tensors.state_tensor(f"state {name!r} of {label}", saved[name], param.shape, dtypes)
    check_one_residual(label, saved)
    if layout.has_modes and TRAINED in saved:
        tensors.state_tensor(f"state {TRAINED!r} of {label}", saved[TRAINED], param.shape, tuple(formats.DTYPE_FORMATS))
    if layout.threshold_state is not None and layout.threshold_state in saved:
        tensors.threshold_state(label, layout.threshold_state, saved[layout.threshold_state])
        tensors.threshold_state_value(label, layout.threshold_state, saved[layout.threshold_state])
    taken(label, saved)


def check_one_residual(label: str, state: Mapping[str, Any]) -> None:
    """Raises where a parameter has low bits and a master copy at once."""
    if RESIDUAL_DTYPES.keys() <= state.keys():
        names = " and ".join(map(repr, RESIDUAL_DTYPES))
        raise ValueError(f"the state of {label} holds {names}: must be one of them, since each says what is below it")


def taken(label: str, state: Mapping[str, Any]) -> int:
    """The number of steps that a state says has been taken."""
    return checks.steps_taken(label, real(f"state 'step' of {label}", state.get("step", 0)))


def _listed(saved: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, saved))


def _check_moment(
    label: str,
    name: str,
    form: Format,
    saved: Mapping[str, Any],
    param: Tensor,
    bound: float | None,
    codes_bound: float | None,
) -> None:
    source = stated_format(label, name, saved)
    if source is None:
        tensors.state_tensor(label, saved[name], param.shape, (torch.float32, torch.bfloat16))
        value = saved[name]
        largest = float(value.abs().amax()) if value.numel() else 0.0
        # A bounded momentum exceeds its bound by rounding errors at the most.
        if form.levels is not None and bound is not None and not largest <= 1.0001 * bound:
            whose = "no momentum of signs" if bound == SIGNS else "no momentum of this rule"
            raise ValueError(f"{label} has entries beyond {bound:g} or NaN: {whose} has, and codes cannot hold it")
        # Other bounds hold in some groups, and an older momentum may be of another.
        if bound == SIGNS and largest > 1.0001:
            raise ValueError(
                f"{label} has entries up to {largest:g}, and no momentum of signs exceeds 1. Are they codes? A "
                "distributed checkpoint of another state_dtype must be loaded into an optimizer that has it, and be "
                "converted by its state_dict()"
            )
        return
    if source.levels is not None and codes_bound is None:
        raise ValueError(f"{label} is {source.kind}, codes of a bounded momentum: must be fp32, bf16 or {BLOCK8.kind}")
    tensors.state_tensor(label, saved[name], param.shape, (torch.bfloat16 if source is BLOCK8 else torch.int8,))
    check_codes(label, name, source, saved)


def check_codes(label: str, name: str, source: Format, saved: Mapping[str, Any]) -> None:
    """Raises unless a moment as checkpoints hold it is made of codes, or values of blocks, that its form can have."""
    value: Tensor = saved[name]
    if source is BLOCK8:
        if bool(value.isinf().any()):
            raise ValueError(f"{label} has infinite entries: its exponents are corrupted")
        return
    levels = saved.get(levels_key(name), source.levels)
    if (isinstance(levels, Tensor) and levels.numel() != 1) or levels != source.levels:
        raise ValueError(
            f"{levels_key(name)} of {label} is {checks.shown(levels)}: must be {source.levels} for {source.kind}"
        )
    if value.numel():
        low, high = value.aminmax()
        if not (low >= -levels and high <= levels):  # NaN neither
            raise ValueError(
                f"{label} has codes from {low.item()} to {high.item()}: must be from {-levels} to {levels}"
            )
        if value.is_floating_point() and bool((value != value.round()).any()):
            raise ValueError(f"{label} has fractions among its {source.kind} codes: must be whole numbers")


def adopt(layout: Layout, saved: Mapping[str, Any], seed: int, param_id: int) -> tuple[dict[str, Any], list[str]]:
    """A checked checkpoint's state as this optimizer keeps it, on the parameter's device, and changes of precision.

    A moment of the same kind keeps its bits. Another kind is converted, where fewer bits are left by stochastic
    rounding, so that the expectation stays. Nothing is shared with ``saved``.
    """
    param, changes = layout.param, []
    adopted: dict[str, Any] = {}
    ours = {key(name) for name in layout.moments for key in (str, *TAGS)} | RESIDUAL_DTYPES.keys() | {"step"}
    t = taken(layout.label, saved)
    for name, value in saved.items():
        if name == "step":
            adopted[name] = step_tensor(t)
        elif name not in ours:
            adopted[name] = _own_copy(f"state {name!r} of {layout.label}", value, param.device, {})
    for (name, form), own_bits in zip(layout.moments.items(), MOMENT_BITS, strict=False):
        if name not in saved:
            continue
        value = saved[name].detach().to(param.device)
        said = stated_format(layout.label, name, saved)
        source = said or (BF16 if value.dtype == torch.bfloat16 else FP32)
        flat = _flat(value, param)
        if source is form and not form.packed:
            adopted[name] = _shaped(flat, param)
        elif source is form and form.levels is not None:
            adopted[name] = formats.pack(form, flat)
        else:
            m = flat.float()
            if source.levels is not None:
                # Checked: codes are of a method that has a bound.
                unit = source.levels / cast(float, layout.codes_bound)
                m = m / torch.full((), unit, dtype=torch.float32, device=m.device)
            if form.levels is not None:
                bound = cast(float, layout.bound)
                m = m.clamp(-bound, bound) * (form.levels / bound)
            stored = formats.encode(form, m, conversion_bits(own_bits, seed, param_id, t, layout.shard, m))
            adopted[name] = stored if form.packed else _shaped(stored, param)
            exact = source is form and torch.equal(
                formats.decode(form, stored, param.numel()).nan_to_num(), flat.float().nan_to_num()
            )
            if not exact:
                changes.append(f"{name}: {source.kind} to {form.kind}")
        adopted.update(moment_tags(name, form, param))
    changes += _adopt_residual(layout, saved, adopted)
    return adopted, changes


def conversion_bits(
    own_bits: Callable[[Tensor], Tensor], seed: int, param_id: int, t: int, shard: ShardIndex, values: Tensor
) -> Tensor:
    """The random bits with which a moment is stored in another form, after step ``t``.

    ``shard`` tells where the values lie in the whole parameter.
    """
    return own_bits(shard_bits(int(seed), param_id, t + CONVERSION, shard, values.numel(), values.device))


def step_tensor(t: int) -> Tensor:
    return torch.full((), float(t), dtype=STEP_DTYPE, device="cpu")


def _own_copy(label: str, value: Any, device: torch.device, copies: dict[int, tuple[Any, Any]]) -> Any:
    """What a user keeps in a state, with tensors of its own on the device; what is one object there is one in the copy.

    Args:
        copies: what was met before and its copy, by its identity. Lists that share lists would unfold to any length.

    Raises:
        TypeError: a tensor without elements, on the meta device for one.
    """
    if id(value) in copies:
        return copies[id(value)][1]
    if isinstance(value, Tensor):
        if value.is_meta:
            raise TypeError(f"{label} holds a tensor on meta, which has no memory of its own")
        copy: Any = tensors.owned(value, device)
    elif isinstance(value, Mapping):
        copy = {key: _own_copy(label, each, device, copies) for key, each in value.items()}
    elif type(value) in (list, tuple, set):
        copy = type(value)(_own_copy(label, each, device, copies) for each in value)
    else:
        return value
    copies[id(value)] = value, copy  # whose identity is its own as long as it lives
    return copy


def _adopt_residual(layout: Layout, saved: Mapping[str, Any], adopted: dict[str, Any]) -> list[str]:
    """What lies beside the parameter, converted between the split forms and a master copy."""
    param, param_storage = layout.param, layout.param_storage
    remainder, master = saved.get("param_low"), saved.get("master_param")
    found = remainder if master is None else master
    if found is None:
        return []
    was = "master" if remainder is None else "split16" if remainder.dtype == torch.int16 else "split8"
    flat = _flat(found.detach().to(param.device), param)
    if param_storage == was or param_storage == "master":
        # Low bits become a master copy at the first step: the parameter may not have been loaded yet.
        adopted["param_low" if was != "master" else "master_param"] = _shaped(flat, param)
        return []
    change = f"param_storage: {was} to {param_storage}"
    if param_storage not in formats.RESIDUALS:
        return [change]
    if was == "split8":
        adopted["param_low"] = _shaped(flat.to(torch.int16) * 256, param)
        return []
    if was == "split16":
        adopted["param_low"] = _shaped((flat.int() + 128 >> 8).clamp(-128, 127).to(torch.int8), param)
        return [change]
    adopted["param_low"] = _shaped(formats.remainder_of_master(param_storage, flat), param)
    return [change] if param_storage == "split8" else []


def _flat(value: Tensor, param: Tensor) -> Tensor:
    """The elements of a tensor of the parameter's shape, in the parameter's memory order."""
    lies_so = memory_order.same_strides(value, memory_order.strides_of(param))
    return memory_order.flat(value if lies_so else memory_order.restrided(value, param))


def _shaped(flat: Tensor, param: Tensor) -> Tensor:
    """The reverse, as a tensor of its own."""
    strides = memory_order.strides_of(param)
    shaped = torch.empty_strided(param.shape, strides, dtype=flat.dtype, device=flat.device)
    memory_order.flat(shaped).copy_(flat)
    return shaped
