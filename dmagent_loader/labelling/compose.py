"""The composition of a domain over the 26 topics, from a random sample that is as large as it needs to be.

The shares of a sample of n documents deviate from those of the domain by an expected total variation of
sum_k sqrt(p_k (1 - p_k) / (2 pi n)), from the normal approximation of each share; without replacement from N documents,
times sqrt((N - n) / (N - 1)). Intervals are Wilson's, for n (N - 1) / (N - n) documents. Both are about sampling only:
neither knows of the classifier's own errors.

Shapes: T = 26 canonical topics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tqdm.auto import tqdm

from dmagent_loader._validation import is_finite_number, shown
from dmagent_loader.errors import ConfigurationError, ShardError
from dmagent_loader.labelling.labels import Labeller, batches
from dmagent_loader.mixture.domains import CANONICAL_TOPICS, NUM_TOPICS
from dmagent_loader.mixture.hashing import scatter, stream_key
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.shards.compositions import Composition
from dmagent_loader.shards.inputs.documents import Document

FIRST_DOCUMENTS = 400
"""Documents of a sample before it is known how many are needed."""
MAX_ERROR = 0.05
"""Total variation, that is the largest part of a mix that can end up in a wrong topic."""
_Z = 1.959964
"""Quantile of the normal distribution for intervals of 95%."""
_BATCH = 1024


class Sampled(Protocol):
    """Documents that can be read by position."""

    @property
    def size(self) -> int: ...

    def rows(self, positions: Sequence[int]) -> Iterable[Document]: ...


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Size of a sample.

    Args:
        max_error: Expected total variation between the shares of the sample and those of all documents.
        most_documents: Largest sample; None: no limit.
        seed: Seed of the sample.

    Raises:
        ConfigurationError: `max_error` is not between 0 and 1, or `most_documents` is less than 1.
    """

    max_error: float = MAX_ERROR
    most_documents: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_finite_number(self.max_error) or not 0 < self.max_error < 1:
            raise ConfigurationError(
                f"max_error is {shown(self.max_error)}; it must lie between 0 and 1, such as {MAX_ERROR}"
            )
        if self.most_documents is not None and self.most_documents < 1:
            raise ConfigurationError(f"most_documents is {self.most_documents}; it must be at least 1")


def compose(
    name: str,
    documents: Sampled,
    labeller: Labeller,
    config: SampleConfig | None = None,
    *,
    shards: str = "",
    progress: bool = True,
) -> Composition:
    """Measures the composition of a domain on a random sample of its documents.

    Args:
        name: Name of the domain, for messages.
        documents: Documents of the domain.
        labeller: Classifier and settings.
        config: Size of the sample.
        shards: Digest of the domain's shards.
        progress: Show a progress bar.

    Raises:
        ShardError: There are no documents, or none of the sample has a topic.
    """
    config = config or SampleConfig()
    size = documents.size

    def draw(start: int, end: int) -> Iterable[Document]:
        return documents.rows(random_rows(name, size, start, end, config.seed))

    return measure(name, draw, size, labeller, config, shards=shards, progress=progress)


def random_rows(name: str, size: int, start: int, end: int, seed: int) -> list[int]:
    """Rows number `start` to `end` of a random order of `size` rows, in ascending order.

    Args:
        name: Name of the domain, which is part of the seed.
        size: Number of rows of the domain.
        start, end: Numbers in the random order.
        seed: Seed of the order.
    """
    numbers = np.arange(start, end)
    key = np.full(len(numbers), stream_key(seed, "sample", name), dtype=np.uint64)
    return sorted(scatter(key, numbers, np.full(len(numbers), size)).tolist())


def measure(
    name: str,
    draw: Callable[[int, int], Iterable[Document]],
    size: float,
    labeller: Labeller,
    config: SampleConfig,
    *,
    shards: str = "",
    progress: bool = True,
) -> Composition:
    """Draws documents until the expected error of their shares is small enough; see `compose`.

    Args:
        name: Name of the domain, for messages.
        draw: Function from two numbers to the documents of a random order between them; called in that order.
        size: Number of all documents; infinite for generated texts.
        labeller: Classifier and settings.
        config: Size of the sample.
        shards: Digest of the domain's shards.
        progress: Show a progress bar.

    Raises:
        ShardError: There are no documents, or none of the sample has a topic.
    """
    most = size if config.most_documents is None else min(size, config.most_documents)
    counts, taken, sure, stated = np.zeros(NUM_TOPICS), 0, 0, 0
    wanted, needed = int(min(most, FIRST_DOCUMENTS)), most
    with tqdm(total=wanted, unit="doc", desc=f"composing {name}", disable=not progress) as bar:
        while taken < wanted:
            for batch in batches(draw(taken, wanted), _BATCH):
                labels = labeller.label(batch)
                counts += labels.shares.sum(axis=0)
                sure += int(labels.shares.any(axis=1).sum())
                stated += int(labels.stated.sum())
                bar.update(len(batch))
            taken = wanted
            if sure:
                needed = math.ceil(
                    needed_sample(_smoothed(counts), size * sure / taken, config.max_error) * taken / sure
                )
                # At most four times as many, because the shares of a small sample are rough.
                wanted = int(min(most, max(taken, min(needed, 4 * taken))))
                bar.total = wanted
    if not taken:
        raise ShardError(f"{name!r} holds no documents: check its inputs")
    if not sure:
        raise ShardError(
            f"{name!r}: none of {taken} documents has a topic with confidence {labeller.config.min_confidence}, "
            f"because they are unlike those that {labeller.classifier.name} knows: use another one (--classifier), a "
            "lower --min-confidence, or state the composition yourself (compositions=)"
        )
    shares = counts / counts.sum()
    present = np.flatnonzero(counts)
    known = size * sure / taken
    left = _left(sure, known)
    low, high = wilson(shares, sure / left if left else math.inf)
    return Composition(
        counts={CANONICAL_TOPICS[i]: round(float(counts[i]), 6) for i in present},
        intervals={CANONICAL_TOPICS[i]: (round(float(low[i]), 6), round(float(high[i]), 6)) for i in present},
        documents=taken,
        unsure=taken - sure,
        stated=stated,
        error=round(expected_error(_smoothed(counts), sure, known), 6),
        documents_needed=int(min(size, needed)),
        classifier=labeller.classifier.name,
        shards=shards,
    )


def expected_error(shares: FloatArray, sample: float, size: float) -> float:
    """Expected total variation between the shares of a sample and those of all documents.

    Args:
        shares: (T,), sums to 1.
        sample: Number of documents in the sample.
        size: Number of all documents; may be infinite.
    """
    return float(np.sqrt(shares * (1 - shares) / (2 * np.pi * sample)).sum() * math.sqrt(_left(sample, size)))


def _left(sample: float, size: float) -> float:
    """Finite-population correction of a variance: 1 for a small part of all documents, 0 if all were read."""
    return 1.0 if math.isinf(size) else max(0.0, (size - sample) / max(1.0, size - 1))


def _smoothed(counts: FloatArray) -> FloatArray:
    """Shares with one more document, spread over all topics: a sample of one topic does not prove that it is alone."""
    return np.asarray((counts + 1 / NUM_TOPICS) / (counts.sum() + 1), dtype=np.float64)


def needed_sample(shares: FloatArray, size: float, max_error: float) -> float:
    """Number of documents at which `expected_error` is `max_error`; at most `size`."""
    infinite = float(np.sqrt(shares * (1 - shares) / (2 * np.pi)).sum() / max_error) ** 2
    if math.isinf(size):
        return infinite
    return infinite * size / (size - 1 + infinite) if size > 1 else size


def wilson(shares: FloatArray, sample: float) -> tuple[FloatArray, FloatArray]:
    """Lower and upper ends of Wilson's intervals of shares, at 95%: (T,) each."""
    centre = shares + _Z**2 / (2 * sample)
    half = _Z * np.sqrt(shares * (1 - shares) / sample + (_Z / (2 * sample)) ** 2)
    scale = 1 + _Z**2 / sample
    return np.maximum(0.0, (centre - half) / scale), np.minimum(1.0, (centre + half) / scale)
