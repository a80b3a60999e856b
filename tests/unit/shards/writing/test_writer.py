"""Shards from text: exact content, equal bytes, all or nothing."""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_fixtures import published, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers

from dmagent_loader._files import locked
from dmagent_loader.cli.shards import configure_index, configure_shard
from dmagent_loader.errors import (
    ConfigurationError,
    DMAgentError,
    DomainError,
    EmptyShardError,
    ShardError,
    ShardNotFoundError,
)
from dmagent_loader.shards import Decoder, ShardCollection, ShardingConfig, load_manifest, shard_files
from dmagent_loader.shards.writing.packing import TextTokenizer

WORDS = [f"w{n}" for n in range(50)]


def read_all(output: Path, domain: str) -> list[dict[str, Any]]:
    collection = ShardCollection.open({domain: load_manifest(output)[domain]}, progress=False)
    decode = Decoder()
    shards = enumerate(collection.shard_rows(0))
    return [decode(collection.read(0, shard, row)) for shard, rows in shards for row in range(rows)]


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    vocabulary = {"[UNK]": 0, "<|endoftext|>": 1, **{word: number + 2 for number, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_raw_text_comes_back_in_order_over_several_shards(web: Path, tmp_path: Path) -> None:
    config = ShardingConfig(rows_per_shard=10, shuffle_seed=None)
    records = shard_files({"source/web": [web]}, tmp_path / "out", config, progress=False)
    assert [shard.rows for shard in records["source/web"].shards] == [8, 8, 9]
    assert read_all(tmp_path / "out", "source/web") == [{"txt": f"text {n} ☃"} for n in range(25)]
    names = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    shards = [f"source/web/web-{n:06d}.tar{end}" for n in range(3) for end in ("", ".index")]
    assert names == ["manifest.json", "source/web/shards.index", *shards]


def test_columns_are_kept_beside_the_text(web: Path, tmp_path: Path) -> None:
    config = ShardingConfig(keep_columns=("url", "score"), shuffle_seed=None)
    shard_files({"source/web": [web]}, tmp_path / "out", config, progress=False)
    assert read_all(tmp_path / "out", "source/web")[3] == {"txt": "text 3 ☃", "json": {"url": "u3", "score": 3}}


def test_shards_have_the_size_that_is_asked_for(web: Path, tmp_path: Path) -> None:
    records = shard_files(
        {"source/web": [web]}, tmp_path / "out", ShardingConfig(max_shard_bytes=5 * 1024), progress=False
    )
    assert [shard.rows for shard in records["source/web"].shards] == [5] * 5


def test_text_files_are_one_document_each_and_empty_ones_are_counted(tmp_path: Path) -> None:
    (tmp_path / "in/sub").mkdir(parents=True)
    for name, text in {"b.txt": "two", "a.py": "one", "sub/c.md": "three", "empty.txt": " \n", ".git": "x"}.items():
        (tmp_path / "in" / name).write_text(text)
    config = ShardingConfig(text_files=(".txt", ".py", ".MD"), shuffle_seed=None)
    records = shard_files({"source/docs": [tmp_path / "in"]}, tmp_path / "out", config, progress=False)
    assert [row["txt"] for row in read_all(tmp_path / "out", "source/docs")] == ["one", "two", "three"]
    assert records["source/docs"].empty_documents == 1


def test_packed_rows_are_the_documents_with_end_tokens_minus_the_tail(tokenizer_file: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(1, 40))) for _ in range(100)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"content": text} for text in texts])
    config = ShardingConfig(
        text_key="content", tokenizer=str(tokenizer_file), sequence_length=64, rows_per_shard=7, shuffle_seed=None
    )
    record = shard_files({"target/a": [path]}, tmp_path / "out", config, progress=False)["target/a"]
    expected = [token for text in texts for token in [*(int(word[1:]) + 2 for word in text.split()), 1]]
    rows = [row["input_ids.npy"] for row in read_all(tmp_path / "out", "target/a")]
    assert all(row.shape == (64,) and row.dtype == np.uint16 for row in rows)
    assert np.concatenate(rows).tolist() == expected[: len(rows) * 64]
    assert record.dropped_tokens == len(expected) - len(rows) * 64 == len(expected) % 64
    assert record.tokens == len(rows) * 64
    settings = json.loads((tmp_path / "out/manifest.json").read_text())["domains"]["target/a"]["settings"]
    assert (settings["tokenizer"], settings["eos_id"], settings["dtype"]) == ("tokenizer.json", 1, "uint16")


def test_large_vocabularies_need_uint32(tmp_path: Path) -> None:
    """Catches uint16 chosen by the number of tokens and not by the largest id."""
    vocabulary = {"[UNK]": 0, "</s>": 1, "x": 65_535}
    for largest, dtype in ((65_535, np.uint16), (65_536, np.uint32)):
        vocabulary["x"] = largest
        Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")).save(str(tmp_path / "t.json"))
        assert TextTokenizer.load(tmp_path / "t.json").dtype == dtype


def test_a_transformers_folder_packs_the_same_rows(tokenizer_file: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), eos_token="<|endoftext|>").save_pretrained(
        tmp_path / "folder"
    )
    bare, folder = TextTokenizer.load(tokenizer_file), TextTokenizer.load(tmp_path / "folder")
    assert bare.encode(["w1 w2", "w3"]) == folder.encode(["w1 w2", "w3"]) == [[3, 4], [5]]
    assert (bare.eos_id, bare.dtype) == (folder.eos_id, folder.dtype)


def test_domains_are_added_to_a_folder_and_never_overwritten(web: Path, tmp_path: Path) -> None:
    shard_files({"source/web": [web]}, tmp_path / "out", progress=False)
    shard_files({"target/web": [web]}, tmp_path / "out", progress=False)
    assert list(load_manifest(tmp_path / "out")) == ["source/web", "target/web"]
    before = (tmp_path / "out/manifest.json").read_bytes()
    with pytest.raises(DomainError, match=r"\['target/web'\] already.*--append"):
        shard_files({"target/web": [web], "target/new": [web]}, tmp_path / "out", progress=False)
    assert (tmp_path / "out/manifest.json").read_bytes() == before


def test_rows_of_another_kind_are_not_put_beside_those_of_a_folder(
    web: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    """They could not be put into one batch, which would be noticed in the middle of a run."""

    def packed(length: int) -> ShardingConfig:
        return ShardingConfig(tokenizer=str(tokenizer_file), sequence_length=length)

    shard_files({"source/web": [web]}, tmp_path / "out", packed(4), progress=False)
    before = (tmp_path / "out/manifest.json").read_bytes()
    for config, message in ((packed(8), "sequence_length 4"), (ShardingConfig(), "format 'packed'")):
        with pytest.raises(ConfigurationError, match=message):
            shard_files({"target/web": [web]}, tmp_path / "out", config, progress=False)
    shard_files({"target/web": [web]}, tmp_path / "out", packed(4), progress=False)
    assert before != (tmp_path / "out/manifest.json").read_bytes()


def test_another_tokenizer_in_a_file_of_the_same_name_is_refused(
    web: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    """Most are called tokenizer.json; under another name the same one may be used again."""

    def packed(path: Path) -> ShardingConfig:
        return ShardingConfig(tokenizer=str(path), sequence_length=4)

    shard_files({"source/web": [web]}, tmp_path / "out", packed(tokenizer_file), progress=False)
    renamed, other = tmp_path / "renamed.json", tmp_path / "other" / tokenizer_file.name
    renamed.write_bytes(tokenizer_file.read_bytes())
    shard_files({"source/again": [web]}, tmp_path / "out", packed(renamed), progress=False)
    other.parent.mkdir()
    vocabulary = {"[UNK]": 0, "<|endoftext|>": 1, "w2": 2}
    Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")).save(str(other))
    with pytest.raises(ConfigurationError, match=r"tokenizer_sha256 'tokenizer.json' \(\w+\), but these rows"):
        shard_files({"target/web": [web]}, tmp_path / "out", packed(other), progress=False)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}, {"body": "b"}], r"bad\.jsonl, line 2 has no text in column 'text'; it has \['body'\]"),
        ([{"text": "a"}, {"text": None}], r"line 2 has no text in column 'text', but None"),
        ([{"text": "a"}, ["text"]], r"line 2 has no text.*list"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_left(web: Path, tmp_path: Path, rows: list[Any], message: str) -> None:
    """The good domain beside the bad one is not left half-published either."""
    bad = write_jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ShardError, match=message):
        shard_files({"source/web": [web], "source/bad": [bad]}, tmp_path / "out", progress=False)
    assert published(tmp_path / "out") == []


def test_broken_input_files_are_named(web: Path, tmp_path: Path) -> None:
    cases = {
        "cut.jsonl.gz": (web.read_bytes()[:-20], "is damaged"),
        "json.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        "latin.txt": ("ü" * 5).encode("latin-1"),
        "latin.jsonl": (b'{"text": "\xfc"}\n', "line 1 is not UTF-8"),
    }
    for name, case in cases.items():
        data, message = case if isinstance(case, tuple) else (case, "is not UTF-8")
        (tmp_path / name).write_bytes(data)
        config = ShardingConfig(text_files=(".txt",))
        with pytest.raises(ShardError, match=rf"{name}.*{message}"):
            shard_files({"source/x": [tmp_path / name]}, tmp_path / "out", config, progress=False)


def test_domains_without_rows_are_errors(tokenizer_file: Path, tmp_path: Path) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"text": " "}])
    short = write_jsonl(tmp_path / "short.jsonl", [{"text": "w1 w2"}])
    with pytest.raises(EmptyShardError, match="0 documents with text, 1 empty"):
        shard_files({"source/x": [empty]}, tmp_path / "out", progress=False)
    config = ShardingConfig(tokenizer=str(tokenizer_file), sequence_length=64)
    with pytest.raises(EmptyShardError, match="3 tokens, fewer than one row of 64"):
        shard_files({"source/x": [short]}, tmp_path / "out", config, progress=False)


@pytest.mark.parametrize(
    "name", ["web", "a/b/c", "../etc/passwd", "source/..", "source/.hidden", "/abs/x", "source/", "a/b*"]
)
def test_domain_names_that_are_no_folders_are_refused(web: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(DomainError, match="cannot be a folder"):
        shard_files({name: [web]}, tmp_path / "out", progress=False)


def test_settings_that_cannot_work_are_refused(tokenizer_file: Path, tmp_path: Path) -> None:
    for settings in (
        {"tokenizer": "t.json"},
        {"sequence_length": 5},
        {"tokenizer": "t.json", "sequence_length": 5, "keep_columns": ("a",)},
        {"tokenizer": "t.json", "sequence_length": 0},
        {"eos_token": "x"},
        {"rows_per_shard": 0},
    ):
        with pytest.raises(ConfigurationError):
            ShardingConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no end-of-text token"):
        TextTokenizer.load(tokenizer_file, eos_token="<missing>")
    with pytest.raises(ConfigurationError, match="no tokenizer could be loaded"):
        TextTokenizer.load(tmp_path / "nothing.json")
    with pytest.raises(ShardNotFoundError, match=r"nothing\.jsonl"):
        shard_files({"source/x": [tmp_path / "nothing.jsonl"]}, tmp_path / "out", progress=False)


def test_columns_that_no_document_has_are_an_error(web: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"\['urll'\]"):
        shard_files({"source/x": [web]}, tmp_path / "out", ShardingConfig(keep_columns=("urll",)), progress=False)


def test_two_processes_do_not_write_to_one_folder(web: Path, tmp_path: Path) -> None:
    """The second one would remove the partial shards of the first as those of a killed writer."""
    with locked(tmp_path / "out" / ".lock"), pytest.raises(ConfigurationError, match="another process is writing"):
        shard_files({"source/web": [web]}, tmp_path / "out", progress=False)
    shard_files({"source/web": [web]}, tmp_path / "out", progress=False)


def test_a_folder_that_cannot_be_written_to_is_named(web: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigurationError, match=r"cannot be written to '.*file/out'"):
        shard_files({"source/web": [web]}, tmp_path / "file" / "out", progress=False)


def test_a_manifest_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardNotFoundError, match="dmagent shard"):
        load_manifest(tmp_path)
    for text, message in (("[]", "is not a manifest"), ("{", "is not a manifest"), ('{"schema": 9}', "schema 9")):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ShardError, match=message):
            load_manifest(tmp_path)


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    configure_shard(commands.add_parser("shard"))
    configure_index(commands.add_parser("index"))
    parsed = parser.parse_args([*arguments, "--no-progress"])
    return int(parsed.run(parsed))


def test_commands_write_shards_and_show_them(web: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for name in ("News", "Science"):
        write_jsonl(tmp_path / "in" / f"{name}.jsonl", [{"text": name}] * 3)
    out = str(tmp_path / "out")
    assert run("shard", "--input", str(tmp_path / "in"), "--field", "source", "--output", out) == 0
    assert run("shard", "--domain", f"target/web={web}", "--output", out, "--keep-columns", "url", "score") == 0
    assert list(load_manifest(out)) == ["source/News", "source/Science", "target/web"]
    assert "25 rows in 1 shard(s)" in capsys.readouterr().out
    assert run("index", out) == 0
    assert "web-000000.tar" in capsys.readouterr().out
    shard = tmp_path / "out/target/web/web-000000.tar"
    shard.write_bytes(shard.read_bytes()[: 8 * 1024])
    assert run("index", f"target/web={shard}", f"{out}/source/News") == 1
    printed = capsys.readouterr().out
    assert "is damaged at byte 8192: cut at a record boundary" in printed
    assert "News-000000.tar" in printed


def test_commands_refuse_what_names_no_field_or_no_files(web: Path, tmp_path: Path) -> None:
    for arguments in (
        ("--domain", f"web={web}"),
        ("--domain", "source/web"),
        ("--input", str(tmp_path / "nowhere"), "--field", "source"),
    ):
        with pytest.raises(DMAgentError):
            run("shard", *arguments, "--output", str(tmp_path / "out"))


@pytest.mark.parametrize("ending", ["json", "json.gz", "jsonlines", "ndjson", "JSONL"])
def test_json_lines_are_known_by_any_of_their_names(tmp_path, ending):
    """C4 calls its files .json.gz; read as texts, keys and braces would be trained on."""
    path, lines = tmp_path / f"c4.{ending}", b'{"text": "one", "url": "u"}\n{"text": "two", "url": "v"}\n'
    path.write_bytes(gzip.compress(lines) if ending.endswith("gz") else lines)
    records = shard_files({"source/web": [path]}, tmp_path / "out", ShardingConfig(), progress=False)
    assert records["source/web"].rows == 2


def test_the_command_passes_its_settings_on(web: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/News.jsonl").write_text('{"body": "one"}\n{"text": "no body"}\n{"body": "two"}\n')
    (tmp_path / "in/README.md").write_text("a text")
    (tmp_path / "in/folder").mkdir()
    common = ("--field", "source", "--output", str(tmp_path / "out"), "--text-key", "body", "--keep-order")
    assert run("shard", "--input", str(tmp_path / "in"), *common, "--max-bad", "1") == 0
    printed = capsys.readouterr()
    assert "not read, because they are not data files: README.md, folder/\n" in printed.err
    assert "--input does not read the folders in it: name them with --domain" in printed.err
    assert "1 bad records left out (see source/News/rejects.jsonl)" in printed.out
    readme = f"source/News={tmp_path}/in/README.md"
    assert run("shard", "--domain", readme, *common, "--append", "--text-files", ".md") == 0
    assert [row["txt"] for row in read_all(tmp_path / "out", "source/News")] == ["one", "two", "a text"]
    (tmp_path / "in/News.jsonl").unlink()
    (tmp_path / "in/folder").rmdir()
    with pytest.raises(ConfigurationError, match=r"holds no data files, only \['README.md'\]: pass a folder"):
        run("shard", "--input", str(tmp_path / "in"), *common)


def test_a_domain_that_is_given_twice_is_refused_under_any_name(web: Path, tmp_path: Path) -> None:
    """The second one replaced the first where only one of them had its field."""
    for names in (("a", "a"), ("a", "source/a"), ("source/a", "a")):
        domains = [argument for name in names for argument in ("--domain", f"{name}={web}")]
        with pytest.raises(ConfigurationError, match="'source/a' is given twice"):
            run("shard", *domains, "--field", "source", "--output", str(tmp_path / "out"))


def test_file_names_may_have_commas(tmp_path: Path) -> None:
    for name in ("a,b.jsonl", "c.jsonl", "d,e,f.jsonl"):
        write_jsonl(tmp_path / name, [{"text": name}])
    paths = ",".join(str(tmp_path / name) for name in ("a,b.jsonl", "c.jsonl", "d,e,f.jsonl"))
    assert run("shard", "--domain", f"source/a={paths}", "--output", str(tmp_path / "out"), "--keep-order") == 0
    assert [row["txt"] for row in read_all(tmp_path / "out", "source/a")] == ["a,b.jsonl", "c.jsonl", "d,e,f.jsonl"]
