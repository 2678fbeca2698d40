"""The comparison of trainings: which runs it asks for, what it makes of finished ones, and one run in small."""

import json
import math
import subprocess
import tarfile
from dataclasses import replace

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from experiments.convergence import search, summary, training
from experiments.convergence.methods import ADAMW, BY_KEY, FEW_BITS, METHODS, PLUS, same_in_fp32
from experiments.convergence.search import RATES, SEARCH_SEED, Comparison
from experiments.convergence.training import GPT_PROBLEM, LONG_PROBLEM, Job, quick, train
from reporting import machine, runs
from reporting.problems import Images

TEXT = bytes(range(32, 127)) * 40


@pytest.fixture(autouse=True)
def of_a_text(monkeypatch):
    data = torch.frombuffer(bytearray(TEXT), dtype=torch.uint8)
    for module in (training, summary):
        monkeypatch.setattr(module, "digest", lambda name: "of a text")
    monkeypatch.setattr(training, "load_data", lambda name: data)


@pytest.fixture
def problem():
    return quick(GPT_PROBLEM)


@pytest.fixture
def comparison(tmp_path):
    return Comparison(tmp_path / "runs", ["gpt", "gpt_long"], small=True)


def pretend(comparison, job, loss):
    metrics = [loss, 0.1] if job.problem.task is Images else [loss]
    comparison.stores[job.problem.name].put(
        job,
        {
            "train": [3.0] * job.problem.steps,
            "validation": [[job.problem.steps, *metrics]],
            "finished": math.isfinite(loss),
            "seconds": 1.0,
            "parameters": 10,
            "state_bytes": 40,
        },
    )


def run_all(comparison, loss):
    """Pretend to run whatever is asked for until nothing is missing; the jobs in that order."""
    done = []
    while todo := [job for _, job in comparison.ready() if comparison.get(job) is None]:
        pretend(comparison, todo[0], loss(todo[0]))
        done.append(todo[0])
    return done


def valley(best):
    """A loss by learning rate alone, lowest at `best`."""
    return lambda job: 2.0 + abs(math.log(job.lr / best))


def test_paired_interval_is_students():
    # By hand: mean 2, standard deviation 1, so 4.302653 / sqrt(3) to either side.
    got = runs.interval([1.0, 2.0, 3.0])
    assert got["n"] == 3 and got["mean"] == 2
    assert got["high"] - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert 2 - got["low"] == pytest.approx(got["high"] - 2)
    assert runs.interval([5.0]) == {"n": 1, "mean": 5.0, "low": None, "high": None}


def test_every_method_is_named_once_and_begins_at_one_that_exists():
    assert len(BY_KEY) == len(METHODS)
    for method in METHODS:
        assert method.begins_at is None or BY_KEY[method.begins_at].begins_at is None
        if method.stored:
            assert BY_KEY[method.begins_at].options.get("beta", 0.9) == method.options["beta"]


def test_the_grid_is_1_2_3_6():
    assert [lr for lr in RATES if 1e-4 <= lr < 1e-2] == [1e-4, 2e-4, 3e-4, 6e-4, 1e-3, 2e-3, 3e-3, 6e-3]


@pytest.mark.parametrize("best", [2e-5, 1e-4, 3e-4, 6e-4, 1e-3, 2e-3, 6e-2])
def test_a_search_ends_with_both_neighbours_of_its_best_rate(comparison, best):
    problem, method = comparison.problem("gpt"), BY_KEY["lion"]
    while (found := comparison.search(problem, method)).best is None:
        job = next(job for job in found.jobs if comparison.get(job) is None)
        assert job.seed == SEARCH_SEED
        pretend(comparison, job, valley(best)(job))
    assert found.best == best
    assert set(search.neighbours(best)) < set(found.losses)
    # None is tried twice, none beside the way from the first rates to the best one.
    assert len(found.jobs) == len({job.lr for job in found.jobs}) <= 2 + abs(RATES.index(best) - RATES.index(3e-4)) + 2


def test_a_search_that_diverges_goes_down(comparison):
    problem, method = comparison.problem("gpt"), BY_KEY["lion"]
    while (found := comparison.search(problem, method)).best is None:
        job = next(job for job in found.jobs if comparison.get(job) is None)
        pretend(comparison, job, math.inf if job.lr > 1e-4 else valley(1e-4)(job))
    assert found.best == 1e-4


def test_a_search_that_leaves_the_grid_finds_nothing_and_stops_nothing(comparison):
    run_all(comparison, lambda job: math.inf if job.method.key == "lion" else valley(1e-3)(job))
    assert search.neighbours(RATES[-1]) == (RATES[-2],) and search.neighbours(RATES[0]) == (RATES[1],)
    problem = comparison.problem("gpt")
    assert comparison.best(problem, BY_KEY["lion"]) is None
    assert comparison.plan(problem).waiting == problem.seeds
    assert set(summary.summarize(comparison, problem)) == set(BY_KEY) - {"lion"}


def test_longer_runs_alone_search_first_where_they_begin(tmp_path):
    alone = Comparison(tmp_path / "alone", ["gpt_long"], small=True)
    order = run_all(alone, valley(1e-3))
    problem = alone.problem("gpt_long")
    assert alone.plan(problem).waiting == 0
    assert {job.seed for job in order if job.problem.name == "gpt"} == {SEARCH_SEED}
    assert {job.method.key for job in order} == {method.key for method in problem.methods}


def test_forms_and_longer_runs_begin_around_what_was_found(comparison):
    problem, long = comparison.problem("gpt"), comparison.problem("gpt_long")
    form, beta = BY_KEY[FEW_BITS], BY_KEY[f"{FEW_BITS}_beta0.95"]
    assert comparison.search(problem, form).jobs == comparison.search(long, form).jobs == []
    order = run_all(comparison, lambda job: valley(2e-3 if job.method.options.get("beta") == 0.95 else 6e-4)(job))
    first = {}
    for job in order:
        first.setdefault((job.problem.name, job.method.key), []).append(job.lr)
    assert first["gpt", FEW_BITS][:3] == first["gpt_long", FEW_BITS][:3] == [3e-4, 6e-4, 1e-3]
    assert first["gpt", beta.key][:3] == [1e-3, 2e-3, 3e-3]
    assert {key for name, key in first if name == "gpt_long"} == {ADAMW, "lion", "signum", PLUS, FEW_BITS}
    assert {key for name, key in first if name == "gpt"} == set(BY_KEY)


def test_every_row_has_the_same_seeds_at_its_best_rate(comparison):
    order = run_all(comparison, valley(1e-3))
    for name in ("gpt", "gpt_long"):
        problem = comparison.problem(name)
        plan = comparison.plan(problem)
        assert plan.waiting == 0
        for method in problem.methods:
            seeds = [job.seed for job in plan.ready if job.method == method and job.seed != SEARCH_SEED]
            assert seeds == list(range(problem.seeds))
        assert len({job.name for job in plan.ready}) == len(plan.ready)
    assert len(order) == sum(len(comparison.plan(comparison.problem(name)).ready) for name in ("gpt", "gpt_long"))


def test_differences_are_paired_by_seed_and_wait_for_all_of_them(comparison):
    problem, method = comparison.problem("gpt"), BY_KEY[FEW_BITS]

    def loss(job):
        # The seeds differ by 1, the methods by 0.5 and 0.7.
        gain = {0: 0.5, 1: 0.7}.get(job.seed, 0.0) if job.method == method else 0.0
        return valley(1e-3)(job) + (job.seed - gain if job.seed != SEARCH_SEED else 0)

    run_all(comparison, loss)
    entry = summary.summarize(comparison, problem)[FEW_BITS]
    got = entry["loss"]["minus_adamw"]
    assert got["n"] == 2 and got["mean"] == pytest.approx(-0.6)
    assert got["high"] - got["mean"] == pytest.approx(12.7062 * 0.1, rel=1e-5)
    (comparison.stores["gpt"].folder / f"{Job(problem, method, entry['lr'], 1).name}.json").unlink()
    fresh = Comparison(comparison.stores["gpt"].folder.parent, ["gpt"], small=True)
    assert summary.difference(fresh, problem, method, ADAMW) is None
    assert FEW_BITS not in summary.summarize(fresh, problem)


def test_a_run_is_kept_whole_and_not_made_again_unless_its_configuration_changes(comparison, problem):
    store, job = comparison.stores["gpt"], Job(problem, BY_KEY[PLUS], 1e-3, 0)
    with store.claim(job) as mine, store.claim(job) as again:
        assert mine and not again
    run = train(job)
    assert run["finished"] and len(run["train"]) == problem.steps
    assert train(job)["train"] == run["train"]
    store.put(job, run)

    fresh = runs.Store(store.folder.parent, problem)
    assert fresh.get(job)["train"] == run["train"]
    assert fresh.final(job) == run["validation"][-1][1]
    other = replace(problem, spec=problem.spec | {"weight_decay": 0.2})
    assert runs.Store(store.folder.parent, other).get(replace(job, problem=other)) is None


def test_methods_share_weights_and_batches(problem):
    first = [train(Job(problem, BY_KEY[key], 1e-3, 3))["train"][0] for key in (ADAMW, "lion", "signum")]
    assert first[0] == first[1] == first[2]


def test_gradients_are_clipped(problem, monkeypatch):
    norms = []

    def step(optimizer, closure=None):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads])).item())

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    clip = replace(problem, spec=problem.spec | {"clip": 0.01})
    train(Job(clip, BY_KEY[ADAMW], 1e-3, 0))
    assert norms == pytest.approx([0.01] * problem.steps, rel=1e-3)
    norms.clear()
    train(Job(replace(problem, spec=problem.spec | {"clip": None}), BY_KEY[ADAMW], 1e-3, 0))
    assert min(norms) > 0.1


def test_a_diverged_run_is_told(problem):
    assert not train(Job(problem, BY_KEY[ADAMW], 1e38, 0))["finished"]


def test_collect_writes_json_a_page_and_figures(comparison, tmp_path):
    run_all(comparison, lambda job: valley(1e-3)(job) + 0.01 * (job.seed % 1000))
    for name in ("gpt", "gpt_long"):
        summary.collect(comparison, comparison.problem(name), tmp_path / "results")
        content = json.loads((tmp_path / "results" / f"{name}.json").read_text(encoding="utf-8"))
        assert content["finished_runs"] == content["expected_runs"] == len(content["runs"])
        assert content["methods"]["lion"]["lr"] == 1e-3
        page = (tmp_path / "results" / f"{name}.md").read_text(encoding="utf-8")
        # Seeds 0 and 1 lie 0.01 apart: a mean of 2.005, half an interval of 12.706 * 0.005.
        assert "2.0050 ± 0.0635" in page and "**±** is half of the 95 % confidence interval" in page
        for picture in ("curves", "differences", "rates"):
            assert (tmp_path / "results" / f"{name}-{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_the_pages_of_the_project_show_what_was_collected(tmp_path, monkeypatch):
    import bench.summary
    from bench import committed, readme

    if not committed.RESULTS.is_dir():
        pytest.skip("the source distribution holds no results")
    every = Comparison(tmp_path / "runs", ["gpt", "gpt_long", "digits"], small=True)
    # The best of each method, higher by 0.1 for each seed after the first; SignAdamPP is 1 above the others.
    run_all(every, lambda job: valley(1e-3)(job) + 0.1 * (job.seed == 1) + (job.method.key == PLUS))
    monkeypatch.setattr(committed, "CONVERGENCE", tmp_path / "results")
    monkeypatch.setattr(bench.summary, "CONVERGENCE", tmp_path / "results")
    monkeypatch.setattr(bench.summary, "_link", lambda path: path.name)
    monkeypatch.setattr(bench.summary, "ROOT", tmp_path)
    committed.training.cache_clear()
    try:
        for name in ("gpt", "gpt_long", "digits"):
            summary.collect(every, every.problem(name), tmp_path / "results")
        page, quality, glance = bench.summary.convergence(), readme.quality(), readme.glance()
    finally:
        committed.training.cache_clear()
    # Seeds at 2 and 2.1: half of an interval is 12.706 * 0.05; paired differences are the same for both seeds.
    assert quality.count("2.050 ± 0.635 | 3.050 ± 0.635 |") == 3 and "CNN" in quality
    assert glance.count("2.050 ± 0.635 |     2.050 ± 0.635 |") == glance.count("6 steps, 2 seeds") == 2
    assert page.count("### ") == 3 and page.count("+1.000 (+1.000 .. +1.000)") == 3
    assert "-1.000 (-1.000 .. -1.000)" in page and "digits-rates.png" in page


def test_runs_are_packed_alike_and_unpacked_where_they_are_missing(comparison, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "require_commits", lambda commits: None)
    folder = comparison.stores["gpt"].folder.parent
    run_all(comparison, valley(1e-3))
    (folder / "gpt" / "of_another_plan.json").write_text("{}")
    comparison.pack(tmp_path / "a.tar.gz")
    comparison.pack(tmp_path / "b.tar.gz")
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes()
    fresh = tmp_path / "fresh"
    (fresh / "gpt").mkdir(parents=True)
    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        name, *others = tar.getnames()
    assert "gpt/of_another_plan.json" not in others
    (fresh / name).write_text("mine")
    runs.unpack(tmp_path / "a.tar.gz", fresh)
    assert (fresh / name).read_text() == "mine"
    again = Comparison(fresh, ["gpt_long"], small=True)
    (fresh / name).write_bytes((folder / name).read_bytes())
    assert again.progress()[0] == again.progress()[1] > 0
    runs.unpack(tmp_path / "nothing.tar.gz", fresh)


def test_results_of_unknown_code_are_refused(comparison, tmp_path, monkeypatch):
    job = next(iter(comparison.ready()))[1]
    facts = runs.environment()
    whole = subprocess.run(
        ["git", "rev-parse", "--is-shallow-repository"], capture_output=True, text=True, cwd=machine.ROOT
    )
    # Without the history a hash cannot be judged.
    unknown = ("0123456789ab",) if whole.stdout.strip() == "false" else ()
    for commit in (*unknown, f"{machine.commit()[:12]}+changes", None, "unknown"):
        monkeypatch.setattr(runs, "environment", lambda commit=commit: facts | {"commit": commit})
        pretend(comparison, job, 2.0)
        with pytest.raises(machine.NotCommitted, match="Commit first"):
            comparison.pack(tmp_path / "runs.tar.gz")
        assert not list(tmp_path.glob("runs.tar*"))


def test_the_longer_problem_differs_in_its_length_alone():
    assert LONG_PROBLEM.spec == GPT_PROBLEM.spec | {"steps": 8 * GPT_PROBLEM.steps}
    assert same_in_fp32(0.9) == PLUS and same_in_fp32(0.95) == f"{PLUS}_beta0.95"
