"""What the ranks of a run tell each other when they open the same shards."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dmagent_loader.shards.index.peers import Peers

GROUP_FILES = re.compile(r"\.[0-9a-f]{32}(?:\.\d+)?\.partial")
"""Names of the files of `cache_groups`, which stay there if a rank is killed."""


def lacking_on_ranks(peers: Peers, lacking: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which shards each rank lacks, (ranks, S); as bits, since a run may have a thousand ranks and a million shards."""
    bits = zlib.compress(np.packbits(lacking).tobytes(), 1) if lacking.any() else None
    found = np.zeros((peers.size, len(lacking)), bool)
    for rank, data in enumerate(peers.gather(bits)):
        if data is not None:
            found[rank] = np.unpackbits(np.frombuffer(zlib.decompress(data), np.uint8), count=len(lacking))
    return found


def owners(lacking: NDArray[np.bool_], sizes: NDArray[np.int64]) -> NDArray[np.int32]:
    """The rank that provides the index of each shard, (S,); -1 where none lacks it.

    A rank that has the index provides it. Where none has, the shards are dealt in runs of about equal bytes.

    Args:
        lacking: (ranks, S) shards that each rank lacks.
        sizes: (S,) bytes of each shard.
    """
    ranks = len(lacking)
    owner = np.where(lacking.any(axis=0), lacking.argmin(axis=0), -1).astype(np.int32)
    unknown = lacking.all(axis=0)
    # A shard goes to the rank in whose share of the bytes its middle lies.
    bytes_of = np.maximum(sizes[unknown], 1).astype(np.float64)
    middle = np.cumsum(bytes_of) - bytes_of / 2
    owner[unknown] = (middle * ranks / max(1.0, bytes_of.sum())).astype(np.int32)
    return owner


def cache_groups(peers: Peers, folder: Path) -> list[int]:
    """For each rank, the lowest rank with which it shares its cache folder, found out by a file in it.

    A rank that cannot write to its folder is a group of its own.

    Args:
        peers: The ranks.
        folder: Folder of the cache of this rank.
    """
    (run, *_) = peers.gather(uuid.uuid4().hex if peers.rank == 0 else None)
    shared, own = folder / f".{run}.partial", folder / f".{run}.{peers.rank}.partial"
    first = peers.rank
    try:
        with contextlib.suppress(OSError, ValueError):
            folder.mkdir(parents=True, exist_ok=True)
            own.write_text(str(peers.rank))
            with contextlib.suppress(FileExistsError):
                os.link(own, shared)  # with its content, or not at all
            first = int(shared.read_text())
        groups = peers.gather(first)
    finally:
        for path in (own, shared) if first == peers.rank else (own,):
            with contextlib.suppress(OSError):
                path.unlink()
    lowest = {group: rank for rank, group in reversed(list(enumerate(groups)))}
    return [lowest[group] for group in groups]


def digest_of(texts: Iterator[str]) -> str:
    """Hex sha256 over texts."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(os.fsencode(text) + b"\0")
    return digest.hexdigest()


def slices(weights: Sequence[int], limit: int) -> Iterator[slice]:
    """Consecutive parts of a list, each of about this total weight, and of one item at least."""
    start, weight = 0, 0
    for place, more in enumerate(weights):
        if weight and weight + more > limit:
            yield slice(start, place)
            start, weight = place, 0
        weight += more
    if start < len(weights):
        yield slice(start, len(weights))
