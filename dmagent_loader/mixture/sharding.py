"""The global samples that one iterator delivers.

Every rank has an iterator and, with torch workers, every worker has one. There are two kinds of streams:

- ``sharded``: each rank reads its own share. Plain loops, a bare `DataLoader`, NeMo and Megatron read this way.
- ``whole``: the trainer splits one unsharded stream itself, as accelerate does for iterable datasets: it cuts blocks of
  ``world_size * batch_size`` samples into one slice for each rank.

With either kind, every rank trains on the same samples in the same steps. A *global batch*, one batch of every rank,
consists of the same samples whatever the number of ranks, and is dealt to them in one of two ways; a single rank gets
its samples in their order.

- *In runs*: each rank has a run of neighbouring samples. That of rank 0 begins at a random sample, drawn anew for each
  global batch, and the run that reaches the end of the batch continues at its beginning.
- *By lane*: each rank has a run of the samples sorted by the lane of their rows (`shuffle`), in a random order. Every
  lane has nearly as many samples of each domain in a batch, so a rank, and with it a node, reads nearly always in the
  same lanes: in its own part of the shards. Every global batch has to be planned whole.

Either way, every rank and every position in a batch has its share of each domain in the long term. If rank r had the
samples g mod world size == r, a mix of 3/4 and 1/4 on four ranks would give single ranks a third more or less than
their share for as long as it is in force.

torch deals whole batches to its workers in turn: worker w of n delivers the batches w, w + n, ... of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import numpy as np

from dmagent_loader.mixture.hashing import random_bits, stream_key
from dmagent_loader.mixture.simplex import IntArray

_FROM_LANES, _IN_RANKS = 1 << 61, 1 << 62
"""Counters of the random stream from which on it chooses the first lane of each global batch, and orders the samples of
each rank; those before are for the order of the samples of a lane."""
StreamKind = Literal["sharded", "whole"]
_Number = TypeVar("_Number", int, IntArray)


class Laned(Protocol):
    """The lanes of samples (`shuffle`), as a plan knows them."""

    @property
    def num_lanes(self) -> int:
        """Number of lanes."""
        ...

    def lanes(self, indices: IntArray) -> IntArray:
        """Lane of each global index: (n,)."""
        ...


def ranks_key(seed: int) -> int:
    """Key of the random stream that deals the samples of a run to ranks."""
    return stream_key(seed, "ranks")


@dataclass(frozen=True, kw_only=True)
class StreamLayout:
    """The positions of one iterator in the run.

    Args:
        base: Global sample index at which the iteration begins, and with it the first global batch.
        key: Key of the random stream that deals the samples of each global batch to ranks.
        rank: Data-parallel rank of this process.
        world_size: Number of data-parallel processes.
        kind: ``"sharded"`` or ``"whole"``.
        batch_size: Samples of one rank in one batch.
        worker: Number of this torch worker.
        num_workers: Number of torch workers of this rank.
        samples_per_fetch: Consecutive stream positions that go to one worker.
        samples_per_step: Samples of each rank in one step; the run is cut to whole steps.
    """

    base: int
    key: int = 0
    rank: int = 0
    world_size: int = 1
    kind: StreamKind = "sharded"
    batch_size: int = 1
    worker: int = 0
    num_workers: int = 1
    samples_per_fetch: int = 1
    samples_per_step: int = 1

    def indices(self, first: int, count: int, end: int | None = None, laned: Laned | None = None) -> IntArray:
        """Global indices of samples `first` to `first + count - 1` of this iterator.

        Args:
            first: Number of the first of them.
            count: Samples.
            end: Global index at which the run ends; None: it lies beyond them.
            laned: The lanes of samples, to deal by lane; None: in runs.

        Returns:
            (count,) int64, or fewer at the end of the run.
        """
        if end is not None:
            count = min(count, max(0, self.num_samples(end) - first))
        positions = self._positions(np.arange(first, first + count, dtype=np.int64))
        if self.world_size == 1:
            return self.base + positions
        batch, slot = np.divmod(positions, self.own_batch)
        start = self.base + batch * self.global_batch
        size = np.full(len(start), self.global_batch)
        if end is not None:  # the last global batch may be smaller
            size = np.minimum(size, self.delivered_end(end) - start)
        if self.kind == "sharded":
            slot += self.rank * (size // self.world_size)
        if laned is not None:
            return self._by_lane(start, size, slot, laned)
        shift = random_bits(self.key, start) % size.view(np.uint64)
        return np.asarray(start + (slot + shift.view(np.int64)) % size, dtype=np.int64)

    def _by_lane(self, start: IntArray, size: IntArray, slot: IntArray, laned: Laned) -> IntArray:
        """Global indices in places of global batches: (n,).

        Args:
            start: (n,) first index of the global batch.
            size: (n,) samples of the global batch.
            slot: (n,) place among them, rank after rank.
            laned: The lanes of samples.
        """
        starts, at, batch = np.unique(start, return_index=True, return_inverse=True)
        sizes = size[at]
        first = np.cumsum(sizes) - sizes  # of each global batch, in the columns below
        begin, number = np.repeat(first, sizes), np.arange(int(sizes.sum()))
        indices = np.repeat(starts, sizes) + number - begin
        length, num_lanes = np.repeat(sizes, sizes), laned.num_lanes
        # Lanes have a few samples more or less in a batch. The lane from which they are counted is drawn for each, for
        # ranks next to a fixed one would differ from the others. Ranks begin in the middle of a lane, so that two
        # nodes share this lane, instead of each having samples of the next lane of the other.
        from_lane = (random_bits(self.key, _FROM_LANES + starts) >> np.uint64(32)).view(np.int64) % num_lanes
        from_lane = np.repeat(from_lane, sizes)
        lane = (laned.lanes(indices) - from_lane) % num_lanes
        place = np.empty_like(number)
        place[np.lexsort((random_bits(self.key, indices), lane, begin))] = number - begin
        to_middle = (2 * from_lane - 1) * length // (2 * num_lanes)
        place = (place + to_middle - np.repeat(self._off(lane, sizes, num_lanes), sizes)) % length
        # In another order than that of a lane: its samples would come first in one rank, and last in the next.
        random = random_bits(self.key, _IN_RANKS + indices)
        order = np.lexsort((random, place // (length // self.world_size), begin))
        return np.asarray(indices[order[first[batch] + slot]], dtype=np.int64)

    @staticmethod
    def _off(lane: IntArray, sizes: IntArray, num_lanes: int) -> IntArray:
        """How far the ends of the lanes are off in each global batch: (m,), the middle of the least and the most.

        Without this correction, lanes whose samples are counted late would be off by all that those before them have
        too few or too many, which is several samples of a batch with many domains.

        Args:
            lane: (n,) lane of each sample, counted from the first lane of its batch.
            sizes: (m,) samples of each batch.
            num_lanes: Number of lanes.
        """
        batch = np.repeat(np.arange(len(sizes)) * num_lanes, sizes)
        counts = np.bincount(batch + lane, minlength=len(sizes) * num_lanes).reshape(-1, num_lanes)
        off = num_lanes * counts.cumsum(axis=1) - np.arange(1, num_lanes + 1) * sizes[:, None]
        return np.asarray((off.max(axis=1) + off.min(axis=1)) // (2 * num_lanes))

    @property
    def global_batch(self) -> int:
        """Samples of all ranks in one batch."""
        return self.world_size * self.batch_size

    @property
    def own_batch(self) -> int:
        """Samples of a global batch that the stream of this rank contains."""
        return self.batch_size if self.kind == "sharded" else self.global_batch

    def num_samples(self, end: int) -> int:
        """Total number of samples that this iterator delivers if the run ends at global index `end`."""
        stream = self.delivered_end(end) - self.base
        if self.kind == "sharded":
            stream //= self.world_size
        blocks, rest = divmod(stream, self.samples_per_fetch)
        worker_blocks = max(0, (blocks - self.worker + self.num_workers - 1) // self.num_workers)
        return worker_blocks * self.samples_per_fetch + (rest if blocks % self.num_workers == self.worker else 0)

    @property
    def samples_per_step_all_ranks(self) -> int:
        """Samples of all ranks in one step; the run is cut to whole steps."""
        return self.world_size * self.samples_per_step

    def delivered_end(self, end: int) -> int:
        """`end` cut to whole steps: all ranks then have the same number of batches."""
        return self.base + max(0, end - self.base) // self.samples_per_step_all_ranks * self.samples_per_step_all_ranks

    def frontier(self, taken: int) -> int:
        """The first global index that neither this iterator nor those in step with it can have delivered yet.

        Args:
            taken: Samples that this iterator has delivered.
        """
        return self.base + (self._reached(taken) if taken else 0)

    def frontiers(self, taken: IntArray) -> IntArray:
        """`frontier` after each number of delivered samples: (n,) int64."""
        return np.asarray(self.base + np.where(taken == 0, 0, self._reached(taken)), dtype=np.int64)

    def _reached(self, taken: _Number) -> _Number:
        """Samples of the run, from `base` on, that may have been delivered once this iterator has delivered some."""
        reached = self._positions(taken - 1) + 1
        if self.world_size > 1:
            # The other ranks may have delivered as many samples as this one. Inside a global batch the indices are not
            # in order, so all of it counts as delivered.
            reached = -(-reached // self.own_batch) * self.global_batch
        return reached

    def _positions(self, samples: _Number) -> _Number:
        """Stream positions of the samples of this iterator, which gets every `num_workers`-th block of the stream."""
        if self.num_workers == 1:
            return samples
        block, offset = divmod(samples, self.samples_per_fetch)
        return (block * self.num_workers + self.worker) * self.samples_per_fetch + offset
