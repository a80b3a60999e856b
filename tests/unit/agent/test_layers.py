"""The pieces of the decoder block, by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dmagent_loader.agent.layers import DecoderBlock, causal_mask, rotary_tables


def test_the_mask_by_hand() -> None:
    """Row attends to column: earlier valid tokens and itself, and a padded token to itself alone."""
    valid = torch.tensor([[False, True, True]])
    assert causal_mask(3, valid, torch.device("cpu"))[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert causal_mask(3, None, torch.device("cpu"))[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_rotary_angles_are_step_times_theta_to_the_minus_2i_over_h() -> None:
    cos, sin = rotary_tables(torch.tensor([[0, 3]]), head_dim=4, theta=100.0, dtype=torch.float64)
    assert cos[0, 0, 0].tolist() == [1.0] * 4
    assert sin[0, 0, 1].tolist() == pytest.approx([math.sin(3), math.sin(0.3), math.sin(3), math.sin(0.3)])


def test_a_block_is_the_textbook_formula() -> None:
    """Pre-norm, scaled dot products, SwiGLU, written out for one head without a library's attention."""
    torch.manual_seed(0)
    block = DecoderBlock(d_model=6, num_heads=1, d_ff=10, norm_eps=1e-6).double()
    x = torch.randn(1, 4, 6, dtype=torch.float64)
    rotary = rotary_tables(torch.arange(4)[None], 6, 10_000.0, torch.float64)

    def rotate(v: torch.Tensor) -> torch.Tensor:
        """Each pair (i, i + h/2) as a complex number, turned by its angle."""
        turned = torch.complex(v[..., :3], v[..., 3:]) * torch.complex(rotary[0][0, 0], rotary[1][0, 0])[:, :3]
        return torch.cat([turned.real, turned.imag], dim=-1)

    def norm(v: torch.Tensor) -> torch.Tensor:
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    part = block.attention
    q, k, v = (p.weight @ norm(x)[0].T for p in (part.q_proj, part.k_proj, part.v_proj))
    scores = rotate(q.T) @ rotate(k.T).T / math.sqrt(6)
    weights = scores.masked_fill(torch.ones(4, 4).triu(1).bool(), -math.inf).softmax(-1)
    middle = x[0] + (weights @ v.T) @ part.o_proj.weight.T
    gate, up = (norm(middle) @ p.weight.T for p in (block.feed_forward.gate_proj, block.feed_forward.up_proj))
    expected = middle + (F.silu(gate) * up) @ block.feed_forward.down_proj.weight.T
    mask = causal_mask(4, None, torch.device("cpu"))
    torch.testing.assert_close(block(x, rotary, mask)[0], expected)
    torch.testing.assert_close(block(x, rotary, mask, 2)[0], expected[2:])
