"""A bounded number of things that are kept open; of those not used lately one is let go for each new one."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Kept(Generic[V]):
    __slots__ = ("used", "value")

    def __init__(self, value: V) -> None:
        self.value, self.used = value, False


class Recent(Generic[K, V]):
    """Opens what is asked for, and keeps the most recent.

    Nothing is locked when a thing is there already, so a thread may still use one that another thread lets go: values
    have to close themselves when the last reference goes. A forked child begins with nothing and a lock of its own.

    Args:
        open_one: Opens the thing of a key.
        limit: Most that are kept; those in use by a thread count on top.
    """

    def __init__(self, open_one: Callable[[K], V], limit: int) -> None:
        self._open_one, self.limit = open_one, max(1, limit)
        self.clear()
        _everywhere.add(self)

    def get(self, key: K) -> V:
        """The thing of a key; opened if need be."""
        kept = self._kept.get(key)
        if kept is None:
            return self._add(key)
        kept.used = True
        return kept.value

    def clear(self) -> None:
        """Lets all go; a later `get` opens again."""
        self._kept: dict[K, _Kept[V]] = {}
        self._lock = threading.Lock()

    def _add(self, key: K) -> V:
        value = self._open_one(key)
        with self._lock:
            # In the order of opening; what was used since it was last looked at goes to the end once more.
            while len(self._kept) >= self.limit:
                oldest = next(iter(self._kept))
                kept = self._kept.pop(oldest)
                if kept.used:
                    kept.used = False
                    self._kept[oldest] = kept
            self._kept[key] = _Kept(value)
        return value


_everywhere: weakref.WeakSet[Recent[Any, Any]] = weakref.WeakSet()


def _after_fork() -> None:
    for recent in list(_everywhere):
        recent.clear()


os.register_at_fork(after_in_child=_after_fork)
