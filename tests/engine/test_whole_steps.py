"""A step is taken as a whole or not at all."""

from __future__ import annotations

import gc
import signal
import threading
import weakref
from typing import Any

import pytest
import torch
from fuzzer_failures import at_point
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from signadam_ext import Adam, AdamW, ScheduleFreeAdamW, SignAdamPP, Signum, release_gradients

FORMATS: list[tuple[Any, dict[str, Any]]] = [
    (SignAdamPP, {}),
    (SignAdamPP, {"state_dtype": "int2", "param_storage": "stochastic", "confidence": "sparsity", "target": 0.5}),
    (Signum, {"state_dtype": "int8", "param_storage": "split16"}),
    (Adam, {"param_storage": "master"}),
    (ScheduleFreeAdamW, {}),
]
NAMES = ["plain", "int2", "int8", "master", "sums"]
form = pytest.mark.parametrize("cls, options", FORMATS, ids=NAMES)
both = pytest.mark.parametrize("backend", ["cpu", "reference"])
#: The reference calls torch hundreds of times for codes: the quick run takes the forms without any.
backend_and_form = pytest.mark.parametrize(
    "cls, options, backend",
    [
        pytest.param(*row, backend, id=f"{backend}-{name}", marks=pytest.mark.thorough if slow else ())
        for backend in ("cpu", "reference")
        for row, name in zip(FORMATS, NAMES, strict=True)
        for slow in [backend == "reference" and name in ("int2", "int8")]
    ],
)


class OutOfMemory(TorchDispatchMode):
    """Fails at the n-th operation that makes a tensor."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.left -= bool(function._schema.returns) and not any(x.alias_info for x in function._schema.returns)
        if self.left == 0:
            raise RuntimeError("not enough memory")
        return function(*args, **(kwargs or {}))


def make(cls, options, backend: str, steps: int, gaps: bool = False):
    dtype = torch.bfloat16 if "param_storage" in options else torch.float32
    base = torch.zeros(8, 10, dtype=dtype)
    params = [
        nn.Parameter(base[:, ::2] if gaps else torch.ones(9, dtype=dtype)),
        nn.Parameter(torch.ones(3, dtype=dtype)),
    ]
    optimizer = cls(params, lr=0.125, backend=backend, **options)
    for param in params:
        param.grad = torch.linspace(-2, 1, param.numel()).view(param.shape).to(dtype)
    for _ in range(steps):
        optimizer.step()
    return params, optimizer


def seen(params, optimizer) -> str:
    """All that a step writes; state as it lies in memory, and what groups keep of a step."""
    state = [
        {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state.get(p, {}).items()}
        for p in params
    ]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return str([[p.tolist() for p in params], [p._version for p in params], state, len(optimizer.state), groups])


@backend_and_form
@pytest.mark.parametrize("steps", [0, 2])
def test_out_of_memory_at_any_place(cls, options, backend, steps):
    params, optimizer = make(cls, options, backend, steps)
    before = seen(params, optimizer)
    for n in range(1, 1000):
        try:
            with OutOfMemory(n):
                optimizer.step()
            break
        except RuntimeError as error:
            assert "not enough memory" in str(error)
            assert seen(params, optimizer) == before
    else:
        raise AssertionError("the step never got through")
    expected = make(cls, options, backend, steps + 1)
    assert seen(params, optimizer) == seen(*expected)


@form
@both
@pytest.mark.parametrize("gaps", [False, True], ids=["dense", "gaps"])
def test_interrupts(cls, options, backend, gaps):
    """A signal handler that raises, at many places of first and later steps."""

    class Interrupted(Exception):
        pass

    armed: list[bool] = []

    def handler(*_: object) -> None:
        if armed:
            raise Interrupted

    old = signal.signal(signal.SIGALRM, handler)
    try:
        for steps in (0, 2):
            after = seen(*make(cls, options, backend, steps + 1, gaps))
            interrupted = 0
            for k in range(1, 60):
                params, optimizer = make(cls, options, backend, steps, gaps)
                before = seen(params, optimizer)
                try:
                    armed.append(True)
                    signal.setitimer(signal.ITIMER_REAL, k * 20e-6)
                    optimizer.step()
                    armed.clear()
                except Interrupted:
                    interrupted += 1
                    armed.clear()
                signal.setitimer(signal.ITIMER_REAL, 0)
                assert seen(params, optimizer) in (before, after)
                assert torch.is_grad_enabled()
            assert interrupted > 0
    finally:
        signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize(
    ("backend", "released"),
    [
        pytest.param("cpu", False, id="step-cpu"),
        pytest.param("cpu", True, id="released-cpu"),
        pytest.param("reference", False, id="step-reference"),
        pytest.param("reference", True, id="released-reference", marks=pytest.mark.thorough),
    ],
)
def test_an_interrupted_step_owns_nothing(backend, released):
    """At every place of a step whose plan is made: what its user drops after the interrupt is freed."""
    params, optimizer = make(*FORMATS[0], backend, 1)
    if released:
        optimizer.zero_grad()
        release_gradients(params, optimizer)

    def step() -> None:
        if released:
            sum((p * p.detach()).sum() for p in params).backward()
        else:
            optimizer.step()

    for n in range(1, 10_000):
        for p in params:
            p.grad = None if released else torch.ones_like(p)
        step()
        for p in params:
            p.grad = None if released else torch.ones_like(p)
        where, points = at_point(step, n)
        grads = [weakref.ref(p.grad) for p in params if p.grad is not None]
        optimizer.zero_grad()
        if any(ref() is not None for ref in grads):
            gc.collect()
        assert all(ref() is None for ref in grads), where
        if points < n:
            break
    else:
        raise AssertionError("the step never got through")


@both
def test_two_threads_take_turns(backend):
    params, optimizer = make(Adam, {}, backend, 1)
    done = [1]

    def work() -> None:
        for _ in range(20):
            optimizer.step()
            done.append(1)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 41
    assert seen(params, optimizer) == seen(*make(Adam, {}, backend, 41))


def test_a_step_inside_a_step():
    nested: list[Exception] = []

    def confidence(g: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        try:
            optimizer.step()
        except RuntimeError as error:
            nested.append(error)
        return g.sign()

    params, optimizer = make(SignAdamPP, {"confidence": confidence}, "auto", 0)
    optimizer.step()
    assert len(nested) == 2 and "inside another one" in str(nested[0])
    assert [float(optimizer.state[p]["step"]) for p in params] == [1, 1]


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 waits for itself in a hook's own backward")
def test_a_backward_inside_a_released_step():
    """Is an error, and no deadlock."""
    model = nn.Linear(2, 2)

    def confidence(g: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            model(torch.ones(1, 2)).sum().backward()
        return g.sign()

    optimizer = SignAdamPP(model.parameters(), confidence=confidence)
    release_gradients(model, optimizer)
    before = [p.tolist() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="step of this optimizer was begun inside another one"):
        model(torch.ones(1, 2)).sum().backward()
    assert [p.tolist() for p in model.parameters()] == before


@both
def test_an_exception_of_a_confidence_function(backend):
    calls = []

    def confidence(g: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) % 2 == 0:
            raise KeyError("mine")
        return g.sign()

    params, optimizer = make(SignAdamPP, {"confidence": confidence}, backend, 0)
    before = seen(params, optimizer)
    with pytest.raises(KeyError, match="mine"):
        optimizer.step()
    assert seen(params, optimizer) == before


def test_a_compiled_step():
    torch._dynamo.reset()

    def run(compiled: bool):
        params, optimizer = make(AdamW, {}, "auto", 0)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(3):
            step()
        return seen(params, optimizer)

    assert run(True) == run(False)
