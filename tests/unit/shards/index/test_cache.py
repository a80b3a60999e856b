"""The index cache: a shard is read through once, and never trusted beyond its version."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dmagent_loader.errors import ConfigurationError, DamagedShardError, ShardNotFoundError
from dmagent_loader.shards import ShardCollection
from dmagent_loader.shards.index import cache, catalogue, entry_file
from dmagent_loader.shards.index.cache import IndexCache
from dmagent_loader.shards.index.shard_index import build_index
from dmagent_loader.shards.index.sharing import cache_groups
from dmagent_loader.shards.sources.local import ShardVersion, open_source, shard_version


def open_one(path: Path, **settings: object) -> ShardCollection:
    return ShardCollection.open({"source/a": str(path)}, progress=False, **settings)  # type: ignore[arg-type]


def test_the_overview_of_a_shard_in_a_chain_is_the_same_beside_a_signed_one(tmp_path: Path) -> None:
    """Its name must stay that of earlier versions, or all indexes are looked up one by one."""
    signed, chain = "https://host/a.tar?X-Amz-Signature=f", "simplecache::s3://bucket/a.tar"
    found = IndexCache(tmp_path)._overview([signed, chain])
    assert found == IndexCache(tmp_path)._overview(["https://host/a.tar", chain])


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "index").glob("*"))


def test_the_second_open_does_not_read_the_shard(twenty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_one(twenty)
    monkeypatch.setattr(cache, "open_source", lambda _: pytest.fail("opened"))
    assert open_one(twenty).fingerprint == first.fingerprint


@pytest.mark.parametrize("row", [0, 6, 19])
def test_a_row_that_changed_behind_the_cache_is_found(twenty: Path, row: int) -> None:
    """Same size and time. A few rows are compared when the shards are opened, every row when it is read."""
    first = open_one(twenty)
    status, data = twenty.stat(), bytearray(twenty.read_bytes())
    data[row * 1536 + 600] ^= 1
    twenty.write_bytes(data)
    os.utime(twenty, ns=(status.st_atime_ns, status.st_mtime_ns))
    if row in (0, 19):
        with pytest.raises(DamagedShardError, match="lacks rows that it had since it was indexed"):
            open_one(twenty)
        assert open_one(twenty, on_damage="skip").num_rows.tolist() == [19]
        return
    second = open_one(twenty)
    assert second.fingerprint == first.fingerprint
    with pytest.raises(DamagedShardError, match="changed since it was indexed"):
        second.read(0, 0, row)


def test_a_replaced_shard_is_indexed_again_and_takes_the_same_entry(
    twenty: Path, write_tar: Callable[..., Path], tmp_path: Path
) -> None:
    open_one(twenty)
    before = entries(tmp_path)
    write_tar("twenty.tar", [(f"{i}.txt", b"x") for i in range(3)])
    assert open_one(twenty).num_rows.tolist() == [3]
    assert entries(tmp_path) == before


def test_a_shard_of_the_same_size_but_another_time_is_indexed_again(twenty: Path) -> None:
    first = open_one(twenty)
    data = bytearray(twenty.read_bytes())
    data[700] ^= 1
    status = twenty.stat()
    twenty.write_bytes(data)
    os.utime(twenty, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    second = open_one(twenty)
    assert second.fingerprint != first.fingerprint
    second.read(0, 0, 0)


@pytest.mark.parametrize("where", ["empty", "header", "columns", "text"])
def test_a_damaged_entry_is_built_again(
    twenty: Path, tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a cache without a checksum: one flipped bit in the columns moves rows."""
    first = open_one(twenty)
    (entry,) = entries(tmp_path)
    data = bytearray(entry.read_bytes())
    if where == "empty":
        data = bytearray()
    elif where == "text":
        data = bytearray(b"not an index")
    else:
        data[4 if where == "header" else len(data) - 9] ^= 0x10
    entry.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        second = open_one(twenty)
        assert bytes(second.read(0, 0, 19).members["txt"]) == b"T" * 619
    assert "building it again" in caplog.text
    assert second.fingerprint == first.fingerprint
    assert IndexCache(tmp_path / "cache").load(str(twenty), shard_version(str(twenty)), None) is not None


def test_damage_is_remembered(twenty: Path) -> None:
    """Catches a cache that keeps the rows and forgets why they are few."""
    twenty.write_bytes(twenty.read_bytes()[: 6 * 1536])
    first = open_one(twenty, on_damage="skip")
    second = open_one(twenty, on_damage="skip")
    assert second.damage == first.damage != ()
    with pytest.raises(DamagedShardError):
        open_one(twenty)


def test_a_cache_that_cannot_be_written_only_warns(
    twenty: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert open_one(twenty, cache_dir=tmp_path / "file").num_rows.tolist() == [20]
    assert "cannot be written" in caplog.text
    assert "DMAGENT_CACHE_DIR" in caplog.text


def test_nothing_half_written_and_no_lock_is_left(twenty: Path, tmp_path: Path) -> None:
    open_one(twenty)
    assert [path.suffix for path in entries(tmp_path)] == [".safetensors"]


def test_files_of_killed_ranks_are_removed_from_the_folder_and_no_others(twenty: Path, tmp_path: Path) -> None:
    """By them ranks find out that they share the folder, which may hold other things: it is the user's choice."""

    class KilledAtTheSecond:
        rank, size, stop = 1, 2, threading.Event()
        meetings = 0

        def gather(self, value: object) -> list[object]:
            self.meetings += 1
            if self.meetings == 2:
                kept.update((path.name, path.read_bytes()) for path in folder.iterdir())
                raise KeyboardInterrupt
            return ["0123456789abcdef" * 2, None]

    folder, kept = tmp_path / "cache", {}
    with pytest.raises(KeyboardInterrupt):
        cache_groups(KilledAtTheSecond(), folder)
    assert len(kept) == 2
    others = [".download.partial", ".0123.partial", "a.partial"]
    for name, data in {**kept, **dict.fromkeys(others, b"other")}.items():
        (folder / name).write_bytes(data)
        os.utime(folder / name, (0, 0))
    recent = "." + "f" * 32 + ".0.partial"
    (folder / recent).write_text("0")
    open_one(twenty)
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == sorted([*others, recent])


def test_an_entry_of_another_version_is_not_used(twenty: Path, tmp_path: Path) -> None:
    open_one(twenty)
    cache = IndexCache(tmp_path / "cache")
    version = shard_version(str(twenty))
    assert cache.load(str(twenty), version, None) is not None
    assert cache.load(str(twenty), ShardVersion(size=version.size + 1, tag=version.tag), None) is None
    twenty.write_bytes(twenty.read_bytes().replace(b"A" * 600, b"Z" * 600))
    assert cache.load(str(twenty), shard_version(str(twenty)), None) is None


def overviews(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "overview").glob("*"))


@pytest.fixture
def many(write_tar: Callable[..., Path], tmp_path: Path) -> list[Path]:
    """Shards of one to three rows, more than one thread looks up at once."""
    return [write_tar(f"many/{n:03d}.tar", [(f"{i}.txt", b"%d" % n) for i in range(1 + n % 3)]) for n in range(40)]


def open_many(paths: list[Path], **settings: object) -> ShardCollection:
    return ShardCollection.open({"source/a": paths}, progress=False, **settings)  # type: ignore[arg-type]


def test_a_start_needs_no_index_of_shards_that_are_known(many: list[Path], tmp_path: Path) -> None:
    """Without the overview, a million shards take ten minutes to open again. Reading a row builds its index anew."""
    first = open_many(many)
    for entry in entries(tmp_path):
        entry.unlink()
    second = open_many(many)
    assert entries(tmp_path) == []
    assert second.fingerprint == first.fingerprint
    assert second.shard_rows(0).tolist() == [1 + n % 3 for n in range(40)]
    assert bytes(second.read(0, 38, 1).members["txt"]) == b"38"
    assert len(entries(tmp_path)) == 1


def test_an_overview_of_several_parts_knows_all_shards(
    many: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that end within a task, and a list that grows: only the last part is written again."""
    monkeypatch.setattr(catalogue, "SHARDS_OF_OVERVIEW", 18)
    before = open_many(many[:30]).fingerprint
    assert len(overviews(tmp_path)) == 2
    whole = open_many(many)
    assert len(overviews(tmp_path)) == 4
    for entry in entries(tmp_path):
        entry.unlink()
    assert open_many(many).fingerprint == whole.fingerprint
    assert open_many(many[:30]).fingerprint == before
    assert entries(tmp_path) == []


def test_a_shard_that_was_replaced_is_not_taken_from_the_overview(many: list[Path]) -> None:
    first = open_many(many)
    status = many[7].stat()
    many[7].write_bytes(many[8].read_bytes())
    os.utime(many[7], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    for _ in range(2):
        second = open_many(many)
        assert second.fingerprint != first.fingerprint
        assert second.shard_rows(0).tolist()[6:9] == [1, 3, 3]
        assert bytes(second.read(0, 7, 2).members["txt"]) == b"8"


def test_a_shard_that_is_gone_is_missed(many: list[Path]) -> None:
    open_many(many)
    many[3].unlink()
    with pytest.raises(ShardNotFoundError, match=r"no shard matches .*003\.tar"):
        open_many(many)


def test_damage_does_not_hide_in_an_overview(many: list[Path]) -> None:
    many[5].write_bytes(many[5].read_bytes()[:1024])
    found = open_many(many, on_damage="skip").damage
    assert len(found) == 1
    assert open_many(many, on_damage="skip").damage == found
    with pytest.raises(DamagedShardError, match=r"005\.tar"):
        open_many(many)


@pytest.mark.parametrize("where", ["empty", "header", "columns", "text"])
def test_a_damaged_overview_is_made_again(
    many: list[Path], tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = open_many(many)
    (overview,) = overviews(tmp_path)
    data = bytearray(overview.read_bytes())
    if where in ("empty", "text"):
        data = bytearray(b"" if where == "empty" else b"not an overview")
    else:
        data[4 if where == "header" else len(data) - 9] ^= 0x10
    overview.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert open_many(many).fingerprint == first.fingerprint
    assert "overview" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert open_many(many).fingerprint == first.fingerprint
    assert caplog.text == ""


def test_what_the_manifest_says_counts_for_known_shards_too(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    """A manifest that comes, is corrected or goes after the first start: the overview is not older than it."""
    path = write_tar("out/source/a/a-000000.tar", [(f"{i}.txt", b"x") for i in range(5)])
    open_many([path])
    manifest = tmp_path / "out" / "manifest.json"
    record = {"path": "source/a/a-000000.tar", "rows": 6, "bytes": path.stat().st_size, "sha256": "0" * 64}
    manifest.write_text(json.dumps({"schema": 1, "domains": {"source/a": {"shards": [record]}}}))
    with pytest.raises(DamagedShardError, match="1 rows lost, by the manifest"):
        open_many([path])
    manifest.unlink()
    assert open_many([path]).num_rows.tolist() == [5]


THE_SAME_TIME = 1_600_000_000_000_000_000


@pytest.fixture
def write_old(write_tar: Callable[..., Path]) -> Callable[..., Path]:
    """Shards that all have one modification time, as archives and `rsync -t` give them."""

    def write(name: str, texts: list[bytes], **settings: int) -> Path:
        path = write_tar(name, [(f"{n}.txt", text) for n, text in enumerate(texts)], **settings)
        os.utime(path, ns=(THE_SAME_TIME, THE_SAME_TIME))
        return path

    return write


def texts(collection: ShardCollection) -> list[bytes]:
    return [
        bytes(collection.read(0, shard, row).members["txt"])
        for shard, rows in enumerate(collection.shard_rows(0))
        for row in range(int(rows))
    ]


@pytest.mark.parametrize("first", [[], [b"1"] * 5])
def test_a_link_that_leads_to_another_file_is_not_taken_from_the_overview(
    write_old: Callable[..., Path], tmp_path: Path, first: list[bytes]
) -> None:
    """`current` names another version of the data: same names, sizes and times."""
    beside = write_old("beside.tar", [b"beside"])
    write_old("v1/a.tar", first)
    write_old("v2/a.tar", [b"2"] * 7)
    current = tmp_path / "current"
    current.symlink_to("v1")
    assert texts(open_many([current / "a.tar", beside])) == [*first, b"beside"]
    current.unlink()
    current.symlink_to("v2")
    for _ in range(2):
        assert texts(open_many([current / "a.tar", beside])) == [*[b"2"] * 7, b"beside"]


def test_what_is_above_two_dots_depends_on_links(write_old: Callable[..., Path], tmp_path: Path) -> None:
    near = write_old("a.tar", [b"1"] * 5)
    write_old("far/a.tar", [b"2"] * 7)
    (tmp_path / "far" / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "folder")
    assert texts(open_many([near])) == [b"1"] * 5
    assert texts(open_many([tmp_path / "link" / ".." / "a.tar"])) == [b"2"] * 7


def test_an_earlier_version_that_comes_back_with_its_time_is_read_where_its_rows_are(
    write_old: Callable[..., Path],
) -> None:
    """The same rows lie elsewhere in the version that another list has indexed meanwhile."""
    rows = [b"%d" % n * 600 for n in range(5)]
    path, beside = write_old("a.tar", rows), write_old("beside.tar", [b"beside"])
    before = path.read_bytes()
    open_many([path, beside])
    path.write_bytes(write_pax(rows))
    assert texts(open_many([path])) == rows
    path.write_bytes(before)
    os.utime(path, ns=(THE_SAME_TIME, THE_SAME_TIME))
    assert texts(open_many([path, beside], verify=False)) == [*rows, b"beside"]


def write_pax(rows: list[bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number, data in enumerate(rows):
            info = tarfile.TarInfo(f"{number}.txt")
            info.size, info.pax_headers = len(data), {"comment": "moves what follows"}
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def test_a_damaged_file_that_comes_back_with_the_time_of_a_whole_one_is_found(
    write_old: Callable[..., Path],
) -> None:
    path, beside = write_old("a.tar", [b"1"] * 5), write_old("beside.tar", [b"beside"])
    whole = path.read_bytes()
    open_many([path, beside])
    path.write_bytes(whole[:2048] + bytes(512) + whole[2560:])
    os.utime(path, ns=(THE_SAME_TIME + 1, THE_SAME_TIME + 1))
    assert len(open_many([path], on_damage="skip").damage) == 1
    os.utime(path, ns=(THE_SAME_TIME, THE_SAME_TIME))
    for _ in range(2):
        with pytest.raises(DamagedShardError, match="header zeroed"):
            open_many([path, beside])


@pytest.mark.parametrize("start", [2000, 2200], ids=["in a header", "in a payload"])
def test_a_shard_that_lost_a_row_s_bytes_but_not_its_time_is_found(write_old: Callable[..., Path], start: int) -> None:
    """What is left is a whole tar, with a row that is made of two: nothing else tells that one is gone."""
    rows = [b"%d" % n * 600 for n in range(5)]
    path, beside = write_old("a.tar", rows), write_old("beside.tar", [b"beside"])
    whole = path.read_bytes()
    open_many([path, beside])
    path.write_bytes(whole[:start] + whole[start + 512 + 1024 :])
    os.utime(path, ns=(THE_SAME_TIME, THE_SAME_TIME))
    for _ in range(2):
        with pytest.raises(
            DamagedShardError, match=r"lost 1536 bytes.*3 of its rows readable, 2 lost.*remove its cached"
        ):
            open_many([path, beside])
    skipping = open_many([path, beside], on_damage="skip")
    assert texts(skipping) == [rows[0], *rows[3:], b"beside"]
    assert skipping.damage[0].rows_lost == 2
    path.write_bytes(whole)
    os.utime(path, ns=(THE_SAME_TIME, THE_SAME_TIME))
    assert texts(open_many([path, beside])) == [*rows, b"beside"]


@pytest.mark.parametrize("time", [THE_SAME_TIME + 1, 10**9])
def test_a_shard_that_was_replaced_by_a_smaller_one_is_no_damage(write_old: Callable[..., Path], time: int) -> None:
    """With another time; and where files have none, as in a read-only image."""
    path, beside = write_old("a.tar", [b"1" * 600] * 5), write_old("beside.tar", [b"beside"])
    os.utime(path, ns=(time, time))
    open_many([path, beside])
    whole = path.read_bytes()
    path.write_bytes(whole[1536:])
    later = time if time == 10**9 else time + 1
    os.utime(path, ns=(later, later))
    assert texts(open_many([path, beside])) == [b"1" * 600] * 4 + [b"beside"]


def test_rows_that_take_the_place_of_padding_are_found_whatever_the_time(write_old: Callable[..., Path]) -> None:
    """The size is that of before."""
    path = write_old("a.tar", [b"1"] * 3)
    size = path.stat().st_size
    assert open_many([path]).num_rows.tolist() == [3]
    assert write_old("a.tar", [b"1"] * 5).stat().st_size == size
    assert open_many([path]).num_rows.tolist() == [5]


def test_other_rights_do_not_make_a_shard_to_be_read_through_again(
    many: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do they cost the overview more than once."""
    first = open_many(many)
    for path in many:
        path.chmod(0o600)
    monkeypatch.setattr("dmagent_loader.shards.index.cache.build_index", lambda *_, **__: pytest.fail("read through"))
    assert open_many(many).fingerprint == first.fingerprint
    monkeypatch.setattr(IndexCache, "load", lambda *_: pytest.fail("not in the overview"))
    assert open_many(many).fingerprint == first.fingerprint


def test_relative_paths_mean_the_same_after_the_working_folder_was_changed(
    many: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    collection = open_many([path.relative_to(tmp_path) for path in many], cache_dir="own")
    monkeypatch.chdir(many[0].parent)
    assert texts(collection)[-1] == b"39"
    assert not (many[0].parent / "own").exists()
    assert len(list((tmp_path / "own" / "index").iterdir())) == len(many)


PINNED = ("6", "0a79eea237ca57ee342571878f8a944d5401fdd7824b3d3256a0e9fd18ddd070")


def test_the_format_is_raised_when_shards_are_indexed_otherwise(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    """Ranks with older indexes in their caches would refuse the others, for the same shards.

    Where this fails: raise `FORMAT`, and write down both.
    """
    rows = [(f"{n}.{end}", b"%d" % n * 700) for n in range(9) for end in ("cls", "txt")]
    digest = hashlib.sha256()
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        others = [("long/" * 30 + "z.txt", b"x"), ("a/.hidden", b"y"), ("no extension", b"y")]
        path = write_tar("shard.tar", [*rows, *others], format=format)
        data = path.read_bytes()
        damaged = [data[: 9 * 1024], data[:4608], data[:4096] + bytes(512) + data[4608:], data[:3072] + data[4608:]]
        damaged.append(data[:1124] + b"x" * 700 + data[1824:])
        for number, content in enumerate((data, *damaged)):
            path = tmp_path / f"{number}.tar"
            path.write_bytes(content)
            index = build_index("shard.tar", open_source(str(path)), len(content), with_sha256=True)
            facts = (index.checksum, index.offset.tolist(), index.damage, index.hidden, index.sha256)
            digest.update(repr(facts).encode())
    assert (entry_file.FORMAT, digest.hexdigest()) == PINNED


def test_links_to_one_file_are_noticed_wherever_the_link_is(many: list[Path], tmp_path: Path) -> None:
    (tmp_path / "link.tar").symlink_to(many[0])
    (tmp_path / "folder").symlink_to(many[0].parent)
    for link in (tmp_path / "link.tar", tmp_path / "folder" / many[0].name, many[0].parent / ".." / "many" / "000.tar"):
        with pytest.raises(ConfigurationError, match="twice"):
            open_many([many[0], link])


@pytest.mark.parametrize("times", [(THE_SAME_TIME, THE_SAME_TIME + 5), (THE_SAME_TIME, THE_SAME_TIME)])
def test_nodes_that_share_a_cache_but_not_their_disks_index_once_each(
    tmp_path: Path, write_tar: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, times: tuple[int, int]
) -> None:
    """Copies with other times replaced each other's indexes, so that every start read all shards through."""
    for node, time in enumerate(times):
        for shard in range(3):
            path = write_tar(f"node{node}/{shard}.tar", [(f"{row}.txt", b"%d" % shard * 700) for row in range(9)])
            os.utime(path, ns=(time, time))
    data = tmp_path / "data"

    def opened(node: int) -> str:
        """As the node sees it: the paths are the same on all of them, and the files its own."""
        (tmp_path / f"node{node}").rename(data)
        fingerprint = open_many([data / f"{shard}.tar" for shard in range(3)]).fingerprint
        data.rename(tmp_path / f"node{node}")
        return fingerprint

    fingerprints = {opened(node) for node in (0, 1)}
    monkeypatch.setattr(cache, "build_index", lambda *_, **__: pytest.fail("read through again"))
    monkeypatch.setattr(IndexCache, "load", lambda *_: pytest.fail("not in the overview"))
    fingerprints |= {opened(node) for node in (0, 1, 0, 1)}
    assert len(fingerprints) == 1


def test_a_replaced_copy_forgets_the_times_of_the_others(write_old: Callable[..., Path]) -> None:
    """Else the old file, come back with its time, would be read with the index of the new one."""
    path = write_old("a.tar", [b"1" * 600] * 5)
    os.utime(path, ns=(THE_SAME_TIME + 1, THE_SAME_TIME + 1))
    open_many([path])
    os.utime(path, ns=(THE_SAME_TIME + 2, THE_SAME_TIME + 2))
    open_many([path])
    before = path.read_bytes()
    write_old("a.tar", [b"1" * 600] * 4 + [b"2" * 600])
    assert texts(open_many([path]))[-1] == b"2" * 600
    path.write_bytes(before)
    for time in (1, 2):
        os.utime(path, ns=(THE_SAME_TIME + time, THE_SAME_TIME + time))
        assert texts(open_many([path]))[-1] == b"1" * 600


@pytest.mark.parametrize("new", [[b"2" * 600] * 5, [b"2" * 1500] * 5, [b"1" * 600] * 4])
def test_a_new_version_at_the_same_time_is_refused_with_a_remedy_that_works(
    write_old: Callable[..., Path], new: list[bytes]
) -> None:
    """As in an image whose files all have one time, where nothing can be touched: the same size, or another one."""
    path, beside = write_old("a.tar", [b"1" * 600] * 5), write_old("beside.tar", [b"beside"])
    open_many([path, beside])
    write_old("a.tar", new)
    with pytest.raises(DamagedShardError) as error:
        open_many([path, beside])
    Path(re.findall(r"remove its cached index (\S+) and open", str(error.value))[0]).unlink()
    assert texts(open_many([path, beside])) == [*new, b"beside"]


def test_the_remedy_for_a_row_that_changed_works(write_old: Callable[..., Path]) -> None:
    rows = [b"%d" % n * 600 for n in range(40)]
    path, beside = write_old("a.tar", rows), write_old("beside.tar", [b"beside"])
    open_many([path, beside])
    rows[3] = b"x" * len(rows[3])
    write_old("a.tar", rows)
    with pytest.raises(DamagedShardError) as error:
        texts(open_many([path, beside]))
    Path(re.findall(r"remove its cached index (\S+) and open", str(error.value))[0]).unlink()
    assert texts(open_many([path, beside])) == [*rows, b"beside"]


def test_files_without_a_time_are_compared_at_every_start(write_old: Callable[..., Path]) -> None:
    """In an image, another version may differ from the first in nothing but its bytes: no inode, no change time."""
    path = write_old("a.tar", [b"1" * 600] * 5)
    for content in (b"1", b"2"):
        write_old("a.tar", [content * 600] * 5)
        os.utime(path, ns=(10**9, 10**9))
        assert not shard_version(str(path)).is_sure
        assert texts(open_many([path])) == [content * 600] * 5


def test_without_a_home_there_is_a_warning_and_no_cache(
    twenty: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """As in a container that runs under a number without a passwd entry."""

    def no_entry(_: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.delenv("DMAGENT_CACHE_DIR")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    monkeypatch.setattr(cache, "_warned", set())
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert open_one(twenty).num_rows.tolist() == [20]
    assert sum("no home folder for the index cache" in record.getMessage() for record in caplog.records) == 1
    assert "DMAGENT_CACHE_DIR" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["twenty.tar"]
