"""Conversions of decoded rows to the inputs of a causal language model.

Pass one as ``transform=`` of the sampler. For packed rows, `collate_packed` as ``collate_fn=`` of the loader is faster:
it converts a whole batch at once, and with ``decode="lazy"`` also reads it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch

from dmagent_loader._loading.lazy import TAGS, read_together
from dmagent_loader._validation import whole_number
from dmagent_loader.errors import HOW_TO_RESUME, ConfigurationError, DecodeError
from dmagent_loader.shards.writing.packing import PACKED_MEMBER

__all__ = ["IGNORED_LABEL", "PACKED_MEMBER", "ShiftedTokens", "TokenizeText", "collate_packed", "packed_tokens"]

IGNORED_LABEL = -100
"""Label of padding, ignored by the losses of transformers and torch."""


def packed_tokens(sample: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Packed rows of tokens as ``input_ids`` and ``labels``, both (T,) int64; the model shifts the labels.

    Raises:
        DecodeError: The row holds no packed tokens.
    """
    tokens = torch.from_numpy(_packed(sample).astype(np.int64))
    return {"input_ids": tokens, "labels": tokens}


def collate_packed(samples: Sequence[Mapping[str, Any]], *, labels: bool = True) -> dict[str, Any]:
    """A batch of packed rows: ``input_ids`` and ``labels``, both (B, T) int64; the model shifts the labels.

    Rows of a sampler with ``decode="lazy"`` are read here, all into one array.

    The batch keeps the tags: ``__key__`` and ``__domain__`` as lists, ``__index__`` (B,) int64.

    Args:
        samples: B rows.
        labels: Whether to add labels. A training step that uses the tokens themselves as labels can do without, and
            data workers then transfer half as much (``collate_fn=functools.partial(collate_packed, labels=False)``).

    Raises:
        DecodeError: A row holds no packed tokens, or the rows have different lengths.
    """
    together = read_together(samples, PACKED_MEMBER)
    if together is not None:
        tags, stacked = together
    else:
        tags = {name: [sample[name] for sample in samples] for name in TAGS}
        stacked = _stacked(samples)
    # One block of memory for both: half the cost of allocating it, and of passing it from a worker to the trainer.
    wide = np.empty((1 + labels, *stacked.shape), np.int64)
    wide[:] = stacked
    names = ("input_ids", "labels")[: len(wide)]
    index = torch.from_numpy(np.array(tags["__index__"], np.int64))
    return {**tags, "__index__": index, **dict(zip(names, torch.from_numpy(wide), strict=True))}


def _stacked(samples: Sequence[Mapping[str, Any]]) -> np.ndarray[Any, Any]:
    rows = [_packed(sample) for sample in samples]
    if len({row.shape for row in rows}) > 1:
        named = ", ".join(
            f"{sample['__key__']!r} of {sample['__domain__']!r}: {len(row)}"
            for sample, row in zip(samples, rows, strict=True)
        )
        raise DecodeError(
            f"the rows of a batch have different lengths ({named}): pack all domains alike; {HOW_TO_RESUME}"
        )
    return np.stack(rows)


def _packed(sample: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    if PACKED_MEMBER not in sample and "input_ids" in sample:
        raise DecodeError(
            f"row {sample.get('__key__')!r} of {sample.get('__domain__')!r} was already transformed, but "
            "collate_packed converts rows as they are stored: leave out the sampler's transform="
        )
    if PACKED_MEMBER not in sample:
        raise DecodeError(
            f"row {sample.get('__key__')!r} of {sample.get('__domain__')!r} has no member {PACKED_MEMBER!r}, only "
            f"{[name for name in sample if not name.startswith('__')]}: write the shards with --tokenizer, or use "
            f"TokenizeText; {HOW_TO_RESUME}"
        )
    return np.asarray(sample[PACKED_MEMBER])


@dataclass(frozen=True, kw_only=True)
class ShiftedTokens:
    """Packed rows as inputs of Megatron-core models: tokens, shifted labels, loss mask and positions.

    A row of `length` + 1 tokens is used in full. In a row of `length` tokens the last position has no next token: its
    label is 0, and the loss ignores it.

    Args:
        length: T, tokens that the model reads.
    """

    length: int

    def __post_init__(self) -> None:
        whole_number("length", self.length, least=1)

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """``tokens``, ``labels`` and ``position_ids``, (T,) int64, and ``loss_mask``, (T,) float32.

        Raises:
            DecodeError: The row holds no packed tokens, or has another length.
        """
        row = packed_tokens(sample)["input_ids"]
        if len(row) not in (self.length, self.length + 1):
            raise DecodeError(
                f"row {sample.get('__key__')!r} of {sample.get('__domain__')!r} has {len(row)} tokens, but the model "
                f"reads {self.length}: write the shards with --sequence-length {self.length + 1} (or {self.length}, "
                "whose last position then has nothing to predict)"
            )
        following = torch.zeros(self.length, dtype=torch.int64)
        following[: len(row) - 1] = row[1:]
        return {
            "tokens": row[: self.length],
            "labels": following,
            "loss_mask": (torch.arange(self.length) < len(row) - 1).float(),
            "position_ids": torch.arange(self.length),
        }


@dataclass(frozen=True, kw_only=True)
class TokenizeText:
    """Tokenises text rows, cut and padded to a fixed length.

    Args:
        encode: Function from text to token ids, for example ``tokenizer.encode`` of transformers.
        length: T, tokens of a row.
        pad_token: Token id that fills short rows; for a tokenizer without one, that of the end-of-text token.
        member: Name of the text member.

    Raises:
        ConfigurationError: `pad_token` is None, or `encode` does not return token ids.
    """

    encode: Callable[[str], Sequence[int]]
    length: int
    pad_token: int
    member: str = "txt"

    def __post_init__(self) -> None:
        whole_number("length", self.length, least=1)
        if self.pad_token is None:
            raise ConfigurationError(
                "pad_token is None: the tokenizer has no padding token; pass the id of its end-of-text token "
                "(tokenizer.eos_token_id), the loss ignores padding"
            )
        whole_number("pad_token", self.pad_token, least=0)
        try:
            valid = all(isinstance(token, Integral) for token in self.encode("a"))
        except TypeError:
            valid = False
        if not valid:
            raise ConfigurationError(
                "encode does not return a list of token ids: pass tokenizer.encode of transformers, or a function from "
                "text to ids"
            )

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, all (T,) int64; labels of padding are -100.

        Raises:
            DecodeError: The row does not have the text member.
        """
        if self.member not in sample:
            raise DecodeError(
                f"row {sample.get('__key__')!r} of {sample.get('__domain__')!r} has no member {self.member!r}, only "
                f"{[name for name in sample if not name.startswith('__')]}: pass member="
            )
        ids = list(self.encode(sample[self.member]))[: self.length]
        missing = self.length - len(ids)
        return {
            "input_ids": torch.tensor(ids + [self.pad_token] * missing),
            "attention_mask": torch.tensor([1] * len(ids) + [0] * missing),
            "labels": torch.tensor(ids + [IGNORED_LABEL] * missing),
        }
