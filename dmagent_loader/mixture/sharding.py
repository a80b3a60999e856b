"""The global samples that one iterator delivers, in order.

Every rank has an iterator and, with torch workers, every worker has one. There are two kinds of streams:

- ``sharded``: each rank reads its own share; global sample g belongs to rank g mod world size. Plain loops, a bare
  `DataLoader`, NeMo and Megatron read this way.
- ``whole``: the trainer splits one unsharded stream itself, as accelerate does for iterable datasets: it cuts blocks of
  ``world_size * batch_size`` samples into one slice for each rank. The stream is ordered such that the slice of a rank
  again holds the samples g mod world size == rank.

With either kind, every rank trains on the same samples in the same steps. torch deals whole batches to its workers in
turn: worker w of n delivers the batches w, w + n, ... of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dmagent_loader.mixture.simplex import IntArray

StreamKind = Literal["sharded", "whole"]


@dataclass(frozen=True, kw_only=True)
class StreamLayout:
    """The positions of one iterator in the run.

    Args:
        base: Global sample index at which the iteration begins.
        rank: Data-parallel rank of this process.
        world_size: Number of data-parallel processes.
        kind: ``"sharded"`` or ``"whole"``.
        batch_size: Samples of one rank in one batch; needed only for ``whole`` streams of several ranks.
        worker: Number of this torch worker.
        num_workers: Number of torch workers of this rank.
        samples_per_fetch: Consecutive stream positions that go to one worker.
        samples_per_step: Samples of each rank in one step; the run is cut to whole steps.
    """

    base: int
    rank: int = 0
    world_size: int = 1
    kind: StreamKind = "sharded"
    batch_size: int = 1
    worker: int = 0
    num_workers: int = 1
    samples_per_fetch: int = 1
    samples_per_step: int = 1

    @property
    def sliced(self) -> bool:
        """Whether a trainer cuts this stream into slices for several ranks."""
        return self.kind == "whole" and self.world_size > 1

    def indices(self, first: int, count: int) -> IntArray:
        """Global indices of samples `first` to `first + count - 1` of this iterator: (count,) int64."""
        positions = self._positions(np.arange(first, first + count, dtype=np.int64))
        if self.sliced:
            # The trainer gives slice r of each block to rank r. Transposing the block, as (batch_size, world_size) read
            # by columns, puts every world_size-th sample into one slice. The shift by `base` keeps g mod world size the
            # same wherever the iteration begins.
            group, within = np.divmod(positions, self.world_size * self.batch_size)
            piece, offset = np.divmod(within, self.batch_size)
            residue = (piece - self.base) % self.world_size
            positions = group * (self.world_size * self.batch_size) + offset * self.world_size + residue
        elif self.kind == "sharded":
            # The first sample at or after `base` with g mod world size == rank, then every world_size-th one.
            positions = (self.rank - self.base) % self.world_size + positions * self.world_size
        return np.asarray(self.base + positions, dtype=np.int64)

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
        # Stream positions up to the last delivered sample. The other ranks may have delivered as many.
        reached = self._positions(np.maximum(taken - 1, 0)) + 1
        if self.sliced:
            # Inside a block the global indices are not in order, so the whole block counts as delivered.
            block = self.world_size * self.batch_size
            reached = -(-reached // block) * block
        elif self.kind == "sharded":
            reached = reached * self.world_size
        return np.asarray(self.base + np.where(taken == 0, 0, reached), dtype=np.int64)

    def _positions(self, samples: IntArray) -> IntArray:
        """Stream positions of the samples of this iterator, which gets every `num_workers`-th block of the stream."""
        if self.num_workers == 1:
            return samples
        block, offset = np.divmod(samples, self.samples_per_fetch)
        return (block * self.num_workers + self.worker) * self.samples_per_fetch + offset
