"""The rows that each domain gives next, looked up ahead: they stay valid when the mix changes.

A new mix changes the order of the domains, but not the order of the rows of a domain. If mixes change often, the runs
of positions between them are short, and to look up their rows costs about as much for a few rows as for thousands.
Where shards are remote, thousands of positions are planned ahead, and each new mix has nearly all of their rows drawn
again.

Shapes: D domains, n samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dmagent_loader._loading.blocks_ahead import BlocksOfRows
from dmagent_loader.mixture.domain_order import ranges
from dmagent_loader.mixture.plan import Plan
from dmagent_loader.mixture.segment import Located
from dmagent_loader.mixture.simplex import IntArray
from dmagent_loader.shards.array_rows import ArrayRows

_MOST_AHEAD = 1 << 14
"""Rows of all domains that are looked up beyond those of a run."""
_AS_BEFORE = 0.75
"""Share of them that follows the draws since the last look-up."""
_MOST_OF_OTHERS = 3
"""Rows of other ranks and workers for each own one, up to which the rows between two own ones are looked up, too."""
_MOST_KNOWN = 1 << 18
"""Rows of all domains above which those of domains that a run does not draw from are forgotten."""
_POSITIONS = 6
"""Columns of `ArrayRows.find`."""
_NEVER = np.iinfo(np.int64).max


class FoundRows(NamedTuple):
    """The rows of a run.

    Attributes:
        located: Their addresses.
        positions: Their positions as `ArrayRows.find` returns them; None: these were not looked up.
        blocks: Their blocks; None: shards are local.
    """

    located: Located
    positions: IntArray | None = None
    blocks: BlocksOfRows | None = None


class RowsAhead:
    """The next rows of each domain.

    Args:
        plan: Order of the samples.
        arrays: Reader of whole batches, whose positions of rows are looked up, too; None: it is not used.
        blocks_of: `RowSource.blocks_of`, if there are remote shards.
    """

    def __init__(
        self,
        plan: Plan,
        arrays: ArrayRows | None,
        blocks_of: Callable[[IntArray, IntArray, IntArray], tuple[IntArray, IntArray]] | None = None,
    ) -> None:
        self._plan, self._arrays, self._blocks_of = plan, arrays, blocks_of
        self._floor: IntArray = np.zeros(len(plan.space), dtype=np.int64)
        """(D,) lowest draw of each domain in the last run in use that drew from it, as far as `_look_up` knows."""
        self._begun: list[Located] = []
        """Runs in use since the last look-up."""
        self._first: IntArray = np.zeros_like(self._floor)
        """(D,) first known draw of each domain."""
        self._length: IntArray = np.zeros_like(self._floor)
        """(D,) number of known draws."""
        self._begin: IntArray = np.zeros_like(self._floor)
        """(D,) place of the first known draw in the table."""
        self._table: IntArray = np.empty((0, 0), dtype=np.int64)
        """Shard and row of each known draw, domain by domain; its position, as `ArrayRows.find` returns it; and the
        places of its blocks in the keys below."""
        self._end_of_positions = 2 if arrays is None else 2 + _POSITIONS
        self._keys: IntArray = np.empty(0, dtype=np.int64)
        """Keys of the blocks of the table, rising."""
        self._ahead = 0

    def begin(self, run: Located) -> None:
        """Marks a run as the one in use: what comes before its draws may be forgotten."""
        self._begun.append(run)

    def find(self, domain: IntArray, draw: IntArray) -> FoundRows:
        """The rows of a run.

        Args:
            domain: (n,) domain numbers.
            draw: (n,) number of earlier samples of the domain.
        """
        place = draw - self._first[domain]
        # Without a sign, a negative number is larger than any length.
        if np.count_nonzero(place.view(np.uint64) >= self._length.view(np.uint64)[domain]):
            if not self._look_up(domain, draw):
                shard, row = self._plan.rows(domain, draw)
                blocks = None if self._blocks_of is None else BlocksOfRows.of(*self._blocks_of(domain, shard, row))
                return FoundRows(Located(domain, draw, shard, row), blocks=blocks)
            place = draw - self._first[domain]
        columns, end = self._table.take(self._begin[domain] + place, axis=0).T, self._end_of_positions
        return FoundRows(
            Located(domain, draw, columns[0], columns[1]),
            None if self._arrays is None else columns[2:end],
            None if self._blocks_of is None else BlocksOfRows(self._keys, tuple(columns[end:])),
        )

    def _look_up(self, domain: IntArray, draw: IntArray) -> bool:
        """Makes the rows of a run known, and more of each domain, twice as many as the last time.

        Returns:
            False: too many of the rows between them belong to other ranks or workers.
        """
        floor = self._lowest_in_use()  # in any case: the runs that have begun would add up
        low, high = np.full_like(self._first, _NEVER), np.zeros_like(self._first)
        np.minimum.at(low, domain, draw)
        np.maximum.at(high, domain, draw + 1)
        is_used = high > 0
        span = np.where(is_used, high - low, 0)
        total = int(span.sum())
        if total > (1 + _MOST_OF_OTHERS) * len(draw):
            return False
        first = np.maximum(self._first, floor)
        end = np.maximum(self._first + self._length, first)
        is_apart = is_used & ((low < first) | (low > end))
        first = np.where(is_apart, low, first)
        # Most of the additional rows are shared out as those since the last time, and some evenly: mixes change.
        past = span + np.maximum(first - self._first, 0)
        share = _AS_BEFORE * past / past.sum() + (1 - _AS_BEFORE) / len(past)
        more = np.ceil(self._ahead * share).astype(np.int64)
        num_known = np.where(is_apart, 0, end - first)
        num_new = np.where(is_used, np.maximum(high + more - first - num_known, 0), 0)
        if int((num_known + num_new).sum()) > _MOST_KNOWN:
            num_known[~is_used] = 0
        domains = np.arange(len(first)).repeat(num_new)
        new = self._columns(domains, ranges(first + num_known, num_new))
        self._ahead = min(max(2 * self._ahead, len(draw)), _MOST_AHEAD)
        known = self._begin + first - self._first
        self._table = _alternating(self._table.reshape(-1, new.shape[1]), known, num_known, new, num_new)
        self._first, self._length = first, num_known + num_new
        self._begin = np.cumsum(self._length) - self._length
        self._forget_blocks()
        return True

    def _lowest_in_use(self) -> IntArray:
        """`_floor`, with the runs that have begun since the last look-up."""
        # Not when they begin: a look-up follows on about every tenth new mix, and each of these steps takes three times
        # as long when it comes alone, between batches.
        for run in self._begun:
            low = np.full_like(self._floor, _NEVER)
            np.minimum.at(low, run.domain, run.draw)
            self._floor = np.where(low < _NEVER, low, self._floor)
        self._begun.clear()
        return self._floor

    def _columns(self, domain: IntArray, draw: IntArray) -> IntArray:
        """The part of the table for draws that are not known yet."""
        shard, row = self._plan.rows(domain, draw)
        columns = [shard, row]
        keys = None if self._blocks_of is None else self._blocks_of(domain, shard, row)
        if self._arrays is not None:
            columns.extend(self._arrays.find(domain, shard, row))
        if keys is not None:
            blocks = BlocksOfRows.of(*keys)
            all_keys = np.union1d(self._keys, blocks.keys)
            self._number_anew(np.searchsorted(all_keys, self._keys))
            place = np.searchsorted(all_keys, blocks.keys)
            columns.extend(place[numbers] for numbers in blocks.numbers)
            self._keys = all_keys
        return np.stack(columns, axis=1)

    def _forget_blocks(self) -> None:
        """Drops the keys of blocks that the table does not name any more."""
        is_named = np.zeros(len(self._keys), dtype=bool)
        for numbers in self._table[:, self._end_of_positions :].T:
            is_named[numbers] = True
        if not is_named.all():
            self._number_anew(is_named.cumsum() - 1)
            self._keys = self._keys[is_named]

    def _number_anew(self, place: IntArray) -> None:
        """Replaces the places of blocks in the keys by others: (K,)."""
        for numbers in self._table[:, self._end_of_positions :].T:
            numbers[:] = place[numbers]


def _alternating(
    ones: IntArray, first: IntArray, lengths: IntArray, others: IntArray, lengths_of_others: IntArray
) -> IntArray:
    """Rows of one table and rows of another in turn, for each domain.

    Args:
        ones: One table.
        first: (D,) first row to take from it for each domain.
        lengths: (D,) number of its rows to take.
        others: The other table, domain by domain, of which all rows are taken.
        lengths_of_others: (D,) number of rows of each domain in it.
    """
    # Slices are copied several times as fast as rows that are chosen by their numbers.
    pieces: list[IntArray] = []
    begin = 0
    columns = (first, lengths, lengths_of_others)
    for start, count, of_others in zip(*(column.tolist() for column in columns), strict=True):
        pieces += (ones[start : start + count], others[begin : begin + of_others])
        begin += of_others
    return np.concatenate(pieces)
