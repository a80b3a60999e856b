"""The index of a shard as it is looked up: row by row, in plain numbers."""

from __future__ import annotations

import numpy as np

from dmagent_loader.shards.checksum import crc32
from dmagent_loader.shards.decode import RawSample
from dmagent_loader.shards.index import ShardIndex
from dmagent_loader.shards.reader import Source

_new_tuple = tuple.__new__
"""A named tuple's own constructor is a Python function and takes four times as long."""


_FIXED_BYTES = 2048
"""What a table takes besides its columns."""


class ChangedRow(Exception):
    """The bytes of a row are not those that were indexed; the message has both checksums."""


class RowTable:
    """Where the rows of one shard are.

    The columns of `ShardIndex` as memoryviews: reading one number of a numpy array takes longer.

    Args:
        index: Of the shard.
    """

    __slots__ = (
        "_crc",
        "_extension",
        "_extensions",
        "_first",
        "_key_end",
        "_keys",
        "_offset",
        "_one_member",
        "_size",
        "num_bytes",
        "num_rows",
    )

    def __init__(self, index: ShardIndex) -> None:
        self.num_rows = index.num_rows
        columns = (
            index.row_first,
            index.offset,
            index.size,
            index.extension,
            index.row_crc,
            index.key_end,
            index.keys,
        )
        self.num_bytes = sum(column.nbytes for column in columns) + _FIXED_BYTES
        self._extensions = index.extensions
        self._one_member = index.num_members == index.num_rows
        self._first, self._offset, self._size, self._extension, self._crc, self._key_end, self._keys = (
            np.ascontiguousarray(column).data for column in columns
        )

    def key(self, row: int) -> str:
        """The key of a row."""
        key_end = self._key_end
        return str(self._keys[key_end[row] : key_end[row + 1]], "utf-8", "surrogateescape")

    def read(self, source: Source, row: int, verify: bool) -> RawSample:
        """One row, in one piece.

        Args:
            source: The open shard.
            row: Below `num_rows`.
            verify: Whether to compare its checksum.

        Raises:
            ChangedRow: The checksum is another.
            DamagedShardError: The shard has become shorter.
        """
        members: dict[str, memoryview] = {}
        if self._one_member:
            data = source.read(self._offset[row], self._size[row])
            members[self._extensions[self._extension[row]]] = memoryview(data)
            found = crc32(data) if verify else self._crc[row]
        else:
            first, last = self._first[row], self._first[row + 1] - 1
            start = self._offset[first]
            view = memoryview(source.read(start, self._offset[last] + self._size[last] - start))
            found = 0
            for member in range(first, last + 1):
                begin = self._offset[member] - start
                part = view[begin : begin + self._size[member]]
                members[self._extensions[self._extension[member]]] = part
                found = crc32(part, found) if verify else self._crc[row]
        if found != self._crc[row]:
            raise ChangedRow(f"crc32 {found:08x}, was {self._crc[row]:08x}")
        key_end = self._key_end
        key = str(self._keys[key_end[row] : key_end[row + 1]], "utf-8", "surrogateescape")
        return _new_tuple(RawSample, (key, members))
