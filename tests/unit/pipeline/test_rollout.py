"""Closed loop: the agent's proposals are what the proxies are trained on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.history import FeedbackStatistics, History
from dmagent_loader.pipeline.corpus import Corpus
from dmagent_loader.pipeline.feedback import FeedbackConfig
from dmagent_loader.pipeline.questions import ProxyQuestions
from dmagent_loader.pipeline.rollout import Rollout, skewed_start_state, steer_proxies


@pytest.fixture(scope="module")
def agent() -> MixingAgent:
    statistics = FeedbackStatistics(mean=(-4.6, -4.6), std=(0.1, 0.1), count=10)
    return MixingAgent(AgentConfig(d_model=32, num_heads=2, d_ff=64, max_steps=8, statistics=statistics))


@pytest.fixture(scope="module")
def rollout(agent: MixingAgent, corpus: Corpus, questions: ProxyQuestions, small: FeedbackConfig) -> Rollout:
    return steer_proxies(
        agent,
        corpus,
        questions,
        small,
        skewed_start_state(0),
        steps=4,
        tokens_per_step=64,
        pretraining_steps=3,
        standardization="frozen",
        num_proxies=2,
    )


def test_every_mix_is_what_the_agent_proposes_on_the_history_so_far(
    rollout: Rollout, agent: MixingAgent, questions: ProxyQuestions
) -> None:
    for step in range(1, 5):
        history = History(
            domains=agent.config.domains,
            fields=questions.fields,
            mixes=rollout.mixes[1, :step],
            feedback=rollout.feedback[1, :step],
        )
        assert np.allclose(rollout.mixes[1, step], agent.propose(history, standardization="frozen"))
        blind = dataclasses.replace(history, feedback=np.full((step, 2), -4.6))
        change = 0.5 * np.abs(rollout.mixes[1, step] - agent.propose(blind, standardization="frozen")).sum()
        assert np.isclose(rollout.without_feedback[1, step - 1], change)


def test_the_proxies_learn_from_it(rollout: Rollout) -> None:
    """Untrained, every one of 104 tokens is about equally likely; catches proxies that are never trained."""
    assert (rollout.feedback[:, 0] > -np.log(104) - 0.5).all()
    assert not np.array_equal(rollout.feedback[0, 0], rollout.feedback[1, 0]), "pre-training gave both the same rows"
    assert (np.abs(np.diff(rollout.feedback, axis=1)) > 1e-4).all()


def test_changes_are_between_one_mix_and_the_next(rollout: Rollout) -> None:
    first = 0.5 * np.abs(rollout.mixes[:, 1] - rollout.mixes[:, 0]).sum(axis=1)
    assert rollout.changes().shape == (2, 4)
    assert np.allclose(rollout.changes()[:, 0], first)


def test_the_table_has_the_first_and_the_last_step(rollout: Rollout) -> None:
    lines = rollout.table(("general", "math"), every=3).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["0", "3", "4"]
    assert "| 0.00 ± 0.00 | none |" in lines[2]


def test_the_skewed_start_state_is_a_source_mix_of_few_topics() -> None:
    mix = skewed_start_state(0)
    assert np.isclose(mix.sum(), 1)
    assert not mix[26:].any()
    assert mix.max() > 0.25
