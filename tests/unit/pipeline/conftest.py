"""A corpus small enough for a test: each domain has tokens of its own, so that a row tells where it comes from."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from dmagent_loader.domains import NUM_CANONICAL
from dmagent_loader.environment.questions import Question
from dmagent_loader.pipeline.corpus import Corpus
from dmagent_loader.pipeline.feedback import FeedbackConfig
from dmagent_loader.pipeline.proxies import ProxyConfig
from dmagent_loader.pipeline.questions import ProxyQuestions, QuestionConfig
from dmagent_loader.pipeline.trajectories import Trajectories, TrajectoryConfig, sample_trajectories

ROW = 8
EMPTY = 30
"""A target domain without data."""


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    """Domain d holds the tokens 2 d and 2 d + 1 only; domain `EMPTY` holds none."""
    rng = np.random.default_rng(0)
    parts = [2 * d + rng.integers(0, 2, size=0 if d == EMPTY else 40 * ROW + d) for d in range(NUM_CANONICAL)]
    words = Tokenizer(models.WordLevel({str(i): i for i in range(2 * NUM_CANONICAL)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    documents = np.arange(1, NUM_CANONICAL + 1)
    documents[EMPTY] = 0
    return Corpus(
        tokens=np.concatenate(parts).astype(np.uint16),
        bounds=np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64),
        documents=documents.astype(np.int64),
        tokenizer_json=words.to_str(),
        facts={"classifier_accuracy": 0.5, "classifier_held_out_documents": 2},
    )


@pytest.fixture(scope="session")
def questions(corpus: Corpus) -> ProxyQuestions:
    """Two fields; source words in the first, target words in the second, of several lengths."""
    rng = np.random.default_rng(1)

    def pair(low: int, number: int) -> Question:
        numbers = rng.integers(low, low + 52, size=3 + number % 5)
        return Question(
            question=" ".join(map(str, numbers[:2])), answer=" ".join(map(str, numbers[2:])), origin=f"pair {number}"
        )

    fields = {"general": [pair(0, i) for i in range(9)], "math": [pair(52, i) for i in range(7)]}
    return ProxyQuestions(fields, corpus.tokenizer(), QuestionConfig(max_tokens=ROW, batch_tokens=32))


@pytest.fixture(scope="session")
def small() -> FeedbackConfig:
    """Proxies of a few thousand parameters."""
    proxy = ProxyConfig(vocab_size=104, width=16, layers=2, heads=2, feed_forward=24, warmup_updates=2)
    return FeedbackConfig(proxy=proxy, questions=QuestionConfig(max_tokens=ROW), row_tokens=ROW, proxies_at_once=3)


@pytest.fixture(scope="session")
def trajectories(corpus: Corpus) -> Trajectories:
    """Five of each of two sets, of several lengths."""
    config = TrajectoryConfig(
        candidates_per_step=(1, 50), trajectories_per_set=5, steps=6, tokens_per_step=8 * ROW, target_tokens=20 * ROW
    )
    return sample_trajectories(corpus.start_state, corpus.target_distribution, config)
