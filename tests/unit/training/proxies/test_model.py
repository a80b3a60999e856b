"""Stacked proxies: each is a LLaMA, and all start from the same weights."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.training.proxies.model import ProxyConfig, StackedProxies

CONFIG = ProxyConfig(vocab_size=60, width=16, layers=2, heads=2, feed_forward=24)


def test_a_proxy_is_a_llama() -> None:
    """The same weights in transformers' LlamaForCausalLM give the same logits."""
    model = StackedProxies(1, CONFIG)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # As drawn, all weights of the norms are 1.
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    proxy = {name: p.detach()[0] for name, p in model.named_parameters()}
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
    tokens = torch.randint(0, CONFIG.vocab_size, (4, 9), generator=generator)
    with torch.no_grad():
        ours = model.logits(model.hidden(tokens[None])).view(4, 9, -1)
        torch.testing.assert_close(ours, llama(tokens).logits, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in llama.parameters()) == CONFIG.num_parameters


def test_all_proxies_start_from_the_same_weights() -> None:
    model = StackedProxies(3, CONFIG)
    assert all(torch.equal(p[0], p[2]) for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == 3 * CONFIG.num_parameters


def test_sizes_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="heads"):
        ProxyConfig(width=64, heads=3)
    with pytest.raises(ConfigurationError, match="averaging is 1"):
        ProxyConfig(averaging=1.0)
