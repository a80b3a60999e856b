"""Folders that grow: nothing of others is removed or replaced, no data is added twice, no row is of another kind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from shard_fixtures import write_jsonl
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from dmagent_loader.errors import ConfigurationError, EmptyShardError, ShardError
from dmagent_loader.shards import Decoder, ShardCollection, ShardingConfig, load_manifest, shard_files
from dmagent_loader.shards.manifest import MANIFEST_NAME, DomainRecord
from dmagent_loader.shards.writing import running
from dmagent_loader.shards.writing.job import Job
from dmagent_loader.shards.writing.place import LocalPlace


def lines(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_jsonl(path, [{"text": text} for text in texts])


def shard(path: Path, output: Path, *, append: bool = False, **settings: Any) -> DomainRecord:
    config = ShardingConfig(**{"shuffle_seed": None, **settings})
    return shard_files({"source/a": [path]}, output, config, append=append, progress=False)["source/a"]


def contents(output: Path) -> tuple[list[str], list[str]]:
    """Keys and texts of all rows."""
    collection = ShardCollection.open({"source/a": load_manifest(output)["source/a"]}, progress=False)
    samples = [
        collection.read(0, number, row) for number, rows in enumerate(collection.shard_rows(0)) for row in range(rows)
    ]
    decode = Decoder()
    return [sample.key for sample in samples], [decode(sample)["txt"] for sample in samples]


def killed(*arguments: Any, **options: Any) -> None:
    raise KeyboardInterrupt


def tokenizer(path: Path, *, lower: bool = False) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    model = Tokenizer(models.WordLevel({"<end>": 0, "w1": 1, "W1": 2}, unk_token="w1"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if lower:
        model.normalizer = normalizers.Lowercase()
    model.save(str(path))
    return str(path)


def test_inputs_where_the_shards_would_be_written_stay(tmp_path: Path) -> None:
    """The folder of a domain that the manifest did not name was removed, with the inputs in it."""
    raw = lines(tmp_path / "data/source/a/raw.jsonl", "one")
    for given in (raw, raw.parent, tmp_path / "data"):
        with pytest.raises(ConfigurationError, match=r"raw\.jsonl lies in .*where the shards of 'source/a' would be"):
            shard(given, tmp_path / "data")
    link = tmp_path / "link.jsonl"
    link.symlink_to(raw)
    with pytest.raises(ConfigurationError, match="lies in"):
        shard(link, tmp_path / "data")
    assert raw.is_file()


def test_files_of_others_in_the_folder_of_a_new_domain_stay(tmp_path: Path) -> None:
    mine = tmp_path / "out/source/a/notes.md"
    mine.parent.mkdir(parents=True)
    mine.write_text("keep me")
    with pytest.raises(ConfigurationError, match=r"holds files that .* does not name, such as 'notes.md': move them"):
        shard(lines(tmp_path / "a.jsonl", "one"), tmp_path / "out")
    assert mine.read_text() == "keep me"


def test_a_file_that_appears_while_a_job_runs_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard(lines(tmp_path / "1.jsonl", "one"), tmp_path / "out")
    before = (tmp_path / "out/source/a/a-000000.tar").read_bytes()
    monkeypatch.setattr(running, "next_shard", lambda *arguments: 0)
    with pytest.raises(ConfigurationError, match=r"a-000000\.tar' has appeared since this job began"):
        shard(lines(tmp_path / "2.jsonl", "two"), tmp_path / "out", append=True)
    assert (tmp_path / "out/source/a/a-000000.tar").read_bytes() == before


@pytest.mark.parametrize("append", [False, True])
def test_a_job_that_is_killed_while_it_publishes_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, append: bool
) -> None:
    second = lines(tmp_path / "2.jsonl", "two", "three", "four")
    if append:
        shard(lines(tmp_path / "1.jsonl", "one"), tmp_path / "out")
    settings = {"append": append, "rows_per_shard": 1}
    replace, moved = os.replace, []

    def killed_at_third(source: Path, target: Path) -> None:
        if Path(target).parent == tmp_path / "out/source/a":
            moved.append(target)
            if len(moved) == 3:
                raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_at_third)
        with pytest.raises(KeyboardInterrupt):
            shard(second, tmp_path / "out", **settings)  # type: ignore[arg-type]
    shard(second, tmp_path / "out", **settings)  # type: ignore[arg-type]
    keys, texts = contents(tmp_path / "out")
    assert texts == [*(["one"] if append else []), "two", "three", "four"]
    assert keys == [f"{number:09d}" for number in range(len(texts))]
    assert len(list((tmp_path / "out").rglob("*.tar"))) == len(texts)
    assert not (tmp_path / "out/.partial").exists()


def test_a_killed_job_leaves_the_files_beside_the_shards_of_a_domain_that_another_job_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed when it had noted what it would publish, before the first file was there."""
    first = lines(tmp_path / "1.jsonl", "one")
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "two"}, {"body": "no text"}])
    with monkeypatch.context() as patch:
        patch.setattr(LocalPlace, "move_in", killed)
        with pytest.raises(KeyboardInterrupt):
            shard(first, tmp_path / "out", append=True, max_bad=1)
    shard(bad, tmp_path / "out", max_bad=1)
    rejects = (tmp_path / "out/source/a/rejects.jsonl").read_bytes()
    shard(first, tmp_path / "out", append=True, max_bad=1)
    assert (tmp_path / "out/source/a/rejects.jsonl").read_bytes() == rejects
    table = json.loads((tmp_path / "out/source/a/shards.index").read_bytes())
    assert list(table["shards"]) == ["a-000000.tar", "a-000001.tar"]
    assert contents(tmp_path / "out")[1] == ["two", "one"]


def test_numbers_go_on_after_the_largest_of_the_manifest_and_the_folder(tmp_path: Path) -> None:
    """With one shard taken out of the manifest, the next was called as the last one, and replaced it."""
    shard(lines(tmp_path / "1.jsonl", "a", "b", "c"), tmp_path / "out", rows_per_shard=1)
    path = tmp_path / "out/manifest.json"
    manifest = json.loads(path.read_text())
    entry = manifest["domains"]["source/a"]
    del entry["shards"][0]
    entry["rows"] = 2
    path.write_text(json.dumps(manifest))
    shutil.copy(tmp_path / "out/source/a/a-000000.tar", tmp_path / "out/source/a/a-000007.tar")
    record = shard(lines(tmp_path / "2.jsonl", "d"), tmp_path / "out", append=True)
    assert record.shards[-1].path == "source/a/a-000008.tar"
    assert contents(tmp_path / "out") == (["000000001", "000000002", "000000003"], ["b", "c", "d"])


def test_an_append_that_is_repeated_adds_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A finished one doubled the data, and so did one that was killed after it had written the manifest."""
    shard(lines(tmp_path / "1.jsonl", "one"), tmp_path / "out")
    second = lines(tmp_path / "2.jsonl", "two")
    first = shard(second, tmp_path / "out", append=True)
    (tmp_path / "link.jsonl").symlink_to(second)
    for path in (second, tmp_path / "link.jsonl"):
        caplog.clear()
        assert shard(path, tmp_path / "out", append=True) == first
        assert "holds 1 of 1 input(s) of source/a already" in caplog.text
    assert contents(tmp_path / "out")[1] == ["one", "two"]
    assert shard(second, tmp_path / "out", append=True, text_files=(".md",)).rows == 3, "other settings are another job"


def test_an_append_adds_the_new_files_of_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The old ones came in once more, without a word."""
    (tmp_path / "in").mkdir()
    lines(tmp_path / "in/1.jsonl", "one")
    shard(tmp_path / "in", tmp_path / "out")
    lines(tmp_path / "in/0.jsonl", "zero")
    assert shard(tmp_path / "in", tmp_path / "out", append=True).documents == 2
    assert contents(tmp_path / "out")[1] == ["one", "zero"]
    assert "holds 1 of 2 input(s) of source/a already" in caplog.text
    assert "earlier version" not in caplog.text
    lines(tmp_path / "in/1.jsonl", "one", "more")
    assert shard(tmp_path / "in", tmp_path / "out", append=True).documents == 4
    assert "holds an earlier version of 1 input(s) of source/a" in caplog.text
    assert shard(tmp_path / "in", tmp_path / "out", append=True).documents == 4


def test_an_append_that_was_killed_reads_no_input_that_another_job_has_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its chunks hold the documents of all its inputs."""
    paths = [lines(tmp_path / f"{name}.jsonl", name) for name in ("one", "two")]
    config = ShardingConfig(shuffle_seed=None)
    shard(lines(tmp_path / "zero.jsonl", "zero"), tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(running, "plan_shards", None)
        with pytest.raises(TypeError):
            shard_files({"source/a": paths}, tmp_path / "out", config, append=True, progress=False)
    shard(paths[0], tmp_path / "out", append=True)
    shard_files({"source/a": paths}, tmp_path / "out", config, append=True, progress=False)
    assert contents(tmp_path / "out")[1] == ["zero", "one", "two"]
    assert not (tmp_path / "out/.partial").exists()


@pytest.mark.parametrize("append", [False, True])
def test_a_job_that_is_killed_after_it_wrote_the_manifest_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, append: bool
) -> None:
    path = lines(tmp_path / "1.jsonl", "one")
    with monkeypatch.context() as patch:
        patch.setattr(Job, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            shard(path, tmp_path / "out", append=append)
    assert (tmp_path / "out/.partial").exists()
    assert shard(path, tmp_path / "out", append=append).rows == 1
    assert contents(tmp_path / "out")[1] == ["one"]
    assert not (tmp_path / "out/.partial").exists()


def test_an_append_adds_the_domains_that_are_not_there(tmp_path: Path) -> None:
    a, b = lines(tmp_path / "a.jsonl", "a"), lines(tmp_path / "b.jsonl", "b")
    shard_files({"source/a": [a]}, tmp_path / "out", progress=False)
    records = shard_files({"source/a": [a], "source/b": [b]}, tmp_path / "out", append=True, progress=False)
    assert {name: record.rows for name, record in records.items()} == {"source/a": 1, "source/b": 1}


def test_rows_of_another_tokenizer_or_made_in_another_way_are_not_added(tmp_path: Path) -> None:
    """Only the vocabulary was compared."""
    first, second = lines(tmp_path / "1.jsonl", "W1 w1"), lines(tmp_path / "2.jsonl", "w1 W1")
    packed = {"tokenizer": tokenizer(tmp_path / "x/tokenizer.json"), "eos_token": "<end>", "sequence_length": 2}
    shard(first, tmp_path / "packed", **packed)
    other = tokenizer(tmp_path / "y/tokenizer.json", lower=True)
    with pytest.raises(ConfigurationError, match=r"with tokenizer_sha256 'tokenizer\.json' \(\w{12}\), but these rows"):
        shard(second, tmp_path / "packed", append=True, **{**packed, "tokenizer": other})
    with pytest.raises(ConfigurationError, match=r"parse_special_tokens False, but .* True: write all rows of a"):
        shard(second, tmp_path / "packed", append=True, parse_special_tokens=True, **packed)
    shard(first, tmp_path / "text")
    with pytest.raises(ConfigurationError, match=r"keep_columns \[\], but these rows would have \['text'\]"):
        shard(second, tmp_path / "text", append=True, keep_columns=("text",))
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    with pytest.raises(ConfigurationError, match="chat_template None, but"):
        shard(second, tmp_path / "text", append=True, chat_template=str(template))


def test_an_unfinished_job_knows_its_template_and_tokenizer_by_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another one under the same name, a job went on with the chunks of the first."""
    pytest.importorskip("transformers")
    template, path = tmp_path / "chat.jinja", tmp_path / "a.jsonl"
    write_jsonl(path, [{"messages": [{"role": "user", "content": "hi"}]}])
    texts = lines(tmp_path / "1.jsonl", "W1 w1")
    packed = {"eos_token": "<end>", "sequence_length": 3}
    template.write_text("one {{ messages[0].content }}")
    with monkeypatch.context() as patch:
        patch.setattr(running, "plan_shards", None)
        with pytest.raises(TypeError):
            shard(path, tmp_path / "chat", chat_template=str(template))
        with pytest.raises(TypeError):
            shard(texts, tmp_path / "packed", tokenizer=tokenizer(tmp_path / "tokenizer.json"), **packed)
    template.write_text("two {{ messages[0].content }}")
    shard(path, tmp_path / "chat", chat_template=str(template))
    assert contents(tmp_path / "chat")[1] == ["two hi"]
    changed = tokenizer(tmp_path / "tokenizer.json", lower=True)
    shard(texts, tmp_path / "packed", tokenizer=changed, **packed)
    collection = ShardCollection.open(load_manifest(tmp_path / "packed"), progress=False)
    assert Decoder()(collection.read(0, 0, 0))["input_ids.npy"].tolist() == [1, 1, 0]


def test_work_that_cannot_go_on_is_removed(tmp_path: Path) -> None:
    packed = {"tokenizer": tokenizer(tmp_path / "tokenizer.json"), "eos_token": "<end>", "sequence_length": 64}
    with pytest.raises(EmptyShardError):
        shard(lines(tmp_path / "1.jsonl", "w1"), tmp_path / "out", **packed)
    with pytest.raises(EmptyShardError):
        shard(lines(tmp_path / "2.jsonl", " "), tmp_path / "out")
    with pytest.raises(ShardError, match="are to be kept"):
        shard(lines(tmp_path / "3.jsonl", "one"), tmp_path / "out", keep_columns=("url",))
    assert list((tmp_path / "out").iterdir()) == []


def test_numbers_below_zero_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"shuffle_seed=-1: it must be at least 0"):
        ShardingConfig(shuffle_seed=-1)
    with pytest.raises(ConfigurationError, match=r"workers=-3: it must be at least 0"):
        shard_files({"source/a": [lines(tmp_path / "a.jsonl", "a")]}, tmp_path / "out", workers=-3)


def test_small_domains_are_left_out_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As the topics of `dmagent label --split` may be; the tokens of the others are not made again."""
    packed = {"tokenizer": tokenizer(tmp_path / "tokenizer.json"), "eos_token": "<end>", "sequence_length": 4}
    domains = {
        f"source/{name}": [lines(tmp_path / f"{name}.jsonl", "w1 " * words)] for name, words in [("a", 9), ("b", 2)]
    }
    with pytest.raises(EmptyShardError, match=r"'source/b' would have no rows.*leave such domains out \(--skip-small"):
        shard_files(domains, tmp_path / "out", ShardingConfig(**packed), progress=False)  # type: ignore[arg-type]
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()
    config = ShardingConfig(**packed, skip_small=True)  # type: ignore[arg-type]
    records = shard_files(domains, tmp_path / "out", config, progress=False)
    assert "goes on where it stood" in caplog.text
    assert "too little text for a row (--skip-small): source/b (1 documents)" in caplog.text
    assert list(records) == list(load_manifest(tmp_path / "out")) == ["source/a"]
    assert not (tmp_path / "out" / ".partial").exists()
    with pytest.raises(EmptyShardError, match="'source/b' would have no rows"):
        shard_files({"source/b": domains["source/b"]}, tmp_path / "none", config, progress=False)


def test_a_job_with_small_domains_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill behind the manifest, and with --append: the domains that were left out are not an error."""
    packed = {"tokenizer": tokenizer(tmp_path / "tokenizer.json"), "eos_token": "<end>", "sequence_length": 4}
    config = ShardingConfig(**packed, skip_small=True)  # type: ignore[arg-type]
    domains = {
        f"source/{name}": [lines(tmp_path / f"{name}.jsonl", "w1 " * words)] for name, words in [("a", 9), ("b", 2)]
    }
    with monkeypatch.context() as patch:
        patch.setattr(Job, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            shard_files(domains, tmp_path / "out", config, progress=False)
    manifest = (tmp_path / "out" / MANIFEST_NAME).read_bytes()
    for append in (False, True):
        assert list(shard_files(domains, tmp_path / "out", config, append=append, progress=False)) == ["source/a"]
        assert (tmp_path / "out" / MANIFEST_NAME).read_bytes() == manifest
        assert not (tmp_path / "out/.partial").exists()
    with pytest.raises(EmptyShardError, match=r"'source/b' would have no rows.*leave such domains out"):
        shard_files(domains, tmp_path / "out", ShardingConfig(**packed), append=True, progress=False)  # type: ignore[arg-type]
