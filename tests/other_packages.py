"""Compares this package's rules with those of other packages, of which several are the authors' own.

    python tests/other_packages.py
    python tests/other_packages.py --page

:data:`PACKAGES` are installed into a folder of their own, which is removed in the end, and imported from there in a
process of its own; they need PyPI. Each of :data:`ROWS` trains the same parameters on the same gradients, of many
magnitudes, for :data:`STEPS` steps three times: by the other package in float64 and in fp32, and by ours. What came of
it goes into ``tests/results/other_packages.json``, of which ``--page`` makes the table in docs/compared.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests" / "results" / "other_packages.json"
PAGE = ROOT / "docs" / "compared.md"

PACKAGES = {
    "schedulefree": "1.4.1",
    "ano-optimizer": "1.0.0",
    "grams-pytorch": "0.0.2",
    "adabound": "0.0.5",
    "timm": "1.0.31",
    "pytorch-optimizer": "4.1.0",
}
STEPS = 50
#: How far the two may be apart where they are to be the same, as a share of what the parameters have moved.
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Row:
    """A rule of ours beside that of a package.

    Attributes:
        ours: a class of signadam_ext, and its hyperparameters.
        package: of :data:`PACKAGES`.
        theirs: module and class, and its hyperparameters.
        differs: in what, where it is another rule; otherwise they are the same.
    """

    ours: str
    given: dict[str, Any]
    package: str
    theirs: str
    their: dict[str, Any]
    differs: str = ""


B = {"lr": 1e-2, "betas": (0.9, 0.99)}
DECAY = {"weight_decay": 0.1}
SMALL, TINY = {"eps": 1e-8}, {"eps": 1e-15}
TIMM, POD = "timm.optim", "pytorch_optimizer"
DECOUPLED = {**DECAY, "weight_decouple": True}

ROWS = (
    Row(
        "ScheduleFreeAdamW",
        {**B, **DECAY, "warmup_steps": 10, "r": 1.0},
        "schedulefree",
        "schedulefree.AdamWScheduleFree",
        {**B, **DECAY, "warmup_steps": 10, "r": 1.0},
    ),
    Row("Ano", {**B, **DECAY}, "ano-optimizer", "ano_optimizer.Ano", {**B, **DECAY}),
    Row(
        "Anolog",
        {"lr": 1e-2, "beta2": 0.99},
        "ano-optimizer",
        "ano_optimizer.Ano",
        {"lr": 1e-2, "betas": (0.9, 0.99), "logarithmic_schedule": True},
        "beta1 is 1 - 1/log(max(2, t)), which is -0.44 at first, where the paper has 1 - 1/log(t + 2)",
    ),
    Row("Grams", {**B, **DECAY, "eps": 1e-6}, "grams-pytorch", "grams.Grams", {**B, **DECAY, "eps": 1e-6}),
    Row("AdaBound", {**B, "final_lr": 0.1, "gamma": 0.1}, "adabound", "adabound.AdaBound", {**B, "gamma": 0.1}),
    Row(
        "AMSBound",
        {**B, "final_lr": 0.1, "gamma": 0.1},
        "adabound",
        "adabound.AdaBound",
        {**B, "gamma": 0.1, "amsbound": True},
    ),
    Row("LaProp", {**B, **TINY}, "timm", f"{TIMM}.LaProp", {**B, **TINY}),
    Row(
        "LaProp",
        {**B, **DECAY, **TINY},
        "timm",
        f"{TIMM}.LaProp",
        {**B, **DECAY, **TINY},
        "weights decay after the step, where ours do before it",
    ),
    Row(
        "ADOPT",
        {**B, "eps": 1e-6},
        "timm",
        f"{TIMM}.Adopt",
        {**B, "eps": 1e-6},
        "clips at step**0.333, where the authors have step**0.25",
    ),
    Row(
        "ADOPT",
        {**B, "eps": 1e-6, "clip": False},
        "timm",
        f"{TIMM}.Adopt",
        {**B, "eps": 1e-6, "clip_exp": None},
    ),
    Row(
        "MARSAdamW",
        {**B, "max_norm": 1.0},
        "timm",
        f"{TIMM}.Mars",
        {**B, "optimize_1d": True},
    ),
    Row("Lion", {**B, **DECAY}, "timm", f"{TIMM}.Lion", {**B, **DECAY}),
    Row(
        "AdEMAMix",
        {"lr": 1e-2, "betas": (0.9, 0.99, 0.999), "alpha": 2.0, **SMALL},
        "pytorch-optimizer",
        f"{POD}.AdEMAMix",
        {"lr": 1e-2, "betas": (0.9, 0.99, 0.999), "alpha": 2.0, **SMALL},
    ),
    Row(
        "Grams",
        {**B, "eps": 1e-3},
        "pytorch-optimizer",
        f"{POD}.Grams",
        {**B, "eps": 1e-3},
        "eps is added to the root after its bias correction, where the authors' code adds it before",
    ),
    Row(
        "BCOS",
        {"lr": 1e-2, "beta": 0.9, "eps": 1e-6},
        "pytorch-optimizer",
        f"{POD}.BCOS",
        {"lr": 1e-2, "beta": 0.9, "eps": 1e-6, "weight_decay": 0.0},
        "the second moment is of the new momentum, where the authors have the old one",
    ),
    Row(
        "ADOPT",
        {**B, "eps": 1e-6},
        "pytorch-optimizer",
        f"{POD}.ADOPT",
        {**B, "eps": 1e-6},
        "clips by a count of steps that begins at 1, where the authors' begins at 0",
    ),
    Row("LaProp", {**B, **TINY}, "pytorch-optimizer", f"{POD}.LaProp", {**B, **TINY}),
    Row("Lion", {**B, **DECAY}, "pytorch-optimizer", f"{POD}.Lion", {**B, **DECOUPLED}),
    Row(
        "Signum",
        {"lr": 1e-2, "beta": 0.9, **DECAY},
        "pytorch-optimizer",
        f"{POD}.Tiger",
        {"lr": 1e-2, "beta": 0.9, **DECOUPLED},
    ),
    Row(
        "ScheduleFreeAdamW",
        {**B, "warmup_steps": 10},
        "pytorch-optimizer",
        f"{POD}.ScheduleFreeAdamW",
        {**B, "warmup_steps": 10},
    ),
    Row("FOCUS", {**B, **DECAY, "gamma": 0.0}, "pytorch-optimizer", f"{POD}.FOCUS", {**B, **DECAY, "gamma": 0.0}),
    Row(
        "FOCUS",
        {**B, "gamma": 0.3},
        "pytorch-optimizer",
        f"{POD}.FOCUS",
        {**B, "gamma": 0.3},
        "the first step pulls by the signs of rounding errors, as in the authors' code, where ours pulls by none",
    ),
    Row(
        "AdamS",
        {**B, **SMALL},
        "pytorch-optimizer",
        f"{POD}.AdamS",
        {**B, **SMALL, "weight_decay": 0.0},
        "another method of the same name: Adam with stable weight decay",
    ),
)


def made(theirs: str) -> Any:
    module, _, name = theirs.rpartition(".")
    if module == TIMM:
        from support.torchvision_stub import import_timm

        import_timm()
    return getattr(importlib.import_module(module), name)


def trained(make: Callable[[list[Any]], Any], dtype: Any) -> list[Any]:
    """Parameters after training, in float64; in evaluation where there is such a mode."""
    import torch

    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((33, 17), (65,), (4, 3, 2))
    ]
    optimizer = make(params)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(STEPS):
        for param in params:
            size = 10.0 ** (3 * torch.rand(param.shape, generator=generator) - 2)
            param.grad = (torch.randn(param.shape, generator=generator) * size).to(dtype)
        optimizer.step()
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    return [param.detach().double() for param in params]


def compared(row: Row) -> dict[str, Any]:
    import torch

    import signadam_ext

    other = made(row.theirs)

    def theirs(params: list[Any]) -> Any:
        return other(params, **row.their)

    exact, start = (
        trained(theirs, torch.float64),
        trained(lambda params: torch.optim.SGD(params, lr=0.0), torch.float32),
    )
    fp32 = trained(theirs, torch.float32)
    ours = trained(lambda params: getattr(signadam_ext, row.ours)(params, **row.given), torch.float32)

    def apart(a: list[Any], b: list[Any]) -> float:
        return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))

    moved = apart(exact, start)
    return {
        "ours": row.ours,
        "package": row.package,
        "theirs": row.theirs.rpartition(".")[2],
        "differs": row.differs,
        "ours_apart": apart(ours, exact) / moved,
        "theirs_apart": apart(fp32, exact) / moved,
    }


def child() -> None:
    import torch

    warnings.simplefilter("ignore")
    sys.path.insert(1, str(ROOT / "tests"))
    print(json.dumps({"torch": torch.__version__, "rows": [compared(row) for row in ROWS]}))


def results() -> dict[str, Any]:
    """What a new environment says."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = [f"{name}=={version}" for name, version in PACKAGES.items()]
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-cache-dir", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--target", folder, *wanted], check=True)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join((folder, str(ROOT)))}
        run = [sys.executable, str(Path(__file__).resolve()), "--child"]
        told = subprocess.run(run, env=env, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return {"packages": PACKAGES, "python": platform.python_version(), "steps": STEPS, **found}


def faults(found: dict[str, Any]) -> list[str]:
    """Rows that are not as they are said to be."""
    return [
        f"{row['ours']} and {row['theirs']} of {row['package']}: {row['ours_apart']:.1e} apart"
        for row in found["rows"]
        if (row["ours_apart"] > TOLERANCE) != bool(row["differs"])
    ]


def table(found: dict[str, Any]) -> str:
    lines = [
        f"{found['steps']} steps with torch {found['torch']}. Distances are from the other package in float64, as "
        "shares of what its parameters have moved.",
        "",
        "| ours | the other | ours is off by | it is off by, in fp32 | |",
        "|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        other = f"`{row['theirs']}` of `{row['package']}` {found['packages'][row['package']]}"
        verdict = f"differs: {row['differs']}" if row["differs"] else "the same"
        lines.append(f"| `{row['ours']}` | {other} | {row['ours_apart']:.1e} | {row['theirs_apart']:.1e} | {verdict} |")
    return "\n".join(lines)


def write_page() -> None:
    from reporting.pages import replaced

    PAGE.write_text(replaced(PAGE.read_text("utf-8"), "compared", table(json.loads(RESULTS.read_text()))), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--page", action="store_true", help="only make the page of the results there are")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child()
    sys.path.insert(0, str(ROOT))
    if not given.page:
        found = results()
        if wrong := faults(found):
            raise SystemExit("\n".join(wrong))
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    write_page()


if __name__ == "__main__":
    main()
