"""Votes in the place of DDP's all-reduce."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .in_order import InOrder
from .votes import Vote, VoteOptions, compare, kernels_for, saved_votes


class VoteHook:
    r"""A communication hook of DistributedDataParallel: workers vote on the sign of each gradient entry, in 2 bits.

    Args:
        vote: "majority" (the sign of the sum of the votes; a tie is 0) or "mean" (their mean, in [-1, 1]). Default:
            "majority".
        alpha: threshold, at least 0: entries of at most this magnitude vote 0. In units of the gradient, or with
            ``confidence="adaptive"`` of its running standard deviation. Default: 0.
        confidence: "fixed" (the threshold is ``alpha``) or "adaptive" (``alpha`` running deviations of what is voted
            on, for each parameter). Default: "fixed".
        confidence_beta: decay of the running deviation, in [0, 1). Default: 0.9.
        threshold: "local" (of an adaptive one, each worker has its own) or "agreed" (the deviation is that over all
            workers; 16 bytes more for each parameter). Default: "local".
        momentum: decay in [0, 1) of a momentum that each worker keeps of its own gradients and votes on, in 4 bytes
            for each entry; 0 votes on the gradient itself, and keeps nothing. Default: 0.
        error_feedback: whether each worker adds to the next vote what this one left out, also in 4 bytes an entry.
            Default: False.
        nonfinite: "propagate" (an entry that is NaN or infinite on any worker becomes NaN on all) or "abstain" (it
            has no vote). Default: "propagate".
        process_group: the workers, those of DDP; None for all. Default: None.
        backend: "cpu", "cuda", "triton" or "reference"; "auto" takes cuda, then triton, for CUDA tensors. Default:
            "auto".

    Raises:
        TypeError, ValueError: an option outside its range.
        RuntimeError: a backend that this installation cannot use; at the first vote, on all workers, options or
            versions that differ between them.

    Example:
        >>> hook = VoteHook(vote="majority")
        >>> # ddp = DistributedDataParallel(model)
        >>> # ddp.register_comm_hook(None, hook)

    With :math:`c` the gated sign and :math:`g^{(i)}` the gradient of worker i, of n:

    .. math::
        \text{majority:}\quad \mathrm{sign}\Big(\sum_{i=1}^n c(g^{(i)})\Big), \qquad
        \text{mean:}\quad \frac1n \sum_{i=1}^n c(g^{(i)}), \qquad
        c(g) = \mathrm{sign}(g) \text{ if } |g| > \alpha \text{ else } 0

    is what ``param.grad`` holds after backward, on all workers. Each of them sends 2 bits an entry to those who count
    and gets 2 bits back, however many there are; a mean comes back in 4 bits (up to 7 workers), 8 (127) or 16. A
    parameter's codes are filled up to 16 entries. The optimizer should not gate again: ``alpha=0`` there.

    With ``momentum`` :math:`\beta`, workers vote on :math:`m^{(i)}_t = \beta m^{(i)}_{t-1} + (1 - \beta) g^{(i)}_t`.
    With ``error_feedback`` they vote on :math:`e = u + r`, u being gradient or momentum, and keep
    :math:`r \leftarrow e - s\, c(e)`, s the mean magnitude of the entries of e that pass. An entry that is not finite
    leaves both as they were. Of a loss that a GradScaler scales, both are in its units: use neither with one.

    The vote runs on a thread and a process group of its own (gloo) or on a stream of its own (NCCL), so that backward
    goes on. :meth:`state_dict` holds what this worker keeps; every worker has its own.

    Sources: [BW] Bernstein et al., arXiv 1802.04434, Alg. 1 and Sec. 3.3 (majority vote, SIGNUM); Karimireddy et al.,
    arXiv 1901.09847, Alg. 1 (error feedback); [SA] Wang et al., arXiv 1907.09008, Alg. 3 (the gate).
    """

    #: As ``inspect`` shows it to DDP, which refuses annotations that are text.
    __signature__ = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("state", "bucket")]
    )

    def __init__(
        self,
        vote: str = "majority",
        *,
        alpha: float = 0.0,
        confidence: str = "fixed",
        confidence_beta: float = 0.9,
        threshold: str = "local",
        momentum: float = 0.0,
        error_feedback: bool = False,
        nonfinite: str = "propagate",
        process_group: Any = None,
        backend: str = "auto",
    ) -> None:
        self.options = VoteOptions(
            vote, alpha, confidence, confidence_beta, threshold, momentum, error_feedback, nonfinite, backend
        )
        self.__name__ = self.__qualname__ = type(self).__name__  # which DDP asks a hook for
        self._process_group = process_group
        self._vote: Vote | None = None
        self._saved: Mapping[str, Any] | None = None
        self._thread = InOrder()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __call__(self, state: Any, bucket: Any) -> torch.futures.Future[Tensor]:
        """Called by DDP with each bucket of gradients, in the same order on all workers."""
        buffer, tensors, params = bucket.buffer(), bucket.gradients(), bucket.parameters()
        if buffer.layout != torch.strided or not tensors:
            raise TypeError("a vote is on dense gradients: got a sparse one; make the embedding with sparse=False")
        kernels_for(self.options.backend, tensors)  # an error of the thread would lose its type
        vote = self._started(buffer.device)

        def elect() -> Tensor:
            vote.elect(tensors, params)
            return buffer

        if buffer.device.type != "cuda":
            return self._thread.submit(elect)
        device = buffer.device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[device])
            # The collectives wait on the stream, not here; the future records where the stream then is.
            future.set_result(elect())
        return future

    def _started(self, device: torch.device) -> Vote:
        """The vote, which is made when all workers have come to the first one."""
        if self._vote is None:
            import torch.distributed as dist

            group = self._process_group
            compare(self.options.told(), "VoteHook", group)
            if device.type != "cuda":
                # Of its own: backward's thread may use the other one meanwhile.
                ranks = None if group is None else dist.get_process_group_ranks(group)
                own: Any = dist.group.WORLD if group is None else group
                options = getattr(own._get_backend(torch.device("cpu")), "options", None)
                group = dist.new_group(
                    ranks,
                    backend=dist.get_backend(group),
                    timeout=getattr(options, "_timeout", None),
                    use_local_synchronization=ranks is not None,
                )
            vote = Vote(self.options, group)
            if self._saved is not None:
                vote.load_state_dict(self._saved)
                self._saved = None
            self._vote = vote
        return self._vote

    def state_dict(self) -> dict[str, Any]:
        """Momenta, residuals and deviations of this worker, on their device; empty where it keeps nothing.

        They are in the order in which DDP first came with the parameters: the same for the same model under the same
        arguments of DDP. The shapes of what is loaded are compared when they come.
        """
        if self._vote is not None:
            return self._vote.state_dict()
        return {"votes": []} if self._saved is None else dict(self._saved)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave on this rank.

        Raises:
            TypeError, ValueError: something else, or memory of other shapes; nothing has been loaded then.
        """
        if self._vote is not None:
            self._vote.load_state_dict(state_dict)
            return
        self._saved = {"votes": saved_votes(state_dict)}
