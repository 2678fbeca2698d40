"""Hyperparameters are checked where they are read: at every step, whoever has put them into a group."""

from __future__ import annotations

import gc
import inspect
import io
import weakref

import numpy as np
import pytest
import torch
from support.optimizer_contract import (
    assert_same,
    assert_unchanged,
    copies,
    each_backend,
    each_row,
    gradient,
    make,
    parameters,
    params_of,
    snapshot,
    train,
)
from torch.optim import lr_scheduler

import signadam_ext
from signadam_ext import SVAG, Adam, AdamStar, AdamW, Lion, SignAdam, SignAdamPP, SignSGD, Signum, functional
from signadam_ext.backends.reference import rules
from signadam_ext.core.hyperparameters import Hyperparameters
from signadam_ext.optimizers.schedule_free import ScheduleFree

INF, NAN = float("inf"), float("nan")
CLASSES = [
    found
    for name in signadam_ext.__all__
    if isinstance(found := getattr(signadam_ext, name), type) and issubclass(found, torch.optim.Optimizer)
]

# --- nonsense between steps


def soft(g, alpha):
    return g / (1 + g.abs())


EVERYWHERE = [
    ("lr", (NAN, INF, -0.1, -1e-3, -1e-5, "0.1", None, True, 1j, [0.1], torch.tensor([0.1, 0.2]), torch.tensor(NAN))),
    ("lr", (torch.tensor(True), torch.empty((), device="meta"), np.float32("nan"), np.array([0.1]), 10**400)),
    ("weight_decay", (-1.0, NAN, INF, "x", None, False, torch.tensor(-1.0), np.float64(-1))),
    ("decoupled_weight_decay", (1, None, "yes", torch.tensor(True))),
    ("maximize", (0, None, "no")),
    ("param_storage", ("as-is", None, 0, ["nearest"])),
    ("backend", ("cdua", None, ["cpu"])),
    ("seed", (-1, 1 << 64, 0.5, None, "0", True, torch.tensor(0.0))),
]
DTYPES = [("state_dtype", ("fp23", None, 8, ("fp32",) * 7, ["fp32"] * 7))]
BETA = [
    ("betas", ((2.0,), (NAN,), (1.0,), (-0.1,), (0.9, 0.9), (), 0.9, None, ("0.9",), (True,), (torch.tensor(2.0),)))
]
TWO = [
    ("betas", ((0.9,), (0.9, 0.9, 0.9), (0.9, 2.0), (NAN, 0.9), 0.9, None, (0.9, None), [0.9, 1.0])),
    ("eps", (-1e-8, NAN, INF, None, "x", True, torch.tensor(-1.0))),
]
ALPHA = (-1.0, NAN, INF, "a", True, torch.tensor(NAN))
OWN = {
    SignSGD: [("alpha", (*ALPHA, None))],
    Signum: [*BETA, *DTYPES],
    SignAdam: [*TWO, *DTYPES, ("second_moment", ("exakt", None, 2, ["exact"]))],
    SignAdamPP: [
        *BETA,
        *DTYPES,
        ("alpha", ALPHA),
        ("confidence", ("adaptve", None, ["fixed"], 1, "sparsity")),
        ("confidence_beta", (1.0, NAN, -0.5, None, "x", True)),
        ("target", (0.0, 1.0, NAN, 2, "x", True)),
        ("gain", (0.0, 1.5, NAN, None, "x")),
    ],
    AdamW: [*TWO, *DTYPES, ("amsgrad", (1, None, "x"))],
    Lion: [TWO[0], *DTYPES],
    SVAG: [*BETA, *DTYPES, ("bias_correct_variance", (1, None, "x"))],
    AdamStar: [*BETA, ("variance", ("emma", None)), ("momentum", (1, None)), ("bias_correct_variance", (0,))],
}
NONSENSE = [(cls, name, value) for cls, own in OWN.items() for name, values in [*EVERYWHERE, *own] for value in values]
NONSENSE += [(cls, name, "missing") for cls in OWN for name in ("lr", "weight_decay", "maximize", "seed", "backend")]
NONSENSE += [(cls, "betas", "missing") for cls in OWN if cls is not SignSGD]


@pytest.mark.parametrize("cls, name, value", NONSENSE, ids=[f"{c.__name__}-{n}-{v!r:.40}" for c, n, v in NONSENSE])
def test_nonsense_in_a_group_is_refused(cls, name, value):
    """After a step and before the first; what is refused names it and its group, and nothing has moved."""
    for steps in (0, 2):
        optimizer = cls([{"params": [param]} for param in parameters()], lr=0.1)
        train(optimizer, range(steps))
        right = optimizer.param_groups[1].pop(name)
        for index, param in enumerate(params_of(optimizer)):
            param.grad = gradient(param, 5, index)
        before = snapshot(optimizer)
        if value != "missing":
            optimizer.param_groups[1][name] = value
        word = {"sparsity": "target", "betas": "beta"}.get(value if isinstance(value, str) else name, name)
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match=f"^group 1: .*{word}"):
                optimizer.step()
        assert_unchanged(optimizer, before)
        optimizer.param_groups[1][name] = right
        optimizer.step()


@each_row
@each_backend
def test_nonsense_is_refused_on_every_backend_and_under_release(row, backend):
    optimizer = make(row, parameters((3,)), backend)
    train(optimizer, range(2))
    (param,) = params_of(optimizer)
    optimizer.zero_grad()
    before = snapshot(optimizer)
    optimizer.param_groups[0]["weight_decay"] = -1.0
    with signadam_ext.release_gradients([param], optimizer), pytest.raises(ValueError, match=r"weight_decay=-1\.0"):
        (param * param).sum().backward()
    param.grad = None
    assert_unchanged(optimizer, before)


def test_a_tensor_that_changes_in_place_is_seen():
    """As is a list. Nothing else of the group tells."""
    lr, beta, betas = torch.tensor(0.5), torch.tensor(0.5), [0.9, 0.99]
    one = Signum(parameters((3,)), lr=lr, beta=beta)
    two = AdamW(parameters((3,)))
    two.param_groups[0]["betas"] = betas
    for optimizer in (one, two):
        train(optimizer, range(2))
    before = [snapshot(optimizer) for optimizer in (one, two)]
    lr.fill_(NAN)
    with pytest.raises(ValueError, match="group 0: lr=nan"):
        one.step()
    lr.fill_(0.5)
    beta.fill_(1.5)
    with pytest.raises(ValueError, match=r"group 0: beta=1\.5"):
        one.step()
    betas[1] = 1.5
    with pytest.raises(ValueError, match=r"group 0: betas\[1\]=1.5"):
        two.step()
    assert_unchanged(one, before[0])
    assert_unchanged(two, before[1])


def test_equal_is_not_the_same():
    """1 equals True and 0 equals False, but neither is the other."""
    optimizer = Signum(parameters((3,)))
    train(optimizer, [0])
    for name, value in (("decoupled_weight_decay", 1), ("maximize", 0), ("weight_decay", False)):
        right = optimizer.param_groups[0][name]
        assert right == value
        optimizer.param_groups[0][name] = value
        with pytest.raises(TypeError, match=f"group 0: {name}={value!r}"):
            optimizer.step()
        optimizer.param_groups[0][name] = right


def test_beta_in_a_group_of_two():
    optimizer = AdamW(parameters((3,)))
    train(optimizer, [0])
    optimizer.param_groups[0]["beta"] = 0.5
    with pytest.raises(TypeError, match=r"group 0: beta=0.5: this rule has two, betas="):
        optimizer.step()


def test_only_what_changed_is_checked():
    checked = []
    optimizer = SignAdamPP(parameters((3,)), lr=0.1)
    reader = Hyperparameters(SignAdamPP)
    reader._checks = tuple(
        (name, lambda name, value, check=check: checked.append(name) or check(name, value))
        for name, check in reader._checks
    )
    (group,) = optimizer.param_groups
    assert reader.read(0, group, optimizer.defaults) is group
    assert set(checked) == group.keys() - {"params", "lr", "method"}
    checked.clear()
    for lr in (0.2, 0.3, 1):
        group["lr"] = lr
        assert reader.read(0, group, optimizer.defaults) is group
    assert checked == []
    group["betas"] = (0.5,)
    assert reader.read(0, group, optimizer.defaults) is group
    assert checked == ["betas"]
    # A tensor is read each time, and what is returned has its number in its place.
    group["alpha"] = torch.tensor(0.25)
    for _ in range(2):
        found = reader.read(0, group, optimizer.defaults)
        assert found is not group and found["alpha"] == 0.25 and isinstance(found["alpha"], float)
        assert isinstance(group["alpha"], torch.Tensor)
    assert checked == ["betas", "alpha", "alpha"]


def test_tensors_of_a_group_are_not_kept_alive():
    optimizer = Signum(parameters((3,)))
    optimizer.param_groups[0]["weight_decay"] = torch.tensor(0.5)
    train(optimizer, range(2))
    alive = weakref.ref(optimizer.param_groups[0]["weight_decay"])
    optimizer.param_groups[0]["weight_decay"] = 0.5
    gc.collect()
    assert alive() is None


# --- learning rates that rounding has left below zero


@each_row
@each_backend
def test_roundings_below_zero(row, backend):
    optimizer = make(row, parameters(), backend)
    train(optimizer, [0])
    for lr in (-1e-17, -9e-7, torch.tensor(-1e-9), np.float64(-1e-7)):
        optimizer.param_groups[0]["lr"] = lr
        train(optimizer, [1])
    before = snapshot(optimizer)
    optimizer.param_groups[0]["lr"] = -1.1e-6  # the optimizer was made with 0.1
    with pytest.raises(ValueError, match=r"group 0: lr=-1\.1e-06: must be finite and at least 0"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    optimizer.param_groups[0]["initial_lr"] = 1.0
    optimizer.step()


def test_roundings_are_the_schedulers():
    """A constructor has no scheduler behind it; a learning rate of 0 at first still may be left at a rounding."""
    with pytest.raises(ValueError, match="lr=-1e-17"):
        Signum(parameters(), lr=-1e-17)
    optimizer = Signum(parameters(), lr=0.0)
    with pytest.raises(ValueError, match="group 1: lr=-1e-17"):
        optimizer.add_param_group({"params": parameters((2,)), "lr": -1e-17})
    optimizer.param_groups[0]["lr"] = -1e-13
    train(optimizer, [0])
    optimizer.param_groups[0]["lr"] = -1e-11
    with pytest.raises(ValueError, match="lr=-1e-11"):
        optimizer.step()


def test_a_cosine_to_the_end_and_beyond():
    optimizer = Signum(parameters(), lr=torch.tensor(0.1))
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 7)
    for step in range(20):
        train(optimizer, [step])
        scheduler.step()


# --- numbers that are not Python's

NUMBERS = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "longdouble": np.longdouble,
    "0-dim array": np.array,
    "tensor": torch.tensor,
    "double tensor": lambda x: torch.tensor(x, dtype=torch.float64),
    "one element": lambda x: torch.tensor([x]),
    "trained": lambda x: torch.tensor(x, requires_grad=True),
}
#: Exact in half precision.
VALUES = {
    "lr": 0.125,
    "weight_decay": 0.25,
    "alpha": 0.5,
    "beta": 0.75,
    "betas": (0.5, 0.75),
    "eps": 0.125,
    "confidence_beta": 0.5,
}


def converted(names, number):
    values = {name: VALUES[name] for name in names}
    return {n: tuple(map(number, v)) if isinstance(v, tuple) else number(v) for n, v in values.items()}


@each_row
@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS.keys())
def test_numbers_of_any_kind(row, number):
    """In the constructor, in a group, and between steps; the checkpoint loads with nothing but plain types."""
    names = [name for name in VALUES if name in {"lr", "weight_decay", *row.hyperparameters}]
    plain, other = converted(names, float), converted(names, number)
    params = parameters()
    expected = make(row, copies(params), **plain)
    by_argument = make(row, copies(params), **other)
    by_group = make(row, [{"params": copies(params), **other}])
    between = make(row, copies(params))
    for name, value in other.items():
        between.param_groups[0][name] = value
    for optimizer in (by_argument, by_group, between):
        train(optimizer, range(2))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        twin = make(row, copies(params_of(optimizer)))
        twin.load_state_dict(torch.load(file, weights_only=True))
        train(twin, range(2, 4))
        train(optimizer, range(2, 4))
        assert_same(twin, optimizer)
        assert not any(isinstance(value, np.generic) for value in optimizer.state_dict()["param_groups"][0].values())
    for optimizer in (by_argument, by_group):
        kept = optimizer.param_groups[0]["lr"]
        assert type(kept) is (torch.Tensor if isinstance(other["lr"], torch.Tensor) else float)
    train(expected, range(4))
    for optimizer in (by_argument, by_group, between):
        assert_same(optimizer, expected)


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS.keys())
def test_numbers_of_any_kind_for_the_functions(number):
    def run(**values):
        p, m, v = torch.ones(4), torch.zeros(4), torch.zeros(4)
        functional.signum([p], [torch.ones(4)], [m], lr=values["lr"], beta=values["beta"])
        hyperparameters = {name: values[name] for name in ("lr", "betas", "eps", "weight_decay")}
        functional.adam([p], [torch.ones(4)], [m], [v], [torch.zeros(())], **hyperparameters)
        functional.sign_sgd([p], [torch.ones(4)], lr=values["lr"], alpha=values["alpha"])
        return p

    assert torch.equal(run(**converted(VALUES, number)), run(**converted(VALUES, float)))


def test_integers_of_any_kind():
    for value in (np.int64(7), np.uint8(7), torch.tensor(7), np.array(7)):
        optimizer, expected = (
            SignAdamPP(parameters(), state_dtype="int8", lr=0.125, seed=seed, beta=0.5, weight_decay=decay)
            for seed, decay in ((value, value), (7, 7))
        )
        train(optimizer, range(3))
        train(expected, range(3))
        assert_same(optimizer, expected)
    group = Signum(parameters(), lr=np.int64(1), seed=np.int64(3), maximize=np.bool_(True)).param_groups[0]
    assert [type(group[name]) for name in ("lr", "seed", "maximize")] == [int, int, bool]


# --- arguments that ask for nothing

ADAMS = [(Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)]


@pytest.mark.parametrize("cls, twin", ADAMS)
def test_positions_are_those_of_torch(cls, twin):
    positional = [
        [p for p in inspect.signature(c).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD] for c in (cls, twin)
    ]
    ours, theirs = ([(p.name, p.default) for p in params] for params in positional)
    assert ours == theirs
    assert set(inspect.signature(twin).parameters) <= set(inspect.signature(cls).parameters)
    params = parameters()
    optimizer, expected = (
        cls(params, 0.1, (0.5, 0.75), 1e-3, 0.25, True),
        cls(copies(params), lr=0.1, betas=(0.5, 0.75), eps=1e-3, weight_decay=0.25, amsgrad=True),
    )
    assert {**optimizer.defaults} == {**expected.defaults}
    train(optimizer, range(2))
    train(expected, range(2))
    assert_same(optimizer, expected)
    with pytest.raises(TypeError, match="positional"):
        cls(params, 0.1, (0.5, 0.75), 1e-3, 0.25, True, True)


@pytest.mark.parametrize("cls, twin", ADAMS)
def test_groups_of_torch(cls, twin):
    """Which hold its options as well."""
    (group,) = twin(parameters()).param_groups
    optimizer = cls([group])
    assert optimizer.param_groups[0]["weight_decay"] == group["weight_decay"]
    train(optimizer, [0])


@pytest.mark.parametrize("cls", CLASSES)
def test_options_that_ask_for_nothing(cls):
    for foreach in (None, False, True):
        for fused in (None, False, True):
            # The groups of Schedule-Free keep sums that the host must count.
            capturable = None if issubclass(cls, ScheduleFree) else foreach
            optimizer = cls(parameters(), foreach=foreach, fused=fused, capturable=capturable, differentiable=False)
            assert not {"foreach", "fused", "capturable"} & optimizer.param_groups[0].keys()
    for wrong in ({"differentiable": True}, {"foreach": "yes"}, {"fused": 1}, {"capturable": 0}):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"{name}={value!r}: must be None"):
            cls(parameters(), **wrong)
        with pytest.raises(ValueError, match=f"group 0: {name}={value!r}: must be None"):
            cls([{"params": parameters(), **wrong}])
    with pytest.raises(ValueError, match=r"differentiable=True: must be None or False; the update is not recorded"):
        cls(parameters(), differentiable=True)


def test_options_that_ask_nothing_of_a_function():
    p = torch.ones(3)
    options = {"foreach": True, "fused": None, "capturable": True, "differentiable": False}
    functional.sign_sgd([p], [torch.ones(3)], lr=0.5, **options)
    assert p.tolist() == [0.5] * 3
    with pytest.raises(ValueError, match="differentiable=True"):
        functional.sign_sgd([p], [torch.ones(3)], lr=0.5, differentiable=True)


def _without_betas(arguments):
    return r"this rule has one, beta2=\.\.\." if "beta2" in arguments else "this rule has none"


@pytest.mark.parametrize("cls", CLASSES)
def test_beta_and_betas(cls):
    """Whoever gives the one to a rule that has the other is told which, before anything is made of it."""
    arguments = inspect.signature(cls).parameters
    wrong = {"beta": 0.9, "betas": (0.9, 0.99)}
    rights = [name for name in wrong if name in arguments]
    message = f"this rule has .*{rights[0]}=" if rights else _without_betas(arguments)
    for name in wrong.keys() - set(rights):
        with pytest.raises(TypeError, match=message):
            cls(parameters(), **{name: wrong[name]})
        if not rights and name == "betas":
            continue  # which schedulers write there
        optimizer = cls(parameters((2,)))
        with pytest.raises(TypeError, match=f"group 1: {name}=.*{message}"):
            optimizer.add_param_group({"params": parameters((3,)), name: wrong[name]})
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", [name for name in functional.__all__ if name.islower()])
def test_beta_and_betas_of_functions(name):
    function = getattr(functional, name)
    rights = [beta for beta in ("beta", "betas") if beta in inspect.signature(function).parameters]
    arguments = inspect.signature(function).parameters
    message = f"this rule has .*{rights[0]}=" if rights else _without_betas(arguments)
    parameters = list(inspect.signature(function).parameters.values())[2:]
    lists: dict[str, object] = {each.name: [] for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD}
    if "averaging" in inspect.signature(function).parameters:
        lists["averaging"] = 1.0
    for wrong in {"beta", "betas"} - set(rights):
        with pytest.raises(TypeError, match=message):
            function([], [], lr=0.1, **lists, **{wrong: 0.9})


def test_a_groups_betas_may_be_given_to_another():
    """As schedulers and copies of groups have them."""
    optimizer = Signum(parameters((2,)), beta=0.5)
    optimizer.add_param_group({**optimizer.param_groups[0], "params": parameters((3,))})
    assert optimizer.param_groups[1]["betas"] == (0.5,)


# --- defaults of torch that are not the package's


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_reference_names_device_and_dtype(dtype):
    """Whatever torch takes by default, the reference computes the same."""
    cases = [
        ("sign_sgd", 0),
        ("sign_adam", 2),
        ("svag", 2),
        ("adam_star_minibatch", 3),
        ("adam_amsgrad", 3),
        ("lion", 1),
    ]
    scalars = dict.fromkeys(signadam_ext._C.SCALARS, 0.5)

    def run():
        found = []
        for name, count in cases:
            for threshold_pass, steers in (("NONE", 0.0), ("SAME_PASS", 0.0), ("SAME_PASS", 1.0), ("PASS_BEFORE", 0.0)):
                p, g, *moments = (x.clone() for x in given[: 2 + count])
                threshold_state = None if threshold_pass == "NONE" else deviation.clone()
                own = {**scalars, "steers": steers, "coupled": 1.0}
                g = rules.effective_gradient(own, p, g)
                p, moments, alpha, threshold_state = rules.update(
                    getattr(rules, name), threshold_pass, own, p, g, tuple(moments), threshold_state
                )
                found += [p, *moments, alpha, *([] if threshold_state is None else [threshold_state])]
        own = {name: value for name, value in scalars.items() if name != "alpha"}
        p, _, alpha, _ = rules.update(rules.lion, "NONE", own, *given[:2], (given[2],), None)
        return [*found, p, alpha]

    given = [torch.randn(5, generator=torch.Generator().manual_seed(k)).abs() for k in range(5)]
    deviation = torch.full((), 0.5, dtype=torch.float64)
    expected = run()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = run()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, expected, strict=True):
        assert a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
