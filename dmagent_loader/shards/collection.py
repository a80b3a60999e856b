"""The shards of all domains, with random access to every row."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from dmagent_loader.errors import (
    HOW_TO_RESUME,
    ConfigurationError,
    DamagedShardError,
    EmptyShardError,
    ShardError,
    ShardLayoutError,
    ShardNotFoundError,
)
from dmagent_loader.shards.array_rows import ArrayRows
from dmagent_loader.shards.bounded_cache import BoundedCache
from dmagent_loader.shards.checks import OnDamage, check_copies, check_damage, check_emptiness
from dmagent_loader.shards.decode import RawSample
from dmagent_loader.shards.index.cache import IndexCache, default_cache_dir
from dmagent_loader.shards.index.catalogue import Catalogue, ShardNames
from dmagent_loader.shards.index.oddities import oddities
from dmagent_loader.shards.index.opening import open_catalogue
from dmagent_loader.shards.index.peers import Peers
from dmagent_loader.shards.index.stored import StoredIndexes
from dmagent_loader.shards.index.storing import write_indexes
from dmagent_loader.shards.index.threads import in_threads, in_threads_if_slow
from dmagent_loader.shards.manifest import Manifest, Manifests
from dmagent_loader.shards.sources.blocks import BLOCK_BITS, Block, IntArray
from dmagent_loader.shards.sources.fetching import BlockFetcher
from dmagent_loader.shards.sources.listing import REQUESTS_IN_FLIGHT
from dmagent_loader.shards.sources.local import MAX_OPEN_FILES, Readable, Source, open_source
from dmagent_loader.shards.sources.patterns import ShardPatterns, expand_domains
from dmagent_loader.shards.sources.urls import display_url, is_local
from dmagent_loader.shards.summary import ShardSummary, summaries, table_of_shards
from dmagent_loader.shards.table import ChangedRow, RowTable
from dmagent_loader.shards.tar import KeyEnd, ShardDamage

_NO_BLOCKS: IntArray = np.empty(0, np.int64)
_ROW_BITS = 40
"""Bits for the number of a row in its shard."""
_MAX_TABLE_BYTES = 512 << 20
"""Memory for row tables in each process, at about 30 bytes per row of the shards read lately."""

logger = logging.getLogger(__name__)


class ShardCollection:
    """The indexed shards of all domains, readable by (domain, shard, row). Made by `open`.

    Reading is safe from many threads and after a fork. The object can be pickled for spawned workers. Each process
    opens the files itself, at most `max_open_files` at once.

    Example:
        >>> from dmagent_loader.shards.collection import ShardCollection
        >>> collection = ShardCollection.open({"source/web": "web-{000..003}.tar"})  # doctest: +SKIP
        >>> collection.read(0, 2, 17).members["txt"]  # doctest: +SKIP
    """

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        verify: bool,
        max_open_files: int,
        block_cache_dir: Path | None = None,
        block_cache_bytes: int | None = None,
    ) -> None:
        self._catalogue, self._verify, self._max_open_files = catalogue, verify, max_open_files
        self._block_cache = (block_cache_dir, block_cache_bytes)
        self._rows = [catalogue.rows[slice(*span)] for span in catalogue.spans]
        self._spans = catalogue.spans
        self._start()

    def _start(self) -> None:
        # The functions refer to the catalogue only: a cycle with this object would keep its files open until the
        # garbage collector runs.
        self._sources = BoundedCache(partial(_open_one, self._catalogue), self._max_open_files)
        self._tables = BoundedCache(
            partial(_load_table, self._catalogue), _MAX_TABLE_BYTES, weigh=lambda table: table.num_bytes
        )
        self.fetcher: BlockFetcher | None = None
        if not self.is_local:
            folder, limit = self._block_cache
            self.fetcher = BlockFetcher(
                partial(_block_of, self._tables.get),
                self._sources.get,  # type: ignore[arg-type]  # blocks are those of remote shards
                folder=folder,
                limit=limit,
                max_open_files=self._max_open_files,
                block_behind=partial(_block_behind, self._tables.if_open),
            )

    @classmethod
    def open(
        cls,
        shards: Mapping[str, ShardPatterns],
        *,
        on_damage: OnDamage = "raise",
        cache_dir: str | os.PathLike[str] | None = None,
        progress: bool = True,
        verify: bool = True,
        key_ends_at: KeyEnd = "first-dot",
        max_open_files: int = MAX_OPEN_FILES,
        manifests: Iterable[Manifest] = (),
        block_cache_dir: str | os.PathLike[str] | None = None,
        block_cache_bytes: int | None = None,
        indexes: str | os.PathLike[str] | bool = True,
        peers: Peers | None = None,
    ) -> ShardCollection:
        """Finds the shards and indexes those that are not in the cache.

        Args:
            shards: Domain name -> path, URL, pattern or list of these (`sources.patterns.expand_shards`).
            on_damage: ``"raise"`` refuses damaged shards; ``"skip"`` uses their intact rows and logs the losses.
            cache_dir: Folder for indexes; None: ``$DMAGENT_CACHE_DIR``, or else ``~/.cache/dmagent_loader``.
            progress: Show a progress bar while shards are indexed.
            verify: Compare every row with its checksum when it is read (about 0.5 us per KB).
            key_ends_at: The dot of a file name at which the key of its row ends. ``"first-dot"`` is webdataset's rule;
                ``"last-dot"`` is for base names with dots in them, such as ``arxiv.2101.00000.txt``.
            max_open_files: Largest number of open files in each process.
            manifests: Manifests of remote shards that `shards` lists without being a `Manifest` itself, for example
                because it was put together from several. Local shards are compared with the manifest above them anyway.
            block_cache_dir: Folder of the node for blocks of remote shards; None: one of the user on the disk for
                temporary files.
            block_cache_bytes: Limit on its size; None: half of the free space, at most 64 GiB; 0: blocks stay in the
                memory of each process.
            indexes: Path or URL of indexes that ``dmagent index --to`` wrote. True: those beside remote shards. False:
                none; every shard is read through once.
            peers: The ranks of a run that open the same shards at the same time and share the work; None: this process
                works alone.

        Raises:
            ShardNotFoundError: A pattern matches nothing, or a shard does not exist.
            EmptyShardError: A domain has no rows.
            DamagedShardError: A shard is damaged, and `on_damage` is ``"raise"``.
            ShardLayoutError: The samples of a shard cannot be read by position.
            ConfigurationError: There are no domains, a domain lists a shard twice or a shell pipe, shards differ
                only in a part of their URLs that does not name them, or `on_damage` or `key_ends_at` has another value.
        """
        if on_damage not in ("raise", "skip"):
            raise ConfigurationError(f"on_damage={on_damage!r}: it is 'raise' or 'skip'")
        if key_ends_at not in get_args(KeyEnd):
            raise ConfigurationError(f"key_ends_at={key_ends_at!r}: it is 'first-dot' or 'last-dot'")
        if not shards:
            raise ConfigurationError("no domains: pass a mapping from domain name to shards")
        urls = expand_domains(shards)
        cache = IndexCache(Path(cache_dir) if cache_dir is not None else default_cache_dir(), key_ends_at)
        given = (*manifests, shards) if isinstance(shards, Manifest) else tuple(manifests)
        try:
            stored = (
                StoredIndexes(key_ends_at, None if indexes is True else os.fspath(indexes))
                if indexes is not False
                else None
            )
            catalogue = open_catalogue(urls, cache, Manifests(given), stored=stored, progress=progress, peers=peers)
            collection = cls(
                catalogue,
                verify=verify,
                max_open_files=max_open_files,
                block_cache_dir=None if block_cache_dir is None else Path(block_cache_dir).expanduser().absolute(),
                block_cache_bytes=block_cache_bytes,
            )
            check_damage(catalogue, on_damage)
            check_emptiness(catalogue)
        except (DamagedShardError, EmptyShardError, ShardLayoutError, ShardNotFoundError) as error:
            raise type(error)(f"{error}; {HOW_TO_RESUME}") from error
        check_copies(catalogue)
        for oddity in oddities(catalogue):
            logger.warning("%s", oddity)
        return collection

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, in the order of their numbers."""
        return self._catalogue.domains

    @property
    def is_local(self) -> bool:
        """Whether all shards are local files."""
        return self._catalogue.is_local

    @property
    def packing(self) -> None:
        """None: the rows are those of the shards."""
        return None

    @property
    def num_rows(self) -> NDArray[np.int64]:
        """(D,) number of rows of each domain."""
        return np.array([rows.sum() for rows in self._rows], np.int64)

    def shard_rows(self, domain: int) -> NDArray[np.int64]:
        """(S,) number of rows of each shard of a domain, in listed order."""
        return self._rows[domain]

    def shard_contents(self, domain: int) -> NDArray[np.uint64]:
        """(S,) 64 bits that identify the content of each shard of a domain: keys, extensions, sizes, checksums."""
        return self._catalogue.contents[slice(*self._spans[domain])]

    def shard_names(self, domain: int) -> Sequence[str]:
        """File names of the shards of a domain, without folders."""
        return ShardNames(self._catalogue, range(*self._spans[domain]))

    @property
    def damage(self) -> tuple[ShardDamage, ...]:
        """All damage, in the order of domains and shards."""
        return self._catalogue.all_damage

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over domain names and, per shard, file name, rows and content, but not folders and hosts."""
        return self._catalogue.fingerprint

    def read(self, domain: int, shard: int, row: int) -> RawSample:
        """Reads one row with a single read of its shard.

        Args:
            domain: Number of the domain.
            shard: Number of the shard in the domain.
            row: Number of the row in the shard.

        Raises:
            IndexError: There is no such row.
            DamagedShardError: The shard has changed since it was indexed.
        """
        first, end = self._spans[domain]
        number = first + shard
        if not first <= number < end:
            raise IndexError(f"shard {shard} of domain {self.domains[domain]!r}, which has {end - first} shards")
        table = self._tables.get(number)
        if not 0 <= row < table.num_rows:
            raise IndexError(f"row {row} of shard {self._display(number)}, which has {table.num_rows} rows")
        try:
            if self.fetcher is not None:
                return self._read_block(self.fetcher, number, table, row)
            return table.read(self._sources.get(number), row, self._verify)
        except ChangedRow as change:
            if not is_local(self._catalogue.url(number)):
                # The bytes may have changed in transit: read them once more.
                with contextlib.suppress(ChangedRow):
                    return table.read(self._sources.get(number), row, self._verify)
            self._catalogue.forget(number)
            raise DamagedShardError(
                f"row {row} (key {table.key(row)!r}) of shard {self._display(number)} changed since it was indexed "
                f"({change}): the file was overwritten or its disk is failing; restore it, or, if it was replaced on "
                f"purpose, remove its cached index {self._catalogue.cached_index(number)}{self._in_store(number)} and "
                f"open the shards again; {HOW_TO_RESUME}"
            ) from None

    def _read_block(self, fetcher: BlockFetcher, number: int, table: RowTable, row: int) -> RawSample:
        """Reads one row from its block if that is here or on its way, or else from its shard.

        Raises:
            ChangedRow: The row in the shard has another checksum.
            ShardError: The shard cannot be read.
        """
        key = number << BLOCK_BITS | table.blocks.of_row(row)
        block = fetcher.get(key)
        if block is not None:
            try:
                return table.read(block, row, self._verify)
            except (ChangedRow, ShardError):  # whatever is wrong with the block, the shard may be whole
                fetcher.forget(key)
        return table.read(self._sources.get(number), row, self._verify)

    def blocks_of(self, domain: IntArray, shard: IntArray, row: IntArray) -> tuple[IntArray, IntArray]:
        """Keys of the first and the last block of each row, for `fetcher`; -1 for rows of local shards.

        Args:
            domain: (n,) numbers of the domains.
            shard: (n,) numbers of the shards in their domains.
            row: (n,) numbers of the rows in their shards.
        """
        first = np.array([span[0] for span in self._spans], np.int64)
        numbers, of_row = np.unique(first[domain] + shard, return_inverse=True)
        first_rows = self._first_rows(numbers)
        # One search in the first rows of the blocks of all these shards, one shard after the other.
        begins = [first_rows.get(number, _NO_BLOCKS) for number in numbers.tolist()]
        counts = np.array([len(of_shard) for of_shard in begins], np.int64)
        offsets = np.cumsum(counts) - counts
        shards = np.repeat(np.arange(len(numbers)), counts)
        rows = np.concatenate([_NO_BLOCKS, *begins])
        found = np.searchsorted(shards << _ROW_BITS | rows, of_row << _ROW_BITS | row, side="right") - 1
        keys = np.where(counts[of_row] > 0, numbers[of_row] << BLOCK_BITS | (found - offsets[of_row]), -1)
        return keys, keys

    def _first_rows(self, numbers: IntArray) -> dict[int, IntArray]:
        """The first rows of the blocks of those shards that are remote, by number.

        The table of a shard may take a request, so those are fetched at the same time. They are not kept beyond the
        cache.
        """

        def first_rows(number: int) -> IntArray:
            return self._tables.get(number).blocks.first_row

        remote = numbers[self._catalogue.is_remote[numbers]].tolist()
        missing = [number for number in remote if number not in self._tables]
        # To start a thread takes longer than to read an index from a local disk.
        at_hand = [number for number in missing if self._catalogue.has_index(number)]
        found = dict(in_threads_if_slow(first_rows, at_hand, threading.Event()))
        if len(missing) > len(found) + 1:
            others = [number for number in missing if number not in found]
            found.update(in_threads(first_rows, others, threading.Event(), REQUESTS_IN_FLIGHT))
        return found | {number: first_rows(number) for number in remote if number not in found}

    def missing_members(self, domain: int, shard: int, row: int) -> tuple[str, ...]:
        """Extensions that most rows of a shard have, and this row does not."""
        return self._tables.get(self._spans[domain][0] + shard).missing_members(row)

    def array_rows(self, extension: str) -> ArrayRows | None:
        """A reader of many rows at a time whose only member is a one-dimensional npy array.

        Args:
            extension: Extension of the member.

        Returns:
            None if checksums are not compared.
        """
        if not self._verify:
            return None
        first = np.array([first for first, _ in self._spans], np.int64)
        if self.fetcher is None:
            return ArrayRows(extension, first, self._tables.get, self._sources.get_all)  # type: ignore[arg-type]
        is_remote = self._catalogue.is_remote
        sources = (
            self.fetcher.get_all
            if is_remote.all()
            else partial(map, partial(_block_or_shard, self.fetcher, is_remote.tolist(), self._sources.get))
        )
        return ArrayRows(extension, first, self._tables.get, sources, is_remote)

    def display(self, domain: int, shard: int) -> str:
        """The URL of a shard, for messages."""
        return self._display(self._spans[domain][0] + shard)

    def summaries(self) -> tuple[ShardSummary, ...]:
        """Facts about every shard, in the order of domains and shards."""
        return summaries(self._catalogue)

    def describe(self) -> str:
        """A table of all shards, as text."""
        return table_of_shards(self.summaries())

    def write_indexes(self, to: str | os.PathLike[str] | None = None) -> int:
        """Writes the indexes of all intact shards to their store, so that nobody else has to read the shards for that.

        Args:
            to: Path or URL of a folder for them, `open`'s ``indexes``; None: beside the shards.

        Returns:
            Number of shards whose index was written.

        Raises:
            ConfigurationError: They cannot be written.
        """
        return write_indexes(self._catalogue, StoredIndexes(self._catalogue.cache.key_ends_at, to))

    def close(self) -> None:
        """Closes the open files; a later read opens them again."""
        self._sources.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out open files, tables and blocks, which another process cannot use."""
        return {**self.__dict__, "_sources": None, "_tables": None, "fetcher": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _in_store(self, number: int) -> str:
        """The second half of the remedy for a changed row, where the index may come from the store."""
        return (
            " (and write any in its store anew with `dmagent index`)" if self._catalogue.may_be_stored(number) else ""
        )

    def _display(self, number: int) -> str:
        return display_url(self._catalogue.url(number))


def _open_one(catalogue: Catalogue, number: int) -> Source:
    return open_source(catalogue.url(number))


def _load_table(catalogue: Catalogue, number: int) -> RowTable:
    return RowTable(catalogue.index(number), catalogue.tag(number))


def _block_or_shard(
    fetcher: BlockFetcher, is_remote: list[bool], source_of: Callable[[int], Source], key: int
) -> Readable | None:
    """The block of a key; of a local shard, which has none, the shard. None: the block cannot be had."""
    number = key >> BLOCK_BITS
    return fetcher.get(key) if is_remote[number] else source_of(number)  # type: ignore[return-value]


def _block_of(table_of: Callable[[int], RowTable], key: int) -> tuple[int, Block]:
    number = key >> BLOCK_BITS
    return number, table_of(number).blocks[key & (1 << BLOCK_BITS) - 1]


def _block_behind(table_if_open: Callable[[int], RowTable | None], key: int) -> Block | None:
    """The block behind one of the same shard, if the table of the shard is in memory; None: there is none."""
    table, number = table_if_open(key >> BLOCK_BITS), (key & (1 << BLOCK_BITS) - 1) + 1
    return table.blocks[number] if table is not None and number < len(table.blocks) else None
