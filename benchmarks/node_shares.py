"""What share of the shards each of 8 nodes reads when samples are dealt by lane, and what that deal costs.

Nothing is read: the plan of one pass is computed for 8 nodes of 8 ranks, and the shards of every node are counted. The
cost is the processor time of one rank for one sample of its own, with 52 domains and batches of 8.

    python benchmarks/node_shares.py
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from measuring import median, parser, save, say

from dmagent_loader import DomainSpace, ReadingConfig
from dmagent_loader.mixture.ledger import LedgerEntry
from dmagent_loader.mixture.plan import Plan
from dmagent_loader.mixture.sharding import StreamLayout

NODES, RANKS = 8, 8
CASES = [
    # domains, shards of each, mean rows of each, batch of a rank, samples between two mixes
    (4, 1000, 250, 8, 500),
    (4, 1000, 250, 8, 20_000),
    (4, 250, 1000, 64, 500),
    (16, 250, 250, 64, 64_000),
    (52, 100, 200, 64, 64_000),
    (8, 125, 400, 8, 500),
]
BY_DEFAULT = [(2, 100, 10_000, 64, 64_000), (4, 100, 10_000, 64, 64_000), (8, 64, 10_000, 64, 64_000)]
"""Cases with the default shuffle, which is that of the first ones only with ``own_shards=True``."""
WORLDS = (8, 64, 1024, 10_000)


def plan_of(domains: int, shards: int, rows: int, every: int, *, own: bool = True) -> Plan:
    """A plan with shards of unlike sizes and a random mix every so many samples."""
    generator = np.random.default_rng(0)
    shard_rows = [generator.integers(rows // 2, rows * 3 // 2, shards) for _ in range(domains)]
    space = DomainSpace.from_names([f"source/{number}" for number in range(domains)])
    plan = Plan(space, shard_rows, seed=0, shuffle=ReadingConfig(own_shards=own).shuffle(shard_rows))
    for start in range(0, int(plan.num_rows.sum()), every):
        mix = tuple(generator.dirichlet(np.ones(domains)).tolist())
        plan.append(LedgerEntry(start=start, mix=mix, decided_by="bench", decided_at=start))
    return plan


def shares(domains: int, shards: int, rows: int, batch: int, every: int, *, own: bool = True) -> list[float]:
    """Share of the shards in use that each node reads, in eighths; with the shuffle of `own_shards`, or the default."""
    plan = plan_of(domains, shards, rows, every, own=own)
    layout = StreamLayout(base=0, key=5, kind="whole", world_size=NODES * RANKS, batch_size=batch)
    size, read = layout.global_batch, set[tuple[int, int]]()
    whole = int(plan.num_rows.sum()) // size * size
    for first in range(0, whole, 16 * size):
        indices = layout.indices(first, min(16 * size, whole - first), laned=plan)
        located = plan.locate(indices)
        node = np.arange(len(indices)) % size // (size // NODES)
        found = np.unique(np.column_stack([node, located.domain * shards + located.shard]), axis=0)
        read.update(map(tuple, found.tolist()))
    used = len({shard for _, shard in read})
    return [NODES * sum(node == number for node, _ in read) / used for number in range(NODES)]


def cost(world: int, by_lane: bool, repeats: int) -> float:
    """Microseconds of one rank for one sample of its own."""
    plan = plan_of(52, 1000, 1000, 10**9)
    layout = StreamLayout(base=0, key=1, rank=3, world_size=world, batch_size=8)
    count, times = max(1, (1 << 16) // layout.global_batch) * 8, []
    for number in range(repeats + 1):
        begin = time.process_time()
        plan.locate(layout.indices(number * count, count, laned=plan if by_lane else None))
        times.append((time.process_time() - begin) / count * 1e6)
    return median(times[1:])


def main() -> None:
    """Measures all cases, prints the tables and saves the results."""
    options = parser(__doc__ or "", "node_shares").parse_args()
    results: dict[str, Any] = {"shares": [], "cost": []}
    columns = ("`own_shards`", "domains, shards of each, rows of each", "batch of a rank", "mix changes every")
    print(f"| {' | '.join(columns)} | mean | largest |")
    print("|---|---|---:|---:|---:|---:|")
    cases = [(True, case) for case in CASES] + [(None, case) for case in BY_DEFAULT]
    for own, (domains, shards, rows, batch, every) in cases[5:6] if options.quick else cases:
        found = shares(domains, shards, rows, batch, every, own=bool(own))
        results["shares"].append({"own_shards": own, "case": [domains, shards, rows, batch, every], "eighths": found})
        name = f"{own} | {domains}, {shards:,}, {rows:,}"
        print(f"| {name} | {batch} | {every:,} samples | {np.mean(found):.2f} | {max(found):.2f} |", flush=True)
    for world in WORLDS[:2] if options.quick else WORLDS:
        times = [cost(world, by_lane, options.repeats) for by_lane in (False, True)]
        results["cost"].append({"ranks": world, "in_runs_us": times[0], "by_lane_us": times[1]})
        say(f"{world} ranks: in runs {times[0]:.2f} us, by lane {times[1]:.2f} us a sample of a rank")
    save(options, results)


if __name__ == "__main__":
    main()
