"""The demo's tokenizer, its small language model, and the loss on held-out text.

Shapes: N rows, L tokens of a row, B rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dmagent_loader._demo.config import CONTEXT_TOKENS, DemoConfig
from dmagent_loader.errors import require_extra
from dmagent_loader.shards.inputs.documents import Document
from dmagent_loader.shards.writing.packing import DocumentTokenizer, TextTokenizer

END_OF_TEXT = "<|endoftext|>"
_WARMUP_STEPS = 30
_GRADIENT_NORM = 1.0

Rows = npt.NDArray[np.int64]


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer trained on the documents; a ``PreTrainedTokenizerFast``.

    Raises:
        MissingExtraError: tokenizers or transformers is not installed.
    """
    tokenizers = require_extra("tokenizers", "demo")
    transformers = require_extra("transformers", "demo")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=CONTEXT_TOKENS
    )


def packed_rows(tokenizer_folder: Path, documents: Sequence[str], row_tokens: int) -> Rows:
    """Rows packed as in the shards, for text that is not trained on.

    Returns:
        (N, L).
    """
    held_out = [Document(text, {}, f"held-out document {number}") for number, text in enumerate(documents, start=1)]
    tokens = np.concatenate(DocumentTokenizer(TextTokenizer.load(tokenizer_folder)).tokens(held_out), dtype=np.int64)
    return tokens[: len(tokens) // row_tokens * row_tokens].reshape(-1, row_tokens)


def new_model(config: DemoConfig, vocab_size: int) -> Any:
    """An untrained LLaMA-style model; a ``LlamaForCausalLM``.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    transformers = require_extra("transformers", "demo")
    torch.manual_seed(config.seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=3 * config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_TOKENS,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def pretrain(model: Any, batches: Iterator[Rows], config: DemoConfig, progress: Callable[[float], None]) -> None:
    """Trains the base model.

    Args:
        model: Model to train, changed in place.
        batches: Batches, (B, L) each; at least as many as there are steps.
        config: Steps and learning rate.
        progress: Function called after each step with its loss.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.base_learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    model.train()
    for step in range(config.base_steps):
        for group in optimizer.param_groups:
            group["lr"] = config.base_learning_rate * _warmup_cosine(step, config.base_steps)
        batch = torch.from_numpy(next(batches))
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        progress(loss.item())
    model.eval()


@torch.no_grad()
def held_out_loss(model: Any, rows: Rows, batch_rows: int = 16) -> float:
    """Mean negative log-likelihood per token, in nats, of rows that were not trained on.

    Args:
        model: Model to measure; left in evaluation mode.
        rows: (N, L).
        batch_rows: Rows of one call.
    """
    model.eval()
    total = 0.0
    for start in range(0, len(rows), batch_rows):
        batch = torch.from_numpy(rows[start : start + batch_rows])
        total += model(input_ids=batch, labels=batch).loss.item() * len(batch)
    return total / len(rows)


def _warmup_cosine(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / _WARMUP_STEPS) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
