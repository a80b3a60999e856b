"""Compressed inputs: all of their content is read, or what is lost is named."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path

import pytest

from dmagent_loader.errors import ShardError
from dmagent_loader.shards.inputs.documents import DocumentReader
from dmagent_loader.shards.inputs.finding import find_inputs

LINE = b'{"text": "one"}\n'
PACKED = {".gz": gzip.compress(LINE), ".bz2": bz2.compress(LINE), ".xz": lzma.compress(LINE)}


def texts(path: Path) -> list[str]:
    return [document.text for document in DocumentReader(find_inputs("source/a", [path]))]


@pytest.mark.parametrize("ending", list(PACKED))
@pytest.mark.parametrize("padding", [0, 8, 1 << 19])
def test_all_streams_of_a_file_are_read(tmp_path: Path, ending: str, padding: int) -> None:
    """The module lzma took padding, and whatever follows it, for the end of the file."""
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes((PACKED[ending] + bytes(padding)) * 2)
    assert texts(path) == ["one", "one"]


@pytest.mark.parametrize("ending", list(PACKED))
@pytest.mark.parametrize("damage", ["overwritten", "cut"])
def test_a_damaged_later_stream_is_not_the_end_of_the_file(tmp_path: Path, ending: str, damage: str) -> None:
    """The modules bz2 and lzma left out all streams behind a damaged header in silence."""
    path, second = tmp_path / f"a.jsonl{ending}", PACKED[ending]
    second = b"\xff\xff" + second[2:] if damage == "overwritten" else second[:-3]
    path.write_bytes(PACKED[ending] + second)
    with pytest.raises(ShardError, match=rf"a\.jsonl{ending} is damaged .*what follows would be lost"):
        texts(path)


def test_content_larger_than_the_buffers_is_read_whole(tmp_path: Path) -> None:
    lines = b"".join(b'{"text": "%d %s"}\n' % (number, b"x" * 3000) for number in range(1000))
    for ending, pack in ((".bz2", bz2.compress), (".xz", lzma.compress)):
        path = tmp_path / f"a.jsonl{ending}"
        path.write_bytes(pack(lines) + pack(lines))
        assert [text.split()[0] for text in texts(path)] == [str(number) for number in range(1000)] * 2


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_without_bytes_was_cut(tmp_path: Path, ending: str) -> None:
    """.gz and .zst were read as files without documents."""
    path = tmp_path / f"a.jsonl{ending}"
    path.touch()
    with pytest.raises(ShardError, match=rf"a\.jsonl{ending} has no bytes, .* so it was cut: fetch or write it again"):
        texts(path)


def test_a_zstd_window_that_is_too_large_is_not_called_damage(tmp_path: Path) -> None:
    """As of `zstd --long=31`; fetching such a file again would not help."""
    frame = b"\x28\xb5\x2f\xfd\x00" + bytes([18 << 3]) + (len(LINE) << 3 | 1).to_bytes(3, "little") + LINE  # 256 MiB
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(frame)
    with pytest.raises(ShardError, match=r"window of more than 128 MiB .*write it again \(zstd -dc --long=31 .*jsonl"):
        texts(path)
    path.write_bytes(frame.replace(bytes([18 << 3]), bytes([17 << 3])))
    assert texts(path) == ["one"]
