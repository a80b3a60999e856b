"""Blocks that were asked for, in folders that misbehave."""

from __future__ import annotations

import errno
import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from node_blocks import SIZE, name

from dmagent_loader.errors import ShardError
from dmagent_loader.shards.sources import block_store, fetching
from dmagent_loader.shards.sources.blocks import Block
from dmagent_loader.shards.sources.fetching import BlockFetcher
from dmagent_loader.shards.sources.local import Source
from dmagent_loader.shards.sources.node_cache import NodeCache
from dmagent_loader.shards.sources.remote import RemoteSource


@pytest.fixture
def fetcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BlockFetcher:
    """Fetches the only block of a shard, which is a local file."""
    monkeypatch.setattr(block_store, "_reported", set())
    (tmp_path / "shard").write_bytes(b"x" * SIZE)
    block = Block(name(1), 0, SIZE, 1)
    return BlockFetcher(
        lambda key: (0, block),
        lambda shard: RemoteSource(f"file://{tmp_path}/shard"),
        folder=tmp_path / "blocks",
        limit=10 * SIZE,
        max_open_files=8,
    )


def is_on_disk(fetcher: BlockFetcher, key: int) -> bool:
    """Whether a block that is here is in the folder; otherwise it is in memory."""
    entry = fetcher._entries[key]
    assert entry.state is fetching._State.HERE
    assert entry.stored.is_needed == (entry.stored.data is None)
    return entry.stored.data is None


def test_a_block_that_cannot_be_opened_is_not_fetched_without_end(
    fetcher: BlockFetcher, caplog: pytest.LogCaptureFixture
) -> None:
    """Its rows come from the shard. The limit on open files stands in for another user's file."""
    fetcher.want([(0, 0)])
    assert fetcher.get(0) is not None
    fetcher._store._files.clear()
    found: list[Source | None] = []
    reader = threading.Thread(target=lambda: found.append(fetcher.get(0)), daemon=True)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        reader.start()
        reader.join(10)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert found == [None]
    assert "cannot be read from the folder" in caplog.text
    fetcher.release(0)


@pytest.mark.parametrize("is_wanted_again", [False, True])
def test_a_reader_does_not_wait_for_a_block_that_was_released(fetcher: BlockFetcher, is_wanted_again: bool) -> None:
    """A thread that reads ahead may be waiting when a new mix drops the plan that needed the block."""
    may_fetch, source_of = threading.Event(), fetcher._source_of

    def when_allowed(shard: int) -> RemoteSource:
        may_fetch.wait(30)
        return source_of(shard)

    fetcher._source_of = when_allowed
    fetcher.want([(0, 0)])
    found: list[Source | None] = []
    reader = threading.Thread(target=lambda: found.append(fetcher.get(0)), daemon=True)
    reader.start()
    while not fetcher.waits:
        reader.join(0.001)
    with fetcher._changed:
        fetcher.release(0)
        if is_wanted_again:
            fetcher.want([(0, 0)])
            may_fetch.set()
    reader.join(10)
    may_fetch.set()
    assert [block is not None for block in found] == [is_wanted_again]


@pytest.mark.parametrize("is_open", [False, True], ids=["at the start", "later"])
def test_a_moment_without_descriptors_does_not_cost_the_folder(
    fetcher: BlockFetcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_open: bool
) -> None:
    monkeypatch.setattr(block_store, "_TRY_AGAIN_SECONDS", 0.05)
    fetcher._block_of = lambda key: (0, Block(name(key), 0, SIZE, 1))
    if is_open:
        fetcher.want([(0, 0)])
        assert fetcher.get(0) is not None
    opened, is_refused = os.open, True

    def refused(path: Any, *arguments: Any) -> int:
        if is_refused and str(path).endswith((".needs", ".partial")):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opened(path, *arguments)

    monkeypatch.setattr(os, "open", refused)
    fetcher.want([(1, 0)])
    assert fetcher.get(1) is not None
    assert not is_on_disk(fetcher, 1)
    assert "for the moment" in caplog.text
    is_refused = False
    fetcher._store._disk_full_until = 0.0
    fetcher.want([(2, 0)])
    assert fetcher.get(2) is not None
    assert is_on_disk(fetcher, 2)
    for key in (1, 2):
        fetcher.release(key)
    assert fetcher._store._cache is not None
    assert fetcher._store._cache._needed.keys() == ({name(0)} if is_open else set())


@pytest.mark.parametrize("num_threads", [0, 1])
def test_blocks_are_fetched_by_the_threads_that_can_be_started(
    fetcher: BlockFetcher, monkeypatch: pytest.MonkeyPatch, num_threads: int
) -> None:
    """Containers limit the number of threads. A thread that could not be started must not count as one."""
    start, may_fetch, source_of = threading.Thread.start, threading.Event(), fetcher._source_of
    started: list[threading.Thread] = []

    def start_if_allowed(thread: threading.Thread) -> None:
        if thread.name == "dmagent-fetch":
            if len(started) == num_threads:
                raise RuntimeError("can't start new thread")
            started.append(thread)
        start(thread)

    def when_allowed(shard: int) -> RemoteSource:
        may_fetch.wait(30)
        return source_of(shard)

    fetcher._source_of = when_allowed
    fetcher._block_of = lambda key: (0, Block(name(key), 0, SIZE, 1))
    monkeypatch.setattr(threading.Thread, "start", start_if_allowed)
    for key in range(2 * fetching.FETCHES):
        fetcher.want([(key, key)])
    if not num_threads:
        assert fetcher.get(1) is None, "a reader waited for a block that nobody fetches"
        num_threads = 1
    monkeypatch.setattr(fetching, "SLOWEST_BYTES_PER_SECOND", SIZE / 10)
    monkeypatch.setenv("DMAGENT_REMOTE_TIMEOUT", "0.1")
    may_fetch.set()
    for key in range(2 * fetching.FETCHES):
        assert fetcher.get(key) is not None
    assert len(started) == 1


@pytest.mark.parametrize("is_folder_removed", [False, True])
def test_a_block_whose_file_is_removed_halfway_is_fetched_again(
    fetcher: BlockFetcher, tmp_path: Path, is_folder_removed: bool
) -> None:
    """The documentation says how to free the space: by deleting the folder."""
    source_of = fetcher._source_of

    def once(shard: int) -> RemoteSource:
        fetcher._source_of = source_of
        for path in (tmp_path / "blocks").iterdir():
            path.unlink()
        if is_folder_removed:
            (tmp_path / "blocks").rmdir()
        return source_of(shard)

    fetcher._source_of = once
    fetcher.want([(0, 0)])
    assert fetcher.get(0) is not None
    assert is_on_disk(fetcher, 0)
    fetcher.release(0)


def test_a_reader_does_not_wait_for_a_block_whose_bytes_were_wrong(
    fetcher: BlockFetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One reader finds its file gone and waits for the next one; another one has read wrong bytes from the first."""
    fetcher.want([(0, 0)])
    assert fetcher.get(0) is not None
    assert fetcher._store._cache is not None
    may_fetch, obtain, waits = threading.Event(), fetcher._store.obtain, fetcher.waits

    def when_allowed(*arguments: Any) -> Any:
        may_fetch.wait(60)
        return obtain(*arguments)

    monkeypatch.setattr(fetcher._store, "obtain", when_allowed)
    fetcher._store._cache.remove(name(1))
    fetcher._store._files.clear()
    found: list[Source | None] = []
    reader = threading.Thread(target=lambda: found.append(fetcher.get(0)), daemon=True)
    reader.start()
    while fetcher.waits == waits:
        reader.join(0.001)
    fetcher.forget(0)
    reader.join(10)
    may_fetch.set()
    assert found == [None]


@pytest.mark.parametrize("end", ["completed", "released", "waited for"])
def test_looks_at_a_block_that_another_process_fetches_become_rare(
    fetcher: BlockFetcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """They take CPU time from the reader, who may need thousands of blocks of a slow process."""
    monkeypatch.setattr(block_store, "_LOOK_AGAIN_SECONDS", 0.001)
    monkeypatch.setattr(fetching, "_MOST_RARELY_SECONDS", 0.008)
    pauses, has_looked, enqueue = [], threading.Event(), fetcher._enqueue

    def recorded(entry: Any, after: float = 0.0) -> None:
        if after:
            pauses.append(after)
            if len(pauses) % 6 == 0:
                has_looked.set()
        enqueue(entry, after)

    monkeypatch.setattr(fetcher, "_enqueue", recorded)
    other = NodeCache(tmp_path / "blocks", 10 * SIZE)
    claim = other.claim(name(1), SIZE)
    assert claim is not None
    fetcher.want([(0, 0)])
    assert has_looked.wait(10)
    cache = fetcher._store._cache
    assert cache is not None
    assert pauses[:6] == [0.001, 0.002, 0.004, 0.008, 0.008, 0.008]
    assert cache._lines == 1, "each look wrote to the needs"
    assert other._survey().needed == {name(1)}
    if end == "released":
        with fetcher._changed:
            fetcher.release(0)
    elif end == "waited for":
        reader = threading.Thread(target=lambda: fetcher.get(0), daemon=True)
        reader.start()
        while not fetcher.waits:
            reader.join(0.001)
        begin = len(pauses)
        while len(pauses) < begin + 2:
            reader.join(0.001)
        assert pauses[-1] == 0.001, "the reader waits for the next look"
    claim.write(0, b"x" * SIZE)
    claim.complete()
    if end != "released":
        assert fetcher.get(0) is not None
        assert fetcher._entries[0].pause == 0
        fetcher.release(0)
    deadline = time.monotonic() + 10
    while cache._needed and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not cache._needed


def test_a_block_that_finds_the_disk_full_halfway_stays_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The limit on the size of files stands in for the end of the disk: it is set after room was reserved."""
    monkeypatch.setattr(block_store, "_reported", set())
    content = bytes(range(256)) * (SIZE // 256)
    (tmp_path / "shard").write_bytes(content)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def source_of(shard: int) -> RemoteSource:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, before[1]))
        return RemoteSource(f"file://{tmp_path}/shard")

    fetcher = BlockFetcher(
        lambda key: (0, Block(name(1), 0, len(content), 1)),
        source_of,
        folder=tmp_path / "blocks",
        limit=10 * SIZE,
        max_open_files=8,
    )
    try:
        fetcher.want([(0, 0)])
        block = fetcher.get(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert block is not None
    assert block.read(0, len(content)) == content
    assert "cannot be stored in the folder" in caplog.text
    assert [path.suffix for path in (tmp_path / "blocks").iterdir()] == [".needs"]
    fetcher.release(0)


def test_many_blocks_are_those_that_are_found_one_by_one(fetcher: BlockFetcher) -> None:
    """Whatever became of one of them, and in the order in which they were asked for."""
    fetcher._block_of = lambda key: (0, Block(name(key), 0, SIZE, 1))
    for key in range(4):
        fetcher.want([(key, key)])
    blocks = [fetcher.get(key) for key in range(4)]
    assert None not in blocks
    assert list(fetcher.get_all([2, 0, 2, 3])) == [blocks[2], blocks[0], blocks[2], blocks[3]]
    assert list(fetcher.get_all([1, 7])) == [blocks[1], None], "nobody asked for the last one"
    fetcher.release(0)
    fetcher.forget(1)
    assert list(fetcher.get_all([0, 1, 2])) == [None, None, blocks[2]]
    assert list(fetcher.get_all([])) == []
    assert fetcher._store._cache is not None
    fetcher._store._cache.remove(name(3))
    fetcher._store._files.clear()
    again = list(fetcher.get_all([2, 3]))
    assert [block is not None and block.read(0, 9) for block in again] == [b"x" * 9] * 2, "one was fetched again"
    for key in (1, 2, 3):
        fetcher.release(key)
    assert not fetcher._store._files._entries
    assert not fetcher._store._cache._needed


def test_many_blocks_may_be_in_memory_or_in_either_place(fetcher: BlockFetcher) -> None:
    fetcher._block_of = lambda key: (0, Block(name(key), 0, SIZE, 1))
    fetcher.want([(0, 0)])
    assert fetcher.get(0) is not None
    assert is_on_disk(fetcher, 0)
    fetcher._store._can_store = False
    for key in (1, 2):
        fetcher.want([(key, 0)])
        assert fetcher.get(key) is not None
        assert not is_on_disk(fetcher, key)
    for keys in ([1, 2], [0, 1]):
        assert list(fetcher.get_all(keys)) == [fetcher.get(key) for key in keys]
    for key in range(3):
        fetcher.release(key)
    assert list(fetcher.get_all([0, 1])) == [None, None]


def test_more_blocks_than_may_be_open_are_opened_one_by_one(
    fetcher: BlockFetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetcher._block_of = lambda key: (0, Block(name(key), 0, SIZE, 1))
    monkeypatch.setattr(fetcher._store, "_max_open_files", 3)
    for key in range(4):
        fetcher.want([(key, key)])
        assert fetcher.get(key) is not None
    assert isinstance(fetcher.get_all([0, 1, 2]), list)
    assert isinstance(fetcher.get_all([0, 1, 2, 3]), map)
    assert None not in list(fetcher.get_all([0, 1, 2, 3]))


def test_either_all_of_some_blocks_are_asked_for_or_none(fetcher: BlockFetcher) -> None:
    def block_of(key: int) -> tuple[int, Block]:
        if key > 1:
            raise ShardError("its index cannot be read")
        return 0, Block(name(key), 0, SIZE, 1)

    fetcher._block_of = block_of
    fetcher.want([(0, 0)])
    with pytest.raises(ShardError):
        fetcher.want([(0, 0), (1, 0), (2, 0)])
    assert fetcher.comes(0)
    assert not fetcher.comes(1)
    fetcher.release(0)
    assert not fetcher.comes(0)
