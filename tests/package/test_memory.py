"""The calculator agrees with the tensors of a training to the byte, and with what is measured of the whole process."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import signadam_ext
from bench import memory as bench_memory
from signadam_ext import SignAdamPP, memory, release_gradients
from signadam_ext.core.formats import BOUNDED, FORMATS, PARAM_STORAGES

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / "bench" / "results" / "memory"

#: Whole runs of 32 and parts of one, one element, none.
SHAPES = ((64, 32), (33,), (7, 5), (1,), (), (0,), (3, 0), (31,), (1025,))

#: Hyperparameters that decide what is kept.
KINDS: dict[str, list[dict[str, Any]]] = {
    "SignSGD": [{}],
    "Signum": [{}],
    "SignAdam": [{"second_moment": "exact"}, {"second_moment": "analytic"}],
    "SignAdamPP": [{"confidence": "fixed"}, {"confidence": "adaptive"}, {"confidence": "adaptive_delayed"}],
}


def configurations() -> Iterator[dict[str, Any]]:
    """Every combination, possible or not."""
    for optimizer, kinds in KINDS.items():
        for kind in kinds:
            for state in (None, *BOUNDED, ("int8", "fp32")):
                for param_storage in PARAM_STORAGES:
                    for param_dtype in memory.DTYPES:
                        yield {
                            "optimizer": optimizer,
                            "state_dtype": state,
                            "param_storage": param_storage,
                            "param_dtype": param_dtype,
                            **kind,
                        }


def made(configuration: dict[str, Any], shapes: Any = SHAPES) -> tuple[list[Parameter], Any]:
    """Parameters and optimizer of a configuration."""
    options = dict(configuration)
    cls = getattr(signadam_ext, options.pop("optimizer"))
    dtype = memory.DTYPES[options.pop("param_dtype")]
    if options["state_dtype"] is None:
        del options["state_dtype"]
    params = [Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    return params, cls(params, lr=0.1, backend="cpu", **options)


def nbytes(tensors: list[Tensor]) -> int:
    storages = {id(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("optimizer", KINDS)
def test_calculated_bytes_are_those_of_the_tensors(optimizer: str) -> None:
    """In every configuration there is; and where there is none, the calculator raises as the constructor does."""
    possible = impossible = 0
    for configuration in configurations():
        if configuration["optimizer"] != optimizer:
            continue
        try:
            params, made_optimizer = made(configuration)
        except (TypeError, ValueError):
            with pytest.raises((TypeError, ValueError)):
                memory.estimate(SHAPES, **configuration)
            impossible += 1
            continue
        for param in params:
            param.grad = torch.ones_like(param)
        made_optimizer.step()
        state = [value for entry in made_optimizer.state.values() for value in entry.values()]
        found = memory.estimate(SHAPES, **configuration)
        assert found.parameters == sum(param.numel() for param in params)
        assert found.weights == nbytes(params), configuration
        assert found.state == nbytes([value for value in state if isinstance(value, Tensor)]), configuration
        assert found.gradients == nbytes([param.grad for param in params if param.grad is not None])
        assert found.total == found.resident + found.gradients == found.weights + found.state + found.gradients
        possible += 1
    assert possible >= 3 and impossible >= 3


def test_parts_are_what_they_are_called() -> None:
    configuration = {"optimizer": "SignAdam", "state_dtype": "int4", "param_storage": "split8", "param_dtype": "bf16"}
    params, optimizer = made({**configuration, "second_moment": "exact"})
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    found = memory.estimate(SHAPES, **configuration)
    states = list(optimizer.state.values())
    assert found.residual == nbytes([state["param_low"] for state in states])
    assert found.moments == nbytes([state[name] for state in states for name in ("exp_avg", "exp_avg_sq")])
    assert found.scalars == nbytes([state["step"] for state in states])


def test_released_gradients_are_the_largest_alone() -> None:
    every = memory.estimate(SHAPES, param_dtype="bf16", grad_dtype="fp32")
    largest = memory.estimate(SHAPES, param_dtype="bf16", grad_dtype="fp32", gradients="released")
    assert every.gradients == 4 * every.parameters and largest.gradients == 4 * 64 * 32
    assert memory.estimate(SHAPES, gradients="released", largest=10).gradients == 40
    assert largest.resident == every.resident


def test_bytes_per_parameter_are_those_of_a_large_tensor() -> None:
    for state in BOUNDED:
        for param_storage in PARAM_STORAGES:
            words: dict[str, Any] = {"state_dtype": state, "param_storage": param_storage, "param_dtype": "bf16"}
            large = memory.estimate([(1 << 20,)], **words)
            each = memory.bytes_per_parameter(**words)
            assert each == {part: large.each(getattr(large, part)) for part in each}
    assert memory.bytes_per_parameter(state_dtype="int2", param_storage="stochastic", param_dtype="bf16") == {
        "weights": 2,
        "residual": 0,
        "moments": FORMATS["int2"].bits / 8,
        "gradients": 2,
    }


@pytest.mark.parametrize(("dtype", "mixed"), [("fp32", False), ("bf16", False), ("fp16", False), ("bf16", True)])
def test_calculated_bytes_of_adamw_are_those_of_its_tensors(dtype: str, mixed: bool) -> None:
    params = [Parameter(torch.zeros(shape, dtype=memory.DTYPES[dtype])) for shape in SHAPES]
    updated = [Parameter(param.detach().float()) for param in params] if mixed else params
    optimizer = torch.optim.AdamW(updated)
    for param in updated:
        param.grad = torch.ones_like(param)
    optimizer.step()
    found = memory.adamw(SHAPES, dtype, mixed=mixed)
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    assert found.weights == found.gradients == nbytes(params)
    assert found.state == nbytes(state) + (nbytes(updated) if mixed else 0)


def test_even_shapes() -> None:
    assert memory.even_shapes(7, 3) == [(3,), (2,), (2,)]
    for parameters, tensors in ((3, 4), (3, 0)):
        with pytest.raises(ValueError, match=f"tensors={tensors}: must be from 1"):
            memory.even_shapes(parameters, tensors)


# The command


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True)


def test_command_prints_what_it_computes() -> None:
    result = python("-m", "signadam_ext", "memory", "--params=7e9", "--state=int2", "--param-storage=stochastic")
    assert result.returncode == 0, result.stderr
    rows = {line.split("  ")[0]: line.split()[-3:] for line in result.stdout.splitlines()}
    each = memory.bytes_per_parameter(state_dtype="int2", param_storage="stochastic", param_dtype="bf16")
    resident = each["weights"] + each["moments"]
    assert rows["without gradients"] == [f"{resident:g}", f"{resident * 7:.3f}", f"{resident * 7e9 / 2**30:.3f}"]
    assert rows["with gradients"][0] == f"{sum(each.values()):g}"
    for name, mixed in (("AdamW, fp32 master copies and moments", True), ("AdamW in bf16", False)):
        other = memory.adamw([(7_000_000_000,)], "bf16", mixed=mixed)
        assert rows[f"{name}, without gradients"][0] == f"{other.each(other.resident):g}"
        assert rows[f"{name}, with all bf16 gradients"][1] == f"{other.total / 1e9:.3f}"
    assert "Not counted: activations" in result.stdout


def test_gpus_share_everything_evenly() -> None:
    printed = command("--params 8e9 --gpus 8 --state int2 --param-storage stochastic")
    found = memory.estimate([(8_000_000_000,)], state_dtype="int2", param_storage="stochastic", param_dtype="bf16")
    rows = {line.split("  ")[0]: line.split()[-1] for line in printed.splitlines() if line}
    assert "GB on each of 8 GPUs" in printed and "On each GPU: everything divided evenly" in printed
    assert rows["with gradients"] == f"{found.total / 8 / 1e9:.3f}" == "4.250"
    assert "on each" not in command("--params 8e9 --gpus 1")


def command(text: str) -> str:
    import argparse

    parser = argparse.ArgumentParser()
    memory.add_arguments(parser)
    return memory.table(parser.parse_args(text.split()))


def test_command_takes_shapes() -> None:
    text = command("--shapes 3x5,2*33,7 --optimizer signum --state int8 --param-dtype fp32 --gradients released")
    assert text.startswith("Signum, 88 parameters in 4 tensors\n")
    found = memory.estimate(
        [(3, 5), (33,), (33,), (7,)], "Signum", state_dtype="int8", param_dtype="fp32", gradients="released"
    )
    assert f"{found.each(found.total):.5g}" in text


def test_command_takes_what_decides_of_forms_and_scalars() -> None:
    """betas[1] of LaProp, up to which its momentum has a bound; caution, which keeps a number of each tensor."""
    arguments = "--shapes 8,8 --optimizer LaProp --state int2 --param-dtype fp32"
    with pytest.raises(ValueError, match="state_dtype='int2': this momentum has a bound only where"):
        command(arguments)
    text = command(f"{arguments} --betas 0.9,0.95 --caution delayed")
    found = memory.estimate([(8,), (8,)], "LaProp", state_dtype="int2", betas=(0.9, 0.95), caution="delayed")
    plain = memory.estimate([(8,), (8,)], "LaProp", state_dtype="int2", betas=(0.9, 0.95))
    assert found.scalars == plain.scalars + 2 * 8
    assert f"{found.each(found.total):.5g}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--params 1e9 --caution delayd", "did you mean 'delayed'"),
        (
            "--params 1e9 --state int2 --optimizer Signum",
            "state_dtype='int2': this momentum has no bound",
        ),
        ("--params 1e9 --param-dtype fp16 --param-storage split8", "has other low bits: use 'master'"),
        ("--params 1e9 --optimizer SignAdamP", "did you mean 'SignAdam"),
        ("--params 1e9 --state int3", "state_dtype='int3'.*did you mean 'int"),
        ("--params 1e9 --state int8,bf16", "must be one dtype, or 1"),
        ("--params 1e9 --param-storage stochstic", "did you mean 'stochastic'"),
        ("--params 1e9 --param-dtype float32", "did you mean 'fp32'"),
        ("--params 1e9 --grad-dtype fp8", "grad_dtype='fp8'"),
        ("--params 1e9 --optimizer SignSGD --state fp32", "state_dtype='fp32': SignSGD has no such argument"),
        ("--params 1e9 --confidence fixd", "did you mean 'fixed'"),
        ("--params 1e9 --second-moment exact", "second_moment='exact': SignAdamPP has no such argument"),
        ("--params 1e9 --gradients release", "did you mean 'released'"),
        ("--params 1e9 --gradients released", "needs --largest or --shapes"),
        ("--params 10 --gradients released --largest 11", "more elements than the model"),
        ("--params 3 --tensors 4", "tensors=4: must be from 1"),
        ("--params 3 --shapes 3", "leave out --params"),
        ("", "give --params or --shapes"),
    ],
)
def test_what_cannot_be_is_refused(arguments: str, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        command(arguments)


@pytest.mark.parametrize(
    ("argument", "text"), [("params", "x"), ("params", "0.5"), ("params", "0"), ("shapes", "3y"), ("betas", "a")]
)
def test_what_is_no_number_is_refused(argument: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(f"--{argument} {text}")
    assert f"--{argument}" in capsys.readouterr().err


# The measurement

needs_glibc = pytest.mark.skipif(
    not sys.platform.startswith("linux") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""),
    reason="reads malloc's own figures and /proc",
)


@needs_glibc
@pytest.mark.thorough
def test_benchmark_runs_and_agrees(tmp_path: Path) -> None:
    result = python("-m", "bench.memory", "--quick", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    assert path.with_suffix(".png").exists() and {"machine", "versions", "commit"} <= report.keys()
    assert report["rows"] and not [row for row in report["rows"] if "error" in row]
    for row in report["rows"]:
        assert row["bytes"] == row["calculated"]


@needs_glibc
@pytest.mark.thorough
def test_all_that_is_live_beside_bf16_weights() -> None:
    """2-bit momentum of 16M parameters: tensors, tables and every other allocation, gradients dropped."""
    result = python("-m", "bench.memory", "--aim")
    assert result.returncode == 0, result.stderr
    rows = [row for row in json.loads(result.stdout) if row["model"] == "one"]
    assert len(rows) == 2 and rows[0]["elements"] == 1 << 24
    for row in rows:
        assert 0.25 <= row["native"]["per_parameter"] <= 0.2505, row
        # With Python's objects, which are torch's own as well.
        assert 0.25 <= row["everything"]["per_parameter"] <= 0.2512, row


MALLINFO = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in MALLINFO)


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc what is allocated")
def test_the_plan_of_one_small_tensor_is_small() -> None:
    """With gradients released there is one for each parameter, sums for a threshold included."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("this libc does not say what is allocated")
    libc.mallinfo2.restype = MallInfo

    def allocated() -> int:
        info = libc.mallinfo2()
        return int(info.uordblks + info.hblkhd)

    params = [torch.zeros(100, requires_grad=True) for _ in range(50)]
    optimizer = SignAdamPP(params, lr=1e-3, confidence="adaptive_delayed", alpha=0.5)
    release_gradients(params, optimizer)

    def step() -> None:
        torch.stack([(p * p).sum() for p in params]).sum().backward()

    step()
    step()
    gc.collect()
    with_plans = allocated()
    optimizer.runtime.forget_plans()
    gc.collect()
    assert 0 < (with_plans - allocated()) / len(params) < 4000


@pytest.mark.skipif(not MEASURED.is_dir(), reason="the source distribution holds no results")
def test_the_picture_is_drawn_again_from_the_committed_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    (committed,) = MEASURED.glob("cpu-*.json")
    monkeypatch.setattr(bench_memory.machine, "slug", lambda facts: committed.stem)
    (tmp_path / committed.name).write_bytes(committed.read_bytes())
    assert bench_memory.main(["--plot", "--out", str(tmp_path)]) == 0
    assert (tmp_path / committed.name).with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".png"]
