"""Files that are there whole or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

_SUFFIX = ".partial"
_LEFT_FOR_SECONDS = 3600.0


def write_atomically(path: str | os.PathLike[str], data: bytes, *, durable: bool = True) -> None:
    """Writes a file under another name, flushes it to the disk, then renames it.

    A killed process leaves at most one file under that other name, which the next attempt overwrites: kills do not fill
    a disk. Several processes may write the same file at once: one of them comes last, whole.

    Args:
        path: The file.
        data: Its content.
        durable: Wait until it is on the disk. Without, it survives a kill of the process, but not a loss of power.
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
    with contextlib.suppress(OSError):  # a folder that cannot be opened: the name may then be lost with the power
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of `write_atomically` that nobody has touched for an hour and nobody holds."""
    try:
        found = [entry for entry in os.scandir(folder) if entry.name.startswith(".") and entry.name.endswith(_SUFFIX)]
    except OSError:
        return
    for entry in found:
        with contextlib.suppress(OSError):
            if time.time() - entry.stat().st_mtime < _LEFT_FOR_SECONDS:
                continue
            descriptor = os.open(entry.path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(entry.path)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[tuple[int, Path]]:
    """An empty file beside the target that is ours alone; removed if an error comes before the rename.

    Its name is the same at every attempt, on one machine: locks may not reach others. A lock, which the system takes
    from the dead, says whether it is in use; then, and where there are no locks, we take a name by lot.
    """
    shared = target.with_name(f".{target.name}.{platform.node()}{_SUFFIX}")
    descriptor = _locked(shared)
    path = shared
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


def _locked(path: Path) -> int | None:
    """A descriptor of the file that nobody else has; None: someone has it, or the file system has no locks."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        return None  # another user's
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except OSError:
        pass
    os.close(descriptor)  # in use, or renamed by its writer between our two calls
    return None
