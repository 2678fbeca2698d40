"""Counter-based random bits: a function of seed, tensor, step and element, the same on every backend.

Nothing global is touched, and no state is kept: a resumed run draws what the first would have drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .shard_index import ShardIndex

_WORD = 0xFFFFFFFF


def mix(x: int) -> int:
    """A bijection of 32-bit words whose output bits all depend on all input bits."""
    x ^= x >> 16
    x = x * 0x7FEB352D & _WORD
    x ^= x >> 15
    x = x * 0x846CA68B & _WORD
    return x ^ x >> 16


def tensor_keys(seed: int, tensor: int, step: int) -> tuple[int, int]:
    """The two keys of a tensor at a step, before an element's high bits have entered."""
    h0, h1 = 0x243F6A88, 0x85A308D3
    for word in (seed & _WORD, seed >> 32, tensor, step & _WORD, step >> 32):
        h0, h1 = mix(h0 ^ word), mix(h1 ^ word)
    return h0, h1


def subkeys(of_tensor: tuple[int, int], high: int) -> tuple[int, int]:
    """Those for the elements whose index shifted right by 33 is ``high``."""
    h0, h1 = of_tensor
    return mix(h0 ^ high), mix(h1 ^ high)


def random_bits(
    seed: int, tensor: int, step: int, first: int, count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """16 random bits for each of ``count`` elements, int64 in [0, 65536).

    Args:
        seed: of the optimizer, below 2^64.
        tensor: number under which ``state_dict()`` lists the parameter.
        step: the tensor's own, 1 at its first.
        first: index of the first element in the memory order of the unsharded tensor.
        count: number of elements.
        device: where the result lies.
    """
    return shard_bits(seed, tensor, step, ShardIndex(first), count, device)


def shard_bits(
    seed: int, tensor: int, step: int, shard: ShardIndex, count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The same of the first ``count`` elements of a part of the tensor."""
    return bits_of_keys(tensor_keys(seed, tensor, step), shard, count, device)


def bits_of_keys(
    of_tensor: tuple[int, int], shard: ShardIndex, count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The same of a tensor whose :func:`tensor_keys` are ``of_tensor``."""
    index = shard.place(torch.arange(count, dtype=torch.int64, device=device))
    pair = index >> 1
    r = torch.zeros_like(index)
    for high in range(shard.offset >> 33, (shard.place(max(count, 1) - 1) >> 33) + 1):
        k0, k1 = subkeys(of_tensor, high)
        x = pair & _WORD ^ k0
        x = x ^ x >> 16
        x = x * 0x7FEB352D & _WORD
        x = x ^ x >> 15
        x = (x ^ k1) * 0x846CA68B & _WORD  # wraps around 2^64, which keeps the low word
        x = x ^ x >> 16
        r = torch.where(pair >> 32 == high, torch.where(index & 1 == 1, x >> 16, x & 0xFFFF), r)
    return r


def bits_for_m(r: Tensor) -> Tensor:
    """What the first moment uses of an element's 16 bits: their bytes swapped."""
    return (r << 8 | r >> 8) & 0xFFFF


def bits_for_v(r: Tensor) -> Tensor:
    """What the second moment uses: the complement of the first moment's."""
    return bits_for_m(r) ^ 0xFFFF


def bits_for_aux(r: Tensor) -> Tensor:
    """What a third moment uses: the complement of the parameter's."""
    return r ^ 0xFFFF


#: What each moment uses of an element's bits, in the order of the moments.
MOMENT_BITS = (bits_for_m, bits_for_v, bits_for_aux)
