"""Charts: what is drawn is what was recorded."""

from __future__ import annotations

import numpy as np
import pytest

from dmagent_loader._report.charts import MAX_NAMED_DOMAINS, overview_chart, png_bytes
from dmagent_loader._report.records import RunRecord
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import DomainSpace

pytest.importorskip("matplotlib")
SPACE = DomainSpace.from_names(["source/web", "source/books", "target/code"])


def _run(name: str, target: tuple[float, ...], drop: float) -> RunRecord:
    return RunRecord(
        name=name,
        mix=[
            {"start": 10 * i, "stop": 10 * (i + 1), "mix": {"source/web": 1 - share, "target/code": share}}
            for i, share in enumerate(target)
        ],
        feedback=[
            {"at": 10 * i, "feedback": {"general": -3.0 - drop * i, "code": -4.0 + i / 10}}
            for i in range(len(target) + 1)
        ],
    )


RUNS = [_run("target only", (1.0, 1.0), 0.3), _run("agent", (0.25, 0.75), 0.1)]


def _panels(runs: list[RunRecord], space: DomainSpace = SPACE) -> dict[str, object]:
    figure = overview_chart(runs, space, x_label="samples", title="Two runs")
    return {panel.get_title(loc="left"): panel for panel in figure.get_axes()}


def test_one_panel_per_run_and_one_per_field_of_the_environment() -> None:
    assert set(_panels(RUNS)) == {
        "mix: target only",
        "mix: agent",
        "feedback: general (higher is better)",
        "feedback: code (higher is better)",
    }


def test_the_stack_holds_each_mix_over_its_own_stretch() -> None:
    """Catches a chart that slopes from one decision to the next, or shows a mix one step late."""
    panel = _panels(RUNS)["mix: agent"]
    target = panel.collections[SPACE.index("target/code")]  # type: ignore[attr-defined]
    inside = target.get_paths()[0]
    assert inside.contains_point((9.9, 0.76))
    assert not inside.contains_point((9.9, 0.74))
    assert inside.contains_point((10.1, 0.26))
    assert not inside.contains_point((10.1, 0.24))


def test_lines_go_through_the_recorded_feedback() -> None:
    panel = _panels(RUNS)["feedback: general (higher is better)"]
    drawn = [line.get_ydata() for line in panel.get_lines() if len(line.get_xdata()) == 3]  # type: ignore[attr-defined]
    np.testing.assert_allclose(drawn, [[-3.0, -3.3, -3.6], [-3.0, -3.1, -3.2]])


def test_names_at_the_ends_of_lines_do_not_overlap() -> None:
    """Two runs that end on the same value must both be readable."""
    same = [_run(name, (0.5, 0.5), 0.2) for name in ("one", "two", "three")]
    panel = _panels(same)["feedback: general (higher is better)"]
    heights = sorted(text.xyann[1] for text in panel.texts)  # type: ignore[attr-defined]
    assert len(heights) == 4
    assert np.diff(heights).min() > 0.08


def test_a_name_that_has_room_stands_beside_its_line() -> None:
    """Catches moving all names because two of them are close."""
    runs = [_run("one", (0.5, 0.5), 0.2), _run("two", (0.5, 0.5), 0.2), _run("far", (0.5, 0.5), 0.9)]
    panel = _panels(runs)["feedback: general (higher is better)"]
    far = next(text for text in panel.texts if text.get_text() == "far")  # type: ignore[attr-defined]
    assert far.xyann[1] == pytest.approx(far.xy[1])


def test_many_domains_are_named_by_field() -> None:
    space = DomainSpace.from_names([f"source/{i}" for i in range(MAX_NAMED_DOMAINS)] + ["target/code"])
    run = RunRecord(
        name="wide",
        mix=[{"start": 0, "stop": 1, "mix": {"source/3": 0.5, "target/code": 0.5}}],
        feedback=[{"at": 0, "feedback": {"general": -1.0}}, {"at": 1, "feedback": {"general": -1.0}}],
    )
    figure = overview_chart([run], space, x_label="samples", title="Wide")
    labels = [text.get_text() for part in figure.subfigs for legend in part.legends for text in legend.get_texts()]
    assert labels == ["target (1 domains)", "source (16 domains)"]


def test_equal_runs_give_equal_png_bytes() -> None:
    first, second = (png_bytes(overview_chart(RUNS, SPACE, x_label="samples", title="x")) for _ in range(2))
    assert first == second
    assert first.startswith(b"\x89PNG")


def test_a_run_without_feedback_is_refused() -> None:
    empty = RunRecord(name="none", mix=RUNS[0].mix, feedback=[])
    with pytest.raises(ConfigurationError, match="run 'none' has 2 steps and 0 feedback values"):
        overview_chart([empty], SPACE, x_label="samples", title="x")


def test_no_run_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no run to draw"):
        overview_chart([], SPACE, x_label="samples", title="x")
