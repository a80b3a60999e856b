"""Topic classifier: its accuracy is that on documents it has not seen."""

from __future__ import annotations

import numpy as np
import pytest

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.training.data.topics import TopicClassifier, TopicClassifierConfig


def documents(words: str, count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words.split(), 40)) for _ in range(count)]


def test_accuracy_is_measured_on_held_out_documents() -> None:
    """Labels are random, so an accuracy far above a half can only come from the training documents."""
    texts = documents("atom energy planet cell enzyme gravity goal match team striker league bond loan", 400, 0)
    classifier = TopicClassifier({"a": texts[:200], "b": texts[200:]}, TopicClassifierConfig(held_out=0.5))
    assert classifier.num_held_out == 200
    assert 0.35 < classifier.accuracy < 0.65


def test_predictions_are_positions_in_the_topics() -> None:
    science, sports = "atom energy planet cell enzyme", "goal match team striker league"
    labelled = {"Sports": documents(sports, 20, 0), "Science": documents(science, 20, 1)}
    classifier = TopicClassifier(labelled, TopicClassifierConfig(held_out=0.2))
    assert classifier.accuracy == 1.0
    found = classifier.predict(documents(science, 3, 2) + documents(sports, 2, 3))
    assert [classifier.topics[i] for i in found] == ["Science"] * 3 + ["Sports"] * 2


def test_too_few_documents_and_wrong_shares_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"1 topics, and \['Science'\]"):
        TopicClassifier({"Science": ["one"]}, TopicClassifierConfig())
    with pytest.raises(ConfigurationError, match=r"held_out is 1\.5"):
        TopicClassifierConfig(held_out=1.5)
