"""Fetching blocks of remote shards in the background: many requests at a time, in the order of need.

The requests of asynchronous filesystems run on the event loop of fsspec; each has a thread that waits for it, repeats
it and stores the block (`block_store`). Where there is no room for a block, or it cannot be fetched, its rows are read
one by one, and fail one by one.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from enum import Enum
from functools import partial
from pathlib import Path

from dmagent_loader.errors import ShardError, ShardNotFoundError
from dmagent_loader.shards import forks
from dmagent_loader.shards.sources.block_sources import BlockSource
from dmagent_loader.shards.sources.block_store import BlockStore, Outcome, Outcomes, StoredBlock
from dmagent_loader.shards.sources.blocks import REQUEST_BYTES, Block, is_behind
from dmagent_loader.shards.sources.calls import SLOWEST_BYTES_PER_SECOND, timeout_seconds
from dmagent_loader.shards.sources.remote import RemoteSource
from dmagent_loader.shards.sources.spares import Spares

FETCHES = 32
"""Requests in flight, in each process."""
FETCHED_BYTES = 256 << 20
"""Memory for blocks in flight; one block may be larger."""
_IDLE_SECONDS = 5.0
"""Time after which a thread without work ends."""
_MOST_RARELY_SECONDS = 0.5
"""Between two looks at a block that another process is fetching, after many of them: each takes 0.3 ms of CPU time, and
there may be hundreds of blocks."""

logger = logging.getLogger(__name__)


class _State(Enum):
    QUEUED = "queued"
    FETCHING = "being fetched"
    NO_ROOM = "no room yet"
    HERE = "here"
    FAILED = "not to be had"


_NO_TURN = -1
_HERE = _State.HERE
"""A name of its own, as that of a member of an enumeration takes ten times as long to look up."""
_WAITING, _NOT_COMING = (_State.QUEUED, _State.NO_ROOM), (_State.NO_ROOM, _State.FAILED)
_COMING = (_State.QUEUED, _State.FETCHING)
_STATES = {
    Outcome.FOUND: _State.HERE,
    Outcome.ON_DISK: _State.HERE,
    Outcome.IN_MEMORY: _State.HERE,
    Outcome.NOT_YET: _State.QUEUED,
    Outcome.LEFT_OUT: _State.QUEUED,
    Outcome.NO_ROOM: _State.NO_ROOM,
    Outcome.FAILED: _State.FAILED,
}


class _Entry:
    """A block that was asked for."""

    __slots__ = ("block", "key", "pause", "shard", "state", "stored", "turn", "urgency", "uses")

    def __init__(self, key: int, shard: int, block: Block, urgency: int, uses: int = 1) -> None:
        self.key, self.shard, self.block, self.urgency = key, shard, block, urgency
        self.uses = uses
        """Uses that were not released yet; none of a spare block (`_add_spares`)."""
        self.state = _State.QUEUED
        self.stored = StoredBlock(block, is_spare=not uses)
        self.pause = 0.0
        """Seconds between the last two looks at the block, if another process is fetching it."""
        self.turn = _NO_TURN
        """Number of its newest place in the queues; older ones do not count."""


class BlockFetcher:
    """The blocks that one process has asked for.

    Safe to use from many threads. A forked child starts without blocks. One lock guards all that is here: the entries,
    the queues, and the number of threads; the places of blocks share it (`BlockStore`). It is not held during requests.

    Args:
        block_of: Function from the key of a block to the number of its shard and the block.
        source_of: Function from the number of a shard to the remote shard.
        folder: Folder of the node; None: `block_store.default_block_folder`.
        limit: Largest number of bytes in the folder; None: see `NodeCache`; 0: blocks stay in memory.
        max_open_files: Largest number of open blocks.
        block_behind: Function from the key of a block to the one behind it in its shard; None: there is none, or it
            would take long to look it up. It is called under the lock.

    Attributes:
        waits: Number of times that a reader had to wait for a block.
    """

    def __init__(
        self,
        block_of: Callable[[int], tuple[int, Block]],
        source_of: Callable[[int], RemoteSource],
        *,
        folder: Path | None,
        limit: int | None,
        max_open_files: int,
        block_behind: Callable[[int], Block | None] = lambda key: None,
    ) -> None:
        self._block_of, self._source_of, self._block_behind = block_of, source_of, block_behind
        self._folder, self._limit, self._max_open_files = folder, limit, max_open_files
        self._start()
        forks.register(self)

    def _start(self) -> None:
        lock = threading.RLock()
        self._changed, self._tasks = threading.Condition(lock), threading.Condition(lock)
        """Of one lock: for readers that wait for a block, and for threads that wait for work."""
        self._store = BlockStore(self._folder, self._limit, max_open_files=self._max_open_files, lock=lock)
        self._is_timed = False
        """Whether a thread waits for the first of the blocks that are to be tried later."""
        self._entries: dict[int, _Entry] = {}
        self._queue: list[tuple[int, int, _Entry]] = []
        self._later: list[tuple[float, int, _Entry]] = []
        self._number = itertools.count()
        self._dropped: deque[int] = deque()
        """Keys that finalizers have released, once for each use."""
        self._threads = self._idle = self._fetched_bytes = 0
        self._full_until = 0.0
        """Until then no other block looks for room."""
        self._wanted_bytes = self._wanted_rows = self.waits = 0
        self._spares = Spares()

    def reset_after_fork(self) -> None:
        """Forgets the blocks of the parent in a forked child."""
        self._start()

    @property
    def can_store(self) -> bool | None:
        """Whether blocks go to the folder of the node; None: it is not open yet."""
        return self._store.can_store

    # Asking for blocks

    def want(self, keys: Iterable[tuple[int, int]]) -> None:
        """Has blocks fetched, and each of them kept until as many calls of `release`; if this raises, none of them is.

        Args:
            keys: Key of each block, and its urgency: the lower, the sooner it is fetched.
        """
        keys = list(keys)
        with self._changed:  # of all: a thread that takes the first one sees its neighbours
            self._release_dropped()
            found = {key: self._block_of(key) for key, _ in keys if key not in self._entries}
            for key, urgency in keys:
                entry = self._entries.get(key)
                if entry is not None:
                    entry.uses += 1
                    continue
                entry = self._entries[key] = _Entry(key, *found[key], urgency)
                self._spares.count_asked(entry.block.length)
                self._wanted_bytes += entry.block.length
                self._wanted_rows += entry.block.rows
                self._enqueue(entry)

    @property
    def mean_row_bytes(self) -> float:
        """Mean bytes per row of the blocks that were asked for; 0 if there are none."""
        return self._wanted_bytes / max(1, self._wanted_rows)

    def release(self, key: int) -> None:
        """Ends one use of a block."""
        with self._changed:
            self._release_dropped()
            self._release(key)

    def release_later(self, keys: Iterable[int]) -> None:
        """Ends one use of each block soon: `release` for a finalizer, which takes no lock.

        The garbage collector calls finalizers at any allocation, in any thread, and this thread may hold a lock of the
        fetcher or of its folder.
        """
        self._dropped.extend(keys)

    def _release_dropped(self) -> None:
        """Ends the uses that finalizers have left; the caller holds the lock."""
        while self._dropped:
            self._release(self._dropped.popleft())

    def _release(self, key: int) -> None:
        entry = self._entries[key]
        entry.uses -= 1
        if entry.uses:
            return
        del self._entries[key]
        if entry.state in _WAITING:
            self._spares.count_asked(-entry.block.length)
        if entry.state is _State.HERE:
            self._store.release(entry.stored)
        else:
            self._fail(entry)  # whoever waits for the block would wait in vain

    def comes(self, key: int) -> bool:
        """Whether a block is here or on its way; otherwise its rows have to be read one by one."""
        entry = self._entries.get(key)
        return entry is not None and entry.state not in _NOT_COMING

    def cancel(self, key: int) -> bool:
        """Ends one use of a block, unless it is here or being fetched."""
        if self._entries[key].state not in _WAITING:  # mostly, and seen without the lock
            return False
        with self._changed:
            waits = self._entries[key].state in _WAITING
            if waits:
                self.release(key)
            return waits

    def get(self, key: int) -> BlockSource | None:
        """The block, as a source for its part of the shard; waits if it is being fetched.

        Returns:
            None if the block was not asked for, or cannot be had: the shard is to be read.
        """
        while (entry := self._entries.get(key)) is not None:
            state = entry.state
            if state is _HERE:
                try:
                    block = self._store.open(entry.stored)
                except ShardNotFoundError:  # it was removed: it is fetched again
                    with self._changed:
                        if entry.uses and entry.state is _State.HERE:
                            self._store.release(entry.stored)
                            self._enqueue(entry)
                    continue
                if block is None:
                    with self._changed:
                        if entry.uses and entry.state is _State.HERE:
                            self._fail(entry)
                return block
            if state in _NOT_COMING or not self._wait(entry):
                return None
        return None

    def get_all(self, keys: list[int]) -> Iterable[BlockSource | None]:
        """As `get`, for many keys; faster than a call for each if all blocks are here."""
        with contextlib.suppress(KeyError, ShardError):  # `get` says what that means
            stored = [entry.stored for entry in map(self._entries.__getitem__, keys) if entry.state is _HERE]
            if len(stored) == len(keys) and (blocks := self._store.open_all(stored)) is not None:
                return blocks
        return map(self.get, keys)

    def forget(self, key: int) -> None:
        """Removes a block whose bytes are wrong, and has its rows read from the shard."""
        with self._changed:
            entry = self._entries.get(key)
            if entry is None:
                return
            if entry.state is _State.HERE:
                self._store.remove(entry.stored)
            self._fail(entry)

    def _fail(self, entry: _Entry) -> None:
        """Has the rows of a block read from the shard; the caller holds the lock."""
        if entry.state is not _State.FETCHING:  # otherwise the thread that fetches it releases it
            self._store.release(entry.stored)
        entry.state = _State.FAILED
        self._changed.notify_all()

    def _wait(self, entry: _Entry) -> bool:
        """Waits until a block is here or released, for as long as one request may take; False: it did not come."""
        patience = timeout_seconds() + max(entry.block.length, REQUEST_BYTES) / SLOWEST_BYTES_PER_SECOND
        with self._changed:
            self.waits += 1
            if entry.uses and entry.state in _COMING and entry.urgency > -1:
                entry.urgency = -1
                if entry.state is _State.QUEUED:
                    self._enqueue(entry)
            if not self._threads:
                self._start_thread()
                if not self._threads:
                    return False
            if self._changed.wait_for(lambda: not entry.uses or entry.state not in _COMING, patience):
                return True
            self._fail(entry)
            return False

    # Fetching

    def _enqueue(self, entry: _Entry, after: float = 0.0) -> None:
        """Puts a block into the queue; the caller holds the lock."""
        number = entry.turn = next(self._number)
        if after:
            heapq.heappush(self._later, (time.monotonic() + after, number, entry))
        else:
            entry.state = _State.QUEUED
            heapq.heappush(self._queue, (entry.urgency, number, entry))
        if self._idle < len(self._queue) and self._threads < FETCHES:
            self._start_thread()
        self._tasks.notify()

    def _start_thread(self) -> None:
        """Starts a thread if the system allows another one; the caller holds the lock."""
        try:
            threading.Thread(target=self._work, args=(self._tasks,), name="dmagent-fetch", daemon=True).start()
        except RuntimeError as error:
            logger.debug("%d threads fetch blocks, and another one could not be started: %s", self._threads, error)
        else:
            self._threads += 1

    def _work(self, tasks: threading.Condition) -> None:
        """Fetches blocks until there are none. `tasks` stays that of this process in a forked child."""
        while run := self._next(tasks):
            entries = {entry.stored: entry for entry in run}
            settle = partial(self._settle_all, tasks, entries)
            try:
                self._store.obtain(list(entries), partial(self._source_of, run[0].shard), settle)
            finally:
                settle(dict.fromkeys(entries, (Outcome.FAILED, 0.0)))

    def _settle_all(self, tasks: threading.Condition, entries: dict[StoredBlock, _Entry], outcomes: Outcomes) -> None:
        """Records what came of some blocks of a run, and takes them from `entries`: the others of the run."""
        if not outcomes:
            return
        with tasks:
            for stored, (outcome, after) in outcomes.items():
                entry = entries.pop(stored)
                if outcome is Outcome.NO_ROOM:
                    self._full_until = time.monotonic() + after
                self._fetched_bytes -= entry.block.length
                self._settle(entry, _STATES[outcome], after)
                if stored.is_spare:
                    self._settle_spare(entry.key, outcome)
                elif outcome is Outcome.FOUND:
                    self._spares.remove(entry.key)  # it has paid off, if it was one
            self._changed.notify_all()
            tasks.notify()

    def _settle(self, entry: _Entry, state: _State, after: float) -> None:
        """Records what came of a block; the caller holds the lock."""
        self._release_dropped()
        is_used = entry.uses > 0 and entry.state is _State.FETCHING
        if not is_used or state not in (_State.HERE, _State.QUEUED):
            self._store.release(entry.stored)
        if is_used:
            entry.state = state
            is_elsewhere = state is _State.QUEUED and after > 0
            entry.pause = min(max(after, 2 * entry.pause), _MOST_RARELY_SECONDS) if is_elsewhere else 0.0
            if after or state is _State.QUEUED:
                self._enqueue(entry, entry.pause if is_elsewhere and entry.urgency > -1 else after)

    def _settle_spare(self, key: int, outcome: Outcome) -> None:
        """Records what came of a block that nobody had asked for; the caller holds the lock."""
        if outcome is not Outcome.ON_DISK:
            self._spares.remove(key)
        asked = self._entries.get(key)
        if asked is not None and asked.state is _State.QUEUED:
            self._enqueue(asked)  # it need not wait for its next look at the folder

    def _next(self, tasks: threading.Condition) -> list[_Entry]:
        """The next block to fetch, with its neighbours; none: there has been none for a while.

        One thread stays as long as blocks are in use: nobody else might release those of a dropped iterator.
        """
        with tasks:
            until = time.monotonic() + _IDLE_SECONDS
            while True:
                self._release_dropped()
                now = time.monotonic()
                while self._later and self._later[0][0] <= now:
                    _, number, entry = heapq.heappop(self._later)
                    heapq.heappush(self._queue, (entry.urgency, number, entry))
                first = self._first_of_queue(now)
                if first is not None:
                    if self._queue or self._later:
                        tasks.notify()
                    return self._with_neighbours(first)
                is_needed = self._queue or self._later or (self._threads == 1 and self._entries)
                if now >= until and not is_needed:
                    self._threads -= 1
                    return []
                self._idle += 1
                if self._later and not self._is_timed:
                    self._is_timed = True
                    tasks.wait(self._later[0][0] - now)
                    self._is_timed = False
                else:
                    tasks.wait(_IDLE_SECONDS)
                self._idle -= 1

    def _first_of_queue(self, now: float) -> _Entry | None:
        """Takes the most urgent block that can be fetched now; None: there is none."""
        while self._queue:
            _, number, entry = self._queue[0]
            length = entry.block.length
            if number != entry.turn or not entry.uses or entry.state not in _WAITING:
                heapq.heappop(self._queue)
            elif now < self._full_until:
                heapq.heappop(self._queue)
                entry.state = _State.NO_ROOM
                heapq.heappush(self._later, (self._full_until, number, entry))
                self._changed.notify_all()
            elif self._fetched_bytes and self._fetched_bytes + length > FETCHED_BYTES:
                return None
            else:
                heapq.heappop(self._queue)
                self._begin_fetching(entry)
                return entry
        return None

    def _with_neighbours(self, entry: _Entry) -> list[_Entry]:
        """A block that is to be fetched, with those around it that are, too: one request brings them all."""
        run, length = deque([entry]), entry.block.length
        for end, step in ((-1, 1), (0, -1)):
            while (other := self._entries.get(run[end].key + step)) is not None:
                first, last = (run[-1], other) if step > 0 else (other, run[0])
                waits = other.state is _State.QUEUED and not other.pause and is_behind(first.block, last.block)
                more = other.block.length
                if not waits or length + more > REQUEST_BYTES or self._fetched_bytes + more > FETCHED_BYTES:
                    break
                length += more
                self._begin_fetching(other)
                run.insert(len(run) if step > 0 else 0, other)
        self._add_spares(run, length)
        return list(run)

    def _add_spares(self, run: deque[_Entry], length: int) -> None:
        """Adds the blocks behind those of a request, which will be needed a little later, unless the run ends before.

        They are a small part of all, and go to the folder only. `length` is the number of bytes of the request.
        """
        while self._store.can_store and (key := run[-1].key + 1) not in self._entries:
            block = self._block_behind(run[-1].key)
            if block is None or not is_behind(run[-1].block, block):
                return
            length += block.length
            has_room = length <= REQUEST_BYTES and self._fetched_bytes + block.length <= FETCHED_BYTES
            if not has_room or not self._spares.add(key, block.length):
                return
            entry = _Entry(key, run[-1].shard, block, 0, uses=0)
            self._begin_fetching(entry)
            run.append(entry)

    def _begin_fetching(self, entry: _Entry) -> None:
        """Marks a block as being fetched; the caller holds the lock."""
        entry.state, entry.turn = _State.FETCHING, _NO_TURN
        self._fetched_bytes += entry.block.length
