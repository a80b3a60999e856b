"""Damage that a tar does not show by itself: comparison with the manifest above a shard and with an earlier index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dmagent_loader.shards.index.overview import KnownShard, KnownShards
from dmagent_loader.shards.index.shard_index import ShardIndex, without_rows
from dmagent_loader.shards.manifest import ShardRecord
from dmagent_loader.shards.sources.urls import display_url
from dmagent_loader.shards.tar import ShardDamage, rows_that_lack_members

FEWER_ROWS = "fewer rows than were written"
CHANGED = "not the file that was written"
"""Kinds of damage that only a manifest shows."""
OTHER_BYTES = "other bytes at the same modification time"
"""A kind of damage that only an earlier index shows."""


class ChangedShard(ShardDamage):
    """Damage of kind `CHANGED`: size, rows or sha256 of the shard differ from the manifest."""

    def __str__(self) -> str:
        return (
            f"shard {display_url(self.shard)} is not the file that was written: its size, rows or sha256 are not those "
            f"of the manifest.json above it ({self.rows_kept} rows readable); if it was replaced on purpose, take its "
            "rows, bytes and sha256 out of that manifest"
        )


@dataclass(frozen=True, kw_only=True)
class UntimelyShard(ShardDamage):
    """Damage of kind `OTHER_BYTES`: the bytes of the shard have changed since it was indexed, its time has not.

    Attributes:
        cached_index: File of its earlier index.
    """

    cached_index: str

    def __str__(self) -> str:
        change = f"has lost {self.bytes_lost} bytes" if self.bytes_lost > 0 else f"has gained {-self.bytes_lost} bytes"
        change = change if self.bytes_lost else "lacks rows that it had"
        return (
            f"shard {display_url(self.shard)} {change} since it was indexed, but has the modification time that it "
            f"had, as where a disk or a copy loses bytes ({self.rows_kept} of its rows readable, {self.rows_lost} "
            f"lost): restore it; if it was replaced on purpose, remove its cached index {self.cached_index} and open "
            "the shards again"
        )


def verified(url: str, index: ShardIndex, record: ShardRecord | None) -> ShardIndex:
    """The index with the damage that the manifest shows.

    The result is not cached, so a manifest that is corrected or removed counts at the next start. A shard that differs
    from the manifest may lack members without a gap in its tar, so rows that lack one are left out.

    Args:
        url: URL of the shard.
        index: Its index, as built.
        record: Its record in the manifest; None leaves the index as it is.
    """
    if record is None:
        return index
    if not _is_as_written(record, index.file_size, index.num_rows, index.sha256):
        index = without_rows(index, rows_that_lack_members(index.row_first, index.extension))
    return replace(index, damage=_compared(url, index, record))


def is_verified(shard: KnownShard, record: ShardRecord | None) -> bool:
    """Whether a shard was compared with its record in the manifest, if it has one, and is as it was written."""
    if record is None:
        return True
    return shard.sha256 is not None and _is_as_written(record, shard.version.size, shard.rows, shard.sha256)


def are_verified(shards: KnownShards, records: Sequence[ShardRecord | None]) -> bool:
    """Whether `is_verified` holds for each of consecutive shards."""
    if records.count(None) == len(records):
        return True
    digests = shards.sha256.tobytes().hex()
    width = len(digests) // len(records)
    facts = zip(records, shards.sizes.tolist(), shards.rows.tolist(), shards.has_sha256.tolist(), strict=True)
    return all(
        record is None
        or (has_sha256 == 1 and _is_as_written(record, size, rows, digests[place * width : (place + 1) * width]))
        for place, (record, size, rows, has_sha256) in enumerate(facts)
    )


def with_content(index: ShardIndex, checksum: str) -> ShardIndex | None:
    """The index of the content with this checksum; None if the shard has another content.

    That is either all rows or those that `verified` keeps, whatever the manifest says by now.
    """
    if index.checksum != checksum:
        index = without_rows(index, rows_that_lack_members(index.row_first, index.extension))
    return index if index.checksum == checksum else None


def without_new_rows(url: str, index: ShardIndex, before: ShardIndex, cached_index: Path) -> ShardIndex | None:
    """The index of a shard that lost bytes, but not its modification time, with the rows of its earlier index only.

    Args:
        url: URL of the shard.
        index: Its index, as built.
        before: Its earlier index, of the same modification time.
        cached_index: File of the earlier index.

    Returns:
        The index; None if nothing is lost: all earlier rows are there, in a file of the same size.
    """
    known = {(before.key(row), crc) for row, crc in enumerate(before.row_crc.tolist())}
    present = [(index.key(row), crc) for row, crc in enumerate(index.row_crc.tolist())]
    if index.file_size == before.file_size and known <= set(present):
        return None
    index = without_rows(index, [number for number, row in enumerate(present) if row not in known])
    damage = UntimelyShard(
        shard=url,
        kind=OTHER_BYTES,
        cached_index=str(cached_index),
        offset=0,
        bytes_lost=before.file_size - index.file_size,
        rows_before=index.num_rows,
        rows_kept=index.num_rows,
        rows_lost=max(0, before.num_rows - index.num_rows),
        at_least=False,
    )
    return replace(index, damage=(damage,))


def _is_as_written(record: ShardRecord, size: int, rows: int, sha256: str | None) -> bool:
    """Whether size in bytes, rows and, if it was computed, sha256 of a shard are those of its record."""
    return (size, rows) == (record.bytes, record.rows) and sha256 in (None, record.sha256)


def _compared(url: str, index: ShardIndex, record: ShardRecord) -> tuple[ShardDamage, ...]:
    """The damage of a shard in the light of the manifest.

    The manifest turns estimates into counts. It also shows damage that a tar hides: zeros at the end that look like
    padding, and changed bytes in a payload.
    """
    lost = record.rows - index.num_rows
    if not index.damage and _is_as_written(record, index.file_size, index.num_rows, index.sha256):
        return ()
    if not index.damage or lost < 0:
        return (*index.damage, _unlike_manifest(url, index, lost))
    counted = []
    for number, damage in enumerate(index.damage, start=1):
        # The last place takes the rows that the estimates leave over.
        rows = lost if number == len(index.damage) else min(lost, damage.rows_lost)
        lost -= rows
        counted.append(
            replace(
                damage,
                rows_before=min(damage.rows_before, index.num_rows),
                rows_kept=index.num_rows,
                rows_lost=rows,
                at_least=False,
                is_exact=True,
            )
        )
    return tuple(counted)


def _unlike_manifest(url: str, index: ShardIndex, lost: int) -> ShardDamage:
    """The damage of a shard whose tar looks intact, but which has `lost` rows fewer than its manifest says."""
    end = index.end_of_members if lost > 0 else 0
    make = ShardDamage if lost > 0 else ChangedShard
    return make(
        shard=url,
        kind=FEWER_ROWS if lost > 0 else CHANGED,
        offset=end,
        bytes_lost=max(0, index.file_size - end) if lost > 0 else 0,
        rows_before=index.num_rows,
        rows_kept=index.num_rows,
        rows_lost=max(lost, 0),
        at_least=False,
        is_exact=True,
    )
