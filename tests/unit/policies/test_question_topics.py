"""`QuestionTopics`, with the bundled classifier of topics."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dmagent_loader.errors import ConfigurationError, PolicyError, StateError
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.policies.question_topics import QuestionTopics

TEXTS = {
    "Sports": "The goalkeeper saved a penalty in the last minute and the team won the league match",
    "Food_and_Drink": "Simmer the onions in butter, add garlic and stock, and season the soup with salt",
    "Health": "The patient was given antibiotics for the infection and her symptoms improved",
    "Finance": "The central bank raised interest rates and bond yields rose with inflation",
    "Pets_and_Animals": "My dog barks at other dogs on the leash and the vet suggested a trainer",
}


def history(space):
    return History(
        domains=space.names,
        fields=("a", "b"),
        mixes=np.full((1, len(space)), 1 / len(space)),
        feedback=np.zeros((1, 2)),
    )


def policy(space=None, **settings):
    space = space or DomainSpace.canonical()
    made = QuestionTopics(space, np.full(len(space), 1 / len(space)), **settings)
    made.inform("questions", {"a": [TEXTS["Sports"]], "b": [TEXTS["Finance"], TEXTS["Health"]]})
    return made


def test_each_field_of_the_data_follows_its_own_questions():
    space = DomainSpace.canonical()
    mix = dict(zip(space.names, policy(natural_part=0.0).propose(history(space)), strict=True))
    assert mix["source/Sports"] == pytest.approx(0.7)
    assert mix["target/Finance"] == pytest.approx(0.15)
    assert mix["target/Health"] == pytest.approx(0.15)


def test_part_of_the_mix_stays_natural():
    space = DomainSpace.canonical()
    mix = dict(zip(space.names, policy(natural_part=0.1, target_share=0.5).propose(history(space)), strict=True))
    assert mix["source/Games"] == pytest.approx(0.5 * 0.1 / 26)
    assert sum(mix.values()) == pytest.approx(1.0)


def test_merged_domains_get_what_their_topics_get():
    names = ["source/Sports", "source/Games", "target/all"]
    space = DomainSpace.from_names(names)
    mix = policy(space, natural_part=0.0).propose(history(space))
    np.testing.assert_allclose(mix, [0.7, 0.0, 0.3], atol=1e-6)


def test_it_asks_once_and_remembers():
    space = DomainSpace.canonical()
    fresh = QuestionTopics(space, np.full(52, 1 / 52))
    assert fresh.needed(0) == {"length", "questions"}
    with pytest.raises(PolicyError, match="does not know the questions"):
        fresh.propose(history(space))
    told = policy()
    assert told.needed(0) == {"length"}
    fresh.load_state_dict(json.loads(json.dumps(told.state_dict())))
    assert np.array_equal(fresh.propose(history(space)), told.propose(history(space)))
    with pytest.raises(StateError, match="damaged"):
        fresh.load_state_dict({"topics": {"source": [1, 2]}})


@pytest.mark.parametrize("settings", [{"target_share": 2}, {"natural_part": -0.1}])
def test_shares_outside_their_range_are_refused(settings):
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        policy(**settings)
