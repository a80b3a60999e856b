"""Rewards telescope, returns are discounted sums, and states are those of a steering agent."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from training_fixtures import RANDOM_STATISTICS

from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.history import FeedbackStatistics, History
from dmagent_loader.training.cql.rewards import agent_states, returns_to_go, rewards, value_range
from dmagent_loader.training.record import FeedbackRecord


def test_rewards_telescope_to_the_gain_of_the_run(record: FeedbackRecord) -> None:
    """Eq. 6 without discount; frozen units, although the agent sees anchored feedback, which does not telescope."""
    for number, length in enumerate(record.trajectories.lengths):
        received = rewards(record, number, RANDOM_STATISTICS)
        gain = (record.feedback[number, length] - record.feedback[number, 0]) / np.array(RANDOM_STATISTICS.std)
        assert len(received) == length
        assert received.sum() == pytest.approx(gain.mean())
        assert returns_to_go(received, 1.0)[0] == pytest.approx(gain.mean())


def test_returns_are_discounted_sums_and_their_range_is_widened() -> None:
    assert returns_to_go(np.array([1.0, 2.0, 4.0]), 0.5).tolist() == [3.0, 4.0, 4.0]
    low, span = value_range([np.linspace(-1.0, 1.0, 2001), np.zeros(0)], margin=0.25)
    assert low == pytest.approx(-1.0 * 0.998 - 0.25 * 2 * 0.998)
    assert span == pytest.approx(1.5 * 2 * 0.998)
    with pytest.raises(ConfigurationError, match="all returns are 2"):
        value_range([np.full(5, 2.0)], margin=0.25)


@pytest.mark.parametrize("mode", ["anchored", "frozen", "running"])
def test_states_are_what_the_agent_sees_when_it_steers(record: FeedbackRecord, agent: MixingAgent, mode: str) -> None:
    """Row for row against `encode`, each with only the history that it would have had."""
    config = dataclasses.replace(agent.config, standardization=mode, prior_weight=3.0)
    steering = MixingAgent(config)
    states = agent_states(record, 0, config)
    assert len(states) == record.trajectories.lengths[0]
    for t in range(len(states)):
        history = History(
            domains=config.domains,
            fields=record.fields,
            mixes=record.trajectories.mixes[0, : t + 1],
            feedback=record.feedback[0, : t + 1],
        )
        np.testing.assert_allclose(states[t], steering.encode(history)[-1], atol=1e-12)


TABLE_5 = np.array(
    [
        [-2.558, -1.486, 52.96, 10.02],
        [-2.564, -1.058, 51.08, 20.70],
        [-2.591, -0.896, 48.00, 32.95],
        [-2.473, -0.950, 58.22, 23.10],
        [-2.500, -0.902, 54.04, 33.02],
    ]
)
"""Five checkpoints of one run in the paper: feedback and benchmark average, general and math."""


@pytest.mark.parametrize(("field", "correlation"), [(0, 0.943), (1, 0.919)], ids=["general", "math"])
def test_rewards_of_one_field_follow_its_benchmarks_as_in_the_paper(
    record: FeedbackRecord, field: int, correlation: float
) -> None:
    """Table 5: rewards so far correlate with the benchmarks as the feedback does, if the other field weighs nothing.

    Catches a reward of another sign, or of another scale at each step, as if it were standardised along the run.
    """
    feedback, lengths = record.feedback.copy(), record.trajectories.lengths.copy()
    feedback[0, :5], lengths[0] = TABLE_5[:, :2], 4
    run = dataclasses.replace(
        record, feedback=feedback, trajectories=dataclasses.replace(record.trajectories, lengths=lengths)
    )
    spread = np.full(2, 1e12)
    spread[field] = 0.05
    statistics = FeedbackStatistics(mean=(0.0, 0.0), std=tuple(spread), count=100)
    received = rewards(run, 0, statistics)
    so_far = np.concatenate([[0.0], np.cumsum(received)])
    assert np.corrcoef(so_far, TABLE_5[:, 2 + field])[0, 1] == pytest.approx(correlation, abs=5e-4)
    config = dataclasses.replace(AgentConfig(), statistics=statistics, standardization="frozen")
    seen = agent_states(run, 0, config)[:, -2 + field]  # of the steps before the last
    assert np.corrcoef(seen, TABLE_5[:4, 2 + field])[0, 1] == pytest.approx(
        np.corrcoef(TABLE_5[:4, field], TABLE_5[:4, 2 + field])[0, 1]
    )
