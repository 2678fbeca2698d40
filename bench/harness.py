"""Interleaved timing of optimizer steps.

A machine changes speed from one second to the next, by more than the differences of interest when it is shared, and
its memory from one minute to the next. So no time stands by itself: every round measures the references and the
candidate back to back, over parameters of the same shapes; the candidates of a workload take turns in several passes,
so that each is measured over the whole time of all of them; and what is reported are medians and quartiles of ratios
taken within a round.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import TypedDict

import torch
from torch import Tensor

#: The two that everything is measured beside: an in-place addition, and torch's fused AdamW on fp32 parameters.
STREAM, ADAMW = "stream", "AdamW fused"
#: How often each candidate of a workload has its turn.
PASSES = 4

Step = Callable[[], object]
Clock = Callable[[Step], float]


class Spread(TypedDict):
    """Median and quartiles over rounds."""

    low: float
    median: float
    high: float


class Row(TypedDict, total=False):
    """One candidate on one workload. Times in seconds; `to_*` above 1 means faster than the reference."""

    case: str
    shapes: str
    tensors: int
    elements: int
    dtype: str
    device: str
    optimizer: str
    backend: str
    bytes_per_parameter: float
    bytes_count: str
    clock: str
    rounds: int
    passes: int
    other_programs: float | None  # share of the machine's CPU time that others took meanwhile; median over passes
    other_programs_most: float | None  # the same, in the pass that they disturbed most
    seconds: Spread
    gb_per_s: float
    stream_gb_per_s: float  # of the stream in the same rounds
    to_stream: Spread  # bytes/s over bytes/s
    to_adamw: Spread  # time over time, against torch's fused AdamW on fp32 parameters
    host_seconds: Spread  # of the call alone, without waiting for the device; on a GPU, many small tensors


def spread(values: Sequence[float]) -> Spread:
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"low": low, "median": middle, "high": high}


@dataclass(frozen=True)
class Case:
    name: str
    shapes: tuple[tuple[int, ...], ...]
    summary: str

    @property
    def elements(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)


def many_small(count: int = 1000, size: int = 64) -> Case:
    return Case("many_small", ((size,),) * count, f"{count} x {size}")


def one_large(size: int = 50_000_000) -> Case:
    return Case("one_large", ((size,),), f"1 x {size}")


def gpt2_shapes(width: int, vocabulary: int, positions: int, layers: int) -> tuple[tuple[int, ...], ...]:
    """The parameter list of GPT-2 (tied embeddings)."""
    d = width
    layer = ((d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,))
    return ((vocabulary, d), (positions, d), *layer * layers, (d,), (d,))


def gpt2_small(scale: int = 1) -> Case:
    """The parameter list of GPT-2 small, every dimension divided by `scale`."""
    shapes = gpt2_shapes(768 // scale, 50257 // scale, 1024 // scale, 12)
    return Case("gpt2_small", shapes, _scaled("GPT-2 small", scale))


def llama_1b(scale: int = 1) -> Case:
    """The parameter list of Llama 3.2 1B (tied embeddings), every dimension divided by `scale`."""
    d, kv, hidden, vocabulary = 2048 // scale, 512 // scale, 8192 // scale, 128256 // scale
    layer = ((d, d), (kv, d), (kv, d), (d, d), (hidden, d), (hidden, d), (d, hidden), (d,), (d,))
    return Case("llama_1b", ((vocabulary, d), *layer * 16, (d,)), _scaled("Llama 1B", scale))


def _scaled(name: str, scale: int) -> str:
    return name if scale == 1 else f"{name}, dimensions / {scale}"


@dataclass(frozen=True)
class Traffic:
    """How often a step must touch each array: loads and stores, every input read and output written once."""

    param: int = 2
    grad: int = 1
    state: int = 0  # all state tensors together
    state_bits: int | None = None  # of one element of them; None: as the parameter

    def _terms(self, dtype: torch.dtype) -> dict[str, tuple[int, float]]:
        size = dtype.itemsize
        state_size = size if self.state_bits is None else self.state_bits / 8
        return {"param": (self.param, size), "grad": (self.grad, size), "state": (self.state, state_size)}

    def bytes(self, dtype: torch.dtype) -> float:
        return sum(count * size for count, size in self._terms(dtype).values())

    def count(self, dtype: torch.dtype) -> str:
        terms = self._terms(dtype).items()
        return " + ".join(f"{name} {count} x {size:g}" for name, (count, size) in terms if count)


@dataclass(frozen=True)
class Candidate:
    optimizer: str
    backend: str
    traffic: Traffic
    make: Callable[["Workload"], Step]


class Workload:
    """Parameters with gradients, and a flat fp32 pair of the same length for the stream; random, never zeros."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str):
        self.case, self.dtype, self.device = case, dtype, torch.device(device)
        generator = torch.Generator(self.device).manual_seed(0)

        def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.randn(shape, dtype=dtype, device=self.device, generator=generator)

        self.params = [torch.nn.Parameter(random(shape, dtype)) for shape in case.shapes]
        for p in self.params:
            p.grad = random(p.shape, dtype)
        self.a, self.b = (random((case.elements,), torch.float32) for _ in range(2))
        self.references: dict[str, Step] = {}

    def fp32_params(self) -> list[torch.nn.Parameter]:
        """The same parameters and gradients in fp32; themselves where they are."""
        if self.dtype == torch.float32:
            return self.params
        params = [torch.nn.Parameter(p.detach().float()) for p in self.params]
        for wide, p in zip(params, self.params, strict=True):
            wide.grad = None if p.grad is None else p.grad.float()
        return params

    def reference(self, candidate: Candidate) -> Step:
        """The step of a reference, made once: all trials on this workload share its state."""
        name = candidate.optimizer
        if name not in self.references:
            self.references[name] = candidate.make(self)
        return self.references[name]


class OtherPrograms:
    """How much CPU time others take. Next to a busy neighbour torch's OpenMP threads wait for each other in spin loops
    and slow down a thousandfold, so a ratio from such a time says nothing."""

    def __init__(self) -> None:
        self.before = self._ticks()

    @staticmethod
    def _ticks() -> tuple[float, float, float] | None:
        """Seconds of all processors, of their idling, and of this process; None where the system does not tell."""
        try:
            line = Path("/proc/stat").read_text().partition("\n")[0]
        except OSError:
            return None
        # user nice system idle iowait irq softirq steal
        ticks = [int(word) / os.sysconf("SC_CLK_TCK") for word in line.split()[1:9]]
        own = os.times()
        return sum(ticks), ticks[3] + ticks[4], own.user + own.system

    def share(self) -> float | None:
        after = self._ticks()
        if self.before is None or after is None:
            return None
        total, idle, own = (b - a for a, b in zip(self.before, after, strict=True))
        return max(total - idle - own, 0.0) / total if total > 0 else None


def wall_clock(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


class CudaClock:
    """Device time between two events.

    Writing a buffer larger than the L2 cache first evicts what the last step left there, and keeps the device busy
    while the host enqueues, so that only a host slower than the device shows.
    """

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self.evict = torch.randn(max(4 * l2, 256 << 20) // 4, device="cuda")
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, step: Step) -> float:
        start, end = self.events
        self.evict.neg_()
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def clock_for(device: str) -> Clock:
    return CudaClock() if device == "cuda" else wall_clock


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Samples:
    """Times of a candidate and of its references, round by round, over all passes so far."""

    own: list[float] = field(default_factory=list)
    references: dict[str, list[float]] = field(default_factory=dict)
    other_programs: list[float] = field(default_factory=list)
    passes: int = 0


@dataclass
class Trial:
    """One candidate's turn beside the references, in rounds."""

    workload: Workload
    candidate: Candidate
    references: Sequence[Candidate]
    clock: Clock = wall_clock
    samples: dict[str, list[float]] = field(default_factory=dict)
    max_rounds: int = 200

    def __post_init__(self) -> None:
        self._others = OtherPrograms()
        self.step = self.candidate.make(self.workload)
        self._steps = [(c.optimizer, self.workload.reference(c)) for c in self.references]
        self.samples = {name: [] for name, _ in self._steps}

    def time_references(self) -> None:
        """One round without the candidate. A stream comes before each optimizer, which so inherit the same caches."""
        stream = self._steps[0][1]
        for name, step in self._steps:
            self.samples[name].append(self.clock(step))
        stream()

    def calibrate(self, seconds: float) -> int:
        """Warms up (first steps allocate, build plans, compile) and returns the rounds that fit into `seconds`."""
        begin = time.perf_counter()
        for _ in range(4):
            start = time.perf_counter()
            self.time_references()
            self.clock(self.step)
            round_seconds = time.perf_counter() - start
            if start - begin > seconds:
                break
        self.samples = {name: [] for name in self.samples}
        self._others = OtherPrograms()
        return min(max(int(seconds / round_seconds), 5), self.max_rounds)

    def run(self, seconds: float, into: Samples) -> None:
        own: list[float] = []
        for _ in range(self.calibrate(seconds)):
            self.time_references()
            own.append(self.clock(self.step))
        self.add(own, into)

    def add(self, own: Sequence[float], into: Samples) -> None:
        """Keep a turn: `own` are the candidate's times in each round, in the order of the references' samples."""
        into.own += own
        into.passes += 1
        for name, times in self.samples.items():
            into.references.setdefault(name, []).extend(times)
        if (share := self._others.share()) is not None:
            into.other_programs.append(share)

    def host_cost(self, rounds: int = 50) -> Spread:
        """Wall clock of the call on an idle device, without waiting for what it launches."""
        times = []
        for _ in range(rounds):
            synchronize(self.workload.device)
            times.append(wall_clock(self.step))
        synchronize(self.workload.device)
        return spread(times)


def row(
    case: Case, dtype: torch.dtype, device: str, candidate: Candidate, samples: Samples, clock: Clock = wall_clock
) -> Row:
    """What a candidate's samples come to."""
    own = samples.own
    moved = candidate.traffic.bytes(dtype)
    # The flat pair of the stream is fp32 whatever the parameters are.
    streamed = Traffic().bytes(torch.float32)

    def faster(name: str, work: float = 1.0) -> Spread:
        return spread([work * theirs / ours for theirs, ours in zip(samples.references[name], own, strict=True)])

    return {
        "case": case.name,
        "shapes": case.summary,
        "tensors": len(case.shapes),
        "elements": case.elements,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "optimizer": candidate.optimizer,
        "backend": candidate.backend,
        "bytes_per_parameter": moved,
        "bytes_count": candidate.traffic.count(dtype),
        "clock": "wall" if clock is wall_clock else "CUDA events",
        "rounds": len(own),
        "passes": samples.passes,
        "other_programs": median(samples.other_programs) if samples.other_programs else None,
        "other_programs_most": max(samples.other_programs, default=None),
        "seconds": spread(own),
        "gb_per_s": moved * case.elements / median(own) / 1e9,
        "stream_gb_per_s": streamed * case.elements / median(samples.references[STREAM]) / 1e9,
        "to_stream": faster(STREAM, moved / streamed),
        "to_adamw": faster(ADAMW),
    }
