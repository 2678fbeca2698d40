"""Votes by the Triton kernels, each pass one launch on the stream that is current on the tensors' device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.formats import DTYPE_FORMATS
from ...core.native import compiled as _C
from ..device import is_current
from .kernels import KernelVotes
from .table import Casting, VoteTable

#: How the kernels are compiled.
LAUNCH_OPTIONS: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}


class TritonVotes(KernelVotes):
    def launch_cast(self, table: VoteTable, scalars: Tensor, casting: Casting, codes: Tensor) -> None:
        from ...triton_kernels.vote import cast_votes

        if table.chunks == 0:
            return
        table.resident.use()
        with is_current(table.device):
            cast_votes[(table.chunks,)](
                table.entries,
                table.entry_of_chunk,
                scalars,
                codes.view(torch.uint8),
                **casting_constants(table.format, casting),
                **LAUNCH_OPTIONS,
            )

    def count(self, codes: Tensor, bits: int, majority: bool, result: Tensor) -> None:
        from ...triton_kernels.vote import COUNTED_WORDS, count_votes

        workers, words = codes.shape
        programs = -(-words // COUNTED_WORDS.value)
        if programs == 0:
            return
        with is_current(codes.device):
            count_votes[(programs,)](codes, workers, words, result, BITS=bits, MAJORITY=majority, **LAUNCH_OPTIONS)

    def launch_read(
        self, table: VoteTable, scalars: Tensor, keys: Tensor | None, use: str, bits: int, divisor: int, result: Tensor
    ) -> None:
        from ...triton_kernels.vote import read_votes

        if table.chunks == 0:
            return
        table.resident.use()
        with is_current(table.device):
            read_votes[(table.chunks,)](
                table.entries,
                table.entry_of_chunk,
                scalars,
                table.entry_of_chunk if keys is None else keys,
                result.view(torch.int16 if bits == 16 else torch.int8 if bits == 8 else torch.uint8),
                float(divisor),
                **reading_constants(table.format, use, bits),
                **LAUNCH_OPTIONS,
            )


def casting_constants(number: int, casting: Casting) -> dict[str, Any]:
    """The constants of a launch, for values in the format of that number."""
    memory: _C.VoteMemory = getattr(_C.VoteMemory, casting.memory)
    return {
        "FORMAT": number,
        "MEMORY": memory.value,
        "RESIDUAL": casting.residual,
        "MAXIMIZE": casting.maximize,
        "ABSTAINS": casting.abstains,
    }


def reading_constants(number: int, use: str, bits: int) -> dict[str, Any]:
    """The constants of a launch, for values in the format of that number."""
    # fp32 is not rounded, so one kernel serves both.
    is_rounded = number != DTYPE_FORMATS[torch.float32]
    own: _C.VoteUse = getattr(_C.VoteUse, use if is_rounded else use.removesuffix("_STOCHASTIC"))
    return {"FORMAT": number, "USE": own.value, "BITS": bits}
