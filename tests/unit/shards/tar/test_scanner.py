"""The end of an archive is found wherever it lies in the pieces that the scan reads."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from dmagent_loader.shards import ShardCollection
from dmagent_loader.shards.tar import scanner
from dmagent_loader.shards.writing.tar_writer import TarWriter


@pytest.mark.parametrize("rows", range(18, 38))
def test_padding_that_crosses_the_end_of_a_piece_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(scanner, "_CHUNK_BYTES", 1 << 14)
    writer = TarWriter(tmp_path / "a.tar")
    for row in range(rows):
        writer.add(f"{row:03d}", {"txt": b"x" * 500})
    writer.close()
    collection = ShardCollection.open({"source/a": str(tmp_path)}, cache_dir=tmp_path / "index", progress=False)
    assert collection.num_rows.tolist() == [rows]


def rows_of(path: Path) -> dict[str, dict[str, bytes]]:
    """Rows of a damaged shard that are used, by their keys."""
    collection = ShardCollection.open({"a": str(path)}, on_damage="skip", cache_dir=path.parent / "c", progress=False)
    assert collection.damage
    samples = [collection.read(0, 0, row) for row in range(int(collection.num_rows[0]))]
    return {sample.key: {name: bytes(data) for name, data in sample.members.items()} for sample in samples}


def write(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path.read_bytes()


ROW = 1536
"""Bytes of a row in the file: header, 600 bytes, padding."""


@pytest.mark.parametrize(
    ("begin", "end", "instead"),
    [
        (10 * ROW - 1000, 10 * ROW + 100, b"x" * 1100),
        (10 * ROW - 1024, 10 * ROW + 512, bytes(1536)),
        (10 * ROW - 500, 20 * ROW + 10240, bytes(10 * ROW + 10740)),
        (9 * ROW + 600, 9 * ROW + 600, b"x"),
        (9 * ROW + 600, 9 * ROW + 601, b""),
        (9 * ROW + 1024, 9 * ROW + 1024, b"x" * 512),
        (19 * ROW + 600, 19 * ROW + 601, b""),
    ],
    ids=["overwritten", "zeroed", "zeros up to the end", "inserted", "removed", "a block more", "in the last row"],
)
def test_damage_that_begins_in_the_row_before_it_takes_that_row(
    tmp_path: Path, begin: int, end: int, instead: bytes
) -> None:
    """A bad sector ends a payload as well as it spoils the header behind it; only the header has a checksum."""
    rows = {f"{row:03d}": {"txt": bytes([65 + row]) * 600} for row in range(20)}
    data = write(tmp_path / "a.tar", [(f"{key}.txt", row["txt"]) for key, row in rows.items()]) + bytes(20 * ROW)
    data = data if instead.startswith(b"\0" * 5000) else data[: -20 * ROW]
    (tmp_path / "a.tar").write_bytes(data[:begin] + instead + data[end:])
    found = rows_of(tmp_path / "a.tar")
    assert found.items() <= rows.items()
    assert len(found) >= 9


@pytest.mark.parametrize(("begin", "end"), [(0, 512), (0, 1024), (512, 1024)])
def test_a_member_whose_long_name_was_zeroed_is_not_left_out_in_silence(tmp_path: Path, begin: int, end: int) -> None:
    """A name of zeros is empty, or ends with a block, so it has no extension and looks like a file without a row."""
    rows = {f"{'folder/' * 80}{row:03d}": {"txt": b"x" * 600} for row in range(9)}
    members = [(f"{key}.txt", row["txt"]) for key, row in rows.items()]
    data = bytearray(write(tmp_path / "a.tar", members, tarfile.GNU_FORMAT))
    name = data.index(b"././@LongLink", len(data) // 3) + 512
    data[name + begin : name + end] = bytes(end - begin)
    (tmp_path / "a.tar").write_bytes(data)
    found = rows_of(tmp_path / "a.tar")
    assert found.items() <= rows.items()
    assert len(found) == 8
