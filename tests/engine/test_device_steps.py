"""Steps that begin on the device: what the host decides elsewhere is decided there, with the same bits.

By the Triton kernels, interpreted in a process of its own, whose device is the CPU; and on a GPU, in CUDA graphs too.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support.interpreted import INTERPRETED, run_interpreted
from support.strategies import same_bits
from torch import Tensor

from signadam_ext import FOCUS, MSVAG, AdamW, Lion, SignAdam, SignAdamPP, SignSGD
from signadam_ext.engine import plan
from signadam_ext.engine.gradients import PythonReader, make_reader

gpu = pytest.mark.gpu
DEVICES = [("cpu", "triton")] if INTERPRETED else [pytest.param("cuda", x, marks=gpu) for x in ("cuda", "triton")]
on_each_device = pytest.mark.parametrize("device, backend", DEVICES, ids=str)
#: More than a chunk, one element, none, and what does not fill a run of memory.
SHAPES = ((16_600,), (0,), (7, 3), (5, 2))
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (AdamW, {"weight_decay": 0.1}),
    "lion": (Lion, {"weight_decay": 0.1, "decoupled_weight_decay": False, "state_dtype": "int8"}),
    "sign_adam": (SignAdam, {"second_moment": "analytic", "state_dtype": "int4"}),
    "msvag": (MSVAG, {}),
    "int2": (SignAdamPP, {"state_dtype": "int2", "param_storage": "stochastic", "seed": 2**64 - 1}),
    "adaptive": (SignAdamPP, {"confidence": "adaptive", "param_storage": "split8"}),
    "sparsity": (SignAdamPP, {"confidence": "sparsity", "target": 0.3}),
    "focus": (FOCUS, {"weight_decay": 0.1}),
}
#: Interpreted are two: other formulas and thresholds are in tests of the kernels, tests/backends/test_*device_step.py.
each_method = pytest.mark.parametrize("method", ("adamw", "int2") if INTERPRETED else METHODS)


def test_interpreted() -> None:
    run_interpreted(__file__)


class Twins:
    """One training on the device, begun there, and one on the CPU, with the same gradients."""

    def __init__(self, method: str, device: str, backend: str, **options: Any) -> None:
        cls, own = METHODS[method]
        dtype = torch.bfloat16 if own.get("param_storage", "nearest") != "nearest" else torch.float32
        generator = torch.Generator().manual_seed(7)
        values = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
        values[-1] = torch.zeros(5, 4, dtype=dtype)[:, ::2].copy_(values[-1])
        self.params = [[value.clone().requires_grad_() for value in values] for _ in range(2)]
        self.params[0] = [value.to(device).detach().requires_grad_() for value in self.params[0]]
        self.optimizers = []
        for params, where in zip(self.params, (backend, "cpu"), strict=True):
            groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.003, "maximize": True}]
            here = {"capturable": True} if where == backend else {}
            self.optimizers.append(cls(groups, lr=0.01, backend=where, **{**own, **here, **options}))
        self.ours, self.theirs = self.optimizers

    def give(self, step: int, bad: float | None = None, absent: int | None = None, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(step)
        for index, (param, twin) in enumerate(zip(*self.params, strict=True)):
            grad = torch.randn(twin.shape, generator=generator).mul_(scale).to(twin.dtype)
            if bad is not None and index == 0:
                grad[16_500] = bad
            param.grad = None if index == absent else grad.to(param.device)
            twin.grad = None if index == absent else grad

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def check(self) -> None:
        """All that a checkpoint holds has the same bits, and so have the parameters."""
        for param, twin in zip(*self.params, strict=True):
            assert same_bits(param.detach().cpu(), twin.detach())
        ours, theirs = (optimizer.state_dict()["state"] for optimizer in self.optimizers)
        assert ours.keys() == theirs.keys()
        for index, state in theirs.items():
            assert ours[index].keys() == state.keys()
            for name, value in state.items():
                own = ours[index][name]
                assert same_bits(own.cpu(), value) if isinstance(value, Tensor) else own == value

    def counts(self) -> tuple[int, int]:
        return tuple(int(optimizer.skipped_steps) for optimizer in self.optimizers)  # type: ignore[return-value]


@on_each_device
@each_method
def test_bits_are_those_of_the_host(method: str, device: str, backend: str) -> None:
    """A parameter that gets its first gradient late, a schedule, and direction and formulas that change."""
    twins = Twins(method, device, backend)
    for step in range(3):
        twins.give(step, absent=2 if step == 0 else None)
        for optimizer in twins.optimizers:
            optimizer.param_groups[0]["lr"] *= 0.9
            optimizer.param_groups[1]["maximize"] = step % 2 == 0
        twins.step()
        assert twins.ours.runtime.plan.device_steps is not None
        twins.check()
    steps = {state["step"].device.type for state in twins.ours.state.values()}
    assert steps == {device}


@on_each_device
@pytest.mark.parametrize("method", ["adamw", "int2"])
def test_clipping_is_decided_there(method: str, device: str, backend: str) -> None:
    twins = Twins(method, device, backend, max_grad_norm=0.5)
    for step, bad in enumerate((None, math.nan, None)):
        twins.give(step, bad)
        twins.step()
        if bad is None:
            assert twins.ours.last_grad_norm.item() == twins.theirs.last_grad_norm.item() > 0.5
        else:
            assert math.isnan(twins.ours.last_grad_norm.item())
        twins.check()
        assert twins.ours.last_grad_norm.device.type == twins.ours.skipped_steps.device.type == device
    assert twins.counts() == (1, 1)


@on_each_device
def test_a_scaled_loss(device: str, backend: str) -> None:
    """A scale that is no power of two, and with a norm."""
    twins = Twins("adamw", device, backend, capturable=None, fused=True)
    for step, found in enumerate((0.0, 1.0, 0.0)):
        if step == 2:
            for group in (*twins.ours.param_groups, *twins.theirs.param_groups):
                group["max_grad_norm"] = 0.1
        twins.give(step, scale=1000.0)
        for optimizer, where in zip(twins.optimizers, (device, "cpu"), strict=True):
            optimizer.grad_scale = torch.full((1,), 1000.0, device=where)
            optimizer.found_inf = torch.full((1,), found, device=where)
        twins.step()
        twins.check()
    assert twins.counts() == (1, 1)


@on_each_device
def test_a_scale_that_has_backed_off_to_nothing(device: str, backend: str) -> None:
    """Skipped where the reciprocal is infinite in fp32, said or not; with a norm, what clipping leaves of it counts."""
    twins = Twins("adamw", device, backend, capturable=None, fused=True)
    cases = ((0.0, 1.0, None), (0.0, 0.0, None), (2.0**-128, 0.0, None), (0.0, 0.0, 1.0), (2.0**-128, 0.0, 1.0))
    for step, (scale, found, norm) in enumerate(cases):
        for group in (*twins.ours.param_groups, *twins.theirs.param_groups):
            group["max_grad_norm"] = norm
        twins.give(step)
        for optimizer, where in zip(twins.optimizers, (device, "cpu"), strict=True):
            optimizer.grad_scale = torch.full((1,), scale, device=where)
            optimizer.found_inf = torch.full((1,), found, device=where)
        twins.step()
    assert twins.counts() == (4, 4) and not any(param.isnan().any() for param in twins.params[0])
    twins.check()


@on_each_device
def test_weights_that_a_skipped_first_step_has_seen(device: str, backend: str) -> None:
    """Only the device has made a state of them, and there they are no part of an average."""
    twins = Twins("focus", device, backend, max_grad_norm=1.0)
    twins.give(0, math.nan)
    twins.step()
    generator = torch.Generator().manual_seed(9)
    for param, twin in zip(*twins.params, strict=True):
        values = torch.randn(twin.shape, generator=generator)
        param.detach().copy_(values)
        twin.detach().copy_(values)
    for step in (1, 2):
        twins.give(step)
        twins.step()
        twins.check()
    assert twins.counts() == (1, 1)


@on_each_device
def test_counts_move_to_where_they_are_counted(device: str, backend: str) -> None:
    """Steps without conditions, with, and without again in a copy; skips are counted on."""
    twins = Twins("int2", device, backend, capturable=None)
    twins.give(0)
    twins.step()
    assert twins.ours.runtime.plan.device_steps is None
    assert {state["step"].device.type for state in twins.ours.state.values()} == {"cpu"}
    for optimizer in twins.optimizers:
        for group in optimizer.param_groups:
            group["max_grad_norm"] = 1.0
    for step, bad in ((1, None), (2, math.nan), (3, None)):
        if step == 3:  # another plan
            for optimizer in twins.optimizers:
                optimizer.add_param_group({"params": [torch.zeros(3, requires_grad=True)], "max_grad_norm": 1.0})
        twins.give(step, bad)
        twins.step()
        twins.check()
    assert twins.ours.runtime.plan.device_steps is not None
    twins.give(4, math.nan)
    twins.step()
    assert twins.counts() == (2, 2)
    for optimizer in twins.optimizers:
        for group in optimizer.param_groups:
            group["max_grad_norm"] = None
    clones = copy.deepcopy(twins)
    clones.ours, clones.theirs = clones.optimizers
    clones.give(5)
    clones.step()
    assert clones.ours.runtime.plan.device_steps is None
    clones.check()


@on_each_device
def test_a_checkpoint_goes_both_ways(device: str, backend: str) -> None:
    twins = Twins("sign_adam", device, backend)
    twins.give(0)
    twins.step()
    crossed = [copy.deepcopy(optimizer.state_dict()) for optimizer in twins.optimizers]
    twins.ours.load_state_dict(crossed[1])
    twins.theirs.load_state_dict(crossed[0])
    twins.give(1)
    twins.step()
    twins.check()


@on_each_device
@pytest.mark.parametrize("count", [1.5, -1.0, math.nan, 2.0**53])
@pytest.mark.parametrize("reader", [make_reader, PythonReader], ids=["compiled", "python"])
def test_a_count_that_no_training_reaches_is_refused(
    device: str, backend: str, reader: Any, count: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written into the tensor that the device counts in, which the host does not read at a step."""
    monkeypatch.setattr(plan, "make_reader", reader)
    twins = Twins("adamw", device, backend)
    twins.give(0)
    twins.step()
    param = twins.params[0][2]
    step = twins.ours.state[param]["step"]
    before = copy.deepcopy(twins.ours.state_dict()["state"]), [param.detach().clone() for param in twins.params[0]]
    step.fill_(count)
    twins.give(1)
    match = "state 'step' of parameter 1 of group 1 is .*: must be the number of steps taken, a whole number"
    for _ in range(2):
        with pytest.raises(ValueError, match=match):
            twins.ours.step()
    step.fill_(1.0)
    after = twins.ours.state_dict()["state"], [param.detach() for param in twins.params[0]]
    assert str(before) == str(after)
    twins.step()
    twins.check()
    assert twins.ours.state[param]["step"] is step, "one that could be right is read again, and stays"


@on_each_device
def test_statistics_are_gathered(device: str, backend: str) -> None:
    twins = Twins("int2", device, backend)
    for optimizer in twins.optimizers:
        optimizer.observe()
    twins.give(0)
    twins.step()
    ours, theirs = (optimizer.statistics() for optimizer in twins.optimizers)
    assert str(ours) == str(theirs)


# On a GPU.


@gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@each_method
def test_a_graph_replays_steps(method: str, backend: str) -> None:
    """A schedule acts on replays by way of tensors; nothing waits for the device."""
    lr, decay = (torch.tensor(x, dtype=torch.float64, device="cuda") for x in (0.01, 0.1))
    twins = Twins(method, "cuda", backend, max_grad_norm=0.5)
    for group in twins.ours.param_groups:
        group["lr"], group["weight_decay"] = lr, decay
    for group in twins.theirs.param_groups:
        group["lr"], group["weight_decay"] = 0.01, 0.1
    twins.give(0)
    twins.step()
    static = [param.grad for param in twins.params[0]]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        twins.ours.step()
    for step, bad in ((1, None), (2, math.nan), (3, None)):
        twins.give(step, bad)
        for grad, param in zip(static, twins.params[0], strict=True):
            grad.copy_(param.grad)
        torch.cuda.set_sync_debug_mode("error")
        try:
            lr.mul_(0.5)
            decay.mul_(0.5)
            graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for group in twins.theirs.param_groups:
            group["lr"], group["weight_decay"] = lr.item(), decay.item()
        twins.theirs.step()
        twins.check()
    assert twins.counts() == (1, 1)


@gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_nothing_waits_for_the_device(backend: str) -> None:
    twins = Twins("adamw", "cuda", backend, max_grad_norm=0.5, fused=True)
    for step in range(3):
        twins.give(step)
        twins.ours.grad_scale, twins.ours.found_inf = (torch.full((1,), x, device="cuda") for x in (2.0, 0.0))
        if step > 0:
            torch.cuda.set_sync_debug_mode("error")
        try:
            twins.ours.step()
            assert twins.ours.last_grad_norm.is_cuda and twins.ours.skipped_steps.is_cuda
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
def test_a_capture_needs_capturable_and_a_step_before() -> None:
    param = torch.ones(100, device="cuda", requires_grad=True)
    param.grad = torch.ones_like(param)
    for options, steps in (({}, 1), ({"capturable": True}, 0)):
        optimizer = SignSGD([param], **options)
        for _ in range(steps):
            optimizer.step()
        refused = pytest.raises(RuntimeError, match="capturable=True and take a step before")
        with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()
