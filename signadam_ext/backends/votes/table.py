"""What the kernels of a vote are handed: tensors laid out in words of codes, and what holds for each of them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...core.formats import DTYPE_FORMATS
from ...core.native import compiled as _C
from ..device import StreamGuarded, to_device

#: Codes of 2 bits in a word of 32.
CODES_PER_WORD: int = _C.CODES_PER_WORD
#: What holds for one tensor of a vote, in the order of kernels; see csrc/core/vote.h.
SCALARS: tuple[str, ...] = _C.VOTE_SCALARS
#: Bits of an entry that a result may have.
WIDTHS = (2, 4, 8, 16)


def words_of(numel: int) -> int:
    """Words of 32 bits that the codes of so many entries fill; each tensor begins with a new one."""
    return -(-numel // CODES_PER_WORD)


def width_for(workers: int) -> int:
    """Bits of an entry in which the sum of so many votes fits, beside a code for what is not finite."""
    return next(bits for bits in WIDTHS if workers < 1 << (bits - 1))


class VoteTable:
    """The tensors of one vote: of one device and dtype, each dense, in whatever order.

    Args:
        values: what is voted on, or what a result is written to; fp32, bf16 or fp16.
        momenta, residuals: fp32, of the same shapes and strides as ``values``; None where there are none.
        first_words: where the words of each tensor begin, in a vote of more tensors than these; None: one behind the
            other.

    Attributes:
        words: from the first word to behind the last.
    """

    def __init__(
        self,
        values: Sequence[Tensor],
        momenta: Sequence[Tensor] | None = None,
        residuals: Sequence[Tensor] | None = None,
        first_words: Sequence[int] | None = None,
    ) -> None:
        self.values = list(values)
        self.momenta = None if momenta is None else list(momenta)
        self.residuals = None if residuals is None else list(residuals)
        self.device, self.dtype = values[0].device, values[0].dtype
        self.format = DTYPE_FORMATS[self.dtype]
        if first_words is None:
            first_words = [0, *itertools.accumulate(words_of(value.numel()) for value in values)][:-1]
        self.first_words = list(first_words)
        self.words = max(begin + words_of(value.numel()) for begin, value in zip(first_words, values, strict=True))

    @functools.cached_property
    def resident(self) -> StreamGuarded:
        """:attr:`entries` and :attr:`entry_of_chunk`, made on the stream that is current when they are first used."""
        rows: list[list[int]] = []
        of_chunk: list[int] = []
        for i, value in enumerate(self.values):
            momentum = 0 if self.momenta is None else self.momenta[i].data_ptr()
            residual = 0 if self.residuals is None else self.residuals[i].data_ptr()
            rows.append(
                [value.data_ptr(), momentum, residual, value.numel(), self.first_words[i], len(of_chunk)],
            )
            of_chunk += [i] * -(-value.numel() // _C.VOTE_CHUNK)
        return StreamGuarded(
            self.device,
            to_device(torch.tensor(rows, dtype=torch.int64, device="cpu"), self.device),
            to_device(torch.tensor(of_chunk, dtype=torch.int32, device="cpu"), self.device),
        )

    @property
    def entries(self) -> Tensor:
        """Each tensor as kernels read it, int64 [tensors, 6]; on the device."""
        return self.resident.tensors[0]

    @property
    def entry_of_chunk(self) -> Tensor:
        """The tensor of each chunk, int32; on the device."""
        return self.resident.tensors[1]

    @property
    def chunks(self) -> int:
        return self.entry_of_chunk.numel()


def scalars_of(rows: Sequence[Mapping[str, float]], device: torch.device) -> Tensor:
    """What holds for each tensor of a table, fp32 [tensors, 8]; what a row does not name is 0."""
    matrix = [[row.get(name, 0.0) for name in SCALARS] for row in rows]
    return to_device(torch.tensor(matrix, dtype=torch.float64, device="cpu").float(), device)


@dataclass(frozen=True)
class Casting:
    """How the votes of a table are cast; see csrc/core/vote.h for the arithmetic.

    Attributes:
        memory: "NONE"; "GRADIENTS", a moving average of them; "GATED_SIGNS", one of their gated signs.
        residual: whether what a vote leaves out is added to the next.
        maximize: whether gradients count with the other sign.
        abstains: whether an entry that is not finite has no vote, instead of making the result NaN.
    """

    memory: str = "NONE"
    residual: bool = False
    maximize: bool = False
    abstains: bool = False


class VoteKernels(Protocol):
    """The three passes of a vote on one kind of device. Words are int32 tensors, as every backend has them."""

    def cast(self, table: VoteTable, scalars: Tensor, casting: Casting, codes: Tensor) -> None:
        """Writes the votes of a table's tensors into the words of ``codes``, and updates momenta and residuals."""

    def count(self, codes: Tensor, bits: int, majority: bool, result: Tensor) -> None:
        """Counts ``codes`` [workers, words] into ``result`` [words * bits / 2]: the majority (2 bits), or the sum."""

    def read(
        self, table: VoteTable, scalars: Tensor, keys: Tensor | None, use: str, bits: int, divisor: int, result: Tensor
    ) -> None:
        """Uses a result of ``bits`` bits an entry, divided by ``divisor``.

        Args:
            table: whose values are written.
            scalars: with "lr" and "decay", for a step.
            keys: int32 [tensors, 2], of random bits, for "STEP_STOCHASTIC".
            use: "WRITE" it to the values, or take a "STEP" of parameters by it, rounded to nearest or stochastically.
            bits, divisor: of the result.
            result: words.
        """
