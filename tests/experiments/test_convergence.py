"""The comparison of trainings: what it makes of finished runs, which runs it asks for, and one run in small."""

import json
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from experiments import convergence

TEXT = bytes(range(32, 127)) * 40


@pytest.fixture
def problem(monkeypatch):
    data = torch.frombuffer(bytearray(TEXT), dtype=torch.uint8)
    monkeypatch.setattr(convergence, "load_data", lambda name: data)
    monkeypatch.setattr(convergence, "digest", lambda name: "of a text")
    return replace(convergence.quick(convergence.GPT_PROBLEM), grid=(1e-3, 3e-3, 1e-2))


@pytest.fixture
def store(problem, tmp_path):
    store = convergence.Store(tmp_path, problem)
    store.folder.mkdir()
    return store


def pretend(store, job, loss):
    store.put(
        job,
        {
            "train": [3.0] * store.problem.steps,
            "validation": [[store.problem.steps, loss]],
            "finished": math.isfinite(loss),
            "seconds": 1.0,
            "parameters": 10,
            "state_bytes": 40,
        },
    )


def test_paired_interval_is_students():
    # By hand: mean 2, standard deviation 1, so 4.303 / sqrt(3) to either side.
    got = convergence.paired([1.0, 2.0, 3.0])
    assert got["n"] == 3 and got["mean"] == 2
    assert got["high"] - 2 == pytest.approx(4.303 / math.sqrt(3)) == 2 - got["low"]
    assert convergence.paired([5.0]) == {"n": 1, "mean": 5.0, "low": None, "high": None}


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({1e-4: 3.0, 1e-3: 2.0, 1e-2: 4.0}, None),
        ({1e-4: 2.0, 1e-3: 3.0, 1e-2: 4.0}, 3e-5),
        ({1e-4: 4.0, 1e-3: 3.0, 1e-2: 2.0}, 3e-2),
        ({1e-3: 4.0, 3e-3: math.inf}, 3e-4),
    ],
)
def test_search_goes_one_step_beyond_an_edge(losses, expected):
    assert convergence.extension(losses) == expected


def test_rounded_leaves_valid_json():
    assert convergence.rounded({"a": [math.nan, 1.23456789, 7, "x"]}) == {"a": [None, 1.2346, 7, "x"]}


def test_every_method_is_named_once_and_refers_to_one_that_exists():
    assert len(convergence.BY_KEY) == len(convergence.METHODS)
    for method in convergence.METHODS:
        assert convergence.BY_KEY[method.lr_of or method.key].lr_of is None
        assert convergence.same_in_fp32(method) in convergence.BY_KEY


def test_plan_waits_for_the_search_and_takes_its_best_rate(store):
    before = convergence.plan(store)
    searched = [method for method in convergence.METHODS if method.lr_of is None]
    assert {job.seed for job in before.ready} == {convergence.SEARCH_SEED}
    assert len(before.ready) == 3 * len(searched)
    for job in before.ready:
        pretend(store, job, {1e-3: 2.5, 3e-3: 2.0, 1e-2: math.inf}[job.lr])
    after = convergence.plan(store)
    assert after.waiting == 0
    assert len(after.ready) == len(before.ready) + before.waiting
    assert len({job.name for job in after.ready}) == len(after.ready)
    assert {job.lr for job in after.ready if job.seed not in (convergence.SEARCH_SEED, convergence.CHECK_SEED)} == {
        3e-3
    }


def test_differences_are_paired_by_seed(store):
    for job in convergence.plan(store).ready:
        pretend(store, job, 2.0 if job.lr == 3e-3 else 2.5)
    for job in convergence.plan(store).ready:
        if job.seed != convergence.SEARCH_SEED:
            # The seeds differ by 1, the methods by 0.5 and 0.7.
            gain = {0: 0.5, 1: 0.7}[job.seed] if job.method.key == convergence.FEW_BITS else 0.0
            pretend(store, job, 3.0 + job.seed - gain)
    got = convergence.summarize(store)[convergence.FEW_BITS]["loss"]["minus_adamw"]
    assert got["n"] == 2
    assert got["mean"] == pytest.approx(-0.6)
    assert got["high"] - got["mean"] == pytest.approx(12.706 * 0.1)


def test_a_run_is_kept_whole_and_not_made_again_unless_its_configuration_changes(store, problem):
    job = convergence.Job(problem, convergence.BY_KEY["sign_adam_pp"], 1e-3, 0)
    with store.claim(job) as mine, store.claim(job) as again:
        assert mine and not again
    run = convergence.train(job)
    assert run["finished"] and len(run["train"]) == problem.steps
    assert convergence.train(job)["train"] == run["train"]
    store.put(job, run)

    fresh = convergence.Store(store.folder.parent, problem)
    assert fresh.get(job)["train"] == run["train"]
    assert fresh.final(job) == run["validation"][-1][1]
    other = replace(problem, spec=problem.spec | {"steps": 7})
    assert convergence.Store(store.folder.parent, other).get(replace(job, problem=other)) is None


def test_methods_share_weights_and_batches(problem):
    first = [
        convergence.train(convergence.Job(problem, convergence.BY_KEY[key], 1e-3, 3))["train"][0]
        for key in ("adamw", "lion", "signum")
    ]
    assert first[0] == first[1] == first[2]


def test_a_diverged_run_is_told(problem):
    run = convergence.train(convergence.Job(problem, convergence.BY_KEY["adamw"], 1e38, 0))
    assert not run["finished"]


def test_lion_is_the_published_rule():
    p, m = torch.tensor([1.0, -2.0, 0.5]), torch.zeros(3)
    parameter = p.clone().requires_grad_()
    optimizer = convergence.Lion([parameter], lr=0.1, weight_decay=0.5)
    for gradient in (torch.tensor([1.0, -1.0, 0.0]), torch.tensor([-0.05, 3.0, 0.0])):
        parameter.grad = gradient
        optimizer.step()
        p = p * (1 - 0.1 * 0.5) - 0.1 * (0.9 * m + 0.1 * gradient).sign()
        m = 0.99 * m + 0.01 * gradient
    torch.testing.assert_close(parameter.detach(), p)


def test_collect_writes_json_a_page_and_figures(store, tmp_path):
    for job in convergence.plan(store).ready:
        pretend(store, job, 2.0 if job.lr == 3e-3 else 2.5)
    for job in convergence.plan(store).ready:
        pretend(store, job, 2.0 + 0.01 * job.seed)
    convergence.collect(store, tmp_path / "results")
    content = json.loads((tmp_path / "results" / "gpt.json").read_text(encoding="utf-8"))
    assert content["finished_runs"] == content["expected_runs"] == len(content["runs"])
    assert content["methods"]["lion"]["lr"] == 3e-3
    assert "SignAdamPP" in (tmp_path / "results" / "gpt.md").read_text(encoding="utf-8")
    for picture in ("curves", "differences", "rates"):
        assert (tmp_path / "results" / f"gpt-{picture}.png").read_bytes().startswith(b"\x89PNG")
