"""What the experiments support, for a model: an optimizer, its groups, and the schedule of the learning rate."""

from __future__ import annotations

import difflib
import inspect
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from ..core import checks
from ..optimizers import SignAdamPP, Signum
from ..optimizers.base import SignOptimizer


@dataclass(frozen=True)
class _Choice:
    """What was trained in an experiment, with the learning rate that was searched for it."""

    state_bytes: float  # per parameter
    optimizer: type[SignOptimizer]
    lr: float
    evidence: str
    options: dict[str, Any] = field(default_factory=dict)


_PROOF = "experiments/results/recipe/stage2.md, "
_FEW_BITS = f"{_PROOF}few bits: 0.66M parameters, 2,000 steps, five seeds; bf16 weights"
#: From most memory to least. Each is the best of what was measured beside AdamW within its memory.
CHOICES = (
    _Choice(
        4.0,
        Signum,
        6e-4,
        f"{_PROOF}fresh seeds: 0.66M parameters, 2,000 steps, ten seeds; fp32 weights",
        {"caution": "delayed"},
    ),
    _Choice(2.0, Signum, 6e-4, _FEW_BITS, {"caution": "delayed", "state_dtype": "bf16"}),
    # An exponent of a byte for every 32 codes.
    _Choice(33 / 32, Signum, 6e-4, _FEW_BITS, {"caution": "delayed", "state_dtype": "int8"}),
    _Choice(
        0.25,
        SignAdamPP,
        1e-3,
        "experiments/results/convergence/gpt_long.md: 3.1M parameters, 1,200 steps, three seeds; bf16; behind AdamW",
        {"state_dtype": "int2"},
    ),
)
#: Of all choices, as in every run they rest on; but not all of these had weights of 16 bits, which are rounded
#: stochastically, as others are not.
COMMON = {"weight_decay": 0.1, "max_grad_norm": 1.0, "param_storage": "stochastic"}
WARMUP, LAST_FACTOR = 0.1, 0.1
#: A step is one of so many, before anything says how many tokens it has: as in the search's last rung.
_STEPS = 2000


class TokenSchedule(LRScheduler):
    """A learning rate by tokens seen: linear warm-up over the first tenth, then a cosine down to a tenth.

    With steps of equal size it is the schedule of the runs with 0.66M and 2.5M parameters, whose rates are those at the
    end of each step's tokens in the warm-up, and at their beginning afterwards. It goes on at the last rate when more
    tokens come than were said.

    Args:
        optimizer: whose groups' ``lr`` are the largest.
        tokens: in all, positive.
        batch_tokens: of one step, positive; None where :meth:`step` is told of each.

    Attributes:
        tokens_seen: so far.

    Raises:
        TypeError: ``tokens`` or ``batch_tokens`` is no number.
        ValueError: one that is not positive and finite.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, tokens: float, batch_tokens: float | None = None) -> None:
        self.tokens = _positive("tokens", tokens)
        self.batch_tokens = None if batch_tokens is None else _positive("batch_tokens", batch_tokens)
        self.tokens_seen = 0.0
        self._latest = self.batch_tokens or self.tokens / _STEPS
        super().__init__(optimizer)

    def step(self, tokens: float | None = None) -> None:
        """Sets the rates of the step to come; call it after each ``optimizer.step()``.

        Args:
            tokens: of the step that was taken, positive; None: ``batch_tokens``.

        Raises:
            TypeError: ``tokens`` is no number.
            ValueError: nothing says how many tokens the step had, or it is not positive and finite.
        """
        if self.last_epoch >= 0:  # and not that by which torch sets the first rates
            given = self.batch_tokens if tokens is None else tokens
            if given is None:
                raise ValueError(
                    "step() without tokens: the schedule goes by tokens; pass those of the step that was taken, or "
                    "batch_tokens to recipe()"
                )
            self._latest = _positive("tokens", given)
            self.tokens_seen += self._latest
        super().step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where another has been, with its ``tokens``; those of a step stay this one's, if it has any."""
        own = self.batch_tokens
        # Earlier versions were made of a function.
        super().load_state_dict({k: v for k, v in state_dict.items() if k not in ("lr_lambdas", "_has_begun")})
        if own is not None:
            self.batch_tokens = self._latest = own

    def get_lr(self) -> list[float | Tensor]:
        """The groups' rates for the step to come, as :meth:`step` sets them."""
        factor = self._factor()
        return [base * factor for base in self.base_lrs]

    def _factor(self) -> float:
        """Of the largest rate, for the step to come."""
        warmup = WARMUP * self.tokens
        if self.tokens_seen < warmup:
            return min(1.0, (self.tokens_seen + self._latest) / warmup)
        share = min(1.0, (self.tokens_seen - warmup) / (self.tokens - warmup))
        return LAST_FACTOR + (1 - LAST_FACTOR) * (0.5 + 0.5 * math.cos(math.pi * share))


class Recipe(NamedTuple):
    """What :func:`recipe` returns.

    Attributes:
        optimizer: with the groups "matrices", "embeddings" and "vectors" (norms and biases), as far as there are any;
            each has its ``name``.
        scheduler: to be stepped after the optimizer.
        evidence: the committed results that the choice rests on.

    Example:
        >>> import torch
        >>> from signadam_ext import recipe
        >>> made = recipe(torch.nn.Linear(4, 2), tokens=1000, batch_tokens=10)
        >>> made.optimizer.step()
        >>> made.scheduler.step()
        >>> made.scheduler.tokens_seen
        10.0
    """

    optimizer: SignOptimizer
    scheduler: TokenSchedule
    evidence: str


def recipe(
    model: nn.Module, *, tokens: float, memory: float | None = None, batch_tokens: float | None = None, **changes: Any
) -> Recipe:
    """The optimizer, groups and schedule that this project's experiments support for a language model.

    They rest on small models: byte-level GPTs of 0.66M to 3.1M parameters on the sources of Python's standard library,
    beside AdamW (betas 0.9 and 0.95) with the same weight decay (0.1, of all parameters), clipping (a global norm
    of 1), warm-up (a tenth) and cosine (to a tenth; with 3.1M parameters, on which the quarter of a byte rests, to 0),
    each with its own searched learning rate.

    - 4 bytes of state and more: :class:`Signum` with ``caution="delayed"``. It ended below AdamW, whose state takes 8,
      with each of ten fresh seeds.
    - 2 bytes, and 1: the same with its momentum in bf16, or in 8 bits, beside weights in bf16. Both ended below
      AdamW with fp32 weights and state, with each of five seeds.
    - Down to a quarter of a byte: :class:`SignAdamPP` with 2-bit momentum, which AdamW was clearly ahead of. Nothing
      between was compared with AdamW at that length.

    Norms, embeddings and matrices were trained alike. They are groups of their own here so that what is known of yours
    can be set. The ``lr`` is the one that was found at the smallest size; at 2.5M half of it ended lower with one seed,
    and no rule for other sizes was found: search around it and below. Weights in bf16 or fp16 are rounded
    stochastically, unless ``changes`` have another ``param_storage``.

    Args:
        model: whose parameters are trained, those with ``requires_grad``.
        tokens: in all, over the whole training.
        memory: bytes of the momentum per parameter, at most. The exponents of 8 bits, a 32nd of a byte, and a few bytes
            of each tensor come on top: 1 asks for 8 bits. Default: as many as the best choice takes.
        batch_tokens: tokens of one step, over all ranks; of one batch of the loader where Accelerate has prepared the
            schedule, which it steps once for each rank. None: ``scheduler.step(tokens)`` is told of each.
        changes: arguments of the optimizer's constructor instead of those found.

    Returns:
        Optimizer, scheduler, and where the evidence is, with the names of what ``changes`` have given.

    Raises:
        TypeError: ``model`` is no module, ``tokens``, ``memory`` or ``batch_tokens`` is no number, or ``changes`` name
            what the optimizer does not take.
        ValueError: a number that is not positive and finite, less memory than the smallest choice takes, or
            nothing to train.

    Example:
        >>> import torch
        >>> from signadam_ext import recipe
        >>> model = torch.nn.Sequential(torch.nn.Embedding(256, 32), torch.nn.LayerNorm(32), torch.nn.Linear(32, 256))
        >>> optimizer, scheduler, evidence = recipe(model, tokens=1e6, batch_tokens=1024, memory=0.25)
        >>> type(optimizer).__name__, [group["name"] for group in optimizer.param_groups]
        ('SignAdamPP', ['matrices', 'embeddings', 'vectors'])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: must be a torch.nn.Module")
    tokens = _positive("tokens", tokens)
    if batch_tokens is not None:
        batch_tokens = _positive("batch_tokens", batch_tokens)
    choice = _choice(memory)
    groups = _groups(model)
    if not groups:
        raise ValueError("model has no parameter with requires_grad: nothing to train")
    for name in changes.keys() - inspect.signature(choice.optimizer).parameters.keys():
        if near := difflib.get_close_matches(name, ("tokens", "memory", "batch_tokens"), n=1):
            raise TypeError(f"recipe() got an unexpected keyword argument {name!r}; did you mean {near[0]!r}?")
    found = {"lr": choice.lr, **COMMON, **choice.options}
    optimizer: SignOptimizer = cast(Any, choice.optimizer)(groups, **{**found, **changes})
    others = [name for name, value in changes.items() if name not in found or value != found[name]]
    evidence = choice.evidence + (f"; {', '.join(others)} as given" if others else "")
    return Recipe(optimizer, TokenSchedule(optimizer, tokens, batch_tokens), evidence)


def _choice(memory: float | None) -> _Choice:
    if memory is None:
        return CHOICES[0]
    most = _positive("memory", memory)
    # Whole bits: whoever asks for a byte means codes of 8 bits, whose exponents come on top.
    fitting = [choice for choice in CHOICES if math.floor(8 * choice.state_bytes) <= 8 * most]
    if not fitting:
        raise ValueError(
            f"memory={most:g}: the smallest recipe takes {CHOICES[-1].state_bytes:g} bytes of state per parameter"
        )
    return fitting[0]


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters to train by kind, each once, with their names."""
    embedding = {
        id(param)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        for param in module.parameters(recurse=False)
    }
    kinds: dict[str, list[tuple[str, Tensor]]] = {"matrices": [], "embeddings": [], "vectors": []}
    for name, param in model.named_parameters():
        if param.requires_grad:
            kind = "embeddings" if id(param) in embedding else "matrices" if param.dim() >= 2 else "vectors"
            kinds[kind].append((name, param))
    return [{"params": params, "name": kind} for kind, params in kinds.items() if params]


def _positive(name: str, value: Any) -> float:
    return float(checks.number(name, value, 0.0, open_low=True))
