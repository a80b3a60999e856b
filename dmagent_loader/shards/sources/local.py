"""Bytes of shards by position: local files by ``preadv``, all others by `dmagent_loader.shards.sources.remote`.

`preadv` was chosen over `mmap`. A mapping saves about 0.5 us per row, but a file that shrinks under a mapping kills the
process with SIGBUS, whereas a short read is an error that names the shard.
"""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from dmagent_loader._validation import kind_of
from dmagent_loader.errors import ShardError, ShardNotFoundError
from dmagent_loader.shards.sources.remote import RemoteSource, ends_early, remote_info
from dmagent_loader.shards.sources.urls import display_url, is_local, local_path

MAX_OPEN_FILES = min(1024, max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
"""Default limit on open shards per process and collection: a quarter of the file descriptors of the process."""

_NO_TIME_NS = 86_400 * 10**9
"""A modification time on the first day of 1970 means that the file has none, as in read-only images, content-addressed
stores and some network mounts."""
_CONTENT_KEYS = ("md5Hash", "Content-MD5", "ETag", "etag", "blob_id", "version_id", "generation")
_TIME_KEYS = (
    "Last-Modified",
    "LastModified",
    "last_modified",
    "mtime",
    "modified",
    "modificationTime",  # WebHDFS
    "modify",  # FTP
    "created",
)


@dataclass(frozen=True, kw_only=True)
class ShardVersion:
    """Identity of one version of a shard.

    Attributes:
        size: Size in bytes.
        tag: Modification time in ns of a local file; checksum or etag of a remote one, or else its times.
        changed: Inode and change time in ns of a local shard. Unlike the modification time, a copy cannot take it over
            from the file that it replaces. New permissions and links change it, too, so a shard that differs in nothing
            else is looked at, but not read through again.
        is_sure: Other content of this size would have another tag. False if a server reports only times, in whole
            seconds, or nothing, and for local files without a time.
    """

    size: int
    tag: str
    changed: str = field(default="", compare=False)
    is_sure: bool = field(default=True, compare=False)

    @classmethod
    def of(cls, facts: VersionFacts) -> ShardVersion:
        """The version with these facts."""
        size, tag, changed, is_sure = facts
        return cls(size=size, tag=tag, changed=changed, is_sure=is_sure)

    @property
    def facts(self) -> VersionFacts:
        """All that is known of the version."""
        return self.size, self.tag, self.changed, self.is_sure


VersionFacts = tuple[int, str, str, bool]
"""Size, tag, change and certainty of a `ShardVersion`: a tuple takes a quarter of the time to make."""


Memory = bytearray | memoryview
ReadInto = Callable[[Sequence[Memory], int], int]
"""Reads into parts of memory, one after the other, from an offset on; returns the number of bytes."""


class Readable(Protocol):
    """An open shard, or a block of one.

    Attributes:
        read_into: Reads from an offset in it, for as long as this object lives.
        descriptor: Descriptor of the open file, for as long; -1: it is no file.
    """

    read_into: ReadInto
    descriptor: int


class Source(Protocol):
    """An open shard."""

    def read(self, offset: int, length: int) -> bytearray:
        """Exactly `length` bytes from `offset`.

        Raises:
            DamagedShardError: The shard ends before that.
        """
        ...


class LocalSource:
    """A local file, closed when the last reference goes, so that a reading thread keeps it open.

    Attributes:
        read_into: ``preadv`` of the open file.
        descriptor: Its descriptor.
    """

    __slots__ = ("_url", "descriptor", "read_into")

    def __init__(self, url: str) -> None:
        self.descriptor = -1
        self._url = url
        try:
            # Without O_NONBLOCK, opening a pipe that has taken the place of the shard would wait for a writer.
            self.descriptor = os.open(local_path(url), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise ShardNotFoundError(f"shard {display_url(url)} does not exist (any more)") from error
        except OSError as error:
            raise ShardError(f"shard {display_url(url)} cannot be opened: {error}") from error
        self.read_into: ReadInto = partial(os.preadv, self.descriptor)

    def read(self, offset: int, length: int) -> bytearray:
        try:
            buffer = bytearray(length)
            done = self.read_into((buffer,), offset)
            while done < length:
                more = self.read_into((memoryview(buffer)[done:],), offset + done)
                if more == 0:
                    raise ends_early(
                        self._url, f"{length} bytes were expected at byte {offset}, but it ends after {done} of them"
                    )
                done += more
        except (OSError, MemoryError) as error:
            reason = str(error) or f"not enough memory for {length} bytes"
            raise ShardError(f"shard {display_url(self._url)} cannot be read at byte {offset}: {reason}") from error
        return buffer

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def open_source(url: str) -> Source:
    """Opens a shard for reading by position.

    Raises:
        ShardNotFoundError: There is no such file.
    """
    return LocalSource(url) if is_local(url) else RemoteSource(url)


def shard_version(url: str) -> ShardVersion:
    """Size and version of a shard, without reading it.

    Raises:
        ShardNotFoundError: There is no such file.
        ShardError: The shard cannot be reached, or the server does not report its size.
    """
    return ShardVersion.of(local_facts(url)) if is_local(url) else version_of(url, remote_info(url))


def local_facts(url: str) -> VersionFacts:
    """Size and version of a local shard.

    Raises:
        ShardNotFoundError: There is no such file.
        ShardError: The shard cannot be reached.
    """
    try:
        status = os.stat(local_path(url))
    except FileNotFoundError as error:
        raise ShardNotFoundError(f"shard {display_url(url)} does not exist: restore it, or leave it out") from error
    except (OSError, ValueError) as error:
        raise ShardError(f"shard {display_url(url)} cannot be reached: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ShardError(
            f"shard {display_url(url)} is {kind_of(status.st_mode)}, which cannot be read by position: list regular "
            "files"
        )
    time = status.st_mtime_ns
    return status.st_size, str(time), f"{status.st_ino} {status.st_ctime_ns}", time >= _NO_TIME_NS


def version_of(url: str, info: Mapping[str, Any]) -> ShardVersion:
    """Size and version of a remote shard, from the information of its filesystem.

    Raises:
        ShardError: It is a folder, or the server does not report its size.
    """
    if info.get("type") == "directory":
        raise ShardError(
            f"{display_url(url)} is a folder, not a shard: end it with '/' to read its *.tar files, or name the shards"
        )
    if info.get("size") is None:
        raise ShardError(
            f"the server does not say how large {display_url(url)} is, so it cannot be read by position: "
            "serve it with a Content-Length, or copy it to a local disk"
        )
    return ShardVersion(size=int(info["size"]), tag=version_tag(info), is_sure=bool(_known(info, _CONTENT_KEYS)))


def version_tag(info: Mapping[str, Any]) -> str:
    """A text that changes with a remote file, from the information of its filesystem.

    That is a checksum or an etag, and without one the times. Listings and single requests agree on the former only.
    """
    keys = _known(info, _CONTENT_KEYS)[:1] or _known(info, _TIME_KEYS)
    return ";".join(f"{key}={info[key]}" for key in keys)


def _known(info: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    return [key for key in keys if info.get(key) is not None]
