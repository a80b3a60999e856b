"""Blocks of remote shards that are here, as sources for their part of the shard."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from dmagent_loader.shards.sources.local import LocalSource, Memory, Readable, ReadInto, Source


class BlockSource(Source, Readable, Protocol):
    """A block: `read` takes offsets in the shard, and `read_into` offsets in the block."""


class BlockInMemory:
    """A block in memory."""

    def __init__(self, start: int, data: bytearray) -> None:
        self._start, self._data = start, data
        self.read_into: ReadInto = partial(_copy_into, memoryview(data))
        self.descriptor = -1

    def read(self, offset: int, length: int) -> bytearray:
        first = offset - self._start
        return self._data[first : first + length]


class _BlockOnDisk:
    """A block on disk."""

    def __init__(self, start: int, path: str) -> None:
        self._start, self._file = start, LocalSource(path)
        self.read_into, self.descriptor = self._file.read_into, self._file.descriptor

    def read(self, offset: int, length: int) -> bytearray:
        return self._file.read(offset - self._start, length)


def open_block(place: tuple[str, int]) -> BlockSource:
    """Opens a block on disk.

    Args:
        place: Its path, and its first byte in the shard.

    Raises:
        ShardNotFoundError: There is no such file.
    """
    path, start = place
    return _BlockOnDisk(start, path)


def _copy_into(data: memoryview, parts: Sequence[Memory], offset: int) -> int:
    """Copies bytes from `offset` on into parts of memory; returns their number."""
    copied = 0
    for part in parts:
        found = data[offset + copied : offset + copied + len(part)]
        part[: len(found)] = found
        copied += len(found)
    return copied
