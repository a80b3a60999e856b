"""The place of a run is kept for one iterator at a time, also where data workers read, and counted once."""

from __future__ import annotations

import itertools
import multiprocessing
import time

import pytest
from samplers import (
    assert_more_consumed_than_handed_out_is_refused,
    indices,
    logged,
    stop_workers,
    wait_until_fetched,
)
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dmagent_loader import AgentWeightedSampler, MixingDataLoader, ReadingConfig
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.policies import StaticPolicy


@pytest.mark.parametrize("look_workers", [0, 1, 2])
def test_a_look_while_workers_read_stops_them(build, look_workers):
    sampler = build()
    stream = iter(MixingDataLoader(sampler, batch_size=4, num_workers=2, collate_fn=indices))
    next(stream)
    look = MixingDataLoader(sampler, batch_size=4, num_workers=look_workers, collate_fn=indices)
    assert list(itertools.islice(look, 3)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.raises(StateError, match="use a separate sampler to look at samples"):
        list(itertools.islice(stream, 10))


def test_a_look_with_workers_stops_the_main_process(build):
    sampler = build()
    stream = iter(sampler)
    next(stream)
    next(iter(MixingDataLoader(sampler, batch_size=4, num_workers=1, collate_fn=indices)))
    with pytest.raises(StateError, match="use a separate sampler to look at samples"):
        next(stream)


class LateWorkers(AgentWeightedSampler):
    """Those of the first loaders begin when the last one has long read."""

    loader_number = 0

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.last_has_read = multiprocessing.get_context("fork").Event()

    def __iter__(self):
        if get_worker_info() is not None and self.loader_number < 2:
            assert self.last_has_read.wait(60)
        return super().__iter__()


def test_late_workers_of_a_loader_that_was_replaced_do_not_stop_the_new_ones(build):
    """They would also overwrite how far those have come."""
    sampler = build(kind=LateWorkers)
    replaced = []
    for sampler.loader_number in range(3):
        replaced.append(iter(MixingDataLoader(sampler, batch_size=4, num_workers=2, collate_fn=indices)))
    seen = []
    while len(seen) < 80:
        seen += next(replaced[-1])
        if len(seen) == 24:
            sampler.last_has_read.set()
        time.sleep(0.05)
        sampler.reweight_due(len(seen))
        assert sampler._feed.mailbox.frontier() >= len(seen)
    assert seen == list(range(80))
    with pytest.raises(StateError, match="another iterator"):
        next(replaced[0])


class LateInLaterPasses(AgentWeightedSampler):
    passes = 0

    def __iter__(self):
        worker = get_worker_info()
        self.passes += 1
        if self.passes > 1 and worker is not None and worker.id == 1:
            time.sleep(0.5)
        return super().__iter__()


def test_a_persistent_worker_that_is_late_in_a_later_pass_begins_where_the_others_do(build):
    """It would find there what was consumed from the others by then: samples lost and samples twice."""
    sampler = build(kind=LateInLaterPasses)
    loader = MixingDataLoader(sampler, batch_size=4, num_workers=2, persistent_workers=True, collate_fn=indices)
    seen = []
    for _ in range(3):
        for batch in itertools.islice(loader, 6):
            seen += batch
            sampler.reweight_due(len(seen))
    assert seen == list(range(72))


def test_persistent_workers_refuse_to_go_on_where_a_run_was_set_back(build):
    sampler = build()
    loader = MixingDataLoader(sampler, batch_size=4, num_workers=1, persistent_workers=True, collate_fn=indices)
    sampler.seek(40)
    assert next(iter(loader)) == [40, 41, 42, 43]
    sampler.seek(20)
    with pytest.raises(StateError, match="set back by seek"):
        next(iter(loader))
    again = MixingDataLoader(sampler, batch_size=4, num_workers=1, collate_fn=indices)
    assert next(iter(again)) == [20, 21, 22, 23]


class OwnBatches(IterableDataset):
    """As users of webdataset write it."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __iter__(self):
        stream = iter(self.sampler)
        while batch := indices(itertools.islice(stream, 8)):
            yield batch


def test_batches_made_between_loader_and_sampler_are_dealt_whole_to_the_workers(build):
    """The loader asks for one thing at a time, which is not one sample: what was consumed would be another set."""
    unknown = DataLoader(OwnBatches(build()), batch_size=None, num_workers=2)
    with pytest.raises(ConfigurationError, match="its batch size is unknown"):
        next(iter(unknown))
    stop_workers()
    loader = DataLoader(OwnBatches(build(reading=ReadingConfig(batch_size=8))), batch_size=None, num_workers=2)
    assert list(itertools.chain.from_iterable(itertools.islice(loader, 4))) == list(range(32))


def test_more_consumed_than_was_handed_out_is_refused(build):
    assert_more_consumed_than_handed_out_is_refused(build, workers=2)


def test_a_decision_that_no_sample_is_free_for_is_still_due(build):
    """Workers prefetch more than the sampler was told: nothing of the decision may be kept."""
    sampler = build(policy=StaticPolicy({"source/web": 0.5, "target/math": 0.5}), reading=ReadingConfig(batch_size=4))
    sampler.reweight({"general": -1.0}, consumed=0)
    stream = iter(DataLoader(sampler, batch_size=4, num_workers=2, prefetch_factor=8, collate_fn=indices))
    for _ in range(10):
        next(stream)
    wait_until_fetched(sampler, 80)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="further than 40 consumed samples"):
            sampler.reweight({"general": -1.0}, consumed=40)
    assert sampler.reweight_due(40)
    assert len(sampler.ledger) == 1


def test_what_workers_fetched_ahead_is_no_miscount(build, caplog):
    """Right at the start they have handed out many times what was trained on."""
    sampler = build()
    stream = iter(MixingDataLoader(sampler, batch_size=4, num_workers=2, prefetch_factor=4, collate_fn=indices))
    next(stream)
    wait_until_fetched(sampler, 20)
    assert sampler.state_dict(consumed=4)["consumed"] == 4
    assert not logged(caplog, "were handed out")
