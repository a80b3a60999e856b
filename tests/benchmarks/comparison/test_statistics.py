"""Statistics of paired scores, on numbers that can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.comparison.statistics import improvement, interquartile_mean, mean_over_tasks, over_runs, paired


def test_differences_are_of_the_same_task_and_stream() -> None:
    one = {"a": {0: 1.0, 1: 2.0}, "b": {0: 3.0}, "c": {0: 1.0}}
    other = {"a": {1: 0.5, 2: 9.0}, "b": {0: 1.0}}
    assert paired(one, other) == {"a": {1: 1.5}, "b": {0: 2.0}}


def test_the_interquartile_mean_leaves_out_a_quarter_on_each_side() -> None:
    assert interquartile_mean(np.array([100.0, 1.0, 2.0, -50.0])) == pytest.approx(1.5)
    # Of six values, the middle half is the third and fourth, and half of the second and fifth.
    assert interquartile_mean(np.arange(6.0) ** 2) == pytest.approx((0.5 * 1 + 4 + 9 + 0.5 * 16) / 3)


def test_ties_count_half() -> None:
    assert improvement(np.array([1.0, 0.0, -2.0, 3.0])) == pytest.approx(2.5 / 4)


def test_the_error_is_over_tasks_and_not_over_runs() -> None:
    """Fifty streams of two tasks are two tasks."""
    scores = {"a": dict.fromkeys(range(50), 1.0), "b": dict.fromkeys(range(50), 3.0)}
    found = mean_over_tasks(scores, {"a": "all", "b": "all"})
    assert (found.value, found.error, found.tasks) == (2.0, 1.0, 2)
    assert (found.low, found.high) == (1.0, 3.0)


def test_a_stratum_keeps_its_number_of_tasks() -> None:
    """Without strata, some draws hold one of the two tasks alone."""
    scores = {"a": {0: 0.0}, "b": {0: 10.0}}
    found = mean_over_tasks(scores, {"a": "plain", "b": "perturbed"})
    assert found.low == found.high == 5.0


@pytest.mark.slow
def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(20):
        means = rng.normal(0.3, 1.0, 24)
        scores = {str(i): {s: float(m + rng.normal(0, 0.5)) for s in range(2)} for i, m in enumerate(means)}
        found = over_runs(scores, dict.fromkeys(scores, "all"), lambda values: float(values.mean()), seed=trial)
        covered += found.low <= 0.3 <= found.high
    assert covered >= 16
