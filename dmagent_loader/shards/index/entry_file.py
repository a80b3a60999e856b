"""The file of a shard's index: its columns, and the copies of the shard that it is valid for."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np

from dmagent_loader.shards.index.columns_file import read_columns, read_metadata, write_columns
from dmagent_loader.shards.index.shard_index import ShardIndex
from dmagent_loader.shards.sources.checksum import crc32
from dmagent_loader.shards.sources.local import ShardVersion, Source, open_source
from dmagent_loader.shards.sources.urls import is_local
from dmagent_loader.shards.tar import BLOCK, ShardDamage, padded, parse_header

FORMAT = "6"
"""Raised whenever the same shard would get another index."""
_COLUMNS = ("offset", "size", "extension", "row_first", "row_crc", "keys", "key_end")
_SAMPLED_ROWS, _LARGEST_SAMPLED_BYTES = 8, 1 << 20
"""Rows that are compared where a file may have been replaced by one of the same size."""
_SAMPLED_HEADERS, _LONGEST_NAME = 64, 100
"""Headers that are compared there, and the bytes of a name up to which it stands in the header itself."""
_MAX_PADDING_BYTES = 1 << 20
"""Padding of a tar with the largest blocking factor in use."""


def entry_bytes(name: str, index: ShardIndex, copies: list[list[str]]) -> bytes:
    """The file of an index; `parse_entry` reads it.

    Args:
        name: Name of the shard, for people who look into the file.
        index: The index.
        copies: Tag and change time of each copy of the shard that it is valid for.
    """
    metadata = {
        "format": FORMAT,
        "shard": ascii(name),
        "size": str(index.file_size),
        "copies": json.dumps(copies),
        "extensions": json.dumps(index.extensions),
        "hidden": str(index.hidden),
        "checksum": index.checksum,
        "sha256": index.sha256 or "",
        "damage": json.dumps([asdict(damage) for damage in index.damage]),
    }
    return write_columns({name: getattr(index, name) for name in _COLUMNS}, metadata)


def parse_entry(url: str, data: bytes, version: ShardVersion | None) -> ShardIndex | None:
    """The index in a cache file; None if the file is for another version of the shard or has another format.

    Args:
        url: URL of the shard.
        data: The whole file.
        version: Version of the shard; None accepts any.

    Raises:
        Exception: Of any kind, if the file is damaged.
    """
    metadata = read_metadata(data)
    if metadata["format"] != FORMAT:
        return None
    size, copies = int(metadata["size"]), json.loads(metadata["copies"])
    if version is not None and (size != version.size or version.tag not in [tag for tag, _ in copies]):
        return None
    columns = read_columns(data, metadata)
    index = ShardIndex(
        file_size=size,
        extensions=tuple(json.loads(metadata["extensions"])),
        checksum=metadata["checksum"],
        sha256=metadata["sha256"] or None,
        hidden=int(metadata["hidden"]),
        damage=tuple(ShardDamage(**{**damage, "shard": url}) for damage in json.loads(metadata["damage"])),
        **{name: columns[name] for name in _COLUMNS},
    )
    index.check()
    return index


def looks_as_indexed(url: str, index: ShardIndex) -> bool:
    """Whether only zeros follow the last row, and some rows of a local shard are those that were indexed.

    Rows written over the padding change neither size nor checksums, and neither do other keys or bytes that are added
    to a row within its last block: those show in headers.
    """
    end = padded(index.end_of_members)
    length = index.file_size - end
    if length > _MAX_PADDING_BYTES:
        return False
    source = open_source(url)
    if length > 0 and source.read(end, length) != bytes(length):
        return False
    if not is_local(url) or not index.num_rows:
        return True
    for row in np.unique(np.linspace(0, index.num_rows - 1, _SAMPLED_ROWS, dtype=np.int64)).tolist():
        members = range(index.row_first.item(row), index.row_first.item(row + 1))
        if sum(index.size.item(member) for member in members) > _LARGEST_SAMPLED_BYTES:
            continue
        crc = 0
        for member in members:
            crc = crc32(source.read(index.offset.item(member), index.size.item(member)), crc)
        if crc != index.row_crc.item(row):
            return False
    sampled = np.unique(np.linspace(0, index.num_members - 1, _SAMPLED_HEADERS, dtype=np.int64))
    rows = np.searchsorted(index.row_first, sampled, side="right") - 1
    return all(_has_header(source, index, *place) for place in zip(rows.tolist(), sampled.tolist(), strict=True))


def _has_header(source: Source, index: ShardIndex, row: int, member: int) -> bool:
    """Whether the header before a payload gives it the size and the name that were indexed."""
    offset = index.offset.item(member) - BLOCK
    header = parse_header(source.read(offset, BLOCK)) if offset >= 0 else None
    if header is None or header.size != index.size.item(member):
        return False
    key, extension = index.key(row), index.extensions[index.extension.item(member)]
    name = f"{key}.{extension}"
    if len(name) > _LONGEST_NAME or not name.isascii():
        return True  # an extended header has the name
    return header.name.startswith(f"{key}.") and header.name[len(key) + 1 :].lower() == extension


def are_equal(a: ShardIndex, b: ShardIndex) -> bool:
    """Whether two indexes are of files with the same rows at the same places."""
    facts = ("file_size", "extensions", "checksum", "sha256", "damage", "hidden")
    return all(getattr(a, name) == getattr(b, name) for name in facts) and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in _COLUMNS
    )
