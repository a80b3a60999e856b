"""A start: facts about all shards from the cache, from tables in the store, from other ranks, or by reading shards."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from dmagent_loader.shards.index.cache import IndexCache, build_and_cache
from dmagent_loader.shards.index.catalogue import Catalogue, Facts
from dmagent_loader.shards.index.entry_file import looks_as_indexed
from dmagent_loader.shards.index.overview import KnownShard, KnownShards, Overview
from dmagent_loader.shards.index.peers import Alone, Peers
from dmagent_loader.shards.index.sharing import cache_groups, digest_of, lacking_on_ranks, owners, slices
from dmagent_loader.shards.index.stored import StoredIndexes
from dmagent_loader.shards.index.threads import INDEX_THREADS, in_threads, in_threads_if_slow
from dmagent_loader.shards.index.verify import are_verified, is_verified
from dmagent_loader.shards.manifest import Manifests
from dmagent_loader.shards.sources.listing import REQUESTS_IN_FLIGHT, remote_versions
from dmagent_loader.shards.sources.local import ShardVersion, VersionFacts, local_facts, shard_version
from dmagent_loader.shards.sources.urls import base_name, display_url, is_local, without_signature

_SHARDS_PER_TASK = 256
"""Shards of one look-up task: a look-up takes a fortieth of the time of handing a task to a thread."""
_FACTS_BYTES, _INDEX_BYTES_PER_ROW = 500, 40
"""What ranks send each other about a shard, and about each of its rows."""
_EXCHANGED_BYTES, _LEAST_SLICE_BYTES = 128 << 20, 1 << 20
"""What all ranks together send at a time, and each of them at least."""

logger = logging.getLogger(__name__)


def open_catalogue(
    urls: Iterable[tuple[str, Sequence[str]]],
    cache: IndexCache,
    manifests: Manifests,
    *,
    stored: StoredIndexes | None = None,
    progress: bool = True,
    peers: Peers | None = None,
) -> Catalogue:
    """Finds out about all shards.

    Args:
        urls: Each domain with the URLs of its shards. Only one list is in memory at a time.
        cache: Where indexes are kept.
        manifests: Manifests that shards are compared with.
        stored: Indexes in the store; None: none are used.
        progress: Show a progress bar while shards are indexed.
        peers: The ranks that open the same shards; None: this process alone.

    Raises:
        ShardNotFoundError: A shard does not exist.
        ShardLayoutError: A shard that cannot be read by position.
    """
    catalogue = Catalogue(urls, cache, manifests, stored=stored)
    _Opening(catalogue, progress, _alike(catalogue, peers or Alone())).run()
    manifests.release()
    return catalogue


@dataclass(frozen=True, slots=True)
class _LookUp:
    """Shards that one thread looks up, all of one group (`Catalogue.groups`)."""

    group: int
    shards: range
    overview: Overview


def _alike(catalogue: Catalogue, peers: Peers) -> Peers:
    """The ranks, if they open the same shards in the same way; else this one works alone."""
    if peers.size == 1:
        return peers
    remote = digest_of(without_signature(catalogue.url(number)) for number in catalogue.remote)
    facts = (catalogue.domains, catalogue.spans, remote, catalogue.cache.key_ends_at, catalogue.stored is None)
    lists = peers.gather(facts)
    return peers if all(other == lists[0] for other in lists) else Alone(peers.stop)


class _Opening:
    """One start.

    Args:
        catalogue: The shards, about which nothing is known yet.
        progress: Show a progress bar while shards are indexed.
        peers: The ranks that open the same shards in the same way.
    """

    def __init__(self, catalogue: Catalogue, progress: bool, peers: Peers) -> None:
        self._catalogue, self._progress, self._peers = catalogue, progress, peers
        self._versions: dict[int, ShardVersion] = {}
        """Versions of the remote shards."""
        self._sizes: NDArray[np.int64] = np.zeros(len(catalogue), np.int64)
        """(S,) bytes of each shard."""

    def run(self) -> None:
        """Finds out about all shards."""
        self._versions = self._remote_versions()
        lacking = np.zeros(len(self._catalogue), bool)
        waiting: Counter[int] = Counter()
        in_turn = in_threads_if_slow if self._catalogue.is_local else in_threads
        for task, found in in_turn(self._look_up, self._look_ups(waiting), self._peers.stop):
            if isinstance(found, KnownShards):
                self._catalogue.add_all(task.shards, found)
            else:
                for number, facts in zip(task.shards, found, strict=True):
                    if facts is None:
                        lacking[number] = True
                    else:
                        self._catalogue.add(number, facts)
            waiting[task.group] -= 1
            if not waiting[task.group]:
                self._catalogue.save_overview(task.group, task.overview)
        self._share(lacking)

    def _remote_versions(self) -> dict[int, ShardVersion]:
        """Versions of the remote shards, for which rank 0 asks; also agrees on `Catalogue.tag_of_run`."""
        if not self._catalogue.remote:
            return {}
        urls = list(map(self._catalogue.url, self._catalogue.remote))
        mine = None
        if self._peers.rank == 0:
            mine = remote_versions(urls, self._peers.stop), self._catalogue.tag_of_run
            _warn_of_unknown_versions(urls, mine[0])
        found, self._catalogue.tag_of_run = self._peers.gather(mine)[0]
        return dict(zip(self._catalogue.remote, found, strict=True))

    def _version(self, number: int) -> ShardVersion:
        known = self._versions.get(number)
        return shard_version(self._catalogue.url(number)) if known is None else known

    def _facts_of(self, shards: range, urls: Sequence[str]) -> list[VersionFacts]:
        if not self._versions:
            return list(map(local_facts, urls))
        known = map(self._versions.get, shards)
        return [
            local_facts(url) if version is None else version.facts for url, version in zip(urls, known, strict=True)
        ]

    def _look_ups(self, waiting: Counter[int]) -> Iterator[_LookUp]:
        """All shards, in tasks for threads; `waiting` counts the pending tasks of each group."""
        for group, shards in enumerate(self._catalogue.groups):
            overview = self._catalogue.load_overview(group)
            parts = [shards[first : first + _SHARDS_PER_TASK] for first in range(0, len(shards), _SHARDS_PER_TASK)]
            waiting[group] = len(parts)
            yield from (_LookUp(group, part, overview) for part in parts)

    def _look_up(self, task: _LookUp) -> KnownShards | list[Facts | None]:
        """Facts about each shard; None if its index is not in the cache."""
        start = self._catalogue.groups[task.group].start
        urls = self._catalogue.urls_of(task.shards)
        versions = self._facts_of(task.shards, urls)
        self._sizes[task.shards.start : task.shards.stop] = [facts[0] for facts in versions]
        records = self._catalogue.manifests.records(urls)
        # No object is made for a single shard where none has changed, as at most starts.
        unchanged = task.overview.find_all(task.shards.start - start, versions)
        if unchanged is not None and are_verified(unchanged, records):
            return unchanged
        found: list[Facts | None] = []
        for number, url, facts_of_version, record in zip(task.shards, urls, versions, records, strict=True):
            version = ShardVersion.of(facts_of_version)
            known = task.overview.find(number - start, version)
            if known is not None and is_verified(known, record):
                found.append(Facts(known))
                continue
            index = self._catalogue.cache.load(url, version, record)
            if index is None:
                found.append(None)
                continue
            facts = Facts.of(version, index, cached=True)
            if not facts.damage:
                task.overview.add(number - start, facts.known)
            found.append(facts)
        return found

    def _share(self, lacking: NDArray[np.bool_]) -> None:
        """Facts about the shards that this rank or another one lacks."""
        catalogue, peers = self._catalogue, self._peers
        on_ranks = lacking_on_ranks(peers, lacking)
        if not on_ranks.any():
            return
        groups = cache_groups(peers, catalogue.cache.folder) if peers.size > 1 else [0]
        pending = _Pending(catalogue, lacking, saves=groups[peers.rank] == peers.rank)
        if catalogue.stored is not None:
            self._use_tables(catalogue.stored, np.flatnonzero(on_ranks.any(axis=0)).tolist(), pending)
        lacking = np.zeros(len(catalogue), bool)
        lacking[list(pending.numbers)] = True
        on_ranks = lacking_on_ranks(peers, lacking)
        owner = owners(on_ranks, peers.gather(self._sizes if peers.rank == 0 else None)[0])
        self._build(np.flatnonzero(lacking & (owner == peers.rank)).tolist(), pending)
        for number, facts in self._exchanged(owner, on_ranks, groups):
            if number in pending.numbers:
                accepted = self._accepted(number, facts, pending)
                if accepted is not None:
                    pending.add(number, accepted)
        # Copies on the disk of this node, if they differ from those of the others.
        self._build(sorted(pending.numbers), pending)
        catalogue.cache.sweep()

    def _use_tables(self, stored: StoredIndexes, numbers: Sequence[int], pending: _Pending) -> None:
        """Facts from the tables in the store, which rank 0 reads.

        Args:
            stored: Indexes in the store.
            numbers: Shards that any rank lacks.
            pending: Shards that this rank lacks.
        """
        folders: dict[str, list[int]] = defaultdict(list)
        for number in numbers:
            if stored.are_used_for(self._catalogue.url(number)):
                folders[stored.folder(self._catalogue.url(number))].append(number)
        tables: dict[str, bytes] = {}
        if self._peers.rank == 0:
            found = in_threads(stored.read_table, folders, self._peers.stop, REQUESTS_IN_FLIGHT)
            tables = {folder: data for folder, data in found if data is not None}
        tables = self._peers.gather(tables or None)[0] or {}
        for folder, data in tables.items():
            table = stored.parse_table(folder, data)
            others: list[int] = []
            uncompared: list[int] = []
            disputed = self._disputed(table, folders[folder], pending)
            for number in pending.numbers.intersection(folders[folder]):
                url, version = self._catalogue.url(number), self._version(number)
                known = table.get(base_name(url))
                if known is None:
                    continue
                is_same = known.version.size == version.size and known.version.tag in ("", version.tag)
                if not is_same or number in disputed:
                    others.append(number)
                elif is_verified(known, self._catalogue.manifests.record(url)):
                    pending.forget_others(number, version)
                    pending.add(number, Facts(replace(known, version=version)))
                else:
                    (others if known.sha256 is not None else uncompared).append(number)
            if others:
                logger.warning(
                    "%s: %d shard(s) are not those of the table of indexes there, by size, etag or manifest (first: "
                    "%s): they are read through to index them; `dmagent index` writes the table anew (--beside, --to)",
                    display_url(folder),
                    len(others),
                    display_url(self._catalogue.url(min(others))),
                )
            if uncompared:
                logger.warning(
                    "%s: the table of indexes there was written without the manifest of %d shard(s), so it lacks their "
                    "sha256 (first: %s): they are read through to compare them; `dmagent index MANIFEST` writes the "
                    "table anew (--beside, --to)",
                    display_url(folder),
                    len(uncompared),
                    display_url(self._catalogue.url(min(uncompared))),
                )

    def _disputed(self, table: Mapping[str, KnownShard], numbers: Sequence[int], pending: _Pending) -> set[int]:
        """Shards whose entry names no version, and of which any rank knows another version or other content.

        Args:
            table: Table of a folder.
            numbers: Shards of that folder that any rank lacks.
            pending: Shards that this rank lacks.
        """
        if all(known.version.tag for known in table.values()):
            return set()
        found = []
        for number in numbers:
            known = table.get(base_name(self._catalogue.url(number)))
            if known is None or known.version.tag:
                continue
            if number not in pending.numbers:
                is_other = not self._catalogue.has_content(number, known.checksum)
            else:
                version = self._version(number)
                is_other = known.version.size == version.size and pending.knew_another(number, version)
            if is_other:
                found.append(number)
        return set().union(*self._peers.gather(found))

    def _build(self, numbers: Sequence[int], pending: _Pending) -> None:
        """Indexes shards, roughly in their order, so that few overviews are in memory at a time."""
        if not numbers:
            return

        def build(number: int) -> Facts:
            url, version = self._catalogue.url(number), self._version(number)
            record = self._catalogue.manifests.record(url)
            index, cached = build_and_cache(
                url, version, self._catalogue.cache, record, advance=bar.update, stop=self._peers.stop
            )
            return Facts.of(version, index, cached=cached)

        are_local = all(is_local(self._catalogue.url(number)) for number in numbers)
        with tqdm(
            total=int(self._sizes[numbers].sum()),
            unit="B",
            unit_scale=True,
            desc=f"indexing {len(numbers)} shard{'s' if len(numbers) > 1 else ''}",
            mininterval=0.5,
            disable=not self._progress,
        ) as bar:
            threads = INDEX_THREADS if are_local else REQUESTS_IN_FLIGHT
            for number, facts in in_threads(build, numbers, self._peers.stop, threads):
                pending.add(number, facts)

    def _exchanged(
        self, owner: NDArray[np.int32], on_ranks: NDArray[np.bool_], groups: Sequence[int]
    ) -> Iterator[tuple[int, Facts]]:
        """What the ranks have found out about shards that others lack; with the index where the cache is not shared."""
        if self._peers.size == 1:
            return
        is_outside = np.array([group != groups[self._peers.rank] for group in groups])
        lacked = np.delete(on_ranks, self._peers.rank, axis=0).any(axis=0)
        numbers = np.flatnonzero((owner == self._peers.rank) & lacked)
        goes_outside = on_ranks[is_outside][:, numbers].any(axis=0)
        weights = _FACTS_BYTES + self._catalogue.rows[numbers] * np.where(goes_outside, _INDEX_BYTES_PER_ROW, 0)
        parts = list(slices(weights.tolist(), max(_LEAST_SLICE_BYTES, _EXCHANGED_BYTES // self._peers.size)))
        for turn in range(max(self._peers.gather(len(parts)))):
            sent = None
            if turn < len(parts):
                places = zip(numbers[parts[turn]].tolist(), goes_outside[parts[turn]].tolist(), strict=True)
                sent = [(number, self._facts(number, with_index=outside)) for number, outside in places]
            for rank, items in enumerate(self._peers.gather(sent)):
                if rank != self._peers.rank:
                    yield from items or ()

    def _facts(self, number: int, *, with_index: bool) -> Facts:
        """The facts about a shard again, for other ranks."""
        index = replace(self._catalogue.index(number), damage=self._catalogue.damage.get(number, ()))
        return Facts.of(self._version(number), index, cached=not with_index and self._catalogue.is_cached(number))

    def _accepted(self, number: int, facts: Facts, pending: _Pending) -> Facts | None:
        """The facts that another rank has found out, if they hold for the shard as this rank sees it."""
        url, version, index = self._catalogue.url(number), self._version(number), facts.index
        if (version, version.changed) != (facts.known.version, facts.known.version.changed):
            if index is None:
                index = self._catalogue.cache.load(url, version, self._catalogue.manifests.record(url))
                return None if index is None else Facts.of(version, index, cached=True)
            if version.size != index.file_size or facts.damage or not looks_as_indexed(url, index):
                return None
        if index is not None and (not pending.saves or self._catalogue.cache.save(url, version, index)):
            index = None
        return Facts(replace(facts.known, version=version), facts.damage, index)


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

    def add(self, number: int, facts: Facts) -> None:
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

    def forget_others(self, number: int, version: ShardVersion) -> None:
        """Removes the cached index of a remote shard if it is not known to be of this version.

        The same rows may lie at other places in another version, and their checksum is the same.
        """
        url = self._catalogue.url(number)
        if self.saves and not is_local(url):
            overview = self._overview(self._catalogue.group_of(number))
            if not overview.knows(self._catalogue.place(number), version):
                self._catalogue.cache.forget(url)

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


def _warn_of_unknown_versions(urls: Sequence[str], versions: Sequence[ShardVersion]) -> None:
    unknown = [url for url, version in zip(urls, versions, strict=True) if not version.tag]
    if unknown:
        logger.warning(
            "%d remote shard(s), of which the first is %s, have neither an etag nor a modification time, so other "
            "content of the same size would pass for that of an earlier run: each run fetches their blocks anew; serve "
            "them with one of the two",
            len(unknown),
            display_url(unknown[0]),
        )
