"""Parts of programs that measure influence in a training loop: questions, rows of domains, and a step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmagent_loader.environment import Environment

PAIRS = {
    "a": [("why " * (i % 4), "because" + str(i * i)) for i in range(11)],
    "b": [("q", "a"), ("c", "d")],
}
ROWS = {f"d{d}": [[(d * 37 + i * 11 + j * j) % 256 for j in range(9 + i)] for i in range(5)] for d in range(3)}


def byte_environment() -> Environment:
    """`PAIRS`, with one token for each byte."""
    return Environment.from_pairs(PAIRS, lambda text: list(text.encode()), prefix_token_id=0, progress=False)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """A step on random tokens that the seed chooses."""
    torch.manual_seed(seed)
    optimizer.zero_grad()
    batch = torch.randint(0, 256, (4, 12))
    logits = model(batch[:, :-1], None)
    nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
    optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    """A copy of a tensor, gathered from all ranks if it is sharded."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
