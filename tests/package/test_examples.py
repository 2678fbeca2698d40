"""The example runs as a visitor runs it, and a checkpoint continues bit for bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_gpt.py"


def train_gpt(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=cwd,
        # One thread: with more, a busy machine makes each of many tiny operations wait for the last thread.
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


@pytest.mark.thorough
def test_example_resumes_bit_for_bit(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(SCRIPT.read_bytes() * 3)
    options = ("--preset", "tiny", "--data", str(text), "--device", "cpu", "--seed", "7")

    whole = train_gpt(*options, cwd=tmp_path)  # --out is runs/ unless given
    assert whole.returncode == 0, whole.stderr
    stopped = train_gpt(*options, "--out", "parts", "--stop-at", "13", cwd=tmp_path)
    assert stopped.returncode == 0, stopped.stderr
    assert "--resume --out parts" in stopped.stdout
    resumed = train_gpt("--resume", "--out", "parts", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "SignAdamPP continues after step 13" in resumed.stdout

    for name in ("signadampp.pt", "adamw.pt"):
        a, b = (torch.load(tmp_path / out / name, weights_only=True) for out in ("runs", "parts"))
        assert a["step"] == b["step"] == 40
        assert torch.equal(a["losses"], b["losses"])
        assert a["val_losses"] == b["val_losses"]
        assert a["model"].keys() == b["model"].keys()
        for key in a["model"]:
            assert torch.equal(a["model"][key], b["model"][key]), key

    results = json.loads((tmp_path / "runs" / "results.json").read_text(encoding="utf-8"))
    ours, adamw = results["runs"]["SignAdamPP"], results["runs"]["AdamW"]
    assert ours["val_losses"][-1][1] < ours["train_losses"][0]
    assert 4 <= ours["state_bytes_per_parameter"] < 4.1
    assert 8 <= adamw["state_bytes_per_parameter"] < 8.1
    assert results["sample"].startswith("\n")
    assert (tmp_path / "runs" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_quantized_by_sign_round(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(SCRIPT.read_bytes() * 3)
    trained = train_gpt("--preset", "tiny", "--data", str(text), "--device", "cpu", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    command = [sys.executable, str(SCRIPT.with_name("quantize_gpt.py")), "--bits", "2", "--out", "out/quantized.json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "quantized.json").read_text(encoding="utf-8"))
    losses = found["losses"]
    assert losses["fp32"] < losses["SignRound"] < losses["nearest"]
    assert all(best < first for first, best in found["block_errors"])
    nothing = subprocess.run(
        [*command, "--run", "none.pt"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert nothing.returncode == 2 and "run python examples/train_gpt.py first" in nothing.stderr


def test_a_folder_is_no_file_for_losses(tmp_path):
    (tmp_path / "run.pt").touch()
    command = [sys.executable, str(SCRIPT.with_name("quantize_gpt.py")), "--run", "run.pt", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.strip().endswith(f"{tmp_path} is a folder: --out is a file")


def test_rounded_weights_are_those_of_few_bits(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from quantize_gpt import Rounded

    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 5, bias=False)
    layer = Rounded(linear, bits=3, group_size=16)
    weight, groups = layer.rounded().detach(), linear.weight.detach().view(5, 4, 16)
    scale = ((groups.amax(-1) - groups.amin(-1)) / 7)[..., None]
    assert ((weight.view(5, 4, 16) - groups).abs() <= 0.5001 * scale).all()
    assert all(len(group.unique()) <= 8 for group in weight.view(20, 16))
    # An offset of more than the rest moves a weight to the next level, and its gradient is the weight's.
    with torch.no_grad():
        layer.offset.fill_(2.0)
    layer.clamp()
    moved = (layer.rounded().detach().view(5, 4, 16) - weight.view(5, 4, 16)) / scale
    assert set(moved.round().unique().tolist()) <= {0.0, 1.0} and (moved.round() == 1).any()
    layer.rounded().sum().backward()
    assert (layer.offset.grad >= 0).all()
    with pytest.raises(ValueError, match="64 columns are no whole groups of 24"):
        Rounded(linear, bits=3, group_size=24)


def on_workers(count, *arguments, cwd):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    result = subprocess.run(
        [*torchrun, str(SCRIPT), "--preset", "tiny", "--device", "cpu", *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.thorough
@pytest.mark.parametrize(("parallel", "vote", "others"), [("ddp", "majority", ()), ("fsdp2", "mean", (4,))])
def test_example_on_workers_resumes_and_goes_on_with_others(tmp_path, parallel, vote, others):
    text = tmp_path / "text.txt"
    text.write_bytes(SCRIPT.read_bytes() * 3)
    options = ("--data", str(text), "--parallel", parallel, "--vote", vote)
    whole = on_workers(2, *options, "--out", "whole", cwd=tmp_path)
    assert whole.count("In whole: curves.png") == 1, "workers speak with one voice"
    stopped = on_workers(2, *options, "--out", "same", "--stop-at", "13", cwd=tmp_path)
    assert f"torchrun --nproc-per-node 2 {SCRIPT} --resume --out same" in stopped
    for count in others:
        shutil.copytree(tmp_path / "same", tmp_path / str(count))
    for count, out in ((2, "same"), *((count, str(count)) for count in others)):
        resumed = on_workers(count, "--resume", "--out", out, cwd=tmp_path)
        assert "SignAdamPP continues after step 13" in resumed
    for name in ("signadampp.pt", "adamw.pt"):
        a, b = (torch.load(tmp_path / out / name, weights_only=True) for out in ("whole", "same"))
        assert a["step"] == b["step"] == 40 and a["val_losses"] == b["val_losses"]
        assert torch.equal(a["losses"], b["losses"])
        for key in a["model"]:
            assert torch.equal(a["model"][key], b["model"][key]), key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--parallel", "ddp"), "goes with torchrun"),
        (("--vote", "mean"), "between workers"),
    ],
)
def test_example_says_what_workers_need(tmp_path, arguments, message):
    refused = train_gpt("--preset", "tiny", *arguments, cwd=tmp_path)
    assert refused.returncode == 2 and message in refused.stderr


def test_example_names_the_nearest_optimizer(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import argparse

    import train_gpt as example

    assert example.optimizer_name("signadampp") == "SignAdamPP"
    assert example.optimizer_name("ADAMW") == "AdamW"
    with pytest.raises(argparse.ArgumentTypeError, match="did you mean SignAdamPP"):
        example.optimizer_name("signadamp")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "each searched for this run"),
        ({"steps": 801}, "not for this run"),
        ({"preset": "medium"}, "not for this run"),
        ({"data": "book.txt"}, "not for this run"),
        ({"vote": "majority"}, "not for this run"),
        ({"optim": "Lion", "lr": 1e-3}, "Lion's was given"),
    ],
)
def test_example_says_what_its_rates_were_searched_for(monkeypatch, changed, said):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import train_gpt as example

    config = {"optim": "SignAdamPP", "lr": None, "preset": "small", "steps": 800, "data": None, "vote": "off"}
    assert said in example.notes(config | changed)


LARGE = SCRIPT.with_name("train_7b_in_18gb.py")


def train_large(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(LARGE), "--size", "tiny", *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


@pytest.mark.thorough
@pytest.mark.parametrize("products", ["native", "fp32"])
def test_large_example_resumes_bit_for_bit_within_its_bound(tmp_path, products):
    options = ("--products", products, "--lr", "0.05")
    whole = train_large(*options, "--steps", "12", "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    stopped = train_large(*options, "--steps", "5", "--out", "parts", cwd=tmp_path)
    assert stopped.returncode == 0, stopped.stderr
    resumed = train_large("--resume", "--steps", "12", "--out", "parts", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr

    logs = {}
    for out in ("whole", "parts"):
        lines = (tmp_path / out / "log.jsonl").read_text(encoding="utf-8").splitlines()
        logs[out] = [json.loads(line) for line in lines]
    losses = {out: [record["loss"] for record in log if "step" in record] for out, log in logs.items()}
    assert losses["whole"] == losses["parts"]
    weights = [tmp_path / out / "checkpoint-000012" / "weights.safetensors" for out in ("whole", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()

    start, result = logs["whole"][0], logs["whole"][-1]["result"]
    assert result["peak_bytes"] <= result["bound_bytes"] == sum(start["needed"].values())
    assert result["loss_last_five"] < result["loss_first_five"]
    assert all(share > 0 for share in result["moved"].values())
    assert (tmp_path / "whole" / "log.png").read_bytes().startswith(b"\x89PNG")


def test_large_example_has_the_size_and_the_bound_of_its_name(monkeypatch):
    monkeypatch.syspath_prepend(str(LARGE.parent))
    import train_7b_in_18gb as example

    config = example.replace(example.SIZES["7b"], block_size=128)
    assert example.n_parameters(config) >= 7e9
    # The interpreter and its libraries take less than half a gigabyte.
    assert sum(example.memory_needed(config, 500_000_000).values()) < example.LIMIT["7b"]
    config = example.replace(example.SIZES["tiny"], block_size=128)
    model = example.build(config, torch.device("cpu"), 0, True)
    assert sum(p.numel() for p in model.parameters()) == example.n_parameters(config)
