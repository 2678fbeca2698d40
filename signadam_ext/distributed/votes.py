"""A vote on gradients, for every place that takes one: its options, what a worker keeps, casting and reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._version import __version__
from ..backends import votes
from ..backends.reference import rules
from ..backends.votes import Casting, VoteKernels, VoteTable
from ..core import checks
from ..core.formats import DTYPE_FORMATS
from ..core.memory_order import flat, is_dense
from ..core.options import BACKENDS
from ..optimizers.ranks import digest, refuse_differences
from .exchange import Exchange

RESULTS = ("majority", "mean")
CONFIDENCES = ("fixed", "adaptive")
THRESHOLDS = ("local", "agreed")
NONFINITE = ("propagate", "abstain")


@dataclass(frozen=True)
class VoteOptions:
    """How workers vote; the arguments of :class:`VoteHook`, which says what they mean.

    Raises:
        TypeError, ValueError: an option outside its range, or an agreed threshold that is fixed.
        RuntimeError: a backend that this installation cannot use.
    """

    vote: str = "majority"
    alpha: float = 0.0
    confidence: str = "fixed"
    confidence_beta: float = 0.9
    threshold: str = "local"
    momentum: float = 0.0
    error_feedback: bool = False
    nonfinite: str = "propagate"
    backend: str = "auto"

    def __post_init__(self) -> None:
        checks.one_of("vote", self.vote, RESULTS)
        checks.one_of("confidence", self.confidence, CONFIDENCES)
        checks.one_of("threshold", self.threshold, THRESHOLDS)
        checks.one_of("nonfinite", self.nonfinite, NONFINITE)
        checks.one_of("backend", self.backend, ("auto", *BACKENDS))
        backends.check_usable(self.backend)
        checks.flag("error_feedback", self.error_feedback)
        for name, high in (("alpha", float("inf")), ("confidence_beta", 1.0), ("momentum", 1.0)):
            # Frozen, so that no option changes on one worker only.
            object.__setattr__(self, name, float(checks.number(name, getattr(self, name), 0.0, high)))
        if self.confidence == "fixed" and self.threshold == "agreed":
            raise ValueError("threshold='agreed' belongs to confidence='adaptive': a fixed one is the same everywhere")

    @property
    def is_adaptive(self) -> bool:
        return self.confidence == "adaptive"

    def told(self) -> dict[str, str]:
        """What must be the same on all workers, by what an error calls it."""
        options = {name: repr(value) for name, value in asdict(self).items() if name != "backend"}
        return {"the version of signadam_ext": __version__, **options}


@dataclass(slots=True)
class _Memory:
    """What a worker keeps of a tensor between votes; None where the options ask for none."""

    momentum: Tensor | None = None
    residual: Tensor | None = None
    deviation: Tensor | None = None


class Vote:
    """Votes of one worker with the others of a group, and what it keeps between them.

    Args:
        options: of the vote.
        group: the process group; None for the default one.
    """

    def __init__(self, options: VoteOptions, group: Any = None) -> None:
        self.options = options
        self.exchange = Exchange(group, options.vote == "majority")
        self._casting = Casting(
            memory="GRADIENTS" if options.momentum > 0 else "NONE",
            residual=options.error_feedback,
            abstains=options.nonfinite == "abstain",
        )
        self._memory: list[_Memory] = []
        self._place: dict[Any, int] = {}  # of what a vote is about, in `_memory`
        self._saved: list[Mapping[str, Tensor]] = []

    def elect(self, tensors: Sequence[Tensor], about: Sequence[Any] | None = None) -> None:
        """Replaces tensors by the result of a vote on them, the same on all workers.

        Args:
            tensors: of one dtype and device, dense.
            about: what each is the gradient of, by which memory is kept; None: none is.
        """
        # Before anything is sent, for the others would wait.
        kernels = kernels_for(self.options.backend, tensors)
        memories = self._memories(tensors, about)
        table = _table(tensors, memories)
        codes = self.exchange.room(table.words, table.device)
        scalars = self._scalars(tensors, memories)
        kernels.cast(table, scalars, self._casting, codes)
        self._read(table, scalars, kernels, self.exchange.whole(codes, kernels))

    def elect_part(self, tensor: Tensor, to: Tensor) -> None:
        """Writes the result of a vote on this worker's part of a tensor.

        Args:
            tensor: contiguous, the parts of all workers in their order; no memory is kept of it.
            to: of the size of a part, dense.
        """
        kernels = kernels_for(self.options.backend, [tensor, to])
        workers = self.exchange.workers
        scalars = self._scalars([tensor], self._memories([tensor], None)).expand(workers, -1).contiguous()
        table = VoteTable(list(tensor.view(workers, -1).unbind()))
        codes = torch.zeros(table.words, dtype=torch.int32, device=table.device)
        kernels.cast(table, scalars, self._casting, codes)
        self._read(VoteTable([to]), scalars, kernels, self.exchange.part(codes, kernels))

    def _read(self, table: VoteTable, scalars: Tensor, kernels: VoteKernels, result: Tensor) -> None:
        """Writes a result to the values of a table; ``scalars`` hold nothing for that, and are those of the votes."""
        kernels.read(table, scalars, None, "WRITE", self.exchange.bits, self.exchange.divisor, result)

    def _scalars(self, tensors: Sequence[Tensor], memories: Sequence[_Memory]) -> Tensor:
        """What holds for each tensor in this vote."""
        beta = self.options.momentum
        own = {"beta1": beta, "one_minus_beta1": 1 - beta, "beta2": beta, "one_minus_beta2": 1 - beta}
        rows = [{**own, "threshold": self.options.alpha}] * len(tensors)
        scalars = votes.scalars_of(rows, tensors[0].device)
        if self.options.is_adaptive or self.options.error_feedback:
            self._adapt(scalars, tensors, memories)
        return scalars

    def _adapt(self, scalars: Tensor, tensors: Sequence[Tensor], memories: Sequence[_Memory]) -> None:
        """Puts thresholds and scales that follow what is voted on into the scalars."""
        voted = [
            self._voted(i, scalars, tensor, memory)
            for i, (tensor, memory) in enumerate(zip(tensors, memories, strict=True))
        ]
        if self.options.is_adaptive:
            sums = torch.stack([torch.stack([x.sum(dtype=torch.float64), x.double().square().sum()]) for x in voted])
            workers = 1
            if self.options.threshold == "agreed":
                sums, workers = self._agreed(sums), self.exchange.workers
            beta = {"confidence_beta": self.options.confidence_beta}
            beta["one_minus_confidence_beta"] = 1 - self.options.confidence_beta
            for i, (memory, x) in enumerate(zip(memories, voted, strict=True)):
                if x.numel() == 0:
                    continue
                assert memory.deviation is not None
                moved = rules.moved(
                    rules.next_deviation, memory.deviation, sums[i, 0], sums[i, 1], x.numel() * workers, beta
                )
                memory.deviation.copy_(moved)
                scalars[i, votes.SCALARS.index("threshold")] = (self.options.alpha * moved).float()
        if self.options.error_feedback:
            for i, x in enumerate(voted):
                threshold = scalars[i, votes.SCALARS.index("threshold")]
                magnitude = x.abs()
                passes = (magnitude > threshold) & magnitude.isfinite()
                total = torch.where(passes, magnitude, 0.0).sum(dtype=torch.float64)
                mean = total / torch.clamp(passes.sum(), min=1)
                scalars[i, votes.SCALARS.index("scale")] = mean.float()

    def _voted(self, i: int, scalars: Tensor, tensor: Tensor, memory: _Memory) -> Tensor:
        """What a worker votes on, flat: the momentum it will have, and what earlier votes left out. As kernels do."""
        u = flat(tensor).float()
        s = dict(zip(votes.SCALARS, scalars[i].unbind(), strict=True))
        if memory.momentum is not None:
            u = s["beta1"] * flat(memory.momentum) + s["one_minus_beta1"] * u
        return u if memory.residual is None else u + flat(memory.residual)

    def _agreed(self, sums: Tensor) -> Tensor:
        """The sums over all workers, added in their order, so that all come to the same."""
        import torch.distributed as dist

        parts = [torch.empty_like(sums) for _ in range(self.exchange.workers)]
        dist.all_gather(parts, sums, group=self.exchange.group)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def _memories(self, tensors: Sequence[Tensor], about: Sequence[Any] | None) -> list[_Memory]:
        if about is None:
            return [self._made({}, tensor) for tensor in tensors]
        return [self._of(key, tensor) for key, tensor in zip(about, tensors, strict=True)]

    def _of(self, key: Any, tensor: Tensor) -> _Memory:
        """What is kept of a tensor; zeros at its first vote, or what has been loaded."""
        place = self._place.get(key)
        if place is None:
            place = self._place[key] = len(self._memory)
            saved = self._saved[place] if place < len(self._saved) else {}
            self._memory.append(self._made(saved, tensor))
        memory = self._memory[place]
        for name in ("momentum", "residual"):
            kept = getattr(memory, name)
            if kept is not None and kept.shape != tensor.shape:
                raise ValueError(
                    f"the {name} of vote {place} has shape {tuple(kept.shape)}: must be the gradient's, "
                    f"{tuple(tensor.shape)}"
                )
        return memory

    def _made(self, saved: Mapping[str, Tensor], tensor: Tensor) -> _Memory:
        """What the options ask to keep of a tensor, as it was saved, otherwise zeros."""
        options, kept = self.options, {}
        if options.momentum > 0:
            kept["momentum"] = torch.zeros_like(tensor, dtype=torch.float32)
        if options.error_feedback:
            kept["residual"] = torch.zeros_like(tensor, dtype=torch.float32)
        if options.is_adaptive:
            kept["deviation"] = torch.zeros((), dtype=torch.float64, device=tensor.device)
        for name in kept.keys() & saved.keys():
            if saved[name].shape != kept[name].shape:
                raise ValueError(
                    f"a saved {name} has shape {tuple(saved[name].shape)}: must be {tuple(kept[name].shape)}"
                )
            kept[name].copy_(saved[name])
        return _Memory(**kept)

    def state_dict(self) -> dict[str, Any]:
        """What this worker keeps, in the order of the first votes, which is the same in each run of a model."""
        kept = [
            {name: value for name in _Memory.__slots__ if (value := getattr(memory, name)) is not None}
            for memory in self._memory
        ]
        return {"votes": [*kept, *self._saved[len(kept) :]]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave, of this worker's rank.

        Raises:
            TypeError, ValueError: something else, or memory of other shapes than the gradients have; nothing has been
                loaded then.
        """
        saved = saved_votes(state_dict)
        for i, (memory, own) in enumerate(zip(self._memory, saved, strict=False)):
            for name in _Memory.__slots__:
                value = getattr(memory, name)
                if value is not None and name in own and own[name].shape != value.shape:
                    raise ValueError(
                        f"the {name} of vote {i} has shape {tuple(own[name].shape)} in state_dict: must be "
                        f"{tuple(value.shape)}"
                    )
        self._saved = [{name: value.clone() for name, value in own.items()} for own in saved]
        for i, memory in enumerate(self._memory):
            own = self._saved[i] if i < len(self._saved) else {}
            for name in _Memory.__slots__:
                value = getattr(memory, name)
                if value is not None:
                    value.copy_(own[name]) if name in own else value.zero_()


def saved_votes(state_dict: Any) -> list[Mapping[str, Tensor]]:
    """What :meth:`Vote.state_dict` lists.

    Raises:
        TypeError: something else.
    """
    saved = state_dict.get("votes") if isinstance(state_dict, Mapping) else None
    if not isinstance(saved, (list, tuple)) or not all(
        isinstance(own, Mapping) and all(isinstance(value, Tensor) for value in own.values()) for own in saved
    ):
        raise TypeError("state_dict has no list 'votes' of tensors by name: must be what state_dict() of a vote gives")
    return list(saved)


def _table(tensors: Sequence[Tensor], memories: Sequence[_Memory]) -> VoteTable:
    momenta = [memory.momentum for memory in memories if memory.momentum is not None]
    residuals = [memory.residual for memory in memories if memory.residual is not None]
    return VoteTable(tensors, momenta or None, residuals or None)


def kernels_for(backend: str, tensors: Sequence[Tensor]) -> VoteKernels:
    """The kernels that serve these tensors.

    Raises:
        TypeError: a dtype that kernels do not read, or gaps between elements.
        RuntimeError: a backend that cannot serve the device.
    """
    for tensor in tensors:
        if tensor.dtype not in DTYPE_FORMATS:
            raise TypeError(f"a vote is on float32, bfloat16 or float16 gradients: got {tensor.dtype}")
        if not is_dense(tensor):
            raise TypeError(f"a vote is on dense gradients: got strides {tensor.stride()} of {tuple(tensor.shape)}")
    return votes.get(backends.choose(backend, tensors[0].device, "gradients of a vote").name)


def compare(told: Mapping[str, str], what: str, group: Any) -> None:
    """Raises on all workers where they have not told the same.

    Raises:
        RuntimeError: with what differs, and the ranks that have each value.
    """
    import torch.distributed as dist

    if dist.get_rank(group) < 0:
        raise ValueError(f"this process is not in the process group of {what}")

    def of_all(value: Any) -> dict[int, Any]:
        found: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, (dist.get_rank(), value), group=group)
        return dict(found)

    if len(set(of_all(digest(told)).values())) > 1:
        refuse_differences(of_all(dict(told)), what)
