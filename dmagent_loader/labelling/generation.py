"""Texts that a language model writes by itself, as samples of its training data (paper, section 3.1 and appendix B)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from dmagent_loader._validation import is_finite_number, shown
from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.hashing import stream_key


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings of the sampling.

    Args:
        temperature: Divisor of the logits; 1.0 samples from the model's own distribution, as in the paper.
        max_tokens: Number of tokens at which a text ends that the model has not ended itself.
        batch_size: Texts written together.
        seed: Seed of the sampling.

    Raises:
        ConfigurationError: A setting is not positive.
    """

    temperature: float = 1.0
    max_tokens: int = 512
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_finite_number(self.temperature) or self.temperature <= 0:
            raise ConfigurationError(f"temperature is {shown(self.temperature)}; it must be positive, such as 1.0")
        for name in ("max_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at least 1")


def generate_texts(
    model: Any, tokenizer: Any, config: GenerationConfig | None = None, *, first_batch: int = 0
) -> Iterator[str]:
    """Writes texts without end, each from the start token alone.

    A text ends with the model's end-of-text token, after `max_tokens`, or where its positions end. Sampling is from the
    whole distribution: the model's own generation settings, such as top-k, would favour frequent topics and are not
    used. The random state of the caller is not touched, and batch b depends on the seed and b only.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        config: Settings; None: the defaults.
        first_batch: Number of the batch to begin with.

    Raises:
        ConfigurationError: The tokenizer has neither a start token nor an end-of-text token.
    """
    config = config or GenerationConfig()
    end = tokenizer.eos_token_id
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
    if start is None or end is None:
        raise ConfigurationError(
            "the tokenizer has no start or no end-of-text token, so a text could not begin or end: set bos_token and "
            "eos_token"
        )
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        config = replace(config, max_tokens=min(config.max_tokens, positions))
    for number in itertools.count(first_batch):
        generator = torch.Generator(device=model.device).manual_seed(stream_key(config.seed, "texts", str(number)))
        rows = _sample(model, start, end, config, generator)
        yield from tokenizer.batch_decode(rows, skip_special_tokens=True)


@torch.inference_mode()
def _sample(model: Any, start: int, end: int, config: GenerationConfig, generator: torch.Generator) -> list[list[int]]:
    """The tokens of `batch_size` texts, without the start and end tokens."""
    training = model.training
    model.eval()
    try:
        tokens = torch.full((config.batch_size, 1), start, device=model.device)
        ended = torch.zeros(config.batch_size, dtype=torch.bool, device=model.device)
        written, past = [], None
        for _ in range(config.max_tokens):
            output = model(input_ids=tokens, past_key_values=past, use_cache=True)
            past = output.past_key_values
            likely = (output.logits[:, -1].float() / config.temperature).softmax(dim=-1)
            tokens = torch.multinomial(likely, 1, generator=generator)
            tokens[ended] = end
            written.append(tokens)
            ended |= tokens[:, 0] == end
            if ended.all():
                break
    finally:
        model.train(training)
    rows = torch.cat(written, dim=1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]
