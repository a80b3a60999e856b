"""The iterator behind a sampler: from positions to samples, with the domain chosen as late as possible.

Steps of a sample: position in the iterator -> global index (layout) -> domain and row (plan) -> bytes (shards, read
ahead in threads) -> values (decode) -> transform. Positions are planned in runs. A new mix discards the rest of a run,
but rows looked up, read or fetched for it stay useful: the rows of a domain have the same order under any mix.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise, starmap
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from dmagent_loader._loading.bad_rows import Substitution
from dmagent_loader._loading.blocks_ahead import BlocksAhead, BlocksOfRows
from dmagent_loader._loading.feed import Feed
from dmagent_loader._loading.lazy import Columns, LazyRow, RowAddress, RowReader
from dmagent_loader._loading.readahead import Readahead
from dmagent_loader._loading.rows_ahead import FoundRows, RowsAhead
from dmagent_loader.errors import ConfigurationError, ExhaustedError, StateError
from dmagent_loader.mixture.segment import Located
from dmagent_loader.mixture.sharding import StreamLayout
from dmagent_loader.mixture.simplex import IntArray
from dmagent_loader.shards.array_rows import ArrayRows, Buffers, RowSpans
from dmagent_loader.shards.decode import is_default_decoder
from dmagent_loader.shards.writing.packing import PACKED_MEMBER

logger = logging.getLogger(__name__)

_FIRST_RUN, _LARGEST_RUN = 512, 16_384
"""Positions planned at a time without reading threads: few after a new mix, because another may follow soon, then twice
as many each time, because the cost of planning hardly grows with their number. A rank or worker that delivered fewer
under the last mix first plans a quarter more than it delivered."""
_LARGEST_RUN_OF_AHEAD = 2048
"""Positions of a run up to which rows of local shards are looked up in `RowsAhead`: longer ones mean that mixes change
rarely."""
_LARGEST_DEAL = 1 << 16
"""Positions of all ranks planned at a time if samples are dealt by lane, unless one global batch has more."""
_RUN_AHEAD = 2048
"""Positions planned at a time ahead of those in use, if shards are remote."""
_MOST_AT_ONCE = 8192
"""Positions of all ranks and workers in several such runs that are planned together: that is cheaper."""
_LEAST_AHEAD, _MOST_AHEAD_OF_A_NEW_MIX, _MOST_AHEAD = 2048, 8192, 1 << 17
"""Positions planned ahead if shards are remote: few at first, then twice as many after each run that had to wait."""
_MOST_BYTES_AHEAD = 128 << 20
"""Bytes of the rows of these positions."""
_THREADS_FOR_ROWS = 16
"""Threads that read the rows of blocks for which there is no room, or which could not be fetched."""


@dataclass(frozen=True)
class _Run:
    """Consecutive positions of an iterator, with the addresses of their rows."""

    first: int
    indices: IntArray
    """Global index of each position."""
    located: Located
    positions: IntArray | None = None
    """Positions of the rows, as `ArrayRows.find` returns them; None: not looked up yet."""
    blocks: BlocksOfRows | None = None
    """Blocks of the rows, if there are remote shards."""

    def __len__(self) -> int:
        return len(self.indices)

    def part(self, begin: int, end: int) -> _Run:
        """Some of the positions."""
        part, located = slice(begin, end), self.located
        return _Run(
            self.first + begin,
            self.indices[part],
            Located(located.domain[part], located.draw[part], located.shard[part], located.row[part]),
            None if self.positions is None else self.positions[:, part],
            None if self.blocks is None else self.blocks.chosen(part),
        )

    @cached_property
    def rows(self) -> list[RowAddress]:
        """Address of each position, in plain integers: numpy integers cost more to read."""
        columns = (self.indices, self.located.domain, self.located.draw, self.located.shard, self.located.row)
        return list(zip(*(column.tolist() for column in columns), strict=True))


_NOTHING = np.empty(0, dtype=np.int64)
_NOWHERE = Located(_NOTHING, _NOTHING, _NOTHING, _NOTHING)


class SampleStream(Iterator[Mapping[str, Any]]):
    """One iterator over a feed: in the main process, or in one torch worker.

    Args:
        feed: Feed of the main process, or the copy of it in this worker.
        base: Global index at which the iterator begins.
    """

    def __init__(self, feed: Feed, base: int) -> None:
        info = get_worker_info()
        self._feed, self._base = feed, base
        self._worker = info
        self._num_workers = 1 if info is None else info.num_workers
        if info is not None:
            before = feed.cursor.start_worker(info, base)
            if before > base:
                logger.warning(
                    "data workers begin again at sample %d, although samples up to %d were delivered before: if those "
                    "were trained on, report them with sampler.reweight_due(consumed)",
                    base,
                    before,
                )
        self._layout: StreamLayout | None = None
        self._readahead = Readahead.configured(feed.collection, feed.reading)
        fetcher = feed.collection.fetcher
        self._blocks = None if fetcher is None else BlocksAhead(len(feed.collection.domains), fetcher)
        self._reader = RowReader(
            feed.collection,
            feed.decoder,
            Substitution(feed.bad_rows, feed.plan, None if info is None else info.id),
            check_members=feed.bad_rows.skips and feed.transform is None,
        )
        self._arrays = self._array_rows()
        self._rows_ahead: RowsAhead | None = None
        self._reads_columns = False
        self._buffers = Buffers()
        self._batch_size = 1
        """Samples that are taken together: runs consist of whole batches."""
        self._version = -1
        self._done = False
        self._run, self._cursor = _Run(0, _NOTHING, _NOWHERE), 0
        self._positions: IntArray | None = None
        """Positions of the rows of the present run, as `ArrayRows.find` returns them; None: not looked up yet."""
        self._frontiers: list[int] | None = None
        """`frontier` before each position of the present run and after the last; None: not computed yet."""
        self._planned: deque[_Run] = deque()
        """Runs after the present one."""
        self._run_length, self._num_ahead = _FIRST_RUN, _LEAST_AHEAD
        self._first_run, self._replanned = _FIRST_RUN, 0
        """Positions planned first after the newest mix, and those delivered before it."""

    @property
    def taken(self) -> int:
        """Samples that this iterator has delivered."""
        return self._run.first + self._cursor

    @property
    def frontier(self) -> int:
        """The first global index that neither this iterator nor those in step with it can have delivered."""
        return self._base if self._layout is None else self._layout.frontier(self.taken)

    def __next__(self) -> Mapping[str, Any]:
        if not self._is_ready():
            raise StopIteration
        feed, cursor = self._feed, self._cursor
        located = self._run.rows[cursor]
        sample: Mapping[str, Any]
        try:
            if self._readahead is not None:
                _, domain, draw, shard, row = located
                sample = self._reader.sample(located, self._readahead.take(domain, draw, shard, row))
            elif feed.is_lazy:
                sample = LazyRow(self._reader, located)
            else:
                sample = self._reader.sample(located)
            if feed.transform is not None:
                sample = feed.transformed(sample)
        except Exception as error:
            if feed.is_lazy and feed.transform is None:
                sample = LazyRow(self._reader, located)  # its error comes on access, whether or not it was read ahead
            else:
                sample = self._reader.substitute(located, error, self._sample)
        self._cursor = cursor + 1  # as `advance`, without the cost of a call for each sample
        if self._worker is not None:
            self._report(self._worker.id)
        return sample

    def columns(self, count: int) -> Columns | None:
        """The next samples, read together; `advance` then marks them as delivered.

        Args:
            count: B, samples of a batch.

        Returns:
            Their packed tokens as they are stored. None: they have to be read one by one, with `next`, which also
            raises the error of a damaged row.
        """
        self._batch_size, self._reads_columns = count, True
        if self._arrays is None or not self._is_ready():
            return None
        arrays, begin, end = self._arrays, self._cursor, self._cursor + count
        if end > len(self._run):
            return None
        located = self._run.located
        if self._readahead is not None and self._readahead.has_any(located.chosen(np.arange(begin, end))):
            return None  # their blocks could not be had when the run began: nothing is to be read twice
        if self._positions is None:
            self._positions = arrays.find(located.domain, located.shard, located.row)
        spans = RowSpans.of(self._positions[:, begin:end])
        values = arrays.read(spans, self._buffers)
        if values is None:
            return None
        names = [self._reader.names[domain] for domain in located.domain[begin:end].tolist()]
        return Columns(self._run.indices[begin:end], names, values, lambda: arrays.keys(spans))

    def advance(self, count: int) -> None:
        """Marks samples of the present run as delivered."""
        self._cursor += count
        if self._worker is not None:
            self._report(self._worker.id)

    def _report(self, worker: int) -> None:
        """Tells the main process how far this worker is."""
        if self._frontiers is None:
            assert self._layout is not None
            taken = np.arange(self._run.first, self._run.first + len(self._run) + 1)
            self._frontiers = self._layout.frontiers(taken).tolist()
        self._feed.mailbox.advance(worker, self._frontiers[self._cursor])

    def _enter(self, run: _Run) -> None:
        """Makes a run the present one."""
        self._run, self._cursor, self._positions, self._frontiers = run, 0, run.positions, None

    def _is_ready(self) -> bool:
        """Plans the next sample, if it is not planned yet under the present ledger.

        Returns:
            Whether there is one; False: the run has ended.
        """
        feed = self._feed
        if self._done:
            return False
        if self._worker is None:
            if feed.cursor.stream is not self or feed.mailbox.num_workers:
                raise StateError(
                    "while this iterator was in use, another iterator over this sampler was made, a state was loaded, "
                    "or the run was moved by seek(). A sampler keeps the position of one iterator only: call iter() on "
                    "the sampler or its DataLoader again after load_state_dict() or seek(), and use a separate sampler "
                    "to look at samples"
                )
        else:
            feed.cursor.check_worker(self._worker)
            if feed.is_behind:
                feed.receive(self.frontier)
        if self._layout is None:
            self._layout = self._begin()
        if self._version != feed.version:
            self._replan()
        if self._cursor >= len(self._run) and not self._begin_run():
            self._done = True
            self._close()
            return False
        return True

    def _sample(self, address: RowAddress) -> Mapping[str, Any]:
        """A sample that was not read ahead."""
        sample = self._reader.sample(address)
        return sample if self._feed.transform is None else self._feed.transformed(sample)

    def _array_rows(self) -> ArrayRows | None:
        """The reader of whole batches; None: rows are read one by one, in threads, or with decoders of the user."""
        if self._readahead is not None or not is_default_decoder(self._feed.decoder):
            return None
        return self._feed.collection.array_rows(PACKED_MEMBER)

    def _begin(self) -> StreamLayout:
        """Fixes the layout at the first sample, when the loader is known.

        Raises:
            ConfigurationError: This is a data worker, and the batch size of its loader is unknown.
        """
        if self._worker is None:
            return self._feed.layout(base=self._base)
        if self._feed.loader.samples_per_fetch is None:
            raise ConfigurationError(
                f"a loader with {self._worker.num_workers} data workers reads this sampler, but its batch size is "
                "unknown, so the order of samples would depend on the workers: use MixingDataLoader(sampler, "
                "batch_size=...), or pass the DataLoader's batch size in reading=ReadingConfig(batch_size=...) (1 if "
                "the loader has none)"
            )
        return self._feed.layout(base=self._base, worker=self._worker.id, num_workers=self._worker.num_workers)

    def _replan(self) -> None:
        """Drops the positions planned under an older ledger."""
        self._enter(_Run(self.taken, _NOTHING, _NOWHERE))
        self._planned.clear()
        if self._version >= 0:
            # Not less than half as many as the last time: two mixes may follow each other at once.
            likely = max(1, (self.taken - self._replanned) * 5 // 4, self._first_run // 2)
            self._first_run = min(likely, _FIRST_RUN)
        self._run_length, self._replanned = self._first_run, self.taken
        self._version = self._feed.version
        if self._blocks is not None:
            self._num_ahead = min(self._num_ahead, _MOST_AHEAD_OF_A_NEW_MIX)
            self._blocks.replan(self._feed.plan.ledger.last.weights())

    def _begin_run(self) -> bool:
        """Moves to the next run of positions, and starts reading the rows after it in the background.

        Returns:
            Whether there is a next run; False: the data are used up.
        """
        if not self._planned and not self._plan_next(self.taken):
            return False
        self._enter(self._planned.popleft())
        if self._rows_ahead is not None:
            self._rows_ahead.begin(self._run.located)
        if self._blocks is not None:
            self._run_length = _RUN_AHEAD
            if self._blocks.has_waited():
                self._num_ahead = min(2 * self._num_ahead, _MOST_AHEAD)
            self._plan_ahead(min(self._num_ahead, int(_MOST_BYTES_AHEAD / max(1, self._blocks.mean_row_bytes))))
            self._blocks.advance()
            self._read_rows_without_blocks(self._blocks)
        if self._feed.reading.num_threads and self._readahead is not None:
            self._readahead.request(self._run.located)
            self._plan_ahead(1)
            if self._planned:
                self._readahead.request(self._planned[0].located)
        elif self._blocks is None:
            self._run_length = min(2 * self._run_length, _LARGEST_RUN)
        return True

    def _read_rows_without_blocks(self, blocks: BlocksAhead) -> None:
        """Starts reading rows of this run and the next whose blocks cannot be had."""
        if blocks.all_come():
            return
        for run in (self._run, *islice(self._planned, 1)):
            assert run.blocks is not None
            chosen = blocks.unavailable(run.blocks)
            if chosen.any():
                if self._readahead is None:
                    self._readahead = Readahead(self._feed.collection, _THREADS_FOR_ROWS, _RUN_AHEAD)
                self._readahead.request(run.located.chosen(chosen))

    def _plan_ahead(self, count: int) -> None:
        """Plans at least `count` positions after the present run, as far as there are any."""
        end = self._run.first + len(self._run) + count
        with contextlib.suppress(ExhaustedError):
            while True:
                last = self._planned[-1] if self._planned else self._run
                first = last.first + len(last)
                if first >= end or not self._plan_next(first, end - first):
                    return
                if len(self._planned[-1]) == 1:
                    return  # near the end of the data, where positions are planned one by one

    def _plan_next(self, first: int, count: int = 1) -> bool:
        """Plans the runs of positions from `first` on; False: the data are used up there.

        Args:
            first: The first position.
            count: Positions. At least one run is planned, and several only up to `_MOST_AT_ONCE`.

        Raises:
            ExhaustedError: A domain with rule ``error`` is used up before `first`.
        """
        assert self._layout is not None
        length = self._feed.reading.num_rows if self._feed.reading.num_threads else self._run_length
        length, num_ranks = max(1, length // self._batch_size) * self._batch_size, self._layout.world_size
        if self._feed.own_shards:
            own_batch = self._layout.own_batch
            length = max(1, min(length, _LARGEST_DEAL // num_ranks) // own_batch) * own_batch
        most = _MOST_AT_ONCE // (num_ranks * self._layout.num_workers)
        run = self._plan(first, length, max(1, min(-(-count // length), most // length)))
        if run is None:
            return False
        ends = [*range(length, len(run), length), len(run)]
        if self._blocks is not None:
            assert run.blocks is not None
            self._blocks.request(run.located.domain, run.located.draw, run.blocks, first, ends)
        self._planned.extend([run] if len(ends) == 1 else starmap(run.part, pairwise((0, *ends))))
        return True

    def _plan(self, first: int, length: int, num_runs: int) -> _Run | None:
        """Plans several runs of positions as one; None: there are no samples from `first` on.

        Raises:
            ExhaustedError: A domain with rule ``error`` is used up before `first`.
        """
        assert self._layout is not None
        plan, count = self._feed.plan, num_runs * length
        laned = plan if self._feed.own_shards else None
        end = plan.ends_by(self._layout.frontier(first + count) + self._layout.samples_per_step_all_ranks)
        try:
            indices = self._layout.indices(first, count, end, laned)
            if not len(indices):
                return None
            found = self._located(indices)
        except ExhaustedError:
            if num_runs > 1:
                return self._plan(first, length, 1)
            # The end lies inside the run: deliver the samples before it one by one. A global batch that cannot be
            # planned whole is dealt in runs.
            try:
                indices = self._layout.indices(first, 1, end, laned)
            except ExhaustedError:
                indices = self._layout.indices(first, 1, end)
            found = self._located(indices)
        return _Run(first, indices, *found)

    def _located(self, indices: IntArray) -> FoundRows:
        """Addresses of samples, the positions of their rows if these are known at once, and their blocks."""
        plan, blocks_of = self._feed.plan, None if self._blocks is None else self._feed.collection.blocks_of
        if blocks_of is None and (self._readahead is not None or len(indices) > _LARGEST_RUN_OF_AHEAD):
            self._rows_ahead = None
            return FoundRows(plan.locate(indices))
        if self._rows_ahead is None:
            self._rows_ahead = RowsAhead(plan, self._arrays if self._reads_columns else None, blocks_of)
        return self._rows_ahead.find(*plan.draws(indices))

    def _close(self) -> None:
        if self._readahead is not None:
            self._readahead.close()
        if self._blocks is not None:
            self._blocks.close()

    def __del__(self) -> None:
        readahead = getattr(self, "_readahead", None)
        if readahead is not None:
            readahead.close()
        blocks = getattr(self, "_blocks", None)
        if blocks is not None:
            blocks.drop()
