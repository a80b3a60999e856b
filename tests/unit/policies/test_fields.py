"""What names tell: which field is kept, and whether the topics of the domains are known."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.agent.plus.network import PlusNetwork
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.policies import AgentPolicy, InfluencePolicy, PlusPolicy, QuestionTopics

SPACE = DomainSpace.from_names(
    ["source/general_web", "source/Science", "target/mathematics", "target/Finance"],
    compositions={"target/mathematics": {"Science": 1.0}},
)
NATURAL = np.full(4, 0.25)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.fixture(scope="module")
def agent() -> MixingAgent:
    return MixingAgent(AgentConfig(d_model=8, num_heads=1, d_ff=8), name="three")


@pytest.fixture
def policy(agent: MixingAgent, caplog: pytest.LogCaptureFixture) -> AgentPolicy:
    policy = AgentPolicy(agent, SPACE)
    caplog.clear()
    return policy


def test_the_roles_of_the_fields_are_logged_once(policy: AgentPolicy, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        policy.check_fields(["general", "math"])
        policy.check_fields(["general", "math"])
    assert [r.getMessage() for r in caplog.records] == [
        "agent 'three' keeps the field 'general' of the environment and acquires 'math'"
    ]


@pytest.mark.parametrize(
    ("fields", "misplaced"),
    [
        (["math", "mmlu"], ["'math'"]),
        (["arc", "general"], ["'general'"]),
        (["math", "general"], ["'math'", "'general'"]),
        (["target", "source"], ["'target'", "'source'"]),
        (["mathematics-hard", "qa"], ["'mathematics-hard'"]),
    ],
)
def test_fields_named_like_the_domains_of_the_other_side_are_warned_of(
    policy: AgentPolicy, fields: list[str], misplaced: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A configuration with sorted names exchanges the roles: the agent would keep math and acquire the rest."""
    policy.check_fields(fields)
    (warning,) = warnings(caplog)
    assert all(f"{field}, the field to" in warning for field in misplaced)
    assert warning.count("the field to") == len(misplaced)
    assert f"DecisionConfig(roles={{'keep': '{fields[1]}', 'acquire': '{fields[0]}'}})" in warning


@pytest.mark.parametrize("fields", [["general", "math"], ["mmlu", "gsm8k"], ["web", "mathe"], ["ma", "ge"]])
def test_other_names_are_not_warned_of(
    policy: AgentPolicy, fields: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    policy.check_fields(fields)
    assert not warnings(caplog)


def test_a_name_on_both_sides_says_nothing(agent: MixingAgent, caplog: pytest.LogCaptureFixture) -> None:
    policy = AgentPolicy(agent, DomainSpace.from_names(["source/math", "target/math"]))
    policy.check_fields(["math", "code"])
    assert not warnings(caplog)


def test_roles_by_name_are_logged_but_not_doubted(agent: MixingAgent, caplog: pytest.LogCaptureFixture) -> None:
    policy = AgentPolicy(agent, SPACE, roles={"keep": "math", "acquire": "general"})
    caplog.clear()
    with caplog.at_level(logging.INFO):
        policy.check_fields(["general", "math", "law"])
    assert "keeps the field 'math' of the environment and acquires 'general'" in caplog.text
    assert not warnings(caplog)


def test_one_field_for_both_roles_is_warned_of(agent: MixingAgent, caplog: pytest.LogCaptureFixture) -> None:
    """A slip: what the model should keep was weighed with itself."""
    same = {"keep": "math", "acquire": "math"}
    plus = PlusPolicy(PlusNetwork.untrained(), SPACE, NATURAL, roles=same)
    for policy in (AgentPolicy(agent, SPACE, roles=same), plus):
        caplog.clear()
        policy.check_fields(["general", "math"])
        assert ["are the field 'math', so it has nothing to weigh" in text for text in warnings(caplog)] == [True]


def test_question_topics_tell_and_warn_as_well(caplog: pytest.LogCaptureFixture) -> None:
    """Their first field decides on the source domains, and the last on the target domains."""
    QuestionTopics(SPACE, NATURAL).check_fields(["math", "law", "general"])
    topics, swapped = warnings(caplog)
    assert "the topics of ['source/general_web'] are unknown" in topics
    assert "'math', the field to keep" in swapped
    assert "list the field to keep first" in swapped
    caplog.clear()
    QuestionTopics(SPACE, NATURAL).report_roles(["math"])
    assert not caplog.records


def test_question_topics_without_any_topic_are_said_to_be_without_effect(caplog: pytest.LogCaptureFixture) -> None:
    space = DomainSpace.from_names(["source/web", "source/wiki", "target/math"])
    QuestionTopics(space, np.full(3, 1 / 3)).check_fields(["general", "math"])
    (warning,) = warnings(caplog)
    assert "['source/web', 'source/wiki'] are unknown, so policy 'question-topics' sets only the total" in warning


@pytest.mark.parametrize("combine", [True, False])
def test_influence_tells_the_roles_if_it_combines_topics(combine: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Influence on all fields counts alike; only the topics treat them differently."""
    topics = QuestionTopics(SPACE, NATURAL)
    InfluencePolicy(SPACE, NATURAL, topics=topics, combine=combine).check_fields(["math", "general"])
    assert len(warnings(caplog)) == combine


def test_influence_refuses_weights_of_other_fields_before_training() -> None:
    policy = InfluencePolicy(SPACE, NATURAL, field_weights={"general": 1.0})
    with pytest.raises(ConfigurationError, match=r"field_weights names \['general'\], .* \['general', 'math'\]"):
        policy.check_fields(["general", "math"])
