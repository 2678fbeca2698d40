"""Thresholds that follow a gradient of which each rank has a part: one for all ranks, without a kernel of its own.

The sums that move a threshold are taken of this rank's part, and added up over the mesh in the order of its ranks, so
that all come to the same. The order of additions is not the one that a whole tensor has: a threshold may differ from
the unsharded one in its last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..backends.bucket import Entry
from ..backends.reference import rules
from ..core import formats
from ..core.memory_order import flat
from ..core.native import compiled as _C
from ..core.rule import Rule
from ..core.shards import Sharding


def needs_agreement(rule: Rule, sharding: Sharding | None) -> bool:
    """Whether a rule's threshold follows a gradient that is not whole here."""
    return sharding is not None and sharding.is_split and rule.threshold_pass != "NONE"


def group_of(sharding: Sharding) -> tuple[Any, ...]:
    """What parameters whose sums are added up together have in common."""
    return sharding.mesh, tuple(i for i, place in enumerate(sharding.placements) if not place.is_replicate())


class Agreement:
    """The thresholds of one bucket.

    Args:
        rule: whose threshold follows the gradient.
        group: of all entries, as :func:`group_of` gives it.
        shardings: of the entries, in order.
    """

    def __init__(self, rule: Rule, group: tuple[Any, ...], shardings: Sequence[Sharding | None]) -> None:
        mesh, dims = group
        self.comes_first = rule.threshold_pass == "PASS_BEFORE"
        self._groups = [mesh.get_group(dim) for dim in dims]
        self._numels = [sharding.shape.numel() for sharding in shardings if sharding is not None]
        #: What kernels run: a threshold that is there already.
        self.rule = replace(rule, threshold_pass="NONE")

    def copies(
        self,
        entries: Sequence[Entry],
        table: Any,
        scalar_sets: Sequence[tuple[float, ...]],
        grad: Callable[[int], Tensor],
    ) -> tuple[Any, ...]:
        """What moves the thresholds, as an operation of a commit; communicates, and writes nothing.

        Args:
            entries: of the bucket, bound to the tensors of this step.
            table: which has begun this step.
            scalar_sets: of this step.
            grad: gives a gradient by ``Entry.index``.
        """
        scalars = [dict(zip(_C.SCALARS, values, strict=True)) for values in scalar_sets]
        taking_part = [
            (entry, numel, scalars[index])
            for entry, numel, index, present in zip(
                entries, self._numels, table.scalar_indices(), table.grads(), strict=True
            )
            if present
        ]
        sums = torch.stack([_sums(entry, s, grad(entry.index)) for entry, _, s in taking_part])
        for group in self._groups:
            sums = _added_up(sums, group)
        targets, results = [], []
        for (entry, numel, s), (first, second) in zip(taking_part, sums.unbind(), strict=True):
            assert entry.threshold_state is not None
            targets.append(entry.threshold_state.data)
            results.append(rules.moved_by_sums(entry.threshold_state, first, second, numel, s))
            if self.comes_first:
                # The reference computes before anything is copied, and from the tensors that an entry has.
                entry.threshold_state = results[-1]
        return torch._foreach_copy_, targets, results


def _sums(entry: Entry, scalars: dict[str, float], grad: Tensor) -> Tensor:
    """The two sums of this rank's part, float64: of the gradient, or the entries that pass, and of squares."""
    g = flat(grad)
    if scalars["coupled"] or scalars["maximize"]:
        residual = None if entry.residual is None else flat(entry.residual)
        g = rules.effective_gradient(
            scalars, formats.load_param(entry.param_storage, flat(entry.param), residual), g.float()
        )
    assert entry.threshold_state is not None
    if scalars["steers"]:
        alpha = (scalars["alpha"] * entry.threshold_state).float()
        first = rules.passes(g.float(), alpha).sum(dtype=torch.float64)
    else:
        first = g.sum(dtype=torch.float64)
    return torch.stack([first, torch.linalg.vector_norm(g, dtype=torch.float64).square()])


def _added_up(sums: Tensor, group: Any) -> Tensor:
    """The sums of all ranks of a group, added in their order."""
    import torch.distributed as dist

    parts = [torch.empty_like(sums) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, sums, group=group)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
