"""Shards are written without tarfile, but to the byte as it writes them."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from dmagent_loader.shards.writing.tar_writer import TarWriter

KEYS = ["a", "a" * 95, f"{'folder' * 20}/{'b' * 80}", "ключ", "\udcff", "with space", ""]
SIZES = [0, 1, 511, 512, 513, 10_240, 100_000]


@pytest.mark.parametrize("keys", [KEYS, KEYS[:1], []], ids=["all", "one", "none"])
def test_the_bytes_are_those_of_tarfile(keys: list[str], tmp_path: Path) -> None:
    rows = [(key, {"txt": b"x" * size, "json": b"{}"}) for key in keys for size in SIZES]
    writer, expected = TarWriter(tmp_path / "a.tar"), io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in rows:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            writer.add(key, members)
    record = writer.close(durable=False)
    written = (tmp_path / "a.tar").read_bytes()
    assert written == expected.getvalue()
    assert (record.rows, record.bytes) == (len(rows), len(written))
    assert record.sha256 == hashlib.sha256(written).hexdigest()


def test_a_name_that_no_header_holds_is_refused(tmp_path: Path) -> None:
    writer = TarWriter(tmp_path / "a.tar")
    with pytest.raises(ValueError, match="name is too long"):
        writer.add("a" * 300, {"txt": b""})
    writer.abandon()
