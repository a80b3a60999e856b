"""`dmagent report` on states that a run has saved."""

from __future__ import annotations

import json

import pytest

from dmagent_loader import AgentWeightedSampler, ReadingConfig, save_state
from dmagent_loader.cli import main
from dmagent_loader.policies import StaticPolicy
from dmagent_loader.testing import write_toy_shards

pytest.importorskip("matplotlib")


@pytest.fixture
def state(tmp_path):
    shards = write_toy_shards(tmp_path / "shards", {"source/web": 60, "target/math": 40})
    sampler = AgentWeightedSampler(
        shards,
        policy=StaticPolicy({"source/web": 0.5, "target/math": 0.5}),
        samples_per_reweight=10,
        reading=ReadingConfig(cache_dir=tmp_path / "cache", progress=False),
    )
    sampler.reweight({"general": -2.0, "math": -3.0}, consumed=0)
    return sampler.state_dict(consumed=30)


def test_a_page_and_a_picture_are_written(state, tmp_path, capsys):
    save_state(tmp_path / "state.json", state)
    output = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "state.json"), "--output", str(output)]) == 0
    assert output.read_text().startswith("<!DOCTYPE html>")
    assert "<title>Data mixing: state.json</title>" in output.read_text()
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'state.json'}:\n  30 samples trained on, from 2 domains")
    assert "the data last for 80 samples (50 from now): then target/math is used up." in out
    assert out.endswith(f"wrote {output}\nwrote {output.with_suffix('.png')}\n")


def test_the_shards_may_be_gone(state, tmp_path, monkeypatch):
    """A report is about a run, wherever its data are."""
    monkeypatch.chdir(tmp_path)
    state = json.loads(json.dumps(state))
    for file in (tmp_path / "shards").rglob("*.tar"):
        file.unlink()
    save_state("state.json", state)
    assert main(["report", "state.json"]) == 0
    assert (tmp_path / "dmagent-report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["state.json", "--output", "page.pdf"], "--output is 'page.pdf'; it must be a file that ends in .html"),
        (["state.json", "--output", "missing/page.html"], "there is no folder 'missing'"),
        (["state.json", "--output", "folder.html"], "folder.html cannot be written"),
        (["nowhere"], "there is no file or folder nowhere"),
        (["empty"], "the folder empty does not contain the state of a sampler"),
        (["damaged.json"], "a segment of the state cannot be read"),
    ],
)
def test_errors_are_one_line_and_write_nothing(arguments, message, state, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_state("state.json", state)
    save_state("damaged.json", {**state, "shards": [1]})
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.html").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
