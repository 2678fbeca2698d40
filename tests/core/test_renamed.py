"""Names of earlier versions still work, and warn at the user's line; dtypes may be torch's."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from support.strategies import same_bits
from torch import nn

import signadam_ext
from signadam_ext import Adam, ScheduleFreeSign, SignAdamPP, SignSGD, Signum, memory
from signadam_ext.core.formats import MOMENT_DTYPES, UNBOUNDED
from signadam_ext.core.renamed import NAMES


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(40, 5).to(torch.bfloat16)


def trained(optimizer: torch.optim.Optimizer, net: nn.Module, steps: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(8, 40, dtype=torch.bfloat16)).square().sum().backward()
        optimizer.step()
    return [param.detach().clone() for param in net.parameters()]


def told(record: pytest.WarningsRecorder) -> list[str]:
    assert all(x.category is DeprecationWarning and x.filename == __file__ for x in record), list(map(str, record))
    return [str(x.message) for x in record]


VALUES = [("as_is", "nearest"), ("stochastic", "stochastic"), ("split16", "split16"), ("master", "master")]


@pytest.mark.parametrize("old, new", VALUES)
@pytest.mark.parametrize("cls", [SignAdamPP, Signum, Adam, signadam_ext.AdamW, SignSGD])
def test_constructors_take_the_old_name(cls: Any, old: str, new: str) -> None:
    ours, theirs = model(), model()
    with pytest.warns(DeprecationWarning) as record:
        optimizer = cls(ours.parameters(), lr=1e-2, weights=old)
    renamed = ["param_storage='as_is' is now called param_storage='nearest'"] if old != new else []
    assert told(record) == ["weights= is now called param_storage=", *renamed]
    group = optimizer.param_groups[0]
    assert group["param_storage"] == new and "weights" not in group and "weights" not in optimizer.defaults
    other = cls(theirs.parameters(), lr=1e-2, param_storage=new)
    assert all(map(same_bits, trained(optimizer, ours), trained(other, theirs)))


def test_groups_take_the_old_name() -> None:
    net = model()
    with pytest.warns(DeprecationWarning) as record:
        optimizer = SignAdamPP([{"params": [net.weight], "weights": "split8"}])
        optimizer.add_param_group({"params": [net.bias], "param_storage": "as_is"})
    assert len(told(record)) == 2
    assert [group["param_storage"] for group in optimizer.param_groups] == ["split8", "nearest"]
    assert not any("weights" in group for group in optimizer.param_groups)


@pytest.mark.parametrize("then", ["step", "state_dict"])
def test_groups_may_be_given_the_old_name_between_steps(then: str) -> None:
    results = []
    for name, value in (("weights", "as_is"), ("param_storage", "nearest"), ("param_storage", "as_is")):
        net = model()
        optimizer = SignAdamPP(net.parameters(), lr=1e-2, param_storage="stochastic")
        trained(optimizer, net)
        optimizer.param_groups[0][name] = value
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            saved = optimizer.state_dict()["param_groups"][0] if then == "state_dict" else {}
            results.append(trained(optimizer, net))
            assert "weights" not in saved and saved.get("param_storage", value) in ("nearest", value)
        assert "weights" not in optimizer.param_groups[0]
    assert all(map(same_bits, results[0], results[1])) and all(map(same_bits, results[0], results[2]))


def test_both_names_are_refused() -> None:
    with pytest.raises(TypeError, match="weights and param_storage are two names of the same hyperparameter"):
        SignAdamPP(model().parameters(), weights="master", param_storage="master")


def test_what_a_step_looks_for_is_all_that_was_renamed() -> None:
    """``Hyperparameters.read`` names them, for two lookups are faster than a loop."""
    assert NAMES.keys() == {"weights"}


def test_a_hint_for_a_typing_error_is_todays_name() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'weigths'"):
        SignAdamPP(model().parameters(), weigths="master")


def of_old(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict, or what a pickle holds, as the version before wrote it."""
    old = copy.deepcopy(state)
    for group in (*old["param_groups"], *([old["defaults"]] if "defaults" in old else [])):
        group["weights"] = group.pop("param_storage").replace("nearest", "as_is")
    return old


@pytest.mark.parametrize("new", [new for _, new in VALUES])
def test_old_checkpoints_and_pickles_load(new: str) -> None:
    first, second, third = model(), model(), model()
    optimizer = SignAdamPP(first.parameters(), lr=1e-2, param_storage=new)
    trained(optimizer, first)
    for net in (second, third):
        net.load_state_dict(first.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = SignAdamPP(second.parameters(), lr=1e-2, param_storage=new)
        other.load_state_dict(of_old(optimizer.state_dict()))
        # A pickle of an optimizer holds its parameters.
        twin, net = pickle.loads(pickle.dumps((optimizer, first)))
        unpickled = SignAdamPP.__new__(SignAdamPP)
        unpickled.__setstate__(of_old(twin.__getstate__()) | {"state": twin.state})
        for group, own in zip(unpickled.param_groups, twin.param_groups, strict=True):
            group["params"] = own["params"]
        groups = (*other.param_groups, *unpickled.param_groups, unpickled.defaults)
        assert all(group["param_storage"] == new and "weights" not in group for group in groups)
        expected = trained(optimizer, first)
        assert all(map(same_bits, trained(other, second), expected))
        assert all(map(same_bits, trained(unpickled, net), expected))


def test_loading_leaves_the_defaults_alone() -> None:
    optimizer = SignAdamPP(model().parameters(), lr=1e-2)
    defaults = optimizer.defaults
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.defaults is defaults


def test_memory_takes_the_old_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(DeprecationWarning) as record:
        old = memory.estimate([(30, 7)], weights="split8", param_dtype="bf16")
        assert memory.bytes_per_parameter(weights="as_is") == memory.bytes_per_parameter()
    assert len(told(record)) == 3
    assert old == memory.estimate([(30, 7)], param_storage="split8", param_dtype="bf16")


def test_the_command_takes_the_old_name(capsys: pytest.CaptureFixture[str]) -> None:
    from signadam_ext.__main__ import main

    shown = []
    for option in ("--weights=split8", "--param-storage=split8"):
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            main(["memory", "--params=1e6", option])
        assert [str(x.message) for x in record] == ["--weights is now called --param-storage"] * ("weights" in option)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != ""


@pytest.mark.parametrize("dtype, name", MOMENT_DTYPES.items(), ids=MOMENT_DTYPES.values())
@pytest.mark.parametrize("cls", [SignAdamPP, Signum, Adam])
def test_state_dtype_takes_torch_dtypes(cls: Any, dtype: torch.dtype, name: str) -> None:
    if cls is not SignAdamPP and name not in UNBOUNDED:
        with pytest.raises(ValueError, match=f"state_dtype='{name}': this momentum has no bound"):
            cls(model().parameters(), state_dtype=dtype)
        return
    ours, theirs = model(), model()
    optimizer, other = cls(ours.parameters(), state_dtype=dtype), cls(theirs.parameters(), state_dtype=name)
    assert all(map(same_bits, trained(optimizer, ours), trained(other, theirs)))
    assert repr(optimizer.state_dict()["state"]) == repr(other.state_dict()["state"])
    assert memory.bytes_per_parameter(cls, state_dtype=dtype) == memory.bytes_per_parameter(cls, state_dtype=name)


def test_state_dtypes_of_several_moments() -> None:
    ours, theirs = model(), model()
    optimizer = Adam(ours.parameters(), state_dtype=(torch.int8, "fp32"))
    other = Adam(theirs.parameters(), state_dtype=("int8", "fp32"))
    assert all(map(same_bits, trained(optimizer, ours), trained(other, theirs)))
    with pytest.raises(ValueError, match=r"state_dtype=torch\.float64: must be"):
        Adam(model().parameters(), state_dtype=torch.float64)


@pytest.mark.parametrize("value", [None, 8, torch.float16, "fp8", {}], ids=repr)
@pytest.mark.parametrize("cls", [SignSGD, ScheduleFreeSign])
def test_state_dtype_of_a_group_whose_method_has_none_is_an_entry_like_others(cls: Any, value: Any) -> None:
    ours, theirs = model(), model()
    optimizer, other = cls(ours.parameters(), lr=0.1), cls(theirs.parameters(), lr=0.1)
    optimizer.param_groups[0]["state_dtype"] = value
    assert all(map(same_bits, trained(optimizer, ours), trained(other, theirs)))


@pytest.mark.parametrize(
    ("cls", "name", "meant"),
    [
        (Signum, "momentum", "beta"),
        (ScheduleFreeSign, "momentum", "beta"),
        (SignAdamPP, "beta1", "beta"),
        (Adam, "beta1", "betas"),
        (SignAdamPP, "threshold", "alpha"),
    ],
)
def test_names_of_other_optimizers_hint_at_ours(cls: Any, name: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'; did you mean '{meant}'"):
        cls(model().parameters(), lr=0.1, **{name: 0.9})


def test_a_wrong_name_beside_a_wrong_value_is_told_first() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentum'; did you mean 'betas'"):
        Adam(model().parameters(), betas=0.9, momentum=0.9)  # type: ignore[arg-type]
