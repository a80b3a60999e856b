"""The interval between decisions: given, or derived once from the length of the run, and kept by a resumed run."""

from __future__ import annotations

import json
import logging

import pytest
from samplers import logged

from dmagent_loader._loading.config import LoaderSettings
from dmagent_loader._run.cadence import FALLBACK_INTERVAL, Cadence
from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.policies import StaticPolicy

EVEN = StaticPolicy({"source/web": 0.5, "target/math": 0.5})
BATCHES_OF_4 = LoaderSettings(batch_size=4, by_trainer=True)
DERIVED = {"policy": EVEN, "samples_per_reweight": None}


def begun(build, limit, **settings):
    """A run after its first decision, which a trainer counts."""
    sampler = build(**{**DERIVED, "exhausted": "repeat", **settings})
    sampler.bind(BATCHES_OF_4, limit=limit)
    sampler.reweight({"general": -2.0}, consumed=0)
    sampler.begin_decisions()
    return sampler


def decided_at(sampler, start, stop):
    """The steps of 4 samples at which a loop decides."""
    found = []
    for consumed in range(start, stop, 4):
        if sampler.reweight_due(consumed):
            found.append(consumed)
            sampler.reweight({"general": -2.0}, consumed=consumed)
    return found


@pytest.mark.parametrize(
    ("decisions", "total", "step", "interval"),
    [
        (80, 80_000, 10, 1000),
        (80, 80_010, 10, 1010),  # evenly spaced and not more than asked for: 80 intervals of 101 steps
        (80, 100, 10, 10),  # fewer steps than decisions: one after every step
        (5, 320, 8, 64),
        (3, 100, 8, 40),  # 13 steps: the last is incomplete
        (1, 100, 10, 100),
        (None, 8_000, 1, 100),
    ],
)
def test_the_interval_spreads_the_decisions_over_whole_steps(decisions, total, step, interval):
    cadence = Cadence(decisions, None)
    cadence.begin(total, step)
    assert cadence.interval == interval
    due = [consumed for consumed in range(0, total, step) if consumed == 0 or consumed % interval == 0]
    assert len(due) <= (decisions or 80)


def test_a_run_decides_as_often_as_asked(build):
    assert decided_at(begun(build, 400, decisions=5), 4, 400) == [80, 160, 240, 320]
    assert len(decided_at(begun(build, 400), 4, 400)) == 49  # 100 steps: every second one, 50 decisions with the first


def test_the_length_is_taken_after_the_first_decision(build):
    """Under the initial mix the data would last for 120 samples; the policy takes 80% target, so they last for 75."""
    policy = StaticPolicy({"source/web": 0.2, "target/math": 0.8})
    sampler = begun(build, None, policy=policy, exhausted=None, decisions=6)
    assert sampler.total_samples == sampler.end == pytest.approx(75, abs=2)
    assert sampler.samples_per_reweight == 16  # 19 steps of 4


def test_an_attempt_with_a_smaller_batch_spreads_the_decisions_anew(build):
    """`auto_find_batch_size` keeps max_steps: with the interval of the first attempt, a run would hardly decide."""
    sampler = begun(build, 400, decisions=10)
    assert sampler.samples_per_reweight == 40
    sampler.bind(LoaderSettings(batch_size=1, by_trainer=True), limit=100)
    sampler.begin_decisions()
    assert sampler.samples_per_reweight == 10
    sampler.reweight({"general": -2.0}, consumed=10)
    sampler.bind(BATCHES_OF_4, limit=400)
    sampler.begin_decisions()
    assert sampler.samples_per_reweight == 10  # later decisions keep the interval of those before


def test_both_settings_are_refused(build):
    with pytest.raises(ConfigurationError, match=r"decisions=80 and samples_per_reweight=64 both.*leave one out"):
        build(decisions=80, samples_per_reweight=64)
    with pytest.raises(ConfigurationError, match="decisions is 0"):
        build(decisions=0, samples_per_reweight=None)


def test_the_number_of_decisions_is_logged(build, caplog):
    with caplog.at_level(logging.INFO):
        begun(build, 400, decisions=10)
    assert logged(
        caplog, "10 decisions in this run of 400 samples: one before the first sample, then one after every 40"
    )
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("settings", "limit", "remedy"),
    [
        ({"samples_per_reweight": 64_000}, 320, "only 1 decision(s).*pass decisions=80"),
        ({"samples_per_reweight": 100}, 400, "only 4 decision(s).*pass decisions=80"),
        ({}, 12, "only 3 decision(s).*only 3 steps of 4 samples"),
        ({}, None, "length of this run is unknown.*every 64000 samples"),
    ],
)
def test_few_decisions_and_an_unknown_length_are_warned_of(build, caplog, settings, limit, remedy):
    begun(build, limit, **settings)
    first, _, second = remedy.partition(".*")
    assert any(second in message for message in logged(caplog, first)), caplog.text


def test_few_decisions_that_were_asked_for_and_an_interval_of_an_endless_run_are_not_warned_of(build, caplog):
    begun(build, 400, decisions=1)
    begun(build, None, samples_per_reweight=64)
    begun(build, 500, samples_per_reweight=100)
    assert caplog.text == ""


def test_an_unknown_length_gives_the_interval_of_the_paper(build):
    assert begun(build, None).samples_per_reweight == FALLBACK_INTERVAL == 64_000


def test_in_a_loop_of_ones_own_the_first_question_after_the_first_decision_derives_it(build):
    sampler = build(**DERIVED, decisions=10)
    assert sampler.samples_per_reweight is None
    assert sampler.reweight_due(0)
    sampler.reweight({"general": -2.0}, consumed=0)
    list(zip(range(4), sampler, strict=False))
    assert not sampler.reweight_due(4)
    assert sampler.samples_per_reweight == -(-sampler.end // 10)


def test_a_resumed_run_keeps_the_interval_whatever_its_length(build, caplog):
    """Derived anew, the interval would put the decisions of the resumed run elsewhere than those before it."""
    first = begun(build, 400, decisions=5)
    decided_at(first, 4, 100)
    state = json.loads(json.dumps(first.state_dict(consumed=100)))
    assert state["samples_per_reweight"] == 80
    resumed = build(**DERIVED, exhausted="repeat", decisions=5)
    resumed.bind(BATCHES_OF_4, limit=4000)
    with caplog.at_level(logging.INFO):
        resumed.load_state_dict(state)
        resumed.begin_decisions()
    assert resumed.samples_per_reweight == 80
    assert decided_at(resumed, 104, 400) == decided_at(first, 104, 400) == [160, 240, 320]
    assert logged(
        caplog, "the saved run decides after every 80 samples, and this run keeps that interval: 50 decisions"
    )
    assert logged(caplog, "decisions=5 has no effect, pass samples_per_reweight=800 instead")
    assert not logged(caplog, "decisions will differ")


def test_a_resume_that_makes_the_decisions_asked_for_is_not_warned_of(caplog):
    """The length of a run that ends with its data depends on the mix: 960 samples at the start, 930 at the resume."""
    saved = Cadence(decisions=6, samples_per_reweight=None)
    saved.begin(960, 2)
    assert saved.interval == 160
    for total, warnings in ((930, 0), (800, 1)):
        resumed = Cadence(decisions=6, samples_per_reweight=None)
        resumed.restore(saved.interval)
        caplog.clear()
        resumed.begin(total, 2)
        assert sum("decisions=6 has no effect" in record.message for record in caplog.records) == warnings
        assert resumed.interval == 160


@pytest.mark.parametrize(("decisions", "warnings"), [(None, 0), (5, 0), (50, 1)])
def test_a_number_of_decisions_that_a_resume_cannot_give_is_warned_of(build, caplog, decisions, warnings):
    state = begun(build, 400, decisions=5).state_dict(consumed=0)
    resumed = build(**DERIVED, exhausted="repeat", decisions=decisions)
    resumed.load_state_dict(state)
    resumed.bind(BATCHES_OF_4, limit=400)
    caplog.clear()
    resumed.begin_decisions()
    assert resumed.samples_per_reweight == 80
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == warnings


def test_an_interval_that_is_set_at_a_resume_replaces_the_saved_one_with_a_warning(build, caplog):
    state = begun(build, 400, decisions=5).state_dict(consumed=0)
    resumed = build(policy=EVEN, exhausted="repeat", samples_per_reweight=20)
    resumed.load_state_dict(state)
    assert resumed.samples_per_reweight == 20
    assert logged(caplog, "samples_per_reweight 80, but this run has 20: decisions will differ")


def test_a_state_from_before_the_first_decision_leaves_the_interval_open(build):
    state = build(**DERIVED, exhausted="repeat").state_dict(consumed=0)
    assert state["samples_per_reweight"] is None
    resumed = build(**DERIVED, exhausted="repeat", decisions=4)
    resumed.load_state_dict(state)
    resumed.bind(BATCHES_OF_4, limit=160)
    resumed.reweight({"general": -2.0}, consumed=0)
    resumed.begin_decisions()
    assert resumed.samples_per_reweight == 40


@pytest.mark.parametrize("value", [0, -1, "16", 1.5, True])
def test_a_saved_interval_that_is_no_count_is_refused(build, value):
    state = {**begun(build, 400).state_dict(consumed=0), "samples_per_reweight": value}
    with pytest.raises(StateError, match=r"samples_per_reweight is .* it is damaged"):
        build(**DERIVED, exhausted="repeat").load_state_dict(state)
