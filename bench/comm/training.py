"""One run: workers simulated in one process, whose votes go through the package's kernels."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.comm.methods import HONEST, Attack, Method
from reporting.problems import Text, digest, load_data, lr_factor, training_batch
from reporting.runs import Run
from signadam_ext.backends import votes


@dataclass(frozen=True)
class Problem:
    name: str
    spec: dict[str, Any]  # all that decides the bits of a run, but for workers, method, rate, attack and seed
    seeds: int
    evaluations: int
    average: int  # so many steps' training losses are kept as their mean
    seconds: float  # of a run of 4 workers, measured on one core of an AMD EPYC

    @property
    def steps(self) -> int:
        return int(self.spec["steps"])


PROBLEM = Problem(
    "votes",
    {
        # The example's preset "tiny", so that 2,000 steps of four workers take seconds.
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32},
        "batch_size": 4,  # of each worker
        "steps": 2000,
        "validation_windows": 512,
        "weight_decay": 0.1,
    },
    seeds=5,
    evaluations=4,
    average=50,
    seconds=18.0,
)


def quick(problem: Problem) -> Problem:
    """The same in small."""
    model = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8}
    spec = problem.spec | {"model": model, "steps": 4, "batch_size": 2, "validation_windows": 8}
    return replace(problem, spec=spec, seeds=2, evaluations=2, average=2, seconds=0.05)


@dataclass(frozen=True)
class Job:
    problem: Problem
    method: Method
    lr: float
    seed: int
    workers: int = 4
    attack: Attack = HONEST

    @property
    def name(self) -> str:
        attacked = f".{self.attack.name}" if self.workers != 4 else ""
        return f"{self.method.key}.{self.workers}workers{attacked}.lr{self.lr:g}.seed{self.seed}"

    @property
    def config(self) -> Run:
        method = self.method
        return {
            **self.problem.spec,
            "data_sha256": digest("text"),
            "method": method.key,
            "exchange": method.exchange,
            "momentum": method.momentum,
            "optimizer": method.optimizer.__name__,
            "options": method.options,
            "workers": self.workers,
            "adversaries": self.attack.adversaries,
            "factor": self.attack.factor,
            "lr": self.lr,
            "seed": self.seed,
        }


class Workers:
    """Gradients of each worker, and what the optimizer gets for them.

    Args:
        params: of the model that all share.
        count: of workers.
        method: what they exchange.
        attack: the first workers' are multiplied by its factor.
    """

    def __init__(self, params: list[nn.Parameter], count: int, method: Method, attack: Attack = HONEST) -> None:
        self.params, self.count, self.method, self.attack = params, count, method, attack
        sizes = [p.numel() for p in params]
        self.gradients = torch.zeros(count, sum(sizes))
        self.result = torch.zeros(sum(sizes))

        def views(flat: Tensor) -> list[Tensor]:
            return [part.view_as(p) for part, p in zip(flat.split(sizes), params, strict=True)]

        self.views, self.result_views = [views(flat) for flat in self.gradients], views(self.result)
        if method.votes:
            self._kernels = votes.get("cpu")
            momenta = [views(flat) for flat in torch.zeros_like(self.gradients)]
            self._tables = [
                votes.VoteTable(own, memory if method.momentum else None)
                for own, memory in zip(self.views, momenta, strict=True)
            ]
            self._casting = votes.Casting(memory="GRADIENTS" if method.momentum else "NONE")
            beta = method.momentum
            own = {"beta1": beta, "one_minus_beta1": 1 - beta, "beta2": beta, "one_minus_beta2": 1 - beta}
            self._scalars = votes.scalars_of([own] * len(params), torch.device("cpu"))
            self._majority = method.exchange == "majority"
            self._bits = 2 if self._majority else votes.width_for(count)
            self._read = votes.VoteTable(self.result_views)
            words = self._read.words
            self._codes = torch.zeros(count, words, dtype=torch.int32)
            self._counted = torch.zeros(words * self._bits // 2, dtype=torch.int32)

    def compute(self, worker: int, loss: Tensor) -> None:
        """Puts the gradients of a loss where this worker's are."""
        self.gradients[worker].zero_()
        for p, own in zip(self.params, self.views[worker], strict=True):
            p.grad = own
        loss.backward()

    def exchange(self) -> None:
        """Gives the parameters, as their gradients, what comes of those of all workers."""
        if self.attack.adversaries:
            self.gradients[: self.attack.adversaries] *= self.attack.factor
        if self.method.votes:
            for table, codes in zip(self._tables, self._codes, strict=True):
                self._kernels.cast(table, self._scalars, self._casting, codes)
            self._kernels.count(self._codes, self._bits, self._majority, self._counted)
            divisor = 1 if self._majority else self.count
            self._kernels.read(self._read, self._scalars, None, "WRITE", self._bits, divisor, self._counted)
        else:
            torch.mean(self.gradients, dim=0, out=self.result)
        for p, own in zip(self.params, self.result_views, strict=True):
            p.grad = own


def train(job: Job) -> Run:
    """The run's losses. A loss that is not finite ends it."""
    problem, method, n = job.problem, job.method, job.workers
    torch.manual_seed(job.seed)
    task = Text(problem.spec, load_data("text"), job.seed)
    params = list(task.model.parameters())
    workers = Workers(params, n, method, job.attack)
    decay = problem.spec["weight_decay"]
    optimizer = method.optimizer(params, lr=job.lr, weight_decay=decay, **method.options)  # type: ignore[call-arg]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, problem.steps))
    evaluate_at = {problem.steps * i // problem.evaluations for i in range(1, problem.evaluations + 1)}

    losses: list[float] = []
    validation: list[list[float]] = []
    start = time.process_time()
    for step in range(problem.steps):
        total = 0.0
        for worker in range(n):
            # Other data for each worker, and for each step.
            batch = training_batch(task.train_data, task.preset, job.seed, step * n + worker)
            loss = task.model(*batch)
            workers.compute(worker, loss)
            total += loss.item()
        losses.append(total / n)
        if not math.isfinite(losses[-1]):
            break
        workers.exchange()
        optimizer.step()
        scheduler.step()
        if step + 1 in evaluate_at:
            with torch.no_grad():
                validation.append([step + 1, *task.validate(dict(task.model.named_parameters()))])
    k = problem.average
    return {
        "train": [statistics.fmean(losses[i : i + k]) for i in range(0, len(losses), k)],
        "validation": validation,
        "finished": len(losses) == problem.steps and math.isfinite(validation[-1][1]),
        "seconds": time.process_time() - start,
        "parameters": sum(p.numel() for p in params),
    }
