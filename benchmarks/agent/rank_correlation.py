"""Spearman's rank correlation of many samples at once."""

from __future__ import annotations

import warnings

import numpy as np
from scipy import stats

from dmagent_loader.mixture.simplex import FloatArray


def spearman(x: FloatArray, y: FloatArray) -> FloatArray:
    """Rank correlation over the last axis, (..., N), (..., N) -> (...); NaN where all values of a sample are equal.

    Example:
        >>> float(spearman(np.array([1.0, 2.0, 9.0]), np.array([0.1, 0.3, 0.2])).round(3))
        0.5
    """
    ranks = (stats.rankdata(values, axis=-1) for values in (x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return np.asarray(stats.pearsonr(*ranks, axis=-1).statistic, dtype=np.float64)
