"""A run in the main process: decisions change the plan of the feed, and the state saves both."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np

from dmagent_loader import _distributed as distributed
from dmagent_loader._loading.feed import Feed
from dmagent_loader._run import rank_check
from dmagent_loader._run.cadence import Cadence
from dmagent_loader._run.decisions import Decider, Decision
from dmagent_loader._run.segments import RunData, SegmentWriter
from dmagent_loader._run.settings import RunSettings
from dmagent_loader._run.state import Data, read_state, write_state
from dmagent_loader._validation import whole_number
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.mixture.ledger import MANUAL, LedgerEntry

logger = logging.getLogger(__name__)

_DECIDING = "deciding on the next mix"
_SETTING_BY_HAND = "changing the mix by hand"
_LOADING = "loading a state"


class Run:
    """The deciding half of a sampler, in the main process of a rank. `AgentWeightedSampler` documents its methods.

    Args:
        feed: The samples.
        decider: The policy, with the feedback so far.
        cadence: Interval between two decisions.
    """

    def __init__(self, feed: Feed, decider: Decider, cadence: Cadence) -> None:
        self.feed, self.decider, self.cadence = feed, decider, cadence
        self._silence_reported = self._begun = False
        plan, collection = feed.plan, feed.collection
        self._present = RunData(
            space=plan.space,
            rules=plan.rules,
            shuffle=plan.shuffle,
            shards=plan.shards,
            names=[collection.shard_names(domain) for domain in range(len(plan.space))],
        )
        self._writer: SegmentWriter | None = None
        self._first_fingerprint = collection.fingerprint

    @property
    def settings(self) -> RunSettings:
        """Everything besides the ledger that determines samples and mixes."""
        decider, feed = self.decider, self.feed
        return RunSettings(
            seed=feed.plan.seed,
            domains=feed.plan.space.names,
            domain_fields=tuple(domain.field for domain in feed.plan.space.domains),
            exhausted=feed.plan.rules,
            shuffle_window=feed.plan.shuffle.window,
            shuffle_shards=feed.plan.shuffle.shards,
            packing=feed.collection.packing,
            fingerprint=feed.collection.fingerprint,
            samples_per_reweight=self.cadence.interval,
            policy=decider.policy_name,
            guard=decider.guard.config,
            shadow=decider.shadow,
            history_mix=decider.history_mix,
            on_bad_row=feed.bad_rows.on_bad_row,
            start_state=rank_check.digest(decider.start_state.tolist()),
            own_shards=feed.own_shards,
            world_size=feed.world_size,
            loader=feed.loader,
        )

    def _together(self, step: str) -> AbstractContextManager[dict[str, Any]]:
        return rank_check.together(step, lambda: self.settings, self.feed.rank)

    def set_mix(self, weights: Mapping[str, float], *, renormalize: bool) -> LedgerEntry:
        """Changes the mix by hand."""
        plan = self.feed.plan
        with self._together(_SETTING_BY_HAND) as facts:
            facts["the mixes so far"] = plan.ledger.summary()
            mix = plan.space.mix(weights, renormalize=renormalize, shares=plan.num_rows.astype(np.float64))
        mix, decided_at = distributed.broadcast_object((mix, self.feed.handed_out), _SETTING_BY_HAND)
        return self.feed.append(mix, decided_by=MANUAL, decided_at=decided_at)

    def reweight_due(self, consumed: int) -> bool:
        """Whether a decision is due."""
        self.feed.cursor.consume(whole_number("consumed", consumed, least=0))
        done = self.decider.measurements
        if not done:
            return True
        # A trainer's limit may be known only after the first decision, so its integration says when to begin.
        if self.cadence.interval is None or not (self._begun or self.feed.loader.by_trainer):
            self.begin_decisions()
        return self.cadence.due(done[-1].consumed, consumed)

    def begin_decisions(self) -> None:
        """Fixes the interval between decisions under the present mix, and logs how many the run will have."""
        self._begun = True
        if len(self.decider.measurements) == 1:
            # After an out-of-memory error, a trainer begins again with smaller steps, and so with fewer samples.
            self.cadence.forget()
        self.cadence.begin(self.feed.total_samples, self.feed.decision_step or self.feed.global_batch)

    def reweight(self, feedback: Mapping[str, float], consumed: int) -> Decision:
        """Queries the policy for the next mix."""
        decision: Decision | None = None
        with self._together(_DECIDING) as facts:
            if self.decider.policy is None:
                raise ConfigurationError(
                    "reweight() needs a policy, but this sampler has none: pass agent= or policy=, or change the mix "
                    "with set_mix()"
                )
            consumed = whole_number("consumed", consumed, least=0)
            self.feed.check_consumed(consumed)
            facts |= {"consumed": consumed, "the mixes so far": self.feed.plan.ledger.summary()}
            if distributed.get_rank() == 0:
                decision = self.decider.decide(feedback, consumed)
        decision = distributed.broadcast_object(decision, _DECIDING)
        assert decision is not None
        self.feed.bad_rows.share(consumed, lambda found: distributed.all_gather_object(found, _DECIDING))
        self.feed.cursor.consume(consumed)
        entry = self.feed.plan.ledger.last
        if not decision.shadow:
            entry = self.feed.append(
                decision.outcome.mix,
                decided_by=decision.policy,
                decided_at=consumed,
                feedback=decision.measurement.feedback,
                accepted=decision.outcome.accepted,
                note="; ".join(decision.notes),
            )
        # Only now: if the ledger entry fails, no feedback is recorded and the decision is still due.
        decision = self.decider.accept(decision, entry)
        logger.info(
            "mix after %d samples%s: %s",
            consumed,
            " (shadow)" if decision.shadow else "",
            ", ".join(
                f"{field} {mass:.1%}" for field, mass in self.feed.plan.space.field_mass(decision.outcome.mix).items()
            ),
        )
        return decision

    def state_dict(self, consumed: int | None) -> dict[str, Any]:
        """The state as JSON values."""
        cursor, workers = self.feed.cursor, self.feed.mailbox.num_workers
        if consumed is None:
            if workers:
                raise StateError(
                    "torch workers read ahead of training, so only the training loop knows how many samples were "
                    "consumed: pass consumed=, the number of samples trained on by all ranks"
                )
            consumed = self.feed.handed_out
        else:
            consumed = whole_number("consumed", consumed, least=0)
            if cursor.stream is not None or workers:
                self.feed.check_consumed(consumed)
        if self._writer is None or self._writer.plan is not self.feed.plan:
            self._writer = SegmentWriter(self.feed.plan, self._present.names)
        segments = {**self._writer.to_json(), "first_fingerprint": self._first_fingerprint}
        bad_rows = self.feed.bad_rows.to_json(consumed)
        return write_state(self.settings, self.decider, consumed, segments, bad_rows)

    def load_state_dict(self, state: Mapping[str, Any], data: Data = "exact") -> None:
        """Continues a saved run."""
        with self._together(_LOADING) as facts:
            reading = self.feed.reading
            settings = replace(
                self.settings,
                samples_per_reweight=None if self.cadence.is_derived else self.cadence.interval,
                shuffle_window=reading.shuffle_window,
                shuffle_shards=reading.shuffle_shards,
            )
            restored = read_state(state, settings, self.decider, self._present, data)
            facts |= {"data": data, **restored.to_compare()}
        self._first_fingerprint = restored.first_fingerprint
        self.feed.restore(restored.plan, restored.consumed, restored.bad_rows)
        self.cadence.restore(restored.samples_per_reweight)
        self._begun = False
        self.decider.restore(
            restored.plan,
            restored.start_state,
            restored.measurements,
            restored.policy_failures,
            restored.policy_state,
        )

    def warn_before_first_decision(self) -> None:
        """Warns, once, if samples are drawn before the first decision.

        Without a warning, a run with a forgotten callback or call would train on the initial mix to the end.
        """
        decider = self.decider
        if decider.policy is None or decider.measurements or self.feed.loader.by_trainer or self._silence_reported:
            return
        self._silence_reported = True
        logger.warning(
            "the sampler has policy %r, but samples are drawn before its first decision, so the initial mix may stay "
            "to the end of the run: add DataMixingCallback(sampler, environment) to the trainer's callbacks, or call "
            "sampler.reweight(...) in your loop (the first time before you read any data)",
            decider.policy_name,
        )
