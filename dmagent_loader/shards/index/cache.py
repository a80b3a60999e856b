"""Indexes on disk, so that every shard is read through only once.

There is one file per shard (`dmagent_loader.shards.index.entry_file`), named by the hash of its path, or of its URL
without signature. It is valid for one content: one size, and the modification times or etags of the copies that were
read through, of which nodes with disks of their own may have several. The index of a replaced shard overwrites that of
the earlier one, unless both have the same modification time: then the shard was damaged. A file that is damaged in any
way is built again. Overviews of many shards lie beside the indexes (`dmagent_loader.shards.index.overview`).

Shards that were touched or moved are not read through again. Links in ``content``, named by the size and a sample of
the bytes of a local shard, or by the checksum that the store has of a remote one, lead to the index of the same
content. A local shard of another path or time is taken for it if some of its rows and headers are those that were
indexed; every row is compared with its checksum when it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from dmagent_loader._files import remove_leftovers, write_atomically
from dmagent_loader.errors import DamagedShardError, ShardError
from dmagent_loader.shards.index.columns_file import read_metadata
from dmagent_loader.shards.index.entry_file import FORMAT, are_equal, entry_bytes, looks_as_indexed, parse_entry
from dmagent_loader.shards.index.lock import exclusive
from dmagent_loader.shards.index.overview import MOST_COPIES, Overview
from dmagent_loader.shards.index.shard_index import ShardIndex, build_index
from dmagent_loader.shards.index.sharing import GROUP_FILES
from dmagent_loader.shards.index.verify import verified, with_content, without_new_rows
from dmagent_loader.shards.manifest import ShardRecord
from dmagent_loader.shards.sources.local import ShardVersion, open_source, shard_version
from dmagent_loader.shards.sources.urls import display_url, is_local, local_path, protocol, without_signature
from dmagent_loader.shards.tar import KeyEnd

CACHE_VARIABLE = "DMAGENT_CACHE_DIR"
_PATIENCE_SECONDS = 60.0
_SLOWEST_BYTES_PER_SECOND = 10 << 20
"""Rate at which another process is expected to index a shard."""
_SAMPLED_PLACES, _BYTES_OF_A_PLACE = 16, 4096
"""Places of a file whose bytes stand for its content where its index is looked for."""
_CHECKSUM_TAG = re.compile(r"(?:md5Hash|Content-MD5)=.+")
_ETAG_OF_MD5 = re.compile(r"ETag=\"?[0-9a-f]{32}(?:-\d+)?\"?")
_STORES_WITH_ETAGS_OF_MD5 = ("s3", "s3a")
"""Elsewhere, an etag of this form may be a hash of time and size, as Starlette makes it: the same for many files."""

logger = logging.getLogger(__name__)
_NOWHERE = Path(os.devnull) / "dmagent_loader"
_warned: set[str] = set()
"""Folders whose users were warned in this process that they cannot be written to."""


def default_cache_dir() -> Path:
    """``$DMAGENT_CACHE_DIR``, or else ``~/.cache/dmagent_loader``; where there is no home, a folder that cannot be."""
    try:
        return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/dmagent_loader").expanduser()
    except RuntimeError:
        if str(_NOWHERE) not in _warned:
            _warned.add(str(_NOWHERE))
            logger.warning(
                "there is no home folder for the index cache (HOME is not set, and user %d has no passwd entry): "
                "shards are indexed again at every start; set %s or cache_dir to a folder that can be written",
                os.getuid(),
                CACHE_VARIABLE,
            )
        return _NOWHERE


class IndexCache:
    """A folder of shard indexes.

    Args:
        folder: Created at the first write. If it cannot be written to, a warning says so, and shards are indexed again
            at every start.
        key_ends_at: The dot of a name at which the key of its sample ends. Indexes of either kind lie side by side.
    """

    def __init__(self, folder: Path, key_ends_at: KeyEnd = "first-dot") -> None:
        self.folder = folder.absolute()
        self.key_ends_at = key_ends_at
        self._suffix = b"" if key_ends_at == "first-dot" else b"\0" + key_ends_at.encode()

    def entry(self, url: str) -> Path:
        """The file for the index of a shard."""
        identity = os.path.realpath(local_path(url)) if is_local(url) else without_signature(url)
        digest = hashlib.sha256(os.fsencode(identity) + self._suffix).hexdigest()
        return self.folder / "index" / f"{digest}.safetensors"

    def load(self, url: str, version: ShardVersion, record: ShardRecord | None) -> ShardIndex | None:
        """The index of this version of a shard, compared with the manifest; None if no usable one is cached.

        Args:
            url: URL of the shard.
            version: Its present size and version.
            record: Its record in the manifest; None if there is none.
        """
        path = self.entry(url)
        try:
            data = path.read_bytes()
        except OSError:
            return self._of_the_same_content(url, version, record)
        try:
            index = parse_entry(url, data, version)
            if index is None:
                return self._of_the_same_content(url, version, record)
            if index.sha256 is None and record is not None:
                return None  # the manifest came after the index
            index = verified(url, index, record)
            is_same = [version.tag, version.changed] in json.loads(read_metadata(data)["copies"]) and version.is_sure
            if index.damage:
                # Users are told to restore a damaged shard, which may also restore its times; for a remote shard, that
                # would go unnoticed.
                return index if is_same and version.changed else None
            return index if is_same or looks_as_indexed(url, index) else None
        except Exception as error:  # of any kind: the index is built again
            logger.warning(
                "the cached index %s of %s is not usable (%s): building it again", path, display_url(url), error
            )
            return None

    def _of_the_same_content(self, url: str, version: ShardVersion, record: ShardRecord | None) -> ShardIndex | None:
        """The index of the content that a shard had under another path or time, which is saved for this shard, too."""
        try:
            link = self._link(url, version)
            if link is None:
                return None
            index = parse_entry(url, link.read_bytes(), None)
            if index is None or index.file_size != version.size or (index.sha256 is None and record is not None):
                return None
            index = verified(url, index, record)
            if index.damage or not looks_as_indexed(url, index):
                return None
        except Exception:  # of any kind: the index is built
            return None
        self.save(url, version, index)
        return index

    def _link(self, url: str, version: ShardVersion) -> Path | None:
        """The link to the index of a shard's content; None if nothing cheap identifies the content."""
        digest = hashlib.sha256(str(version.size).encode() + self._suffix)
        if not is_local(url):
            if not _is_of_content(url, version.tag):
                return None
            digest.update(version.tag.encode())
        else:
            source, length = open_source(url), min(_BYTES_OF_A_PLACE, version.size)
            for place in np.linspace(0, version.size - length, _SAMPLED_PLACES, dtype=np.int64).tolist():
                digest.update(source.read(place, length))
        return self.folder / "content" / digest.hexdigest()

    def forget_content(self, url: str, version: ShardVersion) -> None:
        """Removes the link to the index of a shard whose rows have turned out to be others."""
        with contextlib.suppress(OSError, ShardError):
            link = self._link(url, version)
            if link is not None:
                link.unlink()

    def forget(self, url: str) -> None:
        """Removes the index of a shard, which is of another version."""
        with contextlib.suppress(OSError):
            self.entry(url).unlink()

    def find(self, url: str, version: ShardVersion | None, checksum: str) -> ShardIndex | None:
        """The cached index of the content with this checksum; None if there is none.

        Args:
            url: URL of the shard.
            version: Version that was indexed; None accepts any.
            checksum: `ShardIndex.checksum` of the content.
        """
        try:
            index = parse_entry(url, self.entry(url).read_bytes(), version)
        except Exception:  # of any kind: the index is built again
            return None
        return None if index is None else with_content(index, checksum)

    def knows_another(self, url: str, version: ShardVersion) -> bool:
        """Whether the index of another version of a shard is cached, and none of this one."""
        try:
            metadata = read_metadata(self.entry(url).read_bytes())
            tags = [tag for tag, _ in json.loads(metadata["copies"])]
            return int(metadata["size"]) != version.size or bool(tags and version.tag not in tags)
        except Exception:  # of any kind: the file does not count
            return False

    def of_the_same_time(self, url: str, version: ShardVersion) -> ShardIndex | None:
        """The index of an intact local shard, of whatever size, with this modification time; None if there is none."""
        if not is_local(url) or not version.is_sure:
            return None
        try:
            data = self.entry(url).read_bytes()
            index = parse_entry(url, data, replace(version, size=int(read_metadata(data)["size"])))
        except Exception:  # of any kind: the index is built again
            return None
        return None if index is None or index.damage else index

    def save(self, url: str, version: ShardVersion | None, index: ShardIndex) -> bool:
        """Writes an index atomically; False if the cache cannot be written to.

        Args:
            url: URL of the shard.
            version: Version that was indexed; None if an index from elsewhere says what the shard holds.
            index: The index.
        """
        copies = self._copies(url, version, index)
        if version is not None:
            copies = [[version.tag, version.changed], *copies]
        saved = self._write(self.entry(url), entry_bytes(display_url(url), index, copies))
        if saved and version is not None and not index.damage:
            self._save_link(url, version)
        return saved

    def _save_link(self, url: str, version: ShardVersion) -> None:
        """Makes the content of a shard lead to its index; without links, moved shards are indexed again."""
        with contextlib.suppress(OSError, ShardError):
            link = self._link(url, version)
            if link is None:
                return
            link.parent.mkdir(parents=True, exist_ok=True)
            entry = Path("..") / "index" / self.entry(url).name
            try:
                link.symlink_to(entry)
            except FileExistsError:
                if link.readlink() != entry:  # a process that looks between the two calls reads the shard
                    link.unlink()
                    link.symlink_to(entry)

    def _copies(self, url: str, version: ShardVersion | None, index: ShardIndex) -> list[list[str]]:
        """Tag and change time of other copies of a shard, with the same bytes at the same places."""
        try:
            data = self.entry(url).read_bytes()
            before = parse_entry(url, data, None)
            copies = json.loads(read_metadata(data)["copies"])
        except Exception:  # of any kind: there are none
            return []
        if before is None or not are_equal(before, index):
            return []
        now = None if version is None else [version.tag, version.changed]
        return [copy for copy in copies if copy != now][:MOST_COPIES]

    def load_overview(self, urls: Iterable[str], num_shards: int) -> Overview:
        """The overview of a list of shards; empty if no usable one is cached."""
        path = self._overview(urls)
        try:
            return Overview.from_bytes(path.read_bytes(), num_shards, FORMAT)
        except OSError:
            return Overview(num_shards)
        except Exception as error:  # of any kind: the indexes are read instead
            logger.warning("the overview %s of cached indexes is not usable (%s): making it again", path, error)
            return Overview(num_shards)

    def save_overview(self, urls: Iterable[str], overview: Overview) -> None:
        """Writes the overview of a list of shards."""
        self._write(self._overview(urls), overview.to_bytes(FORMAT))

    def forget_overview(self, urls: Iterable[str]) -> None:
        """Removes the overview of a list of shards, one of which was replaced."""
        with contextlib.suppress(OSError):
            self._overview(urls).unlink()

    def sweep(self) -> None:
        """Removes temporary files of killed processes; in the folder itself, which may hold others, only its own."""
        remove_leftovers(self.folder, GROUP_FILES)
        for folder in ("index", "overview"):
            remove_leftovers(self.folder / folder)

    def _overview(self, urls: Iterable[str]) -> Path:
        identities = "\0".join([*urls, ""])
        if "?" in identities:  # some may be signed
            identities = "\0".join(
                without_signature(url) if "?" in url and not is_local(url) else url for url in identities.split("\0")
            )
        digest = hashlib.sha256(os.fsencode(identities))
        digest.update(self._suffix)
        return self.folder / "overview" / f"{digest.hexdigest()}.safetensors"

    def _write(self, path: Path, data: bytes) -> bool:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not flushed to disk: a file that a power failure spoils fails its checksum and is built again.
            write_atomically(path, data, durable=False)
            return True
        except OSError as error:
            if str(self.folder) not in _warned:
                _warned.add(str(self.folder))
                logger.warning(
                    "the index cache %s cannot be written (%s): shards are indexed again at every start; set %s or "
                    "cache_dir to a folder that can be written",
                    self.folder,
                    error,
                    CACHE_VARIABLE,
                )
            return False


def build_and_cache(
    url: str,
    version: ShardVersion,
    cache: IndexCache,
    record: ShardRecord | None,
    *,
    advance: Callable[[int], object],
    stop: threading.Event,
) -> tuple[ShardIndex, bool]:
    """Indexes a shard and caches its index, unless another process has done so meanwhile.

    Args:
        url: URL of the shard.
        version: Its present size and version.
        cache: Where indexes are kept.
        record: Its record in the manifest; None if there is none.
        advance: Called with the number of bytes done since the last call.
        stop: Ends the work with `dmagent_loader.shards.tar.ScanStopped` when set.

    Returns:
        The index, and whether it is in the cache.

    Raises:
        DamagedShardError: The shard changes while it is indexed.
        ScanStopped: `stop` was set.
        ShardLayoutError: The samples of the shard cannot be read by position.
    """
    patience = _PATIENCE_SECONDS + version.size / _SLOWEST_BYTES_PER_SECOND
    with exclusive(cache.entry(url).with_suffix(".lock"), f"indexing {display_url(url)}", patience, stop):
        index = cache.load(url, version, record)
        if index is not None:
            advance(version.size)
            return index, True
        index = build_index(
            url,
            open_source(url),
            version.size,
            advance=advance,
            stop=stop,
            with_sha256=record is not None,
            key_ends_at=cache.key_ends_at,
        )
        now = shard_version(url)
        if now != version:
            raise DamagedShardError(
                f"shard {display_url(url)} changed while it was indexed ({version.size} bytes before, {now.size} "
                "after, or another time or etag): open the shards when nobody writes them any more"
            )
        before = None if record is not None or index.damage else cache.of_the_same_time(url, version)
        lossy = None if before is None else without_new_rows(url, index, before, cache.entry(url))
        if lossy is not None:
            # The index of the intact shard stays in the cache: the next start needs it, and so does the restored shard.
            return lossy, False
        saved = cache.save(url, version, index)
        return verified(url, index, record), saved


def _is_of_content(url: str, tag: str) -> bool:
    """Whether the tag of a remote shard is made of its bytes; others tell apart the versions of one file only."""
    if _CHECKSUM_TAG.fullmatch(tag):
        return True
    return protocol(url) in _STORES_WITH_ETAGS_OF_MD5 and _ETAG_OF_MD5.fullmatch(tag) is not None
