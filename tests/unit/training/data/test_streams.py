"""Data streams: rows follow the mix, and are a pure function of trajectory and step."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import NUM_CANONICAL
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.data.streams import MixStream, TrajectoryStream, deliverable

ROW, EMPTY = 8, 30


def path(steps: int = 5) -> FloatArray:
    return np.random.default_rng(2).dirichlet(np.full(NUM_CANONICAL, 0.3), steps + 1)


def stream(corpus: Corpus, mixes: FloatArray, number: int = 0, rows: int = 40) -> TrajectoryStream:
    return TrajectoryStream(corpus, mixes, rows_per_step=rows, row_tokens=ROW, seed=0, number=number)


def test_each_row_is_text_of_its_domain(corpus: Corpus) -> None:
    """In this corpus domain d holds the tokens 2 d and 2 d + 1 only."""
    rows = stream(corpus, path())
    for step in range(1, 6):
        tokens = rows.rows(step)
        assert tokens.shape == (40, ROW + 1)
        assert np.array_equal(tokens // 2, np.repeat(rows.domains(step)[:, None], ROW + 1, axis=1))


def test_row_counts_follow_the_mix_of_the_step_to_within_one(corpus: Corpus) -> None:
    """Catches independent draws, and the mix of the step before."""
    mixes = path()
    rows = stream(corpus, mixes)
    for step in range(1, 6):
        counts = np.bincount(rows.domains(step), minlength=NUM_CANONICAL)
        assert np.abs(counts - 40 * deliverable(mixes[step], corpus.num_tokens)).max() < 1 + 1e-9


def test_shares_far_below_one_row_still_get_rows_in_the_long_run(corpus: Corpus) -> None:
    """Rounding every step's counts would starve them for ever."""
    mix = np.zeros(NUM_CANONICAL)
    mix[:2] = 0.995, 0.005
    rows = stream(corpus, np.tile(mix, (401, 1)), rows=20)
    seen = sum(int((rows.domains(step) == 1).sum()) for step in range(1, 401))
    assert 20 <= seen <= 60


def test_a_step_can_be_read_alone_and_again(corpus: Corpus) -> None:
    """What makes a run resumable without saving the stream; catches hidden state."""
    mixes = path()
    whole = stream(corpus, mixes)
    forward = [whole.rows(step) for step in range(1, 6)]
    assert np.array_equal(stream(corpus, mixes).rows(4), forward[3])
    assert np.array_equal(stream(corpus, mixes[:5]).rows(4), forward[3])
    assert not np.array_equal(stream(corpus, mixes, number=1).rows(4), forward[3])


def test_the_rows_of_a_seed_stay_what_they_were(corpus: Corpus) -> None:
    """Recorded sets name only the seed and the number of their streams; a golden sum holds the rows behind them."""
    tokens = stream(corpus, path(), number=3).rows(4)
    assert int((tokens * np.arange(tokens.size).reshape(tokens.shape)).sum()) == 3012857


def test_one_mix_after_the_other_gives_the_rows_of_the_trajectory(corpus: Corpus) -> None:
    """Catches counts of rows that begin anew at each step, and orders that depend on when a domain is first read."""
    mixes = path(12)
    whole = stream(corpus, mixes, number=2)
    steps = MixStream(corpus, rows_per_step=40, row_tokens=ROW, seed=0, number=2)
    for step in range(1, 13):
        assert np.array_equal(steps.next(mixes[step]), whole.rows(step))
    resumed = MixStream(corpus, rows_per_step=40, row_tokens=ROW, seed=0, number=2)
    for step in range(1, 12):
        assert np.array_equal(resumed.skip(mixes[step]), whole.domains(step))
    assert np.array_equal(resumed.next(mixes[12]), whole.rows(12))


def test_two_mixes_of_one_number_read_the_same_rows_of_a_domain_first(corpus: Corpus) -> None:
    """What pairs two policies; catches an order that depends on the mixes."""
    halves = np.zeros((2, NUM_CANONICAL))
    halves[0, [3, 40]] = 0.25, 0.75
    halves[1, [3, 7]] = 0.75, 0.25
    few, many = (MixStream(corpus, rows_per_step=40, row_tokens=ROW, seed=0, number=5).next(mix) for mix in halves)
    of_domain = [rows[rows[:, 0] // 2 == 3] for rows in (few, many)]
    assert (len(of_domain[0]), len(of_domain[1])) == (10, 30)
    assert np.array_equal(of_domain[0], of_domain[1][:10])


def test_rows_of_a_domain_do_not_repeat_before_it_is_used_up(corpus: Corpus) -> None:
    distinct = dataclasses.replace(corpus, tokens=np.arange(len(corpus.tokens)).astype(np.uint16))
    mix = np.zeros(NUM_CANONICAL)
    mix[5] = 1.0
    available = (distinct.num_tokens[5] - 1) // ROW
    rows = stream(distinct, np.tile(mix, (4, 1)), rows=available // 2)
    first = np.concatenate([rows.rows(1), rows.rows(2)])[:, 0]
    assert len(set(first)) == 2 * (available // 2)
    assert set(rows.rows(3)[:, 0]) <= set(first) | set(distinct.bounds[5] + ROW * np.arange(available))


def test_the_weight_of_an_empty_domain_stays_in_its_field(corpus: Corpus) -> None:
    mix = np.full(NUM_CANONICAL, 1 / NUM_CANONICAL)
    given = deliverable(mix, corpus.num_tokens)
    assert given[EMPTY] == 0
    assert np.isclose(given[26:].sum(), 0.5)
    assert np.allclose(given[:26], mix[:26])
    only = np.zeros(NUM_CANONICAL)
    only[EMPTY] = 1.0
    assert np.isclose(deliverable(only, corpus.num_tokens)[26:].sum(), 1.0)


def test_weight_on_a_field_without_data_is_refused(corpus: Corpus) -> None:
    available = corpus.num_tokens.copy()
    available[26:] = 0
    with pytest.raises(ConfigurationError, match="'target'"):
        deliverable(np.full(NUM_CANONICAL, 1 / NUM_CANONICAL), available)
