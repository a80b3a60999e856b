"""Training rows of each domain, as windows that the environment's scorer reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from dmagent_loader._validation import shown
from dmagent_loader.environment.batches import ScoredWindow
from dmagent_loader.environment.encoding import Tokens
from dmagent_loader.errors import ConfigurationError

Row: TypeAlias = Any
"""Token ids (list, array or tensor), or a mapping with ``input_ids`` and perhaps ``attention_mask`` and ``labels``."""

IGNORED_LABEL = -100


def probe_windows(
    rows_by_domain: Mapping[str, Sequence[Row]], *, max_length: int, vocabulary: int | None
) -> dict[str, list[ScoredWindow]]:
    """The rows of each domain as windows whose tokens are all predicted, up to `max_length` tokens of each row.

    Of a mapping the tokens under ``attention_mask`` count; those before the first and after the last label other than
    -100 are not scored.

    Args:
        rows_by_domain: Domain -> rows, one or more.
        max_length: The most tokens of a row that the model reads; the rest of the row is left out.
        vocabulary: Number of tokens that the model knows; None: unknown.

    Raises:
        ConfigurationError: No domain, a domain without rows, or a row that is no token ids or too short.
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
                f"domain {domain!r} has the rows {shown(rows)}: give one row of token ids or more, or leave the domain "
                "out"
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
                f"{origin} has {shown(sorted(map(str, row)))} but no 'input_ids': tokenise the rows, for example by "
                "the sampler's transform= (transforms.packed_tokens or transforms.TokenizeText)"
            )
        tokens = _numbers(row["input_ids"], origin)
        mask = np.ones(len(tokens), bool)
        if row.get("attention_mask") is not None:
            mask = _numbers(row["attention_mask"], origin) != 0
        labels = tokens if row.get("labels") is None else _numbers(row["labels"], origin)
        if not len(tokens) == len(mask) == len(labels):
            raise ConfigurationError(
                f"{origin} has {len(tokens)} tokens, {len(mask)} marks in attention_mask and {len(labels)} labels: "
                "give equally many of each"
            )
        tokens, labels = tokens[mask], labels[mask]
    else:
        tokens = _numbers(row, origin)
    tokens = tokens[: max_length + 1]
    first, last = 1, len(tokens)
    if labels is not None:
        counted = np.flatnonzero(labels[: len(tokens)] != IGNORED_LABEL)
        # The first token is predicted by nothing, whatever its label says.
        first, last = (max(1, int(counted[0])), int(counted[-1]) + 1) if len(counted) else (1, 0)
    if last <= first - 1 or last < 2:
        raise ConfigurationError(
            f"{origin} has no token to predict within its first {max_length + 1}: give rows of two tokens or more with "
            "labels other than -100"
        )
    tokens = tokens[:last]
    if tokens.min() < 0 or (vocabulary is not None and tokens.max() >= vocabulary):
        raise ConfigurationError(
            f"{origin} holds tokens from {tokens.min()} to {tokens.max()}, but the model knows {vocabulary} tokens: "
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
