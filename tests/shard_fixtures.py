"""Shards of a few rows, written with Python's tarfile, and an index cache of their own.

A ``conftest.py`` makes the fixtures available to its folder by importing them.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from dmagent_loader.shards import ShardCollection
from dmagent_loader.shards.index.lock import exclusive
from dmagent_loader.shards.manifest import Manifests

WriteTar = Callable[..., Path]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMAGENT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def write_tar(tmp_path: Path) -> WriteTar:
    """Writes members (name, bytes) to a tar in the test's folder."""

    def write(name: str, members: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=format) as tar:
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture
def twenty(write_tar: WriteTar) -> Path:
    """20 rows of one member, 600 to 619 bytes: 1,536 bytes each in the file."""
    return write_tar("twenty.tar", [(f"{i:03d}.txt", bytes([65 + i]) * (600 + i)) for i in range(20)])


@pytest.fixture
def pairs(write_tar: WriteTar) -> Path:
    """20 rows of two members: 1,024 bytes for each member in the file."""
    return write_tar(
        "pairs.tar",
        [(f"{i:03d}.{ext}", f"{ext}{i}".encode()) for i in range(20) for ext in ("txt", "json")],
    )


def rewritten(shard: str | Path, change: Callable[[str, dict[str, bytes]], dict[str, bytes]]) -> None:
    """Writes a shard again, with the members of each row as a function makes them of its key and its members."""
    rows: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None
            rows.setdefault(key, {})[extension] = file.read()
    with tarfile.open(shard, "w") as tar:
        for key, members in rows.items():
            for extension, data in change(key, members).items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def content(shard: int, row: int) -> bytes:
    return f"{shard}/{row} ".encode() * (1 + (shard + row) % 50)


@pytest.fixture
def hundred(write_tar: WriteTar) -> dict[str, list[str]]:
    """Ten domains of ten shards of seven rows."""
    shards = {}
    for domain in range(10):
        numbers = range(domain * 10, domain * 10 + 10)
        shards[f"source/{domain}"] = [
            str(write_tar(f"{n:03d}.tar", [(f"{row}.txt", content(n, row)) for row in range(7)])) for n in numbers
        ]
    return shards


def read_and_check(collection: ShardCollection, seed: int, count: int = 500) -> int:
    rng = random.Random(seed)
    for _ in range(count):
        domain, shard, row = rng.randrange(10), rng.randrange(10), rng.randrange(7)
        sample = collection.read(domain, shard, row)
        assert sample.key == str(row)
        assert bytes(sample.members["txt"]) == content(domain * 10 + shard, row)
    return count


def write_manifest(folder: Path, rows: int) -> None:
    record = {"path": "source/a/s.tar", "rows": rows, "bytes": 10240, "sha256": "0" * 64}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"schema": 1, "domains": {"source/a": {"shards": [record]}}}))


def rows_of(shard: Path | str, manifests: Manifests | None = None) -> int | None:
    record = (manifests or Manifests()).record(str(shard))
    return None if record is None else record.rows


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def files_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def published(folder: Path) -> list[str]:
    """The files of a writer's output, without its lock and the work of a job that did not finish."""
    names = (path.relative_to(folder).as_posix() for path in files_under(folder))
    return sorted(name for name in names if not name.startswith("."))


@pytest.fixture
def web(tmp_path: Path) -> Path:
    rows = [{"text": f"text {n} ☃", "url": f"u{n}", "score": n} for n in range(25)]
    return write_jsonl(tmp_path / "web.jsonl.gz", rows)


def seconds_until_ours(lock: Path, patience: float = 30.0) -> float:
    began = time.monotonic()
    with exclusive(lock, "indexing a.tar", patience, threading.Event()):
        return time.monotonic() - began


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "index" / "a.lock"
