"""Labels: stated ones win, the classifier answers for the rest, and says when it is unsure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.labelling.labels import UNSURE, LabelConfig, Labeller
from dmagent_loader.labelling.taxonomy import WEB_ORGANIZER
from dmagent_loader.mixture.domains import CANONICAL_TOPICS
from dmagent_loader.shards.inputs.documents import Document


class ByDigit:
    """Answers ``"<label> <confidence>"`` with that label at that confidence."""

    name = "by digit"

    def __init__(self, labels: Sequence[str] = CANONICAL_TOPICS) -> None:
        self.labels = tuple(labels)
        self.seen: list[str] = []

    def probabilities(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        self.seen += texts
        result = np.zeros((len(texts), len(self.labels)))
        for row, text in zip(result, texts, strict=True):
            label, _, confidence = text.rpartition(" ")
            row[:] = (1 - float(confidence)) / (len(row) - 1)
            row[self.labels.index(label)] = float(confidence)
        return result


def document(text: str, **columns: Any) -> Document:
    return Document(text, columns, "a file")


def test_stated_labels_win_and_are_not_classified() -> None:
    classifier = ByDigit()
    labels = Labeller(classifier).label([document("Games 0.9", topic="Science"), document("Games 0.9")])
    assert [labels.topic(0), labels.topic(1)] == ["Science", "Games"]
    assert labels.stated.tolist() == [True, False]
    assert labels.confidence.tolist() == [1.0, 0.9]
    assert classifier.seen == ["Games 0.9"]


def test_stated_labels_can_be_ignored() -> None:
    labeller = Labeller(ByDigit(), LabelConfig(use_stated=False))
    assert labeller.label([document("Games 0.9", topic="Science")]).topic(0) == "Games"


def test_a_label_below_the_least_confidence_is_unsure() -> None:
    labels = Labeller(ByDigit(), LabelConfig(min_confidence=0.7)).label([document("News 0.69"), document("News 0.7")])
    assert labels.topics.tolist() == [UNSURE, CANONICAL_TOPICS.index("News")]
    assert labels.topic(0) is None
    assert labels.shares[0].sum() == 0
    assert labels.shares[1].sum() == 1


def test_labels_of_web_organizer_become_canonical_shares() -> None:
    labels = Labeller(ByDigit(list(WEB_ORGANIZER))).label([document("Finance & Business 0.8")])
    shares = dict(zip(CANONICAL_TOPICS, labels.shares[0], strict=True))
    assert (shares["Finance"], shares["Business_and_Industrial"]) == (0.5, 0.5)


def test_a_text_without_words_is_unsure_at_any_confidence() -> None:
    classifier = ByDigit()
    labels = Labeller(classifier, LabelConfig(min_confidence=0)).label([document(""), document(" ?!\n")])
    assert labels.topics.tolist() == [UNSURE, UNSURE]
    assert labels.confidence.tolist() == [0.0, 0.0]
    assert classifier.seen == []


def test_a_column_of_another_taxonomy_is_not_half_taken(caplog: pytest.LogCaptureFixture) -> None:
    """Of a taxonomy with Science, Physics and Chemistry, only one label is known: all would count as science."""
    texts = [document("News 0.9", topic=topic) for topic in ("Science", "Physics", "Chemistry", "Physics")]
    labels = Labeller(ByDigit()).label(texts)
    assert [labels.topic(n) for n in range(4)] == ["News"] * 4
    assert "the column 'topic' is not read as labels: 3 of 4" in caplog.text
    assert "['Physics', 'Chemistry']" in caplog.text
    # Another domain had the same column with unknown labels only, and the warning was never given.
    caplog.clear()
    labeller = Labeller(ByDigit())
    labeller.label([document("News 0.9", topic="Physics")] * 2)
    assert not caplog.text
    labeller.label(texts)
    assert "3 of 4" in caplog.text
    few = [document("News 0.9", topic="Science")] * 9 + [document("News 0.9", topic="Physics")]
    assert Labeller(ByDigit()).label(few).stated.sum() == 9


def test_a_label_key_whose_values_are_no_labels_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """Numbers of clusters were left aside without a word, and all documents classified."""
    documents = [document("Science 0.9", cluster=number % 3, topic=5) for number in range(9)]
    labels = Labeller(ByDigit(), LabelConfig(label_key="cluster")).label(documents)
    assert not labels.stated.any()
    assert "column 'cluster' is not read as labels: 9 of 9 are not topics" in caplog.text
    assert "'0'" in caplog.text
    caplog.clear()
    assert not Labeller(ByDigit()).label(documents).stated.any()
    assert caplog.text == ""  # nobody named the column "topic"


def test_a_label_key_that_no_document_has_is_refused() -> None:
    labeller = Labeller(ByDigit(), LabelConfig(label_key="topc"))
    with pytest.raises(ConfigurationError, match=r"has a label in the column 'topc' .* \['topic', 'url'\]"):
        labeller.label([document("News 0.9", topic="Science", url="u")])


def test_probabilities_of_labels_need_the_least_confidence() -> None:
    texts = [document("News 0.9", topic={"Science": p, "Games": 1 - p}) for p in (0.5, 0.7)]
    assert Labeller(ByDigit()).label(texts).stated.tolist() == [False, True]


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"min_confidence is 1\.5"):
        LabelConfig(min_confidence=1.5)
    with pytest.raises(ConfigurationError, match="no effect"):
        LabelConfig(label_key="topic", use_stated=False)
    with pytest.raises(ConfigurationError, match="not topics"):
        Labeller(ByDigit(["High", "Low"]))
