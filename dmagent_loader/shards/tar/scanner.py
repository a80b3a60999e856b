"""One pass over a tar file that finds every member and every damaged place.

Reading a tar as a stream loses data silently: a zeroed or overwritten header, or a cut between two members, looks like
the end of the archive. Here the end has to be proven (a zero block, then nothing but zeros), and after damage the scan
resumes at the next header with a valid checksum.
"""

from __future__ import annotations

import re
import tarfile
import threading
from collections.abc import Callable
from typing import Literal, Protocol

from dmagent_loader.errors import ShardLayoutError
from dmagent_loader.shards.sources.checksum import crc32
from dmagent_loader.shards.sources.local import Source
from dmagent_loader.shards.sources.urls import display_url
from dmagent_loader.shards.tar.header import (
    BLOCK,
    EXTENDED_TYPES,
    PAX_TYPES,
    REFUSED_TYPES,
    SPLIT_NAME,
    QuickHeaders,
    compression_of,
    is_hidden,
    may_be_header,
    may_be_padding,
    padded,
    parse_header,
    pax_records,
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
from dmagent_loader.shards.tar.plain_runs import PlainRun, PlainRuns, is_harmless

KeyEnd = Literal["first-dot", "last-dot"]

_CHUNK_BYTES = 4 << 20
_NAME_BYTES = 100
_MAX_EXTENDED_HEADER = 1 << 20
_NONZERO = re.compile(rb"[^\0]")
_ZERO_BLOCK = bytes(BLOCK)
_OF_ZEROS = (ZEROED_HEADER, ZEROED_TAIL)
_DOUBTFUL_ZEROS = 8
"""Zeros at the end of a member that are hardly its own before a gap of zeros; one, where bytes were lost."""
_MAGIC_BYTES = 6


class Digest(Protocol):
    """A hash object, as `hashlib.sha256()` returns it."""

    def update(self, data: memoryview, /) -> None:
        """Hashes more bytes."""
        ...


class ScanStopped(Exception):
    """The scan was stopped before its end (Ctrl-C)."""


def scan(
    url: str,
    source: Source,
    size: int,
    *,
    advance: Callable[[int], object] | None = None,
    stop: threading.Event | None = None,
    digest: Digest | None = None,
    key_ends_at: KeyEnd = "first-dot",
) -> tuple[MemberTable, list[Gap]]:
    """Finds all members of a tar file.

    Args:
        url: URL of the file, for messages.
        source: The open file.
        size: Length of the file in bytes.
        advance: Called with the number of bytes scanned since the last call.
        stop: Ends the scan with `ScanStopped` when set.
        digest: Updated with all bytes of the file, in order.
        key_ends_at: The dot of a name at which the key of its sample ends.

    Returns:
        The members that belong to samples, and the damaged places, in the order of the file.

    Raises:
        ScanStopped: `stop` was set.
        ShardLayoutError: The file is compressed, contains links or devices, or a sample has an extension twice.
    """
    scanner = _Scanner(display_url(url), source, size, advance, stop, digest, key_ends_at)
    scanner.refuse_compressed()
    scanner.run()
    scanner.add_cut_names()
    scanner.hash_up_to(size)
    if advance is not None:
        advance(size - scanner.reported)
    return scanner.members, scanner.gaps


class _Scanner:
    """The state of one scan: a buffer over part of the file, and what the headers so far say about the next member.

    Attributes:
        members, gaps: Result of the scan.
        suspects: Members whose names may have been cut off (`add_cut_names`).
        base, buffer, view: Offset of the buffer in the file, its bytes, and a view of them.
        hashed, reported: Bytes passed to the digest and to `advance`.
        next_name, next_size: Name and size that an extended header gives to the next member.
        announced: Offset of the header that the last extended header belongs to.
        extended: Kinds of the extended headers before it.
        has_long_names: Some names are longer than their field.
    """

    def __init__(
        self,
        url: str,
        source: Source,
        size: int,
        advance: Callable[[int], object] | None,
        stop: threading.Event | None,
        digest: Digest | None,
        key_ends_at: KeyEnd,
    ) -> None:
        self.split_name = SPLIT_NAME[key_ends_at]
        self.url = url
        self.source = source
        self.file_size = size
        self.advance = advance
        self.stop = stop
        self.digest = digest
        self.members = MemberTable(url)
        self.gaps: list[Gap] = []
        self.suspects: list[Gap] = []
        self.base = 0
        self.buffer = bytearray()
        self.view = memoryview(self.buffer)
        self.hashed = 0
        self.reported = 0
        self.next_name: bytes | None = None
        self.next_size: int | None = None
        self.announced = -1
        self.extended = b""
        self.has_long_names = False

    def load(self, offset: int) -> None:
        """Fills the buffer with the bytes from `offset`."""
        if self.stop is not None and self.stop.is_set():
            raise ScanStopped
        if self.advance is not None and offset > self.reported:
            self.advance(offset - self.reported)
            self.reported = offset
        self.view, self.buffer = memoryview(b""), bytearray()  # freed first: its memory is used again
        self.buffer = self.source.read(offset, min(_CHUNK_BYTES, self.file_size - offset))
        self.view = memoryview(self.buffer)
        self.base = offset
        if self.digest is not None:
            self.hash_up_to(offset)
            self.digest.update(self.view[self.hashed - offset :])
            self.hashed = max(self.hashed, offset + len(self.buffer))

    def hash_up_to(self, end: int) -> None:
        """Hashes bytes that the scan skipped."""
        while self.digest is not None and self.hashed < end:
            part = self.source.read(self.hashed, min(_CHUNK_BYTES, end - self.hashed))
            self.digest.update(memoryview(part))
            self.hashed += len(part)

    def reach(self, position: int) -> int:
        """Position of a byte in the buffer, which is refilled if necessary."""
        if not self.base <= position < self.base + len(self.buffer):
            self.load(position)
        return position - self.base

    def bytes_at(self, position: int, length: int) -> bytes:
        """Bytes from the buffer, or from the file if the buffer does not hold all of them."""
        relative = position - self.base
        if 0 <= relative <= len(self.buffer) - length:
            return bytes(self.view[relative : relative + length])
        return bytes(self.source.read(position, length))

    def run(self) -> None:
        """Scans the file up to its end, or up to damage after which nothing more can be read."""
        position = 0
        members, split_name = self.members, self.split_name
        parse, runs = QuickHeaders().parse, PlainRuns(split_name)
        while True:
            relative = position - self.base
            if not 0 <= relative <= len(self.buffer) - BLOCK:
                if position + BLOCK > self.file_size:
                    self.gap(CUT_HEADER if position < self.file_size else NO_END, position, self.file_size)
                    return
                self.load(position)
                relative = 0
            is_plain = self.next_name is None and self.next_size is None
            # No run begins where an extended header announced a member: it would not notice that the member was lost.
            run = runs.find(self.view, relative) if is_plain and position != self.announced else None
            if run is not None:
                position = self.add_run(run)
                continue
            quick = parse(self.view, relative)
            if (
                quick is not None
                and quick[0] == tarfile.REGTYPE
                and is_plain
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
                crc = members.add(parts[0], parts[1], start, size)
                if end <= self.base + len(self.buffer):
                    crc = crc32(self.view[start - self.base : end - self.base], crc)
                else:
                    crc = self.long_crc(start, end, crc)
                members.row_crc[-1] = crc
            elif is_hidden(name):
                members.hidden += 1
            position = start + padded(size)

    def add_run(self, run: PlainRun) -> int:
        """Adds the members of a run; returns the position of the header behind them."""
        begins, view = run.offset.tolist(), self.view
        # One at a time, because many views would wake the garbage collector.
        payloads = (view[begin:end] for begin, end in zip(begins, (run.offset + run.size).tolist(), strict=True))
        self.members.add_all(run.keys, run.extensions, self.base + run.offset, run.size, payloads)
        return self.base + run.end

    def is_harmless(self, relative: int, size: int) -> bool:
        """Whether the records of a pax header are in the buffer and change neither name nor size of the member."""
        return relative + padded(size) <= len(self.buffer) and is_harmless(self.buffer[relative : relative + size])

    def special_header(self, block: bytearray, position: int) -> tuple[tuple[bytes, int] | None, int] | None:
        """Handles everything but a plain header of a member.

        Returns:
            ((name, size), position of its header) of a member; (None, position of the next header) of anything else;
            None if nothing more can be read.
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
        is_full = is_short and name == block[:_NAME_BYTES]
        if is_full and self.split_name(name) is None and not is_hidden(name):
            self.suspects.append(self.gap_at(BAD_HEADER, position, position + BLOCK + padded(size)))
        return (name, size), position

    def announce(self, kind: bytes, position: int, after: int) -> bool:
        """Records an extended header; False if its member already has one of this kind, so a member was lost."""
        before = self.extended if position == self.announced else b""
        if kind in before:
            return False
        self.extended = before + kind if kind != tarfile.XGLTYPE else before
        self.announced = after
        return True

    def extend(self, header: tarfile.TarInfo, position: int) -> bool:
        """Applies an extended header to the next member; False if the header is malformed."""
        if header.size > _MAX_EXTENDED_HEADER:
            return False
        data = self.bytes_at(position + BLOCK, header.size)
        if header.type == tarfile.GNUTYPE_LONGNAME:
            name = self.next_name = data.partition(b"\0")[0]
            # Zeroed blocks shorten a name to whole blocks, or to nothing.
            return len(name) % BLOCK > 0 or len(name) >= header.size - 1 > 0
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
        """The crc32 of a payload that extends beyond the buffer."""
        while start < end:
            self.load(start)
            part = self.view[: end - start]
            crc = crc32(part, crc)
            start += len(part)
        return crc

    def refuse_compressed(self) -> None:
        """Raises ShardLayoutError if the file begins like a compressed one."""
        compression = compression_of(self.bytes_at(0, min(_MAGIC_BYTES, self.file_size)))
        if compression is not None:
            raise ShardLayoutError(
                f"shard {self.url} is compressed ({compression}), so its rows cannot be read by position: unpack it to "
                "a plain .tar (for example `gunzip` or `zstd -d`); compress single members instead if space matters "
                "(.json.gz)"
            )

    def zeros(self, position: int) -> int | None:
        """Position of the next header after a zero block; None if the block is the end of the archive."""
        end = position
        while end < self.file_size:
            first = self.reach(end)  # which may load another buffer
            rest = _NONZERO.search(self.buffer, first)
            end = self.base + (len(self.buffer) if rest is None else rest.start())
            if rest is not None:
                break
        if end >= self.file_size:
            # The end cannot follow an extended header, which announces a member.
            reaches_back = self.is_member_damaged(position, ZEROED_TAIL)
            if position == self.announced or not may_be_padding(self.file_size - position, self.file_size):
                self.gap(ZEROED_TAIL, position, self.file_size, reaches_back=reaches_back)
            elif self.file_size % BLOCK:
                self.gap(NO_BLOCKS, self.file_size, self.file_size, reaches_back=reaches_back)
            return None
        end -= end % BLOCK
        if end - position >= 2 * BLOCK and end % tarfile.RECORDSIZE == 0:
            # A full end marker, padded as writers pad it. The rest may belong to an older, longer file.
            hides_rows = self.next_header(end - 1)[0] is not None
            self.gap(TRAILING, end, self.file_size, may_hide_rows=hides_rows)
            return None
        ended = end - position >= 2 * BLOCK and bool(self.members.offset)
        return self.resynchronise(ZEROED_HEADER, position, kind_if_last=TRAILING if ended else ZEROED_HEADER)

    def resynchronise(self, kind: str, position: int, kind_if_last: str | None = None) -> int | None:
        """Records a gap, less zeros at the end of the file; returns the position of the next valid header, or None."""
        self.next_name = self.next_size = None
        start, end = self.next_header(position)
        is_shifted = start is not None and (end - position) % BLOCK > 0
        kind = kind if start is not None else kind_if_last or kind
        self.gap(kind, position, end, reaches_back=self.is_member_damaged(position, kind, is_shifted=is_shifted))
        return start

    def is_member_damaged(self, end: int, kind: str, *, is_shifted: bool = False) -> bool:
        """Whether the member that ends where a gap begins shows that the damage began in it.

        Its padding is no zeros if its end was overwritten, or bytes were inserted or removed in it. Zeros at its own
        end are in doubt where the gap is of zeros, too. `is_shifted`: the next header is not whole blocks away.
        """
        size = self.members.size[-1] if self.members.size else 0
        if not size or self.members.offset[-1] + padded(size) != end:
            return False
        last = self.bytes_at(end - BLOCK, BLOCK)
        used = (size - 1) % BLOCK + 1
        zeros = 1 if self.file_size % BLOCK else min(used, _DOUBTFUL_ZEROS)
        return is_shifted or any(last[used:]) or (kind in _OF_ZEROS and not any(last[used - zeros : used]))

    def next_header(self, position: int) -> tuple[int | None, int]:
        """Position of the next valid header after `position`, or None; and the end of the unreadable stretch."""
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
        """Whether a valid header begins at `start`."""
        relative = start - self.base
        if 0 <= relative <= len(self.buffer) - BLOCK and not may_be_header(self.buffer, relative):
            return False
        return parse_header(self.bytes_at(start, BLOCK)) is not None

    def gap(self, kind: str, start: int, end: int, **facts: bool) -> None:
        """Records a gap, with its other attributes."""
        self.gaps.append(self.gap_at(kind, start, end, **facts))

    def gap_at(self, kind: str, start: int, end: int, **facts: bool) -> Gap:
        """A gap behind the rows so far."""
        return Gap(kind=kind, start=min(start, end), end=end, rows_before=len(self.members.row_first), **facts)

    def add_cut_names(self) -> None:
        """Records as gaps the members that lost the extended header with their full name.

        Such a name fills its field, belongs to no sample, and lies in a file where other names are longer.
        """
        if self.has_long_names:
            self.gaps = sorted([*self.gaps, *self.suspects], key=lambda gap: gap.start)
