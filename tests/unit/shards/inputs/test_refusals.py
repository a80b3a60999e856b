"""Inputs that were read as something else than they are, or twice, or not at all, without a word."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from shard_fixtures import WriteTar, write_jsonl

from dmagent_loader.errors import ConfigurationError, ShardError
from dmagent_loader.shards.inputs.chat import load_template
from dmagent_loader.shards.inputs.documents import DocumentReader
from dmagent_loader.shards.inputs.finding import find_inputs
from dmagent_loader.shards.inputs.options import ReadOptions

LINE = b'{"text": "one"}\n'


def texts(path: Path | str, options: ReadOptions | None = None) -> list[str]:
    options = options or ReadOptions()
    return [document.text for document in DocumentReader(find_inputs("source/a", [path], options), options)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_name_that_comes_twice_inside_a_column_is_refused_where_the_column_is_used(tmp_path: Path, name: str) -> None:
    """Only the last was kept, in silence: the model would have learnt half of a message."""
    row = (
        '{"text": "t", "meta": {"id": 1, "id": 2}, "messages": '
        '[{"role": "user", "content": "one", "content": "two"}], "tools": [{"name": "a", "name": "b"}]}'
    )
    (tmp_path / name).write_text(row if name == "a.jsonl" else f"[{row}]")
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    assert texts(tmp_path / name) == ["t"]
    with pytest.raises(ShardError, match=r"1 has a name more than once inside column 'meta', so only the last"):
        texts(tmp_path / name, ReadOptions(keep_columns=("meta",)))
    for used in ("messages", "tools"):
        one = row.replace('"content": "one", ', "") if used == "tools" else row
        (tmp_path / name).write_text(one if name == "a.jsonl" else f"[{one}]")
        with pytest.raises(ShardError, match=f"1 has a name more than once inside column '{used}', so only the last"):
            texts(tmp_path / name, ReadOptions(chat_template=str(tmp_path / "chat.jinja")))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"text,text\na,b\n", r"a\.csv names \['text'\] more than once"),
        ("a.csv", b"id;text\n1;a\n", "separated by ';', not by commas: write it with commas"),
        ("a.csv", b"id\ttext\n1\ta\n", r"separated by '\\t', not by commas: rename it to \.tsv"),
        ("a.csv", "text\nstraße\n".encode("utf-16"), r"header of .*a\.csv is not UTF-8: convert the file \(iconv"),
        ("a.csv", "text\nstraße\n".encode("utf-16-le"), "is not UTF-8: convert the file"),
        ("a.csv", "größe,text\n1,a\n".encode("latin-1"), "is not UTF-8: convert the file"),
        ("a.csv", "text,id\nstraße,1\n".encode("latin-1"), r"line 2 is not UTF-8: convert it \(iconv"),
        ("a.jsonl", b'"a string"\n', "line 1 has no text, because it is not an object but a str"),
        ("a.jsonl", b"3\n", "not an object but a int"),
        (
            "a.jsonl",
            b'{"text": "one", "text": "two"}\n',
            "line 1 names a column more than once, so only the last",
        ),
        ("a.json", b'[{"text": "one", "text": "two"}]', "item 1 names a column more than once, so only the last"),
        ("a.json", b'["a string"]', "item 1 has no text, because it is not an object but a str"),
        ("a.json", json.dumps({"text": "one"}, indent=1).encode(), "beginning of an object of several lines"),
        ("a.jsonl", b'{"text": "a\\u0000b"}\n', "line 1 contains a zero byte"),
        ("a.jsonl", LINE.decode().encode("utf-16-le"), r"line 1 contains zero bytes, as UTF-16 does \(iconv converts"),
        ("a.jsonl", LINE + bytes(512), "line 2 contains zero bytes, .* or a file that was cut by a crash"),
        ("a.jsonl", gzip.compress(LINE, mtime=0), r"a\.jsonl is compressed, but .*rename it to .*a\.jsonl\.gz"),
        ("a.feather", b"FEA1" + bytes(64) + b"FEA1", "is of version 1 of Feather: write it again with version 2"),
        ("a.jsonl.gz", LINE, r"is not compressed, although its name ends in \.gz: rename it"),
        ("a.jsonl.zst", LINE, r"is not compressed, although its name ends in \.zst: rename it"),
    ],
)
def test_contents_that_are_not_what_the_name_says_are_refused(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ShardError, match=message):
        texts(tmp_path / name)


def test_a_bad_quote_ends_the_file_whatever_may_be_left_out(tmp_path: Path) -> None:
    """The reader is in the middle of a field after it, so rows were joined or lost."""
    from dmagent_loader.shards import ShardingConfig, shard_files

    (tmp_path / "a.csv").write_text('text,id\na,1\n"b" x,2\nc,3\n')
    with pytest.raises(ShardError, match=r"line 3 is not CSV .*not known where the next row begins: repair the file"):
        shard_files({"source/a": [tmp_path / "a.csv"]}, tmp_path / "out", ShardingConfig(max_bad=9), progress=False)


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    """The message of Arrow ('Field "text" exists 2 times in schema') was taken for damage."""
    pyarrow = pytest.importorskip("pyarrow")
    columns = pyarrow.table([["one"], ["two"]], names=["text", "text"])
    pytest.importorskip("pyarrow.parquet").write_table(columns, tmp_path / "a.parquet")
    with pytest.raises(ShardError, match=r"a\.parquet names \['text'\] more than once, .*: rename"):
        texts(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.tsv", "a.TSV", "a.tsv.gz"])
def test_quotes_of_tsv_are_text(tmp_path: Path, name: str) -> None:
    """Two fields that began with a quote became one, with the rows between them."""
    data = b'id\ttext\n1\t"open\n2\ta, "b"\n3\t"closed"\n'
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert texts(tmp_path / name) == ['"open', 'a, "b"', '"closed"']
    (tmp_path / "bad.tsv").write_bytes(data + b"4\n")
    with pytest.raises(ShardError, match="line 5 has 1 fields, but the header has 2"):
        texts(tmp_path / "bad.tsv")
    with pytest.raises(ShardError, match=r"no text in column 'body'; it has \['id', 'text'\]"):
        texts(tmp_path / name, ReadOptions(text_key="body"))


def test_a_csv_with_tsv_in_its_name_has_commas(tmp_path: Path) -> None:
    (tmp_path / "from.tsv.export.csv").write_text("text,id\na,1\n")
    assert texts(tmp_path / "from.tsv.export.csv") == ["a"]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    """They were left out without a word."""
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    write_jsonl(tmp_path / "elsewhere/b.jsonl", [{"text": "b"}])
    write_jsonl(tmp_path / "data/a.jsonl", [{"text": "a"}])
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "data")
    assert texts(tmp_path / "data") == ["a", "b"]
    (tmp_path / "data/gone.jsonl").symlink_to(tmp_path / "missing.jsonl")
    with pytest.raises(ShardError, match=r"gone\.jsonl is a link to .*missing\.jsonl', which does not exist"):
        texts(tmp_path / "data")
    (tmp_path / "data/gone.jsonl").unlink()
    (tmp_path / "data/itself").symlink_to("itself")  # its size, or whether it is a folder, cannot be asked for
    assert texts(tmp_path / "data") == ["a", "b"]
    (tmp_path / "data/itself.jsonl").symlink_to("itself.jsonl")
    with pytest.raises(ShardError, match=r"itself\.jsonl is a link to .* restore or remove it"):
        texts(tmp_path / "data")


@pytest.mark.parametrize("path", ["data", "data/*", "data/*/*.jsonl", "data/**/*.jsonl", "data/closed/*.jsonl"])
def test_a_folder_that_cannot_be_listed_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """The module glob took it for an empty one, so its documents were left out in silence."""
    for name in ("open", "closed"):
        (tmp_path / "data" / name).mkdir(parents=True)
        write_jsonl(tmp_path / f"data/{name}/a.jsonl", [{"text": name}])
    scandir = os.scandir

    def closed(folder: Any) -> Any:
        if os.path.basename(os.fspath(folder)) in ("closed", b"closed"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)  # tests may run as root, who may list all folders
    with pytest.raises(
        ShardError, match=r"folder .*data/closed cannot be listed .* would be left out: make it readable"
    ):
        texts(tmp_path / path)
    assert texts(tmp_path / "data/open/*.jsonl") == ["open"]


def test_a_file_under_two_names_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "link.jsonl").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hard.jsonl").hardlink_to(path)
    names = [path, "a.jsonl", "./a.jsonl", f"file://{path}", "link.jsonl", "hard.jsonl"]
    assert [found.url for found in find_inputs("source/a", names)] == [str(path)]
    assert caplog.text == ""
    write_jsonl(tmp_path / "a.jsonl.gz", [{"text": "a"}])
    assert len(find_inputs("source/a", [tmp_path])) == 2
    assert "its documents count twice" in caplog.text


def test_a_stray_state_json_makes_no_data_set(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "state.json").write_text("{}")
    assert texts(tmp_path) == ["a"]


def test_a_tar_beside_data_is_left_out_with_a_warning(
    tmp_path: Path, write_tar: WriteTar, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar("in/old.tar", [("a.txt", b"text")])
    write_jsonl(tmp_path / "in/a.jsonl", [{"text": "a"}])
    assert texts(tmp_path / "in") == ["a"]
    assert "1 are not read" in caplog.text
    assert "old.tar" in caplog.text
    (tmp_path / "in/a.jsonl").rename(tmp_path / "in/a.md")
    with pytest.raises(ShardError, match=r"old\.tar is a tar shard"):
        texts(tmp_path / "in")


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".txt.gz", ".gz"])
def test_endings_of_texts_that_have_no_effect_are_refused(ending: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"text_files names '{ending}', which has no effect"):
        ReadOptions(text_files=(ending,))


def test_a_data_set_of_text_files_needs_their_ending(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/README.txt").write_text("one\ntwo\n")
    with pytest.raises(ShardError, match=r"would be read as 'text' by the library datasets.*--text-files \.txt"):
        texts(f"hf:{tmp_path}/corpus")
    assert texts(f"hf:{tmp_path}/corpus", ReadOptions(text_files=(".txt",))) == ["one", "two"]


def test_special_tokens_of_a_template_come_from_the_tokenizer_beside_it(tmp_path: Path) -> None:
    """They were rendered as nothing."""
    pytest.importorskip("transformers")
    path, messages = tmp_path / "chat.jinja", [{"role": "user", "content": "hi"}]
    path.write_text("{{ bos_token }}{% set sep_token = '|' %}{{ sep_token }}{{ messages[0].content }}{{ eos_token }}")
    with pytest.raises(ConfigurationError, match="writes bos_token, eos_token, which would be empty: name the tokeni"):
        load_template(str(path))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    assert load_template(str(path)).render(messages, None) == "<s>|hi</s>"


def test_content_that_a_template_cannot_write_is_refused(tmp_path: Path) -> None:
    """Lists of parts became Python code in the text."""
    pytest.importorskip("transformers")
    path = tmp_path / "chat.jinja"
    parts = [{"type": "text", "text": "hi"}]
    write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": parts}]}])
    options = ReadOptions(chat_template=str(path))
    path.write_text("{% for message in messages %}<{{ message.content }}>{% endfor %}")
    with pytest.raises(ShardError, match=r"has \[.*as 'content' of message 1, .* because it expects text: repair"):
        texts(tmp_path / "a.jsonl", options)
    path.write_text("{% for part in messages[0].content %}{{ part.text }}{% endfor %}")
    load_template.cache_clear()
    assert texts(tmp_path / "a.jsonl", options) == ["hi"]


def test_calls_of_tools_that_a_template_leaves_out_are_refused(tmp_path: Path) -> None:
    """A template for text wrote "None" in their place."""
    pytest.importorskip("transformers")
    path = tmp_path / "chat.jinja"
    calls = [{"type": "function", "function": {"name": "weather", "arguments": "{}"}}]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
    options = ReadOptions(chat_template=str(path))
    path.write_text("{% for message in messages %}<{{ message.content }}>{% endfor %}")
    with pytest.raises(ShardError, match="has a call of 'weather' in message 2, which the chat template leaves out"):
        texts(tmp_path / "a.jsonl", options)
    path.write_text("{{ messages[1].tool_calls[0].function.name }}")
    load_template.cache_clear()
    assert texts(tmp_path / "a.jsonl", options) == ["weather"]


def test_a_template_gets_the_tools_of_a_conversation(tmp_path: Path) -> None:
    """They were left out, so the text had calls of tools that nobody had described."""
    pytest.importorskip("transformers")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "chat.jinja").write_text("{{ tools | tojson if tools else 'none' }}")
    options = ReadOptions(chat_template=str(tmp_path / "chat.jinja"))
    messages, tools = [{"role": "user", "content": "hi"}], [{"name": "a"}, {"name": "b", "unit": "m"}]
    rows = [{"messages": messages, "tools": value} for value in (tools, json.dumps(tools), None, "", [])]
    text = json.dumps(tools)
    assert texts(write_jsonl(tmp_path / "a.jsonl", rows), options) == [text, text, "none", "none", "none"]
    parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", options) == [text]
    write_jsonl(tmp_path / "b.jsonl", [{"messages": messages, "tools": "a, b"}])
    with pytest.raises(ShardError, match="its column 'tools' is neither a list of tools nor the JSON of one: 'a, b'"):
        texts(tmp_path / "b.jsonl", options)
