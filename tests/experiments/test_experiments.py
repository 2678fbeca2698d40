"""The pieces the experiments are made of, against values known otherwise, and their page against their results."""

import json
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from experiments import common, page, stochastic_qp, theorems, variance_factors, wilson
from reporting import machine, runs
from signadam_ext.optimizers.variance_adaptation import variance_share

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def one_thread():
    """As the experiments run; and matrices this small only wait for a second one."""
    with common.one_thread():
        yield


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# common


@pytest.mark.parametrize(
    ("degrees", "confidence", "expected"),
    # From printed tables; the first is tan(0.475 pi).
    [(1, 0.95, 12.7062), (2, 0.95, 4.3027), (9, 0.95, 2.2622), (19, 0.95, 2.0930), (39, 0.999, 3.5581)],
)
def test_student_t(degrees, confidence, expected):
    assert runs.student_t(degrees, confidence) == pytest.approx(expected, abs=5e-5)


def test_interval_and_bands_agree():
    # By hand: mean 2, standard deviation 1, so 4.3027 / sqrt(3) to either side.
    got = common.interval([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert (got["n"], got["mean"]) == (3, 2) and got["high"] - 2 == pytest.approx(half) == 2 - got["low"]
    band = common.bands(torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]))
    assert band["low"] == pytest.approx([2 - half, 5]) and band["high"] == pytest.approx([2 + half, 5])
    assert common.interval([4.0]) == {"n": 1, "mean": 4.0, "low": None, "high": None}


def test_rounded_keeps_five_digits_and_no_infinities():
    assert common.rounded({"a": [1.23456789, (math.inf,)], "n": 123456789, "b": True}) == {
        "a": [1.2346, [None]],
        "n": 123456789,
        "b": True,
    }


def test_claims_table_says_yes_no_and_in_part():
    claims = [common.Claim(key, "Sec. 1", f"It {key}.", "{x:.1f}") for key in ("holds", "fails", "partly")]
    table = common.claims_table(
        claims,
        {
            "holds": {"criterion": "c", "x": 1.0, "holds": True},
            "fails": {"criterion": "c", "x": 2.0, "holds": False, "holds_at": {"here": False}},
            "partly": {"criterion": "c", "x": 3.0, "holds": False, "holds_at": {"here": True, "there": False}},
        },
    )
    rows = table.splitlines()[2:]
    assert rows[0] == "| It holds. (Sec. 1) | c | 1.0 | yes |"
    assert rows[1].endswith("| 2.0 | **no** |") and rows[2].endswith("| 3.0 | **in part**: here |")


# Quadratic problems


def test_spectra_are_as_stated():
    mild = stochastic_qp.spectrum("mild", 100, generator())
    assert mild.min() >= 0.1 and mild.max() <= 1.1 and mild.min() < 0.15 and mild.max() > 1.05
    ill = stochastic_qp.spectrum("ill", 100, generator()).sort().values
    assert ill[0] >= 0 and ill[89] <= 1 and ill[90] >= 30 and ill[99] <= 60


def test_rotation_is_orthogonal_and_has_no_preferred_sign():
    basis = stochastic_qp.rotation(50, generator())
    assert torch.allclose(basis @ basis.T, torch.eye(50, dtype=DOUBLE), atol=1e-12)
    # Without the signs of R's diagonal, Householder's QR leaves the first entry negative far too often.
    first = torch.stack([stochastic_qp.rotation(3, generator(seed))[0, 0] for seed in range(200)])
    assert abs((first > 0).double().mean() - 0.5) < 0.15


def test_the_rotated_problem_is_the_aligned_one_turned():
    settings = stochastic_qp.Settings(seeds=2, dimension=12, steps=3)
    problems = stochastic_qp.make("ill", settings)
    aligned, rotated = problems["aligned"], problems["rotated"]
    assert torch.equal(aligned.q, torch.diag_embed(aligned.q.diagonal(dim1=1, dim2=2)))
    values = torch.linalg.eigvalsh(rotated.q)
    assert torch.allclose(values, aligned.q.diagonal(dim1=1, dim2=2).sort(dim=1).values, atol=1e-11)
    assert torch.allclose(rotated.loss(rotated.start), aligned.loss(aligned.start))
    assert torch.allclose(rotated.start.norm(dim=1), aligned.start.norm(dim=1))
    for nu in (0.1, 4.0):
        turned, straight = (stochastic_qp.descend("SGD", problem, nu, 3) for problem in (rotated, aligned))
        assert torch.allclose(turned, straight, atol=1e-10)


@pytest.mark.parametrize("r", [-0.9, 0.0, 0.5, 0.93])
def test_agreement_at_mean_zero_is_the_arcsine(r):
    correlation = torch.tensor([[1, r], [r, 1]], dtype=DOUBLE)
    got = stochastic_qp.agreement(torch.zeros(2, dtype=DOUBLE), correlation)
    assert got[0, 1].item() == pytest.approx(2 / math.pi * math.asin(r), abs=1e-12)
    assert got.diagonal().tolist() == [1, 1] and got[0, 1] == got[1, 0]


def test_agreement_of_independent_and_of_equal_normals():
    h = torch.tensor([0.3, -1.2], dtype=DOUBLE)
    sure = torch.erf(h / math.sqrt(2))
    independent = stochastic_qp.agreement(h, torch.eye(2, dtype=DOUBLE))
    assert independent[0, 1].item() == pytest.approx((sure[0] * sure[1]).item())
    # With correlation 1 the signs differ exactly when the common normal lies between the two thresholds.
    between = 0.5 * (sure[0] - sure[1])
    nearly = torch.tensor([[1, 1 - 1e-6], [1 - 1e-6, 1]], dtype=DOUBLE)
    assert stochastic_qp.agreement(h, nearly)[0, 1].item() == pytest.approx((1 - 2 * between).item(), abs=1e-4)


@pytest.mark.parametrize("method", ["SGD", "SVAG", "SSD", "ASSD"])
@pytest.mark.parametrize("orientation", stochastic_qp.ORIENTATIONS)
def test_the_step_is_optimal_in_expectation(method, orientation):
    """Against the mean over drawn noise of the loss after alpha times the direction: its derivative at alpha is 0."""
    settings = stochastic_qp.Settings(seeds=1, dimension=6, steps=1)
    problem = stochastic_qp.make("ill", settings)[orientation]
    draws = 50_000
    gradient = stochastic_qp.times(problem.q, problem.start)
    noise = torch.randn(draws, 6, dtype=DOUBLE, generator=generator(3))
    moved = stochastic_qp.step(method, problem, problem.qq, gradient, 1.5, noise)
    # d/ds of E loss(start + s * moved) at s = 1.
    slope = (moved * stochastic_qp.times(problem.q, problem.start + moved)).sum(dim=1)
    assert abs(slope.mean()) < 4 * slope.std() / math.sqrt(draws)
    gain = problem.loss(problem.start + moved).mean() - problem.loss(problem.start)
    assert gain < 0


def test_adapted_methods_are_their_bases_without_noise():
    settings = stochastic_qp.Settings(seeds=2, dimension=10, steps=20)
    for problem in stochastic_qp.make("mild", settings).values():
        for method, base in stochastic_qp.BASE.items():
            got, want = (stochastic_qp.descend(name, problem, 0.0, 20) for name in (method, base))
            assert torch.equal(got, want)


def test_a_farther_start_is_less_noise():
    settings = stochastic_qp.Settings(seeds=2, dimension=10, steps=5)
    problem = stochastic_qp.make("ill", settings)["rotated"]
    far = replace(problem, start=10 * problem.start)
    for method in stochastic_qp.METHODS:
        near = stochastic_qp.descend(method, problem, 0.4, 5)
        assert torch.allclose(stochastic_qp.descend(method, far, 4.0, 5), near + 2, atol=1e-9)


def test_diagonal_share_of_known_matrices():
    assert stochastic_qp.diagonal_share(torch.diag(torch.tensor([1.0, 5.0]))).item() == 1
    assert stochastic_qp.diagonal_share(torch.ones(4, 4)).item() == 0.25  # the least there is: 1 / d


# Factors


def test_closed_forms_at_known_points():
    factors = variance_factors
    assert factors.magnitude_factor(1) == 0.5 and factors.magnitude_factor(3) == 0.1
    # One, two and three standard deviations: 68.27, 95.45 and 99.73 percent.
    assert [factors.sign_factor(1 / k) for k in (1, 2, 3)] == pytest.approx([0.682689, 0.954500, 0.997300], abs=1e-6)
    assert factors.sign_factor(math.sqrt(2), "Laplace") == pytest.approx(1 - math.exp(-1))
    assert factors.sign_factor(0.5, "uniform") == 1
    assert factors.sign_factor(2 / math.sqrt(3), "uniform") == pytest.approx(0.5)
    assert factors.adam_factor(math.sqrt(3)) == pytest.approx(0.5)


@pytest.mark.parametrize("noise", variance_factors.NOISES)
def test_noise_is_standardised_and_its_sign_factor_right(noise):
    n = 400_000
    draws = variance_factors.draw_noise(noise, (n,), generator(1))
    assert abs(draws.mean()) < 5 / math.sqrt(n) and draws.var().item() == pytest.approx(1, abs=0.02)
    for eta in (0.4, 1.0, 3.0):
        got = (1 + eta * draws).sign().mean().item()
        assert got == pytest.approx(variance_factors.sign_factor(eta, noise), abs=5 / math.sqrt(n))


def test_least_squares_minimises():
    g = torch.tensor([0.5, 2.0, -1.0, 1.5], dtype=DOUBLE)
    best = variance_factors.least_squares(g)
    errors = [((gamma * g - 1) ** 2).mean() for gamma in (best - 1e-3, best, best + 1e-3)]
    assert errors[1] == min(errors)


def test_rho_is_the_packages_and_the_drafts():
    for beta in (0.5, 0.9, 0.999):
        for t in (1, 2, 7, 300):
            got = variance_factors.rho(beta, t)
            assert got == pytest.approx(variance_share(beta, t)) == pytest.approx(variance_factors.kappa(beta, t))
            weights = [(1 - beta) * beta**k / (1 - beta**t) for k in range(t)]
            assert got == pytest.approx(sum(w * w for w in weights))


def test_averages_of_two_gradients_by_hand():
    zero = torch.zeros(1, dtype=DOUBLE)
    averages = variance_factors.Averages(0.5, zero, zero)
    averages.add(torch.tensor([1.0], dtype=DOUBLE))
    averages.add(torch.tensor([4.0], dtype=DOUBLE))
    # Weights 1/3 and 2/3: m = 3, v = 11; rho = 5/9.
    m2, s = averages.squares()
    assert m2.item() == pytest.approx(9) and s.item() == pytest.approx(2 / (1 - 5 / 9))
    assert averages.squares(corrected=False)[1].item() == pytest.approx(2)


def test_worst_of_adams_approximation():
    found = variance_factors.approximation()
    # The difference is largest where both derivatives agree.
    eta = found["at_eta"]
    slope = -eta * (1 + eta * eta) ** -1.5 + math.sqrt(2 / math.pi) / eta**2 * math.exp(-0.5 / eta**2)
    assert abs(slope) < 1e-3 and found["largest_difference"] == pytest.approx(0.0644, abs=1e-4)
    assert found["largest_ratio"] == pytest.approx(found["limit_of_ratio"], rel=1e-4)


# Wilson's construction


@pytest.fixture(scope="module")
def tasks():
    return wilson.make(replace(wilson.FULL, seeds=3))


def test_samples_are_as_constructed(tasks):
    labels = torch.tensor([1.0, -1.0])
    assert wilson.features(labels).tolist() == [
        [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [-1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1],
    ]
    assert torch.equal(tasks.x[..., 0], tasks.y) and torch.equal(tasks.unseen[..., 0], tasks.labels)
    # No sample shares a feature but the first three with another, nor does an unseen one have any of the training's.
    own = torch.cat([tasks.x, tasks.unseen], dim=1)[..., 3:]
    assert own.count_nonzero(dim=1).max() == 1
    assert not tasks.x[..., tasks.seen :].any() and not tasks.unseen[..., 3 : tasks.seen].any()


def test_labels_prevail_as_the_construction_assumes(tasks):
    assert (tasks.y.sum(dim=1) > 0).all() and (tasks.y < 0).any(dim=1).all() and (tasks.labels < 0).any(dim=1).all()
    for k, share in enumerate(wilson.FULL.shares):
        assert (tasks.y[3 * k : 3 * k + 3] > 0).double().mean().item() == pytest.approx(share, abs=0.1)


def test_signs_lead_to_a_line_that_calls_all_unseen_positive(tasks):
    line = wilson.sign_line(tasks)
    assert torch.equal(wilson.predictions(tasks.x, line), 4 * tasks.y)  # the lemma's assumption, with c = 4
    assert torch.equal(wilson.predictions(tasks.unseen, line), tasks.labels + 2)
    found = wilson.measure(line / 4, tasks)
    assert not found["loss"].any() and not found["accuracy_negative"].any()
    assert torch.equal(found["accuracy"], found["share_positive"])


def test_least_norm_solution_is_the_closed_form(tasks):
    least = wilson.least_norm(tasks)
    assert torch.allclose(wilson.predictions(tasks.x, least), tasks.y, atol=1e-5)
    # X'a, with one value of a for each label; XX' = yy' + 2 + diag(1 or 5) makes two equations of it:
    # a (3 n + 1) + b k = 1 and a n + b (3 k + 5) = -1 for n positive and k negative samples.
    n, k = ((tasks.y * sign > 0).sum(dim=1) for sign in (1, -1))
    below = (3 * n + 1) * (3 * k + 5) - n * k
    a, b = (4 * k + 5) / below, -(4 * n + 1) / below
    assert torch.allclose(least[:, 0], n * a - k * b, atol=1e-6)
    assert torch.allclose(least[:, 1], n * a + k * b, atol=1e-6) and torch.equal(least[:, 1], least[:, 2])
    assert (wilson.measure(least, tasks)["accuracy"] == 1).all()


@pytest.mark.parametrize("name", wilson.METHODS)
def test_one_full_batch_step_goes_where_the_paper_says(name):
    settings = replace(wilson.QUICK, steps=1)
    problem = wilson.make(settings)
    w = wilson.train(wilson.METHODS[name], 0.01, problem, settings, None).w
    gradient = -(problem.x.transpose(1, 2) @ problem.y.unsqueeze(-1)).squeeze(-1) / settings.train
    direction = wilson.sign_line(problem) if wilson.METHODS[name].sign else -gradient
    assert torch.cosine_similarity(w, direction, dim=1).min() > 0.9999


# Running, and the page


@pytest.mark.parametrize("module", [pytest.param(stochastic_qp, marks=pytest.mark.thorough), variance_factors, wilson])
def test_quick_run_writes_what_its_section_reads(module, tmp_path):
    name = module.__name__.rpartition(".")[2]
    assert common.main(name, module.__doc__, module.run, module.draw, ["--quick", "--results", str(tmp_path)]) == 0
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["quick"] and {"machine", "versions", "commit", "settings", "claims"} <= set(result)
    text = module.section(result)
    assert all(claim.text in text for claim in module.CLAIMS)
    assert {claim.key for claim in module.CLAIMS} == set(result["claims"])


def test_results_of_unknown_code_are_not_kept(tmp_path, monkeypatch):
    facts = machine.facts()
    changed = facts | {"versions": facts["versions"] | {"signadam_ext": {"commit": "0123456789ab+changes"}}}
    monkeypatch.setattr(machine, "facts", lambda: changed)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    with pytest.raises(machine.NotCommitted, match=r"\+changes"):
        common.main(
            "wilson", None, lambda quick: pytest.fail("ran"), wilson.draw, ["--quick", "--results", str(tmp_path)]
        )
    assert not list(tmp_path.iterdir())


def test_page_is_what_the_results_say():
    assert page.main(["--check"]) == 0


@pytest.mark.parametrize("name", ["wilson", "ablation"])
def test_page_refuses_results_of_unknown_code(name, tmp_path):
    result = common.load(name)
    if result is None:
        pytest.skip("the results are not here")
    for problem in result.get("problems", {}).values():
        problem["made"] = [["0123456789ab+changes", "2026-11-27"], *problem["made"]]
    result["versions"]["signadam_ext"]["commit"] = "0123456789ab+changes"
    common.save(name, result, tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("as it was")
    for check in (["--check"], []):
        with pytest.raises(machine.NotCommitted, match=r"\+changes"):
            page.main([*check, "--readme", str(readme), "--results", str(tmp_path)])
    assert readme.read_text() == "as it was"


def test_page_leaves_experiments_without_results_alone(tmp_path):
    text = page.README.read_text()
    assert page.written(text, tmp_path) == text


def test_claims_are_counted_by_their_verdicts():
    section = (
        "## It works++ [X]\n\n| a | came out |\n|---|---|\n| 1 | yes |\n\n| claim | came out |\n|---|---|\n"
        + "".join(
            f"| a claim | {verdict} |\n"
            for verdict in ("yes", "yes", "**no**", "in part", "**in part**: nu 4", "on 1 of 3")
        )
    )
    row = page.tally([f"{section}\n| b | came out |\n|---|---|\n| 2 | yes |\n"]).splitlines()[2]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["[It works++ [X]](#it-works-x)", "6", "2", "3", "1"]


def test_committed_results_are_full_runs():
    for name in page.EXPERIMENTS:
        result = common.load(name)
        assert result is None or not result["quick"]


# theorems


def test_slopes_and_gradients_of_the_theorems():
    assert theorems.slope((1, 10, 100), torch.tensor([5.0, 0.5, 0.05])) == pytest.approx(-1)
    x = torch.randn(300, 50, generator=generator(), dtype=DOUBLE, requires_grad=True)
    (theorems.scales(50) * torch.log1p(x.square())).sum().backward()
    assert torch.allclose(x.grad, theorems.gradient(x.detach()))
    # Smooth, with constants of 2 a in each coordinate, and not convex.
    (curvature,) = torch.autograd.grad(theorems.gradient(x).sum(), x)
    largest = curvature.abs().amax(0) / (2 * theorems.scales(50))
    assert (largest <= 1).all() and (largest > 0.99).all() and (curvature.amin(0) < 0).all()


def test_a_fixed_threshold_stops_before_a_stationary_point():
    settings = theorems.QUICK
    _, stopped = theorems.train(settings, 4096, theorems.FIXED, 0.0)
    assert (stopped[-1] <= theorems.FIXED).all() and (stopped[-1] > theorems.FIXED / 4).all()
    assert torch.equal(stopped[-1], stopped[-100])
    _, free = theorems.train(settings, 4096, 0.0, 0.0)
    assert (free[-1] < theorems.FIXED / 4).all()


def test_exact_factors_go_on_under_a_constant_step():
    losses = {adapts: theorems.quadratics(theorems.QUICK, adapts)[1].mean(0) for adapts in (True, False)}
    assert losses[True][-1] < losses[True][6] / 8
    assert losses[False][-1] > losses[False][6] / 4
