"""A steered threshold, and confidence functions of one's own: what they promise, and what they refuse."""

from __future__ import annotations

import io
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from signadam_ext import SignAdamPP

ROOT = Path(__file__).resolve().parents[2]


def steered(param: Parameter, target: float, **options: Any) -> SignAdamPP:
    return SignAdamPP([param], lr=0.0, confidence="sparsity", target=target, **options)


def threshold_of(optimizer: SignAdamPP, param: Parameter) -> float:
    return float(optimizer.state[param]["threshold"])


def run(optimizer: SignAdamPP, param: Parameter, gradients: list[Tensor]) -> tuple[list[float], list[float]]:
    """Thresholds in force, and shares of the entries that passed them, both counted here."""
    thresholds, shares = [], []
    for g in gradients:
        state = optimizer.state.get(param, {})
        alpha = np.float32(float(state["threshold"]) if state else 0.0)
        param.grad = g
        optimizer.step()
        thresholds.append(float(alpha))
        shares.append(float((np.abs(g.numpy()) > alpha).mean()))
    return thresholds, shares


def test_first_steps() -> None:
    """Everything passes at first; then what would be right for normal gradients of that root mean square."""
    param = Parameter(torch.zeros(40_000))
    optimizer = steered(param, 0.1)
    g = torch.randn(40_000, generator=torch.Generator().manual_seed(0)) * 1e-4
    thresholds, shares = run(optimizer, param, [g, g])
    assert thresholds[0] == 0.0 and shares[0] == 1.0
    rms = math.sqrt(float((g.double() ** 2).sum()) / g.numel())
    # The magnitude that a tenth of a normal distribution exceeds, from tables.
    assert thresholds[1] == pytest.approx(1.6448536269514722 * rms, rel=1e-6)
    assert abs(shares[1] - 0.1) < 0.01


def test_step_is_exponential_in_the_error() -> None:
    param = Parameter(torch.zeros(1000))
    optimizer = steered(param, 0.25, gain=0.5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        g = torch.randn(1000, generator=generator)
        before = threshold_of(optimizer, param) if optimizer.state else 0.0
        param.grad = g
        optimizer.step()
        if before > 0:
            share = float((g.abs() > np.float32(before)).double().mean())
            expected = before * math.exp(0.5 * (share - 0.25))
            assert threshold_of(optimizer, param) == pytest.approx(expected, rel=4e-16)


@pytest.mark.parametrize("size", [1, 7, 5000])
@pytest.mark.parametrize("target", [0.02, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["normal", "heavy", "drifting", "constant"])
def test_mean_share_is_the_target(kind: str, target: float, size: int) -> None:
    """The sum of all errors is what the threshold has moved: an identity, whatever the gradients are."""
    generator = np.random.default_rng(2)
    draw = {
        "normal": lambda t: generator.standard_normal(size),
        "heavy": lambda t: generator.standard_t(1.5, size),
        "drifting": lambda t: generator.standard_normal(size) * 0.97**t,
        "constant": lambda t: np.full(size, 3.0),
    }[kind]
    param = Parameter(torch.zeros(size))
    optimizer = steered(param, target, gain=0.8)
    steps = 200
    gradients = [torch.from_numpy(draw(t)).float() for t in range(steps + 1)]
    _thresholds, shares = run(optimizer, param, gradients)
    moved = math.log(threshold_of(optimizer, param))
    start = math.log(math.sqrt(float((gradients[0].double() ** 2).mean()))) + math.log(_quantile(target))
    mean = sum(shares[1:]) / steps
    # Each exponential and product rounds by some 2^-53, each count is exact.
    assert mean - target == pytest.approx((moved - start) / (0.8 * steps), abs=1e-10)


def _quantile(target: float) -> float:
    """By bisection of the error function."""
    low, high = 0.0, 40.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erfc(middle / math.sqrt(2)) > target else (low, middle)
    return low


@pytest.mark.parametrize("gain", [0.1, 1.0])
@pytest.mark.parametrize("target", [0.01, 0.3, 0.95])
def test_approaches_without_overshoot(target: float, gain: float) -> None:
    """|g| of a density that does not rise: thresholds come from one side, at any gain up to 1."""
    # Quantiles of an exponential distribution in place of draws, so that the share is a function of the threshold.
    n = 20_001
    g = torch.from_numpy(-np.log1p(-(np.arange(n) + 0.5) / n)).float()
    param = Parameter(torch.zeros(n))
    optimizer = steered(param, target, gain=gain)
    thresholds, shares = run(optimizer, param, [g] * 400)
    right = -math.log(target)
    errors = [alpha - right for alpha in thresholds[1:]]
    slack = 2 * right / n / target  # one entry more or less
    assert all(abs(b) <= abs(a) + slack for a, b in itertools.pairwise(errors))
    assert all(a * b >= 0 or abs(b) <= slack for a, b in itertools.pairwise(errors))
    if gain == 1.0 and target > 0.1:
        assert abs(shares[-1] - target) < 0.005


def test_gradients_that_tell_nothing_leave_it() -> None:
    param = Parameter(torch.zeros(4))
    optimizer = steered(param, 0.5)
    g = torch.tensor([1.0, -2.0, 3.0, -4.0])
    run(optimizer, param, [g, g])
    kept = threshold_of(optimizer, param)
    for odd in (torch.zeros(4), torch.tensor([1.0, torch.inf, 0.0, 0.0]), torch.full((4,), torch.nan)):
        param.grad = odd
        optimizer.step()
        assert threshold_of(optimizer, param) == kept


def test_share_that_cannot_be_reached() -> None:
    """Nine entries of ten are 0 and nine of ten are to pass: the threshold stops at its bound, and comes back."""
    param = Parameter(torch.zeros(1000))
    optimizer = steered(param, 0.9)
    generator = torch.Generator().manual_seed(6)
    for _ in range(300):
        g = torch.randn(1000, generator=generator)
        g[100:] = 0
        param.grad = g
        optimizer.step()
    rms = math.sqrt(float((g.double() ** 2).mean()))
    assert threshold_of(optimizer, param) == pytest.approx(rms * 2.0**-20, rel=1e-12)
    _, shares = run(optimizer, param, [torch.randn(1000, generator=generator) for _ in range(200)])
    assert shares[0] == 1.0 and abs(sum(shares[-20:]) / 20 - 0.9) < 0.01


def test_hyperparameters_set_in_training_are_checked() -> None:
    param = Parameter(torch.zeros(3))
    optimizer = SignAdamPP([param])
    param.grad = torch.ones(3)
    for change, message in (
        ({"confidence": "sparsity"}, "target=None"),
        ({"target": 1.5}, "target=1.5: must be in"),
        ({"target": 0.5, "gain": 1e300}, "gain=1e"),
    ):
        optimizer.param_groups[0].update(change)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert not param.any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_impossible_thresholds_are_not_loaded(value: float) -> None:
    param = Parameter(torch.zeros(3))
    optimizer = steered(param, 0.5)
    param.grad = torch.ones(3)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["threshold"] = torch.tensor(value, dtype=torch.float64)
    with pytest.raises(ValueError, match="'threshold' of parameter 0 of group 0"):
        optimizer.load_state_dict(saved)


def test_tiny_targets() -> None:
    param = Parameter(torch.zeros(4))
    optimizer = steered(param, 1e-30)
    param.grad = torch.ones(4)
    optimizer.step()
    assert 11 < threshold_of(optimizer, param) < 12  # deviations that 1e-30 of a normal distribution exceeds


def test_each_tensor_has_its_own() -> None:
    small, large = Parameter(torch.zeros(3000)), Parameter(torch.zeros(3000))
    optimizer = SignAdamPP([small, large], confidence="sparsity", target=0.2)
    generator = torch.Generator().manual_seed(3)
    for _ in range(30):
        small.grad = torch.randn(3000, generator=generator) * 1e-3
        large.grad = torch.randn(3000, generator=generator) * 1e3
        optimizer.step()
    ratio = threshold_of(optimizer, large) / threshold_of(optimizer, small)
    assert ratio == pytest.approx(1e6, rel=0.2)


def test_resumes_from_a_checkpoint() -> None:
    generator = torch.Generator().manual_seed(4)
    gradients = [torch.randn(500, generator=generator) for _ in range(8)]
    whole, first = Parameter(torch.zeros(500)), Parameter(torch.zeros(500))
    a = SignAdamPP([whole], confidence="sparsity", target=0.3)
    b = SignAdamPP([first], confidence="sparsity", target=0.3)
    for g in gradients:
        whole.grad = g
        a.step()
    for g in gradients[:4]:
        first.grad = g
        b.step()
    file = io.BytesIO()
    torch.save(b.state_dict(), file)
    file.seek(0)
    resumed = Parameter(first.detach().clone())
    c = SignAdamPP([resumed], confidence="sparsity", target=0.9)
    c.load_state_dict(torch.load(file, weights_only=True))
    assert c.param_groups[0]["target"] == 0.3
    for g in gradients[4:]:
        resumed.grad = g
        c.step()
    assert torch.equal(whole, resumed)
    assert threshold_of(a, whole) == threshold_of(c, resumed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence": "sparsity"}, "target=None"),
        ({"confidence": "sparsity", "target": 0.0}, "target=0.0: must be in"),
        ({"confidence": "sparsity", "target": 1.0}, "target=1.0: must be in"),
        ({"confidence": "sparsity", "target": math.nan}, "target=nan"),
        ({"confidence": "sparsity", "target": 0.1, "alpha": 0.5}, "alpha=0.5 with confidence='sparsity'"),
        ({"confidence": "sparsity", "target": 0.1, "gain": 0.0}, "gain=0"),
        ({"gain": 0.5}, "only for confidence='sparsity'"),
        ({"confidence": "sparsity", "target": 0.1, "gain": 1.5}, "gain=1.5"),
        ({"target": 0.1}, "only for confidence='sparsity'"),
    ],
)
def test_bad_hyperparameters(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SignAdamPP([Parameter(torch.zeros(3))], **options)


def test_groups_may_differ() -> None:
    """A group with a fixed gate beside a steered one, whose defaults it inherits and does not use."""
    fixed, steered_one = Parameter(torch.zeros(50)), Parameter(torch.zeros(50))
    optimizer = SignAdamPP(
        [{"params": [fixed], "confidence": "fixed", "alpha": 0.5}, {"params": [steered_one]}],
        confidence="sparsity",
        target=0.2,
    )
    fixed.grad = steered_one.grad = torch.randn(50, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert "threshold" not in optimizer.state[fixed] and threshold_of(optimizer, steered_one) > 0
    with pytest.raises(ValueError, match="target=2"):
        optimizer.add_param_group({"params": [Parameter(torch.zeros(1))], "target": 2.0})


# Functions of one's own


def soft(g: Tensor, alpha: Tensor) -> Tensor:
    """The gate with magnitudes: what exceeds the threshold, squashed."""
    return torch.where(g.abs() > alpha, g / (1 + g.abs()), 0.0)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_function_takes_the_gates_place(backend: str) -> None:
    param = Parameter(torch.randn(50, 3, generator=torch.Generator().manual_seed(5)))
    optimizer = SignAdamPP([param], lr=0.125, beta=0.5, confidence=soft, alpha=0.25, backend=backend)
    m, p = torch.zeros(50, 3), param.detach().clone()
    for seed in range(4):
        g = torch.randn(50, 3, generator=torch.Generator().manual_seed(seed))
        param.grad = g
        optimizer.step()
        m = 0.5 * m + 0.5 * soft(g, torch.tensor(0.25))
        p = p - 0.125 * m
        assert torch.equal(param, p)
        assert torch.equal(optimizer.state[param]["exp_avg"], m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_function_may_work_in_place(dtype: torch.dtype) -> None:
    """It gets a copy, and runs once: the gradient stays what it is, and statistics are of the gradient."""
    param = Parameter(torch.zeros(4, dtype=dtype))
    calls = []
    optimizer = SignAdamPP([param], lr=1.0, beta=0.0, confidence=lambda g, a: (calls.append(1), g.mul_(2))[1])
    optimizer.observe()
    param.grad = torch.ones(4, dtype=dtype)
    optimizer.step()
    assert param.tolist() == [-2.0] * 4 and param.grad.tolist() == [1.0] * 4
    assert len(calls) == 1 and optimizer.statistics().all.norm_ratio == 1.0


def test_function_sees_parameters_with_gaps() -> None:
    param = Parameter(torch.ones(8)[::2])
    seen = []
    optimizer = SignAdamPP(
        [param],
        confidence=lambda g, a: (seen.append(g.clone()), g)[1],
        weight_decay=1.0,
        decoupled_weight_decay=False,
    )
    param.grad = torch.ones(4)
    optimizer.step()
    assert len(seen) == 1 and torch.equal(seen[0], torch.full((4,), 2.0))


def test_function_without_a_hash() -> None:
    class Clip:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, g: Tensor, alpha: Tensor) -> Tensor:
            return g.clamp(-0.5, 0.5)

    param = Parameter(torch.zeros(2))
    param.grad = torch.tensor([3.0, -0.25])
    SignAdamPP([param], lr=1.0, beta=0.0, confidence=Clip()).step()
    assert param.tolist() == [-0.5, 0.25]


def test_function_that_raises_leaves_all_as_it_was() -> None:
    count = [0]

    def second_fails(g: Tensor, alpha: Tensor) -> Tensor:
        count[0] += 1
        if count[0] == 2:
            raise RuntimeError("no")
        return g

    params = [Parameter(torch.zeros(2)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(2)
    optimizer = SignAdamPP(params, confidence=second_fails)
    with pytest.raises(RuntimeError, match="no"):
        optimizer.step()
    assert not any(param.any() for param in params)


@pytest.mark.parametrize("value", [5, None, ["fixed"]])
def test_neither_name_nor_function(value: Any) -> None:
    with pytest.raises(ValueError, match=r"must be one of .*, or a function of \(g, alpha\)"):
        SignAdamPP([Parameter(torch.zeros(3))], confidence=value)


def test_function_sees_the_effective_gradient() -> None:
    seen = []

    def spy(g: Tensor, alpha: Tensor) -> Tensor:
        seen.append(g.clone())
        return g

    param = Parameter(torch.tensor([1.0, -2.0]))
    param.grad = torch.tensor([0.5, 0.5])
    SignAdamPP([param], confidence=spy, weight_decay=0.5, decoupled_weight_decay=False, maximize=True).step()
    assert all(torch.equal(g, torch.tensor([0.0, -1.5])) for g in seen) and seen


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda g, alpha: g[1:], ValueError, "returned shape"),
        (lambda g, alpha: g.double(), TypeError, "returned torch.float64"),
        (lambda g, alpha: 1.0, TypeError, "returned float"),
        (lambda g, alpha: g.sqrt(), ValueError, "returned NaN for a gradient entry of -"),
    ],
)
def test_bad_results_are_found_before_anything_is_written(function: Any, error: type, message: str) -> None:
    """Also in the second tensor of two, and where another group's rule would be served."""
    first, second, other = (Parameter(torch.ones(4)) for _ in range(3))
    optimizer = SignAdamPP(
        [{"params": [other], "confidence": "fixed"}, {"params": [first, second]}], lr=0.1, confidence=function
    )
    first.grad, second.grad, other.grad = torch.ones(4), torch.tensor([1.0, -1.0, 2.0, 3.0]), torch.ones(4)
    with pytest.raises(error, match=message):
        optimizer.step()
    for param in (first, second, other):
        assert torch.equal(param, torch.ones(4))
    assert not optimizer.state


def test_nan_gradient_is_no_fault_of_the_function() -> None:
    param = Parameter(torch.ones(2))
    param.grad = torch.tensor([torch.nan, 1.0])
    SignAdamPP([param], lr=1.0, beta=0.0, confidence=lambda g, alpha: g).step()
    assert param[0].isnan() and param[1] == 0.0


def test_function_stays_out_of_checkpoints() -> None:
    param = Parameter(torch.zeros(3))
    optimizer = SignAdamPP([param], confidence=soft, alpha=0.25)
    param.grad = torch.ones(3)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    resumed = SignAdamPP([Parameter(torch.zeros(3))], confidence=soft)
    resumed.load_state_dict(loaded)
    group = resumed.param_groups[0]
    assert group["confidence"] is soft and group["alpha"] == 0.25


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_python_function_on_a_compiled_backend(backend: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match="cannot"):
        SignAdamPP([Parameter(torch.zeros(3))], confidence=soft, backend=backend)


def test_few_bits_need_a_bound() -> None:
    with pytest.raises(ValueError, match="no bound"):
        SignAdamPP([Parameter(torch.zeros(3))], confidence=soft, state_dtype="int2")


TRITON = """
import torch, triton, triton.language as tl
from signadam_ext import SignAdamPP

@triton.jit
def soft(g, alpha):
    return tl.where(tl.abs(g) > alpha, tl.div_rn(g, 1.0 + tl.abs(g)), 0.0)

@triton.jit
def not_a_number(g, alpha):
    return tl.where(g > 1e30, float("nan"), g)

@triton.jit
def another_shape(g, alpha):
    return tl.sum(g, axis=0)

def soft_in_torch(g, alpha):
    return torch.where(g.abs() > alpha, g / (1 + g.abs()), 0.0)

def train(function):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (17000, 5)]
    optimizer = SignAdamPP(params, confidence=function, alpha=0.2, weight_decay=0.1)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [x for p in params for x in (p.detach(), optimizer.state[p]["exp_avg"])]

assert all(torch.equal(a, b) for a, b in zip(train(soft), train(soft_in_torch)))
for function, message in ((not_a_number, "returned NaN"), (another_shape, "does not compile")):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    try:
        SignAdamPP([p], confidence=function).step()
        raise SystemExit(f"{message}: not refused")
    except ValueError as error:
        assert message in str(error), error
    assert torch.equal(p, torch.ones(3))
try:
    SignAdamPP([torch.nn.Parameter(torch.ones(3))], confidence=soft, backend="cpu")
    raise SystemExit("cpu was not refused")
except ValueError as error:
    assert "@triton.jit" in str(error)
import copy
copy.deepcopy(SignAdamPP([torch.nn.Parameter(torch.ones(3))], confidence=soft))
print("equal")
"""


def test_triton_function(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    script = tmp_path / "own.py"
    script.write_text(TRITON)
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "equal" in done.stdout, done.stdout + done.stderr[-3000:]
