"""Divides the inputs of a domain into pieces: the units of work that several processes share and a killed job resumes.

The division depends on the names and sizes of the inputs only, so every run of a job makes the same pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dmagent_loader._tasks import Advance
from dmagent_loader.shards.inputs.archives import read_mds, read_megatron, read_tar
from dmagent_loader.shards.inputs.kinds import Input, Kind
from dmagent_loader.shards.inputs.options import ReadOptions
from dmagent_loader.shards.inputs.records import Record, Rejected
from dmagent_loader.shards.inputs.tables import dataset_shards, parquet_row_groups, read_table, saved_rows
from dmagent_loader.shards.inputs.text import begins_array, read_text, stored_file

PIECE_BYTES = 64 << 20
"""Stored bytes of a piece, about: small files share one, and large ones are divided where their kind allows it."""

_READERS = {
    **dict.fromkeys((Kind.JSON, Kind.CSV, Kind.TEXT), read_text),
    **dict.fromkeys((Kind.PARQUET, Kind.ARROW, Kind.SAVED_DATASET, Kind.DATASET), read_table),
    Kind.TAR: read_tar,
    Kind.MDS: read_mds,
    Kind.MEGATRON: read_megatron,
}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Whole inputs, or a part of one.

    Attributes:
        inputs: The inputs, in order.
        start, stop: Part of the only input, in units of its reader; 0 and None: all of it.
    """

    inputs: tuple[Input, ...]
    start: int = 0
    stop: int | None = None

    def read(self, options: ReadOptions, advance: Advance) -> Iterator[Record | Rejected]:
        """Yields the records, the same ones in the same order every time.

        Raises:
            ShardError: An input is damaged, or has no column with the text.
        """
        for source in self.inputs:
            yield from _READERS[source.kind](source, self.start, self.stop, options, advance)


def divide(inputs: Sequence[Input], piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """Divides inputs into pieces, in order.

    Raises:
        ShardError: An input cannot be opened.
    """
    pieces: list[Piece] = []
    small: list[Input] = []
    small_bytes = 0
    for source in inputs:
        parts = list(pairwise(_boundaries(source, piece_bytes)))
        if len(parts) > 1:
            pieces.extend(_shared(small))
            small, small_bytes = [], 0
            pieces.extend(Piece(inputs=(source,), start=start, stop=stop) for start, stop in parts)
            continue
        small.append(source)
        small_bytes += source.size
        if small_bytes >= piece_bytes:
            pieces.extend(_shared(small))
            small, small_bytes = [], 0
    pieces.extend(_shared(small))
    return pieces


def _shared(inputs: list[Input]) -> list[Piece]:
    return [Piece(inputs=tuple(inputs))] if inputs else []


def _boundaries(source: Input, piece_bytes: int) -> list[int]:
    """Where an input can be divided, in units of its reader, from its beginning to its end; [] if it cannot."""
    if source.kind is Kind.DATASET:
        return list(range(dataset_shards(source) + 1))
    if source.size < 2 * piece_bytes:
        return []
    if source.kind is Kind.PARQUET:
        return list(_groups(parquet_row_groups(source), piece_bytes))
    if source.kind is Kind.SAVED_DATASET:
        rows, parts = saved_rows(source), source.size // piece_bytes
        return [rows * part // parts for part in range(parts + 1)]
    if source.kind is Kind.JSON and not source.compression and not source.name.endswith(".json"):
        return _line_starts(source, piece_bytes)
    return []


def _groups(sizes: Iterable[int], piece_bytes: int) -> Iterator[int]:
    """Boundaries between row groups, so that each part but the last has `piece_bytes`."""
    yield 0
    number, collected, last = 0, 0, 0
    for number, size in enumerate(sizes, start=1):
        collected += size
        if collected >= piece_bytes:
            yield number
            collected, last = 0, number
    if number > last:
        yield number


def _line_starts(source: Input, piece_bytes: int) -> list[int]:
    starts = [0]
    with stored_file(source.url) as file:
        if begins_array(file.read(64)):
            return []
        for wanted in range(piece_bytes, source.size - piece_bytes // 2, piece_bytes):
            file.seek(wanted - 1)
            file.readline()
            if starts[-1] < file.tell() < source.size:
                starts.append(file.tell())
    return [*starts, source.size]
