"""Sample rows of each domain, read by position: they do not count as consumed, and training reads them too."""

from __future__ import annotations

from typing import Any

import numpy as np

from dmagent_loader._loading.feed import Feed
from dmagent_loader._loading.lazy import Sample
from dmagent_loader.mixture.simplex import IntArray

GOLDEN = 0.6180339887498949
"""Golden ratio minus 1: any number of its multiples, modulo 1, is evenly spread, so probes read different rows."""


def probe_rows(feed: Feed, rows: int, probe: int) -> dict[str, list[Any]]:
    """Rows evenly spaced over all shards of each domain, decoded and transformed like samples.

    The result is a pure function of the shards and the arguments: the same on all ranks.

    Args:
        feed: The samples of the run.
        rows: Number of rows of each domain; a smaller domain returns all its rows.
        probe: Number of the probe; each probe reads different rows.

    Returns:
        Domain -> rows, in the order of the run's domains; domains without rows are left out. Bad rows are left out if
        the run skips them.

    Raises:
        ConfigurationError: The transform does not return a sample.
        ShardError: A row is damaged or cannot be decoded.
    """
    by_domain = {}
    for domain, name in enumerate(feed.plan.space.names):
        ends = np.cumsum(feed.collection.shard_rows(domain))
        if not len(ends) or ends[-1] == 0:
            continue
        found = (_row(feed, domain, ends, position) for position in positions(int(ends[-1]), rows, probe))
        by_domain[name] = [row for row in found if row is not None]
    return by_domain


def positions(total: int, rows: int, probe: int) -> list[int]:
    """Distinct row numbers below `total`, evenly spaced, with a shift that depends on the probe."""
    count = min(rows, total)
    shift = (0.5 + probe * GOLDEN) % 1.0
    return [int((number + shift) * total / count) for number in range(count)]


def _row(feed: Feed, domain: int, ends: IntArray, position: int) -> Sample | None:
    shard = int(np.searchsorted(ends, position, side="right"))
    row = position - (int(ends[shard - 1]) if shard else 0)
    return feed.sample_at(domain, shard, row)
