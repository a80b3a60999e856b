"""Feedback of all proxies at once is the environment's feedback of each alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dmagent_loader.environment import Environment
from dmagent_loader.environment.questions import Question
from dmagent_loader.errors import EnvironmentDataError
from dmagent_loader.pipeline.corpus import Corpus
from dmagent_loader.pipeline.feedback import FeedbackConfig
from dmagent_loader.pipeline.proxies import ProxyTrainer, StackedProxies
from dmagent_loader.pipeline.questions import ProxyQuestions, QuestionConfig

PAIRS = {
    "general": [("1 2 3", "4 5"), ("6", "7 8 9 10 11 12"), ("13 14", "15"), ("16 17 18 19", "20 21 22")],
    "math": [("60 61", "62 63 64"), ("70", "71")],
}


def questions(corpus: Corpus, **settings: Any) -> ProxyQuestions:
    listed = {f: [Question(question=q, answer=a, origin=q) for q, a in pairs] for f, pairs in PAIRS.items()}
    return ProxyQuestions(listed, corpus.tokenizer(), QuestionConfig(**settings))


@pytest.fixture(scope="module")
def proxies(small: FeedbackConfig) -> StackedProxies:
    """Three proxies that have learnt different things."""
    trainer = ProxyTrainer(3, small.proxy)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        trainer.train(torch.randint(0, 104, (3, 2, 9), generator=generator) // torch.tensor([1, 2, 4])[:, None, None])
    return trainer.model


def test_feedback_agrees_with_the_environment(corpus: Corpus, proxies: StackedProxies, small: FeedbackConfig) -> None:
    """Catches answers shifted by a token, padding that counts, and means over tokens instead of over pairs."""
    feedback = questions(corpus, batch_tokens=20).feedback(proxies)
    environment = Environment.from_pairs(PAIRS, corpus.tokenizer(), progress=False, max_length=64)
    for i in range(3):
        alone = StackedProxies(1, small.proxy)
        with torch.no_grad():
            for mine, stacked in zip(alone.parameters(), proxies.parameters(), strict=True):
                mine.copy_(stacked[i : i + 1])

        def model(input_ids: torch.Tensor, attention_mask: torch.Tensor, alone: StackedProxies = alone) -> torch.Tensor:
            return alone.logits(alone.hidden(input_ids[None])).view(*input_ids.shape, -1)

        expected = environment.evaluate(model)
        assert np.allclose(feedback[i], [expected["general"], expected["math"]], atol=1e-5)
    assert np.abs(feedback[0] - feedback[2]).max() > 0.01


def test_feedback_does_not_depend_on_the_batches(corpus: Corpus, proxies: StackedProxies) -> None:
    one, all_ = questions(corpus, batch_tokens=1), questions(corpus, batch_tokens=10_000)
    assert np.allclose(one.feedback(proxies), all_.feedback(proxies), atol=1e-6)
    assert one.fingerprint == all_.fingerprint
    assert one.num_tokens == sum(len(f"{q} {a}".split()) - 1 for pairs in PAIRS.values() for q, a in pairs)


def test_pairs_that_do_not_fit_are_left_out_and_the_rest_is_thinned_evenly(corpus: Corpus) -> None:
    short = questions(corpus, max_tokens=4)
    assert short.num_questions == {"general": 2, "math": 2}
    assert short.num_available == {"general": 4, "math": 2}
    assert questions(corpus, max_questions=1).num_questions == {"general": 1, "math": 1}
    assert questions(corpus).fingerprint != short.fingerprint


def test_a_field_without_a_pair_that_fits_is_refused(corpus: Corpus) -> None:
    with pytest.raises(EnvironmentDataError, match="'general' fits into 1 tokens"):
        questions(corpus, max_tokens=1)
