"""Neighbouring blocks of a shard are fetched with one request."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmagent_loader.errors import ShardError
from dmagent_loader.shards.sources import block_store, blocks, fetching, spares
from dmagent_loader.shards.sources.blocks import Block
from dmagent_loader.shards.sources.fetching import BlockFetcher
from dmagent_loader.shards.sources.node_cache import Claim, NodeCache
from dmagent_loader.shards.sources.remote import SinkError

LIMIT = 4000
"""Bytes of a request."""
BETWEEN = 100
"""Bytes between two blocks of a request."""


@pytest.fixture(autouse=True)
def _small_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "REQUEST_BYTES", LIMIT)
    monkeypatch.setattr(blocks, "_MOST_BETWEEN", BETWEEN)
    monkeypatch.setattr(spares, "_SHARE", 0.0)  # those have tests of their own
    monkeypatch.setattr(block_store, "_reported", set())


@pytest.fixture(autouse=True)
def _all_end(_small_requests: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fetchers end with their test: other tests count threads and open files."""
    monkeypatch.setattr(fetching, "_IDLE_SECONDS", 0.05)
    yield
    while made:
        fetcher = made.pop()
        with fetcher._changed:
            for key, entry in list(fetcher._entries.items()):
                for _ in range(entry.uses):
                    fetcher.release(key)
            fetcher._tasks.notify_all()
        assert _comes_true(lambda fetcher=fetcher: not fetcher._threads)


made: list[BlockFetcher] = []
"""All fetchers of a test."""


class Shard:
    """A shard in memory that notes what is read of it.

    Args:
        lengths: Bytes of each block.
        gaps: Bytes before each block.
    """

    def __init__(self, lengths: list[int], gaps: list[int] | None = None) -> None:
        self.blocks: list[Block] = []
        end = 0
        for number, (length, gap) in enumerate(zip(lengths, gaps or [0] * len(lengths), strict=True)):
            self.blocks.append(Block(f"{number:032x}-{end + gap:x}-{length:x}", end + gap, length, 1))
            end += gap + length
        self.content = np.random.default_rng(0).bytes(end)
        self.requests: list[tuple[int, int]] = []
        self.ends_at = end
        self.part = 700
        self.attempts = 1
        self.before: Callable[[int], object] = lambda position: None

    def copy(self, offset: int, length: int, write: Callable[[int, bytes], object]) -> None:
        """Passes on the bytes in parts; each attempt begins anew, and all but the last end early."""
        self.requests.append((offset, length))
        for attempt in range(self.attempts):
            end = min(offset + length, self.ends_at)
            last = end if attempt == self.attempts - 1 else offset + (end - offset) * 3 // 4
            for begin in range(offset, last, self.part):
                self.before(begin)
                try:
                    write(begin - offset, self.content[begin : min(begin + self.part, last)])
                except OSError as error:
                    raise SinkError(error) from error
        if end < offset + length:
            raise ShardError("the shard ends early")

    def read(self, offset: int, length: int) -> bytearray:
        self.requests.append((offset, length))
        return bytearray(self.content[offset : offset + length])

    def numbers(self) -> list[list[int]]:
        """The blocks of each request."""
        return [
            [n for n, block in enumerate(self.blocks) if offset <= block.start and block.start + block.length <= end]
            for offset, end in ((offset, offset + length) for offset, length in self.requests)
        ]


def fetcher_of(shard: Shard, folder: Path, limit: int | None = None) -> BlockFetcher:
    source: Any = shard
    fetcher = BlockFetcher(
        lambda key: (0, shard.blocks[key]),
        lambda number: source,
        folder=folder,
        limit=limit,
        max_open_files=1000,
        block_behind=lambda key: shard.blocks[key + 1] if key + 1 < len(shard.blocks) else None,
    )
    made.append(fetcher)
    return fetcher


def found(fetcher: BlockFetcher, shard: Shard, key: int) -> bool:
    """Whether a block comes; if it does, with its bytes."""
    source, block = fetcher.get(key), shard.blocks[key]
    if source is None:
        return False
    assert source.read(block.start, block.length) == shard.content[block.start : block.start + block.length]
    return True


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(
        st.tuples(
            st.integers(1, 1900), st.sampled_from([0, 0, 10, BETWEEN, BETWEEN + 1]), st.booleans(), st.integers(0, 9)
        ),
        min_size=1,
        max_size=12,
    ),
    in_memory=st.booleans(),
    attempts=st.integers(1, 2),
)
def test_every_block_is_fetched_once_with_neighbours_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int, bool, int]], in_memory: bool, attempts: int
) -> None:
    shard = Shard([length for length, *_ in shapes], [gap for _, gap, *_ in shapes])
    shard.attempts = attempts
    wanted = {key: urgency for key, (*_, is_wanted, urgency) in enumerate(shapes) if is_wanted}
    fetcher = fetcher_of(shard, tmp_path_factory.mktemp("blocks"), 0 if in_memory else None)
    fetcher.want(wanted.items())
    assert all(found(fetcher, shard, key) for key in wanted)
    requests = shard.numbers()
    assert sorted(key for numbers in requests for key in numbers) == sorted(wanted)
    for (offset, length), numbers in zip(shard.requests, requests, strict=True):
        first, last = (shard.blocks[number] for number in (numbers[0], numbers[-1]))
        assert (offset, offset + length) == (first.start, last.start + last.length)
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert len(numbers) == 1 or sum(shard.blocks[number].length for number in numbers) <= LIMIT
        assert all(shapes[number][1] <= BETWEEN for number in numbers[1:])
    for key in wanted:
        fetcher.release(key)


def test_one_request_brings_all_that_fits(tmp_path: Path) -> None:
    shard = Shard([1000] * 10, [0, *[60] * 9])
    fetcher = fetcher_of(shard, tmp_path)
    fetcher.want((key, key) for key in range(10))
    assert all(found(fetcher, shard, key) for key in range(10))
    assert sorted(shard.numbers()) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_blocks_on_both_sides_of_the_most_urgent_one_come_with_it(tmp_path: Path) -> None:
    shard = Shard([1000] * 4)
    fetcher = fetcher_of(shard, tmp_path)
    fetcher.want([(0, 3), (1, 2), (2, 1), (3, 9)])
    assert all(found(fetcher, shard, key) for key in range(4))
    assert shard.numbers() == [[0, 1, 2, 3]]


def test_blocks_before_the_end_of_a_shard_that_became_shorter_are_kept(tmp_path: Path) -> None:
    shard = Shard([1000] * 4)
    shard.ends_at = 2500
    fetcher = fetcher_of(shard, tmp_path)
    fetcher.want((key, key) for key in range(4))
    assert [found(fetcher, shard, key) for key in range(4)] == [True, True, False, False]
    assert [path.suffix for path in sorted(tmp_path.iterdir(), key=lambda path: path.suffix)] == [
        ".block",
        ".block",
        ".needs",
    ]
    for key in range(4):
        fetcher.release(key)


def test_what_a_full_disk_does_not_take_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = Claim.write, []

    def limited(claim: Claim, position: int, data: bytes) -> None:
        written.append(len(data))
        if sum(written) > 1500:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(claim, position, data)

    monkeypatch.setattr(Claim, "write", limited)
    shard = Shard([1000] * 3)
    fetcher = fetcher_of(shard, tmp_path)
    fetcher.want((key, key) for key in range(3))
    assert all(found(fetcher, shard, key) for key in range(3))
    assert [fetcher._entries[key].stored.data is not None for key in range(3)] == [False, True, True]
    assert len([path for path in tmp_path.iterdir() if path.suffix == ".block"]) == 1
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".partial"]
    assert fetcher._store._memory_bytes == 2000
    for key in range(3):
        fetcher.release(key)
    assert fetcher._store._memory_bytes == 0


def test_a_block_that_another_process_fetches_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks around it are not neighbours of each other, so it does not come with them."""
    monkeypatch.setattr(blocks, "_MOST_BETWEEN", 10_000)
    shard = Shard([500] * 3)
    other = NodeCache(tmp_path, None)
    claim = other.claim(shard.blocks[1].name, 500)
    assert claim is not None
    fetcher = fetcher_of(shard, tmp_path)
    fetcher.want((key, key) for key in range(3))
    assert found(fetcher, shard, 0)
    assert found(fetcher, shard, 2)
    assert sorted(shard.numbers()) == [[0], [2]]
    claim.write(0, shard.content[500:1000])
    claim.complete()
    assert found(fetcher, shard, 1)
    assert len(shard.requests) == 2


def _is_fetching(fetcher: BlockFetcher, key: int) -> bool:
    return fetcher._entries[key].state is fetching._State.FETCHING


def _comes_true(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


@pytest.fixture
def held() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_blocks_that_are_being_fetched_are_not_cancelled_or_fetched_again(
    tmp_path: Path, held: threading.Event
) -> None:
    shard = Shard([1000] * 3)
    shard.before = lambda position: held.wait(30)
    fetcher = fetcher_of(shard, tmp_path)
    fetcher.want((key, key) for key in range(3))
    assert _comes_true(lambda: all(_is_fetching(fetcher, key) for key in range(3)))
    assert not any(fetcher.cancel(key) for key in range(3))
    fetcher.release(1)  # whoever wanted it is gone
    held.set()
    assert found(fetcher, shard, 0)
    assert found(fetcher, shard, 2)
    assert shard.numbers() == [[0, 1, 2]]
    fetcher.want([(1, 0)])
    assert found(fetcher, shard, 1)
    assert len(shard.requests) == 1, "it is on disk"


def test_a_reader_waits_as_long_as_a_request_for_all_neighbours_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: threading.Event
) -> None:
    """A block of 1000 bytes may take 0.11 s, and a request for four of them 0.41 s."""
    monkeypatch.setenv("DMAGENT_REMOTE_TIMEOUT", "0.01")
    monkeypatch.setattr(fetching, "SLOWEST_BYTES_PER_SECOND", 10_000)
    shard = Shard([1000] * 4)
    shard.part = 4000
    shard.before = lambda position: held.wait(0.25)
    fetcher = fetcher_of(shard, tmp_path)
    fetcher.want((key, key) for key in range(4))
    assert found(fetcher, shard, 0)
    assert shard.numbers() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("case", ["on disk", "no room", "behind one of another process"])
def test_what_need_not_be_fetched_does_not_wait_for_the_request_of_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: threading.Event, case: str
) -> None:
    monkeypatch.setattr(block_store, "_MEMORY_BYTES", 1000)
    monkeypatch.setattr(fetching, "timeout_seconds", lambda: 10.0)
    shard = Shard([1000] * 3)
    shard.before = lambda position: held.wait(10) if position < 1000 else None
    fetcher = fetcher_of(shard, tmp_path, 0 if case == "no room" else None)
    other = NodeCache(tmp_path, None)
    claim = other.claim(shard.blocks[1].name, 1000)
    assert claim is not None
    if case == "on disk":
        claim.write(0, shard.content[1000:2000])
        claim.complete()
    fetcher.want((key, key) for key in range(3))
    expected = {"on disk": (1, True), "no room": (1, False), "behind one of another process": (2, True)}[case]
    begin = time.monotonic()
    assert (expected[0], found(fetcher, shard, expected[0])) == expected
    assert time.monotonic() - begin < 5
    assert _is_fetching(fetcher, 0)
    held.set()
    assert found(fetcher, shard, 0)
    if case != "on disk":
        claim.give_back()
    for key in range(3):
        fetcher.release(key)
    assert _comes_true(lambda: fetcher._fetched_bytes == fetcher._store._memory_bytes == 0)


@pytest.fixture
def with_spares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Shard, BlockFetcher]:
    """A fetcher that may fetch as many spare blocks as others, and has block 0."""
    monkeypatch.setattr(spares, "_SHARE", 1.0)
    shard = Shard([1000] * 20)
    fetcher = fetcher_of(shard, tmp_path)
    fetcher.want([(0, 0)])
    assert found(fetcher, shard, 0)
    assert shard.numbers() == [[0]], "the folder is not open yet"
    shard.requests.clear()
    return shard, fetcher


def test_a_spare_block_is_there_when_it_is_asked_for(with_spares: tuple[Shard, BlockFetcher]) -> None:
    shard, fetcher = with_spares
    fetcher.want([(5, 0)])
    assert found(fetcher, shard, 5)
    assert shard.numbers() == [[5, 6, 7]]
    fetcher.want([(6, 0), (7, 0)])
    assert found(fetcher, shard, 6)
    assert found(fetcher, shard, 7)
    assert shard.numbers() == [[5, 6, 7]], "a spare block was worth a request of its own"


def test_a_spare_block_that_is_asked_for_while_it_comes_is_not_fetched_again(
    with_spares: tuple[Shard, BlockFetcher], held: threading.Event
) -> None:
    shard, fetcher = with_spares
    shard.before = lambda position: held.wait(30)
    fetcher.want([(5, 0)])
    assert _comes_true(lambda: len(shard.requests) == 1)
    fetcher.want([(6, 0)])
    assert _comes_true(lambda: fetcher._entries[6].pause > 0)
    held.set()
    assert found(fetcher, shard, 6)
    assert shard.numbers() == [[5, 6, 7]]


def test_a_block_that_would_have_to_be_looked_up_is_not_spare(with_spares: tuple[Shard, BlockFetcher]) -> None:
    """The index of its shard may be gone from memory: it is not read for that, while others wait for the lock."""
    shard, fetcher = with_spares
    block_of, asked = fetcher._block_of, []

    def recorded(key: int) -> tuple[int, Block]:
        asked.append(key)
        return block_of(key)

    fetcher._block_of, fetcher._block_behind = recorded, lambda key: shard.blocks[key + 1] if key < 5 else None
    fetcher.want([(4, 0)])
    assert found(fetcher, shard, 4)
    assert asked == [4]
    assert shard.numbers() == [[4, 5]]
    assert _comes_true(lambda: fetcher._fetched_bytes == 0)


def test_a_spare_block_that_others_have_stored_does_not_count(
    with_spares: tuple[Shard, BlockFetcher], tmp_path: Path
) -> None:
    shard, fetcher = with_spares
    other = NodeCache(tmp_path, None)
    for block in shard.blocks[6:8]:
        claim = other.claim(block.name, block.length)
        assert claim is not None
        claim.write(0, shard.content[block.start : block.start + block.length])
        claim.complete()
    for key in (5, 12):
        fetcher.want([(key, 0)])
        assert found(fetcher, shard, key)
    assert shard.numbers() == [[5], [12, 13, 14, 15]]


def test_blocks_that_are_not_fetched_in_the_end_allow_no_spare_ones(
    with_spares: tuple[Shard, BlockFetcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each new mix cancels blocks that lie ahead, and most of them are asked for again."""
    shard, fetcher = with_spares
    monkeypatch.setattr(spares, "_SHARE", 0.5)
    with fetcher._changed:
        for _ in range(10):
            fetcher.want([(10, 0)])
            assert fetcher.cancel(10)
    fetcher.want([(5, 0)])
    assert found(fetcher, shard, 5)
    assert shard.numbers() == [[5, 6]]


def test_a_spare_block_that_was_evicted_before_it_was_asked_for_counts(
    with_spares: tuple[Shard, BlockFetcher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a full folder, blocks that nobody needs go first."""
    shard, fetcher = with_spares
    monkeypatch.setattr(spares, "_SHARE", 0.5)
    for key in (5, 6, 12):
        fetcher.want([(key, 0)])
        assert found(fetcher, shard, key)
        if key == 5:
            (tmp_path / f"{shard.blocks[6].name}.block").unlink()
    assert shard.numbers() == [[5, 6], [6], [12, 13]]


def test_memory_that_the_system_refuses_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Shard([1000] * 3)
    fetcher, given = fetcher_of(shard, tmp_path, 0), []

    def refused(length: int) -> bytearray:
        given.append(length)
        if len(given) == 2:
            raise MemoryError
        return bytearray(length)

    monkeypatch.setattr(block_store, "bytearray", refused, raising=False)
    fetcher.want((key, key) for key in range(3))
    assert not any(found(fetcher, shard, key) for key in range(3))
    assert fetcher._store._memory_bytes == 0
