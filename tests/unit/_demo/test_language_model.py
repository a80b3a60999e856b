"""The demo's tokenizer and model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmagent_loader._demo.config import DemoConfig
from dmagent_loader._demo.language_model import Rows, held_out_loss, new_model, packed_rows, pretrain, train_tokenizer
from dmagent_loader.errors import ConfigurationError

pytest.importorskip("transformers")
TEXTS = [f"def function_{i}(argument):\n    return argument + {i}  # straße\n" for i in range(80)]
CONFIG = DemoConfig(vocab_size=512, row_tokens=32, hidden_size=32, num_layers=1, base_steps=60, batch_rows=8)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, CONFIG.vocab_size)


@pytest.fixture(scope="module")
def rows(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return packed_rows(folder, TEXTS, CONFIG.row_tokens)


def test_the_tokenizer_loses_nothing(tokenizer: Any) -> None:
    for text in [*TEXTS, "other text: \t日本 \x00 é"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= CONFIG.vocab_size


def test_packed_rows_are_the_documents_with_an_end_of_text_after_each(tokenizer: Any, rows: Rows) -> None:
    joined = tokenizer.decode(rows.ravel().tolist())
    assert "".join(f"{text}{tokenizer.eos_token}" for text in TEXTS).startswith(joined)
    assert len(rows) > 20


def test_an_untrained_model_knows_nothing(tokenizer: Any, rows: Rows) -> None:
    loss = held_out_loss(new_model(CONFIG, len(tokenizer)), rows)
    assert loss == pytest.approx(math.log(len(tokenizer)), abs=0.2)


def test_the_loss_does_not_depend_on_how_rows_are_batched(tokenizer: Any, rows: Rows) -> None:
    """Catches averaging over batches of unequal size."""
    model = new_model(CONFIG, len(tokenizer))
    assert held_out_loss(model, rows[:17], 16) == pytest.approx(held_out_loss(model, rows[:17], 5), abs=1e-5)


def test_training_lowers_the_loss_and_repeats_exactly(tokenizer: Any, rows: Rows) -> None:
    losses: list[list[float]] = [[], []]
    for run in range(2):
        model = new_model(CONFIG, len(tokenizer))
        pretrain(model, _batches(rows), CONFIG, losses[run].append)
        assert not model.training
    assert losses[0] == losses[1]
    assert len(losses[0]) == CONFIG.base_steps
    assert losses[0][-1] < losses[0][0] - 1


def test_sizes_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="vocab_size is 100"):
        DemoConfig(vocab_size=100)
    with pytest.raises(ConfigurationError, match="row_tokens is 1000"):
        DemoConfig(row_tokens=1000)


def _batches(rows: Rows) -> Iterator[Rows]:
    random = np.random.default_rng(0)
    while True:
        yield rows[random.integers(0, len(rows), CONFIG.batch_rows)]
