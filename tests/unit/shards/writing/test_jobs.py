"""Rejected records, the order of documents, sizes of shards, domains that grow, and boundaries between documents."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_fixtures import published, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers

from dmagent_loader.errors import ConfigurationError, DomainError, ShardError
from dmagent_loader.shards import Decoder, ShardCollection, ShardingConfig, load_manifest, shard_files
from dmagent_loader.shards.inputs.pieces import Piece
from dmagent_loader.shards.manifest import DomainRecord
from dmagent_loader.shards.writing.chunks import keys_of
from dmagent_loader.shards.writing.collecting import Collection
from dmagent_loader.shards.writing.packing import LENGTHS_MEMBER, PACKED_MEMBER

NUMBER, END = 100, 0
"""Words of the vocabulary, each its own token; and the end-of-text token."""


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    vocabulary = {"<end>": END, **{f"w{number}": number for number in range(1, NUMBER)}}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(["<end>"])
    model.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def shard(inputs: list[Path], output: Path, *, append: bool = False, workers: int = 0, **settings: Any) -> DomainRecord:
    config = ShardingConfig(**settings)
    return shard_files({"source/a": inputs}, output, config, append=append, workers=workers, progress=False)["source/a"]


def rows(output: Path) -> list[dict[str, Any]]:
    collection = ShardCollection.open({"source/a": load_manifest(output)["source/a"]}, progress=False)
    decode = Decoder()
    return [
        decode(collection.read(0, n, row)) for n, count in enumerate(collection.shard_rows(0)) for row in range(count)
    ]


def texts(output: Path) -> list[str]:
    return [row["txt"] for row in rows(output)]


def numbered(path: Path, count: int, first: int = 0) -> Path:
    return write_jsonl(path, [{"text": f"text {number}"} for number in range(first, first + count)])


def test_bad_records_are_left_out_and_listed_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "one"}\n{"body": 1}\n{"text": "two"}\n{"text": \n{"text": "\\ud83d"}\n\xff\n{"text": " "}\n'
    )
    record = shard([path], tmp_path / "out", max_bad=4, shuffle_seed=None)
    assert texts(tmp_path / "out") == ["one", "two"]
    assert (record.documents, record.bad_records, record.empty_documents) == (2, 4, 1)
    rejects = [json.loads(line) for line in (tmp_path / "out/source/a/rejects.jsonl").read_text().splitlines()]
    assert [reject["origin"].rpartition(" ")[2] for reject in rejects] == ["2", "4", "5", "6"]
    for reject, message in zip(rejects, ("no text in column", "is not JSON", "surrogate", "not UTF-8"), strict=True):
        assert message in reject["reason"]
    assert rejects[0]["excerpt"] == "{'body': 1}"
    with pytest.raises(ShardError, match=r"more than 3 records that are no documents, the last: .*line 6 is not UTF-8"):
        shard([path], tmp_path / "other", max_bad=3)
    with pytest.raises(ShardError, match=r"line 2 has no text.*pass --max-bad N"):
        shard([path], tmp_path / "other")
    assert published(tmp_path / "other") == []


def test_the_limit_of_bad_records_is_that_of_the_domain(tmp_path: Path) -> None:
    """Catches a limit for each file, or for each process."""
    paths = [tmp_path / f"{name}.csv" for name in "abc"]
    for path in paths:
        path.write_text("text,id\nfine,1\nbad\n")
    assert shard(paths, tmp_path / "out", max_bad=3).bad_records == 3
    with pytest.raises(ShardError, match="more than 2 records"):
        shard(paths, tmp_path / "other", max_bad=2)


def test_documents_are_shuffled_by_the_seed_over_all_files(tmp_path: Path) -> None:
    paths = [numbered(tmp_path / f"{name}.jsonl", 100, first=100 * name) for name in range(3)]
    for name, seed in (("one", 0), ("same", 0), ("other", 1), ("kept", None)):
        shard(paths, tmp_path / name, shuffle_seed=seed)
    one, same, other, kept = (texts(tmp_path / name) for name in ("one", "same", "other", "kept"))
    assert kept == [f"text {number}" for number in range(300)]
    assert one == same != other
    assert sorted(one) == sorted(other) == sorted(kept)
    first = {int(text.split()[1]) // 100 for text in one[:30]}
    assert first == {0, 1, 2}, "the first rows come from all files"


def test_the_chunks_of_a_piece_are_found_without_a_list_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of N pieces listed the chunks of all N: nine seconds with 4,000 of them, hours with 100,000."""
    for name in ("000000-000000", "000001-000000", "000001-000001", "000010-000000"):
        (tmp_path / f"{name}.safetensors").touch()
    monkeypatch.setattr(Path, "iterdir", None)
    monkeypatch.setattr(os, "scandir", None)
    pieces = [
        Collection(
            domain="a", number=n, piece=Piece(inputs=()), folder=tmp_path, config=ShardingConfig(), chunk_bytes=1
        )
        for n in range(3)
    ]
    assert [[path.name for path in piece.chunks()] for piece in pieces] == [
        ["000000-000000.safetensors"],
        ["000001-000000.safetensors", "000001-000001.safetensors"],
        [],
    ]


def test_keys_are_distinct_and_uniform() -> None:
    keys = np.concatenate([keys_of(range(10_000), piece, 0) for piece in range(3)])
    assert len(np.unique(keys)) == 30_000
    counts = np.histogram(keys.astype(np.float64), 16, (0, 2.0**64))[0]
    assert np.abs(counts - 1875).max() < 200
    assert (np.diff(keys_of(range(10), 2, None).astype(np.int64)) == 1).all()


def test_shards_of_a_domain_have_equal_numbers_of_rows(tmp_path: Path, tokenizer: str) -> None:
    """The last shard had what was left, often a single row, and with it a fraction of the reading threads."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "w5 " * 63}] * 101)
    record = shard(
        [path], tmp_path / "out", tokenizer=tokenizer, sequence_length=64, rows_per_shard=50, eos_token="<end>"
    )
    assert [item.rows for item in record.shards] == [33, 34, 34]
    by_bytes = shard([path], tmp_path / "text", max_shard_bytes=60_000)
    sizes = [item.bytes for item in by_bytes.shards]
    assert len(sizes) == 2
    assert max(sizes) - min(sizes) <= 2 * 10_240


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("shards", [1, 2, 7])
def test_packed_rows_of_any_number_of_shards_are_the_same(
    tmp_path: Path, tokenizer: str, seed: int | None, shards: int
) -> None:
    """Rows that begin in one bucket of documents and end in another are whole, and none is lost or repeated."""
    rng = np.random.default_rng(0)
    documents = [" ".join(f"w{n}" for n in rng.integers(1, NUMBER, rng.integers(1, 90))) for _ in range(150)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in documents])
    settings = {"tokenizer": tokenizer, "sequence_length": 32, "eos_token": "<end>", "shuffle_seed": seed}
    record = shard([path], tmp_path / "out", rows_per_shard=-(-222 // shards), **settings)
    assert len(record.shards) == shards
    tokens = np.concatenate([row[PACKED_MEMBER] for row in rows(tmp_path / "out")])
    expected = [[*(int(word[1:]) for word in text.split()), END] for text in documents]
    assert record.tokens == len(tokens)
    assert record.tokens + (record.dropped_tokens or 0) == sum(map(len, expected))
    if seed is None:
        assert tokens.tolist() == [token for ids in expected for token in ids][: len(tokens)]
    else:
        found = [tuple(part) for part in np.split(tokens, np.flatnonzero(tokens == END) + 1)[:-1]]
        assert set(found) <= set(map(tuple, expected))
        assert len(found) >= 149, "only the document at the very end may be cut"
        assert found != [tuple(ids) for ids in expected[: len(found)]]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("per_shard", [1, 2, 5])
def test_few_documents_make_whole_shards(tmp_path: Path, tokenizer: str, count: int, per_shard: int) -> None:
    """Some of the buckets between few documents are empty."""
    documents = [" ".join([f"w{number + 1}"] * (5 * number % 7 + 1)) for number in range(count)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in documents])
    shard([path], tmp_path / "text", rows_per_shard=per_shard)
    assert sorted(texts(tmp_path / "text")) == sorted(documents)
    settings = {"tokenizer": tokenizer, "eos_token": "<end>", "sequence_length": 2, "shuffle_seed": None}
    record = shard([path], tmp_path / "packed", rows_per_shard=per_shard, **settings)
    expected = [token for text in documents for token in (*(int(word[1:]) for word in text.split()), END)]
    found = np.concatenate([row[PACKED_MEMBER] for row in rows(tmp_path / "packed")]).tolist()
    assert found == expected[: len(expected) // 2 * 2]
    assert max(item.rows for item in record.shards) <= per_shard


def test_shards_are_added_to_a_domain(tmp_path: Path, tokenizer: str) -> None:
    first, second = numbered(tmp_path / "1.jsonl", 20), numbered(tmp_path / "2.jsonl", 15, first=20)
    shard([first], tmp_path / "out", rows_per_shard=10)
    before = {name: (tmp_path / "out" / name).read_bytes() for name in published(tmp_path / "out")}
    with pytest.raises(DomainError, match="already: add to them"):
        shard([second], tmp_path / "out")
    record = shard([second], tmp_path / "out", rows_per_shard=10, append=True)
    assert (record.rows, record.documents, [item.rows for item in record.shards]) == (35, 35, [10, 10, 7, 8])
    assert sorted(texts(tmp_path / "out")) == sorted(f"text {number}" for number in range(35))
    kept = {name: (tmp_path / "out" / name).read_bytes() for name in before if name.endswith(".tar")}
    assert kept.items() <= before.items(), "earlier shards stay as they are, so a run can go on"
    keys = [row.key for row in _raw(tmp_path / "out")]
    assert len(set(keys)) == 35
    config = {"tokenizer": tokenizer, "sequence_length": 4, "eos_token": "<end>"}
    with pytest.raises(ConfigurationError, match="with format 'text'"):
        shard([second], tmp_path / "out", append=True, **config)


def _raw(output: Path) -> list[Any]:
    collection = ShardCollection.open({"source/a": load_manifest(output)["source/a"]}, progress=False)
    return [collection.read(0, n, row) for n, count in enumerate(collection.shard_rows(0)) for row in range(count)]


def test_rejects_of_later_calls_are_added(tmp_path: Path) -> None:
    for name in ("1", "2"):
        (tmp_path / f"{name}.csv").write_text(f"text,id\nfine,1\nbad {name}\n")
        record = shard([tmp_path / f"{name}.csv"], tmp_path / "out", append=True, max_bad=1)
    assert record.bad_records == 2
    assert len((tmp_path / "out/source/a/rejects.jsonl").read_text().splitlines()) == 2


def test_where_documents_end_is_kept_where_end_tokens_do_not_say_it(tmp_path: Path, tokenizer: str) -> None:
    """With special tokens parsed, as in chats, an end token may stand in the middle of a document."""
    documents = ["w1 <end> w2 w3", "w4 <end>", "w5 w6 w7 w8 w9 w10 w11 w12 w13", "w14"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in documents])
    settings = {"tokenizer": tokenizer, "sequence_length": 4, "eos_token": "<end>", "shuffle_seed": None}
    shard([path], tmp_path / "out", parse_special_tokens=True, rows_per_shard=2, **settings)
    found = rows(tmp_path / "out")
    assert [row[PACKED_MEMBER].tolist() for row in found] == [
        [1, 0, 2, 3],
        [0, 4, 0, 5],
        [6, 7, 8, 9],
        [10, 11, 12, 13],
    ]
    assert [row[LENGTHS_MEMBER].tolist() for row in found] == [[4], [1, 2, 1], [4], [4]]
    with pytest.raises(ShardError, match=r"line 1 spells the end-of-text token|no documents"):
        shard([path], tmp_path / "plain", **{**settings, "tokenizer": _unsplittable(tmp_path)})


def _unsplittable(folder: Path) -> str:
    """A tokenizer that finds its end token in text whatever its settings: it is a word of the vocabulary."""
    model = Tokenizer(models.WordLevel({"<end>": END, "w1": 1}, unk_token="w1"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save(str(folder / "word.json"))
    return str(folder / "word.json")


def test_tokens_of_another_vocabulary_are_refused(tmp_path: Path, tokenizer: str) -> None:
    from dmagent_loader.shards.inputs.documents import Document
    from dmagent_loader.shards.writing.packing import DocumentTokenizer, TextTokenizer

    make = DocumentTokenizer(TextTokenizer.load(tokenizer, "<end>")).tokens
    kept = make([Document("", {}, "a", np.array([5, 6])), Document("", {}, "b", np.array([7, END]))])
    assert [tokens.tolist() for tokens in kept] == [[5, 6, END], [7, END]]  # type: ignore[union-attr]
    with pytest.raises(ShardError, match="has token 100, but the tokenizer has 100: name the one that made"):
        make([Document("", {}, "a", np.array([100]))])


def test_another_unfinished_job_is_named_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = numbered(tmp_path / "good.jsonl", 5)
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"body": 1}])
    with pytest.raises(ShardError):
        shard_files({"source/a": [good], "source/b": [bad]}, tmp_path / "out", progress=False)
    (unfinished,) = (tmp_path / "out/.partial").iterdir()
    with caplog.at_level(logging.WARNING):
        shard([good], tmp_path / "out")
    assert f"remove {unfinished} if they will not be" in caplog.text
    assert unfinished.exists()
    config = ShardingConfig(max_bad=1)
    bad.write_text('{"body": 1}\n')
    with pytest.raises(DomainError):
        shard_files({"source/a": [good], "source/b": [bad]}, tmp_path / "out", config, progress=False)


def test_settings_of_chats_are_checked(tmp_path: Path, tokenizer: str) -> None:
    with pytest.raises(ConfigurationError, match="would stay text; pass parse_special_tokens=True"):
        ShardingConfig(tokenizer=tokenizer, sequence_length=4, chat_template="chat.jinja")
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(ShardError, match=r"no text in column 'text'; it has \['messages'\]: for conversations, pass"):
        shard([path], tmp_path / "out")
    with pytest.raises(ConfigurationError, match="there is no chat template"):
        shard([path], tmp_path / "out", chat_template=str(tmp_path / "none.jinja"))
    with pytest.raises(ConfigurationError, match="no tokenizer could be loaded"):
        shard([path], tmp_path / "out", chat_template=str(tmp_path / "none"))


def test_conversations_are_rendered_by_the_template(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
        "<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    )
    turn = {"role": "user", "content": "hi"}
    bad = [None, [], [{"content": "x"}], [{"role": "user"}], [{"role": "robot", "content": "x"}]]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [turn, turn]}, *({"messages": value} for value in bad)])
    record = shard([path], tmp_path / "out", chat_template=str(template), max_bad=5)
    assert texts(tmp_path / "out") == ["<|user|>hi\n<|user|>hi\n"]
    assert record.bad_records == 5
    reasons = (tmp_path / "out/source/a/rejects.jsonl").read_text()
    for message in ("is not a list of messages", "no 'role' in message 1", "no 'content' in message 1", "no robots"):
        assert message in reasons
