"""How far a run is: samples consumed, samples handed out, and samples that data workers may have fetched.

From this follows where a new pass over the data begins, and from which sample on a new mix can hold. All positions are
global sample indices:

| position | written by | read by |
|---|---|---|
| `consumed` | `consume`, `seek`: the training loop or its integration | every property below, `begin_pass` |
| `position` | `begin_pass`: a new iterator; `seek` | `given`, the length of the run |
| `given` | the main process's iterator, through its `frontier` | `handed_out` |
| `handed_out` | follows from `given` and `consumed` | `frontier`, `first_free`, `begin_pass` in the main process |
| `frontier` | follows from `handed_out` and the workers' reports in the mailbox | the mix in force, `achieved` |
| `first_free` | follows from `frontier` or the prefetch bound, over all ranks | the start of a new ledger entry |
| `mailbox.base` | `consume`, `seek` in the main process | `begin_pass` in a worker |
| `_worker_start` | the first `begin_pass` of a worker | its later passes, as a lower bound |

Always ``position <= given``, and ``consumed <= handed_out = max(given, consumed) <= frontier <= first_free``.
"""

from __future__ import annotations

import multiprocessing
from typing import Protocol

from dmagent_loader import _distributed as distributed
from dmagent_loader._loading.config import LoaderSettings
from dmagent_loader._loading.mailbox import Mailbox
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.mixture.hashing import stream_key

_STEP = "agreeing from which sample on a new mix holds"


class Stream(Protocol):
    """The part of an iterator that matters here."""

    @property
    def frontier(self) -> int:
        """The first global index that the iterator cannot have given."""
        ...


class WorkerInfo(Protocol):
    """The part of what torch tells a data worker that matters here."""

    @property
    def id(self) -> int:
        """Number of this worker."""
        ...

    @property
    def num_workers(self) -> int:
        """Workers of the loader."""
        ...

    @property
    def seed(self) -> int:
        """Of this worker: its number and what all workers of an iterator over the loader share."""
        ...


class Cursor:
    """The place of a run, in one process.

    Args:
        mailbox: Shared with the data workers.
    """

    def __init__(self, mailbox: Mailbox) -> None:
        self.mailbox = mailbox
        self.position = 0
        """Global index at which the present pass began."""
        self.consumed = 0
        """Samples consumed over all ranks, as far as training has said."""
        self.stream: Stream | None = None
        """The iterator of the main process, or of this worker."""
        self.training_counts = False
        """Whether training says after each batch what it consumed: a new pass then begins there, and what the last one
        had fetched ahead comes again."""
        self.generation = 0
        """What the mailbox's was when this copy was made."""
        self._worker_start: int | None = None
        self._turn_and_key: tuple[int, int] | None = None
        self._passes = 0

    @property
    def given(self) -> int:
        """Global index after the last sample that the main process's own iterator gave."""
        return self.position if self.stream is None else self.stream.frontier

    @property
    def handed_out(self) -> int:
        """Global index after the last sample that was given or consumed."""
        return max(self.given, self.consumed)

    @property
    def frontier(self) -> int:
        """The first global index that no iterator of this rank has given."""
        return max(self.handed_out, self.mailbox.frontier() if self.mailbox.num_workers else 0)

    def consume(self, consumed: int) -> None:
        """Training says how far it is."""
        self.consumed = max(self.consumed, consumed)
        self.mailbox.base = self.consumed

    def seek(self, consumed: int) -> None:
        """The next pass begins after so many samples."""
        if consumed < self.consumed:
            self._refuse_workers()
        self.position = self.consumed = consumed
        self.stream = None
        self.mailbox.clear_workers()
        self.mailbox.base = consumed

    def restore(self, consumed: int) -> None:
        """Another state was loaded: workers that run already hold another ledger."""
        self._refuse_workers()
        self.seek(consumed)

    def _refuse_workers(self) -> None:
        self.generation += 1
        self.mailbox.generation = self.generation

    def begin_pass(self, worker: WorkerInfo | None) -> int:
        """Where a new pass begins: in the main process after what was handed out, in a worker after what was consumed.

        All workers begin at the same sample.

        Args:
            worker: torch's; None: in the main process.
        """
        if worker is None:
            self._refuse_workers()
            self.mailbox.clear_workers()
            self.position = self.consumed if self.training_counts else self.handed_out
        elif self._worker_start is None:
            # Not the mailbox: a worker that starts slowly would find there what was consumed from the others by then.
            self.position = self._worker_start = self.handed_out
        elif self.is_newest(worker):
            self._passes += 1
            key = stream_key("pass", _loader_seed(worker), self._passes) >> 1
            base = max(self._worker_start, self.mailbox.base)
            self.position = self.mailbox.agree_on_base(worker.id, worker.num_workers, key, base)
        self.stream = None
        return self.position

    def start_worker(self, worker: WorkerInfo, base: int) -> int:
        """A torch worker says that it begins; nothing is said for one that `check_worker` refuses.

        Returns:
            How far the same worker had come in the pass before, or 0.
        """
        if not self.is_newest(worker):
            return 0
        return self.mailbox.start_worker(worker.id, worker.num_workers, base, self.generation)

    def is_newest(self, worker: WorkerInfo) -> bool:
        """Whether nothing was read, loaded or set back since this torch worker was started."""
        if self.mailbox.generation != self.generation:
            return False
        if self._turn_and_key is None:
            self._turn_and_key = _start_order(), _loader_seed(worker) & 0xFFFFFFFF
        return self.mailbox.is_newest(*self._turn_and_key)

    def check_worker(self, worker: WorkerInfo) -> None:
        """In a torch worker, at each sample: torch does not report what a persistent one raises as it begins a pass.

        Raises:
            StateError: A state was loaded, the run was set back, or another iterator begun, after the worker started.
        """
        if not self.is_newest(worker):
            raise StateError(
                "after this loader's workers had started, a state was loaded, the run was set back by seek(), or "
                "another iterator over the sampler was made (a look at a batch, a second loader), but the place of a "
                "run is kept for one at a time: iterate after load_state_dict() and seek(), look at samples through a "
                "sampler of their own, and build the DataLoader anew if its workers are persistent"
            )

    def first_free(self, loader: LoaderSettings, world_size: int, last_start: int) -> int:
        """The first global index at which a new mix may begin: nobody, on any rank, has or will have fetched it.

        Without torch workers that is known exactly. With them, more samples may be fetched at any moment, up to what
        the loader prefetches; the bound does not depend on timing, so that a resumed run decides for the same index.

        Args:
            loader: That reads the sampler.
            world_size: Number of data-parallel processes.
            last_start: Where the newest mix begins.

        Raises:
            ConfigurationError: Workers are further ahead than the loader's prefetch explains.
        """
        free, ahead = max(self.handed_out, last_start), 0
        if self.mailbox.num_workers:
            unit = world_size * loader.batch_size
            bound = self.consumed + -(-self._prefetched(loader, world_size) // unit) * unit
            free, ahead = max(free, bound), max(0, self.mailbox.frontier() - bound)
        ahead = distributed.all_reduce_max(ahead, _STEP)
        if ahead:
            raise ConfigurationError(
                f"data workers are {ahead} samples further than {self.consumed} consumed samples and a prefetch_factor "
                f"of {loader.prefetch_factor} explain, so that it is unknown from where on a new mix can hold: report "
                "what was consumed (sampler.reweight_due(consumed)), and pass the DataLoader's prefetch_factor to the "
                "sampler"
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
    """torch draws a seed for each iterator over a loader, the same for all its workers."""
    return worker.seed - worker.id


def _start_order() -> int:
    """Grows from each child process of the main process to the next, which Python says in their names; 0: renamed."""
    number = multiprocessing.current_process().name.rpartition("-")[2].rpartition(":")[2]
    return int(number) if number.isdecimal() else 0
