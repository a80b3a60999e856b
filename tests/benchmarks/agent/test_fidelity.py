"""Rank correlations between sizes: the sample is fair, the statistics are right, and a killed run goes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from torch import Tensor

from benchmarks.agent.fidelity import (
    FidelityConfig,
    agreement,
    fidelity_table,
    score_trajectories,
    spread_sample,
    with_mean,
)
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.proxies.feedback import FeedbackConfig
from dmagent_loader.training.proxies.questions import ProxyQuestions
from dmagent_loader.training.proxies.trainer import ProxyTrainer
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.trajectories import Trajectories


def test_the_sample_has_each_set_and_each_start_state_equally_often(trajectories: Trajectories) -> None:
    """Catches every k-th trajectory: with start states in turn, all of them would start from the same one."""
    rng = np.random.default_rng(0)
    many = dataclasses.replace(
        trajectories,
        mixes=np.zeros((4 * 96, 1, 52)),
        lengths=rng.integers(50, 81, 4 * 96),
        candidates=np.repeat([1, 100, 1000, 10_000], 96),
        starts=np.arange(4 * 96) % 4,
        config=dataclasses.replace(
            trajectories.config, candidates_per_step=(1, 100, 1000, 10_000), trajectories_per_set=96
        ),
    )
    numbers = spread_sample(many, 6)
    assert len(set(numbers)) == 24
    assert np.array_equal(numbers, np.sort(numbers))
    assert np.unique(many.candidates[numbers], return_counts=True)[1].tolist() == [6, 6, 6, 6]
    assert np.unique(many.starts[numbers], return_counts=True)[1].tolist() == [6, 6, 6, 6]
    assert many.lengths[numbers].std() > 0.5 * many.lengths.std()
    assert np.array_equal(spread_sample(many, 96), np.arange(4 * 96))
    with pytest.raises(ConfigurationError, match="97 trajectories of each set were requested"):
        spread_sample(many, 97)


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_those_of_scipy(ties: bool) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=24)
    y, z = x + rng.normal(size=24), x + rng.normal(size=24)
    if ties:
        x, y = x.round(), y.round()
    found = agreement(x, y, z)
    assert np.isclose(found.spearman, stats.spearmanr(x, y).statistic)
    assert np.isclose(found.kendall, stats.kendalltau(x, y).statistic)
    residual = [
        r - np.polyval(np.polyfit(stats.rankdata(z), r, 1), stats.rankdata(z))
        for r in (stats.rankdata(x), stats.rankdata(y))
    ]
    assert np.isclose(found.partial, np.corrcoef(*residual)[0, 1])
    assert found.low < found.spearman < found.high


def test_the_interval_is_wider_with_fewer_trajectories_and_missing_scores_are_left_out() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=100)
    y, z = x + rng.normal(size=100), rng.normal(size=100)
    many = agreement(x, y, z)
    x[10:] = np.nan
    few = agreement(x, y, z)
    assert (many.count, few.count) == (100, 10)
    assert few.high - few.low > 2 * (many.high - many.low)
    x[3:] = np.nan
    with pytest.raises(ConfigurationError, match="3 trajectories have both scores"):
        agreement(x, y, z)


def test_the_mean_is_over_standardised_fields() -> None:
    """Catches a plain mean, in which the field with the wider range decides."""
    feedback = np.stack([np.array([[0.0, 1.0], [2.0, np.nan]]), np.array([[0.0, -100.0], [-200.0, np.nan]])], axis=-1)
    mean = with_mean(feedback)[..., 2]
    assert np.allclose(mean[np.isfinite(mean)], 0.0)
    assert np.isfinite(mean).sum() == 3


def test_a_size_of_its_own_is_scored_along_the_same_mixes(
    collected: FeedbackRecord,
    corpus: Corpus,
    questions: ProxyQuestions,
    bases: dict[str, Tensor],
    small: FeedbackConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The recorded size with the recorded seeds gives the recorded scores: catches another base, rows or order."""
    config = FidelityConfig(feedback=small, evaluate_every=3)
    scores = score_trajectories(collected.trajectories, corpus, questions, config, tmp_path, progress=False)
    taken = np.isfinite(scores).all(axis=-1)
    assert np.allclose(scores[taken], collected.feedback[taken], atol=1e-5)
    for row, length in zip(taken, collected.trajectories.lengths, strict=True):
        assert row[[0, length]].all()
        assert not row[length + 1 :].any()
    assert taken.sum() < np.isfinite(collected.feedback).all(axis=-1).sum()

    monkeypatch.setattr(ProxyTrainer, "train", lambda self, rows: pytest.fail("finished work was done again"))
    again = score_trajectories(collected.trajectories, corpus, questions, config, tmp_path, progress=False)
    assert np.array_equal(again, scores, equal_nan=True)
    wider = dataclasses.replace(small, proxy=dataclasses.replace(small.proxy, width=32))
    with pytest.raises(StateError, match="holds base models of other proxy"):
        score_trajectories(
            collected.trajectories, corpus, questions, FidelityConfig(feedback=wider), tmp_path, progress=False
        )


def test_the_table_compares_each_two_sizes_where_both_have_scores(collected: FeedbackRecord) -> None:
    """One size against itself agrees fully, against its negative not at all."""
    same = collected.feedback.copy()
    same[:, 1] = np.nan
    table = fidelity_table(
        collected.trajectories,
        {"a": collected.feedback, "b": same, "c": -collected.feedback},
        ("general", "math"),
        steps=(2,),
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(rows) == 3 * 3 * 3
    for row in rows:
        assert row[3] == "10"
        expected = "1.00" if row[0] == "a, b" else "-1.00"
        assert (row[4], row[6]) == (expected, expected), row
    assert [row[1] for row in rows[:9:3]] == ["at the end", "gain at the end", "gain at step 2"]
