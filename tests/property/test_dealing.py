"""Ranks are alike: whatever the mix and their number, each trains on the mix. And nodes have shards of their own."""

from __future__ import annotations

import numpy as np
import pytest

from dmagent_loader.mixture.domain_order import DomainOrder, in_quanta
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.hashing import stream_key
from dmagent_loader.mixture.ledger import LedgerEntry
from dmagent_loader.mixture.plan import Plan
from dmagent_loader.mixture.sharding import StreamLayout

MIXES = [
    [1 / 2] * 2,
    [1 / 4] * 4,
    [3 / 4, 1 / 4],
    [3 / 8, 5 / 8],
    [1 / 8] * 8,
    [1 / 2, 1 / 4, 1 / 8, 1 / 8],
    [7 / 16, 5 / 16, 1 / 4],
    [1 / 16] * 16,
    [1 / 3, 2 / 3],
    [1 / 6, 1 / 3, 1 / 2],
    [1 / 10] * 10,
    [0.7, 0.2, 0.1],
]
NUM_SAMPLES = 1 << 18
LEAST = 2048
"""Samples of a group from which on its share is compared: of fewer, rare domains have no normal distribution."""


def furthest(domain: np.ndarray, group: np.ndarray, mix: np.ndarray) -> float:
    """Standard deviations between the mix and the share of any domain in any group of samples, if drawn at random."""
    counts = np.bincount(group * len(mix) + domain, minlength=(group.max() + 1) * len(mix)).reshape(-1, len(mix))
    totals = counts.sum(axis=1, keepdims=True)
    spread = np.sqrt(totals * mix * (1 - mix))
    return float((np.abs(counts - totals * mix) / np.maximum(spread, 1e-9))[totals[:, 0] > 0].max())


def groups(world: int, batch: int, count: int) -> dict[str, np.ndarray]:
    """Who gets each sample of a stream: rank, place in the batch of a rank, and worker of a rank, of 2 to 4."""
    place = np.arange(count)
    rank, number = place % (world * batch) // batch, place // (world * batch)
    found = {"ranks": rank, "places": rank * batch + place % batch}
    if world * batch >= 32:
        # Which worker delivers a batch has no influence on the global batches, whose order is that of the run. In very
        # small ones the period of the order shows.
        found |= {f"{workers} workers": rank * workers + number % workers for workers in (2, 3, 4)}
    return {name: its for name, its in found.items() if count >= LEAST * (its.max() + 1)}


def dealt(world: int, batch: int, count: int, laned: Plan | None = None) -> np.ndarray:
    """Global indices, batch after batch and rank after rank."""
    layout = StreamLayout(base=0, key=11, kind="whole", world_size=world, batch_size=batch)
    return layout.indices(0, count // layout.global_batch * layout.global_batch, laned=laned)


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(f"{weight:.2g}" for weight in mix[:3]))
def test_no_rank_place_or_worker_is_far_from_the_mix(mix):
    """Catches g mod world size: single ranks were off by 345 standard deviations after two million samples."""
    weights = np.array(mix)
    domain, _ = DomainOrder(in_quanta(weights), stream_key(3, "order", 0)).locate(np.arange(NUM_SAMPLES))
    for world in (2, 3, 4, 6, 8, 10, 12, 16, 30, 64, 128, 1024):
        for batch in (1, 2, 3, 8):
            indices = dealt(world, batch, NUM_SAMPLES)
            for name, group in groups(world, batch, len(indices)).items():
                assert furthest(domain[indices], group, weights) <= 5, f"{world} ranks, batch {batch}: {name}"


def plan_of(num_domains: int, num_shards: int, rows: int) -> Plan:
    space = DomainSpace.from_names([f"source/{number}" for number in range(num_domains)])
    generator = np.random.default_rng(0)
    return Plan(space, [generator.integers(rows // 2, rows * 3 // 2, num_shards) for _ in range(num_domains)], seed=0)


@pytest.mark.parametrize("mix", [MIXES[1], MIXES[3], MIXES[6], MIXES[8]], ids=["quarters", "3/8", "7/16", "thirds"])
def test_ranks_that_have_lanes_are_alike_too(mix):
    weights = np.array(mix)
    plan = plan_of(len(mix), 100, 500)
    plan.append(LedgerEntry(start=0, mix=tuple(mix), decided_by="test", decided_at=0))
    for world, batch in ((2, 1), (4, 8), (16, 2), (64, 8), (128, 4)):
        indices = dealt(world, batch, NUM_SAMPLES // 2, plan)
        domain = plan.locate(indices).domain
        for name, group in groups(world, batch, len(indices)).items():
            assert furthest(domain, group, weights) <= 5, f"{world} ranks, batch {batch}: {name}"


@pytest.mark.parametrize(("mix", "batch"), [([0.9, 0.05, 0.05], 8), ([0.75, 0.25], 2)], ids=["9/10", "3/4"])
def test_places_of_a_batch_are_alike_if_ranks_have_lanes(mix, batch):
    """Catches one random order for two purposes: samples of a lane that two ranks share were last in one, first in the
    other, and single places were off by 10 standard deviations."""
    plan = plan_of(len(mix), 100, 5000)
    plan.append(LedgerEntry(start=0, mix=tuple(mix), decided_by="test", decided_at=0))
    indices = dealt(64, batch, 1 << 20, plan)
    domain, place = plan.locate(indices).domain, np.arange(len(indices)) % batch
    assert furthest(domain, place, np.array(mix)) <= 5


@pytest.mark.parametrize(("world", "batch"), [(2, 1), (4, 3), (7, 2), (64, 8)])
def test_global_batches_are_the_same_however_they_are_dealt(world, batch):
    plan = plan_of(3, 5, 80)
    plan.append(LedgerEntry(start=0, mix=(0.5, 0.3, 0.2), decided_by="test", decided_at=0))
    size, end = world * batch, 10 * world * batch + world  # the last global batch is smaller
    for laned in (None, plan):
        ranks = [
            StreamLayout(base=0, key=1, rank=rank, world_size=world, batch_size=batch).indices(0, end, end, laned)
            for rank in range(world)
        ]
        for number in range(11):
            together = np.concatenate([rank[number * batch : (number + 1) * batch] for rank in ranks])
            assert sorted(together.tolist()) == list(range(number * size, min((number + 1) * size, end)))


@pytest.mark.parametrize("every", [500, 10**9], ids=["the mix changes every 500 samples", "one mix"])
@pytest.mark.parametrize(("num_domains", "num_shards", "rows", "largest"), [(4, 500, 250, 1.3), (8, 125, 400, 1.35)])
def test_a_node_reads_its_own_part_of_the_shards(num_domains, num_shards, rows, largest, every):
    """8 nodes of 8 ranks. Catches a deal by index: every node reads a row of every shard; and with few shards of many
    domains lanes that are off by what those before them have too many: a node reads 1.4 times its part."""
    nodes, ranks, batch = 8, 8, 8
    plan, generator = plan_of(num_domains, num_shards, rows), np.random.default_rng(1)
    total = int(plan.num_rows.sum())
    for start in range(0, total, every):
        mix = tuple(generator.dirichlet(np.full(num_domains, 3.0)).tolist())
        plan.append(LedgerEntry(start=start, mix=mix, decided_by="test", decided_at=start))
    for laned, least, mean, most in ((plan, 1 / nodes, 1.3 / nodes, largest / nodes), (None, 0.99, 1.0, 1.0)):
        indices = dealt(nodes * ranks, batch, total, laned)
        located = plan.locate(indices)
        node = np.arange(len(indices)) % (nodes * ranks * batch) // (ranks * batch)
        shard = located.domain * num_shards + located.shard
        number_read = np.bincount(np.unique(node * num_domains * num_shards + shard) // (num_domains * num_shards))
        share = number_read / len(np.unique(shard))
        assert share.min() >= least * 0.95
        assert share.mean() <= mean
        assert share.max() <= most
