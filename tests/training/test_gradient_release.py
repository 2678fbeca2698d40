"""Gradients released in backward: the bits of an ordinary loop, no gradient left, and errors for what cannot work."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import math
import os
import pickle
import re
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.optimizer_contract import (
    ROWS,
    assert_same,
    assert_unchanged,
    copies,
    each_backend,
    each_row,
    make,
    params_of,
    snapshot,
    with_variances,
)
from support.strategies import same_bits
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from signadam_ext.optimizers.base import SignOptimizer
from signadam_ext.training.gradient_release import GradientRelease, release_gradients

ROW = ROWS["sign_adam_pp"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are tiny here: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Tied(nn.Module):
    """A language model of two tokens' context whose head is its embedding, with a layer that is used twice."""

    def __init__(self, checkpointed: bool | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.twice = nn.Linear(6, 6)
        self.once = nn.Linear(6, 6, bias=False)
        for param in self.parameters():
            param.data = torch.randn(param.shape, generator=generator) / 2
        with_variances(self.parameters())
        self.use_reentrant = checkpointed

    def run(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return block(x)
        return checkpoint(block, x, use_reentrant=self.use_reentrant)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.twice(self.twice(x).tanh()).tanh()
        x = x + self.run(lambda x: self.once(x).tanh(), x)
        return x @ self.embedding.weight.t()


def loss_of(model: nn.Module, step: int) -> Tensor:
    tokens = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(tokens[0]), tokens[1])


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [{"params": named[::2]}, {"params": named[1::2], "lr": 0.03, "weight_decay": 0.1}]


def pair(row: Any = ROW, backend: str = "cpu", **overrides: Any) -> tuple[Tied, SignOptimizer, Tied, SignOptimizer]:
    """Two equal models with an optimizer each; the first is to be released."""
    a, b = Tied(), Tied()
    return (
        a,
        make(row, groups_of(a), backend, **overrides),
        b,
        make(row, groups_of(b), backend, **overrides),
    )


def train_ordinarily(model: nn.Module, optimizer: SignOptimizer, *steps: int, scale: float = 1.0) -> None:
    for step in steps:
        optimizer.zero_grad()
        (loss_of(model, step) * scale).backward()
        optimizer.step()


def no_gradients(optimizer: SignOptimizer) -> bool:
    return all(param.grad is None for param in params_of(optimizer))


# --- the same bits


def bare(model: nn.Module, optimizer: SignOptimizer, step: int) -> None:
    loss_of(model, step).backward()


def with_step(model: nn.Module, optimizer: SignOptimizer, step: int) -> None:
    optimizer.zero_grad()
    loss_of(model, step).backward()
    assert optimizer.step() is None


def with_closure(model: nn.Module, optimizer: SignOptimizer, step: int) -> None:
    def closure() -> Any:
        optimizer.zero_grad(set_to_none=False)
        loss = loss_of(model, step)
        loss.backward()
        return loss

    with torch.no_grad():
        expected = loss_of(model, step)
        assert torch.equal(optimizer.step(closure), expected)


@each_row
@each_backend
@pytest.mark.parametrize("loop", [bare, with_step, with_closure])
def test_same_bits_as_an_ordinary_loop(row: Any, backend: str, loop: Any) -> None:
    """Groups, tied weights, schedules: whatever the loop keeps of its calls, and without a warning."""
    model, optimizer, other, expected = pair(row, backend)
    release_gradients(model, optimizer)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for o in (optimizer, expected)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            loop(model, optimizer, step)
            assert no_gradients(optimizer)
            train_ordinarily(other, expected, step)
            for schedule in schedules:
                schedule.step()
    assert_same(optimizer, expected)
    assert optimizer.state[model.once.weight]["step"] == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    params = [nn.Parameter(torch.randn(40, 30).to(dtype)) for _ in range(3)]
    optimizer, expected = make(ROW, params), make(ROW, copies(params))
    release_gradients(params, optimizer)
    for _ in range(3):
        for o in (optimizer, expected):
            a, b, c = params_of(o)
            (a * b.sin() * c).sum().backward()
        expected.step()
        expected.zero_grad()
    assert_same(optimizer, expected)


def test_autocast() -> None:
    model, optimizer, other, expected = pair()
    release_gradients(model, optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        for step in range(2):
            bare(model, optimizer, step)
            train_ordinarily(other, expected, step)
    assert_same(optimizer, expected)


def test_hyperparameters_are_read_in_each_backward() -> None:
    model, optimizer, other, expected = pair(ROWS["sign_adam_pp-adaptive"])
    release_gradients(model, optimizer)
    changes = ({"lr": 0.5}, {"weight_decay": 0.3}, {"confidence": "fixed"}, {"betas": (0.2,)}, {"beta": 0.6})
    for step, change in enumerate(changes):
        for o in (optimizer, expected):
            o.param_groups[1].update(change)
        bare(model, optimizer, step)
        train_ordinarily(other, expected, step)
    assert_same(optimizer, expected)


def test_state_asked_for_and_moved_by_hand() -> None:
    model, optimizer, other, expected = pair()
    release_gradients(model, optimizer)
    for step in range(4):
        bare(model, optimizer, step)
        train_ordinarily(other, expected, step)
        for o in (optimizer, expected):
            state = o.state[params_of(o)[step]]
            state["exp_avg"] = state["exp_avg"] * 2
            if step == 2:
                params_of(o)[0].data = params_of(o)[0].data.clone()
    assert_same(optimizer, expected)


def test_ordinary_steps_before_and_after() -> None:
    model, optimizer, other, expected = pair()
    train_ordinarily(model, optimizer, 0, 1)
    optimizer.zero_grad()
    with release_gradients(model, optimizer):
        bare(model, optimizer, 2)
    train_ordinarily(model, optimizer, 3)
    assert not no_gradients(optimizer)
    train_ordinarily(other, expected, 0, 1, 2, 3)
    assert_same(optimizer, expected)


# --- memory


def test_gradients_do_not_outlive_their_update() -> None:
    """At each update no other gradient exists: not in a parameter, and not in memory."""
    layers = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(10)])
    optimizer = make(ROW, layers.parameters())
    seen: list[weakref.ref[Tensor]] = []
    held: list[int] = []
    alive: list[int] = []

    def look(param: Tensor) -> None:
        seen.append(weakref.ref(param.grad.untyped_storage()))
        held.append(sum(p.grad is not None for p in layers.parameters()))
        alive.append(sum(ref() is not None for ref in seen))

    for param in layers.parameters():
        param.register_post_accumulate_grad_hook(look)
    release_gradients(layers, optimizer)
    for _ in range(2):
        layers(torch.randn(3, 8)).square().sum().backward()
    assert held == [1] * 20
    assert alive == [1] * 20


# --- graphs of all kinds


def test_each_parameter_is_updated_once_in_a_backward() -> None:
    """Tied weights, and a layer used twice: only when all parts have come."""
    model, optimizer, *_ = pair()
    fired: list[str] = []
    for name, param in model.named_parameters():
        param.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    release_gradients(model, optimizer)
    bare(model, optimizer, 0)
    assert sorted(fired) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    model, optimizer, other, expected = pair()
    model.use_reentrant = use_reentrant
    release_gradients(model, optimizer)
    for step in range(3):
        with_step(model, optimizer, step)
        assert no_gradients(optimizer)
        train_ordinarily(other, expected, step)
    assert_same(optimizer, expected)


def twice_checkpointed(weight: Tensor, use_reentrant: bool) -> Tensor:
    def block(x: Tensor) -> Tensor:
        return (x * weight).sin()

    x = torch.ones(3, requires_grad=True)
    for _ in range(2):
        x = checkpoint(block, x, use_reentrant=use_reentrant)
    return x.sum()


def test_checkpointing_of_a_weight_used_twice() -> None:
    weight = nn.Parameter(torch.randn(3))
    other = nn.Parameter(weight.detach().clone())
    optimizer, expected = make(ROW, [weight]), make(ROW, [other])
    with release_gradients([weight], optimizer):
        twice_checkpointed(weight, use_reentrant=False).backward()
    twice_checkpointed(other, use_reentrant=False).backward()
    expected.step()
    assert_same(optimizer, expected)


def test_reentrant_checkpointing_of_a_weight_used_twice_is_refused() -> None:
    weight = nn.Parameter(torch.randn(3))
    optimizer = make(ROW, [("w", weight)])
    release_gradients([weight], optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 'w' got a second gradient.*use_reentrant=False"):
        twice_checkpointed(weight, use_reentrant=True).backward()
    assert optimizer.state[weight]["step"] == 1


def test_reentrant_checkpointing_needs_step_in_the_loop() -> None:
    model, optimizer, *_ = pair()
    model.use_reentrant = True
    release_gradients(model, optimizer)
    bare(model, optimizer, 0)
    before = optimizer.state[model.once.weight]["step"].clone()
    with pytest.raises(RuntimeError, match=r"'once.weight' got a second gradient.*call optimizer.step\(\) after each"):
        bare(model, optimizer, 1)
    assert optimizer.state[model.once.weight]["step"] == before


def test_reentrant_checkpointing_with_accumulation_is_refused() -> None:
    model, optimizer, *_ = pair()
    model.use_reentrant = True
    release_gradients(model, optimizer, accumulation_steps=2)
    with pytest.raises(
        RuntimeError, match=r"'once.weight' got a gradient from a backward inside another one.*reentrant"
    ):
        bare(model, optimizer, 0)


def test_autograd_grad_updates_nothing() -> None:
    model, optimizer, *_ = pair()
    release_gradients(model, optimizer)
    before = snapshot(optimizer)
    torch.autograd.grad(loss_of(model, 0), list(model.parameters()))
    assert_unchanged(optimizer, before)


def test_backward_of_some_inputs() -> None:
    model, optimizer, other, expected = pair()
    release_gradients(model, optimizer)
    loss_of(model, 0).backward(inputs=[model.once.weight])
    loss_of(other, 0).backward(inputs=[other.once.weight])
    expected.step()
    assert_same(optimizer, expected)
    assert optimizer.state.keys() == {model.once.weight}


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradient_penalty(create_graph: bool) -> None:
    """A graph through gradients; and gradients that have a graph themselves, whose values alone count."""
    results = []
    for released in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = make(ROW, model.parameters())
        if released:
            release_gradients(model, optimizer)
        for _ in range(2):
            x = torch.ones(3, 4, requires_grad=True)
            y = model(x).sum()
            (slope,) = torch.autograd.grad(y, x, create_graph=True)
            (y + slope.square().sum()).backward(create_graph=create_graph)
            if released:
                assert no_gradients(optimizer)
            else:
                optimizer.step()
                optimizer.zero_grad()
        results.append(optimizer)
    assert_same(*results)


@pytest.mark.parametrize("case", ["retained graph", "detached", "views of one buffer"])
def test_weights_needed_after_their_update_are_autograds_error(case: str) -> None:
    values = torch.randn(27)
    views = [values[i : i + 9].view(3, 3) for i in (0, 9, 18)]
    a, b, c = (nn.Parameter(view if case == "views of one buffer" else view.clone()) for view in views)
    optimizer = make(ROW, [a, b, c])
    release_gradients([a, b, c], optimizer)
    x = torch.ones(3, 3)
    loss = (x @ a @ b.detach() + b).sum() if case == "detached" else (x @ a @ b @ c).sum()
    if case == "retained graph":
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- which parameters


def test_frozen_parameters_are_released_when_unfrozen() -> None:
    model, optimizer, other, expected = pair()
    for m in (model, other):
        m.once.weight.requires_grad_(False)
        m.register_parameter("codes", nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False))
    release_gradients(model, optimizer)
    assert not model.once.weight.requires_grad
    for step in range(4):
        for m in (model, other):
            m.once.weight.requires_grad_(step >= 2)
        bare(model, optimizer, step)
        assert no_gradients(optimizer)
        train_ordinarily(other, expected, step)
    assert_same(optimizer, expected)
    assert optimizer.state[model.once.weight]["step"] == 2


def test_frozen_integers_in_the_optimizer() -> None:
    weight = nn.Parameter(torch.ones(3))
    codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    optimizer = make(ROW, [weight, codes])
    release_gradients([weight, codes], optimizer)
    for _ in range(2):
        weight.sum().backward()
    assert optimizer.state[weight]["step"] == 2


def test_parameters_of_no_optimizer_keep_their_gradients() -> None:
    model = Tied()
    optimizer = make(ROW, [model.once.weight])
    release_gradients(model, optimizer)
    bare(model, optimizer, 0)
    assert model.once.weight.grad is None
    assert model.twice.weight.grad is not None and model.embedding.weight.grad is not None


def test_step_updates_parameters_that_are_not_released() -> None:
    model, optimizer, other, expected = pair()
    release_gradients([model.embedding.weight], optimizer)
    for step in range(3):
        optimizer.zero_grad()
        bare(model, optimizer, step)
        assert model.embedding.weight.grad is None and model.twice.weight.grad is not None
        optimizer.step()
        assert model.twice.weight.grad is not None  # zero_grad() is the loop's, as ever
        train_ordinarily(other, expected, step)
    assert_same(optimizer, expected)


def test_a_loop_without_step_needs_all_parameters_released() -> None:
    model, optimizer, *_ = pair()
    release_gradients(model.embedding, optimizer)
    bare(model, optimizer, 0)
    before = snapshot(optimizer)
    with pytest.raises(
        RuntimeError, match=r"optimizer.step\(\) after each.* updates the parameters that are not released"
    ):
        bare(model, optimizer, 1)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize(
    "form",
    [
        lambda model, optimizer: model,
        lambda model, optimizer: model.parameters(),
        lambda model, optimizer: list(model.parameters()) * 2,
        lambda model, optimizer: model.named_parameters(),
        lambda model, optimizer: optimizer.param_groups,
        lambda model, optimizer: [
            {"params": model.embedding.weight},
            {"params": model.twice.named_parameters()},
            {"params": [model.once.weight]},
        ],
        lambda model, optimizer: {"params": list(model.parameters())},
    ],
)
def test_forms_of_parameters(form: Any) -> None:
    model, optimizer, other, expected = pair()
    release_gradients(form(model, optimizer), optimizer)
    bare(model, optimizer, 0)
    assert no_gradients(optimizer)
    train_ordinarily(other, expected, 0)
    assert_same(optimizer, expected)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (3, "is a int: must be a module or an iterable"),
        ("abc", "is a str: must be a module"),
        (torch.ones(3), "is a Tensor: must be a module"),
        ([torch.ones(3), 4], "holds a int: must be a module"),
        ([{"parameters": []}], "holds a dict: must be a module"),
    ],
)
def test_other_arguments_are_type_errors(params: Any, message: str) -> None:
    _, optimizer, *_ = pair()
    with pytest.raises(TypeError, match=message):
        release_gradients(params, optimizer)
    assert optimizer.runtime.driver is None


def test_other_optimizers_are_type_errors() -> None:
    model = Tied()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        TypeError,
        match=r"optimizer is a torch\.optim\.sgd\.SGD: release_gradients serves the optimizers of signadam_ext",
    ):
        release_gradients(model, optimizer)


def test_no_parameter_in_common() -> None:
    _, optimizer, other, _ = pair()
    for params in (other, []):
        with pytest.raises(ValueError, match="none of these parameters is the optimizer's"):
            release_gradients(params, optimizer)


def test_gradients_there_already_are_refused() -> None:
    model, optimizer, *_ = pair()
    bare(model, optimizer, 0)
    with pytest.raises(RuntimeError, match=r"'embedding.weight' holds a gradient.*zero_grad\(\) before"):
        release_gradients(model, optimizer)
    optimizer.zero_grad()
    release_gradients(model, optimizer)


def test_parameters_that_share_memory_are_refused() -> None:
    values = torch.randn(6)
    params = [nn.Parameter(values[:4]), nn.Parameter(values[2:])]
    with pytest.raises(ValueError, match="parameters of the optimizer share memory"):
        release_gradients(params, make(ROW, params))


def test_one_release_at_a_time() -> None:
    model, optimizer, *_ = pair()
    release = release_gradients(model, optimizer)
    with pytest.raises(RuntimeError, match="released already"):
        release_gradients(model, optimizer)
    release.remove()
    release_gradients(model, optimizer)


def test_a_parameter_of_two_optimizers() -> None:
    weight = nn.Parameter(torch.ones(3))
    first, second = make(ROW, [weight]), make(ROW, [("w", weight)])
    releases = [release_gradients([weight], optimizer) for optimizer in (first, second)]
    with pytest.raises(RuntimeError, match="'w' has lost its gradient to another hook: was it released for two"):
        weight.sum().backward()
    assert len(releases) == 2 and weight not in second.state


# --- what may happen to the optimizer meanwhile


@pytest.mark.parametrize("released_all", [True, False])
def test_groups_added_later(released_all: bool) -> None:
    model, other = Tied(), Tied()
    optimizer, expected = (make(ROW, [("w", m.once.weight), ("e", m.embedding.weight)]) for m in (model, other))
    release_gradients(model if released_all else [model.once.weight], optimizer)
    for step in range(4):
        if step == 2:
            for o, m in ((optimizer, model), (expected, other)):
                o.add_param_group({"params": list(m.twice.named_parameters()), "lr": 0.02})
        if step >= 2:
            for m in (model, other):
                m.twice.zero_grad()
        bare(model, optimizer, step)
        if step >= 2:
            assert (model.twice.weight.grad is None) == released_all
        optimizer.step()
        if not released_all:
            optimizer.zero_grad()
        train_ordinarily(other, expected, step)
    assert_same(optimizer, expected)


def test_load_state_dict_while_released() -> None:
    model, optimizer, other, expected = pair()
    release_gradients(model, optimizer)
    for step in range(2):
        bare(model, optimizer, step)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    bare(model, optimizer, 2)
    optimizer.load_state_dict(saved)
    model.load_state_dict(weights)
    bare(model, optimizer, 3)
    assert no_gradients(optimizer)
    train_ordinarily(other, expected, 0, 1, 3)
    assert_same(optimizer, expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies_are_not_released(duplicate: Any) -> None:
    model, optimizer, *_ = pair()
    release_gradients(model, optimizer)
    bare(model, optimizer, 0)
    other, copied = duplicate((model, optimizer))
    assert copied.runtime.driver is None and not hasattr(copied, "_step_supports_amp_scaling")
    assert_same(optimizer, copied)
    train_ordinarily(other, copied, 1)
    assert other.once.weight.grad is not None
    bare(model, optimizer, 1)
    assert_same(optimizer, copied)


def test_replaced_parameters() -> None:
    """The old one is none of the optimizer's, the new one waits for step()."""
    model, optimizer, *_ = pair()
    release_gradients(model, optimizer)
    with_step(model, optimizer, 0)
    old, new = model.once.weight, nn.Parameter(torch.ones(6, 6))
    group, i = next((g, i) for g in optimizer.param_groups for i, p in enumerate(g["params"]) if p is old)
    group["params"][i] = new
    before = old.detach().clone()
    loss_of(model, 1).backward()
    assert torch.equal(old, before) and old.grad is not None
    optimizer.step()
    model.once.weight = new
    loss_of(model, 2).backward()
    assert new.grad is not None
    optimizer.step()
    assert optimizer.state[new]["step"] == 1


def test_parameters_moved_to_another_group() -> None:
    model, optimizer, other, expected = pair()
    release_gradients(model, optimizer)
    for step in range(3):
        if step == 1:
            for o in (optimizer, expected):
                first, second = o.param_groups
                for name in ("params", "param_names"):
                    second[name].append(first[name].pop())
        bare(model, optimizer, step)
        train_ordinarily(other, expected, step)
    assert_same(optimizer, expected)


def test_step_hooks_run_where_step_is_called() -> None:
    model, optimizer, *_ = pair()
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    release_gradients(model, optimizer)
    with_step(model, optimizer, 0)
    assert calls == ["before", "after"]


def test_a_schedule_before_the_first_update_is_warned_of_as_ever() -> None:
    model, optimizer, *_ = pair()
    release_gradients(model, optimizer)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step\(\)"):
        schedule.step()


def test_gradients_written_by_hand_are_steps_work() -> None:
    model, optimizer, other, expected = pair()
    release_gradients(model, optimizer)
    for o in (optimizer, expected):
        for param in params_of(o):
            param.grad = torch.ones_like(param)
        o.step()
    assert no_gradients(optimizer)
    bare(model, optimizer, 0)
    train_ordinarily(other, expected, 0)
    assert_same(optimizer, expected)
    model.once.weight.grad = torch.ones(6, 6)
    with pytest.raises(RuntimeError, match=r"'once.weight' was updated in backward and has got another gradient since"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert_same(optimizer, expected)


def test_a_gradient_that_cannot_be_served() -> None:
    """The parameter it belongs to is named, and neither it nor its state is touched."""
    table = nn.Embedding(5, 3, sparse=True)
    linear = nn.Linear(3, 1)
    optimizer = make(ROW, [*linear.named_parameters(), ("table", table.weight)])
    release_gradients(params_of(optimizer), optimizer)
    before = table.weight.detach().clone()
    with pytest.raises(TypeError, match=r"the gradient of parameter 'table' has layout torch.sparse_coo"):
        linear(table(torch.tensor([1, 2]))).sum().backward()
    assert torch.equal(table.weight, before) and table.weight not in optimizer.state
    assert table.weight.grad is not None
    optimizer.zero_grad()
    linear(table.weight).sum().backward()
    assert optimizer.state[table.weight]["step"] == 1


class Raises(torch.autograd.Function):
    """Lets everything pass forward, and nothing back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise MemoryError("out of memory")


@pytest.mark.parametrize("calls_step", [False, True])
def test_an_ordinary_loop_goes_on_after_a_backward_that_has_raised(calls_step: bool) -> None:
    """What it had updated is not taken for the first of two gradients."""
    first, last = nn.Linear(3, 3), nn.Linear(3, 1)
    optimizer = make(ROW, [*first.parameters(), *last.parameters()])
    release_gradients(params_of(optimizer), optimizer)
    x = torch.ones(2, 3)

    def turn(between: Callable[[Tensor], Tensor]) -> None:
        optimizer.zero_grad()
        last(between(first(x))).sum().backward()
        if calls_step:
            optimizer.step()

    turn(torch.tanh)
    with pytest.raises(MemoryError, match="out of memory"):
        turn(Raises.apply)
    taken = [int(optimizer.state[p]["step"]) for p in params_of(optimizer)]
    assert taken == [1, 1, 2, 2]
    for more in (1, 2):
        turn(torch.tanh)
        assert [int(optimizer.state[p]["step"]) for p in params_of(optimizer)] == [n + more for n in taken]
    if calls_step:  # and two gradients for one step are still an error
        optimizer.zero_grad()
        last(first(x)).sum().backward()
        with pytest.raises(RuntimeError, match="a second gradient"):
            last(first(x)).sum().backward()


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_a_refused_gradient_is_not_added_to(accumulation_steps: int) -> None:
    """It is left, so that nothing is lost: the next backward must not count it a second time without a word."""
    layer, twin = nn.Linear(3, 1), nn.Linear(3, 1)
    twin.load_state_dict(layer.state_dict())
    optimizer, other = make(ROW, layer.parameters()), make(ROW, twin.parameters())
    release_gradients(layer, optimizer, accumulation_steps=accumulation_steps)
    release_gradients(twin, other, accumulation_steps=accumulation_steps)
    x, lr = torch.ones(2, 3), optimizer.param_groups[0]["lr"]

    def backward(of: nn.Module) -> None:
        for _ in range(accumulation_steps):
            of(x).sum().backward()

    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr=-1"):
        backward(layer)
    optimizer.param_groups[0]["lr"] = lr
    for _ in range(2):
        before = [p.detach().clone() for p in layer.parameters()]
        with pytest.raises(RuntimeError, match=r"added to one which the step before had refused.*zero_grad\(\)"):
            layer(x).sum().backward()
        assert any(torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True))
    optimizer.zero_grad()
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        p.data.copy_(q)
        optimizer.state.pop(p, None)
    backward(layer)
    backward(twin)
    assert all(same_bits(p, q) for p, q in zip(layer.parameters(), twin.parameters(), strict=True))


def test_arguments_that_ask_for_nothing() -> None:
    layer = nn.Linear(3, 1)
    with release_gradients(layer, make(ROW, layer.parameters()), max_norm=math.inf):
        pass
    with pytest.raises(TypeError, match="grad_scaler is a int: must be a torch"):
        release_gradients(layer, make(ROW, layer.parameters()), grad_scaler=3)


# --- the end of a release


def test_remove() -> None:
    model, optimizer, other, expected = pair()
    release = release_gradients(model, optimizer)
    assert isinstance(release, GradientRelease)
    bare(model, optimizer, 0)
    for _ in range(2):
        release.remove()
        assert optimizer.runtime.driver is None
    before = snapshot(optimizer)
    bare(model, optimizer, 1)
    assert all(param.grad is not None for param in params_of(optimizer))
    assert_unchanged(optimizer, before)
    optimizer.step()
    train_ordinarily(other, expected, 0, 1)
    assert_same(optimizer, expected)


def test_remove_does_not_end_a_later_release() -> None:
    model, optimizer, *_ = pair()
    first = release_gradients(model, optimizer)
    first.remove()
    second = release_gradients(model, optimizer)
    first.remove()
    assert optimizer.runtime.driver is second
    bare(model, optimizer, 0)
    assert no_gradients(optimizer)


def test_context_manager_ends_with_its_block() -> None:
    model, optimizer, *_ = pair()
    with pytest.raises(KeyError), release_gradients(model, optimizer) as release:
        assert optimizer.runtime.driver is release
        raise KeyError
    assert optimizer.runtime.driver is None
    bare(model, optimizer, 0)
    assert not no_gradients(optimizer)


def test_nothing_is_kept_alive() -> None:
    model, optimizer, *_ = pair()
    release = release_gradients(model, optimizer)
    bare(model, optimizer, 0)
    references = [weakref.ref(thing) for thing in (optimizer, model, model.once.weight)]
    del model, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    release.remove()


def test_a_dropped_optimizer_is_warned_of() -> None:
    model, optimizer, *_ = pair()
    release_gradients(model, optimizer)
    del optimizer
    gc.collect()
    before = model.once.weight.detach().clone()
    with pytest.warns(RuntimeWarning, match="the optimizer for which gradients were released no longer exists"):
        bare(model, None, 0)
    assert torch.equal(model.once.weight, before) and model.once.weight.grad is not None
    model.zero_grad()
    optimizer = make(ROW, groups_of(model))
    release_gradients(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bare(model, optimizer, 0)
    assert no_gradients(optimizer)


# --- accumulation


def accumulate(model: nn.Module, optimizer: SignOptimizer, *steps: int) -> None:
    for step in steps:
        (loss_of(model, step) / 3).backward()


@each_row
def test_accumulation(row: Any) -> None:
    model, optimizer, other, expected = pair(row)
    release_gradients(model, optimizer, accumulation_steps=3)
    for step in range(0, 6, 3):
        before = snapshot(optimizer)
        accumulate(model, optimizer, step, step + 1)
        assert_unchanged(optimizer, before)
        assert all(param.grad is not None for param in params_of(optimizer))
        accumulate(model, optimizer, step + 2)
        assert no_gradients(optimizer)
        if step:
            optimizer.step()
            optimizer.zero_grad()
        expected.zero_grad()
        accumulate(other, expected, step, step + 1, step + 2)
        expected.step()
    assert_same(optimizer, expected)


def test_accumulation_cut_short() -> None:
    """step() applies what there is, zero_grad() drops it; either way the count begins anew."""
    model, optimizer, other, expected = pair()
    release_gradients(model, optimizer, accumulation_steps=3)
    accumulate(model, optimizer, 0, 1)
    optimizer.step()
    assert no_gradients(optimizer)
    accumulate(model, optimizer, 2, 3)
    model.zero_grad()
    accumulate(model, optimizer, 4, 5, 6)
    assert no_gradients(optimizer)
    for steps in ((0, 1), (4, 5, 6)):
        expected.zero_grad()
        accumulate(other, expected, *steps)
        expected.step()
    assert_same(optimizer, expected)


def test_what_is_accumulated_outlives_the_release() -> None:
    model, optimizer, other, expected = pair()
    with release_gradients(model, optimizer, accumulation_steps=3):
        accumulate(model, optimizer, 0, 1)
    accumulate(model, optimizer, 2)
    optimizer.step()
    accumulate(other, expected, 0, 1, 2)
    expected.step()
    assert_same(optimizer, expected)


def test_unannounced_accumulation_is_refused() -> None:
    """As soon as the loop has called step(), and before anything is written."""
    model, optimizer, *_ = pair()
    release_gradients(model, optimizer)
    optimizer.step()
    bare(model, optimizer, 0)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"got a second gradient since .*release with accumulation_steps=N"):
        bare(model, optimizer, 1)
    assert_unchanged(optimizer, before)
    with pytest.raises(RuntimeError, match=r"or by DistributedDataParallel, .*zero_grad\(\) drops"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert_unchanged(optimizer, before)
    bare(model, optimizer, 1)


def test_backwards_over_different_parameters_are_one_step() -> None:
    model, optimizer, other, expected = pair()
    release_gradients(model, optimizer)
    for _ in range(2):
        for m in (model, other):
            m.once(torch.ones(6)).sum().backward()
            m.twice(torch.ones(6)).sum().backward()
        for o in (optimizer, expected):
            o.step()
            o.zero_grad()
    assert_same(optimizer, expected)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_accumulation_steps_must_be_a_number_of_backwards(value: Any, error: type[Exception]) -> None:
    model, optimizer, *_ = pair()
    with pytest.raises(error, match=re.escape(f"accumulation_steps={value!r}: must be")):
        release_gradients(model, optimizer, accumulation_steps=value)


# --- loss scaling and clipping


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_is_refused(unscale: bool) -> None:
    model, optimizer, *_ = pair()
    release = release_gradients(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model, 0)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="GradScaler cannot be used while gradients are released"):
        scaler.step(optimizer)
    optimizer.step()  # which is none of the scaler's
    release.remove()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model, 1)).backward()
    scaler.step(optimizer)
    assert optimizer.state[model.once.weight]["step"] == 2


def test_disabled_grad_scaler() -> None:
    model, optimizer, other, expected = pair()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    release_gradients(model, optimizer, grad_scaler=scaler)
    for step in range(2):
        scaler.scale(loss_of(model, step)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        train_ordinarily(other, expected, step)
    assert_same(optimizer, expected)


def test_grad_scaler_and_clipping_announced() -> None:
    model, optimizer, *_ = pair()
    with pytest.raises(ValueError, match=r"grad_scaler=GradScaler: .*decides after backward whether the gradients"):
        release_gradients(model, optimizer, grad_scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match=r"max_norm=1.0: the norm of all gradients is known only when the last"):
        release_gradients(model, optimizer, max_norm=1.0)
    assert optimizer.runtime.driver is None


def test_clipping_by_value() -> None:
    model, optimizer, other, expected = pair()
    for m in (model, other):
        for param in m.parameters():
            param.register_hook(lambda grad: grad.clamp(-1e-2, 1e-2))
    release_gradients(model, optimizer)
    bare(model, optimizer, 0)
    train_ordinarily(other, expected, 0)
    assert_same(optimizer, expected)


# --- several processes


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch has no gloo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_is_refused(process_group: None) -> None:
    model = Tied()
    wrapped = DistributedDataParallel(model)
    optimizer = make(ROW, model.parameters())
    for what in (wrapped, nn.Sequential(wrapped), model, [model.once.weight]):
        with pytest.raises(RuntimeError, match="gradients of a model in DistributedDataParallel cannot be released"):
            release_gradients(what, optimizer)
    apart = nn.Linear(2, 2)
    release_gradients(apart, make(ROW, apart.parameters()))


def test_ddp_made_later_is_refused_in_backward(process_group: None) -> None:
    model, optimizer, *_ = pair()
    release_gradients(model, optimizer)
    wrapped = DistributedDataParallel(model)
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="DistributedDataParallel cannot be released: it averages them"):
            loss_of(wrapped, 0).backward()
        assert_unchanged(optimizer, before)
        optimizer.zero_grad()
        wrapped = DistributedDataParallel(model)  # a failed backward leaves the other unusable


def test_ddp_made_in_mid_training_is_refused_in_step(process_group: None) -> None:
    model, optimizer, *_ = pair()
    release_gradients(model, optimizer)
    with_step(model, optimizer, 0)
    wrapped = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match=r"another gradient since: by hand, .* or by DistributedDataParallel"):
        with_step(wrapped, optimizer, 1)


TWO_PROCESSES = """
import sys, torch
from torch.nn.parallel import DistributedDataParallel
from signadam_ext import SignAdamPP
from signadam_ext.training.gradient_release import release_gradients
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
model = torch.nn.Linear(3, 2)
optimizer = SignAdamPP(model.parameters())
release_gradients(model, optimizer)
wrapped = DistributedDataParallel(model)
before = model.weight.detach().clone()
try:
    wrapped(torch.ones(1, 3)).sum().backward()
except RuntimeError as error:
    assert "DistributedDataParallel" in str(error) and torch.equal(model.weight, before)
    print("refused", flush=True)
import os
os._exit(0)  # no farewell between processes whose backward has failed
"""


def test_ddp_of_two_processes(tmp_path: Path) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch has no gloo")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(tmp_path / "store"), str(rank)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        assert [process.communicate(timeout=60)[0].strip() for process in processes] == ["refused"] * 2
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("mark", ["_is_flat_param", "_fsdp_flattened"])
def test_flat_parameters_are_refused(mark: str) -> None:
    weight: Any = nn.Parameter(torch.ones(3))
    setattr(weight, mark, True)  # as FSDP marks its own, and parts of them
    with pytest.raises(RuntimeError, match="flat parameter: gradients of a model in FullyShardedDataParallel cannot"):
        release_gradients([weight], make(ROW, [weight]))


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("part", ["model", "last layer"])
def test_swapped_parameters_are_updated_all_the_same(part: str, accumulation_steps: int) -> None:
    """Loading and converting a module swaps its parameters if torch is told so; a loop without step() notices."""

    def trained(swaps: bool) -> list[Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        optimizer = make(ROW, list(model.parameters()))
        release_gradients(model, optimizer, accumulation_steps=accumulation_steps)
        changed: nn.Module = model if part == "model" else model[1]
        torch.__future__.set_swap_module_params_on_conversion(swaps)
        try:
            for step in range(6):
                model(torch.ones(2, 4)).square().sum().backward()
                if step == 1:
                    changed.load_state_dict({name: x.clone() for name, x in changed.state_dict().items()})
                if step == 3:
                    changed.double().float()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        assert all(param.grad is None for param in model.parameters())
        return [(param.tolist(), float(optimizer.state[param]["step"])) for param in model.parameters()]

    swapped = trained(True)
    assert swapped == trained(False)
    assert {count for _, count in swapped} == {6 / accumulation_steps}


def test_released_parameters_are_pickled_as_others() -> None:
    model = nn.Linear(2, 2)
    optimizer = make(ROW, list(model.parameters()))
    release = release_gradients(model, optimizer)
    file = io.BytesIO()
    torch.save(list(model.parameters()), file)
    file.seek(0)
    assert same_bits(torch.load(file, weights_only=True)[0], model.weight)
    release.remove()
    assert vars(model.weight) == {}


@pytest.mark.parametrize("calls_step", [False, True])
@pytest.mark.parametrize("compiled", ["loop", "backward"])
def test_compiled_loops(compiled: str, calls_step: bool) -> None:
    def trained(compiles: bool) -> list[Any]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = make(ROW, list(model.parameters()))
        release_gradients(model, optimizer)

        def loop(x: Tensor) -> None:
            model(x).square().sum().backward()
            if calls_step:
                optimizer.step()

        if compiles and compiled == "loop":
            run = torch.compile(loop, backend="eager")
            for _ in range(2):
                run(torch.ones(2, 4))
        else:
            enabled = compiled_autograd._enable(torch.compile(backend="eager"))
            with enabled if compiles else contextlib.nullcontext():
                for _ in range(2):
                    loop(torch.ones(2, 4))
        return [(param.tolist(), float(optimizer.state[param]["step"])) for param in model.parameters()]

    assert trained(True) == trained(False)


def test_lazy_modules_before_their_first_run() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    optimizer = make(ROW, list(model.parameters()))
    release_gradients(model, optimizer)
    for _ in range(2):
        model(torch.ones(2, 3)).sum().backward()
    assert [float(optimizer.state[param]["step"]) for param in model.parameters()] == [2, 2, 2, 2]
