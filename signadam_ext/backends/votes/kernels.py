"""What votes by kernels share: torch knows nothing of what they write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .table import Casting, VoteTable


class KernelVotes:
    """The passes that write to a table's tensors; a subclass launches them, and counts."""

    def launch_cast(self, table: VoteTable, scalars: Tensor, casting: Casting, codes: Tensor) -> None:
        raise NotImplementedError

    def launch_read(
        self, table: VoteTable, scalars: Tensor, keys: Tensor | None, use: str, bits: int, divisor: int, result: Tensor
    ) -> None:
        raise NotImplementedError

    def cast(self, table: VoteTable, scalars: Tensor, casting: Casting, codes: Tensor) -> None:
        self.launch_cast(table, scalars, casting, codes)
        _count_writes(table.momenta)
        _count_writes(table.residuals)

    def read(
        self, table: VoteTable, scalars: Tensor, keys: Tensor | None, use: str, bits: int, divisor: int, result: Tensor
    ) -> None:
        self.launch_read(table, scalars, keys, use, bits, divisor, result)
        _count_writes(table.values)


def _count_writes(written: Sequence[Tensor] | None) -> None:
    """Counts what a kernel has written in the versions of tensors, by which autograd notices that one has changed."""
    # An inference tensor has none.
    torch._C._increment_version([tensor for tensor in written or () if not tensor.is_inference()])
