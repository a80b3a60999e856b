"""Indexes on disk, so that a shard is read through only once.

One file per shard (`dmagent_loader.shards.index.columns_file`), named by the hash of the URL and valid for one size and
modification time or etag. A replaced shard overwrites its entry, unless it has the time of the one before: then it was
damaged. An entry that is damaged in any way is built again. Beside them lie overviews of many shards
(`dmagent_loader.shards.index.overview`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

from dmagent_loader._files import remove_leftovers, write_atomically
from dmagent_loader.errors import DamagedShardError
from dmagent_loader.shards.index.columns_file import columns_in, metadata_in, seal
from dmagent_loader.shards.index.lock import exclusive
from dmagent_loader.shards.index.overview import KnownShard, Overview
from dmagent_loader.shards.index.shard_index import ShardIndex, build_index, without_rows
from dmagent_loader.shards.manifest import recorded
from dmagent_loader.shards.sources.local import ShardVersion, open_source, shard_version
from dmagent_loader.shards.sources.urls import display_url, is_local, local_path
from dmagent_loader.shards.tar.damage import ShardDamage, compared, is_as_written, resized, rows_that_lack_members
from dmagent_loader.shards.tar.header import BLOCK

CACHE_VARIABLE = "DMAGENT_CACHE_DIR"
_FORMAT = "4"
"""Raised whenever the same shard would be indexed otherwise."""
_COLUMNS = ("offset", "size", "extension", "row_first", "row_crc", "keys", "key_end")
_PATIENCE_SECONDS = 60.0
_SLOWEST_BYTES_PER_SECOND = 10 << 20
"""At which another process is given the time to index a shard."""
_NO_TIME_NS = 86_400 * 10**9
"""Files on the first day of 1970 have no time at all: of a read-only image, a store by content, some network mounts."""
_MOST_BYTES_AT_THE_END = 1 << 20
"""Padding of a tar with the largest blocking factor in use."""

_logger = logging.getLogger(__name__)
_warned: set[str] = set()


def default_cache_dir() -> Path:
    """``$DMAGENT_CACHE_DIR``, else ``~/.cache/dmagent_loader``."""
    configured = os.environ.get(CACHE_VARIABLE)
    return Path(configured).expanduser() if configured else Path("~/.cache/dmagent_loader").expanduser()


class IndexCache:
    """A folder of shard indexes.

    Args:
        folder: Made when first written to. One that cannot be written to only costs time: a warning says so.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()

    def entry(self, url: str) -> Path:
        """The file that holds the index of a shard."""
        identity = os.path.realpath(local_path(url)) if is_local(url) else url
        return self._folder / "index" / f"{hashlib.sha256(os.fsencode(identity)).hexdigest()}.safetensors"

    def load(self, url: str, version: ShardVersion) -> ShardIndex | None:
        """The index of this version of the shard, or None if there is none that can be used."""
        path = self.entry(url)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        try:
            index = parse_entry(url, data, version)
            if index is None or (index.sha256 is None and recorded(url) is not None):
                return None  # the second: the manifest came after the index
            index = judged(url, index)
            is_same = metadata_in(data)["changed"] == version.changed and version.is_sure
            if index.damage:
                # The remedy is to restore the shard, which may give it back the times of the damaged one; of a remote
                # shard, that would not be seen.
                return index if is_same and version.changed else None
            return index if is_same or _ends_as_indexed(url, index) else None
        except Exception as error:  # whatever is wrong with a cache entry, the remedy is to build it again
            _logger.warning(
                "the cached index %s of %s is not usable (%s): building it again", path, display_url(url), error
            )
            return None

    def find(self, url: str, version: ShardVersion | None, checksum: str) -> ShardIndex | None:
        """The index of this version (None: any) of the shard, if it has this content; None if there is none."""
        try:
            index = parse_entry(url, self.entry(url).read_bytes(), version)
        except Exception:  # whatever is wrong with a cache entry, the remedy is to build it again
            return None
        return None if index is None else with_content(index, checksum)

    def of_another_size(self, url: str, version: ShardVersion) -> ShardIndex | None:
        """The index of the whole file that a local shard was when it had another size at the same modification time."""
        if not is_local(url) or int(version.tag) < _NO_TIME_NS:
            return None
        try:
            data = self.entry(url).read_bytes()
            size, _ = json.loads(metadata_in(data)["version"])
            index = parse_entry(url, data, replace(version, size=size))
        except Exception:  # whatever is wrong with a cache entry, the remedy is to build it again
            return None
        return None if index is None or index.damage or index.file_size == version.size else index

    def save(self, url: str, version: ShardVersion, index: ShardIndex) -> bool:
        """Writes an index; complete or not at all.

        Returns:
            Whether it could be written.
        """
        metadata = {
            "format": _FORMAT,
            "shard": ascii(display_url(url)),
            "version": json.dumps([version.size, version.tag]),
            "changed": version.changed,
            "extensions": json.dumps(index.extensions),
            "checksum": index.checksum,
            "sha256": index.sha256 or "",
            "damage": json.dumps([asdict(damage) for damage in index.damage]),
        }
        return self._write(self.entry(url), seal({name: getattr(index, name) for name in _COLUMNS}, metadata))

    def load_overview(self, urls: Iterable[str], num_shards: int) -> Overview:
        """What is known of a list of shards; an empty overview if there is none that can be used."""
        path = self._overview(urls)
        try:
            return Overview.from_bytes(path.read_bytes(), num_shards, _FORMAT)
        except OSError:
            return Overview(num_shards)
        except Exception as error:  # whatever is wrong with it, the remedy is to look at the indexes themselves
            _logger.warning("the overview %s of cached indexes is not usable (%s): making it again", path, error)
            return Overview(num_shards)

    def save_overview(self, urls: Iterable[str], overview: Overview) -> None:
        """Writes what is known of a list of shards."""
        self._write(self._overview(urls), overview.to_bytes(_FORMAT))

    def forget_overview(self, urls: Iterable[str]) -> None:
        """Removes what is known of a list of shards: one of them turned out to be another."""
        with contextlib.suppress(OSError):
            self._overview(urls).unlink()

    def _overview(self, urls: Iterable[str]) -> Path:
        digest = hashlib.sha256()
        for url in urls:
            digest.update(os.fsencode(url) + b"\0")
        return self._folder / "overview" / f"{digest.hexdigest()}.safetensors"

    def _write(self, path: Path, data: bytes) -> bool:
        """Whether the file could be written; it is complete or not there at all."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not flushed: a file that a power failure spoils fails its checksum and is made again.
            write_atomically(path, data, durable=False)
            return True
        except OSError as error:
            if str(self._folder) not in _warned:
                _warned.add(str(self._folder))
                _logger.warning(
                    "the index cache %s cannot be written (%s): shards are indexed again at every start; set %s or "
                    "cache_dir to a folder that can be written",
                    self._folder,
                    error,
                    CACHE_VARIABLE,
                )
            return False

    def sweep(self) -> None:
        """Removes what killed processes left half-written."""
        for folder in ("index", "overview"):
            remove_leftovers(self._folder / folder)


def build_and_cache(
    url: str,
    version: ShardVersion,
    cache: IndexCache,
    *,
    advance: Callable[[int], object],
    stop: threading.Event,
) -> tuple[ShardIndex, bool]:
    """Indexes a shard and caches the index, unless another process has done so meanwhile.

    Args:
        url: The shard.
        version: Its present size and version.
        cache: Where indexes are kept.
        advance: Called with the number of bytes done since the last call.
        stop: When set, the work ends with `dmagent_loader.shards.tar.scan.ScanStopped`.

    Returns:
        The index, and whether it is in the cache.

    Raises:
        DamagedShardError: The shard changes while it is indexed.
        ShardLayoutError: It cannot be read as samples by position.
    """
    patience = _PATIENCE_SECONDS + version.size / _SLOWEST_BYTES_PER_SECOND
    with exclusive(cache.entry(url).with_suffix(".lock"), f"indexing {display_url(url)}", patience, stop):
        index = cache.load(url, version)
        if index is not None:
            advance(version.size)
            return index, True
        vouched = recorded(url) is not None
        index = build_index(url, open_source(url), version.size, advance=advance, stop=stop, with_sha256=vouched)
        now = shard_version(url)
        if now != version:
            raise DamagedShardError(
                f"shard {display_url(url)} changed while it was indexed ({version.size} bytes before, {now.size} "
                "after, or another time or etag): open the shards when nobody writes them any more"
            )
        whole = None if vouched or index.damage else cache.of_another_size(url, version)
        if whole is not None:
            # The index of the whole file stays: it tells at the next start, too, and serves the restored shard.
            index = without_rows(index, _rows_that_are_new(index, whole))
            return replace(index, damage=(resized(url, index, whole),)), False
        saved = cache.save(url, version, index)
        return judged(url, index), saved


def judged(url: str, index: ShardIndex) -> ShardIndex:
    """An index with what only the manifest above its shard shows; it is not cached with the index.

    So a manifest that is corrected, or removed, counts at the next start. A shard that is not the file that was written
    may lack members that a tar does not show to be missing: rows that lack one are left out.
    """
    record = recorded(url)
    if record is None:
        return index
    as_written = is_as_written(record, size=index.file_size, rows=index.num_rows, sha256=index.sha256)
    if not as_written:
        index = without_rows(index, rows_that_lack_members(index.row_first, index.extension))
    return replace(index, damage=compared(url, index, record))


def with_content(index: ShardIndex, checksum: str) -> ShardIndex | None:
    """The index of some content: all rows, or less those that `judged` leaves out, whatever the manifest says now."""
    if index.checksum != checksum:
        index = without_rows(index, rows_that_lack_members(index.row_first, index.extension))
    return index if index.checksum == checksum else None


def is_vouched_for(url: str, shard: KnownShard) -> bool:
    """Whether the manifest above a shard, if there is one, has been asked and has nothing against it."""
    record = recorded(url)
    if record is None:
        return True
    as_written = is_as_written(record, size=shard.version.size, rows=shard.rows, sha256=shard.sha256)
    return as_written and shard.sha256 is not None


def _rows_that_are_new(index: ShardIndex, before: ShardIndex) -> list[int]:
    """The rows of a shard that another one has not, by key and checksum of the payloads."""
    known = {(before.key(row), crc) for row, crc in enumerate(before.row_crc.tolist())}
    return [row for row, crc in enumerate(index.row_crc.tolist()) if (index.key(row), crc) not in known]


def _ends_as_indexed(url: str, index: ShardIndex) -> bool:
    """Whether no row was appended where padding was, which changes nothing else that is compared."""
    end = -(-int(index.offset[-1] + index.size[-1]) // BLOCK) * BLOCK if index.num_members else 0
    length = index.file_size - end
    if length > _MOST_BYTES_AT_THE_END:
        return False
    return length <= 0 or not any(open_source(url).read(end, length))


def parse_entry(url: str, data: bytes, version: ShardVersion | None) -> ShardIndex | None:
    """The index in a cache entry; None if it is of another version of the shard, or of another format.

    Args:
        url: The shard.
        data: The whole entry.
        version: The one that is asked for; None: any.

    Raises:
        Exception: Of any kind, if the entry is damaged.
    """
    metadata = metadata_in(data)
    size, tag = json.loads(metadata["version"])
    if metadata["format"] != _FORMAT or (version is not None and (size, tag) != (version.size, version.tag)):
        return None
    columns = columns_in(data, metadata)
    index = ShardIndex(
        file_size=int(size),
        extensions=tuple(json.loads(metadata["extensions"])),
        checksum=metadata["checksum"],
        sha256=metadata["sha256"] or None,
        damage=tuple(ShardDamage(**{**damage, "shard": url}) for damage in json.loads(metadata["damage"])),
        **{name: columns[name] for name in _COLUMNS},
    )
    index.check()
    return index
