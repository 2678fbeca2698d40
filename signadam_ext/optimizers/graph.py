"""A step inside a graph of torch.compile: one operator, which takes the optimizer's own step when the graph runs.

The operator knows its optimizer by number and reads the groups then, so a learning rate that changes is no other graph.
It declares that it writes parameters; state belongs to no graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..engine.runtime import runtime_of
from .groups import GroupedOptimizer
from .stepping import step_all


def goes_into_graphs(optimizer: GroupedOptimizer) -> bool:
    """Whether dynamo is tracing this call, and an operator takes what the optimizer has: no sharded parameters."""
    return torch.compiler.is_dynamo_compiling() and not optimizer.runtime.has_shards


def step_in_graph(optimizer: GroupedOptimizer) -> None:
    """What is traced of ``optimizer.step()``."""
    params: list[Tensor] = []
    grads: list[Tensor] = []
    places: list[int] = []
    place = 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None:
                params.append(param)
                grads.append(param.grad)
                places.append(place)
            place += 1
    torch.ops.signadam_ext.step(params, grads, places, optimizer.runtime.number)


def _step(params: Sequence[Tensor], grads: Sequence[Tensor], places: Sequence[int], optimizer: int) -> None:
    """Takes the step of an optimizer of which a graph holds parameters and gradients.

    Args:
        places: where each parameter is among all of the optimizer's, in order.
        optimizer: its ``runtime.number``.

    Raises:
        RuntimeError: the optimizer is gone.
        TypeError, ValueError: as of ``optimizer.step()``.
    """
    own = cast(Any, runtime_of(optimizer).owner())
    with _given_to(own, dict(zip(places, zip(params, grads, strict=True), strict=True))):
        step_all(own)


def _fake_step(params: Sequence[Tensor], grads: Sequence[Tensor], places: Sequence[int], optimizer: int) -> None:
    """Nothing comes out of it."""


# Not by torch.library.custom_op, which takes a tenth of a second to import.
_LIBRARY = torch.library.Library("signadam_ext", "DEF")
_LIBRARY.define("step(Tensor(a!)[] params, Tensor[] grads, int[] places, int optimizer) -> ()")
_LIBRARY.impl("step", _step, "CompositeExplicitAutograd")
torch.library.register_fake("signadam_ext::step", _fake_step, lib=_LIBRARY)


@contextlib.contextmanager
def _given_to(optimizer: GroupedOptimizer, given: dict[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Makes parameters and gradients those of a graph.

    Mostly they are the very ones. But a graph may work on copies, which it writes back when it ends; and what it does
    to a gradient before the step, no one else may have seen yet.
    """
    own = [param for group in optimizer.param_groups for param in group["params"]]
    copies = [(own[place], param) for place, (param, _) in given.items() if not _is_same(own[place], param)]
    before = [param.detach().clone() for param, _ in copies]
    replaced = []
    with torch.no_grad():
        try:
            for place, param in enumerate(own):
                grad = given[place][1] if place in given else None
                if not _is_same(param.grad, grad):
                    replaced.append((param, param.grad))
                    param.grad = grad
            for param, copy in copies:
                param.copy_(copy)
            yield
            for param, copy in copies:
                copy.copy_(param)
        except BaseException:
            for (param, _), value in zip(copies, before, strict=True):
                param.copy_(value)
            raise
        finally:
            for param, grad in replaced:
                param.grad = grad


def _is_same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether both are in the same memory, in the same order, or neither is there."""
    if one is None or other is None:
        return one is other
    return one is other or (one.data_ptr() == other.data_ptr() and one.stride() == other.stride())
