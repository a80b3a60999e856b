"""Conservative Q-learning against a world whose best policy is known: does it beat what it imitated?"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.mixture.domains import NUM_CANONICAL
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.simplex import FloatArray, effective_domains
from dmagent_loader.training.cql.config import CQLConfig
from dmagent_loader.training.cql.train import train_cql
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.sft import SFTConfig, train_sft
from dmagent_loader.training.trajectories import TrajectoryConfig, sample_trajectories

TOPICS = NUM_CANONICAL // 2
USEFUL = np.array([3, 9, 14, 22])
"""Target topics that teach ten times as much as any other."""


@dataclasses.dataclass(kw_only=True)
class Forgetting:
    """A model that forgets and learns by a formula.

    General feedback falls with the target share of the recent past. Math feedback rises with the target data seen, by
    how much they teach, with diminishing returns. So the best a policy can do is to use the useful topics, with a
    moderate share. Algorithm 1 knows nothing of this: its experts go to all target topics equally.
    """

    forgotten: float = 0.0
    learnt: float = 0.0

    def feedback(self, rng: np.random.Generator, noise: float = 0.01) -> FloatArray:
        general, math = -4.0 - 0.8 * self.forgotten**1.5, -3.5 - 1.5 * np.exp(-self.learnt / 4.0)
        return np.array([general, math]) + rng.normal(0.0, noise, 2)

    def train(self, mix: FloatArray) -> None:
        worth = np.full(TOPICS, 0.1)
        worth[USEFUL] = 1.0
        self.forgotten += 0.3 * (mix[TOPICS:].sum() - self.forgotten)
        self.learnt += float(mix[TOPICS:] @ worth)


def start_states(seed: int) -> FloatArray:
    states = np.zeros((3, NUM_CANONICAL))
    states[:, :TOPICS] = np.random.default_rng(seed).dirichlet(np.full(TOPICS, 2.0), 3)
    return states


def record_of(config: TrajectoryConfig, seed: int) -> FeedbackRecord:
    target = np.zeros(NUM_CANONICAL)
    target[TOPICS:] = 1.0 / TOPICS
    trajectories = sample_trajectories(start_states(seed), target, config)
    feedback = np.full((*trajectories.mixes.shape[:2], 2), np.nan)
    rng = np.random.default_rng(seed)
    for number, length in enumerate(trajectories.lengths):
        model = Forgetting()
        feedback[number, 0] = model.feedback(rng)
        for step in range(1, length + 1):
            model.train(trajectories.mixes[number, step])
            feedback[number, step] = model.feedback(rng)
    return FeedbackRecord(
        trajectories=trajectories,
        fields=("general", "math"),
        feedback=feedback,
        losses=feedback[..., 0],
        seconds=0.0,
        settings={},
    )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Gain of standardised feedback from the first step to the last, and how the mixes were, over the start states."""

    gain: float
    target_share: float
    domains: float
    useful: float


def steer(agent: MixingAgent, config: TrajectoryConfig, seed: int) -> Outcome:
    """What the agent achieves, on start states that it has not seen, until the target data are used up."""
    statistics = agent.config.statistics
    assert statistics is not None
    rng = np.random.default_rng(seed)
    gains, mixes = [], []
    for start in start_states(seed + 1):
        model = Forgetting()
        first = model.feedback(rng, noise=0.0)
        history = History(
            domains=agent.config.domains, fields=("general", "math"), mixes=start[None], feedback=first[None]
        )
        used = 0.0
        while len(history) <= config.steps and used * config.tokens_per_step < config.target_tokens:
            mix = agent.propose(history)
            model.train(mix)
            used += mix[TOPICS:].sum()
            history = history.extended(mix, model.feedback(rng))
        gains.append(((model.feedback(rng, noise=0.0) - first) / np.array(statistics.std)).mean())
        mixes.append(history.mixes[1:])
    flat = np.concatenate(mixes)
    learnt = flat[:, TOPICS:]
    return Outcome(
        gain=float(np.mean(gains)),
        target_share=float(learnt.sum(axis=1).mean()),
        domains=float(np.mean([effective_domains(mix) for mix in flat])),
        useful=float(learnt[:, USEFUL].sum() / learnt.sum()),
    )


def recorded_gains(record: FeedbackRecord) -> FloatArray:
    last = record.feedback[np.arange(len(record.feedback)), record.trajectories.lengths]
    return np.asarray(((last - record.feedback[:, 0]) / np.array(record.statistics().std)).mean(axis=1))


def trained(
    trajectories: TrajectoryConfig, agent: AgentConfig, sft: SFTConfig, cql: CQLConfig
) -> tuple[FloatArray, Outcome, Outcome]:
    """Gains of the recorded trajectories, and the outcomes of the agent after the warm-up and after CQL."""
    record = record_of(trajectories, trajectories.seed)
    imitator = train_sft(record, sft, agent).agent
    result = train_cql(record, imitator, cql, progress=False)
    return (
        recorded_gains(record),
        steer(imitator, trajectories, trajectories.seed),
        steer(result.agent, trajectories, trajectories.seed),
    )


def test_a_short_training_beats_imitation_and_the_data_without_collapse() -> None:
    """Fails if the actor goes down instead of up, if rewards are shifted by a step, or if the target is the imitator's.

    Eight domains are more than the four useful ones and a source topic for each start state.
    """
    recorded, imitator, agent = trained(
        TrajectoryConfig(
            candidates_per_step=(1, 10, 100),
            trajectories_per_set=24,
            steps=10,
            tokens_per_step=1000,
            target_tokens=4500,
            seed=0,
        ),
        AgentConfig(d_model=32, num_heads=2, d_ff=64, max_steps=10),
        SFTConfig(expert_candidates=100, updates=60, evaluate_every=20, learning_rate=2e-3),
        CQLConfig(
            updates=160,
            warmup_updates=60,
            batch_size=8,
            window=8,
            num_proposals=2,
            alpha=0.001,
            log_every=20,
            actor_learning_rate=5e-4,
            critic_learning_rate=2e-3,
        ),
    )
    found = f"data {recorded.mean():.2f} (best {recorded.max():.2f}), imitation {imitator}, CQL {agent}"
    assert agent.gain > imitator.gain + 0.2, found
    assert agent.gain > recorded.mean() + 0.2, found
    assert agent.domains > 8, found


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_longer_training_beats_nine_tenths_of_the_data_and_finds_the_useful_topics(seed: int) -> None:
    """The share of useful topics is 0.15 to 0.18 under every expert: only rewards say which they are."""
    recorded, imitator, agent = trained(
        TrajectoryConfig(
            candidates_per_step=(1, 10, 100),
            trajectories_per_set=24,
            steps=16,
            tokens_per_step=1000,
            target_tokens=7200,
            seed=seed,
        ),
        AgentConfig(d_model=64, num_heads=2, d_ff=128, max_steps=16),
        SFTConfig(expert_candidates=100, updates=200, evaluate_every=20, learning_rate=1e-3, seed=seed),
        CQLConfig(
            updates=400,
            warmup_updates=100,
            batch_size=8,
            window=8,
            num_proposals=2,
            alpha=0.001,
            log_every=50,
            actor_learning_rate=3e-4,
            critic_learning_rate=1e-3,
            seed=seed,
        ),
    )
    found = f"data {recorded.mean():.2f} (best {recorded.max():.2f}), imitation {imitator}, CQL {agent}"
    assert agent.gain > imitator.gain + 0.5, found
    assert agent.gain > np.percentile(recorded, 90), found
    assert agent.useful > 1.5 * len(USEFUL) / TOPICS, found
    assert agent.domains > 8, found
