"""Blocks: the pieces in which remote shards are fetched.

A block is a run of neighbouring rows. Its bounds follow from the index of the shard alone, so that all processes fetch
the same blocks, and no row lies in two of them. Its name holds the content of the shard and its etag, not its URL: a
new signature does not fetch it again, nor does a copy of the shard with the same etag. The content alone would not do:
where an index from the store is that of an earlier version, blocks of that would still be right by all checksums. Where
a store names no version, a number of the run takes the place of the etag.

Shapes: R rows, K blocks of a shard.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

BLOCK_BYTES = 4 << 20
"""Aim for the size of a block: 800 rows of 4 KB. Smaller ones would leave fewer bytes unused at the bounds of what is
needed, but each block takes some CPU time."""
REQUEST_BYTES = 16 << 20
"""Most bytes of neighbouring blocks that are fetched with one request. They take as long as five round trips of 30 ms
at 100 MB/s, so larger requests would add little to the rate."""
_MOST_BETWEEN = 1 << 16
"""Bytes between two blocks that may be fetched for nothing: headers, and files that belong to no row."""

BLOCK_BITS = 24
"""The key of a block is the number of its shard, and in this many bits behind it the number of the block there."""


@dataclass(frozen=True)
class Block:
    """One block of a shard.

    Attributes:
        name: Name of its file, without a suffix.
        start: First byte in the shard.
        length: Bytes.
        rows: Number of rows.
    """

    name: str
    start: int
    length: int
    rows: int


def is_behind(block: Block, other: Block) -> bool:
    """Whether a block lies close behind the one before it in the shard, so that one request may bring both."""
    return 0 <= other.start - (block.start + block.length) <= _MOST_BETWEEN


class BlockLayout:
    """The blocks of one shard.

    A block begins with the first row that starts in another `BLOCK_BYTES` of the shard. A row that is larger than that
    is a block of its own.

    Args:
        content: Text that stands for the content and the version of the shard.
        starts, ends: (R,) span of each row in bytes, rising.

    Attributes:
        first_row: (K,) number of the first row of each block.
    """

    def __init__(self, content: str, starts: IntArray, ends: IntArray) -> None:
        self._content, self._starts, self._ends = content, starts, ends
        piece = starts // BLOCK_BYTES
        is_large = ends - starts > BLOCK_BYTES
        begins = np.diff(piece, prepend=-1) != 0
        begins |= is_large
        begins[1:] |= is_large[:-1]
        self.first_row: IntArray = np.flatnonzero(begins)

        self._first_rows: list[int] = self.first_row.tolist()

    def __len__(self) -> int:
        return len(self._first_rows)

    def of_row(self, row: int) -> int:
        """Number of the block of a row."""
        return bisect_right(self._first_rows, row) - 1

    def start(self, number: int) -> int:
        """First byte of a block in the shard."""
        return int(self._starts[self._first_rows[number]])

    def of_rows(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """Numbers of the blocks of n rows, (n,), and the first byte of each of these blocks in the shard, (n,)."""
        number = np.searchsorted(self.first_row, rows, side="right") - 1
        return number, self._starts[self.first_row[number]]

    def __getitem__(self, number: int) -> Block:
        first = self._first_rows[number]
        last = self._first_rows[number + 1] - 1 if number + 1 < len(self) else len(self._starts) - 1
        start, end = self.start(number), int(self._ends[last])
        return Block(f"{self._identity}-{start:x}-{end - start:x}", start, end - start, last + 1 - first)

    @cached_property
    def _identity(self) -> str:
        """Hex digest of the content and of the places of the rows: the same rows may lie elsewhere in another file."""
        digest = hashlib.sha256(self._content.encode())
        digest.update(np.asarray(self._starts, np.int64).tobytes())
        return digest.hexdigest()[:32]
