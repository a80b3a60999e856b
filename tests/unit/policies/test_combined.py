"""`CombinedPolicy`: fields from one policy, shares inside the fields from another, and evidence to whom it concerns."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dmagent_loader.agent import MixingAgent
from dmagent_loader.errors import CheckpointError, ConfigurationError, DomainError, PolicyError, StateError
from dmagent_loader.mixture import RunLength
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.influence import Influence, scores_from
from dmagent_loader.policies import (
    AgentPolicy,
    CombinedPolicy,
    InfluencePolicy,
    InformedPolicy,
    QuestionTopics,
    StaticPolicy,
    make_policy,
)
from dmagent_loader.policies.base import answers_directly

SPACE = DomainSpace.from_names(["source/Science", "source/Sports", "target/Finance", "target/Health"])
NATURAL = np.array([0.4, 0.2, 0.3, 0.1])
QUESTIONS = {
    "general": ["Which planet orbits the sun in 88 days? Mercury"] * 5,
    "math": ["A bank pays 5 percent interest on 100 dollars. How much? 5 dollars"] * 5,
}


def measured(values, space=SPACE, fields=("general", "math")):
    errors = np.full((len(fields), len(space)), 1e-3)
    return Influence(scores=scores_from(fields, space.names, np.array(values), errors), way="gradient")


HELPFUL = measured([[3.0, -3.0, 0.1, 0.2], [0.2, 0.1, -4.0, 4.0]])


def informed(name="influence"):
    policy = make_policy(MixingAgent.from_pretrained("dmagent-rl"), None, SPACE, NATURAL, topics=name)
    assert isinstance(policy, CombinedPolicy)
    for need in sorted(policy.needed(0)):
        policy.inform(need, {"influence": HELPFUL, "length": None, "questions": QUESTIONS}[need])
    assert policy.needed(0) == frozenset()
    return policy


@pytest.mark.parametrize("name", ["influence", "question-topics"])
def test_the_agent_sets_the_fields_and_the_other_policy_the_shares_inside(name, make_history):
    policy = informed(name)
    agent, topics = policy.parts
    assert policy.name == f"dmagent-rl+{name}"
    assert isinstance(agent, AgentPolicy)
    masses = []
    for steps in (1, 8, 30):
        history = make_history(SPACE.names, steps)
        mix, of_agent, of_topics = policy.propose(history), agent.propose(history), topics.propose(history)
        assert mix.sum() == pytest.approx(1)
        for members in ([0, 1], [2, 3]):
            assert mix[members].sum() == pytest.approx(of_agent[members].sum())
            np.testing.assert_allclose(mix[members] / mix[members].sum(), of_topics[members] / of_topics[members].sum())
        masses.append(mix[2:].sum())
    assert np.ptp(masses) > 1e-3  # the agent reacts to feedback
    assert not np.allclose(of_agent[:2] / of_agent[:2].sum(), of_topics[:2] / of_topics[:2].sum(), atol=0.01)


def test_where_the_inner_policy_gives_a_field_nothing_the_shares_of_the_outer_remain(make_history):
    policy = CombinedPolicy(StaticPolicy([0.3, 0.3, 0.1, 0.3]), StaticPolicy([0.9, 0.1, 0.0, 0.0]), SPACE)
    np.testing.assert_allclose(policy.propose(make_history(SPACE.names)), [0.54, 0.06, 0.1, 0.3])


def test_the_limit_on_passes_holds_for_the_combined_mix(make_history):
    """Under the inner policy's own weight of the target field, 0.3, the limit would be kept; the other sets 0.8."""
    inner = InfluencePolicy(SPACE, np.array([0.4, 0.2, 0.2, 0.2]), most_passes=4)
    policy = CombinedPolicy(StaticPolicy([0.1, 0.1, 0.4, 0.4]), inner, SPACE)
    rows = np.array([4000, 4000, 3000, 1000])
    length = RunLength(rows=rows, repeats=np.full(4, True), limit=10_000, ending=())
    evidence = {"influence": HELPFUL, "length": length}
    for need in policy.needed(0):
        policy.inform(need, evidence[need])
    history = make_history(SPACE.names)
    assert (inner.propose(history) * 10_000 / rows).max() <= 4.0 + 1e-9
    mix = policy.propose(history)
    assert mix[2:].sum() == pytest.approx(0.8)
    assert mix[3] == pytest.approx(4 * 1000 / 10_000)


@pytest.mark.parametrize("name", ["influence", "question-topics"])
def test_a_restored_policy_proposes_the_very_same_mix(name, make_history):
    policy = informed(name)
    restored = make_policy("dmagent-rl", None, SPACE, NATURAL, topics=name)
    assert isinstance(restored, InformedPolicy)
    restored.load_state_dict(json.loads(json.dumps(policy.state_dict(), sort_keys=True)))
    assert restored.needed(5) == {"length"}  # asked for before each decision, and not saved
    for steps in (1, 12):
        history = make_history(SPACE.names, steps)
        assert np.array_equal(restored.propose(history), policy.propose(history))


@pytest.mark.parametrize("state", [None, {}, {"fields": {}}, {"within": {}}, {"within": {}, "fields": {}}])
def test_a_damaged_state_is_refused(state):
    with pytest.raises(StateError, match="is damaged or of another policy"):
        informed().load_state_dict(state)


def test_each_part_receives_what_it_has_requested_and_no_more():
    """Passing all evidence to both parts would let the one that measures less often average measurements twice."""
    often, rarely = (InfluencePolicy(SPACE, NATURAL, every=every, most_passes=None) for every in (2, 4))
    policy = CombinedPolicy(often, rarely, SPACE)
    for decision in range(6):
        if policy.needed(decision):
            policy.inform("influence", HELPFUL)
    assert len(often.state_dict()["measured"]) == 3
    assert len(rarely.state_dict()["measured"]) == 2
    with pytest.raises(PolicyError, match="received 'influence', which neither part requested"):
        policy.inform("influence", HELPFUL)


def test_without_influence_the_topics_of_the_questions_decide_inside_the_fields(make_history):
    """Where influence is unavailable, the inner policy requests the questions next: the combination passes that on."""
    space = DomainSpace.from_names(["source/a", "source/b", "target/c"])
    policy = make_policy("dmagent-rl", None, space, np.array([0.4, 0.2, 0.4]), topics="influence")
    assert isinstance(policy, CombinedPolicy)
    assert policy.needs == {"influence", "length", "questions"}
    assert policy.needed(0) == {"influence", "length"}
    policy.inform("length", None)
    policy.inform("influence", None)
    assert policy.needed(0) == {"questions"}
    policy.inform("questions", QUESTIONS)
    mix = policy.propose(make_history(space.names))
    assert mix[0] / mix[1] == pytest.approx(2)  # unknown topics: rows split the field


def test_it_answers_directly_only_if_both_parts_do():
    """Otherwise a user's policy that hangs would escape the guard's time limit inside a combination."""

    class Slow:
        name = "slow"

        def propose(self, history):
            return NATURAL

    static = StaticPolicy(NATURAL)
    assert answers_directly(CombinedPolicy(static, static, SPACE))
    assert answers_directly(informed())
    assert not answers_directly(CombinedPolicy(static, Slow(), SPACE))
    assert not answers_directly(CombinedPolicy(CombinedPolicy(Slow(), static, SPACE), static, SPACE))


@pytest.mark.parametrize(
    ("agent", "policy", "topics", "error", "message"),
    [
        (None, None, "influence", ConfigurationError, "topics='influence' replaces an agent's choice of domains"),
        (None, "influence", "influence", ConfigurationError, "pass this policy as policy="),
        ("dmagent-rl", None, "themes", ConfigurationError, "no policy named 'themes': choose 'influence', "),
        ("dmagent-rl", None, 3, ConfigurationError, "topics is 3; it must be 'influence', 'question-topics', "),
        ("dmagent-rl", None, StaticPolicy, ConfigurationError, "topics is .*, which cannot be called with the dom"),
        ("dmagent-rl", "influence", "influence", ConfigurationError, "both agent and policy were given"),
        ("no-such-agent", None, "influence", CheckpointError, "no-such-agent"),
    ],
)
def test_settings_that_cannot_work_are_refused(agent, policy, topics, error, message):
    with pytest.raises(error, match=message):
        make_policy(agent, policy, SPACE, NATURAL, topics=topics)


def test_a_policy_of_other_domains_is_refused(make_history):
    policy = CombinedPolicy(StaticPolicy(NATURAL), QuestionTopics(SPACE, NATURAL), SPACE)
    policy.inform("questions", QUESTIONS)
    with pytest.raises(DomainError, match="but this policy was built for"):
        policy.propose(make_history(["a", "b", "c", "d"]))

    class Short:
        name = "short"

        def propose(self, history):
            return [0.5, 0.5]

    with pytest.raises(PolicyError, match=r"policy 'short' returned shape \(2,\), but there are 4 domains"):
        CombinedPolicy(StaticPolicy(NATURAL), Short(), SPACE).propose(make_history(SPACE.names))
