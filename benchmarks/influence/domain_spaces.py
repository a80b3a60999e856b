"""Domain spaces of a user's own over the text of the corpus: unnamed domains, of any number, without topics.

A space says which rows each of its domains holds, and how often each row comes in the natural mix. The natural mix is
that of the 52 domains in every space, so runs on it differ in the order of their rows only.

Shapes: D domains, N rows of `ROW_TOKENS` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.influence.environments import ROW_TOKENS
from benchmarks.influence.runs import ROWS_PER_STEP
from dmagent_loader.mixture.domains import FIELDS, NUM_CANONICAL, NUM_TOPICS, SOURCE, TARGET, DomainSpace
from dmagent_loader.mixture.simplex import FloatArray, IntArray
from dmagent_loader.training.data.corpus import Corpus

END = 0
"""Token at the end of a document."""
GROUPS = {SOURCE: 5, TARGET: 2}
CLUSTERS = {SOURCE: 130, TARGET: 70}
"""Of documents, in proportion to neither text nor topics; together 200."""
PARTS = 4
"""Random parts of each of the 50 or so domains with rows."""
KINDS = (
    ("Computers_and_Electronics", "Internet_and_Telecom", "Science", "Health"),
    ("Business_and_Industrial", "Finance", "Jobs_and_Education", "Law_and_Government", "News", "Real_Estate"),
    ("Adult", "Online_Communities", "People_and_Society", "Sensitive_Subjects"),
    ("Arts_and_Entertainment", "Books_and_Literature", "Games", "Hobbies_and_Leisure", "Sports"),
)
"""Source topics merged by kind; all others are the fifth group."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """Rows by domain.

    Args:
        name: Of the space.
        tokens: Text of all rows.
        starts: (N,), position in `tokens` where each row starts.
        domains: (N,), number of the domain of each row.
        weights: (N,), share of each row in the natural mix of its field.
        fields: Field of each domain: (D,).
    """

    name: str
    tokens: npt.NDArray[np.uint16]
    starts: IntArray
    domains: IntArray
    weights: FloatArray
    fields: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names that say the field and nothing else."""
        return tuple(f"{field}/{number:03d}" for number, field in enumerate(self.fields))

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

    def rows(self, domain: int, most: int, number: int) -> npt.NDArray[np.int64]:
        """Rows of a domain for a probe: (rows, `ROW_TOKENS` + 1); a small domain has fewer than `most`."""
        return self._read(self._order(domain, number)[:most])

    def _order(self, domain: int, number: int) -> IntArray:
        """Rows of a domain in the order of weighted draws without replacement."""
        members = np.flatnonzero(self.domains == domain)
        waits = np.random.default_rng([1, number, domain]).exponential(size=len(members)) / self.weights[members]
        return np.asarray(members[np.argsort(waits)], dtype=np.int64)

    def _read(self, rows: IntArray) -> npt.NDArray[np.int64]:
        return np.asarray(self.tokens[self.starts[rows][:, None] + np.arange(ROW_TOKENS + 1)], dtype=np.int64)


class SpaceRows:
    """Rows of a space for one mix after another, as `MixStream` reads those of the 52 domains.

    Args:
        space: The space.
        number: Of the stream; streams of one number read the same rows of a domain first.
    """

    def __init__(self, space: Space, number: int) -> None:
        self._space, self._number, self._step = space, number, 0
        self._orders: dict[int, IntArray] = {}
        self._taken = np.zeros(len(space.fields), dtype=np.int64)

    def next(self, mix: FloatArray) -> npt.NDArray[np.int64]:
        """See `runs.Rows`; row counts by systematic sampling."""
        self._step += 1
        rng = np.random.default_rng([2, self._number, self._step])
        edges = np.cumsum(mix)
        points = (np.arange(ROWS_PER_STEP) + rng.random()) / ROWS_PER_STEP * edges[-1]
        drawn = rng.permutation(np.searchsorted(edges, points, side="right"))
        return self._space._read(np.array([self._next_row(int(domain)) for domain in drawn]))

    def _next_row(self, domain: int) -> int:
        if domain not in self._orders:
            self._orders[domain] = self._space._order(domain, self._number)
        order = self._orders[domain]
        self._taken[domain] += 1
        return int(order[(self._taken[domain] - 1) % len(order)])


def spaces(corpus: Corpus, work: Path) -> dict[str, Space]:
    """The spaces that are compared, by name; what takes long is kept in `work`."""
    rng = np.random.default_rng(7)
    arbitrary, kinds = np.zeros(NUM_CANONICAL, dtype=np.int64), np.zeros(NUM_CANONICAL, dtype=np.int64)
    by_kind = {f"{SOURCE}/{topic}": number for number, topics in enumerate(KINDS) for topic in topics}
    for number, name in enumerate(DomainSpace.canonical().names):
        kinds[number] = by_kind.get(name, len(KINDS))
    first = 0
    for position, field in enumerate(FIELDS):
        part = slice(position * NUM_TOPICS, (position + 1) * NUM_TOPICS)
        arbitrary[part] = first + rng.permutation(NUM_TOPICS) % GROUPS[field]
        if field == TARGET:
            kinds[part] = arbitrary[part]
        first += GROUPS[field]
    documents = Documents.of(corpus)
    clusters = _kept(work / f"clusters-{corpus.fingerprint[:8]}.npy", lambda: documents.clusters(corpus))
    return {
        "52": merged("52", corpus, np.arange(NUM_CANONICAL)),
        "7 arbitrary": merged("7 arbitrary", corpus, arbitrary),
        "7 kinds": merged("7 kinds", corpus, kinds),
        "200 clusters": documents.space("200 clusters", clusters),
        "200 parts": documents.space("200 parts", documents.parts()),
    }


def merged(name: str, corpus: Corpus, group: IntArray) -> Space:
    """A space in which a domain holds one or more of the 52 domains.

    Args:
        name: Of the space.
        corpus: Tokens of the 52 domains.
        group: (52,), number of the domain that each of them goes to.
    """
    available = np.maximum(corpus.num_tokens - 1, 0) // ROW_TOKENS
    canonical = np.repeat(np.arange(NUM_CANONICAL), available)
    offsets = np.concatenate([np.arange(count) * ROW_TOKENS for count in available])
    return _space(name, corpus.tokens, corpus.bounds[canonical] + offsets, canonical, group[canonical], corpus)


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

    def parts(self) -> IntArray:
        """A random one of `PARTS` parts of the document's domain, as one number: (documents,)."""
        return self.canonical * PARTS + np.random.default_rng(8).integers(PARTS, size=len(self.canonical))

    def clusters(self, corpus: Corpus) -> IntArray:
        """k-means over the words of the documents of each field, whatever their domains: (documents,)."""
        from sklearn.cluster import KMeans
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.preprocessing import normalize

        texts = corpus.tokenizer().decode_batch([corpus.tokens[start:end].tolist() for start, end in self.bounds])
        labels, first = np.zeros(len(texts), dtype=np.int64), 0
        for position, field in enumerate(FIELDS):
            here = np.flatnonzero(self.canonical // NUM_TOPICS == position)
            words = TfidfVectorizer(sublinear_tf=True, max_features=20_000, min_df=3, stop_words="english")
            reduced = TruncatedSVD(64, random_state=0).fit_transform(words.fit_transform([texts[i] for i in here]))
            labels[here] = first + KMeans(CLUSTERS[field], n_init=1, random_state=0).fit_predict(normalize(reduced))
            first += CLUSTERS[field]
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
    return Space(
        name=name,
        tokens=tokens,
        starts=starts.astype(np.int64),
        domains=numbers.astype(np.int64),
        weights=weights,
        fields=tuple(FIELDS[position[int(domain)]] for domain in kept),
    )


def _kept(path: Path, make: Any) -> IntArray:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, make())
    return np.asarray(np.load(path), dtype=np.int64)
