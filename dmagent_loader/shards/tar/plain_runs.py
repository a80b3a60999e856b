"""Runs of plain members in a buffer, parsed together: nearly all members of nearly all shards.

Everything else ends a run, and the scanner looks at it by itself: damage, long names, links, files that belong to no
sample, and members that extend beyond the buffer. So a run only ever holds what `QuickHeaders` would accept.

Shapes: n members of a run, h headers.
"""

from __future__ import annotations

import struct
import tarfile
from collections.abc import Callable
from operator import gt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dmagent_loader.shards.tar.header import BLOCK, concerns_layout, padded, split_name

SplitName = Callable[[bytes], tuple[bytes, bytes] | None]

_FEWEST_MEMBERS = 64
"""Shorter runs take less time member by member."""
_FEWEST_SKIPPED, _MOST_SKIPPED = 8, 1024
_MOST_CACHED_SIZES = 4096
_NAME_BYTES, _SIZE_AT, _SUM_AT, _PREFIX_AT = 100, 124, 148, 345
_SIZE_AND_TYPE = struct.Struct("12s 20x 1s")
_OCTAL = 8 ** np.arange(5, -1, -1)


class PlainRun(NamedTuple):
    """Members of samples that follow one another.

    Attributes:
        keys, extensions: n keys of their samples, and extensions in lower case.
        offset, size: (n,) spans of their payloads in the buffer.
        end: Position in the buffer of the header behind them.
    """

    keys: list[bytes]
    extensions: list[bytes]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    end: int


class _Walk(NamedTuple):
    """Headers that follow one another by their types and sizes, and are not checked yet.

    Attributes:
        members, sizes: Positions of the headers of members, and sizes of these.
        extended, owners, records: Positions of the pax headers of some members; numbers of these; the records.
    """

    members: list[int]
    sizes: list[int]
    extended: list[int]
    owners: list[int]
    records: list[bytes]


class PlainRuns:
    """Finds the runs of one file.

    Args:
        split: Function that splits the name of a member, see `SPLIT_NAME`.
    """

    def __init__(self, split: SplitName) -> None:
        self._split = split
        self._sizes: dict[bytes, int] = {}
        self._skipped = self._to_skip = 0
        """Headers for which no run is looked for, after one was too short."""
        self._most = 2 * _FEWEST_MEMBERS
        """Most members to look at: twice the length of the last run, since irregular members may be frequent."""

    def find(self, buffer: memoryview, begin: int) -> PlainRun | None:
        """The run that begins with the header at `begin`; None if there is none worth parsing as a run."""
        if self._to_skip:
            self._to_skip -= 1
            return None
        run = self._run(buffer, begin)
        self._most = 2 * max(_FEWEST_MEMBERS, 0 if run is None else len(run.keys))
        self._skipped = 0 if run is not None else min(_MOST_SKIPPED, max(_FEWEST_SKIPPED, 2 * self._skipped))
        self._to_skip = self._skipped
        return run

    def _run(self, buffer: memoryview, begin: int) -> PlainRun | None:
        members, sizes, extended, owners, records = self._walk(buffer, begin)
        count = len(members)
        if count < _FEWEST_MEMBERS:
            return None
        position = np.array(members + extended)
        last = int(position.max())
        blocks = np.frombuffer(buffer[begin : last + BLOCK], np.uint8).reshape(-1, BLOCK)
        headers = blocks[(position - begin) // BLOCK]
        is_valid = _are_valid(headers)
        is_valid[count:] &= _are_harmless(records)
        invalid = np.append(np.flatnonzero(~is_valid[:count]), np.array(owners, np.int64)[~is_valid[count:]])
        names = headers[:count, :_NAME_BYTES]
        length = np.count_nonzero(names, axis=1)
        # The first zero ends a name. It must be the first of zeros only, and a name that fills the field may be cut.
        odd = np.flatnonzero((length == _NAME_BYTES) | ((names != 0).argmin(axis=1) != length))
        count = int(min([count, *invalid.tolist(), *odd.tolist()]))
        keys, extensions = self._split_names(names[:count, : int(length[:count].max(initial=1))])
        count = len(keys)
        if count < _FEWEST_MEMBERS:
            return None
        size = np.array(sizes[:count])
        end = members[count - 1] + BLOCK + padded(sizes[count - 1])
        return PlainRun(keys, extensions, position[:count] + BLOCK, size, end)

    def _walk(self, buffer: memoryview, begin: int) -> _Walk:
        """Goes from header to header, by their types and sizes alone."""
        members: list[int] = []
        sizes: list[int] = []
        extended: list[int] = []
        owners: list[int] = []
        records: list[bytes] = []
        known, unpack, length = self._sizes, _SIZE_AND_TYPE.unpack_from, len(buffer)
        position, follows_extended = begin, False
        while position + BLOCK <= length and len(members) < self._most:
            field, kind = unpack(buffer, position + _SIZE_AT)
            size = known.get(field)
            if size is None:
                try:
                    size = int(field.rstrip(b"\0 "), 8)
                except ValueError:
                    break
                if size < 0:
                    break
                if len(known) == _MOST_CACHED_SIZES:
                    known.clear()
                known[field] = size
            start = position + BLOCK
            if start + size > length:
                break
            if kind == tarfile.REGTYPE:
                members.append(position)
                sizes.append(size)
                follows_extended = False
            elif kind == tarfile.XHDTYPE and not follows_extended:
                extended.append(position)
                records.append(bytes(buffer[start : start + size]))
                owners.append(len(members))
                follows_extended = True
            else:
                break
            position = start + (size + BLOCK - 1) // BLOCK * BLOCK  # `padded`, without a call for each member
        if follows_extended:  # its member is not part of the run
            del extended[-1], owners[-1], records[-1]
        return _Walk(members, sizes, extended, owners, records)

    def _split_names(self, names: NDArray[np.uint8]) -> tuple[list[bytes], list[bytes]]:
        """Keys and extensions, up to the first name of no sample.

        Args:
            names: (n, w) names, filled up with zeros.
        """
        text = names.tobytes()
        whole: list[bytes] = np.frombuffer(text, f"S{names.shape[1]}").tolist()
        # The first rule of `split_name`, for all names at once.
        if self._split is split_name and text.isascii() and b"\n" not in text and b"__" not in text:
            begins = [name.rfind(b"/") + 1 for name in whole] if b"/" in text else [0] * len(whole)
            dots = [name.find(b".", begin) for name, begin in zip(whole, begins, strict=True)]
            if all(map(gt, dots, begins)):
                keys = [name[:dot] for name, dot in zip(whole, dots, strict=True)]
                return keys, [name[dot + 1 :].lower() for name, dot in zip(whole, dots, strict=True)]
        keys, extensions = [], []
        for name in whole:
            parts = self._split(name)
            if parts is None:
                break
            keys.append(parts[0])
            extensions.append(parts[1])
        return keys, extensions


def is_harmless(records: bytes | bytearray) -> bool:
    """Whether the records of a pax header change neither name nor size of the member.

    A quick test for the form of pax records; the scanner parses everything else.
    """
    return records[:1].isdigit() and records.endswith(b"\n") and not concerns_layout(records)


def _are_harmless(headers: list[bytes]) -> NDArray[np.bool_]:
    """`is_harmless` for the records of many headers."""
    if concerns_layout(b"".join(headers)):
        return np.array([is_harmless(records) for records in headers], bool)
    return np.array([records[:1].isdigit() and records.endswith(b"\n") for records in headers], bool)


def _are_valid(headers: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which headers, (h, 512), have the right checksum, as six octal digits, and no prefix of their name."""
    digits = headers[:, _SUM_AT : _SUM_AT + 6] - np.uint8(ord("0"))
    field = headers[:, _SUM_AT : _SUM_AT + 8].sum(axis=1, dtype=np.int64)
    total = headers.sum(axis=1, dtype=np.uint32) - field + 8 * ord(" ")
    are_digits = np.count_nonzero(digits < 8, axis=1) == digits.shape[1]
    valid: NDArray[np.bool_] = are_digits & (digits @ _OCTAL == total) & (headers[:, _PREFIX_AT] == 0)
    return valid
