"""The bundled classifier of topics: plain cases, calibration, files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dmagent_loader.errors import CheckpointError, ConfigurationError
from dmagent_loader.labelling.linear import LinearClassifier
from dmagent_loader.mixture.domains import CANONICAL_TOPICS

TEXTS = {
    "Sports": "The goalkeeper saved a penalty in the last minute and the team won the league match",
    "Food_and_Drink": "Simmer the onions in butter, add garlic and stock, and season the soup with salt",
    "Health": "The patient was given antibiotics for the infection and her symptoms improved",
    "Finance": "The central bank raised interest rates and bond yields rose with inflation",
    "Pets_and_Animals": "My dog barks at other dogs on the leash and the vet suggested a trainer",
}


@pytest.mark.parametrize("topic", TEXTS)
def test_the_bundled_classifier_knows_plain_cases(topic):
    assert CANONICAL_TOPICS[LinearClassifier.bundled().predict([TEXTS[topic]])[0]] == topic


def test_shares_count_texts():
    shares = LinearClassifier.bundled().shares([TEXTS["Sports"]] * 3 + [TEXTS["Health"]])
    assert shares[CANONICAL_TOPICS.index("Sports")] == 0.75
    assert shares.sum() == 1
    with pytest.raises(ConfigurationError, match="give one or more"):
        LinearClassifier.bundled().shares([])


def test_what_is_saved_is_what_is_loaded(tmp_path):
    bundled = LinearClassifier.bundled()
    bundled.save(tmp_path)
    texts = [*TEXTS.values(), "", "zzzz qqqq"]
    assert LinearClassifier.load(tmp_path).temperature == bundled.temperature
    np.testing.assert_allclose(LinearClassifier.load(tmp_path).scores(texts), bundled.scores(texts), rtol=1e-6)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="cannot be read"):
        LinearClassifier.load(tmp_path)


def test_probabilities_are_the_softmax_of_scores_over_temperature():
    """The bundled temperature is fitted, so it is not 1; a classifier that forgot it would be under-confident."""
    bundled = LinearClassifier.bundled()
    texts = list(TEXTS.values())
    likely = bundled.probabilities(texts)
    powers = np.exp(bundled.scores(texts) / bundled.temperature)
    np.testing.assert_allclose(likely, powers / powers.sum(axis=1, keepdims=True))
    assert bundled.temperature < 0.9
    assert (likely.max(axis=1) > replace(bundled, temperature=1.0).probabilities(texts).max(axis=1)).all()


def test_texts_without_known_words_are_uncertain():
    assert LinearClassifier.bundled().probabilities(["", "zzzz qqqq"]).max() < 0.2


def test_a_temperature_that_cannot_be_used_is_refused(tmp_path):
    for temperature in (0.0, float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match="not finite"):
            replace(LinearClassifier.bundled(), temperature=temperature)


def test_the_name_changes_with_the_weights(tmp_path):
    bundled = LinearClassifier.bundled()
    replace(bundled, temperature=1.0).save(tmp_path)
    assert LinearClassifier.load(tmp_path).name != bundled.name
