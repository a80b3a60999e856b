"""``dmagent inspect``."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.cli.inspect import add_inspect_command
from dmagent_loader.errors import CheckpointError
from dmagent_loader.mixture.history import FeedbackStatistics


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    statistics = FeedbackStatistics(mean=(-5.0, -4.0), std=(0.1, 0.5), count=1000)
    MixingAgent(AgentConfig(statistics=statistics)).save_pretrained(tmp_path / "seven")
    return tmp_path / "seven"


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_inspect_command(parser.add_subparsers())
    args = parser.parse_args(["inspect", *arguments])
    return int(args.run(args))


def test_it_prints_size_config_statistics_digest_and_card(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(saved)) == 0
    printed = capsys.readouterr().out
    for part in ("2,125,568 parameters", "weights_sha256", '"mean": [-5.0, -4.0]', "d_model: 256", "# seven"):
        assert part in printed


def test_a_damaged_checkpoint_is_not_described(saved: Path) -> None:
    """Catches a command that prints config.json without loading the weights."""
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        run(str(saved))
