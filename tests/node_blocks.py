"""Blocks of one size in a folder of the node."""

from __future__ import annotations

from dmagent_loader.shards.sources.node_cache import NodeCache

SIZE = 1000


def name(number: int) -> str:
    """Name of a block."""
    return f"{number:032x}-0-{SIZE:x}"


def fetch(cache: NodeCache, number: int) -> bool:
    """Fetches a block, unless there is no room."""
    claim = cache.claim(name(number), SIZE)
    if claim is not None:
        claim.write(0, bytes([number]) * SIZE)
        claim.complete()
    return claim is not None
