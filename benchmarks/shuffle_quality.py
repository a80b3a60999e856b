"""How well one pass is shuffled: this package, streaming's py1e, and a shuffle of all rows.

Nothing is read: the order of one domain of 100 shards with 100,000 rows is compared as a list of numbers. Measured are

- how far apart two neighbouring rows of a shard come in training (median, and the nearest percent of the pairs), as a
  share of the median of a full shuffle;
- the number of shards among 4,096 consecutive samples, the first of the pass and any;
- the number of shards in use during 65,536 samples, which a cache has to hold.

py1e (mosaicml-streaming, `streaming/base/shuffle/py1e.py`) is written anew from its description: each row moves by a
random distance, up to half a block less half its shard, inside the part of its canonical node; nodes take turns.

    python benchmarks/shuffle_quality.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from measuring import parser, save, say

from dmagent_loader.mixture.row_order import RowOrders
from dmagent_loader.mixture.shuffle import Shuffle, shared_shuffle

IntArray = np.ndarray[Any, np.dtype[np.int64]]
STRETCH, IN_USE, PAIRS = 4096, 65_536, 200_000
BLOCK = 1 << 18
"""Default ``shuffle_block_size`` of streaming."""


def ours(shuffle: Shuffle, shards: int, rows: int) -> IntArray:
    """Rows in the order of training, numbered over all shards."""
    order, parts = RowOrders(0, ["source/web"], [np.full(shards, rows)], shuffle), []
    for first in range(0, shards * rows, 1 << 19):
        draws = np.arange(first, min(first + (1 << 19), shards * rows))
        shard, row = order.locate(np.zeros_like(draws), draws)
        parts.append(shard * rows + row)
    return np.concatenate(parts)


def default(domains: int, shards: int, rows: int) -> Shuffle:
    """The default shuffle of as many domains."""
    return shared_shuffle([np.full(shards, rows)] * domains)


def full(shards: int, rows: int) -> IntArray:
    """A shuffle of all rows."""
    return np.random.default_rng(0).permutation(shards * rows)


def py1e(nodes: int, shards: int, rows: int) -> IntArray:
    """py1e with a number of canonical nodes, which must divide the rows of all shards."""
    generator = np.random.default_rng(0)
    sequence = (generator.permutation(shards)[:, None] * rows + np.arange(rows)).ravel()
    placed = []
    for part in np.split(sequence, nodes):
        starts = np.flatnonzero(np.diff(part // rows, prepend=-1))
        sizes = np.diff(np.append(starts, len(part)))
        cutoff = np.maximum(0, (generator.uniform(0.75, 1.25, len(sizes)) * BLOCK - sizes) / 2)
        low, high = np.maximum(-cutoff, -starts), np.minimum(cutoff, len(part) - starts - sizes)
        # The rows of a shard part are in a random order before they move.
        within = np.concatenate(
            [start + generator.permutation(size) for start, size in zip(starts, sizes, strict=True)]
        )
        moved = within + generator.uniform(np.repeat(low, sizes), np.repeat(high, sizes))
        placed.append(part[np.argsort(moved)])
    return np.stack(placed, axis=1).ravel()


METHODS: Mapping[str, Callable[[int, int], IntArray]] = {
    "all rows": full,
    "this package, `own_shards=True`, or one domain": lambda *sizes: ours(Shuffle(), *sizes),
    "this package, 4 domains": lambda *sizes: ours(default(4, *sizes), *sizes),
    "this package, 8 domains": lambda *sizes: ours(default(8, *sizes), *sizes),
    "this package, 52 domains": lambda *sizes: ours(default(52, *sizes), *sizes),
    "this package, `shuffle_window=262144`": lambda *sizes: ours(Shuffle(window=BLOCK), *sizes),
    "one shard after the other, windows of 8,192": lambda *sizes: ours(Shuffle(window=8192, shards=1), *sizes),
    "py1e, 64 canonical nodes": lambda *sizes: py1e(64, *sizes),
    "py1e, 1 canonical node": lambda *sizes: py1e(1, *sizes),
}


def quality(order: IntArray, rows: int) -> dict[str, float]:
    """The measures of one order."""
    generator = np.random.default_rng(1)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    first = generator.integers(0, len(order) - 1, PAIRS)
    first = first[first % rows < rows - 1]
    apart = np.abs(place[first + 1] - place[first])
    shard = order // rows

    def distinct(length: int) -> float:
        starts = generator.integers(0, max(1, len(order) - length), 20)
        return float(np.mean([len(np.unique(shard[start : start + length])) for start in starts]))

    return {
        "median": float(np.median(apart)),
        "nearest_percent": float(np.percentile(apart, 1)),
        "first": float(len(np.unique(shard[:STRETCH]))),
        "any": distinct(STRETCH),
        "in_use": distinct(IN_USE),
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """The results as Markdown."""
    whole = results["all rows"]
    lines = [
        "| shuffle | neighbours come apart (median) | nearest percent | shards in the first 4,096 | in any 4,096 "
        "| in use over 65,536 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, found in results.items():
        shares = (found["median"] / whole["median"], found["nearest_percent"] / whole["nearest_percent"])
        numbers = [f"{found[key]:.0f}" for key in ("first", "any", "in_use")]
        lines.append(f"| {name} | {shares[0]:.2%} | {shares[1]:.2%} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures all methods, prints the table and saves the results."""
    options = parser(__doc__ or "", "shuffle_quality").parse_args()
    rows = 6_400 if options.quick else 100_000
    results = {}
    for name, method in METHODS.items():
        results[name] = quality(method(100, rows), rows)
        say(f"{name}: {results[name]}")
    print(table(results))
    save(options, results)


if __name__ == "__main__":
    main()
