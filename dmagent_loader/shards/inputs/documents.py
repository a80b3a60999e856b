"""Documents from records: the text of each, the columns that are kept, and why a record is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dmagent_loader._tasks import Advance
from dmagent_loader._validation import shown
from dmagent_loader.errors import ShardError
from dmagent_loader.shards.inputs.chat import fault_of_messages, fault_of_text, load_template, tools_of
from dmagent_loader.shards.inputs.kinds import Input
from dmagent_loader.shards.inputs.options import TOOLS_KEY, ReadOptions
from dmagent_loader.shards.inputs.pieces import Piece, divide
from dmagent_loader.shards.inputs.records import Record, Reject, Rejected, TokenArray, rejected, repeats_inside
from dmagent_loader.shards.inputs.text import missing_column


@dataclass(frozen=True)
class Document:
    """A text and the columns that are kept with it.

    Attributes:
        text: Text of the document, which can be encoded as UTF-8; of tokenised input, ``""``.
        columns: Column name -> value.
        origin: File and line, for error messages.
        tokens: Token ids of tokenised input; None: the text is not tokenised.
    """

    text: str
    columns: dict[str, Any]
    origin: str
    tokens: TokenArray | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to train on."""
        return not self.text.strip() if self.tokens is None else not len(self.tokens)


class Documents:
    """Makes documents of records.

    Args:
        options: Which part of a record is the document.
    """

    def __init__(self, options: ReadOptions) -> None:
        self._options = options
        self._render = load_template(options.chat_template).render if options.chat_template is not None else None

    def make(self, record: Record | Rejected) -> Document | Rejected:
        """The document of a record, or why it is none."""
        if isinstance(record, Rejected):
            return record
        place, value = record
        if isinstance(value, np.ndarray):
            return Document("", {}, place, value)
        if isinstance(value, dict):
            options = self._options
            text = value.get(options.document_key)
            repeating = self._repeating(value)
            if repeating:
                fault = (
                    f"has a name more than once inside column {repeating!r}, so only the last would be read: rename it"
                )
                return rejected(place, fault, value[repeating])
            if self._render is not None and options.messages_key in value:
                text = self._rendered(place, text, value.get(TOOLS_KEY))
        elif isinstance(value, str):
            text, value = value, {}
        else:
            return rejected(place, missing_column("", type(value).__name__, self._options).strip(), value)
        if isinstance(text, Rejected):
            return text
        if isinstance(text, bytes):  # a column of parquet that is not marked as text
            decoded = _decoded(text)
            if decoded is None:
                return rejected(place, f"column {self._options.document_key!r} is not UTF-8: convert it", text[:200])
            text = decoded
        if not isinstance(text, str):
            return rejected(place, self._fault(value, text), value)
        if "\0" in text:
            return rejected(place, "contains a zero byte, as binary files do: remove it, or convert it", text)
        # Only JSON escapes, and bytes that were no UTF-8, make halves of surrogate pairs.
        fault = _surrogate(text, f"column {self._options.document_key!r} in {place}" if value else place)
        if fault:
            return Rejected(place, fault, shown(text))
        return Document(text, self._kept(value), place)

    def _rendered(self, place: str, messages: Any, tools: Any) -> str | Rejected:
        assert self._render is not None
        fault = fault_of_messages(messages)
        if not fault:
            try:
                text = self._render(messages, tools_of(tools))
                fault = fault_of_text(text, messages)
                if not fault:
                    return text
            except Exception as error:  # a template may raise anything, such as jinja2.TemplateError
                fault = f"cannot be rendered by the chat template ({error})"
        key = self._options.messages_key
        return rejected(place, f"column {key!r} {fault}: repair or remove the record", messages)

    def _fault(self, row: dict[str, Any], text: object) -> str:
        key = self._options.document_key
        if key not in row:
            return missing_column("", sorted(row), self._options).strip()
        return f"has no text in column {key!r}, but {shown(text)}: repair or remove the record"

    def _repeating(self, row: dict[str, Any]) -> str | None:
        """A column that is used and holds an object with a name more than once."""
        used = self._kept(row)
        if self._render is not None:
            used |= {name: row[name] for name in (self._options.messages_key, TOOLS_KEY) if name in row}
        return next((name for name, value in used.items() if repeats_inside(value)), None)

    def _kept(self, row: dict[str, Any]) -> dict[str, Any]:
        names = self._options.keep_columns
        if names is None:
            return {name: value for name, value in row.items() if name != self._options.document_key}
        return {name: row[name] for name in names if name in row}


@dataclass
class DocumentReader:
    """Reads the documents of one domain, without those that are empty; a record that is no document is an error.

    Args:
        inputs: Inputs to read, in order (`find_inputs`).
        options: Which part of a record is the document.
        advance: Called with the number of stored bytes read since the last call.
    """

    inputs: Sequence[Input]
    options: ReadOptions = field(default_factory=ReadOptions)
    advance: Advance = lambda size: None

    def __iter__(self) -> Iterator[Document]:
        for piece in divide(self.inputs):
            yield from read_documents(piece, self.options, self.advance)


def refuse(found: Rejected) -> None:
    """Raises ShardError for a record that is not a document."""
    raise ShardError(found.reason)


def read_documents(piece: Piece, options: ReadOptions, advance: Advance, reject: Reject = refuse) -> Iterator[Document]:
    """Reads the documents of a piece, without those that are empty; passes what is none to `reject`."""
    make = Documents(options).make
    for record in piece.read(options, advance):
        document = make(record)
        if isinstance(document, Rejected):
            reject(document)
        elif not document.is_empty:
            yield document


def _surrogate(text: str, place: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return (
            f"{place} contains half of a surrogate pair ({error}), which is not text and could not be read again: "
            "repair or remove the line"
        )
    return ""


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None
