"""Shards of a few rows, written with Python's tarfile, and an index cache of their own."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

WriteTar = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
