"""A folder of blocks: each is fetched by one, kept while someone needs it, and the limit holds."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from node_blocks import SIZE, fetch, name

from dmagent_loader.shards.sources.node_cache import BlockInUse, NodeCache


def held(cache: NodeCache, numbers: range = range(64)) -> set[int]:
    return {number for number in numbers if cache.holds(name(number), SIZE)}


def used(number: int, cache: NodeCache, seconds_ago: float) -> None:
    """Sets the time at which a block was used last, relative to the start of this cache."""
    time = cache._began - seconds_ago
    os.utime(cache.path(name(number)), (time, time))


def test_one_process_fetches_and_the_others_find_the_block(tmp_path: Path) -> None:
    first, second = NodeCache(tmp_path, 10 * SIZE), NodeCache(tmp_path, 10 * SIZE)
    claim = first.claim(name(1), SIZE)
    assert claim is not None
    with pytest.raises(BlockInUse):
        second.claim(name(1), SIZE)
    assert not second.holds(name(1), SIZE), "a block that is being fetched was found"
    claim.write(0, b"x" * SIZE)
    claim.complete()
    assert second.holds(name(1), SIZE)
    assert Path(second.path(name(1))).read_bytes() == b"x" * SIZE
    with pytest.raises(BlockInUse):
        second.claim(name(1), SIZE)


def test_a_claim_that_is_given_back_is_another_ones(tmp_path: Path) -> None:
    first, second = NodeCache(tmp_path, 10 * SIZE), NodeCache(tmp_path, 10 * SIZE)
    claim = first.claim(name(1), SIZE)
    assert claim is not None
    claim.give_back()
    assert fetch(second, 1)


def test_the_limit_holds_and_unneeded_blocks_make_room(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 4 * SIZE)
    for number in range(20):
        assert fetch(cache, number)
        assert len(held(cache)) <= 4
    assert 19 in held(cache)


def test_blocks_from_before_go_first_then_those_used_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmagent_loader.shards.sources.node_cache._EVICTED_SHARE", 0.0)
    cache = NodeCache(tmp_path, 5 * SIZE)
    for number in range(5):
        assert fetch(cache, number)
    for number, seconds_ago in enumerate((100, 200, -10, -30, -20)):
        used(number, cache, seconds_ago)
    order = []
    for number in range(5, 10):
        before = held(cache)
        assert fetch(cache, number)
        order += sorted(before - held(cache))
        used(number, cache, 0)
        cache.need(name(number))
    assert order == [1, 0, 3, 4, 2]


@pytest.mark.parametrize(("length", "num_needed"), [(11 * SIZE, 0), (8 * SIZE, 3)])
def test_nothing_is_evicted_for_a_block_that_finds_no_room_anyway(tmp_path: Path, length: int, num_needed: int) -> None:
    cache = NodeCache(tmp_path, 10 * SIZE)
    for number in range(9):
        assert fetch(cache, number)
        if number < num_needed:
            cache.need(name(number))
    assert cache.claim(f"{99:032x}-0-{length:x}", length) is None
    assert held(cache) == set(range(9))


def test_what_another_process_needs_is_not_evicted(tmp_path: Path) -> None:
    first, second = NodeCache(tmp_path, 3 * SIZE), NodeCache(tmp_path, 3 * SIZE)
    for number in (1, 2, 3):
        second.need(name(number))
        assert fetch(first, number)
    assert not fetch(first, 4), "there was room, although everything is needed"
    assert held(first) == {1, 2, 3}
    second.release(name(2))
    assert fetch(first, 4)
    assert held(first) == {1, 3, 4}


def test_a_block_that_is_completed_during_a_look_counts(tmp_path: Path) -> None:
    """Otherwise the limit is exceeded: neither its old nor its new name need be found."""

    class Listed(NodeCache):
        """Completes a block between the list of the files and the look at each."""

        def _files(self) -> list[str]:
            files = super()._files()
            if claim is not None and f"{name(1)}.partial" in files:
                claim.write(0, b"x" * SIZE)
                claim.complete()
            return files

    claim = None
    cache = Listed(tmp_path, SIZE)
    other = NodeCache(tmp_path, SIZE)
    other.need(name(1))
    claim = other.claim(name(1), SIZE)
    assert cache.claim(name(2), SIZE) is None
    assert cache.holds(name(1), SIZE)


def test_needs_that_a_full_disk_has_cut_keep_nobody_from_fetching(tmp_path: Path) -> None:
    first, second = NodeCache(tmp_path, 2 * SIZE), NodeCache(tmp_path, 2 * SIZE)
    second.need(name(1))
    with Path(second._needs[1]).open("ab") as file:
        file.write(b"=12+" + name(2).encode() + b"\n\xff\n")
    for number in (1, 2, 3):
        assert fetch(first, number)
    assert 1 in held(first)


def test_nothing_is_evicted_where_the_needs_of_others_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a moment the process has no free descriptors."""
    first, second, opened = NodeCache(tmp_path, 3 * SIZE), NodeCache(tmp_path, 3 * SIZE), os.open

    def refused(path: Any, *arguments: Any) -> int:
        if str(path).endswith(".needs"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opened(path, *arguments)

    for number in (1, 2):
        second.need(name(number))
        assert fetch(second, number)
    assert fetch(first, 3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        assert not fetch(first, 4)
        assert held(first) == {1, 2, 3}
    assert fetch(first, 4)
    assert held(first) == {1, 2, 4}


@pytest.mark.parametrize("seed", range(5))
def test_the_limit_holds_for_all_processes_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Each process may add some blocks before it looks through the folder again."""
    monkeypatch.setattr("dmagent_loader.shards.sources.node_cache._ALLOWANCE", 8)
    limit, random = 40 * SIZE, np.random.default_rng(seed)
    caches = [NodeCache(tmp_path, limit) for _ in range(3)]
    number = 0
    for _ in range(150):
        cache = caches[random.integers(3)]
        for _ in range(random.integers(1, 9)):
            number += 1
            cache.need(name(number))
            fetch(cache, number)
            if random.random() < 0.5:
                cache.release(name(number))
        assert sum(path.stat().st_size for path in tmp_path.glob("*.block")) <= limit
    assert len(list(tmp_path.glob("*.block"))) > 20


@pytest.mark.parametrize("num_written", [0, 7])
def test_a_release_that_a_full_disk_loses_is_noted_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_written: int
) -> None:
    first, second = NodeCache(tmp_path, 3 * SIZE), NodeCache(tmp_path, 3 * SIZE)
    for number in (1, 2, 3):
        second.need(name(number))
        assert fetch(second, number)
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if num_written:
            return write(descriptor, data[:num_written])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        second.release(name(1))
        second.release(name(2))
    second.need(name(4))
    assert first._survey().needed == {name(3), name(4)}
    assert fetch(first, 5)


def test_a_block_that_is_needed_twice_is_released_twice(tmp_path: Path) -> None:
    first, second = NodeCache(tmp_path, SIZE), NodeCache(tmp_path, SIZE)
    second.need(name(1))
    second.need(name(1))
    second.release(name(1))
    assert fetch(first, 1)
    assert not fetch(first, 2)
    second.release(name(1))
    assert fetch(first, 2)


def test_needs_are_rewritten_before_their_file_grows_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmagent_loader.shards.sources.node_cache._REWRITTEN_LINES", 10)
    first, second = NodeCache(tmp_path, 2 * SIZE), NodeCache(tmp_path, 2 * SIZE)
    second.need(name(1))
    assert fetch(first, 1)
    for number in range(10, 60):
        second.need(name(number))
        second.release(name(number))
    assert os.stat(second._needs[1]).st_size < 20 * len(name(1))
    assert fetch(first, 2)
    assert fetch(first, 3)
    assert 1 in held(first)


def test_leftovers_are_removed_at_the_start_and_nothing_else(tmp_path: Path) -> None:
    first = NodeCache(tmp_path, 10 * SIZE)
    claim = first.claim(name(1), SIZE)
    leftovers = [tmp_path / f"{name(2)}.partial", tmp_path / f"{'0' * 32}.needs"]
    foreign = [tmp_path / "results.partial", tmp_path / "notes.needs", tmp_path / "a.block"]
    for path in leftovers + foreign:
        path.write_bytes(b"?" * SIZE)
    NodeCache(tmp_path, 10 * SIZE)
    assert not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in foreign)
    assert claim is not None
    claim.write(0, b"x" * SIZE)
    claim.complete()
    assert first.holds(name(1), SIZE)


def test_a_file_that_another_process_takes_for_a_leftover_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks start together, and each looks for leftovers. A file can be seen before its owner has locked it."""
    other, looks, flock = NodeCache(tmp_path, 10 * SIZE), [1, 2], fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        if looks:
            looks.pop()
            other._survey()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    cache = NodeCache(tmp_path, 10 * SIZE)
    assert not looks, "nobody looked for leftovers"
    cache.need(name(1))
    assert name(1) in other._survey().needed
    assert fetch(cache, 1)


def test_a_folder_without_locks_is_refused_and_left_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without)
    with pytest.raises(OSError, match="no locks"):
        NodeCache(tmp_path, 10 * SIZE)
    assert not list(tmp_path.iterdir())


def test_leftovers_take_no_room_and_no_part_in_their_block(tmp_path: Path) -> None:
    """Those of processes that are killed later than this one starts."""
    cache = NodeCache(tmp_path, 3 * SIZE)
    for number, length in ((1, SIZE // 2), (2, SIZE), (3, SIZE)):
        (tmp_path / f"{name(number)}.partial").write_bytes(b"?" * length)
    for number in (1, 4, 5):
        cache.need(name(number))
        assert fetch(cache, number)
        assert Path(cache.path(name(number))).read_bytes() == bytes([number]) * SIZE
    assert not fetch(cache, 6)


def test_a_block_that_was_cut_is_fetched_again(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 10 * SIZE)
    assert fetch(cache, 1)
    os.truncate(cache.path(name(1)), SIZE // 2)
    assert not cache.holds(name(1), SIZE)
    assert fetch(cache, 1)


def test_a_block_that_cannot_be_written_is_given_back(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 10 * SIZE)
    claim = cache.claim(name(1), SIZE)
    assert claim is not None
    os.unlink(tmp_path / f"{name(1)}.partial")
    claim.write(0, b"x" * SIZE)
    with pytest.raises(OSError) as error:
        claim.complete()
    assert error.value.errno == errno.ENOENT
    assert fetch(cache, 1)


def test_a_claim_whose_file_was_removed_touches_no_file_of_another(tmp_path: Path) -> None:
    """Someone may empty the folder. The file of the other has its full length before the first byte has arrived."""
    caches = [NodeCache(tmp_path, 10 * SIZE) for _ in range(3)]
    claims = []
    for cache in caches:
        claims.append(cache.claim(name(1), SIZE))
        if cache is not caches[2]:
            os.unlink(tmp_path / f"{name(1)}.partial")
    first, second, last = claims
    assert first is not None
    assert second is not None
    assert last is not None
    first.write(0, b"x" * SIZE)
    with pytest.raises(FileNotFoundError):
        first.complete()
    second.give_back()
    assert not caches[0].holds(name(1), SIZE), "an unfinished block became visible"
    last.write(0, b"y" * SIZE)
    last.complete()
    assert Path(caches[0].path(name(1))).read_bytes() == b"y" * SIZE


def test_needs_are_written_again_when_their_file_or_the_folder_was_removed(tmp_path: Path) -> None:
    folder, before = tmp_path / "blocks", set(os.listdir("/proc/self/fd"))
    first = NodeCache(folder, 2 * SIZE)
    first.need(name(1))
    shutil.rmtree(folder)
    first.need(name(2))
    assert fetch(first, 1)
    assert fetch(first, 2)
    second = NodeCache(folder, 2 * SIZE)
    assert not fetch(second, 3), "blocks that another process needs were evicted"
    first.release(name(1))
    assert fetch(second, 3)
    assert held(second) == {2, 3}
    del first, second
    assert set(os.listdir("/proc/self/fd")) <= before
    assert not list(folder.glob("*.needs"))


def test_a_folder_that_is_not_used_any_more_is_left(tmp_path: Path) -> None:
    """Neither a file nor a descriptor stays: a notebook opens shards many times."""
    before = set(os.listdir("/proc/self/fd"))
    cache = NodeCache(tmp_path, 10 * SIZE)
    assert fetch(cache, 1)
    del cache
    assert set(os.listdir("/proc/self/fd")) <= before
    assert not list(tmp_path.glob("*.needs"))


def test_a_limit_that_is_not_given_leaves_half_of_the_disk(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    limit = NodeCache(tmp_path, None)._limit
    assert min(64 << 30, 0.4 * free) < limit <= min(64 << 30, 0.6 * free)
