"""Which shards there are, and what is known of each, in so little memory that there may be a million.

Of a shard that the cache knows, only its URL, rows, checksum and damage stay in memory; its index is read again when
its rows are (`Catalogue.index`). An index that could not be cached stays.
"""

from __future__ import annotations

import hashlib
import json
import threading
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from dmagent_loader.errors import DamagedShardError
from dmagent_loader.shards.index.cache import IndexCache, build_and_cache, is_vouched_for, with_content
from dmagent_loader.shards.index.overview import SHARDS_OF_OVERVIEW, KnownShard, Overview
from dmagent_loader.shards.index.shard_index import ShardIndex
from dmagent_loader.shards.sources.local import ShardVersion, shard_version
from dmagent_loader.shards.sources.urls import absolute, base_name, display_url, is_local
from dmagent_loader.shards.tar.damage import ShardDamage

# Threads, not processes: reading and the checksums of large rows run outside the interpreter lock, two processes were
# no faster on two cores, and spawned ones would run a script without a main guard again. Small rows keep one core busy.
_INDEX_THREADS = 8
_AT_A_TIME = 512
"""Tasks that wait together: a thread pool keeps a kilobyte for each, and the overviews that they look into stay."""
_LOOKED_UP_TOGETHER = 16
"""Shards of one task: looking one up takes no longer than handing it to a thread."""

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is remembered of a shard; `index` only if it is not in the cache."""

    known: KnownShard
    damage: tuple[ShardDamage, ...] = ()
    index: ShardIndex | None = None

    @classmethod
    def of(cls, version: ShardVersion, index: ShardIndex, *, cached: bool) -> _Facts:
        known = KnownShard(
            version=version, rows=index.num_rows, checksum=bytes.fromhex(index.checksum), sha256=index.sha256
        )
        return cls(known, index.damage, None if cached else index)


@dataclass(frozen=True, slots=True)
class _LookUp:
    """Shards that one thread looks up; they lie within one group (`Catalogue._groups`)."""

    group: int
    shards: range
    overview: Overview


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
                self._names += absolute(url).encode("utf-8", "surrogateescape")
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

    def copies(self, most: int) -> tuple[int, list[tuple[int, int]]]:
        """How many shards have rows of the same content as an earlier one, and some of them, each with that one."""
        begins = np.frombuffer(self._checksums, np.uint64)[:: hashlib.sha256().digest_size // 8]
        rising = np.argsort(begins, kind="stable")
        begins = begins[rising]
        later = np.flatnonzero((begins[1:] == begins[:-1]) & (self.rows[rising[1:]] > 0)) + 1
        return len(later), [(int(rising[place]), int(rising[place - 1])) for place in later[:most]]

    def index(self, number: int) -> ShardIndex:
        """The index of a shard, from the cache, or built anew if it is not there any more.

        Raises:
            DamagedShardError: The shard is another than when the catalogue was made.
        """
        kept = self._uncached.get(number)
        if kept is not None:
            return kept
        url, checksum = self.url(number), self._checksum(number).hex()
        # The same rows may lie elsewhere in another version. To ask a server would take a request for each shard.
        version = shard_version(url) if is_local(url) else None
        index = self._cache.find(url, version, checksum)
        if index is None:
            version, stop = version or shard_version(url), threading.Event()
            built, cached = build_and_cache(url, version, self._cache, advance=lambda _: None, stop=stop)
            index = self._cache.find(url, version, checksum) if cached else with_content(built, checksum)
        if index is None:
            self._cache.forget_overview(map(self.url, self._groups[self._group_of(number)]))
            raise DamagedShardError(
                f"shard {display_url(url)} was replaced since it was opened: its rows are others; restore it, or open "
                "the shards again to index the new version"
            )
        return index

    def cached_index(self, number: int) -> Path:
        """The file that holds the index of a shard."""
        return self._cache.entry(self.url(number))

    def _checksum(self, number: int) -> bytes:
        size = hashlib.sha256().digest_size
        return bytes(self._checksums[number * size : (number + 1) * size])

    @cached_property
    def _groups(self) -> list[range]:
        """The shards of each overview."""
        return [
            range(start, min(start + SHARDS_OF_OVERVIEW, end))
            for first, end in self.spans
            for start in range(first, end, SHARDS_OF_OVERVIEW)
        ]

    def _group_of(self, number: int) -> int:
        return bisect_right(self._groups, number, key=lambda shards: shards.start) - 1

    def _note(self, number: int, facts: _Facts) -> None:
        self.rows[number] = facts.known.rows
        size = len(facts.known.checksum)
        self._checksums[number * size : (number + 1) * size] = facts.known.checksum
        if facts.damage:
            self.damage[number] = facts.damage
        if facts.index is not None:
            self._uncached[number] = facts.index

    def _find_or_build(self, progress: bool) -> None:
        stop = threading.Event()
        missing = array("q")  # of shards; what is known of each would take ten times as much
        missing_bytes = 0
        missing_of_group: Counter[int] = Counter()
        waiting: Counter[int] = Counter()
        for task, found in _in_threads(self._look_up, self._look_ups(waiting), stop):
            for number, facts in zip(task.shards, found, strict=True):
                if isinstance(facts, _Facts):
                    self._note(number, facts)
                else:
                    missing.append(number)
                    missing_of_group[task.group] += 1
                    missing_bytes += facts
            waiting[task.group] -= 1
            if not waiting[task.group]:
                self._save_overview(task.group, task.overview)
        if missing:
            self._build(missing, missing_bytes, missing_of_group, progress, stop)

    def _look_ups(self, waiting: Counter[int]) -> Iterator[_LookUp]:
        """All shards, dealt to threads; `waiting` counts the tasks of each group."""
        for group, shards in enumerate(self._groups):
            overview = self._load_overview(group)
            parts = [
                shards[first : first + _LOOKED_UP_TOGETHER] for first in range(0, len(shards), _LOOKED_UP_TOGETHER)
            ]
            waiting[group] = len(parts)
            yield from (_LookUp(group, part, overview) for part in parts)

    def _look_up(self, task: _LookUp) -> list[_Facts | int]:
        """Facts of each shard, or its bytes if it has to be indexed."""
        found: list[_Facts | int] = []
        start = self._groups[task.group].start
        for number in task.shards:
            url = self.url(number)
            version = shard_version(url)
            known = task.overview.find(number - start, version)
            if known is not None and is_vouched_for(url, known):
                found.append(_Facts(known))
                continue
            index = self._cache.load(url, version)
            if index is None:
                found.append(version.size)
                continue
            facts = _Facts.of(version, index, cached=True)
            if not facts.damage:
                task.overview.note(number - start, facts.known)
            found.append(facts)
        return found

    def _build(
        self,
        missing: Sequence[int],
        missing_bytes: int,
        missing_of_group: Counter[int],
        progress: bool,
        stop: threading.Event,
    ) -> None:
        """Indexes shards, about in their order, so that few overviews are in memory at a time."""

        def build(number: int) -> _Facts:
            url = self.url(number)
            version = shard_version(url)
            index, cached = build_and_cache(url, version, self._cache, advance=bar.update, stop=stop)
            return _Facts.of(version, index, cached=cached)

        overviews: dict[int, Overview] = {}
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
                group = self._group_of(number)
                overview = overviews.get(group)
                if overview is None:
                    overview = overviews[group] = self._load_overview(group)
                if not facts.damage and facts.index is None:
                    overview.note(number - self._groups[group].start, facts.known)
                missing_of_group[group] -= 1
                if not missing_of_group[group]:
                    self._save_overview(group, overviews.pop(group))
        self._cache.sweep()

    def _load_overview(self, group: int) -> Overview:
        shards = self._groups[group]
        return self._cache.load_overview(map(self.url, shards), len(shards))

    def _save_overview(self, group: int, overview: Overview) -> None:
        if overview.is_changed:
            self._cache.save_overview(map(self.url, self._groups[group]), overview)


def _in_threads(work: Callable[[_T], _R], tasks: Iterable[_T], stop: threading.Event) -> Iterator[tuple[_T, _R]]:
    """Every task with its result; on an error or Ctrl-C what runs is told to stop and what waits is dropped."""
    tasks = iter(tasks)
    with ThreadPoolExecutor(max_workers=_INDEX_THREADS, thread_name_prefix="dmagent-index") as pool:
        try:
            while batch := list(islice(tasks, _AT_A_TIME)):
                futures = {pool.submit(work, task): task for task in batch}
                for future in as_completed(futures):
                    yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # first, or threads that stop would take more tasks
            stop.set()
            raise
