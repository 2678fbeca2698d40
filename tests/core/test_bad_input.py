"""Whatever cannot be right is refused before anything is written, by an error that names the argument and its value."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.optimizer_contract import (
    ROWS,
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
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter

import signadam_ext
from signadam_ext import SignAdam, SignAdamPP, SignSGD, Signum, backends

ROOT = Path(__file__).resolve().parents[2]
INF, NAN = float("inf"), float("nan")

# --- hyperparameters

#: Of each optimizer: name, value, what the message says.
EVERYWHERE = [
    ("lr", -0.1, "lr=-0.1: must be finite and at least 0"),
    ("lr", NAN, "lr=nan"),
    ("lr", INF, "lr=inf"),
    ("lr", "0.1", "lr='0.1': must be a number, not str"),
    ("lr", None, "lr=None"),
    ("lr", True, "lr=True"),
    ("lr", 1j, "lr=1j"),
    ("lr", torch.tensor([0.1, 0.2]), "one floating-point number"),
    ("lr", torch.tensor(1), "one floating-point number"),
    ("lr", torch.tensor(-0.5), "lr=-0.5"),
    ("lr", torch.empty((), device="meta"), "lr is a tensor on meta.*keep it on the CPU"),
    ("weight_decay", -1e-3, "weight_decay=-0.001"),
    ("weight_decay", NAN, "weight_decay=nan"),
    ("weight_decay", INF, "weight_decay=inf"),
    ("weight_decay", "x", "weight_decay='x'"),
    ("decoupled_weight_decay", 1, "decoupled_weight_decay=1: must be True or False"),
    ("maximize", None, "maximize=None: must be True or False"),
    ("foreach", "no", "foreach='no': must be None, False or True"),
    ("capturable", 1, "capturable=1: must be None, False or True"),
    ("differentiable", True, "differentiable=True: must be None or False"),
    ("fused", "yes", "fused='yes': must be None, False or True"),
    ("backend", "cdua", "backend='cdua'.*did you mean 'cuda'"),
    ("backend", "CPU", "did you mean 'cpu'"),
    ("backend", None, "backend=None: must be one of"),
]
BETA = [("beta", v, f"beta={v!r}") for v in (1.0, -0.1, NAN, INF, "0.9", None, True)]
ALPHA = [("alpha", v, f"alpha={v!r}") for v in (-1e-9, NAN, INF, "a", True)]
OWN = {
    SignSGD: [*ALPHA, ("alpha", None, "alpha=None")],
    Signum: BETA,
    SignAdam: [
        ("betas", (0.9,), r"betas=\(0.9,\): must be a tuple of 2"),
        ("betas", 0.9, "betas=0.9: must be a tuple of 2"),
        ("betas", (1.0, 0.9), r"betas\[0\]=1.0: must be in \[0, 1\)"),
        ("betas", (0.9, -0.1), r"betas\[1\]=-0.1"),
        ("betas", (0.9, NAN), r"betas\[1\]=nan"),
        ("betas", ("0.9", 0.99), r"betas\[0\]='0.9'"),
        ("eps", -1e-8, "eps=-1e-08"),
        ("eps", NAN, "eps=nan"),
        ("second_moment", "analytical", "second_moment='analytical'.*did you mean 'analytic'"),
        ("second_moment", 2, "second_moment=2: must be one of 'exact', 'analytic'"),
    ],
    SignAdamPP: [
        *BETA,
        *ALPHA,
        ("confidence", "adaptve", "confidence='adaptve'.*did you mean 'adaptive'"),
        ("confidence", "delayed", "did you mean 'adaptive_delayed'"),
        ("confidence", None, "confidence=None: must be one of 'fixed', 'adaptive', 'adaptive_delayed'"),
        ("confidence_beta", 1.0, r"confidence_beta=1.0: must be in \[0, 1\)"),
        ("confidence_beta", -0.5, "confidence_beta=-0.5"),
    ],
}
BAD = [(cls, *case) for cls, own in OWN.items() for case in [*EVERYWHERE, *own]]


@pytest.mark.parametrize("cls, name, value, message", BAD, ids=[f"{c.__name__}-{n}-{v}" for c, n, v, _ in BAD])
def test_bad_hyperparameters(cls, name, value, message):
    params = parameters()
    with pytest.raises((TypeError, ValueError), match=message):
        cls(params, **{name: value})
    # In a group of its own, of an optimizer that goes on without it.
    optimizer = cls(params[:1])
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.add_param_group({"params": params[1:], name: value})
    assert params_of(optimizer) == params[:1]
    train(optimizer, [0])


@pytest.mark.parametrize("cls", OWN)
def test_options_of_torch_that_ask_for_nothing(cls):
    for value in (None, False):
        cls(parameters(), foreach=value, fused=value, differentiable=value, capturable=value)
    cls(parameters(), foreach=True, fused=True)


@pytest.mark.parametrize("cls", OWN)
def test_extremes_that_are_allowed(cls):
    own = {SignSGD: {"alpha": 0}, SignAdam: {"betas": (0, 0.0), "eps": 0.0}}.get(cls, {"beta": 0})
    optimizer = cls(parameters(), lr=0, weight_decay=0, **own)
    before = [param.clone() for param in params_of(optimizer)]
    train(optimizer, range(2))
    assert all(map(torch.equal, before, params_of(optimizer)))


@pytest.mark.parametrize("cls", OWN)
def test_numpy_scalars(cls):
    """Groups keep them as Python numbers: a float32 would bring its precision into the arithmetic of doubles."""
    for number in (np.float64, np.float32, np.int64):
        group = cls(parameters(), lr=number(2), weight_decay=number(3)).param_groups[0]
        assert [group["lr"], group["weight_decay"]] == [2, 3]
        assert {type(group["lr"]), type(group["weight_decay"])} <= {float, int}
    with pytest.raises(TypeError, match="must be a number, not complex"):
        cls(parameters(), weight_decay=np.complex64(0.1))


@pytest.mark.parametrize(
    "row, name, value, message",
    [
        ("sign_adam", "second_moment", "exakt", "second_moment='exakt'.*did you mean 'exact'"),
        ("sign_adam_pp", "confidence", "Adaptive", "confidence='Adaptive'.*did you mean 'adaptive'"),
        ("sign_adam_pp", "confidence", ["fixed"], "confidence="),
        ("signum", "backend", "cpuu", "backend='cpuu'.*did you mean 'cpu'"),
        (
            "signum",
            "betas",
            (0.9, 0.99),
            r"group 1: betas=\(0.9, 0.99\): must be a tuple of 1; this rule has one, beta=",
        ),
    ],
)
def test_nonsense_written_into_a_group(row, name, value, message):
    """Groups are open to everyone. What nobody could carry out raises at the next step; nothing has moved then."""
    optimizer = make(ROWS[row], [{"params": [p]} for p in parameters()])
    train(optimizer, range(2))
    right = optimizer.param_groups[1][name]
    before = snapshot(optimizer)
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_unchanged(optimizer, before)
    optimizer.param_groups[1][name] = right
    optimizer.step()


# --- backends


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CUDA backend can be used here")
def test_cuda_without_a_device():
    """Built without CUDA it is refused at once; otherwise it has no tensor to serve."""
    with pytest.raises(
        RuntimeError, match=r"backend='cuda' cannot (be used here: .*built without CUDA|serve parameter 0)"
    ):
        train(Signum(parameters(), backend="cuda"), [0])


@pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="Triton's interpreter takes CPU tensors")
def test_triton_on_the_cpu():
    pytest.importorskip("triton")
    optimizer = Signum(parameters(), backend="triton")
    before = snapshot(optimizer)
    with pytest.raises(
        RuntimeError, match=r"backend='triton' cannot serve parameter 0 of group 0 on cpu.*TRITON_INTERPRET=1"
    ):
        train(optimizer, [0])
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize(
    "triton_version, numpy_version, fails",
    [("3.2.0", "2.4.0", True), ("3.6.0", "2.10.1", True), ("3.6.0", "2.3.5", False), ("3.10.0", "2.4.6", False)],
)
def test_an_interpreter_that_fails_beside_its_numpy(triton_version, numpy_version, fails, monkeypatch):
    numpy, triton = pytest.importorskip("numpy"), pytest.importorskip("triton")
    from signadam_ext.triton_kernels import update

    monkeypatch.setattr(update, "update", None)  # no kernel of the compiler's
    monkeypatch.setattr(triton, "__version__", triton_version)
    monkeypatch.setattr(numpy, "__version__", numpy_version)
    params = parameters()
    if fails:
        match = rf"of Triton {triton_version} fails with NumPy {numpy_version}: take NumPy below 2.4, or Triton 3.7"
        with pytest.raises(RuntimeError, match=match):
            train(Signum(params, backend="triton"), [0])
    else:
        assert backends.get("triton").unusable(params[0].device) is None


def test_one_of_many_without_memory():
    """One parameter among those the CPU serves: nothing moves."""
    params = parameters()
    elsewhere = Parameter(torch.empty(3, device="meta"))
    optimizer = make(ROWS["signum"], [{"params": params}, {"params": [elsewhere]}])
    for param in [*params, elsewhere]:
        param.grad = torch.ones_like(param)
    before = [param.clone() for param in params]
    with pytest.raises(TypeError, match=r"parameter 0 of group 1 is a .* on meta, which has no memory of its own"):
        optimizer.step()
    assert all(map(torch.equal, before, params))
    assert not optimizer.state


# --- parameters

BAD_PARAMETERS = {
    "fp64": (lambda: torch.zeros(3, dtype=torch.float64), "torch.float64: supported are float32, bfloat16 and float16"),
    "complex": (lambda: torch.zeros(3, dtype=torch.complex64), "torch.complex64"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
    "expanded": (lambda: torch.zeros(3, 1).expand(3, 4), r"share memory \(shape \(3, 4\), strides \(1, 0\)\)"),
    "overlapping": (lambda: torch.zeros(9).as_strided((3, 4), (2, 1)), "share memory"),
    "lazily negated": (lambda: torch._neg_view(torch.zeros(3)), "resolve_neg"),
}


@pytest.mark.parametrize("build, message", BAD_PARAMETERS.values(), ids=BAD_PARAMETERS.keys())
def test_bad_parameters(build, message):
    bad = Parameter(build())
    with pytest.raises((TypeError, ValueError), match=f"parameter 1 of group 0 .*{message}"):
        Signum([*parameters((3,)), bad])
    with pytest.raises((TypeError, ValueError), match=f"parameter 'bad' .*{message}"):
        Signum([("bad", bad)])
    optimizer = make(ROWS["sign_adam"], parameters())
    train(optimizer, [0])
    with pytest.raises((TypeError, ValueError), match=f"parameter 0 of group 1 .*{message}"):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1
    train(optimizer, [1])
    # Frozen it is nobody's business, until it gets a gradient.
    bad.requires_grad_(False)
    optimizer.add_param_group({"params": [bad]})
    optimizer.step()
    if bad.layout == torch.strided:
        bad.requires_grad_(True).grad = torch.ones(bad.shape, dtype=bad.dtype)
        before = [param.clone() for param in params_of(optimizer)]
        with pytest.raises((TypeError, ValueError), match=message):
            optimizer.step()
        assert all(map(torch.equal, before, params_of(optimizer)))


def test_what_is_no_parameter_at_all():
    for params in ([], torch.zeros(3), [1.0], {"a": torch.zeros(3)}, None):
        with pytest.raises((TypeError, ValueError)):
            Signum(params)
    optimizer = Signum(parameters())
    with pytest.raises(TypeError, match="must be a dict"):
        optimizer.add_param_group([torch.zeros(3)])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": params_of(optimizer)[:1]})
    assert len(optimizer.param_groups) == 1


# --- gradients and state at a step


def sparse_gradient(param):
    param.grad = torch.ones_like(param).to_sparse()


def expanded_parameter(param):
    param.grad = gradient(param, 0)
    param.data = torch.zeros(param.shape[0], 1).expand(param.shape)


def double_precision(param):
    param.data = param.data.double()
    param.grad = torch.zeros_like(param)


def other_shape(param):
    # Torch lets a gradient's data, and a parameter's, be swapped for another shape.
    param.grad = gradient(param, 0)
    param.grad.data = torch.zeros(2)


def parameter_of_another_shape(param):
    param.data = torch.zeros(2, 2)
    param.grad = torch.ones(2, 2)


BAD_AT_A_STEP = {
    "sparse": (sparse_gradient, "the gradient of parameter 1 of group 0 has layout torch.sparse_coo"),
    "expanded": (expanded_parameter, "parameter 1 of group 0 has elements that share memory"),
    "fp64": (double_precision, "parameter 1 of group 0 has dtype torch.float64"),
    "shape": (
        other_shape,
        r"the gradient of parameter 1 of group 0 has shape \(2,\): must be the parameter's, \(4, 5\)",
    ),
}


@each_row
@each_backend
@pytest.mark.parametrize("spoil, message", BAD_AT_A_STEP.values(), ids=BAD_AT_A_STEP.keys())
@pytest.mark.parametrize("steps_before", [0, 2])
def test_one_bad_gradient_and_nothing_moves(row, backend, spoil, message, steps_before):
    params = parameters((3,), (4, 5), (2, 2))
    optimizer, expected = make(row, params, backend), make(row, copies(params), backend)
    train(optimizer, range(steps_before))
    for i, param in enumerate(params):
        param.grad = gradient(param, 5, i)
    params[0].grad = gradient(params[0], 5).repeat_interleave(2)[::2]  # one that has to be copied
    good = params[1].data
    spoil(params[1])
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.step()
    assert_unchanged(optimizer, before)
    # Mended, it goes on as if that step had never been tried.
    params[1].grad = None
    params[1].data = good
    train(optimizer, range(steps_before, steps_before + 2))
    train(expected, range(steps_before + 2))
    assert_same(optimizer, expected)


BAD_STATE = {
    "shape": ("exp_avg", torch.zeros(2), r"state 'exp_avg' of parameter 1 of group 0 has shape \(2,\)"),
    "dtype": ("exp_avg", torch.zeros(4, 5, dtype=torch.bfloat16), "state 'exp_avg' .* dtype torch.bfloat16"),
    "device": ("exp_avg", torch.zeros(4, 5, device="meta"), "state 'exp_avg' .* on meta, which has no memory"),
    "no tensor": ("exp_avg", [0.0] * 20, "state 'exp_avg' of parameter 1 of group 0 is"),
    "deviation": ("exp_avg_std", 0.0, "state 'exp_avg_std' .* 0-dim float64"),
    "step": ("step", "second", "state 'step' of parameter 1 of group 0 is 'second'"),
}


@each_backend
@pytest.mark.parametrize("name, value, message", BAD_STATE.values(), ids=BAD_STATE.keys())
@pytest.mark.parametrize("steps_before", [0, 2])
def test_one_bad_state_and_nothing_moves(backend, name, value, message, steps_before):
    params = parameters((3,), (4, 5), (2, 2))
    optimizer = make(ROWS["sign_adam_pp-adaptive"], params, backend)
    train(optimizer, range(steps_before))
    good = copy.deepcopy(optimizer.state[params[1]])
    optimizer.state[params[1]] = {name: value}
    for i, param in enumerate(params):
        param.grad = gradient(param, 5, i)
    others = make(ROWS["signum"], params[::2])
    others.state = optimizer.state
    before = snapshot(others)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.step()
    assert_unchanged(others, before)
    assert optimizer.state[params[1]] == {name: value}
    optimizer.state[params[1]] = good
    optimizer.step()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_fake_gradient_has_no_numbers(backend, steps_before):
    """Torch lets one be copied into a tensor, and writes nothing there."""
    p = Parameter(torch.ones(7))
    optimizer = SignAdam([p], backend=backend)
    for _ in range(steps_before):
        p.grad = torch.ones(7)
        optimizer.step()
    before = p.detach().clone()
    p.grad = FakeTensorMode(allow_non_fake_inputs=True).from_tensor(torch.ones(7))
    with pytest.raises(TypeError, match="gradient of parameter 0 of group 0 is a FakeTensor"):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_dense_lazily_negative_gradient_at_a_first_step(backend):
    p, q = Parameter(torch.ones(7)), Parameter(torch.ones(7))
    p.grad, q.grad = torch._neg_view(torch.arange(-3.0, 4.0)), torch.arange(3.0, -4.0, -1.0)
    for each in (p, q):
        SignAdam([each], lr=0.5, backend=backend).step()
    assert torch.equal(p, q)


def test_a_parameter_that_changed_shape_needs_new_state():
    (param,) = parameters((3,))
    optimizer = make(ROWS["sign_adam"], [param])
    train(optimizer, range(2))
    parameter_of_another_shape(param)
    with pytest.raises(ValueError, match=r"state 'exp_avg' of parameter 0 of group 0 has shape \(3,\)"):
        optimizer.step()
    del optimizer.state[param]
    optimizer.step()


@each_row
def test_a_closure_that_raises_leaves_everything(row):
    optimizer = make(row, parameters())
    train(optimizer, range(2))
    before = snapshot(optimizer)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert_unchanged(optimizer, before)


# --- a package that was not built

IMPORT = """
import sys
# An editable install knows where the real module lies; this is about one that has none.
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import signadam_ext
"""


@pytest.mark.parametrize("source_tree, built_for_another", [(True, False), (False, True)])
def test_importing_without_the_compiled_module(tmp_path, source_tree, built_for_another):
    package = tmp_path / "signadam_ext"
    shutil.copytree(Path(signadam_ext.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if source_tree:
        shutil.copy(ROOT / "setup.py", tmp_path)
    if built_for_another:
        (package / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: signadam_ext cannot be imported: ")
    if built_for_another:
        version = f"Python {sys.version_info.major}.{sys.version_info.minor}"
        assert f"built for another Python: found _C.cpython-39-x86_64-linux-gnu.so, this is {version}" in message
    else:
        assert "this is its source tree, and the compiled module has not been built" in message
    assert f"Run `pip install {f'-e {tmp_path}' if source_tree else '--force-reinstall signadam_ext'}`" in message


def test_a_source_tree_says_where_what_is_installed_lies(tmp_path):
    """As after ``pip install .``, in the very folder where that was run."""
    tree, site = tmp_path / "tree", tmp_path / "site"
    own = Path(signadam_ext.__file__).parent
    shutil.copytree(own, tree / "signadam_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "setup.py", tree)
    metadata = site / "signadam_ext-1.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: signadam_ext\nVersion: 1.0\n")
    (site / "signadam_ext").mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tree, site))), "OMP_NUM_THREADS": "1"}
    for built in (False, True):
        if built:
            (site / "signadam_ext" / "_C.so").touch()
        done = subprocess.run([sys.executable, "-c", IMPORT], cwd=tree, env=environment, capture_output=True, text=True)
        message = done.stderr.strip().splitlines()[-1]
        assert message.startswith("ImportError: signadam_ext cannot be imported: "), done.stderr
        assert (f"what is installed lies in {site / 'signadam_ext'}" in message) == built, message
        assert f"`pip install -e {tree}`" in message
