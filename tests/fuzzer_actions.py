"""What the fuzzer does to a world, action by action.

An action gets one side of the world and a source of random numbers that is the same for every side; what must differ
from side to side (where an interrupt falls) is drawn from ``own(draw)``. It returns what it did in a few words, by
which actions are counted, and raises :class:`Fault` where the package is wrong, or :class:`Skip` before it has done
anything.
"""

from __future__ import annotations

import copy
import gc
import io
import math
import os
import pickle
import random
import re
import sys
import tempfile
import threading
import time
import warnings
import weakref
import zipfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fuzzer_failures import StepsInside, at_point, by_timer, out_of_memory
from fuzzer_world import (
    REFUSALS,
    Fault,
    Side,
    Skip,
    TensorSpec,
    difference,
    freed,
    laid_out,
    made,
    said,
    same,
    values,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

import signadam_ext
from signadam_ext.core.rule import rule_of

Draw = random.Random
Act = Callable[[Side, Draw], str | None]


@dataclass(frozen=True)
class Action:
    name: str
    act: Act
    weight: float


ACTIONS: dict[str, Action] = {}


def action(name: str, weight: float = 1.0) -> Callable[[Act], Act]:
    def register(act: Act) -> Act:
        ACTIONS[name] = Action(name, act, weight)
        return act

    return register


def own(draw: Draw) -> Draw:
    """Random numbers of which a side may take as many as it likes."""
    return Draw(draw.getrandbits(60))


# Gradients.


def dense_gradient(p: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(p, requires_grad=False).copy_(x)


def give_one(side: Side, i: int, x: Tensor) -> None:
    p = side.params[i]
    p.grad = None
    p.grad_dtype = p.dtype
    p.grad = dense_gradient(p, x)
    if side.spec.row.reads_variance:
        p.grad_variance = torch.full_like(p, 0.5, dtype=torch.float32, requires_grad=False)


def give(side: Side, draw: Draw, only: int | None = None, everyone: bool = False) -> None:
    """Ordinary gradients for some parameters, one of which has elements; None for the others."""
    indices = range(len(side.params))
    must = draw.choice([i for i in indices if side.params[i].numel()] or list(indices)) if only is None else only
    for i, p in enumerate(side.params):
        x = values(draw, p.shape)
        if draw.random() < 0.7 or everyone or i == must:
            give_one(side, i, x)
        else:
            p.grad = None


def without_gradients(side: Side) -> None:
    for p in side.params:
        p.grad = None


def one(side: Side, draw: Draw, fits: Callable[[Tensor], bool] = lambda p: p.numel() > 0) -> int:
    """A parameter that fits."""
    found = [i for i, p in enumerate(side.params) if fits(p)]
    if not found:
        raise Skip
    return draw.choice(found)


def started(side: Side, draw: Draw, i: int) -> None:
    """Sees to it that a parameter has state, and everyone a gradient."""
    give(side, draw, only=i, everyone=True)
    if side.params[i] not in side.state:
        side.step()


class Ordinary(Tensor):
    """A subclass whose memory is its own."""


class Wrapping(Tensor):
    """A subclass that has the memory of another tensor alone."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        wrapper = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        wrapper.inner = inner
        return wrapper

    def __repr__(self, **_: Any) -> str:
        return "Wrapping()"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrapped(x: Any) -> Any:
            return x.inner if isinstance(x, Wrapping) else x

        return func(*map(unwrapped, args), **{name: unwrapped(x) for name, x in (kwargs or {}).items()})


class Flattened(Wrapping):
    """The same, as distributed tensors are made."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Flattened:
        return Flattened(inner["inner"])


def leaked(x: Tensor) -> Tensor:
    """A functorch tensor that has outlived its transformation."""
    found: list[Tensor] = []
    torch.func.grad(lambda y: (found.append(y), y.float().sum())[1])(x)
    return found[0]


WITHOUT_MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "fake": lambda x: FakeTensorMode(allow_non_fake_inputs=True).from_tensor(x),
    "meta": lambda x: x.to("meta"),
    "wrapper": Flattened,
    "wrapper without flatten": Wrapping,
    "functional": torch._to_functional_tensor,
    "functorch": lambda x: leaked(x) if x.is_floating_point() else torch._to_functional_tensor(x),
    "zero": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "sparse": lambda x: x.to_sparse() if x.dim() else torch._to_functional_tensor(x),
}


def is_ordinary(x: Any) -> bool:
    """Whether it is a tensor with memory of its own."""
    odd = torch._is_functional_tensor(x) or x._is_zerotensor() or x.layout != torch.strided
    return type(x) in (Tensor, Parameter) and x.device.type == "cpu" and not odd


def odd_gradient(kind: str, x: Tensor, p: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """A gradient of that kind, and an ordinary one of the same values."""
    if kind == "other dtype":
        x = x.to(draw.choice([d for d in (torch.float32, torch.bfloat16, torch.float16) if d != p.dtype]))
        return x, x
    x = x.to(p.dtype)
    if kind == "contiguous":
        return x.clone(memory_format=torch.contiguous_format), x
    if kind == "expanded":
        x = (x.reshape(-1)[0] if x.numel() else x.new_zeros(())).expand(p.shape)
        return x, x.clone()
    if kind == "expanded rows":
        if p.dim() < 2 or not p.numel():
            raise Skip
        x = x[:1].expand(p.shape)
        return x, x.clone()
    if kind == "transposed":
        if p.dim() != 2:
            raise Skip
        return laid_out(x, "transposed"), x
    if kind == "channels_last":
        if p.dim() != 4:
            raise Skip
        return laid_out(x, "channels_last"), x
    if kind == "sliced":
        return laid_out(x, "offset", draw.randrange(1, 9)), x
    if kind == "gaps":
        if not p.dim():
            raise Skip
        return laid_out(x, "gaps"), x
    if kind == "negative":
        return torch._neg_view(-dense_gradient(p, x)), x
    if kind == "negative strided":
        if not p.dim():
            raise Skip
        return torch._neg_view(laid_out(-x, "gaps")), x
    if kind == "conjugate's imaginary part":
        if p.dtype != torch.float32:
            raise Skip
        return torch.complex(torch.zeros_like(x), -x).conj().imag, x
    if kind == "zero tensor":
        return torch._efficientzerotensor(x.shape, dtype=x.dtype), torch.zeros_like(x)
    if kind == "made in inference mode":
        with torch.inference_mode():
            return x.clone(), x
    if kind == "of a graph":
        return x.clone().requires_grad_() * 1, x
    if kind == "subclass":
        return x.clone().as_subclass(Ordinary), x
    raise AssertionError(kind)


GRADIENT_KINDS = (
    *("other dtype", "contiguous", "expanded", "expanded rows", "transposed", "channels_last", "sliced", "gaps"),
    *("negative", "negative strided", "conjugate's imaginary part", "zero tensor", "made in inference mode"),
    *("of a graph", "subclass"),
)


@action("step", 12)
def plain_step(side: Side, draw: Draw) -> str | None:
    if draw.random() < 0.3 and side.present():
        side.step()
        return "same gradients"
    give(side, draw)
    side.step()
    return None


@action("steps with odd gradients", 8)
def odd_gradients(side: Side, draw: Draw) -> str | None:
    kind = draw.choice(GRADIENT_KINDS)
    i = one(side, draw, lambda p: True)
    p = side.params[i]
    odd, ordinary = odd_gradient(kind, values(draw, p.shape), p, draw)
    give(side, draw, only=i)
    p.grad = None
    p.grad_dtype = odd.dtype
    p.grad = ordinary if side.plain else odd
    for _ in range(draw.choice((1, 2))):
        side.step()
    p.grad = None
    return kind


@action("gradients edited in place", 2)
def edited_gradients(side: Side, draw: Draw) -> str | None:
    give(side, draw)
    side.step()
    for i in side.present():
        grad = side.params[i].grad
        assert grad is not None
        if side.plain:
            side.params[i].grad = grad * 0.5
        elif draw.random() < 0.5:
            grad.mul_(0.5)
        else:
            grad.data = grad * 0.5
    side.step()
    return None


@action("closure")
def closure(side: Side, draw: Draw) -> str | None:
    give(side, draw)
    held = [p.grad for p in side.params]

    def evaluate() -> float:
        for p, grad in zip(side.params, held, strict=True):
            p.grad = grad
        return 1.5

    def call() -> None:
        without_gradients(side)
        if side.optimizer.step(evaluate) != 1.5:
            raise Fault("step does not return the closure's loss")

    side.step(side.optimizer.step if side.plain else call)
    return None


@action("gradient without memory", 3)
def gradient_without_memory(side: Side, draw: Draw) -> str | None:
    kind = draw.choice(sorted(WITHOUT_MEMORY))
    i = one(side, draw)
    started(side, draw, i)
    p, ordinary = side.params[i], side.params[i].grad
    assert ordinary is not None
    if kind == "zero":
        ordinary.zero_()
    if side.plain:
        side.step()
        return kind
    before = side.look()
    try:
        p.grad = WITHOUT_MEMORY[kind](ordinary.clone())
    except Exception:  # torch's own refusal
        p.grad = ordinary
        side.step()
        return kind

    def undo() -> None:
        p.grad = ordinary

    side.refuses_or_serves(side.optimizer.step, before, (side.label(i),), undo)
    return kind


@action("state without memory", 3)
def state_without_memory(side: Side, draw: Draw) -> str | None:
    kind = draw.choice(sorted(WITHOUT_MEMORY))
    i = one(side, draw)
    started(side, draw, i)
    name = draw.choice(side.tensors_of(i))
    if kind == "zero":
        side.state[side.params[i]][name].detach().zero_()
        side.counts[i] = 0 if name == "step" else side.counts[i]
    if side.plain:
        side.step()
        return kind
    before, state = side.look(), side.state[side.params[i]]
    kept = state[name]
    state[name] = WITHOUT_MEMORY[kind](kept.clone())

    served = [False]

    def call() -> None:
        side.optimizer.step()
        served[0] = True

    def undo() -> None:
        x = state[name] if served[0] else kept
        x = x.inner if isinstance(x, Wrapping) else x
        if not is_ordinary(x):
            state[name] = kept
            raise Fault(f"{side.name}: a step was taken, and {name} is still without memory ({kind})")
        state[name] = x

    side.refuses_or_serves(call, before, (side.label(i),), undo)
    return f"{kind} {'step' if name == 'step' else 'tensor'}"


# Memory that is taken away.


@action("freed storage", 8)
def freed_storage(side: Side, draw: Draw) -> str | None:
    i = one(side, draw)
    started(side, draw, i)
    p = side.params[i]
    where = draw.choice(("gradient", "parameter", *side.tensors_of(i)))
    how = draw.choice(("all", "half", "one"))
    offset = draw.randrange(0, 9)
    assert p.grad is not None
    x = p.grad.clone()
    if where == "gradient":
        p.grad = laid_out(x, "offset", offset) if draw.random() < 0.5 else x
        side.step()  # so that there is a plan which knows it
    if side.plain:
        return None
    tensor = p.grad if where == "gradient" else p if where == "parameter" else side.state[p][where]
    before = side.look()
    # Parameters may share a storage.
    held = tensor.untyped_storage().data_ptr()
    fellows = [k for k, q in enumerate(side.params) if k == i or q.untyped_storage().data_ptr() == held]
    stack = freed(tensor, how)
    stack.__enter__()
    names = tuple(map(side.label, fellows))
    side.must_refuse(side.optimizer.step, before, names, lambda: stack.__exit__(None, None, None))
    kinds = {"gradient", "parameter", "step"}
    return f"{where if where in kinds else 'state'}, {how}"


@action("freed variance", 1)
def freed_variance(side: Side, draw: Draw) -> str | None:
    if not side.spec.row.reads_variance:
        raise Skip
    i = one(side, draw)
    started(side, draw, i)
    side.step()
    if side.plain:
        return None
    before = side.look()
    stack = freed(side.params[i].grad_variance)
    stack.__enter__()
    side.must_refuse(side.optimizer.step, before, (side.label(i),), lambda: stack.__exit__(None, None, None))
    return None


@action("shrunk at the same address", 3)
def shrunk(side: Side, draw: Draw) -> str | None:
    i = one(side, draw, lambda p: p.numel() > 2)
    started(side, draw, i)
    side.step()
    p = side.params[i]
    where = draw.choice(["parameter", *(x for x in side.tensors_of(i) if side.state[p][x].numel() > 2)])
    tensor = p if where == "parameter" else side.state[p][where]
    size = draw.randrange(1, tensor.numel() - 1)
    # Where no state tells how many elements there were, a smaller parameter is one like any other.
    sized = [x for x in map(side.state[p].get, side.tensors_of(i)) if isinstance(x, Tensor) and x.dim()]
    runs = all(x.dtype == torch.uint8 for x in sized) and -(-size // 32) == -(-p.numel() // 32)
    if where == "parameter" and (not sized or runs):
        raise Skip
    if side.plain:
        return None
    before, grad = side.look(), p.grad
    shape, strides, offset = tensor.shape, tensor.stride(), tensor.storage_offset()

    def undo() -> None:
        with torch.no_grad():
            tensor.set_(tensor.untyped_storage(), offset, shape, strides)
        p.grad = grad

    p.grad = None
    with torch.no_grad():
        tensor.set_(tensor.untyped_storage(), offset, (size,), (1,))
    p.grad = torch.ones(size, dtype=p.dtype) if where == "parameter" else grad
    side.must_refuse(side.optimizer.step, before, (side.label(i),), undo)
    return where if where == "parameter" else "state"


@action("offloaded without gradient", 5)
def offloaded(side: Side, draw: Draw) -> str | None:
    if side.spec.shares:
        raise Skip
    i = one(side, draw)
    started(side, draw, i)
    side.step()
    how, plans_anew = draw.choice(("empty", "resized", "state too")), draw.random() < 0.5
    p = side.params[i]
    p.grad = None
    if plans_anew:
        side.optimizer.observe()
        side.optimizer.observe(False)
    if side.plain:
        side.step()
        if draw.random() < 0.5:
            side.step()
        return how
    if how == "empty":
        kept = p.data
        p.data = torch.empty(0, dtype=p.dtype)
        side.step()
        if draw.random() < 0.5:
            side.step()
        p.data = kept
    elif how == "resized":
        with freed(p):
            side.step()
            if draw.random() < 0.5:
                side.step()
    else:
        moved = side.state.pop(p)
        copies = {name: x.detach().clone() if isinstance(x, Tensor) else x for name, x in moved.items()}
        for x in moved.values():
            if isinstance(x, Tensor):
                x.untyped_storage().resize_(0)
        del moved
        side.step()
        if draw.random() < 0.5:
            side.step()
        side.state[p] = copies
    return how


# Tensors that are replaced.


@action("data replaced", 5)
def data_replaced(side: Side, draw: Draw) -> str | None:
    i = one(side, draw)
    started(side, draw, i)
    p = side.params[i]
    where = draw.choice(["parameter", *side.tensors_of(i)])
    without_gradients(side)
    if where == "parameter":
        if side.spec.shares:
            raise Skip
        p.data = p.detach().clone() * 0.5
    else:
        x = side.state[p][where]
        if x.dtype == torch.uint8:
            x.data = x.clone()
        elif where == "step":
            if side.plain:
                x.fill_(100)
            else:
                x.data = torch.full_like(x, 100)
            side.counts[i] = 100
        elif side.plain:
            x.copy_(x.clone())
        else:
            x.data = x.clone()
    give(side, draw, only=i)
    side.step()
    return where if where in ("parameter", "step") else "state"


@action("parameters swapped", 4)
def swapped(side: Side, draw: Draw) -> str | None:
    i = one(side, draw)
    if side.has_compiled:
        raise Skip
    give(side, draw, only=i)
    side.step()
    without_gradients(side)
    p = side.params[i]
    other = p.detach().clone() * 0.5
    if side.plain:
        p.data = other
    else:
        torch.utils.swap_tensors(p, Parameter(other))
    give(side, draw, only=i)
    side.step()
    return None


@action("module converted", 4)
def converted(side: Side, draw: Draw) -> str | None:
    i = one(side, draw, lambda p: True)
    group = side.optimizer.param_groups[side.group_of(i)[0]]
    param_storage = group["param_storage"]
    fp32 = side.params[i].dtype == torch.float32
    dtype = draw.choice((torch.float32, torch.bfloat16, torch.float16))
    # Low bits belong to a bf16 parameter; a master copy is made for a parameter that has lost its own bits.
    if param_storage in ("split16", "split8") or (param_storage == "master" and fp32 != (dtype == torch.float32)):
        raise Skip
    if side.spec.shares:
        raise Skip
    swaps = draw.random() < 0.5
    if swaps and side.has_compiled:
        raise Skip
    give(side, draw, only=i)
    side.step()
    without_gradients(side)
    module = torch.nn.Module()
    module.register_parameter("w", side.params[i])
    # A conversion to what it is already leaves all as it is.
    torch.__future__.set_swap_module_params_on_conversion(swaps and not side.plain)
    try:
        module.to(dtype)
        if module.w is not side.params[i]:
            raise Fault("the module's parameter is another now")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    give(side, draw, only=i)
    side.step()
    return "swap" if swaps else "data"


@action("memory format changed", 3)
def memory_format(side: Side, draw: Draw) -> str | None:
    i = one(side, draw, lambda p: p.dim() == 4)
    started(side, draw, i)
    side.step()
    if draw.random() < 0.3:
        side.optimizer.load_state_dict(copy.deepcopy(side.optimizer.state_dict()))
    without_gradients(side)
    p, number = side.params[i], side.number_of(i)
    saved = copy.deepcopy(side.optimizer.state_dict())
    before = saved["state"][number]
    last = torch.channels_last if p.is_contiguous() else torch.contiguous_format
    blocks = any("block" in str(x) for x in before.values()) or _in_blocks(side, i)
    if side.plain and not blocks:
        p.data = p.detach().clone(memory_format=last)
        side.optimizer.load_state_dict(saved)
    else:
        module = torch.nn.Module()
        module.register_parameter("w", p)
        if last is torch.channels_last:
            module.to(memory_format=last)
        else:
            p.data = p.detach().contiguous()
        after = side.optimizer.state_dict()["state"][number]
        for name, x in before.items():
            if not isinstance(x, Tensor) or x.shape != p.shape:
                continue
            if not (same(after[name], x) or (blocks and torch.allclose(after[name].float(), x.float(), 0.05, 1e-30))):
                raise Fault(f"{side.name}: {name} in a checkpoint is another after a conversion of {side.label(i)}")
    give(side, draw, only=i)
    side.step()
    return "channels_last" if last is torch.channels_last else "contiguous"


def _in_blocks(side: Side, i: int) -> bool:
    """Whether the parameter's momentum lies in blocks, which a conversion may form anew."""
    group = side.optimizer.param_groups[side.group_of(i)[0]]
    dtypes = group.get("state_dtype", "fp32")
    return "int8" in (dtypes if isinstance(dtypes, tuple) else (dtypes,)) and any(
        form.kind == "int8_block32" for form in rule_of(type(side.optimizer), group).forms(group)
    )


# The state, edited.


@action("state edited in place", 4)
def state_edited(side: Side, draw: Draw) -> str | None:
    i = one(side, draw)
    started(side, draw, i)
    side.step()
    name = draw.choice(side.tensors_of(i))
    state = side.state[side.params[i]]
    x = state[name]
    if x.dtype == torch.uint8 or name in ("step", "param_low", "master_param"):
        raise Skip
    how = draw.choice(("in place", "clone", "strides", "gaps", "subclass"))
    half = x.detach() * 0.5
    if side.plain:
        state[name] = half
    elif how == "in place":
        x.detach().mul_(0.5)
    elif how == "strides" and x.dim() == 2:
        state[name] = laid_out(half, "transposed")
    elif how == "gaps" and x.dim():
        state[name] = laid_out(half, "gaps")
    elif how == "subclass":
        state[name] = Parameter(half)
    else:
        state[name] = half
    side.step()
    return how


@action("state replaced", 3)
def state_replaced(side: Side, draw: Draw) -> str | None:
    i = one(side, draw)
    started(side, draw, i)
    side.step()
    if side.plain:
        side.step()
        return None
    old = []
    for p in side.params:
        for name, x in side.state.get(p, {}).items():
            if isinstance(x, Tensor):
                old.append(weakref.ref(x))
                side.state[p][name] = x.detach().clone()
                del x
    must_be_gone(side, old, "replaced state")
    side.step()
    return None


def must_be_gone(side: Side, refs: list[Any], what: str) -> None:
    if any(ref() is not None for ref in refs):
        gc.collect()
        if any(ref() is not None for ref in refs):
            raise Fault(f"{side.name}: {what} is still held")


@action("state cleared", 2)
def state_cleared(side: Side, draw: Draw) -> str | None:
    i = one(side, draw)
    started(side, draw, i)
    side.step()
    how = draw.choice(("all", "deleted", "popped", "empty"))
    gone = range(len(side.params)) if how == "all" else [i]
    # Low bits go with the state: the parameter is what it holds then.
    refs = [weakref.ref(x) for k in gone for x in side.state.get(side.params[k], {}).values() if isinstance(x, Tensor)]
    for k in gone:
        side.counts[k] = 0
    if how == "all":
        side.optimizer.state.clear()
    elif how == "deleted":
        del side.optimizer.state[side.params[i]]
    elif how == "popped":
        side.optimizer.state.pop(side.params[i])
    else:
        side.optimizer.state[side.params[i]] = {}
    must_be_gone(side, refs, "cleared state")
    side.step()
    return how


@action("state by another door", 3)
def other_doors(side: Side, draw: Draw) -> str | None:
    i = one(side, draw)
    started(side, draw, i)
    side.step()
    how = draw.choice(("vars", "assigned", "copied __dict__", "wrapper"))
    optimizer, p = side.optimizer, side.params[i]
    step = optimizer.step
    if not side.plain:
        if how == "vars":
            vars(optimizer)["state"] = defaultdict(dict, {q: dict(x) for q, x in vars(optimizer)["state"].items()})
        elif how == "assigned":
            optimizer.state = defaultdict(dict, {q: dict(x) for q, x in optimizer.state.items()})
        elif how == "copied __dict__":
            twin = type(optimizer).__new__(type(optimizer))
            twin.__dict__.update(optimizer.__dict__)
            step = twin.step
        else:
            wrapper: Any = Wrapper(optimizer)
            if wrapper.state is not optimizer.state:
                raise Fault("the wrapper's state is another than the optimizer's")
            step = wrapper.step
    give(side, draw, only=i)
    side.step(step)
    name = draw.choice(side.tensors_of(i))
    x = side.state[p][name]
    if x.dtype != torch.uint8 and name not in ("step", "param_low", "master_param"):
        side.state[p][name] = x.detach() * 0.5
    else:
        side.state[p][name] = x.detach().clone()
    side.step(step)
    return how


class Wrapper:
    """As trainers make it: a ``__dict__`` of its own, and the rest from the optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.inner = optimizer
        self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


@action("user's own state", 1)
def own_state(side: Side, draw: Draw) -> str | None:
    i = one(side, draw)
    started(side, draw, i)
    side.state[side.params[i]]["ema"] = draw.choice((1.5, 3, torch.linspace(0, 1, 5)))
    side.step()
    return None


@action("state that does not fit", 3)
def state_unfit(side: Side, draw: Draw) -> str | None:
    i = one(side, draw)
    started(side, draw, i)
    names = [name for name in side.tensors_of(i) if name != "step"]
    if not names:
        raise Skip
    if side.plain:
        return None
    name, how = draw.choice(names), draw.choice(("dtype", "shape", "no tensor"))
    state = side.state[side.params[i]]
    before, kept = side.look(), state[name]
    state[name] = {
        "dtype": kept.to(torch.complex64),
        "shape": torch.zeros(4, 5, 6, dtype=kept.dtype),
        "no tensor": "x",
    }[how]

    def undo() -> None:
        state[name] = kept

    side.must_refuse(side.optimizer.step, before, (side.label(i),), undo)
    return how


# Step counts.


@action("step count set", 4)
def step_set(side: Side, draw: Draw) -> str | None:
    i = one(side, draw)
    started(side, draw, i)
    side.step()
    value = draw.choice((0, 5, 1000, 2**24 - 1, 2**24, 2**24 + 1, 2**53 - 2))
    how = draw.choice(("fill_", "data", "int", "float", "tensor", "fp32"))
    if how == "fp32" and float(torch.tensor(float(value), dtype=torch.float32)) != value:
        how = "tensor"
    state = side.state[side.params[i]]
    old = state["step"]
    if side.plain or how == "tensor":
        state["step"] = torch.tensor(float(value), dtype=torch.float64)
    elif how == "fill_":
        old.fill_(value)
    elif how == "data":
        old.data = torch.full_like(old, value)
    elif how == "fp32":
        state["step"] = torch.tensor(float(value), dtype=torch.float32)
    else:
        state["step"] = int(value) if how == "int" else float(value)
    side.counts[i] = value
    side.step()
    if value > 2**30:
        state = side.state[side.params[i]]
        if float(state["step"]) != value + 1:
            raise Fault(f"{side.name}: counted from {value} to {float(state['step'])}")
        state["step"].fill_(3)
        side.counts[i] = 3
    return f"{how}, {'small' if value < 2**20 else '2^24' if value < 2**30 else '2^53'}"


@action("senseless step count", 3)
def step_senseless(side: Side, draw: Draw) -> str | None:
    i = one(side, draw)
    started(side, draw, i)
    side.step()
    if side.plain:
        return None
    value = draw.choice((-1.0, 0.5, math.nan, math.inf, 2.0**53 + 2, 1e30, -3.0))
    how = draw.choice(("tensor", "fill_", "number", "string"))
    state = side.state[side.params[i]]
    before, kept = side.look(), state["step"]
    number = kept.item()
    if how == "fill_":
        kept.fill_(value)
    else:
        state["step"] = {"tensor": torch.tensor(value, dtype=torch.float64), "number": value, "string": "many"}[how]

    def undo() -> None:
        state["step"] = kept
        kept.fill_(number)

    side.must_refuse(side.optimizer.step, before, (side.label(i),), undo)
    return how


# Groups.


@action("parameter moved", 2)
def moved(side: Side, draw: Draw) -> str | None:
    groups = side.optimizer.param_groups
    i = one(side, draw, lambda p: True)
    g, k = side.group_of(i)
    to = draw.randrange(len(groups))
    forms = [(x["param_storage"], x.get("state_dtype")) for x in groups]
    if to == g or forms[to] != forms[g]:
        raise Skip
    for name in ("params", "param_names"):
        if name in groups[g]:
            lists = [list(groups[g][name]), list(groups[to][name])]
            lists[1].insert(draw.randrange(len(lists[1]) + 1) if name == "params" else 0, lists[0].pop(k))
            if name == "param_names":  # at the same place
                place = next(n for n, p in enumerate(groups[to]["params"]) if p is side.params[i])
                lists[1].insert(place, lists[1].pop(0))
            groups[g][name], groups[to][name] = lists
    give(side, draw, only=i)
    side.step()
    return None


@action("sequences replaced", 3)
def sequences(side: Side, draw: Draw) -> str | None:
    optimizer = side.optimizer
    how = draw.choice(("tuple", "ParameterList", "list", "groups list", "groups tuple", "groups' dicts"))
    if not side.plain:
        group = draw.choice(optimizer.param_groups)
        params = list(group["params"])
        if how == "tuple":
            group["params"] = tuple(params)
        elif how == "ParameterList":
            group["params"] = torch.nn.ParameterList(params)
        elif how == "list":
            group["params"] = params
        elif how == "groups list":
            optimizer.param_groups = list(optimizer.param_groups)
        elif how == "groups tuple":
            optimizer.param_groups = tuple(optimizer.param_groups)
        else:
            optimizer.param_groups = [dict(x) for x in optimizer.param_groups]
    else:
        draw.choice(optimizer.param_groups)
    give(side, draw)
    side.step()
    if draw.random() < 0.5:
        side.optimizer.state_dict()
    optimizer.param_groups = list(optimizer.param_groups)
    for group in optimizer.param_groups:
        group["params"] = list(group["params"])
    return how


@action("group added", 1)
def group_added(side: Side, draw: Draw) -> str | None:
    if len(side.params) > 5:
        raise Skip
    param_storage = draw.choice(("nearest", "stochastic", "master"))
    spec = TensorSpec(draw.choice(((6,), (4, 3), (2, 3, 4, 2))), "dense", torch.bfloat16, draw.getrandbits(30))
    (param,) = made([spec])
    given: Any = [(f"layer.{len(side.params)}", param)] if side.spec.named else [param]
    side.optimizer.add_param_group({"params": given, "param_storage": param_storage, "lr": 0.01})
    side.params.append(param)
    side.counts.append(0)
    give(side, draw, only=len(side.params) - 1)
    side.step()
    return None


def keeps_sums(side: Side) -> bool:
    """Whether groups count the steps that were taken, so that a parameter cannot take some alone."""
    optimizer = side.optimizer
    return any(rule_of(type(optimizer), group).keeps_sums for group in optimizer.param_groups)


@action("hyperparameters changed", 5)
def hyperparameters(side: Side, draw: Draw) -> str | None:
    group = draw.choice(side.optimizer.param_groups)
    betas = tuple(draw.choice((0.0, 0.25, 0.5, 0.75, 0.875)) for _ in group.get("betas", ()))
    if betas and isinstance(side.optimizer, signadam_ext.Ano):
        betas = (*betas[:-1], max(betas[-1], 0.5))  # what it allows
    if keeps_sums(side) and betas:
        betas = (betas[0] or 0.25, *betas[1:])
    new = {
        "lr": draw.choice((0.0, 0.125, 0.25, 2.0**-10)),
        "weight_decay": draw.choice((0.0, 0.125)),
        "maximize": draw.random() < 0.5,
        "decoupled_weight_decay": draw.random() < 0.5,
        "betas": betas,
        "eps": 2.0**-20,
        "alpha": draw.choice((0.0, 0.25)),
        "confidence_beta": 0.75,
        "gain": 0.5,
    }
    names = {x for x in new if x in group} - ({"alpha"} if group.get("confidence") == "sparsity" else set())
    if isinstance(side.optimizer, signadam_ext.LaProp) and group["state_dtype"] == "int8":
        names -= {"betas"}  # of which the form of its codes depends
    if group.get("beta_of_y"):
        names -= {"betas"}  # the first of which the average has been made with
    name = draw.choice(sorted(names))
    how = draw.choice(("number", "0-dim tensor", "numpy", "int"))
    value: Any = new[name]
    if not side.plain and not isinstance(value, bool):
        numeral: Callable[[float], Any] = {
            "number": float,
            "0-dim tensor": lambda x: torch.tensor(x, dtype=torch.float32),
            "numpy": draw.choice((np.float32, np.float64)),
            "int": lambda x: int(x) if x == int(x) else x,
        }[how]
        value = tuple(map(numeral, value)) if isinstance(value, tuple) else numeral(value)
    else:
        draw.choice((0, 1))
    group[name] = value
    give(side, draw)
    side.step()
    if draw.random() < 0.5:
        saved = copy.deepcopy(side.optimizer.state_dict())
        if not side.plain:
            side.optimizer.load_state_dict(saved)
        side.step()
    # From here on as numbers, so that no later action is about this one.
    for x in side.optimizer.param_groups:
        x.update({key: as_number(x[key]) for key in new if key in x})
    return f"{name}, {how}"


def as_number(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(map(as_number, value))
    return value.item() if isinstance(value, (Tensor, np.generic)) else value


@action("learning rate of a scheduler", 1)
def rounded_learning_rate(side: Side, draw: Draw) -> str | None:
    group = draw.choice(side.optimizer.param_groups)
    kept, group["lr"] = group["lr"], draw.choice((-1e-20, -1e-12))
    give(side, draw)
    side.step()
    group["lr"] = kept
    return None


NONSENSE: dict[str, tuple[Any, ...]] = {
    "lr": (math.nan, math.inf, "fast", None, torch.tensor(math.nan)),
    "weight_decay": (-1.0, math.nan, math.inf, "x", None),
    "eps": (-1.0, math.nan, "x"),
    "alpha": (-1.0, math.nan, "x"),
    "confidence_beta": (1.0, -0.5, math.nan),
    "maximize": (3.5, "yes"),
    "decoupled_weight_decay": ("yes", 2.5),
    "weight_decay_kind": ("careful", 1, True),
    "weight_decay_scale": (None, "none", 1.0),
    "lr_scale": ("size", -2.0, math.nan),
    "caution": ("always", True, 0.5),
    "base_lr": (-1.0, math.nan, None),
    "seed": (-1, 2**64, 0.5, "x"),
    "param_storage": ("bogus", None, 3),
    "state_dtype": ("int3", 7),
    "backend": ("gpu", None),
    "confidence": ("bogus", 3),
    "second_moment": ("bogus",),
    "variance": ("bogus",),
    "target": (0.0, 2.0, math.nan),
    "gain": (0.0, math.nan, 2.0),
    "amsgrad": ("yes", 2.5),
    "betas": ((2.0, 0.5), (math.nan, 0.5), (0.5, -0.5), (0.5, 0.5, 0.5), ("x", 0.5), 7),
}


@action("nonsense in a group", 5)
def nonsense(side: Side, draw: Draw) -> str | None:
    i = one(side, draw)
    started(side, draw, i)
    group = side.optimizer.param_groups[side.group_of(i)[0]]
    kind = group.get("confidence")
    names = [x for x in NONSENSE if x in group and (x not in ("target", "gain") or kind == "sparsity")]
    names = [x for x in names if x != "betas" or group["betas"]]  # a rule without momentum has none
    name = draw.choice(names)
    value = draw.choice(NONSENSE[name])
    if name == "betas" and value == (0.5, 0.5, 0.5) and len(group["betas"]) == 3:  # which makes sense there
        value = (0.5, 0.5)
    if name == "betas" and isinstance(value, tuple) and len(value) == 2 and len(group["betas"]) == 1:
        value = value[:1] if value[0] != 0.5 else value[1:]
    if side.plain:
        return name
    before, kept = side.look(), group[name]

    def undo() -> None:
        group[name] = kept

    group[name] = value
    side.must_refuse(side.optimizer.step, before, (name.removesuffix("s"),), undo)
    return name


# Checkpoints.


@action("state dict round trip", 2)
def round_trip(side: Side, draw: Draw) -> str | None:
    how = draw.choice(("in memory", "file", "into a new optimizer"))
    if not side.plain:
        saved = side.optimizer.state_dict()
        if how == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        else:
            saved = copy.deepcopy(saved)
        if how != "in memory":
            side.optimizer = side.remade()
        side.optimizer.load_state_dict(saved)
    give(side, draw)
    side.step()
    return how


@action("file round trip", 0.7)
def file_round_trip(side: Side, draw: Draw) -> str | None:
    if not side.plain:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "state")
            side.optimizer.save_state(path)
            if os.listdir(folder) != ["state"]:
                raise Fault(f"save_state leaves {os.listdir(folder)}")
            side.optimizer = side.remade()
            side.optimizer.load_state(path)
    give(side, draw)
    side.step()
    return None


@action("damaged file", 2)
def damaged_file(side: Side, draw: Draw) -> str | None:
    i = one(side, draw)
    started(side, draw, i)
    how = draw.choice(("bit", "name", "name", "cut", "other zip", "garbage"))
    if not side.plain:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "state")
            side.optimizer.save_state(path)
            with open(path, "rb") as file:
                data = bytearray(file.read())
            mine = own(draw)
            good = os.path.join(folder, "good")
            with open(good, "wb") as file:
                file.write(data)
            if how == "bit":
                data[mine.randrange(len(data))] ^= 1 << mine.randrange(8)
            elif how == "name":  # of a member
                place = mine.choice([found.start() for found in re.finditer(rb"state/\d", data)])
                data[place + mine.randrange(7)] ^= 1 << mine.randrange(8)
            elif how == "cut":
                del data[mine.randrange(len(data)) :]
            elif how == "garbage":
                data = bytearray(mine.randbytes(1000))
            with open(path, "wb") as file:
                file.write(data)
            if how == "other zip":
                with zipfile.ZipFile(path, "w") as archive:
                    archive.writestr("optimizer", b"x")
            side.optimizer = side.remade()
            before = side.look()
            try:
                side.optimizer.load_state(path)  # a bit may be one that nothing depends on; lock step tells
            except (*REFUSALS, OSError, zipfile.BadZipFile) as error:
                if different := difference(before, side.look(clone=False)):
                    raise Fault(f"{side.name}: refused ({said(error)}), and yet {different}") from None
                side.optimizer.load_state(good)
    else:
        own(draw)
    give(side, draw)
    side.step()
    return how


@action("damaged checkpoint", 4)
def damaged_checkpoint(side: Side, draw: Draw) -> str | None:
    i = one(side, draw)
    started(side, draw, i)
    side.step()
    number = side.number_of(i)
    saved = copy.deepcopy(side.optimizer.state_dict())
    state = saved["state"][number]
    moments = list(rule_of(type(side.optimizer), side.optimizer.param_groups[side.group_of(i)[0]]).moments)
    how = draw.choice(("moment missing", "step", "both", "shape", "hyperparameter", "method", "groups"))
    names: tuple[str, ...] = (side.label(i),)
    if how in ("moment missing", "shape") and not moments:
        raise Skip
    for group in saved["param_groups"]:
        group["lr"] = 0.0625
    if how == "moment missing":
        name = draw.choice(moments)
        del state[name]
        names = (name,)
    elif how == "step":
        state["step"] = draw.choice(
            (-1.0, 0.5, math.nan, 1e30, "x", torch.tensor(1e30), torch.tensor(-2.0), 2.0**53 + 2)
        )
        names = ("step",)
    elif how == "both":
        if side.params[i].dtype != torch.bfloat16:
            raise Skip
        p = side.params[i]
        state["param_low"] = torch.zeros(p.shape, dtype=torch.int16)
        state["master_param"] = torch.zeros(p.shape)
        names = ("param_low", "master_param")
    elif how == "shape":
        name = draw.choice(moments)
        state[name] = state[name].new_zeros(4, 5, 6)
    elif how == "hyperparameter":
        saved["param_groups"][side.group_of(i)[0]]["weight_decay"] = -1.0
        names = ("weight_decay",)
    elif how == "method":
        other = signadam_ext.Lion if "exp_avg_sq" in moments else signadam_ext.AdamW
        if type(side.optimizer) is other:
            raise Skip
        twins = [Parameter(p.detach().clone()) for p in side.params]
        for p in twins:
            p.grad = torch.zeros_like(p)
        by_id = {id(p): twin for p, twin in zip(side.params, twins, strict=True)}
        second = other([{"params": [by_id[id(p)] for p in group["params"]]} for group in side.optimizer.param_groups])
        second.step()
        saved = copy.deepcopy(second.state_dict())
        names = ("Adam", "Lion")
    else:
        saved["param_groups"].append(copy.deepcopy(saved["param_groups"][0]))
        names = ("group",)
    if side.plain:
        return how
    before = side.look()

    def load() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            side.optimizer.load_state_dict(saved)

    side.must_refuse(load, before, names, lambda: None)
    return how


@action("copied", 2)
def copied(side: Side, draw: Draw) -> str | None:
    how = draw.choice(("deepcopy", "pickle"))
    if side.spec.shares:
        raise Skip
    without_gradients(side)
    for p in side.params:
        p.grad_dtype = p.dtype
    if not side.plain:
        pair = (side.params, side.optimizer)
        twins = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
        side.params, side.optimizer = twins
    give(side, draw)
    side.step()
    return how


@action("flattened checkpoint", 0.5)
def flattened(side: Side, draw: Draw) -> str | None:
    from torch.distributed.checkpoint import state_dict as dcp

    if side.spec.shares or any("ema" in x for x in side.state.values()):
        raise Skip
    if not all(group["params"] for group in side.optimizer.param_groups):
        raise Skip  # groups go by the names of their parameters there, and torch writes nothing of an empty one
    give(side, draw, everyone=True)
    side.step()
    if not all(p.isfinite().all() for p in side.params):
        raise Skip  # torch makes state by a step with a learning rate of 0, and 0 times infinity is NaN
    without_gradients(side)
    flat = dcp.StateDictOptions(flatten_optimizer_state_dict=draw.random() < 0.8)
    if not side.plain:
        module = torch.nn.Module()
        for i, p in enumerate(side.params):
            module.register_parameter(f"w{i}", p)
        saved = copy.deepcopy(dcp.get_optimizer_state_dict(module, side.optimizer, options=flat))
        side.optimizer = side.remade()
        before = [p.detach().clone() for p in side.params]
        dcp.set_optimizer_state_dict(module, side.optimizer, saved, options=flat)
        if not all(map(same, before, side.params)):
            raise Fault(f"{side.name}: loading moves parameters")
    give(side, draw)
    side.step()
    return None


# Surroundings.


@action("default device or dtype", 4)
def defaults(side: Side, draw: Draw) -> str | None:
    how = draw.choice(("meta", "float64", "float16", "meta, first step"))
    give(side, draw)
    if how == "meta, first step":
        for i in side.present():
            side.optimizer.state.pop(side.params[i], None)
            side.counts[i] = 0
    if side.plain:
        side.step()
        return how
    act = draw.choice(("step", "round trip"))
    if how.startswith("meta"):
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, how))
    try:
        side.step()
        if act == "round trip":
            side.optimizer.load_state_dict(copy.deepcopy(side.optimizer.state_dict()))
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    return how


@action("grad mode", 3)
def grad_mode(side: Side, draw: Draw) -> str | None:
    how = draw.choice(("inference_mode", "no_grad", "enable_grad", "detect_anomaly", "autocast"))
    give(side, draw)
    if draw.random() < 0.3:
        for i in side.present():
            side.optimizer.state.pop(side.params[i], None)
            side.counts[i] = 0
    modes: dict[str, Callable[[], Any]] = {
        "inference_mode": torch.inference_mode,
        "no_grad": torch.no_grad,
        "enable_grad": torch.enable_grad,
        "detect_anomaly": lambda: torch.autograd.set_detect_anomaly(True),
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    with nullcontext() if side.plain else modes[how]():
        side.step()
    side.step()
    return how


@action("compiled step", 0.06)
def compiled(side: Side, draw: Draw) -> str | None:
    import logging

    logging.disable(logging.ERROR)
    first = draw.random() < 0.5
    side.has_compiled = True
    if first:
        side.optimizer.state.clear()
        side.counts = [0] * len(side.params)
    step = side.optimizer.step if side.plain else torch.compile(side.optimizer.step, backend="eager")
    try:
        for _ in range(2):
            give(side, draw)
            side.step(step)
    finally:
        torch._dynamo.reset()
        logging.disable(logging.NOTSET)
    return "first" if first else None


@action("gradients released", 4)
def released(side: Side, draw: Draw) -> str | None:
    if side.spec.shares or keeps_sums(side):
        raise Skip
    give(side, draw)
    present = side.present()
    grads = [side.params[i].grad.clone() for i in present]
    how = draw.choice(("once", "twice", "with step", "swap"))
    if how == "swap" and (side.has_compiled or not side.params[present[0]].numel()):
        raise Skip
    without_gradients(side)
    side.optimizer.state_dict()

    def loss() -> Tensor:
        total = torch.zeros(())
        for i, grad in zip(present, grads, strict=True):
            p = side.params[i]
            # Summed by autograd's own accumulation: the gradient is this tensor, bit for bit.
            total = total + _Given.apply(p, grad)
        return total

    def half() -> Tensor:
        return side.params[present[0]].detach().clone() * 0.5

    rounds = 1 if how == "once" else 2
    if side.plain:
        for k in range(rounds):
            for i, grad in zip(present, grads, strict=True):
                side.params[i].grad = grad.clone()
            side.step()
            without_gradients(side)
            if how == "swap" and k == 0:
                side.params[present[0]].data = half()
        return how
    for p in side.params:
        # After a swap torch knows of hooks that nothing calls, and new ones join them.
        p._post_accumulate_grad_hooks = None
    with signadam_ext.release_gradients(side.params, side.optimizer):
        for k in range(rounds):
            versions = [p._version for p in side.params]
            loss().backward()
            # The hook of a swapped parameter has gone with what it held: step() takes what backward has left then.
            if any(p.grad is not None for p in side.params) and not (how == "swap" and k == 1):
                raise Fault(f"{side.name}: backward left a gradient")
            side.optimizer.step()
            side.took(present, versions)
            without_gradients(side)
            if how == "swap" and k == 0:
                p = side.params[present[0]]
                variance = getattr(p, "grad_variance", None)
                torch.utils.swap_tensors(p, Parameter(half()))
                if variance is not None:
                    p.grad_variance = variance
    loss().backward()  # which is no step any more
    without_gradients(side)
    return how


class _Given(torch.autograd.Function):
    """0, with a gradient that is given."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, grad: Tensor) -> Tensor:
        ctx.given = grad
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return ctx.given.clone(), None


@action("statistics", 2)
def statistics(side: Side, draw: Draw) -> str | None:
    give(side, draw)
    if side.plain:
        side.step()
        return None
    side.optimizer.observe()
    try:
        side.step()
        found = side.optimizer.statistics()
    finally:
        side.optimizer.observe(False)
    numel = sum(side.params[i].numel() for i in side.present())
    if found.all.numel != numel or (numel and not 0 <= found.all.passed <= 1):
        raise Fault(f"{side.name}: statistics of {found.all.numel} entries, {numel} took part: {found.all}")
    return None


# Threads, and steps inside steps.


@action("two threads", 1)
def two_threads(side: Side, draw: Draw) -> str | None:
    give(side, draw)
    times = 3
    if side.plain:
        for _ in range(2 * times):
            side.step()
        return None
    present, versions = side.present(), [p._version for p in side.params]
    wrong: list[str] = []

    def work() -> None:
        left = times
        for _ in range(1000):
            try:
                side.optimizer.step()
                left -= 1
            except RuntimeError as error:
                if "another" not in str(error):
                    wrong.append(said(error))
                    return
                time.sleep(1e-4)
            except BaseException as error:
                wrong.append(said(error))
                return
            if not left:
                return
        wrong.append("never had its turn")

    with quick_switches():
        threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    if any(thread.is_alive() for thread in threads):
        raise Fault(f"{side.name}: two threads that step wait for each other")
    if wrong:
        raise Fault(f"{side.name}: in a thread: {wrong[0]}")
    side.took(present, versions, 2 * times)
    return None


class quick_switches:
    def __enter__(self) -> None:
        self.before = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)

    def __exit__(self, *_: Any) -> None:
        sys.setswitchinterval(self.before)


@action("gradient dropped by another thread", 2)
def dropped_gradient(side: Side, draw: Draw) -> str | None:
    if side.spec.shares or keeps_sums(side):
        raise Skip
    i = one(side, draw)
    give(side, draw, only=i, everyone=True)
    p, times = side.params[i], 4
    assert p.grad is not None
    kept = p.grad.clone()
    if side.plain:
        for _ in range(times):
            side.step()
        return None
    start = side.counts[i]
    stop = threading.Event()

    def toggle() -> None:
        while not stop.is_set():
            # Held until it is out: torch itself crashes where one thread reads what another is freeing.
            held = p.grad
            p.grad = None
            del held
            junk = torch.full_like(kept, 7.0)  # in the gradient's memory, if that has been freed
            time.sleep(0)
            del junk
            p.grad = kept.clone()
            time.sleep(0)

    def count() -> int:
        return int(float(side.state.get(p, {}).get("step", 0)))

    thread = threading.Thread(target=toggle, daemon=True)
    with quick_switches():
        thread.start()
        try:
            taken = 0
            for _ in range(500):
                if taken == times or count() - start >= times:
                    break
                try:
                    side.optimizer.step()
                    taken += 1
                except RuntimeError as error:
                    if "thread" not in str(error):
                        raise Fault(f"{side.name}: {said(error)}") from None
        finally:
            stop.set()
            thread.join()
    for k in side.present():
        if k != i:
            side.counts[k] += taken
    rest = [side.params[k].grad for k in range(len(side.params))]
    # Whoever has fallen behind catches up.
    without_gradients(side)
    p.grad = kept
    side.counts[i] = count()
    while side.counts[i] < start + times:
        side.step()
    for q, grad in zip(side.params, rest, strict=True):
        q.grad = None if q is p else grad
    for _ in range(times - taken):
        side.step()
    p.grad = kept
    if side.backend == "auto":
        drop_large_gradient()
    return None


def drop_large_gradient() -> None:
    """The same where kernels run long enough for the other thread to come between."""
    p = Parameter(torch.zeros(1 << 20))
    optimizer = signadam_ext.SignSGD([p], lr=1.0)
    stop = threading.Event()

    def toggle() -> None:
        while not stop.is_set():
            p.grad = torch.ones_like(p, requires_grad=False)
            time.sleep(1e-4)
            held = p.grad
            p.grad = None
            del held
            del junk[:]
            junk.append(torch.full_like(p, -7.0, requires_grad=False))

    junk: list[Tensor] = []
    thread = threading.Thread(target=toggle, daemon=True)
    with quick_switches():
        thread.start()
        try:
            for _ in range(100):
                optimizer.step()
                if optimizer.state.get(p, {}).get("step", 0) >= 4:
                    break
                time.sleep(1e-5)
        finally:
            stop.set()
            thread.join()
    count = float(optimizer.state.get(p, {}).get("step", 0))
    if (p != -count).any():
        raise Fault(f"{count} steps of -1 lead from 0 to {p.min().item()} and {p.max().item()}")


@action("step inside a step", 2)
def nested(side: Side, draw: Draw) -> str | None:
    give(side, draw)
    mine = own(draw)
    if side.plain:
        side.step()
        return None
    mode = StepsInside(mine.randint(1, 30), side.optimizer.step)

    def call() -> None:
        with mode:
            side.optimizer.step()

    side.step(call)
    if mode.outcome == "no error":
        raise Fault(f"{side.name}: a step inside a step is no error")
    return None


@action("confidence function", 3)
def confidence_function(side: Side, draw: Draw) -> str | None:
    if side.spec.row.id != "sign_adam_pp-own":
        raise Skip
    i = one(side, draw)
    started(side, draw, i)
    how = draw.choice(("raises", "shape", "dtype", "None", "NaN", "steps"))
    at = draw.randint(1, len([k for k in side.present() if side.params[k].numel()]))
    if side.plain:
        return how
    group = side.optimizer.param_groups[side.group_of(i)[0]]
    kept, calls = group["confidence"], [0]
    own_params = [k for k in side.present() if side.group_of(k)[0] == side.group_of(i)[0] and side.params[k].numel()]
    at = 1 + at % len(own_params)

    def confidence(g: Tensor, alpha: Tensor) -> Any:
        calls[0] += 1
        if calls[0] != at:
            return kept(g, alpha)
        if how == "raises":
            raise ValueError("confidence of a user's")
        if how == "steps":
            side.optimizer.step()
        return {"shape": g[:0].new_zeros(g.numel() + 1), "dtype": g.double(), "NaN": torch.full_like(g, torch.nan)}.get(
            how
        )

    # Coupled decay brings what is no number from the parameter.
    if how == "NaN" and not all(x.isfinite().all() for k in own_params for x in (side.params[k], side.params[k].grad)):
        how = "None"
    before = side.look()
    before.groups = side.look(clone=False).groups

    def undo() -> None:
        group["confidence"] = kept

    group["confidence"] = confidence
    side.must_refuse(side.optimizer.step, before, ("confidence", "step"), undo)
    return how


@action("hook raises", 1)
def hook_raises(side: Side, draw: Draw) -> str | None:
    give(side, draw)
    how = draw.choice(("before", "after"))
    if side.plain:
        side.step()
        return how

    def hook(*_: Any) -> None:
        raise KeyError("a user's")

    register = side.optimizer.register_step_pre_hook if how == "before" else side.optimizer.register_step_post_hook
    handle, before = register(hook), side.look()
    present, versions = side.present(), [p._version for p in side.params]
    try:
        side.optimizer.step()
        raise Fault(f"{side.name}: what a hook raises is lost")
    except KeyError:
        pass
    finally:
        handle.remove()
    if how == "after":
        side.took(present, versions)
        return how
    if different := difference(before, side.look(clone=False)):
        raise Fault(f"{side.name}: a hook before the step has raised, and yet {different}")
    side.step()
    return how


# Failures at any place.


def all_or_nothing(side: Side, call: Callable[[], Any], failing: Callable[[], str | None], steps: bool) -> str | None:
    """What fails must leave all as before, when it is done again; or all as after, which lock step tells."""
    before, present, versions = side.look(), side.present(), [p._version for p in side.params]
    where = failing()
    if where is None:
        if steps:
            side.took(present, versions)
        return None
    now = [p._version for p in side.params]
    different = difference(before, side.look(clone=False))
    if different is None:
        if now != versions:
            raise Fault(f"{side.name}: interrupted at {where}: nothing is written, and yet versions have moved")
        if steps:
            side.step(call)
        else:
            call()
        return "before"
    try:
        if steps:
            side.took(present, versions)
        side.check_counts()
    except Fault as fault:
        raise Fault(f"interrupted at {where}: {fault}; {different}") from None
    return f"after ({where})"


def failing_step(side: Side, draw: Draw) -> Draw:
    """Some gradients, sometimes no state; and random numbers of this side's own."""
    give(side, draw)
    if draw.random() < 0.4:
        side.optimizer.state.clear()
        side.counts = [0] * len(side.params)
    return own(draw)


@action("step interrupted", 8)
def interrupted(side: Side, draw: Draw) -> str | None:
    mine = failing_step(side, draw)
    if side.plain:
        side.step()
        return "at a place"

    def failing() -> str | None:
        # Half of them late, where a step is about to be taken.
        first = mine.choice((1, 1 + side.points * 3 // 4))
        where, points = at_point(side.optimizer.step, mine.randint(first, side.points + side.points // 8 + 1))
        # How many there are is learnt where none is reached.
        side.points = points if where is None else max(side.points, points * 3 // 2)
        return where

    all_or_nothing(side, side.optimizer.step, failing, steps=True)
    return "at a place"


@action("step interrupted by a timer", 5)
def interrupted_by_timer(side: Side, draw: Draw) -> str | None:
    mine = failing_step(side, draw)
    kind = draw.choice(("alarm", "alarm", "SIGINT"))
    if side.plain:
        side.step()
        return kind
    delay = mine.random() * (5e-4 if side.backend == "auto" else 5e-3) * mine.choice((0.3, 1.0))
    all_or_nothing(side, side.optimizer.step, lambda: by_timer(side.optimizer.step, delay, kind), steps=True)
    return kind


@action("step out of memory", 6)
def step_out_of_memory(side: Side, draw: Draw) -> str | None:
    mine = failing_step(side, draw)
    if side.plain:
        side.step()
        return None

    def failing() -> str | None:
        where, allocations = out_of_memory(side.optimizer.step, mine.randint(1, side.allocations + 2))
        side.allocations = max(side.allocations if where else 0, allocations, 1)
        return where

    all_or_nothing(side, side.optimizer.step, failing, steps=True)
    return None


def other_checkpoint(side: Side) -> dict[str, Any]:
    """A checkpoint that differs from what there is."""
    saved = copy.deepcopy(side.optimizer.state_dict())
    for group in saved["param_groups"]:
        group["lr"] = 0.0625
    for state in saved["state"].values():
        state["step"] = torch.tensor(float(state["step"]) + 1, dtype=torch.float64)
        for name, x in state.items():
            if isinstance(x, Tensor) and x.is_floating_point() and x.dim() and name != "master_param":
                x.detach().mul_(0.5)
    return saved


@action("loading fails", 2)
def loading_fails(side: Side, draw: Draw) -> str | None:
    i = one(side, draw)
    started(side, draw, i)
    side.step()
    how = draw.choice(("interrupted", "out of memory", "timer"))
    what = draw.choice(("load_state_dict", "load_state"))
    saved = other_checkpoint(side)
    mine = own(draw)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "state")
        if what == "load_state":
            twin = side.remade()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                twin.load_state_dict(copy.deepcopy(saved))
            twin.save_state(path)
            del twin

        def load() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if what == "load_state":
                    side.optimizer.load_state(path)
                else:
                    side.optimizer.load_state_dict(copy.deepcopy(saved))

        def failing() -> str | None:
            if how == "interrupted":
                return at_point(load, int(2 ** (mine.random() * 14)))[0]
            if how == "timer":
                return by_timer(load, mine.random() * 5e-3, "alarm")
            return out_of_memory(load, mine.randint(1, 25 * len(side.params)))[0]

        side.counts = [
            int(float(saved["state"][side.number_of(k)]["step"])) if side.number_of(k) in saved["state"] else 0
            for k in range(len(side.params))
        ]
        if side.plain:
            load()
        else:
            all_or_nothing(side, load, failing, steps=False)
    give(side, draw)
    side.step()
    return f"{what} {how}"
