"""One pass over a tar file that finds every member, and every place where the file is damaged.

Reading a tar as a stream loses data in silence: a zeroed or overwritten header, or a cut between two members, looks
like the end of the archive. Here the end has to be proven (a zero block, then nothing but zeros), and after damage the
search goes on for the next header whose checksum is right.
"""

from __future__ import annotations

import re
import tarfile
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from dmagent_loader.errors import ShardLayoutError
from dmagent_loader.shards.sources.checksum import crc32
from dmagent_loader.shards.sources.local import Source
from dmagent_loader.shards.sources.urls import display_url
from dmagent_loader.shards.tar.header import (
    BLOCK,
    EXTENDED_TYPES,
    PAX_TYPES,
    REFUSED_TYPES,
    QuickHeaders,
    concerns_layout,
    may_be_header,
    padded,
    parse_header,
    pax_records,
    split_name,
)
from dmagent_loader.shards.tar.members import (
    BAD_HEADER,
    CUT_HEADER,
    CUT_PAYLOAD,
    NO_BLOCKS,
    NO_END,
    TRAILING,
    ZEROED_HEADER,
    ZEROED_TAIL,
    Gap,
    MemberTable,
    shown,
)

_CHUNK_BYTES = 4 << 20
_NAME_BYTES = 100
_MAX_EXTENDED_HEADER = 1 << 20
_NONZERO = re.compile(rb"[^\0]")
_ZERO_BLOCK = bytes(BLOCK)
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
}


class Digest(Protocol):
    """What `hashlib.sha256()` returns."""

    def update(self, data: memoryview, /) -> None:
        """Takes in more bytes."""
        ...


class ScanStopped(Exception):
    """The scan was told to stop (Ctrl-C)."""


def scan(
    url: str,
    source: Source,
    size: int,
    *,
    advance: Callable[[int], object] | None = None,
    stop: threading.Event | None = None,
    digest: Digest | None = None,
) -> MemberTable:
    """Finds all members of a tar file.

    Args:
        url: For messages.
        source: The open file.
        size: Its length in bytes.
        advance: Called with the number of bytes passed since the last call.
        stop: When set, the scan ends with `ScanStopped`.
        digest: Updated with all bytes of the file, in order.

    Raises:
        ShardLayoutError: Compressed, links or devices, or one extension twice in a sample.
    """
    scanner = _Scanner(display_url(url), source, size, advance, stop, digest)
    scanner.refuse_compressed()
    scanner.run()
    scanner.note_cut_names()
    scanner.hash_up_to(size)
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
        digest: Digest | None,
    ) -> None:
        self.digest = digest
        self.hashed = 0
        self.announced = -1
        self.extended = b""
        self.has_long_names = False
        self.suspects: list[Gap] = []
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
        if self.digest is not None:
            self.hash_up_to(offset)
            self.digest.update(self.view[self.hashed - offset :])
            self.hashed = max(self.hashed, offset + len(self.buffer))

    def hash_up_to(self, end: int) -> None:
        """Takes bytes that were passed over into the digest."""
        while self.digest is not None and self.hashed < end:
            part = self.source.read(self.hashed, min(_CHUNK_BYTES, end - self.hashed))
            self.digest.update(memoryview(part))
            self.hashed += len(part)

    def reach(self, position: int) -> int:
        """Brings a byte into the buffer, unless it is there; returns its place in the buffer."""
        if not self.base <= position < self.base + len(self.buffer):
            self.load(position)
        return position - self.base

    def bytes_at(self, position: int, length: int) -> bytes:
        """Bytes from the buffer, or from the file if they are not all there."""
        relative = position - self.base
        if 0 <= relative <= len(self.buffer) - length:
            return bytes(self.view[relative : relative + length])
        return bytes(self.source.read(position, length))

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
            if (
                quick is not None
                and quick[0] == tarfile.REGTYPE
                and self.next_name is None
                and self.next_size is None
                and (len(quick[1]) != _NAME_BYTES or split_name(quick[1]) is not None)
            ):
                _, name, size = quick
            elif (
                quick is not None
                and quick[0] == tarfile.XHDTYPE
                and self.is_harmless(relative + BLOCK, quick[2])
                and self.announce(tarfile.XHDTYPE, position, position + BLOCK + padded(quick[2]))
            ):
                position = self.announced
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
                    crc = crc32(self.view[start - self.base : end - self.base], crc)
                else:
                    crc = self.long_crc(start, end, crc)
                table.row_crc[-1] = crc
            position = start + padded(size)

    def is_harmless(self, relative: int, size: int) -> bool:
        """Whether a pax header whose records are in the buffer changes nothing that matters here."""
        if relative + padded(size) > len(self.buffer):
            return False
        records = self.buffer[relative : relative + size]
        # At a glance: what is no record of a pax header there is judged by `extend`.
        return records[:1].isdigit() and records.endswith(b"\n") and not concerns_layout(records)

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
            if self.announce(header.type, position, after) and self.extend(header, position):
                return None, after
            header = None
        if header is None:
            resumed = self.resynchronise(BAD_HEADER, position)
            return None if resumed is None else (None, resumed)
        is_short = self.next_name is None
        name = self.next_name if self.next_name is not None else header.name.encode("utf-8", "surrogateescape")
        self.has_long_names |= not is_short and len(name) > _NAME_BYTES
        size = self.next_size if self.next_size is not None else header.size
        self.next_name = self.next_size = None
        if header.type in REFUSED_TYPES:
            raise ShardLayoutError(
                f"shard {self.url}: member {shown(name)!r} at byte {position} is {REFUSED_TYPES[header.type]}, which "
                "has no bytes of its own to read: write the shard from the files themselves (tar --dereference "
                "--hard-dereference)"
            )
        if header.isdir():
            return None, position + BLOCK
        if not header.isreg():
            return None, position + BLOCK + padded(size)
        if is_short and name == block[:_NAME_BYTES] and split_name(name) is None:
            self.suspects.append(self.gap_at(BAD_HEADER, position, position + BLOCK + padded(size)))
        return (name, size), position

    def announce(self, kind: bytes, position: int, after: int) -> bool:
        """Notes an extended header; False if the same kind stands before the same member, so another one was lost."""
        before = self.extended if position == self.announced else b""
        if kind in before:
            return False
        self.extended = before + kind if kind != tarfile.XGLTYPE else before
        self.announced = after
        return True

    def extend(self, header: tarfile.TarInfo, position: int) -> bool:
        """Takes over the name and size that an extended header gives to the next member; False if it is malformed."""
        if header.size > _MAX_EXTENDED_HEADER:
            return False
        data = self.bytes_at(position + BLOCK, header.size)
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
            crc = crc32(part, crc)
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
            rest = _NONZERO.search(self.buffer, self.reach(end))
            end = self.base + (len(self.buffer) if rest is None else rest.start())
            if rest is not None:
                break
        if end >= self.file_size:
            # A header that announces the next member is not followed by the end.
            if position == self.announced or not _may_be_padding(self.file_size - position, self.file_size):
                self.gap(ZEROED_TAIL, position, self.file_size)
            elif self.file_size % BLOCK:
                self.gap(NO_BLOCKS, self.file_size, self.file_size)
            return None
        end -= end % BLOCK
        if end - position >= 2 * BLOCK and end % tarfile.RECORDSIZE == 0:
            # A full end marker, padded as writers pad it. What follows may be the rest of an older, longer file.
            hides_rows = self.next_header(end - 1)[0] is not None
            self.table.gaps.append(replace(self.gap_at(TRAILING, end, self.file_size), may_hide_rows=hides_rows))
            return None
        ended = end - position >= 2 * BLOCK and bool(self.table.offset)
        return self.resynchronise(ZEROED_HEADER, position, kind_if_last=TRAILING if ended else ZEROED_HEADER)

    def resynchronise(self, kind: str, position: int, kind_if_last: str | None = None) -> int | None:
        """The next valid header behind `position`, or None; notes the gap, less the zeros at the end of the file."""
        self.next_name = self.next_size = None
        start, end = self.next_header(position)
        self.gap(kind if start is not None else kind_if_last or kind, position, end)
        return start

    def next_header(self, position: int) -> tuple[int | None, int]:
        """The next valid header behind `position`, or None; and where the stretch that cannot be read ends."""
        magic = b"ustar"
        search = position + 1
        last_byte = search
        while search < self.file_size:
            first = self.reach(search)
            found = self.buffer.find(magic, first)
            while found >= 0:
                start = self.base + found - 257
                if position < start <= self.file_size - BLOCK and self.is_header(start):
                    return start, start
                found = self.buffer.find(magic, found + 1)
            used = len(self.buffer.rstrip(b"\0"))
            last_byte = self.base + used if used > first else last_byte
            search = max(search + 1, self.base + len(self.buffer) - len(magic) + 1)
        return None, min(self.file_size, position + padded(last_byte - position))

    def is_header(self, start: int) -> bool:
        """Whether a header begins at `start`."""
        relative = start - self.base
        if 0 <= relative <= len(self.buffer) - BLOCK and not may_be_header(self.buffer, relative):
            return False
        return parse_header(self.bytes_at(start, BLOCK)) is not None

    def gap(self, kind: str, start: int, end: int) -> None:
        self.table.gaps.append(self.gap_at(kind, start, end))

    def gap_at(self, kind: str, start: int, end: int) -> Gap:
        return Gap(kind=kind, start=min(start, end), end=end, rows_before=len(self.table.row_first))

    def note_cut_names(self) -> None:
        """Notes the members whose names fill their field and are no sample's, in a file with names that are longer.

        Such a name was cut off: the extended header with all of it was lost.
        """
        if self.has_long_names:
            self.table.gaps = sorted([*self.table.gaps, *self.suspects], key=lambda gap: gap.start)


def _may_be_padding(zeros: int, file_size: int) -> bool:
    """Whether a file may end with so many zeros although it is whole.

    Writers end with two zero blocks and pad to a multiple of 1 to 20 blocks (``tar -b``; 20 is usual). More zeros are
    rows that never reached the disk; tar with a blocking factor above 20 is reported too: nothing tells the two apart.
    """
    blocks, odd = divmod(file_size, BLOCK)
    factor = 1 if odd else max(factor for factor in range(1, 21) if blocks % factor == 0)
    return zeros < (2 + factor) * BLOCK
