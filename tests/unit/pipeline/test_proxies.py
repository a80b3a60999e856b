"""Stacked proxies: each is a LLaMA, and each is trained as if it were alone."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.pipeline.proxies import ProxyConfig, ProxyTrainer, StackedProxies

CONFIG = ProxyConfig(vocab_size=60, width=16, layers=2, heads=2, feed_forward=24, rows_per_update=2, warmup_updates=3)
STEPS = 4


def rows(number: int, step: int) -> torch.Tensor:
    """(4 rows, 9 tokens): each proxy has its own, with losses of quite different size."""
    generator = torch.Generator().manual_seed(100 * number + step)
    return torch.randint(0, 5 + 20 * number, (4, 9), generator=generator)


def trained_alone(number: int, steps: int = STEPS) -> ProxyTrainer:
    trainer = ProxyTrainer(1, CONFIG)
    for step in range(steps):
        trainer.train(rows(number, step)[None])
    return trainer


def assert_same_weights(one: StackedProxies, i: int, other: StackedProxies, j: int) -> None:
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a[i], b[j], rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_training_many_at_once_equals_training_each_alone() -> None:
    """Catches every operation that mixes proxies: rows, embeddings or statistics taken over the whole stack."""
    together = ProxyTrainer(3, CONFIG)
    for step in range(STEPS):
        losses = together.train(torch.stack([rows(i, step) for i in range(3)]))
    assert losses.max() > losses.min() + 0.1
    for i in range(3):
        assert_same_weights(together.model, i, trained_alone(i).model, 0)


def test_a_proxy_is_a_llama() -> None:
    """The same weights in transformers' LlamaForCausalLM give the same logits."""
    trainer = trained_alone(2)
    proxy = {name: p.detach()[0] for name, p in trainer.model.named_parameters()}
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=CONFIG.vocab_size,
            hidden_size=CONFIG.width,
            intermediate_size=CONFIG.feed_forward,
            num_hidden_layers=CONFIG.layers,
            num_attention_heads=CONFIG.heads,
            tie_word_embeddings=True,
            rms_norm_eps=1e-6,
        )
    ).eval()
    weights = {"model.embed_tokens.weight": proxy["embedding"], "model.norm.weight": proxy["final_norm"][0]}
    weights["lm_head.weight"] = proxy["embedding"]
    for layer in range(CONFIG.layers):
        prefix = f"model.layers.{layer}."
        q, k, v = proxy[f"qkv.{layer}"].chunk(3, dim=1)
        gate, up = proxy[f"gate_up.{layer}"].chunk(2, dim=1)
        for name, matrix in (("q", q), ("k", k), ("v", v), ("o", proxy[f"out.{layer}"])):
            weights[f"{prefix}self_attn.{name}_proj.weight"] = matrix.T
        for name, matrix in (("gate", gate), ("up", up), ("down", proxy[f"down.{layer}"])):
            weights[f"{prefix}mlp.{name}_proj.weight"] = matrix.T
        weights[f"{prefix}input_layernorm.weight"] = proxy[f"attention_norm.{layer}"][0]
        weights[f"{prefix}post_attention_layernorm.weight"] = proxy[f"mlp_norm.{layer}"][0]
    llama.load_state_dict(weights)
    tokens = rows(2, 0)
    with torch.no_grad():
        ours = trainer.model.logits(trainer.model.hidden(tokens[None])).view(4, 9, -1)
        torch.testing.assert_close(ours, llama(tokens).logits, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in llama.parameters()) == CONFIG.num_parameters


def test_all_proxies_start_from_the_same_weights() -> None:
    model = StackedProxies(3, CONFIG)
    assert_same_weights(model, 0, model, 2)
    assert sum(p.numel() for p in model.parameters()) == 3 * CONFIG.num_parameters


def test_those_that_are_kept_go_on_as_if_they_had_been_alone() -> None:
    """Catches moments of the optimiser that stay with the wrong proxy."""
    trainer = ProxyTrainer(3, CONFIG)
    for step in range(2):
        trainer.train(torch.stack([rows(i, step) for i in range(3)]))
    trainer.keep([0, 2])
    for step in range(2, STEPS):
        trainer.train(torch.stack([rows(i, step) for i in (0, 2)]))
    assert trainer.model.num_proxies == 2
    assert_same_weights(trainer.model, 1, trained_alone(2).model, 0)


def test_a_restored_state_continues_exactly() -> None:
    """Catches a warm-up that starts again and moments that are lost."""
    whole = trained_alone(1)
    first = trained_alone(1, steps=1)
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    second = ProxyTrainer(4, CONFIG)
    second.load_state(state)
    for step in range(1, STEPS):
        second.train(rows(1, step)[None])
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_states_of_another_size_are_refused() -> None:
    other = ProxyTrainer(1, ProxyConfig(vocab_size=60, width=32, heads=2))
    with pytest.raises(StateError, match="another size"):
        other.load_state(trained_alone(0, steps=1).state())


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="rows_per_update"):
        ProxyTrainer(1, CONFIG).train(rows(0, 0)[None, :3])
    with pytest.raises(ConfigurationError, match="heads"):
        ProxyConfig(width=64, heads=3)
