"""Charts of runs: the mix over training, and the feedback over training.

A field has the same colours in every chart: source blue, the others orange, green and purple in their order. Blue and
orange are a pair that colour-blind readers can distinguish. Runs differ by marker and line style as well as by colour.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dmagent_loader._report.records import RunRecord
from dmagent_loader.errors import ConfigurationError, require_extra
from dmagent_loader.mixture.domains import SOURCE, DomainSpace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NAMED_DOMAINS = 16
"""Largest number of domains in a legend: with more, names would be unreadable, and the fields are named instead."""

_MAX_NAME_CHARS = 30
"""Largest length of a name in a legend."""

_MAX_MARKED_POINTS = 100
"""Largest number of feedback values with a marker each."""
_MAX_EDGED_STEPS = 200
"""Largest number of mixes between which areas have a clear white edge."""

_SOURCE_SHADES = ("#0b3c6f", "#c3dcf2")
_OTHER_SHADES = (("#7a2e00", "#fdd3a6"), ("#00513d", "#b5e3d3"), ("#4d1a66", "#e0c5ee"))
_RUN_STYLES = (("#b8488f", "o", "--"), ("#00785a", "s", "-."), ("#111111", "D", "-"), ("#7a5c00", "^", ":"))
TEXT, MUTED, _GRID = "#222222", "#555555", "#dddddd"


def overview_chart(runs: Sequence[RunRecord], space: DomainSpace, *, x_label: str, title: str) -> Figure:
    """A chart with the mix of every run above, and the feedback of every field below.

    Args:
        runs: One or more runs.
        space: All domains, in the order in which they are stacked from the bottom.
        x_label: Unit of ``start``, ``stop`` and ``at``.
        title: Heading of the picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigurationError: There is no run, or a run without a step or without feedback.
    """
    check_drawable(runs)
    figure = new_figure(11.5, 7.6)
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.05, 1.0])
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=TEXT)
    draw_mixes(parts[0], runs, space, x_label=x_label)
    draw_feedback(parts[1], runs, x_label=x_label)
    return figure


def draw_mixes(
    figure: Any,
    runs: Sequence[RunRecord],
    space: DomainSpace,
    *,
    x_label: str,
    y_label: str = "share of the training tokens",
    legend_below: bool = False,
) -> None:
    """Draws one panel per run: the share of each domain, stacked, constant between two decisions."""
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    colors = _domain_colors(space)
    for panel, run in zip(panels, runs, strict=True):
        edges = np.array([step["start"] for step in run.mix] + [run.mix[-1]["stop"]])
        shares = np.array([[step["mix"].get(name, 0.0) for name in space.names] for step in run.mix]).T
        shares = np.concatenate([shares, shares[:, -1:]], axis=1)
        edge = 0.4 if len(run.mix) <= _MAX_EDGED_STEPS else 0.1
        panel.stackplot(edges, shares, colors=colors, step="post", edgecolor="white", linewidth=edge)
        panel.set(xlim=(edges[0], edges[-1]), ylim=(0, 1))
        _shorten_counts(panel)
        panel.set_title(f"mix: {run.name}", loc="left", fontsize=10, color=TEXT)
        panel.set_xlabel(x_label, fontsize=9, color=MUTED)
        panel.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
        style_axes(panel)
    panels[0].set_ylabel(y_label, fontsize=9, color=MUTED)
    # In the order of the stacked areas from top to bottom.
    figure.legend(
        handles=_legend(space, colors)[::-1],
        loc="outside lower left" if legend_below else "outside right center",
        ncols=2 if legend_below else 1,
        frameon=False,
        fontsize=8,
        labelcolor=TEXT,
        handlelength=1.1,
    )


def draw_feedback(figure: Any, runs: Sequence[RunRecord], *, x_label: str, fields: Sequence[str] | None = None) -> None:
    """Draws one panel per field of the environment: the feedback of each run, and that of the base model as a line.

    Args:
        figure: Figure or part of one.
        runs: Runs with feedback.
        x_label: Unit of the x axis.
        fields: Fields to draw; None: all.
    """
    fields = list(runs[0].feedback[0]["feedback"]) if fields is None else fields
    panels = figure.subplots(1, len(fields), squeeze=False)[0]
    for panel, field in zip(panels, fields, strict=True):
        base = runs[0].feedback[0]["feedback"][field]
        panel.axhline(base, color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
        ends = []
        for position, run in enumerate(runs):
            color, marker, line = _RUN_STYLES[position % len(_RUN_STYLES)]
            at = [point["at"] for point in run.feedback]
            values = [point["feedback"][field] for point in run.feedback]
            if len(at) > _MAX_MARKED_POINTS:
                marker = ""
            panel.plot(
                at,
                values,
                color=color,
                marker=marker,
                linestyle=line if len(runs) > 1 else "-",
                markersize=4,
                linewidth=1.6,
            )
            ends.append((values[-1], run.name, color))
        last = max(point["at"] for run in runs for point in run.feedback)
        first = min(point["at"] for run in runs for point in run.feedback)
        margin = 0.02 * (last - first) or 1.0
        panel.set_xlim(first - margin, last + margin)
        _shorten_counts(panel)
        panel.margins(y=0.1)
        panel.set_title(f"feedback: {field} (higher is better)", loc="left", fontsize=10, color=TEXT)
        panel.set_xlabel(x_label, fontsize=9, color=MUTED)
        panel.ticklabel_format(axis="y", useOffset=False)
        panel.grid(axis="y", color=_GRID, linewidth=0.6)
        style_axes(panel)
        _label_ends(panel, [*ends, (base, "base model", MUTED)])
    panels[0].set_ylabel("mean log-probability\nper answer token (nats)", fontsize=9, color=MUTED)


def png_bytes(figure: Figure, *, dots_per_inch: int = 130) -> bytes:
    """The picture as PNG on a white background; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots_per_inch, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    # Figures created without pyplot draw with Agg and do not change the user's backend.
    figures = require_extra("matplotlib.figure", "report")
    figure: Figure = figures.Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.set_layout_engine("constrained", wspace=0.06)
    return figure


def check_drawable(runs: Sequence[RunRecord]) -> None:
    """Checks that there is a run and that every run has steps and feedback.

    Raises:
        ConfigurationError: It is not so.
    """
    if not runs:
        raise ConfigurationError("there is no run to draw: pass at least one")
    for run in runs:
        if not run.mix or not run.feedback:
            raise ConfigurationError(
                f"run {run.name!r} has {len(run.mix)} steps and {len(run.feedback)} feedback values, so there is "
                "nothing to draw: leave it out"
            )


def _domain_colors(space: DomainSpace) -> list[Any]:
    colors = require_extra("matplotlib.colors", "report")
    chosen: list[Any] = [None] * len(space)
    others = [field for field in space.fields if field != SOURCE]
    for field in space.fields:
        members = space.members(field)
        shades = _SOURCE_SHADES if field == SOURCE else _OTHER_SHADES[others.index(field) % len(_OTHER_SHADES)]
        ramp = colors.LinearSegmentedColormap.from_list(field, shades)
        for position, member in enumerate(members):
            chosen[member] = ramp(position / max(1, len(members) - 1) if len(members) > 1 else 0.35)
    return chosen


def _legend(space: DomainSpace, colors: list[Any]) -> list[Any]:
    patches = require_extra("matplotlib.patches", "report")
    if len(space) <= MAX_NAMED_DOMAINS:
        return [patches.Patch(color=c, label=_shortened(name)) for c, name in zip(colors, space.names, strict=True)]
    handles = []
    for field in space.fields:
        members = space.members(field)
        label = f"{field} ({len(members)} domains)"
        handles.append(patches.Patch(color=colors[members[len(members) // 2]], label=label))
    return handles


def _shortened(name: str) -> str:
    return name if len(name) <= _MAX_NAME_CHARS else f"{name[: _MAX_NAME_CHARS - 1]}…"


def _label_ends(panel: Axes, ends: list[tuple[float, str, str]], gap: float = 0.085) -> None:
    """Writes names beside the ends of the lines, moved apart where they would overlap.

    Args:
        panel: Panel with its final limits.
        ends: (value, name, colour) of each line.
        gap: Smallest distance between two names, as a share of the panel's height.
    """
    low, high = panel.get_ylim()
    marks = sorted(((value - low) / (high - low), name, color) for value, name, color in ends)
    for (height, name, color), at in zip(marks, _apart([height for height, _, _ in marks], gap), strict=True):
        panel.annotate(
            name,
            xy=(1.0, height),
            xytext=(1.03, at),
            xycoords="axes fraction",
            color=color,
            fontsize=9,
            va="center",
            annotation_clip=False,
        )


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Positions at least `gap` apart, in order; each group of neighbours is centred on its original positions."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _span(groups[-1], gap)[0] < _span(groups[-2], gap)[1] + gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_span(group, gap)[0] + gap * i for group in groups for i in range(len(group))]


def _span(group: Sequence[float], gap: float) -> tuple[float, float]:
    """Lowest and highest position of a group whose members are `gap` apart, kept below the top of the panel."""
    half = 0.5 * gap * (len(group) - 1)
    center = min(float(np.mean(group)), 1.0 - half)
    return center - half, center + half


def _shorten_counts(panel: Axes) -> None:
    """Writes 200k for 200000 on an x axis of large counts."""
    if panel.get_xlim()[1] >= 10_000:
        panel.xaxis.set_major_formatter(require_extra("matplotlib.ticker", "report").EngFormatter(sep=""))


def style_axes(panel: Axes) -> None:
    """Mutes the axes of a panel and hides its upper and right border."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(MUTED)
    panel.tick_params(labelsize=8, colors=MUTED)
