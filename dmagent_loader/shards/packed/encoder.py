"""From rows of text to the tokens of documents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from dmagent_loader._validation import shown
from dmagent_loader.errors import DecodeError, require_extra
from dmagent_loader.shards.decode import Decoder, RawSample
from dmagent_loader.shards.writing.encoding import TextEncoder
from dmagent_loader.shards.writing.packing import TokenArray

_WITHOUT_EFFECT = ("version", "truncation", "padding", "post_processor", "decoder")
"""Entries of a tokenizer's definition that do not change the tokens of a whole text without added tokens."""


class DocumentEncoder:
    """Tokenises the documents of text shards, each ended by the end-of-text token. It can be pickled.

    Args:
        definition: Content of the ``tokenizer.json``.
        end_token: Id of the end-of-text token.
        member: Name of the text member.
        text_key: Key of the text if the member is a JSON object.
        parse_special_tokens: Whether text that spells a special token becomes that token.

    Attributes:
        description: All that determines the tokens of a document.
        dtype: uint16 if all ids fit, otherwise uint32.
        version: Version of the package tokenizers.
    """

    def __init__(
        self, definition: str, *, end_token: int, member: str, text_key: str, parse_special_tokens: bool
    ) -> None:
        self._definition, self._member, self._text_key = definition, member, text_key
        self.end_token, self._parses = end_token, parse_special_tokens
        parts: dict[str, Any] = json.loads(definition)
        kept = {name: part for name, part in parts.items() if name not in _WITHOUT_EFFECT}
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
        self.description = f"tokenizer {digest[:16]}, end token {end_token}, member {member!r}"
        self.description += f", key {text_key!r}" * (text_key != "text")
        self.description += ", special tokens parsed" * parse_special_tokens
        self._start()
        largest = max(self._tokenizer.get_vocab().values())
        self.dtype: np.dtype[Any] = np.dtype(np.uint16 if largest < 1 << 16 else np.uint32)

    def _start(self) -> None:
        library = require_extra("tokenizers", "hf")
        self.version: str = library.__version__
        self._tokenizer: Any = library.Tokenizer.from_str(self._definition)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = not self._parses
        self._encoder: Any = TextEncoder(self._tokenizer)
        self._decode = Decoder()

    @property
    def ends_are_certain(self) -> bool:
        """Whether the end-of-text token occurs at the ends of documents only."""
        return not self._parses

    def text(self, row: RawSample) -> str:
        """The text of a row.

        Raises:
            DecodeError: The row has no such member, or it is no text.
        """
        if self._member not in row.members:
            raise DecodeError(
                f"the row has no member {self._member!r}, only {shown(sorted(row.members))}: "
                "pass PackText(member=...), or leave pack= out if the shards hold packed rows"
            )
        value = self._decode(RawSample(row.key, {self._member: row.members[self._member]}))[self._member]
        if isinstance(value, dict):
            value = value.get(self._text_key)
        if not isinstance(value, str):
            raise DecodeError(
                f"member {self._member!r} holds no text (key {self._text_key!r} of a JSON object): pass "
                "PackText(member=...) or PackText(text_key=...)"
            )
        return value

    def tokens(self, rows: Sequence[RawSample]) -> list[TokenArray | DecodeError]:
        """The tokens of each document, or why it has none; many documents are tokenised in parallel."""
        texts: list[str | DecodeError] = []
        for row in rows:
            try:
                texts.append(self.text(row))
            except DecodeError as error:
                texts.append(error)
        encoded = iter(self._encoder.encode([text for text in texts if isinstance(text, str)]))
        return [self._ended(next(encoded)) if isinstance(text, str) else text for text in texts]

    def _ended(self, ids: list[int]) -> TokenArray | DecodeError:
        end = self.end_token
        if self._parses:
            if ids[-1:] != [end]:
                ids.append(end)
        elif end in ids:
            return DecodeError(
                f"the text spells the end-of-text token (id {end}), and this tokenizer cannot read it as text, so the "
                "document would end there: remove it from the text, pass another end_token=, or let it end documents "
                "(parse_special_tokens=True)"
            )
        else:
            ids.append(end)
        return np.array(ids, self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the tokenizer: a pickled one forgets how to read special tokens."""
        return {**self.__dict__, "_tokenizer": None, "_encoder": None, "_decode": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()
