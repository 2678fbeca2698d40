"""Programs of scalars make, bit for bit, what the rules' formulas make of numbers, at any step."""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.paper_formulas import TABLE, Row
from support.strategies import hyperparameters
from support.toolchain import build

import signadam_ext
from signadam_ext import _C
from signadam_ext.core.hyperparameters import checked
from signadam_ext.core.program import Program, Value, pack_operations, pack_rows, program_of
from signadam_ext.core.rule import Rule, Scalars, rule_of
from signadam_ext.core.symbols import (
    Symbol,
    at_least,
    exponential,
    is_nonzero,
    logarithm,
    made_by_host,
    number,
    power,
    square_root,
)

#: Those of the papers, and the threshold that is steered, whose quantile the host makes.
ROWS = [*TABLE, Row("sparsity", signadam_ext.SignAdamPP, {"confidence": "sparsity", "target": 0.1}, TABLE[0].formula)]
NOTHING = _C.OPERATIONS.index("nothing")
LAST = 2**53


@pytest.fixture(scope="module")
def library(built_once: Callable[..., Path]) -> ctypes.CDLL:
    flags = ("-O1", "-shared", "-fPIC")
    folder = built_once("program", lambda folder: build("program.cpp", folder / "library.so", *flags))
    return ctypes.CDLL(str(folder / "library.so"))


def run(
    library: ctypes.CDLL, program: Program, row: Sequence[float], t: int, factor: float, longer: int = 0
) -> dict[str, float]:
    """The scalars that a program makes; it is followed by so many operations that do nothing."""
    operations = [number for one in (*program.operations, *[(NOTHING, 0, 0, 0)] * longer) for number in one]
    found = (ctypes.c_double * len(_C.SCALARS))()
    size = library.run(
        *((ctypes.c_int32 * len(operations))(*operations), len(operations) // 4),
        *((ctypes.c_double * len(row))(*row), len(row), ctypes.c_double(t), ctypes.c_double(factor)),
        *((ctypes.c_int32 * len(found))(*program.results), len(found), found),
    )
    assert size == 16
    return dict(zip(_C.SCALARS, found, strict=True))


def group_of(row: Row, own: dict[str, Any]) -> tuple[Rule, dict[str, Any]]:
    """A checked group, and the rule that updates it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* momentum with beta")
        param = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
        optimizer = row.optimizer([param], **{**row.hyperparameters, **own})
    group = checked(row.optimizer, optimizer.param_groups[0])
    return rule_of(row.optimizer, group), group


def in_hex(scalars: dict[str, float]) -> dict[str, str]:
    """Every bit, the sign of zero too."""
    return {name: float(value).hex() for name, value in scalars.items()}


@st.composite
def cases(draw: st.DrawFn) -> tuple[Row, dict[str, Any], int, float]:
    row = draw(st.sampled_from(ROWS))
    own = draw(hyperparameters(row))
    if "target" in row.hyperparameters:
        own |= draw(st.fixed_dictionaries({"target": st.floats(1e-6, 0.999), "gain": st.floats(1e-6, 1)}))
    t = draw(st.sampled_from((1, 2, 3, LAST)) | st.integers(1, 10_000) | st.integers(1, LAST))
    return row, own, t, draw(st.sampled_from((1.0, 0.5, 1e-3)) | st.floats(0, 1))


def check(library: ctypes.CDLL, row: Row, own: dict[str, Any], t: int, factor: float) -> Program:
    rule, group = group_of(row, own)
    expected = {**dict.fromkeys(_C.SCALARS, 0.0), **rule.scalar_set(group, t, factor)}
    program = program_of(rule, group)
    found = run(library, program, program.row(group), t, factor, longer=t % 3)
    assert in_hex(found) == in_hex(expected)
    return program


@given(cases())
@example((TABLE[0], {"weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": True}, 1, 0.25))
def test_scalars_are_those_of_the_formulas(library: ctypes.CDLL, case: tuple[Row, dict[str, Any], int, float]) -> None:
    check(library, *case)


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_every_rule_and_form(library: ctypes.CDLL, row: Row) -> None:
    for state_dtype in row.state_dtypes or (None,):
        own = {"lr": 0.01} if state_dtype is None else {"lr": 0.01, "state_dtype": state_dtype}
        for decoupled in (False, True):
            for t in (1, 2, 1000, LAST):
                given = {**own, "weight_decay": 0.1, "decoupled_weight_decay": decoupled, "maximize": decoupled}
                program = check(library, row, given, t, 0.3)
                registers = 2 + program.width + len(program.operations)
                assert registers <= _C.PROGRAM_REGISTERS // 2  # as much again is left for other rules


def test_groups_that_differ_in_numbers_have_one_program() -> None:
    row = next(row for row in TABLE if row.id == "adam")
    programs = []
    for own in (
        {"lr": 0.1},
        {"lr": torch.tensor(0.2), "weight_decay": 0.3, "betas": (0.1, 0.2)},
        {"lr": 0.1, "decoupled_weight_decay": True},
    ):
        rule, group = group_of(row, own)
        programs.append(program_of(rule, group))
    assert programs[0] == programs[1] != programs[2]
    names = [(value.name, value.index) for value in programs[0].values]
    assert names == [("lr", None), ("weight_decay", None), ("betas", 0), ("betas", 1), ("eps", None)]


def test_a_row_reads_tensors_and_lets_the_host_make_what_takes_more() -> None:
    rule, group = group_of(ROWS[-1], {"lr": torch.tensor(0.25), "target": 0.5})
    program = program_of(rule, {**group, "lr": torch.tensor(0.25)})
    row = dict(zip(program.values, program.row({**group, "lr": torch.tensor(0.25)}), strict=False))
    assert row[Value("lr")] == 0.25
    (quantile,) = (value for value in program.values if value.function is not None)
    assert quantile.name == "target" and row[quantile] == rule.scalar_set(group, 1)["quantile"]


def test_packed() -> None:
    groups, programs = [], []
    for row in (TABLE[0], next(row for row in TABLE if row.id == "adam")):
        rule, group = group_of(row, {"lr": 0.5})
        groups.append(group)
        programs.append(program_of(rule, group))
    operations, results = pack_operations(programs)
    longest = max(len(program.operations) for program in programs)
    assert operations.shape == (2, longest, 4) and operations.dtype == torch.int32
    assert results.tolist() == [list(program.results) for program in programs] and results.dtype == torch.int32
    shorter = min(programs, key=lambda program: len(program.operations))
    own = operations[programs.index(shorter)]
    assert own[: len(shorter.operations)].tolist() == [list(each) for each in shorter.operations]
    assert own[len(shorter.operations) :].unique().tolist() == [NOTHING] == [0]
    rows = pack_rows(programs, groups)
    assert rows.dtype == torch.float64 and rows.shape == (2, max(program.width for program in programs))
    for own, program, group in zip(rows.tolist(), programs, groups, strict=True):
        assert own == [*program.row(group), *[0.0] * (rows.shape[1] - program.width)]
    assert [packed.shape for packed in pack_operations([])] == [(0, 0, 4), (0, len(_C.SCALARS))]
    assert pack_rows([], []).shape == (0, 0)


GROUP = {"lr": 0.1, "weight_decay": 0.0, "decoupled_weight_decay": True, "maximize": False, "alpha": 0.5}


def program_with(alpha: Callable[[Any, Any], Any]) -> Program:
    """Of a rule whose alpha is a function of the group's and t."""

    def scalars(group: Any, t: Any) -> Scalars:
        return {"alpha": alpha(group["alpha"], t)}

    return program_of(Rule("own", moments=(), scalars=scalars), GROUP)


@pytest.mark.parametrize(
    ("alpha", "said"),
    [
        (lambda alpha, t: alpha if alpha else 0.0, "branch on the value"),
        (lambda alpha, t: alpha if alpha == 0.5 else 0.0, "must not compare"),
        (lambda alpha, t: alpha if alpha < 0.5 else 0.0, "not supported between"),
        (lambda alpha, t: float(alpha), "float"),
        (lambda alpha, t: made_by_host(abs, alpha * 2), "of a hyperparameter itself"),
        (lambda alpha, t: made_by_host(abs, t), "of a hyperparameter itself"),
        (lambda alpha, t: made_by_host(abs, made_by_host(abs, alpha)), "of a hyperparameter itself"),
    ],
    ids=["truth", "equality", "order", "float", "product", "step", "twice"],
)
def test_what_no_program_can(alpha: Callable[[Any, Any], Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        program_with(alpha)


def test_too_many_registers() -> None:
    def long(alpha: Any, t: Any) -> Any:
        for k in range(2, _C.PROGRAM_REGISTERS):
            alpha = alpha + k
        return alpha

    with pytest.raises(ValueError, match=f"own take .* at most {_C.PROGRAM_REGISTERS}"):
        program_with(long)


@pytest.mark.parametrize(
    ("formula", "alpha", "t"),
    [
        (lambda x, t: -x, 0.0, 1),
        (lambda x, t: at_least(x, 0.0), -0.0, 1),
        (lambda x, t: at_least(x - 1, 0.0), 0.25, 1),
        (lambda x, t: at_least(x, 0.0), float("nan"), 1),
        (lambda x, t: is_nonzero(x), float("nan"), 1),
        (lambda x, t: is_nonzero(x), -0.0, 1),
        (lambda x, t: 1 / (2 - x) / 3 + x / t, 0.7, 7),
        (lambda x, t: square_root(x * t), 0.1, 3),
        (lambda x, t: power(x, t), 1.5, 2000),  # infinite
        (lambda x, t: power(0.5, t) + power(x, 3), 0.3, 1074),
        (lambda x, t: number(x) * 0.0 + -0.0, -1.0, 1),
        (lambda x, t: logarithm(number(t) + x), 2.0, LAST),
        (lambda x, t: logarithm(x), 1.0, 1),
        (lambda x, t: logarithm(x), 1.7976931348623157e308, 1),
        (lambda x, t: logarithm(x), math.inf, 1),
        (lambda x, t: exponential(x / t), -18.5, 7),
        (lambda x, t: exponential(x), -0.0, 1),
        (lambda x, t: exponential(x), 32.0, 1),
    ],
    ids=range(18),
)
def test_operations(library: ctypes.CDLL, formula: Callable[[Any, Any], Any], alpha: float, t: int) -> None:
    """Signs of zero, infinities and NaN come out as of numbers."""
    program = program_with(formula)
    found = run(library, program, program.row({**GROUP, "alpha": alpha}), t, 1.0)["alpha"]
    assert float(found).hex() == float(formula(alpha, t)).hex()


def test_logarithm() -> None:
    """Within 3 units in the last place, of what steps are and between."""
    with localcontext(prec=40):
        for x in (
            1,
            1.0000000000000002,
            *(1 + k / 64 for k in range(1, 64)),
            *range(2, 300),
            *(2**k + 2 for k in range(53)),
        ):
            exact = Decimal(x).ln()
            assert abs(Decimal(logarithm(x)) - exact) <= 3 * Decimal(math.ulp(float(exact)))
    assert logarithm(1) == 0.0 and logarithm(2) == math.log(2)


def test_exponential() -> None:
    """Within 1e-13 of the result, over the whole range."""
    with localcontext(prec=40):
        for x in (0.0, 2.0**-60, -1e-12, *(k / 7 for k in range(-224, 225))):
            exact = Decimal(x).exp()
            assert abs(Decimal(exponential(x)) - exact) <= Decimal("1e-13") * exact
    assert exponential(0.0) == 1.0


def test_symbols_have_no_hash() -> None:
    with pytest.raises(TypeError):
        hash(Symbol(None, 0))  # type: ignore[arg-type]
