"""Rows of remote shards through blocks: the same rows, few requests, each byte once per node, whatever fails."""

from __future__ import annotations

import fcntl
import gc
import hashlib
import multiprocessing
import os
import resource
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_shards import byte_tokenizer

from benchmarks.far_server import FarServer
from dmagent_loader import AgentWeightedSampler, MixingDataLoader, PackText, ReadingConfig
from dmagent_loader._loading import stream
from dmagent_loader.errors import DamagedShardError, ExhaustedError, ShardError
from dmagent_loader.shards import ShardCollection
from dmagent_loader.shards.sources import block_store, blocks, fetching
from dmagent_loader.shards.writing.tar_writer import TarWriter
from dmagent_loader.testing import write_toy_shards
from dmagent_loader.transforms import collate_packed

pytest.importorskip("aiohttp", reason="fsspec needs aiohttp for http")

BLOCK_BYTES = 16 << 10
ROWS, SHARDS = 60, 4
DOMAINS = ("source/a", "source/b", "target/c")
EQUAL = dict.fromkeys(DOMAINS, 1 / 3)


def write_shards(folder: Path) -> None:
    """Rows of very different sizes, some of several members, one larger than a block."""
    rng = np.random.default_rng(0)
    for domain in DOMAINS:
        (folder / domain).mkdir(parents=True)
        for shard in range(SHARDS):
            writer = TarWriter(folder / domain / f"s-{shard}.tar")
            for row in range(ROWS):
                size = int(rng.choice([10, 700, 3000])) if row != 20 else 3 * BLOCK_BYTES
                text = f"{domain} {shard} {row} ".encode() + rng.bytes(size).hex().encode()
                members = {"txt": text} if shard % 2 else {"txt": text, "json": b'{"n": 1}'}
                writer.add(f"{row:03d}", members)
            writer.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("far")
    write_shards(folder)
    return folder


@contextmanager
def served(folder: Path) -> Iterator[FarServer]:
    server = FarServer(folder, latency=0.001, rate=1e9)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    gc.collect()  # iterators of the test would go on fetching
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(folder: Path) -> Iterator[FarServer]:
    with served(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", BLOCK_BYTES)
    block_store._reported.clear()


def remote(server: FarServer) -> dict[str, str]:
    return {domain: server.url(f"{domain}/s-{{0..{SHARDS - 1}}}.tar") for domain in DOMAINS}


def local(folder: Path) -> dict[str, str]:
    return {domain: str(folder / domain) for domain in DOMAINS}


def build(shards: Mapping[str, str], tmp_path: Path, **reading: Any) -> AgentWeightedSampler:
    config = {"cache_dir": tmp_path / "index", "block_cache_dir": tmp_path / "blocks", **reading}
    return AgentWeightedSampler(
        shards,
        samples_per_reweight=10**9,
        seed=3,
        exhausted="repeat",
        initial_mix=EQUAL,
        reading=ReadingConfig(progress=False, shuffle_window=50, **config),
    )


def digests(sampler: AgentWeightedSampler, count: int, mixes: Mapping[int, Mapping[str, float]] = {}) -> list[str]:
    """Keys and contents of samples, under mixes that begin at some of them."""
    found = []
    for number, sample in enumerate(islice(sampler, count)):
        content = f"{sample['__domain__']} {sample['__key__']} {sample['txt']}"
        found.append(hashlib.sha256(content.encode()).hexdigest())
        if number + 1 in mixes:
            sampler.set_mix(mixes[number + 1])
    return found


def mixes_every(samples: int, count: int) -> dict[int, dict[str, float]]:
    rng = np.random.default_rng(count)
    weights = rng.dirichlet(np.ones(len(DOMAINS)), size=count // samples)
    return {samples * (n + 1): dict(zip(DOMAINS, w / w.sum(), strict=True)) for n, w in enumerate(weights)}


def fetched(server: FarServer) -> tuple[int, int]:
    """Requests for parts of shards, and their bytes, since the last call."""
    counts = server.counts(reset=True)
    return counts["requests"].get("GET .tar", 0), counts["bytes"].get("GET .tar", 0)


def leftovers(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "blocks").iterdir() if path.suffix != ".block"]


TOTAL = len(DOMAINS) * SHARDS * ROWS


def test_rows_are_those_of_local_shards_and_every_byte_comes_once(
    server: FarServer, folder: Path, tmp_path: Path
) -> None:
    sampler = build(remote(server), tmp_path)
    fetched(server)
    count = 3 * TOTAL
    mixes = mixes_every(50, count)
    assert digests(sampler, count, mixes) == digests(build(local(folder), tmp_path), count, mixes)
    size = sum(path.stat().st_size for path in folder.rglob("*.tar"))
    requests, sent = fetched(server)
    assert sent <= size, "bytes were fetched twice"
    assert requests <= size / BLOCK_BYTES + len(DOMAINS) * SHARDS * 3
    again = build(remote(server), tmp_path)
    fetched(server)
    digests(again, count)
    assert fetched(server) == (0, 0), "blocks on disk were fetched again"


def test_the_block_behind_another_is_known_where_the_table_of_the_shard_is(server: FarServer, tmp_path: Path) -> None:
    collection = build(remote(server), tmp_path).collection
    collection._tables.clear()
    behind = collection.fetcher._block_behind
    assert behind(1 << blocks.BLOCK_BITS) is None
    table = collection._tables.get(1)
    assert len(table.blocks) > 2
    found = [behind(1 << blocks.BLOCK_BITS | number) for number in range(len(table.blocks))]
    assert found == [*(table.blocks[number] for number in range(1, len(table.blocks))), None]


def test_what_is_fetched_is_what_lies_ahead(server: FarServer, tmp_path: Path) -> None:
    """A domain without weight costs nothing, and of the others only what is needed soon is fetched."""
    sampler = build(remote(server), tmp_path)
    sampler.set_mix({"source/a": 1.0, "source/b": 0.0, "target/c": 0.0})
    fetched(server)
    digests(sampler, 100)
    names = {path.stem for path in (tmp_path / "blocks").glob("*.block")}
    table = sampler.collection._tables
    known = {table.get(shard).blocks[k].name for shard in range(SHARDS) for k in range(len(table.get(shard).blocks))}
    assert names
    assert names <= known, "blocks of a domain without weight"


@pytest.mark.parametrize("weight", [0.0, 1e-9])
def test_blocks_of_domains_without_weight_are_released_and_others_kept(
    server: FarServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: float
) -> None:
    """Otherwise those that no sample needs any more take the room of those that are needed."""
    for name in ("_RUN_AHEAD", "_FIRST_RUN", "_LEAST_AHEAD"):
        monkeypatch.setattr(stream, name, 60)
    sampler, expected = build(remote(server), tmp_path), build(local(folder), tmp_path)
    iterator, local_iterator, fetcher = iter(sampler), iter(expected), sampler.collection.fetcher

    def compare(count: int, mix: Mapping[str, float]) -> dict[int, int]:
        """Reads samples, then changes the mix; returns the domain of each block in use."""
        for _ in range(count):
            assert next(iterator)["txt"] == next(local_iterator)["txt"]
        while not all(
            entry.stored.is_needed and entry.state is fetching._State.HERE for entry in [*fetcher._entries.values()]
        ):
            time.sleep(0.01)  # what is not being fetched yet is planned anew
        sampler.set_mix(mix)
        expected.set_mix(mix)
        return {key: domain for key, (domain, _) in iterator._blocks._last_use.items()}

    before = compare(10, {"source/a": 1 - 2 * weight, "source/b": weight, "target/c": weight})
    after = compare(300, EQUAL)
    assert {0, 1, 2} == set(before.values())
    if weight:
        assert {key for key in before if before[key]} <= after.keys()
    else:
        assert set(after.values()) == {0}
    assert fetcher._entries.keys() == after.keys()
    assert set(compare(TOTAL, EQUAL).values()) == {0, 1, 2}


def read_all(shards: dict[str, str], tmp_path: Path, results: multiprocessing.Queue[Any]) -> None:
    results.put(digests(build(shards, tmp_path), TOTAL))


def test_two_processes_fetch_every_byte_once(server: FarServer, folder: Path, tmp_path: Path) -> None:
    build(remote(server), tmp_path)
    fetched(server)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    readers = [context.Process(target=read_all, args=(remote(server), tmp_path, results)) for _ in range(2)]
    for reader in readers:
        reader.start()
    expected = digests(build(local(folder), tmp_path), TOTAL)
    assert [results.get(timeout=120) for _ in readers] == [expected, expected]
    for reader in readers:
        reader.join()
    assert fetched(server)[1] <= sum(path.stat().st_size for path in folder.rglob("*.tar"))


@pytest.mark.parametrize("workers", [1, 2])
def test_data_workers_share_the_blocks(server: FarServer, folder: Path, tmp_path: Path, workers: int) -> None:
    def texts(sampler: AgentWeightedSampler, num_workers: int) -> list[str]:
        loader = MixingDataLoader(sampler, batch_size=4, num_workers=num_workers, collate_fn=list)
        return [sample["txt"] for batch in islice(loader, TOTAL // 4) for sample in batch]

    sampler = build(remote(server), tmp_path)
    fetched(server)
    assert texts(sampler, workers) == texts(build(local(folder), tmp_path), 0)
    assert fetched(server)[1] <= sum(path.stat().st_size for path in folder.rglob("*.tar"))


def packed_batches(shards: Mapping[str, Any], tmp_path: Path, workers: int, **reading: Any) -> list[Any]:
    """Batches of two passes of a loader whose data workers stay, with new mixes in both.

    The sampler has been read before: its iterator has blocks when the workers are forked.
    """
    config = {"cache_dir": tmp_path / "index", "block_cache_dir": tmp_path / "blocks", **reading}
    sampler = AgentWeightedSampler(
        shards,
        exhausted="repeat",
        reading=ReadingConfig(progress=False, shuffle_window=64, shuffle_shards=4, **config),
    )
    earlier = iter(sampler)
    next(earlier)
    sampler.seek(0)
    loader = MixingDataLoader(
        sampler, batch_size=6, num_workers=workers, persistent_workers=workers > 0, collate_fn=collate_packed
    )
    found, consumed = [], 0
    for share in (0.1, 0.8):
        for number, batch in enumerate(loader):
            found.append((batch["__index__"].tolist(), batch["__key__"], batch["input_ids"].tolist()))
            consumed += 6
            sampler.reweight_due(consumed)
            if number == 9:
                sampler.set_mix({"source/a": share, "target/b": 1 - share})
            if number == 29:
                break
        if not workers:
            sampler.seek(consumed)
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_packed_rows_are_those_of_local_shards(tmp_path: Path, workers: int) -> None:
    """Whether rows are read together, ahead in threads, or from blocks; and from both kinds of shards in one run."""
    near = write_toy_shards(tmp_path / "far", {"source/a": 120, "target/b": 90}, tokens=16)
    with served(tmp_path / "far") as server:
        far = {d: [server.url(str(Path(p).relative_to(tmp_path / "far"))) for p in paths] for d, paths in near.items()}
        expected = packed_batches(near, tmp_path, workers)
        assert [index for batch, _, _ in expected for index in batch] == list(range(360))
        for shards in (near, far, {**near, "target/b": far["target/b"]}):
            for reading in ({}, {"num_threads": 2}, {"own_shards": True}, {"block_cache_bytes": 0}):
                if shards is not near or "num_threads" in reading:
                    assert packed_batches(shards, tmp_path, workers, **reading) == expected


@pytest.mark.parametrize("reading", [{}, {"block_cache_bytes": 0}], ids=["on disk", "in memory"])
def test_batches_of_packed_rows_are_read_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reading: dict[str, Any]
) -> None:
    near = write_toy_shards(tmp_path / "far", {"source/a": 120, "target/b": 90}, tokens=16)
    alone = []
    read = ShardCollection.read
    monkeypatch.setattr(ShardCollection, "read", lambda self, *row: alone.append(row) or read(self, *row))
    with served(tmp_path / "far") as server:
        far = {d: [server.url(str(Path(p).relative_to(tmp_path / "far"))) for p in paths] for d, paths in near.items()}
        packed_batches({**near, "target/b": far["target/b"]}, tmp_path, 0, **reading)
    assert len(alone) == 1, "that of the earlier iterator"


def test_rows_that_were_read_ahead_are_not_read_again_with_their_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks find room after their rows were requested one by one. What nobody takes would stay in memory."""
    monkeypatch.setattr(block_store, "_MEMORY_BYTES", 0)
    monkeypatch.setattr(block_store, "_TRY_AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(stream, "_RUN_AHEAD", 60)
    monkeypatch.setattr(stream, "_FIRST_RUN", 60)
    near = write_toy_shards(tmp_path / "far", {"source/a": 400, "target/b": 200}, tokens=200)
    with served(tmp_path / "far") as server:
        far = {d: [server.url(str(Path(p).relative_to(tmp_path / "far"))) for p in paths] for d, paths in near.items()}
        sampler = AgentWeightedSampler(
            far,
            exhausted="repeat",
            reading=ReadingConfig(progress=False, cache_dir=tmp_path / "index", block_cache_bytes=0),
        )
        batches = iter(MixingDataLoader(sampler, batch_size=6, collate_fn=collate_packed))
        next(batches)
        reader = sampler._feed.cursor.stream
        while reader._readahead is None or not reader._readahead._pending:
            next(batches)
        monkeypatch.setattr(block_store, "_MEMORY_BYTES", 1 << 30)
        while not all(map(sampler.collection.fetcher.comes, reader._blocks._last_use)):
            time.sleep(0.01)
        for _ in range(40):
            next(batches)
        assert not reader._readahead._pending
        del batches, reader


@pytest.mark.slow
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    limit=st.sampled_from([None, 0, 1, 3 * BLOCK_BYTES, 8 * BLOCK_BYTES, 40 * BLOCK_BYTES]),
    memory=st.sampled_from([0, 2 * BLOCK_BYTES, 1 << 30]),
    every=st.sampled_from([3, 50, 500]),
    threads=st.sampled_from([0, 0, 2]),
)
def test_rows_are_the_same_under_any_limits_and_mixes(
    server: FarServer,
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    limit: int | None,
    memory: int,
    every: int,
    threads: int,
) -> None:
    tmp_path = tmp_path_factory.mktemp("limits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_store, "_MEMORY_BYTES", memory)
        patch.setattr(block_store, "_TRY_AGAIN_SECONDS", 0.05)
        patch.setattr(stream, "_RUN_AHEAD", 64)
        patch.setattr(stream, "_FIRST_RUN", 64)
        patch.setattr(stream, "_LEAST_AHEAD", 128)
        patch.setattr(stream, "_MOST_AHEAD_OF_A_NEW_MIX", 128)
        count = 150
        mixes = mixes_every(every, count)
        sampler = build(remote(server), tmp_path, block_cache_bytes=limit, num_threads=threads)
        assert digests(sampler, count, mixes) == digests(build(local(folder), tmp_path), count, mixes)
        if limit:
            size = sum(path.stat().st_size for path in (tmp_path / "blocks").glob("*.block"))
            assert size <= limit


def test_samples_before_the_end_of_a_domain_are_delivered_wherever_it_lies_in_those_planned_together(
    server: FarServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_RUN_AHEAD", "_FIRST_RUN"):
        monkeypatch.setattr(stream, name, 24)
    monkeypatch.setattr(stream, "_LEAST_AHEAD", 200)

    def delivered(shards: Mapping[str, str]) -> list[str]:
        sampler = AgentWeightedSampler(
            shards,
            samples_per_reweight=10**9,
            exhausted="error",
            initial_mix={"source/a": 0.5, "source/b": 0.3, "target/c": 0.2},
            reading=ReadingConfig(progress=False, cache_dir=tmp_path / "index", block_cache_dir=tmp_path / "blocks"),
        )
        found: list[str] = []
        with pytest.raises(ExhaustedError, match="source/a"):
            found.extend(sample["__key__"] for sample in sampler)
        return found

    found = delivered(remote(server))
    assert found == delivered(local(folder))
    assert len(found) >= 2 * SHARDS * ROWS - 4


def close_inherited(sampler: AgentWeightedSampler, results: multiprocessing.Queue[Any]) -> None:
    """In a forked child: an iterator of its own, beside which that of its parent ends."""
    parents = sampler._feed.cursor.stream
    iterator = iter(sampler)
    found = [next(iterator)["__index__"]]
    parents._close()
    results.put(found + [next(iterator)["__index__"] for _ in range(99)])


def test_a_forked_child_has_blocks_of_its_own(server: FarServer, tmp_path: Path) -> None:
    sampler = build(remote(server), tmp_path)
    iterator = iter(sampler)
    next(iterator)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=close_inherited, args=(sampler, results))
    child.start()
    assert results.get(timeout=60) == list(range(1, 101))
    child.join()
    assert [next(iterator)["__index__"] for _ in range(100)] == list(range(1, 101))


def test_packed_text_is_read_through_blocks(server: FarServer, folder: Path, tmp_path: Path) -> None:
    samplers = [
        AgentWeightedSampler(
            shards,
            samples_per_reweight=10**9,
            pack=PackText(byte_tokenizer(), length=512),
            reading=ReadingConfig(
                progress=False, cache_dir=tmp_path / "index", block_cache_dir=tmp_path / "blocks", shuffle_window=50
            ),
        )
        for shards in (remote(server), local(folder))
    ]
    fetched(server)
    rows = [[sample["input_ids.npy"].tolist() for sample in islice(sampler, 300)] for sampler in samplers]
    assert rows[0] == rows[1]
    assert fetched(server)[0] < 250, "one request per document"


# Faults


def test_blocks_stay_in_memory_where_there_is_no_folder(
    server: FarServer, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    sampler = build(remote(server), tmp_path, block_cache_dir=tmp_path / "file" / "blocks")
    fetched(server)
    assert digests(sampler, TOTAL) == digests(build(local(folder), tmp_path), TOTAL)
    assert fetched(server)[0] < TOTAL / 2
    warnings = [record.getMessage() for record in caplog.records if "blocks of remote shards" in record.getMessage()]
    assert len(warnings) == 1
    assert "Not a directory" in warnings[0]
    assert "block_cache_dir" in warnings[0]


def read_on_a_full_disk(shards: dict[str, str], tmp_path: Path, results: multiprocessing.Queue[Any]) -> None:
    sampler = build(shards, tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK_BYTES // 2, BLOCK_BYTES // 2))
    results.put((digests(sampler, TOTAL), sorted(block_store._reported)))


def test_a_full_disk_costs_no_row(server: FarServer, folder: Path, tmp_path: Path) -> None:
    """The limit on the size of a file stands in for the disk: both refuse to write in the middle of a block."""
    build(remote(server), tmp_path)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    reader = context.Process(target=read_on_a_full_disk, args=(remote(server), tmp_path, results))
    reader.start()
    rows, reported = results.get(timeout=120)
    reader.join()
    assert rows == digests(build(local(folder), tmp_path), TOTAL)
    assert len(reported) == 1
    assert f"cannot be stored in the folder {tmp_path / 'blocks'}" in reported[0]
    assert not [name for name in leftovers(tmp_path) if name.endswith(".partial")]


def test_a_damaged_block_is_replaced_by_the_rows_of_the_shard(server: FarServer, folder: Path, tmp_path: Path) -> None:
    digests(build(remote(server), tmp_path), TOTAL)
    stored = sorted((tmp_path / "blocks").glob("*.block"))
    for path in stored[::2]:
        path.write_bytes(bytes(path.stat().st_size))
    assert digests(build(remote(server), tmp_path), TOTAL) == digests(build(local(folder), tmp_path), TOTAL)


def test_blocks_that_vanish_are_fetched_again(server: FarServer, folder: Path, tmp_path: Path) -> None:
    sampler = build(remote(server), tmp_path)
    expected = digests(build(local(folder), tmp_path), TOTAL)
    found = digests(sampler, 50)
    for path in (tmp_path / "blocks").glob("*.block"):
        path.unlink()
    sampler.collection.fetcher._store._files.clear()
    assert found + digests(sampler, TOTAL - 50) == expected


def test_a_shard_that_is_cut_loses_only_the_rows_behind_the_cut(
    server: FarServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that reaches beyond the cut cannot be fetched; its rows before the cut are whole."""
    monkeypatch.setattr("dmagent_loader.shards.sources.remote.REMOTE_BACKOFF_SECONDS", 0.01)
    whole = (folder / "source/a/s-1.tar").read_bytes()
    collection = ShardCollection.open(
        {"source/a": server.url("source/a/s-1.tar")},
        cache_dir=tmp_path / "index",
        block_cache_dir=tmp_path / "blocks",
        progress=False,
    )
    expected = [bytes(collection.read(0, 0, row).members["txt"]) for row in range(ROWS)]
    table = collection._tables.get(0)
    server.folder = tmp_path / "cut"
    (server.folder / "source/a").mkdir(parents=True)
    (server.folder / "source/a/s-1.tar").write_bytes(whole[: table.offset[ROWS - 1]])
    none = np.zeros(ROWS, np.int64)
    for key in set(collection.blocks_of(none, none, np.arange(ROWS))[0].tolist()):
        collection.fetcher.want([(key, 0)])
    found = [bytes(collection.read(0, 0, row).members["txt"]) for row in range(ROWS - 1)]
    assert found == expected[:-1]
    with pytest.raises(DamagedShardError, match=r"s-1\.tar"):
        collection.read(0, 0, ROWS - 1)


def test_the_error_of_a_row_is_that_of_its_shard(
    server: FarServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmagent_loader.shards.sources.remote.REMOTE_BACKOFF_SECONDS", 0.01)
    sampler = build(remote(server), tmp_path)
    server.folder = tmp_path / "nothing"
    with pytest.raises(ShardError, match=r"shard http://127\.0\.0\.1:\d+/\S+\.tar does not exist"):
        next(iter(sampler))


def test_samples_whose_blocks_could_not_be_found_are_planned_again(
    server: FarServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The indexes are gone, and the shards out of reach for a while."""
    monkeypatch.setattr("dmagent_loader.shards.sources.remote.REMOTE_BACKOFF_SECONDS", 0.01)
    iterator = iter(build(remote(server), tmp_path))
    shutil.rmtree(tmp_path / "index")
    server.folder = tmp_path / "nothing"
    for _ in range(2):
        with pytest.raises(ShardError, match="does not exist"):
            next(iterator)
    server.folder = folder
    assert [next(iterator)["__index__"] for _ in range(TOTAL)] == list(range(TOTAL))
    assert len(iterator._blocks._planned) == len(iterator._planned)


def test_a_reader_does_not_wait_for_ever_for_the_block_of_another(
    server: FarServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process is alive and holds its lock, but has stopped."""
    sampler = build(remote(server), tmp_path)
    digests(sampler, 10)
    held = []
    for path in (tmp_path / "blocks").glob("*.block"):
        partial = path.with_suffix(".partial")
        held.append(os.open(partial, os.O_CREAT | os.O_WRONLY))
        fcntl.flock(held[-1], fcntl.LOCK_EX)
        path.unlink()
    monkeypatch.setattr(fetching, "SLOWEST_BYTES_PER_SECOND", 1e12)
    monkeypatch.setenv("DMAGENT_REMOTE_TIMEOUT", "0.3")
    other = build(remote(server), tmp_path)
    try:
        assert digests(other, 10) == digests(build(local(folder), tmp_path), 10)
    finally:
        for descriptor in held:
            os.close(descriptor)


def test_a_dropped_iterator_waits_for_no_lock(
    server: FarServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector frees it at any allocation, also of a thread that holds one of these locks."""
    monkeypatch.setattr(fetching, "_IDLE_SECONDS", 0.01)
    sampler = build(remote(server), tmp_path)
    iterators = [iter(sampler)]
    next(iterators[0])
    fetcher = sampler.collection.fetcher
    sampler.seek(0)
    collector = threading.Thread(target=iterators.clear, daemon=True)
    with fetcher._changed, fetcher._store._files._lock, fetcher._store._cache._lock:
        collector.start()
        collector.join(10)
        assert not iterators
        assert not collector.is_alive(), "it waits for a lock"
    deadline = time.monotonic() + 10
    while fetcher._store._cache._needed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not fetcher._store._cache._needed
    assert not fetcher._entries
