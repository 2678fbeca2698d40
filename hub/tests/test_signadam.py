"""The optimizers against formulas in plain torch operations, and, where signadam_ext is installed, its reference.

Without a GPU: ``TRITON_INTERPRET=1 python -m pytest tests``.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from kernels import get_local_kernel
from torch import Tensor

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SHAPES = ((3,), (5, 7), (2, 3, 2, 2), (0,), (), (33, 70))
#: Of more chunks than one, where what is computed of a gradient comes from all of them.
LARGE = (16384 + 5,)


@pytest.fixture(scope="module")
def signadam() -> ModuleType:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU, and TRITON_INTERPRET is not 1")
    return get_local_kernel(Path(__file__).parents[1])


def parameters(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in (*SHAPES, *shapes)]
    made[2] = made[2].contiguous(memory_format=torch.channels_last)
    return [torch.nn.Parameter(x.to(DEVICE)) for x in made]


def give_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    """To all parameters but one, in a memory order that is not always the parameter's."""
    generator = torch.Generator().manual_seed(step)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator).to(param.dtype).to(DEVICE)
        param.grad = None if i == 1 and step == 2 else grad


def bits(x: Tensor) -> list[int]:
    """Of the elements in the order of memory."""
    integers = {4: torch.int32, 2: torch.int16, 1: torch.int8, 8: torch.int64}[x.element_size()]
    return x.detach().cpu().view(integers).flatten().tolist()


def test_signum_is_its_formula(signadam: ModuleType) -> None:
    params = parameters(torch.float32)
    expected = [(p.detach().clone(), torch.zeros_like(p)) for p in params]
    optimizer = signadam.Signum(params, lr=0.1, betas=(0.75,))
    for step in range(1, 4):
        give_gradients(params, step)
        optimizer.step()
        for param, (p, m) in zip(params, expected, strict=True):
            if param.grad is not None:
                m.mul_(0.75).add_(0.25 * param.grad)
                p.sub_(torch.tensor(0.1) * m.sign())
    assert [bits(p) for p in params] == [bits(p) for p, _ in expected]


#: Every method, ways to store state and parameters, and thresholds.
CASES: tuple[tuple[str, torch.dtype, dict[str, Any]], ...] = (
    ("SignSGD", torch.float32, {"alpha": 0.3, "weight_decay": 0.1, "maximize": True}),
    ("Signum", torch.bfloat16, {"state_dtype": "int8", "param_storage": "master"}),
    ("SignAdam", torch.float32, {"weight_decay": 0.1, "decoupled_weight_decay": False}),
    ("SignAdam", torch.bfloat16, {"state_dtype": "int4", "param_storage": "split16"}),
    ("SignAdam", torch.float16, {"second_moment": "analytic", "param_storage": "stochastic"}),
    ("SignAdamPP", torch.bfloat16, {"state_dtype": "int2", "param_storage": "stochastic", "seed": 2**40 + 1}),
    ("SignAdamPP", torch.bfloat16, {"state_dtype": "int4", "param_storage": "split8", "confidence": "adaptive"}),
    ("SignAdamPP", torch.float32, {"confidence": "adaptive_delayed", "state_dtype": "bf16"}),
    ("SignAdamPP", torch.float32, {"confidence": "sparsity", "target": 0.2}),
    ("Lion", torch.float32, {"weight_decay": 0.1}),
    ("MSGD", torch.float16, {"param_storage": "nearest"}),
    ("Adam", torch.float32, {"amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", torch.bfloat16, {"state_dtype": "bf16", "param_storage": "stochastic"}),
)


@pytest.mark.filterwarnings("ignore:.*variance:UserWarning")
@pytest.mark.parametrize("name, dtype, options", CASES, ids=lambda value: str(value).replace(" ", ""))
def test_bits_are_those_of_the_reference(
    signadam: ModuleType, name: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    reference = getattr(pytest.importorskip("signadam_ext"), name)
    shapes = (LARGE,) if options.get("confidence") == "adaptive" else ()
    params, others = parameters(dtype, *shapes), parameters(dtype, *shapes)
    ours = getattr(signadam, name)(params, lr=0.1, **options)
    theirs = reference(others, lr=0.1, backend="reference", **options)
    for step in range(1, 4):
        for optimizer, tensors in ((ours, params), (theirs, others)):
            give_gradients(tensors, step)
            optimizer.step()
        if step == 2:  # goes on from what a checkpoint holds
            saved = ours.state_dict()
            ours = getattr(signadam, name)(params, lr=0.1, **options)
            ours.load_state_dict(saved)
    assert [bits(p) for p in params] == [bits(p) for p in others]
    for param, other in zip(params, others, strict=True):
        for key, value in ours.state[param].items():
            if isinstance(value, Tensor):
                assert bits(value) == bits(theirs.state[other][key]), key
    assert [p._version for p in params] == [p._version for p in others]


def test_what_cannot_be_served_is_refused(signadam: ModuleType) -> None:
    param = torch.nn.Parameter(torch.zeros(4, device=DEVICE))
    with pytest.raises(TypeError, match="unexpected keyword argument 'state_dtyp'"):
        signadam.Signum([param], state_dtyp="int8")
    with pytest.raises(ValueError, match="this momentum has no bound"):
        signadam.Signum([param], state_dtype="int2")
    with pytest.raises(ValueError, match=r"is for torch\.bfloat16"):
        signadam.Signum([param], param_storage="split8")
    with pytest.raises(TypeError, match=r"a parameter is torch\.float64"):
        signadam.Signum([torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))])
    with pytest.raises(ValueError, match="has gaps"):
        signadam.Signum([torch.nn.Parameter(torch.zeros(4, 4, device=DEVICE)[:, :2])])
    optimizer = signadam.Signum([param], lr=-1.0)
    param.grad = torch.ones(4, device=DEVICE)
    with pytest.raises(ValueError, match="lr"):
        optimizer.step()
    assert param.tolist() == [0.0] * 4


def test_nothing_of_the_package_is_needed(signadam: ModuleType) -> None:
    """Modules of this kernel import each other and no installed package of that name."""
    folder = Path(signadam.__file__).parent
    for path in folder.rglob("*.py"):
        assert "from signadam_ext" not in path.read_text("utf-8"), path
    assert importlib.import_module(signadam.__name__) is signadam
