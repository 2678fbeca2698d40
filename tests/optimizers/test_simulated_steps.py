"""Steps of fake tensors, as estimators of memory take them: state of the right sizes, and nothing else."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.optimizer_contract import ROWS, each_row, hyperparameters, make
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from signadam_ext import SignAdam, SignAdamPP, Signum, memory, release_gradients
from signadam_ext.optimizers.base import SignOptimizer

FORMS: list[tuple[type[SignOptimizer], dict[str, Any]]] = [
    (SignAdamPP, {"state_dtype": "int2", "param_storage": "stochastic"}),
    (SignAdamPP, {"state_dtype": "int4", "param_storage": "master", "confidence": "sparsity", "target": 0.1}),
    (SignAdam, {"state_dtype": ("int8", "bf16"), "param_storage": "split16"}),
    (Signum, {"state_dtype": "int8", "param_storage": "split8"}),
]


def model_of(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return nn.Sequential(nn.Linear(40, 30, dtype=dtype), nn.Tanh(), nn.Linear(30, 7, bias=False, dtype=dtype))


def backward(model: nn.Module) -> None:
    model(torch.randn(2, 40, dtype=next(model.parameters()).dtype)).sum().backward()


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """Asking a fake tensor for its address warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def kinds(optimizer: Any) -> list[dict[str, Any]]:
    """What there is of each parameter's state: memory orders and dtypes of tensors, and numbers."""
    return [
        {
            name: (value.shape, value.stride(), value.dtype, value.device) if isinstance(value, Tensor) else value
            for name, value in optimizer.state[param].items()
        }
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def check(make_optimizer: Any, dtype: torch.dtype, is_inside: bool) -> None:
    """The state is what a real step makes, of fake tensors; parameters are not written."""
    found = []
    for mode in (contextlib.nullcontext(), FakeTensorMode()):
        with mode:
            model = model_of(dtype)
            for param in model.parameters():
                param.grad_variance = torch.full_like(param, 0.5, dtype=torch.float32)
            optimizer = make_optimizer(model.parameters())
            backward(model)
        with mode if is_inside else contextlib.nullcontext():
            versions = [param._version for param in model.parameters()]
            optimizer.step()
            first = [dict(state) for state in optimizer.state.values()]
            optimizer.step()
        for state, before in zip(optimizer.state.values(), first, strict=True):
            assert all(state[name] is before[name] for name in before)
        found.append(kinds(optimizer))
    assert found[0] == found[1]
    assert [param._version for param in model.parameters()] == versions
    for state in optimizer.state.values():
        assert all(isinstance(value, FakeTensor) for value in state.values() if isinstance(value, Tensor))


@each_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_inside", [True, False], ids=["inside", "outside"])
def test_each_optimizer(row: Any, dtype: torch.dtype, is_inside: bool) -> None:
    check(lambda params: make(row, params), dtype, is_inside)


@pytest.mark.parametrize("cls, options", FORMS)
def test_each_form_of_storage(cls: type[SignOptimizer], options: dict[str, Any]) -> None:
    check(lambda params: cls(params, **options), torch.bfloat16, True)  # type: ignore[call-arg]


def tracked(mode: Any, cls: Any, options: dict[str, Any]) -> tuple[dict[str, int], memory.Estimate]:
    """What MemTracker has found after a step, and what the calculator says."""
    with mode:
        model = model_of()
        optimizer = cls(model.parameters(), **options)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            backward(model)
            optimizer.step()
            after = tracker.get_tracker_snapshot("current")
            peak = tracker.get_tracker_snapshot("peak")
    assert torch.device("meta") not in peak
    found = {str(kind.value if hasattr(kind, "value") else kind): n for kind, n in after[torch.device("cpu")].items()}
    shapes = [param.shape for param in model.parameters()]
    return found, memory.estimate(shapes, cls, param_dtype="bf16", **options)


@pytest.mark.parametrize(
    "cls, options",
    [*FORMS, *((row.optimizer, hyperparameters(row)) for row in ROWS.values() if not row.reads_variance)],
)
@pytest.mark.parametrize("fake", [True, False], ids=["fake", "real"])
def test_mem_tracker_finds_what_the_calculator_says(cls: Any, options: dict[str, Any], fake: bool) -> None:
    """To the byte."""
    known = {k: v for k, v in options.items() if k not in ("lr", "beta", "betas", "alpha", "eps", "weight_decay")}
    found, expected = tracked(FakeTensorMode() if fake else contextlib.nullcontext(), cls, known)
    assert (found["Parameter"], found["Gradient"], found["Optstate"]) == (
        expected.weights,
        expected.gradients,
        expected.state,
    )


def test_released_gradients() -> None:
    with FakeTensorMode():
        model = model_of()
        optimizer = SignAdamPP(model.parameters(), state_dtype="int2", param_storage="stochastic")
        release_gradients(model, optimizer)
        backward(model)
    assert all(param.grad is None for param in model.parameters())
    assert [optimizer.state[param]["exp_avg"].numel() for param in model.parameters()] == [304, 8, 56]


def test_sharded_parameters() -> None:
    """Of eight ranks in one process, as torchtitan estimates: parts of the state of each parameter."""
    distributed = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    torch.distributed.init_process_group("fake", rank=0, world_size=8, store=distributed.FakeStore())
    try:
        mesh = init_device_mesh("cpu", (8,))
        with FakeTensorMode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own
            model = model_of()
            fully_shard(model, mesh=mesh)
            optimizer = SignAdamPP(model.parameters(), state_dtype="int2", param_storage="stochastic")
            for param in model.parameters():
                param.grad = torch.zeros_like(param)
            optimizer.step()
        assert [state["exp_avg"].numel() for state in optimizer.state.values()] == [40, 8, 8]
    finally:
        torch.distributed.destroy_process_group()


def test_nothing_is_made_where_a_parameter_cannot_be_served() -> None:
    with FakeTensorMode():
        params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
        optimizer = SignAdamPP(params)
        for param in params:
            param.grad = torch.ones(3)
        optimizer.param_groups[0]["lr"] = -1.0
        with pytest.raises(ValueError, match="lr=-1"):
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1
        params[1].requires_grad_(False)
        params[1].data = torch.ones(3, dtype=torch.float64)
        with pytest.raises(TypeError, match=r"parameter 1 of group 0 has dtype torch\.float64"):
            optimizer.step()
        assert not optimizer.state
        params[1].grad = None
        optimizer.step()
        assert list(optimizer.state) == params[:1]


def test_fake_and_real_parameters_are_not_mixed() -> None:
    with FakeTensorMode():
        fake = nn.Parameter(torch.ones(3))
        fake.grad = torch.ones(3)
    real = nn.Parameter(torch.ones(3))
    real.grad = torch.ones(3)
    optimizer = SignAdamPP([("real", real), ("fake", fake)])
    with pytest.raises(TypeError, match="parameter 'fake' is a FakeTensor on cpu, which has no memory"):
        optimizer.step()
    assert not optimizer.state and torch.equal(real, torch.ones(3))
