"""The CUDA kernels' own text, run on the host block by block, against the reference bit for bit.

Blocks and threads run in several orders, tensors lie at any address, values include every special one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from host.toolchain import build, rules
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from signadam_ext import _C, reference
from signadam_ext.dtypes import FORMATS
from signadam_ext.rule import Scalars, common_scalars

DTYPES = tuple(FORMATS)
MOMENTS = {name: rule.moments for name, rule in rules().items()}
#: Every kernel; the exact form's first launch serves any gated rule.
KERNELS = [
    *((rule, "NONE") for rule in _C.RULES),
    ("sign_adam_pp", "GATHER"),
    ("sign_adam_pp", "ONLY"),
    ("sign_sgd", "ONLY"),
]
#: Around every border: vectors, pieces, rows, chunks.
SIZES = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 255, 2047, 2048, 2049, 4099, 16383, 16384, 16385)
LARGE_SIZES = (2 * 16384, 3 * 16384 + 2057)
#: Zeros of both signs, subnormals and largest finite values of each format, ties of rounding, infinities, NaN.
SPECIALS = (
    *(0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-40, 2.0**-126, 6e-8, -6e-8, 3e-8, 2.0**-14, 65504.0, -65519.99, 65520.0),
    *(3.4028234e38, -3.4028234e38, 1.00390625, 1.00048828125, torch.inf, -torch.inf, torch.nan),
)
GUARD = 8


class TensorArguments(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("param", "exp_avg", "exp_avg_sq", "exp_avg_std", "grad"),
            *("numel", "param_format", "grad_format", "row"),
        )
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("host") / "libcuda_on_host.so"
    return ctypes.CDLL(str(build("cuda_on_host.cpp", target, "-O2", "-shared", "-fPIC")))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The reference is many small operations: on a busy machine each would wait for the last of several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class TensorCase:
    size: int
    dtype: torch.dtype
    grad_dtype: torch.dtype
    offsets: tuple[int, int, int]  # of parameter, gradient and moments, in elements from an aligned address
    scale: float
    specials: bool
    present: bool
    group: int


@dataclass(frozen=True)
class Case:
    seed: int
    order: int  # of blocks and threads: forward, reversed, shuffled
    steps: int
    groups: tuple[Scalars, ...]
    tensors: tuple[TensorCase, ...]


@st.composite
def groups(draw: st.DrawFn) -> Scalars:
    """A row of scalars, by the package's own expressions where it has them."""
    unit = st.sampled_from((0.0, 0.9, 0.999)) | st.floats(0, 0.999)
    beta1, beta2, confidence_beta = draw(unit), draw(unit), draw(unit)
    group = {
        "lr": draw(st.sampled_from((0.0, 1e-3, 1.0)) | st.floats(1e-12, 10)),
        "weight_decay": draw(st.sampled_from((0.0, 0.1)) | st.floats(1e-12, 2)),
        "decoupled_weight_decay": draw(st.booleans()),
        "maximize": draw(st.booleans()),
    }
    return {
        **common_scalars(group),
        "alpha": draw(st.sampled_from((0.0, 0.5, 1.0, 1e-40)) | st.floats(0, 3)),
        "beta1": beta1,
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "eps": draw(st.sampled_from((0.0, 1e-8, 1e-3))),
        "denominator": draw(st.sampled_from((0.1, 1.0)) | st.floats(1e-9, 2)),
        "confidence_beta": confidence_beta,
        "one_minus_confidence_beta": 1 - confidence_beta,
    }


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows = tuple(draw(st.lists(groups(), min_size=1, max_size=2)))
    tensors = st.builds(
        TensorCase,
        size=st.sampled_from(SIZES) | st.integers(0, 300) | st.sampled_from(LARGE_SIZES),
        dtype=st.sampled_from(DTYPES),
        grad_dtype=st.sampled_from(DTYPES),
        offsets=st.tuples(*3 * [st.sampled_from((0, 0, 1, 2, 3, 4, 5, 6, 7))]),
        scale=st.sampled_from((1.0, 1.0, 1e-6, 1e4, 1e-39)),
        specials=st.booleans(),
        present=st.sampled_from((True, True, True, False)),
        group=st.integers(0, len(rows) - 1),
    )
    return Case(
        seed=draw(st.integers(0, 2**31)),
        order=draw(st.integers(0, 2)),
        steps=draw(st.integers(1, 2)),
        groups=rows,
        tensors=tuple(draw(st.lists(tensors, min_size=1, max_size=4))),
    )


def values(case: TensorCase, count: int, generator: torch.Generator, threshold: float = 0.0) -> Tensor:
    """fp32 numbers; where specials are asked for, also these and the threshold, which the gate must drop."""
    x = torch.randn(count, generator=generator) * case.scale
    if case.specials and count > 0:
        special = torch.tensor((*SPECIALS, threshold, -threshold))
        where = torch.rand(count, generator=generator) < 0.3
        x[where] = special[torch.randint(len(special), (int(where.sum()),), generator=generator)]
    return x


class Operand:
    """A view into memory of its own, ``offset`` elements from an aligned address, with a guard on both sides."""

    def __init__(self, x: Tensor, dtype: torch.dtype, offset: int):
        filled = torch.full((GUARD + offset + x.numel() + GUARD,), -77.0, dtype=dtype)
        self.memory = filled
        self.view = filled[GUARD + offset :][: x.numel()]
        assert filled.data_ptr() % 16 == 0
        self.view.copy_(x)

    def clone(self) -> Operand:
        copy = object.__new__(Operand)
        copy.memory = self.memory.clone()
        copy.view = copy.memory.as_strided(self.view.shape, (1,), self.view.storage_offset())
        return copy

    def equals(self, other: Operand) -> bool:
        return same_bits(self.memory, other.memory)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, but for the payload of NaN."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a.view(integer)[~nan], b.view(integer)[~nan])


@dataclass
class State:
    param: Operand
    moments: list[Operand]
    exp_avg_std: Tensor | None

    def clone(self) -> State:
        deviation = None if self.exp_avg_std is None else self.exp_avg_std.clone()
        return State(self.param.clone(), [moment.clone() for moment in self.moments], deviation)


def check(library: ctypes.CDLL, rule: str, statistics: str, case: Case) -> None:
    generator = torch.Generator().manual_seed(case.seed)
    expected = []
    for tensor in case.tensors:
        param = Operand(values(tensor, tensor.size, generator), tensor.dtype, tensor.offsets[0])
        moments = [values(tensor, tensor.size, generator) for _ in range(MOMENTS[rule])]
        if len(moments) > 1:
            moments[1] = moments[1].abs()
        deviation = None if statistics == "NONE" else torch.rand((), dtype=torch.float64, generator=generator)
        states = [Operand(moment, torch.float32, tensor.offsets[2]) for moment in moments]
        expected.append(State(param, states, deviation))
    actual = [state.clone() for state in expected]

    for step in range(case.steps):
        arguments, grads = [], []
        for tensor, want, got in zip(case.tensors, expected, actual, strict=True):
            scalars = case.groups[tensor.group]
            threshold = scalars["alpha"] * (1.0 if want.exp_avg_std is None else want.exp_avg_std.item())
            grad = Operand(values(tensor, tensor.size, generator, threshold), tensor.grad_dtype, tensor.offsets[1])
            addresses = [moment.view.data_ptr() for moment in got.moments] + [0, 0]
            arguments.append(
                TensorArguments(
                    param=got.param.view.data_ptr(),
                    exp_avg=addresses[0],
                    exp_avg_sq=addresses[1],
                    exp_avg_std=0 if got.exp_avg_std is None else got.exp_avg_std.data_ptr(),
                    grad=grad.view.data_ptr() if tensor.present else 0,
                    numel=tensor.size,
                    param_format=FORMATS[tensor.dtype],
                    grad_format=FORMATS[tensor.grad_dtype],
                    row=tensor.group,
                )
            )
            grads.append((grad, grad.clone()))
            if tensor.present and tensor.size > 0:
                reference.update(
                    getattr(reference, rule),
                    statistics,
                    scalars,
                    want.param.view,
                    grad.view,
                    tuple(moment.view for moment in want.moments),
                    want.exp_avg_std,
                )
        rows = np.array([[group[name] for name in _C.SCALARS] for group in case.groups])
        status = library.cuda_on_host(
            _C.RULES.index(rule),
            getattr(_C.Statistics, statistics).value,
            ctypes.c_int64(len(arguments)),
            (TensorArguments * len(arguments))(*arguments),
            ctypes.c_int64(len(rows)),
            ctypes.c_void_p(rows.ctypes.data),
            case.order,
            ctypes.c_uint32(case.seed + step),
        )
        assert status == 0
        for tensor, want, got, (grad, untouched) in zip(case.tensors, expected, actual, grads, strict=True):
            assert got.param.equals(want.param), (step, tensor, "param")
            for name, got_moment, want_moment in zip(("m", "v"), got.moments, want.moments, strict=False):
                assert got_moment.equals(want_moment), (step, tensor, name)
            if got.exp_avg_std is not None:
                assert same_bits(got.exp_avg_std, want.exp_avg_std), (step, tensor, got.exp_avg_std, want.exp_avg_std)
            assert grad.equals(untouched), (step, tensor, "gradient")


@pytest.mark.parametrize(("rule", "statistics"), KERNELS)
def test_equals_the_reference(library: ctypes.CDLL, rule: str, statistics: str) -> None:
    @given(case=cases())
    def run(case: Case) -> None:
        check(library, rule, statistics, case)

    run()


def test_deviation_of_many_chunks(library: ctypes.CDLL) -> None:
    """Blocks in every order: the last to arrive is another one each time, the deviation is not."""
    tensor = TensorCase(40 * 16384 + 5, torch.float32, torch.float32, (1, 0, 0), 1.0, False, True, 0)
    scalars = dict.fromkeys(_C.SCALARS, 0.5) | {"coupled": 0.0, "maximize": 0.0, "decay": 1.0}
    for order in range(3):
        check(library, "sign_adam_pp", "GATHER", Case(3, order, 2, (scalars,), (tensor,)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_widening_every_pattern(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    wide = torch.empty(2**16)
    convert(library.widen_all, dtype, patterns, wide)
    assert same_bits(wide, patterns.view(dtype).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrowing(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Every upper half of an fp32 with lower halves around every border of rounding: down, tie, up."""
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    # bf16 drops 16 bits, a normal fp16 13; a subnormal fp16 drops up to 24, whose ties have zeros below.
    lower = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x2FFF, 0x3000, 0x3001]
    lower += [0x4000, 0x7FFF, 0x8000, 0x8001, 0xC000, 0xE000, 0xEFFF, 0xF000, 0xF001, 0xFFFF]
    generator = torch.Generator().manual_seed(1)
    patterns = torch.cat([upper | low for low in lower] + [torch.randint(2**32, (2**20,), generator=generator)])
    x = patterns.to(torch.int32).view(torch.float32)
    narrowed = torch.empty(len(x), dtype=torch.int16)
    convert(library.narrow_all, dtype, x, narrowed)
    assert same_bits(narrowed.view(dtype), x.to(dtype))


def convert(function: Callable[..., None], dtype: torch.dtype, source: Tensor, target: Tensor) -> None:
    addresses = (ctypes.c_void_p(x.data_ptr()) for x in (source, target))
    function(FORMATS[dtype], ctypes.c_int64(len(source)), *addresses)


def test_there_is_no_kernel_for_what_no_rule_does(library: ctypes.CDLL) -> None:
    status = library.cuda_on_host(
        _C.RULES.index("signum"),
        _C.Statistics.GATHER.value,
        *(ctypes.c_int64(0), (TensorArguments * 0)(), ctypes.c_int64(0), None),
        *(0, ctypes.c_uint32(0)),
    )
    assert status == 1
