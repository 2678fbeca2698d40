"""On a GPU: streams, plans that go before their kernels have run, other current devices, capture, errors of others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from support.strategies import same_bits
from torch import Tensor
from torch.nn import Parameter

from signadam_ext import _C, SignAdam, SignSGD, Signum, functional

#: Of a kernel that only waits: about half a second.
CYCLES = 10**9
#: So many that the step's data does not fit the kernel's parameters.
MANY = 3000

pytestmark = pytest.mark.gpu
each_backend = pytest.mark.parametrize("backend", ["cuda", "triton"])
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(autouse=True)
def finished() -> Iterator[None]:
    """What a test leaves running is no business of the next."""
    torch.cuda.synchronize()
    yield
    torch.cuda.synchronize()


def values(count: int, size: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for _ in range(count)]


def on_gpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.to("cuda") for tensor in tensors]


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert all(same_bits(a.detach().cpu(), b.detach()) for a, b in zip(found, expected, strict=True))


def overwrite(like: Sequence[Tensor]) -> list[Tensor]:
    """Zeros in whatever memory the current stream's allocator has to give, of these sizes."""
    return [torch.zeros_like(tensor) for tensor in like for _ in range(4)]


@each_backend
def test_step_data_outlives_a_dropped_plan(backend: str) -> None:
    params, first, second = (values(MANY, 8, seed) for seed in range(3))
    own, own_first, own_second = on_gpu(params), on_gpu(first), on_gpu(second)
    # Whatever is made once: kernels, pinned memory, the allocator's blocks.
    functional.sign_sgd(on_gpu(params), own_first, lr=0.5, backend=backend)
    torch.cuda.synchronize()

    torch.cuda._sleep(CYCLES)
    # Each makes a plan of its own, whose pinned memory is free again before the copy from it has begun.
    functional.sign_sgd(own, own_first, lr=0.5, backend=backend)
    functional.sign_sgd(own, own_second, lr=0.25, backend=backend)
    held = [torch.full((n,), 0xFF, dtype=torch.uint8, pin_memory=True) for n in (1 << 15, 1 << 16, 1 << 17) * 4]
    functional.sign_sgd(params, first, lr=0.5)
    functional.sign_sgd(params, second, lr=0.25)
    assert_equal(own, params)
    del held


@each_backend
def test_more_steps_ahead_than_there_are_buffers(backend: str) -> None:
    params = values(MANY, 8, 0)
    own = [Parameter(tensor) for tensor in on_gpu(params)]
    params = [Parameter(tensor) for tensor in params]
    a, b = SignSGD(own, lr=1.0, backend=backend), SignSGD(params, lr=1.0, backend="cpu")
    for number in range(12):
        if number in (1, 6):
            torch.cuda._sleep(CYCLES // 4)
        for mine, param, grad in zip(own, params, values(MANY, 8, number), strict=True):
            mine.grad, param.grad = grad.to("cuda"), grad
        for optimizer in (a, b):
            optimizer.param_groups[0]["lr"] = 2.0**-number
            optimizer.step()
    assert_equal(own, params)


@each_backend
@pytest.mark.parametrize("non_dense", [False, True])
def test_plan_dropped_on_another_stream(backend: str, non_dense: bool) -> None:
    def parameters(device: str) -> list[Parameter]:
        whole = [tensor.to(device).view(-1, 2) for tensor in values(40, 5000, 0)]
        return [Parameter(tensor[:, 0] if non_dense else tensor) for tensor in whole]

    own, params = parameters("cuda"), parameters("cpu")
    a, b = Signum(own, lr=0.5, backend=backend), Signum(params, lr=0.5, backend="cpu")
    side = torch.cuda.Stream()
    for number in range(2):
        for i, (mine, param) in enumerate(zip(own, params, strict=True)):
            grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(100 * number + i))
            mine.grad, param.grad = grad.to("cuda"), grad
        torch.cuda.synchronize()
        if number == 0:
            a.step()
        else:
            with torch.cuda.stream(side):
                torch.cuda._sleep(CYCLES)
                a.step()
        b.step()
    state = [a.state[param] for param in own]
    del a
    # On the stream that made the plan's tensors, which is idle.
    sizes = [torch.empty(n, dtype=torch.uint8, device="cuda") for n in (512, 1024, 2048, 4096, 8192)]
    held = overwrite([*own, *sizes])
    torch.cuda.synchronize()
    assert_equal(own, params)
    assert_equal([entry["exp_avg"] for entry in state], [b.state[param]["exp_avg"] for param in params])
    del held


@each_backend
def test_first_step_on_a_stream_that_does_not_wait(backend: str) -> None:
    """What the first step makes is made on its stream; the second waits for it on another."""
    params = [Parameter(tensor) for tensor in values(20, 3000, 0)]
    own = [Parameter(tensor.detach().to("cuda")) for tensor in params]
    for mine, param, grad in zip(own, params, values(20, 3000, 1), strict=True):
        mine.grad, param.grad = grad.to("cuda"), grad
    a, b = SignSGD(own, lr=0.5, backend=backend), SignSGD(params, lr=0.5, backend="cpu")
    torch.cuda.synchronize()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        torch.cuda._sleep(CYCLES)
        a.step()
    with torch.cuda.stream(second):
        second.wait_stream(first)
        a.step()
    torch.cuda.synchronize()
    b.step()
    b.step()
    assert_equal(own, params)


@each_backend
def test_statistics_wait_for_the_stream_of_the_step(backend: str) -> None:
    params = [Parameter(tensor) for tensor in values(3, 20000, 0)]
    own = [Parameter(tensor.detach().to("cuda")) for tensor in params]
    a = SignSGD(own, lr=0.5, alpha=0.7, backend=backend)
    b = SignSGD(params, lr=0.5, alpha=0.7, backend="cpu")
    a.observe()
    b.observe()
    side = torch.cuda.Stream()
    for number in range(2):
        for mine, param, grad in zip(own, params, values(3, 20000, 1 + number), strict=True):
            mine.grad, param.grad = grad.to("cuda"), grad
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            if number == 1:
                torch.cuda._sleep(CYCLES)
            a.step()
        b.step()
        assert [x.passed for x in a.statistics().tensors] == [x.passed for x in b.statistics().tensors]


def test_error_of_an_earlier_call_is_no_failed_launch() -> None:
    if not hasattr(_C, "cuda_kernel_info"):
        pytest.skip("the module was built without CUDA")
    param = Parameter(torch.zeros(10, device="cuda"))
    optimizer = SignSGD([param], lr=1.0, backend="cuda")
    param.grad = torch.ones(10, device="cuda")
    optimizer.step()
    with pytest.raises(RuntimeError, match="to select the device"):
        _C.cuda_kernel_info(torch.cuda.device_count())
    optimizer.step()
    assert torch.equal(param.detach().cpu(), torch.full((10,), -2.0))


@each_backend
@pytest.mark.parametrize("planned", [False, True])
def test_capture_is_refused_before_anything_is_made(backend: str, planned: bool) -> None:
    param = Parameter(torch.ones(10, device="cuda"))
    optimizer = SignAdam([param], lr=1.0, backend=backend)
    param.grad = torch.ones(10, device="cuda")
    if planned:
        optimizer.step()
    before = param.detach().cpu()
    state = {name: value.clone() for name, value in optimizer.state.get(param, {}).items() if isinstance(value, Tensor)}
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"), torch.cuda.graph(graph):
        optimizer.step()
    torch.cuda.synchronize()
    assert torch.equal(param.detach().cpu(), before)
    after = optimizer.state.get(param, {})
    assert state.keys() == {name for name, value in after.items() if isinstance(value, Tensor)}
    assert all(torch.equal(after[name], value) for name, value in state.items())
    optimizer.step()
    assert not torch.equal(param.detach().cpu(), before)


@two_devices
@each_backend
def test_capture_is_asked_of_the_tensors_device(backend: str) -> None:
    param = Parameter(torch.ones(10, device="cuda:1"))
    optimizer = SignSGD([param], lr=1.0, backend=backend)
    param.grad = torch.ones(10, device="cuda:1")
    optimizer.step()
    refused = pytest.raises(RuntimeError, match="cannot be captured")
    with torch.cuda.device(1), refused, torch.cuda.graph(torch.cuda.CUDAGraph()), torch.cuda.device(0):
        optimizer.step()
    mode = "thread_local"
    with torch.cuda.device(0), torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode=mode):
        optimizer.step()
    assert torch.equal(param.detach().cpu(), torch.full((10,), -1.0))


@two_devices
@each_backend
def test_no_context_on_a_device_that_nobody_uses(backend: str) -> None:
    program = f"""
import torch
from signadam_ext import SignSGD
param = torch.nn.Parameter(torch.zeros(10, device="cuda:1"))
optimizer = SignSGD([param], lr=1.0, backend={backend!r})
for _ in range(3):
    param.grad = torch.ones(10, device="cuda:1")
    optimizer.step()
torch.cuda.synchronize(1)
assert param[0].item() == -3
assert not torch._C._cuda_hasPrimaryContext(0)
assert torch.cuda.current_device() == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).resolve().parents[2])


class At:
    """Memory of another tensor, some bytes later, as an array that torch takes over without a copy."""

    def __init__(self, memory: Tensor, count: int, offset: int):
        self.memory = memory
        self.__cuda_array_interface__ = {
            "shape": (count,),
            "typestr": "<f4",
            "data": (memory.data_ptr() + offset, False),
            "version": 2,
        }


def misaligned(count: int) -> Tensor:
    memory = torch.zeros(4 * count + 4, dtype=torch.uint8, device="cuda")
    found = torch.as_tensor(At(memory, count, 2), device="cuda")
    assert found.data_ptr() == memory.data_ptr() + 2
    return found


@each_backend
@pytest.mark.parametrize("which", ["parameter", "gradient", "later gradient", "state"])
def test_misaligned_addresses_are_refused(backend: str, which: str) -> None:
    message = "parameter 'w'.* address .*multiple of its element size, 4"
    if which == "parameter":
        with pytest.raises(ValueError, match=message):
            Signum([("w", Parameter(misaligned(10)))], lr=1.0, backend=backend)
        return
    param = Parameter(torch.ones(10, device="cuda"))
    optimizer = Signum([("w", param)], lr=1.0, backend=backend)
    param.grad = torch.ones(10, device="cuda")
    if which == "later gradient":
        optimizer.step()
    if which == "state":
        optimizer.step()
        optimizer.state[param]["exp_avg"] = misaligned(10)
    else:
        param.grad = misaligned(10)
    before = param.detach().cpu()
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(param.detach().cpu(), before)


def test_triton_compiles_one_kernel_whatever_the_number_of_tensors(tmp_path: Path) -> None:
    program = """
import torch
from signadam_ext import AdamW
for tensors in (1, 2, 3, 4, 5, 46, 148):
    for groups in (1, 2):
        params = [torch.nn.Parameter(torch.ones(100, device="cuda")) for _ in range(tensors * groups)]
        cut = [{"params": params[i::groups], "lr": 0.1 * (i + 1)} for i in range(groups)]
        optimizer = AdamW(cut, backend="triton")
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
"""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    folder = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=folder, env=environment)
    assert len(list(tmp_path.rglob("update.json"))) == 1
