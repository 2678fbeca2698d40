"""``optimizer.step()`` inside a graph of torch.compile, without a break: the bits of eager steps.

Whatever the graph does to gradients and parameters before and after.
"""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import signadam_ext
from signadam_ext import AdamW, SignAdamPP, SignSGD

Step = Callable[[nn.Module, Any], Callable[[], Any]]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(count: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(5, 5) for _ in range(count)])


def backward(model: nn.Module, number: int) -> None:
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(number))
    model.zero_grad()
    model(x).square().sum().backward()


def plain(model: nn.Module, optimizer: Any) -> Callable[[], Any]:
    return lambda: optimizer.step()


@functools.cache
def clips_in_graphs() -> bool:
    """Whether torch traces its own clipping without a break, which 2.6 does not."""
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    clip = torch.compile(lambda: torch.nn.utils.clip_grad_norm_([param], 1.0), fullgraph=True, backend="eager")
    try:
        clip()
    except torch._dynamo.exc.TorchDynamoException:
        return False
    return True


def clipped(model: nn.Module, optimizer: Any) -> Callable[[], Any]:
    """Gradients that the graph has changed, and no one else has seen."""

    def body() -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return norm

    return body


def between_others(model: nn.Module, optimizer: Any) -> Callable[[], Any]:
    """Parameters that the graph has changed before, and reads after."""

    def body() -> Tensor:
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(0.5)
        optimizer.step()
        return sum((param.detach().sum() for param in model.parameters()), torch.zeros(()))

    return body


def trained(
    cls: type, options: dict[str, Any], make: Step, backend: str | None, steps: int = 5
) -> tuple[list[Tensor], list[Any]]:
    model = model_of()
    optimizer = cls(model.parameters(), lr=0.01, **options)
    body = make(model, optimizer)
    step = body if backend is None else torch.compile(body, fullgraph=True, backend=backend)
    told = []
    for number in range(steps):
        backward(model, number)
        optimizer.param_groups[0]["lr"] = 0.01 / (number + 1)
        told.append(step())
    state = [value for param in model.parameters() for value in optimizer.state[param].values()]
    return [param.detach().clone() for param in model.parameters()] + [torch.as_tensor(value) for value in state], told


@pytest.mark.parametrize("make", [plain, clipped, between_others])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "cls, options",
    [
        (SignAdamPP, {"state_dtype": "int2", "confidence": "adaptive"}),
        (AdamW, {}),
        (SignAdamPP, {"backend": "reference"}),
    ],
    ids=["int2", "adamw", "reference"],
)
def test_the_bits_of_eager_steps(make: Step, backend: str, cls: type, options: dict[str, Any]) -> None:
    """aot_eager works on copies of what it writes, eager on the tensors themselves."""
    if make is clipped and not clips_in_graphs():
        pytest.skip(f"torch {torch.__version__} does not trace its own clip_grad_norm_ without a break")
    values, told = trained(cls, options, make, None)
    compiled, told_compiled = trained(cls, options, make, backend)
    assert all(torch.equal(one, other) for one, other in zip(values, compiled, strict=True))
    assert [str(one) for one in told] == [str(other) for other in told_compiled]


def test_by_inductor() -> None:
    values, _ = trained(SignAdamPP, {"state_dtype": "int8"}, plain, None)
    compiled, _ = trained(SignAdamPP, {"state_dtype": "int8"}, plain, "inductor")
    assert all(torch.equal(one, other) for one, other in zip(values, compiled, strict=True))


def test_a_schedule_compiles_twice_at_most() -> None:
    """Once for the first learning rate, once for all others; in the form that torch allows beside a scheduler."""
    model, counter = model_of(), CompileCounterWithBackend("eager")
    optimizer = SignAdamPP(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    step = torch.compile(lambda: type(optimizer).step(optimizer), fullgraph=True, backend=counter)
    for number in range(100):
        backward(model, number)
        step()
        optimizer._opt_called = True  # as the wrapper does, which this call goes past
        scheduler.step()
    assert counter.frame_count <= 2


def test_gradients_that_come_and_go() -> None:
    """A parameter without a gradient is left alone, in the graph as in eager steps."""
    models = [model_of(), model_of()]
    optimizers = [SignAdamPP(model.parameters(), lr=0.01) for model in models]
    step = torch.compile(lambda: optimizers[1].step(), fullgraph=True, backend="aot_eager")
    for number in range(6):
        for model in models:
            backward(model, number)
            if number % 2:
                model[1].weight.grad = None
        optimizers[0].step()
        step()
        pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_a_whole_training_step() -> None:
    """Forward, backward and step in one compiled function; torch breaks its graph at ``backward``."""
    ends = []
    for compiles in (False, True):
        model = model_of()
        optimizer = SignAdamPP(model.parameters(), lr=0.01, state_dtype="int2")

        def train(x: Tensor, model: nn.Module = model, optimizer: Any = optimizer) -> None:
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        run = torch.compile(train, backend="aot_eager") if compiles else train
        for number in range(4):
            run(torch.randn(2, 5, generator=torch.Generator().manual_seed(number)))
        ends.append([param.detach() for param in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_what_fails_in_a_graph_changes_nothing() -> None:
    model = model_of()
    optimizer = SignAdamPP(model.parameters(), lr=0.01)
    step = torch.compile(between_others(model, optimizer), fullgraph=True, backend="eager")
    backward(model, 0)
    step()
    before = [param.detach().clone() for param in model.parameters()]
    optimizer.param_groups[0]["weight_decay"] = -1.0
    compiled = torch.compile(lambda: optimizer.step(), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="weight_decay"):
        compiled()
    assert all(torch.equal(one, param) for one, param in zip(before, model.parameters(), strict=True))


def test_a_refused_step_leaves_gradients_on() -> None:
    """The graph turns them off for nothing: who would turn them on again after an error?"""
    model = model_of()
    optimizer = SignAdamPP(model.parameters(), lr=0.01)
    backward(model, 0)
    optimizer.param_groups[0]["weight_decay"] = -1.0
    step = torch.compile(lambda: optimizer.step(), fullgraph=True, backend="eager")
    try:
        with pytest.raises(ValueError, match="weight_decay"):
            step()
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


def test_the_operator_says_when_its_optimizer_is_gone() -> None:
    optimizer = SignSGD([nn.Parameter(torch.ones(3))], lr=0.01)
    number = optimizer.runtime.number
    del optimizer
    gc.collect()
    with pytest.raises(RuntimeError, match="the optimizer whose step was compiled is gone"):
        torch.ops.signadam_ext.step([torch.ones(3)], [torch.ones(3)], [0], number)


def test_a_copy_has_a_number_of_its_own() -> None:
    optimizer = SignSGD([nn.Parameter(torch.ones(3))], lr=0.01)
    assert copy.deepcopy(optimizer).runtime.number != optimizer.runtime.number


def test_the_operator_is_well_made() -> None:
    """torch's own checks: it writes what it declares to write, and traces without data."""
    param = nn.Parameter(torch.arange(4.0))
    optimizer = signadam_ext.SignSGD([param], lr=0.25)
    param.grad = torch.tensor([1.0, -1.0, 0.0, 2.0])
    given = ([param.detach().clone()], [param.grad], [0], optimizer.runtime.number)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    assert set(torch.library.opcheck(torch.ops.signadam_ext.step.default, given, test_utils=checks).values()) == {
        "SUCCESS"
    }
