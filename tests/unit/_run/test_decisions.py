"""A decision rests on the feedback so far and the samples trained on, and changes nothing until it is accepted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from samplers import logged

from dmagent_loader import DecisionConfig
from dmagent_loader._run.decisions import Decider, Measurement, measurements_from_json
from dmagent_loader.errors import ConfigurationError, FeedbackError, StateError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.ledger import LedgerEntry
from dmagent_loader.mixture.plan import Plan
from dmagent_loader.policies import GuardConfig, StaticPolicy

EVEN = StaticPolicy([0.5, 0.5])
START = np.array([1.0, 0.0])


class Fails:
    name = "fails"

    def propose(self, history):
        raise RuntimeError("out of ideas")


@pytest.fixture
def make() -> Callable[..., Decider]:
    def make(policy: Any = EVEN, **config: Any) -> Decider:
        plan = Plan(DomainSpace.from_names(["source/web", "target/math"]), [np.array([90]), np.array([90])], seed=0)
        plan.append(LedgerEntry(start=0, mix=(0.75, 0.25), decided_by="initial", decided_at=0))
        return Decider.configured(DecisionConfig(**config), policy, plan, START)

    return make


def step(decider: Decider, consumed: int, **feedback: float) -> LedgerEntry:
    """One reweighting step, as the run does it."""
    decision = decider.decide(feedback or {"general": -2.0}, consumed)
    mix = tuple(decision.outcome.mix.tolist())
    entry = LedgerEntry(start=consumed, mix=mix, decided_by=decision.policy, decided_at=consumed)
    decider.plan.append(entry)
    decider.accept(decision, entry)
    return entry


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"shadow": "no"}, "shadow is 'no'"),
        ({"history_mix": "asked"}, "history_mix is 'asked'"),
        ({"guard": {"floor": 0.1}}, "guard is"),
        ({"roles": ["general", "math"]}, "roles is ['general', 'math']; it must map each role"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_refuses_values_of_another_type_by_name(setting, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        DecisionConfig(**setting)


def test_settings_without_anybody_who_decides_are_refused(make):
    assert make(policy=None).policy_name is None
    for config in ({"shadow": True}, {"guard": GuardConfig(max_change=0.1)}):
        with pytest.raises(ConfigurationError, match="neither agent nor policy, so it would have no effect"):
            make(policy=None, **config)


def test_deciding_changes_nothing_and_accepting_records_the_step(make):
    """Where no new mix can hold, the decision is still due: catches feedback that is recorded with the question."""
    decider = make()
    for _ in range(2):
        decision = decider.decide({"general": -2.0, "math": -3.0}, 0)
        assert (decider.measurements, decider.fields, len(decider.plan.ledger)) == ([], (), 1)
    assert decision.proposed == {"source/web": 0.5, "target/math": 0.5}
    assert decision.entry is None
    accepted = decider.accept(decision, LedgerEntry(start=8, mix=(0.5, 0.5), decided_by="static", decided_at=0))
    assert decider.measurements == [Measurement(0, {"general": -2.0, "math": -3.0})]
    assert decider.fields == ("general", "math")
    assert accepted.in_force
    assert (accepted.staleness, accepted.failures, accepted.notes) == (8, 0, ())


def test_a_policy_that_fails_is_counted_and_the_last_mix_is_kept(make):
    decider = make(policy=Fails())
    decision = decider.decide({"general": -2.0}, 0)
    assert decision.proposed == {"source/web": 0.75, "target/math": 0.25}
    assert not decision.in_force
    assert len(decision.notes) == 1
    assert "out of ideas" in decision.notes[0]
    step(decider, 4)
    assert decider.accept(decider.decide({"general": -2.0}, 8), decider.plan.ledger.last).failures == 2


def test_in_shadow_mode_no_sample_is_trained_on_late(make):
    decider = make(shadow=True)
    accepted = decider.accept(decider.decide({"general": -2.0}, 12), decider.plan.ledger.last)
    assert accepted.outcome.accepted
    assert not accepted.in_force
    assert accepted.staleness == 0


def test_the_guard_is_between_the_policy_and_the_mix(make):
    decision = make(policy=StaticPolicy([0.0, 1.0]), guard=GuardConfig(max_change=0.25)).decide({"general": -2.0}, 0)
    assert decision.proposed == {"source/web": 0.5, "target/math": 0.5}
    assert decision.notes == ("change of 0.75 cut to 0.25",)


@pytest.mark.parametrize(
    ("kind", "mixes"),
    [("achieved", [[1.0, 0.0], [0.5, 0.5], [2 / 3, 1 / 3]]), ("requested", [[1.0, 0.0], [0.5, 0.5], [0.75, 0.25]])],
)
def test_the_history_holds_the_mixes_that_were_asked_for_or_came(make, kind, mixes):
    """3 samples at 3 : 1 cannot be in that mix."""
    decider = make(history_mix=kind)
    step(decider, 0, general=-2.0, math=-3.0)
    step(decider, 10, general=-2.5, math=-2.5)
    decider.plan.append(LedgerEntry(start=10, mix=(0.75, 0.25), decided_by="manual", decided_at=10))
    history = decider.history(Measurement(13, {"math": -2.0, "general": -2.75}))
    np.testing.assert_allclose(history.mixes, mixes)
    assert history.fields == ("general", "math")
    assert history.feedback.tolist() == [[-2.0, -3.0], [-2.5, -2.5], [-2.75, -2.0]]
    assert len(decider.history()) == 2, "the newest feedback was looked at, not recorded"


@pytest.mark.parametrize(
    ("feedback", "consumed", "error", "message"),
    [
        ([-2.0], 8, FeedbackError, "must map each field to a number"),
        ({}, 8, FeedbackError, "the feedback is empty"),
        ({"general": float("inf")}, 8, FeedbackError, "not finite"),
        ({"general": -2.0, "math": -3.0}, 8, FeedbackError, "this run's fields are"),
        ({"general": -2.0}, 4, ConfigurationError, "train between two reweighting steps"),
        ({"general": -2.0}, 3, ConfigurationError, "after 3 consumed samples follows feedback after 4"),
    ],
)
def test_feedback_that_cannot_follow_is_refused(make, feedback, consumed, error, message):
    decider = make()
    step(decider, 4)
    with pytest.raises(error, match=message):
        decider.decide(feedback, consumed)
    assert len(decider.measurements) == 1


def test_losses_are_warned_of_once_at_the_first_step(make, caplog):
    decider = make()
    step(decider, 0, general=2.0)
    step(decider, 4, general=1.9)
    assert len(logged(caplog, "pass -loss")) == 1


def test_feedback_comes_back_in_the_environments_order(make):
    """JSON objects may be sorted on the way, and an agent's roles go by the order."""
    decider = make()
    step(decider, 0, general=-2.0, code=-3.0)
    step(decider, 8, general=-2.5, code=-2.75)
    saved = json.loads(json.dumps(decider.to_json(), sort_keys=True))
    assert list(saved[0]["feedback"]) == ["code", "general"]
    restored = measurements_from_json(saved, list(decider.fields), consumed=8)
    assert restored == decider.measurements
    assert restored[0].fields == ("general", "code")
    with pytest.raises(StateError, match="entry 1 of the saved feedback is at sample 8, after an entry at sample 0"):
        measurements_from_json(saved, ["general", "code"], consumed=7)


def test_after_a_restore_the_history_is_that_of_the_restored_plan(make):
    """Catches counts of the old plan that are remembered."""
    decider, other = make(), make(policy=StaticPolicy([0.25, 0.75]))
    for consumed in (0, 8, 16):
        step(decider, consumed)
        step(other, consumed)
    assert not np.array_equal(decider.history().mixes, other.history().mixes)
    decider.restore(other.plan, START, list(other.measurements), failures=3)
    np.testing.assert_array_equal(decider.history().mixes, other.history().mixes)
    assert decider.failures == 3
