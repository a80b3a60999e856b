"""Models of every usual shape give the same feedback and influence, and others are refused in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmagent_loader.environment import Environment
from dmagent_loader.errors import ConfigurationError

ROWS = {"source/a": [[n, 2, 3, 4] for n in range(1, 5)], "target/b": [[5, 6, n] for n in range(1, 5)]}


class Bigrams(nn.Module):
    """Next-byte logits from the current byte."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 256)
        nn.init.normal_(self.table.weight, generator=torch.Generator().manual_seed(0))


class Reference(Bigrams):
    def forward(self, input_ids, attention_mask):
        return self.table(input_ids)


class TokensOnly(Bigrams):
    def forward(self, tokens):
        return self.table(tokens)


class LastWithoutTargets(Bigrams):
    """As in nanoGPT: logits of all positions come only together with the loss."""

    def forward(self, idx, targets=None):
        logits = self.table(idx)
        if targets is None:
            return logits[:, [-1]], None
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class LossForTargets(Bigrams):
    """As in nanochat: with targets, only the loss."""

    def forward(self, idx, targets=None, kv_cache=None):
        logits = self.table(idx)
        return logits if targets is None else nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@dataclass
class Output:
    loss: Any
    scores: Tensor


class InDataclass(Bigrams):
    def forward(self, input_ids):
        return Output(None, self.table(input_ids))


class InMapping(Bigrams):
    def forward(self, x, mask=None):
        return {"logits": self.table(x), "last_hidden_state": self.table(x)}


class InTuple(Bigrams):
    def forward(self, input_ids, attention_mask=None, labels=None):
        return torch.zeros(()), self.table(input_ids)


class MaskFirst(Bigrams):
    def forward(self, attention_mask, input_ids):
        assert (attention_mask == (input_ids != 0)).all()
        return self.table(input_ids)


class WholeBatch(Bigrams):
    """As wrappers for the Hugging Face Trainer are written, whose batches are passed by keyword."""

    def forward(self, **batch):
        return self.table(batch["input_ids"])


class KeywordsOnly(Bigrams):
    def forward(self, *, tokens, attention_mask=None):
        return self.table(tokens)


class Wrapper(nn.Module):
    """Passes everything on, as FSDP and DeepSpeed do."""

    def __init__(self) -> None:
        super().__init__()
        self.module = TokensOnly()

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


SHAPES = [
    TokensOnly, LastWithoutTargets, LossForTargets, InDataclass, InMapping, InTuple, MaskFirst, WholeBatch,
    KeywordsOnly, Wrapper,
]  # fmt: skip


def environment(**settings):
    pairs = {"x": [("why", "because"), ("a longer question", "b"), ("c", "d")] * 3}
    return Environment.from_pairs(pairs, lambda text: list(text.encode()), progress=False, **settings)


@pytest.mark.parametrize("shape", SHAPES)
def test_models_of_every_shape_have_the_feedback_of_their_logits(shape):
    """The pairs of one scored token would be satisfied with the last position; the others would not."""
    assert environment().evaluate(shape()) == environment().evaluate(Reference())


@pytest.mark.parametrize("shape", SHAPES)
def test_models_of_every_shape_have_the_influence_of_their_logits(shape):
    expected = environment().influence(Reference(), ROWS)
    found = environment().influence(shape(), ROWS)
    assert found.scores == expected.scores


def test_an_answer_of_one_token_does_not_hide_that_targets_are_needed():
    """Logits of one position suffice for it, so a choice by shape would come out differently in the next batch."""
    mixed = Environment.from_pairs(
        {"x": [("a", "bb"), ("c", "d")]}, lambda text: list(text.encode()), progress=False, separator="", batch_size=1
    )
    assert mixed.evaluate(LastWithoutTargets()) == mixed.evaluate(Reference())


class NeedsMore(Bigrams):
    def forward(self, tokens, positions):
        return self.table(tokens) + positions


class Several(Bigrams):
    def forward(self, tokens):
        return self.table(tokens), self.table(tokens).sin()


class HiddenStates(Bigrams):
    def forward(self, tokens):
        return self.table(tokens)[..., :64]


class BaseModel(Bigrams):
    def forward(self, input_ids, attention_mask=None):
        return {"last_hidden_state": self.table(input_ids)}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (NeedsMore, r"forward\(tokens, positions\) needs \['positions'\].*pass logits_of="),
        (Several, "with 2 tensors that could be logits.*pass logits_of="),
        (HiddenStates, r"logits are for 64 tokens, but token id \d+ is to be scored"),
        (BaseModel, "no tensors that could be logits"),
    ],
)
@pytest.mark.parametrize("measured", ["feedback", "influence"])
def test_other_models_are_refused_with_the_remedy(shape, message, measured):
    rows = {name: [[200, 201, 202], [201, 202, 203]] for name in ROWS}
    with pytest.raises(ConfigurationError, match=message):
        environment().evaluate(shape()) if measured == "feedback" else environment().influence(shape(), rows)


@pytest.mark.parametrize("shape", [NeedsMore, Several])
def test_logits_of_makes_any_model_work(shape):
    def logits_of(model, input_ids, attention_mask):
        assert (attention_mask == (input_ids != 0)).all()
        return model.table(input_ids)

    given = environment(logits_of=logits_of)
    assert given.evaluate(shape()) == environment().evaluate(Reference())
    assert given.influence(shape(), ROWS).scores == environment().influence(Reference(), ROWS).scores
    assert given.fingerprint == environment().fingerprint


def test_logits_of_must_be_a_function():
    with pytest.raises(ConfigurationError, match="logits_of is 'logits'; it must be a function of"):
        environment(logits_of="logits")
