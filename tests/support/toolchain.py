"""What tests of compiled code share: compiler, lister of machine code, and what csrc/core/rules.h declares."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: The sources of the programs that tests compile.
HOST = ROOT / "tests" / "host"
#: As setup.py compiles the arithmetic: one rounding per operation.
ARITHMETIC = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
WARNINGS = ("-Wall", "-Wextra")
#: With one rule of those that share code: see host_block.h.
QUICK = ("-DSIGNADAM_QUICK",)
#: With every access and every operation checked.
ADDRESS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
#: The same checks, but what is undefined ends the program without a word: compiled in two thirds of the time.
ADDRESS_QUICK = (*ADDRESS, "-fsanitize-undefined-trap-on-error")


def compiler() -> str:
    """The C++ compiler, or a skip that says there is none."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no C++ compiler: {name} is not on PATH")
    return found


def build(source: str, target: Path, *flags: str) -> Path:
    """Compiles ``tests/host/<source>`` to ``target``; a failure to compile is a failure of the test."""
    compile_with("-std=c++17", *ARITHMETIC, *WARNINGS, *flags, str(HOST / source), "-o", str(target))
    return target


def build_traced(source: str, target: Path, *flags: str) -> Path:
    """The same with a call at every access, which the program itself takes."""
    # Instrumented for ThreadSanitizer, but linked without it.
    object_file = target.with_suffix(".o")
    build(source, object_file, "-O1", "-DSIGNADAM_TRACED", "-fsanitize=thread", "-Wno-unused-function", "-c", *flags)
    compile_with(str(object_file), "-o", str(target))
    return target


def compile_with(*arguments: str) -> None:
    command = [compiler(), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


def cuobjdump() -> str:
    """The tool that lists machine code: of the toolkit, or the one in Triton's wheel; a skip where there is neither."""
    candidates = [shutil.which("cuobjdump")]
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    candidates += [str(Path(home, "bin", "cuobjdump")) for home in homes]
    # Asked for without importing triton, which would fix whether its interpreter is used.
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    for candidate in candidates:
        if candidate is not None and os.access(candidate, os.X_OK):
            return candidate
    pytest.skip("no cuobjdump: it is in the CUDA toolkit and in Triton's wheel for Linux on x86-64")


def listing(*arguments: str) -> str:
    """What cuobjdump prints."""
    return subprocess.run([cuobjdump(), *arguments], capture_output=True, text=True, check=True, timeout=120).stdout


class Instruction(NamedTuple):
    address: int
    operation: str  # with its modifiers
    operands: list[str]


def instruction(line: str) -> Instruction | None:
    """The instruction in a line of ``cuobjdump -sass``, if there is one."""
    found = re.match(r"\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", line)
    return None if found is None else Instruction(int(found[1], 16), found[2], found[3].strip().split(", "))


def resources(text: str) -> tuple[int, int, int] | None:
    """Registers, bytes of stack and of local memory in a line of ``cuobjdump --dump-resource-usage``."""
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    return None if found is None else (int(found[1]), int(found[2]), int(found[3]))


#: Floating-point arithmetic in PTX, with its modifiers.
PTX_ARITHMETIC = re.compile(r"\b(?:fma|mad|add|sub|mul|div|sqrt|rcp|rsqrt)\.[\w.]*f(?:16x2|16|32x2|32|64)\b")


def exact_ptx(size: str) -> set[str]:
    """What may stand in PTX for operations that round once, to nearest."""
    return {f"{name}.rn.{size}" for name in ("add", "sub", "mul", "div", "sqrt")}


@dataclass(frozen=True)
class Rule:
    """An update rule as csrc/core/rules.h declares it."""

    struct: str
    moments: int
    bounded: bool
    divides: bool  # by an element or by a scalar
    roots: bool
    reads_variance: bool

    @property
    def aux(self) -> bool:
        """Whether it has a third operand, which only kernels for any storage serve."""
        return self.moments > 2 or self.reads_variance


def rules() -> dict[str, Rule]:
    """All rules by name, in order."""
    text = re.sub(r"//.*", "", (ROOT / "csrc" / "core" / "rules.h").read_text(encoding="utf-8"))
    structs = dict(re.findall(r"^struct (\w+)[ \w:<>]* \{(.*?)^\};", text, re.DOTALL | re.MULTILINE))
    said = {
        name: dict(re.findall(r"static constexpr [\w *]*?(\w+) = \"?(\w+)", body)) for name, body in structs.items()
    }
    listed = re.search(r"#define SIGNADAM_RULES\(X\)(.*?)\n\n", text, re.DOTALL)
    assert listed is not None
    found = {}
    for struct in re.findall(r"X\((\w+)\)", listed[1]):
        own = said["Traits"] | said[struct]
        update = structs[struct][structs[struct].index("void update(") :]
        divides = "/" in update
        assert own["divides"] == str(divides).lower(), struct
        roots = "square_root(" in update
        flags = (own["bounded"] == "true", divides, roots, own["reads_variance"] == "true")
        found[own["name"]] = Rule(struct, int(own["moments"]), *flags)
    return found


def quick_rules() -> set[str]:
    """The names of the rules that programs of tests/host have when they are built with ``QUICK``."""
    text = (HOST / "host_block.h").read_text(encoding="utf-8")
    listed = re.search(r"#define SIGNADAM_HOST_RULES\(X\)(.*?)\n#else", text, re.DOTALL)
    assert listed is not None
    structs = set(re.findall(r"X\((\w+)\)", listed[1]))
    return {name for name, rule in rules().items() if rule.struct in structs}
