"""Documents that should not be trained on: too short, repeated, of low quality, or holding a benchmark's questions.

The reasons, in the order in which they are checked; a document is counted under the first that applies:

- ``length``: fewer or more characters than allowed.
- ``exact duplicate``: the text of an earlier document, whatever its white space.
- ``contaminated``: 13 consecutive words of a question with its answer (arXiv 2005.14165, appendix C); of a shorter one
  of at least 8 words, all words.
- ``quality``: the label that a document carries, or else that of a quality classifier.
- ``near duplicate``: MinHash similarity of its 5-word shingles to those of an earlier document that is kept
  (datasketch).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dmagent_loader._validation import is_finite_number, shown
from dmagent_loader.errors import ConfigurationError, require_extra
from dmagent_loader.labelling.classifier import Classifier
from dmagent_loader.labelling.taxonomy import value_at
from dmagent_loader.shards.inputs.documents import Document

LENGTH, EXACT, NEAR = "length", "exact duplicate", "near duplicate"
CONTAMINATED, QUALITY = "contaminated", "quality"
BAD_RECORD = "bad record"
"""A record that is not a document; it is not examined."""
REASONS = (LENGTH, EXACT, CONTAMINATED, QUALITY, NEAR)

NGRAM, SHORTEST_QUESTION = 13, 8
"""Words of a question that make a document contaminated; words of the shortest question that is looked for."""
SHINGLE = 5
_PERMUTATIONS, _DIGEST_BYTES = 128, 16
_MAX_INDEX_THRESHOLD = 0.9
"""Similarity from which the index finds candidates at the latest; it cannot be built for similarities near 1."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Settings of a filter.

    Args:
        min_characters: Least number of characters.
        max_characters: Largest number of characters; None: no limit.
        exact_duplicates: Whether to drop exact duplicates.
        near_duplicates: Least Jaccard similarity of near duplicates, estimated by MinHash; None: they are kept.
        dropped_quality: Labels of quality that are dropped, in upper or lower case; numbers are compared as text.
        quality_key: Column with the quality of a document, such as ``quality_pred`` of NeMo Curator; dots lead into
            nested columns. Only documents without one are classified.

    Raises:
        ConfigurationError: A setting cannot work.
    """

    min_characters: int = 0
    max_characters: int | None = None
    exact_duplicates: bool = True
    near_duplicates: float | None = None
    dropped_quality: tuple[str, ...] = ("Low",)
    quality_key: str | None = None

    def __post_init__(self) -> None:
        if self.max_characters is not None and self.max_characters < max(1, self.min_characters):
            raise ConfigurationError(
                f"max_characters is {self.max_characters} and min_characters {self.min_characters}: no document fits"
            )
        near = self.near_duplicates
        if near is not None and (not is_finite_number(near) or not 0 < near <= 1):
            raise ConfigurationError(f"near_duplicates is {shown(near)}; it must be a similarity, such as 0.8")


@dataclass(frozen=True)
class Examined:
    """What was found of n documents without looking at others.

    Attributes:
        codes: (n,) uint8, 0, or 1 + the index in `REASONS` of the first reason that was found.
        digests: (n, 16), of the texts; of documents of the wrong length, zeros. (0, 16) if exact duplicates are kept.
        sketches: (n, 128) values of MinHash; of documents with a reason, zeros. (0, 128) if near duplicates are kept.
    """

    codes: npt.NDArray[np.uint8]
    digests: npt.NDArray[np.uint8]
    sketches: npt.NDArray[np.unsignedinteger[Any]]


class DocumentChecks:
    """The part of a filter that looks at each document by itself. It can be pickled.

    Args:
        config: Settings.
        questions: Questions with their answers, which no document may hold.
        quality: Classifier of quality; None: quality is not checked.

    Attributes:
        config: Settings.
        num_questions_checked: Questions that are long enough to be looked for.
        identity: JSON values that change if other reasons may be found.

    Raises:
        ConfigurationError: A dropped label is not one of the classifier.
        MissingExtraError: datasketch is not installed, and near duplicates are to be found.
    """

    def __init__(self, config: FilterConfig, questions: Iterable[str] = (), quality: Classifier | None = None) -> None:
        self.config = config
        questions = list(questions)
        self.identity: dict[str, Any] = {
            "questions": hashlib.sha256(json.dumps(questions).encode()).hexdigest(),
            "quality classifier": None if quality is None else quality.name,
            **asdict(config),
        }
        self._quality = quality
        if quality is not None:
            unknown = [label for label in config.dropped_quality if label not in quality.labels]
            if unknown:
                raise ConfigurationError(
                    f"the labels to drop {unknown} are not among those of {quality.name}: {list(quality.labels)}"
                )
        self._grams: dict[int, set[str]] = {}
        self.num_questions_checked = 0
        for question in questions:
            words = _words(question)
            if len(words) >= SHORTEST_QUESTION:
                self.num_questions_checked += 1
                length = min(len(words), NGRAM)
                self._grams.setdefault(length, set()).update(_ngrams(words, length))
        self._sketch = _empty_sketch() if config.near_duplicates is not None else None

    def examine(self, documents: Sequence[Document], seen: Collection[bytes] = ()) -> Examined:
        """Examines documents.

        Args:
            documents: The documents.
            seen: Digests of earlier documents. Their repeats are not classified.
        """
        codes, digests = np.zeros(len(documents), np.uint8), np.zeros((len(documents), _DIGEST_BYTES), np.uint8)
        found: set[bytes] = set()
        for number, document in enumerate(documents):
            reason = self._length(document.text)
            if reason is None and self.config.exact_duplicates:
                digest = _digest(document.text)
                digests[number] = np.frombuffer(digest, np.uint8)
                if digest in seen or digest in found:
                    reason = EXACT
                found.add(digest)
            if reason is None and self._is_contaminated(document.text):
                reason = CONTAMINATED
            codes[number] = _code(reason)
        kept = np.flatnonzero(codes == 0).tolist()
        dropped = {label.casefold() for label in self.config.dropped_quality}
        for number, label in zip(kept, self.qualities([documents[number] for number in kept]), strict=True):
            if str(label).casefold() in dropped:
                codes[number] = _code(QUALITY)
        if not self.config.exact_duplicates:
            digests = digests[:0]
        return Examined(codes, digests, self._sketches(documents, codes))

    def qualities(self, documents: Sequence[Document]) -> list[Any]:
        """The quality of each document; None: it is not known."""
        labels = [self.stated_quality(document) for document in documents]
        unknown = [number for number, label in enumerate(labels) if label is None]
        if self._quality is not None and unknown:
            likely = self._quality.probabilities([documents[number].text for number in unknown])
            for number, label in zip(unknown, likely.argmax(axis=1), strict=True):
                labels[number] = self._quality.labels[int(label)]
        return labels

    def check_quality_key(self, domain: str, documents: Sequence[Document]) -> None:
        """Checks that documents have the column `quality_key`, if there is no classifier.

        Raises:
            ConfigurationError: None has it.
        """
        key = self.config.quality_key
        if key is None or self._quality is not None or not documents:
            return
        if all(self.stated_quality(document) is None for document in documents):
            raise ConfigurationError(
                f"none of the first {len(documents)} documents of domain {domain!r} has a quality in the column "
                f"{key!r} (--quality-key); the columns of {documents[0].origin} are "
                f"{shown(sorted(documents[0].columns))}: correct the column, or name a classifier (--quality)"
            )

    def stated_quality(self, document: Document) -> Any:
        """The quality that a document carries; None: it carries none."""
        key = self.config.quality_key
        return None if key is None else value_at(document.columns, key)

    def _length(self, text: str) -> str | None:
        longest = self.config.max_characters
        is_short = len(text) < self.config.min_characters
        return LENGTH if is_short or (longest is not None and len(text) > longest) else None

    def _is_contaminated(self, text: str) -> bool:
        words = _words(text) if self._grams else []
        return any(not grams.isdisjoint(_ngrams(words, length)) for length, grams in self._grams.items())

    def _sketches(
        self, documents: Sequence[Document], codes: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.unsignedinteger[Any]]:
        if self._sketch is None:
            return np.zeros((0, _PERMUTATIONS), np.uint32)
        result = np.zeros((len(documents), _PERMUTATIONS), self._sketch.hashvalues.dtype)
        for number in np.flatnonzero(codes == 0).tolist():
            words = _words(documents[number].text)
            shingles = {gram.encode("utf-8", "replace") for gram in _ngrams(words, min(SHINGLE, len(words)))}
            sketch = self._sketch.copy()
            if shingles:
                sketch.update_batch(shingles)
            result[number] = sketch.hashvalues
        return result


class DocumentFilter:
    """Finds the documents to drop. It remembers all documents that it has kept, so that repeats are found.

    Memory: about 100 bytes for each document, and 7 KB with near duplicates.

    Args:
        config: Settings.
        questions: Questions with their answers, which no document may hold.
        quality: Classifier of quality; None: quality is not checked.

    Attributes:
        checks: The checks of single documents.
        num_questions_checked: Questions that are long enough to be looked for.

    Raises:
        ConfigurationError: A dropped label is not one of the classifier.
        MissingExtraError: datasketch is not installed, and near duplicates are to be found.
    """

    def __init__(self, config: FilterConfig, questions: Iterable[str] = (), quality: Classifier | None = None) -> None:
        self.checks = DocumentChecks(config, questions, quality)
        self.num_questions_checked = self.checks.num_questions_checked
        self._seen: set[bytes] = set()
        self._near = None if config.near_duplicates is None else _NearDuplicates(config.near_duplicates)

    def reasons(self, documents: Sequence[Document]) -> list[str | None]:
        """The reason to drop each document; None: it is kept."""
        return self.decide(self.checks.examine(documents, self._seen))

    def decide(self, found: Examined) -> list[str | None]:
        """The reason to drop each document, from what `DocumentChecks.examine` found; None: it is kept."""
        reasons: list[str | None] = []
        for number, code in enumerate(found.codes.tolist()):
            reason = REASONS[code - 1] if code else None
            if len(found.digests) and reason not in (LENGTH, EXACT):
                digest = found.digests[number].tobytes()
                if digest in self._seen:
                    reason = EXACT
                self._seen.add(digest)
            if reason is None and self._near is not None and self._near.is_repeated(found.sketches[number]):
                reason = NEAR
            reasons.append(reason)
        return reasons


class _NearDuplicates:
    """The documents seen so far, by MinHash with locality-sensitive hashing."""

    def __init__(self, similarity: float) -> None:
        datasketch = require_extra("datasketch", "label")
        self._similarity = similarity
        self._index: Any = datasketch.MinHashLSH(
            threshold=min(similarity, _MAX_INDEX_THRESHOLD), num_perm=_PERMUTATIONS
        )
        self._empty = _empty_sketch()
        self._sketches: list[npt.NDArray[np.unsignedinteger[Any]]] = []

    def is_repeated(self, values: npt.NDArray[np.unsignedinteger[Any]]) -> bool:
        """Whether an earlier document is as similar; if not, this one is remembered."""
        if (values == self._empty.hashvalues).all():
            return False  # no words
        sketch = self._empty.copy()
        sketch.hashvalues = values
        # The index returns candidates; their similarity is estimated from all of their values.
        if any((self._sketches[number] == values).mean() >= self._similarity for number in self._index.query(sketch)):
            return True
        self._index.insert(len(self._sketches), sketch)
        self._sketches.append(values)
        return False


def counts_text(counts: Counter[str | None]) -> str:
    """The counts of reasons, for a line of a summary."""
    dropped = ", ".join(f"{counts[reason]:,} {reason}" for reason in (*REASONS, BAD_RECORD) if counts[reason])
    return f"{counts[None]:,} of {counts.total():,} kept" + (f"; dropped: {dropped}" if dropped else "")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _ngrams(words: Sequence[str], length: int) -> list[str]:
    return [" ".join(words[i : i + length]) for i in range(len(words) - length + 1)] if length else []


def _digest(text: str) -> bytes:
    """Digest of a text, whatever its white space."""
    return hashlib.blake2b(" ".join(text.split()).encode("utf-8", "replace"), digest_size=_DIGEST_BYTES).digest()


def _empty_sketch() -> Any:
    return require_extra("datasketch", "label").MinHash(num_perm=_PERMUTATIONS, seed=1)


def _code(reason: str | None) -> int:
    return 0 if reason is None else 1 + REASONS.index(reason)
