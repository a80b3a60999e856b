"""A run decides when it is due, in an order in which no failure leaves half of a decision behind."""

from __future__ import annotations

import copy
import logging

import pytest
from samplers import indices, logged

from dmagent_loader._loading.config import LoaderSettings
from dmagent_loader.errors import ConfigurationError, DomainError, FeedbackError, StateError
from dmagent_loader.mixture.ledger import MANUAL
from dmagent_loader.policies import StaticPolicy

EVEN = StaticPolicy({"source/web": 0.5, "target/math": 0.5})
TRAINED_BY_A_TRAINER = LoaderSettings(by_trainer=True)


@pytest.fixture
def run(build):
    """A run that a trainer counts, so that no sample has to be read."""
    sampler = build(policy=EVEN, exhausted="repeat")
    sampler.bind(TRAINED_BY_A_TRAINER)
    return sampler._run


def fetched_by_workers(run, frontier: int) -> None:
    """Two data workers that have fetched all samples before `frontier`."""
    mailbox = copy.copy(run.feed.mailbox)
    for worker in range(2):
        mailbox.start_worker(worker, 2, 0, mailbox.generation)
        mailbox.advance(worker, frontier)


def test_decisions_are_due_once_in_each_interval_whenever_the_steps_fall(run):
    """Catches a schedule that counts from the last decision: it would drift by up to a step each time."""
    due = []
    for consumed in range(0, 80, 5):
        if run.reweight_due(consumed):
            due.append(consumed)
            run.reweight({"general": -2.0}, consumed)
    assert due == [0, 20, 35, 50, 65]


def test_a_decision_that_was_missed_is_made_up_for_once(run):
    run.reweight({"general": -2.0}, 0)
    assert run.reweight_due(70)
    run.reweight({"general": -2.0}, 70)
    assert not run.reweight_due(79)
    assert run.reweight_due(80)


def test_a_decision_that_no_sample_is_free_for_is_still_due(run):
    """Workers prefetch more than the sampler was told: nothing of the decision may be kept."""
    run.reweight({"general": -1.0}, 0)
    fetched_by_workers(run, frontier=100)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="further than 40 consumed samples"):
            run.reweight({"general": -1.5}, 40)
    assert run.reweight_due(40)
    assert (len(run.decider.measurements), len(run.feed.plan.ledger)) == (1, 1)
    fetched_by_workers(run, frontier=42)
    decision = run.reweight({"general": -1.5}, 40)
    assert decision.entry.start == 40 + decision.staleness == run.feed.plan.ledger.last.start
    assert decision.staleness == 2 * 2


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda run: run.reweight({"general": float("nan")}, 16), FeedbackError),
        (lambda run: run.reweight({"general": -2.0}, 16.0), ConfigurationError),
        (lambda run: run.set_mix({"source/wiki": 1.0}, renormalize=False), DomainError),
        (lambda run: run.load_state_dict({"schema": 0}), StateError),
        (lambda run: run.state_dict(-1), ConfigurationError),
    ],
    ids=["feedback", "consumed", "mix", "state", "saving"],
)
def test_what_is_refused_changes_nothing(run, call, error):
    run.reweight({"general": -2.0}, 0)
    before = run.state_dict(8)
    with pytest.raises(error):
        call(run)
    assert run.state_dict(8) == before


def test_a_mix_set_by_hand_is_in_the_ledger_and_is_no_feedback(run):
    run.feed.cursor.consume(8)
    entry = run.set_mix({"source": 3.0, "target": 1.0}, renormalize=True)
    assert (entry.start, entry.decided_by, entry.decided_at, entry.feedback) == (8, MANUAL, 8, None)
    assert entry.mix == (0.75, 0.25)
    assert run.decider.measurements == []
    assert run.reweight_due(8), "the base model was not measured yet"


def test_the_settings_are_those_of_the_parts(build):
    sampler = build(policy=EVEN, seed=3, rank=1, world_size=2, exhausted={"target": "error"})
    sampler.bind(TRAINED_BY_A_TRAINER)
    settings = sampler._run.settings
    assert (settings.seed, settings.world_size, settings.samples_per_reweight) == (3, 2, 16)
    assert settings.domains == ("source/web", "target/math")
    assert settings.exhausted == ("repeat", "error")
    assert settings.fingerprint == sampler.collection.fingerprint
    assert settings.policy == "static"
    assert settings.loader == TRAINED_BY_A_TRAINER
    assert settings.start_state != build(start_state={"target/math": 1.0})._run.settings.start_state


def test_with_workers_only_the_trainer_knows_what_was_consumed(run):
    fetched_by_workers(run, frontier=8)
    with pytest.raises(StateError, match="pass consumed="):
        run.state_dict(None)
    assert run.state_dict(4)["consumed"] == 4


def test_a_policy_that_nobody_asks_is_warned_of_once_and_not_where_a_trainer_asks(build, run, caplog):
    with caplog.at_level(logging.WARNING):
        run.warn_before_first_decision()
        build()._run.warn_before_first_decision()
        assert caplog.text == ""
        own_loop = build(policy=EVEN)
        assert indices([next(iter(own_loop)), next(iter(own_loop))]) == [0, 1]
    assert len(logged(caplog, "before its first decision")) == 1
