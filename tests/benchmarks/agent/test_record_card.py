"""The card of a recorded set: the bundled one can be made again, and its correlations are those of a plain loop."""

from __future__ import annotations

import numpy as np
from launching import REPOSITORY

from benchmarks.agent.record_card import record_card, response_table
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.stages import find_record


def test_the_bundled_card_is_what_the_program_writes() -> None:
    """Catches a card edited by hand, and figures that the program no longer gives."""
    record = FeedbackRecord.load(find_record("recorded-math"))
    notes = (REPOSITORY / "docs" / "agent-data.md").read_text(encoding="utf-8")
    card = (REPOSITORY / "training_record" / "recorded-math" / "README.md").read_text(encoding="utf-8")
    assert record_card(record, notes) == card


def test_correlations_leave_out_the_padding_and_the_trend_over_steps(collected: FeedbackRecord) -> None:
    lengths = collected.trajectories.lengths
    share = collected.trajectories.mixes[:, :, 26:].sum(axis=-1)
    points = [(m, t) for m, length in enumerate(lengths) for t in range(1, length + 1)]
    shares = {(m, t): share[m, 1 : t + 1].mean() for m, t in points}
    rows = [line.split("|") for line in response_table(collected).splitlines()[2:]]
    for k, row in enumerate(rows):
        feedback = {(m, t): collected.feedback[m, t, k] for m, t in points}

        def centred(values: dict[tuple[int, int], float]) -> list[float]:
            return [values[m, t] - np.mean([values[n, u] for n, u in points if u == t]) for m, t in points]

        assert row[2].strip() == f"{np.corrcoef([t for _, t in points], list(feedback.values()))[0, 1]:.2f}"
        assert row[3].strip() == f"{np.corrcoef(centred(shares), centred(feedback))[0, 1]:.2f}"
