"""torchtitan trains with these optimizers by the recipe of the example, on CPU processes, and resumes bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import titan
from support.strategies import same_bits
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

pytest.importorskip("torchtitan", reason="torchtitan is not installed")

INT2 = {"lr": 3e-3, "state_dtype": "int2", "param_storage": "stochastic"}
CONTAINERS = {
    "sign_adam_pp": ([(".*", "SignAdamPP", INT2)], "fused"),
    "two_groups": (
        [
            ("norm", "SignAdamPP", {"lr": 1e-3, "param_storage": "split16"}),
            (".*", "SignAdamPP", {**INT2, "confidence": "adaptive", "weight_decay": 0.1}),
        ],
        "foreach",
    ),
    "beside_adamw": (
        [
            ("norm|tok_embeddings|lm_head", "AdamW", {"lr": 1e-3}),
            (".*", "Lion", {"lr": 1e-3, "state_dtype": "int8", "param_storage": "split8"}),
        ],
        "for-loop",
    ),
}


def saved(folder: Path) -> dict[str, object]:
    """All entries of a checkpoint, by their names."""
    file = folder.with_suffix(".pt")
    dcp_to_torch_save(folder, file)
    entries: dict[str, object] = {}

    def add(prefix, value):
        if isinstance(value, dict):
            for name, each in value.items():
                add(f"{prefix}/{name}", each)
        else:
            entries[prefix] = value

    add("", torch.load(file, weights_only=True))
    return entries


def difference(folder: Path, other: Path) -> list[str]:
    """The entries that are not the same in two checkpoints, bit for bit."""
    ours, theirs = saved(folder), saved(other)
    different = sorted(ours.keys() ^ theirs.keys())
    for name in ours.keys() & theirs.keys():
        value, expected = ours[name], theirs[name]
        is_tensor = isinstance(value, torch.Tensor)
        if not (value.dtype == expected.dtype and same_bits(value, expected) if is_tensor else value == expected):
            different.append(name)
    return different


@pytest.mark.parametrize(("groups", "implementation"), CONTAINERS.values(), ids=CONTAINERS.keys())
def test_training_resumes_bit_for_bit(ranks, tmp_path, groups, implementation):
    count = len({name for _, name, _ in groups})
    whole, parts, other = (tmp_path / name for name in ("whole", "parts", "other"))
    assert ranks(2).run(titan.trained, groups, implementation, str(whole), 6, 6) == [[0, 6, count]] * 2
    assert ranks(2).run(titan.trained, groups, implementation, str(parts), 6, 3) == [[0, 3, count]] * 2

    # What two ranks have saved, other numbers of ranks load as it was.
    for n in (1, 3):
        ranks(n).run(titan.saved_again, groups, implementation, str(parts), 6, str(other / str(n)))
        assert difference(other / str(n) / "step-3", parts / "step-3") == [], n

    assert ranks(2).run(titan.trained, groups, implementation, str(parts), 6, 6) == [[3, 6, count]] * 2
    assert difference(parts / "step-6", whole / "step-6") == []
    if groups[0][1] == "SignAdamPP":
        entries = saved(whole / "step-6")
        codes = entries["/optimizer/state.layers.0.attention.wo.weight.exp_avg"]
        assert codes.dtype == torch.int8 and set(codes.unique().tolist()) == {-1, 0, 1}
        weight = entries["/layers.0.attention.wo.weight"]
        assert weight.dtype == torch.bfloat16
        assert not same_bits(weight, saved(parts / "step-3")["/layers.0.attention.wo.weight"])


def test_torchtitans_command_line_finds_the_config():
    from torchtitan.config import ConfigManager

    config = ConfigManager().parse_args(
        ["--module", "examples.torchtitan_optimizer", "--config", "llama3_debugmodel", "--training.steps", "7"]
    )
    assert config.training.steps == 7 and config.training.dtype == "bfloat16"
    assert type(config.optimizer).__qualname__ == "SignOptimizersContainer.Config"
    (group,) = json.loads(json.dumps(config.to_dict()))["optimizer"]["param_groups"]
    assert group["optimizer_name"] == "SignAdamPP" and group["optimizer_kwargs"]["state_dtype"] == "int2"


def test_names_of_torchtitan_stay_torchs():
    from signadam_ext.integrations.torchtitan import SignOptimizersContainer

    resolve = SignOptimizersContainer._resolve_optimizer_factory
    assert resolve("AdamW") is torch.optim.AdamW
    for name in ("functional", "Nothing"):
        with pytest.raises(NotImplementedError, match=name):
            resolve(name)
