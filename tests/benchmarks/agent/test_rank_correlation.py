"""Spearman's correlation of many samples is that of each alone."""

from __future__ import annotations

import warnings

import numpy as np
from scipy import stats

from benchmarks.agent.rank_correlation import spearman


def test_each_sample_has_the_correlation_of_scipy_with_ties() -> None:
    """Catches ranks over all samples together, and ties that get different ranks."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 6, (7, 50)).astype(float)
    y = x + rng.normal(size=(7, 50))
    expected = [stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(spearman(x, y), expected)
    assert spearman(x[0], y[0]).shape == ()


def test_equal_values_have_no_correlation_and_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = spearman(np.array([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]]), np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]))
    assert np.isnan(found[0])
    assert np.isclose(found[1], 1.0)
