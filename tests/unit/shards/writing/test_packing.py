"""Packed rows hold whole documents and nothing else, whatever the tokenizer's file says."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_fixtures import files_under, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dmagent_loader.errors import ConfigurationError, ShardError
from dmagent_loader.shards import ShardingConfig, shard_files
from dmagent_loader.shards.manifest import DomainRecord
from dmagent_loader.shards.packed.config import PackText
from dmagent_loader.shards.writing.packing import PACKED_MEMBER, TextTokenizer

END, PAD = "<|endoftext|>", "<pad>"
ROW = 16


def bytes_bpe() -> Tokenizer:
    """Byte-level BPE with two special tokens: 0 ends documents, 1 pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox"] * 10, trainer)
    return tokenizer


def saved(tokenizer: Tokenizer, folder: Path, kind: str) -> str:
    if kind == "tokenizer.json":
        tokenizer.save(str(folder / kind))
        return str(folder / kind)
    transformers = pytest.importorskip("transformers")
    loaded = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    loaded.save_pretrained(folder / kind)
    return str(folder / kind)


def packed(texts: list[str], tokenizer: str, folder: Path, **settings: Any) -> tuple[DomainRecord, list[int]]:
    path = write_jsonl(folder / "documents.jsonl", [{"text": text} for text in texts])
    config = ShardingConfig(tokenizer=tokenizer, sequence_length=ROW, shuffle_seed=None, **settings)
    record = shard_files({"source/a": [path]}, folder / "out", config, progress=False)["source/a"]
    tokens: list[int] = []
    for shard in record.shards:
        with tarfile.open(folder / "out" / shard.path) as tar:
            for member in (member for member in tar.getmembers() if member.name.endswith(PACKED_MEMBER)):
                stored = tar.extractfile(member)
                assert stored is not None
                tokens.extend(np.load(io.BytesIO(stored.read())).tolist())
    return record, tokens


def truncating(tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(8)


def padding(tokenizer: Tokenizer) -> None:
    tokenizer.enable_padding(length=100, pad_id=1, pad_token=PAD)


def appending(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{PAD} $A {END} {END}", special_tokens=[(END, 0), (PAD, 1)]
    )


@pytest.mark.parametrize("kind", ["tokenizer.json", "folder"])
@pytest.mark.parametrize("change", [truncating, padding, appending])
def test_what_the_file_says_of_length_and_added_tokens_is_ignored(tmp_path: Path, kind: str, change: Any) -> None:
    """A tokenizer.json with truncation=512 packed the first 512 tokens of every document, and nothing said so."""
    texts = ["the quick brown fox " * 30, "jumps over " * 20]
    tokenizer = bytes_bpe()
    expected = [token for text in texts for token in [*tokenizer.encode(text).ids, 0]]
    change(tokenizer)

    record, tokens = packed(texts, saved(tokenizer, tmp_path, kind), tmp_path)

    assert tokens == expected[: len(tokens)]
    assert len(tokens) + (record.dropped_tokens or 0) == len(expected)


@pytest.mark.parametrize("setting", [truncating, padding])
def test_settings_that_are_ignored_are_named(tmp_path: Path, setting: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = bytes_bpe()
    setting(tokenizer)
    packed(["jumps over " * 20], saved(tokenizer, tmp_path, "tokenizer.json"), tmp_path)
    name = "truncation" if setting is truncating else "padding"
    assert f"has {name} settings, which packing ignores" in caplog.text


@pytest.mark.parametrize("kind", ["tokenizer.json", "folder"])
def test_text_that_spells_a_special_token_is_text_and_counted(tmp_path: Path, kind: str) -> None:
    """An article on tokenizers ended at every token that it named."""
    texts = [f"about {END} and {PAD} tokens", "no such thing, <p> or |", f"{PAD}"]
    tokenizer = saved(bytes_bpe(), tmp_path, kind)

    record, tokens = packed(texts, tokenizer, tmp_path)

    assert record.special_token_documents == 2
    plain = bytes_bpe()
    plain.encode_special_tokens = True
    assert tokens == [token for text in texts for token in [*plain.encode(text).ids, 0]][: len(tokens)]
    assert 1 not in tokens
    assert record.settings["parse_special_tokens"] is False


@pytest.mark.parametrize("kind", ["tokenizer.json", "folder"])
def test_special_tokens_are_parsed_on_request(tmp_path: Path, kind: str) -> None:
    texts = [f"a {PAD} b {END} c" * 10]
    record, tokens = packed(texts, saved(bytes_bpe(), tmp_path, kind), tmp_path, parse_special_tokens=True)
    assert record.special_token_documents == 1
    assert tokens == [*bytes_bpe().encode(texts[0]).ids, 0][: len(tokens)]
    assert {0, 1} <= set(tokens)
    assert record.settings["parse_special_tokens"] is True


def test_an_end_token_that_cannot_be_read_as_text_is_refused_by_line(tmp_path: Path) -> None:
    """A word of the vocabulary is no added token, so no setting keeps the tokenizer from finding it."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "w": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    file = saved(tokenizer, tmp_path, "tokenizer.json")
    with pytest.raises(ShardError, match=r"documents\.jsonl, line 2 spells the end-of-text token \(id 1\)"):
        packed(["w w", "w </s> w", "w"], file, tmp_path)
    assert files_under(tmp_path / "out") == []


def test_a_tokenizer_that_leaves_characters_out_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whole documents in another script became an end-of-text token without a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator(["known"], trainers.BpeTrainer(special_tokens=[END], show_progress=False))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    TextTokenizer.load(tmp_path / "tokenizer.json")
    assert "tokenizer.json' has no token for characters that it does not know" in caplog.text
    caplog.clear()
    PackText(tokenizer, 8)
    assert "'Tokenizer' has no token for characters that it does not know" in caplog.text
    caplog.clear()
    known = Tokenizer(models.WordLevel({"[UNK]": 0, END: 1}, unk_token="[UNK]"))
    for other in (bytes_bpe(), known, Tokenizer(models.WordLevel({"known": 0, END: 1}))):
        PackText(other, 8)
    assert caplog.text == ""


def test_a_tokenizer_without_tokens_for_a_text_is_refused_with_the_text(tmp_path: Path) -> None:
    """It was a traceback of the package tokenizers, without the text."""
    tokenizer = Tokenizer(models.WordLevel({"known": 0, END: 1}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "known known"}, {"text": "known stranger"}])
    config = ShardingConfig(tokenizer=str(tmp_path / "tokenizer.json"), sequence_length=2)
    with pytest.raises(
        ConfigurationError, match=r"no tokens for the text .*'known stranger' .*unk_token\), or take another"
    ):
        shard_files({"source/a": [path]}, tmp_path / "out", config, progress=False)


@pytest.mark.parametrize("tokenizer", [False, True])
def test_half_of_a_surrogate_pair_is_refused_by_line(tmp_path: Path, tokenizer: bool) -> None:
    """As raw text it became a row that nobody can decode; packing failed without file and line."""
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "whole \\ud83d\\ude00"}\n{"text": "half \\ud83d"}\n')
    config = ShardingConfig()
    if tokenizer:
        config = ShardingConfig(tokenizer=saved(bytes_bpe(), tmp_path, "tokenizer.json"), sequence_length=2)
    with pytest.raises(ShardError, match=r"column 'text' in .*bad\.jsonl, line 2 contains half of a surrogate pair"):
        shard_files({"source/a": [path]}, tmp_path / "out", config, progress=False)
    assert files_under(tmp_path / "out") == []


def test_half_of_a_surrogate_pair_in_a_column_to_keep_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a", "other": "\\ud83d", "url": "b"}\n{"text": "a", "url": {"\\udc00": 1}}\n')
    with pytest.raises(ShardError, match=r"a column to keep in .*bad\.jsonl, line 2 contains half"):
        shard_files({"source/a": [path]}, tmp_path / "out", ShardingConfig(keep_columns=("url",)), progress=False)


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000 + "]" * 100_000])
def test_json_that_python_cannot_read_is_refused_by_line(tmp_path: Path, value: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n{"text": "a", "n": ' + value + "}\n")
    with pytest.raises(ShardError, match=r"bad\.jsonl, line 2 is not JSON"):
        shard_files({"source/a": [path]}, tmp_path / "out", progress=False)


def test_rows_without_a_next_token_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="a row of one token has no next token"):
        ShardingConfig(tokenizer="t.json", sequence_length=1)


def test_special_tokens_of_raw_text_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="parse_special_tokens=True without a tokenizer"):
        ShardingConfig(parse_special_tokens=True)


def test_the_manifest_counts_documents_that_spell_special_tokens(tmp_path: Path) -> None:
    packed([f"a {END} b", "jumps over it " * 5], saved(bytes_bpe(), tmp_path, "tokenizer.json"), tmp_path)
    entry = json.loads((tmp_path / "out/manifest.json").read_text())["domains"]["source/a"]
    assert entry["special_token_documents"] == 1


def test_rows_so_short_that_the_headers_outweigh_them_are_warned_of(tmp_path, caplog):
    tokenizer = saved(bytes_bpe(), tmp_path, "tokenizer.json")
    (tmp_path / "short").mkdir()
    record, _ = packed(["0123456789abcde" * 8] * 160, tokenizer, tmp_path / "short")
    assert record.rows > 1100
    assert "'source/a': 97% of the bytes of its shards will be headers and padding" in caplog.text
    assert "rows are short, 32 bytes each: choose longer rows (--sequence-length)" in caplog.text
    caplog.clear()
    texts = [{"text": f"{number:0100d}"} for number in range(1100)]
    path = write_jsonl(tmp_path / "texts.jsonl", texts)
    shard_files({"source/a": [path]}, tmp_path / "texts", ShardingConfig(), progress=False)
    assert "rows are short, 100 bytes each: pack its documents (--tokenizer" in caplog.text
    caplog.clear()
    path = write_jsonl(tmp_path / "long.jsonl", [{"text": f"{number:01000d}"} for number in range(1100)])
    shard_files({"source/a": [path]}, tmp_path / "long", ShardingConfig(), progress=False)
    shard_files({"source/a": [write_jsonl(tmp_path / "few.jsonl", texts[:9])]}, tmp_path / "few", progress=False)
    assert caplog.text == ""


def test_shards_with_document_lengths_are_as_large_as_asked_for(tmp_path):
    tokenizer = saved(bytes_bpe(), tmp_path, "tokenizer.json")
    record, _ = packed(
        ["0123456789abcde" * 8] * 160, tokenizer, tmp_path, parse_special_tokens=True, max_shard_bytes=1 << 18
    )
    assert record.bytes / len(record.shards) <= (1 << 18) + tarfile.RECORDSIZE
