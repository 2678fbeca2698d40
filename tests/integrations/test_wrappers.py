"""Optimizers over optimizers, and models of which few parameters are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny import OPTIONS, batch, copies, loss_of, network, same
from torch import nn

from signadam_ext import SignAdamPP, SignSGD


def train(model: nn.Module, optimizer: Any, begin: int, end: int) -> None:
    for number in range(begin, end):
        optimizer.zero_grad()
        loss_of(model, batch(number)).backward()
        optimizer.step()


def resumed(make: Callable[[nn.Module], Any]) -> None:
    """A wrapped optimizer goes on from its state dict as it would have gone on by itself."""
    model = network()
    optimizer = make(model)
    train(model, optimizer, 0, 3)
    twin = network()
    twin.load_state_dict(model.state_dict())
    other = make(twin)
    other.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 3, 6)
    train(twin, other, 3, 6)
    assert same(model.parameters(), twin.parameters())
    assert not same(model.parameters(), network().parameters())


def test_schedulefree_s_wrapper() -> None:
    schedulefree = pytest.importorskip("schedulefree")

    def make(model: nn.Module) -> Any:
        wrapper = schedulefree.ScheduleFreeWrapper(SignSGD(model.parameters(), lr=1e-2), momentum=0.9)
        wrapper.train()
        return wrapper

    model = network()
    optimizer = make(model)
    train(model, optimizer, 0, 4)
    trained = copies(model.parameters())
    optimizer.eval()
    averaged = copies(model.parameters())
    optimizer.train()
    assert not same(averaged, trained)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(model.parameters(), trained, strict=True))


@pytest.mark.parametrize("name", ["Lookahead", "OrthoGrad"])
def test_wrappers_of_pytorch_optimizer(name: str) -> None:
    wrapper = getattr(pytest.importorskip("pytorch_optimizer"), name)
    model = network()
    optimizer = wrapper(SignAdamPP(model.parameters(), **OPTIONS))
    before = copies(model.parameters())
    train(model, optimizer, 0, 6)
    assert not any(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    assert all(param.isfinite().all() for param in model.parameters())


def test_sharpness_aware_minimization() -> None:
    """Two gradients a step, and weights that are put back in between: the step that follows is of the second."""
    sam = pytest.importorskip("pytorch_optimizer").SAM
    model = network()
    optimizer = sam(params=model.parameters(), base_optimizer=SignAdamPP, **OPTIONS)
    twin = network()
    plain = SignAdamPP(twin.parameters(), **OPTIONS)
    for number in range(3):
        loss_of(model, batch(number)).backward()
        optimizer.first_step(zero_grad=True)
        loss_of(model, batch(number)).backward()
        for param, own in zip(twin.parameters(), model.parameters(), strict=True):
            assert own.grad is not None
            param.grad = own.grad.clone()
        optimizer.second_step(zero_grad=True)
        plain.step()
        assert same(model.parameters(), twin.parameters())


def test_adapters_of_peft() -> None:
    """Only the adapters have state."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["0", "2"], r=2)

    def make(model: nn.Module) -> Any:
        return SignAdamPP(model.parameters(), **OPTIONS)

    torch.manual_seed(0)
    model = peft.get_peft_model(network(), config)
    optimizer = make(model)
    frozen = {name: param.detach().clone() for name, param in model.named_parameters() if not param.requires_grad}
    train(model, optimizer, 0, 3)
    assert len(optimizer.state) == sum(param.requires_grad for param in model.parameters()) == 4
    assert all(torch.equal(param, frozen[name]) for name, param in model.named_parameters() if name in frozen)


def test_a_state_dict_of_lookahead_goes_on() -> None:
    lookahead = pytest.importorskip("pytorch_optimizer").Lookahead
    resumed(lambda model: lookahead(SignAdamPP(model.parameters(), **OPTIONS)))
