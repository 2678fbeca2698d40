"""Bytes per parameter between two steps and at the peak of one, of every storage form beside AdamW and other packages:

    pip install --no-deps --target DIR torch-optimi lion-pytorch torchao bitsandbytes flashoptim
    python -m bench.memory --out bench/results/memory --peers DIR

The model is a list of parameters and a backward that does nothing but bring each of them a gradient, so that no
activation is in the way. What is counted, each in a process of its own after a complete run that is thrown away:

- tensors: the storage of every live tensor, found through the garbage collector;
- objects: the rest of the heap, from malloc's own count (mallinfo2), with Python's objects sent to malloc too: torch's
  and Python's objects, this package's tables, malloc's headers;
- peak: the largest resident set during backward and step (VmHWM), over that of the process before. What it exceeds
  weights, state, objects and gradients by are temporaries and, within some hundred KB, the kernel's rounding.

Linux with glibc 2.33 or newer; elsewhere the two are left out and say so.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import importlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from reporting import machine, present
from reporting.files import rounded, write

from .harness import gpt2_shapes

Row = dict[str, Any]
Shapes = tuple[tuple[int, ...], ...]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PEERS = ("torch-optimi", "lion-pytorch", "torchao", "bitsandbytes", "flashoptim")


# Models


def models(quick: bool) -> dict[str, Shapes]:
    """The same number of parameters, near enough, in many tensors and in one."""
    if quick:
        return {"gpt": gpt2_shapes(64, 1024, 64, 4), "one": ((1 << 18,),)}
    return {"gpt": gpt2_shapes(336, 1024, 256, 12), "one": ((1 << 24,),)}


class _Use(torch.autograd.Function):
    """Passes a number on, and in backward brings a parameter its gradient, when autograd asks for it and no sooner."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, param: Tensor, watch: Callable[[Tensor], None]) -> Tensor:
        ctx.shape, ctx.dtype, ctx.watch = param.shape, param.dtype, watch
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        own = torch.full(ctx.shape, 0.5, dtype=ctx.dtype)
        ctx.watch(own)
        return grad, own, None


# Trainings


class Training:
    """Parameters, later their optimizer, and steps of both."""

    def __init__(self, shapes: Shapes, configuration: "Configuration") -> None:
        self.configuration = configuration
        dtype = DTYPES[configuration.param]
        self.params = [Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
        self.most_gradients = 0
        # Here already, so that they do not grow what is counted.
        self.optimizer: Any = None
        self.released: Any = None
        self.masters: list[Parameter] = []

    def prepare(self) -> None:
        self.optimizer = self.configuration.make(self.params)

    def release(self) -> None:
        assert self.configuration.release is not None
        self.released = self.configuration.release(self.params, self.optimizer)

    def _with_gradients(self) -> Iterable[Tensor]:
        return self.params

    def _watch(self, new: Tensor) -> None:
        there = sum(param.grad.nbytes for param in self._with_gradients() if param.grad is not None)
        self.most_gradients = max(self.most_gradients, there + new.nbytes)

    def backward(self) -> None:
        x = torch.zeros((), requires_grad=True)
        for param in self.params:
            x = _Use.apply(x, param, self._watch)
        x.backward()
        self._watch(torch.empty(0))

    def step(self) -> None:
        self.optimizer.step()

    def drop(self) -> None:
        for param in self._with_gradients():
            param.grad = None

    def iterate(self) -> None:
        self.backward()
        self.step()
        self.drop()


class MixedPrecision(Training):
    """Updates fp32 copies of the parameters, as mixed precision usually does, and rounds them into the parameters."""

    def prepare(self) -> None:
        self.masters = [Parameter(param.detach().float()) for param in self.params]
        self.optimizer = self.configuration.make(self.masters)

    def _with_gradients(self) -> Iterable[Tensor]:
        return [*self.params, *self.masters]

    def step(self) -> None:
        for param, master in zip(self.params, self.masters, strict=True):
            if master.grad is None:
                assert param.grad is not None
                master.grad = param.grad.float()
                param.grad = None
        self.optimizer.step()
        with torch.no_grad():
            for param, master in zip(self.params, self.masters, strict=True):
                param.copy_(master)


class MixedPrecisionWideGradients(MixedPrecision):
    """The same with gradients summed up in fp32, for accumulation over many backwards."""

    def prepare(self) -> None:
        super().prepare()
        for param, master in zip(self.params, self.masters, strict=True):
            param.register_post_accumulate_grad_hook(functools.partial(self._widen, master))

    @staticmethod
    def _widen(master: Tensor, param: Tensor) -> None:
        assert param.grad is not None
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        master.grad += param.grad
        param.grad = None


# Configurations


@dataclass(frozen=True)
class Configuration:
    """One optimizer in one form.

    Attributes:
        optimizer: its name.
        source: "ours", "torch" or the package.
        param: dtype of the parameters.
        make: makes it.
        state, weights: how we store these; of others a note.
        options: what else :mod:`signadam_ext.memory` must know.
        release: lets backward take the steps, where the optimizer can; what it returns is kept.
        gradients: to be measured, "all" of them at once and "released" inside backward.
        training: what trains.
    """

    optimizer: str
    source: str
    param: str
    make: Callable[[list[Parameter]], torch.optim.Optimizer]
    state: str = ""
    weights: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    release: Callable[[list[Parameter], Any], Any] | None = None
    gradients: tuple[str, ...] = ("all",)
    training: type[Training] = Training

    @property
    def names(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in ("optimizer", "source", "param", "state", "weights")}

    @property
    def title(self) -> str:
        return " ".join(word for word in (self.optimizer, self.param, self.state, self.weights) if word)

    def calculated(self, shapes: Shapes, gradients: str) -> dict[str, float] | None:
        """What the calculator says, in bytes."""
        from signadam_ext import memory

        if self.source == "torch":
            wide = "fp32" if self.training is MixedPrecisionWideGradients else None
            found = memory.adamw(shapes, self.param, grad_dtype=wide, mixed=self.training is not Training)
        elif self.source == "ours":
            words = {"state_dtype": self.state} if self.state else {}
            found = memory.estimate(
                shapes,
                self.optimizer,
                param_storage=self.weights,
                param_dtype=self.param,
                gradients=gradients,
                **words,
                **self.options,
            )
        else:
            return None
        return {"weights": found.weights, "state": found.state, "gradients": found.gradients}


def _ours(optimizer: str, param: str, weights: str, state: str = "", **options: Any) -> Configuration:
    import signadam_ext

    words = {"state_dtype": state} if state else {}
    make = functools.partial(getattr(signadam_ext, optimizer), param_storage=weights, **words, **options)
    # What is left of gradients does not depend on the rest, so that a few are enough.
    gradients = ("all", "released") if weights in ("stochastic", "split8") else ("all",)
    return Configuration(
        optimizer, "ours", param, make, state, weights, options, signadam_ext.release_gradients, gradients
    )


def _adamw(param: str, state: str = "", training: type[Training] = Training) -> Configuration:
    make = functools.partial(torch.optim.AdamW, fused=True)
    return Configuration("AdamW", "torch", param, make, state, training=training)


def _peer(package: str, module: str, optimizer: str, state: str, release: Any = None, **options: Any) -> Configuration:
    def make(params: list[Parameter]) -> torch.optim.Optimizer:
        return getattr(importlib.import_module(module), optimizer)(params, lr=1e-3, **options)

    gradients = ("all",) if release is None else ("released",)
    return Configuration(optimizer, package, "bf16", make, state, release=release, gradients=gradients)


def _release_optimi(params: list[Parameter], optimizer: Any) -> Any:
    import optimi

    model = torch.nn.ParameterList(params)
    optimi.prepare_for_gradient_release(model, optimizer)
    return model


HEADLINE_PARTS = ("optimizer", "param", "state", "weights")
HEADLINE = ["SignAdamPP", "bf16", "int2", "stochastic"]


def configurations(quick: bool) -> list[Configuration]:
    """Everybody, the largest first."""
    if quick:
        return [
            _adamw("bf16", "fp32 masters and moments", MixedPrecision),
            _ours("SignAdam", "bf16", "split8", "int4"),
            _ours("SignAdamPP", "bf16", "stochastic", "int2"),
        ]
    found = [
        _adamw("fp32"),
        _adamw("bf16", "fp32 masters, moments and gradients", MixedPrecisionWideGradients),
        _adamw("bf16", "fp32 masters and moments", MixedPrecision),
        _adamw("bf16"),
        _peer("torch-optimi", "optimi", "AdamW", "bf16, Kahan sum"),
        _peer("torch-optimi", "optimi", "Lion", "bf16, Kahan sum"),
        _peer(
            "torch-optimi",
            "optimi",
            "Lion",
            "bf16, Kahan sum, gradients released",
            _release_optimi,
            gradient_release=True,
        ),
        _peer("lion-pytorch", "lion_pytorch", "Lion", "bf16"),
        _peer("torchao", "torchao.optim", "AdamW8bit", "8-bit, stochastic", bf16_stochastic_round=True),
        _peer("torchao", "torchao.optim", "AdamW4bit", "4-bit, stochastic", bf16_stochastic_round=True),
        _peer("bitsandbytes", "bitsandbytes.optim", "AdamW8bit", "8-bit"),
        _peer("bitsandbytes", "bitsandbytes.optim", "Lion8bit", "8-bit"),
        _peer("flashoptim", "flashoptim", "FlashAdamW", "8-bit, 24-bit weights"),
        _peer("flashoptim", "flashoptim", "FlashLion", "8-bit, 24-bit weights"),
    ]
    forms = ("fp32", "bf16", "int8", "int4", "int2")
    for weights in ("nearest", "stochastic"):
        found.append(_ours("SignSGD", "bf16", weights))
    for state in ("fp32", "bf16", "int8"):
        found.append(_ours("Signum", "fp32", "nearest", state))
        found.append(_ours("Signum", "bf16", "stochastic", state))
    for state in forms:
        found.append(_ours("SignAdam", "bf16", "stochastic", state))
        found.append(_ours("SignAdam", "bf16", "stochastic", state, second_moment="analytic"))
    for state in forms:
        found.append(_ours("SignAdamPP", "fp32", "nearest", state))
        for weights in ("master", "split16", "split8", "stochastic", "nearest"):
            found.append(_ours("SignAdamPP", "bf16", weights, state))
    found.append(_ours("SignAdamPP", "bf16", "stochastic", "int2", confidence="adaptive_delayed"))
    return found


# What the system and malloc say of this process


class _MallInfo2(ctypes.Structure):
    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names)


def _libc() -> Any:
    return ctypes.CDLL(None)


def heap() -> int | None:
    """Bytes that malloc has handed out and not got back, with its headers; None where it does not tell."""
    with contextlib.suppress(AttributeError, OSError):
        function = _libc().mallinfo2
        function.restype = _MallInfo2
        info = function()
        return info.uordblks + info.hblkhd
    return None


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def collect() -> None:
    gc.collect()
    # Memory that is free is the system's again.
    with contextlib.suppress(AttributeError, OSError):
        _libc().malloc_trim(0)


def without_huge_pages() -> None:
    """Lets the resident set count pages of 4 KB: one of 2 MB would weigh 0.12 bytes per parameter of 16 million."""
    with contextlib.suppress(AttributeError, OSError):
        _libc().prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE


@contextlib.contextmanager
def peak_over(base: int, into: dict[str, int], name: str) -> Iterator[None]:
    """Notes by how much the resident set at its largest exceeds ``base`` within the block."""
    Path("/proc/self/clear_refs").write_text("5")
    yield
    into[name] = _status("VmHWM") - base


def storages() -> dict[int, int]:
    """Bytes of every storage of a live CPU tensor, by address."""
    found = {}
    for thing in gc.get_objects():
        # A wrapper has no storage of its own; the tensors it wraps are objects as well.
        if issubclass(type(thing), Tensor) and not hasattr(thing, "__tensor_flatten__"):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu" and tensor.layout == torch.strided:
                    storage = tensor.untyped_storage()
                    with contextlib.suppress(RuntimeError):  # of a tensor that only pretends, inside a compiler
                        found[storage.data_ptr()] = storage.nbytes()
    return found


# Measurements, each in a process of its own


@dataclass(frozen=True)
class Task:
    """One configuration on one model, with all gradients at once or released inside backward."""

    configuration: Configuration
    model: str
    shapes: Shapes
    gradients: str

    @property
    def names(self) -> dict[str, Any]:
        return {
            **self.configuration.names,
            "options": self.configuration.options,
            "model": self.model,
            "tensors": len(self.shapes),
            "elements": sum(map(math.prod, self.shapes)),
            "gradients": self.gradients,
        }

    def begin(self) -> Training:
        return self.configuration.training(self.shapes, self.configuration)

    def run(self, training: Training, steps: int) -> None:
        training.prepare()
        if self.gradients == "released":
            training.release()
        for _ in range(steps):
            training.iterate()


def count(task: Task) -> Row:
    """Bytes of weights and state, of gradients that exist at once, and of objects."""
    for _ in range(2):  # what is made once for a process is made now
        task.run(task.begin(), 2)
        gc.collect()
    gc.freeze()  # and need not be looked through again
    rounds = []
    for _ in range(3 if is_headline(task.names) else 1):
        training = task.begin()
        training.backward()  # what autograd keeps for a parameter is none of the optimizer's
        training.drop()
        training.most_gradients = 0
        gc.collect()
        there = sum(storages().values())
        before = heap()
        task.run(training, 3)
        gc.collect()
        after = heap()
        state = sum(storages().values()) - there
        objects = None if before is None or after is None else after - before - state
        rounds.append((objects, state, sum(p.untyped_storage().nbytes() for p in training.params)))
        most = training.most_gradients
        del training
    objects, state, weights = sorted(rounds)[len(rounds) // 2]
    found: Row = {"bytes": {"weights": weights, "state": state, "gradients": most}, "objects": objects}
    calculated = task.configuration.calculated(task.shapes, task.gradients)
    if calculated is not None:
        found["calculated"] = calculated
    return found


def peak(task: Task) -> Row:
    """The resident set between two steps, and at its largest during backward and step."""
    without_huge_pages()
    task.run(task.begin(), 2)
    collect()
    gc.freeze()
    base = _status("VmRSS")
    training = task.begin()
    task.run(training, 2)
    collect()
    found: dict[str, int] = {"resident": _status("VmRSS") - base}
    with peak_over(base, found, "peak"):
        training.iterate()
    plain = task.gradients == "all" and task.model == "gpt" and not task.configuration.options
    if plain and form_of(task.names) in OPERATIONS:
        collect()
        return {**found, "operations": operations(training)}
    return dict(found)


#: Optimizers whose other operations are measured.
OPERATIONS = (HEADLINE, ["Signum", "bf16", "int8", "stochastic"])


def operations(training: Training) -> dict[str, int]:
    """What else needs memory for a moment, over what is there before."""
    found: dict[str, int] = {}

    def measure(name: str, operation: Callable[[], object]) -> None:
        collect()
        with peak_over(_status("VmRSS"), found, name):
            operation()

    optimizer: Any = training.optimizer
    for param in training.params:
        # Matrices as autograd never leaves them: transposed in memory.
        param.grad = torch.ones(param.shape[::-1], dtype=param.dtype).t() if param.ndim == 2 else torch.ones_like(param)
    measure("step, transposed gradients", training.step)
    training.drop()
    measure("state_dict()", optimizer.state_dict)
    saved = [optimizer.state_dict()]
    measure("load_state_dict()", lambda: optimizer.load_state_dict(saved[0]))
    saved.clear()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        measure("save_state()", lambda: optimizer.save_state(path))
        measure("load_state()", lambda: optimizer.load_state(path))
    return found


MEASURES = {"count": count, "native": count, "peak": peak}

#: Malloc without caches of freed blocks, or with each tensor in pages of its own, which are the system's when it is
#: freed. The first as Python's allocator as well, or beside it.
_HEAP = "glibc.malloc.tcache_count=0:glibc.malloc.mmap_threshold=1073741824"
ENVIRONMENTS = {
    "count": {"GLIBC_TUNABLES": _HEAP, "PYTHONMALLOC": "malloc"},
    "native": {"GLIBC_TUNABLES": _HEAP},
    "peak": {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"},
}


def is_headline(names: Row) -> bool:
    return names["source"] == "ours" and not names["options"] and form_of(names) == HEADLINE


def form_of(names: Row) -> list[str]:
    return [names[part] for part in HEADLINE_PARTS]


def tasks(quick: bool, headline: bool) -> list[Task]:
    """Every configuration on the many tensors of a model, and the headline on a single one too."""
    shapes = models(quick)
    found = []
    for configuration in configurations(quick):
        of_model = [Task(configuration, "gpt", shapes["gpt"], gradients) for gradients in configuration.gradients]
        if is_headline(of_model[0].names):
            of_model += [Task(configuration, "one", shapes["one"], gradients) for gradients in configuration.gradients]
        elif headline:
            continue
        found += of_model
    return found


def _in_fork(measure: Callable[[Task], Row], task: Task) -> Row:
    """The result of a child that has imported what this process has, and nothing else in common with other tasks."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read)
            try:
                row = measure(task)
            except Exception as error:
                traceback.print_exc()
                row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            with os.fdopen(write, "w") as pipe:
                json.dump(row, pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"error": "the process ended without a result"}


def child(measure: str, rows: Path, quick: bool, headline: bool) -> None:
    """Measures task after task, a line of JSON each."""
    torch.set_num_threads(1)  # each thread has caches of its own, and says nothing about an optimizer
    warnings.simplefilter("ignore")
    # Torch imports much at the first step of a process; here it is done once for all forks.
    param = Parameter(torch.zeros(1))
    param.grad = torch.zeros(1)
    torch.optim.AdamW([param]).step()
    gc.freeze()
    with rows.open("a") as file:
        for task in tasks(quick, headline):
            row = task.names | _in_fork(MEASURES[measure], task)
            print(json.dumps(row), file=file, flush=True)
            print(measure, task.configuration.title, task.model, task.gradients, file=sys.stderr)


def measured(measure: str, options: argparse.Namespace, headline: bool = False) -> list[Row]:
    """The rows of all tasks, from a process with the environment that the measure needs."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        command = [sys.executable, "-m", "bench.memory", "--child", measure, "--rows", str(rows)]
        command += ["--quick"] * options.quick + ["--aim"] * headline
        if options.peers:
            command += ["--peers", str(options.peers)]
        run = subprocess.run(
            command,
            cwd=machine.ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **ENVIRONMENTS[measure]},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if run.returncode != 0:
            raise SystemExit(run.stderr[-3000:])
        return [json.loads(line) for line in rows.read_text().splitlines()]


# The report


def aim(counted: Sequence[Row], native: Sequence[Row]) -> list[Row]:
    """All that is live beside the weights of the headline, for each of its tasks: tensors, the rest of the heap without
    Python's small objects, and with them."""
    found = []
    for everything, without_python in zip(counted, native, strict=True):
        row = {name: everything[name] for name in ("model", "tensors", "elements", "gradients")}
        for name, other in (("everything", everything), ("native", without_python)):
            if "error" in other:
                row["error"] = other["error"]
            else:
                live = other["bytes"]["state"] + (other["objects"] or 0)
                row[name] = {"bytes": live, "per_parameter": live / other["elements"]}
        found.append(row)
    return found


def joined(counted: Sequence[Row], peaks: Sequence[Row]) -> list[Row]:
    """One row for each task, with the sum of its parts beside its peak."""
    rows = []
    for row, of_peak in zip(counted, peaks, strict=True):
        row = {**of_peak, **row}
        if "error" not in row:
            parts = {**row["bytes"], "objects": row["objects"] or 0}
            row["temporaries"] = row["peak"] - sum(parts.values())
            figures = {**parts, **{name: row[name] for name in ("resident", "peak", "temporaries")}}
            row["per_parameter"] = {name: value / row["elements"] for name, value in figures.items()}
            if "operations" in row:
                row["operations_per_parameter"] = {n: v / row["elements"] for n, v in row["operations"].items()}
        rows.append(row)
    return rows


def mistaken(rows: Sequence[Row]) -> list[str]:
    """Where the calculator and the live tensors differ by as much as a byte."""
    return [
        f"{title(row)}: calculated {row['calculated']}, measured {row['bytes']}"
        for row in rows
        if "calculated" in row and row["calculated"] != row["bytes"]
    ]


_WEIGHTS = {
    "stochastic": " rounded stochastically",
    "split8": " + 8 low bits",
    "split16": " + 16 low bits",
    "master": " + fp32 masters",
}


def title(row: Row) -> str:
    words = [row["optimizer"], *map(str, row["options"].values())]
    if row["source"] not in ("ours", "torch"):
        words.append(f"({row['source']})")
    about = [f"{row['param']} weights{_WEIGHTS.get(row['weights'], '')}"]
    if row["state"]:
        about.append(row["state"] + (" state" if row["source"] == "ours" else ""))
    if row["gradients"] == "released" and row["source"] == "ours":
        about.append("gradients released")
    if row["tensors"] == 1:
        about.append("one tensor")
    return f"{' '.join(words)}: {', '.join(about)}"


PARTS = ("weights", "state", "gradients", "objects", "temporaries", "resident", "peak")


def table(rows: Sequence[Row]) -> str:
    lines = [
        [title(row), *(f"{row['per_parameter'][part]:.3f}" for part in PARTS)] for row in rows if "per_parameter" in row
    ]
    return present.markdown(["bytes per parameter", *PARTS], lines)


#: Of the picture, which is to be read in a moment: what a row must be, and how gradients are.
_SHOWN: tuple[tuple[dict[str, str], str], ...] = (
    ({"source": "torch", "param": "fp32"}, "all"),
    ({"source": "torch", "state": "fp32 masters and moments"}, "all"),
    ({"source": "lion-pytorch"}, "all"),
    ({"source": "torchao"}, "all"),
    ({"source": "bitsandbytes", "optimizer": "AdamW8bit"}, "all"),
    ({"optimizer": "SignAdamPP", "param": "fp32", "state": "fp32"}, "all"),
    ({"optimizer": "SignAdamPP", "param": "bf16", "state": "int8", "weights": "split16"}, "all"),
    ({"optimizer": "SignAdamPP", "param": "bf16", "state": "int8", "weights": "stochastic"}, "all"),
    ({"optimizer": "SignAdamPP", "param": "bf16", "state": "int2", "weights": "stochastic"}, "all"),
    ({"optimizer": "SignAdamPP", "param": "bf16", "state": "int2", "weights": "stochastic"}, "released"),
)
_COLORS = {"weights": "#94a3b8", "state": "#2563eb", "gradients": "#f59e0b"}


def picture(report: Row, path: Path) -> None:
    """Bars of weights, state and gradients, the largest on top, and a tick at the peak of the resident set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [
        row
        for row in report["rows"]
        if "per_parameter" in row
        and row["model"] == "gpt"
        and not row["options"]
        and any(
            row["gradients"] == gradients and all(row[name] == value for name, value in wanted.items())
            for wanted, gradients in _SHOWN
        )
    ]
    rows.sort(key=lambda row: -sum(row["bytes"].values()) / row["elements"])
    figure, axis = plt.subplots(figsize=(11, 0.44 * len(rows) + 1.6), layout="constrained")
    for y, row in enumerate(rows):
        left = 0.0
        for part, color in _COLORS.items():
            width = row["per_parameter"][part]
            ours = row["source"] == "ours"
            axis.barh(y, width, left=left, color=color, height=0.72, alpha=1.0 if ours else 0.55)
            if width > 0.7:
                axis.text(left + width / 2, y, f"{width:.3g}", va="center", ha="center", fontsize=11, color="white")
            left += width
        most = row["per_parameter"]["peak"]
        axis.plot([most, most], [y - 0.4, y + 0.4], color="black", linewidth=1.4)
        axis.text(max(left, most) + 0.12, y, f"{left:.2f}", va="center", fontsize=12, fontweight="bold")
    axis.set_yticks(range(len(rows)), [title(row).replace(_WEIGHTS["stochastic"], "") for row in rows], fontsize=11)
    for label, row in zip(axis.get_yticklabels(), rows, strict=True):
        label.set_color("black" if row["source"] == "ours" else "#6b7280")
        label.set_fontweight("bold" if row["source"] == "ours" else "normal")
    axis.set_xlim(0, 1.1 * max(row["per_parameter"]["peak"] for row in rows))
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel("bytes per parameter; bold: weights + state + gradients", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in _COLORS.values()]
    handles.append(plt.Line2D([], [], color="black", linewidth=1.4))
    axis.legend(handles, [*_COLORS, "measured peak of the process"], loc="center right", frameon=False, fontsize=11)
    shape = rows[0]
    about, versions = report["machine"], report["versions"]
    figure.suptitle(
        f"Memory of training, {shape['elements'] / 1e6:.3g}M parameters in {shape['tensors']} tensors "
        f"({about['cpu']}, torch {versions['torch']}, module of commit {present.built_at(report)})",
        fontsize=11,
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


def installed(package: str) -> str | None:
    """Its version, if it is there."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path(__file__).parent / "out", help="folder for JSON and PNG")
    add("--peers", type=Path, help="folder in which other packages are installed")
    add("--quick", action="store_true", help="small models, few configurations: does it run, and do the bytes agree")
    add("--aim", action="store_true", help="only what is live beside bf16 weights with 2-bit momentum, as JSON")
    add("--plot", action="store_true", help="only draw again what is in --out")
    add("--child", choices=MEASURES, help=argparse.SUPPRESS)
    add("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peers:
        options.peers = options.peers.resolve()
        sys.path.append(str(options.peers))  # last: torch stays the one that is measured
    if options.child:
        child(options.child, options.rows, options.quick, options.aim)
        return 0
    report = machine.facts()
    report["name"] = machine.slug(report["machine"] | {"gpu": None})
    stem = options.out / report["name"]
    if options.plot:
        picture(json.loads(stem.with_suffix(".json").read_text()), stem.with_suffix(".png"))
        return 0
    counted = measured("count", options, headline=options.aim)
    of_headline = aim([row for row in counted if is_headline(row)], measured("native", options, headline=True))
    if options.aim:
        print(json.dumps(of_headline))
        return 0
    rows = joined(counted, measured("peak", options))
    shown = [f"--{name}" for name in ("quick", "aim") if getattr(options, name)]
    report["command"] = machine.command("bench.memory", shown)
    report["versions"]["peers"] = {package: installed(package) for package in PEERS}
    report |= {"counts": __doc__, "headline": of_headline, "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    write(stem.with_suffix(".json"), json.dumps(rounded(report, 6), indent=1) + "\n")
    picture(report, stem.with_suffix(".png"))
    print(table(rows))
    for row in rows:
        if "error" in row:
            print(f"{title(row)}: {row['error']}")
    for line in (wrong := mistaken(rows)):
        print(line)
    print(f"written: {stem.name}.json, {stem.name}.png")
    return int(bool(wrong) or any("error" in row and row["source"] in ("ours", "torch") for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
