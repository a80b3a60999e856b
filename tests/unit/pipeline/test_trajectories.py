"""Algorithm 1: what every trajectory keeps, and what the score and the number of candidates do to it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dmagent_loader.domains import CANONICAL_TOPICS, NUM_CANONICAL
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.pipeline.trajectories import Trajectories, TrajectoryConfig, propose, sample_trajectories, score
from dmagent_loader.simplex import FloatArray, js_divergence

TOPICS = len(CANONICAL_TOPICS)
CONFIG = TrajectoryConfig(
    candidates_per_step=(1, 100, 1000), trajectories_per_set=6, steps=12, tokens_per_step=1000, target_tokens=5000
)


def ends() -> tuple[FloatArray, FloatArray]:
    rng = np.random.default_rng(0)
    start, target = np.zeros(NUM_CANONICAL), np.zeros(NUM_CANONICAL)
    start[:TOPICS], target[TOPICS:] = rng.dirichlet(np.ones(TOPICS)), rng.dirichlet(np.full(TOPICS, 0.3))
    return start, target


@pytest.fixture(scope="module")
def drawn() -> Trajectories:
    return sample_trajectories(*ends(), CONFIG)


def test_every_mix_is_on_the_simplex_and_rows_after_the_end_are_zero(drawn: Trajectories) -> None:
    for mixes, length in zip(drawn.mixes, drawn.lengths, strict=True):
        assert np.allclose(mixes[: length + 1].sum(axis=1), 1.0)
        assert (mixes >= 0).all()
        assert not mixes[length + 1 :].any()
        assert np.array_equal(mixes[0], ends()[0])


def test_a_trajectory_ends_with_the_step_that_uses_up_the_target_data(drawn: Trajectories) -> None:
    """Catches a stop one step early or late, and one that counts all tokens."""
    ended_early = 0
    for mixes, length in zip(drawn.mixes, drawn.lengths, strict=True):
        used = np.cumsum(mixes[1 : length + 1, TOPICS:].sum(axis=1)) * CONFIG.tokens_per_step
        assert (used[:-1] < CONFIG.target_tokens).all()
        assert length == CONFIG.steps or used[-1] >= CONFIG.target_tokens
        ended_early += length < CONFIG.steps
    assert ended_early > 0


def test_the_score_decides_more_the_more_candidates_there_are(drawn: Trajectories) -> None:
    """With one candidate a path is a random walk; with a thousand it is smooth and nears the target distribution."""
    change, distance = [], []
    for candidates in CONFIG.candidates_per_step:
        paths = [drawn.mixes[m, 1 : drawn.lengths[m] + 1] for m in drawn.members(candidates)]
        change.append(np.mean([js_divergence(path[1:], path[:-1]).mean() for path in paths]))
        distance.append(np.mean([js_divergence(path[-1], drawn.target_distribution) for path in paths]))
    assert change[0] > 2 * change[2]
    assert distance[0] > distance[1]
    assert distance[0] > distance[2]


def test_the_seed_fixes_all_draws_and_a_set_does_not_depend_on_the_others(drawn: Trajectories) -> None:
    only = sample_trajectories(*ends(), dataclasses.replace(CONFIG, candidates_per_step=(100,)))
    assert np.array_equal(only.mixes, drawn.mixes[drawn.members(100)])
    other = sample_trajectories(*ends(), dataclasses.replace(CONFIG, candidates_per_step=(100,), seed=1))
    assert not np.array_equal(other.mixes, only.mixes)


def test_the_score_is_the_three_terms_with_their_weights() -> None:
    """Against plain loops over logarithms: catches swapped weights, KL for JS, and a pull that does not grow with t."""
    rng = np.random.default_rng(3)
    candidates, previous, earlier = (
        rng.dirichlet(np.ones(52), 4),
        rng.dirichlet(np.ones(52)),
        rng.dirichlet(np.ones(52), 3),
    )
    target = ends()[1]

    def js(p: FloatArray, q: FloatArray) -> float:
        total = 0.0
        for a, b in zip(p, q, strict=True):
            middle = (a + b) / 2
            total += (a * math.log(a / middle) if a > 0 else 0.0) + (b * math.log(b / middle) if b > 0 else 0.0)
        return total / 2

    for progress in (0.25, 1.0):
        expected = [
            -1.0 * js(c, previous)
            - 2.0 * progress * js(c, target)
            + 0.3 * sum(0.5 * np.abs(c - e).sum() for e in earlier) / 3
            for c in candidates
        ]
        assert np.allclose(score(candidates, previous, target, earlier, progress, CONFIG), expected)
    without = score(candidates, previous, target, np.zeros((0, 52)), 1.0, CONFIG)
    assert np.isfinite(without).all()


def test_proposals_reach_every_target_share() -> None:
    """A Dirichlet over all 52 domains never leaves the middle: its target share is 0.50 +- 0.07."""
    start, target = ends()
    drawn = propose(np.random.default_rng(0), start, start[:TOPICS], target[TOPICS:], 5000, 0.02)
    share = drawn[:, TOPICS:].sum(axis=1)
    assert np.allclose(drawn.sum(axis=1), 1.0)
    assert share.min() < 0.01
    assert share.max() > 0.9
    assert np.median(np.abs(drawn - start).sum(axis=1)) < 1.0


def test_a_saved_file_loads_bit_for_bit_with_its_settings(drawn: Trajectories, tmp_path: Path) -> None:
    path = tmp_path / "trajectories.safetensors"
    drawn.save(path)
    loaded = Trajectories.load(path)
    assert loaded.config == CONFIG
    assert loaded.fingerprint == drawn.fingerprint
    assert np.array_equal(loaded.candidates, drawn.candidates)
    assert np.array_equal(loaded.target_distribution, drawn.target_distribution)


def test_files_of_another_schema_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"mixes": np.zeros(1)}, str(path), metadata={"schema": "99"})
    with pytest.raises(StateError, match="schema 99, not trajectories/1"):
        Trajectories.load(path)


def test_what_is_no_start_state_is_refused() -> None:
    start, target = ends()
    with pytest.raises(ConfigurationError, match="both must be 1"):
        sample_trajectories(target, start, CONFIG)
    with pytest.raises(ConfigurationError, match="52 canonical"):
        sample_trajectories(start[:10], target, CONFIG)
    with pytest.raises(ConfigurationError, match="positive numbers"):
        dataclasses.replace(CONFIG, steps=0)
    with pytest.raises(ConfigurationError, match="the sets are"):
        sample_trajectories(start, target, dataclasses.replace(CONFIG, candidates_per_step=(1,))).members(7)
