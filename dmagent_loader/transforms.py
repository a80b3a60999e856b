"""Conversions of decoded rows to the inputs of a causal language model.

Pass one as ``transform=`` of the sampler. For packed rows, `collate_packed` as ``collate_fn=`` of the loader is faster:
it converts a whole batch at once, and with ``decode="lazy"`` also reads it at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch

from dmagent_loader._loading.lazy import TAGS, read_together
from dmagent_loader._validation import added_tokens, whole_number
from dmagent_loader.errors import HOW_TO_RESUME, ConfigurationError, DecodeError
from dmagent_loader.shards.writing.packing import LENGTHS_MEMBER, PACKED_MEMBER

__all__ = ["IGNORED_LABEL", "PACKED_MEMBER", "ShiftedTokens", "TokenizeText", "collate_packed", "packed_tokens"]

IGNORED_LABEL = -100
"""Label of padding, ignored by the losses of transformers and torch."""

_LEAST_PADDED = 16
"""Tokens of the text "a" that only padding explains."""

logger = logging.getLogger(__name__)


def packed_tokens(sample: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Packed rows of tokens as ``input_ids`` and ``labels``, both (T,) int64; the model shifts the labels.

    Raises:
        DecodeError: The row holds no packed tokens.
    """
    tokens = torch.from_numpy(_packed(sample).astype(np.int64))
    return {"input_ids": tokens, "labels": tokens}


def collate_packed(
    samples: Sequence[Mapping[str, Any]], *, labels: bool = True, end_token: int | None = None
) -> dict[str, Any]:
    """A batch of packed rows: ``input_ids`` and ``labels``, both (B, T) int64; the model shifts the labels.

    Rows of a sampler with ``decode="lazy"`` are read here, all into one array.

    The batch keeps the tags: ``__key__`` and ``__domain__`` as lists, ``__index__`` (B,) int64.

    Args:
        samples: B rows.
        labels: Whether to add labels. A training step that uses the tokens themselves as labels can do without, and
            data workers then transfer half as much (``collate_fn=functools.partial(collate_packed, labels=False)``).
        end_token: Id of the end-of-text token, to keep the documents of a row apart; None: a row is one text. Then
            ``position_ids`` (B, T) int64 begin at 0 in each document, by which models of transformers limit attention
            to it, and the first token of each document has no label. Where documents may contain the token (shards of
            ``dmagent shard --parse-special-tokens``), the rows say themselves where documents end.

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
    names = ["input_ids", *["labels"] * labels, *["position_ids"] * (end_token is not None)]
    wide = np.empty((len(names), *stacked.shape), np.int64)
    wide[: 1 + labels] = stacked
    if end_token is not None:
        # Rows that were read together have no other member; to ask a lazy one would read it once more.
        starts = _document_starts(samples if together is None else (), stacked, end_token)
        places = np.arange(stacked.shape[1])
        np.subtract(places, np.maximum.accumulate(np.where(starts, places, 0), axis=1), out=wide[-1])
        if labels:
            wide[1][starts] = IGNORED_LABEL
    index = torch.from_numpy(np.array(tags["__index__"], np.int64))
    return {**tags, "__index__": index, **dict(zip(names, torch.from_numpy(wide), strict=True))}


def _document_starts(
    samples: Sequence[Mapping[str, Any]], rows: np.ndarray[Any, Any], end_token: int
) -> np.ndarray[Any, Any]:
    """Whether a document, or a part of one, begins at a token, (B, T).

    Args:
        samples: B rows, which may say themselves where documents end; empty: none of them does.
        rows: Their tokens, (B, T).
        end_token: Id of the end-of-text token.
    """
    starts = np.ones(rows.shape, np.bool_)
    starts[:, 1:] = rows[:, :-1] == end_token
    for sample, row in zip(samples, starts, strict=False):
        if LENGTHS_MEMBER in sample:
            row[1:] = False
            row[np.cumsum(sample[LENGTHS_MEMBER])[:-1]] = True
    return starts


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


@dataclass
class _Cuts:
    """Rows that were cut, in this process."""

    rows: int = 0
    cut_rows: int = 0
    tokens: int = 0
    cut_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class TokenizeText:
    """Tokenises text rows, ended by the end-of-text token, cut and padded to a fixed length.

    Rows that are cut are counted in each process; the 1st, 10th, 100th, ... is logged with the share of tokens lost. To
    lose none, pack the documents (`PackText`, or ``dmagent shard --tokenizer``).

    Args:
        encode: Function from text to all of its token ids, for example ``tokenizer.encode`` of transformers.
        length: T, tokens of a row, at least 2.
        pad_token: Token id that fills short rows; for a tokenizer without one, that of the end-of-text token.
        member: Name of the text member.
        end_token: Token id that ends every document, unless `encode` has put it there. ``"tokenizer"``: the
            ``eos_token_id`` of the tokenizer whose method `encode` is; with another function, none, with a warning.
            None: no such token.
        parse_special_tokens: Whether text that spells a special token, such as ``<|endoftext|>``, becomes that token,
            as documents in a chat format need. False: it is text like any other if `encode` is a method of a tokenizer
            of transformers; with another function, a row with the end token in its middle is an error.

    Raises:
        ConfigurationError: `pad_token` is None, or `encode` does not return token ids, truncates, pads, or appends
            another token than `end_token` to every text.
    """

    encode: Callable[..., Sequence[int]]
    length: int
    pad_token: int
    member: str = "txt"
    end_token: int | Literal["tokenizer"] | None = "tokenizer"
    parse_special_tokens: bool = False
    _cuts: _Cuts = field(default_factory=_Cuts, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        whole_number("length", self.length, least=2)
        if self.pad_token is None:
            raise ConfigurationError(
                "pad_token is None: the tokenizer has no padding token; pass the id of its end-of-text token "
                "(tokenizer.eos_token_id), the loss ignores padding"
            )
        whole_number("pad_token", self.pad_token, least=0)
        try:
            probe = self._encoded("a")
            valid = all(isinstance(token, Integral) for token in probe)
        except TypeError:
            valid = False
        if not valid:
            raise ConfigurationError(
                "encode does not return a list of token ids: pass tokenizer.encode of transformers, or a function from "
                "text to ids"
            )
        if len(probe) >= _LEAST_PADDED:
            raise ConfigurationError(
                f"encode returns {len(probe)} tokens for 'a', so it pads and padding would be trained on: pass a "
                "function without padding, TokenizeText pads"
            )
        if self.end_token is not None:
            self._find_end_token(added_tokens(self._encoded(""), probe)[1])
        if not self._is_method_of_transformers():  # whose encode truncates on request only, and warns of long texts
            found = len(self._encoded("a " * 2 * self.length))
            if found < self.length:
                raise ConfigurationError(
                    f"encode returns {found} tokens for a text of {2 * self.length} words, so it truncates below "
                    f"length={self.length} and most of a long document would be lost: pass a function without "
                    "truncation, TokenizeText cuts and counts"
                )

    def _find_end_token(self, appended: list[int]) -> None:
        """Sets the id of the end-of-text token.

        Args:
            appended: Tokens that `encode` appends to every text.
        """
        end_token = self.end_token
        if end_token == "tokenizer":
            end_token = getattr(getattr(self.encode, "__self__", None), "eos_token_id", None)
        if appended and appended != [end_token]:
            known = "is unknown" if end_token is None else f"has id {end_token}"
            meant = f"end_token={appended[0]} if that token ends documents; or " * (len(appended) == 1)
            raise ConfigurationError(
                f"encode appends tokens of its own ({appended}) to every text, but the end-of-text token {known}, so "
                f"documents would not end as packed ones do: pass {meant}a function that appends none, such as "
                "tokenizer.encode with add_special_tokens=False, and end_token= (its id); or end_token=None to leave "
                "the texts as encode ends them"
            )
        if end_token is None:
            logger.warning(
                "the end-of-text token is unknown, so documents will not end: pass end_token= (its id), or "
                "end_token=None if the function encode puts it there or it is not wanted"
            )
        else:
            whole_number("end_token", end_token, least=0)
        object.__setattr__(self, "end_token", end_token)

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, all (T,) int64; labels of padding are -100.

        Raises:
            DecodeError: The row does not have the text member, has no next token to predict, or contains the end token.
        """
        row = f"row {sample.get('__key__')!r} of {sample.get('__domain__')!r}"
        if self.member not in sample:
            raise DecodeError(
                f"{row} has no member {self.member!r}, only "
                f"{[name for name in sample if not name.startswith('__')]}: pass member="
            )
        ids = self._encoded(sample[self.member])
        if self.end_token is not None:
            assert self.end_token != "tokenizer"  # replaced at the start
            if not self.parse_special_tokens and self.end_token in ids[1:-1]:
                raise DecodeError(
                    f"{row} spells the end-of-text token (id {self.end_token}), so the document would end there: pass "
                    "tokenizer.encode of transformers itself, which can read it as text, or parse_special_tokens=True"
                )
            if ids[-1:] != [self.end_token]:
                ids.append(self.end_token)
        if len(ids) < 2:
            raise DecodeError(
                f"{row} has {len(ids)} token(s), so there is no next token to predict, and the loss of a batch of such "
                "rows is NaN: remove empty rows when the shards are written"
            )
        self._count(row, len(ids))
        ids = ids[: self.length]
        missing = self.length - len(ids)
        return {
            "input_ids": torch.tensor(ids + [self.pad_token] * missing),
            "attention_mask": torch.tensor([1] * len(ids) + [0] * missing),
            "labels": torch.tensor(ids + [IGNORED_LABEL] * missing),
        }

    def _encoded(self, text: str) -> list[int]:
        if self._is_method_of_transformers():
            return list(self.encode(text, split_special_tokens=not self.parse_special_tokens))
        return list(self.encode(text))

    def _is_method_of_transformers(self) -> bool:
        return hasattr(getattr(self.encode, "__self__", None), "split_special_tokens")

    def _count(self, row: str, num_tokens: int) -> None:
        cuts = self._cuts
        cuts.rows += 1
        cuts.tokens += num_tokens
        if num_tokens <= self.length:
            return
        cuts.cut_rows += 1
        cuts.cut_tokens += num_tokens - self.length
        if cuts.cut_rows == 10 ** (len(str(cuts.cut_rows)) - 1):
            logger.warning(
                "%s has %d tokens and was cut to length=%d; so far %d of %d rows were cut in this process, %.1f%% of "
                "their tokens lost: pack the documents (pack=PackText(...), or dmagent shard --tokenizer) to lose none",
                row,
                num_tokens,
                self.length,
                cuts.cut_rows,
                cuts.rows,
                100 * cuts.cut_tokens / cuts.tokens,
            )
