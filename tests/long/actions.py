"""Runs the stateful fuzzer for so many actions in all, in processes with a seed each, and adds up what came of them.

    python tests/long/actions.py --actions 1000000 --folder runs/actions --results tests/results/actions.json

A process that has ended counts, and the next call goes on after it. Exit status 1 says that there was a fault; a crash
or a hang of a process is one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT)]


def run(folder: Path, seed: int, actions: int) -> dict[str, Any]:
    """One process, or what is known of it."""
    from reporting.machine import commit

    file, trace = folder / f"{seed}.json", folder / f"{seed}.trace"
    if not file.exists():
        now = commit()
        command = [sys.executable, str(HERE.parent / "fuzzer.py"), f"--actions={actions}", f"--seed={seed}"]
        command += [f"--json={folder / 'new.json'}", f"--trace={trace}"]
        with (folder / f"{seed}.txt").open("w") as output:
            environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
            status = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False
            ).returncode
        if (folder / "new.json").exists():
            result = json.loads((folder / "new.json").read_text())
            (folder / "new.json").unlink()
        else:
            fault = f"the process ended with {status}: {trace.read_text().strip() if trace.exists() else ''}"
            result = {"seed": seed, "actions": 0, "actions_by_kind": {}, "faults": [{"fault": fault}], "minutes": 0}
        file.write_text(json.dumps({"commit": now, **result}, indent=1) + "\n")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """All processes as one."""
    kinds: Counter[str] = Counter()
    for each in runs:
        kinds.update(each["actions_by_kind"])
    return {
        "actions": sum(each["actions"] for each in runs),
        "minutes": round(sum(each["minutes"] for each in runs), 2),
        "faults": [{"seed": each["seed"], **fault} for each in runs for fault in each["faults"]],
        "processes": [{name: each[name] for name in ("seed", "commit", "actions", "minutes")} for each in runs],
        "actions_by_kind": dict(sorted(kinds.items())),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actions", type=int, default=1_000_000)
    parser.add_argument("--each", type=int, default=10_000, help="actions of a process")
    parser.add_argument("--seed", type=int, default=1003, help="of the first process; the others' follow")
    parser.add_argument("--folder", type=Path, required=True, help="where what is done is kept")
    parser.add_argument("--results", type=Path, help="write the sum there, with commit, versions and machine")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    while sum(each["actions"] for each in runs) < options.actions:
        runs.append(run(options.folder, options.seed + len(runs), options.each))
        if runs[-1]["actions"] == 0:
            break  # which would come again
    found = summary(runs)
    print(f"{found['actions']} actions of {len(found['actions_by_kind'])} kinds, {len(found['faults'])} faults")
    if options.results:
        from reporting.machine import facts

        options.results.write_text(json.dumps({**facts(), **found}, indent=1) + "\n")
    return int(bool(found["faults"]))


if __name__ == "__main__":
    sys.exit(main())
