"""Feedback of all proxies at once is the environment's feedback of each alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmagent_loader.environment import Environment
from dmagent_loader.environment.questions import Question
from dmagent_loader.errors import ConfigurationError, EnvironmentDataError
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.proxies.feedback import FeedbackConfig
from dmagent_loader.training.proxies.model import StackedProxies
from dmagent_loader.training.proxies.questions import ProxyQuestions, QuestionConfig
from dmagent_loader.training.proxies.trainer import ProxyTrainer

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
    return trainer.averaged


def assert_agree(
    feedback: FloatArray, environment: Environment, proxies: StackedProxies, small: FeedbackConfig
) -> None:
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


@pytest.mark.parametrize("score", ["answer", "pair"])
def test_feedback_agrees_with_the_environment(
    corpus: Corpus, proxies: StackedProxies, small: FeedbackConfig, score: str
) -> None:
    """Catches answers shifted by a token, padding that counts, and means over tokens instead of over pairs."""
    feedback = questions(corpus, batch_tokens=20, score=score).feedback(proxies)
    environment = Environment.from_pairs(PAIRS, corpus.tokenizer(), progress=False, max_length=64, score=score)
    assert_agree(feedback, environment, proxies, small)


def test_the_two_scores_are_two_numbers(corpus: Corpus, proxies: StackedProxies) -> None:
    """Else the agreement with the environment would show nothing."""
    answer, pair = (questions(corpus, score=score) for score in ("answer", "pair"))
    assert np.abs(answer.feedback(proxies) - pair.feedback(proxies)).min() > 1e-3
    assert answer.fingerprint != pair.fingerprint


@pytest.mark.parametrize("score", ["answer", "pair"])
@pytest.mark.parametrize("cloze", [False, True])
def test_files_are_read_as_the_environment_reads_them(
    corpus: Corpus, proxies: StackedProxies, small: FeedbackConfig, tmp_path: Path, score: str, cloze: bool
) -> None:
    rows = [
        {"question": "1 2 3 A 4 B 5", "answer": "B", "stem": "1 2 3", "choices": ["4", "5 6"], "answer_index": 1},
        {"question": "7 8 A 9 B 10", "answer": "A", "stem": "7 8", "choices": ["9 11 12", "10"], "answer_index": 0},
    ]
    files = {"general": tmp_path / "choices.jsonl", "math": tmp_path / "plain.jsonl"}
    files["general"].write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    files["math"].write_text(
        "\n".join(json.dumps({"question": q, "answer": a}) for q, a in PAIRS["math"]), encoding="utf-8"
    )
    asked = ProxyQuestions.from_files(files, corpus.tokenizer(), QuestionConfig(score=score, cloze=cloze))
    environment = Environment.from_files(files, corpus.tokenizer(), progress=False, score=score, cloze=cloze)
    assert_agree(asked.feedback(proxies), environment, proxies, small)
    assert environment.questions["general"][0].answer == ("5 6" if cloze else "B")


def test_feedback_does_not_depend_on_the_batches(corpus: Corpus, proxies: StackedProxies) -> None:
    one, all_ = questions(corpus, batch_tokens=1), questions(corpus, batch_tokens=10_000)
    assert np.allclose(one.feedback(proxies), all_.feedback(proxies), atol=1e-6)
    assert one.fingerprint == all_.fingerprint
    assert one.num_tokens == sum(len(f"{q} {a}".split()) - 1 for pairs in PAIRS.values() for q, a in pairs)


def test_pairs_that_do_not_fit_are_left_out_and_the_rest_is_thinned_evenly(corpus: Corpus) -> None:
    short = questions(corpus, max_tokens=4)
    assert short.num_questions == {"general": 2, "math": 2}
    assert questions(corpus, max_questions=1).num_questions == {"general": 1, "math": 1}
    assert questions(corpus).fingerprint != short.fingerprint


def test_each_field_can_have_a_limit_of_its_own(corpus: Corpus) -> None:
    assert questions(corpus, max_questions=(3, 1)).num_questions == {"general": 3, "math": 1}
    assert questions(corpus, max_questions=(1, 9)).num_questions == {"general": 1, "math": 2}
    with pytest.raises(ConfigurationError, match="has 3 numbers, but the fields are general, math"):
        questions(corpus, max_questions=(3, 1, 2))


def test_a_field_without_a_pair_that_fits_is_refused(corpus: Corpus) -> None:
    with pytest.raises(EnvironmentDataError, match="'general' fits into 1 tokens"):
        questions(corpus, max_tokens=1)
