"""Damage that a tar file shows by itself: which rows it affects, and how many are lost."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmagent_loader.shards.sources.urls import display_url
from dmagent_loader.shards.tar.header import BLOCK
from dmagent_loader.shards.tar.members import CUTS, TRAILING, Gap

IntArray = NDArray[np.integer[Any]]

_LACKING_BY_GAP = 2
"""Rows that one gap may have taken members from: the one before it and the one after it."""


@dataclass(frozen=True, kw_only=True)
class ShardDamage:
    """One damaged place of a shard and its cost.

    Attributes:
        shard: URL of the shard.
        kind: Kind of damage, for example ``"header zeroed"`` (`dmagent_loader.shards.tar.members`).
        offset: First byte that could not be used.
        bytes_lost: Bytes of the file that could not be used, or by which it has shrunk since it was indexed.
        rows_before: Readable rows before the damage.
        rows_kept: Readable rows in the whole shard.
        rows_lost: Lost rows, estimated from the lost bytes and the mean size of a row.
        at_least: The file was cut, so more rows may be lost than estimated.
        is_exact: `rows_lost` is a count, from the number of rows in the manifest, and not an estimate.
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
        lost = f"{'at least' if self.at_least else 'about'} {self.rows_lost} rows lost"
        if self.is_exact:
            lost = f"{self.rows_lost} rows lost, by the manifest above it"
        if self.at_least and not self.rows_lost:
            lost = "an unknown number of rows lost"
        is_other = (
            "; is it a tar at all? `dmagent shard` writes tar shards from other files"
            if self.offset == 0 and not self.rows_kept
            else ""
        )
        return (
            f"shard {display_url(self.shard)} is damaged at byte {self.offset}: {self.kind} ({self.bytes_lost} bytes "
            f"unusable, {lost}; {self.rows_before} rows readable before it, {self.rows_kept} in all){is_other}"
        )


def incomplete_rows(
    gaps: Sequence[Gap], first: NDArray[np.int64], extension: NDArray[np.uint16], offset: NDArray[np.int64]
) -> list[int]:
    """The rows that seem to have lost a member to damage.

    These are rows with a gap inside, or before one that reaches back into them; rows beside a gap whose set of
    extensions no row away from gaps has; rows beside a gap that lack an extension which otherwise equal rows have; and
    all rows that lack one, provided that they are no more than the gaps explain. Where an end marker comes before the
    end of the file, only the row before it is in doubt, and only for members that it lacks.

    Args:
        gaps: Damaged places of the shard.
        first: (R+1,) first member of each row, then M.
        extension: (M,) extension of each member.
        offset: (M,) offset of each payload in bytes.
    """
    num_rows = len(first) - 1
    lossy = [gap for gap in gaps if gap.kind != TRAILING]
    beside = {row for gap in lossy for row in (gap.rows_before - 1, gap.rows_before) if 0 <= row < num_rows}
    ended = {gap.rows_before - 1 for gap in gaps if gap.kind == TRAILING and gap.rows_before}
    if not beside and not ended:
        return []
    incomplete = {
        gap.rows_before - 1
        for gap in lossy
        if gap.rows_before and (gap.reaches_back or offset[first[gap.rows_before] - 1] > gap.start)
    }
    signatures = _signatures(first, extension)
    intact = {signature for row, signature in enumerate(signatures) if row not in beside}
    lacking = _lacking(signatures, intact or set(signatures))
    incomplete |= {row for row in beside if intact and signatures[row] not in intact}
    incomplete |= lacking & (beside | ended)
    if len(lacking) <= _LACKING_BY_GAP * len(gaps):
        incomplete |= lacking
    return sorted(incomplete)


def rows_that_lack_members(first: IntArray, extension: IntArray) -> list[int]:
    """The rows that seem to have lost a member in a shard that is damaged at an unknown place.

    A row lacks a member if another row has all of its extensions and more. If only a few rows do, all of them are
    returned; otherwise only the last row of the shard, if it is one of them.

    Args:
        first: (R+1,) first member of each row, then M.
        extension: (M,) extension of each member.
    """
    signatures = _signatures(first, extension)
    lacking = _lacking(signatures, set(signatures))
    return sorted(lacking if len(lacking) <= _LACKING_BY_GAP else lacking & {len(signatures) - 1})


def _lacking(signatures: list[frozenset[int]], known: set[frozenset[int]]) -> set[int]:
    """Rows whose extensions are a proper subset of a known set of extensions."""
    having: dict[int, list[frozenset[int]]] = defaultdict(list)
    for signature in known:
        for extension in signature:
            having[extension].append(signature)

    @functools.cache
    def lacks(signature: frozenset[int]) -> bool:
        # Compare only with the sets that share its rarest extension: there may be very many different sets.
        return any(signature < other for other in min((having[extension] for extension in signature), key=len))

    return {row for row, signature in enumerate(signatures) if lacks(signature)}


def _signatures(first: IntArray, extension: IntArray) -> list[frozenset[int]]:
    """(R,) set of extensions of each row."""
    extensions = extension.tolist()
    return [frozenset(extensions[start:end]) for start, end in pairwise(first.tolist())]


def stored_before(size: IntArray) -> NDArray[np.int64]:
    """(M+1,) bytes of headers and padded payloads before each member, and in all, if nothing lies between members.

    Args:
        size: (M,) size of each payload in bytes.
    """
    return np.append(0, np.cumsum(BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK))


def assess_damage(
    url: str,
    gaps: Sequence[Gap],
    keep: NDArray[np.bool_],
    first: NDArray[np.int64],
    size: NDArray[np.int64],
    file_size: int,
) -> tuple[ShardDamage, ...]:
    """The cost of each gap. A row that is dropped counts at the first gap beside it.

    Args:
        url: URL of the shard.
        gaps: Its damaged places.
        keep: (R,) False for rows that are dropped.
        first: (R+1,) first member of each row, then M.
        size: (M,) size of each payload in bytes.
        file_size: Size of the shard in bytes; the padding of its last member may be missing.
    """
    kept = int(keep.sum())
    before = stored_before(size)
    stored = before[first[1:]] - before[first[:-1]]
    mean_stored = float(stored[keep].mean()) if kept else 0.0
    damages = []
    dropped = set(np.flatnonzero(~keep).tolist())
    for gap in gaps:
        beside = dropped & {gap.rows_before - 1, gap.rows_before}
        dropped -= beside
        bytes_lost = min(file_size, gap.end - gap.start + sum(int(stored[row]) for row in beside))
        rows_lost = len(beside)
        if gap.kind != TRAILING and bytes_lost:
            rows_lost = max(1, rows_lost, round(bytes_lost / mean_stored) if mean_stored else 1)
        damages.append(
            ShardDamage(
                shard=url,
                kind=gap.kind,
                offset=gap.start,
                bytes_lost=bytes_lost,
                rows_before=int(keep[: gap.rows_before].sum()),
                rows_kept=kept,
                rows_lost=rows_lost,
                at_least=gap.kind in CUTS or gap.may_hide_rows,
            )
        )
    return tuple(damages)
