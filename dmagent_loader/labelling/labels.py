"""Labels of documents: what they state themselves, or else the answer of a classifier where it is sure enough.

Shapes: n documents, T = 26 canonical topics.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from dmagent_loader._validation import is_finite_number, shown
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.labelling.classifier import Classifier
from dmagent_loader.labelling.taxonomy import label_columns, stated_topics, topic_of, topics_of_labels, value_at
from dmagent_loader.mixture.domains import CANONICAL_TOPICS, NUM_TOPICS
from dmagent_loader.mixture.simplex import FloatArray, IntArray
from dmagent_loader.shards.inputs.documents import Document

UNSURE = -1
"""Topic of a document of which the classifier is not sure enough."""
STATED = "stated"
"""Origin of a label that came with the document."""
MIN_CONFIDENCE = 0.6
"""Least probability of a label. The bundled classifier is sure enough of 77% of documents like those of its training,
89% of these labels are right, and of 20% of mathematics (agent_checkpoints/topics)."""

MOST_UNKNOWN = 0.1
"""Part of the labels in a column above which it is taken for one of another taxonomy."""
_SHOWN_LABELS = 5
_WORD = re.compile(r"\w")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Settings of labels.

    Args:
        min_confidence: Least probability of a label; below it, the answer is "unsure".
        label_key: Column with the label of a document, dots lead into nested columns; None: the usual columns
            (`taxonomy.stated_topics`).
        use_stated: Whether labels that come with the documents are used instead of the classifier.

    Raises:
        ConfigurationError: `min_confidence` lies outside [0, 1], or `label_key` would be ignored.
    """

    min_confidence: float = MIN_CONFIDENCE
    label_key: str | None = None
    use_stated: bool = True

    def __post_init__(self) -> None:
        if not is_finite_number(self.min_confidence) or not 0 <= self.min_confidence <= 1:
            raise ConfigurationError(
                f"min_confidence is {shown(self.min_confidence)}; it must be a probability, between 0 and 1"
            )
        if self.label_key is not None and not self.use_stated:
            raise ConfigurationError(
                f"label_key={self.label_key!r} has no effect with use_stated=False: leave one of them out"
            )


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Labels of n documents.

    Attributes:
        topics: (n,) index of the most likely topic in `CANONICAL_TOPICS`, or `UNSURE`.
        shares: (n, T), topics that each label stands for; a row sums to 1, or is 0 where the topic is unsure.
        confidence: (n,) probability of the classifier's label; 1 for a stated label.
        stated: (n,) whether the label came with the document.
    """

    topics: IntArray
    shares: FloatArray
    confidence: FloatArray
    stated: npt.NDArray[np.bool_]

    def topic(self, number: int) -> str | None:
        """Name of the topic of a document; None: unsure."""
        topic = int(self.topics[number])
        return None if topic == UNSURE else CANONICAL_TOPICS[topic]


class Labeller:
    """Labels documents.

    Args:
        classifier: Classifier of topics.
        config: Settings; None: the defaults.

    Raises:
        ConfigurationError: The classifier's labels are not topics.
    """

    def __init__(self, classifier: Classifier, config: LabelConfig | None = None) -> None:
        self.classifier = classifier
        self.config = config or LabelConfig()
        self._to_topics = topics_of_labels(classifier.labels)
        self._key_found = False
        self._warned: set[str] = set()

    def label(self, documents: Sequence[Document]) -> Labels:
        """Labels documents; only those without a stated label are classified. A text without words is unsure.

        A column in which more than `MOST_UNKNOWN` of the labels of these documents are unknown is not read, because it
        is of another taxonomy: the labels that happen to be known would be an untypical part.

        Raises:
            ConfigurationError: No document has had the column `label_key` so far.
        """
        count = len(documents)
        shares, confidence, stated = np.zeros((count, NUM_TOPICS)), np.ones(count), np.zeros(count, dtype=bool)
        if self.config.use_stated:
            self.check_label_key(documents)
            key, least, ignored = self.config.label_key, self.config.min_confidence, self._foreign_columns(documents)
            for number, document in enumerate(documents):
                topics = stated_topics(document.columns, key, min_confidence=least, ignored=ignored)
                if topics is not None:
                    shares[number], stated[number] = topics, True
        has_words = np.array([_WORD.search(document.text) is not None for document in documents], dtype=bool)
        confidence[~stated & ~has_words] = 0.0
        rest = np.flatnonzero(~stated & has_words)
        if len(rest):
            likely = self.classifier.probabilities([documents[int(number)].text for number in rest])
            confidence[rest] = likely.max(axis=1)
            sure = confidence[rest] >= self.config.min_confidence
            shares[rest[sure]] = self._to_topics[likely[sure].argmax(axis=1)]
        likeliest = np.where(shares.any(axis=1), shares.argmax(axis=1), UNSURE)
        return Labels(topics=likeliest, shares=shares, confidence=confidence, stated=stated)

    def check_label_key(self, documents: Sequence[Document]) -> None:
        """Checks, until it was found once, that a document has the column `label_key`.

        Raises:
            ConfigurationError: None has it.
        """
        key = self.config.label_key
        if key is None or self._key_found or not documents:
            return
        self._key_found = any(value_at(document.columns, key) is not None for document in documents)
        if not self._key_found:
            raise ConfigurationError(
                f"none of the first {len(documents)} documents has a label in the column {key!r} (--label-key, "
                f"label_key=); the columns of {documents[0].origin} are {shown(sorted(documents[0].columns))}"
            )

    def _foreign_columns(self, documents: Sequence[Document]) -> set[str]:
        """The columns with many unknown labels."""
        labels: dict[str, Counter[str]] = {}
        for document in documents:
            for name, value in label_columns(document.columns, self.config.label_key):
                # Only in the column that was named: others may hold numbers of topics by the same name.
                if name == self.config.label_key and value is not None and not isinstance(value, (str, Mapping)):
                    value = shown(value)
                if isinstance(value, str) and value.strip():
                    labels.setdefault(name, Counter())[value] += 1
        foreign = set()
        for name, counts in labels.items():
            unknown = Counter({label: count for label, count in counts.items() if topic_of(label) is None})
            if unknown.total() <= MOST_UNKNOWN * counts.total():
                continue
            foreign.add(name)
            if name not in self._warned and (unknown.total() < counts.total() or name == self.config.label_key):
                logger.warning(
                    "the column %r is not read as labels: %d of %d are not topics of a known taxonomy, such as %s; "
                    "translate the labels to the 26 topics, or ignore them (--ignore-labels)",
                    name,
                    unknown.total(),
                    counts.total(),
                    shown([label for label, _ in unknown.most_common(_SHOWN_LABELS)]),
                )
                self._warned.add(name)
        return foreign


def batches(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Lists of `size` documents; the last one may be shorter."""
    remaining = iter(documents)
    while batch := list(islice(remaining, size)):
        yield batch
