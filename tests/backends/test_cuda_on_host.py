"""The CUDA kernels' own text, run on the host block by block, against the reference bit for bit; and the CPU backend.

Blocks and threads run in several orders, tensors lie at any address and in any storage form, values include every
special one. The quick run takes one of the rules that share code.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.toolchain import QUICK, build, fixed_kernels, quick_fixed_kernels, quick_rules, rules
from torch import Tensor

from reporting.machine_code import KernelName, kernel_label
from signadam_ext import _C, backends
from signadam_ext.backends import Bucket, Entry
from signadam_ext.backends.cuda import SCALINGS
from signadam_ext.core import formats
from signadam_ext.core.formats import (
    BF16,
    BOUNDED,
    DTYPE_FORMATS,
    RESIDUALS,
    UNBOUNDED,
    Format,
    effective_param_storage,
)
from signadam_ext.core.rule import Rule, Scalars
from signadam_ext.core.shard_index import ShardIndex

DTYPES = tuple(DTYPE_FORMATS)
FUNCTORS = rules()
FUNCTORS_BY_STRUCT = {rule.struct: rule for rule in FUNCTORS.values()}
#: Every kernel; the exact form's first launch serves any gated rule.
KERNELS = [
    *((rule, "NONE") for rule in _C.RULES),
    ("sign_adam_pp", "SAME_PASS"),
    ("sign_adam_pp", "PASS_BEFORE"),
    ("sign_sgd", "PASS_BEFORE"),
]
each_kernel = pytest.mark.parametrize(
    ("rule", "threshold_pass"),
    [
        pytest.param(*kernel, id="-".join(kernel), marks=() if kernel[0] in quick_rules() else pytest.mark.thorough)
        for kernel in KERNELS
    ],
)
#: Around every border: vectors, pieces, runs of codes, rows, chunks.
SIZES = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 255, 1025, 2047, 2048, 2049, 4099, 16383, 16384, 16385)
LARGE_SIZES = (2 * 16384, 3 * 16384 + 2057)
#: Zeros of both signs, subnormals and largest finite values of each format, ties of rounding, infinities, NaN.
SPECIALS = (
    *(0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-40, 2.0**-126, 6e-8, -6e-8, 3e-8, 2.0**-14, 65504.0, -65519.99, 65520.0),
    *(3.4028234e38, -3.4028234e38, 1.00390625, 1.00048828125, torch.inf, -torch.inf, torch.nan),
)
#: Index of a tensor's first element in the unsharded one: odd, no multiple of four, and where random keys change.
SHARD_OFFSETS = (0, 0, 1, 2, 3, 5, 32, 2**31 - 1, 2**32 - 6, *(2**33 - n for n in (1, 2, 7, 8, 33, 1021, 1024, 16383)))
#: How a parameter of each dtype may be kept.
PARAM_STORAGES = {
    torch.float32: ("nearest",),
    torch.bfloat16: ("nearest", "stochastic", "split16", "split8", "master"),
    torch.float16: ("nearest", "stochastic", "master"),
}
GUARD = 64


@pytest.fixture(scope="module")
def library(built_once: Callable[..., Path], thorough: bool) -> ctypes.CDLL:
    flags = ("-O2", "-shared", "-fPIC", *(() if thorough else QUICK))
    folder = built_once("cuda_on_host", lambda folder: build("cuda_on_host.cpp", folder / "library.so", *flags))
    return ctypes.CDLL(str(folder / "library.so"))


@pytest.fixture(scope="module")
def fixed_library(built_once: Callable[..., Path], thorough: bool) -> ctypes.CDLL:
    """The kernels for fixed forms alone. Not optimized: there are many, and each runs once or twice."""
    flags = ("-O0", "-shared", "-fPIC", "-DSIGNADAM_FIXED", *(() if thorough else QUICK))
    folder = built_once("fixed_on_host", lambda folder: build("cuda_on_host.cpp", folder / "library.so", *flags))
    return ctypes.CDLL(str(folder / "library.so"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The reference is many small operations: on a busy machine each would wait for the last of several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Preparer(Protocol):
    name: str

    def prepare(self, bucket: Bucket, grad: Callable[[int], Tensor]) -> Callable[[Sequence[tuple[float, ...]]], None]:
        """As of a backend."""


#: Scalars as kernels take them, in csrc/core/scalars.h: doubles, floats, flags.
DOUBLES = ("alpha", "confidence_beta", "one_minus_confidence_beta", "target", "gain", "quantile")
FLAGS = ("coupled", "cautious_decay", "scales", "caution", "clips", "steers")
FLOATS = tuple(name for name in _C.SCALARS if name not in (*DOUBLES[1:], *FLAGS))


def assert_same_step(table: Any, rows: Sequence[tuple[float, ...]], step: np.ndarray, offsets: Sequence[int]) -> None:
    """The CUDA backend writes what the step's data for Triton holds, in a layout of its own."""
    own = np.full(table.cuda_step_bytes(scalar_sets=len(rows)), 0xA5, dtype=np.uint8)
    table.write_cuda_step(scalars=rows, address=own.ctypes.data)
    expected = []
    for row in rows:
        named = dict(zip(_C.SCALARS, row, strict=True))
        expected.append(np.array([named[name] for name in DOUBLES]).tobytes())
        with np.errstate(over="ignore"):
            expected.append(np.array([named[name] for name in FLOATS]).astype(np.float32).tobytes())
        expected.append(np.array([named[name] != 0 for name in FLAGS], dtype=np.uint32).tobytes())
    grads, rng_keys, numbers = (
        step[at : at + size * len(table)].tobytes() for at, size in zip(offsets, (8, 8, 4), strict=False)
    )
    plain = len(b"".join(expected)) + 12 * len(table) == own.size  # which draws no random bits
    assert own.tobytes() == b"".join([*expected, grads, b"" if plain else rng_keys, numbers])


@dataclass
class CudaOnHost:
    """The backend of the kernels: they get the bytes of table and step that a device would get."""

    library: ctypes.CDLL
    order: int  # of blocks and threads: forward, reversed, shuffled
    seed: int
    name: str = "cuda_on_host"

    def prepare(self, bucket: Bucket, grad: Callable[[int], Tensor]) -> Callable[[Sequence[tuple[float, ...]]], None]:
        table = bucket.table

        def launch(rows: Sequence[tuple[float, ...]]) -> None:
            *offsets, size = _C.step_layout(tensors=len(table), scalar_sets=len(rows))
            step = np.full(size, 0xA5, dtype=np.uint8)
            table.write_step(scalars=rows, address=step.ctypes.data)
            assert not any(offset % 16 for offset in offsets)
            if _C.build_info()["cuda"] is not None:
                assert_same_step(table, rows, step, offsets)
            device_table = np.frombuffer(table.device_bytes(), dtype=np.uint8).copy()
            status = self.library.cuda_on_host(
                _C.RULES.index(bucket.rule.name),
                getattr(_C.ThresholdPass, bucket.rule.threshold_pass).value,
                SCALINGS[bucket.rule.update_scale].value,
                *(ctypes.c_int64(len(table)), ctypes.c_int64(table.chunks)),
                *(ctypes.c_void_p(device_table.ctypes.data), ctypes.c_int64(device_table.size)),
                ctypes.c_void_p(step.ctypes.data),
                *((ctypes.c_int64 * 4)(*offsets), ctypes.c_int64(len(rows))),
                None if bucket.chunk_statistics is None else ctypes.c_void_p(bucket.chunk_statistics.data_ptr()),
                *(self.order, ctypes.c_uint32(self.seed)),
            )
            assert status == 0

        return launch


@dataclass(frozen=True)
class TensorCase:
    size: int
    dtype: torch.dtype
    grad_dtype: torch.dtype
    state_dtype: tuple[str, ...] = ()
    param_storage: str = "nearest"
    #: Of parameter, gradient, moments and what lies beside the parameter, in elements from an aligned address.
    offsets: tuple[int, int, int, int] = (0, 0, 0, 0)
    scale: float = 1.0
    specials: bool = False
    present: bool = True
    group: int = 0
    seed: int = 0
    param_id: int = 0
    shard_offset: int = 0
    steps_taken: int = 0


@dataclass(frozen=True)
class Case:
    seed: int
    order: int
    steps: int
    groups: tuple[dict[str, Any], ...]
    tensors: tuple[TensorCase, ...]
    #: Whether codes are in blocks, of a rule that has both.
    in_blocks: bool = False


def rule_of(name: str, threshold_pass: str, in_blocks: bool, update_scale: str | None = None) -> Rule:
    """The rule with scalars that a group names itself."""
    functor = FUNCTORS[name]
    least_eps = 2.0**-149 if name == "adopt" else 0.0  # as its optimizer has it
    return Rule(
        name,
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: functor.moments],
        lambda group, t: {**group["scalars"], "eps": max(group["scalars"]["eps"], least_eps)},
        bound=1.0 if functor.bounded and not in_blocks else None,
        reads_variance=functor.reads_variance,
        threshold_pass=threshold_pass,
        threshold_state=None if threshold_pass == "NONE" and update_scale is None else "threshold_state",
        update_scale=update_scale,
    )


def ways(rule: str) -> list[bool]:
    """What ``in_blocks`` may be."""
    functor = FUNCTORS[rule]
    return [False, True] if functor.bounded and functor.has_blocks else [not functor.bounded]


def state_dtypes(rule: str, in_blocks: bool) -> list[tuple[str, ...]]:
    """Every combination that the rule allows."""
    wide = ("fp32", "bf16")
    few = UNBOUNDED if in_blocks else BOUNDED
    if FUNCTORS[rule].first_is_weights:
        few = {"fp32": few["fp32"]}
    return list(itertools.product(*(few, wide, wide)[: FUNCTORS[rule].moments]))


def scalars_of(beta1: float, beta2: float, confidence_beta: float, **others: float) -> Scalars:
    return {
        "beta1": beta1,
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "confidence_beta": confidence_beta,
        "one_minus_confidence_beta": 1 - confidence_beta,
        "steers": 0.0,
        **others,
    }


@st.composite
def groups(draw: st.DrawFn) -> dict[str, Any]:
    unit = st.sampled_from((0.0, 0.9, 0.999)) | st.floats(0, 0.999)
    return {
        "lr": draw(st.sampled_from((0.0, 1e-3, 1.0)) | st.floats(1e-12, 10)),
        "weight_decay": draw(st.sampled_from((0.0, 0.1)) | st.floats(1e-12, 2)),
        "weight_decay_kind": draw(st.sampled_from(("decoupled", "coupled", "cautious"))),
        "maximize": draw(st.booleans()),
        "scalars": scalars_of(
            *(draw(unit), draw(unit), draw(unit)),
            alpha=draw(st.sampled_from((0.0, 0.5, 1.0, 1e-40)) | st.floats(0, 3)),
            eps=draw(st.sampled_from((0.0, 1e-8, 1e-3))),
            denominator=draw(st.sampled_from((0.1, 1.0)) | st.floats(1e-9, 2)),
            bias_correction=draw(st.sampled_from((0.1, 1.0)) | st.floats(1e-9, 1)),
            rho=draw(st.sampled_from((0.1, 1.0)) | st.floats(1e-9, 1)),
            one_minus_rho=draw(st.sampled_from((0.0, 1.0)) | st.floats(1e-9, 1)),
            beta3=draw(unit),
            one_minus_beta3=draw(unit),
            mix=draw(st.sampled_from((0.0, 1e-3)) | st.floats(1e-12, 10)),
            lower=draw(st.sampled_from((0.0, 1.0)) | st.floats(1e-9, 1)),
            upper=draw(st.sampled_from((0.0, 1.0, math.inf)) | st.floats(1e-9, 10)),
            averaging=draw(st.sampled_from((0.0, 1.0)) | st.floats(1e-9, 1)),
            shrinking=draw(st.sampled_from((0.0, 1e-3)) | st.floats(1e-9, 1)),
            correction=draw(st.sampled_from((0.0, 0.5)) | st.floats(1e-9, 10)),
            steers=float(draw(st.booleans())),
            target=draw(st.floats(1e-6, 1 - 1e-6)),
            gain=draw(st.floats(1e-6, 1)),
            quantile=draw(st.floats(1e-3, 5)),
        ),
    }


@st.composite
def tensor_cases(draw: st.DrawFn, rule: str, group_count: int, in_blocks: bool, stored: bool) -> TensorCase:
    dtype = draw(st.sampled_from((torch.bfloat16, *DTYPES) if stored else DTYPES))
    moments = FUNCTORS[rule].moments
    return TensorCase(
        size=draw(st.sampled_from(SIZES) | st.integers(0, 300) | st.sampled_from(LARGE_SIZES)),
        dtype=dtype,
        grad_dtype=draw(st.sampled_from(DTYPES)),
        state_dtype=draw(st.sampled_from(state_dtypes(rule, in_blocks) if stored else [("fp32",) * moments])),
        param_storage=draw(st.sampled_from(PARAM_STORAGES[dtype])) if stored else "nearest",
        offsets=draw(st.tuples(*4 * [st.sampled_from((0, 0, 1, 2, 3, 4, 5, 6, 7))])),
        scale=draw(st.sampled_from((1.0, 1.0, 1e-6, 1e4, 1e-39))),
        specials=draw(st.booleans()),
        present=draw(st.sampled_from((True, True, True, False))),
        group=draw(st.integers(0, group_count - 1)),
        seed=draw(st.integers(0, 2**64 - 1)),
        param_id=draw(st.integers(0, 2**32 - 1)),
        shard_offset=draw(st.sampled_from(SHARD_OFFSETS) | st.integers(0, 2**40)),
        steps_taken=draw(st.sampled_from((0, 1, 1000, 2**24 - 2, 2**35))),
    )


@st.composite
def cases(draw: st.DrawFn, rule: str, stored: bool) -> Case:
    """``stored``: tensors in any form, plain ones among them; otherwise plain ones alone, which have kernels of their
    own."""
    rows = tuple(draw(st.lists(groups(), min_size=1, max_size=2)))
    in_blocks = draw(st.sampled_from(ways(rule)))
    return Case(
        seed=draw(st.integers(0, 2**31)),
        order=draw(st.integers(0, 2)),
        steps=draw(st.integers(1, 2)),
        groups=rows,
        tensors=tuple(draw(st.lists(tensor_cases(rule, len(rows), in_blocks, stored), min_size=1, max_size=4))),
        in_blocks=in_blocks,
    )


def values(case: TensorCase, generator: torch.Generator, threshold: float = 0.0) -> Tensor:
    """fp32 numbers; where specials are asked for, also these and the threshold, which the gate must drop."""
    x = torch.randn(case.size, generator=generator) * case.scale
    if case.specials and case.size > 0:
        special = torch.tensor((*SPECIALS, threshold, -threshold))
        where = torch.rand(case.size, generator=generator) < 0.3
        x[where] = special[torch.randint(len(special), (int(where.sum()),), generator=generator)]
    return x


class Operand:
    """A view into memory of its own, ``offset`` elements from an aligned address, with a guard on both sides.

    ``exact``: every bit counts, those of NaN as well.
    """

    def __init__(self, x: Tensor, dtype: torch.dtype, offset: int, exact: bool = False):
        self.memory = torch.full((GUARD + offset + x.numel() + GUARD,), 77, dtype=dtype)
        self.view = self.memory[GUARD + offset :][: x.numel()]
        self.exact = exact
        assert self.memory.data_ptr() % 16 == 0
        self.view.copy_(x)

    def clone(self) -> Operand:
        copy = object.__new__(Operand)
        copy.memory, copy.exact = self.memory.clone(), self.exact
        copy.view = copy.memory.as_strided(self.view.shape, (1,), self.view.storage_offset())
        return copy

    def equals(self, other: Operand) -> bool:
        if self.exact:
            return torch.equal(self.memory.view(torch.uint8), other.memory.view(torch.uint8))
        return same_bits(self.memory, other.memory)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, but for the payload of NaN."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a.view(integer)[~nan], b.view(integer)[~nan])


@dataclass
class State:
    param: Operand
    residual: Operand | None
    moments: list[Operand]
    threshold_state: Tensor | None
    step: Tensor
    variance: Operand | None = None

    def clone(self) -> State:
        residual = None if self.residual is None else self.residual.clone()
        deviation = None if self.threshold_state is None else self.threshold_state.clone()
        variance = None if self.variance is None else self.variance.clone()
        moments = [moment.clone() for moment in self.moments]
        return State(self.param.clone(), residual, moments, deviation, self.step.clone(), variance)

    def differences(self, other: State) -> list[str]:
        found = [] if self.param.equals(other.param) else ["param"]
        if self.residual is not None and not self.residual.equals(other.residual):
            found.append("beside")
        found += [f"moment {i}" for i, moment in enumerate(self.moments) if not moment.equals(other.moments[i])]
        if self.threshold_state is not None and not same_bits(self.threshold_state, other.threshold_state):
            found.append(f"deviation {self.threshold_state} {other.threshold_state}")
        if self.variance is not None and not self.variance.equals(other.variance):
            found.append("variance")
        if not torch.equal(self.step, other.step):
            found.append("step")
        return found


def stored_moment(case: TensorCase, form: Format, second: bool, generator: torch.Generator) -> Operand:
    """A moment in its form, with the largest codes and every special value that the form can hold."""
    if form.levels is not None:
        x = torch.randint(-form.levels, form.levels + 1, (case.size,), generator=generator).float()
    else:
        x = values(case, generator)
        x = x.abs() if second else x
    # fp32 of each element, or the codes that stand for it, without rounding.
    stored = formats.encode(form, x, torch.zeros(case.size, dtype=torch.int64))
    assert stored.numel() * form.dtype.itemsize == form.nbytes(case.size)
    return Operand(stored, form.dtype, 0 if form.packed else case.offsets[2], exact=form.packed or form is BF16)


def initial_state(case: TensorCase, rule: Rule, forms: tuple[Format, ...], generator: torch.Generator) -> State:
    x = values(case, generator)
    moments = [stored_moment(case, form, i > 0, generator) for i, form in enumerate(forms)]
    param_storage = effective_param_storage(case.param_storage, case.dtype)
    exact = case.dtype == torch.bfloat16 and param_storage in ("stochastic", "split16", "split8")
    param = Operand(x, case.dtype, case.offsets[0], exact)
    residual = None
    if param_storage in RESIDUALS:
        dtype = RESIDUALS[param_storage][1]
        if param_storage == "master":
            # Now and then a parameter has been set from outside.
            low = torch.where(torch.rand(case.size, generator=generator) < 0.1, torch.flip(x, (0,)), x)
        else:
            # Any low bits, those included that make a NaN of an infinity or a zero.
            info = torch.iinfo(dtype)
            low = torch.randint(info.min, info.max + 1, (case.size,), generator=generator)
        residual = Operand(low, dtype, case.offsets[3])
        residual.exact = not dtype.is_floating_point
    deviation = None
    if rule.threshold_state is not None:
        deviation = torch.rand((), dtype=torch.float64, generator=generator)
    variance = None
    if rule.reads_variance:
        variance = Operand(values(case, generator).abs(), torch.float32, case.offsets[2])
    return State(
        param, residual, moments, deviation, torch.tensor(float(case.steps_taken), dtype=torch.float64), variance
    )


def take_step(
    backend: Preparer,
    rule: Rule,
    case: Case,
    own: list[dict[str, Any]],
    states: list[State],
    grads: list[Tensor],
    observes: bool = False,
) -> Tensor | None:
    """One launch over all tensors, as a plan makes it. Returns the statistics of chunks, if they are asked for."""
    entries = [
        Entry(
            index=i,
            param=state.param.view,
            dense_param=state.param.view,
            grad_dtype=tensor.grad_dtype,
            forms=rule.forms(own[i]),
            moments=tuple(moment.view for moment in state.moments),
            param_storage=effective_param_storage(tensor.param_storage, tensor.dtype),
            residual=None if state.residual is None else state.residual.view,
            variance=None if state.variance is None else state.variance.view,
            threshold_state=state.threshold_state,
            step=state.step,
            group=i,
            seed=tensor.seed,
            param_id=tensor.param_id,
            shard=ShardIndex(tensor.shard_offset),
        )
        for i, (tensor, state) in enumerate(zip(case.tensors, states, strict=True))
    ]
    bucket = Bucket(rule, torch.device("cpu"), entries, observes)
    launch = backend.prepare(bucket, grads.__getitem__)
    addresses = [
        (grad.data_ptr() or 1) if tensor.present else 0 for tensor, grad in zip(case.tensors, grads, strict=True)
    ]
    rows = []
    for group, t in bucket.table.begin(addresses):
        scalars = rule.scalar_set(own[group], t)
        rows.append(tuple(scalars.get(name, 0.0) for name in _C.SCALARS))
    launch(rows)
    bucket.table.commit()
    return bucket.chunk_statistics


def check(
    library: ctypes.CDLL,
    name: str,
    threshold_pass: str,
    case: Case,
    observes: bool = False,
    update_scale: str | None = None,
) -> None:
    rule = rule_of(name, threshold_pass, case.in_blocks, update_scale)
    generator = torch.Generator().manual_seed(case.seed)
    own = [{**case.groups[tensor.group], "state_dtype": tensor.state_dtype} for tensor in case.tensors]
    expected = [
        initial_state(tensor, rule, rule.forms(group), generator)
        for tensor, group in zip(case.tensors, own, strict=True)
    ]
    tested = [CudaOnHost(library, case.order, case.seed), backends.get("cpu")]
    actual = [[state.clone() for state in expected] for _ in tested]
    for step in range(case.steps):
        grads = []
        for tensor, group, state in zip(case.tensors, own, expected, strict=True):
            deviation = 1.0 if state.threshold_state is None else state.threshold_state.item()
            threshold = group["scalars"]["alpha"] * deviation
            grads.append(Operand(values(tensor, generator, threshold), tensor.grad_dtype, tensor.offsets[1]))
        untouched = [grad.clone() for grad in grads]
        views = [grad.view for grad in grads]
        take_step(backends.get("reference"), rule, case, own, expected, views)
        statistics = []
        for backend, states in zip(tested, actual, strict=True):
            statistics.append(take_step(backend, rule, case, own, states, views, observes))
            for tensor, want, got, grad, before in zip(case.tensors, expected, states, grads, untouched, strict=True):
                assert not got.differences(want), (backend.name, step, tensor)
                assert grad.equals(before), (backend.name, step, tensor, "gradient")
        if observes:
            torch.testing.assert_close(*statistics, rtol=1e-12, atol=0, equal_nan=True)


@each_kernel
@pytest.mark.parametrize("stored", [False, True], ids=["plain", "stored"])
def test_equals_the_reference(library: ctypes.CDLL, rule: str, threshold_pass: str, stored: bool) -> None:
    @settings(max_examples=settings.default.max_examples // 4)
    @given(case=cases(rule, stored))
    def run(case: Case) -> None:
        check(library, rule, threshold_pass, case)

    run()


#: A coupled and a cautious decay, and momentum that reaches the largest codes.
GROUPS = (
    {
        "lr": 0.0123,
        "weight_decay": 0.1,
        "weight_decay_kind": "coupled",
        "maximize": True,
        "scalars": scalars_of(
            *(0.9, 0.99, 0.8),
            **{"alpha": 0.25, "eps": 1e-8, "denominator": 0.37, "bias_correction": 0.19, "rho": 0.5},
            **{"one_minus_rho": 0.5, "steers": 1.0, "target": 0.3, "gain": 0.7, "quantile": 1.3},
            **{"lower": 0.1, "upper": 1.5, "beta3": 0.9999, "one_minus_beta3": 0.0001, "mix": 0.02},
            **{"averaging": 0.25, "shrinking": 0.001, "correction": 0.3},
        ),
    },
    {
        "lr": 1e-3,
        "weight_decay": 0.3,
        "weight_decay_kind": "cautious",
        "maximize": False,
        "scalars": scalars_of(
            *(0.4, 0.9, 0.0),
            **{"alpha": 0.5, "eps": 1e-3, "denominator": 1.7, "bias_correction": 1.0, "rho": 1.0},
            **{"one_minus_rho": 0.0, "steers": 0.0, "lower": 0.0, "upper": math.inf, "mix": 0.0},
            **{"averaging": 1.0, "shrinking": 0.0, "correction": 0.0},
        ),
    },
)


def every_form(rule: str, in_blocks: bool, thorough: bool) -> Iterator[TensorCase]:
    """All storage forms, each at every small size and a large one, at offsets that differ; in the quick run every
    fifth of them, so that each moment and each parameter has each of its forms."""
    stored = [(dtype, param_storage) for dtype in DTYPES for param_storage in PARAM_STORAGES[dtype]]
    combinations = list(itertools.product(state_dtypes(rule, in_blocks), stored))
    if not thorough and len(combinations) > 40:
        combinations = combinations[::5]
    count = 0
    for i, (state_dtype, (dtype, param_storage)) in enumerate(combinations):
        large = (16383, 16384, 16385, 40_000)[i % 4]
        for size in (0, 1, 3, 31, 32, 33, 255, 2047, 2048, 2049, large):
            count += 1
            yield TensorCase(
                size=size,
                dtype=dtype,
                grad_dtype=DTYPES[count % 3],
                state_dtype=state_dtype,
                param_storage=param_storage,
                offsets=(count % 8, count // 2 % 8, count // 3 % 8, count // 5 % 8),
                specials=count % 3 == 0,
                present=count % 11 != 7,
                group=count // 2 % 2,
                seed=count * 0x9E3779B97F4A7C15 % 2**64,
                param_id=count,
                # In the middle of a chunk the keys change, at an odd or an even index.
                shard_offset=2**33 * (1 + i % 3) - 8190 - i % 2
                if size > 16000
                else SHARD_OFFSETS[count % len(SHARD_OFFSETS)],
                steps_taken=i % 5 * 2**31,
            )


@each_kernel
def test_every_form_and_size_in_one_launch(
    library: ctypes.CDLL, rule: str, threshold_pass: str, thorough: bool
) -> None:
    for in_blocks in ways(rule):
        tensors = tuple(every_form(rule, in_blocks, thorough))
        check(library, rule, threshold_pass, Case(1, 2, 2, GROUPS, tensors, in_blocks))


#: What scales steps, and the pass that makes it; "known": of parts of tensors, for which ranks agree.
SCALED = {
    "exact caution": ("caution", "PASS_BEFORE"),
    "delayed caution": ("caution", "SAME_PASS"),
    "known caution": ("caution", "NONE"),
    "rms": ("rms", "SAME_PASS"),
}
#: Those of the quick run.
SOME_SCALED = {
    *((rule, "delayed caution") for rule in ("signum", "msvag_minibatch", "adam_amsgrad")),
    *(("signum", how) for how in SCALED),
    ("sign_sgd", "rms"),
}


def scaled_steps() -> Iterator[Any]:
    """Every rule once in the thorough run; every rule with everything in the nightly one."""
    for rule, how, observes in itertools.product(_C.RULES, SCALED, (False, True)):
        some = (rule, how) in SOME_SCALED and not (observes and rule != "signum")
        each = how == "delayed caution" and not observes
        marks = () if some else pytest.mark.thorough if each else pytest.mark.nightly
        yield pytest.param(rule, how, observes, id=f"{rule}-{how}{'-observed' * observes}", marks=marks)


@pytest.mark.parametrize(("rule", "how", "observes"), list(scaled_steps()))
def test_scaled_steps(library: ctypes.CDLL, rule: str, how: str, observes: bool, nightly: bool) -> None:
    """Of every rule, those too whose optimizers refuse it; by one kernel for all."""
    update_scale, threshold_pass = SCALED[how]
    for in_blocks in ways(rule):
        # What is stored how is not this kernel's own.
        tensors = tuple(every_form(rule, in_blocks, nightly))[:: 1 if nightly else 3]
        check(library, rule, threshold_pass, Case(1, 2, 2, GROUPS, tensors, in_blocks), observes, update_scale)


@pytest.mark.thorough
def test_norm_of_the_corrected_gradient(library: ctypes.CDLL) -> None:
    tensors = tuple(every_form("mars_adamw", True, False))
    check(library, "mars_adamw", "PASS_BEFORE", Case(1, 2, 2, GROUPS, tensors, True), update_scale="norm")


FIXED = fixed_kernels()
#: Those of a quick library.
QUICK_FIXED = quick_fixed_kernels()


def fixed_case(kernel: KernelName) -> Case:
    """Tensors with full chunks and without: aligned, with a gradient that is not, with a parameter that is not, with
    random bits that begin within a word of them or change their keys."""
    forms = kernel.forms
    assert forms is not None
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[forms.param]
    moments = FUNCTORS_BY_STRUCT[kernel.functor].moments
    own = {"block8": "int8"}
    state = tuple(own.get(form, form) for form in (forms.exp_avg, forms.exp_avg_sq)[:moments])
    before = kernel.threshold_pass == "pass_before"
    shapes = [
        (16384 + 40, (0, 0, 0, 0), 0, 0),
        (2 * 16384, (0, 1, 0, 0), 8, 1),
        (16384, (0, 4, 0, 0), 2**33 - 8192, 1),
        (16384 + 1, (3, 3, 0, 1), 5, 0),
        (16384, (0, 0, 0, 0), 2**33 + 24, 1),
        (77, (0, 0, 0, 0), 0, 1),
        (16384, (0, 2, 0, 0), 16, 0),
    ]
    return Case(
        *(FIXED.index(kernel), 1 + FIXED.index(kernel) % 2, 1, GROUPS),
        tuple(
            TensorCase(
                size=size,
                dtype=dtype,
                grad_dtype=dtype,
                state_dtype=("fp32",) * moments if before else state,
                param_storage=forms.param_storage,
                offsets=offsets,
                specials=i % 2 == 1,
                group=group,
                seed=i,
                param_id=i,
                shard_offset=shard_offset,
            )
            for i, (size, offsets, shard_offset, group) in enumerate(shapes)
        ),
        forms.exp_avg == "block8",
    )


@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(kernel, id=kernel_label(kernel), marks=() if kernel in QUICK_FIXED else pytest.mark.thorough)
        for kernel in FIXED
    ],
)
def test_kernels_for_fixed_forms(fixed_library: ctypes.CDLL, kernel: KernelName) -> None:
    """Each full chunk, wherever its gradient lies, and what is left, as the reference and the CPU backend have it."""
    name = next(name for name, rule in FUNCTORS.items() if rule.struct == kernel.functor)
    case = fixed_case(kernel)
    launches = 2 if kernel.threshold_pass == "pass_before" else 1
    for update_scale in ("caution", "rms") if kernel.is_scaled else (None,):
        launched = fixed_library.fixed_launches_so_far()
        observes = kernel.storage == "with_statistics"
        check(fixed_library, name, kernel.threshold_pass.upper(), case, observes, update_scale)
        assert fixed_library.fixed_launches_so_far() - launched == launches * case.steps


def test_deviation_of_many_chunks(library: ctypes.CDLL) -> None:
    """Blocks in every order: the last to arrive is another one each time, the deviation is not."""
    size = 40 * 16384 + 5
    plain = TensorCase(size, torch.float32, torch.float32, ("fp32",), offsets=(1, 0, 0, 0))
    stored = TensorCase(size, torch.bfloat16, torch.bfloat16, ("int4",), "master", shard_offset=2**33 - size // 2)
    for tensor, order in ((plain, 0), (plain, 1), (plain, 2), (stored, 1), (stored, 2)):
        check(library, "sign_adam_pp", "SAME_PASS", Case(3, order, 2, GROUPS, (tensor,)))


def call(function: Callable[..., None], *arguments: int | Tensor) -> None:
    """Numbers before the first tensor are of C's int; the count of elements comes before the tensors."""
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    numbers = [x for x in arguments if not isinstance(x, Tensor)]
    function(*numbers, ctypes.c_int64(len(tensors[0])), *(ctypes.c_void_p(x.data_ptr()) for x in tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_widening_every_pattern(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    wide = torch.empty(2**16)
    call(library.widen_all, DTYPE_FORMATS[dtype], patterns, wide)
    assert same_bits(wide, patterns.view(dtype).float())


@pytest.fixture(scope="module")
def every_upper_half() -> Tensor:
    """Every upper half of an fp32 with lower halves around every border of rounding: down, tie, up."""
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    # bf16 drops 16 bits, a normal fp16 13; a subnormal fp16 drops up to 24, whose ties have zeros below.
    lower = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x2FFF, 0x3000, 0x3001]
    lower += [0x4000, 0x7FFF, 0x8000, 0x8001, 0xC000, 0xE000, 0xEFFF, 0xF000, 0xF001, 0xFFFF]
    generator = torch.Generator().manual_seed(1)
    patterns = torch.cat([upper | low for low in lower] + [torch.randint(2**32, (2**20,), generator=generator)])
    return patterns.to(torch.int32).view(torch.float32)


@pytest.fixture(scope="module")
def random_halves(every_upper_half: Tensor) -> Tensor:
    """16 random bits for each number, the outermost ones often; int64."""
    generator = torch.Generator().manual_seed(2)
    r = torch.randint(2**16, every_upper_half.shape, generator=generator)
    for k, extreme in enumerate((0, 1, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF)):
        r[k::17] = extreme
    return r


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrowing(library: ctypes.CDLL, every_upper_half: Tensor, dtype: torch.dtype) -> None:
    x = every_upper_half
    narrowed = torch.empty(len(x), dtype=torch.int16)
    call(library.narrow_all, DTYPE_FORMATS[dtype], x, narrowed)
    assert same_bits(narrowed.view(dtype), x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_narrowing(
    library: ctypes.CDLL, every_upper_half: Tensor, random_halves: Tensor, dtype: torch.dtype
) -> None:
    x, narrowed = every_upper_half, torch.empty(len(every_upper_half), dtype=torch.int16)
    call(library.narrow_stochastic_all, DTYPE_FORMATS[dtype], x, random_halves.int(), narrowed)
    assert torch.equal(narrowed, formats.narrow_stochastic(x, random_halves, dtype).view(torch.int16))
    # Down or up to a neighbour, whatever the bits, and what is exact stays.
    finite = x.isfinite() & (x.abs() < 65520 if dtype == torch.float16 else x.abs() <= 3.3895e38)
    wide = narrowed.view(dtype).double()
    reach = torch.finfo(dtype).eps * x.double().abs()
    smallest = 2.0**-24 if dtype == torch.float16 else 2.0**-133
    assert ((wide - x.double()).abs() <= reach.clamp(min=smallest))[finite].all()
    exact = finite & (x.to(dtype).float() == x)
    assert torch.equal(wide[exact], x[exact].double())


@pytest.mark.parametrize("width", [16, 8])
def test_splitting_and_joining(
    library: ctypes.CDLL, every_upper_half: Tensor, random_halves: Tensor, width: int
) -> None:
    x, count = every_upper_half, len(every_upper_half)
    param_storage = f"split{width}"
    high, low = torch.empty(count, dtype=torch.int16), torch.empty(count, dtype=torch.int32)
    call(library.split_all, width, x, random_halves.int(), high, low)
    param = torch.empty(count, dtype=torch.bfloat16)
    residual = torch.empty(count, dtype=RESIDUALS[param_storage][1])
    formats.store_param(param_storage, x, random_halves, param, residual)
    assert torch.equal(high, param.view(torch.int16)) and torch.equal(low, residual.int())
    joined = torch.empty(count)
    call(library.join_all, high, low * (256 if width == 8 else 1), joined)
    assert same_bits(joined, formats.load_param(param_storage, param, residual))
    if width == 16:
        assert same_bits(joined, x)
    # Low bits that somebody else left beside a parameter.
    strange = torch.flip(low, (0,))
    call(library.join_all, high, strange * (256 if width == 8 else 1), joined)
    assert same_bits(joined, formats.load_param(param_storage, param, strange.to(residual.dtype)))
    assert not joined[~param.isnan()].isnan().any()


def test_block_scaling(library: ctypes.CDLL, every_upper_half: Tensor, random_halves: Tensor) -> None:
    """Each number as the largest of its block, and as a smaller one."""
    x, count = every_upper_half, len(every_upper_half)
    exponent = torch.empty(count, dtype=torch.int32)
    call(library.block_exponent_all, x, exponent)
    magnitude = torch.where(x.isfinite(), x.abs(), 0.0).double()
    inside = exponent < 120
    assert (exponent >= -126).all() and (exponent <= 120).all()
    assert (127 * 2.0 ** exponent.double() >= magnitude)[inside].all()
    assert (127 * 2.0 ** (exponent.double() - 1) < magnitude)[exponent > -126].all()
    for extra in (0, 1, 5, 40):
        e = (exponent + extra).clamp(max=120)
        codes, back = torch.empty(count, dtype=torch.int32), torch.empty(count)
        call(library.block_code_all, x, e, random_halves.int(), codes)
        inverse = formats.from_bits(127 - e.long() << 23)
        scaled = torch.where(x.isnan(), 0.0, x * inverse).clamp(-127.0, 127.0)
        expected = torch.where(x.isnan(), formats.NAN_CODE, formats.stochastic_integer(scaled, random_halves))
        assert torch.equal(codes.long(), expected)
        call(library.from_block_code_all, codes, e, back)
        one = torch.where(x.isnan(), torch.nan, codes.float() * formats.from_bits(e.long() + 127 << 23))
        assert same_bits(back, one)


def test_there_is_no_kernel_for_what_no_rule_does(library: ctypes.CDLL) -> None:
    status = library.cuda_on_host(
        _C.RULES.index("signum"),
        *(_C.ThresholdPass.SAME_PASS.value, _C.Scaling.NONE.value),
        *(ctypes.c_int64(0), ctypes.c_int64(0), None, ctypes.c_int64(0), None),
        *((ctypes.c_int64 * 4)(), ctypes.c_int64(0), None, 0, ctypes.c_uint32(0)),
    )
    assert status == 1
