"""What tests of compiled code share: compiler, lister of machine code, and what csrc/core/rules.h declares."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from reporting.machine_code import (
    BeginKernelName,
    Forms,
    KernelName,
    VoteKernelName,
    begin_kernel_name,
    find_cuobjdump,
    kernel_name,
    vote_kernel_name,
)

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


def cuda_launch_library(built_once: Callable[..., Path], *flags: str) -> ctypes.CDLL:
    """tests/host/cuda_launch.cpp: the host side of csrc/cuda, which launches on a runtime that takes notes."""
    flags = ("-O0", "-shared", "-fPIC", "-Wno-unused-function", "-Wno-unused-but-set-variable", *flags)
    flags += (f"-I{HOST / 'fake_cuda'}",)
    folder = built_once("cuda_launch", lambda folder: build("cuda_launch.cpp", folder / "library.so", *flags))
    found = ctypes.CDLL(str(folder / "library.so"))
    for name in ("capacity", "step_at"):
        getattr(found, name).restype = ctypes.c_int64
    for name in ("launched_step", "launched_bytes", "launched_parameters"):
        getattr(found, name).restype = ctypes.c_void_p
    return found


def compile_with(*arguments: str) -> None:
    command = [compiler(), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


def cuobjdump() -> str:
    """The tool that lists machine code, or a skip where there is none."""
    found = find_cuobjdump()
    if found is None:
        pytest.skip("no cuobjdump: it is in the CUDA toolkit and in Triton's wheel for Linux on x86-64")
    return found


def listing(*arguments: str) -> str:
    """What cuobjdump prints."""
    return subprocess.run([cuobjdump(), *arguments], capture_output=True, text=True, check=True, timeout=600).stdout


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
    return {f"{name}.rn.{size}" for name in ("add", "sub", "mul", "div", "sqrt", "rcp")}


AnyKernelName = KernelName | VoteKernelName | BeginKernelName


def any_kernel_name(symbol: str) -> AnyKernelName:
    """Which kernel of csrc/cuda has that symbol."""
    name = kernel_name(symbol) or vote_kernel_name(symbol) or begin_kernel_name(symbol)
    assert name is not None, symbol[:200]
    return name


@cache
def ptx(module: str) -> dict[str, dict[AnyKernelName, str]]:
    """PTX of each kernel in a built module, by virtual architecture, each from the kernel's symbol on.

    What ptxas makes machine code of, at build time or in the driver.
    """
    found: dict[str, dict[AnyKernelName, str]] = defaultdict(dict)
    for image in listing("-ptx", module).split("Fatbin ptx code:")[1:]:
        architecture = re.search(r"^arch = sm_(\w+)", image, re.MULTILINE)
        assert architecture is not None
        for entry in re.split(r"^(?:\.(?:visible|weak) )?\.entry ", image, flags=re.MULTILINE)[1:]:
            found[f"compute_{architecture[1]}"][any_kernel_name(entry)] = entry
    return dict(found)


@cache
def symbols(module: str) -> dict[str, dict[AnyKernelName, str]]:
    """Mangled names of the kernels in a built module, by architecture that it has machine code for."""
    found: dict[str, dict[AnyKernelName, str]] = defaultdict(dict)
    architecture = ""
    for line in listing("--dump-resource-usage", module).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            found[architecture][any_kernel_name(match[1])] = match[1]
    return dict(found)


#: The tensors that the kernel in triton_kernels.update takes, in order, as Triton writes the types of pointers.
TRITON_TENSORS = {
    "entries": "*i64",
    "tensor_of_chunk": "*i32",
    "grads": "*i64",
    "rng_keys": "*i32",
    "scalar_indices": "*i32",
    "scalars": "*fp64",
    "sums": "*fp64",
    "arrivals": "*i32",
    "chunk_statistics": "*fp64",
}

#: The arguments of the kernels of a step that begins on the device, each in a module of its name.
TRITON_STEP_ARGUMENTS = {
    "norm": {
        "entries": "*i64",
        "tensor_of_chunk": "*i32",
        "grads": "*i64",
        "sums": "*fp64",
        "arrivals": "*i32",
        "totals": "*fp64",
        "places": "*i32",
    },
    "begin": {
        "entries": "*i64",
        "operations": "*i32",
        "results": "*i32",
        "values": "*fp64",
        "control": "*fp64",
        "grads": "*i64",
        "out_grads": "*i64",
        "out_rng_keys": "*i32",
        "out_scalars": "*fp64",
        "length": "i32",
        "width": "i32",
    },
}

#: The arguments of the kernels in triton_kernels.vote; ``result`` of reading is of 16 bits where an entry is.
TRITON_VOTE_ARGUMENTS = {
    "cast_votes": {"entries": "*i64", "entry_of_chunk": "*i32", "scalars": "*fp32", "codes": "*u8"},
    "count_votes": {"codes": "*i32", "workers": "i32", "words": "i64", "result": "*i32"},
    "read_votes": {
        "entries": "*i64",
        "entry_of_chunk": "*i32",
        "scalars": "*fp32",
        "rng_keys": "*i32",
        "result": "*u8",
        "divisor": "fp32",
    },
}


def compile_triton(
    jobs: Sequence[tuple[str, Mapping[str, Any]] | tuple[str, Mapping[str, Any], str]],
    folder: Path,
    before: Sequence[str] = (),
) -> list[Path]:
    """Compiles Triton kernels without a device, in a process of its own.

    Args:
        jobs: of each a target ("sm_90", "gfx942"), the kernel's constants, the rule by its name, and which kernel it
            is, where it is not triton_kernels.update.
        folder: where what Triton makes is written.
        before: folders that are searched for modules first, for another Triton than that of the tests.

    Returns:
        For each job a path that lacks a suffix: ``.ptx`` and ``.cubin``, or ``.amdgcn``; and ``.json``, which holds the
        kernel's ``name``, its ``num_warps`` and the bytes of ``shared`` memory that a launch must give it.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # A cache of its own, so what is looked at was made now.
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    done = subprocess.run(
        [sys.executable, str(HOST / "compile_triton.py"), str(folder)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": os.pathsep.join(path for path in (*before, *sys.path) if path)},
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        timeout=600,
    )
    # What went wrong is said last, or by ptxas first; between them is the whole program.
    assert done.returncode == 0, done.stdout[:2000] + done.stderr[-2000:]
    return [folder / str(number) for number in range(len(jobs))]


@dataclass(frozen=True)
class Rule:
    """An update rule as csrc/core/rules.h declares it."""

    struct: str
    moments: int
    bounded: bool
    has_blocks: bool
    divides: bool  # by an element or by a scalar
    roots: bool
    reads_variance: bool
    first_is_weights: bool

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
        bounded = own["bounded"] == "true"
        weights = own["first_is_weights"] == "true"
        has_blocks = int(own["moments"]) > 0 and (not bounded or own["bound_by_group"] == "true") and not weights
        flags = (bounded, has_blocks, divides, roots, own["reads_variance"] == "true", weights)
        found[own["name"]] = Rule(struct, int(own["moments"]), *flags)
    return found


def fixed_kernels() -> list[KernelName]:
    """Those that csrc/cuda/instances.h lists, in order."""
    return _listed_kernels((ROOT / "csrc" / "cuda" / "instances.h").read_text(encoding="utf-8"))


def _listed_kernels(text: str) -> list[KernelName]:
    found = []
    text = re.sub(r"//.*", "", text)
    for name, rows in re.findall(r"#define (\w+)\(X\)((?:.*\\\n)+.*)", text):
        for words in re.findall(r"X\((\w+(?:, \w+){6})\)", rows):
            functor, threshold_pass, storage, dtype, *others = words.split(", ")
            forms = Forms(dtype, dtype, *others)
            found.append(KernelName(functor, threshold_pass, storage, forms, name.endswith("_SCALED")))
    assert len(found) == len(re.findall(r"X\(\w+,", text)), "a row was not read"
    return found


def quick_fixed_kernels() -> list[KernelName]:
    """Those that tests/host/cuda_on_host.cpp has when it is built with ``QUICK``."""
    text = (HOST / "cuda_on_host.cpp").read_text(encoding="utf-8")
    return _listed_kernels(text[text.index("#elif defined(SIGNADAM_QUICK)") :].partition("#else")[0])


def quick_rules() -> set[str]:
    """The names of the rules that programs of tests/host have when they are built with ``QUICK``."""
    text = (HOST / "host_block.h").read_text(encoding="utf-8")
    listed = re.search(r"#define SIGNADAM_HOST_RULES\(X\)(.*?)\n#else", text, re.DOTALL)
    assert listed is not None
    structs = set(re.findall(r"X\((\w+)\)", listed[1]))
    return {name for name, rule in rules().items() if rule.struct in structs}
