"""What comes with the package: agents that propose, and the set they were trained on."""

from __future__ import annotations

import numpy as np
import pytest
from launching import REPOSITORY

from dmagent_loader.agent import MixingAgent
from dmagent_loader.agent.critic import load_critics
from dmagent_loader.errors import StateError
from dmagent_loader.mixture.history import History
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.stages import find_record


@pytest.mark.parametrize("name", ["dmagent-rl", "dmagent-sft"])
def test_bundled_agents_have_the_papers_size_and_propose(name: str) -> None:
    agent = MixingAgent.from_pretrained(name)
    assert agent.num_parameters() == 2_125_568
    record = FeedbackRecord.load(find_record("recorded-math"))
    assert agent.config.statistics == record.statistics(), "the agent was trained on another set"
    history = History(
        domains=agent.config.domains,
        fields=record.fields,
        mixes=record.trajectories.mixes[0, :3],
        feedback=record.feedback[0, :3],
    )
    mix = agent.propose(history)
    assert np.isclose(mix.sum(), 1.0)


def test_the_critics_of_the_bundled_agent_load() -> None:
    critics = load_critics(REPOSITORY / "training_record" / "critics" / "dmagent-rl")
    assert {sum(p.numel() for p in critic.parameters()) for critic in critics} == {1_076_737}


def test_an_unknown_recorded_set_is_refused_with_the_bundled_ones() -> None:
    with pytest.raises(StateError, match=r"no recorded set 'recorded-law'.*recorded-math"):
        find_record("recorded-law")
