"""The parts of conservative Q-learning: rewards, fragments, targets, proposals, and what training leaves alone."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from d3rlpy.algos import TransformerInput
from d3rlpy.dataset import Episode, TrajectoryMiniBatch
from d3rlpy.torch_utility import TorchTrajectoryMiniBatch

from benchmarks.agent.held_out_q import held_out_q, rank_correlation
from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.agent.critic import CriticConfig, MixingCritic
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import NUM_CANONICAL
from dmagent_loader.mixture.history import FeedbackStatistics, History
from dmagent_loader.training.cql.algorithm import (
    FragmentBuffer,
    Fragments,
    SimplexCQL,
    SimplexCQLConfig,
    bellman_targets,
    draw_proposals,
)
from dmagent_loader.training.cql.rewards import agent_states, returns_to_go, rewards, value_range
from dmagent_loader.training.cql.train import CQLConfig, train_cql
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.trajectories import Trajectories, TrajectoryConfig

STEPS, TOTAL = 9, 12
STATISTICS = FeedbackStatistics(mean=(-4.0, -3.0), std=(0.2, 0.5), count=100)
QUICK = CQLConfig(updates=6, warmup_updates=2, batch_size=4, window=3, log_every=3, num_proposals=2)


@pytest.fixture(scope="module")
def record() -> FeedbackRecord:
    """Random mixes and feedback, two start states, lengths from 4 to 9."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, STEPS + 1, TOTAL)
    lengths[0] = STEPS
    mixes = rng.dirichlet(np.ones(NUM_CANONICAL), (TOTAL, STEPS + 1))
    feedback = rng.normal((-4.0, -3.0), (0.2, 0.5), (TOTAL, STEPS + 1, 2))
    for number, length in enumerate(lengths):
        mixes[number, length + 1 :] = 0.0
        feedback[number, length + 1 :] = np.nan
    trajectories = Trajectories(
        mixes=mixes,
        lengths=lengths.astype(np.int64),
        candidates=np.ones(TOTAL, dtype=np.int64),
        starts=np.zeros(TOTAL, dtype=np.int64),
        target_distribution=mixes[0, 0],
        config=TrajectoryConfig(candidates_per_step=(1,), trajectories_per_set=TOTAL, steps=STEPS),
    )
    return FeedbackRecord(
        trajectories=trajectories,
        fields=("general", "math"),
        feedback=feedback,
        losses=feedback[..., 0],
        seconds=0.0,
        settings={},
    )


@pytest.fixture(scope="module")
def agent() -> MixingAgent:
    torch.manual_seed(1)
    config = AgentConfig(d_model=16, num_heads=2, d_ff=24, max_steps=STEPS, statistics=STATISTICS)
    agent = MixingAgent(config)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.mul_(6.0 if parameter.ndim == 2 else 1.0)
    return agent.eval()


def algorithm_for(agent: MixingAgent, settings: CQLConfig = QUICK) -> SimplexCQL:
    torch.manual_seed(2)
    critic = dataclasses.asdict(CriticConfig.for_agent(agent.config, low=-4.0, span=8.0))
    algorithm = SimplexCQLConfig(
        context_size=STEPS, settings=settings, agent=agent.config.to_dict(), critic=critic
    ).create()
    algorithm.create_impl((agent.config.input_dim,), NUM_CANONICAL)
    algorithm.impl.modules.policy.load_state_dict(agent.state_dict())
    return algorithm


def episode_of(record: FeedbackRecord, number: int, config: AgentConfig) -> Episode:
    received = rewards(record, number, STATISTICS)
    return Episode(
        observations=agent_states(record, number, config).astype(np.float32),
        actions=record.trajectories.mixes[number, 1 : len(received) + 1].astype(np.float32),
        rewards=received[:, None].astype(np.float32),
        terminated=True,
    )


def fragments_of(episodes: list[Episode], ends: list[int], window: int) -> Fragments:
    """Through d3rlpy's slicer and batches, as in training."""
    buffer = FragmentBuffer(episodes, NUM_CANONICAL, window, np.random.default_rng(0))
    slices = [buffer.trajectory_slicer(e, end, STEPS) for e, end in zip(episodes, ends, strict=True)]
    batch = TrajectoryMiniBatch.from_partial_trajectories(slices)
    return Fragments.of(TorchTrajectoryMiniBatch.from_batch(batch, "cpu:0"), window)


def test_rewards_telescope_to_the_gain_of_the_run(record: FeedbackRecord) -> None:
    """Eq. 6 without discount; frozen units, although the agent sees anchored feedback, which does not telescope."""
    for number, length in enumerate(record.trajectories.lengths):
        received = rewards(record, number, STATISTICS)
        gain = (record.feedback[number, length] - record.feedback[number, 0]) / np.array(STATISTICS.std)
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


@torch.no_grad()
def test_fragments_give_the_plain_agent_s_proposals(record: FeedbackRecord, agent: MixingAgent) -> None:
    """Left padding, d3rlpy's timesteps from 1 and the cut to the longest fragment must leave no trace."""
    ends = [2, 6, int(record.trajectories.lengths[2]) - 1]
    episodes = [episode_of(record, number, agent.config) for number in range(3)]
    data = fragments_of(episodes, ends, window=3)
    assert data.inputs.shape[1] == max(ends) + 1 < STEPS
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
        drawn = buffer.sample_trajectory(STEPS)
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


def test_the_actor_rests_during_warm_up_and_moves_without_touching_the_critics(
    record: FeedbackRecord, agent: MixingAgent
) -> None:
    algorithm = algorithm_for(agent)
    buffer = FragmentBuffer([episode_of(record, 0, agent.config)], NUM_CANONICAL, 3, np.random.default_rng(0))
    policy, critics = algorithm.impl.modules.policy, algorithm.impl.modules.critics
    for update in range(QUICK.warmup_updates + 1):
        assert torch.equal(policy.head.weight, agent.head.weight), f"moved before update {update}"
        algorithm.update(buffer.sample_trajectory_batch(4, STEPS))
    assert not torch.equal(policy.head.weight, agent.head.weight)
    before = [(p.detach().clone(), p.grad.clone()) for p in critics.parameters()]
    data = fragments_of([episode_of(record, 0, agent.config)], [5], window=3)
    algorithm.impl._update_actor(data, algorithm.impl.propose(data))
    for (weight, gradient), p in zip(before, critics.parameters(), strict=True):
        assert torch.equal(weight, p)
        assert torch.equal(gradient, p.grad)


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


def test_config_survives_d3rlpy_s_own_form(agent: MixingAgent) -> None:
    config = algorithm_for(agent).config
    again = SimplexCQLConfig.deserialize(config.serialize())
    assert again.settings == QUICK
    assert AgentConfig.from_dict(again.agent) == agent.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"discount": 1.5}, "discount is 1.5"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"num_critics": 0}, "num_critics is 0"),
        ({"updates": 70, "log_every": 50, "warmup_updates": 1}, "no multiple of log_every"),
        ({"warmup_updates": 1200}, "nothing of 1200 updates"),
        ({"actor_learning_rate": float("nan")}, "actor_learning_rate is nan"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        CQLConfig(**changes)


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


def test_missing_d3rlpy_names_the_extra() -> None:
    """Importing must work without it; training must say what to install."""
    code = (
        "import sys; sys.modules['d3rlpy'] = None; sys.modules['structlog'] = None\n"
        "from dmagent_loader.training import cql\n"
        "try:\n    cql._d3rlpy_contained().__enter__()\n"
        "except ImportError as error:\n    print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert "MissingExtraError" in done.stdout
    assert "dmagent-loader[rl]" in done.stdout


def test_a_training_loads_d3rlpy_and_leaves_structlog_as_it_was() -> None:
    code = (
        "import structlog\n"
        "structlog.configure(wrapper_class=structlog.BoundLogger, cache_logger_on_first_use=True)\n"
        "before = structlog.get_config()\n"
        "from dmagent_loader.training import cql\n"
        "with cql._d3rlpy_contained():\n    import d3rlpy\n    assert structlog.get_config() != before\n"
        "assert structlog.get_config() == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


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
    numbers = np.arange(TOTAL)
    config = CriticConfig.for_agent(agent.config, low=-20.0, span=40.0)
    knows, clock = {}, {}
    for number in numbers:
        returns = returns_to_go(rewards(record, int(number), STATISTICS), 0.9)
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
    received = rewards(record, 2, STATISTICS)
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


def test_rank_correlation_against_scipy() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 50).astype(float), rng.normal(size=50)
    assert rank_correlation(x, x + y) == pytest.approx(scipy_stats.spearmanr(x, x + y).statistic)
    assert np.isnan(rank_correlation(np.ones(3), y[:3]))
