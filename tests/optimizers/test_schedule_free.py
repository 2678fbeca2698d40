"""Schedule-Free: two modes with exact returns, sums that groups keep, and what it cannot go together with."""

from __future__ import annotations

import copy
import io
import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp_files
import torch.distributed.checkpoint.state_dict as dcp
from fuzzer_failures import at_point
from support.strategies import same_bits
from torch import Tensor
from torch.nn import Parameter

import signadam_ext
from signadam_ext import ScheduleFreeAdamW, ScheduleFreeSign
from signadam_ext.functional import FunctionalOptimizer, schedule_free_adamw, schedule_free_sign

EACH = pytest.mark.parametrize("method", [ScheduleFreeAdamW, ScheduleFreeSign])
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])
SUMS = ("k", "weight_sum", "lr_max", "beta_of_y")
STORAGES = [
    (torch.float32, "nearest"),
    (torch.bfloat16, "nearest"),
    (torch.bfloat16, "stochastic"),
    (torch.bfloat16, "split8"),
    (torch.bfloat16, "split16"),
    (torch.bfloat16, "master"),
    (torch.float16, "stochastic"),
]
each_storage = pytest.mark.parametrize(("dtype", "param_storage"), STORAGES, ids=[f"{d}-{s}" for d, s in STORAGES])


def gradients(steps: int, like: Tensor, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(like.shape, generator=generator).to(like.dtype) for _ in range(steps)]


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> Parameter:
    return Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(dtype))


def take(optimizer: Any, param: Tensor, given: list[Tensor]) -> None:
    for g in given:
        param.grad = g.clone()
        optimizer.step()


def transcribed(
    p: Tensor, given: list[Tensor], lr: float, *, beta: float, beta2: float | None, wd: float, warmup: int, r: float
) -> tuple[Tensor, Tensor, Tensor]:
    """[SF, Alg. 1] in float64 with x kept, and y made of x and z: (y, z, x)."""
    z = x = y = p.double()
    v, total, largest = torch.zeros_like(z), 0.0, 0.0
    for k, g in enumerate(map(Tensor.double, given)):
        rate = lr * min(1.0, (k + 1) / warmup) if warmup else lr
        largest = max(largest, rate)
        weight = (k + 1) ** r * largest**2
        total += weight
        if beta2 is None:
            d = g.sign()
        else:
            v = beta2 * v + (1 - beta2) * g * g
            d = g / ((v / (1 - beta2 ** (k + 1))).sqrt() + 1e-8)
        z = z - rate * (d + wd * y)
        x = (1 - weight / total) * x + weight / total * z
        y = (1 - beta) * z + beta * x
    return y, z, x


@EACH
@BACKENDS
def test_the_average_is_what_evaluation_has(method: type, backend: str) -> None:
    """y, z and x as the paper defines them, within fp32 rounding over 200 steps."""
    param = parameter(300)
    given = gradients(200, param)
    own = {"betas": (0.9, 0.99)} if method is ScheduleFreeAdamW else {"beta": 0.9}
    more = {"weight_decay": 0.1, "warmup_steps": 20, "r": 1.0}
    optimizer = method([param], lr=1e-2, backend=backend, **own, **more)
    y, z, x = transcribed(
        param.detach(),
        given,
        1e-2,
        beta=0.9,
        beta2=0.99 if method is ScheduleFreeAdamW else None,
        wd=0.1,
        warmup=20,
        r=1.0,
    )
    take(optimizer, param, given)
    assert torch.allclose(param.double(), y, rtol=0, atol=5e-6)
    assert torch.allclose(optimizer.state[param]["z"].double(), z, rtol=0, atol=5e-6)
    optimizer.eval()
    assert torch.allclose(param.double(), x, rtol=0, atol=5e-6)


@EACH
@each_storage
def test_a_hundred_toggles_change_no_bit(method: type, dtype: torch.dtype, param_storage: str) -> None:
    """Training goes on as if nobody had looked at the averages."""
    param = parameter(5, 33, dtype=dtype)
    twin = Parameter(param.detach().clone())
    toggled, plain = (method([p], lr=0.05, param_storage=param_storage, seed=3) for p in (param, twin))
    for g in gradients(100, param):
        take(toggled, param, [g])
        take(plain, twin, [g])
        before = param.detach().clone()
        toggled.eval()
        assert not same_bits(param, before) or toggled.param_groups[0]["k"] < 3
        average = param.detach().clone()
        toggled.eval()  # changes nothing any more
        assert same_bits(param, average)
        with torch.no_grad():
            param.add_(1)  # and this is lost
        toggled.train()
        toggled.train()
        assert same_bits(param, before) and "y" not in toggled.state[param]
    assert same_bits(param, twin) and same_bits(toggled.state[param]["z"], plain.state[twin]["z"])


@EACH
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("by", ["dict", "torch.save", "file"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_in_either_mode(method: type, mode: str, by: str, dtype: torch.dtype, tmp_path: Any) -> None:
    """A checkpoint holds the mode, the sums, and in evaluation the parameter that training goes on with."""
    param = parameter(5, 33, dtype=dtype)
    given = gradients(20, param)
    storage = {"param_storage": "stochastic"}
    optimizer = method([param], lr=0.05, warmup_steps=30, r=0.5, **storage)
    take(optimizer, param, given[:10])
    if mode == "eval":
        optimizer.eval()
    resumed = Parameter(param.detach().clone())
    other = method([resumed], lr=0.3, **storage)
    if by == "file":
        optimizer.save_state(tmp_path / "state")
        other.load_state(tmp_path / "state")
    else:
        saved = optimizer.state_dict()
        if by == "torch.save":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        other.load_state_dict(copy.deepcopy(saved))
    assert other.param_groups[0]["train_mode"] is (mode == "train")
    for each in (optimizer, other):
        each.train()
    assert same_bits(param, resumed)
    take(optimizer, param, given[10:])
    take(other, resumed, given[10:])
    for name in ("z", "exp_avg_sq"):
        if name in optimizer.state[param]:
            assert same_bits(optimizer.state[param][name], other.state[resumed][name])
    assert same_bits(param, resumed)
    sums = [{name: each.param_groups[0][name] for name in SUMS} for each in (optimizer, other)]
    assert sums[0] == sums[1] and sums[0]["k"] == 20


@EACH
@each_storage
def test_z_begins_as_the_parameter(method: type, dtype: torch.dtype, param_storage: str) -> None:
    """In fp32 whatever the dtype; and the first step, of which z is the whole average, moves both alike."""
    param = parameter(65, dtype=dtype)
    before = param.detach().clone()
    optimizer = method([param], lr=0.0, param_storage=param_storage)
    take(optimizer, param, gradients(1, param))
    z = optimizer.state[param]["z"]
    assert z.dtype == torch.float32 and torch.equal(z, before.float()) and torch.equal(param, before)
    optimizer.param_groups[0]["lr"] = 0.125
    take(optimizer, param, gradients(1, param))
    if dtype == torch.float32:
        assert torch.equal(param, z) and not torch.equal(param, before)


@EACH
def test_a_step_in_evaluation_is_an_error(method: type) -> None:
    param = parameter(33)
    optimizer = method([param], lr=0.05)
    take(optimizer, param, gradients(2, param))
    optimizer.eval()
    state = copy.deepcopy(optimizer.state_dict())
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match=r"group 0: step\(\) in evaluation.*call optimizer.train\(\)"):
        optimizer.step()
    assert same_bits(param, before)
    for name, value in optimizer.state_dict()["state"][0].items():
        assert torch.equal(value, state["state"][0][name])
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]


@EACH
def test_a_skipped_step_leaves_the_sums(method: type) -> None:
    """By the norm, also where it is the first; by a GradScaler of a step that takes its scale."""
    param = parameter(33)
    twin = Parameter(param.detach().clone())
    optimizer, plain = (method([p], lr=0.05, max_grad_norm=math.inf) for p in (param, twin))
    given = gradients(4, param)
    bad = given[0].clone()
    bad[3] = math.nan
    take(optimizer, param, [bad, *given[:2], bad * 1.0, *given[2:]])
    take(plain, twin, given)
    assert optimizer.skipped_steps == 2 and same_bits(param, twin)
    group, expected = optimizer.param_groups[0], plain.param_groups[0]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)  # as a GradScaler says it
    optimizer.step()
    assert optimizer.skipped_steps == 3 and same_bits(param, twin)
    assert [group[x] for x in SUMS] == [expected[x] for x in SUMS]


def test_steps_weigh_as_the_authors_have_them() -> None:
    """Sums are of powers of the largest rate so far, a falling rate weighs as that, and k counts every step."""
    param = parameter(3)
    optimizer = ScheduleFreeSign([param], lr=0.5, warmup_steps=4, r=2.0, weight_lr_power=3.0)
    (group,) = optimizer.param_groups
    expected, largest = 0.0, 0.0
    for k in range(8):
        group["lr"] = 0.5 if k < 6 else 0.25
        rate = group["lr"] * min(1.0, (k + 1) / 4)
        largest = max(largest, rate)
        expected += (k + 1) ** 2 * largest**3
        take(optimizer, param, gradients(1, param))
        assert group["weight_sum"] == pytest.approx(expected, rel=1e-15) and group["lr_max"] == largest
    assert group["k"] == 8


def test_rates_beyond_what_weights_can_be() -> None:
    """A weight that doubles do not hold counts as the largest, and without any weight nothing is averaged."""
    param = parameter(3)
    for lr in (1e300, 1e-300):
        optimizer = ScheduleFreeSign([param], lr=lr)
        take(optimizer, param, gradients(2, param))
        assert math.isfinite(optimizer.param_groups[0]["weight_sum"])


@EACH
def test_nan_and_infinite_gradients(method: type) -> None:
    """They reach the entries that have them, and no others. The sign of NaN is 0."""
    param = Parameter(torch.zeros(4))
    optimizer = method([param], lr=0.5)
    take(optimizer, param, [torch.tensor([1.0, math.nan, math.inf, -1.0])])
    spoiled = [False, True, True, False] if method is ScheduleFreeAdamW else [False] * 4
    assert param.isnan().tolist() == spoiled
    optimizer.eval()
    assert param.isnan().tolist() == spoiled
    optimizer.train()
    take(optimizer, param, [torch.ones(4)])
    assert param.isnan().tolist() == spoiled


@EACH
def test_parameters_without_a_gradient_or_state(method: type) -> None:
    """Both modes leave them alone; a group that is added in evaluation waits for train()."""
    first, second, third = parameter(3), parameter(5), parameter(4)
    optimizer = method([first, second], lr=0.5)
    take(optimizer, first, gradients(2, first))
    optimizer.eval()
    assert set(optimizer.state) == {first}
    optimizer.add_param_group({"params": [third]})
    first.grad = None
    third.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match="group 0: step"):
        optimizer.step()
    optimizer.train()
    optimizer.step()
    assert torch.equal(second, parameter(5)) and not torch.equal(third, parameter(4))


@EACH
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"warmup_steps": -1}, ValueError, "warmup_steps=-1"),
        ({"warmup_steps": 0.5}, ValueError, "warmup_steps=0.5: must be a whole number"),
        ({"r": -1.0}, ValueError, "r=-1.0"),
        ({"weight_lr_power": math.inf}, ValueError, "weight_lr_power=inf"),
        ({"capturable": True}, ValueError, "capturable=True with ScheduleFree"),
        ({"weight_decay_kind": "cautious", "weight_decay": 0.1}, ValueError, "depends on the parameter"),
        ({"caution": "exact"}, ValueError, "depends on the parameter|has the gradient's sign"),
        ({"lr_scale": "rms"}, ValueError, "depends on the parameter"),
        ({"average": 1}, TypeError, "unexpected keyword"),
    ],
)
def test_bad_arguments(method: type, given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        method([parameter(3)], lr=0.1, **given)


def test_a_first_beta_of_zero_has_no_average() -> None:
    for method, own in ((ScheduleFreeAdamW, {"betas": (0.0, 0.9)}), (ScheduleFreeSign, {"beta": 0.0})):
        with pytest.raises(ValueError, match=r"first beta is 0\.0: must be above 0"):
            method([parameter(3)], **own)


@pytest.mark.parametrize("given", ["int8", "int4", ("bf16", "fp32"), ("fp32", "int8")])
def test_weights_are_not_stored_in_few_bits(given: Any) -> None:
    with pytest.raises(ValueError, match=r"state_dtype=.* of (z|exp_avg_sq): must be 'fp32'"):
        ScheduleFreeAdamW([parameter(3)], state_dtype=given)
    optimizer = ScheduleFreeAdamW([param := parameter(3)], state_dtype="bf16")
    take(optimizer, param, gradients(1, param))
    state = optimizer.state[param]
    assert (state["z"].dtype, state["exp_avg_sq"].dtype) == (torch.float32, torch.bfloat16)


@EACH
def test_what_takes_steps_otherwise_is_refused(method: type) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = method(model.parameters(), lr=0.1)
    for drive in (signadam_ext.release_gradients, signadam_ext.offload):
        with pytest.raises(ValueError, match=f"{drive.__name__} does not serve {method.__name__}: its groups keep"):
            drive(model, optimizer) if drive is signadam_ext.release_gradients else drive(optimizer)
    with pytest.raises(ValueError, match="FunctionalOptimizer does not serve"):
        FunctionalOptimizer(method, lr=0.1)
    assert optimizer.runtime.driver is None


@EACH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["state"][0].pop("z"), "state 'z' of parameter 0 of group 0 is missing"),
        (lambda saved: saved["state"][0].update(y=torch.zeros(4)), "state 'y' of parameter 0 of group 0"),
        (lambda saved: saved["param_groups"][0].update(weight_sum=math.nan), "weight_sum=nan"),
        (lambda saved: saved["param_groups"][0].update(k=-1), "k=-1"),
        (lambda saved: saved["param_groups"][0].update(beta_of_y=1.0), "beta_of_y=1.0"),
        (lambda saved: saved["param_groups"][0].update(train_mode="yes"), "train_mode='yes'"),
    ],
)
def test_bad_checkpoints(method: type, change: Any, message: str) -> None:
    """Nothing of one is taken."""
    param = parameter(3)
    optimizer = method([param], lr=0.1)
    take(optimizer, param, gradients(1, param))
    optimizer.eval()
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.load_state_dict(saved)
    assert all(torch.equal(x, before["state"][0][name]) for name, x in optimizer.state_dict()["state"][0].items())
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


@EACH
def test_a_broken_copy_stops_train_before_anything_is_written(method: type) -> None:
    params = [parameter(3), parameter(4)]
    optimizer = method(params, lr=0.1)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.step()
    optimizer.eval()
    averages = [param.detach().clone() for param in params]
    optimizer.state[params[1]]["y"] = torch.zeros(3)
    with pytest.raises(ValueError, match="state 'y' of parameter 1 of group 0"):
        optimizer.train()
    assert all(map(same_bits, params, averages)) and "y" in optimizer.state[params[0]]


def average(optimizer: Any, param: Tensor) -> Tensor:
    """x as evaluation has it, of an fp32 parameter."""
    beta = optimizer.param_groups[0]["betas"][0]
    y = param.detach().clone()
    return y + torch.tensor(1 - 1 / beta) * (optimizer.state[param]["z"] - y)


@EACH
@pytest.mark.parametrize("begin", [0, 4])
def test_parameters_that_share_memory(method: type, begin: int) -> None:
    """All or some of it: averages are of what both were, the later one stays, and all bits come back."""
    memory = torch.randn(12, generator=torch.Generator().manual_seed(7))
    first, second = Parameter(memory[:8]), Parameter(memory[begin : begin + 8])
    optimizer = method([first, second], lr=0.1)
    for g in gradients(3, first):
        first.grad, second.grad = g.clone(), g.flip(0)
        optimizer.step()
    before, expected = memory.clone(), memory.clone()
    averages = [average(optimizer, param) for param in (first, second)]
    expected[:8] = averages[0]
    expected[begin : begin + 8] = averages[1]
    optimizer.eval()
    assert same_bits(memory, expected) and not same_bits(memory, before)
    optimizer.train()
    assert same_bits(memory, before)


def test_modes_change_as_a_whole_or_not_at_all(thorough: bool) -> None:
    """Wherever a signal handler raises, or a state is broken; and gradients are recorded as before."""
    memory = torch.randn(6, generator=torch.Generator().manual_seed(7))
    params = [Parameter(memory[:4]), Parameter(memory[2:])]
    optimizer = ScheduleFreeSign([{"params": [param]} for param in params], lr=0.1)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.step()
    trained = memory.clone()
    optimizer.eval()
    averages = memory.clone()

    def is_in(mode: str) -> bool:
        kept = ["y" in optimizer.state[param] for param in params]
        modes = [group["train_mode"] for group in optimizer.param_groups]
        if mode == "train":
            return same_bits(memory, trained) and not any(kept) and all(modes)
        return same_bits(memory, averages) and all(kept) and not any(modes)

    def change(mode: Any) -> None:
        try:
            mode()
        finally:
            records.append(torch.is_grad_enabled())

    records: list[bool] = []
    optimizer.train()
    for n in itertools.count(1, 1 if thorough else 4):
        where, points = at_point(lambda: change(optimizer.eval), n)
        assert all(records), where
        assert is_in("train") or is_in("eval"), where
        optimizer.train()
        if points < n:
            break
    for n in itertools.count(1, 1 if thorough else 4):
        optimizer.eval()
        where, points = at_point(lambda: change(optimizer.train), n)
        assert all(records), where
        assert is_in("train") or is_in("eval"), where
        optimizer.train()
        if points < n:
            break
    optimizer.state[params[1]]["z"] = torch.zeros(3)
    with pytest.raises(ValueError, match="state 'z' of parameter 0 of group 1"):
        optimizer.eval()
    assert is_in("train")


@EACH
@pytest.mark.parametrize("was, now", [("split16", "master"), ("split8", "master"), ("master", "split16")])
def test_averages_know_what_another_storage_has_left(method: type, was: str, now: str) -> None:
    """Low bits become a master copy at the first step, or the other way, and evaluation may come before it."""
    param = parameter(500, dtype=torch.bfloat16)
    optimizer = method([param], lr=0.05, param_storage=was)
    take(optimizer, param, gradients(4, param))
    resumed = Parameter(param.detach().clone())
    other = method([resumed], lr=0.05, param_storage=now if was != "master" else was)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.param_groups[0]["param_storage"] = now
    names = set(other.state[resumed])
    optimizer.eval()
    other.eval()
    assert same_bits(param, resumed) and set(other.state[resumed]) == {*names, "y"}


@EACH
def test_the_first_beta_stays_that_of_the_average(method: type) -> None:
    """Another would change x, which y and z tell by it alone: nothing is written before it is refused."""
    param = parameter(33)
    rest = (0.999,) if method is ScheduleFreeAdamW else ()
    optimizer = method([param], lr=0.05)
    (group,) = optimizer.param_groups
    group["betas"] = (0.8, *rest)  # before the first step
    assert group["beta_of_y"] == 0.0
    take(optimizer, param, gradients(2, param))
    assert group["beta_of_y"] == 0.8
    group["betas"] = (0.95, *rest)
    before, held = param.detach().clone(), copy.deepcopy(optimizer.state_dict())
    for call in (optimizer.step, optimizer.eval):
        with pytest.raises(ValueError, match=r"group 0: the first beta is 0\.95, and was 0\.8 .* cycle_momentum=False"):
            call()
        assert same_bits(param, before)
        assert str(optimizer.state_dict()) == str(held)
    group["betas"] = (0.8, *rest)
    optimizer.step()
    optimizer.eval()


@EACH
def test_schedulers_that_cycle_momentum(method: type) -> None:
    param = parameter(33)
    for cycles in (True, False):
        optimizer = method([param], lr=0.05)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10, cycle_momentum=cycles)
        take(optimizer, param, gradients(1, param))
        scheduler.step()
        if cycles:
            with pytest.raises(ValueError, match="cycle_momentum=False"):
                optimizer.step()
        else:
            optimizer.step()


@EACH
def test_checkpoints_that_do_not_say_the_beta(method: type) -> None:
    """Those of before: the next step says it."""
    param = parameter(33)
    optimizer = method([param], lr=0.05)
    take(optimizer, param, gradients(2, param))
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["beta_of_y"]
    other = method([param], lr=0.05)
    other.load_state_dict(saved)
    other.eval()
    other.train()
    assert other.param_groups[0]["beta_of_y"] == 0.0
    take(other, param, gradients(1, param))
    assert other.param_groups[0]["beta_of_y"] == 0.9


def test_lists_have_the_bits_of_the_classes() -> None:
    param = parameter(33)
    given = gradients(5, param)
    for method in (ScheduleFreeAdamW, ScheduleFreeSign):
        own, p = Parameter(param.detach().clone()), param.detach().clone()
        optimizer = method([own], lr=0.1, weight_decay=0.1)
        z, v, step = p.clone(), torch.zeros_like(p), torch.tensor(0.0)
        for t, g in enumerate(given, 1):
            take(optimizer, own, [g])
            common = {"lr": 0.1, "weight_decay": 0.1}
            weight = 0.1**2 / optimizer.param_groups[0]["weight_sum"]
            assert weight == pytest.approx(1 / t)
            if method is ScheduleFreeAdamW:
                schedule_free_adamw([p], [g], [z], [v], [step], averaging=weight, **common)
            else:
                schedule_free_sign([p], [g], [z], averaging=weight, **common)
            assert same_bits(p, own.detach()) and same_bits(z, optimizer.state[own]["z"])
    with pytest.raises(ValueError, match="averaging=1\\.5"):
        schedule_free_sign([p], [g], [z], lr=0.1, averaging=1.5)


@EACH
def test_a_copy_and_a_pickle_keep_the_mode(method: type) -> None:
    param = parameter(33)
    optimizer = method([param], lr=0.05)
    take(optimizer, param, gradients(3, param))
    trained = param.detach().clone()
    optimizer.eval()
    twin = copy.deepcopy(optimizer)
    (own,) = twin.param_groups[0]["params"]
    twin.train()
    assert same_bits(own, trained) and not same_bits(param, trained)


def test_shaped_rates_leave_the_average() -> None:
    """A factor of one parameter's rate is in no sum, and the learning rate of a scheduler is in both."""
    matrix, vector = parameter(6, 2), parameter(7)
    optimizer = ScheduleFreeSign([matrix, vector], lr=0.5, lr_scale="shape")
    for param in (matrix, vector):
        param.grad = torch.ones_like(param)
    before = matrix.detach().clone()
    optimizer.step()
    assert torch.equal(matrix, before - 0.5 * 0.25) and optimizer.param_groups[0]["weight_sum"] == 0.25


@EACH
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_a_distributed_checkpoint_in_evaluation(method: type, flat: bool, tmp_path: Any) -> None:
    """It is read into what an optimizer has: one in training has no place for the points y, and does not train on."""
    how = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)

    def made() -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        return model, method(model.named_parameters(), lr=0.1)

    model, optimizer = made()
    for _ in range(3):
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    trained = [param.detach().clone() for param in model.parameters()]
    optimizer.eval()
    saved = {"optimizer": dcp.get_optimizer_state_dict(model, optimizer, options=how)}
    dcp_files.save(saved, checkpoint_id=tmp_path)
    for evaluates in (True, False):
        other, resumed = made()
        there = {"optimizer": dcp.get_optimizer_state_dict(other, resumed, options=how)}
        if evaluates:
            resumed.eval()
            there = {"optimizer": dcp.get_optimizer_state_dict(other, resumed, options=how)}
        dcp_files.load(there, checkpoint_id=tmp_path)
        dcp.set_optimizer_state_dict(other, resumed, there["optimizer"], options=how)
        other.load_state_dict(model.state_dict())
        averages = [param.detach().clone() for param in other.parameters()]
        if evaluates:
            resumed.train()
            assert all(map(same_bits, other.parameters(), trained))
            continue
        with pytest.raises(
            ValueError, match=r"state 'y' of .*weight.* is missing.* must be loaded into an optimizer that"
        ):
            resumed.train()
        assert all(map(same_bits, other.parameters(), averages)) and not resumed.param_groups[0]["train_mode"]


@EACH
def test_what_groups_keep_is_no_argument(method: type) -> None:
    for name in ("k", "weight_sum", "lr_max", "beta_of_y", "train_mode"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument {name!r}(?!.*{name}')"):
            method([parameter(3)], **{name: 1.0})
