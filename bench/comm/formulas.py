"""Bytes that a worker sends, and the time they take, by formula. Plain arithmetic: needs no torch.

n workers, each with all gradients. All-reduce on a ring: 2 (n - 1) / n times the buffer. A vote: of the codes of 2 bits
all but the worker's own part go to those who count (all-to-all), and what it has counted goes to all others
(all-gather).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Shapes = Sequence[Sequence[int]]

#: What is compared, by the key in results.
HOOKS = {
    "allreduce": "all-reduce, fp32",
    "bf16": "all-reduce, bf16",
    "powersgd": "torch's PowerSGD hook, rank 1",
    "majority": "VoteHook, majority",
    "mean": "VoteHook, mean",
}
CODES_PER_WORD = 16
#: Of Ethernet, IPv4, and TCP with time stamps; and what a packet of Ethernet holds beside the last two.
HEADERS, SEGMENT = 14 + 20 + 32, 1500 - 52


def elements(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


def bits_of_result(hook: str, workers: int) -> int:
    """Bits of an entry on its way back from a vote; as `signadam_ext.backends.votes.width_for`."""
    return 2 if hook == "majority" else next(bits for bits in (4, 8, 16) if workers < 1 << (bits - 1))


def compressed(shape: Sequence[int], rank: int = 1, least: float = 2) -> int | None:
    """Entries of both factors of a gradient that PowerSGD compresses; None where it sends the gradient itself."""
    if len(shape) < 2:
        return None
    rows, columns = shape[0], math.prod(shape[1:])
    factors = min(rank, rows, columns) * (rows + columns)
    return factors if factors * least < rows * columns else None


def payload(hook: str, shapes: Shapes, workers: int) -> tuple[float, float]:
    """Bytes that each worker sends a step, there and back; of gradients in one bucket, without headers.

    "There" is the half of an all-reduce that adds up, and the all-to-all of a vote.
    """
    n, each = workers, 4 * elements(shapes)
    if hook in ("majority", "mean"):
        words = -(-sum(-(-math.prod(shape) // CODES_PER_WORD) for shape in shapes) // n)
        there = 4.0 * words * (n - 1)
        return there, there * bits_of_result(hook, n) / 2
    if hook == "bf16":
        each //= 2
    elif hook == "powersgd":
        factors = [compressed(shape) for shape in shapes]
        each = 4 * sum(
            math.prod(shape) if found is None else found for shape, found in zip(shapes, factors, strict=True)
        )
    half = each * (n - 1) / n
    return half, half


def rounds(hook: str, workers: int) -> int:
    """Messages that a worker sends one after the other: n - 1 for each half of each collective.

    PowerSGD has three all-reduces: gradients that are not compressed, and both factors.
    """
    return 2 * (workers - 1) * (3 if hook == "powersgd" else 1)


def seconds(sent: float, rounds: int, gbit: float, latency: float) -> float:
    """Time of one step's communication: what a worker sends, at the rate of its link, and a latency for each round."""
    return 8 * sent / (gbit * 1e9) + rounds * latency


def gpt_shapes(layers: int, width: int, vocabulary: int = 50257) -> list[tuple[int, ...]]:
    """The gradients of a GPT: embedding (tied), and of each layer two norms and four matrices."""
    layer = [(width,), (3 * width, width), (width, width), (width,), (4 * width, width), (width, 4 * width)]
    return [(vocabulary, width), *layer * layers, (width,)]


#: What extrapolations are about.
LARGE: Mapping[str, list[tuple[int, ...]]] = {"1B": gpt_shapes(18, 2048), "7B": gpt_shapes(34, 4096)}
LARGE_WORKERS = (8, 64, 1024)
GBITS = (1, 10, 100)
#: Seconds for each round. Assumed: of a network within one building.
LATENCY = 20e-6
