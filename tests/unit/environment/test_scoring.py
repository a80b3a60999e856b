"""An evaluation leaves the model, the random states and autograd as they were."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from dmagent_loader.environment import Environment
from dmagent_loader.environment.scoring import scoring_state, unwrap
from dmagent_loader.errors import FeedbackError


def quiet(pairs, **settings):
    return Environment.from_pairs({"x": pairs}, lambda text: list(text.encode()), progress=False, **settings)


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def draws():
    return torch.rand(4).tolist(), np.random.rand(4).tolist(), [random.random() for _ in range(4)]  # noqa: NPY002


class Noisy(nn.Module):
    """Draws from every generator in its forward, and may fail in the middle."""

    def __init__(self, inner: nn.Module, fail: bool = False) -> None:
        super().__init__()
        self.inner, self.fail = inner, fail
        self.was: list[tuple[bool, bool]] = []

    def forward(self, input_ids, attention_mask):
        draws()
        self.was.append((any(module.training for module in self.modules()), torch.is_grad_enabled()))
        if self.fail:
            raise RuntimeError("out of memory")
        return self.inner(input_ids, attention_mask)


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_modes_random_states_cache_and_gradients_are_put_back(model, pairs, fail, gradients):
    """Catches: model.train() at the end (it would unfreeze the frozen part), and restoring only after success."""
    noisy = Noisy(model, fail)
    noisy.train()
    model.body.eval()
    model.embedding.train()
    noisy.config = type("Config", (), {"use_cache": "as configured"})()
    before = modes(noisy)
    assert len(set(before.values())) == 2
    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
    expected = draws()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002

    with torch.set_grad_enabled(gradients):
        if fail:
            with pytest.raises(RuntimeError, match="out of memory"):
                quiet(pairs).evaluate(noisy)
        else:
            quiet(pairs).evaluate(noisy)
        assert torch.is_grad_enabled() is gradients

    assert draws() == expected
    assert modes(noisy) == before
    assert noisy.config.use_cache == "as configured"
    assert set(noisy.was) == {(False, False)}


def test_dropout_is_off_during_an_evaluation(model, pairs):
    environment = quiet(pairs)
    model.train()

    assert environment.evaluate(model) == environment.evaluate(model) == environment.evaluate(model.eval())


def test_modules_that_act_on_eval_are_not_triggered(pairs, model):
    """Adapter layers merge their weights in train(False); training must not go on with merged weights."""

    class Merging(nn.Linear):
        def train(self, mode: bool = True):
            if not mode:
                self.weight.data.zero_()
            return super().train(mode)

    model.head = Merging(16, 256)
    weight = model.head.weight.detach().clone()

    quiet(pairs).evaluate(model)

    assert torch.equal(model.head.weight, weight)


def test_tensors_cached_in_an_evaluation_can_be_trained_with(pairs, model):
    """Catches torch.inference_mode: its tensors (cached rotary tables) cannot be saved for a later backward pass."""

    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = model, None

        def forward(self, input_ids, attention_mask):
            if self.scale is None:
                self.scale = torch.arange(1.0, 257.0).rsqrt()
            return self.inner(input_ids, attention_mask) * self.scale

    caching = Caching()
    quiet(pairs).evaluate(caching)

    caching(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3)).sum().backward()


def test_a_training_step_is_the_same_with_and_without_an_evaluation_before_it(pairs):
    """The promise as a whole: losses of a run with dropout do not depend on how often it is evaluated."""
    transformers = pytest.importorskip("transformers")

    def losses(evaluate: bool) -> list[float]:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_dropout=0.2,
            max_position_embeddings=128,
        )
        model = transformers.LlamaForCausalLM(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        seen = []
        for _ in range(4):
            tokens = torch.randint(256, (2, 16))
            loss = model(input_ids=tokens, labels=tokens).loss
            if evaluate:
                quiet(pairs).evaluate(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        assert model.config.use_cache is True
        return seen

    assert losses(evaluate=True) == losses(evaluate=False)


@pytest.mark.slow
def test_compiled_model_is_unwrapped(model):
    """Slow: torch.compile imports for seconds."""
    assert unwrap(torch.compile(model)) is model


def test_data_parallel_model_is_unwrapped(model):
    assert unwrap(nn.DataParallel(model)) is model
    assert unwrap(model) is model


def test_state_of_a_plain_callable_needs_no_module():
    with scoring_state(lambda input_ids, attention_mask: None):
        assert not torch.is_grad_enabled()


class OnAnotherRank(nn.Module):
    """Answers for given tokens itself, as a model does whose logits lie on several ranks."""

    def __init__(self, inner: nn.Module, holds_output: bool) -> None:
        super().__init__()
        self.inner, self.holds_output = inner, holds_output

    def token_log_probs(self, input_ids, following):
        assert (following[:, :-1][input_ids[:, 1:] != 0] == input_ids[:, 1:][input_ids[:, 1:] != 0]).all()
        log_probs = self.inner(input_ids, (input_ids != 0).long()).log_softmax(-1)
        return log_probs.gather(-1, following[..., None])[..., 0] if self.holds_output else None


def test_a_model_that_answers_for_tokens_gives_the_feedback_of_its_logits(pairs, model):
    """Catches log-probabilities of the tokens themselves in place of those that follow."""
    expected = quiet(pairs).evaluate(model)
    assert quiet(pairs).evaluate(OnAnotherRank(model, holds_output=True)) == pytest.approx(expected, abs=1e-6)


def test_a_rank_without_the_output_adds_nothing(pairs, model):
    """Alone it has no feedback at all, which must not pass for a number."""
    with pytest.raises(FeedbackError, match="no rank"):
        quiet(pairs).evaluate(OnAnotherRank(model, holds_output=False))
