"""Models and tokenizers small enough to work out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


class CausalMean(nn.Module):
    """Reads tokens, averages the embeddings so far, predicts the next token; has dropout and draws random numbers.

    It refuses a mask that is not 0 exactly on the padding (no text holds byte 0), and records the shapes of its calls.
    """

    def __init__(self, vocabulary: int = 256, width: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(vocabulary, width)
        self.body = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.5))
        self.head = nn.Linear(width, vocabulary)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
        self.calls: list[tuple[int, int]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        assert (attention_mask == (input_ids != 0)).all(), "the mask must be 0 exactly on the padding"
        assert (attention_mask.diff(dim=1) <= 0).all(), "padding must be on the right"
        self.calls.append((input_ids.shape[0], input_ids.shape[1]))
        torch.rand(3)
        seen = self.embedding(input_ids).cumsum(dim=1) / torch.arange(1, input_ids.shape[1] + 1)[:, None]
        return self.head(self.body(seen))


def to_bytes(text: str) -> list[int]:
    return list(text.encode())


@pytest.fixture
def model() -> CausalMean:
    return CausalMean()


@pytest.fixture
def pairs() -> list[tuple[str, str]]:
    """40 pairs of very unequal lengths."""
    return [("why " * (i % 7 + 1), "because " * (i * i % 11 + 1) + str(i)) for i in range(40)]
