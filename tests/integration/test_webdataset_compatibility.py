"""Shards of webdataset read the same here and through webdataset."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from dmagent_loader.shards import Decoder, ShardCollection, load_manifest, shard_files
from dmagent_loader.testing import write_toy_shards

SAMPLES: list[dict[str, Any]] = [
    {"__key__": "000001", "txt": "plain", "cls": 7},
    {"__key__": "a/b/c/000002", "json": {"ü": [1, 2.5, None]}, "seg.txt": "multi-dot extension"},
    {"__key__": "a.b/c.d/000003", "npy": np.arange(12, dtype=np.float32).reshape(3, 4)},
    {"__key__": "dir with space/日本語-Ω", "text": "snow ☃", "id": 12},
    {"__key__": "long/" + "x" * 60 + "/" + "y" * 90, "TXT": "upper-case extension"},
    {"__key__": "000004", "input_ids.npy": np.arange(512, dtype=np.uint16), "index": 3},
    {"__key__": "000005", "json.gz": {"packed": True}, "transcript": "t"},
    {"__key__": "000006", "npz": {"a": np.arange(3), "b": np.ones((2, 2))}},
    {"__key__": "000007", "bin": b"\x00\xff" * 700, "jpg": b"not decoded"},
    {"__key__": "000008", "txt": ""},
]


@pytest.fixture
def shards(tmp_path: Path) -> str:
    with webdataset.ShardWriter(str(tmp_path / "s-%03d.tar"), maxcount=4, verbose=0) as writer:
        for sample in SAMPLES:
            writer.write(sample)
    return str(tmp_path / "s-{000..002}.tar")


def by_webdataset(pattern: str, *, decode: bool) -> list[dict[str, Any]]:
    dataset = webdataset.WebDataset(pattern, shardshuffle=False, empty_check=False)
    return [
        {key: value for key, value in sample.items() if key == "__key__" or not key.startswith("__")}
        for sample in (dataset.decode() if decode else dataset)
    ]


def by_position(pattern: str, cache: Path, decoder: Any) -> list[dict[str, Any]]:
    collection = ShardCollection.open({"source/a": pattern}, cache_dir=cache, progress=False)
    samples = []
    for shard, rows in enumerate(collection.shard_rows(0)):
        for row in range(rows):
            raw = collection.read(0, shard, row)
            samples.append({"__key__": raw.key, **decoder(raw)})
    return samples


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    return type(a) is type(b) and bool(a == b)


def test_keys_extensions_bytes_and_order_are_the_same(shards: str, tmp_path: Path) -> None:
    ours = by_position(shards, tmp_path, lambda raw: {name: bytes(data) for name, data in raw.members.items()})
    theirs = by_webdataset(shards, decode=False)
    assert [sample["__key__"] for sample in theirs] == [sample["__key__"] for sample in SAMPLES]
    assert ours == theirs
    assert [list(sample) for sample in ours] == [list(sample) for sample in theirs]


def test_decoded_values_are_the_same(shards: str, tmp_path: Path) -> None:
    ours = by_position(shards, tmp_path, Decoder())
    theirs = by_webdataset(shards, decode=True)
    assert all(equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_webdataset_passes_over_is_passed_over(tmp_path: Path) -> None:
    """Names without extension, metadata, folders; and hidden names, also in folders, where webdataset keeps them."""
    names = [
        "__info__.txt",
        "__meta__/x.txt",
        "README",
        ".hidden.txt",
        "d/.hidden.txt",
        "a.txt",
        "b/README",
        "b.c/d",
        "e.",
    ]
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    pattern = str(tmp_path / "odd.tar")
    ours = by_position(pattern, tmp_path, lambda raw: {name: bytes(data) for name, data in raw.members.items()})
    theirs = by_webdataset(pattern, decode=False)
    assert ours == [sample for sample in theirs if sample["__key__"] != "d/"]
    assert (len(ours), len(theirs)) == (3, 4), "webdataset makes a row of d/.hidden.txt"


def test_shards_written_here_are_read_by_webdataset(tmp_path: Path) -> None:
    (tmp_path / "web.jsonl").write_text('{"text": "one text\\n"}', encoding="utf-8")
    shard_files({"source/web": [tmp_path / "web.jsonl"]}, tmp_path / "out", progress=False)
    (shard,) = load_manifest(tmp_path / "out")["source/web"]
    assert by_webdataset(shard, decode=True) == [{"__key__": "000000000", "txt": "one text\n"}]


@pytest.mark.parametrize("tokens", [None, 12])
def test_toy_shards_are_read_by_webdataset_and_have_equal_bytes(tmp_path: Path, tokens: int | None) -> None:
    rows = {"source/web": 7, "target/math/algebra": 3, "target/none": 0}
    toys, again = (write_toy_shards(tmp_path / name, rows, rows_per_shard=3, tokens=tokens) for name in ("a", "b"))
    assert [len(paths) for paths in toys.values()] == [3, 1, 1]
    for domain, paths in toys.items():
        assert [Path(path).read_bytes() for path in paths] == [Path(path).read_bytes() for path in again[domain]]
        if rows[domain]:
            theirs = by_webdataset("::".join(paths), decode=True)
            ours = [sample for path in paths for sample in by_position(path, tmp_path / "cache", Decoder())]
            assert len(theirs) == rows[domain]
            assert all(equal(a, b) for a, b in zip(ours, theirs, strict=True))
