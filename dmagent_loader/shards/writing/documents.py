"""Documents from text and JSON-lines files, one at a time."""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from dmagent_loader._validation import shown
from dmagent_loader.errors import ShardError, ShardNotFoundError

JSON_LINES = tuple(
    f"{suffix}{packed}" for suffix in (".jsonl", ".ndjson", ".jsonlines", ".json") for packed in ("", ".gz")
)
"""Suffixes of files with a JSON object in each line; C4 and Dolma call theirs ``.json.gz``."""


@dataclass(frozen=True)
class Document:
    """A text and the columns that are kept with it.

    Attributes:
        text: Text of the document, which can be encoded as UTF-8.
        columns: Column name -> value, as in the JSON line.
        origin: File and line, for error messages.
    """

    text: str
    columns: dict[str, Any]
    origin: str


@dataclass
class DocumentReader:
    """Reads the documents of one domain. A document is a JSON line or a text file; ``.gz`` is unpacked.

    Args:
        files: Files to read, in order.
        text_key: Column of a JSON line that holds the text.
        keep_columns: Columns to keep with the text; None: all.
        advance: Called with the number of stored bytes read since the last call.

    Attributes:
        num_documents: Documents with text, so far.
        num_empty: Documents without text, which are left out, so far.
    """

    files: Sequence[Path]
    text_key: str
    keep_columns: Sequence[str] | None
    advance: Callable[[int], object]
    num_documents: int = field(default=0, init=False)
    num_empty: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[Document]:
        missing = set(self.keep_columns or ())
        for path in self.files:
            for document in self._read(path):
                if not document.text.strip():
                    self.num_empty += 1
                    continue
                self.num_documents += 1
                missing.difference_update(document.columns)
                yield document
        if missing and self.num_documents:
            raise ShardError(
                f"no document of {self.files[0]} ... has the column(s) {sorted(missing)} that are to be kept: correct "
                "keep_columns"
            )

    def _read(self, path: Path) -> Iterator[Document]:
        try:
            with open(path, "rb") as stored:
                unpacked = cast("IO[bytes]", gzip.GzipFile(fileobj=stored)) if path.name.endswith(".gz") else stored
                documents = self._lines(path, unpacked) if is_json_lines(path) else self._whole(path, unpacked)
                reported = 0
                for document in documents:
                    position = stored.tell()
                    self.advance(position - reported)
                    reported = position
                    yield document
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ShardError(f"{path} is damaged ({error}): what follows would be lost; fetch it again") from error

    def _whole(self, path: Path, file: IO[bytes]) -> Iterator[Document]:
        yield Document(_utf8(file.read(), str(path)), {}, str(path))

    def _lines(self, path: Path, file: IO[bytes]) -> Iterator[Document]:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(_utf8(line, place))
            except (ValueError, RecursionError) as error:  # integers of thousands of digits, brackets in brackets
                raise ShardError(
                    f"{place} is not JSON ({error}): repair or remove the line; in files named *.json, too, "
                    "each line has to be an object"
                ) from error
            if not isinstance(row, dict) or not isinstance(row.get(self.text_key), str):
                found = sorted(row) if isinstance(row, dict) else type(row).__name__
                if isinstance(row, dict) and self.text_key in row:
                    raise ShardError(
                        f"{place} has no text in column {self.text_key!r}, but {shown(row[self.text_key])}: repair or "
                        "remove the line"
                    )
                raise ShardError(
                    f"{place} has no text in column {self.text_key!r}; it has {found}: name the text column "
                    "(--text-key, text_key=), or give a file that is a text itself another ending"
                )
            text = row[self.text_key]
            if b"\\u" in line:  # the only way for half of a surrogate pair to get into valid UTF-8
                encoded(text, f"column {self.text_key!r} in {place}")
            kept = (name for name in row if name != self.text_key) if self.keep_columns is None else self.keep_columns
            yield Document(text, {name: row[name] for name in kept if name in row}, place)


def encoded(text: str, place: str) -> bytes:
    """Text as UTF-8.

    Raises:
        ShardError: The text contains half of a surrogate pair.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ShardError(
            f"{place} contains half of a surrogate pair ({error}), which is not text and could not be read again: "
            "repair or remove the line"
        ) from error


def is_json_lines(path: Path) -> bool:
    """Whether a file holds a JSON object per line, by its name."""
    return path.name.lower().endswith(JSON_LINES)


def domain_name(path: Path) -> str:
    """The name of the domain of a file: ``Science.jsonl.gz`` -> ``Science``."""
    return path.name.split(".")[0]


def find_files(domain: str, paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Lists the files of a domain.

    Args:
        domain: Name of the domain, for messages.
        paths: Files, globs or folders; a folder stands for all files in it that are not hidden, sorted.

    Raises:
        ShardNotFoundError: A path matches no file.
    """
    files: list[Path] = []
    for path in (os.fspath(given) for given in paths):
        if os.path.isdir(path):
            inside = Path(path)
            found = [p for p in sorted(inside.rglob("*")) if p.is_file() and not _hidden(p.relative_to(inside))]
        elif os.path.isfile(path):
            found = [Path(path)]
        else:
            found = [Path(match) for match in sorted(glob.glob(path, recursive=True)) if os.path.isfile(match)]
        if not found:
            raise ShardNotFoundError(
                f"domain {domain!r}: no file at {path!r}, seen from {os.getcwd()!r}; check the path"
            )
        files.extend(found)
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _utf8(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        raise ShardError(
            f"{place} is not UTF-8 ({error}): text has to be converted (iconv does), other formats "
            "and compressions (parquet, xz, zstd) to JSON lines or .gz"
        ) from error
