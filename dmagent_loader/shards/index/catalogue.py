"""All shards and the essential facts about each, in little enough memory for a million shards.

For a shard whose index is cached, only URL, rows, checksum and damage stay in memory; the index is loaded when rows are
read (`Catalogue.index`). An index that could not be cached stays in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from dmagent_loader.errors import HOW_TO_RESUME, DamagedShardError, ShardError, ShardLayoutError
from dmagent_loader.shards.index.cache import IndexCache, build_and_cache
from dmagent_loader.shards.index.entry_file import looks_as_indexed
from dmagent_loader.shards.index.inventory import inventory_text
from dmagent_loader.shards.index.overview import SHARDS_OF_OVERVIEW, KnownShard, KnownShards, Overview
from dmagent_loader.shards.index.shard_index import ShardIndex
from dmagent_loader.shards.index.stored import StoredIndexes, table_entry
from dmagent_loader.shards.index.verify import with_content
from dmagent_loader.shards.manifest import Manifests
from dmagent_loader.shards.sources.checksum import crc32
from dmagent_loader.shards.sources.local import ShardVersion, shard_version
from dmagent_loader.shards.sources.urls import absolute, base_name, display_url, is_local
from dmagent_loader.shards.tar import ShardDamage

_AS_JSON = json.JSONEncoder().encode
"""Many short texts as JSON: three times as fast as `json.dumps`."""


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts about a shard that stay in memory; `index` only if it is not cached."""

    known: KnownShard
    damage: tuple[ShardDamage, ...] = ()
    index: ShardIndex | None = None

    @classmethod
    def of(cls, version: ShardVersion, index: ShardIndex, *, cached: bool) -> Facts:
        known = KnownShard(
            version=version,
            rows=index.num_rows,
            inventory=inventory_text(index),
            checksum=bytes.fromhex(index.checksum),
            sha256=index.sha256,
        )
        return cls(known, index.damage, None if cached else index)


class ShardNames(Sequence[str]):
    """File names of the shards of a domain, without folders; each is made when it is asked for.

    Args:
        catalogue: The shards.
        shards: Their numbers.
    """

    def __init__(self, catalogue: Catalogue, shards: range) -> None:
        self._catalogue, self._shards = catalogue, shards

    def __len__(self) -> int:
        return len(self._shards)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [base_name(self._catalogue.url(number)) for number in self._shards[place]]
        return base_name(self._catalogue.url(self._shards[place]))

    def __iter__(self) -> Iterator[str]:
        return map(base_name, self._catalogue.urls_of(self._shards))


class Catalogue:
    """All shards of all domains, numbered consecutively in the order of domains and lists.

    `dmagent_loader.shards.index.opening.open_catalogue` makes it, and adds the facts about each shard.

    Args:
        urls: Each domain with the URLs of its shards. Only one list is in memory at a time.
        cache: Where indexes are kept.
        manifests: Manifests that shards are compared with.
        stored: Indexes in the store; None: none are used.

    Attributes:
        domains: (D,) names of the domains.
        spans: (D,) number of the first shard of each domain, and of the first one after it.
        rows: (S,) rows of each shard.
        inventories: Distinct inventories of shards, as text (`dmagent_loader.shards.index.inventory`), with their
            numbers.
        inventory: (S,) number of the inventory of each shard.
        remote: Numbers of the remote shards, in order.
        damage: Damage of each damaged shard, by its number.
        tag_of_run: Number in place of a tag for remote shards whose versions are not known. All ranks of a run have the
            same, and no two runs.
    """

    def __init__(
        self,
        urls: Iterable[tuple[str, Sequence[str]]],
        cache: IndexCache,
        manifests: Manifests,
        *,
        stored: StoredIndexes | None = None,
    ) -> None:
        self.cache, self.manifests, self.stored = cache, manifests, stored
        self._names = bytearray()
        self.remote = array("q")
        domains, lengths, span_end = [], array("q", [0]), [0]
        for domain, listed in urls:
            domains.append(domain)
            self.remote.extend(span_end[-1] + place for place, url in enumerate(listed) if not is_local(url))
            names = [_encoded(url if url.startswith("/") else absolute(url)) for url in listed]
            self._names += b"".join(names)
            lengths.extend(map(len, names))
            span_end.append(len(lengths) - 1)
        self.domains: tuple[str, ...] = tuple(domains)
        self.spans: list[tuple[int, int]] = list(pairwise(span_end))
        self._name_end: NDArray[np.int64] = np.cumsum(lengths, dtype=np.int64)
        self.rows: NDArray[np.int64] = np.zeros(len(self), np.int64)
        self.inventories: dict[str, int] = {}
        self.inventory: NDArray[np.int32] = np.zeros(len(self), np.int32)
        self._tags: NDArray[np.uint32] = np.zeros(len(self), np.uint32)
        self.tag_of_run = int.from_bytes(os.urandom(4), "big")
        self._checksums = bytearray(len(self) * hashlib.sha256().digest_size)
        self.damage: dict[int, tuple[ShardDamage, ...]] = {}
        self._uncached: dict[int, ShardIndex] = {}

    def __len__(self) -> int:
        return len(self._name_end) - 1

    def url(self, number: int) -> str:
        """The URL of a shard."""
        return str(self._names[self._name_end[number] : self._name_end[number + 1]], "utf-8", "surrogateescape")

    def urls_of(self, shards: range) -> list[str]:
        """The URLs of consecutive shards."""
        ends = self._name_end[shards.start : shards.stop + 1]
        names = bytes(self._names[ends[0] : ends[-1]])
        places = pairwise((ends - ends[0]).tolist())
        if names.isascii():  # byte offsets are character offsets, and slicing text takes half the time
            text = names.decode()
            return [text[begin:end] for begin, end in places]
        return [str(names[begin:end], "utf-8", "surrogateescape") for begin, end in places]

    @property
    def all_damage(self) -> tuple[ShardDamage, ...]:
        """All damage, in the order of domains and shards."""
        return tuple(damage for _, found in sorted(self.damage.items()) for damage in found)

    @property
    def is_local(self) -> bool:
        """Whether all shards are local files."""
        return not self.remote

    @cached_property
    def is_remote(self) -> NDArray[np.bool_]:
        """(S,) whether each shard is remote."""
        are_remote = np.zeros(len(self), bool)
        are_remote[self.remote] = True
        return are_remote

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 over domain names and, per shard, file name, rows and content, but not folders and hosts."""
        digest = hashlib.sha256()
        for domain, (first, end) in zip(self.domains, self.spans, strict=True):
            digest.update(_AS_JSON(domain).encode())
            for start in range(first, end, SHARDS_OF_OVERVIEW):
                digest.update(self._contents_as_json(range(start, min(start + SHARDS_OF_OVERVIEW, end))).encode())
        return digest.hexdigest()

    def _contents_as_json(self, shards: range) -> str:
        """File name, rows and checksum of each of consecutive shards, as one JSON list after the other."""
        size = hashlib.sha256().digest_size
        names = map(_AS_JSON, map(base_name, self.urls_of(shards)))
        rows = self.rows[shards.start : shards.stop].tolist()
        checksums = self._checksums[shards.start * size : shards.stop * size].hex(" ", size).split()
        return "".join(
            [f'[{name}, {count}, "{checksum}"]' for name, count, checksum in zip(names, rows, checksums, strict=True)]
        )

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
            DamagedShardError: The shard was replaced since the catalogue was made, or a table in the store had another
                number of its rows.
        """
        uncached = self._uncached.get(number)
        if uncached is not None:
            return uncached
        url, checksum = self.url(number), self._checksum(number).hex()
        # The same rows may lie at other offsets in another version. A server is not asked: one request per shard.
        version = shard_version(url) if is_local(url) else None
        index = self.cache.find(url, version, checksum)
        if index is None and self.stored is not None and self.may_be_stored(number):
            index = self.stored.load(url, int(self.rows[number]), checksum)
            # Only its size was compared so far: the time of a local shard says nothing of that which was indexed.
            if index is not None and is_local(url) and not looks_as_indexed(url, index):
                index = None
            if index is not None:
                self.cache.save(url, None, index)
        if index is None:
            version, stop = version or shard_version(url), threading.Event()
            record = self.manifests.record(url)
            built, cached = build_and_cache(url, version, self.cache, record, advance=lambda _: None, stop=stop)
            index = self.cache.find(url, version, checksum) if cached else with_content(built, checksum)
        if index is None:
            self.forget(number)
            raise DamagedShardError(
                f"shard {display_url(url)} was replaced since it was opened: its rows are others; restore it, or open "
                f"the shards again to index the new version; {HOW_TO_RESUME}"
            )
        rows = int(self.rows[number])
        if index.num_rows != rows:
            self.forget(number)
            raise DamagedShardError(
                f"shard {display_url(url)} has {index.num_rows} rows, but {rows} by the table of indexes in its store: "
                "that entry is damaged, and rows would be left out or be none; write the table anew (`dmagent index` "
                f"with --beside or --to), or pass indexes=False, and open the shards again; {HOW_TO_RESUME}"
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
            index = self._cached_or_built(url, version)
        if is_local(url):
            version = replace(version, is_sure=False)  # its time says nothing of a copy
        if index is None or index.damage or index.checksum != self._checksum(number).hex():
            return None
        stored.save(url, index)
        return table_entry(version, index)

    def _cached_or_built(self, url: str, version: ShardVersion) -> ShardIndex | None:
        """The index of the present version of a shard, which is read through if the cache lacks it.

        The facts about a shard may come from a table in a store, without its index. None if it changes meanwhile.
        """
        record, stop = self.manifests.record(url), threading.Event()
        index = self.cache.load(url, version, record)
        if index is None:
            with contextlib.suppress(DamagedShardError, ShardLayoutError):
                index, _ = build_and_cache(url, version, self.cache, record, advance=lambda _: None, stop=stop)
        return index

    def forget(self, number: int) -> None:
        """Has the next start look at the index of a shard that was replaced."""
        self.cache.forget_overview(self.urls_of(self.groups[self.group_of(number)]))
        with contextlib.suppress(ShardError):
            self.cache.forget_content(self.url(number), shard_version(self.url(number)))

    def may_be_stored(self, number: int) -> bool:
        """Whether the index of a shard is looked for in the store."""
        return self.stored is not None and self.stored.are_used_for(self.url(number))

    def is_cached(self, number: int) -> bool:
        """Whether the index of a shard is in the cache, and not in memory."""
        return number not in self._uncached

    def has_index(self, number: int) -> bool:
        """Whether the index of a shard is in memory, or in the cache under the URL of the shard."""
        return number in self._uncached or self.cached_index(number).exists()

    def has_content(self, number: int, checksum: bytes) -> bool:
        """Whether the content of a shard has this checksum, as bytes."""
        return self._checksum(number) == checksum

    def cached_index(self, number: int) -> Path:
        """The file for the index of a shard."""
        return self.cache.entry(self.url(number))

    def tag(self, number: int) -> int:
        """A number for the tag that the version of a remote shard had at the start; 0 for a local shard."""
        return self._tags.item(number)

    def _checksum(self, number: int) -> bytes:
        size = hashlib.sha256().digest_size
        return bytes(self._checksums[number * size : (number + 1) * size])

    @cached_property
    def groups(self) -> list[range]:
        """The shards of each overview."""
        return [
            range(start, min(start + SHARDS_OF_OVERVIEW, end))
            for first, end in self.spans
            for start in range(first, end, SHARDS_OF_OVERVIEW)
        ]

    def group_of(self, number: int) -> int:
        """The group of a shard: the shards of one overview."""
        return bisect_right(self.groups, number, key=lambda shards: shards.start) - 1

    def place(self, number: int) -> int:
        """The position of a shard in its overview."""
        return number - self.groups[self.group_of(number)].start

    def add(self, number: int, facts: Facts) -> None:
        """Adds the facts about a shard."""
        known = facts.known
        self.rows[number] = known.rows
        self.inventory[number] = self._number_of(known.inventory)
        size = len(known.checksum)
        self._checksums[number * size : (number + 1) * size] = known.checksum
        if self.is_remote[number]:
            self._tags[number] = self._tag_number(known.version.tag)
        if facts.damage:
            self.damage[number] = facts.damage
        if facts.index is not None:
            self._uncached[number] = facts.index

    def add_all(self, shards: range, known: KnownShards) -> None:
        """Adds the facts about consecutive intact shards, whose indexes are cached."""
        chosen = slice(shards.start, shards.stop)
        self.rows[chosen] = known.rows
        numbers = {inventory: self._number_of(inventory) for inventory in dict.fromkeys(known.inventories)}
        self.inventory[chosen] = [numbers[inventory] for inventory in known.inventories]
        checksums = np.frombuffer(self._checksums, np.uint8).reshape(-1, hashlib.sha256().digest_size)
        checksums[chosen] = known.checksums
        if self.is_remote[chosen].any():
            tags = np.array([self._tag_number(tag) for tag in known.tags], np.uint32)
            self._tags[chosen] = np.where(self.is_remote[chosen], tags, 0)

    def _tag_number(self, tag: str) -> int:
        return crc32(tag.encode()) if tag else self.tag_of_run

    def _number_of(self, inventory: str) -> int:
        return self.inventories.setdefault(inventory, len(self.inventories))

    def load_overview(self, group: int) -> Overview:
        """The overview of a group, as it was written last."""
        shards = self.groups[group]
        return self.cache.load_overview(self.urls_of(shards), len(shards))

    def save_overview(self, group: int, overview: Overview) -> None:
        """Writes the overview of a group, if it has changed."""
        if overview.is_changed:
            self.cache.save_overview(self.urls_of(self.groups[group]), overview)


def _encoded(url: str) -> bytes:
    return url.encode("utf-8", "surrogateescape")
