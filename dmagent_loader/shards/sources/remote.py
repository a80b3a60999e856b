"""Byte ranges of remote shards, with a time limit for each request and retries.

A request is repeated if the server stalls, resets the connection, sends fewer or other bytes than requested, or answers
429 or 503. A server that ignores ranges or refuses access is an error at once. All errors name the shard.
"""

from __future__ import annotations

import email.utils
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec

from dmagent_loader.errors import ConfigurationError, DamagedShardError, ShardError, ShardNotFoundError
from dmagent_loader.shards.sources.urls import display_url

REMOTE_ATTEMPTS = 6
REMOTE_BACKOFF_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 30.0
"""Longest pause before another attempt, whatever ``Retry-After`` says."""

TIMEOUT_VARIABLE = "DMAGENT_REMOTE_TIMEOUT"
REMOTE_TIMEOUT_SECONDS = 60.0
SLOWEST_BYTES_PER_SECOND = 1 << 18
"""A request may take ``$DMAGENT_REMOTE_TIMEOUT`` seconds (default 60), plus the time for its bytes at this rate."""

logger = logging.getLogger(__name__)
_jitter = random.SystemRandom()
_T = TypeVar("_T")

_USED_FILESYSTEMS: set[Any] = set()
"""Every filesystem that was ever used, to keep it alive.

Otherwise a forked child would finalise its copies. Closing their connections there can remove them from the event queue
that the child shares with its parent, which then waits for ever.
"""


class RemoteSource:
    """A file behind an fsspec URL; one range request per read."""

    __slots__ = ("_filesystem", "_path", "_url")

    def __init__(self, url: str) -> None:
        self._url = url
        self._filesystem, self._path = filesystem_of(url)

    def read(self, offset: int, length: int) -> bytearray:
        """Exactly `length` bytes from `offset`.

        Raises:
            DamagedShardError: The shard ends before that.
            ShardError: It cannot be read.
        """
        if length == 0:
            return bytearray()
        limit = timeout_seconds() + length / SLOWEST_BYTES_PER_SECOND
        return with_retries(self._url, limit, lambda: self._fetch(offset, length, limit))

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fills `view` with the bytes from `offset`; raises as `read`."""
        view[:] = self.read(offset, len(view))

    def _fetch(self, offset: int, length: int, limit: float) -> bytearray:
        if hasattr(self._filesystem, "encode_url") and hasattr(self._filesystem, "set_session"):
            data: bytes | bytearray = fsspec.asyn.sync(
                self._filesystem.loop, _http_range, self._filesystem, self._path, offset, length, timeout=limit
            )
        else:
            data = call(self._filesystem, "cat_file", self._path, start=offset, end=offset + length, limit=limit)
        if len(data) > length:
            raise _IgnoresRanges
        if len(data) < length:
            raise _ShortRead(offset, length, len(data))
        return data if isinstance(data, bytearray) else bytearray(data)


def remote_info(url: str) -> dict[str, Any]:
    """Information of the filesystem about a shard, not from its cache.

    Raises:
        ShardNotFoundError: There is no such file.
        ShardError: The shard cannot be reached.
    """
    filesystem, path = filesystem_of(url)
    limit = timeout_seconds()

    def fresh_info() -> dict[str, Any]:
        filesystem.invalidate_cache()
        return dict(call(filesystem, "info", path, limit=limit))

    return with_retries(url, limit, fresh_info)


def filesystem_of(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL, and the path in it.

    Raises:
        ShardError: The package for the protocol is not installed.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ShardError(
            f"{display_url(url)}: no access to {urlsplit(url).scheme!r} URLs ({error}); install the fsspec package "
            "for it"
        ) from error
    _USED_FILESYSTEMS.add(filesystem)
    return filesystem, path


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
    """
    if getattr(filesystem, "async_impl", False):
        method = getattr(filesystem, f"_{name}")
        return fsspec.asyn.sync(filesystem.loop, method, *arguments, timeout=limit, **settings)
    outcome: list[tuple[Any, BaseException | None]] = []

    def work() -> None:
        try:
            outcome.append((getattr(filesystem, name)(*arguments, **settings), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, name="dmagent-remote", daemon=True)
    thread.start()
    thread.join(limit)
    if not outcome:
        raise TimeoutError
    result, fault = outcome[0]
    if fault is not None:
        raise fault
    return result


def with_retries(url: str, limit: float, action: Callable[[], _T]) -> _T:
    """Repeats an action after temporary failures, up to `REMOTE_ATTEMPTS` times.

    Args:
        url: URL of the shard, for messages.
        limit: Time limit of one attempt in seconds, for messages.
        action: Function to call.

    Raises:
        ShardNotFoundError: There is no such file.
        DamagedShardError: The shard ends before the requested bytes.
        ShardError: Access is refused, or all attempts failed.
    """
    shard = display_url(url)
    for attempt in range(1, REMOTE_ATTEMPTS + 1):
        try:
            return action()
        except Exception as error:  # each protocol has its own exceptions, few of them OSErrors
            fault = _cause(error)
            if isinstance(fault, (ShardError, ConfigurationError)):
                raise
            status = getattr(fault, "status", None)
            if isinstance(fault, FileNotFoundError) or status in (404, 410):
                raise ShardNotFoundError(f"shard {shard} does not exist") from error
            if isinstance(fault, PermissionError) or status in (401, 403):
                raise ShardError(f"shard {shard} may not be read: {display_url(str(fault))}") from error
            if isinstance(fault, _IgnoresRanges):
                raise ShardError(
                    f"{shard}: the server ignores byte ranges, so rows cannot be read by position; use a server with "
                    "Range support or a local copy"
                ) from error
            if status == 416:
                raise ends_early(url, "the server has no such bytes") from error
            if attempt == REMOTE_ATTEMPTS:
                if isinstance(fault, _ShortRead):
                    raise ends_early(url, str(fault)) from error
                raise ShardError(
                    f"shard {shard} could not be read in {REMOTE_ATTEMPTS} attempts; the last one failed with "
                    f"{_describe(fault, limit)}"
                ) from error
            pause = _pause(fault, attempt)
            logger.warning(
                "shard %s: attempt %d of %d failed with %s; again in %.1f s",
                shard,
                attempt,
                REMOTE_ATTEMPTS,
                _describe(fault, limit),
                pause,
            )
            time.sleep(pause)
    raise AssertionError("unreachable")


def ends_early(url: str, detail: str) -> DamagedShardError:
    """Makes the error for a shard that is shorter than its index says."""
    return DamagedShardError(
        f"shard {display_url(url)} changed since it was indexed: {detail}; open the shards again to index the new "
        "version, or restore the file"
    )


class _IgnoresRanges(Exception):
    pass


class _ShortRead(Exception):
    def __init__(self, offset: int, length: int, got: int) -> None:
        super().__init__(f"{length} bytes were expected at byte {offset}, but it ends after {got} of them")


class _OtherRange(Exception):
    pass


async def _http_range(filesystem: Any, url: str, offset: int, length: int) -> bytearray:
    """A byte range by HTTP, with checks that ``cat_file`` leaves out: status, range and number of bytes."""
    session = await filesystem.set_session()
    settings = dict(filesystem.kwargs)
    last = offset + length - 1
    headers = {**settings.pop("headers", {}), "Range": f"bytes={offset}-{last}", "Accept-Encoding": "identity"}
    async with session.get(filesystem.encode_url(url), headers=headers, **settings) as response:
        response.raise_for_status()
        if response.status != 206 and offset > 0:
            raise _IgnoresRanges
        sent = re.match(r"\s*bytes\s+(\d+)-(\d+)/", response.headers.get("Content-Range", ""))
        if sent is not None and (int(sent[1]) != offset or int(sent[2]) > last):
            raise _OtherRange(f"bytes {sent[1]} to {sent[2]} where {offset} to {last} were requested")
        data = bytearray()
        async for part in response.content.iter_any():
            data += part
            if len(data) > length:
                raise _IgnoresRanges
    return data


def _cause(error: BaseException) -> BaseException:
    """The cause of fsspec's FileNotFoundError, which its HTTP filesystem also raises for a busy server."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None:
        is_busy = isinstance(cause, (ConnectionError, TimeoutError))
        if is_busy or type(cause).__module__.startswith("aiohttp"):
            return cause
    return error


def _pause(fault: BaseException, attempt: int) -> float:
    """Seconds until the next attempt: growing, different on each rank, and at least ``Retry-After``."""
    pause: float = REMOTE_BACKOFF_SECONDS * 2 ** (attempt - 1) * _jitter.uniform(0.5, 1.5)
    headers: Any = getattr(fault, "headers", None)
    asked = headers.get("Retry-After") if hasattr(headers, "get") else None
    if isinstance(asked, str):
        try:
            seconds = float(asked)
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(asked).timestamp() - time.time()
            except ValueError:
                seconds = 0.0
        pause = max(pause, seconds if seconds == seconds else 0.0)
    return min(pause, LONGEST_PAUSE_SECONDS)


def _describe(fault: BaseException, limit: float) -> str:
    if isinstance(fault, TimeoutError):
        return f"no answer within {limit:.0f} s (the limit is {TIMEOUT_VARIABLE})"
    return f"{type(fault).__name__}: {display_url(str(fault))}"
