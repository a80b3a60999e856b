"""Ranks without processes."""

from __future__ import annotations

import threading
from typing import Any


class ThreadPeers:
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, size: int, values: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.stop = rank, size, threading.Event()
        self._values, self._barrier = values, barrier

    def gather(self, value: Any) -> list[Any]:
        self._values[self.rank] = value
        self._barrier.wait(timeout=60)
        found = list(self._values)
        self._barrier.wait(timeout=60)
        return found
