"""The order of the rows of each domain: without replacement, shuffled with locality, and computed by position.

One pass over a domain (an epoch) visits its shards in a random order, joins their rows into one sequence, cuts the
sequence into windows and shuffles inside each window. Reads stay within a few shards at a time, every row appears once
in each epoch, and the row of any draw follows from (seed, domain, draw) alone.

The shuffle inside a window is computed for each position separately (a Feistel network, `scatter`). A rank that reads
every ten-thousandth sample pays for its own samples only, and one call looks up a thousand domains.

Shapes: D domains, S shards of all domains, n draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.hashing import UIntArray, permutations, random_bits, scatter, stream_key
from dmagent_loader.mixture.simplex import IntArray

DEFAULT_WINDOW = 8192
"""Rows per shuffle window."""

_NO_EPOCH = -1
_NONE: IntArray = np.empty(0, dtype=np.int64)
_SHARDS_AT_A_TIME = 1 << 14
"""Shards ordered in one call: few enough for the caches of a core."""


class RowOrders:
    """The order of the rows of every domain.

    Args:
        seed: Seed of the run.
        domains: (D,) names; adding or removing a domain does not change the order of the others.
        shard_rows: For each domain, the rows of each of its shards.
        window: Rows per shuffle window; 1 keeps the rows of a shard in their order.

    Raises:
        ConfigurationError: The window is below 1.
    """

    def __init__(
        self, seed: int, domains: Sequence[str], shard_rows: Sequence[IntArray], window: int = DEFAULT_WINDOW
    ) -> None:
        if window < 1:
            raise ConfigurationError(f"shuffle window is {window}; it must be at least 1 row")
        self._seed, self._domains, self._window = seed, tuple(domains), window
        self._keys: UIntArray = np.array([stream_key(seed, "rows", name) for name in domains], dtype=np.uint64)
        self._rows: IntArray = np.concatenate([np.empty(0, dtype=np.int64), *shard_rows]).astype(np.int64)
        num_shards = np.array([len(rows) for rows in shard_rows], dtype=np.int64)
        self._first_shard: IntArray = np.concatenate([[0], np.cumsum(num_shards)])
        self.num_rows: IntArray = np.array([rows.sum() for rows in shard_rows], dtype=np.int64)
        """(D,) rows of each domain."""
        self._first_row: IntArray = np.cumsum(self.num_rows) - self.num_rows
        # The shards of all domains, each domain in the order of its present epoch, and the number of rows (over all
        # domains) before each shard. A single shard has only one order, valid in any epoch.
        self._order: IntArray = np.arange(len(self._rows)) - np.repeat(self._first_shard[:-1], num_shards)
        self._starts: IntArray = np.cumsum(self._rows) - self._rows
        self._epoch: IntArray = np.full(len(self._domains), _NO_EPOCH, dtype=np.int64)
        self._num_shards = num_shards
        self._domain_type = np.min_scalar_type(len(self._domains))
        self._varies = num_shards > 1

    def locate(self, domain: IntArray, draw: IntArray) -> tuple[IntArray, IntArray]:
        """Shard and row in the shard of each draw.

        Args:
            domain: (n,) int64 domain numbers.
            draw: (n,) int64; draw k is the k-th sample ever drawn from its domain. Epoch = k // rows of the domain.

        Returns:
            Shard numbers within the domain (n,) and row numbers (n,).
        """
        num_rows = self.num_rows[domain]
        epoch = draw // num_rows
        position = draw - epoch * num_rows
        window = position // self._window
        start = window * self._window
        key = random_bits(random_bits(self._keys[domain], epoch), window)
        sequential = start + scatter(key, position - start, np.minimum(num_rows - start, self._window))
        waiting = self._varies[domain] & (self._epoch[domain] != epoch)
        if not waiting.any():
            return self._in_epoch(domain, sequential)
        shard, row = np.empty_like(draw), np.empty_like(draw)
        ready = np.flatnonzero(~waiting)
        while True:
            shard[ready], row[ready] = self._in_epoch(domain[ready], sequential[ready])
            left = np.flatnonzero(waiting)
            if not len(left):
                return shard, row
            # The shard order of a domain is kept for one epoch only: each waiting domain moves to its earliest
            # requested epoch, and the loop repeats until no draw waits.
            by_epoch = left[np.lexsort((epoch[left], domain[left]))]
            earliest = by_epoch[np.flatnonzero(np.diff(domain[by_epoch], prepend=-1))]
            self._begin_epochs(domain[earliest].tolist(), epoch[earliest].tolist())
            ready = left[self._epoch[domain[left]] == epoch[left]]
            waiting[ready] = False

    def rows_left(self, domain: int, epoch: int, drawn: int) -> list[tuple[int, IntArray]]:
        """Rows that an epoch has not drawn yet, of every shard from which it has drawn.

        Args:
            domain: Domain number.
            epoch: Number of the epoch.
            drawn: Samples of the epoch that were drawn, at least 1.

        Returns:
            Shard number and (n,) rising row numbers, by shard.
        """
        if self._varies[domain] and self._epoch[domain] != epoch:
            self._begin_epochs([domain], [epoch])
        span = slice(int(self._first_shard[domain]), int(self._first_shard[domain + 1]))
        order = self._order[span]
        starts, rows = self._starts[span] - self._first_row[domain], self._rows[span][order]
        # All rows before the present window were drawn, and some of the window.
        window = drawn // self._window
        begin = window * self._window
        positions = np.arange(drawn - begin)
        length = min(int(self.num_rows[domain]) - begin, self._window)
        key = random_bits(random_bits(self._keys[[domain]], np.array([epoch])), np.array([window]))
        drawn_here = np.sort(begin + scatter(key.repeat(len(positions)), positions, np.full(len(positions), length)))
        found = np.searchsorted(drawn_here, [starts, starts + rows])
        left = []
        for number in np.flatnonzero((rows > 0) & ((starts < begin) | (found[0] < found[1]))).tolist():
            start, count = int(starts[number]), int(rows[number])
            if start + count <= begin:
                left.append((int(order[number]), _NONE))
                continue
            is_left = np.ones(count, dtype=bool)
            is_left[: max(0, begin - start)] = False
            is_left[drawn_here[found[0, number] : found[1, number]] - start] = False
            left.append((int(order[number]), np.flatnonzero(is_left)))
        return sorted(left, key=lambda one: one[0])

    def _in_epoch(self, domain: IntArray, sequential: IntArray) -> tuple[IntArray, IntArray]:
        """Shards and rows of positions in the present epoch of each domain."""
        sequential = sequential + self._first_row[domain]
        # Searching domain by domain keeps each search near the previous one, in the cache: 3 times as fast for
        # 10**6 shards. The narrow type matters: numpy sorts 16-bit integers by counting.
        gathered = np.argsort(domain.astype(self._domain_type), kind="stable")
        sequential = sequential[gathered]
        found = np.searchsorted(self._starts, sequential, side="right") - 1
        shard, row = np.empty_like(domain), np.empty_like(domain)
        shard[gathered] = self._order[found]
        row[gathered] = sequential - self._starts[found]
        return shard, row

    def _begin_epochs(self, domains: Sequence[int], epochs: Sequence[int]) -> None:
        """Reorders the shards of domains, many domains per call: most have too few shards for numpy to be fast."""
        first = 0
        while first < len(domains):
            last, num_shards = first, 0
            while last < len(domains) and num_shards < _SHARDS_AT_A_TIME:
                num_shards += int(self._num_shards[domains[last]])
                last += 1
            self._order_shards(domains[first:last], epochs[first:last])
            first = last

    def _order_shards(self, domains: Sequence[int], epochs: Sequence[int]) -> None:
        keys = [
            stream_key(self._seed, "shards", self._domains[domain], epoch)
            for domain, epoch in zip(domains, epochs, strict=True)
        ]
        lengths = self._num_shards[domains]
        order = permutations(keys, lengths)
        rows = self._rows[np.repeat(self._first_shard[domains], lengths) + order]
        starts = np.cumsum(rows) - rows
        begin = 0
        for domain, epoch, length in zip(domains, epochs, lengths.tolist(), strict=True):
            computed = slice(begin, begin + length)
            stored = slice(int(self._first_shard[domain]), int(self._first_shard[domain + 1]))
            self._order[stored] = order[computed]
            np.add(starts[computed], self._first_row[domain] - starts[begin], out=self._starts[stored])
            self._epoch[domain] = epoch
            begin += length
