"""The index cache: a shard is read through once, and never trusted beyond its version."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dmagent_loader.errors import ConfigurationError, DamagedShardError, ShardNotFoundError
from dmagent_loader.shards import ShardCollection, catalogue
from dmagent_loader.shards.cache import IndexCache, build_and_cache
from dmagent_loader.shards.reader import ShardVersion, shard_version


def open_one(path: Path, **settings: object) -> ShardCollection:
    return ShardCollection.open({"source/a": str(path)}, progress=False, **settings)  # type: ignore[arg-type]


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "index").glob("*"))


def test_the_second_open_does_not_read_the_shard(twenty: Path) -> None:
    """The bytes are replaced behind the cache's back (same size and time): only reading a row notices."""
    first = open_one(twenty)
    status = twenty.stat()
    twenty.write_bytes(bytes(status.st_size))
    os.utime(twenty, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = open_one(twenty)
    assert second.fingerprint == first.fingerprint
    with pytest.raises(DamagedShardError, match="changed since it was indexed"):
        second.read(0, 0, 0)


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
    assert IndexCache(tmp_path / "cache").load(str(twenty), shard_version(str(twenty))) is not None


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


def _index_and_count(path: str, cache: str, start: threading.Event, counts: multiprocessing.Queue[bool]) -> None:
    built = []
    original = IndexCache.save

    def save(self: IndexCache, *arguments: object) -> None:
        built.append(True)
        original(self, *arguments)  # type: ignore[arg-type]

    IndexCache.save = save  # type: ignore[method-assign, assignment]
    start.wait()
    build_and_cache(path, shard_version(path), IndexCache(Path(cache)), advance=lambda n: None, stop=threading.Event())
    counts.put(bool(built))


def test_processes_that_start_together_read_the_shard_once(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    """Catches eight ranks of a machine that all read a terabyte through."""
    path = write_tar("some.tar", [(f"{i}.txt", b"x" * 100) for i in range(2000)])
    context = multiprocessing.get_context("fork")
    start, counts = context.Event(), context.Queue()
    arguments = (str(path), str(tmp_path / "shared"), start, counts)
    workers = [context.Process(target=_index_and_count, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    start.set()
    built = [counts.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sum(built) == 1


def test_an_entry_of_another_version_is_not_used(twenty: Path, tmp_path: Path) -> None:
    open_one(twenty)
    cache = IndexCache(tmp_path / "cache")
    version = shard_version(str(twenty))
    assert cache.load(str(twenty), version) is not None
    assert cache.load(str(twenty), ShardVersion(size=version.size, tag="other")) is None
    assert cache.load(str(twenty), ShardVersion(size=version.size + 1, tag=version.tag)) is None


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


def test_links_to_one_file_are_noticed_wherever_the_link_is(many: list[Path], tmp_path: Path) -> None:
    (tmp_path / "link.tar").symlink_to(many[0])
    (tmp_path / "folder").symlink_to(many[0].parent)
    for link in (tmp_path / "link.tar", tmp_path / "folder" / many[0].name, many[0].parent / ".." / "many" / "000.tar"):
        with pytest.raises(ConfigurationError, match="twice"):
            open_many([many[0], link])
