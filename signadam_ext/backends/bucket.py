"""What a backend is handed: the parameters of one launch with their state, and the table that kernels read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.formats import DTYPE_FORMATS, PARAM_STORAGES, Format
from ..core.native import compiled as _C
from ..core.rule import Rule
from ..core.shard_index import ShardIndex
from ..core.step_statistics import COLUMNS

#: Stands for a tensor between two steps.
_NONE = torch.empty(0, dtype=torch.float32, device="cpu")


@dataclass(slots=True, eq=False)
class Entry:
    """One parameter that takes part, and its state.

    Attributes:
        index: index of the parameter in the plan, and of its gradient in the reader.
        param: the parameter itself, during a step.
        dense_param: what kernels update: ``param``, or a dense copy when its elements do not fill a run of memory.
        grad_dtype: dtype of its gradient.
        forms, moments: how the moments are stored, and the stored tensors, during a step.
        param_storage, residual: how the parameter is stored, and what lies beside it, during a step, or None.
        variance: of the gradient, with the strides of ``dense_param``, for a rule that reads it:
            ``param.grad_variance``, or a buffer into which every step copies it; None where there was none yet.
        threshold_state: 0-dim float64 on the parameter's device, what the threshold is made of, during a step, or None.
        step: 0-dim float64 on the CPU, the number of steps taken, during a step; fp32 in the functional forms; None
            where nobody counts.
        counts_on_device: whether it is on the parameter's device instead, where kernels count it.
        group: number of the group that its scalars are made of, see :class:`signadam_ext.engine.plan.Plan`.
        seed, param_id, shard: what its random bits are made of: the seed, the number under which ``state_dict()`` lists
            the parameter, and where its elements lie in the unsharded tensor.
        image: where the reference computes parameters that share memory, during a step: the place of ``param`` in a
            copy of its storage; None for others.
        numel, strides: of ``dense_param``.
        is_dense: whether ``dense_param`` is the parameter itself.
        variance_address: of ``variance``, or None where it is a buffer of the plan's.
    """

    index: int
    param: Tensor
    dense_param: Tensor
    grad_dtype: torch.dtype
    forms: tuple[Format, ...]
    moments: tuple[Tensor, ...]
    param_storage: str
    residual: Tensor | None
    variance: Tensor | None
    threshold_state: Tensor | None
    step: Tensor | None
    group: int
    seed: int
    param_id: int
    shard: ShardIndex
    counts_on_device: bool = False
    image: Tensor | None = None
    numel: int = field(init=False)
    strides: tuple[int, ...] = field(init=False)
    is_dense: bool = field(init=False)
    variance_address: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.numel = self.dense_param.numel()
        self.strides = self.dense_param.stride()
        self.is_dense = self.dense_param is self.param

    def operands(self) -> list[Tensor | None]:
        """What kernels call ``m``, ``v`` and ``x``."""
        found: list[Tensor | None] = [*self.moments, None, None, None][:3]
        if self.variance is not None:
            found[2] = self.variance
        return found

    def bind(self, param: Tensor, _: object, *state: Tensor) -> None:
        """Takes the tensors of a step, as a reader holds them."""
        self.param = param
        if self.is_dense:
            self.dense_param = param
        rest = list(state)
        self.moments = tuple(rest[: len(self.forms)])
        del rest[: len(self.forms)]
        if self.residual is not None:
            self.residual = rest.pop(0)
        if self.threshold_state is not None:
            self.threshold_state = rest.pop(0)
        if self.step is not None:
            self.step = rest.pop(0)

    def unbind(self) -> None:
        """Lets the tensors of a step go. What is None stays None."""
        self.param = _NONE
        if self.is_dense:
            self.dense_param = _NONE
        self.moments = (_NONE,) * len(self.moments)
        self.image = None
        if self.residual is not None:
            self.residual = _NONE
        if self.threshold_state is not None:
            self.threshold_state = _NONE
        if self.step is not None:
            self.step = _NONE
        if self.variance_address is not None:
            self.variance = _NONE


@dataclass(slots=True)
class Bucket:
    """Entries of one launch, with their table in C++.

    Attributes:
        non_dense: those whose ``dense_param`` is a copy.
        chunk_statistics: where it is wanted, a row of :data:`signadam_ext.core.step_statistics.COLUMNS` for each chunk.
    """

    rule: Rule
    device: torch.device
    entries: list[Entry]
    observes: bool
    non_dense: list[Entry] = field(init=False)
    table: Any = field(init=False)
    chunk_statistics: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.non_dense = [entry for entry in self.entries if not entry.is_dense]
        self.table = _C.Table(scalars_by_step=self.rule.uses_step)
        for entry in self.entries:
            addresses = [0 if x is None else x.data_ptr() for x in entry.operands()]
            formats = [form.number for form in entry.forms] + [DTYPE_FORMATS[torch.float32]] * 3
            self.table.add(
                param=entry.dense_param.data_ptr(),
                residual=0 if entry.residual is None else entry.residual.data_ptr(),
                exp_avg=addresses[0],
                exp_avg_sq=addresses[1],
                aux=addresses[2],
                threshold_state=0 if entry.threshold_state is None else entry.threshold_state.data_ptr(),
                # On a device it is counted there.
                step=0 if entry.step is None or entry.counts_on_device else entry.step.data_ptr(),
                step_is_double=entry.step is None or entry.step.dtype == torch.float64,
                numel=entry.numel,
                shard_offset=entry.shard.offset,
                shard_runs=(entry.shard.run, entry.shard.stride, entry.shard.count, entry.shard.outer_stride),
                param_format=DTYPE_FORMATS[entry.dense_param.dtype],
                grad_format=DTYPE_FORMATS[entry.grad_dtype],
                exp_avg_format=formats[0],
                exp_avg_sq_format=formats[1],
                aux_format=formats[2],
                param_storage=PARAM_STORAGES[entry.param_storage],
                group=entry.group,
                index=entry.index,
                seed=entry.seed,
                param_id=entry.param_id,
            )
        self.table.finish(sums=self.rule.threshold_pass != "NONE")
        if self.observes:
            shape = (self.table.chunks, len(COLUMNS))
            self.chunk_statistics = torch.zeros(shape, dtype=torch.float64, device=self.device)

    def observations(self) -> tuple[Tensor, ...]:
        return () if self.chunk_statistics is None else (self.chunk_statistics,)

    def present_non_dense(self) -> list[Entry]:
        """Entries of ``non_dense`` with a gradient in the step that the table has begun."""
        if not self.non_dense:
            return []
        return [e for e, present in zip(self.entries, self.table.grads(), strict=True) if present and not e.is_dense]
