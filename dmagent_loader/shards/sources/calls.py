"""Calls of a filesystem's methods: with a time limit, and ended at once when the work that they are for is given up."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

from dmagent_loader.errors import ConfigurationError

TIMEOUT_VARIABLE = "DMAGENT_REMOTE_TIMEOUT"
REMOTE_TIMEOUT_SECONDS = 60.0
SLOWEST_BYTES_PER_SECOND = 1 << 18
"""A request may take ``$DMAGENT_REMOTE_TIMEOUT`` seconds (default 60), plus the time for its bytes at this rate."""
_LOOK_SECONDS = 0.2
"""Between two looks at whether the work has been given up."""

_T = TypeVar("_T")
_stop: ContextVar[threading.Event | None] = ContextVar("stop", default=None)
"""Set when the work of this thread has been given up; None: it never is."""


class Stopped(Exception):
    """The work has been given up, because of an error elsewhere or Ctrl-C."""


@contextlib.contextmanager
def ended_by(stop: threading.Event) -> Iterator[None]:
    """Ends the calls of this thread in the block, and their repeats, with `Stopped` when `stop` is set."""
    token = _stop.set(stop)
    try:
        yield
    finally:
        _stop.reset(token)


def timeout_seconds() -> float:
    """Seconds that one request may take, besides the time for its bytes.

    Raises:
        ConfigurationError: ``$DMAGENT_REMOTE_TIMEOUT`` is not a positive number.
    """
    given = os.environ.get(TIMEOUT_VARIABLE)
    if not given:
        return REMOTE_TIMEOUT_SECONDS
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigurationError(f"{TIMEOUT_VARIABLE}={given!r}: it must be a positive number of seconds")
    return seconds


def call(filesystem: Any, name: str, *arguments: Any, limit: float, **settings: Any) -> Any:
    """Calls a method of a filesystem, with a time limit in seconds.

    Raises:
        TimeoutError: The call took longer.
        Stopped: See `ended_by`.
    """
    if type_has(filesystem, "async_impl"):
        method = getattr(filesystem, f"_{name}")
        return on_loop(filesystem, lambda: method(*arguments, **settings), limit=limit)
    outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def work() -> None:
        try:
            outcome.set_result(getattr(filesystem, name)(*arguments, **settings))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, name="dmagent-remote", daemon=True).start()
    return _result(outcome, limit)


def on_loop(filesystem: Any, begin: Callable[[], Coroutine[Any, Any, _T]], *, limit: float) -> _T:
    """The result of a coroutine on the event loop of a filesystem; it is cancelled when nobody waits any more.

    Raises:
        TimeoutError: It took longer than `limit` seconds.
        Stopped: See `ended_by`.
    """
    outcome: concurrent.futures.Future[_T] = concurrent.futures.Future()

    async def work() -> None:
        try:
            outcome.set_result(await begin())
        except BaseException as error:  # asyncio's own future of it makes a TimeoutError anew, without its cause
            outcome.set_exception(error)

    task = asyncio.run_coroutine_threadsafe(work(), filesystem.loop)
    try:
        return _result(outcome, limit)
    finally:
        task.cancel()


def _result(outcome: concurrent.futures.Future[_T], limit: float) -> _T:
    end = time.monotonic() + limit
    while not outcome.done():
        go_on()
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        concurrent.futures.wait((outcome,), left if _stop.get() is None else min(left, _LOOK_SECONDS))
    return outcome.result()


def pause(seconds: float) -> None:
    """Waits.

    Raises:
        Stopped: See `ended_by`.
    """
    stop = _stop.get()
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise Stopped


def go_on() -> None:
    """Does nothing.

    Raises:
        Stopped: See `ended_by`.
    """
    stop = _stop.get()
    if stop is not None and stop.is_set():
        raise Stopped


def type_has(filesystem: Any, name: str) -> bool:
    """Whether a filesystem has an attribute of its own: one that caches passes on those of the store behind it."""
    return bool(getattr(type(filesystem), name, False))
