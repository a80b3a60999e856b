"""Topics of unlabelled documents, by a linear classifier that is trained on labelled ones (extension).

The paper labels documents with the NVIDIA domain classifier. This one is trained in a minute; its accuracy is measured
on held-out labelled documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dmagent_loader.errors import ConfigurationError, require_extra
from dmagent_loader.mixture.simplex import IntArray


@dataclass(frozen=True, kw_only=True)
class TopicClassifierConfig:
    """Settings of the topic classifier.

    Args:
        held_out: Share of the labelled documents that is held out to measure the accuracy.
        max_documents: Largest number of labelled documents used for each topic.
        max_characters: Number of characters that the classifier reads of a document.
        max_features: Largest number of words in its vocabulary.
        seed: Seed of the split and of the training order.

    Raises:
        ConfigurationError: `held_out` is outside (0, 1).
    """

    held_out: float = 0.1
    max_documents: int = 1500
    max_characters: int = 2000
    max_features: int = 60_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ConfigurationError(f"held_out is {self.held_out}: the accuracy needs a share between 0 and 1")


class TopicClassifier:
    """TF-IDF over words and logistic regression by stochastic gradient descent.

    Attributes:
        topics: Topics in the order of the labels that `predict` returns.
        accuracy: Share of the held-out documents whose topic is predicted correctly.
        num_held_out: Number of held-out documents.
    """

    def __init__(self, labelled: Mapping[str, Sequence[str]], config: TopicClassifierConfig) -> None:
        """Trains the classifier.

        Args:
            labelled: Topic -> its documents; at least two topics with at least two documents each.
            config: Settings.

        Raises:
            ConfigurationError: There are too few topics or documents.
            MissingExtraError: scikit-learn is not installed.
        """
        require_extra("sklearn", "rl")
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import SGDClassifier
        from sklearn.pipeline import make_pipeline

        self.topics = tuple(labelled)
        self.config = config
        poor = [topic for topic, documents in labelled.items() if len(documents) < 2]
        if len(labelled) < 2 or poor:
            raise ConfigurationError(
                "a topic classifier needs two or more topics with two or more documents each; there are "
                f"{len(labelled)} topics, and {poor} have fewer documents: add documents or leave those topics out"
            )
        rng = np.random.default_rng(config.seed)
        train: list[tuple[str, int]] = []
        test: list[tuple[str, int]] = []
        for label, documents in enumerate(labelled.values()):
            order = rng.permutation(len(documents))[: config.max_documents]
            num_test = max(1, round(config.held_out * len(order)))
            test += [(documents[i], label) for i in order[:num_test]]
            train += [(documents[i], label) for i in order[num_test:]]
        self._model = make_pipeline(
            TfidfVectorizer(sublinear_tf=True, max_features=config.max_features, min_df=2 if len(train) > 500 else 1),
            SGDClassifier(loss="log_loss", alpha=1e-5, max_iter=30, random_state=config.seed),
        )
        self._model.fit([self._cut(text) for text, _ in train], [label for _, label in train])
        guessed = self.predict([text for text, _ in test])
        self.accuracy = float(np.mean(guessed == np.array([label for _, label in test])))
        self.num_held_out = len(test)

    def predict(self, documents: Sequence[str]) -> IntArray:
        """The most likely topic of each document, as a position in `topics`: (documents,)."""
        return np.asarray(self._model.predict([self._cut(text) for text in documents]), dtype=np.int64)

    def _cut(self, text: str) -> str:
        return text[: self.config.max_characters]
