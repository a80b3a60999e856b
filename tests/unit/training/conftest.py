"""A corpus small enough for a test: each domain has tokens of its own, so that a row tells where it comes from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from dmagent_loader.environment.questions import Question
from dmagent_loader.mixture.domains import NUM_CANONICAL
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.proxies.bases import BaseConfig, start_states, train_bases
from dmagent_loader.training.proxies.feedback import FeedbackConfig, collect_feedback
from dmagent_loader.training.proxies.model import ProxyConfig
from dmagent_loader.training.proxies.questions import ProxyQuestions, QuestionConfig
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.trajectories import Trajectories, TrajectoryConfig, sample_trajectories

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
        held_out=np.concatenate([part[: 3 * ROW] for part in parts]).astype(np.uint16),
        held_out_bounds=np.concatenate([[0], np.cumsum([min(len(part), 3 * ROW) for part in parts])]).astype(np.int64),
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
    """Proxies of a few thousand parameters, and two base models."""
    proxy = ProxyConfig(vocab_size=104, width=16, layers=2, heads=2, feed_forward=24, warmup_updates=2, averaging=0.8)
    return FeedbackConfig(
        bases=BaseConfig(models=2, tokens=20 * 8 * ROW, rows_per_update=2, learning_rate=1e-2),
        proxy=proxy,
        questions=QuestionConfig(max_tokens=ROW),
        row_tokens=ROW,
        proxies_at_once=3,
    )


@pytest.fixture(scope="session")
def states(corpus: Corpus, small: FeedbackConfig) -> FloatArray:
    """The two start states."""
    return start_states(corpus.start_state, small.bases)


@pytest.fixture(scope="session")
def bases(
    corpus: Corpus, small: FeedbackConfig, states: FloatArray, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """Weights of the two base models."""
    path: Path = tmp_path_factory.mktemp("bases") / "bases.safetensors"
    return train_bases(corpus, states, small.bases, small.proxy, row_tokens=ROW, path=path, progress=False)


@pytest.fixture(scope="session")
def trajectories(corpus: Corpus, states: FloatArray) -> Trajectories:
    """Five of each of two sets, of several lengths, from two start states."""
    config = TrajectoryConfig(
        candidates_per_step=(1, 50), trajectories_per_set=5, steps=6, tokens_per_step=8 * ROW, target_tokens=20 * ROW
    )
    return sample_trajectories(states, corpus.target_distribution, config)


@pytest.fixture(scope="session")
def collected(
    trajectories: Trajectories,
    corpus: Corpus,
    questions: ProxyQuestions,
    bases: dict[str, torch.Tensor],
    small: FeedbackConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> FeedbackRecord:
    """Feedback of all trajectories, collected in one go by this process."""
    folder = tmp_path_factory.mktemp("whole")
    return collect_feedback(trajectories, corpus, questions, bases, small, folder, progress=False)
