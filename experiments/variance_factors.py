"""The optimal variance-adaptation factors: Lemma 1 and Figure 3 of "Dissecting Adam", and what estimates them.

Three simulations of gradients g with mean 1 and relative standard deviation eta = sigma / |grad|:

1. Factors. Lemma 1: E(gamma g - grad)^2 is least at gamma = 1 / (1 + eta^2), and E(gamma sign(g) - sign(grad))^2 at
   gamma = 2 rho - 1, with rho = P[sign(g) = sign(grad)]. Each simulated optimum is the least-squares solution from
   draws, mean(g) / mean(g^2) and mean(sign(g)), without any formula of the paper. For normal noise the closed form of
   the second is erf(1 / (sqrt(2) eta)), and Adam's factor is (1 + eta^2)^-1/2. Two other distributions of the noise
   with the same eta show what hangs on its being normal.
2. The variance estimate from moving averages, s = (v - m^2) / (1 - rho(beta, t)), against the draft's v - m^2.
3. The factors made of them, which are those of SVAG, m^2 / (m^2 + s), and of M-SVAG, m^2 / (m^2 + rho s), against the
   exact factors of g and of m.

2 and 3 draw a constant gradient with independent noise, which is the assumption all of this is derived from.

python -m experiments.variance_factors             20 seeds, a minute or two
python -m experiments.variance_factors --quick     5 seeds of few draws, a few seconds
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import common
from .common import COLORS, Claim, Result, bands

NOISES = ("normal", "Laplace", "uniform")
BETAS = (0.9, 0.99)
ETAS_OF_ESTIMATES = tuple(10 ** (k / 4) for k in range(-4, 5))  # 0.1 to 10


@dataclass(frozen=True)
class Settings:
    seeds: int = 20
    draws: int = 200_000  # for each eta
    points: int = 25  # of eta, even in its logarithm
    walks: int = 40_000  # of the moving averages
    times: tuple[int, ...] = (2, 3, 5, 10, 20, 50, 100, 200, 500)


FULL, QUICK = Settings(), Settings(seeds=5, draws=2_000, points=9, walks=1_000, times=(2, 5, 20))


# Closed forms


def magnitude_factor(eta: float) -> float:
    """Lemma 1 for g itself, of any distribution."""
    return 1 / (1 + eta * eta)


def sign_factor(eta: float, noise: str = "normal") -> float:
    """Lemma 1 for sign(g): 2 rho - 1, by the distribution of the noise."""
    if noise == "normal":
        return math.erf(1 / (math.sqrt(2) * eta))
    if noise == "Laplace":
        return -math.expm1(-math.sqrt(2) / eta)
    return min(1.0, 1 / (math.sqrt(3) * eta))


def adam_factor(eta: float) -> float:
    """What Adam uses in the place of `sign_factor`."""
    return 1 / math.sqrt(1 + eta * eta)


def rho(beta: float, t: int) -> float:
    """The variance of the bias-corrected moving average m of t independent gradients, relative to theirs."""
    return ((1 - beta) * (1 + beta**t)) / ((1 + beta) * (1 - beta**t))


def kappa(mu: float, t: int) -> float:
    """The draft's correction (Eq. 19), which is the same number."""
    return ((1 - mu ** (2 * t)) * (1 - mu) ** 2) / ((1 - mu**2) * (1 - mu**t) ** 2)


# Simulations


def draw_noise(noise: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Mean 0, variance 1."""
    if noise == "normal":
        return torch.randn(shape, dtype=torch.float64, generator=generator)
    uniform = 2 * torch.rand(shape, dtype=torch.float64, generator=generator) - 1
    if noise == "uniform":
        return math.sqrt(3) * uniform
    return -uniform.sign() * torch.log1p(-uniform.abs()) / math.sqrt(2)


def least_squares(g: Tensor) -> Tensor:
    """The gamma with the least mean of (gamma g - 1)^2 over the last dimension."""
    return g.mean(dim=-1) / (g * g).mean(dim=-1)


def simulate_factors(settings: Settings, etas: list[float], tick: Callable[[], Any]) -> dict[str, Any]:
    """For each distribution, the simulated optima by seed: (seeds, etas)."""
    result: dict[str, dict[str, Tensor]] = {}
    for number, noise in enumerate(NOISES):
        magnitude, sign = [], []
        for seed in range(settings.seeds):
            generator = torch.Generator().manual_seed(10 * seed + number)
            rows = [1 + eta * draw_noise(noise, (settings.draws,), generator) for eta in etas]
            magnitude.append(torch.stack([least_squares(g) for g in rows]))
            # sign(grad) is 1 and sign(g)^2 too, so the same least squares gives the mean of the signs.
            sign.append(torch.stack([least_squares(g.sign()) for g in rows]))
            tick()
        result[noise] = {"magnitude": torch.stack(magnitude), "sign": torch.stack(sign)}
    return result


@dataclass
class Averages:
    """The bias-corrected moving averages of gradients and of their squares, as the optimizers keep them."""

    beta: float
    m: Tensor
    v: Tensor
    t: int = 0

    def add(self, g: Tensor) -> None:
        self.m = self.beta * self.m + (1 - self.beta) * g
        self.v = self.beta * self.v + (1 - self.beta) * g * g
        self.t += 1

    def squares(self, corrected: bool = True) -> tuple[Tensor, Tensor]:
        """m^2 and the estimated variance of a gradient: the paper's s, or the draft's."""
        correction = 1 - self.beta**self.t
        m2, v = (self.m / correction) ** 2, self.v / correction
        # Rounding alone can make the difference negative.
        s = (v - m2).clamp(min=0)
        return m2, s / (1 - rho(self.beta, self.t)) if corrected else s


def walk(beta: float, eta: float, settings: Settings, seed: int) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """At each of the settings' times: m^2, s and the draft's s over all walks."""
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    zero = torch.zeros(settings.walks, dtype=torch.float64)
    averages, seen = Averages(beta, zero, zero), {}
    for _ in range(max(settings.times)):
        averages.add(1 + eta * torch.randn(settings.walks, dtype=torch.float64, generator=generator))
        if averages.t in settings.times:
            m2, s = averages.squares()
            seen[averages.t] = (m2, s, averages.squares(corrected=False)[1])
    return seen


def simulate_variance(settings: Settings, beta: float, tick: Callable[[], Any]) -> dict[str, Any]:
    """Mean of the estimated over the true variance, at eta = 1; neither estimate depends on eta."""
    corrected, draft = [], []
    for seed in range(settings.seeds):
        seen = walk(beta, 1.0, settings, seed)
        corrected.append(torch.stack([s.mean() for _, s, _ in seen.values()]))
        draft.append(torch.stack([s.mean() for _, _, s in seen.values()]))
        tick()
    return {
        "t": list(settings.times),
        "corrected": bands(torch.stack(corrected)),
        "draft": bands(torch.stack(draft)),
        "corrected_simultaneous": bands(torch.stack(corrected), simultaneous(len(settings.times))),
        "draft_simultaneous": bands(torch.stack(draft), simultaneous(len(settings.times))),
        "expected_draft": [1 - rho(beta, t) for t in settings.times],
    }


def simulate_estimates(settings: Settings, tick: Callable[[], Any]) -> dict[str, Any]:
    """Means of the factors of SVAG and of M-SVAG at beta 0.9, long after the start, from both variance estimates."""
    beta, t = 0.9, max(settings.times[:6])
    late = Settings(settings.seeds, settings.draws, settings.points, settings.walks // 4, (t,))
    columns: dict[str, list[list[Tensor]]] = {name: [] for name in ("svag", "svag_draft", "msvag", "msvag_draft")}
    for seed in range(settings.seeds):
        rows: dict[str, list[Tensor]] = {name: [] for name in columns}
        for eta in ETAS_OF_ESTIMATES:
            m2, s, draft = walk(beta, eta, late, seed)[t]
            for name, variance in (
                ("svag", s),
                ("svag_draft", draft),
                ("msvag", rho(beta, t) * s),
                ("msvag_draft", rho(beta, t) * draft),
            ):
                rows[name].append((m2 / (m2 + variance)).mean())
            tick()
        for name, found in rows.items():
            columns[name].append(found)
    means = {name: bands(torch.tensor(found, dtype=torch.float64)) for name, found in columns.items()}
    return {
        "beta": beta,
        "t": t,
        "eta": list(ETAS_OF_ESTIMATES),
        "exact_svag": [magnitude_factor(eta) for eta in ETAS_OF_ESTIMATES],
        "exact_msvag": [magnitude_factor(eta * math.sqrt(rho(beta, t))) for eta in ETAS_OF_ESTIMATES],
        **means,
    }


def simultaneous(tests: int) -> float:
    """The confidence of each of `tests` intervals that together miss nothing with 95 % (Bonferroni)."""
    return 1 - 0.05 / tests


# The experiment


def agreement(samples: Tensor, exact: list[float], draws: int) -> dict[str, Any]:
    """How simulated optima (seeds, etas) compare with a closed form.

    Where the factor is so near to 1 that hardly a draw has the wrong sign, the seeds agree and the interval has no
    width. Seeing none in N draws leaves a chance of up to 3 / N for it (95 %), which is 6 / N of the factor.
    """
    slack = 6 / (samples.shape[0] * draws)
    pointwise, joint = bands(samples), bands(samples, simultaneous(len(exact)))

    def inside(band: dict[str, list[float]]) -> list[bool]:
        return [low - slack <= x <= high + slack for low, x, high in zip(band["low"], exact, band["high"], strict=True)]

    differences = [abs(a - b) for a, b in zip(pointwise["mean"], exact, strict=True)]
    return {
        "points": len(exact),
        "inside_95": sum(inside(pointwise)),
        "inside_simultaneous": sum(inside(joint)),
        "largest_difference": max(differences),
        "widest_half": max((h - low) / 2 for low, h in zip(joint["low"], joint["high"], strict=True)),
        "holds": all(inside(joint)),
    }


def approximation() -> dict[str, Any]:
    """Adam's factor against the optimal one, over a fine grid of eta, and what the difference costs."""
    etas = [10 ** (k / 1000) for k in range(-2000, 3001)]
    pairs = [(eta, adam_factor(eta), sign_factor(eta)) for eta in etas]
    absolute = max(pairs, key=lambda row: abs(row[1] - row[2]))
    ratio = max(pairs, key=lambda row: row[1] / row[2])
    return {
        "largest_difference": abs(absolute[1] - absolute[2]),
        "at_eta": absolute[0],
        "largest_ratio": ratio[1] / ratio[2],
        "limit_of_ratio": math.sqrt(math.pi / 2),
        # E(gamma s - sign)^2 = 1 - c^2 + (gamma - c)^2 with c the optimal factor.
        "largest_excess_error": (absolute[1] - absolute[2]) ** 2,
    }


def run(quick: bool) -> Result:
    settings = QUICK if quick else FULL
    etas = [10 ** (-1 + 2 * k / (settings.points - 1)) for k in range(settings.points)]
    total = settings.seeds * (len(NOISES) + len(BETAS) + len(ETAS_OF_ESTIMATES))
    with common.progress(total, "simulations") as bar:
        factors = simulate_factors(settings, etas, bar.update)
        variance = {f"{beta:g}": simulate_variance(settings, beta, bar.update) for beta in BETAS}
        estimates = simulate_estimates(settings, bar.update)
    return {
        "settings": {
            "seeds": settings.seeds,
            "draws": settings.draws,
            "walks": settings.walks,
            "eta": [etas[0], etas[-1]],
            "points": settings.points,
            "betas": list(BETAS),
            "noises": list(NOISES),
        },
        "eta": etas,
        "exact": {
            "magnitude": [magnitude_factor(eta) for eta in etas],
            "sign": {noise: [sign_factor(eta, noise) for eta in etas] for noise in NOISES},
            "adam": [adam_factor(eta) for eta in etas],
        },
        "simulated": {
            noise: {kind: bands(values) for kind, values in found.items()} for noise, found in factors.items()
        },
        "variance": variance,
        "estimates": estimates,
        "claims": judge(settings, etas, factors, variance, estimates),
    }


def judge(
    settings: Settings, etas: list[float], factors: dict[str, Any], variance: dict[str, Any], estimates: dict[str, Any]
) -> Result:
    magnitude = [magnitude_factor(eta) for eta in etas]
    joint = f"simulated optima agree at all {len(etas)} values of eta within simultaneous 95 % intervals"
    closeness = approximation()
    other = {
        noise: {
            "magnitude": agreement(factors[noise]["magnitude"], magnitude, settings.draws),
            "own_sign_form": agreement(
                factors[noise]["sign"], [sign_factor(eta, noise) for eta in etas], settings.draws
            ),
            "largest_distance_from_normal_form": max(
                abs(x - sign_factor(eta))
                for x, eta in zip(factors[noise]["sign"].mean(dim=0).tolist(), etas, strict=True)
            ),
        }
        for noise in NOISES[1:]
    }

    def unbiased(band: dict[str, list[float]]) -> bool:
        return all(low <= 1 <= high for low, high in zip(band["low"], band["high"], strict=True))

    def farthest(band: dict[str, list[float]]) -> float:
        return max(abs(x - 1) for x in band["mean"])

    def off(name: str, exact: str) -> list[float]:
        return [a - b for a, b in zip(estimates[name]["mean"], estimates[exact], strict=True)]

    def worst(values: list[float]) -> dict[str, float]:
        at = max(range(len(values)), key=lambda i: abs(values[i]))
        return {"difference": values[at], "eta": ETAS_OF_ESTIMATES[at]}

    biases = {
        name: off(name, "exact_svag" if name.startswith("svag") else "exact_msvag")
        for name in ("svag", "svag_draft", "msvag", "msvag_draft")
    }
    closer = {
        "svag": sum(abs(a) < abs(b) for a, b in zip(biases["svag"], biases["svag_draft"], strict=True)),
        "msvag": sum(abs(a) < abs(b) for a, b in zip(biases["msvag"], biases["msvag_draft"], strict=True)),
    }
    late = {name: [found["draft"]["mean"][-1], found["t"][-1]] for name, found in variance.items()}
    return {
        "magnitude_factor": {
            "criterion": joint,
            **agreement(factors["normal"]["magnitude"], magnitude, settings.draws),
        },
        "sign_factor": {
            "criterion": joint,
            **agreement(factors["normal"]["sign"], [sign_factor(eta) for eta in etas], settings.draws),
        },
        "adam_approximates": {
            "criterion": "the two factors differ by at most 0.1 at every eta",
            **closeness,
            "holds": closeness["largest_difference"] <= 0.1,
        },
        "distribution": {
            "criterion": f"with Laplace and with uniform noise, {joint} (sign: of the closed form for that noise)",
            **other,
            "holds": all(found[kind]["holds"] for found in other.values() for kind in ("magnitude", "own_sign_form")),
        },
        "corrected_unbiased": {
            "criterion": "1 is in the simultaneous 95 % intervals of the mean of s / sigma^2 at every t",
            "farthest_from_1": {name: farthest(found["corrected"]) for name, found in variance.items()},
            "holds": all(unbiased(found["corrected_simultaneous"]) for found in variance.values()),
        },
        "draft_biased": {
            "criterion": "the mean of the draft's v - m^2 is (1 - rho) sigma^2 within simultaneous 95 % intervals, and "
            "not sigma^2, at every t",
            "first": {name: [found["draft"]["mean"][0], found["t"][0]] for name, found in variance.items()},
            "late": late,
            "holds": all(
                low <= expected <= high < 1
                for found in variance.values()
                for low, expected, high in zip(
                    found["draft_simultaneous"]["low"],
                    found["expected_draft"],
                    found["draft_simultaneous"]["high"],
                    strict=True,
                )
            ),
        },
        "factors_biased": {
            "criterion": "the mean estimated factor of SVAG differs from the exact one by more than 0.01 at some eta",
            "differences": biases,
            "lowest_msvag": worst([min(x, 0.0) for x in biases["msvag"]]),
            "worst": {name: worst(values) for name, values in biases.items()},
            "closer_with_correction": closer,
            "etas": len(ETAS_OF_ESTIMATES),
            "holds": max(map(abs, biases["svag"])) > 0.01,
        },
        "same_correction": {
            "criterion": "the draft's kappa(mu, t) equals rho(beta, t) to 1e-9 for t up to 500",
            "largest_difference": max(
                abs(rho(beta, t) / kappa(beta, t) - 1) for beta in (0.5, *BETAS, 0.999) for t in range(1, 501)
            ),
            "holds": all(
                abs(rho(beta, t) / kappa(beta, t) - 1) < 1e-9 for beta in (0.5, *BETAS, 0.999) for t in range(1, 501)
            ),
        },
    }


# Its section and its picture

INSIDE = (
    "{inside_simultaneous} of {points} (within their own 95 % intervals: {inside_95}); largest difference "
    "{largest_difference:.1e}"
)
CLAIMS = (
    Claim(
        "magnitude_factor",
        "Lemma 1, Eq. 15",
        "The least-squares factor of a stochastic gradient is 1 / (1 + eta^2).",
        INSIDE,
    ),
    Claim(
        "sign_factor",
        "Lemma 1, Eq. 16, and Eq. 10",
        "That of its sign is 2 rho - 1 = erf(1 / (sqrt(2) eta)) for normal noise.",
        INSIDE,
    ),
    Claim(
        "adam_approximates",
        "Sec. 3.1, Fig. 3",
        "Adam's (1 + eta^2)^-1/2 closely approximates it.",
        "differs by at most {largest_difference:.3f} (eta {at_eta:.2f}), which adds {largest_excess_error:.4f} to the "
        "expected squared error of a sign; as a ratio it is up to {largest_ratio:.3f} times too large, at large eta "
        "(the limit is sqrt(pi / 2))",
    ),
    Claim(
        "distribution",
        "Lemma 1",
        "The lemma asks nothing of the distribution; only the error function does.",
        "Laplace: magnitude {Laplace[magnitude][inside_simultaneous]} of {Laplace[magnitude][points]}, sign "
        "{Laplace[own_sign_form][inside_simultaneous]}, which lies up to "
        "{Laplace[largest_distance_from_normal_form]:.3f} from the error function; uniform: "
        "{uniform[magnitude][inside_simultaneous]}, {uniform[own_sign_form][inside_simultaneous]} and "
        "{uniform[largest_distance_from_normal_form]:.3f}",
    ),
    Claim(
        "corrected_unbiased",
        "Eq. 22, Sec. B.5",
        "(v - m^2) / (1 - rho) is an unbiased estimate of the variance.",
        "mean of s / sigma^2 off 1 by at most {farthest_from_1[0.9]:.4f} (beta 0.9) and {farthest_from_1[0.99]:.4f} "
        "(beta 0.99)",
    ),
    Claim(
        "draft_biased",
        "Sec. B.5; the draft, Sec. C.1, leaves it uncorrected",
        "The draft's v - m^2 is too small by the factor 1 - rho.",
        "{first[0.9][0]:.3f} of sigma^2 at t = {first[0.9][1]}, {late[0.9][0]:.3f} at t = {late[0.9][1]} (beta 0.9); "
        "{first[0.99][0]:.3f} and {late[0.99][0]:.3f} (0.99)",
    ),
    Claim(
        "factors_biased",
        "Sec. 4.2",
        "The estimated factors are not unbiased.",
        "SVAG off by {worst[svag][difference]:+.3f} at eta {worst[svag][eta]:.2f} (draft's variance "
        "{worst[svag_draft][difference]:+.3f}), M-SVAG by {worst[msvag][difference]:+.3f} at eta "
        "{worst[msvag][eta]:.2f} (draft's {worst[msvag_draft][difference]:+.3f}); the correction brings SVAG nearer at "
        "{closer_with_correction[svag]}, M-SVAG at {closer_with_correction[msvag]} of {etas} values of eta",
    ),
    Claim(
        "same_correction",
        "draft, Eq. 19",
        "The draft's kappa(mu, t) for the momentum term is the paper's rho(beta, t).",
        "largest relative difference {largest_difference:.1e}",
    ),
)


def section(result: Result) -> str:
    settings, estimates = result["settings"], result["estimates"]
    closeness, dip = result["claims"]["adam_approximates"], result["claims"]["factors_biased"]["lowest_msvag"]
    return "\n\n".join(
        [
            "## Factors of variance adaptation",
            f"Figure 3 and Lemma 1, from simulated gradients: {settings['seeds']} seeds of {settings['draws']:,} draws "
            f"for each of {settings['points']} relative standard deviations eta in {settings['eta'][0]:g} .. "
            f"{settings['eta'][1]:g}; {settings['walks']:,} sequences of moving averages a seed, under the assumption "
            "of the paper that the gradient's distribution stands still.",
            "![factors against eta, variance estimates against t, estimated factors](results/variance_factors.png)",
            common.claims_table(CLAIMS, result["claims"]),
            "- The estimate of eta^2 itself, s / m^2, has no finite mean: a normal m comes arbitrarily near 0. So "
            "bias is measured of its numerator s and of the factors.\n"
            "- Close means close in value. As a ratio, Adam's factor tends to being "
            f"{closeness['limit_of_ratio'] - 1:.0%} too large where noise prevails; where it prevails everywhere, the "
            "learning rate absorbs that.\n"
            f"- The estimated factors (beta {estimates['beta']:g}, t = {estimates['t']}) are too large where noise "
            "prevails: m^2 then holds rho times the variance, so they level off instead of going to 0. Without the "
            "correction 1 / (1 - rho) they are larger still. In between M-SVAG's are too small "
            f"({dip['difference']:+.3f} at eta {dip['eta']:.2f}), and there the correction takes them farther down; it "
            "makes the variance unbiased, not the factors.",
            common.provenance(result),
        ]
    )


def draw(result: Result, plt: Any) -> Any:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    etas, exact, simulated = result["eta"], result["exact"], result["simulated"]["normal"]
    for values, band, color, label in (
        (exact["magnitude"], simulated["magnitude"], COLORS["SVAG"], "magnitude: 1 / (1 + eta²)"),
        (exact["sign"]["normal"], simulated["sign"], COLORS["SSD"], "sign: erf(1 / (√2 eta))"),
    ):
        left.plot(etas, values, color=color, label=label)
        half = [(high - low) / 2 for low, high in zip(band["low"], band["high"], strict=True)]
        left.errorbar(
            etas, band["mean"], yerr=half, fmt="o", markersize=3.5, color=color, label="least squares on draws"
        )
    left.plot(etas, exact["adam"], "--", color=COLORS["Adam"], label="Adam: (1 + eta²)^(-1/2)")
    left.plot(etas, exact["sign"]["Laplace"], ":", color="#888888", label="sign, Laplace noise")
    left.plot(etas, exact["sign"]["uniform"], "-.", color="#888888", label="sign, uniform noise")
    left.set(xscale="log", xlabel="relative standard deviation eta", ylabel="factor", title="Optimal factors (Lemma 1)")
    left.legend(fontsize=8)
    for (beta, found), color in zip(result["variance"].items(), ("#08519c", "#a50f15"), strict=True):
        for kind, style, label in (
            ("corrected", "o-", "(v - m²) / (1 - rho)"),
            ("draft", "s--", "v - m², the draft"),
        ):
            band = found[kind]
            half = [(high - low) / 2 for low, high in zip(band["low"], band["high"], strict=True)]
            middle.errorbar(
                found["t"], band["mean"], yerr=half, fmt=style, markersize=4, color=color, label=f"{label}, beta {beta}"
            )
    middle.axhline(1, color="#444444", linewidth=0.8)
    middle.set(xscale="log", xlabel="step t", ylabel="mean estimate / true variance", title="Variance estimates")
    middle.set_ylim(0, 1.12)
    middle.legend(fontsize=8)
    found = result["estimates"]
    for base, color, label in (("svag", COLORS["SVAG"], "SVAG"), ("msvag", "#6a3d9a", "M-SVAG")):
        right.plot(found["eta"], found[f"exact_{base}"], color=color, label=f"{label}, exact")
        right.plot(found["eta"], found[base]["mean"], "o", color=color, markersize=5, label=f"{label}, mean estimate")
        right.plot(found["eta"], found[f"{base}_draft"]["mean"], "x", color=color, label=f"{label}, draft's variance")
    right.set(xscale="log", xlabel="relative standard deviation eta", ylabel="factor")
    right.set_title(f"Estimated factors, beta {found['beta']:g}, t = {found['t']}")
    right.legend(fontsize=8)
    figure.suptitle(
        f"Means over {result['settings']['seeds']} seeds with 95 % intervals (mostly smaller than the marks)"
    )
    return figure


if __name__ == "__main__":
    raise SystemExit(common.main("variance_factors", __doc__, run, draw))
