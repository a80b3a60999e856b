"""Evidence for informed policies, collected from the sampler's shards and the environment before a decision."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dmagent_loader import _distributed as distributed
from dmagent_loader._validation import shown
from dmagent_loader.environment import Environment, EnvironmentSettings, Evaluation, Influence, RowEnvironment
from dmagent_loader.environment.probe_rows import IGNORED_LABEL, has_token_to_predict, num_tokens
from dmagent_loader.environment.questions import evenly_spaced
from dmagent_loader.errors import HOW_TO_RESUME, ConfigurationError, FeedbackError, InfluenceError
from dmagent_loader.policies import INFLUENCE, LENGTH, LOSSES, QUESTIONS, InformedPolicy, name_of
from dmagent_loader.sampler import AgentWeightedSampler
from dmagent_loader.transforms import PACKED_MEMBER, packed_tokens

logger = logging.getLogger(__name__)

ROWS = 32
"""Rows of each domain in a measurement of influence, at least."""
ALL_ROWS = 52 * ROWS
"""Rows of all domains, at least: few domains share them, because the scores of large, mixed domains differ little from
each other, and noise must be smaller to tell them apart (docs/influence-results.md)."""
PROBES_PER_DECISION = 64
"""Numbers of probes that are reserved for the repeated measurements of a decision."""
MOST_COST = 0.01
"""Largest part of a run of known length that measurements may cost if they are repeated; the first is always made."""
LEAST_LOSS_ROWS = 8
"""Rows of each domain whose losses are measured, at least, however short the run: fewer would mostly show noise."""
MAX_ROW_TOKENS = 1024
"""Largest number of tokens read from a row: with `ALL_ROWS`, 1.7 million tokens."""

Measure = Callable[[Environment, Mapping[str, Sequence[Any]], Mapping[str, Any]], Influence]
"""Measures influence on the trainer's model, from environment, rows by domain and settings of `Environment.influence`.
"""
Evaluate = Callable[[Evaluation], Mapping[str, float]]
"""Evaluates the trainer's model on an `Environment` or a `RowEnvironment`."""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Loss of the model on each domain.

    Attributes:
        by_domain: Domain -> mean loss per token, in nats.
        tokens: Number of tokens that were read.
        seconds: Duration.
    """

    by_domain: Mapping[str, float]
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The measurements that were made for a decision.

    Attributes:
        influence: Influence, the mean if it was measured more than once; None: not measured.
        losses: Loss on each domain; None: not measured.
    """

    influence: Influence | None = None
    losses: Losses | None = None


def inform(
    policy: InformedPolicy,
    sampler: AgentWeightedSampler,
    environment: Environment,
    evaluate: Evaluate,
    measure: Measure | None,
    loss_probe: LossProbe,
) -> Evidence:
    """Passes a policy the evidence for its next decision. All ranks call it together.

    Args:
        policy: Policy of the sampler.
        sampler: Source of the rows.
        environment: Source of the questions.
        evaluate: Function that evaluates the trainer's model.
        measure: Function that measures influence; None: this trainer gives no access to gradients.
        loss_probe: Measures losses; the same object before each decision of a run.

    Raises:
        ConfigurationError: The policy needs evidence of an unknown kind, or does not stop asking.
    """
    decision = len(sampler.measurements)
    probes = _Probes(sampler, environment, measure, name_of(policy))
    losses: Losses | None = None
    rounds = 0
    # A policy that does not get one kind of evidence may then need another.
    while needs := policy.needed(decision):
        rounds += 1
        if rounds > PROBES_PER_DECISION:
            raise ConfigurationError(
                f"policy {name_of(policy)!r} still needs {sorted(needs)} after {PROBES_PER_DECISION} requests for one "
                "decision: its needed() must come to return nothing"
            )
        for need in sorted(needs):
            if need == INFLUENCE:
                policy.inform(need, probes.next(decision))
            elif need == LENGTH:
                policy.inform(need, replace(sampler.run_length, interval=_interval(sampler)))
            elif need == LOSSES:
                losses = losses or loss_probe.measure(evaluate, name_of(policy))
                policy.inform(need, None if losses is None else losses.by_domain)
            elif need == QUESTIONS:
                policy.inform(need, texts(environment))
            else:
                raise ConfigurationError(
                    f"policy {name_of(policy)!r} needs {need!r}, which no integration provides: let it use "
                    f"{INFLUENCE!r}, {LENGTH!r}, {LOSSES!r} and {QUESTIONS!r} only"
                )
    return Evidence(influence=probes.mean(), losses=losses)


def _interval(sampler: AgentWeightedSampler) -> int | None:
    """Samples between two decisions; before the first, the planned number, up to whole steps. None: unknown."""
    interval, total = sampler.samples_per_reweight, sampler.total_samples
    if interval is None and total is not None:
        interval = math.ceil(total / sampler.planned_decisions(total))
    return interval


def texts(environment: Environment) -> dict[str, list[str]]:
    """Field -> questions with their answers."""
    return {field: [f"{q.question} {q.answer}" for q in listed] for field, listed in environment.questions.items()}


class _Probes:
    """The measurements of influence for one decision.

    Args:
        sampler: Source of the rows.
        environment: Source of the questions.
        measure: Function that measures influence; None: this trainer gives no access to gradients.
        policy: Name of the policy, for messages.
    """

    def __init__(
        self, sampler: AgentWeightedSampler, environment: Environment, measure: Measure | None, policy: str
    ) -> None:
        self._sampler, self._environment, self._measure, self._policy = sampler, environment, measure, policy
        self._count = _rows_of_each(sampler)
        self._row_tokens = 0.0
        """Mean number of tokens in a row."""
        self._measured: list[Influence] = []

    def next(self, decision: int) -> Influence | None:
        """Another measurement, on rows that were not read before; None: it is not possible, or too expensive."""
        if self._measured and not self._may_repeat():
            return None
        try:
            if self._measure is None:
                raise InfluenceError("this trainer gives no access to the model's gradients")
            probe = decision * PROBES_PER_DECISION + len(self._measured)
            with distributed.together("reading rows of each domain", shared=(InfluenceError,)):
                rows = _scorable(self._sampler.probe_rows(self._count, probe=probe))
            lengths = [num_tokens(row) for listed in rows.values() for row in listed]
            self._row_tokens = sum(lengths) / len(lengths)
            found = self._measure(self._environment, rows, {"max_row_tokens": MAX_ROW_TOKENS})
        except InfluenceError as error:
            if distributed.get_rank() == 0:
                without = "without another measurement of influence" if self._measured else "without influence"
                logger.warning("policy %r decides %s: %s", self._policy, without, error)
            return None
        self._measured.append(found)
        return found

    def _may_repeat(self) -> bool:
        """Whether there are more rows to read, and the run is long enough for the cost of another measurement."""
        # Not the rows that were measured: copies and rows without a token to predict are not among them.
        has_more_rows = bool((self._sampler.run_length.rows > self._count).any())
        samples = self._sampler.total_samples
        if samples is None or not has_more_rows:
            return has_more_rows
        cost = sum(influence.tokens for influence in self._measured) + self._measured[-1].tokens
        # Of a training step, too, the backward pass counts as two forward ones.
        return cost <= MOST_COST * 3 * samples * self._row_tokens

    def mean(self) -> Influence | None:
        """Mean of the measurements; None: there is none."""
        return self._measured[0].averaged(self._measured[1:]) if self._measured else None


class LossProbe:
    """Measures the loss of the model on each domain of a run, on the same rows before each decision.

    The rows are read once. In a run whose trainer stops at a known sample, they are so few that all measurements
    together cost at most `MOST_COST` of the training, but at least `LEAST_LOSS_ROWS` of each domain.

    Args:
        sampler: Source of the rows.
        settings: Settings of the model's calls; None: the defaults.
    """

    def __init__(self, sampler: AgentWeightedSampler, settings: EnvironmentSettings | None) -> None:
        self._sampler, self._settings = sampler, settings
        self._rows: RowEnvironment | None = None

    def measure(self, evaluate: Evaluate, policy: str) -> Losses | None:
        """The losses; None: they cannot be measured.

        Args:
            evaluate: Function that evaluates the trainer's model.
            policy: Name of the policy, for messages.

        Raises:
            ConfigurationError: `evaluate` does not evaluate the environment that it is passed.
        """
        started = time.perf_counter()
        try:
            if self._rows is None:
                with distributed.together("reading rows of each domain", shared=(InfluenceError,)):
                    self._rows = self._read()
            feedback = evaluate(self._rows)
            if set(feedback) != set(self._rows.fields):
                raise ConfigurationError(
                    f"the losses of the domains are needed, but evaluate() returned {shown(list(feedback))}: it must "
                    "evaluate the environment that it is passed, as lambda environment: environment.evaluate(model) "
                    "does"
                )
            if bad := [domain for domain, value in feedback.items() if not math.isfinite(value)]:
                raise FeedbackError(f"the losses of {bad} are not finite: the model has probably diverged")
        except (InfluenceError, FeedbackError) as error:
            if distributed.get_rank() == 0:
                logger.warning("policy %r decides without the domains' losses: %s", policy, error)
            return None
        return Losses(
            by_domain={domain: -value for domain, value in feedback.items()},
            tokens=self._rows.num_tokens,
            seconds=time.perf_counter() - started,
        )

    def _read(self) -> RowEnvironment:
        rows = _with_tokens(self._sampler.probe_rows(_rows_of_each(self._sampler)))
        if empty := [domain for domain, listed in rows.items() if not listed]:
            raise InfluenceError(
                f"none of the rows that were read of {empty} has a token to predict within {MAX_ROW_TOKENS} tokens: "
                f"give these domains other rows; {HOW_TO_RESUME}"
            )
        most = self._affordable([num_tokens(row) for listed in rows.values() for row in listed])
        kept = {domain: evenly_spaced(listed, most) for domain, listed in rows.items()}
        return RowEnvironment(kept, self._settings, max_row_tokens=MAX_ROW_TOKENS)

    def _affordable(self, lengths: Sequence[int]) -> int | None:
        """Most rows of each domain; None: all.

        Args:
            lengths: Number of tokens of the rows that were read.
        """
        samples = self._sampler.run_length.limit
        if samples is None:
            return None
        # Not the interval: it is derived only after the first decision, and the rows must be the same before all.
        decisions = self._sampler.planned_decisions(samples)
        # The backward pass of a training step counts as two forward ones.
        most_tokens = MOST_COST * 3 * samples * sum(lengths) / len(lengths) / decisions
        read = sum(min(length, MAX_ROW_TOKENS) for length in lengths) / len(lengths)
        return max(LEAST_LOSS_ROWS, int(most_tokens / read / len(self._sampler.space)))


def _rows_of_each(sampler: AgentWeightedSampler) -> int:
    return max(ROWS, ALL_ROWS // len(sampler.space))


def _scorable(rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Rows with a token to predict: training accepts others, for example empty documents.

    Raises:
        InfluenceError: A domain has none, or no domain has two.
    """
    kept = _with_tokens(rows)
    empty = [domain for domain, listed in kept.items() if not listed]
    if empty or all(len(listed) < 2 for listed in kept.values()):
        raise InfluenceError(
            f"among the rows that were read, {empty or 'all domains'} have "
            f"{'none' if empty else 'only one'} with a token to predict within {MAX_ROW_TOKENS} tokens, but a standard "
            f"error needs more: use the policy 'question-topics', or give the domains more rows; {HOW_TO_RESUME}"
        )
    return kept


def _with_tokens(rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    return {
        domain: [row for row in map(_tokens, listed) if has_token_to_predict(row, MAX_ROW_TOKENS)]
        for domain, listed in rows.items()
    }


def _tokens(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row as tokens, even if only the loader's `collate_packed` would convert it, or it is shifted for Megatron."""
    if "input_ids" in row:
        return row
    if PACKED_MEMBER in row:
        return packed_tokens(row)
    if "tokens" in row and "labels" in row:
        tokens, following = np.asarray(row["tokens"]), np.asarray(row["labels"])
        counted = np.asarray(row["loss_mask"]) != 0 if "loss_mask" in row else np.ones(len(following), bool)
        labels = np.concatenate([[IGNORED_LABEL], np.where(counted, following, IGNORED_LABEL)])
        return {"input_ids": np.concatenate([tokens, following[-1:]]), "labels": labels}
    return row
