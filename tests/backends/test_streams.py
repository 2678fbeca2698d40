"""What the device backends ask of torch's streams, over a torch.cuda that only remembers; and how step data is laid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from signadam_ext import _C, SignAdam
from signadam_ext.backends import device as device_module
from signadam_ext.backends.device import RING_SIZE, PinnedRing, StreamGuarded, StreamLaunch, refuse_capture
from signadam_ext.core import tensors
from signadam_ext.core.step_statistics import COLUMNS
from signadam_ext.engine import statistics

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")


class Calls(list[str]):
    """What was asked for, in order."""

    def __call__(self, what: str) -> Callable[..., None]:
        return lambda *arguments, **options: self.append(what)


class Event:
    def __init__(self, calls: Calls):
        self.calls = calls
        self.synchronize = calls("synchronize")

    def record(self, stream: Stream) -> None:
        self.calls.append(f"record on {stream.name}")


class Stream:
    def __init__(self, name: str, calls: Calls):
        self.name, self.calls = name, calls

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.calls)
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.calls.append(f"{self.name} waits")


class Memory:
    """A tensor of bytes that remembers who copied into it."""

    def __init__(self, name: str, size: int, calls: Calls):
        self.name, self.size, self.calls = name, size, calls

    def numel(self) -> int:
        return self.size

    def data_ptr(self) -> int:
        return 4096

    def record_stream(self, stream: Stream) -> None:
        self.calls.append(f"{self.name} used on {stream.name}")

    def __getitem__(self, index: slice) -> Memory:
        return Memory(self.name, index.stop, self.calls)

    def copy_(self, source: Memory, non_blocking: bool) -> None:
        assert non_blocking and self.size == source.size
        self.calls.append(f"copy {self.size} from {source.name} to {self.name}")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """``torch.cuda`` as device.py sees it: two devices, of which 0 is current, and one stream each."""
    calls = Calls()
    fake = SimpleNamespace(calls=calls, current=0, capturing=set(), Event=lambda: Event(calls))
    fake.streams = {0: Stream("A", calls), 1: Stream("B", calls)}

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        before, fake.current = fake.current, device.index
        try:
            yield
        finally:
            fake.current = before

    def empty(size: int, dtype: torch.dtype, device: Any, pin_memory: bool = False) -> Memory:
        assert dtype == torch.uint8 and pin_memory == (str(device) == "cpu")
        return Memory("host" if pin_memory else "twin", size, calls)

    fake.device = current
    fake.current_stream = lambda device: fake.streams[device.index]
    fake.is_current_stream_capturing = lambda: fake.current in fake.capturing
    own = SimpleNamespace(cuda=fake, empty=empty, uint8=torch.uint8)
    monkeypatch.setattr(device_module, "torch", own)
    return fake


def test_capture_is_asked_of_every_device(cuda: SimpleNamespace) -> None:
    cuda.capturing = {1}
    refuse_capture([])
    refuse_capture([CPU, FIRST])
    with pytest.raises(RuntimeError, match="the current stream of cuda:1 is"):
        refuse_capture([CPU, FIRST, SECOND])
    assert cuda.current == 0


def test_torch_copies_step_data(cuda: SimpleNamespace) -> None:
    ring, stream = PinnedRing(SECOND), cuda.streams[1]
    with ring.filled(100, lambda address: cuda.calls.append(f"write at {address}"), stream) as step:
        assert step.size == 100
        cuda.calls.append("launch")
    assert cuda.calls == [
        "twin used on B",
        "write at 4096",
        "copy 100 from host to twin",
        "launch",
        "record on B",
    ]


def test_buffers_wait_for_their_copy(cuda: SimpleNamespace) -> None:
    ring, stream = PinnedRing(SECOND), cuda.streams[1]
    for turn in range(2 * RING_SIZE):
        cuda.calls.clear()
        with pytest.raises(KeyboardInterrupt), ring.filled(100, cuda.calls("write"), stream):
            raise KeyboardInterrupt
        assert cuda.calls[-1] == "record on B"
        assert ("synchronize" in cuda.calls) == (turn >= RING_SIZE)
        assert turn < RING_SIZE or cuda.calls.index("synchronize") < cuda.calls.index("write")


def test_residents_are_used_on_other_streams(cuda: SimpleNamespace) -> None:
    resident = StreamGuarded(FIRST, Memory("a", 1, cuda.calls), Memory("b", 1, cuda.calls))
    resident.use()
    resident.use_on(None)
    assert cuda.calls == ["record on A"]
    cuda.streams[0] = Stream("C", cuda.calls)
    resident.use()
    assert cuda.calls == ["record on A", "C waits", "a used on C", "b used on C"]
    cuda.calls.clear()
    StreamGuarded(CPU, Memory("c", 1, cuda.calls)).use()
    StreamGuarded(FIRST).use()
    assert cuda.calls == []


@pytest.mark.parametrize("observes", [False, True])
def test_a_launch(cuda: SimpleNamespace, observes: bool) -> None:
    def start(rows: Any, step: Any, stream: Any) -> None:
        assert cuda.current == 1 and stream.name == "B" and rows == [(1.0,)]
        cuda.calls.append("inline" if step is None else f"launch of {step.size}")

    launch = StreamLaunch(SECOND, StreamGuarded(SECOND), observes, lambda rows: 50 * rows, lambda *_: None, start)
    launch.wait()
    assert cuda.calls == []
    launch([(1.0,)])
    done = ["record on B"] if observes else []
    assert cuda.calls == ["twin used on B", "copy 50 from host to twin", "launch of 50", *done, "record on B"]
    cuda.calls.clear()
    launch.wait()
    assert cuda.calls == (["synchronize"] if observes else [])

    cuda.calls.clear()
    small = StreamLaunch(SECOND, StreamGuarded(SECOND), observes, lambda rows: 0, lambda *_: None, start)
    small([(1.0,)])
    assert cuda.calls == ["inline", *done]
    cuda.capturing = {1}
    cuda.calls.clear()
    with pytest.raises(RuntimeError, match="captured"):
        launch([(1.0,)])
    assert cuda.calls == []


def test_statistics_wait_before_they_read() -> None:
    rows = torch.zeros(1, len(COLUMNS), dtype=torch.float64)

    class Launch:
        def __call__(self, rows: Any) -> None: ...

        def wait(self) -> None:
            rows.copy_(torch.tensor([[3.0, 4.0, 1.0, 2.0, 5.0, 0.5]], dtype=torch.float64))

    entry = SimpleNamespace(numel=10, forms=(), index=0, param_id=0)
    bucket = SimpleNamespace(
        chunk_statistics=rows, device=CPU, entries=[entry], table=SimpleNamespace(grads=lambda: [True])
    )
    plan = SimpleNamespace(launches=[(bucket, Launch())], names=["w"])
    found = statistics.collect([plan]).all  # type: ignore[list-item]
    assert (found.passed, found.norm_ratio, found.threshold) == (0.3, 0.5, 0.5) and math.isnan(found.flipped)


@pytest.mark.parametrize(
    ("capability", "expected"), [((9, 0), False), ((8, 6), False), ((12, 0), True), ((10, 3), False), ((7, 5), False)]
)
def test_devices_for_which_the_driver_compiles(capability: tuple[int, int], expected: bool) -> None:
    from signadam_ext.backends.cuda import driver_compiles

    assert driver_compiles("sm_80+sm_90+sm_100+compute_100", *capability) == expected
    assert driver_compiles("sm_90+compute_90", *capability) == (capability >= (10, 0))


@given(tensors=st.integers(1, 10_000), rows=st.integers(1, 50))
def test_step_data_is_aligned(tensors: int, rows: int) -> None:
    """So Triton compiles one kernel for each set of constants."""
    *offsets, size = _C.step_layout(tensors=tensors, scalar_sets=rows)
    assert not any(offset % 16 for offset in offsets)
    grads, rng_keys, numbers, scalars = offsets
    assert (
        grads == 0
        and rng_keys >= 8 * tensors
        and numbers >= rng_keys + 8 * tensors
        and scalars >= numbers + 4 * tensors
    )
    assert size == scalars + 8 * len(_C.SCALARS) * rows


def test_triton_gets_aligned_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from signadam_ext.triton_kernels import update

    seen: list[tuple[torch.Tensor, ...]] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *arguments, **constants: seen.append(arguments)

    monkeypatch.setattr(update, "update", Kernel())
    for count in range(2, 12):
        params = [torch.nn.Parameter(torch.ones(3)) for _ in range(count)]
        for param in params:
            param.grad = torch.ones(3)
        groups = [{"params": params[:1], "lr": 0.5}, {"params": params[1:]}]
        optimizer = SignAdam(groups, lr=1.0, backend="triton")
        optimizer.observe()
        optimizer.step()
    assert len(seen) == 10
    for arguments in seen:
        assert not [x for x in arguments if x.data_ptr() % 16 != 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_misaligned_addresses(dtype: torch.dtype) -> None:
    def stand_in(device: torch.device, address: int) -> Any:
        return SimpleNamespace(device=device, element_size=lambda: dtype.itemsize, data_ptr=lambda: address)

    for offset in range(1, dtype.itemsize):
        message = rf"w on cuda:1 lies at address 0x\w+: must be a multiple of its element size, {dtype.itemsize} bytes"
        with pytest.raises(ValueError, match=message):
            tensors.aligned("w", stand_in(SECOND, 0x7000 + offset))
        tensors.aligned("w", stand_in(CPU, 0x7000 + offset))
    tensors.aligned("w", stand_in(SECOND, 0x7000 + dtype.itemsize))
