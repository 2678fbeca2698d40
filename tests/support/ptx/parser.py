"""PTX text of one kernel as declarations, instructions and basic blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class Unknown(Exception):
    """What this emulator does not know: an instruction, a modifier, an operand, a directive."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        line: its number in the text, and ``text`` the line itself.
        guard: the predicate that it is executed under, with a "!" before it where that must be false, or "".
        opcode: up to the first dot; ``modifiers`` are the words after it.
        operands: a vector is a tuple, an address keeps its brackets, ``d|p`` is two words in one.
    """

    line: int
    text: str
    guard: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str | tuple[str, ...], ...]


@dataclass(frozen=True)
class Variable:
    """A declared array of shared or local memory."""

    space: str
    name: str
    size: int
    align: int


@dataclass(frozen=True)
class Parameter:
    name: str
    offset: int
    size: int


@dataclass
class BasicBlock:
    """Instructions without a branch into or out of their middle, and where threads go then.

    Attributes:
        ends: "fall", "jump", "branch", "exit", "leave" (an exit under a predicate) or "barrier".
        target: the basic block that a branch leads to, by number.
        last: the instruction that decides, unless threads fall through.
    """

    instructions: list[Instruction] = field(default_factory=list)
    ends: str = "fall"
    target: int = -1
    last: Instruction | None = None


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter]
    registers: dict[str, str]
    variables: list[Variable]
    blocks: list[BasicBlock]
    threads: int | None

    @property
    def parameter_bytes(self) -> int:
        return max((each.offset + each.size for each in self.parameters), default=0)


_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
_BARRIERS = ("bar", "barrier")
#: What blocks of a grid may see each other by: between two of them the others get their turn.
_SWITCHES = ("atom", "red")


def parse(text: str) -> Kernel:
    """The kernel in a text, from its ``.entry`` or its symbol on; what comes before is looked through for memory.

    Raises:
        Unknown: a directive or a statement of another form than any known.
    """
    lines = [re.sub(r"//.*", "", line).strip() for line in text.splitlines()]
    _join_lists(lines)
    name = re.findall(r"[\w$]+", "\n".join(lines).partition("(")[0])[-1]
    kernel = Kernel(name, [], {}, [], [], None)
    statements: list[Instruction | str] = []
    switches: dict[str, list[str]] = {}
    state, depth, offset = "before", 0, 0
    for number, line in enumerate(lines, 1):
        if state == "before":
            if found := re.match(r"\.(?:extern |visible )*\.?(shared)\b.*", line):
                kernel.variables.append(_variable(line, number))
            if "(" in line:
                state, line = "parameters", line.partition("(")[2]
        if state == "parameters":
            for found in re.finditer(
                r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[bus](\d+)\s+(?:\.ptr[^,)]*?)?([\w$]+)(?:\[(\d+)\])?\s*(?:[,)]|$)",
                line,
            ):
                unit = _SIZES[found[2]]
                align, size = int(found[1] or unit), unit * int(found[4] or 1)
                offset = -(-offset // align) * align
                kernel.parameters.append(Parameter(found[3], offset, size))
                offset += size
            if ")" in line:
                state = "directives"
            continue
        if state == "directives":
            if found := re.match(r"\.(?:maxntid|reqntid)\s+(\d+)", line):
                kernel.threads = int(found[1])
            if line.endswith("{"):
                state, depth = "body", 1
            continue
        if state != "body" or not line:
            continue
        # Braces of scopes, which inline assembly has; those of vectors stand inside of a statement.
        while line.startswith(("{", "}")):
            depth += 1 if line[0] == "{" else -1
            line = line[1:].strip()
        if depth == 0:
            break
        closing = 0
        while line.endswith("}") and line.count("}") > line.count("{"):
            closing, line = closing + 1, line[:-1].strip()
        for statement in _statements(line):
            if found := re.fullmatch(r"([\w$]+):", statement):
                statements.append(found[1])
            elif statement.startswith(".branchtargets"):
                switches[str(statements.pop())] = re.findall(r"[\w$]+", statement)[1:]
            elif statement.startswith("."):
                _directive(kernel, statement, number)
            else:
                instruction = _instruction(statement, number)
                statements += _switch(kernel, instruction, switches) if instruction.opcode == "brx" else [instruction]
        depth -= closing
    _make_blocks(kernel, statements)
    return kernel


def _join_lists(lines: list[str]) -> None:
    """Puts the targets of a switch, each on a line, on its first line."""
    for first, line in enumerate(lines):
        if ".branchtargets" in line:
            following = first
            while ";" not in lines[first]:
                following += 1
                lines[first] += " " + lines[following]
                lines[following] = ""


def _switch(kernel: Kernel, instruction: Instruction, switches: dict[str, list[str]]) -> list[Instruction]:
    """A jump to one of several targets as comparisons and branches, and a trap where it leads to none."""
    index, name = map(str, instruction.operands)
    if instruction.modifiers != ("idx",) or instruction.guard or name not in switches:
        raise Unknown(f"line {instruction.line}: {instruction.text}")
    kernel.registers["%switch"] = "pred"
    made = []
    for number, target in enumerate(switches[name]):
        at = (instruction.line, instruction.text)
        made.append(Instruction(*at, "", "setp", ("eq", "s32"), ("%switch", index, str(number))))
        made.append(Instruction(*at, "%switch", "bra", (), (target,)))
    return [*made, Instruction(*at, "", "trap", (), ())]


def _statements(line: str) -> list[str]:
    found = []
    while match := re.match(r"([\w$]+:)\s*(?!:)", line):
        found.append(match[1])
        line = line[match.end() :]
    return found + [part.strip() for part in line.split(";") if part.strip()]


def _variable(line: str, number: int) -> Variable:
    found = re.match(r".*\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.[busf](\d+)\s+([\w$]+)(?:\[(\d*)\])?", line)
    if found is None:
        raise Unknown(f"line {number}: {line}")
    unit = _SIZES[found[3]]
    count = 1 if found[5] is None else int(found[5] or 0)
    return Variable(found[1], found[4], unit * count, int(found[2] or unit))


def _directive(kernel: Kernel, statement: str, number: int) -> None:
    word = re.match(r"\.(\w+)", statement)
    assert word is not None
    if word[1] == "reg":
        found = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement)
        assert found is not None
        for name in found[2].split(","):
            if many := re.fullmatch(r"(%?[\w$]+)<(\d+)>", name.strip()):
                kernel.registers.update((f"{many[1]}{i}", found[1]) for i in range(int(many[2])))
            else:
                kernel.registers[name.strip()] = found[1]
    elif word[1] in ("shared", "local"):
        kernel.variables.append(_variable(statement, number))
    elif word[1] not in ("loc", "pragma", "file"):
        raise Unknown(f"line {number}: {statement}")


def _instruction(statement: str, number: int) -> Instruction:
    found = re.fullmatch(r"(?:@(!?%[\w$]+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?", statement)
    if found is None:
        raise Unknown(f"line {number}: {statement}")
    opcode, *modifiers = found[2].split(".")
    operands: list[str | tuple[str, ...]] = []
    for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", found[3] or ""):
        part = part.strip()
        if part.startswith("{"):
            operands.append(tuple(each.strip() for each in part[1:-1].split(",")))
        else:
            operands.append(part)
    return Instruction(number, statement, found[1] or "", opcode, tuple(modifiers), tuple(operands))


def _make_blocks(kernel: Kernel, statements: list[Instruction | str]) -> None:
    blocks, labels = [BasicBlock()], {}
    for statement in statements:
        if isinstance(statement, str):
            if blocks[-1].instructions or blocks[-1].last:
                blocks.append(BasicBlock())
            labels[statement] = len(blocks) - 1
            continue
        if statement.opcode in _SWITCHES and blocks[-1].instructions:
            blocks.append(BasicBlock())
        block = blocks[-1]
        if statement.opcode == "bra":
            block.ends = "branch" if statement.guard else "jump"
        elif statement.opcode in ("ret", "exit"):
            block.ends = "leave" if statement.guard else "exit"
        elif statement.opcode in _BARRIERS and "warp" not in statement.modifiers:
            if statement.guard:
                raise Unknown(f"line {statement.line}: a barrier under a predicate: {statement.text}")
            block.ends = "barrier"
        else:
            block.instructions.append(statement)
            continue
        block.last = statement
        blocks.append(BasicBlock())
    for block in blocks:
        if block.ends in ("branch", "jump"):
            assert block.last is not None
            (label,) = block.last.operands
            if label not in labels:
                raise Unknown(f"line {block.last.line}: no such label: {block.last.text}")
            block.target = labels[str(label)]
    if not blocks[-1].instructions and blocks[-1].last is None and len(blocks) - 1 not in labels.values():
        blocks.pop()
    kernel.blocks = blocks
