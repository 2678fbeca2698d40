"""One command that builds, tests, sanitizes and benchmarks, and writes JSON, PNG and a page:

    python -m bench.report --out DIR

On a GPU it ends within nine minutes. Every stage is a process of its own with a time limit of its own, so a stage that
hangs or crashes loses only itself, and this process touches neither torch nor CUDA. Without a GPU the stages that need
one are left out, by name. The exit status is 1 when a stage failed.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reporting import machine, present
from reporting.files import rounded

ROOT = machine.ROOT
TOTAL_SECONDS = 530  # nine minutes, less the time to write the results


@dataclass
class Outcome:
    name: str
    status: str  # ok, failed, timed out, left out
    seconds: float = 0.0
    detail: str = ""


class Stages:
    """Runs stages one after another against one deadline, and keeps their outcomes and their output."""

    def __init__(self, log: Path, skip: Sequence[str], deadline: float):
        self.log, self.skip, self.deadline = log, skip, deadline
        self.outcomes: list[Outcome] = []
        log.write_text("")

    def leave_out(self, name: str, reason: str) -> None:
        self._note(Outcome(name, "left out", detail=reason))

    def run(self, name: str, command: Sequence[str], limit: float, tell: bool = False, **environment: str) -> str:
        """The stage's output; its last line is noted if `tell`.

        The stage is killed with all its children when its time, or everybody's, is over.
        """
        limit = min(limit, self.remaining)
        if name in self.skip or limit < 5:
            self.leave_out(name, "--skip" if name in self.skip else "no time left")
            return ""
        start = time.monotonic()
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)  # what waits for a hung driver does not die; go on without it
                code = None
            output.seek(0)
            text = self._anonymous(output.read())
        status = "timed out" if code is None else "ok" if code == 0 else "failed"
        last = next((line for line in reversed(text.splitlines()) if line.strip("= ")), "")
        detail = f"limit {limit:.0f} s" if code is None else f"exit status {code}: {last.strip('= ')}"
        if code == 0:
            detail = last.strip("= ") if tell else ""
        with self.log.open("a") as log:
            log.write(f"### {name}: {' '.join(command[1:])}\n{text}\n")
        self._note(Outcome(name, status, time.monotonic() - start, detail.replace("|", "/")[:200]))
        return text

    @property
    def remaining(self) -> float:
        return self.deadline - time.monotonic()

    def _note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        print(f"{outcome.name}: {outcome.status} {outcome.seconds:.0f} s {outcome.detail}".rstrip(), flush=True)

    @staticmethod
    def _anonymous(text: str) -> str:
        return text.replace(str(ROOT), ".").replace(sys.prefix, "PREFIX")

    @property
    def failed(self) -> bool:
        return any(outcome.status in ("failed", "timed out") for outcome in self.outcomes)


def _json_line(text: str) -> Any:
    """The last line of a stage's output that is JSON: warnings may come before it."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    return None


def _needs_build(facts: dict[str, Any]) -> str | None:
    """Why the module must be built, or None."""
    info = facts["versions"]["signadam_ext"]
    if isinstance(info, str):
        return info
    gpu = facts["machine"]["gpu"]
    if gpu and f"sm_{gpu['capability'].replace('.', '')}" not in info["cuda_architectures"].split("+"):
        return f"the module has no code for {gpu['name']}"
    built = max((path.stat().st_mtime for path in (ROOT / "signadam_ext").glob("_C.*")), default=None)
    if built and any(path.stat().st_mtime > built for path in (ROOT / "csrc").rglob("*")):
        return "the module is older than its sources"
    return None


def run(stages: Stages, folder: Path, quick: bool) -> dict[str, Any]:
    """All stages; returns the report without name and command."""
    python = [sys.executable]
    facts = _json_line(stages.run("facts", [*python, "-m", "reporting.machine"], 60))
    if facts is None:
        raise SystemExit(f"the machine's facts cannot be read, see {stages.log}")
    gpu = facts["machine"]["gpu"]

    if reason := _needs_build(facts):
        print(f"building: {reason}", flush=True)
        arch = {"SIGNADAM_CUDA_ARCHS": gpu["capability"].replace(".", "")} if gpu else {}
        # Editable, so that the Triton package is found too; with what is installed, as there may be no network.
        install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
        stages.run("build", [*python, *install], 100, **arch)
        facts = _json_line(stages.run("facts after build", [*python, "-m", "reporting.machine"], 60)) or facts
    else:
        stages.leave_out("build", "already built")

    files = {device: folder / f"{device}.jsonl" for device in ("cuda", "cpu")}

    def throughput(device: str, limit: float) -> None:
        # The stage stops by itself a little before its limit, so that what it has left out has a name.
        seconds = min(limit, stages.remaining) - 20
        own = ["--device", device, "--rows", str(files[device]), "--seconds", f"{seconds:.0f}"]
        own += ["--passes", "2" if device == "cuda" else "1"]  # `python -m pytest bench` takes its time
        command = [*python, "-m", "bench.throughput", *own, *(["--quick"] if quick else [])]
        stages.run(f"throughput {device}", command, limit)

    if gpu:
        tests = [*python, "-m", "pytest", "tests", "-m", "gpu", "-v", "-p", "no:cacheprovider"]
        tests += ["--hypothesis-profile", "report"]
        if importlib.util.find_spec("xdist") is not None:
            # The reference's half of each comparison takes a core; a process takes half a gigabyte of the device.
            tests += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
        stages.run("gpu tests", tests, 120, tell=True)
        throughput("cuda", 130)
        if sanitizer := shutil.which("compute-sanitizer"):
            watch = [sanitizer, "--tool", "memcheck", "--error-exitcode", "99", *_own_kernels(sanitizer)]
            # Without torch's caching every tensor is an allocation of its own, with borders the sanitizer sees.
            watched = [*python, "-m", "bench.verify", "--backend", "cuda", "--few"]
            stages.run("memcheck", [*watch, *watched], 70, tell=True, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        else:
            stages.leave_out("memcheck", "no compute-sanitizer on PATH")
    else:
        for name in ("gpu tests", "throughput cuda", "memcheck"):
            stages.leave_out(name, "no GPU")
    in_flight = _json_line(stages.run("in flight", [*python, "-m", "bench.inflight"], 30))
    throughput("cpu", 70 if gpu else 240)
    whole = _json_line(stages.run("whole steps", [*python, "-m", "bench.whole_step", *["--quick"] * quick], 40))

    rows = []
    for path in files.values():
        if path.exists():
            rows += [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    outcomes = [asdict(outcome) for outcome in stages.outcomes]
    whole_steps = whole["whole_steps"] if whole else []
    return {**facts, "stages": outcomes, "rows": rows, "whole_steps": whole_steps, "in_flight": in_flight}


def _own_kernels(sanitizer: str) -> list[str]:
    """Has compute-sanitizer watch this package's kernels alone, where it can: torch's take most of the time."""
    done = subprocess.run([sanitizer, "--help"], capture_output=True, text=True, timeout=30)
    return ["--kernel-regex", "kns=signadam"] if "--kernel-regex" in done.stdout else []


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for NAME.json, .png, .md and .log")
    parser.add_argument("--name", help="of the files; from the GPU or CPU when not given")
    parser.add_argument("--skip", action="append", default=[], metavar="STAGE", help="leave a stage out; repeatable")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run, not how fast")
    options = parser.parse_args(given)
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "report.log"
    with tempfile.TemporaryDirectory() as folder:
        stages = Stages(log, options.skip, time.monotonic() + TOTAL_SECONDS)
        report = run(stages, Path(folder), options.quick)
    report["command"] = machine.command("bench.report", given)
    report["name"] = options.name or machine.slug(report["machine"])
    present.write(rounded(report, 6), options.out)
    log.rename(options.out / f"{report['name']}.log")
    print(present.disturbance(report), flush=True)
    print(present.aims(report) or "(the aims speak of two CPU cores)", flush=True)
    print(f"written: {options.out / report['name']}.{{json,png,md,log}}", flush=True)
    return int(stages.failed)


if __name__ == "__main__":
    raise SystemExit(main())
