"""Under ``torch.use_deterministic_algorithms``: the same bits, nothing refused, and no warning.

Torch fills memory that it has just allocated with NaN there, so that what is read before it is written shows.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.optimizer_contract import ROWS, each_backend, each_row, make, parameters, train
from support.strategies import same_bits
from torch import Tensor, nn
from torch.func import functional_call, grad

from signadam_ext import SignAdam, SignAdamPP, Signum, offload, release_gradients
from signadam_ext.distributed import DistributedLion, DistributedSignAdamPP
from signadam_ext.functional import FunctionalOptimizer

#: (warn_only, whether memory is filled)
MODES = [(False, True), (True, True), (False, False)]
FORMS: list[tuple[Any, dict[str, Any]]] = [
    (SignAdamPP, {"state_dtype": "int2", "param_storage": "stochastic"}),
    (SignAdamPP, {"state_dtype": "int4", "param_storage": "master", "confidence": "sparsity", "target": 0.1}),
    (SignAdam, {"state_dtype": ("int8", "bf16"), "param_storage": "split16"}),
    (Signum, {"state_dtype": "int8", "param_storage": "split8"}),
]


@contextlib.contextmanager
def deterministic(warn_only: bool, fills: bool) -> Iterator[None]:
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fills
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(False)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return same_bits(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or repr(a) == repr(b)


def check(run: Callable[[], Any]) -> None:
    expected = run()
    for warn_only, fills in MODES:
        with deterministic(warn_only, fills):
            found = run()
        assert same(found, expected)


def trained(make_optimizer: Callable[[Any], Any], dtype: torch.dtype = torch.float32) -> Any:
    """Parameters and state, what a step says of itself, and both after loading."""

    def made() -> Any:
        params = parameters((40, 33), (7,), (), (0, 3), dtype=dtype)
        params[0].data = params[0].data.t().contiguous().t()
        return make_optimizer(params)

    optimizer = made()
    optimizer.observe()
    train(optimizer, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    twin = made()
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    train(twin, range(2, 4))
    told = repr(optimizer.statistics())
    return [
        [list(map(torch.Tensor.detach, group["params"])) for each in (optimizer, twin) for group in each.param_groups],
        [list(each.state.values()) for each in (optimizer, twin)],
        told,
    ]


@each_row
@each_backend
def test_steps_loads_and_statistics(row: Any, backend: str) -> None:
    check(lambda: trained(lambda params: make(row, params, backend)))


@each_backend
@pytest.mark.parametrize("cls, options", FORMS)
def test_forms_of_storage(cls: Any, options: dict[str, Any], backend: str) -> None:
    check(lambda: trained(lambda params: cls(params, lr=0.1, backend=backend, **options), torch.bfloat16))


def test_conversions_between_forms_of_storage() -> None:
    def run() -> Any:
        optimizer = Signum(parameters((40, 33)), state_dtype="fp32")
        train(optimizer, range(2))
        found = []
        for form in ("bf16", "int8", "fp32"):
            twin = Signum(parameters((40, 33)), state_dtype=form)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # says that the precision changes
                twin.load_state_dict(optimizer.state_dict())
            train(twin, (2,))
            optimizer = twin
            found.append(list(twin.state.values()))
        return found

    check(run)


def test_gradients_with_other_strides_and_parameters_with_gaps(tmp_path: Any) -> None:
    def run() -> Any:
        wide = torch.linspace(-1, 1, 80).view(4, 20)
        params = [nn.Parameter(wide[:, ::2]), nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))]
        optimizer = SignAdamPP(params, state_dtype="int8", confidence="adaptive")
        for _ in range(2):
            for param in params:
                param.grad = torch.linspace(-2, 1, param.numel()).view(param.t().shape).t()
            optimizer.step()
        optimizer.save_state(tmp_path / "state")
        optimizer.load_state(tmp_path / "state")
        return wide, [param.detach() for param in params], list(optimizer.state.values())

    check(run)


def step_in_backward(model: nn.Module, optimizer: Any) -> None:
    release_gradients(model, optimizer)


def step_on_the_host(model: nn.Module, optimizer: Any) -> None:
    offload(optimizer, device="cpu")


@pytest.mark.parametrize("prepare", [step_in_backward, step_on_the_host])
def test_ways_to_train(prepare: Callable[[nn.Module, Any], None]) -> None:
    def run() -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).bfloat16()
        optimizer = make(ROWS["sign_adam_pp-delayed"], model.parameters(), state_dtype="int4", param_storage="split8")
        prepare(model, optimizer)
        for step in range(3):
            optimizer.zero_grad()
            model(torch.full((2, 5), step + 1.0).bfloat16()).square().mean().backward()
            optimizer.step()
        return [param.detach() for param in model.parameters()], list(optimizer.state.values())

    check(run)


def test_out_of_place() -> None:
    model = nn.Linear(5, 2)

    def run() -> Any:
        params: Any = {name: torch.ones_like(param) for name, param in model.named_parameters()}
        functional = FunctionalOptimizer(SignAdamPP, lr=0.1, state_dtype="int2")
        state = functional.init(params)
        for _ in range(2):
            grads = grad(lambda p: functional_call(model, p, (torch.ones(1, 5),)).sum())(params)
            params, state = functional.step(params, grads, state)
        return params, state

    check(run)


@each_backend
@pytest.mark.parametrize("cls", [DistributedLion, DistributedSignAdamPP])
def test_votes(cls: Any, backend: str) -> None:
    def run() -> Any:
        params = parameters((40, 33), (7,))
        optimizer = cls(params, lr=0.1, backend=backend)
        train(optimizer, range(3))
        return [param.detach() for param in params], [list(state.items()) for state in optimizer.state.values()]

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        check(run)
    finally:
        dist.destroy_process_group()
