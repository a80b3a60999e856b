"""Blocks of remote shards for the samples that lie ahead: what to fetch, and how long to keep it.

A block is asked for when a planned sample needs it, and kept until its domain has advanced beyond the last planned draw
from it. Draws, not positions in the run, decide: the rows of a domain have the same order under any mix, so a new mix
only changes how soon a block is used up, and what was fetched under the old one stays useful. Only blocks of domains
without weight are released early: nobody knows whether they will be used.

Shapes: D domains, n samples.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from dmagent_loader.mixture.segment import Located
from dmagent_loader.mixture.simplex import FloatArray, IntArray
from dmagent_loader.shards import RowSource, forks
from dmagent_loader.shards.sources.fetching import BlockFetcher

_NEVER = np.iinfo(np.int64).max


class BlocksAhead:
    """The blocks that one iterator needs.

    The iterator calls `request` for each run of samples that it plans, in order, and `advance` each time that it goes
    on to the next of these runs.

    Args:
        rows: The rows of all domains.
        fetcher: Their blocks.
    """

    def __init__(self, rows: RowSource, fetcher: BlockFetcher) -> None:
        self._rows, self._fetcher = rows, fetcher
        self._waits = fetcher.waits
        self._last_use: dict[int, tuple[int, int]] = {}
        """Key of each block that is asked for -> domain, and its last planned draw from the block."""
        self._planned: deque[tuple[IntArray, IntArray]] = deque()
        """(D,) lowest draw and (D,) first draw after the highest, of the run of samples in use and those ahead."""
        nothing = (np.full(len(rows.domains), _NEVER), np.zeros(len(rows.domains), np.int64))
        self._left = nothing
        """The same of the run before: its samples may be lazy, and not read yet."""
        self._passed = nothing[1]
        """(D,) first draw after all that were delivered before it."""
        self._has_weight = np.ones(len(rows.domains), bool)
        """(D,) whether the newest mix has samples of a domain."""
        forks.register(self)

    @property
    def mean_row_bytes(self) -> float:
        """Mean bytes per row of the shards; 0 if that is not known yet."""
        return self._fetcher.mean_row_bytes

    def has_waited(self) -> bool:
        """Whether a reader of this process has had to wait for a block since the last call."""
        waits, self._waits = self._waits, self._fetcher.waits
        return waits < self._waits

    def request(self, located: Located, position: int) -> None:
        """Has the blocks of planned samples fetched.

        Args:
            located: The samples.
            position: Position of the first of them in the iterator.
        """
        domain, draw = located.domain, located.draw
        first, last = self._rows.blocks_of(domain, located.shard, located.row)
        for keys in (first,) if first is last else (first, last):
            blocks, begins, of_sample = np.unique(keys, return_index=True, return_inverse=True)
            latest = np.zeros(len(blocks), np.int64)
            np.maximum.at(latest, of_sample, draw)
            for key, begin, use in zip(blocks.tolist(), begins.tolist(), latest.tolist(), strict=True):
                if key < 0:
                    continue
                before = self._last_use.get(key)
                if before is None:
                    self._fetcher.want(key, position + begin)
                if before is None or before[1] < use:
                    self._last_use[key] = (int(domain[begin]), use)
        lowest, beyond = np.full(len(self._passed), _NEVER), np.zeros_like(self._passed)
        np.minimum.at(lowest, domain, draw)
        np.maximum.at(beyond, domain, draw + 1)
        self._planned.append((lowest, beyond))

    def advance(self) -> None:
        """Releases the blocks that are used up, as far as samples are planned."""
        lowest = np.min([self._left[0], *(run[0] for run in self._planned)], axis=0)
        reached = np.where(lowest == _NEVER, np.where(self._has_weight, self._passed, _NEVER), lowest).tolist()
        for key in [key for key, (domain, use) in self._last_use.items() if use < reached[domain]]:
            del self._last_use[key]
            self._fetcher.release(key)
        self._passed = np.maximum(self._passed, self._left[1])
        self._left = self._planned.popleft()

    def replan(self, mix: FloatArray) -> None:
        """Forgets the samples that lie ahead, and the blocks for them that are not being fetched yet.

        Args:
            mix: (D,) newest mix.
        """
        self._has_weight = mix > 0
        lowest, beyond = self._left
        # The run in use ends here, but not at a known sample: its rest will be drawn later.
        self._left = (lowest, np.where(lowest == _NEVER, beyond, lowest))
        self._planned.clear()
        for key in list(self._last_use):
            if self._fetcher.cancel(key):
                del self._last_use[key]

    def unavailable(self, located: Located) -> np.ndarray:
        """Which samples have to be read row by row, because a block of theirs cannot be had: (n,) bool."""
        if all(map(self._fetcher.comes, self._last_use)):
            return np.zeros(len(located.domain), bool)
        first, last = self._rows.blocks_of(located.domain, located.shard, located.row)
        comes = {key: key < 0 or self._fetcher.comes(key) for key in np.unique([first, last]).tolist()}
        if all(comes.values()):
            return np.zeros(len(first), bool)
        return np.array([not (comes[a] and comes[b]) for a, b in zip(first.tolist(), last.tolist(), strict=True)])

    def reset_after_fork(self) -> None:
        """Forgets blocks that the fetcher of a forked child does not have."""
        self._last_use.clear()

    def close(self) -> None:
        """Releases all blocks."""
        for key in self._last_use:
            self._fetcher.release(key)
        self._last_use.clear()

    def drop(self) -> None:
        """As `close`, for a finalizer."""
        self._fetcher.release_later(self._last_use)
