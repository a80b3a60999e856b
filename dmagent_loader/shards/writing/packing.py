"""Packing of documents: the tokens of a domain, concatenated and cut into rows of equal length.

Every document ends with the end-of-text token. Tokens at the end that do not fill a row are dropped and counted, not
padded: padding would have to be masked out of every loss.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmagent_loader.errors import ConfigurationError, ShardError, require_extra
from dmagent_loader.shards.writing.documents import Document

PACKED_MEMBER = "input_ids.npy"
"""The member that holds the tokens of a packed row."""

BATCH_CHARACTERS = 1 << 20
"""Length of the texts that are passed to the tokenizer together."""
COMMON_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")

logger = logging.getLogger(__name__)

TokenArray = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, kw_only=True)
class TextTokenizer:
    """The parts of a tokenizer that packing needs.

    Attributes:
        encode: Function from texts to token ids, whole and without tokens added to them. It takes many texts at once,
            which tokenizers encode in parallel.
        decode: Function from token ids to text, without special tokens.
        eos_id: Id of the end-of-text token.
        dtype: uint16 if all ids fit, otherwise uint32.
        vocabulary: Hex sha256 of the tokens and their ids, because the files of most tokenizers have the same name.
        special_tokens: Texts of the special tokens.
        parses_special_tokens: Whether `encode` turns these texts into the tokens.
    """

    encode: Callable[[list[str]], list[list[int]]]
    decode: Callable[[list[int]], str]
    eos_id: int
    dtype: np.dtype[Any]
    vocabulary: str
    special_tokens: tuple[str, ...]
    parses_special_tokens: bool

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], eos_token: str | None = None, *, parse_special_tokens: bool = False
    ) -> TextTokenizer:
        """Loads a ``tokenizer.json`` (package tokenizers), or a folder or Hub name (package transformers).

        Args:
            path: Path or Hub name of the tokenizer.
            eos_token: The end-of-text token; None: the one that the tokenizer declares, or for a bare
                ``tokenizer.json`` the first of `COMMON_END_TOKENS` in its vocabulary.
            parse_special_tokens: See `ShardingConfig`.

        Raises:
            ConfigurationError: The tokenizer cannot be loaded, or has no such token.
            MissingExtraError: The package is not installed.
        """
        name = os.fspath(path)
        bare = name.endswith(".json")
        library = require_extra("tokenizers" if bare else "transformers", "demo" if bare else "hf")
        try:
            loaded: Any = (
                library.Tokenizer.from_file(name)
                if bare
                else library.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            )
        except Exception as error:  # both libraries raise bare Exceptions
            raise ConfigurationError(
                f"no tokenizer could be loaded from {name!r} ({error}): give a tokenizer.json or a folder that "
                "save_pretrained wrote"
            ) from error
        vocabulary: dict[str, int] = loaded.get_vocab()
        declared = None if bare else loaded.eos_token
        candidates = [eos_token] if eos_token is not None else [declared] if declared else list(COMMON_END_TOKENS)
        end = next((token for token in candidates if token in vocabulary), None)
        if end is None:
            raise ConfigurationError(
                f"tokenizer {name!r} has no end-of-text token ({' '.join(candidates)} not in its {len(vocabulary)} "
                "tokens), so packed documents would run into each other: name one (--eos-token, eos_token=)"
            )
        largest = max(vocabulary.values())
        if bare:
            # transformers ignores these settings of the file, unless a call asks for them.
            for setting, unset in (("truncation", loaded.no_truncation), ("padding", loaded.no_padding)):
                if getattr(loaded, setting) is not None:
                    unset()
                    logger.warning("tokenizer %r has %s settings, which packing ignores", name, setting)
            loaded.encode_special_tokens = not parse_special_tokens
        added = (loaded.get_added_tokens_decoder() if bare else loaded.added_tokens_decoder).values()

        def encode(texts: list[str]) -> list[list[int]]:
            if bare:
                return [encoding.ids for encoding in loaded.encode_batch(texts, add_special_tokens=False)]
            ids: list[list[int]] = loaded(
                texts, add_special_tokens=False, split_special_tokens=not parse_special_tokens, verbose=False
            )["input_ids"]
            return ids

        def decode(ids: list[int]) -> str:
            return str(loaded.decode(ids, skip_special_tokens=True))

        return cls(
            encode=encode,
            decode=decode,
            eos_id=vocabulary[end],
            dtype=np.dtype(np.uint16 if largest < 1 << 16 else np.uint32),
            vocabulary=hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest(),
            special_tokens=tuple(sorted({end, *(token.content for token in added if token.special)})),
            parses_special_tokens=parse_special_tokens,
        )


class Packer:
    """Packs the documents of one domain.

    Args:
        tokenizer: Tokenizer of the rows.
        sequence_length: Tokens per row.

    Attributes:
        num_dropped: Tokens that did not fill the last row; set when `rows` is exhausted.
        num_spelling_special_tokens: Documents so far whose text spells a special token.
    """

    def __init__(self, tokenizer: TextTokenizer, sequence_length: int) -> None:
        self._tokenizer = tokenizer
        self._sequence_length = sequence_length
        self._special = re.compile("|".join(map(re.escape, tokenizer.special_tokens)))
        self._special_starts = {token[:2] for token in tokenizer.special_tokens}  # far faster to find than the pattern
        self.num_dropped = 0
        self.num_spelling_special_tokens = 0

    def rows(self, documents: Iterable[Document]) -> Iterator[TokenArray]:
        """Yields the packed rows, (sequence_length,) each.

        Raises:
            ShardError: The tokens of a document contain the end-of-text token, and special tokens are not parsed.
        """
        left = np.zeros(0, self._tokenizer.dtype)
        length, eos_id = self._sequence_length, self._tokenizer.eos_id
        for batch in _batches(documents):
            self.num_spelling_special_tokens += sum(self._spells_special_token(document.text) for document in batch)
            tokens: list[int] = []
            encoded = self._tokenizer.encode([document.text for document in batch])
            for ids in encoded:
                tokens.extend(ids)
                tokens.append(eos_id)
            packed = np.array(tokens, self._tokenizer.dtype)
            if not self._tokenizer.parses_special_tokens and np.count_nonzero(packed == eos_id) > len(batch):
                split = next(document for document, ids in zip(batch, encoded, strict=True) if eos_id in ids)
                raise ShardError(
                    f"{split.origin} spells the end-of-text token (id {eos_id}), and this tokenizer cannot read it as "
                    "text, so the document would end there: remove it from the text, name another end-of-text token "
                    "(--eos-token, eos_token=), or let it end documents (--parse-special-tokens)"
                )
            left = np.concatenate([left, packed])
            whole = len(left) // length * length
            yield from left[:whole].reshape(-1, length)
            left = left[whole:]
        self.num_dropped = len(left)

    def _spells_special_token(self, text: str) -> bool:
        return any(start in text for start in self._special_starts) and self._special.search(text) is not None


def encode_npy(array: np.ndarray[Any, Any]) -> bytes:
    """The bytes of a npy file."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
