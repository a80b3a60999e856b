"""Seeded integers that are the same on every machine and every version of numpy.

numpy does not promise that a generator draws the same numbers in its next release, and a run may be resumed after an
upgrade; so the plan draws from its own fixed mixing function.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from dmagent_loader.simplex import IntArray

UIntArray = npt.NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_30, _SHIFT_27, _SHIFT_31 = np.uint64(30), np.uint64(27), np.uint64(31)


def stream_key(*parts: int | str) -> int:
    """A 64-bit key for a named stream of random integers, for example ``stream_key(seed, "rows", domain, epoch)``."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def random_bits(key: int | UIntArray, counter: IntArray) -> UIntArray:
    """64 random bits for each counter of a stream (the SplitMix64 generator, by position).

    Args:
        key: Of the stream; one, or one for each counter.
        counter: (n,) positions in the stream.

    Returns:
        (n,) uint64.
    """
    with np.errstate(over="ignore"):
        z = counter.astype(np.uint64) * _GAMMA + (np.uint64(key) if isinstance(key, int) else key)
        z = (z ^ (z >> _SHIFT_30)) * _MULTIPLIER_1
        z = (z ^ (z >> _SHIFT_27)) * _MULTIPLIER_2
        return np.asarray(z ^ (z >> _SHIFT_31), dtype=np.uint64)


def permutation(key: int, length: int) -> IntArray:
    """A permutation of ``range(length)``: the order of `length` draws of a stream."""
    return np.argsort(random_bits(key, np.arange(length, dtype=np.int64)), kind="stable").astype(np.int64)
