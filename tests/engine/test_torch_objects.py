"""What the reader knows of torch's objects in memory: it must see every change, and count as torch does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.toolchain import ADDRESS, build
from torch import nn

import signadam_ext
from signadam_ext import SignAdamPP
from signadam_ext.engine import gradients

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sizes of objects are asked of glibc")


def test_the_hash_sees_every_change(tmp_path: Path):
    """Every bit, words that change places, words that change against each other; as vectors and as plain C++."""
    printed = []
    for name, flags in (("vectors", ()), ("plain", ("-U__SSE2__",))):
        program = build("object_hash.cpp", tmp_path / name, *flags, *ADDRESS)
        done = subprocess.run([str(program)], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
        printed.append(done.stdout)
    assert printed[0] == printed[1] != ""


@linux
def test_torch_s_objects_are_known():
    shim = gradients._shim()
    assert shim is not None and shim.recognises and shim.counts_versions and shim.knows_negation
    assert "tensors, versions, lazy negation" in gradients.kind()


IN_A_TRANSFORM = """
import torch
from signadam_ext import SignAdamPP
from signadam_ext.engine import gradients

param = torch.nn.Parameter(torch.ones(3))
optimizer = SignAdamPP([param], lr=0.125)
param.grad = torch.ones(3)


def refused(x):
    try:
        optimizer.step()
    except RuntimeError as error:
        assert "inside a transform of torch.func" in str(error)
        return x.sum()


torch.func.TRANSFORM(refused)(torch.ones(3))
optimizer.step()
print(gradients.kind())
"""


@linux
@pytest.mark.parametrize("transform", ["grad", pytest.param("functionalize", marks=pytest.mark.thorough)])
def test_a_first_step_that_is_refused_inside_a_transform_costs_the_others_nothing(transform):
    code = IN_A_TRANSFORM.replace("TRANSFORM", transform)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert "C++ (torch's C shim; knows torch's objects for tensors, versions" in done.stdout, done.stderr


class Own(nn.Parameter):
    """A subclass, as users have them."""


def view_of_a_base() -> nn.Parameter:
    base = torch.ones(4, 6)
    view = nn.Parameter(base[1:3])
    view.base_of_mine = base
    return view


KINDS = {
    "plain": lambda: torch.ones(5, requires_grad=True),
    "parameter": lambda: nn.Parameter(torch.ones(5)),
    "subclass": lambda: Own(torch.ones(5)),
    "0-dim": lambda: nn.Parameter(torch.ones(())),
    "empty": lambda: nn.Parameter(torch.ones(0, 3)),
    "channels last": lambda: nn.Parameter(torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)),
    "more dimensions than lie in the object": lambda: nn.Parameter(torch.ones(1, 2, 1, 2, 1, 2, 1)),
    "part of a base": view_of_a_base,
    "with gaps": lambda: nn.Parameter(torch.ones(4, 6)[:, :3]),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_versions_are_counted_as_torch_counts_them(kind, backend, monkeypatch):
    """By one for each step with a gradient, whether torch's objects are known or torch is called."""
    moved = []
    for shim in (gradients._shim(), None):
        monkeypatch.setattr(gradients, "_shim", lambda shim=shim: shim)
        param, other = KINDS[kind](), nn.Parameter(torch.ones(3))
        optimizer = SignAdamPP([param, other], lr=0.125, backend=backend)
        before, counts = (param._version, other._version), []
        for step in range(4):
            param.grad = None if step == 2 else torch.ones_like(param)
            other.grad = torch.ones(3)
            optimizer.step()
            counts.append((param._version - before[0], other._version - before[1]))
        moved.append(counts)
    assert moved[0] == moved[1]
    assert [other for _, other in moved[0]] == [1, 2, 3, 4]
    if backend == "cpu" and kind != "with gaps":
        assert [own for own, _ in moved[0]] == [1, 2, 2, 3]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_view_s_version_is_its_base_s(backend):
    param = view_of_a_base()
    optimizer = SignAdamPP([param], lr=0.125, backend=backend)
    base, before = param.base_of_mine, param.base_of_mine._version
    twin = param.detach()
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert twin._version == param._version == base._version == before + 2


def test_inference_tensors_have_no_version():
    with torch.inference_mode():
        param = torch.ones(5)
        param.grad = torch.ones(5)
        optimizer = SignAdamPP([param], lr=0.125, backend="cpu")
        optimizer.step()
        optimizer.step()
        assert not torch.equal(param, torch.ones(5))
        with pytest.raises(RuntimeError, match="version"):
            param._version  # noqa: B018


def test_the_module_says_what_its_reader_knows():
    done = subprocess.run([sys.executable, "-m", "signadam_ext"], capture_output=True, text=True, timeout=600)
    assert signadam_ext.__version__ in done.stdout and gradients.kind() in done.stdout


@pytest.mark.parametrize("known", [True, False])
def test_a_gradient_lazily_negated_is_taken_at_its_value(known, monkeypatch):
    """At the first step and at a later one, whether its object shows it or torch is asked."""
    shim = gradients._shim()
    monkeypatch.setattr(gradients, "_shim", lambda: shim if known else None)
    param, twin = nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones(7))
    optimizer, other = (SignAdamPP([p], lr=0.125, backend="cpu") for p in (param, twin))
    for negated in (True, False, True, True, False):
        grad = torch.randn(7)
        param.grad = torch._neg_view(-grad) if negated else grad
        assert param.grad.is_neg() == negated
        twin.grad = grad
        optimizer.step()
        other.step()
        assert torch.equal(param, twin)


@linux
def test_torch_s_objects_are_known_wherever_they_lie():
    """Addresses that come twice, or differ by one bit, are not taken for what they are not."""
    kept = []
    for attempt in range(300):
        gradients._shim_of_torch.cache_clear()
        shim = gradients._shim()
        assert shim is not None and shim.recognises and shim.counts_versions and shim.knows_negation
        kept.append(torch.empty(7 + attempt % 50))
        if attempt % 3 == 0:
            kept = kept[len(kept) // 2 :]
