"""Few-bit moments, stored parameters and random bits: what docs/numerics.md promises of them, derived and counted."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from itertools import product

import pytest
import torch
from support.strategies import same_bits
from torch import Tensor

import signadam_ext
from signadam_ext.core import formats, tensors
from signadam_ext.core.random_bits import bits_for_m, bits_for_v, random_bits, subkeys, tensor_keys

ALL_BITS = torch.arange(1 << 16)
BACKENDS = ("cpu", "reference")
SPLITS = ("split16", "split8")
#: L of each form of codes.
LEVELS = {"int8": 127, "int4": 7, "int2": 1}


def parameter(shape=(37,), dtype=torch.bfloat16, seed=0):
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def train(params, optimizer, steps, dtype=None):
    """Steps with gradients that depend on the number of the step alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype or p.dtype).to(p.dtype)
        optimizer.step()


def made(cls, params, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* momentum with beta")
        return cls(params, **options)


def equal_states(a, b):
    return a.keys() == b.keys() and all(
        same_bits(a[name], b[name]) if isinstance(a[name], Tensor) else a[name] == b[name] for name in a
    )


# Random bits


def test_the_test_vector():
    assert subkeys(tensor_keys(7, 3, 12), 0) == (0xD75967BD, 0x28DA53D5)
    assert random_bits(7, 3, 12, 0, 6).tolist() == [8827, 5678, 60112, 41659, 13901, 59357]


def test_bits_do_not_depend_on_how_a_tensor_is_cut():
    whole = random_bits(1, 2, 3, 0, 101)
    for cut in (1, 2, 50, 51):
        assert torch.equal(torch.cat([random_bits(1, 2, 3, 0, cut), random_bits(1, 2, 3, cut, 101 - cut)]), whole)
    border = 1 << 33
    whole = random_bits(1, 2, 3, border - 5, 10)
    assert torch.equal(whole[5:], random_bits(1, 2, 3, border, 5))
    assert not torch.equal(whole[5:], random_bits(1, 2, 3, 0, 5)), "the high word counts"


def test_every_word_counts():
    base = (1, 2, 3)
    seen = [random_bits(*base, 0, 64)]
    for changed in ((2, 2, 3), (1 + (1 << 32), 2, 3), (1, 3, 3), (1, 2, 4), (1, 2, 3 + (1 << 32))):
        seen.append(random_bits(*changed, 0, 64))
    for i, a in enumerate(seen):
        for b in seen[:i]:
            assert int((a == b).sum()) < 4


N = 1 << 18


def z_of_correlation(a, b):
    """Correlation of two samples of uniform numbers, in its own standard deviations."""
    a, b = a.double(), b.double()
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()) * math.sqrt(len(a))


#: 40 comparisons of |z| are below this with probability 1 - 40 * 5.7e-7, if the bits are independent. They are fixed.
Z_LIMIT = 5.0


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 8, 16, 32, 64, 1024, 2048, 16384])
def test_no_correlation_between_elements(lag):
    r = random_bits(0, 0, 1, 0, N)
    assert abs(z_of_correlation(r[:-lag], r[lag:])) < Z_LIMIT
    assert abs(z_of_correlation(r[:-lag] & 255, r[lag:] & 255)) < Z_LIMIT


@pytest.mark.parametrize("other", [(0, 0, 2), (0, 0, 3), (0, 0, 257), (0, 1, 1), (0, 2, 1), (1, 0, 1), (2, 0, 1)])
def test_no_correlation_between_steps_tensors_and_seeds(other):
    a, b = random_bits(0, 0, 1, 0, N), random_bits(*other, 0, N)
    assert abs(z_of_correlation(a, b)) < Z_LIMIT
    assert abs(z_of_correlation(bits_for_m(a), b)) < Z_LIMIT


def test_each_value_is_as_frequent_as_any_other():
    counts = torch.bincount(random_bits(0, 0, 1, 0, N), minlength=1 << 16).double()
    expected = N / (1 << 16)
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    freedom = (1 << 16) - 1
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)


def test_what_the_moments_use():
    assert torch.equal(bits_for_m(torch.tensor([0x1234])), torch.tensor([0x3412]))
    assert torch.equal(bits_for_v(torch.tensor([0x1234])), torch.tensor([0x3412 ^ 0xFFFF]))
    # All 65536 values occur in each, so a rounding that is right for all values of r is right for them.
    assert torch.equal(bits_for_m(ALL_BITS).sort().values, ALL_BITS)
    assert torch.equal(bits_for_v(ALL_BITS).sort().values, ALL_BITS)


# Rounding: over all 65536 values of r, so expectations are counted, not estimated


@pytest.mark.parametrize("levels", LEVELS.values())
def test_the_expectation_of_a_code_is_the_moment(levels):
    """E[q] = int(M * 65536) / 65536 exactly, so |E[q] / L - m| < 2^-16 / L; the variance is f * (1 - f) / L^2."""
    generator = torch.Generator().manual_seed(0)
    m = torch.cat(
        [torch.rand(200, generator=generator) * 2 - 1, torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-9, -1e-9, 1e-4])]
    )
    scaled = m * levels
    q = formats.stochastic_integer(scaled[:, None].expand(-1, 1 << 16), ALL_BITS)
    fixed = (scaled * 65536.0).trunc().double()
    assert torch.equal(q.double().sum(1), fixed)
    assert (q.double().mean(1) / levels - scaled.double() / levels).abs().max() < 2.0**-16 / levels
    fraction = fixed / 65536 - (fixed / 65536).floor()
    assert torch.allclose(q.double().var(1, correction=0), fraction * (1 - fraction), rtol=0, atol=1e-12)
    assert q.min() >= -levels and q.max() <= levels
    whole = scaled == scaled.round()
    assert (q[whole] == scaled[whole].long()[:, None]).all(), "an integer stays put"


@pytest.mark.parametrize("levels", LEVELS.values())
def test_no_code_leaves_its_levels(levels):
    """Rounding can put beta * M + (1 - beta) * L above L by an ulp or so; the conversion cuts that off."""
    beta = torch.linspace(0, 1, 200_001, dtype=torch.float64)[:-1]
    s = (beta.float(), ((1 - beta) * levels).float())
    top = s[0] * float(levels) + s[1]
    assert (top > levels).any() or levels == 1, "the test has teeth"
    for r in (0, 65535):
        assert formats.stochastic_integer(top, torch.tensor(r)).max() <= levels
        assert formats.stochastic_integer(-top, torch.tensor(r)).min() >= -levels


@pytest.mark.parametrize("sd,levels", LEVELS.items())
def test_the_variance_of_a_few_bit_moment(sd, levels):
    """Var[m_t] under zero-mean signs, stored in codes, against the recursion that the rounding implies.

    With q = M + e, E[e | M] = 0 and Var[e | M] = E[f (1 - f)]: the variance of the error is E[f (1 - f)].
    The expectation of f (1 - f) is taken over the sample itself, so the check is of the recursion, within 5 standard
    errors of a sample variance (kurtosis from the sample).
    """
    beta, n, steps = 0.9, 200_000, 30
    p = torch.nn.Parameter(torch.zeros(n))
    optimizer = made(signadam_ext.SignAdamPP, [p], lr=0.0, beta=beta, state_dtype=sd)
    generator = torch.Generator().manual_seed(0)
    form = formats.FORMATS[sd]
    b, a = torch.tensor(beta), torch.tensor((1 - beta) * levels)
    for _ in range(steps):
        q = torch.zeros(n) if p not in optimizer.state else formats.decode(form, optimizer.state[p]["exp_avg"], n)
        g = torch.randint(0, 2, (n,), generator=generator).float() * 2 - 1
        p.grad = g
        optimizer.step()
        exact = b * q + a * g  # before rounding
        new = formats.decode(form, optimizer.state[p]["exp_avg"], n)
        fraction = exact.double() - exact.double().floor()
        error = new.double() - exact.double()
        predicted = float((fraction * (1 - fraction)).mean())
        spread = float((error.square() - fraction * (1 - fraction)).std()) / math.sqrt(n)
        assert abs(float(error.square().mean()) - predicted) <= 5 * spread + 1e-12
        assert abs(float(error.mean())) <= 5 * math.sqrt(predicted / n) + 2.0**-16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_of_parameters_has_the_right_expectation(dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, generator=generator) * torch.tensor([1e-6, 1e-3, 1.0, 100.0]).repeat(15)
    rounded = formats.narrow_stochastic(x[:, None].expand(-1, 1 << 16).reshape(-1), ALL_BITS.repeat(60), dtype)
    rounded = rounded.view(60, -1).double()
    below, above = rounded.min(1).values, rounded.max(1).values
    mean = rounded.mean(1)
    # bf16 cuts off 16 bits, which 16 random bits serve exactly; fp16 truncates at 2^-16 of its last place.
    tolerance = 0 if dtype == torch.bfloat16 else 1
    assert ((mean - x.double()).abs() <= (above - below) * 2.0**-16 * tolerance + x.double().abs() * 1e-15).all()
    assert ((rounded == below[:, None]) | (rounded == above[:, None])).all(), "one of the two neighbours"
    kept = x.to(dtype).float()
    again = formats.narrow_stochastic(kept[:, None].expand(-1, 1 << 16).reshape(-1), ALL_BITS.repeat(60), dtype)
    assert torch.equal(again.view(60, -1), x.to(dtype)[:, None].expand(-1, 1 << 16)), "what can be held stays as it is"


def test_stochastic_rounding_at_the_borders_of_fp16():
    cases = torch.tensor(
        [65504.0, 65520.0, 65535.0, 65536.0, 1e30, torch.inf, -torch.inf, torch.nan, 2.0**-24, 6e-8, 0.0]
    )
    low, high = (formats.narrow_stochastic(cases, torch.full(cases.shape, r), torch.float16) for r in (0, 65535))
    assert low[:3].tolist() == [65504.0] * 3 and high[:2].tolist() == [65504.0] * 2
    assert high[2] == torch.inf and (low[3:6] == torch.inf).all() and (low[6] == -torch.inf)
    assert low[7].isnan() and high[7].isnan()
    assert low[8] == high[8] == 2.0**-24 and low[10] == 0
    assert low[9] == 2.0**-24 and high[9] == 2.0**-23


def test_bf16_moments_do_not_stop_where_rounding_to_nearest_would():
    """Rounded to nearest, a bf16 moment under a constant 1 settles at 0.98 for beta = 0.9 and 0.25 for 0.999."""
    p = torch.nn.Parameter(torch.zeros(4000))
    optimizer = made(signadam_ext.Signum, [p], lr=0.0, beta=0.99, state_dtype="bf16")
    for _ in range(1200):
        p.grad = torch.ones_like(p)
        optimizer.step()
    m = optimizer.state[p]["exp_avg"]
    assert m.dtype == torch.bfloat16
    # Exactly 1 - 0.99^1200 = 0.999994 on average; a step's rounding error is below an ulp of 2^-8, its sum over the
    # memory of 100 steps below 2^-8 / sqrt(1 - 0.99^2), and the mean of 4000 errs by a 63rd of that: 5 of them.
    assert abs(float(m.double().mean()) - 0.999994) < 5 * 2.0**-8 / math.sqrt(1 - 0.99**2) / math.sqrt(4000)


# Forms in and out


def test_every_form_of_codes_has_its_levels():
    assert {kind: form.levels for kind, form in formats.CODES.items()} == LEVELS


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("numel", [0, 1, 3, 31, 32, 33, 100])
def test_codes_are_packed_and_unpacked(kind, numel):
    form = formats.FORMATS[kind]
    codes = torch.randint(-form.levels, form.levels + 1, (numel,), dtype=torch.int8)
    packed = formats.pack(form, codes)
    assert packed.dtype == torch.uint8 and packed.numel() == form.nbytes(numel) == -(-numel // 32) * 32 * form.bits // 8
    assert torch.equal(formats.codes_of(form, packed, numel), codes)
    padding = formats.codes_of(form, packed, -(-numel // 32) * 32)[numel:]
    assert not padding.any()


def test_block_exponents_are_the_smallest_that_hold_the_block():
    x = torch.cat([torch.randn(32) * 10.0**e for e in range(-44, 38, 2)] + [torch.zeros(32), torch.full((32,), 127.0)])
    zero = torch.zeros(x.numel(), dtype=torch.int64)
    stored = formats.encode(formats.BLOCK8, x, zero)
    exponents = formats._exponents(stored, x.numel()).long()
    largest = x.view(-1, 32).abs().amax(1).double()
    ceiling = 127 * 2.0 ** exponents.double()
    assert ((ceiling >= largest) | (exponents == 120)).all()
    assert ((ceiling / 2 < largest) | (exponents == -126)).all()
    assert exponents[-2] == -126 and exponents[-1] == 0


@pytest.mark.parametrize("r", [0, 1, 65535])
def test_block_codes_hold_nan_and_saturate_infinities(r):
    x = torch.linspace(-1, 1, 32)
    x[3], x[4], x[5] = torch.nan, torch.inf, -torch.inf
    stored = formats.encode(formats.BLOCK8, x, torch.full((32,), r))
    back = formats.decode(formats.BLOCK8, stored, 32)
    assert back[3].isnan() and back.isfinite().sum() == 31
    assert back[4] == -back[5] == 127 * 2.0 ** float(formats._exponents(stored, 32))


def test_block_scaled_momentum_keeps_tiny_values():
    """fp16 scales flush a block below 3e-8 to zero; here the expectation holds down to the smallest normal number."""
    for scale in (1e-10, 1e-30, 1e-37):
        x = torch.rand(32, generator=torch.Generator().manual_seed(0)) * scale
        stored = formats.encode(formats.BLOCK8, x.repeat(1 << 16), ALL_BITS.repeat_interleave(32))
        back = formats.decode(formats.BLOCK8, stored, 32 << 16).view(-1, 32).double()
        unit = 2.0 ** float(formats._exponents(stored, 32 << 16)[0])
        assert (back.mean(0) - x.double()).abs().max() <= unit * 2.0**-15
        assert back.abs().amax() > 0


#: The largest magnitude of a block: where codes saturate, where exponents end, and what is no number.
EDGES = (0.0, 1e-45, 1e-39, 2.0**-126, 1e-20, 1.0, 127.0, 127.5, 2.0**125, 2.0**126, 3e38, math.inf, math.nan)


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"weight_decay": 0.5, "decoupled_weight_decay": False}])
def test_blocks_of_any_size_have_the_bits_of_the_reference(options):
    """Blocks of each edge beside each other, which the kernels take two at a time."""
    pairs = [edge for two in product(EDGES, repeat=2) for edge in two]
    sizes = torch.tensor(pairs)[:, None].expand(-1, formats.RUN).reshape(-1)
    grad = (torch.rand(sizes.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1) * sizes
    after = []
    for backend in BACKENDS:
        p = parameter(sizes.shape)
        optimizer = signadam_ext.Signum(
            [p], lr=1e-2, beta=0.5, state_dtype="int8", param_storage="stochastic", backend=backend, **options
        )
        for turn in range(3):
            p.grad = grad.roll(turn * formats.RUN).to(p.dtype)
            optimizer.step()
        after.append((p.detach(), optimizer.state[p]))
    assert same_bits(after[0][0], after[1][0])
    assert equal_states(after[0][1], after[1][1])


@pytest.mark.parametrize("param_storage", SPLITS)
def test_split_weights_are_put_together_again(param_storage):
    generator = torch.Generator().manual_seed(0)
    x = torch.cat(
        [
            torch.randint(-(2**31), 2**31 - 1, (20000,), generator=generator).to(torch.int32).view(torch.float32),
            torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-45, -1e-45, 1.0]),
        ]
    )
    zero = torch.zeros(x.numel(), dtype=torch.int64)
    param, low = (
        torch.empty_like(x, dtype=torch.bfloat16),
        torch.empty(x.shape, dtype=formats.RESIDUALS[param_storage][1]),
    )
    formats.store_param(param_storage, x, zero, param, low)
    back = formats.load_param(param_storage, param, low)
    expected = x if param_storage == "split16" else formats.from_bits(formats.bits(x) & 0xFFFFFF00)
    assert same_bits(back, torch.where(x.isnan(), torch.nan, expected))


# Training


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "cls", [signadam_ext.SignSGD, signadam_ext.Signum, signadam_ext.SignAdam, signadam_ext.SignAdamPP]
)
def test_split16_follows_the_fp32_run(cls, backend):
    half = parameter((3, 41))
    full = torch.nn.Parameter(half.detach().float())
    a = cls([half], lr=1e-3, param_storage="split16", weight_decay=0.1, backend=backend)
    b = cls([full], lr=1e-3, weight_decay=0.1, backend=backend)
    for step in range(20):
        g = torch.randn(half.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
        half.grad, full.grad = g, g.float()
        a.step()
        b.step()
        low = a.state[half]["param_low"]
        joined = formats.load_param("split16", half.detach().flatten(), low.flatten()).view_as(full)
        assert torch.equal(joined, full), step
        high = formats._halves(formats.bits(full.detach()) + 0x8000 >> 16).view(torch.bfloat16)
        assert torch.equal(half, high)


@pytest.mark.parametrize("backend", BACKENDS)
def test_master_weights_follow_the_fp32_run(backend):
    for dtype in (torch.bfloat16, torch.float16):
        half = parameter((3, 41), dtype)
        full = torch.nn.Parameter(half.detach().float())
        a = signadam_ext.SignAdamPP([half], lr=1e-3, param_storage="master", backend=backend)
        b = signadam_ext.SignAdamPP([full], lr=1e-3, backend=backend)
        for step in range(20):
            g = torch.randn(half.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
            half.grad, full.grad = g, g.float()
            a.step()
            b.step()
            assert torch.equal(a.state[half]["master_param"], full)
            assert torch.equal(half, full.detach().to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("param_storage", ["master", *SPLITS])
def test_a_parameter_written_from_outside_wins(param_storage, backend):
    p = parameter((6,))
    optimizer = signadam_ext.SignAdamPP([p], lr=1e-4, param_storage=param_storage, backend=backend)
    train([p], optimizer, range(3))
    with torch.no_grad():
        p.copy_(torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 5.0, -0.125]))
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    finite = before.isfinite()
    assert torch.equal(p[finite], before[finite])
    assert p[2] == torch.inf and p[3] == -torch.inf
    if param_storage == "master":
        assert torch.equal(optimizer.state[p]["master_param"], before.float())


def test_fp32_parameters_are_their_own_masters():
    for param_storage in ("stochastic", "master"):
        a, b = parameter(dtype=torch.float32), parameter(dtype=torch.float32)
        one = signadam_ext.SignAdamPP([a], param_storage=param_storage)
        other = signadam_ext.SignAdamPP([b])
        train([a], one, range(3))
        train([b], other, range(3))
        assert torch.equal(a, b) and one.state[a].keys() == other.state[b].keys()


def test_the_seed_decides_and_nothing_global_is_touched():
    before = torch.get_rng_state()
    results = []
    for seed in (0, 0, 1):
        p = parameter((500,))
        optimizer = made(
            signadam_ext.SignAdamPP, [p], lr=1e-4, state_dtype="int2", param_storage="stochastic", seed=seed
        )
        train([p], optimizer, range(3))
        results.append((p.detach().clone(), optimizer.state[p]["exp_avg"]))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][1], results[2][1])


def test_stochastic_weights_move_where_rounding_to_nearest_stands_still():
    """lr is a hundredth of the last place: to nearest nothing moves, stochastically the mean moves by lr a step."""
    n, lr, steps = 20000, 2.0**-8 / 100, 50
    moved = {}
    for param_storage in ("nearest", "stochastic"):
        p = torch.nn.Parameter(torch.full((n,), 1.5).bfloat16())
        optimizer = signadam_ext.SignSGD([p], lr=lr, param_storage=param_storage)
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[param_storage] = 1.5 - float(p.detach().double().mean())
    assert moved["nearest"] == 0
    # Each step rounds with a variance below ulp^2 * lr / ulp, independently.
    error = 5 * math.sqrt(steps * 2.0**-7 * lr / n)
    assert abs(moved["stochastic"] - steps * lr) < error < steps * lr / 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_may_have_its_own_forms(backend):
    a, b, c = parameter((70,)), parameter((33,)), parameter((5,), torch.float32)
    groups = [
        {"params": [a], "state_dtype": "int2", "param_storage": "stochastic"},
        {"params": [b], "state_dtype": "fp32", "param_storage": "split8"},
        {"params": [c]},
    ]
    optimizer = signadam_ext.SignAdamPP(groups, lr=1e-3, state_dtype="int8", backend=backend)
    train([a, b, c], optimizer, range(3))
    assert [optimizer.state[p]["exp_avg"].dtype for p in (a, b, c)] == [torch.uint8, torch.float32, torch.uint8]
    assert optimizer.state[a]["exp_avg"].numel() == 96 // 4
    assert optimizer.state[b]["param_low"].dtype == torch.int8


def test_each_moment_may_have_its_own_form():
    p = parameter()
    optimizer = signadam_ext.SignAdam([p], state_dtype=("int8", "fp32"))
    train([p], optimizer, range(2))
    assert [optimizer.state[p][name].dtype for name in ("exp_avg", "exp_avg_sq")] == [torch.uint8, torch.float32]


# Checkpoints

FORMATS = [
    (cls, sd, param_storage)
    for cls, names in (
        (signadam_ext.SignAdamPP, tuple(formats.BOUNDED)),
        (signadam_ext.SignAdam, tuple(formats.BOUNDED)),
        (signadam_ext.Signum, ("fp32", "bf16", "int8")),
    )
    for sd, param_storage in product(names, formats.PARAM_STORAGES)
]


@pytest.mark.parametrize("cls, sd, param_storage", FORMATS)
def test_a_resumed_run_has_the_same_bits(cls, sd, param_storage, tmp_path):
    """Through torch.save and weights_only, through save_state, deepcopy and pickle; from one backend into the other."""
    forms = {"state_dtype": sd, "param_storage": param_storage}
    params = [parameter((33, 5)), parameter((7,), seed=1)]
    optimizer = made(cls, params, lr=0.01, seed=9, backend="cpu", **forms)
    train(params, optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "dict")
    optimizer.save_state(tmp_path / "state")
    saved = [p.detach().clone() for p in params]
    copies = {"deepcopy": copy.deepcopy((params, optimizer)), "pickle": pickle.loads(pickle.dumps((params, optimizer)))}
    for name in ("dict", "state"):
        other = [torch.nn.Parameter(p.clone()) for p in saved]
        resumed = made(cls, other, lr=0.5, backend="reference", **forms)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if name == "dict":
                resumed.load_state_dict(torch.load(tmp_path / "dict", weights_only=True))
            else:
                resumed.load_state(tmp_path / "state")
        assert resumed.param_groups[0]["seed"] == 9 and resumed.param_groups[0]["lr"] == 0.01
        copies[name] = (other, resumed)
    train(params, optimizer, range(3, 6))
    for name, (other, resumed) in copies.items():
        train(other, resumed, range(3, 6))
        for p, q in zip(params, other, strict=True):
            assert torch.equal(p, q), name
            assert equal_states(optimizer.state[p], resumed.state[q]), name


@pytest.mark.parametrize("sd", LEVELS)
def test_state_dicts_hold_codes_of_the_parameters_shape(sd):
    p = torch.nn.Parameter(torch.randn(4, 6).t().bfloat16())
    optimizer = made(signadam_ext.SignAdamPP, [p], lr=0.1, state_dtype=sd, param_storage="stochastic")
    train([p], optimizer, range(3))
    state_dict = optimizer.state_dict()
    saved, own = state_dict["state"][0], optimizer.state[p]
    assert saved.keys() == own.keys() == {"step", "exp_avg", "exp_avg_kind", "exp_avg_levels", "exp_avg_order"}
    assert saved["exp_avg"].dtype == torch.int8 and saved["exp_avg"].shape == p.shape
    assert saved["exp_avg_kind"] == formats.FORMATS[sd].number and saved["exp_avg_levels"] == formats.FORMATS[sd].levels
    codes = formats.codes_of(formats.FORMATS[sd], own["exp_avg"], p.numel())
    assert torch.equal(saved["exp_avg"].t().flatten(), codes)
    group = state_dict["param_groups"][0]
    assert (group["backend"], group["state_dtype"], group["param_storage"]) == ("auto", sd, "stochastic")
    assert group["seed"] == 0 and group["method"] == "SignAdamPP"


def test_a_state_of_the_version_before_loads():
    p = parameter((5,), torch.float32)
    optimizer = signadam_ext.SignAdamPP([p], seed=3, state_dtype="fp32")
    old = {
        "state": {0: {"step": torch.tensor(4.0), "exp_avg": torch.linspace(-1, 1, 5)}},
        "param_groups": [
            {
                "lr": 0.25,
                "betas": (0.8,),
                "confidence": "fixed",
                "alpha": 0.0,
                "confidence_beta": 0.9,
                "weight_decay": 0.0,
                "decoupled_weight_decay": True,
                "maximize": False,
                "params": [0],
            }
        ],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(old)
    assert torch.equal(optimizer.state[p]["exp_avg"], torch.linspace(-1, 1, 5))
    assert optimizer.param_groups[0]["seed"] == 3 and optimizer.param_groups[0]["betas"] == (0.8,)
    train([p], optimizer, range(1))


@pytest.mark.parametrize("source, target", [(a, b) for a in formats.BOUNDED for b in formats.BOUNDED if a != b])
def test_a_change_of_precision_warns_once_and_keeps_the_expectation(source, target):
    params = [torch.nn.Parameter(torch.zeros(20000)), torch.nn.Parameter(torch.zeros(3))]
    optimizer = made(signadam_ext.SignAdamPP, params, lr=0.0, state_dtype=source)
    train(params, optimizer, range(4), torch.float32)
    other = made(signadam_ext.SignAdamPP, params, lr=0.0, state_dtype=target)
    with pytest.warns(UserWarning, match=f"exp_avg: {source} to {target}") as caught:
        other.load_state_dict(optimizer.state_dict())
    assert len(caught) == 1

    def moment(which, name):
        form = formats.FORMATS[name]
        x = formats.decode(form, which.state[params[0]]["exp_avg"].flatten(), 20000).double()
        return x / (form.levels or 1)

    before, after = moment(optimizer, source), moment(other, target)
    # Rounding to codes errs by less than 1 / L each, independently; bf16 by 2^-8; both on average by 0.
    unit = 1 / (formats.FORMATS[target].levels or 2**8)
    assert (after - before).abs().max() <= unit * 1.0001
    assert abs(float((after - before).mean())) < 5 * unit / 2 / math.sqrt(20000) + 2.0**-16


@pytest.mark.parametrize(
    "source, target", [("split16", "master"), ("split8", "master"), ("split8", "split16"), ("master", "split16")]
)
def test_stored_parameters_change_form_without_loss(source, target):
    p = parameter((50,))
    optimizer = signadam_ext.SignAdamPP([p], lr=1e-3, param_storage=source)
    train([p], optimizer, range(4))
    residual = optimizer.state[p][formats.RESIDUALS[source][0]]
    value = formats.load_param(source, p.detach(), residual)
    q = torch.nn.Parameter(p.detach().clone())
    other = signadam_ext.SignAdamPP([q], lr=0.5, param_storage=target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(optimizer.state_dict())
    other.param_groups[0]["lr"] = 0.0
    q.grad = torch.zeros_like(q)
    other.step()
    assert same_bits(formats.load_param(target, q.detach(), other.state[q][formats.RESIDUALS[target][0]]), value)


def test_leaving_precision_behind_is_said():
    p = parameter((50,))
    optimizer = signadam_ext.SignAdamPP([p], lr=1e-3, param_storage="split16")
    train([p], optimizer, range(2))
    for target in ("nearest", "stochastic", "split8"):
        other = signadam_ext.SignAdamPP([p], param_storage=target)
        with pytest.warns(UserWarning, match=f"param_storage: split16 to {target}"):
            other.load_state_dict(optimizer.state_dict())


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    p = parameter()
    optimizer = signadam_ext.SignAdamPP([p], state_dtype="int8")
    train([p], optimizer, range(2))
    path = tmp_path / "state"
    optimizer.save_state(path)
    before = path.read_bytes()
    train([p], optimizer, range(2, 3))

    def fail(*_, **__):
        raise OSError("no space")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        optimizer.save_state(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# Bad input


def corrupted(**changes):
    def change(state):
        state.update(changes)

    return change


BAD_STATES = {
    "codes": (
        "int4",
        corrupted(exp_avg=torch.full((37,), 8, dtype=torch.int8)),
        "codes from 8 to 8: must be from -7 to 7",
    ),
    "lowest code": ("int8", corrupted(exp_avg=torch.full((37,), -128, dtype=torch.int8)), "codes from -128 to -128"),
    "shape": ("int2", corrupted(exp_avg=torch.zeros(36, dtype=torch.int8)), "shape \\(36,\\)"),
    "dtype": ("int2", corrupted(exp_avg=torch.zeros(37)), "has dtype torch.float32: must be a int8"),
    "kind": ("int2", corrupted(exp_avg_kind="int3"), "did you mean 'int"),
    "levels": ("int2", corrupted(exp_avg_levels=3), "exp_avg_levels of .* is 3: must be 1 for int2"),
}


@pytest.mark.parametrize("sd, change, message", BAD_STATES.values(), ids=BAD_STATES.keys())
def test_a_corrupted_state_is_refused(sd, change, message, tmp_path):
    p = parameter()
    optimizer = signadam_ext.SignAdamPP([p], state_dtype=sd)
    train([p], optimizer, range(2))
    state_dict = optimizer.state_dict()
    change(state_dict["state"][0])
    before = copy.deepcopy(dict(optimizer.state[p]))
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.load_state_dict(state_dict)
    assert equal_states(optimizer.state[p], before)


def test_values_that_no_momentum_of_signs_has_are_refused():
    p = parameter()
    optimizer = signadam_ext.SignAdamPP([p], state_dtype="int8")
    train([p], optimizer, range(2))
    for value in (1.5, torch.nan, torch.inf):
        state = {"step": torch.tensor(1.0), "exp_avg": torch.full((37,), value)}
        groups = optimizer.state_dict()["param_groups"]
        with pytest.raises(ValueError, match="beyond 1 or NaN"):
            optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})


def test_infinite_blocks_are_refused():
    p = parameter()
    optimizer = signadam_ext.Signum([p], state_dtype="int8")
    train([p], optimizer, range(2))
    state_dict = optimizer.state_dict()
    state_dict["state"][0]["exp_avg"][3] = torch.inf
    with pytest.raises(ValueError, match="exponents are corrupted"):
        optimizer.load_state_dict(state_dict)


BAD_ARGUMENTS = {
    "int2 of Signum": (signadam_ext.Signum, {"state_dtype": "int2"}, ValueError, "has no bound, so it needs a scale"),
    "state_dtype": (signadam_ext.SignAdamPP, {"state_dtype": "int3"}, ValueError, "did you mean"),
    "number of state_dtypes": (
        signadam_ext.SignAdamPP,
        {"state_dtype": ("int8", "fp32")},
        ValueError,
        "must be one dtype",
    ),
    "int8 second moment": (signadam_ext.SignAdam, {"state_dtype": 8}, ValueError, "state_dtype=8: must be one of"),
    "param_storage": (signadam_ext.SignSGD, {"param_storage": "split"}, ValueError, "did you mean 'split"),
    "seed type": (signadam_ext.SignSGD, {"seed": 1.0}, TypeError, "seed=1.0: must be an integer"),
    "seed flag": (signadam_ext.SignSGD, {"seed": True}, TypeError, "seed=True"),
    "seed range": (signadam_ext.SignSGD, {"seed": -1}, ValueError, "seed=-1: must be in \\[0, 2\\^64\\)"),
}


@pytest.mark.parametrize("cls, options, error, message", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments(cls, options, error, message):
    with pytest.raises(error, match=message):
        cls([parameter()], **options)


@pytest.mark.parametrize("param_storage", SPLITS)
def test_split_weights_of_fp16_are_refused(param_storage):
    p = parameter(dtype=torch.float16)
    with pytest.raises(TypeError, match=f"param_storage='{param_storage}' splits fp32 into a bfloat16 parameter"):
        signadam_ext.SignAdamPP([p], param_storage=param_storage)


def test_much_added_variance_is_said_once():
    p, q = parameter(), parameter()
    for sd, beta, warns in (
        ("int2", 0.9, 0),
        ("int2", 0.95, 1),
        ("int4", 0.95, 0),
        ("int4", 0.96, 1),
        ("int8", 0.99, 0),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            signadam_ext.SignAdamPP([{"params": [p]}, {"params": [q]}], beta=beta, state_dtype=sd)
        assert len(caught) == warns, (sd, beta)
        assert all("momentum with beta" in str(w.message) and w.filename == __file__ for w in caught)


def test_numbers_of_formats_are_those_of_checkpoints():
    """Files hold them: a new form goes to the end of SIGNADAM_FORMATS."""
    assert {form.kind: form.number for form in formats.FORMATS.values()} == {
        **{"fp32": 0, "bf16": 1, "int8": 3, "int4": 4, "int2": 5, "int8_block32": 6}
    }


def test_a_lack_of_memory_is_told_as_such():
    one = torch.zeros(1).expand(1 << 50)
    with pytest.raises(RuntimeError, match="memory"):
        tensors.made_real("the gradient of w", one, (1,))
