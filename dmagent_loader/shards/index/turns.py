"""Processes that index the same shards at the same time: one reads a shard through, the others wait for its index."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_POLL_SECONDS = 0.05
_SAID_AFTER_SECONDS = 5.0

_logger = logging.getLogger(__name__)
_held: set[int] = set()
"""Descriptors of locks: a forked child would keep them from everybody after its parent was killed."""


@contextlib.contextmanager
def taking_turns(path: Path, what: str, patience: float, stop: threading.Event) -> Iterator[None]:
    """Waits until no other process holds this lock, then holds it.

    A courtesy, not a safeguard: where there are no locks, or who holds this one seems to have stopped, all go on.

    Args:
        path: The lock; the file is there only while it is held.
        what: What is done under it, for messages.
        patience: Most seconds to wait.
        stop: When set, the wait ends.
    """
    descriptor = _acquired(path, what, patience, stop)
    try:
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                path.unlink()
            with contextlib.suppress(OSError):  # for all who have the descriptor by a fork, too
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            _held.discard(descriptor)
            os.close(descriptor)


def _acquired(path: Path, what: str, patience: float, stop: threading.Event) -> int | None:
    """The descriptor of the lock; None: go on without."""
    began, said = time.monotonic(), False
    while not stop.is_set():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Anew each time: who held it has unlinked the file.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                _held.add(descriptor)
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError:
            os.close(descriptor)
            return None
        os.close(descriptor)
        waited = time.monotonic() - began
        if waited > patience:
            _logger.warning(
                "another process has been %s for %.0f s, and may have stopped: doing it here, too (its lock is %s)",
                what,
                waited,
                path,
            )
            return None
        if waited > _SAID_AFTER_SECONDS and not said:
            said = True
            _logger.info("waiting for another process that is %s", what)
        time.sleep(_POLL_SECONDS)
    return None


def _after_fork() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_after_fork)
