"""Votes by the C++ kernels, on ``torch.get_num_threads()`` threads."""

from __future__ import annotations

from typing import Any

import torch

from ...core.native import compiled as _C
from .compiled import CompiledVotes
from .table import VoteTable


class CpuVotes(CompiledVotes):
    def call(self, name: str, device: torch.device, table: VoteTable | None, **arguments: Any) -> None:
        getattr(_C, name)(**arguments, threads=torch.get_num_threads())
