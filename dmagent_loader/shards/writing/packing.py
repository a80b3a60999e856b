"""Packing of documents: the tokens of a domain, concatenated and cut into rows of equal length.

Every document ends with the end-of-text token. Tokens at the end that do not fill a row are dropped and counted, not
padded: padding would have to be masked out of every loss.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmagent_loader.errors import ConfigurationError, require_extra

PACKED_MEMBER = "input_ids.npy"
"""The member that holds the tokens of a packed row."""

BATCH_CHARACTERS = 1 << 20
"""Length of the texts that are passed to the tokenizer together."""
COMMON_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")

TokenArray = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, kw_only=True)
class TextTokenizer:
    """The parts of a tokenizer that packing needs.

    Attributes:
        encode: Function from texts to token ids, without special tokens. It takes many texts at once, which tokenizers
            encode in parallel.
        eos_id: Id of the end-of-text token.
        dtype: uint16 if all ids fit, otherwise uint32.
        vocabulary: Hex sha256 of the tokens and their ids, because the files of most tokenizers have the same name.
    """

    encode: Callable[[list[str]], list[list[int]]]
    eos_id: int
    dtype: np.dtype[Any]
    vocabulary: str

    @classmethod
    def load(cls, path: str | os.PathLike[str], eos_token: str | None = None) -> TextTokenizer:
        """Loads a ``tokenizer.json`` (package tokenizers), or a folder or Hub name (package transformers).

        Args:
            path: Path or Hub name of the tokenizer.
            eos_token: The end-of-text token; None: the one that the tokenizer declares, or for a bare
                ``tokenizer.json`` the first of `COMMON_END_TOKENS` in its vocabulary.

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

        def encode(texts: list[str]) -> list[list[int]]:
            if bare:
                return [encoding.ids for encoding in loaded.encode_batch(texts, add_special_tokens=False)]
            ids: list[list[int]] = loaded(texts, add_special_tokens=False, verbose=False)["input_ids"]
            return ids

        return cls(
            encode=encode,
            eos_id=vocabulary[end],
            dtype=np.dtype(np.uint16 if largest < 1 << 16 else np.uint32),
            vocabulary=hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest(),
        )


class Packer:
    """Packs the documents of one domain.

    Args:
        tokenizer: Tokenizer of the rows.
        sequence_length: Tokens per row.

    Attributes:
        num_dropped: Tokens that did not fill the last row; set when `rows` is exhausted.
    """

    def __init__(self, tokenizer: TextTokenizer, sequence_length: int) -> None:
        self._tokenizer = tokenizer
        self._sequence_length = sequence_length
        self.num_dropped = 0

    def rows(self, texts: Iterable[str]) -> Iterator[TokenArray]:
        """Yields the packed rows, (sequence_length,) each."""
        left = np.zeros(0, self._tokenizer.dtype)
        length = self._sequence_length
        for batch in _batches(texts):
            tokens: list[int] = []
            for ids in self._tokenizer.encode(batch):
                tokens.extend(ids)
                tokens.append(self._tokenizer.eos_id)
            left = np.concatenate([left, np.array(tokens, self._tokenizer.dtype)])
            whole = len(left) // length * length
            yield from left[:whole].reshape(-1, length)
            left = left[whole:]
        self.num_dropped = len(left)


def encode_npy(array: np.ndarray[Any, Any]) -> bytes:
    """The bytes of a npy file."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
