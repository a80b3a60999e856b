"""Blocks of remote shards for the samples that lie ahead: what to fetch, and how long to keep it.

A block is asked for when a planned sample needs it, and kept until its domain has advanced beyond the last planned draw
from it. Draws, not positions in the run, decide: the rows of a domain have the same order under any mix, so a new mix
only changes how soon a block is used up, and what was fetched under the old one stays useful. Only blocks of domains
without weight are released early: nobody knows whether they will be used.

Shapes: D domains, n samples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dmagent_loader.mixture.simplex import FloatArray, IntArray
from dmagent_loader.shards import forks
from dmagent_loader.shards.sources.fetching import BlockFetcher

_NEVER = np.iinfo(np.int64).max


class BlocksOfRows(NamedTuple):
    """The blocks of n rows.

    Attributes:
        keys: (K,) keys of blocks, not only of those of the rows; -1 stands for local shards, which have none.
        numbers: (n,) places in `keys` of the first block of each row; and of the last, unless it is the first for all.
    """

    keys: IntArray
    numbers: tuple[IntArray, ...]

    @classmethod
    def of(cls, first: IntArray, last: IntArray) -> BlocksOfRows:
        """From the keys of the first and the last block of each row, as `RowSource.blocks_of` returns them."""
        columns = (first,) if first is last else (first, last)
        keys, numbers = np.unique(np.concatenate(columns), return_inverse=True)
        return cls(keys, tuple(numbers.reshape(len(columns), -1)))

    def chosen(self, which: slice) -> BlocksOfRows:
        """The blocks of some of the rows."""
        return BlocksOfRows(self.keys, tuple(numbers[which] for numbers in self.numbers))


class BlocksAhead:
    """The blocks that one iterator needs.

    The iterator calls `request` for the runs of samples that it plans, in order, and `advance` each time that it goes
    on to the next of these runs.

    Args:
        num_domains: D.
        fetcher: The blocks of all domains.
    """

    def __init__(self, num_domains: int, fetcher: BlockFetcher) -> None:
        self._fetcher = fetcher
        self._waits = fetcher.waits
        self._last_use: dict[int, tuple[int, int]] = {}
        """Key of each block that is asked for -> domain, and its last planned draw from the block."""
        self._planned: deque[tuple[IntArray, IntArray]] = deque()
        """(D,) lowest draw and (D,) first draw after the highest, of the run of samples in use and those ahead."""
        nothing = (np.full(num_domains, _NEVER), np.zeros(num_domains, np.int64))
        self._left = nothing
        """The same of the run before: its samples may be lazy, and not read yet."""
        self._passed = nothing[1]
        """(D,) first draw after all that were delivered before it."""
        self._has_weight = np.ones(num_domains, bool)
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

    def request(
        self, domain: IntArray, draw: IntArray, blocks: BlocksOfRows, position: int, ends: Sequence[int]
    ) -> None:
        """Has the blocks of planned samples fetched.

        Args:
            domain: (n,) domains of the samples.
            draw: (n,) their draws.
            blocks: Their blocks.
            position: Position of the first of them in the iterator.
            ends: Number of samples up to the end of each run: they may be those of several.
        """
        begin, latest = np.full(len(blocks.keys), _NEVER), np.full(len(blocks.keys), -1)
        for numbers in blocks.numbers:
            np.minimum.at(begin, numbers, np.arange(len(draw)))
            np.maximum.at(latest, numbers, draw)
        used = np.flatnonzero(latest >= 0)
        columns = (blocks.keys[used], begin[used], domain[begin[used]], latest[used])
        wanted, uses = [], {}
        for key, first, of_domain, use in zip(*(column.tolist() for column in columns), strict=True):
            if key < 0:
                continue
            before = self._last_use.get(key)
            if before is None:
                wanted.append((key, position + first))
            if before is None or before[1] < use:
                uses[key] = (of_domain, use)
        self._fetcher.want(wanted)
        self._last_use.update(uses)  # not before: if that fails, none of them is to be released
        for first, end in pairwise((0, *ends)):
            lowest, beyond = np.full(len(self._passed), _NEVER), np.zeros_like(self._passed)
            np.minimum.at(lowest, domain[first:end], draw[first:end])
            np.maximum.at(beyond, domain[first:end], draw[first:end] + 1)
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

    def all_come(self) -> bool:
        """Whether each block that is asked for is here or on its way."""
        return all(map(self._fetcher.comes, self._last_use))

    def unavailable(self, blocks: BlocksOfRows) -> np.ndarray:
        """Which samples have to be read row by row, because a block of theirs cannot be had: (n,) bool.

        Args:
            blocks: The blocks of the samples.
        """
        comes = np.array([key < 0 or self._fetcher.comes(key) for key in blocks.keys.tolist()], bool)
        return np.asarray(~np.all([comes[numbers] for numbers in blocks.numbers], axis=0))

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
