"""Indexes in the store: written once, used by everybody, and never trusted beyond the shards they were made of."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from benchmarks.far_server import counts, serving
from dmagent_loader import AgentWeightedSampler, ReadingConfig
from dmagent_loader.cli import main
from dmagent_loader.errors import ConfigurationError, DamagedShardError
from dmagent_loader.shards import ShardCollection, ShardingConfig, load_manifest, shard_files
from dmagent_loader.shards.index.stored import StoredIndexes

pytest.importorskip("aiohttp", reason="fsspec needs aiohttp for http")

ROWS = 40


def text(shard: int, row: int) -> str:
    return f"{shard} {row} " * 50


def write_shards(folder: Path, number: int = 3, rows: int = ROWS) -> list[Path]:
    """Foreign shards: a tar of texts each."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"s-{shard:03d}.tar" for shard in range(number)]
    for shard, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for row in range(rows):
                data = text(shard, row).encode()
                info = tarfile.TarInfo(f"{row:03d}.txt")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return paths


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    """The folder ``store`` behind HTTP."""
    (tmp_path / "store").mkdir()
    with serving(tmp_path / "store", latency=0, rate=0) as url:
        yield url


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[], Path]:
    """A cache folder that does not exist yet, as on a new machine."""
    numbers = iter(range(100))
    return lambda: tmp_path / f"cache-{next(numbers)}"


def opened(shards: Any, cache: Path, **settings: Any) -> ShardCollection:
    listed = shards if isinstance(shards, dict) else {"source/a": shards}
    return ShardCollection.open(listed, cache_dir=cache, progress=False, **settings)


def sent(url: str) -> int:
    """Bytes of shards that the store has sent."""
    return int(counts(url)["bytes"].get("GET .tar", 0))


def all_texts(collection: ShardCollection, domain: int = 0) -> list[str]:
    return [
        str(collection.read(domain, shard, row).members["txt"], "utf-8")
        for shard, rows in enumerate(collection.shard_rows(domain))
        for row in range(int(rows))
    ]


def indexed(paths: list[Path], cache: Path, **settings: Any) -> ShardCollection:
    collection = opened([str(path) for path in paths], cache, **settings)
    collection.write_indexes()
    return collection


def test_written_shards_are_opened_without_reading_a_byte_of_them(tmp_path: Path, store: str, fresh: Any) -> None:
    """By every way to write them: at once, by more processes, and appended."""
    for name in ("a", "b"):
        lines = "".join(json.dumps({"text": f"{name} {n} " * 30}) + "\n" for n in range(100))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    config = ShardingConfig(rows_per_shard=20)
    shard_files({"source/a": [tmp_path / "a.jsonl"]}, tmp_path / "store", config, progress=False)
    shard_files(
        {"source/a": [tmp_path / "b.jsonl"]}, tmp_path / "store", config, append=True, workers=2, progress=False
    )
    manifest = load_manifest(f"{store}/manifest.json")
    collection = opened(manifest, fresh())
    assert sent(store) == 0
    read = opened(manifest, fresh(), indexes=False)
    assert sent(store) > 0
    assert collection.fingerprint == read.fingerprint
    assert collection.num_rows.tolist() == [200]
    before = sent(store)
    assert all_texts(collection) == all_texts(read)
    payload = sum(len(item) for item in all_texts(read))
    assert sent(store) - before == 3 * payload, "a shard was read through to index it"


def test_a_sampler_starts_from_indexes_in_the_store_and_resumes_without(store: str, tmp_path: Path, fresh: Any) -> None:
    indexed(write_shards(tmp_path / "store"), fresh())
    shards = {"source/a": f"{store}/s-{{000..002}}.tar"}
    samplers = [
        AgentWeightedSampler(
            shards,
            samples_per_reweight=100,
            reading=ReadingConfig(cache_dir=fresh(), progress=False, num_threads=0, indexes=indexes),
        )
        for indexes in (True, False)
    ]
    iterator = iter(samplers[0])
    keys = [next(iterator)["__key__"] for _ in range(20)]
    samplers[1].load_state_dict(samplers[0].state_dict(consumed=8))
    iterator = iter(samplers[1])
    assert [next(iterator)["__key__"] for _ in range(12)] == keys[8:]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> int:
    """Number of indexes, none of which is loaded from the store before that of all of them has begun."""
    count = 8
    met, load = threading.Barrier(count, timeout=60), StoredIndexes.load

    def load_together(self: StoredIndexes, *shard: Any) -> Any:
        met.wait()
        return load(self, *shard)

    monkeypatch.setattr(StoredIndexes, "load", load_together)
    return count


def test_a_start_fetches_the_indexes_of_its_shards_at_the_same_time(
    store: str, tmp_path: Path, fresh: Any, together: int
) -> None:
    """One after the other, a start whose first samples lie in many shards would wait for one request per shard."""
    indexed(write_shards(tmp_path / "store", together, rows=4), fresh())
    reading = ReadingConfig(cache_dir=fresh(), progress=False)
    urls = {"source/a": f"{store}/s-{{000..{together - 1:03d}}}.tar"}
    first_pass = islice(AgentWeightedSampler(urls, samples_per_reweight=1000, reading=reading), 4 * together)
    assert {sample["txt"] for sample in first_pass} == {
        text(shard, row) for shard in range(together) for row in range(4)
    }


def test_a_later_start_reads_its_indexes_from_the_cache_and_starts_no_thread_for_them(
    store: str, tmp_path: Path, fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 threads that contend for the interpreter take longer than the files of 32 indexes."""
    submit, submitted = ThreadPoolExecutor.submit, []

    def noted(self: Any, *call: Any, **settings: Any) -> Any:
        if self._thread_name_prefix == "dmagent-index" and isinstance(call[1], int):  # not the table of the folder
            submitted.append(call[1])
        return submit(self, *call, **settings)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", noted)
    indexed(write_shards(tmp_path / "store", 8, rows=4), fresh())
    reading = ReadingConfig(cache_dir=fresh(), progress=False)
    found = []
    for _ in ("first", "later"):
        submitted.clear()
        sampler = AgentWeightedSampler(
            {"source/a": f"{store}/s-{{000..007}}.tar"}, samples_per_reweight=1000, reading=reading
        )
        keys = [sample["__key__"] for sample in islice(sampler, 32)]
        found.append((keys, sorted(submitted)))
    assert found == [(found[0][0], list(range(8))), (found[0][0], [])]


def test_facts_about_all_shards_are_fetched_at_the_same_time(
    store: str, tmp_path: Path, fresh: Any, together: int
) -> None:
    """As `dmagent index` and `dmagent simulate --storage` need them."""
    indexed(write_shards(tmp_path / "store", together, rows=4), fresh())
    found = opened(f"{store}/s-{{000..{together - 1:03d}}}.tar", fresh()).summaries()
    assert [(shard.domain, shard.rows) for shard in found] == [("source/a", 4)] * together
    assert [shard.shard[-5:] for shard in found] == [f"{number}.tar" for number in range(together)]


def test_the_command_writes_them_for_foreign_shards_and_a_run_finds_them(
    tmp_path: Path, store: str, fresh: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DMAGENT_CACHE_DIR", str(fresh()))
    write_shards(tmp_path / "store")
    shards = f"{store}/s-{{000..002}}.tar"
    assert main(["index", shards, "--to", str(tmp_path / "indexes"), "--no-progress"]) == 0
    assert "wrote the indexes of 3 shard(s) to" in capsys.readouterr().out
    assert not list((tmp_path / "store").glob("*.index"))
    before = sent(store)
    collection = opened(shards, fresh(), indexes=tmp_path / "indexes")
    assert sent(store) == before
    assert all_texts(collection) == [text(shard, row) for shard in range(3) for row in range(ROWS)]
    with pytest.raises(SystemExit):
        main(["index", shards, "--to", "x", "--beside"])
    assert main(["index", shards, "--beside", "--no-progress"]) == 2, "HTTP cannot be written to"
    assert "cannot be written" in capsys.readouterr().err


def test_indexes_are_written_where_only_their_table_has_been_read(
    tmp_path: Path, store: str, fresh: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The shards were said to have changed, and their entries were removed from a table that had them."""
    indexed(write_shards(tmp_path / "store"), fresh())
    shards, indexes = f"{store}/s-{{000..002}}.tar", tmp_path / "indexes"
    assert opened(shards, fresh(), indexes=False).write_indexes(indexes) == 3
    cache = fresh()
    opened(shards, cache)
    assert opened(shards, cache, indexes=False).write_indexes(indexes) == 3
    [table] = indexes.rglob("shards.index")
    assert len(json.loads(table.read_bytes())["shards"]) == 3
    assert "has changed" not in caplog.text


def test_indexes_are_written_to_other_stores_and_beside_local_shards(
    tmp_path: Path, fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DMAGENT_CACHE_DIR", str(fresh()))
    paths = write_shards(tmp_path / "local")
    assert main(["index", str(tmp_path / "local"), "--to", "memory://indexes-of-test", "--no-progress"]) == 0
    stored = fsspec.filesystem("memory").find("/indexes-of-test")
    folder = f"/indexes-of-test{tmp_path}/local"
    assert stored == [f"{folder}/s-{n:03d}.tar.index" for n in range(3)] + [f"{folder}/shards.index"]
    # Local shards take them only where they are named.
    status = [path.stat() for path in paths]
    data = bytearray(paths[1].read_bytes())
    data[10 * 1024 : 10 * 1024 + 512] = bytes(512)
    paths[1].write_bytes(data)
    os.utime(paths[1], ns=(status[1].st_atime_ns, status[1].st_mtime_ns))
    with pytest.raises(DamagedShardError):
        opened(str(tmp_path / "local"), fresh())
    assert opened(str(tmp_path / "local"), fresh(), indexes="memory://indexes-of-test").num_rows.tolist() == [3 * ROWS]
    assert main(["index", str(tmp_path / "local"), "--beside", "--no-progress", "--cache-dir", str(fresh())]) == 1
    names = sorted(path.name for path in (tmp_path / "local").glob("*.index"))
    assert names == ["s-000.tar.index", "s-002.tar.index", "shards.index"], "a damaged shard gets no index"


@pytest.mark.parametrize(("fault", "is_lost"), [(ConnectionError("reset"), True), (PermissionError("denied"), False)])
def test_a_table_that_cannot_be_read_is_not_replaced_by_one_with_fewer_shards(
    tmp_path: Path,
    fresh: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: OSError,
    is_lost: bool,
) -> None:
    """A refusal is S3's answer where there is no table, to those who may not list the bucket."""
    monkeypatch.setattr("dmagent_loader.shards.sources.remote.REMOTE_BACKOFF_SECONDS", 0.001)
    paths, root = write_shards(tmp_path / "local"), f"memory://{tmp_path.name}"
    opened([str(path) for path in paths], fresh()).write_indexes(root)
    (table,) = fsspec.filesystem("memory").glob(f"/{tmp_path.name}/**/shards.index")
    before = fsspec.filesystem("memory").cat_file(table)
    second = opened(str(paths[1]), fresh())
    info = MemoryFileSystem.info

    def failing(self: MemoryFileSystem, path: str, **settings: Any) -> dict[str, Any]:
        if path == table:
            raise fault
        return info(self, path, **settings)

    monkeypatch.setattr(MemoryFileSystem, "info", failing)
    if is_lost:
        with pytest.raises(ConfigurationError, match="would lose its other shards"):
            second.write_indexes(root)
        assert fsspec.filesystem("memory").cat_file(table) == before
    else:
        assert second.write_indexes(root) == 1
    with caplog.at_level(logging.WARNING):
        assert opened([str(path) for path in paths], fresh(), indexes=root).num_rows.tolist() == [3 * ROWS]
    assert ("cannot be read: its shards are read through" in caplog.text) == is_lost


def test_shards_that_only_a_query_names_get_no_index(
    tmp_path: Path, store: str, fresh: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """All of them would have the same name."""
    for path in write_shards(tmp_path / "store", 2):
        path.rename(path.with_suffix(""))
    with caplog.at_level(logging.WARNING):
        collection = opened([f"{store}/s-00{number}?name=s-00{number}" for number in range(2)], fresh())
        assert collection.write_indexes(tmp_path / "indexes") == 0
    assert "2 shard(s) are named by the query" in caplog.text
    assert not (tmp_path / "indexes").exists()


class StoreWithListings(MemoryFileSystem):
    """Etags in listings and in answers about single files, as object stores give them; counts the latter."""

    protocol = "listing"
    asked: ClassVar[list[str]] = []

    def _with_etag(self, entry: dict[str, Any]) -> dict[str, Any]:
        etag = hashlib.md5(self.cat_file(entry["name"])).hexdigest() if entry["type"] == "file" else None
        return {**entry, "ETag": etag and f'"{etag}"'}

    def ls(self, path: str, detail: bool = True, **settings: Any) -> list[Any]:
        entries = super().ls(path, detail=True, **settings)
        return [self._with_etag(entry) if detail else entry["name"] for entry in entries]

    def info(self, path: str, **settings: Any) -> dict[str, Any]:
        self.asked.append(path)
        return self._with_etag(super().info(path, **settings))

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("listing://")))


fsspec.register_implementation("listing", StoreWithListings, clobber=True)


def test_a_listing_stands_for_requests_of_single_shards(
    tmp_path: Path, fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a listing says of a shard is what a request for it says: no shard is indexed twice."""
    monkeypatch.setattr("dmagent_loader.shards.index.cache._STORES_WITH_ETAGS_OF_MD5", ("listing",))  # as S3
    paths = write_shards(tmp_path / "local", 12)
    memory = fsspec.filesystem("listing")
    for path in paths:
        memory.pipe(f"/listed-of-test/{path.name}", path.read_bytes())
    cache, shards = fresh(), "listing://listed-of-test/s-{000..011}.tar"
    first = opened(shards, cache)
    memory.asked.clear()
    assert opened(shards, cache).fingerprint == first.fingerprint
    assert memory.asked == []
    moved = "listing://moved-of-test/s-{000..011}.tar"
    for path in paths:
        memory.pipe(f"/moved-of-test/{path.name}", path.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmagent_loader.shards.index.cache.build_index", lambda *_, **__: pytest.fail("indexed again"))
        assert opened(moved, cache).fingerprint == first.fingerprint


def test_where_listings_are_refused_single_shards_are_asked_for(
    tmp_path: Path, fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right to read the objects of a bucket does not include that to list it."""
    paths = write_shards(tmp_path / "local", 12)
    memory = fsspec.filesystem("listing")
    for path in paths:
        memory.pipe(f"/refused-of-test/{path.name}", path.read_bytes())

    def refused(self: StoreWithListings, path: str, **settings: Any) -> list[Any]:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(StoreWithListings, "ls", refused)
    memory.asked.clear()
    assert opened("listing://refused-of-test/s-{000..011}.tar", fresh()).num_rows.tolist() == [12 * ROWS]
    assert {path.rpartition("/")[2] for path in memory.asked} >= {path.name for path in paths}


def test_the_other_end_of_keys_has_indexes_of_its_own(tmp_path: Path, store: str, fresh: Any) -> None:
    paths = write_shards(tmp_path / "store")
    indexed(paths, fresh())
    shards = f"{store}/s-{{000..002}}.tar"
    opened(shards, fresh(), key_ends_at="last-dot")
    assert sent(store) > 0
    before = sent(store)
    indexed(paths, fresh(), key_ends_at="last-dot")
    opened(shards, fresh(), key_ends_at="last-dot")
    opened(shards, fresh())
    assert sent(store) == before


def replaced_by_another_size(folder: Path) -> None:
    write_shards(folder / "more", 2, rows=ROWS + 20)[1].rename(folder / "s-001.tar")


def replaced_by_another_etag(folder: Path) -> None:
    """Other rows of the same size: only the etag, which the table names, tells them apart."""
    path = folder / "s-001.tar"
    path.write_bytes(path.read_bytes().replace(b"1 7 ", b"1 8 "))


@pytest.mark.parametrize("replace", [replaced_by_another_size, replaced_by_another_etag])
def test_an_index_of_another_shard_is_not_used(
    tmp_path: Path, store: str, fresh: Any, replace: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(tmp_path / "store")
    shards = f"{store}/s-{{000..002}}.tar"
    opened(shards, fresh()).write_indexes(tmp_path / "indexes")
    replace(tmp_path / "store")
    before = sent(store)
    with caplog.at_level(logging.WARNING):
        collection = opened(shards, fresh(), indexes=tmp_path / "indexes")
    assert "1 shard(s) are not those of the table of indexes there" in caplog.text
    assert "s-001.tar" in caplog.text
    size = (tmp_path / "store" / "s-001.tar").stat().st_size
    assert size <= sent(store) - before < 1.2 * size, "only the changed shard is read through"
    assert collection.fingerprint == opened(shards, fresh(), indexes=False).fingerprint


def test_the_manifest_is_believed_rather_than_the_table(
    tmp_path: Path, store: str, fresh: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "alpha {n}"}}\n' for n in range(30)))
    shard_files({"source/a": [tmp_path / "a.jsonl"]}, tmp_path / "store", progress=False)
    table = tmp_path / "store" / "source" / "a" / "shards.index"
    content = json.loads(table.read_text())
    content["shards"]["a-000000.tar"]["sha256"] = "0" * 64
    table.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        opened(load_manifest(f"{store}/manifest.json"), fresh())
    assert "not those of the table" in caplog.text
    assert sent(store) > 0


@pytest.mark.parametrize("how", ["flipped bit", "another shard's", "cut", "gone", "empty"])
def test_a_damaged_index_costs_time_and_no_row(
    tmp_path: Path, store: str, fresh: Any, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    indexed(write_shards(tmp_path / "store"), fresh())
    path = tmp_path / "store" / "s-001.tar.index"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    content = {
        "flipped bit": bytes(data),
        "another shard's": (tmp_path / "store" / "s-002.tar.index").read_bytes(),
        "cut": bytes(data[:700]),
        "empty": b"",
    }
    path.unlink() if how == "gone" else path.write_bytes(content[how])
    collection = opened(f"{store}/s-{{000..002}}.tar", fresh())
    assert sent(store) == 0
    with caplog.at_level(logging.WARNING):
        assert all_texts(collection) == [text(shard, row) for shard in range(3) for row in range(ROWS)]
    assert ("s-001.tar.index" in caplog.text) == (how != "gone")


@pytest.mark.parametrize("rows", [ROWS - 10, ROWS + 10])
def test_another_number_of_rows_in_the_table_is_damage_and_the_remedy_works(
    tmp_path: Path, store: str, fresh: Any, rows: int
) -> None:
    """Fewer rows would be left out in silence, and more would end in an IndexError."""
    paths = write_shards(tmp_path / "store")
    indexed(paths, fresh())
    shards, cache = f"{store}/s-{{000..002}}.tar", fresh()
    path = tmp_path / "store" / "shards.index"
    content = json.loads(path.read_text())
    content["shards"]["s-001.tar"]["rows"] = rows
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedShardError, match=rf"has {ROWS} rows.*{rows} by the table.*`dmagent index`"):
        all_texts(opened(shards, cache))
    assert len(all_texts(opened(shards, cache, indexes=False))) == 3 * ROWS
    indexed(paths, fresh())
    assert len(all_texts(opened(shards, cache))) == 3 * ROWS
    assert len(all_texts(opened(shards, fresh()))) == 3 * ROWS


TABLES = {
    "no JSON": b"shards",
    "a list": b"[]",
    "another format": b'{"format": "1", "shards": {}}',
    "no shards": b'{"format": "6"}',
    "more rows than bytes": None,
    "a checksum of text": None,
    "an inventory that is none": None,
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_that_is_none_is_left_aside_with_a_warning(
    tmp_path: Path, store: str, fresh: Any, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    indexed(write_shards(tmp_path / "store"), fresh())
    path = tmp_path / "store" / "shards.index"
    content = json.loads(path.read_text())
    entry = content["shards"]["s-001.tar"]
    entry |= {
        "more rows than bytes": {"rows": 1 << 60},
        "a checksum of text": {"checksum": "none"},
        "an inventory that is none": {"inventory": "[[3]]"},
    }.get(kind, {})
    path.write_bytes(TABLES[kind] or json.dumps(content).encode())
    with caplog.at_level(logging.WARNING):
        collection = opened(f"{store}/s-{{000..002}}.tar", fresh())
    assert "is not a table of indexes that can be used" in caplog.text
    assert collection.num_rows.tolist() == [3 * ROWS]


def test_rows_that_the_store_does_not_hold_any_more_are_found_and_the_remedy_works(tmp_path: Path, fresh: Any) -> None:
    """A table made before the shards were stored names no etag: rows are compared when they are read."""
    indexed(write_shards(tmp_path / "local"), fresh())
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "local"), "/stale-of-test", recursive=True)
    path = tmp_path / "local" / "s-001.tar"
    memory.pipe("/stale-of-test/s-001.tar", path.read_bytes().replace(b"1 7 ", b"1 8 "))
    shards, cache = "memory://stale-of-test/s-{000..002}.tar", fresh()
    with pytest.raises(DamagedShardError, match="changed since it was indexed") as error:
        all_texts(opened(shards, cache))
    assert "`dmagent index`" in str(error.value)
    opened(shards, fresh(), indexes=False).write_indexes()
    shutil.rmtree(cache)
    assert all_texts(opened(shards, cache))[ROWS + 7] == "1 8 " * 50


def test_a_shard_that_is_replaced_after_the_first_start_is_read_through(tmp_path: Path, fresh: Any) -> None:
    """The table may still name the old one; without an etag, only the time of the store tells."""
    indexed(write_shards(tmp_path / "local"), fresh())
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "local"), "/replaced-of-test", recursive=True)
    shards, cache = "memory://replaced-of-test/s-{000..002}.tar", fresh()
    first = opened(shards, cache)
    path = tmp_path / "local" / "s-001.tar"
    memory.pipe("/replaced-of-test/s-001.tar", path.read_bytes().replace(b"1 7 ", b"1 8 "))
    second = opened(shards, cache)
    assert second.fingerprint != first.fingerprint
    assert all_texts(second)[ROWS + 7] == "1 8 " * 50


def with_rows_at_other_places(data: bytes) -> bytes:
    """The same tar with a folder in front of its rows, and less padding: the size stays."""
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    return folder.tobuf(tarfile.USTAR_FORMAT) + data[:-512]


@pytest.mark.parametrize("first_indexes", [True, False], ids=["from the store", "built"])
def test_a_shard_whose_rows_have_moved_is_read_with_its_new_index(
    tmp_path: Path, store: str, fresh: Any, first_indexes: bool
) -> None:
    """The checksum of the rows is the same, so the index in the cache looked right, at every start."""
    path, url = write_shards(tmp_path / "store", 1)[0], f"{store}/s-000.tar"
    indexes, cache = str(tmp_path / "indexes"), fresh()
    opened(url, fresh()).write_indexes(indexes)
    expected = all_texts(opened(url, cache, indexes=indexes if first_indexes else False))
    path.write_bytes(with_rows_at_other_places(path.read_bytes()))
    opened(url, fresh()).write_indexes(indexes)
    assert all_texts(opened(url, cache, indexes=indexes)) == expected
    assert all_texts(opened({"source/b": url}, cache, indexes=indexes)) == expected


class Rank:
    """One of two ranks, each in a thread."""

    size = 2

    def __init__(self, rank: int, values: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.stop, self._values, self._barrier = rank, threading.Event(), values, barrier

    def gather(self, value: Any) -> list[Any]:
        self._values[self.rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


@pytest.mark.parametrize("knows_the_new_one", [True, False])
@pytest.mark.parametrize("knowing", [0, 1])
def test_a_rank_that_knew_another_version_keeps_all_from_a_table_without_etags(
    tmp_path: Path, fresh: Any, knowing: int, knows_the_new_one: bool
) -> None:
    """A rank with an empty cache took the old entry and handed it to the others, which knew better."""
    indexed(write_shards(tmp_path / "local"), fresh())
    memory, folder = fsspec.filesystem("memory"), f"ranks-{knowing}-{knows_the_new_one}"
    memory.put(str(tmp_path / "local"), f"/{folder}", recursive=True)
    shards, caches = f"memory://{folder}/s-{{000..002}}.tar", [fresh(), fresh()]
    opened(shards, caches[knowing])
    data = (tmp_path / "local" / "s-001.tar").read_bytes()
    memory.pipe(f"/{folder}/s-001.tar", data.replace(b"1 7 ", b"1 8 "))
    if knows_the_new_one:
        opened(shards, caches[knowing])
    values, barrier = [None, None], threading.Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as threads:
        ranks = [Rank(rank, values, barrier) for rank in range(2)]
        collections = list(threads.map(lambda rank: opened(shards, caches[rank.rank], peers=rank), ranks))
    for collection in collections:
        assert all_texts(collection)[ROWS + 7] == "1 8 " * 50


def test_rows_of_a_replaced_shard_are_not_delivered_from_blocks_of_the_old_one(
    tmp_path: Path, store: str, fresh: Any
) -> None:
    """The table names no etag, the size is the same, and the old blocks hold what the table says."""
    paths = write_shards(tmp_path / "store", 1)
    indexed(paths, fresh())

    def texts(cache: Path) -> set[str]:
        reading = ReadingConfig(cache_dir=cache, block_cache_dir=tmp_path / "blocks", progress=False)
        sampler = AgentWeightedSampler({"source/a": f"{store}/s-000.tar"}, samples_per_reweight=100, reading=reading)
        return {sample["txt"] for sample in islice(sampler, ROWS)}

    assert texts(fresh()) == {text(0, row) for row in range(ROWS)}
    assert texts(fresh()) == {text(0, row) for row in range(ROWS)}
    assert len(list((tmp_path / "blocks").glob("*.block"))) == 1, "the block was not found again"
    paths[0].write_bytes(paths[0].read_bytes().replace(b"0 7 ", b"0 8 "))
    cache = fresh()
    for _ in range(2):
        with pytest.raises(DamagedShardError, match="changed since it was indexed"):
            texts(cache)


def test_without_etags_the_index_from_the_store_is_fetched_once(tmp_path: Path, fresh: Any) -> None:
    indexed(write_shards(tmp_path / "local"), fresh())
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "local"), "/once-of-test", recursive=True)
    shards, cache = "memory://once-of-test/s-{000..002}.tar", fresh()
    expected = all_texts(opened(shards, cache))
    memory.rm("/once-of-test/s-001.tar.index")
    assert all_texts(opened(shards, cache)) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredIndexes, "load", lambda *_: pytest.fail("fetched again"))
        assert all_texts(opened(shards, cache)) == expected


def test_the_table_keeps_the_shards_that_another_call_adds_at_the_same_time(
    tmp_path: Path, fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both read the table before they wrote their indexes, and the second one overwrote the entries of the first."""
    paths, root = [str(path) for path in write_shards(tmp_path / "local", 4)], tmp_path / "indexes"
    ours, theirs = opened(paths[:2], fresh()), iter([opened(paths[2:], fresh())])
    save, lock = StoredIndexes.save, threading.Lock()

    def save_after_another(self: StoredIndexes, *content: Any) -> None:
        with lock:
            other = next(theirs, None)
        if other is not None:
            other.write_indexes(root)
        save(self, *content)

    monkeypatch.setattr(StoredIndexes, "save", save_after_another)
    ours.write_indexes(root)
    (table,) = root.rglob("shards.index")
    assert set(json.loads(table.read_text())["shards"]) == {Path(path).name for path in paths}


def test_entries_that_another_call_has_overwritten_are_written_again(
    tmp_path: Path, fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had read the table before they were there."""
    paths, root = [str(path) for path in write_shards(tmp_path / "local", 2)], tmp_path / "indexes"
    opened(paths[:1], fresh()).write_indexes(root)
    (table,) = root.rglob("shards.index")
    overwriting = iter([table.read_bytes()])
    save_table = StoredIndexes.save_table

    def save_before_another(self: StoredIndexes, *content: Any) -> None:
        save_table(self, *content)
        for data in overwriting:
            table.write_bytes(data)

    monkeypatch.setattr(StoredIndexes, "save_table", save_before_another)
    opened(paths[1:], fresh()).write_indexes(root)
    assert set(json.loads(table.read_text())["shards"]) == {"s-000.tar", "s-001.tar"}


def test_a_place_without_indexes_is_named(
    tmp_path: Path, store: str, fresh: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A mistyped place cost hours of reading at each start on a new machine, without a word."""
    write_shards(tmp_path / "store")
    shards, cache = f"{store}/s-{{000..002}}.tar", fresh()
    with caplog.at_level(logging.WARNING):
        opened(shards, cache, indexes=tmp_path / "typo")
    (record,) = caplog.records
    assert "there is no table of indexes" in record.getMessage()
    assert str(tmp_path / "typo") in record.getMessage()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        opened(shards, cache, indexes=tmp_path / "typo")  # all are cached
        opened(shards, fresh())  # nobody has said that there are any
    assert not caplog.records


def test_indexes_that_were_made_without_the_manifest_are_named_with_the_remedy(
    tmp_path: Path, store: str, fresh: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They lack the sha256 that the manifest has, whichever shards they are of."""
    monkeypatch.setenv("DMAGENT_CACHE_DIR", str(fresh()))
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "alpha {n}"}}\n' for n in range(30)))
    shard_files({"source/a": [tmp_path / "a.jsonl"]}, tmp_path / "store", progress=False)
    indexes, manifest = tmp_path / "indexes", f"{store}/manifest.json"
    assert main(["index", f"{store}/source/a/a-000000.tar", "--to", str(indexes), "--no-progress"]) == 0
    with caplog.at_level(logging.WARNING):
        opened(load_manifest(manifest), fresh(), indexes=indexes)
    (record,) = caplog.records
    assert "`dmagent index MANIFEST`" in record.getMessage()
    assert "a-000000.tar" in record.getMessage()
    caplog.clear()
    assert main(["index", manifest, "--to", str(indexes), "--no-progress"]) == 0
    before = sent(store)
    with caplog.at_level(logging.WARNING):
        opened(load_manifest(manifest), fresh(), indexes=indexes)
    assert not caplog.records
    assert sent(store) == before


def test_another_value_for_the_indexes_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="indexes is 3; it must be a path, a URL, True or False"):
        ReadingConfig(indexes=3)  # type: ignore[arg-type]
