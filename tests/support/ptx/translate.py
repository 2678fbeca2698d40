"""Basic blocks of PTX as Python functions on NumPy arrays, an entry for each thread.

In a function a register is a Python variable, once for each kind of number that it is taken for: "u" unsigned, as it
is kept between basic blocks; "s" signed; "f" floating-point. Threads that do not take part compute too, with whatever
their registers hold, but their registers and the memory do not change.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from . import arithmetic
from .memory import LOCAL_BASE, SHARED_BASE, Fault
from .parser import BasicBlock, Instruction, Kernel, Unknown

Array = np.ndarray
_TYPE = re.compile(r"([busf])(8|16|32|64)|bf16|bf16x2|f16x2|pred")
_NUMBER = re.compile(r"-?(?:0x[0-9a-fA-F]+|\d+)U?")
#: A memory operation's words that change nothing here: caches, priorities, scopes of one device.
_CACHES = {"cs", "cg", "ca", "cv", "lu", "wb", "wt", "nc", "weak", "gpu", "cta", "sys", "cluster", "volatile"}
_CACHES |= {"L1::evict_first", "L1::evict_last", "L1::no_allocate", "L1::evict_normal", "L1::evict_unchanged"}
_CACHES |= {"L2::64B", "L2::128B", "L2::256B", "relaxed"}
_SPACES = {"global": "global", "shared": "shared", "shared::cta": "shared", "local": "local"}
_SPACES |= {"param": "param", "const": "global"}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED_COMPARISONS = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_OPPOSITE = {"equ": "!=", "neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}


def _bits(kind: str) -> int:
    return {"pred": 1, "bf16": 16, "f16x2": 32, "bf16x2": 32}.get(kind) or int(kind[1:])


def _form(kind: str) -> str:
    return {"b": "u", "u": "u", "s": "s", "f": "f"}[kind[0]] if kind != "pred" else "u"


class Translator:
    """Makes the functions of a kernel's basic blocks, for a number of threads.

    Attributes:
        kept: registers that live on between basic blocks, by name, each with its place.
    """

    def __init__(self, kernel: Kernel, threads: int, symbols: dict[str, int], parameters: dict[str, int]) -> None:
        self.kernel, self.threads = kernel, threads
        self.symbols, self.parameters = symbols, parameters
        self.kept = {name: place for place, name in enumerate(_exposed(kernel))}
        self.space: dict[str, Any] = {"np": np, "A": arithmetic, "where": np.where, "Fault": Fault}
        self.space |= {f"{c}{size}": np.dtype(f"{c}{size // 8}").type for c in "uif" for size in (16, 32, 64)}
        self.space |= {"u8": np.uint8, "i8": np.int8}
        lanes = np.arange(threads, dtype=np.uint32)
        self.special = {"%tid.x": lanes, "%laneid": lanes % np.uint32(32), "%warpid": lanes // np.uint32(32)}
        self.special |= {name: np.zeros(threads, np.uint32) for name in ("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z")}
        self.special["%ntid.x"] = np.full(threads, threads, np.uint32)
        self.constants: dict[tuple[Any, ...], str] = {}
        self.instructions: list[Instruction] = []

    def constant(self, value: Any, bits: int, form: str) -> str:
        """The name of a number."""
        key = (repr(value), bits, form)
        if key not in self.constants:
            name = self.constants[key] = f"c{len(self.constants)}"
            self.space[name] = value
        return self.constants[key]

    def full(self, value: Any, bits: int, form: str) -> str:
        """The name of an array that has it for every thread."""
        key = ("full", repr(value), bits, form)
        if key not in self.constants:
            name = self.constants[key] = f"c{len(self.constants)}"
            self.space[name] = np.full(self.threads, value)
            self.space[name].flags.writeable = False
        return self.constants[key]

    def source(self, block: BasicBlock) -> str:
        """The function of a basic block as text."""
        return _Writer(self, block).source()

    def translate(self, block: BasicBlock) -> Callable[..., Any]:
        exec(compile(self.source(block), f"<{self.kernel.name[-60:]}>", "exec"), self.space)
        made: Callable[..., Any] = self.space["f"]
        return made


def _names(operand: str | tuple[str, ...]) -> list[str]:
    parts = operand if isinstance(operand, tuple) else (operand,)
    return [name for part in parts for name in re.findall(r"%[\w$]+(?:\.\w+)?", part)]


_STORES = ("st", "red", "bra", "ret", "exit", "membar", "fence", "stmatrix", "bar", "barrier", "trap")


def written_by(instruction: Instruction) -> list[str]:
    """The registers that an instruction writes."""
    if instruction.opcode in _STORES and "red" not in instruction.modifiers:
        return []
    return _names(instruction.operands[0])


def read_by(instruction: Instruction) -> list[str]:
    names = [name for operand in instruction.operands for name in _names(operand)]
    for name in written_by(instruction):
        names.remove(name)
    names += _names(instruction.guard)
    if instruction.guard:
        # What is not written stays.
        names += written_by(instruction)
    return names


def _exposed(kernel: Kernel) -> list[str]:
    """Registers that some basic block reads before it writes them."""
    found: dict[str, None] = {}
    for block in kernel.blocks:
        own: set[str] = set()
        last = [block.last] if block.last is not None else []
        for instruction in [*block.instructions, *last]:
            for name in read_by(instruction):
                if name in kernel.registers and name not in own:
                    found[name] = None
            own.update(written_by(instruction))
        if block.ends == "barrier" and block.last is not None:
            # Its result is there for the next block.
            found.update(dict.fromkeys(written_by(block.last)))
    return list(found)


class _Writer:
    """Writes the function of one basic block: ``f(T, R, m)``, with the machine, the registers that are kept and a mask
    of the threads that take part, or None where all do."""

    def __init__(self, translator: Translator, block: BasicBlock) -> None:
        self.t, self.block = translator, block
        self.lines: list[str] = []
        self.values: dict[str, dict[str, str]] = {}
        self.changed: set[str] = set()
        self.count = 0

    def source(self) -> str:
        for instruction in self.block.instructions:
            self.instruction(instruction)
        result = "None"
        last = self.block.last
        if last is not None:
            self.current = last
        if self.block.ends in ("branch", "leave") and last is not None:
            result = self.guard(last.guard)
        elif self.block.ends == "barrier" and last is not None:
            result = self.barrier(last)
        kept = sorted((self.t.kept[name], name) for name in self.changed if name in self.t.kept)
        if kept:
            values = {place: self.value(name, "u") for place, name in kept}
            self.lines.append("if m is None:")
            self.lines += [f"    R[{place}] = {value}" for place, value in values.items()]
            self.lines.append("else:")
            self.lines += [f"    R[{place}] = where(m, {value}, R[{place}])" for place, value in values.items()]
        body = "\n".join(f"    {line}" for line in [*self.lines, f"return {result}"])
        return f"def f(T, R, m):\n{body}\n"

    # Values.

    def name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def let(self, expression: str) -> str:
        name = self.name()
        self.lines.append(f"{name} = {expression}")
        return name

    def bits_of(self, register: str) -> int:
        if register in self.t.special:
            return 32
        if register in ("%ctaid.x", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%ntid.y", "%ntid.z"):
            return 32
        if register not in self.t.kernel.registers:
            raise Unknown(f"{self.where}: no such register: {register}")
        return _bits(self.t.kernel.registers[register])

    @property
    def where(self) -> str:
        return f"line {self.current.line}: {self.current.text}"

    def value(self, register: str, form: str) -> str:
        """The variable that holds a register as that kind of number."""
        bits = self.bits_of(register)
        forms = self.values.get(register)
        if forms is None:
            if register in self.t.special:
                key = "s" + re.sub(r"\W", "_", register)
                self.t.space[key] = self.t.special[register]
                forms = {"u": key}
            elif register == "%ctaid.x":
                forms = {"u": self.let("T.block_index")}
            elif register == "%nctaid.x":
                forms = {"u": self.let("T.grid_size")}
            elif register.startswith(("%nctaid", "%ntid")):
                forms = {"u": self.t.full(np.uint32(1), 32, "u")}
            elif register in self.t.kept:
                forms = {"u": self.let(f"R[{self.t.kept[register]}]")}
            else:
                raise Unknown(f"{self.where}: {register} is read, but never written")
            self.values[register] = forms
        if bits == 1:
            return forms["u"]
        if form not in forms:
            if form == "u":
                source = f"A.bits({forms['f']})" if "f" in forms else f"{forms['s']}.view(u{bits})"
            else:
                source = f"{self.value(register, 'u')}.view({'i' if form == 's' else 'f'}{bits})"
            forms[form] = self.let(source)
        return forms[form]

    def read(self, operand: Any, kind: str) -> str:
        """An operand as a number of that type: a variable or the name of a constant."""
        assert isinstance(operand, str)
        bits, form = _bits(kind), _form(kind)
        if operand.startswith("%"):
            own = self.bits_of(operand)
            if own == bits:
                return self.value(operand, form)
            if own > bits > 1:
                narrow = f"{self.value(operand, 'u')}.astype(u{bits})"
                return narrow if form == "u" else f"{narrow}.view({'i' if form == 's' else 'f'}{bits})"
            raise Unknown(f"{self.where}: {operand} has {own} bits")
        return self.t.constant(self.number(operand, kind), bits, form)

    def number(self, operand: str, kind: str) -> Any:
        bits, form = _bits(kind), _form(kind)
        if found := re.fullmatch(r"(-?)0([fFdD])([0-9a-fA-F]+)", operand):
            size = 32 if found[2] in "fF" else 64
            if size != bits or found[1]:
                raise Unknown(f"{self.where}: {operand} as {kind}")
            word = int(found[3], 16)
            if form == "f":
                return np.frombuffer(struct.pack("<I" if size == 32 else "<Q", word), f"f{size // 8}")[0]
            return np.dtype(f"u{size // 8}").type(word)
        if kind == "pred" and _NUMBER.fullmatch(operand):
            return np.bool_(int(operand, 0) != 0)
        if _NUMBER.fullmatch(operand) and form != "f":
            value = int(operand.rstrip("U"), 0) & ((1 << bits) - 1)
            unsigned = np.array([value], f"u{bits // 8}")
            return (unsigned.view(f"i{bits // 8}") if form == "s" else unsigned)[0]
        if operand in self.t.symbols:
            return np.dtype(f"u{bits // 8}").type(self.t.symbols[operand])
        raise Unknown(f"{self.where}: {operand} as {kind}")

    def put(self, operand: Any, expression: str, kind: str) -> None:
        """Writes a register, under the instruction's predicate."""
        assert isinstance(operand, str)
        if operand == "_":
            return
        bits, form = _bits(kind), _form(kind)
        own = self.bits_of(operand)
        if own > bits:
            raise Unknown(f"{self.where}: {operand} has {own} bits")
        new = self.let(expression)
        if self.current.guard:
            if form != "u" and bits > 1:
                new = self.let(f"A.bits({new})" if form == "f" else f"{new}.view(u{bits})")
                form = "u"
            new = self.let(f"where({self.guard(self.current.guard)}, {new}, {self.value(operand, 'u')})")
        self.values[operand] = {form: new}
        self.changed.add(operand)

    def guard(self, guard: str) -> str:
        if guard.startswith("!"):
            return f"~{self.value(guard[1:], 'u')}"
        return self.value(guard, "u")

    def mask(self) -> str:
        """The threads that execute the instruction."""
        if not self.current.guard:
            return "m"
        return self.let(f"T.both(m, {self.guard(self.current.guard)})")

    # Instructions.

    def instruction(self, instruction: Instruction) -> None:
        self.current = instruction
        method = getattr(self, f"do_{instruction.opcode}", None)
        if method is None:
            raise Unknown(f"{self.where}: unknown opcode {instruction.opcode}")
        words = list(instruction.modifiers)
        if (packed := {"bf16", "bf16x2", "f16x2"} & set(words)) and instruction.opcode != "cvt":
            raise Unknown(f"{self.where}: arithmetic of {packed.pop()}")
        left = method(words, *instruction.operands)
        if words and left is None:
            raise Unknown(f"{self.where}: unknown modifier .{words[0]}")

    def kind(self, words: list[str]) -> str:
        """Takes the last type."""
        if not words or _TYPE.fullmatch(words[-1]) is None:
            raise Unknown(f"{self.where}: no type")
        return words.pop()

    def expect(self, words: list[str], *wanted: str) -> str:
        """Takes one of these words."""
        for word in wanted:
            if word in words:
                words.remove(word)
                return word
        raise Unknown(f"{self.where}: none of {', '.join(wanted)}")

    def take(self, words: list[str], *wanted: str) -> str:
        for word in wanted:
            if word in words:
                words.remove(word)
                return word
        return ""

    def _binary(self, words: list[str], d: Any, a: Any, b: Any, symbol: str, name: str) -> None:
        kind = self.kind(words)
        a, b = self.pair(a, b, kind)
        if kind[0] == "f":
            self.rounded(words, kind, name, d, f"{a} {symbol} {b}", a, b)
        else:
            self.put(d, f"{a} {symbol} {b}", kind)

    def pair(self, a: Any, b: Any, kind: str) -> tuple[str, str]:
        """Two operands, of which one is an array."""
        x, y = self.read(a, kind), self.read(b, kind)
        if not str(a).startswith("%") and not str(b).startswith("%"):
            x = self.t.full(self.number(a, kind), _bits(kind), _form(kind))
        return x, y

    def rounded(self, words: list[str], kind: str, name: str, d: Any, expression: str, a: str, b: str) -> None:
        if kind not in ("f32", "f64"):
            raise Unknown(f"{self.where}: arithmetic of {kind}")
        rounding = self.take(words, "rn", "rz") or ("rn" if name in ("add", "sub", "mul") else "")
        if rounding == "rn":
            self.put(d, expression, kind)
        elif rounding == "rz" and kind == "f32":
            self.put(d, f"A.toward_zero('{name}', {a}, {b})", kind)
        else:
            raise Unknown(f"{self.where}: not rounded to nearest")

    def do_add(self, words: list[str], d: Any, a: Any, b: Any) -> None:
        self._binary(words, d, a, b, "+", "add")

    def do_sub(self, words: list[str], d: Any, a: Any, b: Any) -> None:
        self._binary(words, d, a, b, "-", "sub")

    def do_mul(self, words: list[str], d: Any, a: Any, b: Any) -> None:
        kind = self.kind(words)
        if kind[0] == "f":
            a, b = self.pair(a, b, kind)
            return self.rounded(words, kind, "mul", d, f"{a} * {b}", a, b)
        self.put(d, *self.product(words, kind, a, b))

    def product(self, words: list[str], kind: str, a: Any, b: Any) -> tuple[str, str]:
        """A product of integers and its type."""
        part = self.expect(words, "lo", "hi", "wide")
        a, b = self.pair(a, b, kind)
        if part == "lo":
            return f"{a} * {b}", kind
        if part == "wide":
            wide = f"{kind[0]}{2 * _bits(kind)}"
            cast = wide.replace("s", "i")
            return f"{a}.astype({cast}) * {cast}({b})" if b in self.t.space else f"{a}.astype({cast}) * {b}", wide
        if kind == "u64":
            return f"A.high_half_64({a}, {b})", kind
        if _bits(kind) == 32:
            return f"A.high_half({a}, {b})", kind
        raise Unknown(self.where)

    def do_mad(self, words: list[str], d: Any, a: Any, b: Any, c: Any) -> None:
        kind = self.kind(words)
        if kind[0] == "f":
            raise Unknown(f"{self.where}: mad of floating-point numbers")
        product, kind = self.product(words, kind, a, b)
        self.put(d, f"({product}) + {self.read(c, kind)}", kind)

    def do_fma(self, words: list[str], d: Any, a: Any, b: Any, c: Any) -> None:
        kind = self.kind(words)
        self.expect(words, "rn")
        if kind != "f32":
            raise Unknown(f"{self.where}: fma of {kind}")
        a, b = self.pair(a, b, kind)
        self.put(d, f"A.fma32(*np.broadcast_arrays({a}, {b}, {self.read(c, kind)}))", kind)

    def do_div(self, words: list[str], d: Any, a: Any, b: Any) -> None:
        kind = self.kind(words)
        a, b = self.pair(a, b, kind)
        if kind[0] == "f":
            if not {"rn", "rz"} & set(words):
                raise Unknown(f"{self.where}: an approximate division")
            self.rounded(words, kind, "div", d, f"{a} / {b}", a, b)
        else:
            self.put(d, f"A.quotient({a}, {b})", kind)

    def do_rem(self, words: list[str], d: Any, a: Any, b: Any) -> None:
        kind = self.kind(words)
        a, b = self.pair(a, b, kind)
        self.put(d, f"A.remainder({a}, {b})", kind)

    def do_sqrt(self, words: list[str], d: Any, a: Any) -> None:
        kind = self.kind(words)
        self.expect(words, "rn")
        self.put(d, f"np.sqrt({self.read(a, kind)})", kind)

    def do_rcp(self, words: list[str], d: Any, a: Any) -> None:
        kind = self.kind(words)
        self.expect(words, "rn")
        self.put(d, f"f{_bits(kind)}(1) / {self.read(a, kind)}", kind)

    def do_neg(self, words: list[str], d: Any, a: Any) -> None:
        kind = self.kind(words)
        self.put(d, f"-{self.read(a, kind)}", kind)

    def do_abs(self, words: list[str], d: Any, a: Any) -> None:
        kind = self.kind(words)
        self.put(d, f"abs({self.read(a, kind)})", kind)

    def _extreme(self, words: list[str], d: Any, a: Any, b: Any, larger: bool) -> None:
        kind = self.kind(words)
        a, b = self.pair(a, b, kind)
        name = "largest" if larger else "smallest"
        if kind[0] == "f":
            if self.take(words, "NaN"):
                name += "_or_nan"
            self.put(d, f"A.{name}({a}, {b})", kind)
        else:
            self.put(d, f"np.{'maximum' if larger else 'minimum'}({a}, {b})", kind)

    def do_max(self, words: list[str], d: Any, a: Any, b: Any) -> None:
        self._extreme(words, d, a, b, True)

    def do_min(self, words: list[str], d: Any, a: Any, b: Any) -> None:
        self._extreme(words, d, a, b, False)

    def _logic(self, words: list[str], d: Any, a: Any, b: Any, symbol: str) -> None:
        kind = self.kind(words)
        a, b = self.pair(a, b, kind)
        self.put(d, f"{a} {symbol} {b}", kind)

    def do_and(self, words: list[str], d: Any, a: Any, b: Any) -> None:
        self._logic(words, d, a, b, "&")

    def do_or(self, words: list[str], d: Any, a: Any, b: Any) -> None:
        self._logic(words, d, a, b, "|")

    def do_xor(self, words: list[str], d: Any, a: Any, b: Any) -> None:
        self._logic(words, d, a, b, "^")

    def do_not(self, words: list[str], d: Any, a: Any) -> None:
        kind = self.kind(words)
        self.put(d, f"~{self.read(a, kind)}", kind)

    def _shift(self, words: list[str], d: Any, a: Any, b: Any, left: bool) -> None:
        kind = self.kind(words)
        x = self.read(a, kind)
        if not str(a).startswith("%"):
            x = self.t.full(self.number(a, kind), _bits(kind), _form(kind))
        if _NUMBER.fullmatch(str(b)) and int(b, 0) < _bits(kind):
            self.put(d, f"{x} {'<<' if left else '>>'} {self.read(b, kind)}", kind)
        else:
            self.put(d, f"A.shifted({x}, {self.read(b, 'u32')}, {left})", kind)

    def do_shl(self, words: list[str], d: Any, a: Any, b: Any) -> None:
        self._shift(words, d, a, b, True)

    def do_shr(self, words: list[str], d: Any, a: Any, b: Any) -> None:
        self._shift(words, d, a, b, False)

    def do_shf(self, words: list[str], d: Any, a: Any, b: Any, c: Any) -> None:
        kind = self.kind(words)
        left = self.expect(words, "l", "r") == "l"
        wraps = self.expect(words, "wrap", "clamp") == "wrap"
        low, high = self.pair(a, b, kind)
        self.put(d, f"A.funnel({low}, {high}, {self.read(c, 'u32')}, {left}, {wraps})", kind)

    def do_bfe(self, words: list[str], d: Any, a: Any, b: Any, c: Any) -> None:
        kind = self.kind(words)
        unsigned = f"b{_bits(kind)}"
        begin, length = self.read(b, "u32"), self.read(c, "u32")
        self.put(d, f"A.field({self.read(a, unsigned)}, {begin}, {length}, {kind[0] == 's'})", unsigned)

    def do_bfi(self, words: list[str], d: Any, a: Any, b: Any, c: Any, e: Any) -> None:
        kind = self.kind(words)
        x, into = self.pair(a, b, kind)
        self.put(d, f"A.inserted({x}, {into}, {self.read(c, 'u32')}, {self.read(e, 'u32')})", kind)

    def do_prmt(self, words: list[str], d: Any, a: Any, b: Any, c: Any) -> None:
        kind = self.kind(words)
        x, y = self.pair(a, b, kind)
        self.put(d, f"A.permuted({x}, {y}, {self.read(c, 'u32')})", kind)

    def do_lop3(self, words: list[str], d: Any, a: Any, b: Any, c: Any, table: Any) -> None:
        kind = self.kind(words)
        x, y = self.pair(a, b, kind)
        self.put(d, f"A.table_of_bits({x}, {y}, {self.read(c, kind)}, {int(table, 0)})", kind)

    def do_popc(self, words: list[str], d: Any, a: Any) -> None:
        self.put(d, f"np.bitwise_count({self.read(a, self.kind(words))}).astype(u32)", "u32")

    def do_clz(self, words: list[str], d: Any, a: Any) -> None:
        self.put(d, f"A.leading_zeros({self.read(a, self.kind(words))})", "u32")

    def do_brev(self, words: list[str], d: Any, a: Any) -> None:
        kind = self.kind(words)
        self.put(d, f"A.reversed_bits({self.read(a, kind)})", kind)

    def do_mov(self, words: list[str], d: Any, a: Any) -> None:
        kind = self.kind(words)
        bits = _bits(kind)
        if isinstance(d, tuple):
            part = bits // len(d)
            whole = self.read(a, f"b{bits}")
            for i, name in enumerate(d):
                self.put(name, f"({whole} >> u{bits}({i * part})).astype(u{part})", f"b{part}")
        elif isinstance(a, tuple):
            part = bits // len(a)
            pieces = [f"{self.read(x, f'b{part}')}.astype(u{bits}) << u{bits}({i * part})" for i, x in enumerate(a)]
            self.put(d, " | ".join(f"({piece})" for piece in pieces), f"b{bits}")
        elif not a.startswith("%"):
            plain = kind if kind == "pred" else f"b{bits}"
            self.put(d, self.t.full(self.number(a, plain), bits, "u"), plain)
        else:
            self.copy(d, a, kind)

    def copy(self, d: Any, a: Any, kind: str) -> None:
        """A move, which keeps all that is known of the value."""
        if self.current.guard or self.bits_of(d) != self.bits_of(a):
            plain = kind if kind == "pred" else f"b{_bits(kind)}"
            return self.put(d, self.read(a, plain), plain)
        if a not in self.values:
            self.value(a, "u")
        self.values[d] = dict(self.values[a])
        self.changed.add(d)

    def do_cvta(self, words: list[str], d: Any, a: Any) -> None:
        kind = self.kind(words)
        to = self.take(words, "to")
        space = self.expect(words, "global", "shared", "local", "param", "const")
        base = {"shared": SHARED_BASE, "local": LOCAL_BASE}.get(space, 0)
        if base == 0:
            return self.do_mov([kind], d, a)
        number = self.t.constant(np.uint64(base), 64, "u")
        x, _ = self.pair(a, a, f"b{_bits(kind)}")
        self.put(d, f"{x} {'-' if to else '+'} {number}", f"b{_bits(kind)}")

    def do_selp(self, words: list[str], d: Any, a: Any, b: Any, c: Any) -> None:
        kind = f"b{_bits(self.kind(words))}"
        self.put(d, f"where({self.value(c, 'u')}, {self.read(a, kind)}, {self.read(b, kind)})", kind)

    def do_setp(self, words: list[str], d: Any, a: Any, b: Any, c: Any = None) -> None:
        kind = self.kind(words)
        combined = self.take(words, "and", "or", "xor")
        word = words.pop(0)
        x, y = self.pair(a, b, kind)
        if kind[0] == "f" and word in _OPPOSITE:
            test = f"~({x} {_OPPOSITE[word]} {y})"
            if word == "neu":
                test = f"({x} != {y})"
            elif word == "equ":
                test = f"~(({x} < {y}) | ({x} > {y}))"
        elif kind[0] == "f" and word in ("num", "nan"):
            nan = f"np.isnan({x}) | np.isnan({y})"
            test = f"({nan})" if word == "nan" else f"~({nan})"
        elif kind[0] == "f" and word == "ne":
            test = f"(({x} < {y}) | ({x} > {y}))"
        elif word in _COMPARISONS or word in _UNSIGNED_COMPARISONS:
            test = f"({x} {(_COMPARISONS | _UNSIGNED_COMPARISONS)[word]} {y})"
        else:
            raise Unknown(f"{self.where}: unknown comparison {word}")
        first, _, second = d.partition("|")
        other = "" if c is None else (f"~{self.value(c[1:], 'u')}" if c[0] == "!" else self.value(c, "u"))
        join = {"and": "&", "or": "|", "xor": "^", "": ""}[combined]
        test = self.let(test)
        self.put(first, f"{test} {join} {other}" if other else test, "pred")
        if second:
            self.put(second, f"~{test} {join} {other}" if other else f"~{test}", "pred")

    def do_cvt(self, words: list[str], d: Any, a: Any, b: Any = None) -> None:
        source, target = self.kind(words), self.kind(words)
        if b is not None:
            self.expect(words, "rn")
            if source != "f32" or target not in ("f16x2", "bf16x2"):
                raise Unknown(self.where)
            high, low = (f"{self.narrow(self.read(x, 'f32'), target[:-2])}.astype(u32)" for x in (a, b))
            return self.put(d, f"{high} << u32(16) | {low}", "b32")
        if target[0] == "f" and source[0] == "f":
            return self.convert_float(words, d, a, source, target)
        if target == "bf16" and source == "f32":
            self.expect(words, "rn")
            return self.put(d, self.narrow(self.read(a, source), "bf16"), "b16")
        if source == "bf16" and target in ("f32", "f64"):
            widened = f"({self.read(a, 'b16')}.astype(u32) << u32(16))"
            if target == "f32":
                return self.put(d, widened, "b32")
            return self.put(d, f"{widened}.view(f32).astype(f64)", "f64")
        if target[0] in "us" and source[0] == "f":
            rounding = self.expect(words, "rni", "rzi", "rmi", "rpi")
            kind = f"{'u' if target[0] == 'u' else 'i'}{_bits(target) // 8}"
            return self.put_wide(d, f"A.to_integer({self.read(a, source)}, '{rounding}', '{kind}')", target)
        if target[0] == "f" and source[0] in "us":
            self.expect(words, "rn")
            return self.put(d, f"{self.whole(a, source)}.astype(f{_bits(target)})", target)
        if target[0] in "us" and source[0] in "us":
            if self.take(words, "sat"):
                raise Unknown(f"{self.where}: a saturating conversion of integers")
            return self.put_wide(d, f"{self.whole(a, source)}.astype({target.replace('s', 'i')})", target)
        raise Unknown(self.where)

    def whole(self, a: Any, kind: str) -> str:
        """An integer operand, of a register that may be wider."""
        if not str(a).startswith("%"):
            return self.t.full(self.number(a, kind), _bits(kind), _form(kind))
        return self.read(a, kind)

    def put_wide(self, d: Any, expression: str, kind: str) -> None:
        """Writes a register that may be wider than the type, which then is extended."""
        own = self.bits_of(d)
        if own > _bits(kind):
            kind = f"{kind[0]}{own}"
            expression = f"({expression}).astype({kind.replace('s', 'i')})"
        self.put(d, expression, kind)

    def narrow(self, x: str, kind: str) -> str:
        return f"A.bfloat16({x})" if kind == "bf16" else f"A.bits({x}.astype(np.float16))"

    def convert_float(self, words: list[str], d: Any, a: Any, source: str, target: str) -> None:
        x = self.read(a, source)
        if rounding := self.take(words, "rni", "rzi", "rmi", "rpi"):
            expression = f"A.TO_INTEGER['{rounding}']({x})"
        elif _bits(target) >= _bits(source):
            expression = x
        else:
            self.expect(words, "rn")
            expression = x
        if source != target:
            expression = f"{expression}.astype(f{_bits(target)})"
        if self.take(words, "sat"):
            expression = f"A.saturated({expression})"
        self.put(d, expression, target)

    def do_trap(self, words: list[str]) -> None:
        if self.current.guard:
            raise Unknown(self.where)
        self.lines.append(f"raise Fault({self.where!r})")

    # Memory.

    def address(self, operand: Any) -> tuple[str | None, int]:
        """The register in an address, or None, and what is added to it."""
        found = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+)\s*)?\]", operand)
        if found is None:
            raise Unknown(f"{self.where}: {operand}")
        offset = int(found[2], 0) if found[2] else 0
        if found[1].startswith("%"):
            return found[1], offset
        if _NUMBER.fullmatch(found[1]):
            return None, int(found[1], 0) + offset
        if found[1] not in self.t.symbols:
            raise Unknown(f"{self.where}: no such symbol: {found[1]}")
        return None, self.t.symbols[found[1]] + offset

    def addresses(self, operand: Any) -> str:
        register, offset = self.address(operand)
        if register is None:
            return self.t.full(np.uint64(offset), 64, "u")
        value = self.value(register, "u")
        if self.bits_of(register) == 32:
            value = self.let(f"{value}.astype(u64)")
        if offset == 0:
            return value
        number = self.t.constant(np.uint64(offset & (2**64 - 1)), 64, "u")
        return self.let(f"{value} + {number}")

    def space(self, words: list[str]) -> str:
        for word, space in _SPACES.items():
            if self.take(words, word):
                return space
        return "generic"

    def memory_words(self, words: list[str]) -> tuple[str, int, str, bool]:
        """Type, length of the vector, space, and whether it is what is never written."""
        kind = self.kind(words)
        space = self.space(words)
        count = int(self.take(words, "v2", "v4", "v8")[1:] or 1)
        constant = "nc" in words
        words[:] = [word for word in words if word not in _CACHES]
        return kind, count, space, constant

    def site(self) -> int:
        self.t.instructions.append(self.current)
        return len(self.t.instructions) - 1

    def do_ld(self, words: list[str], d: Any, a: Any, policy: Any = None) -> None:
        if "acquire" in words:
            raise Unknown(f"{self.where}: an acquiring load")
        kind, count, space, constant = self.memory_words(words)
        bits = _bits(kind)
        targets = d if isinstance(d, tuple) else (d,)
        register, offset = self.address(a)
        if space == "param" and register is None:
            place = offset - self.t.parameters[""]
            values = [self.let(f"T.parameter({place + i * bits // 8}, {bits})") for i in range(count)]
        else:
            if space == "param":
                space = "global"
            where = f"{self.site()}, {self.addresses(a)}"
            found = self.let(f"T.load({where}, {bits // 8}, {count}, '{space}', {self.mask()}, {constant})")
            values = [f"{found}[{i}]" for i in range(count)] if count > 1 else [found]
        for target, value in zip(targets, values, strict=True):
            if target != "_":
                own = self.bits_of(target)
                if own > bits:
                    cast = (
                        f"{value}.view(i{bits}).astype(i{own}).view(u{own})"
                        if kind[0] == "s"
                        else f"{value}.astype(u{own})"
                    )
                    self.put(target, cast, f"b{own}")
                else:
                    self.put(target, value, f"b{bits}")

    def do_st(self, words: list[str], a: Any, b: Any, policy: Any = None) -> None:
        if "release" in words:
            raise Unknown(f"{self.where}: a releasing store")
        kind, _, space, _ = self.memory_words(words)
        bits = _bits(kind)
        sources = b if isinstance(b, tuple) else (b,)
        values = [self.stored(x, bits) for x in sources]
        where = f"{self.site()}, {self.addresses(a)}"
        self.lines.append(f"T.store({where}, {bits // 8}, ({', '.join(values)},), '{space}', {self.mask()})")

    def stored(self, x: str, bits: int) -> str:
        if not x.startswith("%"):
            return self.t.full(self.number(x, f"b{bits}"), bits, "u")
        value = self.value(x, "u")
        return value if self.bits_of(x) == bits else self.let(f"{value}.astype(u{bits})")

    def do_atom(self, words: list[str], d: Any, a: Any, b: Any, c: Any = None) -> None:
        kind = self.kind(words)
        space = self.space(words)
        order = self.take(words, "relaxed", "acquire", "release", "acq_rel") or "relaxed"
        self.take(words, "gpu", "cta", "sys")
        operation = self.expect(words, "add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
        if kind[0] == "f":
            raise Unknown(f"{self.where}: an atomic operation on {kind}")
        operands = [self.stored(x, _bits(kind)) for x in (b, c) if x is not None]
        call = (
            f"T.atomic({self.site()}, {self.addresses(a)}, '{kind}', '{operation}', ({', '.join(operands)},), "
            f"'{space}', '{order}', {self.mask()})"
        )
        if d is None:
            self.lines.append(call)
        else:
            self.put(d, call, f"b{_bits(kind)}")

    def do_red(self, words: list[str], a: Any, b: Any) -> None:
        self.do_atom(words, None, a, b)

    def do_membar(self, words: list[str]) -> None:
        self.expect(words, "gl", "cta", "sys")
        self.lines.append(f"T.fence({self.mask()})")

    def do_fence(self, words: list[str]) -> None:
        self.expect(words, "acq_rel", "sc")
        self.expect(words, "gpu", "sys", "cta")
        self.lines.append(f"T.fence({self.mask()})")

    # Warps.

    def do_shfl(self, words: list[str], d: Any, a: Any, b: Any, c: Any, members: Any) -> None:
        self.expect(words, "sync")
        way = self.expect(words, "bfly", "idx", "up", "down")
        self.kind(words)
        target, _, inside = d.partition("|")
        x, _ = self.pair(a, a, "b32")
        lane, clamp, threads = (self.read(each, "b32") for each in (b, c, members))
        found = self.let(f"T.shuffle({self.site()}, {x}, '{way}', {lane}, {clamp}, {threads}, {self.mask()})")
        self.put(target, f"{found}[0]", "b32")
        if inside:
            self.put(inside, f"{found}[1]", "pred")

    def do_redux(self, words: list[str], d: Any, a: Any, members: Any) -> None:
        self.expect(words, "sync")
        way = self.expect(words, "add", "min", "max", "and", "or", "xor")
        kind = self.kind(words)
        x, threads = self.read(a, kind), self.read(members, "b32")
        self.put(d, f"T.reduce({self.site()}, {x}, '{way}', {threads}, {self.mask()})", kind)

    def do_vote(self, words: list[str], d: Any, a: Any, members: Any) -> None:
        self.expect(words, "sync")
        way = self.expect(words, "any", "all", "ballot", "uni")
        kind = self.kind(words)
        test = f"~{self.value(a[1:], 'u')}" if a[0] == "!" else self.value(a, "u")
        self.put(d, f"T.vote({self.site()}, {test}, '{way}', {self.read(members, 'b32')}, {self.mask()})", kind)

    def do_bar(self, words: list[str], members: Any) -> None:
        self.expect(words, "warp")
        self.expect(words, "sync")
        self.lines.append(f"T.warp_barrier({self.site()}, {self.read(members, 'b32')}, {self.mask()})")

    def _matrix(self, words: list[str]) -> tuple[int, bool]:
        for word in ("sync", "aligned", "m8n8"):
            self.expect(words, word)
        count = int(self.expect(words, "x1", "x2", "x4")[1:])
        transposed = bool(self.take(words, "trans"))
        self.expect(words, "shared", "shared::cta")
        self.expect(words, "b16")
        return count, transposed

    def do_ldmatrix(self, words: list[str], d: Any, a: Any) -> None:
        count, transposed = self._matrix(words)
        found = self.let(f"T.load_matrix({self.site()}, {self.addresses(a)}, {count}, {transposed}, {self.mask()})")
        for i, name in enumerate(d if isinstance(d, tuple) else (d,)):
            self.put(name, f"{found}[{i}]", "b32")

    def do_stmatrix(self, words: list[str], a: Any, b: Any) -> None:
        count, transposed = self._matrix(words)
        values = ", ".join(self.read(x, "b32") for x in (b if isinstance(b, tuple) else (b,)))
        self.lines.append(
            f"T.store_matrix({self.site()}, {self.addresses(a)}, ({values},), {count}, {transposed}, {self.mask()})"
        )

    # The end of a block.

    def barrier(self, instruction: Instruction) -> str:
        """What the machine gets of a barrier: nothing, or a predicate and how to join those of all threads."""
        self.current = instruction
        words = [word for word in instruction.modifiers if word not in ("aligned", "cta")]
        if words == ["sync"]:
            if len(instruction.operands) > 2 or not all(str(each).isdigit() for each in instruction.operands):
                raise Unknown(self.where)
            if len(instruction.operands) == 2 and int(str(instruction.operands[1])) != self.t.threads:
                raise Unknown(f"{self.where}: a barrier of a part of the block")
            return "None"
        if words[:1] == ["red"] and len(instruction.operands) == 3:
            way = words[1]
            target, _, test = instruction.operands
            if way not in ("or", "and", "popc") or words[2:] != (["u32"] if way == "popc" else ["pred"]):
                raise Unknown(self.where)
            assert isinstance(target, str) and isinstance(test, str)
            value = f"~{self.value(test[1:], 'u')}" if test[0] == "!" else self.value(test, "u")
            return f"({value}, '{way}', {self.t.kept[target]})"
        raise Unknown(self.where)
