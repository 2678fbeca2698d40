"""One command that builds, tests, sanitizes and benchmarks, and writes JSON, PNG and a page:

    python -m bench.report --out DIR

On a GPU it ends within nine minutes. Every stage is a process of its own with a time limit of its own, so a stage that
hangs or crashes loses only itself, and this process touches neither torch nor CUDA. Stages with much to do end by
themselves before their limit, and say what they have left out: one that is killed hangs. Without a GPU the stages that
need one are left out, by name; with --dry-run they run here, on the CPU backend and on interpreted Triton, at tiny
sizes: the same commands for another device. The exit status is 1 when a stage failed or was killed.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
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
        detail = f"exit status {code}: {last.strip('= ')}"
        if code is None:
            detail = f"limit {limit:.0f} s; before it {_done(text) or last.strip('= ') or 'nothing'}"
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


def _done(text: str) -> str:
    """What a run of tests that was killed had done, from the outcomes that it printed; nothing of other programs."""
    outcomes = re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", text)
    return ", ".join(f"{count} {outcome.lower()}" for outcome, count in Counter(outcomes).items())


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


#: Kernels that share memory between threads: sums of a gradient in one launch and in two, exponents of 32 elements.
SHARING = ("SignAdamPP adaptive_delayed", "SignAdamPP adaptive", "Signum int8 stochastic")
#: Seconds before its limit at which a stage begins nothing new.
SPARE = 20


class Plan:
    """The stages, and where they run.

    Attributes:
        gpu: what the machine says of its GPU, or None.
        rehearses: whether the stages of a GPU run on what there is without one.
        quick: whether sizes are tiny.
        folder: for what stages write.
    """

    def __init__(self, stages: Stages, folder: Path, quick: bool, rehearses: bool) -> None:
        self.stages, self.folder = stages, folder
        self.rehearses, self.quick = rehearses, quick or rehearses
        self.gpu: dict[str, Any] | None = None
        self.processes = min(12, os.cpu_count() or 1)

    def run(self) -> dict[str, Any]:
        """All stages; returns the report without name and command."""
        facts = self._facts("facts")
        if facts is None:
            raise SystemExit(f"the machine's facts cannot be read, see {self.stages.log}")
        self.gpu = facts["machine"]["gpu"]
        facts = self._build(facts)
        measured: dict[str, Any] = {}
        if self.gpu or self.rehearses:
            self._compile_ahead()
            self._gpu_tests()
            self._throughput("cuda", 130)
            measured |= self._json(
                "host", "bench.host", 30, "--device", self._device("cuda"), *["--quick"] * self.quick
            )
            ncu = tool("ncu")
            counted = ["--seconds", "20", *(["--ncu", ncu] if ncu else [])]
            measured |= self._json("executed", "bench.executed", 45, *counted)
            self._sanitizer("memcheck", 60, "--few")
            for name in ("racecheck", "synccheck"):
                self._sanitizer(name, 35, "--few", *(word for label in SHARING for word in ("--only", label)))
        else:
            needed = ("compile ahead", "gpu tests", "throughput cuda", "host", "executed", "memcheck")
            for name in (*needed, "racecheck", "synccheck"):
                self.stages.leave_out(name, "no GPU")
        in_flight = self._json("in flight", "bench.inflight", 60)
        self._throughput("cpu", 70 if self.gpu else 240)
        whole = self._json("whole steps", "bench.whole_step", 40, *["--quick"] * self.quick)
        rows = []
        for path in sorted(self.folder.glob("*.jsonl"), reverse=True):
            rows += [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        outcomes = [asdict(outcome) for outcome in self.stages.outcomes]
        whole_steps = whole.get("whole_steps", [])
        return {
            **facts,
            "stages": outcomes,
            "rows": rows,
            "whole_steps": whole_steps,
            "in_flight": in_flight or None,
            **measured,
        }

    def _device(self, device: str) -> str:
        return "cpu" if self.rehearses else device

    def _interpreted(self) -> dict[str, str]:
        """The environment of a stage that needs Triton."""
        return {"TRITON_INTERPRET": "1"} if self.rehearses else {}

    def _json(self, name: str, module: str, limit: float, *arguments: str) -> dict[str, Any]:
        found = _json_line(self.stages.run(name, [sys.executable, "-m", module, *arguments], limit))
        return found if isinstance(found, dict) else {}

    def _facts(self, name: str) -> dict[str, Any] | None:
        return self._json(name, "reporting.machine", 60) or None

    def _seconds(self, limit: float, spare: float = SPARE) -> str:
        """When a stage of that limit begins nothing new, from its start."""
        return f"{max(min(limit, self.stages.remaining) - spare, 1):.0f}"

    def _build(self, facts: dict[str, Any]) -> dict[str, Any]:
        reason = None if self.rehearses else _needs_build(facts)
        if reason is None:
            self.stages.leave_out("build", "a rehearsal" if self.rehearses else "already built")
            return facts
        print(f"building: {reason}", flush=True)
        environment = {}
        if self.gpu:
            environment["SIGNADAM_CUDA_ARCHS"] = self.gpu["capability"].replace(".", "")
            if (nvcc := tool("nvcc")) and "--split-compile" in _help(nvcc):
                # One architecture is one compilation: its kernels spread over the cores.
                appended = os.environ.get("NVCC_APPEND_FLAGS", "")
                environment["NVCC_APPEND_FLAGS"] = f"{appended} --split-compile=0".strip()
        # Editable, so that the Triton package is found too; with what is installed, as there may be no network.
        install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
        self.stages.run("build", [sys.executable, *install], 150, **environment)
        return self._facts("facts after build") or facts

    def _compile_ahead(self) -> None:
        own = ["--device", self._device("cuda"), "--processes", str(self.processes), "--seconds", self._seconds(60)]
        command = [sys.executable, "-m", "bench.ahead", *own]
        self.stages.run("compile ahead", command, 60, tell=True, **self._interpreted())

    def _gpu_tests(self) -> None:
        limit = 130.0
        tests = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "bench.stop_after"]
        # One of a rule's Triton kernels compiles some twenty of them.
        tests += ["--stop-after", self._seconds(limit, spare=35)]
        if importlib.util.find_spec("xdist") is not None:
            # The reference's half of each comparison takes a core; a process takes half a gigabyte of the device.
            tests += ["-n", str(self.processes), "--dist", "worksteal"]
        environment = self._interpreted()
        if self.rehearses:
            tests += ["tests/backends/test_parity.py", "-k", "every_size", "--hypothesis-profile", "few"]
            environment["SIGNADAM_TEST_BACKEND"] = "triton"
        else:
            tests += ["tests", "-m", "gpu", "--hypothesis-profile", "report"]
        self.stages.run("gpu tests", tests, limit, tell=True, **environment)

    def _throughput(self, device: str, limit: float) -> None:
        # `python -m pytest bench` takes its time.
        own = ["--device", self._device(device), "--rows", str(self.folder / f"{device}.jsonl")]
        own += ["--seconds", self._seconds(limit), "--passes", "2" if device == "cuda" else "1"]
        command = [sys.executable, "-m", "bench.throughput", *own, *["--quick"] * self.quick]
        self.stages.run(f"throughput {device}", command, limit)

    def _sanitizer(self, name: str, limit: float, *arguments: str) -> None:
        """The kernels under a tool of compute-sanitizer; a rehearsal runs what it would watch."""
        watched = [sys.executable, "-m", "bench.verify", "--backend", self._device("cuda"), *arguments]
        watched += ["--seconds", self._seconds(limit)]
        sanitizer = tool("compute-sanitizer")
        if self.rehearses:
            watch = ["env"]
        elif sanitizer is not None:
            watch = [sanitizer, "--tool", name, "--error-exitcode", "99", *_own_kernels(sanitizer)]
        else:
            self.stages.leave_out(name, "no compute-sanitizer")
            return
        # Without torch's caching every tensor is an allocation of its own, with borders the sanitizer sees.
        self.stages.run(name, [*watch, *watched], limit, tell=True, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit."""
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if key in os.environ] + ["/usr/local/cuda"]
    found = [shutil.which(name), *(str(Path(home, "bin", name)) for home in homes)]
    return next((path for path in found if path is not None and os.access(path, os.X_OK)), None)


def _help(program: str) -> str:
    return subprocess.run([program, "--help"], capture_output=True, text=True, timeout=30).stdout


def _own_kernels(sanitizer: str) -> list[str]:
    """Has compute-sanitizer watch this package's kernels alone, where it can: torch's take most of the time."""
    return ["--kernel-regex", "kns=signadam"] if "--kernel-regex" in _help(sanitizer) else []


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for NAME.json, .png, .md and .log")
    parser.add_argument("--name", help="of the files; from the GPU or CPU when not given")
    parser.add_argument("--skip", action="append", default=[], metavar="STAGE", help="leave a stage out; repeatable")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run, not how fast")
    parser.add_argument("--dry-run", action="store_true", help="the stages of a GPU without one, at tiny sizes")
    options = parser.parse_args(given)
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "report.log"
    with tempfile.TemporaryDirectory() as folder:
        stages = Stages(log, options.skip, time.monotonic() + TOTAL_SECONDS)
        # Kernels that one stage compiles serve the others.
        os.environ.setdefault("TRITON_CACHE_DIR", str(Path(folder, "triton")))
        report = Plan(stages, Path(folder), options.quick, options.dry_run).run()
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
