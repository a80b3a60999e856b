"""The rows that each domain gives next, looked up ahead: they stay valid when the mix changes.

A new mix changes the order of the domains, but not the order of the rows of a domain. If mixes change often, the runs
of positions between them are short, and to look up their rows costs about as much for a few rows as for thousands.

Shapes: D domains, n samples.
"""

from __future__ import annotations

import numpy as np

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


class RowsAhead:
    """The next rows of each domain.

    Args:
        plan: Order of the samples.
        arrays: Reader of whole batches, whose positions of rows are looked up, too; None: it is not used.
    """

    def __init__(self, plan: Plan, arrays: ArrayRows | None) -> None:
        self._plan, self._arrays = plan, arrays
        self._first: IntArray = np.zeros(len(plan.space), dtype=np.int64)
        """(D,) first known draw of each domain."""
        self._length: IntArray = np.zeros_like(self._first)
        """(D,) number of known draws."""
        self._begin: IntArray = np.zeros_like(self._first)
        """(D,) place of the first known draw in the table."""
        self._table: IntArray = np.empty((0, 2 if arrays is None else 8), dtype=np.int64)
        """Shard and row of each known draw, domain by domain; and its position, as `ArrayRows.find` returns it."""
        self._ahead = 0

    def find(self, domain: IntArray, draw: IntArray) -> tuple[Located, IntArray | None]:
        """The rows of a run.

        Args:
            domain: (n,) domain numbers.
            draw: (n,) number of earlier samples of the domain.

        Returns:
            Their addresses, and their positions as `ArrayRows.find` returns them; None: these were not looked up.
        """
        place = draw - self._first[domain]
        # Without a sign, a negative number is larger than any length.
        if np.count_nonzero(place.view(np.uint64) >= self._length.view(np.uint64)[domain]):
            if not self._look_up(domain, draw):
                return Located(domain, draw, *self._plan.rows(domain, draw)), None
            place = draw - self._first[domain]
        columns = self._table[self._begin[domain] + place].T
        return Located(domain, draw, columns[0], columns[1]), None if self._arrays is None else columns[2:]

    def _look_up(self, domain: IntArray, draw: IntArray) -> bool:
        """Makes the rows of a run known, and more of each domain, twice as many as the last time.

        Returns:
            False: too many of the rows between them belong to other ranks or workers.
        """
        low, high = np.full_like(self._first, np.iinfo(np.int64).max), np.zeros_like(self._first)
        np.minimum.at(low, domain, draw)
        np.maximum.at(high, domain, draw + 1)
        is_used = high > 0
        span = np.where(is_used, high - low, 0)
        total = int(span.sum())
        if total > (1 + _MOST_OF_OTHERS) * len(draw):
            return False
        first = np.where(is_used, low, self._first)
        # Most of the additional rows are shared out as those since the last time, and some evenly: mixes change.
        past = span + np.maximum(first - self._first, 0)
        share = _AS_BEFORE * past / past.sum() + (1 - _AS_BEFORE) / len(past)
        more = np.ceil(self._ahead * share).astype(np.int64)
        end = self._first + self._length
        is_back = first < self._first
        num_known = np.where(is_back, 0, np.maximum(end - first, 0))
        end = np.maximum(np.where(is_used, high + more, end), np.where(is_back, 0, end))
        self._ahead = min(max(2 * self._ahead, len(draw)), _MOST_AHEAD)
        length = end - first
        num_new = length - num_known
        domains = np.arange(len(length)).repeat(num_new)
        shard, row = self._plan.rows(domains, ranges(first + num_known, num_new))
        found = (shard, row) if self._arrays is None else (shard, row, *self._arrays.find(domains, shard, row))
        known = self._begin + first - self._first
        self._table = _alternating(self._table, known, num_known, np.stack(found, axis=1), num_new)
        self._first, self._length, self._begin = first, length, np.cumsum(length) - length
        return True


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
