"""Charts of mixes over many domains: runs of a policy, and coverage of recorded trajectories.

Shapes: M trajectories, T steps, D domains, K fields of the environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dmagent_loader._report.charts import MUTED, TEXT, check_drawable, draw_feedback, draw_mixes, new_figure, style_axes
from dmagent_loader._report.records import MixStep, RunRecord
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import SOURCE, TARGET, Domain, DomainSpace
from dmagent_loader.mixture.simplex import FloatArray, IntArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED_DOMAINS = 3
"""Number of domains of each field, the largest ones, that are named in a picture."""
_SET_COLORS = ("#7a5c00", "#b8488f", "#00785a", "#0b3c6f", "#7a2e00", "#111111")
_TOKENS = "tokens trained (thousands)"


def steered_run(
    name: str,
    mixes: FloatArray,
    feedback: FloatArray,
    *,
    domains: Sequence[str],
    fields: Sequence[str],
    tokens_per_step: int,
) -> RunRecord:
    """A run for `trajectories_chart`, whose x axis counts thousands of tokens.

    Args:
        name: Name in the picture.
        mixes: (T + 1, D); row 0, the start state, is not trained on.
        feedback: (T + 1, K); row 0 is the base model's; rows of NaN were not measured.
        domains: Names of the D domains.
        fields: Names of the K fields.
        tokens_per_step: Tokens of a step.
    """
    edge = tokens_per_step / 1000
    return RunRecord(
        name=name,
        mix=[
            {"start": (t - 1) * edge, "stop": t * edge, "mix": dict(zip(domains, map(float, mixes[t]), strict=True))}
            for t in range(1, len(mixes))
        ],
        feedback=[
            {"at": t * edge, "feedback": dict(zip(fields, map(float, row), strict=True))}
            for t, row in enumerate(feedback)
            if np.isfinite(row).all()
        ],
    )


def trajectories_chart(runs: Sequence[RunRecord], space: DomainSpace, *, title: str) -> Figure:
    """A chart with three rows: the weights of all domains of every run, their sums over each field, and the feedback.

    Args:
        runs: At least one run, from `steered_run`.
        space: All domains, in the order in which they are stacked from the bottom.
        title: Heading of the picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigurationError: There is no run, or a run has no step or no feedback.
    """
    check_drawable(runs)
    figure = new_figure(max(11.5, 4.6 * len(runs)), 12.4)
    parts: Any = figure.subfigures(3, 1, height_ratios=[1.5, 1.0, 1.0])
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=TEXT)
    draw_mixes(parts[0], runs, space, x_label=_TOKENS)
    for panel, run in zip(parts[0].get_axes(), runs, strict=True):
        panel.set_title(f"{run.name}: {len(space)} domains", loc="left", fontsize=10, color=TEXT)
        for area in panel.collections:
            area.set_linewidth(0.15)
        _name_largest(panel, run, space)
    sums = _sums(space)
    draw_mixes(parts[1], [_summed(run, space, sums) for run in runs], sums, x_label=_TOKENS)
    for panel, run in zip(parts[1].get_axes(), runs, strict=True):
        panel.set_title(f"{run.name}: summed over each field", loc="left", fontsize=10, color=TEXT)
    longest = max(run.mix[-1]["stop"] for run in runs)
    for panel in [*parts[0].get_axes(), *parts[1].get_axes()]:
        panel.set_xlim(0, longest)
    draw_feedback(parts[2], runs, x_label=_TOKENS)
    return figure


def coverage_chart(
    mixes: FloatArray, lengths: IntArray, candidates: IntArray, space: DomainSpace, *, title: str
) -> Figure:
    """Coverage of the space of mixes by recorded trajectories, with a column for each set.

    The upper row shows the target share over the steps. The lower row shows all mixes on their first two principal
    components, with those of the set highlighted.

    Args:
        mixes: (M, T + 1, D).
        lengths: (M,), number of steps of each trajectory.
        candidates: (M,), candidates per step of the trajectory's set.
        space: The D domains.
        title: Heading of the picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigurationError: There is no trajectory.
    """
    if not len(mixes):
        raise ConfigurationError("there is no trajectory to draw: give at least one")
    sets = np.unique(candidates)
    share = mixes[:, :, list(space.members(TARGET))].sum(axis=-1)
    steps = np.arange(mixes.shape[1])
    known = steps[None] <= lengths[:, None]
    share = np.where(known, share, np.nan)
    points, parts = _principal_components(mixes[known])
    owner = np.broadcast_to(candidates[:, None], known.shape)[known]
    figure = new_figure(max(6.0, 3.4 * len(sets)), 7.2)
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=TEXT)
    panels: Any = figure.subplots(2, len(sets), sharex="row", sharey="row", squeeze=False)
    for column, number in enumerate(sets):
        color = _SET_COLORS[column % len(_SET_COLORS)]
        above, below = panels[:, column]
        of_set = share[candidates == number]
        reached = np.isfinite(of_set).any(axis=0)
        low, first, middle, last, high = np.nanquantile(of_set[:, reached], [0.0, 0.1, 0.5, 0.9, 1.0], axis=0)
        above.fill_between(steps[reached], low, high, color=color, alpha=0.15, linewidth=0)
        above.fill_between(steps[reached], first, last, color=color, alpha=0.3, linewidth=0)
        above.plot(steps[reached], middle, color=color, linewidth=1.8)
        above.set(ylim=(0, 1), xlim=(0, steps[-1]))
        above.set_title(
            f"candidates per step: {number:,} ({len(of_set)} trajectories)", loc="left", fontsize=10, color=TEXT
        )
        above.set_xlabel("step", fontsize=9, color=MUTED)
        below.scatter(*points.T, s=3, color="#cccccc", linewidths=0, rasterized=True)
        below.scatter(*points[owner == number].T, s=3, color=color, linewidths=0, alpha=0.5, rasterized=True)
        below.set_xlabel(f"component 1 ({parts[0]:.0%} of variance)", fontsize=9, color=MUTED)
        style_axes(above)
        style_axes(below)
    panels[0, 0].set_ylabel("target share\n(median, 10 to 90 %, range)", fontsize=9, color=MUTED)
    panels[1, 0].set_ylabel(f"component 2 ({parts[1]:.0%} of variance)\ngrey: all sets", fontsize=9, color=MUTED)
    return figure


def _principal_components(points: FloatArray) -> tuple[FloatArray, FloatArray]:
    """First two principal components of (N, D) points, (N, 2), and their shares of the variance, (2,)."""
    centred = points - points.mean(axis=0)
    variances, directions = np.linalg.eigh(centred.T @ centred)
    return centred @ directions[:, [-1, -2]], variances[[-1, -2]] / max(float(variances.sum()), 1e-12)


def _sums(space: DomainSpace) -> DomainSpace:
    """One domain for each field, named as in the legend of many domains, so that the panels are aligned."""
    sizes = {field: len(space.members(field)) for field in space.fields}
    return DomainSpace(tuple(Domain(name=f"{field} ({n} domains)", field=field) for field, n in sizes.items()))


def _summed(run: RunRecord, space: DomainSpace, sums: DomainSpace) -> RunRecord:
    """The run summed over each field, on the domains of `_sums`."""
    members = [[space.names[i] for i in space.members(field)] for field in space.fields]
    steps: list[MixStep] = [
        {
            "start": step["start"],
            "stop": step["stop"],
            "mix": {
                total: sum(step["mix"].get(name, 0.0) for name in names)
                for total, names in zip(sums.names, members, strict=True)
            },
        }
        for step in run.mix
    ]
    return RunRecord(name=run.name, mix=steps, feedback=run.feedback)


def _name_largest(panel: Any, run: RunRecord, space: DomainSpace) -> None:
    """Writes the names of each field's largest domains at the widest points of their areas."""
    shares = np.array([[step["mix"].get(name, 0.0) for name in space.names] for step in run.mix])
    bottoms = np.cumsum(shares, axis=1) - shares
    for field in space.fields:
        members = np.array(space.members(field))
        largest = members[np.argsort(-shares[:, members].mean(axis=0), kind="stable")][:NAMED_DOMAINS]
        for domain in largest:
            at = int(np.argmax(shares[:, domain]))
            if shares[at, domain] < 0.04:
                continue
            middle = 0.5 * (run.mix[at]["start"] + run.mix[at]["stop"])
            last = run.mix[-1]["stop"]
            side = "left" if middle < 0.3 * last else "right" if middle > 0.7 * last else "center"
            name = space.names[int(domain)].split("/")[-1].replace("_", " ")
            panel.text(
                middle,
                bottoms[at, domain] + 0.5 * shares[at, domain],
                name,
                fontsize=6.5,
                ha=side,
                va="center",
                color="white" if field == SOURCE else TEXT,
                bbox={"facecolor": "#0b3c6f" if field == SOURCE else "#fdd3a6", "alpha": 0.65, "pad": 0.8, "lw": 0},
            )
