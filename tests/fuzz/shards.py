"""Harnesses for what reads shards, their manifests and their cached indexes."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from fuzz.inputs import Choices, edit_seeds, edited, expect, folder, json_seeds

from dmagent_loader.errors import DamagedShardError, DecodeError, ShardError, ShardLayoutError
from dmagent_loader.shards import Decoder, RawSample, decode, load_manifest
from dmagent_loader.shards.decode import decode_npy
from dmagent_loader.shards.index.cache import IndexCache
from dmagent_loader.shards.index.columns_file import checksum_of
from dmagent_loader.shards.index.entry_file import parse_entry
from dmagent_loader.shards.index.inventory import parse_inventory
from dmagent_loader.shards.index.overview import KnownShard, Overview
from dmagent_loader.shards.index.shard_index import ShardIndex, build_index
from dmagent_loader.shards.manifest import DomainRecord, ShardRecord, manifest_text
from dmagent_loader.shards.sources.local import ShardVersion
from dmagent_loader.shards.table import ChangedRow, RowTable
from dmagent_loader.shards.tar.header import BLOCK

EXTENSIONS = ["txt", "json", "jsonl", "npy", "npz", "safetensors", "cls", "id", "pkl", "bin", "a.gz.gz"]
EXTENSIONS += ["txt.gz", "json.gz", "npy.gz"]
SMALL_UNPACKED_BYTES = 1 << 20


class MemorySource:
    """A shard in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, offset: int, length: int) -> bytearray:
        """As `dmagent_loader.shards.sources.local.Source` says."""
        assert offset >= 0
        assert length >= 0
        part = bytearray(self._data[offset : offset + length])
        if len(part) < length:
            raise DamagedShardError("too short")
        return part


def check_tar(data: bytes) -> None:
    """Indexes bytes as a tar, with the checksums of its headers put right or not, and reads what was indexed."""
    repair, tar = data[:1] < b"\x80", bytearray(data[1:])
    if repair:
        for start in range(0, len(tar) - BLOCK + 1, BLOCK):
            if tar[start + 257 : start + 262] == b"ustar":
                tar[start + 148 : start + 156] = b" " * 8
                tar[start + 148 : start + 156] = b"%06o\0 " % sum(tar[start : start + BLOCK])
    source = MemorySource(bytes(tar))
    try:
        index = build_index("fuzz.tar", source, len(tar), with_sha256=True)
    except ShardLayoutError:
        return
    assert index.sha256 == hashlib.sha256(tar).hexdigest()
    _read_all(index, source, is_own=True)
    for damage in index.damage:
        assert 0 <= damage.offset <= len(tar)
        assert 0 <= damage.bytes_lost <= len(tar)
        assert str(damage)


def check_members(data: bytes) -> None:
    """Decodes bytes as a member of a kind that the first byte chooses."""
    extension = EXTENSIONS[data[0] % len(EXTENSIONS)] if data else "txt"
    decode.MAX_UNPACKED_BYTES = SMALL_UNPACKED_BYTES
    try:
        Decoder()(RawSample("key", {extension: memoryview(bytearray(data[1:]))}))
    except DecodeError as error:
        expect(error, repr(extension))


def check_npy(data: bytes) -> None:
    """Decodes bytes as a npy file; what is accepted is what numpy reads."""
    try:
        array = decode_npy(bytearray(data))
    except DecodeError:
        return
    expected = np.load(io.BytesIO(data), allow_pickle=False)
    assert array.dtype == expected.dtype
    assert array.shape == expected.shape
    assert _values(array) == _values(expected)


def _values(array: np.ndarray) -> Any:
    """All bytes that count: numpy leaves those between fields as they are, whatever they are."""
    return array.tobytes() if array.dtype.names is None else [_values(array[name]) for name in array.dtype.names]


def check_manifest(data: bytes) -> None:
    """Reads a manifest that was edited, or any bytes as one."""
    home, manifest = _manifest()
    choices = Choices(data)
    text = json.dumps(edited(manifest, choices)).encode() if choices.byte() % 4 else choices.rest()
    (home / "manifest.json").write_bytes(text)
    try:
        listing = load_manifest(home)
    except ShardError as error:
        expect(error)
        return
    for shards in listing.values():
        for shard in shards:
            assert Path(shard).is_relative_to(home)
            listing.record(Path(shard).relative_to(home).as_posix())


def check_cache(data: bytes) -> None:
    """Reads a cache entry that was edited, its checksum put right, or any bytes as one."""
    entry, tar = _cache_entry()
    entry = _changed_file(entry, Choices(data))
    try:
        index = parse_entry("fuzz.tar", entry, ShardVersion(size=len(tar), tag="1"))
    except AssertionError:
        raise
    except Exception:  # any error means: build the index again
        return
    if index is not None:
        _read_all(index, MemorySource(tar), is_own=False)


def check_overview(data: bytes) -> None:
    """Reads an overview of cached indexes that was edited, its checksum put right, or any bytes as one."""
    file = _changed_file(_overview(), Choices(data))
    try:
        overview = Overview.from_bytes(file, len(_OVERVIEW_TAGS), "1")
    except Exception:  # any error means: look at the indexes themselves
        return
    again = Overview.from_bytes(overview.to_bytes("1"), len(_OVERVIEW_TAGS), "1")
    for place, tag in enumerate(_OVERVIEW_TAGS):
        version = ShardVersion(size=10240, tag=tag)
        known = overview.find(place, version)
        assert again.find(place, version) == known
        if known is not None:
            assert known.rows >= 0
            parse_inventory(known.inventory)
            assert len(known.checksum) == 32
            assert known.sha256 is None or len(known.sha256) == 64


def _changed_file(file: bytes, choices: Choices) -> bytes:
    mode = choices.byte() % 3
    if mode == 0:
        return choices.rest()
    if mode == 1:
        changed = bytearray(file)
        for _ in range(1 + choices.byte() % 4):
            changed[choices.below(len(changed))] = choices.byte()
        return bytes(changed)
    return _edited_entry(file, choices)


def _read_all(index: ShardIndex, source: MemorySource, *, is_own: bool) -> None:
    """Reads every row; one of an index that was built from these bytes has the checksum that it should have."""
    index.check()
    table = RowTable(index)
    for row in range(index.num_rows):
        try:
            assert table.read(source, row, verify=True).key == index.key(row)
        except ChangedRow:
            assert not is_own


def _edited_entry(entry: bytes, choices: Choices) -> bytes:
    (size,) = struct.unpack_from("<Q", entry)
    metadata = edited(json.loads(entry[8 : 8 + size])["__metadata__"], choices, 2)
    columns: dict[str, Any] = safetensors.numpy.load(entry)
    for _ in range(choices.byte() % 3):
        name = sorted(columns)[choices.byte() % len(columns)]
        column = columns[name].copy()
        action = choices.byte() % 4
        if action == 0 and len(column) and column.dtype.kind in "iu":
            value = choices.integer()
            limits = np.iinfo(column.dtype)
            column[choices.below(len(column))] = min(max(value, int(limits.min)), int(limits.max))
        elif action == 1:
            column = column[: choices.below(len(column) + 1)]
        elif action == 2:
            column = column.astype((np.int64, np.float32, np.uint8, np.int8)[choices.byte() % 4])
        else:
            column = np.append(column, column[:1])
        columns[name] = np.ascontiguousarray(column)
    if isinstance(metadata, dict):
        metadata = {
            str(name): value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()
        }
        metadata["crc32"] = str(checksum_of(columns, metadata))
    else:
        metadata = None
    try:
        return safetensors.numpy.save(columns, metadata)
    except (ValueError, TypeError, UnicodeError, safetensors.SafetensorError):
        return entry


@functools.cache
def _manifest() -> tuple[Path, dict[str, Any]]:
    record = DomainRecord(
        rows=2,
        documents=2,
        empty_documents=0,
        bad_records=0,
        tokens=None,
        dropped_tokens=None,
        special_token_documents=None,
        settings={"format": "text"},
        shards=(ShardRecord(path="source/a/a-000000.tar", rows=2, bytes=10240, sha256="0" * 64),),
    )
    home = folder() / "manifest"
    home.mkdir()
    return home, json.loads(manifest_text({"source/a": record, "target/b": record}, {}))


@functools.cache
def _cache_entry() -> tuple[bytes, bytes]:
    tar = make_tar([("a.txt", b"alpha"), ("a.json", b"{}"), ("b.txt", b"beta"), ("b.json", b"[]")])
    version = ShardVersion(size=len(tar), tag="1")
    cache = IndexCache(folder() / "entry")
    cache.save("fuzz.tar", version, build_index("fuzz.tar", MemorySource(tar), len(tar)))
    return cache.entry("fuzz.tar").read_bytes(), tar


_OVERVIEW_TAGS = ("1", "2", "an etag")


@functools.cache
def _overview() -> bytes:
    overview = Overview(len(_OVERVIEW_TAGS))
    for place, tag in enumerate(_OVERVIEW_TAGS[:2]):
        version = ShardVersion(size=10240, tag=tag)
        sha256 = "ab" * 32 if place else None
        inventory = '[[[["json", "txt"], 2, "a"], [["txt"], 1, "b"]], 3]' if place else '[["txt"]]'
        overview.add(
            place,
            KnownShard(version=version, rows=place, inventory=inventory, checksum=bytes(range(32)), sha256=sha256),
        )
    return overview.to_bytes("1")


def make_tar(members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar that ends with two zero blocks and no padding, to be small."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        end = tar.offset
    return stream.getvalue()[: end + 2 * BLOCK]


def _npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _npz() -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, a=np.arange(3), b=np.ones((2, 2), np.float32))
    return stream.getvalue()


def _tar_seeds() -> list[bytes]:
    two = [("a.txt", b"alpha"), ("a.json", b"{}"), ("b.txt", b"beta" * 200)]
    tars = [make_tar(two, format) for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    tars.append(make_tar([("x" * 120 + ".txt", b"1"), ("ü.txt", b"2")], tarfile.PAX_FORMAT))
    tars.append(make_tar([("x" * 120 + ".txt", b"1"), ("y/" * 60 + "z.txt", b"2")], tarfile.GNU_FORMAT))
    tars.append(tars[0][:-700])
    return [flag + tar for tar in tars for flag in (b"\0", b"\xff")]


def _member_seeds() -> list[bytes]:
    data = {
        "txt": "text ü".encode(),
        "json": b'{"a": [1, 2.5, null, "x"]}',
        "jsonl": b'{"a": 1}\n[2]\n',
        "npy": _npy(np.arange(4)),
        "npz": _npz(),
        "safetensors": safetensors.numpy.save({"x": np.ones(2, np.float32), "y": np.arange(3)}),
        "cls": b"12",
        "id": b"-3\n",
        "txt.gz": gzip.compress(b"text", mtime=0),
        "json.gz": gzip.compress(b"[1]", mtime=0),
        "npy.gz": gzip.compress(_npy(np.arange(2)), mtime=0),
        "pkl": b"cos\nsystem\n(S'true'\ntR.",
    }
    return [bytes([EXTENSIONS.index(extension)]) + value for extension, value in data.items()]


def _npy_seeds() -> list[bytes]:
    arrays: list[Any] = [
        np.arange(4, dtype=np.uint16),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.array(1.5),
        np.zeros((0, 3)),
        np.array([(1, 2.0)], dtype=[("a", "<i4"), ("b", ">f8", (2,))]),
        np.array(["a", "bc"]),
        np.array(["2020-01-01"], dtype="M8[D]"),
    ]
    return [_npy(array) for array in arrays]


HARNESSES: dict[str, Callable[[bytes], None]] = {
    "tar": check_tar,
    "members": check_members,
    "npy": check_npy,
    "manifest": check_manifest,
    "cache": check_cache,
    "overview": check_overview,
}

SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "tar": _tar_seeds,
    "members": _member_seeds,
    "npy": _npy_seeds,
    "manifest": lambda: json_seeds(_manifest()[1]),
    "cache": lambda: [*edit_seeds(), b"\0" + _cache_entry()[0]],
    "overview": lambda: [*edit_seeds(), b"\0" + _overview()],
}
