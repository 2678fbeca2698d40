"""Random training runs for the parity tests: what hypothesis draws, how it is built, what is compared."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from support.paper_formulas import TABLE, Row
from torch import Tensor

import signadam_ext
from signadam_ext.core.formats import PARAM_STORAGES
from signadam_ext.core.rule import rule_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Sizes around every border of the kernels: vectors, pieces, rows, chunks, units of threads.
SIZES = (
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    33,
    63,
    64,
    65,
    255,
    1023,
    1024,
    1025,
    2047,
    2048,
    2049,
    16383,
    16384,
)
LARGE_SIZES = (16385, 40_000, 70_001)
LAYOUTS = ("contiguous", "transposed", "channels_last", "offset", "gaps", "scalar")
#: Zeros of both signs, subnormals of each format, the largest finite, infinities, NaN.
SPECIALS = (0.0, -0.0, 1e-45, -1e-45, 1e-40, 6e-8, -6e-8, 3.4e38, -65504.0, torch.inf, -torch.inf, torch.nan)
#: Whether a gradient may have another dtype than its parameter.
MIXED_GRADIENTS = hasattr(torch.nn.Parameter(torch.zeros(1)), "grad_dtype")


@dataclass(frozen=True)
class TensorCase:
    size: int
    layout: str
    dtype: torch.dtype
    grad_dtype: torch.dtype
    grad_layout: str
    offset: int
    scale: float
    specials: bool
    group: int
    absent: frozenset[int] = field(default_factory=frozenset)


@dataclass(frozen=True)
class RunCase:
    """Some tensors in some groups, stepped a few times."""

    row: Row
    seed: int
    steps: int
    tensors: tuple[TensorCase, ...]
    groups: tuple[dict[str, Any], ...]


@st.composite
def tensor_cases(draw: st.DrawFn, groups: int, large: bool) -> TensorCase:
    dtype = draw(st.sampled_from(DTYPES))
    return TensorCase(
        size=draw(st.sampled_from(SIZES + LARGE_SIZES if large else SIZES) | st.integers(0, 600)),
        layout=draw(st.sampled_from(LAYOUTS)),
        dtype=dtype,
        grad_dtype=draw(st.sampled_from(DTYPES)) if MIXED_GRADIENTS else dtype,
        grad_layout=draw(st.sampled_from(("same", "same", "offset", "contiguous", "expanded"))),
        offset=draw(st.integers(0, 9)),
        scale=draw(st.sampled_from((1.0, 1.0, 1e-3, 1e-6, 1e4))),
        specials=draw(st.booleans()),
        group=draw(st.integers(0, groups - 1)),
        absent=draw(st.frozensets(st.integers(0, 3), max_size=2)),
    )


def hyperparameters(row: Row) -> st.SearchStrategy[dict[str, Any]]:
    """Overrides of a group, of the rule's own hyperparameters and the common ones."""
    unit = st.sampled_from((0.0, 0.5, 0.9, 0.99, 0.999)) | st.floats(0, 0.999)
    large = st.sampled_from((0.5, 0.9, 0.99, 0.999)) | st.floats(0.5, 0.999)
    second = large if row.optimizer is signadam_ext.Ano else unit.map(lambda beta: min(beta, row.largest_beta2))
    inside = row.optimizer in (signadam_ext.AdaBound, signadam_ext.AMSBound)
    own = {
        "alpha": st.sampled_from((0.0, 0.25, 0.5, 5e-4)) | st.floats(0, 2),
        "beta": unit,
        "betas": st.tuples(*(unit, second, unit)[: len(row.hyperparameters.get("betas", ()))]),
        "beta2": large,
        "gamma": st.floats(1e-6, 0.999) if inside else st.sampled_from((0.0, 0.025, 1.0)) | st.floats(0, 1),
        "nesterov": st.booleans(),
        "eps": st.sampled_from((1e-8, 1e-3, 0.0)),
        "epsilon": st.sampled_from((0.0, 1e-3, 0.25)) | st.floats(0, 2),
        "confidence_beta": unit,
        "bias_correct_variance": st.booleans(),
    }
    common = {
        "lr": st.sampled_from((1e-3, 0.1, 0.0)) | st.floats(0, 1),
        "weight_decay": st.sampled_from((0.0, 0.0, 0.1)) | st.floats(0, 1),
        "decoupled_weight_decay": st.booleans(),
        "weight_decay_kind": st.sampled_from((None, "coupled", "cautious", "cautious")),
        "maximize": st.booleans(),
    }
    mine = {name: strategy for name, strategy in own.items() if name in row.hyperparameters}
    storage = {
        "param_storage": st.sampled_from(tuple(PARAM_STORAGES)),
        "seed": st.sampled_from((0, 7, 2**64 - 1)),
    }
    if row.state_dtypes:
        storage["state_dtype"] = st.sampled_from(row.state_dtypes)
    group = st.fixed_dictionaries({}, optional={**common, **mine, **storage})
    return st.builds(lambda group, scale: {**group, **scale}, group, st.sampled_from(scales(row)))


def scales(row: Row) -> list[dict[str, Any]]:
    """What may multiply the steps of a rule; half of the time nothing does."""
    optimizer = row.optimizer([torch.nn.Parameter(torch.zeros(1))], **row.hyperparameters)
    rule = rule_of(row.optimizer, optimizer.param_groups[0])
    found = [{"lr_scale": "shape"}]
    if rule.threshold_pass == "NONE" and rule.confidence is None and not rule.reads_param:
        found.append({"lr_scale": "rms"})
        found += [] if rule.follows_gradient else [{"caution": "exact"}, {"caution": "delayed"}]
    return [{}] * len(found) + found


@st.composite
def run_cases(draw: st.DrawFn, rows: list[Row] = TABLE, large: bool = True) -> RunCase:
    row = draw(st.sampled_from(rows))
    groups = draw(st.lists(hyperparameters(row), min_size=1, max_size=3))
    tensors = draw(st.lists(tensor_cases(len(groups), large), min_size=1, max_size=5))
    return RunCase(row, draw(st.integers(0, 2**31)), draw(st.integers(1, 3)), tuple(tensors), tuple(groups))


def shape_of(case: TensorCase) -> tuple[int, ...]:
    """A shape of about ``case.size`` elements with the dimensions its layout needs."""
    if case.layout == "scalar":
        return ()
    if case.layout in ("transposed", "gaps"):
        return (3, case.size // 3)
    if case.layout == "channels_last":
        return (2, 3, 2, case.size // 12)
    return (case.size,)


def values(shape: tuple[int, ...], case: TensorCase, generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator) * case.scale
    if case.specials and x.numel() > 0:
        flat = x.view(-1)
        count = 1 + flat.numel() // 4
        where = torch.randperm(flat.numel(), generator=generator)[:count]
        which = torch.randint(len(SPECIALS), (count,), generator=generator)
        flat[where] = torch.tensor(SPECIALS)[which]
    return x


def laid_out(x: Tensor, layout: str, offset: int, dtype: torch.dtype, device: str) -> Tensor:
    """``x`` as a tensor of that layout: the same numbers, other strides or another address."""
    x = x.to(dtype)
    if layout == "transposed":
        return x.t().contiguous().to(device).t()
    if layout == "channels_last":
        return x.to(device).to(memory_format=torch.channels_last)
    if layout == "gaps":
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=dtype, device=device)
        wide[..., 1::2] = x.to(device)
        return wide[..., 1::2]
    if layout == "offset":
        flat = torch.zeros(x.numel() + offset, dtype=dtype, device=device)
        flat[offset:] = x.to(device).reshape(-1)
        return flat[offset:].view(x.shape)
    return x.to(device)


def gradient(case: TensorCase, param: Tensor, generator: torch.Generator) -> Tensor:
    x = values(tuple(param.shape), case, generator)
    if case.grad_layout == "expanded" and x.numel() > 0:
        x = x.reshape(-1)[:1].to(case.grad_dtype).to(param.device)
        return x.expand(param.shape) if param.dim() else x[0]
    if case.grad_layout == "offset":
        return laid_out(x, "offset", case.offset, case.grad_dtype, str(param.device))
    if case.grad_layout == "contiguous":
        return x.to(case.grad_dtype).to(param.device)
    like = torch.empty_like(param, dtype=case.grad_dtype)
    return like.copy_(x.to(case.grad_dtype))


def train(case: RunCase, backend: str, device: str) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """The run on a backend: parameters afterwards, and the optimizer."""
    generator = torch.Generator().manual_seed(case.seed)
    params = []
    for tensor in case.tensors:
        x = values(shape_of(tensor), tensor, generator)
        param = torch.nn.Parameter(laid_out(x, tensor.layout, tensor.offset, tensor.dtype, device))
        if tensor.grad_dtype != tensor.dtype:
            param.grad_dtype = tensor.grad_dtype
        params.append(param)
    groups = []
    for i, group in enumerate(case.groups):
        own = [p for p, tensor in zip(params, case.tensors, strict=True) if tensor.group == i]
        if group.get("param_storage", "").startswith("split") and any(p.dtype != torch.bfloat16 for p in own):
            group = {**group, "param_storage": "stochastic"}  # the nearest that every dtype has
        groups.append({"params": own, **group})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* momentum with beta")
        optimizer = case.row.optimizer(groups, backend=backend, **case.row.hyperparameters)
    for step in range(case.steps):
        for param, tensor in zip(params, case.tensors, strict=True):
            grad = gradient(tensor, param, generator)
            param.grad = None if step in tensor.absent else grad
            if case.row.reads_variance:
                param.grad_variance = gradient(replace(tensor, grad_dtype=torch.float32), param, generator)
        optimizer.step()
    return params, optimizer


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bits, the sign of zero included; NaN equals NaN whatever its payload."""
    a, b = a.detach().cpu(), b.detach().cpu()
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    signs = torch.equal(torch.signbit(a) & ~a.isnan(), torch.signbit(b) & ~b.isnan())
    return signs and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def assert_parity(case: RunCase, backend: str, device: str) -> None:
    """The run on ``backend`` leaves the bits that the reference on the CPU leaves, in parameters and all state."""
    params, optimizer = train(case, backend, device)
    expected_params, reference = train(case, "reference", "cpu")
    for i, (param, expected) in enumerate(zip(params, expected_params, strict=True)):
        assert same_bits(param, expected), f"parameter {i} differs"
        state, expected_state = optimizer.state[param], reference.state[expected]
        assert state.keys() == expected_state.keys()
        for name, value in state.items():
            if not isinstance(value, Tensor):
                assert value == expected_state[name]
                continue
            assert same_bits(value, expected_state[name]), f"{name} of parameter {i} differs"
            if value.dim() > 0 and f"{name}_kind" not in state:
                like = torch.empty_like(param, device="meta")
                assert value.stride() == like.stride()
