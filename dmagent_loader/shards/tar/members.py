"""The result of a scan: members that belong to samples, and gaps where the file is damaged."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from dmagent_loader.errors import ShardLayoutError
from dmagent_loader.shards.sources.checksum import crc32
from dmagent_loader.shards.tar.header import BLOCK

BAD_HEADER = "header overwritten"
ZEROED_HEADER = "header zeroed"
NO_END = "cut at a record boundary"
CUT_HEADER = "cut inside a header"
CUT_PAYLOAD = "cut inside a member"
TRAILING = "bytes after the end of the archive"
ZEROED_TAIL = "zeros up to the end of the file"
NO_BLOCKS = f"its size is no multiple of {BLOCK} bytes"
"""A tar consists of whole blocks, so bytes were lost or inserted in the last member or after it."""
CUTS = (NO_END, CUT_HEADER, CUT_PAYLOAD, ZEROED_TAIL, NO_BLOCKS)
"""Kinds of damage that hide how large the file once was."""

_MAX_EXTENSIONS = 1 << 16
_SHOWN_BYTES = 100


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A stretch of a file without a readable member.

    Attributes:
        kind: One of the kinds above.
        start, end: Span in bytes.
        rows_before: Number of rows that begin before the gap.
        may_hide_rows: The gap contains readable members that may or may not belong to the shard.
        reaches_back: The bytes before the gap show that the member there is damaged, too.
    """

    kind: str
    start: int
    end: int
    rows_before: int
    may_hide_rows: bool = False
    reaches_back: bool = False


class MemberTable:
    """The members of a shard that belong to samples, in columns (M members, R rows).

    Attributes:
        offset, size: (M,) span of each payload in bytes.
        extension: (M,) index into `extensions`.
        extensions: Distinct extensions, lower-cased.
        row_first: (R,) first member of each row.
        row_crc: (R,) crc32 over the payloads of each row, in order.
        keys: Keys of all rows, concatenated.
        key_end: (R,) end of each key in `keys`.
        key_hash: (R,) hash of each key.
        hidden: Number of hidden files, which belong to no row.
    """

    def __init__(self, url: str) -> None:
        self.offset, self.size, self.extension = array("q"), array("q"), array("H")
        self.extensions: list[bytes] = []
        self.row_first, self.row_crc, self.key_end, self.key_hash = array("q"), array("I"), array("q"), array("q")
        self.keys = bytearray()
        self.hidden = 0
        self._url = url
        self._numbers: dict[bytes, int] = {}
        self._key: bytes | None = None
        self._seen: set[int] = set()

    def add(self, key: bytes, extension: bytes, offset: int, size: int) -> int:
        """Adds a member.

        Args:
            key: Key of its sample.
            extension: Its extension, lower-cased.
            offset, size: Span of its payload in bytes.

        Returns:
            The crc32 of the row before this member.

        Raises:
            ShardLayoutError: The row already has this extension, the extension is reserved, or there are too many.
        """
        number = self._number(extension, key, offset)
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

    def add_all(
        self,
        keys: Sequence[bytes],
        extensions: Sequence[bytes],
        offset: NDArray[np.int64],
        size: NDArray[np.int64],
        payloads: Iterable[memoryview],
    ) -> None:
        """Adds members that follow one another, and their bytes to the checksums of their rows.

        Args:
            keys: n keys of their samples.
            extensions: n extensions, lower-cased.
            offset, size: (n,) spans of their payloads in bytes.
            payloads: n payloads.

        Raises:
            ShardLayoutError: See `add`.
        """
        known = self._numbers
        begins = [key != before for key, before in zip(keys, (self._key, *keys), strict=False)]
        first = np.flatnonzero(begins)
        try:
            if not known.keys() >= set(extensions):
                for extension, key, start in zip(extensions, keys, offset.tolist(), strict=True):
                    self._number(extension, key, start)
            numbers = [known[extension] for extension in extensions]
            continued = int(first[0]) if len(first) else len(keys)
            is_refused = len(first) < len(keys) and self._have_twice(begins, numbers, continued)
        except ShardLayoutError:
            is_refused = True
        if is_refused:
            for key, extension, start, length in zip(keys, extensions, offset.tolist(), size.tolist(), strict=True):
                self.add(key, extension, start, length)  # which raises the error of the first one
            raise AssertionError("unreachable")
        if len(first) == len(keys):
            self.row_crc.extend(map(crc32, payloads))
        else:
            for begins_row, payload in zip(begins, payloads, strict=True):
                if begins_row:
                    self.row_crc.append(crc32(payload))
                else:
                    self.row_crc[-1] = crc32(payload, self.row_crc[-1])
        new_keys = list(compress(keys, begins))
        self.row_first.frombytes((len(self.offset) + first).tobytes())
        self.key_end.frombytes((len(self.keys) + np.cumsum(list(map(len, new_keys)), dtype=np.int64)).tobytes())
        self.keys += b"".join(new_keys)
        self.key_hash.extend(map(hash, new_keys))
        self.offset.frombytes(offset.tobytes())
        self.size.frombytes(size.tobytes())
        self.extension.extend(numbers)
        self._key = keys[-1]
        if len(first):
            self._seen = set(numbers[first[-1] :])
        else:
            self._seen.update(numbers)

    def _have_twice(self, begins: Sequence[bool], numbers: Sequence[int], continued: int) -> bool:
        """Whether a row would have an extension twice.

        Args:
            begins: n times, whether a member begins a row.
            numbers: n numbers of their extensions.
            continued: The number of members before the first one that begins a row.
        """
        if not self._seen.isdisjoint(numbers[:continued]):
            return True
        members = np.cumsum(begins) * _MAX_EXTENSIONS + numbers
        return len(np.unique(members)) < len(members)

    def _number(self, extension: bytes, key: bytes, offset: int) -> int:
        """The number of an extension; those of a new one are checked."""
        number = self._numbers.get(extension)
        if number is not None:
            return number
        if extension.startswith(b"__") and extension.endswith(b"__"):
            raise ShardLayoutError(
                f"shard {self._url}: key {shown(key)!r} has a member {shown(extension)!r}, a name that is "
                "reserved for tags of a sample, such as __index__: rename it when the shard is written"
            )
        if len(self.extensions) == _MAX_EXTENSIONS:
            raise ShardLayoutError(
                f"shard {self._url}: more than {_MAX_EXTENSIONS} different extensions, the last one "
                f"{shown(extension)!r} (key {shown(key)!r}, byte {offset - BLOCK}): the key of a sample ends at "
                "the first dot of its name; for names with dots in them, pass "
                "reading=ReadingConfig(key_ends_at='last-dot') (--key-ends-at last-dot)"
            )
        number = self._numbers[extension] = len(self.extensions)
        self.extensions.append(extension)
        return number


def shown(name: bytes) -> str:
    """A member name for a message, shortened if it is long."""
    return (name if len(name) <= _SHOWN_BYTES else name[:_SHOWN_BYTES] + b"...").decode("utf-8", "replace")
