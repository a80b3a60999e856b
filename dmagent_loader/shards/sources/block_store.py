"""The place of blocks of remote shards: the folder of the node, or the memory of the process.

A block goes to the folder (`node_cache`) if that can be used and has room, and otherwise to memory, up to a limit.
`fetching` decides which block is obtained when, and what its rows do without it.
"""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path

from dmagent_loader.errors import ShardError, ShardNotFoundError
from dmagent_loader.shards.bounded_cache import BoundedCache
from dmagent_loader.shards.sources.block_sources import BlockInMemory, BlockSource, open_block
from dmagent_loader.shards.sources.blocks import Block
from dmagent_loader.shards.sources.node_cache import BlockInUse, Claim, NodeCache
from dmagent_loader.shards.sources.remote import RemoteSource, SinkError

_MEMORY_BYTES = 512 << 20
"""Memory for blocks that have no room on disk."""
_LOOK_AGAIN_SECONDS = 0.02
"""Between two looks at a block that another process is fetching."""
_TRY_AGAIN_SECONDS = 0.5
"""Until a block that found no room is tried again."""

logger = logging.getLogger(__name__)
_PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOENT}
"""Errors of the folder that may be over soon; ``ENOENT``: someone has removed it."""
_reported: set[str] = set()
"""Warnings of folders that this process has given."""


class Outcome(Enum):
    """Outcome of an attempt to obtain a block."""

    FOUND = "on disk before"
    ON_DISK = "fetched to disk"
    IN_MEMORY = "in memory"
    NOT_YET = "being fetched by another process, or removed by someone before it was complete"
    LEFT_OUT = "left out of the request"
    NO_ROOM = "no room in either place"
    FAILED = "not to be had"


class StoredBlock:
    """A block, and its place in this process.

    Attributes:
        block: The block.
        data: The block, if it is in memory.
        is_spare: Whether nobody has asked for it: it is fetched only if the folder has room for it.
        is_needed: Whether the folder has noted the need for it.
        place: Path of the block, once the folder has noted the need for it, and its first byte in the shard.
    """

    __slots__ = ("block", "data", "is_needed", "is_spare", "place")

    def __init__(self, block: Block, is_spare: bool = False) -> None:
        self.block, self.is_spare = block, is_spare
        self.data: BlockInMemory | None = None
        self.is_needed = False
        self.place = ("", block.start)


Outcomes = dict[StoredBlock, tuple[Outcome, float]]
"""Outcomes of attempts, and the seconds until another one, if there is to be one."""


def default_block_folder() -> Path:
    """The folder of this user on the disk for temporary files.

    Raises:
        PermissionError: Another user has made it.
    """
    folder = Path(tempfile.gettempdir()) / f"dmagent_loader-{os.getuid()}" / "blocks"
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    if os.lstat(folder.parent).st_uid != os.getuid():
        raise PermissionError(f"{folder.parent} belongs to another user")
    return folder


class BlockStore:
    """The blocks that one process keeps.

    `obtain` is called without the lock, as it fetches; for each block, by one thread at a time. This thread alone sets
    the place of a block. Only holders of the lock end it, so that no memory and no need is given back twice. Apart from
    that, the lock guards the number of bytes in memory, and the opening of the folder. Whether the folder can be used,
    and until when it is full, are hints: they are read and written without the lock.

    Inside the lock, those of the folder and of the open blocks are taken; never the other way round.

    Args:
        folder: Folder of the node; None: `default_block_folder`.
        limit: Largest number of bytes in the folder; None: see `NodeCache`; 0: blocks stay in memory.
        max_open_files: Largest number of open blocks.
        lock: The lock of the fetcher, whose callers hold it where a method says so.
    """

    def __init__(self, folder: Path | None, limit: int | None, *, max_open_files: int, lock: threading.RLock) -> None:
        self._folder, self._limit, self._lock = folder, limit, lock
        self._cache: NodeCache | None = None
        self._max_open_files = max_open_files
        self._files = BoundedCache(_open_file, max_open_files)
        self._memory_bytes = 0
        self._disk_full_until = 0.0
        """Until then no block looks for room on disk."""
        self._can_store: bool | None = None

    @property
    def can_store(self) -> bool | None:
        """Whether blocks go to the folder; None: it is not open yet."""
        return self._can_store

    def obtain(
        self, run: Sequence[StoredBlock], source_of: Callable[[], RemoteSource], settle: Callable[[Outcomes], object]
    ) -> None:
        """Finds blocks in the folder, or fetches them, neighbours with one request.

        Args:
            run: Blocks of one shard, one behind the other.
            source_of: Function that opens the shard.
            settle: Function that takes the outcomes: of blocks that need no request before those of the others. Where
                an outcome is `NO_ROOM` or `FAILED`, it releases the block. Blocks without an outcome have failed.
        """
        outcomes: Outcomes = {}
        group: list[_Piece] = []
        try:
            for number, stored in enumerate(run):
                # A spare block saves a request if it comes with others, and is not worth one of its own.
                found = self._find(stored) if group or not stored.is_spare else (Outcome.LEFT_OUT, 0.0)
                if isinstance(found, _Piece):
                    group.append(found)
                    continue
                outcomes[stored] = found
                if group:
                    outcomes.update(dict.fromkeys(run[number + 1 :], (Outcome.LEFT_OUT, 0.0)))
                    break
            if group:
                if outcomes:
                    settle(outcomes)
                    outcomes = {}
                self._fetch(group, source_of(), outcomes)
        except Exception as error:
            # Of a shard that has become shorter, the rows before its end are whole, and reading the others says which
            # are not.
            logger.debug("blocks from %s on could not be fetched: %s", run[0].block.name, error)
        finally:
            for piece in group:
                self._give_back(piece)
            settle(outcomes)

    def _find(self, stored: StoredBlock) -> tuple[Outcome, float] | _Piece:
        """The outcome for a block that need not or cannot be fetched; otherwise the place for it."""
        block, cache = stored.block, self._opened_cache()
        if cache is not None:
            if stored.is_spare and cache.holds(block.name, block.length):
                return Outcome.LEFT_OUT, 0.0
            if not stored.is_needed:
                cache.need(block.name)
                stored.place, stored.is_needed = (cache.path(block.name), block.start), True
            if cache.holds(block.name, block.length):
                return Outcome.FOUND, 0.0
            if self._can_store and time.monotonic() >= self._disk_full_until:
                try:
                    claim = cache.claim(block.name, block.length)
                except BlockInUse:
                    if cache.holds(block.name, block.length):
                        return Outcome.FOUND, 0.0
                    return Outcome.NOT_YET, _LOOK_AGAIN_SECONDS
                except OSError as error:
                    self._cannot_store(cache.folder, error)
                else:
                    if claim is not None:
                        return _Piece(stored, claim)
                    if not stored.is_spare:
                        self._disk_full_until = time.monotonic() + _TRY_AGAIN_SECONDS
        return self._in_memory(stored)

    def _in_memory(self, stored: StoredBlock) -> tuple[Outcome, float] | _Piece:
        """Memory for a block, if there is room."""
        if stored.is_spare:
            return Outcome.FAILED, 0.0
        with self._lock:
            if self._memory_bytes and self._memory_bytes + stored.block.length > _MEMORY_BYTES:
                return Outcome.NO_ROOM, _TRY_AGAIN_SECONDS
            self._memory_bytes += stored.block.length
        try:
            return _Piece(stored, None)
        except MemoryError:
            with self._lock:
                self._memory_bytes -= stored.block.length
            raise

    def _fetch(self, group: list[_Piece], source: RemoteSource, outcomes: Outcomes) -> None:
        """Fetches neighbours with one request. Those that are whole in the end have an outcome, even if others fail.

        Raises:
            ShardError: Others cannot be fetched.
        """
        start, last = group[0].stored.block.start, group[-1].stored.block
        try:
            source.copy(start, last.start + last.length - start, _Distribution(group).write)
        except SinkError as error:
            assert self._cache is not None
            self._cannot_store(self._cache.folder, error.reason)
        finally:
            for piece in group:
                if piece.is_whole:
                    outcomes[piece.stored] = self._complete(piece)
        for piece in [piece for piece in group if piece.stored not in outcomes]:  # whose bytes the folder did not take
            self._give_back(piece)
            found = self._in_memory(piece.stored)
            if isinstance(found, _Piece):
                group.append(found)  # to be given back if it cannot be fetched
                found.write(0, source.read(piece.stored.block.start, piece.stored.block.length))
                found = self._complete(found)
            outcomes[piece.stored] = found

    def _complete(self, piece: _Piece) -> tuple[Outcome, float]:
        """Makes a block that was fetched visible."""
        piece.is_open = False
        if piece.claim is None:
            with self._lock:
                self._leave_disk(piece.stored)
                piece.stored.data = BlockInMemory(piece.stored.block.start, piece.data)
            return Outcome.IN_MEMORY, 0.0
        assert self._cache is not None
        try:
            piece.claim.complete()
        except OSError as error:
            if not isinstance(error, FileNotFoundError):  # someone has emptied the folder: it is fetched again
                self._cannot_store(self._cache.folder, error)
            return Outcome.NOT_YET, _LOOK_AGAIN_SECONDS
        return Outcome.ON_DISK, 0.0

    def _give_back(self, piece: _Piece) -> None:
        """Gives back the place of a block that was not fetched."""
        if piece.is_open:
            piece.is_open = False
            if piece.claim is not None:
                piece.claim.give_back()
            else:
                with self._lock:
                    self._memory_bytes -= piece.stored.block.length

    def open(self, stored: StoredBlock) -> BlockSource | None:
        """A block that is here, as a source for its part of the shard.

        Returns:
            None if the folder cannot be read, which is a warning.

        Raises:
            ShardNotFoundError: Someone has removed it, or it was released.
        """
        data = stored.data  # once: another thread may release the block
        if data is not None:
            return data
        try:
            return self._files.get(stored)
        except ShardNotFoundError:
            raise
        except ShardError as error:  # such as a file of another user, which would be found again without end
            _warn_once(
                f"blocks of remote shards cannot be read from the folder {os.path.dirname(stored.place[0])}: their "
                "rows are read one by one from the shards; set block_cache_dir of ReadingConfig to a folder to which "
                "no other user writes, and keep some file descriptors free",
                str(error),
            )
            return None

    def open_all(self, stored: list[StoredBlock]) -> list[BlockSource] | None:
        """As `open`, for many blocks; faster than a call for each.

        Returns:
            None if they have to be opened one by one, because some are in memory, or they might be too many.

        Raises:
            ShardError: One of them cannot be opened: `open` says which, and why.
        """
        if self._memory_bytes or len(stored) > self._max_open_files:
            return None
        return self._files.get_all(stored)

    def release(self, stored: StoredBlock) -> None:
        """Ends the need for a block, in either place; the caller holds the lock."""
        self._leave_disk(stored)
        if stored.data is not None:
            stored.data = None
            self._memory_bytes -= stored.block.length

    def remove(self, stored: StoredBlock) -> None:
        """Removes a block whose bytes are wrong from the folder, for all processes; it is still to be released."""
        if stored.data is None and self._cache is not None:
            self._cache.remove(stored.block.name)

    def _leave_disk(self, stored: StoredBlock) -> None:
        """Ends the need for a block in the folder, if there is one; the caller holds the lock."""
        if stored.is_needed:
            assert self._cache is not None
            stored.is_needed = False
            self._files.drop(stored)
            self._cache.release(stored.block.name)

    def _opened_cache(self) -> NodeCache | None:
        """The folder of the node; None if it cannot be used."""
        with self._lock:
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


class _Piece:
    """The place of a block that is being fetched.

    Args:
        stored: The block.
        claim: The right to write it to the folder; None: it goes to memory.

    Attributes:
        is_open: Whether the place is to be given back if nothing comes of it.
    """

    def __init__(self, stored: StoredBlock, claim: Claim | None) -> None:
        self.stored, self.claim, self.is_open = stored, claim, True
        self.data = bytearray(stored.block.length if claim is None else 0)
        self._written = 0

    @property
    def is_whole(self) -> bool:
        """Whether all bytes have come."""
        return self._written == self.stored.block.length

    def write(self, position: int, part: bytes | bytearray | memoryview) -> None:
        """Takes the bytes from a position of the block on; they come in order, and again from the start after a fault.

        Raises:
            OSError: The folder cannot take them.
        """
        if self.claim is None:
            self.data[position : position + len(part)] = part
        else:
            self.claim.write(position, part)
        self._written = position + len(part)


class _Distribution:
    """Passes on the bytes of one request to several blocks.

    Args:
        pieces: Their places, one behind the other; bytes between two blocks are dropped.
    """

    def __init__(self, pieces: Sequence[_Piece]) -> None:
        start = pieces[0].stored.block.start
        self._pieces = [(piece.stored.block.start - start, piece.stored.block.length, piece) for piece in pieces]

    def write(self, position: int, part: bytes) -> None:
        """Takes a part, with its position behind the start of the first block."""
        end, view = position + len(part), memoryview(part)
        for begin, length, piece in self._pieces:
            if position < begin + length and begin < end:
                low, high = max(begin, position), min(begin + length, end)
                piece.write(low - begin, view[low - position : high - position])


def _open_file(stored: StoredBlock) -> BlockSource:
    return open_block(stored.place)


def _warn_once(text: str, reason: str) -> None:
    """Warns of a folder, for the first of all reasons."""
    if text not in _reported:
        _reported.add(text)
        logger.warning("%s (%s)", text, reason)
