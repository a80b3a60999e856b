"""Text shards read as packed rows: what is counted, kept, refused and left out."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_fixtures import write_jsonl
from text_shards import END, END_ID, byte_tokenizer, joined, random_documents, tokens_of, write_documents
from tokenizers import Tokenizer, models, processors

from dmagent_loader.errors import ConfigurationError, DecodeError, EmptyShardError
from dmagent_loader.shards import (
    PackedRows,
    PackText,
    ShardCollection,
    ShardingConfig,
    decode_npy,
    load_manifest,
    shard_files,
)
from dmagent_loader.shards.packed.encoder import DocumentEncoder
from dmagent_loader.shards.writing.packing import LENGTHS_MEMBER

LENGTH = 16


def open_packed(
    paths: dict[str, list[str]], folder: Path, pack: PackText | None = None, max_bad: float = 0
) -> PackedRows:
    collection = ShardCollection.open(paths, cache_dir=folder / "cache", progress=False)
    pack = pack or PackText(byte_tokenizer(), LENGTH)
    return PackedRows.open(collection, pack, cache_dir=folder / "cache", progress=False, max_bad=max_bad)


def rows_of_shard(rows: PackedRows, shard: int = 0) -> list[int]:
    return [token for row in range(rows.shard_rows(0)[shard]) for token in tokens_of(rows.read(0, shard, row))]


def test_a_long_document_goes_on_in_the_next_rows(tmp_path):
    paths = write_documents(tmp_path, {"source/a": [["ab", "c" * 40, "d" * 20]]})
    rows = open_packed(paths, tmp_path)
    assert [rows.read(0, 0, row).key for row in range(4)] == [
        "text-0d0+0",
        "text-0d1+13",
        "text-0d1+29",
        "text-0d2+4",
    ]
    assert rows_of_shard(rows) == joined(["ab", "c" * 40, "d" * 20], byte_tokenizer())[:64]
    with pytest.raises(IndexError, match="row 4 of shard"):
        rows.read(0, 0, 4)


def test_tokens_are_counted_once_for_each_shard_and_tokenizer(tmp_path, monkeypatch):
    """Whatever the length: it does not change the tokens of a document."""
    paths = write_documents(tmp_path, {"source/a": [random_documents(n, 30, 60) for n in range(3)]})
    batches = []
    tokens = DocumentEncoder.tokens

    def spy(self: DocumentEncoder, rows: Any) -> Any:
        batches.append(len(rows))
        return tokens(self, rows)

    monkeypatch.setattr(DocumentEncoder, "tokens", spy)
    first = open_packed(paths, tmp_path)
    assert sum(batches) == 90
    batches.clear()
    assert open_packed(paths, tmp_path).accounts == first.accounts
    open_packed(paths, tmp_path, PackText(byte_tokenizer(), 7))
    assert not batches
    paths["source/a"] += write_documents(tmp_path / "more", {"source/a": [["a new shard " * 3]]})["source/a"]
    open_packed(paths, tmp_path)
    assert batches == [1]
    open_packed(paths, tmp_path, PackText(byte_tokenizer("</s>"), LENGTH))
    assert sum(batches) == 1 + 91


def test_damaged_counts_are_counted_again(tmp_path, caplog):
    paths = write_documents(tmp_path, {"source/a": [random_documents(0, 30, 60)]})
    first = open_packed(paths, tmp_path)
    (file,) = (tmp_path / "cache" / "tokens").rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    again = open_packed(paths, tmp_path)
    assert "are not usable (its checksum is wrong): counting again" in caplog.text
    assert again.fingerprint == first.fingerprint
    assert rows_of_shard(again) == rows_of_shard(first)


def test_without_a_cache_the_counts_stay_in_memory(tmp_path, caplog):
    paths = write_documents(tmp_path, {"source/a": [random_documents(0, 30, 60)]})
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tokens").write_text("a file where the folder should be")
    rows = open_packed(paths, tmp_path)
    assert "token counts cannot be kept in" in caplog.text
    copy = pickle.loads(pickle.dumps(rows))
    assert rows_of_shard(copy) == rows_of_shard(rows) != []


def test_a_copy_of_another_process_reads_special_tokens_in_the_same_way(tmp_path):
    """Pickling makes the tokenizers of the package tokenizers forget this setting."""
    texts = [f"to write {END} is no end " * 4]
    paths = write_documents(tmp_path, {"source/a": [texts]})
    rows = open_packed(paths, tmp_path)
    assert END_ID not in rows_of_shard(rows)[:-1]
    assert rows_of_shard(pickle.loads(pickle.dumps(rows))) == rows_of_shard(rows)


def test_documents_that_end_themselves_are_kept_apart(tmp_path):
    """With special tokens parsed, the end-of-text token may stand in a document: rows name the lengths."""
    paths = write_documents(tmp_path, {"source/a": [[f"ab{END}cd{END}", "efgh" * 5]]})
    rows = open_packed(paths, tmp_path, PackText(byte_tokenizer(), 8, parse_special_tokens=True))
    first, second = rows.read(0, 0, 0), rows.read(0, 0, 1)
    assert tokens_of(first)[2] == tokens_of(first)[5] == END_ID
    assert decode_npy(first.members[LENGTHS_MEMBER]).tolist() == [6, 2]
    assert decode_npy(second.members[LENGTHS_MEMBER]).tolist() == [8]
    plain = open_packed(paths, tmp_path, PackText(byte_tokenizer(), 8))
    assert list(plain.read(0, 0, 0).members) == ["input_ids.npy"]


def test_the_text_may_be_in_a_json_member(tmp_path):
    text = json.dumps({"text": "c" * 20, "content": "d" * 20})
    paths = write_documents(tmp_path, {"source/a": [[text]]}, member="json")
    for key, character in (("text", "c"), ("content", "d")):
        rows = open_packed(paths, tmp_path, PackText(byte_tokenizer(), LENGTH, member="json", text_key=key))
        assert rows_of_shard(rows) == joined([character * 20], byte_tokenizer())[:LENGTH]
    with pytest.raises(DecodeError, match=r"has no member 'txt', only \['json'\]: pass PackText\(member=...\)"):
        open_packed(paths, tmp_path)
    with pytest.raises(DecodeError, match=r"holds no text \(key 'body' of a JSON object\)"):
        open_packed(paths, tmp_path, PackText(byte_tokenizer(), LENGTH, member="json", text_key="body"))


def test_a_row_of_many_files_is_named_in_a_short_message(tmp_path):
    """As names with dots in them make: all files of a shard stood in the message."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(500):
            archive.addfile(tarfile.TarInfo(f"v1.{number}.txt"))
    with pytest.raises(DecodeError, match=r"has no member 'txt', only \['0\.txt', .*\.\.\.\]: pass PackText") as caught:
        open_packed({"source/a": [str(path)]}, tmp_path)
    assert len(str(caught.value)) < 1000


def test_bad_documents_are_named_or_left_out(tmp_path, caplog):
    texts: list[str | bytes] = ["a" * 30, b"\xff\xfe", "b" * 30, b"\xff"]
    paths = write_documents(tmp_path, {"source/a": [texts]})
    for _ in range(2):  # counted, and from the cache
        with pytest.raises(
            DecodeError, match=r"'source/a', row 1 of shard .*text-0.tar cannot be packed \(2 such rows"
        ):
            open_packed(paths, tmp_path)
    with pytest.raises(DecodeError, match=r"more than max_bad_rows=0.3 allows: raise it"):
        open_packed(paths, tmp_path, max_bad=0.3)
    rows = open_packed(paths, tmp_path, max_bad=0.5)
    assert rows_of_shard(rows) == joined(["a" * 30, "b" * 30], byte_tokenizer())[:48]
    assert asdict(rows.accounts["source/a"]) == {
        "documents": 2,
        "tokens": 62,
        "rows": 3,
        "remainder": 14,
        "bad_documents": 2,
    }
    assert "domain 'source/a': 2 rows cannot be packed and are left out" in caplog.text


def test_a_number_of_bad_documents_bounds_those_of_all_domains(tmp_path):
    """As it bounds the bad rows of a run."""
    texts: list[str | bytes] = ["a" * 30, b"\xff\xfe", b"\xff"]
    paths = write_documents(tmp_path, {"source/a": [texts], "target/b": [["c" * 30], texts]})
    with pytest.raises(DecodeError, match=r"'target/b', row 1 of .* \(4 such rows\): .* than max_bad_rows=3 allows"):
        open_packed(paths, tmp_path, max_bad=3)
    accounts = open_packed(paths, tmp_path, max_bad=4).accounts
    assert [account.bad_documents for account in accounts.values()] == [2, 2]


def test_text_that_spells_the_end_token_is_text_or_named(tmp_path):
    """A tokenizer that has the end-of-text token as a usual word cannot read it as text."""
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    paths = write_documents(tmp_path, {"source/a": [["</s>"]]})
    with pytest.raises(DecodeError, match=r"spells the end-of-text token \(id 1\).*parse_special_tokens=True"):
        open_packed(paths, tmp_path, PackText(words, 2))


def test_a_domain_without_a_whole_row_is_refused(tmp_path):
    paths = write_documents(tmp_path, {"source/a": [["a" * 10], ["b" * 14]]})
    with pytest.raises(
        EmptyShardError, match=r"'source/a' has 26 tokens in 2 shard\(s\), the largest with 15, and a row"
    ):
        open_packed(paths, tmp_path)


def test_large_remainders_are_a_warning(tmp_path, caplog):
    paths = write_documents(tmp_path, {"source/a": [["a" * 20], ["b" * 15]]})
    open_packed(paths, tmp_path)
    assert (
        "has 2 documents with 37 tokens in 2 rows of 16; 5 tokens (13.51%) at the ends of its 2 shard(s)" in caplog.text
    )
    assert "put the documents into fewer shards to lose less" in caplog.text


def test_the_identity_follows_from_what_changes_the_rows(tmp_path):
    paths = write_documents(tmp_path, {"source/a": [random_documents(0, 30, 60)]})
    tokenizer = byte_tokenizer()
    same = byte_tokenizer()
    same.enable_truncation(3)
    same.enable_padding(length=100)
    same.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, END_ID)])
    first = open_packed(paths, tmp_path, PackText(tokenizer, LENGTH))
    assert open_packed(paths, tmp_path, PackText(same, LENGTH)).fingerprint == first.fingerprint
    assert same.truncation is not None, "the user's tokenizer stays as it is"
    others = [
        PackText(tokenizer, LENGTH + 1),
        PackText(tokenizer, LENGTH, end_token=3),
        PackText(tokenizer, LENGTH, parse_special_tokens=True),
        PackText(byte_tokenizer("</s>"), LENGTH),
    ]
    prints = {open_packed(paths, tmp_path, pack).fingerprint for pack in others}
    assert len(prints | {first.fingerprint}) == 5
    contents = {int(open_packed(paths, tmp_path, pack).shard_contents(0)[0]) for pack in others}
    assert len(contents) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 1}, "length is 1"),
        ({"member": ""}, "member is ''"),
        ({"end_token": 999}, "end_token is 999, which is not a token"),
        ({"tokenizer": "gpt2"}, "PackText cannot use 'gpt2': pass a fast tokenizer"),
        ({"tokenizer": byte_tokenizer().encode}, "the object, not its method encode"),
        ({"tokenizer": byte_tokenizer("[STOP]")}, "has no end-of-text token, so packed documents would run into"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(ConfigurationError) as error:
        PackText(**{"tokenizer": byte_tokenizer(), "length": LENGTH, **arguments})
    assert message in str(error.value)


def test_tokenizers_of_transformers_give_the_tokens_of_their_own_call(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer("[STOP]"), eos_token="[STOP]")
    texts = [*random_documents(1, 20, 40), "a [STOP] b"]
    paths = write_documents(tmp_path, {"source/a": [texts]})
    rows = open_packed(paths, tmp_path, PackText(tokenizer, 8))
    calls = [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    expected = [token for ids in calls for token in [*ids, tokenizer.eos_token_id]]
    assert rows_of_shard(rows) == expected[: len(expected) // 8 * 8]


def test_rows_are_those_of_packed_shards(tmp_path):
    """`dmagent shard --tokenizer` stores the rows that packing on the fly makes (one document: it may shuffle more)."""
    texts = [f"begin {' '.join(random_documents(2, 60, 50))} end"]
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    documents = write_jsonl(tmp_path / "documents.jsonl", [{"text": text} for text in texts])
    config = ShardingConfig(tokenizer=str(tmp_path / "tokenizer.json"), sequence_length=LENGTH)
    shard_files({"source/a": [documents]}, tmp_path / "out", config, progress=False)
    stored = ShardCollection.open(load_manifest(tmp_path / "out"), cache_dir=tmp_path / "cache", progress=False)
    rows = open_packed(write_documents(tmp_path, {"source/a": [texts]}), tmp_path)
    of_shard_files = [
        tokens_of(stored.read(0, shard, row)) for shard, n in enumerate(stored.shard_rows(0)) for row in range(n)
    ]
    assert sorted(of_shard_files) == sorted(tokens_of(rows.read(0, 0, row)) for row in range(rows.shard_rows(0)[0]))


def test_long_documents_are_tokenised_once_for_their_rows(tmp_path, monkeypatch):
    """Without a cache of documents, each row of a book would tokenise the whole book."""
    paths = write_documents(tmp_path, {"source/a": [["x" * 4000, "y" * 4000]]})
    rows = open_packed(paths, tmp_path)
    calls = []
    tokens = DocumentEncoder.tokens
    monkeypatch.setattr(DocumentEncoder, "tokens", lambda self, batch: calls.append(1) or tokens(self, batch))
    for row in np.random.default_rng(0).permutation(rows.shard_rows(0)[0]).tolist():
        rows.read(0, 0, row)
    assert len(calls) == 2


def test_counts_of_a_folder_that_vanished_are_made_again(tmp_path):
    paths = write_documents(tmp_path, {"source/a": [random_documents(0, 30, 60)]})
    rows = open_packed(paths, tmp_path)
    for file in (tmp_path / "cache" / "tokens").rglob("*.safetensors"):
        os.remove(file)
    assert rows_of_shard(rows) == joined(random_documents(0, 30, 60), byte_tokenizer())[: len(rows_of_shard(rows))]


def test_an_interrupted_count_goes_on_with_the_next_shard(tmp_path, monkeypatch):
    paths = write_documents(tmp_path, {"source/a": [random_documents(n, 30, 60) for n in range(3)]})
    counted: list[int] = []
    tokens = DocumentEncoder.tokens

    def interrupted(self: DocumentEncoder, rows: Any) -> Any:
        if len(counted) == 2:
            raise KeyboardInterrupt
        counted.append(len(rows))
        return tokens(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(DocumentEncoder, "tokens", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_packed(paths, tmp_path)
    assert len(list((tmp_path / "cache" / "tokens").rglob("*.safetensors"))) == 2
    assert not list((tmp_path / "cache" / "tokens").rglob("*.lock"))
    counted.clear()
    monkeypatch.setattr(DocumentEncoder, "tokens", lambda self, rows: counted.append(len(rows)) or tokens(self, rows))
    open_packed(paths, tmp_path)
    assert counted == [30]
