"""The limit on passes over a domain: kept where the run's length is known, and never at the cost of another field."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from samplers import logged

from dmagent_loader.errors import ConfigurationError, PolicyError
from dmagent_loader.mixture import Plan, RunLength
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.influence import Influence, scores_from
from dmagent_loader.policies import InfluencePolicy, QuestionTopics
from dmagent_loader.policies.passes import PassLimit

SPACE = DomainSpace.from_names(["source/web", "source/books", "source/wiki", "target/math"])
ROWS = np.array([700, 200, 100, 1000])


def length(limit, repeats=(True, True, True, True), ending=()):
    return RunLength(rows=ROWS, repeats=np.array(repeats), limit=limit, ending=ending)


def limited(mix, run_length, most=4.0):
    limit = PassLimit(SPACE, most)
    limit.inform(run_length)
    return limit.limited(np.array(mix))


def test_weight_above_the_limit_goes_to_the_rest_of_the_field():
    """2,000 samples: 4 passes over the 100 rows of wiki are a weight of 0.2."""
    mix = limited([0.1, 0.1, 0.5, 0.3], length(2000))
    np.testing.assert_allclose(mix, [0.25, 0.25, 0.2, 0.3])
    np.testing.assert_allclose(mix * 2000 / ROWS, [0.714, 2.5, 4.0, 0.6], atol=1e-3)


def test_a_domain_that_reaches_the_limit_by_what_it_is_given_passes_it_on():
    mix = limited([0.05, 0.25, 0.4, 0.3], length(4000))
    np.testing.assert_allclose(mix, [0.4, 0.2, 0.1, 0.3])


def test_a_mix_within_the_limit_is_left_alone():
    mix = np.array([0.1, 0.1, 0.2, 0.6])
    assert limited(mix, length(2000)) is not mix
    np.testing.assert_array_equal(limited(mix, length(2000)), mix)


def test_a_field_that_is_too_small_keeps_its_share_and_is_warned_of_once(caplog):
    limit = PassLimit(SPACE, 4.0)
    limit.inform(length(20_000))
    for _ in range(2):
        mix = limit.limited(np.array([0.1, 0.1, 0.5, 0.3]))
    np.testing.assert_allclose(mix, [0.49, 0.14, 0.07, 0.3])
    assert len(logged(caplog, "field 'source' makes 14.0 passes over its 1000 rows, more than most_passes=4")) == 1
    assert len(logged(caplog, "field 'target' makes 6.0 passes")) == 1


@pytest.mark.parametrize("unknown", [length(None), None])
def test_without_a_known_length_nothing_is_limited(unknown, caplog):
    mix = [0.0, 0.0, 0.9, 0.1]
    with caplog.at_level(logging.INFO):
        np.testing.assert_array_equal(limited(mix, unknown), mix)
    assert len(logged(caplog, "most_passes=4 limits nothing")) == (unknown is not None)
    np.testing.assert_array_equal(limited(mix, length(10**9), most=None), mix)


def test_domains_that_are_read_once_need_no_limit():
    """A used-up domain hands its weight on, so it cannot be read more often."""
    once = length(2000, repeats=(True, True, False, True))
    np.testing.assert_allclose(limited([0.1, 0.1, 0.5, 0.3], once), [0.1, 0.1, 0.5, 0.3])


def test_data_that_end_the_run_shorten_it():
    """1,000 rows of target at a weight of 0.5 end the run after 2,000 samples, long before the trainer would."""
    ending = length(100_000, repeats=(True, True, True, False), ending=((3,),))
    assert ending.samples(np.array([0.2, 0.2, 0.1, 0.5])) == 2000
    np.testing.assert_allclose(limited([0.1, 0.1, 0.3, 0.5], ending), [0.15, 0.15, 0.2, 0.5])


@pytest.mark.parametrize(
    ("exhausted", "ending"),
    [
        (None, ((3,),)),
        ("repeat", ()),
        ("redistribute", ()),
        ({"target/math": "repeat"}, ()),
        ("stop", ((0, 1, 2), (3,))),
    ],
)
def test_the_plan_names_the_fields_that_end_a_run(exhausted, ending):
    plan = Plan(SPACE, [np.array([rows]) for rows in ROWS], seed=0, exhausted=exhausted)
    found = plan.run_length(7)
    assert (found.ending, found.limit, found.rows.tolist()) == (ending, 7, ROWS.tolist())
    assert found.repeats.tolist() == [rule == "repeat" for rule in plan.rules]


@pytest.mark.parametrize("value", [0, -1.0, "4", float("inf"), True])
def test_a_limit_that_is_no_number_is_refused(value):
    with pytest.raises(ConfigurationError, match="most_passes is"):
        PassLimit(SPACE, value)


def test_both_policies_ask_for_the_length_before_each_decision_and_keep_the_limit():
    history = History(
        domains=SPACE.names, fields=("general", "math"), mixes=np.full((1, 4), 0.25), feedback=np.full((1, 2), -3.0)
    )
    influence = InfluencePolicy(SPACE, ROWS / ROWS.sum())
    values = np.array([[0.0, 0.0, 9.0, 0.0], [0.0, 0.0, 0.0, 9.0]])
    scores = scores_from(("a", "b"), SPACE.names, values, np.full((2, 4), 0.1))
    influence.inform("influence", Influence(scores=scores, way="gradient"))
    topics = QuestionTopics(SPACE, ROWS / ROWS.sum())
    topics.inform("questions", {"general": ["who wrote it?"], "math": ["1 + 1 ="]})
    for policy in (influence, topics):
        free = policy.propose(history)
        for decision in (0, 1):
            assert policy.needed(decision) == {"length"}
            policy.inform("length", length(5000))
            assert policy.needed(decision) == frozenset()
        mix = policy.propose(history)
        assert mix.sum() == pytest.approx(1.0)
        assert (mix * 5000 <= 4 * ROWS + 1e-6).all()
        np.testing.assert_allclose(mix[3], free[3])
        with pytest.raises(PolicyError, match="run_length"):
            policy.inform("length", 5000)
    bounded = influence.propose(history)[2]
    influence.inform("length", None)
    assert influence.propose(history)[2] > 2 * bounded
