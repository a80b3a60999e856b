"""`dmagent replay` and `dmagent simulate` on real shards."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import fsspec
import pytest

from dmagent_loader import AgentWeightedSampler, MixingDataLoader, ReadingConfig
from dmagent_loader._run.state import save_state
from dmagent_loader.cli import main
from dmagent_loader.integrations.mixing import Mixing
from dmagent_loader.shards import ShardingConfig, shard_files
from dmagent_loader.testing import sample_ids, write_toy_shards


@pytest.fixture
def manifest(tmp_path):
    sources = {}
    for domain, count in (("source/web", 30), ("source/books", 10), ("target/math", 20)):
        path = tmp_path / f"{domain.replace('/', '-')}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{domain} {i}"}) + "\n" for i in range(count)))
        sources[domain] = [path]
    shard_files(sources, tmp_path / "shards", ShardingConfig(rows_per_shard=7), progress=False)
    return str(tmp_path / "shards" / "manifest.json")


def test_replay_lists_exactly_what_a_run_was_given(manifest, tmp_path, capsys):
    cache = str(tmp_path / "cache")
    sampler = AgentWeightedSampler(
        manifest, samples_per_reweight=8, seed=5, reading=ReadingConfig(progress=False, cache_dir=cache)
    )
    given = sample_ids(sampler, 12)
    sampler.set_mix({"source/web": 0.2, "target/math": 0.8})
    given += sample_ids(sampler, 10)
    state = tmp_path / "state.json"
    state.write_text(json.dumps(sampler.state_dict()))
    assert main(["replay", str(state), "--shards", manifest, "--cache-dir", cache]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["index"], line["domain"], line["key"]) for line in lines] == given

    main(["replay", str(state), "--shards", manifest, "--start", "4", "--stop", "9"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["index"], line["domain"], line["key"]) for line in lines] == given[4:9]


@pytest.mark.parametrize("own_shards", [False, True])
def test_replay_lists_the_samples_of_a_resumed_rank(manifest, tmp_path, capsys, own_shards):
    """Catches a replay that deals by another rule than the run: it would blame the wrong rank for a bad sample."""
    reading = ReadingConfig(progress=False, cache_dir=str(tmp_path / "cache"), own_shards=own_shards)
    state, given = tmp_path / "state.json", []
    sampler = AgentWeightedSampler(manifest, samples_per_reweight=8, reading=reading, rank=1, world_size=2)
    sampler.seek(4)
    loader = MixingDataLoader(sampler, batch_size=3, collate_fn=list)
    for batch in itertools.islice(loader, 4):
        given += [(sample["__index__"], sample["__key__"]) for sample in batch]
    state.write_text(json.dumps(sampler.state_dict(consumed=28)))
    arguments = ["--rank", "1", "--world-size", "2", "--batch-size", "3", "--start", "4"] + [
        "--own-shards"
    ] * own_shards
    assert main(["replay", str(state), "--shards", manifest, "--cache-dir", str(tmp_path / "cache"), *arguments]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["index"], line["key"]) for line in lines] == given
    for stop in range(4, 28):
        assert main(["replay", str(state), *arguments, "--stop", str(stop)]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["index"] for line in lines] == [index for index, _ in given if index < stop]


def test_replay_ends_where_the_data_do_and_warns_of_nothing(manifest, tmp_path, capsys, caplog):
    sampler = AgentWeightedSampler(
        manifest, samples_per_reweight=8, agent="dmagent-rl", reading=ReadingConfig(progress=False)
    )
    state = tmp_path / "state.json"
    state.write_text(json.dumps(sampler.state_dict(consumed=3)))
    caplog.clear()  # the sampler itself has said that its topics are unknown
    assert main(["replay", str(state), "--shards", manifest, "--stop", "1000000"]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == sampler.plan.end
    assert f"the run ends at sample {sampler.plan.end}" in said.err
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []
    assert main(["replay", str(state), "--shards", manifest, "--start", "-3"]) == 2
    assert "--start is -3" in capsys.readouterr().err


def test_replay_of_samples_that_cannot_be_listed_is_refused(manifest, tmp_path, capsys):
    """It printed nothing, as if there were no such samples; those after the consumed ones need --stop."""
    sampler = AgentWeightedSampler(manifest, samples_per_reweight=8, reading=ReadingConfig(progress=False))
    state = tmp_path / "state.json"
    state.write_text(json.dumps(sampler.state_dict(consumed=3)))
    for arguments, message in (
        (["--start", "4"], "--start is 4, but the list stops before sample 3 (the consumed samples)"),
        (["--start", "2", "--stop", "1"], "--start is 2, but the list stops before sample 1 (--stop)"),
        (["--stop", "-1"], "--start is 0, but the list stops before sample -1 (--stop)"),
    ):
        assert main(["replay", str(state), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["replay", str(state), "--start", "3"]) == 0
    assert capsys.readouterr().out == ""


def test_a_domain_that_is_given_twice_is_refused(tmp_path, capsys):
    arguments = ["shard", "--domain", "source/a=a.jsonl", "--domain", "source/a=b.jsonl", "--output", str(tmp_path)]
    assert main(arguments) == 2
    assert "--domain 'source/a' is given twice" in capsys.readouterr().err


def test_the_home_folder_is_found_although_the_shell_does_not_name_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a,b.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "c.jsonl").write_text('{"text": "c"}\n{"text": "d"}\n')
    domain = "source/a=~/a,b.jsonl,~/c.jsonl"
    assert main(["shard", "--domain", domain, "--output", str(tmp_path / "out"), "--no-progress"]) == 0
    assert "3 documents" in capsys.readouterr().out
    assert main(["index", "source/a=~/out/source/a/*.tar", "--no-progress"]) == 0


def test_a_misspelt_field_is_named_before_the_work_begins(tmp_path, capsys):
    """The sampler would refuse the domain, after hours of packing."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    named = ["--domain", f"sourc/web={tmp_path}/a.jsonl", "--domain", f"target/math={tmp_path}/a.jsonl"]
    assert main(["shard", *named, "--output", str(tmp_path / "out"), "--no-progress"]) == 0
    (message,) = [line for line in capsys.readouterr().err.splitlines() if "neither source/" in line]
    assert message.startswith("domain 'sourc/web' is neither source/web nor target/web (is 'source/web' meant?)")


def test_two_files_that_would_be_one_domain_are_refused(tmp_path, capsys):
    for name in ("c4.en.jsonl", "c4.de.jsonl"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text('{"text": "a"}\n')
    arguments = ["shard", "--input", str(tmp_path / "in"), "--field", "source", "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "'c4.de.jsonl' and 'c4.en.jsonl' would both be domain 'c4'" in capsys.readouterr().err


def test_an_output_that_is_a_file_is_refused_in_one_line(manifest, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text("text")
    arguments = ["shard", "--domain", f"source/a={tmp_path / 'in.jsonl'}", "--output", str(tmp_path / "in.jsonl")]
    assert main(arguments) == 2
    assert "shards cannot be written to" in capsys.readouterr().err


def test_replay_reads_a_trainers_checkpoint(manifest, tmp_path, capsys):
    sampler = AgentWeightedSampler(manifest, samples_per_reweight=8, reading=ReadingConfig(progress=False))
    saved = {"stateful_callbacks": {"DataMixingCallback": {"attributes": {"sampler": sampler.state_dict(consumed=3)}}}}
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps(saved))
    assert main(["replay", str(folder), "--shards", manifest]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    saved["stateful_callbacks"]["DataMixingCallback"]["attributes"]["sampler"] = sampler.state_dict(consumed=5)
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text(json.dumps(saved))
    assert main(["replay", str(tmp_path), "--shards", manifest]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5  # the newest checkpoint of the run


def test_replay_reads_the_state_of_a_loop_with_mixing(manifest, tmp_path, capsys):
    mixing = Mixing(AgentWeightedSampler(manifest, samples_per_reweight=8, reading=ReadingConfig(progress=False)), None)
    mixing.consumed = 4
    save_state(tmp_path / "mixing.json", mixing.state_dict())
    assert main(["replay", str(tmp_path / "mixing.json"), "--shards", manifest]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_replay_with_the_shards_of_another_run_says_so(manifest, tmp_path, capsys):
    other = write_toy_shards(tmp_path / "other", {"source/web": 30, "target/math": 20})
    sampler = AgentWeightedSampler(other, samples_per_reweight=8, reading=ReadingConfig(progress=False))
    save_state(tmp_path / "state.json", sampler.state_dict(consumed=5))
    assert main(["replay", str(tmp_path / "state.json"), "--shards", manifest]) == 2
    assert "manifest.json does not have: pass the manifest that had it" in capsys.readouterr().err
    assert main(["replay", str(tmp_path / "state.json")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["index"], line["domain"]) for line in lines] == [one[:2] for one in sample_ids(sampler, 5)]
    assert all("key" not in line for line in lines)


def test_simulate_predicts_when_domains_run_out(manifest, capsys):
    arguments = ["simulate", "--shards", manifest, "--mix", "source=0.5,target=0.5", "--samples-per-reweight", "10"]
    assert main([*arguments, "--steps", "9"]) == 0
    out = capsys.readouterr().out
    sampler = AgentWeightedSampler(
        manifest,
        samples_per_reweight=10,
        initial_mix={"source": 0.5, "target": 0.5},
        reading=ReadingConfig(progress=False),
    )
    assert f"the run ends after {sampler.plan.end:,} samples" in out
    assert "a field is used up" in out
    row = next(line.split() for line in out.splitlines() if line.startswith("target/math"))
    assert row[1:3] == ["20", "20"]
    assert main([*arguments, "--steps", "2"]) == 0
    assert "the run ends after 20 samples" in capsys.readouterr().out


def test_simulate_says_where_a_run_would_fail(manifest, capsys):
    arguments = ["simulate", "--shards", manifest, "--mix", "source=0.5,target=0.5", "--exhausted", "error"]
    assert main([*arguments, "--samples-per-reweight", "10", "--steps", "9"]) == 1
    assert "the run fails there, because" in capsys.readouterr().out
    assert main([*arguments, "--samples-per-reweight", "10", "--steps", "1"]) == 0
    assert main([*arguments, "--steps", "0"]) == 2


def test_a_manifest_may_lie_behind_a_url(manifest, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "shards"), "/plan-test", recursive=True)
    cache = tmp_path / "cache"
    local = AgentWeightedSampler(
        manifest, samples_per_reweight=8, reading=ReadingConfig(progress=False, cache_dir=cache)
    )
    remote = AgentWeightedSampler(
        "memory://plan-test/manifest.json",
        samples_per_reweight=8,
        reading=ReadingConfig(progress=False, cache_dir=cache),
    )
    assert sample_ids(remote, 12) == sample_ids(local, 12)


@pytest.mark.parametrize("url", ["manifest.json?X-Amz-Signature=ab/cd%3D", "?sig=ab/cd"])
def test_a_manifest_may_lie_behind_a_signature(manifest, tmp_path, capsys, url):
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "shards"), "/signed-plan-test", recursive=True)
    signed = f"memory://signed-plan-test/{url}"
    memory.pipe(f"/signed-plan-test/manifest.json?{url.partition('?')[2]}", Path(manifest).read_bytes())
    assert main(["index", signed, "--no-progress", "--cache-dir", str(tmp_path / "cache")]) == 0
    listed = capsys.readouterr().out
    assert "source" in listed
    assert "(shards)" not in listed, "the manifest was taken for a shard"
    assert main(["simulate", "--shards", signed, "--mix", "source=0.5,target=0.5"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "--shards", "MANIFEST", "--mix", "source:1"], "'source:1' is not NAME=WEIGHT"),
        (["simulate", "--shards", "MANIFEST", "--mix", "source=0.5"], "sums to 0.5"),
        (["simulate", "--shards", "MANIFEST", "--mix", "sauce=1"], "sauce"),
        (["simulate", "--shards", "MANIFEST", "--mix", "source=0.5,target=0.3,source=0.7"], "names 'source' twice"),
        (["simulate", "--shards", "nowhere", "--mix", "source=1"], "nowhere"),
        (["replay", "nowhere.json", "--shards", "MANIFEST"], "there is no file or folder nowhere.json"),
        (["replay", "MANIFEST", "--shards", "MANIFEST"], "does not contain the state of a sampler"),
        (["inspect", "no-such-agent"], "no-such-agent"),
    ],
)
def test_errors_are_one_line_that_names_the_thing(manifest, capsys, arguments, message):
    assert main([manifest if a == "MANIFEST" else a for a in arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
