"""The index of a shard as it is looked up: row by row, in plain numbers."""

from __future__ import annotations

import numpy as np

from dmagent_loader.shards.decode import RawSample
from dmagent_loader.shards.index.shard_index import ShardIndex
from dmagent_loader.shards.sources.checksum import crc32
from dmagent_loader.shards.sources.local import Source

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

    Attributes:
        num_rows: R.
        num_bytes: Memory that it takes.
        only: Extension of the member that every row has and nothing else; None: rows have others.
        offset, size: Of the members: (M,), and so of the rows where each has but one.
        crc: (R,) of the rows.
    """

    __slots__ = (
        "_extension",
        "_extensions",
        "_first",
        "_key_end",
        "_keys",
        "_one_member",
        "crc",
        "num_bytes",
        "num_rows",
        "offset",
        "only",
        "size",
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
        self.only = index.extensions[0] if self._one_member and len(index.extensions) == 1 else None
        self._first, self.offset, self.size, self._extension, self.crc, self._key_end = (
            np.ascontiguousarray(column).data for column in columns[:-1]
        )
        self._keys = index.keys.tobytes()

    def key(self, row: int) -> str:
        """The key of a row."""
        key_end = self._key_end
        return self._keys[key_end[row] : key_end[row + 1]].decode("utf-8", "surrogateescape")

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
