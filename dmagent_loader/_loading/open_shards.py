"""Opening shards in a run of several processes: indexed once, and the same for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dmagent_loader import _distributed as distributed
from dmagent_loader._loading.config import ReadingConfig
from dmagent_loader.shards import ShardCollection

_STEP = "opening the shards"


def open_on_all_ranks(shards: Mapping[str, str | Sequence[str]], reading: ReadingConfig) -> ShardCollection:
    """Opens the shards: rank 0 indexes them first, the others then find its index.

    Args:
        shards: Domain -> shards.
        reading: Settings of the reader.

    Raises:
        ShardError: This rank could not open the shards.
        RankError: Another rank could not open them, or the ranks see different data. Every rank raises, so none waits.
    """
    collection: ShardCollection | None = None
    with distributed.together(_STEP):
        if distributed.get_rank() == 0:
            collection = _open(shards, reading)
    with distributed.together(_STEP) as facts:
        if collection is None:
            collection = _open(shards, reading)
        if distributed.is_active():
            facts |= _contents(collection)
    return collection


def _contents(collection: ShardCollection) -> dict[str, Any]:
    """Facts that must be the same on all ranks: the domains first, because they name a difference best."""
    facts: dict[str, Any] = {"the domains": list(collection.domains)}
    for number, domain in enumerate(collection.domains):
        rows = collection.shard_rows(number)
        facts[f"the shards of {domain!r}"] = f"{len(rows)} shards with {rows.sum()} rows"
    return {**facts, "the contents of the shards": collection.fingerprint}


def _open(shards: Mapping[str, str | Sequence[str]], reading: ReadingConfig) -> ShardCollection:
    return ShardCollection.open(
        shards,
        on_damage=reading.on_damage,
        key_ends_at=reading.key_ends_at,
        cache_dir=reading.cache_dir,
        progress=reading.progress and distributed.get_rank() == 0,
    )
