"""Trains the bundled topic classifier, measures it on documents that it has not seen, and writes its card.

    python -m benchmarks.influence.train_topics --data DATA --output agent_checkpoints/topics

DATA holds ``source/TOPIC.jsonl.gz`` for the 26 topics, with a column ``text``. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.sparse import csr_matrix
from scipy.special import log_softmax
from sklearn.linear_model import SGDClassifier

from dmagent_loader.labelling.linear import MOST_CHARACTERS, LinearClassifier, bucket_counts, features
from dmagent_loader.mixture.domains import CANONICAL_TOPICS
from dmagent_loader.mixture.simplex import FloatArray, IntArray
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

# Topic classifier

Classifies texts into the 26 topics of the NVIDIA domain classifier. `dmagent label` and `dmagent compose` use it unless
another classifier is named; `policies.QuestionTopics` uses it to find the topics of an environment's questions, and
trains on the same topics. The model is linear over hashed words, with {buckets:,} buckets and 8-bit weights
({size:.1f} MB). Made by `python -m benchmarks.influence.train_topics`.

| | |
|---|---|
| trained on | {trained:,} documents with topics from the data sets' own categories, at most {per_topic:,} per topic |
| accuracy on {held_out:,} held-out documents | **{accuracy:.1%}** |
| accuracy of 32-bit weights; of always guessing the most frequent topic | {full:.1%}; {chance:.1%} |
| top-3 accuracy | {top3:.1%} |
| input | the first {characters:,} characters of a text |

## Calibration and coverage

Every other held-out document fits the temperature ({temperature:.2f}); the other {tested:,} give the figures below.
The expected calibration error is {ece:.3f} in 10 bins. Documents below the least confidence (`--min-confidence`) are
answered with "unsure".

| least confidence | coverage | accuracy of what is covered | coverage of mathematics | of source code |
|---:|---:|---:|---:|---:|
{coverage}

Mathematics and source code are kinds of text that no training document is of, with no topic of their own: the less of
them is covered, the better. They are the documents of the target fields of docs/agent-data.md.

## By topic

Recall: share of the topic's documents that are found. Precision: share of the documents so labelled that are of the
topic. On all {held_out:,} held-out documents, without "unsure".

| topic | recall | precision | most often taken for |
|---|---:|---:|---|
{by_topic}

## Limits

- Accuracy was measured on English forum posts, news and articles like those in the training data. Other kinds of text
  were not measured, except mathematics and source code above. Question sets have no topic labels, so its predictions on
  them were only judged by their effect on training (docs/influence-results.md).
- Of the mathematics and source code that it is sure of, most becomes `Science`, `Internet_and_Telecom` or
  `Computers_and_Electronics`; word problems for schools become what they are about, such as `Shopping`.

## Data

The source field of docs/agent-data.md, whose licences are listed there: several parts are for non-commercial use or
research only. This repository contains neither the text nor a list of its words. The consequences for the licence of
the weights have not been examined.
"""
CONFIDENCES = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9)


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


def quantised(weights: FloatArray, bias: FloatArray, idf: FloatArray) -> LinearClassifier:
    """Weights rounded to 8 bits, with a scale per topic."""
    scales = np.abs(weights).max(axis=1) / 127
    return LinearClassifier(
        weights=np.round(weights / scales[:, None]).astype(np.int8), scales=scales, bias=bias, idf=idf
    )


def fitted_temperature(scores: FloatArray, labels: IntArray) -> float:
    """The temperature with the least negative log-likelihood."""

    def loss(logarithm: float) -> float:
        return -float(log_softmax(scores / np.exp(logarithm), axis=1)[np.arange(len(labels)), labels].mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded").x))


def calibration_error(confidence: FloatArray, right: FloatArray) -> float:
    """Expected calibration error in 10 bins of equal width."""
    bins = np.minimum((confidence * 10).astype(int), 9)
    gaps = [(bins == b).mean() * abs(confidence[bins == b].mean() - right[bins == b].mean()) for b in np.unique(bins)]
    return float(sum(gaps))


def coverage_table(confidence: FloatArray, right: FloatArray, others: list[FloatArray]) -> str:
    """Lines of the table of coverage: least confidence, coverage, accuracy, coverage of other kinds of text."""
    lines = []
    for least in CONFIDENCES:
        sure = confidence >= least
        cells = [f"{least:.1f}", f"{sure.mean():.0%}", f"{right[sure].mean():.1%}"]
        lines.append("| " + " | ".join([*cells, *(f"{(other >= least).mean():.0%}" for other in others)]) + " |")
    return "\n".join(lines)


def topic_table(labels: IntArray, guessed: IntArray) -> str:
    """Lines of the table by topic: recall, precision, and the two topics it is most often taken for."""
    count = len(CANONICAL_TOPICS)
    confusion = np.zeros((count, count), dtype=int)
    np.add.at(confusion, (labels, guessed), 1)
    lines = []
    for number, topic in enumerate(CANONICAL_TOPICS):
        row, found = confusion[number], confusion[number, number]
        wrong = np.where(np.arange(count) == number, 0, row)
        taken = ", ".join(
            f"{CANONICAL_TOPICS[i]} {wrong[i] / row.sum():.0%}" for i in np.argsort(-wrong)[:2] if wrong[i]
        )
        lines.append(f"| {topic} | {found / row.sum():.0%} | {found / confusion[:, number].sum():.0%} | {taken} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    texts, labels = documents(arguments.data)
    held = np.arange(len(texts)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    train, test = ([t for t, h in zip(texts, held, strict=True) if h == wanted] for wanted in (False, True))
    idf = inverse_frequencies(train)
    model = SGDClassifier(loss="log_loss", alpha=1e-5, max_iter=30, random_state=0)
    model.fit(matrix(train, idf), labels[~held])
    classifier = quantised(model.coef_, model.intercept_, idf)
    scores, right = classifier.scores(test), labels[held]
    fit = np.arange(len(right)) % 2 == 0
    classifier = replace(classifier, temperature=fitted_temperature(scores[fit], right[fit]))
    arguments.output.mkdir(parents=True, exist_ok=True)
    classifier.save(arguments.output)
    classifier = LinearClassifier.load(arguments.output)
    scores, likely = classifier.scores(test), classifier.probabilities(test)
    guessed = scores.argmax(axis=1)
    others = [
        classifier.probabilities(
            [t for path in sorted((arguments.data / folder).glob("*.jsonl.gz")) for t in read_documents(path)]
        ).max(axis=1)
        for folder in ("target_math", "target_code")
    ]
    correct = (guessed == right).astype(np.float64)
    card = CARD.format(
        buckets=BUCKETS,
        size=(arguments.output / "model.safetensors").stat().st_size / 1e6,
        trained=len(train),
        per_topic=PER_TOPIC,
        held_out=len(test),
        accuracy=correct.mean(),
        full=float(np.mean(model.predict(matrix(test, idf)) == right)),
        chance=float(np.bincount(right).max() / len(right)),
        top3=float(np.mean([r in s.argsort()[-3:] for s, r in zip(scores, right, strict=True)])),
        characters=MOST_CHARACTERS,
        temperature=classifier.temperature,
        tested=int((~fit).sum()),
        ece=calibration_error(likely[~fit].max(axis=1), correct[~fit]),
        coverage=coverage_table(likely[~fit].max(axis=1), correct[~fit], others),
        by_topic=topic_table(right, guessed),
    )
    (arguments.output / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
