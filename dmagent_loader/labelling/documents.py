"""Documents to classify, from any input or from shards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np

from dmagent_loader._tasks import Advance
from dmagent_loader._validation import shown
from dmagent_loader.errors import ShardError
from dmagent_loader.shards.collection import ShardCollection
from dmagent_loader.shards.decode import RawSample, decode_npy
from dmagent_loader.shards.inputs.chat import load_template
from dmagent_loader.shards.inputs.documents import Document, read_documents, refuse
from dmagent_loader.shards.inputs.finding import find_inputs
from dmagent_loader.shards.inputs.kinds import Kind
from dmagent_loader.shards.inputs.options import ReadOptions
from dmagent_loader.shards.inputs.pieces import PIECE_BYTES, Piece, divide
from dmagent_loader.shards.inputs.records import Reject
from dmagent_loader.shards.inputs.tables import version_of
from dmagent_loader.shards.writing.packing import PACKED_MEMBER, TextTokenizer

_TEXT_MEMBERS = ("txt", "text")
PIECE_ROWS = 1 << 16
"""Rows of a piece of a domain of shards."""


class DocumentPiece(Protocol):
    """Successive documents of a domain: the work of one task. It can be pickled."""

    def read(self, advance: Advance, reject: Reject = refuse) -> Iterator[Document]:
        """Reads the documents with all their columns.

        Args:
            advance: Called with what was read since the last call.
            reject: Called with each record that is not a document.
        """
        ...


class DomainDocuments(Protocol):
    """The documents of one domain, read in the same order every time."""

    @property
    def size(self) -> int:
        """Length of the whole, in `unit`, for a progress bar."""
        ...

    @property
    def unit(self) -> str:
        """``"B"`` or ``"row"``."""
        ...

    @property
    def identity(self) -> list[Any]:
        """JSON values that change if the documents do."""
        ...

    @property
    def urls(self) -> list[str]:
        """Paths and URLs of the files that are read."""
        ...

    def pieces(self) -> Sequence[DocumentPiece]:
        """Divides the documents, in order; the same pieces every time."""
        ...


@dataclass(frozen=True)
class _FilePiece:
    piece: Piece
    options: ReadOptions

    def read(self, advance: Advance, reject: Reject = refuse) -> Iterator[Document]:
        return read_documents(self.piece, self.options, advance, reject)


class FileDocuments:
    """Documents in the files, folders, URLs and data sets that `dmagent shard` reads.

    Args:
        domain: Name of the domain, for messages.
        paths: See `shard_files`.
        options: Which part of a record is the document; None: the column ``text``, with all other columns.

    Raises:
        ShardNotFoundError: A path matches no file.
        ShardError: A file is of a kind that is not read.
    """

    unit = "B"

    def __init__(
        self, domain: str, paths: Sequence[str | os.PathLike[str]], options: ReadOptions | None = None
    ) -> None:
        self._options = options or ReadOptions(keep_columns=None)
        self._inputs = find_inputs(domain, paths, self._options)
        self.size = sum(source.size for source in self._inputs)
        self.urls = [source.url for source in self._inputs if source.kind is not Kind.DATASET]

    @property
    def identity(self) -> list[Any]:
        """The options, the size of pieces, and the names, sizes and versions of the inputs."""
        options, template = asdict(self._options), self._options.chat_template
        if template is not None:
            options["chat_template"] = load_template(template).sha256
        return [options, PIECE_BYTES, *([source.name, source.size, version_of(source)] for source in self._inputs)]

    def pieces(self) -> list[_FilePiece]:
        """See `DomainDocuments`."""
        return [_FilePiece(piece, self._options) for piece in divide(self._inputs, PIECE_BYTES)]

    def read(self, advance: Advance, reject: Reject = refuse) -> Iterator[Document]:
        """Reads the documents of all pieces, see `DocumentPiece`."""
        return (document for piece in self.pieces() for document in piece.read(advance, reject))


def first_documents(pieces: Iterable[DocumentPiece], count: int) -> list[Document]:
    """The first documents of some pieces, up to a number; records that are no documents are passed over."""
    documents = (document for piece in pieces for document in piece.read(lambda size: None, lambda bad: None))
    return list(islice(documents, count))


@dataclass
class ShardDocuments:
    """Rows of one domain of a collection of shards, as documents.

    A row of text is a document. Of a packed row, the longest piece between end-of-text tokens is taken.

    Args:
        collection: The shards.
        domain: Number of the domain.
        text_key: Column of a ``json`` member that holds the text where there is no ``txt`` member.
        tokenizer: Tokenizer of packed rows; None: there are none.
    """

    collection: ShardCollection
    domain: int
    text_key: str = "text"
    tokenizer: TextTokenizer | None = None
    unit = "row"

    @property
    def size(self) -> int:
        """Number of rows."""
        return int(self.collection.num_rows[self.domain])

    @property
    def row_tokens(self) -> int | None:
        """Number of tokens of the first row; None: it is a row of text."""
        members = self.collection.read(self.domain, int(np.flatnonzero(self.collection.shard_rows(self.domain))[0]), 0)
        packed = members.members.get(PACKED_MEMBER)
        return None if packed is None else int(decode_npy(bytes(packed)).size)

    @property
    def identity(self) -> list[Any]:
        """The column, the tokenizer, the size of pieces, and digests of the shards."""
        tokenizer = None if self.tokenizer is None else [self.tokenizer.sha256, self.tokenizer.eos_id]
        return [
            self.text_key,
            tokenizer,
            PIECE_ROWS,
            *(int(content) for content in self.collection.shard_contents(self.domain)),
        ]

    @property
    def urls(self) -> list[str]:
        """The shards."""
        return [self.collection.display(self.domain, n) for n in range(len(self.collection.shard_rows(self.domain)))]

    def pieces(self) -> list[_RowPiece]:
        """See `DomainDocuments`."""
        return [_RowPiece(self, start, min(start + PIECE_ROWS, self.size)) for start in range(0, self.size, PIECE_ROWS)]

    def rows(self, positions: Iterable[int]) -> Iterator[Document]:
        """The rows at these positions of the domain.

        Raises:
            ShardError: A row has no text, or needs a tokenizer.
        """
        ends = np.cumsum(self.collection.shard_rows(self.domain))
        for position in positions:
            shard = int(np.searchsorted(ends, position, side="right"))
            row = int(position - (ends[shard - 1] if shard else 0))
            raw = self.collection.read(self.domain, shard, row)
            yield self._document(raw, f"row {raw.key} of {self.collection.display(self.domain, shard)}")

    def _document(self, raw: RawSample, place: str) -> Document:
        members = raw.members
        columns: dict[str, Any] = {}
        if "json" in members:
            found = _decoded(json.loads, members["json"], place, "json")
            columns = found if isinstance(found, dict) else {}
        for name in _TEXT_MEMBERS:
            if name in members:
                return Document(_decoded(bytes.decode, members[name], place, name), columns, place)
        if isinstance(columns.get(self.text_key), str):
            return Document(columns.pop(self.text_key), columns, place)
        if PACKED_MEMBER not in members:
            raise ShardError(
                f"{place} has no text: its members are {shown(sorted(members))}, and a topic needs a member txt, "
                f"{PACKED_MEMBER}, or json with the column {self.text_key!r} (--text-key)"
            )
        if self.tokenizer is None:
            raise ShardError(f"{place} holds tokens, not text: name their tokenizer (--tokenizer, tokenizer=)")
        tokens = _decoded(decode_npy, members[PACKED_MEMBER], place, PACKED_MEMBER).reshape(-1)
        if tokens.dtype.kind not in "iu" or not len(tokens):
            raise ShardError(f"{place} holds {len(tokens)} values of type {tokens.dtype}, not tokens: write it again")
        if tokens.min() < 0 or tokens.max() >= self.tokenizer.num_ids:
            raise ShardError(
                f"{place} holds tokens from {tokens.min()} to {tokens.max()}, but the tokenizer has "
                f"{self.tokenizer.num_ids}, so it is not that of the rows: name the one that packed them (--tokenizer)"
            )
        pieces = np.split(tokens, np.flatnonzero(tokens == self.tokenizer.eos_id) + 1)
        return Document(self.tokenizer.decode(max(pieces, key=len).tolist()), columns, place)


@dataclass(frozen=True)
class _RowPiece:
    documents: ShardDocuments
    start: int
    stop: int

    def read(self, advance: Advance, reject: Reject = refuse) -> Iterator[Document]:
        for document in self.documents.rows(range(self.start, self.stop)):
            advance(1)
            if document.text.strip():
                yield document


def _decoded(decode: Callable[[bytes], Any], member: Any, place: str, name: str) -> Any:
    try:
        return decode(bytes(member))
    except (ValueError, ShardError, RecursionError) as error:
        raise ShardError(f"the member {name} of {place} cannot be read ({error}): write the shard again") from error


@dataclass(frozen=True)
class JoinedDocuments:
    """The rows of several domains, as one domain."""

    parts: Sequence[ShardDocuments]

    @property
    def size(self) -> int:
        """Number of rows."""
        return sum(part.size for part in self.parts)

    def rows(self, positions: Sequence[int]) -> Iterator[Document]:
        """The rows at these positions, in ascending order."""
        start = 0
        for part in self.parts:
            yield from part.rows([p - start for p in positions if start <= p < start + part.size])
            start += part.size
