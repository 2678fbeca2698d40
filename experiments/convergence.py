"""How well each optimizer trains: `python -m experiments.convergence`, on one thread per run.

Two problems. "gpt": a byte-level GPT of 3.1M parameters (examples/gpt.py) on the standard library's sources, 150 steps
of 8 x 128 bytes. "digits": a small CNN on scikit-learn's digits, 12 epochs; each seed draws its own split.

What is equal for every method: the initial weights, the batches and the validation windows of a seed; the schedule (a
tenth of linear warm-up, then a cosine to 0); the decoupled weight decay; the search for a learning rate, over the same
grid of half decades with a seed of its own that enters no result, one step further where the best is at an edge. A form
of storage takes the rate found in fp32, and seed 0 looks half a decade to either side of it. Another beta takes beta
0.9's rate, without that look.

What differs, one axis at a time: the rule, in fp32; AdamW's beta2; `alpha` and `beta` of SignAdamPP; the dtype of its
state, over bf16 weights rounded stochastically; the form of the weights, over 2-bit state; and each of these two alone.

The model computes in fp32 whatever its weights are stored in: bf16 weights are cast up for each forward pass, so their
gradients arrive rounded to bf16. Rounding keeps a gradient's sign, and with `alpha = 0` SignAdamPP reads nothing else.

The plan: 140 runs of about 42 s on "gpt" and 172 of about 2.5 s on "digits", 1.8 hours on one core of an AMD EPYC. To
fit that, a run on "gpt" sees 154 thousand bytes only, most methods have 3 seeds, and a search has one.

Every finished run is one JSON file in `--runs`, named by what distinguishes it and written whole or not at all; what is
there with the very configuration is not run again. So the program may be killed, stopped and started at will, also
several times at once, and loses only the runs in progress. `--collect` makes of them the files in
experiments/results/convergence. What was finished when those were made lies there in runs.tar.gz: unpack it into
experiments/out/convergence to go on from it.

python -m experiments.convergence                      run what is missing, then collect
python -m experiments.convergence --workers 2          two processes of one thread each
python -m experiments.convergence --list               how many runs, how many hours
python -m experiments.convergence --collect            JSON, tables and figures from the runs so far
python -m experiments.convergence --quick              everything once in small, under a minute: a test of this program
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import signadam_ext
from reporting import machine
from reporting.present import markdown
from reporting.runs import Run, Store, band, compact_json, paired, rounded, write
from reporting.runs import supervise as start_workers
from reporting.runs import work as run_missing

sys.path.insert(0, str(machine.ROOT / "examples"))
from gpt import GPT, GPTConfig
from train_gpt import Preset, read_corpus, training_batch, windows

RUNS = machine.ROOT / "experiments" / "out" / "convergence"
RESULTS = machine.ROOT / "experiments" / "results" / "convergence"

HALF_DECADES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
GRID = HALF_DECADES[1:-1]  # the outer two are for a best rate at the edge
SEARCH_SEED = 1000
CHECK_SEED = 0
WEIGHT_DECAY = 0.01  # decoupled; torch's default for AdamW
Weights = dict[str, Tensor]


# What is compared


class Lion(torch.optim.Optimizer):
    """Lion [LI], arXiv 2302.06675, in plain torch: the published rule with its published betas."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(torch.lerp(p.grad, m, beta1).sign_(), alpha=group["lr"])
                m.lerp_(p.grad, 1 - beta2)


@dataclass(frozen=True)
class Method:
    key: str
    label: str
    optimizer: type[torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    ten_seeds: bool = False
    lr_of: str | None = None  # the method whose learning rate this one takes; None: its own is searched
    checked: bool = False  # half a decade to either side
    bf16: bool = False  # how weights are stored

    @property
    def stored(self) -> bool:
        """Whether it needs a package that knows forms of storage."""
        return "state_dtype" in self.options

    @property
    def runnable(self) -> bool:
        return not self.stored or "state_dtype" in inspect.signature(signadam_ext.SignAdamPP).parameters


def _plus(key: str, label: str, lr_of: str | None = None, **options: Any) -> Method:
    return Method(f"sign_adam_pp{key}", label, signadam_ext.SignAdamPP, options, lr_of=lr_of)


def _form(state: str, param_storage: str, label: str, beta: float = 0.9, **extra: Any) -> Method:
    options = {"state_dtype": state, "param_storage": param_storage, "beta": beta}
    key = f"{state}_{param_storage}" + (f"_beta{beta}" if beta != 0.9 else "")
    return replace(_plus(f"_{key}", label, "sign_adam_pp", **options), bf16=True, **extra)


ADAMW, PLUS, FEW_BITS = "adamw", "sign_adam_pp", "sign_adam_pp_int2_stochastic"
METHODS = (
    Method(ADAMW, "AdamW", torch.optim.AdamW, {"fused": True}, ten_seeds=True),
    Method("lion", "Lion", Lion, ten_seeds=True),
    replace(_plus("", "SignAdamPP"), ten_seeds=True),
    Method("signum", "Signum", signadam_ext.Signum),
    Method("sign_adam", "SignAdam", signadam_ext.SignAdam),
    _plus("_adaptive0.25", "SignAdamPP, adaptive 0.25", confidence="adaptive", alpha=0.25),
    _plus("_adaptive0.5", "SignAdamPP, adaptive 0.5", confidence="adaptive", alpha=0.5),
    _plus("_beta0.95", "SignAdamPP, beta 0.95", PLUS, beta=0.95),
    _plus("_beta0.99", "SignAdamPP, beta 0.99", PLUS, beta=0.99),
    # torch's beta2 remembers a thousand steps, more than there are: the baseline shall not lose for that alone.
    Method("adamw_beta2_0.95", "AdamW, beta2 0.95", torch.optim.AdamW, {"fused": True, "betas": (0.9, 0.95)}),
    _form("int2", "stochastic", "int2, bf16 stochastic", ten_seeds=True, checked=True),
    _form("int4", "stochastic", "int4, bf16 stochastic", checked=True),
    _form("int8", "stochastic", "int8, bf16 stochastic", checked=True),
    # Its runs on record have this key.
    replace(_form("int2", "nearest", "int2, bf16 nearest", checked=True), key="sign_adam_pp_int2_as_is"),
    _form("int2", "split8", "int2, bf16 split8", checked=True),
    _form("int2", "split16", "int2, bf16 split16", checked=True),
    _form("int2", "stochastic", "int2, bf16 stochastic, beta 0.95", beta=0.95),
    _form("int2", "stochastic", "int2, bf16 stochastic, beta 0.99", beta=0.99),
    _form("fp32", "stochastic", "fp32, bf16 stochastic"),
    replace(_form("int2", "nearest", "int2, fp32 weights"), key="sign_adam_pp_int2_fp32_weights", bf16=False),
)
BY_KEY = {method.key: method for method in METHODS}


def same_in_fp32(method: Method) -> str:
    """The fp32 method of which this one is a form of storage."""
    beta = method.options.get("beta", 0.9)
    return PLUS if beta == 0.9 else f"{PLUS}_beta{beta}"


# What they train


class Text:
    """The byte-level GPT. A batch is a function of seed and step alone."""

    def __init__(self, spec: dict[str, Any], data: Tensor, seed: int) -> None:
        self.preset = Preset(GPTConfig(**spec["model"]), spec["batch_size"], spec["steps"])
        self.seed = seed
        self.train_data, self.validation_data = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
        self.starts = torch.arange(count := spec["validation_windows"])
        self.starts = self.starts * (len(self.validation_data) - self.preset.model.block_size) // count
        self.model: nn.Module = GPT(self.preset.model)

    def loss(self, weights: Weights, step: int) -> Tensor:
        return functional_call(self.model, weights, training_batch(self.train_data, self.preset, self.seed, step))

    def validate(self, weights: Weights) -> list[float]:
        """The mean loss over windows spread evenly across the held-out text."""
        total = 0.0
        for part in self.starts.split(self.preset.batch_size):
            batch = windows(self.validation_data, part, self.preset.model.block_size)
            total += functional_call(self.model, weights, batch).item() * len(part)
        return [total / len(self.starts)]


class Images:
    """The CNN on 8 x 8 digits. A third of the images, drawn by the seed, is held out."""

    def __init__(self, spec: dict[str, Any], data: Tensor, seed: int) -> None:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        data = data[order]
        images, self.labels = data[:, :-1].float().view(-1, 1, 8, 8) / 16, data[:, -1].long()
        self.images = images
        self.n_train = len(data) * 2 // 3
        self.seed, self.batch_size = seed, spec["batch_size"]
        a, b = spec["model"]["channels"]
        self.model: nn.Module = nn.Sequential(
            nn.Conv2d(1, a, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(a, b, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * b, 10),
        )

    def loss(self, weights: Weights, step: int) -> Tensor:
        epoch, batch = divmod(step, self.n_train // self.batch_size)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        chosen = torch.randperm(self.n_train, generator=generator)[batch * self.batch_size :][: self.batch_size]
        return F.cross_entropy(functional_call(self.model, weights, (self.images[chosen],)), self.labels[chosen])

    def validate(self, weights: Weights) -> list[float]:
        """The mean loss and the share of wrong answers."""
        labels = self.labels[self.n_train :]
        logits = functional_call(self.model, weights, (self.images[self.n_train :],))
        wrong = (logits.argmax(1) != labels).float().mean()
        return [F.cross_entropy(logits, labels).item(), wrong.item()]


def _stdlib() -> Tensor:
    return torch.frombuffer(bytearray(read_corpus(None)), dtype=torch.uint8)


def _digits() -> Tensor:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.cat((torch.from_numpy(pixels), torch.from_numpy(labels)[:, None]), dim=1).to(torch.uint8)


@dataclass(frozen=True)
class Problem:
    name: str
    title: str
    task: Callable[[dict[str, Any], Tensor, int], Text | Images]
    spec: dict[str, Any]  # all that decides the bits of a run, but for method, rate and seed
    evaluations: int
    seconds: float  # per run, measured on one core of an AMD EPYC; for an estimate before there are runs
    seeds: int = 3
    most_seeds: int = 10
    grid: tuple[float, ...] = GRID
    average: int = 1  # so many steps' training losses are kept as their mean
    logarithmic: bool = False  # the axis on which losses are drawn

    @property
    def steps(self) -> int:
        return int(self.spec["steps"])

    def seeds_of(self, method: Method) -> int:
        return self.most_seeds if method.ten_seeds else self.seeds


GPT_PROBLEM = Problem(
    "gpt",
    "A byte-level GPT of 3.1M parameters on Python's standard library",
    Text,
    {
        "model": {"n_layer": 3, "n_head": 6, "n_embd": 288, "block_size": 128},
        "batch_size": 8,
        "steps": 150,
        "validation_windows": 128,
    },
    evaluations=3,
    seconds=42.0,
)
DIGITS_PROBLEM = Problem(
    "digits",
    "A CNN of 29k parameters on scikit-learn's digits",
    Images,
    {"model": {"channels": [32, 64]}, "batch_size": 32, "steps": 12 * 37},
    evaluations=4,
    seconds=2.5,
    seeds=5,
    average=37,
    logarithmic=True,
)


def quick(problem: Problem) -> Problem:
    """The same in small: every configuration, with two seeds and two rates."""
    tiny: dict[str, Any] = {"steps": 6, "batch_size": 4}
    if problem.task is Text:
        tiny |= {"model": {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32}, "validation_windows": 8}
    return replace(
        problem,
        title=problem.title + " (a quick test, not a result)",
        spec=problem.spec | tiny,
        seconds=0.2,
        seeds=2,
        most_seeds=2,
        grid=(1e-3, 3e-3),
        average=min(problem.average, 2),
    )


@cache
def load_data(problem_name: str) -> Tensor:
    """The problem's data, read once in a process."""
    return {"gpt": _stdlib, "digits": _digits}[problem_name]()


@cache
def digest(problem_name: str) -> str:
    return hashlib.sha256(load_data(problem_name).numpy().tobytes()).hexdigest()


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
            "data_sha256": digest(self.problem.name),
            "weight_decay": WEIGHT_DECAY,
            "method": self.method.key,
            "optimizer": self.method.optimizer.__name__,
            "options": self.method.options,
            "bf16": self.method.bf16,
            "lr": self.lr,
            "seed": self.seed,
        }


def lr_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first tenth, then a cosine down to 0."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def train(job: Job) -> Run:
    """The run's losses. A loss that is not finite ends it."""
    problem, method = job.problem, job.method
    torch.manual_seed(job.seed)
    task = problem.task(problem.spec, load_data(problem.name), job.seed)
    dtype = torch.bfloat16 if method.bf16 else torch.float32
    params = {name: p.detach().to(dtype).requires_grad_() for name, p in task.model.named_parameters()}
    options = dict(method.options)
    if method.stored:
        options["seed"] = job.seed  # of the random bits that round
    optimizer = method.optimizer(list(params.values()), lr=job.lr, weight_decay=WEIGHT_DECAY, **options)  # type: ignore[call-arg]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, problem.steps))
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
        "finished": len(losses) == problem.steps and math.isfinite(validation[-1][1]),
        "seconds": seconds,
        "parameters": sum(p.numel() for p in params.values()),
        "state_bytes": sum(value.nbytes for value in state),
    }


# Which runs


def half_decade(lr: float, offset: int) -> float:
    return HALF_DECADES[min(max(HALF_DECADES.index(lr) + offset, 0), len(HALF_DECADES) - 1)]


def extension(losses: dict[float, float]) -> float | None:
    """The rate beyond the edge of a searched grid, if the best is there; None if it is within."""
    best = min(losses, key=losses.__getitem__)
    if best == min(losses):
        return half_decade(best, -1)
    return half_decade(best, 1) if best == max(losses) else None


def search(store: Store[Problem], method: Method) -> tuple[list[Job], dict[float, float], float | None]:
    """The search's jobs, the losses so far, and the best rate once all of them are there."""
    jobs = [Job(store.problem, method, lr, SEARCH_SEED) for lr in store.problem.grid]
    losses = {job.lr: loss for job in jobs if (loss := store.final(job)) is not None}
    if len(losses) < len(jobs):
        return jobs, losses, None
    if (further := extension(losses)) is not None:
        jobs.append(Job(store.problem, method, further, SEARCH_SEED))
        loss = store.final(jobs[-1])
        if loss is None:
            return jobs, losses, None
        losses[further] = loss
    return jobs, losses, min(losses, key=losses.__getitem__)


def rate(store: Store[Problem], method: Method) -> float | None:
    return search(store, BY_KEY[method.lr_of or method.key])[2]


def jobs_of(store: Store[Problem], method: Method, lr: float, seeds: Sequence[int]) -> list[Job]:
    return [Job(store.problem, method, lr, seed) for seed in seeds]


@dataclass(frozen=True)
class Plan:
    ready: list[Job]  # in the order in which to run them
    waiting: int  # whose rate is still being searched


def plan(store: Store[Problem]) -> Plan:
    """All runs of a problem, those first that make a smaller but whole comparison."""
    ready = [job for method in METHODS if method.lr_of is None for job in search(store, method)[0]]
    rates = {method.key: rate(store, method) for method in METHODS}
    waiting = 0
    fp32 = [method for method in METHODS if not method.stored]
    stored = [method for method in METHODS if method.stored]
    first = range(min(store.problem.seeds, store.problem.most_seeds))
    stages = [[(method, seed) for seed in first for method in group] for group in (fp32, stored)]
    more = range(len(first), store.problem.most_seeds)
    stages.append([(method, seed) for seed in more for method in METHODS if seed < store.problem.seeds_of(method)])
    for i, stage in enumerate(stages):
        for method, seed in stage:
            lr = rates[method.key]
            if lr is None:
                waiting += 1
            else:
                ready.append(Job(store.problem, method, lr, seed))
        if i == 1:
            for method in stored:
                lr = rates[method.key]
                if method.checked and lr is None:
                    waiting += 2
                elif method.checked and lr is not None:
                    ready += check(store, method, lr)
    return Plan(ready, waiting)


def check(store: Store[Problem], method: Method, lr: float) -> list[Job]:
    """Half a decade to either side of a rate that was found in fp32."""
    rates = sorted({half_decade(lr, -1), half_decade(lr, 1)} - {lr})
    return [Job(store.problem, method, beside, CHECK_SEED) for beside in rates]


def work(stores: Sequence[Store[Problem]]) -> int:
    """Run whatever is missing and not under way elsewhere, until there is nothing left; how many runs failed."""
    return run_missing(
        lambda: [(store, job) for store in stores for job in plan(store).ready if job.method.runnable],
        train,
    )


def _worker(folder: Path, problems: Sequence[str], small: bool) -> None:
    sys.exit(min(work(stores_of(folder, problems, small)), 100))


def supervise(args: argparse.Namespace) -> int:
    """Start the workers and show their progress."""
    stores = stores_of(args.runs, args.problem, args.quick)

    def progress() -> tuple[int, int]:
        plans = [(store, plan(store)) for store in stores]
        done = sum(store.get(job) is not None for store, p in plans for job in p.ready)
        return done, sum(len(p.ready) + p.waiting for _, p in plans)

    arguments = (args.runs, args.problem, args.quick)
    failed = start_workers(_worker, arguments, args.workers, progress, every=0.5 if args.quick else 3)
    skipped = sum(not job.method.runnable for store in stores for job in plan(store).ready)
    if skipped:
        print(f"{skipped} runs wait for a build of signadam_ext with state_dtype and param_storage")
    return failed


def stores_of(folder: Path, problems: Sequence[str], small: bool) -> list[Store[Problem]]:
    chosen = [problem for problem in (GPT_PROBLEM, DIGITS_PROBLEM) if problem.name in problems]
    stores = [Store(folder, quick(problem) if small else problem) for problem in chosen]
    for store in stores:
        store.folder.mkdir(parents=True, exist_ok=True)
    return stores


def listing(stores: Sequence[Store[Problem]]) -> str:
    lines = []
    for store in stores:
        p = plan(store)
        done = sum(store.get(job) is not None for job in p.ready)
        total = len(p.ready) + p.waiting
        hours = store.problem.seconds / 3600
        lines.append(
            f"{store.problem.name}: {total} runs, and one for each best rate at an edge: about {total * hours:.2f} "
            f"hours on one core; {done} done, about {(total - done) * hours:.2f} hours left"
        )
    return "\n".join(lines)


# What came of it


def finals(store: Store[Problem], method: Method, metric: int = 0) -> dict[int, float]:
    """Final validation losses by seed."""
    lr = rate(store, method)
    if lr is None:
        return {}
    jobs = jobs_of(store, method, lr, range(store.problem.seeds_of(method)))
    return {job.seed: loss for job in jobs if (loss := store.final(job, metric)) is not None}


def difference(store: Store[Problem], method: Method, reference: str, metric: int = 0) -> Run | None:
    """Of final validation losses, over the seeds that both have; None without any, or when one of them diverged."""
    ours, theirs = finals(store, method, metric), finals(store, BY_KEY[reference], metric)
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return paired(differences) if differences and all(map(math.isfinite, differences)) else None


def summarize(store: Store[Problem]) -> dict[str, Run]:
    """By method: its rate and where that comes from, its final losses, its differences to the references."""
    metrics = {"loss": 0} | ({"error": 1} if store.problem.task is Images else {})
    summary = {}
    for method in METHODS:
        lr = rate(store, method)
        values = finals(store, method)
        if lr is None or not values:
            continue
        runs = [run for job in jobs_of(store, method, lr, list(values)) if (run := store.get(job)) is not None]
        entry: Run = {
            "label": method.label,
            "optimizer": method.optimizer.__name__,
            "options": method.options,
            "weights": "bf16" if method.bf16 else "fp32",
            "lr": lr,
            "state_bytes_per_parameter": runs[0]["state_bytes"] / runs[0]["parameters"],
            "seconds_per_step": statistics.median(run["seconds"] for run in runs) / store.problem.steps,
            "diverged": sum(not run["finished"] for run in runs),
        }
        if method.lr_of is None:
            entry["search"] = {f"{lr:g}": loss for lr, loss in sorted(search(store, method)[1].items())}
        else:
            entry["lr_of"] = method.lr_of
        if method.checked:
            beside = {job.lr: store.final(job) for job in check(store, method, lr)} | {lr: values.get(CHECK_SEED)}
            entry["check"] = {f"{lr:g}": loss for lr, loss in sorted(beside.items()) if loss is not None}
        for metric, i in metrics.items():
            losses = [loss for loss in finals(store, method, i).values() if math.isfinite(loss)]
            entry[metric] = {
                "seeds": len(losses),
                "mean": statistics.fmean(losses) if losses else None,
                "sd": statistics.stdev(losses) if len(losses) > 1 else None,
                "by_seed": {str(seed): loss for seed, loss in finals(store, method, i).items()},
            }
            # The last for a form at another beta, which would otherwise be compared with two things changed.
            for reference in dict.fromkeys((ADAMW, PLUS, same_in_fp32(method) if method.stored else PLUS)):
                if method.key != reference:
                    entry[metric][f"minus_{reference}"] = difference(store, method, reference, i)
        summary[method.key] = entry
    return summary


def interval(difference: Run | None) -> str:
    if difference is None:
        return "-"
    if difference["low"] is None:
        return f"{difference['mean']:+.4f}"
    return f"{difference['mean']:+.4f} ({difference['low']:+.4f} .. {difference['high']:+.4f})"


def page(store: Store[Problem], summary: dict[str, Run], content: Run) -> str:
    """The summary as Markdown."""
    problem = store.problem
    parts = [f"# {problem.title}\n"]
    parts.append(
        f"{problem.steps} steps of batch size {problem.spec['batch_size']}; {content['finished_runs']} of "
        f"{content['expected_runs']} planned runs, {content['training_hours']:.2f} hours of training on one thread. "
        "Differences are paired by seed, with 95 % confidence intervals (Student's t), not corrected for their number; "
        "below 0 is better than the reference. Rows named by two dtypes are SignAdamPP with that state and those "
        "weights.\n"
    )
    for metric, what in (("loss", "final validation loss"), ("error", "final validation error")):
        rows = []
        for entry in summary.values():
            if metric not in entry or entry[metric]["mean"] is None:
                continue
            values = entry[metric]
            spread = f" ± {values['sd']:.4f}" if values["sd"] is not None else ""
            rows.append(
                [
                    entry["label"],
                    f"{entry['lr']:g}",
                    str(values["seeds"]),
                    f"{values['mean']:.4f}{spread}",
                    interval(values.get(f"minus_{ADAMW}")),
                    interval(values.get(f"minus_{PLUS}")),
                    f"{entry['state_bytes_per_parameter']:.2f}",
                ]
            )
        if rows:
            header = ["", "lr", "seeds", f"{what} ± sd", "minus AdamW", "minus SignAdamPP in fp32", "state B/param"]
            parts.append(f"## {what.capitalize()}\n\n{markdown(header, rows)}\n")
    betas = [
        [entry["label"], interval(entry["loss"][f"minus_{reference}"])]
        for key, entry in summary.items()
        if (reference := same_in_fp32(BY_KEY[key])) != PLUS and f"minus_{reference}" in entry["loss"]
    ]
    if betas:
        table = markdown(["", "minus fp32 with the same beta"], betas)
        parts.append(f"## Two bits at a larger beta\n\n{table}\n")
    searched = [
        [entry["label"], *(f"{entry['search'][lr]:.4f}" if lr in entry["search"] else "" for lr in rates)]
        for rates in [[f"{lr:g}" for lr in HALF_DECADES]]
        for entry in summary.values()
        if "search" in entry
    ]
    header = ["", *(f"{lr:g}" for lr in HALF_DECADES)]
    parts.append(f"## Search for the learning rate (seed {SEARCH_SEED})\n\n{markdown(header, searched)}\n")
    checked = [
        [entry["label"], *(f"{entry['check'][lr]:.4f}" if lr in entry["check"] else "" for lr in header[1:])]
        for entry in summary.values()
        if "check" in entry
    ]
    if checked:
        parts.append(f"## Beside the rate found in fp32 (seed {CHECK_SEED})\n\n{markdown(header, checked)}\n")
    for picture, alt in (
        ("curves", "losses"),
        ("differences", "paired differences"),
        ("rates", "learning rates, beta"),
    ):
        parts.append(f"![{alt}]({problem.name}-{picture}.png)\n")
    return "\n".join(parts)


def collect(store: Store[Problem], folder: Path) -> None:
    """One JSON, one page and the figures from the runs so far."""
    problem = store.problem
    p = plan(store)
    runs = {job.name: run for job in p.ready if (run := store.get(job)) is not None}
    summary = summarize(store)
    if not summary:
        print(f"{problem.name}: no finished comparison yet")
        return
    environments: list[Run] = []
    compact: dict[str, Run] = {}
    for name, run in runs.items():
        where = run["environment"]
        if where not in environments:
            environments.append(where)
        kept = {key: run[key] for key in ("train", "validation", "finished", "seconds", "date")}
        config = {key: run["config"][key] for key in ("method", "lr", "seed")}
        compact[name] = {**config, **kept, "environment": environments.index(where)}
    content = {
        "title": problem.title,
        "problem": {
            **problem.spec,
            "rates": problem.grid,
            "seeds": problem.seeds,
            "most_seeds": problem.most_seeds,
            "train_losses_averaged_over": problem.average,
        },
        "data_sha256": digest(problem.name),
        "weight_decay": WEIGHT_DECAY,
        "search_seed": SEARCH_SEED,
        "parameters": next(iter(runs.values()))["parameters"],
        "expected_runs": len(p.ready) + p.waiting,
        "expected_hours": (len(p.ready) + p.waiting) * problem.seconds / 3600,
        "finished_runs": len(runs),
        "training_hours": sum(run["seconds"] for run in runs.values()) / 3600,
        "environments": environments,
        "methods": summary,
        "runs": compact,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f"{problem.name}.json", compact_json(rounded(content)))
    write(folder / f"{problem.name}.md", page(store, summary, content))
    draw(store, summary, folder)
    print(f"{problem.name}: {len(runs)} of {content['expected_runs']} runs are in {folder.name}/{problem.name}.*")


# Figures

COLORS = {
    ADAMW: "black",
    "lion": "tab:green",
    PLUS: "tab:red",
    "signum": "tab:purple",
    "sign_adam": "tab:orange",
    "sign_adam_pp_adaptive0.25": "tab:pink",
    "sign_adam_pp_adaptive0.5": "tab:brown",
    "adamw_beta2_0.95": "darkgray",
    FEW_BITS: "tab:blue",
    "sign_adam_pp_int4_stochastic": "tab:cyan",
    "sign_adam_pp_int8_stochastic": "tab:olive",
    "sign_adam_pp_int2_as_is": "tab:gray",
    "sign_adam_pp_int2_split8": "mediumorchid",
    "sign_adam_pp_int2_split16": "goldenrod",
}
CURVES = (
    (
        "Rules, in fp32",
        ADAMW,
        [ADAMW, "adamw_beta2_0.95", "lion", PLUS, "signum", "sign_adam", "sign_adam_pp_adaptive0.5"],
    ),
    (
        "Forms of storage of SignAdamPP",
        PLUS,
        [
            PLUS,
            FEW_BITS,
            "sign_adam_pp_int4_stochastic",
            "sign_adam_pp_int8_stochastic",
            "sign_adam_pp_int2_as_is",
            "sign_adam_pp_int2_split8",
            "sign_adam_pp_int2_split16",
        ],
    ),
)


def smooth(losses: Sequence[float], width: int) -> list[float]:
    """Means over `width` neighbours."""
    return [statistics.fmean(losses[i : i + width]) for i in range(len(losses) - width + 1)]


def curves(store: Store[Problem], key: str) -> dict[int, list[float]]:
    """Training losses by seed, smoothed."""
    lr = rate(store, BY_KEY[key])
    if lr is None:
        return {}
    jobs = jobs_of(store, BY_KEY[key], lr, range(store.problem.seeds_of(BY_KEY[key])))
    runs = {job.seed: run for job in jobs if (run := store.get(job)) is not None and run["finished"]}
    width = max(1, store.problem.steps // store.problem.average // 15) if store.problem.average == 1 else 1
    return {seed: smooth(run["train"], width) for seed, run in runs.items()}


def draw(store: Store[Problem], summary: dict[str, Run], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})
    for name, figure in (
        ("curves", draw_curves(plt, store, summary)),
        ("differences", draw_differences(plt, store, summary)),
        ("rates", draw_rates(plt, store, summary)),
    ):
        figure.savefig(folder / f"{store.problem.name}-{name}.png", dpi=130)
        plt.close(figure)


def draw_curves(plt: Any, store: Store[Problem], summary: dict[str, Run]) -> Any:
    """Training losses, and below them their differences to a reference, seed by seed."""
    problem = store.problem
    figure, grid = plt.subplots(2, 2, figsize=(12, 8), layout="constrained", sharex=True)
    for (title, reference, keys), (upper, lower) in zip(CURVES, grid.T, strict=True):
        base = curves(store, reference)
        lowest: list[float] = []
        spread: list[float] = []
        for key in keys:
            lines = curves(store, key)
            if key not in summary or not lines:
                continue
            length = len(next(iter(lines.values())))
            missing = problem.steps // problem.average - length
            steps = [(i + 1 + missing / 2) * problem.average for i in range(length)]
            values = list(lines.values())
            seeds = f"{len(values)} seed{'s' if len(values) > 1 else ''}"
            style = {"color": COLORS[key], "zorder": 3 if key == reference else 2}
            band(upper, steps, values, False, label=f"{summary[key]['label']} ({seeds})", **style)
            lowest += [min(line) for line in values]
            shared = [[a - b for a, b in zip(lines[s], base[s], strict=True)] for s in lines if s in base]
            if key == reference:
                lower.axhline(0, color=COLORS[key], linewidth=1.6)
            elif shared:
                band(lower, steps, shared, True, **style)
                settled = [statistics.fmean(c) for c in zip(*shared, strict=True)][length // 3 :]
                spread += [min(settled), max(settled)]
        if not lowest:
            continue
        if not problem.logarithmic:
            at = max(line[len(line) // 8] for line in base.values()) if base else max(lowest)
            upper.set_ylim(min(lowest) - 0.1, at + 0.1)
        else:
            upper.set_yscale("log")
        if spread:
            # The first steps differ by much more than the last ones, which matter.
            size = max(max(map(abs, spread)), 1e-3)
            lower.set_ylim(
                -1.3 * size if min(spread) < 0 else -0.4 * size, 1.3 * size if max(spread) > 0 else 0.4 * size
            )
        upper.set_title(title)
        upper.set_ylabel("training loss, nats (band: sd over seeds)" if upper is grid[0, 0] else "")
        lower.set_ylabel(f"minus {summary[reference]['label']} (band: 95 % interval)" if reference in summary else "")
        lower.set_xlabel("step")
        upper.legend(frameon=False, fontsize=9)
    figure.suptitle(problem.title)
    return figure


def draw_differences(plt: Any, store: Store[Problem], summary: dict[str, Run]) -> Any:
    """Every method's final validation loss against the two references."""
    keys = list(summary)
    figure, both = plt.subplots(1, 2, figsize=(12, 1.4 + 0.32 * len(keys)), layout="constrained", sharey=True)
    for axes, reference in zip(both, (ADAMW, PLUS), strict=True):
        axes.axvline(0, color=COLORS[reference], linewidth=1.2)
        reach: list[float] = []
        for row, key in enumerate(keys):
            found = summary[key]["loss"].get(f"minus_{reference}")
            if found is None:
                continue
            color = "tab:blue" if BY_KEY[key].stored else "tab:red"
            if found["low"] is not None:
                axes.plot([found["low"], found["high"]], [row, row], color=color, linewidth=2, solid_capstyle="butt")
            axes.plot(found["mean"], row, "o", color=color, markersize=5)
            reach.append(found["mean"])
        axes.set_title(f"minus {summary[reference]['label']}, fp32" if reference in summary else "")
        axes.set_xlabel("difference of the final validation loss, nats; below 0 is better")
        if reach:
            # An interval from three seeds that say little would otherwise squeeze all the others.
            size = max(max(*reach, 0) - min(*reach, 0), 1e-3)
            low, high = axes.get_xlim()
            axes.set_xlim(max(low, min(*reach, 0) - size), min(high, max(*reach, 0) + size))
    labels = [f"{summary[key]['label']} ({summary[key]['loss']['seeds']})" for key in keys]
    both[0].set_yticks(range(len(keys)), labels)
    both[0].invert_yaxis()
    figure.suptitle(f"{store.problem.title}\npaired by seed, with 95 % intervals; in brackets the number of seeds")
    return figure


def draw_rates(plt: Any, store: Store[Problem], summary: dict[str, Run]) -> Any:
    """The searches for a learning rate, the looks beside it, and the momentum's decay in fp32 and in 2 bits."""
    figure, (searches, checks, betas) = plt.subplots(1, 3, figsize=(14, 4.8), layout="constrained")
    for axes, what in ((searches, "search"), (checks, "check")):
        lowest, starts = [], []
        rates: set[float] = set()
        for key, entry in summary.items():
            points = sorted((float(lr), loss) for lr, loss in entry.get(what, {}).items() if math.isfinite(loss))
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=COLORS[key], markersize=4, label=entry["label"])
                rates.update(lr for lr, _ in points)
                lowest.append(min(loss for _, loss in points))
                starts.append(max(loss for _, loss in points))
        axes.set(xscale="log", xlabel="learning rate")
        axes.set_xticks(sorted(rates), [f"{lr:g}" for lr in sorted(rates)])
        axes.minorticks_off()
        if lowest:
            if store.problem.logarithmic:
                axes.set_yscale("log")
            else:
                # What is far from the best leaves the picture, so that the best can be told apart.
                axes.set_ylim(min(lowest) - 0.05, min(max(starts), min(lowest) + 1) + 0.05)
            axes.legend(frameon=False, fontsize=8)
    searches.set(title=f"Search in fp32, seed {SEARCH_SEED}", ylabel="final validation loss, nats")
    checks.set_title(f"Forms of storage beside fp32's rate, seed {CHECK_SEED}")
    for base, label, color in ((PLUS, "fp32", "tab:red"), (FEW_BITS, "int2, bf16 stochastic", "tab:blue")):
        pairs: list[tuple[float, float]] = []
        for beta in (0.9, 0.95, 0.99):
            found = summary.get(base if beta == 0.9 else f"{base}_beta{beta}")
            # The same seeds at every beta.
            values = [found["loss"]["by_seed"].get(str(s)) for s in range(store.problem.seeds)] if found else []
            for value in values:
                if value is not None and math.isfinite(value):
                    pairs.append((-math.log10(1 - beta), value))
        if pairs:
            betas.plot(*zip(*pairs, strict=True), "o", color=color, markersize=4, alpha=0.5)
            xs = sorted({x for x, _ in pairs})
            means = [statistics.fmean(y for x, y in pairs if x == at) for at in xs]
            betas.plot(xs, means, "-", color=color, label=label)
    betas.set_xticks([-math.log10(1 - beta) for beta in (0.9, 0.95, 0.99)], ["0.9", "0.95", "0.99"])
    betas.set(title="SignAdamPP by beta, at one learning rate", xlabel="beta")
    betas.legend(frameon=False, fontsize=8)
    figure.suptitle(store.problem.title)
    return figure


# Command line


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--problem", choices=("gpt", "digits"), action="append", help="only this one (default: both)")
    add("--workers", type=int, default=1, metavar="N", help="processes of one thread each (default: 1)")
    add("--runs", type=Path, help="where finished runs are kept (default: experiments/out/convergence)")
    add("--results", type=Path, help="where --collect writes (default: experiments/results/convergence)")
    add("--list", action="store_true", help="say how many runs there are and how long they take")
    add("--collect", action="store_true", help="only collect what is finished")
    add("--quick", action="store_true", help="everything in small, in experiments/out/convergence-quick")
    args = parser.parse_args(arguments)
    small = RUNS.with_name("convergence-quick")
    args.runs = args.runs or (small if args.quick else RUNS)
    args.results = args.results or (small if args.quick else RESULTS)
    args.problem = args.problem or ["gpt", "digits"]
    if "digits" in args.problem:
        try:
            import sklearn  # noqa: F401
        except ImportError:
            print("digits needs scikit-learn: left out")
            args.problem = [name for name in args.problem if name != "digits"]
    stores = stores_of(args.runs, args.problem, args.quick)
    print(listing(stores), flush=True)
    if args.list:
        return 0
    failed = 0 if args.collect else supervise(args)
    for store in stores:
        collect(store, args.results)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
