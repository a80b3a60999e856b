"""Differences between the sets of recorded trajectories, in their mixes and in the feedback."""

from __future__ import annotations

import numpy as np

from benchmarks.agent.trial_tables import markdown, spread
from dmagent_loader.mixture.simplex import effective_domains
from dmagent_loader.training.record import FeedbackRecord


def set_table(record: FeedbackRecord) -> str:
    """A Markdown table with a row for each set: steps, target share, effective domains, and feedback at the end.

    The objective is the return that agents are trained for: the gain of the standardised feedback over the base
    model's, mean over the fields. Every figure is the mean ± std over the trajectories of the set.
    """
    trajectories = record.trajectories
    lengths, every = trajectories.lengths, np.arange(len(trajectories.lengths))
    final = record.feedback[every, lengths]
    objective = ((final - record.feedback[:, 0]) / np.array(record.statistics().std)).mean(axis=1)
    paths = [mixes[1 : length + 1] for mixes, length in zip(trajectories.mixes, lengths, strict=True)]
    shares = np.array([trajectories.target_share()[i, 1 : lengths[i] + 1].mean() for i in every])
    domains = np.array([np.mean([effective_domains(mix) for mix in path]) for path in paths])
    changes = np.array(
        [0.5 * np.abs(np.diff(path, axis=0)).sum(axis=1).mean() if len(path) > 1 else 0 for path in paths]
    )
    columns = [
        "candidates per step",
        "trajectories",
        "steps",
        "target share",
        "effective domains",
        "change per step",
        *(f"final {name} (nats)" for name in record.fields),
        "objective",
        "worst and best",
    ]
    rows = []
    for candidates in trajectories.config.candidates_per_step:
        of_set = trajectories.members(candidates)
        rows.append(
            [
                f"{candidates:,}",
                str(len(of_set)),
                spread(lengths[of_set].astype(np.float64), digits=1),
                spread(shares[of_set], digits=2),
                spread(domains[of_set], digits=1),
                spread(changes[of_set]),
                *map(spread, final[of_set].T),
                spread(objective[of_set]),
                f"{objective[of_set].min():.2f} to {objective[of_set].max():.2f}",
            ]
        )
    return markdown(columns, rows)
