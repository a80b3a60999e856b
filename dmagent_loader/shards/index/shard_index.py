"""The index of one shard: position, key and checksum of every row.

It takes about 30 bytes per row of one member, in a handful of arrays, without a Python object per row.

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
from dmagent_loader.shards.tar import (
    BLOCK,
    Gap,
    KeyEnd,
    MemberTable,
    ShardDamage,
    assess_damage,
    incomplete_rows,
    scan,
    shown,
    stored_before,
)

IntArray = NDArray[np.integer[Any]]

MAX_ROW_BYTES = 1 << 31
"""Largest row: a row is read in one piece, and a larger one would exhaust the memory of the process."""

_MAX_BETWEEN_MEMBERS = 1 << 20
_EXTENDED_HEADERS = 4 * BLOCK
"""Bytes that the extended headers of one member may take: names and times, as GNU and pax store them."""


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Positions, keys and checksums of all rows of one shard.

    Attributes:
        file_size: Size of the tar in bytes.
        extensions: (E,) distinct extensions, lower-cased.
        offset, size: (M,) span of each payload in bytes.
        extension: (M,) index into `extensions`.
        row_first: (R+1,) first member of each row, then M.
        row_crc: (R,) crc32 over the payloads of each row, in order.
        keys: (bytes,) keys of all rows, concatenated, in UTF-8.
        key_end: (R+1,) 0, then the end of each key in `keys`.
        checksum: Hex sha256 over keys, extensions, sizes and row checksums. It identifies the content, wherever and
            whenever it was written.
        damage: Places that could not be read.
        hidden: Number of hidden files, which belong to no row.
        sha256: Hex sha256 of the whole file; None if it was not computed.
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
    hidden: int = 0
    sha256: str | None = None

    @property
    def num_rows(self) -> int:
        """R, the number of rows."""
        return len(self.row_crc)

    @property
    def num_members(self) -> int:
        """M, the number of members."""
        return len(self.offset)

    @property
    def payload_bytes(self) -> int:
        """Total size of all payloads, in bytes."""
        return int(self.size.sum(dtype=np.int64))

    @property
    def end_of_members(self) -> int:
        """End of the last payload in the file, in bytes; 0 without members."""
        return int(self.offset[-1]) + int(self.size[-1]) if self.num_members else 0

    def check(self) -> None:
        """Checks that no row reaches outside the file or the columns, as an index from elsewhere might.

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
        if type(self.hidden) is not int or self.hidden < 0:
            raise ValueError("its number of hidden files is none")
        if len(bytes.fromhex(self.checksum)) != hashlib.sha256().digest_size:
            raise ValueError("its checksum of the rows is none")
        if members:
            end = self.offset + self.size.astype(np.int64)
            # Each addend is checked, too: the sum of two that are too large may wrap around.
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
    key_ends_at: KeyEnd = "first-dot",
) -> ShardIndex:
    """Reads a shard once and indexes every intact row; damage is recorded, not raised.

    Args:
        url: URL of the shard, for messages.
        source: The open shard.
        size: Length of the shard in bytes.
        advance: Called with the number of bytes scanned since the last call.
        stop: Ends the work with `ScanStopped` when set.
        with_sha256: Also compute the sha256 of the whole file.
        key_ends_at: See `dmagent_loader.shards.tar.scan`.

    Raises:
        ScanStopped: `stop` was set.
        ShardLayoutError: The samples of the shard cannot be read by position: it is compressed or contains links, a key
            comes back after other rows, or a row is too large or spread over the file.
    """
    digest = hashlib.sha256() if with_sha256 else None
    members, gaps = scan(url, source, size, advance=advance, stop=stop, digest=digest, key_ends_at=key_ends_at)
    index = _from_members(url, members, gaps, size)
    return index if digest is None else replace(index, sha256=digest.hexdigest())


def without_rows(index: ShardIndex, rows: Sequence[int]) -> ShardIndex:
    """The index of the same shard without some of its rows."""
    if not rows:
        return index
    keep = np.ones(index.num_rows, bool)
    keep[list(rows)] = False
    row_sizes, key_sizes = np.diff(index.row_first), np.diff(index.key_end)
    members = np.repeat(keep, row_sizes)
    return with_checksum(
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


def with_checksum(index: ShardIndex) -> ShardIndex:
    """The index with the checksum of its content filled in."""
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


def _from_members(url: str, members: MemberTable, gaps: list[Gap], file_size: int) -> ShardIndex:
    num_rows = len(members.row_first)
    offset = np.frombuffer(members.offset, np.int64)
    size = np.frombuffer(members.size, np.int64)
    extension = np.frombuffer(members.extension, np.uint16)
    first = np.append(np.frombuffer(members.row_first, np.int64), len(offset))
    key_end = np.append(0, np.frombuffer(members.key_end, np.int64))
    _refuse_returning_keys(url, members, key_end)
    keep = np.ones(num_rows, bool)
    if gaps:
        keep[incomplete_rows(gaps, first, extension, offset)] = False
    _refuse_large_rows(url, members, first, offset, size, keep)
    index = ShardIndex(
        file_size=file_size,
        extensions=tuple(name.decode("utf-8", "surrogateescape") for name in members.extensions),
        checksum="",
        offset=offset,
        size=_narrow(size),
        extension=_narrow(extension),
        row_first=_narrow(first),
        row_crc=np.frombuffer(members.row_crc, np.uint32),
        keys=np.frombuffer(bytes(members.keys), np.uint8),
        key_end=_narrow(key_end),
        damage=assess_damage(url, gaps, keep, first, size, file_size),
        hidden=members.hidden,
    )
    return with_checksum(index) if keep.all() else without_rows(index, np.flatnonzero(~keep).tolist())


def _narrow(values: IntArray) -> IntArray:
    """The same values in the smallest unsigned type that holds them."""
    largest = int(values.max(initial=0))
    return values.astype(np.min_scalar_type(largest))


def _refuse_returning_keys(url: str, members: MemberTable, key_end: NDArray[np.int64]) -> None:
    """Raises ShardLayoutError if two rows have the same key. Only rows of equal hashes are compared."""
    hashes = np.frombuffer(members.key_hash, np.int64)
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(np.diff(hashes[order]) == 0)
    for position in same:
        first, again = sorted((int(order[position]), int(order[position + 1])))
        key = members.keys[key_end[first] : key_end[first + 1]]
        if key == members.keys[key_end[again] : key_end[again + 1]]:
            raise ShardLayoutError(
                f"shard {display_url(url)}: rows {first} and {again} both have the key "
                f"{shown(bytes(key))!r}, with other rows between them, so the members of one sample "
                "would be delivered as two: sort the files by name when writing the shard (tar --sort=name)"
            )


def _refuse_large_rows(
    url: str,
    members: MemberTable,
    first: NDArray[np.int64],
    offset: NDArray[np.int64],
    size: NDArray[np.int64],
    keep: NDArray[np.bool_],
) -> None:
    """Raises ShardLayoutError if a row that is kept spans too many bytes, or too many that are not its own."""
    if not len(keep):
        return
    stored = stored_before(size)
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
            start = members.key_end[row - 1] if row else 0
            key = shown(bytes(members.keys[start : members.key_end[row]]))
            raise ShardLayoutError(
                f"shard {display_url(url)}: row {row} (key {key!r}) takes {span[row]} bytes, {fault}, and a row is "
                "read in one piece: split it, or leave other files out when the shard is written"
            )
