"""Statistics of scores that are paired by task and stream (Agarwal et al., arXiv 2108.13264).

Scores are nested: task -> stream -> number. Intervals come from a stratified bootstrap: tasks are drawn within their
strata, then streams within tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dmagent_loader.mixture.simplex import FloatArray

DRAWS = 2000
Scores = Mapping[str, Mapping[int, float]]
"""Task -> stream -> score."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its uncertainty.

    Attributes:
        value: Estimate.
        error: Standard error over tasks; NaN if there is one task.
        low: Lower end of the 95% interval.
        high: Its upper end.
        tasks: Number of tasks.
    """

    value: float
    error: float
    low: float
    high: float
    tasks: int


def paired(one: Scores, other: Scores) -> dict[str, dict[int, float]]:
    """Differences, one minus the other, where both have a score."""
    found = {
        task: {stream: score - other[task][stream] for stream, score in streams.items() if stream in other[task]}
        for task, streams in one.items()
        if task in other
    }
    return {task: streams for task, streams in found.items() if streams}


def interquartile_mean(values: FloatArray) -> float:
    """Mean of the middle half of some values; a value on the edge counts in part."""
    ordered = np.sort(values)
    n = len(ordered)
    edges = np.arange(n + 1) / n
    weights = np.clip(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0.0, None)
    return float(weights @ ordered / weights.sum())


def improvement(differences: FloatArray) -> float:
    """Share of pairs in which the difference is positive, ties half."""
    return float(np.mean(np.where(differences == 0, 0.5, differences > 0)))


def mean_over_tasks(scores: Scores, strata: Mapping[str, str], *, seed: int = 0) -> Estimate:
    """Mean over tasks of the mean over streams."""
    return _estimate(scores, strata, lambda tasks: float(np.mean([task.mean() for task in tasks])), seed)


def over_runs(
    scores: Scores, strata: Mapping[str, str], statistic: Callable[[FloatArray], float], *, seed: int = 0
) -> Estimate:
    """A statistic of all (task, stream) scores, such as `interquartile_mean` or `improvement`."""
    return _estimate(scores, strata, lambda tasks: statistic(np.concatenate(tasks)), seed)


def _estimate(
    scores: Scores, strata: Mapping[str, str], statistic: Callable[[Sequence[FloatArray]], float], seed: int
) -> Estimate:
    rng = np.random.default_rng(seed)
    values = {task: np.array(list(streams.values())) for task, streams in scores.items()}
    by_stratum: dict[str, list[str]] = {}
    for task in values:
        by_stratum.setdefault(strata[task], []).append(task)
    draws = []
    for _ in range(DRAWS):
        drawn = [
            values[tasks[i]]
            for tasks in by_stratum.values()
            for i in rng.integers(len(tasks), size=len(tasks)).tolist()
        ]
        places = rng.random((len(drawn), max(map(len, drawn))))
        draws.append(
            statistic([v[(u[: len(v)] * len(v)).astype(np.int64)] for v, u in zip(drawn, places, strict=True)])
        )
    means = np.array([listed.mean() for listed in values.values()])
    error = float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else float("nan")
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(
        value=statistic(list(values.values())), error=error, low=float(low), high=float(high), tasks=len(means)
    )
