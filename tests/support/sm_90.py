"""Instructions of this project's kernels that an emulator of sm_90, the package ``sass``, may lack."""

from __future__ import annotations

import re
from typing import Any


def teach(emulator: Any) -> None:
    """All but switches, whose tables lie beside a module's code: :func:`teach_switches`."""
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
    """Which lanes of a warp have come, in code to which all 32 come: it waits for them."""

    def lanes(d: Any) -> Any:
        if d.modifiers != ["ANY"] or d.operands[1:] != ["UPT", "PT"]:
            raise emulator.Unknown(", ".join(d.operands))
        write = d.register(0)

        def exchange(warp: list[Any], values: list[int]) -> None:
            for t in warp:
                write(t, (1 << len(warp)) - 1)

        return emulator._meets(d, lambda t: 1, exchange)

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
        if d.has("64"):
            raise emulator.Unknown("64")
        table, offset = tables[d.kernel.name], int(place[2] or "0", 16)
        index = d.raw(place[1]) if place[1] else lambda t: 0

        def entry(t: Any) -> int:
            at = index(t) + offset & 0xFFFFFFFF
            if at % 4 or at // 4 >= len(table):
                raise emulator.Fault(f"{d.operands[1]} is {at:#x}, of {4 * len(table):#x} bytes")
            return table[at // 4]

        return d.copy(d.register(0), entry)

    def branch(d: Any) -> Any:
        register, offset = d.operands[0].split()
        base, to, index = d.kernel.code[d.after].address + int(offset, 16), d.raw(register), d.kernel.index
        return lambda t: index[base + to(t)]

    emulator.operation("memory", "LDC")(load)
    emulator.operation("branch", "BRX")(branch)
