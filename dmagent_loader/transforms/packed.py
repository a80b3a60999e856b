"""Packed rows of tokens: single ones, whole batches, and shifted ones for Megatron-core."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dmagent_loader._loading.lazy import TAGS, Columns, read_together
from dmagent_loader._loading.slots import Empty
from dmagent_loader._validation import shown, whole_number
from dmagent_loader.errors import HOW_TO_RESUME, ConfigurationError, DecodeError
from dmagent_loader.shards.writing.packing import LENGTHS_MEMBER, PACKED_MEMBER

IGNORED_LABEL = -100
"""Label of padding, ignored by the losses of transformers and torch."""


def packed_tokens(sample: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Packed rows of tokens as ``input_ids`` and ``labels``, both (T,) int64; the model shifts the labels.

    Raises:
        DecodeError: The row holds no packed tokens.
    """
    tokens = torch.from_numpy(_packed(sample).astype(np.int64))
    return {"input_ids": tokens, "labels": tokens}


def collate_packed(
    samples: Sequence[Mapping[str, Any]],
    *,
    labels: bool = True,
    end_token: int | None = None,
    narrow: bool = False,
    keys: bool = True,
) -> dict[str, Any]:
    """A batch of packed rows: ``input_ids`` and ``labels``, both (B, T) int64; the model shifts the labels.

    `MixingDataLoader` makes the same batch from rows that it reads together. In another loader, rows of a sampler with
    ``decode="lazy"`` are read here, all into one array.

    The batch keeps the tags: ``__key__`` and ``__domain__`` as lists, ``__index__`` (B,) int64.

    Args:
        samples: B rows.
        labels: Whether to add labels. A training step that uses the tokens themselves as labels can do without
            (``collate_fn=functools.partial(collate_packed, labels=False)``).
        end_token: Id of the end-of-text token, to keep the documents of a row apart; None: a row is one text. Then
            ``position_ids`` (B, T) int64 begin at 0 in each document, by which models of transformers limit attention
            to it, and the first token of each document has no label. Where documents may contain the token (shards of
            ``dmagent shard --parse-special-tokens``), the rows say themselves where documents end.
        narrow: Whether ``input_ids`` keep the type in which they are stored (uint16, or uint32 for a vocabulary of more
            than 65,536 tokens), which is a quarter of the memory to write and to move. The batch then has no labels;
            `widened` adds them and makes the tokens int64, on the device of the model.
        keys: Whether to add ``__key__``, which is looked up for each row. ``__index__`` identifies a sample as well.

    Raises:
        DecodeError: A row holds no packed tokens, or the rows have different lengths.
        ConfigurationError: `narrow` is set with an `end_token`, whose labels and positions are int64.
    """
    form = PackedBatch(labels=labels, end_token=end_token, narrow=narrow, keys=keys)
    columns = read_together(samples, PACKED_MEMBER)
    if columns is not None:
        return form.of_columns(columns)
    tags = {name: [sample[name] for sample in samples] for name in TAGS}
    return form.of(tags, _stacked(samples), samples)


def widened(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of ``collate_packed(..., narrow=True)`` as models take it: ``input_ids`` and ``labels``, (B, T) int64.

    Move the batch to the device of the model first: the narrow tokens are a quarter of the bytes.

    Example:
        >>> batch = widened({"input_ids": torch.tensor([[7, 65_535]], dtype=torch.uint16)})
        >>> batch["input_ids"], batch["labels"].dtype
        (tensor([[    7, 65535]]), torch.int64)
    """
    tokens = batch["input_ids"].to(torch.int64)
    return {**batch, "input_ids": tokens, "labels": tokens}


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """The batches that `collate_packed` makes, with its arguments."""

    labels: bool = True
    end_token: int | None = None
    narrow: bool = False
    keys: bool = True

    def __post_init__(self) -> None:
        if self.narrow and self.end_token is not None:
            raise ConfigurationError(
                "narrow=True with an end_token: positions and the labels of the first tokens of documents do not fit "
                "the type of the tokens; leave out narrow, or end_token"
            )

    def of_columns(self, columns: Columns, empty: Empty = torch.empty) -> dict[str, Any]:
        """The batch of rows that were read together.

        Args:
            columns: The rows.
            empty: `torch.empty`, or a function like it, for the tensors of tokens.
        """
        tags = {"__index__": columns.index, "__domain__": columns.domain}
        if self.keys:
            tags["__key__"] = columns.keys()
        # Rows that were read together have no other member; to ask a lazy one would read it once more.
        return self.of(tags, columns.values, (), empty)

    def of(
        self,
        tags: Mapping[str, Any],
        rows: np.ndarray[Any, Any],
        samples: Sequence[Mapping[str, Any]],
        empty: Empty = torch.empty,
    ) -> dict[str, Any]:
        """The batch of rows.

        Args:
            tags: The tags of the rows, as columns.
            rows: Their tokens, (B, T).
            samples: The rows, which may say themselves where documents end; empty: none of them does.
            empty: As for `of_columns`.
        """
        batch: dict[str, Any] = {"__index__": torch.from_numpy(np.array(tags["__index__"], np.int64))}
        if self.keys:
            batch["__key__"] = tags["__key__"]
        batch["__domain__"] = tags["__domain__"]
        if self.narrow:
            return {**batch, "input_ids": _as_tensor(rows)}
        # One block of memory for all: half the cost of allocating it, and of passing it from a worker to the trainer.
        names = ["input_ids", *["labels"] * self.labels, *["position_ids"] * (self.end_token is not None)]
        wide = empty((len(names), *rows.shape), dtype=torch.int64)
        _widen(rows, wide[: 1 + self.labels])
        if self.end_token is not None:
            starts = _document_starts(samples, rows, self.end_token)
            places = np.arange(rows.shape[1])
            since = np.maximum.accumulate(np.where(starts, places, 0), axis=1)
            np.subtract(places, since, out=wide[-1].numpy())
            if self.labels:
                wide[1].numpy()[starts] = IGNORED_LABEL
        return {**batch, **dict(zip(names, wide, strict=True))}


OfRows = Callable[[np.ndarray[Any, Any]], dict[str, torch.Tensor]]
"""From packed rows, (B, T), to tensors whose first dimension is B."""


def packed_batch(collate: Callable[..., Any]) -> PackedBatch | None:
    """The batches of a `collate_fn`, if it is `collate_packed` or a `functools.partial` of it."""
    if collate is collate_packed:
        return PackedBatch()
    if isinstance(collate, functools.partial) and collate.func is collate_packed and not collate.args:
        return PackedBatch(**collate.keywords)
    return None


def of_packed_rows(transform: Callable[..., Any] | None) -> OfRows | None:
    """A function that does to a batch of packed rows, (B, T), what a transform does to each; None: there is none.

    It raises `DecodeError` if the transform would raise it for one of the rows.
    """
    if transform is packed_tokens:
        return _packed_tokens_of_rows
    return transform.of_rows if type(transform) is ShiftedTokens else None


def _packed_tokens_of_rows(rows: np.ndarray[Any, Any]) -> dict[str, torch.Tensor]:
    tokens = _widened(rows)
    return {"input_ids": tokens, "labels": tokens}


def _widened(rows: np.ndarray[Any, Any]) -> torch.Tensor:
    """Rows as a new tensor of int64."""
    wide = torch.empty(rows.shape, dtype=torch.int64, device="cpu")
    _widen(rows, wide)
    return wide


def _widen(rows: np.ndarray[Any, Any], wide: torch.Tensor) -> None:
    """Writes rows, (B, T), to a tensor of int64, (..., B, T).

    With several threads, torch splits the copy across them, and they wait for each other. Where other processes use all
    cores, that takes more than ten times as long as the conversion itself; numpy takes a quarter longer than one thread
    of torch. With `torch.set_default_device`, the tensor may lie on another device, where numpy cannot write.
    """
    if torch.get_num_threads() == 1 or not wide.is_cpu:
        wide.copy_(_as_tensor(rows))
    else:
        np.copyto(wide.numpy(), rows, casting="unsafe")


def _as_tensor(rows: np.ndarray[Any, Any]) -> torch.Tensor:
    """An array as a tensor, without a copy if torch has its type.

    Arrays that cannot be written to are copied, and so are numbers in the byte order of another machine, because torch
    has no such tensors.
    """
    if not rows.dtype.isnative:
        rows = rows.astype(rows.dtype.newbyteorder("="))
    try:
        return torch.from_numpy(rows if rows.flags.writeable else rows.copy())
    except TypeError:
        return torch.from_numpy(rows.astype(np.int64))


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
            f"{shown([name for name in sample if not name.startswith('__')])}: write the shards with --tokenizer, or "
            f"use TokenizeText; {HOW_TO_RESUME}"
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
        row = _packed(sample)
        if len(row) not in (self.length, self.length + 1):
            raise DecodeError(
                f"row {sample.get('__key__')!r} of {sample.get('__domain__')!r} has {len(row)} tokens, but the model "
                f"reads {self.length}: write the shards with --sequence-length {self.length + 1} (or {self.length}, "
                "whose last position then has nothing to predict)"
            )
        return {name: value[0] for name, value in self.of_rows(row[None]).items()}

    def of_rows(self, rows: np.ndarray[Any, Any]) -> dict[str, torch.Tensor]:
        """The same for rows of one length: each (B, T).

        Raises:
            DecodeError: They have another length.
        """
        count, size = rows.shape
        if size not in (self.length, self.length + 1):
            raise DecodeError(f"the rows have {size} tokens, but the model reads {self.length}")
        # By numpy, for the reason that `_widen` gives.
        labels, places = np.zeros((count, self.length), np.int64), np.arange(self.length)
        labels[:, : size - 1] = rows[:, 1:]
        found = {
            "tokens": rows[:, : self.length].astype(np.int64, order="C"),
            "labels": labels,
            "loss_mask": np.tile((places < size - 1).astype(np.float32), (count, 1)),
            "position_ids": np.tile(places, (count, 1)),
        }
        return {name: torch.from_numpy(values) for name, values in found.items()}
