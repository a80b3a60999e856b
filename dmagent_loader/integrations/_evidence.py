"""Evidence for informed policies, collected from the sampler's shards and the environment before a decision."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dmagent_loader import _distributed as distributed
from dmagent_loader.environment import Environment, Influence
from dmagent_loader.environment.probe_rows import has_token_to_predict
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
        ConfigurationError: The policy needs evidence of an unknown kind.
    """
    decision = len(sampler.measurements)
    measured: list[Influence] = []
    count = max(ROWS, ALL_ROWS // len(sampler.space))
    has_more_rows = True
    # A policy that does not get one kind of evidence may then need another.
    while needs := policy.needed(decision):
        for need in sorted(needs):
            if need == INFLUENCE:
                influence = None
                if has_more_rows:
                    probe = decision * PROBES_PER_DECISION + len(measured)
                    influence = _influence(policy, sampler, environment, measure, count, probe)
                if influence is not None:
                    measured.append(influence)
                    has_more_rows = any(rows >= count for rows in influence.rows.values())
                policy.inform(need, influence)
            elif need == LENGTH:
                policy.inform(need, sampler.run_length)
            elif need == QUESTIONS:
                policy.inform(need, texts(environment))
            else:
                raise ConfigurationError(
                    f"policy {name_of(policy)!r} needs {need!r}, which no integration provides: let it use "
                    f"{INFLUENCE!r}, {LENGTH!r} and {QUESTIONS!r} only"
                )
    return measured[0].averaged(measured[1:]) if measured else None


def texts(environment: Environment) -> dict[str, list[str]]:
    """Field -> questions with their answers."""
    return {field: [f"{q.question} {q.answer}" for q in listed] for field, listed in environment.questions.items()}


def _influence(
    policy: InformedPolicy,
    sampler: AgentWeightedSampler,
    environment: Environment,
    measure: Measure | None,
    count: int,
    probe: int,
) -> Influence | None:
    try:
        if measure is None:
            raise InfluenceError("this trainer gives no access to the model's gradients")
        with distributed.together("reading rows of each domain", shared=(InfluenceError,)):
            rows = _scorable(sampler.probe_rows(count, probe=probe))
        return measure(environment, rows, {"max_row_tokens": MAX_ROW_TOKENS})
    except InfluenceError as error:
        if distributed.get_rank() == 0:
            logger.warning("policy %r decides without influence: %s", name_of(policy), error)
        return None


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
