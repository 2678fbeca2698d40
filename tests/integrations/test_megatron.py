"""Megatron's registry of emerging optimizers, by its interface and, where the packages are, themselves."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support import megatron as interface
from support.ranks import Ranks
from support.tiny import batch, loss_of, network, same

from signadam_ext import Lion, SignAdam, SignAdamPP

HAS_PACKAGES = all(importlib.util.find_spec(name) for name in ("megatron", "emerging_optimizers", "absl"))


@pytest.fixture
def standing_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    return interface.put_in_place(monkeypatch)


def test_what_the_registry_makes(standing_in: dict[str, ModuleType]) -> None:
    from signadam_ext.integrations import megatron

    assert megatron.register(SignAdamPP, state_dtype="bf16") == "sign_adam_pp"
    assert megatron.register(SignAdam) == "sign_adam"
    entries = standing_in["megatron.core.optimizer.emerging_optimizers"]
    assert standing_in["emerging_optimizers.registry"].get_optimizer_cls("sign_adam_pp") is SignAdamPP
    # No parameter goes to Adam.
    assert entries._EMERGING_OPTIMIZERS["sign_adam_pp"].default_param_overrides == {}
    model = network()
    config = SimpleNamespace(lr=1e-2, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95)
    groups = [{"params": list(model.parameters()), "wd_mult": 1.0}]
    optimizer, make_state = entries._create_emerging_optimizer(config, groups, "sign_adam_pp", [model], None)
    (group,) = optimizer.param_groups
    assert type(optimizer) is SignAdamPP
    assert [group[name] for name in ("lr", "weight_decay", "state_dtype", "wd_mult")] == [1e-2, 0.1, "bf16", 1.0]
    make_state(optimizer, config)
    assert all(optimizer.state[param]["exp_avg"].shape == param.shape for param in model.parameters())
    assert same(model.parameters(), network().parameters()) and group["lr"] == 1e-2
    loss_of(model, batch(0)).backward()
    optimizer.step()
    assert not same(model.parameters(), network().parameters())


def test_fp32_copies_take_the_place_of_bf16_parameters(standing_in: dict[str, ModuleType]) -> None:
    """As ``Float16OptimizerWithFloat16Params`` puts them into the groups; it asks for a GPU."""
    from signadam_ext.integrations import megatron

    name = megatron.register(SignAdamPP, state_dtype="int2")
    entries = standing_in["megatron.core.optimizer.emerging_optimizers"]
    config = SimpleNamespace(lr=1e-2, weight_decay=0.1)
    params = list(network().bfloat16().parameters())
    optimizer, _ = entries._create_emerging_optimizer(config, [{"params": params}], name, [], None)
    copies = [param.detach().clone().float() for param in params]
    for index, copy in enumerate(copies):
        optimizer.param_groups[0]["params"][index] = copy
    optimizer.load_state_dict(optimizer.state_dict())
    twins = [torch.nn.Parameter(copy.clone()) for copy in copies]
    plain = SignAdamPP(twins, lr=1e-2, weight_decay=0.1, state_dtype="int2")
    for number in range(3):
        for copy, twin in zip(copies, twins, strict=True):
            copy.grad = torch.randn(copy.shape, generator=torch.Generator().manual_seed(number))
            twin.grad = copy.grad.clone()
        optimizer.step()
        plain.step()
    assert same(copies, twins) and not same(copies, [param.float() for param in params])


def test_names(standing_in: dict[str, ModuleType]) -> None:
    from signadam_ext.integrations import megatron

    for name in ("adam", "muon"):
        with pytest.raises(ValueError, match=f"name='{name}'"):
            megatron.register(SignAdamPP, name)
    assert megatron.register(Lion, "signadam_lion") == "signadam_lion"
    assert megatron.register(Lion, "signadam_lion", betas=(0.9, 0.98)) == "signadam_lion"
    with pytest.raises(ValueError, match="signadam_lion"):
        megatron.register(SignAdamPP, "signadam_lion")
    parser = argparse.ArgumentParser()
    parser.add_argument("--optimizer", choices=["adam", "muon"])
    found = megatron.add_arguments(parser).parse_args(["--optimizer", "signadam_lion"])
    assert found.optimizer == "signadam_lion"


@pytest.mark.skipif(not HAS_PACKAGES, reason="megatron-core, emerging-optimizers or absl-py is not installed")
def test_megatrons_optimizer_and_schedule(ranks: Callable[[int], Ranks]) -> None:
    options: dict[str, Any] = {"state_dtype": "bf16"}
    for found in ranks(2).run(interface.trained, options):
        assert same(found["weights"], interface.plain(found["used"], options)) and not found["unchanged"]
        assert same(found["resumed"], found["weights"])
        # Megatron's rates and decays are used, and its groups: no decay for vectors.
        assert len({lr for lr, *_ in found["used"]}) > 1 and {numbers[3] for numbers in found["used"]} == {0.0}


@pytest.mark.skipif(not HAS_PACKAGES, reason="megatron-core, emerging-optimizers or absl-py is not installed")
def test_megatrons_sharded_state_takes_tensors_of_the_parameters_shape_alone(ranks: Callable[[int], Ranks]) -> None:
    """So the forms whose state has numbers beside tensors train there, but are not saved by it."""
    options: dict[str, Any] = {"state_dtype": "int2"}
    for found in ranks(2).run(interface.trained, options):
        assert same(found["weights"], interface.plain(found["used"], options))
        assert "error" in found
