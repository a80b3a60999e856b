"""The settings of packing on the fly."""

from __future__ import annotations

import ast
import logging
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from dmagent_loader._validation import shown, whole_number
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.shards.packed.encoder import DocumentEncoder
from dmagent_loader.shards.writing.encoding import LOSES_CHARACTERS, loses_characters
from dmagent_loader.shards.writing.packing import COMMON_END_TOKENS

_DESCRIPTION = re.compile(
    r"rows of (?P<length>\d+) tokens, tokenizer \w+, end token (?P<end>\d+), member (?P<member>'.*?'|\".*?\")"
    r"(?:, key (?P<key>'.*?'|\".*?\"))?(?P<parsed>, special tokens parsed)?"
)
"""`PackText.description`, from which all but the tokenizer can be read again."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackText:
    """Packs the documents of text shards into rows of tokens while they are read.

    The documents of a shard, each ended by the end-of-text token, form one sequence of tokens, which is cut into rows
    of `length` tokens. A document that does not fit continues in the next row. Nothing is padded, and only the tokens
    at the end of each shard that fill no row are left out. The rows have the member ``input_ids.npy``, like those of
    ``dmagent shard --tokenizer``, so the same transforms and `collate_packed` apply to them.

    Pass it as ``pack=`` of `AgentWeightedSampler`.

    Args:
        tokenizer: A fast tokenizer of transformers, or a ``tokenizers.Tokenizer``. The object is copied.
        length: Tokens of a row, at least 2. Megatron and NeMo read rows of one token more than the sequence length.
        member: Name of the text member.
        text_key: Key of the text if the member is a JSON object.
        end_token: Id of the token that ends every document; ``"tokenizer"``: the ``eos_token_id`` of a tokenizer of
            transformers, or the first common end-of-text token in the vocabulary of another one.
        parse_special_tokens: Whether text that spells a special token, such as ``<|endoftext|>``, becomes that token,
            as documents in a chat format need. False: it is text like any other.

    Raises:
        ConfigurationError: The tokenizer is of another kind, or has no end-of-text token; or a value is invalid.

    Example:
        >>> from tokenizers import Tokenizer
        >>> from tokenizers.models import WordLevel
        >>> PackText(Tokenizer(WordLevel({"a": 0, "</s>": 1}, unk_token="a")), 128).encoder.end_token
        1
    """

    tokenizer: Any
    length: int
    member: str = field(default="txt", kw_only=True)
    text_key: str = field(default="text", kw_only=True)
    end_token: int | Literal["tokenizer"] = field(default="tokenizer", kw_only=True)
    parse_special_tokens: bool = field(default=False, kw_only=True)
    encoder: DocumentEncoder = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        whole_number("length", self.length, least=2)
        for name in ("member", "text_key"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ConfigurationError(f"{name} is {shown(getattr(self, name))}; it must be a name")
        backend = getattr(self.tokenizer, "backend_tokenizer", self.tokenizer)
        if not hasattr(backend, "encode_batch_fast"):
            raise ConfigurationError(
                f"PackText cannot use {shown(self.tokenizer)}: pass a fast tokenizer of transformers (the object, not "
                "its method encode or its name), or a tokenizers.Tokenizer; for other tokenizers, write packed shards "
                "with dmagent shard --tokenizer"
            )
        encoder = DocumentEncoder(
            backend.to_str(),
            end_token=self._end_token(backend),
            member=self.member,
            text_key=self.text_key,
            parse_special_tokens=bool(self.parse_special_tokens),
        )
        if loses_characters(backend):
            logger.warning(LOSES_CHARACTERS, type(self.tokenizer).__name__)
        object.__setattr__(self, "encoder", encoder)

    def _end_token(self, backend: Any) -> int:
        number: Any = self.end_token
        if number == "tokenizer":
            known = [backend.token_to_id(token) for token in COMMON_END_TOKENS]
            known = known if backend is self.tokenizer else [self.tokenizer.eos_token_id]
            number = next((token for token in known if token is not None), None)
            if number is None:
                raise ConfigurationError(
                    "the tokenizer has no end-of-text token, so packed documents would run into each other: pass "
                    "end_token= (its id)"
                )
        end_token = whole_number("end_token", number, least=0)
        if backend.id_to_token(end_token) is None:
            raise ConfigurationError(f"end_token is {end_token}, which is not a token of the tokenizer")
        return end_token

    @property
    def description(self) -> str:
        """All that determines the rows of a shard; equal for equal tokenizers, wherever their files are."""
        return f"rows of {self.length} tokens, {self.encoder.description}"

    @classmethod
    def described(cls, description: str, tokenizer: Any) -> PackText:
        """The packing of a saved run.

        Args:
            description: Its `description`, as a state holds it.
            tokenizer: The tokenizer of the run.

        Raises:
            ConfigurationError: It is another tokenizer.
        """
        found = _DESCRIPTION.fullmatch(description)
        if found is None:
            raise ConfigurationError(
                f"the state's packing is {shown(description)}, which describes no PackText: it is damaged or was "
                "edited; load an older one"
            )
        pack = cls(
            tokenizer,
            int(found["length"]),
            member=ast.literal_eval(found["member"]),
            text_key=ast.literal_eval(found["key"] or "'text'"),
            end_token=int(found["end"]),
            parse_special_tokens=found["parsed"] is not None,
        )
        if pack.description != description:
            raise ConfigurationError(
                f"the run packed {description}, but with this tokenizer it would be {pack.description}: pass the "
                "tokenizer of the run"
            )
        return pack
