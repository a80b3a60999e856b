"""The index of one shard: where every row is, what it is called, and its checksum.

About 30 bytes per row of one member, in a handful of arrays; no Python object per row.

Shapes: R rows, M members (files in the tar that belong to a row), E distinct extensions.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmagent_loader.errors import ShardLayoutError
from dmagent_loader.shards.sources.local import Source
from dmagent_loader.shards.sources.urls import display_url
from dmagent_loader.shards.tar.damage import ShardDamage, account, broken_rows
from dmagent_loader.shards.tar.header import BLOCK
from dmagent_loader.shards.tar.members import MemberTable, shown
from dmagent_loader.shards.tar.scan import scan

__all__ = ["MAX_ROW_BYTES", "ShardDamage", "ShardIndex", "build_index"]

IntArray = NDArray[np.integer[Any]]

MAX_ROW_BYTES = 1 << 31
"""A row is read in one piece; one that is larger would take the memory of the process."""

_MAX_BETWEEN_MEMBERS = 1 << 20
_EXTENDED_HEADERS = 4 * BLOCK
"""What the extended headers of one member may take: names and times, in the ways of GNU and pax."""


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Positions, keys and checksums of all rows of one shard.

    Attributes:
        file_size: Bytes of the tar.
        extensions: (E,) distinct extensions, lower-cased.
        offset, size: (M,) payload positions in bytes.
        extension: (M,) positions in `extensions`.
        row_first: (R+1,) first member of each row, then M.
        row_crc: (R,) crc32 over the payloads of a row, in order.
        keys: (bytes,) the keys of all rows, joined, utf-8.
        key_end: (R+1,) where the key before each row ends: 0 first.
        checksum: Hex sha256 over keys, extensions, sizes and row checksums: the content, not where or when it was
            written.
        damage: What could not be read.
        sha256: Of the whole file, in hex; None: it was not computed.
    """

    file_size: int
    extensions: tuple[str, ...]
    offset: IntArray
    size: IntArray
    extension: IntArray
    row_first: IntArray
    row_crc: IntArray
    keys: NDArray[np.uint8]
    key_end: IntArray
    checksum: str
    damage: tuple[ShardDamage, ...] = ()
    sha256: str | None = None

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.row_crc)

    @property
    def num_members(self) -> int:
        """M."""
        return len(self.offset)

    @property
    def payload_bytes(self) -> int:
        """Sum of the sizes of all members."""
        return int(self.size.sum(dtype=np.int64))

    def check(self) -> None:
        """Makes sure that no row reaches outside the file or the columns, whoever wrote the index.

        Raises:
            ValueError: The columns contradict each other.
        """
        first, ends = self.row_first, self.key_end
        columns = (self.offset, self.size, self.extension, self.row_crc, self.keys, first, ends)
        if any(column.ndim != 1 or column.dtype.kind not in "iu" for column in columns):
            raise ValueError("its columns are not of integers")
        if [column.dtype.name for column in (self.offset, self.row_crc, self.keys)] != ["int64", "uint32", "uint8"]:
            raise ValueError("its columns are of other integers")
        rows, members = self.num_rows, self.num_members
        if (len(first), len(ends), len(self.size), len(self.extension)) != (rows + 1, rows + 1, members, members):
            raise ValueError("its columns have different lengths")
        rising = (first[1:] > first[:-1]).all() and (ends[1:] >= ends[:-1]).all()
        if (first[0], first[-1], ends[0], ends[-1]) != (0, members, 0, len(self.keys)) or not rising:
            raise ValueError("its rows are not in order")
        if not all(isinstance(name, str) for name in (*self.extensions, self.checksum)):
            raise ValueError("its names are no text")
        if len(bytes.fromhex(self.checksum)) != hashlib.sha256().digest_size:
            raise ValueError("its checksum of the rows is none")
        if members:
            end = self.offset + self.size.astype(np.int64)
            # The largest first: a sum of two that are too large may wrap around to one that is not.
            largest = max(int(self.offset.max()), int(self.size.max()))
            inside = self.offset.min() >= 0 and self.size.min() >= 0 and largest <= self.file_size
            if not inside or end.max() > self.file_size or not (self.offset[1:] >= end[:-1]).all():
                raise ValueError("its members overlap or reach outside the shard")
            if self.extension.min() < 0 or self.extension.max() >= len(self.extensions):
                raise ValueError("it names extensions that it does not list")

    def key(self, row: int) -> str:
        """The key of a row."""
        start, end = self.key_end.item(row), self.key_end.item(row + 1)
        return self.keys[start:end].tobytes().decode("utf-8", "surrogateescape")


def build_index(
    url: str,
    source: Source,
    size: int,
    *,
    advance: Callable[[int], object] | None = None,
    stop: threading.Event | None = None,
    with_sha256: bool = False,
) -> ShardIndex:
    """Reads a shard once and indexes every row that is whole; damage is noted, not raised.

    Args:
        url: For messages.
        source: The open shard.
        size: Its length in bytes.
        advance: Called with the number of bytes passed since the last call.
        stop: When set, the work ends with `dmagent_loader.shards.tar.scan.ScanStopped`.
        with_sha256: Compute the checksum of the whole file, too.

    Raises:
        ShardLayoutError: The shard cannot be read as samples by position: compressed, links, a key that comes back,
            rows that are too large or spread over the file.
    """
    digest = hashlib.sha256() if with_sha256 else None
    table = scan(url, source, size, advance=advance, stop=stop, digest=digest)
    index = _from_table(url, table, size)
    return index if digest is None else replace(index, sha256=digest.hexdigest())


def without_rows(index: ShardIndex, rows: Sequence[int]) -> ShardIndex:
    """The index of the same shard, less some of its rows."""
    if not rows:
        return index
    keep = np.ones(index.num_rows, bool)
    keep[list(rows)] = False
    row_sizes, key_sizes = np.diff(index.row_first), np.diff(index.key_end)
    members = np.repeat(keep, row_sizes)
    return _sealed(
        replace(
            index,
            offset=index.offset[members],
            size=index.size[members],
            extension=index.extension[members],
            row_first=_narrow(np.append(0, np.cumsum(row_sizes[keep], dtype=np.int64))),
            row_crc=index.row_crc[keep],
            keys=index.keys[np.repeat(keep, key_sizes)],
            key_end=_narrow(np.append(0, np.cumsum(key_sizes[keep], dtype=np.int64))),
        )
    )


def _sealed(index: ShardIndex) -> ShardIndex:
    """The index with the checksum of its content."""
    names = [name.encode("utf-8", "surrogateescape") for name in index.extensions]
    digest = hashlib.sha256(repr(names).encode())
    for column, kind in (
        (index.keys, np.uint8),
        (index.key_end, np.int64),
        (index.row_first, np.int64),
        (index.extension, np.uint16),
        (index.size, np.int64),
        (index.row_crc, np.uint32),
    ):
        digest.update(column.astype(kind, copy=False).tobytes())
    return replace(index, checksum=digest.hexdigest())


def _from_table(url: str, table: MemberTable, file_size: int) -> ShardIndex:
    num_rows = len(table.row_first)
    offset = np.frombuffer(table.offset, np.int64)
    size = np.frombuffer(table.size, np.int64)
    extension = np.frombuffer(table.extension, np.uint16)
    first = np.append(np.frombuffer(table.row_first, np.int64), len(offset))
    key_end = np.append(0, np.frombuffer(table.key_end, np.int64))
    _refuse_returning_keys(url, table, key_end)
    keep = np.ones(num_rows, bool)
    if table.gaps:
        keep[broken_rows(table.gaps, first, extension, offset)] = False
    _refuse_large_rows(url, table, first, offset, size, keep)
    index = ShardIndex(
        file_size=file_size,
        extensions=tuple(name.decode("utf-8", "surrogateescape") for name in table.extensions),
        checksum="",
        offset=offset,
        size=_narrow(size),
        extension=_narrow(extension),
        row_first=_narrow(first),
        row_crc=np.frombuffer(table.row_crc, np.uint32),
        keys=np.frombuffer(bytes(table.keys), np.uint8),
        key_end=_narrow(key_end),
        damage=account(url, table.gaps, keep, first, size, file_size),
    )
    return _sealed(index) if keep.all() else without_rows(index, np.flatnonzero(~keep).tolist())


def _narrow(values: IntArray) -> IntArray:
    largest = int(values.max(initial=0))
    return values.astype(np.min_scalar_type(largest))


def _refuse_returning_keys(url: str, table: MemberTable, key_end: NDArray[np.int64]) -> None:
    hashes = np.frombuffer(table.key_hash, np.int64)
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(np.diff(hashes[order]) == 0)
    for place in same:
        first, again = sorted((int(order[place]), int(order[place + 1])))
        key = table.keys[key_end[first] : key_end[first + 1]]
        if key == table.keys[key_end[again] : key_end[again + 1]]:
            raise ShardLayoutError(
                f"shard {display_url(url)}: rows {first} and {again} both have the key "
                f"{shown(bytes(key))!r}, with other rows between them, so the members of one sample "
                "would be delivered as two: sort the files by name when writing the shard (tar --sort=name)"
            )


def _refuse_large_rows(
    url: str,
    table: MemberTable,
    first: NDArray[np.int64],
    offset: NDArray[np.int64],
    size: NDArray[np.int64],
    keep: NDArray[np.bool_],
) -> None:
    if not len(keep):
        return
    stored = np.append(0, np.cumsum(BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK))
    last = first[1:] - 1
    span = offset[last] + size[last] - offset[first[:-1]]
    between = span - (stored[first[1:]] - stored[first[:-1]])
    payload = np.append(0, np.cumsum(size))
    payload = payload[first[1:]] - payload[first[:-1]]
    large = keep & (span > MAX_ROW_BYTES)
    allowed = np.maximum(payload, _MAX_BETWEEN_MEMBERS) + _EXTENDED_HEADERS * np.diff(first)
    spread = keep & (between > allowed)
    for rows, fault in ((large, f"more than {MAX_ROW_BYTES}"), (spread, "most of them of files between its members")):
        if rows.any():
            row = int(np.argmax(rows))
            start = table.key_end[row - 1] if row else 0
            raise ShardLayoutError(
                f"shard {display_url(url)}: row {row} (key {shown(bytes(table.keys[start : table.key_end[row]]))!r}) "
                f"takes {span[row]} bytes, {fault}, and a row is read in one piece: split it, or leave other files "
                "out when the shard is written"
            )
