"""The mailbox: mixes reach every worker in order or not at all, and workers of an older loader change nothing."""

from __future__ import annotations

import copy

import pytest

from dmagent_loader._loading.mailbox import CAPACITY, MAX_WORKERS, Mailbox
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.mixture.ledger import LedgerEntry


def entry(start: int, *mix: float) -> LedgerEntry:
    return LedgerEntry(start=start, mix=mix, decided_by="test", decided_at=start - 1)


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox(2)


def test_a_copy_sees_each_mix_that_is_published_later(mailbox: Mailbox) -> None:
    """Catches copies with memory of their own, to which no new mix would ever come."""
    worker = copy.copy(mailbox)
    assert worker.published == 0
    for number in range(3):
        mailbox.publish(entry(10 * number, number / 4, 1 - number / 4))
    assert worker.published == 3
    received = worker.read(2).as_entry()
    assert (received.start, received.decided_at, received.mix) == (20, 19, (0.5, 0.5))
    assert worker.read(0).start == 0


def test_a_worker_that_fell_behind_further_than_mixes_are_kept_is_told(mailbox: Mailbox) -> None:
    """Catches a ring that hands out the newer mix in the slot of an overwritten one."""
    for number in range(CAPACITY + 2):
        mailbox.publish(entry(number, 0.25, 0.75))
    for number in (2, CAPACITY + 1):
        assert mailbox.read(number).start == number
    with pytest.raises(StateError, match=rf"fell {CAPACITY + 1} mixes behind, but only the last {CAPACITY} are kept"):
        mailbox.read(1)


def test_the_frontier_is_that_of_the_worker_that_is_furthest(mailbox: Mailbox) -> None:
    assert mailbox.num_workers == 0
    for worker in range(3):
        assert mailbox.start_worker(worker, 3, 40, mailbox.generation) == 0
    assert mailbox.num_workers == 3
    mailbox.advance(1, 64)
    mailbox.advance(2, 56)
    assert mailbox.frontier() == 64
    assert mailbox.start_worker(1, 3, 50, mailbox.generation) == 64, "how far it came in the pass before"
    assert mailbox.frontier() == 56
    mailbox.clear_workers()
    assert (mailbox.num_workers, mailbox.frontier()) == (0, 0)


def test_workers_that_started_before_a_restart_do_not_count(mailbox: Mailbox) -> None:
    mailbox.start_worker(0, 2, 0, mailbox.generation)
    mailbox.generation += 1
    assert mailbox.num_workers == 0
    mailbox.start_worker(0, 1, 0, mailbox.generation)
    assert mailbox.num_workers == 1


def test_the_workers_of_the_newest_loader_are_the_newest(mailbox: Mailbox) -> None:
    first, second = (3, 0xFFFFFFFF), (5, 0x12345678)
    assert mailbox.is_newest(*first)
    assert mailbox.is_newest(4, first[1]), "another worker of the same loader, started after the first"
    assert mailbox.is_newest(*second)
    assert not mailbox.is_newest(*first)
    assert mailbox.is_newest(*second)


def test_all_workers_of_a_pass_begin_where_the_first_of_them_did(mailbox: Mailbox) -> None:
    """A late worker would find what was consumed from the others by then: samples lost, samples twice."""
    assert mailbox.agree_on_base(0, 3, key=7, base=40) == 40
    assert mailbox.agree_on_base(2, 3, key=7, base=48) == 40
    assert mailbox.agree_on_base(0, 3, key=8, base=80) == 80
    assert mailbox.agree_on_base(1, 3, key=7, base=56) == 40, "it is still in the pass before"


def test_two_workers_that_began_at_one_moment_at_different_samples_are_refused(mailbox: Mailbox) -> None:
    """Neither has seen the other, so each has written down a beginning of its own."""
    mailbox.agree_on_base(0, 3, key=7, base=40)
    mailbox._passes[1], mailbox._bases[1] = 7, 48
    with pytest.raises(StateError, match="begin at different samples"):
        mailbox.agree_on_base(2, 3, key=7, base=48)


def test_more_workers_than_there_is_room_for_are_refused(mailbox: Mailbox) -> None:
    mailbox.start_worker(MAX_WORKERS - 1, MAX_WORKERS, 5, mailbox.generation)
    assert mailbox.num_workers == MAX_WORKERS
    with pytest.raises(
        ConfigurationError, match=f"{MAX_WORKERS + 1} data workers on one rank, but at most {MAX_WORKERS} are"
    ):
        mailbox.start_worker(0, MAX_WORKERS + 1, 0, mailbox.generation)
