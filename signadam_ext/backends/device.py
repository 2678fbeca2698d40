"""What CUDA and Triton share: streams, and getting host bytes to a device without synchronizing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import ScalarSet

#: Pinned buffers in use at once. None is written again before the copy that reads it is done.
RING_SIZE = 4


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """``host`` on ``device``, copied on its current stream."""
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def is_current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a CUDA device the current one; leaving it makes no context on the one that was. Nothing for others."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def is_capturing() -> bool:
    """Whether the current stream records a CUDA graph. To be asked where there is a CUDA device."""
    return torch.cuda.is_current_stream_capturing()


def refuse_capture(devices: Iterable[torch.device]) -> None:
    """Raises while the current stream of one of the devices records a CUDA graph, into which a step cannot go.

    Raises:
        RuntimeError: a replay would repeat this step's learning rate and gradient addresses.
    """
    for device in devices:
        if device.type != "cuda":
            continue
        with is_current(device):
            refused = is_capturing()
        if refused:
            raise RuntimeError(
                f"step() cannot be captured in a CUDA graph, as the current stream of {device} is: learning rate and "
                "gradient addresses of this step would be baked in; make the optimizer with capturable=True and take "
                "a step before the capture, or capture forward and backward, and call step() after the replay"
            )


class StreamGuarded:
    """Buffers allocated on one CUDA stream and used on others: adds the waits and the ``record_stream`` calls."""

    def __init__(self, device: torch.device, *tensors: Tensor) -> None:
        self.tensors = tensors
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda" and tensors:
            self._stream = torch.cuda.current_stream(device)
            self._ready = self._stream.record_event()

    def use_on(self, stream: torch.cuda.Stream | None) -> None:
        """Makes ``stream`` wait for the tensors, and the allocator for ``stream``, where it is another one."""
        if self._stream is not None and stream is not None and stream != self._stream:
            stream.wait_event(self._ready)
            for tensor in self.tensors:
                tensor.record_stream(stream)

    def use(self) -> None:
        """Calls :meth:`use_on` with the stream that is current on the tensors' device."""
        if self._stream is not None and not is_capturing():  # before a capture, all that went before is waited for
            self.use_on(torch.cuda.current_stream(self._device))


class PinnedRing:
    """A ring of pinned host buffers and their device twins, for step data that changes between steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slots: list[tuple[Tensor, Tensor, torch.cuda.Event] | None] = [None] * RING_SIZE
        self._next = 0

    @contextlib.contextmanager
    def filled(
        self, size: int, write: Callable[[int], None], stream: torch.cuda.Stream | None
    ) -> Iterator[Tensor | None]:
        """``size`` bytes on the device (None: 0 bytes), as ``write`` leaves them at the host address that it gets.

        On leaving, the event is recorded after which the slot may be used again; only a host more than ``RING_SIZE``
        steps ahead of its device ever waits for one.
        """
        if size == 0:
            yield None
            return
        if stream is None:
            own = torch.empty(size, dtype=torch.uint8, device="cpu")
            write(own.data_ptr())
            yield own
            return
        place = self._next
        self._next = (place + 1) % RING_SIZE
        held = self._slots[place]
        if held is not None:
            held[2].synchronize()
        if held is None or held[0].numel() < size:
            room = 1 << (size - 1).bit_length()
            host = torch.empty(room, dtype=torch.uint8, device="cpu", pin_memory=True)
            held = (host, torch.empty(room, dtype=torch.uint8, device=self._device), torch.cuda.Event())
            self._slots[place] = held
        host, twin, event = held
        twin.record_stream(stream)
        write(host.data_ptr())
        try:
            # By torch, whose allocator keeps pinned memory back for a copy that it knows of: this ring may be gone
            # before the copy has run.
            twin[:size].copy_(host[:size], non_blocking=True)
            yield twin[:size]
        finally:
            event.record(stream)


class StreamLaunch:
    """A launch on the stream that is current on its device.

    Args:
        device: of all tensors.
        resident: what the kernels use at every step beside the step's data and what belongs to the user.
        observes: whether someone may :meth:`wait` for what the kernels leave.
        size: bytes of step data to copy for so many sets of scalars; 0 where there are none to copy.
        write: puts the step data of these sets at a host address.
        start: starts the kernels, given the sets, the step data on the device (None: none was copied) and the stream
            (None: on the CPU). The device is the current one.
    """

    def __init__(
        self,
        device: torch.device,
        resident: StreamGuarded,
        observes: bool,
        size: Callable[[int], int],
        write: Callable[[Sequence[ScalarSet], int], None],
        start: Callable[[Sequence[ScalarSet], Tensor | None, torch.cuda.Stream | None], None],
    ) -> None:
        self._device = device
        self._resident = resident
        self._observes = observes
        self._size, self._write, self._start = size, write, start
        self._ring = PinnedRing(device)
        self._done: torch.cuda.Event | None = None

    def __call__(self, scalar_sets: Sequence[ScalarSet]) -> None:
        """Starts the kernels.

        Raises:
            RuntimeError: the stream records a CUDA graph, or CUDA's own reason; nothing has been written then.
        """
        refuse_capture((self._device,))
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        self._resident.use_on(stream)
        with (
            is_current(self._device),
            self._ring.filled(
                self._size(len(scalar_sets)), lambda address: self._write(scalar_sets, address), stream
            ) as step,
        ):
            self._start(scalar_sets, step, stream)
            if self._observes and stream is not None:
                self._done = stream.record_event(self._done)

    def wait(self) -> None:
        """Waits until the kernels of the last call are done, on whichever stream they run."""
        if self._done is not None:
            self._done.synchronize()
