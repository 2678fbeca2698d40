"""Bytes in flight of the compiled CUDA kernels, from their machine code: `python -m bench.inflight`.

A memory-bound kernel reaches the bandwidth only with enough loads under way: resident warps x 32 x the bytes a
thread has asked for before it needs the first of them. Resident warps follow from the registers, shared memory
and block size in the module; the bytes, from the most loads under way on any path through the SASS.
Needs cuobjdump (the toolkit's, or the one in Triton's wheel), no GPU.
"""

import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from reporting.machine_code import find_cuobjdump, kernel_name

_WARP = 32
_VISITS = 5_000  # paths are cut here; the figure is then a lower bound, and says so


class Unavailable(RuntimeError):
    """Says what is missing."""


class Multiprocessor(NamedTuple):
    """Limits of one streaming multiprocessor, from the occupancy tables of the CUDA programming guide."""

    registers: int
    threads: int
    shared: int
    blocks: int


_LIMITS = {
    "sm_80": Multiprocessor(65536, 2048, 164 << 10, 32),
    "sm_90": Multiprocessor(65536, 2048, 228 << 10, 32),
    "sm_100": Multiprocessor(65536, 2048, 228 << 10, 32),
}


@dataclass
class Resources:
    registers: int
    shared: int
    local: int
    threads: int


def resident_warps(use: Resources, limit: Multiprocessor) -> int:
    """Warps of one kernel that fit a multiprocessor.

    Registers go to warps in units of 256, shared memory to blocks in units of 128 bytes beside 1 KB for the system.
    """
    warps = -(-use.threads // _WARP)
    registers = -(-use.registers * _WARP // 256) * 256
    shared = -(-use.shared // 128) * 128 + 1024
    by_registers = limit.registers // registers // warps
    return warps * min(by_registers, limit.threads // use.threads, limit.shared // shared, limit.blocks)


@dataclass
class Instruction:
    address: int
    opcode: str
    operands: str
    predicated: bool


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_REGISTER = re.compile(r"\bR(\d+)(\.64)?\b")
_WIDTH = re.compile(r"\.(64|128)\b")
_WORDS = {"64": 2, "128": 4}  # registers


def parse(sass: str) -> list[Instruction]:
    return [
        Instruction(int(at, 16), opcode, operands.strip(), bool(predicate))
        for at, predicate, opcode, operands in _LINE.findall(sass)
    ]


def _loaded(instruction: Instruction) -> range:
    """The four registers that a 16-byte load from global memory fills."""
    target = re.match(r"(?:U?PT?\d*,\s*)?R(\d+)", instruction.operands)
    if not (instruction.opcode.startswith("LDG") and ".128" in instruction.opcode) or target is None:
        return range(0)
    return range(int(target[1]), int(target[1]) + 4)


def _read(instruction: Instruction) -> set[int]:
    """The registers that an instruction reads; a store reads as many as it is wide."""
    operands = instruction.operands
    if not instruction.opcode.startswith(("ST", "RED", "BRX", "CALL")):
        _, _, operands = operands.partition(",")  # the first operand is the result
    words = 1
    if instruction.opcode.startswith("ST") and (width := _WIDTH.search(instruction.opcode)):
        words = _WORDS.get(width[1], 1)
    read: set[int] = set()
    for register, pair in _REGISTER.findall(operands):
        read.update(range(int(register), int(register) + (2 if pair else words)))
    return read


def _successors(code: list[Instruction]) -> dict[int, list[int]]:
    """Where control may go from each index. A BSYNC leads to every BSSY target of its barrier."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    targets: dict[str, set[int]] = {}
    for instruction in code:
        match = re.search(r"(B\d+),.*?0x([0-9a-f]+)", instruction.operands)
        if instruction.opcode.startswith("BSSY") and match:
            targets.setdefault(match[1], set()).add(index[int(match[2], 16)])
    follow: dict[int, list[int]] = {}
    for i, instruction in enumerate(code):
        onward = [i + 1] if i + 1 < len(code) else []
        opcode = instruction.opcode.partition(".")[0]
        if opcode == "BRA" and (match := re.search(r"0x([0-9a-f]+)", instruction.operands)):
            conditional = instruction.predicated or "P" in instruction.operands.partition("0x")[0]
            follow[i] = [index[int(match[1], 16)], *(onward if conditional else [])]
        elif opcode == "BSYNC":
            barrier = instruction.operands.split(",")[-1].strip()
            follow[i] = sorted({*targets.get(barrier, set()), *onward})
        elif opcode in ("EXIT", "RET", "BRX", "TRAP", "BPT") and not instruction.predicated:
            follow[i] = []
        else:
            follow[i] = onward
    return follow


def bytes_before_use(code: list[Instruction]) -> tuple[int, bool]:
    """Most bytes that 16-byte loads (the vector path) have under way on any path, and whether all were walked.

    A load is under way until one of its registers is read or loaded anew.
    """
    follow = _successors(code)
    joins = {0} | {j for i, onward in follow.items() if onward != [i + 1] for j in onward}
    loads = [_loaded(instruction) for instruction in code]
    touched = [_read(instruction) | set(loaded) for instruction, loaded in zip(code, loads, strict=True)]

    most = visits = 0
    seen: dict[int, list[frozenset[int]]] = {}
    todo: list[tuple[int, frozenset[int]]] = [(0, frozenset())]  # next instruction, loads still waited for
    while todo and visits < _VISITS:
        i, waiting = todo.pop()
        while True:
            if i in joins:
                # A path that arrives with more loads under way has at least as many from here on.
                if any(waiting <= other for other in seen.get(i, [])):
                    break
                seen[i] = [other for other in seen.get(i, []) if not other <= waiting] + [waiting]
                visits += 1
            waiting = frozenset(j for j in waiting if touched[i].isdisjoint(loads[j]))
            if loads[i]:
                waiting |= {i}
                most = max(most, 16 * len(waiting))
            if not follow[i]:
                break
            *others, i = follow[i]
            todo += [(j, waiting) for j in others]
    return most, not todo


def _walked(sass: str) -> tuple[int, bool]:
    return bytes_before_use(parse(sass))


def _cuobjdump() -> str:
    if found := find_cuobjdump():
        return found
    raise Unavailable("no cuobjdump on PATH and none in a Triton package")


def _module() -> str:
    spec = importlib.util.find_spec("signadam_ext._C")
    if spec is None or spec.origin is None:
        raise Unavailable("signadam_ext._C is not built")
    return spec.origin


def _dump(*options: str) -> str:
    run = subprocess.run([_cuobjdump(), *options, _module()], capture_output=True, text=True, timeout=60)
    return run.stdout


def _readable(symbol: str) -> str:
    """The name that the module itself gives a kernel: sign_adam, sign_adam_pp+same_pass, pass_before+stored."""
    from signadam_ext.core.native import compiled as _C

    kernel = kernel_name(symbol)
    if kernel is None:
        return symbol
    if kernel.forms is not None:
        param, _, *others = kernel.forms
        return " ".join([kernel.rule, *kernel[1:3], param, *others])
    if kernel.functor == "AnyRule":
        before, observes = kernel.threshold_pass == "pass_before", kernel.storage == "with_statistics"
        return "scaled" + "+pass_before" * before + "+step_statistics" * observes
    rule = {name.replace("_", ""): name for name in _C.RULES}[kernel.functor.lower()]
    name = {"none": rule, "same_pass": f"{rule}+same_pass"}.get(kernel.threshold_pass, "pass_before")
    # A kernel for certain forms alone is told from the one for any by them.
    if forms := getattr(kernel, "forms", None):
        return f"{name} {'-'.join(forms)}"
    return name + {"plain": "", "any": "+stored", "with_statistics": "+step_statistics"}[kernel.storage]


class Target(NamedTuple):
    arch: str
    limit: Multiprocessor
    multiprocessors: int | None = None  # None without a GPU
    resident_blocks: Mapping[str, int] = {}  # as CUDA itself states it, by kernel


def _target(built: Sequence[str]) -> Target:
    """This machine's GPU, or an architecture of the build where there is none."""
    import torch

    if not torch.cuda.is_available():
        arch = "sm_90" if "sm_90" in built else built[-1]
        return Target(arch, _limit(arch))
    from signadam_ext.core.native import compiled as _C

    p = torch.cuda.get_device_properties(0)
    arch = f"sm_{p.major}{p.minor}"
    if arch not in built:
        raise Unavailable(f"signadam_ext._C is built for {', '.join(built)}, and this device is {arch}")
    blocks = {info["name"]: info["blocks_per_multiprocessor"] for info in _C.cuda_kernel_info(0)}
    return Target(arch, _limit(arch), p.multi_processor_count, blocks)


def _limit(arch: str) -> Multiprocessor:
    if arch not in _LIMITS:
        raise Unavailable(f"the limits of a multiprocessor of {arch} are not in the table of bench/inflight.py")
    return _LIMITS[arch]


def _resources(arch: str) -> dict[str, Resources]:
    usage = _dump("--dump-resource-usage", "-arch", arch)
    elf = _dump("--dump-elf", "-arch", arch)
    threads: dict[str, int] = {}
    for symbol, info in re.findall(r"^\.nv\.info\.(\S+)\n(.*?)(?=^\.\w|\Z)", elf, re.MULTILINE | re.DOTALL):
        if match := re.search(r"EIATTR_MAX_THREADS.*?Value:\s*(0x\w+) (0x\w+) (0x\w+)", info, re.DOTALL):
            x, y, z = (int(value, 16) for value in match.groups())
            threads[symbol] = x * y * z
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return {
        symbol: Resources(int(registers), int(shared), int(stack) + int(local), threads[symbol])
        for symbol, registers, stack, shared, local in re.findall(pattern, usage)
        if symbol in threads
    }


def _functions(arch: str) -> Iterator[tuple[str, str]]:
    parts = re.split(r"^\s*Function : (\S+)$", _dump("--dump-sass", "-arch", arch), flags=re.MULTILINE)
    return zip(parts[1::2], parts[2::2], strict=True)


def in_flight() -> dict[str, Any]:
    """Per kernel: registers, resident warps, bytes per thread, per multiprocessor and, with a GPU, per device."""
    built = sorted(set(re.findall(r"^arch = (sm_\d+)$", _dump("--dump-resource-usage"), re.MULTILINE)))
    if not built:
        raise Unavailable("signadam_ext._C holds no CUDA code")
    target = _target(built)
    resources = _resources(target.arch)
    kernels = []
    functions = [(symbol, sass) for symbol, sass in _functions(target.arch) if symbol in resources]
    # New processes: one that has touched a device cannot be forked and go on.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        walked = list(pool.map(_walked, [sass for _, sass in functions], chunksize=4))
    for (symbol, _), (per_thread, exact) in zip(functions, walked, strict=True):
        use, name = resources[symbol], _readable(symbol)
        if name in target.resident_blocks:
            warps, source = target.resident_blocks[name] * use.threads // _WARP, "CUDA"
        else:
            warps, source = resident_warps(use, target.limit), "computed"
        per_multiprocessor = warps * _WARP * per_thread
        kernels.append(
            {
                "kernel": name,
                "registers": use.registers,
                "shared_bytes": use.shared,
                "local_bytes": use.local,
                "threads_per_block": use.threads,
                "resident_warps": warps,
                "occupancy": source,
                "max_warps": target.limit.threads // _WARP,
                "bytes_per_thread": per_thread,
                "all_paths": exact,
                "bytes_per_multiprocessor": per_multiprocessor,
                "bytes_per_device": target.multiprocessors and target.multiprocessors * per_multiprocessor,
            }
        )
    return {"arch": target.arch, "kernels": kernels}


if __name__ == "__main__":
    try:
        print(json.dumps(in_flight()))
    except Unavailable as reason:
        print(json.dumps({"not_measured": str(reason)}))
