"""Supervised warm-up: inputs and targets line up, nothing leaks, and the agent learns what can be learnt."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import NUM_CANONICAL
from dmagent_loader.mixture.history import History
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.sft import SFTConfig, agent_inputs, held_out_error, highest_returns, train_sft
from dmagent_loader.training.trajectories import Trajectories, TrajectoryConfig

STEPS, PER_SET = 8, 16
# Frozen: a lot around the first one drawn would say nothing about whether it is high or low.
AGENT = AgentConfig(d_model=32, num_heads=2, d_ff=64, max_steps=STEPS, standardization="frozen")
CONFIG = SFTConfig(updates=250, evaluate_every=25, learning_rate=3e-3, batch_size=8, validation=3, test=4)


@pytest.fixture(scope="module")
def record() -> FeedbackRecord:
    """Experts halve their distance to the target at a step when the second feedback is low, and stay when it is high.

    So neither the step nor the last mix says what comes next: only feedback does.
    """
    rng = np.random.default_rng(0)
    total = 2 * PER_SET
    start, target = np.zeros(NUM_CANONICAL), np.zeros(NUM_CANONICAL)
    start[:26], target[26:] = 1 / 26, 1 / 26
    mixes = np.zeros((total, STEPS + 1, NUM_CANONICAL))
    mixes[:, 0] = start
    feedback = np.full((total, STEPS + 1, 2), np.nan)
    lengths = rng.integers(STEPS - 2, STEPS + 1, total)
    for m in range(total):
        for t in range(lengths[m] + 1):
            feedback[m, t] = rng.normal(-5, 0.1), rng.choice([-6.0, -4.0])
        for t in range(1, lengths[m] + 1):
            mixes[m, t] = (mixes[m, t - 1] + target) / 2 if feedback[m, t - 1, 1] < -5 else mixes[m, t - 1]
    config = TrajectoryConfig(candidates_per_step=(1, 10_000), trajectories_per_set=PER_SET, steps=STEPS)
    trajectories = Trajectories(
        mixes=mixes,
        lengths=lengths.astype(np.int64),
        candidates=np.repeat([1, 10_000], PER_SET),
        starts=np.zeros(total, dtype=np.int64),
        target_distribution=target,
        config=config,
    )
    return FeedbackRecord(
        trajectories=trajectories,
        fields=("general", "math"),
        feedback=feedback,
        losses=feedback[..., 0],
        seconds=1.0,
        settings={},
    )


def test_the_agent_uses_the_feedback_and_beats_both_baselines(record: FeedbackRecord) -> None:
    """Catches inputs or targets that are off by a step: feedback then says nothing about the next mix."""
    updates = []
    result = train_sft(record, CONFIG, AGENT, on_update=lambda: updates.append(1))
    assert len(updates) == CONFIG.updates
    assert result.error.agent.mean() < 0.4 * result.error.repeat_last.mean()
    assert result.error.agent.mean() < 0.4 * result.error.mean_at_step.mean()
    assert result.best_update in [update for update, _, _ in result.validation_curve]
    assert result.agent.config.statistics == record.statistics()


def test_the_parts_are_disjoint_and_of_the_expert_set(record: FeedbackRecord) -> None:
    result = train_sft(record, dataclasses.replace(CONFIG, updates=1), AGENT)
    parts = np.concatenate([result.training, result.validation, result.test])
    assert sorted(parts) == list(range(PER_SET, 2 * PER_SET))
    assert (len(result.validation), len(result.test)) == (3, 4)


def test_experts_can_be_those_of_the_highest_return_of_each_start_state(record: FeedbackRecord) -> None:
    """Catches a ranking over all: the trajectories of the second start state all end 10 nats higher than they began."""
    starts = np.arange(2 * PER_SET) % 2
    feedback = record.feedback.copy()
    feedback[starts == 1, 1:] += 10.0
    changed = dataclasses.replace(
        record, feedback=feedback, trajectories=dataclasses.replace(record.trajectories, starts=starts)
    )
    chosen = highest_returns(changed, 0.25)
    assert np.bincount(starts[chosen]).tolist() == [4, 4]
    last = feedback[np.arange(2 * PER_SET), record.trajectories.lengths]
    returns = ((last - feedback[:, 0]) / np.array(changed.statistics().std)).mean(axis=1)
    for start in (0, 1):
        others = np.setdiff1d(np.flatnonzero(starts == start), chosen)
        assert returns[chosen[starts[chosen] == start]].min() >= returns[others].max()
    result = train_sft(changed, dataclasses.replace(CONFIG, updates=1, expert_share=0.5), AGENT)
    parts = np.concatenate([result.training, result.validation, result.test])
    assert sorted(parts) == highest_returns(changed, 0.5).tolist()


def test_a_seed_gives_the_same_agent_and_leaves_the_global_generator_alone(record: FeedbackRecord) -> None:
    config = dataclasses.replace(CONFIG, updates=3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = train_sft(record, config, AGENT)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    two = train_sft(record, config, AGENT)
    for a, b in zip(one.agent.parameters(), two.agent.parameters(), strict=True):
        assert torch.equal(a, b)


def test_baselines_are_what_they_say(record: FeedbackRecord) -> None:
    training, test = np.arange(16, 25), np.arange(25, 32)
    agent = MixingAgent(dataclasses.replace(AGENT, statistics=record.statistics()))
    error = held_out_error(agent, record, record.statistics(), training, test)
    mixes, lengths = record.trajectories.mixes, record.trajectories.lengths
    for row, number in enumerate(test):
        repeat, mean = [], []
        for t in range(1, lengths[number] + 1):
            peers = [mixes[m, t] for m in training if lengths[m] >= t]
            repeat.append(((mixes[number, t - 1] - mixes[number, t]) ** 2).sum())
            mean.append(((np.mean(peers, axis=0) - mixes[number, t]) ** 2).sum())
        assert np.isclose(error.repeat_last[row], np.mean(repeat), atol=1e-6)
        assert np.isclose(error.mean_at_step[row], np.mean(mean), atol=1e-6)


def test_training_inputs_are_what_the_agent_sees_when_it_proposes(record: FeedbackRecord) -> None:
    """The same encoding in training and in use; catches another order of columns or another standardisation."""
    agent = MixingAgent(dataclasses.replace(AGENT, statistics=record.statistics()))
    inputs, targets, valid = agent_inputs(record, record.statistics(), np.array([17]), "frozen")
    steps = int(record.trajectories.lengths[17])
    history = History(
        domains=AGENT.domains,
        fields=record.fields,
        mixes=record.trajectories.mixes[17, :steps],
        feedback=record.feedback[17, :steps],
    )
    assert np.allclose(agent.encode(history, standardization="frozen"), inputs[0, :steps].numpy(), atol=1e-6)
    assert np.allclose(targets[0, :steps].numpy(), record.trajectories.mixes[17, 1 : steps + 1], atol=1e-7)
    assert int(valid.sum()) == steps
    with torch.no_grad():
        assert np.allclose(
            agent(inputs)[0, steps - 1].numpy(), agent.propose(history, standardization="frozen"), atol=1e-5
        )


def test_too_few_expert_trajectories_are_refused(record: FeedbackRecord) -> None:
    with pytest.raises(ConfigurationError, match="16 trajectories, of which 8 are for validation"):
        train_sft(record, dataclasses.replace(CONFIG, validation=8, test=8), AGENT)
    with pytest.raises(ConfigurationError, match="no trajectory was drawn with 7"):
        train_sft(record, dataclasses.replace(CONFIG, expert_candidates=7), AGENT)
