"""Rows that hold one npy array of the same shape each, read into one array: no object is made for a single row."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, repeat
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dmagent_loader._compiled import compiled_loops
from dmagent_loader.errors import DecodeError, ShardError
from dmagent_loader.shards.decode import decode_npy
from dmagent_loader.shards.sources.blocks import BLOCK_BITS
from dmagent_loader.shards.sources.checksum import crc32
from dmagent_loader.shards.sources.local import Readable
from dmagent_loader.shards.table import RowTable

COMPILED = compiled_loops("dmagent_loader.shards._reading")
_NOT_AN_ARRAY = -1
"""Size of a row that has another member than the one to be read, or several, or whose shard cannot be used."""
_NOWHERE = (_NOT_AN_ARRAY,) * 5
_READ_TOGETHER = 64
"""Rows that are read in one call: as many files are open for it, beside those in the cache."""
_MOST_FREE = 4
"""Free buffers that are kept: whoever holds many batches at a time gives the others back to the system."""


class RowSpans(NamedTuple):
    """Positions of the n rows of a batch, in plain integers: single numbers of an array cost more to read.

    Attributes:
        place: What is to be read: the number of the shard in the catalogue or, if there are remote shards, the key of
            the block.
        offset, size: Bytes of the member in that place; size -1 if the row has to be read by itself.
        crc: crc32 of the row.
        key_begin, key_end: The row's key in the keys of its shard.
    """

    place: list[int]
    offset: list[int]
    size: list[int]
    crc: list[int]
    key_begin: list[int]
    key_end: list[int]

    @classmethod
    def of(cls, positions: NDArray[np.int64]) -> RowSpans:
        """From columns, (6, n), as `ArrayRows.find` returns them."""
        return cls(*positions.tolist())


@dataclass(frozen=True)
class _Format:
    """The npy header of rows of one size, and the array behind it."""

    header: bytes
    dtype: np.dtype[Any]
    length: int

    @cached_property
    def checksum(self) -> int:
        """crc32 of the header, with which that of a row begins."""
        return crc32(self.header)


class Buffers:
    """Memory for batches of rows, which is used again once nothing refers to the arrays that were read into it."""

    def __init__(self) -> None:
        self._free: list[_Buffer] = []

    def take(self, count: int, form: _Format) -> _Buffer:
        """Memory for `count` rows."""
        with contextlib.suppress(IndexError):  # another thread may take the last one
            while (buffer := self._free.pop()).count != count or buffer.form != form:
                pass
            return buffer
        return _Buffer(count, form)

    def lend(self, buffer: _Buffer) -> np.ndarray[Any, Any]:
        """The rows of a buffer, (n, T). The buffer is free when the last array or tensor over this memory is gone."""
        # Arrays made of this one refer to it, and not to the buffer, because its own memory is no array.
        lent = np.frombuffer(buffer.memory, buffer.form.dtype)
        buffer.lent = weakref.ref(lent, lambda _, free=self._free: _give_back(free, buffer))  # type: ignore[misc]
        return lent.reshape(buffer.count, -1)


def _give_back(free: list[_Buffer], buffer: _Buffer) -> None:
    if len(free) < _MOST_FREE:
        free.append(buffer)


class _Buffer:
    """Memory for n rows of one format: their headers, and their arrays side by side.

    Args:
        count: n.
        form: Format of the rows.
    """

    def __init__(self, count: int, form: _Format) -> None:
        self.count, self.form = count, form
        header, size = len(form.header), form.length * form.dtype.itemsize
        self.headers, self.memory = bytearray(count * header), memoryview(bytearray(count * size))
        self.expected_headers = count * form.header
        self.arrays = [self.memory[begin : begin + size] for begin in range(0, count * size, size)]
        """Bytes of each array."""
        of_headers = memoryview(self.headers)
        headers = [of_headers[begin : begin + header] for begin in range(0, count * header, header)]
        self.rows = list(zip(headers, self.arrays, strict=True))
        self.lent: weakref.ref[Any] | None = None

    def part(self, rows: slice) -> tuple[memoryview, memoryview]:
        """The headers of some rows that follow each other, and their arrays."""
        header, size = len(self.headers) // self.count, len(self.memory) // self.count
        return (
            memoryview(self.headers)[rows.start * header : rows.stop * header],
            self.memory[rows.start * size : rows.stop * size],
        )


def _gather(
    tables: list[tuple[np.ndarray[Any, Any], ...] | None],
    ends: NDArray[np.int64],
    rows: NDArray[np.int64],
    found: NDArray[np.int64],
) -> None:
    """Looks up n rows in the columns of T tables.

    Args:
        tables: C columns each; None: its rows are skipped.
        ends: (T,) end of the rows of each table among all.
        rows: (n,) rows, table by table.
        found: (C, n), to be filled.
    """
    if COMPILED is not None:
        COMPILED.gather(tables, ends, rows, found)
        return
    begin = 0
    for columns, end in zip(tables, ends.tolist(), strict=True):
        if columns is not None:
            chosen = rows[begin:end]
            for column, values in zip(columns, found, strict=True):
                values[begin:end] = column[chosen]
        begin = end


def _read_rows(sources: Iterable[Readable | None], offsets: list[int], buffer: _Buffer, size: int) -> bool:
    """Reads rows of one size into a buffer; False: a row cannot be had, or ends early.

    Raises:
        OSError: A row cannot be read.
        ShardError: A shard cannot be opened.
    """
    if COMPILED is None:
        return _read_each(sources, offsets, buffer.rows, size)
    remaining, count = iter(sources), len(offsets)
    for begin in range(0, count, _READ_TOGETHER):
        rows = slice(begin, min(begin + _READ_TOGETHER, count))
        # The list keeps the files open until they are read, and nothing keeps the list.
        if not _read_together(list(islice(remaining, rows.stop - begin)), offsets[rows], buffer, rows, size):
            return False
    return True


def _read_together(sources: list[Readable | None], offsets: list[int], buffer: _Buffer, rows: slice, size: int) -> bool:
    """`_read_rows` for some rows of the buffer, in one call if all of them lie in files."""
    assert COMPILED is not None
    descriptors = [-1 if source is None else source.descriptor for source in sources]
    if min(descriptors) < 0:
        return _read_each(sources, offsets, buffer.rows[rows], size)
    is_whole: bool = COMPILED.read_rows(descriptors, offsets, *buffer.part(rows))
    return is_whole


def _read_each(
    sources: Iterable[Readable | None], offsets: list[int], rows: list[tuple[memoryview, memoryview]], size: int
) -> bool:
    """`_read_rows`, one row after the other."""
    for source, offset, row in zip(sources, offsets, rows, strict=True):
        if source is None or source.read_into(row, offset) != size:
            return False
    return True


class ArrayRows:
    """Reads rows whose only member is a one-dimensional npy array, many at a time.

    Args:
        extension: Extension of the member.
        first_shard: (D,) number in the catalogue of the first shard of each domain.
        table: Function from the number of a shard to its table.
        sources: Function from the places of rows, see `RowSpans`, to what is read; None: it cannot be had.
        is_remote: (S,) which shards of the catalogue are read in blocks; None: none.
    """

    def __init__(
        self,
        extension: str,
        first_shard: NDArray[np.int64],
        table: Callable[[int], RowTable],
        sources: Callable[[list[int]], Iterable[Readable | None]],
        is_remote: NDArray[np.bool_] | None = None,
    ) -> None:
        self._extension, self._first_shard, self._table, self._sources = extension, first_shard, table, sources
        self._first_shards: list[int] = first_shard.tolist()
        self._is_remote = is_remote
        self._block_bits = 0 if is_remote is None else BLOCK_BITS
        """Bits of a place behind the number of the shard."""
        self._formats: dict[int, _Format] = {}
        """By size of the row; as most rows of a size have the same header, only the last one is kept."""

    def find(self, domain: NDArray[np.int64], shard: NDArray[np.int64], row: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of n rows; each table is looked up once.

        Args:
            domain: (n,) domain numbers.
            shard: (n,) shards within the domain.
            row: (n,) rows within the shard.

        Returns:
            (6, n), for `RowSpans.of`.
        """
        number = self._first_shard[domain] + shard
        place = number << self._block_bits
        # Sorting numbers of shard and place is several times as fast as argsort.
        both = number << 32 | np.arange(len(number))
        both.sort()
        gathered = both & 0xFFFFFFFF
        ends = np.flatnonzero(np.diff(number[gathered], append=-1)) + 1
        numbers = number[gathered[ends - 1]].tolist()
        tables = [self._table_with_arrays(one) for one in numbers]
        sorted_row, found = row[gathered], np.full((5, len(number)), _NOT_AN_ARRAY)
        _gather([None if table is None else table.arrays for table in tables], ends, sorted_row, found)
        if self._is_remote is not None:
            begin = 0
            for one, table, end in zip(numbers, tables, ends.tolist(), strict=True):
                if table is not None and self._is_remote[one]:
                    block, start = table.blocks.of_rows(sorted_row[begin:end])
                    found[0, begin:end] -= start
                    place[gathered[begin:end]] += block
                begin = end
        columns = np.empty((6, len(number)), np.int64)
        columns[0], columns[1:, gathered] = place, found
        return columns

    def find_few(self, domain: Sequence[int], shard: Sequence[int], row: Sequence[int]) -> RowSpans:
        """As `find`, for the rows of one batch: they lie in nearly as many shards, so each table is looked up anew."""
        places, found = [], []
        for of_domain, of_shard, one in zip(domain, shard, row, strict=True):
            number = self._first_shards[of_domain] + of_shard
            table, place, start = self._table_with_arrays(number), number << self._block_bits, 0
            if table is not None and self._is_remote is not None and self._is_remote[number]:
                block = table.blocks.of_row(one)
                place, start = place + block, table.blocks.start(block)
            places.append(place)
            if table is None:
                found.append(_NOWHERE)
            else:
                found.append((table.offset[one] - start, table.size[one], table.crc[one], *table.key_span(one)))
        return RowSpans(places, *(list(column) for column in zip(*found, strict=True)))

    def _table_with_arrays(self, number: int) -> RowTable | None:
        """The table of a shard; None if its rows have other members, or it cannot be used."""
        try:
            table = self._table(number)
        except (OSError, ShardError):
            return None  # an error only for those who read its rows, which may come much later
        return table if table.only == self._extension else None

    def read(self, spans: RowSpans, buffers: Buffers) -> np.ndarray[Any, Any] | None:
        """The arrays of rows, each compared with its checksum.

        Args:
            spans: Positions of n rows.
            buffers: Memory for the rows.

        Returns:
            (n, T), in the memory of `buffers`. None if a row has another size, header or member than the first one, is
            damaged or cannot be read: the rows have to be read one by one, which names the fault.
        """
        size, count = spans.size[0], len(spans.size)
        if size < 0 or spans.size.count(size) != count:
            return None
        try:
            form = self._formats.get(size) or self._format(spans.place[0], spans.offset[0], size)
            if form is None:
                return None
            buffer = buffers.take(count, form)
            if not _read_rows(self._sources(spans.place), spans.offset, buffer, size):
                return None
        except (OSError, ShardError):
            return None
        if buffer.headers != buffer.expected_headers:
            self._formats.pop(size, None)
            return None
        if list(map(crc32, buffer.arrays, repeat(form.checksum))) != spans.crc:
            return None
        return buffers.lend(buffer)

    def keys(self, spans: RowSpans) -> list[str]:
        """Keys of rows."""
        table, bits = self._table, self._block_bits
        return [
            table(place >> bits).key_at(begin, end)
            for place, begin, end in zip(spans.place, spans.key_begin, spans.key_end, strict=True)
        ]

    def _format(self, place: int, offset: int, size: int) -> _Format | None:
        """The format of a row; None: it is not a one-dimensional array, or cannot be read."""
        (source,), data = self._sources([place]), bytearray(size)
        if source is None or source.read_into((data,), offset) != size:
            return None
        try:
            array = decode_npy(data)
        except DecodeError:
            return None
        if array.ndim != 1 or not array.size:
            return None
        form = _Format(bytes(data[: size - array.nbytes]), array.dtype, len(array))
        self._formats[size] = form
        return form
