"""In which order the rows of one domain come: without replacement, shuffled with locality, by position.

One pass over a domain (an epoch) visits its shards in a random order, joins their rows into one sequence, cuts that
into windows and shuffles inside each window. So reading stays within a few shards at a time, every row comes once in
each epoch, and the row of any draw follows from (seed, domain, draw) alone.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.hashing import permutation, stream_key
from dmagent_loader.simplex import IntArray

DEFAULT_WINDOW = 8192
"""Rows per shuffle window."""

_CACHED_WINDOWS = 2
_CACHED_EPOCHS = 2


class RowOrder:
    """The order of rows of one domain.

    Args:
        seed: Of the run.
        domain: Name of the domain; the order does not change when other domains come or go.
        shard_rows: (S,) rows of each shard.
        window: Rows per shuffle window; 1 keeps the rows of a shard in their order.
    """

    def __init__(self, seed: int, domain: str, shard_rows: IntArray, window: int = DEFAULT_WINDOW) -> None:
        if window < 1:
            raise ConfigurationError(f"shuffle window is {window}; it must be at least 1 row")
        self._seed, self._domain, self._window = seed, domain, window
        self._shard_rows = np.asarray(shard_rows, dtype=np.int64)
        self.num_rows = int(self._shard_rows.sum())
        self._epochs: OrderedDict[int, tuple[IntArray, IntArray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], npt.NDArray[np.int32]] = OrderedDict()

    def rows(self, draws: IntArray) -> tuple[IntArray, IntArray]:
        """Shard and row in the shard of each draw.

        Args:
            draws: (n,) int64; draw k is the k-th sample ever taken from this domain. Epoch = k // rows.

        Returns:
            Shard numbers (n,) and row numbers (n,).
        """
        epoch, position = np.divmod(np.asarray(draws, dtype=np.int64), self.num_rows)
        window = position // self._window
        shard, row = np.empty_like(position), np.empty_like(position)
        groups = np.column_stack([epoch, window])
        if len(groups) and (groups == groups[0]).all():
            unique, inverse = groups[:1], np.zeros(len(groups), dtype=np.int64)
        else:
            unique, inverse = np.unique(groups, axis=0, return_inverse=True)
        for number, (e, w) in enumerate(unique):
            chosen = np.flatnonzero(inverse.ravel() == number)
            start = int(w) * self._window
            sequential = start + self._window_order(int(e), int(w))[position[chosen] - start]
            shards, ends = self._epoch_order(int(e))
            place = np.searchsorted(ends, sequential, side="right")
            shard[chosen] = shards[place]
            row[chosen] = sequential - (ends[place] - self._shard_rows[shards[place]])
        return shard, row

    def _epoch_order(self, epoch: int) -> tuple[IntArray, IntArray]:
        """The shards in the order of one epoch, and the cumulative rows after each."""
        if epoch not in self._epochs:
            shards = permutation(stream_key(self._seed, "shards", self._domain, epoch), len(self._shard_rows))
            self._epochs[epoch] = (shards, np.cumsum(self._shard_rows[shards]))
            while len(self._epochs) > _CACHED_EPOCHS:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _window_order(self, epoch: int, window: int) -> npt.NDArray[np.int32]:
        key = (epoch, window)
        if key not in self._windows:
            length = min(self._window, self.num_rows - window * self._window)
            order = permutation(stream_key(self._seed, "rows", self._domain, epoch, window), length)
            self._windows[key] = order.astype(np.int32)
            while len(self._windows) > _CACHED_WINDOWS:
                self._windows.popitem(last=False)
        return self._windows[key]
