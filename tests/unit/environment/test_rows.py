"""Losses by domain: training rows scored by the same calls as questions."""

from __future__ import annotations

import logging
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dmagent_loader.environment import EnvironmentSettings, RowEnvironment
from dmagent_loader.errors import ConfigurationError, InfluenceError


class Bigrams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Embedding(16, 16, _weight=torch.randn(16, 16, generator=generator))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.table(input_ids)


def loss(model: Bigrams, row: list[int]) -> float:
    """Mean over the tokens but the first, from the table alone."""
    weights = model.table.weight.detach().double()
    terms = []
    for before, after in pairwise(row):
        logits = [float(x) for x in weights[before]]
        terms.append(math.log(sum(map(math.exp, logits))) - logits[after])
    return sum(terms) / len(terms)


def test_the_loss_is_the_mean_over_rows_of_the_mean_over_tokens() -> None:
    model = Bigrams()
    rows = {"source/web": [[1, 2, 3, 4], [5, 6]], "target/math": [[7, 8, 9]]}
    scored = RowEnvironment(rows, EnvironmentSettings(batch_size=2))
    feedback = scored.evaluate(model)
    assert list(feedback) == ["source/web", "target/math"]
    assert -feedback["source/web"] == pytest.approx((loss(model, [1, 2, 3, 4]) + loss(model, [5, 6])) / 2, abs=1e-5)
    assert -feedback["target/math"] == pytest.approx(loss(model, [7, 8, 9]), abs=1e-5)
    assert scored.num_tokens == 9


def test_labels_and_masks_count_as_in_training() -> None:
    """Only the tokens from the first to the last label are scored, and padding is not read."""
    model = Bigrams()
    row = {"input_ids": [1, 2, 3, 4, 0], "attention_mask": [1, 1, 1, 1, 0], "labels": [-100, -100, 3, 4, -100]}
    feedback = RowEnvironment({"source/web": [row]}).evaluate(model)
    assert -feedback["source/web"] == pytest.approx(loss(model, [2, 3, 4]), abs=1e-5)


def test_settings_of_questions_have_no_effect_and_long_rows_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = Bigrams()
    rows = {"source/web": [[1, 2, 3, 4, 5, 6]]}
    settings = EnvironmentSettings(score="pair", max_questions=1, max_length=3)
    with caplog.at_level(logging.WARNING):
        found = RowEnvironment(rows, settings).evaluate(model)
    assert -found["source/web"] == pytest.approx(loss(model, [1, 2, 3, 4, 5, 6]), abs=1e-5)
    assert not caplog.records


def test_of_long_rows_the_first_tokens_are_read_whoever_sets_the_limit() -> None:
    """Training cuts at the end, too. Catches rows cut like questions, from the left."""
    model, row = Bigrams(), [1, 2, 3, 4, 5, 6]
    expected = pytest.approx(loss(model, row[:4]), abs=1e-5)
    scored = RowEnvironment({"source/web": [row]}, max_row_tokens=3)
    assert -scored.evaluate(model)["source/web"] == expected
    assert scored.num_tokens == 4
    model.config = SimpleNamespace(max_position_embeddings=3)
    scored = RowEnvironment({"source/web": [row]})
    assert -scored.evaluate(model)["source/web"] == expected
    assert scored.num_tokens == 4


def test_padding_on_the_left_is_left_out_before_the_cut() -> None:
    model = Bigrams()
    row = {"input_ids": [0, 0, 0, 0, 1, 2, 3, 4], "attention_mask": [0, 0, 0, 0, 1, 1, 1, 1]}
    scored = RowEnvironment({"source/web": [row]}, max_row_tokens=2)
    assert -scored.evaluate(model)["source/web"] == pytest.approx(loss(model, [1, 2, 3]), abs=1e-5)
    assert scored.num_tokens == 3


def test_rows_that_the_model_reads_to_no_label_are_left_out_and_domains_of_them_have_no_loss() -> None:
    model = Bigrams()
    model.config = SimpleNamespace(max_position_embeddings=3)
    late = {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100] * 4 + [5, 6]}
    found = RowEnvironment({"source/web": [late, [7, 8, 9]]}).evaluate(model)
    assert -found["source/web"] == pytest.approx(loss(model, [7, 8, 9]), abs=1e-5)
    with pytest.raises(InfluenceError, match=r"the rows of \['target/math'\] have no token to predict within the 3"):
        RowEnvironment({"source/web": [[1, 2]], "target/math": [late]}).evaluate(model)


def test_the_log_has_losses_of_rows(caplog: pytest.LogCaptureFixture) -> None:
    model = Bigrams()
    with caplog.at_level(logging.INFO):
        RowEnvironment({"source/web": [[1, 2], [3, 4]]}).evaluate(model)
    mean = (loss(model, [1, 2]) + loss(model, [3, 4])) / 2
    assert f"losses source/web {mean:.4f} on 2 rows in" in caplog.text
    assert "questions" not in caplog.text


def test_other_rows_have_another_fingerprint() -> None:
    """Ranks compare it, so that none scores other rows."""
    first, same, other = (RowEnvironment({"source/web": [[1, 2, last]]}).fingerprint for last in (3, 3, 4))
    assert first == same != other


def test_rows_that_cannot_be_scored_are_refused() -> None:
    for rows in ({}, {"source/web": []}, {"source/web": [[1]]}, {"source/web": [{"text": "x"}]}):
        with pytest.raises(ConfigurationError, match="rows"):
            RowEnvironment(rows)
    with pytest.raises(ConfigurationError, match="token id 20"):
        RowEnvironment({"source/web": [[1, 20]]}).evaluate(Bigrams())
