"""The end of an archive is found wherever it lies in the pieces that the scan reads."""

from __future__ import annotations

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
