"""Votes by the CUDA kernels, each pass one launch on the stream that is current on the tensors' device."""

from __future__ import annotations

from typing import Any

import torch

from ...core.native import compiled as _C
from .compiled import CompiledVotes
from .table import VoteTable


class CudaVotes(CompiledVotes):
    def call(self, name: str, device: torch.device, table: VoteTable | None, **arguments: Any) -> None:
        stream = torch.cuda.current_stream(device)
        if table is not None:
            table.resident.use_on(stream)
        getattr(_C, f"cuda_{name}")(**arguments, device=stream.device_index, stream=stream.cuda_stream)
