"""Fetching blocks of remote shards in the background: many requests at a time, in the order of need.

The requests of asynchronous filesystems run on the event loop of fsspec; each has a thread that waits for it, repeats
it and stores the block. A block goes to the folder of the node (`node_cache`), or stays in the memory of the process if
that folder cannot be used. Where there is room for a block in neither, or it cannot be fetched, its rows are read one
by one, and fail one by one.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path

from dmagent_loader.errors import DamagedShardError, ShardError, ShardNotFoundError
from dmagent_loader.shards import forks
from dmagent_loader.shards.bounded_cache import BoundedCache
from dmagent_loader.shards.sources.block_sources import BlockInMemory, BlockSource, open_block
from dmagent_loader.shards.sources.blocks import Block
from dmagent_loader.shards.sources.calls import SLOWEST_BYTES_PER_SECOND, timeout_seconds
from dmagent_loader.shards.sources.node_cache import BlockInUse, Claim, NodeCache, default_block_folder
from dmagent_loader.shards.sources.remote import RemoteSource, SinkError

FETCHES = 32
"""Requests in flight, in each process."""
_FETCHED_BYTES = 256 << 20
"""Memory for blocks in flight; one block may be larger."""
_MEMORY_BYTES = 512 << 20
"""Memory for blocks that have no room on disk."""
_IDLE_SECONDS = 5.0
"""Time after which a thread without work ends."""
_LOOK_AGAIN_SECONDS = 0.02
"""Between two looks at a block that another process is fetching: at first, or if a reader waits for it."""
_MOST_RARELY_SECONDS = 0.5
"""The same after many looks: each takes 0.3 ms of CPU time, and there may be hundreds of blocks."""
_TRY_AGAIN_SECONDS = 0.5
"""Until a block that found no room is tried again."""

logger = logging.getLogger(__name__)
_PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOENT}
"""Errors of the folder that may be over soon; ``ENOENT``: someone has removed it."""
_reported: set[str] = set()
"""Warnings of folders that this process has given."""


class _State(Enum):
    QUEUED = "queued"
    FETCHING = "being fetched"
    NO_ROOM = "no room yet"
    ON_DISK = "on disk"
    IN_MEMORY = "in memory"
    FAILED = "not to be had"


class _Entry:
    """A block that was asked for."""

    __slots__ = ("block", "data", "is_needed", "pause", "place", "shard", "state", "urgency", "uses")

    def __init__(self, shard: int, block: Block, urgency: int) -> None:
        self.shard, self.block, self.urgency = shard, block, urgency
        self.uses = 1
        self.state = _State.QUEUED
        self.data: BlockInMemory | None = None
        """The block, if it is in memory."""
        self.place = ("", block.start)
        """Path of the block, if it is on disk, and its first byte in the shard."""
        self.pause = 0.0
        """Seconds between the last two looks at the block, if another process is fetching it."""
        self.is_needed = False
        """Whether the folder has noted the need for it. The thread that fetches the block says so."""


class BlockFetcher:
    """The blocks that one process has asked for.

    Safe to use from many threads. A forked child starts without blocks.

    Args:
        block_of: Function from the key of a block to the number of its shard and the block.
        source_of: Function from the number of a shard to the remote shard.
        folder: Folder of the node; None: `default_block_folder`.
        limit: Largest number of bytes in the folder; None: see `NodeCache`; 0: blocks stay in memory.
        max_open_files: Largest number of open blocks.

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
    ) -> None:
        self._block_of, self._source_of, self._folder, self._limit = block_of, source_of, folder, limit
        self._cache: NodeCache | None = None
        self._files = BoundedCache(open_block, max_open_files)
        self._start()
        forks.register(self)

    def _start(self) -> None:
        lock = threading.RLock()
        self._changed, self._tasks = threading.Condition(lock), threading.Condition(lock)
        """Of one lock: for readers that wait for a block, and for threads that wait for work."""
        self._is_timed = False
        """Whether a thread waits for the first of the blocks that are to be tried later."""
        self._entries: dict[int, _Entry] = {}
        self._queue: list[tuple[int, int, _Entry]] = []
        self._later: list[tuple[float, int, _Entry]] = []
        self._number = itertools.count()
        self._dropped: deque[int] = deque()
        """Keys that finalizers have released, once for each use."""
        self._threads = self._idle = 0
        self._fetched_bytes = self._memory_bytes = 0
        self._full_until = self._disk_full_until = 0.0
        """Until then no other block looks for room: in either place, and on disk."""
        self._wanted_bytes = self._wanted_rows = self.waits = 0
        self._can_store: bool | None = None
        """Whether blocks go to the folder; None: it is not open yet."""

    def reset_after_fork(self) -> None:
        """Forgets the blocks of the parent in a forked child."""
        self._cache = None
        self._start()

    # Asking for blocks

    def want(self, key: int, urgency: int) -> None:
        """Has a block fetched, and kept until as many calls of `release`.

        Args:
            key: Key of the block.
            urgency: The lower, the sooner it is fetched.
        """
        with self._changed:
            self._release_dropped()
            entry = self._entries.get(key)
            if entry is not None:
                entry.uses += 1
                return
            entry = self._entries[key] = _Entry(*self._block_of(key), urgency)
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
        if entry.state is _State.IN_MEMORY:
            self._memory_bytes -= entry.block.length
        elif entry.state is _State.ON_DISK:
            self._leave_disk(entry)
        else:
            self._fail(entry)  # whoever waits for the block would wait in vain

    def comes(self, key: int) -> bool:
        """Whether a block is here or on its way; otherwise its rows have to be read one by one."""
        entry = self._entries.get(key)
        return entry is not None and entry.state not in (_State.NO_ROOM, _State.FAILED)

    def cancel(self, key: int) -> bool:
        """Ends one use of a block, unless it is here or being fetched."""
        with self._changed:
            waits = self._entries[key].state in (_State.QUEUED, _State.NO_ROOM)
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
            if state is _State.IN_MEMORY:
                return entry.data
            if state is _State.ON_DISK:
                try:
                    return self._files.get(entry.place)
                except ShardNotFoundError:  # it was removed: it is fetched again
                    with self._changed:
                        if entry.uses and entry.state is _State.ON_DISK:
                            self._leave_disk(entry)
                            self._enqueue(entry)
                    continue
                except ShardError as error:  # such as a file of another user, which would be found again without end
                    with self._changed:
                        if entry.uses and entry.state is _State.ON_DISK:
                            self._fail(entry)
                    _warn_once(
                        f"blocks of remote shards cannot be read from the folder {os.path.dirname(entry.place[0])}: "
                        "their rows are read one by one from the shards; set block_cache_dir of ReadingConfig to a "
                        "folder to which no other user writes, and keep some file descriptors free",
                        str(error),
                    )
                    return None
            if state in (_State.NO_ROOM, _State.FAILED) or not self._wait(entry):
                return None
        return None

    def forget(self, key: int) -> None:
        """Removes a block whose bytes are wrong, and has its rows read from the shard."""
        with self._changed:
            entry = self._entries.get(key)
            if entry is None:
                return
            if entry.state is _State.IN_MEMORY:
                self._memory_bytes -= entry.block.length
            elif entry.state is _State.ON_DISK and self._cache is not None:
                self._cache.remove(entry.block.name)
            self._fail(entry)

    def _fail(self, entry: _Entry) -> None:
        """Has the rows of a block read from the shard; the caller holds the lock."""
        if entry.state is not _State.FETCHING:  # otherwise the thread that fetches it ends the need
            self._leave_disk(entry)
        entry.state, entry.data = _State.FAILED, None
        self._changed.notify_all()

    def _leave_disk(self, entry: _Entry) -> None:
        """Ends the need for a block in the folder, if there is one."""
        if entry.is_needed:
            assert self._cache is not None
            entry.is_needed = False
            self._files.drop(entry.place)
            self._cache.release(entry.block.name)

    def _wait(self, entry: _Entry) -> bool:
        """Waits until a block is here or released, for as long as one request may take; False: it did not come."""
        patience = timeout_seconds() + entry.block.length / SLOWEST_BYTES_PER_SECOND
        with self._changed:
            self.waits += 1
            if entry.uses and entry.state in (_State.QUEUED, _State.FETCHING) and entry.urgency > -1:
                entry.urgency = -1
                if entry.state is _State.QUEUED:
                    self._enqueue(entry)
            if not self._threads:
                self._start_thread()
                if not self._threads:
                    return False
            if self._changed.wait_for(
                lambda: not entry.uses or entry.state not in (_State.QUEUED, _State.FETCHING), patience
            ):
                return True
            self._fail(entry)
            return False

    # Fetching

    def _enqueue(self, entry: _Entry, after: float = 0.0) -> None:
        """Puts a block into the queue; the caller holds the lock."""
        number = next(self._number)
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
        while (entry := self._next(tasks)) is not None:
            state, data, after = _State.FAILED, None, 0.0
            try:
                state, data, after = self._obtain(entry)
            except DamagedShardError:
                pass  # its rows before the end are whole, and reading the others says which are not
            except Exception as error:
                logger.debug("block %s could not be fetched: %s", entry.block.name, error)
            finally:
                with tasks:
                    self._fetched_bytes -= entry.block.length
                    self._settle(entry, state, data, after)
                    self._changed.notify_all()
                    tasks.notify()

    def _settle(self, entry: _Entry, state: _State, data: bytearray | None, after: float) -> None:
        """Records what came of a block."""
        self._release_dropped()
        is_used = entry.uses > 0 and entry.state is _State.FETCHING
        if data is not None:
            self._memory_bytes -= 0 if is_used else entry.block.length
            entry.data = BlockInMemory(entry.block.start, data)
        if not is_used or state not in (_State.ON_DISK, _State.QUEUED):
            self._leave_disk(entry)
        if is_used:
            entry.state = state
            entry.pause = min(max(after, 2 * entry.pause), _MOST_RARELY_SECONDS) if state is _State.QUEUED else 0.0
            if after:
                self._enqueue(entry, entry.pause if state is _State.QUEUED and entry.urgency > -1 else after)

    def _next(self, tasks: threading.Condition) -> _Entry | None:
        """The next block to fetch; None: there has been none for a while.

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
                    return first
                is_needed = self._queue or self._later or (self._threads == 1 and self._entries)
                if now >= until and not is_needed:
                    self._threads -= 1
                    return None
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
            if not entry.uses or entry.state not in (_State.QUEUED, _State.NO_ROOM):
                heapq.heappop(self._queue)
            elif now < self._full_until:
                heapq.heappop(self._queue)
                entry.state = _State.NO_ROOM
                heapq.heappush(self._later, (self._full_until, number, entry))
                self._changed.notify_all()
            elif self._fetched_bytes and self._fetched_bytes + length > _FETCHED_BYTES:
                return None
            else:
                heapq.heappop(self._queue)
                entry.state = _State.FETCHING
                self._fetched_bytes += length
                return entry
        return None

    def _obtain(self, entry: _Entry) -> tuple[_State, bytearray | None, float]:
        """Gets a block from the folder, or fetches it.

        Returns:
            What came of it; its bytes, if they stay in memory; seconds until another attempt, if there is to be one.
        """
        block, cache, claim = entry.block, self._opened_cache(), None
        if cache is not None:
            if not entry.is_needed:
                cache.need(block.name)
                entry.place, entry.is_needed = (cache.path(block.name), block.start), True
            if cache.holds(block.name, block.length):
                return _State.ON_DISK, None, 0.0
            if self._can_store and time.monotonic() >= self._disk_full_until:
                try:
                    claim = cache.claim(block.name, block.length)
                except BlockInUse:
                    if cache.holds(block.name, block.length):
                        return _State.ON_DISK, None, 0.0
                    return _State.QUEUED, None, _LOOK_AGAIN_SECONDS
                except OSError as error:
                    self._cannot_store(cache.folder, error)
                else:
                    if claim is None:
                        self._disk_full_until = time.monotonic() + _TRY_AGAIN_SECONDS
        source = self._source_of(entry.shard)
        if claim is not None:
            assert cache is not None
            stored = self._store(claim, source, block, cache.folder)
            if stored is not None:
                return stored, None, 0.0 if stored is _State.ON_DISK else _LOOK_AGAIN_SECONDS
        if not self._reserve_memory(block):
            self._full_until = time.monotonic() + _TRY_AGAIN_SECONDS
            return _State.NO_ROOM, None, _TRY_AGAIN_SECONDS
        try:
            return _State.IN_MEMORY, source.read(block.start, block.length), 0.0
        except BaseException:
            self._free_memory(block)
            raise

    def _store(self, claim: Claim, source: RemoteSource, block: Block, folder: Path) -> _State | None:
        """Fetches a block into the folder; None if the folder cannot take it."""
        try:
            source.copy(block.start, block.length, claim.write)
        except SinkError as error:
            claim.give_back()
            self._cannot_store(folder, error.reason)
            return None
        except BaseException:
            claim.give_back()
            raise
        try:
            claim.complete()
        except FileNotFoundError:  # someone has emptied the folder: it is fetched again
            return _State.QUEUED
        except OSError as error:
            self._cannot_store(folder, error)
            return None
        return _State.ON_DISK

    def _reserve_memory(self, block: Block) -> bool:
        with self._changed:
            if self._memory_bytes and self._memory_bytes + block.length > _MEMORY_BYTES:
                return False
            self._memory_bytes += block.length
            return True

    def _free_memory(self, block: Block) -> None:
        with self._changed:
            self._memory_bytes -= block.length

    # The folder

    def _opened_cache(self) -> NodeCache | None:
        """The folder of the node; None if it cannot be used."""
        with self._changed:
            if self._can_store is None and self._limit != 0 and time.monotonic() >= self._disk_full_until:
                folder = self._folder
                try:
                    folder = default_block_folder() if folder is None else folder
                    self._cache = NodeCache(folder, self._limit)
                    self._can_store = True
                except OSError as error:
                    self._cannot_store(folder, error)
            return self._cache

    def _cannot_store(self, folder: Path | None, error: OSError) -> None:
        """Keeps further blocks in memory, for a while or for good, and says so once."""
        name = "for temporary files" if folder is None else str(folder)
        if error.errno in _PASSING:
            self._disk_full_until = time.monotonic() + _TRY_AGAIN_SECONDS
            _warn_once(
                f"blocks of remote shards cannot be stored in the folder {name} for the moment: each process keeps its "
                "own in memory until they can; leave some file descriptors and memory free, and the folder in place",
                error.strerror or str(error),
            )
            return
        self._can_store = False
        _warn_once(
            f"blocks of remote shards cannot be stored in the folder {name}: each process keeps its own in memory; set "
            "block_cache_dir of ReadingConfig to a folder with free space on a local disk",
            error.strerror or str(error),
        )


def _warn_once(text: str, reason: str) -> None:
    """Warns of a folder, for the first of all reasons."""
    if text not in _reported:
        _reported.add(text)
        logger.warning("%s (%s)", text, reason)
