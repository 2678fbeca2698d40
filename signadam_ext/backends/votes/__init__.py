"""The passes of a vote, on each backend: casting, counting, reading."""

from __future__ import annotations

import functools

from .table import SCALARS, Casting, VoteKernels, VoteTable, scalars_of, width_for, words_of

__all__ = ["SCALARS", "Casting", "VoteKernels", "VoteTable", "get", "scalars_of", "width_for", "words_of"]


@functools.cache
def get(name: str) -> VoteKernels:
    """The votes of the backend of that name, imported when they are first asked for."""
    if name == "reference":
        from .reference import ReferenceVotes

        return ReferenceVotes()
    if name == "cpu":
        from .cpu import CpuVotes

        return CpuVotes()
    if name == "cuda":
        from .cuda import CudaVotes

        return CudaVotes()
    from .triton import TritonVotes

    return TritonVotes()
