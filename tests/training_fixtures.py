"""Fixtures of the tests of training: a tiny corpus whose tokens reveal their domain, and everything built from it.

A ``conftest.py`` makes them available to its folder by importing them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.environment.questions import Question
from dmagent_loader.mixture.domains import NUM_CANONICAL
from dmagent_loader.mixture.history import FeedbackStatistics
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.proxies.bases import BaseConfig, start_states, train_bases
from dmagent_loader.training.proxies.feedback import FeedbackConfig, collect_feedback
from dmagent_loader.training.proxies.model import ProxyConfig
from dmagent_loader.training.proxies.questions import ProxyQuestions, QuestionConfig
from dmagent_loader.training.record import FeedbackRecord
from dmagent_loader.training.trajectories import Trajectories, TrajectoryConfig, sample_trajectories

ROW = 8
"""Tokens of a training row."""
EMPTY = 30
"""A target domain without data."""

Inputs = tuple[Trajectories, Corpus, ProxyQuestions, dict[str, torch.Tensor], FeedbackConfig]
"""The first arguments of `collect_feedback`."""

RANDOM_STEPS, NUM_RANDOM = 9, 12
"""The longest trajectory of `random_record`, and the number of its trajectories."""
RANDOM_STATISTICS = FeedbackStatistics(mean=(-4.0, -3.0), std=(0.2, 0.5), count=100)
"""Feedback statistics of `random_agent`."""


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
    folder = tmp_path_factory.mktemp("bases")
    return train_bases(corpus, states, small.bases, small.proxy, folder, row_tokens=ROW, progress=False)


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


@pytest.fixture
def inputs(
    trajectories: Trajectories,
    corpus: Corpus,
    questions: ProxyQuestions,
    bases: dict[str, torch.Tensor],
    small: FeedbackConfig,
) -> Inputs:
    """The first arguments of `collect_feedback`."""
    return trajectories, corpus, questions, bases, small


def random_record() -> FeedbackRecord:
    """Random mixes and feedback, with lengths from 4 to 9."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, RANDOM_STEPS + 1, NUM_RANDOM)
    lengths[0] = RANDOM_STEPS
    mixes = rng.dirichlet(np.ones(NUM_CANONICAL), (NUM_RANDOM, RANDOM_STEPS + 1))
    feedback = rng.normal((-4.0, -3.0), (0.2, 0.5), (NUM_RANDOM, RANDOM_STEPS + 1, 2))
    for number, length in enumerate(lengths):
        mixes[number, length + 1 :] = 0.0
        feedback[number, length + 1 :] = np.nan
    trajectories = Trajectories(
        mixes=mixes,
        lengths=lengths.astype(np.int64),
        candidates=np.ones(NUM_RANDOM, dtype=np.int64),
        starts=np.zeros(NUM_RANDOM, dtype=np.int64),
        target_distribution=mixes[0, 0],
        config=TrajectoryConfig(candidates_per_step=(1,), trajectories_per_set=NUM_RANDOM, steps=RANDOM_STEPS),
    )
    return FeedbackRecord(
        trajectories=trajectories,
        fields=("general", "math"),
        feedback=feedback,
        losses=feedback[..., 0],
        seconds=0.0,
        settings={},
    )


def random_agent() -> MixingAgent:
    """A small agent with large random weights, so that its mixes are far from uniform."""
    torch.manual_seed(1)
    config = AgentConfig(d_model=16, num_heads=2, d_ff=24, max_steps=RANDOM_STEPS, statistics=RANDOM_STATISTICS)
    agent = MixingAgent(config)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.mul_(6.0 if parameter.ndim == 2 else 1.0)
    return agent.eval()
