"""Sizes and versions of many remote shards: one listing per folder, or single requests with dozens in flight."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

from dmagent_loader.errors import ShardError
from dmagent_loader.shards.sources.calls import call, ended_by, timeout_seconds
from dmagent_loader.shards.sources.local import ShardVersion, shard_version, version_of
from dmagent_loader.shards.sources.remote import filesystem_of, with_retries
from dmagent_loader.shards.sources.urls import display_url

REQUESTS_IN_FLIGHT = 32
_LISTED_FROM = 8
"""Shards of one folder from which on it is listed: a folder may hold many other files."""
_KEYS_PER_REQUEST = 1000
"""Keys in one answer of an object store."""

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


def remote_versions(urls: Sequence[str], stop: threading.Event) -> list[ShardVersion]:
    """Size and version of each remote shard.

    HTTP servers have no listings. Neither is there one where the store refuses it, as without the right to list a
    bucket: there, each shard is asked for.

    Args:
        urls: URLs of the shards.
        stop: Ends all requests when set.

    Raises:
        ShardNotFoundError: There is no such shard.
        ShardError: A shard cannot be reached.
    """
    versions: dict[str, ShardVersion] = {}
    by_folder: dict[str, list[str]] = {}
    for url in urls:
        if not url.lower().startswith("http") and "?" not in url and "::" not in url:
            by_folder.setdefault(url.rpartition("/")[0], []).append(url)
    folders = [(folder, listed) for folder, listed in by_folder.items() if len(listed) >= _LISTED_FROM]

    def listed(folder: str, of_folder: Sequence[str]) -> dict[str, ShardVersion]:
        with ended_by(stop):
            return _listed(folder, of_folder)

    def asked(url: str) -> ShardVersion:
        with ended_by(stop):
            return shard_version(url)

    with ThreadPoolExecutor(REQUESTS_IN_FLIGHT, thread_name_prefix="dmagent-list") as pool:
        try:
            for found in _first_error_first([pool.submit(listed, *folder) for folder in folders]):
                versions.update(found)
            missing = [url for url in urls if url not in versions]
            answers = _first_error_first([pool.submit(asked, url) for url in missing])
            versions.update(zip(missing, answers, strict=True))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop.set()
            raise
    return [versions[url] for url in urls]


def _first_error_first(futures: Sequence[Future[_T]]) -> list[_T]:
    """Results in order. An error is raised as soon as it occurs, whatever is still running before it."""
    for future in as_completed(futures):
        future.result()
    return [future.result() for future in futures]


def _listed(folder: str, urls: Sequence[str]) -> dict[str, ShardVersion]:
    """The versions of those shards that a listing of their folder names, with etags or checksums.

    Stores write times in listings in another way than in answers about single files.
    """
    limit = timeout_seconds() * (1 + len(urls) / _KEYS_PER_REQUEST)
    try:
        filesystem, path = filesystem_of(folder)

        def fresh() -> list[dict[str, Any]]:
            filesystem.invalidate_cache()
            entries: list[dict[str, Any]] = call(filesystem, "ls", path, detail=True, limit=limit)
            filesystem.invalidate_cache()  # which would hold a million entries for as long as the process lives
            return entries

        entries = with_retries(folder, limit, fresh)
    except ShardError as error:
        logger.info("%s cannot be listed, so each shard is asked for: %s", display_url(folder), error)
        return {}
    by_name = {str(entry["name"]).rpartition("/")[2]: entry for entry in entries if entry.get("type") == "file"}
    found = ((url, by_name.get(url.rpartition("/")[2])) for url in urls)
    versions = {url: version_of(url, entry) for url, entry in found if entry is not None}
    return {url: version for url, version in versions.items() if version.is_sure}
