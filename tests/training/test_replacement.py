"""``from_optimizer``: groups, schedulers and hyperparameters of an optimizer that is there."""

from __future__ import annotations

import json
import statistics
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from signadam_ext import Adam, AdamW, Lion, SignAdam, SignAdamPP, SignSGD, Signum, from_optimizer
from signadam_ext.training.replacement import SHARES

SEARCHES = Path(__file__).resolve().parents[2] / "experiments" / "results" / "convergence"
SCHEDULERS = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 10, eta_min=1e-4),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(
        optimizer, [0.1, 0.02], total_steps=10, cycle_momentum=False
    ),
    "sequence": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(optimizer, 7)],
        [3],
    ),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, min_lr=1e-3),
}


def groups() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    return [
        {"params": [("matrix", nn.Parameter(torch.randn(3, 4)))], "weight_decay": 0.1, "lr": 0.1},
        {"params": [("bias", nn.Parameter(torch.randn(3)))], "weight_decay": 0.0, "lr": 0.02},
    ]


def gradients(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)


def test_groups_go_over() -> None:
    old = torch.optim.AdamW(groups(), betas=(0.8, 0.95))
    said: list[str] = []
    new = from_optimizer(old, log=said.append, state_dtype="int2")
    assert type(new) is SignAdamPP
    for before, after in zip(old.param_groups, new.param_groups, strict=True):
        assert all(a is b for a, b in zip(before["params"], after["params"], strict=True))
        assert after["param_names"] == before["param_names"]
        assert after["lr"] == pytest.approx(0.6 * before["lr"])
        assert after["weight_decay"] == before["weight_decay"] and after["decoupled_weight_decay"]
        assert after["betas"] == (0.8,) and after["state_dtype"] == "int2"
    assert [group["lr"] for group in old.param_groups] == [0.1, 0.02]
    assert said[0] == "AdamW -> SignAdamPP: learning rates times 0.6, a rule of thumb"
    assert "lr 0.1 -> 0.06" in said[1] and "without" in said[1] and "eps" in said[1]
    assert said[-1] == "state begins anew; schedulers: none"
    gradients(new)
    new.step()


@pytest.mark.skipif(not SEARCHES.is_dir(), reason="neither a source distribution nor a wheel holds results")
def test_shares_are_the_medians_of_the_searches() -> None:
    """To one digit; against AdamW with the betas that every problem was searched with."""
    searched = [json.loads(path.read_text("utf-8"))["methods"] for path in sorted(SEARCHES.glob("*.json"))]
    assert len(searched) == 3
    names = {SignAdamPP: "sign_adam_pp", Signum: "signum", Lion: "lion", SignAdam: "sign_adam"}
    assert SHARES.keys() == {Adam, AdamW, *names} and SHARES[Adam] == SHARES[AdamW] == 1
    shares: dict[type, list[float]] = {}
    for cls, name in names.items():
        for methods in searched:
            if name in methods:
                for method in (methods[name], methods["adamw"]):
                    assert float(min(method["search"], key=method["search"].get)) == method["lr"]
                shares.setdefault(cls, []).append(methods[name]["lr"] / methods["adamw"]["lr"])
        assert round(statistics.median(shares[cls]), 1) == SHARES[cls], name
    least, *_, most = sorted(round(share, 1) for share in shares[SignAdamPP])
    assert f"(from {least} to {most} by problem)" in from_optimizer.__doc__


@pytest.mark.parametrize("cls, share", [(SignAdamPP, 0.6), (Signum, 0.2), (Lion, 0.2), (AdamW, 1.0)])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_go_over(kind: str, cls: type, share: float) -> None:
    """A schedule that is under way has the rates it would have had, times the share."""
    old, twin = torch.optim.AdamW(groups()), torch.optim.AdamW(groups())
    scheduler, other = SCHEDULERS[kind](old), SCHEDULERS[kind](twin)
    told = (1.0,) if kind == "plateau" else ()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The epoch parameter in", UserWarning)  # torch's SequentialLR gives it
        for step in range(8):
            optimizer: Any = old
            if step == 2:
                new = from_optimizer(old, cls, log=lambda line: None)
                assert scheduler.optimizer is new
            if step >= 2:
                optimizer = new
            for each in (optimizer, twin):
                gradients(each)
                each.step()
            scheduler.step(*told)
            other.step(*told)
            factor = share if step >= 2 else 1.0
            rates = [group["lr"] for group in optimizer.param_groups]
            assert rates == pytest.approx([factor * group["lr"] for group in twin.param_groups], rel=1e-9)


def test_a_scheduler_that_has_not_begun_does_not_warn() -> None:
    old = torch.optim.AdamW(groups())
    scheduler = SCHEDULERS["cosine"](old)
    new = from_optimizer(old, log=lambda line: None)
    gradients(new)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new.step()
        scheduler.step()


@pytest.mark.parametrize("cls", [torch.optim.AdamW, AdamW], ids=["torch", "ours"])
def test_adamw_s_state_goes_over(cls: type) -> None:
    old, twin = cls(groups()), cls(groups())
    for optimizer in (old, twin):
        for _ in range(3):
            gradients(optimizer)
            optimizer.step()
    new = from_optimizer(old, AdamW, log=lambda line: None)
    gradients(new)
    gradients(twin)
    new.step()
    twin.step()
    for group, other in zip(new.param_groups, twin.param_groups, strict=True):
        for param, same in zip(group["params"], other["params"], strict=True):
            assert torch.allclose(param, same, rtol=1e-6)
            assert int(new.state[param]["step"]) == 4


def test_proxies_of_what_is_gone_are_not_asked() -> None:
    class Gone:
        pass

    dead = weakref.proxy(Gone())
    scheduler = SCHEDULERS["cosine"](old := torch.optim.AdamW(groups()))
    assert scheduler.optimizer is not from_optimizer(torch.optim.AdamW(groups()), log=lambda line: None)
    assert scheduler.optimizer is old
    del dead


def test_the_learning_rate_can_be_said() -> None:
    old = torch.optim.SGD(groups(), momentum=0.9)
    with pytest.raises(ValueError, match="no rule of thumb leads from the learning rates of SGD to those of Signum"):
        from_optimizer(old, Signum)
    new = from_optimizer(old, Signum, lr=0.01, log=lambda line: None)
    assert [group["lr"] for group in new.param_groups] == pytest.approx([0.01, 0.002])
    assert new.param_groups[0]["betas"] == (0.9,)


def test_what_makes_no_sense_is_refused() -> None:
    old = torch.optim.AdamW(groups())
    scheduler = SCHEDULERS["cosine"](old)
    with pytest.raises(TypeError, match="must be an optimizer class of signadam_ext"):
        from_optimizer(old, torch.optim.SGD)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="old is a list: must be an optimizer"):
        from_optimizer([], SignAdamPP)  # type: ignore[arg-type]
    with pytest.raises((TypeError, ValueError), match="state_dtype"):
        from_optimizer(old, SignAdamPP, state_dtype="int3")
    with pytest.raises(ValueError, match="no rule of thumb"):
        from_optimizer(old, SignSGD)
    assert scheduler.optimizer is old and scheduler.base_lrs == [0.1, 0.02]


@pytest.mark.parametrize("cls", [torch.optim.AdamW, AdamW])
def test_what_was_asked_for_goes_over(cls) -> None:
    """Who takes a GradScaler's scale in the step goes on to do so."""
    for fused in (False, True):
        old = cls([torch.nn.Parameter(torch.ones(3))], fused=fused)
        new = from_optimizer(old, SignAdamPP, log=lambda line: None)
        assert getattr(new, "_step_supports_amp_scaling", False) == fused
