"""What a pickle would do, read before it is done: torch.load runs none of its code, but trusts its sizes and depths."""

from __future__ import annotations

import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.serialization import StorageType

#: Tuples in tuples that no state needs. A hash of them takes a part of the C stack for each.
DEEPEST = 500

#: So many entries may a state have that lists the same container again and again; others may have any number.
MOST_REPEATED = 1_000_000

#: A function that torch.load calls, and that takes as much memory as its argument says.
_TAKES_MEMORY = b"bytearray"

_CONTAINERS = (dict, list, tuple, set)

_MARK = object()

#: The opcodes that take everything to a mark, and how many objects each takes, before the mark where there is one.
_TO_A_MARK = {opcode.name for opcode in pickletools.opcodes if pickletools.markobject in opcode.stack_before}
_TAKEN = {
    opcode.name: (
        opcode.stack_before.index(pickletools.markobject) if opcode.name in _TO_A_MARK else len(opcode.stack_before)
    )
    for opcode in pickletools.opcodes
}


@dataclass(frozen=True, eq=False)
class _Tuple:
    """A tuple as a pickle makes it.

    Attributes:
        depth: how deep tuples lie in it, itself counted.
        items: strings and numbers, a global's module and name, tuples, and None for what is anything else.
    """

    depth: int
    items: list[Any]


def check(pickle: bytes, sizes: Mapping[str, int]) -> None:
    """Raises where torch.load would take a pickle's word for what is not so, or overflow the stack.

    Args:
        pickle: as torch.load reads it.
        sizes: of the record of each storage, by its key, in bytes.

    Raises:
        ValueError: tuples in tuples so deep that their hash overflows the stack, a bytearray, a storage whose record
            has another size than the pickle says, or no pickle.
    """
    if _TAKES_MEMORY in pickle and any(
        opcode.name == "GLOBAL" and str(argument).endswith("bytearray")
        for opcode, argument, _ in pickletools.genops(pickle)
    ):
        raise ValueError("it holds a bytearray")
    # A level takes a byte at least.
    if (sizes or len(pickle) > DEEPEST) and _depth(pickle, sizes) > DEEPEST:
        raise ValueError(f"it holds more than {DEEPEST} tuples in one another")


def _depth(pickle: bytes, sizes: Mapping[str, int]) -> int:
    """How deep tuples lie in tuples, or a little more than :data:`DEEPEST`. torch.load knows protocol 2 alone.

    Raises:
        ValueError: a storage of another size than its record's, or no pickle.
    """
    deepest = 0
    stack: list[Any] = []  # marks, and what may be an item of a tuple
    memo: dict[Any, Any] = {}

    def popped(name: str) -> list[Any]:
        count = _TAKEN[name]
        at = len(stack) - count
        if name in _TO_A_MARK:
            mark = next((i for i in range(len(stack) - 1, -1, -1) if stack[i] is _MARK), None)
            if mark is None:
                raise ValueError(f"its {name} lacks a mark")
            taken = stack[mark + 1 :]
            del stack[max(mark - count, 0) :]
            return taken
        if at < 0:
            raise ValueError(f"its {name} lacks an argument")
        taken = stack[at:]
        del stack[at:]
        return taken

    for opcode, argument, _ in pickletools.genops(pickle):
        name = opcode.name
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1] if stack else None
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo.get(argument))
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            items = popped(name)
            depth = 1 + max((item.depth for item in items if isinstance(item, _Tuple)), default=0)
            deepest = max(deepest, depth)
            if deepest > DEEPEST:
                break
            stack.append(_Tuple(depth, items))
        elif name == "BINPERSID":
            (storage,) = popped(name)
            _check_storage(storage, sizes)
            stack.append(None)
        else:
            if _TAKEN[name] or name in _TO_A_MARK:
                popped(name)
            if opcode.stack_after:
                known = argument if isinstance(argument, (str, int)) else None
                stack += [known] * len(opcode.stack_after)
    return deepest


def _check_storage(saved: Any, sizes: Mapping[str, int]) -> None:
    """Raises unless the record of a storage has the size that the pickle says.

    torch.load makes the storage as large as the pickle says, and torch 2.6 points it at whatever the record has.

    Raises:
        ValueError: another size, or something that torch.save does not write of a storage.
    """
    items = saved.items if isinstance(saved, _Tuple) else []
    if len(items) != 5 or items[0] != "storage" or not all(isinstance(item, str) for item in items[:4]):
        raise ValueError("it holds a storage in a way that torch.save does not write")
    _, kind, key, _, count = items
    if not isinstance(count, int):
        raise ValueError(f"it computes the size of storage {key!r}")
    name = kind.rpartition(" ")[2]
    claimed = count * (1 if name == "UntypedStorage" else StorageType(name).dtype.itemsize)
    if key not in sizes:
        raise ValueError(f"it has no record of storage {key!r}")
    if claimed != sizes[key]:
        raise ValueError(f"storage {key!r} has {claimed} bytes, and its record {sizes[key]}")


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
