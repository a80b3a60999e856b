"""What is fuzzed, and the property of each: only documented errors, whatever the bytes.

A harness is a function of bytes that returns if the property holds; `SEEDS` gives each of them inputs to begin with.
Time and memory are bounded by whoever calls it: atheris, or the tests.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import logging
import struct
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from fuzz.inputs import Choices, edited

from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.agent.checkpoint import load, read_agent_config, read_weights
from dmagent_loader.errors import (
    CheckpointError,
    DamagedShardError,
    DecodeError,
    ShardError,
    ShardLayoutError,
    StateError,
)
from dmagent_loader.history import FeedbackStatistics
from dmagent_loader.policies import StaticPolicy
from dmagent_loader.sampler import AgentWeightedSampler
from dmagent_loader.shards import Decoder, RawSample, decode, load_manifest
from dmagent_loader.shards.cache import IndexCache, _crc, parse_entry
from dmagent_loader.shards.decode import decode_npy
from dmagent_loader.shards.header import BLOCK
from dmagent_loader.shards.index import ShardIndex, build_index
from dmagent_loader.shards.manifest import DomainRecord, ShardRecord, manifest_text, recorded
from dmagent_loader.shards.reader import ShardVersion
from dmagent_loader.shards.table import ChangedRow, RowTable
from dmagent_loader.testing import write_toy_shards

logging.getLogger("dmagent_loader").setLevel(logging.CRITICAL)

EXTENSIONS = ["txt", "json", "jsonl", "npy", "npz", "safetensors", "cls", "id", "pkl", "bin", "a.gz.gz"]
EXTENSIONS += ["txt.gz", "json.gz", "npy.gz"]
SMALL_UNPACKED_BYTES = 1 << 20


class MemorySource:
    """A shard in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, offset: int, length: int) -> bytearray:
        """As `dmagent_loader.shards.reader.Source` says."""
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
        _expect(error, repr(extension))


def check_npy(data: bytes) -> None:
    """Decodes bytes as a npy file; what is accepted is what numpy reads."""
    try:
        array = decode_npy(bytearray(data))
    except DecodeError:
        return
    expected = np.load(io.BytesIO(data), allow_pickle=False)
    assert array.dtype == expected.dtype
    assert array.shape == expected.shape
    assert array.tobytes() == expected.tobytes()


def check_checkpoint(data: bytes) -> None:
    """Loads a checkpoint whose config or weights were edited, the digest put right or not.

    Building the network takes 10 ms and reads nothing; only one in 64 inputs goes all the way.
    """
    folder, config, weights, expected = _checkpoint()
    choices = Choices(data)
    mode, whole = choices.byte() % 4, choices.byte() % 64 == 1
    if mode == 0:
        text = choices.rest()
    else:
        if mode == 1:
            config = edited(config, choices)
        elif mode == 2:
            weights = _edited_weights(weights, choices)
        else:
            weights = choices.rest()
        if isinstance(config, dict) and mode != 1:
            config = {**config, "weights_sha256": hashlib.sha256(weights).hexdigest()}
        text = json.dumps(config).encode()
    (folder / "config.json").write_bytes(text)
    (folder / "model.safetensors").write_bytes(weights)
    try:
        found, sha256 = read_agent_config(folder)
        loaded = load(folder).state_dict() if whole else read_weights(folder / "model.safetensors", sha256, expected)
    except CheckpointError as error:
        _expect(error)
        return
    assert found.num_layers
    assert all(bool(torch.isfinite(tensor).all()) for tensor in loaded.values())


def check_state(data: bytes) -> None:
    """Restores a sampler from a state that was edited; what is accepted gives samples and the same state again."""
    sampler, state = _sampler()
    choices = Choices(data)
    if choices.byte() % 4:
        edit = edited(state, choices)
    else:
        try:
            edit = json.loads(choices.rest())
        except (ValueError, RecursionError):
            return
    try:
        sampler.load_state_dict(edit)
    except StateError as error:
        _expect(error)
        return
    again = sampler.state_dict(consumed=edit["consumed"])
    assert again["counts"] == edit["counts"]
    json.dumps(again, allow_nan=False)


def check_manifest(data: bytes) -> None:
    """Reads a manifest that was edited, or any bytes as one."""
    folder, manifest = _manifest()
    choices = Choices(data)
    text = json.dumps(edited(manifest, choices)).encode() if choices.byte() % 4 else choices.rest()
    (folder / "manifest.json").write_bytes(text)
    try:
        listing = load_manifest(folder)
    except ShardError as error:
        _expect(error)
        return
    for shards in listing.values():
        for shard in shards:
            assert Path(shard).is_relative_to(folder)
            recorded(shard)


def check_cache(data: bytes) -> None:
    """Reads a cache entry that was edited, its checksum put right, or any bytes as one."""
    entry, tar = _cache_entry()
    choices = Choices(data)
    mode = choices.byte() % 3
    if mode == 0:
        entry = choices.rest()
    elif mode == 1:
        changed = bytearray(entry)
        for _ in range(1 + choices.byte() % 4):
            changed[choices.below(len(changed))] = choices.byte()
        entry = bytes(changed)
    else:
        entry = _edited_entry(entry, choices)
    try:
        index = parse_entry("fuzz.tar", entry, ShardVersion(size=len(tar), tag="1"))
    except AssertionError:
        raise
    except Exception:  # any error means: build the index again
        return
    if index is not None:
        _read_all(index, MemorySource(tar), is_own=False)


def _expect(error: Exception, text: str = "") -> None:
    """A documented error is short, and says what it should."""
    assert len(str(error)) < 5000
    assert text in str(error)


def _read_all(index: ShardIndex, source: MemorySource, *, is_own: bool) -> None:
    """Reads every row; one of an index that was built from these bytes has the checksum that it should have."""
    index.check()
    table = RowTable(index)
    for row in range(index.num_rows):
        try:
            assert table.read(source, row, verify=True).key == index.key(row)
        except ChangedRow:
            assert not is_own


def _edited_weights(weights: bytes, choices: Choices) -> bytes:
    size = int.from_bytes(weights[:8], "little")
    header = json.dumps(edited(json.loads(weights[8 : 8 + size]), choices)).encode()
    declared = len(header) if choices.byte() % 4 else abs(choices.integer())
    return struct.pack("<Q", declared % 2**64) + header + weights[8 + size :] + bytes(choices.byte() % 9)


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
        metadata["crc32"] = str(_crc(columns, metadata))
    else:
        metadata = None
    try:
        return safetensors.numpy.save(columns, metadata)
    except (ValueError, TypeError, UnicodeError, safetensors.SafetensorError):
        return entry


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None, prefix="dmagent-fuzz-"))


@functools.cache
def _checkpoint() -> tuple[Path, dict[str, Any], bytes, dict[str, torch.Tensor]]:
    """A folder; config, weights and tensors of an agent of a few hundred weights."""
    folder = _folder() / "agent"
    config = AgentConfig(
        d_model=4,
        num_layers=1,
        num_heads=2,
        d_ff=4,
        domains=("source/a", "target/b"),
        statistics=FeedbackStatistics(mean=(0.0, 0.0), std=(1.0, 1.0), count=1),
    )
    agent = MixingAgent(config)
    agent.save_pretrained(folder)
    values, weights = ((folder / name).read_bytes() for name in ("config.json", "model.safetensors"))
    return folder, json.loads(values), weights, agent.state_dict()


@functools.cache
def _sampler() -> tuple[AgentWeightedSampler, dict[str, Any]]:
    """A sampler with a policy, and its state after two decisions."""
    shards = write_toy_shards(_folder() / "shards", {"source/a": 30, "target/b": 20})
    sampler = AgentWeightedSampler(
        shards,
        policy=StaticPolicy({"source/a": 0.25, "target/b": 0.75}),
        samples_per_reweight=8,
        cache_dir=_folder() / "cache",
        progress=False,
    )
    stream = iter(sampler)
    for consumed in (0, 8, 16):
        sampler.reweight({"general": -2.0 - consumed / 100, "math": -3.0}, consumed=consumed)
        for _ in range(8):
            next(stream)
    return sampler, json.loads(json.dumps(sampler.state_dict(consumed=20)))


@functools.cache
def _manifest() -> tuple[Path, dict[str, Any]]:
    record = DomainRecord(
        rows=2,
        documents=2,
        empty_documents=0,
        tokens=None,
        dropped_tokens=None,
        settings={"format": "text"},
        shards=(ShardRecord(path="source/a/a-000000.tar", rows=2, bytes=10240, sha256="0" * 64),),
    )
    folder = _folder() / "manifest"
    folder.mkdir()
    return folder, json.loads(manifest_text({"source/a": record, "target/b": record}, {}))


@functools.cache
def _cache_entry() -> tuple[bytes, bytes]:
    tar = make_tar([("a.txt", b"alpha"), ("a.json", b"{}"), ("b.txt", b"beta"), ("b.json", b"[]")])
    version = ShardVersion(size=len(tar), tag="1")
    cache = IndexCache(_folder() / "entry")
    cache.save("fuzz.tar", version, build_index("fuzz.tar", MemorySource(tar), len(tar)))
    return cache.entry("fuzz.tar").read_bytes(), tar


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


def _edit_seeds() -> list[bytes]:
    return [bytes([mode, *range(start, start + 24)]) for mode in range(4) for start in (0, 40, 90, 200)]


def _json_seeds(document: Any) -> list[bytes]:
    return [*_edit_seeds(), b"\0" + json.dumps(document).encode()]


HARNESSES: dict[str, Callable[[bytes], None]] = {
    "tar": check_tar,
    "members": check_members,
    "npy": check_npy,
    "checkpoint": check_checkpoint,
    "state": check_state,
    "manifest": check_manifest,
    "cache": check_cache,
}

SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "tar": _tar_seeds,
    "members": _member_seeds,
    "npy": _npy_seeds,
    "checkpoint": lambda: [*_edit_seeds(), b"\x03" + _checkpoint()[2], b"\0" + json.dumps(_checkpoint()[1]).encode()],
    "state": lambda: _json_seeds(_sampler()[1]),
    "manifest": lambda: _json_seeds(_manifest()[1]),
    "cache": lambda: [*_edit_seeds(), b"\0" + _cache_entry()[0]],
}
