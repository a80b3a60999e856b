"""Finding rows in a tar, and finding damage.

A streaming reader ends at a zeroed or overwritten header, or at a cut between members, without an error: five rows of
twenty, and nobody notices. Every such test here fails on a reader that trusts the first zero block or end of file.
"""

from __future__ import annotations

import io
import logging
import os
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dmagent_loader.errors import DamagedShardError, ShardLayoutError
from dmagent_loader.shards import ShardCollection
from dmagent_loader.shards.index.shard_index import ShardIndex, build_index
from dmagent_loader.shards.sources.local import open_source
from dmagent_loader.shards.tar import ScanStopped
from dmagent_loader.shards.tar.members import (
    BAD_HEADER,
    CUT_HEADER,
    CUT_PAYLOAD,
    NO_BLOCKS,
    NO_END,
    TRAILING,
    ZEROED_HEADER,
    ZEROED_TAIL,
)

ROW = 1536
SIXTH = 6 * ROW
Damage = Callable[[bytearray], bytes | bytearray]


def index_of(path: Path) -> ShardIndex:
    return build_index(str(path), open_source(str(path)), os.path.getsize(path))


def keys(index: ShardIndex) -> list[str]:
    return [index.key(row) for row in range(index.num_rows)]


def overwrite(start: int, replacement: bytes) -> Damage:
    def damage(data: bytearray) -> bytearray:
        data[start : start + len(replacement)] = replacement
        return data

    return damage


def cut(end: int) -> Damage:
    return lambda data: data[:end]


DAMAGES = {
    "bad checksum": (overwrite(SIXTH + 20, b"X"), BAD_HEADER, SIXTH, 19, 1, False),
    "random header": (overwrite(SIXTH, bytes(range(256)) * 2), BAD_HEADER, SIXTH, 19, 1, False),
    "zeroed header": (overwrite(SIXTH, bytes(512)), ZEROED_HEADER, SIXTH, 19, 1, False),
    "zeroed page": (overwrite(SIXTH, bytes(4096)), ZEROED_HEADER, SIXTH, 17, 3, False),
    "cut at a record": (cut(SIXTH), NO_END, SIXTH, 6, 0, True),
    "cut in the padding": (cut(SIXTH - 200), NO_END, SIXTH - 200, 6, 0, True),
    "cut in a header": (cut(SIXTH + 300), CUT_HEADER, SIXTH, 6, 1, True),
    "cut in a member": (cut(SIXTH + 700), CUT_PAYLOAD, SIXTH, 6, 1, True),
    "zeros to the end": (lambda data: data[:SIXTH] + bytes(len(data) - SIXTH), ZEROED_TAIL, SIXTH, 6, None, True),
    "bytes after the end": (lambda data: data + b"junk" * 200, TRAILING, None, 20, 0, False),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_found_located_and_counted(twenty: Path, name: str) -> None:
    damage, kind, offset, kept, lost, at_least = DAMAGES[name]
    size = twenty.stat().st_size
    twenty.write_bytes(damage(bytearray(twenty.read_bytes())))
    index = index_of(twenty)
    (found,) = index.damage
    assert found.kind == kind
    assert found.offset == (size if offset is None else offset)
    assert index.num_rows == found.rows_kept == kept
    assert found.rows_before == (20 if offset is None else 6)
    assert found.at_least is at_least
    if lost is not None:
        assert found.rows_lost == lost


def test_rows_after_a_damaged_header_are_the_right_ones(twenty: Path) -> None:
    twenty.write_bytes(overwrite(SIXTH, bytes(512))(bytearray(twenty.read_bytes())))
    collection = ShardCollection.open({"source/a": str(twenty)}, on_damage="skip", progress=False)
    samples = [collection.read(0, 0, row) for row in range(19)]
    assert [sample.key for sample in samples] == [f"{i:03d}" for i in range(20) if i != 6]
    assert all(bytes(s.members["txt"]) == bytes([65 + int(s.key)]) * (600 + int(s.key)) for s in samples)


@pytest.mark.parametrize(("member", "lost_key"), [(12, "006"), (13, "006")])
def test_a_row_that_lost_a_member_is_not_delivered_as_if_whole(pairs: Path, member: int, lost_key: str) -> None:
    """Catches salvage that keeps the half of row 6 that is still there."""
    pairs.write_bytes(overwrite(member * 1024, bytes(512))(bytearray(pairs.read_bytes())))
    index = index_of(pairs)
    assert keys(index) == [f"{i:03d}" for i in range(20) if f"{i:03d}" != lost_key]
    assert (index.damage[0].rows_lost, index.damage[0].rows_kept) == (1, 19)
    assert index.num_members == 38


def test_a_cut_between_the_members_of_a_row_drops_the_row(pairs: Path) -> None:
    pairs.write_bytes(pairs.read_bytes()[: 13 * 1024])
    index = index_of(pairs)
    assert index.num_rows == 6
    assert index.damage[0].rows_lost == 1


def test_swapped_pages_deliver_no_row_without_its_other_member(write_tar: Callable[..., Path]) -> None:
    """Members that lie far from any gap are missing, too: no more rows than the gaps explain."""
    members = [(f"{i:03d}.{ext}", b"x" * size) for i in range(12) for ext, size in (("cls", 100), ("txt", 900))]
    path = write_tar("swapped.tar", members)
    whole, indexed = path.read_bytes(), 0
    for one in range(5):
        for other in range(one + 1, 6):
            data = bytearray(whole)
            for to, source in ((one, other), (other, one)):
                data[to * 4096 : to * 4096 + 4096] = whole[source * 4096 : source * 4096 + 4096]
            path.write_bytes(data)
            try:
                index = index_of(path)
            except ShardLayoutError:  # a key comes back
                continue
            if index.damage:  # some swaps leave a valid tar of other rows
                indexed += 1
                assert set(np.diff(index.row_first.astype(int)).tolist()) == {2}
    assert indexed >= 3


def test_rows_that_may_lack_members_stay_if_they_are_more_than_the_damage_explains(
    write_tar: Callable[..., Path],
) -> None:
    """Every third row never had a caption: one damaged header elsewhere is no reason to leave them all out."""
    members = [(f"{i:03d}.{ext}", b"x") for i in range(30) for ext in ("jpg", "txt") if ext == "jpg" or i % 3]
    path = write_tar("optional.tar", members)
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    assert keys(index_of(path)) == [f"{i:03d}" for i in range(1, 30)]


def test_two_damaged_places_are_both_reported(twenty: Path) -> None:
    data = bytearray(twenty.read_bytes())
    overwrite(3 * ROW, bytes(512))(data)
    overwrite(9 * ROW, b"\xff" * 512)(data)
    twenty.write_bytes(data)
    index = index_of(twenty)
    assert [(d.kind, d.rows_before) for d in index.damage] == [(ZEROED_HEADER, 3), (BAD_HEADER, 8)]
    assert index.num_rows == 18


def test_removed_bytes_do_not_lose_the_rest_of_the_shard(twenty: Path) -> None:
    """Catches a search for headers at multiples of 512 only."""
    data = twenty.read_bytes()
    twenty.write_bytes(data[: SIXTH + 700] + data[SIXTH + 707 :])
    index = index_of(twenty)
    assert {"005", "008", "019"} <= set(keys(index))
    assert index.damage


def test_old_rows_behind_a_full_end_marker_are_not_brought_back(twenty: Path, write_tar: Callable[..., Path]) -> None:
    """A shorter shard written over a longer one leaves old rows behind its end: they are reported, not trained on."""
    short = write_tar("short.tar", [("new.txt", b"new")]).read_bytes()
    twenty.write_bytes(short + twenty.read_bytes()[len(short) :])
    index = index_of(twenty)
    assert keys(index) == ["new"]
    assert index.damage[0].kind == TRAILING
    assert index.damage[0].offset == len(short) == 10240
    assert index.damage[0].at_least, "nobody knows that they are old"


def test_a_row_without_all_its_members_before_an_end_marker_within_the_file_is_left_out(pairs: Path) -> None:
    """Zeros up to a multiple of 10,240 bytes look like the end of the archive; here they took the tenth row's json."""
    data = bytearray(pairs.read_bytes())
    data[19 * 1024 : 20 * 1024] = bytes(1024)
    pairs.write_bytes(data)
    index = index_of(pairs)
    assert keys(index) == [f"{i:03d}" for i in range(9)]
    assert [(damage.kind, damage.offset, damage.rows_lost) for damage in index.damage] == [(TRAILING, 20 * 1024, 1)]


def test_a_tar_inside_a_member_is_only_a_payload(twenty: Path, write_tar: Callable[..., Path]) -> None:
    outer = write_tar("outer.tar", [("a.bin", twenty.read_bytes()), ("b.bin", b"x")])
    index = index_of(outer)
    assert (keys(index), index.damage) == (["a", "b"], ())


def test_an_archive_of_two_zero_blocks_is_whole(twenty: Path) -> None:
    """Some writers do not pad to 10,240 bytes."""
    data = twenty.read_bytes()
    twenty.write_bytes(data[: 20 * ROW] + bytes(1024))
    assert index_of(twenty).damage == ()


def test_bytes_missing_in_the_last_member_are_noticed_by_the_size_of_the_file(twenty: Path) -> None:
    """The zeros behind it move up and fill its place; only the file is no multiple of 512 bytes any more."""
    data = twenty.read_bytes()[: 20 * ROW + 1024]
    twenty.write_bytes(data[: 19 * ROW + 700] + data[19 * ROW + 707 :])
    (found,) = index_of(twenty).damage
    assert (found.kind, found.offset, found.at_least) == (NO_BLOCKS, len(data) - 7, True)
    assert "at least 1 rows lost" in str(found)


def test_raise_names_shard_offset_rows_and_remedy(twenty: Path) -> None:
    twenty.write_bytes(twenty.read_bytes()[:SIXTH])
    with pytest.raises(
        DamagedShardError, match=r"(?s)twenty\.tar.*byte 9216.*6 rows readable.*on_damage='skip'"
    ) as error:
        ShardCollection.open({"source/a": str(twenty)}, progress=False)
    assert "source/a" in str(error.value)


def test_skip_logs_the_effect_on_the_domain_and_estimates_cut_rows_from_the_whole_shards(
    twenty: Path, write_tar: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """A shard that was cut cannot say what it lost; the shards beside it can: 14 of 60 rows."""
    whole = [write_tar(f"whole{n}.tar", [(f"{i}.txt", b"x") for i in range(20)]) for n in range(2)]
    twenty.write_bytes(twenty.read_bytes()[:SIXTH])
    with caplog.at_level(logging.WARNING):
        collection = ShardCollection.open({"source/a": [*whole, twenty]}, on_damage="skip", progress=False)
    assert collection.num_rows.tolist() == [46]
    assert "46 rows are left, about 14 are lost (23.3% of the domain)" in caplog.text
    assert [d.kind for d in collection.damage] == [NO_END]


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>" * 100, b"x"])
def test_a_file_that_is_no_tar_is_damaged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "page.tar"
    path.write_bytes(content)
    with pytest.raises(DamagedShardError, match=r"page\.tar.*byte 0"):
        ShardCollection.open({"source/a": str(path)}, progress=False)


@pytest.mark.parametrize(
    ("magic", "name"), [(b"\x1f\x8b\x08\x00", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh91", "bzip2")]
)
def test_compressed_shards_are_refused_with_advice(tmp_path: Path, magic: bytes, name: str) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(magic + bytes(1000))
    with pytest.raises(ShardLayoutError, match=rf"{name}.*unpack"):
        index_of(path)


@pytest.mark.parametrize(
    "format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["ustar", "gnu", "pax"]
)
def test_long_and_unicode_names_are_read_as_tarfile_reads_them(write_tar: Callable[..., Path], format: int) -> None:
    names = ["a/b.c/d.seg.PNG", f"{'d' * 60}/{'e' * 80}.txt", "ü/ß.Ω.json"]
    if format != tarfile.USTAR_FORMAT:
        names.append("x" * 180 + ".txt")
    path = write_tar("names.tar", [(name, name.encode()) for name in names], format=format)
    index = index_of(path)
    expected = ["a/b.c/d", f"{'d' * 60}/{'e' * 80}", "ü/ß", "x" * 180][: len(names)]
    assert keys(index) == expected
    assert [index.extensions[number] for number in index.extension] == ["seg.png", "txt", "ω.json", "txt"][: len(names)]
    data = path.read_bytes()
    for number, name in enumerate(names):
        start = int(index.offset[number])
        assert data[start : start + int(index.size[number])] == name.encode()


@pytest.mark.parametrize("payload", [b'{"a": 1}', b"\0\0", b"19 mtime=1790000000"])
def test_a_payload_behind_the_header_of_another_member_is_not_taken_for_pax_records(
    write_tar: Callable[..., Path], payload: bytes
) -> None:
    """A block that was written to a wrong place; the row would be gone without a word."""
    path = write_tar("small.tar", [(f"{i}.txt", payload) for i in range(6)])
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 26
    at = 2 * 2 * 512
    path.write_bytes(overwrite(at, header.tobuf(tarfile.USTAR_FORMAT))(bytearray(path.read_bytes())))
    index = index_of(path)
    assert [(damage.kind, damage.offset, damage.rows_before) for damage in index.damage] == [(BAD_HEADER, at, 2)]
    assert keys(index) == ["0", "1", "3", "4", "5"]


LONG = [(f"{'folder/' * 15}{n:03d}.txt", bytes([65 + n]) * 300) for n in range(8)]
"""Each with an extended header (a block), its payload (a block) and a header (a block): 2,048 bytes a row."""


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
@pytest.mark.parametrize(
    ("source", "place", "num_damages"),
    [
        (0, 3 * 2048 + 1024, 1),  # two extended headers of a kind before one member
        (1024, 3 * 2048, 2),  # names that end where their field ends, without an extension, as no sample's does
    ],
    ids=["an extended header for a member's", "a member's header for an extended one"],
)
def test_a_header_in_place_of_one_of_another_kind_loses_no_row_in_silence(
    write_tar: Callable[..., Path], format: int, source: int, place: int, num_damages: int
) -> None:
    """A misplaced write of one page."""
    path = write_tar("long.tar", LONG, format)
    data = bytearray(path.read_bytes())
    data[place : place + 512] = data[source : source + 512]
    path.write_bytes(data)
    index = index_of(path)
    assert [key[-3:] for key in keys(index)] == [f"{n:03d}" for n in range(8) if n != 3]
    assert [damage.kind for damage in index.damage] == [BAD_HEADER] * num_damages
    assert all(damage.rows_lost == 1 for damage in index.damage)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_file_of_no_sample_whose_name_fills_its_field_is_no_damage(
    write_tar: Callable[..., Path], format: int
) -> None:
    """Catches a check for names that were cut off at 100 bytes that takes every such name for one."""
    name = "a" * 50 + "/" + "README".rjust(49, "b")
    assert len(name) == 100
    index = index_of(write_tar("readme.tar", [("000.txt", b"x"), (name, b"about"), ("001.txt", b"y")], format))
    assert (index.num_rows, index.damage) == (2, ())


def test_a_lost_extended_header_is_noticed_where_all_names_differ_early(write_tar: Callable[..., Path]) -> None:
    """Two blocks are missing: what is left of the name ends where its field does."""
    rows = [(f"{n:03d}{'folder/' * 15}x.txt", bytes([65 + n]) * 300) for n in range(8)]
    path = write_tar("long.tar", rows, tarfile.PAX_FORMAT)
    data = path.read_bytes()
    path.write_bytes(data[: 3 * 2048] + data[3 * 2048 + 1024 :] + bytes(1024))
    index = index_of(path)
    assert [key[:3] for key in keys(index)] == [f"{n:03d}" for n in range(8) if n != 3]
    assert [(damage.kind, damage.rows_lost) for damage in index.damage] == [(BAD_HEADER, 1)]


def test_bytes_that_move_from_one_member_to_the_next_are_another_content(write_tar: Callable[..., Path]) -> None:
    """A state of the one shard must not be taken for one of the other."""
    checksums = {
        index_of(write_tar("a.tar", [("0.label", b"123"[:cut]), ("0.page", b"123"[cut:])])).checksum for cut in (1, 2)
    }
    assert len(checksums) == 2


def test_many_small_members_with_pax_headers_are_one_row(tmp_path: Path) -> None:
    """Extended headers take most of the file; they are no files between the members of the row."""
    path = tmp_path / "small.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member in range(1200):
            info = tarfile.TarInfo(f"row.{member:04d}")
            info.size = 1
            info.pax_headers = {"mtime": "1700000000.25"}
            tar.addfile(info, io.BytesIO(b"x"))
    index = index_of(path)
    assert (index.num_rows, index.num_members, index.damage) == (1, 1200, ())


def test_global_pax_headers_folders_and_files_without_extension_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "mixed.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "path=size=ü"}) as tar:
        folder = tarfile.TarInfo("folder.d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("README", "__meta__/info.txt", "folder.d/.hidden", "folder.d/a.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    assert [k for k in keys(index_of(path)) if k != "folder"] == ["folder.d/a"]


def test_sizes_in_base_256_are_understood(twenty: Path) -> None:
    """As GNU tar writes sizes of 8 GB and more."""
    data = bytearray(twenty.read_bytes())
    header = data[:512]
    header[124:136] = b"\x80" + (600).to_bytes(11, "big")
    header[148:156] = b"        "
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    data[:512] = header
    twenty.write_bytes(data)
    index = index_of(twenty)
    assert (index.num_rows, int(index.size[0]), index.damage) == (20, 600, ())


@pytest.mark.parametrize(("kind", "word"), [(tarfile.SYMTYPE, "symbolic link"), (tarfile.LNKTYPE, "hard link")])
def test_links_are_refused(tmp_path: Path, kind: bytes, word: str) -> None:
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.txt")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(ShardLayoutError, match=rf"a\.txt.*{word}"):
        index_of(path)


def test_a_key_that_comes_back_is_an_error_that_names_the_rows(write_tar: Callable[..., Path]) -> None:
    """webdataset delivers two halves of such a sample as two samples."""
    path = write_tar("mixed.tar", [("a.txt", b"1"), ("b.txt", b"2"), ("a.json", b"3")])
    with pytest.raises(ShardLayoutError, match=r"rows 0 and 2 both have the key 'a'"):
        index_of(path)


def test_one_extension_twice_in_a_row_is_an_error(write_tar: Callable[..., Path]) -> None:
    path = write_tar("twice.tar", [("x.txt", b"0"), ("a.txt", b"1"), ("a.TXT", b"2")])
    with pytest.raises(ShardLayoutError, match=r"row 1 \(key 'a'\) has the extension 'txt' twice"):
        index_of(path)


def test_members_larger_than_the_read_buffer_have_the_right_checksum(write_tar: Callable[..., Path]) -> None:
    big = np.random.default_rng(0).bytes((9 << 20) + 123)
    path = write_tar("big.tar", [("a.txt", b"small"), ("b.bin", big), ("c.txt", b"small")])
    collection = ShardCollection.open({"source/a": str(path)}, progress=False)
    assert bytes(collection.read(0, 0, 1).members["bin"]) == big
    assert bytes(collection.read(0, 0, 2).members["txt"]) == b"small"


def test_the_index_of_a_large_shard_is_a_few_bytes_per_row(write_tar: Callable[..., Path]) -> None:
    path = write_tar("many.tar", [(f"{i:09d}.txt", b"x") for i in range(3000)])
    index = index_of(path)
    columns = (index.offset, index.size, index.extension, index.row_first, index.row_crc, index.keys, index.key_end)
    assert sum(column.nbytes for column in columns) / index.num_rows < 32


def test_a_stopped_scan_ends_at_once(twenty: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(ScanStopped):
        build_index(str(twenty), open_source(str(twenty)), twenty.stat().st_size, stop=stop)


def test_progress_adds_up_to_the_size_of_the_file(twenty: Path) -> None:
    seen: list[int] = []
    size = twenty.stat().st_size
    build_index(str(twenty), open_source(str(twenty)), size, advance=seen.append)
    assert sum(seen) == size
