"""Parameters that share memory: which they are, and in how many launches one after the other they are updated."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

#: (begin, end, index of the parameter), the first two as addresses.
_Span = tuple[int, int, int]


def overlapping(params: Sequence[Tensor | None]) -> list[list[_Span]]:
    """Runs of memory that spans of several parameters cover together, each (begin, end, index)."""
    spans: list[_Span] = []
    for i, param in enumerate(params):
        if param is not None and param.numel() > 0:
            last = sum(stride * (size - 1) for stride, size in zip(param.stride(), param.shape, strict=True))
            spans.append((param.data_ptr(), param.data_ptr() + (last + 1) * param.element_size(), i))
    runs: list[list[_Span]] = []
    run_end = 0
    for span in sorted(spans):
        if span[0] >= run_end:
            runs.append([])
        runs[-1].append(span)
        run_end = max(run_end, span[1])
    return [run for run in runs if len(run) > 1]


def overlap_levels(params: Sequence[Tensor | None]) -> list[int]:
    """Parameters that share memory must not be updated by one launch: each goes to the one after the last it meets."""
    levels = [0] * len(params)
    for run in overlapping(params):
        met: list[_Span] = []
        for begin, end, i in sorted(run, key=lambda span: span[2]):
            levels[i] = 1 + max((levels[k] for b, e, k in met if b < end and begin < e), default=-1)
            met.append((begin, end, i))
    return levels
