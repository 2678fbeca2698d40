"""What a pickle would do, read before it is done: torch.load runs none of its code, but trusts its sizes and depths."""

from __future__ import annotations

import pickletools
from typing import Any

import torch
from torch import Tensor

#: Tuples in tuples that no state needs. A hash of them takes a part of the C stack for each.
DEEPEST = 500

#: So many entries may a state have that lists the same container again and again; others may have any number.
MOST_REPEATED = 1_000_000

#: A function that torch.load calls, and that takes as much memory as its argument says.
_TAKES_MEMORY = b"bytearray"

_CONTAINERS = (dict, list, tuple, set)

_MARK = -1


def check(pickle: bytes) -> None:
    """Raises where a pickle makes tuples in tuples so deep that their hash overflows the stack, or a bytearray.

    Raises:
        ValueError: such a pickle, or none.
    """
    if _TAKES_MEMORY in pickle and any(
        opcode.name == "GLOBAL" and str(argument).endswith("bytearray")
        for opcode, argument, _ in pickletools.genops(pickle)
    ):
        raise ValueError("it holds a bytearray")
    # A level takes a byte at least.
    if len(pickle) > DEEPEST and _depth(pickle) > DEEPEST:
        raise ValueError(f"it holds more than {DEEPEST} tuples in one another")


def _depth(pickle: bytes) -> int:
    """How deep tuples lie in tuples, or a little more than :data:`DEEPEST`. torch.load knows protocol 2 alone."""
    deepest = 0
    stack: list[int] = []  # of each object the depth, 0 for everything but tuples
    memo: dict[Any, int] = {}

    def popped(opcode: pickletools.OpcodeInfo) -> list[int]:
        before = opcode.stack_before
        count = before.index(pickletools.markobject) if pickletools.markobject in before else None
        if count is None:
            if len(before) > len(stack):
                raise ValueError(f"its {opcode.name} lacks an argument")
            at = len(stack) - len(before)
            taken = stack[at:]
            del stack[at:]
            return taken
        at = len(stack) - 1 - stack[::-1].index(_MARK)  # ValueError where there is none
        taken = stack[at + 1 :]
        del stack[max(at - count, 0) :]
        return taken

    for opcode, argument, _ in pickletools.genops(pickle):
        name = opcode.name
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1] if stack else 0
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo.get(argument, 0))
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            depth = 1 + max(popped(opcode), default=0)
            deepest = max(deepest, depth)
            if deepest > DEEPEST:
                break
            stack.append(depth)
        else:
            popped(opcode)
            stack.extend(0 for _ in opcode.stack_after)
    return deepest


def _held(container: Any) -> list[Any]:
    """The containers right in a container."""
    held = [*container.keys(), *container.values()] if isinstance(container, dict) else container
    return [each for each in held if isinstance(each, _CONTAINERS)]


def check_repeated(label: str, value: Any) -> None:
    """Raises where containers hold one another so often that what walks through them, or shows them, does not end.

    A list of ten times a list of ten times a list takes few bytes in a pickle, and has as many entries as one likes.

    Raises:
        ValueError: such containers, or one that holds itself.
    """
    if not isinstance(value, _CONTAINERS):
        return
    sizes: dict[int, int] = {}  # of each container, with all that it holds; 0 while that is being counted
    entries = 0
    open_ = [value]
    while open_:
        each = open_[-1]
        held = _held(each)
        if id(each) not in sizes:
            sizes[id(each)] = 0
            entries += len(each)
            if any(sizes.get(id(inner)) == 0 for inner in held):
                raise ValueError(f"{label} holds a {type(each).__name__} that holds itself")
            open_ += [inner for inner in held if id(inner) not in sizes]
        else:
            open_.pop()
            sizes[id(each)] = 1 + len(each) + sum(sizes[id(inner)] for inner in held)
    if sizes[id(value)] > max(MOST_REPEATED, 4 * entries):
        raise ValueError(f"{label} has more than {MOST_REPEATED} entries in containers that it repeats")


def tensor_bytes(value: Any) -> int:
    """The memory of all tensors in a value that a pickle has made."""
    storages: dict[int, int] = {}
    open_, seen = [value], set()
    while open_:
        each = open_.pop()
        if isinstance(each, Tensor):
            if each.layout == torch.strided and torch._C._has_storage(each) and each.device.type != "meta":
                storage = each.untyped_storage()
                storages[storage._cdata] = storage.nbytes()
        elif isinstance(each, _CONTAINERS) and id(each) not in seen:
            seen.add(id(each))
            open_ += [*each.keys(), *each.values()] if isinstance(each, dict) else each
    return sum(storages.values())
