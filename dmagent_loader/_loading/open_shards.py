"""Opening shards in a run of several processes: each indexes its part, and all see the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmagent_loader import _distributed as distributed
from dmagent_loader._loading.bad_rows import OnBadRow
from dmagent_loader._loading.config import ReadingConfig
from dmagent_loader._loading.meeting import work_together
from dmagent_loader.shards import PackedRows, PackText, RowSource, ShardCollection
from dmagent_loader.shards.index.cache import default_cache_dir
from dmagent_loader.shards.index.peers import Peers

_STEP = "opening the shards"


def open_on_all_ranks(
    shards: Mapping[str, str | Sequence[str]], reading: ReadingConfig, pack: PackText | None, on_bad_row: OnBadRow
) -> RowSource:
    """Opens the shards: the ranks share the indexing. Rank 0 counts tokens first, the others then find what it wrote.

    Args:
        shards: Domain -> shards.
        reading: Settings of the reader.
        pack: Packing of their documents; None: their rows are read as they are.
        on_bad_row: Rule for documents that cannot be packed.

    Raises:
        ShardError: This rank could not open the shards.
        RankError: Another rank could not open them, or the ranks see different data. Every rank raises, so none waits.
    """
    rows = work_together(_STEP, lambda peers: _open(shards, reading, pack, on_bad_row, peers))
    with distributed.together(_STEP) as facts:
        if distributed.is_active():
            facts |= _contents(rows)
    return rows


def _contents(rows: RowSource) -> dict[str, Any]:
    """Facts that must be the same on all ranks: those first that name a difference best."""
    facts: dict[str, Any] = {"the domains": list(rows.domains), "the packing": rows.packing}
    for number, domain in enumerate(rows.domains):
        of_shards = rows.shard_rows(number)
        facts[f"the shards of {domain!r}"] = f"{len(of_shards)} shards with {of_shards.sum()} rows"
    return {**facts, "the contents of the shards": rows.fingerprint}


def _open(
    shards: Mapping[str, str | Sequence[str]],
    reading: ReadingConfig,
    pack: PackText | None,
    on_bad_row: OnBadRow,
    peers: Peers,
) -> RowSource:
    progress = reading.progress and peers.rank == 0
    collection = ShardCollection.open(
        shards,
        on_damage=reading.on_damage,
        key_ends_at=reading.key_ends_at,
        cache_dir=reading.cache_dir,
        progress=progress,
        block_cache_dir=reading.block_cache_dir,
        block_cache_bytes=reading.block_cache_bytes,
        indexes=reading.indexes,
        peers=peers,
    )
    rows: RowSource = collection
    for is_our_turn in (peers.rank == 0, peers.rank != 0):
        if pack is not None and is_our_turn:
            rows = PackedRows.open(
                collection,
                pack,
                cache_dir=default_cache_dir() if reading.cache_dir is None else Path(reading.cache_dir),
                progress=progress,
                max_bad=reading.max_bad_rows if on_bad_row == "skip" else 0,
            )
        peers.gather(None)
    return rows
