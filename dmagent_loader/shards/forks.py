"""State that a forked child must not take over from its parent, such as locks that a lost thread holds."""

from __future__ import annotations

import gc
import os
import weakref
from typing import Protocol


class ResetAfterFork(Protocol):
    """An object with state of one process."""

    def reset_after_fork(self) -> None:
        """Replaces that state; called in the child, before any of its own code."""
        ...


_registered: weakref.WeakSet[ResetAfterFork] = weakref.WeakSet()


def register(instance: ResetAfterFork) -> None:
    """Has an object reset in every forked child for as long as it lives."""
    _registered.add(instance)


def _reset_all() -> None:
    collects = gc.isenabled()
    gc.disable()  # a finalizer in between would find one part of the parent's state without the other
    try:
        for instance in list(_registered):
            instance.reset_after_fork()
    finally:
        if collects:
            gc.enable()


os.register_at_fork(after_in_child=_reset_all)
