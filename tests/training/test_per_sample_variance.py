"""Variance of the mini-batch gradient: against loops over samples in double, within derived bounds; errors; manners."""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.strategies import same_bits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import signadam_ext
from signadam_ext import SignAdamPP, per_sample_variance, release_gradients
from signadam_ext.core.memory_order import same_strides
from signadam_ext.training import per_sample_variance as variance

U = 2.0**-24  # unit roundoff of fp32
B = 7
CHUNKS = [1, 2, 3, B - 1, B, B + 5, None]

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, where it vectorizes by a loop


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are tiny here: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def of_mean(grads: Tensor) -> Tensor:
    """The variance in double, from gradients (B, ...) that are taken as they are."""
    grads = grads.double()
    return (grads - grads.mean(0)).square().sum(0) / (len(grads) * (len(grads) - 1))


def bound(grads: Tensor, chunks: int) -> Tensor:
    """How far the root of an fp32 result may lie from the exact one, for gradients of exact fp32 values.

    The root of the sum of squares M is the length of the vector of deviations, so by the triangle inequality it moves
    by no more than the length of what rounding adds to that vector. With c the mean a chunk is taken about, R the range
    of the gradients, G the largest of them, to first order:

    - g - c rounds by u R; the mean of a chunk's n deviations is off by (n + 1) u R; subtracting it rounds by u R.
    - Each merge rounds the mean by u G and by the above, and later chunks' shifts inherit that: m (u G + (n + 4) u R)
      after m merges, which weigh with sqrt(count n / total) <= sqrt(n). A single chunk has no shift.
    - Squares, their sum of at most B terms and m merges, weights and the last division: (B + 2 m + 6) u, relative.

    With m n <= 2 B, all of it is within the following; underflow of squares is the last term.
    """
    batch = len(grads)
    grads = grads.double()
    spread = (grads.amax(0) - grads.amin(0)).amax() if grads.numel() else grads.new_zeros(())
    largest = grads.abs().amax() if grads.numel() and chunks > 1 else 0.0
    moved = U * ((3 * batch + 4 * chunks + 8) * spread + chunks * largest)
    length = (of_mean(grads) * batch * (batch - 1)).sqrt()
    divisor = (batch * (batch - 1)) ** 0.5
    return (batch**0.5 * moved + (batch + 2 * chunks + 6) * U * length + batch * 2.0**-74) / divisor


def number_of_chunks(batch: int, chunk_size: int | None) -> int:
    return 1 if chunk_size is None else -(-batch // chunk_size)


def loop(model: nn.Module, loss_fn: Any, batch: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients of the samples, one after another, by a model of that dtype."""
    model = copy.deepcopy(model).to(dtype)
    inputs, targets = batch
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    convert = [[t.to(dtype) if t.is_floating_point() else t for t in part] for part in (inputs, (targets,))]
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found: dict[str, list[Tensor]] = {name: [] for name in named}
    for k in range(len(targets)):
        loss = loss_fn(model(*[t[k : k + 1] for t in convert[0]]), convert[1][0][k : k + 1])
        for name, grad in zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True):
            found[name].append(torch.zeros_like(named[name]) if grad is None else grad)
    return {name: torch.stack(grads) for name, grads in found.items()}


def assert_matches_loop(
    model: nn.Module,
    loss_fn: Any,
    batch: Any,
    chunks: int,
    exact: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Against double, where gradients have errors of their own.

    An error of at most e in each of B gradients moves the root of the sum of squares by at most sqrt(B) e (the triangle
    inequality again). How large they are is measured: those of the plain loop in the model's dtype, times 4 for the
    other order in which batched kernels sum, and at least 8 roundings of the largest gradient.
    """
    exact = exact or loop(model, loss_fn, batch, torch.float64)
    rounded = loop(model, loss_fn, batch, dtype)
    unit = {torch.float32: U, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        reference, samples = exact[name], len(exact[name])
        e = torch.maximum(4 * (reference - rounded[name]).abs().amax(), 8 * unit * reference.abs().amax())
        allowed = bound(reference, chunks) + e / (samples - 1) ** 0.5
        got: Tensor = param.grad_variance  # type: ignore[attr-defined]
        assert got.dtype == torch.float32 and got.shape == param.shape and not got.requires_grad
        assert same_strides(got, torch.empty_like(param).stride())
        error = (got.double().sqrt() - of_mean(reference).sqrt()).abs()
        assert (error <= allowed).all(), f"{name}: {error.max()} > {allowed.min()}"
        assert reference.abs().amax() == 0 or allowed.max() < 0.05 * of_mean(reference).sqrt().max() or unit > U


# --- the value


@settings(settings.get_profile("medium"))
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(2, 40),
    offset=st.sampled_from([0.0, 1.0, -1e4, 1e8]),
    scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e10]),
    cuts=st.lists(st.integers(1, 39), max_size=6),
)
def test_merging_within_its_bound(seed: int, batch: int, offset: float, scale: float, cuts: list[int]) -> None:
    """Whatever the chunks, also where gradients are nearly equal."""
    generator = torch.Generator().manual_seed(seed)
    grads = torch.randn(batch, 5, generator=generator) * scale + offset
    edges = sorted({0, batch, *(cut for cut in cuts if cut < batch)})
    spread = variance._Welford(grads[0])
    for a, b in itertools.pairwise(edges):
        spread.add(grads[a:b])
    error = (spread.variance_of_mean().double().sqrt() - of_mean(grads).sqrt()).abs()
    assert (error <= bound(grads, len(edges) - 1)).all()


def products(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs * targets).sum(1).mean()


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_linear_in_closed_form(chunk_size: int | None) -> None:
    """Gradients t x' and t, of integers and therefore exact: what is left is the rounding of the variance."""
    model = nn.Linear(4, 3)
    inputs, targets = torch.randint(-9, 10, (B, 4)).float(), torch.randint(-9, 10, (B, 3)).float()
    per_sample_variance(model, products, (inputs, targets), chunk_size=chunk_size)
    for param, grads in ((model.weight, torch.einsum("bi,bj->bij", targets, inputs)), (model.bias, targets)):
        error = (param.grad_variance.double().sqrt() - of_mean(grads).sqrt()).abs()
        assert (error <= bound(grads, number_of_chunks(B, chunk_size))).all()


def test_exact_by_hand() -> None:
    """Gradients 1, 3, 5, 7: mean 4, squares 9 + 1 + 1 + 9 = 20, over 4 * 3."""
    model = nn.Linear(1, 1, bias=False)
    inputs = torch.tensor([[1.0], [3.0], [5.0], [7.0]])
    for chunk_size in (1, 2, 4):
        per_sample_variance(model, products, (inputs, torch.ones(4, 1)), chunk_size=chunk_size)
        assert model.weight.grad_variance.item() == torch.tensor(20 / 12).item()


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_equal_gradients_have_no_variance(chunk_size: int | None) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3, bias=False))
    inputs, targets = 1e6 * torch.randn(1, 4).expand(B, 4), torch.randn(1, 3).expand(B, 3)
    per_sample_variance(model, products, (inputs, targets), chunk_size=chunk_size)
    largest = max(loop(model, products, (inputs, targets), torch.float32)["0.weight"].abs().max().item(), 1.0)
    for param in model.parameters():
        # Batched kernels may sum the rows in different orders, so gradients are equal up to that alone.
        assert param.grad_variance.max() <= (8 * U * largest) ** 2


class Tied(nn.Module):
    """A head tied to the embedding, a layer used twice, a frozen scale, a parameter that the loss does not reach."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.twice = nn.Linear(6, 6)
        self.dropout = nn.Dropout(p)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.full((), 0.7), requires_grad=False)
        self.unreached = nn.Parameter(torch.ones(2, 3))
        self.register_buffer("shift", torch.linspace(-1, 1, 6))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.shift
        x = self.dropout(self.twice(self.twice(x).tanh()).tanh())
        return self.head(self.norm(x) * self.scale).mT


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(3, 4, 2)
        self.gain = nn.Parameter(torch.tensor(1.3))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.bilinear(a, b) * self.gain


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0][:, -1]


def tokens() -> tuple[Tensor, Tensor]:
    return torch.randint(11, (B, 5)), torch.randint(11, (B, 5))


def convolutions() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3)
    )
    model.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten())
    model[3].running_mean.normal_()
    model[3].eval()
    return model


MODELS: dict[str, Callable[[], tuple[nn.Module, Any, Any]]] = {
    "convolutions": lambda: (convolutions(), F.cross_entropy, (torch.randn(B, 2, 6, 6), torch.randint(3, (B,)))),
    "channels last": lambda: (
        convolutions().to(memory_format=torch.channels_last),
        F.cross_entropy,
        (torch.randn(B, 2, 6, 6).to(memory_format=torch.channels_last), torch.randint(3, (B,))),
    ),
    "tied": lambda: (Tied(), F.cross_entropy, tokens()),
    "two inputs": lambda: (Two(), F.mse_loss, ((torch.randn(B, 3), torch.randn(B, 4)), torch.randn(B, 2))),
    "lstm": lambda: (Last(), F.mse_loss, (torch.randn(B, 5, 3), torch.randn(B, 4))),
    "attention": lambda: (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(),
        F.mse_loss,
        (torch.randn(B, 5, 8), torch.randn(B, 5, 8)),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_match_a_loop_in_double(name: str) -> None:
    model, loss_fn, batch = MODELS[name]()
    exact = loop(model, loss_fn, batch, torch.float64)
    for chunk_size in CHUNKS:
        per_sample_variance(model, loss_fn, batch, chunk_size=chunk_size)
        assert_matches_loop(model, loss_fn, batch, number_of_chunks(B, chunk_size), exact)


def test_large_batch_of_small_chunks() -> None:
    model = nn.Linear(3, 2)
    batch = torch.randn(500, 3), torch.randn(500, 2) + 100
    per_sample_variance(model, F.mse_loss, batch, chunk_size=3)
    assert_matches_loop(model, F.mse_loss, batch, number_of_chunks(500, 3))


def test_frozen_tied_and_unreached() -> None:
    model, loss_fn, batch = MODELS["tied"]()
    model.norm.requires_grad_(False)
    per_sample_variance(model, loss_fn, batch)
    assert same_bits(model.unreached.grad_variance, torch.zeros(2, 3))
    for frozen in (model.scale, model.norm.weight, model.norm.bias):
        assert not hasattr(frozen, "grad_variance")
    assert (model.embedding.weight.grad_variance > 0).all()  # a head alone, or an embedding alone, would leave zeros
    assert_matches_loop(model, loss_fn, batch, 1)


def test_loss_that_uses_the_models_weights() -> None:
    """As a fused head and cross entropy does: its part of the gradient must not be lost."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).tanh()

    def with_loss(model: Any) -> nn.Module:
        return nn.Sequential(model.body, nn.Tanh(), model.head)

    model = Body()
    batch = torch.randn(B, 4), torch.randint(3, (B,))

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = model.head
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, features: Tensor, targets: Tensor) -> Tensor:
            self.calls += 1
            return F.cross_entropy(self.head(features), targets)

    for loss_fn in (Loss(), lambda features, targets: F.cross_entropy(model.head(features), targets)):
        for chunk_size in (1, 3):
            per_sample_variance(model, loss_fn, batch, chunk_size=chunk_size)
            assert_matches_loop(with_loss(model), F.cross_entropy, batch, number_of_chunks(B, chunk_size))
        assert getattr(loss_fn, "calls", 0) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_low_precision(dtype: torch.dtype, chunk_size: int | None) -> None:
    """Gradients of the parameter's dtype; the sums are fp32, also of a parameter without dimensions."""
    model = Two().to(dtype)
    batch = (torch.randn(B, 3, dtype=dtype), torch.randn(B, 4, dtype=dtype)), torch.randn(B, 2, dtype=dtype)
    per_sample_variance(model, F.mse_loss, batch, chunk_size=chunk_size)
    assert_matches_loop(model, F.mse_loss, batch, number_of_chunks(B, chunk_size), dtype=dtype)
    inputs = torch.arange(1.0, 65.0, dtype=dtype)[:, None]
    linear = nn.Linear(1, 1, bias=False, dtype=dtype)
    per_sample_variance(linear, products, (inputs, torch.ones_like(inputs)), chunk_size=chunk_size)
    assert linear.weight.grad_variance.item() == pytest.approx((64**2 - 1) / 12 / 63, rel=300 * U)


def test_half_precision_scalar() -> None:
    """A tensor without dimensions must not take the gradients' dtype for its own: the mean is fp32."""
    grads = torch.tensor([1 + 2.0**-7, 256.0], dtype=torch.bfloat16)  # their difference has 15 bits
    spread = variance._Welford(grads[0])
    spread.add(grads)
    assert spread.mean.dtype == torch.float32 and spread.mean.item() == 128.50390625
    assert spread.variance_of_mean().item() == torch.tensor(127.49609375**2).item()


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_autocast(chunk_size: int) -> None:
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_cache_enabled()  # it would keep casts of every sample's weights
        return F.cross_entropy(outputs, targets)

    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    batch = torch.randn(B, 4), torch.randint(3, (B,))
    with torch.autocast("cpu", torch.bfloat16):
        per_sample_variance(model, loss_fn, batch, chunk_size=chunk_size)
        assert torch.is_autocast_cache_enabled()
        F.cross_entropy(model(batch[0]), batch[1]).backward()  # with no cast that torch.func has left
    grads = loop(model, F.cross_entropy, batch, torch.float64)
    for name, param in model.named_parameters():
        exact = of_mean(grads[name]).sqrt()
        assert (param.grad_variance.sqrt() - exact).abs().max() <= 2.0**-5 * exact.max()
        assert param.grad is not None


@pytest.mark.parametrize("chunk_size", [1, 2, None])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite(value: float, chunk_size: int | None) -> None:
    model = nn.Linear(2, 1, bias=False)
    inputs = torch.randn(4, 2)
    inputs[2, 1] = value
    per_sample_variance(model, products, (inputs, torch.ones(4, 1)), chunk_size=chunk_size)
    assert model.weight.grad_variance[0, 0].isfinite() and model.weight.grad_variance[0, 1].isnan()


# --- randomness


def test_dropout_that_is_off() -> None:
    plain, loss_fn, batch = MODELS["tied"]()
    for p, training in ((0.5, False), (0.0, True)):
        model = Tied(p).train(training)
        model.load_state_dict(plain.state_dict())
        for chunk_size in (1, 3, None):
            before = torch.get_rng_state()
            per_sample_variance(model, loss_fn, batch, chunk_size=chunk_size)
            assert p == 0 or torch.equal(torch.get_rng_state(), before)
            assert_matches_loop(plain_of(model), loss_fn, batch, number_of_chunks(B, chunk_size))


def plain_of(model: Tied) -> Tied:
    """The same parameters, and their grad_variance, in a model without dropout."""
    other = Tied()
    for name, param in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(module), leaf, param)
    other.head.weight = other.embedding.weight
    return other


@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_dropout_that_is_on(chunk_size: int | None) -> None:
    """Each sample draws its own mask, from the global generator."""
    model = Tied(0.5)
    one, other = tokens()
    batch = one[:1].expand(B, 5), other[:1].expand(B, 5)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        per_sample_variance(model, F.cross_entropy, batch, chunk_size=chunk_size)
        results.append(model.twice.weight.grad_variance.clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert results[0].max() > 1e-6  # of equal samples


def test_variance_with_dropout() -> None:
    """On a linear layer p / (1 - p) x^2 t^2 / B is what the masks add, in expectation."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1, bias=False))
    ones = torch.ones(4000, 1)
    per_sample_variance(model, products, (ones, ones), chunk_size=1500)
    # The estimate is 4 f (1 - f) / 3999 of the share f kept, at most 1 / 3999, and f is within 6 / (2 sqrt(4000)).
    assert 1 - 4 * (3 / 4000**0.5) ** 2 <= model[1].weight.grad_variance.item() * 3999 <= 1 + 1e-5


# --- where it goes


def run(model: nn.Module, batch: Any = None, **options: Any) -> None:
    per_sample_variance(model, F.mse_loss, batch or (torch.randn(4, 3), torch.randn(4, 2)), **options)


def test_written_in_place() -> None:
    model = nn.Linear(3, 2)
    run(model)
    held = [(p.grad_variance, p.grad_variance.data_ptr(), p.grad_variance.clone()) for p in model.parameters()]
    run(model)
    for param, (tensor, address, before) in zip(model.parameters(), held, strict=True):
        assert param.grad_variance is tensor and tensor.data_ptr() == address
        assert not torch.equal(tensor, before)


def test_places_that_share_memory_are_not_written() -> None:
    """With a parameter at another offset, with a gradient, with each other."""
    batch = torch.randn(4, 3), torch.randn(4, 3)
    expected = nn.Linear(3, 3)
    model = copy.deepcopy(expected)
    per_sample_variance(expected, F.mse_loss, batch)
    model.weight.grad = torch.ones(3, 3)
    kept = [param.detach().clone() for param in model.parameters()]
    flat = torch.zeros(12)
    for weight, bias in (
        (None, model.weight.data.view(-1)[3:6]),
        (flat[:9].view(3, 3), flat[7:10]),
        (None, model.weight.grad.view(-1)[2:5]),
    ):
        model.weight.grad_variance, model.bias.grad_variance = weight, bias
        per_sample_variance(model, F.mse_loss, batch)
        for param, before, other in zip(model.parameters(), kept, expected.parameters(), strict=True):
            assert torch.equal(param, before)
            assert torch.equal(param.grad_variance, other.grad_variance)
        assert torch.equal(model.weight.grad, torch.ones(3, 3))


def test_a_view_of_a_buffer_is_written_in_place() -> None:
    model = nn.Linear(3, 2)
    flat = torch.full((9,), -1.0)
    model.weight.grad_variance, model.bias.grad_variance = flat[:6].view(2, 3), flat[6:8]
    run(model)
    assert (flat[:8] > 0).all() and flat[8] == -1


UNFIT = {
    "dtype": lambda p: torch.zeros(p.shape, dtype=torch.float64),
    "shape": lambda p: torch.zeros(p.numel()),
    "strides": lambda p: torch.zeros(p.shape[::-1]).t(),
    "shared elements": lambda p: torch.zeros(()).expand(p.shape),
    "requires grad": lambda p: torch.zeros(p.shape, requires_grad=True),
    "sparse": lambda p: torch.zeros(p.shape).to_sparse(),
    "meta": lambda p: torch.zeros(p.shape, device="meta"),
    "the parameter": lambda p: p.detach(),
    "the gradient": lambda p: p.grad,
    "number": lambda p: 3.0,
    "None": lambda p: None,
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_does_not_fit_is_replaced(kind: str) -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    model(torch.randn(1, 3)).sum().backward()
    grad = model.weight.grad.clone()
    model.weight.grad_variance = UNFIT[kind](model.weight)
    batch = torch.randn(4, 3), torch.randn(4, 2)
    run(model, batch)
    run(other, batch)
    assert same_bits(model.weight.grad_variance, other.weight.grad_variance)
    assert model.weight.grad_variance.is_contiguous()
    assert torch.equal(model.weight, other.weight) and torch.equal(model.weight.grad, grad)


def test_one_tensor_for_two_parameters_is_replaced() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[0].weight.grad_variance = model[1].weight.grad_variance = torch.zeros(2, 2)
    run(model, (torch.randn(4, 2), torch.randn(4, 2)))
    assert not torch.equal(model[0].weight.grad_variance, model[1].weight.grad_variance)


def test_memory_order() -> None:
    model = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    model.register_parameter("turned", nn.Parameter(torch.randn(5, 3).t()))
    model.register_parameter("gappy", nn.Parameter(torch.randn(6, 6)[::2, 1:3]))
    model.register_parameter("empty", nn.Parameter(torch.empty(0, 3)))
    per_sample_variance(model, F.mse_loss, (torch.randn(3, 3, 3, 3), torch.randn(3, 4, 2, 2)))
    assert model.weight.grad_variance.stride() == model.weight.stride()
    assert model.turned.grad_variance.stride() == (1, 3)
    assert model.gappy.grad_variance.stride() == (2, 1)
    assert model.empty.grad_variance.shape == (0, 3)


# --- what is left as it was


@pytest.mark.parametrize("chunk_size", [1, 2, None])
def test_modules_registered_twice(chunk_size: int | None) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.BatchNorm1d(3).eval())
    model.append(model[0]).append(model[2])
    params, buffers = list(model.parameters()), list(model.buffers())
    batch = torch.randn(B, 3), torch.randn(B, 3)
    run(model, batch, chunk_size=chunk_size)
    assert all(a is b for a, b in zip(params, model.parameters(), strict=True))
    assert all(a is b for a, b in zip(buffers, model.buffers(), strict=True))
    assert_matches_loop(model, F.mse_loss, batch, number_of_chunks(B, chunk_size))


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_the_model_is_left_as_it_was(chunk_size: int) -> None:
    class Busy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                self.linear = nn.utils.weight_norm(nn.Linear(3, 2))
            self.register_buffer("count", torch.zeros(()))
            self.register_buffer("cache", None)
            self.seen = 0
            self.kept: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            self.seen += 1
            if self.cache is None:
                self.cache = x.sum()
            x *= 2
            self.kept = self.linear(x)
            return self.kept

    model = Busy().train()
    model.linear.eval()
    model(torch.ones(1, 3))
    model.cache = None
    model.kept = None
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    weight = model.linear.weight
    state = copy.deepcopy(model.state_dict())
    versions = [(t, t._version) for t in (*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()))]
    batch = torch.randn(4, 3), torch.randn(4, 2)
    before = batch[0].clone()
    run(model, batch, chunk_size=chunk_size)
    assert model.training and not model.linear.training
    assert model.seen == 1 and model.kept is None and model.cache is None and model.linear.weight is weight
    assert all(tensor._version == version for tensor, version in versions)
    assert all(same_bits(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert torch.equal(batch[0], before)
    assert all(p.grad_variance.isfinite().all() for p in model.parameters())
    model(torch.ones(1, 3)).sum().backward()


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode(mode: Any, chunk_size: int) -> None:
    model = nn.Linear(3, 2)
    with mode():
        batch = torch.randn(4, 3), torch.randn(4, 2)
        run(model, batch, chunk_size=chunk_size)
        run(model, batch, chunk_size=chunk_size)
    assert not model.weight.grad_variance.is_inference()
    run(model, tuple(t.clone() for t in batch), chunk_size=chunk_size)
    assert_matches_loop(model, F.mse_loss, tuple(t.clone() for t in batch), number_of_chunks(4, chunk_size))


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_released_gradients_take_no_step(chunk_size: int) -> None:
    model = nn.Linear(3, 2)
    optimizer = SignAdamPP(model.parameters())
    before = copy.deepcopy(model.state_dict())
    with release_gradients(model, optimizer):
        run(model, chunk_size=chunk_size)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_inputs_with_a_graph(chunk_size: int) -> None:
    model = nn.Linear(3, 2)
    inputs = torch.randn(4, 3, requires_grad=True)
    run(model, (inputs.exp(), torch.randn(4, 2)), chunk_size=chunk_size)
    assert inputs.grad is None and not model.weight.grad_variance.requires_grad


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_trainable_loss(chunk_size: int) -> None:
    """Its parameters are not the model's: no gradient for them, and no graph that leads to them."""

    class Loss(nn.Linear):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return F.mse_loss(super().forward(outputs), targets)

    model, loss_fn = nn.Linear(3, 2), Loss(2, 2)
    batch = torch.randn(4, 3), torch.randn(4, 2)
    per_sample_variance(model, loss_fn, batch, chunk_size=chunk_size)
    assert not model.weight.grad_variance.requires_grad
    assert loss_fn.weight.grad is None and not hasattr(loss_fn.weight, "grad_variance")


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_compiled_models(chunk_size: int) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("compiled")

    model = nn.Linear(3, 2)
    batch = torch.randn(4, 3), torch.randn(4, 2)
    compiled = torch.compile(model, backend=refuse)
    run(compiled, batch, chunk_size=chunk_size)
    assert_matches_loop(model, F.mse_loss, batch, number_of_chunks(4, chunk_size))


# --- chunks


def test_default_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 2)  # 8 parameters, 32 bytes a sample
    batch = torch.randn(10, 3), torch.randn(10, 2)
    calls = 0

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return F.mse_loss(outputs, targets)

    for nbytes, expected in ((1, 10), (63, 10), (64, 5), (96, 4), (1 << 20, 1)):
        monkeypatch.setattr(variance, "CHUNK_BYTES", nbytes)
        calls = 0
        per_sample_variance(model, loss_fn, batch)
        assert calls == expected


class Branches(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(-x).detach()


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("count", torch.zeros(()))

    def block(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.linear(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 2, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding((x.sum(1) > 0).long())


@pytest.mark.parametrize("make", [lambda: Branches(3, 2), Checkpointed, Sparse])
def test_one_by_one_where_vmap_cannot(make: Any) -> None:
    model = make()
    batch = torch.randn(6, 3), torch.randn(6, 2)
    for param in model.parameters():
        param.grad_variance = torch.full_like(param, 7.0, requires_grad=False)
    with pytest.raises(RuntimeError, match=r"(?s)gradients of single samples.*chunk_size=1 evaluates them one by one"):
        run(model, batch)
    assert all((param.grad_variance == 7).all() for param in model.parameters())
    run(model, batch, chunk_size=1)
    assert not hasattr(model, "count") or model.count == 0
    reference = nn.Sequential(model.linear, nn.Tanh()) if isinstance(model, Checkpointed) else model
    if isinstance(model, Branches):
        used = batch[0][batch[0].sum(1) > 0]
        assert 0 < len(used) < 6
        grads = torch.zeros(6, 2, dtype=torch.float64)
        for k in range(6):
            if batch[0][k].sum() > 0:  # the mean over two outputs of squares
                grads[k] = (nn.Linear.forward(model, batch[0][k]) - batch[1][k]).detach()
        assert torch.allclose(model.bias.grad_variance.double(), of_mean(grads), rtol=1e-5)
    elif isinstance(model, Sparse):
        model.embedding.sparse = False
        assert_matches_loop(model, F.mse_loss, batch, 6)
    else:
        assert_matches_loop(reference, F.mse_loss, batch, 6)


def test_running_statistics_of_instances() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 2, bias=False), nn.InstanceNorm1d(3, affine=True, track_running_stats=True))
    batch = torch.randn(B, 2, 6), torch.randn(B, 3, 5)
    with pytest.raises(RuntimeError, match="chunk_size=1"):
        run(model, batch)
    before = copy.deepcopy(model.state_dict())
    run(model, batch, chunk_size=1)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert_matches_loop(model, F.mse_loss, batch, B)


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("error", [KeyError, RuntimeError, torch.OutOfMemoryError])
def test_failing_midway_changes_nothing(chunk_size: int, error: type[Exception]) -> None:
    model = nn.Linear(3, 2)
    batch = torch.randn(6, 3), torch.randn(6, 2)
    calls = 0

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error("third")
        return F.mse_loss(outputs, targets)

    model.weight.grad_variance = torch.full((2, 3), 7.0)
    with pytest.raises(error, match="third"):
        per_sample_variance(model, loss_fn, batch, chunk_size=chunk_size)
    assert calls == 3
    assert (model.weight.grad_variance == 7).all() and not hasattr(model.bias, "grad_variance")
    assert isinstance(model.weight, nn.Parameter) and not model.weight.isnan().any()
    run(model, batch, chunk_size=chunk_size)


# --- errors


def model_with(module: nn.Module, **named: Any) -> nn.Module:
    model = nn.Sequential()
    model.add_module("first", nn.Linear(3, 2))
    model.add_module("bad", module)
    for name, param in named.items():
        model.register_parameter(name, param)
    return model


def frozen() -> nn.Module:
    return nn.Linear(3, 2).requires_grad_(False)


X, Y = torch.zeros(4, 3), torch.zeros(4, 2)
GOOD = nn.Linear(3, 2)
ERRORS: dict[str, tuple[Callable[[], Any], Any, Any, Any, type[Exception], str]] = {
    "model": (lambda: print, F.mse_loss, (X, Y), None, TypeError, "model is a builtin_function_or_method: must be"),
    "loss": (lambda: GOOD, 3, (X, Y), None, TypeError, "loss_fn is a int: must be callable"),
    "chunk 0": (lambda: GOOD, F.mse_loss, (X, Y), 0, ValueError, "chunk_size=0: must be at least 1"),
    "chunk -2": (lambda: GOOD, F.mse_loss, (X, Y), -2, ValueError, "chunk_size=-2: must be at least 1"),
    "chunk True": (lambda: GOOD, F.mse_loss, (X, Y), True, TypeError, "chunk_size=True: must be an int, or None"),
    "chunk 1.5": (lambda: GOOD, F.mse_loss, (X, Y), 1.5, TypeError, "chunk_size=1.5: must be an int, or None"),
    "one sample": (lambda: GOOD, F.mse_loss, (X[:1], Y[:1]), None, ValueError, "batch has 1 sample: .* at least 2"),
    "no sample": (lambda: GOOD, F.mse_loss, (X[:0], Y[:0]), None, ValueError, "batch has 0 samples: .* at least 2"),
    "counts": (lambda: GOOD, F.mse_loss, (X, Y[:3]), None, ValueError, "targets has 3 samples, and inputs has 4"),
    "counts of inputs": (
        lambda: GOOD,
        F.mse_loss,
        ((X, X[1:]), Y),
        None,
        ValueError,
        re.escape("inputs[1] has 3 samples, and inputs[0] has 4"),
    ),
    "batch": (lambda: GOOD, F.mse_loss, X, None, TypeError, r"batch is a Tensor: must be \(inputs, targets\)"),
    "batch of 3": (lambda: GOOD, F.mse_loss, (X, X, Y), None, TypeError, "batch is 3 entries: must be"),
    "empty batch": (lambda: GOOD, F.mse_loss, ((), ()), None, TypeError, "batch holds no tensor"),
    "inputs": (lambda: GOOD, F.mse_loss, ({"x": X}, Y), None, TypeError, "inputs is a dict: must be a tensor"),
    "nested": (lambda: GOOD, F.mse_loss, (((X,),), Y), None, TypeError, r"inputs\[0\] is a tuple: must be a tensor"),
    "scalar": (lambda: GOOD, F.mse_loss, (X, torch.zeros(())), None, ValueError, "targets has no dimensions"),
    "frozen": (frozen, F.mse_loss, (X, Y), None, ValueError, "model has no parameter that requires grad"),
    "double": (lambda: nn.Linear(3, 2).double(), F.mse_loss, (X, Y), None, TypeError, "'weight' has dtype .*float64"),
    "overlapping": (
        lambda: model_with(nn.Identity(), wide=nn.Parameter(torch.zeros(3).expand(2, 3))),
        F.mse_loss,
        (X, Y),
        None,
        ValueError,
        "parameter 'wide' has elements that share memory",
    ),
    "no reduction": (
        lambda: GOOD,
        lambda a, b: F.mse_loss(a, b, reduction="none"),
        (X, Y),
        None,
        ValueError,
        r"loss_fn returned shape \(1, 2\) for one sample: must return a scalar",
    ),
    "loss of a sample": (
        lambda: GOOD,
        lambda a, b: (a - b).square().sum(1),
        (X, Y),
        None,
        ValueError,
        r"loss_fn returned shape \(1,\) for one sample: must return a scalar",
    ),
    "no tensor": (lambda: GOOD, lambda a, b: 0.5, (X, Y), None, TypeError, "loss_fn returned a float: must return a"),
    "complex": (
        lambda: GOOD,
        lambda a, b: a.sum() * 1j,
        (X, Y),
        None,
        TypeError,
        "loss_fn returned dtype torch.complex64",
    ),
    "batch norm": (
        lambda: model_with(nn.BatchNorm1d(2)),
        F.mse_loss,
        (X, Y),
        None,
        ValueError,
        r"module 'bad' is a BatchNorm1d .* statistics from the batch.*call .eval\(\)",
    ),
    "lonely batch norm": (
        lambda: nn.BatchNorm1d(3),
        F.mse_loss,
        (X, X),
        None,
        ValueError,
        "model is a BatchNorm1d that takes its statistics",
    ),
    "batch norm without statistics": (
        lambda: model_with(nn.BatchNorm1d(2, track_running_stats=False)).eval(),
        F.mse_loss,
        (X, Y),
        None,
        ValueError,
        "module 'bad' is a BatchNorm1d .*: give it running statistics",
    ),
    "sync batch norm": (
        lambda: model_with(nn.SyncBatchNorm(2)),
        F.mse_loss,
        (X, Y),
        None,
        ValueError,
        "module 'bad' is a SyncBatchNorm",
    ),
    "batch norm in the loss": (
        lambda: GOOD,
        nn.Sequential(nn.BatchNorm1d(2)),
        (X, Y),
        None,
        ValueError,
        "module 'loss_fn.0' is a BatchNorm1d",
    ),
    "max_norm": (
        lambda: model_with(nn.Embedding(3, 2, max_norm=1.0)),
        F.mse_loss,
        (X, Y),
        None,
        ValueError,
        "module 'bad' has max_norm=1.0, with which a forward rewrites its weights",
    ),
    "data parallel": (
        lambda: DataParallel(GOOD),
        F.mse_loss,
        (X, Y),
        None,
        ValueError,
        "model is a DataParallel, which spreads a batch .*: give the .module in it",
    ),
    "nested data parallel": (
        lambda: model_with(DataParallel(nn.Linear(2, 2))),
        F.mse_loss,
        (X, Y),
        None,
        ValueError,
        "module 'bad' is a DataParallel",
    ),
    "shapes": (lambda: nn.Linear(4, 2), F.mse_loss, (X, Y), None, RuntimeError, "gradients of single samples"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_errors_leave_everything(name: str, one_by_one: bool) -> None:
    make, loss_fn, batch, chunk_size, error, message = ERRORS[name]
    if one_by_one:
        if chunk_size is not None:
            pytest.skip("is about the chunk size")
        chunk_size = 1
        if name == "shapes":
            message = "shapes cannot be multiplied"
    model = make()
    before = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        per_sample_variance(model, loss_fn, batch, chunk_size=chunk_size)
    assert torch.equal(torch.get_rng_state(), state)
    if isinstance(model, nn.Module):
        assert all(same_bits(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
        assert not any(hasattr(param, "grad_variance") for param in model.parameters())


def test_ddp_is_refused(tmp_path: Path) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch has no gloo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(nn.Linear(3, 2))
        with pytest.raises(ValueError, match=r"is a DistributedDataParallel.*variance will be that of this process"):
            run(wrapped)
        run(wrapped.module)
    finally:
        torch.distributed.destroy_process_group()


def test_it_is_public() -> None:
    assert "per_sample_variance" in signadam_ext.__all__ and signadam_ext.per_sample_variance is per_sample_variance
