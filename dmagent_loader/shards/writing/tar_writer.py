"""Writes one tar shard and its sha256. Equal rows give equal bytes: times and owners are zero."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmagent_loader.shards.manifest import ShardRecord

_BLOCK = 512
_RECORD = 20 * _BLOCK
"""A tar is filled up to whole records."""
_TEMPLATE = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
"""Header of an empty file without a name; `_header` puts name, size and checksum in."""
_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 135), slice(148, 155)
_TEMPLATE_SUM = sum(_TEMPLATE) - sum(_TEMPLATE[_CHECKSUM]) - sum(_TEMPLATE[_SIZE]) + 7 * ord(" ")


def member_bytes(size: int) -> int:
    """Bytes that a member takes in a tar: a header, and its content in whole blocks."""
    return _BLOCK + -(-size // _BLOCK) * _BLOCK


def _header(name: str, size: int) -> bytes:
    """The header of a file, as `tarfile` makes it, but faster: for short texts, most of the time goes into headers."""
    encoded, digits = name.encode("utf-8", "surrogateescape"), b"%011o" % size
    if len(encoded) > _NAME.stop or len(digits) > 11:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.USTAR_FORMAT)
    header = bytearray(_TEMPLATE)
    header[: len(encoded)] = encoded
    header[_SIZE] = digits
    header[_CHECKSUM] = b"%06o\0" % (_TEMPLATE_SUM + sum(encoded) + sum(digits))
    return bytes(header)


class _HashingFile(io.FileIO):
    """A new file that computes its sha256 while it is written."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "wb")
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        written = super().write(data) or 0
        self.digest.update(memoryview(data)[:written])
        return written


class TarWriter:
    """Writes rows to a new shard.

    Args:
        path: Path of the shard.

    Attributes:
        rows: Rows so far.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._raw = _HashingFile(path)
        self._file = io.BufferedWriter(self._raw, 1 << 20)
        self._bytes = self.rows = 0

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Adds a row.

        Args:
            key: Key of the row.
            members: Extension -> bytes.
        """
        for extension, data in members.items():
            self._file.write(_header(f"{key}.{extension}", len(data)))
            self._file.write(data)
            self._file.write(bytes(-len(data) % _BLOCK))
            self._bytes += member_bytes(len(data))
        self.rows += 1

    def close(self, *, durable: bool = True) -> ShardRecord:
        """Completes the shard.

        Args:
            durable: Wait until the data is on disk.

        Returns:
            Its record, with the file name as its path.
        """
        ends = self._bytes + 2 * _BLOCK
        self._file.write(bytes(2 * _BLOCK + -ends % _RECORD))
        self._file.flush()
        if durable:
            os.fsync(self._raw.fileno())
        self._file.close()
        return ShardRecord(
            path=self._path.name, rows=self.rows, bytes=self._path.stat().st_size, sha256=self._raw.digest.hexdigest()
        )

    def abandon(self) -> None:
        """Closes the file, which stays incomplete."""
        self._file.close()
