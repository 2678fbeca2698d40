"""Threads change no bit: those of the kernels, those of a program, and those that a fork leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.optimizer_contract import ROWS, assert_same, copies, each_row, gradient, make, parameters, params_of, train

from signadam_ext import SignAdamPP

#: Several chunks and units of work each, and many small tensors besides.
SHAPES = ((140_001,), (400, 300), *[(64,)] * 50)


def gradients_of(optimizer, steps):
    return [[gradient(param, step, i) for i, param in enumerate(params_of(optimizer))] for step in steps]


def train_on(optimizer, gradients):
    """Steps with gradients made before, so that no operation of torch's own runs meanwhile."""
    for grads in gradients:
        for param, grad in zip(params_of(optimizer), grads, strict=True):
            param.grad = grad
        optimizer.step()


@pytest.fixture
def torch_settings():
    """Puts back what a test changes for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@each_row
def test_number_of_threads(row, torch_settings):
    optimizers = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        optimizers.append(make(row, parameters(*SHAPES)))
        train(optimizers[-1], range(3))
    for other in optimizers[1:]:
        assert_same(optimizers[0], other)


@each_row
def test_number_of_threads_may_change_between_steps(row, torch_settings):
    optimizer, expected = make(row, parameters(*SHAPES)), make(row, parameters(*SHAPES))
    for step, threads in enumerate((2, 1, 4, 3)):
        torch.set_num_threads(threads)
        train(optimizer, [step])
    torch.set_num_threads(1)
    train(expected, range(4))
    assert_same(optimizer, expected)


@pytest.mark.parametrize("kernel_threads", [1, 2])
def test_optimizers_on_several_threads(kernel_threads, torch_settings):
    """One optimizer for each row, all stepping at once, as if one after the other."""
    torch.set_num_threads(kernel_threads)
    serial, parallel = ([make(row, parameters(*SHAPES)) for row in ROWS.values()] for _ in range(2))
    gradients = gradients_of(serial[0], range(10))
    for optimizer in serial:
        train_on(optimizer, gradients)
    start = threading.Barrier(len(parallel))

    def work(optimizer):
        torch.set_num_threads(kernel_threads)  # which is each thread's own in torch
        start.wait()
        train_on(optimizer, gradients)

    with ThreadPoolExecutor(len(parallel)) as pool:
        list(pool.map(work, parallel))
    for a, b in zip(serial, parallel, strict=True):
        assert_same(a, b)


def test_backward_and_step_on_another_thread():
    """A thread may step what another has made, planned and stepped."""
    (param,) = parameters((300, 200))
    optimizer, expected = make(ROWS["sign_adam"], [param]), make(ROWS["sign_adam"], copies([param]))
    train(expected, range(4))
    for step in range(4):
        thread = threading.Thread(target=train, args=(optimizer, [step]))
        thread.start()
        thread.join()
    assert_same(optimizer, expected)


FORK = """
import os, signal, sys, torch
signal.alarm(100)  # children do not end with a parent that is killed
torch.set_num_threads(2)
sys.path[:0] = {paths!r}
from support.optimizer_contract import ROWS, assert_same, make, parameters
from test_threads import SHAPES, gradients_of, train_on

row = ROWS[{row!r}]
optimizer, expected = make(row, parameters(*SHAPES)), make(row, parameters(*SHAPES))
gradients = gradients_of(optimizer, range(4))  # on threads of torch's own, which no child has either

def same():
    torch.set_num_threads(1)  # torch does not notice that its threads are gone
    train_on(expected, gradients)
    assert_same(optimizer, expected)

before = {before}
train_on(optimizer, gradients[:before])
child = os.fork()
if child == 0:
    signal.alarm(100)
    train_on(optimizer, gradients[before:3])
    grandchild = os.fork()
    signal.alarm(100)
    train_on(optimizer, gradients[3:])
    same()
    os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) if grandchild else 0)
train_on(optimizer, gradients[before:])  # the parent's threads are still there
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
same()
print("done", status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("row, before", [("sign_adam_pp-adaptive", 2), ("sign_sgd-gated", 0)])
def test_step_after_fork(row, before):
    """In a child, its own child, and the parent, whether or not the parent had taken a step before.

    If it had not, the rule has no moments, whose zeros torch would write on threads that are gone.
    """
    script = FORK.format(paths=[str(folder) for folder in Path(__file__).resolve().parents[:2]], row=row, before=before)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["done", "0"], done.stderr


SUBNORMAL = (1e-45, -3e-42, 1e-39, -1.1e-38)


#: Rules to which a subnormal gradient is something: its square is 0.
LINEAR = [row for name, row in ROWS.items() if name not in ("msvag", "msvag_minibatch", "adam_amsgrad")]


@pytest.mark.parametrize("row", LINEAR, ids=lambda row: row.id)
def test_flush_denormal_changes_no_bit(row, torch_settings):
    """Subnormals stay what they are in the kernels, and torch's own setting stays what it was."""
    torch.set_num_threads(2)
    threshold_state = {"alpha": 0.0} if "alpha" in row.hyperparameters else {}
    optimizer, expected = (
        make(row, [torch.nn.Parameter(torch.tensor(SUBNORMAL * 5000))], lr=1e-40, **threshold_state) for _ in range(2)
    )
    gradients = [torch.tensor(SUBNORMAL[step:] + SUBNORMAL[:step]).repeat(5000) for step in range(3)]

    def run(optimizer):
        (param,) = params_of(optimizer)
        for param.grad in gradients:
            optimizer.step()

    run(expected)
    assert 0 < params_of(expected)[0].abs().max() < torch.finfo(torch.float32).tiny
    assert not torch.equal(params_of(expected)[0], params_of(optimizer)[0])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormals")
    run(optimizer)
    assert (torch.tensor(SUBNORMAL) * 1.0).count_nonzero() == 0, "torch no longer flushes"
    torch.set_flush_denormal(False)
    assert_same(optimizer, expected)


@pytest.mark.parametrize("asked", ["state_dict", "save_state"])
def test_a_confidence_function_that_waits_for_a_thread_that_saves(asked, tmp_path):
    """Is an error there, and no deadlock."""
    param = torch.nn.Parameter(torch.ones(3))
    found = []

    def confidence(g, alpha):
        def save():
            try:
                optimizer.state_dict() if asked == "state_dict" else optimizer.save_state(tmp_path / "state")
            except RuntimeError as error:
                found.append(str(error))

        thread = threading.Thread(target=save)
        thread.start()
        thread.join(timeout=60)
        assert not thread.is_alive()
        return g.sign()

    optimizer = SignAdamPP([param], confidence=confidence)
    param.grad = torch.ones(3)
    optimizer.step()
    assert len(found) == 1 and "runs a confidence function" in found[0]
