"""What every step looks at before an address reaches a kernel, and what a plan does not hold on to."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import signadam_ext.engine.plan
from signadam_ext import Adam, AdamW, SignAdamPP, SignSGD, Signum, release_gradients
from signadam_ext.engine.gradients import PythonReader

ERRORS = (TypeError, ValueError, RuntimeError)


@pytest.fixture(params=["cpu", "reference", "cpu, read in Python"])
def backend(request, monkeypatch):
    name, _, python = request.param.partition(",")
    if python:
        monkeypatch.setattr(signadam_ext.engine.plan, "make_reader", PythonReader)
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
    (SignSGD, {"param_storage": "stochastic"}),
]


def trained(cls, backend: str, steps: int = 1, **options):
    params = [nn.Parameter(torch.linspace(-1, 1, 40)), nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))]
    optimizer = cls([("first", params[0]), ("second", params[1])], lr=0.125, backend=backend, **options)
    for _ in range(steps):
        for param in params:
            param.grad = torch.linspace(-3, 2, param.numel()).view(param.shape)
        optimizer.step()
    return params, optimizer


def trained_alone(backend: str, *shape: int, steps: int):
    """One parameter after some steps, and its optimizer."""
    param = nn.Parameter(torch.ones(shape))
    optimizer = Adam([param], lr=0.125, backend=backend)
    for _ in range(steps):
        param.grad = torch.ones(shape)
        optimizer.step()
    return param, optimizer


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


# What code of the user's, or of somebody else's, does between the look and the write


@pytest.mark.parametrize("what", ["freed", "moved", "reshaped", "negated"])
@pytest.mark.parametrize("of", ["parameter", "gradient", "moment"])
def test_a_confidence_function_that_changes_the_tensors_of_its_step_is_refused(backend, what, of):
    """It runs after all have been looked at, and before any is written."""
    first, second = (nn.Parameter(torch.ones(2, 1000)) for _ in range(2))
    meddles = []

    def confidence(g, alpha):
        if meddles:
            tensor = {"parameter": second, "gradient": second.grad, "moment": optimizer.state[second]["exp_avg"]}[of]
            if what == "freed":
                tensor.untyped_storage().resize_(0)
            elif what == "moved":
                tensor.data = tensor.detach().clone()
            elif what == "negated":
                tensor.data = torch._neg_view(tensor.detach())
            else:
                tensor.data = tensor.detach().view(1000, 2)
        return g.sign()

    optimizer = SignAdamPP([{"params": [second]}, {"params": [first], "confidence": confidence}], lr=0.125)
    optimizer.param_groups[0]["backend"] = backend
    for _ in range(2):
        first.grad, second.grad = torch.ones(2, 1000), torch.ones(2, 1000)
        optimizer.step()
    kept = first.detach().clone(), int(optimizer.state[first]["step"]), first._version
    meddles.append(True)
    with pytest.raises(RuntimeError, match="a confidence function has changed tensors of the step"):
        optimizer.step()
    assert torch.equal(first, kept[0])
    assert (int(optimizer.state[first]["step"]), first._version) == kept[1:]
    assert int(optimizer.state[second]["step"]) == 2
    if what == "negated":  # and nobody takes it for what it was from then on
        meddles.clear()
        if of == "parameter":
            with pytest.raises(TypeError, match="is the negative of what its memory holds"):
                optimizer.step()
        else:
            values = second.grad.clone(), optimizer.state[second]["exp_avg"].clone()
            twin = nn.Parameter(second.detach().clone())
            other = SignAdamPP([twin], lr=0.125)
            twin.grad = values[0]
            other.state[twin] = {
                **optimizer.state[second],
                "exp_avg": values[1],
                "step": optimizer.state[second]["step"].clone(),
            }
            optimizer.step()
            other.step()
            assert torch.equal(second, twin)


def test_memory_that_is_to_be_copied_on_write_is(backend):
    """A clone that waits for the first write keeps its numbers."""
    param, optimizer = trained_alone(backend, 1000, steps=3)
    state = optimizer.state[param]
    clones = [torch._lazy_clone(x) for x in (param.detach(), state["exp_avg"], state["step"])]
    before = [float(x.sum()) for x in (param.detach().clone(), state["exp_avg"].clone(), state["step"].clone())]
    param.grad = torch.ones(1000)
    optimizer.step()
    assert [float(clone.clone().sum()) for clone in clones] == before
    assert float(param.detach().sum()) != before[0] and float(state["step"]) == 4


@pytest.mark.parametrize("what", ["gradient", "moment"])
def test_tensors_of_torch_func_taken_by_data_are_refused(backend, what):
    """What torch leaves in a plain tensor then has no storage at all."""
    param, optimizer = trained_alone(backend, 4, 6, steps=2)
    before = param.detach().clone()
    raised = []

    def inside(x):
        tensor = param.grad if what == "gradient" else optimizer.state[param]["exp_avg"]
        tensor.data = x
        with pytest.raises(ERRORS, match=r"torch\.func"):
            optimizer.step()
        raised.append(True)
        return x.sum()

    torch.func.grad(inside)(torch.ones(4, 6))
    assert raised and torch.equal(param, before)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("gaps", [False, True])
def test_real_parameters_under_a_mode_that_makes_fakes(backend, steps, gaps):
    """Either nothing happens, or the real step: no kernel is given the address of a fake tensor."""
    base = torch.ones(4, 6)
    param = nn.Parameter(base[:, :3] if gaps else base)
    optimizer = Adam([param], lr=0.125, backend=backend)
    param.grad = torch.ones_like(param)
    for _ in range(steps):
        optimizer.step()
    before = param.detach().clone()
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            optimizer.step()
        except ERRORS:
            pass
        else:
            steps += 1
    assert torch.equal(param, before) or float(optimizer.state[param]["step"]) == steps
    optimizer.step()
    assert float(optimizer.state[param]["step"]) == steps + 1


@pytest.mark.parametrize("what", ["parameter", "moment", "step"])
def test_one_element_that_becomes_lazily_negative(backend, what):
    """No stride tells, and torch's interface does not either."""
    param, optimizer = trained_alone(backend, 1, steps=2)
    state = optimizer.state[param]
    twin = nn.Parameter(param.detach().clone())
    other = Adam([twin], lr=0.125, backend="reference")
    other.load_state_dict(optimizer.state_dict())
    if what == "parameter":
        param.data = torch._neg_view(param.detach())
        with pytest.raises(ERRORS, match="is the negative of what its memory holds"):
            optimizer.step()
        return
    if what == "step":
        state["step"] = torch._neg_view(state["step"])
        with pytest.raises(ERRORS, match="must be the number of steps taken"):
            optimizer.step()
        return
    state["exp_avg"] = torch._neg_view(state["exp_avg"])
    other.state[twin]["exp_avg"].neg_()
    twin.grad = torch.ones(1)
    optimizer.step()
    other.step()
    assert torch.equal(param, twin)


def test_the_gradient_of_a_class_that_changes(backend):
    """A property put into the class after a step is what its user means by ``grad``."""

    class Own(nn.Parameter):
        pass

    param = Own(torch.zeros(4))
    optimizer = SignSGD([param], lr=0.125, backend=backend)
    for _ in range(2):
        param.grad = torch.ones(4)
        optimizer.step()
    before = param.detach().clone()
    Own.grad = property(lambda self: -torch.ones(4))
    optimizer.step()
    assert torch.equal(param.detach(), before + 0.125)


def test_state_that_cannot_be_written_is_refused_before_the_step(backend):
    param = nn.Parameter(torch.zeros(4))
    optimizer = Adam([param], lr=0.125, backend=backend)
    optimizer.state[param] = MappingProxyType({"step": torch.tensor(5.0)})
    param.grad = torch.ones(4)
    with pytest.raises(TypeError, match="is a mappingproxy: must be a dict, which a step can write"):
        optimizer.step()
    assert torch.equal(param, torch.zeros(4)) and param._version == 0


@pytest.mark.parametrize("disturbances", [1, 2, 3])
def test_a_step_that_is_disturbed_while_it_is_planned_is_planned_again(backend, disturbances, monkeypatch):
    """Another thread gives or drops a gradient meanwhile; not for ever."""
    param = nn.Parameter(torch.zeros(4))
    optimizer = SignSGD([param], lr=0.125, backend=backend)
    param.grad = torch.ones(4)
    read, calls = signadam_ext.engine.plan.Plan.read, []

    def disturbed(self, *arguments):
        calls.append(self)
        if len(calls) > disturbances:
            return read(self, *arguments)
        self.release()
        return False

    monkeypatch.setattr(signadam_ext.engine.plan.Plan, "read", disturbed)
    if disturbances < 3:
        optimizer.step()
        assert torch.equal(param.detach(), torch.full((4,), -0.125))
    else:
        with pytest.raises(RuntimeError, match="gradients changed while the step was being planned"):
            optimizer.step()
        assert torch.equal(param, torch.zeros(4)) and param._version == 0 and not optimizer.state[param]


@pytest.mark.parametrize("shape", [(5, 6), (8, 4), (2, 5)])
def test_codes_of_another_shape_are_refused(backend, shape):
    param = nn.Parameter(torch.ones(4, 8))
    optimizer = SignAdamPP([param], state_dtype="int8", backend=backend)
    param.grad = torch.ones(4, 8)
    optimizer.step()
    param.grad = None
    param.data = torch.ones(shape)
    param.grad = torch.ones(shape)
    with pytest.raises(ValueError, match="state 'exp_avg' of parameter 0 of group 0"):
        optimizer.step()
    assert param.eq(1).all() and float(optimizer.state[param]["step"]) == 1
    optimizer.state.clear()
    optimizer.step()
    assert float(optimizer.state[param]["step"]) == 1


def test_versions_of_moments_count(backend):
    """A moment saved for backward must not be used once a step has changed it."""
    param = nn.Parameter(torch.ones(3))
    optimizer = Adam([param], backend=backend)
    for _ in range(2):
        param.grad = torch.ones(3)
        optimizer.step()
    state = optimizer.state[param]
    versions = [state[name]._version for name in ("exp_avg", "exp_avg_sq")]
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * state["exp_avg"]).sum()
    optimizer.step()
    assert [state[name]._version for name in ("exp_avg", "exp_avg_sq")] == [version + 1 for version in versions]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("steps", [0, 2])
def test_a_step_is_not_simulated(backend, steps):
    """Real parameters under a mode that executes nothing."""
    param = nn.Parameter(torch.ones(3))
    optimizer = SignAdamPP([param], backend=backend)
    param.grad = torch.ones(3)
    for _ in range(steps):
        optimizer.step()
    before = param.tolist()
    with (
        FakeTensorMode(),
        pytest.raises(RuntimeError, match="parameter 0 of group 0 cannot be updated in"),
    ):
        optimizer.step()

    def loss(x: Tensor) -> Tensor:
        with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 cannot be updated inside a transform of torch"):
            optimizer.step()
        return x.sum()

    torch.func.grad(loss)(torch.ones(2))
    assert param.tolist() == before and len(optimizer.state) == (1 if steps else 0)
    optimizer.step()
    assert float(optimizer.state[param]["step"]) == steps + 1


def test_a_copied_gradient_where_the_last_one_lay_voids_no_plan(backend, monkeypatch):
    """An allocator gives freed memory again, so the copy of a gradient may lie where the one before it was."""
    memory = torch.ones(3, 2)
    param = nn.Parameter(torch.ones(3, 2))
    optimizer = SignAdamPP([param], lr=0.1, backend=backend)
    param.grad = memory
    optimizer.step()
    plan = optimizer.runtime.plan
    monkeypatch.setattr(signadam_ext.core.tensors, "made_real", lambda label, grad, strides: memory.copy_(grad))
    for value in (-1.0, 1.0):
        param.grad = torch.full((), value).expand(3, 2)
        optimizer.step()
        assert optimizer.runtime.plan is plan
        assert optimizer.state[param]["exp_avg"].sign().unique().tolist() == [value]
        param.grad = torch.full((3, 2), value)
        optimizer.step()
        assert optimizer.runtime.plan is plan


@pytest.mark.parametrize("groups", [1, 2])
def test_a_parameter_that_is_listed_twice_is_refused(backend, groups):
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = SignAdamPP([{"params": [param]} for param in params], lr=0.1, backend=backend)
    for param in params:
        param.grad = torch.ones(2)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    optimizer.param_groups[groups - 1]["params"].append(params[0])
    with pytest.raises(ValueError, match="is parameter 0 of group 0 as well: list each parameter once"):
        optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    assert [optimizer.state[param]["step"].item() for param in params] == [1.0, 1.0]
