"""What CUDA and Triton share: getting host bytes to a device without synchronizing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

#: Pinned buffers in use at once. None is written again before the copy that reads it is done.
RING_SIZE = 4


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """``host`` on ``device``, copied on its current stream."""
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def refuse_capture(device: torch.device) -> None:
    """Raises RuntimeError while a CUDA graph is being captured: a replay would repeat this step's lr and gradients."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "step() cannot be captured in a CUDA graph: learning rate and gradient addresses of this step would be "
            "baked in; capture forward and backward, and call step() after the replay"
        )


class Resident:
    """Tensors made on one stream and used on whichever is current at each step."""

    def __init__(self, device: torch.device, *tensors: Tensor) -> None:
        self.tensors = tensors
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._stream = torch.cuda.current_stream(device)
            self._ready = self._stream.record_event()

    def use_on(self, stream: torch.cuda.Stream | None) -> None:
        """Makes ``stream`` wait for the tensors, and the allocator for ``stream``, where it is another one."""
        if self._cuda and stream is not None and stream != self._stream:
            stream.wait_event(self._ready)
            for tensor in self.tensors:
                tensor.record_stream(stream)


class PinnedRing:
    """A ring of pinned host buffers and their device twins, for step data that changes between steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slots: list[tuple[Tensor, Tensor, torch.cuda.Event] | None] = [None] * RING_SIZE
        self._next = 0

    @contextmanager
    def slot(self, size: int, stream: torch.cuda.Stream | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Two uint8 tensors of at least ``size`` bytes, pinned and on the device; on the CPU they are one.

        On leaving, the event is recorded after which the pair may be used again; only a host more than ``RING_SIZE``
        steps ahead of its device ever waits for one.
        """
        if size == 0 or stream is None:
            own = torch.empty(size, dtype=torch.uint8)
            yield own, own
            return
        place = self._next
        self._next = (place + 1) % RING_SIZE
        held = self._slots[place]
        if held is not None:
            held[2].synchronize()
        if held is None or held[0].numel() < size:
            room = 1 << (size - 1).bit_length()
            host = torch.empty(room, dtype=torch.uint8, pin_memory=True)
            held = (host, torch.empty(room, dtype=torch.uint8, device=self._device), torch.cuda.Event())
            self._slots[place] = held
        host, twin, event = held
        twin.record_stream(stream)
        try:
            yield host, twin
        finally:
            event.record(stream)
