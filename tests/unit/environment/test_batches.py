"""The plan: every pair once, ranks evenly loaded, equally many calls."""

from __future__ import annotations

import random

import pytest

from dmagent_loader.environment.batches import plan_batches


def plans(lengths, world_size, **limits):
    return [plan_batches(lengths, rank=rank, world_size=world_size, **limits) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 64])
def test_every_pair_is_scored_by_exactly_one_rank(world_size):
    rng = random.Random(world_size)
    lengths = [rng.randint(1, 900) for _ in range(50)]

    planned = plans(lengths, world_size, batch_size=8, batch_tokens=2000)

    assert sorted(pair for batches, _ in planned for batch in batches for pair in batch) == list(range(50))


@pytest.mark.parametrize("world_size", [2, 7, 64])
def test_all_ranks_make_the_same_number_of_calls(world_size):
    """Catches a hang: sharded models communicate in each call, so ranks with fewer calls must know how many to add."""
    planned = plans([900, 800, 700, *[3] * 47], world_size, batch_size=4, batch_tokens=1000)

    assert {calls for _, calls in planned} == {max(len(batches) for batches, _ in planned)}


def test_ranks_get_equal_loads():
    """Catches blocks of the sorted list, and dealing always in one direction (rank 0 gets the longest each time)."""
    lengths = random.Random(0).sample(range(1, 65), 64)

    planned = plans(lengths, 8, batch_size=8, batch_tokens=2000)

    assert [sum(lengths[pair] for batch in batches for pair in batch) for batches, _ in planned] == [260] * 8


def test_longest_pairs_come_first():
    batches, _ = plan_batches([3, 9, 5, 1], rank=0, world_size=1, batch_size=2, batch_tokens=100)

    assert batches == [[1, 2], [0, 3]]
