"""The manners of a torch.optim.Optimizer: groups, schedulers, hooks, and everything that may happen to parameters,
gradients and state between two steps. Expectations are other runs of the same rule, equal bit for bit."""

from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from collections import defaultdict
from typing import Any

import pytest
import torch
from support.optimizer_contract import (
    ROWS,
    assert_same,
    copies,
    each_row,
    gradient,
    hyperparameters,
    make,
    parameters,
    params_of,
    train,
    variations,
    with_variances,
)
from support.strategies import MIXED_GRADIENTS, same_bits
from torch import nn
from torch.nn import Parameter
from torch.optim import lr_scheduler

import signadam_ext.engine.plan
from signadam_ext import Anolog, SignAdamPP
from signadam_ext.engine.gradients import CompiledReader, PythonReader, make_reader
from signadam_ext.engine.overlap import overlap_levels
from signadam_ext.optimizers import stepping


@pytest.fixture(params=["cpu", "reference", "cpu, read in Python"])
def backend(request, monkeypatch):
    """A backend's name. The cpu backend comes with both readers of gradients, whichever this torch calls for."""
    name, _, python = request.param.partition(",")
    if python:
        monkeypatch.setattr(signadam_ext.engine.plan, "make_reader", PythonReader)
    return name


@pytest.fixture
def plans(monkeypatch):
    """A list that grows with each plan made."""
    made = []
    original = stepping.make_plan
    monkeypatch.setattr(stepping, "make_plan", lambda *given: made.append(given) or original(*given))
    return made


def test_reader():
    assert isinstance(make_reader(), CompiledReader)


# --- groups and hyperparameters


@each_row
def test_groups_equal_optimizers_of_their_own(row, backend):
    overrides = [{}, *variations(row)]
    params = parameters(*[(3, 5)] * len(overrides))
    apart = copies(params)
    together = make(row, [{"params": [p], **override} for p, override in zip(params, overrides, strict=True)], backend)
    single = [make(row, [q], backend, **override) for q, override in zip(apart, overrides, strict=True)]
    for step in range(4):
        for i, (p, q) in enumerate(zip(params, apart, strict=True)):
            p.grad, q.grad = gradient(p, step, i), gradient(q, step, i)
            single[i].step()
        together.step()
    for i, optimizer in enumerate(single):
        assert same_bits(params[i], apart[i]), overrides[i]
        assert together.state[params[i]].keys() == optimizer.state[apart[i]].keys()


@each_row
def test_hyperparameters_may_change_in_mid_training(row, backend):
    """The next step takes them, as if an optimizer with the new ones had always been there."""
    changes = [(change, change) for change in [*variations(row), {"backend": "reference"}]]
    if "beta" in hyperparameters(row):
        changes.append(({"betas": (0.4,)}, {"beta": 0.4}))
    for in_group, in_constructor in changes:
        optimizer = make(row, parameters(), backend)
        train(optimizer, range(2))
        unchanged, expected = (
            make(row, copies(params_of(optimizer)), **{"backend": backend, **h}) for h in ({}, in_constructor)
        )
        for other in (unchanged, expected):
            for p, q in zip(params_of(optimizer), params_of(other), strict=True):
                other.state[q] = copy.deepcopy(optimizer.state[p])
            train(other, range(2, 6))
        optimizer.param_groups[0].update(in_group)
        train(optimizer, range(2, 6))
        assert_same(optimizer, expected)
        # The change was one that can be seen.
        assert "backend" in in_group or not all(map(same_bits, params_of(optimizer), params_of(unchanged))), in_group


def test_named_parameters(backend):
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    named = make(ROWS["sign_adam_pp"], model.named_parameters(), backend)
    plain = make(ROWS["sign_adam_pp"], other.parameters(), backend)
    for optimizer in (named, plain):
        train(optimizer, range(3))
    assert_same(named, plain)
    assert named.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


@each_row
def test_add_param_group_in_mid_training(row, backend):
    first, second = parameters((4,), (2, 3)), parameters((5,), seed=1)
    optimizer = make(row, first, backend)
    apart = make(row, copies(first), backend), make(row, copies(second), backend, lr=0.5)
    train(optimizer, range(2))
    optimizer.add_param_group({"params": second, "lr": 0.5})
    train(apart[0], range(2))
    for step in range(2, 5):
        for p, q in zip(params_of(optimizer), params_of(apart[0]) + params_of(apart[1]), strict=True):
            p.grad, q.grad = gradient(p, step), gradient(q, step)
        optimizer.step()
        for each in apart:
            each.step()
    assert all(map(same_bits, params_of(optimizer), params_of(apart[0]) + params_of(apart[1])))


@each_row
def test_tensor_lr(row, backend):
    lr = torch.tensor(0.1)
    params = parameters()
    optimizer, expected = make(row, params, backend, lr=lr), make(row, copies(params), backend, lr=lr.item())
    for step in range(3):
        train(optimizer, [step])
        train(expected, [step])
        lr *= 0.7  # in place: nobody tells the optimizer
        expected.param_groups[0]["lr"] = lr.item()
    assert_same(optimizer, expected)


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=7),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@each_row
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(row, name):
    """As torch's own: AdamW under the same scheduler says which lr and momentum a step must take."""
    params = parameters()
    optimizer, expected = make(row, params), make(row, copies(params))
    (group,) = expected.param_groups
    guide = torch.optim.AdamW([Parameter(torch.zeros(1))], lr=group["lr"])
    schedulers = [SCHEDULERS[name](optimizer), SCHEDULERS[name](guide)]
    momenta = set()
    for step in range(6):
        group["lr"], beta = guide.param_groups[0]["lr"], guide.param_groups[0]["betas"][0]
        if name in ("OneCycleLR", "CyclicLR") and group["betas"]:
            group["betas"] = (beta, *group["betas"][1:])
        momenta.add(beta)
        train(optimizer, [step])
        train(expected, [step])
        guide.step()
        for scheduler in schedulers:
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert_same(optimizer, expected)
    assert (len(momenta) > 1) == (name in ("OneCycleLR", "CyclicLR"))


def test_scheduler_with_tensor_lr(backend):
    params = parameters()
    optimizer, expected = (make(ROWS["signum"], p, backend, lr=torch.tensor(0.5)) for p in (params, copies(params)))
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(4):
        expected.param_groups[0]["lr"] = 0.5 * 0.5**step
        train(optimizer, [step])
        train(expected, [step])
        scheduler.step()
    assert_same(optimizer, expected)


# --- step itself


def test_closure_and_hooks(backend):
    (param,) = parameters((3,))
    optimizer = make(ROWS["sign_adam_pp"], [param], backend)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(("before", param.detach().clone())))
    optimizer.register_step_post_hook(lambda *_: calls.append(("after", param.detach().clone())))

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        calls.append(("closure", param.detach().clone()))
        return loss

    loss = optimizer.step(closure)
    assert [name for name, _ in calls] == ["before", "closure", "after"]
    assert torch.equal(loss, (calls[1][1] ** 2).sum())
    assert torch.equal(calls[0][1], calls[1][1])
    assert not torch.equal(calls[1][1], calls[2][1])
    assert optimizer.step() is None


@each_row
def test_zero_grad(row, backend):
    params = parameters()
    optimizer, expected = make(row, params, backend), make(row, copies(params), backend)
    train(optimizer, [0])
    train(expected, [0])
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    optimizer.step()  # no gradient, no step
    assert_same(optimizer, expected)
    train(optimizer, [1])
    optimizer.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in params)
    optimizer.step()  # gradients of zero are gradients
    assert all(optimizer.state[p]["step"] == 3 for p in params)


def test_version_counters(backend):
    """Autograd notices a weight changed between forward and backward; one without gradient was not changed."""
    with_grad, without = parameters((3,), (3,))
    optimizer = make(ROWS["sign_adam"], [with_grad, without], backend)
    for _ in range(2):  # the second step comes from a cached plan
        with_grad.grad = torch.ones(3)
        versions = with_grad._version, without._version
        loss = (with_grad**2).sum()
        optimizer.step()
        assert with_grad._version > versions[0]
        assert without._version == versions[1]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    without.grad = torch.ones(3)
    optimizer.step()  # now both
    with_grad.grad = None
    versions = with_grad._version, without._version
    optimizer.step()
    assert with_grad._version == versions[0]
    assert without._version > versions[1]


def test_plans_are_cached(plans, backend):
    params = parameters()
    optimizer = make(ROWS["sign_adam"], params, backend)
    train(optimizer, range(10))  # new gradient tensors each time
    assert len(plans) == 1
    for step in range(10):
        params[step % 3].grad = None if step % 2 else gradient(params[step % 3], step)
        optimizer.param_groups[0]["lr"] /= 2
        optimizer.step()
    assert len(plans) == 1


def test_gradients_that_come_and_go_need_two_plans(plans, backend):
    params = parameters()
    optimizer = make(ROWS["sign_adam"], params, backend)
    for step in range(10):
        for i, param in enumerate(params):
            param.grad = gradient(param, step) if i == step % 2 else None
        optimizer.step()
    assert len(plans) == 2


def test_clip_grad_norm(backend):
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    optimizers = [make(ROWS["signum"], m.parameters(), backend) for m in (model, other)]
    x = gradient(torch.empty(4, 3), 1)
    for m, optimizer in zip((model, other), optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            m(x).square().sum().backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in m.parameters()])
            if m is model:
                torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1)
            else:
                for p in m.parameters():
                    p.grad = p.grad * torch.clamp(0.1 / (norm + 1e-6), max=1.0)
            optimizer.step()
    assert_same(*optimizers)


def test_grad_scaler(backend):
    """The ordinary flow: unscale, step, and no step where a gradient is not finite."""
    params = parameters()
    optimizer, expected = (make(ROWS["signum"], p, backend) for p in (params, copies(params)))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, finite in enumerate((True, False, True)):
        optimizer.zero_grad()
        loss = sum((p * gradient(p, step, i)).sum() for i, p in enumerate(params))
        scaler.scale(loss if finite else loss * torch.inf).backward()
        scaler.step(optimizer)
        scaler.update()
        if finite:
            train(expected, [step])
    assert_same(optimizer, expected)
    assert scaler.get_scale() == 512.0


# --- gradients


@each_row
def test_parameters_without_gradient_are_left_alone(row, backend):
    """Each parameter moves as if alone: steps without its gradient do not exist for it."""
    params = parameters((3,), (2, 4), (5,))
    apart = copies(params)
    together = make(row, params, backend)
    single = [make(row, [q], backend) for q in apart]
    presence = ("100", "110", "000", "101", "011", "111", "001")
    for step, present in enumerate(presence):
        for i, (p, q) in enumerate(zip(params, apart, strict=True)):
            p.grad = q.grad = None
            if present[i] == "1":
                p.grad, q.grad = gradient(p, step), gradient(q, step)
            single[i].step()
        together.step()
    for i, optimizer in enumerate(single):
        assert same_bits(params[i], apart[i])
        assert together.state[params[i]]["step"] == optimizer.state[apart[i]]["step"]


def test_never_a_gradient_no_state(backend):
    params = parameters()
    optimizer = make(ROWS["sign_adam"], params, backend)
    params[0].grad = gradient(params[0], 0)
    optimizer.step()
    assert list(optimizer.state) == params[:1]


def test_freezing_and_unfreezing(backend):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    optimizer = make(ROWS["sign_adam"], model.parameters(), backend)
    x = gradient(torch.empty(5, 3), 0)
    frozen_at = {}
    for step in range(6):
        frozen = step in (2, 3)
        model[0].requires_grad_(not frozen)
        before = copies(model[0].parameters())
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        frozen_at[step] = all(map(same_bits, before, model[0].parameters()))
    assert [step for step, stood_still in frozen_at.items() if stood_still] == [2, 3]
    assert optimizer.state[model[0].weight]["step"] == 4
    assert optimizer.state[model[1].weight]["step"] == 6


GRADIENT_LAYOUTS = {
    "transposed": lambda g: g.t().contiguous().t(),
    "every second": lambda g: torch.stack([g, -g], -1).flatten(-2)[..., ::2],
    "expanded": lambda g: g[:1, :1].clone().expand(g.shape),
    "at an odd offset": lambda g: torch.cat([torch.zeros(1), g.flatten()])[1:].view(g.shape),
    "lazily negated": lambda g: torch._neg_view(-g.t().contiguous()).t(),
    "plain": lambda g: g,
}


@each_row
def test_gradients_of_other_strides(row, backend):
    (param,) = parameters((4, 6))
    optimizer, expected = make(row, [param], backend), make(row, copies([param]), backend)
    for step, lay_out in enumerate([*GRADIENT_LAYOUTS.values()] * 2):
        param.grad = lay_out(gradient(param, step))
        params_of(expected)[0].grad = param.grad.clone(memory_format=torch.contiguous_format)
        optimizer.step()
        expected.step()
    assert_same(optimizer, expected)


@each_row
def test_lazily_negated_gradient_of_one_element(row, backend):
    """Autograd leaves such a view as the gradient of a scalar that went through complex numbers."""
    params = parameters((), (1,))
    optimizer, expected = make(row, params, backend), make(row, copies(params), backend)
    for _ in range(3):
        optimizer.zero_grad()
        for p, q in zip(params, params_of(expected), strict=True):
            z = torch.complex(torch.zeros(p.shape), p)
            (z.conj() * (1 + 2j)).real.sum().backward()
            assert p.grad.is_neg()
            q.grad = p.grad.resolve_neg()
        optimizer.step()
        expected.step()
    assert_same(optimizer, expected)


@pytest.mark.skipif(not MIXED_GRADIENTS, reason="this torch gives gradients the dtype of their parameter")
@each_row
def test_gradients_of_another_dtype(row, backend):
    (param,) = parameters((4, 6))
    optimizer, expected = make(row, [param], backend), make(row, copies([param]), backend)
    param.grad_dtype = None  # any
    for step, dtype in enumerate((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32, torch.bfloat16)):
        param.grad = gradient(param, step).to(dtype)
        params_of(expected)[0].grad = param.grad.float()
        optimizer.step()
        expected.step()
    assert_same(optimizer, expected)


@pytest.mark.skipif(not MIXED_GRADIENTS, reason="this torch gives gradients the dtype of their parameter")
def test_backward_in_another_dtype(backend):
    (param,) = parameters((4,), dtype=torch.bfloat16)
    param.grad_dtype = torch.float32
    optimizer = make(ROWS["signum"], [param], backend)
    (param * gradient(param, 0)).sum().backward()
    assert param.grad.dtype == torch.float32
    expected = make(ROWS["signum"], copies([param]), backend)
    params_of(expected)[0].grad = param.grad.bfloat16()
    optimizer.step()
    expected.step()
    assert_same(optimizer, expected)


# --- parameters


def test_tied_weights_are_updated_once(backend):
    tied, other = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    model = nn.Sequential(tied, other)
    other.weight = tied.weight
    optimizer = make(ROWS["sign_adam_pp"], model.parameters(), backend)
    assert params_of(optimizer) == [tied.weight]
    model(gradient(torch.empty(5, 3), 0)).square().sum().backward()
    expected = make(ROWS["sign_adam_pp"], copies([tied.weight]), backend)
    params_of(expected)[0].grad = tied.weight.grad.clone()
    optimizer.step()
    expected.step()
    assert_same(optimizer, expected)


def test_a_parameter_listed_twice_is_updated_once(backend):
    a, b = parameters((3,), (4,))
    expected = make(ROWS["signum"], copies([a, b]), backend)
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = make(ROWS["signum"], [("a", a), ("b", b), ("again", a)], backend)
    assert optimizer.param_groups[0]["param_names"] == ["a", "b"]
    for each in (optimizer, expected):
        train(each, range(3))
    assert_same(optimizer, expected)


@each_row
def test_parameters_that_share_memory_are_updated_in_turn(row, backend):
    def views(base):
        own = (base, base[4:9], base[::2], base.view(4, 3).t(), base[9:], base[1::2])
        return with_variances(Parameter(view) for view in own)

    base = parameters((12,))[0].detach()
    other = base.clone()
    optimizer = make(row, views(base), backend)
    single = [make(row, [q], backend) for q in views(other)]
    for step in range(3):
        for i, p in enumerate(params_of(optimizer)):
            p.grad = gradient(p, step, i)
        optimizer.step()
        for i, each in enumerate(single):
            (q,) = params_of(each)
            q.grad = gradient(q, step, i)
            each.step()
    assert same_bits(base, other)


def test_launches_of_parameters_that_share_memory():
    base = torch.zeros(12)
    apart = [base[:4], base[4:9], base[9:], torch.zeros(3), None, base[:0]]
    assert overlap_levels(apart) == [0] * 6
    for views, waves in (
        ([base[:5], base[4:9], base[8:]], [0, 1, 2]),
        ([base[8:], base[:5], base[4:9]], [0, 0, 1]),
        ([base[4:], base[:4], base, base[:1], base[11:]], [0, 0, 1, 2, 2]),
        ([base[::2], base[9:], base[11:], base[:1]], [0, 1, 2, 1]),
        ([base.view(3, 4).t(), None, base[11:]], [0, 0, 1]),
    ):
        assert overlap_levels(views) == waves


def layouts(x):
    """Parameters that hold ``x`` in other memory orders, and what of their storage is not theirs."""
    flat = torch.full((1 + 2 * x.numel(),), torch.nan)
    every_second = flat[1::2].view(x.shape)
    yield every_second.copy_(x), flat[::2]
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), torch.nan)
    yield wide[..., 3::2].copy_(x), torch.cat([wide[..., :3], wide[..., 4::2]], -1)
    for offset in (1, 3):
        flat = torch.full((x.numel() + 2 * offset,), torch.nan)
        yield flat[offset:-offset].view(x.shape).copy_(x), flat[:offset]
    yield x.transpose(0, -1).contiguous().transpose(0, -1), torch.empty(0)
    yield x.clone(memory_format=torch.channels_last), torch.empty(0)


@each_row
def test_memory_order_does_not_matter(row, backend):
    x = parameters((2, 3, 4, 5))[0].detach()
    for param, between in layouts(x):
        optimizer, expected = make(row, [Parameter(param)], backend), make(row, [Parameter(x.clone())], backend)
        around = between.clone()
        for each in (optimizer, expected):
            train(each, range(3))
        assert_same(optimizer, expected)
        assert same_bits(between, around), "memory between the elements was written"
        for name, value in optimizer.state[params_of(optimizer)[0]].items():
            if name in ("exp_avg", "exp_avg_sq"):
                assert value.stride() == torch.empty_like(param).stride()


@each_row
def test_views_of_one_flat_buffer(row, backend):
    shapes = [(3,), (5, 2), (), (0, 4), (7,), (1,)]
    apart = parameters(*shapes)
    flat = torch.cat([p.detach().flatten() for p in apart])
    views = [Parameter(v.view(p.shape)) for v, p in zip(flat.split([p.numel() for p in apart]), apart, strict=True)]
    optimizer, expected = make(row, views, backend), make(row, apart, backend)
    for each in (optimizer, expected):
        train(each, range(3))
    assert_same(optimizer, expected)
    assert same_bits(flat, torch.cat([p.detach().flatten() for p in apart]))


@each_row
def test_empty_parameters_count_steps(row, backend):
    params = parameters((0,), (3, 0, 2), (4,))
    optimizer = make(row, params, backend)
    train(optimizer, range(3))
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 3, 3]
    assert all(torch.isfinite(v).all() for p in params for v in optimizer.state[p].values())


def test_frozen_parameters_of_any_kind_are_ignored(backend):
    codes = Parameter(torch.arange(4, dtype=torch.uint8), requires_grad=False)
    double = Parameter(torch.zeros(2, dtype=torch.float64), requires_grad=False)
    repeated = Parameter(torch.zeros(1).expand(3), requires_grad=False)
    params = parameters()
    optimizer = make(ROWS["sign_adam"], [codes, *params, double, repeated], backend)
    expected = make(ROWS["sign_adam"], copies(params), backend)
    for step in range(3):
        for i, (p, q) in enumerate(zip(params, params_of(expected), strict=True)):
            p.grad, q.grad = gradient(p, step, i), gradient(q, step, i)
        optimizer.step()
        expected.step()
    assert all(map(same_bits, params, params_of(expected)))
    assert torch.equal(codes, torch.arange(4, dtype=torch.uint8))


def test_a_trained_parameter_may_be_quantized(backend):
    params = parameters()
    optimizer, expected = make(ROWS["sign_adam"], params, backend), make(ROWS["sign_adam"], copies(params), backend)
    for each in (optimizer, expected):
        train(each, range(2))
        each.zero_grad()
    params[0].requires_grad_(False)
    params[0].data = params[0].data.to(torch.int8)
    for step in range(2, 4):
        for p, q in zip(params[1:], params_of(expected)[1:], strict=True):
            p.grad, q.grad = gradient(p, step), gradient(q, step)
        optimizer.step()
        expected.step()
    assert all(map(same_bits, params[1:], params_of(expected)[1:]))
    assert params[0].dtype == torch.int8


@each_row
@pytest.mark.parametrize("shared", [False, True])
def test_replaced_parameters_start_anew(row, backend, shared):
    """Even one that takes over the memory of its predecessor."""
    params = parameters((3,), (4,))
    optimizer, old = make(row, params, backend), make(row, copies(params), backend)
    train(optimizer, range(2))
    train(old, range(2))
    (new,) = with_variances([Parameter(params[1].data)]) if shared else parameters((2, 2), seed=9)
    fresh = make(row, copies([new]), backend)
    optimizer.param_groups[0]["params"][1] = new
    for step in range(2, 5):
        for index, (p, q) in enumerate(((params[0], params_of(old)[0]), (new, params_of(fresh)[0]))):
            p.grad, q.grad = gradient(p, step, index), gradient(q, step, index)
        params_of(old)[1].grad = None
        for each in (optimizer, old, fresh):
            each.step()
    assert same_bits(params[0], params_of(old)[0])
    assert same_bits(new, params_of(fresh)[0])


@each_row
def test_parameters_whose_data_moves(row, backend):
    params = parameters()
    optimizer, expected = make(row, params, backend), make(row, copies(params), backend)
    for step in range(4):
        for param in params:
            param.data = param.data.clone()
        train(optimizer, [step])
        train(expected, [step])
    assert_same(optimizer, expected)


@each_row
def test_parameters_that_change_dtype_keep_their_moments(row, backend):
    params = parameters()
    optimizer = make(row, params, backend)
    train(optimizer, range(2))
    halves = [Parameter(p.detach().bfloat16()) for p in params]
    expected = make(row, halves, backend)
    for p, q in zip(params, halves, strict=True):
        expected.state[q] = copy.deepcopy(optimizer.state[p])
        p.grad = None
        p.data = p.data.bfloat16()
    for each in (optimizer, expected):
        train(each, range(2, 5))
    assert params[0].dtype == torch.bfloat16
    assert_same(optimizer, expected)


def test_parameters_that_change_layout(backend):
    (param,) = parameters((2, 3, 4, 5))
    optimizer, expected = (make(ROWS["sign_adam"], p, backend) for p in ([param], copies([param])))
    for step, memory_format in enumerate((torch.contiguous_format, torch.channels_last, torch.contiguous_format)):
        param.data = param.data.contiguous(memory_format=memory_format)
        train(optimizer, [step])
        train(expected, [step])
    assert_same(optimizer, expected)


# --- state


@each_row
def test_state_moved_by_hand(row, backend):
    """The well-known way of taking an optimizer to another device."""
    params = parameters()
    optimizer, expected = make(row, params, backend), make(row, copies(params), backend)
    for step in range(4):
        train(optimizer, [step])
        train(expected, [step])
        for state in optimizer.state.values():
            for value in state.values():
                value.data = value.data.clone()
    assert_same(optimizer, expected)


@each_row
@pytest.mark.parametrize("how", ["cleared", "new dict", "tensors replaced", "zeroed in place"])
def test_state_may_be_reset(row, backend, how):
    params = parameters()
    optimizer = make(row, params, backend)
    train(optimizer, range(2))
    fresh = make(row, copies(params), backend)
    if how == "cleared":
        optimizer.state.clear()
    elif how == "new dict":
        optimizer.state = defaultdict(dict)
    else:
        for state in optimizer.state.values():
            for name, value in state.items():
                state[name] = torch.zeros_like(value) if how == "tensors replaced" else value.zero_()
    train(optimizer, range(2, 5))
    train(fresh, range(2, 5))
    assert_same(optimizer, fresh)


@each_row
def test_a_users_own_entries_in_the_state(row, backend):
    params = parameters()
    optimizer, expected = make(row, params, backend), make(row, copies(params), backend)
    notes = {
        "note": "mine",
        "history": torch.arange(7),
        "mask": torch.eye(2).to_sparse(),
        "complex": torch.ones(2, dtype=torch.complex64).conj(),
    }
    for step in range(4):
        train(optimizer, [step])
        train(expected, [step])
        optimizer.state[params[0]].update(notes, step_of_note=step)
        optimizer.state["of no parameter"] = {"step": step}
    for name, value in notes.items():
        assert optimizer.state[params[0]].pop(name) is value
    assert optimizer.state[params[0]].pop("step_of_note") == 3
    assert_same(optimizer, expected)


def test_step_counts_of_any_kind(backend):
    """Written by hand or by an older checkpoint, as a number or in another dtype."""
    row = ROWS["sign_adam_analytic"]
    for kind in (int, float, lambda n: torch.tensor(int(n)), lambda n: torch.tensor([float(n)], dtype=torch.float64)):
        params = parameters()
        optimizer, expected = make(row, params, backend), make(row, copies(params), backend)
        train(optimizer, range(2))
        train(expected, range(4))
        for state in optimizer.state.values():
            state["step"] = kind(state["step"])
        train(optimizer, range(2, 4))
        assert_same(optimizer, expected)
        assert all(state["step"].dtype == torch.float64 for state in optimizer.state.values())


def test_parameter_moves_to_the_next_group() -> None:
    """The order of all parameters stays the same; only the border between the groups has moved."""
    a, b, c = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    optimizer = signadam_ext.SignSGD([{"params": [a, b], "lr": 1.0}, {"params": [c], "lr": 64.0}])
    for param in (a, b, c):
        param.grad = torch.ones(2)
    optimizer.step()
    optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())
    optimizer.step()
    assert (a.tolist(), b.tolist(), c.tolist()) == ([-2.0] * 2, [-65.0] * 2, [-128.0] * 2)


def test_param_groups_replaced() -> None:
    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.ones(2)
    optimizer = signadam_ext.SignSGD([param], lr=1.0)
    optimizer.step()
    optimizer.param_groups = [{**group, "lr": 8.0} for group in optimizer.param_groups]
    optimizer.step()
    assert param.tolist() == [-9.0, -9.0]


def test_gradient_made_when_asked() -> None:
    """A subclass may compute its gradient anew each time: what was read must outlive the step."""

    class Computed(torch.nn.Parameter):
        grad = property(lambda self: torch.full((5000,), self.value), lambda self, value: None)

    params = [Computed(torch.zeros(5000)) for _ in range(4)]
    for i, param in enumerate(params):
        param.value = 1.0 if i % 2 else -1.0
    optimizer = signadam_ext.SignSGD(params, lr=1.0)
    for _ in range(5):
        optimizer.step()
    assert [param.unique().tolist() for param in params] == [[5.0], [-5.0], [5.0], [-5.0]]


@pytest.mark.parametrize("what", ["parameter", "gradient", "moment"])
def test_freed_storage_is_refused(what: str) -> None:
    param = torch.nn.Parameter(torch.ones(1000))
    param.grad = torch.ones(1000)
    optimizer = signadam_ext.SignAdamPP([param])
    optimizer.step()
    tensor = {"parameter": param.data, "gradient": param.grad, "moment": optimizer.state[param]["exp_avg"]}[what]
    tensor.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="needs a storage of 4000 bytes, and has 0"):
        optimizer.step()


@pytest.mark.parametrize("reader", [make_reader, PythonReader], ids=["compiled", "python"])
def test_gradients_are_let_go_after_the_step(reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signadam_ext.engine.plan, "make_reader", reader)
    param = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = signadam_ext.SignAdamPP([param])
    for transposed in (False, True):
        param.grad = torch.ones(4, 3).t() if transposed else torch.ones(3, 4)
        alive = weakref.ref(param.grad)
        optimizer.step()
        optimizer.zero_grad()
        assert alive() is None


def test_made_before_its_parameters_have_memory(backend) -> None:
    """With lazy modules and on the meta device an optimizer may be made first, as in torch.optim."""
    model = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.Linear(4, 2, device="meta"))
    optimizer = signadam_ext.SignAdamPP(model.parameters(), lr=1.0, beta=0.0, state_dtype="int8", backend=backend)
    optimizer.step()
    assert not optimizer.state
    model[0](torch.ones(1, 3))
    model[1].to_empty(device="cpu")
    for param in model.parameters():
        param.data.zero_()
        param.grad = torch.ones_like(param)
    # to_empty made new parameters: those of the optimizer are still on the meta device, and have no gradient.
    optimizer.step()
    assert all((param == -1).all() for param in model[0].parameters())
    lazy = torch.nn.LazyLinear(4).weight
    optimizer = signadam_ext.SignAdamPP([lazy], backend=backend)
    assert optimizer.state_dict()["state"] == {}


def test_a_subclass_may_have_defaults_of_its_own():
    class Mine(SignAdamPP):
        def __init__(self, params, weight_decay=0.125, **common):
            super().__init__(params, weight_decay=weight_decay, **common)

    assert Mine([nn.Parameter(torch.ones(2))]).param_groups[0]["weight_decay"] == 0.125
    assert list(inspect.signature(Mine).parameters)[:2] == ["params", "weight_decay"]


def test_schedulers_of_momentum_take_a_rule_without_betas():
    optimizer = Anolog([Parameter(torch.ones(3))], lr=0.1)
    for scheduler in (lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=7), SCHEDULERS["CyclicLR"](optimizer)):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
        optimizer.step()
        scheduler.step()


def test_misspelt_names_in_groups():
    params = [Parameter(torch.ones(3)) for _ in range(3)]
    with pytest.warns(UserWarning, match="a group has 'state_dtyp', which is no hyperparameter: did you mean 'state_d"):
        optimizer = SignAdamPP([{"params": params[:1], "state_dtyp": "int2"}])
    with pytest.warns(UserWarning, match="a group has 'weight_decai', .* did you mean 'weight_decay'"):
        optimizer.add_param_group({"params": params[1:2], "weight_decai": 0.1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        others = {"name": "head", "lr_mult": 2.0, "initial_lr": 0.1, "max_weight_decay": 0.1, 7: 3}
        optimizer.add_param_group({"params": params[2:], **others})


def test_one_storage_for_parameters_of_several_dtypes():
    """An fp32 parameter is its own master."""
    for param_storage in ("nearest", "stochastic", "split16", "split8", "master"):
        params = [Parameter(torch.ones(33, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
        twin = Parameter(torch.ones(33))
        for optimizer in (SignAdamPP(params, lr=1e-3, param_storage=param_storage), SignAdamPP([twin], lr=1e-3)):
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = torch.linspace(-1, 1, 33, dtype=param.dtype)
            optimizer.step()
        assert torch.equal(params[1], twin)


def test_the_dictionary_that_is_handed_in_is_the_group():
    param = nn.Parameter(torch.zeros(2))
    group = {"params": [param], "lr": 0.1}
    optimizer = SignAdamPP([group], beta=0.0)
    assert optimizer.param_groups[0] is group
    group["lr"] = 0.5
    param.grad = torch.ones(2)
    optimizer.step()
    assert param.tolist() == [-0.5, -0.5]


def test_parameters_appended_to_a_named_group():
    first, second = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = SignAdamPP([("first", first)])
    optimizer.param_groups[0]["params"].append(second)
    first.grad = second.grad = torch.ones(2)
    optimizer.step()
    assert same_bits(first.detach(), second.detach()) and len(optimizer.state_dict()["state"]) == 2
    second.grad = torch.ones(2).to_sparse()
    with pytest.raises(TypeError, match="the gradient of parameter 1 of group 0"):
        optimizer.step()
