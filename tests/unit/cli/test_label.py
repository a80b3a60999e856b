"""`dmagent label` and `dmagent compose`, from raw text to a sampler that knows the topics of its domains."""

from __future__ import annotations

import gzip
import io
import json
import logging
import shutil
import tarfile
from pathlib import Path

import pytest
from shard_fixtures import own_cache, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers

from dmagent_loader import AgentWeightedSampler, ReadingConfig
from dmagent_loader.cli import main
from dmagent_loader.errors import ShardError
from dmagent_loader.labelling.compose import FIRST_DOCUMENTS
from dmagent_loader.mixture.domains import CANONICAL_TOPICS
from dmagent_loader.shards import ShardCollection, load_manifest
from dmagent_loader.shards.compositions import COMPOSITIONS_NAME, load_compositions, load_start_state

__all__ = ["own_cache"]

SPORTS = "The goalkeeper saved a penalty in the last minute and the team won the league match"
FOOD = "Simmer the onions in butter, add garlic and stock, and season the soup with salt"
NONE = "zzzz qqqq"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Two domains: three of four texts of the source are about sports; the target is about food, and one is unsure."""
    folder = tmp_path / "raw"
    folder.mkdir()
    write_jsonl(
        folder / "web.jsonl.gz", [{"text": f"{FOOD if n % 4 == 0 else SPORTS} {n}", "id": n} for n in range(40)]
    )
    write_jsonl(folder / "cook.jsonl", [*({"text": f"{FOOD} {n}"} for n in range(19)), {"text": NONE}])
    return folder


def domains(raw: Path) -> list[str]:
    return ["--domain", f"source/web={raw}/web.jsonl.gz", "--domain", f"target/cook={raw}/cook.jsonl"]


@pytest.fixture
def shards(raw: Path, tmp_path: Path) -> Path:
    command = ["shard", *domains(raw), "--output", str(tmp_path / "shards"), "--keep-order", "--no-progress"]
    assert main(command) == 0
    return tmp_path / "shards"


def test_raw_text_becomes_shards_by_topic_in_two_commands(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["label", *domains(raw), "--output", str(out), "--split", "--no-progress"]) == 0
    printed = capsys.readouterr().out
    assert "source/web: 40 documents, 100% with a topic: Sports 75%, Food_and_Drink 25%" in printed
    assert "target/cook: 20 documents, 95% with a topic: Food_and_Drink 100%" in printed
    assert "1 documents of unknown topic are in" in printed
    for field in ("source", "target"):
        command = ["shard", "--input", str(out / field), "--field", field, "--keep-columns", "topic_confidence"]
        assert main([*command, "--output", str(tmp_path / "shards"), "--no-progress"]) == 0
    manifest = load_manifest(tmp_path / "shards")
    collection = ShardCollection.open(manifest, progress=False)
    rows = dict(zip(manifest, collection.num_rows.tolist(), strict=True))
    assert rows == {"source/Food_and_Drink": 10, "source/Sports": 30, "target/Food_and_Drink": 19}


def test_other_inputs_are_labelled_with_their_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parquet has columns that JSON has not, such as times; a label in a column is used."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    times = pa.array([0, 1, 2], pa.timestamp("s"))
    table = pa.table({"content": [SPORTS, FOOD, NONE], "when": times, "topic": [None, None, "News"]})
    parquet.write_table(table, tmp_path / "web.parquet")
    command = ["label", "--domain", f"source/web={tmp_path}/web.parquet", "--text-key", "content", "--split"]
    assert main([*command, "--output", str(tmp_path / "out"), "--no-progress"]) == 0
    assert "3 documents, 100% with a topic (1 stated)" in capsys.readouterr().out
    row = json.loads(gzip.decompress((tmp_path / "out" / "source" / "News.jsonl.gz").read_bytes()))
    assert (row["text"], row["when"]) == (NONE, "1970-01-01 00:00:02")


def test_shards_are_labelled_as_their_documents(raw: Path, shards: Path, tmp_path: Path) -> None:
    assert main(["label", "--shards", str(shards), "--output", str(tmp_path / "a"), "--no-progress"]) == 0
    assert main(["label", *domains(raw), "--output", str(tmp_path / "b"), "--no-progress"]) == 0
    from dmagent_loader.labelling.parts import read_labels

    for domain in ("source/web", "target/cook"):
        a, b = ([line["topics"] for line in read_labels(tmp_path / x / "labels" / domain)] for x in "ab")
        assert a == b


def test_a_sampler_takes_the_compositions_beside_its_manifest(
    shards: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compose", str(shards), "--no-progress"]) == 0
    assert (
        "source/web: sample of 40, 100% with a topic: Sports 75%, Food_and_Drink 25%; no sampling"
        in capsys.readouterr().out
    )
    caplog.set_level(logging.INFO)
    sampler = AgentWeightedSampler(shards, agent="dmagent-rl", reading=ReadingConfig(progress=False))
    topics = dict(zip(CANONICAL_TOPICS, sampler.space.domains[0].topic_distribution(), strict=True))
    assert (topics["Sports"], topics["Food_and_Drink"]) == (0.75, 0.25)
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("topics of the domains")]
    assert "source/web: Sports 75%, Food_and_Drink 25% (measured on 40 documents by linear (" in line
    assert "target/cook: Food_and_Drink 100% (measured on 19 documents" in line
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_compositions_of_the_user_come_first(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["compose", str(shards), "--no-progress"]) == 0
    caplog.set_level(logging.INFO)
    sampler = AgentWeightedSampler(
        shards,
        agent="dmagent-rl",
        compositions={"source/web": {"News": 3, "Games": 1}},
        reading=ReadingConfig(progress=False),
    )
    topics = dict(zip(CANONICAL_TOPICS, sampler.space.domains[0].topic_distribution(), strict=True))
    assert (topics["News"], topics["Games"]) == (0.75, 0.25)
    assert "source/web: News 75%, Games 25% (compositions=)" in caplog.text
    assert sampler.space.domains[1].composition is not None


def test_compositions_of_other_shards_are_warned_of(
    shards: Path, raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["compose", str(shards), "--no-progress"]) == 0
    write_jsonl(raw / "web.jsonl.gz", [{"text": f"{FOOD} {n}"} for n in range(9)])
    assert main(["shard", *domains(raw), "--output", str(tmp_path / "new"), "--keep-order", "--no-progress"]) == 0
    (shards / COMPOSITIONS_NAME).rename(tmp_path / "new" / COMPOSITIONS_NAME)
    AgentWeightedSampler(tmp_path / "new", samples_per_reweight=4, reading=ReadingConfig(progress=False))
    assert "the shards of ['source/web'] have changed since" in caplog.text
    caplog.clear()
    (tmp_path / "new" / COMPOSITIONS_NAME).rename(tmp_path / "elsewhere.json")
    AgentWeightedSampler(
        tmp_path / "new", compositions=tmp_path / "elsewhere.json", reading=ReadingConfig(progress=False)
    )
    assert "the shards of ['source/web'] have changed since" in caplog.text


def test_a_file_of_compositions_leaves_the_other_domains_to_that_beside_the_manifest(
    shards: Path, tmp_path: Path
) -> None:
    assert main(["compose", str(shards), "--no-progress"]) == 0
    assert main(["compose", f"source/web={shards}/target/cook/*.tar", "--output", str(tmp_path / "c.json")]) == 0
    sampler = AgentWeightedSampler(shards, compositions=tmp_path / "c.json", reading=ReadingConfig(progress=False))
    assert [domain.composition is None for domain in sampler.space.domains] == [False, False]
    assert sampler.space.domains[0].composition == {"Food_and_Drink": 1.0}


def test_a_domain_without_topics_does_not_lose_the_others(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(raw / "web.jsonl.gz", [{"text": f"{NONE} {n}"} for n in range(9)])
    assert main(["shard", *domains(raw), "--output", str(tmp_path / "s"), "--no-progress"]) == 0
    assert main(["compose", str(tmp_path / "s"), "--no-progress"]) == 1
    assert "'source/web': none of 9 documents has a topic" in capsys.readouterr().err
    assert set(load_compositions(tmp_path / "s" / COMPOSITIONS_NAME)) == {"target/cook"}
    (tmp_path / "s" / COMPOSITIONS_NAME).write_text("{")
    assert main(["compose", str(tmp_path / "s"), "--no-progress"]) == 2
    captured = capsys.readouterr()
    assert "cannot be read as compositions" in captured.err
    assert "sample of" not in captured.out


def test_folders_without_a_manifest_are_named(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compose", str(tmp_path / "none"), "--output", str(tmp_path / "c.json")]) == 2
    printed = capsys.readouterr().err
    assert "there is no" in printed
    assert "load_state_dict" not in printed
    assert main(["inspect", str(shards / "source" / "web"), "--output", str(tmp_path / "page.html")]) == 2
    assert "has no manifest.json: name its domains, such as source/web=" in capsys.readouterr().err


def test_a_composition_of_little_is_warned_of(
    raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(raw / "cook.jsonl", [*({"text": FOOD} for _ in range(4)), *({"text": NONE} for _ in range(6))])
    assert main(["shard", *domains(raw), "--output", str(tmp_path / "s"), "--no-progress"]) == 0
    assert main(["compose", str(tmp_path / "s"), "--no-progress"]) == 0
    printed = capsys.readouterr().out
    assert "warning: 60% of the sample has no topic" in printed
    assert "error" not in printed.partition("target/cook: sample of")[2]
    reading = ReadingConfig(progress=False)
    sampler = AgentWeightedSampler(tmp_path / "s", reading=reading)
    assert "most of the documents sampled of ['target/cook'] had no topic" in caplog.text
    assert [domain.composition is None for domain in sampler.space.domains] == [False, True]
    shares = load_compositions(tmp_path / "s" / COMPOSITIONS_NAME)["target/cook"].shares
    caplog.clear()
    forced = AgentWeightedSampler(tmp_path / "s", compositions={"target/cook": shares}, reading=reading)
    assert forced.space.domains[1].composition == {"Food_and_Drink": 1.0}
    assert "had no topic" not in caplog.text


def test_packed_rows_are_composed_with_their_tokenizer(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = sorted({word for text in (SPORTS, FOOD) for word in text.replace(",", " ,").split()})
    vocabulary = {token: n for n, token in enumerate(["[UNK]", "<|endoftext|>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    packing = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--sequence-length", "20"]
    assert main(["shard", *domains(raw), "--output", str(tmp_path / "s"), "--no-progress", *packing]) == 0
    assert main(["compose", str(tmp_path / "s"), "--no-progress"]) == 1
    assert "holds tokens, not text: name their tokenizer (--tokenizer" in capsys.readouterr().err
    Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a")).save(str(tmp_path / "other.json"))
    other = ["--tokenizer", str(tmp_path / "other.json")]
    assert main(["compose", str(tmp_path / "s"), "--no-progress", *other]) == 2
    assert "'source/web' were packed with the tokenizer 'tokenizer.json'" in capsys.readouterr().err
    assert main(["compose", str(tmp_path / "s"), "--no-progress", *packing[:2], "--eos-token", words[0]]) == 2
    assert "are ended by token 1, but the end-of-text token is 2: " in capsys.readouterr().err
    without_manifest = [f"source/web={tmp_path}/s/source/web/*.tar", "--output", str(tmp_path / "c.json")]
    assert main(["compose", *without_manifest, "--no-progress", *other]) == 1
    assert "so it is not that of the rows" in capsys.readouterr().err
    assert main(["compose", str(tmp_path / "s"), "--no-progress", *packing[:2]]) == 0
    shares = load_compositions(tmp_path / "s" / COMPOSITIONS_NAME)["source/web"].shares
    assert shares["Sports"] == pytest.approx(0.75, abs=0.15)


def test_domains_composed_before_are_kept(shards: Path, tmp_path: Path) -> None:
    patterns = {name: f"{name}={shards}/{name}/*.tar" for name in ("source/web", "target/cook")}
    file = tmp_path / "c.json"
    for pattern in patterns.values():
        assert main(["compose", pattern, "--output", str(file), "--no-progress"]) == 0
    assert set(load_compositions(file)) == set(patterns)
    assert load_compositions(file)["source/web"].documents == 40 < FIRST_DOCUMENTS


def test_a_start_state_is_measured_and_taken_by_a_sampler(raw: Path, shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "start.json"
    assert main(["start-state", "--data", str(raw / "web.jsonl.gz"), "--output", str(file), "--no-progress"]) == 0
    assert load_start_state(file).shares == {"Sports": 0.75, "Food_and_Drink": 0.25}
    food = shutil.copytree(shards / "target" / "cook", tmp_path / "food")
    domains = {
        "source/Sports": shards / "source" / "web",
        "source/Food_and_Drink": food,
        "target/cook": shards / "target" / "cook",
    }
    sampler = AgentWeightedSampler(
        {name: f"{folder}/*.tar" for name, folder in domains.items()},
        start_state=file,
        reading=ReadingConfig(progress=False),
    )
    assert sampler.start_state == {
        "source/Sports": pytest.approx(0.75),
        "source/Food_and_Drink": pytest.approx(0.25),
        "target/cook": 0,
    }
    named = {"Sports": shards / "source" / "web", "Food_and_Drink": food, "cook": shards / "target" / "cook"}
    sampler = AgentWeightedSampler(
        {name: f"{folder}/*.tar" for name, folder in named.items()},
        fields={"Sports": "source", "Food_and_Drink": "target", "cook": "target"},
        start_state=file,
        reading=ReadingConfig(progress=False),
    )
    assert sampler.start_state == {"Sports": pytest.approx(1.0), "Food_and_Drink": 0, "cook": 0}
    assert main(["start-state", "--shards", str(shards), "--output", str(file), "--no-progress"]) == 0
    assert load_start_state(file).documents == 60
    with pytest.raises(ShardError, match="not a start state"):
        load_start_state(compositions_file(shards))


def compositions_file(shards: Path) -> Path:
    assert main(["compose", str(shards), "--no-progress"]) == 0
    return shards / COMPOSITIONS_NAME


def test_bad_records_of_training_data_are_left_out_of_a_start_state_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, file = tmp_path / "data.jsonl", tmp_path / "start.json"
    write_jsonl(data, [{"text": f"{SPORTS} {n}"} for n in range(20)])
    data.write_text(data.read_text() + "not json\n" + '{"other": 1}\n')
    command = ["start-state", "--data", str(data), "--output", str(file), "--no-progress"]
    assert main(command) == 2
    assert not file.exists()
    assert "--max-bad" in capsys.readouterr().err
    assert main([*command, "--max-bad", "1"]) == 2
    assert not file.exists()
    assert "more than 1 records" in capsys.readouterr().err
    assert main([*command, "--max-bad", "2"]) == 0
    assert "2 bad records left out, the last: " in capsys.readouterr().out
    assert load_start_state(file).documents == 20


def test_max_bad_is_refused_where_no_documents_are_read(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["start-state", "--shards", str(shards), "--max-bad", "3", "--no-progress"]) == 2
    assert "--max-bad is for the documents of --data" in capsys.readouterr().err


def test_no_next_step_is_printed_for_a_field_without_sorted_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "none.jsonl", [{"text": NONE}])
    (tmp_path / "empty.jsonl").touch()
    inputs = ["--domain", f"source/none={tmp_path}/none.jsonl", "--domain", f"target/empty={tmp_path}/empty.jsonl"]
    assert main(["label", *inputs, "--output", str(tmp_path / "out"), "--split", "--no-progress"]) == 0
    printed = capsys.readouterr().out
    assert "next:" not in printed
    assert "1 documents of unknown topic" in printed


def test_inputs_that_cannot_be_used_are_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compose", f"source/web={shards}/source/web/*.tar", "--no-progress"]) == 2
    assert "pass --output FILE" in capsys.readouterr().err
    assert main(["label", "--shards", f"web={shards}/source/web/*.tar", "--output", str(tmp_path / "o")]) == 2
    assert "the domains ['web'] have no field" in capsys.readouterr().err
    raw = tmp_path / "raw.jsonl"
    write_jsonl(raw, [{"text": SPORTS}])
    for command in (["compose", str(raw)], ["compose", f"source/web={raw}"], ["inspect", str(raw)]):
        assert main([*command, "--no-progress"]) == 2
        assert "raw.jsonl' is not a shard: write shards of it first (dmagent shard" in capsys.readouterr().err
    shards.rename(tmp_path / "shards.jsonl")  # a folder of shards may be called anything
    shards = tmp_path / "shards.jsonl"
    assert main(["compose", str(shards), "--output", str(tmp_path / "c.json"), "--no-progress"]) == 0
    (shards / COMPOSITIONS_NAME).write_text(json.dumps({"schema": 9, "domains": {}}))
    assert main(["compose", str(shards), "--no-progress"]) == 2
    assert "has schema 9, but this version reads schema 1" in capsys.readouterr().err


def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("0.txt", SPORTS.encode()), ("1.txt", b"\xff\xfe")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    command = ["compose", f"source/web={tmp_path}/a.tar", "--output", str(tmp_path / "c.json"), "--no-progress"]
    assert main(command) == 1
    assert "the member txt of row" in capsys.readouterr().err


def test_settings_without_effect_and_missing_folders_are_refused(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["start-state", "--data", str(raw / "web.jsonl.gz"), "--output"]
    assert main([*command, str(tmp_path / "s.json"), "--temperature", "0.5"]) == 2
    assert "are for the texts of a --model" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "none" / "s.json"), "--no-progress"]) == 2
    assert "make the folder" in capsys.readouterr().err


def test_topics_are_logged_only_for_a_policy_that_uses_them(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["compose", str(shards), "--no-progress"]) == 0
    caplog.set_level(logging.INFO)
    AgentWeightedSampler(shards, policy="natural", reading=ReadingConfig(progress=False))
    assert "topics of the domains" not in caplog.text
    AgentWeightedSampler(shards, policy="question-topics", reading=ReadingConfig(progress=False))
    assert "topics of the domains" in caplog.text
