"""The demo's numbers, as tables, notes and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmagent_loader._report.records import RunRecord
from dmagent_loader._report.tables import Table
from dmagent_loader.mixture.domains import SOURCE, TARGET, DomainSpace
from dmagent_loader.mixture.simplex import FloatArray


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One model's scores.

    Args:
        name: Name of the model in the table.
        questions: Field of the environment -> (N,) mean log-probability per answer token of each question.
        held_out: Field of the data -> loss on held-out text, nats per token.
        tokens: Field of the data -> tokens that this model was trained on in its stage.
    """

    name: str
    questions: Mapping[str, FloatArray]
    held_out: Mapping[str, float]
    tokens: Mapping[str, int]

    @property
    def feedback(self) -> dict[str, float]:
        """Field of the environment -> mean over its questions."""
        return {field: float(np.mean(values)) for field, values in self.questions.items()}


def score_table(scores: Sequence[Scores]) -> Table:
    """Feedback, held-out loss and tokens used, one row per model."""
    measured = list(scores[0].questions)
    fields = [SOURCE, TARGET]
    return Table(
        columns=("model", *measured, *fields, *fields),
        rows=[
            (
                row.name,
                *(f"{row.feedback[field]:.3f}" for field in measured),
                *(f"{row.held_out[field]:.3f}" for field in fields),
                *(f"{row.tokens[field]:,}" for field in fields),
            )
            for row in scores
        ],
        groups=(("", 1), ("feedback", len(measured)), ("held-out loss", len(fields)), ("tokens used", len(fields))),
    )


def domain_table(space: DomainSpace, tokens: Mapping[str, Mapping[str, int]]) -> Table:
    """Tokens of each domain, one column per run.

    Args:
        space: The domains.
        tokens: Name of the run -> domain -> tokens trained on.
    """
    return Table(
        columns=("domain", *tokens),
        rows=[(name, *(f"{used[name]:,}" for used in tokens.values())) for name in space.names],
    )


def reading_notes(scores: Sequence[Scores]) -> list[str]:
    """Notes on how to read the table, with the noise of the question sets.

    Args:
        scores: Scores of the untrained model, the base model, then the methods; each of the last two is compared with
            the one before both, question by question.
    """
    notes = [
        "Feedback: mean log-probability per answer token in nats; higher is better.",
        "Held-out loss: nats per token on documents that were not trained on; lower is better.",
    ]
    reference, *compared = scores[-3:]
    for run in compared:
        errors = []
        for field, values in run.questions.items():
            difference = values - reference.questions[field]
            error = float(np.std(difference, ddof=1) / np.sqrt(len(difference)))
            # Adding 0 turns a rounded -0.0 into 0.0.
            mean = round(float(np.mean(difference)), 3) + 0.0
            errors.append(f"{field} {mean:+.3f} ± {error:.3f} ({len(difference)} questions)")
        notes.append(
            f"Feedback of '{run.name}' minus '{reference.name}', with the standard error over the questions: "
            f"{', '.join(errors)}."
        )
    notes.append("Each run has one seed; the variation between seeds adds to these errors.")
    return notes


def as_json(scores: Sequence[Scores], records: Sequence[RunRecord]) -> dict[str, Any]:
    """Scores and histories as JSON values."""
    return {
        "scores": [
            {
                "model": row.name,
                "feedback": row.feedback,
                "num_questions": {field: len(values) for field, values in row.questions.items()},
                "held_out_loss": dict(row.held_out),
                "tokens": dict(row.tokens),
            }
            for row in scores
        ],
        "runs": [{"name": run.name, "mix": list(run.mix), "feedback": list(run.feedback)} for run in records],
    }
