"""Progress of a run: samples consumed, samples handed out, and samples that data workers may have fetched.

It determines where a new pass over the data begins, and the first sample of a new mix. All positions are global sample
indices:

| position | written by | read by |
|---|---|---|
| `consumed` | `consume`, `seek`: the training loop or its integration | every property below, `begin_pass` |
| `position` | `begin_pass`: a new iterator; `seek` | `delivered`, the length of the run |
| `delivered` | the iterator of the main process, through its `frontier` | `handed_out` |
| `handed_out` | follows from `delivered` and `consumed` | `frontier`, `first_free`, `Feed.handed_out` |
| `frontier` | follows from `handed_out` and the workers' reports in the mailbox | the mix in force, `achieved` |
| `first_free` | follows from `frontier` or the prefetch bound, over all ranks | the start of a new ledger entry |
| `mailbox.base` | `consume`, `seek` in the main process | `begin_pass` in a worker |
| `_worker_start` | the first `begin_pass` of a worker | its later passes, as a lower bound |

Two invariants hold: ``position <= delivered``, and
``consumed <= handed_out = max(delivered, consumed) <= frontier <= first_free``.
"""

from __future__ import annotations

import multiprocessing
from typing import Protocol

from dmagent_loader import _distributed as distributed
from dmagent_loader._loading.config import LoaderSettings
from dmagent_loader._loading.mailbox import Mailbox
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.mixture.hashing import stream_key

_STEP = "agreeing on the first sample of a new mix"


class Stream(Protocol):
    """The interface of an iterator that a cursor needs."""

    @property
    def frontier(self) -> int:
        """The first global index that the iterator cannot have delivered."""
        ...


class WorkerInfo(Protocol):
    """The part of torch's worker info that a cursor needs."""

    @property
    def id(self) -> int:
        """Number of this worker."""
        ...

    @property
    def num_workers(self) -> int:
        """Number of workers of the loader."""
        ...

    @property
    def seed(self) -> int:
        """Seed of this worker: its number plus a base seed shared by all workers of one iterator over the loader."""
        ...


class Cursor:
    """The position of a run, in one process.

    Args:
        mailbox: Memory shared with the data workers.
    """

    def __init__(self, mailbox: Mailbox) -> None:
        self.mailbox = mailbox
        self.position = 0
        """Global index at which the present pass began."""
        self.consumed = 0
        """Samples consumed over all ranks, as last reported by training."""
        self.stream: Stream | None = None
        """The iterator of the main process, or of this worker."""
        self.training_counts = False
        """Whether training reports consumed samples after each batch. A new pass then begins after the last report, and
        delivers samples again that the previous pass had only prefetched."""
        self.generation = 0
        """Generation of the mailbox at the time when this copy was made."""
        self._worker_start: int | None = None
        self._turn_and_key: tuple[int, int] | None = None
        self._passes = 0

    @property
    def delivered(self) -> int:
        """Global index after the last sample that the iterator of the main process delivered."""
        return self.position if self.stream is None else self.stream.frontier

    @property
    def handed_out(self) -> int:
        """Global index after the last sample that was delivered or consumed."""
        return max(self.delivered, self.consumed)

    @property
    def frontier(self) -> int:
        """The first global index that no iterator of this rank has delivered."""
        return max(self.handed_out, self.mailbox.frontier() if self.mailbox.num_workers else 0)

    def consume(self, consumed: int) -> None:
        """Records the number of samples that training has consumed; a smaller number than before is ignored."""
        self.consumed = max(self.consumed, consumed)
        self.mailbox.base = self.consumed

    def seek(self, consumed: int) -> None:
        """Makes the next pass begin after `consumed` samples."""
        if consumed < self.consumed:
            self._refuse_workers()
        self.position = self.consumed = consumed
        self.stream = None
        self.mailbox.clear_workers()
        self.mailbox.base = consumed

    def restore(self, consumed: int) -> None:
        """Moves to the position of a loaded state, and refuses running workers, which hold an older ledger."""
        self._refuse_workers()
        self.seek(consumed)

    def _refuse_workers(self) -> None:
        """Makes every running worker outdated: workers compare their generation with the mailbox's at each sample."""
        self.generation += 1
        self.mailbox.generation = self.generation

    def begin_pass(self, worker: WorkerInfo | None, handed_out: int) -> int:
        """The first global index of a new pass, the same for all workers of a loader.

        In the main process the pass begins after the samples handed out, in a worker after those consumed.

        Args:
            worker: Worker info of torch; None: this is the main process.
            handed_out: Global index after the last sample handed out: `handed_out`, not beyond the end of the run.
        """
        if worker is None:
            # From now on the main process reads by itself: samples of older workers would overlap with its own.
            self._refuse_workers()
            self.mailbox.clear_workers()
            self.position = self.consumed if self.training_counts else handed_out
        elif self._worker_start is None:
            # First pass of this worker. All workers were copied from the main process at the same position. The mailbox
            # is not a safe source: training may have moved its base on with batches of faster workers.
            self.position = self._worker_start = handed_out
        elif self.is_newest(worker):
            # Later pass of a persistent worker. Its copy of `consumed` is as old as the worker, so the mailbox is the
            # only source. It may change while the workers begin, so they agree on the start of the first one. The key
            # names the pass: the workers share the seed of their loader, and count their passes alike.
            self._passes += 1
            key = stream_key("pass", _loader_seed(worker), self._passes) >> 1
            base = max(self._worker_start, self.mailbox.base)
            self.position = self.mailbox.agree_on_base(worker.id, worker.num_workers, key, base)
        self.stream = None
        return self.position

    def start_worker(self, worker: WorkerInfo, base: int) -> int:
        """Reports the start of a torch worker, unless `check_worker` would refuse it.

        Returns:
            The frontier that the same worker had reached in the previous pass, or 0.
        """
        if not self.is_newest(worker):
            return 0
        return self.mailbox.start_worker(worker.id, worker.num_workers, base, self.generation)

    def is_newest(self, worker: WorkerInfo) -> bool:
        """Whether nothing was read, loaded or set back since this torch worker started."""
        if self.mailbox.generation != self.generation:
            return False
        if self._turn_and_key is None:
            self._turn_and_key = _start_order(), _loader_seed(worker) & 0xFFFFFFFF
        return self.mailbox.is_newest(*self._turn_and_key)

    def check_worker(self, worker: WorkerInfo) -> None:
        """Refuses an outdated torch worker, at each sample.

        A check at the start of a pass would not do: torch drops an error that a persistent worker raises there.

        Raises:
            StateError: A state was loaded, the run was set back, or another iterator was made, after the worker
                started.
        """
        if not self.is_newest(worker):
            raise StateError(
                "after the workers of this loader had started, a state was loaded, the run was set back by seek(), or "
                "another iterator over the sampler was made (a look at a batch, a second loader). A sampler keeps the "
                "position of one iterator only: iterate after load_state_dict() and seek(), use a separate sampler to "
                "look at samples, and rebuild the DataLoader if its workers are persistent"
            )

    def first_free(self, loader: LoaderSettings, world_size: int, last_start: int) -> int:
        """The first global index at which a new mix may begin: no iterator, on any rank, can have fetched it.

        Without torch workers the index is exact. Workers may fetch more samples at any moment, up to the prefetch of
        the loader; the index is then an upper bound. The bound does not depend on timing: a resumed run starts the mix
        at the same index.

        Args:
            loader: Loader that reads the sampler.
            world_size: Number of data-parallel processes.
            last_start: First sample of the newest mix.

        Raises:
            ConfigurationError: Workers are further ahead than the loader's prefetch explains.
        """
        free, ahead = max(self.handed_out, last_start), 0
        if self.mailbox.num_workers:
            # Rounded up to whole batches of all ranks, because workers fetch whole batches.
            global_batch = world_size * loader.batch_size
            bound = self.consumed + -(-self._prefetched(loader, world_size) // global_batch) * global_batch
            free, ahead = max(free, bound), max(0, self.mailbox.frontier() - bound)
        ahead = distributed.all_reduce_max(ahead, _STEP)
        if ahead:
            raise ConfigurationError(
                f"data workers are {ahead} samples further than {self.consumed} consumed samples and a prefetch_factor "
                f"of {loader.prefetch_factor} explain, so the first sample of a new mix is unknown: report consumed "
                "samples with sampler.reweight_due(consumed), and pass the prefetch_factor of the DataLoader in "
                "reading=ReadingConfig(prefetch_factor=...)"
            )
        return distributed.all_reduce_max(free, _STEP)

    def _prefetched(self, loader: LoaderSettings, world_size: int) -> int:
        """Samples over all ranks that workers may have fetched beyond those consumed."""
        if loader.prefetched_samples:
            return loader.prefetched_samples
        streams = world_size if loader.kind == "sharded" else 1
        fetched = loader.samples_per_fetch or loader.batch_size
        return self.mailbox.num_workers * loader.prefetch_factor * fetched * streams


def _loader_seed(worker: WorkerInfo) -> int:
    """The seed that torch draws for each iterator over a loader, the same for all its workers."""
    return worker.seed - worker.id


def _start_order() -> int:
    """Start order of this process among the children of the main process, from its name; 0: it was renamed."""
    number = multiprocessing.current_process().name.rpartition("-")[2].rpartition(":")[2]
    return int(number) if number.isdecimal() else 0
