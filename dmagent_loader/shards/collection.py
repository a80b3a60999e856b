"""The shards of all domains as one thing that is read by position."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from dmagent_loader.errors import ConfigurationError, DamagedShardError, EmptyShardError
from dmagent_loader.shards.cache import IndexCache, build_and_cache, default_cache_dir
from dmagent_loader.shards.decode import RawSample
from dmagent_loader.shards.index import ShardDamage, ShardIndex
from dmagent_loader.shards.reader import MAX_OPEN_FILES, ShardVersion, Source, open_source, shard_version
from dmagent_loader.shards.recent import Recent
from dmagent_loader.shards.table import ChangedRow, RowTable
from dmagent_loader.shards.urls import base_name, display_url, expand_shards, is_local

ShardPatterns = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
OnDamage = Literal["raise", "skip"]

# Threads, not processes: reading and the checksums of large rows run outside the interpreter lock, two processes were
# no faster on two cores, and spawned ones would run a script without a main guard again. Small rows keep one core busy.
_INDEX_THREADS = 8
_LISTED_DAMAGES = 20

_logger = logging.getLogger(__name__)
_R = TypeVar("_R")


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """One line of `ShardCollection.summaries`.

    Attributes:
        domain: Name of the domain.
        shard: URL.
        rows, members: Counts.
        payload_bytes, file_bytes: Bytes of the members, and of the file with its headers.
        extensions: Distinct extensions.
        damage: What could not be read.
    """

    domain: str
    shard: str
    rows: int
    members: int
    payload_bytes: int
    file_bytes: int
    extensions: tuple[str, ...]
    damage: tuple[ShardDamage, ...]


class ShardCollection:
    """All shards of all domains, indexed, readable by (domain, shard, row).

    Reading is safe from many threads and after a fork, and the object can be pickled (for workers that are spawned):
    files are opened per process, at most `max_open_files` at once. Made by `open`.

    Example:
        >>> from dmagent_loader.shards.collection import ShardCollection
        >>> collection = ShardCollection.open({"source/web": "web-{000..003}.tar"})  # doctest: +SKIP
        >>> collection.read(0, 2, 17).members["txt"]  # doctest: +SKIP
    """

    def __init__(
        self, urls: Mapping[str, Sequence[str]], indexes: Mapping[str, ShardIndex], *, verify: bool, max_open_files: int
    ) -> None:
        self.domains: tuple[str, ...] = tuple(urls)
        self._shards = [[(url, indexes[url]) for url in urls[domain]] for domain in self.domains]
        self._rows = [np.array([index.num_rows for _, index in shards], np.int64) for shards in self._shards]
        self._urls = [url for shards in self._shards for url, _ in shards]
        self._tables = [RowTable(index) for shards in self._shards for _, index in shards]
        counts = iter(range(len(self._urls)))
        self._numbers = [[next(counts) for _ in shards] for shards in self._shards]
        self._verify = verify
        self._open = Recent(self._open_one, max_open_files)

    @classmethod
    def open(
        cls,
        shards: Mapping[str, ShardPatterns],
        *,
        on_damage: OnDamage = "raise",
        cache_dir: str | os.PathLike[str] | None = None,
        progress: bool = True,
        verify: bool = True,
        max_open_files: int = MAX_OPEN_FILES,
    ) -> ShardCollection:
        """Finds the shards, and indexes those that the cache does not know yet.

        Args:
            shards: Domain name to path, URL, pattern, or list of these (`dmagent_loader.shards.urls.expand_shards`).
            on_damage: ``"raise"``: refuse damaged shards. ``"skip"``: use the rows that are whole, and log what is
                lost.
            cache_dir: Where indexes are kept; None: ``$DMAGENT_CACHE_DIR``, else ``~/.cache/dmagent_loader``.
            progress: Show a progress bar while shards are indexed.
            verify: Check every row that is read against its checksum (about 0.5 us per KB).
            max_open_files: Most files open at once in this process.

        Raises:
            ShardNotFoundError: A pattern matches nothing, or a shard does not exist.
            EmptyShardError: A domain without rows.
            DamagedShardError: Damage, with ``on_damage="raise"``.
            ShardLayoutError: A shard that cannot be read by position.
            ConfigurationError: No domains, a shard listed twice in a domain, a shell pipe, a wrong `on_damage`.
        """
        if on_damage not in ("raise", "skip"):
            raise ConfigurationError(f"on_damage={on_damage!r}: it is 'raise' or 'skip'")
        if not shards:
            raise ConfigurationError("no domains: pass a mapping from domain name to shards")
        urls = {domain: expand_shards(domain, patterns) for domain, patterns in shards.items()}
        cache = IndexCache(Path(cache_dir) if cache_dir is not None else default_cache_dir())
        indexes = _load_or_build(
            list(dict.fromkeys(url for listed in urls.values() for url in listed)), cache, progress
        )
        collection = cls(urls, indexes, verify=verify, max_open_files=max_open_files)
        collection._judge_damage(on_damage)
        collection._judge_emptiness()
        return collection

    @property
    def is_local(self) -> bool:
        """Whether all shards are files, so that no row has to cross a network protocol."""
        return all(is_local(url) for shards in self._shards for url, _ in shards)

    @property
    def num_rows(self) -> NDArray[np.int64]:
        """(D,) rows of each domain."""
        return np.array([rows.sum() for rows in self._rows], np.int64)

    def shard_rows(self, domain: int) -> NDArray[np.int64]:
        """(S,) rows of each shard of one domain, in listed order."""
        return self._rows[domain]

    @property
    def damage(self) -> tuple[ShardDamage, ...]:
        """All damage that was found, in order of domains and shards."""
        return tuple(damage for shards in self._shards for _, index in shards for damage in index.damage)

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over domain names and, per shard, file name, rows and content; folders and hosts do not matter."""
        listing = [
            [domain, [[base_name(url), index.num_rows, index.checksum] for url, index in shards]]
            for domain, shards in zip(self.domains, self._shards, strict=True)
        ]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    def read(self, domain: int, shard: int, row: int) -> RawSample:
        """Reads one row, in one piece.

        Args:
            domain: Number of the domain.
            shard: Number of the shard in the domain.
            row: Number of the row in the shard.

        Raises:
            IndexError: There is no such row.
            DamagedShardError: The shard changed since it was indexed.
        """
        number = self._numbers[domain][shard]
        table = self._tables[number]
        if not 0 <= row < table.num_rows:
            raise IndexError(f"row {row} of shard {display_url(self._urls[number])}, which has {table.num_rows} rows")
        try:
            return table.read(self._open.get(number), row, self._verify)
        except ChangedRow as change:
            raise DamagedShardError(
                f"row {row} (key {table.key(row)!r}) of shard {display_url(self._urls[number])} changed since it was "
                f"indexed ({change}): the file was overwritten or its disk is failing; restore it, or open the shards "
                "again to index the new version"
            ) from None

    def summaries(self) -> tuple[ShardSummary, ...]:
        """What is known of every shard, in order of domains and shards."""
        return tuple(
            ShardSummary(
                domain=domain,
                shard=url,
                rows=index.num_rows,
                members=index.num_members,
                payload_bytes=index.payload_bytes,
                file_bytes=index.file_size,
                extensions=index.extensions,
                damage=index.damage,
            )
            for domain, shards in zip(self.domains, self._shards, strict=True)
            for url, index in shards
        )

    def describe(self) -> str:
        """A table of all shards, for people."""
        lines = [("domain / shard", "rows", "members", "bytes", "extensions", "damage")]
        for domain, shards, rows in zip(self.domains, self._shards, self._rows, strict=True):
            total = sum(index.payload_bytes for _, index in shards)
            members = sum(index.num_members for _, index in shards)
            lines.append((domain, f"{rows.sum():,}", f"{members:,}", f"{total:,}", "", ""))
            for url, index in shards:
                damage = "; ".join(f"{item.kind} at byte {item.offset}" for item in index.damage) or "-"
                counts = (f"{index.num_rows:,}", f"{index.num_members:,}", f"{index.payload_bytes:,}")
                lines.append((f"  {base_name(url)}", *counts, " ".join(index.extensions), damage))
        widths = [max(len(line[column]) for line in lines) for column in range(6)]
        aligned = ("<", ">", ">", ">", "<", "<")
        return "\n".join(
            "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, aligned, widths, strict=True)).rstrip()
            for line in lines
        )

    def close(self) -> None:
        """Closes the open files; reading opens them again."""
        self._open.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, which another process cannot use."""
        return {**self.__dict__, "_tables": None, "_open": self._open.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tables = [RowTable(index) for shards in self._shards for _, index in shards]
        self._open = Recent(self._open_one, state["_open"])

    def _open_one(self, number: int) -> Source:
        return open_source(self._urls[number])

    def _judge_damage(self, on_damage: OnDamage) -> None:
        damage = self.damage
        if not damage:
            return
        effects = [self._damage_effect(number) for number in range(len(self.domains))]
        lines = [str(item) for item in damage[:_LISTED_DAMAGES]] + [effect for effect in effects if effect]
        if len(damage) > _LISTED_DAMAGES:
            lines.insert(_LISTED_DAMAGES, f"... and {len(damage) - _LISTED_DAMAGES} more damaged places")
        report = "\n  ".join(lines)
        if on_damage == "raise":
            raise DamagedShardError(
                f"{len(damage)} damaged place(s):\n  {report}\nRestore the shards, or pass on_damage='skip' to train "
                "on the rows that are whole."
            )
        _logger.warning("damaged shards, using the rows that are whole:\n  %s", report)

    def _damage_effect(self, domain: int) -> str:
        """What damage does to the size of a domain; shards that were cut are judged by the whole shards beside them."""
        shards = self._shards[domain]
        if all(not index.damage for _, index in shards):
            return ""
        kept = int(self._rows[domain].sum())
        whole = [index.num_rows for _, index in shards if not index.damage]
        lost, certain = 0, True
        for _, index in shards:
            estimate = sum(item.rows_lost for item in index.damage)
            if any(item.at_least for item in index.damage):
                certain = certain and bool(whole)
                estimate = max(estimate, round(float(np.median(whole))) - index.num_rows) if whole else estimate
            lost += estimate
        return (
            f"domain {self.domains[domain]!r}: {kept} rows are left, {'about' if certain else 'at least'} {lost} are "
            f"lost ({lost / max(1, kept + lost):.1%} of the domain), so at equal weight its rows repeat sooner"
        )

    def _judge_emptiness(self) -> None:
        for domain, shards, rows in zip(self.domains, self._shards, self._rows, strict=True):
            empty = [display_url(url) for url, index in shards if not index.num_rows]
            if len(empty) == len(shards):
                raise EmptyShardError(
                    f"domain {domain!r} has no rows: none of its {len(shards)} shard(s) holds a sample (first: "
                    f"{empty[0]}); a sample is a file with an extension, such as 0001.txt; give the domain other "
                    "shards or take it out"
                )
            if empty:
                _logger.warning(
                    "domain %r: %d of %d shards hold no sample (%s); the other shards have %d rows",
                    domain,
                    len(empty),
                    len(shards),
                    ", ".join(empty[:5]),
                    rows.sum(),
                )


def _load_or_build(urls: list[str], cache: IndexCache, progress: bool) -> dict[str, ShardIndex]:
    stop = threading.Event()

    def look_up(url: str) -> tuple[ShardVersion, ShardIndex | None]:
        version = shard_version(url)
        return version, cache.load(url, version)

    known = _in_threads(look_up, urls, stop)
    missing = [url for url in urls if known[url][1] is None]
    indexes = {url: index for url, (_, index) in known.items() if index is not None}
    if missing:
        total = sum(known[url][0].size for url in missing)
        description = f"indexing {len(missing)} shard{'s' if len(missing) > 1 else ''}"
        with tqdm(
            total=total, unit="B", unit_scale=True, desc=description, mininterval=0.5, disable=not progress
        ) as bar:
            indexes |= _in_threads(
                lambda url: build_and_cache(url, known[url][0], cache, advance=bar.update, stop=stop), missing, stop
            )
    return indexes


def _in_threads(work: Callable[[str], _R], urls: list[str], stop: threading.Event) -> dict[str, _R]:
    """Runs `work` on every URL; on an error or Ctrl-C what runs is told to stop and what waits is dropped."""
    with ThreadPoolExecutor(max_workers=_INDEX_THREADS, thread_name_prefix="dmagent-index") as pool:
        futures = {pool.submit(work, url): url for url in urls}
        try:
            return {futures[future]: future.result() for future in as_completed(futures)}
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
