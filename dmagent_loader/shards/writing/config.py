"""Settings of `shard_files`."""

from __future__ import annotations

from dataclasses import dataclass

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.shards.inputs.options import ReadOptions
from dmagent_loader.shards.tar import KeyEnd


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """Settings of `shard_files`.

    Args:
        text_key: Column of a record that holds the text.
        keep_columns: Other columns to keep, as a ``json`` member beside ``txt``; raw text only.
        chat_template: Folder or Hub name of a tokenizer with a chat template, or a ``.jinja`` file. Documents are then
            the rendered conversations of the column `messages_key`.
        messages_key: Column with the messages of a conversation: a list of objects with ``role`` and ``content``.
        text_files: Endings of files that are one document each, such as ``".txt"``.
        tar_member: Member with the text in tar shards that are to be written again; None: tar shards are refused.
        key_ends_at: The dot of a file name in these shards at which the key of its row ends.
        tokenizer: A ``tokenizer.json``, a folder or a Hub name, for packed rows; None: raw text.
        eos_token: End-of-text token between packed documents; None: that of the tokenizer.
        parse_special_tokens: Whether text that spells a special token, such as ``<|endoftext|>``, becomes that token,
            as documents in a chat format need. False: it is text like any other.
        sequence_length: Tokens per packed row, at least 2.
        rows_per_shard: Largest number of rows in a shard; None: no limit.
        max_shard_bytes: Largest mean size of a domain's shards, in bytes. They have equal numbers of rows.
        shuffle_seed: Seed of the order of the documents; None: the order of the input.
        max_bad: Largest number of records of a domain that may be left out because they are no documents.
        skip_small: Whether domains with too little text for one row are left out with a warning. False: they are an
            error.
    """

    text_key: str = "text"
    keep_columns: tuple[str, ...] = ()
    chat_template: str | None = None
    messages_key: str = "messages"
    text_files: tuple[str, ...] = ()
    tar_member: str | None = None
    key_ends_at: KeyEnd = "first-dot"
    tokenizer: str | None = None
    eos_token: str | None = None
    parse_special_tokens: bool = False
    sequence_length: int | None = None
    rows_per_shard: int | None = None
    max_shard_bytes: int = 256 << 20
    shuffle_seed: int | None = 0
    max_bad: int = 0
    skip_small: bool = False

    def __post_init__(self) -> None:
        if (self.tokenizer is None) != (self.sequence_length is None):
            raise ConfigurationError(
                f"tokenizer={self.tokenizer!r} with sequence_length={self.sequence_length!r}: packing needs both "
                "(--tokenizer, --sequence-length), raw text neither"
            )
        if self.tokenizer is not None and self.keep_columns:
            raise ConfigurationError(
                f"keep_columns={list(self.keep_columns)} with a tokenizer: packed rows mix documents, so there is no "
                "place for their columns; write raw text, or keep none"
            )
        if self.eos_token is not None and self.tokenizer is None:
            raise ConfigurationError(
                f"eos_token={self.eos_token!r} without a tokenizer has no effect: raw text has no tokens"
            )
        if self.parse_special_tokens and self.tokenizer is None:
            raise ConfigurationError(
                "parse_special_tokens=True without a tokenizer has no effect: raw text has no tokens"
            )
        if self.chat_template is not None and self.tokenizer is not None and not self.parse_special_tokens:
            raise ConfigurationError(
                f"chat_template={self.chat_template!r} with a tokenizer: the special tokens that the template writes "
                "would stay text; pass parse_special_tokens=True (--parse-special-tokens)"
            )
        if self.sequence_length == 1:
            raise ConfigurationError(
                "sequence_length=1: a row of one token has no next token to predict, so its loss is NaN; it must be "
                "at least 2"
            )
        for name, least in (
            ("sequence_length", 1),
            ("rows_per_shard", 1),
            ("max_shard_bytes", 1),
            ("max_bad", 0),
            ("shuffle_seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigurationError(f"{name}={value}: it must be at least {least}")
        _ = self.reading  # its own checks

    @property
    def reading(self) -> ReadOptions:
        """Which part of a record is the document."""
        return ReadOptions(
            text_key=self.text_key,
            keep_columns=self.keep_columns,
            chat_template=self.chat_template,
            messages_key=self.messages_key,
            text_files=self.text_files,
            tar_member=self.tar_member,
            key_ends_at=self.key_ends_at,
        )
