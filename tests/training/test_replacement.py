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
from torch.optim import lr_scheduler, swa_utils

from signadam_ext import (
    FOCUS,
    MSVAG,
    SVAG,
    AdaBound,
    Adam,
    AdaMomentum,
    AdamStar,
    AdamW,
    AdEMAMix,
    AMSBound,
    Lion,
    MARSAdamW,
    ScheduleFreeAdamW,
    ScheduleFreeSign,
    SignAdam,
    SignAdamPP,
    SignSGD,
    Signum,
    from_optimizer,
)
from signadam_ext.integrations import CLASSES
from signadam_ext.training import replacement
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
    "cyclic": lambda optimizer: lr_scheduler.CyclicLR(optimizer, [1e-3, 1e-4], [0.1, 0.02], 4, cycle_momentum=False),
    "averaging": lambda optimizer: swa_utils.SWALR(optimizer, [0.05, 0.01], anneal_epochs=6),
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


CYCLES = {
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, [0.1, 0.02], total_steps=10),
    "cyclic": lambda optimizer: lr_scheduler.CyclicLR(optimizer, [1e-3, 1e-4], [0.1, 0.02], 4),
}


@pytest.mark.parametrize("kind", CYCLES)
@pytest.mark.parametrize(
    "old_cls, cls, betas",
    [
        (torch.optim.AdamW, SignAdamPP, ()),
        (torch.optim.AdamW, AdamW, (0.999,)),
        (torch.optim.AdamW, Lion, (0.99,)),
        (torch.optim.SGD, Signum, ()),
        (torch.optim.SGD, AdamW, (0.999,)),
        (SignAdamPP, Lion, (0.99,)),
        (AdamW, SignAdamPP, ()),
        (Signum, Signum, ()),
    ],
)
def test_a_momentum_goes_on_in_its_cycle(kind: str, old_cls: type, cls: type, betas: tuple[float, ...]) -> None:
    """Also where torch's optimizer has it under another name."""
    own = {"momentum": 0.9} if old_cls is torch.optim.SGD else {}
    old, twin = old_cls(groups(), **own), old_cls(groups(), **own)
    scheduler, other = CYCLES[kind](old), CYCLES[kind](twin)
    given = {"lr": 1e-4} if own else {}
    optimizer, momenta = old, set()
    for step in range(8):
        if step == 3:
            before = old.param_groups[0]["lr"]
            optimizer = from_optimizer(old, cls, log=lambda line: None, **given)
            share = optimizer.param_groups[0]["lr"] / before
        for each in (optimizer, twin):
            gradients(each)
            each.step()
        scheduler.step()
        other.step()
        for group, same in zip(optimizer.param_groups, twin.param_groups, strict=True):
            momentum = same["betas"][0] if "betas" in same else same["momentum"]
            momenta.add(momentum)
            if step >= 3:
                assert group["lr"] == pytest.approx(share * same["lr"], rel=1e-9)
                assert group["betas"] == (pytest.approx(momentum, rel=1e-12), *betas)
    assert len(momenta) > 2


def test_what_others_keep_in_a_group_stays() -> None:
    old = torch.optim.AdamW([{**group, "head": "mine", "lr_scale": 0.5} for group in groups()])
    after = from_optimizer(old, SignAdamPP, log=lambda line: None).param_groups[1]
    assert after["head"] == "mine" and after["lr_scale"] == 0.5


def test_the_log_says_where_the_learning_rate_comes_from() -> None:
    def first_line(old: Any, cls: type, **changes: Any) -> str:
        said: list[str] = []
        from_optimizer(old, cls, log=said.append, **changes)
        return said[0]

    old = torch.optim.AdamW(groups())
    assert first_line(old, SignAdamPP) == "AdamW -> SignAdamPP: learning rates times 0.6, a rule of thumb"
    assert first_line(old, SignAdamPP, lr=0.03) == "AdamW -> SignAdamPP: learning rates times 0.3, as lr= says"
    assert first_line(old, AdamW) == "AdamW -> AdamW: learning rates as they were"
    assert first_line(FOCUS(groups()), FOCUS) == "FOCUS -> FOCUS: learning rates as they were"


def test_the_log_says_what_is_left_out() -> None:
    said: list[str] = []
    from_optimizer(torch.optim.SGD(groups(), momentum=0.7, nesterov=True), Signum, log=said.append, lr=0.1)
    assert said[1] == "group 0: momentum 0.7 -> betas (0.7,); without dampening, nesterov"
    from_optimizer(FOCUS(groups(), betas=(0.8, 0.95)), Signum, log=said.append, lr=0.1)
    assert said[5] == "group 0: betas (0.8, 0.95) -> (0.8,); without gamma"
    said.clear()
    from_optimizer(torch.optim.RMSprop(groups(), alpha=0.7), SignAdamPP, log=said.append, lr=0.1, beta=0.8)
    assert said[1] == "group 0: as it was; without alpha, centered, eps, momentum"  # alpha is no threshold


def test_the_learning_rate_that_is_said_is_the_first_group_s_exactly() -> None:
    for rate in (3e-4, 7e-5, 0.123):
        new = from_optimizer(torch.optim.SGD(groups()), Lion, lr=rate, log=lambda line: None)
        assert new.param_groups[0]["lr"] == rate


def test_a_learning_rate_in_place_of_0() -> None:
    """Nothing is in proportion to 0; under a scheduler the rate that it began with counts."""
    old = torch.optim.SGD(groups())
    old.param_groups[0]["lr"] = 0.0
    with pytest.raises(ValueError, match=r"lr=0.01 where the lr of the first group is 0"):
        from_optimizer(old, Signum, lr=0.01)
    old = torch.optim.SGD(groups())
    scheduler = lr_scheduler.LambdaLR(old, lambda step: step / 4)
    new = from_optimizer(old, Signum, lr=0.01, log=lambda line: None)
    assert [group["lr"] for group in new.param_groups] == [0.0, 0.0]
    gradients(new)
    new.step()
    scheduler.step()
    assert [group["lr"] for group in new.param_groups] == pytest.approx([0.0025, 0.0005])


def test_the_rates_that_decay_is_measured_by_are_those_a_schedule_began_with() -> None:
    """From torch's group ``initial_lr``; ours keeps them itself. A warm-up from 0 then has a decay to be measured."""
    old = torch.optim.AdamW(groups())
    scheduler = lr_scheduler.LambdaLR(old, lambda step: step / 4)
    given = from_optimizer(old, SignAdamPP, log=lambda line: None, base_lr=0.25, largest_lr=0.5)
    assert [(group["base_lr"], group["largest_lr"]) for group in given.param_groups] == [(0.25, 0.5)] * 2
    new = from_optimizer(old, SignAdamPP, log=lambda line: None, weight_decay_scale="fully_decoupled")
    for group, began in zip(new.param_groups, (0.1, 0.02), strict=True):
        assert group["lr"] == 0
        assert group["base_lr"] == group["largest_lr"] == group["initial_lr"] == pytest.approx(0.6 * began)
    assert scheduler.optimizer is given
    new.param_groups[0].update(base_lr=0.5, largest_lr=0.7)
    newer = from_optimizer(new, AdamW, log=lambda line: None)
    assert newer.param_groups[0]["base_lr"] == pytest.approx(0.5 / 0.6)
    assert newer.param_groups[0]["largest_lr"] == pytest.approx(0.7 / 0.6)


@pytest.mark.parametrize(
    "cls, changes, message",
    [
        (SignAdamPP, {"state_dtyp": "int2"}, "did you mean 'state_dtype'"),
        (SignAdamPP, {"confidense": "adaptive"}, "did you mean 'confidence'"),
        (SignAdamPP, {"max_grad_nrm": 1.0}, "did you mean 'max_grad_norm'"),
        (SignAdamPP, {"momentum": 0.9}, "unexpected keyword argument 'momentum'"),
        (Signum, {"eps": 1e-8}, "unexpected keyword argument 'eps'"),
        (Signum, {"confidence": "fixed"}, "unexpected keyword argument 'confidence'"),
        (Signum, {"betas": (0.9,)}, "this rule has one, beta="),
        (SignSGD, {"state_dtype": "bf16", "lr": 1e-3}, "unexpected keyword argument 'state_dtype'"),
    ],
)
def test_what_the_constructor_does_not_take_is_refused(cls: type, changes: dict[str, Any], message: str) -> None:
    old = torch.optim.AdamW(groups())
    scheduler = SCHEDULERS["cosine"](old)
    with pytest.raises(TypeError) as direct:
        cls(groups(), **changes)
    with pytest.raises(TypeError, match=message) as error:
        from_optimizer(old, cls, **changes)
    assert str(error.value) == str(direct.value)
    assert scheduler.optimizer is old and scheduler.base_lrs == [0.1, 0.02]


def test_changes_are_of_all_groups_and_of_those_that_come() -> None:
    old = torch.optim.AdamW(groups(), lr=0.5, betas=(0.8, 0.95), weight_decay=0.3, maximize=True, fused=True)
    new = from_optimizer(old, Lion, log=lambda line: None, betas=(0.7, 0.9), fused=False, weight_decay=0.2)
    new.add_param_group({"params": [("new", nn.Parameter(torch.ones(2)))]})
    assert [group["betas"] for group in new.param_groups] == [(0.7, 0.9)] * 3
    assert [group["weight_decay"] for group in new.param_groups] == [0.2] * 3
    assert new.param_groups[2]["lr"] == 0.1 and new.param_groups[2]["maximize"]
    assert not getattr(new, "_step_supports_amp_scaling", False)


def replaced(old: Any, cls: type, **changes: Any) -> dict[str, Any]:
    """The first group of what comes in place of an optimizer, after a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replacement, "_schedulers_of", lambda optimizer: [])  # which looks at every object there is
        new = from_optimizer(old, cls, log=lambda line: None, lr=1e-3, **changes)
    gradients(new)
    new.step()
    group: dict[str, Any] = new.param_groups[0]
    return group


def test_a_name_that_means_something_else_does_not_go_over() -> None:
    begun = {cls: cls(groups()).param_groups[0] for cls in (AdaBound, MARSAdamW, AdEMAMix, SignAdamPP, AdamW)}
    for foreign in (torch.optim.RMSprop, torch.optim.ASGD):
        for cls in (SignAdamPP, AdEMAMix):
            assert replaced(foreign(groups()), cls)["alpha"] == begun[cls]["alpha"]
    assert replaced(torch.optim.RMSprop(groups(), eps=1e-3), AdamW)["eps"] == begun[AdamW]["eps"]
    for cls in (AdaBound, MARSAdamW):
        assert replaced(FOCUS(groups(), gamma=0.3), cls)["gamma"] == begun[cls]["gamma"]
    assert replaced(ScheduleFreeSign(groups(), alpha=0.3), AdEMAMix)["alpha"] == begun[AdEMAMix]["alpha"]
    after = replaced(torch.optim.SGD(groups(), momentum=0.7), AdamStar)
    assert after["momentum"] is True and after["betas"] == (0.7,)
    assert replaced(AdamStar(groups(), momentum=False), Signum)["betas"] == (0.9,)
    # Lion's second beta decays its momentum, and AdaMomentum's eps lies under the root.
    assert replaced(torch.optim.AdamW(groups(), betas=(0.8, 0.95)), Lion)["betas"] == (0.8, 0.99)
    assert replaced(Lion(groups(), betas=(0.8, 0.95)), AdamW)["betas"] == (0.8, 0.999)
    assert replaced(torch.optim.AdamW(groups(), eps=1e-3), AdaMomentum)["eps"] == 1e-8


def test_what_means_the_same_goes_over() -> None:
    before = AdamW(groups(), betas=(0.8, 0.95), eps=1e-3, maximize=True, seed=7, max_grad_norm=2.0, caution="exact")
    after = replaced(before, SignAdam)
    for name in ("betas", "eps", "maximize", "seed", "max_grad_norm", "caution", "state_dtype", "backend"):
        assert after[name] == before.param_groups[0][name], name
    after = replaced(torch.optim.AdamW(groups(), betas=(0.8, 0.95), eps=1e-3, amsgrad=True, maximize=True), AdamW)
    assert after["betas"] == (0.8, 0.95) and after["eps"] == 1e-3 and after["amsgrad"] and after["maximize"]
    after = replaced(ScheduleFreeAdamW(groups(), warmup_steps=5, r=1.0, weight_lr_power=1.0), ScheduleFreeSign)
    assert (after["warmup_steps"], after["r"], after["weight_lr_power"], after["k"]) == (5, 1.0, 1.0, 1)
    after = replaced(AdaBound(groups(), final_lr=0.3, gamma=0.2), AMSBound)
    assert after["final_lr"] == 0.3 and after["gamma"] == 0.2
    for cls in (SVAG, AdamStar):
        assert replaced(MSVAG(groups(), bias_correct_variance=False), cls)["bias_correct_variance"] is False
    assert replaced(Adam(groups(), amsgrad=True), AdamW)["amsgrad"]


def test_thresholds_of_one_kind_go_over() -> None:
    for cls in (SignSGD, ScheduleFreeSign, SignAdamPP):
        assert replaced(SignSGD(groups(), alpha=0.3), cls)["alpha"] == 0.3
        assert replaced(SignAdamPP(groups(), alpha=0.3), cls)["alpha"] == 0.3
        adaptive = SignAdamPP(groups(), confidence="adaptive", alpha=0.3)
        assert replaced(adaptive, cls)["alpha"] == (0.3 if cls is SignAdamPP else 0.0)
    assert replaced(SignAdamPP(groups()), ScheduleFreeSign)["alpha"] == 0.0
    assert replaced(SignSGD(groups(), alpha=0.3), SignAdamPP, confidence="adaptive")["alpha"] is None
    steered = SignAdamPP(groups(), confidence="sparsity", target=0.2)
    assert replaced(steered, SignAdamPP)["target"] == 0.2
    after = replaced(steered, SignAdamPP, confidence="adaptive")
    assert after["target"] is None and after["alpha"] is None


@pytest.mark.parametrize(
    "cls, kind",
    [
        (torch.optim.SGD, False),
        (torch.optim.RMSprop, False),
        (torch.optim.Adam, False),
        (torch.optim.Adamax, False),
        (torch.optim.NAdam, False),
        (torch.optim.AdamW, True),
        (torch.optim.Adafactor, True),
    ],
)
def test_the_kind_of_a_decay_goes_over(cls: type, kind: bool) -> None:
    after = replaced(cls(groups(), lr=1e-3), Signum)
    assert after["decoupled_weight_decay"] is kind and after["weight_decay"] == 0.1


def test_of_a_decay_that_is_none_none_is_made() -> None:
    assert replaced(torch.optim.Rprop([nn.Parameter(torch.ones(3))]), AdamW)["weight_decay"] == 0


def test_betas_of_every_number() -> None:
    """As many as both have; the others are the class's own."""
    by_count = {1: SignAdamPP, 2: AdamW, 3: AdEMAMix}
    cases: list[tuple[tuple[float, ...], type, tuple[float, ...]]] = [
        ((0.8, 0.95, 0.999), AdEMAMix, (0.8, 0.95, 0.999)),
        ((0.8, 0.95), AdEMAMix, (0.8, 0.95, 0.9999)),
        ((0.8, 0.95, 0.999), AdamW, (0.8, 0.95)),
        ((0.8, 0.95, 0.999), Signum, (0.8,)),
        ((0.8,), AdEMAMix, (0.8, 0.999, 0.9999)),
        ((0.8,), AdamW, (0.8, 0.999)),
        ((0.8,), SignSGD, ()),
    ]
    for betas, cls, expected in cases:
        own: dict[str, Any] = {"beta": betas[0]} if len(betas) == 1 else {"betas": betas}
        assert replaced(by_count[len(betas)](groups(), **own), cls)["betas"] == expected, cls


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_every_class_takes_the_place_of_others(cls: type) -> None:
    for old in (torch.optim.AdamW, torch.optim.SGD, AdEMAMix, AdaBound, AdamStar, ScheduleFreeSign, SignAdamPP):
        replaced(old(groups()), cls)


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_the_same_class_goes_on_bit_for_bit(cls: type) -> None:
    """With the same random bits, and the same entries in its groups."""

    def bf16() -> list[dict[str, Any]]:
        found = groups()
        for group in found:
            group["params"] = [(name, nn.Parameter(param.detach().bfloat16())) for name, param in group["params"]]
        return found

    options: dict[str, Any] = {"seed": 7, "param_storage": "stochastic", "weight_decay_kind": "decoupled"}
    if "state_dtype" in cls.COMMON:
        options["state_dtype"] = ("fp32", "bf16") if cls is ScheduleFreeAdamW else "bf16"
    old, twin = cls(bf16(), **options), cls(bf16(), **options)
    optimizer = old
    for step in range(6):
        if step == 3:
            optimizer = from_optimizer(old, cls, log=lambda line: None)
        for each in (optimizer, twin):
            gradients(each)
            each.step()
    assert optimizer is not old
    for group, same in zip(optimizer.param_groups, twin.param_groups, strict=True):
        assert {**group, "params": None} == {**same, "params": None}
        for param, other in zip(group["params"], same["params"], strict=True):
            assert torch.equal(param, other)
            state, expected = optimizer.state[param], twin.state[other]
            assert state.keys() == expected.keys()
            for name in state:
                assert torch.equal(torch.as_tensor(state[name]), torch.as_tensor(expected[name])), name


def test_a_schedule_free_optimizer_is_replaced_in_either_mode() -> None:
    old, twin = ScheduleFreeAdamW(groups()), ScheduleFreeAdamW(groups())
    for each in (old, twin):
        for _ in range(3):
            gradients(each)
            each.step()
    old.eval()
    new = from_optimizer(old, ScheduleFreeAdamW, log=lambda line: None)
    assert isinstance(new, ScheduleFreeAdamW)
    new.train()
    for group, same in zip(new.param_groups, twin.param_groups, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(group["params"], same["params"], strict=True))
        assert group["k"] == 3
    new.eval()
    replaced(new, ScheduleFreeSign)  # which begins in training


def test_a_function_of_confidence_can_be_replaced() -> None:
    old = SignAdamPP(groups(), confidence=lambda g, alpha: g)
    gradients(old)
    old.step()
    assert replaced(old, SignAdamPP)["confidence"] is old.param_groups[0]["confidence"]
    assert replaced(old, SignAdamPP, confidence="fixed")["confidence"] == "fixed"


def test_learning_rates_in_tensors_stay_tensors() -> None:
    old = torch.optim.AdamW([nn.Parameter(torch.ones(3))], lr=torch.tensor(0.25))
    new = from_optimizer(old, SignAdamPP, log=lambda line: None)
    assert torch.is_tensor(new.param_groups[0]["lr"]) and float(new.param_groups[0]["lr"]) == pytest.approx(0.15)
    assert float(old.param_groups[0]["lr"]) == 0.25


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


def test_schedule_free_keeps_its_first_beta() -> None:
    """A change of it is refused before anything moves, and a schedule that cycles it goes on without that."""
    param = torch.nn.Parameter(torch.ones(3))
    old = ScheduleFreeSign([param], lr=0.1)
    param.grad = torch.ones(3)
    old.step()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(old, 0.5)
    with pytest.raises(ValueError, match=r"the first beta is 0\.8, and was 0\.9 in the steps before"):
        from_optimizer(old, ScheduleFreeSign, beta=0.8, log=lambda line: None)
    assert scheduler.optimizer is old
    adamw = torch.optim.AdamW([param])
    cycle = torch.optim.lr_scheduler.OneCycleLR(adamw, 0.1, total_steps=9)
    new = from_optimizer(adamw, ScheduleFreeAdamW, lr=0.1, log=lambda line: None)
    for _ in range(4):
        new.step()
        cycle.step()
    new.eval()
