"""Algorithm 1: what every trajectory keeps, and what the score and the number of candidates do to it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.mixture.domains import CANONICAL_TOPICS, NUM_CANONICAL
from dmagent_loader.mixture.simplex import FloatArray, js_divergence
from dmagent_loader.training.trajectories import (
    Trajectories,
    TrajectoryConfig,
    mean_total_variation,
    propose,
    sample_trajectories,
    score,
)

TOPICS = len(CANONICAL_TOPICS)
CONFIG = TrajectoryConfig(
    candidates_per_step=(1, 100, 1000), trajectories_per_set=6, steps=12, tokens_per_step=1000, target_tokens=5000
)


def ends() -> tuple[FloatArray, FloatArray]:
    rng = np.random.default_rng(0)
    start, target = np.zeros(NUM_CANONICAL), np.zeros(NUM_CANONICAL)
    start[:TOPICS], target[TOPICS:] = rng.dirichlet(np.ones(TOPICS)), rng.dirichlet(np.full(TOPICS, 0.3))
    return start, target


def states_and_target() -> tuple[FloatArray, FloatArray]:
    """Two start states: the natural one, and one that is skewed."""
    start, target = ends()
    skewed = np.zeros(NUM_CANONICAL)
    skewed[:3] = 0.7, 0.2, 0.1
    return np.stack([start, skewed]), target


@pytest.fixture(scope="module")
def drawn() -> Trajectories:
    return sample_trajectories(*states_and_target(), CONFIG)


def test_every_mix_is_on_the_simplex_and_rows_after_the_end_are_zero(drawn: Trajectories) -> None:
    for mixes, length in zip(drawn.mixes, drawn.lengths, strict=True):
        assert np.allclose(mixes[: length + 1].sum(axis=1), 1.0)
        assert (mixes >= 0).all()
        assert not mixes[length + 1 :].any()


def test_trajectories_of_each_set_take_the_start_states_in_turn(drawn: Trajectories) -> None:
    """Catches turns over all sets, by which an odd set would give the next another split."""
    states = states_and_target()[0]
    odd = sample_trajectories(*states_and_target(), dataclasses.replace(CONFIG, trajectories_per_set=3, steps=1))
    assert odd.starts.tolist() == [0, 1, 0] * 3
    assert drawn.starts.tolist() == [0, 1] * 9
    assert np.array_equal(drawn.mixes[:, 0], states[drawn.starts])


def test_source_topics_are_proposed_from_the_own_start_state() -> None:
    """From the skewed start there is little of other source topics; catches one start state for all proposals."""
    many = sample_trajectories(
        *states_and_target(), dataclasses.replace(CONFIG, candidates_per_step=(1,), trajectories_per_set=40)
    )
    others = many.mixes[:, 1:, 3:TOPICS].sum(axis=-1) / many.mixes[:, 1:, :TOPICS].sum(axis=-1).clip(1e-9)
    of_state = [
        np.concatenate([others[m, : many.lengths[m]] for m in np.flatnonzero(many.starts == s)]) for s in (0, 1)
    ]
    assert of_state[0].mean() > 2 * of_state[1].mean()


def test_diversity_moves_trajectories_apart() -> None:
    """Catches a term with the wrong sign, or one that sees only the trajectory before."""
    config = dataclasses.replace(CONFIG, candidates_per_step=(100,), trajectories_per_set=10, target_tokens=10**9)
    spread = []
    for weight in (0.0, 3.0):
        paths = sample_trajectories(*states_and_target(), dataclasses.replace(config, diversity_weight=weight)).mixes
        spread.append(np.mean([np.abs(paths[i] - paths[j]).sum(axis=1).mean() for i in range(10) for j in range(i)]))
    assert spread[1] > 1.2 * spread[0]
    alone = sample_trajectories(
        *states_and_target(), dataclasses.replace(config, diversity_weight=3.0, trajectories_per_set=1)
    )
    without = sample_trajectories(
        *states_and_target(), dataclasses.replace(config, diversity_weight=0.0, trajectories_per_set=1)
    )
    assert np.array_equal(alone.mixes, without.mixes), "the first trajectory has none to keep away from"


@given(seed=st.integers(0, 2**32 - 1), num=st.integers(1, 20), earlier=st.integers(1, 20), ties=st.booleans())
@settings(max_examples=60, deadline=None)
def test_mean_total_variation_is_the_mean_over_all_pairs(seed: int, num: int, earlier: int, ties: bool) -> None:
    """The plain loop; catches wrong sums at ties, at zeros, and outside the range of the earlier mixes."""
    rng = np.random.default_rng(seed)
    candidates, mixes = rng.dirichlet(np.full(7, 0.3), num), rng.dirichlet(np.full(7, 0.3), earlier)
    if ties:
        candidates, mixes = candidates.round(1), mixes.round(1)
        candidates[0] = mixes[-1]
    expected = [np.mean([0.5 * np.abs(c - e).sum() for e in mixes]) for c in candidates]
    assert np.allclose(mean_total_variation(candidates, mixes), expected, atol=1e-12)


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
    only = sample_trajectories(*states_and_target(), dataclasses.replace(CONFIG, candidates_per_step=(100,)))
    assert np.array_equal(only.mixes, drawn.mixes[drawn.members(100)])
    other = sample_trajectories(*states_and_target(), dataclasses.replace(CONFIG, candidates_per_step=(100,), seed=1))
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


def test_a_subset_is_a_set_of_its_own(drawn: Trajectories) -> None:
    """Catches settings that still speak of the whole set, and numbers in the order in which they were given."""
    numbers = [17, 0, 3, 12]
    some = drawn.subset(numbers)
    assert np.array_equal(some.mixes, drawn.mixes[sorted(numbers)])
    assert np.array_equal(some.lengths, drawn.lengths[sorted(numbers)])
    assert some.candidates.tolist() == [1, 1, 1000, 1000]
    assert some.starts.tolist() == [0, 1, 0, 1]
    assert (some.config.candidates_per_step, some.config.trajectories_per_set) == ((1, 1000), 2)
    assert some.members(1000).tolist() == [2, 3]
    for wrong in ([], [0, 0], [-1], [18]):
        with pytest.raises(ConfigurationError, match="not distinct numbers of 18 trajectories"):
            drawn.subset(wrong)
    with pytest.raises(ConfigurationError, match=r"\{1: 2, 100: 1\} trajectories: choose the same number"):
        drawn.subset([0, 1, 6])


def test_files_of_another_schema_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"mixes": np.zeros(1)}, str(path), metadata={"schema": "99"})
    with pytest.raises(StateError, match="schema 99, not trajectories/2"):
        Trajectories.load(path)


def test_what_is_no_start_state_is_refused() -> None:
    start, target = ends()
    with pytest.raises(ConfigurationError, match="all must be 1"):
        sample_trajectories(target[None], start, CONFIG)
    with pytest.raises(ConfigurationError, match="0 to 1 of their weight on source domains"):
        sample_trajectories(np.stack([start, target]), target, CONFIG)
    for states in (start, start[None, :10]):
        with pytest.raises(ConfigurationError, match="over the canonical domains"):
            sample_trajectories(states, target, CONFIG)
    with pytest.raises(ConfigurationError, match="positive numbers"):
        dataclasses.replace(CONFIG, steps=0)
    with pytest.raises(ConfigurationError, match="the sets are"):
        sample_trajectories(start[None], target, dataclasses.replace(CONFIG, candidates_per_step=(1,))).members(7)


def test_shortened_trajectories_are_the_first_steps_of_each(drawn: Trajectories) -> None:
    steps = int(drawn.lengths.min())
    some = drawn.shortened(steps)
    assert np.array_equal(some.mixes, drawn.mixes[:, : steps + 1])
    assert (some.lengths == steps).all()
    assert some.config.steps == steps
    assert np.array_equal(drawn.shortened(drawn.config.steps + 5).lengths, drawn.lengths)
    with pytest.raises(ConfigurationError, match="shortened to 0 steps"):
        drawn.shortened(0)
