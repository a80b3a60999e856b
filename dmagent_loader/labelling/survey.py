"""A look at a domain: lengths, topics, repeats, quality and sources of a random sample of its rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from dmagent_loader.labelling.compose import random_rows
from dmagent_loader.labelling.documents import ShardDocuments
from dmagent_loader.labelling.filtering import EXACT, DocumentChecks, DocumentFilter, FilterConfig
from dmagent_loader.labelling.labels import UNSURE, Labeller
from dmagent_loader.labelling.taxonomy import value_at
from dmagent_loader.mixture.simplex import FloatArray, IntArray


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A sample of n rows of a domain.

    Attributes:
        rows: Number of rows of the domain.
        lengths: (n,) characters of each document of the sample.
        topics: (26,) number of documents of each topic.
        unsure: Number of documents without a topic.
        repeated: Number of documents with the text of an earlier one of the sample. The domain has more repeats: a
            sample holds both copies only by chance.
        quality: Label of quality -> number of documents; those without one are not counted.
        sources: Value of the column with the source -> number of documents; those without one are not counted.
        row_tokens: Tokens of a packed row; None: rows of text.
    """

    rows: int
    lengths: IntArray
    topics: FloatArray
    unsure: int
    repeated: int
    quality: Counter[str]
    sources: Counter[str]
    row_tokens: int | None


def survey(
    name: str,
    documents: ShardDocuments,
    labeller: Labeller,
    *,
    most_rows: int,
    seed: int = 0,
    checks: DocumentChecks | None = None,
    source_key: str | None = None,
) -> Survey:
    """Surveys a domain.

    Args:
        name: Name of the domain, which is part of the seed of the sample.
        documents: Rows of the domain.
        labeller: Classifier and settings.
        most_rows: Largest size of the sample.
        seed: Seed of the sample.
        checks: Where the quality of a document is read or classified; None: nowhere.
        source_key: Column that says where a document is from; dots lead into nested columns. None: there is none.

    Raises:
        ShardError: A row has no text, or needs a tokenizer.
    """
    size = documents.size
    sample = list(documents.rows(random_rows(name, size, 0, min(size, most_rows), seed)))
    labels = labeller.label(sample)
    quality: Counter[str] = Counter()
    if checks is not None:
        quality.update(str(label) for label in checks.qualities(sample) if label is not None)
    stated = [] if source_key is None else [value_at(document.columns, source_key) for document in sample]
    sources = Counter(str(source) for source in stated if source is not None)
    repeated = DocumentFilter(FilterConfig()).reasons(sample).count(EXACT)
    return Survey(
        rows=size,
        lengths=np.array([len(document.text) for document in sample], dtype=np.int64),
        topics=labels.shares.sum(axis=0),
        unsure=int((labels.topics == UNSURE).sum()),
        repeated=repeated,
        quality=quality,
        sources=sources,
        row_tokens=documents.row_tokens,
    )
