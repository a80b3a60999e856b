"""The iterator behind a sampler: from positions to samples, the domain chosen as late as possible.

The way of a sample: own position -> global index (layout) -> domain and row (plan) -> bytes (shards, read ahead in
threads) -> values (decode) -> transform. Positions are planned in blocks; a new mix discards the rest of the block, not
the rows that were already read for it: the rows of a domain come in the same order under any mix.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import get_worker_info

from dmagent_loader._loading.lazy import LazyRow, Place, RowReader
from dmagent_loader._validation import shown
from dmagent_loader.errors import ConfigurationError, ExhaustedError, StateError
from dmagent_loader.mixture.plan import Located
from dmagent_loader.mixture.sharding import StreamLayout
from dmagent_loader.mixture.simplex import IntArray
from dmagent_loader.shards import RawSample, ShardCollection

if TYPE_CHECKING:
    from dmagent_loader.sampler import AgentWeightedSampler

logger = logging.getLogger(__name__)

_READ_CHUNK = 16
_FIRST_BLOCK, _LARGEST_BLOCK = 512, 16_384
"""Positions planned at a time without reading threads: few after a new mix, which may be followed by another, then
twice as many each time, because the cost of planning hardly grows with their number."""
_REMOTE_THREADS = 2
_Key = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ReadaheadConfig:
    """How far rows are read ahead of the samples.

    Args:
        num_threads: Reading threads of one iterator; 0 reads each row when it is needed. None: 2 if any shard is
            remote, else 0, because handing a cached row from thread to thread costs more than reading it. Give 2 or
            more for files on a slow network mount.
        num_rows: Rows requested from the threads at a time; one such block is read while another is given.
    """

    num_threads: int | None = None
    num_rows: int = 512

    def __post_init__(self) -> None:
        if (self.num_threads is not None and self.num_threads < 0) or self.num_rows < 1:
            raise ConfigurationError(
                f"readahead of {self.num_rows} rows in {self.num_threads} threads: rows must be at least 1, threads "
                "at least 0"
            )


class Readahead:
    """Rows that are being read in the background, by domain and draw."""

    def __init__(self, collection: ShardCollection, num_threads: int, num_rows: int) -> None:
        self._collection, self.num_rows = collection, num_rows
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="dmagent-read")
        self._pending: dict[_Key, tuple[Future[list[RawSample]], int]] = {}

    @classmethod
    def of(cls, collection: ShardCollection, config: ReadaheadConfig) -> Readahead | None:
        """The reading threads that a configuration asks for, if any."""
        threads = config.num_threads
        if threads is None:
            threads = 0 if collection.is_local else _REMOTE_THREADS
        return cls(collection, threads, config.num_rows) if threads else None

    def request(self, located: Located) -> None:
        """Starts reading rows that have not been requested yet."""
        if len(self._pending) > 4 * self.num_rows:
            self._pending.clear()
        wanted = [
            number
            for number, key in enumerate(zip(located.domain.tolist(), located.draw.tolist(), strict=True))
            if key not in self._pending
        ]
        for first in range(0, len(wanted), _READ_CHUNK):
            chosen = wanted[first : first + _READ_CHUNK]
            rows = [(int(located.domain[i]), int(located.shard[i]), int(located.row[i])) for i in chosen]
            future = self._pool.submit(self._read, rows)
            for place, i in enumerate(chosen):
                self._pending[int(located.domain[i]), int(located.draw[i])] = (future, place)

    def take(self, domain: int, draw: int, shard: int, row: int) -> RawSample:
        """A row: from the background if it was requested, or else read now."""
        pending = self._pending.pop((domain, draw), None)
        if pending is None:
            return self._collection.read(domain, shard, row)
        future, place = pending
        return future.result()[place]

    def close(self) -> None:
        """Stops the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, rows: list[tuple[int, int, int]]) -> list[RawSample]:
        return [self._collection.read(*row) for row in rows]


@dataclass(frozen=True)
class _Block:
    """Consecutive positions of an iterator, with where their rows are."""

    first: int
    located: Located
    rows: list[Place]
    """Of each position: plain integers, because numpy's cost more to read."""
    frontiers: list[int]
    """The first global index that cannot have been delivered before each position, and after the last."""

    @classmethod
    def of(cls, first: int, indices: IntArray, located: Located, frontiers: IntArray) -> _Block:
        columns = (indices, located.domain, located.draw, located.shard, located.row)
        rows = list(zip(*(column.tolist() for column in columns), strict=True))
        return cls(first, located, rows, frontiers.tolist())


_NOTHING = np.empty(0, dtype=np.int64)
_NOTHING_PLANNED = _Block(0, Located(_NOTHING, _NOTHING, _NOTHING, _NOTHING), [], [])


class SampleStream(Iterator[Mapping[str, Any]]):
    """One iterator over a sampler: in the main process, or in one torch worker.

    Args:
        sampler: The sampler, or this worker's copy of it.
        base: Global index at which to begin.
    """

    def __init__(self, sampler: AgentWeightedSampler, base: int) -> None:
        info = get_worker_info()
        self._sampler, self._base = sampler, base
        self._worker = info
        self._num_workers = 1 if info is None else info.num_workers
        if info is not None:
            before = sampler.progress.start_worker(info, base)
            if before > base:
                logger.warning(
                    "data workers begin again at sample %d, although samples up to %d were given before: report what "
                    "was consumed (sampler.reweight_due(consumed)) if those were trained on",
                    base,
                    before,
                )
        self._layout: StreamLayout | None = None
        self._readahead = Readahead.of(sampler.collection, sampler.readahead)
        self._reader = RowReader(sampler.collection, sampler.decoder)
        self._version = -1
        self._done = False
        self._block = _NOTHING_PLANNED
        self._place = 0
        self._next: _Block | None = None
        self._num_planned = _FIRST_BLOCK

    @property
    def taken(self) -> int:
        """Samples that this iterator has delivered."""
        return self._block.first + self._place

    @property
    def frontier(self) -> int:
        """The first global index that this iterator, and those in step with it, cannot have delivered."""
        if self._block.frontiers:
            return self._block.frontiers[self._place]
        return self._base if self._layout is None else self._layout.frontier(self.taken)

    def __next__(self) -> Mapping[str, Any]:
        sampler = self._sampler
        if self._done:
            raise StopIteration
        if self._worker is None:
            if sampler.progress.stream is not self or sampler.mailbox.num_workers:
                raise StateError(
                    "another iterator over this sampler was made, a state was loaded, or the run was set to another "
                    "place while this iterator was in use, but the place of a run is kept for one at a time: make a "
                    "new one after load_state_dict() or seek(), by iter() over the sampler or its DataLoader, and look "
                    "at samples through a sampler of their own"
                )
        else:
            sampler.progress.check_worker(self._worker)
            if sampler.received < sampler.mailbox.published:
                sampler.receive(self.frontier)
        if self._layout is None:
            self._layout = self._begin()
        if self._version != sampler.version:
            self._replan()
        place = self._place
        if place >= len(self._block.rows):
            if not self._advance_block():
                self._done = True
                self._close()
                raise StopIteration
            place = 0
        located = self._block.rows[place]
        sample: Mapping[str, Any]
        if self._readahead is not None:
            _, domain, draw, shard, row = located
            sample = self._reader.sample(located, self._readahead.take(domain, draw, shard, row))
        elif sampler.lazy:
            sample = LazyRow(self._reader, located)
        else:
            sample = self._reader.sample(located)
        if sampler.transform is not None:
            tags = {name: sample[name] for name in ("__key__", "__domain__", "__index__")}
            transformed = sampler.transform(sample)
            if not isinstance(transformed, Mapping):
                raise ConfigurationError(f"transform returned {shown(transformed)}; it must return a sample, a dict")
            sample = {**tags, **transformed}
        self._place = place + 1
        if self._worker is not None:
            sampler.mailbox.advance(self._worker.id, self._block.frontiers[place + 1])
        return sample

    def _begin(self) -> StreamLayout:
        """Fixes the layout at the first sample: only then is it known which loader asks."""
        declared = self._sampler.loader.worker_block
        asked = None if self._worker is None else self._loader_batch_size()
        if self._num_workers > 1 and declared is None and asked is None:
            raise ConfigurationError(
                f"{self._num_workers} torch workers share this sampler, but the loader's batch size is unknown, so "
                "that the order of samples would depend on the workers: pass batch_size= to AgentWeightedSampler, "
                "the same as the DataLoader's (1 if the loader has none)"
            )
        if declared is not None and asked is not None and declared != asked and not self._sampler.loader.declared:
            raise ConfigurationError(
                f"the sampler was told batch_size={declared}, but the loader asks for {asked} samples at a time: "
                "the order of samples would depend on the workers; pass the same to both, or none to the sampler"
            )
        block, worker = declared or asked or 1, 0
        if self._worker is not None:
            worker = self._worker.id
            self._sampler.mailbox.report_block(block)
        return self._sampler.layout(base=self._base, worker=worker, num_workers=self._num_workers, worker_block=block)

    def _loader_batch_size(self) -> int | None:
        """The batch size of the torch loader that is asking for a sample, in a worker process.

        torch tells a worker its number but not the loader's batch size, without which batches cannot be dealt to
        workers in the order of the run. The fetcher that calls `next` holds it: one list element for each sample of the
        batch. None: something between the loader and this iterator asks, which may make batches of its own.
        """
        frame = sys._getframe(1)
        while frame is not None:
            fetcher = frame.f_locals.get("self")
            if "possibly_batched_index" in frame.f_locals and frame.f_code.co_name == "fetch":
                if getattr(fetcher, "dataset_iter", None) is not self:
                    return None
                asked = frame.f_locals["possibly_batched_index"]
                return len(asked) if isinstance(asked, list) else 1
            frame = frame.f_back  # type: ignore[assignment]
        return None

    def _replan(self) -> None:
        """Drops what was planned under an older ledger."""
        self._version = self._sampler.version
        self._block = replace(_NOTHING_PLANNED, first=self.taken)
        self._place, self._next, self._num_planned = 0, None, _FIRST_BLOCK

    def _advance_block(self) -> bool:
        """Goes on to the next block, and has the rows of the one after it read in the background.

        Returns:
            False if there is none: the run has ended.
        """
        block = self._next if self._next is not None else self._plan(self.taken)
        if block is None:
            return False
        self._block, self._place, self._next = block, 0, None
        if self._readahead is None:
            self._num_planned = min(2 * self._num_planned, _LARGEST_BLOCK)
            return True
        self._readahead.request(block.located)
        with contextlib.suppress(ExhaustedError):
            self._next = self._plan(block.first + len(block.rows))
        if self._next is not None:
            self._readahead.request(self._next.located)
        return True

    def _plan(self, first: int) -> _Block | None:
        """Plans the positions from `first` on; None: the run has ended.

        Raises:
            ExhaustedError: A domain with rule ``error`` is used up before `first`.
        """
        assert self._layout is not None
        plan = self._sampler.plan
        count = self._num_planned if self._readahead is None else self._readahead.num_rows
        indices = self._layout.indices(first, count)
        end = plan.ends_by(int(indices.max()) + self._layout.unit)
        if end is not None:
            indices = indices[: max(0, self._layout.num_samples(end) - first)]
            if not len(indices):
                return None
        try:
            located = plan.locate(indices)
        except ExhaustedError:
            # The end lies inside the block: deliver one by one what comes before it.
            indices = indices[:1]
            located = plan.locate(indices)
        frontiers = self._layout.frontiers(np.arange(first, first + len(indices) + 1))
        return _Block.of(first, indices, located, frontiers)

    def _close(self) -> None:
        readahead = getattr(self, "_readahead", None)
        if readahead is not None:
            readahead.close()

    def __del__(self) -> None:
        self._close()


def check_not_delivered(start: int, frontier: int) -> None:
    """Refuses a mix that should have held for samples that a worker has already delivered.

    Raises:
        StateError: The new mix came too late.
    """
    if start < frontier:
        raise StateError(
            f"a new mix holds from sample {start}, but a data worker has already delivered samples up to {frontier} "
            "under the old one: the loader runs further ahead than declared; pass prefetch_factor= (the DataLoader's) "
            "to AgentWeightedSampler"
        )
