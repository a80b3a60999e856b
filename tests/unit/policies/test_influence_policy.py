"""`InfluencePolicy`: natural without evidence, towards what helps with it, and the same after a restart."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from dmagent_loader.errors import ConfigurationError, DomainError, PolicyError, StateError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.influence import Influence, estimate, grouped, scores_from
from dmagent_loader.policies.influence import InfluencePolicy, noise_quantile
from dmagent_loader.policies.informed import InformedPolicy
from dmagent_loader.policies.question_topics import QuestionTopics

FIELDS = ("general", "math")
SPACE = DomainSpace.canonical()
NATURAL = np.random.default_rng(0).dirichlet(np.full(52, 5.0))


def history(space=SPACE):
    return History(
        domains=space.names,
        fields=FIELDS,
        mixes=np.full((1, len(space)), 1 / len(space)),
        feedback=np.full((1, 2), -3.0),
    )


def influence(values, errors, space=SPACE, by_group=None):
    by_questions = {} if by_group is None else grouped(FIELDS, by_group)
    scores = scores_from(FIELDS, space.names, values, errors)
    return Influence(scores=scores, way="gradient", by_questions=by_questions)


def shares(mix, space=SPACE):
    """The mix inside each field: (fields, domains of the field)."""
    parts = [mix[list(space.members(field))] for field in space.fields]
    return np.array([part / part.sum() for part in parts])


def informed(values, errors, by_group=None, **settings):
    policy = InfluencePolicy(SPACE, NATURAL, **settings)
    policy.inform("influence", influence(values, errors, by_group=by_group))
    return policy


def test_with_noise_alone_it_returns_the_natural_mix():
    """What a rule without errors does here: it trains on whatever domain the noise favours."""
    rng = np.random.default_rng(1)
    moved = 0
    for _ in range(200):
        samples = [rng.normal(size=(2, 4, 8)) for _ in range(52)]
        values, errors, by_group = estimate(samples, [np.full(4, 0.25)] * 2)
        mix = informed(values, errors, by_group).propose(history())
        moved += np.abs(shares(mix) - shares(NATURAL)).max() > 1e-12
        assert mix[list(SPACE.members("target"))].sum() == pytest.approx(0.3)
    assert moved <= 8  # one in a hundred for each of two fields


def test_noise_that_all_domains_share_hides_nothing():
    """Single scores are all but noise here, because the questions' choice moves them together; their order is not."""
    rng = np.random.default_rng(2)
    signal = rng.normal(size=52)
    together = 10 * rng.normal(size=(2, 4, 1))
    samples = [signal[d] + together + 0.3 * rng.normal(size=(2, 4, 8)) for d in range(52)]
    values, errors, by_group = estimate(samples, [np.full(4, 0.25)] * 2)
    assert np.allclose(shares(informed(values, errors).propose(history())), shares(NATURAL))
    ratio = (informed(values, errors, by_group).propose(history()) / NATURAL)[:26]
    assert np.corrcoef(np.log(ratio), signal[:26])[0, 1] > 0.95


def test_a_field_of_noise_does_not_hide_another_of_signal():
    rng = np.random.default_rng(8)
    values = np.stack([rng.normal(size=52), 0.3 * rng.normal(size=52)])
    values[1, :26] = np.linspace(-1, 1, 26)
    errors = np.stack([np.full(52, 3.0), np.full(52, 0.01)])
    ratio = (informed(values, errors).propose(history()) / NATURAL)[:26]
    assert (np.diff(np.log(ratio)) > 0).all()


def test_domains_that_help_get_more_and_those_that_harm_get_less():
    values = np.zeros((2, 52))
    values[0, 3], values[0, 7] = 5.0, -5.0
    mix = informed(values, np.full((2, 52), 0.1)).propose(history())
    before, after = shares(NATURAL)[0], shares(mix)[0]
    assert after[3] > 4 * before[3]
    assert after[7] < before[7] / 4
    np.testing.assert_allclose(shares(mix)[1], shares(NATURAL)[1])  # nothing was measured about the target field
    assert mix.sum() == pytest.approx(1.0)


def test_larger_errors_move_the_mix_less():
    values = np.random.default_rng(2).normal(size=(2, 52))
    distances = [
        np.abs(shares(informed(values, np.full((2, 52), error)).propose(history())) - shares(NATURAL)).sum()
        for error in (0.01, 0.4, 0.6, 2.0)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-12


def test_a_domain_of_large_error_is_moved_less_than_an_equal_one_of_small_error():
    values, errors = np.zeros((2, 52)), np.full((2, 52), 0.1)
    values[0, [4, 5]], errors[0, 5] = 4.0, 2.0
    ratio = informed(values, errors).propose(history()) / NATURAL
    assert ratio[4] > 1.5 * ratio[5] > 1.5 * ratio[6]


def test_scores_do_not_depend_on_the_unit_of_a_field():
    """A field in which all scores are a thousand times larger must not decide alone."""
    values = np.random.default_rng(3).normal(size=(2, 52))
    errors = np.full((2, 52), 0.1)
    scale = np.array([[1.0], [1000.0]])
    one = informed(values, errors).propose(history())
    np.testing.assert_allclose(informed(values * scale, errors * scale).propose(history()), one)


def test_no_domain_comes_more_often_than_the_boost_allows():
    values = np.zeros((2, 52))
    values[:, 5] = 100.0
    mix = informed(values, np.full((2, 52), 0.1), most_boost=3.0).propose(history())
    assert (shares(mix) <= 3 * shares(NATURAL) + 1e-12).all()
    assert mix.sum() == pytest.approx(1.0)


def test_balance_sets_the_weights_of_the_fields():
    values, errors = np.zeros((2, 52)), np.ones((2, 52))
    for balance, target in ((0.6, 0.6), ({"source": 0.9, "target": 0.1}, 0.1), (None, 0.3)):
        mix = informed(values, errors, balance=balance).propose(history())
        assert mix[list(SPACE.members("target"))].sum() == pytest.approx(target)


@pytest.mark.parametrize("field", ["source", "target"])
def test_a_balance_of_a_single_field_is_refused(field):
    """With target domains alone it was accepted, and the weight of the field stayed 1."""
    space = DomainSpace.from_names([f"{field}/a", f"{field}/b"])
    with pytest.raises(DomainError, match=r"balance=0\.4 is the weight of the field 'target', but"):
        InfluencePolicy(space, np.array([0.5, 0.5]), balance=0.4)
    InfluencePolicy(space, np.array([0.5, 0.5]), balance={field: 1.0})


def test_domains_of_any_names_and_fields_will_do():
    space = DomainSpace.from_names(["web", "books", "code"], fields=dict.fromkeys(["web", "books", "code"], "all"))
    natural = np.array([0.5, 0.3, 0.2])
    policy = InfluencePolicy(space, natural, most_boost=None)
    values = np.array([[0.0, 0.0, 9.0], [0.0, 1.0, 9.0]])
    policy.inform("influence", influence(values, np.full((2, 3), 0.01), space))
    mix = policy.propose(history(space))
    assert mix[2] > 0.4
    assert mix.sum() == pytest.approx(1.0)


def test_domains_without_rows_need_no_measurement_and_get_no_weight():
    natural = NATURAL.copy()
    natural[10] = 0
    policy = InfluencePolicy(SPACE, natural / natural.sum())
    names = [name for number, name in enumerate(SPACE.names) if number != 10]
    values = np.random.default_rng(4).normal(size=(2, 51))
    policy.inform("influence", Influence(scores=scores_from(FIELDS, names, values, np.full((2, 51), 0.1)), way="x"))
    assert policy.propose(history())[10] == 0


def test_a_domain_counts_by_its_rows_without_copies():
    values, errors = np.zeros((2, 52)), np.ones((2, 52))
    values[:, 3] = 20.0  # much better than all others
    found = influence(values, errors)
    policies = [InfluencePolicy(SPACE, NATURAL, most_passes=None) for _ in range(2)]
    for policy, copies in zip(policies, (0, 24), strict=True):
        counts = dict.fromkeys(SPACE.names, 32)
        counts[SPACE.names[3]] -= copies
        policy.inform("influence", replace(found, rows=counts, copies={SPACE.names[3]: copies}))
    clean, copied = (policy.propose(history()) for policy in policies)
    assert clean[3] == pytest.approx(12 * NATURAL[3] / NATURAL[:26].sum() * clean[:26].sum())
    assert copied[3] == pytest.approx(clean[3] * 0.25 / (1 - 0.75 * NATURAL[3] / NATURAL[:26].sum()))


def test_it_asks_once_or_as_often_as_it_was_told_and_averages():
    once = informed(np.zeros((2, 52)), np.ones((2, 52)), max_measurements=1)
    assert isinstance(once, InformedPolicy)
    assert once.needed(0) == once.needed(9) == {"length"}
    often = InfluencePolicy(SPACE, NATURAL, every=3, most_passes=None)
    first, second = np.random.default_rng(5).normal(size=(2, 2, 52))
    errors = np.full((2, 52), 0.3)
    for decision in range(5):
        asked = often.needed(decision)
        assert asked == ({"influence"} if decision in (0, 3) else frozenset())
        if asked:
            often.inform("influence", influence(first if decision == 0 else second, errors))
    np.testing.assert_allclose(often.influence.values(), (first + second) / 2)
    np.testing.assert_allclose(often.influence.errors(), errors / np.sqrt(2))


def test_a_failed_first_measurement_is_tried_again_when_the_next_is_due():
    """Memory may be short once; without `every` there is no other attempt."""
    often, once = (InfluencePolicy(SPACE, NATURAL, every=3, most_passes=None), InfluencePolicy(SPACE, NATURAL))
    for policy in (often, once):
        policy.needed(0)
        policy.inform("influence", None)
    restored = InfluencePolicy(SPACE, NATURAL, every=3, most_passes=None)
    restored.load_state_dict(json.loads(json.dumps(often.state_dict())))
    for policy in (often, restored):
        assert [policy.needed(decision) for decision in (0, 1, 2)] == [frozenset()] * 3
        assert policy.needed(3) == {"influence"}
        values, before = np.random.default_rng(5).normal(size=(2, 52)), policy.propose(history())
        policy.inform("influence", influence(values, np.full((2, 52), 0.1)))
        assert np.abs(policy.propose(history()) - before).max() > 0.01
    assert once.needed(80) == {"length"}


def test_a_noisy_measurement_is_repeated_until_it_is_reliable():
    rng = np.random.default_rng(9)
    signal = rng.normal(size=(2, 52))
    policy = InfluencePolicy(SPACE, NATURAL, max_measurements=10, most_passes=None)
    assert policy.reliability() == 0
    asked = 0
    while policy.needed(0):
        policy.inform("influence", influence(signal + rng.normal(size=(2, 52)), np.ones((2, 52))))
        asked += 1
    # Noise of variance 1 beside a signal of variance 1: a mean over four has a reliability of about 0.8.
    assert 3 <= asked <= 7
    assert policy.reliability() >= 0.8
    assert policy.needed(1) == frozenset()


def test_a_measurement_of_noise_is_repeated_a_few_times_only():
    policy = InfluencePolicy(SPACE, NATURAL, most_passes=None)
    rng = np.random.default_rng(10)
    for _ in range(4):
        assert policy.needed(0)
        policy.inform("influence", influence(rng.normal(size=(2, 52)), np.ones((2, 52))))
    assert policy.needed(0) == frozenset()
    again = InfluencePolicy(SPACE, NATURAL, most_passes=None)
    again.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert again.needed(0) == frozenset()


def test_where_there_is_nothing_to_compare_one_measurement_is_enough():
    space = DomainSpace.from_names(["source/all", "target/all"])
    policy = InfluencePolicy(space, np.array([0.6, 0.4]), most_passes=None)
    policy.inform("influence", influence(np.ones((2, 2)), np.ones((2, 2)), space))
    assert policy.needed(0) == frozenset()


def test_a_restored_policy_proposes_the_very_same_mix():
    values = np.random.default_rng(6).normal(size=(2, 52))
    policy = informed(values, np.full((2, 52), 0.1))
    state = json.loads(json.dumps(policy.state_dict()))
    other = InfluencePolicy(SPACE, NATURAL)
    other.load_state_dict(state)
    assert other.needed(1) == {"length"}
    assert np.array_equal(policy.propose(history()), other.propose(history()))


@pytest.mark.parametrize("state", [None, {}, {"measured": [{}], "unavailable": False, "topics": None}])
def test_a_damaged_state_is_refused(state):
    with pytest.raises(StateError, match="damaged"):
        InfluencePolicy(SPACE, NATURAL).load_state_dict(state)


def test_a_proposal_before_any_measurement_says_who_measures():
    with pytest.raises(PolicyError, match="DataMixingCallback"):
        InfluencePolicy(SPACE, NATURAL).propose(history())


def test_a_measurement_that_lacks_domains_is_refused():
    names = SPACE.names[:30]
    part = Influence(scores=scores_from(FIELDS, names, np.zeros((2, 30)), np.ones((2, 30))), way="x")
    with pytest.raises(DomainError, match="was not measured"):
        InfluencePolicy(SPACE, NATURAL).inform("influence", part)


QUESTIONS = {
    "general": ["Which planet orbits the sun in 88 days? Mercury", "What do plants absorb in photosynthesis? Light"]
    * 5,
    "math": ["Solve the quadratic equation x^2 - 4 = 0 for x. x is 2 or -2"] * 5,
}


def test_where_influence_cannot_be_had_the_topics_of_the_questions_decide():
    topics = QuestionTopics(SPACE, NATURAL)
    policy = InfluencePolicy(SPACE, NATURAL, topics=topics)
    assert policy.needed(0) == {"influence", "length"}
    policy.inform("length", None)
    policy.inform("influence", None)
    assert policy.needed(0) == {"questions"}
    policy.inform("questions", QUESTIONS)
    assert policy.needed(0) == frozenset()
    np.testing.assert_allclose(policy.propose(history()), topics.propose(history()))
    restored = InfluencePolicy(SPACE, NATURAL, topics=QuestionTopics(SPACE, NATURAL))
    restored.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert np.array_equal(restored.propose(history()), policy.propose(history()))


def test_without_influence_and_topics_the_mix_is_natural():
    policy = InfluencePolicy(SPACE, NATURAL)
    policy.inform("influence", None)
    np.testing.assert_allclose(shares(policy.propose(history())), shares(NATURAL))


def test_combined_with_topics_it_starts_from_them():
    topics = QuestionTopics(SPACE, NATURAL)
    policy = InfluencePolicy(SPACE, NATURAL, topics=topics, combine=True)
    assert policy.needed(0) == {"influence", "length", "questions"}
    policy.inform("questions", QUESTIONS)
    policy.inform("influence", influence(np.zeros((2, 52)), np.ones((2, 52))))
    np.testing.assert_allclose(policy.propose(history()), topics.propose(history()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "temperature is 0"),
        ({"most_boost": 0.5}, "most_boost is 0.5"),
        ({"balance": 1.5}, "between 0 and 1"),
        ({"every": 0}, "every is 0"),
        ({"combine": True}, "needs topics="),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        InfluencePolicy(SPACE, NATURAL, **settings)


def test_the_quantile_of_noise_is_that_of_chi_squared():
    """From tables: 99% of chi-squared with 1, 5, 25 and 100 degrees of freedom."""
    for degrees, quantile in ((5, 15.086), (25, 44.314), (100, 135.807)):
        assert noise_quantile(degrees) == pytest.approx(quantile / degrees, rel=0.01)


def test_measurements_from_a_state_with_sorted_keys_can_be_averaged():
    """The Trainer sorts the keys of its state, so the fields come back in another order."""
    values, errors = np.random.default_rng(0).normal(size=(2, 52)), np.full((2, 52), 0.1)
    names = ("math", "general")  # not in alphabetical order
    one = Influence(scores=scores_from(names, SPACE.names, values, errors), way="gradient")
    saved = Influence.from_json(json.loads(json.dumps(one.to_json(), sort_keys=True)))
    for mean in (one.averaged([saved]), saved.averaged([one])):
        for name, row in zip(names, values, strict=True):
            np.testing.assert_allclose([mean[name][domain].value for domain in SPACE.names], row)


def test_a_field_of_one_domain_without_signal_keeps_its_weight():
    space = DomainSpace.from_names(["source/web", "target/math"])
    policy = InfluencePolicy(space, np.array([0.5, 0.5]))
    policy.inform("influence", influence(np.zeros((2, 2)), np.zeros((2, 2)), space))
    np.testing.assert_allclose(policy.propose(history(space)), [0.7, 0.3])


def test_a_state_without_the_count_of_slots_is_damaged():
    policy = informed(np.zeros((2, 52)), np.ones((2, 52)))
    for count in (-1, 1.5, "2"):
        with pytest.raises(StateError, match="slots_done"):
            policy.load_state_dict({**policy.state_dict(), "slots_done": count})
