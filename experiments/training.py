"""What the experiments on real trainings share: three problems, the search for a step size, the runs, their measures.

The problems, each small enough for seconds on one core:

- "digits": a CNN (two convolutions, two dense layers, 13.7k parameters) on scikit-learn's 1797 real images of digits; a
  third, drawn by the seed, is held out.
- "lstm": an LSTM of 64 units (50k parameters) that predicts the next byte of Python's standard library.
- "gpt": a GPT of two blocks (80k parameters) on the same text.

What is equal for every method: the initial weights and the batches of a seed; the schedule; no weight decay; the search
for a step size as in [BH], Sec. A.2: on the grid of 6, 3 and 1 times powers of ten, the same number of neighbouring
points, and on as long as the best lies at an edge, at most so many points further. The score of a rate is the best
test error of its run, averaged over the search's seeds, which enter no result; equal ones are told apart by the last
test loss. Where the grid begins is one number for methods that take a sign and one for those that do not: their
steps are in different units.

Sources: [SA] arXiv 1907.09008, [BH] arXiv 1705.07774.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import signadam_ext
from reporting import machine
from reporting import runs as kept
from reporting.files import compact_json, rounded, write
from reporting.problems import GPT, GPTConfig, Preset, digest, load_data, training_batch, windows
from reporting.runs import Run, interval

from . import common

FOLDER = Path(__file__).resolve().parent
RESULTS, RUNS = FOLDER / "results", FOLDER / "out" / "training"
SEARCH_SEED = 1000  # and those after it
FURTHER = 6  # points beyond the grid's edges, at most

Store = kept.Store["Problem"]


# Step sizes


def rate(index: int) -> float:
    """The step sizes of [BH], in order: ..., 0.3, 0.6, 1, 3, 6, 10, ...; `rate(0)` is 1."""
    return float(f"{(1, 3, 6)[index % 3]}e{index // 3}")


def index_of(lr: float) -> int:
    """The inverse of `rate`."""
    guess = 3 * math.floor(math.log10(lr))
    for index in range(guess - 3, guess + 6):
        if rate(index) == lr:
            return index
    raise ValueError(f"{lr:g} is not 1, 3 or 6 times a power of ten")


def grid(first: float, count: int) -> tuple[float, ...]:
    """`count` neighbours, from `first` upwards."""
    start = index_of(first)
    return tuple(rate(start + i) for i in range(count))


# What is compared


class GatedMomentum(torch.optim.Optimizer):
    """signADAM++ without its sign: `m = beta*m + (1-beta) * g [|g| > alpha]; p -= lr * m`. Not in the package."""

    def __init__(self, params: Any, lr: float, beta: float = 0.9, alpha: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "alpha": alpha})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                passed = torch.where(p.grad.abs() > group["alpha"], p.grad, 0.0)
                m.mul_(group["beta"]).add_(passed, alpha=1 - group["beta"])
                p.sub_(m, alpha=group["lr"])


@dataclass(frozen=True)
class Method:
    key: str
    label: str
    optimizer: str  # a class of the package, or GatedMomentum
    options: dict[str, Any] = field(default_factory=dict)
    signed: bool = True  # in which of the two units its step size is
    measured: bool = False  # whether its momentum and its gate are looked at in every step

    @property
    def made_by(self) -> type[torch.optim.Optimizer] | None:
        """None if the installed package lacks it."""
        if self.optimizer == GatedMomentum.__name__:
            return GatedMomentum
        found = getattr(signadam_ext, self.optimizer, None)
        if found is not None and not set(self.options) <= set(inspect.signature(found).parameters):
            return None
        return found


# What they train


class Images:
    """The CNN on 8 x 8 digits."""

    def __init__(self, spec: dict[str, Any], data: Tensor, seed: int) -> None:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        data = data[order]
        self.images, self.labels = data[:, :-1].float().view(-1, 1, 8, 8) / 16, data[:, -1].long()
        self.n_train = len(data) * 2 // 3
        self.seed, self.batch_size = seed, spec["batch_size"]
        a, b = spec["model"]["channels"]
        hidden = spec["model"]["hidden"]
        self.model: nn.Module = nn.Sequential(
            nn.Conv2d(1, a, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(a, b, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * b, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 10),
        )

    def loss(self, step: int) -> Tensor:
        epoch, batch = divmod(step, self.n_train // self.batch_size)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        chosen = torch.randperm(self.n_train, generator=generator)[batch * self.batch_size :][: self.batch_size]
        return F.cross_entropy(self.model(self.images[chosen]), self.labels[chosen])

    def validate(self) -> list[float]:
        """The mean loss and the share of wrong answers."""
        logits, labels = self.model(self.images[self.n_train :]), self.labels[self.n_train :]
        return [F.cross_entropy(logits, labels).item(), (logits.argmax(1) != labels).float().mean().item()]

    def samples(self) -> Iterator[tuple[Tensor, bool]]:
        """Of every image held out: its loss, with its graph, and whether the answer is right."""
        for i in range(self.n_train, len(self.images)):
            logits = self.model(self.images[i : i + 1])
            yield F.cross_entropy(logits, self.labels[i : i + 1]), bool(logits.argmax() == self.labels[i])


class LSTM(nn.Module):
    """A next-byte predictor, with GPT's way of being called."""

    def __init__(self, hidden: int, layers: int, embedding: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, 256)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self.head(self.lstm(self.embedding(tokens))[0])
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Text:
    """The next byte of a text. A batch is a function of seed and step alone; the last tenth of the text is held out."""

    def __init__(self, spec: dict[str, Any], data: Tensor, seed: int) -> None:
        model = spec["model"]
        shape = GPTConfig(**model["gpt"]) if "gpt" in model else GPTConfig(1, 1, 1, model["block_size"])
        self.preset = Preset(shape, spec["batch_size"], spec["steps"])
        self.model: nn.Module = GPT(shape) if "gpt" in model else LSTM(**model["lstm"])
        self.seed = seed
        self.train_data, self.validation_data = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
        count = spec["validation_windows"]
        starts = torch.arange(count) * (len(self.validation_data) - shape.block_size) // count
        self.inputs, self.targets = windows(self.validation_data, starts, shape.block_size)

    def loss(self, step: int) -> Tensor:
        return self.model(*training_batch(self.train_data, self.preset, self.seed, step))

    def validate(self) -> list[float]:
        """The mean loss and the share of wrong bytes, over windows spread evenly across the held-out text."""
        logits, targets = self.model(self.inputs).flatten(0, 1), self.targets.flatten()
        return [F.cross_entropy(logits, targets).item(), (logits.argmax(1) != targets).float().mean().item()]

    def samples(self) -> Iterator[tuple[Tensor, bool]]:
        """Of the last byte of every window held out: its loss, with its graph, and whether it was right."""
        for inputs, targets in zip(self.inputs, self.targets, strict=True):
            logits = self.model(inputs[None])[0, -1:]
            yield F.cross_entropy(logits, targets[-1:]), bool(logits.argmax() == targets[-1])


@dataclass(frozen=True)
class Problem:
    name: str
    title: str
    task: type[Images] | type[Text]
    data: str
    spec: dict[str, Any]  # with `schedule`: all that decides the bits of a run but for method, rate and seed
    schedule: tuple[tuple[float, float], ...]  # (share of the steps, factor of the step size from there on)
    evaluations: int
    tolerance: float  # of the test error, as in [SA], Table 2; set beforehand by a trial of torch's Adam
    first_rates: tuple[float, float]  # where the grid begins: with a sign, without
    points: int = 7
    further: int = FURTHER
    search_seeds: int = 2
    seeds: int = 10
    #: What else to look at in the first, the last and one evaluation between: a function of the task that gives JSON.
    probe: Callable[[Any], Any] | None = None

    @property
    def steps(self) -> int:
        return int(self.spec["steps"])

    @property
    def every(self) -> int:
        """Steps between evaluations."""
        return self.steps // self.evaluations

    @property
    def probed(self) -> list[int]:
        """After which steps `probe` looks."""
        return [self.every * (i + 1) for i in sorted({0, self.evaluations // 3, self.evaluations - 1})]

    def factor(self, step: int) -> float:
        return next((factor for share, factor in reversed(self.schedule) if step >= share * self.steps), 1.0)


EPOCH = 37  # steps, of 32 digits
DIGITS = Problem(
    "digits",
    "A CNN on digits",
    Images,
    "digits",
    {"model": {"channels": [16, 32], "hidden": 64}, "batch_size": 32, "steps": 12 * EPOCH},
    schedule=(),
    evaluations=12,
    tolerance=0.05,
    first_rates=(1e-3, 3e-2),
)
LSTM_TEXT = Problem(
    "lstm",
    "An LSTM on text",
    Text,
    "text",
    {
        "model": {"lstm": {"hidden": 64, "layers": 1, "embedding": 32}, "block_size": 32},
        "batch_size": 16,
        "steps": 400,
        "validation_windows": 128,
    },
    schedule=(),
    evaluations=20,
    tolerance=0.58,
    first_rates=(1e-3, 1.0),
)
GPT_TEXT = Problem(
    "gpt",
    "A small GPT on text",
    Text,
    "text",
    {
        "model": {"gpt": {"n_layer": 2, "n_head": 2, "n_embd": 48, "block_size": 32}},
        "batch_size": 8,
        "steps": 300,
        "validation_windows": 128,
    },
    schedule=(),
    evaluations=20,
    tolerance=0.62,
    first_rates=(3e-4, 3e-2),
)


def quick(problem: Problem) -> Problem:
    """The same in small: a test of the program, not a result."""
    model = problem.spec["model"]
    tiny: dict[str, Any] = {"channels": [2, 2], "hidden": 4} if problem.task is Images else {}
    if "lstm" in model:
        tiny = {"lstm": {"hidden": 4, "layers": 1, "embedding": 4}, "block_size": 4}
    if "gpt" in model:
        tiny = {"gpt": {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 4}}
    spec = problem.spec | {"model": tiny, "steps": 4, "batch_size": 4}
    if problem.task is Text:
        spec["validation_windows"] = 8
    return replace(problem, spec=spec, evaluations=2, points=2, further=0, search_seeds=1, seeds=2)


# One run


@dataclass(frozen=True)
class Job:
    problem: Problem
    method: Method
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method.key}.lr{self.lr:g}.seed{self.seed}"

    @property
    def config(self) -> Run:
        return {
            "problem": self.problem.name,
            **self.problem.spec,
            "schedule": self.problem.schedule,
            "evaluations": self.problem.evaluations,
            "data_sha256": digest(self.problem.data),
            "method": self.method.key,
            "optimizer": self.method.optimizer,
            "options": self.method.options,
            "measured": self.method.measured,
            "lr": self.lr,
            "seed": self.seed,
        }


class Measure:
    """Over the steps between two evaluations: the largest |m|, and of each tensor the share that the gate drops.

    An entry that is exactly 0 is dropped whatever the threshold: such are counted apart too.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, params: dict[str, Tensor]) -> None:
        self.optimizer, self.params = optimizer, params
        self._to_come = dict.fromkeys(params.values(), 0.0)  # thresholds that a step leaves to the next
        self.max_m: list[float] = []
        self.gated: dict[str, list[float]] = {name: [] for name in params}
        self.zero: dict[str, list[float]] = {name: [] for name in params}
        self._start()

    def _start(self) -> None:
        self._largest, self._steps = 0.0, 0
        self._gated = [0.0] * len(self.params)
        self._zero = [0.0] * len(self.params)

    @torch.no_grad()
    def step(self) -> None:
        """After the optimizer's step, with the gradients still there."""
        self._steps += 1
        moments = [m for state in self.optimizer.state.values() if isinstance(m := state.get("exp_avg"), Tensor)]
        if moments:
            self._largest = max(self._largest, *torch.stack(torch._foreach_norm(moments, math.inf)).tolist())
        counts = []
        for p in self.params.values():
            assert p.grad is not None
            size = p.grad.abs()
            counts += [(size <= self._threshold(p)).sum(), (size == 0).sum()]
        values = torch.stack(counts).tolist()
        for i, p in enumerate(self.params.values()):
            self._gated[i] += values[2 * i] / p.numel()
            self._zero[i] += values[2 * i + 1] / p.numel()

    def _threshold(self, p: Tensor) -> float:
        """That of the step just taken."""
        group, state = self.optimizer.param_groups[0], self.optimizer.state[p]
        confidence = group.get("confidence", "fixed")
        if confidence == "adaptive":
            return float(group["alpha"] * state["exp_avg_std"])
        if confidence == "adaptive_delayed":
            return self._used(p, group["alpha"] * float(state["exp_avg_std"]))
        if confidence == "sparsity":
            return self._used(p, float(state["threshold"]))
        return float(group.get("alpha") or 0.0)

    def _used(self, p: Tensor, threshold: float) -> float:
        """The threshold that the last step left, while `threshold` is that of the step to come."""
        used, self._to_come[p] = self._to_come[p], threshold
        return used

    def flush(self) -> None:
        self.max_m.append(self._largest)
        for i, name in enumerate(self.params):
            self.gated[name].append(self._gated[i] / self._steps)
            self.zero[name].append(self._zero[i] / self._steps)
        self._start()


def train(job: Job) -> Run:
    """The run's losses and measures. A loss that is not finite ends it."""
    problem, method = job.problem, job.method
    torch.manual_seed(job.seed)
    task = problem.task(problem.spec, load_data(problem.data), job.seed)
    params = dict(task.model.named_parameters())
    made_by = method.made_by
    assert made_by is not None
    optimizer = made_by(list(params.values()), lr=job.lr, **method.options)  # type: ignore[call-arg]
    measure = Measure(optimizer, params) if method.measured else None
    losses: list[float] = []
    validation: list[list[float]] = []
    probes: list[Any] = []
    # The process's own time: neither a neighbour on the machine nor a SIGSTOP is counted.
    start = time.process_time()
    for step in range(problem.steps):
        for group in optimizer.param_groups:
            group["lr"] = job.lr * problem.factor(step)
        loss = task.loss(step)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if measure is not None:
            measure.step()
        if (step + 1) % problem.every == 0:
            with torch.no_grad():
                validation.append([step + 1, *task.validate()])
            if measure is not None:
                measure.flush()
            if problem.probe is not None and step + 1 in problem.probed:
                probes.append(problem.probe(task))
    n = problem.every
    run: Run = {
        "train": [statistics.fmean(losses[i : i + n]) for i in range(0, len(losses), n)],
        "validation": validation,
        "finished": len(losses) == problem.steps and math.isfinite(validation[-1][1]),
        "seconds": time.process_time() - start,
        "parameters": sum(p.numel() for p in params.values()),
    }
    if measure is not None:
        run |= {
            "max_m": measure.max_m,
            "gated": rounded(measure.gated),
            "zero": rounded(measure.zero),
            "sizes": {name: p.numel() for name, p in params.items()},
        }
    if probes:
        run["probes"] = rounded(probes)
    return run


# Which runs


def score(runs: Sequence[Run]) -> tuple[float, float]:
    """Of a rate in the search: the best test error of a run, and the last test loss, averaged over the runs."""
    if not all(run["finished"] for run in runs):
        return math.inf, math.inf
    return statistics.fmean(map(best_error, runs)), statistics.fmean(run["validation"][-1][1] for run in runs)


def best_error(run: Run) -> float:
    """The smallest test error of any evaluation, as [SA] and [BH] report it."""
    return min(error for _, _, error in run["validation"])


@dataclass(frozen=True)
class Search:
    jobs: list[Job]  # those that are there, and those that can be run now
    scores: dict[float, tuple[float, float]]
    best: float | None  # None until it is known


def search(store: Store, method: Method) -> Search:
    """The grid, and then one point after the other beyond that edge where the best lies."""
    problem = store.problem
    first = index_of(problem.first_rates[0 if method.signed else 1])
    low, high = first, first + problem.points - 1
    seeds = range(SEARCH_SEED, SEARCH_SEED + problem.search_seeds)
    jobs: list[Job] = []
    scores: dict[float, tuple[float, float]] = {}
    todo = list(range(low, high + 1))
    while True:
        for index in todo:
            these = [Job(problem, method, rate(index), seed) for seed in seeds]
            jobs += these
            found = [run for job in these if (run := store.get(job)) is not None]
            if len(found) == len(these):
                scores[rate(index)] = score(found)
        if len(scores) * len(seeds) < len(jobs):
            return Search(jobs, scores, None)
        best = index_of(min(sorted(scores), key=scores.__getitem__))
        if low < best < high or high - low + 1 >= problem.points + problem.further:
            return Search(jobs, scores, rate(best))
        if best == low:
            low -= 1
            todo = [low]
        else:
            high += 1
            todo = [high]


def finals(store: Store, method: Method, lr: float) -> list[Job]:
    return [Job(store.problem, method, lr, seed) for seed in range(store.problem.seeds)]


@dataclass(frozen=True)
class Plan:
    ready: list[tuple[Store, Job]]  # in the order in which to run them
    waiting: int  # whose rate is still being searched, at least


def plan(stores: Iterable[Store], methods: Sequence[Method]) -> Plan:
    """All searches, then seed by seed, so that what is there at any time is a smaller but whole comparison."""
    searches: list[tuple[Store, Job]] = []
    results: list[tuple[Store, Job]] = []
    waiting = 0
    for store in stores:
        for method in methods:
            if method.made_by is None:
                continue
            found = search(store, method)
            searches += [(store, job) for job in found.jobs]
            if found.best is None:
                waiting += store.problem.seeds
            else:
                results += [(store, job) for job in finals(store, method, found.best)]
    return Plan(searches + sorted(results, key=lambda item: item[1].seed), waiting)


def finished(store: Store, method: Method) -> tuple[float, dict[int, Run]] | None:
    """The method's rate and its runs by seed; None until there is one."""
    if method.made_by is None or (lr := search(store, method).best) is None:
        return None
    runs = {job.seed: run for job in finals(store, method, lr) if (run := store.get(job)) is not None}
    return (lr, runs) if runs else None


# Measures of a comparison


def steps_to(run: Run, tolerance: float) -> float:
    """The first evaluated step at which the test error is at most `tolerance`; infinite if none is."""
    return next((float(step) for step, _, error in run["validation"] if error <= tolerance), math.inf)


def median_interval(values: Sequence[float]) -> Run:
    """The median with an interval of at least 95 % for it, between two order statistics; infinite values may enter.

    The k-th smallest of n and the k-th largest enclose the median but with probability 2 P(Binomial(n, 1/2) < k).
    None stands for infinity.
    """
    ordered, n = sorted(values), len(values)
    k = 0
    while k < n // 2 and 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n <= 0.05:
        k += 1
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    low, high = (ordered[k - 1], ordered[n - k]) if k else (None, None)
    ends = {"median": middle, "low": low, "high": high}
    shown = {key: value if value is None or math.isfinite(value) else None for key, value in ends.items()}
    return {"n": n, "reached": sum(map(math.isfinite, ordered)), **shown}


METRICS = {
    "best_error": best_error,
    "log_train": lambda run: math.log(max(run["train"][-1], 1e-12)),
    "last_loss": lambda run: run["validation"][-1][1],
}


def values_of(runs: dict[int, Run], metric: str) -> dict[int, float]:
    """By seed; infinite where the run diverged."""
    return {seed: METRICS[metric](run) if run["finished"] else math.inf for seed, run in runs.items()}


def difference(ours: dict[int, float], theirs: dict[int, float]) -> Run | None:
    """Paired by seed, with the 95 % interval; None where one of them diverged or nothing is shared."""
    values = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return interval(values) if values and all(map(math.isfinite, values)) else None


def verdict(interval: Run | None) -> str:
    """ "lower", "higher" or "open": on which side of 0 the interval lies."""
    if interval is None or interval["low"] is None or interval["low"] <= 0 <= interval["high"]:
        return "open"
    return "lower" if interval["high"] < 0 else "higher"


def judged(interval: Run | None) -> Run | None:
    return None if interval is None else interval | {"verdict": verdict(interval)}


def describe(store: Store, method: Method, curves: bool = False) -> Run | None:
    """All numbers of a method on a problem; `curves` of every seed, or only their means."""
    got = finished(store, method)
    if got is None:
        return None
    lr, runs = got
    found = search(store, method)
    entry: Run = {
        "label": method.label,
        "optimizer": method.optimizer,
        "options": method.options,
        "lr": lr,
        "search": {f"{rate:g}": score for rate, score in sorted(found.scores.items())},
        "search_runs": len(found.jobs),
        "seeds": len(runs),
        "diverged": sum(not run["finished"] for run in runs.values()),
        "seconds": statistics.median(run["seconds"] for run in runs.values()),
        "to_tolerance": median_interval([steps_to(run, store.problem.tolerance) for run in runs.values()]),
        "steps_to_tolerance": [steps_to(run, store.problem.tolerance) for run in runs.values()],
    }
    for metric in METRICS:
        values = values_of(runs, metric)
        finite = [value for value in values.values() if math.isfinite(value)]
        entry[metric] = (interval(finite) if finite else {"n": 0}) | {"by_seed": list(values.values())}
    complete = [run for run in runs.values() if run["finished"]]
    lines = {
        "train": [run["train"] for run in complete],
        "test_loss": [[loss for _, loss, _ in run["validation"]] for run in complete],
        "test_error": [[error for _, _, error in run["validation"]] for run in complete],
    }
    if curves:
        entry["curves"] = lines
    else:
        means = {what: [statistics.fmean(column) for column in zip(*of, strict=True)] for what, of in lines.items()}
        entry["mean_curves"] = means
    return entry


def describe_problem(store: Store, jobs: Sequence[Job]) -> Run:
    """Its settings, and what its runs cost."""
    problem = store.problem
    runs = [run for job in jobs if (run := store.get(job)) is not None]
    return {
        "title": problem.title,
        **problem.spec,
        "schedule": problem.schedule,
        "steps_between_evaluations": problem.every,
        "tolerance": problem.tolerance,
        "first_rates": {"sign": problem.first_rates[0], "magnitude": problem.first_rates[1]},
        "points": problem.points,
        "further_points": problem.further,
        "search_seeds": problem.search_seeds,
        "seeds": problem.seeds,
        "parameters": runs[0]["parameters"] if runs else None,
        "data_sha256": digest(problem.data),
        "runs": len(runs),
        "core_minutes": sum(run["seconds"] for run in runs) / 60,
        "made": sorted({(run["environment"]["commit"] or "unknown", run["date"][:10]) for run in runs}),
    }


# How numbers are written


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def cost(result: Run) -> str:
    """How many runs and core-minutes, and where."""
    problems = result["problems"].values()
    runs, minutes = (sum(problem[key] for problem in problems) for key in ("runs", "core_minutes"))
    dates = sorted({date for problem in problems for _, date in problem["made"]})
    return (
        f"{runs} runs, {minutes:.0f} core-minutes; {result['machine']['cpu']}, torch {result['versions']['torch']}, "
        f"module of commit {', '.join(sorted(common.modules(result)))}, "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}: "
        f"`{result['command']}`"
    )


# Command line


@dataclass(frozen=True)
class Study:
    """One experiment: what it runs, what it makes of the runs, and its picture."""

    name: str
    problems: tuple[Problem, ...]
    plan: Callable[[Sequence[Store]], Plan]
    collect: Callable[[Sequence[Store]], Run]
    draw: Callable[[Run, Any], Any]

    def stores(self, folder: Path, small: bool) -> list[Store]:
        stores = [kept.Store(folder, quick(problem) if small else problem) for problem in self.problems]
        for store in stores:
            store.folder.mkdir(parents=True, exist_ok=True)
        return stores


def _study(name: str) -> Study:
    study = importlib.import_module(f"experiments.{name}").STUDY
    assert isinstance(study, Study)
    return study


def _worker(name: str, folder: Path, small: bool) -> None:
    study = _study(name)
    stores = study.stores(folder, small)
    sys.exit(min(kept.work(lambda: study.plan(stores).ready, train), 100))


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def main(name: str, description: str | None, arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = kept.parsed(parser, arguments, RUNS, RESULTS)
    study = _study(name)
    stores = study.stores(args.runs, args.quick)

    def progress() -> tuple[int, int]:
        now = study.plan(stores)
        return sum(store.get(job) is not None for store, job in now.ready), len(now.ready) + now.waiting

    if args.list:
        print(f"{name}: {{}} of {{}} runs so far known to be needed".format(*progress()))
        return 0
    failed = 0
    committed = args.results.resolve() == RESULTS
    if not args.collect:
        if committed:
            machine.require_commits([kept.environment()["commit"]])
        failed = kept.supervise(
            _worker, (name, args.runs, args.quick), args.workers, progress, 0.2 if args.quick else 3
        )
    ready = study.plan(stores).ready
    header: Run = {
        "name": name,
        "command": machine.command(f"experiments.{name}", ["--quick"] if args.quick else []),
        "quick": args.quick,
        "seconds": sum(run["seconds"] for store, job in ready if (run := store.get(job)) is not None),
        **machine.facts(),
        "problems": {
            store.problem.name: describe_problem(store, [job for other, job in ready if other is store])
            for store in stores
        },
    }
    result = rounded(header | study.collect(stores))
    if committed:
        machine.require_commits(common.modules(result))
    args.results.mkdir(parents=True, exist_ok=True)
    write(args.results / f"{name}.json", compact_json(result))
    plt = pyplot()
    figure = study.draw(result, plt)
    partial = args.results / f"{name}.{os.getpid()}.partial.png"
    figure.savefig(partial, dpi=110, metadata={"Software": None})
    os.replace(partial, args.results / f"{name}.png")
    plt.close(figure)
    done, expected = progress()
    print(f"{name}: {done} of {expected} runs are in {args.results.name}/{name}.*")
    return 1 if failed else 0
