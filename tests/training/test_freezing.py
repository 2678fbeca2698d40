"""GradES: what is frozen and when, that nothing else changes, and how it resumes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from signadam_ext import FOCUS, AdEMAMix, GradES, MARSAdamW, ScheduleFreeSign, SignAdamPP, SignSGD, Signum


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def grads(net: nn.Module, sizes: dict[str, float]) -> None:
    """Constant gradients of a size for each parameter, of those that take one."""
    for name, param in net.named_parameters():
        if param.requires_grad:
            param.grad = torch.full_like(param, sizes[name])


SIZES = {"0.weight": 0.25, "0.bias": 0.0, "1.weight": 1.0, "1.bias": 0.0}


def test_freezes_each_matrix_when_its_own_momentum_has_fallen() -> None:
    net = model()
    optimizer = Signum(net.named_parameters(), lr=0.5, beta=0.5, weight_decay=0.1)
    stopping = GradES(optimizer, tau=0.3, grace_steps=2, every=2)
    frozen = []
    for _ in range(6):
        grads(net, SIZES)
        optimizer.step()
        frozen.append(list(stopping.frozen))
    # Means of |m| of 0.weight: 1/8, 3/16, 7/32 ..., below tau at any look; none of steps 1 and 2, for grace.
    assert frozen == [[], [], [], ["0.weight"], ["0.weight"], ["0.weight"]]
    assert not stopping.done
    kept = net[0].weight.detach().clone()
    assert not net[0].weight.requires_grad and net[0].weight.grad is None
    assert net[0].bias.requires_grad  # a vector, which nobody watches
    net[0].weight.grad = torch.ones_like(net[0].weight)  # as FSDP2 leaves one
    moved = net[1].weight.detach().clone()
    grads(net, SIZES)
    optimizer.step()
    assert torch.equal(net[0].weight, kept) and not torch.equal(net[1].weight, moved)
    for _ in range(12):  # the gradient of the other vanishes: m halves
        grads(net, {**SIZES, "1.weight": 0.0})
        optimizer.step()
    assert stopping.frozen == ["0.weight", "1.weight"] and stopping.done
    assert optimizer.state[net[0].weight]["exp_avg"].shape == (3, 4)


def test_looking_changes_no_bit() -> None:
    nets = [model(), model()]
    optimizers = [SignAdamPP(net.parameters(), lr=0.1, weight_decay=0.1) for net in nets]
    GradES(optimizers[0], tau=0.0, grace_steps=0, every=1)
    for step in range(3):
        for net, optimizer in zip(nets, optimizers, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            net(torch.randn(5, 4)).square().sum().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_share_of_the_threshold() -> None:
    """Where everything stays below the threshold nothing passes, and what passes wholly is not frozen."""
    net = model()
    optimizer = SignSGD(net.parameters(), lr=0.1, alpha=0.5)
    stopping = GradES(optimizer, tau=0.5, grace_steps=0, every=1, statistic="passed")
    grads(net, SIZES)
    optimizer.step()
    assert stopping.frozen == ["parameter 0 of group 0"]


def test_a_step_without_gradients_freezes_nothing() -> None:
    net = model()
    optimizer = Signum(net.parameters())
    stopping = GradES(optimizer, tau=1e30, grace_steps=0, every=1)
    optimizer.step()
    assert stopping.frozen == [] and stopping.steps == 1


def test_resumes() -> None:
    net = model()
    optimizer = Signum(net.named_parameters(), beta=0.5)
    stopping = GradES(optimizer, tau=0.3, grace_steps=0, every=1)
    grads(net, SIZES)
    optimizer.step()
    saved = stopping.state_dict()
    assert saved == {"steps": 1, "frozen": ["0.weight"]}
    other = model()
    resumed = GradES(Signum(other.named_parameters(), beta=0.5), tau=0.3)
    resumed.load_state_dict(saved)
    assert resumed.state_dict() == saved and not other[0].weight.requires_grad
    with pytest.raises(ValueError, match=r"frozen: '2.weight' are none"):
        resumed.load_state_dict({"steps": 5, "frozen": ["2.weight"]})
    assert resumed.state_dict() == saved
    resumed.load_state_dict({"steps": 0, "frozen": []})
    assert other[0].weight.requires_grad and not resumed.frozen


def test_resumes_where_parameters_are_frozen_already() -> None:
    net = model()
    first = GradES(Signum(net.named_parameters(), beta=0.5), tau=0.3, grace_steps=0, every=1)
    grads(net, SIZES)
    first.optimizer.step()
    saved = first.state_dict()
    first.remove()
    again = GradES(first.optimizer, tau=0.3)
    again.load_state_dict(saved)
    assert again.frozen == ["0.weight"] and not again.done
    again.load_state_dict({"steps": 3, "frozen": ["0.weight", "1.weight", "1.weight"]})
    assert again.frozen == ["0.weight", "1.weight"] and again.done
    assert GradES(Signum(net.parameters()), tau=0.3).done  # a model that has been frozen
    for wrong, error, message in (
        ({}, ValueError, "no state of GradES"),
        ({"steps": 1, "frozen": "0.weight"}, TypeError, "frozen='0.weight': must be a list of names"),
        ({"steps": 3, "frozen": [["0.weight"]]}, TypeError, "must be a list of names"),
        (3, ValueError, "no state of GradES"),
    ):
        with pytest.raises(error, match=message):
            again.load_state_dict(wrong)  # type: ignore[arg-type]
    assert again.state_dict() == {"steps": 3, "frozen": ["0.weight", "1.weight"]}


def test_who_frees_a_parameter_trains_it() -> None:
    net = model()
    optimizer = Signum(net.named_parameters(), lr=0.5, beta=0.5)
    stopping = GradES(optimizer, tau=0.3, grace_steps=0, every=2)
    for _ in range(2):
        grads(net, SIZES)
        optimizer.step()
    assert stopping.frozen == ["0.weight"]
    net.requires_grad_(True)
    before = net[0].weight.detach().clone()
    grads(net, SIZES)
    optimizer.step()
    assert stopping.frozen == [] and not torch.equal(net[0].weight, before)
    grads(net, SIZES)
    optimizer.step()
    assert stopping.frozen == ["0.weight"]
    # A tensor that takes the place of a frozen one is another.
    optimizer.param_groups[0]["params"][0] = new = nn.Parameter(torch.zeros(3, 4))
    new.grad = torch.ones(3, 4)
    optimizer.step()
    assert torch.equal(new.detach(), torch.full((3, 4), -0.5))


@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_skipped_step_is_not_looked_at(when: int) -> None:
    """The first, a later one, and the first after a state was loaded."""
    net = model()
    optimizer = Signum(net.named_parameters(), max_grad_norm=1.0)
    stopping = GradES(optimizer, tau=1e30, grace_steps=when, every=1)
    for _ in range(when):
        grads(net, SIZES)
        optimizer.step()
    if when == 2:
        optimizer.load_state_dict(optimizer.state_dict())
    grads(net, {**SIZES, "1.bias": math.nan})
    optimizer.step()
    assert stopping.frozen == [] and int(optimizer.skipped_steps) == 1
    grads(net, SIZES)
    optimizer.step()
    assert stopping.frozen == ["0.weight", "1.weight"]


def test_numpy_counts_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    assert GradES(Signum(model().parameters()), tau=numpy.float32(0.5), every=numpy.int64(3)).every == 3


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (SignSGD, {}),
        (ScheduleFreeSign, {}),
        (SignAdamPP, {}),
        (SignAdamPP, {"confidence": "adaptive"}),
        (SignAdamPP, {"confidence": "sparsity", "target": 0.5}),
    ],
)
def test_what_has_a_threshold(cls: Any, options: dict[str, Any]) -> None:
    optimizer = cls(model().parameters(), lr=torch.tensor(0.1), **options)
    assert GradES(optimizer, tau=0.1, statistic="passed").statistic == "passed"


def test_what_cannot_be_looked_at_is_said_before_the_step() -> None:
    """Where a name is there twice, a group has another rule, or nobody observes; and only by steps that look."""
    for change, message in (
        (lambda it: it.add_param_group({"params": [("0.weight", nn.Parameter(torch.ones(2, 2)))]}), "two parameters"),
        (lambda it: it.observe(False), r"call optimizer\.observe"),
    ):
        net = model()
        optimizer = Signum(net.named_parameters(), lr=0.1)
        stopping = GradES(optimizer, tau=1e30, grace_steps=0, every=2)
        change(optimizer)
        grads(net, SIZES)
        optimizer.step()
        before = [param.detach().clone() for param in net.parameters()]
        with pytest.raises((ValueError, RuntimeError), match=message):
            optimizer.step()
        assert all(map(torch.equal, before, net.parameters()))
        assert stopping.steps == 1 and stopping.frozen == []


def test_matrices_without_elements_are_not_waited_for() -> None:
    params = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(0, 4))]
    optimizer = Signum(params)
    stopping = GradES(optimizer, tau=1e30, grace_steps=0, every=1)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert stopping.frozen == ["parameter 0 of group 0"] and stopping.done
    with pytest.raises(ValueError, match="nothing to watch"):
        GradES(Signum(params[1:]), tau=0.1)


def test_compiled_steps() -> None:
    """Hooks run beside the graph, whose constants are none of what they look at, and fullgraph=True is refused."""
    torch._dynamo.reset()
    nets = [model(), model()]
    optimizers = [Signum(net.named_parameters(), lr=0.5, beta=0.5) for net in nets]
    stopping = [GradES(optimizer, tau=0.3, grace_steps=2, every=2) for optimizer in optimizers]
    take = [torch.compile(lambda: optimizers[0].step(), backend="eager"), optimizers[1].step]
    whole = torch.compile(lambda: optimizers[0].step(), fullgraph=True, backend="eager")
    before = [param.detach().clone() for param in nets[0].parameters()]
    grads(nets[0], SIZES)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"GradES\._before"):
        whole()
    assert all(map(torch.equal, before, nets[0].parameters())) and stopping[0].steps == 0
    for _ in range(5):
        for net, step in zip(nets, take, strict=True):
            grads(net, SIZES)
            step()
        assert stopping[0].state_dict() == stopping[1].state_dict()
    assert stopping[0].frozen == ["0.weight"]
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_removed_it_freezes_no_more() -> None:
    net = model()
    optimizer = Signum(net.named_parameters())
    stopping = GradES(optimizer, tau=1e30, grace_steps=0, every=1)
    stopping.remove()
    grads(net, SIZES)
    optimizer.step()
    assert stopping.steps == 0 and not stopping.frozen


@pytest.mark.parametrize(
    ("cls", "options", "error", "message"),
    [
        (SignSGD, {}, ValueError, "the state of 'sign_sgd' does not begin with a momentum"),
        (ScheduleFreeSign, {}, ValueError, "does not begin with a momentum"),
        (FOCUS, {}, ValueError, "does not begin with a momentum"),
        (Signum, {"statistic": "passed"}, ValueError, "has no threshold"),
        (AdEMAMix, {"statistic": "passed"}, ValueError, "has no threshold"),  # whose alpha is another number
        (MARSAdamW, {"statistic": "passed"}, ValueError, "has no threshold"),
        (Signum, {"statistic": "norm"}, ValueError, "statistic='norm'"),
        (Signum, {"tau": -1.0}, ValueError, "tau"),
        (Signum, {"tau": math.nan}, ValueError, "tau"),
        (Signum, {"every": 0}, ValueError, "every=0"),
        (Signum, {"grace_steps": 1.5}, ValueError, "grace_steps=1.5"),
        (Signum, {"watches": lambda name, param: False}, ValueError, "nothing to watch"),
        (Signum, {"watches": 3}, TypeError, "watches=3"),
        (torch.optim.SGD, {}, TypeError, "optimizer is a torch.optim.sgd.SGD"),
    ],
)
def test_refused(cls: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    optimizer = cls(model().parameters(), lr=0.1)
    with pytest.raises(error, match=message):
        GradES(optimizer, **{"tau": 0.1, **options})
    if cls is not torch.optim.SGD:
        assert not optimizer.runtime.observes


def test_weights_are_no_momentum() -> None:
    """What rules keep that average weights says nothing about momentum."""
    net = model()
    optimizer = FOCUS(net.parameters())
    optimizer.observe()
    grads(net, SIZES)
    optimizer.step()
    told = optimizer.statistics().all
    assert math.isnan(told.mean_momentum) and math.isnan(told.flipped) and told.passed == 18 / 23


def test_parts_of_flat_parameters_are_refused() -> None:
    param: Any = torch.nn.Parameter(torch.ones(3))
    param._fsdp_flattened = True  # as FSDP's first version marks them
    optimizer = Signum([("weight", param)], lr=0.1)
    with pytest.raises(TypeError, match="'weight' is part of a flat parameter"):
        GradES(optimizer, tau=0.1, watches=lambda name, param: True)
    assert not optimizer.runtime.observes
