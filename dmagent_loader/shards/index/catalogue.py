"""All shards and the essential facts about each, in little enough memory for a million shards.

For a shard whose index is cached, only URL, rows, checksum and damage stay in memory; the index is loaded when rows are
read (`Catalogue.index`). An index that could not be cached stays in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from dmagent_loader.errors import HOW_TO_RESUME, DamagedShardError, ShardError
from dmagent_loader.shards.index.cache import IndexCache, build_and_cache, looks_as_indexed
from dmagent_loader.shards.index.inventory import inventory_text
from dmagent_loader.shards.index.overview import SHARDS_OF_OVERVIEW, KnownShard, Overview
from dmagent_loader.shards.index.peers import Alone, Peers
from dmagent_loader.shards.index.shard_index import ShardIndex
from dmagent_loader.shards.index.sharing import cache_groups, digest_of, lacking_on_ranks, owners, slices
from dmagent_loader.shards.index.stored import StoredIndexes, table_entry
from dmagent_loader.shards.index.verify import is_verified, with_content
from dmagent_loader.shards.manifest import Manifests
from dmagent_loader.shards.sources.listing import REQUESTS_IN_FLIGHT, remote_versions
from dmagent_loader.shards.sources.local import ShardVersion, shard_version
from dmagent_loader.shards.sources.urls import absolute, base_name, display_url, is_local, without_signature
from dmagent_loader.shards.tar import ShardDamage

# Threads, not processes: reads and checksums of large rows release the interpreter lock, two processes were not faster
# on two cores, and spawned processes would run a script without a main guard again. Small rows keep one core busy.
_INDEX_THREADS = 8
_TASKS_AT_A_TIME = 512
"""Tasks submitted together: a pending task takes a kilobyte and keeps its overview in memory."""
_SHARDS_PER_TASK = 128
"""Shards of one look-up task: a look-up takes a twentieth of the time of handing a task to a thread."""

_FACTS_BYTES, _INDEX_BYTES_PER_ROW = 500, 40
"""What ranks send each other about a shard, and about each of its rows."""
_EXCHANGED_BYTES, _LEAST_SLICE_BYTES = 128 << 20, 1 << 20
"""What all ranks together send at a time, and each of them at least."""

logger = logging.getLogger(__name__)

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
        stored: Indexes in the store; None: none are used.
        progress: Show a progress bar while shards are indexed.
        peers: The ranks that open the same shards; None: this process alone.

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
        self,
        urls: Iterable[tuple[str, Sequence[str]]],
        cache: IndexCache,
        manifests: Manifests,
        *,
        stored: StoredIndexes | None = None,
        progress: bool = True,
        peers: Peers | None = None,
    ) -> None:
        self.cache, self._manifests = cache, manifests
        self._stored = stored
        self._names = bytearray()
        self._remote = array("q")
        """Numbers of the remote shards, in order."""
        domains, name_end, span_end = [], array("q", [0]), [0]
        for domain, listed in urls:
            domains.append(domain)
            for url in listed:
                if not is_local(url):
                    self._remote.append(len(name_end) - 1)
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
        self._versions: dict[int, ShardVersion] = {}
        """Versions of remote shards, while the catalogue is made."""
        self._sizes: NDArray[np.int64] = np.zeros(len(self), np.int64)
        self._find_or_build(progress, peers or Alone())
        del self._sizes
        manifests.release()

    def __len__(self) -> int:
        return len(self._name_end) - 1

    def url(self, number: int) -> str:
        """The URL of a shard."""
        return str(self._names[self._name_end[number] : self._name_end[number + 1]], "utf-8", "surrogateescape")

    def urls(self, domain: int) -> Iterator[str]:
        """The URLs of a domain."""
        return (self.url(number) for number in range(*self.spans[domain]))

    @property
    def is_local(self) -> bool:
        """Whether all shards are local files."""
        return not self._remote

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
        index = self.cache.find(url, version, checksum)
        if index is None and self._stored is not None and self.may_be_stored(number):
            index = self._stored.load(url, int(self.rows[number]), checksum)
            if index is not None:
                self.cache.save(url, None, index)
        if index is None:
            version, stop = version or shard_version(url), threading.Event()
            record = self._manifests.record(url)
            built, cached = build_and_cache(url, version, self.cache, record, advance=lambda _: None, stop=stop)
            index = self.cache.find(url, version, checksum) if cached else with_content(built, checksum)
        if index is None:
            self.forget(number)
            raise DamagedShardError(
                f"shard {display_url(url)} was replaced since it was opened: its rows are others; restore it, or open "
                f"the shards again to index the new version; {HOW_TO_RESUME}"
            )
        return index

    def store_index(self, number: int, stored: StoredIndexes) -> KnownShard | None:
        """Writes the index of a shard to the store.

        Args:
            number: Number of the shard.
            stored: Where to.

        Returns:
            Its entry in the table; None if the shard has changed since the catalogue was made.

        Raises:
            ConfigurationError: It cannot be written.
        """
        url = self.url(number)
        version, index = shard_version(url), self._uncached.get(number)
        if index is not None:
            version = replace(version, is_sure=False)  # only the cache knows which version was indexed
        else:
            index = self.cache.load(url, version, self._manifests.record(url))
        if is_local(url):
            version = replace(version, is_sure=False)  # its time says nothing of a copy
        if index is None or index.damage or index.checksum != self._checksum(number).hex():
            return None
        stored.save(url, index)
        return table_entry(version, index)

    def forget(self, number: int) -> None:
        """Has the next start look at the index of a shard that was replaced."""
        self.cache.forget_overview(map(self.url, self._groups[self.group_of(number)]))
        with contextlib.suppress(ShardError):
            self.cache.forget_content(self.url(number), shard_version(self.url(number)))

    def may_be_stored(self, number: int) -> bool:
        """Whether the index of a shard is looked for in the store."""
        return self._stored is not None and self._stored.are_used_for(self.url(number))

    def cached_index(self, number: int) -> Path:
        """The file for the index of a shard."""
        return self.cache.entry(self.url(number))

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

    def group_of(self, number: int) -> int:
        """The group of a shard: the shards of one overview."""
        return bisect_right(self._groups, number, key=lambda shards: shards.start) - 1

    def place(self, number: int) -> int:
        """The position of a shard in its overview."""
        return number - self._groups[self.group_of(number)].start

    def add(self, number: int, facts: _Facts) -> None:
        """Adds the facts about a shard."""
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

    def _find_or_build(self, progress: bool, peers: Peers) -> None:
        """Facts about all shards: from the cache, from tables in the store, from other ranks, or by reading shards."""
        peers = self._alike(peers)
        self._versions = self._remote_versions(peers)
        lacking = np.zeros(len(self), bool)
        waiting: Counter[int] = Counter()
        for task, found in in_threads(self._look_up, self._look_ups(waiting), peers.stop):
            for number, facts in zip(task.shards, found, strict=True):
                if facts is None:
                    lacking[number] = True
                else:
                    self.add(number, facts)
            waiting[task.group] -= 1
            if not waiting[task.group]:
                self.save_overview(task.group, task.overview)
        self._share(lacking, progress, peers)
        self._versions.clear()

    def _alike(self, peers: Peers) -> Peers:
        """The ranks, if they open the same shards in the same way; else this one works alone."""
        remote = digest_of(without_signature(self.url(number)) for number in self._remote)
        lists = peers.gather((self.domains, self.spans, remote, self.cache.key_ends_at, self._stored is None))
        return peers if all(other == lists[0] for other in lists) else Alone(peers.stop)

    def _remote_versions(self, peers: Peers) -> dict[int, ShardVersion]:
        """Versions of the remote shards, for which rank 0 asks."""
        if not self._remote:
            return {}
        found = remote_versions(list(map(self.url, self._remote)), peers.stop) if peers.rank == 0 else None
        return dict(zip(self._remote, peers.gather(found)[0], strict=True))

    def _version(self, number: int) -> ShardVersion:
        known = self._versions.get(number)
        return shard_version(self.url(number)) if known is None else known

    def _look_ups(self, waiting: Counter[int]) -> Iterator[_LookUp]:
        """All shards, in tasks for threads; `waiting` counts the pending tasks of each group."""
        for group, shards in enumerate(self._groups):
            overview = self.load_overview(group)
            parts = [shards[first : first + _SHARDS_PER_TASK] for first in range(0, len(shards), _SHARDS_PER_TASK)]
            waiting[group] = len(parts)
            yield from (_LookUp(group, part, overview) for part in parts)

    def _look_up(self, task: _LookUp) -> list[_Facts | None]:
        """Facts about each shard; None if its index is not in the cache."""
        found: list[_Facts | None] = []
        start = self._groups[task.group].start
        urls = list(map(self.url, task.shards))
        for number, url, record in zip(task.shards, urls, self._manifests.records(urls), strict=True):
            version = self._versions.get(number) or shard_version(url)
            self._sizes[number] = version.size
            known = task.overview.find(number - start, version)
            if known is not None and is_verified(known, record):
                found.append(_Facts(known))
                continue
            index = self.cache.load(url, version, record)
            if index is None:
                found.append(None)
                continue
            facts = _Facts.of(version, index, cached=True)
            if not facts.damage:
                task.overview.add(number - start, facts.known)
            found.append(facts)
        return found

    def _share(self, lacking: NDArray[np.bool_], progress: bool, peers: Peers) -> None:
        """Facts about the shards that this rank or another one lacks."""
        on_ranks = lacking_on_ranks(peers, lacking)
        if not on_ranks.any():
            return
        groups = cache_groups(peers, self.cache.folder) if peers.size > 1 else [0]
        pending = _Pending(self, lacking, saves=groups[peers.rank] == peers.rank)
        if self._stored is not None:
            self._use_tables(self._stored, np.flatnonzero(on_ranks.any(axis=0)).tolist(), pending, peers)
        lacking = np.zeros(len(self), bool)
        lacking[list(pending.numbers)] = True
        on_ranks = lacking_on_ranks(peers, lacking)
        owner = owners(on_ranks, peers.gather(self._sizes if peers.rank == 0 else None)[0])
        self._build(np.flatnonzero(lacking & (owner == peers.rank)).tolist(), pending, progress, peers.stop)
        for number, facts in self._exchanged(owner, on_ranks, groups, pending, peers):
            if number in pending.numbers:
                accepted = self._accepted(number, facts, pending)
                if accepted is not None:
                    pending.add(number, accepted)
        # Copies on the disk of this node, if they differ from those of the others.
        self._build(sorted(pending.numbers), pending, progress, peers.stop)
        self.cache.sweep()

    def _use_tables(self, stored: StoredIndexes, numbers: Sequence[int], pending: _Pending, peers: Peers) -> None:
        """Facts from the tables in the store, which rank 0 reads.

        Args:
            stored: Indexes in the store.
            numbers: Shards that any rank lacks.
            pending: Shards that this rank lacks.
            peers: The ranks.
        """
        folders: dict[str, list[int]] = defaultdict(list)
        for number in numbers:
            if stored.are_used_for(self.url(number)):
                folders[stored.folder(self.url(number))].append(number)
        tables: dict[str, bytes] = {}
        if peers.rank == 0:
            found = in_threads(stored.read_table, folders, peers.stop, REQUESTS_IN_FLIGHT)
            tables = {folder: data for folder, data in found if data is not None}
        tables = peers.gather(tables or None)[0] or {}
        for folder, data in tables.items():
            table, others = stored.parse_table(folder, data), []
            for number in pending.numbers.intersection(folders[folder]):
                url, version = self.url(number), self._version(number)
                known = table.get(base_name(url))
                if known is None:
                    continue
                is_named = known.version.tag != ""
                is_same = known.version.size == version.size and (not is_named or known.version.tag == version.tag)
                if (
                    is_same
                    and is_verified(known, self._manifests.record(url))
                    and (is_named or not pending.knew_another(number, version))
                ):
                    pending.add(number, _Facts(replace(known, version=version)))
                else:
                    others.append(number)
            if others:
                logger.warning(
                    "%s: %d shard(s) are not those of the table of indexes there, by size, etag or manifest (first: "
                    "%s): they are read through to index them; `dmagent index` writes the table anew (--beside, --to)",
                    display_url(folder),
                    len(others),
                    display_url(self.url(min(others))),
                )

    def _build(self, numbers: Sequence[int], pending: _Pending, progress: bool, stop: threading.Event) -> None:
        """Indexes shards, roughly in their order, so that few overviews are in memory at a time."""
        if not numbers:
            return

        def build(number: int) -> _Facts:
            url, version = self.url(number), self._version(number)
            record = self._manifests.record(url)
            index, cached = build_and_cache(url, version, self.cache, record, advance=bar.update, stop=stop)
            return _Facts.of(version, index, cached=cached)

        are_local = all(is_local(self.url(number)) for number in numbers)
        with tqdm(
            total=int(self._sizes[numbers].sum()),
            unit="B",
            unit_scale=True,
            desc=f"indexing {len(numbers)} shard{'s' if len(numbers) > 1 else ''}",
            mininterval=0.5,
            disable=not progress,
        ) as bar:
            threads = _INDEX_THREADS if are_local else REQUESTS_IN_FLIGHT
            for number, facts in in_threads(build, numbers, stop, threads):
                pending.add(number, facts)

    def _exchanged(
        self,
        owner: NDArray[np.int32],
        on_ranks: NDArray[np.bool_],
        groups: Sequence[int],
        pending: _Pending,
        peers: Peers,
    ) -> Iterator[tuple[int, _Facts]]:
        """What the ranks have found out about shards that others lack; with the index where the cache is not shared."""
        if peers.size == 1:
            return
        is_outside = np.array([group != groups[peers.rank] for group in groups])
        lacked = np.delete(on_ranks, peers.rank, axis=0).any(axis=0)
        numbers = np.flatnonzero((owner == peers.rank) & lacked)
        goes_outside = on_ranks[is_outside][:, numbers].any(axis=0)
        weights = _FACTS_BYTES + self.rows[numbers] * np.where(goes_outside, _INDEX_BYTES_PER_ROW, 0)
        parts = list(slices(weights.tolist(), max(_LEAST_SLICE_BYTES, _EXCHANGED_BYTES // peers.size)))
        for turn in range(max(peers.gather(len(parts)))):
            sent = None
            if turn < len(parts):
                places = zip(numbers[parts[turn]].tolist(), goes_outside[parts[turn]].tolist(), strict=True)
                sent = [(number, self._facts(number, with_index=outside)) for number, outside in places]
            for rank, items in enumerate(peers.gather(sent)):
                if rank != peers.rank:
                    yield from items or ()

    def _facts(self, number: int, *, with_index: bool) -> _Facts:
        """The facts about a shard again, for other ranks."""
        index = replace(self.index(number), damage=self.damage.get(number, ()))
        return _Facts.of(self._version(number), index, cached=not with_index and number not in self._uncached)

    def _accepted(self, number: int, facts: _Facts, pending: _Pending) -> _Facts | None:
        """The facts that another rank has found out, if they hold for the shard as this rank sees it."""
        url, version, index = self.url(number), self._version(number), facts.index
        if (version, version.changed) != (facts.known.version, facts.known.version.changed):
            if index is None:
                index = self.cache.load(url, version, self._manifests.record(url))
                return None if index is None else _Facts.of(version, index, cached=True)
            if version.size != index.file_size or facts.damage or not looks_as_indexed(url, index):
                return None
        if index is not None and (not pending.saves or self.cache.save(url, version, index)):
            index = None
        return _Facts(replace(facts.known, version=version), facts.damage, index)

    def load_overview(self, group: int) -> Overview:
        """The overview of a group, as it was written last."""
        shards = self._groups[group]
        return self.cache.load_overview(map(self.url, shards), len(shards))

    def save_overview(self, group: int, overview: Overview) -> None:
        """Writes the overview of a group, if it has changed."""
        if overview.is_changed:
            self.cache.save_overview(map(self.url, self._groups[group]), overview)


class _Pending:
    """Shards about which facts are lacking. An overview is written when it has those of all its shards.

    Args:
        catalogue: All shards.
        lacking: (S,) shards that are lacking.
        saves: Whether this rank writes the overviews and indexes of its cache.

    Attributes:
        numbers: Numbers of the shards that are still lacking.
    """

    def __init__(self, catalogue: Catalogue, lacking: NDArray[np.bool_], *, saves: bool) -> None:
        self._catalogue, self.saves = catalogue, saves
        self.numbers: set[int] = set(np.flatnonzero(lacking).tolist())
        self._left = Counter(map(catalogue.group_of, self.numbers))
        self._overviews: dict[int, Overview] = {}

    def add(self, number: int, facts: _Facts) -> None:
        """Adds the facts about a shard."""
        self._catalogue.add(number, facts)
        self.numbers.remove(number)
        if not self.saves:
            return
        group = self._catalogue.group_of(number)
        if not facts.damage and facts.index is None:
            self._overview(group).add(self._catalogue.place(number), facts.known)
        self._left[group] -= 1
        if not self._left[group]:
            self._catalogue.save_overview(group, self._overview(group))
            del self._overviews[group]

    def knew_another(self, number: int, version: ShardVersion) -> bool:
        """Whether another version of a shard was known to this rank."""
        overview = self._overview(self._catalogue.group_of(number))
        return overview.knows_another(self._catalogue.place(number), version) or self._catalogue.cache.knows_another(
            self._catalogue.url(number), version
        )

    def _overview(self, group: int) -> Overview:
        if group not in self._overviews:
            self._overviews[group] = self._catalogue.load_overview(group)
        return self._overviews[group]


def in_threads(
    work: Callable[[_T], _R], tasks: Iterable[_T], stop: threading.Event, threads: int = _INDEX_THREADS
) -> Iterator[tuple[_T, _R]]:
    """Yields every task with its result. An error or Ctrl-C stops running tasks and drops pending ones."""
    tasks = iter(tasks)
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="dmagent-index") as pool:
        try:
            while batch := list(islice(tasks, _TASKS_AT_A_TIME)):
                futures = {pool.submit(work, task): task for task in batch}
                for future in as_completed(futures):
                    yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # first, so that stopped threads take no more tasks
            stop.set()
            raise
