"""All shards and the essential facts about each, in little enough memory for a million shards.

For a shard whose index is cached, only URL, rows, checksum and damage stay in memory; the index is loaded when rows are
read (`Catalogue.index`). An index that could not be cached stays in memory.
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

from dmagent_loader.errors import HOW_TO_RESUME, DamagedShardError
from dmagent_loader.shards.index.cache import IndexCache, build_and_cache
from dmagent_loader.shards.index.inventory import inventory_text
from dmagent_loader.shards.index.overview import SHARDS_OF_OVERVIEW, KnownShard, Overview
from dmagent_loader.shards.index.shard_index import ShardIndex
from dmagent_loader.shards.index.verify import is_verified, with_content
from dmagent_loader.shards.manifest import Manifests
from dmagent_loader.shards.sources.local import ShardVersion, shard_version
from dmagent_loader.shards.sources.urls import absolute, base_name, display_url, is_local
from dmagent_loader.shards.tar import ShardDamage

# Threads, not processes: reads and checksums of large rows release the interpreter lock, two processes were not faster
# on two cores, and spawned processes would run a script without a main guard again. Small rows keep one core busy.
_INDEX_THREADS = 8
_TASKS_AT_A_TIME = 512
"""Tasks submitted together: a pending task takes a kilobyte and keeps its overview in memory."""
_SHARDS_PER_TASK = 16
"""Shards of one look-up task: one look-up takes no longer than handing a task to a thread."""

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class _Facts:
    """The facts about a shard that stay in memory; `index` only if it is not cached."""

    known: KnownShard
    damage: tuple[ShardDamage, ...] = ()
    index: ShardIndex | None = None

    @classmethod
    def of(cls, version: ShardVersion, index: ShardIndex, *, cached: bool) -> _Facts:
        known = KnownShard(
            version=version,
            rows=index.num_rows,
            inventory=inventory_text(index),
            checksum=bytes.fromhex(index.checksum),
            sha256=index.sha256,
        )
        return cls(known, index.damage, None if cached else index)


@dataclass(frozen=True, slots=True)
class _LookUp:
    """Shards that one thread looks up, all of one group (`Catalogue._groups`)."""

    group: int
    shards: range
    overview: Overview


class Catalogue:
    """All shards of all domains, numbered consecutively in the order of domains and lists.

    Args:
        urls: Each domain with the URLs of its shards. Only one list is in memory at a time.
        cache: Where indexes are kept.
        manifests: Manifests that shards are compared with.
        progress: Show a progress bar while shards are indexed.

    Attributes:
        domains: (D,) names of the domains.
        spans: (D,) number of the first shard of each domain, and of the first one after it.
        rows: (S,) rows of each shard.
        inventories: Distinct inventories of shards, as text (`dmagent_loader.shards.index.inventory`), with their
            numbers.
        inventory: (S,) number of the inventory of each shard.
        damage: Damage of each damaged shard, by its number.

    Raises:
        ShardNotFoundError: A shard does not exist.
        ShardLayoutError: A shard that cannot be read by position.
    """

    def __init__(
        self, urls: Iterable[tuple[str, Sequence[str]]], cache: IndexCache, manifests: Manifests, progress: bool
    ) -> None:
        self._cache, self._manifests = cache, manifests
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
        self._name_end: NDArray[np.int64] = np.array(name_end, np.int64)
        self.rows: NDArray[np.int64] = np.zeros(len(self), np.int64)
        self.inventories: dict[str, int] = {}
        self.inventory: NDArray[np.int32] = np.zeros(len(self), np.int32)
        self._checksums = bytearray(len(self) * hashlib.sha256().digest_size)
        self.damage: dict[int, tuple[ShardDamage, ...]] = {}
        self._uncached: dict[int, ShardIndex] = {}
        self._find_or_build(progress)
        manifests.release()

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
        """Whether all shards are local files."""
        return all(is_local(self.url(number)) for number in range(len(self)))

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over domain names and, per shard, file name, rows and content, but not folders and hosts."""
        digest = hashlib.sha256()
        for domain, span in zip(self.domains, self.spans, strict=True):
            digest.update(json.dumps(domain).encode())
            for number in range(*span):
                shard = [base_name(self.url(number)), int(self.rows[number]), self._checksum(number).hex()]
                digest.update(json.dumps(shard).encode())
        return digest.hexdigest()

    @cached_property
    def contents(self) -> NDArray[np.uint64]:
        """(S,) the first 64 bits of the checksum of each shard's content."""
        columns = np.frombuffer(self._checksums, np.dtype("<u8"))
        return columns[:: hashlib.sha256().digest_size // 8].astype(np.uint64)

    def copies(self, most: int) -> tuple[int, list[tuple[int, int]]]:
        """Finds shards with the same rows as another one.

        Args:
            most: Largest number of pairs to list.

        Returns:
            The number of such shards, and pairs of shards with the same rows.
        """
        begins = self.contents
        rising = np.argsort(begins, kind="stable")
        begins = begins[rising]
        later = np.flatnonzero((begins[1:] == begins[:-1]) & (self.rows[rising[1:]] > 0)) + 1
        return len(later), [(int(rising[position]), int(rising[position - 1])) for position in later[:most]]

    def index(self, number: int) -> ShardIndex:
        """The index of a shard, from the cache, or built again if the cache has lost it.

        Raises:
            DamagedShardError: The shard was replaced since the catalogue was made.
        """
        uncached = self._uncached.get(number)
        if uncached is not None:
            return uncached
        url, checksum = self.url(number), self._checksum(number).hex()
        # The same rows may lie at other offsets in another version. A server is not asked: one request per shard.
        version = shard_version(url) if is_local(url) else None
        index = self._cache.find(url, version, checksum)
        if index is None:
            version, stop = version or shard_version(url), threading.Event()
            record = self._manifests.record(url)
            built, cached = build_and_cache(url, version, self._cache, record, advance=lambda _: None, stop=stop)
            index = self._cache.find(url, version, checksum) if cached else with_content(built, checksum)
        if index is None:
            self.forget_overview(number)
            raise DamagedShardError(
                f"shard {display_url(url)} was replaced since it was opened: its rows are others; restore it, or open "
                f"the shards again to index the new version; {HOW_TO_RESUME}"
            )
        return index

    def forget_overview(self, number: int) -> None:
        """Removes the overview of a shard that was replaced, so that the next start looks at its index."""
        self._cache.forget_overview(map(self.url, self._groups[self._group_of(number)]))

    def cached_index(self, number: int) -> Path:
        """The file for the index of a shard."""
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

    def _add(self, number: int, facts: _Facts) -> None:
        known = facts.known
        self.rows[number] = known.rows
        inventory = self.inventories.get(known.inventory)
        if inventory is None:
            inventory = self.inventories[known.inventory] = len(self.inventories)
        if inventory:
            self.inventory[number] = inventory
        size = len(known.checksum)
        self._checksums[number * size : (number + 1) * size] = known.checksum
        if facts.damage:
            self.damage[number] = facts.damage
        if facts.index is not None:
            self._uncached[number] = facts.index

    def _find_or_build(self, progress: bool) -> None:
        stop = threading.Event()
        missing = array("q")  # numbers of shards to index
        missing_bytes = 0
        missing_of_group: Counter[int] = Counter()
        waiting: Counter[int] = Counter()
        for task, found in _in_threads(self._look_up, self._look_ups(waiting), stop):
            for number, facts in zip(task.shards, found, strict=True):
                if isinstance(facts, _Facts):
                    self._add(number, facts)
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
        """All shards, in tasks for threads; `waiting` counts the pending tasks of each group."""
        for group, shards in enumerate(self._groups):
            overview = self._load_overview(group)
            parts = [shards[first : first + _SHARDS_PER_TASK] for first in range(0, len(shards), _SHARDS_PER_TASK)]
            waiting[group] = len(parts)
            yield from (_LookUp(group, part, overview) for part in parts)

    def _look_up(self, task: _LookUp) -> list[_Facts | int]:
        """Facts about each shard, or its size in bytes if it has to be indexed."""
        found: list[_Facts | int] = []
        start = self._groups[task.group].start
        for number in task.shards:
            url = self.url(number)
            version = shard_version(url)
            record = self._manifests.record(url)
            known = task.overview.find(number - start, version)
            if known is not None and is_verified(known, record):
                found.append(_Facts(known))
                continue
            index = self._cache.load(url, version, record)
            if index is None:
                found.append(version.size)
                continue
            facts = _Facts.of(version, index, cached=True)
            if not facts.damage:
                task.overview.add(number - start, facts.known)
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
        """Indexes shards, roughly in their order, so that few overviews are in memory at a time."""

        def build(number: int) -> _Facts:
            url = self.url(number)
            version = shard_version(url)
            record = self._manifests.record(url)
            index, cached = build_and_cache(url, version, self._cache, record, advance=bar.update, stop=stop)
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
                self._add(number, facts)
                group = self._group_of(number)
                overview = overviews.get(group)
                if overview is None:
                    overview = overviews[group] = self._load_overview(group)
                if not facts.damage and facts.index is None:
                    overview.add(number - self._groups[group].start, facts.known)
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
    """Yields every task with its result. An error or Ctrl-C stops running tasks and drops pending ones."""
    tasks = iter(tasks)
    with ThreadPoolExecutor(max_workers=_INDEX_THREADS, thread_name_prefix="dmagent-index") as pool:
        try:
            while batch := list(islice(tasks, _TASKS_AT_A_TIME)):
                futures = {pool.submit(work, task): task for task in batch}
                for future in as_completed(futures):
                    yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # first, so that stopped threads take no more tasks
            stop.set()
            raise
