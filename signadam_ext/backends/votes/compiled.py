"""What the C++ and the CUDA kernels of a vote are called with, which is the same but for where they run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.native import compiled as _C
from .kernels import KernelVotes
from .table import Casting, VoteTable


class CompiledVotes(KernelVotes):
    """The passes by a compiled kernel each; a subclass says how one is called on a device."""

    def call(self, name: str, device: torch.device, table: VoteTable | None, **arguments: Any) -> None:
        """Calls the kernel of that name.

        Args:
            name: "cast_votes", "count_votes" or "read_votes".
            device: of all tensors.
            table: of tensors, where the kernel takes one.
            arguments: of the kernel, but for where it runs.
        """
        raise NotImplementedError

    def launch_cast(self, table: VoteTable, scalars: Tensor, casting: Casting, codes: Tensor) -> None:
        self.call(
            "cast_votes",
            table.device,
            table,
            **_of(table, scalars),
            memory=getattr(_C.VoteMemory, casting.memory),
            residual=casting.residual,
            maximize=casting.maximize,
            abstains=casting.abstains,
            codes=codes.data_ptr(),
        )

    def count(self, codes: Tensor, bits: int, majority: bool, result: Tensor) -> None:
        workers, words = codes.shape
        self.call(
            "count_votes",
            codes.device,
            None,
            codes=codes.data_ptr(),
            workers=workers,
            words=words,
            bits=bits,
            majority=majority,
            result=result.data_ptr(),
        )

    def launch_read(
        self, table: VoteTable, scalars: Tensor, keys: Tensor | None, use: str, bits: int, divisor: int, result: Tensor
    ) -> None:
        self.call(
            "read_votes",
            table.device,
            table,
            **_of(table, scalars),
            keys=0 if keys is None else keys.data_ptr(),
            use=getattr(_C.VoteUse, use),
            bits=bits,
            divisor=divisor,
            result=result.data_ptr(),
        )


def _of(table: VoteTable, scalars: Tensor) -> dict[str, int]:
    return {
        "entries": table.entries.data_ptr(),
        "entry_of_chunk": table.entry_of_chunk.data_ptr(),
        "chunks": table.chunks,
        "scalars": scalars.data_ptr(),
        "format": table.format,
    }
