"""Worlds of the fuzzer: one small training, held three times and driven in lock step.

``auto`` runs the kernels, ``reference`` the whole-tensor operations, and ``plain`` runs the kernels on ordinary tensors
only: where an action does something odd to the other two, it does to this one what that must amount to. All three must
have the same bits after every action.
"""

from __future__ import annotations

import gc
import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from support.paper_formulas import TABLE, Row
from support.strategies import scales
from torch import Tensor
from torch.nn import Parameter

import signadam_ext
from signadam_ext.core.rule import rule_of
from signadam_ext.optimizers.base import SignOptimizer

#: What the package may raise over what a user hands in.
REFUSALS = (TypeError, ValueError, RuntimeError)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SPECIALS = (0.0, -0.0, 1e-45, -1e-40, 6e-8, 3.4e38, -65504.0, torch.inf, -torch.inf, torch.nan)
SHAPES = ((), (1,), (3,), (7,), (33,), (70,), (0,), (5, 7), (4, 0, 2), (9, 7), (2, 3, 4, 2), (4, 3, 1, 3))
LARGE = 17_001  # more than a chunk


class Fault(Exception):
    """What the package did wrong."""


class Skip(Exception):
    """The action makes no sense in this world."""


def halved(g: Tensor, alpha: Tensor) -> Tensor:
    """A confidence function."""
    return torch.where(g.abs() > alpha, g * 0.5, 0.0)


OWN = Row("sign_adam_pp-own", signadam_ext.SignAdamPP, {"confidence": halved, "alpha": 0.1}, TABLE[0].formula)
STEERED = Row("sign_adam_pp-sparsity", signadam_ext.SignAdamPP, {"confidence": "sparsity", "target": 0.5}, OWN.formula)
ROWS = (*TABLE, OWN, STEERED)


@dataclass(frozen=True)
class TensorSpec:
    """A parameter: ``layout`` is "dense", "channels_last", "transposed", "gaps", "offset" or "shared" (a buffer)."""

    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    seed: int


@dataclass
class Spec:
    """A world before its first action.

    Attributes:
        row: the optimizer's class, and its own hyperparameters.
        tensors: the parameters, in the order of their names.
        groups: hyperparameters of each group, and which parameters it has.
        named: whether the optimizer is told their names.
        shares: whether some parameters share memory.
    """

    row: Row
    tensors: list[TensorSpec]
    groups: list[tuple[dict[str, Any], list[int]]]
    named: bool
    shares: bool

    @staticmethod
    def drawn(draw: random.Random) -> Spec:
        row = draw.choice(ROWS) if draw.random() < 0.93 else OWN
        groups: list[tuple[dict[str, Any], list[int]]] = []
        tensors: list[TensorSpec] = []
        shares = draw.random() < 0.12
        state_dtypes = ("fp32", "bf16", "int8") if row is OWN else row.state_dtypes
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            kinds = (None,) if row.reads_param else (None, None, "cautious")
            hyperparameters: dict[str, Any] = {
                "lr": draw.choice((1e-3, 0.1, 0.5)),
                "weight_decay": draw.choice((0.0, 0.0, 0.1)),
                "decoupled_weight_decay": draw.random() < 0.5,
                "maximize": draw.random() < 0.3,
                "seed": draw.choice((0, 7, 2**64 - 1, draw.getrandbits(64))),
                "param_storage": draw.choice(("nearest", "nearest", "stochastic", "split16", "split8", "master")),
                "weight_decay_kind": draw.choice(kinds),
                **draw.choice(scales(row)),
            }
            if state_dtypes:
                hyperparameters["state_dtype"] = draw.choice(state_dtypes)
            allowed = (torch.bfloat16,) if hyperparameters["param_storage"].startswith("split") else DTYPES
            own: list[int] = []
            for _ in range(draw.choice((1, 1, 2))):
                own.append(len(tensors))
                tensors.append(_tensor_spec(draw, draw.choice(allowed)))
            if shares:
                dtype, seed = draw.choice(allowed), draw.getrandbits(30)
                for begin in (0, 20):
                    own.append(len(tensors))
                    tensors.append(TensorSpec((40, begin), "shared", dtype, seed))
            groups.append((hyperparameters, own))
        if draw.random() < 0.15:
            dtype = torch.bfloat16 if groups[0][0]["param_storage"].startswith("split") else draw.choice(DTYPES)
            groups[0][1].append(len(tensors))
            tensors.append(TensorSpec((LARGE,), "dense", dtype, draw.getrandbits(30)))
        return Spec(row, tensors, groups, draw.random() < 0.5, shares)


def _tensor_spec(draw: random.Random, dtype: torch.dtype) -> TensorSpec:
    shape = draw.choice(SHAPES)
    layouts = {4: ("dense", "channels_last"), 2: ("dense", "transposed", "gaps"), 1: ("dense", "offset", "gaps")}
    return TensorSpec(shape, draw.choice(layouts.get(len(shape), ("dense",))), dtype, draw.getrandbits(30))


def made(specs: list[TensorSpec]) -> list[Parameter]:
    """The parameters of these specifications."""
    buffers: dict[int, Tensor] = {}
    params = []
    for spec in specs:
        generator = torch.Generator().manual_seed(spec.seed)
        if spec.layout == "shared":
            size, begin = spec.shape
            if spec.seed not in buffers:
                buffers[spec.seed] = torch.randn(60, generator=generator).to(spec.dtype)
            params.append(Parameter(buffers[spec.seed][begin : begin + size]))
            continue
        x = torch.randn(spec.shape, generator=generator).to(spec.dtype)
        params.append(Parameter(laid_out(x, spec.layout)))
    return params


def laid_out(x: Tensor, layout: str, offset: int = 3) -> Tensor:
    """The same numbers in other places."""
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "gaps":
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "offset":
        flat = torch.zeros(x.numel() + offset, dtype=x.dtype)
        flat[offset:] = x.reshape(-1)
        return flat[offset:].view(x.shape)
    return x


@lru_cache(64)
def _normal(seed: int, shape: torch.Size) -> Tensor:
    """Normal numbers, made once for the three sides, and never written to."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def values(draw: random.Random, shape: torch.Size, special: bool = True) -> Tensor:
    """fp32 numbers of a gradient."""
    seed = draw.getrandbits(48)
    x = _normal(seed, shape).clone()
    kind = draw.random()
    if kind < 0.08:
        x.zero_()
    elif kind < 0.2:
        x *= draw.choice((1e-6, 1e-3, 100.0))
    elif kind < 0.25 and special and x.numel():
        generator = torch.Generator().manual_seed(seed)
        where = torch.randperm(x.numel(), generator=generator)[: 1 + x.numel() // 4]
        x.view(-1)[where] = torch.tensor(SPECIALS)[torch.randint(len(SPECIALS), where.shape, generator=generator)]
    return x


@dataclass
class Look:
    """What a world's side holds: parameters, state by parameter, hyperparameters by group."""

    params: list[Tensor]
    state: list[dict[str, Any]]
    groups: list[dict[str, Any]]


_IGNORED = ("params", "backend", "foreach", "fused", "capturable", "differentiable")


def plain_value(value: Any) -> Any:
    """A hyperparameter as a number, whatever holds it."""
    if isinstance(value, (Tensor, np.generic)):
        return value.item()
    if isinstance(value, (tuple, list)):
        return tuple(plain_value(x) for x in value)
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return value


@dataclass
class Side:
    """One of the three copies of a world.

    Attributes:
        backend: of its optimizer.
        plain: whether odd things are left out.
        params: the parameters, in the order of their names.
        counts: steps that each must have taken.
        points: places where the last step could have been interrupted; allocations: what it allocated.
        has_compiled: whether torch.compile keeps weak references to the parameters, so that torch swaps none.
    """

    name: str
    backend: str
    spec: Spec
    params: list[Parameter]
    optimizer: SignOptimizer
    counts: list[int]
    points: int = 4000
    allocations: int = 40
    sentinels: list[Tensor] = field(default_factory=list)
    has_compiled: bool = False

    @property
    def plain(self) -> bool:
        return self.name == "plain"

    @staticmethod
    def made(name: str, backend: str, spec: Spec) -> Side:
        params = made(spec.tensors)
        groups = []
        for hyperparameters, own in spec.groups:
            listed: list[Any] = [(f"layer.{i}", params[i]) if spec.named else params[i] for i in own]
            groups.append({"params": listed, **hyperparameters})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = spec.row.optimizer(groups, backend=backend, **spec.row.hyperparameters)
        return Side(name, backend, spec, params, optimizer, [0] * len(params))

    def remade(self, params: list[Parameter] | None = None) -> SignOptimizer:
        """A fresh optimizer with the same groups, over the same parameters or copies of them."""
        known = {"betas", *self.optimizer.HYPERPARAMETERS, *self.optimizer.COMMON}
        twins = {id(p): q for p, q in zip(self.params, params or self.params, strict=True)}
        groups, empty = [], []
        for k, group in enumerate(self.optimizer.param_groups):
            listed: list[Any] = [twins[id(p)] for p in group["params"]]
            own = {name: x for name, x in group.items() if name in known}
            if not listed:  # a constructor would take it for one without names
                empty.append((k, {**own, "params": [], **({"param_names": []} if "param_names" in group else {})}))
                continue
            if "param_names" in group:
                listed = list(zip(group["param_names"], listed, strict=True))
            groups.append({**own, "params": listed})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = self.spec.row.optimizer(groups, backend=self.backend, **self.spec.row.hyperparameters)
        for k, group in empty:
            optimizer.param_groups.insert(k, {**optimizer.defaults, **group})
        return optimizer

    # What it holds.

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """The optimizer's state, without the access that may tell it to look."""
        return vars(self.optimizer)["state"]

    def group_of(self, i: int) -> tuple[int, int]:
        """(group, place in it) of a parameter."""
        for g, group in enumerate(self.optimizer.param_groups):
            for k, param in enumerate(group["params"]):
                if param is self.params[i]:
                    return g, k
        raise Skip

    def number_of(self, i: int) -> int:
        """The parameter's number in a state dict."""
        g, k = self.group_of(i)
        return k + sum(len(group["params"]) for group in self.optimizer.param_groups[:g])

    def label(self, i: int) -> str:
        """What errors call the parameter."""
        g, k = self.group_of(i)
        names = self.optimizer.param_groups[g].get("param_names")
        return f"parameter {names[k]!r}" if names else f"parameter {k} of group {g}"

    def tensors_of(self, i: int) -> list[str]:
        """Names of the state tensors of a parameter that have elements and that a step reads."""
        state, group = self.state.get(self.params[i], {}), self.optimizer.param_groups[self.group_of(i)[0]]
        # A parameter that went to another group has kept what scaled its steps in the one before.
        read = {rule_of(type(self.optimizer), group).threshold_state}
        left = {"agreement", "param_rms"} - read | {"ema"}
        return sorted(name for name, x in state.items() if isinstance(x, Tensor) and x.numel() and name not in left)

    def present(self) -> list[int]:
        """Parameters with a gradient."""
        return [i for i, p in enumerate(self.params) if p.grad is not None]

    def look(self, clone: bool = True) -> Look:
        def kept(x: Any) -> Any:
            return x.detach().clone() if clone and isinstance(x, Tensor) else x

        state = self.state
        return Look(
            [kept(p.detach()) for p in self.params],
            [{name: kept(x) for name, x in state.get(p, {}).items()} for p in self.params],
            [
                {name: plain_value(x) for name, x in group.items() if name not in _IGNORED}
                for group in self.optimizer.param_groups
            ],
        )

    def exported(self, i: int, name: str) -> Any:
        return self.optimizer.state_dict()["state"][self.number_of(i)][name]

    # What it does.

    def step(self, call: Callable[[], Any] | None = None) -> None:
        """Takes one step, by ``optimizer.step()`` unless told otherwise, and checks counts and versions."""
        present, versions = self.present(), [p._version for p in self.params]
        grads = [None if p.grad is None else p.grad for p in self.params]
        (call or self.optimizer.step)()
        del grads
        self.took(present, versions)

    def took(self, present: list[int], versions: list[int], steps: int = 1) -> None:
        """Notes that a step has been taken, and checks that versions say so."""
        for i in present:
            self.counts[i] += steps
        if self.spec.shares:
            return
        for i, (param, version) in enumerate(zip(self.params, versions, strict=True)):
            moved = param._version != version
            if moved and i not in present:
                raise Fault(f"{self.name}: the version of {self.label(i)} moved, and it has no gradient")
            if not moved and i in present and param.numel() and not param.is_inference():
                raise Fault(f"{self.name}: the version of {self.label(i)} did not move, and it was updated")

    def check_counts(self) -> None:
        for i, param in enumerate(self.params):
            count = self.state.get(param, {}).get("step", 0)
            if float(count) != self.counts[i]:
                raise Fault(f"{self.name}: {self.label(i)} has counted {float(count)} steps, not {self.counts[i]}")

    def error_of(self, call: Callable[[], Any]) -> Exception | None:
        """What the call raises; a fault if that is no refusal, or if versions moved all the same."""
        versions = [p._version for p in self.params]
        try:
            call()
            return None
        except REFUSALS as error:
            found: Exception = error.with_traceback(None)
        if [p._version for p in self.params] != versions:
            raise Fault(f"{self.name}: refused ({said(found)}), and yet versions have moved")
        return found

    def must_refuse(self, call: Callable[[], Any], before: Look, names: tuple[str, ...], undo: Callable[[], None]):
        """The call must raise an error that has one of the names, and change nothing."""
        try:
            error = self.error_of(call)
        finally:
            undo()
        if error is None:
            raise Fault(f"{self.name}: no error")
        self.check_refusal(error, before, names)

    def check_refusal(self, error: Exception, before: Look, names: tuple[str, ...]) -> None:
        if not any(name in str(error) for name in names):
            raise Fault(f"{self.name}: the error names none of {names}: {said(error)}")
        different = difference(before, self.look(clone=False))
        if different:
            raise Fault(f"{self.name}: refused ({said(error)}), and yet {different}")

    def refuses_or_serves(
        self, call: Callable[[], Any], before: Look, names: tuple[str, ...], undo: Callable[[], None]
    ) -> str:
        """A step over something odd: either refused by name, when it is taken without; or it must be right."""
        present, versions = self.present(), [p._version for p in self.params]
        error = self.error_of(call)
        undo()
        if error is None:
            self.took(present, versions)
            return "served"
        self.check_refusal(error, before, names)
        self.step()
        return "refused"


def said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def same(a: Any, b: Any) -> bool:
    """Equal values; tensors bit for bit, but that NaN equals NaN."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and (a == b or (a != a and b != b))
    a, b = a.detach(), b.detach()
    if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    if torch.equal(a.view(INTEGERS[a.itemsize]), b.view(INTEGERS[a.itemsize])):
        return True
    if a.dim() == 0 and a == b:  # zeros of both signs, which a number without dimensions may have
        return True
    signs = torch.equal(torch.signbit(a) & ~a.isnan(), torch.signbit(b) & ~b.isnan())
    return signs and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def difference(a: Look, b: Look, export: Callable[[int, str], bool] | None = None) -> str | None:
    """The first thing that differs; ``export`` may decide that packed moments are equal though their bytes are not."""
    for i, (x, y) in enumerate(zip(a.params, b.params, strict=True)):
        if not same(x, y):
            return f"parameter {i} differs ({x.dtype}, {tuple(x.shape)}): {_example(x, y)}"
    for i, (x, y) in enumerate(zip(a.state, b.state, strict=True)):
        if x.keys() != y.keys():
            return f"the state of parameter {i} has {sorted(x)} and {sorted(y)}"
        for name in x:
            if same(x[name], y[name]):
                continue
            packed = isinstance(x[name], Tensor) and x[name].dtype == torch.uint8
            if not (packed and export is not None and export(i, name)):
                return f"{name} of parameter {i} differs: {_example(x[name], y[name])}"
    for k, (x, y) in enumerate(zip(a.groups, b.groups, strict=True)):
        for name in x.keys() | y.keys():
            if not (name in x and name in y and same_number(x[name], y[name])):
                return f"{name} of group {k} is {x.get(name)!r} and {y.get(name)!r}"
    return None


def same_number(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same_number, a, b))
    return a == b or (a != a and b != b)


def _example(a: Any, b: Any) -> str:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype:
        wrong = (a.double() != b.double()) & ~(a.isnan() & b.isnan())
        if wrong.any():
            return f"{a[wrong][0].item()!r} and {b[wrong][0].item()!r}, {int(wrong.sum())} of {a.numel()}"
    return f"{str(a)[:80]} and {str(b)[:80]}"


@contextmanager
def freed(tensor: Tensor, how: str = "all") -> Iterator[None]:
    """Frees the tensor's storage, and puts it back with its contents; no version moves.

    Args:
        tensor: it has elements.
        how: "all", or "half" of what it needs, or its last "one" element; the rest is elsewhere then.
    """
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    kept = torch.empty(0, dtype=torch.uint8).set_(storage).clone()
    storage.resize_(0)
    if how != "all":
        needed = tensor.storage_offset() * tensor.element_size() + tensor.nbytes
        storage.resize_(needed // 2 if how == "half" else needed - tensor.element_size())
    # What now lies where it was must stay as it is.
    others = [torch.zeros(max(size, 1), dtype=torch.uint8) for _ in range(3)]
    try:
        yield
    finally:
        scribbled = any(bool(x.any()) for x in others)
        storage.resize_(size)
        torch.empty(0, dtype=torch.uint8).set_(storage).copy_(kept)
        if scribbled:
            raise Fault("freed memory has been written to")


class World:
    """Three sides, and the checks that hold after every action."""

    def __init__(self, seed: str) -> None:
        self.spec = Spec.drawn(random.Random(seed))
        self.sides = [
            Side.made(name, backend, self.spec)
            for name, backend in (("auto", "auto"), ("reference", "reference"), ("plain", "auto"))
        ]

    def describe(self) -> str:
        tensors = [f"{x.layout}{list(x.shape)} {str(x.dtype)[6:]}" for x in self.spec.tensors]
        return f"{self.spec.row.id}; {tensors}; {self.spec.groups}"

    def check(self) -> None:
        """All sides hold the same bits, and have counted as many steps as were taken."""
        auto, _, plain = self.sides
        for side in self.sides:
            side.check_counts()
        looks = [side.look(clone=False) for side in self.sides]
        if different := difference(looks[0], looks[1]):
            raise Fault(f"auto and reference differ: {different}")

        def export(i: int, name: str) -> bool:
            return same(auto.exported(i, name), plain.exported(i, name))

        if different := difference(looks[0], looks[2], export):
            raise Fault(f"auto and plain differ: {different}")

    def end(self) -> None:
        """Everything is dropped, and must be freed."""
        for side in self.sides:
            known = [weakref.ref(p) for p in side.params]
            known += [
                weakref.ref(x) for p in side.params for x in side.state.get(p, {}).values() if isinstance(x, Tensor)
            ]
            for p in side.params:
                p.grad = None
            side.optimizer.state.clear()
            side.optimizer.param_groups.clear()
            side.params = []
            del p
            # The optimizer itself lives on.
            if any(ref() is not None for ref in known):
                gc.collect()
                if any(ref() is not None for ref in known):
                    raise Fault(f"{side.name}: dropped parameters or state are still held")
