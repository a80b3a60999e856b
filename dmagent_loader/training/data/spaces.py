"""Domain spaces over the text of a corpus: its 52 domains, or unnamed ones of any number, merged, split or clustered.

A space says which rows each of its domains holds, and how often each row comes in the natural mix. The natural mix is
that of the 52 domains in every space, so runs on it differ in the order of their rows only.

Shapes: D domains, N rows of `Space.row_tokens` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dmagent_loader.errors import require_extra
from dmagent_loader.mixture.domains import FIELDS, NUM_CANONICAL, NUM_TOPICS, SOURCE, TARGET, DomainSpace
from dmagent_loader.mixture.simplex import FloatArray, IntArray
from dmagent_loader.training.data.corpus import Corpus

ROW_TOKENS = 128
"""Tokens of a row, unless another number is given."""
END = 0
"""Token at the end of a document."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """Rows by domain.

    Args:
        name: Of the space.
        tokens: Text of all rows.
        starts: (N,), position in `tokens` where each row starts.
        domains: (N,), number of the domain of each row.
        weights: (N,), share of each row in the natural mix of its field.
        canonical: (N,), number of the one of the 52 domains that each row is from.
        names: Names of the domains: (D,).
        fields: Field of each domain: (D,).
        row_tokens: Tokens of a row; it is read with one more token, the last to be predicted.
    """

    name: str
    tokens: npt.NDArray[np.uint16]
    starts: IntArray
    domains: IntArray
    weights: FloatArray
    canonical: IntArray
    names: tuple[str, ...]
    fields: tuple[str, ...]
    row_tokens: int = ROW_TOKENS

    @property
    def domain_space(self) -> DomainSpace:
        """The domains as policies see them."""
        return DomainSpace.from_names(self.names)

    def natural(self, target_share: float = 0.5) -> FloatArray:
        """Natural mix, with some weight on the target field: (D,)."""
        within = np.bincount(self.domains, weights=self.weights, minlength=len(self.fields))
        share = {SOURCE: 1 - target_share, TARGET: target_share}
        mix = np.array([share[field] for field in self.fields]) * within
        return np.asarray(mix / mix.sum(), dtype=np.float64)

    @property
    def num_rows(self) -> IntArray:
        """Number of rows of each domain: (D,)."""
        return np.bincount(self.domains, minlength=len(self.fields))

    def mix_of(self, canonical: FloatArray) -> FloatArray:
        """The mix of this space that reads a mix of the 52 domains, as far as these hold rows: (52,) -> (D,)."""
        within = np.bincount(self.canonical, weights=self.weights, minlength=NUM_CANONICAL)
        per_row = (
            self.weights * np.divide(canonical, within, out=np.zeros(NUM_CANONICAL), where=within > 0)[self.canonical]
        )
        mix = np.bincount(self.domains, weights=per_row, minlength=len(self.fields))
        return np.asarray(mix / mix.sum(), dtype=np.float64)

    def selected(self, rows: npt.NDArray[np.bool_]) -> Space:
        """The space with some of its rows: (N,) mask. A domain that loses all of them stays, without rows."""
        return replace(
            self,
            starts=self.starts[rows],
            domains=self.domains[rows],
            weights=self.weights[rows],
            canonical=self.canonical[rows],
        )

    def rows(self, domain: int, most: int, number: int) -> npt.NDArray[np.int64]:
        """Rows of a domain for a probe: (rows, `row_tokens` + 1); a small domain has fewer than `most`."""
        return self.read(self.order(domain, number)[:most])

    def order(self, domain: int, number: int) -> IntArray:
        """Rows of a domain in the order of weighted draws without replacement."""
        members = np.flatnonzero(self.domains == domain)
        waits = np.random.default_rng([1, number, domain]).exponential(size=len(members)) / self.weights[members]
        return np.asarray(members[np.argsort(waits)], dtype=np.int64)

    def read(self, rows: IntArray) -> npt.NDArray[np.int64]:
        """Tokens of some rows: (R,) numbers -> (R, `row_tokens` + 1)."""
        return np.asarray(self.tokens[self.starts[rows][:, None] + np.arange(self.row_tokens + 1)], dtype=np.int64)


class SpaceRows:
    """Rows of a space for one mix after another, as `MixStream` reads those of the 52 domains.

    Args:
        space: The space.
        number: Of the stream; streams of one number read the same rows of a domain first.
        rows_per_step: R.
    """

    def __init__(self, space: Space, number: int, rows_per_step: int = 16) -> None:
        self._space, self._number, self._rows_per_step = space, number, rows_per_step
        self._step = 0
        self._orders: dict[int, IntArray] = {}
        self._taken = np.zeros(len(space.fields), dtype=np.int64)

    @property
    def taken(self) -> IntArray:
        """Rows of each domain that were read so far: (D,)."""
        return self._taken

    def next(self, mix: FloatArray) -> npt.NDArray[np.int64]:
        """Tokens of the next step under a mix: (D,) -> (R, `row_tokens` + 1)."""
        return self._space.read(self.draw(mix))

    def draw(self, mix: FloatArray) -> IntArray:
        """Numbers of the rows of the next step, (R,); counts of the domains by systematic sampling."""
        self._step += 1
        rng = np.random.default_rng([2, self._number, self._step])
        edges = np.cumsum(mix)
        points = (np.arange(self._rows_per_step) + rng.random()) / self._rows_per_step * edges[-1]
        drawn = rng.permutation(np.searchsorted(edges, points, side="right"))
        return np.array([self._next_row(int(domain)) for domain in drawn])

    def _next_row(self, domain: int) -> int:
        if domain not in self._orders:
            self._orders[domain] = self._space.order(domain, self._number)
        order = self._orders[domain]
        self._taken[domain] += 1
        return int(order[(self._taken[domain] - 1) % len(order)])


def merged(name: str, corpus: Corpus, group: IntArray) -> Space:
    """A space in which a domain holds one or more of the 52 domains.

    Args:
        name: Of the space.
        corpus: Tokens of the 52 domains.
        group: (52,), number of the domain that each of them goes to.
    """
    return _space(name, *_canonical_rows(corpus, group), corpus)


def canonical_space(corpus: Corpus) -> Space:
    """The 52 domains by their names, without those that hold no row."""
    names = DomainSpace.canonical().names
    space = _space("canonical", *_canonical_rows(corpus, np.arange(NUM_CANONICAL)), corpus)
    return replace(space, names=tuple(names[number] for number in np.unique(space.canonical)))


def _canonical_rows(corpus: Corpus, group: IntArray) -> tuple[npt.NDArray[np.uint16], IntArray, IntArray, IntArray]:
    """Text, starts of the rows, and their canonical domains and groups."""
    available = np.maximum(corpus.num_tokens - 1, 0) // ROW_TOKENS
    canonical = np.repeat(np.arange(NUM_CANONICAL), available)
    offsets = np.concatenate([np.arange(count) * ROW_TOKENS for count in available])
    return corpus.tokens, corpus.bounds[canonical] + offsets, canonical, group[canonical]


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Documents of the corpus with a token or more.

    Args:
        corpus: The corpus.
        bounds: (documents, 2), positions of the start and the end of each.
        canonical: (documents,), number of the one of the 52 domains that it is from.
    """

    corpus: Corpus
    bounds: IntArray
    canonical: IntArray

    @classmethod
    def of(cls, corpus: Corpus) -> Documents:
        """Documents end in `END`; the last one of a domain may be cut."""
        bounds, canonical = [], []
        for domain in range(NUM_CANONICAL):
            start, end = corpus.bounds[domain], corpus.bounds[domain + 1]
            ends = start + np.flatnonzero(corpus.tokens[start:end] == END) + 1
            edges = np.unique([start, *ends, end])
            bounds += list(pairwise(edges))
            canonical += [domain] * (len(edges) - 1)
        return cls(corpus=corpus, bounds=np.array(bounds), canonical=np.array(canonical))

    def parts(self, count: int, seed: int = 8) -> IntArray:
        """A random one of some parts of the document's domain, as one number: (documents,)."""
        return self.canonical * count + np.random.default_rng(seed).integers(count, size=len(self.canonical))

    def clusters(self, counts: Mapping[str, int]) -> IntArray:
        """k-means over the words of the documents of each field, whatever their domains: (documents,).

        Args:
            counts: Field -> number of its clusters.
        """
        require_extra("sklearn", "rl")
        from sklearn.cluster import KMeans
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.preprocessing import normalize

        corpus = self.corpus
        texts = corpus.tokenizer().decode_batch([corpus.tokens[start:end].tolist() for start, end in self.bounds])
        labels, first = np.zeros(len(texts), dtype=np.int64), 0
        for position, field in enumerate(FIELDS):
            here = np.flatnonzero(self.canonical // NUM_TOPICS == position)
            words = TfidfVectorizer(sublinear_tf=True, max_features=20_000, min_df=3, stop_words="english")
            reduced = TruncatedSVD(64, random_state=0).fit_transform(words.fit_transform([texts[i] for i in here]))
            labels[here] = first + KMeans(counts[field], n_init=1, random_state=0).fit_predict(normalize(reduced))
            first += counts[field]
        return labels

    def space(self, name: str, labels: IntArray) -> Space:
        """A space in which the documents of one label, joined, are a domain; those without two full rows are left out.

        Args:
            name: Of the space.
            labels: (documents,), any numbers.
        """
        tokens, starts, canonical, domains, length = [], [], [], [], 0
        number = 0
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            joined = np.concatenate([self.corpus.tokens[slice(*self.bounds[i])] for i in members])
            owner = np.repeat(self.canonical[members], self.bounds[members, 1] - self.bounds[members, 0])
            rows = (len(joined) - 1) // ROW_TOKENS
            if rows < 2:
                continue
            tokens.append(joined)
            starts.append(length + np.arange(rows) * ROW_TOKENS)
            canonical.append(owner[np.arange(rows) * ROW_TOKENS])
            domains.append(np.full(rows, number))
            length, number = length + len(joined), number + 1
        return _space(
            name,
            np.concatenate(tokens),
            np.concatenate(starts),
            np.concatenate(canonical),
            np.concatenate(domains),
            self.corpus,
        )


def _space(
    name: str,
    tokens: npt.NDArray[np.uint16],
    starts: IntArray,
    canonical: IntArray,
    domains: IntArray,
    corpus: Corpus,
) -> Space:
    """Numbers the domains that hold rows; a row's weight is its share of its canonical domain's documents."""
    shares = corpus.start_state + corpus.target_distribution
    counts = np.bincount(canonical, minlength=NUM_CANONICAL)
    weights = shares[canonical] / counts[canonical]
    kept, numbers = np.unique(domains, return_inverse=True)
    position = {int(domain): int(c) // NUM_TOPICS for domain, c in zip(domains, canonical, strict=True)}
    fields = tuple(FIELDS[position[int(domain)]] for domain in kept)
    return Space(
        name=name,
        tokens=tokens,
        starts=starts.astype(np.int64),
        domains=numbers.astype(np.int64),
        weights=weights,
        canonical=canonical.astype(np.int64),
        names=tuple(f"{field}/{number:03d}" for number, field in enumerate(fields)),
        fields=fields,
    )
