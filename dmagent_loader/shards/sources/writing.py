"""Writing files to paths and URLs, whole or not at all.

A local file is written under another name and renamed. An object store publishes an object when its upload is complete.
A process that is killed before leaves nothing that can be read; parts of an unfinished multipart upload stay until the
bucket's rule for incomplete uploads removes them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmagent_loader._files import write_atomically
from dmagent_loader.errors import ShardError, ShardNotFoundError
from dmagent_loader.shards.sources.calls import SLOWEST_BYTES_PER_SECOND, call, timeout_seconds
from dmagent_loader.shards.sources.remote import filesystem_of, with_retries
from dmagent_loader.shards.sources.urls import display_url, is_local, local_path, protocol, split_chain

_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "memory")
"""Stores in which a file appears when it is complete."""


def refuse_unwritable(url: str) -> None:
    """Raises ShardError for URLs that files cannot be written to as a whole."""
    if is_local(url):
        return
    if split_chain(url)[0] or protocol(url) not in _STORES:
        raise ShardError(
            f"{display_url(url)} cannot be written to so that nothing incomplete is seen: choose a local folder or an "
            f"object store, {', '.join(f'{name}://' for name in ('s3', 'gs', 'az', 'hf'))}"
        )


def write_url(url: str, data: bytes) -> None:
    """Writes a file, and replaces one of this name.

    Args:
        url: Path, or URL of an object store. The folder of a local file is made.
        data: Its content.

    Raises:
        OSError: A local file cannot be written.
        ShardError: The store refuses it or cannot be reached.
    """
    if is_local(url):
        path = Path(local_path(url))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
        return
    _put(url, len(data), lambda filesystem, path, limit: call(filesystem, "pipe_file", path, data, limit=limit))


def upload_file(local: str | os.PathLike[str], url: str) -> None:
    """Copies a local file to an object store, and replaces an object of this name.

    Raises:
        ShardError: The store refuses it or cannot be reached.
    """
    source = os.fspath(local)
    size = os.path.getsize(source)
    _put(url, size, lambda filesystem, path, limit: call(filesystem, "put_file", source, path, limit=limit))


def remove_url(url: str) -> None:
    """Removes an object, if there is one.

    Raises:
        ShardError: The store refuses it or cannot be reached.
    """

    def remove(filesystem: Any, path: str, limit: float) -> None:
        with contextlib.suppress(FileNotFoundError):
            call(filesystem, "rm", path, limit=limit)

    _put(url, 0, remove)


def _put(url: str, size: int, action: Callable[[Any, str, float], object]) -> None:
    refuse_unwritable(url)
    filesystem, path = filesystem_of(url)
    limit = timeout_seconds() + size / SLOWEST_BYTES_PER_SECOND
    try:
        with_retries(url, limit, lambda: action(filesystem, path, limit), "written")
    except ShardNotFoundError as error:
        raise ShardError(f"{display_url(url)} cannot be written, because its bucket does not exist: make it") from error
