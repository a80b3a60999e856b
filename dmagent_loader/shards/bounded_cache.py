"""A cache of open resources with a limit on their number or total weight."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

from dmagent_loader.shards import forks

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Entry(Generic[V]):
    __slots__ = ("used", "value")

    def __init__(self, value: V) -> None:
        self.value, self.used = value, False


class BoundedCache(Generic[K, V]):
    """Opens resources on demand and evicts those that were not used lately (the CLOCK policy).

    A hit takes no lock, so one thread may evict a resource that another one still uses: resources must close
    themselves when the last reference to them goes. A forked child starts with an empty cache.

    Args:
        open_one: Opens the resource of a key.
        limit: Largest total weight of the cached resources. Those that a thread is using come on top, and one resource
            is always kept.
        weigh: Returns the weight of a resource; None: each weighs 1.
    """

    def __init__(self, open_one: Callable[[K], V], limit: int, weigh: Callable[[V], int] | None = None) -> None:
        self._open_one, self._limit, self._weigh = open_one, limit, weigh or (lambda _: 1)
        self.clear()
        forks.register(self)

    def get(self, key: K) -> V:
        """Returns the resource of a key, opening it if necessary."""
        entry = self._entries.get(key)
        if entry is None:
            return self._add(key)
        entry.used = True
        return entry.value

    def get_all(self, keys: Iterable[K]) -> list[V]:
        """As `get`, for many keys; faster than a call for each."""
        entries, found = self._entries, []
        for key in keys:
            entry = entries.get(key)
            if entry is None:
                found.append(self._add(key))
            else:
                entry.used = True
                found.append(entry.value)
        return found

    def if_open(self, key: K) -> V | None:
        """The resource of a key if it is open; nothing is opened."""
        entry = self._entries.get(key)
        return None if entry is None else entry.value

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def drop(self, key: K) -> None:
        """Drops the resource of a key, if there is one."""
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self._weight -= self._weigh(entry.value)

    def clear(self) -> None:
        """Drops all resources; a later `get` opens them again."""
        self._entries: dict[K, _Entry[V]] = {}
        self._weight = 0
        self._lock = threading.Lock()

    def reset_after_fork(self) -> None:
        """Starts empty and with a lock of its own in a forked child."""
        self.clear()

    def _add(self, key: K) -> V:
        value = self._open_one(key)
        weight = self._weigh(value)
        with self._lock:
            # Oldest first; an entry that was used since the last look at it moves to the end once more.
            while self._entries and self._weight + weight > self._limit:
                oldest = next(iter(self._entries))
                entry = self._entries.pop(oldest)
                if entry.used:
                    entry.used = False
                    self._entries[oldest] = entry
                else:
                    self._weight -= self._weigh(entry.value)
            if key not in self._entries:  # another thread may have been faster
                self._entries[key] = _Entry(value)
                self._weight += weight
        return value
