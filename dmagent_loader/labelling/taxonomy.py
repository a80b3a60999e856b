"""Topics in other words: WebOrganizer's 24 as distributions over the canonical 26, and labels that data already carry.

The map is a judgement, made from the descriptions in WebOrganizer's taxonomy (arXiv 2502.10341): each of its topics is
split over the canonical topics that its description names. ``Real_Estate``, for example, has no topic of its own there,
and is part of *Home & Hobbies*, "real estate, renting, relocation, furniture, ... gardening, pets, toys, collecting".

Shapes: L labels, T = 26 canonical topics, W = 24 topics of WebOrganizer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dmagent_loader._validation import is_finite_number, shown
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import CANONICAL_TOPICS, NUM_TOPICS
from dmagent_loader.mixture.simplex import FloatArray

WEB_ORGANIZER: Mapping[str, Mapping[str, float]] = {
    "Adult Content": {"Adult": 1.0},
    "Art & Design": {"Arts_and_Entertainment": 0.8, "Hobbies_and_Leisure": 0.2},
    "Software Development": {"Computers_and_Electronics": 1.0},
    "Crime & Law": {"Law_and_Government": 0.7, "Sensitive_Subjects": 0.2, "News": 0.1},
    "Education & Jobs": {"Jobs_and_Education": 1.0},
    "Electronics & Hardware": {"Computers_and_Electronics": 0.8, "Internet_and_Telecom": 0.1, "Shopping": 0.1},
    "Entertainment": {"Arts_and_Entertainment": 1.0},
    "Social Life": {"People_and_Society": 0.7, "Online_Communities": 0.3},
    "Fashion & Beauty": {"Beauty_and_Fitness": 0.6, "Shopping": 0.4},
    "Finance & Business": {"Finance": 0.5, "Business_and_Industrial": 0.5},
    "Food & Dining": {"Food_and_Drink": 1.0},
    "Games": {"Games": 1.0},
    "Health": {"Health": 1.0},
    "History & Geography": {
        "People_and_Society": 0.4,
        "Science": 0.2,
        "Books_and_Literature": 0.2,
        "Travel_and_Transportation": 0.2,
    },
    "Home & Hobbies": {
        "Home_and_Garden": 0.4,
        "Hobbies_and_Leisure": 0.25,
        "Pets_and_Animals": 0.2,
        "Real_Estate": 0.15,
    },
    "Industrial": {"Business_and_Industrial": 1.0},
    "Literature": {"Books_and_Literature": 0.8, "People_and_Society": 0.2},
    "Politics": {"Law_and_Government": 0.4, "News": 0.4, "Sensitive_Subjects": 0.2},
    "Religion": {"People_and_Society": 1.0},
    "Science, Math & Technology": {"Science": 1.0},
    "Software": {"Computers_and_Electronics": 0.5, "Internet_and_Telecom": 0.5},
    "Sports & Fitness": {"Sports": 0.85, "Beauty_and_Fitness": 0.15},
    "Transportation": {"Autos_and_Vehicles": 0.6, "Travel_and_Transportation": 0.4},
    "Travel & Tourism": {"Travel_and_Transportation": 1.0},
}
"""Topic of WebOrganizer, in the order of its classifier -> shares of canonical topics, which sum to 1."""

_SHORT = {
    "Adult Content": ("Adult",),
    "Software Development": ("Software Dev.",),
    "Electronics & Hardware": ("Hardware",),
    "History & Geography": ("History",),
    "Science, Math & Technology": ("Science & Tech.", "Science & Technology"),
    "Travel & Tourism": ("Travel",),
    "Politics": ("Politics & Social Issues",),
}
"""Other names of WebOrganizer's topics, from its model card and prompts."""


def _key(label: str) -> str:
    """A label without case, punctuation and the spelling of "and": ``Art & Design`` and ``art_and_design`` agree."""
    return re.sub(r"[\W_]+", "_", label.lower().replace("&", " and ")).strip("_")


def _row(shares: Mapping[str, float]) -> FloatArray:
    row = np.zeros(NUM_TOPICS)
    for topic, share in shares.items():
        row[CANONICAL_TOPICS.index(topic)] = share
    return row


WEB_ORGANIZER_MATRIX: FloatArray = np.stack([_row(shares) for shares in WEB_ORGANIZER.values()])
"""(W, T): P(canonical topic | WebOrganizer's topic)."""

_WEB_ORGANIZER_ROWS = {
    _key(name): row
    for (topic, _), row in zip(WEB_ORGANIZER.items(), WEB_ORGANIZER_MATRIX, strict=True)
    for name in (topic, *_SHORT.get(topic, ()))
}
_CANONICAL_ROWS = {_key(topic): _row({topic: 1.0}) for topic in CANONICAL_TOPICS}
# Games and Health are in both with one meaning; "Adult" is the short name of "Adult Content".
_ROWS = {**_WEB_ORGANIZER_ROWS, **_CANONICAL_ROWS}


def topic_of(label: str) -> FloatArray | None:
    """The canonical topics of a label of either taxonomy, in any spelling: (T,), sums to 1; None: it is unknown.

    Example:
        >>> row = topic_of("art_and_design")
        >>> dict(zip(CANONICAL_TOPICS, row.tolist()))["Arts_and_Entertainment"]
        0.8
        >>> topic_of("blog") is None
        True
    """
    row = _ROWS.get(_key(label))
    return None if row is None else row.copy()


def topics_of_labels(labels: Sequence[str]) -> FloatArray:
    """The map from a classifier's labels to canonical topics: (L, T), rows sum to 1.

    Raises:
        ConfigurationError: A label belongs to neither taxonomy.
    """
    rows = [topic_of(label) for label in labels]
    unknown = [label for label, row in zip(labels, rows, strict=True) if row is None]
    if unknown:
        raise ConfigurationError(
            f"the labels {shown(unknown)} are not topics of the NVIDIA domain classifier or of WebOrganizer, so they "
            "say nothing about the 26 topics: use a classifier of topics"
        )
    return np.stack([row for row in rows if row is not None])


_COLUMNS = ("topic", "domain_pred", "multilingual_domain_pred", "domain", "weborganizer_topic", "topic_label")
"""Columns that data sets keep a topic in; those of NeMo Curator end in ``domain_pred``."""
_FOLDERS = ("metadata", "attributes", "added")
"""Columns with further columns inside: datatrove's ``metadata``, Dolma's ``metadata`` and ``attributes``."""


def stated_topics(
    columns: Mapping[str, Any],
    label_key: str | None = None,
    *,
    min_confidence: float = 0.0,
    ignored: Collection[str] = (),
) -> FloatArray | None:
    """The topics that a document states itself.

    Read are, in this order: the column `label_key`; the columns ``topic``, ``domain_pred`` and
    ``multilingual_domain_pred`` (NeMo Curator), ``domain``, ``weborganizer_topic`` and ``topic_label``, also inside
    ``metadata`` (datatrove, Dolma); and Dolma's ``attributes``, whose names hold "topic" or "domain" and end in a
    label, ``{"tagger__topic__Science": [[0, 120, 0.9]]}``.

    Args:
        columns: Columns of the document.
        label_key: Column with the label; dots lead into nested columns. None: the usual ones.
        min_confidence: Least probability of the likeliest label, where there are probabilities.
        ignored: Columns that are not read, as `label_columns` calls them.

    Returns:
        (T,), sums to 1; None: no column holds a known topic.
    """
    for name, value in label_columns(columns, label_key):
        row = None if name in ignored else _read_label(value, min_confidence)
        if row is not None:
            return row
    return None if label_key is not None else _read_spans(columns.get("attributes"), min_confidence)


def label_columns(columns: Mapping[str, Any], label_key: str | None = None) -> Iterator[tuple[str, Any]]:
    """The columns of a document that may hold its label, such as ``metadata.topic``, and their values."""
    if label_key is not None:
        yield label_key, value_at(columns, label_key)
        return
    for folder in ("", *_FOLDERS):
        holder = columns.get(folder) if folder else columns
        if isinstance(holder, Mapping):
            yield from ((f"{folder}.{name}" if folder else name, holder.get(name)) for name in _COLUMNS)


def value_at(columns: Mapping[str, Any], key: str) -> Any:
    """The value of a column; dots lead into nested columns. None: there is no such column."""
    value: Any = columns
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _read_label(value: Any, min_confidence: float) -> FloatArray | None:
    """A label, or label -> weight."""
    if isinstance(value, str):
        return topic_of(value)
    if isinstance(value, Mapping):
        weights = {str(label): float(w) for label, w in value.items() if is_finite_number(w) and w > 0}
        everything = sum(weights.values())
        likeliest = max(weights, key=lambda label: weights[label], default="")
        row = topic_of(likeliest)
        if row is None or not everything < np.inf or weights[likeliest] < min_confidence * everything:
            return None
        rows = [topic_of(label) for label in weights]
        if any(other is None for other in rows):
            return row  # the shares of the known labels alone would not be those of the document
        return np.asarray(sum(w * r for w, r in zip(weights.values(), rows, strict=True) if r is not None) / everything)
    return None


def _read_spans(attributes: Any, min_confidence: float) -> FloatArray | None:
    """Dolma's attributes of topics: the last part of a name is a label, and its spans are [start, end, score]."""
    if not isinstance(attributes, Mapping):
        return None
    best, best_score = None, 0.0
    for name, spans in attributes.items():
        tagger, _, label = str(name).rpartition("__")
        row = topic_of(label)
        if row is None or not isinstance(spans, list) or not re.search("topic|domain", tagger.lower()):
            continue
        for span in spans:
            score = float(span[2]) if isinstance(span, list) and len(span) == 3 and is_finite_number(span[2]) else 0.0
            if score > best_score:
                best, best_score = row, score
    return best if best_score >= min_confidence else None
