"""Indexes that lie in the store: written once by whoever has read the shards, and used by everybody else.

Beside each shard lies its index, ``NAME.tar.index``, in the format of the cache, and in each folder a table of its
shards, ``shards.index``: rows, sizes, checksums. A start reads one table per folder and no byte of a shard; the index
of a shard is fetched when its first row is read. There are two kinds of files because a start needs some 300 bytes per
shard, and not the 30 bytes per row of all indexes.

Neither is trusted beyond its shard: size, etag and manifest must agree, the index must be the one that the table names,
and every row is compared with its checksum when it is read. Reading them cannot execute code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from dmagent_loader.errors import ConfigurationError, ShardError, ShardNotFoundError
from dmagent_loader.shards.index.entry_file import FORMAT, entry_bytes, parse_entry
from dmagent_loader.shards.index.inventory import inventory_text, parse_inventory
from dmagent_loader.shards.index.overview import KnownShard
from dmagent_loader.shards.index.shard_index import ShardIndex, with_checksum
from dmagent_loader.shards.manifest import read_stored
from dmagent_loader.shards.sources.faults import Kind, kind_of_fault
from dmagent_loader.shards.sources.local import ShardVersion
from dmagent_loader.shards.sources.urls import (
    INDEX_SUFFIX,
    absolute,
    base_name,
    display_url,
    is_local,
    local_path,
    protocol,
    without_signature,
)
from dmagent_loader.shards.sources.writing import write_url
from dmagent_loader.shards.tar import KeyEnd

_TABLE = "shards"
TABLE_NAME = f"{_TABLE}{INDEX_SUFFIX}"
_AZURE = ("az", "abfs", "abfss", "adl")
"""Stores in whose URLs a container stands before the host, in place of a user and a password."""

logger = logging.getLogger(__name__)


def table_entry(version: ShardVersion, index: ShardIndex) -> KnownShard:
    """The entry of a shard in a table; without a tag where other content might have the same one."""
    known = ShardVersion(size=version.size, tag=version.tag if version.is_sure else "")
    return KnownShard(
        version=known,
        rows=index.num_rows,
        inventory=inventory_text(index),
        checksum=bytes.fromhex(index.checksum),
        sha256=index.sha256,
    )


def can_be_stored(url: str) -> bool:
    """Whether the path of a URL names the shard; where the query does, all indexes would have one name."""
    return is_local(url) or "?" not in without_signature(url)


class StoredIndexes:
    """The indexes of shards in their store.

    Args:
        key_ends_at: See `dmagent_loader.shards.tar.scan`. Indexes of either kind lie side by side.
        root: Path or URL under which they lie, in folders named after those of the shards; None: beside the shards.
    """

    def __init__(self, key_ends_at: KeyEnd, root: str | os.PathLike[str] | None = None) -> None:
        self._suffix = INDEX_SUFFIX if key_ends_at == "first-dot" else f".{key_ends_at}{INDEX_SUFFIX}"
        self._root = None if root is None else absolute(os.fspath(root)).rstrip("/")

    def are_used_for(self, url: str) -> bool:
        """Whether the indexes of a shard are looked for.

        Local shards are read through once on each machine, which shows damage before training, unless a root was named.
        """
        return (self._root is not None or not is_local(url)) and can_be_stored(url)

    def folder(self, url: str) -> str:
        """The folder with the table and the index of a shard."""
        folder = (absolute(url) if is_local(url) else without_signature(url)).rpartition("/")[0]
        if self._root is None:
            return folder
        if is_local(folder):
            path = local_path(folder)
        else:  # not by urlsplit: keys of object stores may have any characters
            host, slash, key = folder.partition("://")[2].partition("/")
            path = f"{host if protocol(folder) in _AZURE else host.rpartition('@')[2]}{slash}{key}"
        return f"{self._root}/{path.strip('/')}"

    def read_table(self, folder: str) -> bytes | None:
        """The file of the table of a folder; None if there is none or it cannot be read.

        The latter is a warning, and so is the former where a root was named.
        """
        try:
            data = self._read_table(folder)
        except (ShardError, OSError) as error:
            logger.warning(
                "the table of indexes %s cannot be read: its shards are read through to index them (%s)",
                display_url(self._in(folder, _TABLE)),
                error,
            )
            return None
        if data is None and self._root is not None:
            logger.warning(
                "there is no table of indexes %s that may be read: its shards are read through to index them; correct "
                "`indexes`, or write them there (`dmagent index --to`)",
                display_url(self._in(folder, _TABLE)),
            )
        return data

    def _read_table(self, folder: str) -> bytes | None:
        """The file of the table of a folder; None if there is none.

        Raises:
            ShardError, OSError: It cannot be read.
        """
        try:
            return read_stored(self._in(folder, _TABLE))
        except (ShardNotFoundError, FileNotFoundError):
            return None
        except ShardError as error:
            if error.__cause__ is None or kind_of_fault(error.__cause__) is not Kind.REFUSED:
                raise
            # S3 answers so where there is no file and no right to list the bucket.
            logger.info("there is no table of indexes in %s that may be read: %s", display_url(folder), error)
            return None

    def parse_table(self, folder: str, data: bytes) -> dict[str, KnownShard]:
        """File name -> entry; empty, with a warning, if the file is not a table of this version."""
        try:
            content = json.loads(data)
            if content["format"] != FORMAT:
                raise ValueError(f"it has format {str(content['format'])[:20]!r}, this version reads {FORMAT!r}")
            return {name: _parsed(entry) for name, entry in content["shards"].items()}
        except Exception as error:  # of any kind: the shards are read through
            logger.warning(
                "%s is not a table of indexes that can be used (%s): its shards are read through to index them; "
                "`dmagent index` writes it anew (--beside, --to)",
                display_url(self._in(folder, _TABLE)),
                error,
            )
            return {}

    def table(self, folder: str) -> dict[str, KnownShard]:
        """The table of a folder, to be written anew; empty if there is none that can be used.

        Raises:
            ConfigurationError: It cannot be read now, and its entries of other shards would be lost.
        """
        try:
            data = self._read_table(folder)
        except (ShardError, OSError) as error:
            raise ConfigurationError(
                f"the table of indexes {display_url(self._in(folder, _TABLE))} cannot be read, so a new one would lose "
                f"its other shards: {error}; try again, or choose another place (--to)"
            ) from error
        return {} if data is None else self.parse_table(folder, data)

    def read(self, url: str) -> ShardIndex | None:
        """The index of a shard; None if it is of another format.

        Raises:
            Exception: Of any kind, if there is none or it is damaged.
        """
        return parse_entry(url, read_stored(self._in(self.folder(url), base_name(url))), None)

    def load(self, url: str, rows: int, checksum: str) -> ShardIndex | None:
        """The index of a shard; None if it is not there or, with a warning, not of this content.

        Args:
            url: URL of the shard.
            rows: Number of its rows.
            checksum: `ShardIndex.checksum` of its content.
        """
        try:
            index = self.read(url)
            if index is None or index.damage or (index.num_rows, with_checksum(index).checksum) != (rows, checksum):
                raise ValueError("it is of another content")
            return index
        except (ShardNotFoundError, FileNotFoundError):
            return None
        except Exception as error:  # of any kind: the shard is indexed
            logger.warning(
                "the index %s of %s cannot be used (%s): the shard is read through to index it; `dmagent index` "
                "writes it anew (--beside, --to)",
                display_url(self._in(self.folder(url), base_name(url))),
                display_url(url),
                error,
            )
            return None

    def save(self, url: str, index: ShardIndex) -> None:
        """Writes the index of a shard.

        Raises:
            ConfigurationError: It cannot be written.
        """
        _write(self._in(self.folder(url), base_name(url)), entry_bytes(base_name(url), index, []))

    def save_table(self, folder: str, shards: Mapping[str, KnownShard]) -> None:
        """Writes the table of a folder, after the indexes that it names.

        Raises:
            ConfigurationError: It cannot be written.
        """
        entries = {name: _entry(shard) for name, shard in sorted(shards.items())}
        _write(self._in(folder, _TABLE), (json.dumps({"format": FORMAT, "shards": entries}, indent=1) + "\n").encode())

    def _in(self, folder: str, name: str) -> str:
        return f"{folder}/{name}{self._suffix}"


def _entry(shard: KnownShard) -> dict[str, Any]:
    return {
        "bytes": shard.version.size,
        "version": shard.version.tag,
        "rows": shard.rows,
        "inventory": shard.inventory,
        "checksum": shard.checksum.hex(),
        "sha256": shard.sha256,
    }


def _parsed(entry: Mapping[str, Any]) -> KnownShard:
    """The entry of one shard.

    Raises:
        Exception: Of any kind, if it is not one.
    """
    size, rows, checksum, sha256 = entry["bytes"], entry["rows"], bytes.fromhex(entry["checksum"]), entry["sha256"]
    if type(size) is not int or type(rows) is not int or not 0 <= rows <= size:
        raise ValueError("its sizes are not those of shards")
    digests = [checksum] if sha256 is None else [checksum, bytes.fromhex(sha256)]
    if any(len(digest) != hashlib.sha256().digest_size for digest in digests):
        raise ValueError("its checksums are not sha256")
    parse_inventory(entry["inventory"])
    version = ShardVersion(size=size, tag=str(entry["version"]))
    return KnownShard(version=version, rows=rows, inventory=entry["inventory"], checksum=checksum, sha256=sha256)


def _write(url: str, data: bytes) -> None:
    """Writes a file, whole or not at all.

    Raises:
        ConfigurationError: It cannot be written.
    """
    try:
        write_url(url, data)
    except (OSError, ShardError) as error:
        raise ConfigurationError(
            f"the index {display_url(url)} cannot be written: {error}; choose a place that can be written to (--to)"
        ) from error
