"""Fragments, targets, proposals and updates of Conservative Q-Learning."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from d3rlpy.algos import TransformerInput
from d3rlpy.dataset import Episode, TrajectoryMiniBatch
from d3rlpy.torch_utility import TorchTrajectoryMiniBatch
from training_fixtures import RANDOM_STATISTICS, RANDOM_STEPS

from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.agent.critic import CriticConfig
from dmagent_loader.mixture.domains import NUM_CANONICAL
from dmagent_loader.mixture.history import History
from dmagent_loader.training.cql.algorithm import (
    FragmentBuffer,
    Fragments,
    SimplexCQL,
    SimplexCQLConfig,
    bellman_targets,
    draw_proposals,
)
from dmagent_loader.training.cql.config import CQLConfig
from dmagent_loader.training.cql.rewards import agent_states, rewards
from dmagent_loader.training.record import FeedbackRecord

QUICK = CQLConfig(updates=6, warmup_updates=2, batch_size=4, window=3, log_every=3, num_proposals=2)


def algorithm_for(agent: MixingAgent, settings: CQLConfig = QUICK) -> SimplexCQL:
    torch.manual_seed(2)
    critic = dataclasses.asdict(CriticConfig.for_agent(agent.config, low=-4.0, span=8.0))
    algorithm = SimplexCQLConfig(
        context_size=RANDOM_STEPS, settings=settings, agent=agent.config.to_dict(), critic=critic
    ).create()
    algorithm.create_impl((agent.config.input_dim,), NUM_CANONICAL)
    algorithm.impl.modules.policy.load_state_dict(agent.state_dict())
    return algorithm


def episode_of(record: FeedbackRecord, number: int, config: AgentConfig) -> Episode:
    received = rewards(record, number, RANDOM_STATISTICS)
    return Episode(
        observations=agent_states(record, number, config).astype(np.float32),
        actions=record.trajectories.mixes[number, 1 : len(received) + 1].astype(np.float32),
        rewards=received[:, None].astype(np.float32),
        terminated=True,
    )


def fragments_of(episodes: list[Episode], ends: list[int], window: int) -> Fragments:
    """Through d3rlpy's slicer and batches, as in training."""
    buffer = FragmentBuffer(episodes, NUM_CANONICAL, window, np.random.default_rng(0))
    slices = [buffer.trajectory_slicer(e, end, RANDOM_STEPS) for e, end in zip(episodes, ends, strict=True)]
    batch = TrajectoryMiniBatch.from_partial_trajectories(slices)
    return Fragments.of(TorchTrajectoryMiniBatch.from_batch(batch, "cpu:0"), window)


@torch.no_grad()
def test_fragments_give_the_plain_agent_s_proposals(record: FeedbackRecord, agent: MixingAgent) -> None:
    """Left padding, d3rlpy's timesteps from 1 and the cut to the longest fragment must leave no trace."""
    ends = [2, 6, int(record.trajectories.lengths[2]) - 1]
    episodes = [episode_of(record, number, agent.config) for number in range(3)]
    data = fragments_of(episodes, ends, window=3)
    assert data.inputs.shape[1] == max(ends) + 1 < RANDOM_STEPS
    proposed = algorithm_for(agent).impl.propose(data)
    for row, (episode, end) in enumerate(zip(episodes, ends, strict=True)):
        rows = min(end + 1, 4)
        plain = agent(torch.from_numpy(episode.observations)[None])[0]
        torch.testing.assert_close(proposed[row, -rows:], plain[end + 1 - rows : end + 1], rtol=0, atol=1e-6)
        np.testing.assert_array_equal(data.actions[row, -rows:].numpy(), episode.actions[end + 1 - rows : end + 1])
        assert data.acted[row].sum() == rows
        assert data.judged[row].sum() == (rows if end == len(episode) - 1 else rows - 1)


def test_d3rlpy_s_predict_is_the_agent_s_proposal(record: FeedbackRecord, agent: MixingAgent) -> None:
    episode = episode_of(record, 1, agent.config)
    rows = 3
    asked = TransformerInput(
        observations=episode.observations[:rows],
        actions=np.zeros((rows, NUM_CANONICAL), dtype=np.float32),
        rewards=np.zeros((rows, 1), dtype=np.float32),
        returns_to_go=np.zeros((rows, 1), dtype=np.float32),
        timesteps=np.arange(1, rows + 1),
    )
    history = History(
        domains=agent.config.domains,
        fields=record.fields,
        mixes=record.trajectories.mixes[1, :rows],
        feedback=record.feedback[1, :rows],
    )
    np.testing.assert_allclose(algorithm_for(agent).predict(asked), agent.propose(history), atol=1e-6)


def test_fragments_reach_every_step_and_the_last_as_often_as_any(record: FeedbackRecord, agent: MixingAgent) -> None:
    """d3rlpy's own draw would train on the last step a quarter as often with a window of 4."""
    episodes = [episode_of(record, number, agent.config) for number in range(3)]
    window, draws = 4, 6000
    buffer = FragmentBuffer(episodes, NUM_CANONICAL, window, np.random.default_rng(3))
    lengths = [len(e) for e in episodes]
    seen = [np.zeros(n) for n in lengths]
    for _ in range(draws):
        drawn = buffer.sample_trajectory(RANDOM_STEPS)
        end = int(drawn.timesteps[-1])
        number = next(i for i, e in enumerate(episodes) if np.array_equal(e.actions[end - 1], drawn.actions[-1]))
        judged = range(max(end - 1 - window, 0), end if drawn.terminals[-1, 0] else end - 1)
        seen[number][list(judged)] += 1
    expected = draws * window / sum(n + window - 1 for n in lengths)
    for counts in seen:
        assert counts.min() > 0.8 * expected
        assert counts[-1] == pytest.approx(expected, rel=0.2)


def test_one_step_targets_by_hand_and_the_trace_between_them_and_the_return() -> None:
    received, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 20.0, 30.0]])
    goes_on, ends = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, 1.0]])
    assert bellman_targets(received, values, goes_on, 0.5, 0.0).tolist() == [[11.0, 17.0, 30.0]]
    assert bellman_targets(received, values, ends, 0.5, 0.0).tolist() == [[11.0, 17.0, 3.0]]
    assert bellman_targets(received, values, ends, 0.5, 1.0).tolist() == [[2.75, 3.5, 3.0]]
    halfway = bellman_targets(received, values, ends, 0.5, 0.5)
    assert halfway[0, 1] == pytest.approx(2.0 + 0.5 * (0.5 * 30.0 + 0.5 * 3.0))


def test_a_target_never_sees_the_executed_future(record: FeedbackRecord, agent: MixingAgent) -> None:
    """The target at row t is of r_t, x_{t+1} and the actor's answer to it: not of what was done or came after that."""
    length = int(record.trajectories.lengths[0])
    impl = algorithm_for(agent).impl

    def targets(changed: FeedbackRecord) -> torch.Tensor:
        data = fragments_of([episode_of(changed, 0, agent.config)], [length - 1], window=length)
        return impl.bellman(data, impl.propose(data).detach())[0]

    before = targets(record)
    t = 3
    mixes, feedback = record.trajectories.mixes.copy(), record.feedback.copy()
    mixes[0, t + 2 : length + 1] = mixes[1, 1]
    feedback[0, t + 2 : length + 1] += 0.7
    later = dataclasses.replace(
        record, trajectories=dataclasses.replace(record.trajectories, mixes=mixes), feedback=feedback
    )
    after = targets(later)
    torch.testing.assert_close(after[: t + 1], before[: t + 1], rtol=0, atol=1e-6)
    assert (after[t + 1 :] - before[t + 1 :]).abs().max() > 1e-3


def test_proposals_are_uniform_by_half_and_around_the_actor_by_half() -> None:
    torch.manual_seed(0)
    mix = torch.full((NUM_CANONICAL,), 0.2 / (NUM_CANONICAL - 1))
    mix[7] = 0.8
    drawn = draw_proposals(mix.expand(40, 5, -1), 4, 200.0)
    assert drawn.shape == (40, 5, 4, NUM_CANONICAL)
    torch.testing.assert_close(drawn.sum(dim=-1), torch.ones(40, 5, 4))
    uniform, around = drawn[:, :, :2, 7].mean(), drawn[:, :, 2:, 7].mean()
    assert uniform == pytest.approx(1 / NUM_CANONICAL, rel=0.3)
    assert around == pytest.approx((1 + 200 * 0.8) / (NUM_CANONICAL + 200), rel=0.05)


def test_the_actor_rests_during_warm_up_and_moves_without_touching_the_critics(
    record: FeedbackRecord, agent: MixingAgent
) -> None:
    algorithm = algorithm_for(agent)
    buffer = FragmentBuffer([episode_of(record, 0, agent.config)], NUM_CANONICAL, 3, np.random.default_rng(0))
    policy, critics = algorithm.impl.modules.policy, algorithm.impl.modules.critics
    for update in range(QUICK.warmup_updates + 1):
        assert torch.equal(policy.head.weight, agent.head.weight), f"moved before update {update}"
        algorithm.update(buffer.sample_trajectory_batch(4, RANDOM_STEPS))
    assert not torch.equal(policy.head.weight, agent.head.weight)
    before = [(p.detach().clone(), p.grad.clone()) for p in critics.parameters()]
    data = fragments_of([episode_of(record, 0, agent.config)], [5], window=3)
    algorithm.impl._update_actor(data, algorithm.impl.propose(data))
    for (weight, gradient), p in zip(before, critics.parameters(), strict=True):
        assert torch.equal(weight, p)
        assert torch.equal(gradient, p.grad)


def test_config_survives_d3rlpy_s_own_form(agent: MixingAgent) -> None:
    config = algorithm_for(agent).config
    again = SimplexCQLConfig.deserialize(config.serialize())
    assert again.settings == QUICK
    assert AgentConfig.from_dict(again.agent) == agent.config
