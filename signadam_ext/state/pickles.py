"""What a pickle would do, read before it is done: torch.load runs none of its code, but trusts its sizes and depths."""

from __future__ import annotations

import pickletools
from typing import Any

import torch
from torch import Tensor

#: Tuples in tuples that no state needs. A hash of them takes a part of the C stack for each.
DEEPEST = 500

#: A function that torch.load calls, and that takes as much memory as its argument says.
_TAKES_MEMORY = b"bytearray"

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
        elif isinstance(each, (dict, list, tuple, set)) and id(each) not in seen:
            seen.add(id(each))
            open_ += [*each.keys(), *each.values()] if isinstance(each, dict) else each
    return sum(storages.values())
