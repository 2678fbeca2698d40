"""Steps under conditions: clipped by the norm of all gradients, of a scaled loss, or skipped."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import signadam_ext
from signadam_ext import MSGD, SVAG, AdamStar, AdamW, Lion, SignAdam, SignAdamPP, SignSGD, Signum, release_gradients
from signadam_ext.backends.reference import rules

CLASSES = (SignSGD, Signum, SignAdam, SignAdamPP, MSGD, SVAG, AdamStar, AdamW, Lion)
#: More than a chunk, one element, none, and what does not fill a run of memory.
SHAPES = ((20_000,), (), (0,), (7, 3), (5, 2))


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    params[-1] = torch.zeros(5, 4, dtype=dtype)[:, ::2].copy_(params[-1])
    return [param.requires_grad_() for param in params]


def give(params: list[Tensor], step: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).mul_(size).to(param.dtype)


def norm_of(params: list[Tensor]) -> float:
    """The norm as it is defined: sums of squares of each gradient, and of those, in the order that backends share."""
    squares = [
        torch.tensor(0.0).double() if p.grad is None or p.numel() == 0 else rules.ordered_sum(flat(p.grad).square())
        for p in params
    ]
    return math.sqrt(rules.ordered_sum(torch.stack(squares)).item())


def flat(grad: Tensor) -> Tensor:
    return grad.reshape(-1).double()


def held(optimizer: torch.optim.Optimizer) -> list[Any]:
    """All that a step may write, by value, and the versions of what it writes in place."""
    found: list[Any] = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = {
                name: x.clone() if isinstance(x, Tensor) else x for name, x in optimizer.state.get(param, {}).items()
            }
            found.append((param.detach().clone(), param._version, state))
    return found


def assert_equal(one: list[Any], other: list[Any], *, versions: bool = True) -> None:
    for (param, version, state), (twin, its_version, its_state) in zip(one, other, strict=True):
        assert torch.equal(param, twin)
        assert version == its_version or not versions
        assert state.keys() == its_state.keys()
        for name, value in state.items():
            assert torch.equal(value, its_state[name]) if isinstance(value, Tensor) else value == its_state[name]


BACKENDS = ("cpu", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_norm", [1e-30, 0.5, 1e6, math.inf])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_clipped_step_is_one_of_scaled_gradients(cls: Any, max_norm: float, backend: str) -> None:
    """Each gradient times one fp32 number, which nobody writes into it."""
    ours, theirs = parameters(), parameters()
    clipped = cls(ours, lr=0.01, weight_decay=0.1, backend=backend, max_grad_norm=max_norm)
    plain = cls(theirs, lr=0.01, weight_decay=0.1, backend=backend)
    assert clipped.last_grad_norm is None
    for step in range(3):
        give(ours, step)
        give(theirs, step)
        norm = norm_of(theirs)
        factor = torch.tensor(min(1.0, max_norm / (norm + 1e-6)), dtype=torch.float32)
        for param in theirs:
            param.grad.mul_(factor)
        before = [param.grad.clone() for param in ours]
        clipped.step()
        plain.step()
        assert all(map(torch.equal, before, [param.grad for param in ours]))
        assert clipped.last_grad_norm.item() == norm
        assert_equal(held(clipped), held(plain))
    assert clipped.skipped_steps.item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_is_that_of_torch(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = AdamW(params, max_grad_norm=1.0)
    give(params, 3)
    params[3].grad = None
    optimizer.step()
    theirs = torch.nn.utils.get_total_norm([param.grad.double() for param in params if param.grad is not None])
    assert optimizer.last_grad_norm.dtype == torch.float64
    assert optimizer.last_grad_norm.item() == pytest.approx(theirs.item(), rel=1e-15 * 20_000)


def test_within_one_rounding_of_clip_grad_norm() -> None:
    ours, theirs = parameters(), parameters()
    clipped, plain = MSGD(ours, lr=1.0, beta=0.0, max_grad_norm=1.0), MSGD(theirs, lr=1.0, beta=0.0)
    for params in (ours, theirs):
        for param in params:
            param.data.zero_()  # a step then is the gradient itself
        give(params, 1)
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    clipped.step()
    plain.step()
    for param, twin in zip(ours, theirs, strict=True):
        # Their norm and coefficient are rounded to fp32, ours are not.
        assert torch.all((param - twin).abs() <= 4 * 2**-24 * twin.abs())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("options", [{}, {"state_dtype": "bf16", "param_storage": "stochastic"}], ids=["fp32", "bf16"])
def test_a_norm_that_is_not_finite_skips_the_step(backend: str, bad: float, first: bool, options: Any) -> None:
    dtype = torch.bfloat16 if options else torch.float32
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer = SignAdam(ours, lr=0.01, backend=backend, max_grad_norm=1.0, **options)
    undisturbed = SignAdam(theirs, lr=0.01, backend=backend, max_grad_norm=1.0, **options)
    skips = 0
    for step in range(3):
        if step > 0 or first:
            give(ours, 99)
            ours[0].grad[17_000] = bad
            before = held(optimizer)
            optimizer.step()
            assert_equal(held(optimizer), before)
            assert not math.isfinite(optimizer.last_grad_norm.item())
            skips += 1
        assert optimizer.skipped_steps.item() == skips
        give(ours, step)
        give(theirs, step)
        optimizer.step()
        undisturbed.step()
        assert_equal(held(optimizer), held(undisturbed))
    assert (optimizer.skipped_steps.dtype, optimizer.skipped_steps.shape) == (torch.int64, ())


def test_largest_gradients_have_a_norm() -> None:
    """Squares of fp32 fit into double: what is finite is not skipped."""
    params = parameters()
    optimizer = Signum(params, max_grad_norm=1.0)
    give(params, 0)
    largest = torch.finfo(torch.float32).max
    params[0].grad.fill_(largest)
    optimizer.step()
    assert optimizer.skipped_steps.item() == 0
    assert optimizer.last_grad_norm.item() == pytest.approx(largest * math.sqrt(20_000), rel=1e-12)


def test_a_default_device_changes_nothing() -> None:
    params = parameters()
    optimizer = Signum(params, max_grad_norm=1.0)
    give(params, 0)
    norm = norm_of(params)
    with torch.device("meta"):
        optimizer.step()
        assert optimizer.last_grad_norm.item() == norm
        assert optimizer.skipped_steps.item() == 0


def test_statistics_are_of_the_last_step_taken() -> None:
    params = parameters()
    optimizer = SignAdamPP(params, max_grad_norm=1.0)
    optimizer.observe()
    give(params, 0)
    optimizer.step()
    before = optimizer.statistics()
    give(params, 1)
    params[1].grad.fill_(math.nan)
    optimizer.step()
    assert str(optimizer.statistics()) == str(before)


@pytest.mark.parametrize("norm", [0, -1.0, math.nan])
def test_a_norm_that_nothing_has_is_refused(norm: float) -> None:
    """0 is how others turn clipping off; torch's function would stop the training."""
    with pytest.raises(ValueError, match=r"max_grad_norm=.*: must be above 0, or None where nothing is to be clipped"):
        AdamW([torch.ones(3, requires_grad=True)], max_grad_norm=norm)


def test_what_steps_take_from_groups_follows_them() -> None:
    """A norm that is set, changed and taken back between steps, groups that go, and one that takes another's place."""
    one, two = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = signadam_ext.MSGD([{"params": [one]}, {"params": [two]}], lr=1.0, beta=0.0)

    def moved(norm: Any) -> list[float]:
        before = [one.detach().clone(), two.detach().clone()]
        for group in optimizer.param_groups:
            group["max_grad_norm"] = norm
        for param in (one, two):
            param.grad = torch.tensor([3.0, 0.0, 0.0])
        optimizer.step()
        return [round(float((b - p).norm()), 6) for b, p in zip(before, (one, two), strict=True)]

    assert moved(None) == [3.0, 3.0]
    assert moved(2.0**0.5) == [1.0, 1.0]
    assert moved(None) == [3.0, 3.0]
    group = optimizer.param_groups.pop()
    assert moved(1.5) == [1.5, 0.0]
    optimizer.param_groups[0] = group
    assert moved(1.5) == [0.0, 1.5]
    optimizer.add_param_group({"params": [one]})
    assert moved(2.0**0.5) == [1.0, 1.0]


def test_groups_have_one_norm() -> None:
    first, *others = parameters()
    groups = [{"params": [first]}, {"params": others, "max_grad_norm": 2.0}]
    optimizer = Lion(groups, max_grad_norm=1.0)
    give([first, *others], 0)
    before = held(optimizer)
    with pytest.raises(ValueError, match=r"max_grad_norm is .* in groups of one optimizer: must be the same in all"):
        optimizer.step()
    assert_equal(held(optimizer), before)
    with pytest.raises(ValueError, match=r"max_grad_norm is 1.0 and 2.0 in groups of one optimizer"):
        Lion([{"params": [first]}, {"params": others}]).load_state_dict(optimizer.state_dict())
    optimizer.param_groups[1]["max_grad_norm"] = 1.0
    optimizer.step()
    assert optimizer.last_grad_norm.item() == norm_of([first, *others])


@pytest.mark.parametrize("value", [-1.0, math.nan, "1", True, [1.0]])
def test_nonsense_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="max_grad_norm"):
        SignSGD(parameters(), max_grad_norm=value)


def test_what_cannot_be_clipped_says_so() -> None:
    with pytest.raises(ValueError, match=r"max_grad_norm=1.0 with a rule that reads param.grad_variance"):
        AdamStar(parameters(), variance="minibatch", max_grad_norm=1.0)
    model = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="max_grad_norm while gradients are released"):
        release_gradients(model, Signum(model.parameters(), max_grad_norm=1.0))
    optimizer = Signum(model.parameters())
    release_gradients(model, optimizer)
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    with pytest.raises(RuntimeError, match="max_grad_norm while gradients are released"):
        model(torch.ones(1, 3)).sum().backward()


# Scaled losses.


def train(cls: Any, fused: bool | None, steps: int = 7, unscales: bool = False, **options: Any) -> tuple[Any, Any]:
    """A training with a GradScaler, two of whose losses overflow."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    optimizer = cls(model.parameters(), lr=0.01, fused=fused, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 6)).square().mean()
        scaler.scale(loss * (math.inf if step in (0, 4) else 1.0)).backward()
        if unscales:
            scaler.unscale_(optimizer)
        gradients = [param.grad.clone() for param in model.parameters()]
        scaler.step(optimizer)
        if fused and not unscales:
            for param, gradient in zip(model.parameters(), gradients, strict=True):
                assert torch.equal(param.grad.nan_to_num(), gradient.nan_to_num())
        scaler.update()
    return optimizer, scaler


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_scaled_loss_changes_no_bit(cls: Any, unscales: bool) -> None:
    """Scales are powers of two. With fused=True the step scales back what nobody has written, and skips itself."""
    fused, scaler = train(cls, True, unscales=unscales)
    plain, twin = train(cls, None)
    assert fused.skipped_steps.item() == 2
    assert plain.skipped_steps.item() == 0  # the scaler has left them out
    assert scaler.get_scale() == twin.get_scale()
    assert_equal(held(fused), held(plain), versions=False)
    assert not {"grad_scale", "found_inf"} & vars(fused).keys()


def test_the_norm_is_that_of_the_unscaled_loss() -> None:
    fused, _ = train(AdamW, True, steps=4, max_grad_norm=0.05)
    plain, _ = train(AdamW, None, steps=4, max_grad_norm=0.05)
    assert fused.last_grad_norm.item() == plain.last_grad_norm.item() > 0.05
    assert_equal(held(fused), held(plain), versions=False)


def test_a_scale_that_is_no_power_of_two() -> None:
    """Gradients are multiplied with its reciprocal, as GradScaler.unscale_ does."""
    ours, theirs = parameters(), parameters()
    fused, plain = AdamW(ours, fused=True), AdamW(theirs)
    give(ours, 0)
    give(theirs, 0)
    scale = torch.tensor(3.0)
    for param in theirs:
        param.grad.mul_(scale.double().reciprocal().float())
    fused.grad_scale, fused.found_inf = scale, torch.zeros(1)
    fused.step()
    plain.step()
    assert_equal(held(fused), held(plain))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("found", [0.0, 1.0])
@pytest.mark.parametrize("scale", [0.0, -0.0, 2.0**-128])
def test_a_scale_that_has_backed_off_to_nothing(
    scale: float, found: float, max_norm: float | None, backend: str
) -> None:
    """Its reciprocal is infinite in fp32, and gradients times that are not finite."""
    params = parameters()
    optimizer = AdamW(params, fused=True, max_grad_norm=max_norm, backend=backend)
    give(params, 0, size=0.0)
    before = held(optimizer)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor([found])
    optimizer.step()
    assert optimizer.skipped_steps.item() == 1
    assert_equal(held(optimizer), before)
    if max_norm is not None:
        assert math.isfinite(optimizer.last_grad_norm.item()) == (scale != 0)


def test_a_clipped_gradient_may_come_from_a_small_scale() -> None:
    """What counts is what kernels multiply by."""
    ours, theirs = parameters(), parameters()
    fused, plain = AdamW(ours, fused=True, max_grad_norm=1.0), AdamW(theirs, max_grad_norm=1.0)
    give(ours, 0, size=0.5)
    give(theirs, 0, size=0.5)
    fused.grad_scale, fused.found_inf = torch.tensor(2.0**-128), torch.zeros(1)
    fused.step()
    plain.step()
    assert fused.skipped_steps.item() == 0
    assert_equal(held(fused), held(plain))


def test_a_scaler_that_backs_off_to_zero() -> None:
    """Losses overflow, and then they are 0, as the scale is: found_inf is said first, and then no more."""
    params = parameters()
    optimizer = AdamW(params, fused=True)
    before = held(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-148, backoff_factor=0.25)
    for step, size in enumerate((math.inf, math.inf, 0.0)):
        assert scaler.scale(torch.ones(())).item() == (2.0**-148 if step == 0 else 0.0)
        give(params, 0, size)
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.skipped_steps.item() == 3
    assert_equal(held(optimizer), before)


def test_only_a_fused_optimizer_takes_a_scale() -> None:
    """As in torch.optim; Lightning refuses to clip the gradients of one that does."""
    for fused in (None, False, True):
        optimizer = Signum(parameters(), fused=fused)
        theirs = torch.optim.AdamW(parameters(), fused=fused)
        for one in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            name = "_step_supports_amp_scaling"
            assert getattr(one, name, False) == getattr(theirs, name, False) == bool(fused)


def test_a_scale_without_a_variance_is_refused() -> None:
    params = parameters()
    optimizer = AdamStar(params, variance="minibatch", fused=True)
    give(params, 0)
    for param in params:
        param.grad_variance = torch.ones_like(param)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    before = held(optimizer)
    with pytest.raises(RuntimeError, match="grad_scale with a rule that reads"):
        optimizer.step()
    assert_equal(held(optimizer), before)


def test_compiled_steps_are_clipped() -> None:
    ours, theirs = parameters(), parameters()
    compiled, eager = SignAdamPP(ours, max_grad_norm=0.5), SignAdamPP(theirs, max_grad_norm=0.5)
    take: Callable[[], None] = torch.compile(lambda: compiled.step(), fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(3):
            for params in (ours, theirs):
                give(params, step)
                params[0].grad[0] = math.nan if step == 1 else 1.0
            take()
            eager.step()
    assert compiled.skipped_steps.item() == eager.skipped_steps.item() == 1
    assert_equal(held(compiled), held(eager), versions=False)


def test_capturable_is_taken_on_the_cpu() -> None:
    ours, theirs = parameters(), parameters()
    capturable, plain = AdamW(ours, capturable=True), AdamW(theirs)
    give(ours, 0)
    give(theirs, 0)
    capturable.step()
    plain.step()
    assert_equal(held(capturable), held(plain))
    assert (
        signadam_ext.SignSGD(parameters(), capturable=True).param_groups[0].keys()
        == SignSGD(parameters()).param_groups[0].keys()
    )
