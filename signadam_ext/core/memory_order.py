"""In which order the elements of a tensor lie in memory, and tensors in another order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def same_strides(tensor: Tensor, strides: Sequence[int]) -> bool:
    """Whether ``tensor`` lies in memory as ``strides`` say. Dimensions of one element have no stride that matters."""
    if tensor.numel() == 0:
        return True
    return all(size == 1 or a == b for size, a, b in zip(tensor.shape, tensor.stride(), strides, strict=True))


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a run of memory, in whatever order."""
    if tensor.numel() == 0 or tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def flat(x: Tensor) -> Tensor:
    """The elements of a dense tensor in memory order."""
    return x.as_strided((x.numel(),), (1,))


def strides_of(param: Tensor) -> tuple[int, ...]:
    """The strides of what kernels update: the parameter's, without gaps."""
    # Nobody who watches what is made of tensors takes this for memory.
    with torch._C._DisableTorchDispatch():
        return torch.empty_like(param, device="meta").stride()


def restrided(value: Tensor, param: Tensor) -> Tensor:
    """A copy of ``value`` in the memory order of what kernels update."""
    return torch.empty_strided(param.shape, strides_of(param), dtype=value.dtype, device=value.device).copy_(value)


def order_of(shape: Sequence[int], strides: Sequence[int]) -> int:
    """The memory order of a dense tensor's dimensions as one number, 0 where it is contiguous.

    It is the rank of a permutation in lexicographic order: of the dimensions of more than one element, from the one
    with the largest stride to the one with the smallest. Other dimensions have no place in memory and do not count.
    """
    if 0 in shape:
        return 0
    counted = [dim for dim, size in enumerate(shape) if size > 1]
    order = sorted(counted, key=lambda dim: -strides[dim])
    rank = 0
    for dim in order:
        place = counted.index(dim)
        rank = rank * len(counted) + place
        del counted[place]
    return rank


def strides_in_order(shape: Sequence[int], order: int) -> tuple[int, ...]:
    """The strides of a dense tensor whose :func:`order_of` is ``order``.

    Raises:
        ValueError: no order of so many dimensions has this number.
    """
    counted = [dim for dim, size in enumerate(shape) if size > 1] if 0 not in shape else []
    places = []
    rest = order
    for radix in range(1, len(counted) + 1):
        rest, place = divmod(rest, radix)
        places.append(place)
    if rest != 0:
        raise ValueError(f"{order} is no order of {len(counted)} dimensions: must be in [0, {len(counted)}!)")
    ordered = [counted.pop(place) for place in reversed(places)]
    strides = [1] * len(shape)
    step = 1
    for dim in reversed(ordered):
        strides[dim] = step
        step *= shape[dim]
    return tuple(strides)


def reordered(values: Tensor, shape: Sequence[int], order: int, strides: Sequence[int]) -> Tensor:
    """A tensor of that shape and those strides, of elements that lie flat in the memory order ``order``."""
    placed = torch.empty_strided(shape, strides, dtype=values.dtype, device=values.device)
    return placed.copy_(values.as_strided(shape, strides_in_order(shape, order)))
