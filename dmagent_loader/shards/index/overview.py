"""The facts about many shards that a start needs, in one file: reading a million indexes would take ten minutes.

An overview covers consecutive shards of one list. It holds the version of each intact shard and the facts that
`catalogue` keeps about it. Without an entry of the present version, the caller reads the index of the shard.

Shapes: S shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dmagent_loader.shards.index.columns_file import read_columns, read_metadata, write_columns
from dmagent_loader.shards.index.inventory import parse_inventory
from dmagent_loader.shards.sources.local import ShardVersion, VersionFacts

SHARDS_OF_OVERVIEW = 1024
"""Small enough for memory, and a list that grows at its end keeps most of its overviews."""

_DIGEST_BYTES = hashlib.sha256().digest_size
_COLUMNS = ("size", "rows", "checksum", "sha256", "has_sha256")
_TEXTS = ("tags", "changed", "inventories")
_UNKNOWN = -1
_NOTHING = "[[]]"
"""Inventory of an unknown shard."""
MOST_COPIES = 8
"""Copies of a shard whose times are remembered, as of nodes that share a cache but not their disks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownShard:
    """An intact shard.

    Attributes:
        version: Version that was indexed.
        rows: Number of rows.
        inventory: Its inventory as text (`dmagent_loader.shards.index.inventory`).
        checksum: Checksum of its content, as bytes (`dmagent_loader.shards.index.shard_index.ShardIndex.checksum`).
        sha256: Hex sha256 of the whole file; None if it was not computed.
    """

    version: ShardVersion
    rows: int
    inventory: str
    checksum: bytes
    sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownShards:
    """Consecutive intact shards.

    Attributes:
        rows: (S,) number of rows of each.
        inventories: S inventories as text.
        tags: S tags of their versions.
        checksums: (S, 32) checksum of the content of each, as bytes.
        sizes: (S,) bytes of each.
        sha256: (S, 32) sha256 of each file, as bytes.
        has_sha256: (S,) 1 if that was computed, else 0.
    """

    rows: NDArray[np.int64]
    inventories: list[str]
    tags: list[str]
    checksums: NDArray[np.uint8]
    sizes: NDArray[np.int64]
    sha256: NDArray[np.uint8]
    has_sha256: NDArray[np.uint8]


class Overview:
    """Intact shards by their position in a list.

    Args:
        num_shards: S, the length of the list.

    Attributes:
        is_changed: The overview differs from its file.
    """

    def __init__(self, num_shards: int) -> None:
        self.is_changed = False
        self._size = np.zeros(num_shards, np.int64)
        self._rows = np.full(num_shards, _UNKNOWN, np.int64)
        self._checksum = np.zeros((num_shards, _DIGEST_BYTES), np.uint8)
        self._sha256 = np.zeros((num_shards, _DIGEST_BYTES), np.uint8)
        self._has_sha256 = np.zeros(num_shards, np.uint8)
        self._tags = [""] * num_shards
        self._changed = [""] * num_shards
        self._inventories = [_NOTHING] * num_shards
        self._copies: dict[str, list[list[str]]] = {}
        """Tag and change time of other copies of the same content, by position."""

    def find(self, position: int, version: ShardVersion) -> KnownShard | None:
        """The shard at a position of the list; None if it is unknown or may have changed since."""
        rows = self._rows.item(position)
        if rows == _UNKNOWN or self._size.item(position) != version.size or not version.is_sure:
            return None
        if (self._tags[position] != version.tag or self._changed[position] != version.changed) and (
            [version.tag, version.changed] not in self._copies.get(str(position), ())
        ):
            return None
        return KnownShard(
            version=version,
            rows=rows,
            inventory=self._inventories[position],
            checksum=self._checksum[position].tobytes(),
            sha256=self._sha256[position].tobytes().hex() if self._has_sha256[position] else None,
        )

    def find_all(self, start: int, versions: Sequence[VersionFacts]) -> KnownShards | None:
        """Consecutive shards from a position of the list on; None unless all are known and unchanged."""
        end = start + len(versions)
        sizes, tags, changed, are_sure = map(list, zip(*versions, strict=True))
        if (
            not all(are_sure)
            or tags != self._tags[start:end]
            or changed != self._changed[start:end]
            or sizes != self._size[start:end].tolist()
            or (self._rows[start:end] == _UNKNOWN).any()
        ):
            return None
        return KnownShards(
            rows=self._rows[start:end],
            inventories=self._inventories[start:end],
            tags=tags,
            checksums=self._checksum[start:end],
            sizes=self._size[start:end],
            sha256=self._sha256[start:end],
            has_sha256=self._has_sha256[start:end],
        )

    def knows(self, position: int, version: ShardVersion) -> bool:
        """Whether the shard at a position of the list had this size and tag."""
        now = self._size.item(position), self._tags[position]
        return self._rows.item(position) != _UNKNOWN and now == (version.size, version.tag)

    def knows_another(self, position: int, version: ShardVersion) -> bool:
        """Whether the shard at a position of the list had another size or tag."""
        return self._rows.item(position) != _UNKNOWN and not self.knows(position, version)

    def add(self, position: int, shard: KnownShard) -> None:
        """Sets the shard at a position of the list."""
        version = shard.version
        self._remember_copy(position, shard)
        self._size[position], self._tags[position] = version.size, version.tag
        self._changed[position] = version.changed
        self._rows[position], self._inventories[position] = shard.rows, shard.inventory
        self._checksum[position] = np.frombuffer(shard.checksum, np.uint8)
        self._has_sha256[position] = shard.sha256 is not None
        if shard.sha256 is not None:
            self._sha256[position] = np.frombuffer(bytes.fromhex(shard.sha256), np.uint8)
        self.is_changed = True

    def _remember_copy(self, position: int, shard: KnownShard) -> None:
        """Keeps the times of the copy that is known so far if the shard is another copy of the same content."""
        before = ShardVersion(size=self._size.item(position), tag=self._tags[position], changed=self._changed[position])
        known = self.find(position, before)
        copies = self._copies.pop(str(position), [])
        if known is not None and replace(known, version=shard.version) == shard:
            times = [shard.version.tag, shard.version.changed]
            copies = [copy for copy in ([before.tag, before.changed], *copies) if copy != times]
            if copies:
                self._copies[str(position)] = copies[:MOST_COPIES]

    def to_bytes(self, format: str) -> bytes:
        """The file of this overview, marked with the format of the indexes."""
        columns = {name: getattr(self, f"_{name}") for name in _COLUMNS}
        texts = {name: getattr(self, f"_{name}") for name in (*_TEXTS, "copies")}
        # A column, because metadata are escaped and parsed several times over.
        columns["texts"] = np.frombuffer(json.dumps(texts).encode(), np.uint8)
        return write_columns(columns, {"format": format})

    @classmethod
    def from_bytes(cls, data: bytes, num_shards: int, format: str) -> Overview:
        """The overview in a file; empty if the file has another format.

        Raises:
            Exception: Of any kind, if the file is damaged.
        """
        metadata = read_metadata(data)
        overview = cls(num_shards)
        if metadata["format"] != format:
            return overview
        columns = read_columns(data, metadata)
        texts = json.loads(columns["texts"].tobytes())
        for name in _TEXTS:
            values = texts[name]
            if not isinstance(values, list) or len(values) != num_shards or not set(map(type, values)) <= {str}:
                raise ValueError(f"it is not about {num_shards} shards")
            setattr(overview, f"_{name}", values)
        for name in _COLUMNS:
            column, expected = columns[name], getattr(overview, f"_{name}")
            if (column.shape, column.dtype) != (expected.shape, expected.dtype):
                raise ValueError(f"its column {name} is another one")
            setattr(overview, f"_{name}", column.copy())  # a copy is writable
        if overview._rows.min(initial=0) < _UNKNOWN:
            raise ValueError("its rows are fewer than none")
        for text in set(overview._inventories):
            parse_inventory(text)
        overview._copies = texts["copies"]
        if not isinstance(overview._copies, dict):
            raise ValueError("its copies are none")
        return overview
