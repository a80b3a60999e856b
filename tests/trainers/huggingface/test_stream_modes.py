"""A stock Trainer in each of its loader modes trains on every sample once, in the order of the plan."""

from __future__ import annotations

from itertools import chain

import pytest

# Those that the conformance suite does not run; it has more of the default mode and of the mixin.
MODES = [
    # mode, processes, workers, accumulation
    pytest.param("default", 1, 2, 4, marks=pytest.mark.slow),
    ("default", 2, 2, 4),
    pytest.param("nodispatch", 2, 0, 1, marks=pytest.mark.slow),
    ("nodispatch", 2, 2, 1),
    ("split", 2, 0, 1),
    ("mixin", 2, 2, 1),
]


@pytest.mark.parametrize(("mode", "processes", "workers", "accumulation"), MODES)
def test_every_sample_is_trained_on_once_and_in_order(launch, mode, processes, workers, accumulation):
    """Catches a sampler that shards itself by rank under a stock Trainer: half of its samples are then never trained
    on, and one whose workers deal samples instead of batches: the order then depends on the number of workers."""
    batch_size = 4 if mode == "split" else 2
    per_rank = 2
    steps = 12 if accumulation == 1 else 5
    run = launch(
        "--mode",
        mode,
        "--workers",
        str(workers),
        "--accumulation",
        str(accumulation),
        "--steps",
        str(steps),
        "--slow-until",
        str(steps),
        processes=processes,
        batch_size=batch_size,
    )
    size = per_rank * processes
    batches = run.micro_batches()
    assert len(batches) == steps * accumulation
    for number, ranks in enumerate(batches):
        assert sorted(chain(*ranks)) == list(range(number * size, (number + 1) * size))
        assert [len(indices) for indices in ranks] == [per_rank] * processes
    keys = run.keys()
    assert keys == launch.replay(run, sorted(keys))

    assert run.results[0]["consumed"] == steps * accumulation * size
    assert all(result["ledger"] == run.results[0]["ledger"] for result in run.results)
    stale = [value for _, value in run.results[0]["metrics"]["train/dmagent/staleness_samples"]]
    assert len(stale) == 1 + steps * accumulation * size // 16
    ahead = {"default": 1, "nodispatch": 1, "split": 1, "mixin": 0}[mode] * size
    prefetched = 2 * workers * (size if mode in ("nodispatch", "mixin") else per_rank)
    bound = ahead + -(-prefetched // size) * size
    assert stale[0] == 0
    assert set(stale[1:]) == {bound}
