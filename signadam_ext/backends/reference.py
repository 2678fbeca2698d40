"""The reference as a backend: any device torch can compute on, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import reference, storage
from .._extension import load
from ..confidence import check_result
from ..random_bits import MOMENT_BITS, random_bits
from ..storage import flat

if TYPE_CHECKING:
    from ..plan import Bucket, Entry
    from ..rule import Rule
    from . import Launch, Row

_C = load()


class ReferenceBackend:
    name = "reference"
    splits_formats = False

    def unusable(self, device: torch.device | None) -> str | None:
        return None

    def prepare(self, bucket: Bucket, grad: Callable[[int], Tensor]) -> Launch:
        return ReferenceLaunch(bucket, grad)


class ReferenceLaunch:
    """The launch of a bucket: its tensors one after another."""

    def __init__(self, bucket: Bucket, grad: Callable[[int], Tensor]) -> None:
        self.bucket = bucket
        self.grad = grad
        self._confident: dict[int, Tensor] = {}  # by slot, what a confidence function made of this step's gradients

    @torch.no_grad()
    def check(self, rows: Sequence[Row]) -> None:
        """Runs a confidence function, and raises before anything is written where its results cannot be used."""
        confidence = self.bucket.rule.confidence
        if confidence is None:
            return
        self._confident.clear()
        for entry, scalars in self._present(rows):
            # A copy where kernels update one is not up to date before the launch.
            param = flat(torch.empty_like(entry.param).copy_(entry.param))
            g = reference.effective_gradient(scalars, _param(entry, param), flat(self.grad(entry.slot)).float())
            alpha = reference.as_fp32(scalars["alpha"], g.device)
            c = confidence(g.clone(), alpha)  # which may work in place
            check_result(confidence, g, c)
            self._confident[entry.slot] = c

    @torch.no_grad()
    def __call__(self, rows: Sequence[Row]) -> None:
        first_chunk = 0
        present = {entry.slot: scalars for entry, scalars in self._present(rows)}
        for entry in self.bucket.entries:
            if entry.slot in present:
                observed = None if self.bucket.observed is None else self.bucket.observed[first_chunk]
                confident = self._confident.pop(entry.slot, None)
                _update(self.bucket.rule, present[entry.slot], entry, self.grad(entry.slot), confident, observed)
            first_chunk += -(-entry.work.numel() // _C.CHUNK_SIZE)

    def _present(self, rows: Sequence[Row]) -> list[tuple[Entry, dict[str, float]]]:
        scalars = [dict(zip(_C.SCALARS, row, strict=True)) for row in rows]
        table = self.bucket.table
        return [
            (entry, scalars[row])
            for entry, present, row in zip(self.bucket.entries, table.grads(), table.rows(), strict=True)
            if present and entry.work.numel() > 0
        ]


def _param(entry: Entry, param: Tensor) -> Tensor:
    """What the flat parameter and what lies beside it stand for, in fp32."""
    return storage.load_param(entry.weights, param, None if entry.beside is None else flat(entry.beside))


def _update(
    rule: Rule,
    scalars: dict[str, float],
    entry: Entry,
    grad: Tensor,
    confident: Tensor | None,
    observed: Tensor | None,
) -> None:
    numel = entry.work.numel()
    param = flat(entry.work)
    beside = None if entry.beside is None else flat(entry.beside)
    stored = [moment if form.packed else flat(moment) for form, moment in zip(entry.forms, entry.moments, strict=True)]
    p = _param(entry, param)
    moments = tuple(storage.decode(form, x, numel) for form, x in zip(entry.forms, stored, strict=True))
    before = moments[0] if moments else None
    if entry.variance is not None:
        moments = (*moments, flat(entry.variance))
    g = reference.effective_gradient(scalars, p, flat(grad).float())
    p, moments, alpha = reference.update(
        getattr(reference, rule.name), rule.statistics, scalars, p, g, moments, entry.gate, confident
    )
    if observed is not None:
        observed.copy_(_observe(g, alpha, before, moments[0] if moments else None))
    r = None
    if entry.weights in ("stochastic", "split8") or any(form is not storage.FP32 for form in entry.forms):
        t = 0 if entry.step is None else int(entry.step) + 1
        r = random_bits(entry.seed, entry.number, t, entry.first, numel, param.device)
    storage.store_param(entry.weights, p, r, param, beside)
    for form, old, new, own_bits in zip(entry.forms, stored, moments, MOMENT_BITS, strict=False):
        old.copy_(storage.encode(form, new, None if r is None else own_bits(r)))


def _observe(g: Tensor, alpha: Tensor, before: Tensor | None, after: Tensor | None) -> Tensor:
    """A row of what :data:`signadam_ext.observed.COLUMNS` names."""
    passed, squares = reference.passes(g, alpha), g.double().square()
    flips = magnitude = torch.zeros((), dtype=torch.float64, device=g.device)
    if before is not None and after is not None:
        flips = (reference.sign(before) * reference.sign(after) < 0).sum().double()
        magnitude = after.double().abs().sum()
    kept = torch.where(passed, squares, 0.0)
    return torch.stack([passed.sum().double(), squares.sum(), kept.sum(), flips, magnitude, alpha.double()])
