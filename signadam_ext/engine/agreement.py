"""Thresholds that follow a gradient of which each rank has a part: one for all ranks, without a kernel of its own.

The sums that move a threshold are taken of this rank's part, and added up over the mesh in the order of its ranks, so
that all come to the same. The order of additions is not the one that a whole tensor has: a threshold may differ from
the unsharded one in its last bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..backends.base import ScalarSet
from ..backends.bucket import Bucket, Entry
from ..backends.reference import rules
from ..core import formats
from ..core.memory_order import flat
from ..core.native import compiled as _C
from ..core.rule import Rule
from ..core.shards import Sharding

#: A mesh, and for each of its dimensions whether ranks have copies there, not parts.
Sharers: TypeAlias = tuple[Any, tuple[bool, ...]]


def needs_agreement(rule: Rule, sharding: Sharding | None) -> bool:
    """Whether a rule's threshold follows a gradient that is not whole here."""
    return sharding is not None and rule.threshold_pass != "NONE" and is_part(sharding)


def is_part(sharding: Sharding) -> bool:
    """Whether this rank has a part of a parameter that is split; one outside of the mesh has none."""
    return sharding.is_split and sharding.mesh.get_coordinate() is not None


def sharers_of(shardings: Mapping[int, Sharding]) -> dict[Sharers, list[int]]:
    """The numbers of parameters of which this rank has a part, by what those have in common."""
    found: dict[Sharers, list[int]] = {}
    for index, sharding in shardings.items():
        if is_part(sharding):
            found.setdefault(group_of(sharding), []).append(index)
    return found


def group_of(sharding: Sharding) -> Sharers:
    """What parameters whose sums are added up together have in common."""
    return sharding.mesh, tuple(place.is_replicate() for place in sharding.placements)


@dataclass(slots=True)
class _Row:
    """What is agreed on of one entry in one step."""

    entry: Entry
    numel: int
    scalars: dict[str, float]
    sums: Tensor


class Agreement:
    """The thresholds of one bucket.

    Args:
        rule: whose threshold follows the gradient.
        group: of all entries, as :func:`group_of` gives it.
        shardings: of the entries, in order.
    """

    def __init__(self, rule: Rule, group: Sharers, shardings: Sequence[Sharding | None]) -> None:
        self.group = group
        self.comes_first = rule.threshold_pass == "PASS_BEFORE"
        self._numels = [sharding.shape.numel() for sharding in shardings if sharding is not None]
        #: What kernels run: a threshold that is there already.
        self.rule = replace(rule, threshold_pass="NONE")

    def rows(self, bucket: Bucket, scalar_sets: Sequence[ScalarSet], grad: Callable[[int], Tensor]) -> list[_Row]:
        """The sums over this rank's parts of the gradients of a bucket whose table has begun a step."""
        scalars = [dict(zip(_C.SCALARS, values, strict=True)) for values in scalar_sets]
        table = bucket.table
        return [
            _Row(entry, numel, scalars[index], _sums(self.rule, entry, scalars[index], grad(entry.index)))
            for entry, numel, index, present in zip(
                bucket.entries, self._numels, table.scalar_indices(), table.grads(), strict=True
            )
            if present
        ]

    def copy(self, rows: Sequence[_Row]) -> tuple[Any, ...]:
        """What moves the thresholds by sums over whole gradients, as an operation of a commit."""
        targets, results = [], []
        for row in rows:
            state = row.entry.threshold_state
            assert state is not None
            targets.append(state.data)
            results.append(rules.moved_by_sums(state, row.sums[0], row.sums[1], row.numel, row.scalars))
            if self.comes_first:
                # The reference computes before anything is copied, and from the tensors that an entry has.
                row.entry.threshold_state = results[-1]
        return torch._foreach_copy_, targets, results


def agree(rows: Mapping[Sharers, Sequence[_Row]]) -> None:
    """Makes the sums of all rows those over whole gradients; every rank of a mesh comes here with the same parameters.

    Buckets may be others on other ranks, since parts lie otherwise in memory there. So sums go by parameter.
    """
    for group in sorted(rows, key=lambda group: min(row.entry.index for row in rows[group])):
        of_group = sorted(rows[group], key=lambda row: row.entry.index)
        sums = added_up(torch.stack([row.sums for row in of_group]), group)
        for row, agreed in zip(of_group, sums.unbind(), strict=True):
            row.sums = agreed


def added_up(sums: Tensor, group: Sharers) -> Tensor:
    """Sums over parts of gradients as those over the whole ones, in the order of ranks."""
    mesh, copies = group
    device = sums.device
    sums = sums.to(mesh.device_type)  # offloaded parts are on the CPU, and their mesh need not be
    for dim, is_copy in enumerate(copies):
        if not is_copy:
            sums = functools.reduce(torch.add, _of_all_ranks(sums, mesh.get_group(dim)))
    for dim, is_copy in enumerate(copies):
        if is_copy:  # those of the first, lest copies come apart where they add otherwise
            sums = _of_all_ranks(sums, mesh.get_group(dim))[0]
    return sums.to(device)


def _sums(rule: Rule, entry: Entry, scalars: dict[str, float], grad: Tensor) -> Tensor:
    """The two sums of this rank's part, float64: of the gradient, or the entries that pass, and of squares."""
    g = flat(grad)
    if scalars["scales"]:
        return _step_sums(rule, entry, scalars, g)
    if scalars["coupled"] or scalars["gradient_scale"] != 1.0:
        residual = None if entry.residual is None else flat(entry.residual)
        p = formats.load_param(entry.param_storage, flat(entry.param), residual)
        g = rules.effective_gradient(scalars, p, g.float())
    assert entry.threshold_state is not None
    if scalars["steers"]:
        alpha = (scalars["alpha"] * entry.threshold_state).float()
        first = rules.passes(g.float(), alpha).sum(dtype=torch.float64)
    else:
        first = g.sum(dtype=torch.float64)
    return torch.stack([first, torch.linalg.vector_norm(g, dtype=torch.float64).square()])


def _step_sums(rule: Rule, entry: Entry, scalars: dict[str, float], grad: Tensor) -> Tensor:
    """The same where steps are scaled: entries of the step that agree with the gradient, and squares of parameters."""
    residual = None if entry.residual is None else flat(entry.residual)
    p = formats.load_param(entry.param_storage, flat(entry.param), residual)
    g = rules.effective_gradient(scalars, p, grad.float())
    step = p
    if scalars["caution"]:
        s = {name: rules.as_fp32(value, p.device) for name, value in scalars.items()}
        stored = [m if form.packed else flat(m) for form, m in zip(entry.forms, entry.moments, strict=True)]
        moments = tuple(formats.decode(form, x, entry.numel) for form, x in zip(entry.forms, stored, strict=True))
        step, _ = getattr(rules, rule.name)(s, s["alpha"], torch.zeros_like(p), g, moments)
    return torch.stack(rules.step_sums(p, step, g, scalars))


def _of_all_ranks(sums: Tensor, group: Any) -> list[Tensor]:
    """The sums of the ranks of a group, in their order."""
    import torch.distributed as dist

    parts = [torch.empty_like(sums) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, sums, group=group)
    return parts
