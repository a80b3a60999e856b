"""The number of tokens of each document, counted once per shard and kept beside the shard indexes."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dmagent_loader._files import remove_leftovers, write_atomically
from dmagent_loader.errors import DecodeError
from dmagent_loader.shards.collection import ShardCollection
from dmagent_loader.shards.decode import RawSample
from dmagent_loader.shards.index.columns_file import read_columns, read_metadata, write_columns
from dmagent_loader.shards.index.lock import exclusive
from dmagent_loader.shards.packed.encoder import DocumentEncoder
from dmagent_loader.shards.writing.packing import BATCH_CHARACTERS

_COLUMN = "tokens"
_PATIENCE_SECONDS = 60.0
_SLOWEST_DOCUMENTS_PER_SECOND = 50
"""Rate at which another process is expected to tokenise a shard."""
PIECE_DOCUMENTS = 1024
"""Consecutive documents of a shard that are dealt to one rank."""

logger = logging.getLogger(__name__)

Counts = NDArray[np.uint32]
"""(R,) tokens of each document of a shard, with the end-of-text token; 0 for a bad row."""


class CountedBatch(NamedTuple):
    """Counts of consecutive documents, on their way to the other ranks."""

    domain: int
    shard: int
    first: int
    counts: Counts


class TokenCounts:
    """The token counts of all shards of a collection.

    A file of counts is valid for one content of a shard, one tokenizer and one version of the package tokenizers.

    Args:
        collection: The text shards.
        encoder: Tokenizer of the documents.
        cache_dir: Folder of the shard indexes.
    """

    def __init__(self, collection: ShardCollection, encoder: DocumentEncoder, cache_dir: Path) -> None:
        self._collection, self._encoder = collection, encoder
        identity = f"{encoder.description}, tokenizers {encoder.version}"
        self._folder = cache_dir.absolute() / "tokens" / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._uncached: dict[tuple[int, int], Counts] = {}
        self._incomplete: dict[tuple[int, int], tuple[Counts, int]] = {}
        """Counts of a shard that arrive in batches, and how many have."""

    def all(self, progress: bool) -> Iterator[tuple[int, int, Counts]]:
        """Domain, shard and counts of every shard; those without counts are counted now.

        Args:
            progress: Whether to show a progress bar over the documents to be counted.
        """
        shards, missing = self._shards(), self.documents(self.missing())
        with tqdm(
            total=missing,
            unit=" documents",
            desc="counting tokens",
            mininterval=0.5,
            disable=not (progress and missing),
        ) as bar:
            for domain, shard in shards:
                counts = self._load(domain, shard)
                yield domain, shard, self._counted(domain, shard, bar) if counts is None else counts
        if missing:
            remove_leftovers(self._folder)

    def missing(self) -> NDArray[np.bool_]:
        """(S,) for every shard, in the order of domains and shards: whether it has no counts yet."""
        return np.array([s not in self._uncached and not self._path(*s).exists() for s in self._shards()], np.bool_)

    def documents(self, shards: NDArray[np.bool_]) -> int:
        """Number of documents in some of the shards, (S,)."""
        return int(self._rows()[shards].sum())

    def count_share(self, missing: NDArray[np.bool_], rank: int, world_size: int) -> Iterator[CountedBatch]:
        """Counts the documents that are dealt to one of several ranks, in batches; `add` takes those of all ranks.

        Shards whose counts this rank has are not tokenised again: it reports what it has.

        Args:
            missing: (S,) shards to count; the same on all ranks.
            rank, world_size: Rank, and number of ranks.
        """
        shards = self._shards()
        pieces = (
            (*shards[number], first, min(rows, first + PIECE_DOCUMENTS))
            for number, rows in zip(np.flatnonzero(missing), self._rows()[missing].tolist(), strict=True)
            for first in range(0, rows, PIECE_DOCUMENTS)
        )
        for domain, shard, first, end in islice(pieces, rank, None, world_size):
            known = self._load(domain, shard)
            if known is not None:
                yield CountedBatch(domain, shard, first, known[first:end])
            else:
                yield from self._count(domain, shard, first, end)

    def add(self, batches: Iterable[CountedBatch]) -> None:
        """Takes counts; those of a shard are kept when they are complete."""
        for domain, shard, first, found in batches:
            rows = int(self._collection.shard_rows(domain)[shard])
            counts, arrived = self._incomplete.pop((domain, shard), (np.zeros(rows, np.uint32), 0))
            counts[first : first + len(found)] = found
            arrived += len(found)
            if arrived < rows:
                self._incomplete[domain, shard] = counts, arrived
            elif not self._path(domain, shard).exists():
                self._save(domain, shard, counts)

    def of(self, domain: int, shard: int) -> Counts:
        """The counts of one shard."""
        counts = self._load(domain, shard)
        return self._counted(domain, shard, tqdm(disable=True)) if counts is None else counts

    def fault(self, domain: int, shard: int, row: int) -> DecodeError:
        """The error of a bad row."""
        (found,) = self._encoder.tokens([self._collection.read(domain, shard, row)])
        assert isinstance(found, DecodeError)
        return found

    def _shards(self) -> list[tuple[int, int]]:
        domains = range(len(self._collection.domains))
        return [(domain, shard) for domain in domains for shard in range(len(self._collection.shard_rows(domain)))]

    def _rows(self) -> NDArray[np.int64]:
        """(S,) number of documents of every shard."""
        return np.concatenate([self._collection.shard_rows(domain) for domain in range(len(self._collection.domains))])

    def _path(self, domain: int, shard: int) -> Path:
        content, rows = self._collection.shard_contents(domain)[shard], self._collection.shard_rows(domain)[shard]
        return self._folder / f"{content:016x}-{rows}.safetensors"

    def _load(self, domain: int, shard: int) -> Counts | None:
        if (domain, shard) in self._uncached:
            return self._uncached[domain, shard]
        path = self._path(domain, shard)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        try:
            counts = read_columns(data, read_metadata(data))[_COLUMN]
            if counts.dtype != np.uint32 or counts.shape != (self._collection.shard_rows(domain)[shard],):
                raise ValueError(f"it has {counts.dtype} counts of shape {counts.shape}")
        except Exception as error:  # of any kind: the tokens are counted again
            logger.warning(
                "the cached token counts %s of %s are not usable (%s): counting again",
                path,
                self._collection.display(domain, shard),
                error,
            )
            return None
        return counts

    def _counted(self, domain: int, shard: int, bar: tqdm[None]) -> Counts:
        """Counts the tokens of a shard, unless another process has done so meanwhile."""
        rows = int(self._collection.shard_rows(domain)[shard])
        path, activity = self._path(domain, shard), f"counting the tokens of {self._collection.display(domain, shard)}"
        patience = _PATIENCE_SECONDS + rows / _SLOWEST_DOCUMENTS_PER_SECOND
        with exclusive(path.with_suffix(".lock"), activity, patience, threading.Event()):
            counts = self._load(domain, shard)
            if counts is not None:
                bar.update(rows)
                return counts
            counts = np.zeros(rows, np.uint32)
            for batch in self._count(domain, shard, 0, rows):
                counts[batch.first : batch.first + len(batch.counts)] = batch.counts
                bar.update(len(batch.counts))
            self._save(domain, shard, counts)
        return counts

    def _count(self, domain: int, shard: int, first: int, end: int) -> Iterator[CountedBatch]:
        """Tokenises the documents from `first` up to `end`, many at once."""
        batch: list[RawSample] = []
        size = 0
        for row in range(first, end):
            batch.append(self._collection.read(domain, shard, row))
            size += sum(map(len, batch[-1].members.values()))
            if size >= BATCH_CHARACTERS or row == end - 1:
                tokens = self._encoder.tokens(batch)
                counts = np.array([0 if isinstance(t, DecodeError) else len(t) for t in tokens], np.uint32)
                yield CountedBatch(domain, shard, row + 1 - len(batch), counts)
                batch, size = [], 0

    def _save(self, domain: int, shard: int, counts: Counts) -> None:
        path = self._path(domain, shard)
        metadata = {
            "shard": ascii(self._collection.display(domain, shard)),
            "encoder": ascii(self._encoder.description),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, write_columns({_COLUMN: counts}, metadata), durable=False)
        except OSError as error:
            if not self._uncached:
                logger.warning(
                    "token counts cannot be kept in %s (%s): the tokens are counted again at every start; set "
                    "DMAGENT_CACHE_DIR or cache_dir to a folder that can be written",
                    self._folder,
                    error,
                )
            self._uncached[domain, shard] = counts
