"""The processes that open the same shards together."""

from __future__ import annotations

import threading
from typing import Any, Protocol


class Peers(Protocol):
    """The ranks of a run, which share the work of a start.

    Attributes:
        rank, size: Number of this process, and the number of all.
        stop: Set when another rank has failed: work that is going on is of no use any more.
    """

    rank: int
    size: int
    stop: threading.Event

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order. Waits for the slowest of them, however long it takes.

        Raises:
            Exception: Another rank has failed; the error is raised where the ranks meet.
        """
        ...


class Alone:
    """The only process, or one that works for itself."""

    rank, size = 0, 1

    def __init__(self, stop: threading.Event | None = None) -> None:
        self.stop = stop or threading.Event()

    def gather(self, value: Any) -> list[Any]:
        """The value itself."""
        return [value]
