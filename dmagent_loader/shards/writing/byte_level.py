"""Byte-level BPE tokenizers whose tokens the package tiktoken makes, too, in a fraction of the time.

The package tokenizers merges the neighbours of a word in the order of its list of merges. The package tiktoken merges
neighbours whose concatenation is a token, in the order of the tokens. Among equals, both begin on the left. They give
the same tokens if tiktoken gets only those tokens that merging makes of the token's own bytes, ordered by their merges:

- Let x and y be neighbours at some point of the merging of a word. No merge has crossed the ends of xy, so the merges
  inside it were the first ones of the merging of xy alone, which therefore also comes to x and y.
- So tokenizers has a merge of x and y exactly if the merging of xy alone ends in one token, as tiktoken asks.
- The merging of xy alone comes to one pair only, so a token has one place in the order, whatever other merges make it.
"""

from __future__ import annotations

import importlib
import itertools
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_NEWER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {"GPT-2": _GPT_2, "Llama 3": _NEWER % "{1,3}", "Qwen 2": _NEWER % ""}
"""Model -> the pattern of its words. Both engines give them the same meaning, apart from `differing_code_points`."""
_CLASSES = (r"\p{L}+", r"\p{N}+", r"\s+", r"(?i:'s|'t|'re|'ve|'m|'ll|'d|s|t|r|e|v|m|l|d)")
_KNOWN_SETTINGS = {"type", "vocab", "merges", "ignore_merges", "unk_token", "fuse_unk"}
"""Settings of a model of which we know the effect: that of unknown characters has none where every byte is known."""
_PROBED = 0x34000
"""Code points from here on have no letters, digits or spaces in any version of Unicode so far."""
_CODE_POINTS = 0x110000


class NotProvenError(Exception):
    """The package tiktoken may give other tokens; the message says why."""


@dataclass(frozen=True, kw_only=True)
class ByteLevelForm:
    """A tokenizer as tiktoken takes it.

    Attributes:
        split: Pattern of words.
        ranks: Bytes of a token -> its rank.
        ids: Token id of each rank; None: the ranks are the ids.
        normalizes: Whether texts are brought to NFC.
    """

    split: str
    ranks: dict[bytes, int]
    ids: list[int] | None
    normalizes: bool


def byte_level_form(tokenizer: Any) -> ByteLevelForm:
    """The form of a tokenizer with which tiktoken makes the same tokens of a text without added tokens.

    Args:
        tokenizer: A ``tokenizers.Tokenizer``.

    Raises:
        NotProvenError: It is of another kind, or the tokens could differ.
    """
    parts: dict[str, Any] = json.loads(tokenizer.to_str())
    model, normalizer = parts["model"], parts["normalizer"]
    if normalizer not in (None, {"type": "NFC"}):
        raise NotProvenError(f"it has the normalizer {normalizer['type']}")
    split = _split_of(parts["pre_tokenizer"])
    if model["type"] != "BPE":
        raise NotProvenError(f"its model is {model['type']}")
    settings = {name: value for name, value in model.items() if value and name not in _KNOWN_SETTINGS}
    if settings:
        raise NotProvenError(f"its model has the settings {settings}")
    return ByteLevelForm(split=split, **_ranked(model), normalizes=normalizer is not None)


def _split_of(pre_tokenizer: Any) -> str:
    def byte_level(use_regex: bool) -> dict[str, Any]:
        return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}

    steps = pre_tokenizer["pretokenizers"] if (pre_tokenizer or {}).get("type") == "Sequence" else [pre_tokenizer]
    steps = [{name: value for name, value in (step or {}).items() if name != "trim_offsets"} for step in steps]
    if steps == [byte_level(use_regex=True)]:
        return _GPT_2
    for split in SPLITS.values():
        step = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
        if steps == [step, byte_level(use_regex=False)]:
            return split
    raise NotProvenError("it splits words in another way than GPT-2, Llama 3 and Qwen 2")


def _ranked(model: Mapping[str, Any]) -> dict[str, Any]:
    """The `ranks` and `ids` of a model."""
    vocabulary: dict[str, int] = model["vocab"]
    if len(set(vocabulary.values())) < len(vocabulary):
        raise NotProvenError("several tokens have one id")
    byte_of = _bytes_of_characters()
    if not byte_of.keys() <= vocabulary.keys():
        raise NotProvenError("its vocabulary does not have every byte")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    in_order = [token for token, _ in itertools.groupby(map("".join, merges))]
    if len(set(in_order)) < len(in_order):
        raise NotProvenError("its merges make a token in several places of their order")
    tokens = [token for token in vocabulary if len(token) > 1 and byte_of.keys() >= {*token}]
    lengths = dict(zip(tokens, _lengths_alone(vocabulary, merges, tokens), strict=True))
    made = [token for token in in_order if lengths.get(token) == 1]
    # With ignore_merges, a word that is a token becomes that token, even if merging does not make it.
    others = [token for token, length in lengths.items() if length > 1 and model.get("ignore_merges")]
    if any(lengths[token] == 2 for token in others):
        raise NotProvenError("it has a token that is a pair of others, which it does not merge")
    ordered = [*byte_of, *made, *others]
    ids = [vocabulary[token] for token in ordered]
    words = [bytes(byte_of[character] for character in token) for token in ordered]
    made_ids = [vocabulary[token] for token in made]
    if made_ids == sorted(made_ids):
        return {"ranks": dict(zip(words, ids, strict=True)), "ids": None}
    return {"ranks": {word: rank for rank, word in enumerate(words)}, "ids": ids}


def _lengths_alone(vocabulary: dict[str, int], merges: list[tuple[str, ...]], tokens: list[str]) -> list[int]:
    """The number of tokens that merging makes of the bytes of each token."""
    library = importlib.import_module("tokenizers")
    alone = library.Tokenizer(library.models.BPE(vocabulary, merges))
    return [len(encoding.ids) for encoding in alone.encode_batch_fast(tokens, add_special_tokens=False)]


def _bytes_of_characters() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies -> the byte (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


@cache
def differing_code_points(*, normalizes: bool) -> NDArray[np.bool_]:
    """Whether the words of a text could differ between the packages if it has the code point: bool, (0x110000,).

    Their engines may know different versions of Unicode, so each class of the patterns in `SPLITS` is compared. That
    takes about 0.2 s, once in a process.

    Args:
        normalizes: Whether texts are brought to NFC: code points that Python's Unicode does not know count as well.
    """
    tiktoken, tokenizers = importlib.import_module("tiktoken"), importlib.import_module("tokenizers")
    differs = np.ones(_CODE_POINTS, np.bool_)
    text = "".join(chr(point) for point in range(_PROBED) if not 0xD800 <= point < 0xE000)
    differs[_code_points(text)] = False
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    for pattern in _CLASSES:
        splitting = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "removed", invert=True)
        encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=single_bytes, special_tokens={})
        one = "".join(word for word, _ in splitting.pre_tokenize_str(text))
        other = bytes(encoding.encode_ordinary(text)).decode()  # tiktoken leaves out what the pattern does not match
        if one != other:
            differs[[ord(character) for character in {*one} ^ {*other}]] = True
    if normalizes:
        differs[[point for point in range(_PROBED) if unicodedata.category(chr(point)) == "Cn"]] = True
    return differs


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def has_any(text: str, marked: NDArray[np.bool_]) -> bool:
    """Whether a text has one of the marked code points."""
    return bool(marked[_code_points(text)].any())
