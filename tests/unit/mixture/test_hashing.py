"""Random integers that are the same everywhere, permutations by position, and keys that do not collide by accident."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dmagent_loader.mixture.hashing import permutations, random_bits, scatter, stream_key

SPLITMIX64 = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]
"""First outputs of SplitMix64 (Steele, Lea and Flood 2014; Vigna's splitmix64.c) for the seed 1234567."""


def test_random_bits_are_those_of_splitmix64():
    """Catches a mixing function of our own making, of which nobody has tested the quality."""
    assert random_bits(1234567, np.arange(1, 6)).tolist() == SPLITMIX64


def test_random_bits_have_random_access_and_a_key_for_each_counter():
    whole = random_bits(7, np.arange(1000))
    assert random_bits(7, np.array([999, 3, 500])).tolist() == whole[[999, 3, 500]].tolist()
    keys = np.array([7, 8, 7], dtype=np.uint64)
    counters = np.array([5, 5, 6])
    alone = [random_bits(int(key), np.array([counter]))[0] for key, counter in zip(keys, counters, strict=True)]
    assert random_bits(keys, counters).tolist() == alone
    largest = random_bits(2**64 - 1, np.array([2**62]))
    assert largest.dtype == np.uint64


def test_keys_are_the_same_in_every_process():
    """Catches Python's own hash of texts, which differs from process to process."""
    assert stream_key(0, "rows", "source/web") == 13927186182064397823


def test_keys_differ_in_type_in_order_and_in_where_parts_are_cut():
    parts = [(1,), ("1",), (1, 2), (12,), (2, 1), ("ab",), ("a", "b"), ("a", "", "b"), ("int:1",), ()]
    keys = [stream_key(*part) for part in parts]
    assert len(set(keys)) == len(parts)
    assert all(0 <= key < 2**64 for key in keys)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 100])
def test_scatter_is_a_permutation_for_each_key(length):
    orders = set()
    for key in range(20):
        moved = scatter(np.full(length, key, dtype=np.uint64), np.arange(length), np.full(length, length))
        assert sorted(moved.tolist()) == list(range(length))
        orders.add(tuple(moved.tolist()))
    assert len(orders) >= min(20, length), "the key has no effect"


def test_positions_of_many_permutations_are_found_in_one_call():
    keys, lengths = np.array([3, 9, 9], dtype=np.uint64), np.array([40, 17, 5])
    for first, second in itertools.permutations(range(3), 2):
        both = scatter(keys[[first, second]], np.array([4, 4]), lengths[[first, second]])
        alone = [scatter(keys[[i]], np.array([4]), lengths[[i]])[0] for i in (first, second)]
        assert both.tolist() == alone


def test_permutations_are_the_order_of_their_streams():
    """Each by itself: the shards of a domain do not change their order with the domains around it."""
    keys, lengths = [stream_key("a"), stream_key("b"), stream_key("a")], np.array([30, 1, 31])
    first, second, third = np.split(permutations(keys, lengths), np.cumsum(lengths)[:-1])
    for key, found in ((keys[0], first), (keys[1], second), (keys[2], third)):
        assert sorted(found.tolist()) == list(range(len(found)))
        low = (1 << len(found).bit_length()) - 1
        drawn = random_bits(key, np.arange(len(found))) & ~np.uint64(low)
        assert (drawn[found][:-1] <= drawn[found][1:]).all()
    assert permutations([keys[0]], np.array([30])).tolist() == first.tolist()
