"""What every step looks at before an address reaches a kernel, and what a plan does not hold on to."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import signadam_ext.plan
from signadam_ext import Adam, AdamW, SignAdamPP, SignSGD, Signum, release_gradients
from signadam_ext.reader import PythonReader

ERRORS = (TypeError, ValueError, RuntimeError)


@pytest.fixture(params=["cpu", "reference", "cpu, read in Python"])
def backend(request, monkeypatch):
    name, _, python = request.param.partition(",")
    if python:
        monkeypatch.setattr(signadam_ext.plan, "make_reader", PythonReader)
    return name


class Nowhere(Tensor):
    """A wrapper that is flattened by nobody and gives its elements to nobody."""

    @staticmethod
    def __new__(cls, like: Tensor):
        return Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)

    def __init__(self, like: Tensor) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(str(function))


def freed(x: Tensor) -> Tensor:
    copy = torch.cat([x.detach().flatten(), x.detach().flatten()])[x.numel() :].view(x.shape)  # with an offset
    copy.untyped_storage().resize_(0)
    return copy


def cut_short(x: Tensor) -> Tensor:
    copy = x.detach().clone()
    copy.untyped_storage().resize_(max(0, copy.untyped_storage().nbytes() - 1))
    return copy


def functorch(x: Tensor) -> Tensor:
    kept = []
    torch.func.vmap(lambda row: kept.append(row) or row)(torch.stack([x.detach(), x.detach()]))
    return kept[0]


UNUSABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "freed": freed,
    "cut short": cut_short,
    "fake": lambda x: FakeTensorMode(allow_non_fake_inputs=True).from_tensor(x.detach()),
    "wrapper": lambda x: Nowhere(x.detach()),
    "functorch": functorch,
}
CLASSES = [
    (SignAdamPP, {}),
    (SignAdamPP, {"state_dtype": "int8", "confidence": "adaptive_delayed"}),
    (Adam, {}),
    (SignSGD, {"weights": "stochastic"}),
]


def trained(cls, backend: str, steps: int = 1, **options):
    params = [nn.Parameter(torch.linspace(-1, 1, 40)), nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))]
    optimizer = cls([("first", params[0]), ("second", params[1])], lr=0.125, backend=backend, **options)
    for _ in range(steps):
        for param in params:
            param.grad = torch.linspace(-3, 2, param.numel()).view(param.shape)
        optimizer.step()
    return params, optimizer


def seen(params, optimizer) -> str:
    return str([[p.tolist() for p in params], [p._version for p in params], optimizer.state_dict()["state"]])


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("cls, options", CLASSES, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("steps", [0, 1])
def test_a_gradient_without_memory_is_refused(backend, cls, options, kind, steps):
    params, optimizer = trained(cls, backend, steps, **options)
    params[0].grad = torch.ones(40)
    params[1].grad = torch.ones(2, 3)
    params[1].grad = UNUSABLE[kind](torch.ones(2, 3))
    before = seen(params, optimizer)
    with pytest.raises(ERRORS, match="second"):
        optimizer.step()
    assert seen(params, optimizer) == before
    params[1].grad = torch.ones(2, 3)
    optimizer.step()
    assert float(optimizer.state[params[1]]["step"]) == steps + 1


@pytest.mark.parametrize("kind", ["freed", "cut short"])
@pytest.mark.parametrize("cls, options", CLASSES, ids=lambda x: getattr(x, "__name__", ""))
def test_state_without_memory_is_refused(backend, cls, options, kind):
    params, optimizer = trained(cls, backend, **options)
    for name, value in list(optimizer.state[params[1]].items()):
        if not isinstance(value, Tensor):
            continue
        kept = value.clone()
        storage = value.untyped_storage()
        storage.resize_(0 if kind == "freed" else storage.nbytes() - 1)
        moved = [p.tolist() for p in params], float(optimizer.state[params[0]]["step"])
        with pytest.raises(ERRORS, match="second"):
            optimizer.step()
        assert moved == ([p.tolist() for p in params], float(optimizer.state[params[0]]["step"]))
        optimizer.state[params[1]][name] = kept
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [2, 2]


@pytest.mark.parametrize("cls", [SignAdamPP, AdamW, Signum])
def test_a_zero_tensor_is_zeros(backend, cls):
    def run(resolved: bool):
        params, optimizer = trained(cls, backend)
        for _ in range(2):
            zero = torch._efficientzerotensor(2, 3)
            params[1].grad = torch.zeros(2, 3) if resolved else zero
            optimizer.step()
        if not resolved:
            optimizer.state[params[1]]["exp_avg"] = torch._efficientzerotensor(2, 3)
        else:
            optimizer.state[params[1]]["exp_avg"] = torch.zeros(2, 3)
        optimizer.step()
        return [p.tolist() for p in params]

    assert run(False) == run(True)


def test_a_dense_negative_counts_as_what_it_says(backend):
    params, optimizer = trained(SignAdamPP, backend, 0, beta=0.0)
    before = params[1].detach().clone()
    params[1].grad = torch._neg_view(torch.ones(2, 3))
    optimizer.step()
    assert torch.equal(params[1].detach(), before + 0.125)


@pytest.mark.parametrize("cls", [SignAdamPP, Adam])
def test_counts_of_all_parameters_are_watched(backend, cls):
    def run(change):
        params, optimizer = trained(cls, backend)
        change(optimizer.state[params[1]])
        for _ in range(2):
            optimizer.step()
        return [p.tolist() for p in params], [float(optimizer.state[p]["step"]) for p in params]

    def by_data(state):
        state["step"].data = torch.full((), 41.0, dtype=torch.float64)

    def by_entry(state):
        state["step"] = 41

    expected = run(lambda state: state["step"].fill_(41.0))
    assert expected[1] == [3, 43]
    assert run(by_data) == run(by_entry) == expected


@pytest.mark.parametrize("count", [-1.0, 0.5, 2.0**53, float("nan"), float("inf")])
def test_senseless_counts_are_refused(backend, count):
    params, optimizer = trained(Adam, backend)
    optimizer.state[params[1]]["step"].fill_(count)
    before = str(params)
    with pytest.raises(ValueError, match="'step' of parameter 'second' is"):
        optimizer.step()
    assert str(params) == before


def test_edits_of_the_state_count_however_they_are_made(backend):
    def run(edit):
        params, optimizer = trained(SignAdamPP, backend, beta=0.5)
        edit(optimizer, params[1])
        optimizer.step()
        return [p.tolist() for p in params]

    def by_item(optimizer, param):
        optimizer.state[param]["exp_avg"] = torch.full((2, 3), 0.25)

    def by_vars(optimizer, param):
        vars(optimizer)["state"][param]["exp_avg"] = torch.full((2, 3), 0.25)

    def by_data(optimizer, param):
        optimizer.state[param]["exp_avg"].data = torch.full((3, 2), 0.25).t()

    def in_place(optimizer, param):
        optimizer.state[param]["exp_avg"].fill_(0.25)

    assert run(by_item) == run(by_vars) == run(by_data) == run(in_place)


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}, {"confidence": "adaptive"}])
def test_what_a_user_lets_go_is_freed(backend, options):
    params, optimizer = trained(SignAdamPP, backend, 2, **options)
    gone = [weakref.ref(value) for value in optimizer.state[params[0]].values() if isinstance(value, Tensor)]
    for name, value in optimizer.state[params[0]].items():
        if isinstance(value, Tensor):
            optimizer.state[params[0]][name] = value.clone()
            del value
    gone.append(weakref.ref(params[1].grad))
    params[1].grad = None
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
    gone = [weakref.ref(param) for param in params]
    optimizer.state.clear()
    optimizer.param_groups.clear()
    del params
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_a_refused_step_holds_nothing(backend):
    params, optimizer = trained(SignAdamPP, backend)
    params[1].grad = freed(torch.ones(2, 3))
    with pytest.raises(ValueError, match="second"):
        optimizer.step()
    gone = [weakref.ref(param) for param in params]
    optimizer.state.clear()
    optimizer.param_groups.clear()
    del params
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


@pytest.mark.parametrize("released", [False, True])
def test_swapped_parameters_are_trained_on(backend, released):
    def run(swap: bool):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = SignAdamPP(model.parameters(), lr=0.125, backend=backend)
        if released:
            release_gradients(model, optimizer)
        for k in range(5):
            model(torch.randn(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if k in (1, 3):
                if swap:
                    torch.utils.swap_tensors(model.weight, nn.Parameter(model.weight.detach() * 2))
                else:
                    model.weight.data = model.weight.detach() * 2
        return [p.tolist() for p in model.parameters()], float(optimizer.state[model.weight]["step"])

    assert run(True) == run(False)


def test_overlapping_parameters_on_the_reference_and_cpu():
    """In order, whichever backends their groups name: an element that several have gets every one's step."""

    def run(backends):
        base = torch.zeros(12)
        views = [nn.Parameter(base[:8]), nn.Parameter(base[4:]), nn.Parameter(base[::2])]
        groups = [
            {"params": [v], "lr": 2.0**-k, "backend": b} for k, (v, b) in enumerate(zip(views, backends, strict=True))
        ]
        optimizer = SignAdamPP(groups, beta=0.5)
        for _ in range(3):
            for view in views:
                view.grad = torch.ones_like(view)
            optimizer.step()
        return base.tolist()

    expected = run(["reference"] * 3)
    assert run(["cpu"] * 3) == run(["cpu", "reference", "cpu"]) == run(["reference", "cpu", "auto"]) == expected
    assert len(set(expected)) > 3
