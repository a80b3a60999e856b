"""Pareto plot of the comparison: what policies keep against what they acquire, as shares of the attainable ranges.

python -m benchmarks.comparison pictures --output build/tasks/comparison.jsonl --folder docs/images
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot

from benchmarks.comparison.policies import REFERENCE, SHARES
from benchmarks.comparison.tables import Results
from benchmarks.records import lines
from dmagent_loader.mixture.simplex import FloatArray

STATIC = [f"natural {share:.0%}" for share in SHARES]
KINDS = ("plain", "perturbed")


def pareto(path: Path, folder: Path, split: str) -> Path:
    """Draws the mean shares of both fields over the tasks of a split, of policies that have finished all of them.

    The tasks are those of the reference, natural 30%; a baseline with its own proxies may have been run on a few alone.

    Args:
        path: Output of the comparison.
        folder: Folder of the picture.
        split: Split.
    """
    results = Results(lines(path))
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True)
    for axis, kind in zip(axes, KINDS, strict=True):
        _panel(axis, results, split, kind)
    axes[0].set_ylabel("kept field: gain / attainable range")
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"comparison-pareto-{split}.png"
    figure.savefig(target, dpi=130)
    pyplot.close(figure)
    return target


def _panel(axis: Any, results: Results, split: str, kind: str) -> None:
    shares = {name: _shares(results, name, split, kind) for name in results.whole}
    common = set(shares.get(REFERENCE, ()))
    shares = {name: of_task for name, of_task in shares.items() if common <= set(of_task)}
    axis.set_title(f"{len(common)} {kind} {split} tasks")
    axis.set_xlabel("acquired field: gain / attainable range")
    axis.grid(alpha=0.3)
    if not common:
        return
    points = {name: np.mean([of_task[task] for task in common], axis=0) for name, of_task in shares.items()}
    static = [points[name] for name in STATIC if name in points]
    axis.plot([p[1] for p in static], [p[0] for p in static], "o-", color="0.55", label="natural mix, share of target")
    for name, (keep, acquire) in points.items():
        if name in STATIC:
            axis.annotate(name.split()[-1], (acquire, keep), textcoords="offset points", xytext=(5, -11), color="0.4")
        else:
            axis.plot(acquire, keep, "o", label=name)
    axis.legend(fontsize=8)


def _shares(results: Results, policy: str, split: str, kind: str) -> dict[str, FloatArray]:
    """Task -> mean shares over the streams, (2,)."""
    keep, acquire = (results.of_split(results.scores(policy, which), split, kind) for which in ("keep", "acquire"))
    return {
        task: np.array([np.mean(list(scores[task].values())) for scores in (keep, acquire)]) / results.ranges[task]
        for task in keep
    }
