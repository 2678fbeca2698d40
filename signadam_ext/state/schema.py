"""From what a user, a checkpoint or nobody has put into a parameter's state to what its step reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import formats, memory_order, shards, tensors
from ..core.formats import BLOCK8, RESIDUALS, Format
from ..core.native import compiled as _C
from ..core.random_bits import MOMENT_BITS
from ..core.rule import SCALE_STATES
from .checkpoint import (
    RESIDUAL_DTYPES,
    STEP_DTYPE,
    Layout,
    check_codes,
    check_one_residual,
    conversion_bits,
    copied,
    is_packed,
    moment_tags,
    part_of,
    real,
    stated_format,
    stated_order,
    step_tensor,
    taken,
)

#: Kernels read packed codes in words of so many bytes.
ALIGNMENT = 16


@dataclass(slots=True)
class Fitted:
    """A parameter's state as its step needs it, and how its dictionary gets there.

    Attributes:
        moments: as stored: with the strides of what kernels update, or packed in that memory order.
        residual: low bits or master copy, with the same strides, or None.
        threshold_state: 0-dim float64 on the parameter's device, or None.
        step: 0-dim of ``STEP_DTYPE`` on the CPU or the parameter's device; None where nobody counts.
        changes: entries that the dictionary lacks or has otherwise. All tensors in it are new.
        removed: entries that are in the dictionary and have gone into others.
    """

    moments: tuple[Tensor, ...]
    residual: Tensor | None
    threshold_state: Tensor | None
    step: Tensor | None
    changes: dict[str, Any]
    removed: tuple[str, ...]


def entry_names(layout: Layout) -> tuple[str, ...]:
    """The state entries that a step reads: moments, what lies beside the parameter, gate and step, in this order."""
    residual = (RESIDUALS[layout.param_storage][0],) if layout.param_storage in RESIDUALS else ()
    threshold_state = () if layout.threshold_state is None else (layout.threshold_state,)
    return (*layout.moments, *residual, *threshold_state, "step")


def fit(layout: Layout, state: Mapping[str, Any], seed: int, param_id: int) -> Fitted:
    """What a step needs, of what there is; nothing is written, neither to ``state`` nor to a tensor.

    What is missing is made: zeros, a master copy of the parameter and its low bits. What lies otherwise in memory is
    copied: other strides, codes in another memory order, packed codes that are not aligned, what is lazily negative or
    zero, moments in the form that checkpoints hold. Blocks of codes are then formed anew, with random bits that are a
    function of seed, param_id, and steps taken.

    Args:
        layout: how the state is to be stored.
        state: the parameter's; entries that are not the rule's are a user's and left alone.
        seed, param_id: what the parameter's random bits are made of.

    Raises:
        TypeError, ValueError: an entry that cannot be the parameter's, by its name.
    """
    # What is made for later steps must not be of one that runs in inference mode.
    with formats.outside_inference_mode(), torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        return _Fitting(layout, state, seed, param_id).fitted()


class _Fitting:
    def __init__(self, layout: Layout, state: Mapping[str, Any], seed: int, param_id: int) -> None:
        label, param = layout.label, layout.param
        if not isinstance(state, MutableMapping):
            raise TypeError(f"the state of {label} is a {type(state).__name__}: must be a dict, which a step can write")
        tensors.param_storage(label, layout.param_storage, param.dtype)
        self.layout, self.state, self.seed, self.param_id = layout, state, seed, param_id
        self.strides = memory_order.strides_of(param)
        self.changes: dict[str, Any] = {}
        check_one_residual(label, state)
        # Everything is checked before anything is made.
        self.steps = taken(label, state)
        self.found: dict[str, Any] = {}
        for name, form in layout.moments.items():
            if name in state:
                self._check_moment(name, form)
        if layout.param_storage in RESIDUALS:
            for name, dtypes in RESIDUAL_DTYPES.items():
                if name in state:
                    self.found[name] = self._real(name)
                    exact = (
                        (RESIDUALS[layout.param_storage][1],) if name == RESIDUALS[layout.param_storage][0] else dtypes
                    )
                    tensors.state_tensor(self._shown(name), self.found[name], param.shape, exact, param.device)
        if layout.threshold_state is not None and layout.threshold_state in state:
            tensors.threshold_state(label, layout.threshold_state, state[layout.threshold_state])
            self.found[layout.threshold_state] = self._real(layout.threshold_state)

    def fitted(self) -> Fitted:
        layout = self.layout
        moments = tuple(
            self._moment(name, form, own_bits)
            for (name, form), own_bits in zip(layout.moments.items(), MOMENT_BITS, strict=False)
        )
        residual, removed = self._residual()
        # What was of the last step is of an older one when a modifier is switched on again.
        removed += tuple(
            name for name in SCALE_STATES if name != layout.threshold_state and _is_of_a_step(self.state.get(name))
        )
        threshold_state = None if layout.threshold_state is None else self._threshold_state(layout.threshold_state)
        return Fitted(moments, residual, threshold_state, self._step(), self.changes, removed)

    def _shown(self, name: str) -> str:
        return f"state {name!r} of {self.layout.label}"

    def _put(self, name: str, value: Any) -> Any:
        """``value``, which becomes an entry unless it is the one that there is."""
        if value is not self.state.get(name):
            self.changes[name] = value
        return value

    def _real(self, name: str) -> Any:
        value = self.state[name]
        if self.layout.sharding is not None and shards.is_sharded(value):
            value = part_of(self.layout, name, value)
        value = real(self._shown(name), value)
        # Nobody may write in place to a tensor of inference mode once that is left.
        return copied(value) if isinstance(value, Tensor) and value.is_inference() else value

    # Moments

    def _check_moment(self, name: str, form: Format) -> None:
        label, param = self._shown(name), self.layout.param
        value = self.found[name] = self._real(name)
        said = stated_format(label, name, self.state)
        if said is not None and said is not form:
            raise ValueError(
                f"{label} is {said.kind}: must be {form.kind}; make an optimizer of that form and have it load the "
                "state_dict of this one"
            )
        if said is not None and not is_packed(form, value):
            # A checkpoint's tensor, perhaps in the dtype of the parameter, as torch loads what is no number of steps.
            floating = (torch.bfloat16, torch.float32, torch.float16)
            dtypes = floating if form is BLOCK8 else (torch.int8, *floating)
            tensors.state_tensor(label, value, param.shape, dtypes, param.device)
            check_codes(label, name, form, {**self.state, name: value})
            return
        tensors.moment(self.layout.label, name, value, param, form)
        if form.packed:
            stated_order(label, name, self.state, param)

    def _moment(self, name: str, form: Format, own_bits: Callable[[Tensor], Tensor]) -> Tensor:
        param = self.layout.param
        value = self.found.get(name)
        said = moment_tags(name, form, param)
        if value is None:
            value = _huge_pages(
                self._weights() if name == self.layout.starts_as_param else formats.allocate(form, param)
            )
        elif not form.packed:
            value = self._strided(value)
        elif is_packed(form, value):
            value = self._in_order(value, name, form, own_bits)
        else:
            value = self._packed(self._strided(value), form, own_bits)
        for key, wanted in said.items():
            if type(self.state.get(key)) is not int or self.state[key] != wanted:
                self.changes[key] = wanted
        return self._put(name, value)

    def _weights(self) -> Tensor:
        """A copy of the parameter, with what lies beside it."""
        param, storage = self.layout.param, self.layout.param_storage
        residual = self.found.get(RESIDUALS[storage][0]) if storage in RESIDUALS else None
        made = torch.empty_strided(param.shape, self.strides, dtype=torch.float32, device=param.device)
        return made.copy_(formats.load_param(storage, param.detach(), residual))

    def _strided(self, value: Tensor) -> Tensor:
        return (
            value
            if memory_order.same_strides(value, self.strides)
            else memory_order.restrided(value, self.layout.param)
        )

    def _in_order(self, stored: Tensor, name: str, form: Format, own_bits: Callable[[Tensor], Tensor]) -> Tensor:
        """A packed buffer whose codes lie in the memory order of the parameter."""
        param = self.layout.param
        order = stated_order(self._shown(name), name, self.state, param)
        if order != memory_order.order_of(param.shape, self.strides):
            values = formats.decode if form is BLOCK8 else formats.codes_of
            placed = memory_order.reordered(values(form, stored, param.numel()), param.shape, order, self.strides)
            return self._packed(placed, form, own_bits)
        if not stored.is_contiguous() or stored.data_ptr() % ALIGNMENT != 0:
            return stored.clone(memory_format=torch.contiguous_format)
        return stored

    def _packed(self, value: Tensor, form: Format, own_bits: Callable[[Tensor], Tensor]) -> Tensor:
        """Codes, or values of blocks, in the parameter's memory order, as a packed buffer."""
        flat = memory_order.flat(value)
        if form is not BLOCK8:
            return _huge_pages(formats.pack(form, flat.to(torch.int8)))
        bits = conversion_bits(own_bits, self.seed, self.param_id, self.steps, self.layout.shard, flat)
        return _huge_pages(formats.encode(form, flat.float(), bits))

    # The others

    def _residual(self) -> tuple[Tensor | None, tuple[str, ...]]:
        """What lies beside the parameter, and the entries that have gone into it."""
        param_storage, param = self.layout.param_storage, self.layout.param
        if param_storage not in RESIDUALS:
            return None, ()
        name, _ = RESIDUALS[param_storage]
        (other,) = RESIDUAL_DTYPES.keys() - {name}
        if name in self.found:
            return self._put(name, self._strided(self.found[name])), ()
        from_other = self.found.get(other)
        if from_other is None:
            return self._put(name, formats.make_residual(param_storage, param)), ()
        if param_storage == "master":
            made = formats.make_residual(param_storage, param, from_other)
        else:
            master, own = (memory_order.flat(memory_order.restrided(x, param)) for x in (from_other, param.detach()))
            made = memory_order.reordered(
                formats.remainder_of_master(param_storage, master, own),
                param.shape,
                memory_order.order_of(param.shape, self.strides),
                self.strides,
            )
        return self._put(name, made), (other,)

    def _threshold_state(self, name: str) -> Tensor:
        device = self.layout.param.device
        found = self.found.get(name)
        if found is None:
            found = torch.zeros((), dtype=torch.float64, device=device)
        return self._put(name, found.to(device))

    def _step(self) -> Tensor:
        step = self.state.get("step")
        is_ours = (
            isinstance(step, Tensor)
            and step.dtype == STEP_DTYPE
            and step.dim() == 0
            and step.device.type in ("cpu", self.layout.param.device.type)  # a plan moves it where it counts
            and not (step._is_zerotensor() or step.is_neg() or step.is_inference())
        )
        return self._put("step", step if is_ours else step_tensor(self.steps))


def _is_of_a_step(value: Any) -> bool:
    """Whether this is what a modifier keeps, and no entry of a user's with its name."""
    return isinstance(value, Tensor) and value.dim() == 0 and value.dtype == torch.float64


def _huge_pages(moment: Tensor) -> Tensor:
    if moment.device.type == "cpu" and not tensors.is_simulated(moment):
        _C.advise_huge_pages(moment.data_ptr(), moment.nbytes)
    return moment
