"""State and step on the CPU: the bits of the same steps without it, what crosses the bus, and what must be noticed.

The device is the CPU here, whose parameters are copied as a GPU's would be. Copies are done as late as a stream may do
them: when someone waits.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.optimizer_contract import ROWS, assert_same, assert_unchanged, each_row, make, params_of, snapshot
from support.strategies import same_bits
from torch import Tensor, nn

import signadam_ext
from signadam_ext import AdamW, SignAdamPP, SignSGD, memory, offload, release_gradients
from signadam_ext.optimizers.groups import layouts_of
from signadam_ext.training import offload as module

ROW = ROWS["sign_adam_pp"]
each_release = pytest.mark.parametrize("release", [False, True], ids=["kept", "released"])


class LateLane:
    """A stream that copies at the last moment, and what has been asked of it."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.down = 0
        self.up = 0
        self.params: set[int] = set()

    def copy(self, target: Tensor, source: Tensor) -> None:
        if target.untyped_storage().data_ptr() in self.params:
            self.up += source.nbytes
        else:
            self.down += source.nbytes
        torch._C._increment_version([target])  # as what starts a copy does
        self.waiting.append((target, source))

    def settle(self) -> None:
        for target, source in self.waiting:
            target.data.copy_(source.data)
        self.waiting.clear()

    join = settle

    def moved(self) -> tuple[int, int]:
        """Bytes since the last call, down and up."""
        moved = self.down, self.up
        self.down = self.up = 0
        return moved


@pytest.fixture(autouse=True)
def lane(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateLane]:
    made = LateLane()
    monkeypatch.setattr(module, "lane_of", lambda device: made)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield made
    torch.set_num_threads(threads)


def model_of(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 33), nn.Tanh(), nn.Linear(33, 33), nn.Linear(33, 2, bias=False)).to(dtype)
    for param in model.parameters():
        param.data = (torch.randn(param.shape, generator=generator) / 3).to(dtype)
        param.grad_variance = torch.full_like(param, 0.5, dtype=torch.float32)
    return model


def loss_of(model: nn.Module, step: int) -> Tensor:
    first = next(model.parameters())
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(first.dtype)
    return model(x).square().mean()


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [{"params": named[::2]}, {"params": named[1::2], "lr": 0.03, "weight_decay": 0.1}]


class Pair:
    """Two equal trainings, of which one is offloaded."""

    def __init__(self, row: Any = ROW, dtype: torch.dtype = torch.bfloat16, release: bool = False, **options: Any):
        overlap = options.pop("overlap", True)
        self.models = [model_of(dtype), model_of(dtype)]
        self.optimizers = [make(row, groups_of(model), **options) for model in self.models]
        self.offload = offload(self.optimizers[0], device="cpu", release=release, overlap=overlap)

    def each(self, action: Callable[[nn.Module, Any], Any]) -> None:
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            action(model, optimizer)

    def train(self, *steps: int) -> None:
        for step in steps:
            self.each(lambda model, optimizer, step=step: ordinary(model, optimizer, step))

    def check(self) -> None:
        assert_same(*self.optimizers)


def ordinary(model: nn.Module, optimizer: Any, step: int) -> None:
    optimizer.zero_grad()
    loss_of(model, step).backward()
    optimizer.step()


def bytes_of(lane: LateLane, model: nn.Module) -> int:
    """Of the parameters; from here on the lane knows what is one."""
    lane.params = {param.untyped_storage().data_ptr() for param in model.parameters()}
    lane.moved()
    return sum(param.nbytes for param in model.parameters())


# --- the same bits


@each_row
@each_release
@pytest.mark.parametrize("overlap", [True, False])
def test_same_bits(row: Any, release: bool, overlap: bool) -> None:
    """Groups, schedules, a gradient that comes late, and statistics, in each dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        pair = Pair(row, dtype, release, overlap=overlap)
        pair.each(lambda model, optimizer: optimizer.observe())
        schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7) for optimizer in pair.optimizers]
        for step in range(4):
            pair.each(lambda model, optimizer, step=step: model[3].requires_grad_(step > 1))
            pair.train(step)
            for schedule in schedules:
                schedule.step()
            pair.check()
        assert not release or all(param.grad is None for param in params_of(pair.optimizers[0]))
        ours, expected = (optimizer.statistics() for optimizer in pair.optimizers)
        assert repr(ours) == repr(expected)
        assert not any(vars(host.copy) for host in pair.offload._host_params.values())  # variances are let go


FORMS = [
    (ROWS["sign_adam_pp"], {"state_dtype": "int2", "param_storage": "stochastic"}),
    (ROWS["sign_adam_pp-delayed"], {"state_dtype": "int8", "param_storage": "split8"}),
    (ROWS["signum"], {"state_dtype": "int8", "param_storage": "split16"}),
    (ROWS["sign_adam"], {"state_dtype": ("int4", "bf16"), "param_storage": "master"}),
]


@pytest.mark.parametrize("row, options", FORMS)
@each_release
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_same_bits_in_each_form_of_storage(row: Any, options: dict[str, Any], release: bool, backend: str) -> None:
    pair = Pair(row, torch.bfloat16, release, backend=backend, **options)
    pair.train(*range(3))
    pair.check()


def test_the_largest_rate_so_far() -> None:
    """It is kept in the optimizer's own group."""
    found = []
    for offloaded in (False, True):
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = AdamW([param], lr=1e-2, weight_decay=0.3, weight_decay_scale="corrected")
        if offloaded:
            offload(optimizer, device="cpu")
        for lr in (0.1, 0.01, 0.01):
            optimizer.param_groups[0]["lr"] = lr
            param.grad = torch.ones(3)
            optimizer.step()
        assert optimizer.param_groups[0]["largest_lr"] == 0.1
        found.append(param.detach())
    assert torch.equal(*found)


def test_backends_of_a_gpu_become_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()
    pair.train(0)
    pair.optimizers[0].param_groups[0]["backend"] = "cuda"
    monkeypatch.setattr(signadam_ext.backends, "check_usable", lambda name: None)
    pair.train(1)
    pair.check()
    assert pair.optimizers[0].param_groups[0]["backend"] == "cuda"


@each_release
def test_closure(release: bool) -> None:
    pair = Pair(release=release)

    def step(model: nn.Module, optimizer: Any) -> None:
        def closure() -> Any:
            optimizer.zero_grad()
            loss = loss_of(model, 0)
            loss.backward()
            return loss

        with torch.no_grad():
            expected = loss_of(model, 0)
            assert torch.equal(optimizer.step(closure), expected)

    pair.each(step)
    pair.check()


@each_release
@pytest.mark.parametrize("backwards", [2, 3])
def test_accumulation(release: bool, backwards: int, lane: LateLane) -> None:
    """On the device, or on the host; only the last sum goes down where it stays on the device."""
    pair = Pair(release=release)
    nbytes = bytes_of(lane, pair.models[0])

    def step(model: nn.Module, optimizer: Any, number: int) -> None:
        optimizer.zero_grad()
        for micro in range(backwards):
            loss_of(model, 10 * number + micro).backward()
        optimizer.step()

    for number in range(3):
        pair.each(lambda model, optimizer, number=number: step(model, optimizer, number))
        pair.check()
        down, up = lane.moved()
        assert up == nbytes
        if not release and number > 0:
            assert down == nbytes
        assert release or not lane.waiting


def test_each_gradient_goes_down_while_backward_runs(lane: LateLane) -> None:
    """And each parameter comes up: 2 bytes and 2 for bf16. Nothing else crosses, but what has been set from outside."""
    pair = Pair(state_dtype="int2", param_storage="stochastic")
    model, optimizer = pair.models[0], pair.optimizers[0]
    nbytes = bytes_of(lane, model)
    assert nbytes == 2 * sum(param.numel() for param in model.parameters())
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        assert lane.moved() == (nbytes, 0)
        optimizer.step()
        assert lane.moved() == (0, nbytes)


@pytest.mark.parametrize("overlap", [True, False])
def test_clipped_gradients_go_down_once(overlap: bool, lane: LateLane) -> None:
    pair = Pair(overlap=overlap)
    model, optimizer = pair.models[0], pair.optimizers[0]
    nbytes = bytes_of(lane, model)
    for number in range(4):
        clips = number < 3

        def step(model: nn.Module, optimizer: Any, number: int = number, clips: bool = clips) -> None:
            optimizer.zero_grad()
            loss_of(model, number).backward()
            if clips:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()

        pair.each(step)
        pair.check()
        # The first step finds out, and the last that nothing is clipped any more.
        assert lane.moved() == (nbytes * (2 if overlap and number == 0 else 1), nbytes)
    optimizer.zero_grad()
    loss_of(model, 9).backward()
    assert lane.moved() == (nbytes if overlap else 0, 0)


def test_scaled_gradients() -> None:
    pair = Pair(dtype=torch.float32)
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2)]
    for number in range(4):
        for model, optimizer, scaler in zip(pair.models, pair.optimizers, scalers, strict=True):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, number)).backward()
            if number == 1:
                next(model.parameters()).grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
        pair.check()
    assert scalers[0].get_scale() == scalers[1].get_scale() == 4.0
    assert float(pair.optimizers[0].state[next(pair.models[0].parameters())]["step"]) == 3


def test_a_scaler_finds_no_gradients_that_were_released() -> None:
    pair = Pair(dtype=torch.float32, release=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(pair.models[0], 0)).backward()
    pair.optimizers[0].grad_scale, pair.optimizers[0].found_inf = torch.tensor(8.0), torch.tensor(0.0)
    before = snapshot(pair.optimizers[0])
    with pytest.raises(RuntimeError, match="release=True leaves none"):
        pair.optimizers[0].step()
    assert_unchanged(pair.optimizers[0], before)
    assert not {"grad_scale", "found_inf"} & vars(pair.optimizers[0]).keys()


@each_release
def test_clipped_by_the_optimizer(release: bool, lane: LateLane) -> None:
    """By the norm of all gradients, on the host; a step that is skipped brings nothing up."""
    pair = Pair(release=release, max_grad_norm=0.05)
    pair.train(0, 1)
    pair.check()
    norms = [optimizer.last_grad_norm for optimizer in pair.optimizers]
    assert norms[0] is not None and torch.equal(norms[0], norms[1])
    bytes_of(lane, pair.models[0])

    def step(model: nn.Module, optimizer: Any) -> None:
        optimizer.zero_grad()
        (loss_of(model, 2) * torch.inf).backward()
        optimizer.step()

    pair.each(step)
    assert lane.moved()[1] == 0
    pair.train(3)
    pair.check()
    assert [int(optimizer.skipped_steps) for optimizer in pair.optimizers] == [1, 1]


# --- gradients and parameters that are not what backward has left


@pytest.mark.parametrize(
    "change",
    [
        lambda param: param.grad.mul_(-3),
        lambda param: setattr(param, "grad", param.grad * -3),
        lambda param: setattr(param, "grad", None),
        lambda param: param.grad.zero_(),
        lambda param: setattr(param.grad, "data", -param.grad),
        lambda param: param.grad.fill_(torch.nan),
        lambda param: setattr(param, "grad", torch._neg_view(param.grad.clone())),
        lambda param: (
            setattr(param, "grad", torch.ones_like(param.t() if param.dim() > 1 else param).t())
            if param.dim() > 1
            else None
        ),
    ],
    ids=["in place", "replaced", "dropped", "zeroed", "data", "nan", "negative", "strides"],
)
def test_changed_gradients_count(change: Callable[[Any], Any]) -> None:
    pair = Pair()
    pair.train(0)
    for number in (1, 2):

        def step(model: nn.Module, optimizer: Any, number: int = number) -> None:
            optimizer.zero_grad()
            loss_of(model, number).backward()
            for param in list(model.parameters())[::2]:
                change(param)
            optimizer.step()

        pair.each(step)
        pair.check()


def test_what_has_been_seen_is_told_from_what_has_its_place() -> None:
    """The same memory and version in another tensor, and the same address in other memory."""
    tensor = torch.ones(3)
    seen, seen_storage = (module._Seen(tensor, by_object=by_object) for by_object in (True, False))
    assert seen.is_still(tensor) and seen_storage.is_still(tensor)
    assert tensor.data._version == tensor._version
    assert not seen.is_still(tensor.data) and seen_storage.is_still(tensor.data)
    known = weakref.ref(tensor)
    del tensor
    assert known() is None
    again = [torch.ones(3) for _ in range(8)]
    assert not any(seen.is_still(other) or seen_storage.is_still(other) for other in again)
    with torch.inference_mode():
        tensor = torch.ones(3)
    assert not module._Seen(tensor, by_object=True).is_still(tensor)


def test_state_lies_beside_the_copy_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another device would show: whose device state is made on, and when it is moved."""
    model = model_of()
    optimizer = AdamW(model.parameters())
    ordinary(model, optimizer, 0)
    moves: list[torch.device] = []
    real = module._moved
    monkeypatch.setattr(module, "_moved", lambda state, device: moves.append(device) or real(state, device))
    made = offload(optimizer, device="cpu")
    assert moves == [torch.device("cpu")] * 5
    hosts = [made._host_params[id(param)] for param in model.parameters()]
    assert all(layout.param is host.copy for (_, layout), host in zip(layouts_of(optimizer), hosts, strict=True))
    before = list(optimizer.state.values())
    made.remove()
    assert moves == [torch.device("cpu")] * 10
    assert not any(old is new for old, new in zip(before, optimizer.state.values(), strict=True))
    param = next(model.parameters())
    assert all(layout.param is param for _, layout in layouts_of(optimizer)[:1])
    moved = real({"exp_avg": torch.ones(2), "exp_avg_kind": 3, "step": torch.ones(())}, torch.device("meta"))
    assert moved["exp_avg"].is_meta and moved["exp_avg_kind"] == 3 and moved["step"].device.type == "cpu"


@pytest.mark.parametrize("sets", ["in place", "inference", "data", "loaded", "two tensors", "written through data"])
def test_parameters_set_from_outside_win(sets: str) -> None:
    pair = Pair(param_storage="master")
    pair.train(0, 1)
    others = [torch.full_like(param, 0.25) for param in pair.models[0].parameters()]

    def change(model: nn.Module, optimizer: Any) -> None:
        params = list(model.parameters())
        if sets == "in place":
            with torch.no_grad():
                for param, other in zip(params, others, strict=True):
                    param.copy_(other)
        elif sets == "inference":
            with torch.inference_mode():
                params[0].mul_(2)
        elif sets == "data":
            for param, other in zip(params, others, strict=True):
                param.data = other.clone()
        elif sets == "loaded":
            model.load_state_dict(model_of().state_dict())
        elif sets == "two tensors":
            torch.nn.utils.vector_to_parameters(torch.ones(sum(param.numel() for param in params)).bfloat16(), params)
            vector = torch.zeros(sum(param.numel() for param in params)).bfloat16()
            torch.nn.utils.vector_to_parameters(vector, params)
        else:
            for param, other in zip(params, others, strict=True):
                param.data.copy_(other)
            if optimizer is pair.optimizers[0]:
                pair.offload.refresh()

    pair.each(change)
    pair.train(2, 3)
    pair.check()


@each_release
def test_other_dtypes_later(release: bool) -> None:
    pair = Pair(dtype=torch.float32, release=release)
    pair.train(0)
    pair.each(lambda model, optimizer: optimizer.zero_grad())
    pair.each(lambda model, optimizer: loss_of(model, 1).backward())
    pair.each(lambda model, optimizer: model.bfloat16())
    pair.each(lambda model, optimizer: optimizer.step())
    pair.train(2)
    pair.check()
    assert next(pair.models[0].parameters()).dtype == torch.bfloat16


@each_release
def test_other_memory_orders_and_gaps(release: bool) -> None:
    models = []
    for _ in range(2):
        wide = torch.linspace(-1, 1, 48).view(4, 12)
        params = [nn.Parameter(wide[:, ::2]), nn.Parameter(torch.linspace(-1, 1, 48).view(2, 3, 2, 4))]
        params[1].data = params[1].data.to(memory_format=torch.channels_last)
        models.append((wide, params))
    ours, other = (SignAdamPP(params, state_dtype="int8", param_storage="stochastic") for _, params in models)
    offload(ours, device="cpu", release=release)
    for step in range(3):
        for optimizer, (_, params) in zip((ours, other), models, strict=True):
            optimizer.zero_grad()
            sum((param * (step - param)).sum() for param in params).backward()
            optimizer.step()
    assert_same(ours, other)
    assert same_bits(models[0][0], models[1][0])


@each_release
def test_empty_tensors_and_nan(release: bool) -> None:
    optimizers = []
    for _ in range(2):
        params = [
            nn.Parameter(torch.empty(0, 3)),
            nn.Parameter(torch.tensor([1.0, torch.nan, torch.inf])),
            nn.Parameter(torch.ones(())),
        ]
        optimizers.append(AdamW(params))
    offload(optimizers[0], device="cpu", release=release)
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
            sum((param * 2).sum() for param in params_of(optimizer)).backward()
            optimizer.step()
    assert_same(*optimizers)
    assert float(optimizers[0].state[params_of(optimizers[0])[0]]["step"]) == 3


def test_one_parameter_twice_in_a_model_and_two_that_share_memory() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    other = copy.deepcopy(model)
    optimizers = [AdamW(m.parameters(), lr=0.1) for m in (model, other)]
    offload(optimizers[0], device="cpu")
    for m, optimizer in zip((model, other), optimizers, strict=True):
        for _ in range(2):
            optimizer.zero_grad()
            m(torch.tensor([1, 3])).square().sum().backward()
            optimizer.step()
    assert_same(*optimizers)
    base = torch.ones(6)
    with pytest.raises(ValueError, match="share memory"):
        offload(AdamW([nn.Parameter(base[:4]), nn.Parameter(base[2:])]), device="cpu")


# --- groups, state and checkpoints


@each_release
def test_a_group_that_comes_later(release: bool, lane: LateLane) -> None:
    pair = Pair(release=release)
    pair.train(0)
    extra = [nn.Linear(2, 2).bfloat16(), None]
    extra[1] = copy.deepcopy(extra[0])
    for model, optimizer, more in zip(pair.models, pair.optimizers, extra, strict=True):
        model.append(more)
        optimizer.add_param_group({"params": more.named_parameters(), "lr": 0.5})
    for number in (1, 2):
        pair.each(lambda model, optimizer: optimizer.zero_grad())
        lane.settle()
        pair.each(lambda model, optimizer, number=number: loss_of(model, number).backward())
        assert len(lane.waiting) == 7  # of the offloaded one, all gradients
        pair.each(lambda model, optimizer: optimizer.step())
        pair.check()


@each_release
def test_state_goes_to_the_host_and_back(release: bool, tmp_path: Any) -> None:
    """What one saves the other loads: as a dictionary, as a file, and in the middle of a training."""
    options = {"state_dtype": "int4", "param_storage": "split16"}
    pair = Pair(release=release, **options)
    pair.train(0, 1)
    ours, other = pair.optimizers
    saved, expected = ours.state_dict(), other.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    for number, entries in expected["state"].items():
        for name, value in entries.items():
            found = saved["state"][number][name]
            assert same_bits(found, value) if isinstance(value, Tensor) else found == value
    ours.save_state(tmp_path / "ours")
    other.save_state(tmp_path / "other")
    pair.train(2)
    pair.optimizers[0].load_state_dict(expected)
    pair.optimizers[1].load_state_dict(saved)
    pair.train(3)
    pair.check()
    pair.optimizers[0].load_state(tmp_path / "other")
    pair.optimizers[1].load_state(tmp_path / "ours")
    pair.train(4)
    pair.check()


def test_a_master_copy_is_made_of_the_parameter_as_it_is() -> None:
    """Loading state without one, after the parameter was set from outside."""
    pair = Pair(param_storage="master")
    saved = Pair().optimizers[1]
    saved_state = saved.state_dict()
    pair.train(0)

    def load(model: nn.Module, optimizer: Any) -> None:
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(-2)
        optimizer.load_state_dict(saved_state)

    pair.each(load)
    pair.train(1)
    pair.check()


def test_offloaded_in_the_middle_and_removed() -> None:
    models = [model_of(), model_of()]
    optimizers = [make(ROWS["sign_adam_pp-delayed"], groups_of(model), param_storage="split8") for model in models]

    def train(*steps: int) -> None:
        for model, optimizer in zip(models, optimizers, strict=True):
            for step in steps:
                ordinary(model, optimizer, step)

    train(0, 1)
    with offload(optimizers[0], device="cpu"):
        train(2, 3)
        assert_same(*optimizers)
    train(4)
    assert_same(*optimizers)
    assert optimizers[0].runtime.driver is None
    assert all(not param._post_accumulate_grad_hooks for param in models[0].parameters())


def test_removed_with_gradients_on_the_host() -> None:
    pair = Pair(release=True)
    pair.each(lambda model, optimizer: loss_of(model, 0).backward())
    assert all(param.grad is None for param in pair.models[0].parameters())
    pair.offload.remove()
    pair.offload.remove()
    pair.each(lambda model, optimizer: loss_of(model, 1).backward())
    pair.each(lambda model, optimizer: optimizer.step())
    pair.check()


@pytest.mark.parametrize("removes", [False, True])
def test_gradients_on_the_host_and_by_hand_are_added_up(removes: bool) -> None:
    pair = Pair(release=True)

    def step(model: nn.Module, optimizer: Any) -> None:
        loss_of(model, 0).backward()
        for param in model.parameters():
            more = torch.full_like(param, 0.01)
            param.grad = more if param.grad is None else param.grad.add_(more)
        if removes:
            pair.offload.remove()
        optimizer.step()

    pair.each(step)
    pair.check()


def test_a_parameter_that_leaves_the_device_takes_its_gradient_along() -> None:
    pair = Pair(release=True)
    pair.train(0)
    pair.each(lambda model, optimizer: optimizer.zero_grad())
    pair.each(lambda model, optimizer: loss_of(model, 1).backward())
    pair.offload.device = "cuda"  # as if all parameters had been moved to the CPU
    pair.each(lambda model, optimizer: optimizer.step())
    pair.check()


def test_gradients_that_no_hook_has_seen_are_released_by_the_step() -> None:
    pair = Pair(release=True)
    for param in pair.models[0].parameters():
        param._post_accumulate_grad_hooks.clear()  # as swap_tensors leaves it
    pair.train(0)
    assert all(param.grad is None for param in pair.models[0].parameters())
    pair.check()


def test_a_frozen_parameter_that_is_trained_later(lane: LateLane) -> None:
    model = model_of()
    first = next(model.parameters()).requires_grad_(False)
    optimizer = AdamW(model.parameters())
    made = offload(optimizer, device="cpu")
    assert id(first) not in made._host_params
    first.grad = torch.ones_like(first)
    ordinary(model, optimizer, 0)  # which drops that gradient
    first.grad = torch.ones_like(first)
    optimizer.step()
    first.requires_grad_(True)
    loss_of(model, 1).backward()
    optimizer.step()
    nbytes = bytes_of(lane, model)
    loss_of(model, 2).backward()
    assert lane.moved() == (nbytes, 0)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_dropped_gradients_are_not_applied(set_to_none: bool) -> None:
    pair = Pair(release=True)
    pair.train(0)
    pair.each(lambda model, optimizer: loss_of(model, 1).backward())
    pair.each(lambda model, optimizer: optimizer.zero_grad(set_to_none=set_to_none))
    pair.train(2)
    pair.check()
    before = snapshot(pair.optimizers[0])
    loss_of(pair.models[0], 1).backward()
    pair.optimizers[0].zero_grad()
    pair.optimizers[0].step()
    assert_unchanged(pair.optimizers[0], before)


def test_copies_and_pickles() -> None:
    """They are optimizers without the offload, with their state on the host; models are copied as always."""
    pair = Pair()
    pair.train(0)
    model, optimizer = pair.models[0], pair.optimizers[0]
    for twin_model, twin in (
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
    ):
        assert twin.runtime.driver is None
        with offload(twin, device="cpu"):
            ordinary(twin_model, twin, 1)
        ordinary(pair.models[1], pair.optimizers[1], 1)
        assert_same(twin, pair.optimizers[1])
        pair = Pair()
        pair.train(0)
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="neither copied nor pickled"):
            attempt(pair.offload)


# --- steps that cannot be taken


def sparse(optimizer: Any) -> None:
    param = params_of(optimizer)[2]
    param.grad = torch.zeros_like(param).to_sparse()


def freed(optimizer: Any) -> None:
    params_of(optimizer)[2].untyped_storage().resize_(0)


def nonsense(optimizer: Any) -> None:
    optimizer.param_groups[1]["lr"] = -1.0


def wrong_state(optimizer: Any) -> None:
    optimizer.state[params_of(optimizer)[2]]["exp_avg"] = torch.zeros(3)


@each_release
@pytest.mark.parametrize("spoil, message", [(sparse, "layout"), (nonsense, "lr=-1"), (wrong_state, "'exp_avg' of par")])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_step_that_cannot_be_taken_changes_nothing(
    spoil: Callable[[Any], None], message: str, release: bool, steps: int
) -> None:
    pair = Pair(release=release)
    pair.train(*range(steps))
    pair.each(lambda model, optimizer: optimizer.zero_grad())
    pair.each(lambda model, optimizer: loss_of(model, 5).backward())
    optimizer = pair.optimizers[0]
    keys = set(map(id, optimizer.state))
    before = [param.detach().clone() for param in params_of(optimizer)]
    state = copy.deepcopy(list(optimizer.state.values()))
    lr, grad, entry = optimizer.param_groups[1]["lr"], params_of(optimizer)[2].grad, None
    if spoil is wrong_state:
        entry = optimizer.state[params_of(optimizer)[2]].get("exp_avg")
    spoil(optimizer)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.step()
    optimizer.param_groups[1]["lr"], params_of(optimizer)[2].grad = lr, grad
    if spoil is wrong_state:
        if entry is None:
            del optimizer.state[params_of(optimizer)[2]]
        else:
            optimizer.state[params_of(optimizer)[2]]["exp_avg"] = entry
    assert set(map(id, optimizer.state)) == keys
    assert all(map(same_bits, before, params_of(optimizer)))
    for own, old in zip(optimizer.state.values(), state, strict=True):
        assert all(same_bits(own[name], old[name]) for name in old if isinstance(old[name], Tensor))
    pair.each(lambda model, optimizer: optimizer.step())
    pair.check()


def test_a_freed_parameter_is_refused_by_name() -> None:
    pair = Pair()
    pair.train(0)
    loss_of(pair.models[0], 1).backward()
    freed(pair.optimizers[0])
    before = [state["step"].item() for state in pair.optimizers[0].state.values()]
    with pytest.raises(ValueError, match=r"parameter '3\.weight' needs a storage"):
        pair.optimizers[0].step()
    assert [state["step"].item() for state in pair.optimizers[0].state.values()] == before


def test_parameters_that_an_interrupted_step_has_not_brought_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler that raises between the step and the copies: the next step brings them up, and then goes on."""
    pair = Pair()
    pair.train(0)
    pair.each(lambda model, optimizer: optimizer.zero_grad())
    pair.each(lambda model, optimizer: loss_of(model, 1).backward())

    def raising(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        real = module.step_all

        def interrupted(optimizer: Any) -> None:
            real(optimizer)
            patched.setattr(module.Offload, "_refresh", raising)

        patched.setattr(module, "step_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pair.optimizers[0].step()
    pair.optimizers[1].step()
    # No gradient but one: all that is behind comes up.
    for model, optimizer in zip(pair.models, pair.optimizers, strict=True):
        optimizer.zero_grad()
        next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
        optimizer.step()
    pair.check()


# --- refused, and let go


def test_refused() -> None:
    model = model_of()
    optimizer = AdamW(model.parameters())
    with pytest.raises(TypeError, match=r"optimizer is a torch\.optim\.sgd\.SGD: "):
        offload(torch.optim.SGD(model.parameters(), lr=0.1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="release=1"):
        offload(optimizer, release=1, device="cpu")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="device=0"):
        offload(optimizer, device=0)  # type: ignore[arg-type]
    for device in ("cpu:0", torch.device("cpu", 0)):
        with pytest.raises(ValueError, match="device='cpu:0': must be the type of a device without a number, 'cpu'"):
            offload(optimizer, device=device)
    with pytest.raises(ValueError, match="device='gpu': must be the type of a device"):
        offload(optimizer, device="gpu")
    with pytest.raises(
        TypeError, match=r"optimizer is a torch\.optim\.adamw\.AdamW: .*; from_optimizer puts one of them"
    ):
        offload(torch.optim.AdamW(nn.Linear(2, 2).parameters()), device="cpu")  # type: ignore[arg-type]
    with offload(optimizer, device=torch.device("cpu")) as made:
        assert made.device == "cpu"
    with pytest.raises(ValueError, match="no trainable parameter of the optimizer is on another device than the CPU"):
        offload(optimizer)
    with pytest.raises(ValueError, match="on a device of type 'cuda'"):
        offload(optimizer, device="cuda")
    with pytest.raises(ValueError, match="nothing to offload"):
        offload(AdamW(nn.Linear(2, 2, device="meta").parameters()))
    with offload(optimizer, device="cpu"):
        with pytest.raises(RuntimeError, match="offloaded already"):
            offload(optimizer, device="cpu")
        with pytest.raises(RuntimeError, match="steps are offloaded already"):
            release_gradients(model, optimizer)
    with release_gradients(model, optimizer), pytest.raises(RuntimeError, match="stepped in backward already"):
        offload(optimizer, device="cpu")
    assert optimizer.runtime.driver is None
    assert all(not param._post_accumulate_grad_hooks for param in model.parameters())


def test_sharded_parameters_are_refused() -> None:
    param = nn.Parameter(torch.ones(3))
    param._is_flat_param = True
    with pytest.raises(TypeError, match=r"parameter 'p' lies in parts.*CPUOffloadPolicy"):
        offload(AdamW([("p", param)]), device="cpu")


def test_several_processes(monkeypatch: pytest.MonkeyPatch, lane: LateLane) -> None:
    """Gradients are averaged after the hooks: they go down in the step, and are not dropped before."""
    monkeypatch.setattr(module, "_several_processes", lambda: True)
    pair = Pair()
    loss_of(pair.models[0], 0).backward()
    assert not lane.waiting[7:] and len(lane.waiting) == 5  # the parameters, when it was made
    ordinary(pair.models[1], pair.optimizers[1], 0)
    pair.optimizers[0].step()
    pair.check()
    with pytest.raises(RuntimeError, match="averages it over the processes"):
        offload(AdamW(model_of().parameters()), device="cpu", release=True)


def test_what_is_dropped_is_freed(lane: LateLane) -> None:
    """Hooks, host memory and gradients: nothing holds on to an optimizer, nor to a gradient between steps."""
    model = model_of()
    optimizer = AdamW(model.parameters())
    made = weakref.ref(offload(optimizer, device="cpu"))
    ordinary(model, optimizer, 0)
    grads = [weakref.ref(param.grad) for param in model.parameters()]
    kept = weakref.ref(optimizer)
    gc.collect()
    optimizer.zero_grad()
    assert all(grad() is None for grad in grads)
    loss_of(model, 1).backward()
    grads = [weakref.ref(param.grad) for param in model.parameters()]
    model.zero_grad()
    lane.waiting.clear()
    assert all(grad() is None for grad in grads)
    del optimizer
    gc.collect()
    assert kept() is None and made() is None
    assert all(not param._post_accumulate_grad_hooks for param in model.parameters())
    loss_of(model, 0).backward()


def test_host_memory_is_one_piece() -> None:
    pair = Pair(state_dtype="int2", param_storage="stochastic")
    hosts = list(pair.offload._host_params.values())
    pieces = {tensor.untyped_storage().data_ptr() for host in hosts for tensor in (host.copy, host.gradients)}
    assert len(hosts) == 5 and len(pieces) == 1
    for host in hosts:
        for tensor in (host.copy, host.gradients):
            assert tensor.data_ptr() % module.ALIGNMENT == 0 and tensor.dtype == torch.bfloat16


def test_the_host_keeps_what_the_calculator_says() -> None:
    """What a GPU would without offload: a copy of the parameters, room for the gradients, and the state."""
    options = {"state_dtype": "int2", "param_storage": "split8"}
    model = model_of()
    optimizer = SignAdamPP(model.parameters(), **options)
    made = offload(optimizer, device="cpu")
    ordinary(model, optimizer, 0)
    kept = [tensor for host in made._host_params.values() for tensor in (host.copy, host.gradients)]
    kept += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    shapes = [param.shape for param in model.parameters()]
    expected = memory.estimate(shapes, SignAdamPP, param_dtype="bf16", **options)
    assert sum(tensor.nbytes for tensor in kept) == expected.total


def test_pieces_of_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 256)
    layouts = [(torch.Size((n,)), (1,), torch.float32) for n in (3, 40, 0, 100, 1)]
    made = module.host_tensors(layouts, pinned=False)
    assert [tensor.numel() for tensor in made] == [3, 40, 0, 100, 1]
    assert [tensor.untyped_storage().nbytes() for tensor in made] == [256, 256, 256, 448, 64]
    for value, tensor in enumerate(made):
        tensor.fill_(value)
    assert all((tensor == value).all() for value, tensor in enumerate(made))


# --- beside others


@each_release
def test_two_optimizers_on_one_model(release: bool) -> None:
    models = [model_of(), model_of()]
    found = []
    for index, model in enumerate(models):
        params = list(model.parameters())
        two = SignAdamPP(params[:2]), AdamW(params[2:])
        if index == 0:
            for optimizer in two:
                offload(optimizer, device="cpu", release=release)
        for step in range(3):
            for optimizer in two:
                optimizer.zero_grad()
            loss_of(model, step).backward()
            for optimizer in two:
                optimizer.step()
        found.append(two)
    for ours, other in zip(*found, strict=True):
        assert_same(ours, other)


def test_two_optimizers_of_the_same_parameters() -> None:
    models = [model_of(torch.float32), model_of(torch.float32)]
    found = []
    for index, model in enumerate(models):
        two = SignAdamPP(model.parameters()), SignSGD(model.parameters())
        if index == 0:
            for optimizer in two:
                offload(optimizer, device="cpu")
        for step in range(3):
            model.zero_grad()
            loss_of(model, step).backward()
            for optimizer in two:
                optimizer.step()
        found.append(two)
    assert_same(found[0][0], found[1][0])
    offload(SignSGD(models[1].parameters()), device="cpu", release=True)
    last = offload(SignSGD(models[1].parameters()), device="cpu", release=True)
    assert last.optimizer() is None  # nothing held it
    kept = [SignSGD(models[1].parameters()) for _ in range(2)]
    for optimizer in kept:
        offload(optimizer, device="cpu", release=True)
    with pytest.raises(RuntimeError, match="lost its gradient to another hook"):
        loss_of(models[1], 0).backward()


def test_threads() -> None:
    """Two threads that call step(), while a third asks for the state: each step is taken as a whole."""
    pair = Pair(dtype=torch.float32)
    model, optimizer = pair.models[0], pair.optimizers[0]
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    errors: list[BaseException] = []

    def run(action: Callable[[], Any]) -> None:
        try:
            for _ in range(20):
                action()
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(action,))
        for action in (optimizer.step, optimizer.step, optimizer.state_dict)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    for param in pair.models[1].parameters():
        param.grad = torch.ones_like(param)
    for _ in range(40):
        pair.optimizers[1].step()
    pair.check()


def test_a_step_inside_a_step_is_refused() -> None:
    model = model_of(torch.float32)
    inner: list[Any] = []

    def confidence(g: Tensor, alpha: Tensor) -> Tensor:
        with pytest.raises(RuntimeError, match="inside another one"):
            inner[0].step()
        return g

    optimizer = SignAdamPP(model.parameters(), confidence=confidence)
    inner.append(optimizer)
    offload(optimizer, device="cpu")
    ordinary(model, optimizer, 0)
    assert float(optimizer.state[next(model.parameters())]["step"]) == 1


@each_release
def test_compiled(release: bool) -> None:
    """Forward and backward compiled, and a step in a function that is: the graph ends before it."""
    torch._dynamo.reset()
    pair = Pair(dtype=torch.float32, release=release)
    compiled = torch.compile(pair.models[0], backend="aot_eager")
    step = torch.compile(pair.optimizers[0].step, backend="eager")
    for number in range(3):
        pair.optimizers[0].zero_grad()
        loss_of_compiled = compiled(torch.randn(4, 5, generator=torch.Generator().manual_seed(number))).square().mean()
        loss_of_compiled.backward()
        step()
        ordinary(pair.models[1], pair.optimizers[1], number)
    torch._dynamo.reset()
    pair.check()


@contextlib.contextmanager
def finished() -> Iterator[None]:
    torch.cuda.synchronize()
    yield
    torch.cuda.synchronize()


@pytest.mark.gpu
@each_release
@pytest.mark.parametrize("row, options", FORMS)
def test_on_a_gpu(row: Any, options: dict[str, Any], release: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients, parameter by parameter, give the bits of steps on the CPU; memory is pinned."""
    monkeypatch.undo()
    on_cpu, on_gpu = model_of(), model_of().cuda()
    for param in on_gpu.parameters():
        param.grad_variance = torch.full_like(param, 0.5, dtype=torch.float32)
    expected, ours = make(row, groups_of(on_cpu), **options), make(row, groups_of(on_gpu), "auto", **options)
    made = offload(ours, release=release)
    hosts = made._host_params.values()
    assert all(host.copy.is_pinned() and host.gradients.is_pinned() for host in hosts)
    for step in range(4):
        factors = [
            torch.randn(param.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
            for param in on_cpu.parameters()
        ]
        with finished():
            for model, optimizer in ((on_cpu, expected), (on_gpu, ours)):
                optimizer.zero_grad()
                pairs = zip(model.parameters(), factors, strict=True)
                sum((param * factor.to(param.device)).sum() for param, factor in pairs).backward()
                if step == 2 and not release:
                    for param in model.parameters():
                        param.grad.mul_(0.5)
                torch.cuda._sleep(10**7)  # the stream of backward is behind when the step begins
                optimizer.step()
        for p, q in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
            assert p.device.type == "cuda" and same_bits(p.detach().cpu(), q.detach())
            own, other = ours.state[p], expected.state[q]
            assert own.keys() == other.keys()
            for name, value in own.items():
                if isinstance(value, Tensor):
                    assert value.device.type == "cpu" and same_bits(value, other[name])
        assert not release or all(param.grad is None for param in on_gpu.parameters())
    made.remove()
    for param in on_gpu.parameters():
        assert all(
            v.device.type == "cuda" for n, v in ours.state[param].items() if isinstance(v, Tensor) and n != "step"
        )
