"""What acts on any rule's step: kinds and scales of weight decay, and a learning rate for each tensor."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.optimizer_contract import copies, gradient, make, parameters, train
from support.paper_formulas import TABLE, Row
from support.strategies import same_bits
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn import Parameter

import signadam_ext
from signadam_ext import MSGD, AdamW, Lion, MARSAdamW, SignAdamPP, SignSGD, Signum

#: Rules whose step would be the same for a parameter of 0.
MOVING = [row for row in TABLE if not row.reads_param]
each_rule = pytest.mark.parametrize("row", MOVING, ids=[row.id for row in MOVING])
each_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def decayed(p: Tensor, step: Tensor, decay: float) -> Tensor:
    """[CW, Alg. 1], of a step that has its sign: ``p`` decays where ``update * p >= 0``, compared in float64."""
    agrees = -step.double().sign() * p.double().sign() >= 0
    return torch.where(agrees, p * torch.tensor(decay), p) + step


@each_backend
@each_rule
def test_cautious_decay(row: Row, backend: str) -> None:
    """Parameters decay where the step does not lead away from 0. The step is what a parameter of 0 makes of it."""
    lr, weight_decay = 0.05, 0.3
    params = parameters((40, 7), (3,), ())
    optimizer = make(row, params, backend, lr=lr, weight_decay=weight_decay, weight_decay_kind="cautious")
    twins = copies(params)
    twin = make(row, twins, backend, lr=lr)
    for step in range(1, 5):
        before = [param.detach().clone() for param in params]
        with torch.no_grad():
            torch._foreach_zero_(twins)
        train(optimizer, [step])
        train(twin, [step])
        moves = row.moves_at_first or step > 1
        for p, now, moved in zip(before, params, twins, strict=True):
            expected = decayed(p, moved.detach(), 1 - lr * weight_decay if moves else 1.0)
            assert torch.equal(now, expected)
        assert not moves or any(((-moved.sign() * p.sign()) < 0).any() for p, moved in zip(before, twins, strict=True))


@each_backend
def test_gated_entries_decay(backend: str) -> None:
    """Where the gate closes the step is 0, and the paper's ``>= 0`` lets the parameter decay."""
    param = Parameter(torch.tensor([2.0, -2.0, 2.0, -2.0]))
    param.grad = torch.tensor([0.1, 0.1, 1.0, 1.0])
    kind = {"weight_decay": 0.5, "weight_decay_kind": "cautious"}
    SignSGD([param], lr=0.5, alpha=0.5, backend=backend, **kind).step()
    # The third moves towards 0 and decays; the fourth away from it and does not.
    assert param.tolist() == [1.5, -1.5, 1.0, -2.5]


@each_backend
def test_products_that_underflow_do_not_decay(backend: str) -> None:
    """Signs are compared: the product of a small parameter and a small step would be 0."""
    tiny = torch.tensor([1e-30, -1e-30, 1e-30, -1e-30])
    param = Parameter(tiny.clone())
    param.grad = torch.tensor([1e-30, 1e-30, -1e-30, -1e-30])
    MSGD([param], lr=0.5, beta=0.0, weight_decay=1.0, weight_decay_kind="cautious", backend=backend).step()
    step = -0.5 * param.grad
    assert torch.equal(param.detach(), torch.stack([0.5 * tiny[0], tiny[1], tiny[2], 0.5 * tiny[3]]) + step)


@pytest.mark.parametrize("options", [{}, {"lr_scale": "rms"}], ids=["plain", "scaled"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_step_of_zero_leaves_the_sign_of_a_zero(backend: str, options: dict[str, Any]) -> None:
    param = Parameter(torch.tensor([-0.0, 0.0, -0.0, 1.0]))
    optimizer = Signum([param], lr=0.5, weight_decay=0.25, weight_decay_kind="cautious", backend=backend, **options)
    param.grad = torch.zeros(4)
    optimizer.step()
    assert torch.signbit(param.detach()).tolist() == [True, False, True, False] and param[3] < 1


def test_cautious_decay_of_zero_changes_no_bit() -> None:
    for row in MOVING:
        params = parameters()
        twins = copies(params)
        train(make(row, params, weight_decay=0.0, weight_decay_kind="cautious"), range(3))
        train(make(row, twins, weight_decay=0.0), range(3))
        assert all(map(same_bits, params, twins))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("param_storage", ["nearest", "stochastic", "master"])
def test_cautious_decay_is_rounded_once(dtype: torch.dtype, param_storage: str) -> None:
    """As decoupled decay, and at any storage: the reference's bits."""
    results = []
    for backend in ("cpu", "reference"):
        params = parameters((65, 33), dtype=dtype)
        optimizer = AdamW(
            params,
            lr=1e-2,
            weight_decay=0.1,
            weight_decay_kind="cautious",
            param_storage=param_storage,
            state_dtype="bf16",
            backend=backend,
        )
        train(optimizer, range(4))
        results.append(params[0])
    assert same_bits(*results)


@pytest.mark.parametrize("kind", ["decoupled", "coupled"])
def test_kinds_have_two_names(kind: str) -> None:
    for named in (kind == "decoupled", kind != "decoupled"):  # the kind has the last word
        params, twins = parameters(), parameters()
        train(SignAdamPP(params, 0.1, weight_decay=0.2, weight_decay_kind=kind, decoupled_weight_decay=named), range(3))
        train(SignAdamPP(twins, 0.1, weight_decay=0.2, decoupled_weight_decay=kind == "decoupled"), range(3))
        assert all(map(same_bits, params, twins))


def shrunk(**options: Any) -> list[float]:
    """What is left of 1 after each of three steps without a gradient's sign, at learning rates 0.5, 0.25, 0.75."""
    param = Parameter(torch.ones(1))
    optimizer = Signum([param], lr=0.5, **options)
    found = []
    for lr in (0.5, 0.25, 0.75):
        optimizer.param_groups[0]["lr"] = lr
        param.grad = torch.zeros(1)
        with torch.no_grad():
            param.fill_(1.0)
        optimizer.step()
        found.append(param.item())
    return found


def test_scales() -> None:
    """arXiv 2506.02285 (corrected), FlashOptim and optimi (fully decoupled), Emerging-Optimizers (independent)."""
    weight_decay = {"weight_decay": 0.125}
    rates = [0.5, 0.25, 0.75]
    assert shrunk(**weight_decay) == [1 - lr / 8 for lr in rates]
    assert shrunk(**weight_decay, weight_decay_scale="independent") == [1 - 1 / 8] * 3
    assert shrunk(**weight_decay, weight_decay_scale="fully_decoupled") == [1 - lr / 0.5 / 8 for lr in rates]
    largest = [0.5, 0.5, 0.75]
    corrected = [1 - lr * lr / top / 8 for lr, top in zip(rates, largest, strict=True)]
    assert shrunk(**weight_decay, weight_decay_scale="corrected") == corrected
    assert shrunk(**weight_decay, weight_decay_scale="corrected", weight_decay_kind="cautious") == corrected


@pytest.mark.parametrize("scale", ["corrected", "fully_decoupled"])
def test_a_checkpoint_keeps_the_rates_of_a_scale(scale: str) -> None:
    options: dict[str, Any] = {"weight_decay": 0.5, "weight_decay_scale": scale}
    params = parameters()
    optimizer = Lion(params, lr=0.1, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(3):
        train(optimizer, [step])
        scheduler.step()
    twins = copies(params)
    other = Lion(twins, lr=0.7, **options)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["base_lr"] == other.param_groups[0]["largest_lr"] == 0.1
    for step in range(3, 6):
        train(optimizer, [step])
        train(other, [step])
    assert all(map(same_bits, params, twins))


@each_backend
@pytest.mark.parametrize("scale", ["lr", "corrected", "independent", "fully_decoupled"])
def test_a_learning_rate_of_0_moves_nothing(scale: str, backend: str) -> None:
    """Nor does torch.distributed.checkpoint, which makes state by such a step."""
    params = parameters()
    optimizer = Lion(params, lr=0.1, weight_decay=0.5, weight_decay_scale=scale, backend=backend)
    before = copies(params)
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, [0])
    assert all(map(same_bits, params, before))
    if scale != "corrected":  # which asks for another lr
        module = torch.nn.ParameterList(copies(params))
        get_optimizer_state_dict(module, Lion(module.parameters(), weight_decay=0.5, weight_decay_scale=scale))
        assert all(map(same_bits, module, before))


def test_the_largest_rate_is_of_steps_that_were_not_refused() -> None:
    (param,) = params = parameters((3,))
    optimizer = Lion(params, lr=0.1, weight_decay=0.5, weight_decay_scale="corrected", max_grad_norm=1.0)
    train(optimizer, [0])
    (group,) = optimizer.param_groups
    kept, group["lr"] = optimizer.state[param]["exp_avg"], 1e6
    optimizer.state[param]["exp_avg"] = torch.zeros(7)
    with pytest.raises(ValueError, match="exp_avg"):
        optimizer.step()
    assert group["largest_lr"] == 0.1
    optimizer.state[param]["exp_avg"], group["lr"] = kept, 0.2
    param.grad = torch.full((3,), torch.nan)
    optimizer.step()  # a device does not tell whether it has skipped one
    assert optimizer.skipped_steps == 1 and group["largest_lr"] == 0.2


def test_a_number_of_a_group_is_no_scale() -> None:
    (param,) = parameters((6, 10))
    with pytest.raises(
        ValueError, match=r"group 0: lr_scale=0\.5 in a group, where lr_scale='shape' is the optimizer's"
    ):
        SignSGD([{"params": [param], "lr_scale": 0.5}], lr_scale="shape")
    optimizer = SignSGD([{"params": [param], "lr_scale": 1.0}], lr_scale="shape")
    assert optimizer.param_groups[0]["lr_scale"] == 1.0
    assert SignSGD([{"params": [param], "lr_scale": 0.5}]).param_groups[0]["lr_scale"] == 0.5


def test_groups_have_rates_of_their_own() -> None:
    first, second = parameters((2,), (3,))
    optimizer = Lion([{"params": [first]}, {"params": [second], "lr": 0.5}], lr=0.25)
    assert [group["base_lr"] for group in optimizer.param_groups] == [0.25, 0.5]
    optimizer.add_param_group({"params": parameters((1,)), "lr": 2.0, "base_lr": 4.0})
    assert optimizer.param_groups[2]["base_lr"] == 4.0 and optimizer.param_groups[2]["largest_lr"] == 2.0


SHAPES = ((6, 10), (4, 2, 3, 3), (5,), ())


@each_backend
@pytest.mark.parametrize("cls", [Signum, AdamW, SignAdamPP])
def test_shape_scale(cls: Any, backend: str) -> None:
    """Each tensor as in a group of its own with its learning rate; Emerging-Optimizers' ``use_shape_scaling``."""
    params = parameters(*SHAPES)
    optimizer = cls(params, lr=0.5, weight_decay=0.0, lr_scale="shape", backend=backend)
    factors = (2 / 16, 2 / (4 + 18), 1.0, 1.0)
    twins = copies(params)
    groups = [{"params": [twin], "lr": 0.5 * factor} for twin, factor in zip(twins, factors, strict=True)]
    twin = cls(groups, weight_decay=0.0, backend=backend)
    for step in range(3):
        for i, (param, other) in enumerate(zip(params, twins, strict=True)):
            param.grad, other.grad = gradient(param, step, i), gradient(param, step, i)
        optimizer.step()
        twin.step()
    assert all(map(same_bits, params, twins))


def test_a_function_scales() -> None:
    """It is given a parameter's name and shape; decay sees the group's learning rate alone."""
    model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 3))
    seen: list[Any] = []

    def scale(name: str | None, shape: tuple[int, ...]) -> float:
        seen.append((name, shape))
        return 0.0 if name == "1.bias" else 3.0

    optimizer = Signum(model.named_parameters(), lr=0.125, weight_decay=0.5, lr_scale=scale)
    before = [param.detach().clone() for param in model.parameters()]
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert seen == [("0.weight", (7, 4)), ("1.weight", (3, 4)), ("1.bias", (3,))]
    for (name, param), p in zip(model.named_parameters(), before, strict=True):
        assert torch.equal(param.detach(), p * (1 - 0.0625) - (0.0 if name == "1.bias" else 0.375))


def test_a_scale_that_changes_holds_from_the_next_step_on() -> None:
    param = Parameter(torch.zeros(4, 4))
    optimizer = Signum([param], lr=1.0)
    for scale, moved in ((1.0, 1.0), ("shape", 0.25), (lambda name, shape: 0.5, 0.5), (0.125, 1.0), (None, 1.0)):
        optimizer.param_groups[0]["lr_scale"] = scale
        param.grad = torch.ones_like(param)
        before = param.detach().clone()
        optimizer.step()
        assert torch.equal(before - param.detach(), torch.full_like(before, moved))


def test_a_number_for_all_groups_would_do_nothing() -> None:
    with pytest.raises(ValueError, match=r"lr_scale=2\.0: a number is an entry of a group"):
        Signum(parameters((3,)), lr_scale=2.0)
    numpy = pytest.importorskip("numpy")
    for number in (numpy.float32(2), numpy.float64(2), numpy.int64(2), numpy.array(2.0)):
        with pytest.raises(ValueError, match="a number is an entry of a group"):
            Signum(parameters((3,)), lr_scale=number)
    assert Signum(parameters((3,)), lr_scale=1.0).param_groups[0]["lr_scale"] == 1.0
    optimizer = Signum(parameters((3,)))
    for number in (numpy.float32(0.5), numpy.float64(0.5), numpy.array(0.5)):
        optimizer.param_groups[0]["lr_scale"] = number
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
        optimizer.step()
    with pytest.raises(ValueError, match=r"lr_scale=tensor.*or a number"):
        Signum(parameters((3,)), lr_scale=torch.tensor(2.0))


@pytest.mark.parametrize("caution", ["exact", "delayed"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_sign_of_a_nan_decides_nothing(backend: str, caution: str) -> None:
    """Of rules whose step is finite at a NaN gradient: the entry goes against nothing. Found by the fuzzer."""
    found = []
    for sign in (1.0, -1.0):
        nan = torch.full((4,), torch.nan).copysign(torch.tensor([sign] * 4))
        param = Parameter(torch.zeros(12))
        optimizer = SignAdamPP([param], lr=0.5, beta=0.5, caution=caution, backend=backend)
        for g in (torch.ones(12), torch.cat((nan, torch.ones(8)))):
            param.grad = g
            optimizer.step()
        found.append(param.detach().clone())
        assert optimizer.state[param]["agreement"] == 8 / 12
    assert torch.equal(*found) and torch.equal(found[0][:4], found[0][:4].new_full((4,), found[0][0].item()))
    # A momentum that has become NaN stays so, wherever the gradient is.
    param = Parameter(torch.zeros(2))
    optimizer = Signum([param], lr=0.5, caution=caution, backend=backend)
    for g in (torch.tensor([torch.nan, 1.0]), torch.tensor([0.0, 1.0])):
        param.grad = g
        optimizer.step()
    assert optimizer.state[param]["exp_avg"].isnan().tolist() == [True, False]


def test_no_lr_scale_of_an_older_checkpoint_is_one() -> None:
    """What schedulers multiply lr with must be a number."""
    optimizer = Signum(parameters((3,)))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr_scale"] = None
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr_scale"] == 1.0
    assert Signum(parameters((3,)), lr_scale=None).param_groups[0]["lr_scale"] == 1.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weight_decay_kind": "coupled", "weight_decay_scale": "corrected"}, "coupled weight decay, which is part"),
        ({"decoupled_weight_decay": False, "weight_decay_scale": "independent"}, "coupled weight decay, which is part"),
        ({"weight_decay_kind": "careful"}, "weight_decay_kind='careful'"),
        ({"weight_decay_kind": "cautios"}, "did you mean 'cautious'"),
        ({"weight_decay_scale": "none"}, "weight_decay_scale='none'"),
        ({"lr": 0.0, "weight_decay_scale": "fully_decoupled"}, "began at 0"),
        ({"lr_scale": "size"}, "lr_scale='size'"),
        ({"lr_scale": -1.0}, "lr_scale=-1.0"),
        ({"lr_scale": Signum}, "lr_scale="),
    ],
)
def test_modifiers_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    params = parameters()
    with pytest.raises(ValueError, match=message):
        SignAdamPP(params, **{"lr": 0.1, **options})
    optimizer = SignAdamPP(params, lr=0.1)
    for index, param in enumerate(params):
        param.grad = gradient(param, 0, index)
    before = [param.detach().clone() for param in params]
    optimizer.param_groups[0].update(options)
    if "lr" in options:
        optimizer.param_groups[0]["base_lr"] = 0.0
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(map(same_bits, params, before)) and not optimizer.state


@pytest.mark.parametrize("value, error", [(-1.0, ValueError), (float("nan"), ValueError), ("x", TypeError)])
def test_a_function_that_gives_no_factor(value: Any, error: type) -> None:
    params = parameters()
    optimizer = SignAdamPP(params, lr=0.1, lr_scale=lambda name, shape: value)
    for index, param in enumerate(params):
        param.grad = gradient(param, 0, index)
    before = [param.detach().clone() for param in params]
    with pytest.raises(error, match="lr_scale of parameter 0 of group 0"):
        optimizer.step()
    assert all(map(same_bits, params, before)) and not optimizer.state


@pytest.mark.parametrize(
    ("scale", "error"),
    [
        (lambda name, shape: 0.5 if name.endswith("bias") else 1.0, "AttributeError"),
        (lambda name, shape: {"bias": 0.5}[name], "KeyError"),
    ],
)
def test_a_function_of_names_that_nobody_gave(scale: Any, error: str) -> None:
    params = parameters((3,))
    optimizer = Signum(params, lr=0.5, lr_scale=scale)
    params[0].grad = torch.ones(3)
    before = params[0].clone()
    with pytest.raises(
        TypeError, match=rf"lr_scale of parameter 0 of group 0 raises {error} .* model.named_parameters"
    ):
        optimizer.step()
    assert torch.equal(params[0], before) and not optimizer.state


def test_a_function_stays_the_constructors() -> None:
    """As every function: a checkpoint holds its name."""
    params = parameters()
    optimizer = SignAdamPP(params, lr=0.1, lr_scale=lambda name, shape: 0.5)
    train(optimizer, range(2))
    saved = optimizer.state_dict()
    other = SignAdamPP(copies(params), lr=0.1, lr_scale=lambda name, shape: 0.5)
    other.load_state_dict(saved)
    assert callable(other.param_groups[0]["lr_scale"])
    with pytest.raises(ValueError, match="lr_scale"):
        SignAdamPP(copies(params), lr=0.1).load_state_dict(saved)


def test_released_gradients_are_scaled() -> None:
    results = []
    for released, scale in itertools.product((False, True), ("shape", lambda name, shape: 0.25)):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 4)
        optimizer = Signum(
            model.named_parameters(), lr=0.5, weight_decay=0.1, weight_decay_kind="cautious", lr_scale=scale
        )
        if released:
            signadam_ext.release_gradients(model, optimizer)
        for step in range(3):
            model(torch.full((2, 6), 1.0 + step)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([param.detach().clone() for param in model.parameters()])
    for plain, alone in zip(results[:2], results[2:], strict=True):
        assert all(map(same_bits, plain, alone))


# What multiplies the steps of each tensor.

SCALED = ("sign_sgd", "signum", "sign_adam", "sign_adam_pp", "adam", "lion", "msvag_minibatch")


def scaled_rows(rows: list[Row]) -> Any:
    """One of each kind; others in the thorough run."""
    left = pytest.mark.thorough
    # A first step that moves nothing has no step without modifiers beside it.
    fixed = [
        row
        for row in rows
        if row.hyperparameters.get("confidence", "fixed") == "fixed" and row.optimizer is not signadam_ext.ADOPT
    ]
    fixed = [row for row in fixed if row in MOVING and row.hyperparameters.get("max_norm") is None]
    taken = [pytest.param(row, id=row.id, marks=() if row.id in SCALED else left) for row in fixed]
    return pytest.mark.parametrize("row", taken)


FLOOR = 2.0**-10


def whole_step(row: Row, twin: torch.optim.Optimizer, twins: list[Tensor], step: int) -> list[Tensor]:
    """What a step without modifiers makes of parameters at 0."""
    with torch.no_grad():
        torch._foreach_zero_(twins)
    train(twin, [step])
    return [param.detach().clone() for param in twins]


@pytest.mark.parametrize("form", ["exact", "delayed"])
@each_backend
@scaled_rows([row for row in TABLE if not row.id.startswith(("sign_sgd", "svag", "adam_star_plain", "grams"))])
def test_caution(row: Row, backend: str, form: str) -> None:
    """arXiv 2411.16085: entries whose update has not the gradient's sign stay; the others take n / count of the step,
    at least 1 in 1024. The count is this step's, or the last one's."""
    shapes = ((40, 7), (3,), (127, 131))  # of more than a chunk
    params = parameters(*shapes)
    optimizer = make(row, params, backend, lr=0.05, caution=form, weight_decay=0.2, weight_decay_kind="decoupled")
    twins = copies(params)
    twin = make(row, twins, backend, lr=0.05)
    last = [1.0] * len(params)
    for step in range(1, 6):
        before = [param.detach().clone() for param in params]
        train(optimizer, [step])
        moved = whole_step(row, twin, twins, step)
        for i, (p, now, whole) in enumerate(zip(before, params, moved, strict=True)):
            g = gradient(now, step, i) * (-1 if optimizer.param_groups[0]["maximize"] else 1)
            agrees = whole.double().sign() * g.double().sign() < 0
            share = float(agrees.double().sum()) / agrees.numel() or last[i]
            taken = share if form == "exact" else last[i]
            scale = torch.tensor(1 / max(taken, FLOOR), dtype=torch.float64).float()
            expected = p * torch.tensor(1 - 0.05 * 0.2) + torch.where(agrees, whole, 0.0) * scale
            assert torch.equal(now, expected)
            assert optimizer.state[now]["agreement"].item() == share
            last[i] = share
    assert any(share < 1 for share in last)


@each_backend
@pytest.mark.parametrize("form", ["exact", "delayed"])
def test_a_learning_rate_of_zero_tells_no_share(backend: str, form: str) -> None:
    """A warm-up that begins at 0 must not make the next step a thousand times as long."""
    param = Parameter(torch.zeros(64))
    optimizer = Lion([param], lr=0.0, caution=form, backend=backend)
    for lr in (0.0, 1.0):
        optimizer.param_groups[0]["lr"] = lr
        param.grad = torch.ones(64)
        optimizer.step()
    assert torch.equal(param.detach(), -torch.ones(64))


@each_backend
def test_caution_lets_nan_through(backend: str) -> None:
    param = Parameter(torch.ones(2))
    param.grad = torch.tensor([torch.nan, 1.0])
    MSGD([param], lr=0.5, beta=0.5, caution="exact", backend=backend).step()
    assert param[0].isnan() and param[1] == 1 - 0.25 / 0.5


@each_backend
@scaled_rows(TABLE)
def test_rms_scale(row: Row, backend: str) -> None:
    """Tiger: the learning rate times the root mean square that the parameter had before the last step, at least 1 in
    1024; before the first step there is none. Decay does not see it."""
    params = parameters((40, 7), (3,), (127, 131))
    decay = {"weight_decay": 0.125, "weight_decay_kind": "decoupled"}
    optimizer = make(row, params, backend, lr=0.5, lr_scale="rms", **decay)
    twins = copies(params)
    twin = make(row, twins, backend, lr=0.5)
    rms = [0.0] * len(params)
    for step in range(1, 5):
        before = [param.detach().clone() for param in params]
        train(optimizer, [step])
        moved = whole_step(row, twin, twins, step)
        for i, (p, now, whole) in enumerate(zip(before, params, moved, strict=True)):
            scale = torch.tensor(max(rms[i], FLOOR), dtype=torch.float64).float()
            assert torch.equal(now, p * (1 - 0.0625) + whole * scale)
            rms[i] = optimizer.state[now]["param_rms"].item()
            assert rms[i] == pytest.approx(p.double().square().mean().sqrt().item(), rel=1e-12)


@pytest.mark.parametrize("options", [{"caution": "exact"}, {"caution": "delayed"}, {"lr_scale": "rms"}], ids=str)
@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("cls", [Signum, Lion, AdamW, SignAdamPP, signadam_ext.SignAdam])
def test_scaled_steps_in_any_storage(cls: Any, state_dtype: str, options: dict[str, Any]) -> None:
    """The cpu backend's bits are the reference's; a checkpoint goes on with the same."""
    results = []
    for backend in ("cpu", "reference"):
        params = parameters((127, 131), (7,), dtype=torch.bfloat16)
        storage = {"state_dtype": state_dtype, "param_storage": "stochastic", "weight_decay_kind": "cautious"}
        optimizer = cls(params, lr=0.01, weight_decay=0.1, backend=backend, **storage, **options)
        train(optimizer, range(3))
        twins = copies(params)
        other = cls(twins, lr=0.01, weight_decay=0.1, backend=backend, **storage, **options)
        other.load_state_dict(optimizer.state_dict())
        train(optimizer, range(3, 5))
        train(other, range(3, 5))
        assert all(map(same_bits, params, twins))
        results.append(params)
    assert all(map(same_bits, *results))


@pytest.mark.parametrize(
    "cls, options, message",
    [
        (SignSGD, {"caution": "exact"}, "cannot disagree"),
        (signadam_ext.SVAG, {"caution": "delayed"}, "cannot disagree"),
        (SignAdamPP, {"caution": "exact", "lr_scale": "rms"}, "a tensor has one such number"),
        (SignAdamPP, {"caution": "exact", "confidence": "adaptive"}, "take confidence='fixed'"),
        (SignAdamPP, {"lr_scale": "rms", "confidence": lambda g, alpha: g}, "take confidence='fixed'"),
        (Lion, {"caution": "always"}, "caution='always'"),
        (Lion, {"caution": True}, "caution=True"),
    ],
)
def test_scales_that_make_no_sense(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(parameters(), lr=0.1, **options)


@pytest.mark.parametrize("mark", ["_is_flat_param", "_fsdp_flattened"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Signum(p, lr=0.5, caution="delayed"), "caution counts entries of .*: take caution=None"),
        (lambda p: Signum(p, lr=0.5, caution="exact"), "caution counts entries of .*: take caution=None"),
        (lambda p: Signum(p, lr=0.5, lr_scale="rms"), "lr_scale='rms' is of .*: take another lr_scale"),
        (lambda p: Signum(p, lr=0.5, lr_scale="shape"), "lr_scale asks for the shape of .*: take lr_scale=1.0"),
        (lambda p: Signum(p, lr=0.5, lr_scale=lambda name, shape: 0.5), "lr_scale asks for the shape of"),
        (lambda p: Signum(p, lr=0.5, max_grad_norm=1.0), "max_grad_norm is of .*: take max_grad_norm=None"),
        (lambda p: MARSAdamW(p, lr=0.5), "max_norm bounds the norm of .*: take max_norm=None"),
        (lambda p: SignAdamPP(p, lr=0.5, confidence="adaptive"), "its threshold .*: take confidence='fixed'"),
    ],
)
def test_parts_of_flat_parameters_have_nothing_of_the_whole(mark: str, make: Any, message: str) -> None:
    """As FSDP's first version marks its own, and parts of them."""
    param: Any = torch.nn.Parameter(torch.ones(3))
    setattr(param, mark, True)
    param.grad = torch.ones(3)
    optimizer = make([("weight", param)])
    with pytest.raises(TypeError, match=f"'weight' is part of a flat parameter .*{message}"):
        optimizer.step()
    assert torch.equal(param, torch.ones(3)) and not optimizer.state
    plain = Signum([("weight", param)], lr=0.5)
    plain.step()
    assert torch.equal(param, torch.full((3,), 0.5))
    plain.param_groups[0]["max_grad_norm"] = 1.0
    with pytest.raises(TypeError, match="max_grad_norm is of the whole parameter"):
        plain.step()
    assert torch.equal(param, torch.full((3,), 0.5))


@pytest.mark.parametrize(
    ("on", "off", "kept"),
    [
        ({"lr_scale": "rms"}, {"lr_scale": 1.0}, "param_rms"),
        ({"caution": "delayed"}, {"caution": None}, "agreement"),
        ({"caution": "exact"}, {"caution": None}, "agreement"),
    ],
)
def test_a_modifier_that_is_switched_on_again_begins_anew(on: Any, off: Any, kept: str) -> None:
    param, other = parameters((4,))[0], parameters((4,))[0]
    optimizer = Signum([param], lr=0.1, **on)
    train(optimizer, range(2))
    assert kept in optimizer.state[param]
    optimizer.param_groups[0].update(off)
    train(optimizer, range(2, 4))
    assert kept not in optimizer.state[param] and kept not in optimizer.state_dict()["state"][0]
    with torch.no_grad():
        other.copy_(param)
    twin = Signum([other], lr=0.1, **off)
    twin.load_state_dict(optimizer.state_dict())
    for each in (optimizer, twin):
        each.param_groups[0].update(on)
        train(each, range(4, 6))
    assert same_bits(param, other)


def test_a_checkpoint_of_another_modifier_brings_nothing_of_its_own() -> None:
    param = parameters((4,))[0]
    optimizer = Signum([param], lr=0.1, caution="delayed")
    train(optimizer, range(2))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["caution"] = None
    other = Signum([param], lr=0.1)
    other.load_state_dict(saved)
    train(other, range(2, 3))
    assert "agreement" not in other.state[param]


def test_a_refusal_names_what_it_stands_beside() -> None:
    with pytest.raises(ValueError, match="with a function for confidence: take confidence='fixed'"):
        SignAdamPP(parameters((3,)), caution="delayed", confidence=lambda g, alpha: g.sign())
    with pytest.raises(ValueError, match="with a threshold of each tensor's own: take confidence='fixed'"):
        SignAdamPP(parameters((3,)), caution="delayed", confidence="adaptive")
    with pytest.raises(ValueError, match="with max_norm: take max_norm=None"):
        MARSAdamW(parameters((3,)), caution="delayed")
