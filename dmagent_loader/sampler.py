"""`AgentWeightedSampler`: shards per domain in, samples in a mix that a policy decides while training goes on.

It composes shards, ledger, plan and policy. The order of samples is a pure function of the seed and the ledger, so that
global batches do not depend on ranks or workers, and a run resumes exactly from a small JSON state.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from dmagent_loader import _distributed as distributed
from dmagent_loader._loading.cursor import LoaderSettings, Progress
from dmagent_loader._loading.lazy import Sample
from dmagent_loader._loading.mailbox import Mailbox
from dmagent_loader._loading.open_shards import open_on_all_ranks
from dmagent_loader._loading.stream import ReadaheadConfig, SampleStream, check_not_delivered
from dmagent_loader._run import rank_check as agreement
from dmagent_loader._run.decisions import Answer, Decision, DecisionMaker, HistoryMix
from dmagent_loader._run.state import read_state, write_state
from dmagent_loader._validation import shown, whole_number
from dmagent_loader.agent import MixingAgent
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.mixture.domains import SOURCE, DomainSpace
from dmagent_loader.mixture.history import Standardization
from dmagent_loader.mixture.ledger import INITIAL, MANUAL, Ledger, LedgerEntry
from dmagent_loader.mixture.plan import Plan
from dmagent_loader.mixture.row_order import DEFAULT_WINDOW
from dmagent_loader.mixture.sharding import StreamLayout
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.policies import AgentPolicy, Guard, GuardConfig, Policy
from dmagent_loader.shards import load_manifest, make_decoder

logger = logging.getLogger(__name__)

_BUILDING = "building the sampler"


class AgentWeightedSampler(IterableDataset[Sample]):
    """Samples from WebDataset shards of several domains, in a mix that an agent (or any policy, or you) decides.

    Iterating goes on where the last iterator over it stopped. With torch workers only the training loop knows how far
    it came: a new pass begins after what was last reported as consumed (`reweight_due`, `reweight`, `seek`).

    Args:
        shards: Domain name -> URL, brace pattern or list of these; or the path of a ``manifest.json`` that
            ``dmagent shard`` wrote. A domain's name begins with its field: ``source/...`` is to be kept, ``target/...``
            is to be learnt.
        agent: Name, path or Hub id of an agent checkpoint, or a loaded `MixingAgent`.
        policy: Any other policy in place of the agent.
        samples_per_reweight: Samples, over all ranks, between two decisions (64,000 in the paper).
        seed: Of the order of samples.
        initial_mix: Domain -> weight until the first decision, or field -> weight, split by rows; None: the domains'
            shares of rows.
        start_state: Mix of the base model's own training data (paper, 3.1), the first thing that the policy sees; None:
            the source domains' shares of rows.
        exhausted: What happens when a domain has given all its rows: see `mixture.plan.exhaustion_rules`.
        rank: Of this data-parallel process; None: from `torch.distributed`.
        world_size: Number of data-parallel processes; None: from `torch.distributed`.
        decode: ``"default"`` (allow-listed decoders), ``"lazy"`` (the same, but a row of a local shard is read when a
            value of it is asked for, and a batch at once by `dmagent_loader.transforms.collate_packed`), ``None`` (raw
            bytes), extension -> decoder, or a function of a row.
        transform: Function from sample to sample, for example tokenisation. Tags that it drops are put back.
        fields: Field of each domain whose name does not begin with it.
        compositions: P(topic | domain) over the 26 canonical topics, by domain.
        roles: Field of the environment for each role of the agent, for example ``{"keep": "general", "acquire":
            "code"}``; None: the environment's fields are in the order keep, acquire.
        standardization: How feedback is standardised for the agent: ``"frozen"``, ``"running"`` or
            ``"anchored"``; None: as the checkpoint says.
        guard: Limits on what a policy may do.
        shadow: Log what the policy would do, and keep the mix.
        history_mix: Show the policy the mixes that were ``"achieved"``, or those that were ``"requested"``.
        batch_size: The loader's batch size for each rank; needed with several torch workers only if it cannot be found.
        prefetch_factor: The loader's; it bounds how late a new mix takes effect with torch workers.
        shuffle_window: Rows per shuffle window.
        readahead: Reading in the background.
        on_damage: ``"raise"`` or ``"skip"`` damaged shards.
        cache_dir: Where shard indexes are kept.
        progress: Show a progress bar while shards are indexed.

    Raises:
        ConfigurationError: Settings that cannot work; `DomainError` and `MixError` are kinds of it.
        ShardError: Shards that are missing, empty or damaged.
        CheckpointError: An agent that cannot be loaded.
        RankError: Another rank failed, or has other shards or settings.

    Example:
        >>> import tempfile
        >>> from dmagent_loader.testing import write_toy_shards
        >>> shards = write_toy_shards(tempfile.mkdtemp(), {"source/web": 30, "target/math": 20})
        >>> sampler = AgentWeightedSampler(shards, samples_per_reweight=10, progress=False)
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
        roles: Mapping[str, str] | None = None,
        standardization: Standardization | None = None,
        guard: GuardConfig | None = None,
        shadow: bool = False,
        history_mix: HistoryMix = "achieved",
        batch_size: int | None = None,
        prefetch_factor: int = LoaderSettings.prefetch_factor,
        shuffle_window: int = DEFAULT_WINDOW,
        readahead: ReadaheadConfig | None = None,
        on_damage: Literal["raise", "skip"] = "raise",
        cache_dir: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        with distributed.together(_BUILDING):
            samples_per_reweight = whole_number("samples_per_reweight", samples_per_reweight, least=1)
            prefetch_factor = whole_number("prefetch_factor", prefetch_factor, least=1)
            shuffle_window = whole_number("shuffle_window", shuffle_window, least=1)
            if batch_size is not None:
                batch_size = whole_number("batch_size", batch_size, least=1)
            if rank is not None:
                rank = whole_number("rank", rank, least=0)
            if world_size is not None:
                world_size = whole_number("world_size", world_size, least=1)
                if world_size > 1 and rank is None and not distributed.is_active():
                    raise ConfigurationError(
                        f"world_size={world_size} without rank, and no process group to ask: every process would take "
                        "itself for rank 0 and read the same samples; pass rank= too, or call init_process_group first"
                    )
            if not isinstance(shards, (Mapping, str, os.PathLike)):
                raise ConfigurationError(
                    f"shards is {shown(shards)}; it must map domain names to shards, or be the path of a manifest.json"
                )
            _check_settings(
                agent=agent,
                policy=policy,
                shadow=shadow,
                history_mix=history_mix,
                transform=transform,
                guard=guard,
            )
            found = shards if isinstance(shards, Mapping) else load_manifest(shards)
            self.space = DomainSpace.from_names(found, fields=fields, compositions=compositions)
        self.collection = open_on_all_ranks(
            found, on_damage=on_damage, cache_dir=cache_dir, progress=progress and distributed.get_rank() == 0
        )
        with distributed.together(_BUILDING) as facts:
            self.samples_per_reweight, self.shadow = samples_per_reweight, shadow
            self.lazy = isinstance(decode, str) and decode == "lazy"
            self.decoder, self.transform = make_decoder("default" if self.lazy else decode), transform
            self.readahead = readahead or ReadaheadConfig()
            self._rank, self._world_size = rank, world_size
            self.loader = LoaderSettings(
                batch_size=batch_size or 1, worker_block=batch_size, prefetch_factor=prefetch_factor
            )

            rows = [self.collection.shard_rows(d) for d in range(len(self.space))]
            self._plan_settings: dict[str, Any] = {
                "seed": whole_number("seed", seed),
                "exhausted": exhausted,
                "window": shuffle_window,
            }
            self.plan = Plan(self.space, rows, **self._plan_settings)
            self._check_world_size()
            natural = self.plan.num_rows / self.plan.num_rows.sum()
            first = natural if initial_mix is None else self.space.mix(initial_mix, shares=natural)
            self.plan.append(LedgerEntry(start=0, mix=tuple(first.tolist()), decided_by=INITIAL, decided_at=0))

            if agent is not None:
                loaded = agent if isinstance(agent, MixingAgent) else MixingAgent.from_pretrained(agent)
                policy = AgentPolicy(loaded, self.space, natural, roles=roles, standardization=standardization)
            elif roles is not None or standardization is not None:
                logger.warning("roles and standardization are for the agent; without agent= they have no effect")
            self._decisions = DecisionMaker(
                policy=policy,
                guard=Guard(guard or GuardConfig(), self.space.names),
                plan=self.plan,
                start_state=self._start_state(natural, start_state),
                history_mix=history_mix,
            )
            self.version = 0
            self.mailbox = Mailbox(len(self.space))
            self.progress = Progress(self.mailbox)
            self.received = 0
            """Published mixes that this copy has taken over."""
            self._length: int | None = None
            self._is_warned = self._is_undercount_told = False
            self.before_iteration: Callable[[], None] | None = None
            """Called when a loader announces a pass over the data, before it makes its iterator; for integrations."""
            if distributed.is_active():
                facts |= {"initial_mix": agreement.digest(first.tolist()), **agreement.settings(self)}
        agreement.check_ranks(self, _BUILDING)

    # The stream

    def __iter__(self) -> Iterator[Any]:
        """Goes on after the last sample that was given (with torch workers: after those reported as consumed)."""
        self._warn_if_nobody_decides()
        if get_worker_info() is None:
            self._warn_about_the_pass()
        stream = SampleStream(self, self.progress.begin_pass(get_worker_info()))
        self.progress.stream = stream
        return stream

    def __bool__(self) -> bool:
        """True: a sampler without an end has no length to be judged by."""
        return True

    def seek(self, consumed: int) -> None:
        """Lets the next pass begin after so many consumed samples, whatever was handed out; for trainers that look
        ahead.

        Args:
            consumed: Samples consumed over all ranks since the run began.

        Raises:
            ConfigurationError: It is no whole number of 0 or more.
        """
        self.progress.seek(whole_number("consumed", consumed, least=0))

    def __len__(self) -> int:
        """Samples that one iterator over the whole run gives, if data run out under the present ledger.

        Raises:
            TypeError: The run has no end, because every domain with weight repeats.
        """
        if self._length is not None:
            return self._length
        end = self.plan.end
        if end is None:
            raise TypeError("this sampler has no length: the domains repeat without end; bound the run by its steps")
        return self.layout(base=0).num_samples(end)

    def keep_length(self) -> None:
        """From now on `len` is what it is now, whatever mixes come; for trainers that end an epoch by it.

        The epochs of a resumed run then end where they would have ended.
        """
        if self.plan.end is not None:
            self._length = len(self)

    def set_epoch(self, epoch: int) -> None:
        """What loaders of accelerate call before each pass. The order does not depend on it.

        Raises:
            ConfigurationError: accelerate is about to split among several processes what each of them has its share of.
        """
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("accelerate.") and not self.loader.declared:
            if self.world_size > 1:
                raise ConfigurationError(
                    f"accelerate splits an iterable dataset among its {self.world_size} processes by itself, so that "
                    "this sampler must not: add DataMixingCallback(sampler) to the Trainer's callbacks, or give each "
                    "process a DataLoader that was not prepared by accelerate"
                )
            if self.progress.stream is not None:
                logger.warning(
                    "accelerate fetches a batch more than it gives: a new pass leaves it out, unless "
                    "sampler.seek(consumed) is called before"
                )
        if self.before_iteration is not None:
            self.before_iteration()

    def layout(self, *, base: int, worker: int = 0, num_workers: int = 1, worker_block: int = 1) -> StreamLayout:
        """The positions of an iterator that begins at a global index."""
        return StreamLayout(
            base=base,
            rank=self.rank,
            world_size=self.world_size,
            kind=self.loader.kind,
            batch_size=self.loader.batch_size,
            worker=worker,
            num_workers=num_workers,
            worker_block=worker_block,
            granule=self.loader.granule,
        )

    def set_loader(self, loader: LoaderSettings) -> None:
        """Tells the sampler which loader reads it; for integrations, before the first sample."""
        self.loader = replace(loader, declared=True)

    def set_ranks(self, rank: int, world_size: int) -> None:
        """Tells the sampler its place among the data-parallel processes; for integrations, before the first sample.

        For trainers that make their process groups only after the sampler was built.

        Args:
            rank: Of this data-parallel process.
            world_size: Number of data-parallel processes.

        Raises:
            ConfigurationError: More processes than rows.
        """
        self._rank, self._world_size = rank, world_size
        self._check_world_size()

    @property
    def rank(self) -> int:
        """Of this data-parallel process."""
        return distributed.get_rank() if self._rank is None else self._rank

    @property
    def world_size(self) -> int:
        """Number of data-parallel processes."""
        return distributed.get_world_size() if self._world_size is None else self._world_size

    @property
    def end(self) -> int | None:
        """Global index at which the run ends for lack of data, cut to whole batches on all ranks; None: never."""
        return None if self.plan.end is None else self.layout(base=self.progress.position).delivered_end(self.plan.end)

    def finished(self, consumed: int) -> bool:
        """Whether the run has ended, for lack of data, after so many consumed samples."""
        layout = self.layout(base=self.progress.position)
        end = self.plan.ends_by(consumed + layout.unit)
        return end is not None and consumed >= layout.delivered_end(end)

    # The mix

    @property
    def ledger(self) -> Ledger:
        """The record of all mixes so far."""
        return self.plan.ledger

    @property
    def mix(self) -> dict[str, float]:
        """Domain -> weight in force for the next sample to be fetched; a used-up domain has none."""
        index = self.progress.frontier
        mix = self.plan.mix_at(index) if self.plan.used_up_at(index) else self.ledger.in_force(index).weights()
        return self.space.as_dict(mix)

    def achieved(self, start: int = 0, stop: int | None = None) -> dict[str, int]:
        """Domain -> samples among the global indices from `start` up to `stop` (None: all handed out).

        Raises:
            ConfigurationError: They are no whole numbers of 0 or more, or `stop` is before `start`.
        """
        start = whole_number("start", start, least=0)
        stop = whole_number("stop", self.progress.frontier if stop is None else stop, least=start)
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
        step = "changing the mix by hand"
        with agreement.together(self, step) as facts:
            facts["the mixes so far"] = self.ledger.summary()
            mix = self.space.mix(weights, renormalize=renormalize, shares=self.plan.num_rows.astype(np.float64))
        mix, decided_at = distributed.broadcast_object((mix, self.progress.handed_out), step)
        return self._append(mix, decided_by=MANUAL, decided_at=decided_at)

    def reweight_due(self, consumed: int) -> bool:
        """Whether a decision is due after so many samples consumed by all ranks; the first is due before any.

        Raises:
            ConfigurationError: `consumed` is no whole number of 0 or more.
        """
        self.progress.consume(whole_number("consumed", consumed, least=0))
        done = self.decisions.measurements
        interval = self.samples_per_reweight
        return consumed >= (done[-1].consumed // interval + 1) * interval if done else True

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
        step = "deciding on the next mix"
        answer: Answer | None = None
        with agreement.together(self, step) as facts:
            consumed = self._check_consumed(consumed)
            facts |= {"consumed": consumed, "the mixes so far": self.ledger.summary()}
            if distributed.get_rank() == 0:
                answer = self._decisions.decide(feedback, consumed, self.ledger.last.weights())
        answer = distributed.broadcast_object(answer, step)
        assert answer is not None
        self.progress.consume(consumed)
        mix, accepted, notes = np.array(answer.mix), answer.accepted, answer.notes
        if not self.shadow:
            entry = self._append(
                mix,
                decided_by=answer.policy,
                decided_at=consumed,
                feedback=answer.measurement.feedback,
                accepted=accepted,
                note="; ".join(notes),
            )
        else:
            entry = self.ledger.last
        # Only now: where no new mix can hold, the decision is still due.
        self._decisions.accept(answer)
        decision = Decision(
            proposed=self.space.as_dict(mix),
            in_force=accepted and not self.shadow,
            entry=entry,
            staleness=entry.start - consumed if not self.shadow else 0,
            seconds=answer.seconds,
            notes=notes,
            failures=self._decisions.failures,
        )
        logger.info(
            "mix after %d samples%s: %s", consumed, " (shadow)" if self.shadow else "", self.space.field_mass(mix)
        )
        return decision

    def _check_consumed(self, consumed: int) -> int:
        if self.decisions.policy is None:
            raise ConfigurationError(
                "reweight() needs a policy, but this sampler has none: pass agent= or policy=, or change the mix by "
                "set_mix()"
            )
        consumed = whole_number("consumed", consumed, least=0)
        self._check_handed_out(consumed)
        return consumed

    def _check_handed_out(self, consumed: int) -> None:
        given = self.progress.given
        if self.mailbox.num_workers:
            given = max(given, self.mailbox.frontier())
        if not self.loader.declared and consumed > given:
            raise ConfigurationError(
                f"consumed is {consumed}, but only {given} samples were handed out: count the samples of all ranks "
                "since the run began, once"
            )
        if self.loader.declared or self.mailbox.num_workers or self._is_undercount_told:
            return  # workers hand out far more than was trained on
        done, reported = given - self.progress.position, consumed - self.progress.position
        if reported > 0 and 3 * reported <= done:
            self._is_undercount_told = True
            logger.warning(
                "consumed is %d, but %d samples were handed out: a run that is resumed from there sees most of them "
                "again; count the samples of all ranks (batch size x world size for each batch), not the batches",
                consumed,
                given,
            )

    # State

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """The run's state as JSON values.

        Args:
            consumed: Samples that training has consumed over all ranks; None: all that this iterator has handed out.

        Raises:
            ConfigurationError: `consumed` cannot be: more than this sampler, which is read, has handed out.
            StateError: `consumed` is None although torch workers read, so that only the trainer knows it; or a data
                worker is asked, as torchdata's StatefulDataLoader does.
        """
        _refuse_in_worker()
        if consumed is None:
            if self.mailbox.num_workers:
                raise StateError(
                    "torch workers read ahead of training, so that only the trainer knows what was consumed: pass "
                    "consumed=, the number of samples trained on by all ranks"
                )
            consumed = self.progress.handed_out
        else:
            consumed = whole_number("consumed", consumed, least=0)
            if self.progress.stream is not None or self.mailbox.num_workers:
                self._check_handed_out(consumed)
        return write_state(self, consumed)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after the samples that a saved state says were consumed; ranks and workers may be others than then.

        Raises:
            StateError: The state is of another schema, seed or shard set, or damaged. Nothing is changed then.
            RankError: Another rank could not load its state, has another one, or does not answer.
        """
        _refuse_in_worker()
        with agreement.together(self, "loading a state") as facts:
            restored = read_state(self, state, self._plan_settings)
            facts |= agreement.contents(restored)
        self.plan = restored.plan
        self.progress.restore(restored.consumed)
        self._decisions.restore(restored.plan, restored.start_state, restored.measurements, restored.policy_failures)
        self.version += 1

    @property
    def decisions(self) -> DecisionMaker:
        """Feedback so far, and who decides on it.

        Raises:
            ConfigurationError: This is a copy, made for a data worker.
        """
        if self._decisions is None:
            raise ConfigurationError("this copy of a sampler was made for a data worker: only the original decides")
        return self._decisions

    @cached_property
    def fingerprint(self) -> str:
        """Of the domains and the contents of their shards."""
        return self.collection.fingerprint

    @property
    def start_state(self) -> dict[str, float]:
        """Domain -> weight of the base model's own training data, as the policy sees it."""
        return self.space.as_dict(self._decisions.start_state)

    # Inside

    def receive(self, frontier: int) -> None:
        """In a torch worker: takes over what the main process has published since the last sample."""
        while self.received < self.mailbox.published:
            entry = self.mailbox.read(self.received).as_entry()
            check_not_delivered(entry.start, frontier)
            self.plan.append(entry)
            self.received += 1
            self.version += 1

    def _append(
        self,
        mix: FloatArray,
        *,
        decided_by: str,
        decided_at: int,
        feedback: Mapping[str, float] | None = None,
        accepted: bool = True,
        note: str = "",
    ) -> LedgerEntry:
        entry = LedgerEntry(
            start=self.progress.first_free(self.loader, self.world_size, self.ledger.last.start),
            mix=tuple(mix.tolist()),
            decided_by=decided_by,
            decided_at=decided_at,
            feedback=feedback,
            accepted=accepted,
            note=note,
        )
        self.plan.append(entry)
        self.mailbox.publish(entry)
        self.received = self.mailbox.published
        self.version += 1
        return entry

    def _warn_about_the_pass(self) -> None:
        """What would give each rank the same samples, or nobody any."""
        processes = os.environ.get("WORLD_SIZE", "")
        if self._rank is None and not distributed.is_active() and processes.isdigit() and int(processes) > 1:
            logger.warning(
                "WORLD_SIZE is %s, but there is no process group to ask for this process's rank, so that each process "
                "reads the same samples: call init_process_group first, or pass rank= and world_size=",
                processes,
            )
        begin = self.progress.handed_out
        if begin and self.finished(begin):
            logger.warning(
                "data are used up after %d samples, so that a new pass has none: a run is one pass, however often the "
                "source field repeats; begin another run with a new sampler, or let the target field repeat "
                "(exhausted='repeat')",
                begin,
            )

    def _warn_if_nobody_decides(self) -> None:
        """A forgotten callback or call would train on the initial mix to the end, in silence."""
        decisions, worker = self._decisions, get_worker_info()
        if decisions is None or decisions.policy is None or decisions.measurements or self.loader.declared:
            return
        if self._is_warned or (worker is not None and worker.id > 0):
            return
        self._is_warned = True
        logger.warning(
            "the sampler has policy %r, but samples are drawn before it was asked once: without "
            "DataMixingCallback(sampler, environment) in the trainer's callbacks, or sampler.reweight(...) in your "
            "loop (the first time before the data are read), the initial mix holds to the end",
            decisions.policy_name,
        )

    def _start_state(self, natural: FloatArray, given: Mapping[str, float] | None) -> FloatArray:
        if given is not None:
            return self.space.mix(given, shares=natural)
        source = np.array([d.field == SOURCE for d in self.space.domains])
        kept = np.where(source, natural, 0.0)
        return kept / kept.sum() if kept.sum() > 0 else natural

    def _check_world_size(self) -> None:
        total = int(self.plan.num_rows.sum())
        if not 0 <= self.rank < self.world_size:
            raise ConfigurationError(f"rank {self.rank} does not lie in a world of {self.world_size} processes")
        if self.world_size > total:
            raise ConfigurationError(
                f"world size {self.world_size} is larger than the {total} rows of all {len(self.space)} domains "
                "together: some ranks would have nothing to train on; use fewer ranks or more data"
            )

    def __getstate__(self) -> dict[str, Any]:
        """What a spawned data worker needs: all but the policy and a running iterator."""
        state = self.__dict__.copy()
        state["progress"] = copy.copy(self.progress)
        state["progress"].position, state["progress"].stream = self.progress.handed_out, None
        state["_decisions"] = None
        state["before_iteration"] = None
        if distributed.is_active():
            # A spawned data worker has no process group to ask.
            state["_rank"], state["_world_size"] = self.rank, self.world_size
        return state


def _refuse_in_worker() -> None:
    """torchdata's StatefulDataLoader saves and restores a dataset inside its workers, whose copies decide nothing.

    Raises:
        StateError: This is a data worker.
    """
    if get_worker_info() is not None:
        raise StateError(
            "StatefulDataLoader keeps the state of its data workers, but the feedback and the mixes of a run are in "
            "the main process, which it would not restore: use num_workers=0, or torch.utils.data.DataLoader and save "
            "sampler.state_dict(consumed=...) yourself"
        )


def _check_settings(
    *,
    agent: object,
    policy: object,
    shadow: object,
    history_mix: object,
    transform: object,
    guard: object,
) -> None:
    """Settings whose mistakes would show only at the first decision or sample, or never.

    Raises:
        ConfigurationError: One of them is not what it should be.
    """
    if agent is not None and policy is not None:
        raise ConfigurationError("both agent and policy were given, but only one can decide: leave one out")
    if agent is not None and not isinstance(agent, (str, os.PathLike, MixingAgent)):
        raise ConfigurationError(f"agent is {shown(agent)}; it must be a name, a path, a Hub id or a MixingAgent")
    if policy is not None and (isinstance(policy, type) or not callable(getattr(policy, "propose", None))):
        raise ConfigurationError(f"policy is {shown(policy)}; it must be an object with a method propose(history)")
    if not isinstance(shadow, bool):
        raise ConfigurationError(f"shadow is {shown(shadow)}; it must be True or False")
    if history_mix not in get_args(HistoryMix):
        raise ConfigurationError(f"history_mix is {shown(history_mix)}; choose one of {list(get_args(HistoryMix))}")
    if transform is not None and not callable(transform):
        raise ConfigurationError(f"transform is {shown(transform)}; it must be a function of a sample")
    if guard is not None and not isinstance(guard, GuardConfig):
        raise ConfigurationError(f"guard is {shown(guard)}; it must be a policies.GuardConfig")
