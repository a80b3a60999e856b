"""One pass over a tar file that finds every member, and every place where the file is damaged.

Reading a tar as a stream loses data in silence: a zeroed or overwritten header, or a cut between two members, looks
like the end of the archive. Here the end has to be proven (a zero block, then nothing but zeros), and after damage the
search goes on for the next header whose checksum is right.
"""

from __future__ import annotations

import tarfile
import threading
import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass

from dmagent_loader.errors import ShardLayoutError
from dmagent_loader.shards.header import (
    BLOCK,
    EXTENDED_TYPES,
    PAX_TYPES,
    REFUSED_TYPES,
    QuickHeaders,
    concerns_layout,
    padded,
    parse_header,
    pax_records,
    split_name,
)
from dmagent_loader.shards.reader import Source
from dmagent_loader.shards.urls import display_url

BAD_HEADER = "header overwritten"
ZEROED_HEADER = "header zeroed"
NO_END = "cut at a record boundary"
CUT_HEADER = "cut inside a header"
CUT_PAYLOAD = "cut inside a member"
TRAILING = "bytes after the end of the archive"
ZEROED_TAIL = "zeros up to the end of the file"
CUTS = (NO_END, CUT_HEADER, CUT_PAYLOAD, ZEROED_TAIL)
"""Kinds of damage after which nobody can say how much the file once held."""

_CHUNK_BYTES = 4 << 20
_MAX_EXTENDED_HEADER = 1 << 20
# Writers end with two zero blocks and pad to 10,240 bytes. More zeros than that are rows that never reached the disk;
# GNU tar with a blocking factor above 20 is reported too, because nothing tells the two apart.
_MAX_END_PADDING = 2 * BLOCK + tarfile.RECORDSIZE
_ZERO_BLOCK = bytes(BLOCK)
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
}


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A stretch of a shard without a readable member.

    Attributes:
        kind: One of the kinds named in this file.
        start, end: Byte span.
        rows_before: Rows that begin before it.
    """

    kind: str
    start: int
    end: int
    rows_before: int


class ScanStopped(Exception):
    """The scan was told to stop (Ctrl-C)."""


class MemberTable:
    """All members of a shard that belong to a sample, column by column (M members, R rows).

    Attributes:
        offset, size: (M,) payload positions in bytes.
        extension: (M,) positions in `extensions`.
        row_first: (R,) first member of each row.
        row_crc: (R,) crc32 over the payloads of a row, in order.
        keys: The keys of all rows, joined; `key_end`: (R,) where each ends; `key_hash`: (R,) their hashes.
        gaps: The damage, in order.
    """

    def __init__(self, url: str) -> None:
        self.offset, self.size, self.extension = array("q"), array("q"), array("H")
        self.extensions: list[bytes] = []
        self.row_first, self.row_crc, self.key_end, self.key_hash = array("q"), array("I"), array("q"), array("q")
        self.keys = bytearray()
        self.gaps: list[Gap] = []
        self._url = url
        self._numbers: dict[bytes, int] = {}
        self._key: bytes | None = None
        self._seen: list[int] = []

    def add(self, key: bytes, extension: bytes, offset: int, size: int) -> int:
        """Notes a member; returns the crc32 of its row so far.

        Raises:
            ShardLayoutError: The row has that extension already.
        """
        number = self._numbers.get(extension)
        if number is None:
            number = self._numbers[extension] = len(self.extensions)
            self.extensions.append(extension)
        if key != self._key:
            self._key = key
            self._seen = [number]
            self.row_first.append(len(self.offset))
            self.row_crc.append(0)
            self.keys += key
            self.key_end.append(len(self.keys))
            self.key_hash.append(hash(key))
        elif number in self._seen:
            raise ShardLayoutError(
                f"shard {self._url}: row {len(self.row_first) - 1} (key {_text(key)!r}) has the extension "
                f"{_text(extension)!r} twice (again at byte {offset - BLOCK}), so one of the two members would be "
                "lost: give every sample a key of its own"
            )
        else:
            self._seen.append(number)
        self.offset.append(offset)
        self.size.append(size)
        self.extension.append(number)
        return self.row_crc[-1]


def scan(
    url: str,
    source: Source,
    size: int,
    *,
    advance: Callable[[int], object] | None = None,
    stop: threading.Event | None = None,
) -> MemberTable:
    """Finds all members of a tar file.

    Args:
        url: For messages.
        source: The open file.
        size: Its length in bytes.
        advance: Called with the number of bytes passed since the last call.
        stop: When set, the scan ends with `ScanStopped`.

    Raises:
        ShardLayoutError: Compressed, links or devices, or one extension twice in a sample.
    """
    scanner = _Scanner(display_url(url), source, size, advance, stop)
    scanner.refuse_compressed()
    scanner.run()
    if advance is not None:
        advance(size - scanner.reported)
    return scanner.table


class _Scanner:
    def __init__(
        self,
        url: str,
        source: Source,
        size: int,
        advance: Callable[[int], object] | None,
        stop: threading.Event | None,
    ) -> None:
        self.url = url
        self.source = source
        self.file_size = size
        self.advance = advance
        self.stop = stop
        self.table = MemberTable(url)
        self.base = 0
        self.buffer = bytearray()
        self.view = memoryview(self.buffer)
        self.reported = 0
        self.next_name: bytes | None = None
        self.next_size: int | None = None

    def load(self, offset: int) -> None:
        """Brings the bytes from `offset` on into the buffer."""
        if self.stop is not None and self.stop.is_set():
            raise ScanStopped
        if self.advance is not None and offset > self.reported:
            self.advance(offset - self.reported)
            self.reported = offset
        self.buffer = self.source.read(offset, min(_CHUNK_BYTES, self.file_size - offset))
        self.view = memoryview(self.buffer)
        self.base = offset

    def run(self) -> None:
        position = 0
        table = self.table
        parse = QuickHeaders().parse
        while True:
            relative = position - self.base
            if not 0 <= relative <= len(self.buffer) - BLOCK:
                if position + BLOCK > self.file_size:
                    self.gap(CUT_HEADER if position < self.file_size else NO_END, position, self.file_size)
                    return
                self.load(position)
                relative = 0
            quick = parse(self.view, relative)
            if quick is not None and quick[0] == tarfile.REGTYPE and self.next_name is None and self.next_size is None:
                _, name, size = quick
            elif quick is not None and quick[0] == tarfile.XHDTYPE and self.is_harmless(relative + BLOCK, quick[2]):
                position += BLOCK + padded(quick[2])
                continue
            else:
                special = self.special_header(self.buffer[relative : relative + BLOCK], position)
                if special is None:
                    return
                member, position = special
                if member is None:
                    continue
                name, size = member
            start = position + BLOCK
            end = start + size
            if end > self.file_size:
                self.gap(CUT_PAYLOAD, position, self.file_size)
                return
            parts = split_name(name)
            if parts is not None:
                crc = table.add(parts[0], parts[1], start, size)
                if end <= self.base + len(self.buffer):
                    crc = zlib.crc32(self.view[start - self.base : end - self.base], crc)
                else:
                    crc = self.long_crc(start, end, crc)
                table.row_crc[-1] = crc
            position = start + padded(size)

    def is_harmless(self, relative: int, size: int) -> bool:
        """Whether a pax header whose records are in the buffer changes nothing that matters here."""
        end = relative + padded(size)
        return end <= len(self.buffer) and not concerns_layout(self.buffer[relative : relative + size])

    def special_header(self, block: bytearray, position: int) -> tuple[tuple[bytes, int] | None, int] | None:
        """Everything that is not plain: (the member if it is one, position of its header or of the next header).

        None: nothing more can be read.
        """
        if block == _ZERO_BLOCK:
            resumed = self.zeros(position)
            return None if resumed is None else (None, resumed)
        header = parse_header(block)
        if header is not None and header.type in EXTENDED_TYPES:
            after = position + BLOCK + padded(header.size)
            if after > self.file_size:
                self.gap(CUT_HEADER, position, self.file_size)
                return None
            if self.extend(header, position):
                return None, after
            header = None
        if header is None:
            resumed = self.resynchronise(BAD_HEADER, position)
            return None if resumed is None else (None, resumed)
        name = self.next_name if self.next_name is not None else header.name.encode("utf-8", "surrogateescape")
        size = self.next_size if self.next_size is not None else header.size
        self.next_name = self.next_size = None
        if header.type in REFUSED_TYPES:
            raise ShardLayoutError(
                f"shard {self.url}: member {_text(name)!r} at byte {position} is {REFUSED_TYPES[header.type]}, which "
                "has no bytes of its own to read: write the shard from the files themselves (tar --dereference "
                "--hard-dereference)"
            )
        if header.isdir():
            return None, position + BLOCK
        if not header.isreg():
            return None, position + BLOCK + padded(size)
        return (name, size), position

    def extend(self, header: tarfile.TarInfo, position: int) -> bool:
        """Takes over the name and size that an extended header gives to the next member; False if it is malformed."""
        if header.size > _MAX_EXTENDED_HEADER:
            return False
        data = bytes(self.source.read(position + BLOCK, header.size))
        if header.type == tarfile.GNUTYPE_LONGNAME:
            self.next_name = data.partition(b"\0")[0]
        if header.type not in PAX_TYPES:
            return True
        try:
            records = pax_records(data)
            size = int(records.get(b"size", b"0"))
        except ValueError:
            return False
        if any(key.startswith(b"GNU.sparse") for key in records):
            raise ShardLayoutError(
                f"shard {self.url}: the member at byte {position} is a sparse file, whose bytes are not stored as "
                "they read: write the shard without --sparse"
            )
        if header.type != tarfile.XGLTYPE:
            self.next_name = records.get(b"path", self.next_name)
            self.next_size = size if b"size" in records else self.next_size
        return size >= 0

    def long_crc(self, start: int, end: int, crc: int) -> int:
        """The crc32 of a payload that reaches beyond the buffer."""
        while start < end:
            self.load(start)
            part = self.view[: end - start]
            crc = zlib.crc32(part, crc)
            start += len(part)
        return crc

    def refuse_compressed(self) -> None:
        magic = self.source.read(0, min(6, self.file_size))
        for prefix, name in _COMPRESSED.items():
            if magic.startswith(prefix):
                raise ShardLayoutError(
                    f"shard {self.url} is compressed ({name}), so its rows cannot be read by position: unpack it to a "
                    "plain .tar (for example `gunzip` or `zstd -d`); compress single members instead if space "
                    "matters (.json.gz)"
                )

    def zeros(self, position: int) -> int | None:
        """Judges a zero block: the end of the archive (None), or damage (then where to go on)."""
        end = position
        while end < self.file_size:
            self.load(end)
            rest = self.buffer.lstrip(b"\0")
            end += len(self.buffer) - len(rest)
            if rest:
                break
        if end >= self.file_size:
            if self.file_size - position >= _MAX_END_PADDING:
                self.gap(ZEROED_TAIL, position, self.file_size)
            return None
        end -= end % BLOCK
        if end - position >= 2 * BLOCK and end % tarfile.RECORDSIZE == 0:
            # A full end marker, padded as writers pad it. What follows may be the rest of an older, longer file.
            self.gap(TRAILING, end, self.file_size)
            return None
        ended = end - position >= 2 * BLOCK and bool(self.table.offset)
        return self.resynchronise(ZEROED_HEADER, position, kind_if_last=TRAILING if ended else ZEROED_HEADER)

    def resynchronise(self, kind: str, position: int, kind_if_last: str | None = None) -> int | None:
        """The next valid header behind `position`, or None; notes the gap, less the zeros at the end of the file."""
        self.next_name = self.next_size = None
        magic = b"ustar"
        search = position + 1
        last_byte = search
        while search < self.file_size:
            self.load(search)
            used = len(self.buffer.rstrip(b"\0"))
            last_byte = search + used if used else last_byte
            found = self.buffer.find(magic)
            while found >= 0:
                start = search + found - 257
                if position < start <= self.file_size - BLOCK and parse_header(self.source.read(start, BLOCK)):
                    self.gap(kind, position, start)
                    return start
                found = self.buffer.find(magic, found + 1)
            search += max(1, len(self.buffer) - len(magic) + 1)
        end = min(self.file_size, position + padded(last_byte - position))
        self.gap(kind_if_last or kind, position, end)
        return None

    def gap(self, kind: str, start: int, end: int) -> None:
        start = min(start, end)
        self.table.gaps.append(Gap(kind=kind, start=start, end=end, rows_before=len(self.table.row_first)))


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")
