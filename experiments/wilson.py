"""Does the sign or the adaptivity harm generalisation? The construction of Wilson et al. (2017), as "Dissecting Adam"
takes it up in its Section 5.

Binary least squares R(w) = |Xw - y|^2 / (2 n). Labels are 1 with probability p > 1/2, else -1. Of a sample's features
the first is its label, the second and third are 1, and then come some that no other sample has: one 1 where the label
is 1, five where it is -1. Only the first feature says anything of unseen samples. Since X sign(X'y) = 4 y, the gradient
on the line through sign(X'y) is a multiple of X'y, whose signs lead along the line. So a method that moves by signs
never leaves it, and what it finds there calls every unseen sample positive.

Two settings. "full batch": the gradient of R, which is what the construction and the paper's Section 5 speak of. Of a
variance the paper says no more here than that M-SVAG's first step is a gradient step. The estimates come from moving
averages, in which the gradient's change counts as variance, so the methods do adapt. "mini-batch": ten samples a step,
each once in an epoch, where there is real variance and the proof's induction does not hold; added here.

All start at w = 0, run 2000 steps with a learning rate that falls linearly to 0, and try four learning rates each. The
one with the lowest mean training loss is shown; the claims are judged on every rate and task with a training loss of at
most 1e-4. Labels are drawn again until the positive ones prevail, the one assumption of the construction.

The optimizers are signadam_ext's: MSGD, SVAG, MSVAG; SignSGD (SSD), Signum (M-SSD), Adam, and AdamStar with and
without momentum. Adam with beta2 = 0.9 is there because its factor is that of Adam* but for one thing: it is made of
the variance of the gradient, v - m^2, and that of Adam* of the variance of the momentum, rho / (1 - rho) times as much.

python -m experiments.wilson             20 seeds for each of p = 0.6, 0.7, 0.8; several minutes
python -m experiments.wilson --quick     3 seeds of 20 samples, a few seconds
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import signadam_ext

from . import common
from .common import COLORS, Claim, Result, interval

FIXED, OWN = 3, 5  # features of all samples, and room for those of one sample
GRADIENT_RATES = (0.1, 0.3, 0.6, 1.0)
SIGN_RATES = (1e-3, 3e-3, 6e-3, 1e-2)
CURVE_POINTS = 60

Make = Callable[[list[Tensor], float], torch.optim.Optimizer]


@dataclass(frozen=True)
class Method:
    make: Make
    rates: tuple[float, ...]
    sign: bool
    adaptive: bool
    color: str


METHODS = {
    "M-SGD": Method(lambda w, lr: signadam_ext.MSGD(w, lr), GRADIENT_RATES, False, False, COLORS["M-SGD"]),
    "SVAG": Method(lambda w, lr: signadam_ext.SVAG(w, lr), GRADIENT_RATES, False, True, "#74c476"),
    "M-SVAG": Method(lambda w, lr: signadam_ext.MSVAG(w, lr), GRADIENT_RATES, False, True, COLORS["M-SVAG"]),
    "SSD": Method(lambda w, lr: signadam_ext.SignSGD(w, lr), SIGN_RATES, True, False, "#e377c2"),
    "M-SSD": Method(lambda w, lr: signadam_ext.Signum(w, lr), SIGN_RATES, True, False, COLORS["M-SSD"]),
    "Adam": Method(lambda w, lr: signadam_ext.Adam(w, lr), SIGN_RATES, True, True, COLORS["Adam"]),
    "Adam, beta2 0.9": Method(
        lambda w, lr: signadam_ext.Adam(w, lr, betas=(0.9, 0.9)), SIGN_RATES, True, True, "#8c564b"
    ),
    "Adam*": Method(lambda w, lr: signadam_ext.AdamStar(w, lr), SIGN_RATES, True, True, COLORS["Adam*"]),
    "Adam*, no momentum": Method(
        lambda w, lr: signadam_ext.AdamStar(w, lr, momentum=False), SIGN_RATES, True, True, "#9e7bb5"
    ),
}
SIGN_BASED = tuple(name for name, method in METHODS.items() if method.sign)
OTHERS = tuple(name for name, method in METHODS.items() if not method.sign)


@dataclass(frozen=True)
class Settings:
    seeds: int = 20
    train: int = 100
    test: int = 100
    steps: int = 2000
    batch: int = 10
    shares: tuple[float, ...] = (0.6, 0.7, 0.8)
    fitted: float = 1e-4  # training loss up to which a solution counts as one; at w = 0 the loss is 0.5


FULL, QUICK = Settings(), Settings(seeds=3, train=20, test=20, steps=200, batch=5, shares=(0.7,), fitted=0.1)


# The construction


def draw_labels(n: int, share: float, generator: torch.Generator) -> Tensor:
    """Labels 1 and -1, the first with probability `share`; drawn again until they prevail and both occur."""
    while True:
        labels = torch.where(torch.rand(n, generator=generator) < share, 1.0, -1.0)
        if 0 < labels.sum() < n:
            return labels


def features(labels: Tensor) -> Tensor:
    """The samples with these labels: (n, 3 + 5 n)."""
    n = labels.shape[0]
    x = torch.zeros(n, FIXED + OWN * n)
    x[:, 0] = labels
    x[:, 1:FIXED] = 1
    for i, label in enumerate(labels.tolist()):
        own = 1 if label > 0 else OWN
        x[i, FIXED + OWN * i : FIXED + OWN * i + own] = 1
    return x


@dataclass(frozen=True)
class Tasks:
    """Several problems side by side; the first dimension runs over seeds and shares."""

    x: Tensor  # (tasks, train, d)
    y: Tensor  # (tasks, train)
    unseen: Tensor  # (tasks, test, d)
    labels: Tensor  # (tasks, test)

    @property
    def seen(self) -> int:
        """How many features occur in training, at the front: the rest belong to unseen samples."""
        return FIXED + OWN * self.x.shape[1]


def make(settings: Settings) -> Tasks:
    """Tasks in the order of shares, then seeds."""
    x, y = [], []
    for share in settings.shares:
        for seed in range(settings.seeds):
            generator = torch.Generator().manual_seed(round(1000 * share) + 10_000 * seed)
            train = draw_labels(settings.train, share, generator)
            labels = torch.cat([train, draw_labels(settings.test, share, generator)])
            x.append(features(labels))
            y.append(labels)
    samples, signs = torch.stack(x), torch.stack(y)
    n = settings.train
    return Tasks(samples[:, :n], signs[:, :n], samples[:, n:], signs[:, n:])


def predictions(x: Tensor, w: Tensor) -> Tensor:
    # As w'X', which takes a tenth of the time of Xw in a batch.
    return (w.unsqueeze(-2) @ x.transpose(-1, -2)).squeeze(-2)


def sign_line(tasks: Tasks) -> Tensor:
    """sign(X'y), where the construction says that methods of signs go."""
    return (tasks.x.transpose(1, 2) @ tasks.y.unsqueeze(-1)).squeeze(-1).sign()


def least_norm(tasks: Tasks) -> Tensor:
    """The solution of least norm, X'(XX')^-1 y, where gradient descent goes; it has the largest margin."""
    x, y = tasks.x.double(), tasks.y.double().unsqueeze(-1)
    return (x.transpose(1, 2) @ torch.linalg.solve(x @ x.transpose(1, 2), y)).squeeze(-1).float()


# Training


@dataclass
class Trained:
    w: Tensor  # (tasks, d)
    curve: list[tuple[int, Tensor]]  # step and training loss of each task


def train(method: Method, lr: float, tasks: Tasks, settings: Settings, batch: int | None) -> Trained:
    w = torch.zeros(tasks.x.shape[0], tasks.x.shape[2])
    optimizer = method.make([w], lr)
    seen, n = tasks.seen, settings.train
    x, y = tasks.x[:, :, :seen].contiguous(), tasks.y
    size = batch or n
    generator = torch.Generator().manual_seed(17)
    order = torch.arange(n)
    gradient = torch.zeros_like(w)
    w.grad = gradient
    every = max(1, settings.steps // CURVE_POINTS)
    curve = []
    for t in range(settings.steps):
        if t % every == 0:
            curve.append((t, loss(x, y, w[:, :seen])))
        at = t % (n // size) * size
        if at == 0 and batch:
            order = torch.randperm(n, generator=generator)
        chosen = order[at : at + size]
        some_x, some_y = (x[:, chosen], y[:, chosen]) if batch else (x, y)
        residual = predictions(some_x, w[:, :seen]) - some_y
        # No training sample has the features behind `seen`: their gradient is 0 at every step.
        gradient[:, :seen] = (residual.unsqueeze(1) @ some_x).squeeze(1) / size
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - t / settings.steps)
        optimizer.step()
    curve.append((settings.steps, loss(x, y, w[:, :seen])))
    return Trained(w, curve)


def loss(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return 0.5 * (predictions(x, w) - y).square().mean(dim=-1)


def measure(w: Tensor, tasks: Tasks) -> dict[str, Tensor]:
    """By task: training loss, test accuracies, and where the solution lies."""
    right = predictions(tasks.unseen, w) * tasks.labels > 0
    negative = tasks.labels < 0
    line, least = sign_line(tasks), least_norm(tasks)
    return {
        "loss": loss(tasks.x, tasks.y, w),
        "accuracy": right.float().mean(dim=1),
        "accuracy_negative": (right & negative).sum(dim=1) / negative.sum(dim=1),
        "share_positive": (tasks.labels > 0).float().mean(dim=1),
        "cosine_to_sign_line": torch.cosine_similarity(w, line, dim=1),
        "distance_to_least_norm": (w - least).norm(dim=1) / least.norm(dim=1),
        # The prediction for an unseen sample is label * first + others, as its own weights are 0.
        "first": w[:, 0],
        "others": w[:, 1] + w[:, 2],
        "unseen_weights": w[:, tasks.seen :].abs().amax(dim=1),
    }


# The experiment


def run(quick: bool) -> Result:
    settings = QUICK if quick else FULL
    tasks = make(settings)
    batches = {"full batch": None, "mini-batch": settings.batch}
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    measured: list[Row] = []
    tried = {name: method.rates[-2:] if quick else method.rates for name, method in METHODS.items()}
    with common.progress(len(batches) * sum(map(len, tried.values())), "trainings") as bar:
        for setting, batch in batches.items():
            runs[setting] = {}
            for name, method in METHODS.items():
                runs[setting][name] = []
                for lr in tried[name]:
                    trained = train(method, lr, tasks, settings, batch)
                    found = measure(trained.w, tasks)
                    measured.append(Row(setting, name, lr, found))
                    runs[setting][name].append({"lr": lr, **summary(found, trained, settings)})
                    bar.update()
    chosen = {
        setting: {name: min(rows, key=lambda row: row["mean_loss"])["lr"] for name, rows in methods.items()}
        for setting, methods in runs.items()
    }
    return {
        "settings": {
            "seeds": settings.seeds,
            "train": settings.train,
            "test": settings.test,
            "steps": settings.steps,
            "batch": settings.batch,
            "shares": list(settings.shares),
            "dimension": tasks.x.shape[2],
            "fitted": settings.fitted,
            "schedule": "linear to 0",
        },
        "share_positive": {
            f"{share:g}": interval(value.tolist())
            for share, value in split(measured[0].found["share_positive"], settings).items()
        },
        "runs": runs,
        "chosen": chosen,
        "claims": judge(measured, chosen, settings),
    }


@dataclass(frozen=True)
class Row:
    """What one method at one learning rate found, by task."""

    setting: str
    method: str
    lr: float
    found: dict[str, Tensor]


def split(values: Tensor, settings: Settings) -> dict[float, Tensor]:
    """By share, the values of its seeds."""
    return dict(zip(settings.shares, values.view(len(settings.shares), settings.seeds), strict=True))


def summary(found: dict[str, Tensor], trained: Trained, settings: Settings) -> dict[str, Any]:
    """Intervals over the seeds of each share."""
    by_share = {
        f"{share:g}": {
            key: interval(split(values, settings)[share].tolist())
            for key, values in found.items()
            if key != "share_positive"
        }
        for share in settings.shares
    }
    middle = settings.shares[len(settings.shares) // 2]
    columns = [split(values, settings)[middle].clamp(min=1e-20).log10() for _, values in trained.curve]
    return {
        "mean_loss": float(found["loss"].mean()),
        "by_share": by_share,
        "curve": {"steps": [t for t, _ in trained.curve], "log10_loss": common.bands(torch.stack(columns, dim=1))},
    }


def judge(measured: list[Row], chosen: dict[str, dict[str, float]], settings: Settings) -> Result:
    def gathered(setting: str, method: str, key: str) -> Tensor:
        """Over all learning rates and tasks that fitted the training data."""
        rows = [row for row in measured if row.setting == setting and row.method == method]
        return torch.cat([row.found[key][row.found["loss"] <= settings.fitted] for row in rows])

    def span(values: Tensor) -> list[float]:
        """The lowest, the highest, and the mean."""
        return [float(values.min()), float(values.max()), float(values.mean())] if values.numel() else []

    def table(setting: str, methods: tuple[str, ...], key: str) -> dict[str, list[float]]:
        return {method: span(gathered(setting, method, key)) for method in methods}

    def count(setting: str, methods: tuple[str, ...]) -> dict[str, int]:
        return {method: gathered(setting, method, "loss").numel() for method in methods}

    def fail(setting: str) -> dict[str, Any]:
        found = table(setting, SIGN_BASED, "accuracy_negative")
        accuracy = {method: at_chosen(setting, method, "accuracy") for method in SIGN_BASED}
        held = {method: bool(values) and values[1] == 0.0 for method, values in found.items()}
        return {
            "accuracy_on_negative": found,
            "accuracy": accuracy,
            "fitted_runs": count(setting, SIGN_BASED),
            "holds_at": held,
            "holds": all(held.values()),
        }

    def succeed(setting: str) -> dict[str, Any]:
        found = table(setting, OTHERS, "accuracy")
        held = {method: bool(values) and values[0] == 1.0 for method, values in found.items()}
        return {
            "accuracy": found,
            "fitted_runs": count(setting, OTHERS),
            "holds_at": held,
            "holds": all(held.values()),
        }

    def at_chosen(setting: str, method: str, key: str) -> dict[str, Any]:
        """At the learning rate of the lowest training loss, over all shares and seeds."""
        (row,) = [
            row for row in measured if (row.setting, row.method, row.lr) == (setting, method, chosen[setting][method])
        ]
        return interval(row.found[key].tolist())

    cosines = table("full batch", tuple(METHODS), "cosine_to_sign_line")
    cosine_held = {method: bool(cosines[method]) and cosines[method][0] > 0.999 for method in SIGN_BASED}
    distances = table("full batch", OTHERS, "distance_to_least_norm")
    fitted = f"training loss at most {settings.fitted:g}"
    return {
        "on_the_line": {
            "criterion": f"cosine between solution and sign(X'y) above 0.999 in every run with {fitted}",
            "cosine": {method: cosines[method] for method in SIGN_BASED},
            "holds_at": cosine_held,
            "holds": all(cosine_held.values()),
        },
        "sign_fails": {
            "criterion": f"no negative unseen sample is recognised in any run with {fitted}",
            **fail("full batch"),
        },
        "msvag_leaves_the_line": {
            "criterion": f"cosine below 0.9 in every run with {fitted}",
            "cosine": cosines["M-SVAG"],
            "holds": bool(cosines["M-SVAG"]) and cosines["M-SVAG"][1] < 0.9,
        },
        "magnitude_generalises": {
            "criterion": f"all unseen samples are recognised in every run with {fitted}",
            **succeed("full batch"),
        },
        "msvag_is_not_least_norm": {
            "criterion": "M-SGD ends within 0.001 of the solution of least norm (relative distance) in every run, "
            "M-SVAG does not",
            "distance": distances,
            "holds": bool(distances["M-SGD"] and distances["M-SVAG"])
            and distances["M-SGD"][1] <= 1e-3
            and distances["M-SVAG"][1] > 1e-3,
        },
        "sign_fails_minibatch": {
            "criterion": f"no negative unseen sample is recognised in any run with {fitted}",
            **fail("mini-batch"),
        },
        "magnitude_generalises_minibatch": {
            "criterion": f"all unseen samples are recognised in every run with {fitted}",
            **succeed("mini-batch"),
        },
        "unseen_weights_stay": {
            "criterion": "weights whose gradient is 0 at every step are exactly 0 in every run",
            "largest": max(float(row.found["unseen_weights"].max()) for row in measured),
            "holds": all(float(row.found["unseen_weights"].max()) == 0 for row in measured),
        },
    }


# Its section and its picture


def _spans(name: str, methods: tuple[str, ...], digits: int = 2) -> str:
    form = f".{digits}f"
    return "; ".join(
        f"{m} {{{name}[{m}][2]:{form}}} ({{{name}[{m}][0]:{form}}} .. {{{name}[{m}][1]:{form}}})" for m in methods
    )


PAPER = "Sec. 5"
CLAIMS = (
    Claim(
        "on_the_line",
        f"{PAPER} and B.6; Wilson et al., Lemma 3.1",
        "Iterates of sign descent stay on the line through sign(X'y); so do Adam's.",
        "cosine " + _spans("cosine", SIGN_BASED, 4),
    ),
    Claim(
        "sign_fails",
        f"{PAPER}; Wilson et al., Sec. 3.3",
        "Full batch: methods of signs fail on unseen samples, whether or not they adapt.",
        "accuracy on negative samples " + _spans("accuracy_on_negative", SIGN_BASED),
    ),
    Claim(
        "msvag_leaves_the_line",
        PAPER,
        "The construction does not extend to M-SVAG: its iterates leave the line.",
        "cosine {cosine[0]:.2f} .. {cosine[1]:.2f}",
    ),
    Claim(
        "magnitude_generalises",
        f"{PAPER}: it is the sign that impedes generalisation here, not the adaptivity",
        "Full batch: methods that keep the magnitude recognise unseen samples, whether or not they adapt.",
        "accuracy " + _spans("accuracy", OTHERS),
    ),
    Claim(
        "msvag_is_not_least_norm",
        f"{PAPER}: this does by no means imply that M-SVAG converges to the max-margin solution",
        "M-SVAG finds another solution than M-SGD, which finds the one of least norm.",
        "relative distance to it " + _spans("distance", OTHERS, 4),
    ),
    Claim(
        "sign_fails_minibatch",
        "not in the paper",
        "Mini-batch: methods of signs fail there too.",
        "accuracy on negative samples " + _spans("accuracy_on_negative", SIGN_BASED),
    ),
    Claim(
        "magnitude_generalises_minibatch",
        "not in the paper",
        "Mini-batch: methods that keep the magnitude recognise unseen samples.",
        "accuracy " + _spans("accuracy", OTHERS),
    ),
    Claim(
        "unseen_weights_stay",
        "sign(0) = 0, where the paper's theory takes 1",
        "A weight without gradient stays where it is.",
        "largest {largest:g}",
    ),
)


def section(result: Result) -> str:
    settings = result["settings"]
    shares = ", ".join(f"{share:g}" for share in settings["shares"])
    return "\n\n".join(
        [
            "## Where signs do not generalise",
            f"Wilson et al.'s least-squares problem, n = {settings['train']} samples of {settings['dimension']} "
            f"features, {settings['test']} unseen ones, labels positive with p = {shares}, {settings['seeds']} seeds "
            f"each, {settings['steps']} steps. Means and ranges run over all shares, seeds and learning rates that "
            f"reach a training loss of {settings['fitted']:g}. Full batches are the setting of the lemmas; "
            f"mini-batches of {settings['batch']} were added, since variance is what variance adaptation is about.",
            "![training loss and test accuracy](results/wilson.png)",
            common.claims_table(CLAIMS, result["claims"]),
            accuracies(result),
            remarks(result),
            common.provenance(result),
        ]
    )


def row_of(result: Result, setting: str, method: str) -> dict[str, Any]:
    """The run at the learning rate chosen by training loss."""
    rows: list[dict[str, Any]] = result["runs"][setting][method]
    return next(row for row in rows if row["lr"] == result["chosen"][setting][method])


def accuracies(result: Result) -> str:
    """Test accuracies at the chosen learning rates."""
    shares = [f"{share:g}" for share in result["settings"]["shares"]]
    header = ["test accuracy", "lr", *(f"p = {share}" for share in shares)]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for setting, methods in result["runs"].items():
        for method in methods:
            row = row_of(result, setting, method)
            cells = [percent(row["by_share"][share]["accuracy"]) for share in shares]
            lines.append(f"| {setting}, {method} | {row['lr']:g} | {' | '.join(cells)} |")
    positive = [percent(result["share_positive"][share]) for share in shares]
    lines.append(f"| all called positive | | {' | '.join(positive)} |")
    return "\n".join(lines)


def percent(found: dict[str, Any]) -> str:
    if found["high"] == found["low"]:
        return f"{100 * found['mean']:.0f} %"
    return f"{100 * found['mean']:.1f} ({100 * found['low']:.1f} .. {min(100 * found['high'], 100):.1f}) %"


def remarks(result: Result) -> str:
    """How the predictions come about, and what mini-batches change."""
    shares = [f"{share:g}" for share in result["settings"]["shares"]]
    middle = shares[len(shares) // 2]

    def weights(setting: str, *methods: str) -> str:
        found = []
        for method in methods:
            values = row_of(result, setting, method)["by_share"][middle]
            found.append(f"{values['first']['mean']:.2f} and {values['others']['mean']:.2f} with {method}")
        return "; ".join(found)

    share = result["settings"]["batch"] / result["settings"]["train"]
    return "\n".join(
        [
            "- An unseen sample's prediction is its label times the first weight, plus the second and third weight, so "
            "it is right for both labels when the first exceeds the sum of the others. They are, full batch and p = "
            f"{middle}: {weights('full batch', 'M-SSD', 'Adam', 'M-SGD', 'M-SVAG')}.",
            "- With mini-batches, to which the paper does not extend its argument, the sign alone does not decide: "
            f"{weights('mini-batch', 'SSD', 'M-SSD', 'Adam', 'Adam*', 'Adam*, no momentum')}. A sample's own features "
            f"have a gradient in {share:.0%} of the steps. Without momentum only then do their weights move, so the "
            "label's weight, which moves always the same way, gets ahead. Momentum keeps them moving in between and so "
            "brings back the line of the construction. Adam's factors, of the variance of single gradients, slow them "
            "again; those of Adam*, of the variance of the momentum, do so less: Adam with beta2 = 0.9, which differs "
            f"from Adam* in little else, ends at {weights('mini-batch', 'Adam, beta2 0.9').split(' with')[0]}. That is "
            "how we read the figures; only the figures are measured. The cosine to the line says little: Adam's is "
            f"{row_of(result, 'mini-batch', 'Adam')['by_share'][middle]['cosine_to_sign_line']['mean']:.2f}.",
        ]
    )


def draw(result: Result, plt: Any) -> Any:
    settings = result["settings"]
    shares = [f"{share:g}" for share in settings["shares"]]
    middle = shares[len(shares) // 2]
    figure, grid = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
    for (setting, methods), (left, centre, right) in zip(result["runs"].items(), grid, strict=True):
        for index, name in enumerate(methods):
            method, row = METHODS[name], row_of(result, setting, name)
            dashes = "--" if method.adaptive else "-"
            common.band(
                left,
                row["curve"]["steps"],
                row["curve"]["log10_loss"],
                color=method.color,
                linestyle=dashes,
            )
            found = [row["by_share"][share]["accuracy"] for share in shares]
            at = [position + 0.1 * (index - (len(methods) - 1) / 2) for position in range(len(shares))]
            half = [[f["mean"] - f["low"] for f in found], [f["high"] - f["mean"] for f in found]]
            centre.bar(at, [f["mean"] for f in found], 0.09, color=method.color, label=name)
            centre.errorbar(at, [f["mean"] for f in found], yerr=half, fmt="none", ecolor="black", linewidth=0.8)
            mark = "s" if method.adaptive else "o"
            right.plot([], [], mark + dashes, color=method.color, label=name)
            for rate in methods[name]:
                values = rate["by_share"][middle]
                fitted = values["loss"]["mean"] <= settings["fitted"]
                right.plot(
                    values["cosine_to_sign_line"]["mean"],
                    values["accuracy_negative"]["mean"],
                    mark,
                    color=method.color,
                    fillstyle="full" if fitted else "none",
                )
        left.set(xlabel="step", ylabel="log10 training loss", title=f"{setting}: training, p = {middle}")
        for position, share in enumerate(shares):
            value = result["share_positive"][share]["mean"]
            named = {"label": "all called positive"} if position == 0 else {}
            centre.plot([position - 0.42, position + 0.42], [value, value], "k:", linewidth=1.2, **named)
        centre.set_xticks(range(len(shares)), [f"p = {share}" for share in shares])
        centre.set(ylabel="accuracy on unseen samples", title=f"{setting}: test", ylim=(0, 1.05))
        right.set(xlabel="cosine between the solution and sign(X'y)", ylabel="accuracy on negative unseen samples")
        right.set_title(f"{setting}: every learning rate, p = {middle}")
        right.set_xlim(-0.05, 1.05)
    handles, labels = grid[0, 2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    figure.suptitle(
        f"Wilson et al.'s construction: {settings['train']} samples, {settings['seeds']} seeds, 95 % intervals\n"
        "blue and green keep the magnitude, the other colours take the sign; dashed lines and squares adapt to variance"
    )
    return figure


if __name__ == "__main__":
    raise SystemExit(common.main("wilson", __doc__, run, draw))
