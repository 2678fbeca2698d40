"""A group's formulas of scalars as a program that a device runs.

Where only the device knows whether a step is taken, and by how much gradients are scaled, it counts steps itself and
makes the scalars of each. The formulas stay the rules' own: they are run once on symbols, which record what they do.

A program works on registers, which are doubles. The first hold the step ``t`` and the factor of gradients, the next a
row of values: hyperparameters, then constants. The others are written by operations of four numbers each, (operation,
a, b, to), in order: ``registers[to] = registers[a] <operation> registers[b]``. Every scalar then lies in a register.
csrc/core/program.h runs it, and triton_kernels/begin.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .native import compiled as _C
from .rule import Group, Rule
from .symbols import Operand, Symbol

#: Registers of a program's own inputs, and the first of its row of values.
T, FACTOR, VALUES = 0, 1, 2


@dataclass(frozen=True)
class Value:
    """A number that the host hands in at each step.

    Attributes:
        name: of the hyperparameter.
        index: which of several it is, of betas; None for a single one.
        function: what the host makes of it, or None: it is handed in as it is.
    """

    name: str
    index: int | None = None
    function: Callable[[float], float] | None = None

    def source(self, group: Group) -> Any:
        """The hyperparameter: a number, or a tensor of one element."""
        given = group[self.name]
        return given if self.index is None else given[self.index]

    def of(self, group: Group) -> float:
        given = float(self.source(group))
        return given if self.function is None else self.function(given)


@dataclass(frozen=True)
class Program:
    """What a device does at each step to have the scalars of a group.

    Groups that differ in nothing but numbers have equal programs.

    Attributes:
        values: what the host hands in, in the order of its row.
        constants: what follows in the row.
        operations: (operation, a, b, to) by the numbers of ``_C.OPERATIONS`` and of registers.
        results: the register of each of ``_C.SCALARS``.
    """

    values: tuple[Value, ...]
    constants: tuple[float, ...]
    operations: tuple[tuple[int, int, int, int], ...]
    results: tuple[int, ...]

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return len(self.values) + len(self.constants)

    def row(self, group: Group) -> list[float]:
        """What the host hands in for a group of these formulas."""
        return [*(value.of(group) for value in self.values), *self.constants]


def program_of(rule: Rule, group: Group) -> Program:
    """The program of a group that ``rule`` updates. What is no number in the group is part of the program.

    Raises:
        TypeError: the rule's formulas do what no program can.
        ValueError: they need more registers than there are.
    """
    recorder = _Recorder()
    scalars = rule.scalar_set(_SymbolicGroup(group, recorder), recorder.t, recorder.factor)  # type: ignore[arg-type]
    return recorder.program([scalars.get(name, 0.0) for name in _C.SCALARS], rule.name)


def pack_operations(programs: Sequence[Program]) -> tuple[Tensor, Tensor]:
    """Programs as a device reads them, on the CPU.

    Returns:
        int32 ``[programs, longest, 4]``, filled up with operations that do nothing, and the registers of the scalars,
        int32 ``[programs, scalars]``.
    """
    longest = max((len(program.operations) for program in programs), default=0)
    nothing = (_C.OPERATIONS.index("nothing"), 0, 0, 0)
    operations = [[*program.operations, *[nothing] * (longest - len(program.operations))] for program in programs]
    shapes = (len(programs), longest, 4), (len(programs), len(_C.SCALARS))
    results = [program.results for program in programs]
    packed = [torch.tensor(x, dtype=torch.int32, device="cpu") for x in (operations, results)]
    return packed[0].reshape(shapes[0]), packed[1].reshape(shapes[1])


def pack_rows(programs: Sequence[Program], groups: Sequence[Group]) -> Tensor:
    """The rows of groups, each with its program: float64 ``[groups, widest]`` on the CPU, filled up with zeros."""
    rows = [program.row(group) for program, group in zip(programs, groups, strict=True)]
    widest = max(map(len, rows), default=0)
    filled = [[*row, *[0.0] * (widest - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.float64, device="cpu").reshape(len(rows), widest)


class _SymbolicGroup(Mapping[str, Any]):
    """A group in whose place a rule gets symbols for numbers."""

    def __init__(self, group: Group, recorder: _Recorder) -> None:
        self._group, self._recorder = group, recorder

    def __getitem__(self, name: str) -> Any:
        given = self._group[name]
        if isinstance(given, tuple) and all(map(_is_number, given)):
            return tuple(self._recorder.value(Value(name, index)) for index in range(len(given)))
        return self._recorder.value(Value(name)) if _is_number(given) else given

    def __iter__(self) -> Iterator[str]:
        return iter(self._group)

    def __len__(self) -> int:
        return len(self._group)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)


class _Recorder:
    """Notes down what a formula does: entries, of which each is made once."""

    def __init__(self) -> None:
        # By what it is: ("value", Value), ("constant", its bits) or (operation, indices of operands).
        self._entries: dict[tuple[Any, ...], int] = {}
        self.t = self._entry("t")
        self.factor = self._entry("factor")

    def _entry(self, *what: Any) -> Symbol:
        return Symbol(self, self._entries.setdefault(what, len(self._entries)))

    def value(self, value: Value) -> Symbol:
        return self._entry("value", value)

    def _index(self, operand: Operand) -> int:
        if isinstance(operand, Symbol):
            return operand.index
        return self._entry("constant", struct.pack("<d", operand)).index  # 0.0 is not -0.0

    def record(self, operation: str, *operands: Operand) -> Symbol:
        return self._entry("operation", operation, *map(self._index, operands))

    def made_by_host(self, function: Callable[[float], float], operand: Symbol) -> Symbol:
        kind, *what = list(self._entries)[operand.index]
        if kind != "value" or what[0].function is not None:
            raise TypeError("the host makes something of a hyperparameter itself, not of what a program makes of it")
        return self.value(Value(what[0].name, what[0].index, function))

    def program(self, results: Sequence[Operand], rule: str) -> Program:
        """The program that leaves these results."""
        needed = [self._index(result) for result in results]
        entries = list(self._entries)
        of_kind: dict[str, list[int]] = {kind: [] for kind in ("t", "factor", "value", "constant", "operation")}
        for index, (kind, *_) in enumerate(entries):
            of_kind[kind].append(index)
        order = [index for kind in of_kind.values() for index in kind]
        if len(order) > _C.PROGRAM_REGISTERS:
            raise ValueError(
                f"the scalars of {rule} take {len(order)} registers of a program: at most {_C.PROGRAM_REGISTERS}"
            )
        register = {index: place for place, index in enumerate(order)}
        operations = []
        for index in of_kind["operation"]:
            _, name, *operands = entries[index]
            a, b = (register[each] for each in (*operands, operands[0])[:2])
            operations.append((_C.OPERATIONS.index(name), a, b, register[index]))
        return Program(
            tuple(entries[index][1] for index in of_kind["value"]),
            tuple(struct.unpack("<d", entries[index][1])[0] for index in of_kind["constant"]),
            tuple(operations),
            tuple(register[index] for index in needed),
        )
