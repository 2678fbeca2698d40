"""Blocks of a grid, executed: all threads of a block at once, always those whose basic block comes first."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .memory import SHARED_BASE, Fault, Memory, Region
from .parser import Unknown, parse
from .races import MOST_BLOCKS, Order
from .translate import Translator

Array = np.ndarray
U32, U64 = np.uint32, np.uint64
WARP = 32
SECTOR = 32
BANKS = 32
REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum}
REDUCTIONS |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
#: Basic blocks that a block of threads may execute: more than any kernel needs.
STEPS = 1_000_000
#: Blocks of a grid that are under way at once where they take turns.
AT_ONCE = 6
#: In which order blocks run: one after the other, or by turns at barriers and atomics.
SCHEDULES = ("in order", "reversed", "shuffled", "interleaved")


@dataclass
class Access:
    """What the accesses of one instruction to global memory cost: 32-byte sectors, and how many would do."""

    requests: int = 0
    sectors: int = 0
    needed: int = 0


@dataclass
class Counts:
    """What a launch has executed.

    Attributes:
        instructions: of the busiest thread of each block, by block. Those that a predicate turns off count.
        accesses: to regions that are streamed, by region and whether they write.
        bank_turns: of accesses to shared memory: turns that they take, and how many would do without conflicts.
    """

    instructions: dict[int, int] = field(default_factory=dict)
    accesses: dict[tuple[str, str], Access] = field(default_factory=dict)
    bank_turns: list[int] = field(default_factory=lambda: [0, 0])


class Program:
    """A kernel, ready to be launched with blocks of so many threads.

    Args:
        text: PTX of the kernel; see :func:`support.ptx.parser.parse`.
        threads: of a block, in one dimension, a multiple of 32.
        dynamic_shared: bytes of shared memory beyond what the kernel declares.
    """

    def __init__(self, text: str, threads: int, dynamic_shared: int = 0) -> None:
        self.kernel = parse(text)
        self.threads = threads
        if threads % WARP:
            raise Unknown(f"blocks of {threads} threads")
        if self.kernel.threads is not None and threads > self.kernel.threads:
            raise Fault(f"{self.kernel.name}: {threads} threads, of at most {self.kernel.threads}")
        symbols, at = {}, 0
        for variable in sorted(self.kernel.variables, key=lambda variable: variable.size == 0):
            if variable.space != "shared":
                raise Unknown(f"{variable.space} memory: {variable.name}")
            at = -(-at // variable.align) * variable.align
            symbols[variable.name] = at
            at += variable.size
        self.shared_bytes = at + dynamic_shared
        room = np.zeros(self.kernel.parameter_bytes + 32, np.uint8)
        skipped = -room.ctypes.data % 16
        self.parameters = room[skipped : skipped + self.kernel.parameter_bytes]
        own = self.parameters.ctypes.data
        places = {each.name: own + each.offset for each in self.kernel.parameters}
        self._translator = Translator(self.kernel, threads, symbols | places, {"": own})
        self._functions: list[Callable[..., Any] | None] = [None] * len(self.kernel.blocks)
        # What a register holds that nothing has been written to.
        kinds = [self.kernel.registers[name] for name in self._translator.kept]
        self.unset = [
            np.ones(threads, bool)
            if kind == "pred"
            else np.frombuffer(b"\xa5" * (int(kind[1:]) // 8 * threads), f"u{int(kind[1:]) // 8}")
            for kind in kinds
        ]

    def function(self, number: int) -> Callable[..., Any]:
        """What executes a basic block."""
        found = self._functions[number]
        if found is None:
            found = self._functions[number] = self._translator.translate(self.kernel.blocks[number])
        return found

    def check(self) -> None:
        """Looks at all of the kernel, of which a launch needs a part.

        Raises:
            Unknown: an instruction of the kernel is.
        """
        for block in self.kernel.blocks:
            self._translator.source(block)

    def line(self, site: int) -> str:
        instruction = self._translator.instructions[site]
        return f"line {instruction.line}: {instruction.text}"

    def run(
        self,
        grid: int,
        parameters: bytes,
        memory: Memory,
        schedule: str = "in order",
        seed: int = 0,
        counts: Counts | None = None,
        races: bool = True,
    ) -> None:
        """Launches a grid of so many blocks.

        Args:
            parameters: bytes, as the kernel declares them.
            schedule: one of ``SCHEDULES``, with a seed where it is random.
            counts: what is executed is added to, where it is given.
            races: whether accesses are checked for races; without, it takes two thirds of the time.

        Raises:
            Fault: the launch does what none may do.
            Unknown: it needs what the emulator lacks.
        """
        if races and grid > MOST_BLOCKS:
            raise Unknown(f"races among {grid} blocks")
        if len(parameters) != len(self.parameters):
            raise Fault(f"{self.kernel.name} takes {len(self.parameters)} bytes of parameters, not {len(parameters)}")
        self.parameters[:] = np.frombuffer(parameters, np.uint8)
        memory.register("parameters", self.parameters.ctypes.data, len(parameters), writable=False)
        drawn = random.Random(seed)
        numbers = list(range(grid))
        if schedule == "reversed":
            numbers.reverse()
        elif schedule != "in order":
            drawn.shuffle(numbers)
        blocks = [Block(self, number, grid, memory, counts, races) for number in numbers]
        try:
            with np.errstate(all="ignore"):
                if schedule == "interleaved":
                    _interleave(blocks, drawn)
                else:
                    for block in blocks:
                        for _ in block.run():
                            pass
        finally:
            memory.remove("parameters")
            for region in memory.regions:
                region.forget()


def _interleave(blocks: Sequence[Block], drawn: random.Random) -> None:
    waiting = [block.run() for block in blocks]
    running: list[Iterator[None]] = []
    while running or waiting:
        while waiting and len(running) < AT_ONCE:
            running.append(waiting.pop(0))
        chosen = drawn.choice(running)
        try:
            next(chosen)
        except StopIteration:
            running.remove(chosen)


class Block:
    """One block of threads. The functions of basic blocks call its methods; ``m`` and ``mask`` are the threads that
    take part, None where all do."""

    def __init__(
        self, program: Program, number: int, grid: int, memory: Memory, counts: Counts | None, races: bool
    ) -> None:
        self.program, self.number, self.memory, self.counts = program, number, memory, counts
        threads = self.threads = program.threads
        self.block_index = np.full(threads, number, U32)
        self.grid_size = np.full(threads, grid, U32)
        self.lanes = np.arange(threads)
        self.order = Order(number, threads) if races else None
        self._parameters: dict[tuple[int, int], Array] = {}
        self._executed = np.zeros(threads, np.int64)

    # Control.

    def run(self) -> Iterator[None]:
        """Executes the block, with a stop wherever other blocks may get their turn."""
        program, threads = self.program, self.threads
        own = np.zeros(program.shared_bytes + 32, np.uint8)
        skipped = -own.ctypes.data % 16
        self._shared = Region("shared memory", own.ctypes.data + skipped, program.shared_bytes, defined=False, grain=4)
        # Values of arithmetic must come from somewhere: what is never written is not 0.
        own[:] = 0xA5
        registers: list[Array] = list(program.unset)
        ready: dict[int, Array | None] = {0: None}
        at_barrier: dict[int, Array | None] = {}
        results: dict[int, Any] = {}
        left = threads
        blocks = program.kernel.blocks
        steps = 0

        def go(to: int, mask: Array | None) -> None:
            if to not in ready:
                ready[to] = mask
                return
            here = ready[to]
            assert here is not None and mask is not None
            both = here | mask
            ready[to] = None if both.all() else both

        while ready:
            number = min(ready)
            mask = ready.pop(number)
            block = blocks[number]
            steps += 1
            if steps > STEPS:
                raise Fault(f"{program.kernel.name}: block {self.number} does not end")
            if block.instructions and block.instructions[0].opcode in ("atom", "red"):
                yield
            count = len(block.instructions) + (block.last is not None)
            if mask is None:
                self._executed += count
            else:
                self._executed[mask] += count
            result = program.function(number)(self, registers, mask)
            if block.ends == "fall":
                go(number + 1, mask)
            elif block.ends == "jump":
                go(block.target, mask)
            elif block.ends == "branch":
                taken = result if mask is None else result & mask
                if taken.all() if mask is None else np.array_equal(taken, mask):
                    go(block.target, mask)
                elif not taken.any():
                    go(number + 1, mask)
                else:
                    go(block.target, taken)
                    go(number + 1, ~taken if mask is None else mask & ~taken)
            elif block.ends == "exit":
                left -= threads if mask is None else int(mask.sum())
            elif block.ends == "leave":
                stays = ~result if mask is None else mask & ~result
                left -= (threads if mask is None else int(mask.sum())) - int(stays.sum())
                if stays.any():
                    go(number + 1, None if stays.all() else stays)
            else:
                if number in at_barrier:
                    before = at_barrier[number]
                    assert before is not None and mask is not None
                    mask = before | mask
                    mask = None if mask.all() else mask
                at_barrier[number] = mask
                results[number] = result
                if ready:
                    continue
                if len(at_barrier) > 1 or mask is not None:
                    places = ", ".join(f"line {blocks[each].last.line}" for each in sorted(at_barrier))  # type: ignore[union-attr]
                    raise Fault(
                        f"{program.kernel.name}: block {self.number}: a barrier ({places}) is not reached by every "
                        "thread, or threads wait at different ones"
                    )
                at_barrier.clear()
                if result is not None:
                    registers[result[2]] = self._joined(result[0], result[1])
                if self.order is not None:
                    self.order.barrier()
                ready[number + 1] = None
                yield
            if not ready and at_barrier:
                raise Fault(
                    f"{program.kernel.name}: block {self.number}: some threads have ended, others wait at a barrier: "
                    + ", ".join(f"line {blocks[each].last.line}" for each in sorted(at_barrier))  # type: ignore[union-attr]
                )
        assert left == 0
        if self.counts is not None:
            self.counts.instructions[self.number] = int(self._executed.max())

    def _joined(self, test: Array, way: str) -> Array:
        if way == "popc":
            return np.full(self.threads, test.sum(), U32)
        return np.full(self.threads, test.any() if way == "or" else test.all())

    def _fault(self, site: int, thread: int, what: str) -> Fault:
        where = f"{self.program.kernel.name}: block {self.number}, thread {thread}: {self.program.line(site)}"
        return Fault(f"{where}: {what}")

    def both(self, m: Array | None, guard: Array) -> Array:
        return guard if m is None else m & guard

    # Memory.

    def parameter(self, address: int, bits: int) -> Array:
        found = self._parameters.get((address, bits))
        if found is None:
            value = self.program.parameters[address : address + bits // 8].view(f"u{bits // 8}")
            found = self._parameters[address, bits] = np.repeat(value, self.threads)
        return found

    def _places(self, site: int, addresses: Array, size: int, space: str, mask: Array | None) -> Iterator[Any]:
        """Of the accesses of the threads in a mask: region, threads, addresses and which of the threads they are."""
        threads = self.lanes if mask is None else np.flatnonzero(mask)
        if threads.size == 0:
            return
        own = addresses if mask is None else addresses[threads]
        if space == "generic":
            inside = own >= U64(SHARED_BASE)
            if inside.all():
                space, own = "shared", own - U64(SHARED_BASE)
            elif inside.any():
                raise Unknown(f"{self.program.line(site)}: shared and global memory at once")
        if space == "shared":
            region = self._shared
            high = int(own.max()) + size
            if int(np.bitwise_or.reduce(own)) & (size - 1):
                thread = int(threads[np.flatnonzero(own & U64(size - 1))[0]])
                raise self._fault(site, thread, f"misaligned for {size} bytes of shared memory")
            if high > region.size:
                thread = int(threads[np.argmax(own)])
                raise self._fault(site, thread, f"byte {high - 1} of {region.size} bytes of shared memory")
            if self.counts is not None:
                self._count_banks(threads, own, size)
            yield region, threads, own + U64(region.address), None
            return
        try:
            parts = self.memory.parts(own, size)
        except Fault as fault:
            raise self._fault(site, int(threads[fault.args[1]]), fault.args[0]) from None
        for region, which in parts:
            if which is None:
                yield region, threads, own, None
            else:
                yield region, threads[which], own[which], which

    def _check(self, site: int, region: Region, threads: Array, addresses: Array, size: int, write: bool) -> None:
        if write and not region.writable:
            raise self._fault(site, int(threads[0]), f"{region.name} is written, which is only read")
        if not region.writable:
            return
        if self.order is None and region.defined:
            return
        grains = region.grains_of(addresses, size)
        if write:
            region.define(grains)
        elif region.undefined(grains):
            raise self._fault(site, int(threads[0]), f"{region.name} is read where nothing has written it")
        if self.order is not None:
            if found := self.order.check(region, grains, threads, write):
                place = int(addresses[np.flatnonzero(threads == found[1])[0]]) - region.address
                raise self._fault(site, found[1], f"a race at byte {place} of {region.name}: it is {found[0]}")

    def load(
        self, site: int, addresses: Array, size: int, count: int, space: str, mask: Array | None, constant: bool
    ) -> Any:
        """ld: an array, or of a vector one for each element."""
        whole = size * count
        kind = f"u{size}"
        found: Any = None
        for region, threads, own, which in self._places(site, addresses, whole, space, mask):
            self._check(site, region, threads, own, whole, False)
            if constant and region.written is not None and region.written.any():
                raise self._fault(site, int(threads[0]), f"{region.name} is written, but read as if it never were")
            if self.counts is not None and region.streamed:
                self._count_sectors(region, "read", threads, own, whole)
            index = ((own - U64(region.base)) // U64(whole)).astype(np.int64)
            view = region.views[size]
            values = view[index] if count == 1 else np.ascontiguousarray(view.reshape(-1, count)[index].T)
            if which is None and mask is None:
                return values
            if found is None:
                found = np.zeros(self.threads if count == 1 else (count, self.threads), kind)
            found[..., threads] = values
        return np.zeros(self.threads if count == 1 else (count, self.threads), kind) if found is None else found

    def store(
        self, site: int, addresses: Array, size: int, values: tuple[Array, ...], space: str, mask: Array | None
    ) -> None:
        """st"""
        count = len(values)
        whole = size * count
        for region, threads, own, _ in self._places(site, addresses, whole, space, mask):
            self._check(site, region, threads, own, whole, True)
            if self.counts is not None and region.streamed:
                self._count_sectors(region, "write", threads, own, whole)
            index = ((own - U64(region.base)) // U64(whole)).astype(np.int64)
            view = region.views[size]
            rows = view.reshape(-1, count)
            for i, value in enumerate(values):
                new = value[threads]
                rows[index, i] = new
                if self.order is not None and not np.array_equal(rows[index, i], new):
                    thread = int(threads[np.flatnonzero(rows[index, i] != new)[0]])
                    raise self._fault(site, thread, f"a race in {region.name}: others write another value at once")

    def atomic(
        self,
        site: int,
        addresses: Array,
        kind: str,
        operation: str,
        operands: tuple[Array, ...],
        space: str,
        order: str,
        mask: Array | None,
    ) -> Array:
        """atom and red: thread by thread."""
        bits = int(kind[1:])
        found = np.zeros(self.threads, f"u{bits // 8}")
        modulus = 1 << bits

        def number(x: int) -> int:
            return x - modulus if kind[0] == "s" and x >= modulus // 2 else x

        for region, threads, own, _ in self._places(site, addresses, bits // 8, space, mask):
            if not region.writable:
                raise self._fault(site, int(threads[0]), f"{region.name} is written, which is only read")
            grains = region.grains_of(own, bits // 8)
            if region.undefined(grains):
                raise self._fault(site, int(threads[0]), f"{region.name} is read where nothing has written it")
            view = region.views[bits // 8]
            for thread, address, grain in zip(threads.tolist(), own.tolist(), grains, strict=True):
                if self.order is not None:
                    if what := self.order.conflicts(region, grain, thread):
                        raise self._fault(site, thread, f"a race in {region.name}: changed atomically while {what}")
                    self.order.atomic(
                        region, address, thread, order in ("release", "acq_rel"), order in ("acquire", "acq_rel")
                    )
                place = (address - region.base) // (bits // 8)
                old = int(view[place])
                x, *rest = (int(operand[thread]) for operand in operands)
                a, b = number(old), number(x)
                new = {
                    "add": a + b,
                    "min": min(a, b),
                    "max": max(a, b),
                    "and": old & x,
                    "or": old | x,
                    "xor": old ^ x,
                    "exch": x,
                    "inc": 0 if old >= x else old + 1,
                    "dec": x if old == 0 or old > x else old - 1,
                    "cas": (rest[0] if old == x else old) if rest else old,
                }[operation]
                view[place] = new % modulus
                found[thread] = old
        return found

    def fence(self, mask: Array | None) -> None:
        """membar and fence"""
        if self.order is not None:
            self.order.fence(self.lanes if mask is None else np.flatnonzero(mask))

    # Warps.

    def _warps(self, site: int, members: Any, mask: Array | None) -> Array:
        """The threads of whole groups that an instruction of warps synchronises."""
        lanes = self.lanes if mask is None else np.flatnonzero(mask)
        named = np.broadcast_to(members, self.threads)[lanes]
        for warp in np.unique(lanes // WARP).tolist():
            here = lanes[lanes // WARP == warp]
            words = np.unique(named[lanes // WARP == warp]).tolist()
            present = sum(1 << (int(thread) % WARP) for thread in here)
            if len(words) != 1 or words[0] != present:
                raise self._fault(
                    site, int(here[0]), f"executed by threads {present:#x} of a warp, but for {words[0]:#x}"
                )
        return lanes

    def warp_barrier(self, site: int, members: Any, mask: Array | None) -> None:
        """bar.warp.sync"""
        lanes = self._warps(site, members, mask)
        if self.order is not None:
            self._pass_warp_barrier(lanes, waits=True)

    def _pass_warp_barrier(self, lanes: Array, waits: bool) -> None:
        assert self.order is not None
        for warp in np.unique(lanes // WARP):
            self.order.warp_barrier(lanes[lanes // WARP == warp], waits)

    def shuffle(
        self, site: int, x: Array, way: str, lane: Any, clamp: Any, members: Any, mask: Array | None
    ) -> tuple[Array, Array]:
        """shfl.sync: what another lane has, and whether there is one."""
        lanes = self._warps(site, members, mask)
        lane = np.broadcast_to(lane, self.threads).astype(np.int64) & 31
        clamp = np.broadcast_to(clamp, self.threads).astype(np.int64)
        own = self.lanes % WARP
        segment, limit = clamp >> 8 & 31, clamp & 31
        highest = own & segment | limit & ~segment
        lowest = own & segment
        if way == "up":
            source = own - lane
            inside = source >= highest
        elif way == "down":
            source = own + lane
            inside = source <= highest
        elif way == "bfly":
            source = own ^ lane
            inside = source <= highest
        else:
            source = lowest | lane & ~segment & 31
            inside = source <= highest
        source = np.where(inside, source, own) + self.lanes // WARP * WARP
        takes_part = np.zeros(self.threads, bool)
        takes_part[lanes] = True
        if not takes_part[source[lanes]].all():
            thread = int(lanes[np.flatnonzero(~takes_part[source[lanes]])[0]])
            raise self._fault(site, thread, "takes from a lane that does not take part")
        if self.order is not None:
            self._pass_warp_barrier(lanes, waits=False)
        return x[source], inside

    def vote(self, site: int, test: Array, way: str, members: Any, mask: Array | None) -> Array:
        """vote.sync"""
        lanes = self._warps(site, members, mask)
        found = np.zeros(self.threads, U32 if way == "ballot" else bool)
        for warp in np.unique(lanes // WARP):
            here = lanes[lanes // WARP == warp]
            if way == "ballot":
                found[here] = sum(1 << int(thread) % WARP for thread in here if test[thread])
            elif way == "uni":
                found[here] = test[here].all() or not test[here].any()
            else:
                found[here] = test[here].any() if way == "any" else test[here].all()
        return found

    def reduce(self, site: int, x: Array, way: str, members: Any, mask: Array | None) -> Array:
        """redux.sync: what all lanes of a group make together, in each of them."""
        lanes = self._warps(site, members, mask)
        x = np.broadcast_to(x, self.threads)
        found = np.zeros(self.threads, x.dtype)
        for warp in np.unique(lanes // WARP):
            here = lanes[lanes // WARP == warp]
            found[here] = REDUCTIONS[way].reduce(x[here], dtype=x.dtype)
        if self.order is not None:
            self._pass_warp_barrier(lanes, waits=False)
        return found

    def _rows(self, addresses: Array, count: int) -> Array:
        """Addresses of the rows of matrices, by warp, matrix and row: those of the first lanes."""
        return addresses.reshape(-1, WARP)[:, : 8 * count].reshape(-1, count, 8)

    def _row_threads(self, count: int) -> Array:
        threads = np.zeros(self.threads, bool)
        threads.reshape(-1, WARP)[:, : 8 * count] = True
        return threads

    def load_matrix(self, site: int, addresses: Array, count: int, transposed: bool, mask: Array | None) -> list[Array]:
        """ldmatrix: 8 x 8 matrices of 16 bits, whose rows the lanes' addresses name."""
        if mask is not None:
            raise self._fault(site, int(np.flatnonzero(mask)[0]), "not executed by all threads")
        parts = list(self._places(site, addresses, 16, "shared", self._row_threads(count)))
        ((region, threads, own, _),) = parts
        self._check(site, region, threads, own, 16, False)
        index = ((self._rows(addresses, count) + U64(region.address - region.base)) // U64(16)).astype(np.int64)
        matrices = region.views[2].reshape(-1, 8)[index]
        if transposed:
            matrices = matrices.swapaxes(-1, -2)
        # A lane gets two neighbours of a row: of row lane / 4, from column lane % 4 * 2 on.
        words = np.ascontiguousarray(matrices).view(U32).reshape(-1, count, WARP)
        return [np.ascontiguousarray(words[:, i]).reshape(-1) for i in range(count)]

    def store_matrix(
        self, site: int, addresses: Array, values: tuple[Array, ...], count: int, transposed: bool, mask: Array | None
    ) -> None:
        """stmatrix"""
        if mask is not None:
            raise self._fault(site, int(np.flatnonzero(mask)[0]), "not executed by all threads")
        ((region, threads, own, _),) = self._places(site, addresses, 16, "shared", self._row_threads(count))
        self._check(site, region, threads, own, 16, True)
        index = ((self._rows(addresses, count) + U64(region.address - region.base)) // U64(16)).astype(np.int64)
        words = np.stack([value.reshape(-1, WARP) for value in values], 1)
        matrices = words.reshape(-1, count, 8, 4).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(-1, -2)
        region.views[2].reshape(-1, 8)[index] = matrices

    # Counts.

    def _count_sectors(self, region: Region, way: str, threads: Array, addresses: Array, size: int) -> None:
        assert self.counts is not None
        access = self.counts.accesses.setdefault((region.name, way), Access())
        warps = (threads // WARP).astype(U64)
        sectors = np.unique(addresses // U64(SECTOR) + (warps << U64(56)))
        access.requests += len(np.unique(warps))
        access.sectors += len(sectors)
        # Of the bytes of a warp, side by side from a border on.
        lanes = np.bincount(warps.astype(np.int64))
        access.needed += int((-(-lanes * size // SECTOR)).sum())

    def _count_banks(self, threads: Array, addresses: Array, size: int) -> None:
        assert self.counts is not None
        # 8 bytes go by halves of a warp, 16 by quarters.
        group = threads // (WARP // max(size // 4, 1))
        words = np.unique(np.stack([group, addresses.astype(np.int64) // max(size, 4)], 1), axis=0)
        per_word = max(size // 4, 1)
        banks = words[:, 1] % (BANKS // per_word)
        turns = np.zeros((int(group.max()) + 1, BANKS // per_word), np.int64)
        np.add.at(turns, (words[:, 0], banks), 1)
        self.counts.bank_turns[0] += int(turns.max(1).sum())
        self.counts.bank_turns[1] += int((turns.max(1) > 0).sum())
