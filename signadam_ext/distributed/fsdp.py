"""Votes in the place of FSDP2's reductions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .votes import Vote, VoteOptions, compare


class VoteReduceScatter:
    """Workers vote in the place of FSDP2's reduce-scatter: gradients travel in 2 bits, parameters as ever.

    Args:
        vote: "majority" or "mean", as in :class:`VoteHook`. Default: "majority".
        alpha: threshold of a vote, at least 0, in units of the gradient or in standard deviations. Default: 0.
        confidence: "fixed", or "adaptive": ``alpha`` standard deviations of each flat buffer, which holds the gradients
            of a module that was given to ``fully_shard``, without borders between them. Default: "fixed".
        nonfinite: "propagate" or "abstain", as there. Default: "propagate".
        backend: as there. Default: "auto".

    Raises:
        TypeError, ValueError: an option outside its range; at the first vote, gradients of another dtype than fp32 or
            bf16: FSDP2 would divide what comes back.
        RuntimeError: a backend that cannot be used; at the first vote, options that differ between workers.

    Example:
        >>> comm = VoteReduceScatter(vote="majority")
        >>> # for module in model.modules():
        >>> #     if isinstance(module, FSDPModule):
        >>> #         module.set_custom_reduce_scatter(comm)

    Each worker gets the result for the gradients that are sharded to it. The operation that FSDP2 asks for (the mean)
    is replaced by the vote; a sum is refused, which FSDP2 would divide. One worker alone has nothing to reduce, and
    FSDP2 leaves its gradients as they are. Under hybrid sharding torch then averages between replicas in full
    precision: shard by the inner dimension of the mesh alone, and vote between replicas with :class:`VoteAllReduce`.
    """

    def __init__(
        self,
        vote: str = "majority",
        *,
        alpha: float = 0.0,
        confidence: str = "fixed",
        nonfinite: str = "propagate",
        backend: str = "auto",
    ) -> None:
        self.options = VoteOptions(vote, alpha, confidence, confidence_beta=0.0, nonfinite=nonfinite, backend=backend)
        self._votes: dict[Any, Vote] = {}

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer, as FSDP2 asks for it."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """Called by FSDP2 with a flat buffer of gradients, the workers' parts behind each other."""
        if async_op:
            raise NotImplementedError("a vote in the place of reduce-scatter waits for its result: async_op=False")
        _refuse_fp16(input_tensor)
        import torch.distributed as dist

        if op == dist.ReduceOp.SUM:
            raise ValueError(
                "FSDP2 adds up and then divides (set_force_sum_reduction_for_comms), which would change the result of "
                "a vote: leave it at the mean"
            )
        vote = self._votes.get(group)
        if vote is None:
            compare(self.options.told(), "VoteReduceScatter", group)
            vote = self._votes[group] = Vote(self.options, group)
        vote.elect_part(input_tensor, output_tensor)


class VoteAllReduce:
    """Replicas vote in the place of an all-reduce between them, each on its shard: FSDP2's all-reduce hook.

    Args:
        process_group: the replicas of this worker's shard: ``mesh["replicate"].get_group()``.
        vote, alpha, confidence, nonfinite, backend: as of :class:`VoteReduceScatter`.

    Raises:
        TypeError, ValueError, RuntimeError: as there.

    Example:
        >>> # mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("replicate", "shard"))
        >>> hook = VoteAllReduce(None)  # mesh["replicate"].get_group() instead of None, which is all processes
        >>> # for module in (*model.layers, model):
        >>> #     fully_shard(module, mesh=mesh["shard"])
        >>> #     module.set_all_reduce_hook(hook)

    ``fully_shard`` gets the sub-mesh of the shards alone: with the whole mesh torch reduces between replicas before
    the hook runs. Every module that was given to ``fully_shard`` needs the hook: those without it are not reduced
    between replicas. Replicas must begin with equal parameters, which torch then does not see to. Where FSDP2 was told
    to add up (``set_force_sum_reduction_for_comms``), it divides the result.
    """

    def __init__(
        self,
        process_group: Any,
        vote: str = "majority",
        *,
        alpha: float = 0.0,
        confidence: str = "fixed",
        nonfinite: str = "propagate",
        backend: str = "auto",
    ) -> None:
        self.options = VoteOptions(vote, alpha, confidence, confidence_beta=0.0, nonfinite=nonfinite, backend=backend)
        self._process_group = process_group
        self._vote: Vote | None = None

    def __call__(self, reduce_output: Tensor) -> None:
        """Called by FSDP2 with the reduced gradients of this worker's shard, which the result replaces."""
        _refuse_fp16(reduce_output)
        if reduce_output.is_cuda:
            # FSDP2 has made it on another stream, and may let go of it before this one has come so far.
            reduce_output.record_stream(torch.cuda.current_stream(reduce_output.device))
        if self._vote is None:
            compare(self.options.told(), "VoteAllReduce", self._process_group)
            self._vote = Vote(self.options, self._process_group)
        self._vote.elect([reduce_output])


def _refuse_fp16(tensor: Tensor) -> None:
    if tensor.dtype == torch.float16:
        raise TypeError(
            "FSDP2 divides float16 gradients before and after they are reduced, which would change the result of a "
            "vote: use reduce_dtype=torch.float32 or torch.bfloat16"
        )
