"""Votes between the workers of a process group: 2 bits an entry there and, of a majority, 2 bits back."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ..backends.votes import VoteKernels, width_for

logger = logging.getLogger("signadam_ext")


class Exchange:
    """What workers send each other.

    Each worker counts the votes on a part of the entries: all send it theirs (all-to-all), and it sends the result to
    all (all-gather). So a worker sends as much as it would alone, whatever the number of workers.

    Args:
        group: the process group; None for the default one.
        majority: whether the result is the majority of the votes, in 2 bits an entry; otherwise their sum, in 4 bits
            for up to 7 workers, 8 for up to 127, and 16 for up to 32,767.

    Attributes:
        workers: of the group.
        bits: of an entry of the result.
        divisor: of a result, for what comes of the vote: 1 for a majority, otherwise the number of workers.
    """

    def __init__(self, group: Any, majority: bool) -> None:
        import torch.distributed as dist

        self.group, self.majority = group, majority
        self.workers = dist.get_world_size(group)
        self.bits = 2 if majority else width_for(self.workers)
        self.divisor = 1 if majority else self.workers
        self._has_all_to_all: bool | None = None

    def room(self, words: int, device: torch.device) -> Tensor:
        """Words for the codes of a vote, zero: a whole number for each worker."""
        part = -(-words // self.workers)
        return torch.zeros(part * self.workers, dtype=torch.int32, device=device)

    def part(self, codes: Tensor, kernels: VoteKernels) -> Tensor:
        """This worker's part of the result: the count of what all have cast on it.

        Args:
            codes: of this worker, int32, a whole number of words for each worker.
            kernels: that count.
        """
        received = self._received(codes).view(self.workers, -1)
        result = torch.empty(received.shape[1] * self.bits // 2, dtype=torch.int32, device=codes.device)
        kernels.count(received, self.bits, self.majority, result)
        return result

    def whole(self, codes: Tensor, kernels: VoteKernels) -> Tensor:
        """The result, the same on all workers."""
        part = self.part(codes, kernels)
        if self.workers == 1:
            return part
        result = torch.empty(self.workers * part.numel(), dtype=torch.int32, device=codes.device)
        _all_gather(result, part, self.group)
        return result

    def _received(self, codes: Tensor) -> Tensor:
        """What the workers have cast on this one's part, in their order."""
        import torch.distributed as dist

        if self.workers == 1:
            return codes
        if self._sends_parts(codes.device):
            received = torch.empty_like(codes)
            dist.all_to_all_single(received, codes, group=self.group)
            return received
        everything = torch.empty(self.workers * codes.numel(), dtype=torch.int32, device=codes.device)
        _all_gather(everything, codes, self.group)
        rank = dist.get_rank(self.group)
        return everything.view(self.workers, self.workers, -1)[:, rank].contiguous()

    def _sends_parts(self, device: torch.device) -> bool:
        """Whether the group's backend has an all-to-all; found out by one, and said once where it has none."""
        if self._has_all_to_all is not None:
            return self._has_all_to_all
        import torch.distributed as dist

        sent = torch.zeros(self.workers, dtype=torch.int32, device=device)
        try:
            dist.all_to_all_single(torch.empty_like(sent), sent, group=self.group)
        except (RuntimeError, NotImplementedError) as error:
            if not any(words in str(error).lower() for words in ("not support", "not implement", "unsupported")):
                raise
            logger.warning(
                "the %s backend has no all-to-all: votes are gathered whole, %d times the bytes",
                dist.get_backend(self.group),
                self.workers,
            )
            self._has_all_to_all = False
        else:
            self._has_all_to_all = True
        return self._has_all_to_all


def _all_gather(to: Tensor, own: Tensor, group: Any) -> None:
    import torch.distributed as dist

    # By the name that it has from torch 2.13 on.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(to, own, group=group)
