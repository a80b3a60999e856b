"""Atomic writes and lock files: a killed process leaves neither half a file nor a stale lock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from dmagent_loader.errors import ConfigurationError, DMAgentError

_SUFFIX = ".partial"
_LEFTOVER = re.compile(rf"\..*{re.escape(_SUFFIX)}", re.DOTALL)
_ABANDONED_AFTER_SECONDS = 3600.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: str | os.PathLike[str], data: bytes, *, durable: bool = True) -> None:
    """Writes a temporary file, flushes it to disk and renames it to its final name.

    A killed process leaves at most one temporary file, which the next attempt overwrites, so kills do not fill a disk.
    Several processes may write the same file at once: the last rename wins, and every version is complete.

    Args:
        path: Path of the file.
        data: Its content.
        durable: Wait until the data is on disk. If False, the file survives a kill of the process but not a power
            failure.

    Raises:
        OSError: The file cannot be written.
    """
    target = Path(path)
    with _temporary(target) as (descriptor, temporary):
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    if not durable:
        return
    with contextlib.suppress(OSError):  # if the folder cannot be opened, a power failure may still lose the name
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def remove_leftovers(folder: Path, names: re.Pattern[str] = _LEFTOVER) -> None:
    """Removes temporary files that are an hour old and not in use.

    Args:
        folder: Their folder.
        names: Their names; by default those of all files of `write_atomically`.
    """
    try:
        leftovers = [entry for entry in os.scandir(folder) if names.fullmatch(entry.name)]
    except OSError:
        return
    for entry in leftovers:
        with contextlib.suppress(OSError):
            if time.time() - entry.stat().st_mtime < _ABANDONED_AFTER_SECONDS:
                continue
            descriptor = os.open(entry.path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(entry.path)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def locked(
    path: Path, *, timeout_seconds: float = 0.0, is_cancelled: Callable[[], bool] | None = None
) -> Iterator[None]:
    """Holds a lock file, which exists only while it is held.

    The system releases the lock when its holder dies, and forked children do not inherit it (`filelock` since 3.30).

    Args:
        path: Path of the lock file; its folder is created.
        timeout_seconds: Longest wait; 0 makes one attempt.
        is_cancelled: Ends the wait when it returns True.

    Raises:
        TimeoutError: Someone else held the lock until the timeout, or the wait was cancelled.
        OSError: The file system has no locks, or the file cannot be created.
    """
    # No fallback to a marker file, which would outlive a killed holder.
    lock = FileLock(path, fallback_to_soft=False)
    with lock.acquire(timeout=timeout_seconds, cancel_check=is_cancelled):
        try:
            yield
        finally:
            # Before the release: a waiter that opened this file sees that it has no name any more, and opens a new one.
            with contextlib.suppress(OSError):
                path.unlink()


@contextlib.contextmanager
def only_writer(folder: Path, content: str) -> Iterator[None]:
    """Admits one writer per folder at a time; makes the folder.

    Args:
        folder: Folder that is written to.
        content: Plural of what is written, for messages, such as ``"shards"``.

    Raises:
        ConfigurationError: Another process writes to the folder, it cannot be written to, or its disk gets full.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / ".lock"))
        except TimeoutError as error:
            raise ConfigurationError(f"another process is writing {content} to {str(folder)!r}: wait for it") from error
        except OSError as error:
            raise ConfigurationError(
                f"{content} cannot be written to {str(folder)!r}: {error}; choose a folder that can be written to, on "
                "a file system with locks"
            ) from error
        try:
            yield
        except DMAgentError:
            raise  # a ShardNotFoundError is an OSError, too
        except OSError as error:
            if not is_full(error):
                raise
            raise ConfigurationError(
                f"there is no room for the {content} in {str(folder)!r}, or for temporary files ({error}): free some, "
                "and run the same command again, which goes on where it stood"
            ) from error


def is_full(error: OSError) -> bool:
    """Whether a disk, a quota or the largest size of a file is exhausted."""
    return error.errno in _FULL


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[tuple[int, Path]]:
    """Yields the descriptor and path of an empty file beside the target, which is removed on an error.

    Every attempt on one machine uses the same name; a lock on the file shows whether it is in use, and the system
    releases it when its holder dies. If the file is in use, or locks are not supported, the name is random. The host
    name is part of the name because locks may not reach other machines.
    """
    path = target.with_name(f".{target.name}.{platform.node()}{_SUFFIX}")
    descriptor = open_exclusively(path)
    if descriptor is None:
        path = target.with_name(f".{target.name}.{uuid.uuid4().hex}{_SUFFIX}")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(descriptor, 0)
        yield descriptor, path
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(descriptor)


def open_exclusively(path: Path) -> int | None:
    """A locked descriptor of a file, which is created if necessary. The system releases the lock when its holder dies.

    Args:
        path: The file.

    Returns:
        The descriptor; None if the file is in use, belongs to another user, or lies on a file system without locks.

    Raises:
        OSError: The file cannot be created.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        if not os.path.lexists(path):
            raise  # the folder cannot be written to
        return None  # another user's file
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except OSError:
        pass
    os.close(descriptor)  # in use, or renamed by its writer between the two calls
    return None
