"""The reference as a backend: any device torch can compute on, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ...core import formats
from ...core.memory_order import flat
from ...core.native import compiled as _C
from ...core.random_bits import MOMENT_BITS, shard_bits
from ..base import HostLaunch
from ..confidence import Confidence, check_result
from . import rules

if TYPE_CHECKING:
    from ...core.rule import Rule
    from ..base import ScalarSet
    from ..bucket import Bucket, Entry


class ReferenceBackend:
    name = "reference"
    splits_formats = False

    def unusable(self, device: torch.device | None) -> str | None:
        return None

    def prepare(self, bucket: Bucket, grad: Callable[[int], Tensor]) -> ReferenceLaunch:
        return ReferenceLaunch(bucket, grad)


class ReferenceLaunch(HostLaunch):
    """The launch of a bucket: new tensors are computed one after another, and copied by one operation."""

    def __init__(self, bucket: Bucket, grad: Callable[[int], Tensor]) -> None:
        self.bucket = bucket
        self.grad = grad

    @torch.no_grad()
    def operations(self, scalar_sets: Sequence[ScalarSet]) -> list[Any]:
        targets: list[Tensor] = []
        results: list[Tensor] = []
        first_chunk = 0
        table, gathered = self.bucket.table, self.bucket.chunk_statistics
        scalars = [dict(zip(_C.SCALARS, values, strict=True)) for values in scalar_sets]
        indices = table.scalar_indices()
        for entry, present, index in zip(self.bucket.entries, table.grads(), indices, strict=True):
            if present and entry.numel > 0:
                own = None if gathered is None else gathered[first_chunk]
                for target, result in _update(self.bucket.rule, scalars[index], entry, self.grad(entry.index), own):
                    targets.append(target)
                    results.append(result)
            first_chunk += -(-entry.numel // _C.CHUNK_SIZE)
        return [(torch._foreach_copy_, targets, results)] if targets else []


def _update(
    rule: Rule, scalars: dict[str, float], entry: Entry, grad: Tensor, chunk_statistics: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """What a step writes, as (tensor, its new elements)."""
    numel = entry.numel
    source = entry.param if entry.image is None else entry.image
    param = flat(source if entry.is_dense else torch.empty_like(source).copy_(source))
    residual = None if entry.residual is None else flat(entry.residual)
    stored = [moment if form.packed else flat(moment) for form, moment in zip(entry.forms, entry.moments, strict=True)]
    p = formats.load_param(entry.param_storage, param, residual)
    moments = tuple(formats.decode(form, x, numel) for form, x in zip(entry.forms, stored, strict=True))
    before = moments[0] if moments else None
    if entry.variance is not None:
        moments = (*moments, flat(entry.variance))
    g = rules.effective_gradient(scalars, p, flat(grad).float())
    confident = None if rule.confidence is None else _confident(rule.confidence, scalars, g)
    p, moments, alpha, threshold_state = rules.update(
        getattr(rules, rule.name),
        rule.threshold_pass,
        scalars,
        p,
        g,
        moments,
        entry.threshold_state,
        confident,
        rule.update_scale,
    )
    if chunk_statistics is not None:
        chunk_statistics.copy_(_observe(g, alpha, before, moments[0] if moments else None))
    r = None
    if formats.draws(entry.param_storage, entry.forms):
        t = 0 if entry.step is None else int(entry.step) + 1
        r = shard_bits(entry.seed, entry.param_id, t, entry.shard, numel, param.device)
    new, new_residual = formats.stored_param(
        entry.param_storage, p, r, param.dtype, None if residual is None else residual.dtype
    )
    shaped = new.as_strided(entry.param.shape, entry.strides)
    if entry.image is not None:
        # Those that share memory with it, and come after it, start from here.
        shaped = entry.image.copy_(shaped)
    written = [(entry.param, shaped)]
    if residual is not None:
        assert new_residual is not None
        written.append((residual, new_residual))
    for form, old, moment, own_bits in zip(entry.forms, stored, moments, MOMENT_BITS, strict=False):
        written.append((old, formats.encode(form, moment, None if r is None else own_bits(r))))
    if entry.threshold_state is not None and threshold_state is not entry.threshold_state:
        assert threshold_state is not None
        written.append((entry.threshold_state, threshold_state))
    # By .data: the commit counts a step in the versions once, and torch takes no offence at tensors of inference mode.
    return [(target.data, new) for target, new in written]


def _confident(confidence: Confidence, scalars: dict[str, float], g: Tensor) -> Tensor:
    """What a confidence function makes of the effective gradient.

    Raises:
        TypeError, ValueError: a result that cannot be used.
    """
    alpha = rules.as_fp32(scalars["alpha"], g.device)
    c = confidence(g.clone(), alpha)  # which may work in place
    check_result(confidence, g, c)
    return cast(Tensor, c)


def _observe(g: Tensor, alpha: Tensor, before: Tensor | None, after: Tensor | None) -> Tensor:
    """A row of what :data:`signadam_ext.core.step_statistics.COLUMNS` names."""
    passed, squares = rules.passes(g, alpha), g.double().square()
    flips = magnitude = torch.zeros((), dtype=torch.float64, device=g.device)
    if before is not None and after is not None:
        flips = (rules.sign(before) * rules.sign(after) < 0).sum().double()
        magnitude = after.double().abs().sum()
    kept = torch.where(passed, squares, 0.0)
    return torch.stack([passed.sum().double(), squares.sum(), kept.sum(), flips, magnitude, alpha.double()])
