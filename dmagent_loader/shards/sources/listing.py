"""Sizes and versions of many remote shards: one listing per folder, or single requests with dozens in flight."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dmagent_loader.errors import ShardError
from dmagent_loader.shards.sources.local import ShardVersion, shard_version, version_of
from dmagent_loader.shards.sources.remote import call, filesystem_of, timeout_seconds, with_retries
from dmagent_loader.shards.sources.urls import display_url

REQUESTS_IN_FLIGHT = 32
_LISTED_FROM = 8
"""Shards of one folder from which on it is listed: a folder may hold many other files."""
_KEYS_PER_REQUEST = 1000
"""Keys in one answer of an object store."""

logger = logging.getLogger(__name__)


def remote_versions(urls: Sequence[str], stop: threading.Event) -> list[ShardVersion]:
    """Size and version of each remote shard.

    HTTP servers have no listings. Neither is there one where the store refuses it, as without the right to list a
    bucket: there, each shard is asked for.

    Args:
        urls: URLs of the shards.
        stop: Drops the remaining requests when set.

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
    with ThreadPoolExecutor(REQUESTS_IN_FLIGHT, thread_name_prefix="dmagent-list") as pool:
        try:
            for found in pool.map(lambda item: _listed(*item), folders):
                versions.update(found)
            missing = [url for url in urls if url not in versions]
            versions.update(zip(missing, pool.map(shard_version, missing), strict=True))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop.set()
            raise
    return [versions[url] for url in urls]


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
