"""Charts over many domains: every domain, its field's sum, and the space that trajectories cover."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.agent.mixes import coverage_chart, steered_run, trajectories_chart
from dmagent_loader._report.charts import png_bytes
from dmagent_loader._report.records import RunRecord
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import DomainSpace

pytest.importorskip("matplotlib")
SPACE = DomainSpace.canonical()


def run(name: str, steps: int, target: float) -> RunRecord:
    """Two topics of each field; the target share rises from 0 to `target`; math is measured at even steps only."""
    share = np.linspace(0.0, target, steps + 1)
    mixes = np.zeros((steps + 1, 52))
    mixes[:, 3], mixes[:, 21] = 0.25 * (1 - share), 0.75 * (1 - share)
    mixes[:, 26 + 21], mixes[:, 26 + 6] = 0.6 * share, 0.4 * share
    feedback = np.stack([-3.0 - 0.1 * np.arange(steps + 1), -4.0 + 0.1 * np.arange(steps + 1)], axis=1)
    feedback[1::2] = np.nan
    return steered_run(name, mixes, feedback, domains=SPACE.names, fields=("general", "math"), tokens_per_step=2000)


def test_a_steered_run_leaves_the_start_state_and_unmeasured_steps_out() -> None:
    """Catches a chart that is one step late."""
    record = run("agent", 4, 0.8)
    assert [(step["start"], step["stop"]) for step in record.mix] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert record.mix[0]["mix"]["target/Science"] == pytest.approx(0.6 * 0.2)
    assert [point["at"] for point in record.feedback] == [0, 4, 8]
    assert record.feedback[1]["feedback"] == {"general": pytest.approx(-3.2), "math": pytest.approx(-3.8)}


def test_each_run_is_drawn_over_all_domains_and_over_the_two_fields() -> None:
    figure = trajectories_chart([run("RL", 4, 0.8), run("SFT", 8, 0.4)], SPACE, title="Two agents")
    panels = {panel.get_title(loc="left"): panel for panel in figure.get_axes()}
    assert set(panels) == {
        "RL: 52 domains",
        "SFT: 52 domains",
        "RL: summed over each field",
        "SFT: summed over each field",
        "feedback: general (higher is better)",
        "feedback: math (higher is better)",
    }
    assert len(panels["RL: 52 domains"].collections) == 52
    source, target = panels["SFT: summed over each field"].collections
    # Step 8 of 8 has a target share of 0.4, drawn on top of the source.
    assert target.get_paths()[0].contains_point((15.0, 0.61))
    assert source.get_paths()[0].contains_point((15.0, 0.59))
    names = sorted(text.get_text() for text in panels["RL: 52 domains"].texts)
    assert names == ["Beauty and Fitness", "Computers and Electronics", "Science", "Science"]
    assert {panels[f"{name}: 52 domains"].get_xlim() for name in ("RL", "SFT")} == {(0, 16)}, "not comparable"
    assert png_bytes(figure).startswith(b"\x89PNG")


def test_coverage_has_a_column_for_each_set_with_its_own_trajectories() -> None:
    """Catches medians over the padding after the ends, and sets that are mixed up."""
    rng = np.random.default_rng(0)
    mixes = np.zeros((6, 5, 52))
    mixes[:, :, 2] = 1.0
    shares = np.array([0.1, 0.2, 0.3, 0.7, 0.8, 0.9])
    mixes[:, 1:, 2], mixes[:, 1:, 30] = 1 - shares[:, None], shares[:, None]
    lengths = np.array([4, 4, 4, 4, 4, 2])
    mixes[5, 3:] = 0.0
    mixes[:, 1:3, 5] += 0.01 * rng.random((6, 2))
    figure = coverage_chart(mixes, lengths, np.array([1, 1, 1, 100, 100, 100]), SPACE, title="Coverage")
    panels = figure.get_axes()
    assert [panel.get_title(loc="left") for panel in panels[:2]] == [
        "candidates per step: 1 (3 trajectories)",
        "candidates per step: 100 (3 trajectories)",
    ]
    medians = [panel.get_lines()[0].get_ydata() for panel in panels[:2]]
    assert np.allclose(medians[0], [0, 0.2, 0.2, 0.2, 0.2])
    assert np.allclose(medians[1], [0, 0.8, 0.8, 0.75, 0.75])
    own = [panel.collections[1].get_offsets() for panel in panels[2:]]
    assert [len(points) for points in own] == [15, 13]
    with pytest.raises(ConfigurationError, match="no trajectory to draw"):
        coverage_chart(mixes[:0], lengths[:0], lengths[:0], SPACE, title="")
