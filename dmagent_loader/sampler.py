"""`AgentWeightedSampler`: shards per domain in; out come samples in a mix that a policy changes during training.

The order of samples is a pure function of the seed and the ledger, so global batches do not depend on ranks or workers,
and a run resumes exactly from a small JSON state. The class composes and delegates: `_loading.feed` reads samples,
`_run.decisions` queries the policy, `_run.state` saves, `_run.rank_check` compares ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import get_worker_info

from dmagent_loader import _distributed as distributed
from dmagent_loader._loading.bad_rows import OnBadRow, validated_on_bad_row
from dmagent_loader._loading.config import LoaderSettings, ReadingConfig
from dmagent_loader._loading.dataset import FeedDataset
from dmagent_loader._loading.feed import Feed, validated_ranks
from dmagent_loader._loading.lazy import Sample
from dmagent_loader._loading.open_shards import open_on_all_ranks
from dmagent_loader._loading.probe import probe_rows
from dmagent_loader._run import rank_check
from dmagent_loader._run.cadence import Cadence
from dmagent_loader._run.decisions import Decider, Decision, DecisionConfig, Measurement
from dmagent_loader._run.run import Run
from dmagent_loader._run.state import Data, validated_data
from dmagent_loader._validation import shown, whole_number
from dmagent_loader.agent import MixingAgent
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.mixture.domains import DomainSpace, start_state_mix
from dmagent_loader.mixture.ledger import INITIAL, LedgerEntry
from dmagent_loader.mixture.plan import Plan
from dmagent_loader.mixture.rest_of_pass import ShardSet
from dmagent_loader.policies import Policy, PolicyFactory, make_policy
from dmagent_loader.policies.choice import uses_topics
from dmagent_loader.policies.fields import report_topics
from dmagent_loader.shards import PackText, load_manifest
from dmagent_loader.shards.compositions import compositions_of, load_start_state

__all__ = [
    "AgentWeightedSampler",
    "Decision",
    "DecisionConfig",
    "LoaderSettings",
    "Measurement",
    "PackText",
    "ReadingConfig",
]

_BUILDING = "building the sampler"


class AgentWeightedSampler(FeedDataset):
    """A torch `IterableDataset` over WebDataset shards of several domains, in a mix that a policy or you decide.

    Iteration continues where the last iterator stopped. With data workers, only the training loop knows its progress: a
    new pass begins after the samples last reported as consumed (`reweight_due`, `reweight`, `seek`).

    Args:
        shards: Domain name -> URL, brace pattern or list of these; or the path of a ``manifest.json`` written by
            ``dmagent shard``. A domain name begins with its field: the model must not forget ``source/...``, and should
            learn ``target/...``.
        agent: Name, path or Hub id of an agent checkpoint, or a loaded `MixingAgent`.
        policy: Another policy instead of an agent: ``"influence"`` (trains on domains that help the questions, as
            measured on the model), ``"question-topics"``, ``"natural"``, ``"uniform"``, ``"odm"``, an object with
            `propose`, or a function that makes one from the domains and their natural shares (`make_policy`).
        topics: Policy that sets the shares of the domains inside each field while the agent sets the weights of the
            fields, in the forms of `policy`. None: the agent sets both.
        decisions: Number of decisions, evenly spaced over the run; None: 80, as in the paper. The interval between them
            is derived once, after the first decision, from the length of the run; a resumed run keeps it.
        samples_per_reweight: Samples, over all ranks, between two decisions, in place of `decisions`.
        seed: Seed of the sample order.
        initial_mix: Mix until the first decision: domain -> weight, or field -> weight (split by rows). None: the
            domains' shares of rows.
        start_state: Mix of the base model's own training data (paper, 3.1), the first mix in the policy's history:
            domain or field -> weight; canonical topic -> share or number of documents; or the path of the file that
            ``dmagent start-state`` wrote. None: the source domains' shares of rows.
        exhausted: Rule for domains whose rows are used up: see `mixture.exhaustion.exhaustion_rules`.
        rank: Data-parallel rank of this process; None: from `torch.distributed`.
        world_size: Number of data-parallel processes; None: from `torch.distributed`.
        decode: ``"default"`` (allow-listed decoders), ``"lazy"`` (the same, but a row is read on the first
            access to a value, unless a thread has read it ahead; `transforms.collate_packed` reads a batch at once),
            ``None`` (raw bytes), extension -> decoder, or a function of a row.
        pack: Packing of text documents into rows of tokens while they are read; `transform` then gets these rows. None:
            rows are read as they are stored.
        transform: Function from sample to sample, for example tokenisation. Dropped tags are restored.
        on_bad_row: Rows that cannot be decoded, on which the transform fails, or that lack a member: ``"raise"``, or
            ``"skip"``: another row of the domain takes the place of a bad one, the same on all ranks and after a
            resume. Skipped rows are logged and counted, and `ReadingConfig.max_bad_rows` bounds them.
        data: Default of `load_state_dict`, for trainers that load the state by themselves: ``"exact"`` or
            ``"changed"``.
        fields: Field of each domain whose name does not begin with it.
        compositions: Domain -> P(topic | domain) over the 26 canonical topics, or numbers of documents by topic; or the
            path of a file that ``dmagent compose`` wrote. The file beside a manifest is used by itself, for domains
            that these leave out. A measured composition is left out, with a warning, if most documents of its sample
            had no topic.
        reading: Settings of the reader: workers, shuffling, threads, damage, index cache.
        deciding: Settings of decisions: guard, shadow mode, roles and standardisation of an agent.

    Raises:
        ConfigurationError: A setting is invalid; `DomainError` and `MixError` are subclasses.
        ShardError: Shards are missing, empty or damaged.
        CheckpointError: The agent cannot be loaded.
        RankError: Another rank failed, or has other shards or settings.

    Example:
        >>> import tempfile
        >>> from dmagent_loader import ReadingConfig
        >>> from dmagent_loader.testing import write_toy_shards
        >>> shards = write_toy_shards(tempfile.mkdtemp(), {"source/web": 30, "target/math": 20})
        >>> sampler = AgentWeightedSampler(shards, reading=ReadingConfig(progress=False))
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
        decisions: int | None = None,
        samples_per_reweight: int | None = None,
        policy: Policy | PolicyFactory | str | None = None,
        topics: Policy | PolicyFactory | str | None = None,
        seed: int = 0,
        initial_mix: Mapping[str, float] | None = None,
        start_state: Mapping[str, float] | str | os.PathLike[str] | None = None,
        exhausted: str | Mapping[str, str] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        decode: Any = "default",
        pack: PackText | None = None,
        transform: Callable[[Any], Sample] | None = None,
        on_bad_row: OnBadRow = "raise",
        data: Data = "exact",
        fields: Mapping[str, str] | None = None,
        compositions: Mapping[str, Mapping[str, float]] | str | os.PathLike[str] | None = None,
        reading: ReadingConfig | None = None,
        deciding: DecisionConfig | None = None,
    ) -> None:
        with distributed.together(_BUILDING):
            cadence = Cadence(decisions, samples_per_reweight)
            seed = whole_number("seed", seed)
            rank, world_size = validated_ranks(rank, world_size)
            if not isinstance(shards, (Mapping, str, os.PathLike)):
                raise ConfigurationError(
                    f"shards is {shown(shards)}; it must map domain names to shards, or be the path of a manifest.json"
                )
            reading = _config("reading", reading, ReadingConfig)
            deciding = _config("deciding", deciding, DecisionConfig)
            if pack is not None and not isinstance(pack, PackText):
                raise ConfigurationError(f"pack is {shown(pack)}; it must be a PackText")
            if isinstance(transform, PackText):
                raise ConfigurationError(
                    "transform is a PackText, but packing decides which rows there are: pass it as pack=; a transform "
                    "gets the packed rows"
                )
            if transform is not None and not callable(transform):
                raise ConfigurationError(f"transform is {shown(transform)}; it must be a function of a sample")
            on_bad_row, data = validated_on_bad_row(on_bad_row), validated_data(data)
            by_domain = shards if isinstance(shards, Mapping) else load_manifest(shards)
            of_file = compositions if isinstance(compositions, (str, os.PathLike)) else None
            stated = {} if isinstance(compositions, (str, os.PathLike)) else dict(compositions or {})
            measured = compositions_of(by_domain, of_file, stated=stated)
            shares = {name: found.shares for name, found in measured.items()}
            space = DomainSpace.from_names(by_domain, fields=fields, compositions={**stated, **shares})
        collection = open_on_all_ranks(by_domain, reading, pack, on_bad_row)
        with distributed.together(_BUILDING) as facts:
            rows = [collection.shard_rows(d) for d in range(len(space))]
            shard_set = ShardSet(rows, [collection.shard_contents(d) for d in range(len(space))])
            plan = Plan(space, shard_set, seed=seed, exhausted=exhausted, shuffle=reading.shuffle(rows))
            natural = plan.natural_mix
            first = natural if initial_mix is None else space.mix(initial_mix, shares=natural)
            plan.append(LedgerEntry(start=0, mix=tuple(first.tolist()), decided_by=INITIAL, decided_at=0))
            feed = Feed(
                collection,
                plan,
                decode=decode,
                transform=transform,
                reading=reading,
                on_bad_row=on_bad_row,
                rank=rank,
                world_size=world_size,
            )
            super().__init__(feed)
            chosen = make_policy(
                agent,
                policy,
                space,
                natural,
                topics=topics,
                roles=deciding.roles,
                standardization=deciding.standardization,
                balance=deciding.balance,
                floor=deciding.floor,
            )
            if uses_topics(chosen):
                report_topics(space, {name: found.source for name, found in measured.items()})
            if isinstance(start_state, (str, os.PathLike)):
                start = start_state_mix(space, natural, load_start_state(start_state).shares, are_topics=True)
            else:
                start = start_state_mix(space, natural, start_state)
            self._data = data
            self._run: Run | None = Run(feed, Decider.configured(deciding, chosen, plan, start), cadence)
            if distributed.is_active():
                facts |= {"initial_mix": rank_check.digest(first.tolist()), **self._run.settings.to_compare()}
        rank_check.check_ranks(_BUILDING, self.rank, self.world_size)

    def __iter__(self) -> Iterator[Any]:
        """Continues after the last sample handed out (with data workers: after those reported as consumed)."""
        worker = get_worker_info()
        if self._run is not None and (worker is None or worker.id == 0):
            self._run.warn_before_first_decision()
        return super().__iter__()

    def set_mix(self, weights: Mapping[str, float], *, renormalize: bool = False) -> LedgerEntry:
        """Changes the mix by hand, from the first sample that no iterator has fetched.

        All ranks call it together, and the weights of rank 0 apply to all.

        Args:
            weights: Domain -> weight (domains left out get 0), or field -> weight (split over its domains by rows).
            renormalize: Divide by the sum, whatever it is.

        Raises:
            DomainError: A domain is unknown.
            MixError: The weights are not a distribution.
            RankError: Another rank failed, has another ledger or other settings, or does not answer.
        """
        return self._deciding().set_mix(weights, renormalize=renormalize)

    def reweight_due(self, consumed: int) -> bool:
        """Whether a decision is due; the first is due before any sample.

        Args:
            consumed: Samples consumed over all ranks since the run began; recorded as the progress of training.

        Raises:
            ConfigurationError: `consumed` is not a whole number of 0 or more.
        """
        return self._deciding().reweight_due(consumed)

    def reweight(self, feedback: Mapping[str, float], *, consumed: int) -> Decision:
        """Queries the policy for the next mix. All ranks call it together; the policy of rank 0 decides for all.

        Args:
            feedback: Field -> mean log-probability per answer token, the same on all ranks.
            consumed: Samples consumed over all ranks since the run began.

        Raises:
            FeedbackError: The feedback is not finite, or has other fields than before.
            ConfigurationError: There is no policy, or `consumed` is impossible.
            RankError: Another rank failed, has another ledger or other settings, or does not answer.
        """
        return self._deciding().reweight(feedback, consumed)

    def probe_rows(self, rows: int, *, probe: int = 0) -> dict[str, list[Sample]]:
        """Rows of each domain to measure influence on, read by position. They do not count as consumed.

        Args:
            rows: Number of rows of each domain, evenly spaced over its shards; a smaller domain returns all its rows.
            probe: Number of the probe; each probe reads different rows, and always the same ones.

        Returns:
            Domain -> rows, decoded and transformed like samples, with ``__index__`` -1. The same on all ranks.

        Raises:
            ShardError: A row is damaged or cannot be decoded.
        """
        count, number = whole_number("rows", rows, least=1), whole_number("probe", probe, least=0)
        return probe_rows(self._feed, count, number)

    # State

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """The state of the run as JSON values.

        Args:
            consumed: Samples consumed over all ranks since the run began; None: all samples handed out.

        Raises:
            ConfigurationError: `consumed` is larger than the number of samples that a sampler in use has handed out.
            StateError: `consumed` is None although data workers read ahead, so only the training loop knows it; or this
                is the copy of a data worker, which torchdata's StatefulDataLoader asks for a state.
        """
        return self._deciding().state_dict(consumed)

    def load_state_dict(self, state: Mapping[str, Any], data: Data | None = None) -> None:
        """Continues after the consumed samples of a saved state. Numbers of ranks and workers may differ from then.

        Args:
            state: Return value of `state_dict`.
            data: ``"exact"`` continues with exactly the samples that were left, and refuses a state of other shards,
                domains, exhaustion rules or another shuffle. ``"changed"`` allows all of these to differ: rows
                of unchanged shards that the present pass has drawn are not drawn again, new and changed shards join,
                and new domains have weight 0 until the next decision. Where nothing differs, it is the same as
                ``"exact"``. None: the sampler's `data`.

        Raises:
            StateError: The state has another schema or seed, belongs to other data (``"exact"``), or is damaged. The
                sampler stays unchanged.
            RankError: Another rank could not load its state, has a different state, or does not answer.
        """
        self._deciding().load_state_dict(state, self._data if data is None else validated_data(data))

    @property
    def policy(self) -> Policy | None:
        """The policy that decides; None: mixes change by hand only.

        Raises:
            StateError: This is a copy made for a data worker or by pickle.
        """
        return self._deciding().decider.policy

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """Feedback of all reweighting steps so far."""
        return tuple(self._deciding().decider.measurements)

    @property
    def bad_rows(self) -> dict[str, int]:
        """Domain -> samples handed out whose row was bad and was replaced (`on_bad_row`); those of other ranks are
        included up to the last decision. Domains without bad rows are left out."""
        return self._feed.bad_rows.counts(self._feed.cursor.frontier)

    @property
    def start_state(self) -> dict[str, float]:
        """Domain -> weight of the base model's own training data, as the policy sees it."""
        return self.space.as_dict(self._deciding().decider.start_state)

    @property
    def samples_per_reweight(self) -> int | None:
        """Samples, over all ranks, between two decisions; None: not derived from the length of the run yet."""
        return self._deciding().cadence.interval

    def planned_decisions(self, samples: int) -> int:
        """Most decisions in a run of some samples over all ranks; known before the interval between them is."""
        return self._deciding().cadence.planned(samples)

    def begin_decisions(self) -> None:
        """Logs how many decisions the run will have, and derives the interval between them if it is not known yet.

        Integrations call it after the first decision, when they have reported the loader and the limit of the trainer
        (`bind`). In a loop of your own, `reweight_due` does.
        """
        self._deciding().begin_decisions()

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
        """State for a spawned data worker: the feed, without the deciding half."""
        return {**super().__getstate__(), "_run": None}


def _config(name: str, config: Any, kind: type[Any]) -> Any:
    """A config object, or the default.

    Raises:
        ConfigurationError: It is an object of another type.
    """
    if config is None:
        return kind()
    if not isinstance(config, kind):
        raise ConfigurationError(f"{name} is {shown(config)}; it must be a {kind.__name__}")
    return config
