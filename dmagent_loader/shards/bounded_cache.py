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
        limit: Most that are kept, by weight; those in use by a thread count on top, and one is always kept.
        weigh: The weight of a thing; None: 1.
    """

    def __init__(self, open_one: Callable[[K], V], limit: int, weigh: Callable[[V], int] | None = None) -> None:
        self._open_one, self._limit, self._weigh = open_one, limit, weigh or (lambda _: 1)
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
        self._weight = 0
        self._lock = threading.Lock()

    def _add(self, key: K) -> V:
        value = self._open_one(key)
        weight = self._weigh(value)
        with self._lock:
            # In the order of opening; what was used since it was last looked at goes to the end once more.
            while self._kept and self._weight + weight > self._limit:
                oldest = next(iter(self._kept))
                kept = self._kept.pop(oldest)
                if kept.used:
                    kept.used = False
                    self._kept[oldest] = kept
                else:
                    self._weight -= self._weigh(kept.value)
            if key not in self._kept:  # another thread may have been faster
                self._kept[key] = _Kept(value)
                self._weight += weight
        return value


_everywhere: weakref.WeakSet[Recent[Any, Any]] = weakref.WeakSet()


def _after_fork() -> None:
    for recent in list(_everywhere):
        recent.clear()


os.register_at_fork(after_in_child=_after_fork)
