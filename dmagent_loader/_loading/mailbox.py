"""Shared memory between a feed and its copies in torch data workers.

The main process publishes new mixes. Every worker sees them before it chooses its next sample; the loader need not be
rebuilt. Workers publish their progress. The shared fields:

| field | written by | read by |
|---|---|---|
| ``header[PUBLISHED]``: number of mixes published | main process, after the mix itself | workers, before each sample |
| ``header[WORKERS]``: generation, started workers | each worker as it starts; cleared by the main process | main |
| ``header[BASE]``: consumed samples | main process | workers that begin a later pass |
| ``header[GENERATION]``: restarts of the main process | main process | workers, before each sample |
| ``header[NEWEST]``: start order and key of the newest loader | workers | workers, before each sample |
| ``frontiers[w]``: first index that worker w has not delivered | worker w | main process |
| ``passes[w]``, ``bases[w]``: key and start of the pass of worker w | worker w | the other workers |
| ``indices``, ``mixes``: ring of the last `CAPACITY` mixes | main process | workers |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.mixture.ledger import LedgerEntry

MAX_WORKERS = 256
CAPACITY = 512
"""Mixes that a worker may fall behind. It looks before each sample, so it can fall behind by its prefetch only."""

_PUBLISHED, _WORKERS, _BASE, _GENERATION, _NEWEST = range(5)
_COUNT_BITS, _KEY_BITS = 16, 32
"""Widths of the lower half of words that hold two numbers, which a reader must see together: the number of workers
below their generation, and the key of a loader below its start order."""


@dataclass(frozen=True)
class PublishedMix:
    """A mix as workers receive it: a ledger entry without its history."""

    start: int
    decided_at: int
    mix: tuple[float, ...]

    def as_entry(self) -> LedgerEntry:
        """The ledger entry that a worker's copy of the plan appends."""
        return LedgerEntry(start=self.start, mix=self.mix, decided_by="main process", decided_at=self.decided_at)


class Mailbox:
    """Mixes from the main process to its workers, and the workers' progress back.

    Args:
        num_domains: D.
    """

    def __init__(self, num_domains: int) -> None:
        self._tensors = {
            "header": torch.zeros(5, dtype=torch.int64),
            "frontiers": torch.zeros(MAX_WORKERS, dtype=torch.int64),
            "passes": torch.zeros(MAX_WORKERS, dtype=torch.int64),
            "bases": torch.zeros(MAX_WORKERS, dtype=torch.int64),
            "indices": torch.zeros((CAPACITY, 2), dtype=torch.int64),
            "mixes": torch.zeros((CAPACITY, num_domains), dtype=torch.float64),
        }
        for tensor in self._tensors.values():
            tensor.share_memory_()  # type: ignore[no-untyped-call]
        self._view()

    def _view(self) -> None:
        """Makes views of the shared tensors: reading one number through torch costs ten times as much."""
        self._header = memoryview(self._tensors["header"].numpy())  # type: ignore[arg-type]
        self._frontiers = memoryview(self._tensors["frontiers"].numpy())  # type: ignore[arg-type]
        self._passes = memoryview(self._tensors["passes"].numpy())  # type: ignore[arg-type]
        self._bases = memoryview(self._tensors["bases"].numpy())  # type: ignore[arg-type]
        self._indices = self._tensors["indices"].numpy()
        self._mixes = self._tensors["mixes"].numpy()

    def __getstate__(self) -> dict[str, torch.Tensor]:
        return self._tensors

    def __setstate__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._view()

    @property
    def published(self) -> int:
        """Number of mixes published so far."""
        return self._header[_PUBLISHED]

    def publish(self, entry: LedgerEntry) -> None:
        """Makes a new mix visible to the workers."""
        number = self.published
        slot = number % CAPACITY
        self._indices[slot] = (entry.start, entry.decided_at)
        self._mixes[slot] = entry.weights()
        self._header[_PUBLISHED] = number + 1

    def read(self, number: int) -> PublishedMix:
        """The mix published under a number.

        Raises:
            StateError: The mix has been overwritten since.
        """
        if self.published - number > CAPACITY:
            raise StateError(
                f"a data worker fell {self.published - number} mixes behind, but only the last {CAPACITY} are kept: "
                "raise samples_per_reweight or lower prefetch_factor"
            )
        slot = number % CAPACITY
        start, decided_at = (int(x) for x in self._indices[slot])
        return PublishedMix(start, decided_at, tuple(self._mixes[slot].tolist()))

    @property
    def base(self) -> int:
        """Global index at which the next pass over the data begins: the consumed samples known to the main process."""
        return self._header[_BASE]

    @base.setter
    def base(self, index: int) -> None:
        self._header[_BASE] = index

    @property
    def generation(self) -> int:
        """Number of times that the main process began to read by itself, loaded a state or set the run back. Workers
        that started earlier hold another position or ledger."""
        return self._header[_GENERATION]

    @generation.setter
    def generation(self, number: int) -> None:
        self._header[_GENERATION] = number

    def clear_workers(self) -> None:
        """Forgets the workers: the main process reads by itself, or a new pass begins and workers report again."""
        self._header[_WORKERS] = 0
        self._tensors["frontiers"].zero_()

    def agree_on_base(self, worker: int, num_workers: int, key: int, base: int) -> int:
        """The first sample of a pass, for all its workers: that of the worker which begins first.

        The number of consumed samples changes as soon as the first batch of a pass was trained on, and a worker may
        begin later than that.

        Args:
            worker: Number of this worker.
            num_workers: Number of workers that share the pass.
            key: Key of the pass.
            base: First sample as this worker knows it, read before this call.

        Raises:
            StateError: Two workers began at the same moment, at different samples.
        """
        for other in range(num_workers):
            if self._passes[other] == key:
                base = self._bases[other]
        self._bases[worker] = base
        self._passes[worker] = key
        if any(self._passes[other] == key and self._bases[other] != base for other in range(num_workers)):
            raise StateError(
                "consumed samples of an earlier pass were reported while the data workers began a new one, so the "
                "workers begin at different samples: report consumed samples before the next pass begins"
            )
        return base

    def is_newest(self, turn: int, key: int) -> bool:
        """Whether the loader of a worker is the newest one that has read; if so, it is recorded as the newest.

        Args:
            turn: Start order of the worker; larger for workers started later.
            key: Key of its loader, shared by all its workers; 32 bits.
        """
        newest = self._header[_NEWEST]
        if newest & ((1 << _KEY_BITS) - 1) == key:
            return True
        if newest >> _KEY_BITS > turn:
            return False
        self._header[_NEWEST] = turn << _KEY_BITS | key
        return True

    def start_worker(self, worker: int, num_workers: int, base: int, generation: int) -> int:
        """Reports that a worker begins a pass over the data.

        Args:
            worker: Number of this worker.
            num_workers: Number of workers that share the pass.
            base: First sample of the pass.
            generation: Generation in which the worker was started.

        Returns:
            The frontier that the same worker had reached in the previous pass, or 0.

        Raises:
            ConfigurationError: There are too many workers.
        """
        if num_workers > MAX_WORKERS:
            raise ConfigurationError(
                f"{num_workers} data workers on one rank, but at most {MAX_WORKERS} are supported: lower num_workers"
            )
        before = self._frontiers[worker]
        self._header[_WORKERS] = generation << _COUNT_BITS | num_workers
        self._frontiers[worker] = base
        return before

    def advance(self, worker: int, frontier: int) -> None:
        """Reports the frontier of a worker."""
        self._frontiers[worker] = frontier

    @property
    def num_workers(self) -> int:
        """Workers that have begun; 0 while the main process reads by itself."""
        word = self._header[_WORKERS]
        if not word:  # the fast path, taken before each sample while the main process reads by itself
            return 0
        generation, count = divmod(word, 1 << _COUNT_BITS)
        return count if generation == self.generation else 0

    def frontier(self) -> int:
        """The first global index that no worker of this rank has delivered."""
        return max(self._frontiers[: max(1, self.num_workers)])
