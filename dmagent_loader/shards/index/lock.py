"""One process indexes a shard; the others wait for its index, for a limited time."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

from dmagent_loader._files import locked

_ANNOUNCED_AFTER_SECONDS = 5.0

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def exclusive(path: Path, activity: str, patience: float, stop: threading.Event) -> Iterator[None]:
    """Holds a lock file while the block runs.

    Best effort: without lock support, without write access, or after `patience` seconds, the block runs all the same.
    The result must therefore be correct without the lock, which only saves work.

    Args:
        path: Lock file; it exists only while the lock is held.
        activity: The work done under the lock, as a gerund, for messages.
        patience: Longest wait, in seconds.
        stop: Ends the wait when set.
    """
    with contextlib.ExitStack() as stack:
        _acquire(stack, path, activity, patience, stop)
        yield


def _acquire(stack: contextlib.ExitStack, path: Path, activity: str, patience: float, stop: threading.Event) -> None:
    announced_after = min(_ANNOUNCED_AFTER_SECONDS, patience)
    try:
        with contextlib.suppress(TimeoutError):
            stack.enter_context(locked(path, timeout_seconds=announced_after, is_cancelled=stop.is_set))
            return
        logger.info("waiting for another process that is %s", activity)
        stack.enter_context(locked(path, timeout_seconds=patience - announced_after, is_cancelled=stop.is_set))
    except TimeoutError:
        if not stop.is_set():
            logger.warning(
                "another process has been %s for %.0f s, and may have stopped: doing it here, too (its lock is %s)",
                activity,
                patience,
                path,
            )
    except OSError:
        pass  # no lock support, or no write access
