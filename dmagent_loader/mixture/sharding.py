"""Which of the run's global samples one iterator delivers, and in which order.

An iterator is one of many: one for each rank and, with torch workers, one for each worker. Two kinds exist:

- ``sharded``: each rank reads its own share; global sample g belongs to rank g mod world size. This is a plain loop, a
  bare `DataLoader`, NeMo, Megatron.
- ``whole``: the trainer splits one unsharded stream itself, as accelerate does for iterable datasets: it cuts blocks of
  ``world_size * batch_size`` samples into one slice for each rank. The stream is ordered so that the slice of a rank
  again holds the samples g mod world size == rank.

So every rank trains on the same samples in the same steps, whatever the kind. torch deals whole batches to its workers
in turn; worker w of n delivers the batches w, w + n, ... of the stream.
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
        rank: Of this process.
        world_size: Number of data-parallel processes.
        kind: ``"sharded"`` or ``"whole"``.
        batch_size: Samples of one rank in one batch; only needed for ``whole`` streams of several ranks.
        worker: Number of this torch worker.
        num_workers: Number of torch workers of this rank.
        samples_per_fetch: Consecutive stream positions that go to one worker.
        samples_per_step: The length of the run is cut to a multiple of so many samples of each rank, so that the last
            step is whole.
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
        """Global indices of the iterator's samples number `first` to `first + count - 1`: (count,) int64."""
        positions = self._positions(np.arange(first, first + count, dtype=np.int64))
        if self.sliced:
            group, within = np.divmod(positions, self.world_size * self.batch_size)
            piece, offset = np.divmod(within, self.batch_size)
            residue = (piece - self.base) % self.world_size
            positions = group * (self.world_size * self.batch_size) + offset * self.world_size + residue
        elif self.kind == "sharded":
            positions = (self.rank - self.base) % self.world_size + positions * self.world_size
        return np.asarray(self.base + positions, dtype=np.int64)

    def num_samples(self, end: int) -> int:
        """How many samples this iterator delivers in all when the run ends at global index `end`."""
        stream = self.delivered_end(end) - self.base
        if self.kind == "sharded":
            stream //= self.world_size
        blocks, rest = divmod(stream, self.samples_per_fetch)
        own = max(0, (blocks - self.worker + self.num_workers - 1) // self.num_workers)
        return own * self.samples_per_fetch + (rest if blocks % self.num_workers == self.worker else 0)

    @property
    def samples_per_step_all_ranks(self) -> int:
        """Samples of all ranks to a multiple of which the run's length is cut."""
        return self.world_size * self.samples_per_step

    def delivered_end(self, end: int) -> int:
        """`end` cut down to where all ranks have the same whole number of batches."""
        return self.base + max(0, end - self.base) // self.samples_per_step_all_ranks * self.samples_per_step_all_ranks

    def frontier(self, taken: int) -> int:
        """The first global index that this iterator, and those in step with it, cannot have delivered yet.

        Args:
            taken: Samples that this iterator has delivered.
        """
        return int(self.frontiers(np.array([taken]))[0])

    def frontiers(self, taken: IntArray) -> IntArray:
        """`frontier` after each number of delivered samples: (n,) int64."""
        reached = self._positions(np.maximum(taken - 1, 0)) + 1
        if self.sliced:
            unit = self.world_size * self.batch_size
            reached = -(-reached // unit) * unit
        elif self.kind == "sharded":
            reached = reached * self.world_size
        return np.asarray(self.base + np.where(taken == 0, 0, reached), dtype=np.int64)

    def _positions(self, own: IntArray) -> IntArray:
        """Stream positions of the iterator's own samples."""
        if self.num_workers == 1:
            return own
        block, offset = np.divmod(own, self.samples_per_fetch)
        return (block * self.num_workers + self.worker) * self.samples_per_fetch + offset
