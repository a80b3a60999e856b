"""The package tiktoken makes the tokens of the package tokenizers, or is not used."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_level_tokenizers import ALPHABET, END, KINDS, definition, tokenizer_of
from shard_fixtures import files_under, write_jsonl
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from dmagent_loader.cli import main
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.shards import RawSample, ShardingConfig, shard_files
from dmagent_loader.shards.packed.encoder import DocumentEncoder
from dmagent_loader.shards.writing import encoding
from dmagent_loader.shards.writing.byte_level import _PROBED, SPLITS, differing_code_points
from dmagent_loader.shards.writing.encoding import _HARD_TEXTS, TextEncoder, encode_texts
from dmagent_loader.shards.writing.packing import TextTokenizer

tiktoken = pytest.importorskip("tiktoken")

CONTEXTS = (
    "{}|",
    "a{}b|",
    "a{0}{0}b|",
    "1{}2|",
    "1{0}{0}34567|",
    " {}|",
    " {} |",
    "\t{}x ",
    "'{}|",
    "'r{}|",
    "'{}l\n",
    "{}\r\n",
)
TEXTS = (
    *_HARD_TEXTS,
    "",
    " ",
    f"about {END} tokens{END}",
    "x" + " " * 40_000 + "y",
    " \n" * 100_000,
    "ab" * 60_000,
    "7" * 50_000,
    "\U00034000 \U000e0067 \U0010ffff",
)


def without_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parse_special_tokens", [False, True])
def test_ids_are_those_of_the_tokenizer(kind: str, parse_special_tokens: bool) -> None:
    tokenizer = tokenizer_of(kind, parse_special_tokens=parse_special_tokens)
    encoder = TextEncoder(tokenizer)
    assert encoder.slow_reason is None
    assert encoder.encode(TEXTS) == encode_texts(tokenizer, TEXTS)
    assert encoder.encode([]) == []


@pytest.mark.parametrize("style", SPLITS)
@pytest.mark.parametrize("step", [16, pytest.param(1, marks=pytest.mark.slow)])
def test_words_are_the_same_with_every_code_point(style: str, step: int) -> None:
    """With every code point for which tiktoken is used; a token for every two bytes shows where words end."""
    parts, pairs = json.loads(definition(style)), json.loads(definition("pairs of bytes"))
    tokenizer = Tokenizer.from_str(json.dumps({**parts, "model": pairs["model"], "normalizer": None}))
    tokenizer.encode_special_tokens = True
    encoder = TextEncoder(tokenizer)
    points = [chr(point) for point in np.flatnonzero(~differing_code_points(normalizes=False))]
    assert len(points) > 0.99 * (_PROBED - 2048), "the packages know the same Unicode, nearly"
    points = points[:0x3000] + points[0x3000::step]
    for context in CONTEXTS:
        texts = ["".join(map(context.format, points[start : start + 8192])) for start in range(0, len(points), 8192)]
        assert all(map(encoder._is_alike, texts))
        assert encoder.encode(texts) == encode_texts(tokenizer, texts), context


def test_normal_forms_are_those_of_the_tokenizer() -> None:
    """Texts that Python calls normalised are not changed by the tokenizer's normaliser."""
    differing = differing_code_points(normalizes=True)
    points = [chr(point) for point in np.flatnonzero(~differing)]
    assert len(points) > 100_000
    encoder = TextEncoder(tokenizer_of("Qwen 2"))
    contexts = ("aa", "e\u0301", "\u0323a", "\u1161\u11a8", "\u0345\u3099")
    texts = [f"{before}{point}{after}" for point in points for before, after in contexts]
    normal = [text for text in texts if encoder._is_alike(text)]
    assert 0.5 * len(texts) < len(normal) < len(texts)
    normalise = normalizers.NFC().normalize_str
    for start in range(0, len(normal), 4096):
        joined = "\n".join(normal[start : start + 4096])
        assert normalise(joined) == joined


def test_texts_go_to_tiktoken_but_for_those_that_could_differ() -> None:
    encoder = TextEncoder(tokenizer_of("Qwen 2", added=(AddedToken("<tool>", special=False),)))
    alike = ["", "plain", "ünï 漢字 👍🏽", f"{END}", "a" * 200_000, ("x" + " " * 9_000) * 9]
    assert all(map(encoder._is_alike, alike))
    others = ["e\u0301", "a <tool> b", " " * 200_000, "a" * 100_000 + "\n" * 40_000, "\U0010ffff", "half \ud83d"]
    assert not any(map(encoder._is_alike, others))
    parsing = TextEncoder(tokenizer_of("Qwen 2", parse_special_tokens=True))
    assert not parsing._is_alike(f"a{END}")


def test_half_of_a_surrogate_pair_fails_as_without_tiktoken() -> None:
    tokenizer = tokenizer_of("GPT-2")
    with pytest.raises(Exception, match=r"TextEncodeInput|surrogates") as expected:
        encode_texts(tokenizer, ["half \ud83d"])
    with pytest.raises(type(expected.value)):
        TextEncoder(tokenizer).encode(["half \ud83d"])


@pytest.mark.parametrize("kind", ["GPT-2", "Qwen 2"])
def test_added_tokens_are_found_as_by_the_tokenizer(kind: str) -> None:
    added = (
        AddedToken("<tool>", special=False),
        AddedToken("word", special=False, single_word=True),
        AddedToken("strip", special=False, lstrip=True, rstrip=True),
        AddedToken("e\u0301x", special=False, normalized=True),
        AddedToken("<pad>", special=True),
    )
    texts = ["a<tool>b", "a word, wordy", "to  strip  it", "e\u0301x \u00e9x", "\u00e9x", "<pad> <", "nothing"]
    for parse in (False, True):
        tokenizer = tokenizer_of(kind, parse_special_tokens=parse, added=added)
        encoder = TextEncoder(tokenizer)
        assert encoder.slow_reason is None
        assert encoder.encode(texts) == encode_texts(tokenizer, texts)


def bpe(merges: list[tuple[str, str]], **settings: Any) -> Tokenizer:
    """A tokenizer of all bytes and the products of some merges, in this order."""
    tokens = [*ALPHABET, *dict.fromkeys(a + b for a, b in merges)]
    model = models.BPE({token: number for number, token in enumerate(tokens)}, merges, **settings)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def test_tokens_that_no_merging_makes_are_no_tokens_for_tiktoken() -> None:
    """tiktoken merges a and bc to abc, for which the tokenizer has the merge of ab and c only, which comes too late."""
    tokenizer = bpe([("b", "c"), ("a", "b"), ("ab", "c")])
    assert tokenizer.encode("abc ab").tokens == ["a", "bc", "Ġ", "ab"]
    naive = {token.encode("latin-1"): number for token, number in tokenizer.get_vocab().items() if max(token) < "\x7f"}
    assert tiktoken.Encoding("", pat_str=".+", mergeable_ranks=naive, special_tokens={}).encode_ordinary("abc") == [258]
    encoder = TextEncoder(tokenizer)
    assert encoder.slow_reason is None
    assert encoder.encode(["abc ab", "xabcabcab"]) == encode_texts(tokenizer, ["abc ab", "xabcabcab"])


def test_words_that_are_tokens_need_no_merges_where_the_tokenizer_ignores_them() -> None:
    tokenizer = bpe([("b", "c"), ("a", "b"), ("ab", "c"), ("abc", "b"), ("d", "abcb")], ignore_merges=True)
    texts = ["dabcb", "xdabcb dabcb", "abcb"]
    with_pair = TextEncoder(tokenizer)
    assert with_pair.slow_reason == (
        "tiktoken is not used, because it has a token that is a pair of others, which it does not merge"
    )
    vocabulary = {token: number for token, number in tokenizer.get_vocab().items() if token not in ("abc", "abcb")}
    model = models.BPE(vocabulary, [("b", "c"), ("a", "b")], ignore_merges=True)
    tokenizer.model = model
    assert tokenizer.encode("dabcb").tokens == ["dabcb"]
    assert len(tokenizer.encode("xdabcb").tokens) == 5
    encoder = TextEncoder(tokenizer)
    assert encoder.slow_reason is None
    assert encoder.encode(texts) == encode_texts(tokenizer, texts)


def changed(change: Callable[[dict[str, Any]], object], kind: str = "GPT-2") -> Tokenizer:
    parts = json.loads(definition(kind))
    change(parts)
    return Tokenizer.from_str(json.dumps(parts))


def _without_a_byte(parts: dict[str, Any]) -> None:
    parts["model"]["vocab"].pop("!")
    parts["model"]["merges"] = [merge for merge in parts["model"]["merges"] if "!" not in "".join(merge)]


def _with_a_token_merged_twice(parts: dict[str, Any]) -> None:
    merges, vocabulary = [tuple(merge) for merge in parts["model"]["merges"]], parts["model"]["vocab"]
    splits = (((t[0], t[1:]), (t[:2], t[2])) for t in vocabulary if len(t) == 3 and {t[1:], t[:2]} <= vocabulary.keys())
    one, other = next(splits)
    parts["model"]["merges"].append(other if one in merges else one)


REFUSED = {
    "a normaliser": (lambda parts: parts.update(normalizer={"type": "Lowercase"}), "it has the normalizer Lowercase"),
    "another normal form": (lambda parts: parts.update(normalizer={"type": "NFKC"}), "the normalizer NFKC"),
    "bytes for unknown characters": (lambda parts: parts["model"].update(byte_fallback=True), "'byte_fallback': True"),
    "dropout": (lambda parts: parts["model"].update(dropout=0.1), "'dropout': 0.1"),
    "a suffix": (lambda parts: parts["model"].update(end_of_word_suffix="</w>"), "'end_of_word_suffix': '</w>'"),
    "a prefix": (lambda parts: parts["model"].update(continuing_subword_prefix="##"), "'continuing_subword_prefix'"),
    "a space before texts": (lambda parts: parts["pre_tokenizer"].update(add_prefix_space=True), "it splits words"),
    "no words": (lambda parts: parts["pre_tokenizer"].update(use_regex=False), "it splits words"),
    "no splitting": (lambda parts: parts.update(pre_tokenizer=None), "it splits words"),
    "a missing byte": (_without_a_byte, "does not have every byte"),
    "a token of two merges": (_with_a_token_merged_twice, "in several places of their order"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_tokenizers_are_left_to_their_own_package(case: str) -> None:
    change, reason = REFUSED[case]
    if case == "a prefix":  # which its merges would need to have
        tokenizer = bpe([])
        tokenizer.model = models.BPE({token: n for n, token in enumerate(ALPHABET)}, [], continuing_subword_prefix="##")
    else:
        tokenizer = changed(change)
    encoder = TextEncoder(tokenizer)
    assert encoder.slow_reason is not None
    assert reason in encoder.slow_reason
    if case != "dropout":
        assert encoder.encode(TEXTS[:9]) == encode_texts(tokenizer, TEXTS[:9])


def test_other_models_and_splits_are_left_to_their_own_package() -> None:
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert "its model is WordLevel" in (TextEncoder(words).slow_reason or "")
    metaspace, digits = tokenizer_of("GPT-2"), tokenizer_of("GPT-2")
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(SPLITS["Llama 3"].replace("{1,3}", "{1,4}")), "isolated")
    digits.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    for tokenizer in (metaspace, digits):
        assert "it splits words in another way" in (TextEncoder(tokenizer).slow_reason or "")


def test_other_ids_end_the_job(tmp_path: Path) -> None:
    """As a fault in either package would show: tiktoken has another vocabulary."""
    encoder, other = TextEncoder(tokenizer_of("GPT-2")), TextEncoder(tokenizer_of("Qwen 2"))
    encoder.encode(["a b"] * 2_500)
    encoder._fast = other._fast
    encoder.encode(["one after the compared ones, the quick brown fox"] * 499)
    with pytest.raises(ConfigurationError, match=r"gives other token ids than the tokenizer for the text .* 'two "):
        encoder.encode(["of the quick brown fox", "two of the quick brown fox"])


def test_hard_texts_are_compared_before_anything_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tiktoken.Encoding

    def other(name: str, *, pat_str: str, **settings: Any) -> Any:
        """An engine for which a word is something else."""
        return real(name, pat_str=r"\s+|\S+" if "re|" in pat_str and "x" not in name else pat_str, **settings)

    differing_code_points(normalizes=False)
    monkeypatch.setattr(tiktoken, "Encoding", other)
    tokenizer = tokenizer_of("GPT-2")
    encoder = TextEncoder(tokenizer)
    assert "its ids of" in (encoder.slow_reason or "")
    assert encoder.encode(TEXTS) == encode_texts(tokenizer, TEXTS)


def test_without_the_package_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(definition("GPT-2"))
    with caplog.at_level(logging.INFO):
        TextTokenizer.load(path)
        assert "its tokens are made by tiktoken" in caplog.text
        without_tiktoken(monkeypatch)
        TextTokenizer.load(path)
    assert "the package tiktoken, which would be several times faster, is not installed" in caplog.text


def test_the_command_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").write_text(definition("GPT-2"))
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "the quick brown fox"}] * 9)
    command = ["shard", "--domain", f"source/a={path}", "--tokenizer", str(tmp_path / "tokenizer.json")]
    command += ["--sequence-length", "4", "--no-progress", "--output"]
    assert main([*command, str(tmp_path / "with")]) == 0
    assert capsys.readouterr().err == ""
    without_tiktoken(monkeypatch)
    assert main([*command, str(tmp_path / "without")]) == 0
    assert "the package tiktoken is not installed, with which" in capsys.readouterr().err


def test_versions_that_are_slow_with_long_words_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiktoken, "__version__", "0.12.0")
    assert TextEncoder(tokenizer_of("GPT-2")).slow_reason == (
        "tiktoken 0.12.0 is not used, because it is slow with long words: install a newer one"
    )


def shards_of(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in files_under(output)}


@pytest.mark.parametrize("kind", ["GPT-2", "Llama 3", "Qwen 2"])
@pytest.mark.parametrize("parse_special_tokens", [False, True])
def test_shards_are_the_same_bytes_without_the_package(
    tmp_path: Path, kind: str, parse_special_tokens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text(definition(kind))
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS if "\0" not in text] * 3)
    config = ShardingConfig(
        tokenizer=str(tmp_path / "tokenizer.json"),
        sequence_length=64,
        rows_per_shard=500,
        parse_special_tokens=parse_special_tokens,
    )
    shard_files({"source/a": [path]}, tmp_path / "fast", config, progress=False)
    without_tiktoken(monkeypatch)
    shard_files({"source/a": [path]}, tmp_path / "slow", config, progress=False)
    assert shards_of(tmp_path / "fast") == shards_of(tmp_path / "slow")


def test_documents_packed_on_the_fly_have_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"end_token": 1500, "member": "txt", "text_key": "text", "parse_special_tokens": False}
    rows = [RawSample(str(number), {"txt": text.encode()}) for number, text in enumerate(TEXTS)]
    fast = DocumentEncoder(definition("GPT-2"), **settings)  # type: ignore[arg-type]
    assert fast._encoder.slow_reason is None
    tokens = [array.tolist() for array in fast.tokens(rows)]  # type: ignore[union-attr]
    without_tiktoken(monkeypatch)
    slow = DocumentEncoder(definition("GPT-2"), **settings)  # type: ignore[arg-type]
    assert slow._encoder.slow_reason is not None
    assert slow.description == fast.description
    assert tokens == [array.tolist() for array in slow.tokens(rows)]  # type: ignore[union-attr]


@pytest.mark.parametrize(("value", "threads"), [("false", 1), ("0", 1), ("", 1), ("true", 3)])
def test_threads_are_those_of_the_tokenizer(value: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
    monkeypatch.setenv("RAYON_NUM_THREADS", "3")
    assert encoding._threads() == threads
    texts = [f"text number {number} " * (number % 7) for number in range(300)]
    tokenizer = tokenizer_of("GPT-2")
    assert TextEncoder(tokenizer).encode(texts) == encode_texts(tokenizer, texts)
    monkeypatch.delenv("RAYON_NUM_THREADS")
    assert encoding._threads() >= 1
