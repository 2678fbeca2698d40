"""Puts faults back into a copy of the package, and says whether the fuzzer finds them.

    python tests/fuzzer_mutations.py [--actions 2000] [--json out.json] [names]

Each fault is a few edits of the sources. The fuzzer gets the copy and a seed, nothing else; found means that it reports
a fault, or dies, within so many actions. Faults in C++ are compiled anew, about a minute each.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FUZZER = Path(__file__).with_name("fuzzer.py")


@dataclass(frozen=True)
class Mutation:
    """A fault, as edits: (file, text that is there once, text in its place)."""

    name: str
    kind: int
    edits: tuple[tuple[str, str, str], ...]

    @property
    def native(self) -> bool:
        """Whether it needs compiling."""
        return any(file.startswith("csrc/") for file, _, _ in self.edits)


MUTATIONS: tuple[Mutation, ...] = ()


def applied(mutation: Mutation, folder: Path) -> Path:
    """A folder with a package that has the fault.

    Raises:
        ValueError: a text that is not there, or there more than once: the package has changed since.
    """
    for name in (
        "signadam_ext",
        "triton_kernels",
        *(("csrc", "setup.py", "pyproject.toml") if mutation.native else ()),
    ):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    for file, old, new in mutation.edits:
        path = folder / file
        text = path.read_text()
        if text.count(old) != 1:
            raise ValueError(f"{mutation.name}: {file} has {text.count(old)} places like {old!r}, not one")
        path.write_text(text.replace(old, new))
    if mutation.native:
        environment = {**os.environ, "SIGNADAM_CUDA": "0"}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return folder


def found(mutation: Mutation, actions: int, seed: int) -> dict[str, Any]:
    """Whether the fuzzer finds it, after how many actions, and by what."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = applied(mutation, Path(name))
        out, trace = folder / "fuzz.json", folder / "trace"
        command = [sys.executable, str(FUZZER), f"--package={folder}", f"--actions={actions}", f"--seed={seed}"]
        command += ["--stop", f"--json={out}", f"--trace={trace}"]
        ran = subprocess.run(command, capture_output=True, text=True)
        result: dict[str, Any] = {"fault": mutation.name, "kind": mutation.kind, "found": ran.returncode != 0}
        if out.exists():
            told = json.loads(out.read_text())
            result["actions"] = told["actions"]
            result["by"] = [f"{x['action']}: {x['fault']}" for x in told["faults"]]
        else:
            last = trace.read_text().strip() if trace.exists() else ran.stderr[-300:]
            result["by"] = [f"died with status {ran.returncode} in {last}"]
            done = re.findall(r":(\d+) action (\d+)", last)
            result["actions"] = int(done[0][0]) * 100 + int(done[0][1]) if done else None
    result["seconds"] = round(time.perf_counter() - began, 1)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="faults; all unless given")
    parser.add_argument("--actions", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    for mutation in MUTATIONS:
        if options.names and mutation.name not in options.names:
            continue
        result = found(mutation, options.actions, options.seed)
        results.append(result)
        how = f"after {result['actions']} actions, by {result['by'][0][:150]}" if result["found"] else "NOT FOUND"
        print(f"{mutation.name} (kind {mutation.kind}): {how} ({result['seconds']} s)", flush=True)
    missed = sum(not result["found"] for result in results)
    print(f"{len(results) - missed} of {len(results)} found")
    if options.json:
        record = {"seed": options.seed, "actions": options.actions, "results": results}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
