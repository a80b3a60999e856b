"""Blocks that nobody has asked for, which come with a request for those before them."""

from __future__ import annotations

_SHARE = 1 / 16
"""Bytes of spare blocks for each byte that was asked for."""


class Spares:
    """Which spare blocks a process has fetched, and whether it may fetch more; guarded by the lock of the fetcher."""

    def __init__(self) -> None:
        self._lengths: dict[int, int] = {}
        """Key -> bytes of each block that was fetched although nobody had asked for it, and has not paid off yet."""
        self._bytes = self._asked_bytes = 0

    def count_asked(self, length: int) -> None:
        """Counts the bytes of a block that was asked for; less than 0: it was given up before it was fetched."""
        self._asked_bytes += length

    def add(self, key: int, length: int) -> bool:
        """Whether a block may come although nobody has asked for it, which is then noted."""
        if key in self._lengths or self._bytes + length > _SHARE * self._asked_bytes:
            return False
        self._lengths[key] = length
        self._bytes += length
        return True

    def remove(self, key: int) -> None:
        """Forgets a block, if it is noted: somebody has asked for it and found it, or it did not come."""
        self._bytes -= self._lengths.pop(key, 0)
