"""Which shards there are, and what is known of each, in so little memory that there may be a million.

Of a shard that the cache knows, only its URL, rows, checksum and damage stay in memory; its index is read again when
its rows are (`Catalogue.index`). An index that could not be cached stays.
"""

from __future__ import annotations

import hashlib
import json
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from dmagent_loader.errors import DamagedShardError
from dmagent_loader.shards.cache import IndexCache, build_and_cache
from dmagent_loader.shards.damage import ShardDamage
from dmagent_loader.shards.index import ShardIndex
from dmagent_loader.shards.reader import shard_version
from dmagent_loader.shards.urls import base_name, display_url, is_local

# Threads, not processes: reading and the checksums of large rows run outside the interpreter lock, two processes were
# no faster on two cores, and spawned ones would run a script without a main guard again. Small rows keep one core busy.
_INDEX_THREADS = 8
_AT_A_TIME = 4096
"""Shards looked up together: a thread pool keeps a kilobyte for each task."""

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is remembered of a shard; `index` only if it is not in the cache."""

    rows: int
    checksum: bytes
    damage: tuple[ShardDamage, ...]
    index: ShardIndex | None

    @classmethod
    def of(cls, index: ShardIndex, cached: bool) -> _Facts:
        return cls(index.num_rows, bytes.fromhex(index.checksum), index.damage, None if cached else index)


class Catalogue:
    """All shards of all domains, numbered through in the order of domains and lists.

    Args:
        urls: Each domain with the URLs of its shards; the list of one is dropped before the next is asked for.
        cache: Where indexes are kept.
        progress: Show a progress bar while shards are indexed.

    Raises:
        ShardNotFoundError: A shard does not exist.
        ShardLayoutError: A shard that cannot be read by position.
    """

    def __init__(self, urls: Iterable[tuple[str, Sequence[str]]], cache: IndexCache, progress: bool) -> None:
        self._cache = cache
        self._names = bytearray()
        domains, name_end, span_end = [], array("q", [0]), [0]
        for domain, listed in urls:
            domains.append(domain)
            for url in listed:
                self._names += url.encode("utf-8", "surrogateescape")
                name_end.append(len(self._names))
            span_end.append(len(name_end) - 1)
        self.domains: tuple[str, ...] = tuple(domains)
        self.spans: list[tuple[int, int]] = list(pairwise(span_end))
        """(D,) the number of the first shard of each domain, and that after its last."""
        self._name_end: NDArray[np.int64] = np.array(name_end, np.int64)
        self.rows: NDArray[np.int64] = np.zeros(len(self), np.int64)
        """(S,) rows of each shard."""
        self._checksums = bytearray(len(self) * hashlib.sha256().digest_size)
        self.damage: dict[int, tuple[ShardDamage, ...]] = {}
        """By shard; whole ones are left out."""
        self._uncached: dict[int, ShardIndex] = {}
        self._find_or_build(progress)

    def __len__(self) -> int:
        return len(self._name_end) - 1

    def url(self, number: int) -> str:
        """The URL of a shard."""
        return str(self._names[self._name_end[number] : self._name_end[number + 1]], "utf-8", "surrogateescape")

    def urls(self, domain: int) -> Iterator[str]:
        """The URLs of a domain."""
        return (self.url(number) for number in range(*self.spans[domain]))

    @cached_property
    def is_local(self) -> bool:
        """Whether all shards are files, so that no row has to cross a network protocol."""
        return all(is_local(self.url(number)) for number in range(len(self)))

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over domain names and, per shard, file name, rows and content; folders and hosts do not matter."""
        digest = hashlib.sha256()
        for domain, span in zip(self.domains, self.spans, strict=True):
            digest.update(json.dumps(domain).encode())
            for number in range(*span):
                shard = [base_name(self.url(number)), int(self.rows[number]), self._checksum(number).hex()]
                digest.update(json.dumps(shard).encode())
        return digest.hexdigest()

    def index(self, number: int) -> ShardIndex:
        """The index of a shard, from the cache, or built anew if it is not there any more.

        Raises:
            DamagedShardError: The shard is another than when the catalogue was made.
        """
        kept = self._uncached.get(number)
        if kept is not None:
            return kept
        url, checksum = self.url(number), self._checksum(number).hex()
        index = self._cache.find(url, checksum)
        if index is None:
            stop = threading.Event()
            index, _ = build_and_cache(url, shard_version(url), self._cache, advance=lambda _: None, stop=stop)
        if index.checksum != checksum:
            raise DamagedShardError(
                f"shard {display_url(url)} was replaced since it was opened: its rows are others; restore it, or open "
                "the shards again to index the new version"
            )
        return index

    def _checksum(self, number: int) -> bytes:
        size = hashlib.sha256().digest_size
        return bytes(self._checksums[number * size : (number + 1) * size])

    def _note(self, number: int, facts: _Facts) -> None:
        self.rows[number] = facts.rows
        self._checksums[number * len(facts.checksum) : (number + 1) * len(facts.checksum)] = facts.checksum
        if facts.damage:
            self.damage[number] = facts.damage
        if facts.index is not None:
            self._uncached[number] = facts.index

    def _find_or_build(self, progress: bool) -> None:
        stop = threading.Event()
        missing = array("q")  # of shards; what is known of each would take ten times as much
        missing_bytes = 0

        def look_up(number: int) -> int | _Facts:
            """Facts of the shard, or its bytes if it has to be indexed."""
            url = self.url(number)
            version = shard_version(url)
            index = self._cache.load(url, version)
            return version.size if index is None else _Facts.of(index, cached=True)

        for number, found in _in_threads(look_up, range(len(self)), stop):
            if isinstance(found, _Facts):
                self._note(number, found)
            else:
                missing.append(number)
                missing_bytes += found
        if not missing:
            return

        def build(number: int) -> _Facts:
            url = self.url(number)
            return _Facts.of(*build_and_cache(url, shard_version(url), self._cache, advance=bar.update, stop=stop))

        with tqdm(
            total=missing_bytes,
            unit="B",
            unit_scale=True,
            desc=f"indexing {len(missing)} shard{'s' if len(missing) > 1 else ''}",
            mininterval=0.5,
            disable=not progress,
        ) as bar:
            for number, facts in _in_threads(build, missing, stop):
                self._note(number, facts)


def _in_threads(work: Callable[[_T], _R], tasks: Sequence[_T], stop: threading.Event) -> Iterator[tuple[_T, _R]]:
    """Every task with its result; on an error or Ctrl-C what runs is told to stop and what waits is dropped."""
    with ThreadPoolExecutor(max_workers=_INDEX_THREADS, thread_name_prefix="dmagent-index") as pool:
        try:
            for first in range(0, len(tasks), _AT_A_TIME):
                futures = {pool.submit(work, task): task for task in tasks[first : first + _AT_A_TIME]}
                for future in as_completed(futures):
                    yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # first, or threads that stop would take more tasks
            stop.set()
            raise
