"""Checkpoints between methods, frameworks and interruptions: what is taken, what is refused, and all at once."""

from __future__ import annotations

import copy
import functools
import signal
import warnings
import zipfile

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp_files
from support.paper_formulas import TABLE
from support.strategies import same_bits
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.utils._python_dispatch import TorchDispatchMode

import signadam_ext
from signadam_ext import MSGD, Adam, AdamW, LaProp, SignAdam, SignAdamPP, SignSGD, Signum
from signadam_ext.core.formats import BOUNDED
from signadam_ext.core.rule import rule_of
from signadam_ext.optimizers.base import SignOptimizer
from signadam_ext.state.checkpoint import MOMENTS


def made(cls, params, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* momentum with beta")
        return cls(params, **options)


def model_of(dtype):
    torch.manual_seed(0)
    return nn.ModuleDict({"first": nn.Linear(8, 5), "second": nn.Linear(5, 3), "never": nn.Linear(2, 2)}).to(dtype)


def train(model, optimizer, steps):
    """Two of three layers; the third has no gradient, ever."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for name in ("first", "second"):
            for p in model[name].parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()


# Distributed checkpoints


@functools.cache
def takes_parameters_without_state():
    """Whether this torch loads a checkpoint into its own optimizers where a parameter never had a gradient: not 2.6."""
    model = model_of(torch.float32)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, range(1))
    how = dcp.StateDictOptions(strict=False)
    saved = dcp.get_optimizer_state_dict(model, optimizer, options=how)
    try:
        dcp.set_optimizer_state_dict(model, torch.optim.Adam(model.parameters()), saved, options=how)
    except KeyError:
        return False
    return True


STORED = {
    **{f"pp-{sd}": (SignAdamPP, {"state_dtype": sd}, torch.float32) for sd in BOUNDED},
    "signum-int8": (Signum, {"state_dtype": "int8"}, torch.float32),
    "adamw-int8": (AdamW, {"state_dtype": "int8"}, torch.bfloat16),
    "adamw-fp32": (AdamW, {}, torch.float32),
    "sgd": (SignSGD, {}, torch.float32),
    **{
        f"pp-{param_storage}": (SignAdamPP, {"state_dtype": "int8", "param_storage": param_storage}, torch.bfloat16)
        for param_storage in ("split16", "split8", "master", "stochastic")
    },
    "adaptive": (SignAdamPP, {"confidence": "adaptive"}, torch.float32),
    "sparsity": (SignAdamPP, {"confidence": "sparsity", "target": 0.3, "state_dtype": "int4"}, torch.float32),
    "function": (SignAdamPP, {"confidence": lambda g, alpha: g.sign()}, torch.float32),
}


@pytest.mark.parametrize("cls, options, dtype", STORED.values(), ids=STORED.keys())
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("files", [False, True], ids=["in memory", "in files"])
def test_distributed_checkpoints_resume_with_the_same_bits(cls, options, dtype, flat, files, tmp_path):
    # Where it is strict, torch refuses a parameter that has no state, and does not look for one where it is flat.
    how = dcp.StateDictOptions(flatten_optimizer_state_dict=flat, strict=False)
    model = model_of(dtype)
    if not takes_parameters_without_state():
        del model["never"]
    optimizer = made(cls, model.parameters(), lr=0.01, seed=3, **options)
    train(model, optimizer, range(3))
    saved = dcp.get_optimizer_state_dict(model, optimizer, options=how)
    other = copy.deepcopy(model)
    resumed = made(cls, other.parameters(), lr=0.5, **options)
    if files:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp_files.save({"optimizer": saved}, checkpoint_id=tmp_path)
            there = {"optimizer": copy.deepcopy(saved)}
            for name, value in there["optimizer"].items() if flat else ():
                if isinstance(value, Tensor):
                    value.zero_()
                assert name in saved
            dcp_files.load(there, checkpoint_id=tmp_path)
        saved = there["optimizer"]
    dcp.set_optimizer_state_dict(other, resumed, saved, options=how)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state.get(p, {}).keys() == resumed.state.get(q, {}).keys()
    assert resumed.param_groups[0]["lr"] == 0.01 and resumed.param_groups[0]["seed"] == 3
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert same_bits(p, q)
        for name, value in optimizer.state.get(p, {}).items():
            mine = resumed.state[q][name]
            assert same_bits(value, mine) if isinstance(value, Tensor) else value == mine, name


def test_another_methods_distributed_checkpoint_is_refused():
    model = model_of(torch.float32)["first"]
    optimizer = Signum(model.parameters())
    model(torch.ones(8)).sum().backward()
    optimizer.step()
    saved = dcp.get_optimizer_state_dict(model, optimizer)
    with pytest.raises(ValueError, match="is of the method Signum: must be of MSGD"):
        dcp.set_optimizer_state_dict(model, MSGD(model.parameters()), saved)


# Methods


def stepped(cls, params=None, **options):
    params = params or [nn.Parameter(torch.ones(3, 4))]
    optimizer = cls(params, lr=0.1, **options)
    for p in params:
        p.grad = torch.linspace(-1, 1, p.numel()).view(p.shape)
    optimizer.step()
    return optimizer


CLASSES = [cls for cls in vars(signadam_ext).values() if isinstance(cls, type) and issubclass(cls, SignOptimizer)]


@pytest.mark.parametrize("source", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("target", CLASSES, ids=lambda cls: cls.__name__)
def test_each_method_takes_its_own_checkpoints_alone(source, target):
    saved = source([nn.Parameter(torch.ones(3))], lr=0.1).state_dict()
    other = target([nn.Parameter(torch.ones(3))], lr=0.2)
    if source is target or {source, target} == {Adam, AdamW}:
        other.load_state_dict(saved)
        assert other.param_groups[0]["lr"] == 0.1
        return
    ours, theirs = ("Adam" if cls is AdamW else cls.__name__ for cls in (target, source))
    with pytest.raises(ValueError, match=f"is of the method {theirs}: must be of {ours}"):
        other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.2


def test_a_subclass_is_of_its_rules_method():
    class Mine(Signum):
        pass

    saved = stepped(Mine).state_dict()
    assert saved["param_groups"][0]["method"] == "Signum"
    stepped(Signum).load_state_dict(saved)


TORCHS = {
    "SGD": (lambda p: torch.optim.SGD(p, momentum=0.9), Signum, "hyperparameter 'dampening'"),
    "SGD to MSGD": (lambda p: torch.optim.SGD(p, momentum=0.9), MSGD, "hyperparameter 'dampening'"),
    "Adam to Signum": (torch.optim.Adam, Signum, "hyperparameter 'amsgrad'"),
    "NAdam": (torch.optim.NAdam, Adam, "hyperparameter 'momentum_decay'"),
    "RMSprop": (torch.optim.RMSprop, SignSGD, "hyperparameter 'centered'"),
    "Adamax": (torch.optim.Adamax, Adam, "does not say that it is of the method Adam"),
    "RAdam": (torch.optim.RAdam, Adam, "does not say that it is of the method Adam"),
    "RAdam to LaProp": (torch.optim.RAdam, LaProp, "does not say that it is of the method LaProp"),
    "Rprop": (torch.optim.Rprop, SignSGD, "hyperparameter 'etas'"),
    "Adagrad": (torch.optim.Adagrad, Adam, "hyperparameter 'initial_accumulator_value'"),
}


@pytest.mark.parametrize("make, target, message", TORCHS.values(), ids=TORCHS.keys())
def test_other_methods_of_torch_are_refused(make, target, message):
    param = nn.Parameter(torch.ones(3, 4))
    theirs = make([param])
    param.grad = torch.ones(3, 4)
    theirs.step()
    ours = target([param])
    with pytest.raises(ValueError, match=message):
        ours.load_state_dict(theirs.state_dict())
    assert not ours.state


def test_groups_of_fused_adams_of_others_are_taken():
    """Apex's and DeepSpeed's FusedAdam have neither torch's names nor a method in their groups."""
    optimizer = stepped(AdamW)
    saved = copy.deepcopy(optimizer.state_dict())
    (group,) = saved["param_groups"]
    names = ("lr", "betas", "eps", "weight_decay", "params")
    saved["param_groups"] = [{"bias_correction": True, **{name: group[name] for name in names}}]
    other = stepped(AdamW)
    other.load_state_dict(saved)
    (state,) = other.state_dict()["state"].values()
    assert state.keys() == saved["state"][0].keys() and other.param_groups[0]["bias_correction"]
    assert all(torch.equal(value, saved["state"][0][name]) for name, value in state.items())


def test_what_is_no_hyperparameter_of_another_method_is_taken():
    optimizer = stepped(Signum)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, 10)
    optimizer.param_groups[0]["name"] = "mine"
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["method"]
    other = stepped(Signum)
    other.load_state_dict(saved)
    assert {"initial_lr", "max_lr", "max_momentum", "name"} <= other.param_groups[0].keys()


#: More than there is memory for, of one element in memory.
VAST = torch.ones(1, dtype=torch.float8_e5m2).expand(1 << 31)


@pytest.mark.parametrize("where", ["lr", "weight_decay", "betas", "maximize", "max_grad_norm", "step"])
def test_errors_show_no_more_of_a_tensor_than_its_shape(where):
    """Torch converts every element of an 8-bit tensor to show three."""
    optimizer = stepped(Signum)
    saved = copy.deepcopy(optimizer.state_dict())
    if where == "step":
        saved["state"][0]["step"] = VAST
    else:
        saved["param_groups"][0][where] = (VAST,) if where == "betas" else VAST
    with pytest.raises((TypeError, ValueError), match=r"a tensor of shape \(2147483648,\), torch.float8_e5m2"):
        optimizer.load_state_dict(saved)


def test_a_count_that_cannot_be_counted_on_is_refused():
    optimizer = stepped(Signum)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = torch.tensor(2.0**53, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"is 9007199254740992.0: must be the number of steps taken, a whole number"):
        optimizer.load_state_dict(saved)


def test_an_entry_without_a_name_is_a_users_own():
    saved = copy.deepcopy(stepped(Signum).state_dict())
    saved["state"][0][None] = torch.ones(2)
    other = stepped(Signum)
    other.load_state_dict(saved)
    assert torch.equal(other.state[other.param_groups[0]["params"][0]][None], torch.ones(2))


def test_notes_before_the_first_step_are_no_missing_moments():
    param = nn.Parameter(torch.ones(3))
    optimizer, other = Adam([param]), Adam([param])
    optimizer.state[param]["note"] = [1, {"of": torch.arange(3)}]
    other.load_state_dict(optimizer.state_dict())
    assert str(other.state[param]) == str({"note": [1, {"of": torch.arange(3)}]})
    assert other.state[param]["note"] is not optimizer.state[param]["note"]


# Groups


def gate(g, alpha):
    return g.sign()


class Gate:
    def __call__(self, g, alpha):
        return g.sign()


@pytest.mark.parametrize(
    "function, name",
    [(gate, f"{__name__}.gate"), (Gate(), f"{__name__}.Gate"), (functools.partial(gate), "functools.partial")],
)
def test_functions_are_named_and_never_restored(function, name, tmp_path):
    optimizer = stepped(SignAdamPP, confidence=function)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["confidence"] == name
    optimizer.save_state(tmp_path / "state")

    def mine(g, alpha):
        return g.sign()

    other, without = stepped(SignAdamPP, confidence=mine), stepped(SignAdamPP)
    for load, what in (("load_state_dict", saved), ("load_state", tmp_path / "state")):
        with pytest.warns(UserWarning, match=f"confidence of group 0 .* was '{name}': it is .*mine here, and stays so"):
            getattr(other, load)(what)
        assert other.param_groups[0]["confidence"] is mine
        with pytest.raises(ValueError, match=f"confidence='{name}' of group 0 of the checkpoint is a function"):
            getattr(without, load)(what)
        assert without.param_groups[0]["confidence"] == "fixed"


def halved(name, shape):
    return 0.5


@pytest.mark.parametrize(
    "saved, warns",
    [
        (f"{__name__}.halved", False),
        ("__main__.halved", False),  # the same program, run rather than imported
        ("__main__.doubled", True),
        (f"{__name__}.doubled", True),
        ("rms", True),
        (1.0, True),
    ],
)
def test_another_function_than_the_checkpoints_is_told(saved, warns):
    state = stepped(SignAdamPP, lr_scale=halved).state_dict()
    state["param_groups"][0]["lr_scale"] = saved
    other = stepped(SignAdamPP, lr_scale=halved)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        other.load_state_dict(state)
    text = f"lr_scale of group 0 of the checkpoint was {saved!r}: it is {__name__}.halved here, and stays so"
    assert [str(warning.message) for warning in told] == [text] * warns
    assert other.param_groups[0]["lr_scale"] is halved


def test_numpy_numbers_become_pythons(tmp_path):
    optimizer = stepped(Signum)
    optimizer.param_groups[0].update(lr=np.float64(0.25), betas=(np.float32(0.5),), mine=np.int64(3))
    saved = optimizer.state_dict()["param_groups"][0]
    assert [type(saved[name]) for name in ("lr", "mine")] == [float, int] and type(saved["betas"][0]) is float
    torch.save(optimizer.state_dict(), tmp_path / "dict")
    stepped(Signum).load_state_dict(torch.load(tmp_path / "dict", weights_only=True))


@pytest.mark.parametrize("lr", [torch.tensor(0.25), torch.tensor(-1e-20), -1e-20])
def test_learning_rates_that_are_taken_back(lr):
    optimizer = stepped(Signum)
    optimizer.param_groups[0]["lr"] = lr
    other = stepped(Signum)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == lr and (other.param_groups[0]["lr"] is not lr or type(lr) is float)


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), "fast", None])
def test_learning_rates_that_are_refused(lr):
    saved = stepped(Signum).state_dict()
    saved["param_groups"][0]["lr"] = lr
    with pytest.raises((TypeError, ValueError), match="lr="):
        stepped(Signum).load_state_dict(saved)


# All at once


def several(seed, **options):
    torch.manual_seed(seed)
    params = [nn.Parameter(torch.randn(4, 5).bfloat16()) for _ in range(3)]
    optimizer = made(SignAdamPP, params, lr=0.1 * seed, confidence="adaptive", **options)
    for p in params:
        p.grad = torch.randn(4, 5).bfloat16()
    optimizer.step()
    return optimizer


def seen(optimizer):
    state = [
        {name: (id(x), x.clone() if isinstance(x, Tensor) else x) for name, x in optimizer.state[p].items()}
        for p in optimizer.param_groups[0]["params"]
    ]
    return id(optimizer.state), id(optimizer.param_groups), {**optimizer.param_groups[0]}, state


def as_it_was(optimizer, before):
    now = seen(optimizer)
    return now[:2] == before[:2] and str(now[2:]) == str(before[2:])


class OutOfMemory(TorchDispatchMode):
    """Fails the n-th operation that needs memory."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= bool(func._schema.returns) and not any(x.alias_info for x in func._schema.returns)
        if self.left == 0:
            raise RuntimeError("not enough memory")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", ["load_state_dict", "load_state"])
@pytest.mark.parametrize(
    "source", [{"state_dtype": "int8"}, pytest.param({"param_storage": "split16"}, marks=pytest.mark.thorough)]
)
def test_out_of_memory_anywhere_leaves_everything_as_it_was(how, source, tmp_path):
    optimizer = several(2, **source)
    optimizer.save_state(tmp_path / "state")
    what = optimizer.state_dict() if how == "load_state_dict" else tmp_path / "state"
    other = several(1, state_dtype="int4", param_storage="split8")
    before = seen(other)
    for n in range(1, 2000):
        mode = OutOfMemory(n)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with mode:
                    getattr(other, how)(what)
            except RuntimeError as error:
                assert "not enough memory" in str(error) and as_it_was(other, before), n
                continue
        break
    assert mode.left > 0 and n > 10
    assert other.param_groups[0]["lr"] == 0.2 and len(other.state) == 3


@pytest.mark.parametrize("how", ["load_state_dict", "load_state"])
def test_ctrl_c_anywhere_leaves_all_of_before_or_all_of_after(how, tmp_path):
    optimizer, other = several(2, state_dtype="int4"), several(1, state_dtype="int4")
    optimizer.save_state(tmp_path / "state")
    what = optimizer.state_dict() if how == "load_state_dict" else tmp_path / "state"
    old = copy.deepcopy(other.state_dict())
    fates = set()
    hooks = {name: dict(value) for name, value in vars(other).items() if name.endswith("_hooks")}
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for k in range(150):
            other.load_state_dict(old)
            was = seen(other)
            try:
                signal.setitimer(signal.ITIMER_REAL, 4e-5 * (k + 1))
                getattr(other, how)(what)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
            signal.setitimer(signal.ITIMER_REAL, 0)
            is_old = other.param_groups[0]["lr"] == 0.1
            fates.add(is_old)
            if is_old:
                assert as_it_was(other, was)
            else:
                now, wanted = other.state_dict(), optimizer.state_dict()
                assert now["param_groups"] == wanted["param_groups"]
                for number, state in wanted["state"].items():
                    assert now["state"][number].keys() == state.keys()
                    assert all(
                        torch.equal(torch.as_tensor(state[k]), torch.as_tensor(x))
                        for k, x in now["state"][number].items()
                    )
            assert {name: dict(value) for name, value in vars(other).items() if name.endswith("_hooks")} == hooks
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert True in fates


def test_groups_are_new_objects_with_the_same_parameters():
    """As after torch's own loading."""
    optimizer, other = several(2), several(1)
    groups, lists = other.param_groups, [group["params"] for group in other.param_groups]
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups is not groups and other.param_groups[0] is not groups[0]
    assert other.param_groups[0]["params"] is lists[0]
    assert other.param_groups[0].keys() == optimizer.param_groups[0].keys()


def test_all_moments_are_known_as_an_optimizers_own():
    """So that a checkpoint which lacks one is told from notes of a user."""
    for row in TABLE:
        optimizer = row.optimizer([nn.Parameter(torch.ones(3))], **row.hyperparameters)
        assert set(rule_of(row.optimizer, optimizer.param_groups[0]).moments) <= set(MOMENTS)


# What cannot be meant


@pytest.mark.parametrize("target", ["fp32", "bf16"])
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_codes_read_into_a_distributed_checkpoint_of_another_form_are_refused(flat, target, tmp_path):
    """torch reads numbers into the tensors that there are, and leaves what says that they are codes."""
    how = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    model = nn.Linear(6, 4)
    optimizer = SignAdamPP(model.parameters(), lr=0.01, state_dtype="int8")
    for _ in range(3):
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
    other = copy.deepcopy(model)
    resumed = SignAdamPP(other.parameters(), lr=0.01, state_dtype=target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_files.save({"o": dcp.get_optimizer_state_dict(model, optimizer, options=how)}, checkpoint_id=tmp_path)
        there = {"o": dcp.get_optimizer_state_dict(other, resumed, options=how)}
        dcp_files.load(there, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match="no momentum of signs exceeds 1"):
        dcp.set_optimizer_state_dict(other, resumed, there["o"], options=how)
    with pytest.warns(UserWarning, match="exp_avg: int8 to"):
        resumed.load_state_dict(optimizer.state_dict())  # which says what they are


def test_a_momentum_of_a_function_may_exceed_one():
    (param,) = params = [nn.Parameter(torch.ones(4))]
    optimizer = SignAdamPP(params, lr=0.01, confidence=lambda g, alpha: 5 * g)
    param.grad = torch.full((4,), 40.0)
    optimizer.step()
    assert float(optimizer.state[param]["exp_avg"][0]) > 1
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "cls, options, needs",
    [(AdamW, {}, True), (SignAdam, {"second_moment": "analytic"}, True), (SignAdamPP, {}, False), (Signum, {}, False)],
)
def test_a_rule_that_counts_needs_the_count(cls, options, needs):
    """It would begin at 1 with moments of many steps."""
    optimizer = stepped(cls, **options)
    saved = optimizer.state_dict()
    del saved["state"][0]["step"]
    other = stepped(cls, **options)
    if needs:
        with pytest.raises(ValueError, match=r"state 'step' of .* is missing: the checkpoint holds 'exp_avg'"):
            other.load_state_dict(saved)
    else:
        other.load_state_dict(saved)


@pytest.mark.parametrize("lr", [-1, -1e9, -1e-3])
def test_a_negative_learning_rate_is_refused_as_a_step_would(lr):
    saved = stepped(Signum).state_dict()
    saved["param_groups"][0]["lr"] = lr
    with pytest.raises(ValueError, match="group 0 of the checkpoint: lr="):
        stepped(Signum).load_state_dict(saved)


@pytest.mark.parametrize("saved", [None, [], {}, {"weight": torch.ones(2)}, {"model": {}, "optimizer": {}}])
def test_what_is_no_state_dict_is_refused(saved):
    with pytest.raises(TypeError, match=r"state_dict is a .*must be what an optimizer's state_dict"):
        stepped(Signum).load_state_dict(saved)


def test_damaged_files_are_named(tmp_path):
    optimizer = stepped(Signum)
    path = tmp_path / "state"
    optimizer.save_state(path)
    whole = path.read_bytes()
    for content in (b"no zip file", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises((ValueError, zipfile.BadZipFile), match=str(path)):
            optimizer.load_state(path)
    flipped = bytearray(whole)
    flipped[whole.index(b"exp_avg") + 400] ^= 1
    path.write_bytes(bytes(flipped))
    with pytest.raises((ValueError, zipfile.BadZipFile), match=str(path)):
        optimizer.load_state(path)


@pytest.mark.parametrize("how", ["dict", "file"])
def test_nothing_is_loaded_where_a_warning_is_an_error(how, tmp_path):
    optimizer = stepped(SignAdamPP, state_dtype="int8")
    other = stepped(SignAdamPP)
    before = other.state[other.param_groups[0]["params"][0]]["exp_avg"].clone()
    optimizer.param_groups[0]["lr"] = 0.75
    optimizer.save_state(tmp_path / "state")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="int8 to fp32"):
            if how == "dict":
                other.load_state_dict(optimizer.state_dict())
            else:
                other.load_state(tmp_path / "state")
    assert torch.equal(other.state[other.param_groups[0]["params"][0]]["exp_avg"], before)
    assert other.param_groups[0]["lr"] == 0.1


def test_no_group_is_added_where_a_warning_is_an_error():
    optimizer = stepped(SignAdamPP)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="momentum with beta"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "state_dtype": "int2", "beta": 0.99})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", ["exp_avg", "step"])
@pytest.mark.parametrize("bytes_left", [0, -4])
def test_a_file_holds_numbers_or_is_not_written(name, bytes_left, tmp_path):
    optimizer = stepped(SignAdamPP)
    path = tmp_path / "state"
    optimizer.save_state(path)
    before = path.read_bytes()
    storage = optimizer.state[optimizer.param_groups[0]["params"][0]][name].untyped_storage()
    storage.resize_(0 if bytes_left == 0 else storage.nbytes() + bytes_left)
    with pytest.raises(ValueError, match=rf"state '{name}' of .* needs a storage"):
        optimizer.save_state(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["a user's", "exp_avg_levels"])
def test_entries_whose_storage_was_freed_are_refused_by_name(name):
    optimizer = stepped(SignAdamPP, state_dtype="int8")
    saved = optimizer.state_dict()
    saved["state"][0][name] = torch.ones(1000)
    saved["state"][0][name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"state [\"']{name}[\"'] of .* needs a storage of 4000 bytes, and has 0"):
        stepped(SignAdamPP, state_dtype="int8").load_state_dict(saved)


def test_a_path_of_nothing_is_refused(tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    with pytest.raises(FileNotFoundError):
        stepped(SignAdamPP).save_state("")
    assert [entry.name for entry in tmp_path.iterdir()] == ["inside"]
