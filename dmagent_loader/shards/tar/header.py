"""Tar headers: name, size and type of a member, and the sample that it belongs to."""

from __future__ import annotations

import re
import struct
import tarfile
import zlib

BLOCK = tarfile.BLOCKSIZE
PAX_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
EXTENDED_TYPES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *PAX_TYPES)
REFUSED_TYPES = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}

_FIELDS = struct.Struct("100s 24x 12s 12x 8s 1s 188x 1s")
"""Name, size, checksum, type, first byte of the prefix."""
_MAX_CACHED_FIELDS = 4096
_CHECKSUM_FIELD = re.compile(rb"[0-7 ]{6}[0-7 \0]{2}")
_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
}
_META = re.compile(r"__[^/]*__($|/)")


class QuickHeaders:
    """Fast parser for regular files with short names and for pax headers: nearly all headers of a shard.

    It takes a tenth of the time of `tarfile`. Size and checksum fields repeat from row to row, so parsed values are
    cached.
    """

    def __init__(self) -> None:
        self._sizes: dict[bytes, int] = {}
        self._sums: dict[bytes, int] = {}

    def parse(self, buffer: memoryview, offset: int) -> tuple[bytes, bytes, int] | None:
        """Type, name and size; None for any other header, valid or not."""
        name, size_field, sum_field, kind, prefix = _FIELDS.unpack_from(buffer, offset)
        if prefix != b"\0" or (kind != tarfile.REGTYPE and kind != tarfile.XHDTYPE):
            return None
        try:
            size = self._sizes.get(size_field)
            if size is None:
                size = _cache(self._sizes, size_field, int(size_field.rstrip(b"\0 "), 8))
            expected = self._sums.get(sum_field)
            if expected is None:
                total = int(sum_field[:6], 8) + sum(sum_field) - 8 * 32
                expected = _cache(self._sums, sum_field, (total + 1) % 65521)
        except ValueError:
            return None
        # The low half of adler32 is 1 + the sum of the bytes, which is the header checksum, computed in C.
        if (zlib.adler32(buffer[offset : offset + BLOCK]) & 0xFFFF) != expected or size < 0:
            return None
        return kind, name.partition(b"\0")[0], size


def _cache(values: dict[bytes, int], field: bytes, value: int) -> int:
    if len(values) >= _MAX_CACHED_FIELDS:
        values.clear()
    values[field] = value
    return value


def parse_header(block: bytes | bytearray) -> tarfile.TarInfo | None:
    """Parses any header with `tarfile`; None if its checksum or one of its numbers is invalid."""
    try:
        header = tarfile.TarInfo.frombuf(bytes(block), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return header if header.size >= 0 else None


def may_be_header(buffer: bytes | bytearray | memoryview, offset: int) -> bool:
    """Whether the 512 bytes at `offset` have a header checksum; takes a hundredth of the time of `parse_header`."""
    field = _CHECKSUM_FIELD.match(buffer, offset + 148)
    if field is None or offset + BLOCK > len(buffer):
        return False
    digits = field[0].rstrip(b"\0 ").strip()
    if not digits.isdigit():
        return False
    total = int(digits, 8) + sum(field[0]) - 8 * 32
    block = bytes(buffer[offset : offset + BLOCK])
    if zlib.adler32(block) & 0xFFFF == (total + 1) % 65521:
        return True
    # Some old writers summed signed bytes.
    return not block.isascii() and total == sum(block) - 256 * sum(byte >= 128 for byte in block)


def concerns_layout(pax: bytes | bytearray) -> bool:
    """Whether a pax header may concern name, size or layout; most hold only times and owners."""
    return b"path=" in pax or b"size=" in pax or b"GNU." in pax


def pax_records(data: bytes) -> dict[bytes, bytes]:
    """Parses the records of a pax header, lines of ``length key=value``.

    Raises:
        ValueError: A record is malformed.
    """
    records = {}
    position = 0
    while position < len(data) and data[position]:
        space = data.index(b" ", position)
        length = int(data[position:space])
        record = data[space + 1 : position + length]
        if (
            not space - position + 1 < length <= len(data) - position
            or not record.endswith(b"\n")
            or b"=" not in record
        ):
            raise ValueError("malformed pax record")
        key, _, value = record[:-1].partition(b"=")
        records[key] = value
        position += length
    if data and not records:
        raise ValueError("a pax header of zeros")
    return records


def compression_of(start: bytes) -> str | None:
    """The compression of a file that starts with these bytes; None if it has none that is known."""
    return next((name for magic, name in _COMPRESSIONS.items() if start.startswith(magic)), None)


def split_name(name: bytes) -> tuple[bytes, bytes] | None:
    """Key and lower-cased extension of a member; None if it belongs to no sample.

    These are webdataset's rules, except that hidden files never belong to a sample.

    Example:
        >>> split_name(b"a.b/c.seg.PNG"), split_name(b"__meta__/x.txt"), split_name(b"README"), split_name(b"a/._c.png")
        ((b'a.b/c', b'seg.png'), None, None, None)
    """
    start = name.rfind(b"/") + 1
    dot = name.find(b".", start)
    if dot > start and not name.startswith(b"__") and name.isascii() and b"\n" not in name:
        return name[:dot], name[dot + 1 :].lower()
    end = _key_end(name)
    if end is None or is_hidden(name) or _META.match(name.decode("utf-8", "surrogateescape")):
        return None
    extension = name[end + 1 :].decode("utf-8", "surrogateescape").lower()
    return name[:end], extension.encode("utf-8", "surrogateescape")


def split_name_at_last_dot(name: bytes) -> tuple[bytes, bytes] | None:
    """As `split_name`, but the key ends at the last dot of the name that is not that of ``.gz``.

    Example:
        >>> split_name_at_last_dot(b"arxiv.2101.00000.txt"), split_name_at_last_dot(b"a.b.json.gz")
        ((b'arxiv.2101.00000', b'txt'), (b'a.b', b'json.gz'))
    """
    parts = split_name(name)
    if parts is None:
        return None
    suffixes = 2 if parts[1].endswith(b".gz") else 1
    pieces = parts[1].rsplit(b".", suffixes)
    return parts if len(pieces) <= suffixes else (name.rsplit(b".", suffixes)[0], b".".join(pieces[1:]))


SPLIT_NAME = {"first-dot": split_name, "last-dot": split_name_at_last_dot}
"""Where the key of a sample ends -> function that splits the name of a member."""


def is_hidden(name: bytes) -> bool:
    """Whether a file is hidden: its name begins with a dot, as of files that macOS, git and editors leave behind."""
    return name.startswith(b".", name.rfind(b"/") + 1)


def _key_end(name: bytes) -> int | None:
    """End of the key by webdataset's ``^((?:.*/|)[^.]+)[.]([^/]*)$``, found in one pass.

    The regular expression itself takes hours on a name of a million slashes.
    """
    line_end = name.find(b"\n")
    reach = name.rfind(b"/", 0, line_end if line_end >= 0 else len(name))
    dot = name.find(b".", reach + 1)
    if dot < 0 or name.find(b"/", dot) >= 0:
        return None
    if dot == reach + 1:
        # The slash is followed by the dot: the key includes the folder, provided that has no dot.
        before = name.rfind(b"/", 0, max(reach, 0))
        if reach < 0 or name.find(b".", before + 1) < dot:
            return None
    return dot


def padded(size: int) -> int:
    """A size in bytes, rounded up to whole blocks."""
    return (size + BLOCK - 1) // BLOCK * BLOCK


def may_be_padding(zeros: int, file_size: int) -> bool:
    """Whether an intact file may end with this many zero bytes.

    Writers end with two zero blocks and pad to a multiple of 1 to 20 blocks (``tar -b``; 20 is usual). More zeros are
    rows that never reached the disk. A file with a blocking factor above 20 looks the same and is reported as well.
    """
    blocks, odd = divmod(file_size, BLOCK)
    factor = 1 if odd else max(factor for factor in range(1, 21) if blocks % factor == 0)
    return zeros < (2 + factor) * BLOCK
