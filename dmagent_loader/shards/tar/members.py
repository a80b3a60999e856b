"""What one pass over a tar file finds: the members that belong to samples, and the places where it is damaged."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from dmagent_loader.errors import ShardLayoutError
from dmagent_loader.shards.tar.header import BLOCK

BAD_HEADER = "header overwritten"
ZEROED_HEADER = "header zeroed"
NO_END = "cut at a record boundary"
CUT_HEADER = "cut inside a header"
CUT_PAYLOAD = "cut inside a member"
TRAILING = "bytes after the end of the archive"
ZEROED_TAIL = "zeros up to the end of the file"
NO_BLOCKS = f"its size is no multiple of {BLOCK} bytes"
"""A tar is written in blocks: bytes are missing, or were inserted, in the last member or behind it."""
CUTS = (NO_END, CUT_HEADER, CUT_PAYLOAD, ZEROED_TAIL, NO_BLOCKS)
"""Kinds of damage after which nobody can say how much the file once held."""

_MAX_EXTENSIONS = 1 << 16
_SHOWN_BYTES = 100


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A stretch of a shard without a readable member.

    Attributes:
        kind: One of the kinds named in this file.
        start, end: Byte span.
        rows_before: Rows that begin before it.
        may_hide_rows: Members can be read in it, but nobody knows whether they belong to the shard.
    """

    kind: str
    start: int
    end: int
    rows_before: int
    may_hide_rows: bool = False


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
        self._seen: set[int] = set()

    def add(self, key: bytes, extension: bytes, offset: int, size: int) -> int:
        """Notes a member; returns the crc32 of its row so far.

        Raises:
            ShardLayoutError: The row has that extension already, it is reserved, or there are too many different ones.
        """
        number = self._numbers.get(extension)
        if number is None:
            if extension.startswith(b"__") and extension.endswith(b"__"):
                raise ShardLayoutError(
                    f"shard {self._url}: key {shown(key)!r} has a member {shown(extension)!r}, a name that is kept for "
                    "what is said about a sample, such as __index__: rename it when the shard is written"
                )
            if len(self.extensions) == _MAX_EXTENSIONS:
                raise ShardLayoutError(
                    f"shard {self._url}: more than {_MAX_EXTENSIONS} different extensions, the last one "
                    f"{shown(extension)!r} (key {shown(key)!r}, byte {offset - BLOCK}): the key of a sample ends at "
                    "the first dot of its name, so names with dots in them need others when the shard is written"
                )
            number = self._numbers[extension] = len(self.extensions)
            self.extensions.append(extension)
        if key != self._key:
            self._key = key
            self._seen = {number}
            self.row_first.append(len(self.offset))
            self.row_crc.append(0)
            self.keys += key
            self.key_end.append(len(self.keys))
            self.key_hash.append(hash(key))
        elif number in self._seen:
            raise ShardLayoutError(
                f"shard {self._url}: row {len(self.row_first) - 1} (key {shown(key)!r}) has the extension "
                f"{shown(extension)!r} twice (again at byte {offset - BLOCK}), so one of the two members would be "
                "lost: give every sample a key of its own"
            )
        else:
            self._seen.add(number)
        self.offset.append(offset)
        self.size.append(size)
        self.extension.append(number)
        return self.row_crc[-1]


def shown(name: bytes) -> str:
    """A name for a message, cut if it is long."""
    return (name if len(name) <= _SHOWN_BYTES else name[:_SHOWN_BYTES] + b"...").decode("utf-8", "replace")
