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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmagent_loader.errors import ConfigurationError, ShardError, require_extra
from dmagent_loader.shards.inputs.documents import Document
from dmagent_loader.shards.inputs.records import Rejected, rejected
from dmagent_loader.shards.writing.encoding import LOSES_CHARACTERS, Spelled, TextEncoder, loses_characters

PACKED_MEMBER = "input_ids.npy"
"""The member that holds the tokens of a packed row."""
LENGTHS_MEMBER = "document_lengths.npy"
"""The member that says how many tokens of a packed row belong to each document, where end-of-text tokens do not."""

BATCH_CHARACTERS = 1 << 20
"""Length of the texts that are passed to the tokenizer together."""
COMMON_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")

logger = logging.getLogger(__name__)

TokenArray = NDArray[np.unsignedinteger[Any]]


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """Loads a ``tokenizer.json`` (package tokenizers), or a folder or Hub name (package transformers).

    Raises:
        ConfigurationError: The tokenizer cannot be loaded.
        MissingExtraError: The package is not installed.
    """
    name = os.fspath(path)
    library = require_extra("tokenizers", "demo") if _is_bare(name) else require_extra("transformers", "hf")
    try:
        if _is_bare(name):
            return library.Tokenizer.from_file(name)
        return library.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # both libraries raise bare Exceptions
        raise ConfigurationError(
            f"no tokenizer could be loaded from {name!r} ({error}): give a tokenizer.json or a folder that "
            "save_pretrained wrote"
        ) from error


def _is_bare(name: str) -> bool:
    return name.endswith(".json")


@dataclass(frozen=True, kw_only=True)
class TextTokenizer:
    """The parts of a tokenizer that packing needs.

    Attributes:
        encode: Function from texts to token ids, whole and without tokens added to them. It takes many texts at once,
            which tokenizers encode in parallel.
        decode: Function from token ids to text, without special tokens.
        eos_id: Id of the end-of-text token.
        num_ids: One more than the largest token id.
        dtype: uint16 if all ids fit, otherwise uint32.
        sha256: Hex sha256 of the whole tokenizer, because the files of most have the same name.
        special_tokens: Texts of the special tokens.
        parses_special_tokens: Whether `encode` turns these texts into the tokens.
        loaded_from: Arguments of `load`; a pickled tokenizer is loaded from there again.
    """

    encode: Callable[[list[str]], list[list[int]]]
    decode: Callable[[list[int]], str]
    eos_id: int
    num_ids: int
    dtype: np.dtype[Any]
    sha256: str
    special_tokens: tuple[str, ...]
    parses_special_tokens: bool
    loaded_from: tuple[str, str | None]

    def __reduce__(self) -> tuple[Any, ...]:
        path, eos_token = self.loaded_from
        return partial(TextTokenizer.load, path, eos_token, parse_special_tokens=self.parses_special_tokens), ()

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], eos_token: str | None = None, *, parse_special_tokens: bool = False
    ) -> TextTokenizer:
        """Loads a tokenizer, as `load_tokenizer` does.

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
        bare = _is_bare(name)
        loaded = load_tokenizer(name)
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
        added = (loaded.get_added_tokens_decoder() if bare else loaded.added_tokens_decoder).values()
        # transformers makes more of each text than its tokens: with short rows, that takes as long as the tokens.
        serialised = json.dumps([type(loaded).__name__, sorted(vocabulary.items()), sorted(map(str, added))])
        backend: Any = loaded if bare else getattr(loaded, "backend_tokenizer", None)
        if backend is not None:
            for setting, unset in (("truncation", backend.no_truncation), ("padding", backend.no_padding)):
                if getattr(backend, setting) is not None:
                    unset()
                    if bare:  # transformers ignores these settings of the file, unless a call asks for them
                        logger.warning("tokenizer %r has %s settings, which packing ignores", name, setting)
            serialised = backend.to_str()
            backend.encode_special_tokens = not parse_special_tokens
            if loses_characters(backend):
                logger.warning(LOSES_CHARACTERS, name)
        encoder = TextEncoder(backend) if backend is not None else None
        if encoder is not None:
            logger.info("tokenizer %r: %s", name, encoder.slow_reason or "its tokens are made by tiktoken")

        def encode(texts: list[str]) -> list[list[int]]:
            if encoder is not None:
                return encoder.encode(texts)
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
            num_ids=largest + 1,
            dtype=np.dtype(np.uint16 if largest < 1 << 16 else np.uint32),
            sha256=hashlib.sha256(serialised.encode()).hexdigest(),
            special_tokens=tuple(sorted({end, *(token.content for token in added if token.special)})),
            parses_special_tokens=parse_special_tokens,
            loaded_from=(name, eos_token),
        )


class DocumentTokenizer:
    """Tokenises documents, each ended by the end-of-text token.

    Args:
        tokenizer: Tokenizer of the rows.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = Spelled(tokenizer.special_tokens)

    def tokens(self, documents: Sequence[Document]) -> list[TokenArray | Rejected]:
        """The tokens of each document, or why it has none; tokenised documents keep theirs."""
        texts = [document.text for document in documents if document.tokens is None]
        encoded = iter(self._tokenizer.encode(texts))
        return [
            self._ended(document, next(encoded) if document.tokens is None else self._known(document))
            for document in documents
        ]

    def spells_special_token(self, text: str) -> bool:
        """Whether a text spells a special token."""
        return self._special.in_text(text)

    def _known(self, document: Document) -> list[int]:
        assert document.tokens is not None
        largest = int(document.tokens.max(initial=0))
        if largest >= self._tokenizer.num_ids or int(document.tokens.min(initial=0)) < 0:
            raise ShardError(
                f"{document.origin} has token {largest}, but the tokenizer has {self._tokenizer.num_ids}: name the one "
                "that made these tokens (--tokenizer)"
            )
        ids: list[int] = document.tokens.tolist()
        return ids

    def _ended(self, document: Document, ids: list[int]) -> TokenArray | Rejected:
        end = self._tokenizer.eos_id
        if not ids or ids[-1] != end or not (self._tokenizer.parses_special_tokens or document.tokens is not None):
            ids.append(end)
        if not self._tokenizer.parses_special_tokens and ids.index(end) != len(ids) - 1:
            fault = (
                f"spells the end-of-text token (id {end}), and this tokenizer cannot read it as text, so the document "
                "would end there: remove it from the text, name another end-of-text token (--eos-token, eos_token=), "
                "or let it end documents (--parse-special-tokens)"
            )
            return rejected(document.origin, fault, document.text)
        return np.array(ids, self._tokenizer.dtype)


def encode_npy(array: np.ndarray[Any, Any]) -> bytes:
    """The bytes of a npy file."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()
