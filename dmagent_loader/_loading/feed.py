"""The state that one process needs to read the samples of a run, in one picklable object.

The main process and each torch data worker hold their own `Feed`. It knows shards, plan, decoder and loader, and
nothing of policies. A decision reaches it as a ledger entry: in the main process by `append`, in a worker through the
mailbox.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from dmagent_loader import _distributed as distributed
from dmagent_loader._loading.bad_rows import BadRows, OnBadRow, SavedBadRows, is_bad_row
from dmagent_loader._loading.config import LoaderSettings, ReadingConfig
from dmagent_loader._loading.cursor import Cursor
from dmagent_loader._loading.lazy import TAGS, Sample
from dmagent_loader._loading.mailbox import Mailbox
from dmagent_loader._validation import shown, whole_number
from dmagent_loader.errors import HOW_TO_RESUME, ConfigurationError, StateError
from dmagent_loader.mixture.ledger import LedgerEntry
from dmagent_loader.mixture.plan import Plan
from dmagent_loader.mixture.sharding import StreamLayout, ranks_key
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.shards import RowSource, make_decoder

logger = logging.getLogger(__name__)

LAZY = "lazy"
_FEWEST_LANES = 8
"""With fewer lanes, the shards of a rank are not worth planning the whole global batch."""
NO_INDEX = -1
"""``__index__`` of rows that are not samples of the run."""


class Feed:
    """The samples of a run, as one process reads them.

    Args:
        collection: The shards.
        plan: Order of the samples; its first ledger entry is the initial mix.
        decode: Decoders, as `AgentWeightedSampler` takes them.
        transform: Function from sample to sample.
        reading: Settings of the reader.
        on_bad_row: ``"raise"`` or ``"skip"``.
        rank: Data-parallel rank of this process; None: from `torch.distributed`.
        world_size: Number of data-parallel processes; None: from `torch.distributed`.

    Raises:
        ConfigurationError: The rank is outside the world, or there are more ranks than rows.

    Attributes:
        loader: Loader that reads the feed.
        bad_rows: Rows that cannot be used.
        version: Number of changes of the plan; iterators plan again when it grows.
    """

    def __init__(
        self,
        collection: RowSource,
        plan: Plan,
        *,
        decode: Any,
        transform: Callable[[Any], Sample] | None,
        reading: ReadingConfig,
        on_bad_row: OnBadRow = "raise",
        rank: int | None,
        world_size: int | None,
    ) -> None:
        self.collection, self.plan, self.reading = collection, plan, reading
        self.is_lazy = isinstance(decode, str) and decode == LAZY
        self.decoder, self.transform = make_decoder("default" if self.is_lazy else decode), transform
        self.loader = LoaderSettings(
            batch_size=reading.batch_size or 1,
            samples_per_fetch=reading.batch_size,
            prefetch_factor=reading.prefetch_factor,
        )
        self.bad_rows = BadRows(collection, on_bad_row, reading.max_bad_rows)
        self._rank, self._world_size = rank, world_size
        self.mailbox = Mailbox(len(plan.space))
        self.cursor = Cursor(self.mailbox)
        self.version = 0
        self._received = 0
        """Published mixes that this copy has applied."""
        self._length: int | None = None
        self.limit: int | None = None
        """Samples, over all ranks, at which the trainer stops; None: unknown."""
        self.decision_step: int | None = None
        """Samples, over all ranks, between two moments at which the trainer can make a decision; None: one step."""
        self._undercount_reported = False
        self.check_ranks()
        self._report_shards_of_nodes()

    # Ranks and loader

    @property
    def rank(self) -> int:
        """Data-parallel rank of this process."""
        return distributed.get_rank() if self._rank is None else self._rank

    @property
    def world_size(self) -> int:
        """Number of data-parallel processes."""
        return distributed.get_world_size() if self._world_size is None else self._world_size

    def set_ranks(self, rank: int, world_size: int) -> None:
        """Sets rank and world size, for trainers that create their process groups after the sampler was built."""
        self._rank, self._world_size = rank, world_size
        self.check_ranks()

    def check_ranks(self) -> None:
        """Refuses a rank outside the world, and more ranks than rows.

        Raises:
            ConfigurationError: Either is the case.
        """
        total = int(self.plan.num_rows.sum())
        if not 0 <= self.rank < self.world_size:
            raise ConfigurationError(
                f"rank {self.rank} is outside a world of {self.world_size} processes: pass a rank from 0 to "
                f"{self.world_size - 1}"
            )
        if self.world_size > total:
            raise ConfigurationError(
                f"world size {self.world_size} is larger than the {total} rows of all {len(self.plan.space)} domains "
                "together: some ranks would have nothing to train on; use fewer ranks, or more data: "
                f"{HOW_TO_RESUME}"
            )

    @property
    def own_shards(self) -> bool:
        """Whether samples are dealt by lane, so that a node reads its own part of the shards."""
        chosen = self.reading.own_shards
        return not self.collection.is_local and self.plan.num_lanes >= _FEWEST_LANES if chosen is None else chosen

    def _report_shards_of_nodes(self) -> None:
        """Warns if each of several nodes would fetch nearly all data."""
        processes, of_node = (os.environ.get(name, "") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        are_several = processes.isdigit() and of_node.isdigit() and int(of_node) < int(processes)
        is_chosen = self.reading.own_shards is not None or self.own_shards
        if are_several and self.rank == 0 and not self.collection.is_local and not is_chosen:
            logger.warning(
                "the shards are remote, and %s of %s processes run on this node: each node will fetch nearly all "
                "shards, because no more than %d of a domain are in use at a time; pass "
                "reading=ReadingConfig(own_shards=True), with which each node fetches its own part, or "
                "own_shards=False to leave it so",
                of_node,
                processes,
                self.plan.num_lanes,
            )

    def set_loader(self, loader: LoaderSettings) -> None:
        """Describes the loader, before its first sample.

        Raises:
            ConfigurationError: The reading config has another batch size.
        """
        declared = self.reading.batch_size
        if declared is not None and loader.samples_per_fetch is not None and declared != loader.batch_size:
            raise ConfigurationError(
                f"reading=ReadingConfig(batch_size={declared}), but the loader has batch size {loader.batch_size}: the "
                "order of samples would depend on the data workers; leave batch_size out, because this loader reports "
                "its own"
            )
        self.loader = loader

    def layout(self, *, base: int, worker: int = 0, num_workers: int = 1) -> StreamLayout:
        """The global sample indices of an iterator that begins at `base`."""
        return StreamLayout(
            base=base,
            key=ranks_key(self.plan.seed),
            rank=self.rank,
            world_size=self.world_size,
            kind=self.loader.kind,
            batch_size=self.loader.batch_size,
            worker=worker,
            num_workers=num_workers,
            samples_per_fetch=self.loader.samples_per_fetch or 1,
            samples_per_step=self.loader.samples_per_step,
        )

    # The run

    @property
    def end(self) -> int | None:
        """Global index at which the data are used up and the run ends, cut to whole steps on all ranks; None: never."""
        end = self.plan.end
        return None if end is None else self.layout(base=self.cursor.position).delivered_end(end)

    def finished(self, consumed: int) -> bool:
        """Whether the data are used up after `consumed` samples."""
        end = self.plan.ends_by(consumed + self._step)
        return end is not None and consumed >= self.layout(base=self.cursor.position).delivered_end(end)

    @property
    def total_samples(self) -> int | None:
        """Samples of the whole run over all ranks, under the present ledger; None: unknown."""
        return min((bound for bound in (self.limit, self.end) if bound is not None), default=None)

    @property
    def global_batch(self) -> int:
        """Samples of one step over all ranks."""
        return self.world_size * max(self.loader.samples_per_step, self.loader.batch_size)

    @property
    def length(self) -> int | None:
        """Samples that one iterator over the whole run delivers under the present ledger; None: the run has no end."""
        if self._length is not None:
            return self._length
        end = self.plan.end
        return None if end is None else self.layout(base=0).num_samples(end)

    def keep_length(self) -> None:
        """Fixes `length` at its present value, whatever mixes follow."""
        self._length = None
        self._length = self.length

    @property
    def handed_out(self) -> int:
        """Global index after the last sample that was delivered or consumed, not beyond the end of the run."""
        return self._before_end(self.cursor.handed_out)

    @property
    def frontier(self) -> int:
        """The first global index that no iterator of this rank has delivered, not beyond the end of the run."""
        return self._before_end(self.cursor.frontier)

    def _before_end(self, index: int) -> int:
        """A position of the cursor, which counts a last global batch that is smaller than the others as a whole one."""
        end = self.plan.ends_by(index + self._step)
        if end is None:
            return index
        return min(index, max(self.layout(base=self.cursor.position).delivered_end(end), self.cursor.consumed))

    @property
    def _step(self) -> int:
        """Samples of all ranks in one step, to which the run is cut."""
        return self.world_size * self.loader.samples_per_step

    @property
    def mix(self) -> FloatArray:
        """(D,) weights in force for the next sample to be fetched; a used-up domain has none."""
        index = self.cursor.frontier
        return self.plan.mix_at(index) if self.plan.used_up_at(index) else self.plan.ledger.in_force(index).weights()

    def transformed(self, sample: Mapping[str, Any]) -> Sample:
        """A sample after the transform, with its tags.

        Raises:
            ConfigurationError: The transform does not return a sample.
        """
        assert self.transform is not None
        tags = {name: sample[name] for name in TAGS}
        transformed = self.transform(sample)
        if not isinstance(transformed, Mapping):
            raise ConfigurationError(f"transform returned {shown(transformed)}; it must return a sample (a dict)")
        return {**tags, **transformed}

    def sample_at(self, domain: int, shard: int, row: int) -> Sample | None:
        """One row as a sample; reading it consumes nothing. None: the row is bad, and bad rows are skipped."""
        raw = self.collection.read(domain, shard, row)
        tags = {"__index__": NO_INDEX, "__key__": raw.key, "__domain__": self.plan.space.names[domain]}
        try:
            sample = {**tags, **self.decoder(raw)}
            return sample if self.transform is None else self.transformed(sample)
        except Exception as error:
            if self.bad_rows.skips and is_bad_row(error):
                return None
            raise

    # Changes of the mix

    def append(
        self,
        mix: FloatArray,
        *,
        decided_by: str,
        decided_at: int,
        feedback: Mapping[str, float] | None = None,
        accepted: bool = True,
        note: str = "",
    ) -> LedgerEntry:
        """Puts a new mix into force from the first sample that no iterator has fetched; all ranks call it together.

        Raises:
            ConfigurationError: Data workers are further ahead than the loader's prefetch explains.
        """
        entry = LedgerEntry(
            start=self.cursor.first_free(self.loader, self.world_size, self.plan.ledger.last.start),
            mix=tuple(mix.tolist()),
            decided_by=decided_by,
            decided_at=decided_at,
            feedback=feedback,
            accepted=accepted,
            note=note,
        )
        self.plan.append(entry)
        self.mailbox.publish(entry)
        self._received = self.mailbox.published
        self.version += 1
        return entry

    @property
    def is_behind(self) -> bool:
        """Whether the main process has published mixes that this copy has not applied."""
        return self._received < self.mailbox.published

    def receive(self, frontier: int) -> None:
        """In a data worker: applies the mixes that the main process has published since the last sample.

        Args:
            frontier: First global index that this worker cannot have delivered.

        Raises:
            StateError: A mix starts before samples that this worker has already delivered.
        """
        while self.is_behind:
            entry = self.mailbox.read(self._received).as_entry()
            if entry.start < frontier:
                raise StateError(
                    f"a new mix starts from sample {entry.start}, but a data worker has already delivered samples up "
                    f"to {frontier} under the old one: the loader prefetches more than declared; use MixingDataLoader, "
                    "or pass the prefetch_factor of the DataLoader in reading=ReadingConfig(prefetch_factor=...)"
                )
            self.plan.append(entry)
            self._received += 1
            self.version += 1

    def restore(self, plan: Plan, consumed: int, bad_rows: SavedBadRows) -> None:
        """Continues another plan after `consumed` samples."""
        self.plan = plan
        self.bad_rows.restore(bad_rows, consumed)
        self.cursor.restore(consumed)
        self.version += 1

    # Checks of the training loop

    def check_consumed(self, consumed: int) -> None:
        """Compares the samples that training reports as consumed with those that were handed out.

        Raises:
            ConfigurationError: More were reported than handed out.
        """
        delivered, workers = self.cursor.delivered, self.mailbox.num_workers
        if workers:
            delivered = max(delivered, self.mailbox.frontier())
        if not self.loader.by_trainer and consumed > delivered:
            raise ConfigurationError(
                f"consumed is {consumed}, but only {delivered} samples were handed out: count the samples of all ranks "
                "since the run began, each sample once"
            )
        if self.loader.by_trainer or workers or self._undercount_reported:
            return  # workers deliver far more than was trained on
        done, reported = delivered - self.cursor.position, consumed - self.cursor.position
        if reported > 0 and 3 * reported <= done:
            self._undercount_reported = True
            logger.warning(
                "consumed is %d, but %d samples were handed out: a run resumed from this count would train on most of "
                "them again; count the samples of all ranks (batch size x world size for each batch), not the batches",
                consumed,
                delivered,
            )

    def check_pass(self) -> None:
        """Warns of a pass that would give every rank the same samples, or none at all."""
        processes = os.environ.get("WORLD_SIZE", "")
        if self._rank is None and not distributed.is_active() and processes.isdigit() and int(processes) > 1:
            logger.warning(
                "WORLD_SIZE is %s, but there is no process group to ask for the rank of this process, so every process "
                "reads the same samples: call init_process_group first, or pass rank= and world_size=",
                processes,
            )
        begin = self.handed_out
        if begin and self.finished(begin):
            logger.warning(
                "data are used up after %d samples, so a new pass has none: a run is one pass, however often the "
                "source field repeats; start another run with a new sampler, or continue this one with more data or "
                "exhausted='repeat': %s",
                begin,
                HOW_TO_RESUME,
            )

    def __getstate__(self) -> dict[str, Any]:
        """State for a spawned data worker: the position without its iterator, and the ranks, unknown to the worker."""
        state = self.__dict__.copy()
        state["cursor"] = copy.copy(self.cursor)
        state["cursor"].position, state["cursor"].stream = self.handed_out, None
        if distributed.is_active():
            state["_rank"], state["_world_size"] = self.rank, self.world_size
        return state


def validated_ranks(rank: int | None, world_size: int | None) -> tuple[int | None, int | None]:
    """Rank and world size as passed by a user.

    Raises:
        ConfigurationError: They are not whole numbers, or there is a world size without a rank or process group.
    """
    if rank is not None:
        rank = whole_number("rank", rank, least=0)
    if world_size is not None:
        world_size = whole_number("world_size", world_size, least=1)
        if world_size > 1 and rank is None and not distributed.is_active():
            raise ConfigurationError(
                f"world_size={world_size} without rank, and there is no process group to ask: every process would act "
                "as rank 0 and read the same samples; pass rank= too, or call init_process_group first"
            )
    return rank, world_size
