"""Steps that begin on the device, by the Triton kernels: the same bits as of what the host makes for other steps.

Interpreted in a process of its own; on a GPU; and the PTX of the kernels executed by the emulator of tests/support/ptx.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.interpreted import INTERPRETED, run_interpreted
from support.launches import CASES, SPECIALS, Case, Compiled, Step, TritonLaunch, compile_launches, same_bits
from support.paper_formulas import TABLE
from support.ptx import Fault
from support.ptx.steps import Emulated
from support.toolchain import TRITON_STEP_ARGUMENTS, TRITON_TENSORS
from torch import Tensor

from signadam_ext import _C, SignSGD
from signadam_ext.backends import Bucket
from signadam_ext.backends.triton import STEP_OPTIONS, DeviceStep
from signadam_ext.core.formats import DTYPE_FORMATS
from signadam_ext.core.program import pack_operations, pack_rows, program_of
from signadam_ext.core.random_bits import tensor_keys
from signadam_ext.core.rule import Group, Rule, rule_of
from signadam_ext.engine.plan import Plan
from signadam_ext.optimizers.stepping import make_item

pytest.importorskip("triton")

GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = 2**63 + 7
#: Whole steps: of one moment and two, with random bits and without, with formulas that take a power of a decay, with a
#: threshold that each step's gradient moves.
WHOLE = ("adam-bf16-stochastic-bf16", "sign_adam_pp-bf16-stochastic-int2", "sign_adam_pp-adaptive-fp32")
#: Whose kernels are compiled and emulated.
EMULATED = WHOLE[:1]


def test_interpreted() -> None:
    run_interpreted(__file__)


@dataclass
class Way:
    """How kernels are executed.

    Attributes:
        device: where tensors lie.
        backend: one that takes them, and makes what launches begin with.
        reached: where kernels are emulated, what addresses in their arguments lead to, by kernel and name, and whether
            it may be written.
    """

    device: str
    backend: str
    reached: dict[str, dict[str, tuple[Tensor, bool]]] = field(
        default_factory=lambda: {"norm": {}, "begin": {}, "update": {}}
    )

    def tensor(self, *given: Any, **dtype: Any) -> Tensor:
        return torch.tensor(*given, **dtype, device=self.device)


HOST = Way("cpu", "cpu")


@pytest.fixture(scope="module")
def compiled(built_once: Callable[..., Path]) -> dict[str, Compiled]:
    """The kernels that are emulated, compiled at once."""
    launches = [launch for name in EMULATED for launch in Step(CASES[name]).triton()]
    launches += [TritonLaunch({"GRAD": DTYPE_FORMATS[dtype]}, {}, 0, (), "norm") for dtype in GRAD_DTYPES]
    launches += [TritonLaunch({}, {}, 0, (), "begin")]
    return compile_launches(launches, "sm_90", built_once("triton-device-step", lambda folder: None))


WAYS = [
    pytest.param("emulated", marks=pytest.mark.thorough),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=["interpreted"] if INTERPRETED else WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    found = Way("cuda", "triton") if request.param == "cuda" else Way("cpu", "cpu")
    if request.param != "emulated":
        yield found
        return
    from signadam_ext.triton_kernels import begin, norm, update

    machine_code = request.getfixturevalue("compiled")

    def emulated(kernel: Any, name: str, arguments: Sequence[str]) -> Any:
        return mock.patch.object(kernel, name, Emulated(getattr(kernel, name), arguments, machine_code, of(name)))

    def of(name: str) -> Callable[[], Mapping[str, tuple[Tensor, bool]]]:
        return lambda: found.reached[name]

    with (
        emulated(norm, "norm", list(TRITON_STEP_ARGUMENTS["norm"])),
        emulated(begin, "begin", list(TRITON_STEP_ARGUMENTS["begin"])),
        emulated(update, "update", list(TRITON_TENSORS)),
    ):
        yield found


def placed(x: Tensor, dtype: torch.dtype, offset: int, way: Way) -> Tensor:
    """A copy whose first element lies ``offset`` elements behind a 16-byte boundary."""
    room = torch.empty(x.numel() + offset + 16, dtype=dtype, device=way.device)
    skipped = -room.data_ptr() % 16 // room.element_size() + offset
    return room[skipped : skipped + x.numel()].copy_(x)


def drawn(size: int, generator: torch.Generator, specials: bool = False) -> Tensor:
    """Normal numbers, every 7th of which may be a special one."""
    x = torch.randn(size, generator=generator)
    if specials:
        which = torch.randint(len(SPECIALS), (len(x[5::7]),), generator=generator)
        x[5::7] = torch.tensor(SPECIALS)[which]
    return x


def addresses(grads: Sequence[Tensor | None], way: Way) -> Tensor:
    """Of those that there are; one without elements has none, but takes part."""
    return way.tensor([0 if g is None else g.data_ptr() or 16 for g in grads], dtype=torch.int64)


def bucket_of(optimizer: Any) -> Bucket:
    """What a backend is handed of an optimizer whose parameters have gradients and are stored alike."""
    grouped = [(index, group, param) for index, group in enumerate(optimizer.param_groups) for param in group["params"]]
    items = [
        make_item(optimizer, str(param_id), param, group, index, param_id)
        for param_id, (index, group, param) in enumerate(grouped)
    ]
    plan = Plan(items, state=optimizer.state)
    return Bucket(items[0].rule, plan.entries[0].param.device, plan.entries, observes=False)


def squares(bucket: Bucket, grads: Sequence[Tensor | None]) -> list[float]:
    """The sums of squares of the CPU kernels."""
    on_cpu = [None if grad is None else grad.cpu() for grad in grads]
    bucket.table.begin(addresses(on_cpu, HOST).tolist())
    found: list[float] = bucket.table.squares(threads=1)
    return found


#: Elements, and how many lie between a 16-byte boundary and the gradient's first.
SIZES = ((16384, 0), (16384, 1), (33, 0), (0, 0), (1, 3), (40001, 0), (2049, 7))
#: Which of them has no gradient.
ABSENT = 2


@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
def test_norm(dtype: torch.dtype, way: Way) -> None:
    """Twice, for what one launch leaves to the next."""
    generator = torch.Generator().manual_seed(1)
    params = [torch.zeros(size, device=way.device, dtype=dtype) for size, _ in SIZES]
    for param in params:
        param.grad = torch.zeros_like(param)
    bucket = bucket_of(SignSGD(params, lr=0.1, backend=way.backend))
    kernels = DeviceStep(bucket)
    places = way.tensor([9, 0, 4, 1, 3, 7, 6], dtype=torch.int32)
    for specials in (False, True):
        grads: list[Tensor | None] = [
            placed(drawn(size, generator, specials and size % 2 == 1), dtype, offset, way) for size, offset in SIZES
        ]
        grads[ABSENT] = None
        way.reached["norm"] = {f"{i}.grad": (g, False) for i, g in enumerate(grads) if g is not None}
        totals = torch.zeros(10, dtype=torch.float64, device=way.device)
        kernels.norm(addresses(grads, way), totals, places)
        expected = torch.zeros(10, dtype=torch.float64)
        expected[places.long().cpu()] = torch.tensor(squares(bucket, grads), dtype=torch.float64)
        assert same_bits(totals.cpu(), expected)
        assert expected.isfinite().all() != specials


@pytest.mark.thorough
@pytest.mark.skipif(INTERPRETED, reason="it looks at machine code")
def test_relaxed_count_is_found(compiled: dict[str, Compiled], tmp_path: Path) -> None:
    from signadam_ext.triton_kernels import norm

    relaxed = {}
    for kernel, code in compiled.items():
        path = tmp_path / f"{len(relaxed)}.cubin"
        text = code.cubin.with_suffix(".ptx").read_text()
        path.with_suffix(".ptx").write_text(text.replace("acq_rel", "relaxed"))
        relaxed[kernel] = replace(code, cubin=path)
    param = torch.zeros(16385)
    param.grad = torch.ones_like(param)
    kernels = DeviceStep(bucket_of(SignSGD([param], lr=0.1, backend="cpu")))
    names = list(TRITON_STEP_ARGUMENTS["norm"])
    reached = {"grad": (param.grad, False)}
    with (
        mock.patch.object(norm, "norm", Emulated(norm.norm, names, relaxed, lambda: reached)),
        pytest.raises(Fault, match="a race at byte"),
    ):
        kernels.norm(
            addresses([param.grad], HOST), torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
        )


def groups() -> Iterator[tuple[Rule, Group]]:
    """Every rule in two groups, those whose formulas are alike but for their numbers, too; and moments in few bits."""
    changes: tuple[dict[str, Any], ...] = (
        {"lr": 0.013, "weight_decay": 0.1},
        {"lr": 0.1, "weight_decay": 0.37, "decoupled_weight_decay": False, "maximize": True},
        {"lr": 1e-3, "weight_decay": 0.0},
    )
    for i, row in enumerate(TABLE):
        optimizer = row.optimizer([torch.zeros(1)], **row.hyperparameters)
        group = optimizer.param_groups[0]
        few_bits = [{"lr": 0.3, "state_dtype": "int4"}] if "int4" in row.state_dtypes else []
        for changed in (changes[i % 3], changes[(i + 1) % 3], *few_bits):
            yield rule_of(type(optimizer), group), {**group, **changed}


#: Steps taken before.
COUNTS = (0, 1, 2, 1000, 2**24 + 1, 2**40 + 5)
POISON = 0x5A5A5A5A


def as_signed(seed: int) -> int:
    """Its bits as an int64."""
    return seed - 2**64 if seed >= 2**63 else seed


@dataclass
class Programs:
    """What tensors' scalars and random bits are made of, on a device: the arguments of ``begin`` that stay.

    Args:
        rules: the rule and the group of each tensor.
        counts: of steps, of each tensor.
        ids: the seed and the number of each tensor's random bits.
    """

    rules: Sequence[tuple[Rule, Group]]
    counts: Sequence[Tensor]
    ids: Sequence[tuple[int, int]]
    way: Way

    def __post_init__(self) -> None:
        self._programs = [program_of(rule, group) for rule, group in self.rules]
        distinct = list(dict.fromkeys(self._programs))
        self.operations, self.results = (x.to(self.way.device) for x in pack_operations(distinct))
        entries = [
            [count.data_ptr(), as_signed(seed), param_id, distinct.index(program), row]
            for row, (count, (seed, param_id), program) in enumerate(
                zip(self.counts, self.ids, self._programs, strict=True)
            )
        ]
        self.entries = self.way.tensor(entries, dtype=torch.int64)

    def values(self) -> Tensor:
        """Of the groups as they are now, a row for each tensor."""
        return pack_rows(self._programs, [group for _, group in self.rules]).to(self.way.device)


@pytest.mark.parametrize("skipped", [False, True])
def test_begin(skipped: bool, way: Way) -> None:
    """Every third tensor takes no part."""
    from signadam_ext.triton_kernels import begin

    rules, factor = list(groups()), 0.3
    tensors = len(rules)
    before = [float(COUNTS[i % len(COUNTS)]) for i in range(tensors)]
    counts = way.tensor(before, dtype=torch.float64)
    ids = [((SEED, 5, 2**32)[i % 3], 1000 * i) for i in range(tensors)]
    programs = Programs(rules, list(counts), ids, way)
    grads = way.tensor([0 if i % 3 == 2 else 16 * (i + 1) for i in range(tensors)], dtype=torch.int64)
    out_grads = torch.full((tensors,), POISON, dtype=torch.int64, device=way.device)
    out_rng_keys = torch.full((tensors, 2), POISON, dtype=torch.int32, device=way.device)
    out_scalars = torch.full((tensors, len(_C.SCALARS)), POISON, dtype=torch.float64, device=way.device)
    way.reached["begin"] = {"counts": (counts, True)}
    begin.begin[(tensors,)](
        programs.entries,
        programs.operations,
        programs.results,
        programs.values(),
        way.tensor([factor, float(skipped)], dtype=torch.float64),
        grads,
        out_grads,
        out_rng_keys,
        out_scalars,
        programs.operations.shape[1],
        programs.values().shape[1],
        **STEP_OPTIONS["begin"],
    )
    for i, (rule, group) in enumerate(rules):
        takes_part = i % 3 != 2 and not skipped
        keys, scalars = [POISON, POISON], dict.fromkeys(_C.SCALARS, float(POISON))
        if takes_part:
            t = int(before[i]) + 1
            keys = [key - 2**32 if key >= 2**31 else key for key in tensor_keys(*ids[i], t)]
            scalars = {**dict.fromkeys(_C.SCALARS, 0.0), **rule.scalar_set(group, t, factor)}
        assert counts[i].item() == before[i] + takes_part
        assert out_grads[i].item() == (grads[i].item() if takes_part else 0)
        assert out_rng_keys[i].tolist() == keys
        expected = torch.tensor(list(scalars.values()), dtype=torch.float64)
        assert same_bits(out_scalars[i].cpu(), expected), (rule.name, group)


#: Elements of the parameters of whole steps, and how many lie between a 16-byte boundary and their first.
PLACED = ((16384, 0), (33, 1), (0, 0), (2049, 0))
LRS = (0.01, 0.003, 0.02, 0.02, 0.007)
#: Of the numbered steps one is skipped, for a gradient that is not finite; in one a parameter has no gradient.
SKIPPED, ABSENT_IN = 2, 3


@pytest.mark.parametrize("case", [pytest.param(CASES[name], id=name) for name in (WHOLE if INTERPRETED else EMULATED)])
def test_whole_steps(case: Case, way: Way) -> None:
    """Norm, begin and update, with another learning rate at each step: what eager steps leave."""
    generator = torch.Generator().manual_seed(2)
    initial = [drawn(size, generator) for size, _ in PLACED]

    def optimizer_of(way: Way) -> Any:
        params = [placed(x, case.dtype, offset, way) for x, (_, offset) in zip(initial, PLACED, strict=True)]
        given = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.03, "maximize": True}]
        return case.optimizer(given, backend=way.backend, seed=SEED, **case.hyperparameters)

    eager, ours = optimizer_of(HOST), optimizer_of(way)
    theirs, own = (all_params(optimizer) for optimizer in (eager, ours))
    kernels = bucket = None
    for number, lr in enumerate(LRS):
        grads: list[Tensor | None] = [drawn(size, generator) for size, _ in PLACED]
        if number == SKIPPED:
            assert grads[0] is not None
            grads[0][77] = torch.inf
        elif number == ABSENT_IN:
            grads[1] = None
        for i, grad in enumerate(grads):
            for params, its_way in ((theirs, HOST), (own, way)):
                params[i].grad = None if grad is None else placed(grad, case.dtype, (number + i) % 2, its_way)
        for optimizer in (eager, ours):
            for group in optimizer.param_groups:
                group["lr"] = lr
        if number != SKIPPED:
            eager.step()
        if number == 0:
            ours.step()  # which makes the state
            continue
        if kernels is None or bucket is None:
            bucket = bucket_of(ours)
            kernels = DeviceStep(bucket)
            counts = [ours.state[param]["step"].to(way.device).clone() for param in own]
            rules = [(bucket.rule, ours.param_groups[entry.group]) for entry in bucket.entries]
            programs = Programs(rules, counts, [(entry.seed, entry.param_id) for entry in bucket.entries], way)
            way.reached["begin"] = {f"{i}.count": (count, True) for i, count in enumerate(counts)}
        reached = {f"{i}.grad": (param.grad, False) for i, param in enumerate(own) if param.grad is not None}
        way.reached["norm"] = reached
        way.reached["update"] = {**reached, **{f"{name}": (x, True) for name, x in named_tensors(ours).items()}}
        addressed = addresses([param.grad for param in own], way)
        totals = torch.zeros(len(own), dtype=torch.float64, device=way.device)
        kernels.norm(addressed, totals, torch.arange(len(own), dtype=torch.int32, device=way.device))
        expected_totals = torch.tensor(squares(bucket, [param.grad for param in own]), dtype=torch.float64)
        assert same_bits(totals.cpu(), expected_totals)
        control = torch.stack([torch.ones_like(totals[0]), (~totals.sum().isfinite()).double()])
        kernels.begin(programs.entries, programs.operations, programs.results, programs.values(), control, addressed)
        kernels.update()
        expected = named_tensors(eager)
        for name, x in named_tensors(ours).items():
            assert same_bits(x.cpu(), expected[name]), (number, name)
        assert [count.item() for count in counts] == [eager.state[param]["step"].item() for param in theirs]


def all_params(optimizer: Any) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def named_tensors(optimizer: Any) -> dict[str, Tensor]:
    """Parameters and their state, but for step counts."""
    found = {}
    for i, param in enumerate(all_params(optimizer)):
        state = {name: x for name, x in optimizer.state[param].items() if isinstance(x, Tensor) and name != "step"}
        found |= {f"{i}.{name}": x for name, x in {"param": param, **state}.items()}
    return found
