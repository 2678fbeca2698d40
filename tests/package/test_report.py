"""What `python -m bench.report` starts, in which environment, and what it makes of what comes back."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from bench import executed, report, stop_after
from reporting import present

STAGES = (
    *("facts", "build", "compile ahead", "gpu tests", "throughput cuda", "host", "executed"),
    *("memcheck", "racecheck", "synccheck", "in flight", "throughput cpu", "whole steps"),
)
GPU = {"name": "NVIDIA H100", "capability": "9.0"}
HOST = {
    **{"backend": "triton", "tensors": 148, "first_seconds": 0.8, "kernel_seconds": 4e-6, "step_bytes": 3104},
    **{"host_seconds": {"low": 5e-5, "median": 6e-5, "high": 7e-5}, "in_parameters": False},
}


class Rehearsed(report.Stages):
    """Notes what it is asked to run, and answers as on a GPU."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        super().__init__(folder / "log", (), time.monotonic() + report.TOTAL_SECONDS)
        self.facts, self.commands = facts, {}

    def run(self, name: str, command: Sequence[str], limit: float, tell: bool = False, **environment: str) -> str:
        assert 5 <= limit <= 300 and name not in self.commands
        self.commands[name] = (list(command), environment)
        self._note(report.Outcome(name, "ok"))
        told = {
            "facts": self.facts,
            "host": {"host": [HOST]},
            "executed": {"executed": {"cuda": {"not_measured": "no ncu"}}},
            "in flight": {"not_measured": "no CUDA code"},
            "whole steps": {"whole_steps": []},
        }
        return json.dumps(told.get(name, ""))


def plan(folder: Path, gpu: dict[str, str] | None, rehearses: bool) -> tuple[dict[str, Any], Rehearsed]:
    info = {"cuda_architectures": "sm_90+sm_100+compute_100"}
    stages = Rehearsed(folder, {"machine": {"gpu": gpu}, "versions": {"signadam_ext": info}})
    return report.Plan(stages, folder, quick=False, rehearses=rehearses).run(), stages


@pytest.mark.parametrize("rehearses", [False, True], ids=["gpu", "dry run"])
def test_every_stage_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rehearses: bool) -> None:
    monkeypatch.setattr(report, "_needs_build", lambda facts: None)
    monkeypatch.setattr(report, "tool", lambda name: f"/bin/{name}")
    monkeypatch.setattr(report, "_help", lambda program: "--kernel-regex")
    found, stages = plan(tmp_path, None if rehearses else GPU, rehearses)
    assert [outcome["name"] for outcome in found["stages"]] == list(STAGES)
    assert found["host"] == [HOST] and found["in_flight"] == {"not_measured": "no CUDA code"}
    for name, (command, environment) in stages.commands.items():
        # On the CPU nothing asks for a GPU, on a GPU nothing is tiny.
        assert ("cuda" in command) == (not rehearses and name in ("compile ahead", "throughput cuda", "host", *WATCHED))
        assert ("--quick" in command) == (rehearses and name in ("throughput cuda", "throughput cpu", "host", QUICK))
        assert ("TRITON_INTERPRET" in environment) == (rehearses and name in ("compile ahead", "gpu tests"))
    for name in WATCHED:
        command, _ = stages.commands[name]
        tool = ["env"] if rehearses else ["/bin/compute-sanitizer", "--tool", name]
        assert command[: len(tool)] == tool
    racecheck, _ = stages.commands["racecheck"]
    assert [racecheck[i + 1] for i, word in enumerate(racecheck) if word == "--only"] == list(report.SHARING)


WATCHED = ("memcheck", "racecheck", "synccheck")
QUICK = "whole steps"


def test_a_build_for_a_gpu_spreads_one_architecture_over_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_needs_build", lambda facts: "no code for it")
    monkeypatch.setattr(report, "tool", lambda name: name)
    monkeypatch.setattr(report, "_help", lambda program: "--split-compile --kernel-regex")
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    _, stages = plan(tmp_path, GPU, rehearses=False)
    _, environment = stages.commands["build"]
    assert environment == {"SIGNADAM_CUDA_ARCHS": "90", "NVCC_APPEND_FLAGS": "-lineinfo --split-compile=0"}


def test_without_a_gpu_its_stages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_needs_build", lambda facts: None)
    found, stages = plan(tmp_path, None, rehearses=False)
    assert {outcome["name"] for outcome in found["stages"]} == set(STAGES)
    assert list(stages.commands) == ["facts", "in flight", "throughput cpu", "whole steps"]


def test_options_of_the_stages_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program's parser takes what the report gives it: what would run is stopped where it begins."""
    monkeypatch.setattr(report, "_needs_build", lambda facts: None)
    monkeypatch.setattr(report, "tool", lambda name: name)
    monkeypatch.setattr(report, "_help", lambda program: "--kernel-regex")
    _, stages = plan(tmp_path, GPU, rehearses=False)

    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    begins = {
        **{"bench.ahead": "subprocess.Popen", "bench.host": "measure", "bench.executed": "count"},
        **{"bench.verify": "verify", "bench.throughput": "measure"},
    }
    taken = set()
    for command, _ in stages.commands.values():
        module, *arguments = command[command.index("-m") + 1 :]
        if module in begins:
            with monkeypatch.context() as patch:
                patch.setattr(f"{module}.{begins[module]}", stop)
                # Where measurements would be written.
                patch.chdir(tmp_path)
                with pytest.raises(KeyboardInterrupt):
                    importlib.import_module(module).main(arguments)
            taken.add(module)
    assert taken == set(begins)


def test_a_killed_stage_says_what_was_done(tmp_path: Path) -> None:
    stages = report.Stages(tmp_path / "log", (), time.monotonic() + 60)
    tests = "print('PASSED a\\nPASSED b\\nFAILED c', flush=True); import time; time.sleep(60)"
    stages.run("tests", [sys.executable, "-c", tests], limit=5)
    assert stages.outcomes[0].status == "timed out" and stages.failed
    assert stages.outcomes[0].detail == "limit 5 s; before it 2 passed, 1 failed"
    assert report._done("3 equal") == ""


def test_tests_that_have_no_time_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    item: Any = SimpleNamespace(config=SimpleNamespace(getoption={"--stop-after": 100.0}.get))
    stop_after.pytest_runtest_setup(item)
    monkeypatch.setattr(stop_after, "_BEGIN", time.monotonic() - 101)
    with pytest.raises(pytest.skip.Exception, match="the time limit of 100 s"):
        stop_after.pytest_runtest_setup(item)
    item.config.getoption = {"--stop-after": None}.get
    stop_after.pytest_runtest_setup(item)


def test_executed_instructions_are_set_beside_predicted() -> None:
    values = {"smsp__inst_executed.sum": "1,600", "dram__bytes.sum": "20480", "gpu__time_duration.sum": "2500"}
    lines = [f'"{i}","update","{name}","x","{value}"' for i in range(2) for name, value in values.items()]
    text = "\n".join(["==PROF== done", '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"', *lines])
    measured = executed.launches_of(text)
    rows = [{"case": "a", "kernel": name, "instructions": 49.0} for name in ("pass_before", "none")]
    found = executed.beside(rows, measured, elements=1024)
    own = {"predicted": 49.0, "executed": 50.0, "bytes": 20.0, "seconds": 2.5e-6}
    assert found == [{"case": "a", "kernel": row["kernel"], **own} for row in rows]
    assert executed.launches_of("==ERROR== ERR_NVGPUCTRPERM") == []
    page = present._executed({"cuda": {"not_measured": "no ncu"}, "triton": {"rows": found}})
    assert "cuda: not measured yet, no ncu." in page and "| `a`  | pass_before |      49.0 |     50.0 |" in page


def test_host_times_are_on_the_page() -> None:
    page = present._host([HOST])
    assert "| triton  |     148 |     800 ms | 60 us (50 us to 70 us) |    4 us |              3,104 |" in page


@pytest.mark.nightly
def test_dry_run(tmp_path: Path) -> None:
    """All of it, on what there is without a GPU."""
    pytest.importorskip("triton")
    command = ["-m", "bench.report", "--dry-run", "--out", str(tmp_path), "--name", "dry"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=report.ROOT, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "dry.json").read_text())
    assert [stage["name"] for stage in found["stages"]] == list(STAGES)
    assert [stage["name"] for stage in found["stages"] if stage["status"] != "ok"] == ["build"]
    assert found["host"] and found["rows"] and found["executed"]
    assert "## Host time, kernels and first steps" in (tmp_path / "dry.md").read_text()
