"""The recipe: its groups and schedule, that it is what the committed results support, and what it refuses."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, SequentialLR

from reporting.problems import lr_factor
from signadam_ext import Signum, recipe
from signadam_ext.training.recipe import CHOICES, TokenSchedule

RESULTS = Path(__file__).resolve().parents[2] / "experiments" / "results"


class Tied(nn.Module):
    """A model as small as one with every kind of parameter can be; its embedding is its head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.norm = nn.LayerNorm(4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.head(self.inner(self.norm(self.embedding(tokens))))
        return hidden


def test_each_parameter_that_trains_is_in_the_group_of_its_kind() -> None:
    optimizer = recipe(Tied(), tokens=1e6).optimizer
    assert [(group["name"], group["param_names"]) for group in optimizer.param_groups] == [
        ("matrices", ["inner.weight"]),
        ("embeddings", ["embedding.weight"]),
        ("vectors", ["norm.weight", "norm.bias", "inner.bias"]),
    ]


def test_all_groups_are_as_in_the_runs() -> None:
    """Every parameter was decayed, at one learning rate, and all gradients clipped together."""
    for group in recipe(Tied(), tokens=1e6, batch_tokens=1e6).optimizer.param_groups:
        assert group["weight_decay"] == 0.1 and group["max_grad_norm"] == 1.0
        assert group["initial_lr"] == CHOICES[0].lr


def _after_a_step(dtype: torch.dtype, **changes: Any) -> list[torch.Tensor]:
    """The weights of a layer of ones, and of its norm in fp32."""
    model = nn.Sequential(nn.Linear(32, 32, bias=False, dtype=dtype), nn.LayerNorm(32))
    optimizer = recipe(model, tokens=1e6, batch_tokens=1e5, lr=1e-4, **changes).optimizer
    for param in model.parameters():
        nn.init.ones_(param).grad = torch.ones_like(param)
    optimizer.step()
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_rounded_stochastically_and_others_as_always(dtype: torch.dtype) -> None:
    weights, *norm = _after_a_step(dtype)
    # A step is smaller than half a unit in the last place, so some take a whole one and the others none.
    assert set(weights.flatten().tolist()) == {1.0, 1.0 - torch.finfo(dtype).eps / 2}
    nearest, *same = _after_a_step(dtype, param_storage="nearest")
    assert torch.equal(nearest, torch.ones_like(nearest))
    assert all(torch.equal(one, other) for one, other in zip(norm, same, strict=True))


@pytest.mark.parametrize("told", [False, True])
def test_the_schedule_is_that_of_the_runs(told: bool) -> None:
    steps, batch = 2000, 1024
    optimizer, scheduler, _ = recipe(Tied(), tokens=steps * batch, batch_tokens=None if told else batch)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"] / CHOICES[0].lr)
        optimizer.step()
        scheduler.step(batch if told else None)
    assert rates == pytest.approx([lr_factor(step, steps, 0.1) for step in range(steps)], rel=1e-12)
    scheduler.step(batch)  # more than was said
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * CHOICES[0].lr, rel=1e-12)


def test_the_schedule_goes_by_tokens_of_steps_of_any_size() -> None:
    optimizer, scheduler, _ = recipe(Tied(), tokens=1000)
    optimizer.step()
    scheduler.step(30)
    scheduler.step(520)
    # 100 of warm-up, and half of what is left of the cosine.
    assert scheduler.tokens_seen == 550
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.55 * CHOICES[0].lr, rel=1e-12)


def test_the_schedule_resumes() -> None:
    optimizer, scheduler, _ = recipe(Tied(), tokens=1000, batch_tokens=10)
    for _ in range(37):
        optimizer.step()
        scheduler.step()
    again, resumed, _ = recipe(Tied(), tokens=1000, batch_tokens=10)
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(json.loads(json.dumps(scheduler.state_dict())))
    for _ in range(20):
        for one, other in ((optimizer, scheduler), (again, resumed)):
            one.step()
            other.step()
        assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def _steps(optimizer: torch.optim.Optimizer, model: Tied, scheduler: Any) -> list[torch.Tensor]:
    torch.manual_seed(1)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randint(8, (16,))), torch.randint(8, (16,))).backward()
        optimizer.step()
        scheduler.step()
    return list(model.parameters())


def test_trains_as_the_optimizer_by_hand() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Tied())
    optimizer, scheduler, _ = recipe(models[0], tokens=2000, batch_tokens=100)
    params = [param for param in models[1].parameters() if param.requires_grad]
    choice = CHOICES[0]
    assert choice.optimizer is Signum
    by_hand = Signum(params, lr=choice.lr, weight_decay=0.1, max_grad_norm=1.0, **choice.options)
    ours, theirs = (
        _steps(optimizer, models[0], scheduler),
        _steps(by_hand, models[1], TokenSchedule(by_hand, 2000, 100)),
    )
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], Tied().embedding.weight)


@pytest.mark.parametrize(
    ("memory", "index"),
    [(None, 0), (4, 0), (16.0, 0), (3.99, 1), (2, 1), (1.04, 2), (1, 2), (0.99, 3), (0.25, 3)],
    ids=["none", "4", "16", "3.99", "2", "1.04", "1", "0.99", "0.25"],
)
def test_memory_chooses(memory: float | None, index: int) -> None:
    found = recipe(Tied(), tokens=1e6, memory=memory)
    assert type(found.optimizer) is CHOICES[index].optimizer
    assert found.evidence == CHOICES[index].evidence
    for name, value in CHOICES[index].options.items():
        assert found.optimizer.param_groups[0][name] == value


@pytest.mark.parametrize("memory", [None, 0.25])
def test_every_argument_of_the_optimizer_may_be_given(memory: float | None) -> None:
    cls = type(recipe(Tied(), tokens=1, memory=memory).optimizer)
    for name, parameter in inspect.signature(cls).parameters.items():
        if name != "params":
            recipe(Tied(), tokens=1, memory=memory, **{name: parameter.default})


def test_a_state_of_the_earlier_schedule_loads() -> None:
    optimizer, scheduler, _ = recipe(Tied(), tokens=100, batch_tokens=1)
    optimizer.step()
    scheduler.step()
    saved = scheduler.state_dict()
    _, resumed, _ = recipe(Tied(), tokens=100, batch_tokens=1)
    resumed.load_state_dict({**saved, "lr_lambdas": [None] * 3, "_has_begun": True})
    assert resumed.state_dict() == saved and resumed.tokens_seen == 1


def test_the_evidence_says_what_was_changed() -> None:
    same = recipe(Tied(), tokens=1, lr=CHOICES[0].lr, caution="delayed", weight_decay=0.1)
    assert same.evidence == CHOICES[0].evidence
    other = recipe(Tied(), tokens=1, lr=1e-3, caution=None, seed=1)
    assert other.evidence == f"{CHOICES[0].evidence}; lr, caution, seed as given"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "tokens=0: must be finite and above 0"),
        ((1, 0), ValueError, "batch_tokens=0: must be finite and above 0"),
        (("many",), TypeError, "tokens='many': must be a number"),
    ],
)
def test_a_schedule_of_no_tokens(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TokenSchedule(torch.optim.SGD([torch.zeros(1)], lr=1.0), *arguments)


def test_state_takes_the_memory_that_is_said() -> None:
    model = nn.Linear(512, 512, bias=False)
    for choice in CHOICES:
        optimizer = recipe(model, tokens=1, memory=choice.state_bytes).optimizer
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        (state,) = optimizer.state.values()
        moments = sum(x.nbytes for x in state.values() if isinstance(x, torch.Tensor) and x.numel() > 1)
        assert moments == choice.state_bytes * model.weight.numel()


def test_the_choices_are_what_the_results_support() -> None:
    proof = json.loads((RESULTS / "recipe" / "stage2.json").read_text())
    parts = proof["parts"]
    assert parts["fresh"]["finished"] and parts["bits"]["finished"]
    first, *few, last = CHOICES
    best = parts["fresh"]["contenders"][proof["best"]]
    assert proof["plan"]["design"]["contenders"][proof["best"]]["options"] == first.options == {"caution": "delayed"}
    assert proof["best"].partition("+")[0] == "signum" and best["lr"] == first.lr
    assert _every_seed_is_below(best, 10)
    assert {*parts["bits"]["contenders"]} == {f"{proof['best']}@{choice.options['state_dtype']}" for choice in few}
    assert parts["bits"]["refused_forms"] == ["int4", "int2"]
    for choice in few:
        own = parts["bits"]["contenders"][f"{proof['best']}@{choice.options['state_dtype']}"]
        assert (own["options"], own["lr"]) == ({**choice.options, "param_storage": "stochastic"}, choice.lr)
        assert own["state_bytes_per_parameter"] == pytest.approx(choice.state_bytes, abs=1e-3)
        assert _every_seed_is_below(own, 5)
    long = json.loads((RESULTS / "convergence" / "gpt_long.json").read_text())["methods"]
    assert long["sign_adam_pp_int2_stochastic"]["lr"] == last.lr


def _every_seed_is_below(entry: dict[str, Any], seeds: int) -> bool:
    differences = entry["minus_adamw_by_seed"].values()
    return len(differences) == seeds and max(differences) < 0 and entry["minus_adamw"]["high"] < 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tokens": 0}, ValueError, "tokens=0: must be finite and above 0"),
        ({"tokens": float("nan")}, ValueError, "tokens=nan: must be finite and above 0"),
        ({"tokens": "many"}, TypeError, "tokens='many': must be a number, not str"),
        ({"tokens": 1, "batch_tokens": -1}, ValueError, "batch_tokens=-1: must be finite and above 0"),
        ({"tokens": 1, "memory": 0.2}, ValueError, "memory=0.2: the smallest recipe takes 0.25 bytes"),
        ({"tokens": 1, "memory": True}, TypeError, "memory=True: must be a number, not bool"),
        (
            {"tokens": 1, "batch_size": 8},
            TypeError,
            "unexpected keyword argument 'batch_size'; did you mean 'batch_tokens'",
        ),
        ({"tokens": 1, "weight_decya": 0}, TypeError, "argument 'weight_decya'; did you mean 'weight_decay'"),
    ],
)
def test_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace(".", r"\.")):
        recipe(Tied(), **arguments)


@pytest.mark.parametrize("number", [np.int64, np.float32, torch.tensor], ids=["int64", "float32", "tensor"])
def test_numbers_of_any_kind_are_kept_as_pythons(number: Any) -> None:
    """So that the schedule's state is plain, whatever the numbers were computed with."""
    _, scheduler, _ = recipe(Tied(), tokens=number(1000), batch_tokens=number(10), memory=number(4))
    scheduler.optimizer.step()
    scheduler.step()
    scheduler.step(number(20))
    state = json.loads(json.dumps(scheduler.state_dict()))
    assert (state["tokens"], state["batch_tokens"], state["tokens_seen"]) == (1000.0, 10.0, 30.0)


def test_refuses_what_is_no_model_or_has_nothing_to_train() -> None:
    with pytest.raises(TypeError, match="model is a list: must be a "):
        recipe([nn.Parameter(torch.ones(2))], tokens=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        recipe(Tied().requires_grad_(False), tokens=1)
    with pytest.raises(TypeError, match="momentum"):
        recipe(Tied(), tokens=1, momentum=0.9)


def test_a_step_of_unknown_size_is_refused_and_changes_nothing() -> None:
    optimizer, scheduler, _ = recipe(Tied(), tokens=1000)
    before = optimizer.param_groups[0]["lr"]
    optimizer.step()
    for given, error, message in (
        (None, ValueError, "pass those of the step that was taken"),
        (0, ValueError, "tokens=0"),
        (-5, ValueError, "tokens=-5"),
        ("x", TypeError, "tokens='x'"),
    ):
        with pytest.raises(error, match=message):
            scheduler.step(given)
        assert (scheduler.tokens_seen, scheduler.last_epoch, optimizer.param_groups[0]["lr"]) == (0.0, 0, before)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copied", "pickled"])
def test_a_copy_goes_by_its_own_tokens(how: Any) -> None:
    optimizer, scheduler, _ = recipe(Tied(), tokens=100, batch_tokens=1)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    mine, own = how((optimizer, scheduler))
    for _ in range(95):
        mine.step()
        own.step()
    assert (scheduler.tokens_seen, own.tokens_seen) == (5, 100)
    assert mine.param_groups[0]["lr"] == pytest.approx(0.1 * CHOICES[0].lr, rel=1e-12)


def test_a_resumed_schedule_counts_the_steps_it_is_told_of() -> None:
    optimizer, scheduler, _ = recipe(Tied(), tokens=100, batch_tokens=1)
    optimizer.step()
    scheduler.step()
    again, resumed, _ = recipe(Tied(), tokens=1, batch_tokens=2)
    resumed.load_state_dict(scheduler.state_dict())
    again.step()
    resumed.step()
    assert (resumed.tokens, resumed.tokens_seen) == (100, 3)
    untold = recipe(Tied(), tokens=1)[1]
    untold.load_state_dict(scheduler.state_dict())
    untold.step()
    assert untold.tokens_seen == 2


@pytest.mark.parametrize("batch_tokens", [10, None])
def test_another_schedule_may_follow(batch_tokens: int | None) -> None:
    optimizer, scheduler, _ = recipe(Tied(), tokens=100, batch_tokens=batch_tokens)
    rate = optimizer.param_groups[0]["lr"]
    SequentialLR(optimizer, [scheduler, ConstantLR(optimizer, 1.0)], milestones=[10])
    assert scheduler.tokens_seen == 0
    assert optimizer.param_groups[0]["lr"] == rate
