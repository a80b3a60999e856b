"""Training with Conservative Q-Learning: reproducible, without side effects, on what was asked for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dmagent_loader.agent import MixingAgent
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.training.cql.config import CQLConfig
from dmagent_loader.training.cql.train import train_cql
from dmagent_loader.training.record import FeedbackRecord

QUICK = CQLConfig(updates=6, warmup_updates=2, batch_size=4, window=3, log_every=3, num_proposals=2)


def test_same_seed_same_weights_and_another_seed_others(record: FeedbackRecord, agent: MixingAgent) -> None:
    first, again = (train_cql(record, agent, QUICK, progress=False) for _ in range(2))
    other = train_cql(record, agent, dataclasses.replace(QUICK, seed=1), progress=False)
    for a, b in zip((first.agent, *first.critics), (again.agent, *again.critics), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert any(not torch.equal(x, y) for x, y in zip(first.agent.parameters(), other.agent.parameters(), strict=True))


def test_training_leaves_the_caller_s_agent_generators_and_output_alone(
    record: FeedbackRecord, agent: MixingAgent, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = [p.detach().clone() for p in agent.parameters()]
    np.random.seed(5)  # noqa: NPY002  (the global generator is what d3rlpy would use)
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    calls: list[None] = []
    result = train_cql(record, agent, QUICK, progress=False, on_update=lambda: calls.append(None))
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(torch.equal(x, y) for x, y in zip(weights, agent.parameters(), strict=True))
    assert capfd.readouterr() == ("", "")
    assert len(calls) == QUICK.updates
    assert [row["updates"] for row in result.curve] == [3.0, 6.0]
    assert {"bellman_error", "penalty", "gradient_ratio", "target_share", "effective_domains"} <= set(result.curve[0])
    assert "objective" in result.curve[1]
    assert result.agent.config == agent.config
    assert not result.agent.training


def test_more_conservatism_lowers_proposals_against_recorded_mixes(record: FeedbackRecord, agent: MixingAgent) -> None:
    """A wrong sign of the term would raise them."""
    gaps = []
    for alpha in (0.0, 0.3):
        config = dataclasses.replace(
            QUICK, updates=60, warmup_updates=59, log_every=20, alpha=alpha, critic_learning_rate=2e-3
        )
        gaps.append(train_cql(record, agent, config, progress=False).curve[-1]["penalty"])
    assert gaps[1] < gaps[0] - 0.3


def test_only_the_trajectories_asked_for_are_trained_on(record: FeedbackRecord, agent: MixingAgent) -> None:
    feedback = record.feedback.copy()
    feedback[5:, 1:] *= 3.0
    chosen = np.arange(5)
    one = train_cql(record, agent, QUICK, trajectories=chosen, progress=False)
    two = train_cql(dataclasses.replace(record, feedback=feedback), agent, QUICK, trajectories=chosen, progress=False)
    assert torch.equal(one.agent.head.weight, two.agent.head.weight)
    assert one.trajectories.tolist() == chosen.tolist()


def test_records_that_do_not_fit_are_refused(record: FeedbackRecord, agent: MixingAgent) -> None:
    def refused(message: str, record: FeedbackRecord, agent: MixingAgent, numbers: list[int] | None = None) -> None:
        chosen = None if numbers is None else np.array(numbers, dtype=np.int64)
        with pytest.raises(ConfigurationError, match=message):
            train_cql(record, agent, QUICK, trajectories=chosen, progress=False)

    refused("of 12 recorded", record, agent, [])
    refused("of 12 recorded", record, agent, [12])
    refused("no feedback statistics", record, MixingAgent(dataclasses.replace(agent.config, statistics=None)))
    refused("histories of 1 to 8", record, MixingAgent(dataclasses.replace(agent.config, max_steps=8)))
    refused("use the agent that was trained", dataclasses.replace(record, fields=("general",)), agent)
    feedback = record.feedback.copy()
    feedback[3, 2] = np.nan
    refused("trajectory 3 has feedback that is not finite", dataclasses.replace(record, feedback=feedback), agent)
