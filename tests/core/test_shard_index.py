"""Where the elements of a part lie in the whole tensor: every box of small tensors, and its random bits."""

from __future__ import annotations

import itertools

import pytest
import torch

from signadam_ext.core.random_bits import random_bits, shard_bits
from signadam_ext.core.shard_index import ShardIndex


def boxes(shape):
    """All (first, part) of a shape, without elements too."""
    sides = [[(begin, length) for begin in range(n) for length in range(n - begin + 1)] for n in shape]
    for box in itertools.product(*sides):
        yield [begin for begin, _ in box], [length for _, length in box]


@pytest.mark.parametrize("shape", [(7,), (3, 4), (1, 5), (5, 1), (2, 3, 2), (3, 1, 4), (2, 2, 3)], ids=str)
def test_every_box(shape):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    bits = random_bits(1, 2, 3, 0, whole.numel()).view(shape)
    for first, part in boxes(shape):
        box = tuple(slice(begin, begin + length) for begin, length in zip(first, part, strict=True))
        shard = ShardIndex.of(shape, first, part)
        expected, count = whole[box].reshape(-1), whole[box].numel()
        assert torch.equal(shard.place(torch.arange(count)), expected), (first, part)
        assert [shard.place(i) for i in range(count)] == expected.tolist()
        assert torch.equal(shard_bits(1, 2, 3, shard, count), bits[box].reshape(-1))


def test_a_part_that_is_one_run_says_so():
    assert ShardIndex.of((6, 4), (2, 0), (3, 4)) == ShardIndex(8)
    assert ShardIndex.of((6, 4), (2, 1), (1, 2)) == ShardIndex(9)
    assert ShardIndex.of((6, 4), (0, 2), (6, 2)) == ShardIndex(2, run=2, stride=4)
    assert ShardIndex.of((3, 6, 4), (0, 2, 1), (3, 2, 2)) == ShardIndex(9, run=2, stride=4, count=2, outer_stride=24)


def test_runs_that_are_too_long_are_refused():
    with pytest.raises(ValueError, match="2\\^30"):
        ShardIndex.of((2, 1 << 31), (0, 0), (2, 1 << 30))


def test_three_cuts_behind_the_first_dimension_are_refused():
    with pytest.raises(ValueError, match="three dimensions"):
        ShardIndex.of((2, 4, 4, 4), (0, 0, 0, 0), (2, 2, 2, 2))


def test_keys_change_within_a_part():
    shard = ShardIndex((1 << 33) - 6, run=3, stride=5)
    bits = shard_bits(1, 2, 3, shard, 9)
    for i in range(9):
        assert bits[i] == random_bits(1, 2, 3, shard.place(i), 1)[0]
