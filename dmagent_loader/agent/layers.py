"""LLaMA-style decoder block, shared by the agent and its critic (reconstructed: the paper says "decoder layer").

Shapes: B batch, T tokens, H heads, d width, h head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, each (B, 1, T, h)."""


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Cosines and sines of the rotary embedding.

    Args:
        positions: (B, T) int64, the absolute step of each token.
        head_dim: h, even.
        theta: Base of the frequencies.
        dtype: Type of the result; angles are computed in float64, so that long runs lose no precision.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    angles = positions[:, None, :, None] * theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def causal_mask(length: int, valid: Tensor | None, device: torch.device) -> Tensor:
    """Attention mask: a token attends to itself and to earlier valid tokens.

    This includes padded tokens: a softmax over nothing is NaN in the kernels of torch before 2.5, and a NaN in an
    unused row still spoils the gradient.

    Args:
        length: T.
        valid: (B, T) bool, False on padding; None: no padding.
        device: Device of the result.

    Returns:
        (B or 1, 1, T, T) bool, True where the row attends to the column.
    """
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None]
    if valid is not None:
        itself = torch.eye(length, dtype=torch.bool, device=device)
        mask = (mask & valid[:, None, :]) | itself
    return mask[:, None]


def _rotate(x: Tensor, rotary: Rotary) -> Tensor:
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class SelfAttention(nn.Module):
    """Multi-head attention with rotary embedding and without bias."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor | None, tail: int | None = None) -> Tensor:
        """Attends.

        Args:
            x: (B, T, d).
            rotary: See `rotary_tables`.
            mask: (B or 1, 1, T, T) bool, True where the row attends to the column. None: each token attends to itself
                and to all earlier ones, which is twice as fast because no mask is read.
            tail: Number of tokens to return, from the end; None: all.

        Returns:
            (B, tail or T, d).
        """
        length = x.shape[1]
        start = 0 if tail is None else length - tail
        if mask is None and 0 < start < length - 1:
            mask = causal_mask(length, None, x.device)
        query, key, value = (
            projection(part).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, part in ((self.q_proj, x[:, start:]), (self.k_proj, x), (self.v_proj, x))
        )
        cos, sin = rotary
        query, key = _rotate(query, (cos[:, :, start:], sin[:, :, start:])), _rotate(key, rotary)
        allowed = None if mask is None else mask[:, :, start:]
        # A single query, the last token, attends to everything; "is_causal" would treat it as the first.
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, is_causal=mask is None and start == 0
        )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class SwiGLU(nn.Module):
    """Gated feed-forward layer without bias."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) to (..., d)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, d_model: int, num_heads: int, d_ff: int, norm_eps: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.attention = SelfAttention(d_model, num_heads)
        self.feed_forward_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.feed_forward = SwiGLU(d_model, d_ff)

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor | None, tail: int | None = None) -> Tensor:
        """(B, T, d) to (B, tail or T, d); see `SelfAttention` for `rotary`, `mask` and `tail`."""
        start = 0 if tail is None else x.shape[1] - tail
        x = x[:, start:] + self.attention(self.attention_norm(x), rotary, mask, tail)
        out: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return out


def initialize(module: nn.Module, std: float = 0.02) -> None:
    """Draws every linear layer from N(0, std) with the global torch generator, as LLaMA does.

    Layers on the meta device are skipped: they have no values, but torch would spend a second on a deep model.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear) and not part.weight.is_meta:
            nn.init.normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
