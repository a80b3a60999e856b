"""Data workers change neither the order of samples nor what a state or a new mix means."""

from __future__ import annotations

import itertools
import pickle
import time

import pytest
from samplers import (
    CHANGES,
    assert_an_iterator_stops_when_a_state_is_loaded,
    assert_ranks_may_change_at_a_restore,
    mixed_in_advance,
    stop_workers,
    wait_until_fetched,
)
from torch.utils.data import DataLoader

from dmagent_loader import MixingDataLoader, ReadingConfig
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.testing import sample_ids


@pytest.mark.parametrize("num_workers", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_do_not_depend_on_torch_workers(build, num_workers, world_size):
    """Catches workers that take samples in turn: torch takes whole batches in turn, so the order would change."""

    def batches(workers):
        sampler = mixed_in_advance(build(rank=world_size - 1, world_size=world_size))
        loader = MixingDataLoader(sampler, batch_size=4, num_workers=workers)
        return [list(zip(b["__index__"].tolist(), b["__key__"], strict=True)) for b in loader]

    assert batches(num_workers) == batches(0)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_without_a_loader_batch_deal_single_samples(build):
    loader = MixingDataLoader(build(), batch_size=None, num_workers=2)
    assert [sample["__index__"] for sample in loader] == list(range(len(build())))


def test_a_spawned_worker_reads_the_same(build):
    sampler = mixed_in_advance(build())
    copy = pickle.loads(pickle.dumps(sampler.collection))
    assert copy.fingerprint == sampler.collection.fingerprint
    loader = MixingDataLoader(sampler, batch_size=4, num_workers=1, multiprocessing_context="spawn")
    assert [i for b in itertools.islice(loader, 5) for i in b["__index__"].tolist()] == list(range(20))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_bare_loader_with_workers_must_name_its_batch_size(build, num_workers):
    """Unknown to the workers, it would decide the order of samples and how late a new mix holds."""
    with pytest.raises(ConfigurationError, match="use MixingDataLoader"):
        next(iter(DataLoader(build(), batch_size=4, num_workers=num_workers)))
    stop_workers()
    loader = DataLoader(build(reading=ReadingConfig(batch_size=4)), batch_size=4, num_workers=num_workers)
    assert [i for batch in itertools.islice(loader, 5) for i in batch["__index__"].tolist()] == list(range(20))


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 1)])
def test_ranks_and_workers_may_change_at_restore(build, before, after):
    assert_ranks_may_change_at_a_restore(build, before, after, workers=2)


def test_live_changes_reach_running_workers_within_the_declared_bound(build):
    """Catches weights that workers copied when they were forked: the change would never arrive."""
    sampler = build(exhausted="repeat")
    loader = MixingDataLoader(sampler, batch_size=4, num_workers=2, prefetch_factor=2)
    stream, consumed, trained = iter(loader), 0, []
    for step in range(30):
        batch = next(stream)
        trained += list(zip(batch["__index__"].tolist(), batch["__domain__"], strict=True))
        consumed += 4
        if step == 9:
            sampler.reweight_due(consumed)
            entry = sampler.set_mix({"target/proofs": 1.0})
    assert [index for index, _ in trained] == list(range(120))
    assert entry.decided_at == 40
    assert 0 <= entry.staleness <= 2 * 2 * 4
    assert {domain for index, domain in trained if index >= entry.start} == {"target/proofs"}
    assert "source/web" in {domain for index, domain in trained if index >= entry.start - 8 and index < entry.start}


def test_one_worker_has_a_bound_too(build):
    """Catches a bound that is worked out from single samples: the change comes too late for the worker's batch."""
    sampler = build(exhausted="repeat")
    stream, starts = iter(MixingDataLoader(sampler, batch_size=8, num_workers=1)), []
    for step in range(1, 12):
        next(stream)
        sampler.reweight_due(8 * step)
        starts.append(sampler.set_mix(CHANGES[step % 3]).staleness)
    assert set(starts) == {2 * 8}


def test_a_loader_that_prefetches_more_than_declared_is_refused_in_the_main_process(build):
    sampler = build(exhausted="repeat", reading=ReadingConfig(batch_size=4))
    stream = iter(DataLoader(sampler, batch_size=4, num_workers=1, prefetch_factor=8))
    next(stream)
    wait_until_fetched(sampler, 36)
    sampler.reweight_due(4)
    with pytest.raises(ConfigurationError, match="prefetch_factor"):
        sampler.set_mix(CHANGES[0])
    assert len(sampler.ledger) == 1


@pytest.mark.parametrize("persistent", [False, True])
def test_a_new_pass_of_workers_begins_after_what_was_consumed(build, persistent):
    """Catches persistent workers that each go on at a place of their own."""
    sampler = build(exhausted="repeat")
    loader = MixingDataLoader(sampler, batch_size=4, num_workers=2, persistent_workers=persistent)
    for first in (0, 20, 40):
        stream = iter(loader)
        seen = [next(stream)["__index__"].tolist() for _ in range(5)]
        assert [i for batch in seen for i in batch] == list(range(first, first + 20))
        sampler.reweight_due(first + 20)
        del stream


def start_second_worker_late(worker):
    time.sleep(1.0 * worker)


def test_a_worker_that_starts_late_begins_where_the_others_began(build):
    """Catches a worker that begins after what was consumed from the others before it had started."""
    sampler = build(exhausted="repeat")
    loader = MixingDataLoader(sampler, batch_size=4, num_workers=2, worker_init_fn=start_second_worker_late)
    seen = []
    for batch in itertools.islice(loader, 4):
        seen += batch["__index__"].tolist()
        sampler.reweight_due(len(seen))
    assert seen == list(range(16))


def test_persistent_workers_refuse_to_go_on_with_an_older_ledger(build):
    sampler = build(exhausted="repeat")
    loader = MixingDataLoader(sampler, batch_size=4, num_workers=1, persistent_workers=True)
    next(iter(loader))
    sampler.load_state_dict(sampler.state_dict(consumed=4))
    with pytest.raises(StateError, match="rebuild the DataLoader"):
        next(iter(loader))


def test_an_iterator_in_use_does_not_go_on_after_a_state_was_loaded(build):
    assert_an_iterator_stops_when_a_state_is_loaded(build, workers=1)


def test_with_workers_only_the_trainer_knows_what_was_consumed(build):
    sampler = build()
    stream = iter(MixingDataLoader(sampler, batch_size=4, num_workers=1))
    next(stream)
    with pytest.raises(StateError, match="pass consumed="):
        sampler.state_dict()
    assert sampler.state_dict(consumed=4)["consumed"] == 4


def test_after_workers_the_sampler_can_be_read_directly(build):
    sampler = build(exhausted="repeat")
    stream = iter(MixingDataLoader(sampler, batch_size=4, num_workers=2))
    for _ in range(10):
        next(stream)
    sampler.reweight_due(40)
    del stream
    assert [index for index, _, _ in sample_ids(sampler, 3)] == [40, 41, 42]
    assert sampler.set_mix(CHANGES[0]).start == 43
    assert sampler.state_dict()["consumed"] == 43
