"""First half of a job: the documents of a piece, tokenised if need be, into chunks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmagent_loader._tasks import Advance
from dmagent_loader.errors import ShardError
from dmagent_loader.shards.inputs.documents import Document, Documents
from dmagent_loader.shards.inputs.pieces import Piece
from dmagent_loader.shards.inputs.records import Record, Rejected, json_value, rejected
from dmagent_loader.shards.writing.chunks import Counts, keys_of, read_counts, write_chunk
from dmagent_loader.shards.writing.config import ShardingConfig
from dmagent_loader.shards.writing.packing import BATCH_CHARACTERS, DocumentTokenizer, TextTokenizer
from dmagent_loader.shards.writing.tar_writer import member_bytes

CHUNK_BYTES = 64 << 20
"""Bytes of tokens or text after which a chunk is written: the most that a killed process does again."""


@dataclass(frozen=True, kw_only=True)
class Collection:
    """A task: the piece of a domain, into chunks.

    Attributes:
        domain: Name of the domain.
        number: Number of the piece in its domain.
        piece: The piece.
        folder: Folder of the chunks of the domain.
        config: Settings.
        chunk_bytes: See `CHUNK_BYTES`.
    """

    domain: str
    number: int
    piece: Piece
    folder: Path
    config: ShardingConfig
    chunk_bytes: int

    def chunks(self) -> list[Path]:
        """Chunks of the piece that are written, in order."""
        # One by one: to list the folder for each of its pieces takes hours with 100,000 of them.
        return list(itertools.takewhile(Path.exists, map(self.chunk_path, itertools.count())))

    def chunk_path(self, number: int) -> Path:
        """Path of a chunk of the piece."""
        return self.folder / f"{self.number:06d}-{number:06d}.safetensors"

    def run(self, tokenizer: TextTokenizer | None, advance: Advance) -> Counts:
        """Reads the piece, from where an earlier call was killed.

        Args:
            tokenizer: Tokenizer of packed rows; None: raw text.
            advance: See `Advance`.

        Returns:
            The counts of the whole piece.

        Raises:
            ShardError: An input is damaged, or more records are bad than the settings allow.
        """
        written = self.chunks()
        counts, is_done = read_counts(written[-1]) if written else (Counts(), False)
        if is_done:
            return counts
        chunk = _Chunk(self, tokenizer, counts, len(written))
        for record in islice(self.piece.read(self.config.reading, advance), counts.records, None):
            chunk.add(record)
        chunk.finish()
        return chunk.counts


class _Chunk:
    """The documents that are not written yet."""

    def __init__(self, task: Collection, tokenizer: TextTokenizer | None, counts: Counts, number: int) -> None:
        self.counts = counts
        self._task, self._number = task, number
        self._make = Documents(task.config.reading).make
        self._tokenizer = DocumentTokenizer(tokenizer) if tokenizer is not None else None
        self._waiting: list[tuple[int, Document]] = []
        self._waiting_characters = 0
        self._start()

    def _start(self) -> None:
        self._records: list[int] = []
        self._parts: tuple[list[NDArray[Any]], ...] = ([], []) if self._task.config.keep_columns else ([],)
        self._rejects: list[str] = []
        self._bytes = 0

    def add(self, record: Record | Rejected) -> None:
        """Adds the document of a record; documents are tokenised together."""
        number = self.counts.records
        self.counts.records += 1
        document = self._make(record)
        if isinstance(document, Rejected):
            self._reject(document)
        elif document.is_empty:
            self.counts.empty += 1
        else:
            self._waiting.append((number, document))
            self._waiting_characters += len(document.text) if document.tokens is None else len(document.tokens)
            if self._waiting_characters >= BATCH_CHARACTERS:
                self._convert()
                if self._bytes >= self._task.chunk_bytes:
                    self._write(is_last=False)

    def finish(self) -> None:
        """Writes the last chunk, which may be empty."""
        self._convert()
        self._write(is_last=True)

    def _convert(self) -> None:
        """Converts the waiting documents to what their rows hold."""
        documents = [document for _, document in self._waiting]
        converted = self._tokenised(documents) if self._tokenizer is not None else map(self._stored, documents)
        for (number, document), parts in zip(self._waiting, converted, strict=True):
            if isinstance(parts, Rejected):
                self._reject(parts)
                continue
            self._records.append(number)
            for arrays, part in zip(self._parts, parts, strict=True):
                arrays.append(part)
            self._count(document, parts)
        self._waiting, self._waiting_characters = [], 0

    def _tokenised(self, documents: list[Document]) -> Iterable[tuple[NDArray[Any], ...] | Rejected]:
        assert self._tokenizer is not None
        for tokens in self._tokenizer.tokens(documents):
            yield tokens if isinstance(tokens, Rejected) else (tokens,)

    def _stored(self, document: Document) -> tuple[NDArray[Any], ...] | Rejected:
        if document.tokens is not None:
            raise ShardError(
                f"{document.origin} is tokens, not text: pass the tokenizer that made them and a length "
                "(--tokenizer, --sequence-length)"
            )
        text = np.frombuffer(document.text.encode(), np.uint8)
        if not self._task.config.keep_columns:
            return (text,)
        place = f"a column to keep in {document.origin}"
        try:
            columns = json.dumps(document.columns, ensure_ascii=False, default=json_value).encode()
        except UnicodeEncodeError as error:
            fault = f"contains half of a surrogate pair ({error}), which is not text: repair or remove the line"
            return Rejected(document.origin, f"{place} {fault}", "")
        except (TypeError, ValueError) as error:
            return rejected(place, f"cannot be written as JSON ({error}): keep others", document.columns)
        return text, np.frombuffer(columns, np.uint8)

    def _count(self, document: Document, parts: tuple[NDArray[Any], ...]) -> None:
        counts = self.counts
        counts.documents += 1
        counts.elements += sum(map(len, parts))
        counts.tar_bytes += sum(member_bytes(part.nbytes) for part in parts)
        if self._tokenizer is not None:
            counts.special += self._tokenizer.spells_special_token(document.text)
        if not document.columns.keys() <= set(counts.columns):
            counts.columns = sorted({*counts.columns, *document.columns})
        self._bytes += sum(part.nbytes for part in parts)

    def _reject(self, found: Rejected) -> None:
        self.counts.bad += 1
        self.counts.last_reason = found.reason
        check_bad(self._task.domain, self.counts.bad, found.reason, self._task.config.max_bad)
        self._rejects.append(rejects_line(found))

    def _write(self, *, is_last: bool) -> None:
        keys = keys_of(self._records, self._task.number, self._task.config.shuffle_seed)
        lines = "".join(self._rejects).encode()
        write_chunk(self._task.chunk_path(self._number), keys, self._parts, lines, self.counts, is_last=is_last)
        self._number += 1
        self._start()


def rejects_line(found: Rejected) -> str:
    """The line of a record in the rejects file."""
    return json.dumps(found._asdict()) + "\n"  # escapes, because an excerpt may not be text


def check_bad(domain: str, bad: int, last_reason: str, most: int) -> None:
    """Raises ShardError if more records of a domain are bad than allowed.

    Args:
        domain: Name of the domain.
        bad: Number of its records that are no documents.
        last_reason: Reason of one of them.
        most: The largest number that is allowed.
    """
    if bad <= most:
        return
    if most == 0:
        raise ShardError(f"{last_reason}; to leave out up to N such records, pass --max-bad N (max_bad=)")
    raise ShardError(
        f"domain {domain!r} has more than {most} records that are no documents, the last: {last_reason}; "
        "correct the settings or the data, or allow more (--max-bad, max_bad=)"
    )
