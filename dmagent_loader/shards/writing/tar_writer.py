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


def member_bytes(size: int) -> int:
    """Bytes that a member takes in a tar: a header, and its content in whole blocks."""
    return _BLOCK + -(-size // _BLOCK) * _BLOCK


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
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        self.rows = 0

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Adds a row.

        Args:
            key: Key of the row.
            members: Extension -> bytes.
        """
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self._tar.getmembers().clear()  # tarfile keeps every header for a listing that is not needed here
        self.rows += 1

    def close(self, *, durable: bool = True) -> ShardRecord:
        """Completes the shard.

        Args:
            durable: Wait until the data is on disk.

        Returns:
            Its record, with the file name as its path.
        """
        self._tar.close()
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
