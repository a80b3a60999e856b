"""The rows of one segment: those of the pass in which it begins, then those of whole passes.

The row order is behind `RowOrders.locate` and `RowOrders.rows_left` alone: another order can take its place.

Shapes: D domains, n samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from dmagent_loader.mixture.hashing import stream_key
from dmagent_loader.mixture.rest_of_pass import RestOfPass, RowsLeft, ShardSet, ShardsLeft
from dmagent_loader.mixture.row_order import RowOrders
from dmagent_loader.mixture.shuffle import Shuffle
from dmagent_loader.mixture.simplex import IntArray


class SegmentRows:
    """The rows that a segment draws from each domain, in order.

    Args:
        names: (D,) names of the domains.
        shards: Their shards.
        seed: Seed of the run.
        shuffle: Settings of the shuffle.
        begin: Global index of the first sample.
        left: What the present pass of each domain has left of shards from which it has drawn; None: no pass has begun.

    Attributes:
        num_rows: (D,) rows of each domain.
        first_pass: (D,) rows of the first pass, which may be the rest of one.
    """

    def __init__(
        self,
        names: Sequence[str],
        shards: ShardSet,
        *,
        seed: int,
        shuffle: Shuffle,
        begin: int,
        left: Mapping[str, ShardsLeft] | None,
    ) -> None:
        self._names, self._shards, self._seed, self._shuffle, self._begin = names, shards, seed, shuffle, begin
        self.num_rows: IntArray = np.array([rows.sum() for rows in shards.rows], dtype=np.int64)
        self._rest = None if left is None else RestOfPass(names, shards, left)
        self.first_pass: IntArray = self.num_rows
        if self._rest is not None:
            self.first_pass = np.array([counts.sum() for counts in self._rest.counts], dtype=np.int64)

    @cached_property
    def _passes(self) -> RowOrders:
        """The order of whole passes."""
        seed = self._seed if self._rest is None else stream_key(self._seed, "segment", self._begin)
        return RowOrders(seed, self._names, self._shards.rows, self._shuffle)

    @cached_property
    def _rest_order(self) -> RowOrders:
        """The order of the rest of a pass, whose rows are numbered among those left of their shard."""
        assert self._rest is not None
        seed = stream_key(self._seed, "rest of a pass", self._begin)
        return RowOrders(seed, self._names, self._rest.counts, self._shuffle)

    def locate(self, domain: IntArray, draw: IntArray) -> tuple[IntArray, IntArray]:
        """Shard and row of each draw.

        Args:
            domain: (n,) domain numbers.
            draw: (n,) number of samples that the segment drew from the domain before.

        Returns:
            Shard numbers within the domain (n,) and row numbers (n,).
        """
        if self._rest is None:
            return self._passes.locate(domain, draw)
        later = draw - self.first_pass[domain]
        shard, row = np.empty_like(draw), np.empty_like(draw)
        if len(chosen := np.flatnonzero(later < 0)):
            shard[chosen], number = self._rest_order.locate(domain[chosen], draw[chosen])
            row[chosen] = self._rest.rows(domain[chosen], shard[chosen], number)
        if len(chosen := np.flatnonzero(later >= 0)):
            shard[chosen], row[chosen] = self._passes.locate(domain[chosen], later[chosen])
        return shard, row

    def lane(self, domain: IntArray, draw: IntArray) -> IntArray:
        """The lane of each draw (`shuffle`): (n,). For the arguments see `locate`."""
        if self._rest is None:
            return self._passes.lane(domain, draw)
        later, lane = draw - self.first_pass[domain], np.empty_like(draw)
        if len(chosen := np.flatnonzero(later < 0)):
            lane[chosen] = self._rest_order.lane(domain[chosen], draw[chosen])
        if len(chosen := np.flatnonzero(later >= 0)):
            lane[chosen] = self._passes.lane(domain[chosen], later[chosen])
        return lane

    def at(self, domain: int, position: int) -> tuple[int, int]:
        """Shard and row of a position in a domain, in the order of storage."""
        rows = self._shards.rows[domain]
        ends = np.cumsum(rows)
        shard = int(np.searchsorted(ends, position, side="right"))
        return shard, position - int(ends[shard] - rows[shard])

    def num_left(self, draws: IntArray) -> IntArray:
        """Rows that the present pass of each domain has not drawn: (D,).

        Args:
            draws: (D,) samples drawn from each domain.
        """
        later = draws - self.first_pass
        return np.where(later <= 0, -later, self.num_rows - 1 - (later - 1) % self.num_rows)

    def left(self, draws: IntArray) -> dict[str, ShardsLeft]:
        """Domain -> what its present pass has left of the shards from which it has drawn.

        A pass stays the present one, with nothing left, until the first draw of the next.

        Args:
            draws: (D,) samples drawn from each domain.
        """
        absent = {} if self._rest is None else self._rest.absent
        left = {name: its for name, its in absent.items() if name not in self._names}
        for domain, name in enumerate(self._names):
            drawn = int(draws[domain])
            if self._rest is None or drawn > self.first_pass[domain]:
                if drawn:
                    left[name] = self._of_content(domain, self._left_of_pass(domain, drawn))
                continue
            here = self._rest_order.rows_left(domain, 0, drawn) if drawn else None
            left[name] = self._of_content(domain, self._rest.left(domain, here))
            if name in absent:
                left[name] += absent[name]
        return left

    def _left_of_pass(self, domain: int, draws: int) -> RowsLeft:
        """What is left of a whole pass."""
        if self._rest is not None:
            draws -= int(self.first_pass[domain])
        epoch, drawn = divmod(draws - 1, int(self.num_rows[domain]))
        return self._passes.rows_left(domain, epoch, drawn + 1)

    def _of_content(self, domain: int, left: RowsLeft) -> ShardsLeft:
        """Shards by content, not by number."""
        contents, rows = self._shards.contents[domain], self._shards.rows[domain]
        return ShardsLeft(contents[left.shard], rows[left.shard], left.num_runs, left.runs)
