"""`dmagent state` says what a state holds, what differs, and what each way to load it does; it does no more."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from shard_fixtures import rewritten

from dmagent_loader import AgentWeightedSampler, ReadingConfig, save_state
from dmagent_loader.cli import main
from dmagent_loader.errors import StateError
from dmagent_loader.shards import ShardingConfig, shard_files
from dmagent_loader.testing import sample_ids

SETTINGS = {"samples_per_reweight": 8, "initial_mix": {"source/web": 0.5, "target/math": 0.5}}


def write(folder: Path, rows: dict[str, int]) -> str:
    sources = {}
    folder.mkdir()
    for domain, count in rows.items():
        path = folder / f"{domain.replace('/', '-')}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{domain} {i}"}) + "\n" for i in range(count)))
        sources[domain] = [path]
    shard_files(sources, folder / "shards", ShardingConfig(rows_per_shard=7, shuffle_seed=None), progress=False)
    return str(folder / "shards" / "manifest.json")


@pytest.fixture
def manifest(tmp_path: Path) -> str:
    return write(tmp_path / "first", {"source/web": 28, "target/math": 21})


@pytest.fixture
def saved(manifest: str, tmp_path: Path) -> str:
    sampler = AgentWeightedSampler(manifest, reading=ReadingConfig(progress=False), **SETTINGS)
    sample_ids(sampler, 20)
    save_state(tmp_path / "state.json", sampler.state_dict())
    return str(tmp_path / "state.json")


def test_a_state_is_described(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["state", saved]) == 0
    out = capsys.readouterr().out
    assert out.startswith("a run of 20 samples, with 0 decisions, seed 0\n")
    assert re.search(r"source/web +0\.5000 +10 +28 +18 +repeat", out)
    assert re.search(r"target/math +0\.5000 +10 +21 +11 +stop", out)


def test_the_same_data_resume_exactly(saved: str, manifest: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["state", saved, "--shards", manifest]) == 0
    assert "load_state_dict(state) resumes exactly at sample 20" in capsys.readouterr().out


def test_differences_and_both_ways_are_said_and_true(
    saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "other", {"target/code": 7, "source/web": 35, "target/math": 14})
    before = Path(saved).read_bytes()
    assert main(["state", saved, "--shards", other, "--exhausted", "repeat"]) == 1
    out = capsys.readouterr().out
    assert "domain 'target/code' is new: 1 shard (code-000000.tar) with 7 rows" in out
    assert "domain 'source/web': new 1 shard (web-000004.tar) with 7 rows; unchanged 4 shards with 28 rows" in out
    assert "domain 'target/math': lost 1 shard (math-000002.tar) with 7 rows; unchanged 2" in out
    assert "the exhaustion rule of 'target/math' was 'stop' and is 'repeat'" in out
    assert "load_state_dict(state) is refused" in out
    assert "data='changed') begins segment 2 of the run" in out
    assert Path(saved).read_bytes() == before
    left = {name: int(rows) for name, rows in re.findall(r"^  (\S+) +\d\.\d+ +\d+ +(\d+)", out, re.MULTILINE)}
    sampler = AgentWeightedSampler(other, exhausted="repeat", reading=ReadingConfig(progress=False), **SETTINGS)
    state = json.loads(before)
    with pytest.raises(StateError):
        sampler.load_state_dict(state)
    sampler.load_state_dict(state, data="changed")
    assert left == dict(zip(sampler.space.names, sampler.plan.rows_left(20).tolist(), strict=True))
    assert left["target/code"] == 7
    assert left["source/web"] == 18 + 7
    assert {name for _, name, _ in sample_ids(sampler, 20)} == {"source/web", "target/math"}


def test_a_state_of_several_segments_and_bad_rows_is_described(
    saved: str, manifest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = next((tmp_path / "first" / "shards").rglob("web-000003.tar"))
    rewritten(shard, lambda key, members: {"txt": b"\xff"})
    Path(manifest).unlink()  # its checksums are those of before
    shards = {"source/web": sorted(map(str, shard.parent.glob("*.tar")))}
    reading = ReadingConfig(progress=False, max_bad_rows=1.0)
    settings = {"samples_per_reweight": 8, "on_bad_row": "skip", "data": "changed"}
    sampler = AgentWeightedSampler(shards, reading=reading, **settings)  # type: ignore[arg-type]
    sampler.load_state_dict(json.loads(Path(saved).read_bytes()))
    sample_ids(sampler, 30)
    save_state(tmp_path / "later.json", sampler.state_dict())
    assert main(["state", str(tmp_path / "later.json")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("a run of 50 samples, 2 segments, the last from sample 20 on,")
    assert re.search(r"target/math +- +10 +- +- +removed", out)
    assert re.search(r"bad rows that were replaced: source/web \d", out)
    save_state(tmp_path / "wrong.json", {**sampler.state_dict(), "seed": "0"})
    assert main(["state", str(tmp_path / "wrong.json")]) == 2
    assert "seed is '0'" in capsys.readouterr().err
