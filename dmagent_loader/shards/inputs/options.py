"""How documents are taken from records."""

from __future__ import annotations

from dataclasses import dataclass

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.shards.inputs.kinds import COMPRESSIONS, kind_of_name
from dmagent_loader.shards.tar import KeyEnd

TOOLS_KEY = "tools"
"""Column with the tools of a conversation, a list or its JSON, by the convention of data sets of the Hub."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Which part of a record is the document.

    Args:
        text_key: Column of a record that holds the text.
        keep_columns: Columns to keep with the text; None: all.
        chat_template: Folder or Hub name of a tokenizer with a chat template, or a ``.jinja`` file. Documents are then
            the rendered conversations of the column `messages_key`; the template gets the column `TOOLS_KEY`, too.
        messages_key: Column with the messages of a conversation: a list of objects with ``role`` and ``content``.
        text_files: Endings of files that are one document each, such as ``".txt"``. None are read as text by default,
            because a README or a log beside the data would become a document.
        tar_member: Member of the rows of tar shards that holds the document, such as ``"txt"`` or ``"json"``. None: tar
            shards are refused, because the sampler reads them as they are.
        key_ends_at: The dot of a file name in tar shards at which the key of its row ends.
    """

    text_key: str = "text"
    keep_columns: tuple[str, ...] | None = ()
    chat_template: str | None = None
    messages_key: str = "messages"
    text_files: tuple[str, ...] = ()
    tar_member: str | None = None
    key_ends_at: KeyEnd = "first-dot"

    def __post_init__(self) -> None:
        for ending in self.text_files:
            if not ending.startswith(".") or len(ending) < 2:
                raise ConfigurationError(
                    f"text_files names {ending!r}, which is not an ending: write it with its dot, such as '.txt'"
                )
            if ending.lower().endswith(COMPRESSIONS):
                raise ConfigurationError(
                    f"text_files names {ending!r}, which has no effect: write the ending before that of the "
                    "compression, such as '.txt' for .txt.gz"
                )
            kind = kind_of_name(f"a{ending}")
            if kind is not None:
                raise ConfigurationError(
                    f"text_files names {ending!r}, which has no effect: these files are read as {kind.value}; rename "
                    "those that are plain text"
                )

    @property
    def document_key(self) -> str:
        """The column that the document is made of."""
        return self.text_key if self.chat_template is None else self.messages_key

    def columns(self, available: list[str]) -> list[str]:
        """Which of the available columns are needed, in their order."""
        if self.keep_columns is None:
            return available
        wanted = {self.document_key, *self.keep_columns}
        if self.chat_template is not None:
            wanted.add(TOOLS_KEY)
        return [name for name in available if name in wanted]
