"""Where the elements of a part lie in the whole tensor, row by row: what their random bits are numbered by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

Index = TypeVar("Index", int, Tensor)

#: Runs are shorter, so that kernels can divide numbers of 32 bits.
MOST = 1 << 30


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Runs of elements that lie side by side in the whole tensor, as kernels take them.

    Attributes:
        offset: index in the whole tensor of the part's first element.
        run: elements of a run, below 2^30; 0 where the part is one.
        stride: elements from the beginning of a run to that of the next.
        count: runs after which the outer stride comes in, below 2^30; 0 where it never does.
        outer_stride: elements from the first of so many runs to the first of the next ones.
    """

    offset: int = 0
    run: int = 0
    stride: int = 0
    count: int = 0
    outer_stride: int = 0

    @classmethod
    def of(cls, shape: Sequence[int], first: Sequence[int], part: Sequence[int]) -> ShardIndex:
        """Of a box in a tensor.

        Args:
            shape: of the whole tensor.
            first: where the box begins, by dimension.
            part: the box's shape.

        Raises:
            ValueError: a box that is cut on three dimensions behind its first, which runs in two levels do not tell, or
                runs of 2^30 elements.
        """
        levels: list[tuple[int, int]] = []  # (size, stride), the innermost first
        stride, offset = 1, 0
        for size, begin, length in zip(reversed(shape), reversed(first), reversed(part), strict=True):
            offset += begin * stride
            if levels and levels[-1][0] * levels[-1][1] == stride:
                levels[-1] = (levels[-1][0] * length, levels[-1][1])
            elif length > 1:
                levels += [] if levels or stride == 1 else [(1, 1)]
                levels.append((length, stride))
            stride *= size
        if 0 in part or len(levels) <= 1:
            return cls(offset)
        (run, _), (count, runs_stride), *rest = levels
        if len(rest) > 1:
            raise ValueError("its part is cut on three dimensions behind the first")
        count, outer_stride = (count, rest[0][1]) if rest else (0, 0)
        if max(run, count) >= MOST:
            raise ValueError("its part lies in runs of 2^30 elements, or in 2^30 of them before a gap")
        return cls(offset, run, runs_stride, count, outer_stride)

    def place(self, index: Index) -> Index:
        """The index in the whole tensor of an element of the part."""
        if self.run == 0:
            return self.offset + index
        run = index // self.run
        if self.count == 0:
            return self.offset + run * self.stride + index % self.run
        outer = run // self.count * self.outer_stride
        return self.offset + outer + run % self.count * self.stride + index % self.run


#: Of a tensor that is no part of another.
WHOLE = ShardIndex()
