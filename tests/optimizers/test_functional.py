"""The functional forms are the classes without the memory: equal bit for bit, and as careful with their arguments."""

from __future__ import annotations

import pytest
import torch
from support.optimizer_contract import ROWS, copies, each_backend, each_row, gradient, hyperparameters, make, parameters
from support.strategies import same_bits

from signadam_ext import functional

FUNCTIONS = {
    "SignSGD": "sign_sgd",
    "Signum": "signum",
    "SignAdam": "sign_adam",
    "SignAdamPP": "sign_adam_pp",
    "MSVAG": "msvag",
    "AdamW": "adam",
}
#: Lists of moments beside the first; one moment unless said here.
MOMENTS = {
    "SignSGD": (),
    "SignAdam": ("exp_avgs", "exp_avg_sqs"),
    "MSVAG": ("exp_avgs", "exp_avg_sqs"),
    "AdamW": ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"),
}
SHAPES = ((5, 7), (3,), (), (0, 2), (4,))


class Lists:
    """Parameters, and state in the lists a row's function takes."""

    def __init__(self, row, params):
        self.function = getattr(functional, FUNCTIONS[row.optimizer.__name__])
        self.hyperparameters = hyperparameters(row)
        self.params = params
        name = row.optimizer.__name__
        names = MOMENTS.get(name, ("exp_avgs",))
        self.state = {name: [torch.zeros_like(p, dtype=torch.float32) for p in params] for name in names}
        if self.hyperparameters.get("second_moment") == "analytic":
            self.state["exp_avg_sqs"] = []  # not needed
        if row.reads_variance:
            self.state["grad_variances"] = [torch.full_like(p, 0.5, dtype=torch.float32) for p in params]
        elif name in ("SignAdam", "MSVAG", "AdamW"):
            self.state["state_steps"] = [torch.zeros((), dtype=torch.float64) for _ in params]
        if name == "AdamW":
            self.hyperparameters["decoupled_weight_decay"] = True
        if self.hyperparameters.get("confidence", "fixed") != "fixed":
            self.state["exp_avg_stds"] = [torch.zeros((), dtype=torch.float64) for _ in params]

    def step(self, grads, **overrides):
        self.function(self.params, grads, **{**self.state, **self.hyperparameters, **overrides})

    def copied(self):
        return [tensor.clone() for tensors in (self.params, *self.state.values()) for tensor in tensors]

    def unchanged(self, before):
        return all(map(same_bits, before, self.copied()))


@each_row
@each_backend
def test_equal_to_the_class(row, backend):
    """Over steps in which some parameters have no gradient, and in every dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        params = parameters(*SHAPES, dtype=dtype)
        optimizer = make(row, params, backend, weight_decay=0.1)
        lists = Lists(row, [p.detach() for p in copies(params)])
        for step in range(4):
            grads = [None if i == step else gradient(p, step, i) for i, p in enumerate(params)]
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            optimizer.step()
            lists.step(grads, weight_decay=0.1, backend=backend)
        for i, param in enumerate(params):
            assert same_bits(param, lists.params[i])
            for name, values in lists.state.items():
                entry = name.removesuffix("s").removeprefix("state_")
                if row.reads_variance:
                    entry = {"exp_avg": "momentum_buffer", "exp_avg_sq": "exp_avg_var"}.get(entry, entry)
                if values:
                    kept = param.grad_variance if name == "grad_variances" else optimizer.state[param][entry]
                    assert same_bits(kept, values[i]), name


@each_row
def test_parameters_that_require_grad(row):
    """No graph is recorded, and autograd notices what was written."""
    lists = Lists(row, parameters())
    loss = sum((p**2).sum() for p in lists.params)
    lists.step([gradient(p, 0) for p in lists.params])
    assert all(p.grad_fn is None and p._version > 0 for p in lists.params)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_row
def test_gradients_and_parameters_of_any_layout(row):
    (x,) = parameters((4, 6))
    spread = torch.full((4, 12), torch.nan)
    variants = [x.detach().t().contiguous().t(), spread[:, ::2].copy_(x.detach())]
    expected = Lists(row, [x.detach().clone()])
    grads = [gradient(x, step) for step in range(3)]
    for grad in grads:
        expected.step([grad])
    for param in variants:
        lists = Lists(row, [param])
        for grad in grads:
            lists.step([grad.t().contiguous().t()])
        assert same_bits(lists.params[0], expected.params[0])
    assert spread[:, 1::2].isnan().all()


@each_row
def test_nothing_to_do(row):
    Lists(row, []).step([])
    lists = Lists(row, parameters())
    before = lists.copied()
    lists.step([None] * 3)
    assert lists.unchanged(before)


def test_exact_needs_no_step_counts():
    lists = Lists(ROWS["sign_adam"], parameters())
    del lists.state["state_steps"]
    lists.step([gradient(p, 0) for p in lists.params])


def second(name, value):
    """Spoils the second entry of a list."""

    def spoil(lists, grads):
        (grads if name == "grads" else lists.params if name == "params" else lists.state[name])[1] = value

    return spoil


def shortened(name):
    return lambda lists, grads: (grads if name == "grads" else lists.state[name]).pop()


def with_hyperparameter(name, value):
    return lambda lists, grads: lists.hyperparameters.update({name: value})


EVERY = {
    "too few gradients": (shortened("grads"), "grads has 2 entries: must have one for each of the 3 parameters"),
    "gradient shape": (second("grads", torch.zeros(2)), r"the gradient of params\[1\] has shape \(2,\)"),
    "gradient dtype": (second("grads", torch.zeros(4, 5).double()), r"gradient of params\[1\] has dtype torch.float64"),
    "gradient device": (second("grads", torch.zeros(4, 5, device="meta")), r"gradient of params\[1\] is on meta"),
    "sparse gradient": (second("grads", torch.zeros(4, 5).to_sparse()), "layout torch.sparse_coo"),
    "gradient no tensor": (second("grads", 1.0), r"the gradient of params\[1\] is 1.0: must be a tensor"),
    "parameter dtype": (second("params", torch.zeros(4, 5, dtype=torch.int32)), r"params\[1\] has dtype torch.int32"),
    "parameter no tensor": (second("params", "weights"), r"params\[1\] is 'weights': must be a tensor"),
    "expanded": (second("params", torch.zeros(4, 1).expand(4, 5)), r"params\[1\] has elements that share memory"),
    "lr": (with_hyperparameter("lr", -1), "lr=-1: must be finite and at least 0"),
    "backend": (with_hyperparameter("backend", "tritn"), "did you mean 'triton'"),
    "unknown": (with_hyperparameter("weight_decya", 0.1), "'weight_decya'; did you mean 'weight_decay'"),
    "few bits": (with_hyperparameter("state_dtype", "int8"), "state_dtype is an optimizer's alone: give it to "),
    "caution": (with_hyperparameter("caution", "delayed"), "caution is an optimizer's alone: give it to "),
}
MOMENT = {
    "too few": (shortened("exp_avgs"), "exp_avgs has 2 entries: must have one for each of the 3 parameters"),
    "shape": (second("exp_avgs", torch.zeros(5, 4)), r"'exp_avg' of params\[1\] has shape \(5, 4\)"),
    "dtype": (second("exp_avgs", torch.zeros(4, 5).bfloat16()), r"'exp_avg' of params\[1\] has dtype .*bfloat16"),
    "strides": (second("exp_avgs", torch.zeros(5, 4).t()), r"exp_avg of params\[1\] has strides \(1, 4\)"),
    "expanded": (second("exp_avgs", torch.zeros(4, 1).expand(4, 5)), r"exp_avg of params\[1\] has strides \(1, 0\)"),
    "no tensor": (second("exp_avgs", None), r"'exp_avg' of params\[1\] is None"),
}
DEVIATION = {
    "too few deviations": (shortened("exp_avg_stds"), "exp_avg_stds has 2 entries"),
    "deviation dtype": (second("exp_avg_stds", torch.zeros(())), r"exp_avg_stds\[1\] .* 0-dim float64"),
    "deviation shape": (second("exp_avg_stds", torch.zeros(1).double()), r"exp_avg_stds\[1\] .* 0-dim float64"),
    "deviation no tensor": (second("exp_avg_stds", 0.0), r"exp_avg_stds\[1\] .* 0-dim float64"),
    "no deviations": (lambda lists, grads: lists.state.pop("exp_avg_stds"), "exp_avg_stds has 0 entries"),
    "confidence": (with_hyperparameter("confidence", "adaptiv"), "did you mean 'adaptive'"),
}
STEP = {
    "too few steps": (shortened("state_steps"), "state_steps has 2 entries"),
    "step dtype": (second("state_steps", torch.zeros(()).long()), r"state_steps\[1\] .* 0-dim float64"),
    "step no tensor": (second("state_steps", 0), r"state_steps\[1\] .* 0-dim float64"),
    "no steps": (lambda lists, grads: lists.state.pop("state_steps"), "state_steps has 0 entries"),
}
WITH_EXP_AVG = [row for row in ROWS if "sgd" not in row and "minibatch" not in row]
BAD = [
    *((row, *case) for row in ROWS for case in EVERY.items()),
    *((row, f"moments, {name}", case) for row in WITH_EXP_AVG for name, case in MOMENT.items()),
    *((row, *case) for row in ("sign_adam_pp-adaptive", "sign_adam_pp-delayed") for case in DEVIATION.items()),
    *(("sign_adam_analytic", *case) for case in STEP.items()),
]


@pytest.mark.parametrize("row, _, case", BAD, ids=[f"{row}-{name}" for row, name, _ in BAD])
def test_nothing_is_written_when_something_is_wrong(row, _, case):
    spoil, message = case
    lists = Lists(ROWS[row], parameters((3,), (4, 5), (2,)))
    grads = [gradient(p, 0) for p in lists.params]
    kept = [t for tensors in (lists.params, *lists.state.values()) for t in tensors[::2]]
    before = [tensor.clone() for tensor in kept]
    spoil(lists, grads)
    with pytest.raises((TypeError, ValueError), match=message):
        lists.step(grads)
    assert all(map(same_bits, before, kept))


def test_misspelt_own_hyperparameters_are_named():
    misspelt = ("sign_adam_pp", "confidence_bta", "confidence_beta"), ("sign_sgd-gated", "alhpa", "alpha")
    for row, wrong, right in misspelt:
        with pytest.raises(TypeError, match=f"{wrong!r}; did you mean {right!r}"):
            Lists(ROWS[row], parameters()).step([None] * 3, **{wrong: 0.1})


def test_lazily_negative_moments_are_refused():
    p, m = torch.zeros(2), torch._neg_view(torch.tensor([-0.5, 0.5]))
    for backend in ("cpu", "reference"):
        with pytest.raises(TypeError, match=r"exp_avg of params\[0\] is the negative"):
            functional.sign_adam_pp([p], [torch.zeros(2)], [m], lr=1.0, backend=backend)
    assert p.tolist() == [0, 0] and m.tolist() == [0.5, -0.5]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_moments_of_inference_mode(backend):
    with torch.inference_mode():
        made = torch.zeros(2)
    params, moments = [torch.zeros(2), torch.zeros(2)], [torch.zeros(2), made]
    functional.sign_adam_pp(params, [torch.ones(2)] * 2, moments, lr=1.0, beta=0.5, backend=backend)
    assert same_bits(params[0], params[1]) and same_bits(moments[0], moments[1])
    assert moments[0].tolist() == [0.5, 0.5] and not torch.is_inference_mode_enabled()


def test_offloaded_parameters_without_a_gradient_are_left_alone():
    away, here = torch.ones(3), torch.ones(2)
    away.untyped_storage().resize_(0)
    functional.sign_adam_pp([away, here], [None, torch.ones(2)], [torch.zeros(3), torch.zeros(2)], lr=0.5, beta=0.0)
    assert here.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_versions_count(backend):
    p, m = torch.zeros(2), torch.zeros(2)
    functional.sign_adam_pp([p], [torch.ones(2)], [m], lr=1.0, backend=backend)
    assert (p._version, m._version) == (1, 1)
