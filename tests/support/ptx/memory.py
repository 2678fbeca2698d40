"""Memory that a launch may touch: this process's own, region by region, and what each access to it must keep to."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from typing import Any

import numpy as np

Array = np.ndarray
#: Where generic addresses of shared and of local memory begin; those of this process are smaller.
SHARED_BASE = 1 << 60
LOCAL_BASE = 1 << 61


class Fault(Exception):
    """What a launch must not do."""


class Region:
    """Memory of this process from an address on.

    Attributes:
        writable: whether kernels may write it.
        defined: False where a launch must write it before it reads it.
        streamed: whether each element is used once, as parameters, gradients and state are.
        grain: bytes that are always accessed together.
        written: for each grain, who wrote it last in a launch; ``read`` the same by block. See races.py.
    """

    def __init__(
        self,
        name: str,
        address: int,
        size: int,
        *,
        writable: bool = True,
        defined: bool = True,
        streamed: bool = False,
        grain: int = 1,
    ) -> None:
        self.name, self.address, self.size = name, address, size
        self.writable, self.defined, self.streamed = writable, defined, streamed
        self.end = address + size
        # To 16 bytes on both sides, which no page ends within.
        self.base = address // 16 * 16
        room = -(-(self.end - self.base) // 16) * 16
        bytes_ = np.ctypeslib.as_array((ctypes.c_uint8 * room).from_address(self.base))
        self.views = {size: bytes_.view(f"u{size}") for size in (1, 2, 4, 8)}
        self.grain = grain if address % grain == 0 and size % grain == 0 else 1
        self.forget()
        self._defined = None if defined else np.zeros(room // self.grain, bool)

    @property
    def grains(self) -> int:
        return self.views[1].size // self.grain

    def forget(self) -> None:
        """A launch has ended: what it did comes before all that follows."""
        self.written: Array | None = None
        self.read: dict[int, tuple[Array, int, int]] = {}
        self.atomics: dict[int, Any] = {}

    def refine(self, size: int) -> None:
        """Makes grains of ``size`` bytes."""
        times = self.grain // size
        self.grain = size
        if self.written is not None:
            self.written = np.repeat(self.written, times)
        self.read = {
            block: (np.repeat(stamps, times), low * times, high * times + times - 1)
            for block, (stamps, low, high) in self.read.items()
        }
        if self._defined is not None:
            self._defined = np.repeat(self._defined, times)

    def grains_of(self, addresses: Array, size: int) -> Array:
        """Indices of the grains of accesses of ``size`` bytes, one row or entry each."""
        if size < self.grain:
            self.refine(size)
        first = (addresses - np.uint64(self.base)).astype(np.int64) // self.grain
        count = size // self.grain
        return first if count == 1 else first[:, None] + np.arange(count)

    def define(self, grains: Array) -> None:
        if self._defined is not None:
            self._defined[grains] = True

    def undefined(self, grains: Array) -> bool:
        return self._defined is not None and not self._defined[grains].all()


class Memory:
    """All regions of a launch or of several."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self._starts: list[int] = []

    def register(self, name: str, address: int, size: int, **facts: Any) -> None:
        """Adds memory, which must not overlap with what is there. See :class:`Region` for the facts."""
        if size == 0:
            return
        region = Region(name, address, size, **facts)
        place = bisect_right(self._starts, address)
        for other in self.regions[max(place - 1, 0) : place + 1]:
            assert region.end <= other.address or other.end <= address, f"{name} overlaps with {other.name}"
        self.regions.insert(place, region)
        self._starts.insert(place, address)

    def remove(self, name: str) -> None:
        self.regions = [region for region in self.regions if region.name != name]
        self._starts = [region.address for region in self.regions]

    def region_of(self, address: int) -> Region | None:
        """The region that an address lies in."""
        place = bisect_right(self._starts, address) - 1
        if place < 0 or address >= self.regions[place].end:
            return None
        return self.regions[place]

    def parts(self, addresses: Array, size: int) -> list[tuple[Region, Array | None]]:
        """The regions that accesses of ``size`` bytes go to, each with which of them (None: all).

        Raises:
            Fault: one is misaligned, or leaves the regions; its second argument is the index of the access.
        """
        if int(np.bitwise_or.reduce(addresses)) & (size - 1):
            worst = int(np.flatnonzero(addresses & np.uint64(size - 1))[0])
            raise Fault(f"address {int(addresses[worst]):#x} is misaligned for {size} bytes", worst)
        low, high = int(addresses.min()), int(addresses.max())
        region = self.region_of(low)
        if region is not None and high + size <= region.end:
            return [(region, None)]
        found = []
        left = np.ones(addresses.shape, bool)
        while left.any():
            first = int(np.flatnonzero(left)[0])
            region = self.region_of(int(addresses[first]))
            inside = (
                None
                if region is None
                else left
                & (addresses >= np.uint64(region.address))
                & (addresses + np.uint64(size) <= np.uint64(region.end))
            )
            if region is None or inside is None or not inside[first]:
                raise Fault(self._miss(int(addresses[first]), size), first)
            found.append((region, np.flatnonzero(inside)))
            left &= ~inside
        return found

    def _miss(self, address: int, size: int) -> str:
        place = bisect_right(self._starts, address) - 1
        beside = []
        if place >= 0:
            before = self.regions[place]
            beside.append(f"{address - before.end:+d} bytes from the end of {before.name}")
        if place + 1 < len(self.regions):
            after = self.regions[place + 1]
            beside.append(f"{after.address - address} bytes before {after.name}")
        return f"{size} bytes at {address:#x} lie in no region: {', '.join(beside) or 'there is none'}"
