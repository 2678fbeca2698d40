"""Which parameters take part in a plan, on which backend, and what kernels are given of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.bucket import Entry
from ..backends.confidence import backend_for, name_of
from ..core import memory_order, shards, tensors
from ..core.formats import Format, draws, effective_param_storage, outside_inference_mode
from ..core.rule import Rule
from ..core.shard_index import WHOLE, ShardIndex
from ..core.shards import Sharding
from ..state.schema import Fitted
from .agreement import needs_agreement
from .overlap import overlap_levels, overlapping


@dataclass(slots=True)
class Item:
    """A parameter as it is handed to a plan. The rest is as in :class:`Entry`.

    Attributes:
        has_state: whether it has a state. Then it takes part even without a gradient, so that a later gradient needs
            no new plan.
        fit: what a step uses of its state. Raises on state that does not fit; writes nothing.
        name: the parameter's, where the optimizer was told it.
        own_state: its state in the optimizer, or None.
        state_names: of the entries of ``fit``, as the state holds them.
        lr_factor: what its group's learning rate is multiplied by.
        scales_by_shape: whether the parameter's shape says so.
        is_clipped: whether the norm of all gradients is looked at.
        at_rest: whether this is a first step without a learning rate, which needs no variance.
        owner: the parameter as the optimizer has it, where ``param`` is another tensor: its part on this rank.
        sharding: how it is spread over ranks, or None.
    """

    label: str
    param: Tensor
    group: int
    rule: Rule
    backend: str
    has_state: bool
    fit: Callable[[], Fitted]
    forms: tuple[Format, ...]
    name: str | None = None
    own_state: Mapping[str, Any] | None = None
    state_names: tuple[str, ...] = ()
    variance: Tensor | None = None
    param_storage: str = "nearest"
    seed: int = 0
    param_id: int = 0
    shard: ShardIndex = WHOLE
    lr_factor: float = 1.0
    scales_by_shape: bool = False
    is_clipped: bool = False
    at_rest: bool = False
    owner: Tensor | None = None
    sharding: Sharding | None = None

    @property
    def key(self) -> Tensor:
        """The parameter as the optimizer has it."""
        return self.param if self.owner is None else self.owner

    def grad_variance(self) -> Any:
        """The variance of its gradient: as it was handed over, or as the parameter has it; None without either."""
        return self.variance if self.variance is not None else getattr(self.param, "grad_variance", None)


@dataclass(slots=True)
class Participant:
    """An item that takes part: what was found of it before anything is prepared."""

    index: int
    item: Item
    grad: Tensor | None
    fitted: Fitted
    backend: backends.Backend
    counts_on_device: bool = False

    def place_step(self, on_device: bool) -> None:
        """Has the step count where it is counted."""
        step = self.fitted.step
        if step is None:
            return
        self.counts_on_device = on_device
        device = self.item.param.device if on_device else torch.device("cpu")
        if step.device != device:
            with outside_inference_mode():
                moved = step.to(device)
            self.fitted = replace(self.fitted, step=moved)
            self.fitted.changes["step"] = moved


def can_begin_on_device(chosen: Sequence[Participant]) -> bool:
    """Whether a step of these can begin on the device.

    It cannot where one is updated by the host, or has a threshold that ranks agree on, or shares memory with another,
    or where the host must know which steps are taken.
    """
    return (
        bool(chosen)
        and all(isinstance(found.backend, backends.DeviceBackend) and found.fitted.step is not None for found in chosen)
        and not any(found.item.rule.keeps_sums for found in chosen)
        and not any(needs_agreement(found.item.rule, found.item.sharding) for found in chosen)
        and not any(overlap_levels([found.item.param for found in chosen]))
    )


def choose(items: Sequence[Item], grads: Sequence[Tensor | None]) -> list[Participant]:
    """Checks the parameters that take part in a step, and chooses the backend of each.

    Raises:
        TypeError, ValueError, RuntimeError: a parameter with a gradient that cannot be served.
    """
    pairs = enumerate(zip(items, grads, strict=True))
    chosen = [found for index, (item, grad) in pairs if (found := _choose(index, item, grad)) is not None]
    _let_one_backend_serve_shared_memory(chosen)
    return chosen


def _choose(index: int, item: Item, grad: Tensor | None) -> Participant | None:
    """Checks one parameter; None where the plan leaves it out.

    Raises:
        TypeError, ValueError, RuntimeError: it has a gradient, and cannot be served.
    """
    if grad is not None:
        if item.sharding is not None:
            _check_sharded(item, item.sharding)
        elif shards.is_flattened(item.param):
            _check_flattened(item)
        if item.sharding is not None:
            grad = shards.like_gradient(item.label, grad, item.param, item.sharding)
        tensors.gradient(item.label, grad, item.param)
        tensors.parameter(item.label, item.param)
        tensors.executed(item.label)
        fitted = item.fit()
        if item.rule.reads_variance:
            variance = item.grad_variance()
            if variance is not None or not item.at_rest:
                tensors.variance(item.label, variance, item.param)
        return Participant(index, item, grad, fitted, _backend(item))
    if not item.has_state:
        return None
    try:
        tensors.parameter(item.label, item.param)
        fitted = item.fit()
        backend = _backend(item)
    except (TypeError, ValueError, RuntimeError):
        # It may be offloaded; without a gradient that is no error.
        return None
    return None if fitted.changes or fitted.removed else Participant(index, item, None, fitted, backend)


def _check_flattened(item: Item) -> None:
    """Raises where a part of a flat parameter cannot be updated as the same elements of the whole would be.

    Raises:
        TypeError: a threshold, a number that steps are multiplied by or a norm, which is of the whole parameter.
    """
    whole, instead = {
        "caution": ("caution counts entries of", "take caution=None"),
        "rms": ("lr_scale='rms' is of", "take another lr_scale"),
        "norm": ("max_norm bounds the norm of", "take max_norm=None"),
        None: ("its threshold follows the gradient of", "take confidence='fixed'"),
    }[item.rule.update_scale]
    if item.rule.threshold_pass == "NONE":
        if item.scales_by_shape:
            whole, instead = "lr_scale asks for the shape of", "take lr_scale=1.0, and an lr for each group"
        elif item.is_clipped:
            whole, instead = "max_grad_norm is of", "take max_grad_norm=None, and the clip_grad_norm_ of that class"
        else:
            return
    raise TypeError(
        f"{item.label} is part of a flat parameter of FullyShardedDataParallel, and {whole} the whole parameter, of "
        f"which each rank may have a part: {instead}; or shard with fully_shard"
    )


def _check_sharded(item: Item, sharding: Sharding) -> None:
    """Raises where a part of a parameter cannot be updated as the same elements of the whole would be.

    Raises:
        TypeError, ValueError: memory that is not row-major, or a rule that reads variances.
    """
    place = f"{item.label} is a DTensor with the placements {sharding.placements}"
    if not item.param.is_contiguous():
        raise ValueError(
            f"{place} and a part of strides {item.param.stride()}: must be contiguous, as random bits are numbered row "
            "by row"
        )
    if item.rule.reads_variance:
        raise TypeError(f"{place}: the variance of its gradient is not known by parts; use moving averages")


def _shard(item: Item) -> ShardIndex:
    """Where the elements lie in the whole parameter, as far as it matters: random bits go by it."""
    storage = effective_param_storage(item.param_storage, item.param.dtype)
    return item.shard if draws(storage, item.forms) else WHOLE


def _backend(item: Item) -> backends.Backend:
    confidence = item.rule.confidence
    wanted = item.backend
    if item.rule.update_scale is not None and item.param.device.type == "cuda" and wanted == "auto":
        # Triton compiles a kernel for each; CUDA has them of a few, and one for all others, which finds out as it runs.
        wanted = "triton" if backends.get("triton").unusable(item.param.device) is None else wanted
    if _shard(item).run and item.param.device.type == "cuda" and wanted in ("auto", "cuda"):
        # Its kernels number random bits from a first element on; Triton's follow runs as well.
        if wanted == "cuda":
            raise RuntimeError(
                f"{item.label} is a DTensor whose part lies in several runs in the whole, which backend='cuda' does "
                "not follow: take backend='auto' or 'triton', or shard the first dimension"
            )
        wanted = "triton" if backends.get("triton").unusable(item.param.device) is None else "reference"
    if confidence is not None:
        wanted = backend_for(confidence, item.backend)
        if (reason := backends.get(wanted).unusable(item.param.device)) is not None:
            raise RuntimeError(
                f"confidence={name_of(confidence)} needs backend={wanted!r}, which cannot serve {item.label} "
                f"on {item.param.device}: {reason}; a Python function of torch operations runs everywhere"
            )
    return backends.choose(wanted, item.param.device, item.label)


def entry_of(found: Participant, scalar_group: int) -> Entry:
    """What kernels are given of a parameter, with the buffers that this needs.

    Args:
        found: the parameter.
        scalar_group: number of the group that its scalars are made of.

    Raises:
        RuntimeError: a mode, FakeTensorMode for example, has made tensors of its own.
    """
    item, grad, fitted, param = found.item, found.grad, found.fitted, found.item.param
    dense_param = param if memory_order.is_dense(param) else torch.empty_like(param, requires_grad=False)
    entry = Entry(
        found.index,
        param,
        dense_param,
        param.dtype if grad is None else grad.dtype,
        item.forms,
        fitted.moments,
        effective_param_storage(item.param_storage, param.dtype),
        fitted.residual,
        None,
        fitted.threshold_state,
        fitted.step,
        scalar_group,
        item.seed,
        item.param_id,
        _shard(item),
        found.counts_on_device,
    )
    if item.rule.reads_variance and grad is not None:
        given = item.grad_variance()
        if given is not None and is_readable(given, entry.strides):
            entry.variance, entry.variance_address = given, given.data_ptr()
        else:
            entry.variance = torch.zeros_like(dense_param, dtype=torch.float32, requires_grad=False)
    _refuse_simulated(entry, fitted)
    return entry


def is_readable(variance: Tensor, strides: Sequence[int]) -> bool:
    """Whether kernels can read a variance where it lies."""
    return (
        variance.dtype == torch.float32
        and memory_order.same_strides(variance, strides)
        and tensors.memory_fault(variance) is None
        and not variance.is_neg()
    )


def _refuse_simulated(entry: Entry, fitted: Fitted) -> None:
    """Raises where a tensor that was allocated for this step has no memory.

    Raises:
        RuntimeError: a mode, FakeTensorMode for example, has made tensors of its own.
    """
    made = [value for value in fitted.changes.values() if isinstance(value, Tensor)]
    made += [] if entry.is_dense else [entry.dense_param]
    if entry.variance is not None and entry.variance_address is None:
        made.append(entry.variance)
    for tensor in made:
        if (fault := tensors.memory_fault(tensor)) is not None:
            raise RuntimeError(
                f"state made for a step {fault[1]}: a mode such as FakeTensorMode is active, under which no real "
                "parameter can be updated; take the step outside it"
            )


def _let_one_backend_serve_shared_memory(chosen: list[Participant]) -> None:
    """Gives parameters that share memory to the reference if several backends would update them.

    Only the reference can prepare a step on shared memory as a whole.
    """
    for run in overlapping([found.item.param for found in chosen]):
        if len({id(chosen[i].backend) for _, _, i in run}) > 1:
            for _, _, i in run:
                confidence = chosen[i].item.rule.confidence
                if confidence is None or backend_for(confidence, "auto") == "reference":
                    chosen[i].backend = backends.get("reference")
