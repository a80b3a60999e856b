"""The index of one shard: where every row is, what it is called, and its checksum.

About 30 bytes per row of one member, in a handful of arrays; no Python object per row.

Shapes: R rows, M members (files in the tar that belong to a row), E distinct extensions.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmagent_loader.errors import ShardLayoutError
from dmagent_loader.shards.header import BLOCK
from dmagent_loader.shards.reader import Source
from dmagent_loader.shards.tar import CUTS, TRAILING, Gap, MemberTable, scan
from dmagent_loader.shards.urls import display_url

IntArray = NDArray[np.integer[Any]]


@dataclass(frozen=True, kw_only=True)
class ShardDamage:
    """One damaged place of a shard, and what it costs.

    Attributes:
        shard: URL of the shard.
        kind: For example ``"header zeroed"`` (`dmagent_loader.shards.tar`).
        offset: First byte that could not be used.
        bytes_lost: Bytes of the file that could not be used.
        rows_before: Rows that are readable before it.
        rows_kept: Rows that are readable in the whole shard.
        rows_lost: Estimate from the bytes lost and the mean size of a row.
        at_least: The file was cut, so more rows may be lost than the estimate says.
    """

    shard: str
    kind: str
    offset: int
    bytes_lost: int
    rows_before: int
    rows_kept: int
    rows_lost: int
    at_least: bool

    def __str__(self) -> str:
        lost = f"{'at least' if self.at_least else 'about'} {self.rows_lost} rows lost"
        if self.at_least and not self.rows_lost:
            lost = "an unknown number of rows lost"
        return (
            f"shard {display_url(self.shard)} is damaged at byte {self.offset}: {self.kind} ({self.bytes_lost} bytes "
            f"unusable, {lost}; {self.rows_before} rows readable before it, {self.rows_kept} in all)"
        )


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
        checksum: Hex sha256 over keys, extensions and row checksums: the content, not where or when it was written.
        damage: What could not be read.
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
) -> ShardIndex:
    """Reads a shard once and indexes every row that is whole; damage is noted, not raised.

    Args:
        url: For messages.
        source: The open shard.
        size: Its length in bytes.
        advance: Called with the number of bytes passed since the last call.
        stop: When set, the work ends with `dmagent_loader.shards.tar.ScanStopped`.

    Raises:
        ShardLayoutError: The shard cannot be read as samples by position: compressed, links, a key that comes back.
    """
    table = scan(url, source, size, advance=advance, stop=stop)
    return _from_table(url, table, size)


def _from_table(url: str, table: MemberTable, file_size: int) -> ShardIndex:
    num_rows = len(table.row_first)
    offset = np.frombuffer(table.offset, np.int64)
    size = np.frombuffer(table.size, np.int64)
    extension = np.frombuffer(table.extension, np.uint16)
    first = np.append(np.frombuffer(table.row_first, np.int64), len(offset))
    key_end = np.append(0, np.frombuffer(table.key_end, np.int64))
    keys = np.frombuffer(bytes(table.keys), np.uint8)
    crc = np.frombuffer(table.row_crc, np.uint32)
    _refuse_returning_keys(url, table, key_end)
    keep = np.ones(num_rows, bool)
    if table.gaps:
        keep[_broken_rows(table.gaps, first, extension)] = False
    damage = _account(url, table.gaps, keep, first, size)
    if not keep.all():
        rows = np.flatnonzero(keep)
        members = np.repeat(keep, np.diff(first))
        keys = keys[np.repeat(keep, np.diff(key_end))]
        key_end = np.append(0, np.cumsum(np.diff(key_end)[rows]))
        first = np.append(0, np.cumsum(np.diff(first)[rows]))
        offset, size, extension, crc = offset[members], size[members], extension[members], crc[rows]
    digest = hashlib.sha256(repr(table.extensions).encode())
    for column in (keys, key_end, first, extension, crc):
        digest.update(column.tobytes())
    return ShardIndex(
        file_size=file_size,
        extensions=tuple(name.decode("utf-8", "surrogateescape") for name in table.extensions),
        checksum=digest.hexdigest(),
        offset=offset,
        size=_narrow(size),
        extension=_narrow(extension),
        row_first=_narrow(first),
        row_crc=crc,
        keys=keys,
        key_end=_narrow(key_end),
        damage=damage,
    )


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
                f"{key.decode('utf-8', 'replace')!r}, with other rows between them, so the members of one sample "
                "would be delivered as two: sort the files by name when writing the shard (tar --sort=name)"
            )


def _broken_rows(gaps: list[Gap], first: NDArray[np.int64], extension: NDArray[np.uint16]) -> list[int]:
    """The rows beside a gap that seem to have lost a member: no row away from gaps has the same extensions."""
    num_rows = len(first) - 1
    lossy = [gap for gap in gaps if gap.kind != TRAILING]
    beside = {row for gap in lossy for row in (gap.rows_before - 1, gap.rows_before) if 0 <= row < num_rows}

    def signature(row: int) -> bytes:
        return np.sort(extension[first[row] : first[row + 1]]).tobytes()

    whole = {signature(row) for row in range(num_rows) if row not in beside} if beside else set()
    return [row for row in sorted(beside) if whole and signature(row) not in whole]


def _account(
    url: str,
    gaps: list[Gap],
    keep: NDArray[np.bool_],
    first: NDArray[np.int64],
    size: NDArray[np.int64],
) -> tuple[ShardDamage, ...]:
    kept = int(keep.sum())
    members_before = np.append(0, np.cumsum(BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK))
    stored = members_before[first[1:]] - members_before[first[:-1]]
    mean_stored = float(stored[keep].mean()) if kept else 0.0
    account = []
    for gap in gaps:
        beside = [row for row in (gap.rows_before - 1, gap.rows_before) if 0 <= row < len(keep) and not keep[row]]
        bytes_lost = gap.end - gap.start + sum(int(stored[row]) for row in beside)
        at_least = gap.kind in CUTS
        rows_lost = 0
        if gap.kind != TRAILING and bytes_lost:
            rows_lost = max(1, len(beside), round(bytes_lost / mean_stored) if mean_stored else 1)
        account.append(
            ShardDamage(
                shard=url,
                kind=gap.kind,
                offset=gap.start,
                bytes_lost=bytes_lost,
                rows_before=int(keep[: gap.rows_before].sum()),
                rows_kept=kept,
                rows_lost=rows_lost,
                at_least=at_least,
            )
        )
    return tuple(account)
