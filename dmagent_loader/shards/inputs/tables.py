"""Reads parquet, Arrow files, and data sets of the library datasets, in batches of rows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import IO, Any

from dmagent_loader._files import is_full
from dmagent_loader._tasks import Advance
from dmagent_loader.errors import ShardError, require_extra
from dmagent_loader.shards.inputs.kinds import DATASET_PREFIX, Input, Kind
from dmagent_loader.shards.inputs.options import ReadOptions
from dmagent_loader.shards.inputs.records import Record
from dmagent_loader.shards.inputs.text import check_columns, stored_file
from dmagent_loader.shards.sources.urls import display_url, local_path

_BATCH_ROWS, _BATCH_BYTES = 1024, 16 << 20
"""Most rows that are converted at once, and their bytes where these are known: a book can have megabytes."""
_ARROW_FILE, _FEATHER_1 = b"ARROW1", b"FEA1"
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_DEFAULT_SPLIT = "train"
_BUILDERS = ("json", "csv", "parquet", "arrow")
"""Builders of the library datasets whose rows are records; others make rows of whatever files there are."""


def read_table(source: Input, start: int, stop: int | None, options: ReadOptions, advance: Advance) -> Iterator[Record]:
    """Reads a parquet or Arrow file, or a data set.

    Args:
        source: The table.
        start, stop: Row groups of a parquet file, rows of a saved data set, shards of another one; 0 and None: all.
        options: Columns to read.
        advance: See `Advance`.

    Raises:
        ShardError: The table is damaged, or has no column with the text.
        MissingExtraError: The package is not installed.
    """
    readers = {
        Kind.PARQUET: _parquet_batches,
        Kind.ARROW: _arrow_batches,
        Kind.SAVED_DATASET: _saved_batches,
        Kind.DATASET: _dataset_batches,
    }
    name = display_url(source.url)
    reported = 0
    for first, bytes_done, batch in readers[source.kind](source, start, stop, options):
        columns = {column: _values(name, column, batch) for column in batch.schema.names}
        for number, values in enumerate(zip(*columns.values(), strict=True), start=first + 1):
            yield Record(f"{name}, row {number}", dict(zip(columns, values, strict=True)))
        advance(bytes_done - reported)
        reported = bytes_done


def _values(name: str, column: str, batch: Any) -> list[Any]:
    """The values of a column, in the types of Python, which know less than those of Arrow."""
    stored = batch.column(column)
    try:
        try:
            values: list[Any] = stored.to_pylist()
        except UnicodeDecodeError:
            values = [_value(scalar) for scalar in stored]
    except (ValueError, OverflowError, NotImplementedError) as error:
        raise ShardError(
            f"{name}: column {column!r} has a value that cannot be read ({type(error).__name__}: {error}): repair the "
            "column, or write the file without it"
        ) from error
    return values


def _value(scalar: Any) -> Any:
    """A value of a table; bytes if it is marked as text, but is not UTF-8."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        text = getattr(scalar, "value", scalar)  # of a dictionary
        if not hasattr(text, "as_buffer"):
            raise  # inside another column
        return text.as_buffer().to_pybytes()


_Batches = Iterator[tuple[int, int, Any]]
"""Number of the first row, counted from 0; stored bytes read up to its end; a batch or table of Arrow."""


def _parquet_batches(source: Input, start: int, stop: int | None, options: ReadOptions) -> _Batches:
    parquet = require_extra("pyarrow.parquet", "data")
    name = display_url(source.url)
    with stored_file(source.url) as stored:
        with _named_damage(name):
            file = parquet.ParquetFile(stored)
            available = file.schema_arrow.names
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        columns = _columns(source, available, options)
        chosen = range(start, len(groups) if stop is None else stop)
        first, done = sum(group.num_rows for group in groups[:start]), 0.0
        for number in chosen:
            rows = max(groups[number].num_rows, 1)
            per_row = _stored_bytes(groups[number]) / rows
            batch_rows = _batch_rows(rows, groups[number].total_byte_size)
            read = partial(file.iter_batches, batch_rows, row_groups=[number], columns=columns)
            for batch in _each(name, read):
                done += per_row * batch.num_rows
                yield first, int(done), batch
                first += batch.num_rows


def parquet_row_groups(source: Input) -> list[int]:
    """Stored bytes of each row group."""
    parquet = require_extra("pyarrow.parquet", "data")
    with stored_file(source.url) as stored, _named_damage(display_url(source.url)):
        metadata = parquet.ParquetFile(stored).metadata
        return [_stored_bytes(metadata.row_group(number)) for number in range(metadata.num_row_groups)]


def _batch_rows(rows: int, size: int) -> int:
    """Rows that are converted at once, of a table with so many rows and bytes."""
    return min(_BATCH_ROWS, max(1, _BATCH_BYTES * rows // max(size, 1)))


def _stored_bytes(group: Any) -> int:
    return sum(int(group.column(number).total_compressed_size) for number in range(group.num_columns))


def _arrow_batches(source: Input, start: int, stop: int | None, options: ReadOptions) -> _Batches:
    ipc = require_extra("pyarrow.ipc", "data")
    name = display_url(source.url)
    with stored_file(source.url) as stored:
        with _named_damage(name):
            head = stored.read(len(_ARROW_FILE))
        if head.startswith(_FEATHER_1):
            raise ShardError(
                f"{name} is of version 1 of Feather: write it again with version 2 (write_feather(version=2))"
            )
        is_file = head == _ARROW_FILE
        if not is_file:
            _check_end_of_stream(name, stored)
        with _named_damage(name):
            stored.seek(0)
            reader = ipc.open_file(stored) if is_file else ipc.open_stream(stored)
            available = reader.schema.names
        columns = _columns(source, available, options)
        first = 0
        for batch in _each(
            name, lambda: map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        ):
            yield first, stored.tell(), batch.select(columns)
            first += batch.num_rows


def _check_end_of_stream(name: str, stored: IO[bytes]) -> None:
    """Raises ShardError for a stream that was cut between two batches, which the library takes for a whole one."""
    with _named_damage(name):
        stored.seek(max(0, stored.seek(0, os.SEEK_END) - len(_END_OF_STREAM)))
        end = stored.read()
    if end != _END_OF_STREAM:
        raise ShardError(
            f"{name} is damaged (it does not end as an Arrow stream does): rows may be missing; fetch it again"
        )


def saved_rows(source: Input) -> int:
    """Rows of a saved data set."""
    return len(_saved(source))


def _saved_batches(source: Input, start: int, stop: int | None, options: ReadOptions) -> _Batches:
    table = _saved(source)
    columns = _columns(source, table.column_names, options)
    chosen = range(start, len(table) if stop is None else stop)
    first, batch_rows = start, _batch_rows(len(table), source.size)
    for batch in _each(
        display_url(source.url),
        lambda: table.select_columns(columns).select(chosen).with_format("arrow").iter(batch_rows),
    ):
        done = first + batch.num_rows
        yield first, source.size * (done - start) // len(table), batch
        first = done


def _saved(source: Input) -> Any:
    datasets = require_extra("datasets", "data")
    name = display_url(source.url)
    with _named_damage(name):
        loaded = datasets.load_from_disk(local_path(source.url))
    if isinstance(loaded, datasets.DatasetDict):
        if len(loaded) != 1:
            raise ShardError(f"{name} has the splits {sorted(loaded)}: give the folder of one, such as {name}/train")
        loaded = next(iter(loaded.values()))
    for file in loaded.cache_files:
        with stored_file(file["filename"]) as stored:
            _check_end_of_stream(file["filename"], stored)
    return loaded


def dataset_shards(source: Input) -> int:
    """Number of files, or the like, of a data set."""
    return int(_dataset(source, *_builder(source)).num_shards)


def version_of(source: Input) -> str:
    """A text that changes with the content of an input; data sets are looked up for it."""
    return str(_builder(source)[0].hash) if source.kind is Kind.DATASET else source.version


def _dataset_batches(source: Input, start: int, stop: int | None, options: ReadOptions) -> _Batches:
    builder, split = _builder(source)
    if builder.name not in (*_BUILDERS, *(("text",) if options.text_files else ())):
        raise ShardError(
            f"{source.url} would be read as {builder.name!r} by the library datasets, not as one of "
            f"{', '.join(_BUILDERS)}: convert it, or, for plain text of which each line is a document, pass "
            "--text-files .txt (text_files=)"
        )
    whole = _dataset(source, builder, split)
    columns = _columns(source, whole.column_names, options)
    for number in range(start, whole.num_shards if stop is None else stop):
        part = whole.shard(whole.num_shards, number) if whole.num_shards > 1 else whole
        first = 0
        for batch in _each(source.url, partial(part.select_columns(columns).with_format("arrow").iter, _BATCH_ROWS)):
            yield first, 0, batch
            first += batch.num_rows


def _dataset(source: Input, builder: Any, split: str) -> Any:
    name = source.url
    with _named_damage(name):
        splits = builder.as_streaming_dataset()
    if split not in splits:
        raise ShardError(f"{name} has no split {split!r}, but {sorted(splits)}: name one, {name}:SPLIT")
    dataset = splits[split]
    with _named_damage(name):
        return dataset if dataset.column_names is not None else dataset._resolve_features()


def _builder(source: Input) -> tuple[Any, str]:
    datasets = require_extra("datasets", "data")
    name, _, split = source.url.removeprefix(DATASET_PREFIX).partition(":")
    name, _, config = name.partition("@")
    with _named_damage(source.url):
        return datasets.load_dataset_builder(name, config or None), split or _DEFAULT_SPLIT


def _columns(source: Input, available: Iterable[str], options: ReadOptions) -> list[str]:
    names = list(available)
    check_columns(display_url(source.url), names, options)
    return options.columns(names)


def _each(name: str, read: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """Yields what a library reads; its errors name the input, those of the loop body pass."""
    with _named_damage(name):
        items = iter(read())
    while True:
        with _named_damage(name):
            item = next(items, None)
        if item is None:
            return
        yield item


@contextlib.contextmanager
def _named_damage(name: str) -> Iterator[None]:
    """Errors of the libraries as ShardError; those of Arrow are subclasses of ValueError, OSError and the like."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, LookupError, NotImplementedError) as error:
        if isinstance(error, OSError) and is_full(error):
            raise  # the disk with a library's cache is full; the input is whole
        raise ShardError(
            f"{name} cannot be read ({type(error).__name__}: {error}): check its name, or fetch or write it again"
        ) from error
