"""Conversion of each domain's training rows to windows for the environment's scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from dmagent_loader._validation import shown
from dmagent_loader.environment.batches import ScoredWindow
from dmagent_loader.environment.encoding import Tokens
from dmagent_loader.errors import ConfigurationError

Row: TypeAlias = Any
"""Token ids (list, array, tensor), or a mapping with ``input_ids`` and optionally ``attention_mask`` and ``labels``."""

IGNORED_LABEL = -100


def probe_windows(
    rows_by_domain: Mapping[str, Sequence[Row]], *, max_length: int, vocabulary: int | None
) -> dict[str, list[ScoredWindow]]:
    """Converts rows to windows of at most `max_length` tokens in which every token but the first is predicted.

    In mapping rows, only the tokens under ``attention_mask`` are read, and only those from the first to the last label
    other than -100 are scored.

    Args:
        rows_by_domain: Domain -> one or more rows.
        max_length: Maximum number of tokens the model reads per row; the rest of the row is dropped.
        vocabulary: Vocabulary size of the model; None: unknown.

    Raises:
        ConfigurationError: There are no domains, a domain has no rows, or a row is too short or not token ids.
    """
    if not isinstance(rows_by_domain, Mapping) or not rows_by_domain:
        raise ConfigurationError(
            f"rows_by_domain is {shown(rows_by_domain)}; it must map each domain to rows of token ids, for example "
            "sampler.probe_rows(32)"
        )
    windows = {}
    for domain, rows in rows_by_domain.items():
        if isinstance(rows, (str, bytes)) or not hasattr(rows, "__len__") or not len(rows):
            raise ConfigurationError(
                f"domain {domain!r} has the rows {shown(rows)}: give at least one row of token ids, or leave the "
                "domain out"
            )
        windows[domain] = [
            _window(row, f"row {number} of domain {domain!r}", max_length, vocabulary)
            for number, row in enumerate(rows)
        ]
    return windows


def _window(row: Row, origin: str, max_length: int, vocabulary: int | None) -> ScoredWindow:
    labels = None
    if isinstance(row, Mapping):
        if "input_ids" not in row:
            raise ConfigurationError(
                f"{origin} has {shown(sorted(map(str, row)))} but no 'input_ids': tokenise the rows, for example "
                "with the sampler's transform= (transforms.packed_tokens or transforms.TokenizeText)"
            )
        tokens = _numbers(row["input_ids"], origin)
        mask = np.ones(len(tokens), bool)
        if row.get("attention_mask") is not None:
            mask = _numbers(row["attention_mask"], origin) != 0
        labels = tokens if row.get("labels") is None else _numbers(row["labels"], origin)
        if not len(tokens) == len(mask) == len(labels):
            raise ConfigurationError(
                f"{origin} has {len(tokens)} tokens, {len(mask)} marks in attention_mask and {len(labels)} labels: "
                "all three must have the same length"
            )
        tokens, labels = tokens[mask], labels[mask]
    else:
        tokens = _numbers(row, origin)
    tokens = tokens[: max_length + 1]
    first, last = 1, len(tokens)
    if labels is not None:
        counted = np.flatnonzero(labels[: len(tokens)] != IGNORED_LABEL)
        # The first token has no context to be predicted from, whatever its label.
        first, last = (max(1, int(counted[0])), int(counted[-1]) + 1) if len(counted) else (1, 0)
    if last <= first - 1 or last < 2:
        raise ConfigurationError(
            f"{origin} has no token to predict within its first {max_length + 1}: give rows of at least two tokens and "
            "labels other than -100"
        )
    tokens = tokens[:last]
    if tokens.min() < 0 or (vocabulary is not None and tokens.max() >= vocabulary):
        raise ConfigurationError(
            f"{origin} has tokens from {tokens.min()} to {tokens.max()}, but the model's vocabulary is {vocabulary}: "
            "tokenise the rows with the model's own tokenizer"
        )
    return ScoredWindow(tokens=tokens, num_scored=last - first)


def _numbers(values: Any, origin: str) -> Tokens:
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    try:
        found = np.asarray(values)
    except ValueError as error:
        raise ConfigurationError(f"{origin} is {shown(values)}; it must be a flat list of token ids") from error
    if found.ndim != 1 or found.dtype.kind not in "iu" or not len(found):
        raise ConfigurationError(
            f"{origin} has shape {found.shape} and type {found.dtype}; it must be a flat list of token ids"
        )
    return found.astype(np.int64)
