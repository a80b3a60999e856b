"""The agent over a user's own domains."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.errors import ConfigurationError, DomainError, MixError
from dmagent_loader.labelling.linear import LinearClassifier
from dmagent_loader.mixture.domains import CANONICAL_TOPICS, DomainSpace
from dmagent_loader.mixture.history import FeedbackStatistics, History
from dmagent_loader.mixture.simplex import total_variation
from dmagent_loader.policies import AgentPolicy, Policy, make_policy
from dmagent_loader.policies.fields import report_topics

MakeHistory = Callable[..., History]
TWO = DomainSpace.from_names(["source/web", "target/math"])


@pytest.fixture(scope="module")
def agent() -> MixingAgent:
    torch.manual_seed(3)
    statistics = FeedbackStatistics(mean=(-5.0, -4.0), std=(0.1, 0.5), count=10)
    agent = MixingAgent(AgentConfig(d_model=64, num_heads=2, d_ff=128, statistics=statistics), name="three")
    with torch.no_grad():
        for parameter in agent.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
    return agent


def test_over_the_canonical_domains_it_is_the_agent_itself(agent: MixingAgent, make_history: MakeHistory) -> None:
    history = make_history(DomainSpace.canonical().names, 6)
    policy = AgentPolicy(agent, DomainSpace.canonical())
    assert isinstance(policy, Policy)
    assert policy.name == "three"
    assert policy.projection is None
    np.testing.assert_allclose(policy.propose(history), agent.propose(history), atol=1e-12)
    assert policy.projection is not None
    assert policy.projection.uncovered == pytest.approx(0.0, abs=1e-12)
    assert policy.projection.kl == pytest.approx(0.0, abs=1e-9)


def test_two_domains_get_the_sums_of_26(agent: MixingAgent, make_history: MakeHistory) -> None:
    """The paper's reduction (D.6), and on the way in each domain is spread over its field's topics."""
    history = make_history(TWO.names, 6)
    spread = np.repeat(history.mixes / 26, 26, axis=1)
    canonical = dataclasses.replace(history, domains=DomainSpace.canonical().names, mixes=spread)
    proposal = agent.propose(canonical)
    np.testing.assert_allclose(
        AgentPolicy(agent, TWO).propose(history), [proposal[:26].sum(), proposal[26:].sum()], atol=1e-9
    )


def test_past_mixes_reach_the_agent_through_the_compositions(agent: MixingAgent, make_history: MakeHistory) -> None:
    science = DomainSpace.from_names(
        TWO.names, compositions={"source/web": {"Science": 1.0}, "target/math": {"Science": 1.0}}
    )
    history = make_history(TWO.names, 6)
    mixes = np.zeros((6, 52))
    mixes[:, 21], mixes[:, 47] = history.mixes[:, 0], history.mixes[:, 1]
    expected = agent.propose(dataclasses.replace(history, domains=DomainSpace.canonical().names, mixes=mixes))
    policy = AgentPolicy(agent, science)
    np.testing.assert_allclose(policy.propose(history), [expected[:26].sum(), expected[26:].sum()], atol=1e-9)
    assert policy.projection is not None
    assert policy.projection.uncovered == pytest.approx(1.0 - expected[21] - expected[47], abs=1e-9)


def test_roles_choose_the_feedback_columns_by_name(agent: MixingAgent, make_history: MakeHistory) -> None:
    """Taking columns by position swaps the field to keep and the field to learn."""
    history = make_history(TWO.names, 6)
    expected = AgentPolicy(agent, TWO).propose(history)
    mixed = dataclasses.replace(
        history,
        fields=("math", "law", "general"),
        feedback=np.column_stack([history.feedback[:, 1], np.full(6, 99.0), history.feedback[:, 0]]),
    )
    by_name = AgentPolicy(agent, TWO, roles={"acquire": "math", "keep": "general"}).propose(mixed)
    np.testing.assert_array_equal(by_name, expected)
    swapped = AgentPolicy(agent, TWO, roles={"acquire": "general", "keep": "math"}).propose(mixed)
    assert total_variation(swapped, expected) > 1e-4


def test_an_environment_with_other_fields_than_the_roles_is_refused_before_training(agent: MixingAgent) -> None:
    """Every decision would fail, and the run would go to its end on the first mix."""
    AgentPolicy(agent, TWO).check_fields(("general", "math"))
    for fields in (("general",), ("general", "math", "law")):
        with pytest.raises(ConfigurationError, match=rf"{len(fields)} field\(s\).*DecisionConfig\(roles"):
            AgentPolicy(agent, TWO).check_fields(fields)
    by_name = AgentPolicy(agent, TWO, roles={"acquire": "math", "keep": "general"})
    by_name.check_fields(("law", "math", "general"))
    with pytest.raises(ConfigurationError, match="'math'"):
        by_name.check_fields(("law", "general"))


def test_natural_shares_split_what_the_agent_cannot_tell_apart(agent: MixingAgent, make_history: MakeHistory) -> None:
    space = DomainSpace.from_names(["source/web", "source/books", "target/math"])
    policy = AgentPolicy(agent, space, {"source/web": 30, "source/books": 10, "target/math": 5})
    mix = policy.propose(make_history(space.names, 4))
    assert mix[0] / mix[1] == pytest.approx(3.0)


def made(agent: MixingAgent, space: DomainSpace, **settings: Any) -> Policy | None:
    return make_policy(agent, None, space, np.full(len(space), 1 / len(space)), **settings)


def test_domains_of_unknown_topics_beside_known_ones_are_warned_of(
    agent: MixingAgent, caplog: pytest.LogCaptureFixture
) -> None:
    """What is not known counts as spread over all topics, and can leave the others nothing; a typo does, too."""
    with caplog.at_level(logging.INFO):
        made(agent, DomainSpace.from_names(["source/Health", "source/scince", "source/web", "target/math"]))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "['source/scince', 'source/web'] are unknown" in warning
    assert "(is 'source/scince' for 'Science' meant?)" in warning
    caplog.clear()
    topics = {"source/web": {"Science": 1.0}}
    with caplog.at_level(logging.INFO):
        made(agent, DomainSpace.from_names(["source/Health", "source/web", "target/math"], compositions=topics))
        made(agent, TWO)
    assert "unknown" not in caplog.text


def test_domains_of_which_no_topic_is_known_are_warned_of_with_the_ways_out(
    agent: MixingAgent, caplog: pytest.LogCaptureFixture
) -> None:
    """The agent would choose among them by their row counts only, and nobody would notice."""
    made(agent, DomainSpace.from_names(["source/web", "source/books", "target/math"]))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "the topics of ['source/web', 'source/books'] are unknown, so agent 'three' sets only the total" in warning
    assert "(is 'source/books' for 'Books_and_Literature' meant?)" in warning
    assert "compositions=" in warning
    assert "topics='influence'" in warning


def test_the_standardization_is_passed_on(agent: MixingAgent, make_history: MakeHistory) -> None:
    history = make_history(TWO.names, 6)
    frozen = AgentPolicy(agent, TWO, standardization="frozen").propose(history)
    assert total_variation(frozen, AgentPolicy(agent, TWO).propose(history)) > 1e-4


def test_what_cannot_work_is_refused_at_construction(agent: MixingAgent) -> None:
    own = MixingAgent(AgentConfig(d_model=16, num_heads=2, d_ff=32, domains=("a", "b")))
    with pytest.raises(DomainError, match="2 domains of its own"):
        AgentPolicy(own, TWO)
    with pytest.raises(DomainError, match="both fields"):
        AgentPolicy(agent, DomainSpace.from_names(["source/web"]))
    with pytest.raises(ConfigurationError, match=r"roles names \['keep', 'learn'\]"):
        AgentPolicy(agent, TWO, roles={"keep": "general", "learn": "math"})
    with pytest.raises(ConfigurationError, match="unknown standardization 'none'"):
        AgentPolicy(agent, TWO, standardization="none")  # type: ignore[arg-type]
    with pytest.raises(MixError, match="shape"):
        AgentPolicy(agent, TWO, [1.0, 2.0, 3.0])


def test_another_runs_history_is_refused(agent: MixingAgent, make_history: MakeHistory) -> None:
    with pytest.raises(DomainError, match="this policy was built for"):
        AgentPolicy(agent, TWO).propose(make_history(TWO.names[::-1]))
    with pytest.raises(ConfigurationError, match=r"3 fields"):
        AgentPolicy(agent, TWO).propose(make_history(TWO.names, fields=("a", "b", "c")))
    with pytest.raises(ConfigurationError, match=r"field 'law', but the environment's fields are \['general'"):
        AgentPolicy(agent, TWO, roles={"keep": "general", "acquire": "law"}).propose(make_history(TWO.names))


def test_a_composition_over_few_topics_covers_only_those(agent: MixingAgent, make_history: MakeHistory) -> None:
    """Weight on topics without data must not leak into the other field."""
    space = DomainSpace.from_names(["source/News", "target/Science", "target/Health"])
    policy = AgentPolicy(agent, space)
    history = make_history(space.names, 3)
    mix = policy.propose(history)
    canonical = dataclasses.replace(
        history, domains=DomainSpace.canonical().names, mixes=policy.map.to_canonical(history.mixes)
    )
    proposal = agent.propose(canonical)
    assert mix[0] == pytest.approx(proposal[:26].sum())
    target = proposal[26:]
    science, health = target[CANONICAL_TOPICS.index("Science")], target[CANONICAL_TOPICS.index("Health")]
    assert mix[1] / mix[2] == pytest.approx(science / health)


LAW = ["Which article of the constitution lets the congress impeach a federal judge? Article one."] * 3
SCIENCE = ["Which planet of the solar system has the strongest gravity at its surface? Jupiter."] * 3
COOKING = ["How do you keep a sauce with butter and flour from getting lumps? Whisk it while the milk is warm."] * 6


def test_questions_of_other_topics_than_the_trainings_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """An agent that has learnt the topics of one question set by heart does harm with another."""
    keep = LinearClassifier.bundled().shares([*LAW, *SCIENCE])
    policy = AgentPolicy(MixingAgent(AgentConfig(keep_topics=tuple(keep.tolist()))), TWO)
    policy.check_questions({"general": [*LAW, *SCIENCE], "math": COOKING})
    assert not caplog.records
    policy.check_questions({"general": COOKING, "math": LAW})
    assert "the questions of 'general' are mostly about Food_and_Drink" in caplog.text
    assert "policy='influence'" in caplog.text


def test_the_role_and_not_the_order_says_which_questions_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    keep = LinearClassifier.bundled().shares(LAW)
    agent = MixingAgent(AgentConfig(keep_topics=tuple(keep.tolist())))
    policy = AgentPolicy(agent, TWO, roles={"keep": "civics", "acquire": "kitchen"})
    policy.check_questions({"kitchen": COOKING, "civics": LAW})
    assert not caplog.records


def test_the_bundled_agents_know_the_topics_of_their_questions(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("dmagent-rl", "dmagent-sft"):
        caplog.clear()
        AgentPolicy(MixingAgent.from_pretrained(name), TWO).check_questions({"general": COOKING, "math": LAW})
        assert "it can do worse than a constant mix" in caplog.text


def test_feedback_outside_the_range_of_the_training_is_warned_of_once(
    agent: MixingAgent, make_history: MakeHistory, caplog: pytest.LogCaptureFixture
) -> None:
    """Standard deviations of the training are 0.1 and 0.5 nats; the first feedback is the middle of the range."""
    history = make_history(TWO.names, 2)
    policy = AgentPolicy(agent, TWO)
    policy.propose(dataclasses.replace(history, feedback=np.array([[-3.0, -4.0], [-3.3, -2.1]])))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    for _ in range(2):
        policy.propose(dataclasses.replace(history, feedback=np.array([[-3.0, -4.0], [-3.5, -4.0]])))
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warned) == 1
    assert "'general' has moved by -0.5 since the first step, which is 5.0" in warned[0]


@pytest.mark.parametrize("topics", [(0.5, 0.5), (1.0,) * 26, (float("nan"),) * 26])
def test_topics_that_are_no_shares_are_refused(topics: tuple[float, ...]) -> None:
    with pytest.raises(ConfigurationError, match="keep_topics"):
        AgentConfig(keep_topics=topics)


def test_what_is_known_of_each_domain_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    space = DomainSpace.from_names(
        ["source/Science", "source/scince", "source/web", "source/mixed", "target/math"],
        compositions={
            "source/mixed": {"News": 5, "Games": 4, "Health": 3, "Sports": 2, "Finance": 1},
            "target/math": {"Science": 1.0},
        },
    )
    with caplog.at_level(logging.INFO):
        report_topics(space, {"source/mixed": "measured on 15 documents"})
    assert caplog.messages == [
        "topics of the domains:"
        "\n  1 of 5 by their names"
        "\n  source/scince: unknown (is 'Science' meant?)"
        "\n  source/web: unknown"
        "\n  source/mixed: News 33%, Games 27%, Health 20%, Sports 13%, 1 more (measured on 15 documents)"
        "\n  target/math: Science 100% (compositions=)"
    ]


def test_domains_that_the_first_proposal_starves_are_warned_of_once(
    agent: MixingAgent, make_history: MakeHistory, caplog: pytest.LogCaptureFixture
) -> None:
    """A guess at a composition can take nearly all weight from a domain: here, others have its topic and all others."""
    names, history = ["source/web", "source/blog", "target/math"], make_history
    everything = dict.fromkeys(CANONICAL_TOPICS, 1)
    proposal = agent.propose(history(agent.config.domains, 3))
    unwanted = CANONICAL_TOPICS[int(proposal[: len(CANONICAL_TOPICS)].argmin())]
    guess = {"source/web": everything, "source/blog": {unwanted: 1.0}}
    space = DomainSpace.from_names(names, compositions=guess)
    policy = AgentPolicy(agent, space, [40.0, 10.0, 50.0], iterations=3000)
    mix = policy.propose(history(names, 3))
    policy.propose(history(names, 4))
    assert mix[1] < 0.01 * (mix[0] + mix[1])
    (warning,) = [message for message in caplog.messages if "gives" in message]
    assert "agent 'three' gives 'source/blog' 0." in warning
    assert "of its field (it has 20% of the rows)" in warning
    assert "`dmagent compose`" in warning


def test_domains_near_their_share_of_rows_are_not_warned_of(
    agent: MixingAgent, make_history: MakeHistory, caplog: pytest.LogCaptureFixture
) -> None:
    space = DomainSpace.from_names(["source/web", "source/blog", "target/math"])
    AgentPolicy(agent, space, [40.0, 10.0, 50.0]).propose(make_history(space.names, 3))
    assert "source/blog" not in caplog.text
