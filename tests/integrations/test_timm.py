"""timm's optimizer factory, its groups with layer decay, and its schedulers; with a stub of torchvision."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
from support.tiny import copies, same
from support.torchvision_stub import import_timm
from torch import nn

from signadam_ext import SignAdamPP

if importlib.util.find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)
timm = import_timm()

from timm.optim import create_optimizer_v2, list_optimizers  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402

import signadam_ext.integrations.timm  # noqa: E402

DECAY = 0.5


def transformer() -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", **shape)


def step(model: nn.Module, optimizer: Any, number: int) -> None:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(number))
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_layer_decay_under_a_scheduler() -> None:
    model, plain = transformer(), transformer()
    optimizer = create_optimizer_v2(
        model, "signadampp", lr=1e-2, weight_decay=0.05, layer_decay=DECAY, state_dtype="int2"
    )
    assert type(optimizer) is SignAdamPP
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    assert sorted(set(scales)) == [DECAY**3, DECAY**2, DECAY, 1.0]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    schedule, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=4, warmup_epochs=0)

    schedule.step(0)

    names = {id(param): name for name, param in model.named_parameters()}
    twins = dict(plain.named_parameters())
    groups = [
        {"params": [twins[names[id(param)]] for param in group["params"]], "weight_decay": group["weight_decay"]}
        for group in optimizer.param_groups
    ]
    twin = SignAdamPP(groups, state_dtype="int2")
    for epoch in range(3):
        rate = 1e-2 * (1 + math.cos(math.pi * epoch / 4)) / 2
        for group, own in zip(optimizer.param_groups, twin.param_groups, strict=True):
            assert group["lr"] == pytest.approx(rate * group["lr_scale"])
            own["lr"] = group["lr"]
        step(model, optimizer, epoch)
        step(plain, twin, epoch)
        schedule.step(epoch + 1)
    assert same(model.parameters(), plain.parameters()) and not same(model.parameters(), transformer().parameters())

    # State dicts have timm's entries, and go on.
    saved = optimizer.state_dict()
    assert [group["lr_scale"] for group in saved["param_groups"]] == scales
    resumed = create_optimizer_v2(plain, "signadampp", lr=1.0, layer_decay=DECAY, state_dtype="int2")
    plain.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    step(model, optimizer, 3)
    step(plain, resumed, 3)
    assert same(model.parameters(), plain.parameters())


def test_one_beta_goes_by_its_own_name() -> None:
    for given, expected in (({"beta": 0.6}, 0.6), ({"betas": (0.6, 0.9)}, 0.9), ({"momentum": 0.6}, 0.9)):
        optimizer = create_optimizer_v2(nn.Linear(2, 2), "signadampp", lr=1e-3, **given)
        assert {group["betas"] for group in optimizer.param_groups} == {(expected,)}


@pytest.mark.parametrize("name", sorted(name for name in signadam_ext.integrations.CLASSES))
def test_every_class_by_its_name(name: str) -> None:
    found = signadam_ext.integrations.CLASSES[name]
    model = transformer()
    # What timm hands to all of its optimizers, and takes away from those that have no such argument.
    betas = (0.9, 0.95, 0.999) if name == "AdEMAMix" else (0.9, 0.95)
    optimizer = create_optimizer_v2(model, name, lr=1e-3, weight_decay=0.1, betas=betas, eps=1e-8)
    if name in ("Adam", "AdamW", "ADOPT", "LaProp", "Lion"):  # timm has its own
        assert not isinstance(optimizer, found)
        return
    assert type(optimizer) is found and name.lower() in list_optimizers()
    before = copies(model.parameters())
    step(model, optimizer, 0)
    assert not same(model.parameters(), before)
