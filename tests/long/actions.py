"""Runs the stateful fuzzer for so many actions in all, in processes with a seed each, and adds up what came of them.

    python tests/long/actions.py --actions 1000000 --folder runs/actions --results tests/results/actions.json

A process that has ended counts, and the next call goes on after it: the results say what was counted, the folder holds
what the processes said. Exit status 1 says that there was a fault; a crash or a hang of a process is one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT)]

#: Files of an action are not written to a disk, where there is a folder that is none.
IN_MEMORY = {"TMPDIR": "/dev/shm"} if os.access("/dev/shm", os.W_OK) else {}

#: Seconds for a world: under nice -n 19 there may be minutes in which nothing is done.
HANG = 3600


def run(folder: Path, seed: int, actions: int) -> dict[str, Any]:
    """One process, or what is known of it."""
    from reporting.machine import commit

    file, new, trace = (folder / f"{seed}.{name}" for name in ("json", "new", "trace"))
    if not file.exists():
        now = commit()
        command = [sys.executable, str(HERE.parent / "fuzzer.py"), f"--actions={actions}", f"--seed={seed}"]
        command += [f"--json={new}", f"--trace={trace}", f"--hang={HANG}"]
        with (folder / f"{seed}.txt").open("w") as output:
            environment = {**os.environ, "PYTHONFAULTHANDLER": "1", **IN_MEMORY}
            status = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False
            ).returncode
        result: dict[str, Any] = {"seed": seed, "actions": 0, "actions_by_kind": {}, "faults": [], "minutes": 0}
        if new.exists():
            result = json.loads(new.read_text())
            new.unlink()
        if not result.pop("over", False):
            last = trace.read_text().strip() if trace.exists() else ""
            result["faults"].append({"fault": f"the process ended with {status}: {last}"})
        file.write_text(json.dumps({"commit": now, **result}, indent=1) + "\n")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def summary(runs: list[dict[str, Any]], counted: dict[str, Any]) -> dict[str, Any]:
    """All processes as one: those of an earlier summary, and these runs."""
    processes = counted.get("processes", [])
    processes = processes + [{name: each[name] for name in ("seed", "commit", "actions", "minutes")} for each in runs]
    kinds = Counter(counted.get("actions_by_kind", {}))
    for each in runs:
        kinds.update(each["actions_by_kind"])
    faults = [{"seed": each["seed"], **fault} for each in runs for fault in each["faults"]]
    return {
        "actions": sum(each["actions"] for each in processes),
        "minutes": round(sum(each["minutes"] for each in processes), 2),
        "faults": counted.get("faults", []) + faults,
        "processes": processes,
        "actions_by_kind": dict(sorted(kinds.items())),
    }


def write(results: Path, found: dict[str, Any]) -> None:
    """What is known so far, with commit, versions and machine, and what an earlier fuzzer has found."""
    from reporting.machine import facts

    earlier = json.loads(results.read_text()) if results.exists() else {}
    kept = {name: earlier[name] for name in ("before",) if name in earlier}
    results.write_text(json.dumps({**facts(), **found, **kept}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actions", type=int, default=1_000_000)
    parser.add_argument("--each", type=int, default=20_000, help="actions of a process")
    parser.add_argument("--processes", type=int, default=1, help="how many at a time")
    parser.add_argument("--seed", type=int, default=1003, help="of the first process of all; the others' follow")
    parser.add_argument("--folder", type=Path, required=True, help="where what is done is kept")
    parser.add_argument("--results", type=Path, help="the sum, with commit, versions and machine; go on from it")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    counted = json.loads(options.results.read_text()) if options.results and options.results.exists() else {}
    first = max((each["seed"] + 1 for each in counted.get("processes", [])), default=options.seed)
    runs: list[dict[str, Any]] = []
    found = summary(runs, counted)
    with ThreadPoolExecutor(options.processes) as pool:
        while found["actions"] < options.actions:
            seeds = range(first + len(runs), first + len(runs) + options.processes)
            runs += pool.map(lambda seed: run(options.folder, seed, options.each), seeds)
            found = summary(runs, counted)
            if options.results:
                write(options.results, {**found, "wanted": options.actions})
            if runs[-1]["actions"] == 0:
                break  # which would come again
    print(f"{found['actions']} actions of {len(found['actions_by_kind'])} kinds, {len(found['faults'])} faults")
    return int(bool(found["faults"]))


if __name__ == "__main__":
    sys.exit(main())
