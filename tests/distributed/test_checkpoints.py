"""Distributed checkpoints: saved by so many ranks and loaded by others, resumed bit for bit."""

from __future__ import annotations

import pytest
import torch
from support import sharded
from support.strategies import same_bits

BF16 = torch.bfloat16
FORMS = {
    "fp32": (torch.float32, {}),
    "bf16-master": (BF16, {"state_dtype": "bf16", "param_storage": "master"}),
    "int8-split8": (BF16, {"state_dtype": "int8", "param_storage": "split8"}),
    "int4-split16": (BF16, {"state_dtype": "int4", "param_storage": "split16"}),
    "int2-stochastic": (BF16, {"state_dtype": "int2", "param_storage": "stochastic"}),
}


def same(runs, other):
    return all(
        same_bits(a, b) for mine, theirs in zip(runs, other, strict=False) for a, b in zip(mine, theirs, strict=True)
    )


@pytest.mark.parametrize("flattened", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_saved_by_four_ranks_and_loaded_by_others(ranks, tmp_path, form, flattened):
    dtype, options = form
    arguments = (str(tmp_path / "saved"), "SignAdamPP", {"lr": 0.01, **options}, dtype)
    expected = ranks(4).run(sharded.saved_and_trained_on, *arguments, True, flattened)
    for count, is_sharded in ((1, False), (1, True), (2, True), (3, True), (4, True)):
        resumed = ranks(count).run(sharded.loaded_and_trained_on, *arguments, is_sharded, flattened)
        assert same(resumed, expected), (count, is_sharded)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_saved_by_one_process_and_loaded_by_ranks(ranks, tmp_path, form):
    dtype, options = form
    arguments = (str(tmp_path / "saved"), "SignAdamPP", {"lr": 0.01, **options}, dtype)
    expected = ranks(1).run(sharded.saved_and_trained_on, *arguments, False, False)
    resumed = ranks(2).run(sharded.loaded_and_trained_on, *arguments, True, False)
    assert same(resumed, expected)


def test_saved_while_training_goes_on(ranks, tmp_path):
    arguments = (str(tmp_path / "saved"), "SignAdam", {"lr": 0.01}, torch.float32)
    expected = ranks(2).run(sharded.saved_and_trained_on, *arguments, True, False, True)
    assert same(ranks(2).run(sharded.loaded_and_trained_on, *arguments, True, False), expected)


def test_of_torchs_adamw(ranks, tmp_path):
    assert ranks(2).run(sharded.takes_over_adamw, str(tmp_path / "saved")) == [None] * 2
