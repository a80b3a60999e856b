"""The rows that a pass over a domain has not drawn yet, when the shards change in the middle of it.

Shards are recognised by their content. Of a shard that stays, only rows that the pass has not drawn are left; all rows
of a new shard are. A shard that is gone is remembered until the pass ends: if it comes back earlier, its drawn rows are
not drawn again.

Runs are rows in a sequence: (n, 2), the first row and the number of rows.

Shapes: D domains, S shards of a domain, n samples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dmagent_loader.mixture.hashing import UIntArray
from dmagent_loader.mixture.simplex import IntArray

NO_RUNS: IntArray = np.empty((0, 2), dtype=np.int64)


@dataclass(frozen=True)
class ShardSet:
    """The shards of all domains: all that the order of samples depends on.

    Attributes:
        rows: For each domain, the rows of each shard, (S,) int64.
        contents: For each domain, 64 bits that identify the content of each shard, (S,) uint64.
    """

    rows: Sequence[IntArray]
    contents: Sequence[UIntArray]

    @classmethod
    def numbered(cls, rows: Sequence[IntArray]) -> ShardSet:
        """Shards of unknown content, identified by their numbers."""
        return cls(rows, [np.arange(len(its), dtype=np.uint64) for its in rows])


@dataclass(frozen=True)
class ShardLeft:
    """What is left of a shard from which the present pass has drawn.

    Attributes:
        content: Identifies the content of the shard.
        num_rows: Rows of the whole shard.
        runs: (n, 2) rows that the pass has not drawn.
    """

    content: int
    num_rows: int
    runs: IntArray


def runs_of(rows: IntArray) -> IntArray:
    """Rising row numbers as runs."""
    if not len(rows):
        return NO_RUNS
    first = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
    return np.column_stack([rows[first], np.diff(first, append=len(rows))])


def rows_of(runs: IntArray) -> IntArray:
    """Runs as rising row numbers."""
    first, length = runs[:, 0], runs[:, 1]
    before = np.cumsum(length) - length
    return np.asarray(np.repeat(first - before, length) + np.arange(int(length.sum())), dtype=np.int64)


class RestOfPass:
    """The rest of a pass, over another set of shards than the pass began with.

    Args:
        names: (D,) names of the domains.
        shards: Their shards.
        left: Domain -> what is left of shards from which its present pass has drawn; of all others, all rows are left.

    Attributes:
        counts: For each domain, the rows left of each shard, (S,) int64.
        absent: Domain -> what is left of shards that are not among `shards`.
    """

    def __init__(self, names: Sequence[str], shards: ShardSet, left: Mapping[str, Sequence[ShardLeft]]) -> None:
        self.counts = [np.array(rows, dtype=np.int64) for rows in shards.rows]
        self.absent = {name: list(listed) for name, listed in left.items() if name not in names and listed}
        self._first_shard = np.concatenate([[0], np.cumsum([len(rows) for rows in shards.rows])])
        self._runs: dict[int, IntArray] = {}
        for domain, name in enumerate(names):
            waiting: defaultdict[tuple[int, int], list[ShardLeft]] = defaultdict(list)
            for one in left.get(name, ()):
                waiting[one.content, one.num_rows].append(one)
            contents, rows = shards.contents[domain], shards.rows[domain]
            known = np.array([content for content, _ in waiting], dtype=np.uint64)
            for shard in np.flatnonzero(np.isin(contents, known)).tolist():
                same = waiting.get((int(contents[shard]), int(rows[shard])))
                if same:
                    runs = same.pop(0).runs
                    self.counts[domain][shard] = runs[:, 1].sum()
                    self._runs[int(self._first_shard[domain]) + shard] = runs
            gone = [one for same in waiting.values() for one in same]
            if gone:
                self.absent[name] = gone
        self._index()

    def _index(self) -> None:
        """Joins the runs of all shards into columns: a position in them leads to a row."""
        self._begin: IntArray = np.full(int(self._first_shard[-1]), -1, dtype=np.int64)
        listed = [runs for runs in self._runs.values() if len(runs)]
        joined = np.concatenate(listed) if listed else NO_RUNS
        self._run_row = joined[:, 0]
        self._run_begin: IntArray = np.cumsum(joined[:, 1]) - joined[:, 1]
        begin = 0
        for number, runs in self._runs.items():
            self._begin[number] = begin
            begin += int(runs[:, 1].sum())

    def rows(self, domain: IntArray, shard: IntArray, number: IntArray) -> IntArray:
        """The rows that have these numbers among the rows left of their shards: (n,)."""
        begin = self._begin[self._first_shard[domain] + shard]
        cut = np.flatnonzero(begin >= 0)
        if not len(cut):
            return number
        rows = number.copy()
        position = begin[cut] + number[cut]
        run = np.searchsorted(self._run_begin, position, side="right") - 1
        rows[cut] = self._run_row[run] + position - self._run_begin[run]
        return rows

    def runs(self, domain: int, shard: int) -> IntArray:
        """The rows left of one of the `cut` shards."""
        return self._runs[int(self._first_shard[domain]) + shard]

    def cut(self, domain: int) -> list[int]:
        """Shards of a domain of which not all rows are left."""
        first, end = self._first_shard[domain : domain + 2].tolist()
        return np.flatnonzero(self._begin[first:end] >= 0).tolist()
