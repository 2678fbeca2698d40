"""The Triton kernels in every storage form: parameters and state equal byte for byte to the reference's.

Interpreted in a process of its own, every combination of forms, parameter storage and dtype with one rule of each
kind, some with the others; on a GPU some of them. The quick run interprets some of each kind.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.interpreted import INTERPRETED, run_interpreted
from support.paper_formulas import OF_A_KIND, TABLE, Row, sign_adam_pp
from support.strategies import DTYPES, SPECIALS, same_bits
from torch import Tensor

from signadam_ext import SignAdamPP
from signadam_ext.core import formats
from signadam_ext.core.rule import rule_of
from signadam_ext.core.shard_index import ShardIndex
from signadam_ext.engine.plan import Plan
from signadam_ext.optimizers import stepping
from signadam_ext.optimizers.stepping import make_item

pytest.importorskip("triton")

DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
#: What the quick run does not interpret.
THOROUGH = pytest.mark.thorough if INTERPRETED else ()
ROWS = {row.id: row for row in TABLE}
#: Around the borders of runs of codes, rows and chunks; two chunks, of which one takes the wide path.
SIZES = (0, 1, 3, 31, 32, 33, 1023, 1025, 2047, 2048, 2049, 16384, 16385)


def test_interpreted(thorough: bool) -> None:
    run_interpreted(__file__, f"--hypothesis-profile={'thorough' if thorough else 'quick'}")


@dataclass(frozen=True)
class Combination:
    """How the tensors of a run are stored."""

    state_dtype: tuple[str, ...]
    param_storage: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return "-".join((*self.state_dtype, self.param_storage, str(self.dtype).removeprefix("torch.")))


def combinations(row: Row) -> list[Combination]:
    """All that a rule can be asked for."""
    optimizer = row.optimizer([torch.zeros(1)], **row.hyperparameters)
    rule = rule_of(type(optimizer), optimizer.param_groups[0])
    wide = ("fp32", "bf16")
    forms: Iterable[tuple[str, ...]]
    if row.reads_param:  # whose first moment is a copy of weights, which no form is chosen for
        forms = [(form,) for form in row.state_dtypes] or [()]
    else:
        forms = itertools.product(*(wide if rule.keeps_largest else rule.first_forms, wide, wide)[: len(rule.moments)])
    param_storage = {
        torch.float32: ("nearest",),
        torch.bfloat16: tuple(formats.PARAM_STORAGES),
        torch.float16: ("nearest", "stochastic", "master"),
    }
    return [Combination(form, name, dtype) for form in forms for dtype in DTYPES for name in param_storage[dtype]]


@dataclass(frozen=True)
class Values:
    """Normal numbers, where ``specials`` every 7th a special one."""

    dtype: torch.dtype
    device: str
    specials: bool
    generator: torch.Generator

    def tensor(self, size: int, offset: int) -> Tensor:
        """``offset``: elements behind an allocation's beginning."""
        x = torch.randn(size + offset, generator=self.generator)
        if self.specials:
            which = torch.randint(len(SPECIALS), (len(x[5::7]),), generator=self.generator)
            x[5::7] = torch.tensor(SPECIALS)[which]
        return x.to(self.dtype).to(self.device)[offset:]


def train(
    row: Row,
    combination: Combination,
    tensors: list[tuple[int, int, int | ShardIndex]],
    backend: str,
    device: str,
    steps: int,
    **hyperparameters: Any,
) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """Parameters and optimizer after some steps; between them parameters are set from outside.

    ``tensors``: size, offset in memory, and index of the first element in the unsharded tensor, or of all.
    """
    # The deviation of adaptive confidence would not move with an infinite number about.
    specials = "confidence" not in row.hyperparameters
    values = Values(combination.dtype, device, specials, torch.Generator().manual_seed(1))
    params = [values.tensor(size, offset) for size, offset, _ in tensors]
    stored: dict[str, Any] = {"param_storage": combination.param_storage}
    if combination.state_dtype:
        chosen = combination.state_dtype
        stored["state_dtype"] = chosen[0] if row.reads_param else chosen
    options = {**row.hyperparameters, **stored, **hyperparameters}
    optimizer = row.optimizer(params, backend=backend, seed=2**63 + 7, **options)
    group = optimizer.param_groups[0]
    for step in range(steps):
        for param, (size, offset, _) in zip(params, tensors, strict=True):
            # Aligned only where the parameter is, and not always then.
            param.grad = values.tensor(size, 0 if offset == 0 else step % 2)
            param.grad_variance = values.tensor(size, 0).float().abs()
        items = [make_item(optimizer, str(i), param, group, 0, param_id=i) for i, param in enumerate(params)]
        for item, (_, _, shard_offset) in zip(items, tensors, strict=True):
            item.shard = ShardIndex(shard_offset) if isinstance(shard_offset, int) else shard_offset
        plan = Plan(items, state=optimizer.state)
        assert plan.read(optimizer.param_groups, optimizer.state)
        plan.run(optimizer.param_groups)
        if step + 1 < steps:
            for param in params:
                param[::3] *= -1.5
                if specials:
                    param[1::9] = torch.inf
    return params, optimizer


def assert_parity(
    row: Row, combination: Combination, tensors: list[tuple[int, int, int | ShardIndex]], device: str, **options: Any
) -> None:
    params, optimizer = train(row, combination, tensors, "triton", device, **options)
    expected_params, reference = train(row, combination, tensors, "reference", "cpu", **options)
    for tensor, param, expected in zip(tensors, params, expected_params, strict=True):
        assert same_bits(param, expected), f"{combination}: parameter {tensor} differs"
        state, expected_state = optimizer.state[param], reference.state[expected]
        assert state.keys() == expected_state.keys()
        for name, x in state.items():
            expected_x = expected_state[name]
            if isinstance(x, Tensor) and x.is_floating_point():
                assert same_bits(x, expected_x), f"{combination}: {name} of {tensor} differs"
            elif isinstance(x, Tensor):
                assert torch.equal(x.cpu(), expected_x), f"{combination}: {name} of {tensor} differs"
            else:
                assert x == expected_x


@pytest.mark.filterwarnings("ignore:.*momentum with beta")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.id, marks=() if row.id in OF_A_KIND else THOROUGH)
        for row in TABLE
        if row.id != "sign_sgd" and not row.like
    ],
)
def test_every_combination(row: Row, device: str, thorough: bool) -> None:
    """One small tensor each, of sizes and offsets that take turns. Both kinds of adaptive confidence share the lot."""
    found = combinations(row)
    if row.hyperparameters.get("confidence"):
        found = found[row.id.endswith("delayed") :: 2]
    # On a GPU each one is compiled: some of them. So are some of rules like another: storage is no business of theirs.
    some = (1 if row.id in OF_A_KIND else 5) if INTERPRETED else 10
    if INTERPRETED and not thorough and len(found) > 10:
        some = 11  # each moment and each parameter still has each of its forms, in one rule or another
        found = found[OF_A_KIND.index(row.id) % some :]
    for i, combination in enumerate(found[::some]):
        tensor = ((3, 31, 33, 1023, 1025, 2049, 63)[i % 7], i % 4, 0)
        options = {"weight_decay": 0.1, "decoupled_weight_decay": i % 5 == 0, "maximize": i % 3 == 0}
        assert_parity(row, combination, [tensor], device, steps=2, **options)


@pytest.mark.filterwarnings("ignore:.*momentum with beta")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("rule", "combination"),
    [
        pytest.param("sign_sgd-gated", Combination((), "stochastic", torch.float16), marks=THOROUGH),
        pytest.param("signum", Combination(("int8",), "master", torch.bfloat16), marks=THOROUGH),
        ("sign_adam", Combination(("int4", "bf16"), "split8", torch.bfloat16)),
        pytest.param("sign_adam_pp", Combination(("int2",), "stochastic", torch.bfloat16), marks=THOROUGH),
        pytest.param("sign_adam_pp-adaptive", Combination(("int8",), "split16", torch.bfloat16), marks=THOROUGH),
        pytest.param("sign_adam_pp-delayed", Combination(("int2",), "nearest", torch.float32), marks=THOROUGH),
    ],
    ids=str,
)
def test_every_size(rule: str, combination: Combination, device: str) -> None:
    tensors = [(size, i % 2, 0) for i, size in enumerate(SIZES)] + [(16384, 0, 0)]
    assert_parity(ROWS[rule], combination, tensors, device, steps=2, weight_decay=0.1)


#: Two moments, and one in the fewest bits.
of_each_kind = pytest.mark.parametrize(
    ("rule", "combination"),
    [
        pytest.param("sign_adam", Combination(("int8", "bf16"), "split8", torch.bfloat16), marks=THOROUGH),
        ("sign_adam_pp", Combination(("int2",), "stochastic", torch.bfloat16)),
    ],
    ids=str,
)


@pytest.mark.filterwarnings("ignore:.*momentum with beta")
@pytest.mark.parametrize("device", DEVICES)
@of_each_kind
def test_shards(rule: str, combination: Combination, device: str) -> None:
    """Random bits go by the index in the unsharded tensor: odd ones, and those around a change of keys."""
    border = 1 << 33
    chunks = (1, 4096, border - 16384, border - 8192, border - 8193)
    tails = (1, border - 31, 3 * border, 5 * border - 33, 2**62 - 1)
    tensors = [*((16384, 0, first) for first in chunks), *((40, 0, first) for first in tails)]
    assert_parity(ROWS[rule], combination, tensors, device, steps=2)


#: Runs of odd and even lengths, in one level and in two, across a change of keys, and longer than a chunk.
RUNS = [
    (5000, ShardIndex(7, run=5, stride=12)),
    (16400, ShardIndex((1 << 33) - 20000, run=64, stride=130)),
    (300, ShardIndex(3, run=1, stride=4)),
    (4099, ShardIndex(11, run=6, stride=10, count=7, outer_stride=1000)),
    (40000, ShardIndex(1, run=17001, stride=1 << 34)),
]


@pytest.mark.filterwarnings("ignore:.*momentum with beta")
@pytest.mark.parametrize("device", DEVICES)
@of_each_kind
def test_shards_of_several_runs(rule: str, combination: Combination, device: str) -> None:
    """Random bits go by the place in the whole tensor where a part of it lies in pieces."""
    assert_parity(ROWS[rule], combination, [(size, 0, shard) for size, shard in RUNS], device, steps=2)
    other, _ = train(ROWS[rule], combination, [(300, 0, 3)], "triton", device, steps=2)
    ours, _ = train(ROWS[rule], combination, [(300, 0, RUNS[2][1])], "triton", device, steps=2)
    assert not same_bits(ours[0], other[0])


@pytest.mark.parametrize("device", DEVICES)
def test_a_share_counted_before_the_step_has_no_threshold(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No optimizer steers by this step's own gradient, but kernels and reference agree on what that would be."""

    def before(optimizer: type, group: dict[str, Any]) -> Any:
        return dataclasses.replace(rule_of(optimizer, group), threshold_pass="PASS_BEFORE")

    monkeypatch.setattr(stepping, "rule_of", before)
    steered = {"confidence": "sparsity", "target": 0.25, "gain": 0.5, "lr": 0.01}
    row = Row("sign_adam_pp-steered", SignAdamPP, steered, sign_adam_pp)
    for decoupled in (True, False):
        options = {"weight_decay": 0.1, "decoupled_weight_decay": decoupled, "maximize": True}
        form = Combination(("fp32",), "nearest", torch.float32)
        assert_parity(row, form, [(33, 0, 0), (16384, 0, 0)], device, steps=3, **options)
