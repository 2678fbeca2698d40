"""The search for a recipe: what its plan says, which runs it asks for, who goes on, and what is made of it."""

import itertools
import json
import math
import re
from dataclasses import fields, replace

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from experiments import common, page
from experiments.convergence import training
from experiments.convergence.search import RATES, climb, neighbours
from experiments.convergence.training import Job
from experiments.recipe import halving, program, proof, proof_summary, summary
from experiments.recipe.candidates import ADAMW, CAUTION, CAUTIOUS, RMS, RULES, Candidate, together
from experiments.recipe.halving import DESIGN, Halving, quick
from experiments.recipe.proof import BITS, FRESH, LARGER, TEXT, Proof
from experiments.recipe.stage import agrees
from reporting import machine, runs
from reporting.problems import lr_factor

SMALL = quick()


@pytest.fixture(autouse=True)
def of_a_text(monkeypatch):
    data = torch.frombuffer(bytearray(bytes(range(32, 127)) * 40), dtype=torch.uint8)
    for module in (training, halving, proof):
        monkeypatch.setattr(module, "digest", lambda name: "of a text")
    monkeypatch.setattr(training, "load_data", lambda name: data)


#: By candidate; others are at 2. Where a rule is best, and so at which rate.
LOSSES = {"adamw": 1.0, "signum": 1.4, "bcos": 1.5, "adam_s": 1.6, "lion": 1.7, "ano": 0.5}


def pretend(store, job, loss):
    content = {
        "train": [3.0] * 2,
        "validation": [[job.problem.steps, loss]],
        "finished": math.isfinite(loss),
        "seconds": 6.0,
        "parameters": 10,
        "state_bytes": 40,
    }
    store.put(job, content)


def loss_of(job, gains=None):
    """Lowest at 1e-3, by the rule, what its changes gain, and the seed."""
    rule, *changes = job.method.key.partition("@")[0].split("+")
    gained = sum((gains or {}).get(change, -0.01) for change in changes)
    return LOSSES.get(rule, 2.0) - gained + 0.1 * abs(math.log(job.lr / 1e-3)) + 0.001 * (job.seed - 1000)


def run_all(search, loss=loss_of, most=10**6):
    """Pretend to run whatever is asked for until nothing is missing, or so many; the jobs in that order."""
    done = []
    while todo := missing(search, 10**6 if most == 10**6 else 1)[: most - len(done)]:
        for store, job in todo:
            pretend(store, job, loss(job))
            done.append(job)
    return done


def missing(search, most):
    ready = ((store, job) for store, job in search.ready() if store.get(job) is None)
    return list(itertools.islice(ready, most))


def keys(candidates):
    return [candidate.key for candidate in candidates]


# The plan


def test_the_plan_names_everything_and_is_compared_with_the_program():
    said = {"design": json.loads(json.dumps(DESIGN.describe()))}
    assert agrees(said, DESIGN)
    assert said["design"]["rungs"] == {"300_steps": 300, "700_steps": 700, "2000_steps": 2000}
    assert set(said["design"]["candidates"]) == {rule.key for rule in RULES}
    for changed in (
        replace(DESIGN, kept=(6, 3)),
        replace(DESIGN, seeds=(0, 1)),
        replace(DESIGN, minutes=1),
        replace(DESIGN, rules=(*DESIGN.rules[:-1], replace(DESIGN.rules[-1], lr=1e-3))),
        replace(DESIGN, rungs=tuple(replace(rung, spec=rung.spec | {"clip": 2.0}) for rung in DESIGN.rungs)),
    ):
        assert not agrees(said, changed)


def test_what_is_expected_is_counted():
    # Eleven rules and five changes of four of them; AdamW, five and two together; AdamW and three. Five runs each.
    counts = {name: count for name, (_, count) in DESIGN.expected().items()}
    assert counts == {"300_steps": 5 * (11 + 20), "700_steps": 5 * 8, "2000_steps": 5 * 4}
    assert [problem.steps for problem, _ in DESIGN.expected().values()] == [300, 700, 2000]


def test_nothing_runs_without_a_plan_or_against_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "supervise", lambda *arguments: pytest.fail("ran"))
    where = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    with pytest.raises(SystemExit):
        program.main(where)
    assert "there is no plan" in capsys.readouterr().err
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "plan.json").write_text(json.dumps({"design": replace(DESIGN, minutes=1).describe()}))
    with pytest.raises(SystemExit):
        program.main(where)
    assert "says something else" in capsys.readouterr().err


def test_stage_1_is_collected_where_stage_2_has_no_plan(tmp_path, monkeypatch, capsys):
    runs_, results = tmp_path / "runs", tmp_path / "recipe"
    monkeypatch.setattr(program, "DESIGN", SMALL)
    run_all(Halving(runs_, SMALL))
    results.mkdir()
    facts = {"timed": {"steps": 1, "seconds_per_step": [0.1]}, "expected": {"minutes": 1.0}, "date": "2026-11-28"}
    (results / "plan.json").write_text(json.dumps({"design": SMALL.describe(), **facts}))
    assert program.main(["--runs", str(runs_), "--results", str(results)]) == 0
    assert "stage 2 waits for its plan" in capsys.readouterr().out
    assert "and it is finished" in (results / "stage1.md").read_text() and not (results / "stage2.md").exists()


def test_the_committed_plan_is_the_programs(monkeypatch):
    path = program.RESULTS / "plan.json"
    if not path.exists():
        pytest.skip("the source distribution holds no results")
    said = json.loads(path.read_text())
    data = said["design"]["problem"]["data_sha256"]  # of the standard library where it was made
    monkeypatch.setattr(halving, "digest", lambda name: data)
    assert agrees(said, DESIGN) and said["expected"]["minutes"] < DESIGN.minutes


# Candidates


def test_every_rule_takes_every_change_of_each_kind_together():
    for rule in RULES:
        if rule.made_by is None:
            continue
        kinds = {change.kind: [None] for change in rule.changes}
        for change in rule.changes:
            kinds[change.kind].append(change)
        for chosen in itertools.product(*kinds.values()):
            candidate = together(rule, [change for change in chosen if change is not None])
            assert len(candidate.changes) == sum(change is not None for change in chosen)
            param = torch.ones(2, 2, requires_grad=True)
            optimizer = candidate.method.optimizer([param], lr=1e-3, weight_decay=0.1, **candidate.options)
            param.square().sum().backward()
            optimizer.step()
            assert torch.isfinite(param).all()


def test_of_changes_of_one_kind_the_first_is_taken():
    rule = next(rule for rule in RULES if rule.key == "signum")
    assert together(rule, [RMS, CAUTIOUS, CAUTION]).key == "signum+cautious_decay+rms"
    assert together(rule, [CAUTION, RMS]).options == {"caution": "delayed"}


def test_the_cosine_ends_at_a_tenth():
    assert lr_factor(299, 300, 0.1) == pytest.approx(0.1, abs=1e-4)
    assert [lr_factor(step, 300) for step in (0, 30)] == [lr_factor(step, 300, 0.1) for step in (0, 30)] == [1 / 30, 1]
    assert lr_factor(165, 300, 0.1) == pytest.approx(0.55)


def test_the_schedule_of_a_run_ends_at_a_tenth(monkeypatch):
    rates = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: rates.append(self.param_groups[0]["lr"]))
    rule = next(rule for rule in SMALL.rules if rule.key == ADAMW)
    training.train(Job(SMALL.rungs[-1], Candidate(rule).method, 1.0, 0))
    assert rates == [lr_factor(step, 6, 0.1) for step in range(6)]


# Which runs


@pytest.mark.parametrize("best", [2e-5, 6e-4, 1e-3, 3e-2])
def test_a_grid_goes_on_until_its_best_rate_has_both_neighbours(best):
    losses = {}
    while True:
        rates, found, chosen = climb((1e-3,), losses.get)
        if chosen is not None:
            break
        (missing, *_) = [lr for lr in rates if lr not in losses]
        losses[missing] = abs(math.log(missing / best))
    assert chosen == best and set(neighbours(best)) < set(found)
    assert len(rates) == len(set(rates)) <= abs(RATES.index(best) - RATES.index(1e-3)) + 3


def test_a_grid_without_a_lowest_rate_ends_at_the_edge_of_all():
    rates, found, chosen = climb((1e-3,), lambda lr: lr)
    assert chosen is None and len(found) == len(rates) and min(rates) == RATES[0]


def test_the_second_seed_runs_at_the_best_rate_alone(tmp_path):
    search = Halving(tmp_path, DESIGN)
    order = run_all(search, most=6)
    assert [(job.method.key, job.lr, job.seed) for job in order] == [
        ("adamw", 2e-3, 1000),
        ("adamw", 1e-3, 1000),
        ("adamw", 3e-3, 1000),
        ("adamw", 6e-4, 1000),
        ("adamw", 1e-3, 1001),
        ("sign_adam_pp", 2e-3, 1000),
    ]
    found = search.outcome(search.rules()[0], 0)
    assert found.lr == 1e-3 and found.mean == pytest.approx(1.0005) and set(found.search) == {6e-4, 1e-3, 2e-3, 3e-3}


def test_the_best_go_on_and_companions_do_not(tmp_path):
    search = Halving(tmp_path, DESIGN)
    # RMS gains most, and longer betas lose.
    gains = {"rms": 0.3, "caution": 0.25, "cautious_decay": 0.12}
    order = run_all(search, lambda job: loss_of(job, gains))
    assert [search.finished(at) for at in range(3)] == [True] * 3
    changed = keys(search.changes())
    assert {key.split("+")[0] for key in changed} == {"signum", "bcos", "adam_s", "lion"} and len(changed) == 20
    assert keys(search.together()) == ["signum+cautious_decay+rms", "bcos+cautious_decay+rms"]
    # Not more than two of a rule: Signum's third, at 1.28, is better than the best of AdamS, at 1.3.
    assert keys(search.entrants(1)) == [
        "adamw", "signum+rms", "signum+caution", "bcos+rms", "bcos+caution", "adam_s+rms",
        "signum+cautious_decay+rms", "bcos+cautious_decay+rms",
    ]  # fmt: skip
    assert keys(search.entrants(2)) == [
        "adamw", "signum+cautious_decay+rms", "bcos+cautious_decay+rms", "signum+rms",
    ]  # fmt: skip
    # Ano's loss is the lowest of all: it is in the first rung, as it is, and nowhere else.
    assert {job.method.key for job in order if "ano" in job.method.key} == {"ano"}
    assert {job.problem.steps for job in order if job.method.key == "ano"} == {300}
    assert search.progress() == (len(order), len(order))


def test_a_rung_begins_at_the_rates_of_the_one_before(tmp_path):
    search = Halving(tmp_path, DESIGN)
    signum = next(candidate for candidate in search.rules() if candidate.key == "signum")
    rms = Candidate(signum.rule, (RMS,))
    assert search.first_rate(signum, 0) == 6e-4 and search.first_rate(rms, 0) is None
    run_all(search, lambda job: loss_of(job, {"rms": 0.3, "cautious_decay": 0.1}))
    assert search.first_rate(rms, 0) == 1e-2
    assert search.first_rate(signum, 1) == search.first_rate(rms, 1) == 1e-3
    assert search.first_rate(together(signum.rule, [RMS, CAUTIOUS]), 1) == search.search(rms, 0)[1] == 1e-3


def test_changes_that_helped_one_seed_alone_are_not_put_together(tmp_path):
    search = Halving(tmp_path, DESIGN)

    def loss(job):
        lucky = job.method.key in ("signum+rms", "signum+caution", "bcos+rms", "bcos+caution") and job.seed == 1000
        return loss_of(job, {"cautious_decay": 0.1}) - 0.3 * lucky

    run_all(search, loss)
    assert search.together() == []
    assert len(search.entrants(1)) == 6


def test_a_rule_that_diverges_is_left_behind(tmp_path):
    search = Halving(tmp_path, SMALL)
    run_all(search, lambda job: math.inf if job.method.key.startswith("bcos") else loss_of(job))
    assert all(search.finished(at) for at in range(3))
    assert {candidate.rule.key for candidate in search.entrants(1)} == {"adamw", "sign_adam_pp"}
    described = summary.summarize(search)["2_steps"]["candidates"]["bcos"]
    assert described["lr"] is None and described["mean"] == math.inf


def test_a_spent_budget_begins_nothing_more(tmp_path):
    # Six seconds a run.
    search = Halving(tmp_path, replace(DESIGN, minutes=0.75))
    assert len(run_all(search, most=50)) == 8
    assert search.progress()[0] == 8


# The proof


def proving(folder, minutes=None):
    """Stage 2 after a stage 1 that Signum, BCOS and AdamS came best from, and what it was before that."""
    search = Halving(folder, DESIGN)
    assert search.best(3) is None and proof.design_after(search) is None
    run_all(search)
    design = proof.design_after(search)
    return Proof(folder, design if minutes is None else replace(design, minutes=minutes))


def test_the_best_three_are_proved_with_fresh_seeds_at_their_rates(tmp_path):
    stage = proving(tmp_path)
    assert [each.key.split("+")[0] for each in stage.design.contenders] == ["adamw", "signum", "signum", "bcos"]
    assert {each.lr for each in stage.design.contenders} == {1e-3}
    assert stage.design.confidence == pytest.approx(1 - 0.05 / 3)
    # Until the fresh seeds are there, nobody knows who is best; the larger model needs nobody to be.
    assert stage.contenders(BITS) == stage.contenders(TEXT) == [] and len(stage.contenders(LARGER)) == 4
    assert stage.progress() == (0, 4 * 10 + 4 * 5 + 2 * 3 + 4 * (2 + 3))
    first = missing(stage, 4)
    assert [(job.seed, job.problem.name) for _, job in first] == [(2000, FRESH)] * 4
    assert not {2000 + i for i in range(10)} & set(DESIGN.seeds)


def test_the_best_goes_on_in_the_forms_that_its_moment_takes(tmp_path):
    stage = proving(tmp_path)
    order = run_all(stage, lambda job: loss_of(job, {"cautious_decay": 0.4}))
    best = stage.best()
    assert stage.over() and best == min(stage.design.contenders[1:], key=lambda each: stage.mean(FRESH, each))
    # Signum's moment has no bound: int8 in blocks, and no fewer bits.
    assert best.candidate.rule.key == "signum" and [each.form for each in stage.contenders(BITS)] == ["bf16", "int8"]
    assert [each.exists for each in stage.formed(best)] == [True, True, False, False]
    assert stage.progress() == (len(order), len(order))
    formed = stage.contenders(BITS)[1].method
    assert formed.bf16 and formed.stored and formed.options["param_storage"] == "stochastic"
    assert {job.problem.data for job in order if job.problem.name == TEXT} == {"manuals"}


def test_a_larger_model_takes_the_rate_of_stage_1_or_the_next_below(tmp_path):
    stage = proving(tmp_path / "runs")
    lower = {"signum": 1.0, "bcos": -1.0}  # by how much 6e-4 is worse

    def loss(job):
        worse = lower.get(job.method.key.split("+")[0], 1.0) if job.problem.name == LARGER and job.lr == 6e-4 else 0
        return loss_of(job) + worse

    order = [job for job in run_all(stage, loss) if job.problem.name == LARGER]
    assert {job.lr for job in order if job.seed == 1000} == {1e-3, 6e-4}
    rates = {each.candidate.rule.key: stage.search(LARGER, each)[1] for each in stage.design.contenders}
    assert rates == {"adamw": 1e-3, "signum": 1e-3, "bcos": 6e-4}
    assert {(job.method.key.split("+")[0], job.lr) for job in order if job.seed != 1000} == set(rates.items())
    assert set(stage.losses(LARGER, stage.reference)) == {2000, 2001, 2002}  # not that of the search
    text, _ = proved(stage, tmp_path / "results" / "recipe")
    assert text.count("At the lowest rate that was tried") == 1
    assert re.search(r"so that one below may be better: BCOS[^,]*\. ", text)


def test_the_plan_of_the_proof_is_compared_with_the_program(tmp_path):
    design = proving(tmp_path).design
    said = {"design": json.loads(json.dumps(design.describe()))}
    assert agrees(said, design)
    other = replace(design.contenders[1], lr=2e-3)
    parts = {**design.parts, FRESH: replace(design.parts[FRESH], seeds=(2000,))}
    for changed in (
        replace(design, contenders=(design.contenders[0], other)),
        replace(design, parts=parts),
        replace(design, forms=("int8",)),
        replace(design, margin=0.02),
        replace(design, minutes=1),
    ):
        assert not agrees(said, changed)


def test_the_proof_stops_when_its_budget_is_spent(tmp_path):
    assert len(run_all(proving(tmp_path, minutes=0.75), most=50)) == 8


@pytest.mark.parametrize(
    ("gap", "says"),
    [(-0.02, "With fresh seeds Signum"), (0.005, "With fresh seeds Signum"), (0.02, "Nothing matched AdamW")],
)
def test_who_matches_is_decided_by_the_whole_interval(tmp_path, gap, says):
    stage = proving(tmp_path / "runs")
    keys = {each.key: gap * (1 + i) for i, each in enumerate(stage.design.contenders[1:])}
    noise = {2000: 0.0003, 2001: -0.0003}
    run_all(
        stage, lambda job: 1.0 + keys.get(job.method.key.split("@")[0], 0) + noise.get(job.seed, 0) * (job.seed % 2)
    )
    text, content = proved(stage, tmp_path / "results" / "recipe")
    assert says in text and content["finished_runs"] == content["expected_runs"]
    first = content["parts"][FRESH]["contenders"][stage.design.contenders[1].key]
    assert first["minus_adamw"]["mean"] == pytest.approx(gap, abs=1e-6) and first["minus_adamw"]["n"] == 10
    assert content["parts"][BITS]["refused_forms"] and "Refused, as its moment has no bound" in text
    assert (tmp_path / "results" / "recipe" / "stage2.png").read_bytes().startswith(b"\x89PNG")
    assert proof_summary.page(proof_summary.read(tmp_path / "results")) == text


def test_few_bits_are_compared_with_the_same_seeds_of_fp32(tmp_path):
    stage = proving(tmp_path / "runs")
    run_all(stage, lambda job: loss_of(job) + 0.125 * ("@int8" in job.method.key) * (1 + (job.seed == 2004)))
    _, content = proved(stage, tmp_path / "results" / "recipe")
    entry = content["parts"][BITS]["contenders"][f"{stage.best().key}@int8"]
    assert entry["minus_fp32_by_seed"] == {str(seed): 0.125 for seed in range(2000, 2004)} | {"2004": 0.25}
    best = content["parts"][FRESH]["contenders"][stage.best().key]
    assert entry["minus_adamw"]["mean"] == pytest.approx(best["minus_adamw"]["mean"] + 0.15, abs=1e-5)


def test_a_page_of_a_proof_that_has_begun(tmp_path):
    stage = proving(tmp_path / "runs")
    run_all(stage, most=4)
    text, content = proved(stage, tmp_path / "results" / "recipe")
    assert "4 of about 86 runs are there" in text and text.count("Who is in it is not known") == 2
    assert "Not finished: fresh seeds, few bits, another text and a model four times as large." in text
    assert "matched" not in text.partition("## ")[0].partition("The candidates")[0] and content["best"] is None


def test_a_contender_that_diverges_is_not_taken_for_a_match(tmp_path):
    stage = proving(tmp_path / "runs")
    run_all(stage, lambda job: loss_of(job) if job.method.key == "adamw" else math.inf)
    text, _ = proved(stage, tmp_path / "results" / "recipe")
    assert "Every contender diverged" in text and "minus_adamw" not in text


def proved(stage, folder):
    plan = {
        "design": json.loads(json.dumps(stage.design.describe())),
        "timed": {"steps": 1, "seconds_per_step": [0.1]},
        "expected": {"minutes": 1.0},
        "date": "2026-11-28T00:00:00Z",
    }
    proof_summary.collect(stage, plan, folder, "python -m experiments.recipe")
    return (folder / "stage2.md").read_text(), json.loads((folder / "stage2.json").read_text())


# Resumption


def trained(folder, most=10**6):
    """Really run what is asked for; losses by rung and name."""
    rules = [rule for rule in SMALL.rules if rule.key in (ADAMW, "bcos")]
    small = tuple(replace(rule, changes=rule.changes[:1]) for rule in rules)
    search = Halving(folder, replace(SMALL, rules=small, rungs=SMALL.rungs[:2], kept=(1,)))
    for _ in range(most):
        for store, job in missing(search, 1):
            with common.one_thread():
                store.put(job, training.train(job))
            break
        else:
            break
    return {key: (run["train"], run["validation"]) for key, run in search.runs().items()}


def test_runs_that_were_stopped_go_on_to_the_same_ones(tmp_path):
    whole = trained(tmp_path / "whole")
    assert {steps for steps, _ in whole} == {"2_steps", "4_steps"}
    part = trained(tmp_path / "parts", most=len(whole) // 2)
    assert 0 < len(part) < len(whole)
    # One that was killed has left a lock, and the file of another is not whole.
    (tmp_path / "parts" / "2_steps" / "locks").mkdir(exist_ok=True)
    (tmp_path / "parts" / "2_steps" / "a.1.partial").write_text("{")
    assert trained(tmp_path / "parts") == whole


def test_a_run_is_not_taken_for_another(tmp_path):
    rule = next(rule for rule in SMALL.rules if rule.key == "bcos")
    problem = SMALL.rungs[0]
    job = Job(problem, Candidate(rule, (CAUTIOUS,)).method, 1e-3, 1000)
    store = runs.Store(tmp_path, problem)
    store.folder.mkdir()
    pretend(store, job, 2.0)
    assert runs.Store(tmp_path, problem).get(job) is not None
    other_rule = replace(rule, options={"eps": 1e-3})
    others = [
        *(replace(job, problem=replace(problem, spec=problem.spec | {key: 7})) for key in problem.spec),
        replace(job, problem=SMALL.rungs[1]),
        replace(job, method=Candidate(rule).method),
        replace(job, method=Candidate(rule, (CAUTION,)).method),
        replace(job, method=Candidate(other_rule, (CAUTIOUS,)).method),
        replace(job, lr=2e-3),
        replace(job, seed=1001),
    ]
    for other in others:
        assert runs.Store(tmp_path, other.problem).get(other) is None
        assert json.dumps(other.config, sort_keys=True) != json.dumps(job.config, sort_keys=True)
    assert {field.name for field in fields(Job)} == {"problem", "method", "lr", "seed"}
    stored = json.loads((store.folder / f"{job.name}.json").read_text())
    assert {"machine", "versions", "commit", "cpu_kernels"} == set(stored["environment"])
    assert stored["config"] == json.loads(json.dumps(job.config)) and stored["date"]


# What is made of it


def collected(search, folder):
    plan = {
        "design": json.loads(json.dumps(search.design.describe())),
        "timed": {"steps": 1, "seconds_per_step": 0.1},
        "expected": {"minutes": 1.0},
        "date": "2026-11-27T00:00:00Z",
    }
    summary.collect(search, plan, folder, "python -m experiments.recipe")
    return (folder / "stage1.md").read_text(), json.loads((folder / "stage1.json").read_text())


def test_the_page_says_that_it_is_a_search_and_how_far_it_came(tmp_path):
    search = Halving(tmp_path / "runs", DESIGN)
    run_all(search, most=12)
    text, content = collected(search, tmp_path / "results" / "recipe")
    assert "stage 1 of two, a search, and it is not finished" in text
    assert "12 of about 215 runs are there, 1.2 of at most 160 minutes" in text
    assert text.count("Who is in it is not known") == 2 and "proves nothing" in text
    assert content["rungs"]["300_steps"]["finished"] is False
    assert (tmp_path / "results" / "recipe" / "stage1.png").read_bytes().startswith(b"\x89PNG")
    assert summary.page(summary.read(tmp_path / "results")) == text


def test_differences_are_paired_by_seed(tmp_path):
    search = Halving(tmp_path / "runs", SMALL)
    run_all(search, lambda job: loss_of(job) - 0.02 * (job.method.key == "bcos" and job.seed == 1001))
    text, content = collected(search, tmp_path / "results" / "recipe")
    entry = content["rungs"]["2_steps"]["candidates"]["bcos"]
    assert entry["minus_adamw_by_seed"] == {"1000": 0.5, "1001": 0.48}
    assert entry["minus_adamw"]["mean"] == 0.49
    # Two seeds: 12.706 * 0.01 to either side.
    assert "+0.4900 (+0.3629 .. +0.6171)" in text and "and it is finished" in text
    assert text.count(" rung, ") >= 3 and "Who is in it" not in text


def test_experiments_page_writes_and_checks_it(tmp_path, monkeypatch, capsys):
    search = Halving(tmp_path / "runs", SMALL)
    run_all(search, most=20)
    collected(search, tmp_path / "results" / "recipe")
    (tmp_path / "README.md").write_text("of hand")
    arguments = ["--readme", str(tmp_path / "README.md"), "--results", str(tmp_path / "results")]
    monkeypatch.setattr(machine, "require_commits", lambda commits: None)
    assert page.main([*arguments, "--check"]) == 0
    written = tmp_path / "results" / "recipe" / "stage1.md"
    text = written.read_text()
    written.write_text(text.replace("search", "proof"))
    assert page.main([*arguments, "--check"]) == 1 and "stage1.md: stale" in capsys.readouterr().out
    assert page.main(arguments) == 0 and written.read_text() == text


def test_the_committed_page_is_what_the_results_say():
    content = summary.read(common.RESULTS)
    if content is None:
        pytest.skip("there are no results here")
    assert summary.page_of(common.RESULTS).read_text() == summary.page(content)
    assert "quick" not in content["command"]
