"""Instructions an element of the Triton kernels, from their machine code for sm_90, without a GPU:

SIGNADAM_EMULATOR=FOLDER python -m bench.triton_instructions --out bench/results/instructions/triton-sm_90.json
SIGNADAM_EMULATOR=FOLDER python -m bench.triton_instructions --check

FOLDER holds a package ``sass`` whose ``sass.emulator`` executes that machine code, and whose ``sass.timing`` says how
many blocks fit a multiprocessor. A step of each case of tests/support/launches.py is executed on a full, aligned chunk,
from prologue to end. What the busiest warp issues is divided by the 64 elements of one of its lanes; instructions that
a predicate switches off are counted, as they take an issue slot. Parameters and state must be, byte for byte, what the
CPU backend leaves.
"""

from __future__ import annotations

import argparse
import ctypes
import fnmatch
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reporting import machine
from reporting.files import write

ROOT = Path(__file__).resolve().parents[1]
TARGET = "sm_90"
FIGURES = ROOT / "bench" / "results" / "instructions" / f"triton-{TARGET}.json"
#: The forms that people use, a rule of each kind, and every way to come by a threshold.
SHOWN = (
    "sign_adam_pp-fp32",
    "sign_adam_pp-bf16",
    "sign_sgd-bf16",
    "signum-fp32",
    "lion-fp32",
    "sign_adam-fp32",
    "adam-fp32",
    "sign_adam_pp-bf16-stochastic-bf16",
    "sign_adam_pp-bf16-stochastic-int8",
    "sign_adam_pp-bf16-stochastic-int4",
    "sign_adam_pp-bf16-stochastic-int2",
    "signum-bf16-stochastic-int8",
    "sign_sgd-bf16-stochastic",
    "adam-bf16-stochastic-bf16",
    "sign_adam_pp-delayed-fp32",
    "sign_adam_pp-adaptive-fp32",
    "sign_adam_pp-fp32-observed",
    "signum-fp32-delayed",
    "signum-bf16-delayed-stochastic-bf16",
    "lion-fp32-delayed",
)


class Executed:
    """Executes the launches of cases.

    Args:
        emulator: the folder of the package ``sass``.
        folder: where compiled kernels are written.
    """

    def __init__(self, emulator: Path, folder: Path) -> None:
        sys.path[:0] = [str(emulator), str(ROOT / "tests")]
        self.emulator = importlib.import_module("sass.emulator")
        self.timing = importlib.import_module("sass.timing")
        self.launches = importlib.import_module("support.launches")
        importlib.import_module("support.sm_90").teach(self.emulator)
        self.folder = folder

    def rows(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """A row for each launch of the cases' steps; a step's last says what differs from the CPU backend's."""
        steps = [self.launches.Step(self.launches.CASES[name]) for name in names]
        launches = [step.triton() for step in steps]
        compiled = self.launches.compile_launches([x for own in launches for x in own], TARGET, self.folder)
        for name, step, own in zip(names, steps, launches, strict=True):
            made = [self._row(name, step, launch, compiled[launch.kernel]) for launch in own]
            yield from made[:-1]
            yield made[-1] | {"unequal": step.unequal()}

    def _row(self, name: str, step: Any, launch: Any, code: Any) -> dict[str, Any]:
        memory = self.emulator.Memory()
        for region in step.regions:
            memory.register(region.name, region.address, region.size, streamed=region.streamed)
        bank, own = self.emulator.constant_bank(TARGET, code.parameters(launch))
        memory.register("parameters", ctypes.addressof(own), len(own))
        kernel = self.emulator.load(code.cubin, code.symbol, TARGET)
        (block,) = (
            self.emulator.run_block(
                kernel, bank, memory, block=number, threads=code.threads, dynamic_shared=code.dynamic_shared
            )
            for number in range(launch.grid)
        )
        (resources,) = self.emulator.kernels(code.cubin, TARGET).values()
        blocks = self.timing.blocks_per_multiprocessor(resources, code.dynamic_shared, code.threads)
        path = self.timing.issues(kernel, block)
        shares = {
            device.name: round(self.timing.predict(path, blocks, code.threads, block.streamed, device), 2)
            for device in (self.timing.H100, self.timing.H200)
        }
        return {
            "case": name,
            "kernel": label(launch.constants),
            "registers": resources.registers,
            "blocks": blocks,
            "instructions": round(sum(block.busiest()) * code.threads / self.launches.ELEMENTS, 1),
            "bytes": round(block.streamed / self.launches.ELEMENTS, 2),
            "shares_of_bandwidth": shares,
        }


def label(constants: dict[str, Any]) -> str:
    """A kernel in words, as the CUDA kernels have them."""
    from signadam_ext.core.native import compiled as _C

    threshold_pass = _C.ThresholdPass(constants["THRESHOLD_PASS"]).name.lower()
    return "+".join([constants["RULE"], threshold_pass, *["with_statistics"] * constants["OBSERVES"]])


def exceeding(rows: Sequence[dict[str, Any]], committed: Sequence[dict[str, Any]]) -> list[str]:
    """What has more instructions than its committed figure, or has none."""
    figures = {(row["case"], row["kernel"]): row["instructions"] for row in committed}
    found = []
    for row in rows:
        figure = figures.get((row["case"], row["kernel"]))
        if figure is None or row["instructions"] > figure:
            found.append(f"{row['case']}, {row['kernel']}: {row['instructions']}, committed {figure}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON; without it rows are only printed")
    parser.add_argument("--cases", default=",".join(SHOWN), help="names with commas between; * stands for anything")
    parser.add_argument("--check", action="store_true", help="fail where a figure exceeds the committed one")
    options = parser.parse_args(arguments)
    emulator = os.environ.get("SIGNADAM_EMULATOR")
    if emulator is None:
        parser.error("SIGNADAM_EMULATOR must name the folder of a package sass that executes machine code of sm_90")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        executed = Executed(Path(emulator), Path(folder))
        patterns = options.cases.split(",")
        known = executed.launches.CASES
        names = [name for name in known if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        for row in executed.rows(names):
            rows.append(row)
            print(json.dumps(row), flush=True)
    wrong = [f"{row['case']}: {', '.join(row['unequal'])} not as on the CPU" for row in rows if row.get("unequal")]
    if options.check:
        wrong += exceeding(rows, json.loads(FIGURES.read_text())["executed"])
    print(*wrong, sep="\n", end="\n" * bool(wrong))
    if options.out is not None and not wrong:
        report = {
            **machine.facts(),
            "command": machine.command("bench.triton_instructions", ["--out", str(options.out)]),
            "target": TARGET,
            "executed": rows,
        }
        write(options.out, json.dumps(report, indent=1) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
