"""The start state: a fair sample of documents, and texts that are drawn from the model's own distribution."""

from __future__ import annotations

import gzip
import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.labelling.compose import SampleConfig
from dmagent_loader.labelling.generation import GenerationConfig, generate_texts
from dmagent_loader.labelling.labels import Labeller
from dmagent_loader.labelling.start_state import start_state_of_documents, start_state_of_model
from dmagent_loader.mixture.domains import CANONICAL_TOPICS
from dmagent_loader.shards.inputs.documents import Document

transformers = pytest.importorskip("transformers")

WORDS = ["<end>", "News", "Science", "Games", "and"]
END, AND = 0, 4
FIRST = torch.tensor([0.0, 0.6, 0.3, 0.1, 0.0])
"""Distribution of the first word; then follows "and" with probability 0.5, or the end."""


class Markov(torch.nn.Module):
    """A language model whose next word depends on the last word only, with the interface of transformers."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, ...]] = []
        self.was_training: list[bool] = []

    def forward(self, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool) -> Any:
        self.calls.append(tuple(input_ids.shape))
        self.was_training.append(self.training)
        begins = past_key_values is None
        next_words = FIRST if begins else torch.tensor([0.5, 0.0, 0.0, 0.0, 0.5])
        logits = next_words.log().expand(len(input_ids), 1, len(WORDS))
        return SimpleNamespace(logits=logits, past_key_values=input_ids)


class Words:
    bos_token_id: int | None = None
    eos_token_id: int | None = END

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(WORDS[token] for token in row) for row in rows]


class FirstWord:
    name, labels = "first word", CANONICAL_TOPICS

    def probabilities(self, texts: list[str]) -> np.ndarray[Any, Any]:
        return np.stack([np.eye(26)[CANONICAL_TOPICS.index(text.split()[0])] for text in texts])


def written(count: int, **settings: Any) -> list[str]:
    return list(itertools.islice(generate_texts(Markov(), Words(), GenerationConfig(**settings)), count))


def test_texts_follow_the_models_distribution_and_end_where_it_ends_them() -> None:
    """0.6, 0.3 and 0.1 within three standard errors; half of the texts end after one word."""
    texts = written(4000)
    counts = Counter(text.split()[0] for text in texts)
    for word, share in (("News", 0.6), ("Science", 0.3), ("Games", 0.1)):
        assert counts[word] / 4000 == pytest.approx(share, abs=3 * (share * (1 - share) / 4000) ** 0.5)
    lengths = Counter(len(text.split()) for text in texts)
    assert lengths[1] / 4000 == pytest.approx(0.5, abs=0.025)
    assert not any("<end>" in text for text in texts)


def test_a_text_that_does_not_end_is_cut() -> None:
    assert max(len(text.split()) for text in written(200, max_tokens=3)) == 3


def test_temperature_sharpens_the_distribution() -> None:
    assert Counter(text.split()[0] for text in written(500, temperature=0.1))["News"] > 490


def test_texts_depend_on_the_seed_only_and_leave_the_callers_random_state() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    assert written(100) == written(100)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert written(100) != written(100, seed=10**6)


def test_the_cache_is_used_and_the_mode_of_the_model_comes_back() -> None:
    """Without the cache, every step would cost as much as the whole text."""
    model = Markov().train()
    list(itertools.islice(generate_texts(model, Words(), GenerationConfig(batch_size=8)), 8))
    assert set(model.calls) == {(8, 1)}
    assert not any(model.was_training)
    assert model.training


def test_a_real_model_writes_what_it_was_taught() -> None:
    """A LLaMA trained on "3 1 4 1 5": the start token, positions and cache are right only if it is repeated."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    model = transformers.LlamaForCausalLM(config)
    row = torch.tensor([[0, 3, 1, 4, 1, 5, 0]])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=row, labels=row).loss.backward()
        optimizer.step()

    class Digits(Words):
        def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
            return ["".join(map(str, row)) for row in rows]

    texts = list(itertools.islice(generate_texts(model, Digits(), GenerationConfig(batch_size=20, max_tokens=12)), 20))
    assert texts.count("31415") >= 18


def test_the_start_state_of_a_model_and_its_texts(tmp_path: Path) -> None:
    found = start_state_of_model(
        Markov(),
        Words(),
        Labeller(FirstWord()),
        SampleConfig(max_error=0.02),
        GenerationConfig(),
        keep=tmp_path / "texts.jsonl.gz",
        progress=False,
    )
    assert found.shares["News"] == pytest.approx(0.6, abs=0.06)
    assert found.error <= 0.0201
    kept = [
        json.loads(line)["text"] for line in gzip.decompress((tmp_path / "texts.jsonl.gz").read_bytes()).splitlines()
    ]
    assert len(kept) == found.documents
    assert sum(text.startswith("News") for text in kept) == found.counts["News"]


def test_the_start_state_of_documents_is_a_fair_sample() -> None:
    """Documents come sorted by topic, and 500 of 9,000 are kept: the first or the last ones would show one topic."""
    topics = ["News"] * 6000 + ["Science"] * 3000
    documents = (Document(topic, {}, "") for topic in topics)
    config = SampleConfig(max_error=0.001, most_documents=500)
    found = start_state_of_documents(documents, Labeller(FirstWord()), config, progress=False)
    assert found.documents == 500
    assert found.shares["News"] == pytest.approx(2 / 3, abs=0.065)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="temperature is 0"):
        GenerationConfig(temperature=0)
    with pytest.raises(ConfigurationError, match="max_tokens is 0"):
        GenerationConfig(max_tokens=0)
    tokenizer = Words()
    tokenizer.eos_token_id = None
    with pytest.raises(ConfigurationError, match="no start or no end-of-text token"):
        next(generate_texts(Markov(), tokenizer))


def test_texts_end_where_the_models_positions_end() -> None:
    """A table of positions has no row beyond the context."""
    settings = transformers.GPT2Config(n_positions=8, n_embd=8, n_layer=1, n_head=1, vocab_size=len(WORDS))
    model = transformers.GPT2LMHeadModel(settings)
    assert len(list(itertools.islice(generate_texts(model, Words(), GenerationConfig(batch_size=4)), 4))) == 4


def test_texts_of_neighbouring_seeds_do_not_overlap() -> None:
    """Batch b of one seed must not be batch b - 1 of the next."""
    first, second = (written(128, seed=seed) for seed in (0, 1))
    assert first[64:] != second[:64]


def test_a_missing_folder_for_the_texts_is_refused_first(tmp_path: Path) -> None:
    model = Markov()
    with pytest.raises(ConfigurationError, match="make the folder"):
        start_state_of_model(
            model,
            Words(),
            Labeller(FirstWord()),
            SampleConfig(),
            GenerationConfig(),
            keep=tmp_path / "none" / "texts.jsonl.gz",
            progress=False,
        )
    assert not model.calls
