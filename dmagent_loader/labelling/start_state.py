"""The start state: the topics of the base model's own training data (paper, section 3.1 and appendix B)."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dmagent_loader._files import write_atomically
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.labelling.compose import SampleConfig, measure
from dmagent_loader.labelling.generation import GenerationConfig, generate_texts
from dmagent_loader.labelling.labels import Labeller
from dmagent_loader.shards.compositions import START_STATE, Composition
from dmagent_loader.shards.inputs.documents import Document

MOST_TEXTS = 4000
"""Texts of a model: by these, the estimate had converged for most models in the paper (Fig. 4)."""
MOST_DOCUMENTS = 20_000

logger = logging.getLogger(__name__)


def start_state_of_documents(
    documents: Iterable[Document], labeller: Labeller, config: SampleConfig, *, progress: bool = True
) -> Composition:
    """Measures the topics of a random sample of documents, all of which are read.

    Args:
        documents: Documents of the base model's training data.
        labeller: Classifier and settings.
        config: Size of the sample; without a largest size, `MOST_DOCUMENTS`.
        progress: Show a progress bar.

    Raises:
        ShardError: There are no documents, or none has a topic.
    """
    most = config.most_documents or MOST_DOCUMENTS
    rng = np.random.default_rng(config.seed)
    sample: list[Document] = []
    size = 0
    for document in documents:  # reservoir sampling: any subset of `most` documents is equally likely
        size += 1
        if len(sample) < most:
            sample.append(document)
        elif (place := int(rng.integers(size))) < most:
            sample[place] = document
    order = rng.permutation(len(sample))

    def draw(start: int, end: int) -> Iterator[Document]:
        return (sample[i] for i in order[start:end])

    bounded = SampleConfig(max_error=config.max_error, most_documents=most, seed=config.seed)
    return measure(START_STATE, draw, size, labeller, bounded, progress=progress)


def start_state_of_model(
    model: Any,
    tokenizer: Any,
    labeller: Labeller,
    config: SampleConfig,
    generation: GenerationConfig,
    *,
    keep: Path | None = None,
    progress: bool = True,
) -> Composition:
    """Measures the topics of texts that the model writes by itself.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        labeller: Classifier and settings.
        config: Number of texts; without a largest number, `MOST_TEXTS`.
        generation: Settings of the sampling.
        keep: File for the texts, ``.jsonl.gz``; None: they are not kept.
        progress: Show a progress bar.

    Raises:
        ConfigurationError: The tokenizer has no start or end-of-text token, or the folder of `keep` is missing.
        ShardError: No text has a topic.
    """
    if keep is not None and not keep.parent.is_dir():
        raise ConfigurationError(
            f"the texts cannot be kept in {str(keep)!r}: make the folder {str(keep.parent)!r} first"
        )
    texts = generate_texts(model, tokenizer, generation)
    written: list[str] = []

    def draw(start: int, end: int) -> Iterator[Document]:
        for text in itertools.islice(texts, end - start):
            written.append(text)
            yield Document(text, {}, "a generated text")

    bounded = SampleConfig(
        max_error=config.max_error, most_documents=config.most_documents or MOST_TEXTS, seed=config.seed
    )
    found = measure(START_STATE, draw, math.inf, labeller, bounded, progress=progress)
    if keep is not None:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in written)
        try:
            write_atomically(keep, gzip.compress(lines.encode("utf-8", "replace"), 6, mtime=0))
        except OSError as error:  # the measurement, which took long, is not lost for it
            logger.warning("the texts are not kept, because %s cannot be written: %s", keep, error)
    return found
