"""The global samples that one iterator delivers.

Every rank has an iterator and, with torch workers, every worker has one. There are two kinds of streams:

- ``sharded``: each rank reads its own share. Plain loops, a bare `DataLoader`, NeMo and Megatron read this way.
- ``whole``: the trainer splits one unsharded stream itself, as accelerate does for iterable datasets: it cuts blocks of
  ``world_size * batch_size`` samples into one slice for each rank.

With either kind, every rank trains on the same samples in the same steps. A *global batch*, one batch of every rank, is
dealt in runs of neighbouring samples, one for each rank. The run of rank 0 begins at a random sample, drawn anew for
each global batch; the run that reaches the end of the batch continues at its beginning. A run has the mix nearly
exactly, and in the long term every rank, and every position in a batch, has the same share of each domain. If rank r
had the samples g mod world size == r instead, a mix of quarters on four ranks would give single ranks a third more or
less than their share for as long as it is in force. A global batch consists of the same samples whatever the number of
ranks; a single rank gets them in their order.

torch deals whole batches to its workers in turn: worker w of n delivers the batches w, w + n, ... of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dmagent_loader.mixture.hashing import random_bits
from dmagent_loader.mixture.simplex import IntArray

StreamKind = Literal["sharded", "whole"]


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

    def indices(self, first: int, count: int, end: int | None = None) -> IntArray:
        """Global indices of samples `first` to `first + count - 1` of this iterator.

        Args:
            first: Number of the first of them.
            count: Samples.
            end: Global index at which the run ends; None: it lies beyond them.

        Returns:
            (count,) int64, or fewer at the end of the run.
        """
        if end is not None:
            count = min(count, max(0, self.num_samples(end) - first))
        batch, slot = np.divmod(self._positions(np.arange(first, first + count, dtype=np.int64)), self._own_batch)
        start = self.base + batch * self.global_batch
        size = np.full(len(start), self.global_batch)
        if end is not None:  # the last global batch may be smaller
            size = np.minimum(size, self.delivered_end(end) - start)
        if self.kind == "sharded":
            slot += self.rank * (size // self.world_size)
        if self.world_size > 1:
            shift = random_bits(self.key, start) % size.view(np.uint64)
            slot = (slot + shift.view(np.int64)) % size
        return np.asarray(start + slot, dtype=np.int64)

    @property
    def global_batch(self) -> int:
        """Samples of all ranks in one batch."""
        return self.world_size * self.batch_size

    @property
    def _own_batch(self) -> int:
        """Samples of a global batch that belong to this stream."""
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
        return int(self.frontiers(np.array([taken]))[0])

    def frontiers(self, taken: IntArray) -> IntArray:
        """`frontier` after each number of delivered samples: (n,) int64."""
        # The other ranks may have delivered as many samples as this one. Inside a global batch the indices are not in
        # order, so all of it counts as delivered.
        batches = self._positions(np.maximum(taken - 1, 0)) // self._own_batch + 1
        return np.asarray(self.base + np.where(taken == 0, 0, batches * self.global_batch), dtype=np.int64)

    def _positions(self, samples: IntArray) -> IntArray:
        """Stream positions of the samples of this iterator, which gets every `num_workers`-th block of the stream."""
        if self.num_workers == 1:
            return samples
        block, offset = np.divmod(samples, self.samples_per_fetch)
        return (block * self.num_workers + self.worker) * self.samples_per_fetch + offset
