"""Conversion of each domain's training rows to windows for the environment's scorer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from dmagent_loader._distributed import get_rank
from dmagent_loader._validation import shown
from dmagent_loader.environment.batches import ScoredWindow
from dmagent_loader.environment.encoding import Tokens
from dmagent_loader.errors import ConfigurationError, InfluenceError

logger = logging.getLogger(__name__)

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


def without_copies(windows: Mapping[str, Sequence[ScoredWindow]]) -> dict[str, list[ScoredWindow]]:
    """Each window of a domain once: a copy is no further evidence, and would make the standard error too small.

    Raises:
        InfluenceError: No domain has two different windows, though one has several.
    """
    found = {
        domain: list({(row.num_scored, row.tokens.tobytes()): row for row in listed}.values())
        for domain, listed in windows.items()
    }
    if all(len(listed) < 2 for listed in found.values()) and any(len(listed) > 1 for listed in windows.values()):
        raise InfluenceError(
            "the rows of each domain are copies of one row, but a standard error needs several: give the domains "
            "other rows, or use the policy 'question-topics'"
        )
    counts = {domain: (len(listed), len(windows[domain])) for domain, listed in found.items()}
    repeated = [f"{name!r} ({kept} of {read} differ)" for name, (kept, read) in counts.items() if 2 * kept < read]
    if repeated and get_rank() == 0:
        logger.warning(
            "most of the rows read of %s are copies of each other, such as boilerplate; each counts once: look at "
            "these domains with `dmagent inspect`, and remove copies with `dmagent filter`",
            ", ".join(repeated),
        )
    return found


def num_tokens(row: Row) -> int:
    """Number of token ids in a row, padding included."""
    return len(row["input_ids"] if isinstance(row, Mapping) else row)


def has_token_to_predict(row: Row, max_length: int) -> bool:
    """Whether a row can be scored: not an empty document, nor one whose labels are all -100 within the limit.

    Args:
        row: Token ids, or a mapping with ``input_ids``.
        max_length: Most tokens that are read.

    Raises:
        ConfigurationError: The row is of another shape.
    """
    ids = row["input_ids"] if isinstance(row, Mapping) and "input_ids" in row else row
    if not isinstance(ids, Mapping) and not len(ids):
        return False
    tokens, labels = _parts(row, "a row")
    first, last = _span(tokens[: max_length + 1], labels)
    return first < last


def _span(tokens: Tokens, labels: Tokens | None) -> tuple[int, int]:
    """First token to predict, and the end of the last one; equal where there is none."""
    if labels is None:
        return 1, max(1, len(tokens))
    counted = np.flatnonzero(labels[: len(tokens)] != IGNORED_LABEL)
    # The first token has no context to be predicted from, whatever its label.
    counted = counted[counted > 0]
    return (int(counted[0]), int(counted[-1]) + 1) if len(counted) else (1, 1)


def _parts(row: Row, origin: str) -> tuple[Tokens, Tokens | None]:
    """Tokens and labels without padding; None: all tokens count."""
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
        return tokens[mask], labels[mask]
    return _numbers(row, origin), labels


def _window(row: Row, origin: str, max_length: int, vocabulary: int | None) -> ScoredWindow:
    tokens, labels = _parts(row, origin)
    tokens = tokens[: max_length + 1]
    first, last = _span(tokens, labels)
    if first == last:
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
