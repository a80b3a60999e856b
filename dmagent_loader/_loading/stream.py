"""The iterator behind a sampler: from positions to samples, with the domain chosen as late as possible.

Steps of a sample: position in the iterator -> global index (layout) -> domain and row (plan) -> bytes (shards, read
ahead in threads) -> values (decode) -> transform. Positions are planned in blocks. A new mix discards the rest of a
block, but rows already read for it stay useful: the rows of a domain have the same order under any mix.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from dmagent_loader._loading.bad_rows import Substitution
from dmagent_loader._loading.feed import Feed
from dmagent_loader._loading.lazy import Columns, LazyRow, RowAddress, RowReader
from dmagent_loader._loading.readahead import Readahead
from dmagent_loader.errors import ConfigurationError, ExhaustedError, StateError
from dmagent_loader.mixture.segment import Located
from dmagent_loader.mixture.sharding import StreamLayout
from dmagent_loader.mixture.simplex import IntArray
from dmagent_loader.shards.array_rows import ArrayRows, Buffers, RowSpans
from dmagent_loader.shards.decode import is_default_decoder
from dmagent_loader.shards.writing.packing import PACKED_MEMBER

logger = logging.getLogger(__name__)

_FIRST_BLOCK, _LARGEST_BLOCK = 512, 16_384
"""Positions planned at a time without reading threads: few after a new mix, because another may follow soon, then twice
as many each time, because the cost of planning hardly grows with their number."""
_LARGEST_DEAL = 1 << 16
"""Positions of all ranks planned at a time if samples are dealt by lane, unless one global batch has more."""


@dataclass(frozen=True)
class _Block:
    """Consecutive positions of an iterator, with the addresses of their rows."""

    first: int
    indices: IntArray
    """Global index of each position."""
    located: Located
    _frontiers: IntArray
    """First global index that cannot have been delivered, before each position and after the last."""

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def rows(self) -> list[RowAddress]:
        """Address of each position, in plain integers: numpy integers cost more to read."""
        columns = (self.indices, self.located.domain, self.located.draw, self.located.shard, self.located.row)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    @cached_property
    def frontiers(self) -> list[int]:
        """First global index that cannot have been delivered, before each position and after the last."""
        listed: list[int] = self._frontiers.tolist()
        return listed


_NOTHING = np.empty(0, dtype=np.int64)
_NOTHING_PLANNED = _Block(0, _NOTHING, Located(_NOTHING, _NOTHING, _NOTHING, _NOTHING), _NOTHING)


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
        self._reader = RowReader(
            feed.collection,
            feed.decoder,
            Substitution(feed.bad_rows, feed.plan, None if info is None else info.id),
            check_members=feed.bad_rows.skips and feed.transform is None,
        )
        self._arrays = self._array_rows()
        self._spans: RowSpans | None = None
        """Positions of the rows of the present block; None: not looked up yet."""
        self._buffers = Buffers()
        self._batch_size = 1
        """Samples that are taken together: blocks consist of whole batches."""
        self._version = -1
        self._done = False
        self._block = _NOTHING_PLANNED
        self._cursor = 0
        self._next: _Block | None = None
        self._num_planned = _FIRST_BLOCK

    @property
    def taken(self) -> int:
        """Samples that this iterator has delivered."""
        return self._block.first + self._cursor

    @property
    def frontier(self) -> int:
        """The first global index that neither this iterator nor those in step with it can have delivered."""
        if len(self._block):
            return self._block.frontiers[self._cursor]
        return self._base if self._layout is None else self._layout.frontier(self.taken)

    def __next__(self) -> Mapping[str, Any]:
        if not self._is_ready():
            raise StopIteration
        feed, cursor = self._feed, self._cursor
        located = self._block.rows[cursor]
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
            sample = self._reader.substitute(located, error, self._sample)
        self.advance(1)
        return sample

    def columns(self, count: int) -> Columns | None:
        """The next samples, read together; `advance` then marks them as delivered.

        Args:
            count: B, samples of a batch.

        Returns:
            Their packed tokens as they are stored. None: they have to be read one by one, with `next`, which also
            raises the error of a damaged row.
        """
        self._batch_size = count
        if self._arrays is None or not self._is_ready():
            return None
        arrays, begin, end = self._arrays, self._cursor, self._cursor + count
        if end > len(self._block):
            return None
        located = self._block.located
        spans = self._spans
        if spans is None:
            spans = self._spans = arrays.find(located.domain, located.shard, located.row)
        values = arrays.read(spans, begin, end, self._buffers)
        if values is None:
            return None
        names = [self._reader.names[domain] for domain in located.domain[begin:end].tolist()]
        return Columns(self._block.indices[begin:end], names, values, lambda: arrays.keys(spans, begin, end))

    def advance(self, count: int) -> None:
        """Marks samples of the present block as delivered."""
        self._cursor += count
        if self._worker is not None:
            self._feed.mailbox.advance(self._worker.id, self._block.frontiers[self._cursor])

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
        if self._cursor >= len(self._block) and not self._advance_block():
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
        self._version = self._feed.version
        self._block = replace(_NOTHING_PLANNED, first=self.taken)
        self._cursor, self._next, self._spans, self._num_planned = 0, None, None, _FIRST_BLOCK

    def _advance_block(self) -> bool:
        """Moves to the next block, and starts reading the rows of the one after it in the background.

        Returns:
            Whether there is a next block; False: the run has ended.
        """
        block = self._next if self._next is not None else self._plan(self.taken)
        if block is None:
            return False
        self._block, self._cursor, self._next, self._spans = block, 0, None, None
        if self._readahead is None:
            self._num_planned = min(2 * self._num_planned, _LARGEST_BLOCK)
            return True
        self._readahead.request(block.located)
        with contextlib.suppress(ExhaustedError):
            self._next = self._plan(block.first + len(block))
        if self._next is not None:
            self._readahead.request(self._next.located)
        return True

    def _plan(self, first: int) -> _Block | None:
        """Plans the positions from `first` on; None: the run has ended.

        Raises:
            ExhaustedError: A domain with rule ``error`` is used up before `first`.
        """
        assert self._layout is not None
        plan, own_batch = self._feed.plan, self._layout.own_batch
        count = self._num_planned if self._readahead is None else self._readahead.num_rows
        count = max(1, count // self._batch_size) * self._batch_size
        laned = plan if self._feed.own_shards else None
        if laned is not None:
            count = max(1, min(count, _LARGEST_DEAL // self._layout.world_size) // own_batch) * own_batch
        end = plan.ends_by(self._layout.frontier(first + count) + self._layout.samples_per_step_all_ranks)
        try:
            indices = self._layout.indices(first, count, end, laned)
            if not len(indices):
                return None
            located = plan.locate(indices)
        except ExhaustedError:
            # The end lies inside the block: deliver the samples before it one by one. A global batch that cannot be
            # planned whole is dealt in runs.
            try:
                indices = self._layout.indices(first, 1, end, laned)
            except ExhaustedError:
                indices = self._layout.indices(first, 1, end)
            located = plan.locate(indices)
        frontiers = self._layout.frontiers(np.arange(first, first + len(indices) + 1))
        return _Block(first, indices, located, frontiers)

    def _close(self) -> None:
        readahead = getattr(self, "_readahead", None)
        if readahead is not None:
            readahead.close()

    def __del__(self) -> None:
        self._close()
