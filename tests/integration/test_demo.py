"""The demo from beginning to end, on this Python installation and on text of one's own."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.cli.demo import configure_demo
from dmagent_loader.errors import CheckpointError, ConfigurationError, MissingExtraError
from dmagent_loader.mixture.history import FeedbackStatistics

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained agent: what it proposes does not matter here."""
    torch.manual_seed(5)
    statistics = FeedbackStatistics(mean=(-5.0, -4.0), std=(0.3, 0.5), count=10)
    folder = tmp_path_factory.mktemp("agent")
    MixingAgent(AgentConfig(d_model=64, num_heads=2, d_ff=128, statistics=statistics)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def output(agent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert _demo("--quick", "--agent", str(agent), "--output", str(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def numbers(output: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((output / "results.json").read_text(encoding="utf-8"))
    return read


def test_every_method_gets_the_same_token_budget(numbers: dict[str, Any]) -> None:
    tokens = {row["model"]: row["tokens"] for row in numbers["scores"]}
    budgets = [sum(tokens[name].values()) for name in ("target only", "half and half", "agent", "influence")]
    assert budgets == [3 * 6 * 8 * 64] * 4
    assert tokens["target only"]["source"] == 0
    assert abs(tokens["half and half"]["source"] - tokens["half and half"]["target"]) <= 2 * 64


def test_the_base_model_has_learnt_something_of_the_source_field(numbers: dict[str, Any]) -> None:
    untrained, base = numbers["scores"][:2]
    assert base["tokens"]["target"] == 0
    assert base["held_out_loss"]["source"] < untrained["held_out_loss"]["source"] - 0.3


def test_feedback_in_the_table_is_that_of_the_run(numbers: dict[str, Any]) -> None:
    """Catches a table that was made with another model, or before the last step."""
    final = {row["model"]: row["feedback"] for row in numbers["scores"]}
    for run in numbers["runs"]:
        assert run["feedback"][-1]["feedback"] == pytest.approx(final[run["name"]], abs=1e-6)
        assert run["feedback"][0]["feedback"] == pytest.approx(final["base model (before)"], abs=1e-6)


def test_recorded_mixes_sum_to_one_and_follow_each_other(numbers: dict[str, Any]) -> None:
    for run in numbers["runs"]:
        steps = run["mix"]
        assert [step["start"] for step in steps[1:]] == [step["stop"] for step in steps[:-1]]
        np.testing.assert_allclose([sum(step["mix"].values()) for step in steps], 1.0)
        assert len(run["feedback"]) == len(steps) + 1 == 4


def test_the_report_stands_alone_and_shows_the_table_and_the_chart(output: Path, numbers: dict[str, Any]) -> None:
    page = (output / "report.html").read_text(encoding="utf-8")
    assert (output / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in page
    assert "http://" not in page
    assert "https://" not in page
    for row in numbers["scores"]:
        assert f"{row['feedback']['code']:.3f}" in page
        assert f"{row['held_out_loss']['source']:.3f}" in page


def test_the_corpus_is_left_in_the_layout_that_data_takes(output: Path, agent: Path, tmp_path: Path) -> None:
    """What the demo wrote can be trained on as a user's own text."""
    again = tmp_path / "again"
    assert _demo("--quick", "--data", str(output / "corpus"), "--agent", str(agent), "--output", str(again)) == 0
    read = json.loads((again / "results.json").read_text(encoding="utf-8"))
    assert list(read["scores"][0]["feedback"]) == ["general", "code"]
    assert (again / "report.html").is_file()


def test_a_folder_with_other_files_is_not_written_into(agent: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigurationError, match="holds files that are not from a demo"):
        _demo("--quick", "--agent", str(agent), "--output", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unknown_agent_is_reported_before_anything_is_trained(tmp_path: Path) -> None:
    """Catches loading the agent for the last run only, after minutes of training."""
    with pytest.raises(CheckpointError, match="no-such-agent"):
        _demo("--quick", "--agent", "no-such-agent", "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["transformers", "accelerate", "tokenizers", "matplotlib"])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    package: str, agent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches finding out after the training that there is nothing to draw with."""
    monkeypatch.setitem(sys.modules, package, None)  # Python's own way to say that a module is not there
    with pytest.raises(MissingExtraError, match=rf"'{package}', which is not installed: .*dmagent-loader\[demo\]"):
        _demo("--quick", "--agent", str(agent), "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_same_demo_gives_the_same_numbers(output: Path, agent: Path, numbers: dict[str, Any]) -> None:
    """Written over the first one's folder: an earlier demo's output is replaced."""
    assert _demo("--quick", "--agent", str(agent), "--output", str(output)) == 0
    again = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert again["scores"] == numbers["scores"]
    assert again["runs"] == numbers["runs"]


def _demo(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    configure_demo(parser.add_subparsers().add_parser("demo"))
    parsed = parser.parse_args(["demo", *arguments])
    code: int = parsed.run(parsed)
    return code
