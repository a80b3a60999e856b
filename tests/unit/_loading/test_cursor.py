"""The place of a run is kept for one iterator at a time, and counted once."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass

import pytest
from samplers import indices
from torch.utils.data import DataLoader

from dmagent_loader._loading.config import LoaderSettings
from dmagent_loader._loading.cursor import Cursor
from dmagent_loader._loading.mailbox import Mailbox
from dmagent_loader.errors import ConfigurationError, StateError

SINGLE = LoaderSettings(batch_size=4, samples_per_fetch=4)


@dataclass
class At:
    """An iterator that has given all samples before `frontier`."""

    frontier: int


@dataclass
class Worker:
    """What torch tells worker `id` of a loader whose iterator drew the seed `loader`."""

    id: int
    num_workers: int = 2
    loader: int = 1000

    @property
    def seed(self) -> int:
        return self.loader + self.id


@pytest.fixture
def cursor() -> Cursor:
    return Cursor(Mailbox(2))


def forked(cursor: Cursor) -> Cursor:
    """The cursor as a data worker has it: a copy, over the same shared memory."""
    return copy.copy(cursor)


@pytest.mark.parametrize("look", [iter, lambda sampler: iter(DataLoader(sampler, batch_size=4, collate_fn=indices))])
def test_a_look_at_a_batch_does_not_move_a_run_in_silence(build, look):
    """The state would stand still where the look ended, and a new mix begin before samples given under the old one."""
    sampler = build()
    stream = iter(sampler)
    for _ in range(10):
        next(stream)
    next(look(sampler))
    with pytest.raises(StateError, match="another iterator over this sampler"):
        next(stream)


def test_an_iterator_that_is_done_makes_room_for_the_next(build):
    sampler = build()
    for first in (0, 8, 16):
        assert indices(itertools.islice(sampler, 8)) == list(range(first, first + 8))


def test_without_workers_the_place_is_after_the_last_sample_given_or_consumed(cursor):
    assert (cursor.delivered, cursor.handed_out, cursor.frontier) == (0, 0, 0)
    cursor.stream = At(10)
    cursor.consume(4)
    assert (cursor.consumed, cursor.delivered, cursor.handed_out, cursor.frontier) == (4, 10, 10, 10)
    assert cursor.first_free(SINGLE, world_size=1, last_start=0) == 10
    assert cursor.first_free(SINGLE, world_size=1, last_start=30) == 30, "a ledger is written forwards only"
    cursor.consume(12)
    cursor.consume(8)
    assert (cursor.consumed, cursor.handed_out) == (12, 12), "what was consumed does not become less"


def test_a_new_pass_begins_after_what_was_handed_out_or_after_what_was_trained_on(cursor):
    cursor.stream = At(10)
    cursor.consume(4)
    assert cursor.begin_pass(None, cursor.handed_out) == 10
    cursor.stream = At(20)
    cursor.training_counts = True
    begin = cursor.begin_pass(None, cursor.handed_out)
    assert begin == 4, "the trainer counts each batch, and what it had fetched ahead comes again"
    assert cursor.delivered == 4


def test_with_workers_a_new_mix_begins_after_all_that_they_may_have_fetched(cursor):
    """Catches a bound that follows the workers' progress: a resumed run would decide for another sample."""
    for worker in range(2):
        forked(cursor).start_worker(Worker(worker), 0)
    cursor.consume(8)
    settings = LoaderSettings(batch_size=4, samples_per_fetch=4, prefetch_factor=3)
    for frontier in (0, 12, 8 + 2 * 3 * 4):
        cursor.mailbox.advance(1, frontier)
        assert cursor.first_free(settings, world_size=1, last_start=0) == 8 + 2 * 3 * 4
    assert cursor.first_free(settings, world_size=3, last_start=0) == 8 + 3 * 2 * 3 * 4
    assert cursor.frontier == 32
    cursor.mailbox.advance(1, 33)
    with pytest.raises(
        ConfigurationError, match=r"1 samples further than 8 consumed samples and a prefetch_factor of 3"
    ):
        cursor.first_free(settings, world_size=1, last_start=0)


@pytest.mark.parametrize(
    ("settings", "free"),
    [
        (LoaderSettings(batch_size=4, samples_per_fetch=None), 2 * 2 * 4 * 2),
        (LoaderSettings(batch_size=4, samples_per_fetch=8, kind="whole"), 2 * 2 * 8),
        (LoaderSettings(batch_size=4, samples_per_fetch=4, prefetched_samples=41), 48),
    ],
    ids=["unknown batches", "one stream for all ranks", "named by the trainer"],
)
def test_the_bound_is_in_whole_steps_of_the_loader(cursor, settings, free):
    """41 samples that a trainer holds are rounded up to 6 steps of 2 ranks with 4 samples each."""
    forked(cursor).start_worker(Worker(0), 0)
    assert cursor.first_free(settings, world_size=2, last_start=0) == free


def test_setting_a_run_back_stops_its_workers_and_setting_it_forward_does_not(cursor):
    worker = forked(cursor)
    cursor.seek(40)
    assert worker.is_newest(Worker(0))
    assert (cursor.position, cursor.consumed, cursor.mailbox.base) == (40, 40, 40)
    cursor.seek(20)
    with pytest.raises(StateError, match="set back by seek"):
        worker.check_worker(Worker(0))
    again = forked(cursor)
    again.check_worker(Worker(0, loader=2000))
    cursor.restore(20)
    with pytest.raises(StateError, match="a state was loaded"):
        again.check_worker(Worker(0, loader=2000))


def test_a_worker_that_starts_late_begins_where_the_others_did_in_every_pass(cursor):
    """What was consumed from the others by then is in the mailbox, but not in the worker's own copy."""
    cursor.seek(16)
    first, late = forked(cursor), forked(cursor)
    assert first.begin_pass(Worker(0), first.handed_out) == 16
    cursor.consume(24)
    assert late.begin_pass(Worker(1), late.handed_out) == 16
    assert first.begin_pass(Worker(0), first.handed_out) == 24, "the next pass of a persistent worker"
    cursor.consume(32)
    assert late.begin_pass(Worker(1), late.handed_out) == 24


def test_workers_of_a_loader_that_was_replaced_leave_the_place_alone(cursor):
    """They would overwrite how far the new ones have come."""
    replaced = forked(cursor)
    cursor.begin_pass(None, cursor.handed_out)
    new = forked(cursor)
    new.start_worker(Worker(0, loader=2000), 8)
    replaced.start_worker(Worker(0, loader=1000), 0)
    assert cursor.mailbox.frontier() == 8
    assert cursor.mailbox.num_workers == 2
