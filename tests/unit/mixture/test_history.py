"""Histories, feedback, and the three ways of standardising, each by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dmagent_loader.errors import ConfigurationError, FeedbackError
from dmagent_loader.mixture.history import FeedbackStatistics, History, standardize, validate_feedback

STATISTICS = FeedbackStatistics(mean=(-5.0, -4.0), std=(0.5, 2.0), count=100)
FEEDBACK = np.array([[-3.0, -8.0], [-2.0, -8.0], [-4.0, -2.0]])


def test_frozen_subtracts_the_training_mean_and_divides_by_the_training_spread() -> None:
    expected = [[4.0, -2.0], [6.0, -2.0], [2.0, 1.0]]
    np.testing.assert_allclose(standardize(FEEDBACK, STATISTICS, "frozen"), expected)


def test_anchored_starts_at_zero_and_blends_the_spreads() -> None:
    """variance_t = (n0 s^2 + SS_t) / (n0 + t), t = 0, 1, 2; SS about the first feedback."""
    got = standardize(FEEDBACK, STATISTICS, "anchored", prior_weight=10.0)
    first = [0.0, 1.0 / np.sqrt((2.5 + 1.0) / 11), -1.0 / np.sqrt((2.5 + 2.0) / 12)]
    second = [0.0, 0.0, 6.0 / np.sqrt((40.0 + 36.0) / 12)]
    np.testing.assert_allclose(got, np.column_stack([first, second]))


def test_running_uses_the_runs_own_mean_and_one_observation_of_the_training_spread() -> None:
    """Means -3, -2.5, -3; sums of squares about them 0, 0.5, 2; variance (s^2 + SS_n) / n."""
    got = standardize(FEEDBACK, STATISTICS, "running")
    first = [0.0, 0.5 / np.sqrt((0.25 + 0.5) / 2), -1.0 / np.sqrt((0.25 + 2.0) / 3)]
    second = [0.0, 0.0, 4.0 / np.sqrt((4.0 + 24.0) / 3)]
    np.testing.assert_allclose(got, np.column_stack([first, second]))


def test_a_constant_feedback_is_zero_and_never_divides_by_zero() -> None:
    flat = np.full((5, 2), -7.3)
    for mode in ("anchored", "running"):
        np.testing.assert_allclose(standardize(flat, STATISTICS, mode), 0.0, atol=1e-6)


def test_wrong_shapes_and_modes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="statistics are for 2 fields"):
        standardize(np.zeros((4, 3)), STATISTICS, "frozen")
    with pytest.raises(ConfigurationError, match="unknown standardization 'batch'"):
        standardize(FEEDBACK, STATISTICS, "batch")  # type: ignore[arg-type]


def test_statistics_are_of_all_recorded_values() -> None:
    statistics = FeedbackStatistics.of(FEEDBACK)
    assert statistics.mean == pytest.approx((-3.0, -6.0))
    assert statistics.std == pytest.approx((np.sqrt(2 / 3), np.sqrt(8.0)))
    assert statistics.count == 3
    standard = standardize(FEEDBACK, statistics, "frozen")
    np.testing.assert_allclose(standard.mean(axis=0), 0.0, atol=1e-12)
    np.testing.assert_allclose(standard.std(axis=0), 1.0)


@pytest.mark.parametrize(
    ("mean", "std"), [((0.0,), (1.0, 1.0)), ((0.0,), (0.0,)), ((0.0,), (-1.0,)), ((float("nan"),), (1.0,))]
)
def test_statistics_that_cannot_scale_are_refused(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(ConfigurationError):
        FeedbackStatistics(mean=mean, std=std, count=1)


def test_feedback_is_ordered_by_field_and_refused_if_it_does_not_fit() -> None:
    assert validate_feedback({"math": -2.0, "general": -3.0}, ("general", "math")).tolist() == [-3.0, -2.0]
    for wrong in ({"general": -3.0}, {"general": -3.0, "math": -2.0, "law": -1.0}, {}):
        with pytest.raises(FeedbackError, match="this run's fields are"):
            validate_feedback(wrong, ("general", "math"))
    with pytest.raises(FeedbackError, match=r"not finite: \{'math': nan\}"):
        validate_feedback({"general": -3.0, "math": float("nan")}, ("general", "math"))


def test_a_history_grows_by_steps_and_leaves_the_old_one_as_it_was() -> None:
    start = History(domains=("a", "b"), fields=("f",), mixes=np.array([[0.5, 0.5]]), feedback=np.array([[-3.0]]))
    longer = start.extended(np.array([0.25, 0.75]), np.array([-2.0]))
    assert (len(start), len(longer)) == (1, 2)
    assert longer.mixes.tolist() == [[0.5, 0.5], [0.25, 0.75]]
    assert longer.feedback.tolist() == [[-3.0], [-2.0]]


def test_a_history_of_other_shapes_is_refused() -> None:
    good = History(domains=("a", "b"), fields=("f",), mixes=np.zeros((3, 2)), feedback=np.zeros((3, 1)))
    with pytest.raises(ConfigurationError, match=r"mixes have shape \(3, 1\)"):
        dataclasses.replace(good, mixes=np.zeros((3, 1)))
    with pytest.raises(ConfigurationError, match="one row for each mix"):
        dataclasses.replace(good, feedback=np.zeros((2, 1)))
