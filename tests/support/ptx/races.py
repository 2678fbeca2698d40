"""Who has touched which bytes, and whether all that conflicts is ordered.

Two accesses of different threads to one byte, of which one writes, must be ordered by what PTX promises: by a barrier
of the block, by a synchronisation of the warp, or between blocks by a fence or a release before an atomic that a later
atomic on the same address sees, before a fence or an acquire. Everything that a thread did before a barrier is part
of what any thread of its block releases after it.

A shuffle orders what its lanes have read before with what they write after: what is shuffled depends on what was read,
in all kernels that make use of it. PTX itself promises less, and writes before a shuffle are ordered with nothing.

A stamp says who and when, in 64 bits: block + 1, phase between two barriers of the block, phase of the warp, count of
the thread's own releases, thread + 1. 0 is nobody. Where several threads of a block have read a byte since
a barrier, the stamp has in place of a thread :data:`MANY`, or ``MANY_OF_WARP + warp``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .memory import Region

Array = np.ndarray
U64 = np.uint64
THREAD_BITS, RELEASE_BITS, WARP_BITS, PHASE_BITS = 12, 6, 14, 18
RELEASE_AT = THREAD_BITS
WARP_AT = RELEASE_AT + RELEASE_BITS
PHASE_AT = WARP_AT + WARP_BITS
BLOCK_AT = PHASE_AT + PHASE_BITS
#: Of a grid, so that stamps can tell them apart.
MOST_BLOCKS = (1 << (64 - BLOCK_AT)) - 2
MANY_OF_WARP, MANY = 2048, 4095
#: The bits of the thread; all set they are MANY.
_THREAD = U64(MANY)


def _part(stamps: Any, at: int, bits: int) -> Any:
    return stamps >> U64(at) & U64((1 << bits) - 1)


def describe(stamp: int) -> str:
    thread = stamp & MANY
    who = "several threads" if thread >= MANY_OF_WARP else f"thread {thread - 1}"
    return f"{who} of block {(stamp >> BLOCK_AT) - 1}"


@dataclass
class Clock:
    """What is known of other blocks: ``all`` their threads did before a phase; and what single threads did, until a
    release of theirs in a phase, that one included."""

    all: dict[int, int] = field(default_factory=dict)
    single: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)

    def join(self, other: Clock) -> None:
        for block, phase in other.all.items():
            self.all[block] = max(self.all.get(block, 0), phase)
        for who, until in other.single.items():
            self.single[who] = max(self.single.get(who, (-1, -1)), until)

    def copy(self) -> Clock:
        return Clock(dict(self.all), dict(self.single))

    def knows(self, block: int, thread: int, phase: int, release: int) -> bool:
        return phase < self.all.get(block, 0) or (phase, release) <= self.single.get((block, thread), (-1, -1))


@dataclass
class _Location:
    """What has gone through an atomic location: what its writers released, and the last of them."""

    released: Clock
    last: tuple[int, int]
    stamps: dict[tuple[int, int], tuple[int, int]]


class Order:
    """The clocks of one block."""

    def __init__(self, block: int, threads: int) -> None:
        self.block, self.threads = block, threads
        self.phase = 0
        # Phases of warps, and that in which each last waited for the others.
        self.warps = np.zeros(threads, U64)
        self.waited = np.zeros(threads, U64)
        self.releases = np.zeros(threads, U64)
        self._numbers = np.arange(1, threads + 1, dtype=U64)
        self.known = Clock()
        self.own: dict[int, Clock] = {}
        self._fenced: dict[int, Clock] = {}
        self._seen: dict[int, Clock] = {}
        self._stamp()

    def _stamp(self) -> None:
        block = U64((self.block + 1) << BLOCK_AT | self.phase << PHASE_AT)
        self.stamps = block | self.warps << U64(WARP_AT) | self.releases << U64(RELEASE_AT) | self._numbers

    def barrier(self) -> None:
        """All threads have waited for each other."""
        self.phase += 1
        assert self.phase < 1 << PHASE_BITS
        self.warps[:] = 0
        self.waited[:] = 0
        self.releases[:] = 0
        for clock in self.own.values():
            self.known.join(clock)
        self.own.clear()
        self._stamp()

    def warp_barrier(self, threads: Array, waits: bool) -> None:
        """These threads of one warp have, or have shuffled."""
        self.warps[threads] = phase = self.warps[threads].max() + U64(1)
        if waits:
            self.waited[threads] = phase
        assert int(phase) < 1 << WARP_BITS
        self._stamp()

    def _published(self, thread: int) -> Clock:
        clock = self.known.copy()
        if thread in self.own:
            clock.join(self.own[thread])
        clock.all[self.block] = self.phase
        clock.single[self.block, thread] = (self.phase, int(self.releases[thread]))
        # What follows is not part of it.
        self.releases[thread] += U64(1)
        assert int(self.releases[thread]) < 1 << RELEASE_BITS
        self._stamp()
        return clock

    def fence(self, threads: Array) -> None:
        for thread in map(int, threads):
            if thread in self._seen:
                self.own.setdefault(thread, Clock()).join(self._seen.pop(thread))
            # Of a warp's all threads, few go on to an atomic: their clocks are made then.
            self._fenced[thread] = self._published(thread)

    def atomic(self, region: Region, address: int, thread: int, release: bool, acquire: bool) -> None:
        """An atomic operation of a thread."""
        location = region.atomics.get(address)
        if location is None:
            location = region.atomics[address] = _Location(Clock(), (self.block, thread), {})
        seen = location.released.copy()
        if release:
            location.released.join(self._published(thread))
        elif thread in self._fenced:
            location.released.join(self._fenced[thread])
        if acquire:
            self.own.setdefault(thread, Clock()).join(seen)
        else:
            self._seen.setdefault(thread, Clock()).join(seen)
        location.last = (self.block, thread)
        location.stamps[self.block, thread] = (self.phase, int(self.releases[thread]))

    def _ordered(self, stamp: int, thread: int, read: bool) -> bool:
        """Whether a read or a write of that stamp comes before what a thread of this block does now."""
        block, phase = (stamp >> BLOCK_AT) - 1, int(_part(U64(stamp), PHASE_AT, PHASE_BITS))
        who, release = (stamp & MANY) - 1, int(_part(U64(stamp), RELEASE_AT, RELEASE_BITS))
        warp = int(_part(U64(stamp), WARP_AT, WARP_BITS))
        if block == self.block:
            if phase < self.phase or who == thread:
                return True
            theirs = who + 1 - MANY_OF_WARP if who + 1 >= MANY_OF_WARP else who // 32
            return theirs == thread // 32 and warp < int((self.warps if read else self.waited)[thread])
        if self.known.knows(block, who, phase, release):
            return True
        return thread in self.own and self.own[thread].knows(block, who, phase, release)

    def _conflict(self, stamps: Array, mine: Array, read: bool) -> tuple[int, int] | None:
        """Of earlier reads or writes and stamps of those that follow them: one that is not ordered, and its thread."""
        if stamps.ndim > mine.ndim:
            mine = np.broadcast_to(mine[:, None], stamps.shape)
        # Most are of nobody, of the same thread, or of the same block before a barrier.
        same_block = (stamps ^ mine) >> U64(BLOCK_AT) == 0
        harmless = (stamps == 0) | same_block & (
            ((stamps ^ mine) & _THREAD == 0) | (stamps >> U64(PHASE_AT) < mine >> U64(PHASE_AT))
        )
        if harmless.all():
            return None
        pairs = np.unique(np.stack([stamps[~harmless], mine[~harmless] & _THREAD], 1), axis=0)
        for stamp, number in pairs.tolist():
            if not self._ordered(stamp, number - 1, read):
                return stamp, number - 1
        return None

    def conflicts(self, region: Region, grain: Any, thread: int) -> str | None:
        """What an atomic operation conflicts with: an access of another kind."""
        mine = self.stamps[thread : thread + 1]
        grain = np.atleast_1d(grain)[None, :]
        if region.written is not None and (found := self._conflict(region.written[grain], mine, False)):
            return f"{describe(found[0])} writes it"
        for stamps, _, _ in region.read.values():
            if found := self._conflict(stamps[grain], mine, True):
                return f"{describe(found[0])} reads it"
        return None

    def check(self, region: Region, grains: Array, threads: Array, write: bool) -> tuple[str, int] | None:
        """Notes accesses of threads, one row of grains each. Returns what one conflicts with, and its thread."""
        mine = self.stamps[threads]
        if region.written is not None:
            if found := self._conflict(region.written[grains], mine, False):
                return f"{'written' if write else 'read'} while {describe(found[0])} writes it", found[1]
        if region.atomics:
            for address, location in region.atomics.items():
                for row in np.flatnonzero(
                    (grains == (address - region.base) // region.grain).reshape(len(threads), -1).any(1)
                ):
                    thread = int(threads[row])
                    # It has seen all the others.
                    if location.last == (self.block, thread):
                        continue
                    for (block, who), (phase, release) in location.stamps.items():
                        stamp = (block + 1) << BLOCK_AT | phase << PHASE_AT | release << RELEASE_AT | who + 1
                        if not self._ordered(stamp, thread, False):
                            return f"accessed while {describe(stamp)} changes it atomically", thread
        rows = mine if grains.ndim == 1 else np.broadcast_to(mine[:, None], grains.shape)
        if not write:
            self._note_reads(region, grains, rows)
            return None
        low, high = int(grains.min()), int(grains.max())
        for stamps, first, last in region.read.values():
            if low <= last and first <= high:
                if found := self._conflict(stamps[grains], mine, True):
                    return f"written while {describe(found[0])} reads it", found[1]
        if region.written is None:
            region.written = np.zeros(region.grains, U64)
        region.written[grains] = rows
        now = region.written[grains]
        lost = now != rows
        if lost.any():
            # Several threads of one instruction, which must write the same.
            warps, theirs = (((x & _THREAD) - U64(1)) // U64(32) for x in (rows, now))
            afar = lost & (warps != theirs)
            region.written[grains[lost]] = rows[lost] & ~_THREAD | U64(MANY_OF_WARP) + warps[lost]
            region.written[grains[afar]] = rows[afar] | _THREAD
        return None

    def _note_reads(self, region: Region, grains: Array, rows: Array) -> None:
        stamps, low, high = region.read.get(self.block, (None, 1 << 62, -1))
        if stamps is None:
            stamps = np.zeros(region.grains, U64)
        before = stamps[grains]
        stamps[grains] = rows
        now = stamps[grains]
        # Threads of one instruction that read the same, or another thread since the last barrier.
        others = (now != rows) | (before >> U64(PHASE_AT) == rows >> U64(PHASE_AT)) & ((before ^ rows) & _THREAD != 0)
        if others.any():
            they = before & _THREAD
            warps = ((rows & _THREAD) - U64(1)) // U64(32)
            theirs = np.where(they >= U64(MANY_OF_WARP), they - U64(MANY_OF_WARP), (they - U64(1)) // U64(32))
            fresh = before >> U64(PHASE_AT) == rows >> U64(PHASE_AT)
            afar = others & (((now & _THREAD) - U64(1)) // U64(32) != warps)
            afar |= others & fresh & (theirs != warps)
            stamps[grains[others]] = rows[others] & ~_THREAD | U64(MANY_OF_WARP) + warps[others]
            stamps[grains[afar]] = rows[afar] | _THREAD
        region.read[self.block] = (stamps, min(low, int(grains.min())), max(high, int(grains.max())))
