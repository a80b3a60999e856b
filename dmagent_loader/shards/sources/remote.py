"""Byte ranges of remote shards, with a time limit for each request and retries.

A request is repeated if the server stalls, resets the connection, sends fewer or other bytes than requested, or answers
429 or 503. Where access is refused, ``$DMAGENT_SIGNED_URLS`` may name a file with newer URLs. A server that ignores
ranges or still refuses access is an error at once. All errors name the shard.
"""

from __future__ import annotations

import atexit
import functools
import logging
import random
import re
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec

from dmagent_loader.errors import HOW_TO_RESUME, ConfigurationError, DamagedShardError, ShardError, ShardNotFoundError
from dmagent_loader.shards.sources.calls import (
    SLOWEST_BYTES_PER_SECOND,
    TIMEOUT_VARIABLE,
    Stopped,
    call,
    go_on,
    on_loop,
    pause,
    timeout_seconds,
    type_has,
)
from dmagent_loader.shards.sources.faults import (
    Kind,
    fault_text,
    kind_of_fault,
    reason_code,
    remedy_for_refusal,
    retry_after,
    root_cause,
    status_of,
)
from dmagent_loader.shards.sources.signed_urls import SIGNED_URLS_VARIABLE, newest_url
from dmagent_loader.shards.sources.urls import display_url, for_fsspec, protocol, split_chain

REMOTE_ATTEMPTS = 6
REMOTE_BACKOFF_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 30.0
"""Longest pause before another attempt, whatever ``Retry-After`` says."""

_exit = threading.Event()
"""Set when the process ends: fsspec closes its sessions then, while threads may still fetch blocks."""
atexit.register(_exit.set)

logger = logging.getLogger(__name__)
_jitter = random.SystemRandom()
_T = TypeVar("_T")

_CONNECTIONS = 64
"""Connections to S3 in a process."""
_READ_AHEAD_BYTES = 1 << 20
"""Bytes of an answer by HTTP after which aiohttp stops reading until they are taken. With its default, 64 KiB, it stops
and starts again at every single read of a socket, which brings 256 KiB."""
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "'dmagent-loader[s3]'"),
    **dict.fromkeys(("gs", "gcs"), "'dmagent-loader[gs]'"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "'dmagent-loader[az]'"),
    **dict.fromkeys(("http", "https"), "'dmagent-loader[remote]'"),
    "hf": "huggingface_hub",
}
"""What is to be installed for a protocol."""

_USED_FILESYSTEMS: set[Any] = set()
"""Every filesystem that was ever used, to keep it alive.

Otherwise a forked child would finalise its copies. Closing their connections there can remove them from the event queue
that the child shares with its parent, which then waits for ever.
"""


Write = Callable[[int, bytes], object]
"""Takes a part of an answer, with the position of its first byte."""


class SinkError(Exception):
    """The bytes have arrived, but could not be written.

    Args:
        reason: The error of writing.
    """

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class RemoteSource:
    """A file behind an fsspec URL; one range request per read."""

    __slots__ = ("_access", "_url")

    def __init__(self, url: str) -> None:
        self._url = url
        self._access = _Access(url)

    def read(self, offset: int, length: int) -> bytearray:
        """Exactly `length` bytes from `offset`.

        Raises:
            DamagedShardError: The shard ends before that.
            ShardError: It cannot be read.
        """
        data = bytearray(length)

        def write(position: int, part: bytes) -> None:
            data[position : position + len(part)] = part

        self.copy(offset, length, write)
        return data

    def copy(self, offset: int, length: int, write: Write) -> None:
        """Passes on exactly `length` bytes from `offset`, in parts, as they arrive.

        Args:
            offset: First byte.
            length: Number of bytes.
            write: Takes each part, with its position behind `offset`. After a fault, all parts come again.

        Raises:
            DamagedShardError: The shard ends before that.
            ShardError: It cannot be read.
            SinkError: `write` has raised an OSError.
        """
        if length == 0:
            return
        limit = timeout_seconds() + length / SLOWEST_BYTES_PER_SECOND
        fetch = functools.partial(_fetch, offset=offset, length=length, limit=limit, write=write)
        with_retries(self._url, limit, lambda: self._access(fetch))


class _Access:
    """Filesystem and path of a shard, under the newest URL to which its server has granted access.

    Args:
        url: URL of the shard, as listed.
    """

    __slots__ = ("_target",)

    def __init__(self, url: str) -> None:
        self._target = (url, *filesystem_of(url))

    def __call__(self, action: Callable[[Any, str], _T]) -> _T:
        """The result of an action on filesystem and path, under a newer URL if access was refused and there is one."""
        url, filesystem, path = self._target
        try:
            return action(filesystem, path)
        except Exception as error:  # each protocol has its own exceptions
            if kind_of_fault(error) is not Kind.REFUSED or not self._renew(url):
                raise
        _, filesystem, path = self._target
        return action(filesystem, path)

    def _renew(self, refused: str) -> bool:
        """Whether there is another URL than the refused one; another thread may have found it."""
        if self._target[0] == refused:
            url = newest_url(refused)
            chain, _ = split_chain(refused)
            url = url if url is None else chain + url
            if url is None or url == refused:
                return False
            self._target = (url, *filesystem_of(url))
        return True


def remote_info(url: str) -> dict[str, Any]:
    """Information of the filesystem about a shard, not from its cache.

    Raises:
        ShardNotFoundError: There is no such file.
        ShardError: The shard cannot be reached.
    """
    access, limit = _Access(url), timeout_seconds()

    def fresh_info(filesystem: Any, path: str) -> dict[str, Any]:
        filesystem.invalidate_cache()
        try:
            return dict(call(filesystem, "info", path, limit=limit))
        except Exception as error:
            if kind_of_fault(error) is Kind.REFUSED and status_of(error) is not None and not reason_code(error):
                # The answer to HEAD has no body, which would say whether the token has expired or the key is unknown.
                call(filesystem, "cat_file", path, start=0, end=1, limit=limit)
            raise

    return with_retries(url, limit, lambda: access(fresh_info))


def remote_names(url: str) -> list[str]:
    """URLs of the files that match a pattern or, if it has no wildcard, lie in a folder; sorted.

    Raises:
        ShardError: The store cannot be listed.
    """
    chain, address = split_chain(url)
    filesystem, path = filesystem_of(address)
    limit = timeout_seconds()

    def names() -> list[str]:
        filesystem.invalidate_cache()
        is_pattern = any(character in path for character in "*[")
        return sorted(call(filesystem, "glob" if is_pattern else "find", path, limit=limit))

    try:
        found = with_retries(url, limit, names, "listed")
    except ShardNotFoundError:
        return []
    scheme = address.split("://", 1)[0]
    return [chain + (name if "://" in name else f"{scheme}://{name.lstrip('/')}") for name in found]


def filesystem_of(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL, and the path in it.

    Raises:
        ShardError: The package for the protocol is not installed, or its settings cannot be used.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(for_fsspec(url), **_settings(url))
    except (ImportError, ValueError, TypeError) as error:
        name = protocol(url)
        if isinstance(error, ImportError) or "not known" in str(error):
            package = _PACKAGES.get(name)
            remedy = f"pip install {package}" if package else "install the fsspec package for it"
            raise ShardError(f"{display_url(url)}: no access to {name!r} URLs ({error}); {remedy}") from error
        raise ShardError(
            f"{display_url(url)}: {name!r} URLs cannot be accessed with these settings ({error}); "
            f"{remedy_for_refusal(url)}"
        ) from error
    _USED_FILESYSTEMS.add(filesystem)
    store = getattr(filesystem, "fs", filesystem)  # behind a cache
    if type(store).__name__ == "S3FileSystem":
        store.retries = 1  # besides those of botocore, it has repeats of its own
    return filesystem, path


def _settings(url: str) -> dict[str, Any]:
    """Settings of a filesystem, besides those of fsspec's configuration.

    For S3: `_CONNECTIONS`, where botocore has 10, and no repeats by botocore, which do not heed ``Retry-After`` and
    would multiply with those of `with_retries`.
    """
    name = protocol(url)
    if name not in ("s3", "s3a"):
        return {}
    given = fsspec.config.conf.get(name, {}).get("config_kwargs", {})
    ours = {"max_pool_connections": _CONNECTIONS, "retries": {"total_max_attempts": 1, "mode": "standard"}}
    settings = {"config_kwargs": {**ours, **given}}
    return {name: settings} if split_chain(url)[0] else settings


def with_retries(url: str, limit: float, action: Callable[[], _T], doing: str = "read") -> _T:
    """Repeats an action after faults that may pass, up to `REMOTE_ATTEMPTS` times.

    Args:
        url: URL of the file, for messages.
        limit: Time limit of one attempt in seconds, for messages.
        action: Function to call.
        doing: Participle of the action, for messages.

    Raises:
        ShardNotFoundError: There is no such file.
        DamagedShardError: The shard ends before the requested bytes.
        ShardError: Access is refused, the request cannot succeed, or all attempts failed.
        Stopped: See `dmagent_loader.shards.sources.calls.ended_by`.
    """
    shard = display_url(url)
    for attempt in range(1, REMOTE_ATTEMPTS + 1):
        try:
            go_on()
            return action()
        except (ShardError, ConfigurationError, SinkError, Stopped):
            raise
        except Exception as error:  # each protocol has its own exceptions, few of them OSErrors
            if _exit.is_set():
                raise
            kind = kind_of_fault(error)
            if isinstance(error, _IgnoresRanges):
                raise ShardError(
                    f"{shard}: the server ignores byte ranges, so rows cannot be read by position; use a server with "
                    "Range support or a local copy"
                ) from error
            if status_of(error) == 416:
                raise ends_early(url, "the server has no such bytes") from error
            if kind is Kind.MISSING:
                raise ShardNotFoundError(f"shard {shard} does not exist: restore it, or leave it out") from error
            if kind is Kind.REFUSED:
                remedy = (
                    f"if its signature has expired, write newer URLs, one a line, to a file, and name it in "
                    f"{SIGNED_URLS_VARIABLE}"
                    if "?" in url
                    else remedy_for_refusal(url)
                )
                raise ShardError(f"shard {shard} may not be {doing}: {fault_text(error)}; {remedy}") from error
            if kind is Kind.LASTING:
                raise ShardError(f"shard {shard} cannot be {doing}: {_describe(error, limit)}") from error
            if attempt == REMOTE_ATTEMPTS:
                if isinstance(error, _ShortRead):
                    raise ends_early(url, str(error)) from error
                raise ShardError(
                    f"shard {shard} could not be {doing} in {REMOTE_ATTEMPTS} attempts; the last one failed with "
                    f"{_describe(error, limit)}; start again when its server answers: a run resumes from its last state"
                ) from error
            seconds = _pause_seconds(error, attempt)
            logger.warning(
                "shard %s: attempt %d of %d failed with %s; again in %.1f s",
                shard,
                attempt,
                REMOTE_ATTEMPTS,
                _describe(error, limit),
                seconds,
            )
            pause(seconds)
    raise AssertionError("unreachable")


def ends_early(url: str, detail: str) -> DamagedShardError:
    """Makes the error for a shard that is shorter than its index says."""
    return DamagedShardError(
        f"shard {display_url(url)} changed since it was indexed: {detail}; open the shards again to index the new "
        f"version, or restore the file; {HOW_TO_RESUME}"
    )


class _IgnoresRanges(Exception):
    pass


class _ShortRead(Exception):
    def __init__(self, offset: int, length: int, got: int) -> None:
        super().__init__(f"{length} bytes were expected at byte {offset}, but it ends after {got} of them")


class _OtherRange(Exception):
    pass


class _Sink:
    """Takes the bytes of one attempt, until that is over: a request that has timed out may still be running.

    Args:
        write: Takes each part.
        length: Number of bytes that were requested.
    """

    def __init__(self, write: Write, length: int) -> None:
        self._write, self._length = write, length
        self._lock, self._is_over = threading.Lock(), False
        self.taken = 0
        """Bytes so far."""

    def take(self, part: bytes) -> None:
        with self._lock:
            if self._is_over:
                raise TimeoutError
            if self.taken + len(part) > self._length:
                raise _IgnoresRanges
            try:
                self._write(self.taken, part)
            except OSError as error:
                raise SinkError(error) from error
            self.taken += len(part)

    def close(self) -> None:
        with self._lock:
            self._is_over = True


def _fetch(filesystem: Any, path: str, *, offset: int, length: int, limit: float, write: Write) -> None:
    """One attempt to read a byte range."""
    sink = _Sink(write, length)
    try:
        _pour(filesystem, path, offset, length, limit, sink)
    finally:
        sink.close()
    if sink.taken < length:
        raise _ShortRead(offset, length, sink.taken)


def _pour(filesystem: Any, path: str, offset: int, length: int, limit: float, sink: _Sink) -> None:
    if type_has(filesystem, "encode_url") and type_has(filesystem, "set_session"):
        on_loop(filesystem, lambda: _http_range(filesystem, path, offset, length, sink), limit=limit)
    else:
        sink.take(call(filesystem, "cat_file", path, start=offset, end=offset + length, limit=limit))


async def _http_range(filesystem: Any, url: str, offset: int, length: int, sink: _Sink) -> None:
    """A byte range by HTTP, with checks that ``cat_file`` leaves out: status, range and number of bytes.

    The parts are written here, in the thread of the event loop, while they are in the cache of the processor. To
    collect them for another thread would take three times as much CPU time, most of it for fresh memory.
    """
    session = await filesystem.set_session()
    settings = {"read_bufsize": _READ_AHEAD_BYTES, **filesystem.kwargs}
    last = offset + length - 1
    headers = {**settings.pop("headers", {}), "Range": f"bytes={offset}-{last}", "Accept-Encoding": "identity"}
    async with session.get(filesystem.encode_url(url), headers=headers, **settings) as response:
        response.raise_for_status()
        if response.status != 206 and offset > 0:
            raise _IgnoresRanges
        sent = re.match(r"\s*bytes\s+(\d+)-(\d+)/", response.headers.get("Content-Range", ""))
        if sent is not None and (int(sent[1]) != offset or int(sent[2]) > last):
            raise _OtherRange(f"bytes {sent[1]} to {sent[2]} where {offset} to {last} were requested")
        async for part in response.content.iter_any():
            sink.take(part)


def _pause_seconds(error: BaseException, attempt: int) -> float:
    """Seconds until the next attempt: growing, different on each rank, and at least ``Retry-After``."""
    growing: float = REMOTE_BACKOFF_SECONDS * 2 ** (attempt - 1) * _jitter.uniform(0.5, 1.5)
    return min(max(growing, retry_after(error)), LONGEST_PAUSE_SECONDS)


def _describe(error: BaseException, limit: float) -> str:
    fault = root_cause(error)
    if isinstance(fault, TimeoutError) or isinstance(fault.__cause__, TimeoutError):
        return f"no answer within {limit:.0f} s (the limit is {TIMEOUT_VARIABLE})"
    name = "" if type(fault).__module__ == __name__ else f"{type(fault).__name__}: "
    return f"{name}{fault_text(fault)}"
