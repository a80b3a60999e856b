"""Which samples an iterator delivers, by hand: ranks, workers, slices of a trainer, and whole steps."""

from __future__ import annotations

import numpy as np
import pytest

from dmagent_loader.mixture.sharding import StreamLayout


@pytest.mark.parametrize(
    ("layout", "indices"),
    [
        (StreamLayout(base=0), [0, 1, 2, 3, 4, 5]),
        (StreamLayout(base=7, rank=1, world_size=3), [7, 10, 13, 16, 19, 22]),
        (StreamLayout(base=8, rank=1, world_size=3), [10, 13, 16, 19, 22, 25]),
        (StreamLayout(base=0, worker=1, num_workers=2, samples_per_fetch=2), [2, 3, 6, 7, 10, 11]),
        (
            StreamLayout(base=0, rank=1, world_size=2, worker=1, num_workers=2, samples_per_fetch=2),
            [5, 7, 13, 15, 21, 23],
        ),
        (StreamLayout(base=0, world_size=2, kind="whole", batch_size=3), [0, 2, 4, 1, 3, 5]),
        (StreamLayout(base=5, world_size=2, kind="whole", batch_size=3), [6, 8, 10, 5, 7, 9]),
        (StreamLayout(base=5, rank=1, world_size=1, kind="whole", batch_size=3), [5, 6, 7, 8, 9, 10]),
    ],
    ids=[
        "alone",
        "a rank",
        "a rank's share does not depend on where the pass begins",
        "a worker takes whole batches",
        "a worker of a rank",
        "slices of a trainer",
        "slices from the middle of a run",
        "a stream that is not sliced",
    ],
)
def test_the_samples_of_an_iterator(layout, indices):
    assert layout.indices(0, 6).tolist() == indices
    assert layout.indices(2, 4).tolist() == indices[2:]


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
    sliced = StreamLayout(base=4, world_size=2, kind="whole", batch_size=3)
    assert [sliced.frontier(taken) for taken in (0, 1, 6, 7, 12)] == [4, 10, 10, 16, 16]
    worker = StreamLayout(base=0, worker=1, num_workers=2, samples_per_fetch=2)
    assert [worker.frontier(taken) for taken in (0, 1, 2, 3)] == [0, 3, 4, 7]
    assert worker.frontiers(np.arange(4)).tolist() == [0, 3, 4, 7]
