"""Shards that pass for indexed ones, by their size, their time or a sample of their bytes."""

from __future__ import annotations

import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dmagent_loader.errors import DamagedShardError
from dmagent_loader.shards import ShardCollection
from dmagent_loader.shards.index import cache

SIZE = 200_000
"""Bytes of a row: large enough for the sampled places of the file to lie between the headers."""


def members(name: str, added: bytes, edited: range) -> list[tuple[str, bytes]]:
    return [
        (
            name.format(row) if row in edited else f"{row:03d}.txt",
            random.Random(row).randbytes(SIZE) + added * (row in edited),
        )
        for row in range(40)
    ]


def read_all(path: Path) -> list[tuple[str, str, bytes]]:
    collection = ShardCollection.open({"source/a": str(path)}, progress=False)
    samples = [collection.read(0, 0, row) for row in range(int(collection.num_rows[0]))]
    return [(sample.key, name, bytes(data)) for sample in samples for name, data in sample.members.items()]


@pytest.mark.parametrize("is_of_the_same_time", [True, False])
@pytest.mark.parametrize(("name", "added"), [("{:03d}.txt", b"\n"), ("other-{:03d}.txt", b""), ("{:03d}.text", b"")])
def test_a_shard_with_other_headers_is_not_taken_for_the_indexed_one(
    write_tar: Callable[..., Path], is_of_the_same_time: bool, name: str, added: bytes
) -> None:
    """Its payloads begin with those that were indexed, at the same places: no checksum of a row shows the change."""
    path = write_tar("a.tar", members("{:03d}.txt", b"", range(0)))
    before, status = read_all(path), path.stat()
    new = members(name, added, range(1, 39))
    write_tar("a.tar", new)
    assert path.stat().st_size == status.st_size
    time = status.st_mtime_ns if is_of_the_same_time else status.st_mtime_ns + 10**9
    os.utime(path, ns=(time, time))
    if is_of_the_same_time and name != "{:03d}.text":
        with pytest.raises(DamagedShardError, match="since it was indexed"):
            read_all(path)
        return
    found = read_all(path)
    assert found != before
    assert [(f"{key}.{extension}", data) for key, extension, data in found] == new


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_of_all_kinds_pass_where_nothing_has_changed(
    write_tar: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, format: int
) -> None:
    names = ["short.TXT", "folder/" * 20 + "ends/in/a-prefix.txt", "./d.ir/a.b.json.gz"]
    names += ["é☃.txt", "long" * 60 + ".txt"] if format != tarfile.USTAR_FORMAT else []
    path = write_tar("a.tar", [(name, name.encode() * 100) for name in names], format)
    before = read_all(path)
    os.utime(path, ns=(1_700_000_000_000_000_000,) * 2)
    monkeypatch.setattr(cache, "build_index", lambda *_, **__: pytest.fail("read through"))
    assert read_all(path) == before
