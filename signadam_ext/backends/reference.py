"""The reference as a backend: any device torch can compute on, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import reference, storage
from .._extension import load
from ..random_bits import MOMENT_BITS, random_bits
from ..storage import flat

if TYPE_CHECKING:
    from ..plan import Bucket, Entry
    from . import Launch, Row

_C = load()


class ReferenceBackend:
    name = "reference"
    splits_formats = False

    def unusable(self, device: torch.device | None) -> str | None:
        return None

    def prepare(self, bucket: Bucket, grad: Callable[[int], Tensor]) -> Launch:
        rule = getattr(reference, bucket.rule.name)

        @torch.no_grad()
        def launch(rows: Sequence[Row]) -> None:
            scalars = [dict(zip(_C.SCALARS, row, strict=True)) for row in rows]
            for entry, present, row in zip(bucket.entries, bucket.table.grads(), bucket.table.rows(), strict=True):
                if present and entry.work.numel() > 0:
                    _update(rule, bucket.rule.statistics, scalars[row], entry, grad(entry.slot))

        return launch


def _update(rule: reference.Update, statistics: str, scalars: dict[str, float], entry: Entry, grad: Tensor) -> None:
    numel = entry.work.numel()
    param = flat(entry.work)
    beside = None if entry.beside is None else flat(entry.beside)
    stored = [moment if form.packed else flat(moment) for form, moment in zip(entry.forms, entry.moments, strict=True)]
    p = storage.load_param(entry.weights, param, beside)
    moments = tuple(storage.decode(form, x, numel) for form, x in zip(entry.forms, stored, strict=True))
    if entry.variance is not None:
        moments = (*moments, flat(entry.variance))
    p, moments = reference.update(rule, statistics, scalars, p, flat(grad).float(), moments, entry.exp_avg_std)
    r = None
    if entry.weights in ("stochastic", "split8") or any(form is not storage.FP32 for form in entry.forms):
        t = 0 if entry.step is None else int(entry.step) + 1
        r = random_bits(entry.seed, entry.number, t, entry.first, numel, param.device)
    storage.store_param(entry.weights, p, r, param, beside)
    for form, old, new, own_bits in zip(entry.forms, stored, moments, MOMENT_BITS, strict=False):
        old.copy_(storage.encode(form, new, None if r is None else own_bits(r)))
