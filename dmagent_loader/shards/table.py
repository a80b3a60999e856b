"""The index of a shard in a form for fast look-ups of single rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dmagent_loader.shards.decode import RawSample
from dmagent_loader.shards.index.shard_index import IntArray, ShardIndex
from dmagent_loader.shards.sources.blocks import BlockLayout
from dmagent_loader.shards.sources.checksum import crc32
from dmagent_loader.shards.sources.local import Source

_new_tuple = tuple.__new__
"""The constructor of a named tuple is a Python function and takes four times as long."""

_FIXED_BYTES = 2048
"""Memory of a table besides its columns."""


class ChangedRow(Exception):
    """The bytes of a row are not those that were indexed; the message holds both checksums."""


class RowTable:
    """The positions of the rows of one shard.

    It holds the columns of a `ShardIndex` as memoryviews: reading a single number from a numpy array takes longer. The
    numbers of a row lie side by side in memory, because rows of many shards are read in turn: if each came from a
    column of its own, most would have to be fetched from main memory separately.

    Args:
        index: Index of the shard.
        tag: A number for its version, which blocks of another version do not share (`Catalogue.tag`).

    Attributes:
        num_rows: R, the number of rows.
        num_bytes: Memory of the table in bytes.
        only: Extension of the only member of every row; None if rows have other members.
        offset, size: (M,) span of each payload in bytes; one per row if `only` is set.
        crc: (R,) crc32 of each row.
        arrays: The same three columns, and the two of `key_span`, as arrays, to look up many rows at once.
    """

    __slots__ = (
        "_blocks",
        "_common",
        "_content",
        "_extension",
        "_extensions",
        "_first",
        "_key_end",
        "_keys",
        "_one_member",
        "arrays",
        "crc",
        "num_bytes",
        "num_rows",
        "offset",
        "only",
        "size",
    )

    def __init__(self, index: ShardIndex, tag: int = 0) -> None:
        self.num_rows = index.num_rows
        self._extensions = index.extensions
        self._one_member = index.num_members == index.num_rows
        self.only = index.extensions[0] if self._one_member and len(index.extensions) == 1 else None
        of_members = (index.offset, index.size, index.extension)
        of_rows = (index.row_crc, index.key_end, index.row_first)
        groups = [of_members + of_rows] if self._one_member else [of_members, of_rows]
        columns = [column for group in groups for column in _side_by_side(group)]
        self.num_bytes = sum(column.nbytes for column in columns) + index.keys.nbytes + _FIXED_BYTES
        self.offset, self.size, self._extension, self.crc, self._key_end, self._first = columns
        key_end = np.asarray(self._key_end)
        self.arrays = (*map(np.asarray, (self.offset, self.size, self.crc)), key_end[:-1], key_end[1:])
        keys = index.keys.tobytes()
        self._keys = keys.decode() if keys.isascii() else keys
        """Decoded already if that leaves one byte a character, so that `key_end` counts characters."""
        self._content = f"{index.checksum} {tag:x}"
        self._blocks: BlockLayout | None = None
        self._common: tuple[int, ...] | None = None
        """Extensions of more than half of the rows; None: not counted yet."""

    @property
    def blocks(self) -> BlockLayout:
        """The blocks in which the shard is fetched if it is remote."""
        if self._blocks is None:
            first, offset = np.asarray(self._first), np.asarray(self.offset)
            last = first[1:].astype(np.int64) - 1
            self._blocks = BlockLayout(
                self._content, offset[first[:-1]], offset[last] + np.asarray(self.size)[last].astype(np.int64)
            )
        return self._blocks

    def key(self, row: int) -> str:
        """The key of a row."""
        return self.key_at(*self.key_span(row))

    def key_span(self, row: int) -> tuple[int, int]:
        """Where the key of a row lies, for `key_at`."""
        return self._key_end[row], self._key_end[row + 1]

    def key_at(self, begin: int, end: int) -> str:
        """The key between two places in the keys of all rows."""
        key = self._keys[begin:end]
        return key if isinstance(key, str) else key.decode("utf-8", "surrogateescape")

    def missing_members(self, row: int) -> tuple[str, ...]:
        """Extensions that more than half of the rows have, and this one does not."""
        if self.only is not None:
            return ()
        if self._common is None:
            counts = np.bincount(np.asarray(self._extension), minlength=len(self._extensions))
            self._common = tuple(np.flatnonzero(2 * counts > self.num_rows).tolist())
        present = set(self._extension[self._first[row] : self._first[row + 1]].tolist())
        return tuple(self._extensions[number] for number in self._common if number not in present)

    def read(self, source: Source, row: int, verify: bool) -> RawSample:
        """Reads one row with a single read of its shard.

        Args:
            source: The open shard.
            row: Number of the row, below `num_rows`.
            verify: Compare the checksum.

        Raises:
            ChangedRow: The checksum differs.
            DamagedShardError: The shard has become shorter.
        """
        members: dict[str, memoryview] = {}
        if self._one_member:
            data = source.read(self.offset[row], self.size[row])
            members[self._extensions[self._extension[row]]] = memoryview(data)
            found = crc32(data) if verify else self.crc[row]
        else:
            first, last = self._first[row], self._first[row + 1] - 1
            start = self.offset[first]
            view = memoryview(source.read(start, self.offset[last] + self.size[last] - start))
            found = 0
            for member in range(first, last + 1):
                begin = self.offset[member] - start
                part = view[begin : begin + self.size[member]]
                members[self._extensions[self._extension[member]]] = part
                found = crc32(part, found) if verify else self.crc[row]
        if found != self.crc[row]:
            raise ChangedRow(f"crc32 {found:08x}, was {self.crc[row]:08x}")
        return _new_tuple(RawSample, (self.key(row), members))


def _side_by_side(columns: Sequence[IntArray]) -> list[memoryview]:
    """Copies of columns in which the numbers of one row are neighbours; the lengths may differ by one."""
    fields = [(str(number), column.dtype) for number, column in enumerate(columns)]
    records = np.empty(max(map(len, columns)), np.dtype(fields, align=True))
    views = [records[name][: len(column)] for (name, _), column in zip(fields, columns, strict=True)]
    for view, column in zip(views, columns, strict=True):
        view[:] = column
    return [view.data for view in views]
