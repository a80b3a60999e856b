"""``manifest.json``: which shards belong to which domain, and what is in them.

``{"schema": 1, "domains": {"source/web": {"rows": ..., "shards": [{"path": ..., "sha256": ...}, ...]}}}``; paths are
relative to the manifest, so the folder can be moved or uploaded as it is.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dmagent_loader._validation import read_regular
from dmagent_loader.errors import ConfigurationError, ShardError, ShardNotFoundError
from dmagent_loader.shards.sources.local import open_source, shard_version
from dmagent_loader.shards.sources.urls import display_url, is_local, local_path

MANIFEST_NAME = "manifest.json"
SCHEMA = 1
MAX_MANIFEST_BYTES = 1 << 30

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One written shard.

    Attributes:
        path: Relative to the manifest, with forward slashes.
        rows: Samples.
        bytes: Size of the file.
        sha256: Of the whole file.
    """

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class DomainRecord:
    """What was written for one domain.

    Attributes:
        rows: Samples.
        documents: Documents that were read, empty ones not counted.
        empty_documents: Documents without text, left out.
        tokens: Tokens in all rows, end-of-document tokens included; None for raw text.
        dropped_tokens: Tokens at the end that did not fill a row, left out; None for raw text.
        settings: How the domain was written.
        shards: The files, in order.
    """

    rows: int
    documents: int
    empty_documents: int
    tokens: int | None
    dropped_tokens: int | None
    settings: dict[str, Any]
    shards: tuple[ShardRecord, ...]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(shard.bytes for shard in self.shards)


def manifest_text(domains: Mapping[str, DomainRecord], kept: Mapping[str, Any]) -> str:
    """The text of a manifest.

    Args:
        domains: The domains that were written.
        kept: Entries of an earlier manifest, as they stand there.
    """
    entries = {**kept, **{domain: asdict(record) for domain, record in domains.items()}}
    return json.dumps({"schema": SCHEMA, "domains": entries}, indent=1, ensure_ascii=False) + "\n"


def load_manifest(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Domain name -> shards, as a sampler takes them.

    Args:
        path: A manifest, or the folder that holds one; local or an fsspec URL.

    Raises:
        ConfigurationError: It is a shard.
        ShardNotFoundError: There is none.
        ShardError: It is not a manifest, or of another schema.
    """
    url = os.fspath(path)
    if url.endswith(".tar"):
        raise ConfigurationError(
            f"{display_url(url)} is a shard or a pattern of shards, not a manifest: give the manifest.json that "
            "`dmagent shard` wrote, or, in Python, map its domain to it, {'source/name': path}"
        )
    if is_local(url):
        url = local_path(url)
        if os.path.isdir(url):
            url = os.path.join(url, MANIFEST_NAME)
    elif not url.endswith(".json"):
        url = f"{url.rstrip('/')}/{MANIFEST_NAME}"
    try:
        manifest = parse_manifest(url, _read(url))
    except FileNotFoundError as error:
        raise ShardNotFoundError(
            f"there is no manifest {display_url(url)}: `dmagent shard` writes one beside the shards"
        ) from error
    except OSError as error:
        raise ShardError(f"manifest {display_url(url)} cannot be read: {error}") from error
    listing = {domain: [_beside(url, str(shard["path"])) for shard in shards] for domain, shards in manifest.items()}
    if not is_local(url):
        _remote[url] = _Records(url, manifest)
    return listing


def parse_manifest(url: str, data: bytes) -> dict[str, list[dict[str, Any]]]:
    """Domain name -> records of its shards, from the bytes of a manifest.

    Raises:
        ShardError: It is not a manifest, or of another schema.
    """
    try:
        manifest = json.loads(data.decode("utf-8"), object_pairs_hook=_without_repeats)
        if manifest["schema"] != SCHEMA:
            raise ShardError(
                f"manifest {display_url(url)} has schema {repr(manifest['schema'])[:50]}, but this version reads "
                f"schema {SCHEMA}: write the shards again with this version, or list them yourself"
            )
        domains = {domain: list(entry["shards"]) for domain, entry in manifest["domains"].items()}
        for domain, shards in domains.items():
            for shard in shards:
                name = shard["path"]
                if not isinstance(name, str) or not _is_inside(name):
                    raise ValueError(
                        f"domain {domain[:100]!r} lists {str(name)[:200]!r}, which is not the path of a file beside "
                        "the manifest"
                    )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ShardError(
            f"{display_url(url)} is not a manifest of shards ({type(error).__name__}: {error}); `dmagent shard` "
            "writes one"
        ) from error
    return domains


def recorded(url: str) -> ShardRecord | None:
    """What the manifest above a shard says of it; None if there is no manifest, or nothing in it about the shard.

    `dmagent shard` writes ``manifest.json`` two folders above the shards. A remote one counts only if `load_manifest`
    read it in this process: no request goes out that nobody asked for.
    """
    if is_local(url):
        shard = _absolute(local_path(url))
        if shard.count(os.sep) <= _DEPTH:
            return None
        records = _local_records(os.path.join(shard.rsplit(os.sep, _DEPTH + 1)[0] or os.sep, MANIFEST_NAME))
        return records.get(shard) if records is not None else None
    for records in _remote.values():
        record = records.get(url)
        if record is not None:
            return record
    return None


def _absolute(path: str) -> str:
    """The path from the root; what ``..`` is above depends on links."""
    if os.pardir not in path.split(os.sep):
        return os.path.abspath(path)
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


class _Records:
    """Shards by URL; each entry is checked only when it is asked for."""

    def __init__(self, url: str, manifest: Mapping[str, list[dict[str, Any]]]) -> None:
        self._url, self._warned = url, False
        self._entries = {_beside(url, str(shard["path"])): shard for shards in manifest.values() for shard in shards}

    def get(self, url: str) -> ShardRecord | None:
        entry = self._entries.get(url)
        if entry is None:
            return None
        path, rows, size, sha256 = (entry.get(name) for name in ("path", "rows", "bytes", "sha256"))
        if not (type(rows) is int and type(size) is int and isinstance(path, str) and isinstance(sha256, str)):
            if not self._warned:
                _logger.warning(
                    "%s does not say how many rows and bytes %s has, and its sha256, in the way of `dmagent shard`: "
                    "this shard, and others like it, are not compared with it",
                    display_url(self._url),
                    display_url(url),
                )
            self._warned = True
            return None
        return ShardRecord(path=path, rows=rows, bytes=size, sha256=sha256)


_DEPTH = 2
_PATTERN = re.compile(r"[{}*?\[\]\\\0]|::|^\s*(pipe:|\|)")
_remote: dict[str, _Records] = {}
_reading = threading.Lock()
_local: dict[str, tuple[tuple[int, int], _Records]] = {}


def _after_fork() -> None:
    global _reading
    _reading = threading.Lock()  # a thread that held it is not in the child


os.register_at_fork(after_in_child=_after_fork)


def _local_records(path: str) -> _Records | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    version = (status.st_size, status.st_mtime_ns)
    with _reading:
        known = _local.get(path)
        if known is not None and known[0] == version:
            return known[1]
        try:
            manifest = parse_manifest(path, _read(path))
        except (ShardError, OSError) as error:
            _logger.warning("%s is not used to check the shards below it: %s", path, error)
            manifest = {}
        records = _Records(path, manifest)
        _local[path] = (version, records)
        return records


def _read(url: str) -> bytes:
    if is_local(url):
        return read_regular(url, MAX_MANIFEST_BYTES)
    size = shard_version(url).size
    if size > MAX_MANIFEST_BYTES:
        raise ShardError(f"manifest {display_url(url)} has {size} bytes, more than {MAX_MANIFEST_BYTES}")
    return bytes(open_source(url).read(0, size))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one that has a name twice would silently lose what stands under the first."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:100]!r} stands in it twice")
        found[name] = value
    return found


def _is_inside(name: str) -> bool:
    """Whether a path stays below the manifest, and is no pattern that would be expanded."""
    parts = name.split("/")
    return bool(name) and not name.startswith("/") and ".." not in parts and not _PATTERN.search(name)


def _beside(manifest: str, name: str) -> str:
    if is_local(manifest):
        return str(Path(manifest).parent / name)
    return f"{manifest.rsplit('/', 1)[0]}/{name}"
