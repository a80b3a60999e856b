"""Topic classifier: linear over hashed words, small enough to ship with the package.

score(topic | text) = w_topic . x + b_topic, with x_j proportional to (1 + log count_j) idf_j and |x| = 1. A word's
bucket j is derived from its CRC-32, so no vocabulary is stored. Weights are 8-bit integers with one scale per topic.
Probabilities are softmax(score / temperature), with the temperature that fits held-out documents (arXiv 1706.04599).

Shapes: T topics, H buckets, n texts.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from dmagent_loader._validation import read_regular, shown
from dmagent_loader.errors import CheckpointError, ConfigurationError
from dmagent_loader.mixture.domains import CANONICAL_TOPICS
from dmagent_loader.mixture.simplex import FloatArray, IntArray

WEIGHTS_FILE = "model.safetensors"
BUNDLED = "topics"
MOST_CHARACTERS = 2000
"""Number of leading characters read from each text, in training and in use."""

MAX_BYTES = 32 << 20

_WORD = re.compile(r"\w\w+")


@dataclass(frozen=True, kw_only=True)
class LinearClassifier:
    """Classifies texts into the 26 canonical topics.

    Args:
        weights: (T, H) int8, quantised weights.
        scales: (T,), value of a quantised weight of 1.
        bias: (T,), bias of each topic.
        idf: (H,), log(texts / texts with a word of the bucket), smoothed; 0 for buckets not seen in training.
        temperature: Divisor of the scores before the softmax.
        name: See `labelling.Classifier`.
    """

    weights: npt.NDArray[np.int8]
    scales: FloatArray
    bias: FloatArray
    idf: FloatArray
    temperature: float = 1.0
    name: str = "linear"

    def __post_init__(self) -> None:
        topics, buckets = len(CANONICAL_TOPICS), len(self.idf)
        shapes = (self.weights.shape, self.scales.shape, self.bias.shape, self.idf.shape)
        if shapes != ((topics, buckets), (topics,), (topics,), (buckets,)) or self.weights.dtype != np.int8:
            raise CheckpointError(
                f"a topic classifier has weights {shapes[0]} of {self.weights.dtype}, scales {shapes[1]}, bias "
                f"{shapes[2]} and idf {shapes[3]}; expected int8 weights of ({topics}, buckets) and matching shapes"
            )
        if not (
            all(np.isfinite(a).all() for a in (self.scales, self.bias, self.idf)) and 0 < self.temperature < np.inf
        ):
            raise CheckpointError("a topic classifier holds numbers that are not finite: its file is damaged")

    @classmethod
    def bundled(cls) -> LinearClassifier:
        """Loads the bundled classifier; its model card describes its training data and accuracy.

        Raises:
            CheckpointError: The classifier is missing from this installation.
        """
        package = Path(__file__).resolve().parents[1]
        for root in (package / "agent_checkpoints", package.parent / "agent_checkpoints"):
            if (root / BUNDLED / WEIGHTS_FILE).is_file():
                return cls.load(root / BUNDLED)
        raise CheckpointError(
            f"the topic classifier agent_checkpoints/{BUNDLED} is missing from this installation: reinstall the "
            "package, or pass a LinearClassifier of your own"
        )

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> LinearClassifier:
        """Loads a classifier written by `save`.

        Raises:
            CheckpointError: The file cannot be read, or its contents are not valid.
        """
        path = Path(directory) / WEIGHTS_FILE
        try:
            data = read_regular(path, MAX_BYTES)
            found = safetensors.numpy.load(data)
            numbers = {name: found[name].astype(np.float64) for name in ("scales", "bias", "idf")}
            temperature = float(found["temperature"][0])
            name = f"linear ({hashlib.sha256(data).hexdigest()[:12]})"
            return cls(weights=found["weights"], **numbers, temperature=temperature, name=name)
        except (OSError, LookupError, ValueError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"the topic classifier {path} cannot be read ({error}): copy it again") from error

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `WEIGHTS_FILE` to an existing directory."""
        arrays = {
            "weights": self.weights,
            "scales": self.scales.astype(np.float32),
            "bias": self.bias.astype(np.float32),
            "idf": self.idf.astype(np.float16),
            "temperature": np.array([self.temperature], np.float32),
        }
        safetensors.numpy.save_file(arrays, Path(directory) / WEIGHTS_FILE)

    @property
    def labels(self) -> tuple[str, ...]:
        """The canonical topics."""
        return CANONICAL_TOPICS

    def probabilities(self, texts: Sequence[str]) -> FloatArray:
        """Calibrated probability of each topic of each text: (n, T), rows sum to 1."""
        scaled = self.scores(texts) / self.temperature
        powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True), dtype=np.float64)

    def scores(self, texts: Sequence[str]) -> FloatArray:
        """Log-odds of each topic against the rest: (n, T)."""
        found = np.tile(self.bias, (len(texts), 1))
        for row, text in enumerate(texts):
            buckets, values = features(text, self.idf)
            found[row] += (self.weights[:, buckets].astype(np.float64) @ values) * self.scales
        return found

    def predict(self, texts: Sequence[str]) -> IntArray:
        """Most likely topic of each text, as an index into `CANONICAL_TOPICS`: (n,)."""
        return np.asarray(self.scores(texts).argmax(axis=1), dtype=np.int64)

    def shares(self, texts: Sequence[str]) -> FloatArray:
        """Share of the texts on each topic: (T,), sums to 1.

        Raises:
            ConfigurationError: There are no texts.
        """
        if isinstance(texts, str) or not len(texts):
            raise ConfigurationError(f"the texts are {shown(texts)}: give one or more texts to count topics in")
        counts = np.bincount(self.predict(texts), minlength=len(CANONICAL_TOPICS))
        return np.asarray(counts / counts.sum(), dtype=np.float64)


def features(text: str, idf: FloatArray) -> tuple[IntArray, FloatArray]:
    """Buckets of a text's words and their values, normalised to Euclidean length 1 unless the text has no words."""
    counts = bucket_counts(text, len(idf))
    buckets = np.fromiter(counts, dtype=np.int64, count=len(counts))
    values = np.array([1.0 + math.log(count) for count in counts.values()]) * idf[buckets]
    length = float(np.sqrt((values**2).sum()))
    return buckets, values / length if length > 0 else values


def bucket_counts(text: str, buckets: int) -> Mapping[int, int]:
    """Word count per bucket in the first `MOST_CHARACTERS` characters of a text."""
    words: Iterable[str] = _WORD.findall(text[:MOST_CHARACTERS].lower())
    return Counter(zlib.crc32(word.encode("utf-8", "replace")) % buckets for word in words)
