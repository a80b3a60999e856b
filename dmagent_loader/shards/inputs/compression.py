"""Unpacks inputs that are stored as .gz, .bz2, .xz or .zst."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any, cast

from dmagent_loader.errors import ShardError, require_extra

UNPACKING_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, OSError)
"""The errors of a compressed file that is damaged."""

_MAGIC = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0", ".zst": b"\x28\xb5\x2f\xfd"}
_CHUNK_BYTES = 1 << 18
_LARGE_WINDOW = "too much memory"
"""Part of zstd's message for a frame with a window of more than 128 MiB."""


def unpacked(
    name: str, stored: IO[bytes], compression: str, start: int
) -> contextlib.AbstractContextManager[IO[bytes]]:
    """The content of a file.

    Args:
        name: Name of the file, for messages.
        stored: Its stored bytes.
        compression: ``""``, or one of `COMPRESSIONS`.
        start: Byte at which to begin; 0 in a compressed file.

    Raises:
        ShardError: The file is compressed in another way than its name says.
    """
    if start:
        stored.seek(start)
    buffered: Any = stored if hasattr(stored, "peek") else io.BufferedReader(cast("Any", stored), 1 << 20)
    if not start:
        _check_compression(name, buffered.peek(16)[:16], compression)
    if compression == ".gz":
        return cast("IO[bytes]", gzip.GzipFile(fileobj=buffered))
    if compression == ".bz2":
        return io.BufferedReader(_Streams(buffered, bz2.BZ2Decompressor), 1 << 20)
    if compression == ".xz":
        return io.BufferedReader(_Streams(buffered, lzma.LZMADecompressor), 1 << 20)
    if compression == ".zst":
        pyarrow = require_extra("pyarrow", "data")  # unlike the package zstandard, it refuses a file that was cut
        return io.BufferedReader(pyarrow.CompressedInputStream(buffered, "zstd"), 1 << 20)
    return contextlib.nullcontext(buffered)


def damage_of(name: str, error: Exception) -> str:
    """The message for one of the `UNPACKING_ERRORS`."""
    if _LARGE_WINDOW in str(error):
        return (
            f"{name} was compressed with a window of more than 128 MiB (zstd --long), which cannot be unpacked here: "
            f"write it again (zstd -dc --long=31 {name} | zstd -o NEW.zst)"
        )
    return f"{name} is damaged or cannot be read to its end ({error}): what follows would be lost; fetch it again"


def _check_compression(name: str, head: bytes, compression: str) -> None:
    """Raises ShardError for a compressed file whose name does not say so, and for a plain one whose name does."""
    if compression:
        if not head:
            raise ShardError(
                f"{name} has no bytes, but each {compression} file begins with a header, so it was cut: fetch or write "
                "it again"
            )
        if head.isascii() and not head.startswith(_MAGIC[compression]) and b"\0" not in head:
            raise ShardError(f"{name} is not compressed, although its name ends in {compression}: rename it")
        return
    for ending, magic in _MAGIC.items():
        if ending != ".bz2" and head.startswith(magic):  # a text may begin as .bz2 does
            raise ShardError(f"{name} is compressed, but its name does not say so: rename it to {name}{ending}")


class _Streams(io.RawIOBase):
    """The content of all streams of a .bz2 or .xz file, one after the other.

    The readers of the standard library take bytes that begin no stream for the end of the file, so all streams behind
    a damaged header, or behind the padding that .xz allows, would be lost in silence.

    Args:
        stored: The stored bytes.
        decompressor: Makes the decompressor of a stream.
    """

    def __init__(self, stored: IO[bytes], decompressor: Callable[[], Any]) -> None:
        self._stored, self._decompressor = stored, decompressor
        self._stream = decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            packed = b""
            if self._stream.eof:
                packed = self._next_stream()
                if not packed:
                    return 0
                self._stream = self._decompressor()
            elif self._stream.needs_input:
                packed = self._stored.read(_CHUNK_BYTES)
                if not packed:
                    raise EOFError("it ends before its last stream does")
            data = self._stream.decompress(packed, len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)

    def _next_stream(self) -> bytes:
        """The beginning of the next stream, without padding; ``b""`` at the end of the file."""
        packed: bytes = self._stream.unused_data.lstrip(b"\0")
        while not packed:
            chunk = self._stored.read(_CHUNK_BYTES)
            if not chunk:
                return b""
            packed = chunk.lstrip(b"\0")
        return packed
