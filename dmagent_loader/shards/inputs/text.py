"""Reads JSON lines, JSON arrays, CSV and whole texts, compressed or not, by the standard library."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any, cast

from dmagent_loader._tasks import Advance
from dmagent_loader.errors import ShardError
from dmagent_loader.shards.inputs.compression import UNPACKING_ERRORS, damage_of, unpacked
from dmagent_loader.shards.inputs.kinds import Input, Kind
from dmagent_loader.shards.inputs.options import ReadOptions
from dmagent_loader.shards.inputs.records import Record, Rejected, Repeating, json_object, rejected
from dmagent_loader.shards.sources.calls import timeout_seconds
from dmagent_loader.shards.sources.remote import filesystem_of, with_retries
from dmagent_loader.shards.sources.urls import display_url, is_local, local_path

_MAX_FIELD = (1 << 31) - 1
"""Longest field of a CSV file, in characters; the default of the library is 131,072."""
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""What the error handler surrogateescape makes of bytes that are not UTF-8."""


_JSON = json.JSONDecoder(object_pairs_hook=json_object)


@contextlib.contextmanager
def stored_file(url: str) -> Iterator[IO[bytes]]:
    """Opens the stored bytes of an input.

    Raises:
        ShardError: It cannot be opened.
    """
    try:
        opened = _open(url)
    except ShardError:
        raise  # a ShardNotFoundError is an OSError, too
    except OSError as error:
        raise ShardError(f"{display_url(url)} cannot be opened: {error}") from error
    with opened as file:
        yield file


def _open(url: str) -> IO[bytes]:
    if is_local(url):
        return open(local_path(url), "rb")
    filesystem, path = filesystem_of(url)
    opened = with_retries(url, timeout_seconds(), lambda: filesystem.open(path, "rb"))
    return cast("IO[bytes]", opened)


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
    reported = start
    for record, position in _positioned(source, start, stop, options):
        yield record
        advance(position - reported)
        reported = position


def _positioned(
    source: Input, start: int, stop: int | None, options: ReadOptions
) -> Iterator[tuple[Record | Rejected, int]]:
    """Records, each with the number of stored bytes up to its end."""
    name = display_url(source.url)
    try:
        with stored_file(source.url) as stored, unpacked(name, stored, source.compression, start) as file:
            if source.kind is Kind.TEXT:
                records = _whole(name, file)
            elif source.kind is Kind.CSV:
                is_tsv = source.name.removesuffix(source.compression).endswith(".tsv")
                records = _csv(name, file, options, is_tsv=is_tsv)
            elif not start and begins_array(cast("io.BufferedReader", file).peek(64)):
                records = _json_array(name, file)
            else:
                records = _json_lines(name, file, start, stop)
            for record in records:
                yield record, stored.tell()
    except UNPACKING_ERRORS as error:
        raise ShardError(damage_of(name, error)) from error


def begins_array(head: bytes) -> bool:
    """Whether a JSON file with this beginning is one array, not lines."""
    return head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["


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
        return _object(place, _JSON.decode(text))
    except (ValueError, RecursionError) as error:  # integers of thousands of digits, brackets in brackets
        if text.strip() == "{":
            fault = "is not JSON but the beginning of an object of several lines: write each in one line (jq -c . does)"
            return rejected(place, fault, text)
        if "\0" in text:
            fault = (
                "contains zero bytes, as UTF-16 does (iconv converts it), or a file that was cut by a crash (fetch or "
                "write it again)"
            )
            return rejected(place, fault, text)
        return rejected(place, f"is not JSON ({error}): repair or remove the line; each line has to be an object", text)


def _json_array(name: str, file: IO[bytes]) -> Iterator[Record | Rejected]:
    text = _utf8(name, file.read())
    if isinstance(text, Rejected):
        yield text
        return
    try:
        rows = _JSON.decode(text)
    except (ValueError, RecursionError) as error:
        raise ShardError(
            f"{name} begins as a JSON array, but is not one ({error}): repair it, or write an object in each line"
        ) from error
    yield from (_object(f"{name}, item {number}", row) for number, row in enumerate(rows, start=1))


def _object(place: str, value: Any) -> Record | Rejected:
    if isinstance(value, Repeating):
        return rejected(place, "names a column more than once, so only the last would be read: rename it", value)
    if isinstance(value, dict):
        return Record(place, value)
    fault = (
        f"has no text, because it is not an object but a {type(value).__name__}: write an object, with the text in a "
        "column (--text-key, text_key=)"
    )
    return rejected(place, fault, value)


def _csv(name: str, file: IO[bytes], options: ReadOptions, *, is_tsv: bool) -> Iterator[Record | Rejected]:
    csv.field_size_limit(_MAX_FIELD)
    # Bytes that are not UTF-8 become halves of surrogate pairs, with which only the row that has them is refused.
    lines = io.TextIOWrapper(cast("Any", file), encoding="utf-8-sig", errors="surrogateescape", newline="")
    rows = (
        csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
        if is_tsv
        else csv.reader(lines, strict=True)
    )
    columns: list[str] = []
    while True:
        place = f"{name}, line {rows.line_num + 1}"
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            fault = (
                "opens a quote that is not closed before the end of the file, so the rest would be one field"
                if "unexpected end" in str(error)
                else f"is not CSV ({error}), so it is not known where the next row begins"
            )
            raise ShardError(f"{place} {fault}: repair the file") from error
        if not row:
            continue
        if not columns:
            columns = row
            _check_header(name, columns, options)
        elif _NOT_UTF8.search("".join(row)):
            yield rejected(place, "is not UTF-8: convert it (iconv does)", row)
        elif len(row) != len(columns):
            yield rejected(place, f"has {len(row)} fields, but the header has {len(columns)}: repair or remove it", row)
        else:
            yield Record(place, dict(zip(columns, row, strict=True)))
    lines.detach()


def _check_header(name: str, columns: list[str], options: ReadOptions) -> None:
    """Raises ShardError if the first line of a CSV file cannot be its header."""
    line = "".join(columns)
    if _NOT_UTF8.search(line) or "\0" in line:
        raise ShardError(f"the header of {name} is not UTF-8: convert the file (iconv does)")
    if len(columns) == 1 and options.document_key not in columns:
        for delimiter, meaning in ((";", "write it with commas"), ("\t", "rename it to .tsv")):
            if options.document_key in columns[0].split(delimiter):
                raise ShardError(f"the fields of {name} are separated by {delimiter!r}, not by commas: {meaning}")
    check_columns(name, columns, options)


def _whole(name: str, file: IO[bytes]) -> Iterator[Record | Rejected]:
    text = _utf8(name, file.read())
    yield text if isinstance(text, Rejected) else Record(name, text)


def check_columns(name: str, columns: list[str], options: ReadOptions) -> None:
    """Raises ShardError if a table has no column with the document, or several columns of one name."""
    if options.document_key not in columns:
        raise ShardError(missing_column(name, sorted(columns), options))
    repeated = sorted({column for column in columns if columns.count(column) > 1})
    if repeated:
        raise ShardError(f"{name} names {repeated} more than once, so only the last would be read: rename")


def missing_column(place: str, columns: object, options: ReadOptions) -> str:
    """The message for records without the column of the document."""
    fault = f"{place} has no text in column {options.document_key!r}; it has {columns}"
    if options.chat_template is not None:
        return f"{fault}: name the column with the messages (--messages-key, messages_key=)"
    if isinstance(columns, list) and options.messages_key in columns:
        return f"{fault}: for conversations, pass a chat template (--chat-template, chat_template=)"
    if "." in options.document_key:
        return f"{fault}: columns inside of columns are not read, so write the text to a column of its own first"
    return f"{fault}: name the text column (--text-key, text_key=)"


def _utf8(place: str, data: bytes) -> str | Rejected:
    try:
        return data.decode("utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        fault = f"is not UTF-8 ({error}): convert it (iconv does); if it is compressed or binary, name it as what it is"
        return rejected(place, fault, data[:200])
