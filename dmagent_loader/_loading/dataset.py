"""A feed as a torch dataset: iteration, position, and the loader that reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from dmagent_loader._loading.accelerate import refuse_splitting
from dmagent_loader._loading.config import LoaderSettings
from dmagent_loader._loading.feed import Feed
from dmagent_loader._loading.lazy import Sample
from dmagent_loader._loading.orphans import end_with_parent
from dmagent_loader._loading.stream import SampleStream
from dmagent_loader._validation import whole_number
from dmagent_loader.errors import DecodeError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.ledger import Ledger
from dmagent_loader.mixture.length import RunLength
from dmagent_loader.mixture.plan import Plan
from dmagent_loader.shards import RowSource


class _NoLengthError(AttributeError, TypeError):
    """`len` of a sampler without an end: a TypeError for `len`, an AttributeError for `hasattr`."""


class FeedDataset(IterableDataset[Sample]):
    """The reading half of a sampler: the base of `AgentWeightedSampler`, which adds decisions.

    Args:
        feed: The samples.
    """

    def __init__(self, feed: Feed) -> None:
        super().__init__()
        self._feed = feed
        self._before_iteration: Callable[[], None] | None = None

    def __iter__(self) -> Iterator[Any]:
        """Continues after the last sample handed out (with data workers: after those reported as consumed)."""
        worker = get_worker_info()
        if worker is None:
            self._feed.check_pass()
        else:
            end_with_parent()
        stream = SampleStream(self._feed, self._feed.cursor.begin_pass(worker, self._feed.handed_out))
        self._feed.cursor.stream = stream
        return stream

    def __bool__(self) -> bool:
        """True. Python would otherwise ask for the length, which a sampler without an end does not have."""
        return True

    @property
    def __len__(self) -> Callable[[], int]:
        """Samples that one iterator over the whole run delivers under the present ledger.

        A property, so that a sampler without an end has no ``__len__``: some trainers look before they call.

        Raises:
            TypeError: The run has no end, because every domain with weight repeats.
        """
        length = self._feed.length
        if length is None:
            raise _NoLengthError(
                "this sampler has no length, because its domains repeat forever: limit the run by steps"
            )
        return lambda: length

    @property
    def space(self) -> DomainSpace:
        """The domains, in order."""
        return self._feed.plan.space

    def seek(self, consumed: int) -> None:
        """Makes the next pass begin after `consumed` samples, whatever was handed out.

        Args:
            consumed: Samples consumed over all ranks since the run began.

        Raises:
            ConfigurationError: `consumed` is not a whole number of 0 or more.
        """
        self._feed.cursor.seek(whole_number("consumed", consumed, least=0))

    def peek(self) -> Sample:
        """The first row of the first domain, as a batch would get it; it counts as neither read nor consumed.

        Raises:
            DecodeError: The row cannot be decoded; or all rows of the shard are bad, and bad rows are skipped.
        """
        rows = self.collection.shard_rows(0)
        shard = int(np.flatnonzero(rows)[0])
        for row in range(rows[shard]):
            sample = self._feed.sample_at(0, shard, row)
            if sample is not None:
                return sample
        raise DecodeError(
            f"none of the {rows[shard]} rows of shard {self.collection.display(0, shard)} can be used: check decode= "
            "and transform= on one of them"
        )

    def set_epoch(self, epoch: int) -> None:
        """Does not change the order; the loaders of accelerate call it before each pass.

        Raises:
            ConfigurationError: accelerate would split the stream again, although each process already reads its share.
        """
        refuse_splitting(self._feed)
        if self._before_iteration is not None:
            self._before_iteration()

    @property
    def mix(self) -> dict[str, float]:
        """Domain -> weight in force for the next sample to be fetched; a used-up domain has none."""
        return self.space.as_dict(self._feed.mix)

    def achieved(self, start: int = 0, stop: int | None = None) -> dict[str, int]:
        """Domain -> samples among the global indices from `start` up to `stop` (None: all handed out).

        Domains that a run with changed data has left behind come last.

        Raises:
            ConfigurationError: The indices are not whole numbers of 0 or more, or `stop` is before `start`.
        """
        start = whole_number("start", start, least=0)
        stop = whole_number("stop", self._feed.frontier if stop is None else stop, least=start)
        before, counts = self.plan.drawn(start), self.plan.drawn(stop)
        return {name: count - before[name] for name, count in counts.items()}

    @property
    def rank(self) -> int:
        """Data-parallel rank of this process."""
        return self._feed.rank

    @property
    def world_size(self) -> int:
        """Number of data-parallel processes."""
        return self._feed.world_size

    @property
    def consumed(self) -> int:
        """Samples consumed over all ranks, as last reported."""
        return self._feed.cursor.consumed

    @property
    def frontier(self) -> int:
        """Global index after the last sample that an iterator of this rank has fetched."""
        return self._feed.frontier

    @property
    def end(self) -> int | None:
        """Global index at which the data are used up and the run ends, cut to whole steps on all ranks; None: never."""
        return self._feed.end

    @property
    def total_samples(self) -> int | None:
        """Samples of the whole run over all ranks: up to `end` or the trainer's limit; None: unknown."""
        return self._feed.total_samples

    @property
    def global_batch(self) -> int:
        """Samples of one step over all ranks, as the loader describes it."""
        return self._feed.global_batch

    @property
    def run_length(self) -> RunLength:
        """The facts that bound the length of the run, for policies."""
        return self._feed.plan.run_length(self._feed.limit)

    def finished(self, consumed: int) -> bool:
        """Whether the data are used up after `consumed` samples."""
        return self._feed.finished(consumed)

    @property
    def plan(self) -> Plan:
        """Order of the samples."""
        return self._feed.plan

    @property
    def ledger(self) -> Ledger:
        """Record of all mixes so far."""
        return self._feed.plan.ledger

    @property
    def collection(self) -> RowSource:
        """The rows of all domains: a `ShardCollection`, or with `PackText`, `PackedRows`."""
        return self._feed.collection

    @property
    def transform(self) -> Callable[[Any], Sample] | None:
        """Function from sample to sample."""
        return self._feed.transform

    @property
    def is_lazy(self) -> bool:
        """Whether rows are read on the first access to a value (``decode="lazy"``)."""
        return self._feed.is_lazy

    # For loaders and integrations

    def bind(
        self,
        loader: LoaderSettings | None = None,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        transform: Callable[[Any], Sample] | None = None,
        keep_length: bool = False,
        counts_every_batch: bool = False,
        before_iteration: Callable[[], None] | None = None,
        limit: int | None = None,
        decision_step: int | None = None,
    ) -> None:
        """Describes the loader or trainer that reads the sampler, before its first sample. None changes nothing.

        Args:
            loader: Batches, workers and prefetch.
            rank: Data-parallel rank, for trainers that create their process groups after the sampler was built.
            world_size: Number of data-parallel processes.
            transform: Function from sample to sample.
            keep_length: Whether `len` keeps its present value under later mixes; for trainers that end an epoch by it.
            counts_every_batch: Whether `reweight_due` is called after each batch. A new pass then begins after the last
                report, and delivers prefetched samples again.
            before_iteration: Function called when a loader announces a pass, before it makes its iterator.
            limit: Samples, over all ranks since the run began, at which the trainer stops.
            decision_step: Samples, over all ranks, between two moments at which the trainer can make a decision.

        Raises:
            ConfigurationError: There are more processes than rows, or the batch size differs from that in `reading`.
        """
        if loader is not None:
            self._feed.set_loader(loader)
        if rank is not None and world_size is not None:
            self._feed.set_ranks(rank, world_size)
        if transform is not None:
            self._feed.transform = transform
        if keep_length:
            self._feed.keep_length()
        self._feed.cursor.training_counts |= counts_every_batch
        self._before_iteration = before_iteration or self._before_iteration
        if limit is not None:
            self._feed.limit = limit
        if decision_step is not None:
            self._feed.decision_step = decision_step

    @property
    def loader(self) -> LoaderSettings:
        """The loader that reads the sampler."""
        return self._feed.loader

    @property
    def is_iterated(self) -> bool:
        """Whether an iterator of this process is in use."""
        return self._feed.cursor.stream is not None

    def __getstate__(self) -> dict[str, Any]:
        """For a spawned data worker: hooks stay in the main process."""
        return {**self.__dict__, "_before_iteration": None}
