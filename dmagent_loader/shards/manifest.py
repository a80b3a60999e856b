"""``manifest.json``: the shards of each domain, and a record of each shard as it was written.

``{"schema": 1, "domains": {"source/web": {"rows": ..., "shards": [{"path": ..., "sha256": ...}, ...]}}}``. Paths are
relative to the manifest, so the folder can be moved or uploaded as it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import posixpath
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dmagent_loader._validation import read_regular, without_repeats
from dmagent_loader.errors import ConfigurationError, ShardError, ShardNotFoundError
from dmagent_loader.shards import forks
from dmagent_loader.shards.sources.local import open_source, shard_version
from dmagent_loader.shards.sources.urls import (
    HTTP,
    IPV6_HOST,
    display_url,
    is_local,
    local_path,
    protocol,
    with_long_host,
    without_signature,
)

MANIFEST_NAME = "manifest.json"
SCHEMA = 1
MAX_MANIFEST_BYTES = 1 << 30

_FOLDERS_ABOVE_SHARDS = 2
_MAY_NAME_SHARDS = re.compile(r"[=*?\[{]")
"""In the URL of a folder: the wildcards of patterns, and queries."""
_PATTERN = re.compile(r"[{}*?\[\]\\\0]|::|^\s*(pipe:|\|)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """A shard as it was written.

    Attributes:
        path: Path relative to the manifest, with forward slashes.
        rows: Number of samples.
        bytes: Size of the file.
        sha256: Hex sha256 of the whole file.
    """

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class DomainRecord:
    """A domain as it was written.

    Attributes:
        rows: Number of samples.
        documents: Number of documents with text.
        empty_documents: Number of documents without text, which are left out.
        bad_records: Number of records that are no documents, which are left out.
        tokens: Tokens in all rows, including end-of-text tokens; None for raw text.
        dropped_tokens: Tokens at the end that did not fill a row and are left out; None for raw text.
        special_token_documents: Documents whose text spells a special token; None for raw text.
        settings: Settings of the writer.
        inputs: Digest of the place of each input -> digest of its version and the settings with which it was added.
        shards: The files, in order.
    """

    rows: int
    documents: int
    empty_documents: int
    bad_records: int
    tokens: int | None
    dropped_tokens: int | None
    special_token_documents: int | None
    settings: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)
    shards: tuple[ShardRecord, ...]

    @property
    def bytes(self) -> int:
        """Total size of the files."""
        return sum(shard.bytes for shard in self.shards)


class Manifest(dict[str, list[str]]):
    """Domain name -> URLs of its shards, with the records of these shards. Made by `load_manifest`.

    Args:
        url: URL of the manifest.
        entries: Domain name -> the entries of its shards, as they stand in the file.
        version: Size and modification time of a local manifest when it was read.
        settings: Domain name -> the settings of its writer, as they stand in the file.
    """

    def __init__(
        self,
        url: str,
        entries: Mapping[str, list[dict[str, Any]]],
        version: tuple[int, int] | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.url, self.version, self.settings = url, version, settings or {}
        self._entries: dict[str, dict[str, Any]] = {}
        self._is_warned = False
        self._paths = {
            domain: [_in_url(url, str(shard["path"])) for shard in shards] for domain, shards in entries.items()
        }
        for domain, shards in entries.items():
            paths = self._paths[domain]
            self[domain] = [beside(url, path) for path in paths]
            self._entries.update((posixpath.normpath(path), shard) for path, shard in zip(paths, shards, strict=True))

    def digest(self, domain: str) -> str:
        """Hex sha256 over the records of a domain's shards, which changes with their contents.

        Args:
            domain: Name of a domain of the manifest.
        """
        records = [self._entries[posixpath.normpath(path)].get("sha256") for path in self._paths[domain]]
        return hashlib.sha256(json.dumps(records).encode()).hexdigest()

    def record(self, path: str) -> ShardRecord | None:
        """The record of a shard; None if the manifest has none, or only part of one.

        Args:
            path: Path of the shard, relative to the manifest, as it stands in the shard's URL.
        """
        entry = self._entries.get(path)  # most paths are in their normal form
        if entry is None:
            entry = self._entries.get(posixpath.normpath(path))
        if entry is None:
            return None
        name, rows, size, sha256 = (entry.get(field) for field in ("path", "rows", "bytes", "sha256"))
        if type(rows) is int and type(size) is int and isinstance(name, str) and isinstance(sha256, str):
            return ShardRecord(path=name, rows=rows, bytes=size, sha256=sha256)
        if not self._is_warned:
            logger.warning(
                "%s does not say how many rows and bytes %s has, and its sha256, as `dmagent shard` writes them: this "
                "shard, and others like it, are not compared with the manifest",
                display_url(self.url),
                path,
            )
        self._is_warned = True
        return None


class Manifests:
    """The manifests that a collection compares its shards with.

    A local shard is compared with the ``manifest.json`` two folders above it, where `dmagent shard` writes it. A remote
    shard is compared with the manifests that were passed in, so no request goes out for a manifest that may not exist.

    A manifest above local shards is read once, and again after it has changed. Unpickled copies, as in spawned data
    workers, have no other manifests: they may be large, and the index of a shard that the main process opened is found
    by its checksum.

    Args:
        given: Manifests that were loaded for these shards.
    """

    def __init__(self, given: Iterable[Manifest] = ()) -> None:
        self._remote: dict[str, Manifest] = {}
        self._above: dict[str, Manifest] = {}
        for manifest in given:
            if is_local(manifest.url):
                self._above[_absolute(manifest.url)] = manifest
            else:
                self._remote[without_signature(beside(manifest.url, ""))] = manifest
        self._lock = threading.Lock()
        forks.register(self)

    def record(self, url: str) -> ShardRecord | None:
        """The record of a shard as it was written; None if no manifest has one."""
        return self.records([url])[0]

    def records(self, urls: Sequence[str]) -> list[ShardRecord | None]:
        """The records of several shards; a manifest above local ones is looked at once."""
        above: dict[str, tuple[Manifest | None, str]] = {}
        found: list[ShardRecord | None] = []
        for url in urls:
            if not is_local(url):
                found.append(self._record_of_remote(url))
                continue
            folder, _, name = local_path(url).rpartition(os.sep)
            if folder not in above:
                root, *names = _absolute(f"{folder}{os.sep}{name}").rsplit(os.sep, _FOLDERS_ABOVE_SHARDS + 1)
                is_below = len(names) > _FOLDERS_ABOVE_SHARDS
                manifest = self._read(f"{root}{os.sep}{MANIFEST_NAME}") if is_below else None
                above[folder] = manifest, "/".join(names[:-1])
            manifest, folders = above[folder]
            found.append(None if manifest is None else manifest.record(f"{folders}/{name}"))
        return found

    def _record_of_remote(self, url: str) -> ShardRecord | None:
        if not self._remote:
            return None
        name = without_signature(url)
        records = (
            manifest.record(name.removeprefix(folder))
            for folder, manifest in self._remote.items()
            if name.startswith(folder)
        )
        return next((record for record in records if record is not None), None)

    def release(self) -> None:
        """Frees the manifests above local shards; they are read again when they are needed."""
        with self._lock:
            self._above.clear()

    def reset_after_fork(self) -> None:
        """Replaces the lock, which a thread of the parent may hold."""
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Manifests], tuple[()]]:
        return Manifests, ()

    def _read(self, path: str) -> Manifest | None:
        """A local manifest, if there is one; one that cannot be used counts as empty."""
        version = _version_of(path)
        if version is None:
            return None
        with self._lock:
            manifest = self._above.get(path)
            if manifest is None or manifest.version != version:
                try:
                    manifest = parse_manifest(path, read_stored(path), version)
                except (ShardError, OSError) as error:
                    logger.warning("%s is not used to check the shards below it: %s", path, error)
                    manifest = Manifest(path, {}, version)
                self._above[path] = manifest
            return manifest


def manifest_text(domains: Mapping[str, DomainRecord], kept: Mapping[str, Any]) -> str:
    """The text of a manifest.

    Args:
        domains: Domains that were written now.
        kept: Entries of an earlier manifest, as they stand in the file.
    """
    entries = {**kept, **{domain: asdict(record) for domain, record in domains.items()}}
    return json.dumps({"schema": SCHEMA, "domains": entries}, indent=1, ensure_ascii=False) + "\n"


def names_manifest(path: str) -> bool | None:
    """Whether a path or URL names a manifest or its folder, rather than a shard.

    The query of a signed URL says nothing about that.

    Returns:
        None if nothing shows it: a local path that is neither, a wildcard, or a query that may name the file.
    """
    if is_local(path):
        if path.endswith(".json") or os.path.isfile(os.path.join(local_path(path), MANIFEST_NAME)):
            return True
        return False if path.endswith(".tar") else None
    for name in (path.partition("?")[0], path):
        if name.endswith((".json", ".tar")):
            return name.endswith(".json")
    return None if _MAY_NAME_SHARDS.search(IPV6_HOST.sub("", without_signature(with_long_host(path)))) else True


def load_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Loads the shards of each domain, in the form that a sampler or `ShardCollection.open` takes.

    Args:
        path: Path or fsspec URL of a manifest or of its folder. The URLs of the shards do not get its query.

    Raises:
        ConfigurationError: The path is that of a shard.
        ShardNotFoundError: There is no manifest.
        ShardError: The file is not a manifest, or has another schema.
    """
    url = with_long_host(os.fspath(path))
    address, mark, query = (url, "", "") if is_local(url) else url.partition("?")
    if names_manifest(url) is False:
        raise ConfigurationError(
            f"{display_url(url)} is a shard or a pattern of shards, not a manifest: give the manifest.json that "
            "`dmagent shard` wrote, or, in Python, map its domain to it, {'source/name': path}"
        )
    if is_local(url):
        url = local_path(url)
        if os.path.isdir(url):
            url = os.path.join(url, MANIFEST_NAME)
    elif not url.endswith(".json") and not address.endswith(".json"):
        url = f"{address.rstrip('/')}/{MANIFEST_NAME}{mark}{query}"
    try:
        # The version first: a change while the file is read then makes the result out of date.
        version = _version_of(url) if is_local(url) else None
        return parse_manifest(url, read_stored(url), version)
    except FileNotFoundError as error:
        raise ShardNotFoundError(
            f"there is no manifest {display_url(url)}: `dmagent shard` writes one beside the shards; name shards "
            "without one by a pattern, such as web-{000..127}.tar"
        ) from error
    except OSError as error:
        raise ShardError(f"manifest {display_url(url)} cannot be read: {error}") from error


def parse_manifest(url: str, data: bytes, version: tuple[int, int] | None = None) -> Manifest:
    """Parses the bytes of a manifest. The records of its shards are only checked when they are used.

    Args:
        url: URL of the manifest.
        data: Its content.
        version: Size and modification time of a local manifest.

    Raises:
        ShardError: The file is not a manifest, or has another schema.
    """
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=without_repeats)
        if content["schema"] != SCHEMA:
            raise ShardError(
                f"manifest {display_url(url)} has schema {repr(content['schema'])[:50]}, but this version reads "
                f"schema {SCHEMA}: write the shards again with this version, or list them yourself"
            )
        domains = {domain: list(entry["shards"]) for domain, entry in content["domains"].items()}
        settings = {domain: dict(entry.get("settings") or {}) for domain, entry in content["domains"].items()}
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
    return Manifest(url, domains, version, settings)


def _version_of(path: str) -> tuple[int, int] | None:
    """Size and modification time in ns of a local file; None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def read_stored(url: str) -> bytes:
    """The bytes of a manifest or of a file beside it.

    Raises:
        OSError: The file cannot be read.
        ShardError: It is too large.
    """
    if is_local(url):
        return read_regular(url, MAX_MANIFEST_BYTES)
    size = shard_version(url).size
    if size > MAX_MANIFEST_BYTES:
        raise ShardError(f"{display_url(url)} has {size} bytes, more than {MAX_MANIFEST_BYTES}")
    return bytes(open_source(url).read(0, size))


def _is_inside(name: str) -> bool:
    """Whether a path stays below the manifest and is not a pattern that would be expanded."""
    parts = name.split("/")
    return bool(name) and not name.startswith("/") and ".." not in parts and not _PATTERN.search(name)


def beside(manifest: str, name: str) -> str:
    """The URL of a path that is relative to a manifest, without the query of the manifest unless that names it."""
    if is_local(manifest):
        return str(Path(manifest).parent / name)
    address = manifest.partition("?")[0]
    return f"{(address if address.endswith('.json') else manifest).rpartition('/')[0]}/{name}"


def _in_url(manifest: str, path: str) -> str:
    """A path of a manifest, as it stands in a URL beside it; no web server receives what follows a ``#``."""
    return path.replace("#", "%23") if protocol(manifest) in HTTP else path


def _absolute(path: str) -> str:
    """The absolute path. Parents are resolved where the path contains ``..``, whose meaning depends on links."""
    if os.pardir not in path.split(os.sep):
        return os.path.abspath(path)
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)
