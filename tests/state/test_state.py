"""The state of a parameter: how it is fitted to its step, and loaded, and that neither is ever half done."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from support.strategies import same_bits
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from signadam_ext import LaProp, SignAdamPP, Signum
from signadam_ext.core import formats, memory_order
from signadam_ext.core.formats import BF16, BLOCK8, FP32, INT4, INT8
from signadam_ext.state.checkpoint import Layout
from signadam_ext.state.schema import STEP_DTYPE, entry_names, fit

PACKED = tuple(form for form in formats.FORMATS.values() if form.packed)
SHAPES = ((), (1,), (0,), (7,), (3, 5), (1, 4), (2, 3, 4), (2, 1, 4, 3), (2, 8, 3, 3), (2, 3, 2, 3, 2))


def made(cls, params, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* momentum with beta")
        return cls(params, **options)


def dense(shape, order, dtype=torch.float32):
    """Random numbers whose dimensions lie in memory in that order, the slowest first."""
    generator = torch.Generator("cpu").manual_seed(len(shape) * 100 + sum(order))
    sizes = [shape[dim] for dim in order]
    permuted = torch.randn(sizes, generator=generator, device="cpu", dtype=torch.float32).to(dtype)
    return permuted.permute([order.index(dim) for dim in range(len(shape))])


def orders(shape):
    """Some orders of a shape's dimensions."""
    dims = tuple(range(len(shape)))
    return {dims, dims[::-1], dims[:1] + dims[2:] + dims[1:2], dims[1:] + dims[:1]}


def layout(param, form=FP32, param_storage="nearest", threshold_state=None):
    return Layout("parameter 'w'", param, {"exp_avg": form}, param_storage, threshold_state)


def content(state):
    """Entries with what is in them, to be compared later."""
    return {name: (id(x), x.clone() if isinstance(x, Tensor) else x) for name, x in state.items()}


def unchanged(state, before):
    return state.keys() == before.keys() and all(
        id(x) == before[name][0] and (not isinstance(x, Tensor) or same_bits(x, before[name][1]))
        for name, x in state.items()
    )


# The memory order of dimensions


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_order_has_one_number_and_a_number_one_order(shape):
    counted = [size for size in shape if size > 1] if 0 not in shape else []
    seen = {}
    for number in range(math.factorial(len(counted))):
        strides = memory_order.strides_in_order(shape, number)
        assert memory_order.order_of(shape, strides) == number
        seen[tuple(stride for stride, size in zip(strides, shape, strict=True) if size > 1)] = number
    assert len(seen) == max(1, math.factorial(len(counted)))
    contiguous = torch.empty(shape).stride()
    assert memory_order.order_of(shape, contiguous) == 0
    for wrong in (-1, math.factorial(len(counted))):
        with pytest.raises(ValueError, match="is no order of"):
            memory_order.strides_in_order(shape, wrong)


def test_dimensions_of_one_element_do_not_count():
    shape = (2, 1, 4)
    assert {memory_order.order_of(shape, (4, stride, 1)) for stride in (0, 1, 4, 77)} == {0}
    x = torch.zeros(2, 3, 1, 1)
    assert memory_order.order_of(x.shape, x.to(memory_format=torch.channels_last).stride()) == 0


@pytest.mark.parametrize("form", PACKED, ids=lambda form: form.kind)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 1], ids=str)
def test_codes_follow_their_elements_into_another_memory_order(form, shape):
    for first in orders(shape):
        for second in orders(shape):
            param = dense(shape, first)
            levels = form.levels or 1
            values = dense(shape, first).clamp(-1, 1).mul(levels).round()
            own = layout(param, form)
            state = {"step": torch.zeros((), dtype=STEP_DTYPE)}
            state.update(fit(own, state, 0, 0).changes)
            state["exp_avg"] = formats.encode(
                form, memory_order.flat(values), torch.zeros(values.numel(), dtype=torch.int64)
            )
            moved = Layout(own.label, dense(shape, second), own.moments, "nearest", None)
            before = content(state)
            found = fit(moved, state, 0, 0)
            assert unchanged(state, before)
            flat = formats.decode(form, found.moments[0], param.numel())
            back = flat.as_strided(shape, memory_order.strides_of(moved.param))
            # Blocks may be formed anew; whole numbers up to 1 are exact in them.
            assert torch.equal(back, values)
            assert ("exp_avg_order" in found.changes) == (
                memory_order.order_of(shape, memory_order.strides_of(param))
                != memory_order.order_of(shape, moved.param.stride())
            )


@pytest.mark.parametrize("cls, sd", [*((SignAdamPP, kind) for kind in formats.CODES), (Signum, "int8")])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("when", ["training", "after loading", "after deepcopy", "after pickle", "after load_state"])
def test_a_model_changes_its_memory_format(cls, sd, backend, when, tmp_path):
    """The momentum that a checkpoint shows stays with its elements, and so do steps."""
    shape = (4, 8, 3, 3) if backend == "cpu" else (2, 3, 2, 3, 2)
    format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    model = nn.ParameterList([nn.Parameter(dense(shape, tuple(range(len(shape)))))])
    optimizer = made(cls, model.parameters(), lr=0.0, beta=0.5, state_dtype=sd, backend=backend)
    model[0].grad = dense(shape, tuple(range(len(shape)))[::-1]).sign()
    for _ in range(8):
        optimizer.step()
    if when == "after loading":
        saved, optimizer = optimizer.state_dict(), made(cls, model.parameters(), state_dtype=sd, backend=backend)
        optimizer.load_state_dict(saved)
    elif when == "after load_state":
        optimizer.save_state(tmp_path / "state")
        optimizer = made(cls, model.parameters(), state_dtype=sd, backend=backend)
        optimizer.load_state(tmp_path / "state")
    elif when != "training":
        how = copy.deepcopy if when == "after deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
        model, optimizer = how((model, optimizer))
    before = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    model.to(memory_format=format)
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], before)
    optimizer.save_state(tmp_path / "moved")
    model[0].grad = torch.zeros_like(model[0])
    optimizer.step()
    after = optimizer.state_dict()["state"][0]["exp_avg"].float()
    assert ((after == 0) | (after.sign() == before.sign())).all()
    assert after.abs().sum() > before.float().abs().sum() / 4
    other = made(cls, [nn.Parameter(dense(shape, tuple(range(len(shape)))))], state_dtype=sd)
    other.load_state(tmp_path / "moved")
    assert torch.equal(other.state_dict()["state"][0]["exp_avg"], before)


# What fit makes, and what it refuses


def test_fit_makes_what_is_missing_and_writes_nothing():
    param = nn.Parameter(dense((3, 5), (1, 0), torch.bfloat16))
    low = torch.full((3, 5), 5, dtype=torch.int16)
    state = {"note": "mine", "step": 3, "param_low": low}
    own = layout(param, INT4, "master", "threshold")
    before = content(state)
    assert entry_names(own) == ("exp_avg", "master_param", "threshold", "step")
    found = fit(own, state, 0, 0)
    assert unchanged(state, before)
    assert found.removed == ("param_low",)
    assert found.changes.keys() == {
        *("exp_avg", "exp_avg_kind", "exp_avg_levels", "exp_avg_order", "master_param", "threshold", "step")
    }
    assert found.step.dtype == STEP_DTYPE and found.step == 3 and found.step.device.type == "cpu"
    assert found.residual.stride() == (1, 3) and torch.equal(
        found.residual, formats.load_param("split16", param.detach(), low)
    )
    assert found.threshold_state.dtype == torch.float64 and found.threshold_state == 0
    state.update(found.changes)
    del state["param_low"]
    again = fit(own, state, 0, 0)
    assert again.changes == {} and again.removed == ()
    assert again.moments == found.moments and again.residual is found.residual and again.step is found.step


def test_a_master_copy_becomes_low_bits():
    param = nn.Parameter(torch.randn(3, 5).bfloat16())
    master = param.detach().float() + 1e-4
    param.data.copy_(master)
    param.data[0, 0] = 9.0  # set from outside, and wins
    state = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3, 5), "master_param": master}
    found = fit(layout(param, FP32, "split16"), state, 0, 0)
    assert found.removed == ("master_param",)
    joined = formats.load_param("split16", param.detach(), found.residual)
    assert joined[0, 0] == 9.0 and torch.equal(joined.flatten()[1:], master.flatten()[1:])


def test_fit_makes_lazy_tensors_real():
    param = nn.Parameter(torch.randn(4))
    for lazy in (torch._neg_view(torch.arange(4.0)), torch._efficientzerotensor(4)):
        found = fit(layout(param), {"step": torch.tensor(1.0), "exp_avg": lazy}, 0, 0)
        (moment,) = found.moments
        assert not moment.is_neg() and not moment._is_zerotensor() and torch.equal(moment, lazy + torch.zeros(4))
    step = torch._neg_view(torch.tensor(-3.0))
    assert fit(layout(param), {"step": step}, 0, 0).step == 3
    threshold_state = torch._efficientzerotensor((), dtype=torch.float64)
    found = fit(layout(param, threshold_state="threshold"), {"threshold": threshold_state}, 0, 0)
    assert not found.threshold_state._is_zerotensor() and found.threshold_state == 0


def test_codes_are_whole_and_aligned():
    param = nn.Parameter(torch.randn(64))
    stored = torch.arange(65, dtype=torch.uint8)
    for odd in (stored[1:], torch.arange(128, dtype=torch.uint8)[::2]):
        (moment,) = fit(layout(param, INT8), {"exp_avg": odd}, 0, 0).moments
        assert moment.data_ptr() % 16 == 0 and moment.is_contiguous() and torch.equal(moment, odd)


@pytest.mark.parametrize("form", PACKED, ids=lambda form: form.kind)
@pytest.mark.parametrize("cast", [None, torch.float32, torch.bfloat16])
def test_what_a_checkpoint_holds_is_adopted_where_it_is_put_into_the_state(form, cast):
    """ZeroRedundancyOptimizer writes it there, and torch's loading casts to the parameter's dtype."""
    cls = Signum if form is BLOCK8 else SignAdamPP
    param = nn.Parameter(dense((3, 5), (1, 0)))
    optimizer = made(cls, [param], state_dtype="int8" if form is BLOCK8 else form.kind)
    for k in range(3):
        param.grad = dense((3, 5), (0, 1)) + k
        optimizer.step()
    exported = optimizer.state_dict()["state"][0]
    want = optimizer.state[param]
    put = {name: x.to(cast) if cast and name == "exp_avg" else copy.copy(x) for name, x in exported.items()}
    found = fit(layout(param, form), put, 0, 0)
    decoded = [formats.decode(form, stored, 15) for stored in (found.moments[0], want["exp_avg"])]
    assert torch.equal(*decoded) and {**put, **found.changes}.keys() == want.keys()
    optimizer.state[param] = put
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"].float(), exported["exp_avg"].float())
    optimizer.step()
    if form is not BLOCK8:
        with pytest.raises(ValueError, match="exp_avg' of parameter 'w' has codes from"):
            fit(layout(param, form), {**put, "exp_avg": torch.full((3, 5), 128.0)}, 0, 0)
        with pytest.raises(ValueError, match="fractions among its"):
            fit(layout(param, form), {**put, "exp_avg": torch.full((3, 5), 0.5)}, 0, 0)


def freed(x):
    x.untyped_storage().resize_(0)
    return x


def shrunk(x):
    whole = torch.zeros(4 + x.numel(), dtype=x.dtype)
    part = whole[4:]
    freed(whole)
    return part


class Bare(Tensor):
    @staticmethod
    def __new__(cls, like):
        return Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)

    def __init__(self, like):
        self.like = like

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


class Flattened(Bare):
    def __tensor_flatten__(self):
        return ["like"], None


def fake(x):
    with FakeTensorMode() as mode:
        return mode.from_tensor(x)


def in_functorch(x):
    kept = []
    torch.func.vmap(lambda y: kept.append(y) or y)(x[None])
    return kept[0]


NOWHERE = {
    "freed": freed,
    "freed under an offset": shrunk,
    "meta": lambda x: x.to("meta"),
    "fake": fake,
    "wrapper": Bare,
    "flattened wrapper": Flattened,
    "functorch": in_functorch,
    "sparse": lambda x: x.to_sparse(),
    "a list": lambda x: x.tolist(),
}


@pytest.mark.parametrize("nowhere", NOWHERE.values(), ids=NOWHERE.keys())
@pytest.mark.parametrize("entry", ["exp_avg", "packed", "param_low", "threshold", "step"])
def test_state_without_memory_is_refused_by_name(nowhere, entry):
    if entry == "step" and nowhere is NOWHERE["a list"]:
        return
    param = nn.Parameter(torch.randn(4).bfloat16())
    good = {
        "step": torch.ones(()),
        "exp_avg": torch.zeros(4),
        "param_low": torch.zeros(4, dtype=torch.int16),
        "threshold": torch.zeros((), dtype=torch.float64),
    }
    form = FP32
    if entry == "packed":
        good["exp_avg"], form = torch.zeros(32, dtype=torch.uint8), INT8
    name = "exp_avg" if entry == "packed" else entry
    if good[name].dim() == 0 and nowhere in (shrunk, NOWHERE["a list"]):
        return
    state = {**good, name: nowhere(good[name])}
    with pytest.raises((TypeError, ValueError), match=f"state '{name}' of parameter 'w'"):
        fit(layout(param, form, "split16", "threshold"), state, 0, 0)
    optimizer = made(
        SignAdamPP, [("w", param)], param_storage="split16", confidence="sparsity", target=0.5, state_dtype=form.kind
    )
    before = optimizer.state_dict()
    with pytest.raises((TypeError, ValueError), match=f"state '{name}' of parameter 'w'"):
        optimizer.load_state_dict({**before, "state": {0: state}})
    assert not optimizer.state


COUNTS = {
    "negative": -1,
    "fraction": 2.5,
    "beyond 2^53": 2.0**53 * 2,
    "an integer beyond 2^53": 2**53 + 1,
    "infinite": math.inf,
    "nan": math.nan,
    "text": "3",
    "flag": True,
    "two": torch.ones(2),
    "complex": torch.tensor(1j),
}


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("wrap", [lambda x: x, torch.as_tensor], ids=["plain", "tensor"])
def test_impossible_numbers_of_steps_are_refused(count, wrap):
    count = count if isinstance(count, str) else wrap(count)
    param = nn.Parameter(torch.ones(4))
    with pytest.raises((TypeError, ValueError), match="state 'step' of parameter 'w' is"):
        fit(layout(param), {"step": count, "exp_avg": torch.zeros(4)}, 0, 0)
    optimizer = Signum([("w", param)])
    groups = optimizer.state_dict()["param_groups"]
    with pytest.raises((TypeError, ValueError), match="state 'step' of parameter 'w' is"):
        optimizer.load_state_dict({"param_groups": groups, "state": {0: {"step": count, "exp_avg": torch.zeros(4)}}})


@pytest.mark.parametrize(
    "count",
    [7, 7.0, torch.tensor(7), torch.tensor([7.0]), torch.tensor(7.0, dtype=torch.float64), np.int64(7), np.float32(7)],
    ids=repr,
)
def test_numbers_of_steps_of_any_kind(count):
    param = nn.Parameter(torch.ones(4))
    step = fit(layout(param), {"step": count}, 0, 0).step
    assert step.shape == () and step.dtype == STEP_DTYPE and step == 7
    optimizer = Signum([param])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"param_groups": groups, "state": {0: {"step": count, "exp_avg": torch.zeros(4)}}})
    loaded = optimizer.state[param]["step"]
    assert loaded.shape == () and loaded.dtype == STEP_DTYPE and loaded == 7


@pytest.mark.skipif(torch.float32 == STEP_DTYPE, reason="fp32 does not hold these counts")
@pytest.mark.parametrize("count", [2**24 + 1, 2**53 - 1])
def test_large_numbers_of_steps_are_exact(count):
    found = fit(layout(nn.Parameter(torch.ones(4))), {"step": count}, 0, 0).step
    assert int(found.item()) == count


WRONG = {
    "both": ({"param_low": torch.zeros(4, dtype=torch.int16), "master_param": torch.zeros(4)}, "'param_low' and 'mas"),
    "shape": ({"exp_avg": torch.zeros(5)}, "'exp_avg' of parameter 'w' has shape"),
    "dtype": ({"exp_avg": torch.zeros(4, dtype=torch.float64)}, "'exp_avg' of parameter 'w' has dtype"),
    "kind": ({"exp_avg": torch.zeros(32, dtype=torch.uint8), "exp_avg_kind": 3}, "is int8: must be fp32"),
    "old kind": ({"exp_avg": torch.zeros(32, dtype=torch.uint8), "exp_avg_kind": "int8"}, "is int8: must be fp32"),
    "no kind": ({"exp_avg": torch.zeros(4), "exp_avg_kind": 77}, "exp_avg_kind of .* is 77: must be one of 3"),
}


@pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG.keys())
def test_state_that_does_not_fit_is_refused(changes, message):
    param = nn.Parameter(torch.ones(4))
    state = {"step": torch.ones(()), **changes}
    before = content(state)
    with pytest.raises((TypeError, ValueError), match=message):
        fit(layout(param), state, 0, 0)
    assert unchanged(state, before)


def test_kinds_that_are_strings_become_numbers():
    """As version 0.1 pickled them, without an order."""
    param = nn.Parameter(dense((3, 5), (1, 0)))
    stored = formats.pack(INT4, torch.arange(-7, 8, dtype=torch.int8))
    state = {"step": torch.ones(()), "exp_avg": stored, "exp_avg_kind": "int4", "exp_avg_levels": 7}
    found = fit(layout(param, INT4), state, 0, 0)
    assert found.moments[0] is stored
    assert {name: found.changes[name] for name in ("exp_avg_kind", "exp_avg_order")} == {
        "exp_avg_kind": INT4.number,
        "exp_avg_order": 1,
    }


@pytest.mark.parametrize("default", ["device", "dtype", "inference"])
def test_what_is_the_default_does_not_matter(default):
    def run():
        param = nn.Parameter(dense((3, 5), (1, 0), torch.bfloat16))
        found = [
            fit(layout(param, form, param_storage, threshold_state), {"step": 3}, 7, 1)
            for form in (FP32, BF16, *PACKED)
            for param_storage, threshold_state in (
                ("nearest", None),
                ("master", "threshold"),
                ("split8", "exp_avg_std"),
            )
        ]
        codes = {"exp_avg": torch.ones(3, 5, dtype=torch.int8, device="cpu"), "exp_avg_kind": 3, "step": 1}
        found.append(fit(layout(param, INT8), codes, 7, 1))
        optimizer = made(SignAdamPP, [param], state_dtype="int8", confidence="adaptive", param_storage="split16")
        groups = optimizer.state_dict()["param_groups"]
        moments = torch.linspace(-1, 1, 15, device="cpu", dtype=torch.float32).view(3, 5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.load_state_dict({"state": {0: {"exp_avg": moments, "step": 2}}, "param_groups": groups})
        tensors = [x for each in found for x in each.changes.values() if isinstance(x, Tensor)]
        return [*tensors, *(x for x in optimizer.state[param].values() if isinstance(x, Tensor))]

    expected = run()
    try:
        if default == "device":
            torch.set_default_device("meta")
            got = run()
        elif default == "dtype":
            torch.set_default_dtype(torch.float64)
            got = run()
        else:
            with torch.inference_mode():
                got = run()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for a, b in zip(expected, got, strict=True):
        assert a.dtype == b.dtype and a.device == b.device and not b.is_inference() and torch.equal(a, b)


def soft(g, alpha):
    return torch.where(g.abs() > alpha, g / (1 + g.abs()), 0.0)


@pytest.mark.parametrize("state_dtype", ["int8", "int4", "int2"])
@pytest.mark.parametrize("target", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("cls", [SignAdamPP, LaProp])
def test_codes_become_a_form_without_a_bound(cls, state_dtype, target):
    """Codes say what they stand for by the form that they were made in."""
    bounded = {"betas": (0.9, 0.95)} if cls is LaProp else {}
    unbounded = {"betas": (0.9, 0.999)} if cls is LaProp else {"confidence": soft}
    param = torch.nn.Parameter(torch.ones(40))
    param.grad = torch.linspace(-2, 2, 40)
    optimizer = cls([param], lr=0.1, state_dtype=state_dtype, **bounded)
    for _ in range(10):
        optimizer.step()
    saved = optimizer.state_dict()
    for name, value in unbounded.items():
        saved["param_groups"][0][name] = value
    plain, other = cls([param], lr=0.1, **bounded), cls([param], lr=0.1, state_dtype=target, **unbounded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain.load_state_dict(optimizer.state_dict())
        other.load_state_dict(saved)
    expected, found = (o.state_dict()["state"][0]["exp_avg"].float() for o in (plain, other))
    if target == "fp32":
        assert torch.equal(found, expected)
    else:
        assert torch.allclose(found, expected, rtol=2**-6, atol=float(expected.abs().max()) * 2**-6)
    assert bool(found.any())


@pytest.mark.parametrize(
    ("cls", "options", "change"),
    [
        (Signum, {"state_dtype": "int8"}, {"state_dtype": "fp32"}),
        (SignAdamPP, {"state_dtype": "int2"}, {"state_dtype": "int8"}),
        (SignAdamPP, {"state_dtype": "int2"}, {"state_dtype": "bf16"}),
        (LaProp, {"betas": (0.9, 0.95), "state_dtype": "int8"}, {"betas": (0.9, 0.999)}),
    ],
)
def test_the_way_out_of_a_changed_form_is_open(cls, options, change):
    """The step's error says what to do: an optimizer of the other form loads the state_dict of this one."""
    param = torch.nn.Parameter(torch.ones(12))
    param.grad = torch.linspace(-2, 2, 12)
    optimizer, twin = (cls([param], lr=0.1, **options) for _ in range(2))
    optimizer.step()
    before = optimizer.state_dict()
    optimizer.param_groups[0].update(change)
    with pytest.raises(ValueError, match="make an optimizer of that form and have it load the state_dict of this one"):
        optimizer.step()
    after = optimizer.state_dict()
    assert after["state"][0].keys() == before["state"][0].keys()
    for name, value in before["state"][0].items():
        assert (
            torch.equal(after["state"][0][name], value) if torch.is_tensor(value) else after["state"][0][name] == value
        )
    made = {**options, **change}
    other = cls([param], lr=0.1, **made)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.load_state_dict(after)
    other.step()
    twin.load_state_dict(before)
    assert same_bits(twin.state_dict()["state"][0]["exp_avg"], before["state"][0]["exp_avg"])


def test_the_variance_of_few_bits_is_told_when_a_checkpoint_brings_it():
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = SignAdamPP([param], beta=0.99, state_dtype="int2")
    optimizer.step()
    other = SignAdamPP([param], beta=0.9, state_dtype="int2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):  # again, since nobody was told
            with pytest.raises(UserWarning, match=r"int2 momentum with beta = 0\.99"):
                other.load_state_dict(optimizer.state_dict())
    assert not other.state and other.param_groups[0]["betas"] == (0.9,)
    with pytest.warns(UserWarning, match=r"int2 momentum with beta = 0\.99"):
        other.load_state_dict(optimizer.state_dict())
