"""Evidence for informed policies, collected from the sampler's shards and the environment before a decision."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dmagent_loader import _distributed as distributed
from dmagent_loader.environment import Environment, Influence
from dmagent_loader.environment.probe_rows import has_token_to_predict, num_tokens
from dmagent_loader.errors import HOW_TO_RESUME, ConfigurationError, InfluenceError
from dmagent_loader.policies import INFLUENCE, LENGTH, QUESTIONS, InformedPolicy, name_of
from dmagent_loader.sampler import AgentWeightedSampler
from dmagent_loader.transforms import PACKED_MEMBER, packed_tokens

logger = logging.getLogger(__name__)

ROWS = 32
"""Rows of each domain in a measurement of influence, at least."""
ALL_ROWS = 52 * ROWS
"""Rows of all domains, at least: few domains share them, because the scores of large, mixed domains differ little from
each other, and noise must be smaller to tell them apart (docs/influence.md)."""
PROBES_PER_DECISION = 64
"""Numbers of probes that are reserved for the repeated measurements of a decision."""
MOST_COST = 0.01
"""Largest part of a run of known length that measurements may cost if they are repeated; the first is always made."""
MAX_ROW_TOKENS = 1024
"""Largest number of tokens read from a row: with `ALL_ROWS`, 1.7 million tokens."""

Measure = Callable[[Environment, Mapping[str, Sequence[Any]], Mapping[str, Any]], Influence]
"""Measures influence on the trainer's model, from environment, rows by domain and settings of `Environment.influence`.
"""


def inform(
    policy: InformedPolicy,
    sampler: AgentWeightedSampler,
    environment: Environment,
    measure: Measure | None,
) -> Influence | None:
    """Passes a policy the evidence for its next decision. All ranks call it together.

    Args:
        policy: Policy of the sampler.
        sampler: Source of the rows.
        environment: Source of the questions.
        measure: Function that measures influence; None: this trainer gives no access to gradients.

    Returns:
        The influence, if it was measured; the mean, if more than once.

    Raises:
        ConfigurationError: The policy needs evidence of an unknown kind, or does not stop asking.
    """
    decision = len(sampler.measurements)
    probes = _Probes(sampler, environment, measure, name_of(policy))
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
                policy.inform(need, replace(sampler.run_length, interval=sampler.samples_per_reweight))
            elif need == QUESTIONS:
                policy.inform(need, texts(environment))
            else:
                raise ConfigurationError(
                    f"policy {name_of(policy)!r} needs {need!r}, which no integration provides: let it use "
                    f"{INFLUENCE!r}, {LENGTH!r} and {QUESTIONS!r} only"
                )
    return probes.mean()


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
        self._count = max(ROWS, ALL_ROWS // len(sampler.space))
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
        has_more_rows = any(rows >= self._count for rows in self._measured[-1].rows.values())
        samples = self._sampler.total_samples
        if samples is None or not has_more_rows:
            return has_more_rows
        cost = sum(influence.tokens for influence in self._measured) + self._measured[-1].tokens
        # Of a training step, too, the backward pass counts as two forward ones.
        return cost <= MOST_COST * 3 * samples * self._row_tokens

    def mean(self) -> Influence | None:
        """Mean of the measurements; None: there is none."""
        return self._measured[0].averaged(self._measured[1:]) if self._measured else None


def _scorable(rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Rows with a token to predict: training accepts others, for example empty documents.

    Raises:
        InfluenceError: A domain has none, or no domain has two.
    """
    kept = {
        domain: [row for row in map(_tokens, listed) if has_token_to_predict(row, MAX_ROW_TOKENS)]
        for domain, listed in rows.items()
    }
    empty = [domain for domain, listed in kept.items() if not listed]
    if empty or all(len(listed) < 2 for listed in kept.values()):
        raise InfluenceError(
            f"among the rows that were read, {empty or 'all domains'} have "
            f"{'none' if empty else 'only one'} with a token to predict within {MAX_ROW_TOKENS} tokens, but a standard "
            f"error needs more: use the policy 'question-topics', or give the domains more rows; {HOW_TO_RESUME}"
        )
    return kept


def _tokens(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row as tokens, even if its shards are packed and only the loader's `collate_packed` would convert it."""
    return packed_tokens(row) if PACKED_MEMBER in row and "input_ids" not in row else row
