"""Shards written to do harm: each is refused by name, or costs bounded time and memory."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from dmagent_loader import AgentWeightedSampler, ReadingConfig
from dmagent_loader.errors import DamagedShardError, DecodeError, ShardError, ShardLayoutError
from dmagent_loader.shards import Decoder, RawSample, ShardCollection, load_manifest
from dmagent_loader.shards.index.shard_index import build_index
from dmagent_loader.shards.sources.local import LocalSource
from dmagent_loader.shards.tar.header import BLOCK

pytestmark = pytest.mark.timeout(60)

Member = tuple[str, bytes]


def put_checksum(header: bytearray) -> bytearray:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return header


def header(name: bytes, size: int | bytes, kind: bytes = tarfile.REGTYPE) -> bytearray:
    """A ustar header; `size` as bytes is put in as it is."""
    block = bytearray(BLOCK)
    block[: len(name[:100])] = name[:100]
    block[100:108] = b"0000644\0"
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    return put_checksum(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def member(name: bytes, data: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return bytes(header(name, len(data), kind)) + padded(data)


def pax(records: dict[bytes, bytes]) -> bytes:
    data = b""
    for key, value in records.items():
        size = len(key) + len(value) + 3
        while len(str(size + len(str(size)))) > len(str(size)):
            size += 1
        size += len(str(size))
        data += b"%d %s=%s\n" % (size, key, value)
    return member(b"pax", data, tarfile.XHDTYPE)


def gnu_long_name(name: bytes) -> bytes:
    return member(b"././@LongLink", name + b"\0", tarfile.GNUTYPE_LONGNAME)


@pytest.fixture
def put(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(data: bytes) -> Path:
        path = tmp_path / "shards" / "evil-000.tar"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data + bytes(2 * BLOCK))
        return path

    return write


def opened(path: Path, on_damage: str = "raise") -> ShardCollection:
    return ShardCollection.open(
        {"source/a": str(path)},
        progress=False,
        cache_dir=path.parent.parent / "cache",
        on_damage=on_damage,  # type: ignore[arg-type]
    )


class CountingSource(LocalSource):
    """Counts what is read."""

    __slots__ = ("bytes_read", "reads")

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.bytes_read = self.reads = 0

    def read(self, offset: int, length: int) -> bytearray:
        self.bytes_read += length
        self.reads += 1
        return super().read(offset, length)


# Names


@pytest.mark.parametrize(
    "name",
    [
        b"../../../../tmp/evil.txt",
        b"/etc/cron.d/evil.txt",
        b"x\\evil.txt",
        b"a\nb.txt",
        b"\x1b[2J.txt",
        b"\xff\xfe.txt",
    ],
)
def test_names_are_only_labels(name: bytes, put: Callable[[bytes], Path], tmp_path: Path) -> None:
    """Nothing is ever written under a member's name; names of any bytes come back, and can be stored as JSON."""
    path = put(member(name, b"text") + member(b"good.txt", b"text"))
    collection = opened(path)
    samples = [collection.read(0, 0, row) for row in range(2)]
    assert samples[0].key.encode("utf-8", "surrogateescape") == name.removesuffix(b".txt")
    assert json.loads(json.dumps(samples[0].key)) == samples[0].key
    outside = [entry for entry in tmp_path.rglob("*") if entry.is_file() and "cache" not in entry.parts]
    assert outside == [path]


@pytest.mark.parametrize("long", [gnu_long_name, lambda name: pax({b"path": name})], ids=["gnu", "pax"])
@pytest.mark.parametrize(
    "name",
    [b"/" * 900_000 + b"\xc3\xa9", b"./" * 450_000 + b"a.txt", b"x" * 900_000 + b".txt", b"__" * 450_000 + b"/a.b"],
)
def test_very_long_names_take_no_time(
    name: bytes, long: Callable[[bytes], bytes], put: Callable[[bytes], Path]
) -> None:
    """The regular expression of webdataset takes hours for a million slashes."""
    begin = time.perf_counter()
    collection = opened(put(long(name) + member(b"short", b"text") + member(b"good.txt", b"text")))
    assert time.perf_counter() - begin < 5
    assert "good" in [collection.read(0, 0, row).key for row in range(int(collection.num_rows[0]))]


def test_members_that_would_pass_for_tags_are_refused(put: Callable[[bytes], Path]) -> None:
    """``a.__index__`` would take the place of the global index of its sample."""
    with pytest.raises(ShardLayoutError, match=r"evil-000\.tar.*'__index__'"):
        opened(put(member(b"a.txt", b"text") + member(b"a.__index__", b"0")))


# Kinds and sizes of members


@pytest.mark.parametrize("on_damage", ["raise", "skip"])
@pytest.mark.parametrize(
    ("data", "word"),
    [
        (member(b"a.txt", b"", tarfile.SYMTYPE), "symbolic link"),
        (member(b"a.txt", b"", tarfile.LNKTYPE), "hard link"),
        (member(b"a.txt", b"", tarfile.CHRTYPE), "character device"),
        (member(b"a.txt", b"", tarfile.BLKTYPE), "block device"),
        (member(b"a.txt", b"", tarfile.FIFOTYPE), "named pipe"),
        (member(b"a.txt", b"", tarfile.GNUTYPE_SPARSE), "sparse file"),
        (pax({b"GNU.sparse.major": b"1"}) + member(b"a.txt", b""), "sparse file"),
        (pax({b"GNU.sparse.size": b"9" * 30}) + member(b"a.txt", b""), "sparse file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_plain_file_is_refused(data: bytes, word: str, on_damage: str, put: Callable[[bytes], Path]) -> None:
    with pytest.raises(ShardLayoutError, match=rf"evil-000\.tar.*{word}"):
        opened(put(member(b"good.txt", b"text") + data), on_damage)


@pytest.mark.parametrize(
    "data",
    [
        bytes(header(b"b.txt", b"77777777777\0")),
        bytes(header(b"b.txt", b"\x80" + b"\x7f" * 11)),
        bytes(header(b"b.txt", b"\xff" * 12)),
        bytes(header(b"b.txt", b"-0000000001\0")),
        bytes(header(b"b.txt", b"999999999999")),
        pax({b"size": b"9" * 4000}) + member(b"b.txt", b"text"),
        pax({b"size": b"9" * 40_000}) + member(b"b.txt", b"text"),
        pax({b"size": b"-5"}) + member(b"b.txt", b"text"),
        pax({b"size": "٣".encode()}) + member(b"b.txt", b"text"),
        bytes(header(b"pax", 1 << 30, tarfile.XHDTYPE)),
        bytes(header(b"././@LongLink", 1 << 33, tarfile.GNUTYPE_LONGNAME)),
        member(b"pax", b"99999999999 path=x\n", tarfile.XHDTYPE) + member(b"b.txt", b"text"),
        member(b"pax", b"-3 path=x\n", tarfile.XHDTYPE) + member(b"b.txt", b"text"),
        member(b"pax", b"0 path=x\n" * 50, tarfile.XHDTYPE) + member(b"b.txt", b"text"),
    ],
)
def test_sizes_that_cannot_be_are_damage_and_the_rows_before_are_kept(
    data: bytes, put: Callable[[bytes], Path]
) -> None:
    path = put(member(b"a.txt", b"first") + data)
    with pytest.raises(DamagedShardError, match=r"evil-000\.tar is damaged at byte"):
        opened(path)
    collection = opened(path, "skip")
    assert collection.read(0, 0, 0).key == "a"
    assert all(collection.read(0, 0, row).members for row in range(int(collection.num_rows[0])))


def test_a_row_that_would_take_all_memory_is_refused(
    put: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sparse file on disk makes a terabyte cheap."""
    monkeypatch.setattr("dmagent_loader.shards.index.shard_index.MAX_ROW_BYTES", 1 << 20)
    with pytest.raises(ShardLayoutError, match=r"evil-000\.tar: row 1 \(key 'b'\) takes 2097152 bytes"):
        opened(put(member(b"a.txt", b"x") + member(b"b.txt", bytes(2 << 20))))


def test_a_row_whose_members_lie_far_apart_is_refused(put: Callable[[bytes], Path]) -> None:
    """A row is read in one piece: files that belong to no sample could make that piece any size."""
    data = (
        member(b"a.txt", b"x") + member(b"b.txt", b"x") + member(b"README", bytes(3 << 20)) + member(b"b.json", b"{}")
    )
    with pytest.raises(ShardLayoutError, match=r"evil-000\.tar: row 1 \(key 'b'\).*files between its members"):
        opened(put(data))
    assert opened(put(member(b"a.txt", b"x") + member(b"README", bytes(3 << 20)))).num_rows.tolist() == [1]


# Many


def test_more_extensions_than_a_shard_can_have_are_refused_with_the_cause(put: Callable[[bytes], Path]) -> None:
    data = b"".join(member(b"file.v%d.txt" % number, b"") for number in range(65_600))
    with pytest.raises(ShardLayoutError, match=r"evil-000\.tar: more than 65536 different extensions.*first dot"):
        opened(put(data))


def test_a_row_of_tens_of_thousands_of_members_takes_linear_time(put: Callable[[bytes], Path]) -> None:
    """A list of what a row has already would be searched two billion times."""
    path = put(b"".join(member(b"a.%d" % number, b"") for number in range(30_000)))
    begin = time.perf_counter()
    assert len(opened(path).read(0, 0, 0).members) == 30_000
    assert time.perf_counter() - begin < 20


def test_thousands_of_damaged_places_do_not_read_the_shard_again_and_again(put: Callable[[bytes], Path]) -> None:
    """A buffer that is filled anew at each of them would read 16 GB of these 8 MB."""
    path = put(b"".join(bytes(header(b"%06d.txt" % n, 0)) + bytes(BLOCK) for n in range(4000)) + b"\xff" * BLOCK * 4000)
    source = CountingSource(str(path))
    size = path.stat().st_size
    index = build_index(str(path), source, size)
    assert index.num_rows > 1000
    assert len(index.damage) > 1000
    assert source.bytes_read < 3 * size


def test_bytes_that_look_like_headers_are_judged_in_the_buffer(put: Callable[[bytes], Path]) -> None:
    """After damage every ``ustar`` may be a header; asking the file for each would be 200,000 reads here."""
    path = put(b"\xff" * BLOCK + b"ustar" * 200_000 + b"000000\0 " * 10_000 + b"ustar" * 10)
    source = CountingSource(str(path))
    index = build_index(str(path), source, path.stat().st_size)
    assert index.num_rows == 0
    assert source.reads < 100


@pytest.mark.slow
def test_a_million_tiny_members_take_bounded_memory(tmp_path: Path) -> None:
    """512 MB of headers; `million.py` prints the figures."""
    from benchmarks.reliability.million import measure

    measured = measure(1_000_000, tmp_path)
    assert measured.rows == 1_000_000
    assert measured.peak_bytes < 400 << 20


# Decoders


def decode(extension: str, data: bytes) -> Any:
    return Decoder()(RawSample("key", {extension: memoryview(bytearray(data))}))[extension]


def npy(header_text: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header_text.encode("latin1") + b"\n"
    width = 2 if version[0] == 1 else 4
    return b"\x93NUMPY" + version + len(text).to_bytes(width, "little") + text + data


def zip_with_false_size(method: int, real: int, declared: int) -> bytes:
    """A zip of one ``.npy`` entry that unpacks to more than it declares."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr("a.npy", bytes(real))
    data = bytearray(stream.getvalue())
    local, central = data.index(b"PK\x03\x04"), data.index(b"PK\x01\x02")
    struct.pack_into("<I", data, local + 22, declared)
    struct.pack_into("<I", data, central + 24, declared)
    return bytes(data)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_that_unpacks_to_more_than_it_declares_takes_no_memory(method: int) -> None:
    """zipfile unpacks bzip2 and lzma, and deflate when asked for all, without a limit."""
    bomb = zip_with_false_size(method, real=32 << 20, declared=200)
    tracemalloc.start()
    with pytest.raises(DecodeError, match="member 'npz' of sample 'key'"):
        decode("npz", bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_a_zip_of_overlapping_entries_is_stopped_by_what_it_declares() -> None:
    """Every entry is another name for the same compressed bytes: 100 GB from 110 KB."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(100 << 20))
        entry = archive.filelist[0]
        for number in range(1000):
            copy = zipfile.ZipInfo(f"{number}.npy")
            for name in ("header_offset", "compress_size", "file_size", "CRC", "compress_type"):
                setattr(copy, name, getattr(entry, name))
            archive.filelist.append(copy)
    with pytest.raises(DecodeError, match="unpacks to 104962457600 bytes"):
        decode("npz", stream.getvalue())


def test_npz_members_are_read_as_numpy_reads_them() -> None:
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.asfortranarray(np.ones((2, 2), np.float32)), "c": np.array("x")}
    for save in (np.savez, np.savez_compressed):
        stream = io.BytesIO()
        save(stream, **arrays)
        found = decode("npz", stream.getvalue())
        assert list(found) == list(arrays)
        assert all(np.array_equal(found[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize(
    ("extension", "data"),
    [
        ("json", b"[" * 200_000),
        ("json", b'{"a":' * 200_000),
        ("json", b"1" * 1_000_000),
        ("json", b"-" + b"9" * 100_000),
        ("jsonl", b"[1]\n" + b"[" * 200_000),
        ("json", b'"\\ud800'),
        ("cls", b"1" * 1_000_000),
        ("id", b" " * 10_000_000 + b"1"),
        ("index", b"1e5"),
        ("cls", "٣".encode() + b"\xff"),
        ("npz", b"PK\x05\x06" + b"\xff" * 18),
        ("npz", zipfile.ZIP_STORED.to_bytes(4, "little")),
        ("txt.gz.gz", b"\x1f\x8b"),
        ("txt" + ".gz" * 2000, b"\x1f\x8b"),
        ("npy", npy("__import__('os').system('touch /tmp/evil')")),
        ("npy", npy("{'descr': __import__('os').system('true'), 'fortran_order': False, 'shape': (1,), }", b"1")),
        ("npy", npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", bytes(8))),
        ("npy", npy("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,), }", bytes(8))),
        ("npy", npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1" + "0" * 4000 + ",), }", bytes(8))),
        ("npy", npy("{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999, 9999999999, 9999), }", bytes(8))),
        ("npy", npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }", bytes(8))),
        ("npy", npy("{'descr': '<f8', 'fortran_order': False, 'shape': (" + "1," * 70 + "), }", bytes(8))),
        ("npy", npy("{'descr': '|V0', 'fortran_order': False, 'shape': (5,), }")),
        ("npy", npy("(" * 5000)),
        ("npy", npy("-" * 9000 + "1")),
        ("npy", npy("{'descr': '<f8', 'fortran_order': False, 'shape': (), }" + " " * 60_000, bytes(8))),
        ("npy", npy("{'descr': '<f8', 'fortran_order': False, 'shape': (), }", bytes(8), b"\x09\x00")),
        ("npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff"),
        ("safetensors", b""),
        ("safetensors", (1 << 63).to_bytes(8, "little") + b"{}"),
        ("safetensors", b"\x02" + bytes(7) + b"[]"),
        ("safetensors", (200_000).to_bytes(8, "little") + b"[" * 200_000),
    ],
)
def test_bombs_and_malformed_members_are_refused_by_name_in_no_time(extension: str, data: bytes) -> None:
    begin = time.perf_counter()
    with pytest.raises(DecodeError, match="of sample 'key' cannot be decoded") as error:
        decode(extension, data)
    assert time.perf_counter() - begin < 5
    assert len(str(error.value)) < 20_000
    assert not Path("/tmp/evil").exists()


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 62]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "X99", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "__reduce__": 1, "shape ": None},
    ],
)
def test_safetensors_members_whose_headers_lie_are_refused(entry: dict[str, Any]) -> None:
    header_text = json.dumps({"a": entry}).encode()
    try:
        found = decode("safetensors", len(header_text).to_bytes(8, "little") + header_text + bytes(8))
    except DecodeError:
        return
    assert entry.get("__reduce__") == 1, "only the entry with unknown keys may be read"
    assert found["a"].tolist() == [0, 0]


def test_safetensors_tensors_that_share_their_bytes_are_refused() -> None:
    data = safetensors.numpy.save({"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)})
    size = int.from_bytes(data[:8], "little")
    header_text = json.loads(data[8 : 8 + size])
    header_text["b"] = header_text["a"]
    text = json.dumps(header_text).encode()
    with pytest.raises(DecodeError):
        decode("safetensors", len(text).to_bytes(8, "little") + text + data[8 + size :])


class _Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("/tmp/dmagent-evil",))


@pytest.mark.parametrize("extension", ["pkl", "pyd", "pth"])
def test_members_that_could_run_code_stop_the_run_by_name_and_do_not_run(
    extension: str, put: Callable[[bytes], Path]
) -> None:
    import pickle

    path = put(member(b"good.txt", b"text") + member(b"x." + extension.encode(), pickle.dumps(_Exploit())))
    sampler = AgentWeightedSampler(
        {"source/a": str(path)}, samples_per_reweight=10, reading=ReadingConfig(progress=False)
    )
    with pytest.raises(DecodeError, match=rf"'{extension}' of sample 'x'.*can execute code"):
        list(zip(sampler, range(2), strict=False))
    assert not Path("/tmp/dmagent-evil").exists()


def test_a_member_that_cannot_be_decoded_is_named_with_its_shard(put: Callable[[bytes], Path]) -> None:
    path = put(member(b"a.json", b"{"))
    sampler = AgentWeightedSampler(
        {"source/a": str(path)}, samples_per_reweight=10, reading=ReadingConfig(progress=False)
    )
    with pytest.raises(DecodeError, match=r"source/a.*evil-000\.tar"):
        next(iter(sampler))


# Manifests


def manifest(paths: Iterable[Any], schema: object = 1) -> str:
    return json.dumps({"schema": schema, "domains": {"source/a": {"shards": [{"path": path} for path in paths]}}})


@pytest.mark.parametrize(
    "text",
    [
        manifest(["../secret.tar"]),
        manifest(["a/../../secret.tar"]),
        manifest(["/etc/passwd"]),
        manifest(["{0..99999999999}.tar"]),
        manifest(["*.tar"]),
        manifest(["a.tar::b.tar"]),
        manifest(["pipe:touch /tmp/evil"]),
        manifest([3]),
        manifest([None]),
        manifest([""]),
        manifest(["a\0.tar"]),
        manifest(["a.tar"], schema=2),
        manifest(["a.tar"], schema="1" * 10_000),
        '{"schema": 1, "domains": {"a": {"shards": []}, "a": {"shards": []}}}',
        '{"schema": 1, "domains": []}',
        "[" * 200_000,
        "1" * 100_000,
        "\ud800",
    ],
)
def test_manifests_that_reach_outside_or_cannot_be_are_refused(text: str, tmp_path: Path) -> None:
    """Fails for one that hands paths on as patterns: they would be expanded, in the last instance for ever."""
    (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ShardError, match=r"manifest\.json") as error:
        load_manifest(tmp_path)
    assert len(str(error.value)) < 2000


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_manifest_that_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(ShardError, match=r"manifest\.json"):
        load_manifest(tmp_path)
