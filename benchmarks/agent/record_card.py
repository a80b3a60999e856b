"""The card of a recorded set: its arrays, its collection, and tables of its trajectories and their feedback.

    python -m benchmarks.agent.record_card --recorded recorded-math --notes docs/agent-data.md \
        --output training_record/recorded-math/README.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.agent.coverage import set_table
from benchmarks.agent.trial_tables import markdown
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.cards import fact_table, record_rows
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.stages import find_record


def record_card(record: FeedbackRecord, notes: str) -> str:
    """Text of the README.md beside a recorded set.

    Args:
        record: The set.
        notes: Description of the text and its licences: Markdown sections.
    """
    base = ", ".join(
        f"{name} {value:.3f}" for name, value in zip(record.fields, record.feedback[:, 0].mean(axis=0), strict=True)
    )
    count, steps = len(record.trajectories.lengths), record.trajectories.config.steps
    return f"""# Recorded set: mixing trajectories with feedback

{count} mixing trajectories over 52 domains (26 topics x source and target field), drawn by Algorithm 1 of
arXiv 2507.15640, with the feedback of a proxy language model after each step: the training data of data mixing agents.
``recorded.safetensors`` holds the arrays, and the settings as JSON in its header.
`dmagent_loader.training.record.FeedbackRecord.load` reads it, and
``dmagent train-agent cql --recorded recorded.safetensors --output DIR`` trains both agents from it, without any text.

| array | shape | content |
|---|---|---|
| mixes | ({count}, {steps + 1}, 52) | row 0: start state; row t: mix of step t; 0 after the end |
| feedback | ({count}, {steps + 1}, {len(record.fields)}) | {", ".join(record.fields)}, nats per scored token; \
row 0: base model; NaN after the end |
| losses | ({count}, {steps + 1}) | mean training loss of each step, nats per token |
| lengths, candidates, starts | ({count},) | steps; candidates per step (the set); number of the start state |
| target_distribution | (52,) | distribution that the score of Algorithm 1 favours |

## Collection

{fact_table(record_rows(record))}

## Trajectories by set

{set_table(record)}

Mean ± standard deviation over the trajectories of a set. Objective: gain of the standardised feedback over the base
model's at the end, mean over the fields. Feedback of the base models: {base}.

## Feedback against step and target share

{response_table(record)}

Pearson correlations over all {record.num_feedbacks:,} recorded steps.

{notes.strip()}
"""


def response_table(record: FeedbackRecord) -> str:
    """Correlation of feedback with the step, and, among trajectories at the same step, with the target share so far."""
    share = record.trajectories.target_share()[:, 1:]
    steps = np.broadcast_to(np.arange(1.0, share.shape[1] + 1), share.shape)
    so_far = np.cumsum(share, axis=1) / steps
    reached = np.isfinite(share)
    rows = []
    for k, name in enumerate(record.fields):
        feedback = record.feedback[:, 1:, k]
        with_step = np.corrcoef(steps[reached], feedback[reached])[0, 1]
        with_share = np.corrcoef(_within_steps(so_far, reached), _within_steps(feedback, reached))[0, 1]
        rows.append([name, f"{with_step:.2f}", f"{with_share:.2f}"])
    return markdown(["field", "step", "mean target share so far, at the same step"], rows)


def _within_steps(values: FloatArray, reached: npt.NDArray[np.bool_]) -> FloatArray:
    """(M, T) values -> those that were reached, minus the mean of their step, as one vector."""
    means = np.where(reached, values, 0.0).sum(axis=0) / np.maximum(reached.sum(axis=0), 1)
    return np.asarray((values - means)[reached], dtype=np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", required=True, help="a recorded set: a file, or the name of a bundled one")
    parser.add_argument("--notes", type=Path, required=True, help="Markdown sections: the text and its licences")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    record = FeedbackRecord.load(find_record(args.recorded))
    args.output.write_text(record_card(record, args.notes.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
