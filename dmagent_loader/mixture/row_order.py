"""The order of the rows of each domain: without replacement, shuffled with locality, and computed by position.

The shards of a domain, in an order drawn once for a run, form one sequence of rows. Every pass over the domain (an
epoch) draws each row of it once, from several shards at a time (`shuffle`). The row of any draw follows from (seed,
domain, draw) alone: a rank that reads every ten-thousandth sample pays for its own samples only, and one call looks up
a thousand domains.

Shapes: D domains, S shards of all domains, n draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from dmagent_loader.mixture.compiled import ROWS as COMPILED
from dmagent_loader.mixture.hashing import UIntArray, permutations, random_bits, stream_key
from dmagent_loader.mixture.rest_of_pass import RowsLeft
from dmagent_loader.mixture.shuffle import Lanes, Shuffle
from dmagent_loader.mixture.simplex import IntArray

DEFAULT_SHUFFLE = Shuffle()
_SHARDS_AT_A_TIME = 1 << 14
"""Shards ordered in one call: few enough for the caches of a core."""


class RowOrders:
    """The order of the rows of every domain.

    Args:
        seed: Seed of the run.
        domains: (D,) names; adding or removing a domain does not change the order of the others.
        shard_rows: For each domain, the rows of each of its shards.
        shuffle: Settings of the shuffle.
    """

    def __init__(
        self, seed: int, domains: Sequence[str], shard_rows: Sequence[IntArray], shuffle: Shuffle = DEFAULT_SHUFFLE
    ) -> None:
        self._seed, self._domains = seed, tuple(domains)
        self._keys: UIntArray = np.array([stream_key(seed, "rows", name) for name in domains], dtype=np.uint64)
        self._rows: IntArray = np.concatenate([np.empty(0, dtype=np.int64), *shard_rows]).astype(np.int64)
        self._num_shards: IntArray = np.array([len(rows) for rows in shard_rows], dtype=np.int64)
        self._first_shard: IntArray = np.concatenate([[0], np.cumsum(self._num_shards)])
        self.num_rows: IntArray = np.array([rows.sum() for rows in shard_rows], dtype=np.int64)
        """(D,) rows of each domain."""
        self._first_row: IntArray = np.cumsum(self.num_rows) - self.num_rows
        self._lanes = Lanes(shuffle, self.num_rows)

    def locate(self, domain: IntArray, draw: IntArray) -> tuple[IntArray, IntArray]:
        """Shard and row in the shard of each draw.

        Args:
            domain: (n,) int64 domain numbers.
            draw: (n,) int64; draw k is the k-th sample ever drawn from its domain. Epoch = k // rows of the domain.

        Returns:
            Shard numbers within the domain (n,) and row numbers (n,).
        """
        if COMPILED is not None:
            return self._located_compiled(domain, draw)
        key, position = self._in_pass(domain, draw)
        sequential = self._lanes.locate(domain, key, position) + self._first_row[domain]
        order, starts = self._sequence
        # In rising order each search is near the previous one, in the cache: 3 times as fast for 10**6 shards.
        rising = np.argsort(sequential)
        sequential = sequential[rising]
        found = np.searchsorted(starts, sequential, side="right") - 1
        shard, row = np.empty_like(draw), np.empty_like(draw)
        shard[rising] = order[found]
        row[rising] = sequential - starts[found]
        return shard, row

    def _located_compiled(self, domain: IntArray, draw: IntArray) -> tuple[IntArray, IntArray]:
        assert COMPILED is not None
        shard, row = np.empty((2, len(draw)), dtype=np.int64)
        draws = np.ascontiguousarray(domain), np.ascontiguousarray(draw)
        of_domains = self._lanes.settings, self._keys, self.num_rows, self._first_row, self._first_shard
        COMPILED.locate(*of_domains, *self._sequence, *draws, shard, row)
        return shard, row

    def lane(self, domain: IntArray, draw: IntArray) -> IntArray:
        """The lane of each draw: (n,). For the arguments see `locate`."""
        return self._lanes.lane(*self._in_pass(domain, draw))

    def rows_left(self, domain: int, epoch: int, drawn: int) -> RowsLeft:
        """Rows that an epoch has not drawn yet, of every shard from which it has drawn.

        Args:
            domain: Domain number.
            epoch: Number of the epoch.
            drawn: Samples of the epoch that were drawn, at least 1.
        """
        span = slice(int(self._first_shard[domain]), int(self._first_shard[domain + 1]))
        order, starts = (column[span] for column in self._sequence)
        first, counts = starts - self._first_row[domain], self._rows[span][order]
        key = random_bits(self._keys[[domain]], np.array([epoch]))
        runs = self._lanes.drawn(domain, key, drawn)
        # The gaps between the drawn runs, and those before the first and after the last.
        begin, end = np.append(0, runs[:, 1]), np.append(runs[:, 0], self.num_rows[domain])
        is_gap = begin < end
        gaps = np.column_stack([begin[is_gap], (end - begin)[is_gap]])
        return RowsLeft.of_sequence(gaps, order, first, counts)

    def _in_pass(self, domain: IntArray, draw: IntArray) -> tuple[UIntArray, IntArray]:
        """Key of the pass of each draw, and position in the pass."""
        num_rows = self.num_rows[domain]
        epoch = draw // num_rows
        return random_bits(self._keys[domain], epoch), draw - epoch * num_rows

    @cached_property
    def _sequence(self) -> tuple[IntArray, IntArray]:
        """The shards of all domains, each domain in its order; and the rows, over all domains, before each: (S,), (S,).

        Many domains are ordered per call: most have too few shards for numpy to be fast.
        """
        order = np.empty(len(self._rows), dtype=np.int64)
        first = 0
        while first < len(self._domains):
            last, begin = first, int(self._first_shard[first])
            while last < len(self._domains) and self._first_shard[last] - begin < _SHARDS_AT_A_TIME:
                last += 1
            end = int(self._first_shard[last])
            keys = [stream_key(self._seed, "shards", name) for name in self._domains[first:last]]
            order[begin:end] = permutations(keys, self._num_shards[first:last])
            first = last
        rows = self._rows[np.repeat(self._first_shard[:-1], self._num_shards) + order]
        return order, np.cumsum(rows) - rows
