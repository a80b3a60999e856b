"""The table of sets: what it says is what was recorded."""

from __future__ import annotations

import numpy as np

from benchmarks.agent.coverage import set_table
from dmagent_loader.training.record import FeedbackRecord


def test_every_set_has_the_figures_of_its_own_trajectories(collected: FeedbackRecord) -> None:
    """By hand for the second set; catches figures of all sets, and feedback after the end of a trajectory."""
    header, _, first, second = set_table(collected).splitlines()
    assert [line.split("|")[1].strip() for line in (first, second)] == ["1", "50"]
    cells = dict(zip(header.split("|"), second.split("|"), strict=True))
    of_set = collected.trajectories.members(50)
    lengths = collected.trajectories.lengths[of_set]
    assert cells[" steps "].strip() == f"{lengths.mean():.1f} ± {lengths.std(ddof=1):.1f}"
    final = collected.feedback[of_set, lengths]
    assert cells[" final math (nats) "].strip() == f"{final[:, 1].mean():.3f} ± {final[:, 1].std(ddof=1):.3f}"
    gain = (final - collected.feedback[of_set, 0]) / np.array(collected.statistics().std)
    assert cells[" objective "].strip().startswith(f"{gain.mean():.3f} ± ")
    assert cells[" worst and best "].strip() == f"{gain.mean(axis=1).min():.2f} to {gain.mean(axis=1).max():.2f}"
