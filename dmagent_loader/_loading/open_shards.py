"""Opening shards in a run of several processes: each does its part of the work, and all see the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmagent_loader import _distributed as distributed
from dmagent_loader._loading.bad_rows import OnBadRow
from dmagent_loader._loading.config import ReadingConfig
from dmagent_loader._loading.count_tokens import count_on_all_ranks
from dmagent_loader._loading.meeting import work_together
from dmagent_loader.shards import PackedRows, PackText, RowSource, ShardCollection
from dmagent_loader.shards.index.cache import default_cache_dir
from dmagent_loader.shards.index.peers import Peers
from dmagent_loader.shards.packed.counts import TokenCounts

_STEP = "opening the shards"
_PACKING = "packing the documents"


def open_on_all_ranks(
    shards: Mapping[str, str | Sequence[str]], reading: ReadingConfig, pack: PackText | None, on_bad_row: OnBadRow
) -> RowSource:
    """Opens the shards: the ranks share the indexing, and the counting of the tokens of documents.

    Args:
        shards: Domain -> shards.
        reading: Settings of the reader.
        pack: Packing of their documents; None: their rows are read as they are.
        on_bad_row: Rule for documents that cannot be packed.

    Raises:
        ShardError: This rank could not open the shards.
        RankError: Another rank could not open them, or the ranks see different data. Every rank raises, so none waits.
    """
    collection = work_together(_STEP, lambda peers: _open(shards, reading, peers))
    with distributed.together(_STEP) as facts:
        if distributed.is_active():
            facts |= _contents(collection, pack)
    if pack is None:
        return collection
    cache_dir = default_cache_dir() if reading.cache_dir is None else Path(reading.cache_dir)
    counts = TokenCounts(collection, pack.encoder, cache_dir)
    count_on_all_ranks(counts, progress=_shows_progress(reading))
    with distributed.together(_PACKING) as facts:
        rows = PackedRows.open(
            collection,
            pack,
            cache_dir=cache_dir,
            counts=counts,
            progress=_shows_progress(reading),
            max_bad=reading.max_bad_rows if on_bad_row == "skip" else 0,
        )
        if distributed.is_active():
            facts["the tokens of the documents"] = rows.fingerprint
    return rows


def _contents(collection: ShardCollection, pack: PackText | None) -> dict[str, Any]:
    """Facts that must be the same on all ranks: those first that name a difference best."""
    facts: dict[str, Any] = {"the domains": list(collection.domains)}
    facts["the packing"] = None if pack is None else f"{pack.description}, tokenizers {pack.encoder.version}"
    for number, domain in enumerate(collection.domains):
        of_shards = collection.shard_rows(number)
        facts[f"the shards of {domain!r}"] = f"{len(of_shards)} shards with {of_shards.sum()} rows"
    return {**facts, "the contents of the shards": collection.fingerprint}


def _open(shards: Mapping[str, str | Sequence[str]], reading: ReadingConfig, peers: Peers) -> ShardCollection:
    return ShardCollection.open(
        shards,
        on_damage=reading.on_damage,
        key_ends_at=reading.key_ends_at,
        cache_dir=reading.cache_dir,
        progress=_shows_progress(reading),
        block_cache_dir=reading.block_cache_dir,
        block_cache_bytes=reading.block_cache_bytes,
        indexes=reading.indexes,
        peers=peers,
    )


def _shows_progress(reading: ReadingConfig) -> bool:
    return reading.progress and distributed.get_rank() == 0
