"""Many LLaMA-style proxy models as one model with stacked weights (paper, C.2; stacking: extension).

Models this small leave a machine idle when they run one at a time, because every operation is tiny. Here each weight
has a leading axis over proxies and each matrix product is batched over it. No operation mixes two proxies.

Shapes: P proxies, B rows, T tokens of a row, N = B * T, E width, F width of the feed-forward layer, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dmagent_loader.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class ProxyConfig:
    """Size and optimiser of one proxy.

    The paper's proxies have 50M parameters. These defaults are about 300 times smaller: a set of trajectories takes
    minutes on one CPU core.

    Args:
        vocab_size: V.
        width: E.
        layers: Number of Transformer blocks.
        heads: Number of attention heads; must divide `width` into an even number.
        feed_forward: F, inner width of SwiGLU.
        rows_per_update: B, rows of one optimiser update.
        learning_rate: Learning rate of AdamW, constant after the warm-up.
        warmup_updates: Updates over which the learning rate rises linearly.
        weight_decay: Weight decay of AdamW.
        averaging: Share of the old average that an update leaves in the moving average of the weights; 0: no averaging.
            The average is scored, because updates at a constant learning rate make the weights and their scores
            fluctuate.
        seed: Seed of the initial weights. All proxies share them, so that they differ by their data alone.

    Raises:
        ConfigurationError: A width does not divide into heads, or `averaging` is outside [0, 1).
    """

    vocab_size: int = 1024
    width: int = 64
    layers: int = 2
    heads: int = 4
    feed_forward: int = 172
    rows_per_update: int = 2
    learning_rate: float = 3e-3
    warmup_updates: int = 10
    weight_decay: float = 0.01
    averaging: float = 0.98
    seed: int = 0

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ConfigurationError(
                f"width {self.width} does not split into {self.heads} heads of even width: choose another number"
            )
        if not 0 <= self.averaging < 1:
            raise ConfigurationError(f"averaging is {self.averaging}: it must be at least 0 and below 1")

    @property
    def num_parameters(self) -> int:
        """Parameters of one proxy; input and output embedding are tied."""
        block = 4 * self.width**2 + 3 * self.width * self.feed_forward + 2 * self.width
        return self.vocab_size * self.width + self.layers * block + self.width


class StackedProxies(nn.Module):
    """P language models in one: LLaMA blocks (RMSNorm, RoPE, SwiGLU, no bias), tied embedding.

    All P start from the same weights.

    Args:
        num_proxies: P.
        config: Size of each proxy.
    """

    def __init__(self, num_proxies: int, config: ProxyConfig) -> None:
        super().__init__()
        self.config = config
        self.num_proxies = num_proxies
        generator = torch.Generator().manual_seed(config.seed)
        e, f = config.width, config.feed_forward

        def matrix(rows: int, columns: int, std: float) -> nn.Parameter:
            one = torch.randn(rows, columns, generator=generator) * std
            return nn.Parameter(one.expand(num_proxies, rows, columns).clone())

        def ones() -> nn.Parameter:
            return nn.Parameter(torch.ones(num_proxies, 1, e))

        # Matrices that write into the residual stream start smaller, so that its scale does not grow with depth.
        std, residual_std = e**-0.5, (2 * config.layers * e) ** -0.5
        self.embedding = matrix(config.vocab_size, e, 0.05)
        self.qkv = nn.ParameterList([matrix(e, 3 * e, std) for _ in range(config.layers)])
        self.out = nn.ParameterList([matrix(e, e, residual_std) for _ in range(config.layers)])
        self.gate_up = nn.ParameterList([matrix(e, 2 * f, std) for _ in range(config.layers)])
        self.down = nn.ParameterList([matrix(f, e, residual_std) for _ in range(config.layers)])
        self.attention_norm = nn.ParameterList([ones() for _ in range(config.layers)])
        self.mlp_norm = nn.ParameterList([ones() for _ in range(config.layers)])
        self.final_norm = ones()

    def hidden(self, tokens: Tensor) -> Tensor:
        """Last hidden states.

        Args:
            tokens: (P, B, T) int64, the rows of each proxy; or (1, B, T), the same rows for all.

        Returns:
            (P, B * T, E).
        """
        proxies, (_, rows, length) = self.num_proxies, tokens.shape
        heads, head_width = self.config.heads, self.config.width // self.config.heads
        flat = tokens.reshape(tokens.shape[0], rows * length)
        offsets = torch.arange(proxies, device=tokens.device)[:, None] * self.config.vocab_size
        x = functional.embedding(flat + offsets, self.embedding.view(-1, self.config.width))
        cos, sin = rotary(length, head_width, x.device)
        for layer in range(self.config.layers):
            y = torch.bmm(rms_norm(x), scaled(self.qkv[layer], self.attention_norm[layer]))
            y = y.view(proxies * rows, length, 3 * heads, head_width).transpose(1, 2)
            qk, v = torch.split(y, [2 * heads, heads], dim=1)
            q, k = torch.split(rotate(qk, cos, sin), heads, dim=1)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            y = y.transpose(1, 2).reshape(proxies, rows * length, self.config.width)
            x = x + torch.bmm(y, self.out[layer])
            y = torch.bmm(rms_norm(x), scaled(self.gate_up[layer], self.mlp_norm[layer]))
            gate, up = y.chunk(2, dim=-1)
            x = x + torch.bmm(functional.silu(gate) * up, self.down[layer])
        return rms_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(P, N, E) -> (P, N, V)."""
        return torch.bmm(hidden, (self.embedding * self.final_norm).transpose(1, 2))

    def losses(self, tokens: Tensor) -> Tensor:
        """Mean next-token loss of each proxy in nats.

        Args:
            tokens: (P, B, T + 1) int64, the rows of each proxy.

        Returns:
            (P,).
        """
        logits = self.logits(self.hidden(tokens[:, :, :-1]))
        targets = tokens[:, :, 1:].reshape(-1)
        loss = functional.cross_entropy(logits.view(-1, self.config.vocab_size), targets, reduction="none")
        return loss.view(self.num_proxies, -1).mean(dim=1)


def rms_norm(x: Tensor) -> Tensor:
    """Root mean square normalisation of (..., E) over the last axis, without weight."""
    return functional.rms_norm(x, x.shape[-1:], eps=1e-6)


def scaled(matrix: Tensor, weight: Tensor) -> Tensor:
    """Folds the weight of a norm into a matrix, which is cheaper than scaling all tokens.

    (P, E, columns), (P, 1, E) -> (P, E, columns).
    """
    return matrix * weight.transpose(1, 2)


def rotary(length: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of the rotary angles, (T, head_width) each; see `rotate`."""
    frequencies = 10_000.0 ** (-torch.arange(0, head_width, 2, device=device) / head_width)
    angles = torch.arange(length, device=device)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: (..., T, head_width)."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin
