"""The experiments on real trainings: their measures on constructed numbers, the search, the store of runs."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

import signadam_ext
from experiments import ablation, four_ways, lemma, training
from experiments.training import Job, Method
from reporting import machine
from reporting import runs as kept

PLUS = Method("plus", "SignAdamPP", "SignAdamPP", measured=True)


@pytest.fixture(autouse=True)
def data(monkeypatch):
    """Neither scikit-learn nor the standard library's sources are needed."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 17, (60, 65), generator=generator, dtype=torch.uint8)
    images[:, -1] %= 10
    text = torch.frombuffer(bytearray(bytes(range(32, 127)) * 40), dtype=torch.uint8)
    monkeypatch.setattr(training, "load_data", lambda name: images if name == "digits" else text)
    monkeypatch.setattr(training, "digest", lambda name: "of no file")


@pytest.fixture
def store(tmp_path):
    problem = replace(training.quick(training.DIGITS), points=3, further=2, search_seeds=2, first_rates=(1e-3, 1e-1))
    store = kept.Store(tmp_path, problem)
    store.folder.mkdir()
    return store


def pretend(store, job, error, loss=1.0, errors=None):
    every, errors = store.problem.every, errors or [0.9, error]
    store.put(
        job,
        {
            "train": [2.0, 1.0],
            "validation": [[(i + 1) * every, loss, value] for i, value in enumerate(errors)],
            "finished": math.isfinite(error),
            "seconds": 1.0,
            "parameters": 10,
        },
    )


# Step sizes


def test_the_grid_is_six_three_one_times_powers_of_ten():
    assert training.grid(1e-3, 7) == (1e-3, 3e-3, 6e-3, 1e-2, 3e-2, 6e-2, 1e-1)
    assert training.grid(0.6, 4) == (0.6, 1.0, 3.0, 6.0)
    every = [training.rate(i) for i in range(-30, 13)]
    assert every == [float(f"{digit}e{power}") for power in range(-10, 5) for digit in (1, 3, 6)][: len(every)]
    assert [training.index_of(lr) for lr in every] == list(range(-30, 13))
    with pytest.raises(ValueError, match=r"0\.002"):
        training.index_of(0.002)


def test_every_grid_of_the_experiments_begins_on_it_and_has_as_many_points():
    for study in (ablation.STUDY, four_ways.STUDY):
        for problem in study.problems:
            signed, other = (training.grid(first, problem.points) for first in problem.first_rates)
            assert len(signed) == len(other) == problem.points
            assert problem.seeds >= 10 > problem.search_seeds
            assert problem.seeds <= training.SEARCH_SEED


def test_the_search_waits_for_all_and_goes_on_beyond_an_edge(store):
    first = training.search(store, PLUS)
    assert [job.lr for job in first.jobs] == [1e-3, 1e-3, 3e-3, 3e-3, 6e-3, 6e-3] and first.best is None
    assert {job.seed for job in first.jobs} == {1000, 1001}
    for job in first.jobs[:-1]:
        pretend(store, job, {1e-3: 0.3, 3e-3: 0.2, 6e-3: 0.1}[job.lr])
    assert training.search(store, PLUS).best is None
    pretend(store, first.jobs[-1], 0.1)
    second = training.search(store, PLUS)
    assert {job.lr for job in second.jobs} - {job.lr for job in first.jobs} == {1e-2} and second.best is None
    for job in second.jobs[-2:]:
        pretend(store, job, 0.15)
    assert training.search(store, PLUS).best == 6e-3


def test_the_search_ends_at_its_limit(store):
    errors = {1e-3: 0.3, 3e-3: 0.2, 6e-3: 0.1, 1e-2: 0.09, 3e-2: 0.08}
    for lr, error in errors.items():
        for seed in (1000, 1001):
            pretend(store, Job(store.problem, PLUS, lr, seed), error)
    found = training.search(store, PLUS)
    assert found.best == 3e-2 and len(found.jobs) == 10


def test_the_search_averages_its_seeds_and_a_diverged_run_loses(store):
    errors = {1e-3: (0.1, 0.31), 3e-3: (0.2, 0.2), 6e-3: (0.01, math.inf)}
    for lr, pair in errors.items():
        for seed, error in zip((1000, 1001), pair, strict=True):
            pretend(store, Job(store.problem, PLUS, lr, seed), error)
    found = training.search(store, PLUS)
    assert found.best == 3e-3
    assert found.scores[1e-3][0] == pytest.approx(0.205) and found.scores[6e-3] == (math.inf, math.inf)


def test_equal_errors_are_told_apart_by_the_loss(store):
    for lr, loss in {1e-3: 1.0, 3e-3: 0.5, 6e-3: 0.7}.items():
        for seed in (1000, 1001):
            pretend(store, Job(store.problem, PLUS, lr, seed), 0.1, loss)
    assert training.search(store, PLUS).best == 3e-3


# Measures


def test_steps_to_a_tolerance():
    run = {"validation": [[10, 1.0, 0.5], [20, 1.0, 0.05], [30, 1.0, 0.2]]}
    assert training.steps_to(run, 0.5) == 10
    assert training.steps_to(run, 0.2) == training.steps_to(run, 0.05) == 20
    assert training.steps_to(run, 0.049) == math.inf
    assert training.best_error(run) == 0.05


def test_median_interval():
    # 2 P(Binomial(10, 1/2) < 2) = 22 / 1024, and 112 / 1024 with 3 is more than 5 %: the second and the ninth.
    got = training.median_interval([3.0, 1.0, 2.0, 5.0, 4.0, 6.0, 7.0, 10.0, 9.0, 8.0])
    assert got == {"n": 10, "reached": 10, "median": 5.5, "low": 2.0, "high": 9.0}
    # Six never get there: the median is not known to be finite, its lower end is.
    got = training.median_interval([1.0, 2.0, 3.0, 4.0, *[math.inf] * 6])
    assert got == {"n": 10, "reached": 4, "median": None, "low": 2.0, "high": None}
    # With five values even the smallest and the largest enclose the median in 30 / 32 only.
    assert training.median_interval([1.0, 2.0, 3.0, 4.0, 5.0])["low"] is None
    assert training.median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])["low"] == 1.0


def test_a_difference_is_judged_by_its_interval():
    ours, theirs = {0: 1.0, 1: 2.0, 2: 3.0}, {0: 2.0, 1: 3.1, 2: 3.9}
    got = training.difference(ours, theirs)
    assert got["mean"] == pytest.approx(-1.0) and training.verdict(got) == "lower"
    assert training.verdict(training.difference(theirs, ours)) == "higher"
    assert training.verdict(training.difference(ours, ours)) == "open"
    assert training.difference({0: math.inf}, theirs) is None and training.verdict(None) == "open"


def curves(**levels):
    """Constant curves, ten seeds each, that differ by seed as little as one likes: not at all."""
    return torch.tensor([[[levels[key]] * 5] * 10 for key in four_ways.KEYS])


def test_clusters_by_sign_are_found():
    got = four_ways.clusters(curves(adam=0.0, m_ssd=0.0, m_sgd=1.0, m_svag=1.0), draws=50)
    assert got["gaps"]["by sign"] == pytest.approx({"mean": 1.0, "low": 1.0, "high": 1.0, "largest_in": 1.0})
    assert got["gaps"]["crosswise"]["mean"] == got["gaps"]["by variance adaptation"]["mean"] == pytest.approx(-0.5)
    assert got["by_sign"] is True and got["nearest"] == "by sign"
    assert got["distances"]["adam, m_ssd"] == 0 and got["distances"]["m_sgd, adam"] == 1


def test_other_clusters_are_not_taken_for_those_by_sign():
    got = four_ways.clusters(curves(adam=0.0, m_svag=0.0, m_sgd=1.0, m_ssd=1.0), draws=50)
    assert got["by_sign"] is False and got["nearest"] == "by variance adaptation"
    # One outlier is far from all: no pairs at all.
    got = four_ways.clusters(curves(adam=0.0, m_svag=0.0, m_sgd=0.0, m_ssd=3.0), draws=50)
    assert got["by_sign"] is False and got["gaps"]["by sign"]["mean"] == 0


def test_clusters_that_hang_on_one_seed_are_not_found():
    lines = curves(adam=0.0, m_ssd=0.0, m_sgd=0.0, m_svag=0.0)
    lines[four_ways.KEYS.index("m_sgd"), 0] = lines[four_ways.KEYS.index("m_svag"), 0] = 1.0
    got = four_ways.clusters(lines, draws=400)
    assert got["gaps"]["by sign"]["mean"] == pytest.approx(0.1) and got["gaps"]["by sign"]["low"] == 0
    assert got["by_sign"] is False


def test_the_gaps_of_the_three_ways_sum_to_nothing():
    generator = torch.Generator().manual_seed(1)
    between = torch.rand(7, 6, generator=generator).double()
    torch.testing.assert_close(four_ways.gaps(between).sum(-1), torch.zeros(7).double())


def test_half_of_a_ratio():
    assert lemma.half_at([0.01, 0.1, 1.0, 10.0], [1.0, 0.75, 0.25, 0.0]) == pytest.approx(-0.5)
    assert lemma.half_at([0.1, 1.0], [1.0, 0.9]) is None


def test_look_is_the_norm_of_what_the_gate_leaves():
    task = training.Text(training.quick(training.GPT_TEXT).spec, training.load_data("text"), 0)
    with torch.no_grad():
        for p in task.model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    got = lemma.look(task)
    sums = {"right": [], "wrong": []}
    for loss, right in task.samples():
        g = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(task.model.parameters()))]).double()
        scale = g.square().mean().sqrt()
        sums["right" if right else "wrong"].append(
            [
                [(g[g.abs() > alpha].norm() / g.norm()).item() for alpha in lemma.ABSOLUTE],
                [(g[g.abs() > alpha * scale].norm() / g.norm()).item() for alpha in lemma.RELATIVE],
            ]
        )
    assert sums["wrong"]
    for kind, found in sums.items():
        for i, unit in enumerate(("absolute", "relative") if found else ()):
            expected = [sum(column) / len(found) for column in zip(*(one[i] for one in found), strict=True)]
            assert got[kind][unit] == pytest.approx(expected, abs=2e-3)


# What trains


def test_magnitude_behind_the_gate():
    p = torch.tensor([1.0, 2.0, 3.0]).requires_grad_()
    optimizer = training.GatedMomentum([p], lr=1.0, beta=0.5, alpha=0.25)
    for gradient in ([1.0, 0.25, -0.5], [0.0, 0.5, 0.125]):
        p.grad = torch.tensor(gradient)
        optimizer.step()
    # m: 0.5, 0, -0.25; then 0.25, 0.25, -0.125.
    assert p.tolist() == [1 - 0.5 - 0.25, 2 - 0.25, 3 + 0.25 + 0.125]


def test_without_a_gate_it_is_the_packages():
    parameters = [torch.linspace(-1, 1, 5).requires_grad_() for _ in range(2)]
    optimizers = [training.GatedMomentum(parameters[:1], 0.1), signadam_ext.MSGD(parameters[1:], 0.1, beta=0.9)]
    for step in range(3):
        for p, optimizer in zip(parameters, optimizers, strict=True):
            p.grad = torch.linspace(-2, 1, 5) * (step + 1)
            optimizer.step()
    torch.testing.assert_close(*parameters)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.5},
        {"confidence": "adaptive", "alpha": 1.0},
        {"confidence": "adaptive", "alpha": 0.25},
        {"confidence": "adaptive_delayed", "alpha": 1.0},
        {"confidence": "sparsity", "target": 0.1},
    ],
)
def test_the_share_gated_is_that_of_the_weights_that_stay(options):
    if Method("", "", "SignAdamPP", options).made_by is None:
        pytest.skip("this build has no such confidence")
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(200, generator=generator).requires_grad_()
    optimizer = signadam_ext.SignAdamPP([p], lr=0.1, beta=0.0, **options)
    measure = training.Measure(optimizer, {"p": p})
    stayed = []
    for _ in range(4):
        before = p.detach().clone()
        p.grad = torch.randn(200, generator=generator)
        p.grad[:20] = 0
        optimizer.step()
        measure.step()
        stayed.append((p.detach() == before).float().mean().item())
    measure.flush()
    assert measure.gated["p"] == [pytest.approx(sum(stayed) / 4)]
    assert measure.zero["p"] == [pytest.approx(0.1)]
    assert measure.max_m == [1.0]


def test_the_schedule():
    problem = ablation.PROBLEMS[1]
    assert problem.steps == 400 and problem.factor(0) == problem.factor(199) == 1
    assert problem.factor(200) == problem.factor(333) == 0.1 and problem.factor(334) == 0.01
    assert four_ways.PROBLEMS[0].factor(10**6) == 1 and four_ways.PROBLEMS[1].factor(250) == 0.1


@pytest.mark.parametrize("base", [training.DIGITS, training.LSTM_TEXT, training.GPT_TEXT])
def test_methods_share_weights_and_batches_and_a_run_repeats(base):
    problem = training.quick(base)
    runs = [training.train(Job(problem, method, 1e-3, 3)) for method in (PLUS, four_ways.METHODS[0], PLUS)]
    assert runs[0]["train"][0] != runs[1]["train"][0]  # of two steps
    one = replace(problem, evaluations=problem.steps)
    first = [training.train(Job(one, method, 1e-3, 3))["train"][0] for method in four_ways.METHODS]
    assert len(set(first)) == 1
    assert {**runs[0], "seconds": 0} == {**runs[2], "seconds": 0}
    assert len(runs[0]["validation"]) == problem.evaluations and runs[0]["finished"]


def test_a_diverged_run_is_told():
    assert not training.train(Job(training.quick(training.GPT_TEXT), four_ways.METHODS[0], 1e30, 0))["finished"]


# Which runs


def test_the_eight_cells_differ_in_one_part_from_three_others():
    assert len(ablation.CELLS) == 8 and len({method.key for method in ablation.METHODS}) == len(ablation.METHODS)
    for ours, theirs in itertools.combinations(ablation.CELLS, 2):
        assert ablation.CELLS[ours].key != ablation.CELLS[theirs].key
    assert ablation.PAPER.optimizer == "SignAdamPP" and ablation.PAPER.options == {"alpha": 5e-4}
    assert ablation.RELEASED.optimizer == "SignSGD" and ablation.RELEASED.options == {"alpha": 5e-4}


def test_the_adaptive_thresholds_other_forms_differ_from_it_in_one_thing():
    for alpha, adaptive in ablation.ADAPTIVE.items():
        delayed, decayed = ablation.DELAYED[alpha], ablation.DECAYED[alpha]
        assert delayed.options == adaptive.options | {"confidence": "adaptive_delayed"}
        assert decayed.options == adaptive.options | {"weight_decay": 0.1}
        p = torch.zeros(1, requires_grad=True)
        (group,) = decayed.made_by([p], lr=0.1, **decayed.options).param_groups
        assert group["decoupled_weight_decay"] and group["weight_decay_kind"] is None
    for method, other in zip(ablation.rivals("decayed"), ablation.rivals("adaptive"), strict=True):
        assert method.options == other.options | {"weight_decay": 0.1}


def test_effects_are_paired_and_main_effects_average_the_four_pairs(store):
    # The sign is worth 0.1, and 0.2 more behind a gate; nothing else matters.
    for (sign, gate, _), method in ablation.CELLS.items():
        for job in training.search(store, method).jobs:
            pretend(store, job, 0.1 if job.lr in (3e-3, 3e-1) else 0.5)
        for job in training.finals(store, method, training.search(store, method).best):
            pretend(store, job, 0.6 + 0.01 * job.seed - 0.1 * sign - 0.2 * (sign and gate))
    got = ablation.effects(store)
    assert got["sign"]["best_error"]["main"]["mean"] == pytest.approx(-0.2)
    assert got["sign"]["best_error"]["no gate, momentum"]["mean"] == pytest.approx(-0.1)
    assert got["gate"]["best_error"]["sign, no momentum"]["mean"] == pytest.approx(-0.2)
    assert got["gate"]["best_error"]["main"]["mean"] == pytest.approx(-0.1)
    assert got["momentum"]["best_error"]["main"]["mean"] == pytest.approx(0.0, abs=1e-12)


def test_an_interrupted_store_goes_on_without_running_anything_again(tmp_path):
    problem = training.quick(four_ways.PROBLEMS[0])
    made = []

    def train(job, limit):
        if len(made) == limit:
            raise KeyboardInterrupt
        made.append(job.name)
        return training.train(job)

    def work(limit):
        store = kept.Store(tmp_path, problem)
        store.folder.mkdir(exist_ok=True)
        kept.work(lambda: four_ways.plan([store]).ready, lambda job: train(job, limit))
        return store

    with pytest.raises(KeyboardInterrupt):
        work(limit=5)
    assert len(made) == 5 == len(list((tmp_path / problem.name).glob("*.json")))
    store = work(limit=-1)
    ready = four_ways.plan([store]).ready
    assert sorted(made) == sorted(job.name for _, job in ready) and len(set(made)) == len(made)
    assert len(made) == 4 * (2 + 2)
    work(limit=len(made))
    # Another configuration is another run.
    other = kept.Store(tmp_path, replace(problem, spec=problem.spec | {"steps": 6}))
    assert other.get(replace(ready[0][1], problem=other.problem)) is None


def test_results_are_written_drawn_and_told(tmp_path):
    stores = four_ways.STUDY.stores(tmp_path / "runs", True)
    assert kept.work(lambda: four_ways.plan(stores).ready, training.train) == 0
    for store in stores:
        assert training.finished(store, four_ways.METHODS[0]) is not None
    arguments = ["--quick", "--collect", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert training.main("four_ways", None, arguments) == 0
    result = json.loads((tmp_path / "results" / "four_ways.json").read_text(encoding="utf-8"))
    assert result["problems"]["four_ways_gpt"]["runs"] == 4 * (2 + 2)
    assert (tmp_path / "results" / "four_ways.png").read_bytes().startswith(b"\x89PNG")
    section = four_ways.section(result)
    assert "![" in section and "results/four_ways.png" in section


def test_results_of_unknown_code_are_not_kept(tmp_path, monkeypatch):
    stores = four_ways.STUDY.stores(tmp_path / "runs", True)
    assert kept.work(lambda: four_ways.plan(stores).ready, training.train) == 0
    monkeypatch.setattr(training, "RESULTS", tmp_path / "results")
    arguments = ["--quick", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    # Before anything is run ...
    facts = kept.environment() | {"commit": "0123456789ab+changes"}
    monkeypatch.setattr(kept, "environment", lambda: facts)
    with pytest.raises(machine.NotCommitted, match=r"\+changes"):
        training.main("four_ways", None, arguments)
    # ... and before runs that were made elsewhere are written down.
    for store in stores:
        for path in store.folder.glob("*.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"environment": facts}))
    with pytest.raises(machine.NotCommitted, match=r"\+changes"):
        training.main("four_ways", None, [*arguments, "--collect"])
    assert not (tmp_path / "results").exists()


def test_the_cost_names_the_modules_that_made_the_runs():
    problem = {"runs": 2, "core_minutes": 1.5}
    result = {
        "problems": {
            "a": problem | {"made": [["b" * 12, "2026-01-02"], ["a" * 12, "2026-01-03"]]},
            "b": problem | {"made": [["a" * 12, "2026-01-01"]]},
        },
        "machine": {"cpu": "a processor"},
        "versions": {"torch": "2.13.0"},
        "command": "python -m experiments.a",
    }
    assert training.cost(result) == (
        "4 runs, 3 core-minutes; a processor, torch 2.13.0, module of commit aaaaaaaaaaaa, bbbbbbbbbbbb, "
        "2026-01-01 to 2026-01-03: `python -m experiments.a`"
    )
