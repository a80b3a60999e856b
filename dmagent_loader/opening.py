"""Shards in a run of several processes: indexed once, and the same for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dmagent_loader import distributed
from dmagent_loader.errors import ShardError
from dmagent_loader.shards import ShardCollection


def open_on_all_ranks(shards: Mapping[str, str | Sequence[str]], **settings: Any) -> ShardCollection:
    """Opens the shards: rank 0 indexes them first, the others then find its index.

    Args:
        shards: Domain -> shards.
        **settings: Of `ShardCollection.open`.

    Raises:
        ShardError: Rank 0 could not open them, or the ranks see different data. Every rank raises, so that none waits.
    """
    collection, fault = None, None
    if distributed.get_rank() == 0:
        try:
            collection = ShardCollection.open(shards, **settings)
        except Exception as error:
            if distributed.get_world_size() == 1:
                raise
            fault = error
    told = distributed.broadcast_object(None if fault is None else f"{type(fault).__name__}: {fault}")
    if fault is not None:
        raise fault
    if told is not None:
        raise ShardError(f"rank 0 could not open the shards: {told}")
    if collection is None:
        collection = ShardCollection.open(shards, **settings)
    fingerprints = distributed.all_gather_object(collection.fingerprint)
    if len(set(fingerprints)) > 1:
        raise ShardError(
            f"the ranks see different shards: {len(set(fingerprints))} different fingerprints over {len(fingerprints)} "
            "ranks; every rank needs the same files with the same content"
        )
    return collection
