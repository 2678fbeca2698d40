"""Which backend serves a part that lies in several runs in the whole parameter."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from signadam_ext import Signum, backends
from signadam_ext.core.formats import BOUNDED
from signadam_ext.core.rule import rule_of
from signadam_ext.core.shard_index import WHOLE, ShardIndex
from signadam_ext.engine import participants
from signadam_ext.optimizers.sign_adam_pp import RULES

RUNS = ShardIndex(3, run=5, stride=9)


def item(backend: str, form: str, shard: ShardIndex) -> participants.Item:
    """As of a CUDA parameter, of which only dtype and device are asked for."""
    param = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    forms = (BOUNDED[form],)
    return participants.Item("w", param, 0, RULES["fixed"], backend, False, lambda: None, forms, shard=shard)


@pytest.fixture
def usable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "triton"):
        monkeypatch.setattr(type(backends.get(name)), "unusable", lambda self, device: None)


def test_the_cuda_backend_refuses_it_by_name(usable: None) -> None:
    with pytest.raises(
        RuntimeError, match=r"w is a DTensor whose part lies in several runs.*backend='auto' or 'triton'"
    ):
        participants._backend(item("cuda", "int2", RUNS))
    # Nothing is drawn, or it is one run.
    assert participants._backend(item("cuda", "fp32", RUNS)).name == "cuda"
    assert participants._backend(item("cuda", "int2", WHOLE)).name == "cuda"


def test_scaled_steps_take_triton_where_it_is(usable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = rule_of(Signum, {"caution": "delayed", "nesterov": False})
    names = [
        participants._backend(dataclasses.replace(item(backend, "fp32", WHOLE), rule=scaled)).name
        for backend in ("auto", "cuda", "triton")
    ]
    assert names == ["triton", "cuda", "triton"]
    monkeypatch.setattr(type(backends.get("triton")), "unusable", lambda self, device: "it is not here")
    assert participants._backend(dataclasses.replace(item("auto", "fp32", WHOLE), rule=scaled)).name == "cuda"


def test_auto_takes_triton(usable: None) -> None:
    assert participants._backend(item("auto", "int2", RUNS)).name == "triton"


def test_auto_takes_the_reference_without_triton(usable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(backends.get("triton")), "unusable", lambda self, device: "it is not here")
    assert participants._backend(item("auto", "int2", RUNS)).name == "reference"
