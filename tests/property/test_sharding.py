"""Whatever the ranks, workers and batches: every sample goes to one iterator, and none comes before its turn."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dmagent_loader.mixture.sharding import StreamLayout

shapes = {
    "base": st.integers(0, 50),
    "world": st.integers(1, 5),
    "workers": st.integers(1, 4),
    "batch": st.integers(1, 4),
    "extra": st.integers(0, 130),
}


def batches_of_rank(base, world, rank, workers, batch, end, samples_per_step=1):
    """What a torch loader delivers to a rank: the batches of its workers in turn."""
    layouts = [
        StreamLayout(
            base=base,
            key=7,
            rank=rank,
            world_size=world,
            worker=w,
            num_workers=workers,
            samples_per_fetch=batch,
            batch_size=batch,
            samples_per_step=samples_per_step,
        )
        for w in range(workers)
    ]
    streams = [layout.indices(0, end, end).tolist() for layout in layouts]
    assert [len(stream) for stream in streams] == [layout.num_samples(end) for layout in layouts]
    parts = [[s[i : i + batch] for i in range(0, len(s), batch)] for s in streams]
    longest = max(len(p) for p in parts)
    return [p[i] for i in range(longest) for p in parts if i < len(p)]


@given(**shapes)
@settings(max_examples=150, deadline=None)
def test_sharded_ranks_take_every_sample_once_in_the_order_of_one_process(base, world, workers, batch, extra):
    end = base + extra
    ranks = [batches_of_rank(base, world, rank, workers, batch, end) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    taken = sorted(i for rank in ranks for b in rank for i in b)
    assert taken == list(range(base, base + extra // world * world))
    step = base
    for batches in zip(*ranks, strict=True):
        together = sorted(i for b in batches for i in b)
        assert together == list(range(step, step + len(together)))
        step += len(together)


@given(**shapes, sliced_by_rank=st.booleans())
@settings(max_examples=150, deadline=None)
def test_slices_of_a_whole_stream_are_the_same_samples_as_shares(base, world, workers, batch, extra, sliced_by_rank):
    """A trainer cuts the stream into one slice of `batch` for each rank; each must be that rank's share."""
    shares = [StreamLayout(base=base, key=7, rank=rank, world_size=world, batch_size=batch) for rank in range(world)]
    end = base + extra
    block = batch * world if sliced_by_rank else batch
    layouts = [
        StreamLayout(
            base=base,
            key=7,
            world_size=world,
            kind="whole",
            batch_size=batch,
            samples_per_step=batch,
            worker=w,
            num_workers=workers,
            samples_per_fetch=block,
        )
        for w in range(workers)
    ]
    streams = [layout.indices(0, layout.num_samples(end)).tolist() for layout in layouts]
    parts = [[s[i : i + block] for i in range(0, len(s), block)] for s in streams]
    stream = [x for i in range(max(map(len, parts))) for p in parts if i < len(p) for x in p[i]]
    for number in range(0, len(stream), world * batch):
        group = stream[number : number + world * batch]
        assert sorted(group) == list(range(base + number, base + number + world * batch))
        for piece in range(world):
            share = shares[piece].indices(number // world, batch)
            assert group[piece * batch : (piece + 1) * batch] == share.tolist()
    assert len(stream) == extra // (world * batch) * world * batch


@given(**shapes, kind=st.sampled_from(["sharded", "whole"]))
@settings(max_examples=150, deadline=None)
def test_the_frontier_lies_beyond_everything_delivered(base, world, workers, batch, extra, kind):
    """A mix that begins at the frontier must not touch a sample that was given; at the start nothing was."""
    for worker in range(workers):
        layout = StreamLayout(
            base=base,
            key=7,
            world_size=world,
            kind=kind,
            batch_size=batch,
            worker=worker,
            num_workers=workers,
            samples_per_fetch=batch,
        )
        assert layout.frontier(0) == base
        indices = layout.indices(0, extra)
        for taken in range(1, extra + 1, 7):
            assert layout.frontier(taken) > indices[:taken].max()
        if workers == 1 and extra:
            assert layout.frontier(extra) <= int(np.max(indices)) + world * batch
