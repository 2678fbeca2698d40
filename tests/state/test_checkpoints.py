"""Saving and loading, copying and pickling: training continues bit for bit as if nothing had happened."""

from __future__ import annotations

import copy
import io
import pickle

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
    parameters,
    params_of,
    snapshot,
    train,
)
from support.strategies import same_bits
from torch import nn
from torch.nn import Parameter

from signadam_ext import AdamStar, SignAdamPP
from signadam_ext.core.rule import rule_of


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trained(row, backend="cpu", steps=3, **overrides):
    """An optimizer of two groups; the last parameter has never had a gradient."""
    params = parameters((5, 7), (3,), (), (2, 2))
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.2}]
    optimizer = make(row, groups, backend, **overrides)
    for step in range(steps):
        train(optimizer, [step])
    del optimizer.state[params[3]]
    return optimizer


def like(optimizer, row, backend="cpu", dtype=torch.float32):
    """An optimizer that has not taken a step, on copies of the same parameters, with other hyperparameters."""
    groups = [
        {"params": [Parameter(p.detach().to(dtype, copy=True)) for p in g["params"]]} for g in optimizer.param_groups
    ]
    return make(row, groups, backend, lr=0.77, weight_decay=0.5)


@each_row
@each_backend
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_continue(row, backend, how):
    """A model and its optimizer, copied together."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    optimizer = make(row, model.named_parameters(), backend)
    train(optimizer, range(3))
    twin_model, twin = how((model, optimizer))
    assert params_of(twin)[0] is twin_model[0].weight
    (group,), (twin_group,) = optimizer.param_groups, twin.param_groups
    assert all(twin_group[name] == value for name, value in group.items() if name != "params")
    before = snapshot(optimizer)
    train(twin, range(3, 6))
    assert_unchanged(optimizer, before)
    train(optimizer, range(3, 6))
    assert_same(optimizer, twin)


@each_row
@pytest.mark.parametrize("source, target", [("cpu", "cpu"), ("cpu", "reference"), ("reference", "cpu")])
def test_checkpoints_continue(row, source, target):
    """Through a file and into another backend, which stays the target's own."""
    optimizer = trained(row, source)
    other = like(optimizer, row, target)
    train(other, range(20, 22))  # what it has learnt is forgotten
    for p, q in zip(params_of(optimizer), params_of(other), strict=True):
        q.data.copy_(p.data)
    other.load_state_dict(state_dict=through_a_file(optimizer.state_dict()))
    assert [group["backend"] for group in other.param_groups] == [target, target]
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.2]
    assert_same(optimizer, other)
    for each in (optimizer, other):
        train(each, range(3, 6))
    assert_same(optimizer, other)


def test_each_group_keeps_its_backend():
    optimizer = trained(ROWS["signum"])
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0]["backend"] = "cuda"  # whatever a checkpoint may say
    other = like(optimizer, ROWS["signum"])
    other.param_groups[1]["backend"] = "reference"
    other.load_state_dict(state_dict)
    assert [group["backend"] for group in other.param_groups] == ["cpu", "reference"]


@each_row
@each_backend
def test_loading_into_bf16_keeps_state_exactly(row, backend):
    optimizer = trained(row, backend)
    other = like(optimizer, row, backend, dtype=torch.bfloat16)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params_of(optimizer), params_of(other), strict=True):
        assert optimizer.state.get(p, {}).keys() == other.state.get(q, {}).keys()
        for name, value in optimizer.state.get(p, {}).items():
            assert same_bits(value, other.state[q][name]), name
    train(other, range(3, 5))
    assert all(value.dtype != torch.bfloat16 for state in other.state.values() for value in state.values())


@each_row
@each_backend
def test_loading_shares_nothing_with_its_source(row, backend):
    optimizer = trained(row, backend)
    state_dict = optimizer.state_dict()
    kept = copy.deepcopy(state_dict)
    other = like(optimizer, row, backend)
    other.load_state_dict(state_dict)
    before = snapshot(optimizer)
    train(other, range(3))
    assert_unchanged(optimizer, before)
    assert state_dict["param_groups"] == kept["param_groups"]
    for number, state in kept["state"].items():
        assert all(same_bits(value, state_dict["state"][number][name]) for name, value in state.items())


@each_row
def test_loading_into_another_memory_order(row):
    (param,) = parameters((2, 3, 4, 5))
    optimizer = make(row, [param])
    train(optimizer, range(2))
    other = make(row, [Parameter(param.detach().clone(memory_format=torch.channels_last))])
    other.load_state_dict(optimizer.state_dict())
    for each in (optimizer, other):
        train(each, range(2, 4))
    assert_same(optimizer, other)


@each_row
def test_what_a_state_dict_holds(row):
    """Plain tensors, numbers and strings under torch's numbering, every key of the groups, and their method."""
    optimizer = trained(row)
    state_dict = optimizer.state_dict()
    assert state_dict.keys() == {"state", "param_groups"}
    assert list(state_dict["state"]) == [0, 1, 2]
    assert [group["params"] for group in state_dict["param_groups"]] == [[0, 1], [2, 3]]
    for saved, own in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        assert saved.keys() == own.keys() and "beta" not in saved
        assert saved["method"] == row.optimizer.__name__.replace("AdamW", "Adam")
    assert all(type(value) is torch.Tensor for state in state_dict["state"].values() for value in state.values())
    assert state_dict["state"][0]["step"] == 3


@each_row
def test_fresh_state_dict(row):
    optimizer = make(row, parameters())
    state_dict = through_a_file(optimizer.state_dict())
    assert state_dict["state"] == {}
    other = make(row, copies(params_of(optimizer)))
    train(other, range(2))
    for p, q in zip(params_of(optimizer), params_of(other), strict=True):
        q.data.copy_(p.data)
    other.load_state_dict(state_dict)
    for each in (optimizer, other):
        train(each, range(2))
    assert_same(optimizer, other)


@each_row
@each_backend
def test_missing_hyperparameters_are_the_optimizers(row, backend):
    optimizer = trained(row, backend)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for group in state_dict["param_groups"]:
        del group["weight_decay"]
    other = like(optimizer, row, backend)
    other.load_state_dict(state_dict)
    assert [group["weight_decay"] for group in other.param_groups] == [0.5, 0.5]


@each_row
@each_backend
def test_entries_taken_out_of_the_state_start_at_zero(row, backend):
    """Their user's doing; a checkpoint without them is refused."""
    optimizer, other = trained(row, backend), trained(row, backend)
    names = rule_of(row.optimizer, optimizer.param_groups[0]).moments
    for state in optimizer.state.values():
        for name in names:
            state[name].zero_()
    for state in other.state.values():
        for name in names:
            del state[name]
    if names:
        with pytest.raises(ValueError, match=f"state '{names[0]}' of parameter 0 of group 0 is missing"):
            trained(row, backend).load_state_dict(other.state_dict())
    for each in (optimizer, other):
        train(each, range(3, 5))
    assert_same(optimizer, other)


def test_a_group_with_beta_by_its_name():
    optimizer = trained(ROWS["signum"])
    state_dict = copy.deepcopy(optimizer.state_dict())
    for group in state_dict["param_groups"]:
        group["beta"] = group.pop("betas")[0]
    other = like(optimizer, ROWS["signum"])
    other.load_state_dict(state_dict)
    assert [group["betas"] for group in other.param_groups] == [(0.9,), (0.9,)]


def test_a_users_own_entries_are_loaded_as_they_are():
    optimizer = trained(ROWS["sign_adam_pp"])
    notes = {"note": "mine", "history": torch.arange(7), "exact": torch.rand(2, dtype=torch.float64)}
    optimizer.state[params_of(optimizer)[0]].update(notes)
    other = like(optimizer, ROWS["sign_adam_pp"])
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    loaded = other.state[params_of(other)[0]]
    assert loaded["note"] == "mine"
    assert torch.equal(loaded["history"], notes["history"])
    assert same_bits(loaded["exact"], notes["exact"])
    for each in (optimizer, other):
        train(each, range(3, 5))
    assert same_bits(params_of(optimizer)[0], params_of(other)[0])


def test_hooks():
    """Ours run between a user's: theirs see the dict as saved, and may change what is loaded."""
    optimizer = trained(ROWS["signum"])
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "comment": "added"})
    state_dict = optimizer.state_dict()
    assert state_dict["comment"] == "added"

    def doubled(_, incoming):
        groups = [{**group, "lr": 2 * group["lr"]} for group in incoming["param_groups"]]
        state = {n: {**s, "exp_avg": 2 * s["exp_avg"]} for n, s in incoming["state"].items()}
        return {"param_groups": groups, "state": state}

    other = like(optimizer, ROWS["signum"], backend="reference")
    other.register_load_state_dict_pre_hook(doubled)
    other.register_load_state_dict_post_hook(lambda o: calls.append(snapshot(o)))
    other.load_state_dict(state_dict)
    assert calls[0] == "before saving"
    assert_unchanged(other, calls[1])
    assert [group["lr"] for group in other.param_groups] == [0.2, 0.4]
    assert same_bits(
        other.state[params_of(other)[0]]["exp_avg"], 2 * optimizer.state[params_of(optimizer)[0]]["exp_avg"]
    )
    other.load_state_dict(state_dict)
    assert len(calls) == 3
    # None of our own has stayed.
    assert len(other._optimizer_load_state_dict_pre_hooks) == len(other._optimizer_load_state_dict_post_hooks) == 1


# --- what cannot be loaded


def set_state(name, value):
    def change(state_dict):
        state_dict["state"][1][name] = value

    return change


def set_hyperparameter(name, value):
    def change(state_dict):
        state_dict["param_groups"][1][name] = value

    return change


UNLOADABLE = {
    "shape": (set_state("exp_avg", torch.zeros(4)), "'exp_avg' of parameter 1 of group 0 has shape \\(4,\\)"),
    "0-dim": (set_state("exp_avg", torch.zeros(())), "'exp_avg' of parameter 1 of group 0 has shape \\(\\)"),
    "dtype": (
        set_state("exp_avg", torch.zeros(3, dtype=torch.float16)),
        "has dtype torch.float16: must be a float32",
    ),
    "number": (set_state("exp_avg", 0.0), "'exp_avg' of parameter 1 of group 0 is 0.0: must be a float32"),
    "std shape": (set_state("exp_avg_std", torch.zeros(3, dtype=torch.float64)), "'exp_avg_std' .* 0-dim float64"),
    "std dtype": (set_state("exp_avg_std", torch.zeros(())), "'exp_avg_std' .* 0-dim float64"),
    "steps": (set_state("step", "three"), "'step' of parameter 1 of group 0 is 'three'"),
    "negative steps": (set_state("step", torch.tensor(-1.0)), "'step' of parameter 1 of group 0 is -1.0"),
    "betas": (set_hyperparameter("betas", (0.9, 0.999)), "betas=\\(0.9, 0.999\\): must be a tuple of 1"),
    "alpha": (set_hyperparameter("alpha", -1.0), "alpha=-1.0"),
    "confidence": (set_hyperparameter("confidence", "adaptiv"), "did you mean 'adaptive'"),
    "groups": (lambda state_dict: state_dict["param_groups"].pop(), "different number of parameter groups"),
    "parameters": (lambda state_dict: state_dict["param_groups"][0]["params"].pop(), "match the size"),
}


@pytest.mark.parametrize("change, message", UNLOADABLE.values(), ids=UNLOADABLE.keys())
def test_nothing_is_loaded_from_what_does_not_fit(change, message):
    row = ROWS["sign_adam_pp-adaptive"]
    optimizer = trained(row)
    state_dict = copy.deepcopy(optimizer.state_dict())
    change(state_dict)
    other = like(optimizer, row)
    train(other, range(2))
    before, groups = snapshot(other), copy.deepcopy([{**g, "params": None} for g in other.param_groups])
    with pytest.raises((TypeError, ValueError), match=message):
        other.load_state_dict(state_dict)
    assert_unchanged(other, before)
    assert [{**g, "params": None} for g in other.param_groups] == groups
    train(other, [2])


def test_loading_does_not_mind_a_learning_rate_below_zero():
    """Rounding in a scheduler may leave -1e-20; the checkpoint must load all the same."""
    optimizer = trained(ROWS["signum"])
    optimizer.param_groups[0]["lr"] = -1e-20
    other = like(optimizer, ROWS["signum"])
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == -1e-20


def test_hooks_of_state_dict_get_what_is_returned():
    """By names instead of numbers, and back: the optimizer takes what its hooks have made."""
    param = Parameter(torch.linspace(-1, 1, 40))
    optimizer = SignAdamPP([param], lr=0.1, state_dtype="int8")
    param.grad = torch.ones(40)
    optimizer.step()
    order = []

    def name(_, state_dict):
        order.append("after")
        assert state_dict["state"][0]["exp_avg"].dtype == torch.int8 and "method" in state_dict["param_groups"][0]
        return {**state_dict, "state": {"weight": state_dict["state"][0]}}

    def number(_, state_dict):
        return {**state_dict, "state": {0: state_dict["state"]["weight"]}}

    optimizer.register_state_dict_pre_hook(lambda _: order.append("before"))
    optimizer.register_state_dict_post_hook(name)
    optimizer.register_load_state_dict_pre_hook(number)
    saved = optimizer.state_dict()
    assert order == ["before", "after"] and list(saved["state"]) == ["weight"]
    before = optimizer.state[param]["exp_avg"].clone()
    optimizer.load_state_dict(saved)
    assert same_bits(optimizer.state[param]["exp_avg"], before)


@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoints_of_mini_batch_variances(flat):
    """Torch makes the state to load into by a step without a learning rate, and without variances."""
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)

    def made():
        model = nn.Linear(3, 2)
        return model, AdamStar(model.parameters(), lr=0.1, variance="minibatch")

    model, optimizer = made()
    for param in model.parameters():
        param.grad, param.grad_variance = torch.ones_like(param), torch.full_like(param, 0.5)
    optimizer.step()
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer, options=options))
    twin, other = made()
    dcp.set_optimizer_state_dict(twin, other, saved, options=options)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert same_bits(optimizer.state[a]["momentum_buffer"], other.state[b]["momentum_buffer"])
        assert float(other.state[b]["step"]) == 1
        b.grad = torch.ones_like(b)
    with pytest.raises(ValueError, match="no grad_variance"):
        other.step()


def test_an_object_that_has_copied_the_attributes_loads():
    class Wrapper:
        def __init__(self, optimizer):
            self.__dict__ = dict(vars(optimizer))
            self.__class__ = type("Wrapped", (type(self), type(optimizer)), {})

    param = Parameter(torch.ones(3))
    optimizer = SignAdamPP([param])
    param.grad = torch.ones(3)
    optimizer.step()
    wrapper = Wrapper(optimizer)
    wrapper.load_state_dict(optimizer.state_dict())
    assert wrapper.state is optimizer.state and wrapper.param_groups is optimizer.param_groups


def test_what_is_no_checkpoint_at_all():
    optimizer = SignAdamPP([Parameter(torch.ones(3))])
    with pytest.raises(TypeError, match="'state' of the checkpoint is a NoneType"):
        optimizer.load_state_dict({"state": None, "param_groups": optimizer.state_dict()["param_groups"]})
    with pytest.raises(ValueError, match="group 0 of the checkpoint has no 'params'"):
        optimizer.load_state_dict({"state": {}, "param_groups": [{"lr": 0.1}]})
