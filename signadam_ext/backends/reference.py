"""The reference as a backend: any device torch can compute on, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import reference
from .._extension import load

if TYPE_CHECKING:
    from ..plan import Bucket
    from . import Launch, Row

_C = load()


class ReferenceBackend:
    name = "reference"
    splits_dtypes = False

    def unusable(self, device: torch.device | None) -> str | None:
        return None

    def prepare(self, bucket: Bucket, grad: Callable[[int], Tensor]) -> Launch:
        rule = getattr(reference, bucket.rule.name)

        @torch.no_grad()
        def launch(rows: Sequence[Row]) -> None:
            scalars = [dict(zip(_C.SCALARS, row, strict=True)) for row in rows]
            for entry, present, row in zip(bucket.entries, bucket.table.grads(), bucket.table.rows(), strict=True):
                if present and entry.work.numel() > 0:
                    g = grad(entry.slot)
                    reference.update(
                        rule, bucket.rule.statistics, scalars[row], entry.work, g, entry.moments, entry.exp_avg_std
                    )

        return launch
