"""Instructions per element: of the few-bit forms on the CPU, and of the CUDA kernels for fixed formats; and of a step.

python -m bench.instructions --out bench/results/instructions/cpu-amd-epyc.json
python -m bench.instructions --check
python -m bench.instructions --device cuda --check

On the CPU by callgrind, which no other program disturbs, of the AVX2 kernels of SignAdamPP over bf16 parameters and
gradients, and over fp32 ones with statistics and without: callgrind does not know AVX-512. Of whole steps on small
tensors, Python included, which shows what a step costs beside its kernels. Needs g++ and valgrind. Of CUDA's see
bench/cuda_instructions.py.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench import cuda_instructions
from reporting import machine
from reporting.files import write
from signadam_ext.core.formats import BOUNDED, PARAM_STORAGES

CHUNK = 16384
# What the program counts, as its first argument.
BF16_STEP, DRAWS_ONLY, FP32_STEP, FP32_OBSERVED = range(4)
FIGURES = Path(__file__).with_name("results") / "instructions" / "cpu-amd-epyc.json"
STEP_TENSORS = (1, 1000)
FEW_STEPS, MANY_STEPS = 20, 120
ALLOWED = 1.01  # times the committed figure: another release of the compiler may order instructions otherwise
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-mavx2", "-mf16c")


def build(folder: Path) -> Path:
    program = folder / "instructions"
    source = Path(__file__).with_suffix(".cpp")
    subprocess.run(["g++", *FLAGS, str(source), "-o", str(program)], check=True)
    return program


def instructions(*command: str | Path | int, **environment: str) -> int:
    run = subprocess.run(
        ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", *map(str, command)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    counted = re.search(r"Collected : (\d+)", run.stderr)
    assert counted is not None, run.stderr
    return int(counted[1])


def per_element(program: Path, *arguments: int) -> float:
    """The difference of 11 chunks and one, so that what happens once does not count."""
    return (instructions(program, *arguments, 11) - instructions(program, *arguments, 1)) / (10 * CHUNK)


def per_step(numbers: Sequence[int]) -> list[dict[str, int]]:
    """By numbers of tensors, the difference of many steps and few, divided by their number.

    Nearly all of the time goes into importing torch, so interpreters run side by side. Dictionaries lie alike in all.
    """

    def run(tensors: int, steps: int) -> int:
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = (sys.executable, "-m", "bench.repeated_step", tensors, steps)
        return instructions(*command, PYTHONHASHSEED="0", **one_thread)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        few, many = (list(pool.map(run, numbers, [steps] * len(numbers))) for steps in (FEW_STEPS, MANY_STEPS))
    return [
        {"tensors": tensors, "per_step": round((b - a) / (MANY_STEPS - FEW_STEPS))}
        for tensors, a, b in zip(numbers, few, many, strict=True)
    ]


def exceeding(report: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """What takes more than the committed figure, or has none."""

    def figures(of: dict[str, Any]) -> dict[str, float]:
        own = {name: value for name, value in of.items() if name.endswith("per_16_elements")}
        steps = {f"a step on {row['tensors']} tensors": row["per_step"] for row in of["steps"]}
        return own | steps | {f"{row['state']}, {row['weights']}": row["per_16_elements"] for row in of["rows"]}

    before = figures(committed)
    return [
        f"{name}: {figure}, committed {before.get(name)}"
        for name, figure in figures(report).items()
        if figure > ALLOWED * before.get(name, 0.0)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="where the figures are written")
    parser.add_argument("--check", action="store_true", help="fail where a figure exceeds the committed one")
    cuda = parser.add_argument_group("with --device cuda")
    cuda.add_argument("--module", type=Path, action="append", help="libraries or cubins with the kernels (the module)")
    cuda.add_argument("--emulator", type=Path, help="folder of a package sass that executes sm_90: counts what it does")
    cuda.add_argument("--cases", default="*", help="what is executed: names with commas between, * stands for anything")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        return cuda_instructions.run(options)
    if options.out is None and not options.check:
        parser.error("--out or --check is needed")
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        bits = per_element(program, DRAWS_ONLY, 0, 0)
        plain, observed = (per_element(program, counted, 0, 0) for counted in (FP32_STEP, FP32_OBSERVED))
        rows = []
        for state, form in BOUNDED.items():
            for name in ("nearest", "stochastic", "split8", "split16", "master"):
                count = per_element(program, BF16_STEP, form.number, PARAM_STORAGES[name])
                draws = form.number != 0 or name != "nearest"
                rows.append(
                    {
                        "state": state,
                        "weights": name,
                        "per_16_elements": round(16 * count, 1),
                        "share_random_bits": round(bits / count, 3) if draws else 0.0,
                    }
                )
                print(rows[-1], flush=True)
    steps = per_step(STEP_TENSORS)
    print(*steps, sep="\n", flush=True)
    report: dict[str, Any] = {
        **machine.facts(),
        "command": machine.command("bench.instructions", ["--out", str(options.out)]),
        "kernels": "avx2, bf16 parameters and gradients, SignAdamPP",
        "random_bits_per_16_elements": round(16 * bits, 1),
        "fp32_per_16_elements": round(16 * plain, 1),
        "fp32_observed_per_16_elements": round(16 * observed, 1),
        "rows": rows,
        "steps": steps,
    }
    if options.out is not None:
        write(options.out, json.dumps(report, indent=1) + "\n")
    if not options.check:
        return 0
    worse = exceeding(report, json.loads(FIGURES.read_text()))
    print("\n".join(worse) or f"{len(rows)} forms and {len(steps)} steps, none takes more than is committed")
    return int(bool(worse))


if __name__ == "__main__":
    raise SystemExit(main())
