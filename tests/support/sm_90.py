"""What a package ``sass`` that executes machine code of sm_90 may not know, and kernels of this project have."""

from __future__ import annotations

import re
from typing import Any


def teach(emulator: Any) -> None:
    """All but the switches of a module, which are in none of its instructions."""
    _teach_bf16(emulator)
    _teach_votes(emulator)


def _teach_bf16(emulator: Any) -> None:
    """What packs two floats as bf16, to nearest even, in an emulator that knows of fp16 alone."""
    _, packs_fp16 = emulator.OPERATIONS["F2FP"]

    def narrow(bits: int) -> int:
        return 0x7FFF if bits & 0x7FFFFFFF > 0x7F800000 else (bits + 0x7FFF + (bits >> 16 & 1)) >> 16

    def packs(d: Any) -> Any:
        if not d.has("BF16"):
            return packs_fp16(d)
        return d.result(d.register(0), lambda high, low: narrow(high) << 16 | narrow(low), d.float(1), d.float(2))

    emulator.operation("ALU", "F2FP")(packs)


def _teach_votes(emulator: Any) -> None:
    """Which lanes of a warp are there, where code has them all."""

    def lanes(d: Any) -> Any:
        if d.operands[1:] != ["UPT", "PT"]:
            raise emulator.Unknown(", ".join(d.operands))
        return d.copy(d.register(0), lambda t: 0xFFFFFFFF)

    emulator.operation("uniform", "VOTEU")(lanes)


def jump_tables(listing: str) -> dict[str, list[int]]:
    """By symbol of a kernel, its constant bank 2 in ``cuobjdump -elf``: where the cases of its switches begin."""
    found: dict[str, list[int]] = {}
    table: list[int] | None = None
    for line in listing.splitlines():
        if match := re.match(r"\.nv\.constant2\.(\S+)$", line):
            table = found[match[1]] = []
        elif table is not None and re.match(r"(0x[0-9a-f]{8}\s*)+$", line):
            table.extend(int(word, 16) for word in line.split())
        else:
            table = None
    return found


def teach_switches(emulator: Any, listing: str) -> None:
    """Loads from constant bank 2 of a module and the branch that follows them, beside those of other modules."""
    tables = jump_tables(listing)
    _, loads = emulator.OPERATIONS["LDC"]

    def load(d: Any) -> Any:
        place = re.fullmatch(r"c\[0x2\]\[(?:(R\d+)\+?)?(-?0x[0-9a-f]+)?\]", d.operands[1])
        if place is None or d.kernel.name not in tables:
            return loads(d)
        table, offset = tables[d.kernel.name], int(place[2] or "0", 16)
        index = d.raw(place[1]) if place[1] else lambda t: 0
        return d.copy(d.register(0), lambda t: table[(index(t) + offset) // 4])

    def branch(d: Any) -> Any:
        register, offset = d.operands[0].split()
        base, to, index = d.kernel.code[d.after].address + int(offset, 16), d.raw(register), d.kernel.index
        return lambda t: index[base + to(t)]

    emulator.operation("memory", "LDC")(load)
    emulator.operation("branch", "BRX")(branch)
