"""``dmagent inspect`` on agents and on shards."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest
from shard_fixtures import own_cache, write_jsonl

from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.agent.checkpoint import resolve
from dmagent_loader.cli.inspect import configure_inspect
from dmagent_loader.errors import CheckpointError, ConfigurationError
from dmagent_loader.mixture.history import FeedbackStatistics
from dmagent_loader.shards import ShardingConfig, shard_files

__all__ = ["own_cache"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    statistics = FeedbackStatistics(mean=(-5.0, -4.0), std=(0.1, 0.5), count=1000)
    MixingAgent(AgentConfig(statistics=statistics)).save_pretrained(tmp_path / "seven")
    return tmp_path / "seven"


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    configure_inspect(parser.add_subparsers().add_parser("inspect"))
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


def test_every_bundled_agent_is_described_and_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`dmagent-plus` is no `MixingAgent`, but the command's help lists it."""
    assert run("dmagent-plus") == 0
    printed = capsys.readouterr().out
    for part in ("dmagent-plus: 1,383 parameters", "weights_sha256", "# dmagent-plus"):
        assert part in printed
    copy = tmp_path / "copy"
    shutil.copytree(resolve("dmagent-plus"), copy)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="sha256"):
        run(str(copy))


def test_it_writes_a_page_about_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    text = "The goalkeeper saved a penalty in the last minute and the team won the league match"
    web = write_jsonl(tmp_path / "web.jsonl", [{"text": f"{text} {n % 8}"} for n in range(10)])
    shard_files({"source/web": [web]}, tmp_path / "shards", progress=False)
    page = tmp_path / "page.html"
    assert run(str(tmp_path / "shards"), "--output", str(page), "--no-progress") == 0
    line = " ".join(capsys.readouterr().out.splitlines()[2].split())
    assert line == "source/web 10 1 0.02 85 / 85 / 85 20.0% 100% Sports 100%"
    assert "<!DOCTYPE html>" in page.read_text()
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigurationError, match=r"must be a file that ends in \.html"):
        run(str(tmp_path / "shards"), "--output", str(tmp_path / "page.png"))


def test_the_page_shows_quality_and_sources_that_rows_carry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"text": f"document {n}", "quality_pred": "Low" if n < 2 else "High", "meta": {"site": f"site{min(n, 4)}"}}
        for n in range(10)
    ]
    web = write_jsonl(tmp_path / "web.jsonl", rows)
    config = ShardingConfig(keep_columns=("quality_pred", "meta"))
    shard_files({"source/web": [web]}, tmp_path / "shards", config, progress=False)
    command = [str(tmp_path / "shards"), "--output", str(tmp_path / "page.html"), "--no-progress"]
    assert run(*command, "--quality-key", "quality_pred", "--source-key", "meta.site") == 0
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[0].split()).endswith("main topics quality main sources")
    assert "High 80%, Low 20%" in lines[2]
    assert "site4 60%, site0 10%, site1 10%, 2 more" in lines[2]
    assert "main sources" in (tmp_path / "page.html").read_text()
    with pytest.raises(ConfigurationError, match=r"no row .* has the column 'site' \(--source-key\): .*--keep-columns"):
        run(*command, "--source-key", "site")
    with pytest.raises(ConfigurationError, match=r"has the column 'quality' \(--quality-key\)"):
        run(*command, "--quality-key", "quality")
    with pytest.raises(ConfigurationError, match="--sample is 0"):
        run(str(tmp_path / "shards"), "--sample", "0")
