"""What a start has to know of many shards, in one file: a million indexes would take ten minutes to read.

An overview holds for consecutive shards of one list, each with its version, what `catalogue`
keeps of a whole shard. Whoever finds another version, or damage, or nothing, looks at the shard's own index.

Shapes: S shards.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from dmagent_loader.shards.index.columns_file import columns_in, metadata_in, seal
from dmagent_loader.shards.sources.local import ShardVersion

SHARDS_OF_OVERVIEW = 1024
"""So that it stays small in memory, and that a list which grows at its end keeps most of its overviews."""

_DIGEST_BYTES = hashlib.sha256().digest_size
_COLUMNS = ("size", "rows", "checksum", "sha256", "has_sha256")
_TEXTS = ("tags", "changed")
_UNKNOWN = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownShard:
    """A whole shard.

    Attributes:
        version: The one that was indexed.
        rows: In it.
        checksum: Of its content (`dmagent_loader.shards.index.shard_index.ShardIndex.checksum`), as bytes.
        sha256: Of the whole file, in hex; None: it was not computed.
    """

    version: ShardVersion
    rows: int
    checksum: bytes
    sha256: str | None


class Overview:
    """Whole shards by their place in a list.

    Args:
        num_shards: S, in the list.
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

    def find(self, place: int, version: ShardVersion) -> KnownShard | None:
        """The shard at a place of the list; None: it is not known, or may have been changed since."""
        rows = self._rows.item(place)
        if rows == _UNKNOWN or self._size.item(place) != version.size or not version.is_sure:
            return None
        if self._tags[place] != version.tag or self._changed[place] != version.changed:
            return None
        sha256 = self._sha256[place].tobytes().hex() if self._has_sha256[place] else None
        return KnownShard(version=version, rows=rows, checksum=self._checksum[place].tobytes(), sha256=sha256)

    def note(self, place: int, shard: KnownShard) -> None:
        """Takes in the shard at a place of the list."""
        version = shard.version
        self._size[place], self._tags[place], self._changed[place] = version.size, version.tag, version.changed
        self._rows[place] = shard.rows
        self._checksum[place] = np.frombuffer(shard.checksum, np.uint8)
        self._has_sha256[place] = shard.sha256 is not None
        if shard.sha256 is not None:
            self._sha256[place] = np.frombuffer(bytes.fromhex(shard.sha256), np.uint8)
        self.is_changed = True

    def to_bytes(self, format: str) -> bytes:
        """The file of this overview."""
        columns = {name: getattr(self, f"_{name}") for name in _COLUMNS}
        texts = {name: json.dumps(getattr(self, f"_{name}")) for name in _TEXTS}
        return seal(columns, {"format": format, **texts})

    @classmethod
    def from_bytes(cls, data: bytes, num_shards: int, format: str) -> Overview:
        """The overview in a file; an empty one if the file has another format.

        Raises:
            Exception: Of any kind, if the file is damaged.
        """
        metadata = metadata_in(data)
        overview = cls(num_shards)
        if metadata["format"] != format:
            return overview
        columns = columns_in(data, metadata)
        for name in _TEXTS:
            texts = json.loads(metadata[name])
            if not isinstance(texts, list) or len(texts) != num_shards or not all(isinstance(t, str) for t in texts):
                raise ValueError(f"it is not about {num_shards} shards")
            setattr(overview, f"_{name}", texts)
        for name in _COLUMNS:
            column, expected = columns[name], getattr(overview, f"_{name}")
            if (column.shape, column.dtype) != (expected.shape, expected.dtype):
                raise ValueError(f"its column {name} is another one")
            # A copy, which can be written to.
            setattr(overview, f"_{name}", column.copy())
        if overview._rows.min(initial=0) < _UNKNOWN:
            raise ValueError("its rows are fewer than none")
        return overview
