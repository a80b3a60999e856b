"""Labels of other taxonomies, and labels that data already carry in the layouts of the usual tools."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.labelling.taxonomy import (
    WEB_ORGANIZER,
    WEB_ORGANIZER_MATRIX,
    stated_topics,
    topic_of,
    topics_of_labels,
)
from dmagent_loader.mixture.domains import CANONICAL_TOPICS


def topics(row: np.ndarray[Any, Any] | None) -> dict[str, float] | None:
    if row is None:
        return None
    return {topic: round(float(share), 6) for topic, share in zip(CANONICAL_TOPICS, row, strict=True) if share}


def test_the_map_of_web_organizer_is_complete() -> None:
    """24 distributions, and every canonical topic is reached: an agent could not ask for one that is not."""
    assert WEB_ORGANIZER_MATRIX.shape == (24, 26)
    np.testing.assert_allclose(WEB_ORGANIZER_MATRIX.sum(axis=1), 1.0)
    assert (WEB_ORGANIZER_MATRIX.sum(axis=0) > 0).all()
    assert next(iter(WEB_ORGANIZER)) == "Adult Content"
    assert list(WEB_ORGANIZER)[19] == "Science, Math & Technology"


@pytest.mark.parametrize("label", [*CANONICAL_TOPICS, *WEB_ORGANIZER])
def test_every_label_of_both_taxonomies_is_known_in_any_spelling(label: str) -> None:
    row = topic_of(label)
    assert row is not None
    assert row.sum() == pytest.approx(1.0)
    for spelling in (label.upper(), label.replace("_", " "), label.lower().replace(" & ", "_and_").replace(" ", "_")):
        np.testing.assert_array_equal(topic_of(spelling), row)


def test_a_canonical_topic_is_itself() -> None:
    np.testing.assert_array_equal(topics_of_labels(CANONICAL_TOPICS), np.eye(26))


def test_labels_that_are_not_topics_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"\['High', 'Low'\] are not topics"):
        topics_of_labels(["High", "Low"])


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"topic": "Science"}, {"Science": 1.0}),
        ({"domain_pred": "Law_and_Government", "domain_prob": [0.9]}, {"Law_and_Government": 1.0}),  # NeMo Curator
        ({"metadata": {"topic": "Art & Design"}}, {"Arts_and_Entertainment": 0.8, "Hobbies_and_Leisure": 0.2}),
        ({"id": "1", "metadata": {"weborganizer_topic": "science_math_and_technology"}}, {"Science": 1.0}),
        ({"attributes": {"t__topic__Health": [[0, 9, 0.2]], "t__topic__Sports": [[0, 9, 0.7]]}}, {"Sports": 1.0}),
        ({"topic": {"News": 3, "Science": 1}}, {"News": 0.75, "Science": 0.25}),
        ({"topic": "a blog", "domain": "example.org"}, None),
        ({"topic": None, "attributes": {"t__topic__Health": [[0, 9]], "x": 3, "t__Games": [5]}}, None),
        ({"topic": {"News": float("inf")}}, None),
        ({"topic": {"News": 0.2, "blog": 0.8}}, None),
        ({"topic": {"News": 0.5, "Science": 0.2, "blog": 0.3}}, {"News": 1.0}),
        ({"attributes": {"quality__Health": [[0, 9, 0.9]]}}, None),
        ({"topic": {"News": 10**400}}, None),
        ({}, None),
    ],
)
def test_labels_are_read_where_tools_write_them(columns: dict[str, Any], expected: dict[str, float] | None) -> None:
    assert topics(stated_topics(columns)) == expected


def test_a_named_column_is_the_only_one_that_is_read() -> None:
    columns = {"topic": "Science", "mine": {"label": "Games"}}
    assert topics(stated_topics(columns, "mine.label")) == {"Games": 1.0}
    assert stated_topics(columns, "mine.other") is None
    assert stated_topics(columns, "topic.label") is None


def test_spans_and_probabilities_below_the_least_confidence_are_not_labels() -> None:
    for columns in ({"attributes": {"t__topic__Health": [[0, 9, 0.5]]}}, {"topic": {"Health": 5, "News": 5}}):
        assert stated_topics(columns, min_confidence=0.6) is None
        assert stated_topics(columns, min_confidence=0.5) is not None
