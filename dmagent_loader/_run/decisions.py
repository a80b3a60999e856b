"""Decisions: feedback -> history -> policy -> guard -> the next mix, the same on all ranks.

Rank 0 decides, and the others receive its decision. The history is derived from the plan (the samples trained on) and
the recorded feedback, so it survives a restart unchanged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from dmagent_loader._validation import is_count, is_finite_number, shown
from dmagent_loader.errors import ConfigurationError, FeedbackError, StateError
from dmagent_loader.mixture.history import History, Standardization, validate_feedback
from dmagent_loader.mixture.ledger import LedgerEntry
from dmagent_loader.mixture.plan import Plan
from dmagent_loader.mixture.simplex import FloatArray, IntArray
from dmagent_loader.policies import (
    FieldPolicy,
    Guard,
    GuardConfig,
    InformedPolicy,
    Outcome,
    Policy,
    name_of,
    propose_guarded,
)

logger = logging.getLogger(__name__)

HistoryMix = Literal["achieved", "requested"]


@dataclass(frozen=True, kw_only=True)
class DecisionConfig:
    """Settings of decisions.

    Args:
        roles: Field of the environment for each role of the agent, for example ``{"keep": "general", "acquire":
            "code"}``; None: the environment's fields are in the order keep, acquire. Only with an agent.
        standardization: Standardisation of feedback for the agent: ``"frozen"``, ``"running"`` or ``"anchored"``; None:
            the mode in its checkpoint. Only with an agent.
        balance: Weight of the field to acquire in the objective, between 0 and 1; None: 0.5. Only with
            ``agent="dmagent-plus"``, see `PlusPolicy`.
        floor: Largest loss of the field to keep against the base model, in nats, instead of a balance; None: no floor.
            Only with ``agent="dmagent-plus"``.
        guard: Limits on proposals.
        shadow: Whether to log proposals only, and keep the mix.
        history_mix: Mixes that the policy sees: those ``"achieved"``, or those ``"requested"`` (parity with the paper,
            where both are the same up to sampling noise).

    Raises:
        ConfigurationError: A value is invalid.
    """

    roles: Mapping[str, str] | None = None
    standardization: Standardization | None = None
    balance: float | None = None
    floor: float | None = None
    guard: GuardConfig = field(default_factory=GuardConfig)
    shadow: bool = False
    history_mix: HistoryMix = "achieved"

    def __post_init__(self) -> None:
        if not isinstance(self.guard, GuardConfig):
            raise ConfigurationError(f"guard is {shown(self.guard)}; it must be a GuardConfig")
        if self.roles is not None and not isinstance(self.roles, Mapping):
            raise ConfigurationError(
                f"roles is {shown(self.roles)}; it must map each role of the agent to a field of the environment"
            )
        if not isinstance(self.shadow, bool):
            raise ConfigurationError(f"shadow is {shown(self.shadow)}; it must be True or False")
        if self.history_mix not in get_args(HistoryMix):
            raise ConfigurationError(
                f"history_mix is {shown(self.history_mix)}; choose one of {list(get_args(HistoryMix))}"
            )


@dataclass(frozen=True)
class Measurement:
    """Feedback of the environment after a number of consumed samples.

    The order of the fields matters: it determines the roles that an agent sees.
    """

    consumed: int
    feedback: Mapping[str, float]

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields, in the environment's order."""
        return tuple(self.feedback)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One reweighting step: rank 0 makes it, all ranks receive it and complete it with the ledger entry.

    Attributes:
        policy: Name of the policy.
        measurement: Feedback behind the decision.
        domains: (D,) names.
        outcome: Answer of the policy, after the guard.
        shadow: Whether the decision is only logged.
        entry: Newest ledger entry; None until the decision is in the ledger.
        failures: Number of steps so far at which the policy gave no usable mix.
    """

    policy: str
    measurement: Measurement
    domains: tuple[str, ...]
    outcome: Outcome
    shadow: bool = False
    entry: LedgerEntry | None = None
    failures: int = 0

    @property
    def proposed(self) -> dict[str, float]:
        """Domain -> weight, after the guard; the previous mix if the policy failed."""
        return dict(zip(self.domains, self.outcome.mix.tolist(), strict=True))

    @property
    def in_force(self) -> bool:
        """Whether the proposal takes effect: False in shadow mode, or if the policy failed."""
        return self.outcome.accepted and not self.shadow

    @property
    def staleness(self) -> int:
        """Samples trained under the old mix after the decision."""
        return 0 if self.shadow or self.entry is None else self.entry.start - self.measurement.consumed

    @property
    def seconds(self) -> float:
        """Duration of the policy's answer."""
        return self.outcome.seconds

    @property
    def notes(self) -> tuple[str, ...]:
        """Changes made by the guard, or the reason why the last good mix was kept."""
        return self.outcome.notes if self.outcome.error is None else (self.outcome.error,)


@dataclass(kw_only=True)
class Decider:
    """Keeps the feedback of a run and queries the policy.

    Args:
        policy: Policy that proposes mixes; None: mixes change by hand only.
        guard: Limits on proposals.
        plan: Plan of the run, which counts the samples trained on.
        start_state: (D,) mix of the base model's own training data (paper, 3.1).
        shadow: Whether decisions are only logged.
        history_mix: See `DecisionConfig`.
    """

    policy: Policy | None
    guard: Guard
    plan: Plan
    start_state: FloatArray
    shadow: bool = False
    history_mix: HistoryMix = "achieved"
    measurements: list[Measurement] = field(default_factory=list)
    failures: int = 0
    """Number of steps at which the policy gave no usable mix."""
    _counts: list[IntArray] = field(default_factory=list)
    """(U,) samples drawn from each domain of all segments up to each measurement; cached, as the past does not change.
    """

    @classmethod
    def configured(cls, config: DecisionConfig, policy: Policy | None, plan: Plan, start_state: FloatArray) -> Decider:
        """A decider with the settings of a user.

        Raises:
            ConfigurationError: There is a guard or shadow mode, but no policy.
        """
        if policy is None and (config.shadow or config.guard != GuardConfig()):
            raise ConfigurationError(
                "deciding= sets a guard or shadow mode, but there is neither agent nor policy, so it would have no "
                "effect: pass agent= or policy=, or leave deciding= out"
            )
        guard = Guard(config.guard, plan.space.names)
        return cls(
            policy=policy,
            guard=guard,
            plan=plan,
            start_state=start_state,
            shadow=config.shadow,
            history_mix=config.history_mix,
        )

    def restore(
        self,
        plan: Plan,
        start_state: FloatArray,
        measurements: list[Measurement],
        failures: int,
        policy_state: Mapping[str, Any] | None = None,
    ) -> None:
        """Continues from a saved state."""
        self.plan, self.start_state, self.measurements, self.failures = plan, start_state, measurements, failures
        self._counts = []
        if policy_state is not None and isinstance(self.policy, InformedPolicy):
            self.policy.load_state_dict(policy_state)

    @property
    def policy_state(self) -> dict[str, Any] | None:
        """State of an informed policy, as JSON values; None for other policies."""
        return self.policy.state_dict() if isinstance(self.policy, InformedPolicy) else None

    @property
    def policy_name(self) -> str | None:
        """Name of the policy; None: there is no policy."""
        return None if self.policy is None else name_of(self.policy)

    def history(self, newest: Measurement | None = None) -> History:
        """All steps so far: row 0 is the start state with the first feedback.

        Args:
            newest: Feedback that is not in `measurements` yet.
        """
        measurements = self.measurements if newest is None else [*self.measurements, newest]
        fields = measurements[0].fields
        if self.history_mix == "requested":
            ledger = self.plan.ledger
            mixes = [ledger.in_force(max(0, after.consumed - 1)).weights() for after in measurements[1:]]
        else:
            count = self.plan.counts_of_all
            self._counts += [count(m.consumed) for m in self.measurements[len(self._counts) :]]
            counts = self._counts if newest is None else [*self._counts, count(newest.consumed)]
            trained = [after.consumed - before.consumed for before, after in pairwise(measurements)]
            mixes = [self.plan.carried((b - a) / n) for (a, b), n in zip(pairwise(counts), trained, strict=True)]
        feedback = np.array([[float(m.feedback[f]) for f in fields] for m in measurements])
        mixes = [self.start_state, *mixes]
        return History(domains=self.plan.space.names, fields=fields, mixes=np.array(mixes), feedback=feedback)

    def decide(self, feedback: Mapping[str, float], consumed: int) -> Decision:
        """Checks the feedback of one reweighting step and queries the policy, on rank 0 only.

        This changes nothing; `accept` records the step, on all ranks.

        Args:
            feedback: Field -> number.
            consumed: Samples that training has consumed.

        Raises:
            FeedbackError: The feedback is not finite, is empty, or has other fields than before.
            ConfigurationError: No sample was trained on since the last step, or the policy cannot use these fields.
        """
        assert self.policy is not None
        measurement = self._measurement(feedback, consumed)
        if isinstance(self.policy, FieldPolicy):
            self.policy.check_fields(measurement.fields)
        previous = self.plan.ledger.last.weights()
        return Decision(
            policy=name_of(self.policy),
            measurement=measurement,
            domains=self.plan.space.names,
            outcome=propose_guarded(self.policy, self.history(measurement), previous, self.guard),
            shadow=self.shadow,
        )

    def accept(self, decision: Decision, entry: LedgerEntry) -> Decision:
        """Records the step, on all ranks and whatever the outcome.

        Args:
            decision: Decision of rank 0.
            entry: Newest ledger entry.

        Returns:
            The decision with the ledger entry and the number of failures so far.
        """
        self.measurements.append(decision.measurement)
        self.failures += not decision.outcome.accepted
        return replace(decision, entry=entry, failures=self.failures)

    def _measurement(self, feedback: Mapping[str, float], consumed: int) -> Measurement:
        if not isinstance(feedback, Mapping):
            raise FeedbackError(f"the feedback is {shown(feedback)}; it must map each field to a number")
        if not feedback:
            raise FeedbackError("the feedback is empty: the environment needs at least one field")
        fields = self.measurements[0].fields if self.measurements else tuple(feedback)
        values = validate_feedback(feedback, fields)
        if not self.measurements and (values > 0).any():
            logger.warning(
                "the feedback is %s, but mean log-probabilities are never above 0, and higher is better: if these are "
                "losses, the policy would read them the wrong way round (pass -loss)",
                dict(feedback),
            )
        if self.measurements and consumed <= self.measurements[-1].consumed:
            raise ConfigurationError(
                f"feedback after {consumed} consumed samples follows feedback after "
                f"{self.measurements[-1].consumed}: train between two reweighting steps, and pass the number of "
                "samples consumed by all ranks since the start"
            )
        return Measurement(consumed, dict(zip(fields, (float(v) for v in values), strict=True)))

    @property
    def fields(self) -> tuple[str, ...]:
        """The environment's fields, in its order; empty before the first feedback."""
        return self.measurements[0].fields if self.measurements else ()

    def to_json(self) -> list[dict[str, Any]]:
        """The recorded feedback as JSON values."""
        return [{"consumed": m.consumed, "feedback": dict(m.feedback)} for m in self.measurements]


def measurements_from_json(saved: Any, fields: Any, consumed: int) -> list[Measurement]:
    """Recorded feedback from the JSON values of `Decider.to_json`.

    Args:
        saved: The JSON value.
        fields: Names of the fields in the environment's order. JSON objects need not keep it: the Trainer sorts them.
        consumed: Samples that had been consumed when the state was saved.

    Raises:
        StateError: The value cannot be read, or contradicts the run.
    """
    if not isinstance(fields, list) or not all(isinstance(field, str) for field in fields):
        raise StateError(f"the saved fields are {shown(fields)}, not a list of names: the state is damaged")
    if not isinstance(saved, list):
        raise StateError(f"the saved feedback is a {type(saved).__name__}, not a list: the state is damaged")
    measurements: list[Measurement] = []
    for number, entry in enumerate(saved):
        try:
            at, feedback = entry["consumed"], entry["feedback"]
            values = {str(field): float(value) for field, value in feedback.items() if is_finite_number(value)}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateError(
                f"entry {number} of the saved feedback cannot be read ({error!r}): the state is damaged"
            ) from error
        before = measurements[-1].consumed if measurements else -1
        if not is_count(at) or not before < at <= consumed:
            raise StateError(
                f"entry {number} of the saved feedback is at sample {shown(at)}, after an entry at sample {before} and "
                f"in a run of {consumed} samples: the state is damaged or was edited; load an older one"
            )
        if not values or len(values) < len(feedback) or sorted(values) != sorted(fields):
            raise StateError(
                f"entry {number} of the saved feedback is {shown(feedback)}, not a finite number for each field: "
                "the state is damaged or was edited; load an older one"
            )
        measurements.append(Measurement(at, {field: values[field] for field in fields}))
    return measurements
