"""Second half of a job: the documents of a domain, in their order, into shards of equal numbers of rows."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dmagent_loader._files import write_atomically
from dmagent_loader.shards.index.shard_index import build_index
from dmagent_loader.shards.index.stored import StoredIndexes
from dmagent_loader.shards.manifest import ShardRecord
from dmagent_loader.shards.sources.local import open_source
from dmagent_loader.shards.sources.urls import INDEX_SUFFIX
from dmagent_loader.shards.writing.chunks import Counts, read_tensor
from dmagent_loader.shards.writing.config import ShardingConfig
from dmagent_loader.shards.writing.packing import LENGTHS_MEMBER, PACKED_MEMBER, encode_npy
from dmagent_loader.shards.writing.tar_writer import TarWriter, member_bytes

_SAMPLED_KEYS = 1 << 16
"""Keys from which the boundaries of the buckets are estimated."""

IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """A task: one shard of a domain.

    Documents are read in buckets, ranges of keys, so that the memory does not grow with the domain.

    Attributes:
        path: Path of the shard.
        chunks: All chunks of the domain.
        places: (B+1, C) where each bucket begins in each chunk, as a number of documents, for the B buckets that
            overlap the shard.
        skipped: Units in the first bucket that belong to earlier shards. Units are tokens, or documents of raw text.
        rows: Number of rows.
        first_key: Number of the first row.
        config: Settings.
    """

    path: Path
    chunks: tuple[Path, ...]
    places: IntArray
    skipped: int
    rows: int
    first_key: int
    config: ShardingConfig

    @property
    def _record_path(self) -> Path:
        return self.path.with_suffix(".json")

    def record(self) -> ShardRecord | None:
        """The record of the shard, if an earlier call has written it."""
        index = self.path.with_name(f"{self.path.name}{INDEX_SUFFIX}")
        if not all(path.is_file() for path in (self.path, index, self._record_path)):
            return None
        return ShardRecord(**json.loads(self._record_path.read_text(encoding="utf-8")))

    def run(self) -> ShardRecord:
        """Writes the shard and its index, unless they are there."""
        record = self.record()
        if record is not None:
            return record
        for leftover in self.path.parent.glob(f"{self.path.name}.*"):
            leftover.unlink()
        temporary = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
        writer = TarWriter(temporary)
        try:
            for number, members in enumerate(self._rows(), start=self.first_key):
                writer.add(f"{number:09d}", members)
            record = replace(writer.close(), path=self.path.name)
        finally:
            writer.abandon()
        os.replace(temporary, self.path)
        index = build_index(str(self.path), open_source(str(self.path)), record.bytes)
        StoredIndexes("first-dot").save(str(self.path), replace(index, sha256=record.sha256))
        write_atomically(self._record_path, json.dumps(asdict(record)).encode())
        return record

    def _rows(self) -> Iterator[dict[str, bytes]]:
        length = self.config.sequence_length
        return self._texts() if length is None else self._packed(length)

    def _texts(self) -> Iterator[dict[str, bytes]]:
        position = -self.skipped
        names = ("txt", "json") if self.config.keep_columns else ("txt",)
        for documents in self._documents(len(names)):
            for parts in zip(*documents, strict=True):
                if 0 <= position < self.rows:
                    yield {name: part.tobytes() for name, part in zip(names, parts, strict=True)}
                position += 1

    def _packed(self, length: int) -> Iterator[dict[str, bytes]]:
        skip, missing = self.skipped, self.rows * length
        tokens: NDArray[Any] = np.zeros(0, np.uint8)
        ends: IntArray = np.zeros(0, np.int64)  # where documents end in `tokens`
        for (documents,) in self._documents(1):
            if not documents:
                continue
            ends = np.concatenate([ends, len(tokens) + np.cumsum([len(ids) for ids in documents], dtype=np.int64)])
            tokens = np.concatenate([tokens, *documents] if len(tokens) else documents)
            whole = min(len(tokens) - skip, missing) // length * length
            yield from self._rows_of(tokens[skip : skip + whole].reshape(-1, length), ends - skip)
            missing -= whole
            tokens, ends = tokens[skip + whole :], ends - skip - whole
            skip = 0

    def _rows_of(self, rows: NDArray[Any], ends: IntArray) -> Iterator[dict[str, bytes]]:
        header = encode_npy(rows[0])[: -rows[0].nbytes] if len(rows) else b""
        for number, row in enumerate(rows):
            members = {PACKED_MEMBER: header + row.tobytes()}
            if self.config.parse_special_tokens:  # end-of-text tokens may lie inside documents
                begin = number * len(row)
                first = np.searchsorted(ends, begin, side="right")
                last = np.searchsorted(ends, begin + len(row), side="left")
                inside = ends[first:last] - begin
                members[LENGTHS_MEMBER] = encode_npy(np.diff(inside, prepend=0, append=len(row)).astype(np.uint32))
            yield members

    def _documents(self, num_parts: int) -> Iterator[list[list[NDArray[Any]]]]:
        """The documents of each bucket in their order: for each part, a list of arrays."""
        for first, last in zip(self.places[:-1], self.places[1:], strict=True):
            keys: list[NDArray[np.uint64]] = []
            parts: list[list[NDArray[Any]]] = [[] for _ in range(num_parts)]
            for path, start, stop in zip(self.chunks, first.tolist(), last.tolist(), strict=True):
                if start == stop:
                    continue
                keys.append(read_tensor(path, "keys", start, stop))
                for number, arrays in enumerate(parts):
                    arrays.extend(_slices(path, number, start, stop))
            order = np.argsort(np.concatenate(keys), kind="stable") if keys else ()
            yield [[arrays[place] for place in order] for arrays in parts]


def _slices(path: Path, part: int, start: int, stop: int) -> list[NDArray[Any]]:
    """The arrays of documents `start` to `stop` of a chunk."""
    ends = read_tensor(path, f"ends{part}", max(start - 1, 0), stop)
    begin = int(ends[0]) if start else 0
    inner = ends[1:] if start else ends
    data = read_tensor(path, f"data{part}", begin, int(inner[-1]))
    return np.split(data, inner[:-1] - begin)


def plan_shards(
    folder: Path,
    name: str,
    chunks: Sequence[Path],
    counts: Counts,
    config: ShardingConfig,
    *,
    first_shard: int = 0,
    first_row: int = 0,
) -> list[Assembly]:
    """Divides the rows of a domain into shards of equal numbers of rows.

    Args:
        folder: Folder of the shards.
        name: Prefix of their names.
        chunks: All chunks of the domain, in order.
        counts: Counts of the domain.
        config: Settings.
        first_shard, first_row: Numbers at which shards and rows begin.

    Returns:
        A task for each shard; none if there is no whole row.
    """
    length = config.sequence_length
    rows = counts.documents if length is None else counts.elements // length
    if not rows:
        return []
    size = tar_size(chunks, counts, config).total
    shards = max(-(-size // config.max_shard_bytes), -(-rows // (config.rows_per_shard or rows)))
    shards = min(shards, rows)
    places, units = _buckets(chunks, shards, is_packed=length is not None)
    before = np.concatenate([[0], np.cumsum(units)])  # units before each bucket
    paths, tasks = tuple(chunks), []  # one tuple for all tasks: they hold 16,000 paths each of a domain of 1 TB
    for number in range(shards):
        begin, end = rows * number // shards, rows * (number + 1) // shards
        first_unit, last_unit = begin * (length or 1), end * (length or 1)
        first = int(np.searchsorted(before, first_unit, side="right")) - 1
        last = int(np.searchsorted(before, last_unit, side="left"))
        tasks.append(
            Assembly(
                path=folder / f"{name}-{first_shard + number:06d}.tar",
                chunks=paths,
                places=places[first : last + 1],
                skipped=first_unit - int(before[first]),
                rows=end - begin,
                first_key=first_row + begin,
                config=config,
            )
        )
    return tasks


class TarSize(NamedTuple):
    """Rows of a domain, their bytes in its tars, and the bytes of their tokens or texts in these."""

    rows: int
    total: int
    content: int


def tar_size(chunks: Sequence[Path], counts: Counts, config: ShardingConfig) -> TarSize:
    """The size of a domain, before it is written.

    Args:
        chunks: All chunks of the domain, of one document or more.
        counts: Counts of the domain.
        config: Settings.
    """
    length = config.sequence_length
    if length is None:
        return TarSize(counts.documents, counts.tar_bytes, counts.elements)
    rows = counts.elements // length
    dtype = next(tokens.dtype for chunk in chunks if len(tokens := read_tensor(chunk, "data0", 0, 1)))
    row_bytes = member_bytes(len(encode_npy(np.zeros(length, dtype))))
    if config.parse_special_tokens:
        pieces = 1 + counts.documents // max(1, rows)
        row_bytes += member_bytes(len(encode_npy(np.zeros(pieces, np.uint32))))
    return TarSize(rows, rows * row_bytes, rows * length * dtype.itemsize)


def _buckets(chunks: Sequence[Path], count: int, *, is_packed: bool) -> tuple[IntArray, IntArray]:
    """Where each bucket begins in each chunk, (count + 1, C) documents, and the units in each bucket, (count,)."""
    documents = np.array([len(read_tensor(chunk, "keys")) for chunk in chunks], np.int64)
    step = max(1, int(documents.sum()) // max(_SAMPLED_KEYS, 64 * count))
    sample = np.sort(np.concatenate([read_tensor(chunk, "keys")[::step] for chunk in chunks]))
    edges = sample[np.arange(1, count) * len(sample) // count]
    places = np.zeros((count + 1, len(chunks)), np.int64)
    units = np.zeros(count, np.int64)
    for number, chunk in enumerate(chunks):
        places[1:-1, number] = np.searchsorted(read_tensor(chunk, "keys"), edges)
        places[-1, number] = documents[number]
        if is_packed:
            ends = np.concatenate([[0], read_tensor(chunk, "ends0")])
            units += np.diff(ends[places[:, number]])
        else:
            units += np.diff(places[:, number])
    return places, units
