"""Steps that return new parameters and a new state: the bits of the optimizer, and what is handed in stays."""

from __future__ import annotations

import io
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.optimizer_contract import each_backend, each_row, gradient, hyperparameters, make, parameters, params_of
from support.strategies import same_bits
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from signadam_ext import AdamW, SignAdam, SignAdamPP, SignSGD, Signum
from signadam_ext.core import shards
from signadam_ext.functional import FunctionalOptimizer

SHAPES = ((5, 7), (3,), (), (0, 2), (4,))
FORMS = [
    (SignAdamPP, {"state_dtype": "int2", "param_storage": "stochastic"}),
    (SignAdamPP, {"state_dtype": "int4", "param_storage": "master", "confidence": "sparsity", "target": 0.1}),
    (SignAdam, {"state_dtype": ("int8", "bf16"), "param_storage": "split16"}),
    (Signum, {"state_dtype": "int8", "param_storage": "split8"}),
]


class Sharded(Tensor):
    """Stands for a DTensor."""


def tensors_in(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from tensors_in(value)


def check_against(functional: FunctionalOptimizer, optimizer: Any, steps: int = 4, variances: bool = False) -> None:
    """Over steps in which some parameters have no gradient, and one whose learning rate is another."""
    own = params_of(optimizer)
    params: Any = {str(i): param.detach().clone() for i, param in enumerate(own)}
    state = functional.init(params)
    for step in range(steps):
        grads: Any = {str(i): None if i == step else gradient(param, step, i) for i, param in enumerate(own)}
        spread = {key: torch.full_like(param, 0.5, dtype=torch.float32) for key, param in params.items()}
        for param, key in zip(own, grads, strict=True):
            param.grad = grads[key]
        changes = {"lr": 0.25} if step == 2 else {}
        rate = optimizer.param_groups[0]["lr"]
        optimizer.param_groups[0]["lr"] = changes.get("lr", rate)
        optimizer.step()
        optimizer.param_groups[0]["lr"] = rate
        given = list(tensors_in((params, grads, state)))
        before = [(tensor.clone(), tensor._version) for tensor in given]
        found, found_state = functional.step(
            params, grads, state, grad_variances=spread if variances else None, **changes
        )
        for tensor, (value, version) in zip(given, before, strict=True):
            assert same_bits(tensor, value) and tensor._version == version
        places = {tensor.untyped_storage().data_ptr() for tensor in given if tensor.numel()}
        new = [tensor for tensor in tensors_in((found, found_state)) if tensor.numel()]
        assert not places & {tensor.untyped_storage().data_ptr() for tensor in new}
        assert found_state.keys() == state.keys()
        assert all(found_state[key].keys() == state[key].keys() for key in state)
        params, state = found, found_state
        for param, (key, value) in zip(own, params.items(), strict=True):
            assert same_bits(param.detach(), value)
            for name, entry in optimizer.state.get(param, {}).items():
                other = state[key][name]
                assert same_bits(entry, other) if isinstance(entry, Tensor) else entry == other


@each_row
@each_backend
def test_same_bits_as_the_optimizer(row: Any, backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        optimizer = make(row, parameters(*SHAPES, dtype=dtype), backend)
        functional = FunctionalOptimizer(row.optimizer, **hyperparameters(row), backend=backend)
        check_against(functional, optimizer, variances=row.reads_variance)


@pytest.mark.parametrize("cls, options", FORMS)
def test_same_bits_in_each_form_of_storage(cls: Any, options: dict[str, Any]) -> None:
    optimizer = cls(parameters(*SHAPES, dtype=torch.bfloat16), lr=0.1, seed=7, **options)
    check_against(FunctionalOptimizer(cls, lr=0.1, seed=7, **options), optimizer)


def test_training_with_functional_call() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    params: Any = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = AdamW(model.parameters(), lr=0.1)
    functional = FunctionalOptimizer(AdamW, lr=0.1)
    state = functional.init(params)

    def loss(params: Any, x: Tensor) -> Tensor:
        return functional_call(model, params, (x,)).square().mean()

    for step in range(5):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        params, state = functional.step(params, grad(loss)(params, x), state)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    for name, param in model.named_parameters():
        assert same_bits(param.detach(), params[name])
        assert all(same_bits(state[name][key], value) for key, value in optimizer.state[param].items())


def test_parameters_that_require_gradients_go_on_requiring_them() -> None:
    model = nn.Linear(3, 2)
    params: Any = dict(model.named_parameters())
    params["bias"] = params["bias"].detach()
    functional = FunctionalOptimizer(SignSGD, lr=0.5)
    state = functional.init(params)
    for _ in range(2):
        (found,) = torch.autograd.grad(functional_call(model, params, (torch.ones(1, 3),)).sum(), [params["weight"]])
        params, state = functional.step(params, {"weight": found, "bias": None}, state)
        assert params["weight"].requires_grad and params["weight"].is_leaf and not params["bias"].requires_grad
        assert params["weight"].grad is None and not vars(params["weight"])
    assert same_bits(params["weight"].detach(), model.weight.detach() - 0.5 - 0.5)


Two = namedtuple("Two", ["first", "second"])
STRUCTURES = {
    "a tensor": lambda a, b: a,
    "a list": lambda a, b: [a, b],
    "a tuple": lambda a, b: (a, b),
    "a named tuple": lambda a, b: Two(a, b),
    "an ordered dict": lambda a, b: OrderedDict(b=b, a=a),
    "nested": lambda a, b: {"x": [{"y": a}], "z": (b,)},
}


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_structures(structure: Any) -> None:
    params = structure(torch.zeros(2), torch.ones(3))
    grads = structure(torch.ones(2), -torch.ones(3))
    functional = FunctionalOptimizer(SignAdamPP, lr=0.5, beta=0.0)
    state = functional.init(params)
    found, state = functional.step(params, grads, state)
    expected = structure(torch.full((2,), -0.5), torch.full((3,), 1.5))
    assert type(found) is type(params)
    assert all(map(torch.equal, tensors_in(found), tensors_in(expected)))
    for index, entries in enumerate(structure(0, 1) if isinstance(params, (list, tuple)) else []):
        assert list(state[index]) == ["exp_avg", "step"] and entries == index


def test_nothing_to_step_and_gradients_in_another_order() -> None:
    functional = FunctionalOptimizer(SignSGD, lr=1.0)
    assert functional.init({}) == {}
    assert functional.step({}, {}, {}) == ({}, {})
    params = {"a": torch.zeros(1), "b": torch.zeros(2)}
    found, _ = functional.step(params, {"b": torch.ones(2), "a": -torch.ones(1)}, functional.init(params))
    assert found["a"].tolist() == [1.0] and found["b"].tolist() == [-1.0, -1.0] and list(found) == ["a", "b"]


def test_models_stacked_along_a_dimension() -> None:
    """What vmap trains is stepped at once, with the bits of each model by itself."""
    models = [nn.Linear(4, 2) for _ in range(3)]
    stacked: Any = {name: value.detach() for name, value in stack_module_state(models)[0].items()}
    functional = FunctionalOptimizer(AdamW, lr=0.1)
    state = functional.init(stacked)
    optimizers = [AdamW(model.parameters(), lr=0.1) for model in models]
    x = torch.ones(2, 4)

    def loss(params: Any) -> Tensor:
        return functional_call(models[0], params, (x,)).square().mean()

    for _ in range(2):
        grads = vmap(grad(loss))(stacked)
        for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            for name, param in model.named_parameters():
                param.grad = grads[name][i].clone()
            optimizer.step()
        stacked, state = functional.step(stacked, grads, state)
    for i, model in enumerate(models):
        assert all(same_bits(param.detach(), stacked[name][i]) for name, param in model.named_parameters())


def test_state_is_plain() -> None:
    params = {"w": torch.linspace(-1, 1, 5).bfloat16()}
    functional = FunctionalOptimizer(SignAdamPP, state_dtype="int2", param_storage="master")
    params, state = functional.step(params, {"w": torch.ones(5).bfloat16()}, functional.init(params))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    grads = {"w": -torch.ones(5).bfloat16()}
    again = [functional.step(params, grads, found) for found in (state, loaded)]
    assert all(map(same_bits, tensors_in(again[0]), tensors_in(again[1])))
    assert sum(value.nbytes for value in tensors_in(state)) == 8 + 8 + 5 * 4


def test_fake_tensors() -> None:
    functional = FunctionalOptimizer(SignAdamPP, state_dtype="int4")
    with FakeTensorMode():
        params = {"w": torch.ones(64)}
        found, state = functional.step(params, {"w": torch.ones(64)}, functional.init(params))
    assert all(isinstance(tensor, FakeTensor) for tensor in tensors_in((found, state)))
    assert state["w"]["exp_avg"].numel() == 32


def test_compiled_around_it() -> None:
    torch._dynamo.reset()
    functional = FunctionalOptimizer(SignSGD, lr=1.0)

    @torch.compile(backend="eager")
    def train(params: Any, state: Any) -> Any:
        grads = {name: param.sign() * 2 for name, param in params.items()}
        params, state = functional.step(params, grads, state)
        return {name: param * 2 for name, param in params.items()}, state

    params: Any = {"w": torch.tensor([3.0, -3.0])}
    params, _ = train(params, functional.init(params))
    torch._dynamo.reset()
    assert params["w"].tolist() == [4.0, -4.0]


# --- refused


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # jvp's own
def test_inside_a_transform() -> None:
    functional = FunctionalOptimizer(SignSGD, lr=1.0)
    params = torch.ones(3)
    state = functional.init(params)
    message = "cannot be taken inside a transform of torch.func"

    def inside(x: Tensor) -> Tensor:
        with pytest.raises(RuntimeError, match=message):
            functional.init(x)
        with pytest.raises(RuntimeError, match=message):
            functional.step(x, x, state)
        with pytest.raises(RuntimeError, match=message):
            functional.step(params, params, state)
        return x.sum()

    grad(inside)(params)
    vmap(inside)(torch.ones(2, 3))
    jvp(inside, (params,), (params,))


def test_autograd_does_not_go_through() -> None:
    functional = FunctionalOptimizer(SignSGD, lr=1.0)
    weight = torch.ones(3, requires_grad=True)
    state = functional.init(weight)
    (found,) = torch.autograd.grad(weight.square().sum(), [weight], create_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of parameter 'params' requires a gradient"):
        functional.step(weight, found, state)
    with pytest.raises(RuntimeError, match="parameter 'w' has a history"):
        functional.step({"w": weight * 2}, {"w": torch.ones(3)}, {"w": state})
    with torch.no_grad():
        moved, _ = functional.step(weight, found, state)
    assert moved.tolist() == [0.0] * 3 and moved.requires_grad and moved.is_leaf
    with torch.inference_mode():
        functional.step(torch.ones(3), torch.ones(3), functional.init(torch.ones(3)))


P = {"a": torch.ones(3), "b": torch.ones(2)}
BAD: dict[str, tuple[Any, str]] = {
    "a key": (lambda f, s: f.step(P, {"a": P["a"], "c": P["b"]}, s), "grads has another structure than params"),
    "one missing": (lambda f, s: f.step(P, {"a": P["a"]}, s), "grads has another structure than params"),
    "state": (lambda f, s: f.step(P, P, {"a": s["a"]}), "state has another structure than params"),
    "variances": (lambda f, s: f.step(P, P, s, grad_variances=[1]), "grad_variances has another structure"),
    "entries": (lambda f, s: f.step(P, P, {"a": s["a"], "b": 3}), "the state of b is a int: must be a dict"),
    "shape": (lambda f, s: f.step(P, {"a": P["b"], "b": P["b"]}, s), r"gradient of parameter 'a' has shape \(2,\)"),
    "dtype": (lambda f, s: f.step(P, {"a": P["a"].double(), "b": None}, s), "gradient of parameter 'a' has dtype"),
    "no tensor": (lambda f, s: f.step({"a": 1.0, "b": P["b"]}, P, s), "params has a float at 'a'"),
    "int": (lambda f, s: f.init({"a": torch.ones(3, dtype=torch.int32)}), r"parameter 'a' has dtype torch\.int32"),
    "lr": (lambda f, s: f.step(P, P, s, lr=-1.0), "lr=-1"),
    "betas": (lambda f, s: f.step(P, P, s, betas=(0.1, 0.2)), "betas"),
    "a DTensor": (lambda f, s: f.init(Sharded()), "parameter 'params' is a DTensor"),
    "name": (lambda f, s: f.step(P, P, s, weight_decya=0.1), "'weight_decya'; did you mean 'weight_decay'"),
    "storage": (lambda f, s: f.step(P, P, s, state_dtype="int2"), "'exp_avg' of parameter 'a'"),
    "moment": (
        lambda f, s: f.step(P, P, {"a": {**s["a"], "exp_avg": torch.ones(4)}, "b": s["b"]}),
        r"state 'exp_avg' of parameter 'a' has shape \(4,\)",
    ),
    "class": (lambda f, s: FunctionalOptimizer(torch.optim.SGD), "must be an optimizer class of signadam_ext"),  # type: ignore[arg-type]
    "hyperparameter": (lambda f, s: FunctionalOptimizer(SignAdamPP, lr="high"), "lr='high'"),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD.keys())
def test_refused(call: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "is_sharded", lambda tensor: isinstance(tensor, Sharded))
    functional = FunctionalOptimizer(SignAdamPP)
    state = functional.init(P)
    before = [tensor.clone() for tensor in tensors_in((P, state))]
    with pytest.raises((TypeError, ValueError), match=message):
        call(functional, state)
    assert all(map(same_bits, before, tensors_in((P, state))))


def test_other_betas_of_a_step_and_a_warning_that_comes_once() -> None:
    with pytest.warns(UserWarning, match="int2 momentum with beta"):
        functional = FunctionalOptimizer(SignAdamPP, lr=1.0, beta=0.99, state_dtype="int2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params, _ = functional.step(torch.zeros(3), torch.ones(3), functional.init(torch.zeros(3)), beta=0.0)
    assert params.tolist() == [-1.0] * 3


def test_the_largest_rate_so_far_has_no_place() -> None:
    with pytest.raises(ValueError, match="weight_decay_scale='corrected' in FunctionalOptimizer"):
        FunctionalOptimizer(AdamW, weight_decay_scale="corrected")
    optimizer = FunctionalOptimizer(AdamW)
    params = {"w": torch.ones(3)}
    with pytest.raises(ValueError, match="weight_decay_scale='corrected' in FunctionalOptimizer"):
        optimizer.step(params, params, optimizer.init(params), weight_decay_scale="corrected")


def test_it_says_what_it_is() -> None:
    assert repr(FunctionalOptimizer(SignAdamPP, lr=0.1)) == "FunctionalOptimizer(SignAdamPP, lr=0.1)"
