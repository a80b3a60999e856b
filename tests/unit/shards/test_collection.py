"""Reading by position: threads, processes, pickles, bounds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from shard_fixtures import WriteTar, read_and_check

from dmagent_loader.errors import ConfigurationError, DamagedShardError, EmptyShardError, ShardNotFoundError
from dmagent_loader.shards import ShardCollection
from dmagent_loader.shards.index.threads import in_threads


def test_shapes_and_order_follow_the_mapping(hundred: dict[str, list[str]]) -> None:
    collection = ShardCollection.open(hundred, progress=False)
    assert collection.domains == tuple(hundred)
    assert collection.num_rows.tolist() == [70] * 10
    assert collection.shard_rows(3).tolist() == [7] * 10


def test_many_threads_read_the_right_rows_with_few_open_files(hundred: dict[str, list[str]]) -> None:
    """With 3 open files for 100 shards, files are closed while others read: catches a descriptor that is closed under a
    reading thread and given to another file."""
    collection = ShardCollection.open(hundred, progress=False, max_open_files=3)
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda seed: read_and_check(collection, seed), range(8))) == 4000


def open_files(folder: Path) -> int:
    """Open files of this process below a folder; threads of other tests open and close others."""
    count = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"{folder}/")
    return count


def test_open_files_are_bounded(hundred: dict[str, list[str]], tmp_path: Path) -> None:
    folder = tmp_path / "copies"
    folder.mkdir()
    copies = {name: [shutil.copy(path, folder) for path in paths] for name, paths in hundred.items()}
    collection = ShardCollection.open(copies, progress=False, max_open_files=16)
    assert open_files(folder) == 0
    read_and_check(collection, 0, 2000)
    assert open_files(folder) == 16
    collection.close()
    assert open_files(folder) == 0
    read_and_check(collection, 1, 10)


def test_a_pickle_reads_the_same_and_holds_no_files(hundred: dict[str, list[str]]) -> None:
    collection = ShardCollection.open(hundred, progress=False)
    read_and_check(collection, 0)
    copy = pickle.loads(pickle.dumps(collection))
    assert copy.fingerprint == collection.fingerprint
    read_and_check(copy, 1)


def test_fingerprint_ignores_folders_and_sees_everything_else(write_tar: WriteTar, tmp_path: Path) -> None:
    a = write_tar("one/a.tar", [("1.txt", b"x"), ("2.txt", b"y")])
    b = write_tar("one/b.tar", [("1.txt", b"z")])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    renamed = Path(shutil.copy(a, tmp_path / "c.tar"))
    changed = write_tar("three/a.tar", [("1.txt", b"x"), ("2.txt", b"Y")])
    rekeyed = write_tar("four/a.tar", [("1.txt", b"x"), ("3.txt", b"y")])

    def fingerprint(shards: dict[str, list[Path]]) -> str:
        return ShardCollection.open(shards, progress=False).fingerprint

    base = fingerprint({"source/a": [a, b]})
    assert fingerprint({"source/a": [tmp_path / "two/a.tar", tmp_path / "two/b.tar"]}) == base
    others = [
        fingerprint({"source/b": [a, b]}),
        fingerprint({"source/a": [b, a]}),
        fingerprint({"source/a": [a]}),
        fingerprint({"source/a": [renamed, b]}),
        fingerprint({"source/a": [changed, b]}),
        fingerprint({"source/a": [rekeyed, b]}),
    ]
    assert len({base, *others}) == 7


@pytest.mark.parametrize("at_a_time", [1024, 2])
def test_fingerprint_is_that_of_saved_states(
    write_tar: WriteTar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_a_time: int
) -> None:
    """Catches another spelling of the same facts, with which no run could be resumed."""
    monkeypatch.setattr("dmagent_loader.shards.index.catalogue.SHARDS_OF_OVERVIEW", at_a_time)
    names = ["a.tar", 'a "b".tar', "ä 1.tar", os.fsdecode(b"\xff.tar"), "e.tar"]
    paths = [write_tar(name, [(f"{number}.txt", name.encode(errors="replace"))]) for number, name in enumerate(names)]
    shards = {"source/ä": paths[:4], "target/b": [f"file://{tmp_path}/e.tar"]}
    collection = ShardCollection.open(shards, progress=False)
    digest = hashlib.sha256()
    for number, name in enumerate(names):
        if number in (0, 4):
            digest.update(json.dumps(list(shards)[number > 0]).encode())
        digest.update(json.dumps([name, 1, collection._catalogue.index(number).checksum]).encode())
    assert collection.fingerprint == digest.hexdigest()


def test_rotten_bytes_are_found_when_read(twenty: Path) -> None:
    collection = ShardCollection.open({"source/a": str(twenty)}, progress=False)
    data = bytearray(twenty.read_bytes())
    data[6 * 1536 + 700] ^= 1
    status = twenty.stat()
    twenty.write_bytes(data)
    os.utime(twenty, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a disk that fails leaves them
    collection.read(0, 0, 5)
    with pytest.raises(DamagedShardError, match=r"row 6 \(key '006'\).*twenty\.tar.*changed since it was indexed"):
        collection.read(0, 0, 6)
    unchecked = pickle.loads(pickle.dumps(collection))
    unchecked._verify = False
    unchecked.read(0, 0, 6)


def test_a_shard_that_was_cut_after_indexing_is_an_error_not_a_crash(twenty: Path) -> None:
    """Under a memory map this is SIGBUS."""
    collection = ShardCollection.open({"source/a": str(twenty)}, progress=False)
    collection.read(0, 0, 10)
    os.truncate(twenty, 6 * 1536 + 700)
    with pytest.raises(DamagedShardError, match="changed since it was indexed"):
        collection.read(0, 0, 6)


def test_a_shard_that_is_gone_is_named(twenty: Path) -> None:
    collection = ShardCollection.open({"source/a": str(twenty)}, progress=False)
    twenty.unlink()
    with pytest.raises(ShardNotFoundError, match=r"twenty\.tar"):
        collection.read(0, 0, 0)


@pytest.mark.parametrize("row", [-1, 20])
def test_rows_outside_the_shard_are_refused(twenty: Path, row: int) -> None:
    """Row -1 would silently be the last one."""
    with pytest.raises(IndexError, match="20 rows"):
        ShardCollection.open({"source/a": str(twenty)}, progress=False).read(0, 0, row)


def test_a_domain_without_rows_is_an_error_and_an_empty_shard_a_warning(
    twenty: Path, write_tar: WriteTar, caplog: pytest.LogCaptureFixture
) -> None:
    empty = write_tar("empty.tar", [])
    nameless = write_tar("nameless.tar", [("README", b"x")])
    with pytest.raises(EmptyShardError, match=r"'source/b' has no rows.*empty\.tar"):
        ShardCollection.open({"source/a": twenty, "source/b": [empty, nameless]}, progress=False)
    with caplog.at_level(logging.WARNING):
        collection = ShardCollection.open({"source/a": [twenty, empty]}, progress=False)
    assert collection.shard_rows(0).tolist() == [20, 0]
    assert "1 of 2 shards hold no sample" in caplog.text


def test_settings_that_cannot_work_are_refused(twenty: Path) -> None:
    with pytest.raises(ConfigurationError, match="on_damage='ignore'"):
        ShardCollection.open({"source/a": twenty}, on_damage="ignore")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no domains"):
        ShardCollection.open({})


def test_a_thousand_domains_open_and_read(write_tar: WriteTar) -> None:
    shards = {f"source/{n}": write_tar(f"t{n}.tar", [("a.txt", str(n).encode())]) for n in range(1000)}
    collection = ShardCollection.open(shards, progress=False, max_open_files=64)
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    assert [int(bytes(collection.read(n, 0, 0).members["txt"])) for n in range(1000)] == list(range(1000))
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    assert threading.active_count() <= threads


def test_the_table_names_every_shard_and_its_damage(twenty: Path, pairs: Path) -> None:
    pairs.write_bytes(pairs.read_bytes()[: 12 * 1024])
    collection = ShardCollection.open({"source/a": twenty, "target/b": pairs}, on_damage="skip", progress=False)
    table = collection.describe()
    assert [line.split()[0] for line in table.splitlines()] == [
        "domain",
        "source/a",
        "twenty.tar",
        "target/b",
        "pairs.tar",
    ]
    assert "cut at a record boundary at byte 12288" in table.splitlines()[-1]
    assert [(s.domain, s.rows, s.members) for s in collection.summaries()] == [
        ("source/a", 20, 20),
        ("target/b", 6, 12),
    ]


def test_ctrl_c_in_one_thread_stops_the_others() -> None:
    """Catches a pool that indexes on for an hour after Ctrl-C."""
    stop = threading.Event()
    done = []

    def work(url: str) -> None:
        if url == "0":
            raise KeyboardInterrupt
        stop.wait(30)
        done.append(url)

    with pytest.raises(KeyboardInterrupt):
        list(in_threads(work, [str(n) for n in range(100)], stop))
    assert len(done) < 10


def test_indexes_that_do_not_fit_into_memory_are_read_again(
    hundred: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmagent_loader.shards.collection._MAX_TABLE_BYTES", 10_000)
    collection = ShardCollection.open(hundred, progress=False)
    read_and_check(collection, 0, 2000)
    assert len(collection._tables._entries) < 6
    copy = pickle.loads(pickle.dumps(collection))
    read_and_check(copy, 1)


def test_an_index_that_is_gone_is_built_again_but_not_of_other_rows(
    write_tar: WriteTar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that is cleaned while training goes on costs time; a shard that was replaced meanwhile is an error."""
    path = write_tar("a.tar", [("1.txt", b"one"), ("2.txt", b"two")])
    cache = tmp_path / "own-cache"
    collection = ShardCollection.open({"source/a": str(path)}, progress=False, cache_dir=cache)
    shutil.rmtree(cache)
    assert bytes(collection.read(0, 0, 1).members["txt"]) == b"two"
    collection = ShardCollection.open({"source/a": str(path)}, progress=False, cache_dir=cache)
    shutil.rmtree(cache)
    write_tar("a.tar", [("1.txt", b"one"), ("2.txt", b"TWO")])
    with pytest.raises(DamagedShardError, match=r"a\.tar was replaced since it was opened"):
        collection.read(0, 0, 0)


def test_an_index_that_cannot_be_cached_stays_in_memory(write_tar: WriteTar, tmp_path: Path) -> None:
    path = write_tar("a.tar", [("1.txt", b"one")])
    (tmp_path / "file").write_text("")
    collection = ShardCollection.open({"source/a": str(path)}, progress=False, cache_dir=tmp_path / "file" / "cache")
    assert bytes(pickle.loads(pickle.dumps(collection)).read(0, 0, 0).members["txt"]) == b"one"


def test_copies_of_a_shard_are_named_under_whatever_name_and_domain(
    write_tar: WriteTar, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows of the field to learn that are in the field to keep, too, would be weighed twice without a word."""
    first, other = write_tar("a.tar", [("0.txt", b"x")]), write_tar("b.tar", [("0.txt", b"y")])
    copy, empty, empty_too = (Path(f"{first.parent}/{name}") for name in ("c.tar", "d.tar", "e.tar"))
    shutil.copy(first, copy)
    for path in (empty, empty_too):
        write_tar(path.name, [])
    shards = {"source/web": [str(first), str(empty)], "target/math": [str(other), str(copy), str(empty_too)]}
    ShardCollection.open(shards, progress=False)
    (said,) = [record.getMessage() for record in caplog.records if "the same rows" in record.getMessage()]
    assert said.startswith("1 shard(s)")
    assert f"{copy} of 'target/math' and {first} of 'source/web'" in said


def test_json_lines_given_as_a_shard_are_sent_to_the_command_that_writes_shards(tmp_path: Path) -> None:
    path = tmp_path / "web.jsonl"
    path.write_text('{"text": "a"}\n' * 100)
    with pytest.raises(DamagedShardError, match=r"web\.jsonl is damaged at byte 0.*`dmagent shard` writes tar shards"):
        ShardCollection.open({"source/web": [str(path)]}, progress=False)
