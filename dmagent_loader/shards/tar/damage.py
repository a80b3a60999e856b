"""Damaged places of a shard, and what each of them costs."""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dmagent_loader.shards.sources.urls import display_url
from dmagent_loader.shards.tar.header import BLOCK
from dmagent_loader.shards.tar.members import CUTS, TRAILING, Gap

if TYPE_CHECKING:
    from dmagent_loader.shards.index.shard_index import ShardIndex
    from dmagent_loader.shards.manifest import ShardRecord

FEWER_ROWS = "fewer rows than were written"
CHANGED = "not the file that was written"
"""Kinds of damage that only a manifest shows."""
RESIZED = "another size at the same modification time"
"""A kind of damage that only an earlier index of the shard shows."""

_LACKING_BY_GAP = 2
"""Rows that one damaged place may have taken members from: the one before, and the one after."""


@dataclass(frozen=True, kw_only=True)
class ShardDamage:
    """One damaged place of a shard, and what it costs.

    Attributes:
        shard: URL of the shard.
        kind: For example ``"header zeroed"`` (`dmagent_loader.shards.tar.scan`).
        offset: First byte that could not be used.
        bytes_lost: Bytes of the file that could not be used, or by which it is smaller than when it was indexed.
        rows_before: Rows that are readable before it.
        rows_kept: Rows that are readable in the whole shard.
        rows_lost: Estimate from the bytes lost and the mean size of a row.
        at_least: The file was cut, so more rows may be lost than the estimate says.
        is_exact: The manifest above the shard says how many rows were written, so `rows_lost` is no estimate.
    """

    shard: str
    kind: str
    offset: int
    bytes_lost: int
    rows_before: int
    rows_kept: int
    rows_lost: int
    at_least: bool
    is_exact: bool = False

    def __str__(self) -> str:
        if self.kind == CHANGED:
            return (
                f"shard {display_url(self.shard)} is not the file that was written: its size, rows or sha256 are not "
                f"those of the manifest.json above it ({self.rows_kept} rows readable); if it was replaced on "
                "purpose, correct the manifest or remove it"
            )
        if self.kind == RESIZED:
            change = f"lost {self.bytes_lost}" if self.bytes_lost > 0 else f"gained {-self.bytes_lost}"
            return (
                f"shard {display_url(self.shard)} has {change} bytes since it was indexed, but has the modification "
                f"time that it had, as where a disk or a copy loses bytes ({self.rows_kept} of its rows readable, "
                f"{self.rows_lost} lost): restore it; if it was replaced on purpose, `touch` it"
            )
        lost = f"{'at least' if self.at_least else 'about'} {self.rows_lost} rows lost"
        if self.is_exact:
            lost = f"{self.rows_lost} rows lost, by the manifest above it"
        if self.at_least and not self.rows_lost:
            lost = "an unknown number of rows lost"
        is_other = "; is it a tar at all?" if self.offset == 0 and not self.rows_kept else ""
        return (
            f"shard {display_url(self.shard)} is damaged at byte {self.offset}: {self.kind} ({self.bytes_lost} bytes "
            f"unusable, {lost}; {self.rows_before} rows readable before it, {self.rows_kept} in all){is_other}"
        )


def is_as_written(record: ShardRecord, *, size: int, rows: int, sha256: str | None) -> bool:
    """Whether size in bytes, rows and, where it was computed, sha256 of a shard are those of the manifest."""
    return (size, rows) == (record.bytes, record.rows) and sha256 in (None, record.sha256)


def compared(url: str, index: ShardIndex, record: ShardRecord) -> tuple[ShardDamage, ...]:
    """The damage of a shard, in the light of what the manifest says was written.

    The manifest turns estimates into counts, and shows what a tar alone cannot: zeros at the end that look like
    padding, and changed bytes in a payload.

    Args:
        url: The shard.
        index: Its index, as built.
        record: The manifest's entry.
    """
    kept = index.num_rows
    lost = record.rows - kept
    end = int(index.offset[-1] + index.size[-1]) if index.num_members else 0
    found = ShardDamage(
        shard=url,
        kind=FEWER_ROWS if lost > 0 else CHANGED,
        offset=end if lost > 0 else 0,
        bytes_lost=max(0, index.file_size - end) if lost > 0 else 0,
        rows_before=kept,
        rows_kept=kept,
        rows_lost=max(lost, 0),
        at_least=False,
        is_exact=True,
    )
    if not index.damage:
        as_written = is_as_written(record, size=index.file_size, rows=kept, sha256=index.sha256)
        return () if as_written else (found,)
    if lost < 0:
        return (*index.damage, found)
    counted = []
    for number, damage in enumerate(index.damage, start=1):
        rows = lost if number == len(index.damage) else min(lost, damage.rows_lost)
        lost -= rows
        rows_before = min(damage.rows_before, kept)
        counted.append(
            replace(damage, rows_before=rows_before, rows_kept=kept, rows_lost=rows, at_least=False, is_exact=True)
        )
    return tuple(counted)


def resized(url: str, index: ShardIndex, before: ShardIndex) -> ShardDamage:
    """The damage of a shard that has another size than when it was indexed, at the same modification time.

    Args:
        url: The shard.
        index: The rows that it still has.
        before: Its index of then.
    """
    return ShardDamage(
        shard=url,
        kind=RESIZED,
        offset=0,
        bytes_lost=before.file_size - index.file_size,
        rows_before=index.num_rows,
        rows_kept=index.num_rows,
        rows_lost=max(0, before.num_rows - index.num_rows),
        at_least=False,
    )


def broken_rows(
    gaps: list[Gap], first: NDArray[np.int64], extension: NDArray[np.uint16], offset: NDArray[np.int64]
) -> list[int]:
    """The rows that seem to have lost a member to damage.

    Those with a gap inside; those beside a gap whose extensions no row away from gaps has, or only with others besides;
    and `rows_that_lack_members`, if they are no more than the gaps explain. Where an end marker comes before the end of
    the file, only the row before it is in doubt, and only for members it lacks.
    """
    num_rows = len(first) - 1
    lossy = [gap for gap in gaps if gap.kind != TRAILING]
    beside = {row for gap in lossy for row in (gap.rows_before - 1, gap.rows_before) if 0 <= row < num_rows}
    ended = {gap.rows_before - 1 for gap in gaps if gap.kind == TRAILING and gap.rows_before}
    if not beside and not ended:
        return []
    broken = {
        gap.rows_before - 1 for gap in lossy if gap.rows_before and offset[first[gap.rows_before] - 1] > gap.start
    }
    signatures = _signatures(first, extension)
    whole = {signature for row, signature in enumerate(signatures) if row not in beside}
    lacking = _lacking(signatures, whole or set(signatures))
    broken |= {row for row in beside if whole and signatures[row] not in whole}
    broken |= lacking & (beside | ended)
    if len(lacking) <= _LACKING_BY_GAP * len(gaps):
        broken |= lacking
    return sorted(broken)


def rows_that_lack_members(first: NDArray[np.integer[Any]], extension: NDArray[np.integer[Any]]) -> list[int]:
    """The rows of a shard that is known to be damaged, but not where, that seem to have lost a member.

    The last one, if another row has all of its extensions and others besides; and any such row, if they are so few.
    """
    signatures = _signatures(first, extension)
    lacking = _lacking(signatures, set(signatures))
    return sorted(lacking if len(lacking) <= _LACKING_BY_GAP else lacking & {len(signatures) - 1})


def _lacking(signatures: list[frozenset[int]], known: set[frozenset[int]]) -> set[int]:
    """Rows to which a known row has all of their extensions, and others besides."""
    having: dict[int, list[frozenset[int]]] = defaultdict(list)
    for signature in known:
        for extension in signature:
            having[extension].append(signature)

    @functools.cache
    def lacks(signature: frozenset[int]) -> bool:
        # Only among those with its rarest extension: rows may all have others, and then there are very many.
        return any(signature < other for other in min((having[extension] for extension in signature), key=len))

    return {row for row, signature in enumerate(signatures) if lacks(signature)}


def _signatures(first: NDArray[np.integer[Any]], extension: NDArray[np.integer[Any]]) -> list[frozenset[int]]:
    """(R,) the extensions of each row."""
    extensions = extension.tolist()
    return [frozenset(extensions[start:end]) for start, end in pairwise(first.tolist())]


def account(
    url: str,
    gaps: list[Gap],
    keep: NDArray[np.bool_],
    first: NDArray[np.int64],
    size: NDArray[np.int64],
    file_size: int,
) -> tuple[ShardDamage, ...]:
    """What each gap costs; a row that is given up counts at the first gap beside it.

    Args:
        url: The shard.
        gaps: Its damaged places.
        keep: (R,) which rows are whole.
        first: (R+1,) first member of each row, then M.
        size: (M,) sizes of the members.
        file_size: Bytes of the shard, which may end without the padding of its last member.
    """
    kept = int(keep.sum())
    members_before = np.append(0, np.cumsum(BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK))
    stored = members_before[first[1:]] - members_before[first[:-1]]
    mean_stored = float(stored[keep].mean()) if kept else 0.0
    account = []
    given_up = set(np.flatnonzero(~keep).tolist())
    for gap in gaps:
        beside = given_up & {gap.rows_before - 1, gap.rows_before}
        given_up -= beside
        bytes_lost = min(file_size, gap.end - gap.start + sum(int(stored[row]) for row in beside))
        at_least = gap.kind in CUTS or gap.may_hide_rows
        rows_lost = len(beside)
        if gap.kind != TRAILING and bytes_lost:
            rows_lost = max(1, rows_lost, round(bytes_lost / mean_stored) if mean_stored else 1)
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
