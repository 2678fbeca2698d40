"""The long programs in short: a few kills, some thousand steps, the inputs that are kept, two processes of actions."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def _beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


def run(program: str, *arguments: object) -> str:
    command = [sys.executable, str(HERE / program), *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout


@pytest.mark.thorough
def test_killed_trainings_resume_with_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log = {"seed": 0, "runs": 3, "kills": [{"in_saving": True}]}  # of an earlier call
    (tmp_path / "log.json").write_text(json.dumps(log))
    said = run("kills.py", "--kills", 3, "--trainings", 2, "--steps", 20, "--folder", tmp_path)
    assert said.splitlines()[-1].startswith("3 kills in ")
    log = json.loads((tmp_path / "log.json").read_text())
    assert len(log["kills"]) == 3 and log["runs"] > 3


def test_memory_is_flat_and_bits_are_those_of_the_reference(tmp_path: Path) -> None:
    import million_steps

    runs: dict[str, dict[str, Any]] = {}
    for backend, steps in (("cpu", 20_000), ("reference", 300)):
        path = tmp_path / backend
        million_steps.train("SignAdamPP", backend, steps, path)
        runs[f"SignAdamPP {backend}"] = json.loads(path.read_text())
    digests = [run["digests"] for run in runs.values()]
    assert digests[0].keys() & digests[1].keys() == {"10", "100"}
    assert million_steps.faults(runs) == []
    assert [each["step"] for each in runs["SignAdamPP cpu"]["memory"]] == [10_000, 20_000]


def test_steps_that_differ_or_grow_are_noticed() -> None:
    import million_steps

    def ran(digest: str, resident: int = 0) -> dict[str, Any]:
        memory = [{"step": step, "resident": at, "objects": 1, "blocks": 1} for step, at in ((1, 0), (2, resident))]
        return {"digests": {"10": digest}, "memory": memory}

    assert million_steps.faults({"a avx2 1": ran("x"), "a avx512 1": ran("x"), "b avx2 1": ran("y")}) == []
    assert million_steps.faults({"a avx2 1": ran("x"), "a avx512 1": ran("y")}) == ["a: other bits after 10 steps"]
    assert len(million_steps.faults({"a avx2 1": ran("x", 2 << 20)})) == 1


@pytest.mark.filterwarnings("ignore")
def test_inputs_of_the_fuzzer_of_states_are_refused_or_taken(tmp_path: Path, thorough: bool) -> None:
    """Every input that is kept, and others made of them, which are the same in every run."""
    from state_inputs import Target

    with zipfile.ZipFile(HERE / "states.zip") as archive:
        inputs = [archive.read(name) for name in sorted(archive.namelist())]
    target, draw = Target(tmp_path), random.Random(0)
    for data in inputs:
        target(data)
    for _ in range(400 if thorough else 50):
        damaged = bytearray(draw.choice(inputs) + draw.randbytes(8))
        for _ in range(draw.choice((1, 2, 5))):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        target(bytes(damaged))
    assert target.outcomes.keys() >= {"taken", "TypeError", "ValueError", "BadZipFile"}


def test_what_loading_must_not_do_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from state_inputs import EDITED_DICT, FORMS, Finding, Form, Target

    from signadam_ext.optimizers.base import SignOptimizer

    undamaged = bytes((0, 255, EDITED_DICT, 0, 0, 5))

    def failing(error: Exception, changes: bool = False) -> Any:
        def load(optimizer: SignOptimizer, state_dict: Any) -> None:
            if changes:
                optimizer.param_groups[0]["lr"] = 7.0
            raise error

        return load

    for load, words in (
        (failing(RuntimeError("of torch")), "RuntimeError: of torch"),
        (failing(ValueError("no state"), changes=True), "refused (no state), and yet something has changed"),
    ):
        target = Target(tmp_path)
        assert target(undamaged) == "taken"
        with monkeypatch.context() as context, pytest.raises(Finding) as found:
            context.setattr(SignOptimizer, "load_state_dict", load)
            target(undamaged)
        assert str(found.value) == words
    assert len({form.name for form in FORMS}) == len(FORMS) and isinstance(FORMS[0], Form)


@pytest.mark.thorough
def test_actions_go_on_after_the_last_process(tmp_path: Path) -> None:
    """Also where the folder of the first is gone."""
    results = tmp_path / "results.json"
    for actions, folder, seeds in ((10, "a", ["7"]), (20, "a", ["7", "8"]), (30, "b", ["9"])):
        options = ["--actions", actions, "--each", 10, "--folder", tmp_path / folder, "--seed", 7, "--results", results]
        said = run("actions.py", *options)
        assert f"{actions} actions of " in said and "0 faults" in said
        assert sorted(path.stem for path in (tmp_path / folder).glob("*.json")) == seeds
    found = json.loads(results.read_text())
    assert [each["seed"] for each in found["processes"]] == [7, 8, 9]
    assert sum(found["actions_by_kind"].values()) == found["actions"] == 30


def test_actions_are_added_up() -> None:
    import actions

    def process(seed: int, **kinds: int) -> dict[str, Any]:
        count = sum(kinds.values())
        fault = [{"fault": "bits"}] * (seed == 2)
        return {
            "seed": seed, "commit": "c", "actions": count, "minutes": 0.5, "faults": fault, "actions_by_kind": kinds
        }  # fmt: skip

    found = actions.summary([process(2, step=2)], actions.summary([process(1, step=3, swap=1)], {}))
    assert (found["actions"], found["minutes"]) == (6, 1.0) and found["actions_by_kind"] == {"step": 5, "swap": 1}
    assert found["faults"] == [{"seed": 2, "fault": "bits"}]
    assert found["processes"][1] == {"seed": 2, "commit": "c", "actions": 2, "minutes": 0.5}
