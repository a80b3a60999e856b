"""The rows that a pass over a domain has not drawn yet, when the shards change in the middle of it.

Shards are recognised by their content. Of a shard that stays, only rows that the pass has not drawn are left; all rows
of a new shard are. A shard that is gone is remembered until the pass ends: if it comes back earlier, its drawn rows are
not drawn again.

Runs are rows in a sequence: (n, 2), the first row and the number of rows, at least 1. A domain may have a million
shards, so their runs lie in one array, shard by shard, beside the number of runs of each.

Shapes: D domains, S shards of a domain, s of these shards, n samples or runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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


def partners(contents: UIntArray, rows: IntArray, other_contents: UIntArray, other_rows: IntArray) -> IntArray:
    """For each shard, the number of one of the same content among others, each of which is taken once; -1: none.

    Args:
        contents: (s,) contents of the shards.
        rows: (s,) their rows.
        other_contents: (S,) contents of the others.
        other_rows: (S,) their rows.
    """
    count = len(other_contents)
    content, num_rows = np.concatenate([other_contents, contents]), np.concatenate([other_rows, rows])
    # Equal shards come one after the other, the others first.
    order = np.lexsort((num_rows, content))
    content, num_rows = content[order], num_rows[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (content[1:] != content[:-1]) | (num_rows[1:] != num_rows[:-1])
    first = np.flatnonzero(is_first)
    group = np.cumsum(is_first) - 1
    num_others = np.bincount(group, weights=order < count, minlength=len(first)).astype(np.int64)
    mine = np.flatnonzero(order >= count)
    other = mine - num_others[group[mine]]  # the k-th of a group has the k-th of the others
    has_other = other < first[group[mine]] + num_others[group[mine]]
    found = np.full(len(contents), -1, dtype=np.int64)
    found[order[mine[has_other]] - count] = order[other[has_other]]
    return found


def cut_runs(runs: IntArray, starts: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Runs, cut where one of several ranges begins.

    Args:
        runs: (n, 2) runs.
        starts: (S,) rising beginnings of the ranges, the first not after the first run.

    Returns:
        The pieces as runs, the run of each piece, and the range of each piece.
    """
    begin, end = runs[:, 0], runs[:, 0] + runs[:, 1]
    low = np.searchsorted(starts, begin, side="right") - 1
    count = np.searchsorted(starts, end, side="left") - low
    run = np.repeat(np.arange(len(runs)), count)
    within = np.repeat(low - (np.cumsum(count) - count), count) + np.arange(len(run))
    first = np.maximum(begin[run], starts[within])
    last = np.minimum(end[run], np.append(starts, np.iinfo(np.int64).max)[within + 1])
    some = np.flatnonzero(first < last)  # ranges may be empty
    first, run = first[some], run[some]
    return np.column_stack([first, last[some] - first]), run, within[some]


@dataclass(frozen=True)
class RowsLeft:
    """What is left of some shards of a domain.

    Attributes:
        shard: (s,) rising numbers of the shards.
        num_runs: (s,) runs of each.
        runs: (n, 2) rows that the pass has not drawn, shard by shard.
    """

    shard: IntArray
    num_runs: IntArray
    runs: IntArray

    @classmethod
    def of_sequence(cls, runs: IntArray, order: IntArray, starts: IntArray, rows: IntArray) -> RowsLeft:
        """What is left of the shards from which a pass has drawn, by the order of the pass.

        Args:
            runs: (n, 2) what is left of the sequence of the rows of all shards.
            order: (S,) number of each shard, in their order in the sequence.
            starts: (S,) rows of the sequence before each.
            rows: (S,) rows of each.
        """
        pieces, _, place = cut_runs(runs, starts)
        num_left = np.bincount(place, weights=pieces[:, 1], minlength=len(order))
        is_cut = num_left < rows
        kept = np.flatnonzero(is_cut[place])
        pieces, place = pieces[kept], place[kept]
        pieces[:, 0] -= starts[place]
        return cls._by_shard(order[is_cut], order[place], pieces)

    @classmethod
    def _by_shard(cls, shards: IntArray, shard: IntArray, runs: IntArray) -> RowsLeft:
        """Sorts runs by shard.

        Args:
            shards: (s,) all shards; some may have no run.
            shard: (n,) shard of each run.
            runs: (n, 2) runs, those of a shard rising.
        """
        shards = np.sort(shards)
        by_shard = np.argsort(shard, kind="stable")
        shard = shard[by_shard]
        num_runs = np.searchsorted(shard, shards, side="right") - np.searchsorted(shard, shards)
        return cls(shards, num_runs, runs[by_shard])


@dataclass(frozen=True)
class ShardsLeft:
    """What is left of shards of a domain from which its present pass has drawn.

    Attributes:
        contents: (s,) uint64, identify the contents of the shards.
        rows: (s,) rows of each whole shard.
        num_runs: (s,) runs of each.
        runs: (n, 2) rows that the pass has not drawn, shard by shard.
    """

    contents: UIntArray
    rows: IntArray
    num_runs: IntArray
    runs: IntArray

    def __len__(self) -> int:
        return len(self.contents)

    def __add__(self, other: ShardsLeft) -> ShardsLeft:
        mine, others = vars(self).values(), vars(other).values()
        return ShardsLeft(*(np.concatenate(columns) for columns in zip(mine, others, strict=True)))

    def chosen(self, which: npt.NDArray[np.bool_]) -> ShardsLeft:
        """Some of the shards.

        Args:
            which: (s,) whether a shard is one of them.
        """
        runs = self.runs[np.repeat(which, self.num_runs)]
        return ShardsLeft(self.contents[which], self.rows[which], self.num_runs[which], runs)

    def num_left(self) -> IntArray:
        """Rows left of each shard: (s,)."""
        before = np.concatenate([[0], np.cumsum(self.runs[:, 1])])
        ends = np.cumsum(self.num_runs)
        return np.asarray(before[ends] - before[ends - self.num_runs])


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

    def __init__(self, names: Sequence[str], shards: ShardSet, left: Mapping[str, ShardsLeft]) -> None:
        self.counts = [np.array(rows, dtype=np.int64) for rows in shards.rows]
        self.absent = {name: its for name, its in left.items() if name not in names and len(its)}
        self._first_shard = np.concatenate([[0], np.cumsum([len(rows) for rows in shards.rows])])
        num_shards = int(self._first_shard[-1])
        self._is_cut = np.zeros(num_shards, dtype=bool)
        cut: list[IntArray] = []
        runs: list[IntArray] = []
        for domain, name in enumerate(names):
            its = left.get(name)
            if its is None:
                continue
            partner = partners(its.contents, its.rows, shards.contents[domain], shards.rows[domain])
            is_here = partner >= 0
            if not is_here.all():
                self.absent[name] = its.chosen(~is_here)
            its, partner = its.chosen(is_here), partner[is_here]
            self.counts[domain][partner] = its.num_left()
            self._is_cut[self._first_shard[domain] + partner] = True
            cut.append(np.repeat(self._first_shard[domain] + partner, its.num_runs))
            runs.append(its.runs)
        # The rows left of all shards, one after the other, form one sequence; a position in it leads to a row.
        counts = np.concatenate([NO_RUNS[:, 0], *self.counts])
        self._begin: IntArray = np.cumsum(counts) - counts
        whole = np.flatnonzero(~self._is_cut & (counts > 0))
        shard = np.concatenate([whole, *cut])
        joined = np.concatenate([np.column_stack([np.zeros(len(whole), np.int64), counts[whole]]), *runs])
        joined = joined[np.argsort(shard, kind="stable")]
        self._run_row: IntArray = joined[:, 0]
        self._run_begin: IntArray = np.cumsum(joined[:, 1]) - joined[:, 1]

    def rows(self, domain: IntArray, shard: IntArray, number: IntArray) -> IntArray:
        """The rows that have these numbers among the rows left of their shards: (n,)."""
        among_all = self._first_shard[domain] + shard
        cut = np.flatnonzero(self._is_cut[among_all])
        if not len(cut):
            return number
        rows = number.copy()
        position = self._begin[among_all[cut]] + number[cut]
        run = np.searchsorted(self._run_begin, position, side="right") - 1
        rows[cut] = self._run_row[run] + position - self._run_begin[run]
        return rows

    def left(self, domain: int, drawn: RowsLeft | None) -> RowsLeft:
        """What is left of the shards of which not all rows are left.

        Args:
            domain: Domain number.
            drawn: What the rest of the pass has left of the shards from which it has drawn, by number among the rows
                left of each shard when it began; None: it has drawn nothing.
        """
        first, end = self._first_shard[domain : domain + 2].tolist()
        is_cut, counts, begin = self._is_cut[first:end].copy(), self.counts[domain], self._begin[first:end]
        shard, runs = NO_RUNS[:, 0], NO_RUNS
        if drawn is not None:
            is_cut[drawn.shard] = False
            shard, runs = np.repeat(drawn.shard, drawn.num_runs), drawn.runs
        waiting = np.flatnonzero(is_cut)  # cut before, and not drawn from since
        some = waiting[counts[waiting] > 0]
        shard = np.concatenate([shard, some])
        runs = np.concatenate([runs, np.column_stack([np.zeros_like(some), counts[some]])])
        pieces, run, place = cut_runs(np.column_stack([begin[shard] + runs[:, 0], runs[:, 1]]), self._run_begin)
        rows = self._run_row[place] + pieces[:, 0] - self._run_begin[place]
        shards = waiting if drawn is None else np.concatenate([drawn.shard, waiting])
        return RowsLeft._by_shard(shards, shard[run], np.column_stack([rows, pieces[:, 1]]))
