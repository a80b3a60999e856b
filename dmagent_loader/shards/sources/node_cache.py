"""A folder with blocks of remote shards, which all processes of a node share.

    NAME.block      a block; it gets this name when it is complete, and is never written again. The name ends with the
                    number of its bytes
    NAME.partial    a block that is being fetched by the process that holds the lock of this file; nobody reads it
    ID.needs        the blocks that one process needs, as lines "+NAME" and "-NAME", and the bytes that it may add
                    before it looks at the limit again, as "=BYTES"; the process holds its lock

All locks are those of the system, which releases them when their holder dies: a file without a lock is a leftover. No
lock is held while another process might wait for it, except that of the fetch itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import re
import shutil
import threading
import time
import uuid
import weakref
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmagent_loader._files import open_exclusively
from dmagent_loader.shards import forks

MOST_BYTES = 64 << 30
"""Default limit on all blocks of a folder, unless half of the free space is less."""

_BLOCK, _PARTIAL, _NEEDS = ".block", ".partial", ".needs"
_OURS = re.compile(r"([0-9a-f]{32}(?:-[0-9a-f]+-([0-9a-f]+))?)(\.block|\.partial|\.needs)")
_ALLOWANCE_LINE = re.compile(rb"\n=(\d+)(?=\n)")
_ALLOWANCE = 1024
"""A process adds this part of the limit between two looks through the folder, which take time."""
_EVICTED_SHARE = 0.05
"""Share of the limit that is evicted beyond the need of the moment, for the same reason."""
_REWRITTEN_LINES = 10_000
_ATTEMPTS = 20
"""To make and lock a file, before the file system is said to have no locks."""


class BlockInUse(Exception):
    """Another process or thread is fetching the block."""


@dataclass
class _Survey:
    """The content of the folder."""

    lengths: dict[str, int] = field(default_factory=dict)
    """Name -> bytes of every block, complete or not."""
    needed: set[str] = field(default_factory=set)
    """Names of the blocks that a process needs."""
    allowance: int = 0
    """Bytes that other processes may add."""
    is_whole: bool = True
    """False: a process may need blocks that are not in `needed`."""

    @property
    def total(self) -> int:
        """Bytes of all blocks, and those that other processes may add."""
        return sum(self.lengths.values()) + self.allowance


class Claim:
    """The right to fetch a block, until it is complete or given back.

    Args:
        cache: The folder.
        name: Name of the block.
        descriptor: Descriptor of the partial file, locked.
    """

    def __init__(self, cache: NodeCache, name: str, descriptor: int) -> None:
        self._cache, self._name, self._descriptor = cache, name, descriptor

    def write(self, position: int, data: bytes | bytearray | memoryview) -> None:
        """Writes a part of the block.

        Raises:
            OSError: The disk is full, or cannot be written to.
        """
        view = memoryview(data)
        while view:
            done = os.pwrite(self._descriptor, view, position)
            view, position = view[done:], position + done

    def complete(self) -> None:
        """Makes the block visible to all.

        Raises:
            FileNotFoundError: Someone has removed its file.
            OSError: The folder cannot be written to. The claim is given back.
        """
        try:
            if not self._has_file():  # the name may be that of another's file, which is not complete
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._cache.path(self._name, _PARTIAL))
            os.rename(self._cache.path(self._name, _PARTIAL), self._cache.path(self._name))
        except OSError:
            self.give_back()
            raise
        self._close()

    def give_back(self) -> None:
        """Leaves the block to others."""
        with contextlib.suppress(OSError):
            if self._has_file():
                os.unlink(self._cache.path(self._name, _PARTIAL))  # before the lock goes: it may be another's then
        self._close()

    def _has_file(self) -> bool:
        """Whether the partial file is still that of this claim."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._cache.path(self._name, _PARTIAL)))
        except OSError:
            return False

    def _close(self) -> None:
        self._cache.close_descriptor(self._descriptor)


class NodeCache:
    """The blocks of one folder, as one process uses them.

    Args:
        folder: The folder; it is made if necessary.
        limit: Largest number of bytes of all blocks; None: half of the free space, at most `MOST_BYTES`.

    Raises:
        OSError: The folder cannot be used.
    """

    def __init__(self, folder: Path, limit: int | None) -> None:
        self.folder = folder
        self._prefix = os.path.join(folder, "")
        self._began = time.time()
        self._lock = threading.Lock()
        self._descriptors: set[int] = set()
        """Locked files; a forked child closes its copies, which would keep the locks of a dead parent."""
        self._closer: weakref.finalize[..., Any] | None = None
        forks.register(self)  # another thread may fork before the rest is done
        self._needed: Counter[str] = Counter()
        self._lines, self._is_cut = 0, False
        """Lines in the file of needs, and whether one is missing that a full disk did not take."""
        self._begin_needs()
        found = self._survey()  # which also removes leftovers
        if limit is None:
            limit = min(MOST_BYTES, (shutil.disk_usage(folder).free + found.total) // 2)
        self._limit = limit
        self._allowance = self._room = 0
        """Bytes that this process may add before it looks through the folder again, and what is left of them."""

    def path(self, name: str, suffix: str = _BLOCK) -> str:
        """Path of the file of a block."""
        return f"{self._prefix}{name}{suffix}"

    def holds(self, name: str, length: int) -> bool:
        """Whether a block is complete and on disk."""
        path = self.path(name)
        try:
            if os.stat(path).st_size == length:
                return True
            os.unlink(path)  # cut by a power failure
        except OSError:
            pass
        return False

    def remove(self, name: str) -> None:
        """Removes a block whose bytes are wrong."""
        with contextlib.suppress(OSError):
            os.unlink(self.path(name))

    def claim(self, name: str, length: int) -> Claim | None:
        """The right to fetch a block that is not there, with room for it.

        Returns:
            The claim; None if there is no room: all other blocks are needed.

        Raises:
            BlockInUse: Someone else is fetching it, or has just done so.
            OSError: The folder cannot be written to.
        """
        with self._lock:
            if not self._has_needs():
                self._rewrite_needs()
        descriptor = open_exclusively(Path(self.path(name, _PARTIAL)))
        if descriptor is None:
            raise BlockInUse
        self._descriptors.add(descriptor)
        claim = Claim(self, name, descriptor)
        try:
            if self.holds(name, length):
                raise BlockInUse
            if self._make_room(length):
                # To write it then takes half the CPU time. It is not truncated: ext4 would write it out when it closes.
                if hasattr(os, "posix_fallocate"):
                    with contextlib.suppress(OSError):  # a full disk shows when it is written
                        os.posix_fallocate(descriptor, 0, length)
                return claim
        except BaseException:
            claim.give_back()
            raise
        claim.give_back()
        return None

    def need(self, name: str) -> None:
        """Keeps a block from being evicted by any process, until as many calls of `release`."""
        with self._lock:
            self._needed[name] += 1
            if self._needed[name] == 1:
                self._note(f"+{name}\n")

    def release(self, name: str) -> None:
        """Ends one need of this process for a block."""
        with self._lock:
            self._needed[name] -= 1
            if self._needed[name]:
                return
            del self._needed[name]
            with contextlib.suppress(OSError):
                os.utime(self.path(name))
            self._note(f"-{name}\n")

    def reset_after_fork(self) -> None:
        """Closes what a forked child has taken over."""
        if self._closer is not None:
            self._closer.detach()
        for descriptor in self._descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._descriptors.clear()

    def close_descriptor(self, descriptor: int) -> None:
        """Closes a locked file."""
        self._descriptors.discard(descriptor)
        os.close(descriptor)

    def _begin_needs(self) -> None:
        """Makes the file of needs, and the folder if necessary."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._needs = self._open_needs()
        self._own_needs = os.path.basename(self._needs[1])
        self._unlinker = weakref.finalize(self, _unlink_by, os.getpid(), self._needs[1])
        self._closer = weakref.finalize(self, os.close, self._needs[0])
        self._closer.atexit = False  # threads may still write to it, and its number might be another file's by then

    def _replace_needs(self) -> None:
        """Makes another file of needs, after someone has removed the first."""
        removed, closer, unlinker = self._needs[0], self._closer, self._unlinker
        self._begin_needs()
        assert closer is not None
        closer.detach()
        unlinker.detach()
        self.close_descriptor(removed)

    def _open_needs(self) -> tuple[int, str]:
        for _ in range(_ATTEMPTS):
            path = self.folder / f"{uuid.uuid4().hex}{_NEEDS}"
            descriptor = open_exclusively(path)
            if descriptor is not None:
                self._descriptors.add(descriptor)
                return descriptor, str(path)
            # Between its creation and its lock, another process has taken it for a leftover.
            with contextlib.suppress(OSError):
                path.unlink()
        raise OSError("its file system has no locks")

    def _note(self, line: str) -> None:
        self._lines += 1
        with contextlib.suppress(OSError):  # on a full disk others may evict the block, or keep it, until the next line
            if self._is_cut or self._lines > _REWRITTEN_LINES + 2 * len(self._needed) or not self._has_needs():
                self._rewrite_needs()
            else:
                self._write_needs(line)

    def _has_needs(self) -> bool:
        """Whether the file of needs is still in the folder."""
        return os.fstat(self._needs[0]).st_nlink > 0

    def _rewrite_needs(self) -> None:
        self._lines = len(self._needed)
        if self._has_needs():
            # A reader in between sees too few needs, and a block that it evicts is fetched again.
            os.ftruncate(self._needs[0], 0)
            os.lseek(self._needs[0], 0, os.SEEK_SET)
        else:
            self._replace_needs()
        self._write_needs("".join((f"={self._allowance}\n", *(f"+{name}\n" for name in self._needed))))

    def _write_needs(self, lines: str) -> None:
        content, self._is_cut = lines.encode(), True
        self._is_cut = os.write(self._needs[0], content) < len(content)

    def _make_room(self, length: int) -> bool:
        """Whether the limit holds with `length` more bytes, which the folder counts already."""
        if length > self._limit:
            return False
        with self._lock:
            if length <= self._room:
                self._room -= length
                return True
            # Said before the others are counted: of two processes that look at the same time, one sees the other.
            self._allow(self._limit // _ALLOWANCE if self._limit // _ALLOWANCE > length else 0)
            total = self._listed_bytes()
            if total + self._allowance > self._limit:
                survey = self._survey()
                if survey.total + self._allowance > self._limit and survey.is_whole:
                    self._evict(survey)
                total = survey.total
                if total + self._allowance > self._limit:
                    self._allow(0)
            self._room = self._allowance
            return total <= self._limit

    def _allow(self, count: int) -> None:
        """Tells the other processes what this one may add."""
        if count != self._allowance:
            self._allowance = count
            self._note(f"={count}\n")

    def _evict(self, survey: _Survey) -> None:
        """Evicts blocks that nobody needs: those that are needed last first.

        Blocks from before this process go first, the oldest of them before the others. Of the blocks that were used
        since, the one that was used last comes last in the next pass.
        """
        excess = survey.total - int(self._limit * (1 - _EVICTED_SHARE))
        unneeded = []
        for name in survey.lengths.keys() - survey.needed:
            with contextlib.suppress(OSError):  # not complete, or removed since
                unneeded.append((os.stat(self.path(name)).st_mtime, name))
        if survey.total - sum(survey.lengths[name] for _, name in unneeded) > self._limit:
            return  # what is needed leaves no room
        unneeded.sort(key=lambda block: (block[0] >= self._began, block[0] if block[0] < self._began else -block[0]))
        for _, name in unneeded:
            if excess <= 0:
                return
            self.remove(name)
            excess -= survey.lengths.pop(name)

    def _listed_bytes(self) -> int:
        """Bytes of all blocks, and those that other processes may add, by the names of the files: leftovers count.

        No block is looked at: a full folder has thousands, and is listed for every few that are added.
        """
        lengths, allowance = {}, 0
        for file in self._files():
            name, suffix, length = _parts(file)
            if suffix != _NEEDS:
                lengths[name] = length  # once, if it is completed during the look
            elif file != self._own_needs:
                with contextlib.suppress(OSError):  # removed since
                    allowance += _allowance_of(Path(self._prefix + file).read_bytes())
        return sum(lengths.values()) + allowance

    def _survey(self) -> _Survey:
        """Looks through the folder, and removes what killed processes have left behind."""
        survey = _Survey(needed=set(self._needed))
        for file in self._files():
            name, suffix, length = _parts(file)
            path = self._prefix + file
            try:
                if suffix == _BLOCK or (suffix == _PARTIAL and not _is_abandoned(path)):
                    survey.lengths[name] = length
                elif suffix == _NEEDS and file != self._own_needs and not _is_abandoned(path):
                    content = Path(path).read_bytes()
                    survey.needed |= _needs_of(content)
                    survey.allowance += _allowance_of(content)
            except OSError as error:
                if suffix == _PARTIAL:  # completed since, and its new name may not be in the list
                    survey.lengths[name] = length
                elif not isinstance(error, (FileNotFoundError, PermissionError)):  # such as no free descriptors
                    survey.is_whole = False
        return survey

    def _files(self) -> list[str]:
        """Names of our files in the folder."""
        return [file for file in os.listdir(self.folder) if _parts(file)[1]]


@functools.lru_cache(maxsize=1 << 16)
def _parts(file: str) -> tuple[str, str, int]:
    """Name, suffix and number of bytes of a block, from the name of its file; the suffix of other files is ``""``."""
    found = _OURS.fullmatch(file)
    if found is None or (found[2] is None) != (found[3] == _NEEDS):
        return file, "", 0
    return found[1], found[3], int(found[2] or "0", 16)


def _unlink_by(process: int, path: str) -> None:
    """Removes a file, but not in a forked child."""
    if os.getpid() == process:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _is_abandoned(path: str) -> bool:
    """Removes a file that a killed process has left behind.

    Raises:
        FileNotFoundError: There is no such file.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except PermissionError:
        return False  # another user's
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return False  # it was renamed, and the name is another file's now
        os.unlink(path)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _needs_of(content: bytes) -> set[str]:
    """The names in a file of needs.

    The last line may not be complete yet. One that a full disk has cut is joined with the next, and says nothing.
    """
    needed: set[str] = set()
    for line in content.decode("ascii", "replace").split("\n")[:-1]:
        if line.startswith("+"):
            needed.add(line[1:])
        elif line.startswith("-"):
            needed.discard(line[1:])
    return needed


def _allowance_of(content: bytes) -> int:
    """The allowance in a file of needs."""
    found = _ALLOWANCE_LINE.findall(b"\n" + content)
    return int(found[-1]) if found else 0
