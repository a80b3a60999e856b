"""Which samples an iterator delivers, by hand: ranks, workers, slices of a trainer, and whole steps."""

from __future__ import annotations

import numpy as np
import pytest

from dmagent_loader.mixture.sharding import StreamLayout


@pytest.mark.parametrize(
    ("layout", "indices"),
    [
        (StreamLayout(base=0), [0, 1, 2, 3, 4, 5]),
        (StreamLayout(base=5, batch_size=3), [5, 6, 7, 8, 9, 10]),
        (StreamLayout(base=0, worker=1, num_workers=2, samples_per_fetch=2), [2, 3, 6, 7, 10, 11]),
        (StreamLayout(base=5, rank=1, world_size=1, kind="whole", batch_size=3), [5, 6, 7, 8, 9, 10]),
    ],
    ids=["alone", "in batches", "a worker takes whole batches", "a stream that is not sliced"],
)
def test_one_process_delivers_the_samples_in_their_order(layout, indices):
    assert layout.indices(0, 6).tolist() == indices
    assert layout.indices(2, 4).tolist() == indices[2:]


@pytest.mark.parametrize(("base", "world", "batch"), [(0, 2, 3), (7, 3, 1), (5, 4, 8)])
def test_a_rank_has_neighbouring_samples_of_each_global_batch_from_a_random_one_on(base, world, batch):
    size, starts = world * batch, set()
    ranks = [StreamLayout(base=base, key=1, rank=r, world_size=world, batch_size=batch) for r in range(world)]
    for number in range(50):
        start = base + number * size
        own = [rank.indices(number * batch, batch) - start for rank in ranks]
        starts.add(int(own[0][0]))
        assert np.concatenate(own).tolist() == [(own[0][0] + place) % size for place in range(size)]
    assert len(starts) > min(size, 20) // 2


def test_slices_of_a_trainer_are_the_shares_of_ranks():
    """Whether a rank reads its own share, or the trainer cuts one stream, it trains on the same samples."""
    sliced = StreamLayout(base=5, key=3, world_size=2, kind="whole", batch_size=3).indices(0, 12).tolist()
    ranks = [StreamLayout(base=5, key=3, rank=rank, world_size=2, batch_size=3) for rank in range(2)]
    assert sliced == [i for first in (0, 3) for rank in ranks for i in rank.indices(first, 3).tolist()]


def test_a_rank_continues_with_the_same_samples_wherever_its_pass_begins():
    """Catches a deal that depends on the number of batches since the restart."""
    whole = StreamLayout(base=0, key=3, rank=1, world_size=2, batch_size=3)
    resumed = StreamLayout(base=12, key=3, rank=1, world_size=2, batch_size=3)
    assert resumed.indices(0, 30).tolist() == whole.indices(6, 30).tolist()


def test_runs_and_ranks_have_deals_of_their_own():
    deals = [StreamLayout(base=0, key=key, rank=0, world_size=8).indices(0, 40).tolist() for key in range(4)]
    assert len({tuple(deal) for deal in deals}) == 4


def test_the_last_global_batch_may_be_smaller():
    """11 samples for 2 ranks with batches of 3: 6, then 4; one sample is left over."""
    ranks = [StreamLayout(base=4, key=key, rank=r, world_size=2, batch_size=3) for key in range(9) for r in range(2)]
    for first, second in zip(ranks[::2], ranks[1::2], strict=True):
        own = [rank.indices(0, 9, end=15).tolist() for rank in (first, second)]
        assert [len(its) for its in own] == [5, 5]
        assert sorted(own[0] + own[1]) == list(range(4, 14))
        assert first.indices(3, 5, end=15).tolist() == own[0][3:]
        assert first.indices(5, 5, end=15).tolist() == []


@pytest.mark.parametrize(
    ("settings", "end", "delivered", "own"),
    [
        ({}, 10, 10, [10]),
        ({"world_size": 3}, 10, 9, [3, 3, 3]),
        ({"world_size": 2, "samples_per_step": 2}, 11, 8, [4, 4]),
        ({"base": 6, "world_size": 2, "samples_per_step": 2}, 11, 10, [2, 2]),
        ({"base": 6}, 4, 6, [0]),
        ({"kind": "whole", "world_size": 2, "batch_size": 2, "samples_per_step": 2}, 11, 8, [8, 8]),
    ],
)
def test_the_run_is_cut_to_whole_steps_of_all_ranks(settings, end, delivered, own):
    layouts = [StreamLayout(**{"base": 0, **settings, "rank": rank}) for rank in range(settings.get("world_size", 1))]
    assert {layout.delivered_end(end) for layout in layouts} == {delivered}
    assert [layout.num_samples(end) for layout in layouts] == own


def test_workers_share_the_samples_of_their_rank():
    """11 samples in batches of 2: the workers in turn, and the half batch to the one whose turn it is."""
    workers = [StreamLayout(base=0, worker=w, num_workers=3, samples_per_fetch=2) for w in range(3)]
    assert [layout.num_samples(11) for layout in workers] == [4, 4, 3]
    delivered = [layout.indices(0, layout.num_samples(11)).tolist() for layout in workers]
    assert delivered == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10]]


def test_the_frontier_is_after_all_that_ranks_in_step_may_have_given():
    """A mix that began before it would change samples that another rank has."""
    rank = StreamLayout(base=4, rank=0, world_size=3)
    assert [rank.frontier(taken) for taken in range(4)] == [4, 7, 10, 13]
    batches = StreamLayout(base=4, rank=0, world_size=3, batch_size=2)
    assert [batches.frontier(taken) for taken in range(6)] == [4, 10, 10, 16, 16, 22]
    sliced = StreamLayout(base=4, world_size=2, kind="whole", batch_size=3)
    assert [sliced.frontier(taken) for taken in (0, 1, 6, 7, 12)] == [4, 10, 10, 16, 16]
    worker = StreamLayout(base=0, worker=1, num_workers=2, samples_per_fetch=2)
    assert [worker.frontier(taken) for taken in (0, 1, 2, 3)] == [0, 3, 4, 7]
    assert worker.frontiers(np.arange(4)).tolist() == [0, 3, 4, 7]
