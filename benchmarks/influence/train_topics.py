"""Trains the bundled topic classifier, measures it on documents that it has not seen, and writes its card.

    python -m benchmarks.influence.train_topics --data DATA --output agent_checkpoints/topics

DATA holds ``source/TOPIC.jsonl.gz`` for the 26 topics, with a column ``text``. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.linear_model import SGDClassifier

from dmagent_loader.mixture.domains import CANONICAL_TOPICS
from dmagent_loader.mixture.simplex import FloatArray, IntArray
from dmagent_loader.policies.topic_classifier import TopicClassifier, bucket_counts, features
from dmagent_loader.training.data.corpus import read_documents

BUCKETS = 1 << 16
PER_TOPIC = 2400
HELD_OUT_EVERY = 10
LEAST_DOCUMENTS = 3
"""Buckets of words that fewer documents have are left out: their weights would be learnt by heart."""

CARD = """---
library_name: dmagent-loader
license: other
tags: [text-classification, data-mixing]
---

# Topic classifier of questions

Classifies texts into the 26 topics of the NVIDIA domain classifier. `policies.QuestionTopics` uses it to find the
topics of an environment's questions, and trains on the same topics. The model is linear over hashed words, with
{buckets:,} buckets and 8-bit weights ({size:.1f} MB). Made by `python -m benchmarks.influence.train_topics`.

| | |
|---|---|
| trained on | {trained:,} documents with topics from the data sets' own categories, at most {per_topic:,} per topic |
| accuracy on {held_out:,} held-out documents | **{accuracy:.1%}** |
| accuracy of 32-bit weights; of always guessing the most frequent topic | {full:.1%}; {chance:.1%} |
| top-3 accuracy | {top3:.1%} |
| lowest and highest accuracy by topic | {worst}; {best} |
| input | the first {characters:,} characters of a text |
| time | {seconds:.0f} s |

## Limits

- Accuracy was measured on English forum posts, news and articles like those in the training data. Question sets have no
  topic labels, so its predictions on them were only judged by their effect on training (docs/influence.md).
- It always predicts one of the 26 topics. There is none for mathematics, which becomes `Science`,
  `Internet_and_Telecom` or `Computers_and_Electronics`.

## Data

The source field of docs/agent-data.md, whose licences are listed there: several parts are for non-commercial use or
research only. This repository contains neither the text nor a list of its words. The consequences for the licence of
the weights have not been examined.
"""


def documents(folder: Path) -> tuple[list[str], IntArray]:
    """Texts of all topics, at most `PER_TOPIC` of each, evenly spaced; and their topics."""
    texts: list[str] = []
    labels: list[int] = []
    for number, topic in enumerate(CANONICAL_TOPICS):
        found = list(read_documents(folder / "source" / f"{topic}.jsonl.gz"))
        chosen = [found[i] for i in np.linspace(0, len(found) - 1, min(len(found), PER_TOPIC)).astype(int)]
        texts += chosen
        labels += [number] * len(chosen)
    return texts, np.array(labels)


def matrix(texts: list[str], idf: FloatArray) -> csr_matrix:
    """The features of texts: (texts, `BUCKETS`)."""
    rows = [features(text, idf) for text in texts]
    starts = np.cumsum([0, *(len(buckets) for buckets, _ in rows)])
    joined = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
    return csr_matrix((joined[1], joined[0], starts), shape=(len(texts), BUCKETS))


def inverse_frequencies(texts: list[str]) -> FloatArray:
    """idf of each bucket, as scikit-learn smooths it: (`BUCKETS`,)."""
    having = np.zeros(BUCKETS)
    for text in texts:
        having[list(bucket_counts(text, BUCKETS))] += 1
    idf = np.log((1 + len(texts)) / (1 + having)) + 1
    return np.where(having >= LEAST_DOCUMENTS, idf, 0.0).astype(np.float16).astype(np.float64)


def quantised(weights: FloatArray, bias: FloatArray, idf: FloatArray) -> TopicClassifier:
    """Weights rounded to 8 bits, with a scale per topic."""
    scales = np.abs(weights).max(axis=1) / 127
    return TopicClassifier(
        weights=np.round(weights / scales[:, None]).astype(np.int8), scales=scales, bias=bias, idf=idf
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    started = time.perf_counter()
    texts, labels = documents(arguments.data)
    held = np.arange(len(texts)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    train, test = ([t for t, h in zip(texts, held, strict=True) if h == wanted] for wanted in (False, True))
    idf = inverse_frequencies(train)
    model = SGDClassifier(loss="log_loss", alpha=1e-5, max_iter=30, random_state=0)
    model.fit(matrix(train, idf), labels[~held])
    classifier = quantised(model.coef_, model.intercept_, idf)
    arguments.output.mkdir(parents=True, exist_ok=True)
    classifier.save(arguments.output)
    classifier = TopicClassifier.load(arguments.output)
    scores, right = classifier.scores(test), labels[held]
    guessed = scores.argmax(axis=1)
    by_topic = [float(np.mean(guessed[right == number] == number)) for number in range(len(CANONICAL_TOPICS))]
    order = np.argsort(by_topic)
    named = [", ".join(f"{CANONICAL_TOPICS[i]} {by_topic[i]:.0%}" for i in part) for part in (order[:3], order[:-4:-1])]
    card = CARD.format(
        buckets=BUCKETS,
        size=(arguments.output / "model.safetensors").stat().st_size / 1e6,
        trained=len(train),
        per_topic=PER_TOPIC,
        held_out=len(test),
        accuracy=float(np.mean(guessed == right)),
        full=float(np.mean(model.predict(matrix(test, idf)) == right)),
        chance=float(np.bincount(right).max() / len(right)),
        top3=float(np.mean([r in s.argsort()[-3:] for s, r in zip(scores, right, strict=True)])),
        worst=named[0],
        best=named[1],
        characters=2000,
        seconds=time.perf_counter() - started,
    )
    (arguments.output / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
