"""Instructions an element of the CUDA kernels, from the machine code of sm_90, without a GPU:

python -m bench.instructions --device cuda --emulator FOLDER

In the listing, by ``cuobjdump`` alone: the main loop of each kernel for fixed formats, over the elements of a round.
What is uniform over a chunk and skipped (a coupled decay, a slow path of a division) is counted there.

Executed, where ``--emulator`` names a folder whose package ``sass`` executes that machine code: a step of each case of
tests/support/launches.py on one full, aligned chunk, from prologue to end, over the 64 elements of a lane.
Instructions that a predicate switches off are counted, as they take an issue slot. Parameters and state are compared
with what the CPU backend leaves. With ``--cases`` the other rows of the file at ``--out`` stay; each names the commit
of the module that it was counted of.
"""

from __future__ import annotations

import argparse
import ctypes
import fnmatch
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reporting import machine, present
from reporting.files import write
from reporting.machine_code import KernelName, find_cuobjdump, kernel_label, kernel_name
from signadam_ext.core.native import compiled

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "bench" / "results" / "instructions" / "cuda-sm_90.json"
TARGET = "sm_90"
THREADS = 256
PIECE = 8


@dataclass
class Listed:
    """A kernel in a listing: addresses and texts of its instructions."""

    registers: int
    code: list[tuple[int, str]]

    def loops(self) -> Iterator[list[str]]:
        """What lies between a branch back and where it leads, of the loops that hold no other."""
        ends = []
        for address, text in self.code:
            found = re.match(r"(?:@!?U?P\w+ )?BRA\b.* 0x([0-9a-f]+)$", text)
            if found is not None and (begin := int(found[1], 16)) < address:
                ends.append((begin, address))
        for begin, end in ends:
            if not any(begin <= other[0] and other[1] < end for other in ends):
                yield [text for address, text in self.code if begin <= address <= end]


def cuobjdump(*arguments: str) -> str:
    tool = find_cuobjdump()
    if tool is None:
        raise SystemExit("no cuobjdump: it is in the CUDA toolkit and in Triton's wheel for Linux on x86-64")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def listed(module: Path) -> dict[KernelName, Listed]:
    """The kernels of a module or cubin."""
    found: dict[KernelName, Listed] = {}
    name = None
    for line in cuobjdump("-arch", TARGET, "--dump-resource-usage", str(module)).splitlines():
        if match := re.match(r"\s*Function (\S+):", line):
            name = kernel_name(match[1])
        elif name is not None and (used := re.search(r"REG:(\d+)", line)):
            found[name] = Listed(int(used[1]), [])
    name = None
    for line in cuobjdump("-arch", TARGET, "-sass", str(module)).splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            name = kernel_name(match[1])
        elif name is not None and (code := re.match(r"\s+/\*([0-9a-f]+)\*/\s+(.*?)\s*;", line)):
            found[name].code.append((int(code[1], 16), code[2]))
    return found


def main_loop(name: KernelName, kernel: Listed, moments: int) -> float | None:
    """Instructions an element of the loop over a full, aligned chunk; None where it does not show."""
    assert name.forms is not None
    # How many elements a round takes is seen in its accesses of 16 bytes: one or two to eight elements of a tensor.
    sixteen = {"fp32": 2, "bf16": 1, "fp16": 1}
    if name.threshold_pass == "pass_before":
        accesses, access = sixteen[name.forms.grad], "LDG"
    else:
        own = (name.forms.param, *(name.forms.exp_avg, name.forms.exp_avg_sq)[:moments])
        accesses, access = sum(sixteen.get(form, 0) for form in own), "STG"
    wide = re.compile(rf"(?:@!?U?P\w+ )?{access}\.E\.EF\.128\b")
    counts = []
    for loop in kernel.loops():
        pieces = sum(1 for text in loop if wide.match(text)) / accesses
        if pieces >= 1:
            counts.append(len(loop) / pieces / PIECE)
    # The loops for other chunks, and for a gradient that is not aligned, are longer.
    return round(min(counts), 1) if counts else None


def moments_of() -> dict[str, int]:
    """Of each functor in csrc/core/rules.h."""
    text = (ROOT / "csrc" / "core" / "rules.h").read_text(encoding="utf-8")
    structs = re.findall(r"^struct (\w+) : Traits \{(.*?)^\};", text, re.DOTALL | re.MULTILINE)
    found = {name: re.search(r"int moments = (\d)", body) for name, body in structs}
    return {name: 1 if match is None else int(match[1]) for name, match in found.items()}


def launch_library(folder: Path) -> ctypes.CDLL:
    """tests/host/cuda_launch.cpp, compiled into ``folder`` unless it is there."""
    toolchain = importlib.import_module("support.toolchain")

    def built_once(name: str, make: Any) -> Path:
        own = folder / name
        if not own.exists():
            own.mkdir(parents=True)
            make(own)
        return own

    found: ctypes.CDLL = toolchain.cuda_launch_library(built_once)
    return found


class Executor:
    """Runs the launches of cases through ``sass.emulator`` in a folder."""

    def __init__(self, modules: Sequence[Path], emulator: Path, folder: Path) -> None:
        sys.path[:0] = [str(emulator), str(ROOT / "tests")]
        self.emulator = importlib.import_module("sass.emulator")
        self.lessons = importlib.import_module("support.sm_90")
        self.lessons.teach(self.emulator)
        self.timing = importlib.import_module("sass.timing")
        self.launches = importlib.import_module("support.launches")
        self.library = launch_library(folder)
        self.resources: dict[str, Any] = {}
        self.places: dict[KernelName, tuple[Path, str]] = {}
        for module in modules:
            self.lessons.teach_switches(self.emulator, cuobjdump("-arch", TARGET, "-elf", str(module)))
            own = self.emulator.kernels(module, TARGET)
            self.resources |= own
            self.places |= {name: (module, symbol) for symbol in own if (name := kernel_name(symbol)) is not None}

    def names(self, patterns: Sequence[str]) -> list[str]:
        return [name for name in self.launches.CASES if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]

    def rows(self, name: str) -> Iterator[dict[str, Any]]:
        """A row for each launch of a step; the last says which tensors are not as the CPU backend leaves them.

        One with an instruction that the emulator does not have is the last, and has no figure.
        """
        step = self.launches.Step(self.launches.CASES[name])
        launches = step.cuda(self.library)
        for number, launch in enumerate(launches, 1):
            module, symbol = self.places[launch.kernel]
            memory = self.emulator.Memory()
            for region in step.regions:
                memory.register(region.name, region.address, region.size, streamed=region.streamed)
            bank, own = self.emulator.constant_bank(TARGET, launch.parameters)
            memory.register("parameters", ctypes.addressof(own), len(own))
            kernel = self.emulator.load(module, symbol, TARGET)
            assert launch.grid == 1
            try:
                block = self.emulator.run_block(kernel, bank, memory, block=0, threads=launch.threads)
                instructions = round(sum(block.busiest()) * THREADS / self.launches.ELEMENTS, 1)
                unequal = step.unequal() if number == len(launches) else []
            except self.emulator.Unknown:  # an instruction that the emulator does not have
                instructions, unequal = None, []
            used = self.resources[symbol]
            yield {
                "case": name,
                "kernel": kernel_label(launch.kernel),
                "registers": used.registers,
                "blocks": self.timing.blocks_per_multiprocessor(used, 0, THREADS),
                "instructions": instructions,
                "unequal": unequal,
            }
            if instructions is None:
                return


def shown(row: dict[str, Any]) -> str:
    words = [f"{row[name]:{width}}" for name, width in (("case", 44), ("kernel", 44))]
    words += [f"{row['registers']:4d} registers"]
    if "blocks" in row:
        words.append(f"{row['blocks']} blocks")
    words.append("not shown" if row["instructions"] is None else f"{row['instructions']:6.1f} instructions")
    return " ".join([*words, *(["differs: " + ", ".join(row["unequal"])] if row.get("unequal") else [])])


def exceeding(rows: Sequence[dict[str, Any]], committed: dict[str, list[dict[str, Any]]], kind: str) -> list[str]:
    """What is worse than the committed figure of its kind, or has none."""
    figures = {(row["case"], row["kernel"]): row["instructions"] for row in committed[kind]}
    found = []
    for row in rows:
        key, ours = (row["case"], row["kernel"]), row["instructions"]
        figure = figures.get(key)
        is_same = key in figures and ours == figure  # also where neither has one
        if not is_same and (figure is None or ours is None or ours > figure):
            found.append(f"{kind}: {row['case']}, {row['kernel']}: {ours}, committed {figure}")
        if row.get("unequal"):
            found.append(f"{row['case']}: {', '.join(row['unequal'])} not as on the CPU")
    return found


def renewed(
    rows: Sequence[dict[str, Any]], commit: str, names: Sequence[str], report: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """The executed rows of a report, in the order of ``names``: these, of this commit's module, and in place of cases
    that were not executed the earlier report's, of theirs."""
    found = [{**row, "commit": commit} for row in rows]
    if report is not None:
        executed = {row["case"] for row in rows}
        earlier = present.built_at(report)
        found += [{"commit": earlier, **row} for row in report["executed"] if row["case"] not in executed]
    place = {name: number for number, name in enumerate(names)}
    return sorted((row for row in found if row["case"] in place), key=lambda row: place[row["case"]])


def run(options: argparse.Namespace) -> int:
    """What ``python -m bench.instructions --device cuda`` does."""
    if options.module and options.out is not None:
        raise SystemExit("--out names the commit of the module that Python loads: --module may not name others")
    modules = options.module or [Path(compiled.__file__)]
    made: dict[str, list[dict[str, Any]]] = {"main_loops": [], "executed": []}
    moments = moments_of()
    for module in modules:
        for name, kernel in listed(module).items():
            if name.forms is not None:
                label = kernel_label(name)
                row = {"case": "main loop", "kernel": label, "registers": kernel.registers}
                made["main_loops"].append({**row, "instructions": main_loop(name, kernel, moments[name.functor])})
                print(shown(made["main_loops"][-1]), flush=True)
    if options.emulator is not None:
        with tempfile.TemporaryDirectory() as folder:
            executor = Executor(modules, options.emulator, Path(folder))
            for name in executor.names(options.cases.split(",")):
                for row in executor.rows(name):
                    made["executed"].append(row)
                    print(shown(row), flush=True)
    if not made["main_loops"]:
        raise SystemExit(f"no kernels of {TARGET} for fixed formats in {', '.join(map(str, modules))}")
    if options.check:
        committed = json.loads(FIGURES.read_text())
        worse = [text for kind, rows in made.items() for text in exceeding(rows, committed, kind)]
        print("\n".join(worse))
        return int(bool(worse))
    if options.out is not None:
        facts = machine.facts()
        if options.emulator is not None:
            earlier = json.loads(options.out.read_text()) if options.out.exists() else None
            made["executed"] = renewed(made["executed"], present.built_at(facts), executor.names(["*"]), earlier)
        report = {
            **facts,
            "command": machine.command(
                "bench.instructions",
                [
                    *("--device", "cuda", "--emulator", str(options.emulator), "--out", str(options.out)),
                    *(() if options.cases == "*" else ("--cases", options.cases)),
                ],
            ),
            "target": TARGET,
            **made,
        }
        write(options.out, json.dumps(report, indent=1) + "\n")
    return 0
