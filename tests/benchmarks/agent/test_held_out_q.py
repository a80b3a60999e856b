"""Critics and actor on held-out trajectories: the figures are those of a plain loop over steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from training_fixtures import NUM_RANDOM, RANDOM_STATISTICS, random_agent, random_record

from benchmarks.agent.held_out_q import held_out_q
from dmagent_loader.agent import MixingAgent
from dmagent_loader.agent.critic import CriticConfig, MixingCritic
from dmagent_loader.mixture.domains import NUM_CANONICAL
from dmagent_loader.training.cql.rewards import agent_states, returns_to_go, rewards
from dmagent_loader.training.record import FeedbackRecord


@pytest.fixture(scope="module")
def record() -> FeedbackRecord:
    return random_record()


@pytest.fixture(scope="module")
def agent() -> MixingAgent:
    return random_agent()


class _Oracle(MixingCritic):
    """Says of each recorded mix what it is told, and of any other the same less one."""

    def __init__(self, config: CriticConfig, known: dict[bytes, float]) -> None:
        super().__init__(config)
        self._known = known

    def forward(
        self,
        inputs: torch.Tensor,
        candidates: torch.Tensor,
        valid: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        values = [[self._known[row[0].numpy().tobytes()] for row in batch] for batch in candidates]
        recorded = torch.logit((torch.tensor(values) - self.config.low) / self.config.span)
        return torch.stack([recorded, recorded - 1.0], dim=-1)


def test_a_critic_that_knows_the_future_is_told_from_one_that_knows_the_clock(
    record: FeedbackRecord, agent: MixingAgent
) -> None:
    numbers = np.arange(NUM_RANDOM)
    config = CriticConfig.for_agent(agent.config, low=-20.0, span=40.0)
    knows, clock = {}, {}
    for number in numbers:
        returns = returns_to_go(rewards(record, int(number), RANDOM_STATISTICS), 0.9)
        for step, value in enumerate(returns):
            key = record.trajectories.mixes[number, step + 1].astype(np.float32).tobytes()
            knows[key], clock[key] = float(value), float(-step)
    best = held_out_q(record, agent, [_Oracle(config, knows)], numbers, discount=0.9)
    trend = held_out_q(record, agent, [_Oracle(config, clock)], numbers, discount=0.9)
    assert best.rank_correlation == pytest.approx(1.0, abs=1e-3)
    assert best.rank_correlation_within_steps == pytest.approx(1.0, abs=1e-3)
    assert np.isnan(trend.rank_correlation_within_steps)
    assert best.advantage == pytest.approx(-1.0, abs=1e-4)
    assert best.steps == record.trajectories.lengths.sum()
    plain = np.concatenate(
        [
            agent(torch.from_numpy(agent_states(record, int(n), agent.config)).float()[None]).detach().numpy()[0]
            for n in numbers
        ]
    )
    assert best.target_share == pytest.approx(plain[:, 26:].sum(axis=1).mean(), abs=1e-5)
    assert 1.0 < best.effective_domains < NUM_CANONICAL


def test_the_held_out_bellman_error_is_of_the_one_step_target(record: FeedbackRecord, agent: MixingAgent) -> None:
    """Against a loop over steps with the critic asked for one thing at a time."""
    torch.manual_seed(4)
    critic = MixingCritic(CriticConfig.for_agent(agent.config, low=-2.0, span=5.0)).eval()
    found = held_out_q(record, agent, [critic], np.array([2]), discount=0.9)
    states = torch.from_numpy(agent_states(record, 2, agent.config)).float()
    received = rewards(record, 2, RANDOM_STATISTICS)
    errors = []
    with torch.no_grad():
        for t, reward in enumerate(received):
            taken = torch.from_numpy(record.trajectories.mixes[2, t + 1]).float()[None, None, None]
            q = critic.values(critic(states[None, : t + 1], taken)).item()
            target = reward
            if t + 1 < len(received):
                prefix = states[None, : t + 2]
                target += 0.9 * critic.values(critic(prefix, agent(prefix)[:, -1:, None])).item()
            errors.append(q - target)
    assert found.bellman_error == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-4)
