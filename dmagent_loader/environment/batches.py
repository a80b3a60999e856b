"""Assignment of pairs to ranks and model calls, and the input arrays of a call.

The plan is a pure function of the token counts, so every rank computes the whole plan and nothing is communicated.

Shapes: B pairs in a call, T tokens of the longest pair, S scored tokens of the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dmagent_loader.environment.encoding import EncodedQuestion, Tokens

DEFAULT_BATCH_TOKENS = 8192
BATCH_TOKENS = {"cpu": 1024}
"""Tokens per call by device type: a CPU slows down beyond its cache size (benchmarks/environment.py)."""


@dataclass(frozen=True, kw_only=True)
class ScoredWindow:
    """The part of a pair that fits the model's maximum length.

    Args:
        tokens: (n + 1,), at most `max_length` + 1: the model reads the first n and predicts the last n.
        num_scored: Number of trailing tokens that are scored, 1 .. n.
    """

    tokens: Tokens
    num_scored: int

    @property
    def num_inputs(self) -> int:
        """Number of tokens the model reads."""
        return len(self.tokens) - 1


def window(encoded: EncodedQuestion, max_length: int, *, whole_pair: bool) -> ScoredWindow:
    """The last `max_length` + 1 tokens of a pair, truncated from the left as in lm-evaluation-harness.

    If the answer alone is longer than `max_length` (an error in the harness), its last `max_length` tokens are scored.

    Args:
        encoded: Encoded pair.
        max_length: Maximum number of tokens the model reads.
        whole_pair: Whether to score every token but the first, which has no context, instead of only the answer's.
    """
    tokens = encoded.tokens[-(max_length + 1) :]
    predictable = len(tokens) - 1
    return ScoredWindow(
        tokens=tokens, num_scored=predictable if whole_pair else min(encoded.num_answer_tokens, predictable)
    )


class Batch:
    """Windows stacked into arrays, padded on the right.

    Attributes:
        input_ids: (B, T).
        following: (B, T), next token at each position.
        mask: (B, T), 0 on padding.
        rows: (S,), row of each scored position.
        columns: (S,), column of each scored position, counted from the right (-1 is the last): a model may return only
            its last positions, or insert virtual tokens before the first.
        targets: (S,), token scored at each position.
        num_kept: Number of trailing columns that contain all scored positions.
    """

    def __init__(self, windows: Sequence[ScoredWindow]) -> None:
        width = max(window.num_inputs for window in windows)
        self.input_ids = np.zeros((len(windows), width), dtype=np.int64)
        self.following = np.zeros_like(self.input_ids)
        self.mask = np.zeros_like(self.input_ids)
        for row, window in enumerate(windows):
            self.input_ids[row, : window.num_inputs] = window.tokens[:-1]
            self.following[row, : window.num_inputs] = window.tokens[1:]
            self.mask[row, : window.num_inputs] = 1
        self.rows = np.repeat(np.arange(len(windows)), [window.num_scored for window in windows])
        self.columns = np.concatenate([np.arange(w.num_inputs - w.num_scored, w.num_inputs) for w in windows]) - width
        self.targets = self.following[self.rows, self.columns]
        self.num_kept = -int(self.columns.min())

    def __len__(self) -> int:
        return len(self.input_ids)


def plan_batches(
    lengths: Sequence[int], *, rank: int, world_size: int, batch_size: int, batch_tokens: int
) -> tuple[list[list[int]], int]:
    """Plans the batches of one rank and the number of calls every rank makes.

    Pairs are dealt in order of length, alternating direction, which balances their number and length across ranks.
    All ranks make the same number of calls because a sharded model (FSDP, ZeRO-3) communicates in each.

    Args:
        lengths: Number of tokens the model reads for each pair.
        rank: Data-parallel rank of this process.
        world_size: Number of data-parallel ranks.
        batch_size: Maximum number of pairs per call.
        batch_tokens: Maximum number of tokens per call, including padding; a longer pair gets a call of its own.

    Returns:
        Lists of pair indices, longest pairs first so that running out of memory shows in the first call; and the number
        of calls.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    # Each deal gives one pair to each rank; every other deal runs backwards so that no rank always gets the longest.
    deals = [order[start : start + world_size] for start in range(0, len(order), world_size)]
    dealt: list[list[int]] = [[] for _ in range(world_size)]
    for number, deal in enumerate(deals):
        for position, pair in enumerate(deal):
            dealt[position if number % 2 == 0 else world_size - 1 - position].append(int(pair))
    batches = [_batched(pairs, lengths, batch_size, batch_tokens) for pairs in dealt]
    return batches[rank], max(map(len, batches))


def _batched(pairs: list[int], lengths: Sequence[int], batch_size: int, batch_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for pair in pairs:
        # The first pair of a batch is its longest and sets the padded width.
        if batches and len(batches[-1]) < batch_size:
            width = lengths[batches[-1][0]]
            if (len(batches[-1]) + 1) * width <= batch_tokens:
                batches[-1].append(pair)
                continue
        batches.append([pair])
    return batches
