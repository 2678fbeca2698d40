"""The problems, and one run."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from experiments.convergence.methods import METHODS, Method
from reporting.problems import Images, Text, digest, load_data, lr_factor
from reporting.runs import Run


@dataclass(frozen=True)
class Problem:
    name: str
    title: str
    task: type[Text] | type[Images]
    data: str
    #: All that decides the bits of a run, but for method, rate and seed. `clip` bounds the gradient's global norm;
    #: `last_factor`, where there is one, is what the cosine ends at.
    spec: dict[str, Any]
    evaluations: int
    seconds: float  # per run, measured on one core of an AMD EPYC; for an estimate before there are runs
    seeds: int  # of every method
    #: Where a search for the learning rate begins, unless it begins at what was found on the problem `after`.
    first_rates: tuple[float, ...] = (3e-4, 1e-3)
    after: str | None = None
    average: int = 1  # so many steps' training losses are kept as their mean
    logarithmic: bool = False  # the axis on which losses are drawn

    @property
    def steps(self) -> int:
        return int(self.spec["steps"])

    @property
    def methods(self) -> tuple[Method, ...]:
        """What is compared on it."""
        return METHODS if self.after is None else tuple(method for method in METHODS if method.long)


GPT_PROBLEM = Problem(
    "gpt",
    "A byte-level GPT of 3.1M parameters, 150 steps",
    Text,
    "text",
    {
        "model": {"n_layer": 3, "n_head": 6, "n_embd": 288, "block_size": 128},
        "batch_size": 8,
        "steps": 150,
        "validation_windows": 128,
        "weight_decay": 0.1,
        "clip": 1.0,
    },
    evaluations=3,
    seconds=42.0,
    seeds=5,
)
LONG_PROBLEM = replace(
    GPT_PROBLEM,
    name="gpt_long",
    title="A byte-level GPT of 3.1M parameters, 1,200 steps",
    spec=GPT_PROBLEM.spec | {"steps": 1200},
    evaluations=8,
    seconds=8 * 42.0,
    seeds=3,
    after="gpt",
    average=10,
)
DIGITS_PROBLEM = Problem(
    "digits",
    "A CNN of 29k parameters on scikit-learn's digits",
    Images,
    "digits",
    {
        "model": {"channels": [32, 64]},
        "batch_size": 32,
        "steps": 12 * 37,
        "weight_decay": 0.01,  # torch's default for AdamW
        "clip": None,
    },
    evaluations=4,
    seconds=2.5,
    seeds=10,
    average=37,
    logarithmic=True,
)
PROBLEMS = {problem.name: problem for problem in (GPT_PROBLEM, LONG_PROBLEM, DIGITS_PROBLEM)}


def quick(problem: Problem) -> Problem:
    """The same in small: every configuration, with two seeds."""
    tiny: dict[str, Any] = {"steps": 6, "batch_size": 4}
    if problem.task is Text:
        tiny |= {"model": {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32}, "validation_windows": 8}
    return replace(
        problem,
        title=problem.title + " (a quick test, not a result)",
        spec=problem.spec | tiny,
        seconds=0.2,
        seeds=2,
        average=min(problem.average, 2),
    )


@dataclass(frozen=True)
class Job:
    """One run: what it trains, by which method, with which learning rate, from which seed."""

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
            "data_sha256": digest(self.problem.data),
            "method": self.method.key,
            "optimizer": self.method.optimizer.__name__,
            "options": self.method.options,
            "bf16": self.method.bf16,
            "lr": self.lr,
            "seed": self.seed,
        }


def train(job: Job) -> Run:
    """The run's losses. A loss that is not finite ends it."""
    problem, method = job.problem, job.method
    torch.manual_seed(job.seed)
    task = problem.task(problem.spec, load_data(problem.data), job.seed)
    dtype = torch.bfloat16 if method.bf16 else torch.float32
    params = {name: p.detach().to(dtype).requires_grad_() for name, p in task.model.named_parameters()}
    options = dict(method.options)
    if method.stored:
        options["seed"] = job.seed  # of the random bits that round
    decay, clip = problem.spec["weight_decay"], problem.spec["clip"]
    optimizer = method.optimizer(list(params.values()), lr=job.lr, weight_decay=decay, **options)  # type: ignore[call-arg]
    last = problem.spec.get("last_factor", 0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, problem.steps, last))
    evaluate_at = {problem.steps * i // problem.evaluations for i in range(1, problem.evaluations + 1)}

    losses: list[float] = []
    validation: list[list[float]] = []
    # The process's own time: neither a neighbour on the machine nor a SIGSTOP is counted.
    start = time.process_time()
    seconds = 0.0
    for step in range(problem.steps):
        loss = task.loss({name: p.float() for name, p in params.items()}, step)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(params.values(), clip)
        optimizer.step()
        scheduler.step()
        if step + 1 in evaluate_at:
            seconds += time.process_time() - start
            with torch.no_grad():
                validation.append([step + 1, *task.validate({name: p.float() for name, p in params.items()})])
            start = time.process_time()
    state = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    n = problem.average
    return {
        "train": [statistics.fmean(losses[i : i + n]) for i in range(0, len(losses), n)],
        "validation": validation,
        "finished": math.isfinite(losses[-1]) and math.isfinite(validation[-1][1]),
        "seconds": seconds,
        "parameters": sum(p.numel() for p in params.values()),
        "state_bytes": sum(value.nbytes for value in state),
    }
