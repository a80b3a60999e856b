"""A look at a domain: lengths, topics and repeats of a random sample of its rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dmagent_loader.labelling.compose import random_rows
from dmagent_loader.labelling.documents import ShardDocuments
from dmagent_loader.labelling.filtering import EXACT, DocumentFilter, FilterConfig
from dmagent_loader.labelling.labels import UNSURE, Labeller
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
        row_tokens: Tokens of a packed row; None: rows of text.
    """

    rows: int
    lengths: IntArray
    topics: FloatArray
    unsure: int
    repeated: int
    row_tokens: int | None


def survey(name: str, documents: ShardDocuments, labeller: Labeller, *, most_rows: int, seed: int = 0) -> Survey:
    """Surveys a domain.

    Args:
        name: Name of the domain, which is part of the seed of the sample.
        documents: Rows of the domain.
        labeller: Classifier and settings.
        most_rows: Largest size of the sample.
        seed: Seed of the sample.

    Raises:
        ShardError: A row has no text, or needs a tokenizer.
    """
    size = documents.size
    sample = list(documents.rows(random_rows(name, size, 0, min(size, most_rows), seed)))
    labels = labeller.label(sample)
    repeated = DocumentFilter(FilterConfig()).reasons(sample).count(EXACT)
    return Survey(
        rows=size,
        lengths=np.array([len(document.text) for document in sample], dtype=np.int64),
        topics=labels.shares.sum(axis=0),
        unsure=int((labels.topics == UNSURE).sum()),
        repeated=repeated,
        row_tokens=documents.row_tokens,
    )
