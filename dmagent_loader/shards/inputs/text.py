"""Reads JSON lines, JSON arrays, CSV and whole texts, compressed or not, by the standard library."""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

from dmagent_loader.errors import ShardError, require_extra
from dmagent_loader.shards.inputs.kinds import Input, Kind
from dmagent_loader.shards.inputs.options import ReadOptions
from dmagent_loader.shards.inputs.records import Advance, Record, Rejected, rejected
from dmagent_loader.shards.sources.remote import filesystem_of
from dmagent_loader.shards.sources.urls import display_url, is_local, local_path

_MAX_FIELD = (1 << 31) - 1
"""Longest field of a CSV file, in characters; the default of the library is 131,072."""


@contextlib.contextmanager
def stored_file(url: str) -> Iterator[IO[bytes]]:
    """Opens the stored bytes of an input.

    Raises:
        ShardError: It cannot be opened.
    """
    try:
        opened = _open(url)
    except OSError as error:
        raise ShardError(f"{display_url(url)} cannot be opened: {error}") from error
    with opened as file:
        yield file


def _open(url: str) -> IO[bytes]:
    if is_local(url):
        return open(local_path(url), "rb")
    filesystem, path = filesystem_of(url)
    return cast("IO[bytes]", filesystem.open(path, "rb"))


def read_text(
    source: Input, start: int, stop: int | None, options: ReadOptions, advance: Advance
) -> Iterator[Record | Rejected]:
    """Reads the records of a JSON, CSV or text file.

    Args:
        source: The file.
        start, stop: Bytes at which the lines of an uncompressed file of JSON lines begin; 0 and None: the whole file.
        options: Column with the text.
        advance: See `Advance`.

    Raises:
        ShardError: The file is damaged, or has no column with the text.
    """
    name = display_url(source.url)
    try:
        with stored_file(source.url) as stored, _unpacked(stored, source.compression) as file:
            if start:
                stored.seek(start)
            if source.kind is Kind.TEXT:
                records = _whole(name, file)
            elif source.kind is Kind.CSV:
                records = _csv(name, file, "\t" if ".tsv" in source.name else ",", options)
            elif _begins_array(file) and not start:
                records = _json_array(name, file)
            else:
                records = _json_lines(name, file, start, stop)
            reported = start
            for record in records:
                yield record
                position = stored.tell()
                advance(position - reported)
                reported = position
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, OSError) as error:
        raise ShardError(
            f"{name} is damaged or cannot be read to its end ({error}): what follows would be lost; fetch it again"
        ) from error


def _unpacked(stored: IO[bytes], compression: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    if compression == ".gz":
        return cast("IO[bytes]", gzip.GzipFile(fileobj=stored))
    if compression == ".bz2":
        return cast("IO[bytes]", bz2.BZ2File(stored))
    if compression == ".xz":
        return cast("IO[bytes]", lzma.LZMAFile(stored))
    if compression == ".zst":
        pyarrow = require_extra("pyarrow", "data")  # unlike the package zstandard, it refuses a file that was cut
        return io.BufferedReader(pyarrow.CompressedInputStream(stored, "zstd"), 1 << 20)
    return contextlib.nullcontext(
        stored if hasattr(stored, "peek") else io.BufferedReader(cast("Any", stored), 1 << 20)
    )


def _begins_array(file: IO[bytes]) -> bool:
    return cast("io.BufferedReader", file).peek(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["


def _json_lines(name: str, file: IO[bytes], start: int, stop: int | None) -> Iterator[Record | Rejected]:
    position = start
    for number, line in enumerate(file, start=1):
        place = f"{name}, line {number}" if not start else f"{name}, byte {position}"
        position += len(line)
        if line.strip():
            yield _json_line(place, line)
        if stop is not None and position >= stop:
            break


def _json_line(place: str, line: bytes) -> Record | Rejected:
    text = _utf8(place, line)
    if isinstance(text, Rejected):
        return text
    try:
        return Record(place, json.loads(text))
    except (ValueError, RecursionError) as error:  # integers of thousands of digits, brackets in brackets
        return rejected(place, f"is not JSON ({error}): repair or remove the line; each line has to be an object", text)


def _json_array(name: str, file: IO[bytes]) -> Iterator[Record | Rejected]:
    text = _utf8(name, file.read())
    if isinstance(text, Rejected):
        yield text
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ShardError(
            f"{name} begins as a JSON array, but is not one ({error}): repair it, or write an object in each line"
        ) from error
    yield from (Record(f"{name}, item {number}", row) for number, row in enumerate(rows, start=1))


def _csv(name: str, file: IO[bytes], delimiter: str, options: ReadOptions) -> Iterator[Record | Rejected]:
    csv.field_size_limit(_MAX_FIELD)
    # Bytes that are not UTF-8 become halves of surrogate pairs, with which only the document that has them is refused.
    lines = io.TextIOWrapper(cast("Any", file), encoding="utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    columns: list[str] = []
    while True:
        first = rows.line_num + 1
        place = f"{name}, line {first}"
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise ShardError(
                    f"{place} opens a quote that is not closed before the end of the file, so the rest would be one "
                    "field: repair the file"
                ) from error
            yield rejected(place, f"is not CSV ({error}): repair or remove the line", "")
            continue
        if not row:
            continue
        if not columns:
            columns = row
            check_columns(name, columns, options)
        elif len(row) != len(columns):
            yield rejected(place, f"has {len(row)} fields, but the header has {len(columns)}: repair or remove it", row)
        else:
            yield Record(place, dict(zip(columns, row, strict=True)))
    lines.detach()


def _whole(name: str, file: IO[bytes]) -> Iterator[Record | Rejected]:
    text = _utf8(name, file.read())
    yield text if isinstance(text, Rejected) else Record(name, text)


def check_columns(name: str, columns: list[str], options: ReadOptions) -> None:
    """Raises ShardError if a table has no column with the document."""
    if options.document_key not in columns:
        raise ShardError(missing_column(name, sorted(columns), options))


def missing_column(place: str, columns: object, options: ReadOptions) -> str:
    """The message for records without the column of the document."""
    fault = f"{place} has no text in column {options.document_key!r}; it has {columns}"
    if options.chat_template is not None:
        return f"{fault}: name the column with the messages (--messages-key, messages_key=)"
    if isinstance(columns, list) and options.messages_key in columns:
        return f"{fault}: for conversations, pass a chat template (--chat-template, chat_template=)"
    return f"{fault}: name the text column (--text-key, text_key=)"


def _utf8(place: str, data: bytes) -> str | Rejected:
    try:
        return data.decode("utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        fault = f"is not UTF-8 ({error}): convert it (iconv does); if it is compressed or binary, name it as what it is"
        return rejected(place, fault, data[:200])
