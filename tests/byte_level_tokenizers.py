"""Small byte-level BPE tokenizers in the styles of GPT-2, Llama 3 and Qwen 2."""

from __future__ import annotations

import itertools
import json
import random
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dmagent_loader.shards.writing.byte_level import SPLITS
from dmagent_loader.shards.writing.encoding import _HARD_TEXTS

END = "<|endoftext|>"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
KINDS = [*SPLITS, "Llama 3, every split merged", "GPT-2, ids in another order", "pairs of bytes"]


@cache
def _definition(kind: str) -> str:
    style = kind.partition(",")[0]
    model = _pairs() if kind == "pairs of bytes" else models.BPE(ignore_merges=style == "Llama 3")
    tokenizer = Tokenizer(model)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=style not in SPLITS or style == "GPT-2")
    tokenizer.pre_tokenizer = byte_level
    if style in ("Llama 3", "Qwen 2"):
        split = pre_tokenizers.Split(Regex(SPLITS[style]), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if style == "Qwen 2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    if kind != "pairs of bytes":
        trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=ALPHABET, show_progress=False)
        tokenizer.train_from_iterator([*_HARD_TEXTS, Path(__file__).read_text(), "the quick brown fox " * 9], trainer)
    tokenizer.add_special_tokens([END])
    return tokenizer.to_str()


def definition(kind: str) -> str:
    """The ``tokenizer.json`` of one of `KINDS`."""
    parts = json.loads(_definition(kind))
    model = parts["model"]
    if kind == "Llama 3, every split merged":
        merges = []
        for token in sorted(model["vocab"], key=model["vocab"].get):
            splits = [(token[:end], token[end:]) for end in range(1, len(token))]
            merges += [[a, b] for a, b in splits if a in model["vocab"] and b in model["vocab"]]
        assert len(merges) > len(model["merges"])
        model["merges"] = merges
    if kind == "GPT-2, ids in another order":
        ids = list(model["vocab"].values())
        random.Random(0).shuffle(ids)
        model["vocab"] = dict(zip(model["vocab"], ids, strict=True))
    return json.dumps(parts)


def _pairs() -> models.BPE:
    """Every two bytes are a token, in a mixed order, so that most other splits of a text give other tokens."""
    pairs = [(a, b) for a, b in itertools.product(ALPHABET, repeat=2)]
    random.Random(0).shuffle(pairs)
    tokens = [*ALPHABET, *(a + b for a, b in pairs)]
    return models.BPE({token: number for number, token in enumerate(tokens)}, pairs)


def tokenizer_of(kind: str, *, parse_special_tokens: bool = False, added: tuple[AddedToken, ...] = ()) -> Tokenizer:
    """A tokenizer of one of `KINDS`, as packing sets it."""
    tokenizer = Tokenizer.from_str(definition(kind))
    tokenizer.add_tokens(list(added))
    tokenizer.encode_special_tokens = not parse_special_tokens
    return tokenizer
