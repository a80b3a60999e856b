"""`AgentWeightedSampler`: shards per domain in, samples in a mix that a policy decides while training continues.

The order of samples is a pure function of the seed and the ledger, so global batches do not depend on ranks or workers,
and a run resumes exactly from a small JSON state. The class composes and delegates: `_loading.feed` holds what a
process needs to read, `_run.decisions` asks the policy, `_run.state` saves, `_run.rank_check` compares ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from dmagent_loader import _distributed as distributed
from dmagent_loader._loading.accelerate import refuse_splitting
from dmagent_loader._loading.config import LoaderSettings, ReadingConfig
from dmagent_loader._loading.feed import Feed, check_ranks_given
from dmagent_loader._loading.lazy import Sample
from dmagent_loader._loading.open_shards import open_on_all_ranks
from dmagent_loader._loading.stream import SampleStream
from dmagent_loader._run import rank_check
from dmagent_loader._run.decisions import Decider, Decision, DecisionConfig, Measurement
from dmagent_loader._run.run import Run
from dmagent_loader._validation import shown, whole_number
from dmagent_loader.agent import MixingAgent
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.mixture.domains import DomainSpace, start_state_mix
from dmagent_loader.mixture.ledger import INITIAL, Ledger, LedgerEntry
from dmagent_loader.mixture.plan import Plan
from dmagent_loader.policies import Policy, make_policy
from dmagent_loader.shards import ShardCollection, load_manifest

__all__ = ["AgentWeightedSampler", "Decision", "DecisionConfig", "LoaderSettings", "Measurement", "ReadingConfig"]

_BUILDING = "building the sampler"


class AgentWeightedSampler(IterableDataset[Sample]):
    """A torch `IterableDataset` over WebDataset shards of several domains, in a mix that a policy or you decide.

    Iterating continues where the last iterator stopped. With data workers only the training loop knows its progress: a
    new pass begins after the samples last reported as consumed (`reweight_due`, `reweight`, `seek`).

    Args:
        shards: Domain name -> URL, brace pattern or list of these; or the path of a ``manifest.json`` written by
            ``dmagent shard``. A domain's name begins with its field: ``source/...`` is kept, ``target/...`` is learnt.
        agent: Name, path or Hub id of an agent checkpoint, or a loaded `MixingAgent`.
        policy: Any other policy in place of the agent.
        samples_per_reweight: Samples, over all ranks, between two decisions (64,000 in the paper).
        seed: Seed of the sample order.
        initial_mix: Mix until the first decision: domain -> weight, or field -> weight, split by rows. None: the
            domains' shares of rows.
        start_state: Mix of the base model's own training data (paper, 3.1), the first mix in the policy's history.
            None: the source domains' shares of rows.
        exhausted: Rule for a domain that has given all its rows: see `mixture.plan.exhaustion_rules`.
        rank: Data-parallel rank of this process; None: from `torch.distributed`.
        world_size: Number of data-parallel processes; None: from `torch.distributed`.
        decode: ``"default"`` (allow-listed decoders), ``"lazy"`` (the same, but rows of local shards are read when one
            of their values is asked for; `transforms.collate_packed` reads a batch at once), ``None`` (raw bytes),
            extension -> decoder, or a function of a row.
        transform: Function from sample to sample, for example tokenisation. Tags that it drops are put back.
        fields: Field of each domain whose name does not begin with it.
        compositions: P(topic | domain) over the 26 canonical topics, by domain.
        reading: Settings of the reader: workers, shuffling, threads, damage, index cache.
        deciding: Settings of decisions: guard, shadow mode, roles and standardisation of an agent.

    Raises:
        ConfigurationError: Settings that cannot work; `DomainError` and `MixError` are kinds of it.
        ShardError: Shards that are missing, empty or damaged.
        CheckpointError: An agent that cannot be loaded.
        RankError: Another rank failed, or has other shards or settings.

    Example:
        >>> import tempfile
        >>> from dmagent_loader import ReadingConfig
        >>> from dmagent_loader.testing import write_toy_shards
        >>> shards = write_toy_shards(tempfile.mkdtemp(), {"source/web": 30, "target/math": 20})
        >>> sampler = AgentWeightedSampler(shards, samples_per_reweight=10, reading=ReadingConfig(progress=False))
        >>> sampler.set_mix({"source/web": 0.25, "target/math": 0.75}).start
        0
        >>> sum(sample["__domain__"] == "target/math" for sample, _ in zip(sampler, range(20)))
        15
    """

    def __init__(
        self,
        shards: Mapping[str, str | Sequence[str]] | str | os.PathLike[str],
        agent: str | os.PathLike[str] | MixingAgent | None = None,
        *,
        samples_per_reweight: int,
        policy: Policy | None = None,
        seed: int = 0,
        initial_mix: Mapping[str, float] | None = None,
        start_state: Mapping[str, float] | None = None,
        exhausted: str | Mapping[str, str] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        decode: Any = "default",
        transform: Callable[[Any], Sample] | None = None,
        fields: Mapping[str, str] | None = None,
        compositions: Mapping[str, Mapping[str, float]] | None = None,
        reading: ReadingConfig | None = None,
        deciding: DecisionConfig | None = None,
    ) -> None:
        super().__init__()
        with distributed.together(_BUILDING):
            interval = whole_number("samples_per_reweight", samples_per_reweight, least=1)
            seed = whole_number("seed", seed)
            rank, world_size = check_ranks_given(rank, world_size)
            if not isinstance(shards, (Mapping, str, os.PathLike)):
                raise ConfigurationError(
                    f"shards is {shown(shards)}; it must map domain names to shards, or be the path of a manifest.json"
                )
            reading = _config("reading", reading, ReadingConfig)
            deciding = _config("deciding", deciding, DecisionConfig)
            if transform is not None and not callable(transform):
                raise ConfigurationError(f"transform is {shown(transform)}; it must be a function of a sample")
            found = shards if isinstance(shards, Mapping) else load_manifest(shards)
            self.space = DomainSpace.from_names(found, fields=fields, compositions=compositions)
        collection = open_on_all_ranks(found, reading)
        with distributed.together(_BUILDING) as facts:
            rows = [collection.shard_rows(d) for d in range(len(self.space))]
            plan = Plan(self.space, rows, seed=seed, exhausted=exhausted, window=reading.shuffle_window)
            natural = plan.natural_mix
            first = natural if initial_mix is None else self.space.mix(initial_mix, shares=natural)
            plan.append(LedgerEntry(start=0, mix=tuple(first.tolist()), decided_by=INITIAL, decided_at=0))
            self._feed = Feed(
                collection, plan, decode=decode, transform=transform, reading=reading, rank=rank, world_size=world_size
            )
            chosen = make_policy(
                agent, policy, self.space, natural, roles=deciding.roles, standardization=deciding.standardization
            )
            start = start_state_mix(self.space, natural, start_state)
            self._run: Run | None = Run(self._feed, Decider.configured(deciding, chosen, plan, start), interval)
            self._before_iteration: Callable[[], None] | None = None
            if distributed.is_active():
                facts |= {"initial_mix": rank_check.digest(first.tolist()), **self._run.settings.to_compare()}
        rank_check.check_ranks(_BUILDING, self.rank, self.world_size)

    # Reading

    def __iter__(self) -> Iterator[Any]:
        """Continues after the last sample handed out (with data workers: after those reported as consumed)."""
        worker = get_worker_info()
        if self._run is not None and (worker is None or worker.id == 0):
            self._run.warn_if_nobody_decides()
        if worker is None:
            self._feed.check_pass()
        stream = SampleStream(self._feed, self._feed.cursor.begin_pass(worker))
        self._feed.cursor.stream = stream
        return stream

    def __bool__(self) -> bool:
        """True: a sampler without an end has no length to be judged by."""
        return True

    def __len__(self) -> int:
        """Samples that one iterator over the whole run delivers, if data run out under the present ledger.

        Raises:
            TypeError: The run has no end, because every domain with weight repeats.
        """
        length = self._feed.length
        if length is None:
            raise TypeError("this sampler has no length: the domains repeat without end; bound the run by its steps")
        return length

    def seek(self, consumed: int) -> None:
        """Lets the next pass begin after so many consumed samples, whatever was handed out.

        Args:
            consumed: Samples consumed over all ranks since the run began.

        Raises:
            ConfigurationError: It is not a whole number of 0 or more.
        """
        self._feed.cursor.seek(whole_number("consumed", consumed, least=0))

    def peek(self) -> Sample:
        """The first row of the first domain, as a batch would get it; it counts as neither read nor consumed."""
        shard = int(np.flatnonzero(self.collection.shard_rows(0))[0])
        return self._feed.sample_at(0, shard, 0)

    def set_epoch(self, epoch: int) -> None:
        """Does not change the order; accelerate's loaders call it before each pass.

        Raises:
            ConfigurationError: accelerate would split the stream again, of which each process reads its share already.
        """
        refuse_splitting(self._feed)
        if self._before_iteration is not None:
            self._before_iteration()

    # The mix

    @property
    def mix(self) -> dict[str, float]:
        """Domain -> weight in force for the next sample to be fetched; a used-up domain has none."""
        return self.space.as_dict(self._feed.mix)

    def achieved(self, start: int = 0, stop: int | None = None) -> dict[str, int]:
        """Domain -> samples among the global indices from `start` up to `stop` (None: all handed out).

        Raises:
            ConfigurationError: They are not whole numbers of 0 or more, or `stop` is before `start`.
        """
        start = whole_number("start", start, least=0)
        stop = whole_number("stop", self._feed.cursor.frontier if stop is None else stop, least=start)
        counts = self.plan.counts(stop) - self.plan.counts(start)
        return {name: int(count) for name, count in zip(self.space.names, counts, strict=True)}

    def set_mix(self, weights: Mapping[str, float], *, renormalize: bool = False) -> LedgerEntry:
        """Changes the mix by hand, from the first sample on that nobody has fetched. All ranks call it together, and
        rank 0's weights hold for all.

        Args:
            weights: Domain -> weight (those left out get 0), or field -> weight, split over its domains by rows.
            renormalize: Divide by the sum, whatever it is.

        Raises:
            DomainError: An unknown domain.
            MixError: The weights are not a distribution.
            RankError: Another rank failed, has another ledger or other settings, or does not answer.
        """
        return self._deciding().set_mix(weights, renormalize=renormalize)

    def reweight_due(self, consumed: int) -> bool:
        """Whether a decision is due after so many samples consumed by all ranks; the first is due before any.

        Raises:
            ConfigurationError: `consumed` is not a whole number of 0 or more.
        """
        return self._deciding().reweight_due(consumed)

    def reweight(self, feedback: Mapping[str, float], *, consumed: int) -> Decision:
        """Asks the policy for the next mix. All ranks call it together; rank 0's policy decides for all.

        Args:
            feedback: Field -> mean log-probability per answer token, the same on all ranks.
            consumed: Samples that training has consumed, over all ranks, since the run began.

        Raises:
            FeedbackError: Not finite, or other fields than before.
            ConfigurationError: No policy, or `consumed` cannot be.
            RankError: Another rank failed, has another ledger or other settings, or does not answer.
        """
        return self._deciding().reweight(feedback, consumed)

    # State

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """The run's state as JSON values.

        Args:
            consumed: Samples that training has consumed over all ranks; None: all that this iterator has handed out.

        Raises:
            ConfigurationError: `consumed` cannot be: more than this sampler, which is read, has handed out.
            StateError: `consumed` is None although data workers read, so only the trainer knows it; or a data worker
                is asked, as torchdata's StatefulDataLoader does.
        """
        return self._deciding().state_dict(consumed)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues after the samples that a saved state counts as consumed; ranks and workers may be others than then.

        Raises:
            StateError: The state is of another schema, seed or shard set, or damaged. Nothing is changed then.
            RankError: Another rank could not load its state, has another one, or does not answer.
        """
        self._deciding().load_state_dict(state)

    # The run

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
    def end(self) -> int | None:
        """Global index at which the run ends for lack of data, cut to whole steps on all ranks; None: never."""
        return self._feed.end

    def finished(self, consumed: int) -> bool:
        """Whether the run has ended, for lack of data, after so many consumed samples."""
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
    def collection(self) -> ShardCollection:
        """The shards."""
        return self._feed.collection

    @property
    def transform(self) -> Callable[[Any], Sample] | None:
        """Function from sample to sample."""
        return self._feed.transform

    @property
    def policy(self) -> Policy | None:
        """The policy that decides; None: mixes change by hand only.

        Raises:
            StateError: This is a copy, made for a data worker or by pickle.
        """
        return self._deciding().decider.policy

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """Feedback of all reweighting steps so far."""
        return tuple(self._deciding().decider.measurements)

    @property
    def start_state(self) -> dict[str, float]:
        """Domain -> weight of the base model's own training data, as the policy sees it."""
        return self.space.as_dict(self._deciding().decider.start_state)

    @property
    def samples_per_reweight(self) -> int:
        """Samples, over all ranks, between two decisions."""
        return self._deciding().samples_per_reweight

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
    ) -> None:
        """Describes the loader or trainer that reads the sampler, before its first sample. None leaves as it is.

        Args:
            loader: Batches, workers and prefetch.
            rank: Data-parallel rank, from trainers that make their process groups after the sampler was built.
            world_size: Number of data-parallel processes.
            transform: Function from sample to sample.
            keep_length: `len` stays as it is now, whatever mixes come; for trainers that end an epoch by it.
            counts_every_batch: `reweight_due` is called after each batch, so a new pass begins there, and samples
                fetched ahead by the last one come again.
            before_iteration: Called when a loader announces a pass, before it makes its iterator.

        Raises:
            ConfigurationError: More processes than rows, or another batch size than `reading` names.
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

    @property
    def loader(self) -> LoaderSettings:
        """The loader that reads the sampler."""
        return self._feed.loader

    @property
    def is_iterated(self) -> bool:
        """Whether an iterator of this process is in use."""
        return self._feed.cursor.stream is not None

    # Inside

    def _deciding(self) -> Run:
        if self._run is None or get_worker_info() is not None:
            raise StateError(
                "this copy of a sampler was made for a data worker, but feedback, mixes and state are kept by the "
                "original in the main process: torchdata's StatefulDataLoader works with num_workers=0; with workers "
                "use MixingDataLoader and save sampler.state_dict(consumed=...) yourself"
            )
        return self._run

    def __getstate__(self) -> dict[str, Any]:
        """For a spawned data worker: the feed, without whatever decides."""
        return {**self.__dict__, "_run": None, "_before_iteration": None}


def _config(name: str, given: Any, kind: type[Any]) -> Any:
    """A config object, or the default.

    Raises:
        ConfigurationError: Something else was given.
    """
    if given is None:
        return kind()
    if not isinstance(given, kind):
        raise ConfigurationError(f"{name} is {shown(given)}; it must be a {kind.__name__}")
    return given
