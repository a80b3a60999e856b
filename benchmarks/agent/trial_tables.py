"""Markdown tables of a trial: mean ± std over the seeds of each policy, and paired differences.

Shapes: S seeds, K fields of the environment, F = 2 fields of the corpus.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.agent.trial_record import Reading, TrialRecord
from dmagent_loader.mixture.domains import FIELDS
from dmagent_loader.mixture.history import FeedbackStatistics
from dmagent_loader.mixture.simplex import FloatArray


def readings(
    record: TrialRecord,
    names: Sequence[str],
    statistics: FeedbackStatistics,
    *,
    target_tokens: float | None = None,
) -> dict[str, Reading]:
    """Readings of some policies by name, see `TrialRecord.read`."""
    return {name: record.read(name, statistics, target_tokens=target_tokens) for name in names}


def feedback_table(
    read: Mapping[str, Reading],
    fields: Sequence[str],
    references: Sequence[str],
    *,
    unseen: bool = False,
) -> str:
    """Table of the objective, its differences to some policies, and the feedback; the best policy comes first.

    Differences are taken within each seed, whose runs read the same data. So their spread is much smaller than that of
    the objectives.

    Args:
        read: Name of a policy -> its reading.
        fields: Names of the K fields.
        references: Names of the policies to compare with.
        unseen: Whether to use the unseen questions.
    """

    def objective(reading: Reading) -> FloatArray:
        return reading.unseen_objective if unseen else reading.objective

    columns = [
        "policy",
        "objective",
        *(f"minus {name}" for name in references),
        "mean (nats)",
        *(f"{name} (nats)" for name in fields),
    ]
    rows = []
    for name, reading in sorted(read.items(), key=lambda entry: -objective(entry[1]).mean()):
        feedback = reading.unseen if unseen else reading.feedback
        differences = [
            "" if name == other else spread(objective(reading) - objective(read[other]), signed=True)
            for other in references
        ]
        rows.append(
            [name, spread(objective(reading)), *differences, spread(feedback.mean(axis=1)), *map(spread, feedback.T)]
        )
    return markdown(columns, rows)


def run_table(read: Mapping[str, Reading]) -> str:
    """Table of held-out losses and training data, in the order of `read`."""
    columns = [
        "policy",
        *(f"held-out loss, {name}" for name in FIELDS),
        "target tokens",
        "source tokens",
        "steps",
        "target share",
        "effective domains",
    ]
    rows = [
        [
            name,
            *map(spread, reading.held_out.T),
            f"{reading.target_tokens.mean():,.0f}",
            f"{reading.source_tokens.mean():,.0f}",
            f"{reading.steps.mean():.1f}",
            spread(reading.target_share, digits=2),
            spread(reading.effective_domains, digits=1),
        ]
        for name, reading in read.items()
    ]
    return markdown(columns, rows)


def spread(values: FloatArray, *, digits: int = 3, signed: bool = False) -> str:
    """Mean ± sample standard deviation over the seeds; the mean alone for one seed."""
    sign = "+" if signed else ""
    mean = f"{values.mean():{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns after the first are right-aligned."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
