"""Documents that should not be trained on: too short, repeated, of low quality, or holding a benchmark's questions.

The reasons, in the order in which they are checked; a document is counted under the first that applies:

- ``length``: fewer or more characters than allowed.
- ``exact duplicate``: the text of an earlier document, whatever its white space.
- ``contaminated``: 13 consecutive words of a question with its answer (arXiv 2005.14165, appendix C); of a shorter one
  of at least 8 words, all words.
- ``quality``: the label of a quality classifier.
- ``near duplicate``: MinHash similarity of its 5-word shingles to those of an earlier document that is kept
  (datasketch).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dmagent_loader._validation import is_finite_number, shown
from dmagent_loader.errors import ConfigurationError, require_extra
from dmagent_loader.labelling.classifier import Classifier
from dmagent_loader.shards.inputs.documents import Document

LENGTH, EXACT, NEAR = "length", "exact duplicate", "near duplicate"
CONTAMINATED, QUALITY = "contaminated", "quality"
REASONS = (LENGTH, EXACT, CONTAMINATED, QUALITY, NEAR)

NGRAM, SHORTEST_QUESTION = 13, 8
"""Words of a question that make a document contaminated; words of the shortest question that is looked for."""
SHINGLE = 5
_PERMUTATIONS = 128
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
        dropped_quality: Labels of the quality classifier that are dropped.

    Raises:
        ConfigurationError: A setting cannot work.
    """

    min_characters: int = 0
    max_characters: int | None = None
    exact_duplicates: bool = True
    near_duplicates: float | None = None
    dropped_quality: tuple[str, ...] = ("Low",)

    def __post_init__(self) -> None:
        if self.max_characters is not None and self.max_characters < max(1, self.min_characters):
            raise ConfigurationError(
                f"max_characters is {self.max_characters} and min_characters {self.min_characters}: no document fits"
            )
        near = self.near_duplicates
        if near is not None and (not is_finite_number(near) or not 0 < near <= 1):
            raise ConfigurationError(f"near_duplicates is {shown(near)}; it must be a similarity, such as 0.8")


class DocumentFilter:
    """Finds the documents to drop. It remembers all documents that it has kept, so that repeats are found.

    Memory: about 100 bytes for each document, and 8 KB with near duplicates.

    Args:
        config: Settings.
        questions: Questions with their answers, which no document may hold.
        quality: Classifier of quality; None: quality is not checked.

    Attributes:
        num_questions_checked: Questions that are long enough to be looked for.

    Raises:
        ConfigurationError: A dropped label is not one of the classifier.
        MissingExtraError: datasketch is not installed, and near duplicates are to be found.
    """

    def __init__(self, config: FilterConfig, questions: Iterable[str] = (), quality: Classifier | None = None) -> None:
        self.config = config
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
        self._seen: set[bytes] = set()
        self._near = None if config.near_duplicates is None else _NearDuplicates(config.near_duplicates)

    def reasons(self, documents: Sequence[Document]) -> list[str | None]:
        """The reason to drop each document; None: it is kept."""
        found = [self._reason(document.text) for document in documents]
        kept = [number for number, reason in enumerate(found) if reason is None]
        if self._quality is not None and kept:
            likely = self._quality.probabilities([documents[number].text for number in kept])
            for number, label in zip(kept, likely.argmax(axis=1), strict=True):
                if self._quality.labels[int(label)] in self.config.dropped_quality:
                    found[number] = QUALITY
        if self._near is not None:
            for number in kept:
                if found[number] is None and self._near.is_repeated(_words(documents[number].text)):
                    found[number] = NEAR
        return found

    def recall(self, documents: Sequence[Document], reasons: Sequence[str | None]) -> None:
        """Remembers documents for which `reasons` was called in an earlier process.

        Args:
            documents: The documents.
            reasons: What it returned.
        """
        for document, reason in zip(documents, reasons, strict=True):
            if self.config.exact_duplicates and reason != LENGTH:
                self._seen.add(_digest(document.text))
            if self._near is not None and reason is None:
                self._near.remember(_words(document.text))

    def _reason(self, text: str) -> str | None:
        longest = self.config.max_characters
        if len(text) < self.config.min_characters or (longest is not None and len(text) > longest):
            return LENGTH
        if self.config.exact_duplicates:
            digest = _digest(text)
            if digest in self._seen:
                return EXACT
            self._seen.add(digest)
        words = _words(text) if self._grams else []
        if any(not grams.isdisjoint(_ngrams(words, length)) for length, grams in self._grams.items()):
            return CONTAMINATED
        return None


class _NearDuplicates:
    """The documents seen so far, by MinHash with locality-sensitive hashing."""

    def __init__(self, similarity: float) -> None:
        datasketch = require_extra("datasketch", "label")
        self._similarity = similarity
        self._make: Any = datasketch.MinHash
        self._index: Any = datasketch.MinHashLSH(
            threshold=min(similarity, _MAX_INDEX_THRESHOLD), num_perm=_PERMUTATIONS
        )
        self._hashes: list[Any] = []

    def is_repeated(self, words: Sequence[str]) -> bool:
        """Whether an earlier document is as similar; if not, this one is remembered."""
        found = self._hash(words)
        if found is None:
            return False
        # The index returns candidates; their similarity is estimated from all of their hashes.
        if any(self._hashes[number].jaccard(found) >= self._similarity for number in self._index.query(found)):
            return True
        self._insert(found)
        return False

    def remember(self, words: Sequence[str]) -> None:
        """Remembers a document that is kept."""
        found = self._hash(words)
        if found is not None:
            self._insert(found)

    def _hash(self, words: Sequence[str]) -> Any:
        """MinHash of the shingles; None if there are none."""
        shingles = {gram.encode("utf-8", "replace") for gram in _ngrams(words, min(SHINGLE, len(words)))}
        if not shingles:
            return None
        found = self._make(num_perm=_PERMUTATIONS, seed=1)
        found.update_batch(shingles)
        return found

    def _insert(self, found: Any) -> None:
        self._index.insert(len(self._hashes), found)
        self._hashes.append(found)


def _digest(text: str) -> bytes:
    """16 bytes that are the same for texts that differ in white space only."""
    return hashlib.blake2b(" ".join(text.split()).encode("utf-8", "replace"), digest_size=16).digest()


def counts_text(counts: Counter[str | None]) -> str:
    """The counts of reasons, for a line of a summary."""
    dropped = ", ".join(f"{counts[reason]:,} {reason}" for reason in REASONS if counts[reason])
    return f"{counts[None]:,} of {counts.total():,} kept" + (f"; dropped: {dropped}" if dropped else "")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _ngrams(words: Sequence[str], length: int) -> list[str]:
    return [" ".join(words[i : i + length]) for i in range(len(words) - length + 1)] if length else []
