"""Calibration of the surrogate on recorded runs, and its validation on runs that the calibration did not see.

Shapes: E environments, K = 2 fields (keep, acquire), D = 52 domains, R runs, M trajectories, T steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import spearmanr

from dmagent_loader.mixture.domains import NUM_TOPICS
from dmagent_loader.mixture.simplex import FloatArray, IntArray
from dmagent_loader.training.plus.calibration import Calibration
from dmagent_loader.training.record import FeedbackRecord

SHARPNESS = (0.5, 0.75, 1.0, 1.5, 2.0, 2.5)
FORGETTING = (-4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0)
KAPPA = (0.003, 0.01, 0.03, 0.1)
"""Candidates for b, for delta of the field to keep, and for kappa."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Constants of the surrogate; see `surrogate`.

    Args:
        sharpness: (K,), b.
        target_offset: (K,), delta; 0 for the field to acquire.
        kappa: (K,).
        scale: (E, K), a of each environment for a final gain; NaN: the environment was left out.
        offset: (E, K), c, likewise.
    """

    sharpness: FloatArray
    target_offset: FloatArray
    kappa: FloatArray
    scale: FloatArray
    offset: FloatArray


def standardised_truth(calibration: Calibration) -> FloatArray:
    """z of the surrogate: (E, K, D), NaN where there is no text."""
    truth = calibration.truth
    mean = np.nanmean(truth, axis=-1, keepdims=True)
    return np.asarray((truth - mean) / np.nanstd(truth, axis=-1, keepdims=True))


def values(z: FloatArray, sharpness: float, target_offset: float) -> FloatArray:
    """v of one field: (D,) -> (D,), mean 1 over the domains with text, 0 without."""
    is_target = np.arange(len(z)) >= NUM_TOPICS
    raised = np.exp(sharpness * np.nan_to_num(z) + target_offset * is_target)
    raised = np.where(np.isnan(z), 0.0, raised)
    return np.asarray(raised / raised[raised > 0].mean())


def fit(calibration: Calibration, environments: Sequence[int]) -> Fit:
    """b, delta and kappa common to some environments, chosen by grid; a and c of each environment by least squares.

    Args:
        calibration: The record.
        environments: Numbers of the environments to fit.
    """
    z = standardised_truth(calibration)
    chosen = []
    for k in (0, 1):
        offsets = FORGETTING if k == 0 else (0.0,)
        grid = itertools.product(SHARPNESS, offsets, KAPPA)

        def explained(settings: tuple[float, float, float], k: int = k) -> float:
            return float(np.mean([_explained(calibration, z, e, k, settings) for e in environments]))

        chosen.append(max(grid, key=explained))
    count = len(calibration.environments)
    scale, offset = (np.full((count, 2), np.nan) for _ in range(2))
    for e, k in itertools.product(environments, (0, 1)):
        scale[e, k], offset[e, k] = np.polyfit(*_points(calibration, z, e, k, chosen[k]), 1)
    sharpness, target_offset, kappa = np.array(chosen).T
    return Fit(sharpness=sharpness, target_offset=target_offset, kappa=kappa, scale=scale, offset=offset)


def with_levels(constants: Fit, calibration: Calibration) -> Fit:
    """The same constants with a and c of all environments; tasks of environments that were not fitted need these.

    They come from a fit of all environments, whose b, delta and kappa may differ from those of `constants`.
    """
    everywhere = fit(calibration, range(len(calibration.environments)))
    return replace(constants, scale=everywhere.scale, offset=everywhere.offset)


def rank_correlations(calibration: Calibration, constants: Fit, environments: Sequence[int]) -> FloatArray:
    """Spearman correlation of predicted and real final gains over the runs of each environment: (environments, K).

    The prediction has no parameter of the environment, because a and c do not change ranks.
    """
    z = standardised_truth(calibration)
    found = []
    for e in environments:
        row = []
        for k in (0, 1):
            settings = (constants.sharpness[k], constants.target_offset[k], constants.kappa[k])
            x, y = _points(calibration, z, e, k, settings)
            row.append(float(spearmanr(x, y).statistic))
        found.append(row)
    return np.array(found)


def _points(
    calibration: Calibration, z: FloatArray, environment: int, k: int, settings: tuple[float, float, float]
) -> tuple[FloatArray, FloatArray]:
    runs = calibration.run_environment == environment
    sharpness, target_offset, kappa = settings
    v = values(z[environment, k], sharpness, target_offset)
    return np.log(kappa + calibration.run_mix[runs] @ v), calibration.run_gains[runs, k]


def _explained(
    calibration: Calibration, z: FloatArray, environment: int, k: int, settings: tuple[float, float, float]
) -> float:
    x, y = _points(calibration, z, environment, k, settings)
    return float(np.corrcoef(x, y)[0, 1] ** 2)


@dataclass(frozen=True, kw_only=True)
class RateFit:
    """Relaxation of the gains of recorded trajectories.

    Args:
        rate: (K,), r of a step.
        parameters: (K, 4), a, log kappa, c, log(1 - exp(-r)).
    """

    rate: FloatArray
    parameters: FloatArray


def fit_rate(record: FeedbackRecord, trajectories: IntArray) -> RateFit:
    """Rate of the surrogate, from trajectories of the target share alone.

    Args:
        record: The recorded set.
        trajectories: Numbers of the trajectories to fit.
    """
    share, gains, valid = _paths(record)
    found = []
    for k in (0, 1):

        def residuals(parameters: FloatArray, k: int = k) -> FloatArray:
            path = _relaxed(parameters, share[trajectories], k)
            return np.asarray((path - gains[trajectories, :, k])[valid[trajectories]][::3])

        start = [0.5, -4.0, 1.5, -3.0] if k else [0.1, -4.0, 0.05, -3.0]
        bounds = ([0, -6, -10, -6], [5, 1, 10, -0.7])
        found.append(least_squares(residuals, start, bounds=bounds, max_nfev=80).x)
    parameters = np.array(found)
    return RateFit(rate=-np.log(1 - np.exp(parameters[:, 3])), parameters=parameters)


def final_rank_correlation(record: FeedbackRecord, constants: RateFit, trajectories: IntArray) -> FloatArray:
    """Spearman correlation of simulated and real final gains of trajectories: (K,)."""
    share, gains, _ = _paths(record)
    last = record.trajectories.lengths[trajectories] - 1
    rows = np.arange(len(trajectories))
    return np.array(
        [
            spearmanr(
                _relaxed(constants.parameters[k], share[trajectories], k)[rows, last],
                gains[trajectories, :, k][rows, last],
            ).statistic
            for k in (0, 1)
        ]
    )


def _paths(record: FeedbackRecord) -> tuple[FloatArray, FloatArray, np.ndarray]:
    """Target share, (M, T), gains, (M, T, K), and whether there was a step, (M, T)."""
    mixes = np.nan_to_num(record.trajectories.mixes)
    share = mixes[:, 1:, NUM_TOPICS:].sum(axis=-1)
    gains = record.feedback[:, 1:] - record.feedback[:, :1]
    valid = np.arange(share.shape[1]) < record.trajectories.lengths[:, None]
    return np.where(valid, share, 0.0), gains, np.asarray(valid)


def _relaxed(parameters: FloatArray, share: FloatArray, k: int) -> FloatArray:
    scale, log_kappa, offset, log_rate = parameters
    levels = scale * np.log(np.exp(log_kappa) + (share if k else 1 - share)) + offset
    path: FloatArray = np.zeros(levels.shape)
    gain: FloatArray = np.zeros(len(levels))
    for step in range(levels.shape[1]):
        gain = gain + np.exp(log_rate) * (levels[:, step] - gain)
        path[:, step] = gain
    return np.asarray(path)
