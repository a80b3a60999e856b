"""Seeded integers that are the same on every machine and with every version of numpy.

numpy does not promise that a generator draws the same numbers in its next release, and a run may be resumed after an
upgrade. The plan therefore draws from its own fixed mixing function.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dmagent_loader.mixture.simplex import IntArray

UIntArray = npt.NDArray[np.uint64]


def _constant(value: int) -> UIntArray:
    """A number as an array without dimensions, with which operations on short arrays take 60% of the time."""
    return np.array(value, dtype=np.uint64)


_GAMMA = _constant(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _constant(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _constant(0x94D049BB133111EB)
_ONE = _constant(1)
_ROUNDS = 4
_SMALLEST_NETWORK = 16
"""Smallest range of the network: over fewer values, four rounds favour some orders by a few percent."""
_SHIFT_30, _SHIFT_27, _SHIFT_31 = _constant(30), _constant(27), _constant(31)


def stream_key(*parts: int | str) -> int:
    """A 64-bit key for a named stream of random integers, for example ``stream_key(seed, "rows", domain, epoch)``."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def random_bits(key: int | UIntArray, counter: IntArray) -> UIntArray:
    """64 random bits for each counter of a stream (the SplitMix64 generator, by position).

    Args:
        key: Key of the stream, or one key for each counter.
        counter: (n,) positions in the stream.

    Returns:
        (n,) uint64.
    """
    # Arrays of integers wrap around without a warning; only numpy's scalars would give one.
    z = counter.astype(np.uint64)
    z *= _GAMMA
    z = z + (_constant(key) if isinstance(key, int) else key)
    z ^= z >> _SHIFT_30
    z *= _MULTIPLIER_1
    z ^= z >> _SHIFT_27
    z *= _MULTIPLIER_2
    z ^= z >> _SHIFT_31
    return z


def scatter(key: UIntArray, position: IntArray, length: IntArray) -> IntArray:
    """The image of each position under a random permutation of ``range(length)``, without building the permutation.

    A Feistel network permutes the smallest power of two that holds `length` (16 or more). A result of `length` or more
    goes through the network again until it is below `length` (cycle walking).

    Args:
        key: (n,) key of the permutation of each position.
        position: (n,) int64, each below its `length`.
        length: (n,) int64, at least 1.

    Returns:
        (n,) int64, each below its `length`.
    """
    bits = np.frexp(np.maximum(length, _SMALLEST_NETWORK) - 1.0)[1].astype(np.uint64)
    low_bits = bits >> _ONE
    low_mask, high_mask = (_ONE << low_bits) - _ONE, (_ONE << (bits - low_bits)) - _ONE
    moved = position.astype(np.uint64)
    limit = length.astype(np.uint64)
    moved = _feistel(key, moved, low_bits, low_mask, high_mask)
    while len(beyond := np.flatnonzero(moved >= limit)):
        moved[beyond] = _feistel(*(x[beyond] for x in (key, moved, low_bits, low_mask, high_mask)))
    return moved.astype(np.int64)


def _feistel(
    key: UIntArray, value: UIntArray, low_bits: UIntArray, low_mask: UIntArray, high_mask: UIntArray
) -> UIntArray:
    """One pass of the network of `scatter`: each half in turn is changed by a random function of the other."""
    high, low = value >> low_bits, value & low_mask
    for _ in range(_ROUNDS):
        key = key + _GAMMA
        high = high ^ (_mixed((low ^ key) * _MULTIPLIER_1) & high_mask)
        key = key + _GAMMA
        low = low ^ (_mixed((high ^ key) * _MULTIPLIER_1) & low_mask)
    return (high << low_bits) | low


def _mixed(z: UIntArray) -> UIntArray:
    z = (z ^ (z >> _SHIFT_27)) * _MULTIPLIER_2
    return z >> _SHIFT_31


def permutations(keys: Sequence[int], lengths: IntArray) -> IntArray:
    """Concatenated permutations of ``range(length)``: each sorts the first `length` draws of its stream.

    Args:
        keys: Keys of the N streams.
        lengths: (N,) int64, at least 1.

    Returns:
        (sum of lengths,) int64.
    """
    first = np.cumsum(lengths) - lengths
    positions = np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(first, lengths)
    # The low bits of each draw hold its position: no two draws are equal, and a sort is faster than an argsort.
    low_bits = np.repeat(np.array([(1 << length.bit_length()) - 1 for length in lengths.tolist()], np.uint64), lengths)
    drawn = random_bits(np.repeat(np.array(keys, np.uint64), lengths), positions)
    drawn = (drawn & ~low_bits) | positions.view(np.uint64)
    for begin, length in zip(first.tolist(), lengths.tolist(), strict=True):
        drawn[begin : begin + length].sort()
    return (drawn & low_bits).view(np.int64)
